"""Attention and layers in C against PyTorch, rows that round alike, and what happens without C."""

import math
import random
from dataclasses import replace

import pytest
import tiny
import torch

from bdlib import attention, models, transformer
from bdlib.cache import KVCache
from bdlib.kernels import native
from bdlib.transformer import Linear

needs_library = pytest.mark.skipif(native.library() is None, reason=f"steps in C {native.state()}")
LENGTHS = (1, 7, 63, 100, 256, 257, 1000)
SHAPES = ((9, 3, 64), (8, 8, 64), (8, 2, 128), (8, 1, 96), (3, 1, 32))  # heads, KV heads, dim


@pytest.fixture(autouse=True, params=["AVX512", "AMX"])
def kind(request):
    """Every test without AMX, and with it where there is some."""
    tiles = native.use_tiles(request.param == "AMX")
    if request.param == "AMX" and not tiles:
        pytest.skip("no AMX")
    yield request.param
    native.use_tiles(True)


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
@pytest.mark.parametrize("heads", [(9, 3), (8, 4), (8, 2)], ids=str)
def test_rows_do_not_depend_on_their_neighbours_or_the_threads(heads):
    """Heads in twos and fours too: weights are made for three rows at once, and one by one for the rest."""
    for length in (300, 1000):
        q, k, v = draw(*heads, 64, 60, length)
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
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_keys_change_nothing_but_where_they_lie(shape):
    """Steps, pieces of a prompt, rewinds and readers of all kinds: as with keys that stay rows."""
    heads, kv_heads, dim = shape
    config = replace(tiny.CONFIG, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
    caches = [KVCache(config, 500, dtype=torch.bfloat16) for _ in range(2)]
    caches[1].stay_rows()
    layers, chance = range(config.num_layers), random.Random(dim)
    for turn in range(60):
        length = caches[0].length
        if chance.random() < 0.3:
            back = chance.randrange(length + 1)
            for cache in caches:
                cache.rewind(back)
            length = back
        n = min(chance.choice((1, 1, 3, 5, 16, 32, 70)), 500 - length)
        if not n:
            continue
        for cache in caches:
            cache.reserve(n)
        for layer in layers:
            new = draw(*shape, n, n, slack=0, seed=100 * turn + layer)
            found = [cache.attend(layer, *new) for cache in caches]
            assert torch.equal(*found)
        for cache in caches:
            cache.advance(n)
        if n <= min(32, 128 * kv_heads // heads):
            assert caches[0]._packed == length // native.BLOCK * native.BLOCK
            assert caches[1]._packed == 0
        first = chance.randrange(length + n)
        last = chance.randrange(first, length + n + 1)
        packed = caches[0]._packed
        for layer in layers:
            assert torch.equal(*(cache.rows(layer, first, last) for cache in caches))
        for found, expected in zip(*(cache.entries(first, last) for cache in caches), strict=True):
            assert torch.equal(found, expected)
        assert caches[0]._packed == packed
        if chance.random() < 0.3:  # a view, to be written to
            for layer in layers:
                for cache in caches:
                    cache.keys(layer, first, last).neg_()
                assert torch.equal(*(cache.keys(layer, first, last) for cache in caches))
            assert caches[0]._packed <= first
    for cache in caches:
        cache.length = 100
    caches[0].pack()
    assert caches[0]._packed == 96
    caches[0].stay_rows()
    assert torch.equal(*(cache._keys for cache in caches))


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
    monkeypatch, another_library, tmp_path, kind
):
    import platformdirs

    state = "on, with AMX" if kind == "AMX" else "on"
    monkeypatch.setenv("BDLIB_NATIVE", {"AMX": "", "AVX512": "avx512"}[kind])

    made = []
    compile_it = native._compile
    monkeypatch.setattr(native, "_compile", lambda *a: (made.append(a), compile_it(*a)))
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *a, **k: tmp_path / "cache")
    for _ in range(2):
        native._library.cache_clear()
        assert native.state() == state
    assert len(made) == 1
    (tmp_path / "file").touch()
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *a, **k: tmp_path / "file")
    native._library.cache_clear()
    assert native.state() == state
    q, k, v = draw(9, 3, 64, 1, 64)
    assert native.attend(q, k, v, 63).isfinite().all()


# ---------------------------------------------------------------- the rest of a layer
def packed(seed=0, **sizes):
    """A tiny model of widths that the C file takes, in bfloat16, packed; and the same, not packed."""
    shape = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "vocab_size": 48} | sizes
    models = [tiny.model(dtype=torch.bfloat16, seed=seed, **shape) for _ in range(2)]
    return models[0].requires_grad_(False).pack(), models[1].requires_grad_(False)


def streams(model, batch, n, seed=0):
    """A residual stream, what attention found, and rotations at positions 40 and following."""
    c, generator = model.config, torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(batch, n, c.hidden_size, generator=generator)
    found = torch.randn(batch, n, c.num_heads, c.head_dim, generator=generator)
    return x, found.bfloat16().transpose(1, 2), model.rotations(40, 40 + n)


def close(found, expected, parts=64):
    """Equal but for a few roundings to bfloat16 (eight bits) of numbers up to the largest."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= expected.abs().max() / parts


@needs_library
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (1, 2), (1, 5), (1, 8), (1, 9), (3, 4), (1, 64)])
@torch.inference_mode()
def test_a_layer_in_c_is_the_layer(batch, n):
    in_c, usual = packed()
    assert in_c.layers[1].in_c
    x, found, (cos, sin) = streams(in_c, batch, n)
    layers = in_c.layers[1], usual.layers[1]
    assert native.takes(x)
    ours, theirs = (
        m.project(layer, x, cos, sin) for m, layer in zip((in_c, usual), layers, strict=True)
    )
    for a, b in zip(ours, theirs, strict=True):
        close(a.float(), b.float())
    for attended in (found, found.contiguous()):
        close(in_c.finish(layers[0], x, attended), usual.finish(layers[1], x, attended))
    many = streams(in_c, 1, native.MOST_TOKENS + 1)[0]
    assert not native.takes(many)
    assert torch.equal(
        in_c.finish(layers[0], many, found[:1, :, :1].expand(-1, -1, many.shape[1], -1)),
        usual.finish(layers[1], many, found[:1, :, :1].expand(-1, -1, many.shape[1], -1)),
    )


@needs_library
@torch.inference_mode()
def test_a_row_of_a_layer_does_not_depend_on_those_beside_it():
    model, _ = packed()
    layer = model.layers[0]
    x, found, (cos, sin) = streams(model, 1, 20)
    q, k, v = model.project(layer, x, cos, sin)
    after = model.finish(layer, x, found)
    scores = model.logits(x)
    threads = torch.get_num_threads()
    try:
        for first, stop, cores in ((0, 1, 1), (3, 4, 2), (5, 10, 1), (11, 20, 2)):
            torch.set_num_threads(cores)
            part = x[:, first:stop].contiguous()
            alone = model.project(layer, part, cos[first:stop], sin[first:stop])
            for whole, some in zip((q, k, v), alone, strict=True):
                assert torch.equal(whole[:, :, first:stop], some)
            assert torch.equal(
                after[:, first:stop], model.finish(layer, part, found[:, :, first:stop])
            )
            assert torch.equal(scores[:, first:stop], model.logits(part))
    finally:
        torch.set_num_threads(threads)


@needs_library
@torch.inference_mode()
def test_sequences_at_positions_of_their_own():
    model, usual = packed()
    x, _, _ = streams(model, 3, 4)
    cos, sin = (
        t[torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10], [2, 3, 4, 5]])] for t in model.rotations(0, 20)
    )
    for ours, theirs in zip(
        model.project(model.layers[0], x, cos, sin),
        usual.project(usual.layers[0], x, cos, sin),
        strict=True,
    ):
        close(ours.float(), theirs.float())


@needs_library
@torch.inference_mode()
def test_products_of_normed_parts():
    generator = torch.Generator().manual_seed(1)
    for groups, width, outputs, rows in ((1, 64, 16, 1), (2, 96, 48, 3), (3, 32, 80, 17)):
        x = torch.randn(1, rows, groups, width, generator=generator)
        norm = torch.rand(groups, width, generator=generator) + 0.5
        weight = torch.randn(outputs, groups * width, generator=generator).bfloat16()
        product = Linear(groups * width, outputs)
        product.weight = torch.nn.Parameter(weight, requires_grad=False)
        found = native.normed_product(product, norm, x, 1e-5)
        normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm
        expected = normed.bfloat16().double().flatten(-2) @ weight.double().T
        close(found.double(), expected, parts=200)
        assert torch.equal(found, found.bfloat16().float())  # rounded as a product in PyTorch
        codes, scale = in_eight_bits(weight)
        product.in_c = True
        product.keep(codes, scale)
        found = native.normed_product(product, norm, x, 1e-5)
        expected = normed.bfloat16().double().flatten(-2) @ (codes * scale.double()).T
        close(found.double(), expected, parts=200)
        assert torch.equal(found, found.bfloat16().float())


def in_eight_bits(weight):
    """Whole numbers from -127 to 127 and a scale a row, as a drafter's file holds a matrix."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scale).round().to(torch.int8), scale


@needs_library
@torch.inference_mode()
def test_a_layer_from_eight_bits():
    model, usual = packed(tie_embeddings=False)
    for ours, theirs in zip(model.modules(), usual.modules(), strict=True):
        if isinstance(ours, Linear) and ours.in_c:
            codes, scale = in_eight_bits(theirs.dense())
            ours.keep(codes, scale)
            theirs.weight = torch.nn.Parameter((codes * scale).bfloat16(), requires_grad=False)
            theirs.packed = None
    layers = model.layers[0], usual.layers[0]
    assert layers[0].down.codes is not None
    assert model.head.codes is not None
    x, found, turn = streams(model, 1, 20)
    ours, theirs = (
        m.project(layer, x, *turn) for m, layer in zip((model, usual), layers, strict=True)
    )
    for a, b in zip(ours, theirs, strict=True):
        close(a.float(), b.float())
    close(model.finish(layers[0], x, found), usual.finish(layers[1], x, found))
    close(model.logits(x), usual.logits(x))
    for first, stop in ((0, 1), (7, 10)):  # rows do not depend on those beside them
        part = x[:, first:stop].contiguous()
        whole = model.finish(layers[0], x, found)[:, first:stop]
        assert torch.equal(whole, model.finish(layers[0], part, found[:, :, first:stop]))
        assert torch.equal(model.logits(x)[:, first:stop], model.logits(part))


@needs_library
@torch.inference_mode()
def test_a_drafter_is_computed_from_the_eight_bits_of_its_file(tmp_path):
    target = packed()[1]
    cut = models.cut_from(target, (0,), torch.arange(0, 48, 3))
    models.save_drafter(cut, tmp_path, "# card\n")
    drafter = models.load_drafter(tmp_path, target)
    matrices = [m for m in drafter.modules() if isinstance(m, Linear)]
    assert len(matrices) == 5
    assert all(m.codes is not None for m in matrices)
    usual = models.load_drafter(tmp_path, target, pack=False)
    assert all(m.codes is None for m in usual.modules() if isinstance(m, Linear))
    tokens = torch.tensor([[1, 5, 9, 2]])
    close(drafter(tokens), usual(tokens), parts=32)


def test_eight_bits_are_kept_where_c_reads_them():
    codes, scale = in_eight_bits(torch.randn(16, 32))
    product = Linear(32, 16)
    product.keep(codes, scale)
    assert product.codes is None
    product.in_c = True
    product.keep(codes.T.contiguous().T, scale)
    assert product.codes.is_contiguous()
    assert torch.equal(product.codes, codes)


@needs_library
def test_a_head_in_c_and_what_stays_with_pytorch():
    with torch.inference_mode():
        in_c, usual = packed(tie_embeddings=False)
        assert in_c.head.in_c
        x = streams(in_c, 1, 5)[0]
        close(in_c.logits(x), usual.logits(x))
        assert in_c.logits(x, wide=False).dtype == torch.bfloat16
        tied = packed(tie_embeddings=True)[0]
        assert tied.head.in_c
        assert tied.head.weight is tied.embedding  # in memory once
    for sizes in (
        {"hidden_size": 100},
        {"head_dim": 16},
        {"attention_bias": True},
        {"qk_norm": True},
    ):
        model = packed(**sizes)[0]
        assert not any(layer.in_c for layer in model.layers)
        assert not any(m.in_c for layer in model.layers for m in layer.children())
    wide = tiny.model(
        dtype=torch.float32, hidden_size=96, intermediate_size=160, head_dim=32
    ).pack()
    assert not wide.layers[0].in_c
    x = streams(in_c, 1, 5)[0]
    assert native.takes(x)
    for other in (x.clone().requires_grad_(True), x.bfloat16(), x[:, ::2]):
        assert not native.takes(other)


@needs_library
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_no_head_stays_in_its_file(tied, tmp_path):
    packed(tie_embeddings=tied)[0].save(tmp_path)
    before = len(transformer._IN_FILES)
    found = transformer.Decoder.load(tmp_path, dtype=torch.bfloat16)
    assert found.head.in_c
    assert (len(transformer._IN_FILES) > before) == (not tied)
    assert (found.head.weight is found.embedding) == tied


@needs_library
@torch.inference_mode()
def test_a_model_decodes_alike_with_and_without_c(monkeypatch):
    in_c, usual = packed(seed=3)
    tokens = torch.randint(0, 48, (1, 40), generator=torch.Generator().manual_seed(2))
    found = []
    for model in (in_c, usual):
        cache = KVCache(model.config, 64, 1, torch.bfloat16)
        steps = [
            model(tokens[:, :20], cache),
            *(model(t[None], cache) for t in tokens[0, 20:, None]),
        ]
        found.append(torch.cat(steps, 1))
    close(*found, parts=16)
    monkeypatch.setattr(native, "library", lambda: None)  # after it was packed
    cache = KVCache(in_c.config, 64, 1, torch.bfloat16)
    close(in_c(tokens, cache), found[1], parts=16)


@needs_library
def test_a_cache_extended_in_one_call():
    for n in (1, 3, 7):
        q, k, v = draw(9, 3, 64, n, 100)
        generator = torch.Generator().manual_seed(n)
        new = torch.randn(2, 1, n, 3, 64, generator=generator).bfloat16().transpose(2, 3)
        keys, values = k.clone(), v.clone()
        strided = q.transpose(1, 2).contiguous().transpose(1, 2)
        found = native.extend(strided, *new, keys, values, 70)
        k[:, :, 70 : 70 + n], v[:, :, 70 : 70 + n] = new
        assert torch.equal(keys.nan_to_num(), k.nan_to_num())
        assert torch.equal(values.nan_to_num(), v.nan_to_num())
        assert torch.equal(found, native.attend(q, k, v, 70))
    before = keys.clone()
    assert native.extend(q.float(), *new, keys, values, 70) is None
    assert torch.equal(keys.nan_to_num(), before.nan_to_num())  # nothing was stored
