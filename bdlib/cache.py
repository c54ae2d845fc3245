"""Key/value caches: the target's full one and the drafter's sparse one.

Both are preallocated, are extended by the decoder through ``reserve``, ``attend`` and ``advance``,
and can be rewound after a rejected draft. Keys are stored *rotated* (with the rotary phase of their
original position), so an entry means the same wherever it is kept.

``KVCache`` holds every position. ``SparseKVCache`` holds at most ``budget`` entries per layer and KV
head, generated tokens included; the paper's code appends generated tokens without limit, this one
does not. Its entries are, in memory order,

    [ selected by the policy, next to be evicted first | recent tokens, oldest first ]

Attention does not depend on the order of entries, so this order is free to serve eviction.

``InPlaceKVCache`` holds what ``SparseKVCache`` would, but as chunk numbers: on a GPU the entries of a full
cache are read where they lie, and nothing is copied. :func:`sparse_cache_of` picks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlib import attention
from bdlib.kernels import native
from bdlib.kernels.launching import CHUNK_SIZES, layout_fault, use_triton, wanted
from bdlib.kernels.sparse_decode import sparse_decode
from bdlib.selection import Policy, Selection, check_whole
from bdlib.transformer import DecoderConfig

STEP = 32
"""A step has at most so many tokens; before one, keys are packed (:func:`bdlib.kernels.native.pack`).
A prompt's pieces are longer, and read keys as rows; so do steps of more rows than the C file takes."""
SLACK = 128  # rejected positions that the query log can forget without losing older queries


def _aligned(entries: int) -> int:
    return -(-entries // attention.ALIGN) * attention.ALIGN


def _allocate(
    config: DecoderConfig, entries: int, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Zeroed keys and values ``[L, B, H_kv, T, D]``, ``T`` rounded up to the alignment."""
    entries = _aligned(entries)
    shape = (config.num_layers, batch, config.num_kv_heads, entries, config.head_dim)
    values = torch.zeros(shape, dtype=dtype, device=device)
    return torch.zeros_like(values), values


class QueryLog:
    """The queries some policies look at: the most recent ones, or a sample spread over the text.

    Parameters
    ----------
    policy
        Says what to keep (``observe`` and ``observed_queries``).
    capacity
        Longest context, in tokens; sets the stride of a sample.
    """

    def __init__(
        self,
        config: DecoderConfig,
        policy: Policy,
        capacity: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.recent = policy.observe == "recent"
        self.wanted = policy.observed_queries
        self.stride = 1 if self.recent else max(1, -(-capacity // self.wanted))
        self.slots = self.wanted + SLACK if self.recent else -(-capacity // self.stride)
        shape = (config.num_layers, batch, config.num_heads, self.slots, config.head_dim)
        self._queries = torch.zeros(shape, dtype=dtype, device=device)
        self._held = torch.full((self.slots,), -1)  # position of the query in each slot

    def record(self, layer: int, q: Tensor, start: int) -> None:
        """Keep what is wanted of queries ``[B, H, n, D]`` at positions ``start`` and following."""
        stop = start + q.shape[2]
        first = -(-start // self.stride) * self.stride
        if self.recent:
            first = max(first, stop - self.slots)
        if first < stop:
            positions = torch.arange(first, stop, self.stride, device=q.device)
            slots = positions // self.stride % self.slots
            if layer == 0:  # the same for every layer
                self._held[slots.cpu()] = positions.cpu()
            self._queries[layer].index_copy_(2, slots, q[:, :, first - start :: self.stride])

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Queries ``[B, H, w, D]`` and their positions ``[w]`` among the first ``length`` tokens.

        Raises
        ------
        ValueError
            If later queries have overwritten them: more than :data:`SLACK` positions were forgotten.
        """
        first = max(0, length - self.wanted) if self.recent else 0
        positions = torch.arange(first, length, self.stride)
        slots = positions // self.stride % self.slots
        if not torch.equal(self._held[slots], positions):
            raise ValueError(
                f"the queries before position {length} are gone: the cache went more than {SLACK}"
                " tokens beyond it; prefill again, or start from a copy of its log"
            )
        device = self._queries.device
        return self._queries[layer][:, :, slots.to(device)], positions.to(device)


class KVCache:
    """Every key and value, preallocated.

    Parameters
    ----------
    capacity
        Most positions it can hold, in tokens.
    observe
        A policy whose observation queries are to be logged while the cache is filled.
    taps
        Layers whose output (residual stream) is kept too, for a feature-conditioned drafter.
    """

    def __init__(
        self,
        config: DecoderConfig,
        capacity: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        observe: Policy | None = None,
        taps: tuple[int, ...] = (),
    ) -> None:
        check_whole("capacity", capacity, 1, "token")
        self.config, self.capacity, self.batch = config, capacity, batch
        self.dtype, self.device = dtype, torch.device(device)
        self._keys, self._values = _allocate(config, capacity, batch, dtype, self.device)
        self._packed = 0  # the first entries, whose keys lie as the C file computes with them
        self._packs = native.packs(self._keys)
        most = native.MOST_ROWS * config.num_kv_heads // config.num_heads
        self._step = min(STEP, most)
        self._length = 0
        self.log: QueryLog | None = None
        if observe is not None and observe.observe != "none":
            self.log = QueryLog(config, observe, capacity, batch, dtype, self.device)
        if not all(0 <= layer < config.num_layers for layer in taps):
            raise ValueError(f"taps {taps} must be layers in 0..{config.num_layers - 1}")
        self.taps = taps
        shape = (batch, capacity if taps else 0, len(taps), config.hidden_size)
        self._features = torch.zeros(shape, dtype=dtype, device=self.device)

    @property
    def length(self) -> int:
        """Positions held. To set it is to say so of entries that somebody wrote, or to forget some."""
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        self._unpack(length)
        self._length = length

    def keep_features(self, layer: int, x: Tensor) -> None:
        """Keep the residual stream ``[B, n, C]`` after a tapped layer at the next positions."""
        stop = self.length + x.shape[1]
        self._features[:, self.length : stop, self.taps.index(layer)] = x

    def features(self, start: int, stop: int) -> Tensor:
        """Residual streams after the tapped layers, ``[B, n, taps, C]``, a view."""
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"features {start}..{stop} asked of a cache of {self.length} tokens")
        return self._features[:, start:stop]

    def feature_bytes(self) -> int:
        """Bytes allocated for features."""
        return self._features.nbytes

    def keys(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Rotated keys ``[B, H_kv, T, D]`` of positions ``start`` to ``stop``, a view until the next step.

        What a step has packed is unpacked for it: :meth:`rows` is for those who only read.
        """
        self._unpack(start)
        return self._keys[layer][:, :, start : self.length if stop is None else stop]

    def rows(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        """As :meth:`keys`, but a copy of such as are packed, which stay so."""
        return self._as_rows(self._keys[layer], start, self.length if stop is None else stop)

    def values(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Values ``[B, H_kv, T, D]`` of positions ``start`` to ``stop``, a view."""
        return self._values[layer][:, :, start : self.length if stop is None else stop]

    def entries(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all layers, ``[L, B, H_kv, n, D]``, as :meth:`rows` gives one layer's."""
        return self._as_rows(self._keys, start, stop), self._values[:, :, :, start:stop]

    def _as_rows(self, keys: Tensor, start: int, stop: int) -> Tensor:
        packed = self._packed
        if start >= min(packed, stop):
            return keys[..., start:stop, :]
        first = start // native.BLOCK * native.BLOCK
        last = min(packed, -(-stop // native.BLOCK) * native.BLOCK)
        rows = native.unpack(keys[..., first:, :], last - first)[..., start - first :, :]
        if stop <= last:
            return rows[..., : stop - start, :]
        return torch.cat((rows, keys[..., last:stop, :]), -2)

    def pack(self) -> None:
        """Lay out the keys of every whole block as a step on this machine computes with them.

        A step does so by itself; a prompt that was read does not need to wait for one.
        """
        whole = self._length // native.BLOCK * native.BLOCK
        if self._packs and whole > self._packed:
            native.pack(self._keys, self._packed, whole)
            self._packed = whole

    def _unpack(self, length: int) -> None:
        """Undo :meth:`pack` from ``length`` on."""
        first = length // native.BLOCK * native.BLOCK
        if first < self._packed:
            self._keys[..., first : self._packed, :] = self._as_rows(
                self._keys, first, self._packed
            )
            self._packed = first

    def stay_rows(self) -> None:
        """Pack nothing from here on, for one who reads entries in place: steps take longer."""
        self._unpack(0)
        self._packs = False

    def reserve(self, n: int) -> None:
        """Check that ``n`` more tokens fit."""
        if self.length + n > self.capacity:
            raise ValueError(
                f"cache of {self.capacity} tokens cannot take {n} more after {self.length}"
            )
        if n <= self._step:
            self.pack()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store ``k, v`` ``[B, H_kv, n, D]`` at the next ``n`` positions and attend from ``q``."""
        start, stop = self.length, self.length + q.shape[2]
        if self.log is not None:
            self.log.record(layer, q, start)
        keys, values = self._keys[layer], self._values[layer]
        if (out := attention.extend(q, k, v, keys, values, start, self._packed)) is not None:
            return out
        keys[:, :, start:stop], values[:, :, start:stop] = k, v
        if stop - start > attention.FEW:
            return attention.many_queries(q, self.keys(layer, 0, stop), self.values(layer, 0, stop))
        reach = _aligned(stop)
        keys, values = self.keys(layer, 0, reach), self.values(layer, 0, reach)
        return attention.few_queries(q, keys, values, start)

    def advance(self, n: int) -> None:
        """Make the ``n`` positions stored by :meth:`attend` part of the cache."""
        self._length += n

    def rewind(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.length} tokens")
        self.length = length

    def nbytes(self) -> int:
        """Bytes of the keys and values that are held now."""
        return self.batch * self.config.kv_bytes(self.length, self.dtype)


class SparseKVCache:
    """At most ``budget`` entries per layer and KV head, chosen by a policy.

    Parameters
    ----------
    budget
        Entries kept per layer and KV head, generated tokens included.
    policy
        Which entries to keep (:mod:`bdlib.selection`).
    """

    def __init__(
        self,
        config: DecoderConfig,
        budget: int,
        policy: Policy,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        policy.check(budget)
        self.config, self.budget, self.policy, self.batch = config, budget, policy, batch
        self.dtype, self.device = dtype, torch.device(device)
        self._keys, self._values = self._room()
        shape = (config.num_layers, batch, config.num_kv_heads)
        self._selected = torch.empty((*shape, 0), dtype=torch.int64, device=self.device)
        self._recent: list[int] = []  # positions of the recent entries, the same for every head
        self._source: KVCache | None = None
        self.length = 0  # position of the next token
        self.peak_entries = 0

    def _room(self) -> tuple[Tensor, Tensor]:
        """Where the entries go."""
        return _allocate(self.config, self.budget, self.batch, self.dtype, self.device)

    # ---------------------------------------------------------------- what it holds
    @property
    def size(self) -> int:
        """Entries held now, per layer and KV head."""
        return self._selected.shape[-1] + len(self._recent)

    def positions(self, layer: int) -> Tensor:
        """Original positions of the entries of one layer, ``[B, H_kv, size]``, in memory order."""
        recent = torch.tensor(self._recent, dtype=torch.int64, device=self.device)
        selected = self._selected[layer]
        return torch.cat((selected, recent.expand(*selected.shape[:2], -1)), -1)

    def nbytes(self) -> int:
        """Bytes of the entries that are held now."""
        return self.batch * self.config.kv_bytes(self.size, self.dtype)

    def own_bytes(self) -> int:
        """Bytes allocated for entries here, for a whole budget."""
        return self.batch * self.config.kv_bytes(self.budget, self.dtype)

    # ---------------------------------------------------------------- filling
    def fill(self, source: KVCache) -> None:
        """Choose entries anew from a full cache, and continue at its length.

        Raises
        ------
        ValueError
            If the policy needs queries that the full cache has not logged, or chooses too much.
        """
        length = source.length
        if not self.policy.per_step and not self._logged(source.log):
            raise ValueError(
                f"policy {self.policy.name!r} needs {self.policy.observed_queries}"
                f" {self.policy.observe} queries: fill the full cache with observe=policy"
            )
        self._source = source if self.policy.per_step else None
        self.length = length
        if self.policy.per_step:
            self._forget_all()
            return
        chosen = []
        for layer in range(self.config.num_layers):
            queries, at = (None, None) if source.log is None else source.log.read(layer, length)
            keys = source.rows(layer)
            selection = self.policy.select(keys, self.budget, queries, at)
            m, window = selection.indices.shape[-1], selection.window
            if m + window > self.budget:
                raise ValueError(
                    f"policy {self.policy.name!r} chose {m + window} entries, budget {self.budget}"
                )
            chosen.append(selection.indices)
            self._copy_selected(layer, keys, source.values(layer), selection)
        self._selected = torch.stack(chosen)
        self._recent = list(range(length - window, length))
        self.peak_entries = max(self.peak_entries, self.size)

    def _copy_selected(
        self, layer: int, keys: Tensor, values: Tensor, selection: Selection
    ) -> None:
        """Copy what was chosen of a layer's ``keys`` and ``values``, and the recent ones behind it."""
        indices, window = selection.indices, selection.window
        m, first = indices.shape[-1], keys.shape[2] - window
        take = indices[..., None].expand(-1, -1, -1, keys.shape[-1])
        end = slice(m, m + window)
        self._keys[layer][:, :, :m] = keys.gather(2, take)
        self._values[layer][:, :, :m] = values.gather(2, take)
        self._keys[layer][:, :, end] = keys[:, :, first:]
        self._values[layer][:, :, end] = values[:, :, first:]

    def _logged(self, log: QueryLog | None) -> bool:
        """Whether a log holds the queries that the policy looks at."""
        kind, count = self.policy.observe, self.policy.observed_queries
        if kind == "none":
            return True
        return log is not None and log.recent == (kind == "recent") and log.wanted >= count

    def extend_from(self, source: KVCache, start: int) -> None:
        """Append the entries of a full cache from position ``start``, without computing them."""
        for first in range(start, source.length, self.budget):
            last = min(first + self.budget, source.length)
            self.reserve(last - first)
            self._copy_recent(source, first, last)
            self.advance(last - first)

    def _copy_recent(self, source: KVCache, first: int, last: int) -> None:
        """Copy positions ``first`` to ``last`` behind all others."""
        entries = slice(self.size, self.size + last - first)
        self._keys[:, :, :, entries], self._values[:, :, :, entries] = source.entries(first, last)

    # ---------------------------------------------------------------- the decoder's side
    def reserve(self, n: int) -> None:
        """Make room for ``n`` more entries, evicting if need be."""
        if n > self.budget:
            raise ValueError(f"{n} tokens at once do not fit a budget of {self.budget} entries")
        excess = self.size + n - self.budget
        if excess > 0:
            # A few more than needed, so that memory is moved once in a while and not every token.
            self._evict(min(self.size, max(excess, self.budget // 16)))

    def _evict(self, n: int) -> None:
        selected = self._selected.shape[-1]
        from_selected = min(n, max(0, selected - self.policy.floor(self.budget)))
        from_recent = min(n - from_selected, len(self._recent))
        from_selected = n - from_recent  # more than its share only when nothing recent is left
        self._move(slice(from_selected, selected), slice(selected + from_recent, self.size))
        self._selected = self._selected[..., from_selected:]
        self._recent = self._recent[from_recent:]

    def _move(self, selected_left: slice, recent_left: slice) -> None:
        """Bring what is left together at the front."""
        for buffer in (self._keys, self._values):
            kept = buffer[:, :, :, selected_left], buffer[:, :, :, recent_left]
            moved = torch.cat(kept, dim=3)
            buffer[:, :, :, : moved.shape[3]] = moved

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store ``k, v`` ``[B, H_kv, n, D]`` as the newest entries and attend from ``q``."""
        start, stop = self.size, self.size + q.shape[2]
        keys, values = self._keys[layer], self._values[layer]
        alone = self._source is None
        if alone and (out := attention.extend(q, k, v, keys, values, start)) is not None:
            return out
        keys[:, :, start:stop], values[:, :, start:stop] = k, v
        reach = stop if self._source is not None or stop - start > attention.FEW else _aligned(stop)
        keys, values = keys[:, :, :reach], values[:, :, :reach]
        if self._source is not None:
            keys, values = self._choose_now(layer, q, keys, values)
            start = keys.shape[2] - q.shape[2]
        if q.shape[2] > attention.FEW:
            return attention.many_queries(q, keys, values)
        return attention.few_queries(q, keys, values, start)

    def _choose_now(
        self, layer: int, q: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For a per-step policy: the best entries of the source for these very queries."""
        source, room = self._source, self.budget - keys.shape[2]
        if room < 1:
            return keys, values
        known = source.rows(layer, 0, self._known)
        picked = self.policy.select(known, room, q, None).indices
        self.peak_entries = max(self.peak_entries, picked.shape[-1] + keys.shape[2])
        take = picked[..., None].expand(-1, -1, -1, known.shape[-1])
        old = source.values(layer, 0, self._known).gather(2, take)
        return torch.cat((known.gather(2, take), keys), 2), torch.cat((old, values), 2)

    @property
    def _known(self) -> int:
        """Positions of the source that are not among the recent entries."""
        return min(self._source.length, self._recent[0] if self._recent else self.length)

    def advance(self, n: int) -> None:
        """Make the ``n`` entries stored by :meth:`attend` part of the cache."""
        self._recent.extend(range(self.length, self.length + n))
        self.length += n
        self.peak_entries = max(self.peak_entries, self.size)

    def rewind(self, length: int) -> None:
        """Forget every position from ``length`` on. Entries evicted meanwhile do not come back.

        Raises
        ------
        ValueError
            If ``length`` is ahead of the cache, or cuts into the selected entries (other than all).
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the cache is at {self.length} tokens")
        while self._recent and self._recent[-1] >= length:
            self._recent.pop()
        if self._selected.numel() and length <= int(self._selected.max()):
            if length:
                raise ValueError(
                    f"cannot rewind to {length}: selected entries reach position"
                    f" {int(self._selected.max())}; fill the cache again instead"
                )
            self._forget_all()
        self.length = length

    def _forget_all(self) -> None:
        self._selected = self._selected[..., :0]
        self._recent = []


class InPlaceKVCache(SparseKVCache):
    """The entries that a :class:`SparseKVCache` would copy, read where they lie in a full cache.

    Tokens drafted here are written to the full cache behind its own, at the positions that they would
    take; the target overwrites them when it verifies. So a draft must fit the full cache's capacity,
    and is over when the target goes on.

    Parameters
    ----------
    full
        The cache that holds the entries; no other may be given to :meth:`fill`.
    """

    def __init__(self, full: KVCache, budget: int, policy: Policy) -> None:
        if policy.per_step:
            raise ValueError(f"policy {policy.name!r} chooses anew at each step: copy its entries")
        full.stay_rows()
        self._full = full
        self._chunk_size = 1
        self._chunks: Tensor | None = None  # chunk numbers of what is selected, [L, B, H_kv, m]
        super().__init__(full.config, budget, policy, full.batch, full.dtype, full.device)

    def _room(self) -> tuple[Tensor, Tensor]:
        return self._full._keys, self._full._values

    def own_bytes(self) -> int:
        return 0

    def fill(self, source: KVCache) -> None:
        if source is not self._full:
            raise ValueError("source is another full cache than the one that is read in place")
        super().fill(source)

    def _copy_selected(
        self, layer: int, keys: Tensor, values: Tensor, selection: Selection
    ) -> None:
        self._chunk_size = selection.chunk_size
        self._chunks = None

    def _copy_recent(self, source: KVCache, first: int, last: int) -> None:
        pass

    def _move(self, selected_left: slice, recent_left: slice) -> None:
        self._chunks = None

    def _numbers(self) -> tuple[Tensor, int]:
        """Chunk numbers of the selected entries and the chunks' size: 1 once a chunk has been cut."""
        size, m = self._chunk_size, self._selected.shape[-1]
        size = size if size in CHUNK_SIZES and m % size == 0 else 1
        if self._chunks is None:
            self._chunks = (self._selected[..., ::size] // size).int()
        return self._chunks, size

    def reserve(self, n: int) -> None:
        if self.length + n > self._full.capacity:
            raise ValueError(
                f"cache of {self._full.capacity} tokens cannot take {n} more after {self.length}"
            )
        super().reserve(n)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store ``k, v`` ``[B, H_kv, n, D]`` as the newest entries and attend from ``q``."""
        start, stop = self.length, self.length + q.shape[2]
        keys, values = self._full.keys(layer, 0, stop), self._full.values(layer, 0, stop)
        keys[:, :, start:] = k
        values[:, :, start:] = v
        chunks, size = self._numbers()
        recent = {"window": len(self._recent), "chunk_size": size}
        return sparse_decode(q, keys, values, chunks[layer], stop, **recent, check=False)

    def _forget_all(self) -> None:
        super()._forget_all()
        self._chunks = None


def sparse_cache_of(full: KVCache, budget: int, policy: Policy) -> SparseKVCache:
    """A sparse cache, to be filled from ``full``: read in place where a kernel can, else copied."""
    keys, values = full.keys(0, 0, 1), full.values(0, 0, 1)
    if (
        wanted(full.device)
        and not policy.per_step
        and use_triton("auto", "k", keys, full.config.head_dim, layout_fault(k=keys, v=values))
    ):
        return InPlaceKVCache(full, budget, policy)
    return SparseKVCache(full.config, budget, policy, full.batch, full.dtype, full.device)
