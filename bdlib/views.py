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

On a GPU the chosen entries are read where they lie (:mod:`bdlib.kernels.multi_view`); elsewhere they are
gathered into a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlib.attention import causal_attention
from bdlib.kernels.launching import use_triton, wanted
from bdlib.kernels.multi_view import multi_view
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
) -> Tensor:
    """Replay the blocks at ``starts``, ``length`` tokens each, under one view.

    Parameters
    ----------
    tokens
        The whole window, ``[T]``.

    Returns
    -------
    Residual stream after the last layer, ``[blocks, length, C]``.
    """
    return drafted_view(model, tokens, stream, view, starts, length)[0]


def drafted_view(
    model: Decoder,
    tokens: Tensor,
    stream: Stream,
    view: View,
    starts: Sequence[int],
    length: int,
    states: Tensor | None = None,
    steps: int = 1,
) -> list[Tensor]:
    """Replay blocks as a feature-conditioned drafter meets them: ``steps`` draft steps deep.

    The first step reads the target's states. In step ``k`` slot ``i`` reads the drafter's own output
    of step ``k - 1`` at slot ``i - 1`` instead, and attends to what its cache would then hold: the
    chosen entries, this block's entries of the first step up to slot ``i - k``, and one entry of each
    step since. (Training-time test, as in EAGLE-3, arXiv 2503.01840.) Slots before ``k`` are void.

    Parameters
    ----------
    states
        The target's states ``[T, C]`` as each slot reads them; ``None`` for a drafter that reads
        tokens alone, which has one step.

    Returns
    -------
    Residual stream after the last layer of each step, ``[blocks, length, C]``.
    """
    return drafted_views(model, tokens, stream, [(view, starts)], length, states, steps)


def drafted_views(
    model: Decoder,
    tokens: Tensor,
    stream: Stream,
    views: Sequence[tuple[View, Sequence[int]]],
    length: int,
    states: Tensor | None = None,
    steps: int = 1,
) -> list[Tensor]:
    """:func:`drafted_view` of several views at once, each with its own blocks.

    Everything but attention is one matrix product over the blocks of all views, which a few blocks at a
    time would leave half idle.

    Returns
    -------
    Residual stream after the last layer of each step, ``[blocks of all views, length, C]``.
    """
    last = tokens.shape[0] - length
    for view, starts in views:
        if view.budget <= length:
            raise ValueError(f"budget {view.budget} must be above the block length {length}")
        for start in starts:
            if not 1 <= start <= last:
                raise ValueError(f"block start {start} must be in 1..{last}")
    if not 1 <= steps <= (length if states is not None else 1):
        raise ValueError(f"steps {steps} must be in 1..{length}, and 1 without states")
    cos, sin = model.rotations(0, tokens.shape[0])
    counts = [len(starts) for _, starts in views]
    at = [list(range(s, s + length)) for _, starts in views for s in starts]
    at = torch.tensor(at, device=tokens.device)
    cos, sin = cos[at], sin[at]  # [N, length, 1, D]
    blocks = tokens[at]  # [N, length]
    in_place = wanted(tokens.device) and use_triton(
        "auto", "keys", stream.keys[0], model.config.head_dim
    )
    kept = []  # of each layer and view: keys and values, and which entries were chosen and are real
    for index in range(len(model.layers)):
        found = [choose(stream, index, view, starts, length) for view, starts in views]
        copied = [chosen[..., :0] if in_place else chosen for chosen, _ in found]
        old = [_take(t[index].squeeze(0), copied) for t in (stream.keys, stream.values)]
        kept.append([[*of_view] for of_view in zip(*old, *zip(*found, strict=True), strict=True)])
    outputs: list[Tensor] = []
    for step in range(steps):
        if states is None:
            x = model.embed(blocks)
        else:
            own = F.pad(outputs[-1][:, :-1], (0, 0, 1, 0)) if step else states[at]
            x = model.inputs(blocks, own)
        mask = _block_mask(length, step, tokens.device)
        for index, layer in enumerate(model.layers):
            q, k, v = model.project(layer, x, cos, sin)
            attended = []
            parts = zip(*(t.split(counts) for t in (q, k.to(q.dtype), v)), strict=True)
            for entries, (q, k, v) in zip(kept[index], parts, strict=True):
                keys, values, chosen, visible = entries
                keys, values = torch.cat((keys, k), 2), torch.cat((values, v), 2)
                entries[:2] = keys, values
                if in_place:
                    prefix = stream.keys[index][0], stream.values[index][0]
                    which = chosen, visible.sum(-1)
                    attended.append(multi_view(q, keys, values, *prefix, *which, check=False))
                else:
                    attended.append(_attend(q, keys, values, visible, mask))
            x = model.finish(layer, x, torch.cat(attended))
        outputs.append(x)
    return outputs


def _block_mask(length: int, step: int, device: torch.device) -> Tensor:
    """What slot ``i`` of a block sees of the block's entries of steps 0 to ``step``, ``[n, steps n]``."""
    ahead = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    parts = [ahead >= step] + [ahead == step - k for k in range(1, step + 1)]
    return torch.cat(parts, 1)


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
    counts = [row.shape[-1] for row in rows]
    width, sizes = max(1, *counts), torch.tensor(counts, device=stream.hidden.device)
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


def _take(entries: Tensor, chosen: Sequence[Tensor]) -> list[Tensor]:
    """Entries ``[H_kv, T, D]`` at each ``[N, H_kv, S]``: as many ``[N, H_kv, S, D]``, differentiable."""
    heads, length, dim = entries.shape
    offsets = torch.arange(heads, device=entries.device)[:, None] * length
    flat = [(one + offsets).flatten() for one in chosen]
    # One flat index_select: its gradient adds into [H_kv T, D] and not into a copy for every block.
    taken = entries.reshape(heads * length, dim).index_select(0, torch.cat(flat))
    parts = taken.split([len(one) for one in flat])
    return [part.view(*one.shape, dim) for part, one in zip(parts, chosen, strict=True)]


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, own: Tensor) -> Tensor:
    """Blocks over their chosen entries (those visible) and, by ``own``, themselves: ``[N, H, n, D]``."""
    blocks, heads, n, dim = q.shape
    kv_heads = k.shape[1]
    mask = torch.cat((visible[:, None].expand(-1, n, -1), own.expand(blocks, -1, -1)), -1)
    mask = mask[:, None, None].expand(-1, -1, heads // kv_heads, -1, -1).flatten(2, 3)
    grouped = q.reshape(blocks, kv_heads, -1, dim)
    out = F.scaled_dot_product_attention(grouped, k, v, mask, scale=1.0)
    return out.view(blocks, heads, n, dim)
