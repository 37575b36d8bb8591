"""Fixtures that several rooms share."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor, nn

from ecgscale.cli import main
from ecgscale.data.batch import ECGBatch
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.export import Profile, about_model, write_export
from ecgscale.inference import ECGModel
from ecgscale.model.encoder import ECGEncoder, ModelConfig
from ecgscale.simulate import Simulation
from small_jobs import Jobs

# Processes with a thread for each core hold each other up at their barriers: several at once take twice as long.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("no deadline", deadline=None)  # a busy machine is no defect
settings.load_profile("no deadline")

# What takes longer than six seconds on two cores, by room; `make test-fast` leaves it out.
SLOW = {
    "": "cost docs gpu_run own_code packages yaml_text",
    "bench": "bench_report step_bench",
    "data": "archives copies hostile ingest_resume remote remote_stream shards sources",
    "downstream": "finetune reproduce trained_on",
    "interop": "begin fairseq onnx output",
    "kernels": "compile_without_gpu",
    "objectives": "ranks",
    "plan": "measure memory network_and_failures plan",
    "scaling": "ladder",
    "training": "board_page checkpoint compiling devices kept_state kills meeting monitor profile runs stopping waits",
    "launch": "",  # all of it
}


if not os.environ.get("ECGSCALE_GPU"):  # `make gpu` sets it for tests/test_cuda.py; all others count bits on the CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is slow, and sorts files by how long they take: pytest-xdist gives each to the next free process.

    The launcher's tests wait more than they compute, those on a SLURM longest, and go first: the other processes have
    the cores to themselves meanwhile. Files that take seconds come last, so that all end at about the same time.
    """
    for item in items:
        room = "" if item.path.parent.name == "tests" else item.path.parent.name
        files = SLOW.get(room)
        if files is not None and (not files or item.path.stem.removeprefix("test_") in files.split()):
            item.add_marker(pytest.mark.slow)
    items.sort(key=_how_late)


def _how_late(item: pytest.Item) -> tuple[bool, ...]:
    room, slurm = item.path.parent.name, "devcluster" in getattr(item, "fixturenames", ())
    return not slurm, room != "launch", room != "training", "slow" not in item.keywords


@pytest.fixture(autouse=True)
def own_linear() -> Iterator[None]:
    """At stage 3 DeepSpeed 0.19.8 puts its own function in the place of PyTorch's, for good."""
    linear = F.linear
    yield
    F.linear = linear


def pytest_collection_finish() -> None:
    """A full collection need not walk what all modules hold, a tenth of a second each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


TOYS = Path(__file__).parent / "toys"  # a user's own packages
SHARED = Path(os.environ.get("ECGSCALE_SHARED", Path(__file__).parents[2] / "shared"))


def shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(f"{name} of the shared reference material is absent (ECGSCALE_SHARED={SHARED})")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real ECG recordings; the test is skipped where they are absent."""
    return shared_folder("data")


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """Numbers of the reference implementation; the test is skipped where they are absent."""
    return shared_folder("reference")


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which no file of this process grows beyond so many bytes: a real error of the system."""

    @contextmanager
    def limited(most_bytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def refusal(capsys) -> Callable[..., str]:
    """The one line with which a command line is refused."""

    def run(*arguments: object) -> str:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.startswith("ecgscale: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err

    return run


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    """Waits until a condition holds; fails when a process that must run meanwhile has ended, or after a while."""

    def wait(condition: Callable[[], bool], process: object = None, limit_s: float = 120) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert process is None or process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.05)

    return wait


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., ECGBatch]:
    """(B, 12, T) counts -> a batch of gain 1 and offset 0, each row its own position; any field may be given."""

    def make(signal_BLT: Tensor, **fields: Tensor) -> ECGBatch:
        rows, leads, samples = signal_BLT.shape
        zeros_B = torch.zeros(rows, dtype=torch.int64)
        usual = {
            "gain_BL": torch.ones(rows, leads),
            "offset_BL": torch.zeros(rows, leads),
            "length_B": torch.full((rows,), samples),
            "patient_B": zeros_B,
            "segment_B": zeros_B,
            "position_B": torch.arange(rows),
            "record_B": zeros_B,
        }
        chosen = usual | fields
        return ECGBatch(signal_BLT, padded=bool((chosen["length_B"] < samples).any()), **chosen)

    return make


@pytest.fixture(scope="session")
def small_model_config() -> ModelConfig:
    """As small as an encoder with every part can be."""
    shape = {"stem_channels": 16, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
    return ModelConfig(preset="tiny", position_kernel=16, position_groups=4, **shape)


@pytest.fixture(scope="session")
def make_model(small_model_config: ModelConfig) -> Callable[..., ECGModel]:
    """An encoder of random weights, the same in each call, that takes 5 s at 500 Hz; with a head of ``classes``."""

    def make(normalisation: str = "mv", classes: int = 0) -> ECGModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            encoder = ECGEncoder(small_model_config)
            head = nn.Linear(small_model_config.width, classes) if classes else None
        profile = Profile(500.0, 5.0, normalisation)
        return ECGModel(encoder, profile, head, about_model(small_model_config, profile))

    return make


@pytest.fixture
def small_export(make_model: Callable[..., ECGModel], tmp_path: Path) -> Path:
    """The folder of an exported small model."""
    return write_export(tmp_path / "export", export_weights(make_model()), make_model().about)


@pytest.fixture(scope="session")
def without_checksums() -> Callable[[Path], Path]:
    """Makes an export one of earlier versions, which nothing kept from being changed by hand."""

    def rewrite(folder: Path) -> Path:
        path = folder / "config.json"
        about = json.loads(path.read_text())
        del about["sha256"], about["weights_sha256"], about["parts"], about["model"]["encoder"]
        path.write_text(json.dumps(about | {"format": "ecgscale-export/1"}))
        return folder

    return rewrite


def export_weights(model: ECGModel) -> dict[str, Tensor]:
    weights = {f"encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    head = model.head.state_dict() if model.head else {}
    return weights | {f"head.{name}": tensor for name, tensor in head.items()}


@pytest.fixture(scope="session")
def smooth_ecg() -> Callable[..., npt.NDArray[np.float32]]:
    """Twelve leads in mV from a formula, and so exact at every sample rate: P, Q, R, S and T as bells, 75 beats/min."""
    delay_s = np.array([-0.16, -0.03, 0.0, 0.03, 0.24])
    width_s = np.array([0.03, 0.015, 0.015, 0.015, 0.05])
    height_mv = np.array([0.12, -0.1, 1.0, -0.25, 0.3])

    def make(rate_hz: float, duration_s: float, seed: int = 0) -> npt.NDArray[np.float32]:
        factor_L5 = np.random.default_rng(seed).uniform(-1.5, 1.5, (12, 5))
        time_T = np.arange(round(rate_hz * duration_s)) / rate_hz
        since_T = (time_T + 0.4) % 0.8 - 0.4
        wave_5T = height_mv[:, None] * np.exp(-(((since_T - delay_s[:, None]) / width_s[:, None]) ** 2))
        return np.asarray(factor_L5 @ wave_5T, np.float32)

    return make


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "simulated"
    ingest(Simulation(patients=24, duration_s=6, rate_hz=250), out, IngestOptions(rate_hz=250, records_per_shard=16))
    return out


@pytest.fixture(scope="session")
def interpreted_kernels() -> None:
    """Skips the test where Triton's interpreter cannot run."""
    pytest.importorskip("triton")
    command = [sys.executable, str(Path(__file__).parent / "triton_interpreter.py")]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    if why := subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.strip():
        pytest.skip(why)


@pytest.fixture(scope="session")
def jobs(tmp_path_factory) -> Iterator[Jobs]:
    command = [sys.executable, str(Path(__file__).parent / "forked_ranks.py")]
    path = os.pathsep.join([str(TOYS), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as server:
        yield Jobs(server, tmp_path_factory.mktemp("errors"))
        server.stdin.close()
