"""A recording on paper as cardiologists expect it: 25 mm/s, 10 mm/mV, 3 x 4 leads over a rhythm strip.

Shape suffixes: L leads, T samples. All places on the page are in mm from its lower left corner.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from ecgscale.errors import InputError
from ecgscale.files import whole_file
from ecgscale.lead_names import LEADS
from ecgscale.record import Record

MM_PER_S = 25.0
MM_PER_MV = 10.0
DPI = 254  # ten pixels per mm, so that every line of the grid falls on a pixel

_SHOWN_S = 10.0
_BLOCK_S = 2.5
_BLOCKS = (LEADS[0:3], LEADS[3:6], LEADS[6:9], LEADS[9:12])  # columns of the 3 x 4 layout
_BORDER_MM = 5.0  # around the grid
_HEADER_MM = 15.0  # three lines of text above the grid
_PULSE_MM = 15.0  # the left end of each row, with the calibration pulse
_PULSE_S = 0.2
_MIN_WIDTH_MM = 150.0  # for the text
_ROOM_MM = (10.0, 40.0)  # above and below a baseline: at least, at most
_NAME_MM = 8.0  # the longest name of a lead
_MM_PER_CHARACTER = 1.75
_INCHES_PER_MM = 1 / 25.4
_PAPER, _FINE, _COARSE, _INK = "#fffafa", "#f8d5d5", "#eda5a5", "#101020"


@dataclass(frozen=True)
class _Strip:
    """A piece of a lead and where it begins."""

    lead: str
    row: int
    start_s: float
    stop_s: float


@dataclass(frozen=True)
class _Page:
    width_mm: float
    height_mm: float
    baselines_mm: tuple[float, ...]  # of the rows, from the top
    cut: bool  # whether a trace is too high for its row


def plot_record(record: Record, path: Path) -> None:
    """Write a recording as a PNG at true scale: printed at the DPI it states it has 25 mm/s and 10 mm/mV.

    Recordings of more than six leads and at least 10 s stand in the usual 3 rows of 4 leads, 2.5 s each, one
    after the other in time; a lead that is missing leaves its place blank. Below runs a rhythm strip of
    lead II, or of the first lead that exists. Other recordings stand in one row per lead. Of long recordings
    the first 10 s are shown. For display only, each lead's median over what is shown is subtracted, so
    constant offsets are not seen. A trace that leaves its baseline by more than 4 mV is cut there, and the
    text says so.

    Raises InputError if the path does not end in .png or is wrong, or if there are no samples; MachineError where the
    disk fails.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: recordings are drawn as PNG; the name must end in .png")
    if record.n_samples == 0:
        raise InputError(f"{record.name}: no samples to draw")
    shown_s = min(_SHOWN_S, record.duration_s)
    shown_mv_LT = record.millivolts()[:, : max(1, round(shown_s * record.rate_hz))]
    height_mm_LT = (shown_mv_LT - np.median(shown_mv_LT, axis=1, keepdims=True)) * MM_PER_MV
    traces = dict(zip(record.leads, height_mm_LT, strict=True))
    strips = _layout(record.leads, record.duration_s)
    page = _page(strips, traces, record.rate_hz, shown_s)

    figure = Figure((page.width_mm * _INCHES_PER_MM, page.height_mm * _INCHES_PER_MM), DPI, facecolor=_PAPER)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, page.width_mm), ylim=(0, page.height_mm))
    axes.set_axis_off()
    _draw_grid(axes, page)
    _draw_pulses(axes, page)
    for strip in strips:
        _draw_strip(axes, page, strip, traces[strip.lead], record.rate_hz)
    _draw_text(axes, page, record, shown_s)
    with whole_file(path) as partial, warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes; that is no reason to warn.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        canvas.print_png(partial)  # type: ignore[no-untyped-call]  # savefig would obey a user's matplotlibrc


def _layout(leads: Sequence[str], duration_s: float) -> list[_Strip]:
    shown_s = min(_SHOWN_S, duration_s)
    if len(leads) <= 6 or duration_s < _SHOWN_S:
        return [_Strip(lead, row, 0.0, shown_s) for row, lead in enumerate(leads)]
    strips = [
        _Strip(lead, row, column * _BLOCK_S, (column + 1) * _BLOCK_S)
        for column, block in enumerate(_BLOCKS)
        for row, lead in enumerate(block)
        if lead in leads
    ]
    return [*strips, _Strip("II" if "II" in leads else leads[0], 3, 0.0, shown_s)]


def _page(
    strips: Sequence[_Strip], traces: dict[str, npt.NDArray[np.float32]], rate_hz: float, shown_s: float
) -> _Page:
    """The size of the page: each row takes as many 5 mm squares above and below its baseline as it needs."""
    n_rows = max(strip.row for strip in strips) + 1
    low, high = _ROOM_MM
    above_mm, below_mm = [low] * n_rows, [low] * n_rows
    for strip in strips:
        height_mm_T = _piece(strip, traces[strip.lead], rate_hz)
        above_mm[strip.row] = max(above_mm[strip.row], float(height_mm_T.max(initial=0)))
        below_mm[strip.row] = max(below_mm[strip.row], float(-height_mm_T.min(initial=0)))
    cut = max(*above_mm, *below_mm) > high
    # 5 mm more above the baseline, for the lead's name
    above_mm = [5 * math.ceil(min(room, high) / 5 - 1e-3) + 5 for room in above_mm]
    below_mm = [5 * math.ceil(min(room, high) / 5 - 1e-3) for room in below_mm]
    height_mm = 2 * _BORDER_MM + _HEADER_MM + sum(above_mm) + sum(below_mm)
    baselines_mm = []
    y_mm = height_mm - _BORDER_MM - _HEADER_MM
    for above, below in zip(above_mm, below_mm, strict=True):
        baselines_mm.append(y_mm - above)
        y_mm -= above + below
    width_mm = 2 * _BORDER_MM + max(_MIN_WIDTH_MM, _PULSE_MM + 5 * math.ceil(shown_s * MM_PER_S / 5))
    return _Page(width_mm, height_mm, tuple(baselines_mm), cut)


def _piece(strip: _Strip, height_mm_T: npt.NDArray[np.float32], rate_hz: float) -> npt.NDArray[np.float32]:
    return height_mm_T[round(strip.start_s * rate_hz) : round(strip.stop_s * rate_hz)]


def _draw_grid(axes: Axes, page: _Page) -> None:
    right_mm, top_mm = page.width_mm - _BORDER_MM, page.height_mm - _BORDER_MM - _HEADER_MM
    for step_mm, colour, width in ((1, _FINE, 0.28), (5, _COARSE, 0.57)):
        x_mm = np.arange(_BORDER_MM, right_mm + 0.5, step_mm)
        y_mm = np.arange(_BORDER_MM, top_mm + 0.5, step_mm)
        lines = [((x, _BORDER_MM), (x, top_mm)) for x in x_mm] + [((_BORDER_MM, y), (right_mm, y)) for y in y_mm]
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, antialiaseds=False))


def _draw_pulses(axes: Axes, page: _Page) -> None:
    """1 mV for 200 ms at the left of each row."""
    width_mm = _PULSE_S * MM_PER_S
    start_mm = _BORDER_MM + 5.0
    x_mm = np.array([start_mm - 2.5, start_mm, start_mm, start_mm + width_mm, start_mm + width_mm, start_mm + 7.5])
    pulse_mm = np.array([0.0, 0.0, MM_PER_MV, MM_PER_MV, 0.0, 0.0])
    for baseline_mm in page.baselines_mm:
        axes.plot(x_mm, baseline_mm + pulse_mm, color=_INK, linewidth=0.8, solid_joinstyle="miter")


def _draw_strip(axes: Axes, page: _Page, strip: _Strip, height_mm_T: npt.NDArray[np.float32], rate_hz: float) -> None:
    piece_mm_T = np.clip(_piece(strip, height_mm_T, rate_hz), -_ROOM_MM[1], _ROOM_MM[1])
    left_mm = _BORDER_MM + _PULSE_MM
    time_s_T = (round(strip.start_s * rate_hz) + np.arange(len(piece_mm_T))) / rate_hz
    baseline_mm = page.baselines_mm[strip.row]
    axes.plot(left_mm + time_s_T * MM_PER_S, baseline_mm + piece_mm_T, color=_INK, linewidth=0.75)
    start_mm = left_mm + strip.start_s * MM_PER_S
    if strip.start_s > 0:  # where one lead ends and the next begins
        axes.plot([start_mm, start_mm], [baseline_mm - 5, baseline_mm + 5], color=_INK, linewidth=0.6)
    under_name_mm_T = piece_mm_T[: math.ceil(_NAME_MM / MM_PER_S * rate_hz)]
    name_mm = baseline_mm + max(_ROOM_MM[0], float(under_name_mm_T.max(initial=0))) + 1
    axes.text(start_mm + 1, name_mm, strip.lead, fontsize=9, fontweight="bold", color=_INK)


def _draw_text(axes: Axes, page: _Page, record: Record, shown_s: float) -> None:
    shown = "" if shown_s == record.duration_s else f", first {shown_s:g} s shown"
    cut = f", traces beyond {_ROOM_MM[1] / MM_PER_MV:g} mV cut" if page.cut else ""
    person = [f"{key} {record.metadata[key]}" for key in ("age", "sex") if key in record.metadata]
    lines = (
        "   ".join([record.name, f"patient {record.patient or 'unknown'}", *person]),
        "   ".join(f"{name}: {', '.join(values)}" for name, values in record.labels.items()),
        f"{MM_PER_S:g} mm/s   {MM_PER_MV:g} mm/mV   {record.rate_hz:g} Hz   {record.duration_s:g} s{shown}{cut}",
    )
    room = int((page.width_mm - 2 * _BORDER_MM) / _MM_PER_CHARACTER)
    for i, line in enumerate(filter(None, lines)):
        printable = "".join(c if c.isprintable() else "?" for c in line)
        text = printable if len(printable) <= room else f"{printable[: room - 1]}…"
        y_mm = page.height_mm - _BORDER_MM - 5 * i
        style = "bold" if i == 0 else "normal"
        # parse_math: a $ in a name or label is no formula
        axes.text(_BORDER_MM, y_mm, text, fontsize=8.5, fontweight=style, color=_INK, va="top", parse_math=False)
