"""The webdataset library as a reader of our tars, as fast as it gets and as people use it.

All variants run on one core without a DataLoader, take only the payload out of a tar, decode it without ``np.load``
and fill batches.
"""

from __future__ import annotations

import gc
import mmap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from webdataset import tariterators

from ecgscale.data.payload import Payload, decode
from ecgscale.record import LEADS, Counts

Reader = Callable[[], int]  # reads every record once, and says how many

DOCUMENTED = "webdataset: WebDataset().map, copied"
SHUFFLED = "webdataset, shuffle(1000)"
BY_HAND = "its tar_file_iterator on files opened by hand, "  # no pipeline: no URLs, no samples of several members


def webdataset_readers(tars: list[Path], payload: Payload, batch: int, samples: int) -> dict[str, Reader]:
    """One pass over the tars per call, by variant of the pipeline; the last one shuffles, the others do not."""
    urls = [str(tar) for tar in tars]
    decoded = decode if payload == "pco" else _decode_npy
    wanted = f".{payload}"
    room = np.empty((batch, len(LEADS), samples), np.int16)

    def select(name: str) -> bool:
        return name.endswith(wanted)

    def dataset(shuffle: int = 0) -> Iterable[Counts]:
        shards = len(urls) if shuffle else False
        plain = webdataset.WebDataset(urls, shardshuffle=shards, select_files=select, empty_check=False)
        signals: Iterable[Counts] = (plain.shuffle(shuffle) if shuffle else plain).map(lambda s: decoded(s[payload]))
        return signals

    def pipeline() -> Iterator[Counts]:
        shards = webdataset.SimpleShardList(urls)
        for sample in webdataset.DataPipeline(shards, webdataset.tarfile_to_samples(select_files=select)):
            yield decoded(sample[payload])

    def expander() -> Iterator[Counts]:
        streams = tariterators.url_opener({"url": url} for url in urls)
        for file in tariterators.tar_file_expander(streams, select_files=select, eof_value=None):
            yield decoded(file["data"])

    def iterator(opened: Callable[[str], Any]) -> Iterator[Counts]:
        for url in urls:
            with opened(url) as stream:
                for file in tariterators.tar_file_iterator(stream, skip_meta=None, select_files=select):
                    yield decoded(file["data"])

    def uncollected() -> int:
        gc.disable()
        try:
            return _copied(iterator(_unbuffered), room)
        finally:
            gc.enable()

    return {
        "webdataset: WebDataset().map, np.stack": lambda: _stacked(dataset(), batch),
        DOCUMENTED: lambda: _copied(dataset(), room),
        "webdataset: DataPipeline, copied": lambda: _copied(pipeline(), room),
        "webdataset: tar_file_expander, copied": lambda: _copied(expander(), room),
        f"{BY_HAND}1 MB buffer": lambda: _copied(iterator(_buffered), room),
        f"{BY_HAND}unbuffered": lambda: _copied(iterator(_unbuffered), room),
        f"{BY_HAND}unbuffered, gc off": uncollected,
        f"{BY_HAND}mmap": lambda: _copied(iterator(_mapped), room),
        SHUFFLED: lambda: _stacked(dataset(1000), batch),
    }


def _decode_npy(content: bytes) -> Counts:
    """What ``np.load`` returns for our ``.npy`` members, whose header need not be parsed."""
    start = 10 + int.from_bytes(content[8:10], "little")
    return np.frombuffer(content, np.int16, offset=start).reshape(len(LEADS), -1)


def _copied(signals: Iterable[Counts], room_BLT: Counts) -> int:
    count = 0
    for count, signal_LT in enumerate(signals, 1):
        room_BLT[count % len(room_BLT)] = signal_LT
    return count


def _stacked(signals: Iterable[Counts], batch: int) -> int:
    count, rows = 0, []
    for signal_LT in signals:
        rows.append(signal_LT)
        if len(rows) == batch:
            np.stack(rows)
            count += batch
            rows.clear()
    return count + len(rows)


def _mapped(path: str) -> mmap.mmap:
    with Path(path).open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _buffered(path: str) -> Any:
    return Path(path).open("rb", buffering=1 << 20)


def _unbuffered(path: str) -> Any:
    return Path(path).open("rb", buffering=0)
