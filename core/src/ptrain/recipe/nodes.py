"""Nodes of YAML -> plain data. Positions are noted, and everything that is wrong is gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from ptrain.errors import Position, Problem, RecipeError
from ptrain.recipe.document import Document, Place
from ptrain.recipe.yaml12 import TAG

MOST_VALUES = 100_000
"""A recipe that unfolds to more values than this is a trap made of anchors."""
NO_TAGS = "plain YAML without tags"


def position(node: yaml.Node, file: str) -> Position:
    """Where a node begins."""
    return Position(file, node.start_mark.line + 1, node.start_mark.column + 1)


@dataclass
class Reading:
    """One pass over the nodes of `document`.

    Attributes:
        problems: what is wrong, so far.
    """

    document: Document
    problems: list[Problem] = field(default_factory=list)
    _open: list[yaml.Node] = field(default_factory=list)
    _count: int = 0

    def value(self, node: yaml.Node, place: Place) -> Any:
        """The data of `node`, which stands at `place`; None where a problem was noted."""
        self._count += 1
        if self._count > MOST_VALUES:
            raise RecipeError(f"the anchors unfold to more than {MOST_VALUES} values", where=self._where(node))
        self.document.values[place] = self._where(node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if any(node is outer for outer in self._open):
            return self._wrong(node, "this anchor contains itself")
        if node.tag not in (TAG + "map", TAG + "seq"):
            return self._wrong(node, f"the tag `{_short(node.tag)}` means nothing here", NO_TAGS)
        self._open.append(node)
        try:
            return self._mapping(node, place) if node.tag == TAG + "map" else self._list(node, place)
        finally:
            self._open.pop()

    def _list(self, node: yaml.Node, place: Place) -> list[Any]:
        if not isinstance(node, yaml.SequenceNode):
            return self._wrong(node, "this is no list, although its tag says so", NO_TAGS) or []
        for index, item in enumerate(node.value):
            self.document.keys[(*place, index)] = self._where(item)
        return [self.value(item, (*place, index)) for index, item in enumerate(node.value)]

    def _mapping(self, node: yaml.Node, place: Place) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            return self._wrong(node, "these are no keys with values, although the tag says so", NO_TAGS) or {}
        found: dict[str, Any] = {}
        for key, key_node, value_node in self._pairs(node):
            here = (*place, key)
            if key in found:
                self._given_twice(key, self.document.keys[here], key_node)
                continue
            self.document.keys[here] = self._where(key_node)
            found[key] = self.value(value_node, here)
        for merged in (value for key, value in node.value if key.tag == TAG + "merge"):
            self._merge(merged, place, found)
        return found

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Keys with values, without `<<`. A number as a key counts as text, since JSON knows no other keys."""
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag in (TAG + "str", TAG + "int", TAG + "float"):
                yield str(self._scalar(key) if key.tag == TAG + "str" else key.value), key, value
            elif key.tag != TAG + "merge":
                shown = f"`{key.value}`" if isinstance(key, yaml.ScalarNode) else "this"
                self._wrong(key, f"{shown} is no key", "text")

    def _given_twice(self, key: str, first: Position, node: yaml.Node) -> None:
        where = self._where(node)
        lines = f"lines {first.line} and {where.line}" if first.line < where.line else f"on line {where.line}"
        self.problems.append(Problem(f"`{key}` is given twice, {lines}", where, fix="keep one"))

    def _merge(self, node: yaml.Node, place: Place, found: dict[str, Any]) -> None:
        """Add what `<<` brings to `found`; what is there already stays."""
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(source, yaml.MappingNode):
                self._wrong(source, "`<<` takes a mapping", "an alias of one: `<<: *defaults`")
                continue
            aside = Reading(Document({}, file=self.document.file), self.problems, self._open, self._count)
            brought = aside.value(source, place) or {}
            self._count = aside._count
            for key in brought.keys() - found.keys():
                self._adopt(aside.document, (*place, key))
            found.update({key: value for key, value in brought.items() if key not in found})

    def _adopt(self, other: Document, place: Place) -> None:
        """Take over the positions of everything at and under `place`."""
        for mine, theirs in ((self.document.keys, other.keys), (self.document.values, other.values)):
            mine.update({one: where for one, where in theirs.items() if one[: len(place)] == place})

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        read = _SCALARS.get(node.tag)
        if read is None:
            return self._wrong(node, f"the tag `{_short(node.tag)}` means nothing here", NO_TAGS)
        try:
            return read(node.value)
        except (ValueError, KeyError):
            return self._wrong(node, f"{node.value[:60]!r} does not fit its tag `{_short(node.tag)}`")

    def _wrong(self, node: yaml.Node, message: str, expected: str | None = None) -> None:
        self.problems.append(Problem(message, self._where(node), expected))

    def _where(self, node: yaml.Node) -> Position:
        return position(node, self.document.file)


def _short(tag: str) -> str:
    return "!!" + tag.removeprefix(TAG) if tag.startswith(TAG) else tag


def _integer(text: str) -> int:
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _text(text: str) -> str:
    """`text`, in which two escapes of JSON that stand for one character (`"\\ud83d\\ude00"`) are one.

    Raises:
        ValueError: half of such a pair stands alone.
    """
    if text.isascii() or not any("\ud800" <= one <= "\udfff" for one in text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


_SCALARS: dict[str, Callable[[str], Any]] = {
    TAG + "null": lambda text: None,
    TAG + "bool": lambda text: {"true": True, "false": False}[text.lower()],
    TAG + "int": _integer,
    TAG + "float": _float,
    TAG + "str": _text,
    TAG + "merge": str,
}
