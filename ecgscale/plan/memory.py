"""Memory of one rank: what a ZeRO stage keeps of the model, and the peaks of a step.

Parameters, gradients and optimizer state follow from counts and are exact. Letters: n parameters, W ranks, e bytes of
an element of the model's arithmetic (4 in fp32, 2 in bf16).
"""

from __future__ import annotations

from dataclasses import dataclass

from ecgscale.cost import Costs
from ecgscale.dry_run import Device
from ecgscale.lead_names import LEADS
from ecgscale.training.engine import BUCKET

_FP32 = 4
MOMENTS = 2
LIVE = 1_000_000_000
"""DeepSpeed 0.19.8's stage3_max_live_parameters: elements of parameters that stay gathered."""


@dataclass(frozen=True)
class Parallel:
    """How the model's state is spread."""

    zero_stage: int
    world_size: int
    precision: str
    device: Device
    whole_below: int = 100_000
    """At stage 3, parameters with fewer elements stay whole on every rank."""
    accumulation: int = 1
    """Micro-steps of a step."""
    offload: bool = False
    """Optimizer state in the host's memory. ecgscale does not offload; this is an estimate of what it would be."""

    @property
    def element(self) -> int:
        """e"""
        return _FP32 if self.precision == "fp32" else 2


@dataclass(frozen=True)
class State:
    """Bytes of one rank that do not depend on the batch."""

    weights: int
    """In the model's arithmetic: all, or a rank's share at stage 3."""
    gathered: int
    """At stage 3, the weights of all ranks that a rank holds at once."""
    gradients: int
    """In the model's arithmetic: all, or a rank's share from stage 2 on."""
    masters: int
    """fp32 weights that the optimizer updates, where they are not the model's own."""
    moments: int
    """Both moments of AdamW, fp32."""
    bucket: int
    """DeepSpeed's buffer for the gradients that are reduced together."""
    frozen: int = 0
    """Parameters that are not trained, as weights; and in fp32 on every rank, where the model's own are rounded."""
    host: int = 0
    """In the host's memory, where the optimizer is offloaded."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    state: State
    activations: dict[str, int]
    forward_peak: int
    backward_peak: int
    update_peak: int

    @property
    def peak(self) -> int:
        return max(self.forward_peak, self.backward_peak, self.update_peak)


def share(sizes: tuple[int, ...], zero_stage: int, world_size: int) -> int:
    """Elements of a rank's share of the optimizer's state, the padding included, as DeepSpeed cuts it.

    Stage 0 does not cut. Stages 1 and 2 cut all parameters together, to a multiple of 2 elements per rank; stage 3 cuts
    each parameter for itself.
    """
    if zero_stage == 0:
        return sum(sizes)
    if zero_stage == 3:
        return sum(-(-size // world_size) for size in sizes)
    return 2 * -(-sum(sizes) // (2 * world_size))


def state_bytes(sizes: tuple[int, ...], parallel: Parallel, frozen: tuple[int, ...] = ()) -> State:
    """What a ZeRO stage keeps of a model whose parameters have so many elements each, trained and frozen."""
    n, stage, element = sum(sizes), parallel.zero_stage, parallel.element
    own = share(sizes, stage, parallel.world_size)
    masters = 0 if stage == 0 and element == _FP32 else own * _FP32
    moments = MOMENTS * own * _FP32
    whole = sum(size for size in sizes if size < parallel.whole_below)
    frozen_here = share(frozen, 3, parallel.world_size) if stage == 3 else sum(frozen)
    return State(
        weights=(own if stage == 3 else n) * element,
        gathered=max(whole, min(n, LIVE)) * element if stage == 3 else 0,
        gradients=(own if stage >= 2 else n) * element,
        masters=0 if parallel.offload else masters,
        moments=0 if parallel.offload else moments,
        bucket=0 if stage == 0 and parallel.world_size == 1 else min(n, BUCKET) * element,
        frozen=frozen_here * element + (sum(frozen) * _FP32 if element != _FP32 else 0),
        host=own * _FP32 + masters + moments if parallel.offload else 0,
    )


def memory_of(costs: Costs, parallel: Parallel, rows: int, recomputed: int = 0) -> Memory:
    """Memory of one rank that works through ``rows`` segments in a micro-step, with so many layers recomputed."""
    state, stage = state_bytes(costs.sizes, parallel, costs.frozen), parallel.zero_stage
    kept = costs.kept(parallel.device, parallel.precision, rows, parallel.world_size, recomputed)
    held = state.weights + state.gathered + state.masters + state.moments + state.frozen
    held += rows * costs.samples * len(LEADS) * 2
    if stage == 3:  # its buffers are made once
        held += state.gradients + (state.bucket if parallel.device == "cuda" else 0)
    accumulated = state.gradients if parallel.accumulation > 1 and stage < 3 else 0
    bucket = state.bucket if stage in (1, 2) and parallel.device == "cuda" else 0
    # Until the layers are through gradients grow as activations are freed.
    through = max(accumulated + kept.backward_peak, state.gradients + kept.last_peak if stage < 2 else 0) + bucket
    return Memory(
        state,
        kept.parts,
        forward_peak=held + accumulated + kept.forward_peak,
        backward_peak=held + max(through, _reduced(costs.sizes, state, parallel)),
        update_peak=held + _updated(costs.sizes, parallel),
    )


def _reduced(sizes: tuple[int, ...], state: State, parallel: Parallel) -> int:
    """At the end of the backward pass: gradients, the bucket that they are reduced in, and a rank's share of them."""
    own = share(sizes, parallel.zero_stage, parallel.world_size) * parallel.element
    if parallel.zero_stage == 0:
        return state.gradients + max(state.bucket, max(sizes) * parallel.element)
    if parallel.zero_stage == 3:
        return max(sizes) * parallel.element
    if parallel.zero_stage == 1 and parallel.device == "cuda":
        return state.gradients + state.bucket
    return state.bucket + own


def _updated(sizes: tuple[int, ...], parallel: Parallel) -> int:
    """While the weights are updated: gradients in the model's arithmetic, flattened, and in fp32. AdamW is fused."""
    stage, own = parallel.zero_stage, share(sizes, parallel.zero_stage, parallel.world_size)
    if parallel.offload:
        return (0 if stage == 3 else own) * parallel.element
    copies = {0: 1, 1: 2, 2: 2, 3: 1}[stage]  # stage 3 keeps its gradients all the time
    return own * (copies * parallel.element + (_FP32 if parallel.precision == "bf16" else 0))
