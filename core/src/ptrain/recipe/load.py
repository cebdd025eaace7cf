"""`load_recipe`: a file -> a typed, frozen `Recipe` and the classes that it chose.

Text -> tree with positions -> names to offers -> only those are imported -> each section is checked by its
owner's `Config` -> every problem of every section at once. Needs no torch, no network, no process group.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from ptrain.catalog import Catalog, Offer
from ptrain.errors import PluginError, Position, Problem, RecipeError
from ptrain.local import UserCode, caller_classes, caller_code, load_code
from ptrain.recipe import env, spelling, tree
from ptrain.recipe import overrides as overriding
from ptrain.recipe.combined import combined_problems
from ptrain.recipe.deepspeed_keys import DeepSpeedConfig
from ptrain.recipe.document import Document, Place, from_mapping
from ptrain.recipe.elsewhere import keys_of
from ptrain.recipe.explain import Explainer
from ptrain.recipe.gather import Gathered, gather, refuse_taken_names
from ptrain.recipe.names import KINDS, LISTS, REQUIRED, SECTIONS, SINGLE, SOURCES, dotted, is_note
from ptrain.recipe.resolve import Resolver, Section
from ptrain.recipe.sections import Recipe, SourceConfig


@dataclass(frozen=True)
class Loaded:
    """A recipe that is right, and what it chose.

    Attributes:
        recipe: typed and frozen.
        trainer: the trainer's class; `model`, `tokenizer`, `optimizer`, `scheduler` likewise the part's.
        sources, eval_sources, checkpoint, evaluation, trackers: the part of each entry, in order.
        features: the class of each entry of `plugins`, by name, in order.
        origins: the offer that each of these classes came from.
        positions: where each key stands, by its place, e.g. `("optimizer", "learning_rate")`.
        warnings: what may go wrong later, and is no fault of the recipe alone.
        document: the recipe as it is written.
        user_code: the user's own code with its text and hash, if there is any.
    """

    recipe: Recipe
    trainer: Any
    model: Any
    tokenizer: Any
    optimizer: Any
    scheduler: Any
    sources: list[Any]
    eval_sources: list[Any]
    checkpoint: list[Any]
    evaluation: list[Any]
    trackers: list[Any]
    features: dict[str, Any]
    origins: dict[type, Offer]
    positions: dict[Place, Position]
    warnings: list[Problem]
    document: Document
    user_code: UserCode | None = None


def load_recipe(
    source: Path | str | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    catalog: Catalog | None = None,
    code: Path | None = None,
    allow_code: bool = False,
    plugins: Sequence[Any] = (),
) -> Loaded:
    """The recipe in a file (or in plain data), with `-o` overrides, validated.

    Args:
        source: the path of a YAML file, or data as `ptrain.recipe.dump.dump` makes it.
        overrides: `dotted.key=value`, applied in order.
        catalog: what is installed; by default looked up.
        code: the user's own code, to run as asked (it takes the place of the recipe's `code`).
        allow_code: whether `code` of the recipe may run.
        plugins: functions of the caller's own that are the top layer, instead of `code`.

    Raises:
        RecipeError: every problem of every section, sorted by line.
        PluginError: a package that the recipe names can't be used, or the user's code fails.
    """
    folder = Path() if isinstance(source, Mapping) else Path(source).parent
    loading = _Loading(_document(source, overrides), (catalog or Catalog.installed()).with_classes(caller_classes()))
    return loading.run(folder, code, allow_code, caller_code(plugins))


def _document(source: Path | str | Mapping[str, Any], given: Sequence[str]) -> Document:
    document = from_mapping(source) if isinstance(source, Mapping) else tree.read_file(Path(source))
    overriding.apply(document, given)
    return document


class _Loading:
    """One recipe on its way from a document to `Loaded`."""

    def __init__(self, document: Document, catalog: Catalog) -> None:
        self.document = document
        self.resolver = Resolver(document, catalog)
        self.explain = Explainer(document, self._related)
        self._refused: Problem | None = None

    def run(self, folder: Path, code: Path | None, allow_code: bool, caller: UserCode | None) -> Loaded:
        """Everything in order; raises all problems that were noted up to a point where no more can be found."""
        if caller is not None and (code is not None or "code" in self.document.data):
            raise RecipeError("both `code` and `plugins` are given", expected="one of them as the top layer")
        user = caller or self._user_code(folder, code, allow_code)
        name, trainer = self.resolver.trainer()
        if trainer is None:
            # The trainer may well be in the code that was not run: its absence is no second problem.
            self._fail([self._refused] if self._refused else self.resolver.problems)
        refuse_taken_names(trainer.Config.model_fields, self.resolver.origins[trainer])
        found = gather(self.resolver, name, trainer)
        for section in found.features.values():
            refuse_taken_names(spelling.top_level([section]), self.resolver.origins[section.owner])
        self.resolver.problems += spelling.move(found, self.document)
        self._note_keys(found)
        self._check_top(found)
        for section in found:
            self._validate(section, found)
        problems = [*self.resolver.problems, *self.explain.result()]
        if problems or self.resolver.broken:
            self._fail(problems)
        return self._loaded(_recipe(name, found, self.document), found, user)

    def _user_code(self, folder: Path, code: Path | None, allow_code: bool) -> UserCode | None:
        """The user's code, run; None where there is none, or where it may not run (a problem was noted)."""
        written, where = self.document.data.get("code"), self.document.value_position(("code",))
        if code is None and not isinstance(written, str):
            return None
        if code is None and not allow_code:
            message = f"the recipe wants to run the code `{written}`"
            self._refused = Problem(message, where, fix="read it, then add `--allow-code`")
            self.resolver.problems.append(self._refused)
            return None
        try:
            user = load_code(code if code is not None else folder / str(written))
        except RecipeError as error:
            raise RecipeError.of(replace(p, where=p.where or where) for p in error.problems) from None
        self.resolver.catalog = self.resolver.catalog.with_classes(user.classes)
        self.document.data["code"] = str(user.path)
        return user

    def _note_keys(self, found: Gathered) -> None:
        """Tell the explainer which keys may stand where."""
        for section in found:
            self.explain.knows(section.label, section.accepts, section.config)
        self.explain.knows("", SECTIONS | {"type"})
        self.explain.knows("plugins", self.resolver.catalog.names("plugin"))
        self.explain.knows("deepspeed", DeepSpeedConfig.model_fields, DeepSpeedConfig)
        for alias in found.own.config.aliases:
            label, dot, key = alias.rpartition(".")
            if dot:
                self.explain.knows(label, [key])

    def _check_top(self, found: Gathered) -> None:
        """Note top-level keys that nobody owns, and sections that are missing."""
        accepted = SECTIONS | {"type"} | found.core.accepts | found.own.accepts
        accepted |= spelling.top_level(found.features.values())
        for key in self.document.data:
            if key not in accepted and not is_note(key):
                self.explain.unknown("", key, (key,), accepted | keys_of(self.resolver.catalog.names("plugin")))
        for label in REQUIRED:
            if label not in self.document.data:
                self.explain.missing("", label, (), "keys with values")

    def _validate(self, section: Section, found: Gathered) -> None:
        """Make the typed config of `section`, or note what is wrong with it."""
        aliases, problems = spelling.settle(section, self.document)
        self.resolver.problems += problems
        data = {**section.data, "type": section.type} if section.type else dict(section.data)
        if section.label == "data":
            # Sources are judged one by one: here they only hold the place, also of what is wrong.
            for label in SOURCES:
                if data.get(label, []) != []:
                    data[label] = [one.value or _STAND_IN for one in found.lists[f"data.{label}"]] or [_STAND_IN]
        try:
            section.value = section.config.model_validate(data)
        except ValidationError as error:
            self.explain.section(section, error, aliases)

    def _fail(self, problems: list[Problem]) -> NoReturn:
        """Raise `problems` and what is wrong with plugins; a PluginError where it is that alone."""
        if problems:
            raise RecipeError.of([*problems, *self.resolver.broken])
        error = PluginError(self.resolver.broken[0].message)
        error.problems = self.resolver.broken
        raise error

    def _loaded(self, recipe: Recipe, found: Gathered, user: UserCode | None) -> Loaded:
        lists = {label: [one.owner for one in entries] for label, entries in found.lists.items()}
        return Loaded(
            recipe=recipe, trainer=found.own.owner,
            **{label: found.single[label].owner for label in SINGLE},
            **{label: lists.get(label, []) for label in LISTS},
            **{label: lists.get(f"data.{label}", []) for label in SOURCES},
            features={name: one.owner for name, one in found.features.items()},
            origins=self.resolver.origins, positions=self.document.keys, warnings=_warnings(self.document),
            document=self.document, user_code=user,
        )  # fmt: skip

    def _related(self, label: str) -> dict[str, set[str]]:
        """The keys of parts for section `label` that the recipe did not choose, by type; of its packages alone."""
        packages = {offer.distribution for offer in self.resolver.origins.values()}
        catalog, found = self.resolver.catalog, {}
        for offer in catalog.offers(KINDS.get(label, "")):
            if offer.distribution in packages and catalog.status(offer).state != "broken":
                found[offer.name] = set(catalog.load(offer).Config.model_fields)
        return found


def _recipe(name: str, found: Gathered, document: Document) -> Recipe:
    """The recipe, of sections that are all right."""
    values: dict[str, Any] = {"type": name, "trainer": found.own.value}
    values |= {key: getattr(found.core.value, key) for key in found.core.value.model_fields_set}
    values |= {label: one.value for label, one in found.single.items()}
    values |= {label: [one.value for one in found.lists[label]] for label in LISTS if label in found.lists}
    if found.features:
        values["plugins"] = {label: one.value for label, one in found.features.items()}
    if "deepspeed" in values:
        values["deepspeed"] = values["deepspeed"].model_dump(exclude_unset=True)
    recipe = Recipe.model_validate(values)
    owners = [one.owner for one in found.lists.get("checkpoint", [])]
    problems = combined_problems(recipe, owners, document)
    if problems:
        raise RecipeError.of(problems)
    return recipe


def _warnings(document: Document) -> list[Problem]:
    return [
        Problem(f"`{dotted(place)}` refers to the environment variable `{name}`, which is not set here",
                document.value_position(place), fix=f"export {name}=... before the run")
        for place, name in env.references(document.data)
        if name not in os.environ
    ]  # fmt: skip


_STAND_IN = SourceConfig()
"""In place of a source that has problems of its own, so that the rest of `data` is checked too."""
