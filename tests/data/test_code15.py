"""CODE-15 % in miniature: padding, labels, units, and HDF5 files that are not what they should be."""

from __future__ import annotations

import errno
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from ecgscale import cli
from ecgscale.data.sources import SourceOptions, implausible_unit, open_source
from ecgscale.errors import InputError, MachineError
from ecgscale.lead_names import LEADS
from ecgscale.record import Record
from ecgscale.simulate import Simulation

EXAMS = """exam_id,age,is_male,nn_predicted_age,1dAVb,RBBB,LBBB,SB,ST,AF,patient_id,death,timey,normal_ecg,trace_file
11,38,True,40.16,False,False,False,False,False,False,523632,False,2.1,True,exams_part0.hdf5
7,73,True,67.05,True,True,False,False,False,False,1724173,False,6.6,False,exams_part0.hdf5
9,67,False,79.62,False,False,False,False,False,True,523632,,,False,exams_part1.hdf5
"""
N_SAMPLES = 4096


@pytest.fixture(scope="module")
def ecgs() -> list[Record]:
    """7 s at 400 Hz."""
    simulation = Simulation(patients=3, records_per_patient=1, rate_hz=400.0, duration_s=7.0)
    return [simulation.read(item) for item in simulation.items()]


def tracings(ecgs: list[Record], dtype: str = "f4") -> np.ndarray:
    """(N + 1, 4096, 12), centred between zeros, and a row of zeros as the files end with."""
    values = np.zeros((len(ecgs) + 1, N_SAMPLES, 12), dtype)
    start = (N_SAMPLES - ecgs[0].n_samples) // 2
    for row, ecg in zip(values, ecgs, strict=False):
        row[start : start + ecg.n_samples] = ecg.millivolts().T
    return values


@pytest.fixture
def root(tmp_path, ecgs) -> Path:
    root = tmp_path / "code15"
    root.mkdir()
    (root / "exams.csv").write_text(EXAMS)
    for part, exam_ids, some in (("0", [11, 7, 0], ecgs[:2]), ("1", [9, 0], ecgs[2:])):
        with h5py.File(root / f"exams_part{part}.hdf5", "w") as file:
            file["exam_id"] = np.array(exam_ids)
            file["tracings"] = tracings(some)
    return root


def change(root: Path, edit: Callable[[h5py.File], None]) -> Path:
    with h5py.File(root / "exams_part0.hdf5", "a") as file:
        edit(file)
    return root


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        open_source(path, SourceOptions(**options)).items()  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_records_labels_and_patients(root: Path, ecgs: list[Record]) -> None:
    source = open_source(root, SourceOptions())
    assert source.dataset == "code15"
    assert source.description.startswith("CODE-15 %: 5 exams in 2 parts")
    assert "values taken as mV" in source.description
    items = source.items()
    assert items == sorted(items)
    assert items == [
        "exams_part0/0_11",
        "exams_part0/1_7",
        "exams_part0/2_0",
        "exams_part1/0_9",
        "exams_part1/1_0",
    ]
    assert source.unlabelled() == items
    records = [source.read(items[i]) for i in (0, 1, 3)]
    for item, record, ecg in zip((items[0], items[1], items[3]), records, ecgs, strict=True):
        assert record.name == item
        assert (record.rate_hz, record.leads) == (400, LEADS)
        assert record.n_samples == ecg.n_samples
        np.testing.assert_allclose(record.millivolts(), ecg.millivolts(), atol=0.001)
    assert [record.patient for record in records] == ["523632", "1724173", "523632"]
    assert [record.labels for record in records] == [
        {"abnormality": [], "normal_ecg": ["true"]},  # six times False is a negative of every class
        {"abnormality": ["1dAVb", "RBBB"], "normal_ecg": ["false"]},
        {"abnormality": ["AF"], "normal_ecg": ["false"]},
    ]
    assert records[0].metadata == {
        "age": "38",
        "nn_predicted_age": "40.16",
        "death": "False",
        "timey": "2.1",
        "sex": "male",
    }
    assert records[2].metadata == {"age": "67", "nn_predicted_age": "79.62", "sex": "female"}


def test_fingerprints_tell_other_rows_of_the_table(root: Path) -> None:
    before = open_source(root, SourceOptions())
    (root / "exams.csv").write_text((root / "exams.csv").read_text().replace("1724173", "1724174"))
    after = open_source(root, SourceOptions())
    changed = [item for item in before.items() if before.fingerprint(item) != after.fingerprint(item)]
    assert changed == ["exams_part0/1_7"]


def test_a_disk_that_fails_is_named_with_the_exam(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(root, SourceOptions())
    items = source.items()

    def fails(dataset: h5py.Dataset, row: int) -> np.ndarray:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(h5py.Dataset, "__getitem__", fails)
    with pytest.raises(MachineError) as failed:
        source.read(items[1])
    part = root / "exams_part0.hdf5"
    assert str(failed.value) == f"{part}: row 1, exam 7: cannot be read: Input/output error"


def test_many_rows_sort_as_they_stand_in_the_file(root: Path, ecgs: list[Record]) -> None:
    def more(file: h5py.File) -> None:
        del file["exam_id"], file["tracings"]
        file["exam_id"] = np.arange(120)[::-1]
        file["tracings"] = np.ones((120, 5, 12), "f4")

    items = [item for item in open_source(change(root, more), SourceOptions()).items() if "part0" in item]
    assert items == sorted(items)
    assert [int(item.split("_")[-1]) for item in items] == list(range(120))[::-1]


@pytest.mark.parametrize(
    ("unit", "factor"), [("mV", 1), ("0.5mV", 0.5), ("1e-4V", 0.1), ("uV", 0.001), ("100 µV", 0.1)]
)
def test_units(root: Path, ecgs: list[Record], unit: str, factor: float) -> None:
    def scale(file: h5py.File) -> None:
        file["tracings"][...] *= per_mv  # no ECG else

    per_mv = round(1 / factor) if factor < 0.5 else 1
    factor *= per_mv
    source = open_source(change(root, scale), SourceOptions(unit=unit))
    np.testing.assert_allclose(source.read("exams_part0/0_11").millivolts(), ecgs[0].millivolts() * factor, atol=0.001)
    assert f"values taken as {unit}" in source.description
    assert implausible_unit(source) is None


@pytest.mark.parametrize("unit", ["", "mm", "0mV", "-1mV", "1e999mV", "mV mV"])
def test_units_that_are_none(root: Path, unit: str) -> None:
    if unit:
        assert "unit" in refusal(root, unit=unit)


@pytest.mark.parametrize("storage", [{}, {"chunks": (1, 4096, 12), "compression": "gzip"}, {"compression": "lzf"}])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_types_and_storage(root: Path, ecgs: list[Record], dtype: str, storage: dict[str, object]) -> None:
    def store(file: h5py.File) -> None:
        del file["tracings"]
        file.create_dataset("tracings", data=tracings(ecgs[:2], dtype), **storage)

    record = open_source(change(root, store), SourceOptions()).read("exams_part0/1_7")
    np.testing.assert_allclose(record.millivolts(), ecgs[1].millivolts(), atol=0.003)


def test_one_part_alone(root: Path) -> None:
    source = open_source(root / "exams_part1.hdf5", SourceOptions())
    assert source.dataset == "exams_part1"
    assert source.items() == ["exams_part1/0_9", "exams_part1/1_0"]


def test_a_pickled_source_reads_and_is_small(root: Path) -> None:
    source = open_source(root, SourceOptions())
    source.read("exams_part0/0_11")
    assert len(pickle.dumps(source)) < 1500
    assert pickle.loads(pickle.dumps(source)).read("exams_part0/0_11").patient == "523632"


def test_a_folder_deeper_with_what_systems_leave(root: Path, tmp_path) -> None:
    around = tmp_path / "around"
    inner = shutil.copytree(root, around / "code15")
    for name in ("._exams.csv", "._exams_part0.hdf5", ".DS_Store"):
        (inner / name).write_bytes(b"\0\5\26\7")
    (around / "README.md").write_text("")
    source, clean = open_source(around, SourceOptions()), open_source(root, SourceOptions())
    assert source.items() == clean.items()
    assert source.description == clean.description
    assert source.dataset == "code15"
    (inner / "exams_part9.zip").write_bytes(b"PK")
    (line,) = open_source(around, SourceOptions()).left_out()
    assert line == "left out: 1 parts are still packed; unpack them here; the first is exams_part9.zip"
    (inner / "exams.csv").unlink()
    assert "no exams.csv beside the parts; it names the patients" in refusal(around)


def test_ingest(root: Path, tmp_path, capsys) -> None:
    assert cli.main(["ingest", str(root), str(tmp_path / "out"), "--workers=2", "--records-per-shard=2"]) == 0
    out = capsys.readouterr().out
    assert "3 records in" in out
    assert "2 rejected" in out  # the rows of zeros
    assert "all samples are zero" in (tmp_path / "out" / "rejected.csv").read_text()


def test_microvolts_are_noticed(root: Path, tmp_path, capsys) -> None:
    def scale(file: h5py.File) -> None:
        file["tracings"][...] *= 1000

    assert "--unit uV" in (implausible_unit(open_source(change(root, scale), SourceOptions())) or "")
    assert cli.main(["ingest", str(root), str(tmp_path / "out"), "--workers=1"]) == 0  # the other part is right
    assert "are they microvolts?" in capsys.readouterr().out
    assert "are they microvolts?" in (tmp_path / "out" / "rejected.csv").read_text()


def test_a_lead_of_nan_alone_keeps_no_padding(root: Path, ecgs: list[Record]) -> None:
    def damage(file: h5py.File) -> None:
        file["tracings"][0, :, 3] = np.nan

    record = open_source(change(root, damage), SourceOptions()).read("exams_part0/0_11")
    assert record.leads == tuple(lead for lead in LEADS if lead != "aVR")
    np.testing.assert_allclose(record.millivolts(), np.delete(ecgs[0].millivolts(), 3, axis=0), atol=0.001)


# --- rows that are refused ---


def test_rows_that_are_refused(root: Path) -> None:
    def damage(file: h5py.File) -> None:
        file["tracings"][0, 2000, 3] = np.nan
        file["exam_id"][1] = 8

    source = open_source(change(root, damage), SourceOptions())
    for item, reason in (
        ("exams_part0/0_11", "row 0, exam 11: the signal holds NaN"),
        ("exams_part0/1_8", "row 1, exam 8: no row in exams.csv"),
        ("exams_part0/2_0", "row 2, exam 0: all samples are zero"),
    ):
        with pytest.raises(InputError) as caught:
            source.read(item)
        assert str(caught.value).startswith(f"{root}/exams_part0.hdf5: {reason}")


# --- files that are refused ---


def elsewhere(root: Path) -> Path:
    with h5py.File(root.parent / "other.hdf5", "w") as file:
        file["tracings"] = np.ones((3, N_SAMPLES, 12), "f4")
    return root.parent / "other.hdf5"


def without(file: h5py.File, name: str = "tracings") -> h5py.File:
    del file[name]
    return file


def soft(file: h5py.File) -> None:
    file["there"] = file["tracings"]
    without(file)["tracings"] = h5py.SoftLink("/there")


def external_link(file: h5py.File) -> None:
    without(file)["tracings"] = h5py.ExternalLink("../other.hdf5", "/tracings")


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((3, N_SAMPLES, 12), "f4")
    layout[:] = h5py.VirtualSource("../other.hdf5", "tracings", (3, N_SAMPLES, 12))
    without(file).create_virtual_dataset("tracings", layout)


def external_storage(file: h5py.File) -> None:
    external = [("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
    without(file).create_dataset("tracings", (3, N_SAMPLES, 12), "f4", external=external)


def foreign_filter(file: h5py.File) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((1, N_SAMPLES, 12))
    plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
    space = h5py.h5s.create_simple((3, N_SAMPLES, 12))
    h5py.h5d.create(without(file).id, b"tracings", h5py.h5t.IEEE_F32LE, space, plist)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (soft, "tracings is a link"),
        (external_link, "tracings is a link"),
        (virtual, "tracings lies in other files"),
        (external_storage, "tracings lies in other files"),
        (foreign_filter, "tracings needs the foreign filter 32015"),
        (without, "no data set tracings; it holds exam_id"),
        (lambda file: without(file).create_group("tracings"), "tracings is a group"),
        (lambda file: without(file).create_dataset("tracings", data=np.ones((3, 9), "f4")), "of shape (3, 9)"),
        (lambda file: without(file).create_dataset("tracings", data=np.ones((3, 9, 8), "f4")), "of shape (3, 9, 8)"),
        (
            lambda file: without(file).create_dataset("tracings", data=np.ones((2, 9, 12), "f4")),
            "3 exam_id, 2 tracings",
        ),
        (lambda file: without(file).create_dataset("tracings", data=np.ones((3, 9, 12), "i4")), "tracings is int32"),
        (lambda file: without(file).create_dataset("tracings", data=np.full((3, 9, 12), b"x")), "tracings is |S1"),
        (lambda file: without(file).create_dataset("tracings", (1 << 25, 9, 12), "f4"), "claims 33554432 rows"),
        (lambda file: without(file).create_dataset("tracings", (3, 9, 12), "f4"), "which the file does not hold"),
        (
            lambda file: without(file).create_dataset("tracings", (1 << 20, 99, 12), "f4", chunks=(1 << 20, 99, 12)),
            "which the file does not hold",
        ),
        (
            lambda file: without(file, "exam_id").create_dataset("exam_id", data=[1.5, 2, 3]),
            "exam_id is float64",
        ),
    ],
)
def test_files_that_are_refused(root: Path, edit: Callable[[h5py.File], None], reason: str) -> None:
    elsewhere(root)
    said = refusal(change(root, edit))
    assert said.startswith(f"{root}/exams_part0.hdf5: ")
    assert reason in said


def test_the_folder_must_be_whole(root: Path) -> None:
    (root / "exams_part0.hdf5").write_bytes(b"no HDF5")
    assert "exams_part0.hdf5: not a readable HDF5 file" in refusal(root)
    (root / "exams_part0.hdf5").unlink()
    (root / "exams_part0.hdf5").symlink_to(elsewhere(root))  # leads out
    assert open_source(root, SourceOptions()).items() == ["exams_part1/0_9", "exams_part1/1_0"]
    (root / "exams_part0.hdf5").unlink()
    (root / "exams_part1.hdf5").rename(root / "exams_part1.zip")
    assert "unpack exams_part*.zip first" in refusal(root)
    (root / "exams_part1.zip").rename(root / "exams_part1.hdf5")
    (root / "exams.csv").unlink()
    assert "no exams.csv beside the parts" in refusal(root / "exams_part1.hdf5")


def test_an_exam_that_lies_in_another_part_than_its_row_says(root: Path) -> None:
    (root / "exams.csv").write_text(EXAMS.replace("6.6,False,exams_part0", "6.6,False,exams_part1"))
    source = open_source(root, SourceOptions())
    with pytest.raises(InputError, match=r"exam 7: exams.csv says that it lies in exams_part1.hdf5"):
        source.read("exams_part0/1_7")
    assert "trace_file" not in source.read("exams_part0/0_11").metadata


def test_an_exam_id_of_several_tracings_names_none_of_them(root: Path) -> None:
    with h5py.File(root / "exams_part1.hdf5", "r+") as file:
        exam_ids = file["exam_id"][:]
        exam_ids[0] = 7
        file["exam_id"][:] = exam_ids
    source = open_source(root, SourceOptions())
    for item in (one for one in source.items() if one.endswith("_7")):
        with pytest.raises(InputError, match="several tracings have this exam_id"):
            source.read(item)
    assert source.read("exams_part0/0_11").name


def test_a_placeholder_for_the_part_says_nothing(root: Path) -> None:
    (root / "exams.csv").write_text(EXAMS.replace("6.6,False,exams_part0.hdf5", "6.6,False,x"))
    source = open_source(root, SourceOptions())
    assert source.read("exams_part0/1_7").name


def test_rows_without_an_exam_are_counted(root: Path) -> None:
    (root / "exams_part1.hdf5").unlink()
    line = "left out: 1 rows of exams.csv whose exam is in no part; the first is 9"
    assert open_source(root, SourceOptions()).left_out() == [line]


def test_exams_that_stand_twice(root: Path) -> None:
    lines = EXAMS.splitlines(keepends=True)
    (root / "exams.csv").write_text("".join([*lines, lines[1], lines[2].replace("1724173", "99")]))
    source = open_source(root, SourceOptions())
    assert (
        "; 1 rows repeat others and count once; the first is exams.csv: line 5, of the record 11" in source.description
    )
    assert source.read("exams_part0/0_11").patient == "523632"
    with pytest.raises(InputError, match=r"exams.csv: line 3 and exams.csv: line 6 contradict each other"):
        source.read("exams_part0/1_7")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("exam_id", "id", "no column exam_id"),
        ("9,67,", "9,67", "line 4 has 14 fields"),
    ],
)
def test_broken_tables(root: Path, old: str, new: str, reason: str) -> None:
    assert old in EXAMS
    (root / "exams.csv").write_text(EXAMS.replace(old, new))
    said = refusal(root)
    assert said.startswith(f"{root / 'exams.csv'}: ")
    assert reason in said


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("67.05,True", "67.05,maybe", r"exams.csv: line 3: 1dAVb is 'maybe'; it must be true or false, 1 or 0"),
        (
            "67.05,True,True,False,False,False,False,1724173",
            "67.05,True,True,False,False,False,False,NA",
            "its patient",
        ),
        ("73,True", "73,man", "line 3: is_male is 'man'"),
        ("7,73", "x,73", "no row in exams.csv"),
    ],
)
def test_a_bad_cell_costs_one_exam(root: Path, tmp_path, old: str, new: str, reason: str) -> None:
    assert old in EXAMS
    (root / "exams.csv").write_text(EXAMS.replace(old, new))
    source = open_source(root, SourceOptions())
    assert ("1 rows of exams.csv name no exam" in source.description) == (new[0] == "x")
    with pytest.raises(InputError, match=reason):
        source.read("exams_part0/1_7")
    assert source.read("exams_part0/0_11").patient == "523632"


def test_unknown_words_in_exams(root: Path) -> None:
    (root / "exams.csv").write_text(
        EXAMS.replace("38,True", "NA,NULL").replace("False,False,True,523632,,,", "False,False,nan,523632.0,None,,")
    )
    source = open_source(root, SourceOptions())
    one, other = source.read("exams_part0/0_11"), source.read("exams_part1/0_9")
    assert {"age", "sex"}.isdisjoint(one.metadata)
    assert one.notes == {"age 'NA' taken as unknown": 1, "is_male 'NULL' taken as unknown": 1}
    assert other.labels == {"normal_ecg": ["false"]}  # one flag is unknown, so nobody knows whether there are none
    assert other.patient == one.patient


def test_options_that_do_not_fit(root: Path, tmp_path) -> None:
    assert "--labels does not go with layout code15" in refusal(root, labels_csv=tmp_path / "x.csv")
    assert "layout ptbxl is not that of .hdf5" in refusal(root / "exams_part0.hdf5", layout="ptbxl")


def test_mutated_files_are_read_or_refused(root: Path, ecgs: list[Record]) -> None:
    def shorter(file: h5py.File) -> None:
        del file["tracings"]
        file["tracings"] = tracings(ecgs[:2])[:, 2000:2030]

    content = change(root, shorter).joinpath("exams_part0.hdf5").read_bytes()
    random_ = random.Random(0)
    for _ in range(60):
        mutated = bytearray(content)
        for _ in range(random_.randint(1, 8)):
            mutated[random_.randrange(min(len(content), 3000))] = random_.randrange(256)
        # A new file each time: HDF5 keeps what it knows of an inode that is open.
        (root / "new").write_bytes(mutated)
        (root / "new").replace(root / "exams_part0.hdf5")
        try:
            source = open_source(root, SourceOptions())
        except InputError as error:
            said = [str(error)]
        else:
            said = []
            for item in source.items():
                try:
                    source.read(item)
                except InputError as error:
                    said.append(str(error))
        assert all(line.startswith(str(root)) for line in said)


@pytest.mark.parametrize(
    ("say", "named"),
    [
        (lambda file: file.attrs.update(fs=500), "'fs' says 500"),
        (lambda file: file["tracings"].attrs.update(sampling_rate=b"500 Hz"), "'sampling_rate' says 500"),
        (lambda file: file.create_dataset("sampling_frequency", data=np.array([250.0])), "'sampling_frequency' says"),
        (lambda file: file.create_group("metadata").attrs.update(dt=1 / 500), "'dt' says 500"),
        (lambda file: file["tracings"].attrs.update(units="uV"), "units is uV"),
        (lambda file: file.create_dataset("unit", data="V"), "unit is"),
        (lambda file: file.attrs.update({"adc_gain": 1000.0}), "adc_gain is 1000"),
        (lambda file: file.attrs.update(scale_mv=0.001), "scale_mv is 0.001"),
        (lambda file: file["tracings"].attrs.update(baseline=np.full(12, 2048)), "baseline is"),
        (lambda file: file.attrs.update(leads=["II", "I", *LEADS[2:]]), "its leads are II,I,III"),
        (lambda file: file.create_dataset("lead_names", data=[*reversed(LEADS)]), "its leads are V6,V5"),
        (lambda file: file["tracings"].attrs.update(channels=",".join(reversed(LEADS))), "its leads are V6,V5"),
    ],
)
def test_what_a_part_says_of_itself_is_read_or_refused(root: Path, say: Callable[[h5py.File], None], named: str):
    message = refusal(change(root, say))
    assert message.startswith(str(root / "exams_part0.hdf5"))
    assert named in message


def test_a_part_may_say_what_it_is(root: Path, ecgs: list[Record]) -> None:
    leads = ["DI", "DII", "DIII", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6"]

    def say(file: h5py.File) -> None:
        file.attrs.update(
            fs=400, units="mV", leads=leads, heart_rate=70, title="CODE-15", version=1.0, none=h5py.Empty("f")
        )
        file["tracings"].attrs.update(sampling_rate=400.0, unit="mV", scale_mv=1.0, device=np.array(["x"] * 65, "S1"))
        file["lead_names"] = np.array(leads, "S4")
        file["elsewhere"] = h5py.ExternalLink("other.hdf5", "/units")

    source = open_source(change(root, say), SourceOptions())
    np.testing.assert_allclose(source.read(source.items()[0]).millivolts(), ecgs[0].millivolts(), atol=0.002)


def test_a_part_in_another_unit_is_read_in_it(root: Path, ecgs: list[Record]) -> None:
    def say(file: h5py.File) -> None:
        file["tracings"][...] *= 1000
        file["tracings"].attrs["units"] = "uV"

    (root / "exams_part1.hdf5").unlink()
    source = open_source(change(root, say), SourceOptions(unit="uV"))
    np.testing.assert_allclose(source.read(source.items()[0]).millivolts(), ecgs[0].millivolts(), atol=0.002)


def test_an_exam_without_flags_is_counted_and_other_columns_of_sex_are_kept(root: Path) -> None:
    exams = EXAMS.replace("is_male", "sex").replace(
        ",True,40.16,False,False,False,False,False,False,", ",M,40.16,,,,,,,"
    )
    (root / "exams.csv").write_text(exams)
    source = open_source(root, SourceOptions())
    record = source.read(source.items()[0])
    assert (record.metadata["sex"], record.labels) == ("M", {"normal_ecg": ["true"]})
    assert record.notes == {"abnormality with flags of which all are unknown, taken as unknown": 1}
