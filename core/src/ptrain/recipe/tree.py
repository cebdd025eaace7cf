"""YAML text -> `Document`. Every fault of the text is a RecipeError with file, line and column."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ptrain.errors import Position, Problem, RecipeError
from ptrain.recipe.document import Document
from ptrain.recipe.nodes import Reading, position
from ptrain.recipe.suggest import closest
from ptrain.recipe.yaml12 import compose


def read_file(path: Path) -> Document:
    """The document in a file.

    Raises:
        RecipeError: there is no such file, it is no text, or `read` refuses the text.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise RecipeError(
            f"there is no recipe `{path}`", expected="the path of a YAML file", fix=_similar(path)
        ) from None
    except IsADirectoryError:
        raise RecipeError(f"`{path}` is a folder", expected="a recipe: a YAML file") from None
    except OSError as error:
        raise RecipeError(f"the recipe `{path}` can't be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = _at(raw[: error.start].decode("utf-8", "replace"), str(path))
        byte = raw[error.start]
        raise RecipeError(f"the byte 0x{byte:02x} is not UTF-8", where=where, expected="UTF-8") from None
    return read(text, str(path))


def _similar(path: Path) -> str | None:
    """The advice to take a recipe of nearly the same name in the same folder."""
    known = [other.name for ending in ("yaml", "yml") for other in path.parent.glob(f"*.{ending}")]
    guess = closest(path.name, known)
    return f"write `{path.with_name(guess)}`" if guess else None


def read(text: str, file: str = "recipe") -> Document:
    """The document in `text`, which is called `file` in messages.

    Raises:
        RecipeError: what is no YAML, a key given twice, an anchor within itself, no mapping at the top, ...
    """
    node = _composed(text, file)
    document = Document({}, file=file, text=text)
    if node is None:
        expected = "at least `type`, `model` and `data`"
        raise RecipeError("the recipe is empty", where=Position(file), expected=expected)
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise RecipeError(f"the recipe is {kind}", where=position(node, file), expected="keys: `type: ...`, ...")
    reading = Reading(document)
    document.data = reading.value(node, ())
    if reading.problems:
        raise RecipeError.of(reading.problems)
    return document


def read_value(text: str, file: str) -> Any:
    """The plain data that one YAML value means.

    Raises:
        RecipeError: it is no YAML; the position is `file` alone.
    """
    try:
        node = _composed(text, file)
        reading = Reading(Document({}))
        value = None if node is None else reading.value(node, ())
        if reading.problems:
            raise RecipeError.of(reading.problems)
    except RecipeError as error:
        raise RecipeError.of(replace(problem, where=Position(file)) for problem in error.problems) from None
    return value


def _composed(text: str, file: str) -> yaml.Node | None:
    try:
        return compose(text)
    except yaml.reader.ReaderError as error:
        message = f"the character U+{error.character:04X} is not allowed in YAML"
        raise RecipeError(message, where=_at(text[: error.position], file)) from None
    except yaml.MarkedYAMLError as error:
        raise RecipeError.of([_syntax_problem(error, file, text)]) from None
    except RecursionError:
        raise RecipeError("the recipe is nested too deeply", where=Position(file)) from None


def _at(before: str, file: str) -> Position:
    """The position right after the text `before`."""
    return Position(file, before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)


def _syntax_problem(error: yaml.MarkedYAMLError, file: str, text: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    where = Position(file, mark.line + 1, mark.column + 1) if mark else Position(file)
    message = error.problem or error.context or "it can't be read"
    if "single document" in (error.context or ""):
        fix = "remove `---` and what follows"
        return Problem("a second document begins here", where, "one recipe in a file", fix)
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "'\\t'" in message or "\t" in line[: len(line) - len(line.lstrip())]:
        return Problem("a tab stands in the indentation", where, "spaces", "indent with spaces")
    if error.context_mark and "simple key" in (error.context or ""):
        # It is noticed where the next line begins.
        where = Position(file, error.context_mark.line + 1, error.context_mark.column + 1)
        return Problem("this is no YAML: a key without a `:`", where, "`key: value`")
    return Problem(f"this is no YAML: {message}", where, fix=_syntax_fix(error, message, text))


def _syntax_fix(error: yaml.MarkedYAMLError, message: str, text: str) -> str | None:
    """The likely remedy, where what PyYAML says points to one."""
    context, begins = error.context or "", error.context_mark
    if message.startswith("mapping values"):
        return "indent keys of one section equally, and put text that holds `: ` in quotes"
    unfinished = "end of stream" in message or "<stream end>" in message
    if unfinished or context.startswith("while parsing a flow"):
        opened = text.split("\n")[begins.line][begins.column :][:1] if begins else ""
        if begins and opened in ("[", "{", "'", '"'):
            return f"close the `{opened}` of line {begins.line + 1}"
        return "close every bracket and quote" if unfinished else None
    if message.startswith("expected <block end>"):
        return "indent keys of one section, and entries of one list, equally"
    return "put text with special characters in quotes" if "character" in message else None
