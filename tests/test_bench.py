"""The engine benchmark: what it refuses, what it adds up, and one run on a small model."""

import json

import pytest
import tiny
import torch

from bdlib import __main__ as cli
from bdlib import bench


def test_contexts_are_read_from_text():
    assert bench.parse_contexts("512, 4096,") == (512, 4096)
    with pytest.raises(ValueError, match="contexts '512,4k' must be whole numbers"):
        bench.parse_contexts("512,4k")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps 0"),
        ({"contexts": ()}, r"contexts \(\) must name"),
        ({"contexts": (20,)}, "context 20 must be at least 26 for 40 steps"),
        ({"budget": 0}, "budget 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        bench.EngineSettings(**change)


def test_spread():
    assert bench.spread([3.0]) == {"median": 3.0, "q1": 3.0, "q3": 3.0, "n": 1}
    assert bench.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}


def test_requirements_are_judged_where_they_apply():
    def row(context, step, prefill):
        return {"context": context, "step_speedup": {"median": step},
                "prefill_speedup": {"median": prefill}}  # fmt: skip

    found = bench._required([row(512, 1.7, 0.5), row(1000, 0.1, 0.1), row(8192, 2.1, 1.0)])
    assert [(one["what"], one["context"], one["holds"]) for one in found] == [
        ("step", 512, True),
        ("step", 8192, False),
        ("prefill", 8192, True),
    ]


@pytest.mark.slow
def test_a_small_model_from_end_to_end(tmp_path, monkeypatch, capsys):
    decoder = tiny.model(seed=3, dtype=torch.float32, vocab_size=47, max_positions=256)
    tiny.save_folder(tmp_path / "model", decoder)
    arguments = ["bdlib", "bench", "engine", "--pair", str(tmp_path / "model"), "--steps", "6"]
    arguments += ["--contexts", "100,200", "--dtype", "float32", "--json"]
    monkeypatch.setattr(bench, "BUFFER_BYTES", 2**22)
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert [row["context"] for row in found["contexts"]] == [100, 200]
    assert found["weight_bytes"] == decoder.weight_bytes()
    for row in found["contexts"]:
        for name in ("transformers_step", "compact_step", "verify", "single", "draft_step"):
            assert row["seconds"][name]["median"] > 0
        ratio = (
            row["seconds"]["transformers_step"]["median"] / row["seconds"]["compact_step"]["median"]
        )
        assert 0.2 * ratio < row["step_speedup"]["median"] < 5 * ratio
        assert 0 < row["fraction_of_floor"]["compact_step"] < 1.5
    assert bench.table(found).count("\n") >= 3
