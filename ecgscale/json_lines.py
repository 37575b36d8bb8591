"""Files of one JSON object per line, which grow while a run goes on: whole lines, whatever a kill has cut off."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ecgscale.errors import naming_file


class JsonLines:
    """Appends to a file, at once. Errors name the file: MachineError where the disk fails, as when it is full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with naming_file(path, "cannot write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)  # what is kept back would be lost, or told at the end
            size = self._file.seek(0, os.SEEK_END)
            if size:
                self._file.seek(size - 1)
                if self._file.read(1) != b"\n":  # cut off, by a kill or a full disk: its line stands alone
                    self._append(b"\n")

    def write(self, line: dict[str, Any]) -> None:
        """Raises ValueError for what JSON does not know, such as NaN."""
        with naming_file(self._path, "cannot write"):
            self._append(json.dumps(line, allow_nan=False).encode() + b"\n")

    def _append(self, content: bytes) -> None:
        while content:  # a disk that is nearly full takes a part
            content = content[self._file.write(content) :]

    def close(self) -> None:
        with naming_file(self._path, "cannot write"):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, none where there is no file. What is no JSON object was cut off and is left out."""
    with naming_file(path, "cannot read"):
        if not path.exists():
            return
        with path.open("rb") as file:
            yield from objects_in(file)


def last_json_lines(path: Path, most_bytes: int) -> list[dict[str, Any]]:
    """The lines in the last bytes of a file, without the one that these begin within; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most_bytes))
            return list(objects_in(file.read().split(b"\n")))
    except OSError:
        return []


def objects_in(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects among lines; what is none was cut off and is left out."""
    for line in lines:
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(parsed, dict):
            yield parsed
