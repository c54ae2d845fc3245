"""From logits to tokens: warped distributions, and the rule that makes drafting lossless.

Verification (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): a drafted token x is
accepted with probability min(1, target_probs[x] / draft_probs[x]); at the first rejection the token is
drawn from the residual max(target_probs - draft_probs, 0), normalised. The emitted tokens then have
exactly the target's distribution, whatever the drafter. At temperature 0 both are point masses and
the rule becomes: accept while the draft equals the target's argmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

LEAST = 1e-6  # temperature: below it logits over the temperature leave the range of float32


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
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

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
    """One draw ``[n]`` from each row of ``[n, V]``."""
    return torch.multinomial(probs, 1, generator=generator)[..., 0]


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
    rows = torch.arange(n, device=drafted.device)
    chance = target_probs[rows, drafted]
    if draft_probs is not None:
        chance = chance / draft_probs[rows, drafted]
    coins = torch.rand(n, generator=generator, device=logits.device, dtype=logits.dtype)
    rejected = (coins >= chance).nonzero()
    if not rejected.numel():
        return n, int(multinomial(target_probs[-1], generator))
    accepted = int(rejected[0, 0])
    residual = target_probs[accepted].clone()
    if draft_probs is None:
        residual[drafted[accepted]] = 0.0
    else:
        residual = (residual - draft_probs[accepted]).clamp_min_(0)
    if not residual.sum() > 0:  # rounding only: a rejection has probability 0 when they are equal
        residual = target_probs[accepted]
    return accepted, int(multinomial(residual, generator))
