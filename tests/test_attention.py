"""Attention in its three shapes against a plain softmax in float64, and rows that round alike."""

import pytest
import tiny
import torch

from bdlib import assets, attention
from bdlib.cache import KVCache, SparseKVCache
from bdlib.pairs import cpu_has_bfloat16
from bdlib.selection import make_policy
from bdlib.transformer import Decoder

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
LENGTHS = (0, 1, 63, 64, 100, 1000)


def naive(q, k, v, start):
    """Softmax attention written out, in float64; query ``i`` sees the entries up to ``start + i``."""
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = start + i + 1
                keys, values = (t[b, h // group, :seen].double() for t in (k, v))
                scores = (keys * q[b, h, i].double()).sum(-1)
                weights = (scores - scores.max()).exp()
                out[b, h, i] = (weights[:, None] * values).sum(0) / weights.sum()
    return out


def draw(n, length, dtype, heads=6, kv_heads=2, dim=8, batch=1, seed=0):
    """Random queries, and keys and values stored as the caches store them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    keys = normal(batch, kv_heads, length, dim)
    return normal(batch, heads, n, dim), keys, normal(batch, kv_heads, length, dim)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n", [1, 2, 5, 17])
@pytest.mark.parametrize("start", LENGTHS)
def test_few_queries(n, start, dtype):
    q, k, v = draw(n, start + n, dtype)
    transposed = k.transpose(-1, -2).contiguous().transpose(-1, -2)  # as a prompt's piece has them
    for keys in (k, transposed):
        found = attention.few_queries(q, keys, v, start)
        assert found.dtype == dtype
        assert (found.double() - naive(q, k, v, start)).abs().max() < TOLERANCE[dtype]


def test_few_queries_of_a_whole_batch_up_to_the_limit():
    q, k, v = draw(attention.FEW, 40 + attention.FEW, torch.float64, heads=2, batch=2)
    assert torch.allclose(attention.few_queries(q, k, v, 40), naive(q, k, v, 40), atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_every_grouping(heads):
    q, k, v = draw(3, 53, torch.float64, heads=6, kv_heads=6 // heads)
    assert torch.allclose(attention.few_queries(q, k, v, 50), naive(q, k, v, 50), atol=1e-12)


@pytest.mark.parametrize("garbage", [1e30, -1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("n", [1, 4])
def test_what_lies_beyond_the_length_does_not_matter(n, garbage):
    """A cache hands out entries up to a multiple of ALIGN: the surplus was written by rejected drafts."""
    start, reach = 61 - n, 64
    q, k, v = draw(n, reach, torch.float64)
    expected = attention.few_queries(q, k[:, :, : start + n], v[:, :, : start + n], start)
    k[:, :, start + n :] = garbage
    # A weight of exactly 0 silences any number; values are numbers once decoding got this far.
    v[:, :, start + n :] = 1e30
    found = attention.few_queries(q, k, v, start)
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 63, 129])
@pytest.mark.parametrize("prefix", LENGTHS)
def test_many_queries(n, prefix, dtype):
    q, k, v = draw(n, prefix + n, dtype, heads=2, kv_heads=1)
    found = attention.many_queries(q, k, v)
    assert found.dtype == dtype
    assert (found.double() - naive(q, k, v, prefix)).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("scores", [1 << 23, 1 << 14, 1], ids=str)
@pytest.mark.parametrize(("n", "prefix"), [(150, 0), (200, 1000), (129, 1500)])
def test_many_queries_a_few_at_a_time(monkeypatch, n, prefix, scores):
    monkeypatch.setattr(attention, "SCORES", scores)
    q, k, v = draw(n, prefix + n, torch.bfloat16, heads=2, kv_heads=1)
    q = q / 4  # of the size that queries have
    found = attention.many_queries(q, k, v)
    assert (found.double() - naive(q, k, v, prefix)).abs().max() < TOLERANCE[torch.bfloat16]


def test_many_queries_grouped_and_batched():
    q, k, v = draw(37, 100, torch.float64, batch=2)
    assert torch.allclose(attention.many_queries(q, k, v), naive(q, k, v, 63), atol=1e-12)


def test_causal_attention_is_the_same_without_a_cache():
    q, k, v = draw(33, 33, torch.float64, batch=2)
    assert torch.allclose(attention.causal_attention(q, k, v), naive(q, k, v, 0), atol=1e-12)


@pytest.mark.parametrize("split", [1, 50, 99])
@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_merge_joins_any_two_parts(split, shift):
    """Also where one part outweighs the other by e^300, which would overflow without care."""
    q, k, v = draw(5, 100, torch.float64, heads=2, kv_heads=2)
    scores = q @ k.transpose(-1, -2)
    scores[..., split:] += shift

    def part(of):
        return torch.softmax(scores[..., of], -1) @ v[:, :, of], scores[..., of].logsumexp(-1)

    expected = torch.softmax(scores, -1) @ v
    first, second = part(slice(None, split)), part(slice(split, None))
    assert torch.allclose(attention.merge(*first, *second), expected, atol=1e-12)
    assert torch.allclose(attention.merge(*second, *first), expected, atol=1e-12)


def test_weights_are_those_of_the_softmax():
    q, k, v = draw(4, 21, torch.float64)
    positions = torch.tensor([3, 9, 9, 20])
    weights = attention.attention_weights(q, k, positions)
    assert weights.shape == (1, 2, 3, 4, 21)
    assert weights.dtype == torch.float32
    for h in range(6):
        for i, position in enumerate(positions.tolist()):
            row = weights[0, h // 3, h % 3, i]
            assert not row[position + 1 :].any()
            found = (row.double()[:, None] * v[0, h // 3]).sum(0)
            one = naive(
                q[:, h : h + 1, i : i + 1], k[:, h // 3, None], v[:, h // 3, None], position
            )
            assert torch.allclose(found, one[0, 0, 0], atol=1e-5)
    assert torch.allclose(attention.attention_weights(q, k).sum(-1), torch.ones(1, 2, 3, 4))


@pytest.mark.parametrize("n", [32, 127, 128, 129, 300])
def test_causal_attention_in_bfloat16_has_the_gradients_of_float64(n):
    """On CPU it goes a block of queries at a time, under autocast too."""
    generator = torch.Generator().manual_seed(n)
    shapes = ((1, 6, n, 16), (1, 2, n, 16), (1, 2, n, 16))
    exact = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    exact[0] *= 0.25  # as queries that are scaled already
    found = [t.float() for t in exact]
    for leaf in (*exact, *found):
        leaf.requires_grad_()
    attention.causal_attention(*exact).square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention.causal_attention(*found)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for want, leaf in zip(exact, found, strict=True):
        assert (leaf.grad - want.grad).norm() < 0.03 * want.grad.norm()


# ------------------------------------------------------------------ rows that round alike


@pytest.fixture(scope="module", params=["as it is", "without C"])
def smollm2(request):
    """The target as this machine computes it, and as one does that has no compiler."""
    if not cpu_has_bfloat16():
        pytest.skip("this CPU does not compute in bfloat16")
    in_c = attention.native.library() is not None and request.param == "as it is"
    if torch.cpu._is_amx_tile_supported() and not in_c:
        pytest.skip("PyTorch's products with AMX may sum in another order")
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "without C":
            patched.setattr(attention.native, "library", lambda: None)
        yield Decoder.load(assets.model_folder("smollm2"), dtype=torch.bfloat16)


@pytest.mark.parametrize("start", [200, 253, 300, 1022])
@pytest.mark.parametrize("n", [2, 5, 9])
@torch.inference_mode()
def test_verified_rows_are_bit_for_bit_those_of_single_steps(smollm2, start, n):
    """In bfloat16 on packed weights; 253 crosses a multiple of ALIGN, 1022 crosses BLOCK."""
    text = tiny.text(start + n, vocabulary=smollm2.config.vocab_size)[None]
    cache = KVCache(smollm2.config, start + 64, dtype=torch.bfloat16)
    smollm2.hidden(text[:, :start], cache)
    together = smollm2(text[:, start:], cache)
    cache.rewind(start)
    alone = [smollm2(text[:, i : i + 1], cache) for i in range(start, start + n)]
    assert torch.equal(together, torch.cat(alone, 1))


@torch.inference_mode()
def test_a_full_sparse_cache_rounds_like_the_full_cache(smollm2):
    text = tiny.text(120, vocabulary=smollm2.config.vocab_size)[None]
    cache = KVCache(smollm2.config, 128, dtype=torch.bfloat16)
    smollm2.hidden(text[:, :-1], cache)
    sparse = SparseKVCache(smollm2.config, 128, make_policy("full"), dtype=torch.bfloat16)
    sparse.fill(cache)
    assert torch.equal(smollm2(text[:, -1:], sparse), smollm2(text[:, -1:], cache))
