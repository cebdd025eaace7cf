"""`ptrain export`: a model that others can load, out of what a run has saved; adapters are merged where asked."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ptrain import checks, saving
from ptrain.catalog import Catalog
from ptrain.directory import SPEC, newest_run
from ptrain.errors import CheckpointError, RecipeError
from ptrain.recipe.load import load_recipe
from ptrain.run import Run

if TYPE_CHECKING:
    import torch

    from ptrain.parts import Checkpoint

T = TypeVar("T")
MERGED = 1e-4
"""How far its answer may be from that with the adapter beside the weights, in fp32, as a share of the largest."""


class Asked:
    """In the place of an engine, where a model is asked in one process and not trained."""

    stage = 0

    def __call__(self, work: Callable[[], T]) -> T:
        """The result of `work`."""
        return work()


def export(directory: Path, to: Path | None = None, *, merge: bool = False, code: Path | None = None) -> Path:
    """Write the model of a run's newest checkpoint for others, and return its folder. One process, on the CPU.

    Args:
        directory: of the run, or of all runs of a recipe, of which it is the newest.
        to: the folder to make; by default `exported` or `merged` in the run directory.
        merge: put the adapter into the weights, which gives one model that needs no peft.
        code: the code of your own that the run had.

    Raises:
        RecipeError: there is no such run, or `to` is not empty.
        CheckpointError: the run has saved nothing to export, or what is written would not load again.
    """
    run = _open(directory, code, merge)
    target = (to or run.dir / ("merged" if merge else "exported")).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"`{target}` is there already, and not empty", fix="give another folder with `--to`")
    _restore(run, merge)
    if merge:
        run.model = merged(run)
    return _write(run, target)


def _open(directory: Path, code: Path | None, merge: bool) -> Run:
    """The run in a directory, with its model as it was before the first step."""
    import torch

    from ptrain import setup
    from ptrain.data.cache import prepare
    from ptrain.engine import quiet
    from ptrain.model.huggingface import HuggingFaceModel

    found = directory if (directory / SPEC).is_file() else newest_run(directory)
    if found is None:
        raise RecipeError(f"there is no run in `{directory}`", expected="a run directory, with a `run.json` in it")
    content = json.loads((found / SPEC).read_text(encoding="utf-8"))
    if content["code"] and code is None:
        raise RecipeError(
            f"the run had the code `{content['code']}`", fix=f"read it, and add `--code {content['code']}`"
        )
    # How it was dealt out to workers is no matter here.
    recipe = {key: value for key, value in content["recipe"].items() if key not in ("deepspeed", "code")}
    quiet()
    run = Run(load_recipe(recipe, code=code), found.absolute())
    run.device = torch.device("cpu")
    checks.check_paths(run)
    prepare(run)
    if merge and isinstance(run.parts.model, HuggingFaceModel):
        run.parts.model.dequantized = True
    setup.create_model(run)
    run.engine = Asked()  # type: ignore[assignment]
    return run


def _restore(run: Run, merge: bool) -> None:
    """Give the model the weights of the newest checkpoint, or to be merged those of the newest export."""
    from ptrain.model import adapters

    adapted = adapters.adapter_of(run.model) is not None
    if merge and not adapted:
        raise RecipeError(f"the model of `{run.dir}` has no adapter to merge", fix="leave `--merge` out")
    point, exported = saving.resume_point(run), saving.newest_export(run)
    exported = exported.resolve() if exported is not None else None
    if exported is not None and (point is None or point.name <= exported.name):
        if not merge:
            raise CheckpointError(f"the run has exported its newest checkpoint itself: `{exported}`", fix="use that")
        run.parts.model.restore(run.model, exported)  # type: ignore[attr-defined]
        run.progress.step = int(exported.name.rpartition("-")[2])
    elif point is None:
        raise CheckpointError(
            f"the run in `{run.dir}` has saved no checkpoint",
            fix="go on with it (`--resume`), and give it a `checkpoint` that is due",
        )
    else:
        _read(run, point)


def _read(run: Run, path: Path) -> None:
    """Copy the weights of a checkpoint that training can be resumed from."""
    import torch

    from ptrain import engine_state
    from ptrain.checkpoint.resumable import Reader, check_model, saved_state
    from ptrain.results import Progress

    state, reader = saved_state(path), Reader(path)
    if not getattr(run.parts.model, "dequantized", False):
        check_model(run, path, state)
    run.progress = Progress(**state["progress"])
    with torch.no_grad():
        for name, value in [*engine_state.trainable(run.model), *engine_state.buffers(run.model)]:
            value.copy_(reader.read(name, engine_state.WEIGHT))


def merged(run: Run) -> Any:
    """The model of the run with its adapter in its weights: added in fp32, rounded once.

    Raises:
        CheckpointError: it would compute something else.
    """
    from ptrain.model import adapters

    dtype = run.model.dtype
    expected = _answer(run, run.model.float().eval())
    found: Any = adapters.merge(run.model)
    difference = (_answer(run, found) - expected).abs().max() / expected.abs().max()
    if not difference <= MERGED:
        raise CheckpointError(
            f"the merged model answers otherwise: its numbers differ by {difference.item():.2g} of the largest",
            expected=f"at most {MERGED:g}", fix="use the adapter without merging it",
        )  # fmt: skip
    return found.to(dtype)


def _answer(run: Run, model: Any) -> torch.Tensor:
    """Its logits, or its hidden states where it has no output layer."""
    import torch

    from ptrain.checkpoint.huggingface import probe_ids
    from ptrain.checkpoint.reload import answer

    with torch.no_grad():
        return answer(model, torch.tensor([probe_ids(run)]))


def _exporter(name: str) -> Checkpoint:
    """The checkpoint part of this name, with its defaults."""
    catalog = Catalog.installed()
    kind = catalog.load(catalog.find("checkpoint", name))
    return kind(kind.Config(type=name))


def _write(run: Run, target: Path) -> Path:
    """Write aside, load it again in a fresh process, then rename."""
    from ptrain.checkpoint.huggingface import HuggingFaceCheckpoint

    own = [part for part in saving.active(run) if isinstance(part, HuggingFaceCheckpoint)]
    part = own[0] if own else _exporter(run.parts.model.exported_as)
    run.model.eval()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise RecipeError(
            f"`{target.parent}` can't be written: {error.strerror}", fix="give another with `--to`"
        ) from None
    try:
        part.save(run, staged)
        part.verify(run, staged)
        staged.chmod(0o755)
        staged.replace(target)
    except OSError as error:
        raise CheckpointError(f"the model could not be written to `{target}`: {error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target
