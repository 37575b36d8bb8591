"""The stream: windows from the right place, the same global batches on any number of ranks and after a stop.

Shape suffixes: B rows, L the twelve leads, T samples, P positions, N records, C classes.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ecgscale.data import stream as stream_module
from ecgscale.data.order import Order
from ecgscale.data.selection import DataConfig, Selection, evaluation_batches
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.stream import TrainStream
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS

T = 250  # 2.5 s at 100 Hz
CONFIG = DataConfig(segment_s=2.5, min_record_s=3)


@pytest.fixture(scope="module")
def records(make_record) -> list:
    """Longer than two segments, exactly two, less than two (odd ones too), and of all sorts of leads."""
    samples = [777, 500, 501, 499, 498, 401, 300, 1000, 733, 517, 449, 502]
    leads = [
        LEADS,
        LEADS,
        ["I"],
        LEADS[6:],
        ["II", "V5"],
        LEADS,
        ["aVR", "V1", "V6"],
        LEADS,
        LEADS,
        LEADS,
        ["V3"],
        LEADS,
    ]
    return [make_record(f"r{i:02d}", *shape) for i, shape in enumerate(zip(samples, leads, strict=True))]


@pytest.fixture(scope="module")
def odd(ingest_records, records, tmp_path_factory) -> ShardSet:
    out = tmp_path_factory.mktemp("odd") / "set"
    return ShardSet.open(ingest_records(out, records, validation_fraction=0, records_per_shard=5))


@pytest.fixture(autouse=True)
def short_plans(monkeypatch) -> None:
    """Many begin within a test, and none is for more positions than a test reads."""
    monkeypatch.setattr(stream_module, "_PLANNED", 64)


@pytest.fixture
def selection(odd) -> Selection:
    return Selection(odd, CONFIG, "train")


@pytest.fixture
def train(simulated) -> Selection:
    return Selection(ShardSet.open(simulated), DataConfig(segment_s=2.5, min_record_s=5), "train")


def all_of(selection: Selection, segments: int, seed: int = 0, first: int = 0, **options):
    position_P = np.arange(first, first + len(selection))
    return selection.batch(selection.numbers, position_P, segments, seed, **options)


def start_of(window_LT: np.ndarray, signal_LT: np.ndarray) -> int:
    """Where a window of noise was cut."""
    windows = np.lib.stride_tricks.sliding_window_view(signal_LT, window_LT.shape[1], axis=1)
    (starts,) = np.flatnonzero((windows == window_LT[:, None]).all(axis=(0, 2)))[None]
    assert len(starts) == 1
    return int(starts[0])


def value(batch) -> np.ndarray:
    return (batch.gain_BL[..., None] * (batch.signal_BLT - batch.offset_BL[..., None])).numpy()


def assert_equal(one, other) -> None:
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


# --- windows ---


@pytest.mark.parametrize("first", [0, 10**12])
def test_segments_of_a_pair_are_adjacent_pieces_of_the_record(selection, records, first) -> None:
    batch = all_of(selection, 2, first=first)
    assert batch.rows == 2 * len(records)
    assert batch.segment_B.tolist() == [0] * 12 + [1] * 12
    assert batch.position_B.tolist() == [*range(first, first + 12)] * 2
    for p, record in enumerate(records):
        at = [LEADS.index(lead) for lead in record.leads]
        length = min(T, record.n_samples // 2)
        assert batch.length_B[[p, 12 + p]].tolist() == [length, length]
        one_LT, two_LT = (batch.signal_BLT[row, at, :length].numpy() for row in (p, 12 + p))
        start = start_of(one_LT, record.signal_LT)
        assert 0 <= start <= record.n_samples - 2 * length
        np.testing.assert_array_equal(two_LT, record.signal_LT[:, start + length : start + 2 * length])
        mv_LT = record.millivolts()[:, start : start + length]
        np.testing.assert_allclose(value(batch)[p, at, :length], mv_LT, rtol=1e-6)


def test_what_lies_behind_a_short_record_is_zero(selection, records) -> None:
    batch = all_of(selection, 2)
    assert batch.padded
    for row, length in enumerate(batch.length_B.tolist()):
        assert not value(batch)[row, :, length:].any()
    long = [i for i, record in enumerate(records) if record.n_samples >= 2 * T]
    assert not selection.batch(np.array(long), np.arange(len(long)), 2, 0).padded
    assert all_of(selection, 1).length_B.min() == T  # a single segment fits into all of them


def test_missing_leads_have_gain_zero(selection, records) -> None:
    batch = all_of(selection, 2)
    for p, record in enumerate(records):
        there = torch.tensor([lead in record.leads for lead in LEADS])
        for row in (p, 12 + p):
            assert torch.equal(batch.gain_BL[row] != 0, there)
            assert not batch.signal_BLT[row, ~there].any()
    assert batch.signal_BLT.dtype == torch.int16
    assert batch.gain_BL.dtype == batch.offset_BL.dtype == torch.float32


@pytest.mark.parametrize("normalisation", ["mv", "zscore"])
def test_other_leads_than_the_chosen_ones_are_masked(odd, normalisation) -> None:
    config = replace(CONFIG, normalisation=normalisation)
    whole = all_of(Selection(odd, config, "train"), 2)
    chosen = all_of(Selection(odd, replace(config, leads=["V5", "I"]), "train"), 2)
    kept = torch.tensor([lead in ("I", "V5") for lead in LEADS])
    assert chosen.gain_BL[:, kept].any()
    assert torch.equal(chosen.gain_BL, torch.where(kept, whole.gain_BL, 0))
    assert_equal(replace(chosen, gain_BL=whole.gain_BL), whole)
    assert_equal(all_of(Selection(odd, replace(config, leads=["12"]), "train"), 2), whole)


def test_every_start_is_drawn_and_depends_on_seed_and_position_alone(selection, records) -> None:
    chosen = np.array([9] * 400)  # 517 samples, so 18 starts
    batch = selection.batch(chosen, np.arange(400), 2, seed=5)
    starts = [start_of(row[:, :20].numpy(), records[9].signal_LT) for row in batch.signal_BLT[:400]]
    assert set(starts) == set(range(18))
    alone = selection.batch(chosen[:1], np.array([321]), 2, seed=5)
    assert torch.equal(alone.signal_BLT[0], batch.signal_BLT[321])
    assert not torch.equal(selection.batch(chosen, np.arange(400), 2, seed=6).signal_BLT, batch.signal_BLT)


def test_zscore_brings_each_lead_to_mean_0_and_deviation_1(make_record, ingest_records, tmp_path) -> None:
    """Over the whole recording, so a window of all of it shows it."""
    flat = make_record("flat", 500)
    flat.signal_LT[3] = 77
    flat.signal_LT[4] = flat.signal_LT[4] // 4 + 20_000
    shards = ShardSet.open(ingest_records(tmp_path / "flat", [flat], validation_fraction=0))
    config = DataConfig(segment_s=5, min_record_s=1, normalisation="zscore")
    batch = Selection(shards, config, "train").batch(np.array([0]), np.array([0]), 1, 0)
    z_LT = value(batch)[0]
    others = [lead for lead in range(12) if lead != 3]
    np.testing.assert_allclose(z_LT[others].mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(z_LT[others].std(axis=1), 1, rtol=1e-5)
    assert batch.gain_BL[0, 3] == 0


def test_zscore_pads_with_the_mean(make_record, ingest_records, tmp_path) -> None:
    short = make_record("short", 400)
    short.signal_LT[:] = short.signal_LT // 4 + 20_000
    shards = ShardSet.open(ingest_records(tmp_path / "set", [short], validation_fraction=0))
    config = DataConfig(segment_s=5, min_record_s=1, normalisation="zscore")
    batch = Selection(shards, config, "train").batch(np.array([0]), np.array([0]), 1, 0)
    assert batch.length_B.tolist() == [400]
    assert np.abs(value(batch)[0, :, 400:]).max() < 1e-3  # half a count


def test_targets_travel_with_their_rows(train) -> None:
    target_NC = np.stack([np.arange(len(train.shards)), np.arange(len(train.shards)) % 3], axis=1).astype(np.float32)
    batch = all_of(train, 2, target=target_NC)
    patient_N = train.shards.column("patient")
    assert torch.equal(batch.target_BC[:, 0].long(), torch.from_numpy(np.tile(train.numbers.astype(np.int64), 2)))
    assert batch.patient_B.tolist() == patient_N[batch.target_BC[:, 0].long().numpy()].tolist()
    assert all_of(train, 2).target_BC is None


# --- which records ---


def test_short_recordings_are_left_out_and_counted(odd, records) -> None:
    for min_s in (3.0, 4.49, 5.0, 5.01, 7.33):
        selection = Selection(odd, DataConfig(min_record_s=min_s), "train")
        long = [i for i, record in enumerate(records) if record.n_samples >= round(min_s * 100)]
        assert selection.numbers.tolist() == long
        assert len(selection) == sum(selection.counts) == len(long)
        assert selection.too_short == 12 - len(long)


@pytest.mark.parametrize("samples", [107, 119, 120, 213, 500])
def test_a_recording_of_exactly_the_least_length_stays(make_record, ingest_records, tmp_path, samples) -> None:
    records = [make_record("just", samples), make_record("under", samples - 1)]
    shards = ShardSet.open(ingest_records(tmp_path / "set", records, validation_fraction=0))
    assert Selection(shards, DataConfig(min_record_s=samples / 100), "train").numbers.tolist() == [0]


def test_a_selection_holds_one_split_and_what_is_kept(simulated) -> None:
    shards = ShardSet.open(simulated)
    split_N = shards.column("split")
    numbers = [Selection(shards, CONFIG, split).numbers for split in ("train", "validation", "test")]
    assert sorted(np.concatenate(numbers).tolist()) == list(range(40))
    assert [set(split_N[chosen]) for chosen in numbers if len(chosen)] == [
        {c} for c in range(3) if (split_N == c).any()
    ]
    keep = np.arange(40) % 3 == 0
    kept = Selection(shards, CONFIG, "train", keep)
    assert kept.numbers.tolist() == [n for n in numbers[0] if n % 3 == 0]
    assert kept.counts == tuple(np.bincount(shards.shard_of(kept.numbers), minlength=len(shards.shards)))


@pytest.mark.parametrize("recordings", [1, 5, 8, 9, 20])
def test_some_recordings_come_from_few_shards(train, recordings) -> None:
    some = train.some(recordings, seed=1)
    assert len(some) == recordings
    assert set(some.numbers) <= set(train.numbers)
    fewest = np.searchsorted(np.cumsum(sorted(train.counts, reverse=True)), recordings) + 1
    assert fewest <= np.count_nonzero(some.counts) <= fewest + 1
    assert len({tuple(train.some(recordings, seed).numbers) for seed in range(20)}) > 1
    assert train.some(0, 1) is train.some(1000, 1) is train


@pytest.mark.parametrize(
    ("field", "wrong"), [("segment_s", 0.0), ("segment_s", -5.0), ("min_record_s", 0.0), ("shuffle_window", 0)]
)
def test_wrong_values_are_named(field, wrong) -> None:
    with pytest.raises(InputError, match=rf"data\.{field} {wrong:g}"):
        DataConfig(**{field: wrong})


# --- ranks and resume ---


def stream(selection: Selection, rank: int = 0, world_size: int = 1) -> TrainStream:
    order = Order(selection.counts, global_batch=16, contrast_batch=8, lanes=4, seed=3, window=6)
    return TrainStream(selection, order, rank, world_size, segments=2)


def joined(batches):
    """The rows of all ranks in the order in which one rank has them: by segment, then position."""

    def join(name):
        parts = [getattr(batch, name) for batch in batches]
        return torch.cat([part.unflatten(0, (2, -1)) for part in parts], dim=1).flatten(0, 1)

    tensors = {
        field.name: join(field.name)
        for field in fields(batches[0])
        if isinstance(getattr(batches[0], field.name), torch.Tensor)
    }
    return replace(batches[0], **tensors, padded=any(batch.padded for batch in batches))


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_are_the_same_for_every_world_size(train, world_size) -> None:
    assert len(train) >= 16
    whole, streams = stream(train), [stream(train, rank, world_size) for rank in range(world_size)]
    for batch, micro_step in itertools.product((0, 1, 5, 10**10), (0, 1)):
        ranks = [one.micro_batch(batch, micro_step) for one in streams]
        assert {rank.rows for rank in ranks} == {2 * 8 // world_size}
        assert_equal(joined(ranks), whole.micro_batch(batch, micro_step))


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_a_stream_goes_on_at_any_batch(train, batch) -> None:
    undisturbed, resumed = stream(train).from_batch(0), stream(train).from_batch(batch)
    for _ in range(2 * batch):
        next(undisturbed)
    for micro_step in range(5):
        one = next(undisturbed)
        assert one.position_B.min() == 16 * batch + 8 * micro_step
        assert_equal(one, next(resumed))
    undisturbed.close()
    resumed.close()


def test_an_epoch_of_batches_reads_each_record_once(selection) -> None:
    order = Order(selection.counts, 4, 2, 2, seed=1, window=3)
    whole = TrainStream(selection, order, 0, 1, segments=1)
    batches = [whole.micro_batch(batch, micro_step) for batch in range(3) for micro_step in range(2)]
    patients = torch.cat([batch.patient_B for batch in batches])
    assert sorted(patients.tolist()) == sorted(selection.shards.column("patient").tolist())


# --- reading ahead ---


def threads() -> int:
    return sum(thread.name.startswith("batches") for thread in threading.enumerate())


def with_workers(selection: Selection, workers: int, **options) -> Selection:
    return Selection(selection.shards, replace(selection.config, workers=workers, **options), "train")


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_workers_change_nothing(train, workers) -> None:
    batches, undisturbed = stream(with_workers(train, workers)).from_batch(2), stream(train)
    for number, batch in zip(range(4, 24), batches, strict=False):
        assert_equal(batch, undisturbed.micro_batch(*divmod(number, 2)))
    batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_buffers_are_used_again(train, workers) -> None:
    batches = stream(with_workers(train, workers)).from_batch(0)
    places = [next(batches).signal_BLT.data_ptr() for _ in range(30)]
    assert len(set(places)) == 3 * workers + 1
    assert places[: len(set(places))] * 2 == places[: 2 * len(set(places))]
    batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_buffer_waits_until_the_batch_in_it_is_copied(train, workers) -> None:
    given, waited, buffers = itertools.count(), set(), 3 * workers + 1

    class Copied:
        def __init__(self) -> None:
            self.batches = next(given)  # so many were taken before

        def synchronize(self) -> None:
            waited.add(self.batches)

    batches = stream(with_workers(train, workers)).from_batch(0, Copied)
    for number in range(20):
        next(batches)
        assert waited >= set(range(number - buffers + 2))
        assert workers or waited == set(range(number + 1))
    batches.close()


def test_threads_end_with_their_stream(train) -> None:
    before = threads()
    batches = stream(with_workers(train, 2)).from_batch(0)
    next(batches)
    assert before < threads() <= before + 2
    batches.close()
    assert threads() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_ends_a_stream_by_name(copied, workers) -> None:
    damaged = copied / "shard-000002.tar"
    damage(copied, range(16, 24))
    selection = Selection(ShardSet.open(copied), replace(CONFIG, min_record_s=5, workers=workers), "train")
    batches = stream(selection).from_batch(0)
    with pytest.raises(InputError, match=f"{damaged}: record . is damaged"):
        list(batches)
    with pytest.raises(InputError, match=f"{damaged}: record . is damaged"):
        next(batches)  # whoever asks again must not wait for ever
    batches.close()


@pytest.mark.parametrize("workers", [0, 4])
def test_damaged_recordings_are_skipped_where_configured(copied, train, workers) -> None:
    """What is read instead depends on the bytes alone: not on ranks, threads, nor on where a run was stopped."""
    shards = ShardSet.open(copied)
    bad = [int(n) for n in train.numbers if n == train.numbers[3] or shards.first_S[2] <= n < shards.first_S[3]]
    damage(copied, bad)
    skipping = replace(CONFIG, min_record_s=5, unreadable="skip", workers=workers)

    def skipped(rank: int = 0, world_size: int = 1) -> TrainStream:
        return stream(Selection(ShardSet.open(copied), skipping, "train"), rank, world_size)

    one, undisturbed = skipped(), stream(train)
    whole = one.from_batch(0)
    for number in range(24):
        batch, right = next(whole), undisturbed.make(number)
        hit = torch.isin(right.record_B, torch.tensor(bad))
        assert not torch.isin(batch.record_B, torch.tensor(bad)).any()
        assert torch.equal(batch.signal_BLT[~hit], right.signal_BLT[~hit])
        assert torch.equal(batch.record_B != right.record_B, hit)
        if number % 8 == 5:  # as if begun here
            assert_equal(joined([skipped(rank, 2).make(number) for rank in range(2)]), batch)
    whole.close()
    assert one.damaged <= set(bad)
    assert one.own_counts()["data/replaced_recordings"] > 0


def test_damaged_recordings_are_blank_in_evaluation(copied) -> None:
    selection = Selection(ShardSet.open(copied), replace(CONFIG, min_record_s=5, unreadable="skip"), "train")
    right = [batch for batch, _ in evaluation_batches(selection, 4, 2, 0)]
    bad = [int(selection.numbers[i]) for i in (0, 4, 5, 9)]
    damage(copied, bad)
    selection = Selection(ShardSet.open(copied), selection.config, "train")
    for (batch, _), whole in zip(evaluation_batches(selection, 4, 2, 0), right, strict=True):
        hit = torch.isin(whole.record_B, torch.tensor(bad))
        assert not batch.gain_BL[hit].any()
        assert torch.equal(batch.signal_BLT[~hit], whole.signal_BLT[~hit])
        assert torch.equal(batch.gain_BL[~hit], whole.gain_BL[~hit])


def test_when_nothing_is_readable_that_is_said(copied, monkeypatch) -> None:
    monkeypatch.setattr(stream_module, "_PLANNED", 8)
    damage(copied, range(40))
    selection = Selection(ShardSet.open(copied), replace(CONFIG, min_record_s=5, unreadable="skip"), "train")
    with pytest.raises(InputError, match=rf"no readable recording.*{len(selection)} damaged recordings"):
        stream(selection).micro_batch(0, 0)
    with pytest.raises(InputError, match="none of 4 recordings for train can be read"):
        list(evaluation_batches(selection, 4, 2, 0))


def damage(folder: Path, numbers: Iterable[int]) -> None:
    """Flip one bit in the payloads of some records."""
    shards = ShardSet.open(folder)
    for number in numbers:
        tar = folder / f"shard-{int(shards.shard_of(np.array([number]))[0]):06d}.tar"
        content = bytearray(tar.read_bytes())
        content[int(shards.column("offset")[number]) + 500] ^= 4
        tar.write_bytes(content)


# --- evaluation ---


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch", [6, 12, 18])
def test_evaluation_reads_every_record_once(selection, world_size, batch) -> None:
    selection = Selection(selection.shards, CONFIG, "train", np.arange(12) != 7)  # 11: no multiple
    target_NC = np.arange(12, dtype=np.float32)[:, None]
    ranks = [
        list(evaluation_batches(selection, batch, 2, seed=0, rank=rank, world_size=world_size, target=target_NC))
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {-(-11 // batch)}
    read = []
    for step in zip(*ranks, strict=True):
        (shared,) = {shared for _, shared in step}
        shares = [share for share, _ in step]
        if not shared:  # the tail: whole on every rank, so it counts once
            for share in shares:
                assert_equal(share, shares[0])
        for share in shares if shared else shares[:1]:
            assert share.rows == 2 * (batch // world_size if shared else 11 % batch)
            read += share.target_BC[: share.rows // 2, 0].int().tolist()
    assert read == selection.numbers.tolist()
    assert [shared for _, shared in ranks[0]] == [True] * (11 // batch) + [False]


def test_evaluation_without_a_tail(selection) -> None:
    shared = [shared for _, shared in evaluation_batches(selection, 6, 1, 0, rank=1, world_size=2)]
    assert shared == [True, True]
    nothing = Selection(selection.shards, CONFIG, "test")
    assert list(evaluation_batches(nothing, 6, 1, 0)) == []


def test_evaluation_cuts_the_same_windows_on_any_number_of_ranks(train) -> None:
    whole = [batch for batch, shared in evaluation_batches(train, 8, 2, seed=1) if shared]
    halves = [[b for b, shared in evaluation_batches(train, 8, 2, 1, rank, 2) if shared] for rank in range(2)]
    assert len(whole) > 1
    for one, two in zip(whole, zip(*halves, strict=True), strict=True):
        assert_equal(joined(list(two)), one)


# --- batches ---


def test_a_batch_travels_whole(selection) -> None:
    batch = all_of(selection, 2, target=np.zeros((12, 2), np.float32))
    moved = batch.to(torch.device("meta"))
    assert all(t.device.type == "meta" for t in vars(moved).values() if isinstance(t, torch.Tensor))
    assert (moved.padded, moved.rows) == (True, 24)
    gain_BL = torch.ones(24, 12)
    masked = batch.with_gain(gain_BL)
    assert masked.gain_BL is gain_BL
    assert_equal(replace(masked, gain_BL=batch.gain_BL), batch)
