"""Who proposes: the target itself on a sparse cache, n-gram lookup, or a second model.

A drafter is driven by :func:`bdlib.decoding.decode`: ``start`` once, then each round ``propose`` and
``commit``. It never decides what is emitted, so nothing it does can change the output's distribution,
only its speed.
"""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdlib.cache import KVCache, SparseKVCache, sparse_cache_of
from bdlib.copies import COPIES, SURE, Copies
from bdlib.models import row_of
from bdlib.sampling import Sampling
from bdlib.selection import Policy, check_whole, is_whole
from bdlib.transformer import Decoder, give_back

PIECE = 512
"""Tokens of a prompt that are run at a time: as fast as 1,024, and 40 MB less at the peak."""
HEAD = 16
"""Tokens at a prompt's start that every drafter reads, whatever its reach: attention sinks are there."""


@dataclass(frozen=True)
class Proposal:
    """Drafted token ids ``[n]`` and the distributions ``[n, V]`` they were drawn from.

    ``probs`` is ``None`` when the drafter was certain (a point mass on each token). ``chances`` are the
    probabilities that it gave its tokens, where :attr:`Drafter.stop` made it look at them.
    """

    tokens: Tensor
    probs: Tensor | None = None
    chances: tuple[float, ...] = ()


SURENESS = (0.25, 0.5, 0.75, 0.9)
"""Where a drafter's probabilities are cut into ranges, from unsure to sure."""


def sureness(probability: float) -> int:
    """The range of :data:`SURENESS` that a drafter's probability of its token is in, from 0."""
    return bisect.bisect(SURENESS, probability)


@dataclass(frozen=True)
class Stop:
    """When a draft ends before it has as many tokens as were asked for.

    It ends after the token with which the product of its tokens' chances falls below ``below``: what
    follows would hardly be accepted. Whether token ``j + 1`` is drafted depends on tokens 1 to ``j``
    alone, and those are kept, so output stays lossless.

    Attributes
    ----------
    below
        A chance, above 0 and below 1.
    shares
        A token's chance to be accepted by the probability that its drafter gave it, one for each range
        of :data:`SURENESS`; ``()`` takes the probability itself.
    """

    below: float
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.below < 1:
            raise ValueError(f"below {self.below} must be a chance above 0 and below 1")
        if self.shares and len(self.shares) != len(SURENESS) + 1:
            raise ValueError(
                f"{len(self.shares)} shares were given, there are {len(SURENESS) + 1} ranges"
            )

    def chance(self, probability: float) -> float:
        """The chance that a token is accepted to which the drafter gave this probability."""
        return self.shares[sureness(probability)] if self.shares else probability


class Drafter(ABC):
    """What :func:`bdlib.decoding.decode` needs of a drafter."""

    name: str
    observe: Policy | None = None
    """The policy whose queries the *target's* cache must log for this drafter."""
    taps: tuple[int, ...] = ()
    """Layers of the target whose output its cache must keep for this drafter."""
    stop: Stop | None = None
    """Set by the decoder before each draft: when to end it early. Drafters that give their tokens no
    probabilities ignore it."""

    @abstractmethod
    def start(self, prompt: Tensor, cache: KVCache, capacity: int) -> None:
        """Take in a prompt ``[T]``; the target's ``cache`` holds all of it but the last token.

        ``capacity`` is the longest sequence, in tokens, that decoding may reach.
        """

    @abstractmethod
    def propose(
        self, last: int, n: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        """Draft up to ``n`` tokens that follow ``last``, the newest emitted token."""

    @abstractmethod
    def commit(self, emitted: list[int], accepted: int) -> None:
        """Learn what was emitted after the last proposal (its first ``accepted`` tokens were ours)."""

    def follow(self, last: int, emitted: list[int]) -> None:
        """Learn of a round in which this drafter had no part: ``last`` was fed, ``emitted`` came out.

        Such rounds must cost next to nothing: what can wait until the next proposal waits.
        """
        self.commit(emitted, 0)

    def select(self, rounds: int) -> None:  # noqa: B027 (most drafters have nothing to choose)
        """Choose cache entries anew if it is time to; called before each round's draft."""

    @property
    def kv_entries(self) -> int:
        """Most entries held so far, per layer and KV head."""
        return 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values allocated for the drafter alone."""
        return 0


def _check_refresh(refresh: int | None) -> None:
    if refresh is not None and not is_whole(refresh, 1):
        raise ValueError(
            f"refresh {refresh!r} must be None (select once) or a whole number, at least 1 round"
        )


def check_reach(reach: object) -> None:
    """Refuse a reach that is neither 0 (everything) nor more than :data:`HEAD` tokens."""
    if not (is_whole(reach, 0) and (reach == 0 or reach > HEAD)):
        raise ValueError(
            f"reach {reach!r} must be 0 (the whole prompt) or a whole number above {HEAD} tokens"
        )


def unread(length: int, reach: int) -> int:
    """How many of ``length`` tokens a drafter of this reach leaves out, after the first :data:`HEAD`."""
    return max(0, length - reach) if reach else 0


def positions_read(length: int, reach: int) -> tuple[Tensor, Tensor]:
    """What a drafter reads of ``length`` tokens: their positions, and whose states its slots leave.

    Slot ``t`` of a feature-conditioned drafter reads the target's state one position earlier in the
    text. So the second tensor, shifted by a slot, is right also where tokens were left out.

    Returns
    -------
    Two tensors ``[min(length, reach)]``, ascending (``[length]`` with a reach of 0).
    """
    positions = torch.arange(length)
    positions = torch.cat((positions[:HEAD], positions[HEAD + unread(length, reach) :]))
    stated = positions.clone()
    stated[:-1] = positions[1:] - 1
    return positions, stated


def _run(
    model: Decoder, tokens: Tensor, cache: KVCache | SparseKVCache, states: Tensor | None
) -> Tensor:
    """Residual stream ``[1, n, C]`` of ``tokens`` ``[1, n]``; with ``states`` ``[n, C]`` beside them."""
    x = None if states is None else model.inputs(tokens, states[None])
    return model.hidden(tokens, cache, x)


def _draft(
    model: Decoder,
    cache: KVCache | SparseKVCache,
    pending: list[int],
    n: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    states: Tensor | None = None,
    stop: Stop | None = None,
    copies: Copies | None = None,
) -> Proposal:
    """Run ``model`` token by token for ``n`` drafts, after taking in the ``pending`` tokens.

    ``states`` ``[pending, C]`` are what a feature-conditioned model reads beside the pending tokens;
    beside its own drafts it reads its own output. ``stop`` may end the draft early; in greedy decoding
    the probabilities that it goes by are those at temperature 1. ``copies`` are mixed into what the
    model gives.
    """
    step = min(len(pending), getattr(cache, "budget", len(pending)))
    tokens = torch.tensor([pending], device=model.device)
    for first in range(0, len(pending), step):
        part = slice(first, first + step)
        hidden = _run(model, tokens[:, part], cache, None if states is None else states[part])
    drafted, probs, chances, reached = [], [], [], 1.0
    mixed: list[tuple[float, int]] = []  # of each draft, with copies: how much of one, and which
    for i in range(n):
        logits = model.logits(hidden[:, -1:])[:, 0]
        token, row = sampling.draw(logits, generator)
        if stop is not None or copies is not None:
            own = torch.softmax(logits, -1) if row is None else row
            chances.append(float(own[0, token]))
        if model.vocabulary is not None:  # from rows of the head to token ids
            token = model.vocabulary[token]
        if copies is not None:
            known, rows = [int(t) for t in drafted], row_of(model)
            token, chances[-1], share = _mix(
                copies, known, int(token), chances[-1], own[0], rows, sampling, generator
            )
            mixed.append(share)
            token = torch.tensor([token], device=model.device)
        if stop is not None:
            reached *= stop.chance(chances[-1])
        drafted.append(token)
        probs.append(row)
        if i + 1 == n or (stop is not None and reached < stop.below):
            break
        state = None if states is None else hidden[0, -1:]
        hidden = _run(model, token[:, None], cache, state)
    rows = None if sampling.greedy else torch.cat(probs)
    if rows is not None:
        if model.vocabulary is not None:
            whole = rows.new_zeros(len(rows), model.config.vocab_size)
            rows = whole.index_copy_(1, model.vocabulary, rows)
        for (weight, copied), row in zip(mixed, rows, strict=False):
            if weight:
                row.mul_(1 - weight)
                row[copied] += weight
    return Proposal(torch.cat(drafted), rows, tuple(chances) if stop is not None else ())


def _mix(
    copies: Copies,
    drafted: list[int],
    token: int,
    chance: float,
    own: Tensor,
    rows: Tensor | None,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> tuple[int, float, tuple[float, int]]:
    """A token from a model's distribution ``own`` and a copy: token, its chance, the copy's share.

    The model alone would take ``token``, to which it gives ``chance``; ``rows`` says where ``own`` has
    each token id (:func:`bdlib.models.row_of`).
    """
    length, copied = copies.guess(drafted)
    weight = copies.weight(length, float(own.max())) if length else 0.0
    if not weight:
        return token, chance, (0.0, 0)
    row = copied if rows is None else int(rows[copied])
    of_copy = weight + (1 - weight) * (float(own[row]) if row >= 0 else 0.0)
    of_own = of_copy if token == copied else (1 - weight) * chance
    if sampling.greedy:
        takes = of_copy > of_own
    else:
        coin = torch.rand((), generator=generator, device=own.device, dtype=torch.float64)
        takes = float(coin) < weight
    return (copied, of_copy, (weight, copied)) if takes else (token, of_own, (weight, copied))


def _copy(copies: Copies, n: int, stop: Stop | None, device: torch.device) -> Proposal | None:
    """A draft that is copied to its end, as long as copies are nearly certain; ``None`` if they are not."""
    drafted: list[int] = []
    chances: list[float] = []
    reached = 1.0
    while len(drafted) < n:
        length, token = copies.guess(drafted)
        if copies.chance(length) < SURE:
            break
        drafted.append(token)
        chances.append(copies.chance(length))
        if stop is not None:
            reached *= stop.chance(chances[-1])
            if reached < stop.below:
                break
    if not drafted:
        return None
    tokens = torch.tensor(drafted, device=device)
    return Proposal(tokens, None, tuple(chances) if stop is not None else ())


class SelfDrafter(Drafter):
    """The target itself, attending to a budget of its own cache (MagicDec, arXiv 2408.11049).

    It needs no training and no second model: the sparse cache copies entries of the target's full
    one (on a GPU it reads them in place), and after each verification takes over the exact entries the
    target computed.

    Parameters
    ----------
    refresh
        Choose the entries anew every ``refresh`` rounds; ``None`` chooses once, after the prompt.
    """

    def __init__(
        self, target: Decoder, policy: Policy, budget: int, refresh: int | None = None
    ) -> None:
        _check_refresh(refresh)
        policy.check(budget)
        self.target, self.policy, self.budget, self.refresh = target, policy, budget, refresh
        self.observe = policy
        self.name = "self"

    def start(self, prompt: Tensor, cache: KVCache, capacity: int) -> None:
        self._full = cache
        self.cache = sparse_cache_of(cache, self.budget, self.policy)

    def select(self, rounds: int) -> None:
        if rounds == 0 or (self.refresh and rounds % self.refresh == 0):
            self.cache.fill(self._full)

    def propose(self, last, n, sampling, generator):
        self._catch_up()
        self._round_start = self.cache.length
        return _draft(self.target, self.cache, [last], n, sampling, generator, stop=self.stop)

    def follow(self, last: int, emitted: list[int]) -> None:
        pass  # the entries are in the target's cache whenever they are wanted

    def _catch_up(self) -> None:
        """Take over what the target computed since; no more of it than the budget can hold."""
        if self.cache.length == self._full.length:
            return
        if self.policy.per_step:
            self.cache.fill(self._full)
            return
        self.cache.length = max(self.cache.length, self._full.length - self.budget)
        self.cache.extend_from(self._full, self.cache.length)

    def commit(self, emitted: list[int], accepted: int) -> None:
        # The target verified these positions with its full cache: take its entries, not our guesses.
        if self.policy.per_step:
            self.cache.fill(self._full)
            return
        self.cache.rewind(self._round_start)
        self.cache.extend_from(self._full, self._round_start)

    @property
    def kv_entries(self) -> int:
        return self.cache.peak_entries

    @property
    def kv_bytes(self) -> int:
        return self.cache.own_bytes()


class ModelDrafter(Drafter):
    """A second model with the target's vocabulary, on a sparse cache of its own.

    Its full cache lives only from the prompt's prefill to the first selection, unless ``refresh``
    asks for it again; then it is kept (and counted in ``kv_bytes``).

    Parameters
    ----------
    model
        A standalone drafter, or a :class:`bdlib.models.FeatureDecoder`, which reads the target's states
        of verified positions and its own output beside its drafts.
    budget
        Entries kept per layer and KV head; ``None`` keeps as many as decoding may reach.
    refresh
        Choose the entries anew every ``refresh`` rounds; ``None`` chooses once, after the prompt.
    copies
        Mix in what followed the newest tokens when they were last seen (:mod:`bdlib.copies`), anywhere
        in the text: a budget forgets entries, not tokens.
    reach
        Tokens of the prompt that it reads: its first :data:`HEAD` and its last ``reach - HEAD``, side
        by side, so that no entry is farther from a query than in the windows that the drafter was
        trained on. ``None`` takes what its checkpoint says (``model.reach``), 0 reads all.

    Notes
    -----
    Counting positions among the entries that are kept, not in the text, is StreamingLLM's (Xiao et al.,
    arXiv 2309.17453). The target's states are those of the whole text all the same.
    """

    def __init__(
        self,
        model: Decoder,
        policy: Policy,
        budget: int | None = None,
        refresh: int | None = None,
        piece: int = PIECE,
        reach: int | None = None,
        copies: bool = False,
    ) -> None:
        _check_refresh(refresh)
        reach = model.reach if reach is None else reach
        check_reach(reach)
        if budget is not None:
            policy.check(budget)
        check_whole("piece", piece, 1, "token")
        self.model, self.policy, self.budget, self.refresh = model, policy, budget, refresh
        self.piece, self.reach, self.copies = piece, reach, copies
        self.taps = getattr(model, "taps", ())
        self.name = ("feature" if self.taps else "model") + COPIES * copies

    def start(
        self,
        prompt: Tensor,
        cache: KVCache,
        capacity: int,
        readers: Sequence[Drafter] = (),
    ) -> None:
        """See :meth:`Drafter.start`.

        ``readers`` have started on the same prompt: one with the same model and policy has read it
        already, and its full cache is used instead of reading it again.
        """
        if self.taps and cache.taps != self.taps:
            raise ValueError(
                f"the target's cache keeps the layers {cache.taps}, this drafter reads {self.taps};"
                " prefill it with taps=drafter.taps"
            )
        sizes = cache.config.vocab_size, self.model.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the target's vocabulary has {sizes[0]} tokens, the drafter's {sizes[1]}"
            )
        self._target_cache = cache
        read = prompt[:-1]
        self._unread = unread(len(read), self.reach)
        capacity -= self._unread
        budget = self.budget
        if budget is None:
            budget = max(capacity, getattr(self.policy, "chunk_size", 1))
        self._keep = self.refresh is not None or self.policy.per_step
        place = (1, self.model.dtype, self.model.device)
        self.cache = SparseKVCache(self.model.config, budget, self.policy, *place)
        size = capacity if self._keep else max(1, len(read) - self._unread)
        self._full: KVCache | None = next(filter(None, map(self._shared, readers)), None)
        if self._full is None:
            self._full = KVCache(self.model.config, size, *place, observe=self.policy)
            if self._unread:
                self._take_in(read[:HEAD])
                read = read[HEAD + self._unread :]
            self._take_in(read)
        self._copies = Copies(prompt.tolist()) if self.copies else None
        self._pending: list[int] = []
        self._behind: list[int] = []  # emitted tokens that the kept full cache lacks

    def _shared(self, other: Drafter) -> KVCache | None:
        """The full cache of another drafter, if it is what this one would compute and keeps as it is."""
        same = isinstance(other, ModelDrafter) and other.model is self.model
        if not same or self._keep or other._keep or type(other.policy) is not type(self.policy):
            return None
        if other._unread != self._unread:
            return None
        return other._full

    def _take_in(self, tokens: Tensor) -> None:
        """Add verified tokens ``[n]`` to the full cache, a piece at a time."""
        for part in tokens.to(self.model.device).split(self.piece):
            if part.numel():
                states = self._states(self._full.length, len(part))
                _run(self.model, part[None], self._full, states)
                give_back()

    def _states(self, start: int, n: int) -> Tensor | None:
        """What slots ``start`` to ``start + n`` read of the target: its states one position earlier."""
        if not self.taps:
            return None
        if start >= HEAD:
            start += self._unread  # from this drafter's count of positions to the text's
        known = self._target_cache.features(max(0, start - 1), start + n - 1)[0]
        states = self.model.state(known)
        return states if start else torch.cat((states.new_zeros(1, states.shape[-1]), states))

    def select(self, rounds: int) -> None:
        again = self.refresh and rounds % self.refresh == 0
        if rounds and not again:
            return
        if self._behind:
            self._take_in(torch.tensor(self._behind))
            self._behind = []
        self.cache.fill(self._full)
        if self._keep:
            self._pending = []
        else:
            self._full = None

    def follow(self, last: int, emitted: list[int]) -> None:
        passed = [last, *emitted[:-1]]
        self._pending.extend(passed)
        if self._keep:
            self._behind.extend(passed)
        if self._copies is not None:
            self._copies.extend(emitted)

    def propose(self, last, n, sampling, generator):
        self._pending.append(last)
        if self._keep:
            self._behind.append(last)
        # After rounds without it there may be more to take in than the cache can hold: skip the oldest.
        missed = max(0, len(self._pending) - self.cache.budget)
        self._pending = self._pending[missed:]
        self.cache.length += missed
        start = self.cache.length
        self._base = start + len(self._pending)
        if self._copies is not None:
            copied = _copy(self._copies, n, self.stop, self.model.device)
            if copied is not None:
                return copied
        states = self._states(start, len(self._pending))
        return _draft(
            self.model,
            self.cache,
            self._pending,
            n,
            sampling,
            generator,
            states,
            self.stop,
            self._copies,
        )

    def commit(self, emitted: list[int], accepted: int) -> None:
        if self._copies is not None:
            self._copies.extend(emitted)
        # Drafting ran the model on every draft but the last: a fully accepted draft leaves it over.
        # Beside its drafts a feature-conditioned model read its own output: those entries go.
        usable = 0 if self.taps else accepted
        known = min(self._base + usable, self.cache.length)
        # A draft that was copied ran nothing: what was pending still is.
        untaken = [*self._pending, *emitted[:-1]]
        self._pending = untaken[known - self._base + len(self._pending) :]
        if self._keep:
            self._behind.extend(emitted[:-1])
        self.cache.rewind(known)
        if self.policy.per_step:
            self.select(0)

    @property
    def kv_entries(self) -> int:
        return self.cache.peak_entries

    @property
    def kv_bytes(self) -> int:
        entries = self.cache.budget + (self._full.capacity if self._full else 0)
        features = self._target_cache.feature_bytes() if self.taps else 0
        return self.model.config.kv_bytes(entries, self.model.dtype) + features


class NGramDrafter(Drafter):
    """Prompt lookup: what followed the last few tokens when they were last seen?

    The longest n-gram from ``longest`` down to ``shortest`` that occurred before decides; without a
    match nothing is drafted and the round is a plain step. Free, and strong on repetitive text, which
    is why its acceptance belongs beside every other drafter's.
    """

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        if not (is_whole(shortest, 1) and is_whole(longest, shortest)):
            raise ValueError(
                "need 1 <= shortest <= longest, whole numbers of tokens, got"
                f" {shortest!r} and {longest!r}"
            )
        self.longest, self.shortest = longest, shortest
        self.name = "ngram"

    def start(self, prompt: Tensor, cache: KVCache, capacity: int) -> None:
        self._device = prompt.device
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> position after its last occurrence
        self._extend(prompt.tolist())

    def _extend(self, tokens: list[int]) -> None:
        for token in tokens:
            # Index the n-grams that end before this token, so that a lookup never finds itself.
            for size in range(self.shortest, self.longest + 1):
                if len(self._tokens) >= size:
                    self._ends[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def propose(self, last, n, sampling, generator):
        follow: list[int] = []
        for size in range(self.longest, self.shortest - 1, -1):
            end = self._ends.get(tuple(self._tokens[-size:]))
            if end is not None and len(self._tokens) >= size:
                follow = self._tokens[end : end + n]
                break
        return Proposal(torch.tensor(follow, dtype=torch.int64, device=self._device))

    def commit(self, emitted: list[int], accepted: int) -> None:
        self._extend(emitted)


def prefill(
    model: Decoder,
    prompt: Tensor,
    capacity: int,
    observe: Policy | None = None,
    piece: int = PIECE,
    taps: tuple[int, ...] = (),
) -> KVCache:
    """Run all of a prompt but its last token, ``piece`` tokens at a time, into a new full cache.

    The last token is left out because every round begins by feeding the newest token, the first
    round included. Pieces bound the memory: no more than ``piece`` rows of anything exist at once.

    Parameters
    ----------
    prompt
        Token ids ``[T]``, at least one.
    capacity
        Positions to allocate, in tokens.
    observe, taps
        What a drafter needs logged meanwhile: its own ``observe`` and ``taps``.
    """
    if prompt.dim() != 1 or not prompt.numel():
        raise ValueError(f"prompt must hold at least one token, got shape {tuple(prompt.shape)}")
    if prompt.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"prompt must hold token ids (int64), got {prompt.dtype}")
    for token in (int(prompt.min()), int(prompt.max())):
        if not 0 <= token < model.config.vocab_size:
            raise ValueError(
                f"prompt holds token {token}, the model's vocabulary has {model.config.vocab_size}"
            )
    check_whole("piece", piece, 1, "token")
    cache = KVCache(model.config, capacity, 1, model.dtype, model.device, observe, taps)
    tokens = prompt[None, :-1].to(model.device)
    with torch.inference_mode():
        for part in tokens.split(piece, dim=1):
            if part.shape[1]:
                model.hidden(part, cache)
                # Scores of ever longer rows do not fit the holes that shorter ones left.
                give_back()
        cache.pack()
    return cache
