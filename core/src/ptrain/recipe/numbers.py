"""Numbers as people write them: `200k`, `1.25e-4`, `2_000`, `128ki`, `10%`, `2^20`."""

from __future__ import annotations

import re
from fractions import Fraction

SUFFIXES = {
    "": 1, "%": Fraction(1, 100),
    "k": 1000, "m": 1000**2, "b": 1000**3, "t": 1000**4,
    "ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4,
}  # fmt: skip

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_DECIMAL = rf"[+-]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})"
_SCALED = re.compile(rf"(?P<number>{_DECIMAL})\s*(?P<suffix>%|[kmgt]i|[kmbt])?", re.IGNORECASE)
_SCIENTIFIC = re.compile(rf"(?P<number>{_DECIMAL})e(?P<exponent>[+-]?[0-9]{{1,3}})", re.IGNORECASE)
_POWER = re.compile(rf"(?P<number>{_DECIMAL})\s*\^\s*(?P<exponent>[+-]?[0-9]{{1,4}})")
_LONGEST = 64
"""More characters than this are no number that a person wrote (and exact powers of them would be slow)."""


def parse_number(text: str, integral: bool) -> int | float:
    """The number that `text` means, as an int if `integral`, else as a float.

    The value is computed exactly, then rounded once: `1.00001k` is 1000.01, and so no int.

    Raises:
        ValueError: `text` is no number, no whole one though `integral`, or too large for a float.
    """
    exact = _exact(text.strip())
    if exact is None:
        kind = "a whole number" if integral else "a number"
        raise ValueError(f"{kind} is expected (200k, 1e-5, 2_000, 128ki, 10%, 2^20 are some too), not `{text}`")
    if integral:
        return _whole(exact, text)
    try:
        return float(exact)
    except OverflowError:
        raise ValueError(f"`{text}` is too large") from None


def _whole(exact: Fraction, text: str) -> int:
    if exact.denominator != 1:
        raise ValueError(f"a whole number is expected, but `{text}` is {float(exact):.15g}")
    return exact.numerator


def _exact(text: str) -> Fraction | None:
    if len(text) > _LONGEST:
        return None
    if match := _SCALED.fullmatch(text):
        return _fraction(match["number"]) * SUFFIXES[(match["suffix"] or "").lower()]
    if match := _SCIENTIFIC.fullmatch(text):
        return _fraction(match["number"]) * Fraction(10) ** int(match["exponent"])
    if match := _POWER.fullmatch(text):
        base = _fraction(match["number"])
        return base ** int(match["exponent"]) if base or int(match["exponent"]) >= 0 else None
    return None


def _fraction(number: str) -> Fraction:
    return Fraction(number.replace("_", "").rstrip("."))
