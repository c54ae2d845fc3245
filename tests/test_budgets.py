"""The budget sampler: exact expectations, repeatable draws, refused distributions."""

import math
from collections import Counter

import pytest

from bdlib.budgets import PAPER, BudgetSampler, curriculum, fixed, log_uniform


def test_the_default_is_the_papers():
    sampler = BudgetSampler()
    assert sampler.probabilities() == PAPER
    # 256 x 0.4 + 512 x 0.3 + 1024 x 0.2 + 2048 x 0.1, by hand
    assert sampler.expectation() == pytest.approx(665.6)
    assert sampler.expectation(math.log2) == pytest.approx(9.0)


def test_draws_follow_the_distribution_and_the_seed():
    sampler = BudgetSampler(seed=3)
    draws = Counter(b for step in range(4000) for b in sampler.draw(step, views=3))
    for budget, probability in PAPER.items():
        spread = math.sqrt(12_000 * probability * (1 - probability))
        assert abs(draws[budget] - 12_000 * probability) < 4 * spread
    again = BudgetSampler(seed=3)
    assert [sampler.draw(s, 2) for s in (7, 8, 9)] == [again.draw(s, 2) for s in (7, 8, 9)]
    assert [sampler.draw(s) for s in range(40)] != [
        BudgetSampler(seed=4).draw(s) for s in range(40)
    ]


def test_log_uniform_gives_each_doubling_the_same_mass():
    probabilities = log_uniform(64, 4096).probabilities()
    octaves = [
        sum(p for b, p in probabilities.items() if low <= b < 2 * low)
        for low in (128, 256, 512, 1024)
    ]
    assert max(octaves) - min(octaves) < 0.01
    assert all(b % 8 == 0 for b in probabilities)


def test_curriculum_moves_linearly_and_stops():
    sampler = curriculum({2048: 1.0}, {256: 1.0}, steps=100)
    assert sampler.probabilities(0) == {2048: 1.0}
    assert sampler.probabilities(25) == {256: 0.25, 2048: 0.75}
    assert sampler.probabilities(1000) == {256: 1.0}
    assert sampler.expectation(step=50) == pytest.approx(1152)


def test_fixed_is_always_the_same():
    assert fixed(1024).draw(5, 4) == (1024,) * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BudgetSampler({}), "at least one"),
        (lambda: BudgetSampler({0: 1.0}), "budget 0"),
        (lambda: BudgetSampler({8: 0.6}), "sum to 0.6"),
        (lambda: BudgetSampler({8: 1.5, 16: -0.5}), "1.5"),
        (lambda: BudgetSampler({8: 1.0}, {16: 1.0}), "steps 0"),
        (lambda: BudgetSampler().draw(0, 0), "views 0"),
        (lambda: log_uniform(4, 64), "got 4"),
        (lambda: log_uniform(65, 70), "no multiple of 8"),
    ],
)
def test_refusals_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
