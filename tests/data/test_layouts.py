"""Known data sets of WFDB records, in miniature: who the patients are and what the tables say."""

from __future__ import annotations

import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ecgscale import cli
from ecgscale.data.sources import OpenedSource, SourceOptions, WfdbFolder, open_source
from ecgscale.data.sources.listing import shared_names
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.record import Record
from ecgscale.simulate import Simulation

KINDS = ("folder", "zip", "tar", "tar.gz", "topped.zip", "topped.tar.gz")
MIMIC_LEADS = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")

# The columns of version 1.0.3, as far as they are needed, between some that are not.
PTBXL = """ecg_id,patient_id,age,sex,height,r,scp_codes,strat_fold,filename_lr,filename_hr
1,15709.0,56.0,1,,SR,"{'NORM': 100.0, 'LVOLT': 0.0, 'SR': 0.0}",3,records100/00000/00001_lr,records500/00000/00001_hr
2,13243.0,300.0,0,,,"{'IMI': 35.0, 'ASMI': 0.0, 'ABQRS': 0.0}",9,records100/00000/00002_lr,records500/00000/00002_hr
3,15709.0,nan,0,,,{},10.0,records100/00000/00003_lr,records500/00000/00003_hr
4,7.0,20.0,0,,,"{'UNKNOWN': 50.0}",1,records100/00000/00004_lr,records500/00000/00004_hr
"""
STATEMENTS = """,description,diagnostic,form,rhythm,diagnostic_class,diagnostic_subclass,Statement Category
NORM,normal ECG,1.0,,,NORM,NORM,Normal/abnormal
IMI,inferior myocardial infarction,1.0,,,MI,IMI,Myocardial Infarction
ASMI,anteroseptal myocardial infarction,1.0,,,MI,AMI,Myocardial Infarction
NDT,non-diagnostic T abnormalities,1.0,1.0,,STTC,STTC,other
ABQRS,abnormal QRS,,1.0,,,,QRS
LVOLT,low QRS voltages,,1.0,,,,QRS
SR,sinus rhythm,,,1.0,,,Rhythm
"""
MEASUREMENTS = """subject_id,study_id,cart_id,ecg_time,report_0,report_1,report_2,bandwidth,rr_interval
10000032,40689238,6848296,2180-07-23 08:44:00,Sinus rhythm,,Borderline | ECG,0.005-150 Hz,659
10000032,44458630,6848296,2180-07-23 09:54:00,,,,0.005-150 Hz,659
10001725,49036311,6848296,2110-10-11 11:45:00,"Sinus, probably",Abnormal ECG,,0.005-150 Hz,659
"""
RECORD_LIST = """subject_id,study_id,file_name,ecg_time,path
10000032,40689238,40689238,2180-07-23 08:44:00,files/p1000/p10000032/s40689238/40689238
10000032,44458630,44458630,2180-07-23 09:54:00,files/p1000/p10000032/s44458630/44458630
10001725,49036311,49036311,2110-10-11 11:45:00,files/p1000/p10001725/s49036311/49036311
10009999,49999999,49999999,,files/p1000/p10009999/s49999999/49999999
"""


@pytest.fixture(scope="module")
def ecgs() -> list[Record]:
    """Simulated recordings of 10 s at 500 Hz."""
    simulation = Simulation(patients=4, records_per_patient=1)
    return [simulation.read(item) for item in simulation.items()]


@pytest.fixture
def ptbxl(tmp_path, ecgs, write_record) -> Path:
    """Three of the table's four records."""
    root = tmp_path / "ptb-xl"
    for i, record in enumerate(ecgs[:3], 1):
        write_record(root / "records500" / "00000", f"{i:05d}_hr", record)
        write_record(root / "records100" / "00000", f"{i:05d}_lr", record.resampled(100))
    (root / "ptbxl_database.csv").write_text(PTBXL)
    (root / "scp_statements.csv").write_text(STATEMENTS)
    return root


@pytest.fixture
def mimic(tmp_path, ecgs, write_record) -> Path:
    root = tmp_path / "mimic"
    for line, record in zip(RECORD_LIST.splitlines()[1:4], ecgs, strict=False):
        path = root / line.split(",")[4]
        write_record(path.parent, path.name, record, leads=MIMIC_LEADS)
    (root / "record_list.csv").write_text(RECORD_LIST)
    (root / "machine_measurements.csv").write_text(MEASUREMENTS)
    return root


@pytest.fixture
def cinc2021(tmp_path, ecgs, write_record) -> Path:
    root = tmp_path / "challenge" / "training"
    for i, database in enumerate(("cpsc_2018", "cpsc_2018_extra", "georgia", "ptb-xl")):
        write_record(root / database / "g1", f"X{i:04d}", ecgs[i], ["Age: 74", "Sex: Male", "Dx: 59118001,426783006"])
    return root.parent


def as_kind(root: Path, kind: str) -> Path:
    """A folder as it is or packed; "topped" has the folder itself in the archive."""
    if kind == "folder":
        return root
    suffix = kind.removeprefix("topped.")
    out = root.with_name(f"{root.name}.{suffix}")
    top = f"{root.name}-1.0" if kind.startswith("topped") else ""
    if suffix == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(root.rglob("*")):
                packed.write(path, Path(top, path.relative_to(root)))
    else:
        with tarfile.open(out, "w:gz" if suffix.endswith("gz") else "w") as packed:
            packed.add(root, top or ".")
    return out


def opened(path: Path, **options: object) -> OpenedSource:
    return open_source(path, SourceOptions(**options))  # type: ignore[arg-type]


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        opened(path, **options).items()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- PTB-XL ---


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (["p1/day1/a", "p1/day2/a", "p2/day1/a"], "1 folder names stand .* such as 'day1' below 'p1' and 'p2'"),
        (["p/a", "q/p/a"], "such as 'p' below 'the root' and 'q'"),
        (["ward1/p1/a", "ward1/p1/b", "ward2/p2/a", "c"], None),
    ],
)
def test_folders_of_sessions_are_no_patients(items, says) -> None:
    line = shared_names(items)
    assert line is None if says is None else re.search(says, line)


@pytest.mark.parametrize("kind", KINDS)
def test_ptbxl(ptbxl: Path, ecgs: list[Record], kind: str) -> None:
    source = opened(as_kind(ptbxl, kind))
    assert source.dataset == "ptb-xl"
    assert source.description.startswith("PTB-XL: 3 records")
    assert "--split-by strat_fold --validation-values 9 --test-values 10" in source.description
    names = [f"records500/00000/0000{i}_hr" for i in (1, 2, 3)]
    assert source.items() == names
    one, two, three = map(source.read, names)
    assert [record.patient for record in (one, two, three)] == ["15709", "13243", "15709"]
    assert one.labels == {
        "scp": ["NORM", "LVOLT", "SR"],
        "superclass": ["NORM"],
        "subclass": ["NORM"],
        "form": ["LVOLT"],
        "rhythm": ["SR"],
        "strat_fold": ["3"],
    }
    assert two.labels["superclass"] == ["MI"]  # once, though two codes are of it
    assert two.labels["subclass"] == ["IMI", "AMI"]
    assert three.labels == {"strat_fold": ["10"]}
    assert [record.metadata for record in (one, two, three)] == [
        {"age": "56", "sex": "female"},
        {"age": ">89", "sex": "male"},
        {"sex": "male"},
    ]
    np.testing.assert_array_equal(one.signal_LT, ecgs[0].signal_LT)
    assert one.rate_hz == 500


def test_fingerprints_of_ptbxl_tell_other_rows_of_its_table(ptbxl: Path) -> None:
    before = opened(ptbxl)
    (ptbxl / "ptbxl_database.csv").write_text(PTBXL.replace("3,15709.0", "3,15710.0"))
    after = opened(ptbxl)
    changed = [item for item in before.items() if before.fingerprint(item) != after.fingerprint(item)]
    assert changed == [item for item in before.items() if before.read(item).patient != after.read(item).patient]
    assert 0 < len(changed) < len(before.items())


def test_ptbxl_at_100_hz_where_500_is_absent(ptbxl: Path) -> None:
    (ptbxl / "records500").rename(ptbxl.parent / "elsewhere")
    source = opened(ptbxl)
    assert source.items()[0] == "records100/00000/00001_lr"
    assert source.read(source.items()[0]).rate_hz == 100


def test_the_folds_of_ptbxl_split_it(ptbxl: Path, tmp_path, capsys) -> None:
    (ptbxl / "ptbxl_database.csv").write_text(PTBXL.replace("3,15709.0", "3,15710.0"))
    split = ["--split-by=strat_fold", "--validation-values=9", "--test-values=10"]
    assert cli.main(["ingest", str(ptbxl), str(tmp_path / "out"), "--workers=1", *split]) == 0
    assert capsys.readouterr().out.startswith("PTB-XL: 3 records")


def test_codes_that_the_statements_of_ptbxl_do_not_know_are_counted(ptbxl: Path) -> None:
    (ptbxl / "scp_statements.csv").write_text(STATEMENTS.replace("NORM,normal", "norm,normal"))
    record = opened(ptbxl).read("records500/00000/00001_hr")
    assert "superclass" not in record.labels
    told = "scp code 'NORM' that scp_statements.csv does not know, so of no superclass or the like"
    assert record.notes[told] == 1


@pytest.mark.parametrize("written", ["{}", "{}.0", "0{}"])
def test_tables_name_records_of_ptbxl_by_their_number(ptbxl: Path, tmp_path, written: str) -> None:
    numbers = [written.format(number) for number in (3, 1, 4)]
    (tmp_path / "mine.csv").write_text("ECG_ID,mine\n" + "".join(f"{number},is {number}\n" for number in numbers))
    source = opened(ptbxl, labels_csv=tmp_path / "mine.csv")
    mine = [source.read(item).labels.get("mine") for item in source.items()]
    assert mine == [[f"is {numbers[1]}"], None, [f"is {numbers[0]}"]]
    assert source.labels is not None
    assert source.labels.rows_of_none == 1


def test_a_number_and_a_name_that_contradict_are_refused(ptbxl: Path, tmp_path) -> None:
    (tmp_path / "mine.csv").write_text("filename_hr,ecg_id,mine\n00001_hr,1,a\n00002_hr,3,b\n")
    said = refusal(ptbxl, labels_csv=tmp_path / "mine.csv")
    assert "line 3: filename_hr names the record records500/00000/00002_hr, ecg_id another" in said


def test_a_number_of_a_known_set_says_nothing_of_plain_records(ptbxl: Path, tmp_path) -> None:
    (tmp_path / "mine.csv").write_text("ecg_id,mine\n1,a\n")
    said = refusal(ptbxl / "records500", labels_csv=tmp_path / "mine.csv", layout="wfdb")
    assert "column ecg_id names no record below" in said


def test_ptbxl_with_labels_of_ones_own(ptbxl: Path, tmp_path) -> None:
    (tmp_path / "mine.csv").write_text("record,scp,mine\nrecords500/00000/00001_hr,MINE,a|b\n")
    source = opened(ptbxl, labels_csv=tmp_path / "mine.csv")
    record = source.read("records500/00000/00001_hr")
    labels = record.labels
    note = "of the data set's own table passed over, since the header or --labels says another"
    assert [name for name in record.notes if note in name] == [f"scp {note}"]
    assert labels["mine"] == ["a", "b"]
    assert labels["scp"] == ["MINE"]  # the user's own word counts
    assert labels["superclass"] == ["NORM"]
    assert source.unlabelled() == source.items()[1:]


def test_patients_of_ones_own_for_ptbxl_are_passed_over_and_counted(ptbxl: Path, tmp_path) -> None:
    names = [f"records500/00000/0000{i}_hr" for i in (1, 2, 3)]
    (tmp_path / "mine.csv").write_text(f"record,patient_id\n{names[0]},A\n{names[1]},13243\n")
    source = opened(ptbxl, labels_csv=tmp_path / "mine.csv")
    records = [source.read(name) for name in names]
    assert [record.patient for record in records] == ["15709", "13243", "15709"]
    told = [any("passed over, since the data set's own table" in note for note in record.notes) for record in records]
    assert told == [True, False, False]


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("ptbxl_database.csv", "patient_id", "pid", "no column patient_id; the columns are ecg_id, pid"),
        ("ptbxl_database.csv", ",3,records100", ",3,x,records100", "line 2 has 11 fields"),
        ("ptbxl_database.csv", "records500", "records", "no WFDB record"),
        ("scp_statements.csv", "rhythm", "r", "no column rhythm"),
        ("scp_statements.csv", STATEMENTS, "", "no column diagnostic; the columns are none"),
    ],
)
def test_broken_tables_of_ptbxl(ptbxl: Path, file: str, old: str, new: str, reason: str) -> None:
    text = (ptbxl / file).read_text()
    assert old in text
    (ptbxl / file).write_text(text.replace(old, new))
    for kind in ("folder", "zip"):
        with pytest.raises(InputError, match=reason) as caught:
            opened(as_kind(ptbxl, kind))
        assert str(caught.value).startswith(str(as_kind(ptbxl, kind)))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_equal_rows_of_one_record_count_once(ptbxl: Path, kind: str) -> None:
    table = ptbxl / "ptbxl_database.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([*lines, lines[1], lines[2]]))
    source = opened(as_kind(ptbxl, kind))
    assert len(source.items()) == 3
    assert source.read("records500/00000/00001_hr").labels["superclass"] == ["NORM"]
    line = "2 rows repeat others and count once; the first is ptbxl_database.csv: line 6, of the record records500/"
    assert [one for one in source.left_out() if one.startswith(line)]


def test_codes_and_studies_that_stand_twice(ptbxl: Path, mimic: Path) -> None:
    statements, measurements = ptbxl / "scp_statements.csv", mimic / "machine_measurements.csv"
    twice = STATEMENTS.replace("IMI,inferior", "NORM,inferior")
    statements.write_text(twice)
    assert "scp_statements.csv: line 3: the code 'NORM' stands twice" in refusal(ptbxl)
    other = MEASUREMENTS.splitlines(keepends=True)[1].replace("Sinus rhythm", "Paced")
    measurements.write_text(MEASUREMENTS + other)
    source = opened(mimic)
    assert source.read(source.items()[0]).labels["report"] == ["Sinus rhythm", "Borderline | ECG"]
    line = (
        "1 rows of machine_measurements.csv say other reports or patients than an earlier row, which counts; the "
        "first is of study"
    )
    assert [one for one in source.left_out() if one == f"{line} 40689238"]


def test_contradicting_rows_of_one_record_cost_that_record(ptbxl: Path) -> None:
    table = ptbxl / "ptbxl_database.csv"
    table.write_text(table.read_text().replace("00002_hr", "00001_hr"))
    source = opened(ptbxl)
    item, other = source.items()
    with pytest.raises(InputError, match=r"ptbxl_database.csv: line 2 and ptbxl_database.csv: line 3 contradict each"):
        source.read(item)
    assert source.read(other).patient


@pytest.mark.parametrize(
    ("old", "new", "item", "reason"),
    [
        ("{'NORM': 100.0,", "{'NORM': foo(),", "records500/00000/00001_hr", "line 2: scp_codes .* are no codes"),
        ("records500/00000/00002_hr", "NA", "ptbxl_database.csv: line 3", "line 3: filename_hr is 'NA'; it must name"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_bad_cell_costs_ptbxl_one_record(ptbxl: Path, kind: str, old: str, new: str, item: str, reason: str) -> None:
    text = (ptbxl / "ptbxl_database.csv").read_text()
    assert text.count(old) == 1
    (ptbxl / "ptbxl_database.csv").write_text(text.replace(old, new))
    source = opened(as_kind(ptbxl, kind))
    assert len(source.items()) == 3
    for other in source.items():
        if other == item:
            with pytest.raises(InputError, match=reason):
                source.read(item)
        else:
            assert source.read(other).labels["strat_fold"]


def test_missing_and_unreadable_tables(ptbxl: Path) -> None:
    (ptbxl / "scp_statements.csv").write_bytes(b"\xff\xfe")
    assert "not a readable CSV" in refusal(ptbxl)
    (ptbxl / "scp_statements.csv").unlink()
    assert "scp_statements.csv: cannot be read" in refusal(ptbxl)
    assert "holds no scp_statements.csv" in refusal(as_kind(ptbxl, "zip"))
    (ptbxl / "scp_statements.csv").symlink_to("/etc/hostname")
    assert "links may not lead out" in refusal(ptbxl)


# --- MIMIC-IV-ECG ---


def test_tables_name_records_of_mimic_by_their_study(mimic: Path, tmp_path) -> None:
    (tmp_path / "mine.csv").write_text("study_id,subject_id,mine\n49036311,10001725,a\n40689238,10000032,b\n1,2,c\n")
    source = opened(mimic, labels_csv=tmp_path / "mine.csv")
    mine = {item.rpartition("/")[2]: source.read(item).labels.get("mine") for item in source.items()}
    assert mine == {"40689238": ["b"], "44458630": None, "49036311": ["a"]}


@pytest.mark.parametrize("kind", KINDS)
def test_mimic(mimic: Path, ecgs: list[Record], kind: str) -> None:
    source = opened(as_kind(mimic, kind))
    assert source.description.startswith("MIMIC-IV-ECG: 3 records")
    items = source.items()
    assert items == [line.split(",")[4] for line in RECORD_LIST.splitlines()[1:4]]
    records = [source.read(item) for item in items]
    assert [record.patient for record in records] == ["10000032", "10000032", "10001725"]
    assert [record.labels for record in records] == [
        {"report": ["Sinus rhythm", "Borderline | ECG"]},
        {},
        {"report": ["Sinus, probably", "Abnormal ECG"]},
    ]
    assert records[2].metadata == {"ecg_time": "2110-10-11 11:45:00"}
    assert [record.notes for record in records] == [{}, {"no report in machine_measurements.csv": 1}, {}]
    for record, made in zip(records, ecgs, strict=False):
        assert record.leads == LEADS
        np.testing.assert_array_equal(record.signal_LT, made.signal_LT)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_records_that_the_list_of_mimic_does_not_name_are_counted(mimic: Path, kind: str) -> None:
    items = opened(mimic).items()
    lines = RECORD_LIST.splitlines(keepends=True)
    (mimic / "record_list.csv").write_text("".join([lines[0], lines[2]]))
    source = opened(as_kind(mimic, kind))
    assert source.items() == [items[1]]
    assert source.left_out() == [f"left out: 2 records that record_list.csv does not name; the first is {items[0]}"]
    if kind == "folder":
        part = opened(mimic / "files")
        assert part.left_out()[-1] == source.left_out()[0]


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("record_list.csv", "10001725,49036311", "10001726,49036311", "its path is that of patient 10001725"),
        ("record_list.csv", "10001725,49036311", "10001725,40689238", "its path is that of study 49036311"),
        ("machine_measurements.csv", "10001725,49036311", "10000032,49036311", "10000032 for study 49036311"),
    ],
)
def test_patients_of_mimic_that_contradict_cost_their_record(
    mimic: Path, file: str, old: str, new: str, reason: str
) -> None:
    text = (mimic / file).read_text()
    (mimic / file).write_text(text.replace(old, new))
    source = opened(mimic)
    *others, item = source.items()
    assert [source.read(other).patient for other in others] == ["10000032"] * 2
    with pytest.raises(InputError, match=reason):
        source.read(item)
    if file == "machine_measurements.csv":
        (mimic / "record_list.csv").unlink()
        with pytest.raises(InputError, match="10000032 for study"):
            opened(mimic).read(item)


def test_mimic_without_measurements(mimic: Path) -> None:
    (mimic / "machine_measurements.csv").unlink()
    source = opened(mimic)
    assert "missing" in source.description
    assert source.read(source.items()[0]).labels == {}


def test_mimic_with_invalid_samples(mimic: Path) -> None:
    item = opened(mimic).items()[0]
    data = mimic / f"{item}.dat"
    frames_TL = np.fromfile(data, "<i2").reshape(-1, 12)
    for n_invalid in (20, 200):
        frames_TL[100 : 100 + n_invalid, 3] = -32768
        frames_TL.tofile(data)
        header = mimic / f"{item}.hea"
        lines = header.read_text().splitlines()
        fields = lines[4].split()
        fields[6] = str(int(frames_TL[:, 3].sum(dtype=np.int64)) % 65536)
        header.write_text("\n".join([*lines[:4], " ".join(fields), *lines[5:], ""]))
        if n_invalid == 20:
            assert opened(mimic).read(item).invalid_samples == 20
        else:
            with pytest.raises(InputError, match="200 of 5000 samples are marked invalid"):
                opened(mimic).read(item)


def test_mimic_with_a_record_that_is_gone(mimic: Path) -> None:
    source = opened(mimic)
    (mimic / f"{source.items()[0]}.hea").unlink()
    with pytest.raises(InputError, match=r"40689238.hea: no such header"):
        source.read(source.items()[0])


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("record_list.csv", "subject_id", "sid", "no column subject_id"),
        ("machine_measurements.csv", "report_0", "note", "no column report_0"),
        ("machine_measurements.csv", "Abnormal ECG", '"Abnormal" ECG', "not a readable CSV"),
    ],
)
def test_broken_tables_of_mimic(mimic: Path, file: str, old: str, new: str, reason: str) -> None:
    text = (mimic / file).read_text()
    assert old in text
    (mimic / file).write_text(text.replace(old, new))
    said = refusal(mimic)
    assert reason in said
    assert said.startswith(str(mimic / file))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("files/p1000/p10001725/s49036311/", "", "line 4: path '49036311'; it must read like files/p1000"),
        ("10001725,49036311", "10001725,x", "line 4: study_id: 'x' is not a whole number"),
    ],
)
def test_a_bad_cell_costs_mimic_one_record(mimic: Path, old: str, new: str, reason: str) -> None:
    text = (mimic / "record_list.csv").read_text()
    assert old in text
    (mimic / "record_list.csv").write_text(text.replace(old, new))
    source = opened(mimic)
    refused = []
    for item in source.items():
        try:
            source.read(item)
        except InputError as error:
            refused.append(str(error))
    assert len(source.items()) == 3
    assert len(refused) == 1
    assert reason in refused[0]


def test_paths_of_a_table_may_not_lead_out(mimic: Path, ecgs: list[Record], write_record) -> None:
    write_record(mimic.parent / "other" / "p" / "s", "1", ecgs[0])
    (mimic / "record_list.csv").write_text(RECORD_LIST + "1,1,1,,../other/p/s/1\n")
    assert not any(item.startswith("..") for item in opened(mimic).items())


# --- CinC 2021 ---


@pytest.mark.parametrize("kind", KINDS)
def test_cinc2021(cinc2021: Path, kind: str) -> None:
    source = opened(as_kind(cinc2021, kind))
    assert source.description.startswith("CinC 2021: 4 records")
    items = source.items()
    assert [item.removeprefix("training/") for item in items] == [
        "cpsc_2018/g1/X0000",
        "cpsc_2018_extra/g1/X0001",
        "georgia/g1/X0002",
        "ptb-xl/g1/X0003",
    ]
    for item in items:
        record = source.read(item)
        assert record.labels == {"Dx": ["59118001", "426783006"]}
        assert record.metadata == {"age": "74", "sex": "Male", "database": item.removeprefix("training/").split("/")[0]}
        assert record.patient is None


def test_cinc2021_from_below_training(cinc2021: Path) -> None:
    source = opened(cinc2021 / "training")
    assert source.read("georgia/g1/X0002").metadata["database"] == "georgia"


def test_real_challenge_records(cinc2021: Path, shared_data: Path) -> None:
    for name in ("E07500", "E07501"):
        for suffix in ("hea", "mat"):
            content = (shared_data / "cinc2021" / f"{name}.{suffix}").read_bytes()
            (cinc2021 / "training" / "georgia" / "g1" / f"{name}.{suffix}").write_bytes(content)
    source = opened(as_kind(cinc2021, "tar.gz"))
    (item,) = [item for item in source.items() if item.endswith("E07500")]
    plain = WfdbFolder(shared_data / "cinc2021", "plain").read("E07500")
    record = source.read(item)
    np.testing.assert_array_equal(record.signal_LT, plain.signal_LT)
    assert record.labels == plain.labels
    assert record.metadata == plain.metadata | {"database": "georgia"}


# --- which it is ---


def test_a_layout_can_be_forced(ptbxl: Path) -> None:
    source = opened(ptbxl, layout="wfdb")
    assert isinstance(source, WfdbFolder)
    assert len(source.items()) == 6
    assert len(opened(as_kind(ptbxl, "zip"), layout="wfdb").items()) == 6
    for kind in ("folder", "zip"):
        said = refusal(as_kind(ptbxl, kind), layout="mimic-iv-ecg")
        assert "no record_list.csv in it, so not layout mimic-iv-ecg" in said
    assert "no training/<database>/g1 in it" in refusal(ptbxl, layout="cinc2021")
    assert "layout npy is not read from an archive" in refusal(as_kind(ptbxl, "zip"), layout="npy")
    assert "no exams_part*.hdf5 in it" in refusal(ptbxl, layout="code15")
    assert "no .npy in or below it" in refusal(ptbxl, layout="npy", source_rate_hz=500.0)
    assert "layout 'ptb' is unknown; did you mean 'ptbxl'?" in refusal(ptbxl, layout="ptb")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"patient_key": "pid"}, "--patient-key"),
        ({"source_rate_hz": 500.0}, "--source-rate-hz"),
        ({"source_leads": ("I",)}, "--source-leads"),
        ({"unit": "mV"}, "--unit"),
        ({"mv_per_count": 0.001}, "--mv-per-count"),
    ],
)
def test_options_that_say_nothing_about_a_layout(ptbxl: Path, options: dict[str, object], named: str) -> None:
    assert f"{named} does not go with layout ptbxl, only with" in refusal(ptbxl, **options)


def test_other_paths(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "absent")
    (tmp_path / "x.csv").write_text("")
    assert "give a folder, an archive (.zip, .tar, " in refusal(tmp_path / "x.csv")
    (tmp_path / "empty").mkdir()
    assert "no WFDB header" in refusal(tmp_path / "empty")


# --- a level up and down, and what stands beside ---


def litter(root: Path) -> None:
    """What systems and programs leave in folders, some of it named like data."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"\0\1")
        for path in [*folder.iterdir()]:
            if path.is_file() and not path.name.startswith("._"):
                (folder / f"._{path.name}").write_bytes(b"\0\5\26\7")
        copies = folder / ".ipynb_checkpoints"
        copies.mkdir(exist_ok=True)
        for path in folder.glob("[!.]*.hea"):
            (copies / f"{path.stem}-checkpoint.hea").write_bytes(path.read_bytes())
            shutil.copy(path.with_suffix(".dat"), copies / path.with_suffix(".dat").name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixture", ["ptbxl", "mimic", "cinc2021"])
def test_litter_changes_nothing(request, fixture: str, kind: str) -> None:
    root = request.getfixturevalue(fixture)
    clean = opened(root)
    if kind == "folder":
        litter(root)
        same = opened(root)
    else:
        around = root.with_name("packed")
        shutil.copytree(root, around / root.name)
        litter(around)
        shutil.rmtree(around / "__MACOSX", ignore_errors=True)
        (around / "__MACOSX").mkdir()
        shutil.copytree(around / root.name, around / "__MACOSX" / root.name)
        same = opened(as_kind(around, kind.removeprefix("topped.")))
    assert same.items() == clean.items()
    assert same.description == clean.description
    assert [same.read(item).patient for item in same.items()] == [clean.read(item).patient for item in clean.items()]
    assert same.left_out() == clean.left_out()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("fixture", ["ptbxl", "mimic", "cinc2021"])
def test_a_set_in_a_folder_with_a_readme_beside(request, fixture: str, depth: int, kind: str) -> None:
    root = request.getfixturevalue(fixture)
    clean = opened(root)
    around = root.with_name("around")
    inner = around / "one" / "set" if depth == 2 else around / "set"
    shutil.copytree(root, inner)
    for folder in {around, inner.parent}:
        (folder / "README.md").write_text("where it is from")
        (folder / "figures").mkdir()
    source = opened(as_kind(around, kind))
    assert source.items() == clean.items()
    assert source.description == f"{clean.description}; it lies in {inner.relative_to(around).as_posix()}"
    assert source.dataset == ("set" if kind == "folder" else "around")
    assert [source.read(item).patient for item in source.items()] == [
        clean.read(item).patient for item in clean.items()
    ]


def test_a_part_of_a_set_is_read_with_its_tables(ptbxl: Path, mimic: Path, cinc2021: Path, monkeypatch) -> None:
    whole = opened(ptbxl)
    for part in ("records500", "records500/00000"):
        source = opened(ptbxl / part)
        assert source.items() == whole.items()
        assert source.dataset == "ptb-xl"  # so that its patients are those of the whole set
        assert source.read(source.items()[0]).patient == "15709"
        assert source.description.endswith(f"; only what lies in {part}, with the tables of {ptbxl}")
    low = opened(ptbxl / "records100")
    assert [low.read(item).rate_hz for item in low.items()] == [100, 100, 100]
    assert low.items()[0] == "records100/00000/00001_lr"
    monkeypatch.chdir(ptbxl / "records500")
    assert opened(Path()).items() == whole.items()
    for part, n in (("files", 3), ("files/p1000", 3), ("files/p1000/p10001725", 1)):
        source = opened(mimic / part)
        assert len(source.items()) == n
        assert source.read(source.items()[-1]).patient == {3: "10001725", 1: "10001725"}[n]
        assert source.dataset == "mimic"
    source = opened(cinc2021 / "training" / "georgia")
    (item,) = source.items()
    assert source.read(item).metadata["database"] == "georgia"


def test_a_folder_of_ones_own_in_a_known_set_is_no_part_of_it(ptbxl: Path, ecgs: list[Record], write_record) -> None:
    write_record(ptbxl / "mine", "a", ecgs[0])
    source = opened(ptbxl / "mine")
    assert isinstance(source, WfdbFolder)
    assert source.items() == ["a"]
    assert source.dataset == "mine"


def test_several_sets_in_one_folder_are_refused(ptbxl: Path, mimic: Path) -> None:
    around = ptbxl.parent
    said = refusal(around)
    assert "MIMIC-IV-ECG in mimic and PTB-XL in ptb-xl; give one of them, or --layout wfdb" in said
    assert len(opened(around, layout="wfdb").items()) == 9
    assert "other records, such as mimic/files/" in refusal(around, layout="ptbxl")


def test_a_set_beside_records_of_ones_own(ptbxl: Path, ecgs: list[Record], write_record) -> None:
    around = ptbxl.parent
    write_record(around / "mine", "a", ecgs[0])
    for kind in ("folder", "zip", "tar.gz"):
        said = refusal(as_kind(around, kind) if kind == "folder" else pack_beside(around, kind))
        assert "holds PTB-XL in ptb-xl and other records, such as mine/a; give ptb-xl alone" in said


def pack_beside(root: Path, kind: str) -> Path:
    """Packed into a folder that is not packed itself."""
    return as_kind(shutil.copytree(root, root.parent / f"{root.name}-{kind.replace('.', '')}"), kind)


def test_a_part_of_ptbxl_without_its_table(ptbxl: Path) -> None:
    elsewhere = ptbxl.parent / "elsewhere"
    shutil.copytree(ptbxl / "records500", elsewhere / "records500")
    for kind in ("folder", "zip"):
        source = opened(as_kind(elsewhere, kind))
        (line,) = source.left_out()
        assert "looks like a part of PTB-XL, with no ptbxl_database.csv with it" in line
        assert "labels and patients are unknown: give the folder that holds the table" in line
        assert opened(as_kind(elsewhere, kind), layout="wfdb").left_out() == []
    (ptbxl / "ptbxl_database.csv").rename(ptbxl / "ptbxl_database (1).csv")
    for kind in ("folder", "zip"):
        said = refusal(as_kind(ptbxl, kind))
        assert "looks like PTB-XL at both rates" in said
        assert "no ptbxl_database.csv" in said
        assert "--layout wfdb" in said
        (line,) = opened(as_kind(ptbxl, kind), layout="wfdb").left_out()
        assert line.startswith("both rates of PTB-XL are read, each recording twice and as two persons")


def test_what_tables_and_folders_do_not_share_is_counted(ptbxl: Path, mimic: Path) -> None:
    assert opened(ptbxl).left_out() == [
        "left out: 1 records that the tables name and that are not there; the first is records500/00000/00004_hr"
    ]
    (ptbxl / "records500").rename(ptbxl / "raw500")
    assert opened(ptbxl).left_out()[1] == (
        "left out: 3 records that ptbxl_database.csv does not name; the first is raw500/00000/00001_hr"
    )
    assert opened(mimic).left_out() == [
        "left out: 1 records that the tables name and that are not there; the first is "
        "files/p1000/p10009999/s49999999/49999999"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_mimic_by_its_folders_alone(mimic: Path, kind: str) -> None:
    (mimic / "record_list.csv").unlink()
    clean = as_kind(mimic, kind)
    source = opened(clean)
    assert source.description.startswith("MIMIC-IV-ECG: 3 records, patients by their folders")
    assert [source.read(item).patient for item in source.items()] == ["10000032", "10000032", "10001725"]
    assert source.read(source.items()[0]).labels == {"report": ["Sinus rhythm", "Borderline | ECG"]}


@pytest.mark.parametrize("part", ["files", "files/p1000"])
def test_a_copied_part_of_mimic_keeps_its_patients(mimic: Path, part: str) -> None:
    copy = shutil.copytree(mimic / part, mimic.parent / "copy")
    source = opened(copy)
    assert [source.read(item).patient for item in source.items()] == ["10000032", "10000032", "10001725"]
    assert "no record_list.csv" in source.description


@pytest.mark.parametrize("kind", ["folder", "zip", "topped.tar.gz"])
def test_a_record_list_of_ones_own(tmp_path, ecgs: list[Record], write_record, kind: str) -> None:
    root = tmp_path / "mine"
    write_record(root, "a", ecgs[0])
    (root / "record_list.csv").write_text("name,label\na,x\n")
    source = opened(as_kind(root, kind))
    assert source.items() == ["a"]
    (line,) = source.left_out()
    assert "not the list of MIMIC-IV-ECG (no column subject_id), so these are read as plain WFDB records" in line
    labelled = opened(as_kind(root, kind), labels_csv=root / "record_list.csv")
    assert labelled.read("a").labels == {"label": ["x"]}


def test_an_error_of_a_known_set_says_how_to_read_it_as_plain_records(ptbxl: Path) -> None:
    (ptbxl / "scp_statements.csv").unlink()
    assert "(taken for PTB-XL because of ptbxl_database.csv; --layout wfdb reads plain records)" in refusal(ptbxl)
    assert "taken for" not in refusal(ptbxl, layout="ptbxl")


def test_files_that_are_left_out_are_counted_with_their_reason(tmp_path, ecgs: list[Record], write_record) -> None:
    root = tmp_path / "mine"
    for name in ("a", "b", "c"):
        write_record(root / "ward", name, ecgs[0])
    (root / "ward" / "b.hea").rename(root / "ward" / "b.HEA")
    (root / "ward" / "c.hea").unlink()
    (root / "ward" / "x.mat").write_bytes(b"x")
    np.save(root / "array.npy", np.zeros((2, 3)))
    (root / "ward" / "x.xml").write_text("<x/>")
    expected = {
        "2 data files (.dat) without a header (.hea) of their name; the first is ward/",
        "1 data files (.mat) without a header (.hea) of their name; the first is ward/x.mat",
        "1 files with the ending .HEA; rename them to .hea; the first is ward/b.HEA",
        "1 arrays (.npy) beside WFDB records; --layout npy reads them; the first is array.npy",
        "1 files of another format (.xml); the first is ward/x.xml",
    }
    for kind in ("folder", "zip"):
        lines = opened(as_kind(root, kind)).left_out()
        assert len(lines) == 5
        assert all(any(line.startswith(f"left out: {one}") for line in lines) for one in expected)
    (root / "link").symlink_to(tmp_path)
    (root / "out.hea").symlink_to(tmp_path / "elsewhere.hea")
    (line,) = [line for line in opened(root).left_out() if "links" in line]
    assert line.startswith("left out: 2 links that lead out of the folder or to folders")
    arrays = opened(root, layout="npy", source_rate_hz=500.0)
    assert arrays.items() == ["array"]
    assert any("2 WFDB headers (.hea) beside arrays; --layout wfdb reads them" in line for line in arrays.left_out())


def test_arrays_with_what_systems_leave(tmp_path) -> None:
    for name in ("a.npy", "._a.npy", "ward/b.npy", "ward/.ipynb_checkpoints/b-checkpoint.npy", "__MACOSX/a.npy"):
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.zeros((12, 30)))
    (tmp_path / "mine" / "._a.hea").write_bytes(b"\0")
    source = opened(tmp_path / "mine", source_rate_hz=500.0)
    assert source.items() == ["a", "ward/b"]
    assert source.left_out() == []


def test_a_folder_with_nothing_but_other_endings_says_so(tmp_path, ecgs: list[Record], write_record) -> None:
    header = write_record(tmp_path / "mine", "a", ecgs[0])
    header.rename(header.with_suffix(".HEA"))
    assert "left out: 1 files with the ending .HEA; rename them to .hea" in refusal(tmp_path / "mine")
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    (tmp_path / "x.npy").rename(tmp_path / "x.NPY")
    said = refusal(tmp_path, layout="npy", source_rate_hz=500.0)
    assert "1 files with the ending .NPY; rename them to .npy" in said


def test_the_command_line_says_what_was_recognised_and_left_out(ptbxl: Path, tmp_path, capsys) -> None:
    around = tmp_path / "around"
    shutil.move(ptbxl, around / "ptb-xl-1.0.3")
    (around / "README.md").write_text("")
    assert cli.main(["ingest", str(around), str(tmp_path / "out"), "--workers=1"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("PTB-XL: 3 records")
    assert first.endswith("it lies in ptb-xl-1.0.3")
    assert second.startswith(f"{around}: left out: 1 records that the tables name")
