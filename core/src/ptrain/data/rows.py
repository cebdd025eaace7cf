"""The canonical form of rows: conversations as typed columns, with order, roles and tool calls kept.

A conversation column holds a list of messages with the keys of `MESSAGE`. What templates need as free-form data
(tool calls, tool schemas, unusual keys) is kept as JSON text: arrow would otherwise merge the arguments of all
calls into one struct and fill every row with nulls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptrain.recipe.suggest import closest

if TYPE_CHECKING:
    import pyarrow as pa

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
TEXT_KEYS = ("role", "content", "name", "tool_call_id", "reasoning_content")
KEYS = (*TEXT_KEYS, "tool_calls", "train", "extra")
REASONING = ("reasoning", "thinking")
"""Other names of `reasoning_content`."""
OTHER_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
"""What other formats call them: known for advice alone."""
CONVERSATIONS = ("messages", "prompt", "chosen", "rejected")
"""Columns that are conversations wherever they hold lists."""
TOOLS = "tools"
ORIGIN = "origin"
"""The column that says where a row came from: `file:line`, or `name:row`."""

Message = dict[str, Any]


class BadRow(ValueError):
    """A row is wrong: which field, what is in it, what was expected, and what was likely meant."""

    def __init__(self, field: str, got: str, expected: str, fix: str | None = None) -> None:
        super().__init__(f"`{field}` is {got}")
        self.field, self.got, self.expected, self.fix = field, got, expected, fix


def message_type() -> pa.DataType:
    """The arrow type of a conversation."""
    import pyarrow as pa

    fields = [(key, pa.bool_() if key == "train" else pa.string()) for key in KEYS]
    return pa.list_(pa.struct(fields))


def shown(value: Any) -> str:
    """A value as an error shows it."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 60 else value[:57] + "...", ensure_ascii=False)
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def canonical_row(row: Any) -> dict[str, Any]:
    """`row` with its conversations and tools in canonical form; other columns are left alone.

    Raises:
        BadRow: with the field.
    """
    if not isinstance(row, Mapping):
        raise BadRow("row", shown(row), "an object with columns")
    out = dict(row)
    for name in CONVERSATIONS:
        value = out.get(name)
        if (name == "messages" and name in out) or isinstance(value, list):
            out[name] = canonical_messages(value, name)
    if out.get(TOOLS) is not None:
        out[TOOLS] = canonical_tools(out[TOOLS])
    return out


def canonical_messages(value: Any, field: str = "messages") -> list[Message]:
    """A conversation in canonical form: each message has the keys of `KEYS` that it needs.

    Raises:
        BadRow: it is no list of messages, is empty, or has an unknown role or a value of the wrong type.
    """
    if not isinstance(value, (list, tuple)):
        raise BadRow(field, shown(value), "a list of messages")
    if not value:
        raise BadRow(field, "empty", "at least one message")
    return [_message(message, f"{field}[{index}]") for index, message in enumerate(value)]


def _message(message: Any, field: str) -> Message:
    if not isinstance(message, Mapping):
        raise BadRow(field, shown(message), "an object with `role` and `content`")
    given = {key: value for key, value in message.items() if value is not None}
    for name in REASONING:
        if name in given and "reasoning_content" not in given:
            given["reasoning_content"] = given.pop(name)
    role = given.get("role")
    if role not in ROLES:
        meant = OTHER_ROLES.get(role) or closest(role, ROLES) if isinstance(role, str) else None
        raise BadRow(f"{field}.role", shown(role), "one of " + ", ".join(ROLES), f"write `{meant}`" if meant else None)
    out: Message = {"role": role, "content": _content(given, field)}
    for key in TEXT_KEYS[2:]:
        if key in given:
            out[key] = _text(given[key], f"{field}.{key}")
    if given.get("tool_calls"):
        out["tool_calls"] = _tool_calls(given["tool_calls"], f"{field}.tool_calls")
    if "train" in given or "weight" in given:
        out["train"] = _train(given, field)
    rest = {key: value for key, value in given.items() if key not in KEYS and key != "weight"}
    if given.get("extra"):
        rest = {**_json(given["extra"], f"{field}.extra", dict), **rest}
    if rest:
        out["extra"] = json.dumps(rest, ensure_ascii=False, default=str)  # dates of Parquet files are no JSON
    return out


def _content(message: Mapping[str, Any], field: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and (message.get("tool_calls") or message.get("reasoning_content")):
        return ""
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        return "".join(part["text"] for part in content)
    expected = "text (or a list of parts that are all `{type: text, text: ...}`)"
    raise BadRow(f"{field}.content", shown(content), expected)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRow(field, shown(value), "text")
    return value


def _json(value: Any, field: str, kind: type) -> Any:
    """`value`, parsed where it is JSON text, if it is of `kind`."""
    expected = {list: "a list, or JSON text of one", dict: "an object, or JSON text of one"}[kind]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow(field, shown(value), expected) from None
    if not isinstance(value, kind):
        raise BadRow(field, shown(value), expected)
    return value


def _tool_calls(value: Any, field: str) -> str:
    calls = _json(value, field, list)
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"{field}[{index}]", shown(call), "an object with `function.name` and `function.arguments`")
    return json.dumps(calls, ensure_ascii=False)


def canonical_tools(value: Any) -> str:
    """Tool schemas as JSON text of a list of objects.

    Raises:
        BadRow: they are none.
    """
    tools = _json(value, TOOLS, list)
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise BadRow(f"{TOOLS}[{index}]", shown(tool), "an object that describes a function")
    return json.dumps(tools, ensure_ascii=False)


def _train(message: Mapping[str, Any], field: str) -> bool:
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise BadRow(f"{field}.train", shown(train), "true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise BadRow(f"{field}.weight", shown(weight), "0 or 1")
    if train is not None and weight is not None and train != bool(weight):
        raise BadRow(f"{field}.weight", shown(weight), f"the same as `train`, which is {str(train).lower()}")
    return train if train is not None else bool(weight)


def plain_messages(messages: Sequence[Mapping[str, Any]], objects: bool = True) -> list[Message]:
    """Canonical messages as a template wants them: without nulls and `train`, tool calls as objects.

    The arguments of a call are objects too, or JSON text without `objects`.
    """
    return [_plain(message, objects) for message in messages]


def _plain(message: Mapping[str, Any], objects: bool) -> Message:
    out = {key: message[key] for key in TEXT_KEYS if message.get(key) is not None}
    if message.get("tool_calls"):
        out["tool_calls"] = [_call(call, objects) for call in json.loads(message["tool_calls"])]
    if message.get("extra"):
        out.update(json.loads(message["extra"]))
    return out


def _call(call: Any, objects: bool) -> Any:
    """A tool call with its arguments in the wanted form, wherever they are a JSON object."""
    function = call.get("function", call)
    given = function.get("arguments")
    text = given if isinstance(given, str) else json.dumps(given or {}, ensure_ascii=False)
    wanted = _as_object(given) if objects else text
    changed = {**function, "arguments": wanted}
    return {**call, "function": changed} if "function" in call else changed


def _as_object(given: Any) -> Any:
    try:
        parsed = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given
    return given if isinstance(given, str) and not isinstance(parsed, dict) else parsed


def conversations(column: pa.ChunkedArray | pa.Array) -> list[list[Message] | None]:
    """The conversations of an arrow column of `message_type()`, without the keys that are null throughout."""
    import pyarrow as pa

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    messages = array.flatten()
    fields = {key: messages.field(key) for key in KEYS}
    lists = {key: values.to_pylist() for key, values in fields.items() if values.null_count < len(values)}
    keys = list(lists)
    flat = [dict(zip(keys, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    lengths = array.value_lengths().to_pylist()
    found: list[list[Message] | None] = []
    at = 0
    for length in lengths:
        found.append(None if length is None else flat[at : at + length])
        at += length or 0
    return found
