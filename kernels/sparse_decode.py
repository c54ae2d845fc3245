"""Sparse decoding: a few queries over the selected chunks of the full cache, read where they lie.

Formula, for query ``i`` of a sequence of ``length`` entries whose last ``n`` are the queries' own, and
a recent window of ``window`` entries before them:

    out[i] = sum_t softmax_t(q[i] . k[t]) v[t]

    over t in the selected chunks, before the recent window, and recent t <= length - n + i

Grid: ``(B * H_kv, splits, row tiles)``. A program takes an even share of the selected chunks, then an
even share of the recent entries. It reads a block of chunk numbers and from them the addresses of the
keys: nothing is gathered into a copy. The pieces are merged by log-sum-exp
(:mod:`bdlib.kernels.split`).

Bytes read: the selected and recent keys and values once, ``2 * B * H_kv * budget * D`` elements, and 4
bytes a chunk (a unit of 1 or 8 tokens), as long as ``n * H / H_kv <= 64`` (16 in float32):
independent of the length of the context. The queries once a split. Written: as :mod:`bdlib.kernels.verify`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlib.kernels.launching import (
    CHUNK_UNITS,
    DTYPES,
    HEAD_DIMS,
    Configuration,
    as_lengths,
    check_attention,
    check_index,
    check_range,
    chunk_unit,
    grid_of,
    layout_fault,
    precision,
    require,
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


def reference(
    q: Tensor, k: Tensor, v: Tensor, chunks: Tensor, lengths: Tensor, window: int, chunk_size: int
) -> Tensor:
    """The definition: ``[B, H, n, D]``, computed in float32 (float64 if the inputs are)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group, n, entries = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    steps = torch.arange(chunk_size, device=q.device)
    selected = (chunks[..., None] * chunk_size + steps).flatten(2)  # [B, H_kv, m C]
    recent = (lengths - n - window).clamp_min(0)[:, None, None]
    selected = torch.where((selected >= 0) & (selected < recent), selected, entries)
    kept = torch.zeros(*k.shape[:2], entries + 1, dtype=torch.bool, device=q.device)
    kept = kept.scatter(2, selected, True)[..., :entries]  # which entries a chunk brings
    t = torch.arange(entries, device=q.device)
    position = lengths[:, None] - n + torch.arange(n, device=q.device)  # [B, n]
    own = (t >= recent) & (t <= position[..., None])  # [B, n, T]
    visible = (kept[:, :, None] | own[:, None]).repeat_interleave(group, 1)  # [B, H, n, T]
    k, v = (t.to(wide).repeat_interleave(group, 1) for t in (k, v))
    scores = (q.to(wide) @ k.transpose(-1, -2)).masked_fill(~visible, float("-inf"))
    v = v.masked_fill(~visible[:, :, -1, :, None], 0.0)  # entries not kept may hold anything
    return (torch.softmax(scores, -1) @ v).to(q.dtype)


@kernel
def sparse_decode_kernel(
    q_ptr,  # [B, H, n, D], contiguous
    k_ptr,  # [B, H_kv, T, D]
    v_ptr,  # the same, with the same strides
    chunks_ptr,  # [B, H_kv, m] int32
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
    count,  # m, chunks selected
    window,
    splits,
    total,  # B * H * n
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0) % kv_heads
    batch = tl.program_id(0) // kv_heads
    split = tl.program_id(1)
    inside, query, ok = rows_of(tl.program_id(2), group, n, ROWS)
    at = tl.program_id(0).to(tl.int64) * group * n + inside
    q = load(q_ptr, at, ok, D, D)  # [R, D]

    length = tl.load(lengths_ptr + batch)
    recent = tl.maximum(length - n - window, 0)  # where the recent entries begin
    position = length - n + query  # where a query stands
    base = batch.to(tl.int64) * b_stride + head.to(tl.int64) * h_stride
    numbers = chunks_ptr + (batch * kv_heads + head).to(tl.int64) * count

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    z = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    PER_BLOCK: tl.constexpr = BLOCK // CHUNK
    share = tl.cdiv(tl.cdiv(count, PER_BLOCK), splits) * PER_BLOCK
    last = tl.minimum((split + 1) * share, count)
    for first in range(split * share, last, PER_BLOCK):
        c = first + tl.arange(0, PER_BLOCK)
        number = tl.load(numbers + c, mask=c < last, other=-1)
        t = number[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        t = tl.reshape(t, (BLOCK,))  # the entries of these chunks
        real = (t >= 0) & (t < recent)
        k = load(k_ptr + base, t, real, t_stride, D)  # [N, D]
        v = load(v_ptr + base, t, real, t_stride, D)
        m, z, acc = attend(q, k, v, real[None, :], m, z, acc, PRECISION)
    share = tl.cdiv(tl.cdiv(length - recent, BLOCK), splits) * BLOCK
    last = tl.minimum(recent + (split + 1) * share, length)
    for first in range(recent + split * share, last, BLOCK):
        t = first + tl.arange(0, BLOCK)
        real = t < last
        k = load(k_ptr + base, t, real, t_stride, D)  # [N, D]
        v = load(v_ptr + base, t, real, t_stride, D)
        visible = real[None, :] & (t[None, :] <= position[:, None])
        m, z, acc = attend(q, k, v, visible, m, z, acc, PRECISION)
    finish(acc, m, z, out_ptr, part_ptr, lse_ptr, at, ok, splits, split, total, D)


def configurations() -> list[Configuration]:
    """Every version of the kernel that the launcher can pick."""
    types = {"chunks_ptr": "i32", "lengths_ptr": "i32", "part_ptr": "fp32", "lse_ptr": "fp32"}
    choices = grid_of(dtype=DTYPES, dim=HEAD_DIMS, rows=(16, 64))
    return [
        Configuration(sparse_decode_kernel, c["dtype"], tile(**c) | {"CHUNK": unit}, types)
        for c in choices
        for unit in CHUNK_UNITS
    ]


def sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Tensor,
    lengths: int | Tensor,
    *,
    window: int = 0,
    chunk_size: int = 8,
    splits: int | None = None,
    check: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Attention of the last ``n`` tokens over selected chunks, a recent window, and themselves.

    Parameters
    ----------
    q
        Queries ``[B, H, n, D]``, already scaled, of the last ``n`` entries.
    k, v
        The full cache ``[B, H_kv, T, D]``; only what is kept is read.
    chunks
        Numbers of the selected chunks ``[B, H_kv, m]``, each at most once; -1 for none. What a chunk
        holds of the recent entries is not read twice.
    lengths
        Entries of each sequence, ``[B]`` or one number for all; at least ``n``.
    window
        Recent entries kept besides, before the queries' own.
    chunk_size
        Tokens, a power of two from 1 to 64; 1 for policies that select single entries.
    splits
        Pieces to cut the keys into, 1 to 64; chosen by the size of the work by default.
    check
        Look at the values of ``chunks`` and ``lengths``, which on a GPU waits for them.

    Returns
    -------
    ``[B, H, n, D]`` in the dtype of ``q``.

    Raises
    ------
    ValueError
        Naming the argument: a wrong rank, dtype, shape or device, a number out of range.
    """
    group = check_attention(q, k, v)
    unit = chunk_unit(chunk_size)
    require(window >= 0, f"window {window} must be 0 or positive")
    batch, heads, n, dim = q.shape
    kv_heads, entries = k.shape[1], k.shape[2]
    count = chunks.shape[-1] if isinstance(chunks, Tensor) and chunks.dim() == 3 else "m"
    check_index("chunks", chunks, (batch, kv_heads, count), k.device)
    if check:
        check_range("chunks", chunks, -1, -(-entries // chunk_size))
    lengths = as_lengths(lengths, n, k, check)
    if not use_triton(backend, "k", k, dim, layout_fault(k=k, v=v)):
        return reference(q, k, v, chunks, lengths, window, chunk_size)
    if chunk_size != unit:
        parts_each = torch.arange(chunk_size // unit, device=k.device, dtype=torch.int32)
        chunks = (chunks[..., None] * len(parts_each) + parts_each).flatten(2)  # -1 stays negative
    rows = n * group
    options = tile(q.dtype, dim, rows) | {"CHUNK": unit}
    tiles = -(-rows // options["ROWS"])
    kept = min(entries, count * chunk_size + window + n)
    whole = tiles * options["ROWS"]
    splits = choose_splits(splits, k, whole, kept, batch * kv_heads * tiles, options["BLOCK"])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts, lse = allocate_parts(q, splits)
    tensors = (q.contiguous(), k, v, chunks.int().contiguous(), lengths, out, parts, lse)
    counts = (kv_heads, group, n, chunks.shape[2], window, splits, batch * heads * n)
    grid = (batch * kv_heads, splits, tiles)
    options["PRECISION"] = precision(q.device)
    sparse_decode_kernel[grid](*tensors, *strides(k), *counts, **options)
    return merge(parts, lse, out)
