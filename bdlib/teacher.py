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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdlib.cache import KVCache
from bdlib.objectives import TeacherTarget
from bdlib.transformer import Decoder

SCHEMA = 1
PIECE = 1024  # tokens of a window that go through the target together


@dataclass(frozen=True)
class TeacherSettings:
    """What is kept for each position.

    Attributes
    ----------
    top
        Number ``K`` of most probable tokens.
    taps
        Layers whose output (residual stream) is kept too; empty for none.
    """

    top: int = 32
    taps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
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
        self._arrays = {
            name: np.load(self.folder / f"{name}.npy", mmap_mode="r")
            for name in self.meta["arrays"]
        }
        self.windows = self._arrays["tokens"]

    @property
    def done(self) -> int:
        return int(np.load(self.folder / "done.npy"))

    def __len__(self) -> int:
        return self.done

    def tokens(self, window: int) -> Tensor:
        """Token ids ``[T]``."""
        return torch.from_numpy(self.windows[window].astype(np.int64))

    def target(self, window: int) -> TeacherTarget:
        """The target's distribution after each of the ``T`` tokens."""
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
    tokens = stacked.numpy().astype(kind)
    folder = Path(folder)
    shapes = {
        "tokens": (tokens.shape, kind),
        "ids": ((*tokens.shape, settings.top), kind),
        "logp": ((*tokens.shape, settings.top), np.float16),
    }
    if settings.taps:
        width = target.config.hidden_size
        shapes["features"] = ((*tokens.shape, len(settings.taps), width), np.int16)
    meta = {
        "schema": SCHEMA,
        "settings": json.loads(json.dumps(asdict(settings))),
        "model": json.loads(json.dumps(target.config.to_hf(target.dtype))),
        "weights": _weights_digest(target),
        "windows": digest(tokens),
        "shape": list(tokens.shape),
        "source": source,
        "arrays": list(shapes),
    }
    _prepare(folder, meta, shapes, tokens)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in shapes}
    done = int(np.load(folder / "done.npy"))
    for window in range(done, tokens.shape[0]):
        _one_window(target, stacked[window], settings, arrays, window)
        for array in arrays.values():
            array.flush()
        _write_done(folder, window + 1)  # last, so that a counted window is a complete one
        if progress is not None:
            progress(window + 1, tokens.shape[0])
    return TeacherStore(folder)


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
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype=kind, shape=shape)
        if name == "tokens":
            array[:] = tokens
        array.flush()
    _write_done(folder, 0)
    scratch = folder / "teacher.json.writing"
    scratch.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf8")
    os.replace(scratch, folder / "teacher.json")  # last: the folder counts from here on


def _write_done(folder: Path, done: int) -> None:
    scratch = folder / "done.writing.npy"
    np.save(scratch, np.int64(done))
    os.replace(scratch, folder / "done.npy")


@torch.inference_mode()
def _one_window(
    target: Decoder, tokens: Tensor, settings: TeacherSettings, arrays: dict, window: int
) -> None:
    taps = settings.taps
    cache = KVCache(target.config, tokens.shape[0], 1, target.dtype, target.device, taps=taps)
    for first in range(0, tokens.shape[0], PIECE):
        part = slice(first, min(first + PIECE, tokens.shape[0]))
        hidden = target.hidden(tokens[None, part].to(target.device), cache)
        logits = target.logits(hidden)[0]  # [n, V]
        best, ids = logits.topk(settings.top, -1)
        if not torch.isfinite(best).all():
            raise ValueError(f"window {window}: the target's logits are not numbers")
        logp = best - logits.logsumexp(-1, keepdim=True)
        arrays["ids"][window, part] = ids.cpu().numpy()
        arrays["logp"][window, part] = logp.cpu().numpy()
        if taps:
            features = cache.features(part.start, part.stop)[0].to(torch.bfloat16)  # [n, taps, C]
            arrays["features"][window, part] = features.view(torch.int16).cpu().numpy()
