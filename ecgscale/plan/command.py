"""`ecgscale plan` behind its arguments."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from ecgscale.errors import naming_file
from ecgscale.files import write_whole
from ecgscale.plan.cluster import Cluster, cluster_of, for_tensors, network_of
from ecgscale.plan.config import PlanConfig
from ecgscale.plan.report import text, yaml
from ecgscale.plan.summary import Plan, make_plan


def run(config: PlanConfig, out: Path | None, as_json: bool, measure: bool) -> str:
    """The plan as text or JSON; its config is written to ``out``."""
    cluster = this_machine(config) if measure else cluster_of(config.cluster, config.engine.precision)
    plan = make_plan(config, cluster)
    if out is not None:
        write(plan, out)
    return json.dumps(plan.tree(), indent=1) if as_json else text(plan)


def this_machine(config: PlanConfig) -> Cluster:
    """This machine's CPU as one rank, or as many GPUs like its first as the config says, with measured rates.

    Where no peak of the CPU is given, it is its best rate of matrix products.
    """
    from ecgscale.plan.measure import measure_rates

    if torch.cuda.is_available():
        shown = torch.cuda.get_device_properties(0)
        memory_gb = config.cluster.memory_gb or shown.total_memory / 1e9
        named = replace(config.cluster, device=shown.name, memory_gb=memory_gb)
        by_table = cluster_of(named, config.engine.precision)
        return replace(by_table, rates=measure_rates(config.model, config.objective, config.engine))
    given = config.cluster
    here = replace(given, device="this CPU", nodes=1, gpus_per_node=1)
    memory_bytes = for_tensors(given, given.memory_gb or psutil.virtual_memory().total / 1e9)
    rates = measure_rates(config.model, config.objective, config.engine)
    peak = given.peak_tflops * 1e12 or max(rates.products_flops_per_s.values())
    return Cluster(here, "cpu", memory_bytes, peak, given.watts, network_of(here, given.link_gb_per_s or 10.0), rates)


def check(as_json: bool) -> str:
    """Predictions beside measurements."""
    from ecgscale.plan import check as checking

    rates, found = checking.check_all()
    return json.dumps(checking.tree(rates, found), indent=1) if as_json else checking.text(rates, found)


def write(plan: Plan, out: Path) -> None:
    """The recommended config, for `ecgscale pretrain --config`."""
    with naming_file(f"--out {out}", "cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, yaml(plan).encode())
