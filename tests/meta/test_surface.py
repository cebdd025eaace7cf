"""The public surface is documented: every hook, every recipe key, every flag, and the pages made from them."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import typer.main

from ptrain import hooks
from ptrain.parts import KINDS
from ptrain.recipe import sections
from ptrain.recipe.config import Config

ROOT = Path(__file__).parents[2]
MACHINE_PATH = re.compile(r"(?<![\w.~}])/(root|home|Users|work|mnt)/")
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".jinja", ""}


def stages() -> dict:
    return {name: f for name, f in vars(hooks).items() if hasattr(f, "ptrain_spec")}


def configs() -> Iterator[type[Config]]:
    """Every typed section: core's own, and those of whatever is installed."""
    yield from (c for c in vars(sections).values() if isinstance(c, type) and issubclass(c, Config))
    for kind in KINDS:
        for point in entry_points(group=f"ptrain.{kind}"):
            loaded = point.load()
            yield loaded.Config
            if kind == "trainer":
                yield loaded.Data


def commands(command: Any, name: str = "ptrain") -> Iterator[tuple[str, Any]]:
    yield name, command
    for sub, one in getattr(command, "commands", {}).items():
        yield from commands(one, f"{name} {sub}")


def all_commands() -> list[tuple[str, Any]]:
    from ptrain_cli.main import app

    return list(commands(typer.main.get_command(app)))


@pytest.mark.torch_free
@pytest.mark.parametrize("config", dict.fromkeys(configs()), ids=lambda c: c.__qualname__)
def test_every_key_is_documented(config: type[Config]) -> None:
    # The sections of a whole recipe are documented by the class of each.
    fields = {n: f for n, f in config.model_fields.items() if config is not sections.Recipe}
    assert [name for name, field in fields.items() if not (field.description or "").strip()] == []


@pytest.mark.torch_free
@pytest.mark.parametrize("name", stages())
def test_every_hook_says_what_and_when(name: str) -> None:
    text = stages()[name].__doc__ or ""
    assert re.search(r"Kind: (first|all)\.", text), f"{name} does not say its kind"
    assert ("Kind: first." in text) == bool(stages()[name].ptrain_spec["firstresult"])


@pytest.mark.torch_free
def test_every_flag_is_documented() -> None:
    silent = [
        f"{name} {parameter.opts[0]}"
        for name, command in all_commands()
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert silent == []
    assert [name for name, command in all_commands() if not command.help] == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as Sphinx builds it, without torch and without a warning."""
    pytest.importorskip("sphinx", reason="the documentation tools are not installed")
    out = tmp_path_factory.mktemp("docs")
    code = (
        "import sys; from sphinx.cmd.build import main;"
        f"code = main(['-q', '-W', '--keep-going', '-b', 'html', {str(ROOT / 'docs')!r}, {str(out)!r}]);"
        "sys.exit(code or sorted({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def shown(page: Path) -> str:
    """The text of a page, without white space."""
    return re.sub(r"\s+", "", html.unescape(re.sub(r"<[^>]*>", "", page.read_text())))


@pytest.mark.parametrize("name", stages())
def test_every_hook_stands_in_the_docs(pages: Path, name: str) -> None:
    """With its exact signature, read from the source and not by the code that writes the page."""
    source = Path(hooks.__file__).read_text()
    signature = re.search(rf"^def {name}(\(.*?\) -> .*?):\n    \"\"\"", source, re.MULTILINE | re.DOTALL)
    assert signature is not None
    written = re.sub(r"\s+", "", name + signature[1]).replace(",)", ")")
    assert written in shown(pages / "reference" / "hooks.html")


def test_every_key_stands_in_the_docs(pages: Path) -> None:
    text = shown(pages / "reference" / "recipe.html")
    documented = [c for c in configs() if c is not sections.Recipe]
    missing = {
        f"{config.__qualname__}.{name}"
        for config in documented
        for name, field in config.model_fields.items()
        if re.sub(r"\s+", "", (field.description or "").replace("`", "")) not in text
    }
    assert missing == set()


def test_every_command_stands_in_the_docs(pages: Path) -> None:
    text = shown(pages / "reference" / "cli.html")
    flags = {flag for _, command in all_commands() for p in command.params for flag in p.opts if flag[0] == "-"}
    assert {flag for flag in flags - {"--help"} if flag not in text} == set()


def hidden(name: str) -> bool:
    """Whether a folder or file is no part of the project."""
    made = name in ("dist", "runs", "_build", "__pycache__")
    return made or (name.startswith(".") and name not in (".ci", ".gitignore"))


@pytest.mark.torch_free
def test_no_path_of_a_machine() -> None:
    """Nothing in the tree names a folder of the machine that it was written on."""
    files = [
        path
        for path in ROOT.rglob("*")
        if path.suffix in TEXT and path.is_file() and not any(hidden(part) for part in path.relative_to(ROOT).parts)
    ]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def default(key: str) -> str:
    """The default of a dotted recipe key, as the documentation writes it."""
    homes = {
        "model": "model:huggingface",
        "tokenizer": "tokenizer:huggingface",
        "optimizer": "optimizer:adamw",
        "scheduler": "scheduler:huggingface",
        "checkpoint": "checkpoint:deepspeed",
        "data": "trainer:sft",
        "data.sources": "source:huggingface_instruct",
    }
    section, _, name = key.rpartition(".")
    config: Any = {"": sections.CoreConfig, "logger": sections.LoggerConfig, "wandb": sections.WandbConfig}.get(section)
    if config is None:
        kind, part = homes[section].split(":")
        (point,) = entry_points(group=f"ptrain.{kind}", name=part)
        config = point.load().Data if kind == "trainer" else point.load().Config
    value = config.model_fields[name].default
    return written(list(value) if isinstance(value, tuple) else value)


def written(value: Any) -> str:
    """A default, as the documentation writes it."""
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


THERE: dict[str, Any] = {
    "code": "train.py", "epochs": 1, "train_iters": 0, "micro_batch_size": 1, "gradient_accumulation_steps": 1,
    "seed": 42, "min_iterations": 0, "exit_iteration": 0, "exit_iteration_this_run": 0, "overfit_first_batch": False,
    "loss_log_interval": 1, "train_log_iter_interval": 1, "train_log_metrics_path": "./train-log-metrics.jsonl",
    "eval_interval": 0, "eval_log_iter_interval": 1, "kill_switch_path": "/tmp/at_kill_switch",
    "gradient_clipping": 1.0,
    "model.dtype": "bf16", "model.save_name": None, "model.attn_implementation": "sdpa",
    "model.disable_activation_checkpoint": False, "model.hf_config_kwargs": {},
    "tokenizer.name_or_path": "",
    "optimizer.weight_decay": 0.1, "optimizer.betas": [0.9, 0.999], "optimizer.learning_rate": 5e-4,
    "scheduler.name": "linear", "scheduler.warmup_ratio": 0.1, "scheduler.scheduler_specific_kwargs": {},
    "checkpoint.output_dir": ..., "checkpoint.enabled": True, "checkpoint.auto_resume": False,
    "checkpoint.save_every_n_steps": 0, "checkpoint.save_every_n_epochs": 0, "checkpoint.save_end_of_training": False,
    "logger.output_dir": "/dev/null", "logger.level": "WARNING", "logger.print_output_ranks": [0],
    "logger.file_output_ranks": "*",
    "wandb.enable": False, "wandb.entity": None, "wandb.project": "arctic-training", "wandb.name": None,
    "data.eval_sources": [], "data.train_eval_split": [1.0, 0.0], "data.max_length": ..., "data.num_proc": 16,
    "data.dl_num_workers": 2, "data.seed": 42, "data.cache_dir": "/tmp", "data.fail_on_missing_cache": False,
    "data.div_length": 256, "data.mask_inputs": True, "data.pad_to": "div_length", "data.filter_samples": True,
    "data.pack_samples": False, "data.ignore_empty_think": False,
    "data.sources.sample_ratio": None, "data.sources.sample_count": None, "data.sources.sample_seed": 42,
    "data.sources.process": True, "data.sources.kwargs": {}, "data.sources.split_mapping": {},
    "data.sources.content_key": None,
}  # fmt: skip
"""The defaults of ArcticTraining, of every key that is here too; `...` where there is no fixed one."""


@pytest.mark.torch_free
def test_differing_defaults_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "arctic-training.md").read_text().partition("## Other defaults")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*?) \|", page, re.MULTILINE)
    assert [(key, here) for key, _, here in rows] == [(key, default(key)) for key, _, _ in rows]
    assert {key for key, _, _ in rows} == {key for key, there in THERE.items() if written(there) != default(key)}
    fixed = [(key, there) for key, there, _ in rows if THERE[key] is not ...]
    assert fixed == [(key, written(THERE[key])) for key, _ in fixed]
