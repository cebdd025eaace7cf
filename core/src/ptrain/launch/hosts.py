"""Hosts and their slots: DeepSpeed's hostfile, `--include` and `--exclude`."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from pathlib import Path

from ptrain.errors import Position
from ptrain.launch.environment import LaunchError

Hosts = dict[str, list[int]]
"""The slots (accelerators) of each host that are used, in the order of the hostfile."""

HERE = ("localhost", "127.0.0.1", "::1")


def read_hostfile(path: Path) -> Hosts:
    """The hosts of a hostfile: lines `name slots=N`, and comments after `#`.

    Raises:
        LaunchError: with the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise LaunchError(f"the hostfile {path} can't be read: {reason}") from None
    hosts: Hosts = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text:
            name, slots = _hostfile_line(text, Position(str(path), number, 1))
            if name in hosts:
                raise LaunchError(f"the host {name} is there twice", where=Position(str(path), number, 1))
            hosts[name] = slots
    if not hosts:
        raise LaunchError(f"the hostfile {path} names no host", expected="lines such as `worker-0 slots=8`")
    return hosts


def _hostfile_line(text: str, where: Position) -> tuple[str, list[int]]:
    match = re.fullmatch(r"(\S+)\s+slots=([0-9]+)", text)
    if match is None or int(match[2]) == 0:
        raise LaunchError(f"{text!r} is no line of a hostfile", where=where, expected="`worker-0 slots=8`, say")
    return match[1], list(range(int(match[2])))


def parse_filter(option: str, text: str) -> Hosts:
    """What `--include` or `--exclude` names: `worker-0@worker-1:0,2`; no slots stand for all of them.

    Raises:
        LaunchError: it is not of that form.
    """
    named: Hosts = {}
    for word in text.split("@"):
        match = re.fullmatch(r"([^\s:@,]+)(?::([0-9]+(?:,[0-9]+)*))?", word)
        if match is None:
            raise LaunchError(
                f"{option} {text}: {word!r} is no host with its slots",
                expected="`worker-0@worker-1:0,2`, say: all of worker-0, and the slots 0 and 2 of worker-1",
            )
        slots = [int(slot) for slot in match[2].split(",")] if match[2] else []
        if len(set(slots)) < len(slots) or match[1] in named:
            raise LaunchError(f"{option} {text}: {word!r} names something twice")
        named[match[1]] = sorted(slots)
    return named


def choose(hosts: Mapping[str, list[int]], include: str = "", exclude: str = "") -> Hosts:
    """The hosts and slots that are left after `--include` or `--exclude`.

    Raises:
        LaunchError: both are given, something is named that isn't there, or nothing is left.
    """
    if include and exclude:
        raise LaunchError("--include and --exclude exclude each other", fix="give one of them")
    option, text = ("--include", include) if include else ("--exclude", exclude)
    if not text:
        return dict(hosts)
    named = parse_filter(option, text)
    for host, slots in named.items():
        _known(hosts, host, slots, f"{option} {text}")
    chosen = {}
    for host, slots in hosts.items():
        wanted = named.get(host, []) or slots
        if include:
            left = wanted if host in named else []
        else:
            left = [slot for slot in slots if slot not in wanted] if host in named else slots
        if left:
            chosen[host] = left
    if not chosen:
        raise LaunchError(f"{option} {text} leaves no slot at all")
    return chosen


def _known(hosts: Mapping[str, list[int]], host: str, slots: list[int], option: str) -> None:
    if host not in hosts:
        raise LaunchError(f"{option}: there is no host {host}", expected=f"one of {', '.join(hosts)}")
    for slot in slots:
        if slot not in hosts[host]:
            has = ", ".join(map(str, hosts[host]))
            raise LaunchError(f"{option}: {host} has no slot {slot}", expected=f"one of {has}")


def is_here(host: str) -> bool:
    """Whether a host is this machine."""
    name = socket.gethostname()
    return host in HERE or host in (name, name.partition(".")[0], socket.getfqdn())
