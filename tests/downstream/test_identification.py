"""ArcFace against its formula and the reference; identification against counting by hand."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.sources import WfdbFolder
from ecgscale.downstream.identification import (
    ArcFaceHead,
    Identification,
    IdentificationReport,
    arcface_loss,
    identify,
    session_day,
    session_days,
)
from ecgscale.errors import InputError
from ecgscale.model.encoder import ECGEncoder

# --- ArcFace ---


@pytest.mark.parametrize(("scale", "margin"), [(192, 1.0), (32, 0.5)])
def test_equals_the_reference_implementation(shared_reference, scale, margin):
    tensors = load_file(shared_reference / "losses.safetensors")
    expected = json.loads((shared_reference / "losses.json").read_text())["scalars"]
    cosine_BC, class_B = tensors["arcface.cosine"], tensors["arcface.target"]
    total = len(class_B) * arcface_loss(cosine_BC, class_B, scale, margin).item()
    assert total == pytest.approx(expected[f"arcface_scale{scale}_margin{margin:g}_sum"], rel=1e-5)


@given(
    angle=st.lists(st.floats(0.01, 3.13), min_size=2, max_size=5),
    own=st.integers(0, 1),
    scale=st.floats(1, 200),
    margin=st.floats(0, 1.5),
)
def test_equals_its_formula(angle, own, scale, margin):
    cosine_C = [math.cos(theta) for theta in angle]
    theta = angle[own]
    harder = math.cos(theta + margin) if theta < math.pi - margin else math.cos(theta) - margin * math.sin(margin)
    logit_C = [scale * (harder if c == own else cosine) for c, cosine in enumerate(cosine_C)]
    expected = math.log(sum(math.exp(logit - max(logit_C)) for logit in logit_C)) + max(logit_C) - logit_C[own]
    loss = arcface_loss(torch.tensor([cosine_C], dtype=torch.float64), torch.tensor([own]), scale, margin)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_without_margin_it_is_a_softmax_of_cosines():
    generator = torch.Generator().manual_seed(0)
    cosine_BC, class_B = 2 * torch.rand(7, 5, generator=generator) - 1, torch.arange(7) % 5
    expected = F.cross_entropy(30 * cosine_BC, class_B)
    torch.testing.assert_close(arcface_loss(cosine_BC, class_B, 30, 0.0), expected)


def test_the_loss_rises_with_the_angle_all_the_way():
    cosine_B = torch.cos(torch.linspace(0.01, 3.13, 200, dtype=torch.float64))
    cosine_BC = torch.stack([cosine_B, torch.zeros_like(cosine_B)], dim=1)
    losses = [arcface_loss(row_C[None], torch.tensor([0]), 8, 1.0).item() for row_C in cosine_BC]
    assert (np.diff(losses) >= 0).all()


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0])
def test_gradients_at_both_ends_of_the_cosine_are_finite(margin):
    near = torch.tensor([1.0, 1 + 1e-7, 1 - 1e-7, 1 - 1e-4, 0.0, -1.0, -1 - 1e-7, -1 + 1e-7, -math.cos(margin)])
    cosine_BC = torch.stack([near, torch.full_like(near, 0.5)], dim=1).requires_grad_(True)
    loss = arcface_loss(cosine_BC, torch.zeros(len(near), dtype=torch.int64), 192, margin)
    loss.backward()
    assert loss.isfinite()
    assert cosine_BC.grad.isfinite().all()
    assert (cosine_BC.grad[:, 0] <= 0).all(), "nearer to the own person is never worse"


def test_gradients_of_the_head_are_those_of_the_angles():
    """Through aligned and opposite embeddings too, where the cosine's own slope is 0 and the margin's infinite."""
    torch.manual_seed(0)
    head = ArcFaceHead(4, 6)
    embedding_BD = torch.cat([3 * head.weight.detach(), -head.weight.detach(), torch.randn(3, 6)]).requires_grad_(True)
    loss = arcface_loss(head(embedding_BD), torch.arange(11) % 4, 192, 1.0)
    loss.backward()
    assert embedding_BD.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()
    along_B = (embedding_BD.grad * F.normalize(embedding_BD.detach())).sum(dim=1)
    across_B = embedding_BD.grad.norm(dim=1)
    assert (along_B.abs() <= 1e-4 * across_B + 1e-3).all(), "the length of an embedding plays no role"


def test_slope_of_the_loss_is_its_difference_quotient():
    generator = torch.Generator().manual_seed(1)
    cosine_BC = (1.8 * torch.rand(5, 4, generator=generator, dtype=torch.float64) - 0.9).requires_grad_(True)
    class_B = torch.tensor([0, 3, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda x_BC: arcface_loss(x_BC, class_B, 16, 0.7), (cosine_BC,))


# --- the module ---


@pytest.fixture
def rows(make_batch, smooth_ecg):
    """Two recordings each of four persons with codes far apart."""
    codes = [-(2**62), 5, 2**40, 2**62]
    signals = [smooth_ecg(500, 1.0, seed=person) for person in range(4) for _ in range(2)]
    signal_BLT = torch.from_numpy(np.round(1000 * np.stack(signals)).astype(np.int16))
    patient_B = torch.tensor(codes).repeat_interleave(2)
    return make_batch(signal_BLT, gain_BL=torch.full((8, 12), 1e-3), patient_B=patient_B)


@pytest.fixture
def model(small_model_config, rows) -> Identification:
    torch.manual_seed(0)
    return Identification(ECGEncoder(small_model_config), rows.patient_B.unique().tolist(), 16, 0.3).eval()


def test_finds_the_class_of_a_patient_code_and_learns_it(model, rows):
    assert model._classes(rows.patient_B).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=3e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        loss, parts = model(rows)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert parts.keys() == {"loss", "accuracy"}
    assert not any(part.requires_grad for part in parts.values())
    assert losses[-1] < 0.5 * losses[0]
    assert parts["accuracy"] == 1
    assert not model.encoder.mask.token.requires_grad
    names = dict(model.named_parameters())
    assert names["arcface.weight"].shape == (4, 32)
    assert "person_C" not in model.state_dict(), "an export holds weights alone"


@pytest.mark.parametrize("code", [6, -(2**63), 2**63 - 1])
def test_a_person_who_is_no_training_person_is_refused(model, rows, code):
    rows.patient_B[3] = code
    with pytest.raises(InputError, match=f"patient {code} is none of the 4 training patients"):
        model(rows)


def test_one_person_is_not_enough(small_model_config):
    with pytest.raises(InputError, match="1 patients for training; to tell patients apart takes 2"):
        Identification(ECGEncoder(small_model_config), [7], 16, 0.3)


def test_two_ranks_give_the_gradient_of_one(model, rows):
    """Ranks average their gradients, and a loss is a mean over its rows: nothing is shared between ranks."""

    def gradients(halves: list[slice]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for half in halves:
            fields = {name: value[half] for name, value in vars(rows).items() if isinstance(value, torch.Tensor)}
            part = type(rows)(**fields, padded=False)
            (model(part)[0] / len(halves)).backward()
        return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

    together, apart = gradients([slice(0, 8)]), gradients([slice(0, 4), slice(4, 8)])
    largest = max(gradient.norm() for gradient in together.values())
    for name, gradient in together.items():
        assert (apart[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * largest, name


# --- identification ---


def counted_by_hand(embedding_RD, person_R, session_R, times=None) -> tuple[float, float, float]:
    """Top-1, top-5 and equal error rate in loops; ``times``: how often the probes of each person count."""
    unit_RD = [np.asarray(row, float) / (np.linalg.norm(row) or 1) for row in embedding_RD]
    recordings = {}
    for row, (person, session) in enumerate(zip(person_R, session_R, strict=True)):
        recordings.setdefault(person, {}).setdefault(session, []).append(unit_RD[row])
    compared = {person: by for person, by in sorted(recordings.items()) if len(by) > 1}
    gallery = {person: sum(by[min(by)]) for person, by in compared.items()}
    lengths = {person: np.linalg.norm(total) for person, total in gallery.items()}
    gallery = {
        person: total / lengths[person] if lengths[person] > 1e-9 else 0 * total for person, total in gallery.items()
    }
    hits_1, hits_5, genuine, impostor = [], [], [], []
    for p, (person, by) in enumerate(compared.items()):
        for probe in [one for session in sorted(by)[1:] for one in by[session]] * (1 if times is None else times[p]):
            similarity = {other: round(float(probe @ one), 10) for other, one in gallery.items()}
            as_good = [other for other in gallery if other != person and similarity[other] >= similarity[person]]
            hits_1.append(len(as_good) < 1)
            hits_5.append(len(as_good) < 5)
            genuine.append(similarity[person])
            impostor += [one for other, one in similarity.items() if other != person]
    return float(np.mean(hits_1)), float(np.mean(hits_5)), crossing_by_hand(genuine, impostor)


def crossing_by_hand(genuine: list[float], impostor: list[float]) -> float:
    """Every threshold in turn, and a line through the last two points."""
    before = (0.0, 1.0)
    for threshold in sorted({*genuine, *impostor}, reverse=True):
        far = sum(one >= threshold for one in impostor) / len(impostor)
        frr = sum(one < threshold for one in genuine) / len(genuine)
        if frr <= far:
            gap, next_gap = before[1] - before[0], frr - far
            share = gap / (gap - next_gap)
            return before[0] + share * (far - before[0])
        before = (far, frr)
    raise AssertionError


def figures(report: IdentificationReport) -> tuple[float, float, float]:
    return report.top1.value, report.top5.value, report.eer.value


@st.composite
def recordings(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Few directions, so that ties abound; persons with one session and with several recordings of one."""
    persons = draw(st.integers(2, 8))
    person_R = [*range(persons), *range(persons), *draw(st.lists(st.integers(0, persons + 2), max_size=12))]
    session_R = [0] * persons + [1] * persons
    session_R += draw(st.lists(st.integers(-1, 3), min_size=len(person_R) - 2 * persons, max_size=len(person_R)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    spread = draw(st.sampled_from([1, 3, 1000]))
    embedding_RD = rng.integers(-spread, spread + 1, (len(person_R), draw(st.integers(1, 5)))).astype(float)
    return embedding_RD, np.array(person_R), np.array(session_R[: len(person_R)])


@settings(max_examples=150)
@given(recordings())
def test_figures_are_those_that_are_counted_by_hand(given):
    assert figures(identify(*given, resamples=1)) == pytest.approx(counted_by_hand(*given), abs=1e-9)


def test_recordings_that_cancel_give_a_gallery_without_a_direction():
    """Those of person 0 point in opposite directions: their sum is zero but for rounding, which has a direction."""
    embedding_RD = np.array([[0.1, 0.7], [-0.3, -2.1], [1, 1], [1, 0], [-1, -1]])
    given = embedding_RD, np.array([0, 0, 1, 0, 1]), np.array([0, 0, 0, 1, 1])
    assert figures(identify(*given, resamples=1)) == counted_by_hand(*given)
    assert identify(*given, resamples=1).top1.value == 0.0


@settings(max_examples=20)
@given(recordings(), st.integers(0, 100))
def test_a_resample_is_what_repeated_probes_give(given, seed):
    report = identify(*given, resamples=3, seed=seed)
    drawn_KP = np.random.default_rng(seed).multinomial(report.galleries, [1 / report.galleries] * report.galleries, 3)
    for k, times_P in enumerate(drawn_KP):
        found = [report.samples[name][k] for name in ("top1", "top5", "eer")]
        assert found == pytest.approx(counted_by_hand(*given, times_P), abs=1e-9)


@settings(max_examples=30)
@given(recordings(), st.randoms(use_true_random=False))
def test_order_length_and_names_do_not_matter(given, random):
    embedding_RD, person_R, session_R = given
    expected = identify(*given, resamples=20)
    order_R = np.array(random.sample(range(len(person_R)), len(person_R)))
    length_R1 = np.exp(np.random.default_rng(0).normal(0, 8, (len(person_R), 1)))
    names = np.array(["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"])
    again = identify(
        (length_R1 * embedding_RD)[order_R], names[person_R[order_R]], 10.5 * session_R[order_R], resamples=20
    )
    assert again == expected
    for name, sample in expected.samples.items():
        np.testing.assert_allclose(again.samples[name], sample, atol=1e-9)


def test_perfect_embeddings():
    person_R = np.repeat(np.arange(9), 3)
    report = identify(np.eye(9)[person_R] * 0.1, person_R)
    for estimate, value in ((report.top1, 1), (report.top5, 1), (report.eer, 0)):
        assert (estimate.value, estimate.low, estimate.high) == (value, value, value)
    assert (report.persons, report.galleries, report.sessions, report.probes) == (9, 9, 27, 18)


def test_random_embeddings_are_at_chance():
    rng, person_R = np.random.default_rng(0), np.repeat(np.arange(60), 11)
    report = identify(rng.normal(size=(660, 16)), person_R, resamples=200)
    assert report.top1.value == pytest.approx(1 / 60, abs=0.02)
    assert report.top5.value == pytest.approx(5 / 60, abs=0.04)
    assert report.eer.value == pytest.approx(0.5, abs=0.04)
    assert report.eer.low < 0.5 < report.eer.high


def test_a_collapsed_encoder_finds_nobody():
    """All are alike but for the rounding of their sums, which must not decide."""
    embedding_D = np.random.default_rng(0).normal(size=768)
    report = identify(embedding_D * np.linspace(1, 3, 40)[:, None], np.repeat(np.arange(20), 2), resamples=10)
    assert figures(report) == (0, 0, 0.5)


def test_the_opposite_of_right_is_wholly_wrong():
    report = identify(np.array([[1, 0], [-1, 0], [0, 1], [0, -1.0]]), [0, 0, 1, 1], resamples=10)
    assert figures(report) == (0, 1, 1), "the fifth of two is always among five"


def test_which_recordings_are_galleries_and_which_probes():
    """The session decides, not the place in the list; persons with one session are neither."""
    right, left, up = [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]
    person_R, session_R = ["b", "a", "b", "a", "a", "c", "c"], [20, 3, 10, 1, 1, 7, 7]
    embedding_RD = [right, up, right, [0.1, 1.0], [-0.1, 1.0], left, left]
    report = identify(embedding_RD, person_R, session_R, resamples=10)
    assert figures(report) == (1, 1, 0)
    assert (report.persons, report.galleries, report.sessions, report.probes) == (3, 2, 4, 2)
    in_order = identify(embedding_RD, person_R, resamples=10)  # each recording is a session: c is compared too
    assert (in_order.galleries, in_order.sessions, in_order.probes) == (3, 7, 4)


def test_one_probe_per_person_is_the_last_recording_of_the_last_session():
    right, left, up, down = [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]
    person_R, session_R = [0, 0, 0, 0, 1, 1, 2], [3, 1, 3, 2, 1, 2, 1]
    embedding_RD = [left, right, right, down, up, up, left]
    report = identify(embedding_RD, person_R, session_R, one_probe=True, resamples=10)
    assert figures(report) == (1, 1, 0)
    assert (report.galleries, report.probes) == (2, 2)
    assert identify(embedding_RD, person_R, session_R, resamples=10).probes == 4


def test_intervals_depend_on_the_seed_alone():
    rng, person_R = np.random.default_rng(0), np.repeat(np.arange(30), 3)
    embedding_RD = rng.normal(size=(30, 8))[person_R] + 0.8 * rng.normal(size=(90, 8))
    first, again, other = (identify(embedding_RD, person_R, resamples=200, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert 0 < first.top1.low < first.top1.value < first.top1.high < 1
    assert 0 < first.eer.low < first.eer.value < first.eer.high < 0.5
    wider = identify(embedding_RD, person_R, resamples=200, level=0.99, seed=3)
    assert wider.top1.low <= first.top1.low < first.top1.high <= wider.top1.high


def test_report_as_json_scalars_and_table():
    report = identify(np.eye(3)[[0, 0, 1, 1, 2]], [0, 0, 1, 1, 2], resamples=10)
    said = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert said["top1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert (said["galleries"], said["probes"], said["level"]) == (2, 2, 0.95)
    assert "samples" not in said
    assert report.scalars() == {"top1": 1.0, "top5": 1.0, "eer": 0.0}
    assert "| 2 | 2 | 1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] | 0.000 [0.000, 0.000] |" in report.table()
    assert report.table().endswith("4 sessions of 2 persons; 1 persons with one session are left out.")


@pytest.mark.parametrize(
    ("embedding_RD", "person_R", "options", "said"),
    [
        ([[1.0], [1], [1]], [0, 0, 1], {}, "1 of 2 persons have two sessions; identification needs 2"),
        ([[1.0], [1]], [0, 1], {}, "0 of 2 persons have two sessions"),
        ([[1.0], [1], [1], [2]], [0, 0, 1, 1], {"session_R": [1, 1, 2, 2]}, "0 of 2 persons have two sessions"),
        ([[1.0], [math.nan], [1]], [0, 0, 1], {}, "embedding of recording 1 is not finite"),
        ([[1.0], [1], [math.inf]], [0, 0, 1], {}, "embedding of recording 2 is not finite"),
        ([[1.0], [1]], [0, 0, 1], {}, r"2 embeddings, persons \(3,\), sessions \(2,\)"),
        ([[1.0], [1]], [0, 0], {"session_R": [1]}, r"2 embeddings, persons \(2,\), sessions \(1,\)"),
        ([1.0, 1], [0, 0], {}, r"embeddings of shape \(2,\)"),
        (np.zeros((0, 4)), [], {}, r"embeddings of shape \(0, 4\)"),
        ([[1.0], [1], [1], [2]], [0, 0, 1, 1], {"resamples": 0}, "0 resamples"),
        ([[1.0], [1], [1], [2]], [0, 0, 1, 1], {"level": 1.0}, "level 1.0"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(embedding_RD, person_R, options, said):
    with pytest.raises(InputError, match=said) as refused:
        identify(embedding_RD, person_R, **options)
    assert "\n" not in str(refused.value)


# --- sessions ---


def test_days_of_sessions_sort_as_time_runs():
    texts = [
        "07.12.2004",
        "2004-12-28 10:00:00",
        "15.03.2005",
        "2005-04-05",
        " 05.04.2005 12:30",
        "2005-04-26T09:17:34",
    ]
    days = [session_day(text) for text in texts]
    assert days == sorted(days)
    assert days[3] == days[4]
    assert days[1] - days[0] == 21
    assert [session_day(text) for text in ("2", "10", "20050315")] == [2, 10, 20050315]


@pytest.mark.parametrize(
    ("texts", "one", "other"),
    [
        (["2004-12-07", "2005-01-03", "01.03.2005"], "2004-12-07", "01.03.2005"),
        (["01.03.2005", "20050301"], "01.03.2005", "20050301"),
        (["1", "2", "2005-03-01 10:00"], "1", "2005-03-01 10:00"),
    ],
)
def test_sessions_of_a_data_set_are_written_in_one_way(texts, one, other):
    with pytest.raises(InputError, match=f"sessions of 'a' are written as '{one}' and as '{other}'; write all in one"):
        session_days(texts, ["a"] * len(texts))
    datasets = [f"{text == other}" for text in texts]
    assert session_days(texts, datasets) == [session_day(text) for text in texts]


@pytest.mark.parametrize("text", ["", "15/03/05", "15.3.05", "2005-02-30", "32.01.2005", "monday", "-3", "2005-03"])
def test_what_could_be_two_days_or_none_is_refused(text):
    with pytest.raises(InputError, match="give a date as 2005-03-15 or") as refused:
        session_day(text)
    assert repr(text) in str(refused.value)


def test_ecg_id_is_ingested_with_person_and_date(shared_data, tmp_path):
    for person in ("Person_01", "Person_03", "Person_13"):
        (tmp_path / "ecgid" / person).mkdir(parents=True)
        for number in (1, 2, 3):
            for path in (shared_data / "ecgid" / person).glob(f"rec_{number}.*"):
                shutil.copy(path, tmp_path / "ecgid" / person)
    source = WfdbFolder(tmp_path / "ecgid", "ecgid", patient_key="@folder", ignore_leads=("ECG I filtered",))
    ingest(source, tmp_path / "shards", IngestOptions(validation_fraction=0))
    shards = ShardSet.open(tmp_path / "shards")
    said = [shards.metadata(number) for number in range(len(shards))]
    assert [one["leads"] for one in said] == [["I"]] * len(said)
    person_R = [one["patient"] for one in said]
    assert sorted(set(person_R)) == ["Person_01", "Person_03", "Person_13"]
    assert "Person_13/rec_2" in (tmp_path / "shards" / "rejected.csv").read_text(), "its checksum does not fit"
    day_R = [session_day(one["metadata"]["ECG date"]) for one in said]
    assert len(set(day_R)) >= 3
    assert identify(np.ones((len(said), 2)), person_R, resamples=1).galleries == 2
