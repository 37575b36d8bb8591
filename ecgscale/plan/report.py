"""A plan for people: tables for a terminal, and the config as YAML."""

from __future__ import annotations

from ecgscale.config import dump
from ecgscale.plan.candidates import Candidate, checkpointing, rule, usual_stage
from ecgscale.plan.summary import Plan
from ecgscale.tables import aligned


def text(plan: Plan) -> str:
    """All that a plan says, in a page."""
    sections = [_head(plan), _ways(plan), _recommended(plan), _run(plan), _scaled(plan), _assumed(plan)]
    return "\n\n".join(filter(None, sections))


def yaml(plan: Plan) -> str:
    """The recommended pretraining config, with what is predicted of it."""
    step = plan.chosen.step
    first = (
        f"# By `ecgscale plan` for {plan.cluster.config.nodes} × {plan.cluster.config.gpus_per_node} "
        f"{plan.cluster.config.device}: {plan.chosen.memory.peak / 1e9:.1f} GB per {plan.cluster.device}, "
        f"{step.total:.3g} s per step, {_duration(plan.hours)}.\n"
    )
    return first + dump(plan.pretraining())


def _head(plan: Plan) -> str:
    config, cluster = plan.config, plan.cluster.config
    data = f"{plan.length.recordings:,} recordings" if plan.length.recordings else "recordings of unknown number"
    return (
        f"{config.model.preset}: {plan.parameters:,} parameters with heads, {config.engine.precision}, "
        f"{config.objective.name}\n"
        f"{cluster.nodes} × {cluster.gpus_per_node} {cluster.device}, {plan.cluster.memory_bytes / 1e9:.1f} GB for "
        f"tensors on each; {data}, segments of {config.data.segment_s:g} s at {plan.length.rate_hz:g} Hz\n"
        f"global batch {config.train.global_batch}, contrast batch {config.train.contrast}: {plan.chosen.accumulation} "
        f"micro-step{'s' if plan.chosen.accumulation > 1 else ''} of {plan.chosen.rows} segments per "
        f"{plan.cluster.device}"
    )


def _ways(plan: Plan) -> str:
    rows = []
    for one in plan.ways:
        state = one.memory.state
        rows.append(
            [
                f"{one.zero_stage}{' offload*' if one.offload else ''}",
                _layers(one, plan),
                *(
                    f"{size / 1e9:.2f}"
                    for size in (
                        state.weights + state.gathered + state.frozen,
                        state.gradients,
                        state.masters + state.moments,
                        sum(one.memory.activations.values()),
                        state.bucket,
                        one.memory.peak,
                    )
                ),
                "yes" if one.fits else f"{one.lacks / 1e9:.1f} GB short",
                f"{one.largest_rows:,}",
                "–" if one.offload else f"{one.step.total * 1e3:.1f}",
                f"{one.step.sent_bytes / 1e9:.2f}",
                "<-" if one is plan.chosen else "",
            ]
        )
    head = "ZeRO|checkpointed|weights|gradients|optimizer|activations|buffer|peak GB|fits|at most|step ms|sent GB|"
    notes = ["peak: the fullest moment of a step, at which not all columns are there, but working memory is"]
    if any(one.offload for one in plan.ways):
        notes.append("* an estimate: ecgscale does not offload")
    return "\n".join([aligned(head.split("|"), rows), *notes])


def _layers(one: Candidate, plan: Plan) -> str:
    return {0: "none", plan.config.model.depth: "all"}.get(one.checkpointed_layers, f"{one.checkpointed_layers} layers")


def _recommended(plan: Plan) -> str:
    one, usual = plan.chosen, usual_stage(plan.config, plan.cluster.gpus)
    step = one.step
    mfu = "unknown" if plan.mfu is None else f"{plan.mfu:.1%}"
    parts = {
        "computing": step.compute - step.recompute,
        "recomputing": step.recompute,
        "updating": step.update,
        "communicating": step.communication,
        "waiting for the slowest": step.waiting,
    }
    shares = ", ".join(f"{name} {value / step.total:.1%}" for name, value in parts.items() if value)
    batch = plan.config.train.global_batch
    return (
        f"Recommended: ZeRO {one.zero_stage}, {checkpointing(one, plan.config)} ({rule(usual)})\n"
        f"step         {step.total:.4g} s ({shares}); none of these overlap\n"
        f"speed        {batch / step.total:,.0f} recordings/s, "
        f"{step.flops / step.total / 1e12:.3g} TFLOP/s per {plan.cluster.device}, MFU {mfu}\n"
        f"sent         {step.sent_bytes / 1e9:.2f} GB by each {plan.cluster.device} and step"
    )


def _run(plan: Plan) -> str:
    length, storage, survival = plan.length, plan.storage, plan.survival
    epochs = f" ({length.epochs:.3g} epochs)" if length.epochs else ""
    energy = "" if plan.kwh is None else f", {_number(plan.kwh)} kWh"
    return (
        f"length       {length.steps:,} steps{epochs}: {_duration(plan.hours)}, "
        f"{_number(plan.hours * plan.cluster.gpus)} {plan.cluster.device}-hours{energy}\n"
        f"checkpoint   {storage.checkpoint_bytes / 1e9:.3f} GB, saved in {storage.save_s:.1f} s; every "
        f"{survival.daly_s / 60:.0f} min by Daly ({survival.young_s / 60:.0f} by Young); the config has one every "
        f"{survival.interval_s / 60:.0f} min, half an hour at most\n"
        f"failures     one in {survival.between_failures_s / 3600:,.0f} h; {survival.effective:.2%} of the time is "
        f"kept training ({survival.simulated:.2%} when simulated)\n"
        f"reading      {storage.read_bytes_per_s / 1e6:,.1f} MB/s from storage by all nodes, "
        f"{storage.read_bytes_per_s / plan.cluster.config.nodes / 1e6:,.1f} MB/s by each, which takes "
        f"{storage.loader_cores_per_node:.1f} of its cores to decode"
    )


def _scaled(plan: Plan) -> str:
    if not plan.scaled:
        return ""
    rows = [
        [
            f"{one.gpus:,}",
            f"{one.global_batch:,}",
            f"{one.step_s * 1e3:.1f}",
            f"{one.communication_s * 1e3:.1f}",
            f"{one.efficiency:.1%}",
            f"{one.peak_bytes / 1e9:.1f}{'' if one.fits else ' !'}",
            "" if one.same_batch_step_s is None else f"{one.same_batch_step_s * 1e3:.1f}",
            f"{one.survival.between_failures_s / 3600:,.0f}",
            f"{one.survival.interval_s / 60:.0f}",
            f"{one.survival.effective:.2%}",
            f"{one.survival.simulated:.2%}",
            f"{one.recordings_per_s:,.0f}",
        ]
        for one in plan.scaled
    ]
    head = "GPUs|global batch|step ms|of it sending|efficiency|peak GB|ms at the given batch"
    shown = aligned((head + "|h to a failure|min between saves|kept|simulated|recordings/s").split("|"), rows)
    beyond = (
        "" if all(one.fits for one in plan.scaled) else "\n! more memory than a GPU has, or too many ranks for ZeRO 3"
    )
    return f"With as many recordings per GPU on more machines:\n{shown}{beyond}"


def _assumed(plan: Plan) -> str:
    cluster, network = plan.cluster.config, plan.cluster.network
    said = [plan.cluster.rates.source]
    if plan.cluster.kind != "cpu":
        said.append(
            f"{network.link_bytes_per_s / 1e9:.0f} GB/s and {network.link_latency_s * 1e6:g} µs between GPUs of a "
            f"machine, {network.node_bytes_per_s / 1e9:.0f} GB/s and {network.node_latency_s * 1e6:g} µs between "
            "machines"
        )
    said.append(
        f"{cluster.mtbf_hours:,.0f} h between failures of a {plan.cluster.device}, {cluster.restart_s:g} s to restart"
    )
    if plan.kwh is not None:
        said.append(
            f"{plan.cluster.watts:g} W per {plan.cluster.device} and {cluster.host_watts:g} W beside it, "
            f"PUE {cluster.pue:g}"
        )
    return f"Assumed: {'; '.join(said)}. Every figure is a key of cluster.*; see docs/planning.md."


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.3g} minutes" if hours * 60 >= 1 else f"{hours * 3600:.3g} s"
    return f"{hours:.3g} hours" if hours < 48 else f"{hours / 24:.3g} days"
