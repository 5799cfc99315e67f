"""False discovery rates by the definition, one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from taxolens.registry.evaluators.parts.ranks import benjamini_hochberg, spearman

P_VALUES = st.lists(st.none() | st.integers(1, 20).map(lambda k: k / 20), max_size=12)


@given(P_VALUES)
def test_the_false_discovery_rate_of_those_that_are_defined(given_p: list[float | None]) -> None:
    p = np.array([np.nan if value is None else value for value in given_p])
    known = p[np.isfinite(p)]
    found = benjamini_hochberg(p)
    assert found.shape == p.shape
    for value, q in zip(p, found):
        if np.isnan(value):
            assert np.isnan(q)
            continue
        # Rejecting all up to each larger p-value: so many rejections are expected to be false.
        rates = [t * len(known) / (known <= t).sum() for t in known if t >= value]
        assert q == pytest.approx(min([*rates, 1.0]))


def test_undefined_p_values_do_not_count_as_tests() -> None:
    found = benjamini_hochberg(np.array([np.nan, 0.01, np.nan, 0.04]))
    assert found.tolist() == pytest.approx([np.nan, 0.02, np.nan, 0.04], nan_ok=True)
    assert np.isnan(benjamini_hochberg(np.full(3, np.nan))).all()


def test_a_rank_correlation_of_one_pair_is_undefined() -> None:
    assert np.isnan(spearman(np.ones(1), np.ones(1)))
    assert spearman(np.arange(3), np.arange(3)[::-1]) == -1
    assert spearman(np.arange(2), np.arange(2)) == 1
