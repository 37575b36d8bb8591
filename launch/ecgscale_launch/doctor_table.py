"""What the doctor has found, as a table for people."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ecgscale.errors import one_line
from ecgscale_launch.diagnosis import Check

_COLOURS = {"pass": "32", "warn": "33", "fail": "1;31", "skip": "2"}
_NARROWEST = 30  # characters for the text of a check, whatever the terminal


def lines(checks: Sequence[Check], width: int | None, coloured: bool) -> list[str]:
    """The table for people: one line per check, and below it what to do."""
    name_width = max(len(check.name) for check in checks)
    margin = " " * (name_width + 8)
    shown = []
    for check in checks:
        word = "FAIL" if check.result == "fail" else check.result
        code = _COLOURS[check.result]
        marked = f"\x1b[{code}m{word}\x1b[0m" if coloured else word
        texts = [check.measured] + ([f"-> {check.advice}"] if check.advice and check.result != "pass" else [])
        text_lines = []
        for text in map(one_line, texts):
            room = None if width is None else max(_NARROWEST, width - len(margin))
            text_lines += [text] if room is None else textwrap.wrap(text, room) or [""]
        shown.append(f"{check.name:<{name_width}}  {marked}  {text_lines[0]}")
        shown += [margin + line for line in text_lines[1:]]
    failed, warned = (sum(check.result == result for check in checks) for result in ("fail", "warn"))
    return [*shown, f"{failed} failed, {warned} to look at, of {len(checks)} checks"]
