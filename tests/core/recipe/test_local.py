"""The user's own code: run only when asked for, with siblings, registered names and clear failures."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ptrain
from ptrain import local
from ptrain.errors import PluginError, RecipeError
from ptrain.local import load_code, register
from ptrain.recipe.load import Loaded

pytestmark = pytest.mark.torch_free

Load = Callable[..., Loaded]

TRAINER = """\
import ptrain
from helper_of_code import WEIGHT

@ptrain.register("trainer", "my_custom_trainer")
class Mine(ptrain.Trainer):
    class Config(ptrain.Config):
        weight: float = WEIGHT
    parts = {"source": "named"}

@ptrain.register("scheduler", "mine")
@ptrain.register("scheduler", "also_mine")
class Schedule(ptrain.Scheduler):
    pass

@ptrain.callback("pre-loss")
def look(run, batch):
    pass
"""
RECIPE = "type: my_custom_trainer\ncode: own/train_mine.py\nmodel: {}\ndata: {sources: [a]}\nscheduler: {type: mine}\n"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave `sys.path`, `sys.modules` and what this process registers as they were."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(local, "_of_caller", {})
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A file of user code with a sibling."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "helper_of_code.py").write_text("WEIGHT = 0.25\n")
    (folder / "train_mine.py").write_text(TRAINER)
    return folder / "train_mine.py"


def test_never_unasked(load: Load, problems: Callable[..., list[str]], code: Path) -> None:
    code.write_text("raise RuntimeError('it ran')\n")
    assert problems(RECIPE) == [
        "2:7 the recipe wants to run the code `own/train_mine.py` |  | read it, then add `--allow-code`"
    ]
    found = problems("type: tiny\ncode: own/train_mine.py\nmodel: {}\ndata: {sources: [a]}\nsede: 1\n")
    assert [one[:3] for one in found] == ["2:7", "5:1"]


def test_with_leave(load: Load, code: Path) -> None:
    loaded = load(RECIPE, allow_code=True)
    assert loaded.trainer.__name__ == "Mine"
    assert loaded.recipe.trainer.model_dump() == {"weight": 0.25}
    assert loaded.recipe.code == code
    assert loaded.scheduler.__name__ == "Schedule"
    assert loaded.user_code is not None
    assert loaded.user_code.module is sys.modules["train_mine"]
    assert loaded.user_code.text == TRAINER
    assert loaded.user_code.sha256 == hashlib.sha256(TRAINER.encode()).hexdigest()
    offer = loaded.origins[loaded.trainer]
    assert (offer.distribution, offer.version) == ("train_mine.py", loaded.user_code.sha256[:12])


def test_the_argument_needs_no_leave_and_wins(load: Load, code: Path, tmp_path: Path) -> None:
    other = tmp_path / "other_code.py"
    other.write_text("import ptrain\nONE = 1\n")
    assert load(code=other).user_code is not None
    assert (
        load("type: tiny\ncode: own/train_mine.py\nmodel: {}\ndata: {sources: [a]}\n", code=other).recipe.code == other
    )


def test_names_count_for_one_load(load: Load, code: Path) -> None:
    load(RECIPE, allow_code=True)
    with pytest.raises(RecipeError, match="there is no trainer `my_custom_trainer`"):
        load(RECIPE.replace("code: own/train_mine.py\n", ""))


def test_an_edit_is_seen_by_the_next_load(load: Load, code: Path) -> None:
    load(RECIPE, allow_code=True)
    (code.parent / "helper_of_code.py").write_text("WEIGHT = 4.0  # changed\n")
    assert load(RECIPE, allow_code=True).recipe.trainer.model_dump() == {"weight": 4.0}


def test_files_of_one_name_in_two_folders(load: Load, code: Path, tmp_path: Path) -> None:
    load(RECIPE, allow_code=True)
    other = tmp_path / "two" / "train_mine.py"
    other.parent.mkdir()
    other.write_text("HERE = 2\n")
    user = load(code=other).user_code
    assert user is not None
    assert user.module.HERE == 2


def test_a_name_that_is_offered_too(load: Load, code: Path) -> None:
    code.write_text("import ptrain\n@ptrain.register('scheduler', 'wsd')\nclass S(ptrain.Scheduler): ...\n")
    text = "type: tiny\nmodel: {}\ndata: {sources: [a]}\nscheduler: {type: TYPE}\n"
    with pytest.raises(RecipeError, match=r"offered by ptrain-tiny 1.0 and train_mine.py"):
        load(text.replace("TYPE", "wsd"), code=code)
    assert load(text.replace("TYPE", "train_mine.py:wsd"), code=code).scheduler.__name__ == "S"


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("x = 1\nimport no_such_module_at_all\n", 2, "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("\n\ndef broken(:\n", 3, "SyntaxError"),
        ("def f():\n    raise ValueError('deep')\nf()\n", 2, "ValueError: deep"),
        ("import sys\nsys.exit(3)\n", 2, "SystemExit: 3"),
        ("import json\njson.loads('{')\n", 2, "JSONDecodeError"),
    ],
)
def test_failures_name_file_and_line(code: Path, text: str, line: int, told: str) -> None:
    code.write_text(text)
    with pytest.raises(PluginError) as caught:
        load_code(code)
    (problem,) = caught.value.problems
    assert problem.where is not None
    assert (problem.where.file, problem.where.line) == (str(code), line)
    assert f"the code `train_mine.py` fails: {told}" in problem.message
    assert "train_mine" not in sys.modules
    assert caught.value.exit_code == 2


def test_a_failing_sibling_is_named(code: Path) -> None:
    helper = code.parent / "helper_of_code.py"
    helper.write_text("\n1 / 0\n")
    with pytest.raises(PluginError) as caught:
        load_code(code)
    assert str(caught.value.problems[0].where) == f"{helper}:2:1"


def test_files_that_are_no_code(load: Load, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no code"):
        load_code(tmp_path / "absent.py")
    with pytest.raises(RecipeError, match="is no Python module"):
        load_code(tmp_path / "my-code.py")
    with pytest.raises(RecipeError, match="is no Python module"):
        load_code(tmp_path / "r.yaml")
    with pytest.raises(RecipeError) as caught:
        load(RECIPE, allow_code=True)
    assert str(caught.value.problems[0].where) == f"{tmp_path}/r.yaml:2:7"


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("")
    with pytest.raises(RecipeError, match="the module `json` is there already"):
        load_code(tmp_path / "json.py")
    import json

    assert json.loads("1") == 1


@pytest.mark.parametrize(("kind", "name"), [("nothing", "x"), ("trainer", "a:b"), ("trainer", "")])
def test_register_checks(kind: str, name: str) -> None:
    with pytest.raises(PluginError):
        register(kind, name)


def test_what_is_registered_is_checked(load: Load, code: Path) -> None:
    code.write_text("import ptrain\n@ptrain.register('trainer', 'my_custom_trainer')\nclass NoTrainer: ...\n")
    with pytest.raises(PluginError, match="a class that is none"):
        load(RECIPE, allow_code=True)
    code.write_text(
        "import ptrain\nfor _ in range(2):\n    ptrain.register('trainer', 'a')(type('T', (ptrain.Trainer,), {}))\n"
    )
    with pytest.raises(PluginError, match="registers the trainer `a` twice"):
        load_code(code)


def test_what_is_registered_outside_of_a_load_counts_for_all_that_follow(load: Load) -> None:
    class Mine(ptrain.Trainer):
        parts = {"source": "named"}

    assert ptrain.register("trainer", "mine")(Mine) is Mine
    for _ in range(2):
        assert load("type: mine\nmodel: {}\ndata: {sources: [a]}\n").trainer is Mine


def test_an_environment_in_the_folder_is_left_alone(code: Path) -> None:
    """Only the user's own modules are read anew, not packages of an environment that lies in the folder."""
    site = code.parent / "venv" / "site-packages"
    site.mkdir(parents=True)
    (site / "package_of_environment.py").write_text("")
    sys.path.append(str(site))
    code.write_text("import package_of_environment, helper_of_code\n")
    load_code(code)
    kept, helper = sys.modules["package_of_environment"], sys.modules["helper_of_code"]
    load_code(code)
    assert sys.modules["package_of_environment"] is kept
    assert sys.modules["helper_of_code"] is not helper


def test_a_child_process_finds_the_classes(code: Path, tmp_path: Path) -> None:
    """What is pickled by name can be found where the folder is on the path: `spawn` workers, for example."""
    code.write_text("def double(x):\n    return 2 * x\n")
    script: Any = (
        "import multiprocessing as mp; from pathlib import Path; from ptrain.local import load_code\n"
        "if __name__ == '__main__':\n"
        f"    module = load_code(Path({str(code)!r})).module\n"
        "    with mp.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(module.double, [21]))\n"
    )
    (tmp_path / "main.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, check=False)
    assert done.stdout == "[42]\n", done.stderr
