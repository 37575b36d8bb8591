"""Names of leads: the twelve, how files spell them, and what is refused because it could be another lead.

A name is read as a lead only where nothing else is called so. ``DI``, ``MLII`` or ``I (raw)`` are for the user to
rename, since a lead that is taken for another is worse than a record that is not read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

from ecgscale.errors import InputError

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")

# The lead sets of the PhysioNet/CinC Challenge 2021, and lead I alone.
LEAD_SETS = {
    12: LEADS,
    6: LEADS[:6],
    4: ("I", "II", "III", "V2"),
    3: ("I", "II", "V2"),
    2: ("I", "II"),
    1: ("I",),
}

_LEAD_BY_FOLDED_NAME = {lead.casefold(): lead for lead in LEADS}
# MDC_ECG_LEAD_I is the code of ISO 11073 and aECG. A hyphen is no blank: -aVR is aVR upside down.
_PREFIX = re.compile(r"(?:(?:mdc|ecg|ekg|lead) )+")
_LIMB = re.compile(r"(?:d|ml)(i{1,3}|[123])")  # DI, D1 (Latin America, France), MLII (modified, on the torso)
_STROKES = re.compile(r"[il|]{1,3}")
_REMARK = re.compile(r"(\w+)[ -]?[(\[ -][a-z ]{3,}[)\]]?")  # I (raw), II filtered; not I-II
_TURNED = r"(?:inverted|inverse|inv|negative|neg|negated|reversed|flipped|upside down|minus|-)"
_TURNED_AFTER = re.compile(rf"(.*\w) ?[ (\[-] ?{_TURNED}[)\].]*")
_TURNED_BEFORE = re.compile(rf"[(\[]?{_TURNED}[)\].]?[ (\[-] ?(\w.*?)[)\]]?")
_DASH = re.compile("[\u2010-\u2015\u2212\ufe63\uff0d]")
_LOOK_ALIKES = {
    **dict.fromkeys("\u0406\u0456\u04c0\u04cf\u0399\u03b9\u0131\u0130", "I"),  # Cyrillic, Greek, Turkish
    **dict.fromkeys("\u0410\u0430\u0391\u03b1", "a"),
    **dict.fromkeys("\u0474\u0475\u03bd\u2228", "V"),
}


def canonical_lead(name: str) -> str:
    """``"ECG I"``, ``"LEAD_II"``, ``"AVR"`` -> ``"I"``, ``"II"``, ``"aVR"``; raises InputError for any other name."""
    lead = _read(name)
    if lead is None:
        raise InputError(_unknown(name))
    return lead


def _unknown(name: str) -> str:
    if not name.strip():
        return "a lead without a name (in a WFDB header it is the last field of a signal's line); write it there"
    if inverted := _inverted(name):
        return (
            f"unknown lead {name!r}, which is {inverted} upside down, as in the Cabrera sequence; turn its samples and "
            f"call it {inverted}"
        )
    likely = likely_lead(name)
    hint = f", likely {likely}" if likely else ""
    return f"unknown lead {name!r}{_odd_characters(name)}{hint}; the twelve leads are {' '.join(LEADS)}"


def _folded(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _read(name: str) -> str | None:
    folded = _folded(name)
    return _LEAD_BY_FOLDED_NAME.get(_PREFIX.sub("", folded, count=1) if _PREFIX.match(folded) else folded)


def _inverted(name: str) -> str | None:
    """The lead that a name with a minus or a word for it, such as -aVR or I inverted, is the negative of.

    In ECG-I the hyphen stands where a blank would: that is no minus.
    """
    folded = _folded(_DASH.sub("-", name))
    for turned in (_TURNED_AFTER.fullmatch(folded), _TURNED_BEFORE.fullmatch(folded)):
        if turned and (lead := _read(turned[1])):
            return lead
    before, minus, after = folded.rpartition("-")
    if not minus or not (before == "" or (_PREFIX.fullmatch(before) and not after.startswith(" "))):
        return None
    return _read(after)


def _odd_characters(name: str) -> str:
    """What the eye does not see: a Cyrillic letter, a blank of no width."""
    told = []
    for character in dict.fromkeys(name):
        if not character.isascii():
            plain = _plain(character)
            like = f", not {plain}" if plain.isascii() and plain.isalnum() else ""
            told.append(f"{character!r} is U+{ord(character):04X}{like}")
    return f" ({', '.join(told)})" if told else ""


def _plain(name: str) -> str:
    """With the letters that the others look like."""
    composed = unicodedata.normalize("NFKC", name)
    seen = (_LOOK_ALIKES.get(one, one) for one in composed if unicodedata.category(one) != "Cf")
    return "".join(seen)


def likely_lead(name: str) -> str | None:
    """The lead that somebody most likely meant, for a hint; None for one that is upside down."""
    plain = _plain(name)
    if _inverted(plain):
        return None
    if lead := _read(plain):
        return lead
    folded = _PREFIX.sub("", re.sub(" ?- ?", " ", _folded(plain), count=1), count=1)
    if lead := _LEAD_BY_FOLDED_NAME.get(folded):  # ECG-I
        return lead
    folded = _PREFIX.sub("", _folded(plain), count=1)
    if limb := _LIMB.fullmatch(folded):
        return "I" * (int(limb[1]) if limb[1].isdigit() else len(limb[1]))
    if _STROKES.fullmatch(folded):
        return "I" * len(folded)
    if remark := _REMARK.fullmatch(folded):
        return _LEAD_BY_FOLDED_NAME.get(remark[1])
    return None


def canonical_leads(names: Sequence[str]) -> tuple[str, ...]:
    """The canonical name of each lead, in the order given; raises InputError for unknown or repeated leads."""
    leads = tuple(canonical_lead(name) for name in names)
    _check_once(names, leads)
    return leads


def _check_once(names: Sequence[str], leads: Sequence[str]) -> None:
    repeated = sorted({lead for lead in leads if leads.count(lead) > 1}, key=LEADS.index)
    if repeated:
        spelt = ", ".join(repr(name) for name, lead in zip(names, leads, strict=True) if lead == repeated[0])
        raise InputError(
            f"lead {repeated[0]} stands {leads.count(repeated[0])} times ({spelt}); each lead may stand once"
        )


def are_leads(names: Sequence[str]) -> bool:
    """Whether these are meant as names of leads: at least half of them are, or are likely, a lead's."""
    return bool(names) and 2 * sum(likely_lead(name) is not None for name in names) >= len(names)


def source_leads(names: Sequence[str], renames: Mapping[str, str], can_ignore: bool = True) -> tuple[str, ...]:
    """The canonical names of a file's leads. ``renames`` gives leads to names, upper or lower case alike.

    Raises InputError for unknown and repeated leads. It tells the options that help; ``can_ignore`` says whether
    ``--ignore-leads`` is one of them.
    """
    given = {name.strip().casefold(): lead for name, lead in renames.items()}
    leads = []
    for name in names:
        lead = given.get(name.strip().casefold()) or _read(name)
        if lead is None:
            raise InputError("; ".join([_unknown(name), *_helpful_options(name, can_ignore)]))
        leads.append(lead)
    _check_once(names, leads)
    return tuple(leads)


def _helpful_options(name: str, can_ignore: bool) -> Iterator[str]:
    """With an equals sign, since names may begin with a dash."""
    if name.strip() and not _inverted(name):
        rename = f"{name}={likely_lead(name) or 'LEAD'}"
        yield f"--rename-leads={rename!r} reads it as a lead"
    if name.strip() and can_ignore:
        yield f"--ignore-leads={name!r} leaves it out"


def parse_renames(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """``["DI=I"]`` -> ``(("DI", "I"),)``.

    Raises InputError for what is no name and lead, names one twice, or is a lead upside down.
    """
    renames: dict[str, str] = {}
    for text in texts:
        name, equals, lead = text.rpartition("=")
        if not (equals and name.strip() and _read(lead)):
            raise InputError(f"rename-leads {text!r}: write NAME=LEAD, such as DI=I; the leads are {' '.join(LEADS)}")
        if inverted := _inverted(name):
            raise InputError(
                f"rename-leads {text!r}: {name.strip()} is {inverted} upside down, which a name does not turn; turn "
                "its samples or leave it out"
            )
        if name.strip().casefold() in {known.casefold() for known in renames}:
            raise InputError(f"rename-leads {text!r}: the name {name.strip()!r} is given twice; it can be one lead")
        renames[name.strip()] = canonical_lead(lead)
    return tuple(renames.items())


def chosen_leads(names: Sequence[str]) -> tuple[str, ...]:
    """Leads named one by one, or all at once by the size of a set of the challenge (``["6"]``), in canonical order.

    Raises InputError for unknown or repeated leads.
    """
    if len(names) == 1 and names[0] in map(str, LEAD_SETS):
        return LEAD_SETS[int(names[0])]
    if len(names) > 1 and all(name in map(str, LEAD_SETS) for name in names):
        raise InputError(f"lead sets {','.join(names)}: give each apart: {' '.join(names)}")
    for name in names:
        if name.strip().casefold() not in _LEAD_BY_FOLDED_NAME:
            near = get_close_matches(name.casefold(), _LEAD_BY_FOLDED_NAME, 1, 0.4)
            hint = f"did you mean {_LEAD_BY_FOLDED_NAME[near[0]]}? Give" if near else "give"
            sets = ", ".join(map(str, LEAD_SETS))
            raise InputError(f"unknown lead {name!r}; {hint} leads such as I,II,V2, or one set alone: {sets}")
    return tuple(sorted(canonical_leads(names), key=LEADS.index))


def lead_set_name(leads: Sequence[str]) -> str:
    """``12`` for a set of the challenge, in canonical order, and ``II,V5`` for others."""
    return next((str(size) for size, known in LEAD_SETS.items() if known == tuple(leads)), ",".join(leads))


def in_canonical_order(leads: Sequence[str]) -> list[int]:
    """Positions that bring canonical lead names into canonical order."""
    return sorted(range(len(leads)), key=lambda i: LEADS.index(leads[i]))
