"""The check of lesson 08 accepts any right way to find the break-even, and names what is wrong."""

import pytest

from bdlib import exercises
from bdlib.controllers import Costs
from bdlib.controllers import break_even as of_the_library


def right(gamma, c, v):
    found = of_the_library(gamma, Costs(draft=c, verify=v))
    return "never" if found is None else found


def halving(tokens, cost):
    """The exercise solved with another idea of what a round gives or costs."""

    def answer(gamma, c, v):
        low, high = 0.0, 1.0
        if tokens(1.0, gamma) < cost(gamma, c, v) - 1e-12:
            return "never"
        while high - low > 1e-6:
            middle = (low + high) / 2
            enough = tokens(middle, gamma) >= cost(gamma, c, v)
            low, high = (low, middle) if enough else (middle, high)
        return high

    return answer


def series(a, gamma):
    return sum(a**k for k in range(gamma + 1))


def full_cost(gamma, c, v):
    return gamma * c + v


def test_accepts_the_answer():
    for answer in (right, halving(series, full_cost)):
        verdict = exercises.check_break_even(answer)
        assert verdict.passed is True, verdict


def test_untouched_is_to_do():
    assert exercises.check_break_even(None).passed is None
    assert exercises.check_break_even(lambda gamma, c, v: None).passed is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (halving(series, lambda g, c, v: g * c + 1), "use v"),
        (halving(series, lambda g, c, v: c + v), "gamma times as much"),
        (halving(lambda a, g: 1 + g * a, full_cost), "behind a rejected one"),
        (halving(lambda a, g: series(a, g) - 1, full_cost), "target's own token is missing"),
        (halving(series, lambda g, c, v: v), "the draft itself is left out"),
        (lambda g, c, v: c + v - 1, "right for gamma 1 alone"),
        (lambda g, c, v: min(1.0, r) if (r := right(g, c, v)) != "never" else 1.0, "'never'"),
        (lambda g, c, v: 0.5, "make them equal"),
        (lambda g, c, v: 1.5, "no acceptance in 0 to 1"),
        (lambda g, c, v: "never", "no acceptance in 0 to 1"),
        (lambda g, c, v: [right(g, c, v)], "return a number, or 'never'"),
        (lambda g, c, v: 1 / 0, "raises ZeroDivisionError"),
    ],
)
def test_names_what_is_wrong(wrong, message):
    verdict = exercises.check_break_even(wrong)
    assert verdict.passed is False
    assert message in verdict.message, verdict
