"""Patient identification: ArcFace over the training persons, then recordings of unseen persons by cosine similarity.

Sources: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019 (arXiv 1801.07698);
the protocol is that of Oh et al., CHIL 2022 (arXiv 2203.06889).
Shape suffixes: B rows, C training persons, D width; R recordings, P persons compared, Q probes, T distinct genuine
similarities, V operating points, K bootstrap resamples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.downstream.metrics import interval
from ecgscale.downstream.report import Estimate, json_ready
from ecgscale.errors import InputError
from ecgscale.model import Encoder
from ecgscale.model.base import mean_over_time

Array = npt.ArrayLike
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_DECIMALS = 10  # of a similarity: what differs only in the rounding of its sum is a tie
_CANCELLED = 1e-12  # of a sum of unit vectors: the direction of one that is shorter is rounding error
_CHUNK = 1 << 22  # similarities that are held at once, 32 MB
_YEAR_FIRST = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})(?:[T ].*)?", re.ASCII)
_DAY_FIRST = re.compile(r"(\d{1,2})\.(\d{1,2})\.(\d{4})(?: .*)?", re.ASCII)
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)


# -- training --------------------------------------------------------------------------------------------------------


class ArcFaceHead(nn.Module):
    """One direction per training person; the loss sees angles alone.

    A module of its own, since ZeRO stage 3 gathers a parameter when the forward of its owner runs.
    """

    def __init__(self, persons: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(persons, width))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embedding_BD: Tensor) -> Tensor:
        """(B, D) -> (B, C) cosines, in float32: the scale multiplies their rounding errors by a hundred and more."""
        return F.linear(F.normalize(embedding_BD.float()), F.normalize(self.weight.float()))


def arcface_loss(cosine_BC: Tensor, class_B: Tensor, scale: float, margin: float) -> Tensor:
    """Mean cross-entropy over the rows of scaled cosines, each row's own class harder by an angle.

    The own class counts as cos(θ + m). Where θ > π − m that would rise again with θ; there cos θ − m·sin m, which
    keeps falling, takes its place.

    Args:
        cosine_BC: cosines of the angles θ between the rows and the classes.
        class_B: each row's own class.
        scale: factor s on all cosines.
        margin: angle m in radians, 0 ≤ m < π.
    """
    own_B1 = cosine_BC.gather(1, class_B[:, None])
    # Below one unit in the last place the sine is rounding error, and its gradient would divide by zero.
    sine_B1 = (1 - own_B1.square()).clamp(min=torch.finfo(cosine_BC.dtype).eps).sqrt()
    turned_B1 = own_B1 * math.cos(margin) - sine_B1 * math.sin(margin)
    beyond_B1 = own_B1 - margin * math.sin(margin)
    harder_B1 = torch.where(own_B1 > -math.cos(margin), turned_B1, beyond_B1)  # cos(π − m) = −cos m
    return F.cross_entropy(scale * cosine_BC.scatter(1, class_B[:, None], harder_B1), class_B)


class Identification(nn.Module):
    """Encoder, mean over time, ArcFace over the training persons."""

    person_C: Tensor

    def __init__(self, encoder: Encoder, persons: Array | Tensor, scale: float, margin: float) -> None:
        """``persons``: the patient codes of the training recordings, sorted and each once; their places are classes."""
        super().__init__()
        self.encoder, self.scale, self.margin = encoder, scale, margin
        person_C = torch.as_tensor(np.asarray(persons, np.int64))
        assert (person_C.diff() > 0).all()
        if len(person_C) < 2:
            raise InputError(f"{len(person_C)} patients for training; to tell patients apart takes 2 or more")
        self.register_buffer("person_C", person_C, persistent=False)
        self.arcface = ArcFaceHead(len(person_C), encoder.config.width)
        for module in encoder.unused_unmasked():  # fine-tuning masks nothing in time
            module.requires_grad_(False)

    def forward(self, batch: ECGBatch, step: int = 0, share: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean ArcFace loss over the rows, and how many are nearest to their own person, without the margin.

        Raises InputError for a row of a person that is none of the training persons.
        """
        class_B = self._classes(batch.patient_B)
        cosine_BC = self.arcface(mean_over_time(*self.encoder(batch)))
        loss = arcface_loss(cosine_BC, class_B, self.scale, self.margin)
        accuracy = (cosine_BC.detach().argmax(dim=1) == class_B).float().mean()
        return loss, {"loss": loss.detach(), "accuracy": accuracy}

    def _classes(self, patient_B: Tensor) -> Tensor:
        """(B,) places among the training persons."""
        class_B = torch.searchsorted(self.person_C, patient_B).clamp(max=len(self.person_C) - 1)
        known_B = self.person_C[class_B] == patient_B
        if not known_B.all():  # a sync point, while the device has nothing to do yet
            raise InputError(
                f"patient {int(patient_B[~known_B][0])} is none of the {len(self.person_C)} training patients; "
                "ArcFace knows these alone, recordings of others are compared by `identify`"
            )
        return class_B


# -- evaluation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IdentificationReport:
    """How well persons are told apart whom the model has not seen."""

    top1: Estimate  # share of the probes whose own person's gallery is the most similar one
    top5: Estimate  # or among the five most similar ones
    eer: Estimate  # equal error rate, see ``identify``
    persons: int  # of whom there are recordings
    galleries: int  # persons who are compared: those with at least two sessions
    sessions: int  # of the persons who are compared
    probes: int
    left_out: dict[str, int]  # recordings by reason: one_session of their person, or not_the_last where that is asked
    resamples: int
    level: float
    samples: dict[str, Floats] = field(repr=False, compare=False)  # (resamples,) of each headline figure

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; a figure that is not defined is None."""
        return json_ready(self)

    @property
    def headline(self) -> dict[str, Estimate]:
        """The figures that methods are compared by."""
        return {"top1": self.top1, "top5": self.top5, "eer": self.eer}

    def scalars(self) -> dict[str, float]:
        """Name -> figure, as TensorBoard takes them; what is not defined is left out."""
        return {name: one.value for name, one in self.headline.items() if not math.isnan(one.value)}

    def table(self) -> str:
        """Markdown: the figures, and on how many comparisons they stand."""
        lines = ["| persons | probes | top-1 | top-5 | equal error rate |", "|---:|---:|---|---|---|"]
        lines += [f"| {self.galleries} | {self.probes} | {self.top1} | {self.top5} | {self.eer} |", ""]
        single = self.persons - self.galleries
        left_out = f"; {single} persons with one session are left out" if single else ""
        return "\n".join([*lines, f"{self.sessions} sessions of {self.galleries} persons{left_out}."])


def identify(
    embedding_RD: Array,
    person_R: Array,
    session_R: Array | None = None,
    one_probe: bool = False,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> IdentificationReport:
    """Compare later recordings of persons with everyone's first session, by the cosine of their embeddings.

    Persons with a single session are left out, as in Oh et al. 2022: they have no probe, and as mere distractors they
    would make figures depend on who else is in the set. A gallery is the mean direction of a person's recordings of
    the first session. Each recording of a later session is a probe and is compared with all galleries.

    *Top-k accuracy* is the share of the probes to which fewer than k other galleries are as similar as the own one, or
    more: a tie counts against us. With at most k persons, top-k is 1.
    *Equal error rate*: over all pairs of a probe and a gallery, FAR(t) is the share of the impostor pairs with a
    similarity ≥ t and FRR(t) the share of the genuine pairs below t. t falls from above all similarities to below all;
    the points (FAR, FRR) of every t are joined by straight lines, and the rate is where the path meets FAR = FRR.
    *Intervals* are percentile bootstrap intervals over persons, who are drawn with all their probes, against the same
    galleries. Which are drawn depends on the seed and the number of compared persons alone, so that what two models
    make of the same recordings is resampled alike.

    Args:
        embedding_RD: of the recordings, each person's in the order of time within a session.
        person_R: whose they are.
        session_R: values that sort as time runs, such as ``session_day`` gives; None: each recording is a session of
            its own, in the order given.
        one_probe: the paper's protocol: one probe per person, the last recording of the last session.

    Raises InputError for embeddings that are not finite, for lengths or settings that do not fit, and where fewer than
    two persons have two sessions.
    """
    if resamples < 1:
        raise InputError(f"{resamples} resamples: at least 1 is needed")
    unit_RD = _checked_units(embedding_RD)
    recordings = len(unit_RD)
    codes = person_R, np.arange(recordings) if session_R is None else session_R
    if any(np.shape(one) != (recordings,) for one in codes):
        raise InputError(f"{recordings} embeddings, persons {np.shape(codes[0])}, sessions {np.shape(codes[1])}")
    person, session = (np.unique(np.asarray(one), return_inverse=True)[1].astype(np.int64) for one in codes)
    chosen = _gallery_and_probes(unit_RD, person, session, one_probe)
    persons = len(chosen.gallery_PD)
    drawn_KP = np.random.default_rng(seed).multinomial(persons, np.full(persons, 1 / persons), resamples)
    # The first column counts everybody once and gives the figures themselves.
    count_PK = np.vstack([np.ones((1, persons)), drawn_KP]).T
    value_3K = _figures(chosen, count_PK[chosen.person_Q])
    names = ("top1", "top5", "eer")
    low_3, high_3 = interval(value_3K[:, 1:], level)
    estimates = map(Estimate, value_3K[:, 0].tolist(), low_3.tolist(), high_3.tolist())
    return IdentificationReport(
        **dict(zip(names, estimates, strict=True)),
        persons=int(person.max()) + 1,
        galleries=persons,
        sessions=chosen.sessions,
        probes=len(chosen.probe_QD),
        left_out=chosen.left_out,
        resamples=resamples,
        level=level,
        samples=dict(zip(names, value_3K[:, 1:], strict=True)),
    )


def session_day(text: str) -> int:
    """A number that rises with time, out of what a data set says of a session.

    Takes ``2005-03-15`` and ``15.03.2005``, each with or without a time of day behind it, which is ignored: sessions of
    one day are one. Takes whole numbers, such as those of visits, as they are. Raises InputError for anything else:
    15/03/05 could be two days.
    """
    if _NUMBER.fullmatch(text.strip()):
        return int(text)
    year_first, day_first = _YEAR_FIRST.fullmatch(text.strip()), _DAY_FIRST.fullmatch(text.strip())
    parts = year_first.groups() if year_first else day_first.groups()[::-1] if day_first else None
    try:
        if parts:
            return date(*map(int, parts)).toordinal()
    except ValueError:
        pass
    raise InputError(f"session {text!r}: give a date as 2005-03-15 or 15.03.2005, or a whole number")


def session_days(texts: Iterable[str], datasets: Iterable[str]) -> list[int]:
    """``session_day`` of each text, of recordings of these data sets.

    Raises InputError where one data set writes its sessions in two notations: numbers of visits do not sort among days,
    and whoever mixes 2005-03-15 and 15.03.2005 may mean the month first in some.
    """
    first_text: dict[str, dict[str, str]] = {}
    days = []
    for text, dataset in zip(texts, datasets, strict=True):
        days.append(session_day(text))
        notations = first_text.setdefault(dataset, {})
        notations.setdefault(_notation(text.strip()), text)
        if len(notations) > 1:
            one, other = notations.values()
            raise InputError(
                f"sessions of {dataset!r} are written as {one!r} and as {other!r}; write all in one way, best as "
                "2005-03-15"
            )
    return days


def _notation(text: str) -> str:
    return "number" if _NUMBER.fullmatch(text) else "year first" if _YEAR_FIRST.fullmatch(text) else "day first"


class _Comparison(NamedTuple):
    gallery_PD: Floats  # of length 1
    probe_QD: Floats  # of length 1
    person_Q: Ints  # places of the probes' persons among the galleries
    sessions: int
    left_out: dict[str, int]


def _checked_units(embedding_RD: Array) -> Floats:
    embedding = np.asarray(embedding_RD, np.float64)
    if embedding.ndim != 2 or not embedding.size:
        raise InputError(f"embeddings of shape {embedding.shape}: give (recordings, width), not empty")
    wrong_R = ~np.isfinite(embedding).all(axis=1)
    if wrong_R.any():
        raise InputError(f"the embedding of recording {int(np.argmax(wrong_R))} is not finite; is the model trained?")
    return _units(embedding)


def _units(x_RD: Floats) -> Floats:
    """Rows of length 1; a row of zeros, which has no direction, stays."""
    smallest = np.finfo(np.float64).tiny
    x_RD = x_RD / np.maximum(np.abs(x_RD).max(axis=1, keepdims=True), smallest)  # squares neither over- nor underflow
    unit_RD: Floats = x_RD / np.maximum(np.linalg.norm(x_RD, axis=1, keepdims=True), smallest)
    return unit_RD


def _gallery_and_probes(unit_RD: Floats, person_R: Ints, session_R: Ints, one_probe: bool) -> _Comparison:
    """Galleries and probes of the persons with at least two sessions, by their codes from 0 on."""
    recordings, persons = len(unit_RD), int(person_R.max()) + 1
    first, last = np.full(persons, recordings), np.full(persons, -1)
    np.minimum.at(first, person_R, session_R)
    np.maximum.at(last, person_R, session_R)
    compared = last > first
    if compared.sum() < 2:
        raise InputError(
            f"{int(compared.sum())} of {persons} persons have two sessions; identification needs 2 persons or more"
        )
    in_gallery_R = compared[person_R] & (session_R == first[person_R])
    is_probe_R = session_R > first[person_R]
    if one_probe:
        at_last = np.zeros(persons, np.int64)
        np.maximum.at(at_last, person_R, np.where(session_R == last[person_R], np.arange(recordings), 0))
        is_probe_R &= np.arange(recordings) == at_last[person_R]
    place = np.cumsum(compared) - 1
    gallery_PD = np.zeros((int(compared.sum()), unit_RD.shape[1]))
    np.add.at(gallery_PD, place[person_R[in_gallery_R]], unit_RD[in_gallery_R])
    gallery_PD[np.abs(gallery_PD).max(axis=1) < _CANCELLED] = 0
    sessions = np.unique(np.stack([person_R, session_R])[:, compared[person_R]], axis=1).shape[1]
    left_out = {"one_session": int((~compared[person_R]).sum())}
    if one_probe:
        left_out["not_the_last"] = int((compared[person_R] & ~in_gallery_R & ~is_probe_R).sum())
    return _Comparison(_units(gallery_PD), unit_RD[is_probe_R], place[person_R[is_probe_R]], sessions, left_out)


def _figures(chosen: _Comparison, count_QK: Floats) -> Floats:
    """(3, K) top-1, top-5 and equal error rate where each probe counts as often as ``count_QK`` says."""
    gallery_PD, probe_QD, person_Q, *_ = chosen
    genuine_Q = np.round(np.einsum("QD,QD->Q", probe_QD, gallery_PD[person_Q]), _DECIMALS)
    similarity_T = np.unique(genuine_Q)
    better_Q = np.zeros(len(probe_QD))
    above_TK, at_least_TK = np.zeros((2, len(similarity_T), count_QK.shape[1]))
    for rows, impostor_qP in _impostors(chosen):
        better_Q[rows] = (impostor_qP >= genuine_Q[rows, None]).sum(axis=1)
        persons, ordered_qP = len(gallery_PD), np.sort(impostor_qP, axis=1)
        for total_TK, side in ((above_TK, "right"), (at_least_TK, "left")):
            below = [np.searchsorted(ordered_P, similarity_T, side) for ordered_P in ordered_qP]  # type: ignore[call-overload]
            total_TK += (persons - np.stack(below, axis=1)).astype(np.float64) @ count_QK[rows]
    drawn_K = count_QK.sum(axis=0)
    top_2K = [(better_Q < k).astype(np.float64) @ count_QK / drawn_K for k in (1, 5)]
    rejected_TK = _rejected(genuine_Q, similarity_T, count_QK) / drawn_K
    false_TK2 = np.stack([above_TK, at_least_TK], axis=2) / (drawn_K * (len(gallery_PD) - 1))[:, None]
    missed_TK2 = np.stack([rejected_TK, np.vstack([np.zeros_like(drawn_K), rejected_TK[:-1]])], axis=2)
    return np.vstack([*top_2K, _crossing(_path(false_TK2), _path(missed_TK2))])


def _impostors(chosen: _Comparison) -> Iterator[tuple[slice, Floats]]:
    """Some probes at a time and their similarities to all galleries; the own one is below all that are possible."""
    at_once = max(1, _CHUNK // len(chosen.gallery_PD))
    for first in range(0, len(chosen.probe_QD), at_once):
        rows = slice(first, first + at_once)
        similarity_qP = np.round(chosen.probe_QD[rows] @ chosen.gallery_PD.T, _DECIMALS)
        similarity_qP[np.arange(len(similarity_qP)), chosen.person_Q[rows]] = -2.0
        yield rows, similarity_qP


def _rejected(genuine_Q: Floats, similarity_T: Floats, count_QK: Floats) -> Floats:
    """(T, K) genuine pairs with at most that similarity."""
    order_Q = np.argsort(genuine_Q)
    starts_T = np.searchsorted(genuine_Q[order_Q], similarity_T)
    rejected_TK: Floats = np.add.reduceat(count_QK[order_Q], starts_T, axis=0).cumsum(axis=0)
    return rejected_TK


def _path(rate_TK2: Floats) -> Floats:
    """(2T, K): the rate just above each genuine similarity and at it, from the highest similarity down.

    Between two of these nothing is genuine, so FRR stands still: the path has no other corners that matter.
    """
    return rate_TK2[::-1].transpose(0, 2, 1).reshape(-1, rate_TK2.shape[1])


def _crossing(false_VK: Floats, missed_VK: Floats) -> Floats:
    """(K,) where the path from (FAR, FRR) = (0, 1) to (1, 0) meets FAR = FRR."""
    gap_VK = missed_VK - false_VK  # falls along the path, to 0 or below
    column_K = np.arange(gap_VK.shape[1])
    at_K = np.argmax(gap_VK <= 0, axis=0)
    before_K = np.maximum(at_K - 1, 0)  # none where everything false is accepted before anything genuine
    gap_before_K, false_before_K = gap_VK[before_K, column_K], false_VK[before_K, column_K]
    step_K = gap_before_K - gap_VK[at_K, column_K]
    share_K = np.divide(gap_before_K, step_K, out=np.zeros_like(step_K), where=step_K > 0)
    rate_K: Floats = false_before_K + share_K * (false_VK[at_K, column_K] - false_before_K)
    return rate_K
