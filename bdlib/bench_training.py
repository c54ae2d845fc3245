"""What a training step costs: one sparse view against three, and arithmetic against the machine's rate.

The views of a step share the full pass, its keys and values and the teacher, so three views should cost
little more than one. How little depends on the recipe: a view takes ``share`` of the window's blocks once
for every draft step, and the operations counted with three views over those with one are printed beside
the ratio of times. And a step is mostly matrix products, so its time has a floor: the operations that
its forward and backward pass count, at the rate that this machine multiplies bfloat16 matrices,
measured in the same run.

Passes with one view and with three take turns; a ratio is of neighbours in time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bdlib.bench import spread
from bdlib.measure import provenance

SCHEMA = 1
SIDE = 2048  # of the square matrices that give the machine's rate
BUDGETS = {1: (256,), 3: (128, 256, 512)}


@dataclass(frozen=True)
class TrainingBenchSettings:
    """What to time.

    Attributes
    ----------
    recipes
        Recipes whose drafter and settings are timed.
    length
        Tokens of the window.
    repeats
        Passes with each number of views.
    """

    recipes: tuple[str, ...] = ("budgetdraft", "budgetdraft-feature-novels")
    length: int = 2048
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats {self.repeats} must be at least 1")
        least = 2 * max(BUDGETS[3])
        if self.length < least:
            raise ValueError(
                f"length {self.length} must be at least {least}, or views are not sparse"
            )


def training(
    settings: TrainingBenchSettings | None = None, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Time forward and backward passes of the trainer; a dictionary that JSON can hold.

    Raises
    ------
    ValueError
        For an unknown recipe, or one whose pair is not the embedded one.
    """
    import torch

    from bdlib import corpora, recipes, teacher
    from bdlib.transformer import keeping_freed

    settings = settings or TrainingBenchSettings()
    say = progress or (lambda words: None)
    chosen = [recipes.get(name) for name in settings.recipes]
    for recipe in chosen:
        if recipe.pair != chosen[0].pair or recipe.kind == "hub":
            raise ValueError(
                f"recipe {recipe.name!r} has another pair; time it in a run of its own"
            )
    pair = recipes.load(chosen[0])
    texts = corpora.embedded("held-out")
    window = corpora.windows(pair.tokenizer, texts, settings.length, 1, settings.seed)[0][2]
    rows = []
    for recipe in chosen:
        say(f"the target's predictions for {recipe.name}")
        taps = recipe.taps if recipe.kind == "feature" else ()
        with tempfile.TemporaryDirectory() as folder:
            wanted = teacher.TeacherSettings(recipe.top, taps)
            store = teacher.compute(pair.target, window[None], folder, wanted)
            target = store.target(0)
            features = store.features(0).clone() if taps else None
        model = recipes.untrained(recipe, pair)
        say(f"passes of {recipe.name}")
        with keeping_freed():  # as the trainer does
            found = _passes(model, window, target, features, recipe, settings)
        rows.append({"recipe": recipe.name} | found)
    say("the machine's rate of matrix products")
    rate = _matrix_rate(pair.device)
    for row in rows:
        row["fraction_of_matrix_rate"] = {
            views: flops / rate["median"] / row["seconds"][views]["median"]
            for views, flops in row["operations"].items()
        }
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "threads": torch.get_num_threads(),
        "matrix_operations_per_second": rate,
        "recipes": rows,
        **provenance(),
    }


def _passes(
    model: Any,
    window: Any,
    target: Any,
    features: Any,
    recipe: Any,
    settings: TrainingBenchSettings,
) -> dict[str, Any]:
    from torch.utils.flop_counter import FlopCounterMode

    from bdlib.selection import make_policy
    from bdlib.views import View

    device = model.device
    window = window.to(device)
    target = type(target)(target.ids.to(device), target.probs.to(device))
    features = None if features is None else features.to(device)
    views = {
        number: [View(budget, make_policy("chunk_topk")) for budget in budgets]
        for number, budgets in BUDGETS.items()
    }
    operations = {}
    for number in views:  # counted once, and warmed up by it
        with FlopCounterMode(display=False) as counter:
            _pass(model, window, target, features, recipe.settings, views[number])
        operations[str(number)] = counter.get_total_flops()
    seconds: dict[int, list[float]] = {number: [] for number in views}
    for _ in range(settings.repeats):
        for number in views:
            began = time.perf_counter()
            _pass(model, window, target, features, recipe.settings, views[number])
            seconds[number].append(time.perf_counter() - began)
    ratios = [three / one for one, three in zip(seconds[1], seconds[3], strict=True)]
    return {
        "operations": operations,
        "seconds": {str(number): spread(found) for number, found in seconds.items()},
        "three_views_over_one": spread(ratios),
        "operations_of_three_views_over_one": operations["3"] / operations["1"],
        "tokens_per_second": settings.length / spread(seconds[3])["median"],
    }


def _pass(
    model: Any, window: Any, target: Any, features: Any, settings: Any, views: Sequence[Any]
) -> None:
    """One forward and backward pass, as :meth:`bdlib.training.Trainer.train_step` takes it."""
    import torch

    from bdlib.measure import synchronise
    from bdlib.training import window_loss

    model.zero_grad(set_to_none=True)
    with torch.autocast(window.device.type, torch.bfloat16, enabled=settings.autocast):
        loss, _, _ = window_loss(model, window, target, settings, views, "bench", features)
    loss.backward()
    synchronise(window.device)


def _matrix_rate(device: Any) -> dict[str, float]:
    """Operations per second of a product of two square bfloat16 matrices."""
    import torch

    from bdlib.measure import synchronise

    a, b = (torch.randn(SIDE, SIDE, device=device).bfloat16() for _ in range(2))
    found = []
    for _ in range(8):
        synchronise(device)
        began = time.perf_counter()
        torch.mm(a, b)
        synchronise(device)
        found.append(2 * SIDE**3 / (time.perf_counter() - began))
    return spread(found[2:])


def table(result: dict[str, Any]) -> str:
    """A result of :func:`training` as a few lines of text."""
    rate = result["matrix_operations_per_second"]["median"] / 1e9
    lines = [
        f"window of {result['settings']['length']} tokens, {result['threads']} thread(s),"
        f" {result['machine']['cpu']}, multiplies {rate:.0f} GFLOP/s in bfloat16",
        f"{'recipe':<28}{'1 view':>9}{'3 views':>9}{'ratio':>7}{'operations':>12}{'of the rate':>13}"
        f"{'tokens/s':>10}",
    ]
    for row in result["recipes"]:
        one, three = (row["seconds"][number]["median"] for number in ("1", "3"))
        lines.append(
            f"{row['recipe']:<28}{one:>8.2f}s{three:>8.2f}s"
            f"{row['three_views_over_one']['median']:>6.2f}x"
            f"{row['operations_of_three_views_over_one']:>11.2f}x"
            f"{row['fraction_of_matrix_rate']['3']:>13.2f}{row['tokens_per_second']:>10.0f}"
        )
    return "\n".join(lines)
