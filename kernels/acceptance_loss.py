"""Acceptance-aware losses over a large vocabulary, forward and backward, without storing a softmax.

Formula, at a position with logits ``x[R]`` and the target's ``K`` most probable tokens (``p``):

    log q = x - logsumexp(x)                                 alpha = sum_k min(p_k, q_k)
    kl = sum_k p'_k (log p'_k - log q_k),  p' = p over the tokens the drafter scores, sum 1

    ce = -log q_0    tv = 1 - alpha    lk_alpha = -log alpha
    lk_lambda = w kl + (1 - w) tv,     w = exp(-3 alpha) held constant

Every loss depends on the logits through ``log q_k`` alone. With ``c_k = d loss / d log q_k`` and
``C = sum_k c_k`` the gradient is ``dx_r = c_r - C q_r`` (``c_r = 0`` outside the ``K`` tokens): ``q`` is
computed again from ``x`` and the saved ``logsumexp``.

Grid: one program a position, in both directions.

Bytes read, forward: the logits once, ``N * R`` elements, and 8 bytes a token of the target. Written:
20 bytes a position. Backward: the logits read once more, the gradient written once. PyTorch's own
path stores a float32 softmax and several ``N * R`` temporaries.

:mod:`bdlib.objectives` says what the losses are for and where they come from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlib.kernels.launching import (
    DTYPES,
    Configuration,
    check_index,
    check_range,
    check_tensor,
    grid_of,
    require,
    use_triton,
)
from bdlib.kernels.lazy import device, kernel, tl

LOSSES = ("ce", "kl", "tv", "lk_alpha", "lk_lambda")
TOP = 32  # the KL that :func:`bdlib.objectives.hinge` compares runs over so many tokens
MAX_TOKENS = 128  # of the target that the kernel takes


class Acceptance(NamedTuple):
    """The loss, a scalar, and three figures of every position ``[N]``: alpha, whether the drafter's
    favourite is the target's (0 or 1), and KL(p || q) over the target's 32 best tokens. ``loss`` and
    ``kl`` are differentiable."""

    loss: Tensor
    alpha: Tensor
    agreement: Tensor
    kl: Tensor


def reference(logits: Tensor, index: Tensor, probs: Tensor, loss: str) -> tuple[Tensor, ...]:
    """The definition: loss, alpha, agreement and KL of each position ``[N]``.

    ``index`` holds the row of each of the target's tokens ``[N, K]``, -1 where the drafter has none.
    """
    log_q = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    scored = index >= 0
    chosen = log_q.gather(-1, index.clamp_min(0).long()).masked_fill(~scored, float("-inf"))
    p = probs.to(log_q.dtype)
    tiny = torch.finfo(p.dtype).tiny

    def divergence(p: Tensor, chosen: Tensor, scored: Tensor) -> Tensor:
        p = torch.where(scored, p, 0)
        p = p / p.sum(-1, keepdim=True).clamp_min(tiny)
        return (torch.special.xlogy(p, p) - p * chosen.masked_fill(~scored, 0.0)).sum(-1)

    alpha = torch.minimum(p, chosen.exp()).sum(-1)
    kl = divergence(p, chosen, scored)
    if loss == "ce":
        value = -chosen[:, 0].masked_fill(~scored[:, 0], 0.0)  # nothing to learn without a row
    elif loss == "kl":
        value = kl
    elif loss == "tv":
        value = 1 - alpha
    elif loss == "lk_alpha":
        value = -alpha.clamp_min(tiny).log()
    else:
        weight = torch.exp(-3 * alpha.detach())
        value = weight * kl + (1 - weight) * (1 - alpha)
    agreement = (log_q.argmax(-1) == index[:, 0]).to(p.dtype)
    top = divergence(p[:, :TOP], chosen[:, :TOP], scored[:, :TOP])
    return value, alpha.detach(), agreement, top


@device
def tokens(x_ptr, index_ptr, probs_ptr, lse, count, K: tl.constexpr):
    """The target's tokens at one position: row, ``p``, ``log q``, and ``p'`` over all and 32 of them."""
    slot = tl.arange(0, K)
    row = tl.load(index_ptr + slot, mask=slot < count, other=-1)
    scored = row >= 0
    p = tl.load(probs_ptr + slot, mask=slot < count, other=0.0)
    log_q = tl.load(x_ptr + row, mask=scored, other=0.0).to(tl.float32) - lse
    log_q = tl.where(scored, log_q, float("-inf"))
    share = tl.where(scored, p, 0.0)
    top = tl.where(slot < 32, share, 0.0)
    share = share / tl.maximum(tl.sum(share, 0), 1.1754944e-38)
    top = top / tl.maximum(tl.sum(top, 0), 1.1754944e-38)
    return row, p, log_q, share, top


@device
def divergence(p, log_q):
    """KL(p || q), where terms with ``p = 0`` count nothing."""
    some = p > 0
    return tl.sum(p * tl.where(some, tl.log(tl.where(some, p, 1.0)) - log_q, 0.0), 0)


@kernel
def forward_kernel(
    logits_ptr,  # [N, R], rows ``step`` apart
    index_ptr,  # [N, K] int32, -1 for none
    probs_ptr,  # [N, K] float32
    lse_ptr,  # [N] float32, as the four below
    loss_ptr,
    alpha_ptr,
    agreement_ptr,
    kl_ptr,
    size,  # R
    step,
    count,  # K
    LOSS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    if ALIGNED:  # changes nothing, but shows the compiler that 16 bytes can be loaded at once
        size, step = size // 16 * 16, step // 16 * 16
    base = at * step
    # Every lane keeps its own maximum, where it was, and its own sum; lanes meet once, at the end.
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        r = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + base + r, mask=r < size, other=float("-inf")).to(tl.float32)
        new_m = tl.maximum(m, x)
        safe = tl.where(new_m == float("-inf"), 0.0, new_m)
        total = total * tl.exp(m - safe) + tl.exp(x - safe)
        where = tl.where(x > m, r, where)
        m = new_m
    most = tl.max(m, 0)
    lse = most + tl.log(tl.sum(total * tl.exp(m - most), 0))
    favourite = tl.min(tl.where(m == most, where, size), 0)

    index, probs = index_ptr + at * count, probs_ptr + at * count
    row, p, log_q, share, top = tokens(logits_ptr + base, index, probs, lse, count, K)
    alpha = tl.sum(tl.minimum(p, tl.exp(log_q)), 0)
    if LOSS == "ce":
        first_log_q = tl.sum(tl.where((tl.arange(0, K) == 0) & (row >= 0), log_q, 0.0), 0)
        loss = -first_log_q
    elif LOSS == "kl":
        loss = divergence(share, log_q)
    elif LOSS == "tv":
        loss = 1 - alpha
    elif LOSS == "lk_alpha":
        loss = -tl.log(tl.maximum(alpha, 1.1754944e-38))
    else:
        weight = tl.exp(-3 * alpha)
        loss = weight * divergence(share, log_q) + (1 - weight) * (1 - alpha)
    tl.store(lse_ptr + at, lse)
    tl.store(loss_ptr + at, loss)
    tl.store(alpha_ptr + at, alpha)
    tl.store(agreement_ptr + at, (favourite == tl.load(index)).to(tl.float32))
    tl.store(kl_ptr + at, divergence(top, log_q))


@kernel
def backward_kernel(
    logits_ptr,
    index_ptr,
    probs_ptr,
    lse_ptr,
    dloss_ptr,  # [N] float32
    dkl_ptr,  # [N] float32
    dlogits_ptr,  # as logits
    size,
    step,
    count,
    LOSS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    if ALIGNED:  # changes nothing, but shows the compiler that 16 bytes can be loaded at once
        size, step = size // 16 * 16, step // 16 * 16
    base = at * step
    lse = tl.load(lse_ptr + at)
    index, probs = index_ptr + at * count, probs_ptr + at * count
    row, p, log_q, share, top = tokens(logits_ptr + base, index, probs, lse, count, K)
    q = tl.exp(log_q)
    alpha = tl.sum(tl.minimum(p, q), 0)
    dalpha = tl.where(q < p, q, 0.0)  # d alpha / d log q
    if LOSS == "ce":
        c = tl.where((tl.arange(0, K) == 0) & (row >= 0), -1.0, 0.0)
    elif LOSS == "kl":
        c = -share
    elif LOSS == "tv":
        c = -dalpha
    elif LOSS == "lk_alpha":
        c = tl.where(alpha > 1.1754944e-38, -dalpha / tl.maximum(alpha, 1.1754944e-38), 0.0)
    else:
        weight = tl.exp(-3 * alpha)
        c = -weight * share - (1 - weight) * dalpha
    c = c * tl.load(dloss_ptr + at) - top * tl.load(dkl_ptr + at)
    total = tl.sum(c, 0)
    for first in range(0, size, BLOCK):
        r = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + base + r, mask=r < size, other=0.0).to(tl.float32)
        dx = -total * tl.exp(x - lse)
        tl.store(dlogits_ptr + base + r, dx.to(dlogits_ptr.dtype.element_ty), mask=r < size)
    tl.debug_barrier()  # the rows of the K tokens are written again, after the loop's
    dx = (c - total * q).to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + base + row, dx, mask=row >= 0)


def tile(loss: str, aligned: bool) -> dict:
    """Constants and options of both kernels."""
    sizes = {"LOSS": loss, "ALIGNED": aligned, "BLOCK": 2048, "K": MAX_TOKENS}
    return sizes | {"num_warps": 4, "num_stages": 2}


def configurations() -> list[Configuration]:
    """Every version of the kernels that the launcher can pick."""
    names = ("probs", "lse", "loss", "alpha", "agreement", "kl", "dloss", "dkl")
    types = {"index_ptr": "i32"} | {f"{name}_ptr": "fp32" for name in names}
    return [
        Configuration(c["kernel"], c["dtype"], options, types, dot=False, wide=c["aligned"])
        for c in grid_of(
            kernel=(forward_kernel, backward_kernel),
            dtype=DTYPES,
            loss=LOSSES,
            aligned=(True, False),
        )
        for options in [tile(c["loss"], c["aligned"])]
    ]


class Positions(torch.autograd.Function):
    """The kernels as one differentiable operation: as :func:`reference`."""

    @staticmethod
    def forward(ctx, logits, index, probs, loss):
        positions, size = logits.shape
        step = logits.stride(0)
        room = {"dtype": torch.float32, "device": logits.device}
        lse, *found = (torch.empty(positions, **room) for _ in range(5))
        ctx.numbers, ctx.tile = (
            (size, step, index.shape[1]),
            tile(loss, step % 16 == 0 and size % 16 == 0),
        )
        forward_kernel[(positions,)](logits, index, probs, lse, *found, *ctx.numbers, **ctx.tile)
        ctx.save_for_backward(logits, index, probs, lse)
        ctx.mark_non_differentiable(*found[1:3])
        return tuple(found)

    @staticmethod
    def backward(ctx, dloss, _, __, dkl):
        logits, index, probs, lse = ctx.saved_tensors
        positions, step = logits.shape[0], ctx.numbers[1]
        room = torch.empty((positions, step), dtype=logits.dtype, device=logits.device)
        gradients = (dloss.contiguous(), dkl.contiguous(), room)
        backward_kernel[(positions,)](
            logits, index, probs, lse, *gradients, *ctx.numbers, **ctx.tile
        )
        return room[:, : logits.shape[1]], None, None, None


def acceptance_loss(
    logits: Tensor,
    ids: Tensor,
    probs: Tensor,
    loss: str = "ce",
    rows: Tensor | None = None,
    *,
    check: bool = True,
    backend: str = "auto",
) -> Acceptance:
    """The loss of one view against the shared teacher target, with its figures.

    Parameters
    ----------
    logits
        The drafter's ``[N, R]``, ``R`` the rows it scores.
    ids, probs
        The target's most probable tokens and their probabilities, ``[N, K]``, best first, a token at
        most once; ``K`` up to 128 for the kernel.
    loss
        ``ce``, ``kl``, ``tv``, ``lk_alpha`` or ``lk_lambda``.
    rows
        Row of each token id ``[V]``, -1 where the drafter does not score it; ``None``: ids are rows.
    check
        Look at the values of ``ids``, which on a GPU waits for them.

    Returns
    -------
    :class:`Acceptance`. The loss is the mean over positions; that of ``ce`` over the positions whose
    first token has a row.

    Raises
    ------
    ValueError
        Naming the argument: a wrong rank, dtype, shape or device, a number out of range.
    """
    require(loss in LOSSES, f"unknown loss {loss!r}; allowed: {', '.join(LOSSES)}")
    check_tensor("logits", logits, 2)
    check_tensor("probs", probs, 2)
    positions, count = probs.shape
    length = logits.shape[0]
    require(positions == length, f"probs of {positions} positions, logits of {length}")
    require(probs.device == logits.device, f"probs is on {probs.device}, not on {logits.device}")
    check_index("ids", ids, (positions, count), logits.device)
    if rows is not None:
        check_index("rows", rows, (rows.numel(),), logits.device)
    if check:
        check_range("ids", ids, 0, logits.shape[1] if rows is None else rows.shape[0])
        if rows is not None:
            check_range("rows", rows, -1, logits.shape[1])
    index = ids if rows is None else rows[ids]
    many = f"ids has {count} tokens a position; the kernel takes {MAX_TOKENS}"
    if use_triton(backend, "logits", logits, fault=many if count > MAX_TOKENS else None):
        if logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]:
            logits = logits.contiguous()
        known = (index.int().contiguous(), probs.float().contiguous())
        value, *figures = Positions.apply(logits, *known, loss)
    else:
        value, *figures = reference(logits, index, probs, loss)
    learnt = (index[:, 0] >= 0).sum().clamp_min(1) if loss == "ce" else positions
    return Acceptance(value.sum() / learnt, *figures)
