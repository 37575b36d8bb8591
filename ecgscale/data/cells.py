"""What a cell of a table, a comment of a header or a value of JSON means: one reading for every source.

| written | read as |
|---|---|
| one of UNKNOWN_WORDS, in any case: ``NA``, ``None``, ``NULL``, ``nan`` ... and an empty cell | unknown |
| ``17.0``, ``1e+05``, ``1.5709E4`` | ``17``, ``100000``, ``15709``: whole numbers that a float column made so |
| blanks that do not break, characters of no width within it | as a blank, as nothing |
| ``'AF'``, ``="007"`` | ``AF``, ``007`` |
| ``007``, ``1e5``, ``17.5``, ``P17`` | as it is: ids with leading zeros are others, and ``1e5`` may be hexadecimal |
| ``+17``, ``0x11``, ``1_000`` | as it is; ``record.id_hash`` knows which ids may be one person's |
| full-width digits and those of other scripts in ids | as 0 to 9 |
| blanks around it, of any kind; ``e`` and an accent as two characters | without; as the one character |
| ``True``, ``false`` | as a class ``1`` and ``0``, so that 1, 1.0 and True are one class |
| ``A|B``, ``A;B``, one per line, ``['A', 'B']``, ``['A' 'B']``, ``{A,B}``, ``c("A", "B")`` | the classes A and B |
| ``426783006,59931005`` and with spaces | two SNOMED CT codes (6 to 18 digits); other commas and spaces are text |
| ``# Dx: AF, 12`` and ``# Dx: 12 13`` in headers | a list whatever the codes are: AF and 12, 12 and 13 |
| ``{'A': true, 'B': false}``, also 1 and 0 | flags: the class A |
| ``{'A': 100.0, 'B': 0}`` | likelihoods in percent: A, and all others above 0 |
| the same under ``scp`` or ``scp_codes``, as PTB-XL writes them | 0 where none was said: A and B |
| ``[]``, ``{}``, flags that are all false | none of the classes, which is known: ``[]``, a negative of every class |

A class that is really called None or Unknown is unknown here, and counted as that: give it another name. What could
mean two things is an InputError: a row of flags without names (``[0, 1, 0]``), shares of 1, numbers of which some are 0
and that are no likelihoods, lists in lists, ids whose last digits a float has lost (beyond 2^53, or as spreadsheets
show them: ``4.27E+08``), ids that may have separators of thousands (``1.000``, ``1,101``) or
decimal commas (``17,0``).
"""

from __future__ import annotations

import json
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ecgscale.data.json_keys import squashed
from ecgscale.errors import InputError

UNKNOWN_WORDS = frozenset(
    (
        *("", "na", "n/a", "n.a.", "#n/a", "#na", "<na>", "nan", "-nan", "nat", "none", "null", "\\n", "unknown"),
        *("undefined", "missing", "not available", "-", "--", "?", "."),
        *("(null)", "#null!", "#ref!", "#value!", "#div/0!", "#name?", "#num!", "#nv", "#wert!", "#bezug!"),
        *("unbekannt", "k.a.", "keine angabe", "inconnu", "desconocido", "desconhecido", "sconosciuto"),
    )
)
_TRUE, _FALSE = frozenset(("true", "t", "yes", "y", "1")), frozenset(("false", "f", "no", "n", "0"))
_BOOLEANS = {"true": "1", "false": "0"}  # T and F are no class names for them: F is a fusion beat

PATIENT_KEYS = (
    *("patient_id", "patientid", "patient-id", "patient id"),
    *("subject_id", "subjectid", "subject-id", "subject id"),
    "patient",
)
"""Names, in any case, under which tables, headers and JSON say whose a recording is; the first that is known counts."""
NOBODY = "a record without a known patient, taken as a person of its own"  # a note of records, not of cells

_STRIPPED = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u2060\ufeff"  # the last have no width
_WITH_ZERO_FRACTION = re.compile(r"(-?(?:0|[1-9][0-9]*))\.(?:0|00|0{4,})")  # 1.000 is a thousand to many
_WITH_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:\.000|(?:,[0-9]{3})+)")
_WITH_COMMA = re.compile(r"-?[0-9]+,[0-9]+")
_AS_TEXT = re.compile(r"""="(?P<kept>[^"]*)"|'(?P<quoted>[^']*)'""")  # ="007" keeps its zeros in spreadsheets
_INVISIBLE = {0xA0: " ", **dict.fromkeys((0xAD, 0x61C, 0x180E, 0xFEFF, 0x7F, *range(9), *range(14, 28)))}
_INVISIBLE |= dict.fromkeys((*range(0x80, 0xA0), *range(0x200B, 0x2010), *range(0x202A, 0x202F)))
_INVISIBLE |= dict.fromkeys(range(0x2060, 0x2070))  # marks of direction and the like: to a reader they are not there
_EXACT = re.compile(r"-?[0-9](?:\.[0-9]+)?e\+[0-9]{2,3}|-?[1-9]\.[0-9]+E[0-9]{1,3}")  # R, Python and numpy, Java
_AS_SHOWN = re.compile(r"-?[1-9](?:[.,][0-9]+)?E\+[0-9]{2,3}")  # spreadsheets: as many digits as the column is wide
_LARGEST_EXACT = 2**53
_LONGEST_NUMBER = 40  # characters; float64 has 17 digits
_SNOMED = re.compile(r"[1-9][0-9]{5,17}")
_LISTED_CODE = re.compile(r"[0-9]+(\.0)?")
_LIST_SEPARATORS = re.compile("[,;|]")
_SEPARATORS = re.compile(r"[|;\r\n]")
_OF_TUPLES = re.compile(r"\[\s*\(")  # pairs of a name and a number, as Python writes them
_ZERO_IS_NOT_SAID = "scp"  # with this begins PTB-XL's column, where 0 is a likelihood that was not said
_PERCENT_STEP = 5  # PTB-XL's likelihoods are 0, 15, 35, 50, 80 and 100

_LONGEST_LIST = 1 << 16
_BRACKETS = ("[]", "{}", "()")
_CALL = re.compile(r"""(?:c|list|set|frozenset|tuple)\((\s*[\[{("'].*[\]})"']\s*)\)""", re.DOTALL)  # c is R's
_NUMPY = re.compile(r"\bnp\.\w+\(([^()]*)\)")
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<quoted> \'(?:[^\'\\]|\\.)*\' | "(?:[^"\\]|\\.)*" )
        | (?P<mark> [,:|;] )
        | (?P<bare> [^\s,:|;\'"\[\]{}] [^,:|;\'"\[\]{}]* )
    )""",
    re.DOTALL | re.VERBOSE,
)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # from escapes; it could neither be stored nor printed
_LEADING_ZERO = re.compile("-?0[0-9]")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")


def find_key(keys: Iterable[str], wanted: str) -> str | None:
    """The key that equals ``wanted``, exactly if one does, otherwise upper or lower case alike."""
    alike = [key for key in keys if key.strip().casefold() == wanted.strip().casefold()]
    return wanted if wanted in alike else next(iter(alike), None)


def is_known(value: str) -> bool:
    """Whether a cell says anything."""
    return value.strip(_STRIPPED).casefold() not in UNKNOWN_WORDS


class Cells:
    """Reads cells, and counts what it did to them in ``notes``: what -> how often."""

    def __init__(self) -> None:
        self.notes: Counter[str] = Counter()

    def identifier(self, value: object, field: str) -> str | None:
        """The id that a cell holds, of a patient for example; None: unknown.

        Raises InputError for what is no id, and for a number that has lost its last digits.
        """
        text = self._text(value, field)
        if text is None:
            return None
        if (western := _with_western_digits(text)) != text:
            self.notes[f"{field} in digits of another script, read as 0 to 9"] += 1
            text = western
        if isinstance(value, bool):
            raise InputError(f"{field} is {value}; write the id, as text or as a whole number")
        if _WITH_THOUSANDS.fullmatch(text):
            raise InputError(f"{field} {text!r} may have a separator of thousands; write whole numbers without")
        if _WITH_COMMA.fullmatch(text):
            raise InputError(f"{field} {text!r} has a comma in its number; write whole numbers without")
        if _lost_digits(text):
            raise InputError(f"{field} {text!r} is a number that has lost its last digits; write ids as text")
        return self._whole(text, field)

    def text(self, value: object, field: str) -> str | None:
        """One piece of metadata; None: unknown."""
        text = self._text(value, field)
        return None if text is None else self._whole(text, field)

    def classes(self, value: object, field: str) -> list[str] | None:
        """The classes that a cell names, each once, in its order; [] for none of them; None: unknown.

        Raises InputError for what could mean two things.
        """
        if isinstance(value, str):
            value = self._parsed(value, field)
        if isinstance(value, Mapping):
            return self._of_mapping(value, field)
        if isinstance(value, list | tuple):
            return self._of_list(value, field)
        text = self._text(value, field)
        if text is None:
            return None
        parts = [part for part in _SEPARATORS.split(text) if part.strip(_STRIPPED)]
        if len(parts) > 1:
            flags = [
                _BOOLEANS.get(word, word) for part in parts if (word := _without_fraction(part.strip().casefold()))
            ]
            if set(flags) <= {"0", "1"} and len(set(flags)) < len(flags):
                raise _flags_without_names(text, field)
            self.notes[f"{field} with several classes, split"] += 1
        return self._names(parts, field)

    def listed(self, texts: Iterable[str], field: str) -> list[str] | None:
        """The classes that the lines of a header list, which ``# Dx:`` does whatever its codes are; None: unknown.

        A line that is written as a list or as flags is read as a cell is. In others, commas, semicolons and bars keep
        them apart, and spaces where all are numbers.
        """
        parts: list[object] = []
        is_empty_list = False
        for text in texts:
            value = self._parsed(text, field)
            if not isinstance(value, str):
                classes = self.classes(value, field)
                parts += classes or ()
                is_empty_list = is_empty_list or classes == []
                continue
            for part in _LIST_SEPARATORS.split(text):
                words = part.split()
                parts += words if all(_LISTED_CODE.fullmatch(word) for word in words) else [part]
        return self._names(parts, field) or ([] if is_empty_list else None)

    def flag(self, value: object, field: str) -> bool | None:
        """Yes or no; None: unknown. Raises InputError for other words."""
        text = self._text(value, field)
        if text is None:
            return None
        word = _without_fraction(text).casefold()
        if word not in _TRUE | _FALSE:
            raise InputError(f"{field} is {_short(text)}; it must be true or false, 1 or 0")
        return word in _TRUE

    def flagged(self, cells: Mapping[str, object], field: str) -> list[str] | None:
        """The names of the flags that are set; None where one of them is unknown, since it may be set."""
        flags = {name: self.flag(cell, name) for name, cell in cells.items()}
        if None in flags.values():
            some = "some" if any(flag is not None for flag in flags.values()) else "all"
            self.notes[f"{field} with flags of which {some} are unknown, taken as unknown"] += 1
            return None
        return [name for name, flag in flags.items() if flag]

    # -- parts of cells ----------------------------------------------------------------------------------------------

    def _text(self, value: object, field: str) -> str | None:
        """A scalar's text, stripped; None: unknown."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if not isinstance(value, str | int | float):
            raise InputError(f"{field[:40]!r} is {_short(str(value))}; write text, a number, or a list of these")
        text = (value if isinstance(value, str) else json.dumps(value)).strip(_STRIPPED)
        if not (text.isascii() and text.isprintable()):
            text = text.translate(_INVISIBLE).strip(_STRIPPED)
        if as_text := _AS_TEXT.fullmatch(text):
            text = (as_text["kept"] or as_text["quoted"] or "").strip(_STRIPPED)
        if text.casefold() not in UNKNOWN_WORDS:
            if _HALF_PAIR.search(text):
                raise InputError(f"{field[:40]!r} is {_short(text)}, with half of a UTF-16 pair; write it again")
            composed = unicodedata.normalize("NFC", text)
            if composed != text:
                self.notes[f"{field} with accents apart from their letters, read as one"] += 1
            return composed
        if text:
            self.notes[f"{field} {text!r} taken as unknown"] += 1
        return None

    def _whole(self, text: str, field: str) -> str:
        whole = _without_fraction(text)
        if whole != text:
            self.notes[f"{field} written as a float (17.0, 1e+05), read as a whole number"] += 1
        return whole

    def _names(self, parts: Iterable[object], field: str) -> list[str] | None:
        """Class names out of the parts of a list; None where all are unknown."""
        names: dict[str, None] = {}
        for part in parts:
            text = self._text(part, field)
            if text is None:
                continue
            for code in self._codes(text, field):
                name = self._whole(code, field)
                if name.casefold() in _BOOLEANS:
                    name = _BOOLEANS[name.casefold()]
                    self.notes[f"{field} True or False, read as the class 1 or 0"] += 1
                elif _lost_digits(name):
                    self.notes[f"{field} a number that may have lost digits (4.27E+08), read as it is"] += 1
                names[name] = None
        return list(names) or None

    def _codes(self, text: str, field: str) -> list[str]:
        """SNOMED CT codes that commas or spaces keep apart; any other text as it is."""
        codes = [_without_fraction(part) for part in re.split(r"[\s,]+", text) if part]
        if len(codes) > 1 and all(_SNOMED.fullmatch(code) for code in codes):
            self.notes[f"{field} with several codes, split"] += 1
            return codes
        return [text]

    def _parsed(self, text: str, field: str) -> Any:
        """The list or mapping that a text is, the text where it is none."""
        value = _literal(text.strip(_STRIPPED), field)
        if value is None:
            return text
        self.notes[f"{field} written as a list, read as its classes"] += 1
        return value

    def _of_list(self, values: list[Any] | tuple[Any, ...], field: str) -> list[str] | None:
        if len(values) > 1 and all(_is_number(value) and value in (0, 1) for value in values):
            raise _flags_without_names(str(values), field)
        return self._names(values, field) if values else []

    def _of_mapping(self, values: Mapping[Any, Any], field: str) -> list[str] | None:
        kind = kind_of_mapping(values)
        if kind is None:
            raise InputError(
                f"{field[:40]!r} is {_short(str(dict(values)))}; give names with true or false, or with likelihoods in "
                "percent"
            )
        if not values:
            return []
        numbers = {str(name): _number(value) for name, value in values.items()}
        are_numbers = 1 not in numbers.values() and not any(isinstance(value, bool) for value in values.values())
        if are_numbers and squashed(field).startswith(_ZERO_IS_NOT_SAID):
            if 0 in numbers.values():
                self.notes[f"{field} with likelihoods, where 0 is taken for one that was not said, as in PTB-XL"] += 1
            return self._names(values, field)
        if kind != "flags":
            self.notes[f"{field} with likelihoods or amounts: each above 0 is taken as its class, 0 as none"] += 1
        if None in numbers.values():
            self.notes[f"{field} with flags of which some are unknown, taken as unknown"] += 1
            return None
        set_ones = [name for name, number in numbers.items() if number]
        return self._names(set_ones, field) if set_ones else []


def kind_of_mapping(values: Mapping[Any, Any]) -> str | None:
    """``flags`` (true and false, 1 and 0), ``likelihoods`` in percent, ``amounts`` that are all above 0, or None.

    Among other numbers with a 0, what it means is open.
    """
    try:
        numbers = [number for value in values.values() if (number := _number(value)) is not None]
    except InputError:
        return None
    if all(number in (0, 1) for number in numbers):
        return "flags"
    if any(isinstance(value, bool) for value in values.values()):
        return None
    if not all(number == 0 or 1 <= number <= 100 for number in numbers):
        return None
    if all(number % _PERCENT_STEP == 0 for number in numbers):
        return "likelihoods"
    return "amounts" if all(numbers) else None


def _number(value: object) -> float | None:
    """A flag or a likelihood; None: unknown."""
    if isinstance(value, str) and is_known(value):
        text = value.strip(_STRIPPED)
        value = _BOOLEANS.get(text.casefold(), text)
        if _NUMBER.fullmatch(value):
            return float(value)
        raise InputError(f"{_short(text)} is neither a flag nor a likelihood")
    if value is None or isinstance(value, str) or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, int | float) or abs(value) > _LARGEST_EXACT:
        raise InputError(f"{_short(str(value))} is neither a flag nor a likelihood")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _with_western_digits(text: str) -> str:
    """Full-width digits, and those of other scripts, as 0 to 9."""
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(one)) if one.isdecimal() else one for one in text)


def _without_fraction(text: str) -> str:
    """``17.0`` -> ``17``; any other text as it is."""
    if len(text) > _LONGEST_NUMBER:
        return text
    if matched := _WITH_ZERO_FRACTION.fullmatch(text):
        whole = int(matched[1])
    elif _EXACT.fullmatch(text) and float(text).is_integer():
        whole = int(float(text))
    else:
        return text
    return str(whole) if abs(whole) < _LARGEST_EXACT else text


def _lost_digits(text: str) -> bool:
    """Whether it is a float that several whole numbers would have become."""
    if _AS_SHOWN.fullmatch(text):
        return True
    is_float = _WITH_ZERO_FRACTION.fullmatch(text) or _EXACT.fullmatch(text)
    return bool(is_float) and abs(float(text)) >= _LARGEST_EXACT


def _literal(text: str, field: str) -> list[Any] | dict[str, Any] | None:
    """A list or mapping as Python, JSON, numpy or PostgreSQL write it; None for other text.

    Raises InputError for lists in lists.
    """
    if text == "set()":
        return []
    if text.startswith("array(["):
        text = text[len("array(") : text.rfind("]") + 1]
    if called := _CALL.fullmatch(text):
        inner = called[1].strip()
        text = inner if inner[0] + inner[-1] in _BRACKETS else f"[{inner}]"
    if text[:1] + text[-1:] not in _BRACKETS or len(text) > _LONGEST_LIST:
        return None
    if _OF_TUPLES.match(text):
        raise InputError(
            f"{field[:40]!r} is {_short(text)}, tuples in a list; write a list of names, or {{name: number}}"
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _flat(_NUMPY.sub(r"\1", text))
        if value is None and text[0] != "(" and _nested(text):
            raise InputError(f"{field[:40]!r} is {_short(text)}, a list in a list; write one list of names") from None
    if text[0] == "(" and not (isinstance(value, list) and "," in text):
        return None  # words in brackets
    return value if isinstance(value, list | dict) else None


def _flat(text: str) -> list[Any] | dict[str, Any] | None:
    """The items between brackets; None where they are neither a list nor a mapping."""
    inner = text[1:-1]
    items: list[Any] = []
    pairs: dict[str, Any] = {}
    keyed: Any = None
    previous, place = ",", 0
    while inner[place:].strip():
        matched = _TOKEN.match(inner, place)
        if matched is None:
            return None
        place = matched.end()
        if mark := matched["mark"]:
            if mark == ":":
                if previous != "item" or keyed is not None or text[0] != "{":
                    return None
                keyed = items.pop()
            previous = mark
            continue
        values = [_unquoted(matched["quoted"])] if matched["quoted"] else _bare(matched["bare"])
        if previous == ":":
            if len(values) != 1:
                return None
            pairs[str(keyed)] = values[0]
            keyed = None
        else:
            items += values
        previous = "item"
    if keyed is not None or (pairs and items):
        return None
    return pairs or items


def _nested(text: str) -> bool:
    """Whether a list begins in the list, rather than text between two brackets."""
    bracket = re.search(r"[\[\]{}]", _QUOTED.sub("", text)[1:-1])
    return bracket is not None and bracket[0] in "[{"


def _unquoted(text: str) -> str:
    return _ESCAPE.sub(_character, text[1:-1])


def _character(escape: re.Match[str]) -> str:
    if code := escape[1] or escape[2] or escape[3]:
        return chr(int(code, 16)) if int(code, 16) <= sys.maxunicode else escape[0]
    return {"n": "\n", "r": "\r", "t": "\t"}.get(escape[4], escape[4])


def _bare(text: str) -> list[Any]:
    """What stands without quotes: a word, a number, or numbers that spaces keep apart."""
    parts = text.split()
    if all(_NUMBER.fullmatch(part) and not _LEADING_ZERO.match(part) for part in parts):
        return [int(part) if part.isdigit() and len(part) <= _LONGEST_NUMBER else float(part) for part in parts]
    word = {"true": True, "false": False}.get(text.strip().casefold())
    return [text.strip() if word is None else word]


def _flags_without_names(text: str, field: str) -> InputError:
    return InputError(
        f"{field[:40]!r} is {_short(text)}, a row of flags without names; write the names of those that hold, or give "
        "each a column (--label-columns)"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def told(notes: Mapping[str, int], patients_known: bool, shown: int = 20) -> list[str]:
    """Lines for people. Where no patient is known at all, that has a line of its own elsewhere."""
    counts = sorted(notes.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"{count} x {what}" for what, count in counts if patients_known or what != NOBODY]
    return lines[:shown] + ([f"and {len(lines) - shown} more such lines"] if len(lines) > shown else [])
