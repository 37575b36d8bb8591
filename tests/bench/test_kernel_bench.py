"""The kernel bench runs on a CPU, times nothing that is wrong, and counts as by hand. No time is asserted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from ecgscale.bench.device import Call, Device
from ecgscale.bench.kernel import Effort, bench_kernel
from ecgscale.bench.kernel_measure import Costs, measure, write_rates, written
from ecgscale.bench.kernel_ways import CONV, MODES, REFERENCE, patch_embed
from ecgscale.cli import main
from ecgscale_kernels.counts import (
    ConvStemSize,
    Cost,
    PatchEmbedSize,
    conv_stem_backward,
    conv_stem_forward,
    patch_embed_backward,
    patch_embed_forward,
    plain_conv_stem_forward,
    plain_patch_embed_forward,
)

SMALL = PatchEmbedSize(rows=3, kept=6, patch=16, width=24, samples=100, item=4)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("bench")
    assert main(["bench", "kernel", "--quick", "--no-compile", "--device", "cpu", "--out", str(folder)]) == 0
    return folder


# --- the report ---


def test_report_holds_every_part_with_finite_positive_numbers(out):
    report = json.loads(next(out.glob("kernel-*.json")).read_text())
    titles = " ".join(section["title"] for section in report["sections"])
    assert all(part in titles for part in ("The device", "Patch embedding", "Convolutional stem", "Pretraining"))
    for section in report["sections"]:
        assert {len(row) for row in section["rows"]} == {len(section["header"])}
        assert all(math.isfinite(value) and value > 0 for value in section["scalars"].values())
        assert all(check["passed"] for check in section["checks"]), "a result is wrong"
        assert set(section["meanings"]) == set(section["scalars"])
    assert report["machine"]["versions"]["torch"]


def test_on_a_cpu_the_report_says_that_triton_was_not_measured_and_what_measures_it(out):
    text = next(out.glob("kernel-*.md")).read_text()
    assert "CPU" in text.splitlines()[0]
    assert "`make gpu`" in text.splitlines()[0]
    assert "ecgscale, Triton" not in text
    assert all(way in text for way in (REFERENCE, CONV))


def test_scalars_have_stable_names(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    patch = "bench/kernel/patch_embed/B2_P16_D64"
    assert {f"{patch}/ecgscale_reference/both_ms", f"{patch}/eager_conv1d/forward_over_ours"} <= tags
    assert {"bench/kernel/device/copy_gb_per_s", "bench/kernel/step/reference/ms"} <= tags


def test_what_was_measured_before_an_error_is_written(tmp_path):
    too_long = replace(Effort.least().only(["patches"]), patches=((2, 16, 8), (2, 2000, 8)), compiled=0)
    with pytest.raises(ValueError, match="2000"):
        bench_kernel(tmp_path, "cpu", too_long)
    assert "P 16" in next(tmp_path.glob("kernel-*.md")).read_text()


def test_only_some_parts_and_what_needs_a_gpu(tmp_path, capsys):
    effort = Effort.usual(cuda=False).only(["stems"])
    assert (effort.patches, effort.steps) == ((), ())
    assert effort.stems
    assert main(["bench", "kernel", "--device=cuda", f"--out={tmp_path}"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# --- what is timed ---


@pytest.mark.parametrize("wrong", [1 + 1e-4, float("nan")])
def test_a_wrong_way_is_not_timed_but_named(wrong):
    device = Device("cpu")
    problem = patch_embed(SMALL, device, compiled=False)
    problem.ways[REFERENCE] = lambda *learned: wrong * problem.ways[CONV](*learned)
    found = measure(problem, device, rounds=1, seconds=0.0)
    assert [list(found.rounds[mode]) for mode in MODES] == [found.right] * 3
    assert REFERENCE not in found.right
    assert CONV in found.right
    section = written(found)
    costs = Costs(patch_embed_forward(SMALL), patch_embed_backward(SMALL))
    write_rates(section, found, device.ceilings(1 << 10, 8, 1, 0.0), costs, costs)
    assert "WRONG" in section.rows[0][1]
    assert {len(row) for row in section.rows} == {len(section.header)}
    assert [check.passed for check in section.checks] == [False]


def test_a_wrong_gradient_is_found_though_the_result_is_right():
    problem = patch_embed(SMALL, Device("cpu"), compiled=False)
    problem.ways[REFERENCE] = lambda weight_DLP, bias_D: problem.ways[CONV](weight_DLP, bias_D.detach() + 0 * bias_D)
    errors = problem.errors()
    assert errors[REFERENCE] > 0.1 > problem.bound(errors)


def test_a_backward_is_timed_without_its_forward():
    seen: list[str] = []
    call = Call(lambda given: seen.append(f"run {given}"), lambda: seen.append("before") or "this")
    assert Device("cpu").round(call, 0.0).units == 1
    assert seen == ["before", "run this"]


def test_half_of_the_leads_of_each_row_are_kept():
    problem = patch_embed(SMALL, Device("cpu"), compiled=False)
    _, gain_BL, _ = problem.exact.args
    assert gain_BL.ne(0).sum(dim=1).tolist() == [6, 6, 6]
    assert gain_BL.ne(0).unique(dim=0).shape[0] > 1


# --- counts, of a segment of 12 × 2,500 samples with six leads kept, in bf16 ---


def per_segment(count, size) -> Cost:
    """What one more row costs, since weights are read once."""
    two, one = count(replace(size, rows=2)), count(size)
    return Cost(two.read - one.read, two.written - one.written, two.flops - one.flops)


@pytest.mark.parametrize(("patch", "written_kb"), [(16, 240), (25, 154), (50, 77)])
def test_bytes_and_flops_of_a_patch_embedding(patch, written_kb):
    size = PatchEmbedSize(rows=1, kept=6, patch=patch, width=768)
    fused, plain = per_segment(patch_embed_forward, size), per_segment(plain_patch_embed_forward, size)
    assert fused.read / 1e3 == pytest.approx(30, abs=0.5)
    assert fused.written / 1e3 == pytest.approx(written_kb, abs=0.5)
    assert fused.flops == 2 * (2500 // patch) * 768 * 6 * patch
    assert fused.flops / 1e6 == pytest.approx(23.0, abs=0.1)
    # All leads are read, then the dequantised signal is written and read.
    assert (plain.moved - fused.moved) / 1e3 == pytest.approx(30 + 60 + 60, abs=0.5)
    assert plain.flops == 2 * fused.flops
    backward = per_segment(patch_embed_backward, size)
    assert (backward.read, backward.written, backward.flops) == (fused.moved, 0, fused.flops)
    assert patch_embed_backward(size).written == (12 * patch + 1) * 768 * 2


def test_bytes_and_flops_of_the_stem():
    size = ConvStemSize(rows=1, kept=6, channels=256)
    blocks = [2 * 1250 * 24 * 256, 2 * 625 * 512 * 256, 2 * 312 * 512 * 256, 2 * 156 * 512 * 256]
    assert [size.flops(block, leads=12) for block in range(4)] == blocks
    assert plain_conv_stem_forward(size).flops == sum(blocks)
    fused = per_segment(conv_stem_forward, size)
    assert fused.flops == sum(blocks) - blocks[0] // 2
    assert fused.flops / 1e6 == pytest.approx(294, abs=0.5)
    assert fused.read / 1e3 == pytest.approx(30, abs=0.5)
    assert fused.written == 156 * 256 * 2
    # Block 0 needs the gradient of its weight alone, the others that of their input too.
    assert conv_stem_backward(size).flops == blocks[0] // 2 + 2 * sum(blocks[1:])
    # What the kernels keep: the later blocks before GELU, and the features.
    kept = [size.activation_bytes(block) for block in (1, 2, 3, 3)]
    assert (sum(kept[:2]) / 1e3, sum(kept[:3]) / 1e3, sum(kept) / 1e3) == pytest.approx((480, 560, 640), abs=1)


def test_floor_is_the_slower_of_memory_and_arithmetic():
    cost = Cost(read=60, written=40, flops=1000) + Cost(0, 0, 1000)
    assert cost.floor_s(bytes_per_s=10, flops_per_s=1000) == 10
    assert cost.floor_s(bytes_per_s=1000, flops_per_s=10) == 200
