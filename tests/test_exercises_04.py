"""The checks of lesson 04 accept right kernels and name what is wrong with others.

``triton.jit`` reads TRITON_INTERPRET when it decorates, so kernels run in a process of their own: this
module starts itself again with the variable set. Wrong kernels are the right one with a line changed.
"""

from __future__ import annotations

import linecache
import textwrap

import pytest
import tiny
import torch

from bdlib import exercises
from bdlib.kernels import lazy
from bdlib.kernels.lazy import Kernel, interpreted, triton_installed

needs_triton = pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
inside = pytest.mark.skipif(not interpreted(), reason="runs in the interpreter's process")
outside = pytest.mark.skipif(interpreted(), reason="needs a process that does not interpret")

CHUNK_SCORES = """
    @kernel
    def chunk_scores_kernel(
        q_ptr, k_ptr, out_ptr, entries, chunks,
        D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ):
        head = tl.program_id(0).to(tl.int64)
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        d = tl.arange(0, D)
        q = tl.load(q_ptr + head * D + d).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(CHUNK):
            at = (head * entries + c * CHUNK + i)[:, None] * D + d[None, :]
            k = tl.load(k_ptr + at, mask=(c < chunks)[:, None], other=0.0).to(tl.float32)
            total += tl.sum(k * q[None, :], 1)
        tl.store(out_ptr + head * chunks + c, total / CHUNK, mask=c < chunks)
"""
ONE_LOAD = """
        t = tl.program_id(1) * BLOCK * CHUNK + tl.arange(0, BLOCK * CHUNK)
        at = (head * entries + t)[:, None] * D + d[None, :]
        k = tl.load(k_ptr + at, mask=(t < chunks * CHUNK)[:, None], other=0.0).to(tl.float32)
        total = tl.sum(tl.reshape(tl.sum(k * q[None, :], 1), (BLOCK, CHUNK)), 1)
"""
SPARSE_DECODE = """
    @kernel
    def sparse_decode_kernel(
        q_ptr, k_ptr, v_ptr, chunks_ptr, out_ptr, entries, length, count,
        D: tl.constexpr, CHUNK: tl.constexpr,
    ):
        head = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, D)
        q = tl.load(q_ptr + head * D + d).to(tl.float32)
        m, z = float("-inf"), 0.0
        acc = tl.zeros((D,), tl.float32)
        for i in range(count):
            number = tl.load(chunks_ptr + head * count + i)
            t = number * CHUNK + tl.arange(0, CHUNK)
            real = t < length
            at = (head * entries + t)[:, None] * D + d[None, :]
            k = tl.load(k_ptr + at, mask=real[:, None], other=0.0).to(tl.float32)
            v = tl.load(v_ptr + at, mask=real[:, None], other=0.0).to(tl.float32)
            scores = tl.where(real, tl.sum(k * q[None, :], 1), float("-inf"))
            new_m = tl.maximum(m, tl.max(scores, 0))
            weights, kept = tl.exp(scores - new_m), tl.exp(m - new_m)
            z = z * kept + tl.sum(weights, 0)
            acc = acc * kept + tl.sum(weights[:, None] * v, 0)
            m = new_m
        tl.store(out_ptr + head * D + d, acc / z)
"""


def make(source, *change):
    """A kernel from its text, as in a notebook's cell, with one part of it exchanged."""
    if change:
        assert change[0] in source
        source = source.replace(*change)
    source = textwrap.dedent(source)
    source = "from __future__ import annotations\n" + source
    name = f"<cell {hash(source)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # for inspect
    scope = {"kernel": lazy.kernel, "tl": None}
    exec(compile(source, name, "exec"), scope)
    (found,) = (value for value in scope.values() if isinstance(value, Kernel))
    return found


@needs_triton
@outside
@pytest.mark.slow
def test_in_the_interpreter():
    tiny.run_in_interpreter(__file__)


# ---------------------------------------------------------------- right kernels
@inside
def test_accepts_chunk_scores():
    verdict = exercises.check_chunk_scores(make(CHUNK_SCORES))
    assert verdict.passed is True, verdict
    assert "every key of a whole chunk is read once" in verdict.message


@inside
def test_accepts_chunk_scores_in_one_load():
    """Another way: all keys of the program's chunks at once, averaged after a reshape."""
    start, end = CHUNK_SCORES.index("        total ="), CHUNK_SCORES.index("        tl.store")
    source = CHUNK_SCORES[:start] + ONE_LOAD + CHUNK_SCORES[end:]
    verdict = exercises.check_chunk_scores(make(source))
    assert verdict.passed is True, verdict


@inside
def test_accepts_sparse_decode():
    verdict = exercises.check_sparse_decode(make(SPARSE_DECODE))
    assert verdict.passed is True, verdict
    assert "7, 63, 100, 64 tokens" in verdict.message


# ---------------------------------------------------------------- what is not there yet
def test_untouched_kernels_are_to_do():
    for source, check in (
        (CHUNK_SCORES, exercises.check_chunk_scores),
        (SPARSE_DECODE, exercises.check_sparse_decode),
    ):
        if interpreted() or not triton_installed():
            lines = source.splitlines()
            end = next(i for i, line in enumerate(lines) if line.strip() == "):")
            empty = make("\n".join([*lines[: end + 1], "        pass"]))
            verdict = check(empty)
            assert verdict.passed is None, verdict
            assert "stores nothing yet" in verdict.message or "Linux only" in verdict.message


def test_a_plain_function_is_refused():
    verdict = exercises.check_chunk_scores(lambda *a: None)
    assert verdict.passed is False
    assert "@kernel" in verdict.message


def test_without_triton_the_verdict_says_so(monkeypatch):
    monkeypatch.setattr(lazy, "triton_installed", lambda: False)
    verdict = exercises.check_sparse_decode(make(SPARSE_DECODE))
    assert verdict.passed is None
    assert "wheels for Linux only" in verdict.message


@needs_triton
@outside
def test_without_the_interpreter_the_verdict_says_so():
    verdict = exercises.check_chunk_scores(make(CHUNK_SCORES))
    assert verdict.passed is False
    assert "TRITON_INTERPRET is not set" in verdict.message


# ---------------------------------------------------------------- wrong kernels
@inside
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("total / CHUNK", "total"), "this is the sum over a chunk; the mean is 1/8 of it"),
        (("total / CHUNK", "total / D"), "divide by CHUNK, not by D"),
        (("total +=", "total ="), "only the last key of each chunk counts"),
        (
            ("total += tl.sum(k * q[None, :], 1)", "total = tl.maximum(total, tl.sum(k, 1))"),
            "it should be",
        ),
        (
            ("mask=(c < chunks)[:, None], other=0.0", "mask=None"),
            "row 60 of k, head 0, is read and",
        ),
        (("total / CHUNK, mask=c < chunks", "total / CHUNK"), "past the end of out"),
        (("head * entries + c", "head * chunks * CHUNK + c"), "reads k of head 0, and should of"),
        (("head * entries + c", "c"), "program (1, 0) reads k of head 0"),
        (("q_ptr + head * D + d", "q_ptr + d"), "reads q of head 0, and should of head 1"),
        (("head * chunks + c, total", "head * entries + c, total"), "out"),
        (
            ("tl.program_id(1) * BLOCK +", "tl.program_id(1) * 0 +"),
            "row 32 of k, head 0, is not (wholly) read",
        ),
        ((").to(tl.float32)", ")"), "overflow float16"),
        (("c * CHUNK + i", "c * CHUNK"), "is not (wholly) read"),
        (("tl.arange(0, D)", "tl.arange(0, D // 2)"), "row 0 of k, head 0, is not (wholly) read"),
        (("tl.zeros", "tl.zeroes"), "AttributeError"),
        (("tl.store(out_ptr", "tl.store(k_ptr"), "store to out only"),
        (
            ("total += tl.sum(k * q[None, :], 1)", "total += tl.sum(k * q[None, :], 1) / D**0.5"),
            "scaled by 1/sqrt(D)",
        ),
        (
            (
                "total += tl.sum(k",
                "k = tl.load(k_ptr + at, mask=(c < chunks)[:, None], other=0.0)"
                ".to(tl.float32)\n            total += tl.sum(k",
            ),
            "is read 2.0 times: read it once",
        ),
    ],
)
def test_says_what_is_wrong_with_chunk_scores(change, message):
    verdict = exercises.check_chunk_scores(make(CHUNK_SCORES, *change), (64, 100, 63, 40))
    assert verdict.passed is False, verdict
    assert message in verdict.message


@inside
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("acc / z", "acc"), "not divided by the sum of the weights"),
        (("acc = acc * kept", "acc = acc"), "acc is not rescaled"),
        (("z = z * kept", "z = z"), "z is not rescaled"),
        (("tl.exp(m - new_m)", "1.0"), "z and acc are not rescaled"),
        (("m = new_m", "m = m"), "only the last chunk counts"),
        (("weights[:, None] * v", "weights[:, None] * k"), "keys are summed where values"),
        (
            ("tl.where(real, tl.sum(k * q[None, :], 1), float('-inf'))", "tl.sum(k * q[None, :], 1)"),
            "entries past the length count with a score of 0",
        ),
        (("real = t < length", "real = t < entries"), "is read and must not be: mask it"),
        (("real = t < length", "real = t >= 0"), "is read and must not be"),
        (("mask=real[:, None], other=0.0", "mask=real[:, None] & (t < 4)[:, None], other=0.0"),
         "is not (wholly) read"),
        (("tl.load(chunks_ptr + head * count + i)", "i"), "is read and must not be"),
        (("chunks_ptr + head * count + i", "chunks_ptr + i"), "reads chunks of head 0, and should"),
        (("new_m = tl.maximum(m, tl.max(scores, 0))", "new_m = 0.0"), "exp overflows"),
        (("k * q[None, :], 1)", "k * q[None, :], 1) / D**0.5"), "do not divide by sqrt(D) again"),
        (("tl.exp(scores - new_m)", "tl.where(real, 1.0, 0.0)"), "mean of the values"),
        (("out_ptr + head * D + d", "out_ptr + d"), "writes out of head 0, and should of head 1"),
        (("(head * entries + t)", "(head * entries + t + 4000)"), "past the end of k"),
    ],
)  # fmt: skip
def test_says_what_is_wrong_with_sparse_decode(change, message):
    source = SPARSE_DECODE.replace('"', "'")
    verdict = exercises.check_sparse_decode(make(source, *change))
    assert verdict.passed is False, verdict
    assert message in verdict.message


# ---------------------------------------------------------------- what a kernel touches
@inside
def test_memory_is_watched_and_guarded():
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_masked_load
    fn = make(CHUNK_SCORES)
    q, k, out = torch.ones(2, 64), torch.ones(2, 40, 64), torch.zeros(2, 5)
    constants = {"D": 64, "BLOCK": 2, "CHUNK": 8}
    with exercises.watch_memory(q=q, k=k, out=out) as seen:
        fn[(2, 3)](q, k, out, 40, 5, **constants)
    assert (out == 64).all()
    rows = exercises.programs_by_row(seen, "k", 64, 80)
    assert [p[:2] for p in rows] == [(h, t // 16) for h in range(2) for t in range(40)]
    assert sum(a.elements.size for a in seen if a.tensor == "k") == k.numel()
    assert {a.tensor for a in seen if a.stored} == {"out"}
    with pytest.raises(InterpreterError), exercises.watch_memory(q=q, k=k, out=out[:1]):
        fn[(2, 3)](q, k, out, 40, 5, **constants)
    assert InterpreterBuilder.create_masked_load is plain


# ---------------------------------------------------------------- compiled
@needs_triton
@outside
@pytest.mark.slow
def test_a_kernel_of_a_cell_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as in the notebook; the child must not inherit it
    tile = {"D": 64, "BLOCK": 16, "CHUNK": 8, "num_warps": 4, "num_stages": 2}
    types = {"out_ptr": "fp32"}
    (built,) = exercises.compile_answer(make(CHUNK_SCORES), [tile], ["sm_90"], types)
    assert built.row.target == "sm_90"
    assert 8 <= built.row.registers <= 255
    assert built.row.spilled == 0
    assert "LDG" in built.sass
    wrong = make(CHUNK_SCORES, "tl.zeros((BLOCK,)", "tl.zeros((chunks,)")
    with pytest.raises(ValueError, match="chunk_scores_kernel does not compile"):
        exercises.compile_answer(wrong, [tile], ["sm_90"], types)
