"""The figures of a teacher-forced sweep draw what the rows say, whatever the archive holds."""

import matplotlib
import pytest

from bdlib import figures

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ABOUT = {"dtype": ["float32"], "seeds": [1]}


def row(agreement=0.4, **changes):
    base = {
        "regime": "teacher-forced",
        "text": "books",
        "drafter": "small",
        "policy": "sink_window",
    }
    base |= {"budget": 256, "context": 2048, "documents": 4, "ngram_agreement": 0.2}
    ends = {"agreement_low": agreement - 0.05, "agreement_high": agreement + 0.05}
    return base | {"agreement": agreement} | ends | changes


def full(agreement=0.5, **changes):
    return row(agreement, policy="full", budget=None, **changes)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def lines_of(ax):
    return {line.get_label(): list(line.get_ydata()) for line in ax.lines}


def test_full_cache_is_the_last_budget_and_of_every_policy():
    rows = [full(), row(0.3, budget=128), row(0.4), row(0.2, policy="snapkv", budget=128)]
    _, (ax,) = figures.agreement_panels(rows, "budget", by="policy")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["128", "256", "full"]
    found = lines_of(ax)
    assert found["sink_window"] == [0.3, 0.4, 0.5]
    assert found["snapkv"] == [0.2, 0.5]
    assert found["n-gram lookup"] == [0.2] * 3


def test_a_panel_a_text_and_the_full_cache_dashed_along_contexts():
    rows = [row(0.4), full(0.5), row(0.3, context=16384), full(0.35, context=16384)]
    rows += [row(0.1, text="meetings", agreement_low=None, agreement_high=None)]
    _, axes = figures.agreement_panels(rows, "context", stretched=8192)
    assert [ax.get_title("left") or ax.get_title() for ax in axes] == ["books", "meetings"]
    found = lines_of(axes[0])
    assert found["small"] == [0.4, 0.3]
    assert found["small, full cache"] == [0.5, 0.35]
    assert "YaRN x2" in axes[0].get_legend_handles_labels()[1]


def test_every_point_is_inside_the_shared_axis():
    rows = [row(0.2), full(0.25), row(0.8, text="meetings"), full(0.9, text="meetings")]
    _, axes = figures.agreement_panels(rows, "budget")
    assert axes[0].get_ylim()[0] == 0
    assert axes[0].get_ylim()[1] > 0.95  # the bar of 0.9 ends there


def test_map_averages_texts_and_leaves_incomplete_cells_empty():
    rows = [row(0.4), full(0.5), row(0.3, text="meetings"), full(0.3, text="meetings")]
    rows += [row(0.9, budget=128), row(0.9, budget=2048), full(0.5, context=4096)]
    _, (ax,) = figures.kept_map(rows)
    shown = {(t.get_position()): t.get_text() for t in ax.texts}
    # 128: no meetings; 2,048: no less than the context; 4,096: no budget measured.
    assert shown.pop((0, 1)) == f"{0.7 / 0.8:.2f}"
    assert set(shown.values()) == {""}


def test_all_figures_of_an_archive():
    rows = [row(), full(), row(0.3, budget=128), row(text="embedded:held-out"), row(drafter="self")]
    found = figures.acceptance(rows, ABOUT)
    assert list(found) == ["budget_2048", "context", "kept"]
    assert "n = 4 documents" in found["kept"].get_supxlabel()
    assert len(found["budget_2048"].axes) == 1  # no panel for the embedded text


def test_results_without_a_sparse_cache_are_refused():
    with pytest.raises(ValueError, match="no teacher-forced agreement"):
        figures.acceptance([full()], ABOUT)
