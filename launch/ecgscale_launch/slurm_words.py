"""What SLURM takes as a name, a time limit or an option, and which of its options ecgscale-launch sets itself."""

from __future__ import annotations

import re
import unicodedata

from ecgscale.errors import InputError

WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+@=-]*"
WORDS = rf"{WORD}(,{WORD})*"
FEATURES = r"[A-Za-z0-9_(\[][A-Za-z0-9_.,:=+*&|()\[\]-]*"
HOSTS = r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*"
JOB_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+@=:-]{0,127}"
MEMORY = r"[0-9]+[KMGTkmgt]?"
MODULE = r"[A-Za-z0-9_][A-Za-z0-9_.+/@:=-]*"
OPTION = r"[a-z][a-z0-9-]*"

_OF_60 = r"[0-5]?\d"
_TIME_FORMS = (
    rf"(?P<m>\d{{1,7}})(:(?P<s>{_OF_60}))?",
    rf"(?P<h>\d{{1,5}}):(?P<m>{_OF_60}):(?P<s>{_OF_60})",
    rf"(?P<d>\d{{1,4}})-(?P<h>[01]?\d|2[0-3])(:(?P<m>{_OF_60})(:(?P<s>{_OF_60}))?)?",
)
_UNIT_S = {"d": 86400, "h": 3600, "m": 60, "s": 1}

# Options of sbatch and srun that ecgscale-launch sets, by the key to use instead; "": there is none.
_OPTIONS_OF = {
    "nodes": "nodes",
    "tasks_per_node": "ntasks ntasks-per-node ntasks-per-gpu ntasks-per-core ntasks-per-socket tasks-per-node",
    "gpus_per_node": "gpus gpus-per-node gpus-per-task gpus-per-socket gpu-bind",
    "cpus_per_task": "cpus-per-task cpus-per-gpu",
    "mem": "mem mem-per-cpu mem-per-gpu",
    "time": "time",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
    "nodelist": "nodelist nodefile",
    "reservation": "reservation",
    "name": "job-name",
    "save_s": "signal",
    "retries": "requeue no-requeue kill-on-bad-exit wait",
    "environment": "export export-file",
    "network.interface": "network",
    "container": "container container-workdir",
    "container.image": "container-image",
    "container.mounts": "container-mounts",
    "": "array dependency kill-on-invalid-dep output error input open-mode chdir wrap batch parsable test-only jobid "
    "multi-prog pty version help usage",
}
_INSTEAD = {option: key for key, options in _OPTIONS_OF.items() for option in options.split()}


def minutes(time: str) -> int | None:
    """Minutes, rounded up, of a time limit in SLURM's forms; None where it is empty."""
    if not time:
        return None
    forms = (re.fullmatch(form, time, re.ASCII) for form in _TIME_FORMS)
    form = next(filter(None, forms), None)
    parts = form.groupdict() if form else {}
    seconds = sum(int(digits or 0) * _UNIT_S[unit] for unit, digits in parts.items())
    if not seconds:
        raise InputError(f"time {time!r}: give minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, 1 second or more")
    return -(-seconds // 60)


def refuse_own_option(shown: str, name: str) -> None:
    """Raises InputError for an option that ecgscale-launch sets, or for the beginning of one: SLURM takes that too."""
    own = name if name in _INSTEAD else next((option for option in _INSTEAD if option.startswith(name)), None)
    if own is not None:
        instead = f"use the key {_INSTEAD[own]}" if _INSTEAD[own] else "leave it out"
        raise InputError(f"{shown}: ecgscale-launch sets --{own} itself; {instead}")


def refuse_control_characters(key: str, text: str) -> None:
    """Raises InputError where a text holds a line break, NUL, another control character or what is no UTF-8."""
    if any(unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") for one in text):
        raise InputError(f"{key} {text!r}: holds a line break or another control character; give one line of text")
