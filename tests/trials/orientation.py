"""Measure the house: lines, options, density, comments, cycles of imports, long functions. Prints one table.

    .venv/bin/python tests/trials/orientation.py [--commit REV]

With --commit the same of another commit, in a worktree that is removed afterwards.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("ecgscale", "kernels/ecgscale_kernels", "launch/ecgscale_launch")
LONG = 65  # lines of a function


def sources(root: Path) -> list[Path]:
    return [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    parts = parts[1:] if parts[0] in ("kernels", "launch") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def comment_lines(path: Path) -> int:
    with path.open("rb") as file:
        return len({token.start[0] for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT})


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of ours that are imported when this one is: not those inside functions or for type checkers."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules) or ({node.module} & modules)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
    return found


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that reach each other (Tarjan's strongly connected components of more than one)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in number:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], number[other])
        if lowest[node] == number[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return groups


def room_of(module: str) -> str:
    """The folder of a module; files directly in a package are rooms of their own."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "ecgscale" else parts[0]


def options(root: Path) -> set[str]:
    """Every option and config key that any command shows."""
    environment = os.environ | {"COLUMNS": "250"}
    environment["PYTHONPATH"] = os.pathsep.join(str(root / place) for place in (".", "kernels", "launch"))

    def shown(*command: str) -> str:
        program = [sys.executable, "-m", *command, "--help"]
        return subprocess.run(program, cwd=root, env=environment, capture_output=True, text=True).stdout

    texts = [shown("ecgscale_launch.cli")]
    for command in re.findall(r"^  ([a-z-]+) ", shown("ecgscale.cli"), re.MULTILINE):
        texts.append(shown("ecgscale.cli", command))
        if command == "bench":
            parts = re.findall(r"^ {2,4}([a-z]+) ", texts[-1], re.MULTILINE)
            texts += [shown("ecgscale.cli", command, part) for part in parts]
    subcommands = ("status", "logs", "cancel", "resume", "results", "doctor", "devcluster")
    texts += [shown("ecgscale_launch.cli", name) for name in subcommands]
    return {name for text in texts for name in re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*", text)}


def measure(root: Path) -> list[tuple[str, str]]:
    paths = sources(root)
    lines = [line for path in paths for line in path.read_text().splitlines() if line.strip()]
    modules = {module_of(path, root) for path in paths}
    graph = {module_of(path, root): imports(path, modules) - {module_of(path, root)} for path in paths}
    rooms: dict[str, set[str]] = {}
    for module, others in graph.items():
        rooms.setdefault(room_of(module), set()).update(room_of(o) for o in others if room_of(o) != room_of(module))
    long = [f"{path.name}:{name} {n}" for path in paths for name, n in functions(path) if n > LONG]
    sizes = {path: sum(bool(line.strip()) for line in path.read_text().splitlines()) for path in paths}
    largest = sorted(sizes, key=lambda path: -sizes[path])[:5]
    comments = sum(comment_lines(path) for path in paths)
    tests = [line for path in (root / "tests").rglob("*.py") for line in path.read_text().splitlines() if line.strip()]
    return [
        ("non-blank source lines", f"{len(lines):,}"),
        ("files", str(len(paths))),
        ("options and config keys", str(len(options(root)))),
        ("characters per line, mean", f"{sum(map(len, lines)) / len(lines):.1f}"),
        ("lines with a comment", f"{comments / len(lines):.1%}"),
        ("cycles of modules", str(cycles(graph) or "none")),
        ("cycles of rooms", str(cycles(rooms) or "none")),
        (f"functions over {LONG} lines", ", ".join(long) or "none"),
        ("largest files", ", ".join(f"{path.name} {sizes[path]}" for path in largest)),
        ("words of the README", f"{len((root / 'README.md').read_text().split()):,}"),
        ("non-blank lines of tests", f"{len(tests):,}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", metavar="REV", help="measure this commit instead of the working tree")
    arguments = parser.parse_args()
    if arguments.commit is None:
        rows = measure(ROOT)
    else:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "tree"
            add = ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(place), arguments.commit]
            subprocess.run(add, check=True)
            try:
                rows = measure(place)
            finally:
                subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(place)], check=True)
    for name, value in rows:
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
