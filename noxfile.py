"""Every routine of the project, one session each: `nox -l` lists them."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_venv = "yes"  # `install` notices what changed
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).parent
DISTRIBUTIONS = [
    "core",
    "cli",
    "plugins/sft",
    "plugins/dpo",
    "plugins/swiftkv",
    "plugins/spec-decode",
    "plugins/sequence-parallel",
    "plugins/embed",
]
EDITABLE = [word for distribution in DISTRIBUTIONS for word in ("-e", distribution)]
OTHER_PYTHONS = ["3.10", "3.12", "3.13"]
SIDE_BY_SIDE = ("-n", "4", "--dist", "loadfile")
"""Four files of tests at a time, on two cores too: a test waits much of its time for processes that start."""
BUILDERS = ("hatchling", "editables")
"""What builds the distributions."""
HEAVY = ("torch", "accelerate", "deepspeed", "transformers", "datasets", "huggingface-hub")
"""Dependencies that the sessions without torch do without."""

if (pyenv := Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))).is_dir():
    # A shim of pyenv runs only the versions that are named here; the current one stays the first.
    found = [home.name for version in OTHER_PYTHONS for home in pyenv.glob(f"versions/{version}.*")]
    os.environ["PYENV_VERSION"] = ":".join([platform.python_version(), *found])


@nox.session(venv_backend="none")
def quickstart(session: nox.Session) -> None:
    """Train the model of recipes/quickstart.yaml: offline, on CPU, in minutes."""
    bin = shared_environment(session)
    install_all(session, bin, *dependencies(), *constraints())
    session.run(bin / "ptrain", "run", "recipes/quickstart.yaml", *session.posargs)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the whole suite, then the torch-free part on the other Pythons (unless arguments are given)."""
    bin = full_environment(session)
    session.run(bin / "pytest", *SIDE_BY_SIDE, *session.posargs, env={"OMP_NUM_THREADS": "1"})
    for version in [] if session.posargs else OTHER_PYTHONS:
        session.notify(f"torch_free-{version}")


@nox.session(venv_backend="none")
def tests_full(session: nox.Session) -> None:
    """Run the suite with all of the matrices of which `tests` runs a part."""
    bin = full_environment(session)
    session.run(bin / "pytest", *SIDE_BY_SIDE, "-m", "", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=OTHER_PYTHONS)
def torch_free(session: nox.Session) -> None:
    """Byte-compile, and run the tests that need no torch; there has to be none."""
    bin = light_environment(session, *dev("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "jsonschema"))
    session.run(bin / "python", "-m", "compileall", "-q", "-f", *[f"{d}/src" for d in DISTRIBUTIONS])
    session.run(bin / "python", "-c", "import torch", success_codes=[1], silent=True)
    marked = [str(p) for p in sorted(ROOT.glob("tests/**/test_*.py")) if "torch_free" in p.read_text()]
    # None of them starts workers or measures, so they may run side by side.
    session.run(bin / "pytest", "-n", "auto", "-m", "torch_free", *marked, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting (ruff) and the directions of imports (import-linter)."""
    bin = light_environment(session, *dev("ruff", "import-linter"))
    session.run(bin / "ruff", "check", ".")
    session.run(bin / "ruff", "format", "--check", ".")
    session.run(bin / "lint-imports", "--config", "pyproject.toml")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check the types (pyright)."""
    bin = full_environment(session)
    session.run(bin / "pyright", "--pythonpath", str(bin / "python"), *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build/html; a warning is an error."""
    bin = light_environment(session, *dev("sphinx", "myst-parser", "furo"))
    session.run(bin / "sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build/html")


@nox.session
def build(session: nox.Session) -> None:
    """Build every distribution; install the wheels into one fresh environment and try them there."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.install(*dev("build", *BUILDERS))
    for distribution in DISTRIBUTIONS:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", "dist", distribution, silent=True)
    fresh = Path(session.create_tmp()) / "fresh"
    session.run("python", "-m", "venv", "--clear", str(fresh))
    wheels = sorted(str(wheel) for wheel in ROOT.glob("dist/*.whl"))
    for command in (
        ["python", "-m", "pip", "install", "--quiet", *wheels, *constraints()],
        ["python", "-m", "pip", "check"],
        ["python", "tests/meta/load_entry_points.py"],
        ["ptrain", "--version"],
        ["ptrain", "check", "recipes/quickstart.yaml"],
        ["ptrain", "plugins", "new", "mine", "--to", str(fresh / "mine")],
    ):
        session.run(fresh / "bin" / command[0], *command[1:], external=True)
    shutil.rmtree(fresh)  # more than a gigabyte


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Run the benchmarks; with arguments, those whose name contains one of them.

    Fails where a ratio is worse than the one in benchmarks/results by more than the noise.
    """
    bin = full_environment(session)
    install(session, bin, "-r", "requirements-bench.txt", *constraints())
    shared = ("harness.py", "inputs.py", "pictures.py")
    scripts = sorted(script for script in ROOT.glob("benchmarks/*.py") if script.name not in shared)
    chosen = [s for s in scripts if not session.posargs or any(word in s.stem for word in session.posargs)]
    if not chosen:
        session.error("there is no such benchmark")
    for script in chosen:
        session.run(bin / "python", str(script))


def shared_environment(session: nox.Session) -> Path:
    """The `bin` folder of the one environment for all that needs torch: it takes more than a gigabyte."""
    home = ROOT / ".nox" / f"full-{platform.python_version()}"
    if not (home / "bin" / "pip").exists():
        session.run(sys.executable, "-m", "venv", "--clear", str(home))
    session.env["PATH"] = os.pathsep.join([str(home / "bin"), os.environ["PATH"]])
    return home / "bin"


def full_environment(session: nox.Session) -> Path:
    """The `bin` folder of the environment with everything in it."""
    bin = shared_environment(session)
    install_all(session, bin, *dependencies(), "-r", "requirements-dev.txt", *constraints())
    return bin


def light_environment(session: nox.Session, *tools: str) -> Path:
    """The `bin` folder of the session's own environment: the distributions without torch, and `tools`."""
    bin = Path(session.bin)
    install_all(session, bin, *tools, *(line for line in dependencies() if not line.startswith(HEAVY)))
    return bin


def install_all(session: nox.Session, bin: Path, *others: str) -> None:
    """Install `others`, and then the distributions; an environment for the build of each takes five times as long."""
    install(session, bin, *others, *dev(*BUILDERS))
    install(session, bin, "--no-deps", "--no-build-isolation", *EDITABLE)


def dependencies() -> list[str]:
    """What the distributions declare that they need of others."""
    files = [ROOT / distribution / "pyproject.toml" for distribution in DISTRIBUTIONS]
    lines = {line for file in files for line in nox.project.load_toml(file)["project"]["dependencies"]}
    return sorted(line for line in lines if not re.match("ptrain\\b", line))


def dev(*names: str) -> list[str]:
    """The lines of requirements-dev.txt for these tools."""
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    return [line for line in lines if re.match("[A-Za-z-]*", line)[0] in names]


def constraints() -> list[str]:
    """The versions pinned for machines without an NVIDIA GPU."""
    return [] if shutil.which("nvidia-smi") else ["-c", "constraints-cpu.txt"]


def install(session: nox.Session, bin: Path, *arguments: str) -> None:
    """One pip command, left out where this environment has had the very same one."""
    done = bin.parent / f"installed-{fingerprint(arguments)}"
    if not done.exists():
        session.run(bin / "python", "-m", "pip", "install", "--quiet", *arguments)
        done.touch()


def fingerprint(arguments: tuple[str, ...]) -> str:
    """Changes with the arguments of pip and with every file of the project that it reads."""
    files = [*(ROOT / d / "pyproject.toml" for d in DISTRIBUTIONS), *sorted(ROOT.glob("*.txt"))]
    parts = [*arguments, *(file.read_text() for file in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
