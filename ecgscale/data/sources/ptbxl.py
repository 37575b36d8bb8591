"""PTB-XL (Wagner et al., Scientific Data 2020): ptbxl_database.csv, scp_statements.csv, records500/, records100/.

A record's codes come with a likelihood in percent, which is 0 where the report did not say one and for all statements
of form and rhythm. As in the data set's own example and in the benchmark of Strodthoff et al. (2021), a code counts as
soon as it is listed. The classes are those of scp_statements.csv; they are given for statements with diagnostic = 1.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ecgscale.data.cells import Cells
from ecgscale.data.description import Description
from ecgscale.data.matching import RecordIds
from ecgscale.data.sources.catalogued import About, Absent, Described, KnownWfdb, Presence, lies_in, not_named
from ecgscale.data.sources.layout import Place
from ecgscale.data.sources.listing import header_names
from ecgscale.data.sources.scratch import Scratch
from ecgscale.data.sources.tables import Table, unreadable_row, whole_number
from ecgscale.data.sources.tree import Tree
from ecgscale.errors import InputError

DATABASE, STATEMENTS = "ptbxl_database.csv", "scp_statements.csv"
DESCRIPTION = (
    "PTB-XL: {n} records, labels scp, superclass, subclass, form and rhythm from ptbxl_database.csv; "
    "its folds: --split-by strat_fold --validation-values 9 --test-values 10"
)
_COLUMNS = ("patient_id", "age", "sex", "scp_codes", "strat_fold")
_STATEMENT_COLUMNS = ("diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass")
_FOLDERS = {"filename_hr": "records500", "filename_lr": "records100"}
_SEX = {"0": "male", "1": "female"}
_OLDEST = 89  # the data set writes 300 for whoever is older


def _ecg_id(item: str) -> str:
    """``1`` for records500/00000/00001_hr."""
    named = re.search(r"(?:^|/)(\d+)_[hl]r$", item, re.ASCII)
    return str(int(named[1])) if named else ""


class PtbXl(KnownWfdb):
    """Recognised by its table."""

    title, marks = "PTB-XL", DATABASE
    record_ids = RecordIds("ecg_id", _ecg_id)

    @classmethod
    def is_here(cls, tree: Tree) -> bool:
        """By the name of its table."""
        return DATABASE in tree.children("")

    @classmethod
    def has_part(cls, name: str) -> bool:
        """Whether its recordings lie in a folder of that name."""
        return name in _FOLDERS.values()

    @classmethod
    def why_not(cls, tree: Tree, forced: bool) -> list[str]:
        """A line on records whose table is not there.

        Raises InputError where each recording would be read twice, unless it is ``forced`` to read them as they are.
        """
        headers = header_names(tree.contents())
        first = next(headers, "")
        if not _rate_of(first):
            return []
        rates = {_rate_of(first)} | {_rate_of(name) for name in headers}
        lost = f"no {DATABASE} with it, so its labels and patients"
        if forced:
            twice = "both rates of PTB-XL are read, each recording twice and as two persons"
            twice += "; give one of records500, records100"
            return [twice] if {"hr", "lr"} <= rates else []
        if {"hr", "lr"} <= rates:
            raise InputError(
                f"{tree.where}: looks like PTB-XL at both rates (such as {first}), with {lost} would be lost and "
                "each recording be read twice; give the folder that holds the table, one rate alone, or --layout wfdb"
            )
        return [f"it looks like a part of PTB-XL, with {lost} are unknown: give the folder that holds the table"]

    @classmethod
    def about(cls, place: Place, scratch: Scratch, absent: Absent) -> About:
        described = _described(place.tree, place.within, absent)
        return About(described, DESCRIPTION, partial(left_out, within=place.within))


def _described(tree: Tree, within: str, absent: Absent) -> Described:
    """The records that are there, of the 500 Hz folder or, where that is absent, of the 100 Hz one.

    ``within``: only those of that folder. Raises InputError for tables that are not PTB-XL's.
    """
    statements = _statements(tree)
    is_low = within.startswith(_FOLDERS["filename_lr"]) or not tree.children(_FOLDERS["filename_hr"])
    path_column = "filename_lr" if is_low else "filename_hr"
    shown = str(tree.where / DATABASE)
    there = Presence(tree)
    with tree.table(DATABASE) as stream:
        table = Table(stream, shown, (*_COLUMNS, path_column))
        at = table.columns
        for row in table:
            item = Cells().text(row[at[path_column]], path_column)
            if item is None:
                yield unreadable_row(table, f"{path_column} is {row[at[path_column]]!r}; it must name the record")
            elif not lies_in(item, within):
                continue
            elif f"{item}.hea" not in there:
                absent.add(item)
            else:
                said = _description({name: row[at[name]] for name in _COLUMNS}, statements, table.where())
                yield item, replace(said, place=table.place())


def left_out(tree: Tree, within: str) -> list[str]:
    """A line on records, or those of a folder, that the table does not name."""
    with tree.table(DATABASE) as stream:
        table = Table(stream, str(tree.where / DATABASE), ())
        at = [table.columns[name] for name in _FOLDERS if name in table.columns]
        named = {row[i].strip() for row in table for i in at}
    return not_named(tree, within, DATABASE, named)


def _description(row: Mapping[str, str], statements: Mapping[str, Mapping[str, str]], where: str) -> Description:
    """What a row says; a cell that cannot be read is its record's fault, not the table's."""
    cells = Cells()
    try:
        codes = _codes(row["scp_codes"])
        labels = {"scp": codes}
        for code in codes:
            if code not in statements:
                cells.notes[f"scp code {code!r} that {STATEMENTS} does not know, so of no superclass or the like"] += 1
            for label, value in statements.get(code, {}).items():
                if value not in labels.setdefault(label, []):
                    labels[label].append(value)
        fold = cells.text(row["strat_fold"], "strat_fold")
        labels["strat_fold"] = [] if fold is None else [str(whole_number(fold, "strat_fold"))]
        metadata = {}
        if (age_text := cells.text(row["age"], "age")) is not None:
            age = whole_number(age_text, "age")
            metadata["age"] = str(age) if age <= _OLDEST else f">{_OLDEST}"
        if (sex := cells.text(row["sex"], "sex")) is not None:
            metadata["sex"] = _SEX.get(sex, sex)
        patient = cells.identifier(row["patient_id"], "patient_id")
    except InputError as error:
        return Description(None, {}, {}, fault=f"{where}: {error}")
    # A record without a statement of a kind says nothing of it, as in the benchmark.
    known = {label: values for label, values in labels.items() if values}
    return Description(patient, known, metadata, dict(cells.notes))


def _codes(text: str) -> list[str]:
    """``"{'NORM': 100.0, 'SR': 0.0}"`` -> ["NORM", "SR"]."""
    try:
        codes = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise InputError(f"scp_codes {text[:60]!r} are no codes with likelihoods") from error
    if not isinstance(codes, dict) or not all(isinstance(code, str) for code in codes):
        raise InputError(f"scp_codes {text[:60]!r} are no codes with likelihoods")
    return list(codes)


def _statements(tree: Tree) -> dict[str, dict[str, str]]:
    """Code -> label -> what the code adds to it."""
    statements = {}
    with tree.table(STATEMENTS) as stream:
        table = Table(stream, str(tree.where / STATEMENTS), _STATEMENT_COLUMNS)
        at = table.columns
        for row in table:
            code, is_a = (
                row[0].strip(),
                {name: Cells().flag(row[at[name]], name) is True for name in _STATEMENT_COLUMNS[:3]},
            )
            labels = {name: code for name in ("form", "rhythm") if is_a[name]}
            if is_a["diagnostic"]:
                labels["superclass"] = row[at["diagnostic_class"]].strip()
                labels["subclass"] = row[at["diagnostic_subclass"]].strip()
            if code in statements:
                raise InputError(f"{table.where()}: the code {code!r} stands twice; each may have one row")
            statements[code] = {label: value for label, value in labels.items() if value}
    return statements


def _rate_of(header: str) -> str:
    """``hr`` or ``lr`` for a name such as records500/00000/00001_hr, else "" ."""
    match = re.search(r"(?:^|/)\d{5}_(hr|lr)$", header)
    return match[1] if match else ""
