"""Runs from Python: `ptrain.train`, `ptrain.open_run`, recipes made of objects, plugins in the caller's own file.

Each case is a script in a process of its own, as a user's is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import differences, left, run_workers

import ptrain

ENV = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TORCH_COMPILE_DISABLE": "1"}
HEAD = "import json, sys\nimport ptrain\nkeys = json.load(open('recipe.json'))\n"
SAVES = [
    {"type": "deepspeed", "save_end_of_training": True},
    {"type": "huggingface", "save_end_of_training": True, "verify": False},
]
CHANGES: dict[str, Any] = {
    "micro_batch_size": 4,
    "epochs": 2,
    "checkpoint": SAVES,
    "data": {"train_eval_split": [0.8, 0.2]},
}

Script = Callable[..., str]


@pytest.fixture
def script(recipes: Any, tmp_path: Path) -> Script:
    """Runs a script beside `recipe.json`, alone or under torchrun, and returns what it printed."""
    (tmp_path / "recipe.json").write_text(json.dumps(recipes(**CHANGES)))

    def run(text: str, *launcher: str, before: str = "", code: int = 0) -> str:
        path = tmp_path / "script.py"
        path.write_text(HEAD + textwrap.dedent(before) + textwrap.dedent(text))
        command = [sys.executable, *(["-m", "torch.distributed.run", *launcher] if launcher else []), str(path)]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **ENV}, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture
def whole(prepared: Any, recipes: Any) -> dict[str, Any]:
    """What the same run leaves when a worker trains it."""
    spec = prepared(recipes(**CHANGES), name="whole")
    run_workers([spec], 1)
    return left(spec)


TWICE = """
    from ptrain_sft.plugin import SFT

    @ptrain.register("trainer", "mine")
    class Mine(SFT):
        class Config(SFT.Config):
            factor: float = 1.0

        @ptrain.hookimpl
        def loss(self, run, batch):
            loss = super().loss(run, batch)
            return ptrain.Loss({"loss": self.config.factor * loss.sums["loss"]})
"""


def test_train_twice_in_one_process(script: Script, whole: dict[str, Any], tmp_path: Path) -> None:
    """The same weights and metrics as any worker makes, and the result says where they are."""
    script("""
        one = ptrain.train(keys, {"output_dir": "one"})
        two = ptrain.train(ptrain.Recipe(**keys, output_dir="two"))
        assert (one.outcome, one.steps, one.metrics["loss"]) == ("done", two.steps, two.metrics["loss"]), (one, two)
        assert one.model.is_dir() and one.model.is_relative_to(one.dir), one.model
        assert one.metrics["eval/loss"] == two.metrics["eval/loss"]
    """)
    for name in ("one", "two"):
        assert differences(left(tmp_path / name / "run.json"), whole) == []


def test_steps_by_hand_are_those_of_a_run(script: Script, whole: dict[str, Any], tmp_path: Path) -> None:
    """Also when it is saved in between and opened again."""
    script("""
        with ptrain.open_run(keys, ["output_dir=out"]) as session:
            first = session.step()
            for result in session:
                if session.run.progress.step == 4:
                    break
            before = session.evaluate()
            assert before == session.evaluate()
            saved = session.save()
        assert [path.parent.name for path in saved] == ["checkpoints", "model"], saved
        try:
            session.step()
        except ptrain.TrainingError as error:
            assert "the run is closed" in str(error), error
        else:
            sys.exit("a closed run did a step")
        with ptrain.open_run(keys, ["output_dir=out"], resume=True) as session:
            results = list(session)
            session.evaluate()
            session.save()
            try:
                session.step()
            except ptrain.TrainingError as error:
                assert "steps are done" in str(error), error
            else:
                sys.exit("there was a step too many")
        print(json.dumps([first.loss, results[-1].loss]))
    """)
    found = left(tmp_path / "out" / "run.json")
    trained = [line for line in found["metrics"] if "loss" in line]
    assert differences({**found, "metrics": trained}, {**whole, "metrics": whole["metrics"][:-1]}) == []


def test_training_goes_on_after_a_save_that_failed(script: Script) -> None:
    """In training mode: dropout would be off for the rest of the run."""
    script("""
        with ptrain.open_run(keys, ["output_dir=out"]) as session:
            session.step()
            open("out/checkpoints", "w").close()
            try:
                session.save()
            except ptrain.CheckpointError:
                assert session.run.model.training
                session.step()
            else:
                sys.exit("it was saved into a file")
    """)


def test_plugins_of_the_callers_file(script: Script, whole: dict[str, Any], tmp_path: Path) -> None:
    """A trainer, a hook and a callback that no package offers; a class that is defined again takes the place."""
    script(
        """
        seen = []

        @ptrain.hookimpl(wrapper=True)
        def loss(run, batch):
            result = yield
            return ptrain.Loss({"loss": result.sums["loss"] / 4})

        @ptrain.callback("post-step")
        def look(run, result):
            seen.append(result.loss)

        recipe = ptrain.Recipe(**{**keys, "type": "mine", "factor": 4, "output_dir": "out"})
        assert recipe.trainer.factor == 4.0
        assert "factor: 4.0" in str(recipe)
        result = ptrain.train(recipe, plugins=[loss, look])
        assert len(seen) == result.steps
        """,
        before=2 * TWICE,
    )
    assert differences(left(tmp_path / "out" / "run.json"), whole) == []
    assert "def look(run, result)" in (tmp_path / "out" / "code.py").read_text()


def test_another_class_is_another_run(script: Script) -> None:
    """The code of the caller's classes is part of what a resumed run must share."""
    script(
        """
        keys |= {"type": "mine", "output_dir": "out"}
        ptrain.train(keys, {"exit_iteration_this_run": 2})
        """,
        before=TWICE,
    )
    assert "belongs to a run of another recipe: the user code differs" in script(
        """
        keys |= {"type": "mine", "output_dir": "out"}
        ptrain.train(keys, resume=True)  # the file has another text
        """,
        before=TWICE,
        code=1,
    )


def test_two_workers(script: Script, recipes: Any, prepared: Any, tmp_path: Path) -> None:
    """Each worker of another launcher makes the same calls; one of them prepares."""
    script(
        """
        for name in ("one", "two"):
            result = ptrain.train(keys, {"output_dir": name})
    """,
        "--standalone",
        "--nproc-per-node",
        "2",
    )
    spec = prepared(recipes(**CHANGES), name="whole")
    run_workers([spec], 2)
    for name in ("one", "two"):
        assert differences(left(tmp_path / name / "run.json"), left(spec)) == []


def test_a_path_among_overrides(recipes: Any, tmp_path: Path) -> None:
    run = ptrain.open_recipe(recipes(), {"output_dir": tmp_path / "run", "metadata": {"seen": [tmp_path]}})
    assert run.recipe.output_dir == tmp_path / "run" and run.recipe.metadata == {"seen": [str(tmp_path)]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ptrain.Recipe(**merged(keys, {'optimizer': {'lrr': 1}}))", ["RecipeError", "`lrr`", "write `lr`"]),
        ("ptrain.Recipe(type='sft', model={}, data={'sources': [1]}, epoch=2)", ["data.sources.0", "epochs"]),
        ("ptrain.train(keys, plugins=[print])", ["`print` in `plugins` is no plugin", "@ptrain.hookimpl"]),
        ("ptrain.train(keys, plugins=[ptrain.Trainer])", ["`Trainer` in `plugins`", "@ptrain.register"]),
        ("ptrain.train(keys, plugins=[f], code='script.py')", ["both `code` and `plugins` are given"]),
        ("ptrain.train('no.yaml')", ["no.yaml"]),
        ("ptrain.train(keys, {'seed': print})", ["RecipeError", "the override `seed` is <built-in function print>"]),
        ("ptrain.train(keys, plugins=[f, f])", ["two of `plugins` are called `f`"]),
    ],
)
def test_mistakes(script: Script, text: str, told: list[str], tmp_path: Path) -> None:
    (tmp_path / "mistakes.py").write_text("")
    printed = script(
        f"""
        def merged(keys, more):
            return {{**keys, **{{name: {{**keys[name], **value}} for name, value in more.items()}}}}

        @ptrain.callback("post-step")
        def f(run, result): ...

        if __name__ == "__main__":
            {text}
    """,
        code=1,
    )
    assert all(part in printed for part in told), printed
    assert not (tmp_path / "runs").exists()
