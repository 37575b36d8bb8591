"""Checks of the shared cases about WFDB headers and samples, names of leads, and memory."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from case_check import case, ecgscale

from ecgscale.data.shard_set import ShardSet
from ecgscale.data.wfdb_header import parse_header
from ecgscale.record import Record


def ingested(source: Path, out: Path, *options: object) -> dict[str, Record]:
    """The records of a folder, by name."""
    said = ecgscale("ingest", source, out, "--workers", 1, *options)
    assert said.code == 0, said.text
    shards = ShardSet.open(out)
    return {(record := shards.record(number)).name: record for number in range(len(shards))}


def raw_24(path: Path, n_signals: int) -> np.ndarray:
    """(T, L) of format 24."""
    wide = np.zeros((path.stat().st_size // 3, 4), np.uint8)
    wide[:, 1:] = np.fromfile(path, np.uint8).reshape(-1, 3)
    return (wide.reshape(-1).view("<i4") >> 8).reshape(-1, n_signals)


@case("offset-24-bit")
def offset_24_bit(folder: Path, scratch: Path) -> str:
    finest_uv = []
    for name, record in ingested(folder, scratch / "set").items():
        lines = parse_header((folder / f"{name}.hea").read_bytes()).signals
        counts_TL = raw_24(folder / lines[0].file_name, len(lines))
        for row, line in enumerate(lines):
            given_mv_T = (counts_TL[:, row] - line.baseline) * line.mv_per_count()
            kept_mv_T = record.millivolts()[row]
            assert np.abs((given_mv_T - np.median(given_mv_T)) - (kept_mv_T - np.median(kept_mv_T))).max() < 1e-3
            finest_uv.append(1000 * float(record.scale_L[row]))
    return f"steps of {max(finest_uv):.3g} µV at most"


@case("header-zero-samples")
def header_zero_samples(folder: Path, scratch: Path) -> str:
    records = ingested(folder, scratch / "set")
    assert set(records) == {path.stem for path in folder.glob("*.hea")}
    for name, record in records.items():
        lines = parse_header((folder / f"{name}.hea").read_bytes()).signals
        counts_TL = np.fromfile(folder / lines[0].file_name, "<i2").reshape(-1, len(lines))
        np.testing.assert_array_equal(record.signal_LT, counts_TL.T)
    return ", ".join(f"{name} {record.n_samples} samples" for name, record in sorted(records.items()))


@case("lead-names")
def lead_names(folder: Path, scratch: Path) -> str:
    as_they_are = ingested(folder, scratch / "first")
    rejected = (scratch / "first" / "rejected.csv").read_text().splitlines()[1:]
    names = {path.stem for path in folder.glob("*.hea")}
    assert {"ecg_", "lead_"} <= set(as_they_are)
    assert len(as_they_are) + len(rejected) == len(names)
    assert all("--rename-leads" in row and "--ignore-leads" in row for row in rejected)
    odd = [row for row in rejected if not row.isascii()]
    assert odd
    assert all("U+0406, not I" in row for row in odd)
    renames = "DI=I,DII=II,I (raw)=I,II (raw)=II,MLII=II,\u0406=I"
    renamed = ingested(folder, scratch / "second", "--rename-leads", renames)
    assert set(renamed) == names
    for name, record in renamed.items():
        lines = parse_header((folder / f"{name}.hea").read_bytes()).signals
        counts_TL = np.fromfile(folder / lines[0].file_name, "<i2").reshape(-1, len(lines))
        assert record.leads == (("II", "V5") if name == "mlii" else ("I", "II"))
        np.testing.assert_array_equal(record.signal_LT, counts_TL.T)
    return f"{len(as_they_are)} of {len(names)} as they are, all with --rename-leads"


_MEASURED = """
import resource, sys
from ecgscale.cli import main
main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@case("holter-memory")
def holter_memory(folder: Path, scratch: Path) -> str:
    source = scratch / "source"
    source.mkdir()
    shutil.copy(folder / "make.py", source)
    subprocess.run([sys.executable, "make.py"], cwd=source, check=True)
    raw_mb = sum(path.stat().st_size for path in source.glob("*.dat")) / (1 << 20)
    peaks_mb = []
    for rate_hz in (500, 250, 360):
        command = ("ingest", source, scratch / f"set-{rate_hz}", "--workers", "1", "--rate-hz", str(rate_hz))
        ended = subprocess.run(
            [sys.executable, "-c", _MEASURED, *map(str, command)], capture_output=True, text=True, check=True
        )
        peaks_mb.append(float(ended.stdout.split()[-1]))
    own_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert max(peaks_mb) < 6 * raw_mb, peaks_mb
    return f"{raw_mb:.0f} MB raw, peak {' '.join(f'{peak:.0f}' for peak in peaks_mb)} MB (this process: {own_mb:.0f})"
