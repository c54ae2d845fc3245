"""The archive that answers at once, the pictures, and the dashboard without a browser."""

import json
import threading
import time
import xml.etree.ElementTree as ET
from dataclasses import replace

import nbformat
import pytest
import tiny
import torch

from bdlib import archive, lessons, selection, widgets
from bdlib.archive import Archive, Costs, Measurement, Selections
from bdlib.pairs import Pair
from bdlib.widgets import Cancelled, Dashboard, Engine, Line, Settings


def measured(**changes):
    fields = {
        "text": "books",
        "drafter": "budgetdraft-feature-gpu",
        "policy": "chunk_topk_recent",
        "budget": 256,
        "context": 4096,
        "temperature": 0.0,
        "acceptance": 0.5,
        "low": 0.4,
        "high": 0.6,
        "samples": 5,
    }
    return Measurement(**(fields | changes))


# --------------------------------------------------------------------------- archive
def test_expected_tokens_follow_the_draft_steps():
    assert measured().tokens_per_round(2) == 1 + 0.5 + 0.25
    stepped = measured(by_step=(0.5, 0.4))
    assert stepped.tokens_per_round(3) == pytest.approx(1 + 0.5 + 0.5 * 0.4 + 0.5 * 0.4 * 0.4)


def test_archive_finds_what_fits_and_nothing_else():
    full = measured(policy=None, budget=None, acceptance=0.7)
    at_two = measured(gamma=2, acceptance=0.3)
    store = Archive([measured(), full, at_two])
    where = {
        "text": "books",
        "drafter": "budgetdraft-feature-gpu",
        "context": 4096,
        "temperature": 0.0,
    }
    assert store.find(policy="chunk_topk_recent", budget=256, **where) == measured()
    assert store.find(policy="chunk_topk_recent", budget=256, gamma=2, **where) is at_two
    assert store.find(policy="chunk_topk_recent", budget=256, gamma=3, **where) == measured()
    assert store.find(policy="snapkv", budget=None, **where) is full
    assert store.find(policy="snapkv", budget=256, **where) is None
    assert store.values("budget") == [256, None]
    assert store.values("budget", policy=None) == [None]
    assert store.values("context", text="talks") == []


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_measurements_the_one_of_more_windows_counts(order):
    few, many = measured(samples=2, acceptance=0.1), measured(samples=8, acceptance=0.4)
    store = Archive([few, many][::order])
    assert store.find("books", few.drafter, few.policy, 256, 4096, 0.0) is many


def agreement(path, mean=0.5):
    value = {"mean": mean, "low": 0.4, "high": 0.6, "n": 5}
    row = {"drafter": "d", "policy": "sink_window", "budget": 128, "by_step": [mean, 0.4]}
    row |= {"agreement": value, "alpha": value | {"mean": 0.45}}
    path.write_text(json.dumps({"settings": {"context": 1024}, "summary": [row]}))
    return path


def test_agreement_file_is_read_for_both_verifiers(tmp_path):
    store = Archive.read([agreement(tmp_path / "agreement_1024_talk.json")])
    greedy = store.find("talk", "d", "sink_window", 128, 1024, 0.0)
    assert (greedy.acceptance, greedy.by_step, greedy.samples) == (0.5, (0.5, 0.4), 5)
    assert store.find("talk", "d", "sink_window", 128, 1024, 1.0).acceptance == 0.45


def test_a_sweep_keeps_its_ways_of_measuring_apart(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(
        "regime,drafter,policy,budget,context,gamma,text,temperature,refresh,controller,looping,windows,"
        "by_position,acceptance_rate,acceptance_rate_low,acceptance_rate_high,agreement,alpha,"
        "speedup_decode\n"
        "sampling,d,snapkv,128,2048,4,books,0.7,,false,false,3,0.6 0.5,0.4,0.3,0.5,,,1.5\n"
        "greedy,d,snapkv,128,2048,4,books,0,,false,true,3,0.9 0.9,0.8,0.7,0.9,,,2.5\n"
        "chat,d,snapkv,128,2048,4,books,0,,false,false,3,0.2 0.1,0.15,0.1,0.2,,,0.9\n"
        "chat,d,snapkv,128,8192,12,books,0,,true,false,3,0.2 0.1,0.15,0.1,0.2,,,0.9\n"
        "greedy,d,snapkv,128,4096,4,books,0,32,false,false,3,0.2 0.1,0.15,0.1,0.2,,,0.9\n"
        "teacher-forced,d,full,,2048,,books,,,,,3,0.55 0.5,,,,0.55,0.6,\n"
    )
    store = Archive.read([path])
    where = ("d", "snapkv", 128, 2048)
    drawn = store.find("books, continued", *where, 0.7, gamma=4)
    assert (drawn.acceptance, drawn.by_step, drawn.speedup) == (0.4, (0.6, 0.5), 1.5)
    assert store.find("books, continued in loops", *where, 0.0, gamma=4).speedup == 2.5
    assert store.find("books, chat", *where, 0.0, gamma=4).speedup == 0.9
    assert store.find("books", *where, 0.0, gamma=4) is None
    # What selects anew, or chooses gamma, is another method.
    assert store.values("context") == [2048]
    assert store.find("books", "d", "snapkv", None, 2048, 0.0).acceptance == 0.55
    assert store.find("books", "d", "snapkv", None, 2048, 1.0).acceptance == 0.6


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"settings": {}, "summary": [{}]}'])
def test_damaged_archive_is_named(tmp_path, text):
    path = tmp_path / "agreement_1024_talk.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"agreement_1024_talk\.json is not an archive"):
        Archive.read([path])
    with pytest.raises(ValueError, match=r"agreement_1024_talk\.json is not an archive"):
        Archive.read([agreement(path, mean=1.5)])
    with pytest.raises(ValueError, match="is not an archive"):
        Selections.read(agreement(path))


def test_table_of_something_else_is_named(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv is not an archive.*by_position"):
        Archive.read([path])


def test_speed_from_bytes():
    costs = Costs(target_weights=1000, target_entry=1, drafter_weights=90, drafter_entry=1)
    # A draft step reads 90 + 10 bytes, a plain step 1000 + 0: a tenth each, four of them.
    assert costs.speedup(2.8, gamma=4, budget=10, context=0) == pytest.approx(2.8 / 1.36)
    assert costs.drafter_kv(None, 500) == 500
    assert costs.drafter_kv(800, 500) == 500


def test_shipped_archive_is_whole():
    """What the dashboard shows at first is there, for every shipped drafter."""
    store, held = Archive.read(), Selections.read_all()[4096]
    for drafter in ("budgetdraft", "budgetdraft-feature-gpu"):
        for budget in widgets.BUDGETS:
            for temperature in (0.0, 1.0):
                where = ("books", drafter, "chunk_topk_recent", budget, 4096, temperature)
                assert store.find(*where) is not None, where
            if budget is not None:
                row = held.maps[drafter, "sink_window", budget]
                kept = sum(row) / len(row) * held.context
                assert kept == pytest.approx(budget, rel=0.05, abs=16)
                assert row[-1] > 0.9  # a window at the end
    assert set(widgets.POLICIES) < set(selection.POLICIES)


def test_costs_are_those_of_the_loaded_models():
    from bdlib import models, pairs

    pair = pairs.load_pair("smollm2", dtype="bfloat16")
    for name in ("budgetdraft", "budgetdraft-feature-gpu"):
        drafter = models.load_drafter(models.checkpoint(name), pair.target)
        costs = archive.costs(name)
        assert costs.target_weights == pair.target.weight_bytes()
        assert costs.drafter_weights == drafter.weight_bytes()
        assert costs.target_entry == pair.target.config.kv_bytes(1, torch.bfloat16)
        assert costs.drafter_entry == drafter.config.kv_bytes(1, torch.bfloat16)


def test_shares_average_layers_and_heads():
    first = torch.tensor([[[0, 1, 2, 3], [0, 1, 8, 9]]])  # [1, 2 heads, 4]
    found = archive.shares([first, first], length=10, bins=5)
    assert found == pytest.approx([1.0, 0.5, 0.0, 0.0, 0.5])
    assert archive.shares([torch.tensor([[[7, 12]]])], length=10, bins=10)[7] == 1


# ---------------------------------------------------------------------------- lessons
LESSONS = [p for p in lessons.find() if p.name[:2] < "20" and p.parent.name == "notebooks"]


@pytest.mark.parametrize("path", LESSONS, ids=lessons.label)
def test_a_lesson_has_one_slider_and_its_picture_for_those_without_a_kernel(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    moving = [i for i, cell in enumerate(cells) if "interactive_output(" in cell.source]
    assert len(moving) == 1
    assert "continuous_update" in cells[moving[0]].source  # a picture a move, not a dozen
    outputs = cells[moving[0] + 1].outputs
    assert any("image/png" in output.get("data", {}) for output in outputs)


# --------------------------------------------------------------------------- pictures
def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter("text")]


def test_chart_spells_out_the_chosen_point_and_leaves_gaps():
    lines = {"a & b": Line([0.1, None, 0.3], [(0.0, 0.2), None, None], strong=True)}
    drawn = widgets.chart("T", ["x", "y", "z"], lines, xlabel="b", top=1.0, chosen=("a & b", 2))
    assert "0.30" in texts(drawn)
    paths = [p.get("d") for p in ET.fromstring(drawn).iter("path")]
    assert [d.count("M") for d in paths] == [2]
    assert "0.30" not in texts(
        widgets.chart("T", ["x", "y", "z"], lines, xlabel="b", top=1.0, chosen=("a & b", 1))
    )


def test_map_draws_runs_and_marks_the_chosen_row():
    rows = {"p": [1.0, 1.0, 0.0, 0.5], "q": [0.0] * 4}
    drawn = ET.fromstring(widgets.held_map("T", rows, 400, chosen="p"))
    filled = [r for r in drawn.iter("rect") if r.get("fill") != "none"]
    assert len(filled) == 2
    assert float(filled[0].get("width")) == pytest.approx(
        2 * float(filled[1].get("width")), abs=0.2
    )
    bold = [t.text for t in drawn.iter("text") if t.get("font-weight") == "bold"]
    assert bold == ["T", "p"]


def test_a_legend_of_many_names_stays_inside_the_picture():
    names = {f"a policy of many letters {i}": Line([0.5]) for i in range(6)}
    root = ET.fromstring(widgets.chart("T", ["x"], names, xlabel="b", top=1.0))
    width = float(root.get("viewBox").split()[2])
    placed = [t for t in root.iter("text") if t.text in names]
    assert len(placed) == 6
    assert all(float(t.get("x")) + 6.4 * len(t.text) < width for t in placed)
    assert len({t.get("y") for t in placed}) > 1


# -------------------------------------------------------------------------- dashboard
@pytest.fixture
def board():
    points = [
        measured(budget=b, policy=b and p, acceptance=0.3 + 0.05 * i)
        for i, b in enumerate(widgets.BUDGETS)
        for p in ("chunk_topk_recent", "sink_window")
    ]
    maps = {("budgetdraft-feature-gpu", "sink_window", 128): (1.0, 0.0, 1.0, 1.0)}
    return Dashboard(Archive(points), {4096: Selections(4096, "toy", maps)}, FakeEngine())


class FakeEngine:
    """Emits a round whenever it is allowed to, until it is stopped or has emitted three."""

    def __init__(self):
        self.go, self.error = threading.Semaphore(0), None

    def run(self, settings, show, say, stopped):
        say("decoding")
        for _ in range(3):
            while not self.go.acquire(timeout=0.01):
                if stopped():
                    raise Cancelled
            if self.error:
                raise self.error
        return self.result

    result = None


def test_moving_the_budget_changes_number_figure_and_map(board):
    before = {name: html.value for name, html in board.html.items()}
    assert "35.0%" in before["numbers"]
    board.controls["budget"].value = 128
    assert "30.0%" in board.html["numbers"].value
    assert board.html["left"].value != before["left"]
    assert "sink_window" in texts(board.html["map"].value)
    board.controls["policy"].value = "snapkv"
    assert "not measured" in board.html["numbers"].value
    board.set(temperature=0.7)
    assert "run it" in board.html["left"].value
    board.set(budget=None, policy="snapkv", temperature=0.0)
    assert "55.0%" in board.html["numbers"].value


def test_what_was_not_measured_is_said_and_nothing_is_drawn(board):
    assert "Archived: " in board.html["source"].value
    board.set(context=16_384, budget=128)
    for picture in ("left", "right"):
        assert "not measured" in texts(board.html[picture].value)
        assert list(ET.fromstring(board.html[picture].value).iter("path")) == []
    assert "not measured" in board.html["numbers"].value
    assert "Archived contexts: 4,096." in board.html["source"].value
    assert "4,096 tokens; none is recorded at 16,384" in board.html["map"].value
    board.set(context=4096, temperature=1.0)
    assert "Archived temperatures: 0." in board.html["source"].value
    board.set(temperature=0.0, drafter="self")
    assert "Nothing of this drafter is archived for books." in board.html["source"].value
    assert not board.run_button.disabled


def test_the_controls_have_what_the_archive_has():
    odd = {"budget": 64, "context": 3000, "policy": "oracle", "temperature": 0.3, "text": "talks"}
    fast = measured(text="talks, chat", temperature=0.0, gamma=3, speedup=1.25)
    board = Dashboard(Archive([measured(**odd, drafter="mine"), fast]), {}, FakeEngine())
    board.set(**odd, drafter="mine")
    assert "50.0%" in board.html["numbers"].value
    assert {"0.50", "oracle", "64"} < set(texts(board.html["left"].value))
    assert "mine has no checkpoint here" in board.html["training"].value
    assert board.run_button.disabled
    board.run()
    assert not board.running
    board.set(**{name: getattr(fast, name) for name in (*odd, "gamma", "drafter")})
    assert "measured and archived: 1.25x" in board.html["numbers"].value
    assert "speed-up, measured" in texts(board.html["right"].value)
    assert "generated at gamma 3" in board.html["source"].value


# ---------------------------------------------------------------------------- lambda
def checkpoint(folder, name, weight, **settings):
    """A drafter's folder as it is saved, with nothing in it but how it was trained."""
    settings = {"steps": 9, "views": 2, **settings}
    if weight is not None:
        settings["objective"] = {"full": "ce", "sparse": "ce", "weight": weight, "beta": 0.0}
    made = {"settings": settings, "windows": {"64": 2}, "corpus": {"toy": "0"}}
    (folder / name).mkdir()
    document = {"schema": 1, "kind": "standalone", "taps": [], "config": {}, "provenance": made}
    (folder / name / "drafter.json").write_text(json.dumps(document))


def test_checkpoints_are_told_apart_by_lambda(tmp_path):
    checkpoint(tmp_path, "main", 0.5)
    checkpoint(tmp_path, "full-only", 0.0, views=0)
    checkpoint(tmp_path, "longer", 1.0, steps=10)
    checkpoint(tmp_path, "again", 0.5)
    checkpoint(tmp_path, "silent", None)
    (tmp_path / "being-written").mkdir()
    found = archive.checkpoints(tmp_path)
    assert {name: one.weight for name, one in found.items()} == {
        "main": 0.5,
        "full-only": 0.0,
        "longer": 1.0,
        "again": 0.5,
        "silent": None,
    }
    assert archive.by_weight("main", found) == {0.0: "full-only", 0.5: "main"}
    assert archive.by_weight("again", found) == {0.0: "full-only", 0.5: "again"}
    assert archive.by_weight("longer", found) == {1.0: "longer"}
    assert archive.by_weight("silent", found) == archive.by_weight("self", found) == {}
    assert archive.checkpoints(tmp_path / "nowhere") == {}
    (tmp_path / "main" / "drafter.json").write_text("[]")
    with pytest.raises(ValueError, match=r"main.drafter\.json is not a drafter's"):
        archive.checkpoints(tmp_path)


def test_lambda_takes_the_drafter_that_was_trained_with_it(tmp_path):
    checkpoint(tmp_path, "main", 0.5)
    checkpoint(tmp_path, "full-only", 0.0, views=0)
    checkpoint(tmp_path, "other", 0.5, steps=10)
    points = [measured(drafter="main", acceptance=0.4), measured(drafter="other")]
    board = Dashboard(Archive(points), {}, FakeEngine(), checkpoints=archive.checkpoints(tmp_path))
    board.set(drafter="main")
    assert [value for _, value in board.weight.options] == [0.0, 0.5]
    assert "40.0%" in board.html["numbers"].value
    assert "No checkpoint was trained like it with lambda 1." in board.html["training"].value
    board.weight.value = 0.0
    assert board.settings.drafter == "full-only"
    assert "not measured" in board.html["numbers"].value  # there, but not in the archive
    assert "0 (full-only)" not in board.html["training"].value
    board.set(drafter="other")
    assert (board.weight.value, board.weight.disabled) == (0.5, True)
    assert "lambda 0 or 1" in board.html["training"].value
    board.set(drafter="ngram")
    assert board.weight.value is None
    assert "not trained" in board.html["training"].value


def test_shipped_checkpoints_say_their_lambda():
    found = archive.checkpoints()
    assert found["budgetdraft"].weight == 0.5
    assert archive.by_weight("budgetdraft", found)[0.5] == "budgetdraft"


def test_lecture_fills_50_minutes_with_settings_that_exist(board):
    assert sum(p.minutes for p in widgets.LECTURE) == 50
    real = Dashboard()
    for number, preset in enumerate(widgets.LECTURE):
        real.step.value = number
        assert real.settings == preset.settings
        assert preset.say.split()[0] in real.html["notes"].value


def test_run_can_be_cancelled_and_started_again(board):
    board.run()
    board.run()  # a second press while it runs does nothing
    assert board.running
    assert board.run_button.disabled
    assert not board.cancel_button.disabled
    board.controls["budget"].value = 512  # the page stays usable meanwhile
    assert "40.0%" in board.html["numbers"].value
    board.cancel()
    assert board.wait(5)
    assert "cancelled" in board.html["status"].value
    assert not board.run_button.disabled
    board.engine.error = ValueError("no <such> thing")
    board.engine.go.release()
    board.run()
    assert board.wait(5)
    assert "error: ValueError: no &lt;such&gt; thing" in board.html["status"].value


# ------------------------------------------------------------------------------ engine
class Words:
    """A tokenizer of words that can only decode."""

    def decode(self, ids):
        return tiny.words(ids)


class TinyEngine(Engine):
    def _prompt(self, pair, settings):
        return tiny.text(settings.context - self.new_tokens)


@pytest.fixture
def engine():
    target = tiny.model(sharp=4.0)
    pair = Pair("t", target, None, Words(), target.device, target.dtype, frozenset(), "none")
    return TinyEngine(12, load=lambda name, context: pair)


@pytest.mark.parametrize("drafter", ["self", "ngram", "plain"])
def test_engine_writes_what_plain_decoding_writes(engine, drafter):
    settings = Settings(drafter, "sink_window", 64, 3, context=300)
    shown, said = [], []
    live = engine.run(settings, shown.append, said.append)
    tokens = live.generation.tokens
    assert tokens == tiny.greedy(engine.pair().target, tiny.text(288), 12)
    assert live.same == (None if drafter == "plain" else 12)
    assert len(shown) == len(live.generation.rounds)
    assert "reading the prompt: 256 of 288 tokens" in said
    assert bool(live.held) == (drafter == "self")
    if live.held:
        layers = list(live.held.values())
        assert len(layers) == 2
        kept = [sum(layer) / len(layer) * 300 for layer in layers]
        assert kept == pytest.approx([64, 64], rel=0.15)


def test_engine_takes_the_full_cache_and_samples(engine):
    settings = Settings("self", "snapkv", None, 3, context=300)
    assert engine.run(settings).generation.acceptance_rate == 1
    drawn = [engine.run(replace(settings, temperature=1.0)).generation.tokens for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_engine_stops_within_a_pass(engine):
    asked = 0

    def stopped():
        nonlocal asked
        asked += 1
        return asked > 6

    begun = time.monotonic()
    with pytest.raises(Cancelled):
        engine.run(Settings("self", "sink_window", 64, 3, context=300), stopped=stopped)
    assert asked == 7
    assert time.monotonic() - begun < 60
    # and the next run is whole
    assert engine.run(Settings("self", "sink_window", 64, 3, context=300)).same == 12


def test_dashboard_shows_a_run(engine):
    board = Dashboard(Archive([]), {}, engine)
    board.engine.run = lambda settings, *rest: Engine.run(
        engine, replace(settings, context=300, budget=64, policy="sink_window"), *rest
    )
    board.set(drafter="self")
    board.run()
    assert board.wait(60)
    assert "done" in board.html["status"].value
    assert "12 of 12" in board.html["measured"].value
    assert 'title="accepted"' in board.html["trace"].value or "bonus" in board.html["trace"].value
    assert "layer 0" in texts(board.html["live_map"].value)
