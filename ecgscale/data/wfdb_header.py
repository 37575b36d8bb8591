"""The content of a WFDB header -> checked fields. Pure: bytes in, dataclasses out, no file is touched.

Why a parser of our own beside wfdb's: wfdb's is lenient where a wrong number hides. A missing or misspelt
rate becomes 250 Hz, gain 0 becomes 200, ``µV`` becomes ``V`` (it drops what is not ASCII), and a field that
it cannot read becomes its default while the rest of the line turns into the lead's name. Here each of these
is an InputError.

The grammar is that of header(5) of the WFDB Applications Guide.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ecgscale.errors import InputError
from ecgscale.record import mv_per_unit

DEFAULT_GAIN = 200.0  # header(5): counts per physical unit where the header leaves the gain out
MV_PER_COUNT_RANGE = (1e-9, 100.0)  # beyond it a count is no ECG: less than 1 pV, or more than the whole QRS

_RECORD_NAME = re.compile(r"([-\w]+(?:\.[-\w]+)*)(?:/(\d{1,9}))?", re.ASCII)
_RATE = re.compile(r"([^\s/(]+)(?:/[^\s()]*(?:\([^\s()]*\))?)?")
_FORMAT = re.compile(r"(\d{1,4})(?:x(\d{1,9}))?(?::(\d{1,9}))?(?:\+(\d{1,18}))?", re.ASCII)
_GAIN = re.compile(r"([^\s(/]+)(?:\(([^\s()]*)\))?(?:/(\S+))?")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?|[-+]?inf|nan", re.ASCII | re.IGNORECASE)
_WHOLE_NUMBER = re.compile(r"-?\d{1,20}", re.ASCII)
_FRACTION_OF_0 = re.compile(r"\.0*$")  # 200(0.0)/mV
FILE_NAME = re.compile(r"[-\w]+(?:\.[-\w]+)*", re.ASCII)
_SEGMENT_NAME = re.compile(r"[-\w]+(?:\.[-\w]+)*|~", re.ASCII)
_BINARY = re.compile(r"[^\t\n\r\x20-\x7e\x80-\U0010ffff]")
_LINE_BREAK = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class SignalLine:
    """One signal of a single-segment record, as its line of the header describes it."""

    file_name: str
    format: str
    samples_per_frame: int
    skew: int  # frames by which the signal lags behind in its file
    byte_offset: int  # for the FLAC formats: samples
    gain: float  # counts per physical unit
    baseline: int  # counts at 0 units
    unit: str
    initial_value: int  # that the first difference of format 8 is added to
    checksum: int | None  # 16-bit sum of the samples; None: the header gives none
    name: str

    def mv_per_count(self) -> float:
        """Millivolts per count; raises InputError for gains and units that are not an ECG's."""
        if not math.isfinite(self.gain) or self.gain <= 0:
            hint = " (0 means uncalibrated)" if self.gain == 0 else ""
            raise InputError(f"signal {self.name!r}: gain {self.gain:g}{hint}; it must be finite and above 0")
        scale = mv_per_unit(self.unit) / self.gain
        low, high = MV_PER_COUNT_RANGE
        if not low <= scale <= high:
            raise InputError(
                f"signal {self.name!r}: gain {self.gain:g} per {self.unit} makes {scale:g} mV per count; "
                f"an ECG has {low:g} to {high:g}"
            )
        return scale


@dataclass(frozen=True)
class Header:
    """A header's fields. Either ``signals`` (a record) or ``segments`` (a multi-segment record) is filled."""

    rate_hz: float  # frames per second
    n_frames: int | None  # None: left out or 0, which leave the length to the size of the data file
    signals: tuple[SignalLine, ...]
    segments: tuple[tuple[str, int], ...]  # (record name, frames); "~" is a gap
    comments: tuple[str, ...]  # without the leading "#"


def parse_header(content: bytes) -> Header:
    """The fields of a header, UTF-8 text; raises InputError that names the first offending value."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"not a text header: byte {content[error.start]:#04x} is not UTF-8; save it as that"
        ) from error
    if binary := _BINARY.search(text):
        raise InputError(f"not a text header: byte {ord(binary[0]):#04x} at character {binary.start()}")
    lines = [line.strip() for line in _LINE_BREAK.split(text)]
    comments = tuple(line.lstrip("# \t").rstrip() for line in lines if line.startswith("#"))
    fields = [line for line in lines if line and not line.startswith("#")]
    if not fields:
        raise InputError("empty header; its first line must be 'name signals rate samples'")
    n_segments, n_signals, rate_hz, n_frames = _record_line(fields[0])
    expected = n_signals if n_segments is None else n_segments
    kind = "signals" if n_segments is None else "segments"
    if len(fields) - 1 != expected:
        raise InputError(f"the first line claims {expected} {kind}, {len(fields) - 1} lines follow")
    if not n_signals or not expected:
        raise InputError(f"record line {_short(fields[0])}: 0 {kind if n_signals else 'signals'}; at least 1 is needed")
    if n_segments is not None:
        return Header(rate_hz, n_frames, (), tuple(map(_segment_line, fields[1:])), comments)
    return Header(rate_hz, n_frames, tuple(map(_signal_line, fields[1:])), (), comments)


def _record_line(line: str) -> tuple[int | None, int, float, int | None]:
    """-> (segments or None, signals, frames per second, frames or None)."""
    name, *rest = line.split()
    matched = _RECORD_NAME.fullmatch(name)
    if matched is None or not rest:
        raise InputError(f"record line {_short(line)}; it must read 'name signals rate samples'")
    n_segments = None if matched[2] is None else int(matched[2])
    n_signals = _whole(rest[0], "number of signals", low=0)
    if len(rest) < 2:
        raise InputError(f"record line {_short(line)} gives no sampling rate; write it as the third field, in Hz")
    rate = _RATE.fullmatch(rest[1])
    if rate is None:
        raise InputError(f"sampling rate {_short(rest[1])} is not a number in Hz")
    rate_hz = _number(rate[1], "sampling rate")
    if not 0 < rate_hz < math.inf:  # of frames, which may hold several samples: check_rate is for those of a signal
        raise InputError(f"sampling rate {rest[1]} Hz; it must be finite and above 0")
    n_frames = _whole(rest[2], "number of samples", low=0) if len(rest) > 2 else 0
    return n_segments, n_signals, rate_hz, n_frames or None


def _segment_line(line: str) -> tuple[str, int]:
    name, *rest = line.split()
    if not _SEGMENT_NAME.fullmatch(name) or len(rest) != 1:
        raise InputError(f"segment line {_short(line)}; it must read 'record samples', the record in this folder")
    return name, _whole(rest[0], "number of samples of a segment", low=0)


def _signal_line(line: str) -> SignalLine:
    fields = line.split(None, 8)
    if len(fields) < 2:
        raise InputError(f"signal line {_short(line)}; it must begin with 'file format'")
    file_name, format_field = fields[:2]
    if file_name != "~" and not FILE_NAME.fullmatch(file_name):
        raise InputError(
            f"data file {_short(file_name)}; it must be a plain name in the header's folder "
            "(letters, digits, -, _ and dots between them)"
        )
    matched = _FORMAT.fullmatch(format_field)
    if matched is None or (matched[2] is not None and int(matched[2]) == 0):
        raise InputError(f"format {_short(format_field)}; it must read like 16, 212 or 16x1+24")
    gain, baseline, unit = _gain(fields[2] if len(fields) > 2 else None)
    # adc_resolution adc_zero initial_value checksum block_size
    numbers = [_whole(value, "a number field of a signal line") for value in fields[3:8]]
    if baseline is None:
        baseline = numbers[1] if len(numbers) > 1 else 0
    return SignalLine(
        file_name=file_name,
        format=matched[1],
        samples_per_frame=int(matched[2] or 1),
        skew=int(matched[3] or 0),
        byte_offset=int(matched[4] or 0),
        gain=gain,
        baseline=baseline,
        unit=unit,
        initial_value=numbers[2] if len(numbers) > 2 else 0,
        checksum=numbers[3] if len(numbers) > 3 else None,
        name=fields[8].strip() if len(fields) > 8 else "",
    )


def _gain(field: str | None) -> tuple[float, int | None, str]:
    """``"1000.0(0)/mV"`` -> (1000.0, 0, "mV"). What is left out takes the default of header(5)."""
    if field is None:
        return DEFAULT_GAIN, None, "mV"
    matched = _GAIN.fullmatch(field)
    if matched is None:
        raise InputError(f"gain {_short(field)}; it must read like 1000(0)/mV")
    baseline = None if matched[2] is None else _whole(_FRACTION_OF_0.sub("", matched[2]), "baseline")
    if baseline is not None and abs(baseline) >= 2**32:
        raise InputError(f"baseline {baseline}; no format has samples beyond 32 bits")
    return _number(matched[1], "gain"), baseline, matched[3] or "mV"


def _number(text: str, what: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise InputError(f"{what} {_short(text)} is not a number")
    return float(text)


def _whole(text: str, what: str, low: int | None = None) -> int:
    if not _WHOLE_NUMBER.fullmatch(text) or (low is not None and int(text) < low):
        raise InputError(f"{what} {_short(text)} is not a whole number{'' if low is None else f' from {low} up'}")
    return int(text)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
