"""The training data of the PhysioNet/CinC Challenge 2021: training/<database>/g<number>/<record>.hea and .mat.

Diagnoses, age and sex stand in the headers. No record names a patient.
"""

from __future__ import annotations

from ecgscale.data.description import Description
from ecgscale.data.sources.catalogued import About, Absent, Described, KnownWfdb, all_headers, lies_in
from ecgscale.data.sources.layout import Place
from ecgscale.data.sources.scratch import Scratch
from ecgscale.data.sources.tree import Tree

DESCRIPTION = "CinC 2021: {n} records, label Dx from the headers, metadata database from the folders; no patients known"
_DATABASES = {
    "chapman_shaoxing",
    "cpsc_2018",
    "cpsc_2018_extra",
    "georgia",
    "ningbo",
    "ptb",
    "ptb-xl",
    "st_petersburg_incart",
}


class Cinc2021(KnownWfdb):
    """Recognised by the folders of its databases."""

    title, marks = "CinC 2021", "training/<database>/g1"
    options = (*KnownWfdb.options, "--patient-key")

    @classmethod
    def is_here(cls, tree: Tree) -> bool:
        """Whether folders of the challenge's databases stand in the tree or in its folder "training"."""
        for folder in ("", "training"):
            for database in tree.children(folder) & _DATABASES:
                if "g1" in tree.children(f"{folder}/{database}" if folder else database):
                    return True
        return False

    @classmethod
    def has_part(cls, name: str) -> bool:
        """Whether recordings lie in a folder of that name."""
        return name == "training" or name in _DATABASES

    @classmethod
    def about(cls, place: Place, scratch: Scratch, absent: Absent) -> About:
        return About(_described(place.tree, place.within), DESCRIPTION, all_headers)


def _described(tree: Tree, within: str) -> Described:
    """All records of the tree, or of a folder of it."""
    for item in tree.headers():
        if not lies_in(item, within):
            continue
        database = next((folder for folder in item.split("/")[:-1] if folder in _DATABASES), None)
        yield item, Description(None, {}, {"database": database} if database else {})
