import pickle
from itertools import chain

import numpy as np
import pytest

from nerve.data.batches import BatchLoader, HeldOutBatches, ShuffledOrder
from nerve.errors import ConfigError


def stream(order: ShuffledOrder, n_batches: int) -> np.ndarray:
    return np.concatenate([order.indices(i) for i in range(n_batches)])


def loader(n_batches: int = 5, **shard: int) -> BatchLoader[list[int]]:
    return BatchLoader(np.ndarray.tolist, ShuffledOrder(7, 4, seed=0), n_batches, **shard)


@pytest.mark.parametrize(("n_items", "batch_size"), [(7, 3), (6, 3), (5, 8), (1, 4), (3, 1)])
def test_every_epoch_holds_every_item_once_though_batches_straddle_epochs(n_items, batch_size):
    items = stream(ShuffledOrder(n_items, batch_size, seed=3), 5 * n_items)
    epochs = items.reshape(-1, n_items)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(n_items), (len(epochs), 1)))


def test_epochs_and_seeds_give_different_permutations():
    orders = [ShuffledOrder(50, 50, seed=seed) for seed in (0, 1)]
    permutations = [tuple(order.indices(i)) for order in orders for i in range(4)]
    assert len(set(permutations)) == 8


def test_a_batch_is_a_function_of_seed_and_index_alone():
    """Neither the batches requested before nor NumPy's global state changes it."""
    expected = [ShuffledOrder(11, 4, seed=5).indices(i) for i in range(20)]
    order = ShuffledOrder(11, 4, seed=5)
    for i in [19, 0, 7, 7, 3, 18, *range(20)]:
        np.random.seed(i)
        np.testing.assert_array_equal(order.indices(i), expected[i])


def test_drawing_leaves_the_global_random_state_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    stream(ShuffledOrder(11, 4, seed=5), 20)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_the_order_is_the_same_with_every_version_of_numpy():
    """Pinned, because a change would make runs of different versions incomparable."""
    assert ShuffledOrder(8, 8, seed=42).indices(0).tolist() == [0, 1, 4, 2, 6, 5, 7, 3]


def test_a_far_batch_is_found_without_those_before_it():
    order = ShuffledOrder(1000, 7, seed=0)
    np.testing.assert_array_equal(
        order.indices(10**12), ShuffledOrder(1000, 7, seed=0).indices(10**12)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1, 0), "n_items must be at least 1; got 0"),
        ((1, 0, 0), "batch_size must be at least 1; got 0"),
        ((1, 1, -1), "seed must not be negative; got -1"),
    ],
)
def test_bad_values_are_errors_that_name_them(values, message):
    with pytest.raises(ConfigError, match=message):
        ShuffledOrder(*values)


def test_a_loader_has_its_length_and_serves_the_batches_of_its_order():
    order = ShuffledOrder(7, 4, seed=0)
    assert len(loader()) == 5
    assert list(loader()) == [order.indices(i).tolist() for i in range(5)]


@pytest.mark.parametrize("k", range(6))
def test_a_loader_stopped_after_k_batches_resumes_with_batch_k(k):
    whole = list(loader())
    stopped = loader()
    iterator = iter(stopped)
    first = [next(iterator) for _ in range(k)]
    state = pickle.loads(pickle.dumps(stopped.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    assert state == {"position": k}
    assert len(resumed) == 5
    rest = list(resumed) if k < 5 else []
    assert first + rest == whole


def test_iterating_again_goes_on_until_the_end_and_then_starts_over():
    whole = list(loader())
    again = loader()
    assert next(iter(again)) == whole[0]
    assert list(again) == whole[1:]
    assert list(again) == whole


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_slices_put_together_are_the_global_batches(world_size):
    shards = [list(loader(rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [[*chain(*slices)] for slices in zip(*shards, strict=True)] == list(loader())


def test_a_batch_that_ranks_cannot_share_is_an_error_with_a_size_that_they_can():
    with pytest.raises(ConfigError, match=r"got 4 for 3 processes\. Try 6"):
        loader(rank=0, world_size=3)


def test_a_loader_without_batches_is_an_error():
    with pytest.raises(ConfigError, match="n_train_batches must be at least 1; got 0"):
        loader(n_batches=0)


def test_held_out_batches_hold_each_item_once_in_order_each_time():
    batches = HeldOutBatches(np.ndarray.tolist, n_items=7, batch_size=3)
    assert len(batches) == 3
    next(iter(batches))
    assert list(batches) == list(batches) == [[0, 1, 2], [3, 4, 5], [6]]
