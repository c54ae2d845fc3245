"""Teacher targets: what the target, with its full cache, predicts at every position. Computed once.

The teacher pass costs more than a drafter's training step, and every variant of a drafter (full-only,
fixed budget, other lambdas) learns from the same targets. So they are computed once per set of windows
and kept on disk: the ``K`` most probable tokens with their log-probabilities, and, for a
feature-conditioned drafter, the target's residual stream after chosen layers.

Contract: a store is a folder of plain ``.npy`` arrays and a ``teacher.json`` that says what made it.
:func:`compute` may be killed at any time and continues at the first window that is not complete; a
store made by another target, from other windows or with other settings is refused, not mixed.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdlib import assets
from bdlib.cache import KVCache
from bdlib.drafters import check_reach, positions_read
from bdlib.objectives import TeacherTarget
from bdlib.transformer import Decoder

SCHEMA = 1
PIECE = 1024  # tokens of a window that go through the target together
GPU_PIECE = 4096  # the same on a GPU, which a shorter piece leaves idle


@dataclass(frozen=True)
class TeacherSettings:
    """What is kept for each position.

    Attributes
    ----------
    top
        Number ``K`` of most probable tokens.
    taps
        Layers whose output (residual stream) is kept too; empty for none.
    last
        Keep the targets of the last so many positions only; ``None`` keeps all. (The paper trains on
        256 of 16,384.) Features are always kept for all positions.
    reach
        Keep of a longer window what a drafter of this reach reads of it, its first
        :data:`bdlib.drafters.HEAD` tokens and its last; the target reads all. ``None`` keeps all.
    """

    top: int = 32
    taps: tuple[int, ...] = ()
    last: int | None = None
    reach: int | None = None

    def __post_init__(self) -> None:
        if self.reach is not None:
            check_reach(self.reach)
        if self.last is not None and self.last < 1:
            raise ValueError(f"last {self.last} must be None (all positions) or at least 1")
        if self.top < 1:
            raise ValueError(f"top {self.top} must be at least 1")
        if sorted(set(self.taps)) != list(self.taps):
            raise ValueError(f"taps {self.taps} must be distinct layers in ascending order")


class TeacherStore:
    """Targets on disk, read window by window through memory maps.

    Attributes
    ----------
    windows
        Token ids ``[W, T]``.
    done
        Number of windows that are complete; they are the first ones.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "teacher.json").read_text(encoding="utf8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder} holds no teacher targets: {error}") from error
        if self.meta.get("schema") != SCHEMA:
            raise ValueError(
                f"{folder}: teacher targets of schema {self.meta.get('schema')}, need {SCHEMA}"
            )
        try:
            self._arrays = {
                name: np.load(self.folder / f"{name}.npy", mmap_mode="r")
                for name in self.meta["arrays"]
            }
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: the teacher targets are damaged: {error}") from error
        self._checked: set[int] = set()
        self.windows = self._arrays["tokens"]

    @property
    def done(self) -> int:
        return int(np.load(self.folder / "done.npy"))

    def __len__(self) -> int:
        return self.done

    def tokens(self, window: int) -> Tensor:
        """Token ids ``[T]``."""
        return torch.from_numpy(self.windows[window].astype(np.int64))

    def check(self, window: int) -> None:
        """Compare a window with its checksum; each is read once in a run, so this is done once.

        Raises
        ------
        ValueError
            If the files were altered since they were written.
        """
        if window in self._checked:
            return
        if window >= self.done or _sum(self._arrays, window) != int(self._arrays["sums"][window]):
            raise ValueError(
                f"{self.folder}: window {window} of the teacher targets is incomplete or damaged;"
                " remove the folder and compute it again"
            )
        self._checked.add(window)

    def target(self, window: int) -> TeacherTarget:
        """The target's distribution after each of the ``T`` tokens (or the last ones kept)."""
        self.check(window)
        ids = torch.from_numpy(self._arrays["ids"][window].astype(np.int64))
        probs = torch.from_numpy(self._arrays["logp"][window].astype(np.float32)).exp()
        return TeacherTarget(ids, probs)

    def features(self, window: int) -> Tensor:
        """Residual streams after the tapped layers, ``[T, taps, C]`` in bfloat16."""
        if "features" not in self._arrays:
            raise ValueError(f"{self.folder} was made without features (taps)")
        bits = torch.from_numpy(np.array(self._arrays["features"][window]))
        return bits.view(torch.bfloat16)


def digest(windows: np.ndarray) -> str:
    """SHA-256 of the token ids: what a store and a checkpoint were made from."""
    return hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest()


def check_made_by(store: TeacherStore, target: Decoder, drafter: Decoder) -> None:
    """Refuse targets of another model than the one at hand, or of another vocabulary than the drafter's.

    Raises
    ------
    ValueError
        Naming what differs.
    """
    if store.meta["weights"] != _weights_digest(target):
        raise ValueError(f"{store.folder} holds the targets of another model than the one loaded")
    sizes = store.meta["model"]["vocab_size"], drafter.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{store.folder}: the teacher's vocabulary has {sizes[0]} tokens, the drafter's {sizes[1]}"
        )


def _weights_digest(target: Decoder) -> str:
    """A digest of the embedding and every norm: enough to tell one set of weights from another."""
    norms = [p for name, p in target.named_parameters() if name.endswith("norm")]
    parts = [target.embedding, *norms]
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.detach().float().cpu().numpy().tobytes())
    return whole.hexdigest()


def compute(
    target: Decoder,
    windows: Tensor | Sequence[Tensor],
    folder: str | Path,
    settings: TeacherSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
    source: str = "",
) -> TeacherStore:
    """Run the target over ``windows`` ``[W, T]`` and keep its targets; continues what it finds.

    Parameters
    ----------
    progress
        Called with (windows done, windows in all) after each window.
    source
        A sentence for ``teacher.json``: which texts, which split.

    Raises
    ------
    ValueError
        If the folder holds targets of another model, other windows or other settings.
    """
    settings = settings or TeacherSettings()
    stacked = torch.stack(list(windows)) if not isinstance(windows, Tensor) else windows
    kind = np.uint16 if target.config.vocab_size <= 1 << 16 else np.uint32
    whole = stacked.numpy().astype(kind)
    tokens = whole[:, positions_read(whole.shape[1], settings.reach or 0)[0]]
    folder = Path(folder)
    kept = min(settings.last or tokens.shape[1], tokens.shape[1])
    shapes = {
        "tokens": (tokens.shape, kind),
        "ids": ((len(tokens), kept, settings.top), kind),
        "logp": ((len(tokens), kept, settings.top), np.float16),
        "sums": ((len(tokens),), np.uint32),
    }
    if settings.taps:
        width = target.config.hidden_size
        shapes["features"] = ((*tokens.shape, len(settings.taps), width), np.int16)
    meta = {
        "schema": SCHEMA,
        "settings": json.loads(json.dumps(asdict(settings))),
        "model": json.loads(json.dumps(target.config.to_hf(target.dtype))),
        "weights": _weights_digest(target),
        "windows": digest(whole),
        "shape": list(tokens.shape),
        "source": source,
        "arrays": list(shapes),
    }
    _prepare(folder, meta, shapes, tokens)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in shapes}
    done = int(np.load(folder / "done.npy"))
    for window in range(done, tokens.shape[0]):
        _one_window(target, stacked[window], settings, arrays, window)
        arrays["sums"][window] = _sum(arrays, window)
        for array in arrays.values():
            array.flush()
        _write_done(folder, window + 1)  # last, so that a counted window is a complete one
        if progress is not None:
            progress(window + 1, tokens.shape[0])
    return TeacherStore(folder)


def _sum(arrays: dict[str, np.ndarray], window: int) -> int:
    """A checksum (CRC-32) over everything that is kept of a window."""
    found = 0
    for name in sorted(set(arrays) - {"sums"}):
        found = zlib.crc32(np.ascontiguousarray(arrays[name][window]).tobytes(), found)
    return found


def _prepare(folder: Path, meta: dict, shapes: dict, tokens: np.ndarray) -> None:
    if (folder / "teacher.json").exists():
        found = TeacherStore(folder).meta
        for key in meta:
            if found.get(key) != meta[key]:
                raise ValueError(
                    f"{folder} holds teacher targets with another {key}; choose another folder"
                    f" or remove it (found {str(found.get(key))[:80]}, need {str(meta[key])[:80]})"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, (shape, kind) in shapes.items():
        file = folder / f"{name}.npy"
        array = np.lib.format.open_memmap(file, "w+", dtype=kind, shape=shape)
        _take_room(file)
        if name == "tokens":
            array[:] = tokens
        array.flush()
    _write_done(folder, 0)
    with assets.replacing(
        folder / "teacher.json"
    ) as scratch:  # last: the folder counts from here on
        scratch.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf8")


def _take_room(file: Path) -> None:
    """Take a file's whole size on the disk now: a write through a memory map to a full disk is no error
    that could be reported, it ends the process."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with file.open("r+b") as opened:
        try:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from error


def _write_done(folder: Path, done: int) -> None:
    with assets.replacing(folder / "done.npy") as scratch, scratch.open("wb") as file:
        np.save(file, np.int64(done))


@torch.inference_mode()
def _one_window(
    target: Decoder, tokens: Tensor, settings: TeacherSettings, arrays: dict, window: int
) -> None:
    taps = settings.taps
    cache = KVCache(target.config, tokens.shape[0], 1, target.dtype, target.device, taps=taps)
    positions, stated = positions_read(len(tokens), settings.reach or 0)
    missing = len(positions) - arrays["ids"].shape[1]  # at the front, whose targets are not kept
    piece = PIECE if target.device.type == "cpu" else GPU_PIECE
    for first in range(0, tokens.shape[0], piece):
        last = min(first + piece, tokens.shape[0])
        hidden = target.hidden(tokens[None, first:last].to(target.device), cache)
        if taps:
            rows, here = _within(stated, first, last)
            features = cache.features(first, last)[0][here].to(torch.bfloat16)  # [n, taps, C]
            arrays["features"][window, rows] = features.view(torch.int16).cpu().numpy()
        rows, here = _within(positions[missing:], first, last)
        if not len(here):
            continue
        logits = target.logits(hidden[:, here])[0]  # [n, V]
        best, ids = logits.topk(settings.top, -1)
        if not torch.isfinite(best).all():
            raise ValueError(f"window {window}: the target's logits are not numbers")
        logp = best - logits.logsumexp(-1, keepdim=True)
        arrays["ids"][window, rows] = ids.cpu().numpy()
        arrays["logp"][window, rows] = logp.cpu().numpy()


def _within(positions: Tensor, first: int, last: int) -> tuple[slice, Tensor]:
    """Which of ascending ``positions`` lie in ``first..last - 1``, and where in that piece they are."""
    low, high = torch.searchsorted(positions, torch.tensor((first, last))).tolist()
    return slice(low, high), positions[low:high] - first
