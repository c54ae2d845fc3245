"""Two levels of drafting: a small model drafts for the target on a sparse cache, that for the target.

TriForce, arXiv 2404.11912.

The target with a sparse cache drafts well, but each of its steps reads all of the target's weights.
So a small model drafts for it: what comes out of that lower round are tokens of the *middle* model,
drawn from exactly its distribution, at fewer passes of it. Enough lower rounds make a proposal, which
the target verifies on its full cache as it would any other.

Contract: a proposal carries the middle model's distributions, so the output is the target's own for
any small model, greedy and sampling (:func:`bdlib.sampling.verify`, twice).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlib.cache import KVCache
from bdlib.drafters import ModelDrafter, Proposal, SelfDrafter
from bdlib.sampling import verify
from bdlib.selection import Policy
from bdlib.transformer import Decoder


class _Revocable(ModelDrafter):
    """A small model whose rounds can be taken back together, to where :meth:`mark` was called."""

    def mark(self, last: int) -> None:
        """Remember this place: ``last``, the newest token, is emitted and not yet fed."""
        self._known = self.cache.length
        self._since = [*self._pending, last]  # tokens from that position on

    def take_back(self, emitted: list[int], accepted: int) -> None:
        """Since the mark ``emitted`` came out, and its first ``accepted`` tokens are among what was fed."""
        tokens = self._since + emitted
        right = min(self.cache.length, self._known + len(self._since) + accepted)
        self.cache.rewind(right)
        self._pending = tokens[right - self._known : -1]


class HierarchyDrafter(SelfDrafter):
    """The target on a sparse cache, with a small model drafting for it.

    Parameters
    ----------
    policy, budget, refresh
        The middle model's cache: see :class:`bdlib.drafters.SelfDrafter`.
    model
        The small model: one that stands alone. (What a feature-conditioned one reads, the target's
        states, the middle model has not computed as the target would.)
    inner_policy, inner_budget
        The small model's cache.
    inner_gamma
        Tokens that it drafts in a lower round.

    Attributes
    ----------
    inner_rounds, inner_drafted, inner_accepted
        Passes of the middle model, and what the small one drafted in them, since ``start``.
    """

    def __init__(
        self,
        target: Decoder,
        policy: Policy,
        budget: int,
        model: Decoder,
        inner_policy: Policy,
        inner_budget: int,
        inner_gamma: int = 2,
        refresh: int | None = None,
    ) -> None:
        super().__init__(target, policy, budget, refresh)
        if policy.per_step or inner_policy.per_step:
            raise ValueError("a policy that chooses anew at each step does not fit two levels")
        if getattr(model, "taps", ()):
            raise ValueError(
                "the small model reads the target's states; give one that stands alone"
            )
        if not 1 <= inner_gamma < budget:
            raise ValueError(
                f"inner_gamma {inner_gamma} must be in 1..{budget - 1}: the middle model's budget of"
                f" {budget} entries takes in the draft and one token more"
            )
        self.inner = _Revocable(model, inner_policy, inner_budget)
        self.inner_gamma = inner_gamma
        self.name = "hierarchy"

    def start(self, prompt: Tensor, cache: KVCache, capacity: int) -> None:
        super().start(prompt, cache, capacity)
        self.inner.start(prompt, cache, capacity)
        self.inner_rounds = self.inner_drafted = self.inner_accepted = 0

    def select(self, rounds: int) -> None:
        super().select(rounds)
        self.inner.select(rounds)

    def follow(self, last: int, emitted: list[int]) -> None:
        super().follow(last, emitted)
        self.inner.follow(last, emitted)

    def propose(self, last, n, sampling, generator):
        self._catch_up()
        self._round_start = self.cache.length
        self.inner.mark(last)
        tokens: list[int] = []
        rows: list[Tensor] = []
        nothing = Proposal(torch.empty(0, dtype=torch.int64, device=self.target.device))
        while len(tokens) < n:
            newest = tokens[-1] if tokens else last
            asked = min(self.inner_gamma, n - len(tokens) - 1)  # the middle model adds one
            draft = self.inner.propose(newest, asked, sampling, generator) if asked else nothing
            drafted = draft.tokens.tolist()
            fed = torch.tensor([[newest, *drafted]], device=self.target.device)
            start = self.cache.length
            logits = self.target(fed, self.cache)[0]  # [asked + 1, V]
            accepted, extra = verify(draft.tokens, draft.probs, logits, sampling, generator)
            emitted = [*drafted[:accepted], extra]
            self.cache.rewind(start + len(emitted))
            if asked:
                self.inner.commit(emitted, accepted)
            else:
                self.inner.follow(newest, emitted)
            tokens += emitted
            if not sampling.greedy:
                rows.append(sampling.probs(logits[: accepted + 1]))
            self.inner_rounds += 1
            self.inner_drafted += len(drafted)
            self.inner_accepted += accepted
        probs = torch.cat(rows) if rows else None
        return Proposal(torch.tensor(tokens, device=self.target.device), probs)

    def commit(self, emitted: list[int], accepted: int) -> None:
        super().commit(emitted, accepted)
        self.inner.take_back(emitted, accepted)

    @property
    def kv_bytes(self) -> int:
        return super().kv_bytes + self.inner.kv_bytes
