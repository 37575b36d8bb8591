"""Do dependencies run one way, and does each heavy one have one owner?"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from trials.orientation import cycles, imports, module_of, room_of, sources

ROOT = Path(__file__).parents[1]
PACKAGES = {name: ROOT / folder for name, folder in (
    ("ecgscale", "ecgscale"),
    ("ecgscale_kernels", "kernels/ecgscale_kernels"),
    ("ecgscale_launch", "launch/ecgscale_launch"),
)}  # fmt: skip
# launch -> ecgscale -> kernels
MAY_NOT_IMPORT = {
    "ecgscale_kernels": {"ecgscale", "ecgscale_launch"},
    "ecgscale": {"ecgscale_launch"},
    "ecgscale_launch": set(),
}
OWNERS = {
    "deepspeed": "ecgscale/training/engine.py",
    "h5py": "ecgscale/data/sources/code15.py",
    "wfdb": "ecgscale/data/sources/wfdb_source.py",
    "onnx": "ecgscale/interop/onnx_model.py",
    "onnxruntime": "ecgscale/interop/onnx_model.py",
    "webdataset": "ecgscale/bench/webdataset_readers.py",
}
# Rooms from the lowest to the highest floor: none may reach one above it, in whatever way it imports it.
FLOORS = (
    ("settings", "registry"),
    ("data",),
    ("model",),
    ("objectives",),
    ("training",),
    ("export", "inference"),
    ("choices",),
    ("config",),
    ("run",),
    ("studies",),
    ("pretrain",),
    ("downstream", "scaling", "plan", "bench"),
    ("commands",),
    ("cli",),
)
UNPICKLES = ROOT / "ecgscale/interop/fairseq.py"  # with weights_only, which runs nothing
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def modules(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of everything that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the package"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            names |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    return names


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def test_the_reading_of_imports(tmp_path):
    file = tmp_path / "m.py"
    file.write_text("import a.b as c, d\ndef f():\n    from e.g import h\nimportlib.import_module('i.j')\n")
    assert imported(file) == {"a.b", "d", "e.g.h", "i.j"}
    assert top_level(file) == {"a", "d", "e", "i"}


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_run_one_way(package):
    paths = modules(package)
    assert paths
    wrong = {str(path): top_level(path) & MAY_NOT_IMPORT[package] for path in paths}
    assert not {path: names for path, names in wrong.items() if names}


def arrows_between_rooms(root: Path) -> dict[str, set[str]]:
    """Room -> the rooms that are imported with it."""
    files = {module_of(path, root): path for path in sources(root)}
    arrows: dict[str, set[str]] = {}
    for module, path in files.items():
        others = {room_of(other) for other in imports(path, set(files))}
        arrows.setdefault(room_of(module), set()).update(others - {room_of(module)})
    return arrows


def test_no_rooms_import_each_other_in_a_circle():
    arrows = arrows_between_rooms(ROOT)
    assert {"ecgscale.training", "ecgscale.config"} <= arrows["ecgscale.downstream"]
    assert cycles(arrows) == []


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_no_arrow_runs_back_up(floor):
    """Not even late, inside a function: what a room does must not hang on one above it."""
    rooms = {f"ecgscale.{name}" for name in FLOORS[floor]}
    above = {f"ecgscale.{name}" for names in FLOORS[floor + 1 :] for name in names}
    paths = [path for path in sources(ROOT) if room_of(module_of(path, ROOT)) in rooms]
    assert {room_of(module_of(path, ROOT)) for path in paths} == rooms
    upward = {str(path): {room_of(name) for name in imported(path)} & above for path in paths}
    assert not {path: names for path, names in upward.items() if names}


@pytest.mark.parametrize("dependency", OWNERS)
def test_a_heavy_dependency_has_one_owner(dependency):
    users = [path for package in PACKAGES for path in modules(package) if dependency in top_level(path)]
    assert users == [ROOT / OWNERS[dependency]]


def test_nothing_that_can_execute_is_ever_loaded():
    for path in (path for package in PACKAGES for path in modules(package)):
        assert not top_level(path) & UNSAFE, path
        assert not imported(path) & {"torch.load", "torch.jit.load", "numpy.load", "numpy.lib.npyio"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "torch.load" and path == UNPICKLES:
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert given["weights_only"] == "True"
                    continue
                assert called not in (
                    "torch.load",
                    "torch.jit.load",
                    "yaml.load",
                    "yaml.unsafe_load",
                    "eval",
                    "exec",
                ), path
                allowed = [keyword.value for keyword in node.keywords if keyword.arg == "allow_pickle"]
                assert all(ast.unparse(value) == "False" for value in allowed), path
                assert called != "np.load" or allowed, path


def test_no_generic_name_lands_in_site_packages():
    for folder in ("kernels", "launch"):
        assert not (ROOT / folder / "__init__.py").exists()
