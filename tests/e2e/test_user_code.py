"""User code and plugins in real runs: a custom loss in four lines, callbacks, state, failures."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import losses, metrics, run_workers

from ptrain.checkpoint import store
from ptrain.errors import PtrainError
from ptrain.job import prepare_run
from ptrain.recipe.load import load_recipe
from ptrain.testing.recipes import merged
from ptrain.testing.workers import WorkerFailed


@pytest.fixture
def with_code(recipes: Any, tmp_path: Path) -> Callable[..., Path]:
    """Prepares a run with user code."""

    def make(code: str, name: str = "run", resume: bool = False, **changes: Any) -> Path:
        path = tmp_path / "train.py"
        path.write_text(textwrap.dedent(code))
        recipe = merged(
            recipes(**{"micro_batch_size": 4, "epochs": 1, **changes}), {"output_dir": str(tmp_path / name)}
        )
        return prepare_run(load_recipe(recipe, code=path), None, resume=resume)

    return make


CUSTOM_LOSS = """
    import ptrain

    @ptrain.hookimpl
    def loss(run, batch):
        hidden = run.call("forward", model=run.model, batch=batch)
        logprobs = run.call("token_logprobs", hidden=hidden, labels=batch["shift_labels"])
        return ptrain.Loss({"loss": -2 * logprobs.sum()})
"""


DOUBLED = """
    import ptrain

    @ptrain.hookimpl(wrapper=True)
    def token_logprobs():
        return 2 * (yield)
"""


def test_a_custom_loss_of_four_lines(with_code: Any, prepared: Any, recipes: Any) -> None:
    """It replaces the trainer's; twice the loss is twice the loss. So it is where log-probabilities are doubled, though
    the trainer asks for their sum."""
    custom, plain = with_code(CUSTOM_LOSS), prepared(recipes(micro_batch_size=4, epochs=1))
    doubled = with_code(DOUBLED, "doubled")
    run_workers([custom, plain, doubled], 1)
    assert losses(custom)[0] == pytest.approx(2 * losses(plain)[0], rel=1e-6)
    assert losses(doubled) == pytest.approx(losses(custom), rel=1e-5)


def test_a_scalar_loss_is_a_mean_over_samples(with_code: Any) -> None:
    """What a user returns as a scalar does not depend on the cut of the batch either."""
    code = """
        import ptrain

        @ptrain.hookimpl
        def loss(run, batch):
            hidden = run.call("forward", model=run.model, batch=batch)
            logprobs = run.call("token_logprobs", hidden=hidden, labels=batch["shift_labels"])
            return -logprobs.sum(dim=1).mean()
    """
    one = with_code(code, "one")
    two = with_code(code, "two", gradient_accumulation_steps=4)
    spec = json.loads(two.read_text())
    spec["recipe"]["micro_batch_size"] = 1
    two.write_text(json.dumps(spec))
    run_workers([one, two], 1)
    torch.testing.assert_close(losses(one), losses(two), atol=1e-5, rtol=1e-6)


def test_two_terms_and_metrics(with_code: Any) -> None:
    """Each term is divided by its own global count, weighted, and shown."""
    code = """
        import ptrain

        @ptrain.hookimpl
        def count(run, batch):
            return {"a": int((batch["shift_labels"] != -100).sum()), "b": batch["rows"]}

        @ptrain.hookimpl
        def loss(run, batch):
            hidden = run.call("forward", model=run.model, batch=batch)
            logprobs = run.call("token_logprobs", hidden=hidden, labels=batch["shift_labels"])
            norm = hidden.float().pow(2).mean(dim=(1, 2)).sum()
            rows = batch["rows"]
            return ptrain.Loss({"a": -logprobs.sum(), "b": norm}, {"b": 0.5}, {"rows": (rows, 1)})
    """
    spec = with_code(code)
    run_workers([spec], 1)
    first = json.loads((spec.parent / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(first["loss/a"] + 0.5 * first["loss/b"], rel=1e-6)
    assert first["rows"] == 4


def test_a_model_that_learns_from_itself(with_code: Any) -> None:
    """Divergence from what an earlier layer says, hidden states between layers, the likeliest tokens: with an output
    layer that is trained too, one worker and two under ZeRO-3 see the same."""
    code = """
        import ptrain

        @ptrain.hookimpl
        def loss(run, batch):
            early, last = run.call("forward", model=run.model, batch=batch, layers=(1, -1)).unbind(2)
            labels = batch["shift_labels"]
            far = run.call("token_kl", hidden=last, teacher=300 * early, labels=labels, temperature=1.5)
            ours, theirs = (run.call("token_argmax", hidden=x.detach(), labels=labels) for x in (last, early))
            there = labels != -100
            same = ((ours == theirs) & there).sum()
            return ptrain.Loss({"loss": far.sum()}, metrics={"same": (same, float(there.sum()))})
    """
    one = with_code(code, "one", gradient_accumulation_steps=2)
    two = with_code(code, "two", deepspeed={"zero_optimization": {"stage": 3}})
    run_workers([one], 1)
    run_workers([two], 2)
    assert losses(one)[0] > 0.1 and len(losses(one)) >= 3
    torch.testing.assert_close(losses(one), losses(two), atol=1e-5, rtol=1e-5)
    for alone, both in zip(metrics(one), metrics(two), strict=True):
        assert alone["same"] == pytest.approx(both["same"])
        assert alone["grad_norm"] == pytest.approx(both["grad_norm"], rel=1e-4)


def test_callbacks_see_and_change_the_run(with_code: Any) -> None:
    """`pre-` callbacks replace arguments, `post-` callbacks results, in a real run."""
    code = """
        import ptrain

        @ptrain.callback("pre-loss")
        def forget_half(run, batch):
            labels = batch["shift_labels"].clone()
            labels[:, ::2] = -100
            return {"batch": {**batch, "shift_labels": labels}}

        @ptrain.callback("post-step")
        def stamp(run, result):
            result.metrics["stamp"] = 7.0
    """
    spec = with_code(code)
    run_workers([spec], 1)
    records = [json.loads(line) for line in (spec.parent / "metrics.jsonl").read_text().splitlines()]
    assert all(record["stamp"] == 7.0 for record in records)
    assert records[0]["loss"] < 0.75 * 6


def test_a_plugins_state_survives_a_resume(with_code: Any) -> None:
    """JSON and tensors of `save_state` come back in `load_state`."""
    code = """
        import ptrain, torch

        seen = {"steps": 0, "sum": torch.zeros(2)}

        @ptrain.hookimpl
        def on_step_end(run, result):
            seen["steps"] += 1
            seen["sum"] += 1
            result.metrics["seen"] = seen["steps"]
            run.trackers.last["sum"] = seen["sum"].tolist()

        @ptrain.hookimpl
        def save_state(run):
            return {"steps": seen["steps"], "sum": seen["sum"]}

        @ptrain.hookimpl
        def load_state(run, state):
            seen["steps"], seen["sum"] = state["steps"], state["sum"].clone()

        @ptrain.hookimpl
        def on_end(run):
            (run.dir / "seen.txt").write_text(f"{seen['steps']} {seen['sum'].tolist()}")
    """
    saves = [{"type": "deepspeed"}]
    run_workers([with_code(code, checkpoint=saves, exit_iteration=3)], 1)
    spec = with_code(code, resume=True, checkpoint=saves)
    run_workers([spec], 1)
    steps = len(losses(spec))
    assert (spec.parent / "seen.txt").read_text() == f"{steps} [{float(steps)}, {float(steps)}]"


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ('raise KeyError("nonsense")', r"train\.py:7.*`loss` of `user code`.*stage `loss`.*KeyError"),
        (
            "return [result]",
            r"train\.py:4.*`loss` of `user code` .*returned list.*expected.*the loss of one micro-batch",
        ),
        ("return getattr(run, 'nothing', None)", r"train\.py:4.*`loss` of `user code` .*returned None: .* is lost"),
    ],
)
def test_a_failing_hook_is_named_and_costs_no_checkpoint(mistake: str, says: str, with_code: Any) -> None:
    """Plugin, file and line, in the worker's message; what was saved before is whole, and the run goes on from there."""
    code = f"""
        import ptrain

        @ptrain.hookimpl(wrapper=True)
        def loss(run):
            result = yield
            if run.progress.step == 3 and not (run.dir / "mended").exists(): {mistake}
            return result
    """
    saves = [{"type": "deepspeed", "save_every_n_steps": 2}]
    spec = with_code(code, checkpoint=saves)
    with pytest.raises(WorkerFailed, match="(?s)" + says):
        run_workers([spec], 1)
    assert store.newest_good(spec.parent / "checkpoints", report=pytest.fail).name == "step-00000002"
    (spec.parent / "mended").touch()
    run_workers([with_code(code, resume=True, checkpoint=saves)], 1)
    steps = [record["step"] for record in metrics(spec)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 5


def test_a_part_that_fails_is_named(recipes: Any, tmp_path: Path) -> None:
    """A source, say: what it is called, whose it is, stage, file and line."""
    path = tmp_path / "rows.py"
    path.write_text(
        textwrap.dedent("""
        import ptrain

        @ptrain.register("source", "mine")
        class Mine(ptrain.Source):
            def load(self, run, split):
                return self.rows()

            def rows(self):
                return {}["nonsense"]
    """)
    )
    recipe = recipes(data={"sources": [{"type": "mine"}]}, output_dir=str(tmp_path / "out"))
    with pytest.raises(PtrainError, match=r"rows\.py:10:.*`rows` of `mine` \(.*rows\.py .*stage `load`: KeyError"):
        prepare_run(load_recipe(recipe, code=path), None)


def test_a_loss_that_is_not_finite_stops_before_the_update(with_code: Any) -> None:
    """The step is named, the weights are those before it, and the last checkpoint stays."""
    code = """
        import ptrain

        @ptrain.hookimpl(wrapper=True)
        def loss(run):
            result = yield
            if run.progress.step == 4 and run.rank == run.world - 1:
                result.sums["loss"] = result.sums["loss"] * float("nan")
            return result
    """
    keep = [{"type": "deepspeed", "save_every_n_steps": 2, "keep_last": 1}]
    for workers in (1, 2):
        spec = with_code(code, f"run{workers}", checkpoint=keep, train_iters=8)
        with pytest.raises(WorkerFailed, match="the loss of step 5 is nan; the weights were not changed"):
            run_workers([spec], workers)
        assert [p.name for p in sorted((spec.parent / "checkpoints").glob("step-*"))] == ["step-00000004"]


def test_a_gradient_that_is_not_finite_changes_no_weight(with_code: Any) -> None:
    """Though the loss is finite, and however DeepSpeed keeps the weights. Once it is warned of, twice ends the run."""
    code = """
        import ptrain
        import torch

        @ptrain.hookimpl(wrapper=True)
        def loss(run):
            result = yield
            if run.progress.step in (1, 4, 5) and run.rank == run.world - 1:
                result.sums["loss"] = result.sums["loss"] + torch.sqrt(0 * result.sums["loss"])
            return result

        @ptrain.hookimpl
        def on_step_end(run):
            norms = [float(weight.double().norm()) for _, weight in run.weights()]
            if run.rank == 0:
                print(run.progress.step, sum(norms), flush=True)
    """
    keep = [{"type": "deepspeed", "save_every_n_steps": 1, "keep_last": 1}]
    for number, (workers, dtype, stage) in enumerate([(1, "fp32", 0), (2, "fp32", 0), (1, "bf16", 0), (2, "bf16", 3)]):
        changes = {"model": {"dtype": dtype}, "deepspeed": {"zero_optimization": {"stage": stage}}}
        spec = with_code(code, f"run{number}", checkpoint=keep, train_iters=8, **changes)
        with pytest.raises(WorkerFailed, match="step 6 is not finite, nor was that of the step before"):
            run_workers([spec], workers)
        written = (spec.parent / "worker.log").read_text()  # of rank 0, whichever failed first
        assert "the gradient of step 2 is not finite, so the weights were not changed" in written
        norms = dict(line.split() for line in written.splitlines() if line[:1].isdigit())
        assert norms["1"] == norms["2"] != norms["3"] != norms["4"] == norms["5"]
        assert [p.name for p in sorted((spec.parent / "checkpoints").glob("step-*"))] == ["step-00000005"]


def test_a_mean_over_samples_where_a_worker_has_none(with_code: Any) -> None:
    """A loss that is a scalar counts the samples that there are: the last step of an epoch has an empty micro-batch."""
    code = """
        import ptrain

        @ptrain.hookimpl
        def loss(run, batch):
            hidden = run.call("forward", model=run.model, batch=batch)
            return 1 + 0 * hidden[batch["document_ids"] >= 0].float().mean()
    """
    spec = with_code(code, gradient_accumulation_steps=2, micro_batch_size=2, data={"train_eval_split": [0.8, 0.2]})
    run_workers([spec], 2)
    assert losses(spec) == pytest.approx([1, 1, 1])
    recorded = [json.loads(line) for line in (spec.parent / "metrics.jsonl").read_text().splitlines()]
    assert recorded[-1]["eval/loss"] == pytest.approx(1)


def test_the_last_evaluation_comes_after_the_model_is_saved(with_code: Any) -> None:
    """It may take long, and may fail: what was trained is there already."""
    code = """
        import ptrain

        @ptrain.hookimpl
        def evaluate(run):
            raise ValueError("no")
    """
    keep = [{"type": "huggingface", "save_end_of_training": True, "verify": False}]
    spec = with_code(code, checkpoint=keep, train_iters=2, data={"train_eval_split": [0.8, 0.2]})
    with pytest.raises(WorkerFailed, match="ValueError: no"):
        run_workers([spec], 1)
    assert (spec.parent / "model" / "latest" / "model.safetensors").is_file()


def test_a_weight_that_one_worker_alone_has_a_gradient_of(with_code: Any, tmp_path: Path) -> None:
    """Such as that of an expert that no token of the others went to: all clip alike, and go on with the same weights."""
    code = """
        import ptrain
        import torch

        @ptrain.hookimpl(wrapper=True)
        def loss(run):
            result = yield
            if run.rank == 0:
                result.sums["loss"] = run.model.get_input_embeddings().weight.square().sum()
            return result

        @ptrain.hookimpl
        def on_end(run):
            torch.save([p.detach() for p in run.model.parameters()], run.dir / f"weights-{run.rank}.pt")
    """
    spec = with_code(code, train_iters=3, deepspeed={"zero_optimization": {"stage": 0}})
    run_workers([spec], 2)
    here, there = (torch.load(spec.parent / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def test_user_code_never_runs_unasked(recipes: Any, tmp_path: Path) -> None:
    """`code:` in a recipe needs --allow-code."""
    bomb = tmp_path / "bomb.py"
    bomb.write_text(f"open({str(tmp_path / 'boom')!r}, 'w')")
    with pytest.raises(PtrainError, match="allow-code"):
        load_recipe({**recipes(), "code": str(bomb)})
    assert not (tmp_path / "boom").exists()
