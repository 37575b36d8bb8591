"""Tables in markdown and for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> list[str]:
    """A table's lines. ``numbers``: all columns but the first are flush right."""
    rule = ["---:" if numbers and column else "---" for column in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need, flush right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
