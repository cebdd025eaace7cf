"""`ptrain schema` and `ptrain plugins list --json`: for programs to read."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.torch_free

Ptrain = Callable[..., tuple[int, str, str]]


def test_the_schema_is_json(ptrain: Ptrain) -> None:
    code, out, err = ptrain("schema")
    assert (code, err) == (0, "")
    schema = json.loads(out)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert "type" in schema["properties"]


def test_plugins_as_json(ptrain: Ptrain) -> None:
    code, out, err = ptrain("plugins", "list", "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert {"kind", "name", "distribution", "version", "status", "reason", "provides"} == set(rows[0])
    assert {row["name"] for row in rows if row["kind"] == "trainer"} >= {"sft", "causal"}
    assert all(row["status"] == "ok" for row in rows), [row for row in rows if row["status"] != "ok"]
