"""Which entries a sparse cache keeps: one policy a class.

A policy looks at the rotated keys of one layer, ``[B, H_kv, T, D]``, at some logged queries if it
asks for them, and returns a :class:`Selection` of at most ``budget`` entries per KV head. To write
your own, subclass :class:`Policy`, override :meth:`Policy.select`, and pass an instance wherever a
policy is taken; to make it known by name, decorate it with :func:`register`.

Each class names its source. ``chunk_topk`` is the selection of the BudgetDraft paper's released
code, kept faithful, flaws included; ``chunk_topk_recent`` repairs them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlib.attention import attention_weights
from bdlib.kernels.chunk_scores import chunk_scores
from bdlib.kernels.launching import CHUNK_SIZES, layout_fault, use_triton, wanted


def is_whole(value: object, least: int) -> bool:
    """Whether a setting is a whole number of at least ``least``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def check_whole(name: str, value: object, least: int, unit: str) -> None:
    """Refuse a setting that is not, in words that name it."""
    if not is_whole(value, least):
        number = isinstance(value, Integral) and not isinstance(value, bool)
        kind = "" if number else "a whole number, "
        raise ValueError(f"{name} {value!r} must be {kind}at least {least} {unit}")


@dataclass(frozen=True)
class Selection:
    """What to keep.

    Attributes
    ----------
    indices
        Positions ``[B, H_kv, m]`` before the window, those to be evicted first at the front.
    window
        Number of most recent positions kept besides, the same for every head.
    chunk_size
        ``indices`` are whole chunks, one after another, of so many neighbours each, in order.
    """

    indices: Tensor
    window: int
    chunk_size: int = 1


@dataclass(frozen=True)
class Policy:
    """Base class: a name, what it observes, and :meth:`select`."""

    name: ClassVar[str] = "policy"
    observe: ClassVar[Literal["none", "recent", "sampled"]] = "none"
    observed_queries: ClassVar[int] = 0
    per_step: ClassVar[bool] = False

    def select(
        self, keys: Tensor, budget: int, queries: Tensor | None, positions: Tensor | None
    ) -> Selection:
        """Choose at most ``budget`` of the ``T`` positions of ``keys`` ``[B, H_kv, T, D]``.

        Parameters
        ----------
        queries, positions
            Logged queries ``[B, H, w, D]``, scaled by ``1 / sqrt(D)``, and where they stood ``[w]``;
            ``None`` for a policy that observes none.
        """
        raise NotImplementedError

    def check(self, budget: int) -> None:
        """Refuse a budget that the policy cannot work with."""
        check_whole("budget", budget, 1, "entry")

    def floor(self, budget: int) -> int:
        """Selected entries that generated tokens may not displace (they displace recent ones)."""
        return budget


POLICIES: dict[str, type[Policy]] = {}


def register(cls: type[Policy]) -> type[Policy]:
    """Class decorator: make a policy known to :func:`make_policy` by its ``name``."""
    POLICIES[cls.name] = cls
    return cls


def make_policy(name: str, **settings: object) -> Policy:
    """A policy by name, for example ``make_policy("sink_window", sinks=4)``."""
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; allowed: {', '.join(POLICIES)}")
    if settings:
        allowed = [field.name for field in fields(POLICIES[name])]
        for unknown in set(settings) - set(allowed):
            raise ValueError(
                f"policy {name!r} has no setting {unknown!r}; allowed: {', '.join(allowed) or 'none'}"
            )
    return POLICIES[name](**settings)


def _all(keys: Tensor) -> Selection:
    batch, kv_heads, length = keys.shape[:3]
    return Selection(keys.new_empty((batch, kv_heads, 0), dtype=torch.int64), length)


def _best(scores: Tensor, count: int, first: int = 0) -> Tensor:
    """Indices ``[B, H_kv, count]`` of the best scores, worst first, keeping the ``first`` ones last.

    Worst first, because the front of a selection is evicted first.
    """
    scores = scores.float()
    if first:
        scores = scores.clone()
        scores[..., :first] = float("inf")
    return scores.topk(count, dim=-1).indices.flip(-1)


def _tokens(chunks: Tensor, size: int) -> Tensor:
    """Positions ``[..., m * size]`` of chunk numbers ``[..., m]``."""
    offsets = torch.arange(size, device=chunks.device)
    return (chunks[..., None] * size + offsets).flatten(-2)


@register
@dataclass(frozen=True)
class Full(Policy):
    """Keep everything; the budget must hold the whole context."""

    name: ClassVar[str] = "full"

    def select(self, keys, budget, queries, positions):
        if keys.shape[2] > budget:
            raise ValueError(f"policy 'full' needs a budget of {keys.shape[2]}, got {budget}")
        return _all(keys)


@register
@dataclass(frozen=True)
class SinkWindow(Policy):
    """The first few tokens and the most recent ones (StreamingLLM, arXiv 2309.17453)."""

    name: ClassVar[str] = "sink_window"
    sinks: int = 4

    def __post_init__(self) -> None:
        check_whole("sinks", self.sinks, 0, "tokens")

    def select(self, keys, budget, queries, positions):
        length = keys.shape[2]
        if length <= budget:
            return _all(keys)
        sinks = min(self.sinks, budget // 2)
        first = torch.arange(sinks, device=keys.device).expand(*keys.shape[:2], -1)
        return Selection(first, budget - sinks)


@register
@dataclass(frozen=True)
class ChunkTopK(Policy):
    """The selection of BudgetDraft's released code (arXiv 2606.00144), reproduced faithfully.

    Prefix keys are cut into chunks of 8; a chunk scores (last key in the cache) . (mean key of the
    chunk); chunk 0 and the best ``budget / 8 - 1`` others are kept. The last ``T % 8`` tokens are
    dropped and no recent window is guaranteed, so the drafter may not see the text it continues.
    Unlike that code, the budget is then held: generated tokens displace the worst chunks until they
    fill half of it, and after that the oldest of themselves.
    """

    name: ClassVar[str] = "chunk_topk"
    chunk_size: int = 8

    def __post_init__(self) -> None:
        check_whole("chunk_size", self.chunk_size, 1, "token")

    def check(self, budget: int) -> None:
        super().check(budget)
        if budget < self.chunk_size:
            raise ValueError(f"budget {budget} must be at least one chunk of {self.chunk_size}")

    def floor(self, budget: int) -> int:
        return budget // 2

    def select(self, keys, budget, queries, positions):
        chunks = keys.shape[2] // self.chunk_size
        keep = min(budget // self.chunk_size, chunks)
        scores = self.score(keys, chunks)
        best = _best(scores, keep, first=1)
        return Selection(_tokens(best, self.chunk_size), 0, self.chunk_size)

    def score(self, keys: Tensor, chunks: int) -> Tensor:
        """Last key times the mean key of each chunk, ``[B, H_kv, chunks]``."""
        if not chunks:
            return keys.new_empty((*keys.shape[:2], 0))
        if _scored_by_kernel(keys, self.chunk_size):
            last = keys[:, :, -1:]
            return chunk_scores(last, keys, chunk_size=self.chunk_size, chunks=chunks)[:, :, 0]
        return (chunk_means(keys, chunks, self.chunk_size) @ keys[:, :, -1, :, None])[..., 0]


def chunk_means(keys: Tensor, chunks: int, size: int) -> Tensor:
    """Mean key of each whole chunk, ``[B, H_kv, chunks, D]``."""
    return keys[:, :, : chunks * size].unflatten(2, (chunks, size)).mean(3)


def _scored_by_kernel(keys: Tensor, size: int) -> bool:
    """Whether chunks of these keys are scored by :mod:`bdlib.kernels.chunk_scores`."""
    if not wanted(keys.device):
        return False
    fault = None if size in CHUNK_SIZES else f"chunk_size {size} is no power of two up to 64"
    return use_triton("auto", "k", keys, keys.shape[3], fault or layout_fault(k=keys))


@register
@dataclass(frozen=True)
class ChunkTopKRecent(Policy):
    """Chunk top-k as the paper's, with what it lacks: a guaranteed recent window and real queries.

    A quarter of the budget (``recent``) is the most recent text, unbroken; chunk 0 and the chunks
    with the largest estimated attention mass fill the rest. The estimate is the softmax, over mean
    chunk keys, of the last queries of all heads that share the KV head.
    """

    name: ClassVar[str] = "chunk_topk_recent"
    observe: ClassVar[Literal["none", "recent", "sampled"]] = "recent"
    observed_queries: ClassVar[int] = 8
    chunk_size: int = 8
    recent: float = 0.25

    def __post_init__(self) -> None:
        check_whole("chunk_size", self.chunk_size, 1, "token")
        if not 0 < self.recent <= 1:
            raise ValueError(f"recent {self.recent} must be a fraction of the budget in (0, 1]")

    def select(self, keys, budget, queries, positions):
        length, size = keys.shape[2], self.chunk_size
        if length <= budget:
            return _all(keys)
        least = max(1, round(budget * self.recent))
        # The window starts on a chunk boundary, so that no token falls between it and the chunks.
        window = least + (length - least) % size
        keep = (budget - window) // size
        if keep < 1:
            return Selection(_all(keys).indices, budget)
        scores = self.score(keys, (length - window) // size, queries)
        return Selection(_tokens(_best(scores, keep, first=1), size), window, size)

    def score(self, keys: Tensor, chunks: int, queries: Tensor | None) -> Tensor:
        """Estimated attention mass of each chunk, ``[B, H_kv, chunks]``."""
        if _scored_by_kernel(keys, self.chunk_size):
            scores = chunk_scores(queries, keys, chunk_size=self.chunk_size, chunks=chunks)
            return torch.softmax(scores, -1).unflatten(1, (keys.shape[1], -1)).sum((2, 3))
        means = chunk_means(keys, chunks, self.chunk_size)
        return attention_weights(queries, means).sum((2, 3))


@register
@dataclass(frozen=True)
class Random(ChunkTopKRecent):
    """Chunks at random with the same window as ``chunk_topk_recent``: what is scoring worth?"""

    name: ClassVar[str] = "random"
    observe: ClassVar[Literal["none", "recent", "sampled"]] = "none"
    observed_queries: ClassVar[int] = 0
    seed: int = 0

    def score(self, keys: Tensor, chunks: int, queries: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + chunks)
        return torch.rand(*keys.shape[:2], chunks, generator=generator).to(keys.device)


@register
@dataclass(frozen=True)
class SnapKV(Policy):
    """Entries that the last queries attend to, smoothed, and those queries' own window.

    Based on SnapKV (arXiv 2404.14469): attention of an observation window of 32 queries, summed over
    the window and the heads of a group, max-pooled over 7 neighbours so that spans survive.
    """

    name: ClassVar[str] = "snapkv"
    observe: ClassVar[Literal["none", "recent", "sampled"]] = "recent"
    observed_queries: ClassVar[int] = 32
    pool: int = 7

    def __post_init__(self) -> None:
        check_whole("pool", self.pool, 1, "neighbour")

    def floor(self, budget: int) -> int:
        # SnapKV keeps all that is generated. In a fixed budget it displaces the worst of the selection:
        # the window is short, and without the newest entries a model does not know where it is.
        return budget // 2

    def select(self, keys, budget, queries, positions):
        length = keys.shape[2]
        if length <= budget:
            return _all(keys)
        window = min(self.observed_queries, max(1, budget // 2))
        mass = attention_weights(queries, keys, positions).sum((2, 3))  # [B, H_kv, T]
        pooled = F.max_pool1d(mass, self.pool, stride=1, padding=self.pool // 2)
        return Selection(_best(pooled[..., : length - window], budget - window), window)


@register
@dataclass(frozen=True)
class HeavyHitter(Policy):
    """Half the budget for the entries with most attention so far, half for recent ones.

    Based on H2O (arXiv 2306.14048). H2O accumulates over every query; summing over up to 256 queries
    spread evenly through the text estimates the same column sums without the quadratic table.
    """

    name: ClassVar[str] = "heavy_hitter"
    observe: ClassVar[Literal["none", "recent", "sampled"]] = "sampled"
    observed_queries: ClassVar[int] = 256

    def select(self, keys, budget, queries, positions):
        length = keys.shape[2]
        if length <= budget:
            return _all(keys)
        window = max(1, budget // 2)
        mass = sum(
            attention_weights(q, keys, at).sum((2, 3))
            for q, at in zip(queries.split(32, dim=2), positions.split(32), strict=True)
        )
        return Selection(_best(mass[..., : length - window], budget - window), window)


@register
@dataclass(frozen=True)
class Oracle(Policy):
    """The entries with the most attention from the very queries about to be answered.

    No system can afford it (it reads the whole cache to choose): an upper bound for the others.
    """

    name: ClassVar[str] = "oracle"
    per_step: ClassVar[bool] = True

    def select(self, keys, budget, queries, positions):
        mass = attention_weights(queries, keys).sum((2, 3))
        return Selection(_best(mass, min(budget, keys.shape[2])), 0)
