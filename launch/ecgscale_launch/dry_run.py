"""What would be submitted, or run here, with all that is checked before: nothing is written or started."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from ecgscale import yaml_text
from ecgscale.config import dump
from ecgscale.training.environment import HANG_S, MEETING_TIMEOUT_S, SUPERVISOR
from ecgscale_launch.commands import local_rank_command, rank_command, srun_command
from ecgscale_launch.job_folder import JobFolder
from ecgscale_launch.job_record import Where, placed
from ecgscale_launch.launch_config import LaunchConfig
from ecgscale_launch.launching import batch_of, checked_stages
from ecgscale_launch.local import rank_environment
from ecgscale_launch.stages import Piece, Wanted, check_data
from ecgscale_launch.watch import refuse_active


def dry_run(wanted: Wanted, cluster: LaunchConfig, where: Where) -> str:
    """Resolved configs, batch scripts, the ranks' commands and what their environment has of its own."""
    planned = checked_stages(wanted, cluster, where)
    for stage in planned:
        for piece in stage.pieces:
            refuse_active(piece.run)
    if not wanted.after:
        check_data(planned[0])
    lines = ["# --- cluster ---", dump(cluster), *_missing_mounts(cluster)]
    for number, stage in enumerate(planned):
        if where == "slurm":
            after = ("JOB_BEFORE",) if number else wanted.after
            script = replace(batch_of(stage, cluster, wanted.at_once), after=after).script()
            lines += [f"# --- {stage.run}: batch script ---", script]
        for piece in stage.pieces:
            lines += _of_piece(piece, cluster, where)
    return "\n".join(lines)


def _of_piece(piece: Piece, cluster: LaunchConfig, where: Where) -> list[str]:
    folder, work = JobFolder.of(piece.run), placed(piece.run, piece.work)
    lines = [f"# --- {folder.config} ---", yaml_text.written(work.values)]
    if where == "slurm":
        ranks = [*srun_command(cluster, folder.run, Path.cwd()), *rank_command(cluster, folder.run, Path.cwd())]
        own = {"RANK": "$SLURM_PROCID", "LOCAL_RANK": "$SLURM_LOCALID", "WORLD_SIZE": str(cluster.world_size)}
        own |= {"LOCAL_WORLD_SIZE": str(cluster.tasks_per_node)}
    else:
        ranks = local_rank_command()
        last = cluster.world_size - 1
        own = rank_environment(0, cluster.world_size, cluster.environment)
        own |= dict.fromkeys(("RANK", "LOCAL_RANK"), f"0..{last}" if last else "0") | {SUPERVISOR: "(the launcher)"}
    own |= {"MASTER_ADDR": "(the first node's)", "MASTER_PORT": "(one that is free then)"}
    own |= {MEETING_TIMEOUT_S: f"{cluster.network.timeout_s:g}", HANG_S: f"{cluster.hang_s:g}"}
    command = [*ranks, "ATTEMPT", work.command]
    lines.append(f"# {piece.run} runs: {shlex.join(command)}")
    lines.append(f"# {piece.run}: environment of a rank: {' '.join(f'{name}={value}' for name, value in own.items())}")
    return lines


def _missing_mounts(cluster: LaunchConfig) -> list[str]:
    """Of what a container is to show; a node may have what this machine has not, so none is refused."""
    sources = [Path(mount.partition(":")[0]) for mount in cluster.container.mounts]
    return [f"# container.mounts: {source} is not there on this machine" for source in sources if not source.exists()]
