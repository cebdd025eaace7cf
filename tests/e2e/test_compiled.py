"""Layers compiled by torch: the same losses, and what is refused. The real command, since tests compile nothing else."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import finish, losses, start

from ptrain.testing.recipes import merged

COUNTS = """
    import ptrain

    @ptrain.hookimpl
    def on_end(run):
        from torch._dynamo.utils import counters
        run.say(f"graphs: {counters['stats']['unique_graphs']}")
"""
PADDED: dict[str, Any] = {}
PACKED = {"data": {"pack_samples": True}, "model": {"disable_activation_checkpoint": False}}


def trained(recipe: dict[str, Any], folder: Path, name: str, **env: str) -> tuple[int, str, list[float]]:
    """A run by the command: its exit code, all that it wrote, and its losses."""
    file, code = folder / f"{name}.yaml", folder / "code.py"
    code.write_text(textwrap.dedent(COUNTS))
    file.write_text(yaml.safe_dump(merged(recipe, {"output_dir": str(folder / name)})))
    done, out, err = finish(start("run", file, "--code", code, env={"TORCHDYNAMO_DISABLE": "0", **env}), timeout=400)
    spec = folder / name / "spec.json"
    return done, out + err, losses(spec) if (folder / name / "metrics.jsonl").exists() else []


@pytest.mark.parametrize(
    "keys",
    [PACKED, pytest.param(PADDED, marks=pytest.mark.exhaustive)],
    ids=["packed, activations computed again", "padded"],
)
def test_losses_are_those_of_layers_that_are_not_compiled(keys: Any, recipes: Any, tmp_path: Path) -> None:
    recipe = merged(recipes(micro_batch_size=3, epochs=2, train_iters=12), keys)
    _, _, expected = trained(recipe, tmp_path, "plain")
    done, written, found = trained(merged(recipe, {"model": {"compile": True}}), tmp_path, "compiled")
    assert done == 0, written
    assert "2 layers are compiled" in written and "graphs: " in written and "graphs: 0" not in written, written
    assert found == pytest.approx(expected, abs=1e-5) and len(found) == 12
    assert "recompile_limit" not in written


def test_layers_that_are_sharded_are_refused(recipes: Any, tmp_path: Path) -> None:
    recipe = recipes(model={"compile": True}, deepspeed={"zero_optimization": {"stage": 3}})
    done, written, _ = trained(recipe, tmp_path, "sharded")
    assert done == 2 and "sharded by ZeRO stage 3" in written and "Traceback" not in written


@pytest.mark.parametrize("reason", ["No working C++ compiler", "TORCHDYNAMO_DISABLE"])
def test_where_torch_cannot_compile(reason: str, recipes: Any, tmp_path: Path) -> None:
    env = {"TORCHDYNAMO_DISABLE": "1"} if reason.isupper() else {"CXX": "/no/compiler"}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "compiled")
    done, written, _ = trained(recipes(model={"compile": True}), tmp_path, "none", **env)
    assert done == 2 and "torch can't compile here" in written and reason in written, written
    assert "Traceback" not in written and "done" not in written
