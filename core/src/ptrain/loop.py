"""The training loop: the file to read first. Each line names a stage; the details live one call away."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ptrain import saving
from ptrain.engine import peak_memory
from ptrain.evaluators import with_data
from ptrain.results import StopRequested
from ptrain.seeds import seed_everything

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ptrain.results import Batch, StepResult
    from ptrain.run import Run


def train(run: Run) -> str:
    """Train until the last step, the kill switch or a signal; return "done", "stopped" or "exit_iteration"."""
    run.call("before_training")
    run.call("on_start")
    try:
        outcome = iterate(run)
        # First: the last evaluation may take long, and may fail.
        saving.save_at_end(run, outcome)
        if outcome == "done":
            evaluate_at_end(run)
    except StopRequested:
        outcome = "stopped"
        saving.save_at_end(run, outcome)
    run.call("on_end")
    return outcome


def iterate(run: Run) -> str:
    """All steps, and the evaluations before the last one; return "done" or "exit_iteration".

    Raises:
        StopRequested: a signal or the kill switch, between two steps or within an evaluation.
    """
    last, outcome = last_step(run)
    evaluate_if_due(run)
    stream = iter(run.train_loader)
    while run.progress.step < last:
        one_step(run, stream)
        run.stop_if_asked()
        if run.progress.step < last:
            evaluate_if_due(run)
        saving.save_due(run)
    return outcome


def one_step(run: Run, stream: Iterator[Batch]) -> StepResult:
    """Do the next optimizer step on the next batches of `stream`, and record it."""
    began = time.perf_counter()
    seed_everything(run.recipe.seed, run.progress.step, run.data_rank, run.shard)
    run.beat("the next batch")
    batches = [next(stream) for _ in range(run.accumulation)]
    result: StepResult = run.call("step", batches=batches)
    advance(run, result, began)
    run.call("on_step_end", result=result)
    return result


def last_step(run: Run) -> tuple[int, str]:
    """The optimizer step to stop after, and what stopping there means."""
    limits = [run.recipe.exit_iteration]
    if run.recipe.exit_iteration_this_run:
        limits.append(run.progress.step + run.recipe.exit_iteration_this_run)
    early = min((limit for limit in limits if limit), default=run.total_steps)
    return (early, "exit_iteration") if early < run.total_steps else (run.total_steps, "done")


def advance(run: Run, result: StepResult, began: float) -> None:
    """Count the step and record its metrics."""
    progress = run.progress
    progress.step += 1
    progress.epoch, at = divmod(progress.step, run.steps_per_epoch)
    progress.samples = run.train_loader.samples_before(at)
    progress.tokens += int(result.metrics.get("tokens", 0))
    seconds = time.perf_counter() - began
    result.metrics["epoch"] = progress.step / run.steps_per_epoch
    result.metrics["seconds"] = seconds
    result.metrics["tokens_per_second"] = result.metrics.get("tokens", 0.0) / seconds
    result.metrics["memory_gib"] = peak_memory(run.device)
    run.trackers.log(run, {"step": progress.step, **result.metrics})


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) happens after `step`."""
    return interval > 0 and step % interval == 0


def evaluate_if_due(run: Run) -> None:
    """Evaluate where the recipe asks for it after this step, unless that was done before the run was resumed."""
    step, interval = run.progress.step, run.recipe.eval_interval
    wanted = due(step, interval) if step else run.recipe.eval_at_start
    if wanted and run.progress.evaluated < step:
        evaluate(run, record=not step or due(step, interval * run.recipe.eval_log_iter_interval))


def evaluate_at_end(run: Run) -> None:
    """Evaluate what came out, unless nothing was to be trained, or that was done before the run was resumed."""
    trained = run.recipe.train_iters + run.recipe.epochs > 0
    if trained and run.progress.evaluated < run.progress.step:
        evaluate(run)


def evaluate(run: Run, record: bool = True) -> dict[str, float]:
    """Evaluate, record, and go back to training."""
    if not with_data(run):
        return {}
    seed_everything(run.recipe.seed, "evaluate", run.data_rank, run.shard)
    run.engine.train(False)
    try:
        metrics = dict(run.call("evaluate"))
    finally:
        run.engine.train(True)
    run.progress.evaluated = run.progress.step
    if record:
        run.trackers.log(run, {"step": run.progress.step, **{f"eval/{k}": v for k, v in metrics.items()}})
    run.call("on_evaluate_end", metrics=metrics)
    return metrics
