"""Does a cluster's YAML say what the user meant, and can no text in it run as a command?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgscale.config import dump
from ecgscale.errors import InputError
from ecgscale.settings import Given, from_words
from ecgscale_launch.batch import login_environment, script_lines
from ecgscale_launch.commands import host_python, rank_command, rank_python, srun_command
from ecgscale_launch.job_record import job_name
from ecgscale_launch.launch_config import ContainerConfig, LaunchConfig, NetworkConfig, load_cluster
from ecgscale_launch.slurm_words import minutes

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "cluster").glob("*.yaml"))
HOSTILE = ["a'b", 'a"b', "$(touch pwned)", "`touch pwned`", "; touch pwned", "a\\", "${HOME}", "& | > pwned", "!x", " "]


@pytest.fixture
def write(tmp_path):
    def file(text: str) -> Path:
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return path

    return file


def refusal(path: Path | None, overrides: list[str]) -> str:
    with pytest.raises(InputError) as refused:
        load_cluster(path, from_words(LaunchConfig, overrides))
    assert "\n" not in str(refused.value)
    return str(refused.value)


# -- reading ---------------------------------------------------------------------------------------------------------


def test_a_supervisor_does_not_wait_for_slow_imports() -> None:
    code = "import ecgscale_launch.places, sys; print(*{'torch', 'ecgscale.config', 'jsonargparse'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_nothing_given_is_one_process_here():
    assert load_cluster(None, Given()) == LaunchConfig()


def test_text_is_what_was_written(write):
    path = write(
        "nodes: 2\nmem: 0\ntime: 1:30:00\naccount: 0123\nmodules: [cuda/12.4, 3.10]\n"
        "environment: {THREADS: 4, DEBUG: yes, WHEN: 10:00, EMPTY: ''}\nsbatch: {nice: 100}\nnetwork: {timeout_s: 60}\n"
    )
    config = load_cluster(path, Given())
    assert (config.nodes, config.mem, config.time, config.account) == (2, "0", "1:30:00", "0123")
    assert config.modules == ["cuda/12.4", "3.10"]
    assert config.environment == {"THREADS": "4", "DEBUG": "yes", "WHEN": "10:00", "EMPTY": ""}
    assert (config.sbatch, config.network.timeout_s) == ({"nice": "100"}, 60)


def test_later_values_win_and_entries_add_up(write):
    path = write("nodes: 2\nenvironment: {A: one, B: two}\n")
    given = [
        "--nodes",
        "3",
        "--environment.B=x=y",
        "--environment.C",
        "{z: 1}",
        "--sbatch.mail-type=END",
        "--time=2:00",
    ]
    config = load_cluster(path, from_words(LaunchConfig, given))
    assert (config.nodes, config.time) == (3, "2:00")
    assert config.environment == {"A": "one", "B": "x=y", "C": "{z: 1}"}
    assert config.sbatch == {"mail-type": "END"}


@settings(max_examples=20)
@given(st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))))
def test_any_one_line_survives_override_and_round_trip(tmp_path_factory, value):
    config = load_cluster(None, from_words(LaunchConfig, [f"--environment.A={value}"]))
    assert config.environment == {"A": value}
    path = tmp_path_factory.mktemp("dump") / "cluster.yaml"
    path.write_text(dump(config))
    assert load_cluster(path, Given()) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_that_comes_along_loads_and_survives_a_round_trip(write, path):
    config = load_cluster(path, Given())
    assert set(yaml.safe_load(path.read_text())) <= set(vars(config))
    assert load_cluster(write(dump(config)), Given()) == config
    lines = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith(("# ", "  # "))]
    offered = [line for line in lines if line.partition(":")[0] in vars(config) and line.partition(":")[2]]
    for line in offered:  # what is commented out must be right too
        load_cluster(write(line), Given())


def test_there_are_files_to_start_from():
    assert {path.stem for path in CONFIGS} >= {"laptop", "devcluster", "slurm_8gpu", "slurm_preemptible"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node: 2", "line 1: unknown key node; did you mean nodes?"),
        ("interface: ib0", "line 1: unknown key interface; did you mean network.interface?"),
        ("container: {img: x}", "line 1: unknown key container.img; did you mean container.image?"),
        ("nodes: 0", "line 1: nodes 0: give 1 or more"),
        ("nodes: two", "line 1: nodes 'two': give a whole number (int)"),
        ("nodes: [2]", "line 1: nodes \"['2']\": give a whole number (int)"),
        ("nodes:", "line 1: nodes: a value is missing; give one or leave the key out"),
        ("container:", "line 1: container: a value is missing; give one or leave the key out"),
        ("container: pyxis", "line 1: container: a group of keys, not the value 'pyxis'"),
        ("modules: cuda", "line 1: modules 'cuda': give a list of text"),
        ("setup: |\n  a\n  b\n", "line 1: setup 'a\\nb\\n': give a list of text"),
        ("setup: [[a]]", "line 1: setup \"[['a']]\": give a list of text"),
        ("environment: [A]", "line 1: environment \"['A']\": give names, each with text"),
        ("environment: {A: {B: c}}", "line 1: environment \"{'A': {'B': 'c'}}\": give names, each with text"),
        ("environment: &a {A: *a}", "line 1: a value that contains itself; write it out"),
        ("- nodes", "a config is a mapping of keys, this is list"),
        (
            "nodes: 1\ngpus_per_node: 2",
            "line 2: tasks_per_node 1: differs from gpus_per_node 2; give the same number, one process drives one GPU",
        ),
        ("container:\n  kind: pyxis", "line 2: container.image is missing; container.kind pyxis needs one"),
        ("shared_folder: no", "line 1: shared_folder 'no': give one of 'checked', 'trusted'"),
    ],
)
def test_slips_in_the_file_name_the_file(write, text, said):
    path = write(text)
    for overrides in ([], ["--retries", "4"]):
        assert refusal(path, overrides).replace(f"{path}, line", f"{path}: line") == f"{path}: {said}"


def test_slips_on_the_command_line_do_not_name_the_file(write):
    path = write("nodes: 2")
    assert refusal(path, ["--nodes", "0"]) == "nodes 0: give 1 or more"
    assert refusal(path, ["--nodse", "3"]) == "unknown key nodse; did you mean nodes?"
    assert refusal(path, ["--environment.A"]) == "--environment.A: a value is missing; give --environment.A VALUE"
    assert refusal(path, ["--environment.A", "--nodes"]).startswith("--environment.A: a value is missing")


def test_keys_that_stand_twice_are_refused(write):
    path = write("nodes: 2\ntime: 5\nnodes: 3\n")
    assert refusal(path, []) == f"{path}: line 3: 'nodes' stands there twice, first on line 1"


def test_a_file_may_be_completed_on_the_command_line(write):
    config = load_cluster(
        write("container: {kind: apptainer}"), from_words(LaunchConfig, ["--container.image", "ecg.sif"])
    )
    assert config.container == ContainerConfig("apptainer", "ecg.sif")


def test_an_absent_file_is_named(tmp_path):
    assert refusal(tmp_path / "none.yaml", []).startswith(f"{tmp_path / 'none.yaml'}: cannot read: No such file")


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("", None), ("5", 5), ("10:30", 11), ("90:00", 90), ("1:30:00", 90), ("100:00:00", 6000), ("00:00:30", 1),
        ("1-2", 1560), ("1-2:03", 1563), ("1-02:03:04", 1564), ("0-1", 60),
    ],
)  # fmt: skip
def test_time_limits(time, expected):
    assert minutes(time) == expected


@pytest.mark.parametrize(
    "time",
    [
        "0",
        "x",
        "1h",
        "1-24",
        "1:60",
        "1:60:00",
        "-5",
        "1:2:3:4",
        "1-",
        "5 ",
        "1-2-3",
        "²",
        "5\n",
        "0:0",
        "1.5",
        "9" * 5000,
    ],
)
def test_times_that_slurm_does_not_know_are_refused(time):
    with pytest.raises(InputError, match=r"time .*: give minutes"):
        minutes(time)


@given(st.integers(0, 9), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_all_forms_of_a_time_agree(days, hours, minute, second):
    if days + hours + minute + second:
        expected = -(-(((days * 24 + hours) * 60 + minute) * 60 + second) // 60)
        assert minutes(f"{days}-{hours}:{minute}:{second}") == expected
        assert minutes(f"{days * 24 + hours}:{minute:02}:{second:02}") == expected
        assert minutes(f"{(days * 24 + hours) * 60 + minute}:{second:02}") == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partition", "gpu,gpu-long"),
        ("account", "heart.lab"),
        ("constraint", "[rack1*2&rack2*4]"),
        ("constraint", "(a100|h100)&ib"),
        ("exclude", "n[1-4,7],node-a.b"),
        ("mem", "64G"),
        ("name", "ptb-xl:leads=12"),
    ],
)
def test_names_of_slurm_are_taken(key, value):
    assert getattr(replace(LaunchConfig(), **{key: value}), key) == value


NAMES = ["partition", "account", "qos", "constraint", "exclude", "nodelist", "reservation", "name", "mem", "time"]


@pytest.mark.parametrize("key", NAMES)
@pytest.mark.parametrize(
    "value", [*(value for value in HOSTILE if value != " "), "a b", "a\nb", "a\0", "--wrap=x", "ü"]
)
def test_names_with_other_characters_are_refused(key, value):
    with pytest.raises(InputError) as refused:
        replace(LaunchConfig(), **{key: value})
    assert str(refused.value).startswith(f"{key} {value!r}: give ")


@pytest.mark.parametrize("bad", ["a\nb", "a\0b", "a\rb", "\x1b[2J", "a\u2028b", "\udc80", "\x7f"])
@pytest.mark.parametrize(
    ("key", "made"),
    [
        ("environment.A", lambda bad: LaunchConfig(environment={"A": bad})),
        ("sbatch.comment", lambda bad: LaunchConfig(sbatch={"comment": bad})),
        ("srun", lambda bad: LaunchConfig(srun=[f"--mpi={bad}"])),
        ("setup", lambda bad: LaunchConfig(setup=[bad])),
        ("modules", lambda bad: LaunchConfig(modules=[bad])),
        ("environment", lambda bad: LaunchConfig(environment={bad: "x"})),
        ("sbatch", lambda bad: LaunchConfig(sbatch={bad: "x"})),
        ("python", lambda bad: LaunchConfig(python=bad)),
        ("container.image", lambda bad: ContainerConfig("pyxis", bad)),
        ("container.mounts", lambda bad: ContainerConfig("pyxis", "image", [f"/{bad}:/x"])),
        ("network.interface", lambda bad: NetworkConfig(bad)),
    ],
)
def test_control_characters_are_refused_everywhere(key, made, bad):
    with pytest.raises(InputError) as refused:
        made(bad)
    said = str(refused.value)
    assert said.startswith(f"{key} ")
    assert repr(bad)[1:-1] in said
    assert said.isprintable()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: LaunchConfig(tasks_per_node=0), "tasks_per_node 0: give 1 or more"),
        (lambda: LaunchConfig(gpus_per_node=-1), "gpus_per_node -1: give 0 or more"),
        (lambda: LaunchConfig(retries=-1), "retries -1: give 0 or more"),
        (lambda: LaunchConfig(hang_s=-1), "hang_s -1: give 0 or more"),
        (lambda: LaunchConfig(save_s=0), "save_s 0: give 1 to 65535"),
        (lambda: LaunchConfig(time="1"), "save_s 90: not within time 1; give less, or more time"),
        (lambda: LaunchConfig(gpus_per_node=8), "tasks_per_node 1: differs from gpus_per_node 8"),
        (lambda: LaunchConfig(environment={"RANK": "0"}), "environment.RANK: ecgscale-launch sets it for each rank"),
        (lambda: LaunchConfig(environment={"UID": "0"}), "environment.UID: cannot be set"),
        (lambda: LaunchConfig(environment={"A-B": "0"}), "environment 'A-B': give a name of letters"),
        (lambda: LaunchConfig(sbatch={"mail_type": "END"}), "sbatch 'mail_type': give an option's long name"),
        (lambda: LaunchConfig(sbatch={"comment": "it's"}), 'sbatch.comment "it\'s": sbatch cannot take quotes'),
        (lambda: LaunchConfig(srun=["true"]), "srun 'true': give --option=value"),
        (lambda: LaunchConfig(srun=["-n4"]), "srun '-n4': give --option=value"),
        (lambda: LaunchConfig(srun=["--ntasks=4"]), "srun '--ntasks=4': ecgscale-launch sets --ntasks itself"),
        (lambda: ContainerConfig("pyxis"), "container.image is missing; container.kind pyxis needs one"),
        (lambda: ContainerConfig(image="a.sif"), "container.image 'a.sif': give container.kind too"),
        (lambda: ContainerConfig("apptainer", "--help"), "container.image '--help': give a path"),
        (lambda: ContainerConfig("pyxis", "a", ["/a:/b,/c:/d"]), "container.mounts '/a:/b,/c:/d': give SOURCE:TARGET"),
        (lambda: NetworkConfig(timeout_s=0), "network.timeout_s 0: give 1 or more"),
    ],
)
def test_values_out_of_range_are_named(made, said):
    with pytest.raises(InputError) as refused:
        made()
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("nodes", "use the key nodes"),
        ("signal", "use the key save_s"),
        ("requeue", "use the key retries"),
        ("no-requeue", "use the key retries"),
        ("job-name", "use the key name"),
        ("export", "use the key environment"),
        ("mem-per-cpu", "use the key mem"),
        ("output", "leave it out"),
        ("error", "leave it out"),
        ("array", "leave it out"),
        ("dependency", "leave it out"),
        ("open-mode", "leave it out"),
        ("wrap", "leave it out"),
        ("chdir", "leave it out"),
        ("sig", "use the key save_s"),  # SLURM takes the beginning of a name for the name
        ("outp", "leave it out"),
    ],
)
def test_own_options_of_sbatch_are_refused_with_the_key_to_use(option, instead):
    with pytest.raises(InputError) as refused:
        LaunchConfig(sbatch={option: "x"})
    assert str(refused.value).startswith(f"sbatch.{option}: ecgscale-launch sets --")
    assert str(refused.value).endswith(instead)


@pytest.mark.parametrize(
    "option", ["mail-type", "comment", "nice", "gres", "licenses", "exclusive", "time-min", "begin"]
)
def test_other_options_of_sbatch_are_taken(option):
    assert LaunchConfig(sbatch={option: "x $(y)"}).sbatch == {option: "x $(y)"}


# -- shell -----------------------------------------------------------------------------------------------------------


def run_lines(config: LaunchConfig, folder: Path) -> dict[str, str]:
    """The environment after the lines, by a real bash in an empty folder, where nothing may be left."""
    script = "\n".join([*script_lines(config), f"exec {shutil.which('env')} -0"])
    done = subprocess.run(["bash", "-c", script], cwd=folder, env={"PATH": os.environ["PATH"]}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert not list(folder.iterdir()), "a value was executed"
    return dict(entry.split("=", 1) for entry in done.stdout.decode().split("\0") if entry)


variable_names = st.from_regex(r"E_[A-Za-z0-9_]{0,8}", fullmatch=True)
one_line = st.one_of(
    st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))),
    st.lists(st.sampled_from([*HOSTILE, "'", '"', "$", "(", ")", "x", "\\", "#", "~", "*"])).map("".join),
)


@given(st.dictionaries(variable_names, one_line, max_size=4))
def test_environment_reaches_the_job_as_it_is_and_is_never_executed(tmp_path_factory, environment):
    found = run_lines(LaunchConfig(environment=environment), tmp_path_factory.mktemp("empty"))
    assert environment.items() <= found.items()


@given(one_line)
def test_modules_are_quoted_or_refused(tmp_path_factory, module):
    folder = tmp_path_factory.mktemp("empty")
    try:
        config = LaunchConfig(modules=[module])
    except InputError:
        return
    stand_in = "module() { LOADED=$2; export LOADED; }"
    script = "\n".join([stand_in, *script_lines(config), 'printf %s "$LOADED"'])
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == module
    assert not list(folder.iterdir())


def test_a_module_that_cannot_be_loaded_ends_the_script():
    script = ["module() { return 1; }", *script_lines(LaunchConfig(modules=["cuda"])), "echo reached"]
    done = subprocess.run(["bash", "-c", "\n".join(script)], capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")


def test_interfaces_then_environment_then_the_users_lines(tmp_path):
    network = NetworkConfig(interface="ib0")
    config = LaunchConfig(network=network, environment={"A": "1 2"}, setup=['export B="$A $(echo 3)"'])
    found = run_lines(config, tmp_path)
    assert found["NCCL_SOCKET_IFNAME"] == found["GLOO_SOCKET_IFNAME"] == "ib0"
    assert found["B"] == "1 2 3"
    found = run_lines(replace(config, environment={"A": "", "GLOO_SOCKET_IFNAME": "eth0"}), tmp_path)
    assert (found["NCCL_SOCKET_IFNAME"], found["GLOO_SOCKET_IFNAME"]) == ("ib0", "eth0")


def test_nothing_asked_for_is_no_line():
    assert script_lines(LaunchConfig()) == []


def test_a_job_launched_from_a_job_gets_nothing_of_it_but_what_the_site_says(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_CONF", "SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_QOS", "RANK", "MINE"):
        monkeypatch.setenv(name, "x")
    kept = login_environment(LaunchConfig(qos="long"))
    assert {name for name in kept if name.startswith(("SLURM", "SBATCH"))} == {"SLURM_CONF", "SBATCH_ACCOUNT"}
    assert "RANK" not in kept
    assert kept["MINE"] == "x"


# -- containers and names --------------------------------------------------------------------------------------------

WORK, RUN = Path("/home/me/work dir"), Path("/scratch/run $(x)")


def in_container(config: LaunchConfig, run: Path = RUN) -> tuple[list[str], list[str]]:
    """What a container adds to the options of srun and to the command of a rank."""
    bare = replace(config, container=ContainerConfig())
    srun, rank = (make(config, run, WORK) for make in (srun_command, rank_command))
    added = [option for option in srun if option not in srun_command(bare, run, WORK)]
    assert rank[-4:] == [rank_python(config), "-u", "-m", "ecgscale_launch.rank"]
    return added, rank[len(rank_command(bare, run, WORK)) - 4 : -4]


def test_apptainer_goes_before_python():
    config = LaunchConfig(container=ContainerConfig("apptainer", "ecg.sif", ["/data:/data:ro"]))
    binds = ["--bind", f"{WORK}:{WORK}", "--bind", f"{RUN}:{RUN}", "--bind", "/data:/data:ro"]
    assert in_container(config) == ([], ["apptainer", "exec", *binds, "--pwd", str(WORK), "ecg.sif"])
    assert "--nv" in in_container(replace(config, gpus_per_node=1))[1]


def test_pyxis_is_an_option_of_srun():
    config = LaunchConfig(container=ContainerConfig("pyxis", "nvcr.io#nvidia/pytorch:25.06-py3", ["/data:/data"]))
    options = [
        "--container-image=nvcr.io#nvidia/pytorch:25.06-py3",
        f"--container-mounts={WORK}:{WORK},{RUN}:{RUN},/data:/data",
        f"--container-workdir={WORK}",
    ]
    assert in_container(config) == (options, [])


@pytest.mark.parametrize("folder", ["/a,b", "/a:b"])
def test_folders_that_cannot_be_mounted_are_named(folder):
    for kind in ("apptainer", "pyxis"):
        with pytest.raises(InputError, match=folder):
            in_container(LaunchConfig(container=ContainerConfig(kind, "ecg.sif")), Path(folder))


def test_pythons():
    container = ContainerConfig("apptainer", "ecg.sif")
    assert host_python(LaunchConfig()) == rank_python(LaunchConfig()) == sys.executable
    assert host_python(LaunchConfig(python="/p")) == rank_python(LaunchConfig(python="/p")) == "/p"
    assert host_python(LaunchConfig(container=container, python="/p")) == sys.executable
    assert rank_python(LaunchConfig(container=container, python="/p")) == "/p"
    assert rank_python(LaunchConfig(container=container)) == "python3"


@given(st.text(st.characters(exclude_characters="/"), min_size=1))
def test_any_run_folder_gives_a_job_name(folder):
    name = job_name("pretrain", Path("runs") / folder)
    assert LaunchConfig(name=name).name == name
