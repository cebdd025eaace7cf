"""Checks of single kinds of part."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from ptrain.errors import DataError, PtrainError
from ptrain.testing.checks.trained import TOLERANCE
from ptrain.testing.rows import SHAPES
from ptrain.testing.study import STEPS

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from ptrain.run import Run
    from ptrain.testing.study import Study


def _run(study: Study) -> Run:
    """A run of the recipe that is not begun."""
    from ptrain.run import Run

    study.ready()
    return Run(study.loaded, study.folder / "not-begun")


def source(study: Study) -> None:
    """`load` gives rows, `fingerprint` stands for them, and what can't be read is a `DataError`.

    Prepared data is found in the cache by the fingerprint: one that differs from process to process prepares it each
    time, one that stays the same when a file changes trains on what was in it before.
    """
    from datasets import Dataset

    run = _run(study)
    part = next(one for one in run.parts.sources if isinstance(one, study.cls))
    rows = part.load(run, "train")
    if not isinstance(rows, Dataset) or not len(rows):
        raise study.wrong(f"`load` returns {type(rows).__name__}", expected="a `datasets.Dataset` with rows")
    _check_fingerprint(study, part.config)
    for name, file in _files(part.config):
        _check_file(study, run, part.config, name, file)


def _check_fingerprint(study: Study, config: Any) -> None:
    from ptrain.testing.jobs import write_fingerprint
    from ptrain.testing.workers import run_workers

    found = study.cls(config).fingerprint()
    try:
        text = json.dumps(found)
    except TypeError as error:
        raise study.wrong(f"`fingerprint` returns {found!r}: {error}", expected="values for JSON") from None
    file = study.folder / "fingerprint.json"
    run_workers(write_fingerprint, study.kind, study.name, config.model_dump(), file, log=file.with_suffix(".txt"))
    other = file.read_text(encoding="utf-8")
    if other != text:
        raise study.wrong(
            f"`fingerprint` is {text[:200]}, and {other[:200]} in another process",
            expected="the same for the same rows",
        )


def _files(config: Any) -> Iterator[tuple[str, Path]]:
    """The keys whose values are files that are there."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, (str, Path)) and str(value) and Path(value).is_file():
            yield name, Path(value)


def _check_file(study: Study, run: Run, config: Any, name: str, file: Path) -> None:
    """What happens where the file that `name` says is another, is broken, or is gone."""
    prints = []
    for folder, content in (("before", file.read_bytes()), ("after", file.read_bytes()[::-1])):
        path = study.folder / folder / file.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        prints.append(study.cls(_with(config, name, path)).fingerprint())
    if prints[0] == prints[1]:
        raise study.wrong(
            f"`fingerprint` is {prints[0]!r} before and after the content of `{name}` changes", expected="another one",
            fix="hash the file: `ptrain.data.sources.base.content_hashes`",
        )  # fmt: skip
    for what, path in (("is broken", study.folder / "after" / file.name), ("is missing", study.folder / "none.jsonl")):
        try:
            study.cls(_with(config, name, path)).load(run, "train")
        except PtrainError as error:
            if isinstance(error, DataError):
                continue
            found: Any = error
        except Exception as error:
            found = error
        else:
            found = None
            if what == "is broken":
                continue  # any bytes may be rows for a source
        told = "nothing is raised" if found is None else f"{type(found).__name__} is raised"
        raise study.wrong(f"{told} where the file of `{name}` {what}", expected="DataError, which names the file")


def _with(config: Any, name: str, value: Path) -> Any:
    return config.model_copy(update={name: type(getattr(config, name))(value)})


def tokenizer(study: Study) -> None:
    """The tokenizer that workers read from the cache is the one that `create` made: same tokens, same template.

    It is saved with the prepared data and with every export; what is not saved with it is lost there.
    """
    from ptrain.job import prepare_data
    from ptrain.recipe.load import load_recipe
    from ptrain.testing.recipes import merged

    made: list[Any] = []
    create = study.cls.create

    def kept(part: Any, run: Run) -> Any:
        made.append(create(part, run))
        return made[-1]

    recipe = merged(study.recipe, {"data": {"cache_dir": str(study.folder / "tokenizer")}})
    with patch.object(study.cls, "create", kept):
        run, _ = prepare_data(load_recipe(recipe), study.folder / "not-begun")
    for row in SHAPES["text"](5):
        tokens, again = made[-1](row["text"])["input_ids"], run.tokenizer(row["text"])["input_ids"]
        if tokens != again:
            raise study.wrong(f"{row['text']!r} is {again} where it was saved and read", expected=f"{tokens}")
    if made[-1].chat_template != run.tokenizer.chat_template:
        raise study.wrong("its chat template is another where it was saved and read", expected="the same")


def rates(study: Study) -> None:
    """Learning rates are numbers of at least 0, and the schedule goes on from its saved state as if nothing was."""
    optimizer, schedule = _schedule(study)
    found, saved = [], (optimizer.state_dict(), schedule.state_dict())
    for step in range(STEPS + 1):
        found.append(schedule.get_last_lr()[0])
        if not (math.isfinite(found[-1]) and found[-1] >= 0):
            raise study.wrong(f"the learning rate of step {step + 1} is {found[-1]}", expected="a number of at least 0")
        if step == STEPS // 2:
            saved = json.loads(json.dumps([optimizer.state_dict(), schedule.state_dict()], default=_plain))
        optimizer.step()
        schedule.step()
    optimizer, schedule = _schedule(study)
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    for step in range(STEPS // 2, STEPS + 1):
        rate = schedule.get_last_lr()[0]
        if rate != found[step]:
            raise study.wrong(
                f"the learning rate of step {step + 1} is {rate!r} after its state was loaded",
                expected=f"{found[step]!r}",
            )
        optimizer.step()
        schedule.step()


def _plain(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} is no value for JSON")


def _schedule(study: Study) -> tuple[Optimizer, LRScheduler]:
    import torch

    run = _run(study)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    return optimizer, run.parts.scheduler.create(run, optimizer, STEPS)


def parameters(study: Study) -> None:
    """It has every parameter that requires a gradient, once, and the recipe's learning rate."""
    import torch
    from transformers import AutoModelForCausalLM

    run = _run(study)
    run.device = torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(study.material.model)
    frozen = next(model.parameters()).requires_grad_(False)
    made = run.parts.optimizer.create(run, model)
    held = [id(parameter) for group in made.param_groups for parameter in group["params"]]
    for name, parameter in model.named_parameters():
        wanted = 0 if parameter is frozen else 1
        if held.count(id(parameter)) != wanted:
            raise study.wrong(f"it has the parameter `{name}` {held.count(id(parameter))} times", expected=f"{wanted}")


def records(study: Study) -> None:
    """It does not fail where a run starts, is resumed, logs or ends: who does is left out for the rest of the run."""
    for finished in (study.reference, study.resumed):
        failed = [line for line in finished.output.splitlines() if f"tracker `{study.cls.__name__}` failed" in line]
        if failed:
            raise study.wrong(failed[0].strip(), expected="no exception from a tracker")


MEASURED = ("seconds", "tokens_per_second", "speed_up")
"""The last part of the names of metrics that are times, or made of times: no two runs measure the same."""


def merges(study: Study) -> None:
    """Two workers measure what one does: sums and counts add up, and are divided once.

    Means of workers that have other numbers of rows would not.
    """
    alone, shared = study.reference, study.run("2-workers", workers=2, micro_batch_size=2)
    if not alone.evaluations:
        raise study.wrong("nothing was recorded", expected="metrics of the evaluation rows")
    one, two = alone.evaluations[0], shared.evaluations[0]
    for name, wanted in one.items():
        value = two.get(name)
        if name.rpartition("/")[2] in MEASURED and value is not None:
            continue
        if value is None or not abs(value - wanted) <= TOLERANCE * max(1.0, abs(wanted)):
            raise study.wrong(f"`{name}` is {value!r} on 2 workers", expected=f"{wanted!r}, as on 1")


def workers(study: Study) -> None:
    """Two workers save it as one does: each of them is asked, and what must be written once is rank 0's task."""
    study.run("2-workers", workers=2, micro_batch_size=2)
