"""Which keys of a JSON say something about amplitude, told by the words that they are made of.

``adcGain``, ``ADC gain`` and ``{"adc": {"gain": ...}}`` are all the words adc and gain. A key says something where all
of its words stand here and one is in HEADS; the last of these tells what it is. So ``amplitude_offset`` is of the zero,
while ``qrs_offset`` and ``weight_unit`` are none of amplitude.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

from ecgscale.data.json_keys import squashed
from ecgscale.lead_names import LEADS
from ecgscale.record import mv_per_unit

Topic = Literal["scale", "zero", "polarity", "turned", "changed", "unit"]

_HEADS_OF: dict[Topic, str] = {
    "scale": "gain gains scale scales scaling resolution lsb multiplier divisor conversionfactor rescaleslope"
    " channelsensitivity",
    "zero": "baseline baselines offset offsets zero zeros bias intercept pedestal dclevel zeropoint",
    "polarity": "polarity polarities sign signs",
    "turned": "inverted invert flipped flip negated upsidedown",
    "changed": "normalize normalise normalized normalised normalization normalisation zscore zscored"
    " standardized standardised",
    "unit": "unit units dimension",
}
_BESIDE = {
    "volts": "v mv uv µv μv nv volt volts millivolt millivolts microvolt microvolts nanovolt nanovolts",
    "per": "per perbit perdigit perstep",
    "counts": "count counts adu",
    "signal": "adc dc digital analog physical raw amplitude voltage signal signals ecg ekg waveform waveforms",
    "rows": "lead leads channel channels row rows",
    "others": "value values factor level rescale is",
}
HEADS: dict[str, Topic] = {word: topic for topic, words in _HEADS_OF.items() for word in words.split()}
_VOLTS, _PER = frozenset(_BESIDE["volts"].split()), frozenset(_BESIDE["per"].split())
_LEAD_OF_WORD = {lead.casefold(): lead for lead in LEADS}
_WORDS = {*HEADS, *" ".join(_BESIDE.values()).split(), *_LEAD_OF_WORD, *map(str, range(100))}
_LONGEST_WORD = max(map(len, _WORDS))
_LONGEST_NAME = 80  # characters; longer keys are none of these
_OF_OTHER_THINGS = ("adcresolution", "zerocount", "zerocounts")  # bits, and how often there is a zero


class Meaning(NamedTuple):
    """What a key says."""

    topic: Topic
    mv: float | None  # per unit, where it names one
    direction: Literal["mv per count", "counts per mv", ""]  # of a scale; "": either
    is_gain: bool


@lru_cache(maxsize=1 << 14)
def meaning(name: str) -> Meaning | None:
    """What a squashed key says about amplitude; None: nothing."""
    words = words_of(name)
    if not words or name in _OF_OTHER_THINGS:
        return None
    mv = next((mv_per_unit(word) for word in words if word in _VOLTS), None)
    per = next((at for at, word in enumerate(words) if word in _PER), None)
    if per is not None:
        return _ratio(words[:per], words[per:], mv)
    heads = [word for word in words if word in HEADS]
    if not heads:
        return None
    topic = HEADS[heads[-1]]
    if topic == "unit" and any(HEADS[word] != "scale" for word in heads[:-1]):
        return None  # of an offset or the like
    is_gain = "gain" in words or "gains" in words
    if is_gain:
        return Meaning(topic, mv, "" if mv else "counts per mv", is_gain)
    return Meaning(topic, mv, "mv per count" if mv else "", is_gain)


def _ratio(above: tuple[str, ...], below: tuple[str, ...], mv: float | None) -> Meaning | None:
    """Of A per B: one of them is volts, or what the units say."""
    amplitudes = {*_VOLTS, "unit", "units", "amplitude", "voltage"}
    if amplitudes & {*above}:
        return Meaning("scale", mv, "mv per count", False)
    return Meaning("scale", mv, "counts per mv", True) if amplitudes & {*below} else None


@lru_cache(maxsize=1 << 14)
def words_of(name: str) -> tuple[str, ...] | None:
    """The words of a squashed key, as few as possible at its begin; None where it has others."""
    if not name:
        return ()
    if len(name) > _LONGEST_NAME:
        return None
    for end in range(min(len(name), _LONGEST_WORD), 0, -1):
        if name[:end] in _WORDS and (rest := words_of(name[end:])) is not None:
            return name[:end], *rest
    return None


def lead_of(name: str) -> str | None:
    """The lead that a squashed key names beside nothing but words of amplitude."""
    words = words_of(name) or ()
    return next((_LEAD_OF_WORD[word] for word in words if word in _LEAD_OF_WORD), None)


def joined(outer: str, key: str) -> str:
    """The name of a key in an object of that name: both together where that says something, else its own.

    All that stands under a gain is one, in whatever form.
    """
    own = squashed(key)
    both = outer + own
    if words_of(both) is not None:
        return both
    about = meaning(outer)
    return outer if about is not None and about.topic == "scale" and (about.is_gain or about.mv) else own
