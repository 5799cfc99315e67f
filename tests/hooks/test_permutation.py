import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from taxolens.hooks.activations.permutation import LazyPermutation


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 50))
def test_every_element_comes_once(n, seed, epoch):
    elements = LazyPermutation(n, seed, epoch)[np.arange(n)]
    assert np.array_equal(np.sort(elements), np.arange(n))


def test_pieces_agree_with_the_whole_and_seeds_differ():
    whole = LazyPermutation(1000, 5, 0)[np.arange(1000)]
    assert np.array_equal(LazyPermutation(1000, 5, 0)[np.array([7, 998, 7])], whole[[7, 998, 7]])
    for seed in ((5, 1), (6, 0)):
        assert (LazyPermutation(1000, *seed)[np.arange(1000)] == whole).mean() < 0.02


def test_no_order_is_left():
    n = 20_000
    elements = LazyPermutation(n, 0)[np.arange(n)]
    assert abs(np.corrcoef(np.arange(n), elements)[0, 1]) < 0.03
    assert abs(np.corrcoef(elements[:-1], elements[1:])[0, 1]) < 0.03
    halves = np.histogram(elements[: n // 2], bins=20, range=(0, n))[0]
    assert abs(halves - n / 40).max() < 6 * np.sqrt(n / 80)


def test_the_largest_sizes_take_no_memory():
    n = 10**14 + 37
    elements = LazyPermutation(n, 3)[np.arange(5)]
    assert len(set(elements.tolist())) == 5 and elements.min() >= 0 and elements.max() < n


def test_an_empty_permutation_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        LazyPermutation(0, 1)
