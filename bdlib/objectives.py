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
for; what follows is the same in PyTorch. Like the kernel it never stores a softmax over the vocabulary:
every loss here reads ``log q`` at the teacher's few tokens alone (:class:`ChosenLogProbs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlib.kernels.acceptance_loss import MAX_TOKENS, acceptance_loss
from bdlib.kernels.launching import use_triton, wanted

LOSSES = ("ce", "kl", "tv", "lk_alpha", "lk_lambda")
PIECE = (
    1 << 18
)  # logits that are worked on at once outside a GPU: 1 MB, which stays in a core's cache


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


class ChosenLogProbs(torch.autograd.Function):
    """``log_softmax(x)`` at ``K`` places of each row, and where each row is greatest.

    With ``c_k = d loss / d log q_k`` the gradient of a row is ``dx_r = c_r - q_r sum_k c_k`` (``c_r = 0``
    elsewhere), so ``logsumexp`` is all that has to be kept: ``q`` is computed again, a piece of rows at
    a time. A softmax of every row would be written to memory and read back several times, and on a CPU
    that takes longer than the head's matrix product.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[N, R]`` and places ``[N, K]``: log-probabilities ``[N, K]``, favourites ``[N]``."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        lse = logits.new_empty((logits.shape[0], 1), dtype=dtype)
        favourite = index.new_empty(logits.shape[0], dtype=torch.int64)
        for part in _pieces(logits):
            x = logits[part].to(dtype)
            torch.logsumexp(x, -1, keepdim=True, out=lse[part])
            torch.argmax(x, -1, out=favourite[part])
        ctx.save_for_backward(logits, index, lse)
        ctx.mark_non_differentiable(favourite)
        return logits.gather(-1, index).to(dtype) - lse, favourite

    @staticmethod
    def backward(ctx, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        logits, index, lse = ctx.saved_tensors
        total, result = gradient.sum(-1, keepdim=True), torch.empty_like(logits)
        for part in _pieces(logits):
            q = torch.sub(logits[part], lse[part]).exp_()
            dx = q.mul_(-total[part]).scatter_add_(-1, index[part], gradient[part])
            result[part] = dx
        return result, None


def _pieces(logits: Tensor) -> list[slice]:
    """Rows to work on at once."""
    count, size = logits.shape
    step = max(1, PIECE // max(1, size)) if logits.device.type == "cpu" else max(1, count)
    return [slice(i, i + step) for i in range(0, count, step)]


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
    return branches(logits, [target], loss, rows)[0]


def branches(
    logits: Tensor, targets: Sequence[TeacherTarget], loss: str = "ce", rows: Tensor | None = None
) -> list[Branch]:
    """:func:`branch` of several views whose logits one product made, one after the other ``[N, R]``."""
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; allowed: {', '.join(LOSSES)}")
    sizes = [target.ids.shape[0] for target in targets]
    if logits.shape[0] != sum(sizes):
        raise ValueError(f"logits of {logits.shape[0]} positions, teacher target of {sum(sizes)}")
    count = targets[0].ids.shape[1]
    many = f"ids has {count} tokens a position; the kernel takes {MAX_TOKENS}"
    many = many if count > MAX_TOKENS else None
    if wanted(logits.device) and use_triton("auto", "logits", logits, fault=many):
        parts = zip(logits.split(sizes), targets, strict=True)
        return [_in_kernel(x, target, loss, rows) for x, target in parts]
    ids = torch.cat([target.ids for target in targets])
    index = ids if rows is None else rows[ids]
    scored = index >= 0  # [N, K]
    chosen, favourite = ChosenLogProbs.apply(logits, index.clamp_min(0))
    chosen = chosen.masked_fill(~scored, float("-inf"))
    right = favourite == index[:, 0]
    parts = zip(targets, *(t.split(sizes) for t in (chosen, scored, right)), strict=True)
    return [_of_chosen(target.probs, *part, loss) for target, *part in parts]


def _in_kernel(logits: Tensor, target: TeacherTarget, loss: str, rows: Tensor | None) -> Branch:
    found = acceptance_loss(logits, target.ids, target.probs, loss, rows, check=False)
    alpha, agreement = found.alpha.mean().detach(), found.agreement.double().mean()
    if not torch.is_grad_enabled():
        alpha, agreement = float(alpha), float(agreement)
    return Branch(found.loss, alpha, agreement, found.kl)


def _of_chosen(p: Tensor, chosen: Tensor, scored: Tensor, right: Tensor, loss: str) -> Branch:
    """A branch from ``log q`` at the teacher's tokens ``[N, K]``, which of them are scored, and where the
    drafter's favourite is the teacher's ``[N]``."""
    p = p.to(chosen.dtype)
    overlap = torch.minimum(p, chosen.exp()).sum(-1)  # alpha at each position
    kl = _kl(p, chosen, scored)
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
    return Branch(value, float(overlap.detach().mean()), float(right.double().mean()), top_kl)


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
