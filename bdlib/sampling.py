"""From logits to tokens: warped distributions, and the rule that makes drafting lossless.

Verification token by token (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): a
drafted token x is accepted with probability min(1, target_probs[x] / draft_probs[x]); at the first
rejection the token is drawn from the residual max(target_probs - draft_probs, 0), normalised. The
emitted tokens then have exactly the target's distribution, whatever the drafter. At temperature 0 both
are point masses and the rule becomes: accept while the draft equals the target's argmax.

Verification of a draft as a block (Sun et al., arXiv 2403.10444) emits the same distribution and accepts
at least as many tokens on average. A token that the drafter gave too much and one that it gave too
little can make up for each other: see :func:`block_chances`.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

LEAST = 1e-6  # temperature: below it logits over the temperature leave the range of float32
RULES = ("block", "token")
"""How drafts are verified when sampling: as a whole, or token by token."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits.

    Attributes
    ----------
    temperature
        0 is greedy; otherwise logits are divided by it (at least :data:`LEAST`).
    top_k
        Keep the ``top_k`` most probable tokens; 0 keeps all.
    top_p
        Keep the smallest set of most probable tokens whose mass reaches ``top_p``; 1 keeps all.
    verification
        How a draft is checked, one of :data:`RULES`: both are lossless, and ``"block"`` accepts more.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    verification: str = "block"

    def __post_init__(self) -> None:
        if self.temperature and not LEAST <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature {self.temperature} must be 0 (greedy) or at least {LEAST:g}"
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, Integral):
            raise ValueError(f"top_k {self.top_k!r} must be a whole number, 0 (off) or positive")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be 0 (off) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be in (0, 1]")
        if self.verification not in RULES:
            raise ValueError(
                f"verification {self.verification!r} must be one of {', '.join(RULES)}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probs(self, logits: Tensor) -> Tensor:
        """Probabilities ``[..., V]`` after temperature, top-k and top-p, in that order."""
        if self.greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = logits / self.temperature
        if self.top_k and self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, float("-inf"))
        probs = torch.softmax(logits, -1)
        if self.top_p < 1:
            ordered, order = probs.sort(-1, descending=True)
            outside = (
                ordered.cumsum(-1) - ordered >= self.top_p
            )  # mass before it already reaches top_p
            probs = probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs

    def draw(
        self, logits: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """A token ``[n]`` from each row of ``[n, V]``, and the distribution it came from (None: greedy)."""
        if self.greedy:
            return logits.argmax(-1), None
        probs = self.probs(logits)
        return multinomial(probs, generator), probs


def multinomial(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """One draw ``[n]`` from each row of weights ``[n, V]``, which need not sum to 1.

    By a row's running sum and one random number, in float64: a token of weight 0 is never drawn.
    ``torch.multinomial`` draws a random number for every token, 1 ms for 49,152, which is as long as a
    small drafter's layer and head take.
    """
    reached = probs.cumsum(-1, dtype=torch.float64)
    last = reached[..., -1:]
    coin = torch.rand(last.shape, generator=generator, device=probs.device, dtype=torch.float64)
    # Below the last sum however the product is rounded, so some token's share holds it.
    coin *= torch.nextafter(last, torch.zeros_like(last))
    return torch.searchsorted(reached, coin, right=True)[..., 0]


def verify(
    drafted: Tensor,
    draft_probs: Tensor | None,
    logits: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> tuple[int, int]:
    """Check a draft against the target: ``(number accepted, next token)``.

    Parameters
    ----------
    drafted
        Token ids ``[n]``; ``n`` may be 0.
    draft_probs
        What each was drawn from, ``[n, V]``; ``None`` means that the drafter was certain (greedy
        drafts, n-gram lookup), a point mass.
    logits
        The target's logits ``[n + 1, V]``: row ``i`` predicts ``drafted[i]``, the last row what follows.

    Returns
    -------
    The length of the accepted prefix, and the token after it: the *bonus* token when all ``n`` were
    accepted, else the *corrected* one.
    """
    n = drafted.shape[0]
    if sampling.greedy:
        best = logits.argmax(-1)
        wrong = (best[:n] != drafted).nonzero()
        accepted = int(wrong[0, 0]) if wrong.numel() else n
        return accepted, int(best[accepted])
    target_probs = sampling.probs(logits)
    # One token, or those of a drafter that was certain: both rules accept the same.
    block = n > 1 and draft_probs is not None and sampling.verification == "block"
    coins = torch.rand(n, generator=generator, device=logits.device, dtype=logits.dtype)
    if block:
        chances, weights = block_chances(drafted, draft_probs, target_probs)
        passed = (coins < chances).nonzero()  # the longest beginning of these is accepted
        accepted = int(passed[-1, 0]) + 1 if passed.numel() else 0
        weight = weights[accepted]
    else:
        rows = torch.arange(n, device=drafted.device)
        chances = target_probs[rows, drafted]
        if draft_probs is not None:
            chances = chances / draft_probs[rows, drafted]
        rejected = (coins >= chances).nonzero()
        accepted = int(rejected[0, 0]) if rejected.numel() else n
        weight = 1.0
    if accepted == n:
        return n, int(multinomial(target_probs[-1], generator))
    if draft_probs is None:
        residual = target_probs[accepted].clone()
        residual[drafted[accepted]] = 0.0
    else:
        residual = (weight * target_probs[accepted] - draft_probs[accepted]).clamp_min_(0)
    if not residual.sum() > 0:  # rounding only: a rejection has probability 0 when they are equal
        residual = target_probs[accepted]
    return accepted, int(multinomial(residual, generator))


def block_chances(
    drafted: Tensor, draft_probs: Tensor, target_probs: Tensor
) -> tuple[Tensor, Tensor]:
    """Block verification (Sun et al., arXiv 2403.10444, algorithm 2): ``(chances [n], weights [n + 1])``.

    Beginnings of the draft of 1 to ``n`` tokens each pass with a chance of their own, and the longest
    that passes is accepted. With the weight of a beginning ``w_i = min(1, w_{i-1} p(x_i) / q(x_i))``,
    ``w_0 = 1``, and what is left of the target after it, ``r_i = sum_x max(w_i p(x) - q(x), 0)``, the
    chance is ``r_i / (r_i + 1 - w_i)``, and ``w_n`` for the whole draft. After ``i < n`` accepted tokens
    the next one is drawn from ``max(w_i p - q, 0)``, normalised.

    Where a draft ends may depend on its tokens: a beginning that is a whole draft has the chance of
    one, and what it would have been with more tokens plays no part.

    Parameters
    ----------
    drafted
        Token ids ``[n]``.
    draft_probs, target_probs
        ``[n, V]`` and ``[n + 1, V]`` (of the latter the last row is not used).

    Returns
    -------
    Chances of the beginnings of 1 to ``n`` tokens, and the weights ``w_0`` to ``w_n``.
    """
    n = drafted.shape[0]
    rows = torch.arange(n, device=drafted.device)
    ratios = (target_probs[rows, drafted] / draft_probs[rows, drafted]).tolist()
    kept = [1.0]
    for ratio in ratios:
        kept.append(min(1.0, kept[-1] * ratio))
    weights = target_probs.new_tensor(kept)
    left = (weights[1:n, None] * target_probs[1:n] - draft_probs[1:]).clamp_min_(0).sum(-1)
    # 0 / 0: both models agree on what follows a beginning of weight 1, so it passes with what follows.
    chances = torch.where(left > 0, left / (left + 1 - weights[1:n]), weights[1:n].floor())
    return torch.cat((chances, weights[n:])), weights
