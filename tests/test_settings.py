"""One way from words to dataclasses: command lines, YAML files, where each value was written, and help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from ecgscale.errors import InputError
from ecgscale.settings import Given, build, from_words, option
from ecgscale.settings.help import documentation, help_text


@dataclass(frozen=True)
class Wheel:
    """A wheel."""

    inches: float = 26.0
    """Across."""
    spokes: int = 32
    """Of one."""

    def __post_init__(self) -> None:
        if self.spokes < 3:
            raise InputError(f"wheel.spokes {self.spokes}: give 3 or more")
        if self.inches > 9 * self.spokes:
            raise InputError(f"wheel.spokes {self.spokes}: too few for wheel.inches {self.inches}; give more")


@dataclass(frozen=True)
class Stop:
    """A stop."""

    name: str
    """Of the place."""
    minutes: int | None = None
    """Of the stay."""


@dataclass(frozen=True, kw_only=True)
class Ride:
    """A ride."""

    start: str = option(positional=True)
    """Where it begins."""
    ends: list[str] = option(positional=True, several=True, default_factory=list)
    """Where it may end."""
    gear: Literal["low", "high", 3] = "low"
    """How fast."""
    dry: bool = False
    """Only look."""
    lamp_v: float = option(6.0, metavar="VOLT")
    """Of the lamp."""
    tags: tuple[str, ...] = option((), repeated=True)
    """Given again, they add up."""
    ways: list[list[str]] = option(default_factory=list, several=True, repeated=True)
    """Given again, they are lists beside each other."""
    quiet: bool = option(False, letter="q")
    """Say nothing."""
    seats: list[int] = option(default_factory=list, several=True, name="seat")
    """Numbers."""
    map: Path | None = None
    """A file."""
    wheel: Wheel = field(default_factory=Wheel)
    notes: dict[str, int | str] = field(default_factory=dict)
    """Names of one's own."""
    stops: list[Stop] = field(default_factory=list)
    """Each is {name: NAME, minutes: N}."""


def ride(*words: str) -> Ride:
    return build(Ride, from_words(Ride, list(words)))


def refusal(*words: str) -> str:
    with pytest.raises(InputError) as refused:
        ride(*words)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_words_of_every_kind(tmp_path: Path) -> None:
    words = "home sea hill --gear 3 --dry --lamp-v 5e-1 --tags a,b --tags=c --seat 1 2 --map m.txt"
    got = ride(*words.split(), "--wheel.spokes=20")
    assert (got.start, got.ends, got.gear, got.dry, got.lamp_v) == ("home", ["sea", "hill"], 3, True, 0.5)
    assert (got.tags, got.seats, got.map, got.wheel.spokes) == (("a", "b", "c"), [1, 2], Path("m.txt"), 20)


def test_lists_beside_each_other_and_a_letter() -> None:
    got = ride("home", "--ways", "a,b", "c", "-q", "--ways", "d")
    assert (got.ways, got.quiet) == ([["a,b", "c"], ["d"]], True)
    assert "--quiet, -q" in help_text(Ride, "ride", short=True)


def test_a_flag_leaves_places_to_what_follows() -> None:
    assert ride("--dry", "home").start == "home"
    assert not ride("--dry", "false", "home").dry


def test_files_and_words_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "ride.yaml"
    path.write_text("wheel:\n  spokes: 12\nstops:\n- {name: inn, minutes: 5}\n- name: mill\n")
    assert ride("home", "--wheel.spokes", "9", "--config", str(path)).wheel.spokes == 12
    got = ride("home", "--config", str(path), "--wheel.spokes", "9")
    assert (got.wheel.spokes, got.stops) == (9, [Stop("inn", 5), Stop("mill")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wheel:\n  spokes: many", ", line 2: wheel.spokes 'many': give a whole number (int)"),
        ("wheel:\n  spokes: true", ", line 2: wheel.spokes 'True': give a whole number (int)"),
        ("wheel:\n\n  spokes: 2", ", line 3: wheel.spokes 2: give 3 or more"),
        ("dry: no\nwheel:\n  inches: 999", ", line 3: wheel.spokes 32: too few for wheel.inches 999.0"),
        ("wheel: 3", ", line 1: wheel: a group of keys, not the value 3"),
        ("wheel:\n  inches: .nan", ", line 2: wheel.inches nan: give a finite number"),
        ("dry:", ", line 1: dry: a value is missing"),
        ("weel: {spokes: 3}", ", line 1: unknown key weel; did you mean wheel?"),
        ("gear: mid", ", line 1: gear 'mid': give one of 'low', 'high', 3"),
        ("stops: [inn]", ", line 1: stops[0]: a group of keys, not the value 'inn'"),
        ("stops:\n- {nam: inn}", ", line 1: unknown key stops[0].nam; did you mean stops[0].name?"),
        ("tags: [1]", ", line 1: tags '[1]': give a list of text"),
        ("[a]", ": a config is a mapping of keys, this is list"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ride.yaml"
    path.write_text(text)
    assert refusal("home", "--config", str(path)).startswith(f"{path}{said}")


def test_a_file_is_not_named_for_what_the_command_line_gives(tmp_path: Path) -> None:
    path = tmp_path / "ride.yaml"
    path.write_text("wheel: {spokes: 30}")
    said = refusal("home", "--config", str(path), "--wheel.spokes=28", "--wheel.inches=999")
    assert said.startswith("wheel.spokes 28: too few")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: start"),
        (["home", "--lamp-v"], "--lamp-v: a value is missing; give --lamp-v VOLT"),
        (["home", "--lamp-v", "dim"], "--lamp-v 'dim': give a number (float)"),
        (["home", "--seat", "x"], "give a list of whole number (int)"),
        (["home", "--wheel", "3"], "--wheel: a group of keys; give one of --wheel.inches, --wheel.spokes"),
        (["home", "--spokes", "3"], "unknown key spokes; did you mean wheel.spokes?"),
        (["home", "--start.x", "3"], "unknown key start.x; start is no group of keys"),
        (["home", "--wheel.spokes", "2"], "wheel.spokes 2: give 3 or more"),
    ],
)
def test_what_is_wrong_on_a_command_line_is_named(words: list[str], said: str) -> None:
    assert said in refusal(*words)


def test_names_of_ones_own_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "ride.yaml"
    path.write_text("notes: {a.b: 1, c-d: x}\n")
    assert ride("home", "--config", str(path), "--notes.e-f", "2").notes == {"a.b": 1, "c-d": "x", "e-f": 2}
    assert build(Ride, Given({"start": "home", "notes": {"a.b": 1}})).notes == {"a.b": 1}
    path.write_text("notes: {a: [1]}\n")
    with pytest.raises(InputError, match=r"ride.yaml, line 1: notes "):
        ride("home", "--config", str(path))


def test_a_tree_without_a_file() -> None:
    assert build(Ride, Given({"start": "home", "wheel": {"spokes": 7}})).wheel.spokes == 7
    with pytest.raises(InputError, match=r"^wheel\.spokes 'x': give a whole number"):
        build(Ride, Given({"start": "home", "wheel": {"spokes": "x"}}))


def test_help_says_every_key() -> None:
    text = help_text(Ride, "ecgscale ride", short=True)
    assert text.startswith("usage: ecgscale ride START ENDS ... [--option VALUE ...]\n\nA ride.\n")
    for entry in (
        "  start ",
        "  --dry ",
        "  --lamp-v VOLT",
        "  --seat A [B ...]",
        "  --wheel.spokes SPOKES",
        "(default: 6.0)",
    ):
        assert entry in text, entry
    assert documentation(Wheel) == {"inches": "Across.", "spokes": "Of one."}
