"""The fixtures of the kit; pytest finds them by itself. Loading this imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ptrain.testing.recipes import Material

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptrain.testing.finished import Finished


@pytest.fixture(scope="session")
def ptrain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama with a tokenizer that was trained for it."""
    from ptrain.testing.model import make_model

    return make_model(tmp_path_factory.mktemp("ptrain-model"))


@pytest.fixture(scope="session")
def ptrain_tokenizer(ptrain_model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `ptrain_model`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ptrain_model)


@pytest.fixture(scope="session")
def ptrain_material(ptrain_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """What `ptrain_data` and `ptrain_recipe` are made of."""
    return Material(tmp_path_factory.mktemp("ptrain-material"), ptrain_model)


@pytest.fixture(scope="session")
def ptrain_data(ptrain_material: Material) -> Callable[[str], Path]:
    """A file of ragged rows, by shape: "conversations", "instructions", "text", "preferences" or "pairs"."""
    return ptrain_material.data


@pytest.fixture(scope="session")
def ptrain_recipe(ptrain_material: Material) -> Callable[..., dict[str, Any]]:
    """A recipe of a few fast steps: `ptrain_recipe("sft", optimizer={"lr": 1e-2})`.

    For a trainer of your own, `rows` says the shape of its rows: `ptrain_recipe("mine", rows="preferences")`.
    """
    return ptrain_material.recipe


@pytest.fixture
def ptrain_run(tmp_path: Path) -> Callable[..., Finished]:
    """Runs a recipe: `ptrain_run(recipe, workers=2)` prepares it here, and trains it in two processes of their own.

    With `resume=True` the run before goes on, with this recipe. `code` is a file of user code.
    """
    folders: list[Path] = []

    def run(recipe: Mapping[str, Any], *, workers: int = 1, resume: bool = False, code: Path | None = None) -> Finished:
        from ptrain.testing import runs

        if resume and not folders:
            raise ValueError("there is no run before that could be gone on with")
        if not resume:
            folders.append(tmp_path / f"ptrain-run-{len(folders)}")
        return runs.run(recipe, folders[-1], workers=workers, resume=resume, code=code)

    return run
