"""The checkpoint part `speculator`: the trained speculator alone, in the layout that serving engines load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import ptrain
from ptrain import CheckpointError
from ptrain_spec_decode.layout import file_name

if TYPE_CHECKING:
    from ptrain import Run

PREFIX = "speculator."
Engine = Literal["vllm", "arctic"]


class SpeculatorCheckpoint(ptrain.Checkpoint):
    """`speculator`: `model.safetensors` and `config.json`, for vLLM or Arctic Inference."""

    class Config(ptrain.CheckpointConfig):
        """Keys of `speculator`."""

        served_by: Literal["vllm", "arctic"] | None = None
        """Which engine's name of the architecture is written: `vllm` or `arctic` (Arctic Inference). By default vLLM's
        for `mlp`; `lstm` is known to Arctic Inference alone."""

    folder = "speculator"

    def save(self, run: Run, path: Path) -> None:
        """Gather the weights of the speculator one by one; rank 0 writes them, in the dtype of training.

        Raises:
            CheckpointError: a weight is not finite, or the engine has no such speculator.
        """
        from ptrain_spec_decode.model import base_of, speculator_of
        from ptrain_spec_decode.saved import config_of, write

        shape = speculator_of(run).shape
        engine = self._engine(shape.kind)
        weights = {}
        for name, weight in run.weights(trained_only=True):
            if name.startswith(PREFIX) and run.rank == 0:
                weights[file_name(name.removeprefix(PREFIX))] = weight.detach().to("cpu", copy=True).contiguous()
        if run.rank == 0:
            for name, weight in weights.items():
                if not weight.isfinite().all():
                    raise CheckpointError(f"the weight `{name}` of the speculator holds values that are not finite")
            dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
            write(path, weights, config_of(shape, base_of(run, run.hf_config), dtype, engine))

    def verify(self, run: Run, path: Path) -> None:
        """Raise CheckpointError where the folder does not describe, or hold, the speculator of the run."""
        from safetensors import safe_open

        from ptrain_spec_decode.model import speculator_of
        from ptrain_spec_decode.saved import WEIGHTS, check_names, read

        try:
            found, _ = read(path)
            with safe_open(path / WEIGHTS, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            check_names(path, shapes, found)
        except ptrain.ModelError as error:
            raise CheckpointError(f"the saved speculator would not load: {error}") from error
        if found != speculator_of(run).shape:
            raise CheckpointError(f"`{path}` describes another speculator than the one that is trained")

    def advice(self, path: Path) -> str:
        """To go on with it, or to serve it."""
        return (
            f"train it further with `-o speculator_path={path}`, or give that folder to the engine that serves the base"
        )

    def _engine(self, kind: str) -> Engine:
        if self.config.served_by == "vllm" and kind == "lstm":
            raise CheckpointError(
                "vLLM itself serves no speculator of the kind `lstm`", fix="write `served_by: arctic`, or leave it out"
            )
        return self.config.served_by or ("vllm" if kind == "mlp" else "arctic")
