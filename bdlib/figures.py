"""One look for every figure, and the drawings that more than one lesson uses.

Contract: helpers take plain numbers, return ``(fig, ax)`` or HTML, and never call ``plt.show()``.
Colours are Okabe and Ito's colour-blind-safe palette, always together with a marker, a hatch or a
text decoration, so that no meaning hangs on colour alone. Backgrounds are opaque: the figures read
the same in JupyterLab's light and dark themes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bdlib.decoding import Round
    from bdlib.measure import Interval

COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "black": "#000000",
    "grey": "#7F7F7F",
}
CYCLE = [
    COLORS[name] for name in ("blue", "vermillion", "green", "purple", "orange", "sky", "grey")
]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]

# How a token of a trace looks: background, text decoration. Text stays black on every background.
TOKEN_STYLES = {
    "prompt": ("#F2F2F2", "none"),
    "accepted": ("#9AD8C4", "none"),
    "rejected": ("#F2B8A0", "line-through"),
    "corrected": ("#F6D58B", "underline"),
    "bonus": ("#A9CFE9", "underline"),
    "plain": ("#FFFFFF", "none"),
}


def use_style() -> None:
    """Apply the collection's matplotlib style; call it once, in a lesson's import cell."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(context="notebook", style="whitegrid", palette=CYCLE)
    plt.rcParams.update(
        {
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.figsize": (7.5, 4.2),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "lines.linewidth": 2,
            "lines.markersize": 6,
        }
    )


def caption(fig: Figure, text: str) -> None:
    """State below a figure what was measured: model, machine, dtype, n, seed."""
    fig.supxlabel(text, fontsize=8.5, color="#444444", x=0.01, ha="left")


def lines(
    ax: Axes,
    x: Sequence[float],
    series: Mapping[str, Sequence[Any]],
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Axes:
    """Draw one marked line a name, with intervals (low, high) as bars where given."""
    for i, (name, y) in enumerate(series.items()):
        style = {"color": CYCLE[i % len(CYCLE)], "marker": MARKERS[i % len(MARKERS)], "label": name}
        if intervals and name in intervals:
            low, high = zip(*intervals[name], strict=True)
            spread = [
                [max(0.0, v - a) for v, a in zip(y, low, strict=True)],
                [max(0.0, b - v) for v, b in zip(y, high, strict=True)],
            ]
            ax.errorbar(x, y, yerr=spread, capsize=3, **style)
        else:
            ax.plot(x, y, **style)
    return ax


def context_axis(ax: Axes, contexts: Iterable[int]) -> Axes:
    """A logarithmic axis of context lengths, labelled 512, 1K, 2K, ..."""
    ticks = list(contexts)
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{t // 1024}K" if t % 1024 == 0 else str(t) for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("context (tokens)")
    return ax


def trace_html(rounds: Iterable[Round], tokenizer: Any, title: str = "", limit: int = 400) -> str:
    """The token trace of a decoding as HTML, one line a round.

    Accepted drafts are green, rejected ones red and struck through, the target's own token is blue
    (bonus) or yellow (corrected) and underlined.

    Parameters
    ----------
    limit
        Show at most this many rounds, the last ones.
    """
    shown = list(rounds)
    rows = [_trace_row(r, tokenizer) for r in shown[-limit:]]
    keys = ("accepted", "rejected", "bonus", "corrected")
    legend = " ".join(_token_html(key, key) for key in keys)
    head = f"<b>{escape(title)}</b> " if title else ""
    box = (
        "background:#ffffff;color:#000000;border:1px solid #cccccc;padding:8px;"
        "font-family:monospace;font-size:13px;line-height:1.7;max-height:420px;overflow:auto"
    )
    return f'<div style="{box}"><div>{head}{legend}</div>{"".join(rows)}</div>'


def _trace_row(r: Round, tokenizer: Any) -> str:
    drafts = [
        _token_html(tokenizer.decode([token]), "accepted" if i < r.accepted else "rejected")
        for i, token in enumerate(r.drafted)
    ]
    own = ""
    if len(r.emitted) > r.accepted:  # not cut by a stop token inside the draft
        own = " &rarr; " + _token_html(tokenizer.decode([r.emitted[-1]]), r.kind)
    return f'<div><span style="color:#666666">{r.index:>3}</span> {" ".join(drafts)}{own}</div>'


def _token_html(text: str, kind: str) -> str:
    background, decoration = TOKEN_STYLES[kind]
    # A line through or under the space before a word would read as a dash.
    word = text.lstrip(" ") or text
    space = "&nbsp;" * (len(text) - len(word))
    shown = escape(word).replace("\n", "&#9166;").replace(" ", "&nbsp;")
    if decoration != "none":
        shown = f'<span style="text-decoration:{decoration}">{shown}</span>'
    style = f"background:{background};color:#000000;padding:1px 3px"
    return f'<span style="{style}" title="{kind}">{space}{shown}</span>'


def selection_map(
    ax: Axes, positions: Mapping[str, Sequence[int]], length: int, mass: Mapping[str, float]
) -> Axes:
    """Which positions each policy keeps: one row a policy, a mark a kept position.

    Parameters
    ----------
    positions
        Kept positions by policy name (of one layer and KV head).
    length
        Length of the context, in tokens.
    mass
        Captured attention mass by policy name, 0 to 1, written beside the row.
    """
    for row, (name, kept) in enumerate(positions.items()):
        color = CYCLE[row % len(CYCLE)]
        # The line keeps a single position visible where a token is narrower than a pixel.
        ax.broken_barh(_runs(kept), (row - 0.36, 0.72), color=color, linewidth=0.6)
        ax.text(length * 1.01, row, f"{mass[name]:.0%}", va="center", fontsize=10)
    ax.text(length * 1.01, -0.75, "captured", fontsize=9, color="#444444")
    ax.set_yticks(range(len(positions)), list(positions))
    ax.set_xlim(-length * 0.005, length)
    ax.set_ylim(len(positions) - 0.5, -0.5)
    ax.set_xlabel("position in the context (tokens)")
    ax.grid(False)
    return ax


def _runs(positions: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of neighbouring positions as (first, how many), ascending."""
    runs: list[tuple[int, int]] = []
    for position in sorted(positions):
        if runs and position == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((position, 1))
    return runs


def kept_words(
    ax: Axes,
    words: Sequence[str],
    positions: Mapping[str, Sequence[int]],
    mass: Mapping[str, float],
) -> Axes:
    """Like :func:`selection_map` for a short text: one column a word, kept words spelled out.

    A kept word stands in a coloured cell, a dropped one leaves an empty cell.
    """
    for row, (name, kept) in enumerate(positions.items()):
        cells = [(column - 0.5, 1) for column in range(len(words))]
        look = {"edgecolor": "#BBBBBB", "linewidth": 0.8, "zorder": 1}
        ax.broken_barh(cells, (row - 0.42, 0.84), facecolor="white", **look)
        color = CYCLE[row % len(CYCLE)]
        ax.broken_barh([cells[i] for i in kept], (row - 0.42, 0.84), color=color, alpha=0.35)
        for column in kept:
            ax.text(column, row, words[column], ha="center", va="center", fontsize=8.5)
        ax.text(len(words) - 0.3, row, f"{mass[name]:.0%}", va="center", fontsize=10)
    ax.text(len(words) - 0.3, -0.65, "captured", fontsize=9, color="#444444")
    ax.set_yticks(range(len(positions)), list(positions))
    ax.set_xticks(range(len(words)), range(len(words)), fontsize=9)
    ax.set_xlim(-0.5, len(words) - 0.5)
    ax.set_ylim(len(positions) - 0.5, -0.5)
    ax.set_xlabel("position (words)")
    ax.grid(False)
    return ax


def memory_map(
    ax: Axes, strips: Mapping[str, tuple[Sequence[tuple[int, ...] | None], int]], tokens: int
) -> Axes:
    """Which program of a grid touches which part of memory: a strip a tensor, a colour a program.

    Parameters
    ----------
    strips
        By name, cells in order and the tokens a cell is wide. A cell is the program that touches it,
        or ``None`` (hatched) where no program may.
    tokens
        Width of the picture.
    """
    from matplotlib.colors import to_rgba

    programs = {p: None for cells, _ in strips.values() for p in cells if p is not None}
    colors = {p: CYCLE[i % len(CYCLE)] for i, p in enumerate(programs)}
    for row, (cells, width) in enumerate(strips.values()):
        start = 0
        for program, run in itertools.groupby(cells):
            n = len(list(run))
            for i in range(start, start + n):
                face = {"facecolor": "white", "hatch": "////"}
                if program is not None:
                    face = {"facecolor": to_rgba(colors[program], 0.35)}
                where = (row - 0.36, 0.72)
                ax.broken_barh([(i * width, width)], where, edgecolor="#AAAAAA", lw=0.6, **face)
            if program is not None:
                text = ", ".join(str(axis) for axis in program)
                middle = (start + n / 2) * width
                box = {"facecolor": "white", "alpha": 0.75, "pad": 1.5, "edgecolor": "none"}
                ax.text(middle, row, text, ha="center", va="center", fontsize=9.5, bbox=box)
            start += n
    ax.set_yticks(range(len(strips)), list(strips))
    ax.set_xlim(0, tokens)
    ax.set_ylim(len(strips) - 0.5, -0.5)
    ax.set_xlabel("entry of the cache (tokens)")
    ax.grid(False)
    return ax


def agreement_by_budget(
    results: Mapping[str, Mapping[str, Any]], policy: str
) -> tuple[Figure, Sequence[Axes]]:
    """Teacher-forced agreement against the budget: a panel a kind of text, a line a drafter.

    Parameters
    ----------
    results
        What :func:`bdlib.forced.run` returned, by kind of text, all of one context length. Means and
        95 % intervals are over windows; a dashed line is the full cache.
    """
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        1, len(results), figsize=(3.4 * len(results), 3.8), sharey=True, squeeze=False
    )
    for ax, (kind, result) in zip(axes[0], results.items(), strict=True):
        rows = [row for row in result["summary"] if row["policy"] in (policy, None)]
        budgets = sorted({row["budget"] for row in rows if row["budget"]})
        series, bars = {}, {}
        for i, name in enumerate(dict.fromkeys(row["drafter"] for row in rows)):
            found = {row["budget"]: row["agreement"] for row in rows if row["drafter"] == name}
            series[name] = [found[b]["mean"] for b in budgets]
            bars[name] = [(found[b]["low"], found[b]["high"]) for b in budgets]
            label = "full cache" if i == 0 else None
            style = {"ls": "--", "lw": 1.2, "zorder": 0}
            ax.axhline(found[None]["mean"], color=CYCLE[i], label=label, **style)
        lines(ax, budgets, series, bars)
        ax.set_xscale("log", base=2)
        ax.set_xticks(budgets, [str(b) for b in budgets])
        ax.minorticks_off()
        ax.set(title=kind, xlabel="budget (entries)")
    axes[0][0].set(ylabel="top-1 agreement with the target", ylim=(0, None))  # of all panels
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    first = next(iter(results.values()))
    settings = first["settings"]
    caption(
        fig,
        f"SmolLM2-135M, {first['dtype']}; teacher-forced on human text, context"
        f" {settings['context']:,}; {policy}; {settings['samples']} windows a kind, seed"
        f" {settings['seed']}; bars: 95 % intervals.",
    )
    return fig, axes[0]


# ------------------------------------------------------------- sweeps (rows of bdlib.sweeps.load)

DRAFTER_LABELS = {"self": "target itself", "full-only": "full view only"}


def swept(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], bars: bool = True) -> str:
    """What a caption says of rows of a sweep: number type, documents, seed, intervals."""
    counts = [row["documents"] for row in rows]
    n = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    seeds = ", ".join(str(seed) for seed in about["seeds"])
    text = f"SmolLM2-135M, {', '.join(about['dtype'])}; teacher-forced; n = {n} documents a point;"
    return f"{text} seed {seeds}" + ("; bars: 95 % intervals over documents." if bars else ".")


def agreement_panels(
    rows: Sequence[Mapping[str, Any]],
    across: str,
    by: str = "drafter",
    ngram: bool = True,
    stretched: int | None = None,
) -> tuple[Figure, Sequence[Axes]]:
    """Teacher-forced agreement: a panel a kind of text, a line a value of ``by``.

    Parameters
    ----------
    rows
        One row a point, with its ``text``, ``drafter``, ``policy``, ``budget``, ``context``,
        ``agreement`` and where known ``agreement_low``, ``agreement_high``, ``ngram_agreement``.
    across
        ``"budget"`` (the full cache is the last tick), ``"context"`` (the full cache is a dashed
        line) or another column of whole numbers.
    stretched
        Contexts above this many tokens are shaded: the target's positions are stretched there.
    """
    import matplotlib.pyplot as plt

    def full(row: Mapping[str, Any]) -> bool:
        return row["policy"] == "full"

    texts = list(dict.fromkeys(row["text"] for row in rows))
    names = list(dict.fromkeys(r[by] for r in rows if by != "policy" or not full(r)))
    ticks = sorted({row[across] for row in rows}, key=lambda v: (v is None, v))
    width = min(11.0, 4.8 + 2.2 * len(texts))
    fig, axes = plt.subplots(1, len(texts), figsize=(width, 4.1), sharey=True, squeeze=False)
    for ax, text in zip(axes[0], texts, strict=True):
        here = [row for row in rows if row["text"] == text]
        for i, name in enumerate(names):
            of = [r for r in here if r[by] == name or (by == "policy" and full(r))]
            split = across != "budget" and by != "budget"
            label = "full cache" if name is None else DRAFTER_LABELS.get(name, str(name))
            shift = 0.07 * (i - (len(names) - 1) / 2)
            for dashed in (False, True) if split else (None,):
                line = [r for r in of if dashed is None or full(r) == dashed]
                line.sort(key=lambda r: ticks.index(r[across]))
                x = [ticks.index(r[across]) + shift for r in line]
                ends = f"{label}, full cache" if dashed else label
                _with_intervals(ax, x, line, i, "--" if dashed else "-", ends)
        if ngram:
            known = {r[across]: r["ngram_agreement"] for r in here}
            x, y = zip(*sorted((ticks.index(t), v) for t, v in known.items()), strict=True)
            ax.plot(x, y, color="black", ls=":", lw=1.6, label="n-gram lookup")
        if stretched and any(tick and tick > stretched for tick in ticks):
            first = next(i for i, tick in enumerate(ticks) if tick and tick > stretched)
            look = {"color": COLORS["grey"], "alpha": 0.15, "lw": 0, "label": "YaRN x2"}
            ax.axvspan(first - 0.5, len(ticks) - 0.5, **look)
        ax.set_xticks(range(len(ticks)), [_tick(across, tick) for tick in ticks])
        ax.set_xlim(-0.5, len(ticks) - 0.5)
        unit = {"budget": "budget (entries)", "context": "context (tokens)"}
        ax.set(title=text, xlabel=unit.get(across, across))
    if ngram:
        axes[0][0].set_ylim(0, 1.06 * max(ax.dataLim.y1 for ax in axes[0]))  # they share it
    axes[0][0].set_ylabel("top-1 agreement with the target")
    _legend_above(fig, axes[0], min(4, 1 + len(texts)))
    return fig, axes[0]


def _legend_above(fig: Figure, axes: Iterable[Axes], columns: int) -> None:
    """One legend above all of a figure, with every label of these axes once."""
    found: dict[str, Any] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    fig.legend(found.values(), found.keys(), loc="outside upper left", ncols=columns, fontsize=9)


def _tick(across: str, value: Any) -> str:
    if value is None:
        return "full"
    return f"{value // 1024}K" if across == "context" and value % 1024 == 0 else str(value)


def _with_intervals(
    ax: Axes, x: Sequence[float], rows: Sequence[Mapping[str, Any]], i: int, ls: str, label: str
) -> None:
    """A line of the i-th look, with bars where an interval is known."""
    if not rows:
        return
    style = {"color": CYCLE[i % len(CYCLE)], "marker": MARKERS[i % len(MARKERS)]}
    y = [row["agreement"] for row in rows]
    ax.plot(x, y, ls=ls, lw=1.2 if ls == "--" else 2, label=label, **style)
    for at, row in zip(x, rows, strict=True):
        low, high = row.get("agreement_low"), row.get("agreement_high")
        if low is not None and high is not None and ls == "-":
            ax.errorbar(
                [at], [(low + high) / 2], [(high - low) / 2], fmt="none", capsize=3, lw=1.2,
                color=style["color"],
            )  # fmt: skip


def kept_map(rows: Sequence[Mapping[str, Any]]) -> tuple[Figure, Sequence[Axes]]:
    """Heat map, budget x context: agreement over that with the full cache; a panel a drafter.

    Rows are of one policy and the full cache. Several kinds of text are averaged, each weighing the
    same, where a cell has all of them; other cells stay empty.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    drafters = list(dict.fromkeys(row["drafter"] for row in rows))
    contexts = sorted({row["context"] for row in rows})
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None})
    grids = []
    for drafter in drafters:
        own = [row for row in rows if row["drafter"] == drafter]
        texts = {row["text"] for row in own}
        grid = np.full((len(budgets), len(contexts)), np.nan)
        for (y, budget), (x, context) in itertools.product(enumerate(budgets), enumerate(contexts)):
            cell, whole = (
                {r["text"]: r["agreement"] for r in own if (r["context"], r["budget"]) == place}
                for place in ((context, budget), (context, None))
            )
            if set(cell) == set(whole) == texts and sum(whole.values()) and budget < context:
                grid[y, x] = sum(cell.values()) / sum(whole.values())
        grids.append(grid)
    least = min((float(np.nanmin(g)) for g in grids if not np.isnan(g).all()), default=1.0)
    most = max((float(np.nanmax(g)) for g in grids if not np.isnan(g).all()), default=1.0)
    low, high = max(0.5, min(0.8, least)), min(1.1, max(1.05, most))
    columns = min(3, len(drafters))
    lines_ = -(-len(drafters) // columns)
    size = (
        max(6.8, 1.5 + columns * (1.2 + 0.62 * len(contexts))),
        1.3 + lines_ * (1 + 0.42 * len(budgets)),
    )
    fig, axes = plt.subplots(lines_, columns, figsize=size, squeeze=False)
    for ax in axes.flat[len(drafters) :]:
        ax.set_axis_off()
    for ax, drafter, grid in zip(axes.flat, drafters, grids, strict=False):
        image = ax.imshow(grid, "cividis", vmin=low, vmax=high, origin="lower", aspect="auto")
        for (y, x), value in np.ndenumerate(grid):
            dark = value < (low + high) / 2
            shown = "" if np.isnan(value) else f"{value:.2f}"
            ax.text(x, y, shown, ha="center", va="center", color="white" if dark else "black")
        ax.set_xticks(range(len(contexts)), [_tick("context", c) for c in contexts])
        ax.set_yticks(range(len(budgets)), [str(b) for b in budgets])
        ax.grid(False)
        ax.set_title(DRAFTER_LABELS.get(drafter, drafter), fontsize=10.5)
        ax.set(xlabel="context (tokens)", ylabel="budget (entries)")
    fig.colorbar(image, ax=axes, label="over the full cache")
    return fig, axes.flat[: len(drafters)]


def acceptance(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Figure]:
    """Lesson 07's figures of a teacher-forced sweep, by name: what ``bdlib figure acceptance`` draws.

    Texts that come with the collection and the target as its own drafter are left out, as there.
    """
    kept = [
        row
        for row in rows
        if row["regime"] == "teacher-forced"
        and not row["text"].startswith("embedded:")
        and row["drafter"] != "self"
    ]
    policies = {row["policy"] for row in kept} - {"full"}
    if not policies:
        raise ValueError("these results hold no teacher-forced agreement on a sparse cache")
    policy = min(policies, key=lambda name: (name != "chunk_topk_recent", name))
    kept = [row for row in kept if row["policy"] in (policy, "full")]
    budgets = {row["budget"] for row in kept} - {None}
    budget = 256 if 256 in budgets else min(budgets)
    found = {}
    for context in sorted({row["context"] for row in kept}):
        here = [row for row in kept if row["context"] == context]
        fig, _ = agreement_panels(here, "budget")
        caption(fig, f"{context:,} tokens, {policy}.\n{swept(about, here)}")
        found[f"budget_{context}"] = fig
    here = [row for row in kept if row["budget"] in (budget, None)]
    found["context"], _ = agreement_panels(here, "context", stretched=8192)
    caption(found["context"], f"Solid: {budget} entries, {policy}.\n{swept(about, here)}")
    found["kept"], _ = kept_map(kept)
    caption(found["kept"], f"{policy}; mean of the kinds.\n{swept(about, kept, bars=False)}")
    return found


# --------------------------------------------- document by document (records of bdlib.sweeps.load)


def above(
    records: Iterable[Mapping[str, Any]],
    name: str,
    drafter: str,
    policy: str,
    budget: int | None,
    base: str = "full-only",
    beyond_full: bool = False,
) -> Interval:
    """How far a drafter is above another on the same windows, as a mean over documents.

    Parameters
    ----------
    name
        The column, ``"alpha"`` or ``"agreement"``.
    beyond_full
        Subtract from every difference that of the same window with the full cache: what is left is
        about the budget.
    """
    from bdlib import measure

    values: dict[tuple, dict[str, float]] = {}
    for r in records:
        point = r["policy"], r["budget"]
        if r["drafter"] in (drafter, base) and point in ((policy, budget), ("full", None)):
            window = r["text"], r["document"], r["offset"], r["context"]
            values.setdefault((*point, *window), {})[r["drafter"]] = r[name]
    gaps = {place: v[drafter] - v[base] for place, v in values.items() if len(v) == 2}
    documents: dict[tuple, list[float]] = {}
    for place, gap in gaps.items():
        if place[:2] == (policy, budget):
            less = gaps["full", None, *place[2:]] if beyond_full else 0.0
            documents.setdefault(place[2:4], []).append(gap - less)
    return measure.interval([fmean(of) for of in documents.values()])


def transfer(
    records: Sequence[Mapping[str, Any]], about: Mapping[str, Any], base: str = "full-only"
) -> tuple[Figure, Sequence[Axes]]:
    """Map of trainings against policies and budgets of use: how far each is above ``base``.

    Differences are in thousandths, paired by window, means over documents. All of them are colours;
    those whose 95 % interval excludes zero are framed numbers too.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    points = list(dict.fromkeys((r["policy"], r["budget"]) for r in records))
    policies = list(dict.fromkeys(policy for policy, _ in points))
    points.sort(key=lambda p: (p[0] == "full", policies.index(p[0]), p[1] or 0))
    drafters = [d for d in dict.fromkeys(r["drafter"] for r in records) if d != base]
    size = 1.8 + 0.52 * len(points), 1.9 + 2 * 0.34 * len(drafters)
    fig, axes = plt.subplots(2, 1, figsize=size, sharex=True)
    for ax, name in zip(axes, ("alpha", "agreement"), strict=True):
        found = [[above(records, name, d, *p, base=base) for p in points] for d in drafters]
        grid = np.array([[1000 * cell.mean for cell in row] for row in found])
        most = float(np.abs(grid).max()) or 1.0
        # The lightest half of each side, in steps: black text stays readable on every cell.
        steps = plt.get_cmap("PuOr_r", 21)
        ax.imshow(grid, steps, vmin=-2 * most, vmax=2 * most, aspect="auto")
        for (y, x), value in np.ndenumerate(grid):
            low, high = found[y][x].low, found[y][x].high
            if low is not None and (low > 0 or high < 0):
                ax.text(x, y, f"{value:+.1f}", ha="center", va="center", fontsize=9)
                frame = {"fill": False, "edgecolor": "black", "lw": 1}
                ax.add_patch(plt.Rectangle((x - 0.45, y - 0.42), 0.9, 0.84, **frame))
        own = [
            fmean(by_document(records, name, drafter=base, policy=policy, budget=budget).values())
            for policy, budget in points
        ]
        title = f"{name} above {base}, which has {min(own):.3f} to {max(own):.3f}"
        ax.set_title(title, fontsize=10.5, pad=20 if name == "alpha" else 6)
        ax.set_yticks(range(len(drafters)), drafters)
        ax.set_xticks(range(len(points)), [_tick("budget", budget) for _, budget in points])
        ax.grid(False)
        for x in range(1, len(points)):
            if points[x][0] != points[x - 1][0]:
                ax.axvline(x - 0.5, color="black", lw=1)
    for policy in policies:
        own = [x for x, point in enumerate(points) if point[0] == policy]
        if policy != "full":
            axes[0].text(fmean(own), -0.6, policy, ha="center", va="bottom", fontsize=9.5)
    axes[1].set_xlabel("budget (entries)")
    windows = {(r["text"], r["document"], r["offset"], r["context"]) for r in records}
    contexts = " and ".join(f"{c:,}" for c in sorted({r["context"] for r in records}))
    caption(
        fig,
        f"SmolLM2-135M, teacher-forced, {contexts} tokens; n = {found[0][0].n} documents,"
        f" {len(windows)} windows;"
        f" numbers: thousandths, where the 95 % interval excludes zero.\n{origin(about)}",
    )
    return fig, axes


def origin(about: Mapping[str, Any]) -> str:
    """What a caption says of where a sweep was measured: number type, machine, seed, commit."""
    machines = ", ".join(dict.fromkeys(m.get("gpu") or m["cpu"] for m in about["machine"]))
    seeds = ", ".join(map(str, about["seeds"]))
    return f"{', '.join(about['dtype'])}, {machines}, seed {seeds}, commit {', '.join(about['commit'])}."


def _where(records: Iterable[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows with these values."""
    return [r for r in records if all(r[name] == value for name, value in wanted.items())]


def by_document(
    records: Iterable[Mapping[str, Any]], name: str, **where: Any
) -> dict[tuple[str, str], float]:
    """A column's mean in each document, over the rows with these values."""
    found: dict[tuple[str, str], list[float]] = {}
    for r in _where(records, **where):
        if r[name] is not None:
            found.setdefault((r["text"], r["document"]), []).append(r[name])
    return {document: fmean(values) for document, values in found.items()}


def ratio(
    over: Mapping[Any, float], under: Mapping[Any, float], level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of ``over`` by mean of ``under``, and its bootstrap interval (percentiles).

    A document is drawn with both of its values.
    """
    import numpy as np

    from bdlib import measure

    pairs = np.array([(over[key], under[key]) for key in over if key in under])
    value = float(pairs[:, 0].mean() / pairs[:, 1].mean())
    if len(pairs) < 2:
        return measure.Interval(value, None, None, len(pairs))
    drawn = np.random.default_rng(seed).integers(0, len(pairs), (9999, len(pairs)))
    means = pairs[drawn].mean(1)
    low, high = np.quantile(means[:, 0] / means[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return measure.Interval(value, float(low), float(high), len(pairs))


def robustness(
    records: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> tuple[Figure, Sequence[Axes]]:
    """Acceptance on generated text against context, and what a budget keeps of the full cache's.

    Beside it, as hollow marks, n-gram lookup's acceptance on the same outputs.
    """
    import matplotlib.pyplot as plt

    from bdlib import measure

    contexts = sorted({r["context"] for r in records})
    policies = sorted({r["policy"] for r in records}, key=lambda p: (p != "full", p))
    budget = next(r["budget"] for r in records if r["budget"] is not None)
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
    counts = []
    for i, policy in enumerate(policies):
        label = "full cache" if policy == "full" else f"{policy}, {budget}"
        at = [x + 0.12 * (i - 1) for x in range(len(contexts))]
        for column in ("acceptance_rate", "ngram_acceptance_rate"):
            own = column == "acceptance_rate"
            found = [by_document(records, column, policy=policy, context=c) for c in contexts]
            spans = [measure.interval(list(each.values())) for each in found]
            style = {"color": CYCLE[i], "mfc": CYCLE[i] if own else "white", "ls": "none"}
            for x, span in zip(at, spans, strict=True):
                words = label if own else "hollow: n-gram lookup, same output"
                left.errorbar(
                    x, span.mean, _reach(span), capsize=3, marker=MARKERS[i], label=words, **style
                )
                counts.append(span.n)
        if policy == "full":
            continue
        for x, context in zip(at, contexts, strict=True):
            sparse, full = (
                by_document(records, "acceptance_rate", policy=p, context=context)
                for p in (policy, "full")
            )
            style = {"color": CYCLE[i], "marker": MARKERS[i], "capsize": 3, "label": label}
            span = ratio(sparse, full)
            right.errorbar(x, span.mean, _reach(span), **style)
    right.axhline(1, color="black", lw=1)
    left.set(ylabel="acceptance of drafts", ylim=(0, None))
    right.set(ylabel=f"{budget} entries over full cache")
    for ax in (left, right):
        ax.set_xticks(range(len(contexts)), [_tick("context", c) for c in contexts])
        ax.set(xlabel="context (tokens)", xlim=(-0.5, len(contexts) - 0.5))
    _legend_above(fig, [left], 4)
    loops = sum(bool(r["looping"]) for r in records)
    caption(
        fig,
        f"SmolLM2-135M, {records[0]['drafter']}, sampling at temperature"
        f" {records[0]['temperature']}, {len(records)} outputs, {loops} of them loop;\n"
        f"n = {min(counts)} to {max(counts)} documents a point; bars: 95 % intervals over them."
        f" {origin(about)}",
    )
    return fig, (left, right)


def refreshed(records: Iterable[Mapping[str, Any]], drafter: str) -> list[Mapping[str, Any]]:
    """Rows of a drafter on the windows on which every point of their regime was measured."""
    own = [r for r in records if r["drafter"] == drafter]
    kept = []
    for regime in dict.fromkeys(r["regime"] for r in own):
        here = [r for r in own if r["regime"] == regime]
        points: dict[tuple, set[int]] = {}
        for r in here:
            points.setdefault((r["policy"], r["budget"], r["refresh"]), set()).add(r["sample"])
        whole = set.intersection(*points.values())
        kept += [r for r in here if r["sample"] in whole]
    return kept


def refresh(
    records: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    drafter: str = "budgetdraft-feature-gpu",
) -> tuple[Figure, Sequence[Axes]]:
    """Acceptance against the rounds between selections: a panel a regime, a line a view.

    A sweep that was stopped has some windows for some points alone: only whole ones are drawn.
    """
    import matplotlib.pyplot as plt

    from bdlib import measure

    rows = refreshed(records, drafter)
    regimes = list(dict.fromkeys(r["regime"] for r in rows))
    rounds = sorted({r["refresh"] for r in rows}, key=lambda v: (v is None, v))
    views = list(dict.fromkeys((r["policy"], r["budget"]) for r in rows))
    size = 4.9 * len(regimes), 3.8
    fig, axes = plt.subplots(1, len(regimes), figsize=size, sharey=True, squeeze=False)
    told = []
    for ax, regime in zip(axes[0], regimes, strict=True):
        here = [r for r in rows if r["regime"] == regime]
        for i, (policy, budget) in enumerate(views):
            place = {"policy": policy, "budget": budget}
            spans = [
                measure.interval(
                    list(by_document(here, "acceptance_rate", **place, refresh=k).values())
                )
                for k in rounds
            ]
            at = [x + 0.1 * (i - (len(views) - 1) / 2) for x in range(len(rounds))]
            style = {"color": CYCLE[i], "marker": MARKERS[i]}
            ax.plot(at, [s.mean for s in spans], label=f"{policy}, {budget}", **style)
            for x, span in zip(at, spans, strict=True):
                ax.errorbar(x, span.mean, _reach(span), color=CYCLE[i], capsize=3, lw=1)
        free = [
            fmean(by_document(here, "ngram_acceptance_rate", refresh=k).values()) for k in rounds
        ]
        ax.plot(range(len(rounds)), free, color="black", ls=":", lw=1.6, label="n-gram lookup")
        documents = len({r["document"] for r in here})
        loops = sum(bool(r["looping"]) for r in here)
        told.append(f"{regime}: n = {documents} documents, {loops} of {len(here)} outputs loop")
        ax.set_xticks(range(len(rounds)), ["never" if k is None else str(k) for k in rounds])
        ax.set(title=regime, xlabel="rounds between selections")
    axes[0][0].set(ylabel="acceptance of drafts", ylim=(0, 1))
    _legend_above(fig, axes[0][:1], 5)
    context, gamma = rows[0]["context"], rows[0]["gamma"]
    caption(
        fig,
        f"SmolLM2-135M, {drafter}, {context:,} tokens, gamma {gamma}. {'; '.join(told)}.\n"
        f"Bars: 95 % intervals over documents; {origin(about)}",
    )
    return fig, axes[0]


# ---------------------------------------------------- methods side by side (rows of bdlib.baselines)


def methods_compared(rows: Sequence[Mapping[str, Any]]) -> tuple[Figure, Sequence[Axes]]:
    """Speed against plain decoding, and beside it acceptance next to repetition: a line a method.

    Parameters
    ----------
    rows
        What :func:`bdlib.baselines.summarise` returns. Bars are 95 % intervals over documents.
    """
    import matplotlib.pyplot as plt

    names = [row["method"] for row in rows]
    at = range(len(rows))
    height = 1.6 + 0.34 * len(rows)
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, height), sharey=True)
    for y, row in zip(at, rows, strict=True):
        ours = row["engine"] == "bdlib"
        style = {"fmt": "o" if ours else "s", "color": COLORS["blue" if ours else "vermillion"]}
        label = "this library" if ours else "transformers"
        left.errorbar(
            row["speedup"].mean, y, xerr=_reach(row["speedup"]), capsize=3, label=label, **style
        )
    left.axvline(1, color="black", ls="--", lw=1)
    left.set(xlabel="speed (times plain decoding)", title="How fast", xlim=(0, None))
    left.set_yticks(list(at), names)
    left.invert_yaxis()
    looks = {
        "acceptance_rate": ("accepted drafts", "^", "green", 0.0),
        "ngram_acceptance_rate": ("accepted of n-gram lookup", "D", "orange", 0.16),
        "distinct_2": ("distinct-2 (low: repetition)", "x", "grey", -0.16),
    }
    for name, (label, marker, color, shift) in looks.items():
        known = [
            (y, row[name]) for y, row in zip(at, rows, strict=True) if row[name].mean is not None
        ]
        for y, found in known:
            style = {"fmt": marker, "color": COLORS[color], "capsize": 2, "elinewidth": 1, "ms": 5}
            right.errorbar(found.mean, y + shift, xerr=_reach(found), label=label, **style)
    right.set(
        xlabel="share", title="How often right, and how varied the output", xlim=(-0.03, 1.05)
    )
    handles: dict[str, Any] = {}
    for ax in (left, right):
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    fig.legend(handles.values(), handles, loc="outside upper left", ncols=5, fontsize=9)
    return fig, (left, right)


def _reach(found: Any) -> list[list[float]] | None:
    """An interval as matplotlib's distances from its middle; none of a single value."""
    if found.low is None:
        return None
    return [[max(0.0, found.mean - found.low)], [max(0.0, found.high - found.mean)]]


def method_bytes(rows: Sequence[Mapping[str, Any]]) -> tuple[Figure, Sequence[Axes]]:
    """What drafting adds in memory: keys and values, and weights, a bar a method (megabytes)."""
    import matplotlib.pyplot as plt

    drafting = [row for row in rows if row["gamma"] is not None]
    names = [row["method"] for row in drafting]
    fig, axes = plt.subplots(1, 2, figsize=(10, 1.4 + 0.32 * len(names)), sharey=True)
    parts = (("kv_bytes_drafter", "keys and values", ""), ("weight_bytes_drafter", "weights", "//"))
    for ax, (name, title, hatch) in zip(axes, parts, strict=True):
        sizes = [row[name] / 1e6 for row in drafting]
        bars = ax.barh(names, sizes, 0.6, color=COLORS["sky"], hatch=hatch, edgecolor="white")
        ax.bar_label(bars, [f"{size:.1f}" for size in sizes], padding=3, fontsize=9)
        ax.set(xlabel="added by drafting (MB)", title=title, xlim=(0, 1.18 * max(sizes) or 1))
    axes[0].invert_yaxis()
    return fig, axes


def two_levels() -> tuple[Figure, Axes]:
    """The three models of a hierarchy (TriForce), what each keeps, and what goes between them."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(9.5, 3.3))
    boxes = (
        (0.0, "small model", "a few layers", "sparse cache", "purple"),
        (3.6, "middle: the target", "all its layers", "sparse cache", "green"),
        (7.2, "the target", "all its layers", "full cache", "blue"),
    )
    for x, name, layers, cache, color in boxes:
        face = {"facecolor": COLORS[color], "alpha": 0.18, "edgecolor": "none"}
        edge = {"fill": False, "edgecolor": COLORS[color], "linewidth": 2}
        for style in (face, edge):
            ax.add_patch(plt.Rectangle((x, 0), 2.3, 2, **style))
        ax.text(x + 1.15, 1.55, name, ha="center", weight="bold", fontsize=11)
        ax.text(x + 1.15, 0.95, layers, ha="center", fontsize=10)
        ax.text(x + 1.15, 0.4, cache, ha="center", fontsize=10)
    arrow = {"arrowstyle": "-|>", "lw": 1.8, "color": "#333333", "shrinkA": 0, "shrinkB": 0}
    for x, there, back in (
        (2.3, "drafts\n$\\gamma_{low}$ tokens", "accepts a part,\nadds one"),
        (5.9, "proposes\n$\\gamma$ tokens", "accepts a part,\nadds one"),
    ):
        ax.annotate("", (x + 1.25, 1.4), (x + 0.05, 1.4), arrowprops=arrow)
        ax.text(x + 0.65, 1.5, there, ha="center", va="bottom", fontsize=9)
        ax.annotate("", (x + 0.05, 0.6), (x + 1.25, 0.6), arrowprops=arrow)
        ax.text(x + 0.65, 0.48, back, ha="center", va="top", fontsize=9)
    ax.annotate("", (10.3, 1.0), (9.55, 1.0), arrowprops=arrow)
    ax.text(10.35, 1.0, "text", va="center", fontsize=11, weight="bold")
    for x, words in (
        (2.95, "lower round: several in a proposal"),
        (6.55, "round: one verification"),
    ):
        ax.text(x, -0.45, words, ha="center", fontsize=9, color="#444444")
    ax.set(xlim=(-0.1, 11), ylim=(-0.7, 2.5))
    ax.axis("off")
    return fig, ax


# -------------------------------------------------------------------- speed: fixed choices


def speed(
    records: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    drafter: str = "budgetdraft-feature-gpu",
) -> tuple[Figure, Sequence[Axes]]:
    """Speed-up over plain decoding against draft length, budget, context and policy.

    A faint mark is a document, a line goes through their medians. Outputs that loop are a line of
    their own, whatever was asked for.
    """
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 2, figsize=(11, 8.4))
    shared = {"policy": "chunk_topk_recent", "budget": 256}
    at_three = {"drafter": drafter, "gamma": 3}
    # Answers are greedy: every choice decodes the same text, and what differs is the choice.
    answers = _where(records, regime="chat", looping=False)
    own = _where(answers, **at_three)
    lengths = _most_varied("gamma", _where(answers, **shared))
    budgets = _most_varied("budget", _where(own, policy="chunk_topk_recent"))
    budgets += _most_varied("budget", _where(own, policy="full"))
    everywhere = [
        r
        for r in _where(records, drafter="ngram") + _where(records, **at_three, **shared)
        if r["regime"] != "greedy" or r["looping"]
    ]
    policies = _most_varied("policy", _where(own, budget=256))

    def at_context(r: Mapping[str, Any]) -> str:
        return f"{r['context']:,} tokens"

    def lines_of(r: Mapping[str, Any]) -> str:
        return f"{r['drafter']}, {at_context(r)}"

    def asked(r: Mapping[str, Any]) -> str:
        return f"{r['drafter']}, {'loops' if r['looping'] else r['regime']}"

    texts, at = (", ".join(sorted({r["text"] for r in rows})) for rows in (lengths, budgets))
    for ax, across, label, rows, series_of, title in zip(
        axes.flat,
        ("gamma", "budget", "context", "policy"),
        ("draft length gamma (tokens)", "budget (entries)", "context (tokens)", "policy"),
        (lengths, budgets, everywhere, policies),
        (lines_of, at_context, asked, at_context),
        (
            f"chat, {texts}, budget 256",
            f"chat, gamma 3, {at}",
            "budget 256, gamma 3 (lookup 4), all texts",
            f"chat, gamma 3, {at}, budget 256",
        ),
        strict=True,
    ):
        _speeds(ax, across, rows, series_of)
        ax.set(xlabel=label, ylabel="speed-up over plain decoding")
        ax.set_title(title, fontsize=10)
    caption(
        fig,
        "SmolLM2-135M, decoding alone; sampling at temperature 0.7, all else greedy;"
        f" {len(records)} outputs of {about['grid']['new_tokens']} tokens,\n"
        f"faint marks: documents, lines: medians; {about['threads'][0]} threads. {origin(about)}",
    )
    return fig, list(axes.flat)


def _most_varied(name: str, records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of the drafters, contexts and texts that were measured at most values of a column."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for r in records:
        groups.setdefault((r["drafter"], r["context"], r["text"]), []).append(r)
    counts = {key: len({r[name] for r in own}) for key, own in groups.items()}
    most = max(counts.values(), default=0)
    return [r for key, own in groups.items() if counts[key] == most for r in own]


def _speeds(
    ax: Axes,
    across: str,
    records: Sequence[Mapping[str, Any]],
    series_of: Callable[[Mapping[str, Any]], str],
) -> None:
    """Speed-ups against a column: a line through the medians of each series, a mark a document."""
    values = sorted({r[across] for r in records}, key=lambda v: (v is None, v))
    order = sorted(
        (r["drafter"], r["looping"], r["regime"], r["context"], series_of(r)) for r in records
    )
    for i, series in enumerate(dict.fromkeys(key[-1] for key in order)):
        style = {"color": CYCLE[i], "marker": MARKERS[i]}
        own = [r for r in records if series_of(r) == series]
        places, medians = [], []
        for x, value in enumerate(values):
            each = [r["speedup_decode"] for r in _where(own, **{across: value})]
            if each:
                places.append(x + 0.08 * (i - 1))
                medians.append(median(each))
                ax.plot(places[-1:] * len(each), each, ls="none", alpha=0.3, ms=4, **style)
        joined = {"ls": "none"} if across == "policy" else {}
        ax.plot(places, medians, label=series, **style, **joined)
    ax.axhline(1, color="black", ls="--", lw=1)
    small = {"fontsize": 9} if across == "policy" else {}
    ax.set_xticks(range(len(values)), [_tick(across, v) for v in values], **small)
    ax.set_ylim(0, 1.3 * ax.get_ylim()[1])  # room for the legend
    ax.legend(loc="upper left", fontsize=8, ncols=2)


# -------------------------------------------------------------------- speed: the controller


def controller(
    records: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> tuple[Figure, Sequence[Axes]]:
    """Speed-up of each document with the controller, by context: a panel a regime.

    Outputs that loop are hollow; a bar is the median of those that do not.
    """
    from bdlib.measure import COPIES

    fig, axes, steered = _steered_panels(records, 4.4)
    series = list(dict.fromkeys((r["policy"], r["drafter"].endswith(COPIES)) for r in steered))
    contexts = sorted({r["context"] for r in steered})
    step = 0.8 / max(2, len(series))
    for regime, ax in axes.items():
        for i, (policy, copied) in enumerate(series):
            name = policy + ", copies" * copied
            for x, context in enumerate(contexts):
                found = _where(steered, regime=regime, policy=policy, context=context)
                found = [r for r in found if r["drafter"].endswith(COPIES) == copied]
                middle = x + step * (i - (len(series) - 1) / 2)
                for looping in (False, True):
                    own = [r["speedup_decode"] for r in found if r["looping"] == looping]
                    gap = min(0.03, 0.75 * step / max(1, len(own)))
                    _column(ax, middle, own, gap, i, looping, label="" if looping else name)
                straight = [r["speedup_decode"] for r in found if not r["looping"]]
                if straight:
                    ends = [middle - 0.42 * step, middle + 0.42 * step]
                    ax.plot(ends, [median(straight)] * 2, "k", lw=2)
        ax.set_xticks(range(len(contexts)), [_tick("context", c) for c in contexts])
    panels = list(axes.values())
    panels[0].set(ylabel="speed-up over plain decoding", ylim=(0.8, None))
    _legend_above(fig, panels[:1], 4)
    first = steered[0]
    caption(
        fig,
        f"{_named(steered)}, budget {first['budget']}, gamma at most {first['gamma']}; decoding alone;"
        " hollow: the output loops; bars: medians of those that do not;\n"
        f"{about['threads'][0]} threads. {origin(about)}",
    )
    return fig, panels


def _steered_panels(
    records: Iterable[Mapping[str, Any]], height: float
) -> tuple[Figure, dict[str, Axes], list[Mapping[str, Any]]]:
    """A figure with a panel a regime, contexts along it and a line at 1; and the controller's runs."""
    import matplotlib.pyplot as plt

    steered = [r for r in records if r["controller"]]
    regimes = list(dict.fromkeys(r["regime"] for r in steered))
    size = 5 * len(regimes), height
    fig, axes = plt.subplots(1, len(regimes), figsize=size, sharey=True, squeeze=False)
    for ax, regime in zip(axes[0], regimes, strict=True):
        ax.axhline(1, color="black", ls="--", lw=1, zorder=2.1)  # marks leave it visible
        ax.set(xlabel="context (tokens)", title=regime)
    return fig, dict(zip(regimes, axes[0], strict=True)), steered


def against_shortest(
    records: Sequence[Mapping[str, Any]], looping: bool | None = False
) -> list[dict[str, Any]]:
    """What a longer context changes on the same texts: speed-up, and the two parts that it is made of.

    Speed-up is tokens a round over what a round costs, in plain steps. Each is set beside itself at the
    shortest context, prompt by prompt: the windows end at the same places, so nothing differs but what
    was read before.

    Parameters
    ----------
    records
        Rows of a sweep with ``within`` (see :class:`bdlib.measure.MeasureSettings`).
    looping
        Only pairs of which neither output (``False``) or both (``True``) go in circles; ``None`` takes
        all of them.

    Returns
    -------
    list of dict
        For each longer context: ``context``, and ``speedup``, ``tokens`` and ``cost``, geometric means
        over prompts with their 95 % bootstrap intervals (:class:`bdlib.measure.Interval`). A prompt's
        policies are averaged first, so that it counts once.

    Raises
    ------
    ValueError
        If the windows do not end at the same places, or there is one context.
    """
    from bdlib import measure

    contexts = sorted({r["context"] for r in records})
    if len(contexts) < 2:
        raise ValueError(f"contexts {contexts} must be at least two to be compared")
    runs: dict[tuple, dict[int, Mapping[str, Any]]] = {}
    for r in records:
        key = r["text"], r["sample"], r["policy"], r["drafter"]
        runs.setdefault(key, {})[r["context"]] = r
    rows = []
    for context in contexts[1:]:
        logs: dict[tuple, list[tuple[float, float]]] = {}
        for (text, sample, *_), own in runs.items():
            if contexts[0] not in own or context not in own:
                continue
            short, long = own[contexts[0]], own[context]
            ends = [(r["document"], r["offset"] + r["context"]) for r in (short, long)]
            if ends[0] != ends[1]:
                raise ValueError(
                    f"sample {sample} of {text!r} ends at token {ends[0][1]} of {ends[0][0]!r} at"
                    f" {contexts[0]}, at {ends[1][1]} of {ends[1][0]!r} at {context}: measure with"
                    " 'within'"
                )
            if looping is None or {short["looping"], long["looping"]} == {looping}:
                gain, tokens = (
                    math.log(long[name] / short[name])
                    for name in ("speedup_decode", "accepted_length")
                )
                logs.setdefault((text, sample), []).append((gain, tokens))
        means = [tuple(map(fmean, zip(*own, strict=True))) for own in logs.values()]
        parts = {
            "speedup": [gain for gain, _ in means],
            "tokens": [tokens for _, tokens in means],
            "cost": [tokens - gain for gain, tokens in means],
        }
        rows.append({"context": context} | {n: _exp(measure.interval(v)) for n, v in parts.items()})
    return rows


def _exp(span: Interval) -> Interval:
    """The interval of a geometric mean from that of the logarithms' mean."""
    ends = (None if end is None else math.exp(end) for end in span[:3])
    return type(span)(*ends, span.n)


def longer(
    records: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> tuple[Figure, Sequence[Axes]]:
    """:func:`against_shortest` of the runs with a controller that do not loop: a panel a regime."""
    fig, axes, steered = _steered_panels(records, 4)
    shortest = min(r["context"] for r in steered)
    series = {"tokens": "tokens a round", "cost": "cost of a round", "speedup": "speed-up"}
    for regime, ax in axes.items():
        rows = against_shortest(_where(steered, regime=regime))
        for i, (name, label) in enumerate(series.items()):
            for x, row in enumerate(rows):
                span = row[name]
                if span.n:
                    style = {"marker": MARKERS[i], "color": CYCLE[i], "ls": "none", "capsize": 3}
                    place = x + 0.2 * (i - 1)
                    ax.errorbar(place, span.mean, _reach(span), label=label, **style)
        named = [f"{_tick('context', r['context'])}\n(n = {r['tokens'].n})" for r in rows]
        ax.set_xticks(range(len(rows)), named)
        ax.set_xlim(-0.5, len(rows) - 0.5)
    panels = list(axes.values())
    panels[0].set_ylabel(f"over that at {shortest:,} tokens")
    _legend_above(fig, panels[:1], 3)
    first = steered[0]
    caption(
        fig,
        f"{_named(steered)}, budget {first['budget']}, controller; same texts, ending at the same"
        " places; outputs that do not loop; geometric means over n texts, 95 % intervals;\n"
        f"{about['threads'][0]} threads. {origin(about)}",
    )
    return fig, panels


def _named(records: Iterable[Mapping[str, Any]]) -> str:
    """The drafters' names, with copies or without."""
    from bdlib.measure import COPIES

    return ", ".join(dict.fromkeys(r["drafter"].removesuffix(COPIES) for r in records))


def against_without(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What copies of repeated text (:mod:`bdlib.copies`) add to a drafter, prompt by prompt.

    Returns
    -------
    list of dict
        The rows of each drafter with copies that was measured without them too, on the same prompt and
        with the same settings: its row, with ``speedup`` and ``tokens`` (a round), each over that
        without copies, and ``looping`` if either output goes in circles.

    Raises
    ------
    ValueError
        If there is no such pair.
    """
    from bdlib.measure import COPIES

    axes = (
        "regime",
        "policy",
        "budget",
        "context",
        "gamma",
        "controller",
        "text",
        "sample",
        "seed",
    )
    runs = {(r["drafter"], *(r[name] for name in axes)): r for r in records}
    rows = []
    for (name, *rest), r in runs.items():
        without = runs.get((name.removesuffix(COPIES), *rest))
        if name.endswith(COPIES) and without is not None:
            gain, tokens = (r[n] / without[n] for n in ("speedup_decode", "accepted_length"))
            looping = r["looping"] or without["looping"]
            rows.append({**r, "speedup": gain, "tokens": tokens, "looping": looping})
    if not rows:
        raise ValueError(f"no drafter was measured both with {COPIES} and without")
    return rows


def copies(
    records: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> tuple[Figure, Sequence[Axes]]:
    """:func:`against_without` of the runs with a controller: a panel a regime, a mark a text.

    Hollow marks are texts on which an output loops; bars are geometric means of the others with their
    95 % intervals.
    """
    from bdlib import measure

    fig, axes, steered = _steered_panels(records, 4.2)
    rows = against_without(steered)
    contexts = sorted({r["context"] for r in rows})
    ticks = (0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.6, 2)
    for regime, ax in axes.items():
        for x, context in enumerate(contexts):
            own = _where(rows, regime=regime, context=context)
            for hollow in (False, True):
                gains = [r["speedup"] for r in own if r["looping"] == hollow]
                _column(ax, x, gains, 0.02, x, hollow)
            logs = [math.log(r["speedup"]) for r in own if not r["looping"]]
            if logs:
                _bar(ax, x, _exp(measure.interval(logs)))
        ax.set_xticks(range(len(contexts)), [_tick("context", c) for c in contexts])
        ax.set_yscale("log")
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        ax.set_yticks([], minor=True)
    panels = list(axes.values())
    panels[0].set(ylabel="speed with copies over without")
    first = rows[0]
    caption(
        fig,
        f"{_named(rows)}, {first['policy']}, budget {first['budget']}, controller; a mark a text, hollow:"
        f" an output loops;\nbars: geometric means of the others, 95 % intervals."
        f" {about['threads'][0]} threads. {origin(about)}",
    )
    return fig, panels


def _column(
    ax: Axes, x: float, values: Iterable[float], gap: float, i: int, hollow: bool, label: str = ""
) -> None:
    """Marks of the i-th look around ``x``, ascending, each ``gap`` further right."""
    values = sorted(values)
    spread = [x + gap * (n - len(values) / 2) for n in range(len(values))]
    style = {"color": CYCLE[i], "mfc": "none" if hollow else CYCLE[i], "ms": 6}
    ax.plot(spread, values, MARKERS[i], label=label, **style)


def _bar(ax: Axes, x: float, span: Interval) -> None:
    """A mean and its interval over a column of marks."""
    style = {"color": "black", "capsize": 5, "lw": 2, "marker": "_", "ms": 22}
    ax.errorbar(x, span.mean, _reach(span), **style)


def against_fixed(
    records: Sequence[Mapping[str, Any]], looping: bool | None = False
) -> list[dict[str, Any]]:
    """What a controller's choices were worth beside each fixed draft length, on the same prompts.

    Parameters
    ----------
    records
        Rows of :mod:`bdlib.baselines` with one method ``NAME:auto`` and others ``NAME:GAMMA``.
    looping
        Only prompts on which no output (``False``) or at least one (``True``) goes in circles
        (``distinct_2`` below 0.5); ``None`` takes all of them.

    Returns
    -------
    list of dict
        For each fixed length, shortest first: ``gamma``; ``ratios``, the controller's speed over its on
        each prompt; ``over``, their mean as a :class:`bdlib.measure.Interval`; ``mean`` and ``median``
        of its own speed-up over plain decoding. Then the controller: ``gamma`` ``None``, ``mean`` and
        ``median``, and ``over``, its mean by the greatest of those means. Nothing without such prompts.

    Raises
    ------
    ValueError
        If there is no fixed length, or a prompt without the controller.
    """
    from bdlib import baselines, measure, sweeps

    prompts: dict[Any, dict[str, Mapping[str, Any]]] = {}
    for r in records:
        length = r["method"].rpartition(":")[2]
        prompts.setdefault(r["sample"], {})[length] = r
    kept = [
        own
        for own in prompts.values()
        if looping in (None, any(r["distinct_2"] < sweeps.LOOPING for r in own.values()))
    ]
    lengths = sorted({int(name) for own in prompts.values() for name in own if name.isdecimal()})
    if not kept:
        return []
    if not lengths or any(baselines.AUTO not in own for own in kept):
        raise ValueError(
            "no prompt was decoded both with a controller and with a fixed draft length"
        )

    def row(length: str) -> dict[str, Any]:
        gains = [own[length]["speedup"] for own in kept]
        return {"mean": fmean(gains), "median": median(gains)}

    rows = []
    for gamma in lengths:
        pairs = ((own[baselines.AUTO], own[str(gamma)]) for own in kept)
        ratios = [steered["tokens_per_second"] / r["tokens_per_second"] for steered, r in pairs]
        over = measure.interval(ratios)
        rows.append(row(str(gamma)) | {"gamma": gamma, "ratios": ratios, "over": over})
    steered = row(baselines.AUTO)
    best = max(one["mean"] for one in rows)
    return [*rows, steered | {"gamma": None, "over": steered["mean"] / best}]


def contests(
    folder: Path,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Archived comparisons with fixed draft lengths, by regime, and what they say of themselves.

    Reads ``fixed_REGIME_TEXT.csv`` in the folder, files of ``python -m bdlib bench baselines``.
    """
    from bdlib import baselines

    found, about, runs = {}, {}, []
    for regime in ("sampling", "chat"):
        paths = sorted(folder.glob(f"fixed_{regime}_*.csv"))
        found[regime], about = baselines.load_all(paths)
        runs += about["runs"]
    return found, about | {"runs": runs}


def fixed(
    contests: Mapping[str, Sequence[Mapping[str, Any]]], about: Mapping[str, Any]
) -> tuple[Figure, Sequence[Axes]]:
    """Speed with a controller over that with each fixed draft length: a panel a regime, a mark a prompt.

    Hollow marks are prompts on which an output loops; bars are means of the others with their 95 %
    intervals.
    """
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(contests), figsize=(10, 4.2), sharey=True, squeeze=False)
    for ax, (regime, records) in zip(axes[0], contests.items(), strict=True):
        straight, loops = (against_fixed(records, looping)[:-1] for looping in (False, True))
        for hollow, rows in ((False, straight), (True, loops)):
            for x, row in enumerate(rows):
                _column(ax, x, row["ratios"], 0.02, x, hollow)
        for x, row in enumerate(straight):
            _bar(ax, x, row["over"])
        ax.axhline(1, color="black", ls="--", lw=1)
        ax.set_xticks(range(len(straight)), [f"fixed {row['gamma']}" for row in straight])
        ax.set(xlabel="draft length", title=f"{regime}, n = {len(straight[0]['ratios'])}")
    axes[0, 0].set(ylabel="speed with controller over fixed")
    here, of = about["runs"], about["settings"]
    who = next(iter(contests.values()))[0]["method"].partition(":")[0]
    commits = ", ".join(dict.fromkeys(run["commit"][:7] for run in here))
    caption(
        fig,
        f"{who}, context {of['context']:,}, budget {of['budget']}, all choices in turns on each prompt;\n"
        f"bars: means and 95 % intervals, hollow: an output loops."
        f" SmolLM2-135M, {here[0]['threads']} threads, seed {of['seed']}, commit {commits}.",
    )
    return fig, axes[0]


def predictions(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The speed-up of a draft length on a prompt, from every other draft length there.

    Acceptance belongs to the text: by position, from all runs on the prompt with other draft lengths.
    Costs belong to the machine: of the next shorter and the next longer draft, in plain steps, medians
    over all prompts of the same settings, and between the two on a straight line.
    :func:`bdlib.controllers.predict` says what the draft length in between should give; its own runs
    have no part in it. Prompts with fewer than three draft lengths are left out.

    Parameters
    ----------
    records
        Rows of a sweep's ``records.csv`` that generated text.

    Returns
    -------
    list
        The row of each run in between, with ``predicted`` beside its ``speedup_decode``.
    """
    from bdlib.controllers import Costs, predict

    axes = ("regime", "drafter", "policy", "budget", "context", "temperature", "refresh", "seed")
    groups: dict[tuple, dict[tuple, dict[int, Mapping[str, Any]]]] = {}
    for r in records:
        if not r["controller"]:
            prompts = groups.setdefault(tuple(r[name] for name in axes), {})
            prompts.setdefault((r["text"], r["sample"]), {})[r["gamma"]] = r
    out = []
    for prompts in groups.values():
        each: dict[int, list[tuple[float, ...]]] = {}
        for gamma, r in (pair for runs in prompts.values() for pair in runs.items()):
            each.setdefault(gamma, []).append(_steps_of_a_round(r))
        usual = {gamma: [*map(median, zip(*of, strict=True))] for gamma, of in each.items()}
        for runs in prompts.values():
            lengths = sorted(runs)
            for shorter, gamma, longer in zip(lengths, lengths[1:], lengths[2:], strict=False):
                ends = {length: usual[length] for length in (shorter, longer)}
                costs = Costs(
                    1.0,
                    {length: draft for length, (draft, *_) in ends.items()},
                    {length + 1: verify for length, (_, verify, _) in ends.items()},
                    fmean(select for *_, select in ends.values()),
                )
                alphas = _acceptance_of([runs[length] for length in lengths if length != gamma])
                said = predict(alphas, gamma, costs).speedup
                out.append({**runs[gamma], "predicted": said})
    return out


def _steps_of_a_round(r: Mapping[str, Any]) -> tuple[float, ...]:
    """What drafting, verifying and selecting take in a round, in plain steps of the same turn."""
    a_step = r["rounds"] / r["ar_tokens_per_second"]
    return tuple(r[f"{phase}_seconds"] / a_step for phase in ("draft", "verify", "select"))


def _acceptance_of(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Acceptance by position over several runs, each counted by its rounds."""
    longest = max(r["gamma"] for r in runs)
    tried, hit = [0.0] * longest, [0.0] * longest
    for r in runs:
        reached = float(r["rounds"])
        for i, share in enumerate(r["by_position"]):
            tried[i] += reached
            reached *= share
            hit[i] += reached
    return [h / t if t else 0.0 for h, t in zip(hit, tried, strict=True)]


def predicted(
    records: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> tuple[Figure, Axes]:
    """Predicted against measured speed-up (:func:`predictions`), a mark a document and draft length."""
    import matplotlib.pyplot as plt

    rows = predictions(records)
    fig, ax = plt.subplots(figsize=(5.6, 5.2))
    for i, regime in enumerate(dict.fromkeys(r["regime"] for r in rows)):
        own = [r for r in rows if r["regime"] == regime]
        off = [abs(r["predicted"] / r["speedup_decode"] - 1) for r in own]
        ax.plot(
            [r["predicted"] for r in own],
            [r["speedup_decode"] for r in own],
            MARKERS[i],
            color=CYCLE[i],
            mfc="none",
            label=f"{regime}: off by {median(off):.0%} in the median",
        )
    every = [r[name] for r in rows for name in ("predicted", "speedup_decode")]
    ends = (0.9 * min(every), 1.05 * max(every))
    ax.plot(ends, ends, color="black", ls="--", lw=1)
    ax.set(xlabel="predicted speed-up", ylabel="measured speed-up", xlim=ends, ylim=ends)
    ax.legend(loc="upper left", fontsize=9)
    gammas = ", ".join(map(str, sorted({r["gamma"] for r in rows})))
    caption(
        fig,
        f"{rows[0]['drafter']}, gamma {gammas}: acceptance from other drafts\n"
        f"on the same prompt, costs from all prompts; n = {len(rows)}.\n{origin(about)}",
    )
    return fig, ax
