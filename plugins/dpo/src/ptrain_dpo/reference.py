"""What the reference model makes of the pairs: computed once before training, or at each step by a model beside.

The reference is the model that training begins with.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ptrain import CheckpointError, ModelError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from ptrain import Batch, Run

FILE = "reference.safetensors"
SPLITS = ("train", "eval")


class Score(Protocol):
    """Log-probabilities of the chosen and the rejected completion of each row of a batch, fp32 [rows, 2]."""

    def __call__(self, run: Run, batch: Batch) -> torch.Tensor: ...


class Cached:
    """Log-probabilities of every pair, computed before the first step: no second model is in memory.

    They are kept in the run directory, where a resumed run finds them, and in the cache of prepared data by the content
    of the model and of the rows, where other runs do.
    """

    def __init__(self, run: Run, score: Score) -> None:
        own = run.dir / FILE
        # What is there before the first step is of a run that ended without a checkpoint: its model may be another.
        found = own if run.progress.step or run.rank else _shared(run)
        made = not run.agree(found.is_file())
        self._values = self._made(run, score) if made else _read(run, found)
        if run.rank == 0 and not run.progress.step:
            for path in (own, found) if made else (own,):
                _write(path, self._values)

    def __call__(self, run: Run, batch: Batch) -> torch.Tensor:
        """Those of the rows of a batch, fp32 [rows, 2]."""
        return self._values[batch["split"]][batch["row_numbers"]].to(run.device)

    def _made(self, run: Run, score: Score) -> dict[str, torch.Tensor]:
        if run.progress.step:
            raise CheckpointError(
                f"`{run.dir / FILE}` is gone, and the model is no longer the one that it was computed with",
                fix="put it back, or begin anew with `--restart`",
            )
        run.say(f"the reference's log-probabilities of {len(run.train_data) + len(run.eval_data):,} pairs are computed")
        return {split: _score_all(run, rows, score) for split, rows in _splits(run).items()}


class Online:
    """A second model with the weights that training began with, asked at every step."""

    def __init__(self, run: Run, score: Score) -> None:
        import copy

        from ptrain.seeds import seed_everything

        seed_everything(run.recipe.seed, "model")  # where weights are drawn, the same ones again
        model = run.call("create_model", config=run.hf_config)
        self._run = copy.copy(run)
        self._run.model, self._run.head = model, None
        self._run.engine = run.call("create_engine", model=model, optimizer=None, scheduler=None)
        self._score = score

    def __call__(self, run: Run, batch: Batch) -> torch.Tensor:
        """Those of the rows of a batch, fp32 [rows, 2]."""
        return self._run.engine(lambda: self._score(self._run, batch))


class AdapterOff:
    """The model itself without its adapter, asked at every step: a new adapter begins with changing nothing."""

    def __init__(self, run: Run, score: Score) -> None:
        self._score = score
        if run.progress.step:
            return
        batch = next(iter(run.call("create_dataloader", split="eval", dataset=run.train_data)), None)
        if batch is not None:
            self._check(run, batch)

    def _check(self, run: Run, batch: Batch) -> None:
        import torch

        from ptrain.stages import to_device

        batch = to_device(batch, run.device)
        run.engine.train(False)
        with torch.no_grad():
            off, on = self(run, batch), run.engine(lambda: self._score(run, batch))
        run.engine.train(True)
        if not torch.allclose(off, on, rtol=1e-4, atol=1e-4):
            raise ModelError(
                "the adapter changes the model before its first step, so that without it the model is not the one that "
                "training begins with",
                fix="write `reference: cached`",
            )

    def __call__(self, run: Run, batch: Batch) -> torch.Tensor:
        """Those of the rows of a batch, fp32 [rows, 2]."""
        import torch

        mode = run.model.training
        run.engine.train(False)  # a reference has no dropout
        try:
            with torch.no_grad(), run.adapter_off():
                return run.engine(lambda: self._score(run, batch))
        finally:
            run.engine.train(mode)


class Absent:
    """No reference: every log-probability is 0."""

    def __init__(self, run: Run, score: Score) -> None: ...

    def __call__(self, run: Run, batch: Batch) -> torch.Tensor:
        """Zeros, fp32 [rows, 2]."""
        import torch

        return torch.zeros(len(batch["row_numbers"]), 2, device=run.device)


REFERENCES = {"cached": Cached, "online": Online, "adapter_off": AdapterOff, "none": Absent}
"""By what the key `reference` says."""


def _splits(run: Run) -> dict[str, Dataset]:
    return {split: rows for split, rows in zip(SPLITS, (run.train_data, run.eval_data), strict=True) if len(rows)}


def _score_all(run: Run, rows: Dataset, score: Score) -> torch.Tensor:
    """Of every row, on every worker, fp32 [rows, 2]."""
    import torch

    from ptrain.stages import to_device

    values = torch.zeros(len(rows), 2, device=run.device)
    run.engine.train(False)
    with torch.no_grad():
        for batch in run.call("create_dataloader", split="eval", dataset=rows):
            run.stop_if_asked()
            batch = to_device(batch, run.device)
            found = run.engine(lambda batch=batch: score(run, batch))
            values[batch["row_numbers"]] = found
    run.engine.train(True)
    if run.world > 1:
        torch.distributed.all_reduce(values)
        values /= run.shards  # workers that share rows computed the same
    return values.cpu()


def _shared(run: Run) -> Path:
    """The file in the cache of prepared data, for every run with this model and these rows."""
    return run.recipe.data.cache_dir.expanduser() / f"{_key(run)}.{FILE}"


def _read(run: Run, path: Path) -> dict[str, torch.Tensor]:
    """What rank 0 reads from a file, on every worker."""
    import torch
    from safetensors.torch import load_file

    found = load_file(path) if run.rank == 0 else {}
    values = {split: found.get(split, torch.zeros(len(rows), 2)).to(run.device) for split, rows in _splits(run).items()}
    if run.world > 1:
        for split in values:
            torch.distributed.broadcast(values[split], 0)
    return {split: value.cpu() for split, value in values.items()}


def _write(path: Path, values: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    save_file(values, temporary)
    temporary.replace(path)


def _key(run: Run) -> str:
    """Of everything that the log-probabilities depend on: weights, rows, precision, code, whether they are means."""
    code = run.loaded.user_code
    content = [
        run.parts.model.fingerprint(run), *(_rows(rows) for rows in _splits(run).values()),
        # Any layer may change the model, or how it is asked.
        run.layer_versions(), code.sha256 if code is not None else "",
        {name: section.model_dump(mode="json") for name, section in run.recipe.plugins.items()},
        run.config.model_dump(include={"length_normalised", "loss_type"}),
        run.recipe.deepspeed.get("torch_autocast"),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _rows(rows: Dataset) -> str:
    digest = hashlib.sha256()
    table: Any
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for name in ("input_ids", "labels"):
            for chunk in table[name].chunks:
                digest.update(chunk.value_lengths().to_numpy().tobytes())
                digest.update(chunk.flatten().to_numpy().tobytes())
    return digest.hexdigest()
