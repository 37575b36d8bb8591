"""Tables of labels: whose row is whose, one table of several files, and what the closing lines of ingest say."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from ecgscale import cli
from ecgscale.data.description import describe
from ecgscale.data.label_columns import parse_label_columns
from ecgscale.data.label_table import LabelTable, load_label_table
from ecgscale.data.matching import NameMatcher
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import write_manifest
from ecgscale.data.sources.scratch import Scratch
from ecgscale.errors import InputError

ITEMS = ["a/x", "a/y", "b/x", "17", "r1"]


def load(tmp_path: Path, *tables: str, label_columns: tuple[str, ...] = (), **options: str) -> LabelTable:
    paths = []
    for number, table in enumerate(tables):
        paths.append(tmp_path / f"labels{number}.csv")
        paths[-1].write_text(table)
    groups = parse_label_columns(label_columns)
    return load_label_table(paths, NameMatcher(tmp_path, ITEMS), Scratch.make(), label_columns=groups, **options)


def refusal(tmp_path: Path, *tables: str, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load(tmp_path, *tables, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- whose row ---


@pytest.mark.parametrize(
    ("value", "item"),
    [
        *(("a/x", "a/x"), ("a/x.npy", "a/x"), ("a/x.HEA", "a/x"), ("a\\x.npy", "a/x"), ("./a//x", "a/x")),
        *(("y.npy", "a/y"), ("y", "a/y"), ("17", "17"), ("17.0", "17"), (" r1 ", "r1"), ("r1.xml", "r1")),
        *(("17.00", "17"), ("17.000", None)),
        *(("x.1", None), ("017", None), ("R1", None), ("c/y", None), ("17.5", None), ("r1.0", None)),
    ],
)
def test_names_of_records(tmp_path: Path, value: str, item: str | None) -> None:
    table = load(tmp_path, f'record,n\nr1.npy,0\n"{value}",1\n' if item != "r1" else f"record,n\n{value},1\n")
    assert [one for one in ITEMS if table.row(one).get("n") == "1"] == ([item] if item else [])
    assert table.rows_of_none == (item is None)
    assert (f"line 3: {value!r}" in table.row_of_none) == (item is None)


def test_blanks_behind_commas_do_not_become_part_of_a_cell(tmp_path: Path) -> None:
    table = load(tmp_path, 'record, patient_id, n\na/x, "17", "1|2"\n')
    assert table.row("a/x") == {"record": "a/x", "patient_id": "17", "n": "1|2"}


def test_patients_in_columns_of_two_names_are_refused(tmp_path: Path) -> None:
    table = load(tmp_path, "record,patient_id\na/x,1\n", "record,subject_id\na/y,1\n")
    with pytest.raises(InputError, match=r"patient_id of .*labels0.csv and subject_id of .*labels1.csv; call the"):
        describe((), table, "a/y")
    assert describe((), table, "a/y", "subject_id").patient == "1"
    one_of_them = load(tmp_path, "record,patient_id\na/x,1\n", "record,subject_id,n\na/y,NA,1\n")
    assert describe((), one_of_them, "a/x").patient == "1"


def test_one_letter_may_be_written_in_two_ways(tmp_path: Path) -> None:
    composed, apart = "Müller", "Mu\u0308ller"
    (tmp_path / "labels.csv").write_text(
        f"record,patient_id,dx\n{composed}.npy,{apart},{composed}\na/x,{composed},{apart}"
    )
    matcher = NameMatcher(tmp_path, ["a/x", f"b/{apart}", "b/y"])
    table = load_label_table([tmp_path / "labels.csv"], matcher, Scratch.make())
    known = [describe((), table, item) for item in ("a/x", f"b/{apart}")]
    assert [one.patient for one in known] == [composed, composed]
    assert [one.labels["dx"] for one in known] == [[composed], [composed]]
    both = NameMatcher(tmp_path, [composed, apart])
    assert [list(both.records("record", name, tmp_path)) for name in (composed, apart)] == [[composed], [apart]]


def test_a_base_name_that_several_share_is_refused(tmp_path: Path) -> None:
    assert "line 2: record 'x' could be a/x or b/x; give the path" in refusal(tmp_path, "record,n\nx,1\n")


def test_the_column_that_names_most_records_counts(tmp_path: Path) -> None:
    # One of the numbers is the name of a record, by luck.
    table = load(tmp_path, "record,filename,n\n16,r1,r1\n17,a/x,a/x\n18,a/y,a/y\n")
    assert [table.row(item)["n"] for item in ("r1", "a/x", "a/y")] == ["r1", "a/x", "a/y"]
    assert "17" not in table
    said = refusal(tmp_path, "record,filename,n\n17,r1,0\nr1,17,1\n")
    assert "line 2: record names the record 17, filename another" in said
    assert load(tmp_path, "record,filename,n\n17,r1,0\nr1,17,1\n", record_column="filename").row("17")["n"] == "1"


# --- how a CSV is written ---


def load_bytes(tmp_path: Path, content: bytes) -> LabelTable:
    (tmp_path / "labels.csv").write_bytes(content)
    return load_label_table([tmp_path / "labels.csv"], NameMatcher(tmp_path, ITEMS), Scratch.make())


def refusal_of_bytes(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(InputError) as caught:
        load_bytes(tmp_path, content)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'labels.csv'}: ")
    return str(caught.value)


def test_a_column_that_names_other_records_is_told_or_refused(tmp_path: Path) -> None:
    table = load(tmp_path, "filename,record,n\na/x,a/x,1\nr1,a/y,2\nnobody,r1,3\n")
    assert table.row("a/y")["n"] == "2"
    (line,) = table.remarks
    assert "line 3: record names the record a/y, filename another; record counts, since it names more records" in line
    said = refusal(tmp_path, "filename,record,n\na/x,a/x,1\nr1,a/y,2\n")
    assert "line 3: record names the record a/y, filename another; say which one counts with --record-column" in said
    assert load(tmp_path, "filename,record,n\nnobody,a/x,1\nr1,r1,2\n").remarks == []


@pytest.mark.parametrize(
    ("text", "line", "inner_line"),
    [
        ('record,dx\na/x,"AF\na/y,SR\nr1,"\n', 2, 3),
        ('record,dx\na/y,SR\n"a/x","AF\nnobody, SR\nr1.npy,SR"\n', 3, 5),
        ('record,patient_id,dx\na/x,1,"AF\nq,2,SR\np,3,"\n', 2, 3),
    ],
)
def test_rows_that_an_open_quote_swallows_are_named(tmp_path: Path, text: str, line: int, inner_line: int) -> None:
    said = refusal(tmp_path, text)
    assert f'line {line}: a quote (") is opened and not closed, so that line {inner_line} became part of a cell' in said


@pytest.mark.parametrize("rest", ['a/y,"SR"\n', "a/y,SR\n", 'a/y,"SR"\nr1,"SR"\n'])
def test_a_quote_that_breaks_the_csv_is_named_by_its_line(tmp_path: Path, rest: str) -> None:
    said = refusal(tmp_path, f'record,dx\nr1,"A"\na/x,"AF\n{rest}')
    assert "line 3: not a readable CSV" in said
    assert "the row goes to line 4" in said or "the row goes to line 5" in said


def test_line_breaks_in_cells_are_kept(tmp_path: Path) -> None:
    text = 'record,patient_id,dx,report\na/x,1,"AF\nSB","Sinus, normal\naxis, left"\na/y,2,ST,\n'
    table = load(tmp_path, text)
    assert describe((), table, "a/x").labels["dx"] == ["AF", "SB"]
    assert table.row("a/x")["report"] == "Sinus, normal\naxis, left"
    assert table.place("a/y").endswith("line 5")


GERMAN = "record;patient_id;Rhythmus;Größe\r\na/x;17,0;Überleitung;1,80\r\na/y;18,0;SR;12\r\n"


@pytest.mark.parametrize(
    ("encoding", "delimiter", "remark"),
    [
        ("cp1252", ";", "as Windows-1252 text, with semicolons between the cells, with decimal"),
        ("utf-8-sig", ";", "with semicolons between the cells, with decimal"),
        ("utf-16", "\t", "as UTF-16, with tabs between the cells, with decimal"),
    ],
)
def test_what_spreadsheets_write(tmp_path: Path, encoding: str, delimiter: str, remark: str) -> None:
    table = load_bytes(tmp_path, GERMAN.replace(";", delimiter).encode(encoding))
    known = describe((), table, "a/x")
    assert known.patient == "17"
    assert known.labels == {"Rhythmus": ["Überleitung"], "Größe": ["1.80"]}
    assert table.remarks == [f"{tmp_path / 'labels.csv'}: read {remark} commas (72,5 is 72.5) in patient_id, Größe"]
    assert describe((), pickle.loads(pickle.dumps(table)), "a/y").patient == "18"


def test_commas_that_are_no_decimal_ones_stay(tmp_path: Path) -> None:
    table = load_bytes(
        tmp_path,
        b"record;patient_id;dx;n;m;codes\na/x;1,101;426783006,59931005;-0,250;12,500;1,2\na/y;2;12,5;NA;7,5;1,2,3\n",
    )
    row = {"record": "a/x", "patient_id": "1,101", "dx": "426783006,59931005", "n": "-0.250", "m": "12.500"}
    assert table.row("a/x") == row | {"codes": "1,2"}
    assert table.remarks[0].endswith("with decimal commas (72,5 is 72.5) in n, m")
    with pytest.raises(InputError, match="may have a separator of thousands"):
        describe((), table, "a/x")
    assert load(tmp_path, 'record,n\na/x,"1,5"\n').row("a/x")["n"] == "1,5"
    with pytest.raises(InputError, match="patient_id '17,0' has a comma in its number"):
        describe((), load(tmp_path, 'record,patient_id\na/x,"17,0"\n'), "a/x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("record,n\na/x,ü\n".encode("mac-roman"), "line 2: the byte 0x9F is no UTF-8, and which letter it is depends"),
        ("record,n\na/x,ł\n".encode("cp1250"), "line 2: the byte 0xB3 is no UTF-8"),
        ("record,n\na/x,норма\n".encode("cp1251"), "line 2: the byte 0xED is no UTF-8"),
        ("record,n\na/x,ü\n".encode() + b"a/y,\xfc\n", "line 3: the byte 0xFC is no UTF-8, and other lines are UTF-8"),
        ("record,n\na/x,1\n".encode("utf-16-le"), "line 1: not a readable CSV of labels, it has zero bytes"),
        (b"PK\x03\x04\x14\x00", "a spreadsheet's own file; save it as CSV UTF-8"),
        (b"record;dx,n\na/x;1,2\n", "its first line has 2 columns with ',' between them, and with ';'"),
        (b"\xff\xfer\x00e", "not a readable CSV of labels ('utf-16-le' codec .* truncated data); save it as CSV UTF-8"),
        (b"record|n\na/x|1\n", "no column record or filename .* the columns are record|n"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    said = refusal_of_bytes(tmp_path, content)
    assert all(part in said for part in reason.split(" .* ")), said


# --- several files ---


def test_several_files_are_one_table(tmp_path: Path) -> None:
    table = load(tmp_path, "record,patient_id,n\na/x,1,\na/y,2.0,5\n", "name,patient_id,n,m\nr1,3,,6\na/y.hea,2,,7\n")
    assert {item: describe((), table, item).labels for item in ITEMS if item in table} == {
        "a/x": {},
        "a/y": {"n": ["5"], "m": ["7"]},
        "r1": {"m": ["6"]},
    }
    assert [describe((), table, item).patient for item in ("a/x", "a/y", "r1", "17")] == ["1", "2", "3", None]
    assert table.columns == ["record", "patient_id", "n", "name", "m"]


def test_files_may_not_spell_a_column_in_two_ways(tmp_path: Path) -> None:
    said = refusal(tmp_path, "record,Rhythm\na/x,AF\n", "record,rhythm\na/x,SR\n")
    assert "labels1.csv: column 'rhythm' is 'Rhythm' in" in said
    table = load(tmp_path, "record,Patient_ID\na/x,1\n", "record,patient_id\na/x,1\n")
    assert describe((), table, "a/x").patient == "1"


def test_a_mark_where_files_were_joined_is_no_part_of_a_name(tmp_path: Path) -> None:
    assert load(tmp_path, "record,n\na/x,1\n\ufeffa/y,2\n").row("a/y")["n"] == "2"


def test_files_may_not_contradict_each_other(tmp_path: Path) -> None:
    said = refusal(tmp_path, "record,n\na/x,1\n", "record,n\nr1,1\na/x,2\n")
    assert "labels1.csv: line 3: n is '2', but '1' in" in said
    assert "labels0.csv: line 2" in said
    assert "labels1.csv: line 3: record a/x stands twice" in refusal(
        tmp_path, "record,n\na/x,1\n", "record,n\na/x,1\na/x,1\n"
    )
    assert "labels1.csv: column record names no record" in refusal(tmp_path, "record,n\na/x,1\n", "record,n\nq,1\n")


# --- what a row says ---


def test_columns_without_a_name_are_no_labels(tmp_path: Path) -> None:
    table = load(tmp_path, ",Unnamed: 0,record,,n\n0,0,a/x,9,1.0\n")
    assert describe((), table, "a/x").labels == {"n": ["1"]}


def test_likelihoods_are_told_by_their_column(tmp_path: Path) -> None:
    rows = "a/x,{'SR': 0.0},{'SR': 0}\na/y,\"{'NORM': 80.0, 'SR': 0.0}\",{'SR': 75}\n"
    table = load(tmp_path, f"record,scp,flags\n{rows}")
    assert describe((), table, "a/x").labels == {"scp": ["SR"], "flags": []}
    assert describe((), table, "a/y").labels == {"scp": ["NORM", "SR"], "flags": ["SR"]}


def test_flags_in_columns_are_one_label(tmp_path: Path) -> None:
    text = "record,AF,SB,ST,kind\na/x,1,0,True,k\na/y,0,0.0,False,k\nr1,1,,0,k\n17,,NA,,k\n"
    table = load(tmp_path, text, label_columns=("rhythm=AF,SB", "ST"))
    labels = {item: describe((), table, item).labels for item in ("a/x", "a/y", "r1", "17")}
    assert labels == {
        "a/x": {"rhythm": ["AF"], "labels": ["ST"], "kind": ["k"]},
        "a/y": {"rhythm": [], "labels": [], "kind": ["k"]},
        "r1": {"labels": [], "kind": ["k"]},
        "17": {"kind": ["k"]},
    }


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (("AFF,SB",), "no column 'AFF' in the labels; did you mean 'AF'"),
        (("kind=AF,SB",), "'kind' is a column already"),
        (("AF", "SB"), "a second label 'labels'"),
        (("=AF",), "give A,B,C or NAME=A,B,C"),
        (("x=",), "give A,B,C or NAME=A,B,C"),
        (("AF,AF",), "each column once"),
    ],
)
def test_label_columns_that_do_not_fit(tmp_path: Path, option: tuple[str, ...], reason: str) -> None:
    assert reason in refusal(tmp_path, "record,AF,SB,kind\na/x,1,0,k\n", label_columns=option)


def test_a_cell_that_could_mean_two_things_names_its_place(tmp_path: Path) -> None:
    table = load(tmp_path, 'record,AF,dx\na/x,2,k\nr1,1,"[0, 1, 1]"\n', label_columns=("rhythm=AF",))
    with pytest.raises(InputError, match=r"labels0.csv: line 2: AF is '2'; it must be true or false"):
        describe((), table, "a/x")
    with pytest.raises(InputError, match=r"labels0.csv: line 3: 'dx' is .*, a row of flags without names"):
        describe((), table, "r1")


def test_the_ids_of_two_columns_are_not_mixed(tmp_path: Path) -> None:
    table = load(tmp_path, "record,patient,Patient_ID,subject_id\na/x,8,NA,5\na/y,9,,6\n")
    assert [describe((), table, item).patient for item in ("a/x", "a/y")] == ["5", "6"]
    assert table.remarks == [
        f"{tmp_path}/labels0.csv: subject_id and patient name the same patients; subject_id counts"
    ]
    table = load(tmp_path, "record,patient_id,subject_id\na/x,NA,5\na/y,5,6\n")
    assert [describe((), table, item).patient for item in ("a/x", "a/y")] == [None, "5"]
    table = load(tmp_path, "record,id,ID\na/x,1,7\na/y,2,8\n")
    assert [describe((), table, item, patient_key="ID").patient for item in ("a/x", "a/y")] == ["7", "8"]


@pytest.mark.parametrize(
    ("columns", "ids", "chosen"),
    [
        ("subject_id,PatientID", [(1, "P1"), (2, "P1")], ["P1", "P1"]),
        ("patient,subject_id", [("P1", 1), ("P1", 2), ("P2", 3)], ["P1", "P1", "P2"]),
        ("patient_id,Patient_ID", [(1, 7), (1, 8)], ["7", "8"]),
        ("patient_id,subject_id", [("NA", 5), ("", 5), (7, 6)], ["5", "5", "6"]),
    ],
)
def test_columns_that_name_other_patients_are_refused(tmp_path: Path, columns: str, ids: list, chosen: list) -> None:
    """One of them would be picked, and a person may stand in two splits."""
    items = ["a/x", "a/y", "b/x"][: len(ids)]
    rows = "".join(f"{item},{one},{other}\n" for item, (one, other) in zip(items, ids, strict=True))
    table = load(tmp_path, f"record,{columns}\n{rows}")
    with pytest.raises(InputError, match=r"labels0.csv: .* name other patients .* --patient-key"):
        describe((), table, "a/x")
    key = next(column for i, column in enumerate(columns.split(",")) if str(ids[0][i]) == chosen[0])
    assert [describe((), table, item, patient_key=key).patient for item in items] == chosen


def test_a_record_of_two_patients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="patient '5' and patientid '6'"):
        describe(("patient: 5", "PatientID: 6"), None, "r")
    assert describe(("patient: 5", "PatientID: 6"), None, "r", patient_key="patient").patient == "5"
    assert describe(("patient: 5", "PatientID: 5.0"), None, "r").patient == "5"
    table = load(tmp_path, "record,patient_id\na/x,5\n", "record,Patient_ID\na/x,6\n")
    with pytest.raises(InputError, match="two patients"):
        describe((), table, "a/x")


def test_an_id_of_the_header_that_the_table_contradicts_is_counted(tmp_path: Path) -> None:
    table = load(tmp_path, "record,patient_id\na/x,5\na/y,6\nb/x,7\n")
    note = "a patient id of the header passed over, since column patient_id says another"
    ids = [("a/x", "5.0"), ("a/y", "9"), ("b/x", "1.000")]
    both = [describe((f"PatientID: {id_}",), table, item) for item, id_ in ids]
    assert [(one.patient, one.notes.get(note, 0)) for one in both] == [("5", 0), ("6", 1), ("7", 1)]


def test_a_column_that_the_option_names_contradicts_the_usual_comments(tmp_path: Path) -> None:
    table = load(tmp_path, "record,mrn\na/x,5\na/y,6\nb/x,\n")
    note = "a patient id of the header passed over, since column mrn says another"
    each = [describe(("PatientID: 5",), table, item, patient_key="mrn") for item in ("a/x", "a/y", "b/x")]
    assert [(one.patient, one.patient_key, one.notes.get(note, 0)) for one in each] == [
        ("5", "mrn", 0),
        ("6", "mrn", 1),
        (None, "", 0),
    ]


def test_ids_of_the_header_beside_those_of_a_table_are_counted(tmp_path: Path) -> None:
    table = load(tmp_path, "record,patient_id\na/x,5\na/y,NA\n")
    note = "a patient id of the header, for a record without one in column patient_id"
    both = [describe(("PatientID: P5",), table, item) for item in ("a/x", "a/y", "r1")]
    assert [one.patient for one in both] == ["5", "P5", "P5"]
    assert [one.notes.get(note, 0) for one in both] == [0, 1, 1]
    assert note not in describe((), table, "a/y").notes
    without = load(tmp_path, "record,n\na/x,5\n")
    for key in (None, "PatientID"):
        assert describe(("PatientID: P5",), without, "a/x", patient_key=key).notes == {}


# --- headers ---


@pytest.mark.parametrize("column", ["Dx", "dx"])
def test_the_words_of_tables_and_headers_do_not_mix(tmp_path: Path, column: str) -> None:
    table = load(tmp_path, f"record,{column},age\na/x,AF,50\na/y,NA,\nb/x,426783006,45\n")
    header = ("Dx: 426783006", "Age: 45")
    each = [describe(header, table, item) for item in ("a/x", "a/y", "b/x", "r1")]
    assert [one.labels for one in each] == [{column: ["AF"]}, {}, {column: ["426783006"]}, {}]
    assert [one.metadata["age"] for one in each] == ["50", "45", "45", "45"]
    silent = f"Dx of the header passed over, since the tables have a column {column}, without a word on it"
    notes = (silent, *(f"{key} of the header passed over, since the table says another" for key in ("Dx", "age")))
    assert [[one.notes.get(note, 0) for note in notes] for one in each] == [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 0]]


def test_columns_of_one_name_in_two_spellings_are_both_kept(tmp_path: Path) -> None:
    table = load(tmp_path, "record,age,Age\na/x,50,60\na/y,50,50.0\n")
    both = [describe((), table, item) for item in ("a/x", "a/y")]
    assert [one.metadata for one in both] == [{"age": "50 | 60"}, {"age": "50"}]
    assert [one.notes.get("age with several values, all kept", 0) for one in both] == [1, 0]


def test_all_lines_of_diagnoses_count() -> None:
    comments = (
        "Dx: 426783006",
        "dx:59931005.0 ; 10370003",
        "DX: 426783006 164889003 12",
        "Dx: Unknown",
        "Dx: Sinus rhythm",
    )
    codes = ["426783006", "59931005", "10370003", "164889003", "12", "Sinus rhythm"]
    assert describe(comments, None, "r").labels == {"Dx": codes}
    assert describe(("Dx: NA", "Dx:"), None, "r").labels == {}
    assert describe((), None, "r").labels == {}


@pytest.mark.parametrize("line", ["Dx= 1", "Dx = 1", "dx=1", "Dx : 1", "Dx\uff1a1", "DX\t:1"])
def test_signs_between_a_key_and_its_value(line: str) -> None:
    known = describe((line, line.replace("1", "AF", 1), "Rhythm = SR", "url: http://x?a=b"), None, "r")
    assert known.labels == {"Dx": ["1", "AF"]}
    assert known.metadata == {"Rhythm": "SR", "url": "http://x?a=b"}
    assert known.notes == {}


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("Dx 426783006", "a line of the header that begins with Dx and has no colon, not read"),
        ("Dx - AF", "a line of the header that begins with Dx and has no colon, not read"),
        ("PatientID 7", "a line of the header that begins with PatientID and has no colon, not read"),
        ("Age: 64 Sex: M", "a line of the header with Sex behind another key, not read"),
        ("Age: 45, subject_id=7", "a line of the header with subject_id behind another key, not read"),
    ],
)
def test_lines_of_headers_that_are_not_read_are_counted(line: str, note: str) -> None:
    known = describe((line, line), None, "r")
    assert known.notes[note] == 2
    assert (known.labels, known.patient) == ({}, None)


@pytest.mark.parametrize(
    "line", ["Dx", "Dx:", "a note on the Dx of old", "Aged, 5", "Sexes differ", "Dx: none", ": Dx"]
)
def test_other_lines_of_headers_are_not_counted(line: str) -> None:
    assert not any("of the header" in note for note in describe((line,), None, "r").notes)


@pytest.mark.parametrize(
    ("lines", "classes"),
    [
        (["['a','b']"], ["a", "b"]),
        (['{"a": true, "b": false}'], ["a"]),
        (["['426783006', '59931005']", "12 13"], ["426783006", "59931005", "12", "13"]),
        *(([text], []) for text in ("[]", "{}", "{'a': 0}")),
        (["[]", "a"], ["a"]),
        (["['NA']"], None),
    ],
)
def test_lists_in_headers_are_read_as_in_tables(lines: list[str], classes: list[str] | None) -> None:
    known = describe([f"Dx: {line}" for line in lines], None, "r")
    assert known.labels == ({} if classes is None else {"Dx": classes})


def test_patients_of_headers() -> None:
    assert describe(("patient_id: 17.0", "Patient_ID: 17"), None, "r").patient == "17"
    assert describe(("patient_id: NA", "subject_id: 4"), None, "r").patient == "4"
    for spelling in ("Patient-ID", "patient id", "PatientID", "Subject ID", "SUBJECT-ID", "SubjectID"):
        assert describe((f"{spelling}: 4",), None, "r").patient == "4", spelling
    with pytest.raises(InputError, match="patient_id names two patients, '17' and '18'"):
        describe(("patient_id: 17", "patient_id: 18"), None, "r")


# --- the command ---


@pytest.fixture
def batch(tmp_path: Path):
    def write(name: str, table: str, records: int = 6) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(len(name))
        for i in range(records):
            np.save(folder / f"{name}{i}.npy", rng.normal(0, 0.3, (12, 500)).astype("f4"))
        (folder / "labels.csv").write_text(table)
        return folder

    return write


def ingest(folder: Path, out: Path, *options: str) -> int:
    how = ["--source-rate-hz=100", "--rate-hz=100", "--dataset=hospital", "--workers=2", "--records-per-shard=3"]
    return cli.main(["ingest", str(folder), str(out), *how, "--labels", str(folder / "labels.csv"), *options])


def test_a_patient_is_one_person_however_a_batch_writes_the_id(tmp_path: Path, batch, capsys) -> None:
    one = batch("one", "record,patient_id\n" + "".join(f"one{i}.npy,{i}\n" for i in range(6)))
    two = batch("two", "record,patient_id\n" + "".join(f"two{i}.npy,{i}.0\n" for i in range(5)) + "two5.npy,\n")
    assert ingest(one, tmp_path / "out", "--validation-fraction=0.4") == 0
    assert ingest(two, tmp_path / "out", "--validation-fraction=0.4", "--append") == 0
    assert "5 x patient_id written as a float (17.0, 1e+05), read as a whole number" in capsys.readouterr().out
    shards = ShardSet.open(tmp_path / "out")
    patients = shards.column("patient").tolist()
    assert patients[:5] == patients[6:11]
    assert len(set(patients)) == 7
    splits = shards.column("split").tolist()
    assert splits[:5] == splits[6:11]


def test_how_a_table_is_written_is_said(tmp_path: Path, batch, capsys) -> None:
    folder = batch("in", "record;patient_id\n" + "".join(f"in{i};{i},0\n" for i in range(6)))
    assert ingest(folder, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert (
        f"{folder / 'labels.csv'}: read with semicolons between the cells, with decimal commas (72,5 is 72.5) in "
        in said
    )
    assert "records have a row in" not in said
    assert ShardSet.open(tmp_path / "out").metadata(3)["patient"] == "3"


def test_ids_of_older_versions_are_pointed_out(tmp_path: Path, batch, capsys) -> None:
    one, two = (batch(name, f"record,patient_id\n{name}0,17\n") for name in ("one", "two"))
    out = tmp_path / "out"
    assert ingest(one, out) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["sources"][0]["notes"]
    index = {name: manifest["index"][name] for name in ("file", "bytes", "sha256")}
    write_manifest(out, manifest["rate_hz"], index, manifest["shards"], manifest["sources"])
    assert ingest(two, out, "--append") == 0
    assert "6 x a record of an older version, whose patient's id stands as it was written" in capsys.readouterr().out


def test_unknown_patients_are_persons_of_their_own_and_everything_is_counted(tmp_path: Path, batch, capsys) -> None:
    table = "record,patient_id,AF,SB\nin0,NA,1,0\nin1,NA,0,0\nin2,None,1,\nin3,None,0,1\nin4,7,0,0\nnobody,8,0,0\n"
    more = tmp_path / "more.csv"
    more.write_text("record,kind\nin0,\"['A', 'B']\"\n")
    folder = batch("in", table)
    out = tmp_path / "out"
    assert ingest(folder, out, "--labels", str(more), "--label-columns", "rhythm=AF,SB") == 0
    said = capsys.readouterr().out
    for line in (
        "2 x patient_id 'NA' taken as unknown",
        "2 x patient_id 'None' taken as unknown",
        "5 x a record without a known patient, taken as a person of its own",
        "1 x rhythm with flags of which some are unknown, taken as unknown",
        "1 x kind written as a list, read as its classes",
        "6 records in 2 shards, 0 rejected",
        "1 records have no row in",
        "1 rows of",
        "labels.csv: line 7: 'nobody'",
        f"5 of 6 records have a row in {folder / 'labels.csv'}",
        f"1 of 6 records have a row in {more}",
    ):
        assert line in said, line
    shards = ShardSet.open(out)
    assert len(set(shards.column("patient").tolist())) == 6
    labels = [shards.metadata(i)["labels"] for i in range(6)]
    assert labels == [
        {"rhythm": ["AF"], "kind": ["A", "B"]},
        {"rhythm": []},
        {},
        {"rhythm": ["SB"]},
        {"rhythm": []},
        {},
    ]
    source = json.loads((out / "manifest.json").read_text())["sources"][0]
    assert source["notes"]["patient_id 'NA' taken as unknown"] == 2
    assert cli.main(["inspect", str(out)]) == 0
    assert "rhythm: (none) 2, AF 1, SB 1" in capsys.readouterr().out


def test_values_of_a_split_are_read_as_the_labels_are(tmp_path: Path, batch) -> None:
    folder = batch(
        "in", "record,patient_id,fold,held_out\n" + "".join(f"in{i},{i},{i % 3}.0,{i == 5}\n" for i in range(6))
    )
    values = ("--split-by=fold", "--validation-values=1.0", "--test-values=2")
    assert ingest(folder, tmp_path / "folds", *values) == 0
    assert ShardSet.open(tmp_path / "folds").column("split").tolist() == [0, 1, 2] * 2
    assert ingest(folder, tmp_path / "flags", "--split-by=held_out", "--test-values=True") == 0
    assert ShardSet.open(tmp_path / "flags").column("split").tolist() == [0] * 5 + [2]


def test_a_column_of_splits_is_found_in_any_case(tmp_path: Path, batch) -> None:
    folder = batch("in", "record,patient_id,Fold\n" + "".join(f"in{i},{i},{i % 3}\n" for i in range(6)))
    assert ingest(folder, tmp_path / "out", "--split-by=fold", "--validation-values=1", "--test-values=2") == 0
    assert ShardSet.open(tmp_path / "out").column("split").tolist() == [0, 1, 2] * 2


def test_other_labels_are_another_ingest(tmp_path: Path, batch, capsys) -> None:
    folder = batch("in", "record,AF\nin0,1\n")
    assert ingest(folder, tmp_path / "out", "--part=1/2") == 0
    (tmp_path / "more.csv").write_text("record,kind\nin0,A\n")
    assert ingest(folder, tmp_path / "out", "--part=2/2", "--labels", str(tmp_path / "more.csv")) == 2
    assert "--labels" in capsys.readouterr().err
    assert ingest(folder, tmp_path / "out", "--part=2/2", "--label-columns=AF") == 2
    assert "--label-columns" in capsys.readouterr().err
    assert ingest(folder, tmp_path / "out", "--part=2/2") == 0
    assert ingest(folder, tmp_path / "out", "--merge") == 0


def test_workers_share_a_large_table(tmp_path: Path) -> None:
    rows = "".join(f"r{i},{i},{'x' * 50}\n" for i in range(2000))
    (tmp_path / "labels.csv").write_text("record,patient_id,n\n" + rows)
    items = [f"r{i}" for i in range(2000)]
    table = load_label_table([tmp_path / "labels.csv"], NameMatcher(tmp_path, items), Scratch.make())
    pickled = pickle.dumps(table)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert describe((), again, "r1999").patient == "1999"
    assert "r2000" not in again
