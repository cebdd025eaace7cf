"""What the Tab key offers, through the protocol of the shells and in a bash that keys are typed into."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch_free

Ptrain = Callable[..., tuple[int, str, str]]
COMMANDS = ["run", "check", "explain", "plan", "prepare", "export", "schema", "data", "plugins", "embed", "spec-decode"]


@pytest.fixture
def offered(ptrain: Ptrain) -> Callable[..., list[str]]:
    """What is offered after a line, as bash asks for it; nothing else may be printed."""

    def ask(line: str, **env: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_PTRAIN_COMPLETE": "complete_bash"}
        code, out, err = ptrain(env={**words, **env})
        assert (code, err) == (0, "")
        return out.split()

    return ask


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ptrain ", COMMANDS),
        ("ptrain plugins show dp", ["dpo"]),
        ("ptrain ch", ["check"]),
        ("ptrain run --work", ["--workers"]),
        ("ptrain run --python_profile ", ["tottime", "cumtime", "disable"]),
        ("ptrain plugins l", ["list"]),
        ("ptrain data show --split e", ["eval"]),
        ("ptrain plan tiny.yaml --device h", ["h100-80gb", "h100-94gb", "h200"]),
        ("ptrain run ", ["folder/", "other.yml", "tiny.yaml"]),
        ("ptrain check t", ["tiny.yaml"]),
        ("ptrain check folder/", ["folder/deep.yaml"]),
        ("ptrain check .", [".hidden.yaml"]),
        ("ptrain check nowhere/", []),
        ("ptrain run tiny.yaml --code ", ["code.py", "folder/"]),
    ],
)
def test_commands_options_and_files(
    offered: Callable[..., list[str]], recipe: Path, line: str, expected: list[str]
) -> None:
    (recipe.parent / "folder").mkdir()
    for name in ("other.yml", "code.py", "notes.txt", ".hidden.yaml", "folder/deep.yaml"):
        (recipe.parent / name).touch()
    assert offered(line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-o opt", ["optimizer."]),
        ("-o optimizer.l", ["optimizer.learning_rate=", "optimizer.lr="]),
        ("--override micro", ["micro_batch_size="]),
        ("-o data.so", ["data.sources.", "data.sources="]),
        ("-o data.sources.0.t", ["data.sources.0.tasks=", "data.sources.0.type="]),
        ("-o deepspeed.zero", ["deepspeed.zero_optimization."]),
        ("-o deepspeed.zero_optimization.stage=", []),
        ("-o nothing", []),
        ("-o data.pack", ["data.pack_samples="]),
        ("-o type=causal -o data.pack", []),  # it packs always
        ("-o optimizer.type=adamw -o optimizer.lr=3 -o scheduler.ty", ["scheduler.type="]),
    ],
)
def test_keys_of_the_recipe(offered: Callable[..., list[str]], recipe: Path, line: str, expected: list[str]) -> None:
    assert offered(f"ptrain run {recipe.name} {line}") == expected


@pytest.mark.parametrize("name", ["", "missing.yaml ", "broken.yaml ", "odd.yaml ", ". "])
def test_keys_without_a_recipe_that_can_be_read(offered: Callable[..., list[str]], tmp_path: Path, name: str) -> None:
    """Those of all trainers."""
    (tmp_path / "broken.yaml").write_text("type: {")
    (tmp_path / "odd.yaml").write_text("type: 3\nmodel: 4\ndata: [5]\noptimizer: 6\n")
    assert offered(f"ptrain run {name}-o micro") == ["micro_batch_size="]
    if name != "odd.yaml ":
        assert offered(f"ptrain check {name}-o data.pack") == ["data.pack_samples="]


def test_a_broken_plugin_is_not_heard(offered: Callable[..., list[str]], tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "ptrain_noisy-1.dist-info").mkdir(parents=True)
    (site / "noisy.py").write_text("print('imported')\nraise RuntimeError('broken')\n")
    (site / "ptrain_noisy-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: ptrain-noisy\nVersion: 1\n"
    )
    (site / "ptrain_noisy-1.dist-info" / "entry_points.txt").write_text("[ptrain.trainer]\nnoisy = noisy:Trainer\n")
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    assert offered("ptrain run -o micro", PYTHONPATH=path) == ["micro_batch_size="]


def test_nothing_heavy_is_imported_or_written(recipe: Path, environ: dict[str, str]) -> None:
    probe = (
        "import sys; sys.argv = ['ptrain']\n"
        "from ptrain_cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    print({'torch', 'transformers', 'datasets'} & set(sys.modules), file=sys.stderr)\n"
    )
    words = {"COMP_WORDS": "ptrain run tiny.yaml -o opt", "COMP_CWORD": "4", "_PTRAIN_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", probe], env={**environ, **words}, cwd=recipe.parent, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("optimizer.\n", "set()\n")
    assert list(recipe.parent.iterdir()) == [recipe]


def test_it_is_there_at_once(offered: Callable[..., list[str]], recipe: Path) -> None:
    """The goal is 0.4 s on an idle machine; here only what is far off fails."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        assert offered("ptrain run tiny.yaml -o optimizer.l")
        times.append(time.perf_counter() - started)
    assert min(times) < 1.5, times


@pytest.mark.parametrize(
    ("shell", "line", "expected"),
    [("zsh", "ptrain sch", "schema"), ("fish", "ptrain run -o opt", "optimizer."), ("fish", "ptrain pre", "prepare")],
)
def test_other_shells(ptrain: Ptrain, shell: str, line: str, expected: str) -> None:
    env = {
        "_PTRAIN_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    _, out, err = ptrain(env=env)
    assert expected in out and "check" not in out and err == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_for_ptrain(ptrain: Ptrain, shell: str) -> None:
    code, out, _ = ptrain("--show-completion", env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    if code != 0:  # the shell is given where it is not detected
        code, out, _ = ptrain("--show-completion", shell, env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    assert code == 0 and "_PTRAIN_COMPLETE" in out


class Bash:
    """An interactive bash with the completion of `ptrain`, in a terminal of its own."""

    def __init__(self, folder: Path, environ: dict[str, str], script: Path) -> None:
        binary = folder / "bin" / "ptrain"
        binary.parent.mkdir()
        binary.write_text(f'#!/bin/sh\nexec {sys.executable} -m ptrain_cli "$@"\n')
        binary.chmod(0o755)
        env = {
            **environ,
            "PATH": f"{binary.parent}:{environ['PATH']}",
            "PS1": "$ ",
            "TERM": "dumb",
            "HOME": str(folder),
        }
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], env)
        self.type(f"bind 'set bell-style none'; bind 'set enable-bracketed-paste off'; . {script}\n", "$ ")

    def type(self, keys: str, until: str) -> str:
        """What the terminal shows once `keys` were typed, up to `until`."""
        os.write(self.terminal, keys.encode())
        shown = ""
        while until not in shown:
            ready, _, _ = select.select([self.terminal], [], [], 20)
            assert ready, f"it waits for {until!r}: {shown!r}"
            shown += os.read(self.terminal, 4096).decode()
        return shown

    def close(self) -> None:
        """End it."""
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash here")
def test_in_bash(ptrain: Ptrain, recipe: Path, environ: dict[str, str]) -> None:
    """What is gone on with gets no space behind it; a whole word does."""
    env = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    code, out, _ = ptrain("--show-completion", env=env)
    if code != 0:
        code, out, _ = ptrain("--show-completion", "bash", env=env)
    script = recipe.parent / "script"
    script.write_text(out)
    bash = Bash(recipe.parent, environ, script)
    try:
        shown = bash.type("ptrain ch\t", "check ")
        shown += bash.type("ti\t", "tiny.yaml ")
        shown += bash.type("-o opt\t", "optimizer.")
        shown += bash.type("we\t", "weight_decay=")
        shown += bash.type("0.5\n", "\nok: ")
    finally:
        bash.close()
    assert re.search(r"ptrain check tiny\.yaml -o optimizer\.weight_decay=0\.5\r?\n", shown), shown


def test_installing_it(ptrain: Ptrain, tmp_path: Path) -> None:
    """In the home directory, for the shell that it is called from."""
    env = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    code, out, err = ptrain("--install-completion", "bash", env=env)
    assert code == 0, err
    assert "bash completion installed" in out
    script = tmp_path / ".bash_completions" / "ptrain.sh"
    assert "compopt -o nospace" in script.read_text() and str(script) in (tmp_path / ".bashrc").read_text()
