"""The budget sampler: how many entries each training view may keep.

BudgetDraft trains one drafter on sparse views whose budget is drawn anew each step, so that no single
budget is special (arXiv 2606.00144). The default is the distribution of the paper's released code.
A draw depends on the seed and the step alone: a resumed run sees the budgets it would have seen.
Every distribution is discrete, so expectations are exact sums and not estimates.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

PAPER = {256: 0.4, 512: 0.3, 1024: 0.2, 2048: 0.1}


@dataclass(frozen=True)
class BudgetSampler:
    """A distribution over budgets, possibly moving with the step.

    Attributes
    ----------
    start
        Probability of each budget (entries per layer and KV head) at step 0.
    end
        Probability of each budget from ``steps`` on; in between the two are mixed linearly. ``None``
        keeps ``start`` throughout.
    steps
        Length of the change from ``start`` to ``end``, in optimiser steps.
    seed
        Makes the draws repeatable.
    """

    start: dict[int, float] = field(default_factory=lambda: dict(PAPER))
    end: dict[int, float] | None = None
    steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for distribution in (self.start, self.end):
            if distribution is not None:
                _check(distribution)
        if self.end is not None and self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1 for a moving distribution")

    def probabilities(self, step: int = 0) -> dict[int, float]:
        """Probability of each budget at a step, budgets ascending."""
        share = 0.0 if self.end is None else min(max(step / self.steps, 0.0), 1.0)
        mixed: dict[int, float] = {}
        for weight, distribution in ((1 - share, self.start), (share, self.end or {})):
            for budget, probability in distribution.items():
                mixed[budget] = mixed.get(budget, 0.0) + weight * probability
        return {budget: mixed[budget] for budget in sorted(mixed) if mixed[budget] > 0}

    def draw(self, step: int, views: int = 1) -> tuple[int, ...]:
        """Budgets of the ``views`` sparse views of one step, drawn independently."""
        if views < 1:
            raise ValueError(f"views {views} must be at least 1")
        probabilities = self.probabilities(step)
        # A string seed is hashed the same way in every process and on every platform.
        source = random.Random(f"{self.seed}:{step}")
        return tuple(source.choices(list(probabilities), list(probabilities.values()), k=views))

    def expectation(self, f: Callable[[int], float] = float, step: int = 0) -> float:
        """Exact expectation of ``f(budget)``; of the budget itself by default."""
        return math.fsum(p * f(budget) for budget, p in self.probabilities(step).items())


def _check(distribution: dict[int, float]) -> None:
    if not distribution:
        raise ValueError("a budget distribution needs at least one budget")
    for budget, probability in distribution.items():
        if budget < 1:
            raise ValueError(f"budget {budget} must be at least 1 entry")
        if not 0 <= probability <= 1:
            raise ValueError(f"probability {probability} of budget {budget} must be in [0, 1]")
    total = math.fsum(distribution.values())
    if abs(total - 1) > 1e-9:
        raise ValueError(f"budget probabilities sum to {total}, must sum to 1")


def fixed(budget: int, seed: int = 0) -> BudgetSampler:
    """One budget always (the ``fixed-1024`` ablation, say)."""
    return BudgetSampler({budget: 1.0}, seed=seed)


def log_uniform(low: int, high: int, seed: int = 0, multiple: int = 8) -> BudgetSampler:
    """Every doubling equally likely: multiples of ``multiple`` from ``low`` to ``high``.

    The probability of ``b`` is proportional to ``log((b + m / 2) / (b - m / 2))``, the mass that a
    continuous log-uniform variable has in the cell that rounds to ``b``.
    """
    if not multiple <= low <= high:
        raise ValueError(f"need {multiple} <= low <= high, got {low} and {high}")
    half = multiple / 2
    cells = range(-(-low // multiple) * multiple, high + 1, multiple)
    weights = {b: math.log((b + half) / (b - half)) for b in cells}
    if not weights:
        raise ValueError(f"no multiple of {multiple} lies between {low} and {high}")
    total = math.fsum(weights.values())
    return BudgetSampler({b: w / total for b, w in weights.items()}, seed=seed)


def curriculum(
    start: dict[int, float], end: dict[int, float], steps: int, seed: int = 0
) -> BudgetSampler:
    """Move from one distribution to another over ``steps``, for example from large to small."""
    return BudgetSampler(start, end, steps, seed)
