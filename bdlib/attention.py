"""Attention in the three shapes that decoding has, and the log-sum-exp merge that joins pieces.

Every function takes queries ``[B, H, n, D]`` **already scaled** by ``1 / sqrt(D)`` and keys and values
``[B, H_kv, T, D]`` with ``H`` a multiple of ``H_kv``. The ``H / H_kv`` query heads that share one KV
head are stacked into one matrix product, so a key is read once for all of them and never copied.

* :func:`few_queries`: a step or a verification, 1 to 128 queries over a long cache. The causal mask
  touches only the last columns, those of the queries themselves; the long prefix has no mask.
* :func:`many_queries`: a piece of the prompt, so that no ``n x T`` matrix is ever stored. On CPU in
  bfloat16 it is taken up to 128 queries at a time, each like a verification: plain matrix products, which
  oneDNN computes two to four times faster than PyTorch's blocked kernel does. In other dtypes that
  kernel attends the prefix (no mask) and the piece itself (causal), merged by log-sum-exp.
* :func:`causal_attention`: no cache at all (training, references).

The merge is the identity behind FlashDecoding (arXiv 2205.14135): with ``o_i`` the softmax-weighted
mean over part ``i`` and ``lse_i`` its log normaliser, the mean over both parts is
``sum_i o_i exp(lse_i) / sum_i exp(lse_i)``.

On a GPU :func:`few_queries` is the kernel of :mod:`bdlib.kernels.verify`, where the shapes suit it. On a
CPU for which it can be compiled, :mod:`bdlib.kernels.native` does both of a cache's shapes in bfloat16.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlib.kernels import native
from bdlib.kernels.launching import layout_fault, use_triton, wanted
from bdlib.kernels.verify import STEADY, verify

FEW = 128  # queries up to this many take the masked-matrix path
SCORES = 1 << 23
"""Most entries of a matrix of scores in a prompt (16 MB in bfloat16): longer prompts are attended fewer
queries at a time."""
ALIGN = 64
"""Caches hand out entries up to a multiple of this, the surplus masked. A sum over keys is then cut
into the same blocks for one query as for five, so in bfloat16 on CPU a verified row is bit for bit
the row of a plain step (tested), and near-ties cannot make the two disagree."""
REACH = 512
"""Parts of a prompt see keys up to a multiple of this, the surplus masked: oneDNN compiles a product for
every new shape and keeps it, 0.4 MB each, which came to 150 MB over a prompt of 16K tokens."""
BLOCK = 1024
"""Beyond this many keys oneDNN sums a product over them in other blocks. Queries of one call that
stand on both sides are attended apart, so that those before it sum as they would alone."""


def few_queries(q: Tensor, k: Tensor, v: Tensor, start: int, room: Tensor | None = None) -> Tensor:
    """A few queries over a long cache, ``[B, H, n, D]``; bytes read: the keys and values, once.

    Query ``i`` stands at entry ``start + i`` and sees the entries up to itself. ``k`` and ``v`` may
    reach further (to a multiple of :data:`ALIGN`): the rest is masked. ``room`` is memory for at least
    ``B H n T`` scores, to be overwritten; only where no gradient is wanted.
    """
    if (
        wanted(q.device)
        and not _needs_gradient(q, k, v)  # which the kernel does not give
        and use_triton("auto", "k", k, q.shape[3], layout_fault(k=k, v=v))
    ):
        edge = (start + q.shape[2] - 1) // STEADY * STEADY
        if start < edge:
            return _apart(edge, q, k, v, start)
        return verify(q, k, v, start + q.shape[2], check=False)
    if (out := _in_c(q, k, v, start)) is not None:
        return out
    if q.device.type == "cpu" and start < BLOCK < start + q.shape[2]:
        return _apart(BLOCK, q, k, v, start, room)
    n, length = q.shape[2], k.shape[2]
    # Three dimensions: from four, matmul takes 15 us to get there itself, in every layer.
    grouped = q.reshape(-1, q.shape[1] // k.shape[1] * n, q.shape[3])  # [B H_kv, g n, D]
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    shape = (*grouped.shape[:2], length)
    room = None if room is None else room[: math.prod(shape)].view(shape)
    if q.device.type == "cpu" and k.stride(-1) == 1:
        # The keys as the left factor are read as they lie; as the right one oneDNN would repack them.
        scores = torch.bmm(k, grouped.transpose(1, 2)).transpose(1, 2).contiguous()
    else:
        scores = torch.bmm(grouped, k.transpose(1, 2), out=room)  # [B H_kv, g n, T]
    if length > start + 1:
        tail = scores.view(len(scores), -1, n, length)[..., start:]
        tail.masked_fill_(_hidden(n, length - start, q.device), float("-inf"))
    # In place where no gradient needs the scores: a fresh matrix costs more than its arithmetic.
    weights = torch.softmax(scores, -1, out=None if scores.requires_grad else scores)
    return torch.bmm(weights, v).view(q.shape)


def _apart(
    edge: int, q: Tensor, k: Tensor, v: Tensor, start: int, room: Tensor | None = None
) -> Tensor:
    """Queries on both sides of an edge in two calls, so that those before it sum as they would alone."""
    parts = q.tensor_split([edge - start], 2)
    before = few_queries(parts[0], k[:, :, :edge], v[:, :, :edge], start, room)
    return torch.cat((before, few_queries(parts[1], k, v, edge, room)), 2)


@functools.lru_cache(maxsize=256)
def _hidden(n: int, columns: int, device: torch.device) -> Tensor:
    """Which of the last ``columns`` entries come after each of ``n`` queries, ``[n, columns]``."""
    with torch.inference_mode(False):  # made while decoding, it must serve training too
        entry = torch.arange(columns, device=device)
        return entry > entry[:n, None]


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def many_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A piece of the prompt over everything before it and, causally, itself: ``[B, H, n, D]``."""
    batch, heads, n, dim = q.shape
    kv_heads, prefix = k.shape[1], k.shape[2] - n
    if (out := _in_c(q, k, v, prefix)) is not None:
        return out
    if q.device.type != "cpu":
        from torch.nn.attention.bias import causal_lower_right

        bias = causal_lower_right(n, k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, bias, scale=1.0, enable_gqa=True)
    if q.dtype == torch.bfloat16:
        parts, start, room = [], prefix, None
        a_query = batch * heads * k.shape[2]
        size = min(FEW, n, max(1, SCORES // a_query))
        size = 1 << size.bit_length() - 1  # parts of one shape
        if not _needs_gradient(q, k, v):
            # One matrix for all parts: theirs grow, and would leave holes that fit none after them.
            room = q.new_empty(size * a_query)
        # Many rows pay for one copy of the keys in the layout that oneDNN wants for them.
        k = k.transpose(-1, -2).contiguous().transpose(-1, -2)
        for part in q.split(size, 2):
            stop = start + part.shape[2]
            reach = min(k.shape[2], -(-stop // REACH) * REACH)
            parts.append(few_queries(part, k[:, :, :reach], v[:, :, :reach], start, room))
            start = stop
        return torch.cat(parts, 2)
    own = [t[:, :, prefix:].repeat_interleave(heads // kv_heads, 1) for t in (k, v)]
    out, lse = _flash_cpu(q, *own, causal=True)
    if not prefix:
        return out
    grouped = q.reshape(batch, kv_heads, -1, dim)
    before, before_lse = _flash_cpu(grouped, k[:, :, :prefix], v[:, :, :prefix], causal=False)
    return merge(out, lse, before.reshape(q.shape), before_lse.reshape(lse.shape))


def extend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: int, packed: int = 0
) -> Tensor | None:
    """Store ``k``, ``v`` in a cache's ``keys``, ``values`` from ``start`` on and attend, all in C.

    The first ``packed`` keys lie as :func:`bdlib.kernels.native.pack` leaves them.

    ``None``, with nothing stored, where it cannot be done so (:func:`bdlib.kernels.native.extend`).
    """
    if q.device.type != "cpu" or q.shape[2] > FEW or _needs_gradient(q, k, v):
        return None
    return native.extend(q, k, v, keys, values, start, packed)


def _in_c(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor | None:
    if q.device.type != "cpu" or _needs_gradient(q, k, v):
        return None
    return native.attend(q, k, v, start)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Join attention over two disjoint sets of keys: outputs ``[..., n, D]``, normalisers ``[..., n]``."""
    weight_b = torch.sigmoid(lse_b - lse_a)[..., None].to(out_a.dtype)
    return out_a + weight_b * (out_b - out_a)


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's blocked CPU kernel, the one behind SDPA, called for its normaliser too."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    k = k if k.stride(-1) == 1 else k.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    return flash(q, k, v, is_causal=causal, scale=1.0)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention without a cache, differentiable: ``[B, H, n, D]``."""
    if q.device.type == "cpu" and torch.bfloat16 in (q.dtype, _autocast_dtype()):
        return many_queries(*(t.to(torch.bfloat16) for t in (q, k, v)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def attention_weights(q: Tensor, k: Tensor, positions: Tensor | None = None) -> Tensor:
    """Softmax weights in float32 for policies and figures, ``[B, H_kv, g, n, T]``.

    Parameters
    ----------
    positions
        Position of each query ``[n]``; keys after it are masked. ``None``: every key is visible.
    """
    batch, heads, n, dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    grouped = q.reshape(batch, kv_heads, -1, dim)
    scores = (grouped @ k.transpose(-1, -2)).float()
    scores = scores.view(batch, kv_heads, heads // kv_heads, n, length)
    if positions is not None:
        future = torch.arange(length, device=q.device) > positions[:, None]
        scores = scores.masked_fill(future, float("-inf"))
    return torch.softmax(scores, -1)
