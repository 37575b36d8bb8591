"""What cells mean: every spelling that was met, what could mean two things, and properties of the reading."""

from __future__ import annotations

import functools
import json
import math
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ecgscale.data.cells import UNKNOWN_WORDS, Cells, is_known, told
from ecgscale.errors import InputError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_SIGNS = st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zs", "Zl", "Zp"])
NAMES = (
    st.text(_SIGNS, min_size=1, max_size=12)
    .map(functools.partial(unicodedata.normalize, "NFC"))
    .filter(lambda text: is_known(text) and not text[:1].isdigit() and text.casefold() not in ("true", "false"))
    .filter(lambda text: not text[0] == text[-1] == "'")
)
PLAIN = st.from_regex(r"[A-Z][A-Za-z]{1,8}( [a-z]{1,6})?", fullmatch=True).filter(
    lambda text: is_known(text) and text.casefold() not in ("true", "false")
)
LISTS = st.lists(PLAIN, min_size=1, max_size=5, unique=True)


def classes(value: object, **options: bool) -> list[str] | None:
    return Cells().classes(value, "dx", **options)


def identifier(value: object) -> str | None:
    return Cells().identifier(value, "pid")


# --- ids ---


@pytest.mark.parametrize(
    ("cell", "read"),
    [
        *(("17", "17"), ("17.0", "17"), ("17.00", "17"), (" 17\t", "17"), ("\ufeff17", "17"), (17, "17"), (17.0, "17")),
        *(
            ("1e+05", "100000"),
            ("1.5709e+04", "15709"),
            ("1.5709E4", "15709"),
            ("1.700e+01", "17"),
            ("-0.0", "0"),
            ("-3.0", "-3"),
        ),
        # As they are: other ids than the numbers that they resemble.
        *(
            ("007", "007"),
            ("007.0", "007.0"),
            ("17.5", "17.5"),
            ("1e5", "1e5"),
            ("P17", "P17"),
            ("0", "0"),
            ("p1", "p1"),
        ),
        *(
            (2**60, str(2**60)),
            ("9007199254740993", "9007199254740993"),
            ("12345678901234567890",) * 2,
        ),
    ],
)
def test_ids(cell: object, read: str) -> None:
    assert identifier(cell) == read


def test_blanks_of_any_kind_and_accents_apart_make_no_other_id() -> None:
    cells = Cells()
    spellings = ["Jos\xe9", "Jose\u0301", "\u2003Jos\xe9\u200b", "\u3000Jose\u0301\u2028"]
    assert {cells.identifier(one, "pid") for one in spellings} == {"Jos\xe9"}
    assert cells.classes(["r\xeave", "re\u0302ve"], "dx") == ["r\xeave"]
    assert cells.notes == {
        "pid with accents apart from their letters, read as one": 2,
        "dx with accents apart from their letters, read as one": 1,
    }
    assert cells.identifier("\u2003NA\u2009", "pid") is None


@pytest.mark.parametrize("cell", ["9007199254740992.0", "1.2345678901234568e+16", 1e17, "4.27E+08", "1E+05"])
def test_ids_that_lost_digits_are_refused(cell: object) -> None:
    with pytest.raises(InputError, match=r"pid .* has lost its last digits; write ids as text"):
        identifier(cell)


@pytest.mark.parametrize("cell", [True, ["1"], {"a": 1}])
def test_what_is_no_id(cell: object) -> None:
    with pytest.raises(InputError, match="pid"):
        identifier(cell)


@pytest.mark.parametrize(
    "cell",
    ["", " ", "NA", "N/A", "n/a", "None", "NONE", "NULL", "null", "nan", "NaN", "Unknown", "<NA>", "\\N", "-", "?"],
)
def test_unknown_words(cell: str) -> None:
    cells = Cells()
    assert cells.identifier(cell, "pid") is None
    assert cells.text(cell, "age") is None
    assert cells.classes(cell, "dx") is None
    assert cells.flag(cell, "AF") is None
    word = cell.strip()
    expected = {f"{field} {word!r} taken as unknown": 1 for field in ("pid", "age", "dx", "AF")} if word else {}
    assert cells.notes == expected


@pytest.mark.parametrize("cell", [None, math.nan])
def test_json_that_says_nothing(cell: object) -> None:
    assert (identifier(cell), classes(cell), Cells().flag(cell, "AF")) == (None, None, None)


@given(st.integers(-(2**53) + 1, 2**53 - 1))
@example(0)
def test_a_number_is_one_id_however_a_float_column_writes_it(number: int) -> None:
    assert {identifier(one) for one in (number, str(number), f"{number}.0", repr(float(number)), float(number))} == {
        str(number)
    }


@given(TEXTS)
@example("1e+05")
@example("0.0")
def test_reading_an_id_again_changes_nothing(text: str) -> None:
    try:
        once = identifier(text)
    except InputError:
        return
    assert once is None or identifier(once) == once


@given(st.integers(0, 10**15), st.integers(0, 10**15), st.sampled_from(["", ".0"]), st.integers(0, 3))
def test_different_numbers_and_leading_zeros_stay_apart(one: int, other: int, fraction: str, zeros: int) -> None:
    ids = identifier(f"{one}{fraction}"), identifier(f"{'0' * zeros}{other}")
    assert (ids[0] == ids[1]) == (one == other and not zeros)


# --- classes ---


@pytest.mark.parametrize(
    ("cell", "read"),
    [
        *(
            (cell, ["NORM", "MI"])
            for cell in ("NORM|MI", "NORM;MI", "NORM | MI|", "NORM\nMI", "NORM\r\nMI", "NORM|NORM|MI")
        ),
        *(
            (cell, ["NORM", "MI"])
            for cell in ('c("NORM", "MI")', "frozenset({'NORM', 'MI'})", "list(['NORM', 'MI'])", "c( 'NORM','MI' )")
        ),
        *((cell, ["NORM", "MI"]) for cell in ("['NORM', 'MI']", '["NORM", "MI"]', "['NORM' 'MI']", "['NORM'\n 'MI']")),
        *((cell, ["NORM", "MI"]) for cell in ("[NORM, MI]", "{NORM,MI}", "('NORM', 'MI')", "{'NORM', 'MI'}")),
        *(
            (cell, ["NORM", "MI"])
            for cell in ("[np.str_('NORM'), np.str_('MI')]", "array(['NORM', 'MI'], dtype=object)")
        ),
        *((cell, ["NORM", "MI"]) for cell in (["NORM", "MI"], ["NORM", None, "MI", "nan"], {"NORM": True, "MI": 1})),
        *((cell, ["1"]) for cell in ("1", "1.0", "True", "TRUE", "true", 1, 1.0, True, "[1]", ["1.0"])),
        *((cell, ["0"]) for cell in ("0", "0.0", "-0.0", "False", 0, False)),
        *((cell, []) for cell in ("[]", "{}", "[ ]", "set()", [], {}, {"AF": False}, "{'AF': False, 'SB': 0}")),
        *((cell, None) for cell in ("|", ";\n", "[None]", "[nan]", "['']", ["NA"], {"AF": True, "SB": None})),
        *(
            (cell, ["426783006", "59931005"])
            for cell in ("426783006,59931005", "426783006 59931005", "426783006.0;59931005.0")
        ),
        # As they are: no list.
        *(
            (cell, [cell])
            for cell in ("1,2", "sinus rhythm, left axis", "(RBBB)", "[1] abnormal [2]", "[A", "N", "F", "007")
        ),
        *((cell, [cell]) for cell in ("426783006 1", "2", "T", "yes", "1e5")),
        ("['it\\'s', \"a, b\"]", ["it's", "a, b"]),
        ('["caf\\u00e9"]', ["café"]),
        ("[sinus rhythm, AF]", ["sinus rhythm", "AF"]),
        ("['A|B']", ["A|B"]),
        ("[007, 008]", ["007", "008"]),
        ([1, 2.0, "3.0"], ["1", "2", "3"]),
        ("{'NORM': 63.0, 'MI': 12.5}", ["NORM", "MI"]),
    ],
)
def test_classes(cell: object, read: list[str] | None) -> None:
    assert classes(cell) == read


@pytest.mark.parametrize(
    "cell",
    [
        *("[0, 1, 0]", "[0 1 0]", "[0. 1. 1.]", "0|1|0", "1;1", [0, 1], [True, False], [1.0, 0.0]),
        *("[['A'], ['B']]", "['A', ['B']]", [["A"]], [{"A": 1}], "[('A', 0), ('B', 1)]"),
        *(
            "{'NORM': 0.8}",
            "{'NORM': 72.0, 'SR': 0}",
            {"PVC": 3, "AF": 0},
            {"AF": True, "MI": 100},
            {"A": -1},
            {"rhythm": "SR"},
        ),
        *({"A": ["B"]}, {"NORM": 100.5}, {"NORM": 105}, {"NORM": True, "MI": 50.0}),
    ],
)
def test_what_could_mean_two_things_is_refused(cell: object) -> None:
    with pytest.raises(InputError, match="dx") as refused:
        classes(cell)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("cell", "elsewhere", "in_ptbxl"),
    [
        ("{'NORM': 100.0, 'SR': 0.0}", ["NORM"], ["NORM", "SR"]),
        ("{'SR': 0.0, 'AFIB': 0.0}", [], ["SR", "AFIB"]),
        ({"A": 5, "B": 50}, ["A", "B"], ["A", "B"]),
        ({"A": 85, "B": None}, None, ["A", "B"]),
        ({"A": 1, "B": 0}, ["A"], ["A"]),  # flags
        ({"A": False, "B": False}, [], []),
        ({}, [], []),
    ],
)
def test_a_likelihood_of_0_is_none_but_in_ptbxl(cell: object, elsewhere: list[str] | None, in_ptbxl: list[str]) -> None:
    """Whatever other cells of the column hold."""
    assert Cells().classes(cell, "dx") == elsewhere
    assert Cells().classes(cell, "scp_codes") == Cells().classes(cell, "SCP") == in_ptbxl


@given(LISTS)
def test_every_way_to_write_a_list_is_one(names: list[str]) -> None:
    spellings = [
        *(separator.join(names) for separator in ("|", ";", " ; ", "\n", "|\n")),
        *(repr(names), json.dumps(names), str(tuple(names) if len(names) > 1 else names), f"[{', '.join(names)}]"),
        "[" + "\n ".join(map(repr, names)) + "]",
        *(names, dict.fromkeys(names, True), dict.fromkeys(names, 100.0), repr(dict.fromkeys(names, 1))),
        *(dict.fromkeys(names, True) | {"Other one": False}, [*names, *names], [None, *names, "NA"]),
    ]
    for spelling in spellings:
        assert classes(spelling) == names, spelling


@given(st.lists(NAMES, max_size=5, unique=True))
def test_names_with_any_sign_survive_in_a_list(names: list[str]) -> None:
    read = classes(names)
    assert read == names
    assert classes(json.dumps(names)) == names
    assert classes(repr(names)) == names


@given(
    st.one_of(
        TEXTS, st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXTS, st.lists, max_leaves=5)
    )
)
@example("{'a': 'b\\")
@example("[" * 5000 + "]" * 5000)
@example('["\\ud800"]')
@example("9" * 5000)
@example("[" + "9" * 5000 + "]")
@example("9" * 5000 + ".0")
@example({"a": 10**400})
@example([10**400])
def test_any_cell_is_read_or_refused(cell: object) -> None:
    try:
        read = classes(cell)
    except InputError:
        return
    json.dumps(read, ensure_ascii=False).encode()  # as a shard will store it
    assert read is None or len(set(read)) == len(read)
    assert all(isinstance(name, str) and is_known(name) for name in read or [])


@given(st.lists(st.sampled_from(["A", "B", "NA", "1.0", "True", "", "17"]), max_size=6))
def test_no_class_is_an_unknown_word_and_reading_again_changes_nothing(parts: list[str]) -> None:
    try:
        read = classes("|".join(parts))
    except InputError:
        return
    assert read is None or (classes(read) == read and not {name.casefold() for name in read} & UNKNOWN_WORDS)


# --- flags ---


def test_flags() -> None:
    cells = Cells()
    for word in ("1", "1.0", "1.000000000000000000e+00", "True", "true", "T", "yes", "Y", 1, 1.0, True):
        assert cells.flag(word, "AF") is True
    for word in ("0", "0.00", "0.000000000000000000e+00", "False", "f", "No", "n", 0, -0.0, False):
        assert cells.flag(word, "AF") is False
    for word in ("2", "maybe", "0.5", 2, [1]):
        with pytest.raises(InputError, match="AF"):
            cells.flag(word, "AF")


def test_flags_of_one_label() -> None:
    cells = Cells()
    assert cells.flagged({"AF": "1", "SB": "0", "ST": "True"}, "rhythm") == ["AF", "ST"]
    assert cells.flagged({"AF": "0", "SB": False}, "rhythm") == []
    assert not cells.notes
    assert cells.flagged({"AF": "", "SB": None}, "rhythm") is None
    assert cells.flagged({"AF": "1", "SB": ""}, "rhythm") is None
    unknown = "rhythm with flags of which {} are unknown, taken as unknown"
    assert cells.notes == {unknown.format("all"): 1, unknown.format("some"): 1}


@pytest.mark.parametrize("text", ["1.000", "12.000", "1,101", "1,101,000"])
def test_ids_with_separators_of_thousands_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="may have a separator of thousands"):
        Cells().identifier(text, "pid")
    assert Cells().classes(text, "class") == [text]


@pytest.mark.parametrize("text", ["(null)", "#REF!", "#NV", "Unbekannt", "k.A."])
def test_words_of_other_programs_and_languages_are_unknown(text: str) -> None:
    assert Cells().identifier(text, "pid") is None
    assert Cells().classes(text, "class") is None


def test_text_that_spreadsheets_are_made_to_keep() -> None:
    assert Cells().identifier('="0017"', "pid") == "0017"


def test_notes_are_told_with_the_most_frequent_first() -> None:
    cells = Cells()
    for cell in ("17.0", "NA", "NA"):
        cells.identifier(cell, "pid")
    assert told(cells.notes, True) == [
        "2 x pid 'NA' taken as unknown",
        "1 x pid written as a float (17.0, 1e+05), read as a whole number",
    ]
    assert told({str(i): i for i in range(30)}, True, 2)[-1] == "and 28 more such lines"
    assert told({}, True) == []


@pytest.mark.parametrize(
    "text",
    [
        "'AF'",
        "A\u200bF",
        "\ufeffAF",
        "\u200eAF",
        "\u202aAF\u202c",
        "A\u2063F",
        "AF\x07",
        '="AF"',
        "AF\u00a0",
        "A\u00adF",
    ],
)
def test_what_cannot_be_seen_makes_no_other_class_or_patient(text: str) -> None:
    cells = Cells()
    assert cells.classes(text, "dx") == ["AF"]
    assert cells.identifier(text, "patient") == cells.text(text, "age") == "AF"


def test_how_likelihoods_were_read_is_told() -> None:
    cells = Cells()
    for field in ("dx", "scp"):
        cells.classes({"A": 0, "B": 50}, field)
        cells.classes({"A": 1, "B": 0}, field)
    assert cells.notes == {
        "dx with likelihoods or amounts: each above 0 is taken as its class, 0 as none": 1,
        "scp with likelihoods, where 0 is taken for one that was not said, as in PTB-XL": 1,
    }


def test_letters_and_blanks_of_two_kinds_are_one() -> None:
    assert Cells().classes("Mu\u0308ller\u00a0x", "dx") == ["M\u00fcller x"]
    assert Cells().classes("'AF;SB'", "dx") == ["AF", "SB"]
    assert Cells().classes("'", "dx") == ["'"]
    assert Cells().identifier("''", "patient") is None


@pytest.mark.parametrize("text", ["\uff11\uff17", "\u0661\u0667", "1\uff17", "\uff11\uff17.0"])
def test_digits_of_other_scripts_make_the_same_id(text: str) -> None:
    cells = Cells()
    assert cells.identifier(text, "pid") == "17"
    assert cells.notes["pid in digits of another script, read as 0 to 9"] == 1


@pytest.mark.parametrize("text", ["+17", "0x11", "1_000", "1E5", "1e0", "\u216b", "x\u00b2"])
def test_other_forms_of_numbers_are_kept_as_ids(text: str) -> None:
    cells = Cells()
    assert cells.identifier(text, "pid") == text
    assert not cells.notes
