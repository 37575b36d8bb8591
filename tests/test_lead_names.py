"""Names of leads, as files spell them."""

from __future__ import annotations

import pytest

from ecgscale.errors import InputError
from ecgscale.lead_names import (
    LEAD_SETS,
    canonical_lead,
    canonical_leads,
    chosen_leads,
    in_canonical_order,
    parse_renames,
    source_leads,
)


@pytest.mark.parametrize(
    ("name", "lead"),
    [
        *(("I", "I"), ("ECG I", "I"), (" avr ", "aVR"), ("AVL", "aVL"), ("Lead II", "II"), ("ecg lead v6", "V6")),
        *(("ECG_I", "I"), ("LEAD_II", "II"), ("lead_aVR", "aVR"), ("MDC_ECG_LEAD_V3", "V3"), ("ECG\u00a0I", "I")),
    ],
)
def test_lead_names(name: str, lead: str) -> None:
    assert canonical_lead(name) == lead


@pytest.mark.parametrize("name", ["ECG", "V7", "V1R", "IV", "MLII", "ECG I filtered", "I\0"])
def test_other_leads_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match="unknown lead") as caught:
        canonical_lead(name)
    assert repr(name) in str(caught.value)


def test_repeated_leads_are_refused() -> None:
    assert canonical_leads(["v1", "I"]) == ("V1", "I")
    with pytest.raises(InputError, match="V1 stands 2 times"):
        canonical_leads(["V1", "I", "ECG v1"])


def test_leads_are_chosen_by_name_or_as_a_set() -> None:
    assert chosen_leads([]) == ()
    assert chosen_leads(["v2", "I", "AVR"]) == ("I", "aVR", "V2")
    for size, leads in LEAD_SETS.items():
        assert chosen_leads([str(size)]) == leads


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["I", "V7"], "unknown lead 'V7'; did you mean V"),
        (["aVX"], "unknown lead 'aVX'; did you mean aV"),
        (["5"], "one set alone: 12, 6, 4, 3, 2, 1"),
        (["I", "6"], "unknown lead '6'"),
        (["I", "I"], "lead I stands 2 times"),
    ],
)
def test_wrong_choices_of_leads_are_refused_in_one_line(names, said) -> None:
    with pytest.raises(InputError) as caught:
        chosen_leads(names)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lead_sets_are_in_canonical_order() -> None:
    for size, leads in LEAD_SETS.items():
        assert len(leads) == size
        assert in_canonical_order(leads) == list(range(size))
    assert in_canonical_order(["V2", "I", "aVF"]) == [1, 2, 0]


@pytest.mark.parametrize(
    ("name", "likely"),
    [
        ("DI", "I"),
        ("d3", "III"),
        ("MLII", "II"),
        ("I (raw)", "I"),
        ("ECG v2 filtered", "V2"),
        ("lll", "III"),
        ("\u0406", "I"),  # Cyrillic
        ("\u0399\u0399", "II"),  # Greek
        ("\u0430VR", "aVR"),  # Cyrillic a
        ("\u2161", "II"),  # one character, ROMAN NUMERAL TWO
        ("V\uff11", "V1"),  # fullwidth
        ("I\u200b", "I"),  # a blank of no width
        ("ECG-I", "I"),
        ("Lead-aVR", "aVR"),
        ("MDC_ECG_LEAD-II", "II"),
        ("ECG - V2", "V2"),
    ],
)
def test_names_that_need_a_word_of_the_user(name: str, likely: str) -> None:
    with pytest.raises(InputError, match=f"likely {likely};") as caught:
        canonical_lead(name)
    for character in name:
        assert character.isascii() or f"U+{ord(character):04X}" in str(caught.value)
    with pytest.raises(InputError) as caught:
        source_leads([name], {})
    assert f"--rename-leads={f'{name}={likely}'!r}" in str(caught.value)
    assert f"--ignore-leads={name!r}" in str(caught.value)
    assert source_leads([name], dict(parse_renames([f"{name}={likely}"]))) == (likely,)


@pytest.mark.parametrize("name", ["I-II", "ECG 1", "1", "C1", "MCL1", "V1R", "RESP", "LEAD"])
def test_no_lead_is_guessed_for_other_names(name: str) -> None:
    with pytest.raises(InputError, match="unknown lead") as caught:
        source_leads([name], {})
    assert "likely" not in str(caught.value)
    assert "=LEAD" in str(caught.value)


TURNED = ["-aVR", "ECG -aVR", " - avr", "lead_-AVR", "\u2212aVR", "aVR inverted", "aVR (inverted)", "ECG aVR-inverted"]
TURNED += ["inverted aVR", "AVR_neg", "minus aVR", "aVR (-)", "neg. aVR", "aVR [flipped]"]


@pytest.mark.parametrize("name", TURNED)
def test_a_lead_upside_down_is_named_and_not_renamed(name: str) -> None:
    for refuse in (canonical_lead, lambda name: source_leads([name], {}), lambda name: parse_renames([f"{name}=aVR"])):
        with pytest.raises(InputError, match="is aVR upside down") as caught:
            refuse(name)
        assert "--rename-leads" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        source_leads([name], {})
    assert f"; --ignore-leads={name!r} leaves it out" in str(caught.value)


def test_a_lead_without_a_name() -> None:
    with pytest.raises(InputError, match="a lead without a name") as caught:
        source_leads(["I", ""], {})
    assert "leads=" not in str(caught.value)


def test_renaming() -> None:
    renames = dict(parse_renames(["di=I", "I (raw)= avr", "a=b=V1"]))
    assert renames == {"di": "I", "I (raw)": "aVR", "a=b": "V1"}
    assert source_leads([" DI", "i (RAW)", "A=B", "v2"], renames) == ("I", "aVR", "V1", "V2")
    with pytest.raises(InputError, match=r"lead I stands 2 times \('DI', 'ECG I'\)"):
        source_leads(["DI", "ECG I"], renames)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["DI"], "'DI': write NAME=LEAD"),
        (["DI="], "'DI=': write NAME=LEAD"),
        (["=I"], "'=I': write NAME=LEAD"),
        (["DI=V7"], "'DI=V7': write NAME=LEAD"),
        (["DI=I", "di=II"], "'di=II': the name 'di' is given twice"),
    ],
)
def test_wrong_renames(texts: list[str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        parse_renames(texts)
