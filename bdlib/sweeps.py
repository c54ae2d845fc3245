"""Sweeps: a grid of measurements as a TOML file, run cell by cell, resumable, on any executor.

A grid names values for each axis (:data:`AXES`); every combination is a *point*. A point on one window
of text is a *cell*, the unit of work: it is measured by :mod:`bdlib.measure` (text is generated) or
:mod:`bdlib.forced` (teacher-forced) and kept as one file, so a sweep that is stopped, even killed, loses
the cell in hand and goes on from there. A cell's name is a digest of all that decides it, tokens and
drafter weights included: what changes is measured again, and nothing else.

Cells on the same window make one job. The target reads the window once for all of them, and plain
decoding takes turns with speculative decoding on that same cache. Jobs go through the windows in turn,
so a sweep that is stopped early has seen the whole grid on fewer windows, and the time left is a fair
guess. A process loads a pair and a drafter once.

Contract: the whole grid, its texts and its drafters are checked before any work starts; results of
another :data:`SCHEMA` are refused; no cell is kept that breaks ``tokens per round <= 1 + gamma *
acceptance``. :func:`load` reads the results; their columns are in :data:`COLUMNS`.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bdlib import assets, corpora, measure

if TYPE_CHECKING:
    from bdlib.pairs import Pair
    from bdlib.transformer import Decoder

SCHEMA = 2
REGIMES = {
    "teacher-forced": "agreement along given text; nothing is generated",
    "sampling": "plain text is continued, at a temperature above 0",
    "greedy": "plain text is continued, greedily (a small target soon loops)",
    "chat": "a summary of the passage is asked for; stop tokens end the output",
}
LOOPING = 0.5
"""Output with ``distinct_2`` below this is a loop; loops are rows of their own in the results."""


# -------------------------------------------------------------------------- grids


class Axis(NamedTuple):
    """What an axis may hold: its default (``...``: must be given), in words, and a test."""

    default: Any
    allowed: str
    valid: Callable[[Any], bool]


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least


def _policies() -> dict[str, Any]:
    from bdlib.selection import POLICIES

    return POLICIES


def _name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _temperature(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < float("inf")


AXES = {
    "regime": Axis(..., f"one of {', '.join(REGIMES)}", lambda v: _name(v) and v in REGIMES),
    "drafter": Axis(
        ...,
        f"self, ngram, a shipped drafter or the folder of one, with {measure.COPIES} or not",
        _name,
    ),
    "context": Axis(..., "a whole number of at least 2 tokens", _whole(2)),
    "text": Axis(..., "embedded:held-out, or a file or folder of texts", _name),
    "policy": Axis("chunk_topk_recent", "", lambda v: _name(v) and v in _policies()),
    "budget": Axis(
        256, 'a whole number of at least 1 entry, or "full"', lambda v: v == "full" or _whole(1)(v)
    ),
    "gamma": Axis(4, "a whole number of at least 1 token", _whole(1)),
    "controller": Axis(
        False, "true (it drafts up to gamma tokens, or none) or false", lambda v: isinstance(v, bool)
    ),
    "temperature": Axis(None, "a number of at least 0", _temperature),
    "refresh": Axis(
        "never", 'a whole number of at least 1 round, or "never"', lambda v: v == "never" or _whole(1)(v)
    ),
}  # fmt: skip
"""The axes: one value or a list of them. With a controller (:mod:`bdlib.controllers`) gamma is the most
that it may draft. Temperature is 0.7 if unset when sampling, else 0."""

SETTINGS = {
    "samples": Axis(4, "a whole number of at least 1 window", _whole(1)),
    "within": Axis(
        None, "the largest context, a whole number of tokens", lambda v: v is None or _whole(2)(v)
    ),
    "new_tokens": Axis(64, "a whole number of at least 1 token", _whole(1)),
    "positions": Axis(256, "a whole number of at least 1 position", _whole(1)),
    "block": Axis(64, "a whole number of at least 1 position", _whole(1)),
    "repeats": Axis(1, "a whole number of at least 1 run", _whole(1)),
    "seed": Axis(0, "a whole number of at least 0", _whole(0)),
}
"""One value for a whole grid or a table of it; ``positions`` and ``block`` as in bdlib.forced,
``within`` as in :class:`bdlib.measure.MeasureSettings`."""

PLACE = {"pair": "smollm2", "dtype": "auto", "device": "auto"}


@dataclass(frozen=True)
class Point:
    """One combination of values; ``None`` where the regime or the drafter has no use for one.

    ``policy`` is ``"full"`` and ``budget`` is ``None`` for a drafter with its full cache.
    """

    regime: str
    drafter: str
    policy: str | None
    budget: int | None
    context: int
    gamma: int | None
    text: str
    temperature: float | None
    refresh: int | None
    samples: int
    new_tokens: int | None
    positions: int | None
    block: int | None
    repeats: int | None
    seed: int
    controller: bool | None = False
    within: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Point:
        """A point of the values of all axes and settings; checks what one axis cannot know alone.

        Raises
        ------
        ValueError
            Names the value and what is allowed.
        """
        v = dict(values)
        if v["budget"] == "full" or v["policy"] == "full":
            v |= {"policy": "full", "budget": None}
        if v["refresh"] == "never":
            v["refresh"] = None
        if v["regime"] == "teacher-forced":
            if v["drafter"] == "ngram":
                raise ValueError(
                    "drafter 'ngram' has no place in regime 'teacher-forced': its agreement is in"
                    " the column ngram_agreement of every row"
                )
            if v["drafter"].endswith(measure.COPIES):
                raise ValueError(
                    f"drafter {v['drafter']!r} in regime 'teacher-forced' must do without"
                    f" {measure.COPIES}: copies are for text that is generated"
                )
            measure.check_within(v["within"], v["context"])
            v |= dict.fromkeys(("gamma", "temperature", "refresh", "new_tokens", "repeats"))
            v["controller"] = None
            point = cls(**v)
            point.forced()
            return point
        v |= {"positions": None, "block": None}
        if v["drafter"] == "ngram":
            v |= {"policy": None, "budget": None, "refresh": None}
        if v["temperature"] is None:
            v["temperature"] = 0.7 if v["regime"] == "sampling" else 0.0
        v["temperature"] = float(v["temperature"])
        if v["regime"] == "sampling" and not v["temperature"]:
            raise ValueError("temperature 0 in regime 'sampling' must be above 0; see 'greedy'")
        if v["regime"] == "greedy" and v["temperature"]:
            raise ValueError(
                f"temperature {v['temperature']} in regime 'greedy' must be 0; see 'sampling'"
            )
        point = cls(**v)
        point.measured(PLACE)
        return point

    def forced(self) -> Any:
        """The :class:`bdlib.forced.ForcedSettings` of a teacher-forced point."""
        from bdlib.forced import ForcedSettings

        return ForcedSettings(
            drafters=(self.drafter,),
            policies=(self.policy,),
            budgets=(self.budget or 0,),
            context=self.context,
            positions=self.positions,
            block=self.block,
            draft_steps=min(4, self.block),
            samples=self.samples,
            seed=self.seed,
        )

    def measured(self, place: Mapping[str, str]) -> measure.MeasureSettings:
        """The :class:`bdlib.measure.MeasureSettings` of a point that generates text."""
        return measure.MeasureSettings(
            **place,
            drafter=self.drafter,
            policy=self.policy or "full",
            budget=self.budget or self.context,
            context=self.context,
            gamma=self.gamma,
            controller=bool(self.controller),
            text=self.text,
            samples=self.samples,
            within=self.within,
            new_tokens=self.new_tokens,
            refresh=self.refresh,
            temperature=self.temperature,
            seed=self.seed,
            chat=self.regime == "chat",
            repeats=self.repeats,
        )


@dataclass(frozen=True)
class Grid:
    """A checked grid.

    Attributes
    ----------
    folders
        Where texts and drafters that are named by a relative path are looked for, in this order.
    """

    name: str
    title: str
    place: dict[str, str]
    points: tuple[Point, ...]
    document: dict[str, Any]
    folders: tuple[Path, ...] = ()


def read(path: str | os.PathLike[str], folders: Sequence[str | os.PathLike[str]] = ()) -> Grid:
    """Read a grid from a TOML file.

    Parameters
    ----------
    folders
        Where the texts and drafters lie that it names; the grid's own folder comes last.

    Raises
    ------
    ValueError
        One line that names the file, the value that is wrong and what is allowed.
    """
    path = Path(path).expanduser()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no grid at {path}") from None
    except OSError as error:
        raise ValueError(f"grid {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not TOML: {error}") from error
    return parse(document, path.name, (*folders, path.parent))


def parse(
    document: Mapping[str, Any],
    name: str = "grid",
    folders: Sequence[str | os.PathLike[str]] = (),
) -> Grid:
    """Check a grid that is read already, for example ``{"grid": [{"regime": "greedy", ...}]}``."""
    allowed = ("title", *PLACE, *SETTINGS, "grid")
    for key in document:
        if key not in allowed:
            hint = f"; axes go in a table [[grid]]: {', '.join(AXES)}" if key in AXES else ""
            raise ValueError(f"{name}: unknown key {key!r}; allowed: {', '.join(allowed)}{hint}")
    for key in ("title", *PLACE):
        if key in document and not _name(document[key]):
            raise ValueError(f"{name}: {key} {document[key]!r} must be a text")
    shared = {key: _setting(key, document, name) for key in SETTINGS}
    tables = document.get("grid")
    if (
        not isinstance(tables, list)
        or not tables
        or not all(isinstance(t, Mapping) for t in tables)
    ):
        raise ValueError(f"{name}: needs at least one table [[grid]] with the axes' values")
    points: dict[Point, None] = {}
    for number, table in enumerate(tables, start=1):
        points |= dict.fromkeys(_points(table, shared, f"{name}, table {number}"))
    place = {key: document.get(key, default) for key, default in PLACE.items()}
    where = tuple(Path(folder).expanduser() for folder in folders)
    return Grid(name, document.get("title", name), place, tuple(points), dict(document), where)


def _setting(key: str, table: Mapping[str, Any], name: str, default: Any = None) -> Any:
    axis = SETTINGS[key]
    value = table.get(key, axis.default if default is None else default)
    if not axis.valid(value):
        raise ValueError(f"{name}: {key} {value!r} must be {axis.allowed}")
    return value


def _points(table: Mapping[str, Any], shared: Mapping[str, Any], name: str) -> Iterator[Point]:
    for key in table:
        if key not in AXES and key not in SETTINGS:
            allowed = f"axes {', '.join(AXES)}; settings {', '.join(SETTINGS)}"
            raise ValueError(f"{name}: unknown axis {key!r}; allowed: {allowed}")
    settings = {key: _setting(key, table, name, shared[key]) for key in SETTINGS}
    values = []
    for key, axis in AXES.items():
        given = table.get(key, axis.default)
        if given is ...:
            raise ValueError(f"{name}: axis {key!r} is missing; it must be {axis.allowed}")
        listed = given if isinstance(given, list) else [given]
        if not listed:
            raise ValueError(f"{name}: axis {key!r} has no value; it must be {axis.allowed}")
        for value in listed:
            if key in table and not axis.valid(value):
                allowed = axis.allowed or f"one of {', '.join(_policies())}"
                raise ValueError(f"{name}: {key} {value!r} must be {allowed}")
        values.append(listed)
    for combination in itertools.product(*values):
        try:
            yield Point.of(dict(zip(AXES, combination, strict=True)) | settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


# -------------------------------------------------------------------------- from a grid to jobs


@dataclass(frozen=True)
class Source:
    """A drafter: where it lies (``None`` for self and ngram) and a digest of its files."""

    path: str | None
    digest: str | None


@dataclass(frozen=True)
class Job:
    """One prompt and the points measured on it.

    Attributes
    ----------
    place
        Pair, number type and device, as items.
    reach
        Context that the target has to be stretched to; ``None`` if its own positions do.
    cells
        Name, point and drafter of each cell.
    """

    place: tuple[tuple[str, str], ...]
    reach: int | None
    document: str
    offset: int
    sample: int
    prompt: tuple[int, ...]
    cells: tuple[tuple[str, Point, Source], ...]


@dataclass(frozen=True)
class Plan:
    """What a grid comes to: jobs in the order they are done, and what they read."""

    grid: Grid
    jobs: tuple[Job, ...]
    drafters: dict[str, str | None]
    texts: dict[str, int]

    @property
    def cells(self) -> set[str]:
        """The names of all cells; a cell that two tables of the grid name is one."""
        return {key for job in self.jobs for key, *_ in job.cells}


class _Remembering:
    """A tokenizer that encodes a text once; several contexts are cut from the same texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._known = tokenizer, {}

    def __call__(self, text: str, **settings: Any) -> Any:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, **settings)
        return self._known[text]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def plan(grid: Grid) -> Plan:
    """Load what the grid names, cut its windows, and refuse what could not be measured.

    Raises
    ------
    ValueError
        For a pair, drafter, text or context that does not serve; names the value.
    """
    place = tuple(grid.place.items())
    sources = {p.drafter: None for p in grid.points}
    sources = {name: _source(name, grid) for name in sources}
    texts = {name: _texts(name, grid) for name in dict.fromkeys(p.text for p in grid.points)}
    pair = _pair(place, None)
    positions = pair.target.config.max_positions
    longest = max(p.context for p in grid.points)
    reach = None if longest <= positions else longest
    if reach is not None:
        pair = _pair(place, reach)
    for source in sources.values():
        if source.path is not None:
            _model(source, place, reach)
    target = _digest(Path(grid.place["pair"])) if Path(grid.place["pair"]).is_dir() else None
    tokenizer = _Remembering(pair.tokenizer)
    groups: dict[tuple, list[Point]] = {}
    for p in grid.points:
        forced = p.regime == "teacher-forced"
        asked = (p.new_tokens, p.regime == "chat", p.within)
        groups.setdefault((p.text, p.context, p.samples, p.seed, forced, *asked), []).append(p)
    turns: list[tuple[int, int, Job]] = []
    for number, ((text, context, samples, seed, forced, *_), points) in enumerate(groups.items()):
        try:
            if forced:
                within = points[0].within
                cut = corpora.windows(tokenizer, texts[text], context, samples, seed, within)
            else:
                cut = measure._prompts(points[0].measured(grid.place), tokenizer, texts[text])
        except ValueError as error:
            raise ValueError(f"{grid.name}: text {text!r}, context {context}: {error}") from error
        for sample, (document, offset, prompt) in enumerate(cut):
            tokens = tuple(prompt.tolist())
            beyond = reach if context > positions else None
            cells = []
            for point in points:
                source = sources[point.drafter]
                decides = [SCHEMA, place, target, beyond, sample, tokens, source.digest]
                # How the window was cut is told by its tokens.
                told = asdict(replace(point, samples=1))
                del told["within"]
                cells.append((_key([*decides, told]), point, source))
            job = Job(place, beyond, document.name, offset, sample, tokens, tuple(cells))
            turns.append((sample, number, job))
    turns.sort(key=lambda turn: turn[:2])
    digests = {name: source.digest for name, source in sources.items()}
    counts = {name: len(documents) for name, documents in texts.items()}
    return Plan(grid, tuple(job for *_, job in turns), digests, counts)


def _key(decides: list[Any]) -> str:
    text = json.dumps(decides, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _digest(folder: Path) -> str:
    """A digest of a model's files: results of one drafter are never taken for another's."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        total.update(file.name.encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:16]


def _source(name: str, grid: Grid) -> Source:
    from bdlib import models, recipes

    name = name.removesuffix(measure.COPIES)
    if name in measure.DRAFTERS:
        return Source(None, None)
    wanted = (models.CONFIG_FILE, "config.json")
    candidates = [folder / name for folder in (*grid.folders, Path())]
    root = assets.checkout()
    if root is not None:
        candidates.append(root / models.SHIPPED / name)
    for candidate in candidates:
        for folder in (candidate, candidate / recipes.SAVED):
            if any((folder / file).is_file() for file in wanted):
                return Source(str(folder.resolve()), _digest(folder))
    shipped = [] if root is None else (root / models.SHIPPED).glob(f"*/{models.CONFIG_FILE}")
    names = [*measure.DRAFTERS, *sorted(path.parent.name for path in shipped)]
    raise ValueError(
        f"{grid.name}: unknown drafter {name!r}; allowed: {', '.join(names)}, or a drafter's folder"
        " (with --drafters, one in that folder)"
    )


def _texts(name: str, grid: Grid) -> list[corpora.Document]:
    found = name
    if not name.startswith("embedded:"):
        tried = [
            f / (name + end) for f in (*grid.folders, Path()) for end in ("", ".txt", ".jsonl")
        ]
        found = next((path for path in tried if path.exists()), None)
        if found is None:
            raise ValueError(
                f"{grid.name}: no text {name!r}; allowed: embedded:train, embedded:held-out,"
                " embedded:all, embedded:NAME, or a file or folder of texts"
                " (with --texts, one in that folder)"
            )
    try:
        return corpora.load_texts(found)
    except ValueError as error:
        raise ValueError(f"{grid.name}: text {name!r}: {error}") from error


# -------------------------------------------------------------------------- doing the work


def _load(place: tuple[tuple[str, str], ...], reach: int | None, drafter: str) -> Pair:
    """The pair for contexts up to ``reach``; ``None`` leaves the target's positions as they are."""
    asked = {"policy": "full", "new_tokens": 1, "context": reach or 2, "drafter": drafter}
    return measure.load(measure.MeasureSettings(**dict(place), **asked))


@functools.lru_cache(maxsize=2)
def _pair(place: tuple[tuple[str, str], ...], reach: int | None) -> Pair:
    return _load(place, reach, "self")


@functools.lru_cache(maxsize=16)
def _model(source: Source, place: tuple[tuple[str, str], ...], reach: int | None) -> Decoder:
    from bdlib import models

    if (Path(source.path) / models.CONFIG_FILE).is_file():
        return models.load_drafter(source.path, _pair(place, reach).target)
    return _load(place, reach, source.path).drafter


@functools.cache
def _here() -> dict[str, Any]:
    return measure.provenance()


@functools.cache
def _bandwidth(device: str) -> float:
    """Bytes a second that this process reads, measured once."""
    import torch

    from bdlib import bench

    return bench._bandwidth(torch.device(device))["median"]


_ALONE = threading.Lock()
_warm: set[tuple] = set()


def work(job: Job, folder: str | None = None, wanted: Sequence[str] | None = None) -> list[dict]:
    """Measure the cells of a job (only those ``wanted``); each is kept in ``folder`` when done.

    This is what an executor runs. A folder that this machine does not have is passed over: who
    submitted the job keeps its cells then. One job at a time runs in a process.
    """
    with _ALONE:
        return [_keep(record, folder) for record in _measured(job, wanted)]


def _measured(job: Job, wanted: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    cells = [cell for cell in job.cells if wanted is None or cell[0] in wanted]
    if not cells:
        return
    pair = _pair(job.place, job.reach)
    forced = cells[0][1].regime == "teacher-forced"
    for key, point, found in (_forced if forced else _generated)(job, pair, cells):
        yield {
            "schema": SCHEMA,
            "key": key,
            "point": asdict(point),
            "sample": job.sample,
            "document": job.document,
            "offset": job.offset,
            "prompt_tokens": len(job.prompt),
            "scaling": pair.scaling,
            "dtype": str(pair.dtype).removeprefix("torch."),
            "device": pair.device.type,
            **found,
            **_here(),
        }


def _forced(job: Job, pair: Pair, cells: Sequence[tuple]) -> Iterator[tuple]:
    import torch

    from bdlib import forced

    window = torch.tensor(job.prompt)
    alike: dict[tuple, dict[str, list]] = {}
    for key, point, source in cells:
        drafters = alike.setdefault((point.positions, point.block), {})
        drafters.setdefault(point.drafter, []).append((key, point, source))
    for (positions, block), drafters in alike.items():
        models = {name: _decoder(same[0][2], job, pair) for name, same in drafters.items()}
        views = {
            name: [point.forced().views()[0] for _, point, _ in same]
            for name, same in drafters.items()
        }
        steps = min(4, block)
        rows = forced.walk(pair.target, models, window, views, positions, block, steps)
        for (key, point, _), row in zip(
            itertools.chain.from_iterable(drafters.values()), rows, strict=True
        ):
            names = ("agreement", "alpha", "ngram_agreement")
            yield key, point, {n: row[n] for n in names} | {"by_position": row["by_step"]}


def _decoder(source: Source, job: Job, pair: Pair) -> Decoder:
    return pair.target if source.path is None else _model(source, job.place, job.reach)


def _generated(job: Job, pair: Pair, cells: Sequence[tuple]) -> Iterator[tuple]:
    import torch

    prompt = torch.tensor(job.prompt)
    alike: dict[Any, list[tuple]] = {}
    for key, point, source in cells:
        settings = point.measured(dict(job.place))
        own = replace(pair, drafter=None if source.path is None else _decoder(source, job, pair))
        drafter = measure.make_drafter(settings, own)
        observe = drafter.observe
        needs = drafter.taps, None if observe is None or observe.observe == "none" else observe
        alike.setdefault(needs, []).append((key, point, source, settings, own, drafter))
    bandwidth = _bandwidth(str(pair.device))
    weights = pair.target.weight_bytes()
    for same in alike.values():
        filled = None
        while same:
            key, point, source, settings, own, drafter = same.pop(0)
            kind = (
                job.place,
                job.reach,
                source,
                replace(point, text="", samples=1, within=None, seed=0),
            )
            if kind not in _warm:
                measure._warm_up(settings, own, drafter, prompt)
                _warm.add(kind)
            if filled is None:
                filled = measure.fill(pair, drafter, prompt.to(pair.device), point.context)
            record = measure._sample(settings, own, drafter, prompt, job.sample, filled)
            measure.check_bound(record)
            kept = {name: record[name] for name in _FROM_MEASURE}
            kept |= {f"{phase}_seconds": s for phase, s in record["seconds"].items()}
            kept["divergence_list"] = record["divergence_list"]
            cache = pair.target.config.kv_bytes(point.context, pair.target.dtype)
            kept["ar_of_floor"] = record["ar_tokens_per_second"] * (weights + cache) / bandwidth
            yield key, point, kept


def _keep(record: dict[str, Any], folder: str | None) -> dict[str, Any]:
    if folder is not None and Path(folder).is_dir():
        measure.write_json(Path(folder) / f"{record['key']}.json", record)
    return record


def pool(workers: int) -> ProcessPoolExecutor:
    """Processes of this machine that share its cores; they end with the process that made them.

    Speeds measured side by side disturb each other: use one worker for those.

    Raises
    ------
    ValueError
        If ``workers`` is not at least 1.
    """
    measure._whole("workers", workers, 1)
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # a fork may inherit torch's locks
        initializer=_begin,
        initargs=(max(1, (os.cpu_count() or 1) // workers),),
    )


def _begin(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)  # killed, it could not tell us

    threading.Thread(target=follow, daemon=True).start()


def run(
    grid: Grid,
    out: str | os.PathLike[str],
    executor: Executor | None = None,
    progress: bool = True,
    command: str = "bdlib.sweeps.run",
) -> list[dict[str, Any]]:
    """Measure a grid, or what is left of it, into a folder; returns the rows of ``results.csv``.

    ``out`` gets ``cells/`` (a file a cell), ``results.csv`` (a row a point: means, medians and
    intervals over documents), ``records.csv`` (a row a cell), and a JSON sidecar beside each table.

    Parameters
    ----------
    executor
        Where jobs run: anything with the interface of :class:`concurrent.futures.Executor`, for
        example :func:`pool`, or a Dask cluster's ``Client.get_executor()``. ``None``: here.
    command
        What the sidecar gives as the origin of the results.

    Raises
    ------
    ValueError
        For a grid that cannot be measured (see :func:`plan`), a folder that holds results of another
        schema or that another sweep is writing to.
    """
    import filelock

    out = Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"cannot write into {out}: it is there already and is not a folder")
    _check_schema(out / "results.json")
    planned = plan(grid)
    cells = out / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"another sweep is writing to {out}") from None
    try:
        for scratch in cells.glob(".*.writing"):  # of a sweep that was killed
            scratch.unlink()
        try:
            _carry_out(planned, cells, executor, progress)
        finally:
            rows = _collect(planned, out, command)
    finally:
        lock.release()
    return rows


def _done(cells: Path) -> set[str]:
    return {name[:-5] for name in os.listdir(cells) if name.endswith(".json")}


def _carry_out(planned: Plan, cells: Path, executor: Executor | None, progress: bool) -> None:
    from tqdm import tqdm

    there = {key for key in _done(cells) if _read_cell(cells / f"{key}.json") is not None}
    names = planned.cells
    left = [(job, [k for k, *_ in job.cells if k not in there]) for job in planned.jobs]
    left = [(job, keys) for job, keys in left if keys]
    with tqdm(
        total=len(names),
        initial=len(names & there),
        unit="cell",
        smoothing=0,
        file=sys.stderr,
        disable=not progress,
    ) as bar:
        if executor is None:
            for job, keys in left:
                with _ALONE:
                    for record in _measured(job, keys):
                        _keep(record, str(cells))
                        bar.update()
            return
        pending = {executor.submit(work, job, str(cells.resolve()), keys) for job, keys in left}
        try:
            while pending:
                finished, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for future in finished:
                    for record in future.result():
                        if not (cells / f"{record['key']}.json").is_file():  # kept elsewhere
                            _keep(record, str(cells))
                bar.update(len(names & _done(cells)) - bar.n)
        finally:
            for future in pending:
                future.cancel()


# -------------------------------------------------------------------------- results


MEANS = (*measure.MEANS, "agreement", "alpha", "ngram_agreement")
MEDIANS = (*measure.MEDIANS, "ar_of_floor")
TOTALS = (
    *measure.TOTALS,
    "prefill_seconds",
    "drafter_prefill_seconds",
    "draft_seconds",
    "select_seconds",
    "verify_seconds",
    "ar_decode_seconds",
)
LARGEST = measure.LARGEST
ALL = ("identical", "near_ties_only")
_FROM_MEASURE = (
    *measure.MEANS, *measure.MEDIANS, *measure.TOTALS, *LARGEST, *ALL,
    "drafter_prefill_seconds", "ar_decode_seconds", "by_position", "stopped",
)  # fmt: skip
_AXIS_COLUMNS = {
    "regime": "how the drafter was measured: " + "; ".join(f"{k}: {v}" for k, v in REGIMES.items()),
    "drafter": "self, ngram, or the drafter's name",
    "policy": "what the drafter's cache keeps; full: everything; empty without a cache",
    "budget": "entries kept per layer and KV head; empty for the full cache, and without one",
    "context": "tokens of prompt and output together; teacher-forced: of the window",
    "gamma": "most tokens drafted in a round",
    "controller": measure.FIELDS["controller"],
    "text": "the kind of text",
    "temperature": "0 is greedy",
    "refresh": "rounds between selections; empty: selected once, after the prompt",
    "seed": "chooses the windows, and with the window's number what sampling draws",
    "looping": f"whether distinct_2 of the output is below {LOOPING}; loops are rows of their own",
}
_MEASURE_COLUMNS = {
    **{name: measure.FIELDS[name] for name in (*measure.MEANS, *measure.MEDIANS)},
    "agreement": "teacher-forced: top-1 agreement with the target, of all positions",
    "alpha": "teacher-forced: sum of min(target_probs, draft_probs), temperature 1, mean of positions",
    "ngram_agreement": "teacher-forced: the same of n-gram lookup's first guess",
    "ar_of_floor": "least seconds of a plain step, (weights + KV bytes) / bandwidth, over those taken",
    "by_position": "acceptance at each draft position, given all before; teacher-forced: by draft step",
    **{name: measure.FIELDS[name] for name in (*measure.TOTALS, *LARGEST, *ALL)},
    "prefill_seconds": "prefill of the target (shared by the cells of a window) and of the drafter",
    "drafter_prefill_seconds": "the drafter's part of prefill_seconds",
    "draft_seconds": "time of drafting",
    "select_seconds": "time of selection and of taking over what was emitted",
    "verify_seconds": "time of verification",
    "ar_decode_seconds": "time of plain decoding, prefill left out",
}


def _result_columns() -> dict[str, str]:
    out = dict(_AXIS_COLUMNS)
    out |= {"documents": "texts behind the row", "windows": "windows of them, one a cell"}
    for name, words in _MEASURE_COLUMNS.items():
        out[name] = words
        if name in MEANS or name in MEDIANS:
            kind = "mean" if name in MEANS else "median"
            out[name] = f"{kind} over documents: {words}"
            out[f"{name}_low"] = f"lower end of the 95 % bootstrap interval of that {kind}"
            out[f"{name}_high"] = "its upper end"
        if name == "speedup_decode":
            out["speedup_decode_least"] = "the smallest speedup_decode of any one window"
    return out


COLUMNS = {
    "results": _result_columns(),
    "records": {
        **_AXIS_COLUMNS,
        "sample": "number of the window, from 0",
        "document": "name of the text",
        "offset": "first token of the window in the text",
        **_MEASURE_COLUMNS,
    },
}
"""What each column of ``results.csv`` and ``records.csv`` is; an empty field is undefined."""


def _read_cell(path: Path) -> dict[str, Any] | None:
    """A kept cell; ``None`` if it is damaged, and then it is measured again.

    Raises
    ------
    ValueError
        If it is of another schema.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(record, dict) or "schema" not in record:
        return None
    if record["schema"] != SCHEMA:
        raise ValueError(
            f"{path.name} is of schema {record['schema']!r}, this version has {SCHEMA}:"
            " take another folder, or sweep again into an empty one"
        )
    return record


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A cell as a row of ``records.csv``."""
    point = {**record["point"], **_labels(record["point"])}
    row = {**point, **{k: v for k, v in record.items() if k != "point"}}
    row["looping"] = None
    if record["point"]["regime"] != "teacher-forced":
        row["looping"] = record["distinct_2"] is not None and record["distinct_2"] < LOOPING
        measure.check_bound(row)
        row["by_position"] = _rates(record["by_position"])
    return {name: row.get(name) for name in COLUMNS["records"]}


def _rates(counts: Sequence[Sequence[int]]) -> list[float]:
    return [right / came for came, right in counts if came]


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ``results.csv`` from kept cells, a row for each point, loops apart.

    Windows of one document are averaged first: intervals are over documents.
    """
    groups: dict[tuple, list[tuple[Mapping[str, Any], dict[str, Any]]]] = {}
    for record in records:
        flat = _flat(record)
        key = (*record["point"].values(), flat["looping"])
        groups.setdefault(key, []).append((record, flat))
    rows = []
    for members in groups.values():
        flats = [flat for _, flat in members]
        row = {name: flats[0][name] for name in _AXIS_COLUMNS}
        documents: dict[str, list[dict[str, Any]]] = {}
        for flat in flats:
            documents.setdefault(flat["document"], []).append(flat)
        row |= {"documents": len(documents), "windows": len(flats)}
        for name in (*MEANS, *MEDIANS):
            each = [_mean([f[name] for f in own]) for own in documents.values()]
            found = measure.interval(each, median=name in MEDIANS)
            row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        rules = {
            **dict.fromkeys(TOTALS, sum),
            **dict.fromkeys(LARGEST, max),
            **dict.fromkeys(ALL, all),
        }
        for name, rule in rules.items():
            known = [f[name] for f in flats if f[name] is not None]
            row[name] = rule(known) if known else None
        speedups = [f["speedup_decode"] for f in flats if f["speedup_decode"] is not None]
        row["speedup_decode_least"] = min(speedups, default=None)
        positions = [record["by_position"] for record, _ in members]
        if row["regime"] == "teacher-forced":
            row["by_position"] = [statistics.fmean(step) for step in zip(*positions, strict=True)]
        else:
            row["by_position"] = _rates(measure.add_positions(positions))
        rows.append({name: row[name] for name in COLUMNS["results"]})
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _collect(planned: Plan, out: Path, command: str) -> list[dict[str, Any]]:
    """Write both tables of what is there, in the order of the grid."""
    order = {point: number for number, point in enumerate(planned.grid.points)}
    found: dict[str, tuple[int, int, dict[str, Any]]] = {}
    for job in planned.jobs:
        for key, point, _ in job.cells:
            if key in found and found[key][2]["point"]["samples"] >= point.samples:
                continue  # two tables of the grid name it: one row, where more windows are asked for
            record = _read_cell(out / "cells" / f"{key}.json")
            if record is not None:
                # It may have been measured when fewer windows were asked for.
                record["point"] = asdict(point)
                found[key] = order[point], job.sample, record
    records = [record for *_, record in sorted(found.values(), key=lambda one: one[:2])]
    tables = {"results": summarise(records), "records": [_flat(r) for r in records]}
    about = _sidecar(planned, records, command)
    for name, rows in tables.items():
        _write_csv(out / f"{name}.csv", rows, COLUMNS[name])
        columns = {"table": name, "columns": COLUMNS[name]}
        measure.write_json(out / f"{name}.json", {**about, **columns})
    return tables["results"]


def _sidecar(planned: Plan, records: Sequence[Mapping[str, Any]], command: str) -> dict[str, Any]:
    def distinct(name: str) -> list[Any]:
        return [json.loads(t) for t in dict.fromkeys(json.dumps(r[name]) for r in records)]

    grid = planned.grid
    place = {**grid.place, "pair": _label(grid.place["pair"])}
    named = [{**t, **_labels(t)} for t in grid.document["grid"]]
    return {
        "kind": "sweep",
        "schema": SCHEMA,
        "command": command,
        "title": grid.title,
        "grid": {**grid.document, **place, "grid": named},
        "drafters": {_label(name): digest for name, digest in planned.drafters.items()},
        "texts": {_label(name): count for name, count in planned.texts.items()},
        "cells": len(planned.cells),
        "measured": len(records),
        "seeds": sorted({p.seed for p in grid.points}),
        **{
            name: distinct(name)
            for name in ("commit", "machine", "threads", "versions", "dtype", "device", "scaling")
        },
    }


def _label(name: str) -> str:
    """A text's or drafter's name in results: of an absolute path only its last part."""
    return Path(name).name if Path(name).expanduser().is_absolute() else name


def _labels(table: Mapping[str, Any]) -> dict[str, Any]:
    out = {}
    for name in ("text", "drafter"):
        value = table[name]
        out[name] = [_label(v) for v in value] if isinstance(value, list) else _label(value)
    return out


_LISTS, _TEXTS = ("by_position",), ("regime", "drafter", "policy", "text", "document")
_FLAGS = ("looping", "controller", *ALL)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    with (
        assets.replacing(path) as scratch,
        scratch.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_written(row[name]) for name in columns] for row in rows)


def _written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return " ".join(f"{v:.4g}" for v in value)
    return str(value)


def _parsed(name: str, field: str) -> Any:
    if name in _LISTS:
        return [float(part) for part in field.split()]
    if field == "":
        return None
    if name in _TEXTS:
        return field
    if name in _FLAGS:
        return field == "true"
    return int(field) if field.lstrip("-").isdigit() else float(field)


def _check_schema(sidecar: Path) -> dict[str, Any] | None:
    """A sidecar, or ``None`` where there is none; refuses one of another schema."""
    if not sidecar.is_file():
        return None
    try:
        about = json.loads(sidecar.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{sidecar.name} is damaged: {error}") from error
    if not isinstance(about, dict) or about.get("kind") != "sweep":
        raise ValueError(f"{sidecar.name} does not belong to a sweep")
    if about.get("schema") != SCHEMA:
        raise ValueError(
            f"{sidecar.name}: results of schema {about.get('schema')!r}, this version reads"
            f" {SCHEMA}: sweep again into an empty folder, or use the version that wrote them"
        )
    return about


def load(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a ``results.csv`` or ``records.csv``, for figures: numbers as numbers, empty as ``None``.

    ``pandas.DataFrame(load(path))`` is a table. What the columns are, and where the results came
    from, is in the JSON file of the same name, which has to lie beside.

    Raises
    ------
    ValueError
        If the sidecar is missing or of another schema, or the file is not the table it speaks of.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"no results at {path}")
    about = _check_schema(path.with_suffix(".json"))
    if about is None:
        raise ValueError(f"{path.name} has no sidecar: {path.stem}.json must lie beside it")
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    header = lines[0] if lines else []
    if header != list(COLUMNS.get(about.get("table"), ())) or {len(r) for r in lines} - {
        len(header)
    }:
        raise ValueError(f"{path.name} does not have the columns that its sidecar promises")
    try:
        return [
            {name: _parsed(name, field) for name, field in zip(header, line, strict=True)}
            for line in lines[1:]
        ]
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
