"""SHAPE values against a brute-force reading of the formula, and what they must not depend on."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shape_moe.errors import UsageError
from shape_moe.scoring.shape import shape_values
from support import brute_force


def random_table(rng: np.random.Generator, experts: int, top_k: int, rows: int):
    """Coalitions drawn from few popular experts, so that they overlap."""
    pool = rng.permutation(experts)[: min(experts, top_k + int(rng.integers(1, 8)))]
    coalitions = np.array([rng.choice(pool, top_k, replace=False) for _ in range(rows)])
    return coalitions, rng.integers(1, 50, rows)


@pytest.mark.parametrize("case", range(240))
def test_equals_brute_force(case: int) -> None:
    rng = np.random.default_rng(case)
    top_k = 2 + case % 9
    experts = int(rng.integers(max(4, top_k + 1), 513)) if case % 3 else max(4, top_k + int(rng.integers(1, 6)))
    coalitions, counts = random_table(rng, experts, top_k, int(rng.integers(1, 60)))
    expected = [float(value) for value in brute_force.shape_values(coalitions, counts.tolist(), experts)]
    np.testing.assert_allclose(shape_values(coalitions, counts, experts), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", range(20))
def test_float_counts_equal_brute_force(case: int) -> None:
    rng = np.random.default_rng(1000 + case)
    coalitions, counts = random_table(rng, 20, 4, 40)
    weighted = counts * 0.1
    expected = [float(v) for v in brute_force.shape_values(coalitions, [Fraction(x) for x in weighted], 20)]
    np.testing.assert_allclose(shape_values(coalitions, weighted, 20), expected, rtol=1e-9, atol=1e-18)


def test_sets_beyond_64_bit_keys() -> None:
    rng = np.random.default_rng(0)
    coalitions, counts = random_table(rng, 512, 20, 30)
    expected = [float(value) for value in brute_force.shape_values(coalitions, counts.tolist(), 512)]
    np.testing.assert_allclose(shape_values(coalitions, counts, 512), expected, rtol=1e-12, atol=0)


@st.composite
def tables(draw):
    experts = draw(st.integers(4, 24))
    top_k = draw(st.integers(2, min(6, experts - 1)))
    row = st.permutations(range(experts)).map(lambda order: order[:top_k])
    coalitions = draw(st.lists(row, min_size=1, max_size=30))
    counts = draw(st.lists(st.integers(0, 1000), min_size=len(coalitions), max_size=len(coalitions)))
    return np.array(coalitions), np.array(counts), experts


@given(tables(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_order_and_names_do_not_matter(table, random) -> None:
    coalitions, counts, experts = table
    values = shape_values(coalitions, counts, experts)
    rows = list(range(len(counts)))
    random.shuffle(rows)
    inside = np.array([random.sample(list(row), len(row)) for row in coalitions[rows]])
    assert np.array_equal(shape_values(inside, counts[rows], experts), values)
    names = list(range(experts))
    random.shuffle(names)
    renamed = shape_values(np.array(names)[coalitions], counts, experts)
    assert np.array_equal(renamed[names], values)


@given(tables(), st.data())
@settings(max_examples=100, deadline=None)
def test_splitting_counts_does_not_matter(table, data) -> None:
    coalitions, counts, experts = table
    part = np.array([data.draw(st.integers(0, int(count))) for count in counts])
    split = shape_values(np.concatenate([coalitions, coalitions]), np.concatenate([part, counts - part]), experts)
    assert np.array_equal(split, shape_values(coalitions, counts, experts))


@given(tables())
@settings(max_examples=100, deadline=None)
def test_values_are_not_negative_and_scale_with_counts(table) -> None:
    coalitions, counts, experts = table
    values = shape_values(coalitions, counts, experts)
    assert (values >= 0).all()
    np.testing.assert_allclose(shape_values(coalitions, 7 * counts, experts), 7 * values, rtol=1e-12)
    unseen = np.setdiff1d(np.arange(experts), coalitions[counts > 0])
    assert (values[unseen] == 0).all()


def test_one_coalition_only() -> None:
    assert (shape_values(np.array([[0, 2, 3]]), np.array([17]), 6) == 0).all()


def test_all_coalitions_alike() -> None:
    pairs = np.array([[a, b] for a in range(6) for b in range(a)])
    assert (shape_values(pairs, np.full(len(pairs), 5), 6) == 0).all()
    assert (shape_values(pairs, np.full(len(pairs), 0.3), 6) == 0).all()


def test_no_tokens_at_all() -> None:
    assert (shape_values(np.zeros((0, 4), dtype=int), np.zeros(0, dtype=int), 8) == 0).all()
    assert (shape_values(np.array([[0, 1]]), np.array([0]), 8) == 0).all()


def test_known_value() -> None:
    # E = 4, k = 2: v(01) = 3, v(02) = 1, v(12) = 2. For expert 0: N(1) = 5, N(2) = 3, alpha = 1/3,
    # phi = 1/12 * ((3 - 5/3) + (1 - 1)) = 1/9.
    values = shape_values(np.array([[0, 1], [2, 0], [1, 2]]), np.array([3, 1, 2]), 4)
    assert values[0] == pytest.approx(1 / 9)
    assert values[3] == 0


def test_large_counts_stay_exact() -> None:
    big = 10**12
    values = shape_values(np.array([[0, 1], [0, 2], [1, 2]]), np.array([big + 1, big, big]), 3)
    expected = brute_force.shape_values([[0, 1], [0, 2], [1, 2]], [big + 1, big, big], 3)
    np.testing.assert_allclose(values, [float(v) for v in expected], rtol=1e-12)


@pytest.mark.parametrize(
    ("coalitions", "counts", "experts", "word"),
    [
        ([[0], [1]], [1, 1], 4, "top-1"),
        ([[0, 0]], [1], 4, "different experts"),
        ([[0, 4]], [1], 4, "between 0 and 3"),
        ([[0, 1]], [-1], 4, "negative"),
        ([[0, 1]], [float("nan")], 4, "finite"),
        ([[0, 1]], [1, 2], 4, "one count per row"),
    ],
)
def test_bad_tables_are_refused(coalitions, counts, experts, word) -> None:
    with pytest.raises(UsageError, match=word):
        shape_values(np.array(coalitions), np.array(counts), experts)


@given(tables(), st.randoms(use_true_random=False), st.floats(0.01, 3), st.floats(0, 3))
@settings(max_examples=100, deadline=None)
def test_order_and_names_do_not_matter_for_weighted_counts(table, random, prompt, response) -> None:
    """Bit for bit, also where weights are no fractions: selections must not hang on the order of batches."""
    members, counts, experts = table
    weighted = counts * prompt + np.arange(len(counts)) % 3 * response
    rows, names = list(range(len(members))), list(range(experts))
    random.shuffle(rows)
    random.shuffle(names)
    renamed = np.asarray(names)[members]
    there = shape_values(renamed[rows], weighted[rows], experts)
    np.testing.assert_array_equal(shape_values(members, weighted, experts), there[names])


def test_weights_that_are_fractions_are_exact() -> None:
    """Alike coalitions are worth nothing whatever they weigh; 0.1 has no exact binary form."""
    members = np.array([[0, 1], [0, 2], [1, 2]])
    whole = shape_values(members, np.array([3, 5, 7]), 4)
    np.testing.assert_array_equal(shape_values(members, np.array([0.3, 0.5, 0.7]), 4) * 10, whole)
    assert shape_values(np.array([[0, 1]] * 3), np.array([0.1, 0.1, 0.1]), 4).tolist() == [0, 0, 0, 0]
