"""When checkpoints are written, and how a run goes on from one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.checkpoint import store
from ptrain.checkpoint.huggingface import HuggingFaceCheckpoint
from ptrain.errors import CheckpointError
from ptrain.recipe.combined import default_folder

if TYPE_CHECKING:
    from ptrain.parts import Checkpoint
    from ptrain.recipe.sections import CheckpointConfig
    from ptrain.run import Run


def folder(run: Run, part: Checkpoint) -> Path:
    """Where the checkpoints of `part` go."""
    return part.config.output_dir or run.dir / default_folder(part, part.config)


def save_due(run: Run) -> None:
    """Write every checkpoint that is due after this step."""
    for part in active(run):
        if is_due(part.config, run.progress.step, run.steps_per_epoch):
            save(run, part)


def is_due(config: CheckpointConfig, step: int, steps_per_epoch: int) -> bool:
    """Whether a checkpoint is written after optimizer step `step`, be it the last or not."""
    by_step = bool(config.save_every_n_steps) and step % config.save_every_n_steps == 0
    epoch, rest = divmod(step, steps_per_epoch)
    return by_step or bool(config.save_every_n_epochs and not rest and epoch % config.save_every_n_epochs == 0)


def save_at_end(run: Run, outcome: str) -> None:
    """Write what is due when training ends: `outcome` is that of the loop.

    A run that was stopped always leaves something to resume from, asked for or not.
    """
    for part in active(run):
        wanted = part.config.save_end_of_training if outcome == "done" else part.resumable
        if wanted:
            save(run, part)
    if outcome != "done" and not any(part.resumable for part in active(run)):
        save(run, resumable(run))


def active(run: Run) -> list[Checkpoint]:
    """The checkpoint parts that are enabled."""
    return [part for part in run.parts.checkpoints if part.config.enabled]


def resumable(run: Run) -> Checkpoint:
    """The part that training is resumed from: the recipe's, or else core's own."""
    for part in active(run):
        if part.resumable:
            return part
    from ptrain.checkpoint.resumable import DeepSpeedCheckpoint

    return DeepSpeedCheckpoint(DeepSpeedCheckpoint.Config(type="deepspeed"))


def save(run: Run, part: Checkpoint) -> Path:
    """Write one checkpoint aside, verify, rename, and point to it; nothing is done where it is there already."""
    root, name = folder(run, part), f"step-{run.progress.step:08d}"
    run.engine.train(False)

    def fill(path: Path) -> None:
        run.call("checkpoint", part=part, path=path)

    try:
        path = store.write(
            root, name, fill, rank=run.rank, agree=run.agree, keep_last=part.config.keep_last,
            verify=lambda staged: part.verify(run, staged), report=run.warn,
        )  # fmt: skip
    finally:
        run.engine.train(True)
    run.call("on_checkpoint", path=path)
    return path


def resume_point(run: Run) -> Path | None:
    """The newest good checkpoint of this run, or None where it has none yet. Hashes it: once, before workers start.

    Raises:
        CheckpointError: there are some, and each of them is damaged.
    """
    root = folder(run, resumable(run))
    found = store.newest_good(root, report=run.warn)
    if found is None and store.saved(root):
        raise CheckpointError(
            f"none of the {len(store.saved(root))} checkpoints in `{root}` can be resumed from: each is damaged",
            fix=f"put one back from a copy; or move `{root}` away and begin anew with `--restart`",
        )
    return found


def adopt_global_batch(run: Run, path: Path | None) -> None:
    """Keep the global batch of the checkpoint when the number of workers has changed.

    Raises:
        CheckpointError: no whole number of micro-batches gives it.
    """
    if path is None:
        return
    from ptrain.checkpoint.resumable import saved_state

    batch = saved_state(path)["global_batch"]
    one = run.recipe.micro_batch_size * run.data_world
    if batch % one:
        raise CheckpointError(
            f"the checkpoint `{path}` was made with {batch} samples a step, which is no multiple of "
            f"{run.recipe.micro_batch_size} (`micro_batch_size`) x {run.readers}",
            fix="resume with another number of workers or another `micro_batch_size`",
        )
    if batch // one != run.accumulation:
        run.say(f"{run.readers}: gradient_accumulation_steps is {batch // one}, for {batch} samples a step")
        run.accumulation = batch // one


def resume(run: Run, path: Path) -> None:
    """Put the run back to where it was when `path` was written."""
    resumable(run).load(run, path)
    run.say(f"resumed from {path} (step {run.progress.step})")


def newest_export(run: Run) -> Path | None:
    """The newest model that the run has written for others to load."""
    exports = [part for part in active(run) if part.folder == HuggingFaceCheckpoint.folder]
    found = [store.latest(folder(run, part)) for part in exports]
    return next((path for path in found if path is not None and path.exists()), None)


def newest_other(run: Run) -> tuple[Checkpoint, Path] | None:
    """The newest of what a part of another kind has written, which says what to do with it; with that part."""
    for part in active(run):
        path = store.latest(folder(run, part))
        if path is not None and path.exists() and part.advice(path):
            return part, path
    return None


def resumes_by_itself(recipe: Any) -> bool:
    """Whether the recipe asks to go on from the latest checkpoint."""
    return any(entry.auto_resume and entry.enabled for entry in recipe.checkpoint)
