"""The instructor's dashboard: every setting a slider, instant answers from the archive, live runs.

Moving a control redraws from archived measurements (:mod:`bdlib.archive`): no model runs, and the
pictures are SVG text put into widgets that are there already, so a move takes milliseconds. Only what
was measured is drawn; for any other setting the page says so and offers the run. *Run it now* decodes
with the real model in a thread of its own: the kernel stays responsive, the trace grows round by
round, and *Cancel* stops it within one forward pass.

Contract: :class:`Dashboard` is what a lesson shows; :class:`Engine` runs a setting without any widget.
Speeds *from bytes* are estimates; measured ones are of one run on this machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw

from bdlib import archive as archives
from bdlib import figures

if TYPE_CHECKING:
    from bdlib.decoding import Generation
    from bdlib.pairs import Pair

BUDGETS = (128, 256, 512, 1024, 2048, None)
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16_384)
POLICIES = ("chunk_topk_recent", "sink_window", "chunk_topk", "snapkv", "heavy_hitter", "random")
TEMPERATURES = (0.0, 0.7, 1.0)
GAMMAS = tuple(range(1, 13))
LAMBDAS = (0.0, 0.5, 1.0)  # those of the checkpoints that the paper's authors released
UNTRAINED = {"the target itself": "self", "n-gram lookup": "ngram", "none: plain decoding": "plain"}
PROMPTS = {"live: continue a novel": "continue", "live: summarise": "summarise"}
NEW_TOKENS = 48


@dataclass(frozen=True)
class Settings:
    """What the controls say.

    A ``budget`` of ``None`` is the full cache. ``text`` is the archive's kind of text, ``prompt`` what
    a live run is asked for: to ``"continue"`` a novel or to ``"summarise"`` a passage of it.
    """

    drafter: str = "budgetdraft-feature-gpu"
    policy: str = "chunk_topk_recent"
    budget: int | None = 256
    gamma: int = 4
    context: int = 4096
    temperature: float = 0.0
    text: str = "books"
    prompt: str = "continue"


@dataclass(frozen=True)
class Preset:
    """One step of a lecture: its minutes, what to set, what to say or ask."""

    title: str
    minutes: int
    settings: Settings
    say: str


LECTURE = (
    Preset(
        "1 Plain decoding",
        5,
        Settings("plain", context=512, budget=None, prompt="summarise"),
        "Run it. One pass of the model, one token: watch how slowly the text comes. Ask: what does"
        " the processor do all that time? (It reads weights.)",
    ),
    Preset(
        "2 Draft and verify",
        8,
        Settings("self", context=512, prompt="summarise"),
        "Run it. The target drafts for itself on a budget of 256. Green is accepted, red is thrown"
        " away, blue is the bonus. Ask: why is the text the same as before? Why is it not faster?",
    ),
    Preset(
        "3 Free guesses",
        5,
        Settings("ngram", context=512, prompt="summarise"),
        "Run it. Lookup costs nothing and guesses seldom. Ask: on which text would it win?",
    ),
    Preset(
        "4 A trained drafter",
        8,
        Settings(context=1024, temperature=1.0),
        "Run it, twice: it samples, on from a novel, so the text differs. A small model, trained to"
        " say what the target says; a draft is accepted by how p compares with q. Compare the tokens a"
        " round and the speed with steps 2 and 3.",
    ),
    Preset(
        "5 Squeeze the budget",
        8,
        Settings(budget=128),
        "Do not run: move the budget from 128 to full and watch acceptance and selection map. Ask"
        " for a prediction first. The drafter was trained on sampled budgets: that is the method."
        " Where lambda has more than one value, change it: 0 is a training without sparse views.",
    ),
    Preset(
        "6 How long a draft?",
        6,
        Settings(),
        "Move gamma. Tokens a round rise and level off, the cost rises in a straight line: where is"
        " the best gamma? Then take the standalone drafter and look again.",
    ),
    Preset(
        "7 Another kind of text",
        5,
        Settings(text="meetings"),
        "Change the text between books and meetings. Ask: what did the drafter never see in"
        " training? Acceptance belongs to a text as much as to a drafter.",
    ),
    Preset(
        "8 Another request",
        5,
        Settings(context=1024, prompt="summarise"),
        "The same drafter, asked for a summary, greedily. Ask first: will it be accepted more often"
        " than in step 4, and why? Run it. Then change one thing at a time: prompt, temperature.",
    ),
)


# --------------------------------------------------------------------------- drawing
def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}"'
        f' style="width:100%;max-width:{width}px;background:#ffffff;font-family:sans-serif"'
        f' font-size="12" fill="#222222">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def _marker(kind: int, x: float, y: float, size: float, color: str) -> str:
    """Circle, square, triangle or diamond, so that no line is told by its colour alone."""
    s = size
    if kind % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{s}" fill="{color}"/>'
    corners = {
        1: ((-s, -s), (s, -s), (s, s), (-s, s)),
        2: ((0, -s), (s, s), (-s, s)),
        3: ((0, -s - 1), (s + 1, 0), (0, s + 1), (-s - 1, 0)),
    }[kind % 4]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{color}"/>'


@dataclass(frozen=True)
class Line:
    """One line of a :func:`chart`: values (``None`` leaves a gap) and their intervals.

    ``look`` numbers its colour and marker; its place among the lines if not given.
    """

    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None] = ()
    strong: bool = False
    look: int | None = None


def chart(
    title: str,
    ticks: Sequence[str],
    lines: Mapping[str, Line],
    *,
    xlabel: str,
    top: float,
    chosen: tuple[str, int] | None = None,
    level: tuple[float, str] | None = None,
    note: str = "",
) -> str:
    """A line chart as SVG: one column a tick, one marked line a name, the chosen point ringed.

    Parameters
    ----------
    top
        End of the y axis, which begins at 0.
    chosen
        Line and column of the point to ring and spell out.
    level
        A dashed horizontal line: height and name.
    """
    width, height, left, right, up, down = 520, 278, 44, 12, 62, 60
    span = width - left - right
    looks = [n if line.look is None else line.look for n, line in enumerate(lines.values())]
    colors = [figures.CYCLE[look % len(figures.CYCLE)] for look in looks]

    def at(column: float) -> float:
        return left + span * (column + 0.5) / len(ticks)

    def to(value: float) -> float:
        return height - down - (height - up - down) * min(value, top) / top

    parts = [_text(8, 16, title, 'font-weight="bold" font-size="13"')]
    for i in range(5):
        value = top * i / 4
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{to(value):.1f}" y2="{to(value):.1f}"'
            ' stroke="#dddddd"/>'
        )
        parts.append(_text(left - 6, to(value) + 4, f"{value:.2f}", 'text-anchor="end"'))
    for column, tick in enumerate(ticks):
        parts.append(_text(at(column), height - down + 16, tick, 'text-anchor="middle"'))
    parts.append(_text(left + span / 2, height - down + 33, xlabel, 'text-anchor="middle"'))
    parts.append(_text(8, height - 8, note, 'font-size="10.5" fill="#444444"'))
    if level is not None:
        y = to(level[0])
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#000000"'
            ' stroke-dasharray="5 4"/>'
        )
        halo = 'font-size="11" stroke="#ffffff" stroke-width="3" paint-order="stroke"'
        parts.append(_text(left + 3, y + 13, level[1], halo))
    if not lines:
        middle = 'text-anchor="middle" font-size="15" fill="#444444"'
        parts.append(_text(left + span / 2, to(top / 2) - 8, "not measured", middle))
    legend, row = left, 35
    for look, color, name in zip(looks, colors, lines, strict=True):
        room = 26 + 6.4 * len(name)
        if legend + room > width and legend > left:
            legend, row = left, row + 16
        parts.append(_marker(look, legend + 5, row - 4, 4, color))
        parts.append(_text(legend + 14, row, name, 'font-size="11"'))
        legend += room
    # The strong one last: it lies on top where lines meet.
    for number, line in sorted(enumerate(lines.values()), key=lambda one: one[1].strong):
        look, color = looks[number], colors[number]
        weight = 2.6 if line.strong else 1.3
        path, pen = "", "M"
        for column, value in enumerate(line.values):
            if value is None:
                pen = "M"
                continue
            path += f"{pen}{at(column):.1f} {to(value):.1f} "
            pen = "L"
        parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{weight}"/>')
        for column, pair in enumerate(line.intervals if line.strong else ()):
            if pair is not None:
                x = at(column)
                parts.append(
                    f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{to(pair[0]):.1f}" y2="{to(pair[1]):.1f}"'
                    f' stroke="{color}" stroke-width="1.3"/>'
                )
        for column, value in enumerate(line.values):
            if value is not None:
                size = 4 if line.strong else 3
                parts.append(_marker(look, at(column), to(value), size, color))
    if chosen is not None and chosen[0] in lines:
        value = lines[chosen[0]].values[chosen[1]]
        if value is not None:
            x, y = at(chosen[1]), to(value)
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="#000000"'
                ' stroke-width="2"/>'
            )
            below = 24 if y < up + 24 else -14
            parts.append(
                _text(x, y + below, f"{value:.2f}", 'text-anchor="middle" font-weight="bold"')
            )
    return _svg(width, height, f"{title}. {note}", parts)


def held_map(
    title: str, rows: Mapping[str, Sequence[float]], context: int, chosen: str = "", note: str = ""
) -> str:
    """Which stretches of a context are held: one row a name, the darker the more heads hold it."""
    width, left, right, up, step = 1050, 150, 12, 30, 24
    height = up + step * len(rows) + 46
    span = width - left - right
    parts = [_text(8, 16, title, 'font-weight="bold" font-size="13"')]
    for number, (name, shares) in enumerate(rows.items()):
        y = up + step * number
        strong = 'font-weight="bold"' if name == chosen else ""
        parts.append(_text(left - 8, y + 14, name, f'text-anchor="end" {strong}'))
        frame = ("#000000", 2) if name == chosen else ("#bbbbbb", 1)
        bins = len(shares)
        color = figures.COLORS["blue" if name == chosen or not chosen else "grey"]
        for first, count, share in _equal_runs(shares):
            if share > 0.005:
                parts.append(
                    f'<rect x="{left + span * first / bins:.1f}" y="{y}" height="{step - 6}"'
                    f' width="{span * count / bins:.1f}" fill="{color}"'
                    f' fill-opacity="{0.12 + 0.88 * min(share, 1):.2f}"/>'
                )
        parts.append(
            f'<rect x="{left}" y="{y}" width="{span}" height="{step - 6}" fill="none"'
            f' stroke="{frame[0]}" stroke-width="{frame[1]}"/>'
        )
    bottom = up + step * len(rows)
    for i in range(5):
        x = left + span * i / 4
        anchor = "end" if i == 4 else "middle" if i else "start"
        parts.append(_text(x, bottom + 12, f"{context * i // 4:,}", f'text-anchor="{anchor}"'))
    parts.append(_text(8, bottom + 34, note, 'font-size="10.5" fill="#444444"'))
    return _svg(width, height, f"{title}. {note}", parts)


def _equal_runs(shares: Sequence[float]) -> Iterator[tuple[int, int, float]]:
    """Neighbours of one shade as (first, how many, shade)."""
    first = 0
    for i in range(1, len(shares) + 1):
        if i == len(shares) or round(shares[i], 2) != round(shares[first], 2):
            yield first, i - first, shares[first]
            first = i


def _card(key: str, name: str, value: str, more: str) -> str:
    return (
        '<div style="flex:1;min-width:150px;background:#ffffff;color:#222222;border:1px solid'
        f' #cccccc;padding:6px 10px;line-height:1.35"><div style="font-size:12px">{escape(name)}'
        f'</div><div class="bd-{key}" style="font-size:22px;font-weight:bold">{escape(value)}</div>'
        f'<div style="font-size:11px;color:#444444">{escape(more)}</div></div>'
    )


def _cards(cards: Sequence[tuple[str, str, str, str]]) -> str:
    return f'<div style="display:flex;flex-wrap:wrap;gap:8px">{"".join(_card(*c) for c in cards)}</div>'


# ----------------------------------------------------------------------- the real model
class Cancelled(Exception):
    """The run was stopped."""


class _Stoppable:
    """A model that asks before every pass whether to go on."""

    def __init__(self, model: Any, check: Callable[[int], None]) -> None:
        self._model, self._check = model, check

    def __call__(self, tokens: Any, *more: Any, **named: Any) -> Any:
        self._check(0)
        return self._model(tokens, *more, **named)

    def hidden(self, tokens: Any, *more: Any, **named: Any) -> Any:
        self._check(tokens.shape[-1])
        return self._model.hidden(tokens, *more, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@dataclass(frozen=True)
class Live:
    """A run so far: its rounds, what the drafter's cache holds, and plain decoding beside it.

    Attributes
    ----------
    held
        Share of each stretch of the context that is held, by layer; empty without a cache.
    plain_speed
        Tokens per second of plain decoding from the same prompt.
    same
        How many tokens are those of plain decoding, counted from the first; ``None`` when sampling.
    """

    settings: Settings
    generation: Generation
    held: Mapping[str, Sequence[float]]
    plain_speed: float
    same: int | None


class Engine:
    """Loads the model once and decodes any :class:`Settings` from a held-out book.

    Parameters
    ----------
    new_tokens
        Tokens to generate.
    load
        What loads the pair; for tests.
    """

    def __init__(
        self, new_tokens: int = NEW_TOKENS, load: Callable[..., Pair] | None = None
    ) -> None:
        self.new_tokens = new_tokens
        self._load = load
        self._pairs: dict[bool, Pair] = {}
        self._models: dict[tuple[bool, str], Any] = {}
        self._plain: dict[tuple[Any, ...], tuple[float, list[int]]] = {}
        self._seed = 0

    def pair(self, context: int = 0) -> Pair:
        """The pair, stretched where the context asks for it."""
        from bdlib import pairs

        stretched = context > 8192
        if stretched not in self._pairs:
            load = self._load or pairs.load_pair
            self._pairs[stretched] = load("smollm2", context=context or None)
        return self._pairs[stretched]

    def run(
        self,
        settings: Settings,
        show: Callable[[Live], None] = lambda live: None,
        say: Callable[[str], None] = lambda text: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Live:
        """Decode, calling ``show`` after every round and ``say`` with what goes on.

        Raises
        ------
        Cancelled
            As soon as ``stopped()`` is true.
        """
        import torch

        from bdlib import decoding
        from bdlib.drafters import prefill
        from bdlib.sampling import Sampling

        def check(tokens: int = 0) -> None:
            if stopped():
                raise Cancelled

        say("loading the model")
        pair = self.pair(settings.context)
        check()
        prompt = self._prompt(pair, settings)
        drafter = self._drafter(pair, settings, check)
        read = 0

        def reading(tokens: int) -> None:
            nonlocal read
            check()
            if tokens > 16:
                say(f"reading the prompt: {read:,} of {len(prompt):,} tokens")
                read += tokens

        needs = {} if drafter is None else {"observe": drafter.observe, "taps": drafter.taps}
        cache = prefill(
            _Stoppable(pair.target, reading), prompt, settings.context, piece=256, **needs
        )
        target = _Stoppable(pair.target, check)
        sampling = Sampling(settings.temperature)
        options = {
            "gamma": settings.gamma,
            "max_new_tokens": self.new_tokens,
            "sampling": sampling,
            "stop_tokens": pair.stop_tokens,
        }
        generator = torch.Generator(pair.device).manual_seed(self._seed)
        self._seed += 1

        key = settings.context, settings.temperature, settings.prompt
        if key not in self._plain or settings.drafter == "plain":
            say("plain decoding, to compare with" if drafter is not None else "decoding")
            plain = decoding.Generation(len(prompt), settings.gamma)
            for one in decoding.decode(target, cache, prompt, generator=generator, **options):
                plain.rounds.append(one)
                if drafter is None:
                    show(Live(settings, plain, {}, plain.tokens_per_second, None))
            self._plain[key] = plain.tokens_per_second, plain.tokens
            cache.rewind(len(prompt) - 1)
            if drafter is None:
                return Live(settings, plain, {}, plain.tokens_per_second, None)
        speed, tokens = self._plain[key]

        say("the drafter reads the prompt")
        result = decoding.Generation(len(prompt), settings.gamma)
        live = Live(settings, result, {}, speed, None)
        for one in decoding.decode(target, cache, prompt, drafter, generator=generator, **options):
            result.rounds.append(one)
            same = None
            if sampling.greedy:
                pairs_of = enumerate(zip(result.tokens, tokens, strict=False))
                wrong = (i for i, (a, b) in pairs_of if a != b)
                same = next(wrong, min(len(result.tokens), len(tokens)))
            live = replace(live, held=self._held(drafter, len(prompt)), same=same)
            say("decoding")
            show(live)
        return live

    def _prompt(self, pair: Pair, settings: Settings) -> Any:
        from bdlib import corpora

        book = corpora.embedded("held-out")[-1]
        tokens = settings.context - self.new_tokens
        offset = 11_689 if book.name == "doyle-sherlock" else 0  # where a story of it begins
        cut = corpora.chat_request if settings.prompt == "summarise" else corpora.window
        return cut(pair.tokenizer, book, tokens, offset=offset).to(pair.device)

    def _drafter(self, pair: Pair, settings: Settings, check: Callable[[int], None]) -> Any:
        from bdlib import models
        from bdlib.drafters import ModelDrafter, NGramDrafter, SelfDrafter
        from bdlib.selection import make_policy

        name, full = settings.drafter, settings.budget is None
        if name == "plain":
            return None
        if name == "ngram":
            return NGramDrafter()
        policy = make_policy("full" if full else settings.policy)
        budget = settings.context if full else settings.budget
        if name == "self":
            return SelfDrafter(_Stoppable(pair.target, check), policy, budget)
        key = settings.context > 8192, name
        if key not in self._models:
            self._models[key] = models.load_drafter(models.checkpoint(name), pair.target)
        return ModelDrafter(_Stoppable(self._models[key], check), policy, budget)

    @staticmethod
    def _held(drafter: Any, length: int) -> dict[str, list[float]]:
        cache = getattr(drafter, "cache", None)
        if cache is None:
            return {}
        layers = range(cache.config.num_layers)
        chosen = (
            layers if len(layers) <= 6 else [round(i * (len(layers) - 1) / 5) for i in range(6)]
        )
        return {
            f"layer {layer}": archives.shares([cache.positions(layer)], max(length, cache.length))
            for layer in chosen
        }


# ------------------------------------------------------------------------- the dashboard
class Dashboard:
    """Controls, pictures and a live run; show it as the last expression of a cell.

    Parameters
    ----------
    archive, selections
        What answers at once: measurements, and what caches hold by context. Read from
        ``data/results`` if not given.
    engine
        What runs the real model.
    presets
        The steps of the lecture.
    checkpoints
        The trained drafters that are here; those of ``data/checkpoints`` if not given.
    """

    def __init__(
        self,
        archive: archives.Archive | None = None,
        selections: Mapping[int, archives.Selections] | None = None,
        engine: Engine | None = None,
        presets: Sequence[Preset] = LECTURE,
        checkpoints: Mapping[str, archives.Trained] | None = None,
    ) -> None:
        self.archive = archives.Archive.read() if archive is None else archive
        self.selections = archives.Selections.read_all() if selections is None else selections
        self.engine = Engine() if engine is None else engine
        self.presets = presets
        self.checkpoints = archives.checkpoints() if checkpoints is None else checkpoints
        self.last: Live | None = None
        self.budgets = self._levels("budget", BUDGETS)
        self.policies = [*POLICIES, *(p for p in self._levels("policy") if p not in POLICIES)]
        self._costs: dict[str, archives.Costs | None] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._quiet = False
        self._build()
        self._take_drafter()
        self._redraw()

    # ------------------------------------------------------------------ settings
    @property
    def settings(self) -> Settings:
        """What the controls say now."""
        said = {name: control.value for name, control in self.controls.items()}
        return Settings(**said | {"budget": said["budget"] or None})

    def set(self, **changes: Any) -> None:
        """Move controls, then redraw once."""
        self._quiet = True
        try:
            for name, value in changes.items():
                self.controls[name].value = 0 if name == "budget" and value is None else value
        finally:
            self._quiet = False
        self._redraw()

    def _levels(self, name: str, always: Sequence[Any] = ()) -> list[Any]:
        """Values of a setting: those that can always be run, and those of the archive."""
        found = {*always, *self.archive.values(name)}
        end = [None] if None in always else []
        return [*sorted(found - {None}), *end]

    def _build(self) -> None:
        wide = ipw.Layout(width="auto")
        style = {"description_width": "84px"}

        def slider(name: str, values: Sequence[Any], shown: Callable[[Any], str], at: Any) -> Any:
            made = ipw.SelectionSlider(
                options=[(shown(value), value) for value in values],
                value=at,
                description=name,
                continuous_update=False,
                layout=wide,
                style=style,
            )
            made.add_class(f"bd-{name}")
            return made

        def choice(name: str, options: Any, at: Any) -> Any:
            made = ipw.Dropdown(
                options=options, value=at, description=name, layout=wide, style=style
            )
            made.add_class(f"bd-{name}")
            return made

        start = Settings()
        trained = {*self.archive.values("drafter"), *self.checkpoints} - {*UNTRAINED.values()}
        drafters = [(name, name) for name in sorted(trained) or [start.drafter]]
        first = start.drafter if start.drafter in trained else drafters[0][1]
        drafters += UNTRAINED.items()
        texts = self.archive.values("text") or [start.text]
        temperatures = self._levels("temperature", TEMPERATURES)
        self.controls = {
            # A slider takes no None among its values: 0 stands for the full cache.
            "budget": slider("budget", [b or 0 for b in self.budgets], _budget, start.budget),
            "gamma": slider("gamma", GAMMAS, str, start.gamma),
            "context": slider(
                "context", self._levels("context", CONTEXTS), lambda c: f"{c:,}", start.context
            ),
            "temperature": slider("temperature", temperatures, lambda t: f"{t:g}", 0.0),
            "drafter": choice("drafter", drafters, first),
            "policy": choice("policy", self.policies, start.policy),
            "text": choice("text", texts, start.text if start.text in texts else texts[0]),
            "prompt": choice("prompt", list(PROMPTS.items()), start.prompt),
        }
        self.weight = choice("lambda", [("-", None)], None)
        self.controls["drafter"].observe(lambda change: self._take_drafter(), "value")
        self.weight.observe(self._take_weight, "value")
        for control in self.controls.values():
            control.observe(lambda change: None if self._quiet else self._redraw(), "value")

        self.step = ipw.Dropdown(
            options=[("free play", -1), *((p.title, i) for i, p in enumerate(self.presets))],
            value=-1,
            description="lecture step",
            layout=ipw.Layout(width="330px"),
            style=style,
        )
        self.step.add_class("bd-step")
        self.step.observe(self._take_step, "value")
        self.run_button = ipw.Button(
            description="▶ Run it now",
            button_style="primary",
            tooltip="The real model",
            layout=ipw.Layout(min_width="130px"),
        )
        self.cancel_button = ipw.Button(description="■ Cancel", disabled=True)
        self.run_button.add_class("bd-run")
        self.cancel_button.add_class("bd-cancel")
        self.run_button.on_click(lambda button: self.run())
        self.cancel_button.on_click(lambda button: self.cancel())

        names = (
            "notes",
            "training",
            "numbers",
            "source",
            "left",
            "right",
            "map",
            "status",
            "measured",
            "trace",
            "live_map",
        )
        self.html = {name: ipw.HTML() for name in names}
        for name, widget in self.html.items():
            widget.add_class(f"bd-html-{name}")
        self.html["status"].value = "<i>nothing has run yet</i>"
        for name in ("left", "right"):
            self.html[name].layout = ipw.Layout(width="49%", min_width="400px")
        row = ipw.Layout(flex_flow="row wrap")
        columns = ipw.Layout(grid_template_columns="repeat(auto-fill, minmax(310px, 1fr))")
        shown = dict(self.controls)
        first_row = [shown.pop(name) for name in ("budget", "gamma", "context", "temperature")]
        knobs = [*first_row, shown.pop("drafter"), self.weight, *shown.values()]
        # One button, shown twice: beside what is not measured, and above what a run shows.
        level = ipw.Layout(align_items="center")
        offer = ipw.HBox([self.run_button, self.html["source"]], layout=level)
        offer.add_class("bd-offer")
        runs = ipw.HBox([self.run_button, self.cancel_button, self.html["status"]], layout=level)
        runs.add_class("bd-runs")
        self.view = ipw.VBox(
            [
                ipw.HBox([self.step, self.html["notes"]], layout=row),
                ipw.GridBox(knobs, layout=columns),
                self.html["training"],
                self.html["numbers"],
                offer,
                ipw.HBox([self.html["left"], self.html["right"]], layout=row),
                self.html["map"],
                runs,
                self.html["measured"],
                self.html["trace"],
                self.html["live_map"],
            ],
            layout=ipw.Layout(max_width="1080px"),
        )
        self.view.add_class("bd-dashboard")

    def _repr_mimebundle_(self, **settings: Any) -> Any:
        return self.view._repr_mimebundle_(**settings)

    def _take_step(self, change: Mapping[str, Any]) -> None:
        if change["new"] < 0:
            self.html["notes"].value = ""
            return
        preset = self.presets[change["new"]]
        self.html["notes"].value = (
            f'<div style="max-width:690px;line-height:1.4"><b>{preset.minutes} minutes.</b>'
            f" {escape(preset.say)}</div>"
        )
        wanted = vars(preset.settings) | {"budget": preset.settings.budget or 0}
        allowed = {name: [v for _, v in _pairs(c.options)] for name, c in self.controls.items()}
        self.set(**{name: value for name, value in wanted.items() if value in allowed[name]})

    def _take_drafter(self) -> None:
        """Offer the lambdas of the drafters that were trained like the chosen one."""
        name = self.controls["drafter"].value
        names = archives.by_weight(name, self.checkpoints)
        own = self.checkpoints[name].weight if names else None
        quiet, self._quiet = self._quiet, True
        try:
            self.weight.options = [(f"{w:g}", w) for w in names] or [("-", None)]
            self.weight.value = own
        finally:
            self._quiet = quiet
        self.weight.disabled = len(names) < 2
        self.html["training"].value = _small(self._training(name, own, names))

    def _training(self, name: str, own: float | None, names: Mapping[float, str]) -> str:
        if name in UNTRAINED.values():
            return "lambda belongs to a trained drafter; this one is not trained."
        if name not in self.checkpoints:
            return f"{name} has no checkpoint here: its archive can be shown, it cannot be run."
        if own is None:
            return f"The checkpoint of {name} does not say with which lambda it was trained."
        said = f"{name} was trained with lambda {own:g}."
        others = [f"{w:g} ({other})" for w, other in names.items() if w != own]
        if others:
            said += f" Trained alike but for lambda: {', '.join(others)}."
        if lacking := [f"{w:g}" for w in LAMBDAS if w not in names]:
            said += f" No checkpoint was trained like it with lambda {' or '.join(lacking)}."
        return said

    def _take_weight(self, change: Mapping[str, Any]) -> None:
        if not self._quiet and change["new"] is not None:
            names = archives.by_weight(self.controls["drafter"].value, self.checkpoints)
            self.controls["drafter"].value = names[change["new"]]

    # ------------------------------------------------------------ instant answers
    def _bytes(self, drafter: str) -> archives.Costs | None:
        if drafter not in self._costs:
            try:
                self._costs[drafter] = archives.costs(drafter)
            except (OSError, ValueError):
                self._costs[drafter] = None  # no model here, or a drafter that is not shipped
        return self._costs[drafter]

    def _find(self, s: Settings) -> archives.Measurement | None:
        return self.archive.find(
            s.text, s.drafter, s.policy, s.budget, s.context, s.temperature, s.gamma
        )

    def _redraw(self) -> None:
        s = self.settings
        found = self._find(s)
        self.html["numbers"].value = self._numbers(s, found)
        self.html["source"].value = _small(self._source(s, found))
        self.html["left"].value = self._acceptance_chart(s)
        self.html["right"].value = self._speed_chart(s)
        self.html["map"].value = self._archived_map(s)
        self._allow()

    def _runnable(self, s: Settings) -> bool:
        return s.drafter in self.checkpoints or s.drafter in UNTRAINED.values()

    def _allow(self) -> None:
        if not self.running:
            self.run_button.disabled = not self._runnable(self.settings)

    def _source(self, s: Settings, found: archives.Measurement | None) -> str:
        if found is not None:
            return f"Archived: {found.source}, {_how(found)}. A run takes one prompt of its own."
        if s.drafter == "plain":
            return "Plain decoding drafts nothing, so there is no acceptance: run it."
        cache = "" if s.drafter == "ngram" else f"{s.policy}, budget {_budget(s.budget)}, "
        if s.budget is None:
            cache = "full cache, "
        said = (
            f"Not measured: {s.drafter}, {cache}{s.text}, context {s.context:,},"
            f" temperature {s.temperature:g}."
        )
        held = {"text": s.text, "drafter": s.drafter}
        contexts = self.archive.values("context", **held, temperature=s.temperature)
        if contexts:
            said += f" Archived contexts: {', '.join(f'{c:,}' for c in contexts)}."
        elif temperatures := self.archive.values("temperature", **held):
            said += f" Archived temperatures: {', '.join(f'{t:g}' for t in temperatures)}."
        else:
            said += f" Nothing of this drafter is archived for {s.text}."
        return said if self._runnable(s) else f"{said} It cannot be run: no checkpoint here."

    def _numbers(self, s: Settings, found: archives.Measurement | None) -> str:
        costs = None if s.drafter == "plain" else self._bytes(s.drafter)
        accepted, tokens, estimate, memory = "not measured", "-", "-", "-"
        more, measured = "run it now to measure it", f"at context {s.context:,}"
        if found is not None:
            accepted = f"{found.acceptance:.1%}"
            spread = f"{found.low:.0%} to {found.high:.0%}, " if found.low is not None else ""
            more = f"{spread}{found.samples} windows"
            expected = found.tokens_per_round(s.gamma)
            tokens = f"{expected:.2f}"
            if costs is not None:
                estimate = f"{costs.speedup(expected, s.gamma, s.budget, s.context):.2f}x"
            if found.speedup is not None:
                measured = f"measured and archived: {found.speedup:.2f}x"
        if costs is not None:
            memory = f"{costs.drafter_kv(s.budget, s.context) / 1e6:.2f} MB"
        full = "" if costs is None else f"target: {costs.target_entry * s.context / 1e6:.0f} MB"
        return _cards(
            [
                ("acceptance", "acceptance (archive)", accepted, more),
                ("tokens", "tokens a round", tokens, f"expected, gamma {s.gamma}"),
                ("speed", "speed-up, from bytes", estimate, measured),
                ("memory", "the drafter's cache", memory, full),
            ]
        )

    def _acceptance_chart(self, s: Settings) -> str:
        lines, seen = {}, []
        # Lookup keeps no cache: one line for every budget.
        names = ["n-gram lookup"] if s.drafter == "ngram" else self.policies
        for look, policy in enumerate(names):
            found = [self._find(replace(s, policy=policy, budget=b)) for b in self.budgets]
            if any(m is not None for m, b in zip(found, self.budgets, strict=True) if b):
                strong = policy == s.policy or s.drafter == "ngram"
                lines[policy] = Line(
                    [m and m.acceptance for m in found],
                    [(m.low, m.high) if m and m.low is not None else None for m in found],
                    strong,
                    look,
                )
                seen += [m for m in found if m is not None]
        if not lines and (full := self._find(replace(s, budget=None))) is not None:
            lines["full cache"] = Line([None if b else full.acceptance for b in self.budgets])
            seen = [full]
        if seen:
            how = sorted({_how(m) for m in seen})
            note = f"{s.text}, context {s.context:,}, temperature {s.temperature:g};"
            note += f" {' and '.join(how)}; bars: 95 %."
        else:
            note = f"{s.text}, context {s.context:,}, temperature {s.temperature:g}: run it."
        chosen = s.policy if s.policy in lines else next(iter(lines), "")
        return chart(
            f"Acceptance against budget: {s.drafter}",
            [_budget(b) for b in self.budgets],
            lines,
            xlabel="budget (entries per layer and KV head)",
            top=1.0,
            chosen=(chosen, self.budgets.index(s.budget)),
            note=note,
        )

    def _speed_chart(self, s: Settings) -> str:
        costs = None if s.drafter == "plain" else self._bytes(s.drafter)
        found = [self._find(replace(s, gamma=g)) for g in GAMMAS]
        lines = {}
        estimated, measured = "speed-up, from bytes", "speed-up, measured"
        if any(m is not None for m in found):
            tokens = [m and m.tokens_per_round(g) for m, g in zip(found, GAMMAS, strict=True)]
            lines["tokens a round"] = Line(tokens)
            if costs is not None:
                estimate = [
                    t and costs.speedup(t, g, s.budget, s.context)
                    for t, g in zip(tokens, GAMMAS, strict=True)
                ]
                lines[estimated] = Line(estimate, strong=True)
            if any(m is not None and m.speedup for m in found):
                lines[measured] = Line([m and m.speedup for m in found])
        most = max([2.0, *(v for line in lines.values() for v in line.values if v)])
        best = lines.get(estimated)
        note = (
            "Estimate: a draft step costs the ratio of bytes read, a verification one plain step."
        )
        if best is not None:
            at_best = max(range(len(GAMMAS)), key=lambda i: best.values[i] or 0)
            note = f"{note[:-1]}; best gamma {GAMMAS[at_best]}."
        return chart(
            f"Speed against draft length, context {s.context:,}",
            [str(g) for g in GAMMAS],
            lines,
            xlabel="gamma (tokens drafted a round)",
            top=2.0 * -(-most // 2),
            chosen=(estimated, GAMMAS.index(s.gamma)),
            level=(1.0, "plain decoding"),
            note=note,
        )

    def _archived_map(self, s: Settings) -> str:
        rows: dict[str, Sequence[float]] = {}
        at = min(self.selections, key=lambda c: abs(c - s.context), default=s.context)
        if s.drafter in ("ngram", "plain"):
            note = "There is no drafter's cache here: nothing is selected."
        elif s.budget is None:
            at, rows = s.context, {"full": [1.0] * 128}
            note = "The full cache: every position, in every layer and head."
        else:
            held = self.selections.get(at)
            rows = {
                policy: held.maps[s.drafter, policy, s.budget]
                for policy in self.policies
                if held and (s.drafter, policy, s.budget) in held.maps
            }
            note = "No recorded selection of this setting: run it to see what its cache holds."
            if held and rows:
                elsewhere = "" if at == s.context else f"; none is recorded at {s.context:,}"
                note = (
                    f"Recorded from the model on {held.text}, {at:,} tokens{elsewhere}; the darker,"
                    " the more layers and heads of the drafter hold that stretch."
                )
        title = f"What the drafter's cache holds, by policy: budget {_budget(s.budget)}"
        chosen = s.policy if s.policy in rows else ""
        return held_map(title, rows, at, chosen, note)

    # ----------------------------------------------------------------- live runs
    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def run(self) -> None:
        """Decode the present setting with the real model, in the background."""
        if self.running or not self._runnable(self.settings):
            return
        self._stop.clear()
        self.run_button.disabled, self.cancel_button.disabled = True, False
        for name in ("measured", "trace", "live_map"):
            self.html[name].value = ""
        self._thread = threading.Thread(target=self._work, args=(self.settings,), daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Stop the run, if there is one, within one forward pass."""
        self._stop.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the run has ended; whether it has."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.running

    def _say(self, text: str) -> None:
        self.html["status"].value = f"<span>{escape(text)}</span>"

    def _work(self, settings: Settings) -> None:
        pace = 0.0

        def show(live: Live) -> None:
            nonlocal pace
            if time.monotonic() - pace > 0.1:
                self._show(live)
                pace = time.monotonic()

        try:
            self.last = self.engine.run(settings, show, self._say, self._stop.is_set)
            self._show(self.last)
            self._say("done")
        except Cancelled:
            self._say("cancelled")
        except Exception as error:  # whatever it is, the page must say it and stay usable
            self._say(f"error: {type(error).__name__}: {error}")
        finally:
            self.run_button.disabled = not self._runnable(self.settings)
            self.cancel_button.disabled = True

    def _show(self, live: Live) -> None:
        s, g = live.settings, live.generation
        tokenizer = self.engine.pair(s.context).tokenizer
        rate = f"{g.acceptance_rate:.1%}" if g.drafted else "-"
        speed = g.tokens_per_second
        same = "sampled" if live.same is None else f"{live.same} of {len(g.tokens)}"
        if s.drafter == "plain":
            same = "it is plain decoding"
        self.html["measured"].value = _cards(
            [
                ("run-acceptance", "acceptance (this run)", rate, f"{g.drafted} tokens drafted"),
                (
                    "run-tokens",
                    "tokens a round",
                    f"{g.accepted_length:.2f}",
                    f"{len(g.rounds)} rounds",
                ),
                (
                    "run-speed",
                    "speed-up, measured",
                    f"{speed / live.plain_speed:.2f}x",
                    f"{speed:.1f} against {live.plain_speed:.1f} tokens/s, one run of each",
                ),
                ("run-same", "the same text as plain decoding", same, "tokens, from the first on"),
            ]
        )
        budget = "" if s.drafter in ("plain", "ngram") else f", budget {_budget(s.budget)}"
        title = f"{s.drafter}{budget}, gamma {s.gamma}, context {s.context:,}"
        self.html["trace"].value = figures.trace_html(g.rounds, tokenizer, title, limit=60)
        if live.held:
            length = g.prompt_tokens + len(g.tokens)
            self.html["live_map"].value = held_map(
                f"What the drafter's cache holds in this run: {s.policy if s.budget else 'full'}",
                live.held,
                length,
                note="One row a layer, up to six of them; generated tokens enter at the right.",
            )


def _small(text: str) -> str:
    return f'<div style="font-size:12px;line-height:1.4">{escape(text)}</div>'


def _how(found: archives.Measurement) -> str:
    """How an acceptance was measured, in words."""
    return "teacher-forced" if found.gamma is None else f"generated at gamma {found.gamma}"


def _budget(budget: int | None) -> str:
    return f"{budget:,}" if budget else "full"


def _pairs(options: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [one if isinstance(one, tuple) else (one, one) for one in options]
