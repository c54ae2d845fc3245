"""Attention in C against a plain softmax in float64, rows that round alike, and what happens without it."""

import math

import pytest
import torch

from bdlib import attention
from bdlib.kernels import native

needs_library = pytest.mark.skipif(
    native.library() is None, reason=f"attention in C {native.state()}"
)
LENGTHS = (1, 7, 63, 100, 256, 257, 1000)
SHAPES = ((9, 3, 64), (8, 8, 64), (8, 2, 128), (8, 1, 96), (3, 1, 32))  # heads, KV heads, dim


@pytest.fixture
def another_library():
    """Lets a test look for the library anew, and puts the usual one back after it."""
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def draw(heads, kv_heads, dim, n, length, batch=1, slack=9, seed=0):
    """Queries, and keys and values with ``slack`` more entries of NaN, as parts of a longer cache."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    q = normal(batch, heads, n, dim) * dim**-0.25
    k, v = (normal(batch, kv_heads, length + slack, dim) for _ in "kv")
    k[:, :, length:] = v[:, :, length:] = float("nan")
    return q, k, v


def exact(q, k, v, start):
    """Softmax attention in float64."""
    group, stop = q.shape[1] // k.shape[1], start + q.shape[2]
    k, v = (t[:, :, :stop].double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2)
    later = torch.arange(stop) > torch.arange(start, stop)[:, None]
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_a_softmax(shape, length):
    for n in {1, 2, 5, 12, 16, 63, 200}:
        if n <= length:
            q, k, v = draw(*shape, n, length)
            found = native.attend(q, k, v, length - n)
            expected = exact(q, k, v, length - n)
            assert found.dtype == torch.bfloat16
            assert found.shape == q.shape
            # Weights and the result are rounded to eight bits, nothing else is.
            assert (found.double() - expected).abs().max() < 2**-7 * expected.abs().max()


@needs_library
def test_rows_do_not_depend_on_their_neighbours_or_the_threads():
    for length in (300, 1000):
        q, k, v = draw(9, 3, 64, 60, length)
        together = native.attend(q, k, v, length - 60)
        for i in range(60):
            start = length - 60 + i
            assert torch.equal(
                native.attend(q[:, :, i : i + 1], k, v, start), together[:, :, i : i + 1]
            )
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(native.attend(q, k, v, length - 60), together)
        finally:
            torch.set_num_threads(threads)


@needs_library
def test_sequences_of_a_batch_and_any_strides():
    q, k, v = draw(6, 2, 64, 3, 70, batch=3)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)  # entries before heads
    found = native.attend(q, k, v[:, :, ::1], 67)
    assert (found.double() - exact(q, k, v, 67)).abs().max() < 0.02
    alone = torch.cat(
        [native.attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], 67) for b in range(3)]
    )
    assert torch.equal(found, alone)


@needs_library
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_large_and_small_numbers(size):
    q, k, v = draw(3, 1, 64, 2, 500)
    found = native.attend(q, k * size, v * size, 498)
    expected = exact(q, k * size, v * size, 498)
    assert found.isfinite().all()
    assert (found.double() - expected).abs().max() < 2**-6 * expected.abs().max()


@needs_library
def test_attention_uses_it_and_no_gradient_is_lost(monkeypatch):
    q, k, v = draw(9, 3, 64, 2, 64, slack=0)
    assert torch.equal(attention.few_queries(q, k, v, 62), native.attend(q, k, v, 62))
    leaf = q.clone().requires_grad_()
    attention.few_queries(leaf, k, v, 62).sum().backward()
    assert leaf.grad is not None
    in_c = attention.few_queries(q, k, v, 62)
    monkeypatch.setattr(native, "library", lambda: None)
    assert (attention.few_queries(q, k, v, 62).double() - in_c.double()).abs().max() < 0.02


def test_what_it_is_not_for_is_left_to_pytorch():
    q, k, v = draw(9, 3, 64, 2, 64)
    assert native.attend(q.float(), k.float(), v.float(), 62) is None
    assert native.attend(*draw(9, 3, 40, 2, 64), 62) is None
    assert native.attend(*draw(129, 1, 32, 1, 64), 63) is None
    turned = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert native.attend(q, turned, v, 62) is None


def test_it_can_be_turned_off(monkeypatch, another_library):
    monkeypatch.setenv("BDLIB_NATIVE", "0")
    assert native.library() is None
    assert native.state() == "off: BDLIB_NATIVE is 0"


@needs_library
def test_without_a_compiler_or_with_a_failing_one(monkeypatch, another_library, tmp_path):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.state() == "off: there is no gcc"
    native._library.cache_clear()
    failing = tmp_path / "gcc"
    failing.write_text("#!/bin/sh\n[ $1 = --version ] || { echo no such flag >&2; exit 1; }\n")
    failing.chmod(0o755)
    monkeypatch.setattr(native.shutil, "which", lambda name: str(failing))
    assert native.state() == "off: gcc says no such flag"


@needs_library
def test_it_is_compiled_once_and_even_where_nothing_can_be_kept(
    monkeypatch, another_library, tmp_path
):
    import platformdirs

    made = []
    compile_it = native._compile
    monkeypatch.setattr(native, "_compile", lambda *a: (made.append(a), compile_it(*a)))
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *a, **k: tmp_path / "cache")
    for _ in range(2):
        native._library.cache_clear()
        assert native.state() == "on"
    assert len(made) == 1
    (tmp_path / "file").touch()
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *a, **k: tmp_path / "file")
    native._library.cache_clear()
    assert native.state() == "on"
    q, k, v = draw(9, 3, 64, 1, 64)
    assert native.attend(q, k, v, 63).isfinite().all()
