"""YAML by the core schema of 1.2: PyYAML alone reads `1e-5` as text and `on` as true."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import Node
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

TAG = "tag:yaml.org,2002:"


class _CoreSchema(BaseResolver):
    """The core schema of YAML 1.2; everything else is text."""


def _add(tag: str, pattern: str, first: str) -> None:
    _CoreSchema.add_implicit_resolver(TAG + tag, re.compile(rf"(?:{pattern})\Z"), list(first))


_add("null", r"null|Null|NULL|~", "nN~")
_CoreSchema.yaml_implicit_resolvers.setdefault("", []).append((TAG + "null", re.compile(r"\Z")))
_add("bool", r"true|True|TRUE|false|False|FALSE", "tTfF")
_add("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789")
_add("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789")
_add("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.")
_add("merge", r"<<", "<")


class _Composer(Reader, Scanner, Parser, Composer, _CoreSchema):
    """Composes nodes; it constructs nothing."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _CoreSchema.__init__(self)


def compose(text: str) -> Node | None:
    """The node of the one document in `text`; None where there is nothing.

    Raises:
        yaml.MarkedYAMLError: the text is no YAML, or holds several documents.
        yaml.reader.ReaderError: a character that YAML does not allow.
    """
    return _Composer(text).get_single_node()


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""

    yaml_implicit_resolvers = {
        first: [*one.get(first, ()), *other.get(first, ())]
        for one, other in [(yaml.SafeDumper.yaml_implicit_resolvers, _CoreSchema.yaml_implicit_resolvers)]
        for first in {*one, *other}
    }


def write(data: Any) -> str:
    """Plain data as YAML that every reader understands alike, in the order of `data`."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    if any(separator in text for separator in "\x85\u2028\u2029"):
        # PyYAML would write these rare line breaks as they are, and read them as spaces.
        text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=110)
    return text
