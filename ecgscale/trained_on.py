"""Which recordings a model has learnt from, so that whoever scores it can tell: ``trained_on.keys`` beside its weights.

Eight bytes for each, a hash of its samples, leads and scale (``content_keys``): the same folder, ingested anew with
other splits, has the same ones. Ids of patients are left out: short ones could be guessed from their hashes, while a
hash of samples tells nothing to whoever has not got the recording. So other recordings of one person are not found.
Nor is a recording that is stored with other leads: where these differ, it is said that it is not known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ecgscale.data.copies import content_keys
from ecgscale.data.selection import Selection
from ecgscale.data.shard_set import ShardSet, lead_positions
from ecgscale.data.shards import columns_sha256
from ecgscale.errors import InputError, naming_file
from ecgscale.export import read_about, trained_on_file
from ecgscale.files import parse_json, seal_holds, sealed, write_whole
from ecgscale.lead_names import LEADS, lead_set_name
from ecgscale.run_folder import TRAINED_ON, newest_checkpoint
from ecgscale.training.ranks import Ranks, first_rank

Keys = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

PRETRAINING, FINE_TUNING = "pretraining", "fine-tuning"
_USUAL = 0.1  # share of the recordings
_CHUNK = 1 << 18  # recordings whose keys are made at once
_ABOUT = "about"  # key of the file's metadata


@dataclass(frozen=True)
class Seen:
    """How many of some scored recordings a model has learnt from."""

    scored: int
    seen: int
    of_stage: Mapping[str, int]
    """The same by stage; a recording may be of several."""
    unknown: str = ""
    """Why there may be more; "": there are not."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"scored": self.scored, "seen": self.seen, **self.of_stage, "unknown": self.unknown or None}

    def text(self) -> str:
        """For people, in one line."""
        if not self.seen:
            if self.unknown:
                return f"whether the model was trained on any of them is not known: {self.unknown}"
            return "the model was trained on none of them"
        stages = " and ".join(f"{count} in {stage}" for stage, count in self.of_stage.items() if count)
        more = f"; of others it is not known: {self.unknown}" if self.unknown else ""
        return f"the model was trained on {self.seen} of them ({stages}), so that the figures flatter it{more}"


@dataclass(frozen=True)
class TrainedOn:
    """The recordings that a model has learnt from."""

    keys: Mapping[str, Keys] = field(default_factory=dict)
    """By stage, sorted."""
    payloads: frozenset[str] = frozenset()
    """How they were stored, on which the keys depend."""
    leads: frozenset[int] = frozenset()
    """Bits of the lead sets that a tenth of them or more have, on which the keys depend likewise."""
    complete: bool = True
    """False: a model that it began with does not say what it was trained on."""

    @staticmethod
    def of_model(path: Path) -> TrainedOn:
        """Of an export or a run. Raises InputError where what it says is damaged."""
        place, _ = read_about(path)
        return TrainedOn.read(trained_on_file(place))

    @staticmethod
    def read(path: Path) -> TrainedOn:
        """Nothing, and incomplete, where there is no such file. Raises InputError for a damaged one."""
        if not path.is_file():
            return TrainedOn(complete=False)
        try:
            with naming_file(path, "cannot read"), safe_open(path, "np") as file:
                about = parse_json((file.metadata() or {}).get(_ABOUT, "").encode())
                keys = {stage: file.get_tensor(stage) for stage in file.keys()}  # noqa: SIM118, it is no dict
            if not seal_holds(about) or about["keys_sha256"] != columns_sha256(keys):
                raise ValueError("its sha256 is another")
            leads = frozenset(about.get("leads", []))  # which earlier versions did not write
            return TrainedOn(keys, frozenset(about["payloads"]), leads, about["complete"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error}); copy or export the model again, or remove it") from error

    def write(self, path: Path) -> None:
        """Complete or absent."""
        about = {"payloads": sorted(self.payloads), "leads": sorted(self.leads), "complete": self.complete}
        about["keys_sha256"] = columns_sha256(self.keys)
        write_whole(path, save(dict(self.keys), {_ABOUT: json.dumps(sealed(about))}))

    def plus(self, stage: str, selection: Selection) -> TrainedOn:
        """Those, and the recordings of a selection."""
        keys = np.union1d(self.keys.get(stage, np.zeros(0, np.uint64)), _keys(selection.shards, selection.numbers))
        payloads = _payloads(selection.shards, selection.numbers)
        leads = _usual_leads(selection)
        return TrainedOn({**self.keys, stage: keys}, self.payloads | payloads, self.leads | leads, self.complete)

    def among(self, selection: Selection) -> Seen:
        """How many recordings of a selection are among them."""
        key_R = _keys(selection.shards, selection.numbers)
        seen_by_stage = {stage: np.isin(key_R, keys) for stage, keys in sorted(self.keys.items())}
        seen_R = np.logical_or.reduce([np.zeros(len(key_R), bool), *seen_by_stage.values()])
        counts = {stage: int(np.count_nonzero(seen)) for stage, seen in seen_by_stage.items()}
        return Seen(len(key_R), int(np.count_nonzero(seen_R)), counts, self._unknown(selection))

    def _unknown(self, selection: Selection) -> str:
        if not self.complete:
            return "an earlier version wrote it, or another system trained it"
        payloads = self.payloads | _payloads(selection.shards, selection.numbers)
        if len(payloads) > 1:
            return f"recordings are stored as {' and '.join(sorted(payloads))}"
        leads = self.leads | _usual_leads(selection)
        if self.leads and len(leads) > 1:
            names = " and ".join(sorted(lead_set_name([LEADS[i] for i in lead_positions(bits)]) for bits in leads))
            return f"recordings are stored with unequal leads ({names})"
        return ""


def keep_trained_on(run: Path, begun_with: str, stage: str, selection: Selection, ranks: Ranks) -> None:
    """Write into a run folder what its model will have learnt from; ``begun_with``: a model that it begins with, or "".

    A run that goes on keeps what it wrote: it goes on with the same data alone. All ranks call it together.
    """

    def keep() -> None:
        path, goes_on = run / TRAINED_ON, newest_checkpoint(run) is not None
        if goes_on and path.is_file():
            return
        before = TrainedOn()
        if begun_with:  # which may be gone by now where the run goes on
            before = TrainedOn(complete=False) if goes_on else TrainedOn.of_model(Path(begun_with))
        before.plus(stage, selection).write(path)

    first_rank(ranks, keep)


def _keys(shards: ShardSet, number_R: Int64) -> Keys:
    chunks = [number_R[first : first + _CHUNK] for first in range(0, len(number_R), _CHUNK)]
    names = ("checksum", "samples", "leads", "scale")
    keys = [content_keys({name: shards.take(name, chunk) for name in names}) for chunk in chunks]
    return np.concatenate([np.zeros(0, np.uint64), *keys])


def _usual_leads(selection: Selection) -> frozenset[int]:
    """Bits of the lead sets that a tenth of the recordings or more have; fewer lack a lead that was flat."""
    bits, counts = np.unique(selection.shards.take("leads", selection.numbers), return_counts=True)
    return frozenset(bits[counts >= _USUAL * len(selection)].tolist())


def _payloads(shards: ShardSet, number_R: Int64) -> frozenset[str]:
    used_S = np.unique(shards.shard_of(number_R)).tolist()
    return frozenset(shards.shards[shard].payload for shard in used_S)
