"""WFDB folders: real ones, ones written here with known counts, and every kind of broken one."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ecgscale import record as record_module
from ecgscale.data import wfdb_formats
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.data.plausibility import BLANK
from ecgscale.data.sources import Source, SourceOptions, WfdbFolder, open_source, read_wfdb, wfdb
from ecgscale.data.wfdb_formats import FLAC_FORMATS
from ecgscale.data.wfdb_header import parse_header
from ecgscale.data.wfdb_signals import LONGER, UNSUMMED
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.record import OFFSET, Record, resample_millivolts

RATE_HZ = 500
LINE = "r.dat 16 1000(0)/mV 16 0 0"  # the checksum and the lead's name follow as needed
BITS = {"8": 8, "16": 16, "24": 24, "32": 32, "61": 16, "80": 8, "160": 16, "212": 12, "310": 10, "311": 10}
BITS |= {"508": 8, "516": 16, "524": 24}


def random_counts(n_samples: int = 301, n_leads: int = 3, bits: int = 12, seed: int = 0) -> np.ndarray:
    """(T, L), without the code for an invalid sample."""
    high = 1 << (min(bits, 16) - 1)
    return np.random.default_rng(seed).integers(-high + 1, high, (n_samples, n_leads))


def write_wfdb(folder: Path, counts_TL: np.ndarray, name: str = "r", **fields: object) -> Path:
    n_leads = counts_TL.shape[1]
    options: dict[str, object] = {
        "fs": RATE_HZ,
        "units": ["mV"] * n_leads,
        "sig_name": list(LEADS[:n_leads]),
        "fmt": ["16"] * n_leads,
        "adc_gain": [1000.0] * n_leads,
        "baseline": [0] * n_leads,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The inplace keyword in DataFrame", DeprecationWarning)  # wfdb 4.3.1
        wfdb.wrsamp(name, d_signal=counts_TL, write_dir=str(folder), **(options | fields))
    return folder / f"{name}.hea"


def pack(counts_TL: np.ndarray, format_: str) -> bytes:
    """Samples in the formats that wfdb reads and does not write, by signal(5)."""
    flat = counts_TL.reshape(-1)
    if format_ == "61":
        return flat.astype(">i2").tobytes()
    if format_ == "160":
        return (flat + 32768).astype("<u2").tobytes()
    low, middle, high = (flat.reshape(-1, 3) & 0x3FF).T
    if format_ == "311":
        return (low | middle << 10 | high << 20).astype("<u4").tobytes()
    first = (low << 1 & 0xFF | (low >> 7) << 8) | (high & 0x1F) << 11
    second = (middle << 1 & 0xFF | (middle >> 7) << 8) | (high >> 5) << 11
    return (first | second << 16).astype("<u4").tobytes()


def write_any(folder: Path, counts_TL: np.ndarray, format_: str, baseline: int = 0) -> Path:
    if format_ not in ("61", "160", "310", "311"):
        n_leads = counts_TL.shape[1]
        return write_wfdb(folder, counts_TL, fmt=[format_] * n_leads, baseline=[baseline] * n_leads)
    lines = [
        f"r.dat {format_} 1000({baseline})/mV 16 0 0 {count_T.sum() % 65536} 0 {lead}"
        for lead, count_T in zip(LEADS, counts_TL.T, strict=False)
    ]
    header = "\n".join([f"r {len(lines)} {RATE_HZ} {len(counts_TL)}", *lines])
    return write_raw(folder, header, pack(counts_TL, format_))


def write_raw(folder: Path, header: str | bytes, data: bytes = b"\0" * 2000, name: str = "r") -> Path:
    """A header as it stands, beside a data file of 1,000 zeros."""
    path = folder / f"{name}.hea"
    path.write_bytes(header if isinstance(header, bytes) else header.encode())
    (folder / "r.dat").write_bytes(data)
    return path


def edit(path: Path, change: Callable[[str], str]) -> Path:
    text = path.read_text()
    changed = change(text)
    assert changed != text
    path.write_text(changed)
    return path


def outcome_of(path: Path) -> Record | InputError:
    try:
        return read_wfdb(path)
    except InputError as error:
        return error


# --- real recordings ---


@pytest.mark.parametrize(
    ("folder", "options", "n_items", "n_samples", "n_leads"),
    [
        ("cinc2021", {}, 50, 5000, 12),
        ("cinc2011_seta", {}, 941, 5000, 12),
        ("ptbxl", {}, 1625, 5000, 12),
        ("ecgid", {"patient_key": "@folder", "ignore_leads": ("ecg i FILTERED ",)}, 227, 10_000, 1),
    ],
)
def test_real_recordings_equal_wfdb(
    shared_data: Path, folder: str, options: dict[str, object], n_items: int, n_samples: int, n_leads: int
) -> None:
    source = WfdbFolder(shared_data / folder, folder, **options)  # type: ignore[arg-type]
    items = source.items()
    assert len(items) == n_items
    assert items == sorted(items)
    for item in items[1 :: n_items // 8]:
        record = source.read(item)
        expected = wfdb.rdrecord(str(source.root / item))
        assert record.name == item
        assert record.rate_hz == RATE_HZ
        assert record.n_samples == n_samples
        swing_mv_L = np.ptp(expected.p_signal.T[:n_leads], axis=1)
        kept = np.flatnonzero(swing_mv_L > 0).tolist()  # flat leads are left out
        assert record.leads == tuple(LEADS[i] for i in kept)
        np.testing.assert_allclose(record.millivolts(), expected.p_signal.T[kept], atol=1e-6)


def test_real_labels_and_patients(shared_data: Path) -> None:
    ptbxl = WfdbFolder(shared_data / "ptbxl", "ptbxl", shared_data / "ptbxl" / "labels.csv")
    record = ptbxl.read("10000/HR10010")
    assert record.patient == "3320"
    assert record.labels["superclass"] == ["CD"]
    assert record.labels["strat_fold"] == ["4"]
    assert "form" not in record.labels
    assert "record" not in record.labels
    assert ptbxl.unlabelled() == []
    challenge = WfdbFolder(shared_data / "cinc2021", "cinc2021").read("E07500")
    assert challenge.labels == {"Dx": ["67741000119109", "426177001"]}
    assert challenge.metadata == {"age": "78", "sex": "Male"}
    assert challenge.patient is None


def test_real_damage_is_found_by_checksum(shared_data: Path) -> None:
    path = shared_data / "ecgid" / "Person_13" / "rec_2.hea"
    with pytest.raises(InputError, match=r"rec_2.hea: checksum of signal 'ECG I': the header says 54385, the data"):
        read_wfdb(path, ignore_leads=["ECG I filtered"])
    record = read_wfdb(path, ignore_leads=["ECG I filtered"], verify_checksums=False)
    assert (record.signal_LT[0, :2048] == -1).all()  # 8 KiB of 0xFF


# --- recordings with known counts ---


@pytest.mark.parametrize("format_", [f for f in BITS if f != "8"])
def test_counts_are_exact_in_every_format(tmp_path: Path, format_: str) -> None:
    counts_TL = random_counts(bits=BITS[format_])
    path = write_any(tmp_path, counts_TL, format_)
    record = read_wfdb(path)
    np.testing.assert_array_equal(record.signal_LT, counts_TL.T)
    np.testing.assert_array_equal(record.scale_L, np.float32([1e-3] * 3))
    assert read_wfdb(path.with_suffix("")).leads == ("I", "II", "III")


def mat_header(rows: int, columns: int, kind: int = 30, name: bytes = b"val\0") -> bytes:
    """Of a MATLAB file of version 4, little-endian; 30: int16."""
    return struct.pack("<5i", kind, rows, columns, 0, len(name)) + name


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (mat_header(301, 2), "MATLAB file of 301 rows and 2 columns; the header says 2 signals: it is transposed"),
        (mat_header(3, 301), "MATLAB file of 3 rows and 301 columns; the header says 2 signals$"),
        (mat_header(2, 301, 20), "a MATLAB file of int32; the header says format 16"),
        (mat_header(2, 301, 0), "a MATLAB file of double; the header says format 16"),
        (mat_header(2, 301, name=b"signal\0\0"), "samples begin at byte 28 of the MATLAB file; the header says 24"),
        (mat_header(2, 300), "truncated: 300 samples per signal, the header says 301"),
        (b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(128), "a MATLAB file of version 5 or later"),
        (bytes(range(1, 25)), "no MATLAB file of version 4, although samples begin at byte 24"),
    ],
)
def test_matlab_files_that_are_not_what_the_header_says(tmp_path: Path, head: bytes, reason: str) -> None:
    (tmp_path / "m.mat").write_bytes(head + bytes(8000))
    lines = [f"m.mat 16+24 1000/mV 16 0 0 0 0 {lead}" for lead in ("I", "II")]
    (tmp_path / "m.hea").write_text("\n".join(["m 2 500 301", *lines]))
    with pytest.raises(InputError, match=rf"m\.hea: m\.mat: .*{reason}"):
        read_wfdb(tmp_path / "m.hea")


def test_a_data_file_that_is_longer_than_its_header_says(tmp_path: Path) -> None:
    counts_TL = random_counts(n_leads=4)
    path = write_wfdb(tmp_path, counts_TL)
    edit(path, lambda text: text.replace("r 4 500 301", "r 4 500 250"))
    said = r"r\.dat holds 301 samples per signal, the header says 250"
    with pytest.raises(InputError, match=rf"the data are damaged, or the header is not theirs: {said}"):
        read_wfdb(path)
    record = read_wfdb(path, verify_checksums=False)
    assert [remark.kind for remark in record.remarks] == [LONGER]
    edit(path, lambda text: "\n".join(text.splitlines()[:-1]).replace("r 4 500 250", "r 3 500 301"))
    with pytest.raises(InputError, match=r"not theirs: r\.dat holds 401 samples per signal, the header says 301"):
        read_wfdb(path)


def test_matlab_offset_and_header_written_by_hand(tmp_path: Path) -> None:
    counts_TL = random_counts(bits=16, n_leads=2)
    (tmp_path / "m.mat").write_bytes(mat_header(2, 301) + counts_TL.astype("<i2").tobytes())
    lines = [f"m.mat 16x1+24 500(7)/uV 16 0 0 {int(counts_TL[:, i].sum())} 0 {n}" for i, n in ((0, "V6"), (1, "aVR"))]
    (tmp_path / "m.hea").write_text("\r\n".join(["# Age: 60", "m 2 360.5/360(0) 301 12:00:00 01/01/2001", *lines, ""]))
    record = read_wfdb(tmp_path / "m.hea")
    assert record.leads == ("aVR", "V6")
    assert record.rate_hz == 360.5
    assert record.metadata == {"age": "60"}
    expected_mv_LT = (counts_TL.T[::-1] - 7) / 500 * 1e-3
    np.testing.assert_allclose(record.millivolts(), expected_mv_LT, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("gain", "mv_per_count", "baseline"),
    [
        ("1000(0)/mV", 1e-3, 0),
        ("1000.0(-5)/mv", 1e-3, -5),
        ("2.5/uV", 4e-4, 3),  # baseline left out: the ADC's zero
        ("2.5/µV", 4e-4, 3),  # wfdb reads V
        ("2e5/V", 5e-3, 3),
        ("200", 5e-3, 3),
    ],
)
def test_gains_and_units(tmp_path: Path, gain: str, mv_per_count: float, baseline: int) -> None:
    path = write_raw(tmp_path, f"r 1 500 1000\nr.dat 16 {gain} 16 3 0 0 0 I\n")
    record = read_wfdb(path)
    assert record.scale_L == pytest.approx([mv_per_count])
    assert (record.signal_LT == -baseline).all()


def test_gain_left_out_is_200_per_mv() -> None:
    (line,) = parse_header(b"r 1 500 10\nr.dat 16\n").signals
    assert (line.gain, line.unit, line.baseline, line.checksum) == (200.0, "mV", 0, None)


def test_lead_names_are_normalised_and_sorted(tmp_path: Path) -> None:
    path = write_wfdb(tmp_path, random_counts(n_leads=3), sig_name=["v2", "ECG I", "AVR"])
    record = read_wfdb(path)
    assert record.leads == ("I", "aVR", "V2")
    np.testing.assert_array_equal(record.signal_LT, random_counts(n_leads=3).T[[1, 2, 0]])


def test_leads_are_renamed(tmp_path: Path) -> None:
    counts_TL = random_counts(n_leads=3)
    path = write_wfdb(tmp_path, counts_TL, sig_name=["DII", "\u0406", "LEAD_V1"])
    with pytest.raises(InputError, match=r"'DII', likely II; .* --rename-leads='DII=II'.*--ignore-leads='DII'"):
        read_wfdb(path)
    with pytest.raises(InputError, match=r"U\+0406, not I"):
        read_wfdb(path, rename_leads=[("dii", "II")])
    record = read_wfdb(path, rename_leads=[("dii", "II"), ("\u0406", "I")])
    assert record.leads == ("I", "II", "V1")
    np.testing.assert_array_equal(record.signal_LT, counts_TL.T[[1, 0, 2]])
    with pytest.raises(InputError, match=r"lead II stands 2 times \('DII', '\u0406'\)"):
        read_wfdb(path, rename_leads=[("DII", "II"), ("\u0406", "II")])


def test_ignored_leads_are_left_out_whatever_they_are(tmp_path: Path) -> None:
    counts_TL = random_counts(n_leads=4)
    path = write_wfdb(tmp_path, counts_TL, sig_name=["RESP", "I", "Pleth", "II"], units=["Ohm", "mV", "NU", "mV"])
    with pytest.raises(InputError, match="'RESP'"):
        read_wfdb(path)
    record = read_wfdb(path, ignore_leads=["resp", " PLETH"])
    np.testing.assert_array_equal(record.signal_LT, counts_TL.T[[1, 3]])
    with pytest.raises(InputError, match="all 4 signals"):
        read_wfdb(path, ignore_leads=["resp", "pleth", "i", "ii"])


@pytest.mark.parametrize("per_frame", [2, 50])
def test_several_samples_per_frame_keep_their_rate(tmp_path: Path, per_frame: int) -> None:
    """Frames may be fewer than an ECG's samples can be."""
    counts_TL = random_counts(n_samples=500, n_leads=2, bits=16)
    n_frames = 500 // per_frame
    frames = counts_TL.reshape(n_frames, per_frame, 2).transpose(0, 2, 1)  # frame, signal, sample
    line = f"r.dat 16x{per_frame} 1000(0)/mV 16 0 0"
    header = f"r 2 {n_frames} {n_frames}\n{line} {counts_TL[:, 0].sum()} 0 I\n{line} {counts_TL[:, 1].sum()} 0 II\n"
    record = read_wfdb(write_raw(tmp_path, header, frames.astype("<i2").tobytes()))
    assert record.rate_hz == 500
    np.testing.assert_array_equal(record.signal_LT, counts_TL.T)


def test_wide_counts_are_requantised_not_clipped(tmp_path: Path) -> None:
    counts_TL = np.array([[0, 0], [1_000_000, 5], [-2_000_000, -7]])
    record = read_wfdb(write_wfdb(tmp_path, counts_TL, fmt=["32", "32"]))
    np.testing.assert_array_equal(record.signal_LT[1], [0, 5, -7])
    np.testing.assert_allclose(record.millivolts(), counts_TL.T / 1000, rtol=1e-4, atol=0.05)
    assert record.signal_LT[0, 2] == -32767


@pytest.mark.parametrize("format_", ["24", "32", "524"])
def test_an_electrode_offset_is_taken_off_and_kept_apart(tmp_path: Path, format_: str) -> None:
    """300 mV at 0.05 µV per count."""
    counts_TL = random_counts(bits=12, n_leads=2) + np.array([6_000_000, 0])
    counts_TL[7, 0] = -(1 << (BITS[format_] - 1))  # invalid
    path = write_wfdb(tmp_path, counts_TL, fmt=[format_] * 2, adc_gain=[20_000.0] * 2, baseline=[-500, 0])
    record = read_wfdb(path)
    offset = round(record.offset_mv["I"] * 20_000)
    assert abs(offset - 6_000_500) < 2000
    kept_T = np.arange(len(counts_TL)) != 7
    np.testing.assert_array_equal(record.signal_LT[0].astype(int)[kept_T] + offset - 500, counts_TL[kept_T, 0])
    np.testing.assert_array_equal(record.signal_LT[1], counts_TL[:, 1])
    assert (set(record.offset_mv), record.invalid_samples) == ({"I"}, 1)
    assert [remark.kind for remark in record.remarks] == [OFFSET]
    np.testing.assert_array_equal(record.scale_L, np.float32([5e-5, 5e-5]))


@pytest.mark.parametrize(
    ("format_", "level", "baseline", "written"),
    [
        ("32", 40_000, 0, -9999),  # an offset is taken off before counts fit into int16
        ("32", 40_000, 100, -9999),
        ("32", 40_000, 100, -9899),  # -9999 without the baseline
        ("24", 6_000_000, 0, -99_999),  # so loud that counts are rounded
        ("16", 8192, 8192, -999),
    ],
)
def test_codes_for_missing_samples_are_found_in_counts_as_written(
    tmp_path: Path, format_: str, level: int, baseline: int, written: int
) -> None:
    counts_TL = random_counts(bits=10, n_leads=2) + level
    options: dict[str, object] = {"fmt": [format_] * 2, "adc_gain": [1000.0] * 2, "baseline": [baseline] * 2}
    assert read_wfdb(write_wfdb(tmp_path / "whole", counts_TL, **options)).leads == ("I", "II")
    counts_TL[40:50, 1] = written
    write_wfdb(tmp_path / "codes", counts_TL, **options)
    write_wfdb(tmp_path / "codes", counts_TL, name="again", **options)
    header = f"both/2 2 {RATE_HZ} {2 * len(counts_TL)}\nr {len(counts_TL)}\nagain {len(counts_TL)}\n"
    (tmp_path / "codes" / "both.hea").write_text(header)
    for name, n in (("r", 10), ("both", 20)):
        with pytest.raises(InputError, match=rf"{name}.hea: lead II: {n} samples are -9+, far from all others"):
            WfdbFolder(tmp_path / "codes", "set").read(name)


def test_a_count_that_happens_to_be_a_code_is_kept(tmp_path: Path) -> None:
    counts_TL = np.linspace(-9999, 40_000, 600, dtype=int)[:, None]
    assert read_wfdb(write_wfdb(tmp_path, counts_TL, fmt=["32"])).n_samples == 600


def test_the_median_of_fine_counts_is_no_electrodes_offset(tmp_path: Path) -> None:
    """16 nV a count, ±0.5 mV: more than int16 holds, and no electrode's offset."""
    counts_TL = random_counts(bits=16, n_leads=2) + 3000
    path = write_wfdb(tmp_path, counts_TL, fmt=["24"] * 2, adc_gain=[62_500.0] * 2)
    record = read_wfdb(path)
    assert set(record.offset_mv) == {"I", "II"}, "the JSON says what was taken off"
    assert record.remarks == ()


def test_differences_begin_at_the_initial_value(tmp_path: Path) -> None:
    """Format 8, which wfdb does not write."""
    steps_TL = random_counts(bits=8, n_leads=2, n_samples=1000)
    counts_TL = steps_TL.cumsum(axis=0) + np.array([-7, 300])
    lines = [
        f"r.dat 8 1000(0)/mV 8 0 {initial} {count_T.sum() % 65536} 0 {lead}\n"
        for initial, count_T, lead in zip((-7, 300), counts_TL.T, ("I", "II"), strict=True)
    ]
    path = write_raw(tmp_path, f"r 2 500 1000\n{''.join(lines)}", steps_TL.astype(np.int8).tobytes())
    np.testing.assert_array_equal(read_wfdb(path).signal_LT, counts_TL.T)
    edit(path, lambda text: text.replace(" 300 ", f" {2**40} "))
    with pytest.raises(InputError, match=rf"initial value {2**40}"):
        read_wfdb(path)


@pytest.mark.parametrize("format_", ["8", "24", "61", "212", "310", "311", "516", "524"])
def test_blocks_of_frames_join(tmp_path: Path, format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with several samples per frame, and with signals of another rate between them."""
    monkeypatch.setattr(wfdb_formats, "_BLOCK_VALUES", 100)
    monkeypatch.setattr(record_module, "_PIECE", 64)
    n_frames, flac = 501, format_ in FLAC_FORMATS  # an odd number of samples, and whole triplets
    widths = (2, 2) if flac else (2, 3, 2)
    if format_ == "8":
        steps = random_counts(n_frames * sum(widths), 1, bits=8)[:, 0].reshape(n_frames, -1)
        ends = np.cumsum(widths)
        parts = [steps[:, end - width : end].reshape(-1).cumsum() for end, width in zip(ends, widths, strict=True)]
        path = write_raw(tmp_path, "", steps.astype(np.int8).tobytes())
    else:
        parts = [random_counts(n_frames * width, 1, bits=BITS[format_], seed=i)[:, 0] for i, width in enumerate(widths)]
        if flac:
            write_wfdb(tmp_path, np.stack(parts, axis=1), fmt=[format_] * 2)
            path = tmp_path / "r.hea"
        else:
            frames = np.concatenate([part.reshape(n_frames, -1) for part in parts], axis=1)
            if format_ in ("24", "212"):
                write_wfdb(tmp_path, frames.reshape(-1, 1), fmt=[format_])
                path = tmp_path / "r.hea"
            else:
                path = write_raw(tmp_path, "", pack(frames, format_))
    names = ("I", "II") if flac else ("I", "RESP", "II")
    lines = [
        f"r.dat {format_}x{width} 1000(3)/mV 16 0 0 {part.sum() % 65536} 0 {name}\n"
        for width, part, name in zip(widths, parts, names, strict=True)
    ]
    path.write_text(f"r {len(lines)} 250 {n_frames}\n{''.join(lines)}")
    record = read_wfdb(path, ignore_leads=["resp"])
    np.testing.assert_array_equal(record.signal_LT, np.stack([parts[0], parts[-1]]) - 3)


@pytest.mark.parametrize(("format_", "rate_hz"), [("16", 500), ("16", 250), ("16", 360), ("24", 500), ("212", 500)])
def test_long_records_take_little_beyond_themselves(tmp_path: Path, format_: str, rate_hz: float) -> None:
    """An hour of four leads, 14.4 MB in int16, with a baseline and invalid samples; the second record comes on top."""
    n_samples = 3600 * RATE_HZ
    line_T = np.tile(random_counts(1000, 1), (n_samples // 1000, 1)).astype(np.int32)
    line_T[::1000] = -(1 << (BITS[format_] - 1))
    for name in ("a", "b"):
        write_wfdb(tmp_path / "set", np.repeat(line_T, 4, axis=1), name=name, fmt=[format_] * 4, baseline=[5] * 4)
    in_int16 = 2 * 4 * n_samples
    options = IngestOptions(rate_hz=rate_hz)
    resample_millivolts(np.ones((1, 9), np.float32), 500, 250)  # scipy's modules count too
    tracemalloc.start()
    try:
        ingest(WfdbFolder(tmp_path / "set", "set"), tmp_path / "out", options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Raw samples (int32 where a format has 24 bits) and counts, or counts of both rates and a lead in floats.
    assert peak < (4.5 if format_ == "24" else 3.5) * in_int16


def test_gaps_are_filled_as_by_interpolation_of_all_samples(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts_T = rng.integers(-3000, 3000, 2000)
    invalid_T = rng.random(2000) < 0.3
    invalid_T[[0, 1, -1]] = True
    path = write_wfdb(tmp_path, np.where(invalid_T, -32768, counts_T)[:, None])
    record = read_wfdb(path, max_invalid_fraction=0.5)
    valid = np.flatnonzero(~invalid_T)
    np.testing.assert_array_equal(record.signal_LT[0], np.rint(np.interp(np.arange(2000), valid, counts_T[valid])))
    assert record.invalid_samples == invalid_T.sum()


def test_skewed_signals_are_aligned(tmp_path: Path) -> None:
    late_T = np.arange(1000)
    header = f"r 1 500 1000\nr.dat 16:4 1000(0)/mV 16 0 0 {late_T.sum() % 65536} 0 I\n"
    record = read_wfdb(write_raw(tmp_path, header, late_T.astype("<i2").tobytes()))
    np.testing.assert_array_equal(record.signal_LT[0], [*range(4, 1000), 999, 999, 999, 999])
    assert record.invalid_samples == 4


@pytest.mark.parametrize("n_samples", [399, 400, 401])
def test_format_310_ends_within_a_triplet(tmp_path: Path, n_samples: int) -> None:
    """The second sample of a triplet reaches into its fourth byte; what lies behind the last sample is left out."""
    count_T = random_counts(n_samples, 1, bits=10)[:, 0]
    packed = pack(np.append(count_T, np.zeros(-n_samples % 3, count_T.dtype)), "310")
    packed = packed[: len(packed) - (2 if n_samples % 3 == 1 else 0)]
    header = f"r 1 {RATE_HZ} {n_samples}\nr.dat 310 1000/mV 16 0 0 {count_T.sum() % 65536} 0 II"
    record = read_wfdb(write_raw(tmp_path, header, packed))
    np.testing.assert_array_equal(record.signal_LT[0], count_T)


# --- invalid samples ---


@pytest.mark.parametrize("format_", ["16", "24", "32", "61", "160", "212", "310", "311", "516", "524"])
def test_few_invalid_samples_are_interpolated_and_counted(tmp_path: Path, format_: str) -> None:
    counts_TL = np.arange(399)[:, None] + np.array([[0, 50]])
    damaged_TL = counts_TL.copy()
    damaged_TL[[10, 11, 200], 0] = -(1 << (BITS[format_] - 1))
    damaged_TL[-1, 1] = -(1 << (BITS[format_] - 1))
    record = read_wfdb(write_any(tmp_path, damaged_TL, format_, baseline=5))
    counts_TL[-1, 1] = counts_TL[-2, 1]  # no neighbour behind: the last valid sample goes on
    np.testing.assert_array_equal(record.signal_LT, counts_TL.T - 5)
    assert record.invalid_samples == 4


@pytest.mark.parametrize(("n_invalid", "limit"), [(5, 0.01), (1, 0.0), (399, 0.99)])
def test_many_invalid_samples_are_refused(tmp_path: Path, n_invalid: int, limit: float) -> None:
    counts_TL = np.zeros((400, 2), int)
    counts_TL[:n_invalid, 1] = -32768
    path = write_wfdb(tmp_path, counts_TL)
    with pytest.raises(InputError, match=rf"r.hea: lead II: {n_invalid} of 400 samples are marked invalid"):
        read_wfdb(path, max_invalid_fraction=limit)


@pytest.mark.parametrize("format_", ["16", "24", "32", "61", "80", "160", "212", "310", "311", "516"])
def test_a_lead_without_a_valid_sample_is_left_out(tmp_path: Path, format_: str) -> None:
    counts_TL = np.random.default_rng(0).integers(-100, 100, (390, 3))
    damaged_TL = counts_TL.copy()
    damaged_TL[:, 1] = -(1 << (BITS[format_] - 1))
    path = write_any(tmp_path, damaged_TL, format_, baseline=5)
    for record in (read_wfdb(path), WfdbFolder(tmp_path, "set").read("r")):
        assert (record.leads, record.invalid_samples) == (("I", "III"), 0)
        np.testing.assert_array_equal(record.signal_LT, counts_TL[:, [0, 2]].T - 5)
        assert (BLANK, "II") in record.remarks
    path = write_any(tmp_path, np.full((390, 3), -(1 << (BITS[format_] - 1))), format_)
    with pytest.raises(InputError, match=r"r.hea: all samples of all leads are marked invalid"):
        read_wfdb(path)


# --- multi-segment records ---


def write_segments(folder: Path) -> np.ndarray:
    counts_TL = random_counts(n_samples=300, n_leads=2)
    for i in range(3):
        write_wfdb(folder, counts_TL[100 * i : 100 * (i + 1)], name=f"s{i}")
    (folder / "whole.hea").write_text("whole/3 2 500 300\ns0 100\ns1 100\ns2 100\n# Age: 5\n")
    return counts_TL


def test_segments_are_joined_and_not_listed(tmp_path: Path) -> None:
    counts_TL = write_segments(tmp_path / "a")
    write_wfdb(tmp_path / "b", counts_TL, name="s0")  # the same name in another folder is a record
    source = WfdbFolder(tmp_path, "set")
    assert source.items() == ["a/whole", "b/s0"]
    record = source.read("a/whole")
    np.testing.assert_array_equal(record.signal_LT, counts_TL.T)
    assert record.metadata == {"age": "5"}


def test_layout_header_gaps_and_missing_leads(tmp_path: Path) -> None:
    counts_TL = write_segments(tmp_path)
    (tmp_path / "layout.hea").write_text("layout 2 500 0\n~ 0 1000/mV 0 0 0 0 0 I\n~ 0 1000/mV 0 0 0 0 0 II\n")
    write_wfdb(tmp_path, counts_TL[:100, 1:], name="s2", sig_name=["II"])
    (tmp_path / "v.hea").write_text("v/4 2 500 210\nlayout 0\ns0 100\n~ 10\ns2 100\n")
    with pytest.raises(InputError, match="lead I: 110 of 210"):
        read_wfdb(tmp_path / "v.hea")
    record = read_wfdb(tmp_path / "v.hea", max_invalid_fraction=0.6)
    assert record.invalid_samples == 120
    np.testing.assert_array_equal(record.signal_LT[1, 110:], counts_TL[:100, 1])
    np.testing.assert_array_equal(record.signal_LT[0, 100:], [counts_TL[99, 0]] * 110)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("whole/2 2 500 200\nwhole 100\nwhole 100\n", "whole.hea: a segment that has segments itself"),
        ("whole/1 2 500 100\nother 100\n", "other.hea: a segment that has segments itself"),
        ("whole/2 2 500 200\ns0 100\ngone 100\n", "gone.hea: no such header"),
        ("whole/2 2 500 300\ns0 100\ns1 100\n", "hold 200 samples, the first line says 300"),
        ("whole/2 2 500 200\ns0 90\ns1 110\n", "s0.hea: the segment holds 100 samples, the record says 90"),
        ("whole/2 2 250 200\ns0 100\ns1 100\n", "500 Hz, the record 250 Hz"),
        ("whole/3 2 500 200\ns0 100\ns1 100\n", "claims 3 segments, 2 lines follow"),
        ("whole/1 2 500 100\n../s0 100\n", r"segment line '../s0 100'"),
        ("whole/1 2 500 100\n~ 100\n", "no segment with samples"),
        (f"whole/2 2 500 {2**61}\ns0 {2**60}\ns1 {2**60}\n", str(2**61)),
    ],
)
def test_broken_segments(tmp_path: Path, header: str, reason: str) -> None:
    write_segments(tmp_path)
    (tmp_path / "other.hea").write_text("other/1 2 500 100\nwhole 100\n")
    (tmp_path / "whole.hea").write_text(header)
    with pytest.raises(InputError, match=reason) as caught:
        read_wfdb(tmp_path / "whole.hea")
    assert str(tmp_path / "whole.hea") in str(caught.value)


# --- broken headers ---


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("", "empty header"),
        ("# Age: 3\n", "empty header"),
        ("r 1\n" + LINE + " 0 0 I\n", "'r 1' gives no sampling rate"),
        ("r\n", "'r'"),
        ("r one 500 1000\n" + LINE + " 0 0 I\n", "'one' is not a whole number"),
        ("r 1 0 1000\n" + LINE + " 0 0 I\n", "sampling rate 0 Hz"),
        ("r 1 -500 1000\n" + LINE + " 0 0 I\n", "sampling rate -500 Hz"),
        ("r 1 1e9 1000\n" + LINE + " 0 0 I\n", r"sampling rate 1e\+09 Hz; an ECG has 20 to"),
        ("r 1 nan 1000\n" + LINE + " 0 0 I\n", "sampling rate nan Hz"),
        ("r 1 fast 1000\n" + LINE + " 0 0 I\n", "sampling rate 'fast'"),
        ("r 1 60000 500\nr.dat 16x2 1000(0)/mV 16 0 0 0 0 I\n", "120000 Hz"),
        ("r 1 0.5 1000\n" + LINE + " 0 0 I\n", "sampling rate 0.5 Hz"),
        ("r 1 0.002 1000\n" + LINE + " 0 0 I\n", "period in seconds.* 500 Hz"),
        ("r 0 500 1000\n", "0 signals"),
        ("r 1 500 many\n" + LINE + " 0 0 I\n", "'many'"),
        ("r 2 500 1000\n" + LINE + " 0 0 I\n", "claims 2 signals, 1 lines follow"),
        (f"r {10**9} 500 1000\n" + LINE + " 0 0 I\n", "claims 1000000000 signals"),
        (f"r 1 500 {2**60}\n" + LINE + " 0 0 I\n", f"r.dat: truncated: 1000 .* says {2**60}"),
        ("r 1 500 1001\n" + LINE + " 0 0 I\n", "r.dat: truncated: 1000 samples .* says 1001"),
        ("r 1 500 1000\nr.dat 16x999999999 1000(0)/mV 16 0 0 0 0 I\n", "truncated|100000 Hz"),
        ("r 1 500 1000\nr.dat 16x0 1000(0)/mV 16 0 0 0 0 I\n", "'16x0'"),
        ("r 1 500 1000\nr.dat 16+999999 1000(0)/mV 16 0 0 0 0 I\n", "truncated: 0 samples"),
        ("r 1 500 1000\nr.dat 17 1000(0)/mV 16 0 0 0 0 I\n", "format '17' is unknown"),
        ("r 1 500 1000\nr.dat 0 1000(0)/mV 16 0 0 0 0 I\n", "format '0' is unknown"),
        ("r 1 500 1000\nr.dat sixteen 1000(0)/mV 16 0 0 0 0 I\n", "'sixteen'"),
        ("r 1 500 1000\nr.dat 516 1000(0)/mV 16 0 0 0 0 I\n", "not a FLAC file"),
        ("r 1 500 1000\nr.dat 16 0(0)/mV 16 0 0 0 0 I\n", "gain 0 "),
        ("r 1 500 1000\nr.dat 16 -200(0)/mV 16 0 0 0 0 I\n", "gain -200"),
        ("r 1 500 1000\nr.dat 16 inf(0)/mV 16 0 0 0 0 I\n", "gain inf"),
        ("r 1 500 1000\nr.dat 16 nan(0)/mV 16 0 0 0 0 I\n", "gain nan"),
        ("r 1 500 1000\nr.dat 16 1e999(0)/mV 16 0 0 0 0 I\n", "gain inf"),
        ("r 1 500 1000\nr.dat 16 1e-30(0)/mV 16 0 0 0 0 I\n", "gain 1e-30"),
        ("r 1 500 1000\nr.dat 16 1(0)/V 16 0 0 0 0 I\n", "1000 mV per count"),
        ("r 1 500 1000\nr.dat 16 much(0)/mV 16 0 0 0 0 I\n", "gain 'much'"),
        ("r 1 500 1000\nr.dat 16 200(x)/mV 16 0 0 0 0 I\n", "baseline 'x'"),
        (f"r 1 500 1000\nr.dat 16 200({2**62})/mV 16 0 0 0 0 I\n", f"baseline {2**62}"),
        ("r 1 500 1000\nr.dat 16 200(0)/NU 16 0 0 0 0 I\n", "unknown unit 'NU'"),
        ("r 1 500 1000\nr.dat 16 200(0)/mmHg 16 0 0 0 0 I\n", "unknown unit 'mmHg'"),
        ("r 1 500 1000\nr.dat 16 200(0)/mV 16 0 0 0 0 ABP\n", "unknown lead 'ABP'"),
        ("r 1 500 1000\nr.dat 16 200(0)/mV 16 0 0 0 0\n", "a lead without a name"),
        ("r 2 500 500\n" + 2 * (LINE + " 0 0 V1\n"), "lead V1 stands 2 times"),
        ("r 2 500 500\n" + LINE + " 0 0 V1\n" + LINE + " 0 0 ecg v1\n", "lead V1 stands 2 times"),
        ("r 2 500 300\nr.dat 16x2 200/mV 16 0 0 0 0 I\n" + LINE + " 0 0 II\n", "'I' 1000 Hz, 'II' 500 Hz"),
        ("r 2 500 300\nr.dat 212 200/mV 16 0 0 0 0 I\n" + LINE + " 0 0 II\n", "r.dat: .*unequal formats"),
        ("r 1 500 1000\ngone.dat 16 200/mV 16 0 0 0 0 I\n", "gone.dat: no such data file"),
        ("r 1 500 1000\n../r.dat 16 200/mV 16 0 0 0 0 I\n", r"data file '\.\./r.dat'"),
        ("r 1 500 1000\n/etc/passwd 16 200/mV 16 0 0 0 0 I\n", "data file '/etc/passwd'"),
        ("r 1 500 1000\nhttp://x/r.dat 16 200/mV 16 0 0 0 0 I\n", "data file 'http://x/r.dat'"),
        ("r 1 500 1000\nr.dat 16 200/mV 16 0 0 5 0 I\n", "checksum of signal 'I': the header says 5,"),
        ("r 1 500 1000\nr.dat 16 200/mV 16 0 zero 5 0 I\n", "'zero'"),
        (b"r 1 500 1000\nr.dat 16 200/mV 16 0 0 0 0 I\n# M\xfcller\n", "byte 0xfc is not UTF-8"),
        (b"MATLAB 5.0\x00\x01", "byte 0x00"),
        (bytes(range(256)), "not a text header|not UTF-8"),
        ("r 1 500 1000\n" + "x" * 5000 + "\n", "signal line 'xxx"),
    ],
)  # fmt: skip
def test_broken_headers(tmp_path: Path, header: str | bytes, reason: str) -> None:
    path = write_raw(tmp_path, header)
    with pytest.raises(InputError, match=reason) as caught:
        read_wfdb(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))


def test_interleaved_files_are_refused(tmp_path: Path) -> None:
    files = (("r", "I"), ("s", "II"), ("r", "V1"))
    lines = "".join(f"{file}.dat 16 200/mV 16 0 0 0 0 {lead}\n" for file, lead in files)
    with pytest.raises(InputError, match=r"r.dat do not stand together"):
        read_wfdb(write_raw(tmp_path, f"r 3 500 100\n{lines}"))


@pytest.mark.parametrize("format_", ["16", "212", "24", "516"])
def test_truncated_and_damaged_data(tmp_path: Path, format_: str) -> None:
    path = write_wfdb(tmp_path, random_counts(n_samples=5000), fmt=[format_] * 3)
    data_path = tmp_path / "r.dat"
    content = data_path.read_bytes()
    for size in (0, 30, len(content) // 2, len(content) - 1):
        data_path.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"r.hea: "):
            read_wfdb(path)
    damaged = content[:-45] + bytes([content[-45] ^ 0x10]) + content[-44:]  # a low byte: the checksum has 16 bits
    data_path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"r.hea: "):
        read_wfdb(path)


def test_checksums_of_0_are_none(tmp_path: Path) -> None:
    counts_TL = random_counts()
    path = write_wfdb(tmp_path, counts_TL)
    sums = [int(count_T.sum()) % 65536 for count_T in counts_TL.T]
    assert read_wfdb(path).remarks == ()
    edit(path, lambda text: text.replace(f" {sums[0]} 0 I\n", " 0 0 I\n"))
    with pytest.raises(InputError, match=f"checksum of signal 'I': the header says 0, the data give {sums[0]}"):
        read_wfdb(path)
    for value, lead in zip(sums[1:], LEADS[1:], strict=False):
        edit(path, lambda text, old=f" {value} 0 {lead}\n", new=f" 0 0 {lead}\n": text.replace(old, new))
    (tmp_path / "whole.hea").write_text("whole/1 3 500 301\nr 301\n")
    for record in (read_wfdb(path), read_wfdb(tmp_path / "whole.hea")):
        np.testing.assert_array_equal(record.signal_LT, counts_TL.T)
        assert record.remarks == ((UNSUMMED, ""),)
    flat = write_wfdb(tmp_path / "flat", np.zeros((301, 3), int))
    assert read_wfdb(flat).remarks == (), "its sums are 0"


def test_flac_that_claims_too_much(tmp_path: Path) -> None:
    path = write_wfdb(tmp_path, random_counts(), fmt=["516"] * 3)
    content = bytearray((tmp_path / "r.dat").read_bytes())
    content[22:26] = b"\xff" * 4
    (tmp_path / "r.dat").write_bytes(content)
    edit(path, lambda text: text.replace(" 301", " 4000000000"))
    with pytest.raises(InputError, match="FLAC cannot pack so many"):
        read_wfdb(path)


@pytest.mark.parametrize("length", ["", " 0"])
@pytest.mark.parametrize("format_", [f for f in BITS if f != "8"])
def test_length_left_out_follows_from_the_file(tmp_path: Path, format_: str, length: str) -> None:
    counts_TL = random_counts(n_samples=306, bits=BITS[format_])
    path = edit(write_any(tmp_path, counts_TL, format_), lambda text: text.replace(" 306", length, 1))
    assert parse_header(path.read_bytes()).n_frames is None
    np.testing.assert_array_equal(read_wfdb(path).signal_LT, counts_TL.T)


def test_length_left_out_needs_files_of_equal_lengths(tmp_path: Path) -> None:
    header = f"r 2 500\n{LINE} 0 0 I\ns.dat 16 1000(0)/mV 16 0 0 0 0 II\n"
    path = write_raw(tmp_path, header)
    for n_samples, reason in ((1001, "s.dat: 1001 samples per signal; .*no number and r.dat holds 1000"),
                              (999, "s.dat: truncated: 999 samples .*no number and r.dat holds 1000")):  # fmt: skip
        (tmp_path / "s.dat").write_bytes(bytes(2 * n_samples))
        with pytest.raises(InputError, match=reason):
            read_wfdb(path)
    (tmp_path / "s.dat").write_bytes(bytes(2000))
    assert read_wfdb(path).n_samples == 1000


def test_length_left_out_of_the_header_of_segments(tmp_path: Path) -> None:
    counts_TL = write_segments(tmp_path)
    for name in ("s0", "s1"):
        edit(tmp_path / f"{name}.hea", lambda text: text.replace(" 100", " 0", 1))
    edit(tmp_path / "whole.hea", lambda text: text.replace(" 300", " 0", 1))
    np.testing.assert_array_equal(read_wfdb(tmp_path / "whole.hea").signal_LT, counts_TL.T)
    edit(tmp_path / "whole.hea", lambda text: text.replace("s0 100", "s0 101"))
    with pytest.raises(InputError, match=r"s0.hea: .*truncated: 100 samples per signal, the header says 101"):
        read_wfdb(tmp_path / "whole.hea")


def test_paths_that_are_no_records(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", Path(), tmp_path):
        with pytest.raises(InputError):
            read_wfdb(path)
    (tmp_path / "folder.hea").mkdir()
    os.mkfifo(tmp_path / "pipe.hea")
    for name in ("folder", "pipe"):
        with pytest.raises(InputError, match="no such header"):
            read_wfdb(tmp_path / name)


@pytest.mark.parametrize("folder", ["[1]", "a*b", "a b", "ä", "~", "file:"])
def test_odd_folder_names(tmp_path: Path, folder: str) -> None:
    path = write_wfdb(tmp_path / "plain", random_counts(), fmt=["212"] * 3)
    odd = tmp_path / folder
    path.parent.rename(odd)
    np.testing.assert_array_equal(read_wfdb(odd / "r.hea").signal_LT, random_counts().T)


def test_a_path_that_wfdb_would_misread(tmp_path: Path) -> None:
    for name in ("212", "516"):
        write_wfdb(tmp_path / "plain", random_counts(), name=f"r{name}", fmt=[name] * 3)
    (tmp_path / "plain").rename(tmp_path / "a::b")
    np.testing.assert_array_equal(read_wfdb(tmp_path / "a::b" / "r212.hea").signal_LT, random_counts().T)
    with pytest.raises(InputError, match="'::' in the path"):
        read_wfdb(tmp_path / "a::b" / "r516.hea")


def test_mutated_headers_and_data_give_a_record_or_an_input_error(tmp_path: Path) -> None:
    """2,500 mutations. In wfdb itself such headers raise 8 types of exceptions, or exhaust the memory."""
    rng = random.Random(0)
    write_segments(tmp_path)
    targets = [tmp_path / "whole.hea", write_wfdb(tmp_path, random_counts(), name="plain")]
    for fmt in ("212", "516", "80"):
        targets.append(write_wfdb(tmp_path, random_counts(bits=BITS[fmt]), name=f"f{fmt}", fmt=[fmt] * 3))
    outcomes = {Record: 0, InputError: 0}
    for target in targets:
        original = target.read_bytes()
        for _ in range(500):
            mutated = bytearray(original)
            for _ in range(rng.choice((1, 1, 2, 5))):
                i = rng.randrange(len(mutated))
                match rng.randrange(3):
                    case 0:
                        mutated[i] = rng.randrange(256)
                    case 1:
                        mutated[i : i + 1] = rng.choice((b"", b"9" * 20, b" ", b"\n", b"-", b"/", b"0", b"."))
                    case _:
                        mutated[i] ^= 1 << rng.randrange(8)
            target.write_bytes(mutated)
            outcome = outcome_of(target)
            if isinstance(outcome, Record):
                assert np.isfinite(outcome.millivolts()).all()
                assert outcome.rate_hz > 0
            else:
                assert str(target) in str(outcome)
            outcomes[type(outcome)] += 1
        target.write_bytes(original)
        read_wfdb(target)
    assert min(outcomes.values()) > 100


# --- folders ---


def test_names_with_dots(tmp_path: Path) -> None:
    """As those of timestamps and DICOM's identifiers, beside one that is the beginning of another."""
    counts = {name: random_counts(seed=i) for i, name in enumerate(("1.2.840", "1.2", "2026-11-30.x"))}
    for name, counts_TL in counts.items():
        path = write_wfdb(tmp_path / "in", counts_TL)
        text = path.read_text().replace("r.dat", f"{name}.dat").replace("r 3", f"{name} 3", 1)
        (tmp_path / "in" / f"{name}.hea").write_text(text)
        path.with_name("r.dat").rename(path.with_name(f"{name}.dat"))
        path.unlink()
    (tmp_path / "in" / "whole.1.hea").write_text("whole.1/1 3 500 301\n1.2 301\n")
    table = tmp_path / "labels.csv"
    table.write_text("record,rhythm\n1.2.840,a\n2026-11-30.x.dat,c\n")
    source = WfdbFolder(tmp_path / "in", "set", labels_csv=table)
    assert source.items() == ["1.2.840", "2026-11-30.x", "whole.1"]
    assert [source.read(item).labels for item in source.items()] == [{"rhythm": ["a"]}, {"rhythm": ["c"]}, {}]
    for item in (*counts, "whole.1"):
        record = read_wfdb(tmp_path / "in" / item)
        assert record.name == item
        np.testing.assert_array_equal(record.signal_LT, counts.get(item, counts["1.2"]).T)
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "in")
    packed = open_source(tmp_path / "packed.zip", SourceOptions())
    assert packed.items() == source.items()
    for item in source.items():
        np.testing.assert_array_equal(packed.read(item).signal_LT, source.read(item).signal_LT)


def test_a_baseline_that_is_written_as_a_float(tmp_path: Path) -> None:
    path = write_wfdb(tmp_path, random_counts(), baseline=[7, 7, 7])
    expected = read_wfdb(path).signal_LT
    edit(path, lambda text: text.replace("(7)", "(7.0)"))
    np.testing.assert_array_equal(read_wfdb(path).signal_LT, expected)
    edit(path, lambda text: text.replace("(7.0)", "(7.5)"))
    with pytest.raises(InputError, match=r"baseline '7\.5' is not a whole number"):
        read_wfdb(path)


def test_items_of_a_folder(tmp_path: Path) -> None:
    for name in ("b/z", "b/y", "a"):
        path = tmp_path / name
        write_wfdb(path.parent, random_counts(), name=path.name)
    (tmp_path / ".hea").touch()
    source: Source = WfdbFolder(tmp_path, "set")
    assert source.items() == ["a", "b/y", "b/z"]
    assert source.read("b/y").name == "b/y"
    assert pickle.loads(pickle.dumps(source)) == source


def test_folders_without_records(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "gone"):
        with pytest.raises(InputError, match=str(root)):
            WfdbFolder(root, "set").items()


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside = write_wfdb(tmp_path / "outside", random_counts())
    root = tmp_path / "root"
    write_wfdb(root, random_counts(), name="own")
    (root / "r.hea").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent)
    (root / "inner.hea").symlink_to(root / "own.hea")
    (root / "circle.hea").symlink_to(root / "circle.hea")
    source = WfdbFolder(root, "set")
    assert source.items() == ["circle", "inner", "own"]
    assert source.read("inner").leads == LEADS[:3]
    for item in ("r", "folder/r", "../outside/r", "circle"):
        with pytest.raises(InputError, match=f"{item}.hea: (lies outside|no such)"):
            source.read(item)
    (root / "own.dat").rename(outside.parent / "moved.dat")
    (root / "own.dat").symlink_to(outside.parent / "moved.dat")
    with pytest.raises(InputError, match=r"own.hea: own.dat: lies outside"):
        source.read("own")


# --- labels, metadata, patients ---


def with_comments(folder: Path, *comments: str, name: str = "r") -> Path:
    return write_wfdb(folder, random_counts(), name=name, comments=list(comments))


def test_comments(tmp_path: Path) -> None:
    comments = (
        "AGE: 61",
        "Sex: Unknown",
        "Dx: 1, 2,,Unknown",
        "Rx: NaN",
        "Hx:",
        "Note: a: b",
        "free text",
        "Note: c",
    )
    record = read_wfdb(with_comments(tmp_path, *comments, "Subject_ID: 7"))
    assert record.metadata == {"age": "61", "Note": "a: b | c"}  # nothing is lost of a key that stands twice
    assert record.labels == {"Dx": ["1", "2"]}
    assert record.patient == "7"


def test_patient_keys(tmp_path: Path) -> None:
    path = with_comments(tmp_path / "p1", "Name: Jo", "PatientID: 5")
    assert read_wfdb(path).patient == "5"
    assert read_wfdb(path, patient_key="name").patient == "Jo"
    assert read_wfdb(path, patient_key="@folder").patient == "p1"
    assert "Name" not in read_wfdb(path, patient_key="name").metadata
    with pytest.raises(InputError, match=r"r.hea: no patient 'pid'"):
        read_wfdb(path, patient_key="pid")
    assert WfdbFolder(tmp_path, "set", patient_key="@folder").read("p1/r").patient == "p1"
    with pytest.raises(InputError, match="in the root itself"):
        WfdbFolder(path.parent, "set", patient_key="@folder").read("r")


def labelled(tmp_path: Path, table: str, **options: object) -> WfdbFolder:
    for name in ("a/x", "a/y", "b/z"):
        path = tmp_path / "set" / name
        with_comments(path.parent, "Age: 50", "Dx: 9", "PatientID: c", name=path.name)
    csv_path = tmp_path / "set" / "labels.csv"
    csv_path.write_text(table)
    return WfdbFolder(tmp_path / "set", "set", csv_path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["a/x", "a/x.hea", "a/x.mat", "x", "x.dat", "./a/x"])
def test_labels_of_a_record(tmp_path: Path, value: str) -> None:
    table = f"record,Patient_ID,Sex,age,rhythm,form\n{value},4,F,,SR | AF|,\nnot/there,5,M,1,,\n"
    source = labelled(tmp_path, table)
    record = source.read("a/x")
    assert record.labels == {"Dx": ["9"], "rhythm": ["SR", "AF"]}
    assert record.metadata == {"sex": "F", "age": "50"}
    assert record.patient == "4"
    assert source.read("a/y").patient == "c"
    assert source.unlabelled() == ["a/y", "b/z"]


def test_the_record_column_is_the_first_that_names_a_record(tmp_path: Path) -> None:
    source = labelled(tmp_path, "ecg_id,filename,subject_id,n\n1,b/z,3,5\n")
    record = source.read("b/z")
    assert record.labels["ecg_id"] == ["1"]
    assert record.labels["n"] == ["5"]
    assert record.patient == "3"
    assert labelled(tmp_path / "2", "ecg_id,file\n1,b/z\n", record_column="File").unlabelled() == [
        "a/x",
        "a/y",
    ]


def test_paths_below_the_folder_of_the_table(tmp_path: Path) -> None:
    source = labelled(tmp_path, "record,n\n")
    table = tmp_path / "labels.csv"
    table.write_text("filename_hr,n\nset/a/x,1\n")
    assert WfdbFolder(source.root, "set", table).read("a/x").labels["n"] == ["1"]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("", "no column record or filename"),
        ("file,n\na/x,1\n", "the columns are file, n"),
        ("record,n\n", "names no record"),
        ("record,n\nc/x,1\n", "names no record .* it says 'c/x', a record is called 'a/x'"),
        (
            "record,n\na/x,1\na/y,1\na/x.hea,2\n",
            "line 4: record a/x stands twice, first in line 2; each may have one row",
        ),
        ("record,n\na/x,1,2\n", "line 2 has 3 fields"),
        ("record,n,n\na/x,1,2\n", "column 'n' stands 2 times"),
        ('record,n\n"a/x,1\n', "not a readable CSV"),
    ],
)
def test_broken_tables(tmp_path: Path, table: str, reason: str) -> None:
    source = labelled(tmp_path, table)
    with pytest.raises(InputError, match=reason) as caught:
        source.items()
    assert str(source.labels_csv) in str(caught.value)


def test_other_broken_tables(tmp_path: Path) -> None:
    source = labelled(tmp_path, "record,n\na/x,1\n", record_column="path")
    with pytest.raises(InputError, match="no column path"):
        source.items()
    with pytest.raises(InputError, match=r"gone.csv: not a readable CSV"):
        WfdbFolder(source.root, "set", tmp_path / "gone.csv").items()
    (tmp_path / "mac.csv").write_bytes(b"record,n\na/x,\x9f\n")
    with pytest.raises(InputError, match=r"mac.csv: line 2: the byte 0x9F is no UTF-8.*: not a readable CSV of labels"):
        WfdbFolder(source.root, "set", tmp_path / "mac.csv").items()
    with_comments(source.root / "c", name="x")
    (tmp_path / "twice.csv").write_text("record,n\nx,1\n")
    with pytest.raises(InputError, match=r"line 2: record 'x' could be a/x or c/x"):
        WfdbFolder(source.root, "set", tmp_path / "twice.csv").items()
