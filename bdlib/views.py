"""The training forward pass: one full view and several sparse views of the same text.

The full stream runs the drafter once over the window, causally, and keeps every layer's keys and
values. A sparse view then replays *blocks* of the window as the drafter would meet them when decoding:
for a block that begins at position ``s`` a policy chooses ``budget`` entries among the first ``s``,
exactly as :class:`bdlib.cache.SparseKVCache` would, and the block's tokens attend to those entries and,
causally, to each other. Every view shares the full stream's keys and values.

* Prefix + continuation, as in the paper (arXiv 2606.00144): one block at the end, and the prefix runs
  without gradient.
* All positions: the window is cut into blocks, so every position (but those of the first block) gets a
  sparse view, and gradient reaches the keys and values of the prefix: the drafter learns to store what
  a sparse reader will need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlib.attention import causal_attention
from bdlib.selection import Policy
from bdlib.transformer import Decoder


@dataclass(frozen=True)
class View:
    """A budget (entries per layer and KV head, the block's own tokens included) and a policy."""

    budget: int
    policy: Policy


@dataclass(frozen=True)
class Stream:
    """What the full pass leaves behind.

    Attributes
    ----------
    hidden
        Residual stream after the last layer, ``[T, C]``.
    queries, keys, values
        Of every layer, ``[1, H, T, D]`` and ``[1, H_kv, T, D]``; keys rotated, queries scaled too.
    """

    hidden: Tensor
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]


def full_stream(model: Decoder, tokens: Tensor, x: Tensor | None = None) -> Stream:
    """Run ``tokens`` ``[T]`` causally; ``x`` ``[1, T, C]`` replaces the embeddings where given."""
    cos, sin = model.rotations(0, tokens.shape[0])
    x = model.embed(tokens[None]) if x is None else x
    queries, keys, values = [], [], []
    for layer in model.layers:
        q, k, v = model.project(layer, x, cos, sin)
        k = k.to(q.dtype)
        x = model.finish(layer, x, causal_attention(q, k, v))
        queries.append(q.detach())
        keys.append(k)
        values.append(v)
    return Stream(x[0], queries, keys, values)


def sparse_view(
    model: Decoder,
    tokens: Tensor,
    stream: Stream,
    view: View,
    starts: Sequence[int],
    length: int,
    x: Tensor | None = None,
) -> Tensor:
    """Replay the blocks at ``starts``, ``length`` tokens each, under one view.

    Parameters
    ----------
    tokens
        The whole window, ``[T]``.
    x
        Inputs ``[blocks, length, C]`` in place of the embeddings.

    Returns
    -------
    Residual stream after the last layer, ``[blocks, length, C]``.
    """
    if view.budget <= length:
        raise ValueError(f"budget {view.budget} must be above the block length {length}")
    last = tokens.shape[0] - length
    for start in starts:
        if not 1 <= start <= last:
            raise ValueError(f"block start {start} must be in 1..{last}")
    blocks = torch.stack([tokens[s : s + length] for s in starts])  # [N, length]
    cos, sin = model.rotations(0, tokens.shape[0])
    at = torch.tensor([list(range(s, s + length)) for s in starts], device=tokens.device)
    cos, sin = cos[at], sin[at]  # [N, length, 1, D]
    x = model.embed(blocks) if x is None else x
    for index, layer in enumerate(model.layers):
        q, k, v = model.project(layer, x, cos, sin)
        chosen, visible = choose(stream, index, view, starts, length)
        old_k, old_v = (_take(t[index][0], chosen) for t in (stream.keys, stream.values))
        attended = _attend(
            q, torch.cat((old_k, k.to(q.dtype)), 2), torch.cat((old_v, v), 2), visible
        )
        x = model.finish(layer, x, attended)
    return x


@torch.no_grad()
def choose(
    stream: Stream, layer: int, view: View, starts: Sequence[int], length: int
) -> tuple[Tensor, Tensor]:
    """Entries of each block ``[N, H_kv, S]`` and which of them are real ``[N, S]`` (the rest pads)."""
    rows = []
    for start in starts:
        keys = stream.keys[layer][:, :, :start]
        queries, positions = _observed(view.policy, stream.queries[layer], start)
        selection = view.policy.select(keys, view.budget - length, queries, positions)
        recent = torch.arange(start - selection.window, start, device=keys.device)
        recent = recent.expand(keys.shape[1], -1)
        rows.append(torch.cat((selection.indices[0], recent), -1))  # [H_kv, S]
    sizes = torch.tensor([row.shape[-1] for row in rows], device=stream.hidden.device)
    width = max(1, int(sizes.max()))
    chosen = torch.stack([F.pad(row, (0, width - row.shape[-1])) for row in rows])
    return chosen, torch.arange(width, device=sizes.device) < sizes[:, None]


def _observed(policy: Policy, queries: Tensor, start: int) -> tuple[Tensor | None, Tensor | None]:
    """What a cache's query log would hold for this policy after ``start`` tokens."""
    if policy.observe == "none":
        return None, None
    stride = 1 if policy.observe == "recent" else max(1, -(-start // policy.observed_queries))
    first = max(0, start - policy.observed_queries) if policy.observe == "recent" else 0
    positions = torch.arange(first, start, stride, device=queries.device)
    return queries[:, :, positions], positions


def _take(entries: Tensor, chosen: Tensor) -> Tensor:
    """Entries ``[H_kv, T, D]`` at ``chosen`` ``[N, H_kv, S]``: ``[N, H_kv, S, D]``, differentiable."""
    heads, length, dim = entries.shape
    offsets = torch.arange(heads, device=chosen.device)[:, None] * length
    flat = (chosen + offsets).flatten()
    # One flat index_select: its gradient adds into [H_kv T, D] and not into a copy for every block.
    return entries.reshape(heads * length, dim).index_select(0, flat).view(*chosen.shape, dim)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Blocks over their entries (those visible) and causally over themselves: ``[N, H, n, D]``."""
    blocks, heads, n, dim = q.shape
    kv_heads = k.shape[1]
    own = torch.ones(n, n, dtype=torch.bool, device=q.device).tril_()
    mask = torch.cat((visible[:, None].expand(-1, n, -1), own.expand(blocks, -1, -1)), -1)
    mask = mask[:, None, None].expand(-1, -1, heads // kv_heads, -1, -1).flatten(2, 3)
    grouped = q.reshape(blocks, kv_heads, -1, dim)
    out = F.scaled_dot_product_attention(grouped, k, v, mask, scale=1.0)
    return out.view(blocks, heads, n, dim)
