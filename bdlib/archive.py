"""Archived measurements, read for instant answers: what the dashboard draws before anything is run.

Two kinds of file in ``data/results`` are read: ``agreement_CONTEXT_TEXT.json`` of
``python -m bdlib agreement``, and the ``results.csv`` of a sweep (``python -m bdlib sweep``), here or
one folder further down, under any name. Teacher-forced agreement is the acceptance of greedy decoding,
alpha that of sampling at temperature 1.

``selections_CONTEXT.json`` holds which positions each drafter's cache keeps
(:func:`record_selections` writes it; run it again when a drafter was trained anew).

:func:`checkpoints` says with which lambda each drafter in ``data/checkpoints`` was trained.

Contract: light to import, reads files only, and a damaged file is one ``ValueError`` that names it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# What tells the results of a sweep from any other table; bdlib.sweeps says what the columns are.
SWEEP = {"regime", "drafter", "policy", "budget", "context", "text", "windows", "by_position"}
SCHEMA = 1


@dataclass(frozen=True)
class Measurement:
    """One archived acceptance.

    Attributes
    ----------
    policy, budget
        Both ``None`` for the full cache.
    acceptance
        Share of drafted tokens accepted, 0 to 1, with its 95 % interval where it has one.
    by_step
        Acceptance of draft step 1, 2, ... given that the steps before were accepted; the last one
        stands for all that follow.
    gamma
        Draft length it was measured at; ``None`` if it holds for any (teacher-forced).
    speedup
        Measured speed over plain decoding, prefill left out, where text was generated.
    """

    text: str
    drafter: str
    policy: str | None
    budget: int | None
    context: int
    temperature: float
    acceptance: float
    low: float | None = None
    high: float | None = None
    samples: int = 1
    by_step: tuple[float, ...] = ()
    gamma: int | None = None
    speedup: float | None = None
    source: str = ""

    def tokens_per_round(self, gamma: int) -> float:
        """Expected tokens of a round, the target's own included: 1 + a1 + a1 a2 + ... (gamma terms)."""
        steps = self.by_step or (self.acceptance,)
        total = reached = 1.0
        for i in range(gamma):
            reached *= steps[min(i, len(steps) - 1)]
            total += reached
        return total


class Archive:
    """Measurements that can be asked for by setting."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self.measurements = list(measurements)
        self._found: dict[tuple[Any, ...], Measurement] = {}
        for m in self.measurements:
            key = (m.text, m.drafter, m.policy, m.budget, m.context, m.temperature, m.gamma)
            if key not in self._found or m.samples >= self._found[key].samples:
                self._found[key] = m

    @classmethod
    def read(cls, paths: Iterable[Path] | None = None) -> Archive:
        """Read the files given, or every archive in ``data/results`` of the checkout."""
        if paths is None:
            folder = results()
            tables = [*sorted(folder.glob("*.csv")), *sorted(folder.glob("*/*.csv"))]
            sweeps = [path for path in tables if set(_header(path)) >= SWEEP]
            paths = [*sorted(folder.glob("agreement_*.json")), *sweeps]
        found: list[Measurement] = []
        for path in map(Path, paths):
            read = _from_csv if path.suffix == ".csv" else _from_agreement
            try:
                found += read(path)
            except (OSError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path.name} is not an archive: {error!r}") from error
        return cls(found)

    def values(self, name: str, **fixed: Any) -> list[Any]:
        """The values that a setting takes in the archive, ascending, ``None`` last.

        ``fixed`` asks only measurements with these settings: ``values("context", text="books")``.
        """
        held = (m for m in self.measurements if all(getattr(m, k) == v for k, v in fixed.items()))
        found = {getattr(m, name) for m in held}
        return [*sorted(v for v in found if v is not None), *([None] if None in found else [])]

    def find(
        self,
        text: str,
        drafter: str,
        policy: str,
        budget: int | None,
        context: int,
        temperature: float,
        gamma: int | None = None,
    ) -> Measurement | None:
        """The measurement of a setting, one at this very ``gamma`` first; ``None`` if there is none.

        Of two of the same setting it is the one with more windows.
        With the full cache (``budget`` ``None``) the policy does not matter, and n-gram lookup has
        neither policy nor budget.
        """
        if budget is None or drafter == "ngram":
            policy = budget = None
        for length in dict.fromkeys((gamma, None)):
            key = (text, drafter, policy, budget, context, temperature, length)
            if key in self._found:
                return self._found[key]
        return None


def results() -> Path:
    """The folder of archived results; it may be missing outside a checkout."""
    from bdlib import assets

    return (assets.checkout() or Path.cwd()) / "data" / "results"


def _from_agreement(path: Path) -> list[Measurement]:
    document = json.loads(path.read_text(encoding="utf8"))
    settings = document["settings"]
    text = path.stem.split("_", 2)[2]
    found = []
    for row in document["summary"]:
        for temperature, name in ((0.0, "agreement"), (1.0, "alpha")):
            value = row[name]
            found.append(
                Measurement(
                    text=text,
                    drafter=row["drafter"],
                    policy=row["policy"],
                    budget=row["budget"],
                    context=settings["context"],
                    temperature=temperature,
                    acceptance=_share(value["mean"]),
                    low=value["low"],
                    high=value["high"],
                    samples=value["n"],
                    by_step=tuple(row["by_step"]) if temperature == 0 else (value["mean"],),
                    source=path.name,
                )
            )
    return found


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf8", newline="") as stream:
        return next(csv.reader(stream), [])


def _from_csv(path: Path) -> list[Measurement]:
    """Rows of a sweep's results, but for cells that select again or choose gamma while they decode.

    What was generated is a kind of text of its own (``"books, continued"``, ``"books, chat"``), and so
    is what went in loops.
    """
    missing = SWEEP - set(_header(path))
    if missing:
        raise ValueError(f"columns {', '.join(sorted(missing))} are missing")
    found = []
    with path.open(encoding="utf8", newline="") as stream:
        for row in csv.DictReader(stream):
            if row.get("refresh") or row.get("controller") == "true":
                continue
            forced = row["regime"] == "teacher-forced"
            made = "" if forced else ", chat" if row["regime"] == "chat" else ", continued"
            if row.get("looping") == "true":
                made += " in loops"
            names = {"agreement": 0.0, "alpha": 1.0} if forced else {"acceptance_rate": None}
            full = row["policy"] == "full"
            for name, temperature in names.items():
                if not row[name]:
                    continue
                steps = tuple(map(float, row["by_position"].split()))
                found.append(
                    Measurement(
                        text=row["text"] + made,
                        drafter=row["drafter"],
                        policy=None if full else row["policy"] or None,
                        budget=int(row["budget"]) if row["budget"] and not full else None,
                        context=int(row["context"]),
                        temperature=float(row["temperature"])
                        if temperature is None
                        else temperature,
                        acceptance=_share(float(row[name])),
                        low=_number(row.get(f"{name}_low")),
                        high=_number(row.get(f"{name}_high")),
                        samples=int(row["windows"]),
                        by_step=() if name == "alpha" else steps,
                        gamma=int(row["gamma"]) if row.get("gamma") else None,
                        speedup=_number(row.get("speedup_decode")),
                        source=path.name,
                    )
                )
    return found


def _number(field: str | None) -> float | None:
    return float(field) if field else None


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"acceptance {value} must be in [0, 1]")
    return value


# ------------------------------------------------------------------- checkpoints and lambda
@dataclass(frozen=True)
class Trained:
    """How a drafter was trained, from its ``drafter.json``.

    Attributes
    ----------
    weight
        Lambda, the weight of the sparse loss (:class:`bdlib.objectives.Objective`); ``None`` where
        the file does not say.
    alike
        The same text for drafters that were trained alike in everything but lambda.
    """

    name: str
    weight: float | None
    alike: str


def checkpoints(folder: Path | None = None) -> dict[str, Trained]:
    """The trained drafters of a folder by name; of ``data/checkpoints`` if not given."""
    from bdlib import models

    folder = results().parent / "checkpoints" if folder is None else Path(folder)
    found = {}
    for path in sorted(folder.glob(f"*/{models.CONFIG_FILE}")):
        try:
            document = json.loads(path.read_text(encoding="utf8"))
            made = document.get("provenance", {})
            settings = dict(made.get("settings", {}))
            objective = dict(settings.pop("objective", {}))
            weight = objective.pop("weight", None)
            settings.pop("views", None)  # a lambda of 0 has no use for sparse views
            rest = {name: document.get(name) for name in ("kind", "taps", "config")}
            rest |= {name: made.get(name) for name in ("windows", "corpus")}
            alike = json.dumps([rest, settings, objective], sort_keys=True)
            weight = None if weight is None else float(weight)
        except (OSError, AttributeError, TypeError, ValueError) as error:
            name = f"{path.parent.name}/{path.name}"
            raise ValueError(f"{name} is not a drafter's: {error!r}") from error
        found[path.parent.name] = Trained(path.parent.name, weight, alike)
    return found


def by_weight(name: str, trained: Mapping[str, Trained]) -> dict[float, str]:
    """The drafters that differ from one in lambda alone, itself among them: names by lambda."""
    own = trained.get(name)
    if own is None or own.weight is None:
        return {}
    found = {
        other.weight: other.name
        for other in trained.values()
        if other.alike == own.alike and other.weight is not None
    }
    return dict(sorted((found | {own.weight: name}).items()))


# ------------------------------------------------------------------------ bytes and speed
@dataclass(frozen=True)
class Costs:
    """Bytes that one step reads: the weights once, and keys and values for each cache entry."""

    target_weights: int
    target_entry: int
    drafter_weights: int
    drafter_entry: int

    def drafter_kv(self, budget: int | None, context: int) -> int:
        """Bytes of keys and values that a draft step reads."""
        return self.drafter_entry * (context if budget is None else min(budget, context))

    def speedup(self, tokens: float, gamma: int, budget: int | None, context: int) -> float:
        """Speed over plain decoding if reading bytes were all that takes time.

        ``tokens`` is the expected number a round. One verification then costs one plain step, and a
        draft step the ratio of the two models' bytes. An estimate: real steps cost more than bytes,
        a small model's most of all, because starting work costs the same for any size.
        """
        step = self.target_weights + self.target_entry * context
        draft = self.drafter_weights + self.drafter_kv(budget, context)
        return tokens / (gamma * draft / step + 1)


def costs(drafter: str) -> Costs:
    """Bytes of the embedded target and a drafter: a shipped one, ``"self"`` or ``"ngram"``.

    Only the headers of the weight files are read. Two bytes an element (bfloat16).
    """
    from bdlib import assets, models

    folder = assets.model_folder("smollm2")
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    target = _matrix_bytes(folder / "model.safetensors", config), _entry_bytes(config)
    if drafter == "self":
        return Costs(*target, *target)
    if drafter == "ngram":
        return Costs(*target, 0, 0)
    folder = models.checkpoint(drafter)
    config = json.loads((folder / models.CONFIG_FILE).read_text(encoding="utf8"))["config"]
    own = _matrix_bytes(folder / models.WEIGHTS_FILE, config), _entry_bytes(config)
    return Costs(*target, *own)


def _entry_bytes(config: dict[str, Any]) -> int:
    heads, dim = config["num_attention_heads"], config.get("head_dim")
    dim = dim or config["hidden_size"] // heads
    return 4 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * dim


def _matrix_bytes(path: Path, config: dict[str, Any]) -> int:
    """Bytes of every matrix that a step reads; of a tied embedding and head, one."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    shapes = {
        name: entry["shape"]
        for name, entry in header.items()
        if name != "__metadata__"
        and len(entry["shape"]) == 2
        # Not the rows' scales of eight-bit weights, not norms of several layers at once.
        and 1 not in entry["shape"]
        and not name.endswith("norm")
    }
    head = any("head" in name for name in shapes)
    total = sum(rows * columns for name, (rows, columns) in shapes.items() if "embed" not in name)
    return 2 * (total + (0 if head else config["vocab_size"] * config["hidden_size"]))


# --------------------------------------------------------------------- what caches hold
@dataclass(frozen=True)
class Selections:
    """Shares of layers and KV heads that hold a stretch of the context, by drafter, policy, budget."""

    context: int
    text: str
    maps: dict[tuple[str, str, int], tuple[float, ...]]

    @classmethod
    def read_all(cls) -> dict[int, Selections]:
        """What is recorded in ``data/results``, by context, ascending."""
        found = [cls.read(path) for path in results().glob("selections_*.json")]
        return {one.context: one for one in sorted(found, key=lambda one: one.context)}

    @classmethod
    def read(cls, path: Path) -> Selections:
        """Read a file of :func:`record_selections`."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf8"))
            maps = {
                (row["drafter"], row["policy"], row["budget"]): tuple(
                    int(percent) / 100 for percent in row["percent"].split()
                )
                for row in document["maps"]
            }
            return cls(document["context"], document["text"], maps)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{Path(path).name} is not an archive: {error!r}") from error


def shares(positions: Sequence[torch.Tensor], length: int, bins: int = 128) -> list[float]:
    """Share of each of ``bins`` stretches of a context that is held, mean over layers and heads.

    ``positions`` are those of each layer, ``[1, H_kv, size]``; those beyond ``length`` are not counted.
    """
    import torch

    held = torch.zeros(length)
    heads = sum(p.shape[1] for p in positions)
    for layer in positions:
        inside = layer.flatten().cpu()
        inside = inside[inside < length]
        held.index_add_(0, inside, torch.ones(len(inside)))
    edges = torch.linspace(0, length, bins + 1).round().long()
    total = torch.cat((torch.zeros(1), held.cumsum(0)))
    width = (edges[1:] - edges[:-1]).clamp(min=1)
    return ((total[edges[1:]] - total[edges[:-1]]) / width / heads).tolist()


def record_selections(
    path: Path | None = None,
    drafters: Sequence[str] = ("budgetdraft", "budgetdraft-feature-gpu", "self"),
    policies: Sequence[str] = (
        "chunk_topk_recent",
        "sink_window",
        "chunk_topk",
        "snapkv",
        "heavy_hitter",
        "random",
    ),
    budgets: Sequence[int] = (128, 256, 512, 1024, 2048),
    context: int = 4096,
) -> Path:
    """Record which positions of one held-out text each drafter's cache would hold; returns the file.

    Rows of other drafters that the file holds already stay. The target itself takes longest.
    """
    import torch

    from bdlib import corpora, measure, models, pairs
    from bdlib.drafters import ModelDrafter, SelfDrafter, prefill
    from bdlib.selection import make_policy

    pair = pairs.load_pair("smollm2", context=context)
    book = corpora.embedded("held-out")[0]
    prompt = corpora.window(pair.tokenizer, book, context).to(pair.device)
    caches: dict[Any, Any] = {}
    rows = []
    for name in drafters:
        model = (
            None if name == "self" else models.load_drafter(models.checkpoint(name), pair.target)
        )
        for policy in map(make_policy, policies):
            for budget in budgets:
                if model is None:
                    drafter = SelfDrafter(pair.target, policy, budget)
                else:
                    drafter = ModelDrafter(model, policy, budget)
                watched = drafter.observe
                key = drafter.taps, watched and (watched.observe, watched.observed_queries)
                if key not in caches:
                    caches[key] = prefill(
                        pair.target, prompt, context, drafter.observe, taps=drafter.taps
                    )
                with torch.inference_mode():
                    drafter.start(prompt, caches[key], context)
                    drafter.select(0)
                    layers = range(drafter.cache.config.num_layers)
                    held = [drafter.cache.positions(layer) for layer in layers]
                percent = " ".join(f"{100 * share:.0f}" for share in shares(held, context - 1))
                rows.append(
                    {"drafter": name, "policy": policy.name, "budget": budget, "percent": percent}
                )
    path = results() / f"selections_{context}.json" if path is None else Path(path)
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf8"))
        if (stored["context"], stored["text"]) == (context, book.name):
            rows = [row for row in stored["maps"] if row["drafter"] not in drafters] + rows
    document = {"schema": SCHEMA, "context": context, "text": book.name, "maps": rows}
    measure.write_json(path, document | measure.provenance())
    return path
