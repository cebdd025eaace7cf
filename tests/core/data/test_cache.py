"""The cache of prepared data: the key is the content and nothing else; a kill or a second run does no harm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from families import TEMPLATES, family

from ptrain.data import process
from ptrain.data.cache import Prepared, open_prepared, prepare
from ptrain.data.key import key
from ptrain.errors import DataError
from ptrain.recipe.load import load_recipe
from ptrain.run import Run
from ptrain_sft.plugin import SFT

Recipe = dict[str, Any]


def rows(count: int, turn: str = "answer") -> str:
    """Conversations as JSON lines."""
    made = (
        [
            {"role": "user", "content": f"question {at}"},
            {"role": "assistant", "content": f"{turn} {at} " * (1 + at % 9)},
        ]
        for at in range(count)
    )
    return "".join(json.dumps({"messages": one}) + "\n" for one in made)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe on files of this test."""
    (tmp_path / "rows.jsonl").write_text(rows(60))
    (tmp_path / "more.jsonl").write_text(rows(5, "more"))
    (tmp_path / "chat.jinja").write_text((TEMPLATES / "chatml.jinja").read_text())
    family("chatml").save_pretrained(tmp_path / "tokenizer")
    return {
        "type": "sft",
        "model": {"config": {"model_type": "llama"}},
        "tokenizer": {"name_or_path": str(tmp_path / "tokenizer"), "chat_template": str(tmp_path / "chat.jinja")},
        "data": {
            "sources": [{"type": "jsonl", "path": str(tmp_path / "rows.jsonl")}],
            "cache_dir": str(tmp_path / "cache"),
            "max_length": 128,
        },
    }


def changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Recipe:
    """A recipe with other values, given by dotted keys."""
    new: Recipe = json.loads(json.dumps(base))
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        node = new
        for name in path:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        node[last] = value
    return new


def run_of(recipe: Mapping[str, Any], code: Path | None = None) -> Run:
    return Run(load_recipe(recipe, code=code), Path("unused"))


def prepared(recipe: Mapping[str, Any]) -> Prepared:
    return prepare(run_of(recipe))


MUTATIONS = {
    "max_length": {"data.max_length": 100},
    "mask_inputs": {"data.mask_inputs": False},
    "ignore_empty_think": {"data.ignore_empty_think": True},
    "overlength": {"data.overlength": "drop"},
    "pack_samples": {"data.pack_samples": True},
    "seed": {"data.seed": 1},
    "split": {"data.train_eval_split": [0.9, 0.1]},
    "sample_count": {"data.sources.0.sample_count": 10},
    "sample_seed": {"data.sources.0.sample_seed": 10},
    "template": {"tokenizer.chat_template": "chatml"},
}


def test_what_changes_the_result_changes_the_key(recipe: Recipe, tmp_path: Path) -> None:
    """Each input in turn: rows, tokenizer, template, processing, code."""
    keys = {"as it is": key(run_of(recipe))}
    for name, change in MUTATIONS.items():
        keys[name] = key(run_of(changed(recipe, change)))
    more = {"type": "jsonl", "path": str(tmp_path / "more.jsonl")}
    keys["another source"] = key(run_of(changed(recipe, {"data.sources": [*recipe["data"]["sources"], more]})))
    keys["another order"] = key(run_of(changed(recipe, {"data.sources": [more, *recipe["data"]["sources"]]})))
    keys["evaluation rows"] = key(run_of(changed(recipe, {"data.eval_sources": [more]})))
    hook = "import ptrain\n@ptrain.callback('post-load')\ndef post(run, result):\n    return result\n"
    for name, text in {"a callback": hook, "another callback": hook + "# changed\n"}.items():
        (tmp_path / "mine.py").write_text(text)
        keys[name] = key(run_of(recipe, tmp_path / "mine.py"))
    file = tmp_path / "rows.jsonl"
    file.write_text(file.read_text().replace("question 7", "question 8", 1))
    keys["one byte of a row"] = key(run_of(recipe))
    (tmp_path / "chat.jinja").write_text((TEMPLATES / "marked.jinja").read_text())
    keys["the text of the template"] = key(run_of(recipe))
    raw = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(raw.read_text())
    content["model"]["merges"].pop()
    raw.write_text(json.dumps(content))
    keys["a merge of the tokenizer"] = key(run_of(recipe))
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "truncation_side": "left"}))
    keys["where the tokenizer cuts"] = key(run_of(recipe))
    assert len(set(keys.values())) == len(keys) == 20


@pytest.mark.parametrize(
    "kwargs",
    [{"data_files": "more.jsonl"}, {"data_files": {"train": ["*.jsonl"]}}, {"data_dir": "."},
     {"data_dir": "..", "data_files": "*/more.jsonl"}],
)  # fmt: skip
def test_rows_that_arguments_of_a_data_set_name_change_the_key(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, Any]
) -> None:
    """A file that is edited is prepared anew, by whatever words `datasets` is told to read it."""
    monkeypatch.chdir(tmp_path)
    recipe = changed(recipe, {"data.sources": [{"type": "huggingface", "name_or_path": "json", "kwargs": kwargs}]})
    before = key(run_of(recipe))
    assert key(run_of(recipe)) == before
    (tmp_path / "more.jsonl").write_text(rows(5, "other"))
    assert key(run_of(recipe)) != before


def test_what_the_users_code_computes_from_saved_rows_leaves_the_key_alone(recipe: Recipe, tmp_path: Path) -> None:
    """`Dataset.map` keeps its results in the folder of the rows: what `ptrain prepare` has made was not found again."""
    Dataset.from_dict({"text": ["some words"] * 90}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "mine.py").write_text(
        "import ptrain\n@ptrain.callback('post-load')\ndef post(run, result):\n"
        "    return result.map(lambda row: {'text': row['text'] + '!'})\n"
    )
    source = {"type": "huggingface_causal", "name_or_path": str(tmp_path / "saved")}
    recipe = changed(recipe, {"type": "causal", "data.sources": [source]})
    first, again = (prepare(run_of(recipe, tmp_path / "mine.py")) for _ in range(2))
    assert (first.hit, again.hit) == (False, True) and list((tmp_path / "saved").glob("cache-*"))


def test_what_a_trainer_says_that_its_rows_depend_on_changes_the_key(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing does where it says nothing."""
    keys = {key(run_of(recipe))}
    for said in ("query: ", "search: "):
        monkeypatch.setattr(SFT, "fingerprint", lambda self, run, said=said: [said])
        keys.add(key(run_of(recipe)))
    assert len(keys) == 3


def test_a_version_of_code_that_processes_changes_the_key(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of the trainer's package prepares anew."""
    run = run_of(recipe)
    before = key(run)
    layers = [
        type(layer)(layer.plugin, layer.name, layer.origin.replace("0.", "9."), layer.callbacks, layer.user)
        if layer.name == "sft" else layer
        for layer in run.stack.layers
    ]  # fmt: skip
    monkeypatch.setattr(run.stack, "layers", layers)
    assert key(run) != before


def test_what_does_not_change_the_result_does_not_change_the_key(recipe: Recipe, tmp_path: Path) -> None:
    """Where it goes, how fast it comes, what is trained with it, what a file is called."""
    same = {
        "output_dir": "elsewhere", "data.num_proc": 3, "data.dl_num_workers": 2, "data.cache_dir": str(tmp_path / "x"),
        "data.fail_on_missing_cache": True, "data.div_length": 64, "data.pad_to": "max_length", "micro_batch_size": 4,
        "optimizer.lr": 0.1, "logger.level": "ERROR", "seed": 3, "epochs": 5,
    }  # fmt: skip
    before = key(run_of(recipe))
    for name, value in same.items():
        assert key(run_of(changed(recipe, {name: value}))) == before, name
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "rows.jsonl").rename(tmp_path / "moved" / "rows.jsonl")
    assert key(run_of(changed(recipe, {"data.sources.0.path": str(moved)}))) == before
    (tmp_path / "tokenizer").rename(tmp_path / "renamed")
    recipe = changed(recipe, {"data.sources.0.path": str(moved), "tokenizer.name_or_path": str(tmp_path / "renamed")})
    assert key(run_of(recipe)) == before
    (tmp_path / "mine.py").write_text(
        "import ptrain\n@ptrain.callback('post-step')\ndef post(run, result):\n    return result\n"
    )
    assert key(run_of(recipe, tmp_path / "mine.py")) == before


def test_second_time_is_a_hit(recipe: Recipe) -> None:
    """The same rows, report and tokenizer, and nothing is written."""
    first = prepared(recipe)
    stamps = {file: file.stat().st_mtime_ns for file in first.path.rglob("*")}
    again = prepared(recipe)
    assert (first.hit, again.hit) == (False, True) and again.path == first.path
    assert stamps == {file: file.stat().st_mtime_ns for file in again.path.rglob("*")}
    assert again.train[:] == first.train[:] == open_prepared(first.path).train[:]
    assert again.report == first.report and len(first.eval) == 0
    assert {file.name for file in first.path.iterdir()} == {"train.arrow", "train.sha256", "tokenizer", "report.json"}
    assert again.tokenizer().chat_template == (TEMPLATES / "chatml.jinja").read_text()
    assert "train: 60 rows, 60 samples" in first.lines()[0]


def test_the_number_of_processes_does_not_matter(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are the same, byte for byte."""
    monkeypatch.setattr("ptrain.data.shards.START_SECONDS", 0.0)
    (tmp_path / "rows.jsonl").write_text(rows(2500))
    found = []
    for processes in (1, 2):
        made = prepared(
            changed(recipe, {"data.num_proc": processes, "data.cache_dir": str(tmp_path / str(processes)),
                             "data.pack_samples": True, "data.train_eval_split": [0.9, 0.1]})
        )  # fmt: skip
        found.append({name: (made.path / name).read_bytes() for name in ("train.arrow", "eval.arrow", "report.json")})
    assert found[0] == found[1]


def test_a_row_that_is_repeated_is_on_one_side_of_the_split(recipe: Recipe) -> None:
    """With a weight, an evaluation row was trained on by its copy; without one, the split is that of before."""
    split = changed(recipe, {"data.train_eval_split": [0.8, 0.2]})
    once, twice = prepared(split), prepared(changed(split, {"data.sources.0.weight": 2}))
    for made, times in ((once, 1), (twice, 2)):
        train, held_out = ([tuple(ids) for ids in part["input_ids"]] for part in (made.train, made.eval))
        assert not set(train) & set(held_out)
        assert (len(train), len(held_out)) == (48 * times, 12 * times)
        assert (len(set(train)), len(set(held_out))) == (48, 12)
    assert set(map(tuple, once.eval["input_ids"])) == set(map(tuple, twice.eval["input_ids"]))


def test_evaluation_rows(recipe: Recipe, tmp_path: Path) -> None:
    """From a split, from sources, from both; never packed; an evaluation row is in no training row."""
    more = {"type": "jsonl", "path": str(tmp_path / "more.jsonl")}
    both = prepared(
        changed(recipe, {"data.train_eval_split": [0.9, 0.1], "data.eval_sources": [more], "data.pack_samples": True})
    )
    assert len(both.eval) == 6 + 5 and both.report["train"]["rows"] == 54
    assert all(len(lengths) == 1 for lengths in both.eval["document_lengths"])
    trained = {tuple(ids) for row in both.train for ids in documents(row)}
    assert len(trained) == 54 and not trained & {tuple(row["input_ids"]) for row in both.eval}


def documents(row: Any) -> list[list[int]]:
    """The documents of a token row."""
    found, start = [], 0
    for length in row["document_lengths"]:
        found.append(row["input_ids"][start : start + length])
        start += length
    return found


def test_core_draws_from_a_source_of_ones_own(recipe: Recipe, tmp_path: Path) -> None:
    """`sample_count` and `sample_ratio` hold for every source; one that draws itself says so."""
    code = tmp_path / "mine.py"
    code.write_text(
        "import ptrain\n"
        "from datasets import Dataset\n"
        "def rows():\n"
        "    turns = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]\n"
        "    return Dataset.from_list([{'messages': turns, 'n': n} for n in range(20)])\n"
        "@ptrain.register('source', 'plain')\n"
        "class Plain(ptrain.Source):\n"
        "    def load(self, run, split): return rows()\n"
        "@ptrain.register('source', 'drawing')\n"
        "class Drawing(ptrain.Source):\n"
        "    samples = True\n"
        "    def load(self, run, split): return rows().select(range(self.config.sample_count))\n"
    )

    def numbers(**keys: Any) -> list[int]:
        run = run_of(changed(recipe, {"data.sources": [keys]}), code)
        return run.call("load", source=run.parts.sources[0])["n"]

    assert numbers(type="plain") == list(range(20))
    drawn = numbers(type="plain", sample_count=5)
    assert len(drawn) == 5 and drawn == sorted(drawn) != list(range(5))
    assert drawn != numbers(type="plain", sample_count=5, sample_seed=1)
    assert len(numbers(type="plain", weight=0.5)) == 10
    assert sorted(numbers(type="plain", weight=2)) == sorted([*range(20)] * 2)
    assert numbers(type="drawing", sample_count=5) == list(range(5))


def test_no_rows_are_an_error(recipe: Recipe) -> None:
    """For training, and for evaluation where it was asked for."""
    with pytest.raises(DataError, match="no rows for evaluation"):
        prepared(changed(recipe, {"data.train_eval_split": [0.999, 0.001]}))
    with pytest.raises(DataError, match="no rows for training"):
        prepared(changed(recipe, {"data.train_eval_split": [0.0, 1.0]}))
    causal = changed(recipe, {"type": "causal", "data.max_length": 100_000})
    (Path(recipe["data"]["sources"][0]["path"])).write_text('{"text": "short"}\n')
    with pytest.raises(DataError, match="give no sample of `data"):
        prepared(causal)


def test_a_failure_leaves_nothing(recipe: Recipe, tmp_path: Path) -> None:
    """Not even the lock."""
    with pytest.raises(DataError, match="60 of 60 rows are longer"):
        prepared(changed(recipe, {"data.max_length": 3}))
    assert not list((tmp_path / "cache").iterdir())


def test_fail_on_missing_cache(recipe: Recipe) -> None:
    """An error before, no difference after."""
    strict = changed(recipe, {"data.fail_on_missing_cache": True})
    with pytest.raises(DataError, match="not in the cache"):
        prepared(strict)
    prepared(recipe)
    assert prepared(strict).hit


def test_tokens_as_they_are(recipe: Recipe, tmp_path: Path) -> None:
    """`process: false`, also beside conversations; without tokens it is an error."""
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}\n' * 2)
    ready = {"type": "jsonl", "path": str(tmp_path / "ids.jsonl"), "process": False}
    found = prepared(changed(recipe, {"data.sources": [ready]})).train
    assert found["input_ids"] == [[1, 2, 3]] * 2 and found["labels"] == [[-100, 2, 3]] * 2
    mixed = prepared(changed(recipe, {"data.sources": [*recipe["data"]["sources"], ready]})).train
    assert len(mixed) == 62 and mixed["input_ids"][60:] == [[1, 2, 3]] * 2
    with pytest.raises(DataError, match="says `process: false`, and has the columns"):
        prepared(changed(recipe, {"data.sources.0.process": False}))


PREPARE = """
import json, sys
from pathlib import Path
from ptrain.data.cache import prepare
from ptrain.recipe.load import load_recipe
from ptrain.run import Run

made = prepare(Run(load_recipe(json.loads(sys.argv[1])), Path("unused")))
print(json.dumps([str(made.path), made.hit, len(made.train)]))
"""


def start(recipe: Mapping[str, Any]) -> subprocess.Popen[str]:
    """A process that prepares."""
    return subprocess.Popen([sys.executable, "-c", PREPARE, json.dumps(recipe)], stdout=subprocess.PIPE, text=True)


def test_a_killed_preparation_is_gone_on_with(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was encoded is not encoded again, but for the shard at hand; the result is that of an undisturbed one."""
    (tmp_path / "rows.jsonl").write_text(rows(12_000))
    killed = start(recipe)
    shards = tmp_path / "cache" / f"{key(run_of(recipe))}.tmp" / "scratch" / "shards"
    deadline = time.monotonic() + 120
    while len(list(shards.glob("*.arrow"))) < 3:
        assert time.monotonic() < deadline and killed.poll() is None, "the preparation was too quick or too slow"
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    finished = len(list(shards.glob("*.arrow")))
    assert finished < 12
    encoded: list[int] = []
    work: Callable[..., Any] = process.Work.documents
    monkeypatch.setattr(
        process.Work, "documents", lambda self, table, first: (encoded.append(first), work(self, table, first))[1]
    )
    made = prepared(recipe)
    assert len(encoded) == 12 - finished
    undisturbed = prepared(changed(recipe, {"data.cache_dir": str(tmp_path / "other")}))
    assert (made.path / "train.arrow").read_bytes() == (undisturbed.path / "train.arrow").read_bytes()
    assert made.report == undisturbed.report


def test_two_at_once(recipe: Recipe, tmp_path: Path) -> None:
    """One prepares, the other waits and finds it."""
    (tmp_path / "rows.jsonl").write_text(rows(3000))
    both = [start(recipe) for _ in range(2)]
    answers = [json.loads(one.communicate(timeout=120)[0]) for one in both]
    assert answers[0][0] == answers[1][0] and sorted(answer[1] for answer in answers) == [False, True]
    assert {answer[2] for answer in answers} == {3000}
