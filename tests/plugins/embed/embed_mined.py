"""What workers of the tests of mining and measuring do: a tiny encoder, rows of words, and everything held to a plain way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = [f"w{at}" for at in range(60)]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]


def model(folder: Path) -> str:
    """A folder with a BERT of one layer, drawn at random, and a tokenizer with a token for each word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    keys: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    made = BertModel(BertConfig(vocab_size=len(SPECIAL + WORDS), max_position_embeddings=64, **keys))
    # So that texts with other words are apart.
    made.embeddings.word_embeddings.weight.data *= 50
    made.save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({word: at for at, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def text(drawn: Any, length: int) -> str:
    """So many words."""
    return " ".join(drawn.choice(WORDS, length))


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Queries with one to three positives, some with a negative, some twice with other positives."""
    import numpy as np

    drawn = np.random.default_rng(seed)
    made = []
    for at in range(count):
        query = text(drawn, 3) if at % 5 else (made[-1]["query"] if made else text(drawn, 3))
        positives = [f"{query} {text(drawn, 4)}" for _ in range(1 + at % 3)]
        made.append({"query": query, "positives": positives, "negatives": [text(drawn, 6)] if at % 4 == 0 else []})
    return made


def write_lines(path: Path, lines: list[dict[str, Any]]) -> str:
    """A file of JSON lines."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Its lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def recipe(folder: Path, **mine: Any) -> dict[str, Any]:
    """A recipe that mines from `rows.jsonl` and a further corpus."""
    keys = {"output": str(folder / "mined.jsonl"), "corpus": [str(folder / "more.jsonl")], "top_k": 40, "negatives": 4}
    return {
        "type": "embed",
        "model": {"name_or_path": str(folder / "model"), "query_prompt": "w1 w1 ", "pooling": "mean", "dtype": "fp32"},
        "data": {
            "sources": [{"type": "jsonl", "path": str(folder / "rows.jsonl")}],
            "cache_dir": str(folder / "cache"), "max_query_length": 6, "max_length": 16,
        },
        "mine": {**keys, **mine},
    }  # fmt: skip


def mining(folder: Path) -> None:
    """Interrupted, resumed and repeated, mining gives what a plain reading of the rules gives."""
    import numpy as np

    import ptrain
    from ptrain_embed import mine as mining_module
    from ptrain_embed import vectors
    from ptrain_embed.encoder import Encoder

    drawn = np.random.default_rng(1)
    model(folder / "model")
    given = rows(40)
    write_lines(folder / "rows.jsonl", given)
    more = [{"text": text(drawn, 8)} for _ in range(50)] + [
        {"text": given[3]["query"]},
        {"text": given[0]["positives"][0]},
    ]
    write_lines(folder / "more.jsonl", more)
    vectors.CHUNK, mining_module.QUERIES = 16, 8
    asked: list[str] = []
    encode, fails = Encoder.encode, {"after": 3}

    def counted(self: Any, texts: Any, *arguments: Any, **keys: Any) -> Any:
        if fails["after"] == 0:
            raise KeyboardInterrupt
        fails["after"] -= 1
        asked.extend(texts)
        return encode(self, texts, *arguments, **keys)

    Encoder.encode = counted  # type: ignore[method-assign]

    def mine(**keys: Any) -> list[dict[str, Any]]:
        mining_module.mine(ptrain.open_recipe(recipe(folder, **keys)), lambda line: None)
        return read_lines(folder / "mined.jsonl")

    try:
        mine()
        raise AssertionError("it was to be interrupted")
    except KeyboardInterrupt:
        assert not (folder / "mined.jsonl").exists()
    fails["after"] = 99
    found = mine()
    documents = list(
        dict.fromkeys([t for row in given for t in row["positives"] + row["negatives"]] + [m["text"] for m in more])
    )
    queries = list(dict.fromkeys(row["query"] for row in given))
    # The interruption cost nothing: each text once, documents and queries alike.
    assert sorted(asked) == sorted(documents + queries), (len(asked), len(documents), len(queries))
    assert found == by_hand(folder, given, documents, queries)
    assert 10 < len(found) <= len(queries)
    asked.clear()
    other = mine(threshold=0.8, sampling="random", negatives=2)
    assert not asked and other != found
    mine(output=str(folder / "mined.parquet"))
    assert len(asked) == len(documents) + len(queries)  # another data set has a folder of its own
    same_in_parquet(folder, found)
    asked.clear()
    others = rows(40, seed=2)
    write_lines(folder / "rows.jsonl", others)
    changed = mine()
    # As many texts as before, and none of their vectors.
    assert len({row["query"] for row in others}) == len(queries) and {row["query"] for row in others} <= set(asked)
    assert {row["query"] for row in changed} <= {row["query"] for row in others}
    asked.clear()
    write_lines(folder / "rows.jsonl", given[:20])
    assert mine() != found and asked
    Encoder.encode = encode  # type: ignore[method-assign]
    trained_on(folder)
    with_its_tokenizer_elsewhere(folder)


def with_its_tokenizer_elsewhere(folder: Path) -> None:
    """The recipe's is meant: of a folder with weights alone the same is mined."""
    import shutil

    import ptrain
    from ptrain_embed import mine as mining_module

    before = read_lines(folder / "mined.jsonl")
    (folder / "weights").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "model" / name, folder / "weights")
    keys = recipe(folder, output=str(folder / "again.jsonl"))
    keys["model"]["name_or_path"] = str(folder / "weights")
    keys["tokenizer"] = {"name_or_path": str(folder / "model")}
    mining_module.mine(ptrain.open_recipe(keys), lambda line: None)
    assert read_lines(folder / "again.jsonl") == before


def by_hand(
    folder: Path, given: list[dict[str, Any]], documents: list[str], queries: list[str]
) -> list[dict[str, Any]]:
    """What mining is to find: all scores, the 40 best, the rules one by one."""
    from ptrain_embed.encoder import Encoder

    encoder = Encoder.load(
        str(folder / "model"), max_length={"query": 6, "document": 16}, pooling="mean", query_prompt="w1 w1 "
    )
    scores = (encoder.encode(queries, "query") @ encoder.encode(documents, "document").T).tolist()
    made = []
    for query, near in zip(queries, scores, strict=True):
        labelled = {
            relation: {t for row in given if row["query"] == query for t in row[relation]}
            for relation in ("positives", "negatives")
        }
        order = sorted(range(len(documents)), key=lambda at: (-round(near[at], 6), at))[:40]
        positives = [at for at in order if documents[at] in labelled["positives"]][:3]
        if not positives:
            continue
        limit = 0.95 * near[positives[-1]]
        negatives = [
            at for at in order
            if documents[at] not in labelled["positives"] and documents[at] != query
            and (near[at] <= limit or documents[at] in labelled["negatives"])
        ][:4]  # fmt: skip
        if len(negatives) == 4:
            texts = {"positives": [documents[at] for at in positives], "negatives": [documents[at] for at in negatives]}
            made.append({"query": query, **texts, "scores": [near[at] for at in positives + negatives]})
    written = read_lines(folder / "mined.jsonl")
    for one, other in zip(made, written, strict=True):
        assert all(abs(a - b) < 1e-5 for a, b in zip(one["scores"], other["scores"], strict=True))
        one["scores"] = other["scores"]
    return made


def same_in_parquet(folder: Path, found: list[dict[str, Any]]) -> None:
    """The other form holds the same rows."""
    import numpy as np
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "mined.parquet").to_pylist()
    assert [{**row, "scores": None} for row in rows] == [{**row, "scores": None} for row in found]
    assert np.allclose(np.concatenate([r["scores"] for r in rows]), np.concatenate([r["scores"] for r in found]))


def trained_on(folder: Path) -> None:
    """The result is data for a recipe: negatives and scores arrive."""
    import ptrain

    keys = {**recipe(folder), "loss": "kl", "train_iters": 2, "micro_batch_size": 4, "checkpoint": []}
    del keys["mine"]
    keys["data"] = {**keys["data"], "sources": [{"type": "jsonl", "path": str(folder / "mined.jsonl")}]}
    result = ptrain.train({**keys, "output_dir": str(folder / "run"), "loss_log_interval": 1})
    assert result.outcome == "done" and result.metrics["loss"] > 0


def collection(folder: Path) -> str:
    """A folder with 70 documents, 30 queries and grades, in the form of BEIR."""
    import numpy as np

    drawn = np.random.default_rng(2)
    documents = [{"_id": f"d{at}", "title": text(drawn, 1), "text": text(drawn, 5)} for at in range(70)]
    queries, qrels = [], ["query-id\tcorpus-id\tscore"]
    for at in range(30):
        near = documents[at]["text"].split()
        queries.append({"_id": f"q{at}" if at else "d3", "text": " ".join([*near[:2], text(drawn, 2)])})
        qrels += [f"{queries[-1]['_id']}\td{at}\t2", f"{queries[-1]['_id']}\td{at + 30}\t{at % 2}"]
    write_lines(folder / "corpus.jsonl", documents)
    write_lines(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / "test.tsv").write_text("\n".join(qrels) + "\n", encoding="utf-8")
    return str(folder)


def graded(folder: Path) -> str:
    """A file of 40 pairs."""
    import numpy as np

    drawn = np.random.default_rng(3)
    made = []
    for _ in range(40):
        words, same = text(drawn, 6).split(), int(drawn.integers(0, 6))
        other = [*words[:same], *text(drawn, 6 - same).split()] if same < 6 else words
        made.append({"sentence1": " ".join(words), "sentence2": " ".join(other), "score": float(same)})
    return write_lines(folder / "graded.jsonl", made)


def written(folder: Path) -> None:
    """A folder with a model, rows, a collection and graded pairs."""
    model(folder / "model")
    write_lines(folder / "rows.jsonl", rows(20))
    write_lines(folder / "more.jsonl", [{"text": "w1 w2"}])
    collection(folder / "beir")
    graded(folder)


def evaluation(folder: Path) -> list[dict[str, Any]]:
    """Both evaluators, the first at dimensions of its own."""
    return [
        {"type": "retrieval", "path": str(folder / "beir"), "titles": False, "dimensions": [8, 16]},
        {"type": "similarity", "path": str(folder / "graded.jsonl")},
    ]


def measuring(folder: Path, stage: int, out: Path) -> None:
    """A run without evaluation rows measures on what its evaluators bring."""
    import json as js

    import ptrain

    keys = recipe(folder)
    del keys["mine"]
    result = ptrain.train({
        **keys, "deepspeed": {"zero_optimization": {"stage": stage}}, "evaluation": evaluation(folder),
        "eval_at_start": True, "exit_iteration": 0, "train_iters": 1, "eval_interval": 2, "checkpoint": [],
        "matryoshka": [8], "output_dir": str(out), "micro_batch_size": 2,
    })  # fmt: skip
    print(js.dumps({name: value for name, value in result.metrics.items() if name.startswith("eval/")}))


def not_measured(folder: Path, out: Path) -> None:
    """What can't be measured on is told before the first step."""
    import ptrain
    from ptrain import PtrainError

    retrieval, similarity = evaluation(folder)
    keys = {**recipe(folder), "micro_batch_size": 2}
    del keys["mine"]
    for number, (entries, words) in enumerate([
        ([retrieval, retrieval], "give each a `name`"),
        ([{**retrieval, "path": str(folder / "none")}], "is no folder"),
        ([{**retrieval, "split": "dev"}], "`dev`"),
        ([{**retrieval, "dimensions": [64]}], "the model's have 32"),
        ([{**similarity, "path": str(folder / "none.jsonl")}], "none.jsonl"),
    ]):  # fmt: skip
        place = out / str(number)
        try:
            ptrain.train({**keys, "evaluation": entries, "train_iters": 1, "output_dir": str(place), "checkpoint": []})
        except PtrainError as error:
            assert words in str(error) and error.exit_code == 2, str(error)
        else:
            raise AssertionError(f"nothing was said of: {words}")
        assert not place.exists()


def by_command(folder: Path) -> None:
    """The same by `Encoder` and oracles: trec_eval's and scipy's own code on dense scores."""
    import json as js

    from scipy import stats

    from ptrain_embed import measure
    from ptrain_embed.encoder import Encoder

    encoder = Encoder.load(
        str(folder / "model"), max_length={"query": 6, "document": 16}, pooling="mean", query_prompt="w1 w1 "
    )
    found: dict[str, float] = {}
    for name, value in measure.measure_collection(encoder, str(folder / "beir"), "test", False, [8, 16]).items():
        found[f"eval/retrieval/{name}"] = value
    for name, value in measure.measure_pairs(encoder, str(folder / "graded.jsonl"), [8]).items():
        found[f"eval/similarity/{name}"] = value
    for size, at in ((32, ""), (8, "/8"), (16, "/16")):
        for name, wanted in by_trec_eval(folder, encoder, size, unit=True).items():
            assert abs(found[f"eval/retrieval/{name}{at}"] - wanted) < 1e-6, (name, at)
    raw = Encoder.load(str(folder / "model"), max_length=16, pooling="mean", normalize=False)
    products = measure.measure_collection(raw, str(folder / "beir"), "test", False, [4])
    wanted, cosines = (by_trec_eval(folder, raw, 4, unit=unit) for unit in (False, True))
    assert all(abs(products[f"{name}/4"] - value) < 1e-6 for name, value in wanted.items()) and wanted != cosines
    pairs = [js.loads(line) for line in (folder / "graded.jsonl").read_text().splitlines()]
    first, second = (encoder.encode([pair[name] for pair in pairs]).numpy() for name in ("sentence1", "sentence2"))
    correlation: Any = stats.spearmanr((first * second).sum(1), [pair["score"] for pair in pairs])
    assert abs(found["eval/similarity/spearman"] - correlation.statistic) < 1e-6
    print(js.dumps(found))


def by_trec_eval(folder: Path, encoder: Any, size: int, unit: bool) -> dict[str, float]:
    """Measures of all products of the first dimensions, scaled to length 1 or as they are, by trec_eval's own code."""
    import numpy as np
    import pytrec_eval

    from ptrain_embed.beir import read_corpus, read_qrels, read_queries

    documents, queries = dict(read_corpus(folder / "beir", titles=False)), read_queries(folder / "beir")
    qrels = {q: {d: int(g) for d, g in grades.items()} for q, grades in read_qrels(folder / "beir", "test").items()}
    held = encoder.encode(list(documents.values()), "document").numpy()[:, :size]
    asked = encoder.encode(list(queries.values()), "query").numpy()[:, :size]
    if unit:
        asked, held = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (asked, held))
    run = {
        q: {d: float(s) for d, s in zip(documents, row, strict=True) if d != q}
        for q, row in zip(queries, asked @ held.T, strict=True)
    }
    oracle = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.1,10", "map"}).evaluate(run)
    names = {"ndcg@10": "ndcg_cut_10", "recall@1": "recall_1", "recall@10": "recall_10", "map@100": "map"}
    return {ours: float(np.mean([one[theirs] for one in oracle.values()])) for ours, theirs in names.items()}


def refused(folder: Path) -> None:
    """What is wrong in what is given is said in one message each."""
    import ptrain
    from ptrain import PtrainError
    from ptrain_embed import measure
    from ptrain_embed.collection import read_collection
    from ptrain_embed.encoder import Encoder
    from ptrain_embed.mine import mine

    def says(action: Callable[[], Any], words: str) -> None:
        try:
            action()
        except PtrainError as error:
            assert words in str(error) and error.exit_code == 2, str(error)
        else:
            raise AssertionError(f"nothing was said of: {words}")

    def mined(**keys: Any) -> Callable[[], Any]:
        return lambda: mine(ptrain.open_recipe(recipe(folder, **keys)), print)

    encoder = Encoder.load(str(folder / "model"))
    plain = {**recipe(folder)}
    del plain["mine"]
    says(lambda: mine(ptrain.open_recipe(plain), print), "has no section `mine`")
    says(mined(output="mined.csv"), "ends in .jsonl or .parquet")
    says(mined(output=str(folder / "none" / "mined.jsonl")), "there is no folder")
    says(mined(corpus=[str(folder / "none.jsonl")]), "none.jsonl")
    says(mined(corpus=[str(write_lines(folder / "untitled.jsonl", [{"body": "x"}]))]), "there is no `text`")
    says(mined(negatives=500), "no query is left")
    says(mined(model=str(folder / "no-model")), "no-model")
    says(mined(threshold=2.0), "more than 0 and at most 1")
    says(lambda: measure.measure_collection(encoder, str(folder / "beir"), "dev", True, None), "`dev`")
    says(lambda: measure.measure_collection(encoder, str(folder / "beir"), "test", True, [64]), "the model's have 32")
    says(
        lambda: measure.measure_pairs(encoder, write_lines(folder / "p.jsonl", [{"sentence1": "w1"}]), None),
        "p.jsonl:1",
    )
    same = [{"sentence1": "w1", "sentence2": "w2", "score": 1.0}] * 3
    says(lambda: measure.measure_pairs(encoder, write_lines(folder / "s.jsonl", same), None), "are the same")
    (folder / "bad" / "qrels").mkdir(parents=True)
    write_lines(folder / "bad" / "corpus.jsonl", [{"_id": "d1", "text": "w1"}])
    write_lines(folder / "bad" / "queries.jsonl", [{"_id": "q1", "text": "w1"}])
    for line, words in (("q1\td2\t1", "`d2`"), ("q2\td1\t1", "`q2`"), ("q1\td1\t0", "no relevant document")):
        (folder / "bad" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{line}\n", encoding="utf-8")
        says(lambda: read_collection(str(folder / "bad")), words)
    (folder / "bad" / "corpus.jsonl").write_text("", encoding="utf-8")
    says(lambda: read_collection(str(folder / "bad")), "no rows")


def odd_collections(folder: Path) -> None:
    """Queries and documents that are numbered alike, and a document without text."""
    import ptrain
    from ptrain_embed import measure
    from ptrain_embed.encoder import Encoder
    from ptrain_embed.mine import mine

    place = folder / "odd"
    write_lines(place / "corpus.jsonl", [{"_id": f"{at}", "text": "w1 " * at} for at in range(4)])
    write_lines(place / "queries.jsonl", [{"_id": f"{at}", "text": "w1 " * at} for at in range(1, 4)])
    (place / "qrels").mkdir()
    judged = "".join(f"{at}\t{at}\t1\n" for at in range(1, 4))
    (place / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}", encoding="utf-8")
    encoder = Encoder.load(str(folder / "model"))
    found = measure.measure_collection(encoder, str(place), "test", True, None)
    assert found["recall@1"] == 1, found
    mine(
        ptrain.open_recipe(recipe(folder, corpus=[str(place)], top_k=500, threshold=None, fewer="keep", negatives=500)),
        print,
    )
    negatives = [text for row in read_lines(folder / "mined.jsonl") for text in row["negatives"]]
    assert "w1" in negatives and "" not in negatives
