"""The metrics against the official scorer, scikit-learn and explicit resampling."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from ecgscale.downstream import metrics
from ecgscale.downstream.metrics import (
    accuracy_exact_match,
    auprc,
    auroc,
    best_thresholds,
    challenge_score,
    f_measure,
    interval,
    labels_for_classes,
    load_challenge_weights,
    macro,
    resampled,
)
from ecgscale.downstream.report import evaluate
from ecgscale.errors import InputError


def bootstrap_interval(*arguments, level=0.95, **settings):
    return interval(resampled(*arguments, **settings), level)


CLASSES = ("164889003", "426783006", "284470004|63593006")
WEIGHTS_CC = np.array([[1.0, 0.5, 0.3], [0.5, 1.0, 0.45], [0.3, 0.45, 1.0]])


def drawn_at_random(seed: int, records: int, classes: int, decimals: int = 2, prevalence: float = 0.3):
    """Labels and informative scores, with many ties at 0 decimals; each class has both labels."""
    generator = np.random.default_rng(seed)
    label_BC = generator.random((records, classes)) < prevalence
    label_BC[0], label_BC[1] = True, False
    return label_BC, np.round(label_BC + generator.normal(size=label_BC.shape), decimals)


@pytest.fixture(scope="module")
def official(shared_reference):
    figures = json.loads((shared_reference / "cinc2021_score.json").read_text())
    return figures, load_file(shared_reference / "cinc2021_score.safetensors")


def test_every_figure_of_the_official_scorer(official):
    expected, arrays = official
    label_BC, prediction_BC = arrays["labels"], arrays["predictions"]
    ours = {
        "auroc": auroc(label_BC, arrays["probabilities"]),
        "auprc": auprc(label_BC, arrays["probabilities"]),
        "f_measure": f_measure(label_BC, prediction_BC),
    }
    for name, value_C in ours.items():
        expected_C = np.array([np.nan if value is None else value for value in expected[name]])
        np.testing.assert_allclose(value_C, expected_C, rtol=0, atol=1e-9, err_msg=name)
        assert macro(value_C) == pytest.approx(expected[f"{name}_macro"], abs=1e-9)
    accuracy = accuracy_exact_match(label_BC, prediction_BC)
    assert accuracy == pytest.approx(expected["accuracy_exact_match"], abs=1e-9)
    score = challenge_score(label_BC, prediction_BC, arrays["weights"], expected["classes"])
    assert score == pytest.approx(expected["challenge_metric"], abs=1e-9)


def test_report_repeats_the_official_figures(official):
    expected, arrays = official
    classes, label_BC, weights_CC = expected["classes"], arrays["labels"], arrays["weights"]
    half_C = np.full(len(classes), 0.5)
    ranked = evaluate(label_BC, arrays["probabilities"], arrays["probabilities"] >= half_C, classes, resamples=50)
    assert ranked.macro.auroc.value == pytest.approx(expected["auroc_macro"], abs=1e-9)
    assert ranked.macro.auprc.value == pytest.approx(expected["auprc_macro"], abs=1e-9)
    assert ranked.classes[5].positives == 0
    assert math.isnan(ranked.classes[5].auroc.low)
    challenge = (classes, weights_CC)
    predicted = evaluate(
        label_BC,
        arrays["predictions"],
        arrays["predictions"] >= half_C,
        classes,
        challenge=challenge,
        resamples=50,
    )
    assert predicted.macro.f_measure.value == pytest.approx(expected["f_measure_macro"], abs=1e-9)
    assert predicted.accuracy_exact_match == pytest.approx(expected["accuracy_exact_match"], abs=1e-9)
    score = predicted.challenge_score
    assert score.value == pytest.approx(expected["challenge_metric"], abs=1e-9)
    assert score.low < score.value < score.high


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=40))
def test_agrees_with_scikit_learn(rows):
    label_B, score_B = np.array([row[0] for row in rows]), np.array([row[1] / 4 for row in rows])
    label_BC, score_BC = label_B[:, None], score_B[:, None]
    if label_B.any() and not label_B.all():
        assert auroc(label_BC, score_BC)[0] == pytest.approx(roc_auc_score(label_B, score_B), abs=1e-12)
    if label_B.any():
        assert auprc(label_BC, score_BC)[0] == pytest.approx(average_precision_score(label_B, score_B), abs=1e-12)
    expected = f1_score(label_B, score_B > 0, zero_division=np.nan)
    np.testing.assert_allclose(f_measure(label_BC, score_BC > 0)[0], expected, atol=1e-12)


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_best_threshold_beats_every_other(seed):
    label_BC, score_BC = drawn_at_random(seed, records=30, classes=2, decimals=0)
    threshold_C = best_thresholds(label_BC, score_BC)
    best_C = f_measure(label_BC, score_BC >= threshold_C)
    for threshold in np.unique(score_BC):
        f1_C = f_measure(label_BC, score_BC >= threshold)
        assert (best_C >= f1_C - 1e-12).all()
        assert (threshold_C[best_C == f1_C] >= threshold).all(), "the highest of equally good thresholds"


def test_ties_count_one_half_and_order_alone_matters():
    label_BC = np.array([[1], [0], [1], [0]])
    assert auroc(label_BC, np.zeros((4, 1)))[0] == 0.5
    assert auprc(label_BC, np.zeros((4, 1)))[0] == 0.5
    score_BC = np.array([[3.0], [2.0], [2.0], [1.0]])
    assert auroc(label_BC, score_BC)[0] == 0.875
    assert auroc(label_BC, np.exp(score_BC))[0] == 0.875
    assert auroc(label_BC, score_BC.astype(np.float32))[0] == 0.875


def test_a_class_without_positives_is_nan_and_left_out_of_macro():
    label_BC, score_BC = drawn_at_random(0, records=50, classes=3)
    label_BC[:, 1] = False
    for metric in (auroc, auprc):
        value_C = metric(label_BC, score_BC)
        np.testing.assert_array_equal(np.isnan(value_C), [False, True, False])
        assert macro(value_C) == pytest.approx((value_C[0] + value_C[2]) / 2)
        low_K, high_K = bootstrap_interval(metric, label_BC, score_BC, resamples=50)
        np.testing.assert_array_equal(np.isnan(low_K), [False, True, False, False])
        np.testing.assert_array_equal(np.isnan(high_K), np.isnan(low_K))
    threshold_C = best_thresholds(label_BC, score_BC)
    assert math.isnan(threshold_C[1])
    assert not (score_BC >= threshold_C)[:, 1].any()
    assert math.isnan(f_measure(label_BC, score_BC >= threshold_C)[1])
    assert f_measure(label_BC, np.ones_like(label_BC))[1] == 0


def test_a_class_without_negatives():
    label_BC, score_BC = np.ones((5, 1)), np.arange(5.0)[:, None]
    assert math.isnan(auroc(label_BC, score_BC)[0])
    assert auprc(label_BC, score_BC)[0] == 1
    assert math.isnan(macro([math.nan, math.nan]))


@pytest.mark.parametrize("groups_B", [None, np.arange(40) // 3], ids=["records", "patients"])
@pytest.mark.parametrize("prevalence", [0.04, 0.4])
def test_counts_equal_explicit_resampling(groups_B, prevalence):
    label_BC, score_BC = drawn_at_random(3, 40, 3, decimals=0, prevalence=prevalence)
    prediction_BC = score_BC > 0
    count_BR = np.hstack(list(metrics._resamples(40, 60, 5, groups_B)))
    for metric, of_BC in ((auroc, score_BC), (auprc, score_BC), (f_measure, prediction_BC)):
        value_CR = metric(label_BC, of_BC, count_BR)
        assert value_CR.shape == (3, 60)
        for r in range(60):
            row = np.repeat(np.arange(40), count_BR[:, r].astype(int))
            np.testing.assert_allclose(value_CR[:, r], metric(label_BC[row], of_BC[row]), atol=1e-12)
            assert metrics._macro_R(value_CR)[r] == pytest.approx(macro(value_CR[:, r]), nan_ok=True)
    score_R = metrics.weighted_challenge(WEIGHTS_CC, CLASSES, "426783006", label_BC, prediction_BC, count_BR)[0]
    for r in range(60):
        row = np.repeat(np.arange(40), count_BR[:, r].astype(int))
        assert score_R[r] == pytest.approx(challenge_score(label_BC[row], prediction_BC[row], WEIGHTS_CC, CLASSES))


def test_resamples_draw_whole_patients_and_do_not_depend_on_chunks(monkeypatch):
    groups_B = np.array(["a", "b", "a", "c", "c", "c"])
    count_BR = np.hstack(list(metrics._resamples(6, 101, 0, groups_B)))
    np.testing.assert_array_equal(count_BR[0], count_BR[2])
    np.testing.assert_array_equal(count_BR[3:5], count_BR[4:6])
    np.testing.assert_array_equal(count_BR[[0, 1, 3]].sum(axis=0), 3)
    monkeypatch.setattr(metrics, "_CHUNK", 60)
    np.testing.assert_array_equal(np.hstack(list(metrics._resamples(6, 101, 0, groups_B))), count_BR)


def test_interval_is_deterministic_in_the_seed():
    label_BC, score_BC = drawn_at_random(1, records=200, classes=2)
    first, again = (bootstrap_interval(auroc, label_BC, score_BC, resamples=200, seed=4) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, bootstrap_interval(auroc, label_BC, score_BC, resamples=200, seed=5))
    low_K, high_K = first
    value_K = np.append(auroc(label_BC, score_BC), macro(auroc(label_BC, score_BC)))
    assert (low_K < value_K).all()
    assert (value_K < high_K).all()
    narrow_low_K, narrow_high_K = bootstrap_interval(auroc, label_BC, score_BC, resamples=200, seed=4, level=0.5)
    assert (low_K < narrow_low_K).all()
    assert (narrow_high_K < high_K).all()


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    trials, covered = 200, 0
    truth = 0.5 * math.erfc(-1 / 2)  # AUROC of two normal distributions one standard deviation apart
    for _ in range(trials):
        label_BC = generator.random((120, 1)) < 0.4
        score_BC = generator.normal(size=(120, 1)) + label_BC
        low_K, high_K = bootstrap_interval(auroc, label_BC, score_BC, resamples=200, level=0.9)
        covered += bool(low_K[0] <= truth <= high_K[0])
    # Within 3.5 standard errors, plus a little for the percentile interval's known shortfall.
    assert abs(covered / trials - 0.9) < 3.5 * math.sqrt(0.9 * 0.1 / trials) + 0.02


def test_interval_by_patient_is_wider_when_records_repeat():
    label_BC, score_BC = drawn_at_random(2, records=80, classes=2)
    repeated = np.repeat(np.arange(80), 8)
    by_record = bootstrap_interval(auroc, label_BC[repeated], score_BC[repeated], resamples=400)
    by_patient = bootstrap_interval(auroc, label_BC[repeated], score_BC[repeated], resamples=400, groups_B=repeated)
    once = bootstrap_interval(auroc, label_BC, score_BC, resamples=400)
    assert (np.subtract(*by_patient[::-1]) > 2 * np.subtract(*by_record[::-1])).all()
    np.testing.assert_allclose(by_patient, once, atol=1e-12)  # same patients drawn, each with eight equal records


def test_paired_difference_uses_the_same_resamples():
    label_BC, score_BC = drawn_at_random(6, records=300, classes=2)
    informed_KR = resampled(auroc, label_BC, score_BC, 300)
    np.testing.assert_array_equal(informed_KR, resampled(auroc, label_BC, score_BC, 300))
    noise_BC = np.random.default_rng(0).normal(size=score_BC.shape)
    difference_KR = informed_KR - resampled(auroc, label_BC, noise_BC, 300)
    low_K, _ = interval(difference_KR)
    assert (low_K > 0).all(), "an informative score is better than noise"
    apart_KR = informed_KR - resampled(auroc, label_BC, 0.9 * score_BC + 0.1 * noise_BC, 300)
    unpaired_KR = informed_KR - resampled(auroc, label_BC, 0.9 * score_BC + 0.1 * noise_BC, 300, seed=1)
    assert (apart_KR.std(axis=1) < 0.5 * unpaired_KR.std(axis=1)).all(), "pairing takes out what both share"


def test_reads_the_official_weights(shared_data, official):
    expected, arrays = official
    classes, weights_CC = load_challenge_weights(shared_data / "cinc_scoring" / "weights.csv")
    assert list(classes) == expected["classes"]
    np.testing.assert_array_equal(weights_CC, arrays["weights"])


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (",1,2\n1,1,0.5\n", "2 rows"),
        (",1,2\n1,1,0.5\n2,0.5\n", "[2, 3] cells"),
        ("", "0 rows"),
        (",1,2\n1,1,0.5\n3,0.5,1\n", "'3'"),
        (",1,2\n2,1,0.5\n1,0.5,1\n", "'2'"),
        (",1,2\n1,1,half\n2,0.5,1\n", "'half' in row '1'"),
        (",1,2\n1,1,nan\n2,0.5,1\n", "'nan' in row '1'"),
        (",1,2|1\n1,1,0.5\n1|2,0.5,1\n", "'1' stands in two"),
    ],
)
def test_bad_weights_are_refused_by_name(tmp_path, table, said):
    path = tmp_path / "weights.csv"
    path.write_text(table)
    with pytest.raises(InputError) as refused:
        load_challenge_weights(path)
    assert str(path) in str(refused.value)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_alternatives_may_stand_in_any_order_and_a_missing_file_is_named(tmp_path):
    path = tmp_path / "weights.csv"
    path.write_text("\ufeff,7,3|20\n7,1,0.25\n20|3,0.5,1\n", encoding="utf-8")
    classes, weights_CC = load_challenge_weights(path)
    assert classes == ("7", "20|3")
    np.testing.assert_array_equal(weights_CC, [[1, 0.25], [0.5, 1]])
    with pytest.raises(InputError, match=r"absent\.csv"):
        load_challenge_weights(tmp_path / "absent.csv")


def test_labels_take_any_alternative_and_leave_unscored_codes_out():
    codes = [["63593006", "55827005"], ["284470004", "63593006"], [], ["426783006", "164889003"]]
    np.testing.assert_array_equal(labels_for_classes(codes, CLASSES), [[0, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]])


def test_challenge_score_of_perfect_normal_and_partial_predictions():
    label_BC = np.eye(3, dtype=bool)
    assert challenge_score(label_BC, label_BC, WEIGHTS_CC, CLASSES) == 1
    assert challenge_score(label_BC, np.tile([0, 1, 0], (3, 1)), WEIGHTS_CC, CLASSES) == 0
    # By hand: atrial fibrillation read as both it and sinus rhythm earns (1 + 0.5) / 2.
    partial_BC = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    inactive = 0.5 / 2 + 1 + 0.45 / 2
    expected = (1.5 / 2 + 2 - inactive) / (3 - inactive)
    assert challenge_score(label_BC, partial_BC, WEIGHTS_CC, CLASSES) == pytest.approx(expected)
    healthy_BC = np.tile([0, 1, 0], (7, 1))
    assert challenge_score(healthy_BC, healthy_BC, WEIGHTS_CC, CLASSES) == 0
    with pytest.raises(InputError, match="'426783006' is none"):
        challenge_score(label_BC, label_BC, WEIGHTS_CC, ("1", "2", "3"))


def test_report_is_json_ready_and_prints_a_table():
    label_BC, score_BC = drawn_at_random(8, records=60, classes=3)
    label_BC[:, 0] = False
    threshold_C, groups_B = best_thresholds(label_BC, score_BC), np.arange(60) // 2
    report = evaluate(
        label_BC, score_BC, score_BC >= threshold_C, CLASSES, groups_B, (CLASSES, WEIGHTS_CC), resamples=100
    )
    figures = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert figures["classes"][0]["auroc"] == {"value": None, "low": None, "high": None}
    assert figures["classes"][0]["positives"] == 0
    assert (figures["records"], figures["patients"], figures["resamples"]) == (60, 30, 100)
    low_K, high_K = bootstrap_interval(auroc, label_BC, score_BC, resamples=100, groups_B=groups_B)
    value = macro(auroc(label_BC, score_BC))
    assert figures["macro"]["auroc"] == {"value": value, "low": low_K[-1], "high": high_K[-1]}
    lines = report.table().splitlines()
    assert lines[2] == "| 164889003 | 0 | – | – | – |"
    assert lines[4].startswith(f"| 284470004\\|63593006 | {label_BC[:, 2].sum()} | {report.classes[2].auroc} |")
    assert lines[5].startswith("| macro |")
    assert lines[-1] == f"Challenge score {report.challenge_score}"
    assert evaluate(label_BC, score_BC, score_BC >= threshold_C, CLASSES, resamples=10).challenge_score is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label_BC": np.full((4, 2), 0.5)}, "label 0.5 of record 0, class 0"),
        ({"label_BC": np.zeros((5, 2))}, "(5, 2)"),
        ({"score_BC": np.array([[0, 0], [0, 0], [0, np.nan], [0, 0]])}, "score nan of record 2, class 1"),
        ({"prediction_BC": np.zeros((4, 3), bool)}, "(4, 3)"),
        ({"classes": ("a", "b", "c")}, "3 classes"),
        ({"groups_B": np.zeros(3)}, "(3,) for 4 records"),
        ({"challenge": (("b", "a"), np.eye(2))}, "b, a"),
        ({"resamples": 0}, "0 resamples"),
        ({"level": 95}, "level 95"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_their_value(change, said):
    good = {"label_BC": np.eye(4, 2), "score_BC": np.zeros((4, 2))}
    good |= {"prediction_BC": np.zeros((4, 2), bool), "classes": ("a", "b")}
    with pytest.raises(InputError) as refused:
        evaluate(**(good | change))
    assert said in str(refused.value)


def test_scores_in_place_of_predictions_are_refused():
    with pytest.raises(InputError, match=r"prediction 0\.7 of record 0, class 0"):
        f_measure(np.ones((2, 1)), np.full((2, 1), 0.7))


def test_input_arrays_stay_as_they_were():
    label_BC, score_BC = drawn_at_random(9, records=20, classes=2)
    label_before_BC, score_before_BC = label_BC.copy(), score_BC.copy()
    evaluate(label_BC, score_BC, score_BC >= best_thresholds(label_BC, score_BC), ("a", "b"), resamples=10)
    np.testing.assert_array_equal(label_BC, label_before_BC)
    np.testing.assert_array_equal(score_BC, score_before_BC)
