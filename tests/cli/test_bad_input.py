"""Bad input of every kind: one clear message before anything starts, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Outcome = tuple[int, str, str]
Ptrain = Callable[..., Outcome]

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
BAD_ROLE = {"messages": [{"role": "usr", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


def over(*overrides: str) -> list[str]:
    """The arguments for these overrides."""
    return [word for override in overrides for word in ("-o", override)]


RESUMABLE = "checkpoint=[{type: deepspeed, save_end_of_training: true}]"
# With another number of layers than its folder says, a model needs no weights.
MODEL = "model={name_or_path: base, dtype: fp32, hf_config_kwargs: {num_hidden_layers: 1}}"
SAME = over("output_dir=made", RESUMABLE, MODEL)
"""The run that there is already."""


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        name: what is wrong.
        says: what the message has to hold, in this order.
        change: a line of the recipe, and what stands in its place.
        arguments: of the command besides the recipe.
        recipe: its file, where it is another one.
    """

    name: str
    says: list[str]
    change: tuple[str, str] = ("", "")
    arguments: list[str] = field(default_factory=list)
    recipe: str = ""


def source(file: str) -> list[str]:
    """The arguments that take rows from a file."""
    return over(f"data.sources=[{{type: jsonl, path: {file}}}]")


RECIPES = [
    Case(
        "missing file", ["no recipe `tinny.yaml`", "expected: the path", "fix: write `tiny.yaml`"], recipe="tinny.yaml"
    ),
    Case("a folder", ["`.` is a folder", "expected: a recipe"], recipe="."),
    Case("empty file", ["{}: the recipe is empty", "expected: at least `type`"], recipe="empty.yaml"),
    Case(
        "unknown type",
        ["{}:1:7: there is no trainer `sfft`", "one of", "fix: write `sft`"],
        ("type: sft", "type: sfft"),
    ),
    Case(
        "another type",
        ["{}:1:7: there is no trainer `something`", "fix: install the package"],
        ("type: sft", "type: something"),
    ),
    Case(
        "unknown key",
        ["{}:9:1: there is no key `micro_batchsize`", "fix: write `micro_batch_size`"],
        ("micro_batch_size: 4", "micro_batchsize: 4"),
    ),
    Case(
        "unknown key of a section",
        ["{}:8:13: `optimizer` has no key `lrr`", "fix: write `lr`"],
        ("optimizer: {lr: 1.0e-3}", "optimizer: {lrr: 1.0e-3}"),
    ),
    Case(
        "wrong type",
        ["{}:9:19: `micro_batch_size`", "whole number", "`four`"],
        ("micro_batch_size: 4", "micro_batch_size: four"),
    ),
    Case(
        "no section",
        ["{}:8:12: `optimizer` is 3", "expected: keys with values"],
        ("optimizer: {lr: 1.0e-3}", "optimizer: 3"),
    ),
    Case(
        "duplicate key",
        ["{}:10:1: `micro_batch_size` is given twice, lines 9 and 10", "fix: keep one"],
        ("train_iters: 3", "micro_batch_size: 2"),
    ),
    Case(
        "an open bracket",
        ["{}:9:17: this is no YAML", "fix: close the `{` of line 8"],
        ("optimizer: {lr: 1.0e-3}", "optimizer: {lr: 1.0e-3"),
    ),
    Case(
        "no colon",
        ["{}:9:1: this is no YAML: a key without a `:`", "expected: `key: value`"],
        ("micro_batch_size: 4", "micro_batch_size 4"),
    ),
    Case("tabs", ["{}:5:1: a tab", "expected: spaces", "fix: indent"], ("  dtype: fp32", "\tdtype: fp32")),
    Case("an override without a key", ["-o 4: ", "no `=`", "expected: `-o key=value`"], arguments=over("4")),
]
"""Mistakes that are found without torch."""

MODELS_AND_DATA = [
    Case(
        "no such folder",
        ["{}:3:17: `model.name_or_path` is `./nowhere`: there is no such folder", "expected: the name of a model"],
        ("  config: {", "  name_or_path: ./nowhere\n  config: {"),
    ),
    Case(
        "a folder that is no model",
        ["`model.name_or_path` is `rows`: it is a folder without a `config.json`", "expected:", "`save_pretrained`"],
        arguments=over("model={name_or_path: rows}"),
    ),
    Case(
        "a name that nobody has",
        ["the tokenizer of the model `no/such-model` can't be loaded", "expected: the name of a model"],
        arguments=over("model={name_or_path: no/such-model}", "tokenizer={}"),
    ),
    Case(
        "a key of no model",
        ["configuration has no key `hiden_size` (in `model.hf_config_kwargs`)", "fix: write `hidden_size`"],
        arguments=over("model.hf_config_kwargs={hiden_size: 32}"),
    ),
    Case(
        "a value of another kind for a model",
        [
            "`model.hf_config_kwargs.num_hidden_layers` can't be 'two' in a llama configuration: ",
            "expected int, got str",
        ],
        arguments=over("model.hf_config_kwargs={num_hidden_layers: two}"),
    ),
    Case(
        "a value that a model can't do with",
        ["a model of the type llama can't be made from its configuration: KeyError: 'nope'"],
        arguments=over("model.hf_config_kwargs={hidden_act: nope}"),
    ),
    Case("no such rows", ["rows/missing.jsonl"], arguments=source("rows/missing.jsonl")),
    Case("no rows", ["rows/none.jsonl", "has no rows", "expected: at least one"], arguments=source("rows/none.jsonl")),
    Case(
        "a bad role",
        ['rows/role.jsonl:2:1: `messages[0].role` is "usr"', "expected: one of system", "fix: write `user`"],
        arguments=source("rows/role.jsonl"),
    ),
    Case("rows that are too long", ["200 of 200 rows are longer", "max_length"], arguments=over("data.max_length=4")),
    Case(
        "documents beyond the positions of a model",
        ["tokens, and the model has positions for 16", "fix: set `data.max_length` to 16 or less"],
        arguments=over("model.config={model_type: gpt2, n_embd: 32, n_head: 2, n_layer: 1, n_positions: 16}"),
    ),
    Case(
        "no such template",
        ["there is no chat template `chatmll`", "expected: one of chatml", "fix: write `chatml`"],
        arguments=over("tokenizer.chat_template=chatmll"),
    ),
    Case(
        "a template that is none",
        ["syntax.jinja:2:1: the chat template can't be read: unexpected '}'"],
        arguments=over("tokenizer.chat_template=syntax.jinja"),
    ),
    Case(
        "a template that fails to render",
        ["tasks (train):1: the chat template can't render it: no system message", "fix: mend the row"],
        arguments=over("tokenizer.chat_template=fails.jinja"),
    ),
]
RUNS = [
    Case(
        "an output directory that can't be written",
        ["the run directory `/proc/nowhere` can't be written", "fix: set `output_dir`"],
        arguments=over("output_dir=/proc/nowhere"),
    ),
    Case(
        "an output directory that is a file",
        ["tiny.yaml` can't be written", "Not a directory", "fix: set `output_dir`"],
        arguments=over("output_dir=tiny.yaml"),
    ),
    Case(
        "an output directory with a run in it",
        ["made` is not empty", "fix: add `--resume`", "`--restart`"],
        arguments=over("output_dir=made"),
    ),
    Case(
        "an output directory with a run of another recipe",
        ["made` belongs to a run of another recipe: `optimizer.learning_rate`: 0.001 -> 0.002", "fix: resume with"],
        arguments=[*SAME, *over("optimizer.lr=2e-3"), "--resume"],
    ),
    Case(
        "a checkpoint of another model in the recipe",
        ["made` belongs to a run of another recipe: `model.", "fix: resume with the recipe of that run"],
        arguments=[*over("output_dir=made", RESUMABLE), "--resume"],
    ),
    Case(
        "a checkpoint of another model in the same folder",
        [
            "step-00000003` is a checkpoint of another model",
            "[64, 32] there, [96, 32] here",
            "fix: resume with the model",
        ],
        arguments=[*SAME, "--resume"],
    ),
    Case(
        "not enough disk for one checkpoint",
        ["a checkpoint needs about", "bytes", "free", "fix: free some space"],
        arguments=over(RESUMABLE, "model.config.vocab_size=100000000000"),
    ),
    Case(
        "fewer rows than one batch of two workers",
        [
            "200 training samples for 2 workers",
            "fewer than one batch of 400",
            "expected: at least 400",
            "fix: take fewer",
        ],
        arguments=[*over("micro_batch_size=200"), "--workers", "2"],
    ),
    Case(
        "a port in use",
        ["--master_port <port> can't be used: Address already in use", "fix: give another one"],
        arguments=["--workers", "2", "--master_port", "<port>"],
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ptrain_in: Any, recipe_text: str) -> Path:
    """A folder with a recipe, rows, templates, and a run whose model has changed since."""
    made = tmp_path_factory.mktemp("bad")
    (made / "tiny.yaml").write_text(recipe_text)
    (made / "syntax.jinja").write_text("{% for m in messages %}\n{{ m.content }\n")
    (made / "fails.jinja").write_text("{{ raise_exception('no system message') }}")
    (made / "rows").mkdir()
    (made / "rows" / "none.jsonl").touch()
    (made / "rows" / "role.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (CHAT, BAD_ROLE)))
    (made / "base").mkdir()
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320,
    }  # fmt: skip
    (made / "base" / "config.json").write_text(json.dumps(config))
    code, _, err = ptrain_in(made)("run", "tiny.yaml", *SAME)
    assert code == 0, err
    (made / "base" / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    return made


@pytest.fixture
def port() -> Iterator[int]:
    """A port that is in use."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        yield taken.getsockname()[1]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder within a folder; of files also time and size."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {str(p): (0, 0) if p.is_dir() else (stat.st_mtime_ns, stat.st_size) for p, stat in found.items()}


def refused(ptrain: Ptrain, folder: Path, case: Case, port: int) -> None:
    """Run `ptrain run` on what is wrong; assert that it says so, and does nothing else."""
    recipe = case.recipe or "tiny.yaml"
    old, new = case.change
    if old:
        recipe = "wrong.yaml"
        text = (folder / "tiny.yaml").read_text()
        assert old in text
        (folder / recipe).write_text(text.replace(old, new))
    before = contents(folder)
    arguments = [word.replace("<port>", str(port)) for word in case.arguments]
    code, _, err = ptrain("run", recipe, *arguments, env={"HF_HUB_OFFLINE": "1"})
    assert code == 2, err
    assert err.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err, err
    at = 0
    for part in case.says:
        part = part.replace("{}", recipe).replace("<port>", str(port))
        assert part in err[at:], (part, err)
        at = err.index(part, at) + len(part)
    assert contents(folder) == before


@pytest.mark.torch_free
@pytest.mark.parametrize("case", RECIPES, ids=lambda case: case.name)
def test_a_recipe(case: Case, tmp_path: Path, ptrain: Ptrain, recipe: Path, port: int) -> None:
    (recipe.parent / "empty.yaml").touch()
    refused(ptrain, recipe.parent, case, port)


@pytest.mark.parametrize("case", [*MODELS_AND_DATA, *RUNS], ids=lambda case: case.name)
def test_a_run(case: Case, folder: Path, ptrain_in: Any, port: int) -> None:
    refused(ptrain_in(folder), folder, case, port)


def test_rotary_positions_that_go_on_are_warned_about(ptrain: Ptrain, recipe: Path) -> None:
    """Such a run is no mistake: the model learns them."""
    code, out, err = ptrain("run", recipe, "-o", "model.config.max_position_embeddings=16")
    assert code == 0 and "step 3/3" in out
    assert (
        err.startswith("warning: a document has ") and "the model has positions for 16" in err and err.count("\n") == 1
    )


@pytest.mark.parametrize("key", ["eval_interval=2", "eval_at_start=true"])
def test_evaluations_without_rows(ptrain: Ptrain, recipe: Path, key: str) -> None:
    code, _, err = ptrain("run", recipe, "-o", key, "-o", f"output_dir={recipe.parent / 'out'}")
    assert code == 2 and f"error: -o {key}: `{key.partition('=')[0]}` asks for evaluations" in err
    assert not (recipe.parent / "out").exists()
