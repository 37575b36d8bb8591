"""YAML that people write, read within bounds: no repeated key, no value that contains itself, no bomb.

PyYAML alone lets the last of two equal keys win, expands nested ``<<`` merges in exponential time and ends in a
RecursionError where a text is nested deeply. So the text is looked at as events and nodes, which no alias multiplies,
before anything is made of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ecgscale.errors import InputError, file_error

_MAX_BYTES = 1 << 18  # read in two seconds
_MAX_DEPTH = 32  # a config has five levels
_MAX_VALUES = 100_000  # with every alias and merge written out


class _AsWritten(yaml.SafeLoader):
    """Scalars stay text: YAML reads ``time: 1:30:00`` as the number 5400, ``3.10`` as 3.1 and ``0123`` as 83."""


_AsWritten.yaml_implicit_resolvers = {
    first: kept
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, form) for tag, form in resolvers if tag.endswith((":null", ":merge"))])
}


def read(path: Path, as_written: bool = False) -> Any:
    """What a YAML file holds; raises InputError that names the file, and the line where there is one.

    ``as_written``: all but lists, mappings and what is left empty is text.
    """
    return read_with_lines(path, as_written)[0]


def read_with_lines(path: Path, as_written: bool = False) -> tuple[Any, dict[str, int]]:
    """The same, with the line of each dotted key."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise InputError(f"{path}: more than {_MAX_BYTES} bytes; a config is a page of keys")
        return _parse(content.decode(), str(path), as_written)
    except OSError as error:
        raise file_error(path, "cannot read", error) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not YAML: not UTF-8 at byte {error.start}") from error


def parse(text: str, place: str) -> Any:
    """What a text holds that stands at ``place``, such as ``--train.steps``."""
    return _parse(text, place)[0]


def written(tree: dict[str, Any]) -> str:
    """A tree as YAML, which ``read`` reads back to the same, with lists for tuples."""
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def _parse(text: str, place: str, as_written: bool = False) -> tuple[Any, dict[str, int]]:
    try:
        _check_depth(text, place)
        loader = _AsWritten(text) if as_written else yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, {}
            _check_nodes(node, place)
            lines = dict(_lines(node, ""))
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise InputError(f"{place}: not YAML: {' '.join(str(error).split())}") from error
    except InputError:
        raise
    except ValueError as error:  # a number with thousands of digits, a date that does not exist
        raise InputError(f"{place}: not YAML: {str(error).partition(';')[0]}") from error


def _check_depth(text: str, place: str) -> None:
    """By events, since nodes are made by recursion."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            line = _line(event)
            raise InputError(f"{place}: line {line}: nested more than {_MAX_DEPTH} levels deep; a config has five")


def _check_nodes(root: yaml.Node, place: str) -> None:
    """Refuse repeated keys, nodes that contain themselves, and more values than a config has."""
    n_values: dict[int, int | None] = {}  # by node, itself included; None: it is being counted

    def count(node: yaml.Node) -> int:
        known = n_values.get(id(node), 0)
        if known is None:
            raise InputError(f"{place}: line {_line(node)}: a value that contains itself; write it out")
        if known:
            return known
        n_values[id(node)] = None
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, place)
        n = 1 + sum(count(child) for child in _children(node))
        if n > _MAX_VALUES:
            raise InputError(f"{place}: line {_line(node)}: more than {_MAX_VALUES} values, with aliases written out")
        n_values[id(node)] = n
        return n

    count(root)


def _check_keys(node: yaml.MappingNode, place: str) -> None:
    first: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = (key.tag, key.value), _line(key)
        if name in first:
            raise InputError(f"{place}: line {line}: {key.value!r} stands there twice, first on line {first[name]}")
        first[name] = line


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _lines(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    """Dotted keys with the lines that they stand on."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield f"{prefix}{key.value}", _line(key)
                yield from _lines(value, f"{prefix}{key.value}.")


def _line(place: yaml.Node | yaml.Event) -> int:
    assert place.start_mark is not None  # only what is made by hand has none
    return place.start_mark.line + 1
