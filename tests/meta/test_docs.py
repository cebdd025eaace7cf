"""The documentation is true: its recipes load and its commands run.

A page is a story that is played in an empty folder, from top to bottom. A code block with a caption is a
file; a line `$ command` in a `console` block is run, and has to end with exit code 0, or with the one that a
comment behind it names (`# exit code 2`). Python without a caption is run as a script; a comment behind a
`print` is what it prints. YAML without a caption has to load: as a recipe if it has a `type`, else as a part of
one. Code of other programs is marked `py`, and only shown.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ptrain.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
READMES = [ROOT / home / "README.md" for home in ("", "core", "cli", "plugins/sft", "plugins/dpo")]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *READMES, ROOT / "CONTRIBUTING.md"]
NOT_RUN = {
    r"^(python3 -m )?pip install": "the environment of the tests is there already",
    r"^python3 -m nox": "nox runs the tests, the tests do not run nox",
    r"^ptrain run recipes/": "tests/e2e runs the recipes of the repository",
    r"--hostfile|^srun": "needs several machines",
    r"--install-completion": "is for the shell that it is called from; tests/cli installs it",
}
"""Commands that no page plays, and why."""
TINY = """\
type: sft
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
           num_attention_heads: 2, num_key_value_heads: 1, vocab_size: 300}
  dtype: fp32
tokenizer: {type: train, vocab_size: 300, chat_template: chatml}
data: {sources: [{type: tasks, count: 200}], max_length: 64, cache_dir: cache}
train_iters: 2
"""
"""The `recipe.yaml` that a page finds, so that it need not show one to talk about a key."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    caption: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    fence = r"^(`{3,})(?:\{code-block\} )?(\w*)[^\n]*\n(?::caption: (\S+)\n\n?)?(.*?)^\1$"
    text = page.read_text()
    for match in re.finditer(fence, text, re.MULTILINE | re.DOTALL):
        yield Block(match[2], match[3] or "", match[4], text[: match.start()].count("\n") + 1)


def run(command: list[str] | str, folder: Path, expected: int = 0) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    home = folder.parent / f"{folder.name}-home"  # the cache of prepared data is in the home directory
    env = {**os.environ, "PATH": path, "HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=env, shell=isinstance(command, str), capture_output=True, text=True, check=False
    )
    assert done.returncode == expected, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def play(block: Block, folder: Path) -> None:
    """Do what a reader of the page would do with this block."""
    if block.caption:
        (folder / block.caption).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.caption).write_text(block.text)
    elif block.language == "console":
        for command in re.findall(r"^\$ (.*)$", block.text, re.MULTILINE):
            if not any(re.search(pattern, command) for pattern in NOT_RUN):
                code = re.search(r"# exit code (\d+)", command)
                run(command, folder, int(code[1]) if code else 0)
    elif block.language == "python":
        printed = run([sys.executable, "-c", block.text], folder).splitlines()
        for line in re.findall(r"^ *print\(.*\)  # (.*)$", block.text, re.MULTILINE):
            assert line in printed, printed
    elif block.language == "yaml":
        written = yaml.safe_load(block.text)
        load_recipe(written if "type" in written else {**yaml.safe_load(TINY), **written})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_plays(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(TINY)
    for block in blocks(page):
        try:
            play(block, tmp_path)
        except Exception as error:
            pytest.fail(f"{page.relative_to(ROOT)}:{block.line}: {error}")


def test_what_is_not_played_is_in_the_docs() -> None:
    found = "\n".join(block.text for page in PAGES for block in blocks(page) if block.language == "console")
    commands = re.findall(r"^\$ (.*)$", found, re.MULTILINE)
    assert all(any(re.search(pattern, command) for command in commands) for pattern in NOT_RUN)
