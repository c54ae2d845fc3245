"""The multi-view trainer: shared teacher targets, sampled budgets, exact resume.

One step takes ``windows`` windows of text. Each is run once in full (L_A) and replayed in blocks under
``views`` sparse views whose budgets and policies are drawn for the step (L_C); all of them are compared
with the same teacher target (:mod:`bdlib.teacher`). Two modes:

* ``"all"``: every position is trained on, and gradient reaches the prefix's keys and values.
* ``"continuation"``: the paper's recipe (arXiv 2606.00144). The last ``block`` tokens are the
  continuation; the prefix runs without gradient; the loss is on the continuation alone.

Contract: a step is a function of (weights, optimiser state, settings, step number) and nothing else, so
a run that is killed and resumed is bit for bit the run that was not (on CPU; tested with SIGKILL).
Checkpoints are written to a temporary name and renamed.
"""

from __future__ import annotations

import json
import math
import random
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdlib import assets
from bdlib.budgets import BudgetSampler
from bdlib.models import FeatureDecoder, row_of
from bdlib.objectives import Branch, Objective, TeacherTarget, branches
from bdlib.selection import make_policy
from bdlib.teacher import TeacherStore
from bdlib.transformer import Decoder, keeping_freed
from bdlib.views import Stream, View, drafted_view, drafted_views, full_stream

Example = tuple[Tensor, TeacherTarget, Tensor | None]
MODES = ("all", "continuation")
CHECKPOINT, LOG = "training.pt", "log.jsonl"


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides a run.

    Attributes
    ----------
    steps, warmup
        Optimiser steps in all, and those in which the learning rate rises; it then falls as a cosine.
    windows
        Windows per step (gradients are accumulated over them).
    block
        Tokens of a replayed block, or of the continuation.
    views
        Sparse views per step; 0 trains on the full view alone.
    policies
        Policies a view's policy is drawn from, evenly.
    share
        Share of a window's blocks that each view replays (mode ``"all"``): views differ in budget, so
        they need not all cover everything.
    draft_steps
        Draft steps that a feature-conditioned drafter is trained over, each on the output of the last.
    """

    objective: Objective = field(default_factory=Objective)
    budgets: BudgetSampler = field(default_factory=BudgetSampler)
    policies: tuple[str, ...] = ("chunk_topk",)
    views: int = 1
    mode: str = "all"
    block: int = 64
    share: float = 1.0
    draft_steps: int = 1
    steps: int = 1000
    warmup: int = 50
    windows: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    autocast: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is not one of {MODES}")
        for name in ("steps", "windows", "block", "draft_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("views", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must be 0 or positive")
        if not 0 < self.share <= 1:
            raise ValueError(f"share {self.share} must be in (0, 1]")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
        for name in self.policies:
            make_policy(name)
        smallest = min(self.budgets.probabilities())
        if self.views and self.mode == "all" and smallest <= self.block:
            raise ValueError(f"budget {smallest} must be above the block of {self.block} tokens")

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine to 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def draw(self, step: int) -> list[View]:
        """The sparse views of a step."""
        if not self.views:
            return []
        source = random.Random(f"policy:{self.seed}:{step}")
        budgets = self.budgets.draw(step, self.views)
        return [View(b, make_policy(source.choice(self.policies))) for b in budgets]


def window_of(order_seed: int, index: int, count: int) -> int:
    """Which window is the ``index``-th to be trained on: a new order every epoch."""
    epoch, place = divmod(index, count)
    order = list(range(count))
    random.Random(f"order:{order_seed}:{epoch}").shuffle(order)
    return order[place]


def window_loss(
    model: Decoder,
    tokens: Tensor,
    target: TeacherTarget,
    settings: TrainSettings,
    views: Sequence[View],
    seed: str,
    features: Tensor | None = None,
) -> tuple[Tensor, Branch, list[Branch]]:
    """Loss of one window ``[T]`` and its branches, full and sparse.

    Parameters
    ----------
    features
        The target's streams ``[T, taps, C]``, for a feature-conditioned drafter.

    Raises
    ------
    ValueError
        If the window is not longer than two blocks, or features are missing.
    """
    length, block = tokens.shape[0], settings.block
    if length < 2 * block:
        raise ValueError(f"window of {length} tokens must hold two blocks of {block}")
    kept = target.ids.shape[0]
    if kept < (length if settings.mode == "all" else block):
        raise ValueError(
            f"teacher targets for the last {kept} of {length} positions do not suffice for mode"
            f" {settings.mode!r} with blocks of {block}"
        )
    states = None
    if isinstance(model, FeatureDecoder):
        if features is None:
            raise ValueError("a feature-conditioned drafter needs teacher targets with features")
        states = model.states_of(features)
    chance = random.Random(seed)
    if settings.mode == "all":
        x = None if states is None else model.inputs(tokens[None], states[None])
        stream = full_stream(model, tokens, x)
        hidden, whole = stream.hidden[None], [0]
        # Blocks begin anywhere, so that every place and every remainder by the chunk size comes up.
        possible = list(range(1 + chance.randrange(block), length - block + 1, block))
    else:
        stream, hidden = _frozen_prefix(model, tokens, length - block, states)
        possible = whole = [length - block]
    objective = settings.objective
    (full,) = branches_of_blocks(model, [hidden], target, [whole], length, objective.full)
    if not views:
        return objective.total(full, []), full, []
    count = max(1, round(len(possible) * settings.share))
    starts = [sorted(chance.sample(possible, count)) for _ in views]
    if settings.mode == "continuation":  # as in the paper, the continuation comes on top
        views = [replace(view, budget=view.budget + block) for view in views]
    steps = 1 if states is None else settings.draft_steps
    replayed = list(zip(views, starts, strict=True))
    drafted = drafted_views(model, tokens, stream, replayed, block, states, steps)
    sparse = branches_of_blocks(model, drafted, target, starts, length, objective.sparse)
    return objective.total(full, sparse), full, sparse


def branches_of_blocks(
    model: Decoder,
    steps: Sequence[Tensor],
    target: TeacherTarget,
    starts: Sequence[Sequence[int]],
    window: int,
    loss: str,
) -> list[Branch]:
    """The branch of each view from all its blocks' states, averaged over draft steps; figures of the
    first.

    Parameters
    ----------
    steps
        Of each draft step, ``[blocks of all views, n, C]``, as :func:`bdlib.views.drafted_views` gives.
    starts
        Where the blocks of each view begin.
    """
    length = steps[0].shape[1]
    missing = window - target.ids.shape[0]  # positions at the front that the teacher did not keep
    targets, hidden = [], []
    for step, states in enumerate(steps):
        hidden.append((states[:, step:] if step else states).flatten(0, 1))
        for blocks in starts:
            at = torch.cat([torch.arange(s + step, s + length) for s in blocks]) - missing
            targets.append(TeacherTarget(target.ids[at], target.probs[at]))
    logits = model.logits(torch.cat(hidden), wide=False)
    found = branches(logits, targets, loss, row_of(model))
    result = []
    for view, blocks in enumerate(starts):
        first, *later = of_view = found[view :: len(starts)]
        mean = torch.stack([b.loss for b in of_view]).mean()
        places = torch.cat([torch.arange(s, s + length) for s in blocks]).to(first.kl.device)
        deeper = tuple(b.agreement for b in later)
        result.append(replace(first, loss=mean, deeper=deeper, positions=places))
    return result


def _frozen_prefix(
    model: Decoder, tokens: Tensor, start: int, states: Tensor | None
) -> tuple[Stream, Tensor]:
    """A stream whose keys carry no gradient, and the continuation's states under a full view."""
    with torch.no_grad():
        x = None if states is None else model.inputs(tokens[None], states[None])
        stream = full_stream(model, tokens, x)
    everything = View(tokens.shape[0] + 1, make_policy("sink_window"))
    rest = tokens.shape[0] - start
    return stream, drafted_view(model, tokens, stream, everything, [start], rest, states)[0]


class Trainer:
    """Trains a drafter from a teacher store into a folder, and resumes what it finds there.

    Parameters
    ----------
    stores
        Teacher targets; several (of different window lengths, say) are used in turn.
    folder
        Where ``training.pt`` and ``log.jsonl`` go.
    minutes
        Minutes between checkpoints.
    accelerator
        An ``accelerate.Accelerator`` for several processes; each takes its share of a step's windows.
    """

    def __init__(
        self,
        model: Decoder,
        stores: Sequence[TeacherStore],
        settings: TrainSettings,
        folder: str | Path,
        minutes: float = 3.0,
        accelerator: Any = None,
    ) -> None:
        if not stores or not all(len(store) for store in stores):
            raise ValueError("training needs teacher targets: a store is missing or empty")
        self.model, self.stores, self.settings = model, list(stores), settings
        self.folder, self.minutes, self.accelerator = Path(folder), minutes, accelerator
        self.processes = 1 if accelerator is None else accelerator.num_processes
        self.rank = 0 if accelerator is None else accelerator.process_index
        if settings.windows % self.processes:
            raise ValueError(
                f"{settings.windows} windows a step cannot be shared by {self.processes} processes:"
                f" make windows (--batch) a multiple of {self.processes}"
            )
        self.counts = [len(store) for store in self.stores]
        longest = max(store.windows.shape[1] for store in self.stores)
        largest = max(settings.budgets.probabilities())
        if settings.views and largest > longest:
            raise ValueError(
                f"budget {largest} is above the longest window of {longest} tokens: such a view"
                " is never sparse"
            )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.95)
        )
        self.step = 0
        self.read_ahead = model.device.type != "cpu" and self.processes == 1
        self._reader = ThreadPoolExecutor(1)  # starts no thread before it is given work
        self._ahead: tuple[int, Future] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    # ---------------------------------------------------------------- one step
    def train_step(self) -> dict[str, Any]:
        """Take one optimiser step; returns its log line."""
        settings, began = self.settings, time.perf_counter()
        views = settings.draw(self.step)
        share = settings.windows // self.processes
        device = self.model.embedding.device.type
        tokens_seen, branches = 0, []
        self.optimiser.zero_grad(set_to_none=True)
        for i in range(self.rank * share, (self.rank + 1) * share):
            tokens, target, features = self._read(self.step * settings.windows + i)
            with torch.autocast(device, torch.bfloat16, enabled=settings.autocast):
                seed = f"blocks:{settings.seed}:{self.step}:{i}"
                loss, full, sparse = window_loss(
                    self.model, tokens, target, settings, views, seed, features
                )
            (loss / share).backward()
            tokens_seen += tokens.shape[0]
            branches.append((loss.detach(), full, sparse))
        if self.processes > 1:
            for parameter in self.parameters:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        if not torch.isfinite(norm):
            raise ValueError(
                f"step {self.step}: the gradient is not a number; lower lr {settings.lr}"
            )
        for group in self.optimiser.param_groups:
            group["lr"] = settings.rate(self.step)
        self.optimiser.step()
        line = {
            "step": self.step,
            "loss": _mean([b[0] for b in branches]),
            "full": _figures([b[1] for b in branches]),
            "views": [
                {
                    "budget": view.budget,
                    "policy": view.policy.name,
                    **_figures([b[2][i] for b in branches]),
                }
                for i, view in enumerate(views)
            ],
            "lr": settings.rate(self.step),
            "gradient_norm": float(norm),
            "tokens": tokens_seen * self.processes,
            "seconds": round(time.perf_counter() - began, 4),
        }
        self.step += 1
        return line

    def _read(self, index: int) -> Example:
        """Tokens, teacher target and, where they are needed, features of the ``index``-th window trained
        on, on the device. Beside a GPU the one after it is read meanwhile, from disk and through its
        checksum."""
        device = self.model.device
        known, self._ahead = self._ahead, None
        found = known[1].result() if known and known[0] == index else self._load(index)
        if self.read_ahead:
            self._ahead = index + 1, self._reader.submit(self._load, index + 1)
        tokens, target, features = found
        target = TeacherTarget(target.ids.to(device), target.probs.to(device))
        return tokens.to(device), target, None if features is None else features.to(device)

    def _load(self, index: int) -> Example:
        store, window = self._window(index)
        source = self.stores[store]
        target = source.target(window)
        conditioned = isinstance(self.model, FeatureDecoder)
        return source.tokens(window), target, source.features(window) if conditioned else None

    def _window(self, index: int) -> tuple[int, int]:
        """Store and window of the ``index``-th window trained on: stores in turn by their tokens."""
        source = random.Random(f"store:{self.settings.seed}:{index}")
        store = source.choices(range(len(self.stores)), self.counts)[0]
        return store, window_of(self.settings.seed + store, index, self.counts[store])

    # ---------------------------------------------------------------- a run
    @keeping_freed()
    def run(self, progress: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Train to the end, or until interrupted; a checkpoint is written either way."""
        saved = time.monotonic()
        log = None if self.rank else (self.folder / LOG).open("a", encoding="utf8")
        try:
            while self.step < self.settings.steps:
                line = self.train_step()
                if log is not None:
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                if progress is not None:
                    progress(line)
                if time.monotonic() - saved > 60 * self.minutes:
                    self.save()
                    saved = time.monotonic()
        finally:
            self.save()
            if log is not None:
                log.close()

    def save(self) -> None:
        """Write the checkpoint (one process does)."""
        if self.rank:
            return
        state = {
            "step": self.step,
            "settings": _plain(self.settings),
            "counts": self.counts,
            "model": {k: v for k, v in self.model.state_dict().items() if k != "embedding"},
            "optimiser": self.optimiser.state_dict(),
        }
        with assets.replacing(self.folder / CHECKPOINT) as scratch:
            torch.save(state, scratch)

    def _resume(self) -> None:
        file = self.folder / CHECKPOINT
        if not file.exists():
            return
        try:
            with zipfile.ZipFile(file) as archive:  # torch does not look at the checksums
                if altered := archive.testzip():
                    raise ValueError(f"the checksum of {altered} is another")
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many unrelated types for a damaged file
            raise ValueError(f"{file} is damaged ({error}); remove it to start again") from error
        for name, mine in (("settings", _plain(self.settings)), ("counts", self.counts)):
            if state[name] != mine:
                raise ValueError(
                    f"{self.folder} holds a run with other {name}; choose another folder"
                    f" (found {state[name]}, asked for {mine})"
                )
        self.model.load_state_dict(state["model"], strict=False)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        if self.rank == 0:
            self._trim_log()

    def _trim_log(self) -> None:
        """Drop log lines of steps after the checkpoint: they will be taken again."""
        file = self.folder / LOG
        if file.exists():
            lines = file.read_text(encoding="utf8").splitlines()[: self.step]
            with assets.replacing(file) as scratch:
                scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf8")


def _plain(settings: TrainSettings) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))


def _figures(branches: Sequence[Branch]) -> dict[str, float]:
    return {
        "loss": _mean([b.loss.item() for b in branches]),
        "alpha": _mean([b.alpha for b in branches]),
        "agreement": _mean([b.agreement for b in branches]),
    } | (
        {"deeper": [_mean(list(one)) for one in zip(*(b.deeper for b in branches), strict=True)]}
        if branches[0].deeper
        else {}
    )


def _mean(values: Sequence[float]) -> float:
    return round(math.fsum(values) / len(values), 6)
