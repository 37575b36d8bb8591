"""Arrays in .npy: which axis is which, what a 1 is worth, whose it is, and what is no such array."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from ecgscale import cli
from ecgscale.data.plausibility import BLANK
from ecgscale.data.sources import OpenedSource, SourceOptions, implausible_unit, open_source
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.simulate import Simulation

RATE_HZ = 250.0


@pytest.fixture(scope="module")
def mv_NLT() -> np.ndarray:
    """Four recordings of 5 s."""
    simulation = Simulation(patients=4, records_per_patient=1, rate_hz=RATE_HZ, duration_s=5.0)
    return np.stack([simulation.read(item).millivolts() for item in simulation.items()])


@pytest.fixture
def folder(tmp_path, mv_NLT) -> Path:
    """One array per record, leads first or samples first."""
    root = tmp_path / "arrays"
    (root / "b").mkdir(parents=True)
    for name, mv_LT in zip(("a", "b/c", "b/d", "e"), mv_NLT, strict=True):
        np.save(root / f"{name}.npy", mv_LT if name in "ab/c" else mv_LT.T)
    return root


def opened(path: Path, **options: object) -> OpenedSource:
    return open_source(path, SourceOptions(**{"source_rate_hz": RATE_HZ} | options))  # type: ignore[arg-type]


def refusal(path: Path, item: str = "", **options: object) -> str:
    def read() -> None:
        source = opened(path, **options)
        source.read(item or source.items()[0])

    with pytest.raises(InputError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder(folder: Path, mv_NLT: np.ndarray) -> None:
    source = opened(folder)
    assert source.dataset == "arrays"
    assert source.description == "npy: 4 arrays, 12 leads at 250 Hz, no labels"
    assert source.items() == ["a", "b/c", "b/d", "e"] == source.unlabelled()
    for item, mv_LT in zip(source.items(), mv_NLT, strict=True):
        record = source.read(item)
        assert (record.name, record.rate_hz, record.leads, record.patient) == (item, RATE_HZ, LEADS, None)
        np.testing.assert_allclose(record.millivolts(), mv_LT, atol=0.001)


@pytest.mark.parametrize("samples_first", [False, True])
def test_one_array(tmp_path, mv_NLT: np.ndarray, samples_first: bool) -> None:
    path = tmp_path / "all.npy"
    np.save(path, mv_NLT.transpose(0, 2, 1) if samples_first else mv_NLT)
    source = opened(path)
    assert source.dataset == "all"
    assert source.description == "npy: 4 records in one array, 12 leads at 250 Hz, no labels"
    assert source.items() == ["0", "1", "2", "3"]
    np.testing.assert_allclose(source.read("2").millivolts(), mv_NLT[2], atol=0.001)
    assert len(pickle.dumps(source)) < 1000


def test_fingerprints_tell_other_numbers_of_the_same_shape(tmp_path, folder: Path, mv_NLT: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", mv_NLT)
    before = [opened(folder).fingerprint("b/c"), opened(tmp_path / "x.npy").fingerprint("2")]
    assert before[1] == opened(tmp_path / "x.npy").fingerprint("2")
    np.save(folder / "b/c.npy", 2 * np.load(folder / "b/c.npy"))
    np.save(tmp_path / "x.npy", mv_NLT * np.array([1, 1, 2, 1])[:, None, None])
    after = [opened(folder).fingerprint("b/c"), opened(tmp_path / "x.npy").fingerprint("2")]
    assert all(one != other for one, other in zip(before, after, strict=True))
    (folder / "b/c.npy").write_bytes(b"")
    assert opened(folder).fingerprint("b/c") == b""


def test_names_of_many_rows_sort(tmp_path) -> None:
    np.save(tmp_path / "x.npy", np.ones((101, 12, 20), "f4"))
    items = opened(tmp_path / "x.npy").items()
    assert items == sorted(items)
    assert items[100] == "100"


def test_labels_of_a_folder(folder: Path, tmp_path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("record,patient_id,age,rhythm\na,4,50,SR|AF\nb/c,5,,\nd,4,,SR\n")
    source = opened(folder, labels_csv=table)
    record = source.read("a")
    assert (record.patient, record.labels, record.metadata) == ("4", {"rhythm": ["SR", "AF"]}, {"age": "50"})
    assert source.read("b/d").patient == "4"
    assert source.unlabelled() == ["e"]
    assert opened(folder, labels_csv=table, patient_key="age").read("a").patient == "50"
    assert opened(folder, patient_key="@folder").read("b/c").patient == "b"
    assert "in the root itself" in refusal(folder, "a", patient_key="@folder")
    assert "no patient 'pid'" in refusal(folder, "a", labels_csv=table, patient_key="pid")
    table.write_text("record\nnobody\n")
    with pytest.raises(InputError, match="names no record"):
        opened(folder, labels_csv=table, record_column="record").items()


@pytest.mark.parametrize("column", ["row", "Row", "record"])
def test_rows_of_one_array_go_by_their_number(tmp_path, mv_NLT: np.ndarray, column: str) -> None:
    np.save(tmp_path / "x.npy", mv_NLT)
    table = tmp_path / "labels.csv"
    table.write_text(f"{column},subject_id,kind\n3,1,k3\n0.0,0,k0\n2,1,k2\n")
    source = opened(tmp_path / "x.npy", labels_csv=table)
    assert [source.read(item).patient for item in source.items()] == ["0", None, "1", "1"]
    assert source.read("3").labels == {"kind": ["k3"]}
    assert source.unlabelled() == ["1"]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("patient,kind\n1,a\n2,b\n3,c\n4,d\n", "no column row or record .* from 0 to 3; add one"),
        ("row,kind\n1,a\n2,b\n3,c\n4,d\n", "line 5: row '4' is no row of x.npy; rows count from 0 to 3"),
        ("row,kind\n1,a\n1,b\n", "line 3: record 1 stands twice"),
        ("record,kind\nr0,a\n", "line 2: record 'r0' is no row of x.npy"),
        ("row,kind\n-1,a\n", "'-1' is no row"),
        ("row,kind\n1.5,a\n", "'1.5' is no row"),
        ("row,kind\nNA,a\n", "column row names no record"),
        ("record,row,kind\n3,0,a\n2,1,b\n", "line 2: row names the record 0, record another; .* --record-column"),
    ],
)
def test_the_order_of_lines_says_nothing_of_one_array(tmp_path, mv_NLT, table: str, reason: str) -> None:
    np.save(tmp_path / "x.npy", mv_NLT)
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(InputError, match=reason):
        opened(tmp_path / "x.npy", labels_csv=tmp_path / "labels.csv").items()


def test_tables_that_are_not_given_are_named(folder: Path) -> None:
    (folder / "labels.csv").write_text("record,kind\n")
    assert opened(folder).left_out() == ["left out: 1 CSVs, since no --labels is given; the first is labels.csv"]


def test_another_column_may_number_the_rows_of_one_array(tmp_path, mv_NLT: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", mv_NLT)
    table = tmp_path / "labels.csv"
    table.write_text("i,kind\n2,k2\n1,k1\n")
    assert opened(tmp_path / "x.npy", labels_csv=table, record_column="i").read("1").labels == {"kind": ["k1"]}
    assert "have no folders" in refusal(tmp_path / "x.npy", patient_key="@folder")


def test_a_table_may_name_the_files(folder: Path, tmp_path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("filename,kind\na.npy,k0\nb/c.NPY,k1\nb\\d.npy,k2\n")
    source = opened(folder, labels_csv=table)
    assert [source.read(item).labels for item in ("a", "b/c", "b/d")] == [{"kind": [f"k{i}"]} for i in range(3)]


def test_floats_do_not_take_the_unit_of_integers(tmp_path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(1, 2, 500)))
    says = "floats (float64) take --unit, such as 0.2mV; --mv-per-count is for integers"
    assert says in refusal(tmp_path / "x.npy", source_leads=("V1", "II"), mv_per_count=0.2)
    opened(tmp_path / "x.npy", source_leads=("V1", "II"), mv_per_count=0.2, unit="0.2mV").read("0")


def test_integers_are_kept_as_they_are(tmp_path) -> None:
    counts_LT = np.random.default_rng(0).integers(-3000, 3000, (2, 500), dtype=np.int16)
    np.save(tmp_path / "x.npy", counts_LT[None])
    source = opened(tmp_path / "x.npy", source_leads=("V1", "II"), mv_per_count=0.005)
    record = source.read("0")
    assert record.leads == ("II", "V1")
    np.testing.assert_array_equal(record.signal_LT, counts_LT[::-1])
    np.testing.assert_allclose(record.scale_L, 0.005)
    assert "integers (int16) say no unit; give --mv-per-count" in refusal(tmp_path / "x.npy", source_leads=("V1", "II"))


@pytest.mark.parametrize(("unit", "factor"), [("V", 1000), ("mV", 1), ("uV", 0.001), (None, 1)])
@pytest.mark.parametrize("dtype", ["f4", "f8", ">f4"])
def test_units(tmp_path, mv_NLT: np.ndarray, unit: str | None, factor: float, dtype: str) -> None:
    np.save(tmp_path / "x.npy", (mv_NLT / factor).astype(dtype))
    np.testing.assert_allclose(opened(tmp_path / "x.npy", unit=unit).read("1").millivolts(), mv_NLT[1], atol=0.001)


@pytest.mark.parametrize(("factor", "unit", "asked"), [(1000, "uV", "microvolts"), (0.001, "V", "volts")])
def test_a_set_in_another_unit_is_asked_about(tmp_path, mv_NLT, capsys, factor: float, unit: str, asked: str) -> None:
    path, out = tmp_path / "x.npy", tmp_path / "out"
    np.save(path, mv_NLT * factor)
    assert implausible_unit(opened(path, unit=unit)) is None
    command = ["ingest", str(path), str(out), "--source-rate-hz=250", "--workers=1"]
    assert cli.main(command) == 2
    said = capsys.readouterr()
    about, question = said.out.splitlines()
    assert about.startswith("npy: 4 records in one array")
    assert question.startswith(f"{path}: 4 of 4 records that were looked at are no ECG, such as {path}: row 0: ")
    for line in (question, said.err):
        assert f"are they {asked}? Then give --unit {unit} " in line
    assert cli.main([*command, "--restart", f"--unit={unit}"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"{out}: no patient ids found, so each record counts as a person of its own; see --patient-key",
        f"{out}: 4 records in 1 shards, 0 rejected",
    ]


def test_records_in_another_unit_than_the_set_are_named(tmp_path, mv_NLT, capsys) -> None:
    factor_N = np.array([1, 1000, 1, 100])
    np.save(tmp_path / "x.npy", mv_NLT * factor_N[:, None, None])
    out = tmp_path / "out"
    assert cli.main(["ingest", str(tmp_path / "x.npy"), str(out), "--source-rate-hz=250", "--workers=1"]) == 0
    said = capsys.readouterr().out
    assert f"{out}: 1 records: deviates from the median as microvolts or counts do" in said
    assert "taken for millivolts; 3 (see" in said
    assert "3 records in 1 shards, 1 rejected" in said
    assert (out / "rejected.csv").read_text().splitlines()[1].startswith("1,")
    assert "are they microvolts?" in (out / "rejected.csv").read_text()


def test_leads_in_another_order_are_asked_about(tmp_path, mv_NLT, capsys) -> None:
    order = [*LEADS[:2], *LEADS[6:], *LEADS[2:6]]
    np.save(tmp_path / "x.npy", mv_NLT[:, [LEADS.index(lead) for lead in order]])
    command = ["ingest", str(tmp_path / "x.npy"), "--source-rate-hz=250", "--workers=1"]
    assert cli.main([*command, str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "4 records: I + III = II, aVR = -(I + II)/2 or their like do not hold" in said
    assert "; 0, 1, 2 and 1 more (see" in said
    assert said.count("is the order of the leads another? Then name them by --source-leads") == 2, "before and after"
    assert cli.main([*command, str(tmp_path / "b"), f"--source-leads={','.join(order)}"]) == 0
    assert "do not hold" not in capsys.readouterr().out


def test_a_folder_of_arrays_and_headers_is_one_of_wfdb(folder: Path) -> None:
    (folder / "r.hea").write_text("x")
    assert "--source-rate-hz does not go with layout wfdb" in refusal(folder)
    assert opened(folder, layout="npy").items()[0] == "a"


@pytest.mark.parametrize(("factor", "unit"), [(10, "0.1mV"), (0.1, "10mV")])
def test_a_set_that_is_off_tenfold_is_asked_about(tmp_path, mv_NLT, capsys, factor: float, unit: str) -> None:
    path, out = tmp_path / "x.npy", tmp_path / "out"
    np.save(path, mv_NLT * factor)
    command = ["ingest", str(path), str(out), "--source-rate-hz=250", "--workers=1"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert said.count(f"Then give --unit {unit}, or ") == 2, "before and after"
    assert f"{out}: 4 records: most leads swing by " in said
    assert implausible_unit(opened(path, unit=unit)) is None


def test_a_lead_of_nan_alone_is_left_out(tmp_path, mv_NLT, capsys) -> None:
    mv_NLT = mv_NLT.copy()
    mv_NLT[1:, 4] = np.nan
    np.save(tmp_path / "x.npy", mv_NLT)
    record = opened(tmp_path / "x.npy").read("2")
    assert record.leads == tuple(lead for lead in LEADS if lead != "aVL")
    np.testing.assert_allclose(record.millivolts(), np.delete(mv_NLT[2], 4, axis=0), atol=0.001)
    command = ["ingest", str(tmp_path / "x.npy"), str(tmp_path / "out"), "--source-rate-hz=250", "--workers=1"]
    assert cli.main(command) == 0
    assert f"3 records: {BLANK}; 1, 2, 3 (see" in capsys.readouterr().out


# --- what is refused ---


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.ones((12, 12)), "of shape (12, 12): leads and samples cannot be told apart"),
        (np.ones((8, 500)), "of shape (8, 500); a record is (leads, samples) or reverse, with 12 leads"),
        (np.ones(500), "of shape (500,)"),
        (np.ones((7, 12, 500)), "of shape (7, 12, 500), 7 records in one array; give this file by itself"),
        (np.full((12, 500), np.nan), "all samples are NaN"),
        (np.where(np.arange(500) < 499, np.nan, np.ones((12, 1))), "NaN or infinity"),
        (np.full((12, 500), np.inf), "NaN or infinity"),
        (np.zeros((12, 500)), "all samples are zero"),
        (np.ones((12, 500), complex), "of type complex128"),
        (np.ones((12, 500), np.int64), "of type int64"),
        (np.ones((12, 500), bool), "of type bool"),
        (np.full((12, 500), "x"), "of type <U1"),
        (np.ones((12, 500), [("a", "f4")]), "of type [('a', '<f4')]"),
        (np.empty((12, 500), object), "not a readable .npy of numbers"),
        (np.ones((12, 0)), "of shape (12, 0)"),
        (np.float64(1), "of shape ()"),
    ],
)
def test_arrays_that_are_refused(tmp_path, array: np.ndarray, reason: str) -> None:
    (tmp_path / "f").mkdir()
    np.save(tmp_path / "f" / "a.npy", array, allow_pickle=True)
    said = refusal(tmp_path / "f")
    assert said.startswith(f"{tmp_path / 'f' / 'a.npy'}: ")
    assert reason in said


@pytest.mark.parametrize("shape", [(12, 500), (0, 12, 500), (2, 12, 12), (2, 8, 500)])
def test_stacks_that_are_refused(tmp_path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "x.npy", np.ones(shape))
    assert refusal(tmp_path / "x.npy").startswith(f"{tmp_path / 'x.npy'}: ")


def test_a_header_that_claims_more_than_the_file_holds(tmp_path) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 12, 5000)})
    (tmp_path / "x.npy").write_bytes(head.getvalue() + bytes(4096))
    assert "not a readable .npy" in refusal(tmp_path / "x.npy")


def test_options_that_are_missing_or_wrong(folder: Path, tmp_path) -> None:
    with pytest.raises(InputError, match="give --source-rate-hz"):
        open_source(folder, SourceOptions())
    assert "source-rate-hz -1: give a finite number above 0" in refusal(folder, source_rate_hz=-1.0)
    assert "mv-per-count nan" in refusal(folder, mv_per_count=float("nan"))
    assert "--source-rate-hz: sampling rate 1e+09 Hz; an ECG has 20 to 100000 Hz" in refusal(folder, source_rate_hz=1e9)
    assert "unknown lead 'X'" in refusal(folder, source_leads=("X",))
    assert "lead I stands 2 times" in refusal(folder, source_leads=("I", "I"))
    assert "unit 'mm'" in refusal(folder, unit="mm") or "unknown unit" in refusal(folder, unit="mm")
    assert "--ignore-leads does not go with layout npy" in refusal(folder, ignore_leads=("V1",))
    np.save(tmp_path / "x.npy", np.ones((2, 12, 50)))
    assert "layout wfdb is not that of .npy files" in refusal(tmp_path / "x.npy", layout="wfdb")


def test_links_that_lead_out_are_not_followed(folder: Path, tmp_path, mv_NLT: np.ndarray) -> None:
    np.save(tmp_path / "out.npy", mv_NLT[0])
    (folder / "z.npy").symlink_to(tmp_path / "out.npy")
    assert "z" not in opened(folder).items()
    assert "links may not lead out" in refusal(folder, "z")


def test_mutated_arrays_are_read_or_refused(tmp_path) -> None:
    (tmp_path / "f").mkdir()
    np.save(tmp_path / "a.npy", np.ones((12, 30), "f4"))
    content = (tmp_path / "a.npy").read_bytes()
    source = opened(tmp_path, unit="mV")
    random_ = random.Random(0)
    for _ in range(400):
        mutated = bytearray(content)
        for _ in range(random_.randint(1, 4)):
            mutated[random_.randrange(128)] = random_.randrange(256)
        (tmp_path / "a.npy").write_bytes(mutated)
        try:
            source.read("a")
        except InputError as error:
            said = str(error)
        else:
            said = str(tmp_path)
        assert said.startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("column", "right", "wrong", "reason"),
    [
        ("fs", 250, 500, "its sample rate is 250 Hz, but 'fs' says 500"),
        ("Sampling Rate", 250, 125, "its sample rate is 250 Hz, but 'Sampling Rate' says 125"),
        ("mv_per_count", 0.001, 0.005, "its mv_per_count is 0.005"),
        ("gain", 1000, 200, "its gain is 200"),
        ("baseline", 0, 512, "0 mV is not the count 0"),
        ("inverted", 0, 1, "upside down"),
    ],
)
def test_a_row_that_contradicts_how_its_record_is_read_rejects_it(
    tmp_path, mv_NLT: np.ndarray, column: str, right: float, wrong: float, reason: str
) -> None:
    root, table = tmp_path / "counts", tmp_path / "table.csv"
    root.mkdir()
    for number, mv_LT in enumerate(mv_NLT):
        np.save(root / f"{number}.npy", np.rint(1000 * mv_LT).astype(np.int16))
    lines = [f"{number},{wrong if number == 2 else right}\n" for number in range(len(mv_NLT))]
    table.write_text(f"record,{column}\n{''.join(lines)}")
    options = {"mv_per_count": 0.001, "labels_csv": table}
    source = opened(root, **options)
    np.testing.assert_allclose(source.read("1").millivolts(), mv_NLT[1], atol=0.001)
    assert reason in refusal(root, "2", **options)


@pytest.mark.parametrize(("unit", "right", "wrong"), [(None, "mV", "uV"), ("uV", "µV", "V"), ("0.5mV", "0.5 mV", "mV")])
def test_a_row_that_names_another_unit_of_floats_rejects_its_record(
    tmp_path, mv_NLT: np.ndarray, unit: str | None, right: str, wrong: str
) -> None:
    root, table = tmp_path / "floats", tmp_path / "table.csv"
    root.mkdir()
    for number, mv_LT in enumerate(mv_NLT):
        np.save(root / f"{number}.npy", mv_LT * (1000 if unit == "uV" else 1))
    lines = [f"{number},{wrong if number == 2 else right}\n" for number in range(len(mv_NLT))]
    table.write_text(f"record,units\n{''.join(lines)}")
    options = {"unit": unit, "labels_csv": table}
    opened(root, **options).read("1")
    assert f"its units is {wrong}, but values are read as" in refusal(root, "2", **options)
