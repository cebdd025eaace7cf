"""The JSON schema of recipes, put together section by section from what is installed; for editors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from ptrain.catalog import Catalog
from ptrain.recipe import sections
from ptrain.recipe.config import NOTE, Config
from ptrain.recipe.deepspeed_keys import DeepSpeedConfig
from ptrain.recipe.describe import sections_in
from ptrain.recipe.names import LISTS, REQUIRED, SINGLE, SOURCES
from ptrain.recipe.resolve import PARTS

Schema = dict[str, Any]

HUMAN_NUMBER = r"^\s*[+-]?[0-9._]+\s*([eE^]\s*[+-]?[0-9]+|%|[kmgtKMGT][iI]|[kmbtKMBT])?\s*$"
"""Text that stands for a number; `ptrain.recipe.numbers` decides in the end."""


def schema(catalog: Catalog) -> Schema:
    """The JSON schema (draft 2020-12) of the recipes that the packages in `catalog` understand.

    What can't be loaded is left out. A recipe that the schema refuses is refused by `load_recipe` too, except
    that the schema knows nothing of names that the user's own code registers.
    """
    building = _Building(catalog)
    trainers = building.classes("trainer")
    branches = [_when("type", name, building.recipe(name, trainer)) for name, trainer in trainers.items()]
    known = {
        "if": {"not": {"required": ["code"]}},
        "then": {"properties": {"type": _name_of(trainers)}},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of ptrain",
        "type": "object",
        "properties": {"type": {"type": "string", "description": "The trainer.", "examples": sorted(trainers)}},
        "required": ["type", *REQUIRED],
        "allOf": [known, *branches],
        "$defs": building.definitions,
    }


@dataclass
class _Building:
    """The definitions of a schema, while they are gathered."""

    catalog: Catalog
    definitions: dict[str, Schema] = field(default_factory=dict)

    def classes(self, kind: str) -> dict[str, Any]:
        """What can be used of one kind, by name; a name with two owners as `distribution:name` alone."""
        found = {}
        for offer in self.catalog.offers(kind):
            status = self.catalog.status(offer)
            name = offer.name if status.state == "ok" else f"{offer.distribution}:{offer.name}"
            if status.state != "broken":
                found[name] = self.catalog.load(offer)
        return found

    def recipe(self, name: str, trainer: Any) -> Schema:
        """All keys of a recipe for one trainer."""
        core, own = self.config("core", sections.CoreConfig), self.config(f"trainer.{name}", trainer.Config)
        defaults = {**PARTS, **trainer.parts}
        elsewhere = _spelt_elsewhere(trainer.Config, self._keys(own))
        parts = {
            label: self.part(kind, defaults.get(kind), name, elsewhere.get(label, {})) for label, kind in SINGLE.items()
        }
        lists = {label: self.list_of(self.part(kind, defaults.get(kind))) for label, kind in LISTS.items()}
        plain: Mapping[str, type[Config]] = {
            "logger": sections.LoggerConfig, "wandb": sections.WandbConfig, "deepspeed": DeepSpeedConfig,
        }  # fmt: skip
        fixed = {label: {"$ref": self.config(label, config)} for label, config in plain.items()}
        own_keys = {**self._keys(core), **self._keys(own), **parts, **lists, **fixed}
        data = {"data": self.data(name, trainer, defaults.get("source")), "plugins": self.plugins()}
        keys = {"type": True, **self.top_level(), **own_keys, **data}
        return self._closed({"properties": keys, "required": self._required(own)})

    def _keys(self, reference: str) -> Schema:
        return self.definitions[reference.removeprefix("#/$defs/")]["properties"]

    def _required(self, reference: str) -> list[str]:
        return self.definitions[reference.removeprefix("#/$defs/")].get("required", [])

    def data(self, name: str, trainer: Any, default: str | None) -> Schema:
        """The `data` section of one trainer."""
        reference = self.config(f"data.{name}", trainer.Data)
        keys = self._keys(reference)
        source = self.list_of(self.part("source", default))
        for label in SOURCES:
            keys[label] = {**source, "description": keys[label].get("description", "")}
        again = [name, name.rpartition(":")[2], "", None]
        keys["type"] = {"enum": list(dict.fromkeys(again)), "description": "The trainer again, if anything."}
        return {"$ref": reference}

    def plugins(self) -> Schema:
        """The `plugins` section: each feature under its name."""
        known = {
            name: {"anyOf": [{"$ref": self.config(f"plugin.{name}", feature.Config)}, {"type": "null"}]}
            for name, feature in self.classes("plugin").items()
        }
        return self._closed({"type": "object", "properties": known, "description": "Features, in order."})

    def top_level(self) -> Schema:
        """The keys of features that may stand at the top level."""
        found = {}
        for feature, cls in self.classes("plugin").items():
            keys = self._keys(self.config(f"plugin.{feature}", cls.Config))
            for key, one in _spelt_elsewhere(cls.Config, keys).get("", {}).items():
                found[key] = {**one, "description": f"The same as `plugins.{feature}.{cls.Config.aliases['.' + key]}`."}
        return found

    def list_of(self, entry: Schema) -> Schema:
        """A list of parts; text stands for one, and one may stand without the list."""
        entries = {"anyOf": [{"type": "string"}, entry]}
        return {"anyOf": [{"type": "array", "items": entries}, *entries["anyOf"]]}

    def part(self, kind: str, default: str | None, trainer: str = "", more: Schema | None = None) -> Schema:
        """A section that is one part: its keys follow from `type`, or from the default.

        Args:
            more: keys of the trainer `trainer` that may stand here too.
        """
        classes = self.classes(kind)
        references = {name: self.config(f"{kind}.{name}", one.Config) for name, one in classes.items()}
        if more:
            references = {name: self._widened(one, trainer, more) for name, one in references.items()}
        branches = [_when("type", name, {"$ref": reference}) for name, reference in references.items()]
        if default in references:
            absent = {"not": {"required": ["type"]}}
            branches.append({"if": absent, "then": {"$ref": references[default]}})
        else:
            branches.append({"required": ["type"]})
        return {"type": "object", "properties": {"type": _name_of(classes)}, "allOf": branches}

    def _widened(self, reference: str, trainer: str, more: Schema) -> str:
        plain = self.definitions[reference.removeprefix("#/$defs/")]
        self.definitions[f"{reference.removeprefix('#/$defs/')}.{trainer}"] = {
            **plain, "properties": {**plain["properties"], **more},
        }  # fmt: skip
        return f"{reference}.{trainer}"

    def config(self, label: str, config: type[BaseModel]) -> str:
        """A reference to the definition of a typed section, made where it is not there yet."""
        reference = f"#/$defs/{label}"
        if label not in self.definitions:
            made = config.model_json_schema(ref_template=reference + ".{model}")
            within = {one.__name__: one for one in _within(config)}
            for name, inner in made.pop("$defs", {}).items():
                self.definitions[f"{label}.{name}"] = _with_aliases(self._readable(inner), within.get(name))
            self.definitions[label] = _with_aliases(self._readable(made), config)
        return reference

    def _readable(self, made: Schema) -> Schema:
        """A schema of pydantic's, in which notes and human numbers may stand."""
        if "properties" in made:
            made["properties"] = {name: _human(one) for name, one in made["properties"].items()}
            return self._closed(made)
        return made

    def _closed(self, made: Schema) -> Schema:
        return {**made, "additionalProperties": False, "patternProperties": {f"^{NOTE}": True}}


def _name_of(known: Iterable[str]) -> Schema:
    """One of the known names, or one with its distribution."""
    return {"anyOf": [{"enum": sorted(known)}, {"type": "string", "pattern": ":"}]}


def _when(key: str, value: str, then: Schema) -> Schema:
    return {"if": {"properties": {key: {"const": value}}, "required": [key]}, "then": then}


def _human(made: Any) -> Any:
    """A schema in which a number may also be written as `200k`."""
    if isinstance(made, list):
        return [_human(one) for one in made]
    if not isinstance(made, dict):
        return made
    if made.get("type") in ("integer", "number"):
        about = {key: made[key] for key in ("description", "default", "title") if key in made}
        number = {key: value for key, value in made.items() if key not in about}
        return {**about, "anyOf": [number, {"type": "string", "pattern": HUMAN_NUMBER}]}
    return {key: value if key in ("default", "enum") else _human(value) for key, value in made.items()}


def _within(config: type[BaseModel]) -> set[type[BaseModel]]:
    """The sections within a section, at any depth."""
    found: set[type[BaseModel]] = set()
    for info in config.model_fields.values():
        for one in sections_in(info.annotation):
            found |= {one, *_within(one)}
    return found


def _spelt_elsewhere(config: type[Config], keys: Schema) -> dict[str, Schema]:
    """By section, the keys of a trainer that may stand there too, with their schemas."""
    found: dict[str, Schema] = {}
    for alias, name in config.aliases.items():
        section, dot, key = alias.rpartition(".")
        if dot:
            found.setdefault(section, {})[key] = {**keys[name], "description": f"The same as `{name}` of the recipe."}
    return found


def _with_aliases(made: Schema, config: type[BaseModel] | None) -> Schema:
    """A schema with the other spellings of keys."""
    aliases: Mapping[str, str] = getattr(config, "aliases", {})
    spelt: Iterable[tuple[str, str]] = [(alias, name) for alias, name in aliases.items() if "." not in alias]
    for alias, name in spelt:
        made["properties"][alias] = {**made["properties"][name], "description": f"The same as `{name}`."}
        if name in made.get("required", []):
            made["required"].remove(name)
            made.setdefault("allOf", []).append({"anyOf": [{"required": [name]}, {"required": [alias]}]})
    return made
