"""Decoding as a stream of rounds: draft, verify, emit.

One loop serves every case. With a drafter a round drafts up to ``gamma`` tokens, verifies them in one
forward pass of the target over its full cache, and emits the accepted ones plus one token of the
target's own. Without a drafter a round is one plain step: the autoregressive baseline runs through
the same code, so a comparison of the two compares drafting and nothing else.

Contract: greedy output is the argmax of the target's logits in the pass that verified it; sampled
output has the target's distribution (:func:`bdlib.sampling.verify`). In float64 the output of greedy
decoding equals the baseline's token for token; in narrower types it can differ at near-ties, because
a row may round differently in a larger batch. ``python -m bdlib measure`` counts such differences.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bdlib.cache import KVCache
from bdlib.controllers import Arms, Controller, label
from bdlib.drafters import Drafter, Proposal, Stop, prefill
from bdlib.sampling import Sampling, verify
from bdlib.selection import check_whole
from bdlib.transformer import Decoder

GREEDY = Sampling()
PHASES = ("prefill", "draft", "select", "verify")


@dataclass(frozen=True)
class Round:
    """One round of decoding.

    Attributes
    ----------
    index
        Number of the round, from 0.
    drafted
        The drafter's proposal, in tokens.
    accepted
        How many of them the target agreed to.
    emitted
        What came out: the accepted tokens and one more, cut at a stop token or the length limit.
    kind
        Where the last token of an uncut round came from: ``"bonus"`` (all drafts accepted),
        ``"corrected"`` (the target's own after a rejection) or ``"plain"`` (nothing was drafted).
    seconds
        Time of ``prefill`` (the drafter's; round 0 only), ``draft``, ``select`` and ``verify``.
        A controller's own time is part of ``select``.
    gamma
        Tokens that were asked of the drafter; it is asked for fewer near the length limit.
    drafter
        Who was asked; empty in a plain round.
    why
        A controller's reason for this choice; empty without one.
    chances
        The drafter's probabilities of its tokens, where a :class:`bdlib.drafters.Stop` made it look.
    """

    index: int
    drafted: tuple[int, ...]
    accepted: int
    emitted: tuple[int, ...]
    kind: str
    seconds: dict[str, float]
    gamma: int = 0
    drafter: str = ""
    why: str = ""
    chances: tuple[float, ...] = ()


@dataclass
class Generation:
    """Rounds collected by :func:`generate`, and what they add up to."""

    prompt_tokens: int
    gamma: int
    rounds: list[Round] = field(default_factory=list)
    prefill_seconds: float = 0.0

    @property
    def tokens(self) -> list[int]:
        return [token for r in self.rounds for token in r.emitted]

    @property
    def drafted(self) -> int:
        return sum(len(r.drafted) for r in self.rounds)

    @property
    def accepted(self) -> int:
        return sum(r.accepted for r in self.rounds)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; not a number when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def accepted_length(self) -> float:
        """Tokens per round, the target's own included."""
        return len(self.tokens) / len(self.rounds) if self.rounds else float("nan")

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase; ``prefill`` holds the target's and the drafter's."""
        total = {p: sum(r.seconds[p] for r in self.rounds) for p in PHASES}
        total["prefill"] += self.prefill_seconds
        return total

    @property
    def decode_seconds(self) -> float:
        """Time after the prompt, in seconds."""
        return sum(s for phase, s in self.seconds.items() if phase != "prefill")

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of decoding, prefill left out."""
        return len(self.tokens) / self.decode_seconds


def decode(
    target: Decoder,
    cache: KVCache,
    prompt: Tensor,
    drafter: Drafter | None = None,
    *,
    gamma: int = 4,
    stop_below: float = 0.0,
    controller: Controller | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    stop_tokens: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[Round]:
    """Decode from a prefilled cache, yielding each round as it happens.

    Parameters
    ----------
    cache
        The target's, from :func:`bdlib.drafters.prefill`: it holds ``prompt`` but for its last token.
        It is extended in place; rewind it to ``len(prompt) - 1`` to decode again. (The log of recent
        queries that some policies need outlives 128 tokens of that; measure keeps a copy of it.)
    prompt
        Token ids ``[T]``.
    drafter
        Who proposes; ``None`` decodes plainly.
    gamma
        Tokens drafted per round, unless a controller chooses.
    stop_below
        End a draft sooner, once the product of the drafter's own probabilities of its tokens falls
        below this (:class:`bdlib.drafters.Stop`); 0 never does. A controller sets its own.
    controller
        Chooses ``gamma`` anew for every round, 0 included, and among :class:`bdlib.controllers.Arms` the
        drafter. Output stays lossless. When sampling, a seed no longer repeats the output: what is
        drafted, and so which random numbers are used up, then depends on measured times.
    stop_tokens
        Decoding ends with the first of these that is emitted.
    generator
        Source of randomness for sampling; required when ``sampling`` is not greedy.

    Raises
    ------
    ValueError
        For settings out of range, a cache that does not fit the prompt or is too small, or logits
        that are not numbers.
    """
    check_whole("gamma", gamma, 1, "token")
    if controller is not None and drafter is None:
        raise ValueError("a controller needs a drafter to choose for")
    if not 0 <= stop_below < 1:
        raise ValueError(f"stop_below {stop_below} must be at least 0 (off) and below 1")
    check_whole("max_new_tokens", max_new_tokens, 1, "token")
    if not sampling.greedy and generator is None:
        raise ValueError("sampling needs an explicit torch.Generator")
    if cache.length != len(prompt) - 1:
        raise ValueError(
            f"the cache holds {cache.length} tokens, a prompt of {len(prompt)} needs {len(prompt) - 1}"
        )
    end = len(prompt) + max_new_tokens - 1  # the last token emitted is never fed
    if end > cache.capacity:
        raise ValueError(
            f"cache of {cache.capacity} tokens is too small: this decoding may reach {end}"
        )
    return _rounds(
        target, cache, prompt, drafter, gamma, stop_below, controller, max_new_tokens, sampling,
        set(stop_tokens), generator,
    )  # fmt: skip


@torch.inference_mode()
def _rounds(
    target,
    cache,
    prompt,
    drafter,
    gamma,
    stop_below,
    controller,
    max_new_tokens,
    sampling,
    stop_tokens,
    generator,
) -> Iterator[Round]:
    clock = _Clock(target.device)
    arms: tuple[Drafter, ...] = ()
    if drafter is not None:
        drafter.start(prompt, cache, cache.capacity)
        arms = drafter.drafters if isinstance(drafter, Arms) else (drafter,)
    names = [label(arm) for arm in arms]
    clock.lap("prefill")
    last, left, index = int(prompt[-1]), max_new_tokens, 0
    if controller is not None:
        controller.start(names, max_new_tokens)
    nothing = Proposal(torch.empty(0, dtype=torch.int64, device=target.device))
    asked, arm, why, drafting_rounds, done = gamma if arms else 0, 0, "", 0, None
    if drafter is not None:
        drafter.stop = Stop(stop_below) if stop_below else None
    while True:
        start = cache.length
        proposal = nothing
        if controller is not None:
            if index:
                controller.record(done)
            choice = controller.choose(left)
            asked, arm, why = choice.gamma, choice.arm, choice.why
            drafter.stop = choice.stop
            if isinstance(drafter, Arms):
                drafter.use(arm)
        if asked:
            drafter.select(drafting_rounds)
            clock.lap("select")
            drafting_rounds += 1
            if left > 1:
                proposal = drafter.propose(last, min(asked, left - 1), sampling, generator)
            clock.lap("draft")
        elif controller is not None:
            clock.lap("select")
        n = proposal.tokens.shape[0]

        tokens = torch.cat((torch.tensor([last], device=target.device), proposal.tokens))
        logits = target(tokens[None], cache)[0]  # [n + 1, V]
        if not torch.isfinite(logits.amax(-1)).all():
            raise ValueError(f"the target's logits are not numbers near position {start}")
        accepted, extra = verify(proposal.tokens, proposal.probs, logits, sampling, generator)
        emitted = [*proposal.tokens[:accepted].tolist(), extra]
        kind = "plain" if not n else "bonus" if accepted == n else "corrected"
        stopped = next((i for i, token in enumerate(emitted) if token in stop_tokens), None)
        if stopped is not None:
            emitted = emitted[: stopped + 1]
        cache.rewind(start + len(emitted))
        clock.lap("verify")
        left -= len(emitted)
        ended = stopped is not None or left == 0
        if drafter is not None and not ended:
            if asked:
                drafter.commit(emitted, accepted)
            else:
                drafter.follow(last, emitted)
            clock.lap("select")
        done = Round(
            index, tuple(proposal.tokens.tolist()), accepted, tuple(emitted), kind, clock.read(),
            asked, names[arm] if asked else "", why, proposal.chances,
        )  # fmt: skip
        yield done
        if ended:
            return
        clock.restart()
        last, index = emitted[-1], index + 1


def generate(
    target: Decoder,
    prompt: Tensor,
    drafter: Drafter | None = None,
    *,
    cache: KVCache | None = None,
    gamma: int = 4,
    controller: Controller | None = None,
    max_new_tokens: int = 64,
    **settings: object,
) -> Generation:
    """Prefill (unless a ``cache`` is given) and decode to the end; see :func:`decode`.

    With a controller the result's ``gamma`` is the most that it may draft.
    """
    result = Generation(len(prompt), controller.settings.max_gamma if controller else gamma)
    if cache is None:
        clock = _Clock(target.device)
        needs = {} if drafter is None else {"observe": drafter.observe, "taps": drafter.taps}
        cache = prefill(target, prompt, len(prompt) + max_new_tokens, **needs)
        clock.lap("prefill")
        result.prefill_seconds = clock.read()["prefill"]
    rounds = decode(
        target, cache, prompt, drafter, gamma=gamma, controller=controller,
        max_new_tokens=max_new_tokens, **settings,
    )  # fmt: skip
    result.rounds.extend(rounds)
    return result


class _Clock:
    """Seconds by phase; waits for the GPU so that a phase is charged for its own work."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._mark = time.perf_counter()

    def lap(self, phase: str) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[phase] += now - self._mark
        self._mark = now

    def read(self) -> dict[str, float]:
        return dict(self._seconds)
