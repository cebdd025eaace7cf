"""Draws what is recorded in benchmarks/results for the documentation.

    python benchmarks/pictures.py

after `--record`; tests hold the pictures to what is recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH, LEFT, FULL, ROW = 760, 270, 380, 26
"""Of the picture, of the names, of a bar of 100 %; the height of a row."""


@dataclass(frozen=True)
class Bar:
    """One row.

    Attributes:
        name: what it says on the left.
        share: of the plain way, whose bar would be 1.
        limit: where arithmetic would put it, if that is known.
        colour: of the bar.
    """

    name: str
    share: float
    limit: float | None
    colour: str


def swiftkv(result: Mapping[str, Any]) -> str:
    """The picture of what SwiftKV saves, an SVG."""
    ratios, cases = result["ratios"], result["cases"]
    prompts = [
        Bar(
            f"prompt of {length:,} tokens, groups of {size}",
            ratios[f"prompt of {length}, groups of {size}, time to plain"]["median"],
            cases[f"prefill {length}"][f"groups of {size}, limit"],
            {1: "#3b6fb6", 4: "#86aee0"}[size],
        )
        for length in (128, 512, 2048)
        for size in (1, 4)
    ]
    cached = [
        Bar(f"groups of {size}", ratios[f"cached bytes, groups of {size}, to plain"]["median"], None, "#b7791f")
        for size in (1, 4)
    ]
    steps = [
        Bar(f"{words}, {number}", ratios[f"{where}, {what}, ptrain to naive"]["median"], None, "#2f855a")
        for words, where in (("every token learnt", "every position with a label"), ("half of them", "half of them"))
        for number, what in (("time", "time per step"), ("memory", "memory"))
    ]
    return picture(
        {
            "Time to the first token; 100 % is the plain model, the line the limit by arithmetic": prompts,
            "Keys and values that are kept of a prompt; 100 % is the plain model": cached,
            "A training step; 100 % is a naive one of the same loss": steps,
        },
        "What SwiftKV saves, as measured",
    )


def picture(panels: Mapping[str, list[Bar]], title: str) -> str:
    """Panels of bars below each other, an SVG."""
    height = sum(ROW * (len(rows) + 2) for rows in panels.values()) + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="13" role="img" aria-labelledby="title">',
        f'<title id="title">{title}</title>',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    top = 12
    for heading, rows in panels.items():
        lines += panel(heading, rows, top)
        top += ROW * (len(rows) + 2)
    return "\n".join([*lines, "</svg>", ""])


def panel(heading: str, rows: list[Bar], top: int) -> Iterator[str]:
    """The lines of one panel that begins at `top`."""
    yield f'<text x="20" y="{top + 18}" font-weight="600" fill="#24292f">{heading}</text>'
    bottom = top + ROW * (len(rows) + 1)
    yield f'<line x1="{LEFT + FULL}" y1="{top + ROW}" x2="{LEFT + FULL}" y2="{bottom}" stroke="#d0d7de"/>'
    for at, row in enumerate(rows, 1):
        y, end = top + ROW * at, LEFT + FULL * row.share
        yield f'<text x="{LEFT - 10}" y="{y + 18}" text-anchor="end" fill="#24292f">{row.name}</text>'
        yield f'<rect x="{LEFT}" y="{y + 4}" width="{FULL * row.share:.1f}" height="{ROW - 8}" fill="{row.colour}"/>'
        if row.limit is not None:
            x = LEFT + FULL * row.limit
            yield f'<line x1="{x:.1f}" y1="{y + 1}" x2="{x:.1f}" y2="{y + ROW - 1}" stroke="#24292f" stroke-width="2"/>'
        yield f'<text x="{end + 8:.1f}" y="{y + 18}" fill="#57606a">{100 * row.share:.3g} %</text>'


PICTURES = {"swiftkv-measured.svg": ("swiftkv.json", swiftkv)}
"""Where each goes, what it is drawn from, and by what."""


def drawn() -> Iterator[tuple[Path, str]]:
    """Each picture as it has to be."""
    for name, (recorded, draw) in PICTURES.items():
        yield IMAGES / name, draw(json.loads((RESULTS / recorded).read_text(encoding="utf-8")))


if __name__ == "__main__":
    for path, text in drawn():
        path.write_text(text, encoding="utf-8")
