"""Classes that ecgscale cannot take."""

from __future__ import annotations

from ecgscale.model import Encoder
from ecgscale.objectives import Objective
from toylab.amplitude import Amplitude


class NoLoss(Objective):
    """Says nothing of what is learnt."""


class NoConfig(Amplitude):
    """Has keys that are no dataclass."""

    Config = dict


class NoDefault(Encoder):
    """Leaves its keys as they are of every encoder, without defaults."""

    def features(self, batch):
        raise NotImplementedError

    def contextualise(self, token_BND, valid_BN, masked_BN=None):
        raise NotImplementedError
