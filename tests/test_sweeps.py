"""Sweeps: grids that are checked first, cells that survive a kill, executors, and tables of results."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

from bdlib import measure, models, sweeps
from bdlib.decoding import Generation, Round

CLOCK = {  # columns that differ from run to run
    "tokens_per_second", "ar_tokens_per_second", "speedup_decode", "speedup_with_prefill",
    "speedup_decode_least", "ar_of_floor", "peak_rss_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A target, two drafters of its own, and texts of two kinds."""
    place = tmp_path_factory.mktemp("sweeps")
    target = tiny.model(seed=3, dtype=torch.float32, sharp=3.0)
    tiny.save_folder(place / "target", target)
    target.to(torch.float32)
    alone = models.cut_from(target, (1,), torch.arange(0, 23, 2))
    models.save_drafter(alone, place / "drafters" / "alone", "# card\n")
    feature = models.conditioned_on(target, (0, 1), torch.arange(23), layers=1, seed=0)
    models.save_drafter(feature, place / "drafters" / "run" / "drafter", "# card\n")
    for kind in ("one", "two"):
        (place / "texts" / kind).mkdir(parents=True)
        for name in ("a", "b", "c"):
            text = tiny.text(300, seed=ord(name) + len(kind) + (kind == "two"))
            (place / "texts" / kind / f"{name}.txt").write_text(tiny.words(text.tolist()))
    (place / "texts" / "long.txt").write_text(tiny.words(tiny.text(700, seed=9).tolist()))
    (place / "texts" / "short.txt").write_text(tiny.words(range(20)))
    return place


def document(place, **changes):
    """A small grid of every kind of cell."""
    forced = {
        "regime": "teacher-forced", "drafter": ["alone", "run"], "context": [64, 96],
        "text": ["one", "two"], "policy": ["chunk_topk", "sink_window"], "budget": [24, "full"],
    }  # fmt: skip
    drawn = {
        "regime": ["sampling", "greedy"], "drafter": ["run", "self", "ngram"], "context": 64,
        "text": "one", "policy": ["snapkv", "sink_window"], "budget": 40, "gamma": [2, 3],
        "refresh": ["never", 2],
    }  # fmt: skip
    return {
        "pair": str(place / "target"), "dtype": "float64", "device": "cpu", "samples": 2,
        "new_tokens": 12, "positions": 16, "block": 8, "grid": [forced, drawn],
    } | changes  # fmt: skip


def grid(place, **changes):
    return sweeps.parse(
        document(place, **changes), "test.toml", (place / "texts", place / "drafters")
    )


def toml(value):
    if isinstance(value, dict):
        return "\n".join(f"{k} = {toml(v)}" for k, v in value.items())
    return json.dumps(value)


def write_grid(place, file, **changes):
    asked = document(place, **changes)
    tables = asked.pop("grid")
    file.write_text(toml(asked) + "".join(f"\n[[grid]]\n{toml(t)}\n" for t in tables))
    return file


SMALL = [
    {"regime": "teacher-forced", "drafter": "alone", "context": 64, "text": "one",
     "policy": "sink_window", "budget": [16, 24, "full"]},
    {"regime": "sampling", "drafter": ["alone", "ngram"], "context": 48, "text": "two",
     "policy": "sink_window", "budget": 16},
]  # fmt: skip


@pytest.fixture(scope="module")
def swept(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("swept")
    return out, sweeps.run(grid(place), out, progress=False)


def steady(rows):
    """Rows without what depends on the clock."""
    return [
        {
            k: v
            for k, v in row.items()
            if k.removesuffix("_low").removesuffix("_high") not in CLOCK
            and not k.endswith("_seconds")
        }
        for row in rows
    ]


def same_cells(one, two):
    """The kept cells of two folders agree but for what depends on the clock."""
    names = {p.name for p in (one / "cells").iterdir()}
    assert names == {p.name for p in (two / "cells").iterdir()}
    tables = [steady(sweeps.load(out / "records.csv")) for out in (one, two)]
    assert tables[0] == tables[1]


# ------------------------------------------------------------------ grids


def test_a_grid_is_every_combination_once(place):
    points = grid(place).points
    forced = [p for p in points if p.regime == "teacher-forced"]
    # 2 drafters x 2 contexts x 2 texts x (2 policies at a budget, and the full cache once)
    assert len(forced) == 2 * 2 * 2 * 3
    assert {p.gamma for p in forced} == {p.temperature for p in forced} == {None}
    assert {(p.policy, p.budget) for p in forced} == {
        ("chunk_topk", 24), ("sink_window", 24), ("full", None)
    }  # fmt: skip
    drawn = [p for p in points if p.regime == "sampling"]
    # gamma x refresh x policy for two of them; lookup has neither policy, budget nor refresh
    assert len(drawn) == 2 * 2 * 2 * 2 + 2
    assert {p.temperature for p in drawn} == {0.7}
    assert {p.temperature for p in points if p.regime == "greedy"} == {0.0}
    assert {(p.policy, p.budget, p.refresh) for p in drawn if p.drafter == "ngram"} == {
        (None, None, None)
    }
    assert len(set(points)) == len(points)


def change(**axes):
    """A table of the grid with some values changed."""
    base = {"regime": "greedy", "drafter": "self", "context": 64, "text": "one", "budget": 24}
    return {k: v for k, v in (base | axes).items() if v is not ...}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"grid": [change(speed=3)]},
            "table 1: unknown axis 'speed'; allowed: axes regime, drafter",
        ),
        ({"grid": [change(), change(gama=3)]}, "table 2: unknown axis 'gama'"),
        ({"gamma": 3}, "unknown key 'gamma'; allowed: title, .*axes go in a table"),
        ({"grid": []}, "needs at least one table"),
        ({"grid": 3}, "needs at least one table"),
        ({"pair": 3}, "pair 3 must be a text"),
        ({"samples": 0}, "samples 0 must be a whole number of at least 1 window"),
        ({"samples": "many"}, "samples 'many' must be"),
        ({"seed": -1}, "seed -1 must be a whole number of at least 0"),
        ({"grid": [change(repeats=[1, 2])]}, r"table 1: repeats \[1, 2\] must be a whole number"),
        ({"grid": [change(drafter=...)]}, "axis 'drafter' is missing; it must be self, ngram"),
        ({"grid": [change(gamma=[])]}, "axis 'gamma' has no value; it must be a whole number"),
        ({"grid": [change(regime="forced")]}, "regime 'forced' must be one of teacher-forced"),
        ({"grid": [change(regime=[["greedy"]])]}, r"regime \['greedy'\] must be one of"),
        ({"grid": [change(policy="best")]}, "policy 'best' must be one of full, sink_window"),
        ({"grid": [change(budget=[24, "big"])]}, "budget 'big' must be a whole .* or \"full\""),
        ({"grid": [change(budget=0)]}, "budget 0 must be"),
        ({"grid": [change(budget=True)]}, "budget True must be"),
        ({"grid": [change(context=1)]}, "context 1 must be a whole number of at least 2"),
        ({"grid": [change(context="4K")]}, "context '4K' must be"),
        (
            {"within": 48, "grid": [change()]},
            "table 1: within 48 must be at least the context of 64",
        ),
        ({"within": "16K"}, "within '16K' must be the largest context, a whole number of tokens"),
        ({"grid": [change(context=12)]}, "new_tokens 12 must be fewer than the context of 12"),
        ({"grid": [change(gamma=2.5)]}, "gamma 2.5 must be a whole number"),
        ({"grid": [change(refresh=0)]}, 'refresh 0 must be a whole .* or "never"'),
        ({"grid": [change(temperature=-1)]}, "temperature -1 must be a number of at least 0"),
        ({"grid": [change(temperature=0.7)]}, "temperature 0.7 in regime 'greedy' must be 0"),
        (
            {"grid": [change(regime="sampling", temperature=[0.7, 0])]},
            "temperature 0 in regime 'sampling' must be above 0",
        ),
        (
            {"grid": [change(policy="chunk_topk", budget=7)]},
            "budget 7 must be at least one chunk of 8",
        ),
        (
            {"grid": [change(regime="teacher-forced", budget=8)]},
            "budget 8 must be 0 .* or above the block of 8",
        ),
        (
            {"grid": [change(regime="teacher-forced", drafter="ngram")]},
            "drafter 'ngram' has no place in regime 'teacher-forced'",
        ),
    ],
)
def test_a_malformed_grid_is_refused(place, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        grid(place, **changes)
    assert str(caught.value).startswith("test.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": [change(text="short")]}, "text 'short', context 64: 52 tokens .* has 20"),
        ({"grid": [change(text="short"), change()]}, "text 'short'"),
        ({"samples": 5000, "grid": [change()]}, "text 'one', context 64: 5000 windows of 52"),
        ({"grid": [change(text="none")]}, "no text 'none'; allowed: embedded:train"),
        ({"grid": [change(text="embedded:new")]}, "text 'embedded:new': unknown split 'new'"),
        ({"grid": [change(drafter="best")]}, "unknown drafter 'best'; allowed: self, ngram"),
        ({"grid": [change(drafter="spoilt")]}, "spoilt is not a drafter's folder, or is damaged"),
        ({"grid": [change(context=1025)]}, "context 1025 is beyond the model's positions: 512"),
        ({"grid": [change(regime="chat")]}, "text 'one', context 64: the tokenizer has no chat"),
        ({"pair": "gpt5"}, "unknown pair 'gpt5'"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(place, tmp_path, changes, message):
    spoilt = place / "drafters" / "spoilt"
    spoilt.mkdir(exist_ok=True)
    (spoilt / models.CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match=message):
        sweeps.run(grid(place, **changes), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_shipped_grids_are_well_formed(repository):
    names = set()
    for path in sorted((repository / "data" / "grids").glob("*.toml")):
        found = sweeps.read(path)
        assert found.title != path.name
        names.add(path.stem)
        assert len(found.points) > 5
    assert names == {
        "quick",
        "acceptance",
        "acceptance_first",
        "controller",
        "long",
        "paired",
        "speed",
        "robustness",
        "transfer",
        "refresh",
    }
    acceptance = sweeps.read(repository / "data" / "grids" / "acceptance.toml").points
    acceptance = [p for p in acceptance if not p.text.startswith("embedded:")]
    assert {p.context for p in acceptance} == {2048, 4096, 8192, 16384}
    assert {p.budget for p in acceptance} == {128, 256, 512, 1024, 2048, None}
    assert len({p.text for p in acceptance}) == 3
    assert len({p.policy for p in acceptance}) == 5  # four, and full


# ------------------------------------------------------------------ results


def test_every_cell_is_measured_as_by_itself(place, swept):
    """A shared prefill changes nothing: cells agree with measurements of their own."""
    from bdlib import forced
    from bdlib.pairs import load_pair

    out, _ = swept
    records = sweeps.load(out / "records.csv")
    pair = load_pair(target=place / "target", dtype="float64", device="cpu")
    checked = 0
    for point in grid(place).points:
        mine = [
            r for r in records if all(r[k] == getattr(point, k) for k in ("regime", *AXIS_NAMES))
        ]
        assert [r["sample"] for r in mine] == [0, 1]
        if point.regime == "teacher-forced":
            if point.context != 64:
                continue
            name = {"alone": "alone", "run": "run/drafter"}[point.drafter]
            settings = forced.ForcedSettings(
                drafters=(str(place / "drafters" / name),),
                policies=(point.policy,), budgets=(point.budget or 0,),
                context=64, positions=16, block=8, samples=2,
                text=str(place / "texts" / point.text),
            )  # fmt: skip
            alone = forced.run(settings, pair)["records"]
            for r, a in zip(mine, alone, strict=True):
                assert r["agreement"] == pytest.approx(a["agreement"])
                assert r["alpha"] == pytest.approx(a["alpha"], rel=1e-5)
                assert r["by_position"] == pytest.approx(a["by_step"], rel=1e-3)
                assert r["ngram_agreement"] == pytest.approx(a["ngram_agreement"])
                assert r["acceptance_rate"] is r["looping"] is r["gamma"] is None
            checked += 1
        elif point.gamma == 3 and point.policy != "sink_window" and point.drafter != "run":
            settings = point.measured(grid(place).place)
            documents = sweeps._texts("one", grid(place))
            alone = measure.measure(settings, pair, documents).records
            for r, a in zip(mine, alone, strict=True):
                for column in ("drafted", "accepted", "rounds", "tokens", "kv_entries_max"):
                    assert r[column] == a[column], column
                assert (r["document"], r["offset"]) == (a["document"], a["offset"])
                assert r["distinct_2"] == pytest.approx(a["distinct_2"], rel=1e-5)
                assert r["looping"] == (a["distinct_2"] < 0.5)
                assert r["identical"] == a["identical"]
            checked += 1
    assert checked > 10


AXIS_NAMES = ("drafter", "policy", "budget", "context", "gamma", "text", "temperature", "refresh")


def test_a_context_beyond_the_targets_positions_stretches_it(place, tmp_path):
    """Only there: the shorter context of the same sweep is measured on the target as it is."""
    table = change(regime="teacher-forced", drafter="alone", context=[64, 600], text="long")
    sweeps.run(grid(place, samples=1, grid=[table]), tmp_path, progress=False)
    cells = [json.loads(p.read_text()) for p in (tmp_path / "cells").iterdir()]
    assert {c["point"]["context"]: c["scaling"] for c in cells} == {64: "none", 600: "YaRN x2"}


@pytest.mark.parametrize("regime", ["teacher-forced", "sampling"])
def test_contexts_of_a_grid_may_end_at_the_same_places(place, regime):
    table = change(regime=regime, drafter="alone", context=[96, 64], policy="sink_window")
    planned = sweeps.plan(grid(place, within=96, samples=3, grid=[table]))
    cut = {}
    for job in planned.jobs:
        cut.setdefault(job.cells[0][1].context, []).append(job)
    for long, short in zip(cut[96], cut[64], strict=True):
        assert short.document == long.document
        assert short.offset == long.offset + 32
        assert short.prompt == long.prompt[32:]
    apart = sweeps.plan(grid(place, samples=3, grid=[table]))
    assert [j.prompt for j in apart.jobs] != [j.prompt for j in planned.jobs]
    # A window is known by its tokens: cut alone, the longest have the same cells.
    assert {c[0] for j in cut[96] for c in j.cells} <= apart.cells


def test_rows_add_up(swept):
    out, rows = swept
    records = sweeps.load(out / "records.csv")
    loaded = sweeps.load(out / "results.csv")
    assert [list(r) for r in loaded] == [list(sweeps.COLUMNS["results"])] * len(rows)
    assert sum(r["windows"] for r in rows) == len(records)
    for row, again in zip(rows, loaded, strict=True):
        mine = [
            r for r in records if all(r[k] == row[k] for k in ("regime", "looping", *AXIS_NAMES))
        ]
        assert len(mine) == row["windows"] == again["windows"]
        assert row["documents"] == len({r["document"] for r in mine})
        if row["regime"] == "teacher-forced":
            expected = statistics.fmean(r["agreement"] for r in mine)
            assert again["agreement"] == pytest.approx(expected, rel=1e-5)
            assert again["speedup_decode"] is again["tokens"] is again["identical"] is None
            assert len(again["by_position"]) == (4 if row["drafter"] == "run" else 1)
            continue
        assert again["speedup_decode"] == pytest.approx(
            statistics.median(r["speedup_decode"] for r in mine), rel=1e-5
        )
        assert again["speedup_decode_least"] == min(r["speedup_decode"] for r in mine)
        assert again["tokens"] == sum(r["tokens"] for r in mine)
        assert again["identical"] is (True if row["regime"] == "greedy" else None)
        assert again["looping"] in (True, False)
        assert len(again["by_position"]) <= row["gamma"]
        if row["documents"] > 1:
            assert row["accepted_length_low"] <= row["accepted_length"]
            assert row["accepted_length"] <= row["accepted_length_high"]
        else:
            assert row["accepted_length_low"] is None


def test_the_sidecar_says_where_results_come_from(place, swept):
    out, _ = swept
    for name in ("results", "records"):
        about = json.loads((out / f"{name}.json").read_text())
        assert about["schema"] == sweeps.SCHEMA
        assert about["columns"].keys() == sweeps.COLUMNS[name].keys()
        assert about["cells"] == about["measured"] == len(sweeps.load(out / "records.csv"))
        assert about["seeds"] == [0]
        assert set(about["drafters"]) == {"alone", "run", "self", "ngram"}
        assert about["drafters"]["alone"] != about["drafters"]["run"]
        assert about["texts"] == {"one": 3, "two": 3}
        assert {"command", "commit", "machine", "versions", "threads", "dtype"} <= about.keys()
        assert str(place) not in json.dumps(about)
        assert str(place) not in (out / f"{name}.csv").read_text()


def test_a_controller_is_an_axis():
    table = {"regime": "greedy", "drafter": "self", "context": 1024, "text": "embedded:held-out"}
    grid = sweeps.parse({"grid": [table | {"controller": [False, True], "gamma": 6}]})
    assert [p.measured(sweeps.PLACE).controller for p in grid.points] == [False, True]
    forced = sweeps.parse({"grid": [table | {"regime": "teacher-forced", "controller": True}]})
    assert forced.points[0].controller is None
    with pytest.raises(ValueError, match="controller 1 must be true"):
        sweeps.parse({"grid": [table | {"controller": 1}]})


def test_results_of_another_schema_are_refused(place, swept, tmp_path):
    out, _ = swept
    for name in ("results.csv", "results.json"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    table, sidecar = tmp_path / "results.csv", tmp_path / "results.json"
    assert sweeps.load(table) == sweeps.load(out / "results.csv")
    about = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(about | {"schema": 7}))
    with pytest.raises(ValueError, match="results.json: results of schema 7, this version reads 2"):
        sweeps.load(table)
    with pytest.raises(ValueError, match="results of schema 7"):
        sweeps.run(grid(place), tmp_path, progress=False)
    assert not (tmp_path / "cells").exists()
    sidecar.write_text(json.dumps(about | {"kind": "survey"}))
    with pytest.raises(ValueError, match="does not belong to a sweep"):
        sweeps.load(table)
    sidecar.write_text("{")
    with pytest.raises(ValueError, match="results.json is damaged"):
        sweeps.load(table)
    sidecar.write_text(json.dumps(about))
    for spoilt in ("a,b\n1,2\n", "", table.read_text().replace("\n", ",\n")):
        table.write_text(spoilt)
        with pytest.raises(ValueError, match="does not have the columns"):
            sweeps.load(table)
    table.write_bytes((out / "results.csv").read_bytes().replace(b",64,", b",sixty,", 1))
    with pytest.raises(ValueError, match="results.csv is damaged"):
        sweeps.load(table)
    sidecar.unlink()
    with pytest.raises(ValueError, match="has no sidecar: results.json must lie beside it"):
        sweeps.load(table)
    with pytest.raises(ValueError, match="no results at"):
        sweeps.load(tmp_path / "none.csv")


def test_a_cell_that_breaks_the_bound_is_not_kept(place, tmp_path, monkeypatch):
    monkeypatch.setattr(Generation, "accepted_length", property(lambda self: 9.0))
    with pytest.raises(ValueError, match="accepted_length 9 tokens per round is impossible"):
        sweeps.run(grid(place, grid=SMALL[1:]), tmp_path / "out", progress=False)
    assert list((tmp_path / "out" / "cells").iterdir()) == []


# ------------------------------------------------------------------ stopping and going on


def test_only_what_is_missing_or_changed_is_measured(place, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    asked = grid(place, grid=SMALL)
    sweeps.run(asked, out)
    assert "10/10" in capfd.readouterr().err  # 5 points on 2 windows
    files = {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    spoilt = sorted(files)[3]
    spoilt.write_text("{")
    calls = []
    before = sweeps._keep
    monkeypatch.setattr(sweeps, "_keep", lambda r, f: (calls.append(r["key"]), before(r, f))[1])
    sweeps.run(asked, out, progress=False)
    assert calls == [spoilt.stem]
    assert {p for p in files if p.stat().st_mtime_ns != files[p]} == {spoilt}
    # One more budget: only its cells are new, and the tables hold all of them.
    calls.clear()
    more = [SMALL[0] | {"budget": [16, 20, 24, "full"]}, SMALL[1]]
    rows = sweeps.run(grid(place, grid=more), out, progress=False)
    assert len(calls) == 2
    assert [r["budget"] for r in rows[:4]] == [16, 20, 24, None]
    # A drafter of the same name with other weights is another drafter.
    calls.clear()
    changed = place / "drafters" / "alone" / "README.md"
    monkeypatch.setattr(sweeps, "_digest", lambda folder: "other")
    sweeps.run(asked, out, progress=False)
    assert len(calls) == 10  # the target's digest changed, too
    assert changed.exists()
    # A cell of another schema is refused.
    spoilt.write_text(json.dumps(json.loads(spoilt.read_text()) | {"schema": 0}))
    with pytest.raises(ValueError, match=f"{spoilt.name} is of schema 0, this version has 2"):
        sweeps.run(asked, out, progress=False)


def test_a_cell_that_two_tables_name_is_one_row(place, tmp_path):
    table = SMALL[0] | {"budget": [16, 24]}
    for tables in ([table, table | {"samples": 1}], [table | {"samples": 1}, table]):
        rows = sweeps.run(grid(place, grid=tables), tmp_path, progress=False)
        assert [(r["budget"], r["windows"]) for r in rows] == [(16, 2), (24, 2)]
        assert len(sweeps.load(tmp_path / "records.csv")) == 4


KILLED = """
import os, signal, sys
from bdlib import measure, sweeps
place, out, left = sys.argv[1], sys.argv[2], [int(sys.argv[3])]
rename = os.replace
def replace(scratch, path):
    if str(path).endswith(".json") and "cells" in str(path):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    rename(scratch, path)
os.replace = replace
sweeps.run(sweeps.read(place + "/killed.toml", [place + "/texts", place + "/drafters"]), out)
"""


def test_a_sweep_killed_in_the_middle_loses_one_cell(place, tmp_path):
    file = write_grid(place, place / "killed.toml", grid=SMALL)
    asked = sweeps.read(file, [place / "texts", place / "drafters"])
    out, whole = tmp_path / "out", tmp_path / "whole"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(place), str(out), "6"], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("[!.]*.json")}
    assert len(kept) == 6  # killed as it was about to name the seventh
    assert len(list((out / "cells").glob(".*.writing"))) == 1
    assert not (out / "results.csv").exists()
    sweeps.run(asked, out, progress=False)
    assert all(p.stat().st_mtime_ns == when for p, when in kept.items())
    assert list((out / "cells").glob(".*")) == []
    sweeps.run(asked, whole, progress=False)
    same_cells(out, whole)
    assert steady(sweeps.load(out / "results.csv")) == steady(sweeps.load(whole / "results.csv"))


def test_an_error_keeps_what_was_measured(place, tmp_path, monkeypatch):
    out, made = tmp_path / "out", []
    before = measure._sample

    def fails(*arguments):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        return before(*arguments)

    monkeypatch.setattr(measure, "_sample", fails)
    with pytest.raises(KeyboardInterrupt):
        sweeps.run(grid(place, grid=SMALL), out, progress=False)
    records = sweeps.load(out / "records.csv")
    about = json.loads((out / "records.json").read_text())
    assert len(records) == about["measured"] == 3 + 2 + 3  # window by window
    assert about["cells"] == 10


def test_two_sweeps_do_not_share_a_folder(place, tmp_path):
    import filelock

    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another sweep is"):
        sweeps.run(grid(place, grid=SMALL), tmp_path, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder"):
        sweeps.run(grid(place, grid=SMALL), tmp_path / "file", progress=False)


# ------------------------------------------------------------------ executors


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """The small grid, measured in this process."""
    out = tmp_path_factory.mktemp("alone")
    sweeps.run(grid(place, grid=SMALL), out, progress=False)
    return out


def test_threads_take_turns(place, tmp_path, alone):
    with ThreadPoolExecutor(3) as executor:
        sweeps.run(grid(place, grid=SMALL), tmp_path, executor, progress=False)
    same_cells(alone, tmp_path)


@pytest.mark.slow
def test_two_processes_measure_the_same(place, tmp_path, alone, capfd):
    with sweeps.pool(2) as executor:
        sweeps.run(grid(place, grid=SMALL), tmp_path, executor)
        pids = set(executor._processes)
    same_cells(alone, tmp_path)
    assert len(pids) == 2
    assert "10/10" in capfd.readouterr().err


def test_a_worker_without_the_folder_hands_its_cells_back(place, tmp_path, alone):
    class Elsewhere(ThreadPoolExecutor):
        def submit(self, function, job, folder, wanted):
            return super().submit(function, job, "/nowhere/at/all", wanted)

    with Elsewhere(1) as executor:
        sweeps.run(grid(place, grid=SMALL), tmp_path, executor, progress=False)
    same_cells(alone, tmp_path)


def test_a_failed_job_stops_the_sweep_with_its_error(place, tmp_path, monkeypatch):
    def fails(*arguments):
        raise ValueError("the logits are not numbers")

    monkeypatch.setattr(measure, "_sample", fails)
    with ThreadPoolExecutor(1) as executor, pytest.raises(ValueError, match="are not numbers"):
        sweeps.run(grid(place, grid=SMALL), tmp_path, executor, progress=False)
    assert {r["regime"] for r in sweeps.load(tmp_path / "records.csv")} == {"teacher-forced"}


@pytest.mark.slow
def test_a_dask_cluster_measures_the_same(place, tmp_path, alone):
    distributed = pytest.importorskip(
        "distributed", reason="Dask is in the extra 'cluster': pip install 'bdlib[cluster]'"
    )
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address=None,
            local_directory=str(tmp_path / "dask"),
        ) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor() as executor,
    ):
        assert len(client.scheduler_info()["workers"]) == 2
        sweeps.run(grid(place, grid=SMALL), tmp_path / "out", executor, progress=False)
    same_cells(alone, tmp_path / "out")


ORPHANS = """
import os, signal
from bdlib import sweeps
if __name__ == "__main__":
    executor = sweeps.pool(1)
    print(executor.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(ORPHANS)
    with subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, text=True
    ) as parent:
        child = int(parent.stdout.readline())
        parent.wait()
        for _ in range(300):
            try:
                os.kill(child, 0)
            except ProcessLookupError:
                return
            if _zombie(child):
                return
            time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def _zombie(pid):
    """Ended, but nobody has asked how: the killed parent cannot."""
    import psutil

    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_workers_are_counted():
    for workers in (0, -1, True):
        with pytest.raises(ValueError, match=f"workers {workers!r} must be a whole number"):
            sweeps.pool(workers)


# ------------------------------------------------------------------ at the command line


def run(monkeypatch, capsys, *arguments):
    from bdlib.__main__ import main

    monkeypatch.setattr(sys, "argv", ["bdlib", "sweep", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def test_the_command_sweeps(place, tmp_path, monkeypatch, capsys):
    file = write_grid(place, tmp_path / "small.toml", grid=SMALL)
    where = ["--texts", place / "texts", "--drafters", place / "drafters"]
    status, out, _ = run(monkeypatch, capsys, file, "--check", *where)
    assert (status, out) == (0, "small.toml: 5 points on 4 windows, 10 cells\n")
    status, out, err = run(monkeypatch, capsys, file, "--out", tmp_path / "out", *where)
    assert status == 0
    rows = sweeps.load(tmp_path / "out" / "results.csv")
    assert out.startswith(f"{len(rows)} rows in ")
    assert "10/10" in err
    about = json.loads((tmp_path / "out" / "results.json").read_text())
    assert about["command"] == (
        "python -m bdlib sweep small.toml --out DIR --texts TEXTS --drafters DRAFTERS"
    )


def test_bad_input_is_one_line(place, tmp_path, monkeypatch, capsys):
    good = write_grid(place, tmp_path / "good.toml", grid=SMALL)
    bad = tmp_path / "bad.toml"
    bad.write_text("samples = \n")
    wrong = write_grid(place, tmp_path / "wrong.toml", grid=[change(speed=1)])
    for arguments, message in (
        ((tmp_path / "none.toml", "--out", tmp_path / "out"), "no grid at "),
        ((tmp_path, "--out", tmp_path / "out"), "cannot be read: Is a directory"),
        ((bad, "--out", tmp_path / "out"), "bad.toml is not TOML: Invalid value (at line 1"),
        ((wrong, "--out", tmp_path / "out"), "wrong.toml, table 1: unknown axis 'speed'"),
        ((good,), "no folder for the results: give --out DIR"),
        ((good, "--out", tmp_path / "out", "--workers", "0"), "workers 0 must be"),
        ((good, "--out", tmp_path / "out"), "good.toml: unknown drafter 'alone'; allowed: self"),
    ):
        status, out, err = run(monkeypatch, capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        assert message in err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ what measure adds for sweeps


def test_acceptance_by_position():
    def of(drafted, accepted):
        return Round(0, tuple(range(drafted)), accepted, (), "plain", {})

    result = Generation(1, 3, [of(3, 3), of(3, 1), of(3, 0), of(2, 2), of(0, 0)])
    found = measure.by_position(result)
    # All four that draft come to position 0 and three pass; three and two; of those two, one
    # drafted further.
    assert found == [[4, 3], [3, 2], [1, 1]]
    assert sum(right for _, right in found) == result.accepted
    assert measure.by_position(Generation(1, 3, [of(0, 0)])) == []
    assert measure.add_positions([found, [[1, 0]], []]) == [[5, 3], [3, 2], [1, 1]]
    assert sweeps._rates([[4, 3], [3, 0], [0, 0]]) == [0.75, 0.0]


def test_the_interval_of_a_median():
    values = [1.0, 1.1, 1.2, 1.3, 9.0]
    found = measure.interval(values, median=True)
    assert found.mean == 1.2
    assert found.low >= 1.0
    assert found.low < found.mean < found.high <= 9.0
    assert measure.interval([2.0], median=True) == measure.Interval(2.0, None, None, 1)
