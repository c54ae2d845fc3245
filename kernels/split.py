"""What attention over a cache shares: one block of keys, how many pieces to cut, and the merge.

A program walks over its keys block by block and keeps, per row of queries, the largest score so far
``m``, the sum ``z`` of ``exp(score - m)`` and the weighted sum of values ``acc``. One query is too little
work for a GPU, so the keys are cut into pieces ("splits") and each gets a program of its own, which
leaves ``o_s = acc / z`` and ``lse_s = m + log z``. The merge then is

    out = sum_s w_s o_s / sum_s w_s,        w_s = exp(lse_s - max lse)

(FlashDecoding; the identity behind FlashAttention, arXiv 2205.14135). The rows of one program are the
queries of all heads that share a KV head, so a key is read once for all of them: row ``r`` is query
``r // group`` of head ``r % group``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlib.kernels.launching import (
    DTYPES,
    HEAD_DIMS,
    MAX_SPLITS,
    OVERHEAD,
    Configuration,
    grid_of,
    processors,
    require,
)
from bdlib.kernels.lazy import device, kernel, tl


@device
def rows_of(tile, group, n, ROWS: tl.constexpr):
    """Rows of a tile: their offsets inside ``[group, n]``, their queries, and which are real."""
    row = tile * ROWS + tl.arange(0, ROWS)
    return ((row % group) * n + row // group).to(tl.int64), row // group, row < n * group


@device
def load(ptr, at, ok, stride, D: tl.constexpr):
    """Rows ``at`` of a tensor, ``stride`` apart, as ``[., D]``; zero, and not read, where not ``ok``."""
    there = ptr + at.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(there, mask=ok[:, None], other=0.0)


@device
def attend(q, k, v, visible, m, z, acc, PRECISION: tl.constexpr):
    """Let rows ``q [R, D]`` see keys and values ``[N, D]`` where ``visible [R, N]``."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [R, N], float32
    scores = tl.where(visible, scores, float("-inf"))
    new_m = tl.maximum(m, tl.max(scores, 1))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has seen nothing yet
    weights = tl.exp(scores - base[:, None])
    kept = tl.exp(m - base)
    z = z * kept + tl.sum(weights, 1)
    acc = acc * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return new_m, z, acc


@device
def finish(acc, m, z, out_ptr, part_ptr, lse_ptr, at, ok, splits, split, total, D: tl.constexpr):
    """Write the rows ``at``: to the output if there is one split, else as a part to be merged."""
    d = tl.arange(0, D)
    seen = ok & (z > 0)
    out = acc / tl.where(z > 0, z, 1.0)[:, None]
    if splits == 1:
        there = out_ptr + at[:, None] * D + d[None, :]
        tl.store(there, out.to(out_ptr.dtype.element_ty), mask=ok[:, None])
    else:
        at += split.to(tl.int64) * total
        tl.store(part_ptr + at[:, None] * D + d[None, :], out, mask=seen[:, None])
        lse = tl.where(seen, m + tl.log(tl.where(z > 0, z, 1.0)), float("-inf"))
        tl.store(lse_ptr + at, lse, mask=ok)


@kernel
def merge_kernel(
    part_ptr,  # [splits, total, D] float32
    lse_ptr,  # [splits, total] float32, -inf where a split saw nothing
    out_ptr,  # [total, D]
    splits,
    total,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program a row: read its parts, write their mean weighted by ``exp(lse)``."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    at = s.to(tl.int64) * total + row
    lse = tl.load(lse_ptr + at, mask=s < splits, other=float("-inf"))
    weights = tl.exp(lse - tl.max(lse, 0))  # [S]
    seen = lse > float("-inf")
    parts = tl.load(part_ptr + at[:, None] * D + d[None, :], mask=seen[:, None], other=0.0)
    out = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty))


def choose_splits(
    splits: int | None, k: Tensor, rows: int, entries: int, programs: int, block: int
) -> int:
    """Pieces to cut the keys of one KV head into.

    As many as fill the GPU twice, but none smaller than a block of keys, and not so many that what
    splitting reads on top (the queries again, and the parts in float32) passes 4 % of the keys' and
    values' bytes. A small budget is therefore read by one program, and needs no merge.

    ``rows`` are those of whole tiles, not the queries' own: one query and five, in a tile of 16 either
    way, then sum the same pieces. (Measured on an H200: cut by the number of queries, logits in bfloat16
    of a verification and of a plain step differed by 0.4, cut like this by nothing.)
    """
    if splits is not None:
        require(1 <= splits <= MAX_SPLITS, f"splits {splits} must be in 1..{MAX_SPLITS}")
        return splits
    dim, size = k.shape[3], k.element_size()
    each = rows * (dim * size + (dim + 1) * 4)
    affordable = int(OVERHEAD * 2 * entries * dim * size / each)
    wanted = -(-2 * processors(k.device) // programs)
    return max(1, min(wanted, affordable, -(-entries // block), MAX_SPLITS))


def tile(dtype: torch.dtype, dim: int, rows: int) -> dict:
    """Constants and options of attention over a cache.

    Tensor cores want 16 rows; more are taken 64 at a time. A float32 product is three TF32 ones, whose
    operands fill the registers: smaller tiles there.
    """
    if dtype == torch.float32:
        return {"D": dim, "ROWS": 16, "BLOCK": 32, "num_warps": 8, "num_stages": 2}
    if rows <= 16:
        return {"D": dim, "ROWS": 16, "BLOCK": 64, "num_warps": 4, "num_stages": 2}
    return {"D": dim, "ROWS": 64, "BLOCK": 32, "num_warps": 8, "num_stages": 2}


def allocate_parts(q: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Float32 room ``[splits, B, H, n, D]`` and ``[splits, B, H, n]``; nothing for one split."""
    shape = (splits if splits > 1 else 0, *q.shape)
    parts = torch.empty(shape, dtype=torch.float32, device=q.device)
    return parts, torch.empty(shape[:-1], dtype=torch.float32, device=q.device)


def merge(parts: Tensor, lse: Tensor, out: Tensor) -> Tensor:
    """Start the merge if there is anything to merge."""
    splits, dim, total = parts.shape[0], out.shape[-1], out.numel() // out.shape[-1]
    if splits:
        merge_kernel[(total,)](parts, lse, out, splits, total, **merge_tile(dim))
    return out


def merge_tile(dim: int) -> dict:
    """Constants and options of the merge."""
    return {"D": dim, "SPLITS": MAX_SPLITS, "num_warps": 4, "num_stages": 1}


def configurations() -> list[Configuration]:
    """Every version of the merge that :func:`merge` can pick."""
    types = {"part_ptr": "fp32", "lse_ptr": "fp32"}
    return [
        Configuration(merge_kernel, c["dtype"], merge_tile(c["dim"]), types, dot=False)
        for c in grid_of(dtype=DTYPES, dim=HEAD_DIMS)
    ]
