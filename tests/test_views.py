"""Training views equal decoding: a block's states are those a sparse cache would give."""

import pytest
import torch

from bdlib.cache import KVCache, SparseKVCache
from bdlib.selection import make_policy
from bdlib.transformer import Decoder, DecoderConfig
from bdlib.views import View, drafted_views, full_stream, sparse_view

CONFIG = DecoderConfig(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=256,
    rope={"rope_type": "default", "rope_theta": 10_000.0},
)
TOKENS = torch.randint(0, 53, (150,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model():
    return Decoder.random(CONFIG, seed=6, dtype=torch.float64)


@pytest.mark.parametrize(
    "policy", ["sink_window", "chunk_topk", "chunk_topk_recent", "snapkv", "heavy_hitter", "random"]
)
@pytest.mark.parametrize("start", [3, 60, 101, 138])
def test_a_view_is_what_decoding_sees(model, policy, start):
    chosen = make_policy(policy)
    length, budget = 12, 44
    stream = full_stream(model, TOKENS)
    found = sparse_view(model, TOKENS, stream, View(budget, chosen), [start], length)[0]

    full = KVCache(CONFIG, start, dtype=torch.float64, observe=chosen)
    model.hidden(TOKENS[None, :start], full)
    # The cache gets the same room: the block's own tokens come on top of what the policy may choose.
    sparse = SparseKVCache(CONFIG, budget - length, chosen, dtype=torch.float64)
    sparse.fill(full)
    roomy = _roomier(sparse, budget)
    expected = model.hidden(TOKENS[None, start : start + length], roomy)[0]
    assert torch.allclose(found, expected, atol=1e-10)


def _roomier(sparse, budget):
    """The same entries in a cache of a larger budget, so that nothing is evicted."""
    larger = SparseKVCache(CONFIG, budget, sparse.policy, dtype=torch.float64)
    larger._keys[:, :, :, : sparse.size] = sparse._keys[:, :, :, : sparse.size]
    larger._values[:, :, :, : sparse.size] = sparse._values[:, :, :, : sparse.size]
    larger._selected, larger._recent = sparse._selected, list(sparse._recent)
    larger.length = sparse.length
    return larger


def test_blocks_do_not_see_each_other(model):
    stream = full_stream(model, TOKENS)
    view = View(40, make_policy("chunk_topk_recent"))
    together = sparse_view(model, TOKENS, stream, view, [20, 64, 117], 16)
    for i, start in enumerate((20, 64, 117)):
        alone = sparse_view(model, TOKENS, stream, view, [start], 16)[0]
        assert torch.allclose(together[i], alone, atol=1e-12)


def test_views_at_once_are_views_one_by_one(model):
    stream = full_stream(model, TOKENS)
    budgets, starts = (24, 64, 40), ([20, 64, 117], [5], [64, 100])
    views = [View(budget, make_policy("chunk_topk_recent")) for budget in budgets]
    (together,) = drafted_views(
        model, TOKENS, stream, list(zip(views, starts, strict=True)), length=16
    )
    parts = together.split([len(blocks) for blocks in starts])
    for found, view, blocks in zip(parts, views, starts, strict=True):
        alone = sparse_view(model, TOKENS, stream, view, blocks, 16)
        assert torch.allclose(found, alone, atol=1e-12)


def test_a_full_budget_is_the_full_stream(model):
    stream = full_stream(model, TOKENS)
    assert torch.allclose(stream.hidden, model.hidden(TOKENS[None])[0], atol=1e-12)
    view = View(200, make_policy("sink_window"))
    found = sparse_view(model, TOKENS, stream, view, [50, 100], 25)
    assert torch.allclose(found[0], stream.hidden[50:75], atol=1e-10)
    assert torch.allclose(found[1], stream.hidden[100:125], atol=1e-10)


def test_gradient_reaches_the_keys_of_the_prefix():
    model = Decoder.random(CONFIG, seed=6, dtype=torch.float64).requires_grad_(True)
    stream = full_stream(model, TOKENS)
    for key in stream.keys:
        key.retain_grad()
    view = View(48, make_policy("sink_window"))
    sparse_view(model, TOKENS, stream, view, [100], 16).sum().backward()
    # The last layer: keys of earlier ones also reach the loss through the full stream's values.
    reached = stream.keys[-1].grad.abs().sum((0, 1, 3)) > 0
    assert reached[:4].all()  # the sinks
    assert reached[72:100].all()  # the window: 32 entries, 4 of them sinks
    assert not reached[4:72].any()


def test_refusals(model):
    stream = full_stream(model, TOKENS)
    with pytest.raises(ValueError, match="budget 16 must be above"):
        sparse_view(model, TOKENS, stream, View(16, make_policy("sink_window")), [50], 16)
    with pytest.raises(ValueError, match=r"start 140 must be in 1\.\.134"):
        sparse_view(model, TOKENS, stream, View(64, make_policy("sink_window")), [140], 16)
