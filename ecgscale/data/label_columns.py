"""``--label-columns``: columns or keys of flags that are the classes of one label."""

from __future__ import annotations

from collections.abc import Sequence

from ecgscale.errors import InputError

LabelColumns = tuple[tuple[str, tuple[str, ...]], ...]  # (label, columns)

DEFAULT_LABEL = "labels"  # where the option gives no name


def parse_label_columns(groups: Sequence[str]) -> LabelColumns:
    """``NAME=A,B`` -> (NAME, (A, B)); ``A,B`` -> (DEFAULT_LABEL, (A, B)). Raises InputError for other text."""
    parsed: dict[str, tuple[str, ...]] = {}
    for group in groups:
        name, equals, listed = group.rpartition("=")
        columns = tuple(column.strip() for column in listed.split(",") if column.strip())
        label = name.strip() or DEFAULT_LABEL
        if not columns or len(set(columns)) < len(columns) or (equals and not name.strip()):
            raise InputError(f"--label-columns {group!r}: give A,B,C or NAME=A,B,C, each column once")
        if label in parsed:
            raise InputError(f"--label-columns {group!r}: a second label {label!r}; give this one another: NAME=A,B,C")
        parsed[label] = columns
    return tuple(parsed.items())
