"""The webdataset library as a reader of our tars, as fast as it gets and as people use it.

All variants run on one core without a DataLoader, take only the payload out of a tar, decode it without ``np.load``
and fill batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import webdataset

from ecgscale.data.payload import Payload, decode
from ecgscale.lead_names import LEADS
from ecgscale.record import Counts

Reader = Callable[[], int]  # reads every record once, and says how many

DOCUMENTED = "webdataset: WebDataset().map, copied"
SHUFFLED = "webdataset: shuffle(1000), copied"
LEANEST = "webdataset: DataPipeline, copied"


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

    return {
        DOCUMENTED: lambda: _copied(dataset(), room),
        LEANEST: lambda: _copied(pipeline(), room),
        SHUFFLED: lambda: _copied(dataset(1000), room),
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
