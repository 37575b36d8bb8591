"""How many recordings of a split were asked for, how many are used, and why the others are not.

Nothing leaves a split without being counted here: each recording is either used or left out for one reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

REASONS = {
    "no_label": "without the label",
    "no_session": "without a session",
    "not_drawn": "of patients whose labels are not used (task.label_fraction)",
    "no_class": "with none of the classes",
    "several_classes": "with two or more of the classes",
    "no_lead": "with none of the leads",
    "too_short": "too short",
    "one_session": "of persons with one session",
    "not_the_last": "that are not their person's last (task.one_probe)",
}
"""Why a recording is left out: the first of these that holds, in this order."""

_ALWAYS_TOLD = ("no_label", "no_class", "several_classes", "too_short")  # that it is none is worth knowing
_SHOWN_CLASSES = 8


@dataclass(frozen=True)
class Coverage:
    """The recordings of one split: ``asked_for`` = ``used`` + all of ``left_out``."""

    split: str
    asked_for: int  # recordings of the split
    used: int  # for training in the training split of a fine-tuning, otherwise scored
    left_out: Mapping[str, int]  # recordings by REASONS that could hold here, zeros too
    shortest_s: float  # shorter recordings are left out
    usual_s: float = 0.0  # data.min_record_s of the training, in seconds
    below_usual: int = 0  # used recordings that are shorter than that; what a window lacks is padded
    leads: int = 0  # how many are kept
    fewer_leads: int = 0  # used recordings that lack some of them
    negative: int | None = None  # used recordings with none of the classes; None where each has one
    other_classes: Mapping[str, int] = field(default_factory=dict)  # recordings with a class that is not the task's

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"left_out": dict(self.left_out), "other_classes": dict(self.other_classes)}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Coverage:
        """What ``to_dict`` gave."""
        return Coverage(**fields)

    def leaving_out(self, more: Mapping[str, int]) -> Coverage:
        """The same where so many of the used recordings are left out too, by their reasons."""
        fields = self.to_dict() | {"used": self.used - sum(more.values()), "left_out": {**self.left_out, **more}}
        return Coverage(**fields)

    def text(self, what: str = "scored") -> str:
        """For people, in one line."""
        reasons = []
        for reason, count in self.left_out.items():
            if not count and reason not in _ALWAYS_TOLD:
                continue
            why = f"shorter than {self.shortest_s:g} s" if reason == "too_short" else REASONS[reason]
            reasons.append(f"{count} {why}")
        text = f"{self.split}: {self.used} of {self.asked_for} recordings {what}; left out: {', '.join(reasons)}"
        notes = []
        if self.below_usual:
            notes.append(f"{self.below_usual} shorter than {self.usual_s:g} s (data.min_record_s), padded")
        if self.fewer_leads:
            notes.append(f"{self.fewer_leads} with fewer than the {self.leads} leads")
        if self.negative:
            notes.append(f"{self.negative} with none of the classes, as negatives")
        text += f"; of the {what}: {', '.join(notes)}" if notes else ""
        if self.other_classes:
            ranked = sorted(self.other_classes.items(), key=lambda item: (-item[1], item[0]))
            named = [f"{name} ({count})" for name, count in ranked[:_SHOWN_CLASSES]]
            more = len(ranked) - len(named)
            text += f"; classes that are not the task's: {', '.join(named)}" + (f" and {more} more" if more else "")
        return text
