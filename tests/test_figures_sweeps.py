"""Trainings, generated text and refresh intervals: what the figures of archived sweeps compute and draw."""

import json

import matplotlib
import pytest

from bdlib import archive, figures, sweeps

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ABOUT = {
    "dtype": ["bfloat16"],
    "seeds": [1],
    "commit": ["abc1234"],
    "machine": [{"cpu": "a CPU", "gpu": "a GPU"}, {"cpu": "a CPU"}],
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def forced(drafter, value, document="one", offset=0, policy="chunk_topk", budget=128, context=2048):
    place = {"text": "books", "document": document, "offset": offset, "context": context}
    view = {"drafter": drafter, "policy": policy, "budget": budget}
    return view | place | {"alpha": value, "agreement": value}


def full(drafter, value, **place):
    return forced(drafter, value, policy="full", budget=None, **place)


ONE, TWO = {"document": "one"}, {"document": "two"}
TRAINED = [
    forced("full-only", 0.30, **ONE),
    forced("full-only", 0.50, offset=9, **ONE),
    forced("full-only", 0.20, **TWO),
    forced("many", 0.34, **ONE),
    forced("many", 0.52, offset=9, **ONE),  # document one: +0.04 and +0.02
    forced("many", 0.21, **TWO),  # +0.01
    *(full(d, v, **ONE) for d, v in (("full-only", 0.4), ("many", 0.42))),
    *(full(d, v, offset=9, **ONE) for d, v in (("full-only", 0.6), ("many", 0.60))),
    *(full(d, v, **TWO) for d, v in (("full-only", 0.3), ("many", 0.30))),
]


def test_windows_of_a_document_are_averaged_before_documents():
    found = figures.above(TRAINED, "alpha", "many", "chunk_topk", 128)
    assert found.n == 2
    assert found.mean == pytest.approx((0.03 + 0.01) / 2)


def test_what_the_full_cache_gains_is_taken_off_window_by_window():
    found = figures.above(TRAINED, "alpha", "many", "chunk_topk", 128, beyond_full=True)
    assert found.mean == pytest.approx(((0.02 + 0.02) / 2 + 0.01) / 2)
    own = figures.above(TRAINED, "alpha", "many", "full", None)
    assert own.mean == pytest.approx((0.01 + 0) / 2)


def test_a_window_that_one_of_the_two_lacks_is_left_out():
    rows = [
        *TRAINED,
        forced("many", 0.9, document="three"),
        forced("full-only", 0.1, document="four"),
    ]
    assert figures.above(rows, "alpha", "many", "chunk_topk", 128).n == 2


def test_map_numbers_the_cells_whose_interval_excludes_zero():
    rows = []
    for i in range(6):
        for drafter, gain in (
            ("full-only", 0),
            ("better", 0.01 + i / 1e4),
            ("even", (-1) ** i / 100),
        ):
            rows.append(forced(drafter, 0.3 + gain, document=str(i)))
            rows.append(full(drafter, 0.4, document=str(i)))
    fig, axes = figures.transfer(rows, ABOUT)
    for ax in axes:
        shown = {t.get_position(): t.get_text() for t in ax.texts if t.get_text()[:1] in "+-"}
        assert shown == {(0, 0): "+10.2"}
        assert [t.get_text() for t in ax.get_yticklabels()] == ["better", "even"]
        assert len(ax.patches) == 1
    assert "n = 6 documents, 6 windows" in fig.get_supxlabel()
    assert "a GPU, a CPU, seed 1, commit abc1234" in fig.get_supxlabel()


def test_ratio_is_of_means_and_draws_both_values_of_a_document():
    under = {"a": 0.2, "b": 0.4, "c": 0.3}
    found = figures.ratio({k: v / 2 for k, v in under.items()} | {"d": 9.0}, under)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.n == 3
    assert figures.ratio({"a": 0.1}, under)[:3] == (0.5, None, None)
    other = figures.ratio({"a": 0.5, "b": 0.1, "c": 0.3}, under)
    assert other.mean == pytest.approx(1)
    assert other.low < 1 < other.high


def test_documents_are_means_of_the_rows_that_match():
    rows = [forced("many", v, offset=i) for i, v in enumerate((0.2, 0.4))]
    rows += [forced("many", 0.9, budget=256), forced("many", None, document="two")]
    assert figures.by_document(rows, "alpha", budget=128) == {("books", "one"): pytest.approx(0.3)}


def generated(sample, refresh, **changes):
    base = {"regime": "sampling", "drafter": "small", "policy": "snapkv", "budget": 128}
    base |= {
        "text": "books",
        "document": f"d{sample}",
        "context": 8192,
        "gamma": 3,
        "looping": False,
    }
    base |= {
        "acceptance_rate": 0.3 + sample / 100,
        "ngram_acceptance_rate": 0.1,
        "temperature": 0.7,
    }
    return base | {"sample": sample, "refresh": refresh} | changes


def test_a_stopped_sweep_is_drawn_on_windows_with_every_point():
    rows = [generated(s, k) for s in range(3) for k in (1, None)] + [generated(3, None)]
    rows += [generated(0, 1, drafter="self")]
    assert {r["sample"] for r in figures.refreshed(rows, "small")} == {0, 1, 2}
    fig, (ax,) = figures.refresh(rows, ABOUT, drafter="small")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "never"]
    assert "n = 3 documents, 0 of 6 outputs loop" in fig.get_supxlabel()


def test_generated_text_with_a_budget_beside_the_full_cache():
    rows = []
    for s in range(4):
        rows += [generated(s, None), generated(s, None, policy="full", budget=None, looping=s == 0)]
    fig, (left, right) = figures.robustness(rows, ABOUT)
    assert "8 outputs, 1 of them loop" in fig.get_supxlabel()
    assert right.lines[0].get_ydata()[0] == pytest.approx(1)
    assert left.get_ylim()[0] == 0


@pytest.mark.parametrize("name", ["transfer", "robustness", "refresh"])
def test_archive_is_drawn(name):
    folder = archive.results() / name
    if not folder.is_dir():
        pytest.skip("the archive is in a checkout")
    about = json.loads((folder / "records.json").read_text(encoding="utf8"))
    rows = sweeps.load(folder / "records.csv")
    assert len(rows) == about["measured"]
    assert {r["text"] for r in rows} <= {"books", "meetings", "narrative"}
    # Workers shared the machine: no speed may be read from these.
    assert all(r["tokens_per_second"] is r["speedup_decode"] is None for r in rows)
    fig, _ = getattr(figures, name)(rows, about)
    assert about["commit"][0] in fig.get_supxlabel()


# ------------------------------------------------------------------ from the archive, by one command


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("headline", {"headline"}),
        ("transfer", {"transfer"}),
        ("robustness", {"robustness"}),
        ("refresh", {"refresh"}),
        ("controller", {"controller", "predicted"}),
        ("paired", {"controller", "longer", "copies", "predicted", "fixed"}),
        ("speed", {"speed"}),
    ],
)
def test_an_archived_figure_is_drawn_by_one_command(name, files, tmp_path):
    from typer.testing import CliRunner

    from bdlib.__main__ import app

    out = tmp_path / "headline.png" if name == "headline" else tmp_path
    done = CliRunner().invoke(app, ["figure", name, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert {path.stem for path in tmp_path.glob("*.png")} == files
    assert min(path.stat().st_size for path in tmp_path.glob("*.png")) > 5000


# ------------------------------------------------------------------ the controller, and predictions


def decoded(gamma, speed, accepted=(0.5,), controller=False, sample=0, **more):
    """A run of 50 rounds on a machine on which everything is proportional: 0.1 s a plain step."""
    rounds = 50
    return {
        "regime": "sampling", "drafter": "d", "policy": "chunk_topk_recent", "budget": 256,
        "context": 4096, "gamma": gamma, "controller": controller, "text": "books",
        "temperature": 0.7, "refresh": None, "seed": 1, "sample": sample, "looping": False,
        "speedup_decode": speed, "ar_tokens_per_second": 10.0, "rounds": rounds,
        "draft_seconds": rounds * 0.01 * gamma, "verify_seconds": rounds * (0.1 + 0.002 * gamma),
        "select_seconds": 0.05, "by_position": list(accepted),
    } | more  # fmt: skip


def test_a_speedup_is_predicted_from_other_draft_lengths():
    runs = [
        decoded(1, 1.3, [0.6]),
        decoded(2, 1.4, [0.6, 0.5]),
        decoded(4, 1.5, [0.6, 0.5, 0.4, 0.3]),
        decoded(2, 9.9, controller=True),
        decoded(1, 1.0, sample=1),  # a window with two draft lengths has none in between
        decoded(4, 1.0, [0.5] * 4, sample=1),
    ]
    (row,) = figures.predictions(runs)
    assert (row["gamma"], row["speedup_decode"]) == (2, 1.4)
    assert row["predicted"] == pytest.approx((1 + 0.6 + 0.3) * 0.1 / (0.02 + 0.104 + 0.001))


def test_positions_that_only_one_run_reached_count_by_their_rounds():
    runs = [decoded(1, 1.0, [0.2]), decoded(2, 1.0, [0.4, 0.5]), decoded(3, 1.0, [0.4, 0.5, 0.5])]
    (row,) = figures.predictions(runs)
    expected = (1 + 0.3 + 0.3 * 0.5) * 0.1 / (0.02 + 0.104 + 0.001)
    assert row["predicted"] == pytest.approx(expected)


def test_a_prediction_takes_acceptance_from_the_prompt_and_costs_from_all_prompts():
    runs = [
        decoded(1, 1.0, [0.2]),
        decoded(2, 1.0, [0.9, 0.9]),  # what is predicted has no part in it
        decoded(3, 1.0, [0.4, 0.5, 0.5]),
        decoded(4, 1.0, [0.6, 0.5, 0.5, 0.5], draft_seconds=1e9),  # nor have costs further off
    ]
    slow = {"ar_tokens_per_second": 5.0}  # a slower machine: the same in plain steps
    for sample, times in ((1, 2.0), (2, 2.0), (3, 10.0)):  # and one that was disturbed
        for gamma in (1, 3):
            spent = {"draft_seconds": 0.5 * gamma * times, "select_seconds": 0.05 * times}
            spent["verify_seconds"] = 50 * (0.1 + 0.002 * gamma) * times
            runs.append(decoded(gamma, 1.0, [0.1] * gamma, sample=sample, **slow, **spent))
    found = {row["gamma"]: row["predicted"] for row in figures.predictions(runs)}
    assert set(found) == {2, 3}
    second = (0.4 + 0.6) * 0.5 / (0.4 + 0.6)
    expected = (1 + 0.4 + 0.4 * second) * 0.1 / (0.02 + 0.104 + 0.001)
    assert found[2] == pytest.approx(expected)


def test_the_controllers_figures_are_drawn():
    about = ABOUT | {"threads": [2]}
    runs = [
        decoded(g, s, [0.5] * g, policy=p, controller=c, looping=loop, context=n)
        for g, s, p, c, loop, n in (
            (6, 1.5, "chunk_topk_recent", True, False, 4096),
            (6, 1.7, "sink_window", True, False, 4096),
            (6, 2.9, "sink_window", True, True, 8192),
            (1, 1.2, "chunk_topk_recent", False, False, 4096),
            (2, 1.3, "chunk_topk_recent", False, False, 4096),
            (4, 1.4, "chunk_topk_recent", False, False, 4096),
        )
    ]
    axes = figures.controller(runs, about)[1]
    drawn = [y for line in axes[0].get_lines() for y in line.get_ydata()]
    assert {1.5, 1.7, 2.9} <= set(drawn)
    assert 1.2 not in drawn
    ax = figures.predicted(runs, about)[1]
    assert "off by" in ax.get_legend().get_texts()[0].get_text()


def paired(context, speed, tokens, sample=0, end=20_000, **more):
    """A run with the controller whose window ends at token ``end``."""
    run = decoded(6, speed, controller=True, sample=sample, context=context, **more)
    return run | {"accepted_length": tokens, "document": "d", "offset": end - context}


PAIRED = [
    paired(4096, 1.5, 2.0),
    paired(16384, 1.8, 2.0),
    paired(4096, 1.0, 1.5, policy="sink_window"),
    paired(16384, 1.2, 1.5, policy="sink_window"),
    paired(4096, 1.6, 2.0, sample=1),
    paired(16384, 1.6, 1.8, sample=1),
    paired(4096, 1.6, 2.0, sample=2),
    paired(16384, 3.2, 5.0, sample=2, looping=True),
    paired(4096, 1.6, 2.0, sample=3),
]


def test_a_longer_context_beside_the_shortest_by_hand():
    [row] = figures.against_shortest(PAIRED)
    assert row["context"] == 16384
    # The first prompt counts once: 1.2 under both policies. The loop has no pair, nor has the last.
    assert (row["speedup"].mean, row["speedup"].n) == (pytest.approx(1.2**0.5), 2)
    assert row["tokens"].mean == pytest.approx(0.9**0.5)
    assert row["cost"].mean == pytest.approx((1 / 1.2 * 0.9) ** 0.5)
    assert row["speedup"].low == pytest.approx(1)
    assert row["speedup"].high == pytest.approx(1.2)
    [every] = figures.against_shortest(PAIRED, None)
    assert [every[name].n for name in ("speedup", "tokens", "cost")] == [3, 3, 3]
    moved = [*PAIRED[:5], paired(16384, 1.6, 1.8, sample=1, end=20_001)]
    with pytest.raises(ValueError, match="sample 1 of 'books' ends at token 20000 of 'd' at 4096"):
        figures.against_shortest(moved)
    with pytest.raises(ValueError, match=r"contexts \[4096\] must be at least two"):
        figures.against_shortest(PAIRED[:1])


def test_a_longer_context_is_drawn_beside_the_shortest():
    axes = figures.longer(PAIRED, ABOUT | {"threads": [2]})[1]
    assert len(axes) == 1
    drawn = {round(float(y), 6) for line in axes[0].get_lines() for y in line.get_ydata()}
    assert {round(1.2**0.5, 6), round(0.9**0.5, 6), round((0.9 / 1.2) ** 0.5, 6)} <= drawn
    assert "n = 2" in axes[0].get_xticklabels()[0].get_text()


COPIED = [
    *PAIRED,
    paired(4096, 1.8, 2.5, drafter="d@copies"),
    paired(16384, 1.8, 2.0, drafter="d@copies"),
    paired(4096, 3.2, 3.0, sample=2, looping=True, drafter="d@copies"),
    paired(4096, 2.0, 3.0, sample=7, drafter="d@copies"),  # never without
]


def test_copies_beside_none_by_hand():
    rows = figures.against_without(COPIED)
    found = [(r["context"], r["sample"], r["speedup"], r["tokens"], r["looping"]) for r in rows]
    assert found == [
        (4096, 0, pytest.approx(1.2), pytest.approx(1.25), False),
        (16384, 0, pytest.approx(1.0), pytest.approx(1.0), False),
        (4096, 2, pytest.approx(2.0), pytest.approx(1.5), True),
    ]
    with pytest.raises(ValueError, match="no drafter was measured both with @copies and without"):
        figures.against_without(PAIRED)
    # Each drafter is beside itself at the shortest context.
    assert figures.against_shortest(COPIED)[0]["speedup"].n == 2


def test_copies_are_drawn_beside_none():
    about = ABOUT | {"threads": [2]}
    axes = figures.copies(COPIED, about)[1]
    drawn = {round(float(y), 6) for line in axes[0].get_lines() for y in line.get_ydata()}
    assert {1.2, 1.0, 2.0} <= drawn
    axes = figures.controller(COPIED, about)[1]
    labels = [text.get_text() for text in axes[0].get_figure().legends[0].get_texts()]
    assert labels == ["chunk_topk_recent", "sink_window", "chunk_topk_recent, copies"]


def contest(sample, speeds, distinct=0.9):
    """Rows of a comparison on one prompt: tokens a second by draft length, plain decoding at 10."""
    rows = [("plain", 10.0), *((f"drafter:{length}", speed) for length, speed in speeds.items())]
    return [
        {
            "method": name,
            "sample": sample,
            "tokens_per_second": speed,
            "speedup": speed / 10.0,
            "distinct_2": distinct,
        }
        for name, speed in rows
    ]


CONTEST = [
    *contest(0, {"auto": 18.0, "2": 15.0, "4": 20.0}),
    *contest(1, {"auto": 12.0, "2": 12.0, "4": 10.0}),
    *contest(2, {"auto": 40.0, "2": 20.0, "4": 25.0}, distinct=0.2),
]


def test_a_controller_beside_fixed_lengths_by_hand():
    two, four, own = figures.against_fixed(CONTEST)
    assert (two["gamma"], four["gamma"], own["gamma"]) == (2, 4, None)
    assert two["ratios"] == pytest.approx([1.2, 1.0])
    assert four["ratios"] == pytest.approx([0.9, 1.2])
    assert two["over"].mean == pytest.approx(1.1)
    assert (two["mean"], four["mean"], own["mean"]) == pytest.approx((1.35, 1.5, 1.5))
    assert own["over"] == pytest.approx(1.0)  # 1.5 beside the greater of two means
    assert [row["ratios"] for row in figures.against_fixed(CONTEST, True)[:2]] == [[2.0], [1.6]]
    assert len(figures.against_fixed(CONTEST, None)[0]["ratios"]) == 3
    with pytest.raises(ValueError, match="no prompt was decoded both with a controller"):
        figures.against_fixed(contest(0, {"auto": 18.0}))


def test_a_controller_beside_fixed_lengths_is_drawn():
    about = {
        "settings": {"context": 4096, "budget": 256, "seed": 1},
        "runs": [{"threads": 2, "commit": "0123456789"}],
    }
    axes = figures.fixed({"sampling": CONTEST, "chat": CONTEST[:8]}, about)[1]
    titles = [ax.get_title("left") or ax.get_title() for ax in axes]  # the style decides where
    assert titles == ["sampling, n = 2", "chat, n = 2"]
    for ax, looping in zip(axes, (True, False), strict=True):
        drawn = [y for line in ax.get_lines() for y in line.get_ydata()]
        assert {1.2, 0.9} <= {round(y, 6) for y in drawn}
        assert (2.0 in drawn) == looping


def test_speed_is_drawn_against_each_axis_and_loops_apart():
    """Every kind of point has a speed of its own, so that each can be looked for in its panel."""
    default = "chunk_topk_recent"
    lengths = [decoded(g, 1 + g / 100, regime="chat") for g in (1, 2, 3, 8)]
    budgets = [
        decoded(
            3,
            speed,
            regime="chat",
            text="narrative",
            budget=budget,
            policy="full" if budget is None else default,
        )
        for speed, budget in ((1.11, 128), (1.12, 256), (1.13, None))
    ]
    policies = [decoded(3, 1.21, regime="chat", text="narrative", policy="sink_window")]
    others = [
        decoded(3, 1.31, context=16384),
        decoded(3, 1.32, regime="chat", looping=True),
        decoded(4, 1.33, regime="greedy", looping=True, drafter="ngram", policy=None, budget=None),
        decoded(4, 1.34, regime="greedy", drafter="ngram", policy=None, budget=None),
    ]  # fmt: skip
    about = ABOUT | {"threads": [2], "grid": {"new_tokens": 64}}
    runs = [*lengths, *budgets, *policies, *others]
    axes = figures.speed(runs, about, drafter="d")[1]
    drawn = [{float(y) for line in ax.get_lines() for y in line.get_ydata()} for ax in axes]
    assert drawn[0] == {1, 1.01, 1.02, 1.03, 1.08}  # and the dashed line
    assert drawn[1] == {1, 1.11, 1.12, 1.13}
    assert {1.31, 1.32, 1.33} < drawn[2]
    assert 1.34 not in drawn[2]  # greedy text that does not loop is in no series
    assert drawn[3] == {1, 1.12, 1.21}
    names = {text.get_text() for text in axes[2].get_legend().get_texts()}
    assert names == {"d, sampling", "d, chat", "d, loops", "ngram, loops"}
