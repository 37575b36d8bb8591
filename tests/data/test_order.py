"""The order of records: every one once per epoch, whoever asks and in whatever order.

Shape suffixes: N records of the data set, P positions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from ecgscale.data.order import MIXTURE_BLOCK, Mixture, Order, check_world_size, default_lanes, mixture_quotas
from ecgscale.errors import InputError


@st.composite
def orders(draw) -> Order:
    lanes = draw(st.sampled_from([1, 2, 4, 8]))
    contrast = lanes * draw(st.integers(1, 3))
    global_batch = contrast * draw(st.integers(1, 3))
    shard_records = draw(st.lists(st.integers(0, 60), max_size=8))
    shard_records.insert(draw(st.integers(0, len(shard_records))), global_batch + draw(st.integers(0, 40)))
    seed = draw(st.integers(0, 2**64 - 1))
    window = draw(st.one_of(st.integers(1, 40), st.just(16384)))
    return Order(tuple(shard_records), global_batch, contrast, lanes, seed, window)


def numbers(order: Order, position_P) -> np.ndarray:
    """Whole-set numbers of the records at positions; every place must exist."""
    place = order.places(position_P)
    size_S = np.array(order.shard_records)
    assert ((place.record >= 0) & (place.record < size_S[place.shard])).all()
    return np.cumsum([0, *size_S])[place.shard] + place.record


def epoch(order: Order, number: int) -> np.ndarray:
    first = number * order.positions_per_epoch
    return numbers(order, np.arange(first, first + order.positions_per_epoch))


EPOCHS = st.one_of(st.integers(0, 5), st.sampled_from([10**6, 10**9 // 7, 2**40]))


@given(orders(), EPOCHS)
def test_every_record_of_the_cut_stands_once_in_an_epoch(order, number) -> None:
    read = epoch(order, number)
    assert len(np.unique(read)) == len(read) == order.positions_per_epoch
    assert 0 <= order.records - len(read) < order.global_batch
    assert order.positions_per_epoch == order.batches_per_epoch * order.global_batch


def test_each_epoch_leaves_out_others() -> None:
    order = Order((40, 30, 33), 10, 10, 2, seed=3)
    left_out = [frozenset(range(order.records)) - set(epoch(order, number)) for number in range(200)]
    assert {len(left) for left in left_out} == {3}
    assert len(set(left_out[:10])) > 8
    assert frozenset.union(*left_out) == set(range(order.records))  # no record is always, nor never, read


@given(orders(), st.integers(0, 10**6), st.data())
def test_global_batches_are_the_same_for_every_world_size(order, batch, data) -> None:
    world_size = data.draw(st.sampled_from([w for w in (1, 2, 4, 8) if order.lanes % w == 0]))
    micro_steps = order.global_batch // order.contrast_batch
    positions = [
        order.rank_positions(batch, micro_step, rank, world_size)
        for micro_step in range(micro_steps)
        for rank in range(world_size)
    ]
    first = batch * order.global_batch
    assert np.concatenate(positions).tolist() == list(range(first, first + order.global_batch))
    assert {len(position_P) for position_P in positions} == {order.contrast_batch // world_size}


@given(orders(), st.integers(0, 1000), st.data())
def test_a_rank_reads_whole_lanes(order, batch, data) -> None:
    world_size = data.draw(st.sampled_from([w for w in (1, 2, 4, 8) if order.lanes % w == 0]))
    contrast = order.contrast_batch
    for micro_step in range(order.global_batch // contrast):
        for rank in range(world_size):
            slot_P = order.rank_positions(batch, micro_step, rank, world_size) - batch * order.global_batch
            c_P = slot_P % contrast
            assert (slot_P // contrast == micro_step).all()
            assert (c_P * world_size // contrast == rank).all()
            assert (c_P * order.lanes // contrast * world_size // order.lanes == rank).all()


def test_a_lane_needs_its_part_of_the_data_only() -> None:
    order = Order((50,) * 32, 48, 16, 8, seed=1, window=64)
    position_P = np.arange(order.positions_per_epoch)
    lane_P = position_P % 16 // 2
    shard_P = order.places(position_P).shard
    shards_of_lane = [len(np.unique(shard_P[lane_P == lane])) for lane in range(8)]
    assert max(shards_of_lane) <= 200 // 50 + 2  # 198 records that follow one another, cut anywhere


def test_a_window_holds_neighbours_only() -> None:
    order = Order((64,) * 8, 8, 8, 1, seed=1, window=128)
    shard_WP = order.places(np.arange(512)).shard.reshape(4, 128)
    assert [len(np.unique(shard_P)) <= 3 for shard_P in shard_WP] == [True] * 4


@given(orders(), st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_a_place_depends_on_its_position_alone(order, positions, random) -> None:
    expected = dict(zip(positions, numbers(order, positions), strict=True))
    random.shuffle(positions)
    assert numbers(order, positions).tolist() == [expected[position] for position in positions]
    twin = Order(order.shard_records, order.global_batch, order.contrast_batch, order.lanes, order.seed, order.window)
    assert [int(numbers(twin, [position])[0]) for position in positions] == [expected[p] for p in positions]


@pytest.mark.parametrize("position", [10**9, 10**12, 2**62])
def test_far_positions_cost_no_more_and_lie_in_the_right_epoch(position) -> None:
    order = Order((301, 200, 77), 32, 16, 4, seed=9, window=100)
    number, place = divmod(position, order.positions_per_epoch)
    assert numbers(order, [position])[0] == epoch(order, number)[place]
    # on both sides of the seam between two epochs
    seam = (number + 1) * order.positions_per_epoch
    both = numbers(order, np.arange(seam - 40, seam + 40))
    assert both.tolist() == [*epoch(order, number)[-40:], *epoch(order, number + 1)[:40]]


def test_epochs_and_seeds_differ() -> None:
    def order(seed):
        return Order((100,) * 10, 50, 50, 2, seed, window=200)

    epochs = [epoch(order(0), 0), epoch(order(0), 1), epoch(order(1), 0), epoch(order(1 << 40), 0)]
    for i, one in enumerate(epochs):
        for other in epochs[:i]:
            assert (one == other).mean() < 0.02


def test_the_order_within_a_window_says_nothing_of_the_source() -> None:
    order = Order((4096,), 64, 64, 1, seed=2, window=4096)
    source_EP = np.stack([epoch(order, number) for number in range(6)])
    rho_EE = np.abs(spearmanr(np.vstack([np.arange(4096), source_EP]), axis=1).statistic)
    assert rho_EE[np.triu_indices(7, 1)].max() < 0.06  # standard error 1/√4096 = 0.016; the turn does not matter
    neighbours = np.abs(np.diff(source_EP, axis=1)) == 1
    assert neighbours.mean() < 0.002  # expected: 2 of 4096


def test_shards_come_in_a_random_order() -> None:
    order = Order((10,) * 200, 10, 10, 1, seed=2, window=1)
    shard_EP = np.stack([order.places(np.arange(2000) + 2000 * number).shard for number in range(5)])
    rho_EE = np.abs(spearmanr(np.vstack([np.arange(2000), shard_EP]), axis=1).statistic)
    assert rho_EE[np.triu_indices(6, 1)].max() < 0.25  # standard error 1/√200 = 0.07


def test_the_order_of_stored_runs_stays() -> None:
    """A run that goes on after an upgrade must read on where it was: change this only with a new format."""
    order = Order((5, 0, 9, 4), 8, 4, 2, seed=12345, window=3)
    place = order.places([0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 10**12])
    assert place.shard.tolist() == [0, 3, 2, 2, 3, 3, 2, 2, 2, 2, 0]
    assert place.record.tolist() == [4, 0, 5, 4, 1, 3, 3, 7, 4, 5, 2]
    order = replace(order, mixture=Mixture((3, 1), (192, 64)))
    place = order.places([0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 10**12])
    assert place.shard.tolist() == [2, 2, 2, 0, 3, 2, 0, 2, 0, 2, 3]
    assert place.record.tolist() == [6, 4, 4, 3, 2, 6, 2, 2, 1, 5, 3]


# --- mixtures ---


@st.composite
def mixtures(draw) -> Order:
    lanes = draw(st.sampled_from([1, 2, 4]))
    contrast = lanes * draw(st.integers(1, 3))
    sets = draw(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=4), min_size=2, max_size=4))
    sets = [[*counts, lanes + draw(st.integers(0, 20))] for counts in sets]
    weights = draw(st.lists(st.floats(0.01, 10), min_size=len(sets), max_size=len(sets)))
    mixture = Mixture(tuple(map(len, sets)), mixture_quotas(weights))
    global_batch = contrast * draw(st.integers(1, 2))
    records = sum(map(sum, sets))
    if global_batch > records:
        sets[0][0] += global_batch
    window = draw(st.one_of(st.integers(1, 40), st.just(16384)))
    shard_records = tuple(count for counts in sets for count in counts)
    return Order(shard_records, global_batch, contrast, lanes, draw(st.integers(0, 2**64 - 1)), window, mixture)


def set_of(order: Order, shard_P: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(order.mixture.shards), shard_P, side="right")


@settings(max_examples=40)
@given(mixtures(), st.sampled_from([0, 3, 10**6]))
def test_the_quotas_of_a_mixture_come_out_in_every_block_of_a_lane(order, block) -> None:
    lane_slots = order.contrast_batch // order.lanes
    position_P = np.arange(block * MIXTURE_BLOCK * order.lanes, (block + 2) * MIXTURE_BLOCK * order.lanes)
    if len(position_P) % order.contrast_batch or position_P[0] % order.contrast_batch:
        position_P = np.arange(2 * MIXTURE_BLOCK * order.contrast_batch) + block * MIXTURE_BLOCK * order.contrast_batch
    lane_P = position_P % order.contrast_batch // lane_slots
    set_P = set_of(order, order.places(position_P).shard)
    for lane in range(order.lanes):
        of_lane = set_P[lane_P == lane]
        for part in of_lane.reshape(-1, MIXTURE_BLOCK):
            assert np.bincount(part, minlength=len(order.mixture.quota)).tolist() == list(order.mixture.quota)


def test_every_recording_of_a_mixture_is_drawn_equally_often() -> None:
    """Sets of very unequal size: 1,300 epochs of the small one fall into 119 of the large one."""
    mixture = Mixture((3, 2), mixture_quotas([3, 1]))
    order = Order((500, 400, 131, 20, 11), 32, 16, 4, seed=5, window=64, mixture=mixture)
    drawn = np.bincount(numbers(order, np.arange(4 * 160 * MIXTURE_BLOCK)), minlength=1062)
    large, small = drawn[:1031], drawn[1031:]
    assert large.sum() == 3 * small.sum()
    for counts in (large, small):
        # each epoch leaves out 3 of the set, others every time; the last epoch may have begun
        epochs, share = counts.sum() / (len(counts) - 3), 3 / len(counts)
        assert abs(counts - counts.mean()).max() <= 5 * (epochs * share * (1 - share)) ** 0.5 + 1


@given(mixtures(), st.integers(0, 3000))
def test_what_was_drawn_of_each_set_is_counted(order, batch) -> None:
    before, after = (np.array(order.draws(at * order.global_batch)) for at in (batch, batch + 3))
    position_P = np.arange(batch * order.global_batch, (batch + 3) * order.global_batch)
    counted = np.bincount(set_of(order, order.places(position_P).shard), minlength=len(before))
    assert (after - before).tolist() == counted.tolist()
    assert before.sum() == batch * order.global_batch


def test_a_mixture_of_one_weight_each_reads_as_often_from_each() -> None:
    assert mixture_quotas([1, 1]) == (128, 128)
    assert mixture_quotas([0.7, 0.2, 0.1]) == (179, 51, 26)
    assert mixture_quotas([1e9, 1]) == (255, 1)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=MIXTURE_BLOCK))
def test_quotas_fill_the_block(weights) -> None:
    quota_Q = np.array(mixture_quotas(weights))
    share_Q = np.array(weights) / sum(weights) * MIXTURE_BLOCK
    assert quota_Q.sum() == MIXTURE_BLOCK
    assert quota_Q.min() >= 1
    if share_Q.min() >= 1:
        assert abs(quota_Q - share_Q).max() < 1 + 1e-9


# --- what a rank needs ---


@settings(max_examples=40)
@given(st.one_of(orders(), mixtures()), st.integers(0, 400), st.data())
def test_a_stage_names_every_shard_that_its_batches_read(order, batch, data) -> None:
    world_size = data.draw(st.sampled_from([w for w in (1, 2, 4, 8) if order.lanes % w == 0]))
    rank = data.draw(st.integers(0, world_size - 1))
    stages = order.stages(batch, rank, world_size)
    begin, shards = next(stages)
    assert begin == batch
    for _ in range(4):
        end, following = next(stages)
        assert end > begin
        for at in {begin, (begin + end) // 2, end - 1}:
            for micro_step in range(order.global_batch // order.contrast_batch):
                read = order.places(order.rank_positions(at, micro_step, rank, world_size)).shard
                assert np.isin(read, shards).all()
        begin, shards = end, following


def test_a_stage_needs_a_few_shards_of_a_large_set() -> None:
    order = Order((500,) * 2000, 512, 512, 64, seed=1, window=1000)
    stages = order.stages(10**6, rank=3, world_size=8)
    for _ in range(20):
        _, shards = next(stages)
        assert len(shards) <= 8 * 2 * (1000 // 500 + 2)  # 8 lanes, at most two windows each


@settings(max_examples=20)
@given(orders())
def test_empty_shards_change_nothing(order) -> None:
    padded = Order((*order.shard_records, 0, 0), order.global_batch, order.contrast_batch, order.lanes, order.seed)
    assert set(order.places(np.arange(order.positions_per_epoch)).shard) <= set(np.flatnonzero(order.shard_records))
    assert len(np.unique(epoch(padded, 0))) == order.positions_per_epoch


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"global_batch": 10}, "10.*4"),
        ({"global_batch": 0}, "0.*4"),
        ({"global_batch": -8}, "-8.*4"),
        ({"contrast_batch": 0}, "8.*0"),
        ({"contrast_batch": -4}, "8.*-4"),
        ({"lanes": 3}, "train.lanes 3 .*4"),
        ({"lanes": 0}, "train.lanes 0"),
        ({"lanes": -1}, "train.lanes -1"),
        ({"shard_records": (3, 4)}, "train.global_batch 8 .*7 usable"),
        ({"shard_records": ()}, "train.global_batch 8 .*0 usable"),
        ({"window": 0}, "window.*0"),
    ],
)
def test_wrong_values_are_named(fields, named) -> None:
    right = {"shard_records": (20,), "global_batch": 8, "contrast_batch": 4, "lanes": 2, "seed": 0}
    Order(**right)
    with pytest.raises(InputError, match=named):
        Order(**right | fields)


def test_world_sizes_divide_the_lanes() -> None:
    assert [w for w in range(1, 17) if fits(w, 8)] == [1, 2, 4, 8]
    with pytest.raises(InputError, match=r"3 ranks.*8 lanes"):
        check_world_size(3, 8)
    assert [default_lanes(contrast) for contrast in (1, 2, 7, 24, 64, 512, 96)] == [1, 2, 1, 8, 64, 64, 32]


def fits(world_size: int, lanes: int) -> bool:
    try:
        check_world_size(world_size, lanes)
    except InputError:
        return False
    return True
