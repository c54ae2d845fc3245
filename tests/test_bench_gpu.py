"""The GPU report: the dry run reaches its end, and nothing in it can pass for a figure of a GPU."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from bdlib import bench_gpu
from bdlib.kernels.lazy import triton_installed

SECTIONS = ["correctness", "bandwidth", "kernels", "decoding", "training"]
KERNELS = {"chunk_scores", "verify", "sparse_decode", "multi_view", "acceptance_loss"}
needs_triton = pytest.mark.skipif(not triton_installed(), reason="triton is not installed")


def command(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    whole = [sys.executable, "-m", "bdlib", "bench", "gpu", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "new"
    finished = command("--out", str(folder), "--dry")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder, finished, json.loads((folder / "report.json").read_text(encoding="utf-8"))


@needs_triton
@pytest.mark.slow
def test_the_dry_run_holds_every_section(dry):
    folder, _, report = dry
    assert [section["name"] for section in report["sections"]] == SECTIONS
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    assert report["faults"] == []
    figures = {s["name"]: s["figures"] for s in report["sections"]}
    for name in ("correctness", "kernels"):
        assert {row["what"].partition(",")[0] for row in figures[name]} == KERNELS
    for row in figures["correctness"]:
        assert 0 < row["value"] < row["more"]["limit"]
    ways = {row["how"] for row in figures["kernels"]}
    assert {"kernel", "SDPA", "FlexAttention", "gather + SDPA", "PyTorch"} <= ways
    assert all(row["more"].get("agrees", True) for row in figures["kernels"])
    not_run = [row["how"] for row in figures["kernels"] if row["value"] is None]
    assert not_run == ["FlexAttention"]  # it has no backward on a CPU
    drafted = [(row["what"], row["how"]) for row in figures["decoding"]]
    assert drafted[:3] == [("plain", "PyTorch"), ("self-drafting", "PyTorch"), ("plain", "kernels")]
    assert [what for what, _ in drafted[3:]] == ["self-drafting", *bench_gpu.SHIPPED]
    assert [row["how"] for row in figures["training"]] == ["PyTorch", "kernels"]
    assert figures["training"][1]["more"]["difference of the first loss"] < 1e-4


@needs_triton
@pytest.mark.slow
def test_every_figure_says_where_it_is_from_and_that_it_is_dry(dry):
    _, finished, report = dry
    assert report["dry"] is True
    for section in report["sections"]:
        for row in section["figures"]:
            assert row["mark"] == bench_gpu.MARK == "dry run: no figure of a GPU"
            assert row["machine"] == report["machine"]["cpu"]
            assert row["commit"] == report["commit"]
            assert row["seed"] == report["seed"] == 0
            assert row["dtype"] or row["value"] is None
            if row["n"] > 1 and row["value"] is not None:
                assert row["low"] <= row["value"] <= row["high"]
    assert finished.stdout.startswith(bench_gpu.MARK)
    for line in ("kernels", "decoding", "training"):
        assert re.search(rf"^{line} +\d+ figures$", finished.stdout, re.MULTILINE)


@needs_triton
@pytest.mark.slow
def test_the_page_marks_every_row(dry):
    folder, _, report = dry
    page = (folder / "report.html").read_text(encoding="utf-8")
    rows = sum(len(section["figures"]) for section in report["sections"])
    assert page.count(f'<span class="mark">{bench_gpu.MARK}</span>') == rows
    assert re.findall(r'<h2 id="(\w+)">', page) == SECTIONS
    assert "NotImplementedError: FlexAttention does not support backward on CPU" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@needs_triton
def test_without_a_gpu_one_line_says_so(tmp_path):
    finished = command("--out", str(tmp_path / "new"))
    assert finished.returncode == 2
    assert finished.stderr == (
        "error: no GPU is usable here; --dry runs the same program on the CPU, on tiny sizes\n"
    )
    assert finished.stdout == ""
    assert not (tmp_path / "new").exists()


def test_a_dry_run_needs_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(bench_gpu, "triton_installed", lambda: True)
    with pytest.raises(ValueError, match="a dry run needs TRITON_INTERPRET=1, set before"):
        bench_gpu.run(tmp_path, dry=True)
    monkeypatch.setattr(bench_gpu, "triton_installed", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        bench_gpu.run(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what goes wrong
@pytest.fixture
def stubs(monkeypatch):
    """A run whose sections give one figure each."""
    monkeypatch.setattr(bench_gpu, "_check_machine", lambda dry: None)
    monkeypatch.setattr(bench_gpu, "_device_facts", lambda sizes: {"type": "cpu"})
    for name in SECTIONS:
        function = "read_bandwidth" if name == "bandwidth" else name
        row = bench_gpu.figure(name, "stub", "", torch.float32, "s", 1.5, 1.0, 2.0, 3)
        monkeypatch.setattr(bench_gpu, function, lambda *_, row=row: iter([row]))
    return monkeypatch


def test_a_section_that_fails_leaves_the_others(stubs, tmp_path):
    def fails(*_):
        yield bench_gpu.figure("first", "stub", "", "float32", "s", 1.0)
        raise RuntimeError("out of memory\nin two lines")

    stubs.setattr(bench_gpu, "decoding", fails)
    seen = []

    def look(name):
        file = tmp_path / "report.json"
        written = json.loads(file.read_text())["sections"] if file.exists() else []
        seen.append((name, [section["name"] for section in written]))

    report = bench_gpu.run(tmp_path, dry=True, progress=look)
    assert seen == [(name, SECTIONS[:i]) for i, name in enumerate(SECTIONS)]
    words = "RuntimeError: out of memory in two lines"
    assert report["faults"] == [f"decoding: decoding: {words}"]
    figures = {s["name"]: s["figures"] for s in report["sections"]}
    assert [row["value"] for row in figures["decoding"]] == [1.0, None]
    assert figures["training"][0]["value"] == 1.5
    assert f"FAULT decoding: decoding: {words}" in bench_gpu.summary(report)
    assert f'<li class="fault">decoding: decoding: {words}</li>' in bench_gpu.page(report)


def test_a_report_that_cannot_be_written_is_refused_before_any_work(stubs, tmp_path):
    (tmp_path / "report.json").mkdir()
    stubs.setattr(bench_gpu, "correctness", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="it is there already and is not a plain file"):
        bench_gpu.run(tmp_path, dry=True)


def test_the_page_escapes_what_it_shows(stubs, tmp_path):
    row = bench_gpu.figure("<script>", "a & b", "", "float32", "s", None, more={"<b>": "<i>"})
    stubs.setattr(bench_gpu, "training", lambda *_: iter([row]))
    page = bench_gpu.page(bench_gpu.run(tmp_path, dry=True))
    assert "&lt;script&gt;" in page
    assert "a &amp; b" in page
    assert "&lt;b&gt; &lt;i&gt;" in page
    assert not re.search("<script>|<b>|<i>", page)


def test_only_a_run_that_is_not_dry_is_without_the_mark(stubs, tmp_path):
    report = bench_gpu.run(tmp_path, dry=False)
    assert all(row["mark"] is None for s in report["sections"] for row in s["figures"])
    assert bench_gpu.MARK not in bench_gpu.page(report)
    assert bench_gpu.MARK not in bench_gpu.summary(report)


def test_an_alternative_may_be_missing_but_not_the_kernel():
    def missing():
        raise NotImplementedError("not on this GPU")

    def one():
        return torch.ones(4)

    def compared(**ways):
        ways = {name.replace("_", " "): work for name, work in ways.items()}
        made = (1024, ways, bench_gpu.DRY, [1e9])
        return list(bench_gpu._compared("verify", "toy", torch.float32, *made))

    rows = compared(kernel=one, SDPA=missing, other=lambda: torch.full((4,), 1.1))
    assert [row["fault"] for row in rows] == [None, None, None]
    assert rows[1]["value"] is None
    assert rows[1]["more"] == {"not run": "NotImplementedError: not on this GPU"}
    assert rows[2]["more"]["agrees"] is False
    milliseconds = rows[0]["more"]["milliseconds"]
    assert rows[0]["value"] == pytest.approx(1024 / milliseconds / 1e6)
    assert rows[0]["more"]["of bandwidth"] == pytest.approx(rows[0]["value"])
    assert rows[0]["low"] <= rows[0]["value"] <= rows[0]["high"]
    (row,) = compared(kernel=missing)
    assert row["fault"] == "NotImplementedError: not on this GPU"


def test_errors_above_the_limit_are_faults(monkeypatch):
    def cases(shape, dtype, length, device, seed):
        right = torch.ones(3, dtype=torch.float64)
        yield "good", [right + 1e-5], [right]
        yield "bad", [right + 0.1], [right]
        yield "void", [right * float("nan")], [right]

    monkeypatch.setattr(bench_gpu, "_cases", cases)
    same = [torch.ones(1, dtype=torch.float64)]
    monkeypatch.setattr(bench_gpu, "_loss_case", lambda *_: (same, same, same, same))
    sizes = bench_gpu.Sizes(device="cpu", shapes=(("toy", 1, 1, 64),), dtypes=(torch.float32,))
    rows = {row["what"]: row for row in bench_gpu.correctness(sizes, 0)}
    assert rows["good"]["fault"] is None
    assert rows["good"]["n"] == 5
    assert rows["bad"]["fault"] == "error 1.0e-01 is above 1e-03"
    assert rows["void"]["fault"] == "error inf is above 1e-03"
    assert rows["void"]["value"] is None
    json.dumps(rows, allow_nan=False)


def test_another_first_loss_is_a_fault():
    lines = [{"loss": 2.0 + i, "tokens": 100, "seconds": 0.5} for i in range(3)]
    first: dict[str, float] = {}
    assert bench_gpu._rate(bench_gpu.DRY, "toy", "PyTorch", lines, first)["fault"] is None
    assert bench_gpu._rate(bench_gpu.DRY, "toy", "kernels", lines, first)["fault"] is None
    lines[0]["loss"] = 2.1
    row = bench_gpu._rate(bench_gpu.DRY, "toy", "kernels", lines, first)
    assert row["fault"] == "the first loss is 2.1000, in PyTorch 2.0000"
    assert row["value"] == 200


def test_an_output_that_is_not_greedy_s_is_a_fault():
    spread = {"mean": 3.0, "low": 2.0, "high": 4.0, "n": 4}
    found = dict.fromkeys(
        ("acceptance_rate", "accepted_length", "speedup_decode", "ngram_acceptance_rate",
         "distinct_2", "identical"), 0.5,
    )  # fmt: skip
    found |= {"intervals": {"tokens_per_second": spread}, "scaling": "none", "dtype": "float32"}
    good = bench_gpu._speed("x", "y", "z", found | {"near_ties_only": True}, "tokens_per_second")
    assert good["fault"] is None
    assert (good["value"], good["low"], good["high"], good["n"]) == (3.0, 2.0, 4.0, 4)
    bad = bench_gpu._speed("x", "y", "z", found | {"near_ties_only": False}, "tokens_per_second")
    assert "more than rounding" in bad["fault"]


def test_a_quick_run_measures_fewer_of_the_same_things(stubs, tmp_path):
    seen = []
    stubs.setattr(bench_gpu, "kernels", lambda sizes, *_: seen.append(sizes) or iter([]))
    assert bench_gpu.run(tmp_path, quick=True)["quick"] is True
    assert bench_gpu.run(tmp_path)["quick"] is False
    quick, whole = seen
    assert quick == bench_gpu.QUICK
    assert set(quick.shapes) < set(whole.shapes)
    assert set(quick.lengths) < set(whole.lengths)
    assert set(quick.contexts) < set(whole.contexts)
    assert quick.dtypes == whole.dtypes
