"""Training attention under several budget views that share one prefix, forward and backward.

Formula. View ``i`` is a continuation (or a block of one) of ``n`` tokens with keys and values of its own,
and ``sizes[i]`` entries of the shared prefix, chosen per KV head. Its query ``j`` sees

    entries  chosen[i, :sizes[i]] of the prefix,  and  own entries 0..j

    out[i, j] = sum_t p_t v[t],    p = softmax_t(q[i, j] . k[t])

A drafter that is trained ``step`` draft steps deep (:func:`bdlib.views.drafted_view`) has
``(step + 1) n`` own entries, ``n`` of each draft step. Query ``j`` then sees those of the first up to
``j - step`` and, of draft step ``s`` after it, entry ``j - step + s`` alone.

Backward, with ``do`` the gradient of ``out`` and ``delta = sum(do * out)`` over the head:

    dv[t] = sum_j p_jt do_j        dp_jt = do_j . v[t]      ds_jt = p_jt (dp_jt - delta_j)
    dq_j  = sum_t ds_jt k[t]       dk[t] = sum_j ds_jt q_j

``p = exp(score - lse)`` is computed again from the scores and the saved ``lse``, so no ``n x S`` matrix
is ever stored (FlashAttention, arXiv 2205.14135). A score rounds anew each time, by 6e-8 of its
size: kept at most 1, ``p`` is as exact as the scores are, and never overflows.

Grids: forward and ``dq`` ``(N * H_kv, row tiles)``, a program per 64 queries; ``dk, dv``
``(N * H_kv, key tiles)``, a program per tile of keys, once for the chosen entries and once for the
view's own. Views that chose the same entry add to one gradient, atomically in float32, so the last
digits of the prefix's gradient depend on the order in which programs run.

Bytes read, forward: each view's entries once per 64 queries, straight from the prefix, which all
views share: a gathered copy would cost ``N * S`` entries of memory. Written: the output and 4 bytes
a query. Backward reads the same twice more, with ``q``, ``do`` and 8 bytes a query per key tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlib.kernels.launching import (
    DTYPES,
    HEAD_DIMS,
    Configuration,
    check_attention,
    check_index,
    check_range,
    check_tensor,
    grid_of,
    precision,
    require,
    use_triton,
)
from bdlib.kernels.lazy import device, kernel, tl
from bdlib.kernels.split import attend, load, rows_of


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    chosen: Tensor,
    sizes: Tensor,
) -> Tensor:
    """The definition: ``[N, H, n, D]``, differentiable by PyTorch, in float32 (or float64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    views, _, n, dim = q.shape
    kv_heads, entries = prefix_k.shape[:2]
    real = torch.arange(chosen.shape[2], device=q.device) < sizes[:, None]  # [N, S]
    rows = torch.where(real[:, None], chosen, 0)
    rows = (rows + torch.arange(kv_heads, device=q.device)[:, None] * entries).flatten()
    # One flat index_select: its gradient adds into [H_kv T, D], not into a copy for every view.
    old_k, old_v = (
        prefix.reshape(-1, dim).index_select(0, rows).view(*chosen.shape, dim)
        for prefix in (prefix_k, prefix_v)
    )
    old_v = torch.where(real[:, None, :, None], old_v, 0)
    step = k.shape[2] // n - 1
    k, v = (torch.cat(pair, 2).to(wide) for pair in ((old_k, k), (old_v, v)))
    ahead = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
    own = torch.cat([ahead >= step] + [ahead == step - i for i in range(1, step + 1)], 1)
    visible = torch.cat((real[:, None].expand(-1, n, -1), own.expand(views, -1, -1)), -1)
    scores = q.to(wide).unflatten(1, (kv_heads, -1)) @ k.transpose(-1, -2)[:, :, None]
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))  # [N, H_kv, g, n, S + n]
    return (torch.softmax(scores, -1) @ v[:, :, None]).flatten(1, 2).to(q.dtype)


@device
def sees_own(query, t, n, step):
    """Whether query slots see own entries ``t``: see the formula above."""
    ahead = query - t % n
    return tl.where(t < n, ahead >= step, ahead == step - t // n)


@kernel
def forward_kernel(
    q_ptr,  # [N, H_kv, group, n, D]
    k_ptr,  # [N, H_kv, own, D], as v
    v_ptr,
    prefix_k_ptr,  # [H_kv, T, D], as prefix_v
    prefix_v_ptr,
    chosen_ptr,  # [N, H_kv, S] int32
    sizes_ptr,  # [N] int32
    out_ptr,  # as q
    lse_ptr,  # [N, H_kv, group, n] float32
    kv_heads,
    group,
    n,
    own,  # n, or (step + 1) n
    width,  # S
    entries,  # T
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)  # view and KV head
    head = pair % kv_heads
    inside, query, ok = rows_of(tl.program_id(1), group, n, ROWS)
    at = pair * group * n + inside
    q = load(q_ptr, at, ok, D, D)
    size = tl.load(sizes_ptr + pair // kv_heads)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    z = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    for first in range(0, size, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        real = slot < size
        t = head * entries + tl.load(chosen_ptr + pair * width + slot, mask=real, other=0)
        k, v = load(prefix_k_ptr, t, real, D, D), load(prefix_v_ptr, t, real, D, D)
        m, z, acc = attend(q, k, v, real[None, :], m, z, acc, PRECISION)
    step = own // n - 1
    ahead = tl.minimum(own, (tl.program_id(1) + 1) * ROWS // group + 1)  # none sees further
    for first in range(0, tl.where(step == 0, ahead, own), BLOCK):
        t = first + tl.arange(0, BLOCK)
        real = t < own
        k, v = load(k_ptr, pair * own + t, real, D, D), load(v_ptr, pair * own + t, real, D, D)
        visible = real[None, :] & sees_own(query[:, None], t[None, :], n, step)
        m, z, acc = attend(q, k, v, visible, m, z, acc, PRECISION)
    d = tl.arange(0, D)
    z = tl.where(z > 0, z, 1.0)  # a void slot sees nothing, and gets zero
    m = tl.where(m > float("-inf"), m, 0.0)
    out = (acc / z[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] * D + d[None, :], out, mask=ok[:, None])
    tl.store(lse_ptr + at, m + tl.log(z), mask=ok)


@device
def add_dq(q, k, v, do, lse, delta, visible, dq, PRECISION: tl.constexpr):
    """What one block of keys adds to the gradient of the queries ``[R, D]``."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.where(visible, tl.exp(tl.minimum(scores - lse[:, None], 0.0)), 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return dq + tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)


@kernel
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    chosen_ptr,
    sizes_ptr,
    do_ptr,  # as q
    lse_ptr,
    delta_ptr,  # as lse
    dq_ptr,  # as q
    kv_heads,
    group,
    n,
    own,
    width,
    entries,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    head = pair % kv_heads
    inside, query, ok = rows_of(tl.program_id(1), group, n, ROWS)
    at = pair * group * n + inside
    q, do = load(q_ptr, at, ok, D, D), load(do_ptr, at, ok, D, D)
    lse = tl.load(lse_ptr + at, mask=ok, other=0.0)
    delta = tl.load(delta_ptr + at, mask=ok, other=0.0)
    size = tl.load(sizes_ptr + pair // kv_heads)
    dq = tl.zeros((ROWS, D), tl.float32)
    for first in range(0, size, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        real = slot < size
        t = head * entries + tl.load(chosen_ptr + pair * width + slot, mask=real, other=0)
        k, v = load(prefix_k_ptr, t, real, D, D), load(prefix_v_ptr, t, real, D, D)
        dq = add_dq(q, k, v, do, lse, delta, real[None, :] & ok[:, None], dq, PRECISION)
    step = own // n - 1
    ahead = tl.minimum(own, (tl.program_id(1) + 1) * ROWS // group + 1)
    for first in range(0, tl.where(step == 0, ahead, own), BLOCK):
        t = first + tl.arange(0, BLOCK)
        real = t < own
        k, v = load(k_ptr, pair * own + t, real, D, D), load(v_ptr, pair * own + t, real, D, D)
        visible = ok[:, None] & real[None, :] & sees_own(query[:, None], t[None, :], n, step)
        dq = add_dq(q, k, v, do, lse, delta, visible, dq, PRECISION)
    d = tl.arange(0, D)
    there = dq_ptr + at[:, None] * D + d[None, :]
    tl.store(there, dq.to(dq_ptr.dtype.element_ty), mask=ok[:, None])


@kernel
def dkv_kernel(
    q_ptr,
    k_ptr,  # the prefix's keys, or the views' own, as v
    v_ptr,
    chosen_ptr,
    sizes_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,  # as k, float32, as dv
    dv_ptr,
    kv_heads,
    group,
    n,
    own,
    width,
    entries,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if OWN:
        real = slot < own
        t = pair * own + slot
        step = own // n - 1
        first_tile = tl.program_id(1) * BLOCK * group // ROWS  # earlier queries see none of these
        first_tile = tl.where(step == 0, first_tile, 0)
    else:
        real = slot < tl.load(sizes_ptr + pair // kv_heads)
        number = tl.load(chosen_ptr + pair * width + slot, mask=real, other=0)
        t = (pair % kv_heads) * entries + number
        first_tile = 0
    k, v = load(k_ptr, t, real, D, D), load(v_ptr, t, real, D, D)
    dk = tl.zeros((BLOCK, D), tl.float32)
    dv = tl.zeros((BLOCK, D), tl.float32)
    for tile in range(first_tile, tl.cdiv(n * group, ROWS)):
        inside, query, ok = rows_of(tile, group, n, ROWS)
        at = pair * group * n + inside
        q, do = load(q_ptr, at, ok, D, D), load(do_ptr, at, ok, D, D)
        lse = tl.load(lse_ptr + at, mask=ok, other=0.0)
        delta = tl.load(delta_ptr + at, mask=ok, other=0.0)
        visible = real[:, None] & ok[None, :]
        if OWN:
            visible = visible & sees_own(query[None, :], slot[:, None], n, step)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [N, R]
        p = tl.where(visible, tl.exp(tl.minimum(scores - lse[None, :], 0.0)), 0.0)
        dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    d = tl.arange(0, D)
    there = t.to(tl.int64)[:, None] * D + d[None, :]
    if OWN:
        tl.store(dk_ptr + there, dk, mask=real[:, None])
        tl.store(dv_ptr + there, dv, mask=real[:, None])
    else:
        tl.atomic_add(dk_ptr + there, dk, mask=real[:, None], sem="relaxed")
        tl.atomic_add(dv_ptr + there, dv, mask=real[:, None], sem="relaxed")


TILES = {  # rows, keys at once, warps: the largest that no target spills
    "forward": {"half": (64, 32, 8), "float": (16, 32, 8)},
    "dq": {"half": (64, 32, 4), "float": (16, 16, 4)},
    "dkv": {"half": (32, 32, 4), "float": (16, 16, 4)},
}


def tile(name: str, dtype: torch.dtype, dim: int) -> dict:
    """Constants and options of a kernel, ``forward``, ``dq`` or ``dkv``."""
    rows, block, warps = TILES[name]["float" if dtype == torch.float32 else "half"]
    if (name, dim) == ("dkv", 128):
        rows = 16  # both gradients of a key are held at once
    return {"D": dim, "ROWS": rows, "BLOCK": block, "num_warps": warps, "num_stages": 2}


def configurations() -> list[Configuration]:
    """Every version of the kernels that the launcher can pick."""
    types = {"chosen_ptr": "i32", "sizes_ptr": "i32"}
    types |= {f"{name}_ptr": "fp32" for name in ("lse", "delta", "dk", "dv")}
    found = []
    for choice in grid_of(dtype=DTYPES, dim=HEAD_DIMS):
        for kernel_, name, more in (
            (forward_kernel, "forward", {}),
            (dq_kernel, "dq", {}),
            (dkv_kernel, "dkv", {"OWN": False}),
            (dkv_kernel, "dkv", {"OWN": True}),
        ):
            options = tile(name, **choice) | more
            found.append(Configuration(kernel_, choice["dtype"], options, types))
    return found


class MultiView(torch.autograd.Function):
    """The kernels as one differentiable operation."""

    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, chosen, sizes):
        views, heads, n, dim = q.shape
        kv_heads, entries = prefix_k.shape[:2]
        group, width = heads // kv_heads, chosen.shape[2]
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        ctx.sizes = (kv_heads, group, n, k.shape[2], width, entries)
        inputs = (q, k, v, prefix_k, prefix_v, chosen, sizes)
        options = {"PRECISION": precision(q.device), **tile("forward", q.dtype, dim)}
        grid = (views * kv_heads, -(-n * group // options["ROWS"]))
        forward_kernel[grid](*inputs, out, lse, *ctx.sizes, **options)
        ctx.save_for_backward(*inputs, out, lse)
        return out

    @staticmethod
    def backward(ctx, do):
        *inputs, out, lse = ctx.saved_tensors
        q, k, v, prefix_k, prefix_v, chosen, sizes = inputs
        kv_heads, group, n, length_own, width, _ = ctx.sizes
        do = do.contiguous()
        delta = (do.float() * out.float()).sum(-1)
        dq, pairs = torch.empty_like(q), q.shape[0] * kv_heads
        options = {"PRECISION": precision(q.device), **tile("dq", q.dtype, q.shape[3])}
        grid = (pairs, -(-n * group // options["ROWS"]))
        dq_kernel[grid](*inputs, do, lse, delta, dq, *ctx.sizes, **options)
        options |= tile("dkv", q.dtype, q.shape[3])
        grads = [dq]
        for own, keys, values, length in (
            (True, k, v, length_own),
            (False, prefix_k, prefix_v, width),
        ):
            if not length or not (own or any(ctx.needs_input_grad[3:5])):
                grads += [None, None]  # a prefix that ran without gradient
                continue
            dk, dv = (torch.zeros(keys.shape, device=q.device) for _ in range(2))
            arguments = (q, keys, values, chosen, sizes, do, lse, delta, dk, dv, *ctx.sizes)
            dkv_kernel[(pairs, -(-length // options["BLOCK"]))](*arguments, OWN=own, **options)
            grads += [dk.to(q.dtype), dv.to(q.dtype)]
        return *grads, None, None


def multi_view(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    chosen: Tensor,
    sizes: Tensor,
    *,
    check: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Attention of ``N`` views of a continuation over chosen prefix entries and, causally, themselves.

    Parameters
    ----------
    q
        Queries ``[N, H, n, D]``, already scaled.
    k, v
        Keys and values of the views' own tokens, ``[N, H_kv, n, D]``; ``n`` more of each later draft
        step.
    prefix_k, prefix_v
        The prefix that all views share, ``[H_kv, T, D]``.
    chosen
        Entries of the prefix that each view keeps, ``[N, H_kv, S]``, each at most once.
    sizes
        How many of the ``S`` are real, ``[N]``; the rest pads.
    check
        Look at the values of ``chosen`` and ``sizes``, which on a GPU waits for them.

    Returns
    -------
    ``[N, H, n, D]`` in the dtype of ``q``, differentiable in the first five arguments.

    Raises
    ------
    ValueError
        Naming the argument: a wrong rank, dtype, shape or device, a number out of range.
    """
    check_attention(q, k, v)
    whole = k.shape[2] % q.shape[2] == 0
    require(whole, f"k has {k.shape[2]} tokens, no multiple of the {q.shape[2]} of q")
    check_tensor("prefix_k", prefix_k, 3, ("q", q))
    check_tensor("prefix_v", prefix_v, 3, ("q", q))
    views, kv_heads, _, dim = k.shape
    shape = [kv_heads, prefix_k.shape[1], dim]
    for name, prefix in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        found = list(prefix.shape)
        require(found == shape, f"{name} must have shape {shape}, got {found}")
    width = chosen.shape[-1] if isinstance(chosen, Tensor) and chosen.dim() == 3 else "S"
    check_index("chosen", chosen, (views, kv_heads, width), q.device)
    check_index("sizes", sizes, (views,), q.device)
    if check:
        check_range("sizes", sizes, 0, width + 1)
        real = torch.arange(width, device=q.device) < sizes[:, None]
        check_range("chosen", chosen.where(real[:, None], 0), 0, prefix_k.shape[1])
    inputs = (q, k, v, prefix_k, prefix_v)
    if not use_triton(backend, "q", q, dim):
        return reference(*inputs, chosen, sizes)
    inputs = [tensor.contiguous() for tensor in inputs]
    return MultiView.apply(*inputs, chosen.int().contiguous(), sizes.int())
