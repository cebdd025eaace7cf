"""Every check of the kit finds a defect that was planted, in a package that is really installed, and says whose it is."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ptrain.testing.checks import ALL, FAILED, LEFT_OUT, OK, applicable
from ptrain.testing.study import Study

POINTS = {
    "trainer": [
        "WrongArgument", "Undocumented", "Untyped", "Open", "Percent", "Nan", "Careless", "MeanOfMicroBatch", "RowsByHand",
        "Forgets", "Remembers", "Needy",
    ],
    "plugin": ["Noise", "Steady"],
    "source": ["SizeAlone", "OfThisProcess", "NoJson", "RawError", "Listed", "Broken"],
    "tokenizer": ["Unsaved"],
    "optimizer": ["Everything"],
    "scheduler": ["Negative", "Counting", "OtherMethod"],
    "checkpoint": ["Empty", "Alone", "Half"],
    "tracker": ["Fails"],
    "evaluator": ["MeanOfWorkers"],
}  # fmt: skip
FOUND = [
    ("trainer", "WrongArgument", "hooks", "has no argument `batches`.*expected: some of run, batch"),
    ("trainer", "Undocumented", "config", r"`Undocumented.Config.factor` is not documented.*a docstring"),
    ("trainer", "Untyped", "config", r"`Untyped.Config.factor` has no type.*expected: an annotation"),
    ("trainer", "Open", "config", "`extra='allow'`.*expected: `extra='forbid'`"),
    ("trainer", "Percent", "config", "another after it was written and read: `share`: 0.5 -> 0.005.*the same values"),
    ("trainer", "Nan", "trains", "the loss of step 1 is nan"),
    ("trainer", "Careless", "fields", "nothing reads the key `unused` of `Careless.Config`.*expected: code that acts"),
    ("trainer", "Careless", "stages", r"`loss` makes logits itself \(`matmul`\).*token_logprobs"),
    ("trainer", "Careless", "errors", "an error within `loss` does not come out.*expected: an error that names"),
    ("trainer", "Careless", "resume", "`loss` of step 4 is .* after a resume.*expected: .* bit for bit"),
    ("trainer", "MeanOfMicroBatch", "batch", "`loss` of step 1 is .* with 1 x 4 on 1 worker.*expected: "),
    ("trainer", "RowsByHand", "batch", OK),
    ("trainer", "RowsByHand", "shards", "`loss` of step 1 is .* where sequences are cut over 2 workers.*sequence_sum"),
    ("trainer", "Forgets", "preparation", "`self.rows` is set while data is prepared.*prepared rows"),
    ("trainer", "Remembers", "preparation", "`loss` of step 1 is .* prepared in the process that trains.*expected: "),
    ("trainer", "Needy", "config", "the tiny recipe with it is refused: .*`factor` is missing.*give the check the keys"),
    ("trainer", "Needy", "trains", LEFT_OUT),
    ("plugin", "Noise", "resume", "`loss` of step 4 is .* after a resume.*expected: .* bit for bit"),
    ("source", "SizeAlone", "source", "before and after the content of `path` changes.*expected: another one"),
    ("source", "OfThisProcess", "source", "in another process.*expected: the same for the same rows"),
    ("source", "NoJson", "source", "not JSON serializable.*expected: values for JSON"),
    ("source", "RawError", "source", "Error is raised where the file of `path` is (broken|missing).*expected: DataError"),
    ("source", "Listed", "source", "`load` returns list.*expected: a `datasets.Dataset`"),
    ("source", "Broken", "source", r"KeyError: 'nothing'\n  in .*planted_plugins.py:\d+ \(fingerprint\)"),
    ("tokenizer", "Unsaved", "tokenizer", r"where it was saved and read.*expected: \["),
    ("optimizer", "Everything", "parameters", "has the parameter `model.embed_tokens.weight` 1 times.*expected: 0"),
    ("scheduler", "Negative", "rates", "the learning rate of step 5 is -.*expected: a number of at least 0"),
    ("scheduler", "Counting", "rates", "after its state was loaded.*expected: 0"),
    ("scheduler", "OtherMethod", "hooks", "can't be called: too many positional.*optimizer, total_steps"),
    ("checkpoint", "Empty", "trains", "no worker wrote a file.*expected: training to go through"),
    ("checkpoint", "Alone", "workers", "a worker fails: .*one worker alone.*expected: training to go through"),
    ("checkpoint", "Half", "resume", "of step 5 is .* after a resume.*expected: "),
    ("tracker", "Fails", "records", "the tracker `Fails` failed .nobody listens.*expected: no exception"),
    ("evaluator", "MeanOfWorkers", "merges", "`eval/loss` is .* on 2 workers.*expected: .*, as on 1"),
]  # fmt: skip


def install(site: Path, name: str, module: str, points: str) -> None:
    """Put a distribution with entry points beside its module."""
    info = site / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(points)
    assert (site / f"{module}.py").exists()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package with plugins that have defects, on the path of this process and of those that it starts."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(Path(__file__).with_name("planted.py"), site / "planted_plugins.py")
    lines = [
        line
        for kind, names in POINTS.items()
        for line in (f"[ptrain.{kind}]", *(f"{name} = planted_plugins:{name}" for name in names))
    ]
    install(site, "ptrain-planted", "planted_plugins", "\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
        yield site
    sys.modules.pop("planted_plugins", None)


@pytest.fixture(scope="module")
def study(planted: Path, ptrain_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The study of a plugin, which several checks share."""
    made: dict[tuple[str, str], Study] = {}

    def of(kind: str, name: str) -> Study:
        if (kind, name) not in made:
            made[kind, name] = Study(kind, name, None, tmp_path_factory.mktemp(name), ptrain_model)
        return made[kind, name]

    return of


@pytest.mark.parametrize(("kind", "name", "check", "message"), FOUND, ids=[f"{n}-{c}" for _, n, c, _ in FOUND])
def test_a_planted_defect_is_found(kind: str, name: str, check: str, message: str, study: Any) -> None:
    outcome = next(one for one in ALL if one.name == check).outcome(study(kind, name))
    if message in (OK, LEFT_OUT):
        assert outcome.state == message, outcome
        return
    assert outcome.state == FAILED
    assert name in outcome.reason and "ptrain-planted 1.2" in outcome.reason

    assert re.search(message, outcome.reason, re.DOTALL), outcome.reason


@pytest.mark.parametrize("check", applicable("plugin"), ids=lambda check: check.name)
def test_nothing_is_found_where_nothing_is_wrong(check: Any, study: Any) -> None:
    outcome = check.outcome(study("plugin", "Steady"))
    assert outcome.state == OK, outcome.reason


def test_a_package_that_is_imported_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ptrain_model: Path
) -> None:
    """Code that Python runs at its start imports a plugin, and the plugin imports torch."""
    (tmp_path / "early_plugins.py").write_text(
        "import torch, ptrain\nclass Early(ptrain.Scheduler):\n    create = torch.optim.lr_scheduler.LambdaLR\n"
    )
    (tmp_path / "sitecustomize.py").write_text("import early_plugins\n")
    install(tmp_path, "ptrain-early", "early_plugins", "[ptrain.scheduler]\nearly = early_plugins:Early\n")
    monkeypatch.syspath_prepend(tmp_path)
    study = Study("scheduler", "early", None, tmp_path, ptrain_model)
    found = {check.name: check.outcome(study).reason for check in ALL if check.name in ("discovery", "imports")}
    assert re.match(r"scheduler `early` \(ptrain-early 1.2\): `early_plugins` is imported when", found["discovery"])
    assert "expected: no import yet" in found["discovery"]
    assert re.match(r"scheduler `early` \(ptrain-early 1.2\): importing .* imports torch\n", found["imports"])
    assert "expected: none of torch, transformers, datasets, deepspeed" in found["imports"]


def test_every_check_has_a_defect() -> None:
    assert {check.name for check in ALL} == {check for _, _, check, _ in FOUND} | {"discovery", "imports"}
