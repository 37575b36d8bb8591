"""How records become shards."""

from __future__ import annotations

from dataclasses import dataclass

from ecgscale.data.payload import Payload
from ecgscale.errors import InputError
from ecgscale.record import check_rate


@dataclass(frozen=True)
class IngestOptions:
    """How records become shards."""

    rate_hz: float = 500.0
    records_per_shard: int = 512
    payload: Payload = "pco"
    validation_fraction: float = 0.1  # of the patients, by hash
    test_fraction: float = 0.0  # of the patients, by hash
    split_by: str = ""  # label or metadata key that names the split instead of the hash, such as strat_fold
    validation_values: tuple[str, ...] = ()
    test_values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_rate(self.rate_hz, "rate-hz")
        if self.records_per_shard < 1:
            raise InputError(f"records-per-shard {self.records_per_shard}: give 1 or more")
        fractions = (self.validation_fraction, self.test_fraction)
        if not (min(fractions) >= 0 and sum(fractions) <= 1 + 1e-9):  # NaN is neither; 1: none is for training
            raise InputError(f"validation and test fractions {fractions}: both ≥ 0 and together at most 1")
        if both := set(self.validation_values) & set(self.test_values):
            raise InputError(f"validation-values and test-values both name {min(both)!r}; a record has one split")
        if self.split_by and self.test_fraction:
            raise InputError("test-fraction goes without split-by; --test-values names what is for testing")
        if bool(self.split_by) != bool(self.validation_values or self.test_values):
            raise InputError("split-by goes together with validation-values or test-values")


# They say nothing about a tar: an ingest that failed over them goes on with others.
SPLIT_OPTIONS = ("validation_fraction", "test_fraction", "validation_values", "test_values")
