"""Checks of the lessons' exercises: each says what is wrong, not only that something is.

A check takes the student's answer and returns a :class:`Verdict`, which a notebook shows as its
cell's value. ``None`` (not attempted yet) is a verdict of its own, so that a lesson runs top to
bottom with empty exercises. The solutions notebooks pass through the same checks, and the tests feed
each one plausible wrong answers that it must reject.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import torch
    from torch import Tensor

    from bdlib.kernels.compiling import Compiled
    from bdlib.recipes import Recipe
    from bdlib.selection import Policy, Selection
    from bdlib.training import TrainSettings
    from bdlib.transformer import DecoderConfig


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: ``passed`` is ``None`` while the exercise is untouched."""

    passed: bool | None
    message: str

    def __repr__(self) -> str:
        mark = {True: "correct", False: "not yet", None: "to do"}[self.passed]
        return f"[{mark}] {self.message}"


TODO = Verdict(None, "replace None by your answer, run the cell again")


# -------------------------------------------------------------------- lesson 00


def check_own_text(
    text: str | None,
    run: Callable[[str], tuple[Tensor, Sequence[int]]],
    gamma: int,
    least: float = 0.4,
) -> Verdict:
    """Check a text on which n-gram lookup does well without the output going in circles.

    Parameters
    ----------
    run
        ``run(text)`` gives the prompt ``[T]`` and the tokens the target answers with; it is called
        only for a usable text.
    gamma
        Tokens drafted per round.
    least
        Acceptance to exceed.
    """
    from bdlib.measure import distinct_n, ngram_acceptance

    if text is None:
        return TODO
    if not isinstance(text, str):
        hint = "; read a file with Path(name).read_text()" if hasattr(text, "read") else ""
        return Verdict(False, f"my_text must be a string, not a {type(text).__name__}{hint}")
    words = len(text.split())
    if not 100 <= words <= 3000:
        return Verdict(False, f"{words:,} words; give between 100 and 3,000")
    prompt, tokens = run(text)
    if len(tokens) < 24:
        return Verdict(
            False, f"the answer ends after {len(tokens)} tokens, too few to tell; ask for more"
        )
    rate, length = ngram_acceptance(prompt, tokens, gamma)
    numbers = f"{rate or 0.0:.0%} of the n-gram drafts were accepted, {length:.2f} tokens a round"
    if (varied := distinct_n(tokens, 2)) < 0.6:
        return Verdict(
            False,
            f"{numbers}, but the output goes in circles (distinct-2 {varied:.2f}, want 0.6): that"
            " flatters any drafter. Ask for something else",
        )
    if rate is None or rate <= least:
        return Verdict(
            False,
            f"{numbers}; the goal is more than {least:.0%}. Lookup can only guess what stood in the"
            " text before: which request makes the answer repeat your text?",
        )
    return Verdict(
        True, f"{numbers}, and the output does not go in circles (distinct-2 {varied:.2f})"
    )


# -------------------------------------------------------------------- lesson 01

# A toy target and drafter over 4 tokens, a draft of 2. No two probabilities of a row agree between
# the models, every row has tokens that either of them likes better, and the bonus row is one of its
# own, so that each mistake below shows.
TARGET_PROBS = ((0.40, 0.30, 0.20, 0.10), (0.10, 0.20, 0.30, 0.40), (0.25, 0.55, 0.05, 0.15))
DRAFT_PROBS = ((0.20, 0.50, 0.10, 0.20), (0.30, 0.10, 0.50, 0.10))


def _stop(chances: Sequence[float], passed: Sequence[int]) -> float:
    """Probability that exactly these drafts pass, each with a coin of its own."""
    return math.prod(a if ok else 1 - a for a, ok in zip(chances, passed, strict=True))


def _one_coin(chances: Sequence[float], passed: Sequence[int]) -> float:
    """The same when one coin, uniform on 0 to 1, is compared with every chance."""
    below = min((a for a, ok in zip(chances, passed, strict=True) if ok), default=1.0)
    above = max((a for a, ok in zip(chances, passed, strict=True) if not ok), default=0.0)
    return max(0.0, below - above)


def _leading(passed: Sequence[int]) -> int:
    """Drafts before the first that fails."""
    return (*passed, 0).index(0)


def _normed(weights: Tensor) -> Tensor:
    return weights / weights.sum() if weights.sum() > 0 else weights


def _residual(p: Tensor, q: Tensor, x: int) -> Tensor:
    return _normed((p - q).clamp_min(0))


def _overflow(p: Tensor, q: Tensor, x: int) -> Tensor:
    """The residual as it is drawn from without normalising: what is missing falls on the last."""
    short = (p - q).clamp_min(0)
    short[-1] += 1 - short.sum()
    return short


def _point(token: int, like: Tensor) -> Tensor:
    import torch

    return torch.zeros_like(like).index_fill_(0, torch.tensor(token), 1.0)


@dataclass(frozen=True)
class _Rule:
    """A rule of verification, right or wrong, whose outcomes can be enumerated.

    ``accept``, ``corrected`` take the rows of one position (target p, drafter q) and the token
    drafted there.
    """

    accept: Callable[[Tensor, Tensor, int], Tensor | float] = lambda p, q, x: min(1.0, p[x] / q[x])
    corrected: Callable[[Tensor, Tensor, int], Tensor] = _residual
    bonus: Callable[[Tensor, Sequence[int]], Tensor] = lambda p, drafted: p[-1]
    coins: Callable[[Sequence[float], Sequence[int]], float] = _stop
    count: Callable[[Sequence[int]], int] = _leading

    def outcomes(self, drafted: Sequence[int], p: Tensor, q: Tensor) -> Tensor:
        """Probability ``[n + 1, V]`` that so many drafts are accepted and this token follows."""
        n = len(drafted)
        chances = [float(self.accept(p[i], q[i], x)) for i, x in enumerate(drafted)]
        follow = [self.corrected(p[i], q[i], x) for i, x in enumerate(drafted)]
        follow.append(self.bonus(p, drafted))
        table = p.new_zeros(p.shape)
        for passed in itertools.product((0, 1), repeat=n):
            accepted = self.count(passed)
            table[accepted] += self.coins(chances, passed) * follow[accepted]
        return table


_MISTAKES = {
    "it accepts with draft_probs / target_probs: the ratio is upside down": _Rule(
        accept=lambda p, q, x: min(1.0, q[x] / p[x])
    ),
    "it accepts every draft: toss a coin against target_probs / draft_probs": _Rule(
        accept=lambda p, q, x: 1.0
    ),
    "it accepts no draft at all": _Rule(accept=lambda p, q, x: 0.0),
    "it accepts with target_probs alone: divide by draft_probs": _Rule(accept=lambda p, q, x: p[x]),
    "it accepts whenever the target finds the token likelier than the drafter does, and never"
    " otherwise: toss a coin against the ratio": _Rule(accept=lambda p, q, x: float(p[x] >= q[x])),
    "it accepts the target's likeliest token only, as greedy decoding does": _Rule(
        accept=lambda p, q, x: float(x == int(p.argmax()))
    ),
    "after a rejection it draws from the target: draw from the residual": _Rule(
        corrected=lambda p, q, x: p
    ),
    "after a rejection it draws from the drafter again": _Rule(corrected=lambda p, q, x: q),
    "the residual is upside down: target minus drafter": _Rule(
        corrected=lambda p, q, x: _residual(q, p, x)
    ),
    "the residual is not clamped: abs makes a surplus of what the drafter has too much of": _Rule(
        corrected=lambda p, q, x: _normed((p - q).abs())
    ),
    "the residual is not normalised: what it lacks to 1 falls on the last token": _Rule(
        corrected=_overflow
    ),
    "after a rejection it only rules out the rejected token: subtract all of draft_probs": _Rule(
        corrected=lambda p, q, x: _normed(p * (1 - _point(x, p)))
    ),
    "the corrected token is the residual's likeliest: draw it": _Rule(
        corrected=lambda p, q, x: _point(int((p - q).argmax()), p)
    ),
    "there is no bonus token: after a full acceptance it repeats the last draft": _Rule(
        bonus=lambda p, drafted: _point(drafted[-1], p[-1])
    ),
    "the bonus token comes from the row of the last draft: use the row after it,"
    " target_probs[n]": _Rule(bonus=lambda p, drafted: p[-2]),
    "the bonus token is the target's likeliest: draw it": _Rule(
        bonus=lambda p, drafted: _point(int(p[-1].argmax()), p[-1])
    ),
    "one coin decides every draft: toss a new one for each": _Rule(coins=_one_coin),
    "it counts drafts after the first rejection: these continue a text that is gone": _Rule(
        count=sum
    ),
}


def _p_value(counts: Tensor, expected: Tensor) -> float:
    """Chi-square test of counts against expected counts (any shape, several experiments at once)."""
    import torch

    possible = expected > 1e-9 * expected.max()
    if counts[~possible].any():
        return 0.0
    difference = (counts - expected)[possible] ** 2 / expected[possible]
    # Each experiment (leading dimension) has a fixed total: one degree of freedom less.
    degrees = int(possible.sum()) - counts.shape[0]
    half = torch.tensor([degrees / 2, float(difference.sum()) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*half))


def check_verify(
    answer: Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[int, int] | None],
    calls: int = 400,
    seed: int = 0,
) -> Verdict:
    """Check ``answer(drafted, draft_probs, target_probs, generator)`` against the lossless rule.

    Every draft of 2 out of 4 tokens is given to it ``calls`` times. What comes back is compared, by a
    chi-square test, with the probability of each outcome, enumerated; if that fails, with what
    the common mistakes would give.

    Parameters
    ----------
    answer
        Takes token ids ``[n]``, ``[n, V]`` and ``[n + 1, V]`` probabilities (float64) and a
        generator; returns the number of accepted drafts and the token that follows them.
    """
    import torch

    target_probs = torch.tensor(TARGET_PROBS, dtype=torch.float64)
    draft_probs = torch.tensor(DRAFT_PROBS, dtype=torch.float64)
    size, n = target_probs.shape[1], draft_probs.shape[0]

    def ask(drafted: Sequence[int], generator: torch.Generator) -> tuple[int, int] | Verdict:
        ids = torch.tensor(drafted)
        try:
            given = answer(ids, draft_probs.clone(), target_probs.clone(), generator)
        except Exception as error:  # whatever the student's code raises
            about = str(error).splitlines()[0] if str(error) else "no message"
            if "element < 0" in about:  # torch.multinomial's refusal
                about = "the residual has entries below 0 (clamp it), or is not a number"
            return Verdict(False, f"{type(error).__name__}: {about}")
        return _verified(given, n, size)

    drafts = list(itertools.product(range(size), repeat=n))
    for drafted in drafts:
        first, again = (ask(drafted, torch.Generator().manual_seed(seed)) for _ in range(2))
        if isinstance(first, Verdict):
            return first
        if first != again:
            return Verdict(
                False,
                "two calls with the same generator differ: give torch.rand and torch.multinomial"
                " generator=generator",
            )
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(len(drafts), n + 1, size, dtype=torch.float64)
    for row, drafted in enumerate(drafts):
        for _ in range(calls):
            given = ask(drafted, generator)
            if isinstance(given, Verdict):
                return given
            counts[row, given[0], given[1]] += 1

    def exact(rule: _Rule) -> Tensor:
        return torch.stack([rule.outcomes(d, target_probs, draft_probs) for d in drafts])

    found = _p_value(counts, calls * exact(_Rule()))
    if found > 1e-6:
        return Verdict(
            True,
            f"{len(drafts) * calls:,} rounds of {len(drafts)} drafts agree with the enumerated"
            f" outcomes (chi-square test, p = {found:.2g}): nothing is lost",
        )
    fits = {reason: _p_value(counts, calls * exact(rule)) for reason, rule in _MISTAKES.items()}
    reason = max(fits, key=fits.__getitem__)
    if fits[reason] > 1e-6:
        return Verdict(False, reason)
    return Verdict(False, _first_difference(drafts, counts, exact(_Rule())))


def _verified(given: object, n: int, size: int) -> tuple[int, int] | Verdict:
    """An answer to :func:`check_verify` as two whole numbers, or what is wrong with its form."""
    if given is None:
        return TODO
    if not isinstance(given, tuple | list) or len(given) != 2:
        return Verdict(False, f"return two things, (accepted, token), not {given!r}")
    if given[1] is None:
        return Verdict(False, "there is no token after the accepted drafts: there always is one")
    try:
        accepted, token = int(given[0]), int(given[1])
    except (TypeError, ValueError, RuntimeError):
        return Verdict(False, f"accepted and token must be whole numbers, not {given!r}")
    if not 0 <= accepted <= n:
        return Verdict(
            False,
            f"accepted counts drafts, from 0 to {n} here, without the token after: {accepted}",
        )
    if not 0 <= token < size:
        extra = ": is the residual normalised?" if token == size else ""
        return Verdict(False, f"token {token} is not in the vocabulary, 0 to {size - 1}{extra}")
    return accepted, token


def _first_difference(drafts: Sequence[Sequence[int]], counts: Tensor, right: Tensor) -> str:
    """Where counts ``[drafts, n + 1, V]`` leave the right probabilities: the earliest stage.

    The difference shown is the largest in standard errors.
    """
    n = counts.shape[1] - 1

    def errors(share: Tensor, expected: Tensor, trials: Tensor) -> Tensor:
        spread = (expected * (1 - expected) / trials.clamp_min(1)).clamp_min(1e-9).sqrt()
        return (share - expected).abs() / spread * (trials > 0)

    for i in range(n):
        trials = counts[:, i:].sum((1, 2))
        share = counts[:, i + 1 :].sum((1, 2)) / trials.clamp_min(1)
        expected = right[:, i + 1 :].sum((1, 2)) / right[:, i:].sum((1, 2)).clamp_min(1e-9)
        off = errors(share, expected, trials)
        if off.max() > 5:
            at = int(off.argmax())
            return (
                f"of the draft {tuple(drafts[at])}, token {i} (from 0) is accepted in"
                f" {float(share[at]):.0%} of the rounds that reach it, it should be in"
                f" {float(expected[at]):.0%}"
            )
    trials = counts.sum(2, keepdim=True)
    share = counts / trials.clamp_min(1)
    expected = right / right.sum(2, keepdim=True).clamp_min(1e-9)
    off = errors(share, expected, trials)
    at, accepted, token = (int(k) for k in (off == off.max()).nonzero()[0])
    which = "bonus" if accepted == n else "corrected"
    return (
        f"of the draft {tuple(drafts[at])}, with {accepted} accepted, the {which} token is {token} in"
        f" {float(share[at, accepted, token]):.0%} of the rounds, it should be in"
        f" {float(expected[at, accepted, token]):.0%}"
    )


# -------------------------------------------------------------------- lesson 02


def check_step_seconds(
    answer: Callable[[int, float, float], float | None],
    config: DecoderConfig,
    weight_bytes: int,
    dtype: torch.dtype,
    measured: Mapping[int, float],
    bandwidth: float,
    overhead: float,
) -> Verdict:
    """Check ``answer(context, bandwidth, overhead)``: seconds of one plain step.

    Parameters
    ----------
    measured
        Measured seconds by context in tokens; the right formula is compared with the longest.
    bandwidth, overhead
        Bytes per second and seconds, for that comparison.
    """
    speed, fixed, contexts = 20e9, 4e-3, (1_000, 16_000)  # any numbers tell a formula
    given = [answer(context, speed, fixed) for context in contexts]
    if any(value is None for value in given):
        return TODO
    if not all(isinstance(value, int | float) for value in given):
        return Verdict(False, f"return one number of seconds, not a {type(given[0]).__name__}")

    c, weights = config, weight_bytes

    def bytes_of(kv: float, weights: float = weights) -> Callable[[int], float]:
        return lambda context: (weights + kv * context) / speed + fixed

    kv = c.kv_bytes(1, dtype)
    right = bytes_of(kv)
    mistakes = {
        "values are kept as well as keys: a factor of 2 is missing": bytes_of(kv / 2),
        f"each of the {c.num_layers} layers keeps keys of its own": bytes_of(kv / c.num_layers),
        f"use the {c.num_kv_heads} KV heads, not the {c.num_heads} query heads": bytes_of(
            kv * c.num_heads / c.num_kv_heads
        ),
        f"there are {c.num_kv_heads} KV heads in a layer": bytes_of(kv / c.num_kv_heads),
        f"a head has {c.head_dim} numbers": bytes_of(kv / c.head_dim),
        f"a number takes {dtype.itemsize} bytes": bytes_of(kv / dtype.itemsize),
        "count bytes, not bits (the bandwidth is in bytes per second)": bytes_of(
            8 * kv, 8 * weights
        ),
        "the keys and values are in bits, the weights in bytes": bytes_of(8 * kv),
        "a step reads all the weights too": bytes_of(kv, 0),
        "a step reads the keys and values of the whole context": bytes_of(0),
        "the context is missing: these are the keys and values of one token": lambda context: (
            (weights + kv) / speed + fixed
        ),
        "add the overhead": lambda context: right(context) - fixed,
        "return seconds, not milliseconds": lambda context: 1e3 * right(context),
        "the bandwidth divides the bytes, it does not multiply them": lambda context: (
            (weights + kv * context) * speed + fixed
        ),
    }

    def same(formula: Callable[[int], float]) -> bool:
        pairs = zip(contexts, given, strict=True)
        return all(math.isclose(formula(n), value, rel_tol=1e-6) for n, value in pairs)

    if not same(right):
        for reason, formula in mistakes.items():
            if same(formula):
                return Verdict(False, reason)
        growth = (given[1] - given[0]) * speed / (contexts[1] - contexts[0])
        return Verdict(
            False,
            f"with {speed / 1e9:.0f} GB/s and {fixed * 1e3:.0f} ms of overhead your step at"
            f" {contexts[0]:,} tokens takes {given[0] * 1e3:.2f} ms, it should take"
            f" {right(contexts[0]) * 1e3:.2f}; your bytes grow by {growth:,.0f} a token, they"
            f" should by {kv:,}",
        )
    longest = max(measured)
    predicted, true = answer(longest, bandwidth, overhead), measured[longest]
    message = (
        f"the formula is right. At {longest:,} tokens it says {predicted * 1e3:.1f} ms, measured"
        f" {true * 1e3:.1f} ms"
    )
    if predicted < 0.9 * true:
        message += (
            f". The missing {(true - predicted) * 1e3:.1f} ms grow with the context: attention does"
            f" not get keys and values at the {bandwidth / 1e9:.0f} GB/s of one long plain read"
        )
    return Verdict(True, message)


# -------------------------------------------------------------------- lesson 03


def kept_positions(selection: Selection, length: int) -> Tensor:
    """Every position that a selection keeps of ``length`` tokens, its window included.

    Returns
    -------
    Tensor ``[B, H_kv, m + window]``.
    """
    import torch

    indices = selection.indices
    window = torch.arange(length - selection.window, length, device=indices.device)
    return torch.cat((indices, window.expand(*indices.shape[:2], -1)), -1)


def captured_mass(kept: Tensor, keys: Tensor, future: Tensor) -> Tensor:
    """Share of the attention of coming queries that falls on the kept entries, ``[B, H_kv]``.

    Parameters
    ----------
    kept
        Positions ``[B, H_kv, m]``, each once.
    keys
        All keys ``[B, H_kv, T, D]`` of one layer.
    future
        Queries ``[B, H, n, D]`` of the tokens that follow, scaled by ``1 / sqrt(D)``. Their attention
        to the ``T`` keys counts as 1; mean over the queries and over the heads that share a KV head.
    """
    from bdlib.attention import attention_weights

    mass = attention_weights(future, keys).mean((2, 3))  # [B, H_kv, T]
    return mass.gather(-1, kept).sum(-1)


def observed(policy: Policy, queries: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What a policy gets to see of all past queries ``[B, H, T, D]``, as a cache's log would tell it.

    Returns
    -------
    Queries ``[B, H, w, D]`` and their positions ``[w]``; two times ``None`` if it observes none.
    """
    import torch

    length = queries.shape[2]
    positions = torch.arange(length, device=queries.device)
    if policy.observe == "recent":
        positions = positions[max(0, length - policy.observed_queries) :]
    elif policy.observe == "sampled":
        positions = positions[:: max(1, -(-length // policy.observed_queries))]
    else:
        return None, None
    return queries[:, :, positions], positions


def check_policy(
    policy: Policy,
    keys: Sequence[Tensor],
    queries: Sequence[Tensor],
    future: Sequence[Tensor],
    budget: int = 128,
) -> Verdict:
    """Check a policy on real layers, and compare its captured mass with sink + window's.

    Parameters
    ----------
    keys, queries, future
        One tensor a layer: keys ``[B, H_kv, T, D]``, the ``T`` past queries ``[B, H, T, D]`` and the
        coming ones ``[B, H, n, D]``, which the policy does not see.
    """
    from bdlib.selection import make_policy

    reference = make_policy("sink_window")
    mine, theirs = [], []
    for layer, (k, q, coming) in enumerate(zip(keys, queries, future, strict=True)):
        selection = policy.select(k, budget, *observed(policy, q))
        if selection is None:
            return Verdict(None, "select returns None: return a Selection, run the cell again")
        if fault := _selection_fault(selection, k, q.shape[1], budget):
            return Verdict(False, f"layer {layer}: {fault}")
        length = k.shape[2]
        mine.append(captured_mass(kept_positions(selection, length), k, coming).mean())
        window = reference.select(k, budget, None, None)
        theirs.append(captured_mass(kept_positions(window, length), k, coming).mean())
    used = selection.indices.shape[-1] + selection.window
    yours, other = float(sum(mine)) / len(mine), float(sum(theirs)) / len(theirs)
    numbers = f"your policy captures {yours:.1%} of the mass, sink + window {other:.1%}"
    if yours <= other:
        spare = f"; you keep {used} entries of {budget}" if used < budget else ""
        return Verdict(False, f"{numbers}, both at budget {budget}{spare}")
    return Verdict(True, f"{numbers}, both at budget {budget}")


def _selection_fault(selection: Selection, keys: Tensor, heads: int, budget: int) -> str | None:
    """What is wrong with the form of a selection, or ``None``."""
    import torch

    from bdlib.selection import Selection

    if not isinstance(selection, Selection):
        return f"select returned a {type(selection).__name__}, return a Selection(indices, window)"
    indices, window = selection.indices, selection.window
    batch, kv_heads, length = keys.shape[:3]
    if isinstance(window, bool) or not isinstance(window, int) or not 0 <= window <= length:
        return f"window must be a whole number from 0 to {length}, got {window!r}"
    if not isinstance(indices, torch.Tensor) or indices.dtype != torch.int64:
        kind = getattr(indices, "dtype", type(indices).__name__)
        return f"indices must be an int64 tensor of positions, got {kind}"
    shape = tuple(indices.shape)
    if len(shape) == 3 and shape[1] == heads != kv_heads:
        return (
            f"indices have shape {shape}, one row a query head; the {heads // kv_heads} query heads"
            f" that share a KV head need one choice together: ({batch}, {kv_heads}, m)"
        )
    if len(shape) != 3 or shape[:2] != (batch, kv_heads):
        return f"indices must have shape ({batch}, {kv_heads}, m), got {shape}"
    if shape[2] + window > budget:
        return (
            f"{shape[2]} chosen and {window} of the window are {shape[2] + window} entries, the"
            f" budget is {budget}"
        )
    if not shape[2]:
        return None
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= length:
        return f"position {low if low < 0 else high} is outside the context, 0 to {length - 1}"
    if high >= length - window:
        return (
            f"position {high} is also in the window, which keeps {length - window} to"
            f" {length - 1}: choose among the positions before it"
        )
    ordered = indices.sort(-1).values
    twice = ordered[..., 1:] == ordered[..., :-1]
    if twice.any():
        return f"position {int(ordered[..., 1:][twice][0])} is chosen twice for one KV head"
    return None


# -------------------------------------------------------------------- lesson 05


def _lk_mistakes() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What common answers compute from logits and teacher probabilities ``[N, V]``, by complaint."""
    import torch

    def q(z: Tensor) -> Tensor:
        return z.softmax(-1)

    def overlap(z: Tensor, p: Tensor) -> Tensor:
        return torch.minimum(p, q(z)).sum(-1)

    def top(z: Tensor, p: Tensor) -> Tensor:
        return q(z).gather(-1, p.argmax(-1, keepdim=True))[:, 0]

    return {
        "this is 1 - alpha, the TV loss: take -log(alpha) instead": lambda z, p: (
            1 - overlap(z, p)
        ).mean(),
        "the log is missing: this is -alpha, whose gradient is TV's": lambda z, p: (
            -overlap(z, p).mean()
        ),
        "this is alpha itself, which should grow; the loss is -log(alpha)": lambda z, p: overlap(
            z, p
        ).mean(),
        "the sign is wrong: a loss falls when alpha grows": lambda z, p: overlap(z, p).log().mean(),
        "this is the cross-entropy of the target's favourite: it does not look at the target's other"
        " tokens": lambda z, p: -top(z, p).log().mean(),
        "only the target's favourite is summed: alpha takes the minimum over every token": (
            lambda z, p: -torch.minimum(top(z, p), p.amax(-1)).log().mean()
        ),
        "this is KL(p || q): there is no minimum in it": lambda z, p: (
            (torch.special.xlogy(p, p) - p * z.log_softmax(-1)).sum(-1).mean()
        ),
        "this is the cross-entropy with all of p, -sum p log q: there is no minimum in it": (
            lambda z, p: -(p * z.log_softmax(-1)).sum(-1).mean()
        ),
        "it sums max(p, q): alpha is the sum of min(p, q)": lambda z, p: (
            -torch.maximum(p, q(z)).sum(-1).log().mean()
        ),
        "it takes the largest min(p, q): alpha is their sum": lambda z, p: (
            -torch.minimum(p, q(z)).amax(-1).log().mean()
        ),
        "it averages min(p, q) over the vocabulary: alpha is their sum": lambda z, p: (
            -torch.minimum(p, q(z)).mean(-1).log().mean()
        ),
        "the log is taken after the mean over positions: take it at each position, then the mean": (
            lambda z, p: -overlap(z, p).mean().log()
        ),
        "it sums over positions: take their mean": lambda z, p: -overlap(z, p).log().sum(),
        "the log is to base 2: use the natural one": lambda z, p: -overlap(z, p).log2().mean(),
        "the softmax runs over positions: it must run over the vocabulary, dim=-1": lambda z, p: (
            -torch.minimum(p, z.softmax(0)).sum(-1).log().mean()
        ),
        "exp(logits) is not a distribution yet: use softmax": lambda z, p: (
            -torch.minimum(p, z.exp()).sum(-1).log().mean()
        ),
        "the target's probabilities went through a softmax: they are probabilities already": (
            lambda z, p: -torch.minimum(p.softmax(-1), q(z)).sum(-1).log().mean()
        ),
    }


def check_lk_alpha(
    loss: Callable[[Tensor, Tensor], Tensor | None],
    always_ce: Callable[[Tensor], Tensor | None],
    seed: int = 0,
) -> Verdict:
    """Check LK-alpha, and the student's condition for it to be the argmax cross-entropy.

    Parameters
    ----------
    loss
        ``loss(logits, target_probs)``, both ``[N, V]`` float64: mean over positions of -log alpha, a
        scalar that a gradient can flow through.
    always_ce
        ``always_ce(target_probs)``: for each row of ``[N, V]``, whether LK-alpha equals the
        cross-entropy of the argmax whatever the drafter says; booleans ``[N]``.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    logits = 2 * torch.randn(5, 6, **kind)
    general = (2 * torch.randn(5, 6, **kind)).softmax(-1)
    point = torch.zeros_like(general).scatter_(1, torch.tensor([[0], [5], [2], [2], [3]]), 1.0)

    def right(z: Tensor, p: Tensor) -> Tensor:
        return -torch.minimum(p, z.softmax(-1)).sum(-1).log().mean()

    for name, p in (("a general p", general), ("a point mass", point)):
        z = logits.clone().requires_grad_()
        try:
            given = loss(z, p.clone())
        except Exception as error:  # whatever the student's code raises
            return Verdict(False, f"{type(error).__name__}: {error}")
        if given is None:
            return TODO
        if not isinstance(given, torch.Tensor):
            return Verdict(False, f"return a tensor, not a {type(given).__name__}: no gradient")
        if given.dim():
            return Verdict(
                False, f"return one number, the mean over positions, not {tuple(given.shape)}"
            )
        wanted = right(z, p)
        if not torch.allclose(given.detach(), wanted.detach(), rtol=1e-6, atol=1e-9):
            return Verdict(False, _lk_complaint(given.item(), logits, p, name, wanted.item()))
        if not given.requires_grad:
            return Verdict(False, "the value is right, but no gradient reaches the logits")
        slope, wanted_slope = (torch.autograd.grad(v, z)[0] for v in (given, wanted))
        if not torch.allclose(slope, wanted_slope, rtol=1e-5, atol=1e-9):
            return Verdict(False, "the value is right, its gradient is not: is a part detached?")
    rows = torch.tensor(
        [[0, 1, 0], [0.4, 0.3, 0.3], [0.99, 0.01, 0], [1, 0, 0], [0.5, 0.5, 0]],
        dtype=torch.float64,
    )
    try:
        said = always_ce(rows.clone())
    except Exception as error:  # whatever the student's code raises
        return Verdict(False, f"always_ce: {type(error).__name__}: {error}")
    if said is None:
        return Verdict(None, "LK-alpha is right; now say when it is the cross-entropy: always_ce")
    said = torch.as_tensor(said)
    if said.shape != rows.shape[:1] or said.dtype != torch.bool:
        return Verdict(
            False, f"always_ce must give a bool a row, [{len(rows)}], not {tuple(said.shape)}"
        )
    for row, answer in zip(rows, said.tolist(), strict=True):
        values = tuple(row.tolist())
        if answer and row.max() < 1:
            return Verdict(
                False,
                f"LK-alpha is right, but for p = {values} it is not always the cross-entropy: try"
                " the drafter q = p, where LK-alpha is 0",
            )
        if not answer and row.max() == 1:
            return Verdict(
                False,
                f"LK-alpha is right, and for p = {values} it is the cross-entropy for every q: which"
                " terms of sum min(p, q) are left?",
            )
    return Verdict(True, "LK-alpha has the right value and gradient, and the condition holds")


def _lk_complaint(given: float, logits: Tensor, p: Tensor, name: str, wanted: float) -> str:
    for complaint, rule in _lk_mistakes().items():
        value = float(rule(logits, p))
        if math.isfinite(value) and math.isclose(given, value, rel_tol=1e-6, abs_tol=1e-9):
            return complaint
    return f"for {name} the loss should be {wanted:.4f}, yours is {given:.4f}"


# -------------------------------------------------------------------- lesson 06


def check_changed_run(
    settings: TrainSettings | None,
    entries: float | None,
    first_loss: float | None,
    recipe: Recipe,
    baseline: Sequence[Mapping[str, Any]],
    retrain: Callable[[TrainSettings], Sequence[Mapping[str, Any]]],
) -> Verdict:
    """Check a run with another lambda or other budgets, and two predictions about it; then train it.

    Parameters
    ----------
    settings
        The recipe's, with one of the two changed.
    entries
        Predicted: cache entries that a sparse view keeps on average.
    first_loss
        Predicted: the loss of step 0.
    baseline
        Log lines of the unchanged run.
    retrain
        ``retrain(settings)`` trains from the start and gives its log lines; called when all is right.
    """
    if settings is None:
        return TODO
    if fault := _change_fault(settings, recipe):
        return Verdict(False, fault)
    for name, value in (("my_entries", entries), ("my_first_loss", first_loss)):
        if value is None:
            return Verdict(None, f"the settings will do; now predict {name}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Verdict(False, f"{name} must be a number, not a {type(value).__name__}")
    steps = range(settings.steps)
    right = math.fsum(settings.budgets.expectation(step=s) for s in steps) / len(steps)
    if abs(entries - right) > 0.51:  # rounding to a whole entry is fine
        return Verdict(False, _entries_complaint(entries, right, settings, recipe.settings))
    first = baseline[0]
    full, sparse = first["full"]["loss"], [view["loss"] for view in first["views"]]
    weight, mean = settings.objective.weight, math.fsum(sparse) / len(sparse)
    wanted = full + weight * mean
    if not math.isclose(first_loss, wanted, rel_tol=0.01):
        mistakes = {
            "this is L_A alone; the sparse views add to it": full,
            "this is the loss of the unchanged run: what does your lambda make of its parts?": (
                full + recipe.settings.objective.weight * mean
            ),
            "lambda is missing: it multiplies the sparse views' loss": full + mean,
            "lambda multiplies the sparse views' loss alone, not L_A": weight * (full + mean),
            "lambda takes no weight from L_A, which counts in full": (1 - weight) * full
            + weight * mean,
            "the views' losses are averaged, not added up": full + weight * math.fsum(sparse),
        }
        nearest = min(mistakes, key=lambda complaint: abs(mistakes[complaint] - first_loss))
        if math.isclose(first_loss, mistakes[nearest], rel_tol=0.01):
            return Verdict(False, f"my_first_loss: {nearest}")
        return Verdict(
            False,
            f"my_first_loss: the unchanged run began with L_A = {full:.3f} and the views at"
            f" {mean:.3f} on average; the weights begin the same, so with lambda {weight:g} it"
            f" should be {wanted:.3f}, not {first_loss:.3f}",
        )
    lines = retrain(settings)
    late = len(lines) * 2 // 3

    def agreement(log: Sequence[Mapping[str, Any]]) -> str:
        full = [line["full"]["agreement"] for line in log[late:]]
        views = [view["agreement"] for line in log[late:] for view in line["views"]]
        return f"{sum(full) / len(full):.3f} in full, {sum(views) / len(views):.3f} sparse"

    return Verdict(
        True,
        f"a view keeps {right:g} entries on average, and the loss began at {lines[0]['loss']:.3f}"
        f" (predicted {first_loss:.3f}). Agreement in the last third: {agreement(lines)}; the"
        f" unchanged run: {agreement(baseline)}",
    )


def _change_fault(settings: object, recipe: Recipe) -> str | None:
    """Why settings are no changed run of a recipe, or ``None``."""
    from dataclasses import fields, replace

    from bdlib.training import TrainSettings

    default = recipe.settings
    if not isinstance(settings, TrainSettings):
        return (
            f"my_settings must be TrainSettings, not a {type(settings).__name__}: use"
            " replace(recipe.settings, objective=...) or replace(recipe.settings, budgets=...)"
        )
    reweighted = replace(default.objective, weight=settings.objective.weight)
    others = [
        field.name
        for field in fields(settings)
        if field.name not in ("objective", "budgets")
        and getattr(settings, field.name) != getattr(default, field.name)
    ]
    if settings.objective != reweighted:
        others.insert(0, "objective (more than its weight)")
    if others:
        return f"{', '.join(others)} changed too: keep all but lambda or the budgets as they are"
    moved = settings.objective != default.objective, settings.budgets != default.budgets
    if not any(moved):
        return "these are the settings of the run that you have: change lambda or the budgets"
    if all(moved):
        return "lambda and the budgets both changed: you could not tell which of them did it"
    window = max(recipe.windows)
    ever = {b for s in (0, settings.steps) for b in settings.budgets.probabilities(s)}
    if max(ever) > window:
        return f"a budget of {max(ever):,} keeps all of a window of {window:,} tokens: not sparse"
    return None


def _entries_complaint(
    given: float, right: float, settings: TrainSettings, default: TrainSettings
) -> str:
    chances = settings.budgets.probabilities()
    mistakes = {
        "this is the unchanged run's": default.budgets.expectation(),
        "weigh each budget by its probability: this is their plain average": math.fsum(chances)
        / len(chances),
        "this is the most frequent budget, not the average": max(chances, key=chances.__getitem__),
        "this is the largest budget, not the average": max(chances),
        "of one view, please, not of all views together": settings.views * right,
        "the block's own tokens count towards the budget: do not take them off": right
        - settings.block,
    }
    for complaint, value in mistakes.items():
        if abs(given - value) <= 0.51:
            return f"my_entries: {complaint}"
    parts = " + ".join(f"{p:g} x {b}" for b, p in chances.items())
    moving = "; they move, take the mean over the steps" if settings.budgets.end else ""
    return f"my_entries: {given:g} is not the sum of probability x budget ({parts}{moving})"


# -------------------------------------------------------------------- lesson 04


@dataclass(frozen=True)
class Access:
    """What one load or store of one program touched: ``elements`` counts from a tensor's beginning."""

    program: tuple[int, ...]
    tensor: str
    stored: bool
    elements: numpy.ndarray


class StrayAccess(RuntimeError):
    """A kernel in the interpreter read or wrote memory that belongs to none of its tensors."""


@contextmanager
def watch_memory(**tensors: Tensor) -> Iterator[list[Access]]:
    """Note what kernels touch of these contiguous tensors inside the block, masked lanes left out.

    Only in triton's interpreter, which reads whatever memory it is told to: here a kernel is stopped
    by :class:`StrayAccess`, wrapped in triton's own error, before it touches anything else.
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    plain_load = InterpreterBuilder.create_masked_load
    plain_store = InterpreterBuilder.create_masked_store
    seen: list[Access] = []

    def note(program: tuple[int, ...], pointers: Any, mask: Any, stored: bool) -> None:
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        addresses = pointers.data[lanes].astype(np.int64)
        places = {
            name: (addresses - tensor.data_ptr()) // tensor.element_size()
            for name, tensor in tensors.items()
        }
        if not addresses.size:
            return
        for name, elements in places.items():
            if elements.min() >= 0 and elements.max() < tensors[name].numel():
                seen.append(Access(program, name, stored, elements))
                return
        # The tensor that was meant: the one whose beginning or end is nearest.
        sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        far = {n: max(-e.min(), e.max() - sizes[n] + 1) for n, e in places.items()}
        name = min(far, key=far.__getitem__)
        outside = (places[name] < 0) | (places[name] >= sizes[name])
        side = "before the beginning" if places[name].min() < 0 else "past the end"
        raise StrayAccess(
            f"program {program[:2]} {'writes' if stored else 'reads'} {int(outside.sum())} elements"
            f" {side} of {name}: is it masked, and is the address right?"
        )

    def load(self, pointers, mask, *rest):
        note(self.grid_idx, pointers, mask, False)
        return plain_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        note(self.grid_idx, pointers, mask, True)
        return plain_store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = load
    InterpreterBuilder.create_masked_store = store
    try:
        yield seen
    finally:
        InterpreterBuilder.create_masked_load = plain_load
        InterpreterBuilder.create_masked_store = plain_store


def _apart(tensors: Mapping[str, Tensor], gap: int = 1 << 22) -> None:
    """Move contiguous tensors into one buffer, in order and ``gap`` bytes from each other.

    An address that goes astray is then nearest to the tensor that was meant, wherever the allocator had
    put the tensors; the pages of the gaps are never touched, so they take no memory.
    """
    import torch

    room = sum(tensor.nbytes // gap + 2 for tensor in tensors.values()) * gap
    buffer, begin = torch.UntypedStorage(gap + room), gap
    for tensor in tensors.values():
        moved = torch.empty(0, dtype=tensor.dtype)
        moved.set_(buffer, begin // tensor.element_size(), tensor.shape, tensor.stride())
        tensor.set_(moved.copy_(tensor))
        begin += (tensor.nbytes // gap + 2) * gap


def programs_by_row(
    seen: Sequence[Access], tensor: str, width: int, rows: int
) -> list[tuple[int, ...] | None]:
    """For each row of ``width`` elements of a tensor, the last program that touched it."""
    found: list[tuple[int, ...] | None] = [None] * rows
    for access in seen:
        if access.tensor == tensor:
            for row in set((access.elements // width).tolist()) & set(range(rows)):
                found[row] = access.program
    return found


def _run_kernel(
    kernel: Any, grid: tuple[int, ...], tensors: Mapping[str, Tensor], *rest: int, **constants: int
) -> list[Access] | Verdict:
    """Run a student's kernel in the interpreter; what it touched, or why it did not get that far."""
    import numpy as np

    from bdlib.kernels.lazy import Kernel, interpreted, triton_installed

    if not isinstance(kernel, Kernel):
        return Verdict(False, "put @kernel on the line above def")
    if not triton_installed():
        return Verdict(
            None, "triton is not installed here (it has wheels for Linux only): nothing was run"
        )
    if not interpreted():
        return Verdict(
            False, "TRITON_INTERPRET is not set: restart, and run the cell of imports first"
        )
    _apart(tensors)
    try:
        with np.errstate(all="ignore"), watch_memory(**tensors) as seen:
            kernel[grid](*tensors.values(), *rest, **constants)
    except Exception as error:  # whatever the student's code raises
        cause = error.__cause__ or error
        if isinstance(cause, StrayAccess):
            return Verdict(False, str(cause))
        about = str(cause).splitlines()[0] if str(cause) else "no message"
        return Verdict(False, f"{type(cause).__name__}: {about}")
    if not any(access.stored for access in seen):
        return Verdict(None, "the kernel stores nothing yet: write it, run the cell again")
    return seen


def _access_fault(
    seen: Sequence[Access], tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor]
) -> str | None:
    """What a kernel with program 0 of the grid at head 0, 1, ... read or wrote amiss, or ``None``.

    ``needed`` has a boolean per row of a tensor, heads first: what must be touched, and nothing else.
    """
    for access in seen:
        shape, head = tensors[access.tensor].shape, access.program[0]
        does = "writes" if access.stored else "reads"
        heads = access.elements // math.prod(shape[1:])
        if (wrong := heads[heads != head]).size:
            return (
                f"program {access.program[:2]} {does} {access.tensor} of head {wrong[0]}, and"
                f" should of head {head} only: how many elements does a head of {access.tensor}"
                f" take? Its shape here is {list(shape)}"
            )
        if access.stored and access.tensor != "out":
            return f"program {access.program[:2]} writes to {access.tensor}: store to out only"
    import torch

    for name, wanted in needed.items():
        width = tensors[name].numel() // wanted.numel()
        touched = torch.zeros(tensors[name].numel(), dtype=torch.bool)
        for access in seen:
            if access.tensor == name and access.stored == (name == "out"):
                touched[torch.from_numpy(access.elements)] = True
        touched = touched.view(*wanted.shape, width)
        verb = ("written", "write") if name == "out" else ("read", "read")
        if (extra := (touched.any(-1) & ~wanted).nonzero()).numel():
            head, row = extra[0].tolist()
            return f"row {row} of {name}, head {head}, is {verb[0]} and must not be: mask it"
        if (missing := (~touched.all(-1) & wanted).nonzero()).numel():
            head, row = missing[0].tolist()
            return f"row {row} of {name}, head {head}, is not (wholly) {verb[0]}"
    return None


def _traffic_fault(seen: Sequence[Access], least: int) -> str | None:
    """Whether keys and values are read more often than once; ``least`` in elements."""
    read = sum(a.elements.size for a in seen if not a.stored and a.tensor in ("k", "v"))
    if read <= 1.05 * least:
        return None
    return f"the result is right, but what is needed is read {read / least:.1f} times: read it once"


def _value_fault(
    found: Tensor, wanted: Tensor, mistakes: Mapping[str, Tensor], where: str
) -> str | None:
    """Which mistake explains a wrong result, or the first wrong entry."""
    import torch

    def agrees(expected: Tensor) -> bool:
        scale = float(expected.abs().max())
        return torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3 * scale)

    if agrees(wanted):
        return None
    for complaint, expected in mistakes.items():
        if agrees(expected):
            return f"{where}: {complaint}"
    error = (found.double() - wanted).abs().nan_to_num(math.inf)
    at = error.argmax()
    index = tuple(int(i) for i in torch.unravel_index(at, error.shape))
    return (
        f"{where}: out[{', '.join(map(str, index))}] is {found.flatten()[at]:.4g}, it should be"
        f" {wanted.flatten()[at]:.4g}"
    )


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    import torch

    return torch.randn(*shape, generator=generator)


def _guarded(*tensors: Tensor, room: int = 1 << 17) -> list[Tensor]:
    """Copies far apart in memory, so that a stray address is nearest to the tensor it was meant for."""
    copies = []
    for tensor in tensors:
        memory = tensor.new_zeros(tensor.numel() + 2 * room)
        copies.append(memory[room : room + tensor.numel()].view(tensor.shape).copy_(tensor))
    return copies


def check_chunk_scores(kernel: Any, lengths: Sequence[int] = (9, 63, 64, 100)) -> Verdict:
    """Check a kernel that scores the whole chunks of a cache against one query a KV head.

    It is started as ``kernel[(H_kv, ceil(chunks / BLOCK))](q, k, out, entries, chunks, D=, BLOCK=,
    CHUNK=)`` with ``q [H_kv, D]``, ``k [H_kv, entries, D]``, ``out [H_kv, chunks]`` in float32, NaN
    before; ``k`` holds NaN beyond each length, in tokens.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    trials = [
        # heads, head size, tokens a chunk, chunks a program, dtype, size of the values
        (1, 128, 8, 4, torch.float32, 1.0),
        (3, 64, 8, 4, torch.float32, 1.0),
        (2, 128, 4, 8, torch.float16, 1.0),
        (2, 64, 8, 16, torch.float16, 200.0),  # products overflow float16
    ]
    for i, length in enumerate(lengths):
        heads, dim, size, block, dtype, scale = trials[i % len(trials)]
        entries, chunks = length + 13, length // size
        q = (scale * _normal(generator, heads, dim)).to(dtype)
        k = (scale * _normal(generator, heads, entries, dim)).to(dtype)
        k[:, length:] = math.nan
        q, k, out = _guarded(q, k, torch.full((heads, chunks), math.nan))
        tensors = {"q": q, "k": k, "out": out}
        grid = (heads, -(-chunks // block))
        constants = {"D": dim, "BLOCK": block, "CHUNK": size}
        seen = _run_kernel(kernel, grid, tensors, entries, chunks, **constants)
        if isinstance(seen, Verdict):
            return seen
        kind = str(dtype).removeprefix("torch.")
        where = f"{length} tokens, CHUNK {size}, BLOCK {block}, D {dim}, {kind}"
        needed = {
            "k": (torch.arange(entries) < chunks * size).expand(heads, -1),
            "out": torch.ones_like(out, dtype=torch.bool),
        }
        if fault := _access_fault(seen, tensors, needed):
            return Verdict(False, f"{where}: {fault}")
        parts = k[:, : chunks * size].double().unflatten(1, (chunks, size))
        products = (parts * q.double()[:, None, None]).sum(-1)  # [heads, chunks, size]
        if scale > 1 and not out.isfinite().all():
            return Verdict(
                False,
                f"{where}: products of this size overflow float16; convert what you load with"
                " .to(tl.float32) before you multiply",
            )
        mistakes = {
            f"this is the sum over a chunk; the mean is 1/{size} of it": products.sum(-1),
            "this is the best key of each chunk, not the mean": products.amax(-1),
            "only the first key of each chunk counts": products[..., 0] / size,
            "only the last key of each chunk counts": products[..., -1] / size,
            "this is the score of each chunk's last key": products[..., -1],
            "it is scaled by 1/sqrt(D); the specification is not": products.mean(-1) / dim**0.5,
            "divide by CHUNK once": products.mean(-1) / size,
            "divide by CHUNK, not by D": products.sum(-1) / dim,
        }
        fault = _value_fault(out, products.mean(-1), mistakes, where)
        fault = fault or _traffic_fault(seen, heads * chunks * size * dim)
        if fault:
            return Verdict(False, fault)
    tried = ", ".join(map(str, lengths))
    return Verdict(
        True, f"right on {tried} tokens; every key of a whole chunk is read once, and no other"
    )


def check_sparse_decode(kernel: Any, lengths: Sequence[int] = (7, 63, 100, 64)) -> Verdict:
    """Check a kernel that attends to the chosen chunks of a cache, with one query a KV head.

    It is started as ``kernel[(H_kv,)](q, k, v, chunks, out, entries, length, count, D=, CHUNK=)``
    with ``q [H_kv, D]``, ``k`` and ``v [H_kv, entries, D]``, ``chunks [H_kv, count]`` int32, ``out
    [H_kv, D]`` in float32, NaN before; ``k`` and ``v`` hold NaN wherever nothing is to be read.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    trials = [
        # heads, head size, tokens a chunk, chunks chosen at most, dtype, size of the queries
        (1, 64, 8, 9, torch.float32, 0.3),  # all of them: the budget is above the length
        (3, 64, 8, 3, torch.float32, 0.3),
        (2, 128, 4, 6, torch.float16, 0.3),
        (2, 64, 8, 4, torch.float32, 1000.0),  # scores of 1e4
    ]
    for i, length in enumerate(lengths):
        heads, dim, size, most, dtype, scale = trials[i % len(trials)]
        entries, whole = length + 13, -(-length // size)
        count = min(most, whole)
        q = (scale * _normal(generator, heads, dim)).to(dtype)
        k, v = (_normal(generator, heads, entries, dim).to(dtype) for _ in range(2))
        order = torch.stack([torch.randperm(whole, generator=generator) for _ in range(heads)])
        # The last chunk, which may not be full, is chosen, and not last.
        others = order[order != whole - 1].view(heads, whole - 1)[:, : count - 1]
        last = torch.full((heads, 1), whole - 1)
        chunks = torch.cat([others[:, :1], last, others[:, 1:]], 1).int()
        at = (chunks[..., None] * size + torch.arange(size)).flatten(1).long()
        at = [row[row < length] for row in at]
        kept = torch.stack([torch.isin(torch.arange(entries), row) for row in at])
        k[~kept], v[~kept] = math.nan, math.nan
        q, k, v, chunks, out = _guarded(q, k, v, chunks, torch.full((heads, dim), math.nan))
        tensors = {"q": q, "k": k, "v": v, "chunks": chunks, "out": out}
        constants = {"D": dim, "CHUNK": size}
        seen = _run_kernel(kernel, (heads,), tensors, entries, length, count, **constants)
        if isinstance(seen, Verdict):
            return seen
        kind = str(dtype).removeprefix("torch.")
        where = f"{length} tokens, {count} chunks of {size}, D {dim}, {kind}"
        needed = {"k": kept, "v": kept, "out": torch.ones(heads, 1, dtype=torch.bool)}
        if fault := _access_fault(seen, tensors, needed):
            return Verdict(False, f"{where}: {fault}")
        if scale > 1 and not out.isfinite().all():
            return Verdict(
                False,
                f"{where}: scores reach 1e4 here and exp overflows; subtract the largest score so"
                " far before exp",
            )
        rules = _attention_mistakes(dim, size)
        results = {
            complaint: torch.stack(
                [rule(*(x.double() for x in (q[h], k[h, a], v[h, a]))) for h, a in enumerate(at)]
            )
            for complaint, rule in rules.items()
        }
        fault = _value_fault(out, results.pop(""), results, where)
        fault = fault or _traffic_fault(seen, 2 * int(kept.sum()) * dim)
        if fault:
            return Verdict(False, fault)
    tried = ", ".join(map(str, lengths))
    return Verdict(
        True, f"right on {tried} tokens; every chosen key and value is read once, and no other"
    )


def _attention_mistakes(
    dim: int, size: int
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What wrong kernels make of one query ``[D]``, keys and values ``[N, D]``; ``""`` is right.

    Keys come in the order of the chunks; the chunk that is not full is the second, or the only one.
    """
    import torch

    def online(q, k, v, acc_kept=True, z_kept=True):
        """Chunk by chunk, with or without rescaling of what was summed before."""
        partial = len(k) % size or size
        cuts = [partial] if len(k) <= size else [size, partial]
        cuts += [size] * ((len(k) - sum(cuts)) // size)
        m, z, acc = -math.inf, 0.0, torch.zeros_like(q)
        for keys, values in zip(k.split(cuts), v.split(cuts), strict=True):
            scores = keys @ q
            new_m = max(m, float(scores.max()))
            kept, weights = math.exp(m - new_m), (scores - new_m).exp()
            z = z * (kept if z_kept else 1.0) + weights.sum()
            acc = acc * (kept if acc_kept else 1.0) + weights @ values
            m = new_m
        return acc / z

    def padded(q, k, v):
        """With a score of 0 for every entry that the last chunk lacks."""
        lacking = -len(k) % size
        scores = torch.cat([k @ q, torch.zeros(lacking, dtype=q.dtype)])
        return scores.softmax(0)[: len(k)] @ v

    def last_only(q, k, v):
        partial = len(k) % size or size
        n = len(k) if len(k) <= size else (size if len(k) > size + partial else partial)
        return (k[-n:] @ q).softmax(0) @ v[-n:]

    return {
        "": lambda q, k, v: (k @ q).softmax(0) @ v,
        "the weighted sum is not divided by the sum of the weights, z": lambda q, k, v: (
            (k @ q - (k @ q).max()).exp() @ v
        ),
        "keys are summed where values should be": lambda q, k, v: (k @ q).softmax(0) @ k,
        "acc is not rescaled when a larger score comes: multiply it by exp(m - new_m)": (
            lambda q, k, v: online(q, k, v, acc_kept=False)
        ),
        "z is not rescaled when a larger score comes: multiply it by exp(m - new_m)": (
            lambda q, k, v: online(q, k, v, z_kept=False)
        ),
        "z and acc are not rescaled when a larger score comes: multiply both by exp(m - new_m)": (
            lambda q, k, v: online(q, k, v, acc_kept=False, z_kept=False)
        ),
        "entries past the length count with a score of 0: give them -inf before exp": padded,
        "only the last chunk counts: are z and acc added to, and is m kept for the next one?": (
            last_only
        ),
        "the query is scaled already: do not divide by sqrt(D) again": lambda q, k, v: (
            (k @ q / dim**0.5).softmax(0) @ v
        ),
        "this is the plain mean of the values: weigh them by exp(score - m)": lambda q, k, v: (
            v.mean(0)
        ),
    }


@dataclass(frozen=True)
class Built:
    """A kernel compiled for a target: its row of the table, and the machine code, if asked for."""

    row: Compiled
    sass: str


def compile_answer(
    kernel: Any,
    tiles: Sequence[Mapping[str, int]],
    targets: Sequence[str] = ("sm_80", "sm_90", "sm_100"),
    types: Mapping[str, str] | None = None,
    code: str | None = "sm_90",
) -> list[Built]:
    """Compile a kernel of a notebook for GPUs that need not be there, once a tile and target.

    The notebook's own process interprets kernels and cannot compile: the source goes to a new process.

    Parameters
    ----------
    kernel
        Decorated with ``@kernel``; its source may use ``tl`` and Python's own names only.
    tiles
        Values of the ``tl.constexpr`` arguments, ``num_warps`` and ``num_stages``.
    types
        Types of pointers that are not float16, such as ``{"out_ptr": "fp32"}``.
    code
        The target whose machine code is wanted as text too.

    Raises
    ------
    ValueError
        If it does not compile, with the compiler's last words.
    """
    import inspect
    import json
    import os
    import subprocess
    import sys
    import textwrap

    from bdlib.kernels.compiling import Compiled

    job = {
        "source": textwrap.dedent(inspect.getsource(kernel.fn)),
        "name": kernel.fn.__name__,
        "tiles": [dict(tile) for tile in tiles],
        "targets": list(targets),
        "types": dict(types or {}),
        "code": code,
    }
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "from bdlib import exercises; exercises._compile_job()"]
    done = subprocess.run(
        command, input=json.dumps(job), env=environment, capture_output=True, text=True
    )
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ValueError(f"{kernel.fn.__name__} does not compile: {' / '.join(words[-3:])}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [Built(Compiled(**row), sass) for row, sass in found]


def _compile_job() -> None:
    """What :func:`compile_answer` starts: a job on standard input, results on standard output."""
    import importlib.util
    import json
    import sys
    import tempfile
    from dataclasses import asdict
    from pathlib import Path

    import torch

    from bdlib.kernels import compiling
    from bdlib.kernels.launching import Configuration

    job = json.load(sys.stdin)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        # triton reads a kernel's source from its file.
        path = Path(folder) / "answer.py"
        header = "from __future__ import annotations\nfrom bdlib.kernels.lazy import kernel, tl\n\n"
        path.write_text(header + job["source"], encoding="utf-8")
        specification = importlib.util.spec_from_file_location("answer", path)
        module = importlib.util.module_from_spec(specification)
        sys.modules["answer"] = module
        specification.loader.exec_module(module)
        fn = getattr(module, job["name"])
        for tile in job["tiles"]:
            configuration = Configuration(fn, torch.float16, tile, job["types"])
            for name in job["targets"]:
                target = compiling.TARGETS[name]
                built = compiling.compile_kernel(configuration, target)
                row = compiling.examine(configuration, target)
                found.append((asdict(row), built.asm["sass"] if name == job["code"] else ""))
    print(json.dumps(found))


# -------------------------------------------------------------------- lesson 11


def _head_mistakes(target: Tensor, rows: Tensor, vocabulary: Tensor) -> dict[str, Tensor]:
    import torch

    zeros, floor, first = torch.zeros_like(target), torch.full_like(target, -1e4), target.clone()
    zeros[vocabulary], floor[vocabulary], first[: len(rows)] = rows, rows, rows
    turned = target.clone()
    turned[vocabulary] = rows.flip(0)
    return {
        "the trained rows are missing: this is the target's head": target,
        "this scores the draft vocabulary only: an engine expects a row for every token": rows,
        "rows outside the draft vocabulary are zero, and a score of 0 beats every negative one: the"
        " drafter would propose tokens it never learnt": zeros,
        "rows outside the draft vocabulary must be the target's; constant ones give scores that"
        " grow with the state's sum, not small ones": floor,
        "the trained rows stand first: row i of the small head belongs to token vocabulary[i]": first,
        "the trained rows are in another order than the vocabulary": turned,
    }


def check_full_head(full_head: Callable[[Tensor, Tensor, Tensor], Tensor] | None) -> Verdict:
    """Check ``full_head(target_head [V, C], rows [R, C], vocabulary [R]) -> [V, C]``."""
    import torch

    if full_head is None:
        return TODO
    generator = torch.Generator().manual_seed(11)
    target = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    rows = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    vocabulary, before = torch.tensor([1, 4, 6]), target.clone()
    try:
        given = full_head(target, rows, vocabulary)
    except Exception as error:  # whatever the student's code raises
        return Verdict(False, f"{type(error).__name__}: {error}")
    if given is None:
        return TODO
    if not isinstance(given, torch.Tensor):
        return Verdict(False, f"return a tensor, not a {type(given).__name__}")
    if not torch.equal(target, before):
        return Verdict(
            False, "the target's own head was written to: the target would change. Copy it first"
        )
    for complaint, wrong in _head_mistakes(target, rows, vocabulary).items():
        if given.shape == wrong.shape and torch.equal(given, wrong):
            return Verdict(False, complaint)
    if given.shape != target.shape:
        wanted = list(target.shape)
        return Verdict(False, f"the shape is {list(given.shape)}, an engine expects {wanted}")
    wanted = target.clone()
    wanted[vocabulary] = rows
    differ = [i for i in range(len(wanted)) if not torch.equal(given[i], wanted[i])]
    if differ:
        kind = "in" if differ[0] in vocabulary else "outside"
        return Verdict(
            False, f"row {differ[0]}, {kind} the draft vocabulary {vocabulary.tolist()}, is wrong"
        )
    return Verdict(True, "the trained rows where they belong, the target's elsewhere")


def check_serving_config(
    config: Mapping[str, Any] | None,
    folder: str,
    gpus: int,
    acceptance: float,
    draft_cost: float,
    verify_cost: float,
) -> Verdict:
    """Check a vLLM ``speculative_config`` for a standalone drafter in ``folder``.

    Parameters
    ----------
    gpus
        GPUs that share the target.
    acceptance, draft_cost, verify_cost
        Chance that a draft is accepted; costs in target steps. They decide the best draft length.
    """
    from bdlib.serving import check_vllm

    if config is None:
        return TODO
    if not isinstance(config, Mapping):
        return Verdict(False, f"give a dictionary, not a {type(config).__name__}")
    try:
        check_vllm(config, gpus)
    except ValueError as error:
        return Verdict(False, f"vLLM would refuse it: {error}")
    method = config.get("method", "draft_model")
    if method != "draft_model":
        return Verdict(
            False,
            f"method {method!r} is valid, but not for this drafter: it is a model of its own that"
            " reads token ids",
        )
    if config["model"] != folder:
        said = "the target" if "drafter" not in config["model"] else "another folder"
        return Verdict(False, f"model {config['model']!r} is {said}; the drafter is in {folder!r}")
    extra = sorted(set(config) - {"method", "model", "num_speculative_tokens"})
    extra = [name for name in extra if name != "draft_tensor_parallel_size"]
    if extra:
        return Verdict(False, f"{', '.join(extra)}: valid, but nothing here asks for it")

    def speedup(gamma: int) -> float:
        tokens = sum(acceptance**i for i in range(gamma + 1))
        return tokens / (gamma * draft_cost + verify_cost)

    best = max(range(1, 33), key=speedup)
    gamma = config["num_speculative_tokens"]
    if gamma != best:
        side = "shorter" if gamma > best else "longer"
        return Verdict(
            False,
            f"vLLM would take it, but {gamma} drafts a round give {speedup(gamma):.3f}x by the"
            f" formula, and a {side} draft gives more",
        )
    return Verdict(True, f"vLLM takes it, and {best} drafts are best: {speedup(best):.3f}x")


# -------------------------------------------------------------------- lesson 10


def paper_table(name: str) -> list[dict[str, Any]]:
    """Rows of ``data/paper/NAME.csv``: figures printed in arXiv 2606.00144, see the README there.

    Raises
    ------
    ValueError
        If there is no such table, or no checkout of the repository.
    """
    import csv

    from bdlib import assets

    root = assets.checkout()
    if root is None:
        raise ValueError("the paper's figures are in a checkout of the repository; run this in one")
    folder = root / "data" / "paper"
    known = sorted(path.stem for path in folder.glob("*.csv"))
    if name not in known:
        raise ValueError(f"no table {name!r}; allowed: {', '.join(known)}")
    whole, real = {"budget", "gamma"}, {"speedup", "acceptance", "tokens_per_second"}
    with (folder / f"{name}.csv").open(encoding="utf8", newline="") as stream:
        return [
            {k: int(v) if k in whole else float(v) if k in real else v for k, v in row.items()}
            for row in csv.DictReader(stream)
        ]


# Made-up rows: draft length, acceptance in percent, speed-up. Each mistake below picks other rows
# than the right answer does. The fourth lies on the bound, the fifth has nothing accepted.
BOUND_ROWS = (
    (5, 40.0, 2.5),
    (5, 20.0, 2.4),
    (10, 60.0, 5.0),
    (4, 25.0, 2.0),
    (8, 0.0, 1.0),
    (1, 50.0, 1.2),
    (5, 80.0, 6.5),
    (5, 80.0, 4.5),
    (5, 80.0, 3.0),
    (5, 40.0, 3.3),
)
_BOUND_MISTAKES: dict[str, Callable[[int, float], float]] = {
    "it leaves out the token that the target adds to every round": lambda g, a: g * a,
    "acceptance is printed in percent; divide by 100": lambda g, a: 1 + g * 100 * a,
    "it is the most that any draft can give, gamma + 1; use the row's acceptance": lambda g, a: (
        g + 1
    ),
    "(1 - a^(gamma+1)) / (1 - a) is an average for equal chances at every position, no bound: chances"
    " that differ can give more": lambda g, a: sum(a**i for i in range(g + 1)),
    "it counts one accepted draft a round at most; there are gamma": lambda g, a: 1 + a,
    "the target's own token is not accepted with some chance, it always comes": lambda g, a: (
        (g + 1) * a
    ),
}


def check_above_bound(
    above: Callable[[list[dict[str, Any]]], list[dict[str, Any]] | None] | None,
) -> Verdict:
    """Check ``above(rows)``, the rows whose speed-up no drafter can reach at their acceptance.

    It is tried on made-up rows, then used on the paper's (Table 1, panel A).
    """
    if above is None:
        return TODO
    names = ("gamma", "acceptance", "speedup")
    rows = [
        {"context": "4K", "text": f"made up {i}", "budget": 256, **dict(zip(names, v, strict=True))}
        for i, v in enumerate(BOUND_ROWS)
    ]
    try:
        given = above([dict(row) for row in rows])
    except Exception as error:  # whatever the student's code raises
        return Verdict(False, f"{type(error).__name__}: {error}")
    if given is None:
        return TODO
    if not isinstance(given, list) or not all(row in rows for row in given):
        return Verdict(False, "return a list of rows, each as it was given to you")

    def picked(bound: Callable[[int, float], float], slack: float = 1e-9) -> list[dict[str, Any]]:
        return [
            row
            for row in rows
            if row["speedup"] > bound(row["gamma"], row["acceptance"] / 100) + slack
        ]

    def most(gamma: int, a: float) -> float:
        return 1 + gamma * a

    right = picked(most)
    if given != right:
        if given == picked(most, -1e-9):
            return Verdict(False, "a row on the bound is possible; count only those above it")
        for complaint, bound in _BOUND_MISTAKES.items():
            if given == picked(bound):
                return Verdict(False, f"your bound is wrong: {complaint}")
        return Verdict(False, _bound_complaint(given, right, rows))
    found = above(paper_table("best"))
    cells = dict.fromkeys(f"{row['text']} at {row['context']}" for row in found)
    return Verdict(
        True,
        f"{len(found)} rows of Table 1 lie above the bound, all of one cell: {', '.join(cells)}",
    )


def _bound_complaint(
    given: list[dict[str, Any]], right: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> str:
    """What is wrong with the first row that is missing, too many, or in another place."""
    for row in rows:
        if (row in given) != (row in right):
            most = 1 + row["gamma"] * row["acceptance"] / 100
            what = "was not picked" if row in right else "was picked"
            return (
                f"a made-up row {what}: gamma {row['gamma']}, acceptance {row['acceptance']:g} %,"
                f" {row['speedup']:g}x, and a round gives {most:.2f} tokens at most"
            )
    return "the right rows, but not each once and in the order given"


# -------------------------------------------------------------------- lesson 07

_CELL_NAMES = ("text", "drafter", "policy", "budget", "context")
BUDGET_CELL = dict(zip(_CELL_NAMES, ("made up", "small", "sink_window", 256, 4096), strict=True))


def _budget_records() -> list[dict[str, Any]]:
    """Made-up windows around :data:`BUDGET_CELL`: each mistake below gives another number."""
    small = ("made up", "small")
    rows = [
        (*small, "sink_window", 256, 4096, "a", 0, 0.30),
        (*small, "sink_window", 256, 4096, "a", 900, 0.50),
        (*small, "sink_window", 256, 4096, "b", 0, 0.10),
        (*small, "full", None, 4096, "b", 0, 0.30),
        (*small, "full", None, 4096, "a", 0, 0.40),
        (*small, "full", None, 4096, "a", 900, 0.50),
        (*small, "full", None, 4096, "c", 0, 0.90),  # the cell has no such window
        (*small, "snapkv", 256, 4096, "a", 0, 0.62),
        (*small, "sink_window", 512, 4096, "a", 0, 0.71),
        (*small, "sink_window", 256, 8192, "a", 0, 0.15),
        (*small, "full", None, 8192, "a", 0, 0.17),
        ("made up", "large", "sink_window", 256, 4096, "b", 0, 0.83),
        ("made up", "large", "full", None, 4096, "b", 0, 0.99),
        ("other text", "small", "sink_window", 256, 4096, "a", 0, 0.77),
        ("other text", "small", "full", None, 4096, "a", 0, 0.96),
    ]
    names = (*_CELL_NAMES, "document", "offset", "agreement")
    return [
        dict(zip(names, row, strict=True)) | {"alpha": round(1 - row[-1] ** 2, 4)} for row in rows
    ]


def _budget_pairs(
    records: Sequence[Mapping[str, Any]],
    cell: Mapping[str, Any],
    ignored: str = "",
    matched: bool = True,
    column: str = "agreement",
) -> tuple[list[float], list[float]]:
    """Agreement in a cell and with the full cache, window by window (or not ``matched``)."""
    alike = [n for n in ("text", "drafter", "context") if n != ignored]
    inside = [n for n in _CELL_NAMES if n != ignored]
    sparse = [r for r in records if all(r[n] == cell[n] for n in inside) and r["policy"] != "full"]
    full = [r for r in records if r["policy"] == "full" and all(r[n] == cell[n] for n in alike)]
    if matched:

        def window(row: Mapping[str, Any]) -> tuple[Any, ...]:
            return row["document"], row["offset"]

        both = {window(r) for r in sparse} & {window(r) for r in full}
        sparse, full = ([r for r in rows if window(r) in both] for rows in (sparse, full))
        sparse, full = sorted(sparse, key=window), sorted(full, key=window)
    return [r[column] for r in sparse], [r[column] for r in full]


def _budget_mistakes(
    records: list[dict[str, Any]], cell: Mapping[str, Any]
) -> Iterator[tuple[str, float]]:
    from statistics import fmean

    def share(sparse: Sequence[float], full: Sequence[float]) -> float:
        return (fmean(full) - fmean(sparse)) / (1 - fmean(sparse))

    sparse, full = _budget_pairs(records, cell)
    s, f = fmean(sparse), fmean(full)
    yield (
        "the two means are over different windows: take those that the cell has, too",
        share(*_budget_pairs(records, cell, matched=False)),
    )
    yield "this is the difference of the agreements; divide it by the cell's misses", f - s
    yield "divide by the misses of this cell, not by those with the full cache", (f - s) / (1 - f)
    yield (
        "this is the part of the agreement that was lost; asked for is a share of misses",
        (f - s) / f,
    )
    yield "this is the part of the agreement that was kept; asked for is a share of misses", s / f
    yield (
        "the sign is wrong: a budget that costs something has a positive share",
        -share(sparse, full),
    )
    yield "this is the rest: the misses that the full cache makes as well", (1 - f) / (1 - s)
    each = [(b - a) / (1 - a) for a, b in zip(sparse, full, strict=True)]
    yield (
        "average the agreements first, then divide: a window with few misses weighs less",
        fmean(each),
    )
    yield (
        "this is alpha, the acceptance of sampling; the lesson's column is agreement",
        share(*_budget_pairs(records, cell, column="alpha")),
    )
    for name in _CELL_NAMES:
        yield (
            f"rows of another {name} are counted in",
            share(*_budget_pairs(records, cell, ignored=name)),
        )
        yield (
            f"rows of another {name} are counted in, and the windows differ",
            share(*_budget_pairs(records, cell, ignored=name, matched=False)),
        )


def check_budget_share(
    budget_share: Callable[[list[dict[str, Any]], dict[str, Any]], float | None] | None,
    records: Sequence[Mapping[str, Any]],
    cell: Mapping[str, Any],
) -> Verdict:
    """Check ``budget_share(records, cell)``: of a cell's misses, the share that the budget causes.

    It is tried on made-up windows, then used on those of ``records``.
    """
    from statistics import fmean

    if budget_share is None:
        return TODO
    made_up = _budget_records()
    try:
        given = budget_share([dict(row) for row in made_up], dict(BUDGET_CELL))
    except Exception as error:  # whatever the student's code raises
        return Verdict(False, f"{type(error).__name__}: {error}")
    if given is None:
        return TODO
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        return Verdict(False, f"return one number, not a {type(given).__name__}")
    sparse, full = _budget_pairs(made_up, BUDGET_CELL)
    right = (fmean(full) - fmean(sparse)) / (1 - fmean(sparse))
    if not math.isclose(given, right, abs_tol=1e-9):
        if math.isclose(given, 100 * right, abs_tol=1e-7):
            return Verdict(False, "give a share between 0 and 1, not percent")
        for complaint, wrong in _budget_mistakes(made_up, BUDGET_CELL):
            if math.isclose(given, wrong, abs_tol=1e-9):
                return Verdict(False, complaint)
        return Verdict(
            False,
            f"on made-up windows it gives {given:.4f}; there the cell agrees at {fmean(sparse):.2f},"
            f" and on the same windows the full cache at {fmean(full):.2f}",
        )
    try:
        found = budget_share([dict(row) for row in records], dict(cell))
    except Exception as error:  # whatever the student's code raises
        return Verdict(False, f"right on made-up windows; here {type(error).__name__}: {error}")
    place = f"{cell['drafter']}, {cell['text']}, {cell['budget']} of {cell['context']:,}"
    return Verdict(True, f"{place}: {found:+.1%} of the misses are the budget's")


# -------------------------------------------------------------------- lesson 08

# gamma, c (a drafted token) and v (the verification), in plain steps; the last two never pay.
BREAK_EVEN_CASES = (
    (1, 0.125, 1.05),
    (2, 0.125, 1.1),
    (4, 0.125, 1.15),
    (8, 0.05, 1.3),
    (4, 0.4, 1.2),
    (3, 0.0, 1.0),
    (4, 1.1, 1.2),
    (1, 0.5, 1.7),
)


def _least(tokens: Callable[[float, int], float], gamma: int, cost: float) -> float | None:
    """The least acceptance at which a round gives as many tokens as it costs steps."""
    if tokens(1.0, gamma) < cost - 1e-12:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if tokens(middle, gamma) >= cost else (middle, high)
    return high


def _series(a: float, gamma: int) -> float:
    return sum(a**k for k in range(gamma + 1))


_BREAK_EVEN_MISTAKES: dict[str, Callable[[int, float, float], float | None]] = {
    "verifying is not free of charge beyond a plain step: use v": lambda g, c, v: _least(
        _series, g, g * c + 1
    ),
    "every drafted token costs c, so a round of gamma costs gamma times as much": lambda g, c, v: (
        _least(_series, g, c + v)
    ),
    "1 + gamma a counts drafts behind a rejected one; they are thrown away": lambda g, c, v: _least(
        lambda a, n: 1 + n * a, g, g * c + v
    ),
    "the target's own token is missing: a round gives one even if every draft is rejected": (
        lambda g, c, v: _least(lambda a, n: _series(a, n) - 1, g, g * c + v)
    ),
    "that is right for gamma 1 alone; a longer draft gives a + a^2 + ... and costs gamma c": (
        lambda g, c, v: c + v - 1
    ),
    "the draft itself is left out: it costs gamma c on top of the verification": (
        lambda g, c, v: _least(_series, g, v)
    ),
}


def check_break_even(
    break_even: Callable[[int, float, float], float | None] | None, tolerance: float = 1e-3
) -> Verdict:
    """Check ``break_even(gamma, c, v)``: the acceptance from which on drafting pays.

    It is to return a number, or the word ``"never"`` where drafting does not pay even if every draft
    is accepted. (``None`` is an exercise that was not attempted.)
    """
    if break_even is None:
        return TODO
    given: list[Any] = []
    for gamma, c, v in BREAK_EVEN_CASES:
        try:
            given.append(break_even(gamma, c, v))
        except Exception as error:  # whatever the student's code raises
            at = f"break_even({gamma}, {c}, {v})"
            return Verdict(False, f"{at} raises {type(error).__name__}: {error}")
    if all(answer is None for answer in given):
        return TODO
    for answer, case in zip(given, BREAK_EVEN_CASES, strict=True):
        number = isinstance(answer, int | float) and not isinstance(answer, bool)
        if answer != "never" and not number:
            return Verdict(
                False, f"break_even{case} returns {answer!r}; return a number, or 'never'"
            )

    def agree(answer: Any, wanted: float | None) -> bool:
        if wanted is None or answer == "never":
            return wanted is None and answer == "never"
        return abs(answer - wanted) <= tolerance

    wanted = [_least(_series, gamma, gamma * c + v) for gamma, c, v in BREAK_EVEN_CASES]
    wrong = [i for i, (a, w) in enumerate(zip(given, wanted, strict=True)) if not agree(a, w)]
    if not wrong:
        return Verdict(True, f"all {len(wanted)} cases, to {tolerance:g}")
    # Where drafting never pays a mistake may show any number: compare the other cases.
    pays = [i for i, w in enumerate(wanted) if w is not None]
    if not set(wrong) & set(pays):
        case = BREAK_EVEN_CASES[wrong[0]]
        return Verdict(
            False,
            f"break_even{case} is {given[wrong[0]]!r}, yet a round costs more than the"
            f" {case[0] + 1} tokens it can give at most: return 'never'",
        )
    for complaint, mistake in _BREAK_EVEN_MISTAKES.items():
        if all(agree(given[i], mistake(*BREAK_EVEN_CASES[i])) for i in pays):
            return Verdict(False, complaint)
    i = next(i for i in wrong if i in pays)
    gamma, c, v = BREAK_EVEN_CASES[i]
    answer = given[i]
    if isinstance(answer, str) or not 0 <= answer <= 1:
        return Verdict(False, f"break_even{(gamma, c, v)} is {answer!r}: no acceptance in 0 to 1")
    return Verdict(
        False,
        f"break_even{(gamma, c, v)} is {answer:.3f}; at that acceptance a round gives"
        f" {_series(answer, gamma):.3f} tokens and costs {gamma * c + v:.3f} steps: make them equal",
    )


# -------------------------------------------------------------------- lesson 09

_MADE_UP_SPEEDS = (
    # document, method, engine, tokens/s by sample, acceptance, tokens a round, near-ties only
    ("a", "plain", "bdlib", (20,), None, 1.0, True),
    ("a", "self", "bdlib", (33,), 0.90, 3.8, True),
    ("a", "lookup", "bdlib", (45,), 0.60, 2.9, True),
    ("a", "small", "bdlib", (30,), 0.40, 2.2, True),
    ("a", "careless", "bdlib", (90,), 0.95, 4.0, False),
    ("b", "plain", "bdlib", (24,), None, 1.0, True),
    ("b", "lookup", "bdlib", (22,), 0.05, 1.1, True),
    ("b", "small", "bdlib", (20,), 0.30, 1.8, True),
    ("c", "plain", "bdlib", (20,), None, 1.0, True),
    ("c", "lookup", "bdlib", (25,), 0.10, 1.3, True),
    ("c", "self", "bdlib", (18,), 0.85, 2.4, True),
    ("c", "small", "bdlib", (41,), 0.50, 2.5, True),
    ("c", "careless", "bdlib", (90,), 0.95, 4.0, False),
    ("d", "plain", "bdlib", (20, 20), None, 1.0, True),
    ("d", "lookup", "bdlib", (80, 12), 0.40, 2.0, True),
    ("d", "small", "bdlib", (50, 48), 0.55, 2.7, True),
    ("e", "plain", "bdlib", (20,), None, 1.0, True),
    ("e", "lookup", "bdlib", (30,), 0.30, 1.7, True),
    ("f", "plain", "bdlib", (20,), None, 1.0, True),
    ("f", "lookup", "bdlib", (50,), 0.60, 2.9, True),
    ("f", "theirs", "transformers", (60,), 0.65, 3.0, True),
    ("f", "small", "bdlib", (30,), 0.40, 2.3, True),
)


def _losing_records() -> list[dict[str, Any]]:
    """Made-up records in which each mistake below shows."""
    return [
        {
            "document": document,
            "sample": sample,
            "method": method,
            "engine": engine,
            "tokens_per_second": float(speed),
            "acceptance_rate": acceptance,
            "accepted_length": length,
            "identical": ties,
            "near_ties_only": ties,
        }
        for document, method, engine, speeds, acceptance, length, ties in _MADE_UP_SPEEDS
        for sample, speed in enumerate(speeds)
    ]


def _losses(
    records: Sequence[Mapping[str, Any]],
    method: str,
    column: str = "tokens_per_second",
    out: Sequence[str] = (),
    engine: str | None = None,
    lossy: bool = False,
    average: Callable[[list[float]], float] = lambda values: sum(values) / len(values),
    winner: Callable[..., str] = max,
    others_only: bool = True,
) -> dict[str, str]:
    """Documents on which a method is beaten, and by whom."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        dropped = record["near_ties_only"] is False and not lossy
        dropped |= record["method"] in out or record[column] is None
        dropped |= engine is not None and record["engine"] != engine
        if not dropped:
            of = found.setdefault(record["document"], {})
            of.setdefault(record["method"], []).append(record[column])
    lost = {}
    for document, speeds in found.items():
        if method not in speeds:
            continue
        means = {name: average(values) for name, values in speeds.items()}
        best = winner(means, key=means.get)
        if best != method or not others_only:
            lost[document] = best
    return lost


def _first_faster(records: Sequence[Mapping[str, Any]], method: str) -> dict[str, str]:
    def first(means: Mapping[str, float], key: Callable[[str], float]) -> str:
        return next((name for name in means if means[name] > means[method]), method)

    return _losses(records, method, winner=first)


def _losing_mistakes(
    records: Sequence[Mapping[str, Any]], method: str
) -> Iterator[tuple[str, dict[str, str]]]:
    yield (
        "plain decoding is a rival, too: where it is faster, not to draft at all is right",
        _losses(records, method, out=("plain",)),
    )
    yield (
        "a method whose output is not the target's has won nothing: leave out records whose"
        " near_ties_only is False",
        _losses(records, method, lossy=True),
    )
    yield (
        "the highest acceptance is not the highest speed: compare tokens_per_second",
        _losses(records, method, "acceptance_rate"),
    )
    yield (
        "tokens a round leave out what a round costs: compare tokens_per_second",
        _losses(records, method, "accepted_length"),
    )
    yield (
        "methods of transformers count as well",
        _losses(records, method, engine="bdlib"),
    )
    yield (
        "one fast sample is not a fast document: average the samples of a document first",
        _losses(records, method, average=max),
    )
    yield (
        "name the fastest of those that are faster, not the first one found",
        _first_faster(records, method),
    )
    yield (
        "where the method is the fastest it loses to nobody: leave those documents out",
        _losses(records, method, others_only=False),
    )
    yield (
        "this names the slowest method; asked for is the fastest",
        _losses(records, method, winner=min),
    )
    everywhere = _losses([{**r, "document": ""} for r in records], method)
    documents = {r["document"] for r in records if r["method"] == method}
    yield (
        "a mean over all documents hides where it loses: compare document by document",
        dict.fromkeys(documents, everywhere[""]) if everywhere else {},
    )


def check_losses(
    where_it_loses: Callable[[list[dict[str, Any]], str], dict[str, str] | None] | None,
    records: Sequence[Mapping[str, Any]],
    method: str,
) -> Verdict:
    """Check ``where_it_loses(records, method)``: ``{document: fastest rival}`` where it is beaten.

    It is tried on made-up records, then used on ``records`` of :func:`bdlib.baselines.compare`.
    """
    if where_it_loses is None:
        return TODO
    made_up = _losing_records()
    try:
        given = where_it_loses([dict(record) for record in made_up], "small")
    except Exception as error:  # whatever the student's code raises
        return Verdict(False, f"{type(error).__name__}: {error}")
    if given is None:
        return TODO
    if not isinstance(given, Mapping):
        return Verdict(
            False, f"return a dictionary {{document: method}}, not a {type(given).__name__}"
        )
    right = _losses(made_up, "small")
    if dict(given) != right:
        for complaint, wrong in _losing_mistakes(made_up, "small"):
            if dict(given) == wrong:
                return Verdict(False, complaint)
        for document in sorted({*given, *right}):
            got, wanted = given.get(document), right.get(document)
            if got != wanted:
                speeds = ", ".join(
                    f"{r['method']} {r['tokens_per_second']:g}"
                    + ("" if r["near_ties_only"] else " (not the target's text)")
                    for r in made_up
                    if r["document"] == document
                )
                return Verdict(
                    False,
                    f"on made-up document {document!r} (tokens/s: {speeds}) it says {got!r}, where"
                    f" {'small loses to nobody' if wanted is None else repr(wanted) + ' is right'}",
                )
    try:
        found = where_it_loses([dict(record) for record in records], method)
    except Exception as error:  # whatever the student's code raises
        return Verdict(False, f"right on made-up records; here {type(error).__name__}: {error}")
    seen = len({record["document"] for record in records if record["method"] == method})
    lost = ", ".join(f"{document} to {rival}" for document, rival in found.items()) or "none"
    return Verdict(True, f"{method} is beaten on {len(found)} of {seen} documents: {lost}")


# a_low, a_high, gamma_low, gamma, c, m, v: acceptances, draft lengths, and costs in plain steps
TWO_LEVEL_CASES = (
    (0.5, 0.8, 2, 4, 0.1, 0.6, 1.1),
    (0.3, 0.9, 1, 6, 0.05, 0.2, 1.2),
    (0.7, 0.6, 4, 3, 0.2, 0.9, 1.05),
    (0.9, 0.95, 3, 8, 0.02, 0.1, 1.3),
    (0.0, 0.7, 2, 2, 0.1, 0.5, 1.15),
)


def _two_levels(
    a_low: float,
    a_high: float,
    gamma_low: int,
    gamma: int,
    c: float,
    m: float,
    v: float,
) -> float:
    token = (gamma_low * c + m) / _series(a_low, gamma_low)
    return _series(a_high, gamma) / (gamma * token + v)


_TWO_LEVEL_MISTAKES: dict[str, Callable[..., float]] = {
    "a round of the middle model gives more than one token: divide its cost by the tokens it gives": (
        lambda a, b, g, n, c, m, v: _series(b, n) / (n * (g * c + m) + v)
    ),
    "every draft of the small model costs c: gamma_low of them a round, not one": (
        lambda a, b, g, n, c, m, v: _series(b, n) / (n * (c + m) / _series(a, g) + v)
    ),
    "the middle model's own pass costs m in every lower round": (
        lambda a, b, g, n, c, m, v: _series(b, n) / (n * g * c / _series(a, g) + v)
    ),
    "a middle pass gives a token of its own on top of the accepted drafts": (
        lambda a, b, g, n, c, m, v: (
            _series(b, n) / (n * (g * c + m) / (_series(a, g) - 1) + v) if a else math.nan
        )
    ),
    "speed-ups of the two levels do not multiply: the verification is paid once, whatever the drafts cost": (
        lambda a, b, g, n, c, m, v: _series(a, g) * m / (g * c + m) * _series(b, n) / (n * m + v)
    ),
    "a_high is the target's acceptance of the middle model's tokens; a_low is in their price already": (
        lambda a, b, g, n, c, m, v: _series(a * b, n) / (n * (g * c + m) / _series(a, g) + v)
    ),
    "gamma tokens are proposed, and each has its price": (
        lambda a, b, g, n, c, m, v: _series(b, n) / ((g * c + m) / _series(a, g) + v)
    ),
    "the target's verification costs v, not one plain step": (
        lambda a, b, g, n, c, m, v: _series(b, n) / (n * (g * c + m) / _series(a, g) + 1)
    ),
    "1 + gamma a counts drafts behind a rejected one; use 1 + a + a^2 + ...": (
        lambda a, b, g, n, c, m, v: (1 + n * b) / (n * (g * c + m) / (1 + g * a) + v)
    ),
    "this is one level, the middle model without its small one": (
        lambda a, b, g, n, c, m, v: _series(b, n) / (n * m + v)
    ),
    "this is a time, the inverse of a speed-up": lambda *case: 1 / _two_levels(*case),
}


def check_two_levels(
    two_levels: Callable[..., float | None] | None, tolerance: float = 1e-6
) -> Verdict:
    """Check ``two_levels(a_low, a_high, gamma_low, gamma, c, m, v)``: the predicted speed-up."""
    if two_levels is None:
        return TODO
    given: list[Any] = []
    for case in TWO_LEVEL_CASES:
        try:
            given.append(two_levels(*case))
        except Exception as error:  # whatever the student's code raises
            return Verdict(False, f"two_levels{case} raises {type(error).__name__}: {error}")
    if all(answer is None for answer in given):
        return TODO
    for answer, case in zip(given, TWO_LEVEL_CASES, strict=True):
        if isinstance(answer, bool) or not isinstance(answer, int | float):
            return Verdict(False, f"two_levels{case} returns {answer!r}; return a number")

    def agrees(formula: Callable[..., float], cases: Sequence[tuple]) -> bool:
        return all(
            math.isclose(answer, formula(*case), rel_tol=tolerance)
            for answer, case in zip(given, TWO_LEVEL_CASES, strict=True)
            if case in cases
        )

    if agrees(_two_levels, TWO_LEVEL_CASES):
        return Verdict(True, f"all {len(TWO_LEVEL_CASES)} cases")
    for complaint, mistake in _TWO_LEVEL_MISTAKES.items():
        defined = [case for case in TWO_LEVEL_CASES if not math.isnan(mistake(*case))]
        if agrees(mistake, defined):
            return Verdict(False, complaint)
    case = next(
        c
        for c, answer in zip(TWO_LEVEL_CASES, given, strict=True)
        if not math.isclose(answer, _two_levels(*c), rel_tol=tolerance)
    )
    a_low, a_high, gamma_low, gamma, c, m, v = case
    return Verdict(
        False,
        f"two_levels{case} is {given[TWO_LEVEL_CASES.index(case)]:.4f}. There a lower round costs"
        f" {gamma_low * c + m:.2f} steps and gives {_series(a_low, gamma_low):.3f} tokens, a whole"
        f" round gives {_series(a_high, gamma):.3f} for {gamma} such tokens and {v} steps",
    )
