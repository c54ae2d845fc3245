"""Training objectives: L_A on the full view, L_C on sparse views, one shared teacher target.

    L = L_A + lambda * mean over views L_C  (+ beta * L_B, off by default)

``p`` below is the target's distribution (the teacher, full cache), ``q`` the drafter's. Acceptance of
a draft is ``alpha = sum_x min(p(x), q(x)) = 1 - TV(p, q)`` in sampling, and top-1 agreement in greedy
verification. The paper (arXiv 2606.00144) uses argmax cross-entropy on both branches, which fits
greedy verification; the other losses are for sampling (arXiv 2602.23881 for the LK pair).

======== =================================================== =======================================
name      loss of one position                                note
======== =================================================== =======================================
ce        -log q(argmax p)                                    the paper's
kl        KL(p || q)                                          the usual default
tv        1 - alpha                                           direct; flat where p and q do not meet
lk_alpha  -log alpha                                          equals ce when p is a point mass
lk_lambda w kl + (1 - w) tv, w = exp(-3 stopgrad(alpha))      from kl to tv as overlap grows
======== =================================================== =======================================

Teacher distributions are kept as their ``K`` most probable tokens. Sums then run over those tokens:
``alpha`` is a lower bound that misses at most the tail mass, and ``kl`` compares ``q`` with ``p``
renormalised over the tokens the drafter can score. A drafter may score only part of the vocabulary;
a token outside has ``q = 0``.

On a GPU :func:`branch` is the kernel of :mod:`bdlib.kernels.acceptance_loss`, for teachers it has room
for; what follows is the same in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlib.kernels.acceptance_loss import MAX_TOKENS, acceptance_loss
from bdlib.kernels.launching import use_triton, wanted

LOSSES = ("ce", "kl", "tv", "lk_alpha", "lk_lambda")


@dataclass(frozen=True)
class TeacherTarget:
    """The target's distribution at ``N`` positions, as its ``K`` most probable tokens.

    Attributes
    ----------
    ids
        Token ids ``[N, K]``, most probable first.
    probs
        Their probabilities ``[N, K]`` at temperature 1; a row sums to at most 1.
    """

    ids: Tensor
    probs: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor, k: int | None = None) -> TeacherTarget:
        """Keep the ``k`` best of ``[N, V]`` logits (all of them by default: nothing is lost)."""
        probs, ids = torch.softmax(logits.float(), -1).topk(k or logits.shape[-1], -1)
        return cls(ids, probs)


@dataclass(frozen=True)
class Branch:
    """One view's loss (differentiable) and its figures (not), averaged over positions.

    In training on a GPU the figures are tensors of no dimension: to read them is to wait for the GPU.

    Attributes
    ----------
    alpha
        Mean of sum min(p, q): the acceptance of sampling at temperature 1 (a lower bound when the
        teacher is truncated).
    agreement
        Share of positions where the drafter's argmax is the target's.
    kl
        Per-position KL(p || q) ``[N]`` over the teacher's 32 best tokens, for :func:`hinge`.
    deeper
        Agreement of the later draft steps, for a drafter that was run several steps deep.
    positions
        Where the ``N`` positions stand in the window, ``[N]``; ``None`` if all views have the same ones.
    """

    loss: Tensor
    alpha: float | Tensor
    agreement: float | Tensor
    kl: Tensor
    deeper: tuple[float | Tensor, ...] = ()
    positions: Tensor | None = None


def branch(
    logits: Tensor, target: TeacherTarget, loss: str = "ce", rows: Tensor | None = None
) -> Branch:
    """The loss of one view against the shared teacher target.

    Parameters
    ----------
    logits
        The drafter's ``[N, R]``, ``R`` the rows it scores.
    rows
        Row of each token id, ``[V]``, -1 where the drafter does not score it; ``None`` when it scores
        the whole vocabulary.

    Raises
    ------
    ValueError
        Unknown loss, or a teacher target of another length.
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; allowed: {', '.join(LOSSES)}")
    if logits.shape[0] != target.ids.shape[0]:
        raise ValueError(
            f"logits of {logits.shape[0]} positions, teacher target of {target.ids.shape[0]}"
        )
    count = target.ids.shape[1]
    many = f"ids has {count} tokens a position; the kernel takes {MAX_TOKENS}"
    many = many if count > MAX_TOKENS else None
    if wanted(logits.device) and use_triton("auto", "logits", logits, fault=many):
        found = acceptance_loss(logits, target.ids, target.probs, loss, rows, check=False)
        alpha, agreement = found.alpha.mean().detach(), found.agreement.double().mean()
        if not torch.is_grad_enabled():
            alpha, agreement = float(alpha), float(agreement)
        return Branch(found.loss, alpha, agreement, found.kl)
    log_q = F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, -1)
    index = target.ids if rows is None else rows[target.ids]
    scored = index >= 0  # [N, K]
    chosen = log_q.gather(-1, index.clamp_min(0)).masked_fill(~scored, float("-inf"))
    p = target.probs.to(log_q.dtype)
    overlap = torch.minimum(p, chosen.exp()).sum(-1)  # alpha at each position
    kl = _kl(p, chosen, scored)
    with torch.no_grad():
        agreement = (log_q.argmax(-1) == index[:, 0]).double().mean()
    if loss == "ce":
        known = scored[:, 0]  # where the target's favourite cannot be scored, nothing can be learnt
        positions = -chosen[:, 0].masked_fill(~known, 0.0)
        value = positions.sum() / known.sum().clamp_min(1)
    elif loss == "kl":
        value = kl.mean()
    elif loss == "tv":
        value = (1 - overlap).mean()
    elif loss == "lk_alpha":
        value = -overlap.clamp_min(torch.finfo(overlap.dtype).tiny).log().mean()
    else:
        weight = torch.exp(-3 * overlap.detach())
        value = (weight * kl + (1 - weight) * (1 - overlap)).mean()
    top = slice(0, 32)
    top_kl = _kl(p[:, top], chosen[:, top], scored[:, top])
    return Branch(value, float(overlap.detach().mean()), float(agreement), top_kl)


def _kl(p: Tensor, log_q: Tensor, scored: Tensor) -> Tensor:
    """KL(p || q) ``[N]`` over the scored tokens, ``p`` renormalised over them."""
    p = torch.where(scored, p, torch.zeros_like(p))
    p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    log_q = log_q.masked_fill(~scored, 0.0)
    return (torch.special.xlogy(p, p) - p * log_q).sum(-1)


def hinge(full: Branch, sparse: Branch) -> Tensor:
    """L_B: mean of relu(KL_full - KL_sparse) over positions; tried by the paper, then switched off.

    The full view covers a run of positions, a sparse one some of them.
    """
    kl = full.kl
    if full.positions is not None and sparse.positions is not None:
        kl = kl[sparse.positions - full.positions[0]]
    return F.relu(kl - sparse.kl).mean()


@dataclass(frozen=True)
class Objective:
    """How the branches add up.

    Attributes
    ----------
    full, sparse
        Loss of the full-cache branch (L_A) and of the sparse views (L_C); see the module's table.
    weight
        lambda, the weight of L_C; 0 trains on the full view alone (``full-only``).
    beta
        Weight of L_B.
    """

    full: str = "ce"
    sparse: str = "ce"
    weight: float = 0.5
    beta: float = 0.0

    def __post_init__(self) -> None:
        for loss in (self.full, self.sparse):
            if loss not in LOSSES:
                raise ValueError(f"unknown loss {loss!r}; allowed: {', '.join(LOSSES)}")
        for name, value in (("weight", self.weight), ("beta", self.beta)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} {value} must be 0 or positive")

    def total(self, full: Branch, views: list[Branch]) -> Tensor:
        """L_A + lambda mean L_C + beta mean L_B, a scalar."""
        loss = full.loss
        if views and self.weight:
            loss = loss + self.weight * torch.stack([view.loss for view in views]).mean()
        if views and self.beta:
            loss = loss + self.beta * torch.stack([hinge(full, view) for view in views]).mean()
        return loss


def expected_tokens(acceptance: float, gamma: int) -> float:
    """Expected tokens per round, the target's own included, at a constant acceptance.

    (1 - a^(gamma + 1)) / (1 - a), and gamma + 1 at a = 1 (Leviathan et al., arXiv 2211.17192).
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance {acceptance} must be in [0, 1]")
    if gamma < 0:
        raise ValueError(f"gamma {gamma} must be 0 or positive")
    if acceptance == 1:
        return gamma + 1.0
    return (1 - acceptance ** (gamma + 1)) / (1 - acceptance)
