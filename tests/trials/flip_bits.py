"""Flip random bits of every kind of file that we write and read back: what comes of it is refused, or equal to the bit.

    .venv/bin/python tests/trials/flip_bits.py [FLIPS] [SEED]

Prints a table: of each kind how many flips were refused in one line, how many were mended (fetched or converted again)
and how many made no difference. Exit code 1 where one was believed, or ended in anything but one line.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import io
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import ecgscale
from ecgscale.data.ingest import IngestOptions, ingest, ingest_part
from ecgscale.data.remote import CacheConfig
from ecgscale.data.shard_set import ShardSet
from ecgscale.errors import InputError, MachineError
from ecgscale.export import Profile, about_model, write_export
from ecgscale.lead_names import LEADS
from ecgscale.model.encoder import ECGEncoder, ModelConfig
from ecgscale.simulate import Simulation
from ecgscale.studies import read_result, write_result

OPTIONS = IngestOptions(rate_hz=250, records_per_shard=8)
SOURCE = Simulation(patients=12, duration_s=5, rate_hz=250)
RESULT = {"12 leads": {"auroc": {"value": 0.93125, "low": 0.9, "high": 0.95}}, "2 leads": {"auroc": {"value": 0.87}}}


def content_of(place: str | Path, cache: Path | None = None) -> str:
    """Digest of everything that can be asked of a data set."""
    shards = ShardSet.open(place, CacheConfig(folder=str(cache)) if cache else None)
    digest = hashlib.sha256(repr((shards.rate_hz, shards.names, len(shards))).encode())
    for name in sorted(shards.sets[0].columns):
        if "offset" not in name and "length" not in name:
            digest.update(np.ascontiguousarray(shards.column(name)))
    for number in range(len(shards)):
        digest.update(shards.signal(number).tobytes())
        digest.update(repr(shards.metadata(number)).encode())
    return digest.hexdigest()


def embedding_of(export: Path) -> str:
    """Digest of what a model makes of one ECG."""
    ecg_LT = np.random.default_rng(0).normal(size=(12, 1250)).astype(np.float32)
    model = ecgscale.load(export)
    return hashlib.sha256(model.embed(ecg_LT, 250, LEADS).record_embedding.tobytes()).hexdigest() + repr(model.about)


def files_of(folder: Path) -> str:
    """Digest of a finished data set's files."""
    return repr([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(folder.iterdir())])


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
    return bytes(changed)


def trial(file: Path, use: Callable[[], str], flips: int, rng: np.random.Generator) -> Counter[str]:
    """Flip one bit of a file at a time, use it, and put it back."""
    whole, right = file.read_bytes(), use()
    outcomes: Counter[str] = Counter()
    for _ in range(flips):
        damaged = flipped(whole, rng)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(damaged)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                same = use() == right
        except (InputError, MachineError) as error:
            outcomes["refused" if "\n" not in str(error) and len(str(error)) < 1000 else "NOT ONE LINE"] += 1
        except Exception as error:  # whatever a flip brings about is what the table shows
            outcomes[f"{type(error).__name__.upper()}: {str(error)[:60]}"] += 1
        else:
            mended = file.exists() and file.read_bytes() == whole
            outcomes[("mended" if mended else "no difference") if same else "BELIEVED"] += 1
        file.write_bytes(whole)
    return outcomes


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def small_export(folder: Path) -> Path:
    model = ModelConfig(preset="tiny", stem_channels=16, width=32, depth=2, heads=2, ffn_width=64, position_kernel=16)
    torch.manual_seed(0)
    weights = {f"encoder.{name}": tensor for name, tensor in ECGEncoder(model).state_dict().items()}
    return write_export(folder, weights, about_model(model, Profile(250.0, 5.0, "mv"), step=3))


def kinds(base: Path) -> dict[str, tuple[Path, Callable[[], str]]]:
    """What is flipped, and how it is used."""
    found: dict[str, tuple[Path, Callable[[], str]]] = {}
    for payload in ("pco", "npy"):
        folder = base / payload
        ingest(SOURCE, folder, IngestOptions(rate_hz=250, records_per_shard=8, payload=payload))
        found[f"tar of {payload}"] = folder / "shard-000001.tar", functools.partial(content_of, folder)
    found["index"] = next(folder.glob("index-*")), functools.partial(content_of, folder)
    found["manifest"] = folder / "manifest.json", functools.partial(content_of, folder)

    export = small_export(base / "export")
    for name in ("config.json", "model.safetensors"):
        found[f"export's {name}"] = export / name, functools.partial(embedding_of, export)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(base)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, cache = f"http://127.0.0.1:{server.server_port}/npy", base / "cache"
    remote = functools.partial(content_of, url, cache)
    remote()
    for name, file in (("index", found["index"][0]), ("tar", folder / "shard-000001.tar")):
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        found[f"cached {name}"] = cache / sha256[:2] / sha256, remote

    parts = base / "parts"
    ingest_part(SOURCE, parts, OPTIONS, (1, 1))

    def finished() -> str:
        again = Path(shutil.copytree(parts, base / "again"))
        try:
            ingest(SOURCE, again, OPTIONS)
            return files_of(again)
        finally:
            shutil.rmtree(again)

    found["part file"] = parts / "shard-000001.part.safetensors", finished
    found["ingest's mark"] = parts / "ingest.unfinished", finished

    result = base / "result.json"
    write_result(result, RESULT)
    found["result.json"] = result, lambda: repr(read_result(result))
    return found


def main(flips: int = 60, seed: int = 0) -> int:
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="flips-") as scratch:
        for number, (kind, (file, use)) in enumerate(kinds(Path(scratch)).items()):
            outcomes = trial(file, use, flips, np.random.default_rng([seed, number]))
            wrong += sum(count for outcome, count in outcomes.items() if outcome[0].isupper())
            print(f"{kind:<28} {', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())}", flush=True)
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
