"""Scores of chunks of keys: the mean key of a chunk times a query. What chunk policies choose by.

Formula, for a KV head and a query ``q`` of one of its heads, ``C = chunk_size``:

    score[c] = q . (1/C) sum_{t in chunk c} k[t]  =  (1/C) sum_{t in chunk c} q . k[t]

Grid: ``(B * H_kv * row tiles, pieces of the keys)``; a program multiplies its keys, block by block,
with all queries of the heads that share them (64 rows at once, 16 in float32), and averages over
chunks. It is compiled for chunks of 1 and 8 tokens; scores of other sizes are means of those.

Bytes read: the keys once, ``B * H_kv * chunks * C * D`` elements, and the queries once a program, so
pieces are at least 25 keys a query long. Written: one float32 a chunk and query.

Used by ``chunk_topk`` (one query, the last key: ``queries = keys[:, :, -1:]``) and by
``chunk_topk_recent`` (the last queries of all heads). :mod:`bdlib.selection` says how they choose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlib.kernels.launching import (
    CHUNK_UNITS,
    DTYPES,
    HEAD_DIMS,
    Configuration,
    check_attention,
    chunk_unit,
    grid_of,
    layout_fault,
    precision,
    processors,
    require,
    strides,
    use_triton,
)
from bdlib.kernels.lazy import kernel, tl
from bdlib.kernels.split import load, rows_of


def reference(q: Tensor, k: Tensor, chunks: int, chunk_size: int) -> Tensor:
    """The definition: ``[B, H, n, chunks]``, in float32 (float64 if the inputs are)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    means = k[:, :, : chunks * chunk_size].unflatten(2, (chunks, chunk_size)).to(wide).mean(3)
    return q.to(wide) @ means.repeat_interleave(group, 1).transpose(-1, -2)


@kernel
def chunk_scores_kernel(
    q_ptr,  # [B, H, n, D], contiguous
    k_ptr,  # [B, H_kv, T, D]
    out_ptr,  # [B, H, n, chunks] float32
    b_stride: tl.int64,
    h_stride: tl.int64,
    t_stride: tl.int64,
    kv_heads,
    group,
    n,
    chunks,
    per_piece,  # chunks a program scores, a multiple of BLOCK / CHUNK
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0) % kv_heads
    batch = tl.program_id(0) // kv_heads
    inside, _, ok = rows_of(tl.program_id(2), group, n, ROWS)
    at = tl.program_id(0).to(tl.int64) * group * n + inside
    q = load(q_ptr, at, ok, D, D)  # [R, D]
    base = k_ptr + batch.to(tl.int64) * b_stride + head.to(tl.int64) * h_stride
    first = tl.program_id(1) * per_piece
    last = tl.minimum(first + per_piece, chunks)
    for chunk in range(first, last, BLOCK // CHUNK):
        t = chunk * CHUNK + tl.arange(0, BLOCK)
        k = load(base, t, t < last * CHUNK, t_stride, D)  # [N, D]
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [R, N], float32
        scores = tl.sum(tl.reshape(products, (ROWS, BLOCK // CHUNK, CHUNK)), 2) / CHUNK
        c = chunk + tl.arange(0, BLOCK // CHUNK)
        there = out_ptr + at[:, None] * chunks + c[None, :]
        tl.store(there, scores, mask=ok[:, None] & (c < last)[None, :])


def tile(dtype: torch.dtype, dim: int, rows: int, unit: int) -> dict:
    """Constants and options of the kernel: tensor cores want 16 rows; more are taken 64 at a time."""
    few = rows <= 16 or dtype == torch.float32
    rows, block = (16, 128) if few and dtype != torch.float32 else (16 if few else 64, 64)
    sizes = {"D": dim, "ROWS": rows, "BLOCK": block, "CHUNK": unit}
    return sizes | {"num_warps": 4, "num_stages": 2}


def configurations() -> list[Configuration]:
    """Every version of the kernel that the launcher can pick."""
    choices = grid_of(dtype=DTYPES, dim=HEAD_DIMS, rows=(16, 64), unit=CHUNK_UNITS)
    types = {"out_ptr": "fp32"}
    return [Configuration(chunk_scores_kernel, c["dtype"], tile(**c), types) for c in choices]


def chunk_scores(
    q: Tensor,
    k: Tensor,
    *,
    chunk_size: int = 8,
    chunks: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Score the whole chunks of a cache against queries.

    Parameters
    ----------
    q
        Queries ``[B, H, n, D]``, ``H`` a multiple of ``H_kv``.
    k
        Keys ``[B, H_kv, T, D]``.
    chunk_size
        Tokens, a power of two from 1 to 64.
    chunks
        Score the first so many chunks only; all whole ones by default.

    Returns
    -------
    Scores ``[B, H, n, chunks]`` in float32.

    Raises
    ------
    ValueError
        Naming the argument: a wrong rank, dtype, shape or device.
    """
    group = check_attention(q, k, None)
    unit = chunk_unit(chunk_size)
    whole = k.shape[2] // chunk_size
    chunks = whole if chunks is None else chunks
    require(0 <= chunks <= whole, f"chunks {chunks} must be in 0..{whole}")
    batch, heads, n, dim = q.shape
    if not use_triton(backend, "k", k, dim, layout_fault(k=k)):
        return reference(q, k, chunks, chunk_size)
    units = chunks * (chunk_size // unit)
    out = torch.empty((batch, heads, n, units), dtype=torch.float32, device=q.device)
    if not chunks:
        return out
    rows, kv_heads = n * group, k.shape[1]
    options = tile(q.dtype, dim, rows, unit)
    block = options["BLOCK"] // unit
    tiles = -(-rows // options["ROWS"])
    pieces = max(1, 2 * processors(q.device) // (batch * kv_heads * tiles))
    least = max(-(-units // pieces), -(-25 * rows // unit))
    per_piece = -(-least // block) * block
    grid = (batch * kv_heads, -(-units // per_piece), tiles)
    options["PRECISION"] = precision(q.device)
    counts = (kv_heads, group, n, units, per_piece)
    chunk_scores_kernel[grid](q.contiguous(), k, out, *strides(k), *counts, **options)
    return out if units == chunks else out.unflatten(3, (chunks, -1)).mean(4)
