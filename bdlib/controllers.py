"""When does drafting pay, and how much of it? A cost model, and a controller that applies it online.

**The cost model.** A round drafts ``gamma`` tokens, verifies them in one pass of ``gamma + 1`` tokens,
and emits the accepted ones and one more. Let ``a_i`` be the probability that draft ``i`` is accepted
given that all before it were. Draft ``j`` is emitted when drafts 1 to ``j`` are all accepted, which has
probability ``a_1 ... a_j``. So a round emits, on average,

    E(gamma) = 1 + sum_{j=1..gamma} a_1 a_2 ... a_j                         tokens,

and with one ``a`` at every position this is ``(1 - a^(gamma+1)) / (1 - a)`` (Leviathan et al., arXiv
2211.17192, eq. 1). The round costs

    T(gamma) = draft(gamma) + verify(gamma + 1) + select + overhead         seconds.

Over many rounds tokens per second tend to ``E / T``: a ratio of means, not a mean of ratios, because
both add up. Plain decoding gives ``1 / plain``, so

    speed-up(gamma) = E(gamma) * plain / T(gamma).

With ``draft(gamma) = c gamma plain``, ``verify = plain`` and nothing else this is Theorem 3.8 of that
paper, ``(1 - a^(gamma+1)) / ((1 - a)(gamma c + 1))``. What is added here decides real cases: a
verification costs more than one step, acceptance falls along a draft, and choosing cache entries costs
time. The BudgetDraft paper (arXiv 2606.00144) picks the best ``gamma`` of a sweep for each context
afterwards; :class:`Controller` picks it while decoding, without a sweep, or drafts nothing at all.

**Drafts that end early.** Text has easy and hard stretches, and a drafter often knows which: a token
that it gave little probability is seldom accepted. The controller therefore asks for a draft of at
most so many tokens, to end once it is unlikely to be accepted so far (:class:`bdlib.drafters.Stop`).
Ending drafts by confidence is known (Mamou et al., arXiv 2405.04304; assisted generation in
transformers does it); here the threshold is no setting, it follows from the costs: a draft ends where
one more token costs more time than it is likely to give. And how likely a probability makes a token is
learned: in greedy decoding the two are nearly the same, but when sampling a token that its drafter
gave a twentieth is accepted nearly half of the time, because its target may well have given it as
little.

**The controller.** Contract: it sees only finished rounds, so its choices do not depend on the random
draws they are made for; where a draft ends depends on the tokens drafted so far, which are kept. So
output stays lossless. Its time is part of the rounds (phase ``select``).
What it can lose against plain decoding is bounded by an account, not only by its estimates: see
``max_loss`` of :class:`ControllerSettings`.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from bdlib.drafters import Drafter, ModelDrafter, Stop, sureness

if TYPE_CHECKING:
    from bdlib.decoding import Round

Acceptance = float | Sequence[float]
Cost = float | Mapping[int, float]


# -------------------------------------------------------------------- the cost model


def expected_tokens(alpha: Acceptance, gamma: int) -> float:
    """Tokens that a round of ``gamma`` drafts emits on average, the target's own included.

    Parameters
    ----------
    alpha
        Acceptance: one number, or for each draft position the probability that it is accepted given
        that all before it were (at least ``gamma`` of them).

    Raises
    ------
    ValueError
        For a probability outside [0, 1], a negative ``gamma``, or fewer positions than ``gamma``.
    """
    if isinstance(gamma, bool) or not isinstance(gamma, int) or gamma < 0:
        raise ValueError(f"gamma {gamma!r} must be a whole number of at least 0 tokens")
    alphas = [alpha] * gamma if isinstance(alpha, int | float) else alpha
    if len(alphas) < gamma:
        raise ValueError(f"acceptance of {len(alphas)} positions is given, gamma is {gamma}")
    total = reached = 1.0
    for a in [alpha] if isinstance(alpha, int | float) else alpha:
        if not 0 <= a <= 1:
            raise ValueError(f"acceptance {a} must be between 0 and 1")
    for a in alphas[:gamma]:
        reached *= a
        total += reached
    return total


@dataclass(frozen=True)
class Costs:
    """What the parts of a round cost, all in one unit (seconds, or plain steps).

    Attributes
    ----------
    plain
        One step of plain decoding.
    draft
        One drafted token; or a table of whole drafts, ``{tokens: cost}``.
    verify
        One verification, whatever its length; or a table ``{tokens in the pass: cost}``.
    select
        Choosing cache entries, per round on average.
    overhead
        Anything else that a drafting round costs beyond a plain one.

    Tables are read off in straight lines between their entries and beyond them; a table of one entry
    is level for ``verify`` and proportional for ``draft``.
    """

    plain: float = 1.0
    draft: Cost = 0.0
    verify: Cost = 1.0
    select: float = 0.0
    overhead: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.plain < math.inf:
            raise ValueError(f"plain {self.plain} must be a positive cost")
        for name in ("draft", "verify", "select", "overhead"):
            value = getattr(self, name)
            table = value.values() if isinstance(value, Mapping) else [value]
            if not table or not all(0 <= v < math.inf for v in table):
                raise ValueError(f"{name} {value} must be a cost of at least 0, or a table of such")

    def of_round(self, gamma: int) -> float:
        """Cost of a round that drafts ``gamma`` tokens; of a plain step for 0."""
        if gamma == 0:
            return self.plain
        draft, verify = self.draft, self.verify
        if isinstance(draft, Mapping):
            draft = _read({0: 0.0, **draft} if len(draft) == 1 else draft, gamma)
        else:
            draft = draft * gamma
        if isinstance(verify, Mapping):
            verify = _read(verify, gamma + 1)
        return draft + verify + self.select + self.overhead


def _read(table: Mapping[int, float], n: int) -> float:
    if n in table:
        return table[n]
    known = sorted(table)
    if len(known) == 1:
        return table[known[0]]
    right = next((i for i, k in enumerate(known) if k > n), len(known) - 1)
    a, b = known[max(0, right - 1)], known[max(1, right)]
    return max(0.0, table[a] + (table[b] - table[a]) * (n - a) / (b - a))


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says of rounds of ``gamma`` drafts: ``tokens`` and ``cost`` of one, speed-up.

    ``dearest`` is what a round costs in which all ``gamma`` are drafted; ``cost`` is less where drafts
    may end early or not be made at all.
    """

    gamma: int
    tokens: float
    cost: float
    speedup: float
    dearest: float


def predict(alpha: Acceptance, gamma: int, costs: Costs, offered: float = 1.0) -> Prediction:
    """Apply the cost model; ``gamma`` 0 is plain decoding.

    Parameters
    ----------
    offered
        Share of rounds in which the drafter has anything to propose (n-gram lookup often has not);
        the others are plain steps.
    """
    tokens = 1 + offered * (expected_tokens(alpha, gamma) - 1)
    whole = costs.of_round(gamma)
    cost = offered * whole + (1 - offered) * costs.plain
    return Prediction(gamma, tokens, cost, tokens * costs.plain / cost, whole)


def speedup(alpha: Acceptance, gamma: int, costs: Costs) -> float:
    """Predicted speed of decoding with drafts of ``gamma`` tokens over plain decoding."""
    return predict(alpha, gamma, costs).speedup


def best_gamma(alpha: Acceptance, costs: Costs, max_gamma: int = 12) -> int:
    """The draft length with the greatest predicted speed-up; 0 if none beats plain decoding."""
    if max_gamma < 1:
        raise ValueError(f"max_gamma {max_gamma} must be at least 1 token")
    return max(range(max_gamma + 1), key=lambda gamma: speedup(alpha, gamma, costs))


def break_even(gamma: int, costs: Costs) -> float | None:
    """The acceptance, equal at every position, at which drafts of ``gamma`` tokens cost nothing.

    Above it drafting pays. ``None`` if it does not pay even when every draft is accepted.
    """
    if gamma < 1:
        raise ValueError(f"gamma {gamma} must be at least 1 token")
    if speedup(1.0, gamma, costs) < 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):  # speed-up rises with acceptance: halve the interval
        middle = (low + high) / 2
        low, high = (low, middle) if speedup(middle, gamma, costs) >= 1 else (middle, high)
    return high


def acceptance_by_position(rounds: Sequence[Round]) -> list[float]:
    """For each draft position, accepted over tried: tried means that all before it were accepted."""
    trials: list[int] = []
    hits: list[int] = []
    for one in rounds:
        for i in range(min(len(one.drafted), one.accepted + 1)):
            if i == len(trials):
                trials.append(0)
                hits.append(0)
            trials[i] += 1
            hits[i] += i < one.accepted
    return [h / t for h, t in zip(hits, trials, strict=True)]


def measured_costs(plain: Sequence[Round], drafting: Sequence[Round]) -> Costs:
    """Costs in seconds from the rounds of two runs, one plain and one with a fixed ``gamma``.

    Medians of what each round needs; the mean of ``select``, which some rounds need and others not.
    The first round of each run (which sets things up) is left out where there are others, and so are
    lengths that fewer than a tenth of the rounds have: drafts cut short by the end of the text.

    Raises
    ------
    ValueError
        If the plain run has no rounds, or nothing was drafted in the other.
    """
    used = [r for r in drafting[1:] or drafting if r.drafted]
    if not plain or not used:
        raise ValueError("costs need a plain run, and a run that drafted")
    draft: dict[int, list[float]] = {}
    verify: dict[int, list[float]] = {}
    usual = Counter(len(r.drafted) for r in used)
    for one in used:
        if 10 * usual[len(one.drafted)] < len(used):
            continue
        draft.setdefault(len(one.drafted), []).append(one.seconds["draft"])
        verify.setdefault(len(one.drafted) + 1, []).append(one.seconds["verify"])
    return Costs(
        plain=median(round_seconds(r) for r in plain[1:] or plain),
        draft={n: median(values) for n, values in draft.items()},
        verify={n: median(values) for n, values in verify.items()},
        select=sum(r.seconds["select"] for r in used) / len(used),
    )


def round_seconds(one: Round) -> float:
    """Seconds of one round, the drafter's prefill left out."""
    return sum(s for phase, s in one.seconds.items() if phase != "prefill")


# -------------------------------------------------------------------- several drafters


def label(drafter: Drafter) -> str:
    """A short name for a drafter: who it is and its budget, if it has one."""
    budget = getattr(drafter, "budget", None)
    return drafter.name if budget is None else f"{drafter.name}, budget {budget}"


class Arms(Drafter):
    """Several drafters, one of which proposes in each round; a controller says which.

    The same drafter at several budgets is the usual case, with n-gram lookup beside it. Drafters that
    do not propose follow what is emitted and catch up when they are next used.

    Parameters
    ----------
    drafters
        At least one. Their needs must agree: one kind of query log at most, one set of taps at most.
    """

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self.drafters = tuple(drafters)
        if not self.drafters:
            raise ValueError("there are no drafters to choose from")
        if len(set(map(id, self.drafters))) < len(self.drafters):
            raise ValueError("one drafter is named twice; make another for each arm")
        taps = {d.taps for d in self.drafters if d.taps}
        looks = {
            (d.observe.observe, d.observe.observed_queries): d.observe
            for d in self.drafters
            if d.observe is not None and d.observe.observe != "none"
        }
        if len(taps) > 1 or len(looks) > 1:
            raise ValueError(
                "these drafters need different things of the target's cache:"
                f" taps {sorted(taps)}, queries {sorted(looks)}"
            )
        self.taps = next(iter(taps), ())
        self.observe = next(iter(looks.values()), None)
        self.name = " / ".join(map(label, self.drafters))
        self.use(0)

    def use(self, arm: int) -> None:
        """Let this one propose from now on."""
        self.arm = arm

    def start(self, prompt, cache, capacity):
        self._drafting_rounds = [0] * len(self.drafters)
        for i, drafter in enumerate(self.drafters):
            if isinstance(drafter, ModelDrafter):
                drafter.start(prompt, cache, capacity, self.drafters[:i])
            else:
                drafter.start(prompt, cache, capacity)
        self.use(0)

    def select(self, rounds: int) -> None:
        self.drafters[self.arm].select(self._drafting_rounds[self.arm])
        self._drafting_rounds[self.arm] += 1

    def propose(self, last, n, sampling, generator):
        self._last = last
        drafter = self.drafters[self.arm]
        drafter.stop = self.stop
        return drafter.propose(last, n, sampling, generator)

    def commit(self, emitted, accepted):
        for i, drafter in enumerate(self.drafters):
            if i == self.arm:
                drafter.commit(emitted, accepted)
            else:
                drafter.follow(self._last, emitted)

    def follow(self, last, emitted):
        for drafter in self.drafters:
            drafter.follow(last, emitted)

    @property
    def kv_entries(self) -> int:
        return max(d.kv_entries for d in self.drafters)

    @property
    def kv_bytes(self) -> int:
        return sum(d.kv_bytes for d in self.drafters)


# -------------------------------------------------------------------- the controller


@dataclass(frozen=True)
class ControllerSettings:
    """How the controller behaves.

    Attributes
    ----------
    max_gamma
        Most tokens it drafts in a round.
    max_loss
        Share of plain decoding's time that drafting may lose on one text. The controller keeps an
        account in plain steps: what drafting rounds took, less the tokens they gave. A round is
        drafted only if the account stays within the allowance even if every draft is rejected. Half
        of the allowance is there at the start (for 128 tokens at most), the rest grows with the text.
    memory
        Rounds after which evidence has faded to a third.
    prior, prior_rounds
        Acceptance that is assumed at the start, and how many rounds' evidence that is worth. A high
        prior makes it try; a small weight lets the first rounds decide.
    probe_after, probe_most
        Rounds without drafting after which it tries again; the wait doubles each time up to the second.
    recheck
        Drafting rounds after which it takes one plain step, to know what one costs now. At first, and
        while drafting hardly pays, it does so sooner.
    optimism
        Standard deviations of acceptance added when drafters are compared, so that one that is little
        known gets tried.
    margin
        Predicted gain that is needed to start drafting again.
    """

    max_gamma: int = 12
    max_loss: float = 0.025
    memory: float = 128.0
    prior: float = 0.6
    prior_rounds: float = 2.0
    probe_after: int = 8
    probe_most: int = 48
    recheck: int = 96
    optimism: float = 1.0
    margin: float = 0.02

    def __post_init__(self) -> None:
        for name in ("max_gamma", "probe_after", "probe_most", "recheck"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r} must be a whole number of at least 1")
        if self.probe_most < self.probe_after:
            raise ValueError(
                f"probe_most {self.probe_most} must be at least probe_after {self.probe_after}"
            )
        if not 0 < self.max_loss <= 1:
            raise ValueError(f"max_loss {self.max_loss} must be above 0 and at most 1")
        if not 0 < self.prior < 1:
            raise ValueError(f"prior {self.prior} must be between 0 and 1")
        for name, least in (("memory", 2), ("prior_rounds", 0.5)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least} rounds")
        for name in ("optimism", "margin"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0")


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do in a round: ``gamma`` drafts (0: a plain step) by drafter ``arm``, and why.

    ``stop`` may end the draft before it has ``gamma`` tokens.
    """

    gamma: int
    arm: int
    why: str
    stop: Stop | None = None


class _Curve:
    """Seconds against tokens, from recent rounds; guessed in a straight line where none are."""

    RECENT = 15  # rounds of each length that count
    TRUST = 2.0  # rounds at which a length's own median weighs as much as the line
    STIFF = 4.0  # how strongly the line keeps to the slope expected of it

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._points: dict[int, tuple[float, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._seen)

    def add(self, n: int, seconds: float) -> None:
        recent = self._seen.setdefault(n, deque(maxlen=self.RECENT))
        recent.append(seconds)
        self._points[n] = (median(recent), len(recent))

    def table(self, first: int, last: int, slope: float | None = None) -> list[float]:
        """Seconds for ``first`` to ``last`` tokens.

        ``slope`` is expected per token until the measurements say better (None: proportional).
        """
        points = self._points
        weight = sum(c for _, c in points.values())
        n0 = sum(n * c for n, (_, c) in points.items()) / weight
        y0 = sum(y * c for y, c in points.values()) / weight
        top, bottom = self.STIFF * (y0 / n0 if slope is None else slope), self.STIFF
        for n, (y, c) in points.items():
            top += c * (n - n0) * (y - y0)
            bottom += c * (n - n0) ** 2
        line = max(0.0, top / bottom)
        out = [y0 + line * (n - n0) for n in range(first, last + 1)]
        for n, (y, c) in points.items():
            if first <= n <= last:
                out[n - first] = (c * y + self.TRUST * out[n - first]) / (c + self.TRUST)
        return out


class _Rates:
    """A chance for each draft position: counts that fade, each position leaning on the one before."""

    def __init__(self, most: int, mean: float, rounds: float, chain: float) -> None:
        self.trials, self.hits = [0.0] * most, [0.0] * most
        self.trials[0], self.hits[0] = rounds, rounds * mean
        self.chain = chain  # rounds' evidence that the position before is worth for the next one

    def add(self, position: int, hit: bool) -> None:
        self.trials[position] += 1
        self.hits[position] += hit

    def scale(self, factor: float) -> None:
        """Let the evidence weigh more or less; the chances stay."""
        self.trials = [t * factor for t in self.trials]
        self.hits = [h * factor for h in self.hits]

    def means(self, optimism: float = 0.0) -> list[float]:
        """Posterior mean by position; plus so many standard deviations."""
        means, lean, mean = [], 0.0, 0.0
        for hits, trials in zip(self.hits, self.trials, strict=True):
            weight = trials + lean
            mean = (hits + lean * mean) / weight
            bonus = optimism * math.sqrt(mean * (1 - mean) / (weight + 1)) if optimism else 0.0
            means.append(min(1.0, mean + bonus))
            lean = self.chain
        return means


class _Arm:
    """What is known of one drafter: acceptance by position, how far it drafts, its times.

    A draft may end before it has as many tokens as were asked for: when the drafter is unsure (its
    ``stop``), or has nothing to say. So two chances are kept for each position: ``emitted``, that
    the draft comes so far *and* is accepted there, given that all before it was, which is what tokens
    come from; and ``going``, that it comes so far, accepted or not, which is what costs come from.
    """

    SHARES = (0.35, 0.5, 0.7, 0.8, 0.9)  # accepted by sureness, until it is known better
    SHARES_ROUNDS = 4.0  # how many tokens' evidence that is worth
    FAST = 0.8  # fading of the short memory, per round
    ALARM = 3.0  # standard deviations between the two memories that mean a change
    UNLIKELY = 0.0005  # chance of so many rounds in a row with nothing accepted that means a change

    def __init__(self, name: str, settings: ControllerSettings) -> None:
        self.name = name
        self._keep = math.exp(-1 / settings.memory)
        self._prior, self._prior_rounds = settings.prior, settings.prior_rounds
        most, rounds = settings.max_gamma, settings.prior_rounds
        self.emitted = _Rates(most, settings.prior, rounds, chain=12.0)
        self.going = _Rates(most, 1.0, rounds, chain=4.0)
        self._judged, self._agreed = rounds, rounds * settings.prior  # drafts that were looked at
        # A matter of the drafter and of how tokens are chosen, not of the text: it does not fade.
        self._sure = [[self.SHARES_ROUNDS, self.SHARES_ROUNDS * share] for share in self.SHARES]
        self._fast_trials = self._fast_hits = self._fast_squares = 0.0
        self._misses, self._before = 0, settings.prior
        self.asked, self.offers = 1.0, 1.0  # as if it had proposed once
        self.draft = _Curve()
        self.selecting: deque[float] = deque(maxlen=32)
        self.rounds = 0
        self.hope, self.stale = 0.0, 0  # speed-up to hope for, and rounds since it was worked out

    def fade(self) -> None:
        self.emitted.scale(self._keep)
        self.going.scale(self._keep)
        self._judged *= self._keep
        self._agreed *= self._keep

    def forget(self) -> None:
        """Not asked in this round: what is known goes back towards the prior, twice as fast."""
        self.fade()
        self.fade()
        back = (1 - self._keep**2) * self._prior_rounds
        self.emitted.trials[0] += back
        self.emitted.hits[0] += back * self._prior

    def doubt(self, rounds: float) -> None:
        """Keep the means, and let them weigh no more than this many rounds."""
        self.emitted.scale(rounds / max(rounds, self.emitted.trials[0]))

    def learn(self, asked: int, drafted: int, accepted: int, chances: Sequence[float] = ()) -> bool:
        """Take in a round; whether the last few contradict what was known: the text has changed."""
        self.asked = self.asked * self._keep + 1
        self.offers = self.offers * self._keep + (drafted > 0)
        if not drafted:
            return False
        asked = min(asked, len(self.emitted.trials))
        for i in range(min(asked, accepted + 1)):
            self.emitted.add(i, i < accepted)
        for i in range(min(asked, drafted + 1)):
            self.going.add(i, i < drafted)
        self._judged += min(drafted, accepted + 1)
        self._agreed += accepted
        for i, probability in enumerate(chances[: accepted + 1]):
            seen = self._sure[sureness(probability)]
            seen[0] += 1
            seen[1] += i < accepted
        trials, hits = self.emitted.trials, self.emitted.hits
        self._fast_trials = self._fast_trials * self.FAST + 1
        self._fast_hits = self._fast_hits * self.FAST + (accepted > 0)
        self._fast_squares = self._fast_squares * self.FAST**2 + 1
        fast, slow = self._fast_hits / self._fast_trials, hits[0] / trials[0]
        rounds = self._fast_trials**2 / self._fast_squares  # as many equal weights vary as little
        spread = math.sqrt(max(0.02, slow * (1 - slow)) / rounds)
        if accepted:
            self._misses = 0
            self._before = hits[0] / trials[0]
        else:
            self._misses += 1
        if self._misses > 2 and (1 - self._before) ** self._misses < self.UNLIKELY:
            hits[0], self._before = trials[0] / 4, 0.0
            return True
        if self._fast_trials > 2 and abs(fast - slow) > self.ALARM * spread:
            hits[0] = trials[0] * fast
            return True
        return False

    @property
    def acceptance(self) -> float:
        """Chance that a drafted token is accepted, given that all before it were; at any position."""
        return self._agreed / self._judged

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of accepted tokens by how sure the drafter was of them, as :class:`Stop` wants them."""
        return tuple(hits / trials for trials, hits in self._sure)


class Controller:
    """Chooses, round by round, how many tokens to draft, by which drafter, or to draft nothing.

    :func:`bdlib.decoding.decode` calls :meth:`start` once, and around each round :meth:`choose` and
    :meth:`record`. The first round drafts a single token, to know what that costs. Then the cost model is
    applied to what is known: acceptance by position (a Beta posterior whose evidence fades, and fades
    at once when the last few rounds contradict it) and running medians of the measured times. What a
    plain step costs is read off the verifications at first; one is taken as soon as the gain is not
    plain to see, and after :attr:`UNTIMED` rounds in any case. Drafts end early where the drafter is
    unsure. When no draft length pays it stops drafting, and tries a single draft at growing intervals.

    Each :meth:`start` forgets what was learned: a text is judged by itself.
    """

    DRAFTS = 0.8  # share of the allowance that is for drafting; the rest is kept for probes
    PATIENCE = 1.0  # standard deviations of acceptance that must not pay either before it stops
    DOUBT = 3.0  # rounds' evidence that is left when drafting stops or the text has changed
    VERIFY_SLOPE = 0.03  # of a plain step, for each further token, until measured
    DRAFT_GUESS = 0.15  # of a plain step, for each drafted token, until measured
    CLOSE = 1.15  # predicted speed-up below which the cost of a plain step matters most
    UNSURE = 1.3  # the same while no plain step has been timed
    UNTIMED = 4  # rounds after which the first plain step is taken, however large the gain looks
    DISTURBED = 1.5  # of its usual time: what is above that is not the drafts' doing
    UPFRONT = 128  # tokens for which half of the allowance is there at the start
    FIRST = Choice(0, 0, "plain step: to learn what one costs")

    def __init__(self, settings: ControllerSettings | None = None) -> None:
        self.settings = settings or ControllerSettings()
        self.start(["drafter"], 1)

    def start(self, arms: Sequence[str], max_new_tokens: int) -> None:
        """Begin a text: names of the drafters, and how many tokens may be generated."""
        if not arms:
            raise ValueError("there are no drafters to choose from")
        self._arms = [_Arm(name, self.settings) for name in arms]
        self._plain: deque[float] = deque(maxlen=_Curve.RECENT)
        self._verify = _Curve()
        self._guesses: deque[float] = deque(maxlen=_Curve.RECENT)  # a plain step, by verifications
        self._step = 1.0  # seconds of a plain step; a unit until anything was timed
        self._spent = 0.0  # seconds of rounds that drafted, and the tokens they gave
        self._got = 0
        self._upfront = min(max_new_tokens, self.UPFRONT)
        self._emitted = 0
        self._since_plain, self._close = 0, False
        self._recheck = min(4, self.settings.recheck)
        self._skipped = [0] * len(self._arms)  # tokens each drafter has to catch up with
        self._off = self._surprise = False
        self._interval = self.settings.probe_after
        self._wait = self._streak = 0
        self._choice = self._idle = Choice(0, 0, "nothing was chosen yet")

    # ---------------------------------------------------------------- before a round
    def choose(self, left: int) -> Choice:
        """What to do next, with ``left`` tokens to go."""
        self._choice = self._decide(min(self.settings.max_gamma, left - 1))
        return self._choice

    def _decide(self, most: int) -> Choice:
        if most < 1:
            return Choice(0, 0, "plain step: the last token is always the target's own")
        if not self._plain:
            if self._since_plain >= (1 if self._close else self.UNTIMED):
                return self.FIRST
        elif self._since_plain >= (self._recheck if self._close else self.settings.recheck):
            self._recheck = min(2 * self._recheck, self.settings.recheck)
            return Choice(0, 0, "plain step: to see what one costs now")
        if self._wait > 0 and not self._surprise:
            self._wait -= 1
            return self._idle
        arm, options = self._outlook(most)
        if not self._arms[arm].draft:
            options = options[:1]  # one draft tells what drafts cost
        best = max(options, key=lambda p: p.speedup)
        if best.speedup <= 1 and not self._plain:
            return self.FIRST
        if best.speedup <= 1 and not self._off:  # is that certain enough to stop?
            options = self._predictions(self._arms[arm], most, self.PATIENCE)[: len(options)]
            best = max(options, key=lambda p: p.speedup)
        if best.speedup > 1 + self.settings.margin * self._off:
            kind = "draft"
            affordable = [p for p in options if self._affordable(p)]
            found = max(affordable, key=lambda p: p.speedup, default=best)
            best = found if found.speedup > 1 else best
        elif not self._off:
            return self._stop(arm, best)
        else:
            kind, best = "probe", options[0]
            if not self._surprise:  # else the last probe was accepted: ask once more
                self._arms[arm].doubt(self.DOUBT)
                self._interval = min(2 * self._interval, self.settings.probe_most)
            self._wait = self._interval
        if not self._affordable(best, 1.0 if kind == "probe" else self.DRAFTS):
            if not self._plain:
                return self.FIRST
            self._wait = max(self._wait, 2)
            self._surprise = False
            self._idle = Choice(
                0, arm, f"plain step: drafting has lost {self._loss:.1f} steps, no more is allowed"
            )
            return self._idle
        if kind == "draft":
            if self._off:
                self._off, self._streak, self._wait = False, 0, 0
            self._close = best.speedup < (self.CLOSE if self._plain else self.UNSURE)
            stop = self._stop_of(arm, options[0], best)
            return Choice(best.gamma, arm, self._reason(arm, best), stop)
        return Choice(1, arm, f"probe: one draft, to see whether it pays now ({self._gain(best)})")

    def _stop(self, arm: int, best: Prediction) -> Choice:
        """Draft no more, until a probe says otherwise."""
        if self._streak >= 8:  # it had paid for a while: look again soon
            self._interval = self.settings.probe_after
        self._off, self._wait = True, self._interval - 1
        for one in self._arms:
            one.doubt(self.DOUBT)
        chance = self._arms[arm].emitted.means()[0]
        self._idle = Choice(
            0,
            arm,
            f"plain step: no draft pays; the best, {best.gamma} by {self._arms[arm].name} at"
            f" acceptance {chance:.2f}, would give {best.speedup:.2f}x",
        )
        return self._idle

    def _outlook(self, most: int) -> tuple[int, list[Prediction]]:
        """The drafter that looks best, a little optimistically, and what each gamma would give."""
        index, optimism = 0, self.settings.optimism
        if len(self._arms) > 1:
            for arm in self._arms:
                if arm.stale >= 8 or not arm.stale:  # evidence of the others only fades, slowly
                    arm.hope = max(p.speedup for p in self._predictions(arm, most, optimism))
                arm.stale = arm.stale % 8 + 1
            index = max(range(len(self._arms)), key=lambda i: self._arms[i].hope)
        return index, self._predictions(self._arms[index], most)

    def _predictions(self, arm: _Arm, most: int, optimism: float = 0.0) -> list[Prediction]:
        """:func:`predict` for gamma 1, 2, ... up to ``most``, with the sum carried along."""
        step, slope = self._step, self.VERIFY_SLOPE * self._step
        if self._verify:
            verify = self._verify.table(2, most + 1, slope)
        else:
            verify = [step + slope * gamma for gamma in range(1, most + 1)]
        if arm.draft:
            draft = arm.draft.table(1, most)
        else:
            draft = [step * self.DRAFT_GUESS * gamma for gamma in range(1, most + 1)]
        select = sum(arm.selecting) / len(arm.selecting) if arm.selecting else 0.0
        offered = arm.offers / arm.asked
        emitted, going = arm.emitted.means(optimism), arm.going.means()
        out, tokens, reached, falling = [], 1.0, offered, 0
        come = 1.0
        whole = drafting = 0.0  # costs of a full draft, and of one that may end early
        for i in range(most):
            reached *= emitted[i]
            tokens += reached
            come *= going[i]
            before, whole = whole, draft[i] + verify[i] + select
            drafting += come * (whole - before)
            cost = offered * drafting + (1 - offered) * step
            out.append(Prediction(i + 1, tokens, cost, tokens * step / cost, whole))
            falling = falling + 1 if i and out[i].speedup < out[i - 1].speedup else 0
            if falling == 3:
                break  # longer drafts only cost more
        return out

    @property
    def _loss(self) -> float:
        """Plain steps that drafting has lost so far; negative when it has gained."""
        return self._spent / self._step - self._got

    def _affordable(self, option: Prediction, share: float = DRAFTS) -> bool:
        """Whether the account stays within its allowance even if no draft is accepted."""
        allowance = self.settings.max_loss * (self._upfront + self._emitted) / 2
        return self._loss + option.dearest / self._step - 1 <= share * allowance

    def _stop_of(self, arm: int, one: Prediction, best: Prediction) -> Stop | None:
        """Where a draft should end: the next token costs more time than it is likely to give.

        In the long run a plain step's time is worth ``speedup`` tokens. A draft more than ``one`` costs
        ``more`` plain steps, and gives a token if the draft so far is accepted and it is too.
        """
        if best.gamma == 1:
            return None
        more = (best.dearest - one.dearest) / (best.gamma - 1) / self._step
        needed = best.speedup * more / self._arms[arm].acceptance
        return Stop(min(0.95, max(1e-3, needed)), self._arms[arm].shares)

    def _gain(self, best: Prediction) -> str:
        return f"{best.tokens:.2f} tokens for {best.cost / self._step:.2f} plain steps"

    def _reason(self, arm: int, best: Prediction) -> str:
        chance = self._arms[arm].emitted.means()[0]
        return (
            f"draft {'up to ' * (best.gamma > 1)}{best.gamma} by {self._arms[arm].name}:"
            f" acceptance {chance:.2f}, so {self._gain(best)}, {best.speedup:.2f}x"
        )

    # ---------------------------------------------------------------- after a round
    def record(self, one: Round) -> None:
        """Learn from a finished round that followed the last choice."""
        seconds, drafted = round_seconds(one), len(one.drafted)
        self._emitted += len(one.emitted)
        if not self._choice.gamma:
            self._skipped = [n + len(one.emitted) for n in self._skipped]
            self._since_plain = 0
            self._learn_plain(seconds)
            return
        draft, verify = one.seconds["draft"], one.seconds["verify"]
        if self._plain or self._guesses:
            # A pass that takes longer than token by token was disturbed by something else: a cap on it.
            draft = min(draft, max(1, drafted) * self._step)
            verify = min(verify, (drafted + 1) * self._step)
        index = self._choice.arm
        arm, late = self._arms[index], self._skipped[index] > 2
        self._skipped = [n + len(one.emitted) for n in self._skipped]
        self._skipped[index] = 0
        for other in self._arms:
            (other.fade if other is arm else other.forget)()
        arm.stale = 0
        if arm.learn(self._choice.gamma, drafted, one.accepted, one.chances):
            for other in self._arms:
                other.doubt(self.DOUBT)
        if arm.rounds:  # the first selection is not like the others
            arm.selecting.append(one.seconds["select"])
        arm.rounds += 1
        if drafted:
            self._since_plain += 1
            self._streak += 1
            if self._verify:
                slope = self.VERIFY_SLOPE * self._step
                usual = self._verify.table(drafted + 1, drafted + 1, slope)[0]
                verify = min(verify, self.DISTURBED * usual)
            if arm.draft and not late:
                draft = min(draft, self.DISTURBED * arm.draft.table(drafted, drafted)[0])
            self._verify.add(drafted + 1, verify)
            if not late or not arm.draft:  # catching up is not part of a usual draft
                arm.draft.add(drafted, draft)
            self._guesses.append(verify / (1 + self.VERIFY_SLOPE * drafted))
            self._learn_step()
        else:  # it had nothing to propose
            self._since_plain = 0
            self._learn_plain(one.seconds["verify"])
        self._spent += draft + verify + one.seconds["select"]
        self._got += len(one.emitted)
        self._surprise = self._off and one.accepted > 0

    def _learn_plain(self, seconds: float) -> None:
        self._plain.append(seconds)
        self._learn_step()

    def _learn_step(self) -> None:
        """A plain step by those taken; while they are few, what verifications say counts as one."""
        known = list(self._plain)
        if len(known) < 3 and self._guesses:
            known.append(median(self._guesses))
        self._step = median(known)

    def explain(self) -> str:
        """One sentence: what was chosen last, and why."""
        who = self._choice.why
        return f"{who[0].upper()}{who[1:]}."


# -------------------------------------------------------------------- toy runs


def simulate(
    arms: Sequence[tuple[Acceptance | Callable[[int], Acceptance], Costs]],
    controller: Controller | None = None,
    *,
    gamma: int = 0,
    stop_below: float = 0.0,
    arm: int = 0,
    sure: bool = False,
    tokens: int = 400,
    noise: float = 0.0,
    seed: int = 0,
) -> list[Round]:
    """Rounds of a toy decoding in which acceptance and costs are given: no model runs.

    Parameters
    ----------
    arms
        For each drafter its acceptance (a number, one for each position, or a function of the tokens
        emitted so far that gives either) and its costs.
    controller
        Who chooses; ``None`` drafts ``gamma`` tokens by ``arm`` in every round, fewer by ``stop_below``.
    sure
        Whether drafters know their chances token by token, so that a draft can end early; without that
        they know nothing, and none does.
    noise
        Standard deviation of the logarithm of every time.
    seed
        Which text: each of its tokens is easy or hard to guess, the same for whoever drafts it.
    """
    from bdlib.decoding import PHASES, Round

    rng = random.Random(seed)
    coins = [rng.random() for _ in range(tokens)]
    if controller is not None:
        controller.start([f"drafter {i}" for i in range(len(arms))], tokens)
    rounds, done = [], 0
    fixed = Choice(gamma, arm, "fixed", Stop(stop_below) if stop_below else None)
    while done < tokens:
        choice = fixed if controller is None else controller.choose(tokens - done)
        n = min(choice.gamma, tokens - done - 1)
        acceptance, costs = arms[choice.arm]
        if callable(acceptance):
            acceptance = acceptance(done)
        expected_tokens(acceptance, n)  # refuses what is no acceptance
        chances = [acceptance] * n if isinstance(acceptance, int | float) else acceptance
        told = tuple(chances[:n]) if sure and choice.stop is not None else ()
        if told:  # the draft ends with the token that makes it unlikely
            likely = itertools.accumulate(map(choice.stop.chance, told), operator.mul)
            n = next((i for i, chance in enumerate(likely, 1) if chance < choice.stop.below), n)
        accepted = 0
        while accepted < n and coins[done + accepted] < chances[accepted]:
            accepted += 1
        select = costs.select + costs.overhead if n else 0.0
        bare = replace(costs, draft=0.0, select=0.0, overhead=0.0).of_round(n)
        parts = {"draft": costs.of_round(n) - bare - select, "select": select, "verify": bare}
        seconds = dict.fromkeys(PHASES, 0.0)
        seconds |= {k: v * math.exp(rng.gauss(0, noise)) for k, v in parts.items()}
        kind = "plain" if not n else "bonus" if accepted == n else "corrected"
        one = Round(
            len(rounds), (0,) * n, accepted, (0,) * (accepted + 1), kind, seconds,
            gamma=choice.gamma, why=choice.why, chances=told[:n],
        )  # fmt: skip
        if controller is not None:
            controller.record(one)
        rounds.append(one)
        done += accepted + 1
    return rounds
