"""Checks of the lessons' exercises: each says what is wrong, not only that something is.

A check takes the student's answer and returns a :class:`Verdict`, which a notebook shows as its
cell's value. ``None`` (not attempted yet) is a verdict of its own, so that a lesson runs top to
bottom with empty exercises. The solutions notebooks pass through the same checks, and the tests feed
each one plausible wrong answers that it must reject.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bdlib.selection import Policy, Selection
    from bdlib.transformer import DecoderConfig


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: ``passed`` is ``None`` while the exercise is untouched."""

    passed: bool | None
    message: str

    def __repr__(self) -> str:
        mark = {True: "correct", False: "not yet", None: "to do"}[self.passed]
        return f"[{mark}] {self.message}"


TODO = Verdict(None, "replace None by your answer, run the cell again")


# -------------------------------------------------------------------- lesson 02


def check_step_seconds(
    answer: Callable[[int, float, float], float | None],
    config: DecoderConfig,
    weight_bytes: int,
    dtype: torch.dtype,
    measured: Mapping[int, float],
    bandwidth: float,
    overhead: float,
) -> Verdict:
    """Check ``answer(context, bandwidth, overhead)``: seconds of one plain step.

    Parameters
    ----------
    measured
        Measured seconds by context in tokens; the right formula is compared with the longest.
    bandwidth, overhead
        Bytes per second and seconds, for that comparison.
    """
    speed, fixed, contexts = 20e9, 4e-3, (1_000, 16_000)  # any numbers tell a formula
    given = [answer(context, speed, fixed) for context in contexts]
    if any(value is None for value in given):
        return TODO
    if not all(isinstance(value, int | float) for value in given):
        return Verdict(False, f"return one number of seconds, not a {type(given[0]).__name__}")

    c, weights = config, weight_bytes

    def bytes_of(kv: float, weights: float = weights) -> Callable[[int], float]:
        return lambda context: (weights + kv * context) / speed + fixed

    kv = c.kv_bytes(1, dtype)
    right = bytes_of(kv)
    mistakes = {
        "values are kept as well as keys: a factor of 2 is missing": bytes_of(kv / 2),
        f"each of the {c.num_layers} layers keeps keys of its own": bytes_of(kv / c.num_layers),
        f"use the {c.num_kv_heads} KV heads, not the {c.num_heads} query heads": bytes_of(
            kv * c.num_heads / c.num_kv_heads
        ),
        f"there are {c.num_kv_heads} KV heads in a layer": bytes_of(kv / c.num_kv_heads),
        f"a head has {c.head_dim} numbers": bytes_of(kv / c.head_dim),
        f"a number takes {dtype.itemsize} bytes": bytes_of(kv / dtype.itemsize),
        "count bytes, not bits (the bandwidth is in bytes per second)": bytes_of(
            8 * kv, 8 * weights
        ),
        "the keys and values are in bits, the weights in bytes": bytes_of(8 * kv),
        "a step reads all the weights too": bytes_of(kv, 0),
        "a step reads the keys and values of the whole context": bytes_of(0),
        "the context is missing: these are the keys and values of one token": lambda context: (
            (weights + kv) / speed + fixed
        ),
        "add the overhead": lambda context: right(context) - fixed,
        "return seconds, not milliseconds": lambda context: 1e3 * right(context),
        "the bandwidth divides the bytes, it does not multiply them": lambda context: (
            (weights + kv * context) * speed + fixed
        ),
    }

    def same(formula: Callable[[int], float]) -> bool:
        pairs = zip(contexts, given, strict=True)
        return all(math.isclose(formula(n), value, rel_tol=1e-6) for n, value in pairs)

    if not same(right):
        for reason, formula in mistakes.items():
            if same(formula):
                return Verdict(False, reason)
        growth = (given[1] - given[0]) * speed / (contexts[1] - contexts[0])
        return Verdict(
            False,
            f"with {speed / 1e9:.0f} GB/s and {fixed * 1e3:.0f} ms of overhead your step at"
            f" {contexts[0]:,} tokens takes {given[0] * 1e3:.2f} ms, it should take"
            f" {right(contexts[0]) * 1e3:.2f}; your bytes grow by {growth:,.0f} a token, they"
            f" should by {kv:,}",
        )
    longest = max(measured)
    predicted, true = answer(longest, bandwidth, overhead), measured[longest]
    message = (
        f"the formula is right. At {longest:,} tokens it says {predicted * 1e3:.1f} ms, measured"
        f" {true * 1e3:.1f} ms"
    )
    if predicted < 0.9 * true:
        message += (
            f". The missing {(true - predicted) * 1e3:.1f} ms grow with the context: attention does"
            f" not get keys and values at the {bandwidth / 1e9:.0f} GB/s of one long plain read"
        )
    return Verdict(True, message)


# -------------------------------------------------------------------- lesson 03


def kept_positions(selection: Selection, length: int) -> Tensor:
    """Every position that a selection keeps of ``length`` tokens, its window included.

    Returns
    -------
    Tensor ``[B, H_kv, m + window]``.
    """
    import torch

    indices = selection.indices
    window = torch.arange(length - selection.window, length, device=indices.device)
    return torch.cat((indices, window.expand(*indices.shape[:2], -1)), -1)


def captured_mass(kept: Tensor, keys: Tensor, future: Tensor) -> Tensor:
    """Share of the attention of coming queries that falls on the kept entries, ``[B, H_kv]``.

    Parameters
    ----------
    kept
        Positions ``[B, H_kv, m]``, each once.
    keys
        All keys ``[B, H_kv, T, D]`` of one layer.
    future
        Queries ``[B, H, n, D]`` of the tokens that follow, scaled by ``1 / sqrt(D)``. Their attention
        to the ``T`` keys counts as 1; mean over the queries and over the heads that share a KV head.
    """
    from bdlib.attention import attention_weights

    mass = attention_weights(future, keys).mean((2, 3))  # [B, H_kv, T]
    return mass.gather(-1, kept).sum(-1)


def observed(policy: Policy, queries: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What a policy gets to see of all past queries ``[B, H, T, D]``, as a cache's log would tell it.

    Returns
    -------
    Queries ``[B, H, w, D]`` and their positions ``[w]``; two times ``None`` if it observes none.
    """
    import torch

    length = queries.shape[2]
    positions = torch.arange(length, device=queries.device)
    if policy.observe == "recent":
        positions = positions[max(0, length - policy.observed_queries) :]
    elif policy.observe == "sampled":
        positions = positions[:: max(1, -(-length // policy.observed_queries))]
    else:
        return None, None
    return queries[:, :, positions], positions


def check_policy(
    policy: Policy,
    keys: Sequence[Tensor],
    queries: Sequence[Tensor],
    future: Sequence[Tensor],
    budget: int = 128,
) -> Verdict:
    """Check a policy on real layers, and compare its captured mass with sink + window's.

    Parameters
    ----------
    keys, queries, future
        One tensor a layer: keys ``[B, H_kv, T, D]``, the ``T`` past queries ``[B, H, T, D]`` and the
        coming ones ``[B, H, n, D]``, which the policy does not see.
    """
    from bdlib.selection import make_policy

    reference = make_policy("sink_window")
    mine, theirs = [], []
    for layer, (k, q, coming) in enumerate(zip(keys, queries, future, strict=True)):
        selection = policy.select(k, budget, *observed(policy, q))
        if selection is None:
            return Verdict(None, "select returns None: return a Selection, run the cell again")
        if fault := _selection_fault(selection, k, q.shape[1], budget):
            return Verdict(False, f"layer {layer}: {fault}")
        length = k.shape[2]
        mine.append(captured_mass(kept_positions(selection, length), k, coming).mean())
        window = reference.select(k, budget, None, None)
        theirs.append(captured_mass(kept_positions(window, length), k, coming).mean())
    used = selection.indices.shape[-1] + selection.window
    yours, other = float(sum(mine)) / len(mine), float(sum(theirs)) / len(theirs)
    numbers = f"your policy captures {yours:.1%} of the mass, sink + window {other:.1%}"
    if yours <= other:
        spare = f"; you keep {used} entries of {budget}" if used < budget else ""
        return Verdict(False, f"{numbers}, both at budget {budget}{spare}")
    return Verdict(True, f"{numbers}, both at budget {budget}")


def _selection_fault(selection: Selection, keys: Tensor, heads: int, budget: int) -> str | None:
    """What is wrong with the form of a selection, or ``None``."""
    import torch

    from bdlib.selection import Selection

    if not isinstance(selection, Selection):
        return f"select returned a {type(selection).__name__}, return a Selection(indices, window)"
    indices, window = selection.indices, selection.window
    batch, kv_heads, length = keys.shape[:3]
    if isinstance(window, bool) or not isinstance(window, int) or not 0 <= window <= length:
        return f"window must be a whole number from 0 to {length}, got {window!r}"
    if not isinstance(indices, torch.Tensor) or indices.dtype != torch.int64:
        kind = getattr(indices, "dtype", type(indices).__name__)
        return f"indices must be an int64 tensor of positions, got {kind}"
    shape = tuple(indices.shape)
    if len(shape) == 3 and shape[1] == heads != kv_heads:
        return (
            f"indices have shape {shape}, one row a query head; the {heads // kv_heads} query heads"
            f" that share a KV head need one choice together: ({batch}, {kv_heads}, m)"
        )
    if len(shape) != 3 or shape[:2] != (batch, kv_heads):
        return f"indices must have shape ({batch}, {kv_heads}, m), got {shape}"
    if shape[2] + window > budget:
        return (
            f"{shape[2]} chosen and {window} of the window are {shape[2] + window} entries, the"
            f" budget is {budget}"
        )
    if not shape[2]:
        return None
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= length:
        return f"position {low if low < 0 else high} is outside the context, 0 to {length - 1}"
    if high >= length - window:
        return (
            f"position {high} is also in the window, which keeps {length - window} to"
            f" {length - 1}: choose among the positions before it"
        )
    ordered = indices.sort(-1).values
    twice = ordered[..., 1:] == ordered[..., :-1]
    if twice.any():
        return f"position {int(ordered[..., 1:][twice][0])} is chosen twice for one KV head"
    return None
