"""Hostfiles, `--include` and `--exclude`."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptrain.launch.environment import LaunchError
from ptrain.launch.hosts import choose, is_here, parse_filter, read_hostfile

pytestmark = pytest.mark.torch_free

HOSTS = {"a": [0, 1, 2, 3], "b": [0, 1]}
SLOTS = st.lists(st.integers(0, 7), unique=True, max_size=4)


def test_a_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the cluster\nb slots=2   # the small one\n\n  a\tslots=4\n")
    assert list(read_hostfile(path).items()) == [("b", [0, 1]), ("a", [0, 1, 2, 3])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=4\nb 4\n", ":2:1: 'b 4' is no line of a hostfile"),
        ("a slots=0\n", ":1:1: 'a slots=0' is no line"),
        ("a slots=4 extra\n", ":1:1:"),
        ("a slots=4\na slots=4\n", ":2:1: the host a is there twice"),
        ("# nothing\n", "names no host"),
        ("", "names no host"),
    ],
)
def test_a_wrong_hostfile(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(LaunchError) as caught:
        read_hostfile(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_bytes(b"\xff\xfe")])
def test_an_unreadable_hostfile(tmp_path: Path, make: object) -> None:
    make(tmp_path / "hosts")  # type: ignore[operator]
    with pytest.raises(LaunchError, match="can't be read"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ("", "", HOSTS),
        ("b", "", {"b": [0, 1]}),
        ("b@a:3,0", "", {"a": [0, 3], "b": [0, 1]}),
        ("", "b", {"a": [0, 1, 2, 3]}),
        ("", "a:0,1@b:1", {"a": [2, 3], "b": [0]}),
    ],
)
def test_choose(include: str, exclude: str, chosen: dict[str, list[int]]) -> None:
    found = choose(HOSTS, include, exclude)
    assert found == chosen and list(found) == list(chosen)


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("a", "b", "exclude each other"),
        ("c", "", "--include c: there is no host c"),
        ("", "c", "--exclude c: there is no host c"),
        ("a:4", "", "a has no slot 4"),
        ("", "a@b", "leaves no slot"),
        ("a:", "", "is no host with its slots"),
        ("a:0,x", "", "is no host"),
        ("a@", "", "'' is no host"),
        ("a:0,0", "", "something twice"),
        ("a@a:1", "", "something twice"),
    ],
)
def test_choose_refuses(include: str, exclude: str, message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        choose(HOSTS, include, exclude)
    assert message in str(caught.value)


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True), SLOTS, min_size=1, max_size=4))
def test_a_filter_is_read_as_written(named: dict[str, list[int]]) -> None:
    words = [host + (":" + ",".join(map(str, slots)) if slots else "") for host, slots in named.items()]
    assert parse_filter("--include", "@".join(words)) == {host: sorted(slots) for host, slots in named.items()}


@given(st.dictionaries(st.sampled_from("abc"), st.lists(st.sampled_from([0, 1, 2]), unique=True), min_size=1))
def test_include_and_exclude_divide_the_slots(named: dict[str, list[int]]) -> None:
    hosts = {name: [0, 1, 2] for name in "abc"}
    text = "@".join(host + (":" + ",".join(map(str, slots)) if slots else "") for host, slots in named.items())
    chosen = {(host, slot) for host, slots in choose(hosts, include=text).items() for slot in slots}
    try:
        left = {(host, slot) for host, slots in choose(hosts, exclude=text).items() for slot in slots}
    except LaunchError:
        left = set()
    assert chosen | left == {(host, slot) for host in hosts for slot in hosts[host]}
    assert not chosen & left


def test_this_machine_is_here() -> None:
    assert is_here("localhost") and is_here(socket.gethostname())
    assert not is_here("surely-another-host")
