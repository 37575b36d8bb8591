"""Classes that ecgscale cannot take."""

from __future__ import annotations

from ecgscale.data.sources.layout import FileSource
from ecgscale.downstream.task import Task
from ecgscale.model import Encoder
from ecgscale.objectives import Objective
from toylab.amplitude import Amplitude


class NoLoss(Objective):
    """Says nothing of what is learnt."""


class NoConfig(Amplitude):
    """Has keys that are no dataclass."""

    Config = dict


class ThreeSegments(Amplitude):
    """Reads more segments than random numbers are kept apart for."""

    segments = 3


class NoDefault(Encoder):
    """Leaves its keys as they are of every encoder, without defaults."""

    def features(self, batch):
        raise NotImplementedError

    def contextualise(self, token_BND, valid_BN, masked_BN=None):
        raise NotImplementedError


class NoScore(Task):
    """Says neither what is learnt nor how a model does."""

    def label(self, shards, splits=(), seed=0, trained=None):
        raise NotImplementedError


class NoRead(FileSource):
    """Says neither how it is opened nor how a recording is read."""

    def items(self):
        raise NotImplementedError
