"""A cluster's figures: those that were given, and for the others the table of known devices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ecgscale.dry_run import Device
from ecgscale.errors import InputError
from ecgscale.plan.config import ClusterConfig
from ecgscale.plan.network import Network
from ecgscale.plan.speed import Rates
from ecgscale.training.devices import device_of, known_device

_RATES = ("memory_gb", "peak_tflops", "memory_gb_per_s", "link_gb_per_s", "watts")


@dataclass(frozen=True)
class Cluster:
    """Machines with all their figures, in bytes, seconds, FLOP/s and watts."""

    config: ClusterConfig
    kind: Device
    memory_bytes: float
    """Of one GPU, for tensors."""
    peak_flops: float
    """Of one GPU in the run's precision; 0: unknown."""
    watts: float
    network: Network
    rates: Rates

    @property
    def gpus(self) -> int:
        return self.config.gpus

    @property
    def device(self) -> str:
        """What a rank has to itself."""
        return "CPU" if self.kind == "cpu" else "GPU"

    def of_nodes(self, nodes: int) -> Cluster:
        """As many machines of the same kind."""
        config = replace(self.config, nodes=nodes)
        return replace(self, config=config, network=replace(self.network, nodes=nodes))


def cluster_of(config: ClusterConfig, precision: str) -> Cluster:
    """GPUs of the table, or given ones; InputError for an unknown device whose rates are not all given."""
    wanted = {name: getattr(config, name) for name in _RATES}
    if not all(wanted.values()):
        instead = "all of " + ", ".join(f"cluster.{name}" for name in _RATES)
        device = known_device(config.device, instead)
        peak = device.peak_flops("bf16" if precision == "bf16" else "fp32")
        if peak is None and not config.peak_tflops:
            raise InputError(
                f"cluster.device {config.device}: no {precision} in hardware; give engine.precision fp32 or "
                "cluster.peak_tflops"
            )
        known = {
            "memory_gb": device.memory_bytes / 1e9,
            "peak_tflops": (peak or 0.0) / 1e12,
            "memory_gb_per_s": device.memory_bytes_per_s / 1e9,
            "link_gb_per_s": device.link_bytes_per_s / 1e9,
            "watts": device.watts,
        }
        wanted = {name: value or known[name] for name, value in wanted.items()}
    named = device_of(config.device)
    fp32_peak = named.peak_flops("fp32") if named and precision == "bf16" else None
    rates = Rates.of_device(
        named.name if named else config.device,
        wanted["peak_tflops"] * 1e12,
        config.matmul_efficiency,
        wanted["memory_gb_per_s"] * 1e9 * config.bandwidth_efficiency,
        config.launch_us * 1e-6,
        precision == "bf16",
        wanted["peak_tflops"] * 1e12 / fp32_peak if fp32_peak else 1.0,
    )
    memory_bytes = for_tensors(config, wanted["memory_gb"])
    network = network_of(config, wanted["link_gb_per_s"])
    return Cluster(config, "cuda", memory_bytes, wanted["peak_tflops"] * 1e12, wanted["watts"], network, rates)


def for_tensors(config: ClusterConfig, memory_gb: float) -> float:
    """Bytes of a device's memory without the reserve; InputError where nothing is left."""
    if memory_gb <= config.reserve_gb:
        raise InputError(
            f"cluster.reserve_gb {config.reserve_gb:g}: leaves nothing of the {memory_gb:g} GB of a device"
        )
    return (memory_gb - config.reserve_gb) * 1e9


def network_of(config: ClusterConfig, link_gb_per_s: float) -> Network:
    """Links as collectives see them."""
    return Network(
        config.nodes,
        config.gpus_per_node,
        config.link_latency_us * 1e-6,
        link_gb_per_s * 1e9 * config.network_efficiency,
        config.node_latency_us * 1e-6,
        config.node_gb_per_s * 1e9 * config.network_efficiency,
    )
