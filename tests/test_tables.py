"""Tables in markdown and for a terminal."""

from __future__ import annotations

from ecgscale import tables


def test_rows_of_both_kinds() -> None:
    head, rows = ("name", "a"), [("x", "1"), ("long name", "22")]
    assert tables.markdown(head, rows)[:3] == ["| name | a |", "| --- | --- |", "| x | 1 |"]
    assert tables.markdown(head, rows, numbers=True)[1] == "| --- | ---: |"
    assert tables.aligned(head, rows) == "     name   a\n        x   1\nlong name  22"
    assert tables.markdown(head, []) == ["| name | a |", "| --- | --- |"]
