"""The canonical form of conversations: nothing is lost or reordered, what is wrong is named."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptrain.data.rows import (
    ROLES,
    BadRow,
    canonical_messages,
    canonical_row,
    conversations,
    message_type,
    plain_messages,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda v: st.lists(v, max_size=2),
    max_leaves=3,
)
calls = st.builds(
    lambda name, arguments: {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}},
    st.text(min_size=1, max_size=5), st.dictionaries(st.text(max_size=4), values, max_size=3),
)  # fmt: skip
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES), "content": st.text(max_size=20)},
    optional={
        "name": st.text(max_size=5), "tool_call_id": st.text(max_size=5), "reasoning_content": st.text(max_size=9),
        "tool_calls": st.lists(calls, min_size=1, max_size=3),
        "channel": st.text(max_size=4),
    },
)  # fmt: skip


@given(st.lists(st.lists(messages, min_size=1, max_size=5), min_size=1, max_size=4))
def test_round_trip(rows: list[list[dict[str, Any]]]) -> None:
    """Order, roles, tool calls with free-form arguments and unusual keys come back from arrow as they were."""
    column = pa.array([canonical_messages(row) for row in rows], type=message_type())
    back = conversations(pa.chunked_array([column.slice(0, 1), column.slice(1)]))
    assert [plain_messages(row or []) for row in back] == rows


def test_the_roles_of_a_tool_dialogue_keep_their_order() -> None:
    """B9: a system message, two turns and a tool result."""
    said = [
        {"role": role, "content": str(at)}
        for at, role in enumerate(["system", "user", "assistant", "user", "assistant", "tool"])
    ]
    assert plain_messages(canonical_messages(said)) == said


def test_what_other_formats_write() -> None:
    """Null keys, text parts, other names of the reasoning, content that is null beside calls."""
    call = {"function": {"name": "f", "arguments": "{}"}}
    given = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm", "weight": 0},
    ]
    assert canonical_messages(given) == [
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": json.dumps([call]),
            "train": False,
        },
    ]


def test_arguments_in_the_form_that_a_template_wants() -> None:
    """JSON text of an object becomes an object, or the other way round; other text is left alone."""
    said = canonical_messages(
        [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"city": "Łódź 北京"}}]}]
    )
    assert plain_messages(said, objects=False)[0]["tool_calls"][0]["arguments"] == '{"city": "Łódź 北京"}'
    for arguments in ({"a": 1}, '{"a": 1}'):
        said = canonical_messages(
            [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}]
        )
        assert plain_messages(said)[0]["tool_calls"][0]["arguments"] == {"a": 1}
        assert json.loads(plain_messages(said, objects=False)[0]["tool_calls"][0]["arguments"]) == {"a": 1}
    said = canonical_messages(
        [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "no JSON"}]}]
    )
    assert plain_messages(said)[0]["tool_calls"][0]["arguments"] == "no JSON"


@pytest.mark.parametrize(
    ("row", "field", "got"),
    [
        ([1], "row", "list [1]"),
        ({"messages": None}, "messages", "missing"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": "hi"}, "messages", '"hi"'),
        ({"messages": ["hi"]}, "messages[0]", '"hi"'),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "human", "content": "a"}]}, "messages[0].role", '"human"'),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role", "list ['user']"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "int 3"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content", "list"),
        ({"messages": [{"role": "user", "content": "a", "name": 1}]}, "messages[0].name", "int 1"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": "no"}]}, "messages[0].tool_calls", '"no"'),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]", "dict"),
        ({"messages": [{"role": "user", "content": "a", "train": "no"}]}, "messages[0].train", '"no"'),
        ({"messages": [{"role": "user", "content": "a", "weight": 0.5}]}, "messages[0].weight", "float 0.5"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1, "train": False}]}, "messages[0].weight", "int 1"),
        ({"chosen": [{"role": "x", "content": ""}]}, "chosen[0].role", '"x"'),
        ({"messages": [{"role": "user", "content": "a"}], "tools": {"a": 1}}, "tools", "dict"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [1]}, "tools[0]", "int 1"),
    ],
)
def test_what_is_wrong_is_named(row: Any, field: str, got: str) -> None:
    """Field, what was found, what was expected."""
    with pytest.raises(BadRow) as caught:
        canonical_row(row)
    assert caught.value.field == field
    assert caught.value.got.startswith(got)
    assert caught.value.expected


def test_other_columns_are_left_alone() -> None:
    """A `prompt` that is text is no conversation."""
    row = {"prompt": "a", "n": 1, "extra": {"x": [1]}}
    assert canonical_row(row) == row
