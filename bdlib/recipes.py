"""Recipes: everything that a trained drafter comes from, by name, and one function that trains it.

A recipe says which pair, which kind of drafter, which text in windows of which lengths, and the
settings of the trainer. ``python -m bdlib train --recipe NAME`` runs one; it may be stopped at any time
and goes on where it was. :data:`RECIPES` holds those of the shipped checkpoints, of the drafters that
these go on from, and the paper's own.

Contract: :func:`train` leaves a folder with ``training.pt`` and ``log.jsonl`` (the run) and
``drafter/`` (what :func:`bdlib.models.load_drafter` loads, with a card that says how it was made).
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bdlib import assets, models, teacher
from bdlib.budgets import BudgetSampler, fixed
from bdlib.continuations import ContinuationSettings, continued, meetings, prompts
from bdlib.objectives import Objective
from bdlib.training import LOG, Trainer, TrainSettings
from bdlib.transformer import Decoder

if TYPE_CHECKING:
    from bdlib.pairs import Pair

KINDS = ("standalone", "feature", "hub")
SAVED = "drafter"


@dataclass(frozen=True)
class Recipe:
    """How a drafter is made.

    Attributes
    ----------
    kind
        ``"standalone"`` (layers cut from the target), ``"feature"`` (conditioned on its states) or
        ``"hub"`` (the pair's own second model, as in the paper).
    layers
        Layers that a standalone drafter takes from the target.
    taps
        Layers of the target that a feature-conditioned drafter reads.
    rows
        Size of the draft vocabulary; ``None`` scores every token.
    text
        What :func:`bdlib.corpora.load_texts` takes, or ``"pg19"`` (the hub's training split).
    windows
        Window length in tokens, and how many windows of it.
    spoken
        As ``windows``, of the text in the form of a transcript (:func:`bdlib.corpora.spoken`).
    own
        Windows of the target's own text besides (:mod:`bdlib.continuations`).
    start
        Drafter in ``data/checkpoints`` to go on from; ``None`` starts anew.
    revised
        Choose the draft vocabulary of such a drafter again, by the tokens of this recipe's windows: the
        target's own answers have words that no old novel has.
    frozen
        Weights of that drafter that are not trained, nor saved again.
    top, last, reach
        See :class:`bdlib.teacher.TeacherSettings`. A drafter with a reach keeps it when it decodes.
    """

    name: str
    about: str
    settings: TrainSettings
    kind: str = "standalone"
    pair: str = "smollm2"
    layers: tuple[int, ...] = (0, 1, 28, 29)
    taps: tuple[int, ...] = (8, 18, 29)
    rows: int | None = 16_384
    text: str = "embedded:train"
    windows: dict[int, int] = field(default_factory=lambda: {2048: 256, 4096: 64})
    spoken: dict[int, int] = field(default_factory=dict)
    own: tuple[ContinuationSettings, ...] = ()
    start: str | None = None
    revised: bool = False
    frozen: tuple[str, ...] = ()
    top: int = 32
    last: int | None = None
    reach: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        for name in ("windows", "spoken"):
            numbers = [n for pair in getattr(self, name).items() for n in pair]
            if min(numbers, default=1) < 1 or (name == "windows" and not numbers):
                raise ValueError(
                    f"{name} {getattr(self, name)} must name at least one length and a number of it"
                )
        if self.revised and (self.start is None or self.rows is None):
            raise ValueError(
                f"revised True needs a drafter to go on from and rows, got start {self.start!r} and"
                f" rows {self.rows!r}"
            )
        if self.frozen and (self.start is None or self.revised):
            raise ValueError(
                f"frozen {self.frozen} needs a drafter to go on from whose vocabulary stays, got start"
                f" {self.start!r} and revised {self.revised}"
            )


BUDGETS = BudgetSampler({128: 0.15, 256: 0.35, 512: 0.25, 1024: 0.15, 2048: 0.1})
POLICIES = ("chunk_topk", "chunk_topk_recent", "sink_window")
_STANDALONE = TrainSettings(
    objective=Objective("ce", "ce", 0.5),
    budgets=BUDGETS,
    policies=POLICIES,
    views=2,
    share=0.25,
    steps=600,
    warmup=30,
    lr=1e-3,
)
_FEATURE = TrainSettings(
    objective=Objective("kl", "kl", 1.0),
    budgets=BUDGETS,
    policies=POLICIES,
    views=2,
    share=0.15,
    draft_steps=3,
    steps=1100,
    warmup=30,
    lr=2e-3,
)
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "budgetdraft",
            "The paper's method: a standalone drafter, full view and sparse views at sampled budgets.",
            _STANDALONE,
        ),
        Recipe(
            "full-only",
            "Ablation: the full view alone (L_A).",
            replace(_STANDALONE, objective=Objective("ce", "ce", 0.0), views=0),
        ),
        Recipe(
            "fixed-1024",
            "Ablation: every sparse view at a budget of 1,024.",
            replace(_STANDALONE, budgets=fixed(1024)),
        ),
        Recipe(
            "lambda-1",
            "Ablation: the sparse views weigh as much as the full one.",
            replace(_STANDALONE, objective=Objective("ce", "ce", 1.0)),
        ),
        Recipe(
            "budgetdraft-feature-novels",
            "One layer on the target's states, trained over three draft steps at sampled budgets.",
            _FEATURE,
            kind="feature",
        ),
        Recipe(
            "budgetdraft-feature",
            "The feature-conditioned drafter, trained on with transcripts and the target's own text.",
            replace(_FEATURE, steps=2000, warmup=30, lr=1e-3),
            kind="feature",
            windows={2048: 256, 4096: 64, 8192: 8},
            spoken={2048: 96},
            own=(
                ContinuationSettings(64, length=768, answer=320, batch=64, spoken=0.4),
                ContinuationSettings(
                    64, length=1024, answer=968, temperature=0.9, batch=64, source="transcript"
                ),
            ),
            start="budgetdraft-feature-novels",
        ),
        Recipe(
            "budgetdraft-feature-answers",
            "The feature-conditioned drafter, trained on with more of the target's own answers.",
            replace(_FEATURE, steps=1500, warmup=30, lr=1e-3),
            kind="feature",
            spoken={2048: 48},
            own=(
                ContinuationSettings(
                    256, length=576, answer=288, temperature=0.6, batch=64, seed=1, spoken=0.4
                ),
                ContinuationSettings(
                    8, length=4096, answer=256, temperature=0.6, batch=8, seed=2, spoken=0.4
                ),
            ),
            start="budgetdraft-feature",
        ),
        Recipe(
            "budgetdraft-feature-mixed",
            "The feature-conditioned drafter, trained on with transcripts and answers together.",
            replace(_FEATURE, steps=1800, warmup=30, lr=1e-3),
            kind="feature",
            spoken={2048: 48},
            own=(
                ContinuationSettings(
                    256, length=576, answer=288, temperature=0.6, batch=64, seed=1, spoken=0.4
                ),
                ContinuationSettings(
                    8, length=4096, answer=256, temperature=0.6, batch=8, seed=2, spoken=0.4
                ),
                ContinuationSettings(
                    64, length=2048, answer=256, temperature=0.6, batch=64, seed=3, spoken=0.4
                ),
                ContinuationSettings(
                    64, length=1024, answer=968, temperature=0.9, batch=64, source="transcript"
                ),
            ),
            start="budgetdraft-feature-answers",
        ),
        Recipe(
            "budgetdraft-feature-questions",
            "The feature-conditioned drafter, trained on with more answers, some about meetings.",
            replace(_FEATURE, objective=Objective("ce", "kl", 1.0), steps=1800, warmup=30, lr=1e-3),
            kind="feature",
            windows={4096: 64},
            spoken={2048: 48},
            own=(
                ContinuationSettings(
                    256, length=576, answer=288, temperature=0.6, batch=64, seed=1, spoken=0.4
                ),
                ContinuationSettings(
                    64, length=2048, answer=256, temperature=0.6, batch=64, seed=3, spoken=0.4
                ),
                ContinuationSettings(
                    64, length=1024, answer=968, temperature=0.9, batch=64, source="transcript"
                ),
                ContinuationSettings(
                    240, length=576, answer=288, temperature=0.6, batch=60, seed=4, spoken=0.4
                ),
                ContinuationSettings(
                    24, length=4096, answer=256, temperature=0.6, batch=24, seed=5, spoken=0.4
                ),
                ContinuationSettings(
                    128,
                    length=1216,
                    answer=288,
                    temperature=0.6,
                    batch=64,
                    seed=6,
                    source="meeting",
                ),
                ContinuationSettings(
                    16, length=4096, answer=256, temperature=0.6, batch=16, seed=7, source="meeting"
                ),
            ),
            start="budgetdraft-feature-mixed",
        ),
        Recipe(
            "budgetdraft-feature-gpu",
            "The feature-conditioned drafter, trained on with ten times the text: minutes on a GPU.",
            replace(
                _FEATURE,
                objective=Objective("ce", "kl", 1.0),
                share=0.5,
                draft_steps=4,
                steps=5000,
                warmup=100,
                lr=1.5e-3,
            ),
            kind="feature",
            windows={4096: 256, 8192: 40},
            spoken={4096: 96},
            own=(
                ContinuationSettings(
                    320, length=4096, answer=320, temperature=0.5, batch=160, seed=11, spoken=0.5
                ),
                ContinuationSettings(
                    480,
                    length=576,
                    answer=288,
                    temperature=0.6,
                    batch=1120,
                    seed=12,
                    spoken=0.4,
                    pack=7,
                ),
                ContinuationSettings(
                    192,
                    length=1280,
                    answer=320,
                    temperature=0.5,
                    batch=576,
                    seed=13,
                    source="meeting",
                    pack=3,
                ),
                ContinuationSettings(
                    96,
                    length=1024,
                    answer=968,
                    temperature=0.9,
                    batch=384,
                    seed=14,
                    source="transcript",
                    pack=4,
                ),
                ContinuationSettings(
                    256,
                    length=512,
                    answer=384,
                    temperature=0.7,
                    batch=1024,
                    seed=15,
                    source="passage",
                    spoken=0.4,
                    pack=8,
                ),
            ),
            start="budgetdraft-feature-questions",
            revised=True,
        ),
        Recipe(
            "budgetdraft-feature-long",
            "The same drafter, trained on with windows of 16K of which the target reads all, it 4K.",
            replace(
                _FEATURE,
                objective=Objective("kl", "kl", 1.0),
                share=0.2,
                steps=400,
                warmup=20,
                lr=5e-4,
            ),
            kind="feature",
            windows={16_384: 14, 8192: 8, 4096: 14},
            own=(
                ContinuationSettings(
                    3, length=16_384, answer=320, temperature=0.6, batch=3, seed=21, spoken=0.4
                ),
                ContinuationSettings(
                    8, length=4096, answer=320, temperature=0.6, batch=8, seed=22, spoken=0.4
                ),
                ContinuationSettings(
                    8, length=512, answer=384, batch=64, seed=23, source="passage", pack=8
                ),
            ),
            start="budgetdraft-feature-gpu",
            frozen=("head.weight",),
            reach=4096,
        ),
        Recipe(
            "quick",
            "budgetdraft-feature-novels, a toy: a few steps on one novel, to watch a loss fall in a minute.",
            replace(
                _FEATURE,
                budgets=BudgetSampler({64: 0.4, 128: 0.4, 256: 0.2}),
                share=0.25,
                block=32,
                draft_steps=2,
                steps=28,
                warmup=5,
            ),
            kind="feature",
            rows=8192,
            text="embedded:austen-persuasion",
            windows={512: 8},
        ),
        Recipe(
            "paper",
            "The paper's own recipe and pair (arXiv 2606.00144, released code): needs a large GPU.",
            TrainSettings(
                objective=Objective("ce", "ce", 0.5),
                budgets=BudgetSampler(),
                policies=("chunk_topk",),
                views=1,
                mode="continuation",
                block=256,
                steps=5000,
                warmup=150,
                lr=1e-5,
                autocast=False,
            ),
            kind="hub",
            pair="paper",
            rows=None,
            text="pg19",
            windows={16_384: 5000},
            top=1,
            last=256,
        ),
    )
}


def get(name: str) -> Recipe:
    """A recipe by name."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; allowed: {', '.join(RECIPES)}")
    return RECIPES[name]


def load(recipe: Recipe, device: str = "auto", dtype: str = "auto") -> Pair:
    """The recipe's pair, its matrices not packed, so that a drafter can be cut from it."""
    from bdlib.pairs import load_pair

    # A drafter of short reach reads windows of all lengths at the positions it has: the target is then
    # stretched for those windows alone that need it.
    context = max(recipe.windows) if recipe.reach is None else recipe.reach
    return load_pair(recipe.pair, device=device, dtype=dtype, context=context, pack=False)


def _stretched(recipe: Recipe, pair: Pair, length: int) -> Pair:
    """The pair, its target stretched if windows of ``length`` need it and the recipe's drafter does not."""
    if recipe.reach is None or length <= pair.target.config.max_positions:
        return pair
    from bdlib.pairs import load_pair

    # Nothing is cut from this one: it may be packed.
    place, dtype = pair.device.type, str(pair.dtype).removeprefix("torch.")
    return load_pair(recipe.pair, device=place, dtype=dtype, context=length)


def targets(
    recipe: Recipe,
    pair: Pair,
    folder: str | Path,
    progress: Callable[[int, int], None] | None = None,
    only: Container[int] | None = None,
) -> list[teacher.TeacherStore]:
    """The teacher targets of a recipe, computed where they are not there yet; one store a length.

    Recipes that differ only in how they train share them. ``only`` takes those stores alone, counted from
    0 in the order of ``windows``, ``spoken`` and ``own``: processes that share a large GPU can each
    compute some.
    """
    taps = recipe.taps if recipe.kind == "feature" else ()
    wanted = []
    for form, lengths in (("", recipe.windows), ("spoken", recipe.spoken)):
        for length, count in lengths.items():
            source = f"{recipe.text}{form and ' as speech'}, windows of {length}, seed {length}"
            cut = functools.partial(_windows, recipe, length, count, bool(form))
            name = f"{form and 'spoken-'}{_slug(recipe.text)}-{length}x{count}"
            wanted.append((name, length, count, source, cut))
    for own in recipe.own:
        source = f"own text of {recipe.pair} about {recipe.text}, {own}"
        cut = functools.partial(_own_windows, recipe, own, progress)
        length = own.pack * own.length
        name = f"own-{own.source}-{_slug(recipe.text)}-{length}x{own.windows}"
        wanted.append((name, length, own.windows, source, cut))
    stores = []
    for number, (name, length, count, source, cut) in enumerate(wanted):
        if only is not None and number not in only:
            continue
        # A window that the drafter reads whole has the targets of any recipe's.
        reach = recipe.reach if recipe.reach and length > recipe.reach else None
        settings = teacher.TeacherSettings(recipe.top, taps, recipe.last, reach)
        if reach is not None:
            name += f"-reach-{reach}"
        place = Path(folder) / (name + ("-features" if taps else ""))
        if not taps and (Path(folder) / f"{name}-features" / "teacher.json").is_file():
            place = Path(folder) / f"{name}-features"  # holds all that is needed, and more
        found = _existing(place, count, settings, source)
        if found is None:
            by = _stretched(recipe, pair, length)
            found = teacher.compute(by.target, cut(by), place, settings, progress, source)
        stores.append(found)
    return stores


def _own_windows(
    recipe: Recipe,
    own: ContinuationSettings,
    progress: Callable[[int, int], None] | None,
    pair: Pair,
) -> torch.Tensor:
    from bdlib import corpora

    stops = sorted(pair.stop_tokens)
    if own.source == "meeting":
        about = meetings(pair.target, pair.tokenizer, own, stops, progress)
    else:
        about = corpora.load_texts(recipe.text)
    return continued(pair.target, prompts(pair.tokenizer, about, own), own, stops, progress)


def _existing(
    place: Path, count: int, wanted: teacher.TeacherSettings, source: str
) -> teacher.TeacherStore | None:
    """A complete store with what is wanted; its windows are not cut again to find that out."""
    if not (place / "teacher.json").is_file():
        return None
    store = teacher.TeacherStore(place)
    has = store.meta["settings"]
    fits = store.meta["source"] == source
    same = ("top", "last", "reach")
    fits = fits and all(has.get(name) == getattr(wanted, name) for name in same)
    fits = fits and (not wanted.taps or tuple(has["taps"]) == wanted.taps)
    return store if fits and store.done == len(store.windows) == count else None


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in Path(text).name)


def _windows(recipe: Recipe, length: int, count: int, as_speech: bool, pair: Pair) -> torch.Tensor:
    from bdlib import corpora

    if recipe.text == "pg19":
        documents = corpora.pg19(split="train", limit=count)
    else:
        documents = corpora.load_texts(recipe.text)
    if as_speech:
        documents = [corpora.spoken(document) for document in documents]
    tiles = corpora.tiles(pair.tokenizer, documents, length, seed=length)
    if len(tiles) < count:
        raise ValueError(
            f"{recipe.text} holds {len(tiles)} windows of {length} tokens, {count} were asked for"
        )
    return torch.stack(tiles[:count])


def _start(recipe: Recipe) -> Path | None:
    """The folder of the drafter that a recipe goes on from; ``None`` where it starts anew."""
    if recipe.start is None:
        return None
    try:
        return models.checkpoint(recipe.start)
    except ValueError as error:
        raise ValueError(
            f"recipe {recipe.name!r} goes on from {recipe.start!r}: {error}; train that recipe first"
            f" and copy its folder 'drafter' to data/checkpoints/{recipe.start}"
        ) from None


def untrained(recipe: Recipe, pair: Pair) -> Decoder:
    """The drafter before training, in float32, on the pair's device."""
    from bdlib import corpora

    target, rows = pair.target, None
    if recipe.start is not None:
        made = models.trainable(
            models.load_drafter(_start(recipe), target, torch.float32, pack=False)
        )
        made.reach = recipe.reach or 0
        for name in recipe.frozen:
            made.get_parameter(name).requires_grad_(False)
        return made
    if recipe.kind == "hub":
        if pair.drafter is None:
            raise ValueError(f"recipe {recipe.name!r}: the pair {pair.name!r} has no second model")
        return pair.drafter.float().requires_grad_(True)
    if recipe.rows is not None:
        tokens = [
            torch.tensor(ids)
            for ids in pair.tokenizer(
                [document.text for document in corpora.load_texts(recipe.text)],
                add_special_tokens=False,
                verbose=False,
            )["input_ids"]
        ]
        rows = models.draft_vocabulary(tokens, target.config.vocab_size, recipe.rows)
    if recipe.kind == "feature":
        made = models.conditioned_on(target, recipe.taps, rows)
    else:
        made = models.cut_from(target, recipe.layers, rows)
    made.reach = recipe.reach or 0
    return made.to(pair.device)


def train(
    recipe: Recipe,
    out: str | Path,
    teacher_folder: str | Path,
    pair: Pair | None = None,
    minutes: float = 3.0,
    progress: Callable[[dict[str, Any]], None] | None = None,
    teacher_progress: Callable[[int, int], None] | None = None,
    accelerator: Any = None,
) -> Trainer:
    """Train a recipe's drafter in the folder ``out``, or go on with what is there.

    Parameters
    ----------
    teacher_folder
        Where teacher targets are kept between recipes.
    minutes
        Minutes between checkpoints.
    progress, teacher_progress
        Called with each step's log line; with (windows done, windows in all) of the teacher.

    Raises
    ------
    ValueError
        For targets of another model, a folder that holds a run with other settings, or a drafter to
        go on from that is not there.
    """
    _start(recipe)  # the targets may take hours
    pair = load(recipe) if pair is None else pair
    alone = contextlib.nullcontext() if accelerator is None else accelerator.main_process_first()
    with alone:  # the first process computes the targets, the others read them
        stores = targets(recipe, pair, teacher_folder, teacher_progress)
    model = untrained(recipe, pair)
    for store in stores:
        teacher.check_made_by(store, pair.target, model)
    if recipe.revised:
        tokens = [torch.from_numpy(store.windows.astype("int64")) for store in stores]
        size = pair.target.config.vocab_size
        rows = models.draft_vocabulary(tokens, size, recipe.rows)
        models.revise_head(model, pair.target, rows)
    trainer = Trainer(model, stores, recipe.settings, out, minutes, accelerator)
    try:
        trainer.run(progress)
    finally:
        if trainer.rank == 0 and trainer.step:
            save(recipe, trainer, Path(out))
    return trainer


def save(recipe: Recipe, trainer: Trainer, out: Path) -> Path:
    """Write ``out/drafter``: weights, card, log. The run itself stays beside it, to be continued."""
    from bdlib import measure

    folder = out / SAVED
    where = measure.provenance()
    provenance = {
        "recipe": recipe.name,
        "command": f"python -m bdlib train --recipe {recipe.name} --out DIR",
        "steps": trainer.step,
        "tokens": _tokens_seen(out / LOG),
        "settings": json.loads(json.dumps(asdict(recipe.settings))),
        "windows": {str(k): v for k, v in recipe.windows.items()},
        "corpus": {store.meta["source"]: store.meta["windows"] for store in trainer.stores},
        **where,
    }
    if recipe.kind == "hub":
        trainer.model.save(folder)
        with assets.replacing(folder / "README.md") as scratch:
            scratch.write_text(card(recipe, provenance), encoding="utf8")
    else:
        base = _start(recipe) if recipe.frozen else None
        about = card(recipe, provenance)
        models.save_drafter(trainer.model, folder, about, provenance, base, recipe.frozen)
    if (out / LOG).is_file():
        with assets.replacing(folder / LOG) as scratch:
            shutil.copyfile(out / LOG, scratch)
    return folder


def _tokens_seen(log: Path) -> int:
    if not log.is_file():
        return 0
    return sum(json.loads(line)["tokens"] for line in log.read_text(encoding="utf8").splitlines())


def card(recipe: Recipe, provenance: dict[str, Any]) -> str:
    """A model card in Markdown."""
    s = recipe.settings
    budgets = ", ".join(f"{b}: {p:g}" for b, p in s.budgets.probabilities().items())
    kinds = {
        "standalone": f"layers {recipe.layers} of the target with its embedding",
        "feature": f"one layer on the target's states after layers {recipe.taps}",
        "hub": "the pair's second model",
    }
    rows = [
        ("target", recipe.pair),
        ("drafter", kinds[recipe.kind]),
        ("draft vocabulary", f"{recipe.rows:,} tokens" if recipe.rows else "all tokens"),
        ("text", f"{recipe.text} in windows of {recipe.windows}"),
        ("as transcripts", f"windows of {recipe.spoken}" if recipe.spoken else "none"),
        ("own text", ", ".join(f"{o.windows} {o.source} windows" for o in recipe.own) or "none"),
        ("begins from", recipe.start or "nothing"),
        ("not trained", ", ".join(recipe.frozen) or "the embedding"),
        ("reads of a prompt", f"{recipe.reach:,} tokens" if recipe.reach else "all"),
        (
            "trained for",
            f"{provenance['steps']:,} of {s.steps:,} steps, {provenance['tokens']:,} tokens",
        ),
        (
            "loss",
            f"{s.objective.full} in full, {s.objective.weight:g} x {s.objective.sparse} sparse",
        ),
        ("views a step", f"{s.views}, of {s.share:.0%} of the blocks each" if s.views else "none"),
        ("budgets", budgets if s.views else "none: full cache only"),
        ("policies", ", ".join(s.policies) if s.views else "none"),
        ("learning rate", f"{s.lr:g}, {s.warmup} steps of warm-up, cosine"),
        ("machine", f"{provenance['machine']['cpu']}, {provenance['machine']['gpu'] or 'no GPU'}"),
        ("commit", str(provenance["commit"])),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"# {recipe.name}\n\n{recipe.about}\n\n| | |\n|---|---|\n{table}\n\n"
        "The weights derive from SmolLM2-135M-Instruct (Apache-2.0) where the target is smollm2; the\n"
        "training texts are in the public domain. `log.jsonl` holds every step of the run.\n"
    )
