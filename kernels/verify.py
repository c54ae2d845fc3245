"""Verification: a few queries over the whole cache, several sequences, each with its own length.

Formula, for query ``i`` of a sequence of ``length`` entries whose last ``n`` are the queries' own:

    out[i] = sum_t softmax_t(q[i] . k[t]) v[t]        over t <= length - n + i

Grid: ``(B * H_kv, splits, row tiles)``. Each sequence cuts its own length into ``splits`` even pieces.
A program first walks over the blocks that every query sees, without a causal mask, then over the
tail, where query ``i`` stops at its own position. The pieces are merged by log-sum-exp
(:mod:`bdlib.kernels.split`).

Bytes read: keys and values once, ``2 * sum(lengths) * H_kv * D`` elements, as long as
``n * H / H_kv <= 64`` (16 in float32); the queries once a split. Written: the output,
``B * H * n * D`` elements, and between the two kernels the parts, ``4 (D + 1)`` bytes a row and split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlib.kernels.launching import (
    DTYPES,
    HEAD_DIMS,
    Configuration,
    as_lengths,
    check_attention,
    grid_of,
    layout_fault,
    precision,
    strides,
    use_triton,
)
from bdlib.kernels.lazy import kernel, tl
from bdlib.kernels.split import (
    allocate_parts,
    attend,
    choose_splits,
    finish,
    load,
    merge,
    rows_of,
    tile,
)


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """The definition: ``[B, H, n, D]``, computed in float32 (float64 if the inputs are)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group, n = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (t.to(wide).repeat_interleave(group, 1) for t in (k, v))
    t = torch.arange(k.shape[2], device=q.device)
    position = lengths[:, None] - n + torch.arange(n, device=q.device)  # [B, n]
    visible = (t <= position[..., None])[:, None]  # [B, 1, n, T]
    scores = (q.to(wide) @ k.transpose(-1, -2)).masked_fill(~visible, float("-inf"))
    v = v.masked_fill(~visible[:, :, -1, :, None], 0.0)  # entries past the length may hold anything
    return (torch.softmax(scores, -1) @ v).to(q.dtype)


STEADY = 1024  # entries; the kernel has it as a number


@kernel
def verify_kernel(
    q_ptr,  # [B, H, n, D], contiguous
    k_ptr,  # [B, H_kv, T, D]
    v_ptr,  # the same, with the same strides
    lengths_ptr,  # [B] int32
    out_ptr,  # [B, H, n, D]
    part_ptr,  # [splits, B, H, n, D] float32
    lse_ptr,  # [splits, B, H, n] float32
    b_stride: tl.int64,
    h_stride: tl.int64,
    t_stride: tl.int64,
    kv_heads,
    group,
    n,
    splits,
    total,  # B * H * n
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0) % kv_heads
    batch = tl.program_id(0) // kv_heads
    split = tl.program_id(1)
    inside, query, ok = rows_of(tl.program_id(2), group, n, ROWS)
    at = tl.program_id(0).to(tl.int64) * group * n + inside
    q = load(q_ptr, at, ok, D, D)  # [R, D]

    length = tl.load(lengths_ptr + batch)
    # STEADY: the same pieces for every length up to the next multiple of 1024.
    per_split = tl.cdiv(tl.cdiv(tl.cdiv(length, 1024) * 1024, splits), BLOCK) * BLOCK
    start = split * per_split
    stop = tl.minimum(start + per_split, length)
    position = length - n + query  # where a query stands
    seen_by_all = tl.minimum(stop, (length - n + 1) // BLOCK * BLOCK)
    base = batch.to(tl.int64) * b_stride + head.to(tl.int64) * h_stride

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    z = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    for first in range(start, seen_by_all, BLOCK):
        t = first + tl.arange(0, BLOCK)
        k = load(k_ptr + base, t, t < stop, t_stride, D)  # [N, D]
        v = load(v_ptr + base, t, t < stop, t_stride, D)
        m, z, acc = attend(q, k, v, (t < stop)[None, :], m, z, acc, PRECISION)
    for first in range(tl.maximum(start, seen_by_all), stop, BLOCK):
        t = first + tl.arange(0, BLOCK)
        k = load(k_ptr + base, t, t < stop, t_stride, D)  # [N, D]
        v = load(v_ptr + base, t, t < stop, t_stride, D)
        visible = (t < stop)[None, :] & (t[None, :] <= position[:, None])
        m, z, acc = attend(q, k, v, visible, m, z, acc, PRECISION)
    finish(acc, m, z, out_ptr, part_ptr, lse_ptr, at, ok, splits, split, total, D)


def configurations() -> list[Configuration]:
    """Every version of the kernel that the launcher can pick."""
    types = {"lengths_ptr": "i32", "part_ptr": "fp32", "lse_ptr": "fp32"}
    choices = grid_of(dtype=DTYPES, dim=HEAD_DIMS, rows=(16, 64))
    return [Configuration(verify_kernel, c["dtype"], tile(**c), types) for c in choices]


def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: int | Tensor,
    *,
    splits: int | None = None,
    check: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Attention of the last ``n`` tokens of each sequence over all of it, themselves included.

    Parameters
    ----------
    q
        Queries ``[B, H, n, D]``, already scaled, of the last ``n`` entries.
    k, v
        Cache ``[B, H_kv, T, D]``; entries past a sequence's length are not read.
    lengths
        Entries of each sequence, ``[B]`` or one number for all; at least ``n``.
    splits
        Pieces to cut the keys into, 1 to 64; chosen by the size of the work by default. Where they end
        does not depend on the number of queries, nor on the length between two multiples of
        :data:`STEADY`: there a row is bit for bit what it would be alone, if both fit 16 rows.
    check
        Look at the values of ``lengths``, which on a GPU waits for them.

    Returns
    -------
    ``[B, H, n, D]`` in the dtype of ``q``.

    Raises
    ------
    ValueError
        Naming the argument: a wrong rank, dtype, shape or device, a length out of range.
    """
    group = check_attention(q, k, v)
    batch, heads, n, dim = q.shape
    most = lengths if isinstance(lengths, int) else k.shape[2]
    steady = max(1, (most - 1) // STEADY * STEADY)
    lengths = as_lengths(lengths, n, k, check)
    if not use_triton(backend, "k", k, dim, layout_fault(k=k, v=v)):
        return reference(q, k, v, lengths)
    rows, kv_heads = n * group, k.shape[1]
    options = tile(q.dtype, dim, rows)
    tiles = -(-rows // options["ROWS"])
    whole, programs = tiles * options["ROWS"], batch * kv_heads * tiles
    splits = choose_splits(splits, k, whole, steady, programs, options["BLOCK"])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts, lse = allocate_parts(q, splits)
    tensors = (q.contiguous(), k, v, lengths, out, parts, lse)
    counts = (kv_heads, group, n, splits, batch * heads * n)
    grid = (batch * kv_heads, splits, tiles)
    options["PRECISION"] = precision(q.device)
    verify_kernel[grid](*tensors, *strides(k), *counts, **options)
    return merge(parts, lse, out)
