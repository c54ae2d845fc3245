"""The engine benchmark: what it refuses, how it summarises, and one small run from end to end.

No test asserts how fast anything is: machines are shared and differ.
"""

import json
import sys

import pytest
import tiny
import torch

from bdlib import bench
from bdlib.bench import EngineSettings, _required, engine, parse_contexts, spread, table

TIMES = ("transformers_step", "compact_step", "verify", "single", "draft_step")
PREFILLS = ("transformers_prefill", "compact_prefill")
RATIOS = ("step_speedup", "prefill_speedup", "verify_cost", "draft_cost")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_folder(
        tmp_path_factory.mktemp("bench") / "small",
        tiny.model(dtype=torch.float32, max_positions=96),
    )


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    """Memory bandwidth measured over one megabyte is as good as over 512 here."""
    monkeypatch.setattr(bench, "BUFFER_BYTES", 2**20)


def settings(folder, **changes):
    chosen = {"contexts": (24, 40), "steps": 3, "verify": 3, "budget": 8}
    return EngineSettings(pair=str(folder), dtype="float32", device="cpu", **(chosen | changes))


# ------------------------------------------------------------------ parts


def test_contexts_are_read():
    assert parse_contexts("512,4096") == (512, 4096)
    assert parse_contexts(" 512 , 4096, ") == (512, 4096)
    assert parse_contexts("") == ()
    for text in ("512,4k", "1.5", "512;1024", "--"):
        with pytest.raises(ValueError, match=f"contexts '{text}' must be whole numbers"):
            parse_contexts(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"verify": 0}, "verify 0 must be at least 1"),
        ({"budget": -1}, "budget -1 must be at least 1"),
        ({"contexts": ()}, r"contexts \(\) must name at least one length"),
        ({"contexts": (512, 25)}, "context 25 must be at least 26 for 40 steps"),
        ({"contexts": (0,)}, "context 0 must be at least"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EngineSettings(**changes)


def test_steps_are_spread_over_turns():
    for steps, stretch in ((1, 1), (3, 1), (5, 1), (6, 2), (40, 8), (41, 9)):
        made = EngineSettings(steps=steps)
        assert made.stretch == stretch
        assert made.stretch * min(bench.TURNS, steps) >= steps  # at least so many of each kind
        assert made.least == 2 * (stretch + 5)
        EngineSettings(steps=steps, contexts=(made.least,))


def test_spread():
    assert spread([3.0]) == {"median": 3.0, "q1": 3.0, "q3": 3.0, "n": 1}
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}
    assert spread([1.0, 2.0]) == {"median": 1.5, "q1": 1.25, "q3": 1.75, "n": 2}


def row(context, step, prefill):
    def around(value):
        return {"median": value, "q1": value, "q3": value, "n": 5}

    return {
        "context": context,
        "prompt_tokens": context - 9,
        "seconds": {name: around(0.05) for name in TIMES} | {n: around(2.0) for n in PREFILLS},
        "step_speedup": around(step),
        "prefill_speedup": around(prefill),
        "verify_cost": around(1.2),
        "draft_cost": around(0.5),
        "fraction_of_floor": dict.fromkeys((*TIMES[:3], "draft_step"), 0.4),
    }


def test_what_is_asked_for_is_compared_with_what_was_found():
    found = _required([row(512, 1.9, 0.5), row(4096, 0.1, 0.1), row(8192, 2.1, 1.0)])
    assert found == [
        {"what": "step", "context": 512, "least": 1.8, "found": 1.9, "holds": True},
        {"what": "step", "context": 8192, "least": 2.8, "found": 2.1, "holds": False},
        {"what": "prefill", "context": 8192, "least": 1.0, "found": 1.0, "holds": True},
    ]
    assert _required([row(1000, 9.0, 9.0)]) == []


def test_the_table_says_what_holds():
    rows = [row(512, 1.9, 1.3), row(8192, 2.1, 1.4)]
    text = table(
        {
            "model": "small",
            "dtype": "float32",
            "threads": 2,
            "machine": {"cpu": "Some CPU"},
            "bandwidth_bytes_per_second": spread([21e9]),
            "contexts": rows,
            "required": _required(rows),
        }
    )
    lines = text.splitlines()
    assert lines[0] == "small, float32, 2 thread(s), Some CPU, reads 21.0 GB/s"
    assert lines[2].split() == [
        "512", "50.0", "50.0", "1.90x", "0.40", "50.0", "50.0", "2000", "1.30x",
    ]  # fmt: skip
    assert len(lines[1]) == len(lines[2]) == len(lines[3])
    assert lines[4] == "step at 512: 1.90x, at least 1.8x asked: holds"
    assert lines[5] == "step at 8192: 2.10x, at least 2.8x asked: MISSED"
    assert lines[6] == "prefill at 8192: 1.40x, at least 1.0x asked: holds"


# ------------------------------------------------------------------ from end to end


def test_both_engines_are_timed(folder):
    said = []
    result = engine(settings(folder), progress=said.append)
    assert json.loads(json.dumps(result, allow_nan=False))["contexts"] == result["contexts"]
    assert said[0] == "loading"
    assert "context 40: steps, turn 3 of 3" in said
    assert (result["model"], result["dtype"], result["scaling"]) == ("small", "float32", "none")
    assert str(folder.parent) not in json.dumps(result)  # no place of a machine is kept
    assert [r["context"] for r in result["contexts"]] == [24, 40]
    assert result["weight_bytes"] == tiny.model(dtype=torch.float32).weight_bytes()
    bandwidth = result["bandwidth_bytes_per_second"]["median"]
    config = tiny.CONFIG
    for r in result["contexts"]:
        assert r["prompt_tokens"] == r["context"] - 2  # one step a turn, after the first token
        for name in TIMES:
            assert r["seconds"][name]["n"] == 3
            assert r["seconds"][name]["q1"] > 0
        for name in PREFILLS:
            assert r["seconds"][name]["n"] == bench.PREFILLS
        for name in RATIOS:
            assert 0 < r[name]["q1"] <= r[name]["median"] <= r[name]["q3"]
        entries = {"transformers_step": r["context"], "compact_step": r["context"],
                   "verify": r["context"], "draft_step": 8}  # fmt: skip
        for name, held in entries.items():
            read = result["weight_bytes"] + config.kv_bytes(held, torch.float32)
            assert r["floor_seconds"][name] == pytest.approx(read / bandwidth)
            reached = r["floor_seconds"][name] / r["seconds"][name]["median"]
            assert r["fraction_of_floor"][name] == pytest.approx(reached)
    assert result["required"] == []
    assert len(table(result).splitlines()) == 4
    assert {"machine", "threads", "versions", "commit"} <= result.keys()


def test_both_engines_generate_the_same_tokens(folder):
    """What is timed is the same work: greedy decoding of one prompt."""
    from bdlib.decoding import generate
    from bdlib.pairs import load_pair

    pair = load_pair(target=folder, dtype="float32", device="cpu")
    theirs = bench._Transformers(folder, pair.device, pair.dtype)
    prompt = tiny.text(30)
    made = theirs.model.generate(
        prompt[None], attention_mask=torch.ones(1, 30), max_new_tokens=12, do_sample=False
    )
    assert made[0, 30:].tolist() == generate(pair.target, prompt, max_new_tokens=12).tokens
    assert theirs.prefill(prompt) > 0
    for _ in range(2):  # each turn starts again from the prompt
        assert len(theirs.steps(prompt, 4)) == 4
        assert theirs.cache.get_seq_length() == 30 + 4


def test_engine_refuses(folder, tmp_path):
    with pytest.raises(ValueError, match="pair 'gpt5' is neither 'smollm2' nor a model folder"):
        engine(EngineSettings(pair="gpt5"))
    with pytest.raises(ValueError, match="context 193 is beyond the model's positions: 96"):
        engine(settings(folder, contexts=(193,)))
    with pytest.raises(ValueError, match="is not a model folder"):
        engine(settings(tmp_path))


def run(monkeypatch, capsys, *arguments):
    from bdlib.__main__ import main

    monkeypatch.setattr(sys, "argv", ["bdlib", "bench", "engine", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0, *capsys.readouterr()


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "bench.json"
    common = ("--pair", folder, "--contexts", "40", "--steps", 2, "--dtype", "float32")
    status, out, err = run(monkeypatch, capsys, *common, "--json", "--out", file)
    assert status == 0
    assert json.loads(out) == json.loads(file.read_text())
    assert json.loads(out)["bench"] == "engine"
    assert all(line.startswith("bench: ") for line in err.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--contexts", "4k"), "error: contexts '4k' must be whole numbers with commas between"),
        (("--contexts", ","), "error: contexts () must name at least one length"),
        (("--steps", "0"), "error: steps 0 must be at least 1"),
        (("--contexts", "10"), "error: context 10 must be at least 26 for 40 steps"),
        (
            ("--out", "/nowhere/x.json"),
            "error: cannot write /nowhere/x.json: /nowhere is not a folder",
        ),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, capsys, *arguments) == (2, "", message + "\n")
