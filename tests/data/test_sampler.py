"""The order over a grid of lengths, worlds and batches: once per epoch, the same at any world size, resumable."""

from itertools import islice

import pytest

from ase_dist.data.sampler import EvalSampler, ResumableSampler

pytestmark = pytest.mark.single_gpu

GRID = [(n, w, b) for n in (1, 2, 5, 12, 17) for w in (1, 2, 3, 4) for b in (1, 2, 3)]


def samplers(length, world, batch, *, seed=0):
    return [ResumableSampler(length, batch_size=batch, rank=rank, world_size=world, seed=seed) for rank in range(world)]


def take(ranks, steps):
    """Global batches: the ranks' slices of each step one after the other."""
    batches = [list(islice(sampler, steps)) for sampler in ranks]
    return [[draw for rank in batches for draw in rank[step]] for step in range(steps)]


def flat(batches):
    return [draw for batch in batches for draw in batch]


@pytest.mark.parametrize(("length", "world", "batch"), GRID)
def test_every_image_once_per_epoch_and_equal_batches(length, world, batch):
    ranks = samplers(length, world, batch)
    steps = -(-3 * length // (world * batch))
    per_rank = [list(islice(sampler, steps)) for sampler in ranks]
    assert {len(draws) for rank in per_rank for draws in rank} == {batch}
    stream = [draw for step in range(steps) for rank in per_rank for draw in rank[step]]
    for epoch in range(3):
        assert sorted(draw.image for draw in stream if draw.epoch == epoch) == list(range(length))
    assert [draw.epoch for draw in stream] == sorted(draw.epoch for draw in stream)


@pytest.mark.parametrize(("length", "world", "batch"), GRID)
def test_worlds_see_the_same_global_batches(length, world, batch):
    assert take(samplers(length, world, batch), 7) == take(samplers(length, 1, batch * world), 7)


@pytest.mark.parametrize(("length", "world", "batch"), GRID)
def test_resuming_after_any_step_continues_the_stream(length, world, batch):
    uninterrupted = take(samplers(length, world, batch), 8)
    for stop in range(8):
        before = samplers(length, world, batch)
        assert take(before, stop) == uninterrupted[:stop]
        states = [sampler.state_dict() for sampler in before]
        assert all(state == states[0] for state in states)
        after = samplers(length, world, batch)
        for sampler in after:
            sampler.load_state_dict(states[0])
        assert take(after, 8 - stop) == uninterrupted[stop:]


@pytest.mark.parametrize("length", [5, 12, 17])
@pytest.mark.parametrize(("old", "new"), [((2, 2), (1, 2)), ((1, 3), (4, 1)), ((4, 1), (3, 3)), ((3, 2), (2, 3))])
def test_resuming_at_another_world_size_continues_the_same_stream(length, old, new):
    stream = flat(take(samplers(length, 1, 1), 80))
    for stop in (1, 2, 3, 5):
        before = samplers(length, *old)
        seen = flat(take(before, stop))
        after = samplers(length, *new)
        for sampler in after:
            sampler.load_state_dict(before[0].state_dict())
        seen += flat(take(after, 4))
        assert seen == stream[: len(seen)]


def test_state_at_the_end_of_an_epoch_is_the_start_of_the_next():
    sampler = samplers(6, 1, 3)[0]
    states = [sampler.state_dict()]
    epochs = [sampler.epoch]
    for _ in islice(sampler, 3):
        states.append(sampler.state_dict())
        epochs.append(sampler.epoch)
    assert [(state["epoch"], state["consumed"]) for state in states] == [(0, 0), (0, 3), (1, 0), (1, 3)]
    assert epochs == [0, 0, 1, 1]


def test_upcoming_does_not_move_the_position():
    sampler = samplers(5, 1, 2)[0]
    ahead = list(islice(sampler.upcoming(), 4))
    assert sampler.state_dict() == {"epoch": 0, "consumed": 0, "length": 5}
    assert list(islice(sampler, 4)) == ahead
    assert list(islice(sampler.upcoming(), 1)) != ahead[:1]


def test_orders_differ_between_epochs_and_seeds():
    def order(seed, epoch):
        return tuple(draw.image for draw in take(samplers(30, 1, 30, seed=seed), 3)[epoch])

    assert len({order(0, 0), order(0, 1), order(0, 2), order(1, 0)}) == 4
    assert order(0, 1) == order(0, 1)


@pytest.mark.parametrize(("length", "world", "batch", "steps"), [(12, 2, 3, 2), (13, 2, 3, 3), (1, 4, 2, 1)])
def test_steps_per_epoch(length, world, batch, steps):
    assert samplers(length, world, batch)[0].steps_per_epoch == steps


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"epoch": 0, "consumed": 0, "length": 6}, "position in 6 images, wanted one in 5"),
        ({"epoch": 0, "length": 5}, "wanted epoch, consumed and length"),
        ({"epoch": 0, "consumed": 6, "length": 5}, "image 6 of epoch 0"),
        ({"epoch": -1, "consumed": 0, "length": 5}, "epoch -1"),
        ({"epoch": "x", "consumed": 0, "length": 5}, "wanted epoch"),
    ],
)
def test_states_that_do_not_fit_are_refused(state, said):
    with pytest.raises(ValueError, match=said):
        samplers(5, 1, 1)[0].load_state_dict(state)


@pytest.mark.parametrize(
    "wrong",
    [
        {"length": 0},
        {"batch_size": 0},
        {"rank": 2},
        {"rank": -1},
    ],
)
def test_impossible_worlds_are_refused(wrong):
    arguments = {"length": 4, "batch_size": 1, "rank": 0, "world_size": 2, **wrong}
    length = arguments.pop("length")
    with pytest.raises(ValueError, match="sampler: got"):
        ResumableSampler(length, seed=0, **arguments)
    with pytest.raises(ValueError, match="sampler: got"):
        EvalSampler(length, **arguments)


@pytest.mark.parametrize(("length", "world", "batch"), GRID)
def test_evaluation_gives_each_image_to_one_rank_in_equally_many_batches(length, world, batch):
    ranks = [EvalSampler(length, batch_size=batch, rank=rank, world_size=world) for rank in range(world)]
    batches = [list(sampler) for sampler in ranks]
    assert {len(rank) for rank in batches} == {len(ranks[0])} == {-(-length // (world * batch))}
    assert sorted(draw.image for rank in batches for draw in flat(rank)) == list(range(length))
    for step in zip(*batches, strict=True):
        sizes = [len(draws) for draws in step]
        assert max(sizes) <= batch
        assert max(sizes) - min(sizes) <= 1


def test_fewer_images_than_ranks_leaves_empty_batches():
    batches = [list(EvalSampler(2, batch_size=3, rank=rank, world_size=4)) for rank in range(4)]
    assert sorted(len(rank[0]) for rank in batches) == [0, 0, 1, 1]
