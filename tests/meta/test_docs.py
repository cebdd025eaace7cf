"""The documentation is true: its recipes load and its commands run.

A page is a story that is played in an empty folder, from top to bottom. A code block with a caption is a
file; a line `$ command` in a `console` block is run, and has to end with exit code 0, or with the one that a
comment behind it names (`# exit code 2`). Python without a caption is run as a script; a comment behind a
`print` is what it prints. YAML without a caption has to load: as a recipe if it has a `type`, else as a part of
one. Code of other programs is marked `py`, and only shown. `cd` holds for the rest of the page, and so does
`pip install` of what the page has made: it is installed into a folder that later commands have on their path.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ptrain.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
READMES = [
    ROOT / "README.md",
    ROOT / "core/README.md",
    ROOT / "cli/README.md",
    *sorted(ROOT.glob("plugins/*/README.md")),
]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *READMES, ROOT / "CONTRIBUTING.md"]
NOT_RUN = {
    r"^(python3 -m )?pip install": "the environment of the tests is there already",
    r"^python3 -m nox": "nox runs the tests, the tests do not run nox",
    r"^ptrain run recipes/": "tests/e2e runs the recipes of the repository",
    r"--hostfile|^srun": "needs several machines",
    r"^vllm|--engine vllm": "needs a server with a GPU",
    r" mteb:": "needs data of the hub; tests/plugins/embed measures on such tasks",
    r"--install-completion": "is for the shell that it is called from; tests/cli installs it",
}
"""Commands that no page plays, and why."""
INSTALL = re.compile(r"^pip install (?:-e '?([\w./-]+?)(?:\[\w+\])?'?|(\S+\.whl))$")
ALONE = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
"""How a package is built and installed without a download: what it needs is there."""
OFFLINE = {r"^python3 -m build": "python3 -m build --no-isolation"}
"""How commands are run without a download."""
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


@dataclass
class Reader:
    """Somebody who does what a page says; what that installs and caches lies beside the folder that it begins in.

    Attributes:
        start: that folder.
        folder: the one that it has got to.
    """

    start: Path
    folder: Path

    def play(self, block: Block) -> None:
        """Do what a reader of the page would do with this block."""
        if block.caption:
            (self.folder / block.caption).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / block.caption).write_text(block.text)
        elif block.language == "console":
            for command in re.findall(r"^\$ (.*)$", block.text, re.MULTILINE):
                if INSTALL.match(command) or not any(re.search(pattern, command) for pattern in NOT_RUN):
                    self.type(command)
        elif block.language == "python":
            printed = self.run([sys.executable, "-c", block.text]).splitlines()
            for line in re.findall(r"^ *print\(.*\)  # (.*)$", block.text, re.MULTILINE):
                assert line in printed, printed
        elif block.language == "yaml":
            written = yaml.safe_load(block.text)
            load_recipe(written if "type" in written else {**yaml.safe_load(TINY), **written})

    def type(self, command: str) -> None:
        """Run one command line."""
        if command.startswith("cd "):
            self.folder = self.folder / command.removeprefix("cd ")
        elif found := INSTALL.match(command):
            self.install(self.folder / (found[1] or found[2]))
        else:
            for pattern, offline in OFFLINE.items():
                command = re.sub(pattern, offline, command)
            code = re.search(r"# exit code (\d+)", command)
            self.run(command, int(code[1]) if code else 0)

    def install(self, package: Path) -> None:
        """Install a wheel, or build and install a package whose code stays where it is, so that changes take effect."""
        site = self.beside("site")
        for link in (path for path in site.glob("*") if path.is_symlink()):
            link.unlink()
        self.run([sys.executable, "-m", "pip", "install", *ALONE, "--upgrade", "--target", str(site), str(package)])
        for source in (package / "src").glob("*"):
            shutil.rmtree(site / source.name)
            (site / source.name).symlink_to(source)

    def run(self, command: list[str] | str, expected: int = 0) -> str:
        """Run a command that has to end with this exit code."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        modules = os.pathsep.join([str(self.beside("site")), os.environ.get("PYTHONPATH", "")])
        # The cache of prepared data is in the home directory.
        own = {"PATH": path, "PYTHONPATH": modules, "HOME": str(self.beside("home"))}
        env = {**os.environ, **own, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=self.folder, env=env, shell=isinstance(command, str), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == expected, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def beside(self, name: str) -> Path:
        """A folder of this page, for what is not its files."""
        return self.start.parent / f"{self.start.name}-{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_plays(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(TINY)
    reader = Reader(tmp_path, tmp_path)
    for block in blocks(page):
        try:
            reader.play(block)
        except Exception as error:
            pytest.fail(f"{page.relative_to(ROOT)}:{block.line}: {error}")


def test_what_is_not_played_is_in_the_docs() -> None:
    found = "\n".join(block.text for page in PAGES for block in blocks(page) if block.language == "console")
    commands = re.findall(r"^\$ (.*)$", found, re.MULTILINE)
    assert all(any(re.search(pattern, command) for command in commands) for pattern in NOT_RUN)
