"""Tasks of mteb on data that is made here: what workers ask of it, and the same as folders in place of those on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import embed_mined

HUB = {"STSBenchmark": "mteb/stsbenchmark-sts", "NFCorpus": "mteb/nfcorpus"}
"""Where tasks have their data; a folder of that path comes before the hub."""
CONFIGS = """\
---
configs:
- {config_name: corpus, data_files: [{split: corpus, path: corpus.jsonl}]}
- {config_name: queries, data_files: [{split: queries, path: queries.jsonl}]}
- {config_name: default, data_files: [{split: test, path: test.jsonl}]}
---
"""


def written(folder: Path) -> None:
    """A model, and the data of both tasks, in the form in which we measure it and in that of the hub."""
    embed_mined.model(folder / "model")
    pairs, beir = Path(embed_mined.graded(folder)), Path(embed_mined.collection(folder / "beir"))
    graded, retrieval = (folder / HUB[name] for name in ("STSBenchmark", "NFCorpus"))
    for made in (graded, retrieval):
        made.mkdir(parents=True)
    (graded / "test.jsonl").write_text(pairs.read_text())
    for name in ("corpus.jsonl", "queries.jsonl"):
        (retrieval / name).write_text((beir / name).read_text())
    (retrieval / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _qrels(beir)))
    (retrieval / "README.md").write_text(CONFIGS)


def _qrels(beir: Path) -> list[dict[str, Any]]:
    header, *lines = ((beir / "qrels" / "test.tsv").read_text()).splitlines()
    rows = [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]
    return [{**row, "score": int(row["score"])} for row in rows]


def measured(folder: Path) -> None:
    """`mteb.evaluate` on both tasks, with a model that has a prompt for queries, gives what we measure ourselves."""
    import datasets
    import mteb

    from ptrain_embed import mteb_model
    from ptrain_embed.encoder import Encoder

    encoder = Encoder.load(str(folder / "model"), query_prompt="w1 w2 ")
    task: Any = mteb.get_task
    pairs, collection = task("STSBenchmark"), task("NFCorpus")
    lines = embed_mined.read_lines(folder / "graded.jsonl")
    pairs.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(lines)})
    collection.dataset = {"default": {"test": _split(folder / "beir")}}
    pairs.data_loaded = collection.data_loaded = True
    model = mteb_model.model_of(encoder, "someone/tiny")
    results = folder / "results"
    result = mteb.evaluate(model, [pairs, collection], cache=mteb.ResultCache(results), show_progress_bar=False)
    assert {path.stem for path in results.rglob("*.json")} >= {"STSBenchmark", "NFCorpus"}
    found = mteb_model.scores(result, "test")
    wanted = ours(encoder, folder)
    assert list(found) == list(wanted) and result.model_name == "someone/tiny"
    assert all(abs(found[name] - value) < 1e-4 for name, value in wanted.items()), (found, wanted)
    (folder / "ours.json").write_text(json.dumps(ours(Encoder.load(str(folder / "model")), folder)))


def ours(encoder: Any, folder: Path) -> dict[str, float]:
    """The main score of both tasks, as we measure it."""
    from ptrain_embed import measure

    return {
        "STSBenchmark/default": measure.measure_pairs(encoder, str(folder / "graded.jsonl"), None)["spearman"],
        "NFCorpus/default": measure.measure_collection(encoder, str(folder / "beir"), "test", True, None)["ndcg@10"],
    }


def refused() -> None:
    """Names and splits that there are not, and a task of images, are said in one message each."""
    from ptrain import DataError
    from ptrain_embed.mteb_model import task_of

    for name, split, says in (
        ("NFCorpu", "test", "Did you mean: 'NFCorpus'?"),
        ("NFCorpus", "dev", "the task `NFCorpus` has no split `dev`"),
        ("CIFAR10", "test", "a task of texts alone"),
    ):
        try:
            task_of(name, split)
        except DataError as error:
            assert says in str(error), str(error)
        else:
            raise AssertionError(f"nothing was said of {name}")


def _split(beir: Path) -> Any:
    """The same collection as mteb holds it once it is loaded."""
    import datasets

    tables = {name: embed_mined.read_lines(beir / f"{name}.jsonl") for name in ("corpus", "queries")}
    grades: dict[str, dict[str, int]] = {}
    for row in _qrels(beir):
        grades.setdefault(row["query-id"], {})[row["corpus-id"]] = row["score"]
    held = {n: datasets.Dataset.from_list(rows).rename_column("_id", "id") for n, rows in tables.items()}
    return {**held, "relevant_docs": grades, "top_ranked": None}
