"""Recordings on paper: the page is at true scale, whatever the recording."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from ecgscale.data.sources import WfdbFolder
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.plot import DPI, plot_record
from ecgscale.record import Record

PX_PER_MM = 10


def make_record(leads: tuple[str, ...] = LEADS, duration_s: float = 10.0, height_mv: float = 1.0) -> Record:
    """Each lead flat at 0.5 mV, with a plateau of ``height_mv`` above it from 1.0 to 1.2 s of each 2.5 s."""
    time_s_T = np.arange(round(duration_s * 500)) / 500
    plateau_T = (time_s_T % 2.5 >= 1.0) & (time_s_T % 2.5 < 1.2)
    counts_T = np.round(500 + 1000 * height_mv * plateau_T).astype(np.int16)
    signal_LT = np.tile(counts_T, (len(leads), 1))
    return Record("a/b", signal_LT, np.full(len(leads), 1e-3, np.float32), 500.0, leads)


def ink(path: Path) -> np.ndarray:
    """(height, width) where the page is inked, by pixel."""
    return imread(path)[:, :, :3].max(axis=2) < 0.5


def size_mm(path: Path) -> tuple[float, float]:
    height, width = imread(path).shape[:2]
    return width / PX_PER_MM, height / PX_PER_MM


def test_the_page_is_at_true_scale(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    plot_record(make_record(("I",)), path)
    content = path.read_bytes()
    chunk = content.index(b"pHYs") + 4
    assert int.from_bytes(content[chunk : chunk + 4], "big") == round(DPI / 0.0254)  # dots per metre
    assert size_mm(path) == (275, 25 + 25)
    inked = ink(path)
    # The 5 mm squares are drawn in pink, so only pulse and trace have long dark horizontal lines.
    baseline = int(np.argmax(inked[200:].sum(axis=1))) + 200
    plateau_top = baseline - 10 * PX_PER_MM
    for row, start_mm, stop_mm in (
        (plateau_top, 10, 15),
        (plateau_top, 20 + 25, 20 + 30),
        (baseline, 20, 45),
    ):
        dark = inked[row - 2 : row + 3].any(axis=0)
        assert dark[start_mm * PX_PER_MM + 2 : stop_mm * PX_PER_MM - 2].all()
    dark = inked[plateau_top - 2 : plateau_top + 3].any(axis=0)
    assert not dark[16 * PX_PER_MM : 20 * PX_PER_MM].any()
    assert not dark[51 * PX_PER_MM : 80 * PX_PER_MM].any()


@pytest.mark.parametrize(
    ("leads", "duration_s", "n_rows", "width_mm"),
    [
        (LEADS, 10.0, 4, 275),
        (LEADS, 30.0, 4, 275),
        (LEADS, 9.9, 12, 275),
        (LEADS[6:] + LEADS[:1], 10.0, 4, 275),
        (LEADS[:6], 10.0, 6, 275),
        (("II",), 4.0, 1, 160),
        (("V6",), 0.002, 1, 160),
    ],
)
def test_layouts(tmp_path: Path, leads: tuple[str, ...], duration_s: float, n_rows: int, width_mm: int) -> None:
    leads = tuple(sorted(leads, key=LEADS.index))
    plot_record(make_record(leads, duration_s), tmp_path / "page.png")
    assert size_mm(tmp_path / "page.png") == (width_mm, 25 + 25 * n_rows)


def test_a_missing_lead_leaves_its_place_blank(tmp_path: Path) -> None:
    plot_record(make_record(tuple(lead for lead in LEADS if lead != "aVR")), tmp_path / "page.png")
    first_row = ink(tmp_path / "page.png")[220:450]
    block_px, left_px = 625, 200
    assert not first_row[:, left_px + block_px + 20 : left_px + 2 * block_px - 20].any()
    assert first_row[:, left_px + 2 * block_px : left_px + 3 * block_px].any()


def test_high_traces_widen_their_row_and_are_cut_at_4_mv(tmp_path: Path) -> None:
    plot_record(make_record(("I",), height_mv=3.0), tmp_path / "high.png")
    plot_record(make_record(("I",), height_mv=30.0), tmp_path / "cut.png")
    assert size_mm(tmp_path / "high.png")[1] == 25 + 35 + 10
    assert size_mm(tmp_path / "cut.png")[1] == 25 + 45 + 10


def test_odd_texts(tmp_path: Path) -> None:
    record = make_record(("I",))
    record.labels["$x_{$"] = ["\n", "医", "\udcff", "|" * 500]
    record.metadata["age"] = "$\\frac"
    plot_record(record, tmp_path / "page.png")
    assert size_mm(tmp_path / "page.png")[0] == 275


def test_refusals(tmp_path: Path) -> None:
    record = make_record(("I",))
    with pytest.raises(InputError, match=r"page.pdf: .* must end in .png"):
        plot_record(record, tmp_path / "page.pdf")
    with pytest.raises(InputError, match=r"page.png: cannot write"):
        plot_record(record, tmp_path / "gone" / "page.png")
    with pytest.raises(InputError, match="no samples"):
        plot_record(make_record(("I",), 0.0), tmp_path / "page.png")


@pytest.mark.parametrize("folder", ["cinc2021", "ecgid"])
def test_real_recordings(shared_data: Path, tmp_path: Path, folder: str) -> None:
    source = WfdbFolder(shared_data / folder, folder, ignore_leads=("ECG I filtered",))
    plot_record(source.read(source.items()[0]), tmp_path / "page.png")
    assert size_mm(tmp_path / "page.png")[0] == 275
