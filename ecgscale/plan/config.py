"""What a plan is made for: a pretraining config, a cluster, and how long the run is."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ecgscale.config import ENCODER, PretrainConfig
from ecgscale.errors import InputError
from ecgscale.model.encoder import ModelConfig, refuse_others


@dataclass(frozen=True)
class ClusterConfig:
    """Machines. A rate of 0 is taken from the table of known devices."""

    device: str = "H100 SXM"
    """One GPU, as the table or its driver calls it. One that no table has needs all five rates below."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of each."""
    memory_gb: float = 0.0
    """Memory of one GPU in 1e9 bytes."""
    reserve_gb: float = 3.0
    """Of it, what no tensor gets: the CUDA context, NCCL's and cuBLAS's buffers, fragments. In 1e9 bytes."""
    peak_tflops: float = 0.0
    """Dense peak of matrix products in the run's precision, in 1e12 FLOP/s of one GPU."""
    memory_gb_per_s: float = 0.0
    """Bandwidth of a GPU's memory in 1e9 bytes/s."""
    link_gb_per_s: float = 0.0
    """Between the GPUs of a machine, one direction, of each GPU, in 1e9 bytes/s."""
    watts: float = 0.0
    """Power of one GPU."""
    node_gb_per_s: float = 100.0
    """Out of a machine, one direction, all its adapters together, in 1e9 bytes/s; an adapter of 400 Gbit/s has 50."""
    link_latency_us: float = 3.0
    """Of one message between GPUs of a machine, in microseconds."""
    node_latency_us: float = 12.0
    """Of one message between machines, in microseconds."""
    network_efficiency: float = 0.8
    """Share of a link's bandwidth that collectives reach."""
    matmul_efficiency: float = 0.6
    """Share of the peak that matrix products reach."""
    bandwidth_efficiency: float = 0.75
    """Share of the memory's bandwidth that elementwise kernels reach."""
    launch_us: float = 4.0
    """Time between two kernels of a GPU that is kept waiting by its host, in microseconds."""
    jitter: float = 0.02
    """Relative deviation of a rank's step time: a step lasts as long as that of the slowest rank."""
    host_watts: float = 150.0
    """Power of what belongs to one GPU beside it: its share of CPUs, memory, network and fans."""
    pue: float = 1.2
    """Power of the whole building over that of its machines."""
    storage_gb_per_s: float = 2.0
    """Write bandwidth of the file system for checkpoints, of all nodes together, in 1e9 bytes/s."""
    hash_gb_per_s: float = 1.2
    """How fast one core reads a file back and hashes it (sha256), in 1e9 bytes/s."""
    mtbf_hours: float = 50_000.0
    """Hours between two failures of one GPU with all that belongs to it; 50,000 is what Llama 3's training saw."""
    restart_s: float = 300.0
    """From a failure until training goes on, without what is computed again, in seconds."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise InputError(f"cluster.{name} {getattr(self, name)}: give 1 or more")
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name.endswith("_efficiency"):
                if not 0 < value <= 1:
                    raise InputError(f"cluster.{one.name} {value:g}: give a share above 0, up to 1")
            elif one.name in _POSITIVE:
                if value <= 0:
                    raise InputError(f"cluster.{one.name} {value:g}: give a positive number")
            elif one.name != "device" and value < 0:
                raise InputError(f"cluster.{one.name} {value:g}: give 0 or more")
        if self.pue < 1:
            raise InputError(f"cluster.pue {self.pue:g}: give 1 or more")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


_POSITIVE = ("node_gb_per_s", "storage_gb_per_s", "hash_gb_per_s", "mtbf_hours")


@dataclass(frozen=True)
class LengthConfig:
    """How much is read, where no data.shards say it."""

    recordings: int = 0
    """Recordings for training; 0: those of data.shards."""
    rate_hz: float = 500.0
    """Samples per second of each lead, where there are no data.shards."""
    epochs: float = 0.0
    """How often each recording is read; 0: train.steps decides."""
    compressed: float = 0.25
    """Stored bytes over those of the int16 samples, where there are no data.shards to tell."""
    record_s: float = 10.0
    """Length of a stored recording in seconds, where there are no data.shards to tell."""

    def __post_init__(self) -> None:
        for name in ("recordings", "epochs"):
            if getattr(self, name) < 0:
                raise InputError(f"length.{name} {getattr(self, name):g}: give 0 or more")
        for name in ("rate_hz", "compressed", "record_s"):
            if getattr(self, name) <= 0:
                raise InputError(f"length.{name} {getattr(self, name):g}: give a positive number")


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """A pretraining config, whose zero_stage and activation_checkpointing are chosen by the plan, and a cluster."""

    model: ModelConfig = field(default_factory=ENCODER)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    length: LengthConfig = field(default_factory=LengthConfig)

    def __post_init__(self) -> None:
        refuse_others(self.model, "a plan")
        if self.init.model:
            raise InputError(f"init.model {self.init.model}: give the shape of the model to a plan by model.*")
