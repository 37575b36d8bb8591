"""CSVs: bytes -> rows, each with its line, or one line on what is wrong with the file.

| in a table of the user's | how it is read |
|---|---|
| UTF-8, and UTF-16 with its mark | as it is |
| bytes that are no UTF-8 | as Western letters where Windows-1252, Latin-1, Latin-9 and Windows-1250 agree (ä, ß, é) |
| commas, semicolons or tabs between cells | as the first line has them |
| ``72,5`` where semicolons or tabs part the cells | ``72.5`` in columns of such numbers, if not all are as ``1,101`` |
| a cell with line breaks | as it is, unless whole rows lie in it: its quote is not closed then |
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ecgscale.data.cells import is_known
from ecgscale.errors import InputError, file_error, unreadable

_WESTERN = ("cp1252", "latin-1", "iso8859-15", "cp1250")
_NAMES = {"utf-16": "UTF-16", "cp1252": "Windows-1252 text", ";": "semicolons", "\t": "tabs"}
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # .xlsx and .ods, .xls
_NUMBER = re.compile(r"-?[0-9]+(?:,[0-9]+)?")
_THOUSANDS = re.compile(r"-?[1-9][0-9]{0,2},[0-9]{3}")
_TWO_CODES = re.compile(r"[0-9]{6,18},[0-9]{6,18}")
_SAVE = "save it as CSV UTF-8"


class Row(NamedTuple):
    """A row of a CSV."""

    line: int
    """On which it begins, from 1."""
    cells: list[str]
    inner_lines: list[str]
    """The lines behind the first, which cells with line breaks have."""


def rows_in(lines: Iterable[str], shown: str, delimiter: str = ",") -> Iterator[Row]:
    """The first line and each row, without empty ones, of an open text (``newline=""``).

    Raises InputError that names ``shown`` and the line for what is no CSV, and for quotes that are not closed.
    """
    of_row: list[str] = []

    def noted() -> Iterator[str]:
        for line in lines:
            of_row.append(line)
            yield line

    reader = csv.reader(noted(), delimiter=delimiter, strict=True, skipinitialspace=True)
    n_columns = 0
    while True:
        first = reader.line_num + 1
        of_row.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _no_csv(shown, first, reader.line_num, error) from error
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(f"{shown}: line {first}", "not a readable CSV", error) from error
        if cells is None:
            return
        if not cells:
            continue
        n_columns = n_columns or len(cells)
        row = Row(first, cells, of_row[1:])
        if n_columns > 2 and row.inner_lines:
            lengths = {len(split_line(line, delimiter)) for line in row.inner_lines}
            if lengths == {n_columns}:
                raise swallowed(shown, first, first + 1)
        yield row


def split_line(line: str, delimiter: str) -> list[str]:
    """The cells of a line by itself."""
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])


def swallowed(shown: str, line: int, inner_line: int) -> InputError:
    """The error to raise for a cell in which other rows lie."""
    return InputError(
        f'{shown}: line {line}: a quote (") is opened and not closed, so that line {inner_line} became part of a cell; '
        "close it, or double it if it is part of the text"
    )


def _no_csv(shown: str, first: int, last: int, error: csv.Error) -> InputError:
    over_lines = f'; the row goes to line {last}: is a quote (") not closed?' if last > first else ""
    return InputError(f"{shown}: line {first}: not a readable CSV ({error}){over_lines}")


@dataclass(frozen=True)
class CsvText:
    """A CSV of the user's, and how it is written."""

    path: Path
    encoding: str
    delimiter: str
    decimal_commas: frozenset[int] = frozenset()
    """Numbers of the columns that have them."""

    @classmethod
    def open(cls, path: Path) -> CsvText:
        """Find out how it is written. Raises InputError where that is not sure, MachineError where the disk fails."""
        try:
            encoding = _encoding(path)
            text = cls(path, encoding, _delimiter(path, encoding))
            return text if text.delimiter == "," else replace(text, decimal_commas=_decimal_commas(text.rows()))
        except OSError as error:
            raise file_error(path, "not a readable CSV of labels", error) from error
        except UnicodeError as error:
            raise InputError(f"{path}: not a readable CSV of labels ({error}); {_SAVE}") from error

    @property
    def remark(self) -> str:
        """How it was read where that is not the usual way, for people."""
        parts = [f"as {_NAMES[self.encoding]}"] if self.encoding in _NAMES else []
        if self.delimiter in _NAMES:
            parts.append(f"with {_NAMES[self.delimiter]} between the cells")
        if self.decimal_commas:
            columns = ", ".join(self.columns[number] for number in sorted(self.decimal_commas))
            parts.append(f"with decimal commas (72,5 is 72.5) in {columns}")
        return f"{self.path}: read {', '.join(parts)}" if parts else ""

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The names in the first line."""
        return tuple(column.strip() for column in next((row.cells for row in self._all_rows()), []))

    def rows(self) -> Iterator[Row]:
        """Those behind the first line; raises InputError for one that has another number of cells."""
        rows = self._all_rows()
        next(rows, None)
        for row in rows:
            cells = row.cells
            if len(cells) != len(self.columns):
                raise InputError(
                    f"{self.path}: line {row.line} has {len(cells)} fields, the first line names "
                    f"{len(self.columns)} columns"
                )
            for number in self.decimal_commas:
                cells[number] = cells[number].replace(",", ".")
            yield row

    def _all_rows(self) -> Iterator[Row]:
        try:
            with self.path.open(encoding=self.encoding, newline="") as file:
                yield from rows_in(file, str(self.path), self.delimiter)
        except OSError as error:
            raise file_error(self.path, "not a readable CSV of labels", error) from error


def _decimal_commas(rows: Iterable[Row]) -> frozenset[int]:
    """The columns in which all that is known is a number, and some have a comma that is none of thousands."""
    with_comma: set[int] = set()
    others: set[int] = set()
    for row in rows:
        for number, cell in enumerate(row.cells):
            if number in others or not is_known(cell):
                continue
            text = cell.strip()
            if not _NUMBER.fullmatch(text) or _TWO_CODES.fullmatch(text):
                others.add(number)
            elif "," in text and not _THOUSANDS.fullmatch(text):
                with_comma.add(number)
    return frozenset(with_comma - others)


def _encoding(path: Path) -> str:
    letters: set[int] = set()
    has_utf8, no_utf8 = False, ""
    with path.open("rb") as file:
        head = file.read(4)
        if head.startswith(_UTF16_MARKS):
            return "utf-16"
        if head.startswith(_WORKBOOKS):
            raise InputError(f"{path}: not a readable CSV of labels, but a spreadsheet's own file; {_SAVE}")
        file.seek(0)
        for number, line in enumerate(file, 1):
            if b"\0" in line:
                raise InputError(f"{path}: line {number}: not a readable CSV of labels, it has zero bytes; {_SAVE}")
            try:
                has_utf8 |= not line.decode("utf-8-sig").isascii()
            except UnicodeDecodeError as error:
                no_utf8 = no_utf8 or f"line {number}: the byte 0x{line[error.start]:02X} is no UTF-8"
                letters |= {byte for byte in line if byte > 127}
    if not no_utf8:
        return "utf-8-sig"
    if not has_utf8 and all(_means_one_letter(byte) for byte in letters):
        return "cp1252"
    why = "other lines are UTF-8" if has_utf8 else "which letter it is depends on the encoding"
    raise InputError(f"{path}: {no_utf8}, and {why}: not a readable CSV of labels; {_SAVE}")


def _means_one_letter(byte: int) -> bool:
    try:
        return byte >= 0xA0 and len({bytes([byte]).decode(encoding) for encoding in _WESTERN}) == 1
    except UnicodeDecodeError:
        return False


def _delimiter(path: Path, encoding: str) -> str:
    """The one at which the first line falls into most columns. Raises InputError where two do alike."""
    with path.open(encoding=encoding, newline="") as file:
        first_line = next((line for line in file if line.strip()), "")
    n_columns = {delimiter: len(split_line(first_line, delimiter)) for delimiter in ",;\t"}
    most = max(n_columns.values())
    best = [delimiter for delimiter, n in n_columns.items() if n == most]
    if most > 1 and len(best) > 1:
        raise InputError(
            f"{path}: its first line has {most} columns with {best[0]!r} between them, and with {best[1]!r}; put names "
            "that have such a character into quotes"
        )
    return best[0]
