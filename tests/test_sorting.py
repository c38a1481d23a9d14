"""The comparator network sorts, and its pruned form delivers the wanted ranks."""

import itertools

import numpy as np
import pytest

from pipeline.sorting import batcher_pairs, selection_network, sort_rows


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 11])
def test_network_sorts_every_zero_one_input(n: int) -> None:
    """Zero-one principle: a network that sorts all 0/1 inputs sorts everything (Knuth, 5.3.4)."""
    every = np.array(list(itertools.product((0, 1), repeat=n)), np.uint16).T.copy()
    rows = list(every.copy())
    sort_rows(rows, selection_network(n, tuple(range(n))), np.empty_like(rows[0]))
    assert np.array_equal(np.array(rows), np.sort(every, axis=0))


@pytest.mark.parametrize("n", [1, 2, 7, 12, 24, 33, 60, 130])
def test_wanted_ranks(n: int) -> None:
    values = np.random.default_rng(n).integers(0, 65536, (n, 300)).astype(np.uint16)
    expected = np.sort(values, axis=0)
    for wanted in {(0,), (n - 1,), ((n - 1) // 2, n // 2), ((n - 1) // 4,)}:
        rows = list(values.copy())
        sort_rows(rows, selection_network(n, wanted), np.empty_like(rows[0]))
        for rank in wanted:
            assert np.array_equal(rows[rank], expected[rank])


def test_pruning_saves_comparators() -> None:
    assert len(selection_network(12, (5, 6))) < len(batcher_pairs(12)) == 41
    assert len(selection_network(60, (29, 30))) < len(batcher_pairs(60))


def test_refuses_ranks_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"\(3,\).*0\.\.2"):
        selection_network(3, (3,))
