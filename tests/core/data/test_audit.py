"""`ptrain data audit` and `ptrain data show`: counts of planted defects are exact, and what is shown is what is learnt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

SPECIAL = ["<|bos|>", "<|end|>"]
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.content == 'refuse' -%}{{- raise_exception('no') -}}{%- endif -%}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content -}}<|end|>{%- endgeneration -%}
{%- else -%}{{- message.role + ': ' + message.content + ' ' -}}{%- endif -%}
{%- endfor -%}
"""


def said(question: Any, answer: Any = "yes", **more: Any) -> str:
    """A line of a file."""
    return json.dumps(
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}
    )


PLANTED: list[tuple[str, str | None]] = [
    (said("fine"), None),
    ('{"messages": [', "broken"),
    ('{"text": "no conversation"}', "broken"),
    (json.dumps({"messages": [{"role": "usr", "content": "a role that is none"}]}), "broken"),
    (said(7), "broken"),
    ('{"messages": []}', "broken"),
    ('{"messages": ["no object"]}', "broken"),
    (said("odd", tool_calls="x").replace('"content": "yes"', '"content": "yes", "tool_calls": "x"'), "broken"),
    (said("refuse"), "unrenderable"),
    (json.dumps({"messages": [{"role": "user", "content": "nobody answers"}]}), "unsupervised"),
    (said("long " * 60), "overlong"),
    (said("again <|bos|>"), "several_bos"),
    (said("fine"), "duplicates"),
    (said("empty", ""), "empty_turns"),
]
"""Lines of a file, each with what is wrong in it."""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose data has every defect once, among good rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw = Tokenizer(models.BPE({token: at for at, token in enumerate([*SPECIAL, *sorted(alphabet)])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=SPECIAL[0], eos_token=SPECIAL[1])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    good = [said(f"question {number}") for number in range(1500)]
    lines = [line for line, _ in PLANTED]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, *good]) + "\n")
    (tmp_path / "good.jsonl").write_text("\n".join(good) + "\n")
    content = {
        "type": "sft",
        "model": {"config": {"model_type": "llama"}},
        "tokenizer": {"name_or_path": str(tmp_path / "tokenizer")},
        "data": {
            "sources": [{"type": "jsonl", "path": str(tmp_path / "rows.jsonl")}],
            "eval_sources": [{"type": "jsonl", "path": str(tmp_path / "good.jsonl")}],
            "cache_dir": str(tmp_path / "cache"),
            "max_length": 200,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def ptrain(*arguments: str | Path) -> tuple[int, str, str]:
    """The command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "ptrain_cli", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_planted_defects_are_counted_exactly(recipe: Path) -> None:
    """Each kind with the lines it was planted in; good rows, of another source too, have none."""
    code, out, err = ptrain("data", "audit", recipe, "--json")
    assert code == 2, err
    found = json.loads(out)
    (train,), (eval_,) = found["splits"]["train"], found["splits"]["eval"]
    file = recipe.parent / "rows.jsonl"
    for kind in {kind for _, kind in PLANTED if kind}:
        lines = [number for number, (_, planted) in enumerate(PLANTED, 1) if planted == kind]
        assert train[kind]["count"] == len(lines), kind
        assert sorted(int(row.removeprefix(f"{file}:").partition(":")[0]) for row in train[kind]["rows"]) == lines, kind
        assert eval_[kind] == {"count": 0, "rows": []}
    assert train["rows"] == len(PLANTED) + 1500 - 6 and eval_["rows"] == 1500
    learnt = len("yes") + 1
    assert eval_["supervised_tokens"] == 1500 * learnt and eval_["turns"] == 1500 and not eval_["unended_turns"]
    lengths = [1 + len(f"user: question {number} ") + learnt for number in range(1500)]
    assert eval_["tokens"] == sum(lengths) and eval_["lengths"]["longest"] == max(lengths)
    assert found["stops"] == [
        f"train: jsonl {file}: 7 rows broken",
        f"train: jsonl {file}: 1 rows unrenderable",
        f"train: jsonl {file}: 1 rows longer than data.max_length",
        f"train: 1 of {train['rows']} rows without a supervised token",
    ]


def test_for_people_and_for_good_data(recipe: Path) -> None:
    """Exit code 0 where a run would not stop."""
    code, out, _ = ptrain("data", "audit", recipe)
    assert code == 2 and "7 can't be read: " in out and "a run would stop: " in out
    code, out, err = ptrain("data", "audit", recipe, "-o", f"data.sources.0.path={recipe.parent / 'good.jsonl'}")
    assert code == 0, err
    assert "1,500 rows" in out and "100.0% of them with an end-of-turn token" in out
    assert out.endswith("a run would not stop on this data\n")


def test_what_is_shown_is_what_is_learnt(recipe: Path) -> None:
    """Sample by sample; a number that is too high is said."""
    good = f"data.sources.0.path={recipe.parent / 'good.jsonl'}"
    code, out, err = ptrain("data", "show", recipe, "-o", good, "--from", "3", "-n", "2", "--plain")
    assert code == 0, err
    assert "--- sample 3: 22 tokens, 4 of them learnt\n<|bos|>user: question 2 \u27eayes<|end|>\u27eb\n" in out
    assert "question 3" in out and "question 4" not in out
    code, out, err = ptrain("data", "show", recipe, "-o", good, "-o", "data.pack_samples=true", "-n", "1")
    assert code == 0 and "--- document 2" in out, err
    code, out, err = ptrain("data", "show", recipe, "-o", good, "--from", "5000")
    assert code == 2 and "there are 1,500 samples for train" in err


def test_the_verdict_is_that_of_a_run(recipe: Path) -> None:
    """Text is cut into samples, whatever its length; truncation may leave nothing; a weight is no duplicate."""
    folder = recipe.parent
    (folder / "long.txt").write_text("word " * 500)
    text = ("-o", "type=causal", "-o", f"data.sources=[{{type: txt, path: {folder / 'long.txt'}, weight: 2}}]")
    code, out, _ = ptrain("data", "audit", recipe, *text, "-o", "data.eval_sources=[]")
    assert code == 0 and "2 rows" in out and "longer" not in out and "the same as" not in out, out
    (folder / "one.jsonl").write_text(said("long " * 60) + "\n" + said("short") + "\n")
    cut = ("-o", f"data.sources.0.path={folder / 'one.jsonl'}", "-o", "data.eval_sources=[]")
    code, out, _ = ptrain("data", "audit", recipe, *cut, "-o", "data.overlength=truncate_right")
    assert code == 2 and "a run would stop: train: 1 of 2 rows without a supervised token" in out
    assert ptrain("prepare", recipe, *cut, "-o", "data.overlength=truncate_right")[0] == 2
    assert ptrain("data", "audit", recipe, *cut, "-o", "data.overlength=drop")[0] == 0
    assert ptrain("prepare", recipe, *cut, "-o", "data.overlength=drop")[0] == 0


def test_sources_that_can_not_be_read_are_findings_too(recipe: Path) -> None:
    """Also where the tokenizer would be trained on them, and beside others that can."""
    folder = recipe.parent
    (folder / "bad.jsonl").write_text("{\n{\n")
    some = f"data.sources=[{{type: jsonl, path: [{folder / 'bad.jsonl'}, {folder / 'good.jsonl'}]}}, {{type: txt, path: no}}]"
    code, out, err = ptrain("data", "audit", recipe, "-o", some)
    assert code == 2 and "1,500 rows" in out and "2 can't be read" in out and "there is no file `no`" in out, err
    alone = ("-o", "data.sources=[{type: txt, path: no}]", "-o", "data.eval_sources=[]")
    code, out, err = ptrain("data", "audit", recipe, *alone, "-o", "tokenizer={type: train}")
    assert code == 2 and "there is no file `no`" in out, err
