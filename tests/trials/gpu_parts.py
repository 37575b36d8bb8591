"""The parts of gpu_run.py, one a process: what each does on a GPU, and what stands for it on a CPU.

    python tests/trials/gpu_parts.py PART cuda|cpu FOLDER

A part tells what it found as soon as it has found it (FOLDER/told.json): lines for a reader and numbers by name.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
SANITIZER = "compute-sanitizer"


class Place:
    """Where a part runs, and what it has told."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.lines: list[str] = []
        self.numbers: dict[str, Any] = {}

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def tell(self, *lines: str, **numbers: Any) -> None:
        """Written at once: whoever ends this part finds it."""
        for line in lines:
            print(line, flush=True)
        self.lines += lines
        self.numbers |= numbers
        beside = self.folder / ".told.json"
        beside.write_text(json.dumps({"lines": self.lines, "numbers": self.numbers}))
        beside.replace(self.folder / "told.json")

    def run(self, *command: object, **environment: str) -> None:
        """A program; raises CalledProcessError where it fails."""
        words = [str(word) for word in command]
        print("+", *words, flush=True)
        subprocess.run(words, check=True, env=os.environ | environment)

    def ecgscale(self, *arguments: object) -> None:
        self.run(sys.executable, "-m", "ecgscale.cli", *arguments)


def main(name: str, device: str, folder: str) -> None:
    """Raises KeyError for a part that is none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here; `make gpu-rehearse` is the same on a CPU")
    PARTS[name](Place(device, Path(folder)))


# -- what the machine is and does at most ----------------------------------------------------------------------------


def device(place: Place) -> None:
    """Versions, and the rates of a large copy and of large matrix products."""
    import torch

    from ecgscale.bench.device import Device
    from ecgscale.bench.measure import machine

    known = machine()
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items() if version)
    place.tell(f"{known['cpu']}, {known['cores']} cores, {known['memory_gb']} GB, {platform.platform()}", versions)
    place.numbers |= {"machine": known}
    if place.cuda:
        properties = torch.cuda.get_device_properties(0)
        place.tell(
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}"
        )
    copied, side, rounds, seconds = (1 << 32, 8192, 5, 0.05) if place.cuda else (1 << 26, 512, 3, 0.05)
    measured = Device(place.device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        measured.dtype = dtype
        found = measured.ceilings(copied, side, rounds, seconds)
        name = str(dtype).removeprefix("torch.")
        place.tell(
            f"{name} product {found.flops_per_s / 1e12:.4g} TFLOP/s, copy {found.bytes_per_s / 1e9:.4g} GB/s, "
            f"smallest launch {1e6 * found.launch_s:.3g} µs",
            **{f"{name}_tflops": found.flops_per_s / 1e12, "copy_gb_per_s": found.bytes_per_s / 1e9},
        )
    if place.cuda:
        host = torch.empty(1 << 30, dtype=torch.int8).pin_memory()
        target = torch.empty_like(host, device="cuda")
        target.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        rate = host.numel() / (time.perf_counter() - began) / 1e9
        place.tell(f"pinned host to device {rate:.3g} GB/s", host_to_device_gb_per_s=rate)


# -- tests -----------------------------------------------------------------------------------------------------------


def pytest(place: Place, *arguments: object, workers: int) -> None:
    """Tests, and what became of them; warnings of versions that nobody has tried here are no errors."""
    report = place.folder / "tests.xml"
    words = ["-W", "default", "-p", "no:cacheprovider", "--durations=5", f"--junitxml={report}"]
    spread = ["-n", workers, "--dist", "worksteal"] if workers > 1 else []
    try:
        place.run(sys.executable, "-m", "pytest", *words, *spread, *arguments)
    finally:
        if report.exists():
            told_tests(place, report)


def told_tests(place: Place, report: Path) -> None:
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    wrong = [case for case in suite if any(case.find(kind) is not None for kind in ("failure", "error"))]
    reasons = [why.get("message", "") for case in suite if (why := case.find("skipped")) is not None]
    skipped = [(reason.splitlines() or ["?"])[0] for reason in reasons]
    counts = {"tests": int(suite.get("tests", 0)), "failed": len(wrong), "skipped": len(skipped)}
    place.tell("{tests} tests, {failed} failed, {skipped} skipped".format(**counts), **counts)
    for reason in sorted(set(skipped)):
        place.tell(f"{skipped.count(reason)} skipped: {reason}")
    for case in wrong:
        told = next(one for kind in ("failure", "error") if (one := case.find(kind)) is not None)
        place.tell(f"FAILED {case.get('classname')}::{case.get('name')}: {(told.get('message') or '').splitlines()[0]}")


def kernel_tests(place: Place) -> None:
    """The kernels' tests, compiled for real. On a CPU: compiled for sm_90, and the tests that can run."""
    if not place.cuda:
        compiled_for_sm_90(place)
    pytest(
        place,
        "tests/kernels",
        "--ignore=tests/kernels/test_compile_without_gpu.py",
        workers=min(8, os.cpu_count() or 1),
    )


def compiled_for_sm_90(place: Place) -> None:
    script = ROOT / "tests" / "trials" / "compile_without_gpu.py"
    command = [sys.executable, str(script), "90", "bfloat16", "float16", "--blocks=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    kernels = [row for row in rows if len(row) == 6 and "._" in row[0]]
    spilling = [row for row in kernels if row[3] not in ("0", "?")]
    place.tell(f"compiled for sm_90: {len(kernels)} kernels, {len(spilling)} with a stack")
    place.tell(*(f"{row[0]}: {row[3]} bytes of stack" for row in spilling))
    if done.returncode:
        raise SystemExit(f"compile_without_gpu.py: exit code {done.returncode}")


def cuda_tests(place: Place) -> None:
    """Everything else that only a GPU can show; on a CPU these tests are skipped, and the clock's run."""
    pytest(place, "tests/test_cuda.py", "tests/training/test_clock.py", workers=1)


def waits(place: Place) -> None:
    """What the host waits for in a step: none of it, in sync debug mode. On a CPU what the host reads is counted."""
    if place.cuda:
        pytest(place, "tests/test_cuda.py", "-k", "waits or copied or still_read", workers=1)
        return
    pytest(place, "tests/training/test_waits.py", workers=1)


# -- losses and gradients --------------------------------------------------------------------------------------------


def losses(place: Place) -> None:
    """Of every objective in fp32, on the CPU and here: loss and gradients, with both kinds of kernels on a GPU.

    Raises SystemExit where one is off by more than float32 explains.
    """
    import torch

    from ecgscale.data.batch import synthetic_batch
    from ecgscale.model.presets import PRESETS
    from ecgscale.objectives import OBJECTIVES, build_objective, objective_config
    from ecgscale.training.ranks import exact_fp32
    from ecgscale_kernels import forced

    exact_fp32()
    torch.manual_seed(0)
    batch, wrong = synthetic_batch(16, 1000), []
    small = replace(PRESETS["tiny"], depth=2, dropout=0.0, attention_dropout=0.0, feature_dropout=0.0)

    def found(objective: Any, where: str, kernels: Any) -> tuple[float, dict[str, Any]]:
        objective.to(where).zero_grad()
        with forced(kernels):
            loss, _ = objective(batch.to(torch.device(where)), share=False)
        loss.backward()
        return loss.item(), {n: p.grad.double().cpu() for n, p in objective.named_parameters() if p.grad is not None}

    for name in OBJECTIVES:
        small_codes = {"codes": 16, "code_width": 16, "negatives": 20} if "wav2vec2" in name else {}
        config = objective_config(name, **small_codes)
        objective = build_objective(small, config, seed=3, rate_hz=500).eval()
        loss, gradients = found(objective, "cpu", "reference")
        largest = max(float(gradient.norm()) for gradient in gradients.values())
        for kernels in ("triton", "reference") if place.cuda else ("reference",):
            here, ours = found(objective, place.device, kernels)
            off = {n: float((ours[n] - g).norm() / (g.norm() + 0.01 * largest)) for n, g in gradients.items()}
            worst = max(off, key=lambda name: off[name])
            place.tell(
                f"{name}, {kernels}: loss {here:.6g}, off {abs(here / loss - 1):.1e}; worst gradient {off[worst]:.1e}",
                **{f"{name}/{kernels}/loss_off": abs(here / loss - 1), f"{name}/{kernels}/gradient_off": off[worst]},
            )
            if not (abs(here / loss - 1) < 1e-4 and off[worst] < 1e-3):
                wrong.append(f"{name} with {kernels} kernels ({worst})")
    if wrong:
        raise SystemExit(f"too far from the CPU: {', '.join(wrong)}")


# -- kernels ---------------------------------------------------------------------------------------------------------


def kernels(place: Place) -> None:
    """All shapes, forward and backward, beside eager PyTorch."""
    _bench_kernel(place, "--no-compile")


def kernels_compiled(place: Place) -> None:
    """The same beside what torch.compile makes of it, which may be the best baseline."""
    _bench_kernel(place, *(("--only", "patches", "stems") if place.cuda else ("--only", "stems")))


def _bench_kernel(place: Place, *arguments: object) -> None:
    out = place.folder / "bench"
    try:
        place.ecgscale(
            "bench", "kernel", "--device", place.device, "--out", out, *arguments, *([] if place.cuda else ["--quick"])
        )
    finally:
        _tell_bench(place, out)


def _tell_bench(place: Place, out: Path) -> None:
    """Bounds, rows and scalars of the reports that are there, also of one that was broken off."""
    sections = [one for file in sorted(out.glob("*.json")) for one in json.loads(file.read_text())["sections"]]
    for section in sections:
        for check in section["checks"]:
            verdict = "reached" if check["passed"] else "MISSED"
            bound = f"{check['what']}: {check['value']:.3g}, bound {check['bound']:g}: {verdict}"
            place.tell(f"{section['title']}: {bound}", **section["scalars"])
    for section in sections:
        place.tell(f"{section['title']}: {'; '.join(section['header'])}", **section["scalars"])
        place.tell(*("  " + "; ".join(row) for row in section["rows"]))


def sanitizer(place: Place) -> None:
    """compute-sanitizer on the smallest kernel case. On a CPU the case alone."""
    case = ["-m", "ecgscale.cli", "bench", "kernel", "--device", place.device, "--quick", "--no-compile"]
    case += ["--only", "patches", "stems", "--out", str(place.folder / "bench")]
    tool = shutil.which(SANITIZER)
    if place.cuda and tool is None:
        raise SystemExit(f"{SANITIZER} is not on the PATH")
    before = [tool, "--error-exitcode", "1"] if place.cuda else []
    place.run(*before, sys.executable, *case, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    place.tell(f"{SANITIZER}: no error" if place.cuda else "the case runs")


# -- training --------------------------------------------------------------------------------------------------------

WATCHED = {
    "throughput/ecg_per_s": "ECG/s",
    "throughput/mfu": "MFU",
    "throughput/tflops_per_device": "TFLOP/s",
    "throughput/loader_wait_share": "waiting for data",
    "step/seconds": "s a step",
}


def pretrain(place: Place) -> None:
    """The base preset in bf16 with ZeRO-1 on shards, 100 steps with a profile, not compiled and compiled."""
    from statistics import median

    shards = os.environ.get("ECGSCALE_GPU_SHARDS", "")
    if not shards:
        shards = str(place.folder / "shards")
        place.ecgscale("simulate", shards, "--patients", 400 if place.cuda else 60)
    preset, steps, batch, every = ("base", 100, 256, 10) if place.cuda else ("tiny", 12, 16, 2)
    for compiled in ("off", "on"):
        run = place.folder / f"run-{compiled}"
        arguments = {
            "config": f"configs/pretrain/{preset}.yaml",
            "data.shards": shards,
            "run.dir": run,
            "train.steps": steps,
            "train.global_batch": batch,
            "train.contrast_batch": batch,
            "train.log_every": every,
            "engine.precision": "bf16",
            "engine.zero_stage": 1,
            "engine.compile": "true" if compiled == "on" else "false",
        }
        words = [word for key, value in arguments.items() for word in (f"--{key}", value)]
        place.ecgscale("pretrain", *words, "--profile")
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        logged = [event for event in events if "train/loss" in event]
        late = logged[len(logged) // 2 :]  # what is compiled, and what is profiled, is over by then
        figures = {key: median(event[key] for event in late) for key in WATCHED if key in late[0]}
        told = ", ".join(f"{figures[key]:.4g} {word}" for key, word in WATCHED.items() if key in figures)
        held = {key: value for key, value in late[-1].items() if key.startswith("memory/")}
        place.tell(
            f"{preset}, {batch} recordings, compile {compiled}: {told}; "
            f"loss {logged[0]['train/loss']:.4g} to {logged[-1]['train/loss']:.4g}",
            f"  {', '.join(f'{key} {value:.4g}' for key, value in held.items())}",
            **{f"{compiled}/{key}": value for key, value in (figures | held).items()},
        )
        saved = sorted(path.name for path in (run / "checkpoints").iterdir())
        place.tell(f"  checkpoints: {', '.join(saved)}")


def batches(place: Place) -> None:
    """ECG/s, MFU and memory by batch, doubled until memory runs out."""
    import torch

    from ecgscale.bench.step_case import Axes, synthetic_batches
    from ecgscale.training.engine import Engine
    from ecgscale.training.metrics import device_peak
    from ecgscale.training.ranks import start_ranks

    preset, sizes = ("base", (32, 64, 128, 256, 512, 1024, 2048)) if place.cuda else ("tiny", (2, 4))
    (case,) = Axes(preset=(preset,), batch=sizes[:1], precision=("bf16",)).cases({}, place.device, 0, 2500)
    ranks = start_ranks()
    engine = Engine(case.build(), case.config.engine, ranks, accumulation=1, micro_batch=case.batch)
    peak = device_peak(case.config.engine, ranks.device)

    def step(pool: Iterator[Any]) -> None:
        loss, _ = engine.forward(engine.put(next(pool)))
        engine.backward(loss)
        engine.step(1e-5)

    def wait() -> float:
        if place.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for size in sizes:
        tried = replace(case, batch=size)
        pool = synthetic_batches(tried, 0)
        if place.cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(2):
                step(pool)
            began = wait()
            for _ in range(5):
                step(pool)
            step_s = (wait() - began) / 5
        except torch.OutOfMemoryError:
            place.tell(f"batch {size}: memory runs out", first_too_large=size)
            return
        rate, tflops = size / step_s, tried.flops() / step_s / 1e12
        held_gb = torch.cuda.max_memory_allocated() / 1e9 if place.cuda else 0.0
        mfu = f", MFU {tflops * 1e12 / peak:.1%}" if peak else ""
        place.tell(
            f"{preset}, bf16, ZeRO-1, batch {size}: {1e3 * step_s:.1f} ms, {rate:.5g} ECG/s, {tflops:.4g} TFLOP/s"
            f"{mfu}, {held_gb:.1f} GB",
            **{f"b{size}/ecg_per_s": rate, f"b{size}/tflops": tflops, f"b{size}/peak_gb": held_gb},
        )


def ways(place: Place) -> None:
    """A step beside plain DDP and the straightforward loop."""
    out = place.folder / "bench"
    wanted: list[object] = ["--preset", "base", "--batch", 64, "--rounds", 4, "--steps", 5]
    if not place.cuda:
        wanted = ["--preset", "tiny", "--batch", 2, "--quick"]
    try:
        place.ecgscale("bench", "step", *wanted, "--precision", "bf16", "--device", place.device, "--out", out)
    finally:
        _tell_bench(place, out)


def plan(place: Place) -> None:
    """Memory and time that the planner says, beside what is measured."""
    import torch

    from ecgscale.model.presets import PRESETS
    from ecgscale.objectives import objective_config
    from ecgscale.plan.check import check_memory, predicted_s
    from ecgscale.plan.measure import measure_rates
    from ecgscale.plan.trial import Trial, timed
    from ecgscale.training.engine import EngineConfig

    preset, rows = ("base", 256) if place.cuda else ("tiny", 8)
    engine = EngineConfig(zero_stage=1, precision="bf16")
    trial = Trial(PRESETS[preset], engine, rows=rows)
    memory = check_memory(trial, torch.get_num_threads(), place.device)
    place.tell(
        f"{preset}, bf16, ZeRO-1, {rows} segments: peak {memory.predicted[0] / 1e9:.3g} GB planned, "
        f"{memory.measured[0] / 1e9:.3g} GB measured ({memory.off:+.1%})",
        peak_off=memory.off,
    )
    rates = measure_rates(PRESETS["small" if place.cuda else "tiny"], objective_config(), engine)
    planned_s, measured_s = predicted_s(trial, rates, place.device), timed(trial).total
    place.tell(
        f"a step: {1e3 * planned_s:.4g} ms planned, {1e3 * measured_s:.4g} ms measured "
        f"({planned_s / measured_s - 1:+.1%})",
        step_off=planned_s / measured_s - 1,
    )


PARTS: dict[str, Callable[[Place], None]] = {
    part.__name__: part
    for part in (
        device, kernel_tests, losses, kernels, pretrain, batches, ways, waits, plan, sanitizer, kernels_compiled,
        cuda_tests,
    )
}  # fmt: skip

if __name__ == "__main__":
    main(*sys.argv[1:])
