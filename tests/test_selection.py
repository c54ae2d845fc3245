"""Every policy against a slow reference in plain loops, on tensors small enough to follow."""

import math

import pytest
import tiny
import torch

from bdlib import attention, selection
from bdlib.cache import KVCache, SparseKVCache
from bdlib.decoding import decode
from bdlib.drafters import ModelDrafter, SelfDrafter, prefill
from bdlib.selection import POLICIES, Policy, Selection, make_policy

HEADS, KV_HEADS, DIM = 4, 2, 3
LENGTHS = (1, 5, 8, 23, 40, 41, 47, 63)
BUDGETS = (1, 2, 7, 8, 9, 16, 23, 24, 40)


def draw(length, queries, seed=0):
    """Keys ``[1, H_kv, T, D]`` and queries ``[1, H, w, D]``; no two scores tie."""
    generator = torch.Generator().manual_seed(seed)
    keys = 2 * torch.randn(1, KV_HEADS, length, DIM, generator=generator)
    return keys, torch.randn(1, HEADS, queries, DIM, generator=generator)


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def mean_key(keys, start, stop):
    return [sum(float(k[d]) for k in keys[start:stop]) / (stop - start) for d in range(DIM)]


def masses(keys, queries, kv_head, positions=None):
    """Attention that each entry gets from the queries of the heads that share a KV head, summed."""
    total = [0.0] * len(keys)
    group = HEADS // KV_HEADS
    for head in range(kv_head * group, (kv_head + 1) * group):
        for i, query in enumerate(queries[0, head]):
            seen = len(keys) if positions is None else int(positions[i]) + 1
            weights = [math.exp(dot(query, key)) for key in keys[:seen]]
            for j, weight in enumerate(weights):
                total[j] += weight / sum(weights)
    return total


def ranked(scores, count):
    """The numbers of the ``count`` largest scores, worst first."""
    best = sorted(range(len(scores)), key=lambda j: -scores[j])[:count]
    return best[::-1]


def chunks(numbers):
    return [chunk * 8 + i for chunk in numbers for i in range(8)]


def selected(found):
    return [head.tolist() for head in found.indices[0]]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_contract_of_every_policy(name, budget):
    """Distinct positions, none in the window twice, together no more than the budget."""
    for length in LENGTHS:
        policy = make_policy(name)
        if name == "full" and length > budget:
            continue
        if name == "chunk_topk" and budget < 8:
            continue
        keys, queries = draw(length, length)
        positions = torch.arange(length)
        if policy.observe == "recent":
            queries, positions = (
                t[..., -policy.observed_queries :, :] for t in (queries, positions[:, None])
            )
            positions = positions[:, 0]
        found = policy.select(keys, budget, queries, positions)
        count = found.indices.shape[-1]
        assert found.indices.shape == (1, KV_HEADS, count)
        assert found.indices.dtype == torch.int64
        assert found.window >= 0
        assert count + found.window <= min(budget, length)
        for head in selected(found):
            assert len(set(head)) == count
            assert all(0 <= position < length - found.window for position in head)
        if length <= budget and name not in ("chunk_topk", "oracle"):
            assert (count, found.window) == (0, length)  # everything, in order


# ------------------------------------------------------------------ one by one


@pytest.mark.parametrize("budget", [8, 9, 16, 23, 24, 40, 64])
def test_chunk_topk_is_the_papers(budget):
    """Tail dropped, no recent window, chunk 0 always kept, scored by the last key in the cache."""
    for length in LENGTHS:
        keys, _ = draw(length, 1)
        found = make_policy("chunk_topk").select(keys, budget, None, None)
        assert found.window == 0
        whole = length // 8
        keep = min(budget // 8, whole)
        for head in range(KV_HEADS):
            listed = keys[0, head]
            scores = [dot(listed[-1], mean_key(listed, 8 * c, 8 * c + 8)) for c in range(whole)]
            scores[:1] = [math.inf] * min(1, whole)
            assert selected(found)[head] == chunks(ranked(scores, keep))
            assert not {p for p in selected(found)[head] if p >= 8 * whole}  # the last T % 8 tokens


def test_chunk_topk_may_not_see_the_text_it_continues():
    """What the lesson says of it: a last chunk that scores badly is dropped, tail and all."""
    keys = torch.zeros(1, 1, 43, 2)
    keys[..., :40, 0] = 1.0
    keys[..., 32:43, 0] = -5.0  # the recent text points away from ...
    keys[..., 42, 0] = 3.0  # ... the very last key
    found = make_policy("chunk_topk").select(keys, 32, None, None)
    assert sorted(selected(found)[0]) == list(range(32))


def test_chunk_zero_stays_although_it_scores_worst():
    keys = torch.ones(1, 1, 48, 2)
    keys[:, :, :8] = -9.0
    for budget, kept in ((8, 1), (24, 3)):
        found = selected(make_policy("chunk_topk").select(keys, budget, None, None))[0]
        assert found[-8:] == list(range(8))  # last in memory, so evicted last
        assert len(found) == 8 * kept


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("recent", [0.25, 0.5, 1.0])
def test_chunk_topk_recent(budget, recent):
    for length in LENGTHS:
        keys, queries = draw(length, 8)
        policy = make_policy("chunk_topk_recent", recent=recent)
        found = policy.select(keys, budget, queries, None)
        if length <= budget:
            assert found.window == length
            continue
        window = max(1, round(budget * recent))
        while (length - window) % 8:  # grows to the boundary of a chunk
            window += 1
        keep = (budget - window) // 8
        if keep < 1:
            assert (found.window, found.indices.shape[-1]) == (budget, 0)
            continue
        assert found.window == window
        for head in range(KV_HEADS):
            listed = keys[0, head]
            means = [mean_key(listed, c, c + 8) for c in range(0, length - window, 8)]
            scores = masses(means, queries, head)
            scores[0] = math.inf
            assert selected(found)[head] == chunks(ranked(scores, keep))


def test_the_window_starts_on_the_boundary_of_a_chunk():
    """No token falls between the window and the chunks: 24 entries, a quarter of them at least."""
    for length in range(25, 64):
        keys, queries = draw(length, 8)
        found = make_policy("chunk_topk_recent").select(keys, 24, queries, None)
        assert (length - found.window) % 8 == 0
        assert 6 <= found.window <= 13


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_sink_window(budget, sinks):
    for length in LENGTHS:
        keys, _ = draw(length, 1)
        found = make_policy("sink_window", sinks=sinks).select(keys, budget, None, None)
        first = min(sinks, budget // 2)
        expected = sorted({*range(first), *range(length - (budget - first), length)})
        if length <= budget:
            expected = list(range(length))
        for head in selected(found):
            assert head + list(range(length - found.window, length)) == expected


@pytest.mark.parametrize("budget", BUDGETS)
def test_snapkv(budget):
    for length in LENGTHS:
        watching = min(32, length)
        keys, queries = draw(length, watching)
        positions = torch.arange(length - watching, length)
        found = make_policy("snapkv").select(keys, budget, queries, positions)
        if length <= budget:
            continue
        window = min(32, max(1, budget // 2))
        assert found.window == window
        for head in range(KV_HEADS):
            mass = masses(keys[0, head], queries, head, positions)
            pooled = [max(mass[max(0, j - 3) : j + 4]) for j in range(length - window)]
            kept = [pooled[j] for j in selected(found)[head]]
            # Neighbours share a maximum, so which of them is kept is not determined; its score is.
            best = sorted(pooled, reverse=True)[: budget - window][::-1]
            assert kept == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_heavy_hitter(budget):
    for length in LENGTHS:
        stride = 2
        positions = torch.arange(0, length, stride)
        keys, queries = draw(length, len(positions))
        found = make_policy("heavy_hitter").select(keys, budget, queries, positions)
        if length <= budget:
            continue
        window = max(1, budget // 2)
        assert found.window == window
        for head in range(KV_HEADS):
            mass = masses(keys[0, head], queries, head, positions)[: length - window]
            assert selected(found)[head] == ranked(mass, budget - window)


def test_heavy_hitter_sums_over_all_its_queries():
    """More than one stretch of 32, which is how it reads them to save memory."""
    keys, queries = draw(100, 100)
    found = make_policy("heavy_hitter").select(keys, 20, queries, torch.arange(100))
    for head in range(KV_HEADS):
        mass = masses(keys[0, head], queries, head, torch.arange(100))[:90]
        assert selected(found)[head] == ranked(mass, 10)


@pytest.mark.parametrize("budget", [40, 64])
def test_random_is_random_and_repeatable(budget):
    keys, _ = draw(203, 1)
    one, again, other = (
        make_policy("random", seed=seed).select(keys, budget, None, None) for seed in (1, 1, 2)
    )
    assert torch.equal(one.indices, again.indices)
    assert not torch.equal(one.indices, other.indices)
    asked = make_policy("chunk_topk_recent").select(keys, budget, draw(203, 8)[1], None)
    assert one.window == other.window == asked.window
    assert one.indices.shape == asked.indices.shape
    for head in selected(one):
        assert head[-8:] == list(range(8))
        numbers = head[::8]
        assert head == chunks([n // 8 for n in numbers])


def test_random_spreads_over_the_text():
    keys = torch.zeros(1, 1, 800, 2)
    counts = [0] * 100
    for seed in range(400):
        found = make_policy("random", seed=seed).select(keys, 40, None, None)
        for position in selected(found)[0][:-8:8]:
            counts[position // 8] += 1
    total, places = sum(counts), (800 - found.window) // 8
    assert counts[0] == 0  # kept always, never drawn
    assert total == 400 * ((40 - found.window) // 8 - 1)
    expected = total / (places - 1)
    assert all(c < expected + 5 * math.sqrt(expected) for c in counts)
    assert sum(c > 0 for c in counts) > 0.9 * places


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("queries", [1, 3])
def test_oracle_takes_what_the_queries_look_at(budget, queries):
    for length in LENGTHS:
        keys, asked = draw(length, queries)
        found = make_policy("oracle").select(keys, budget, asked, None)
        assert found.window == 0
        for head in range(KV_HEADS):
            mass = masses(keys[0, head], asked, head)
            assert selected(found)[head] == ranked(mass, min(budget, length))


@torch.inference_mode()
def test_no_policy_covers_more_attention_than_the_oracle(monkeypatch):
    """Part of the last query's attention, in the first layer, that falls on what the cache shows."""
    model, text, original = tiny.model(seed=7, sharp=5.0), tiny.text(121), attention.few_queries
    covered = {}
    for name in set(POLICIES) - {"full"}:
        policy = make_policy(name)
        full = prefill(model, text, 121, policy)
        sparse = SparseKVCache(model.config, 25, policy, dtype=torch.float64)
        sparse.fill(full)
        parts = []

        def note(q, k, v, start, full=full, parts=parts):
            grouped = q.reshape(1, 2, 2, 8)
            scores = [
                (grouped @ keys.transpose(-1, -2)).exp().sum(-1)
                for keys in (k[:, :, :start], full.keys(len(parts), 0, 120))
            ]
            parts.append(float((scores[0] / scores[1]).mean()))
            return original(q, k, v, start)

        with monkeypatch.context() as patch:
            patch.setattr(attention, "few_queries", note)
            model(text[None, -1:], sparse)
        covered[name] = parts[0]
    assert covered["oracle"] == max(covered.values())
    assert covered["oracle"] > 1.2 * covered["random"]


# ------------------------------------------------------------------ when


class Counting(Policy):
    """Keeps the first entries, and counts the lengths of context it chose from."""

    name = "counting"
    chosen_at: list = []  # noqa: RUF012

    def select(self, keys, budget, queries, positions):
        self.chosen_at.append(keys.shape[2])
        return Selection(torch.arange(4).expand(1, 2, -1), 3)


@pytest.mark.parametrize("refresh", [None, 1, 2, 3])
@pytest.mark.parametrize("which", ["self", "model"])
def test_entries_are_chosen_once_or_every_so_many_rounds(refresh, which):
    model, prompt, policy = tiny.model(), tiny.text(33), Counting()
    policy.chosen_at.clear()
    if which == "self":
        drafter = SelfDrafter(model, policy, 16, refresh)
    else:
        drafter = ModelDrafter(tiny.model(seed=9), policy, 16, refresh)
    cache = prefill(model, prompt, 70)
    lengths = []
    for one in decode(model, cache, prompt, drafter, gamma=2, max_new_tokens=30):
        lengths.append(cache.length - len(one.emitted))  # where the round began
    expected = [
        length
        for number, length in enumerate(lengths)
        if number == 0 or (refresh and number % refresh == 0)
    ]
    assert policy.chosen_at == [length for length in expected for _ in range(2)]  # two layers
    assert len(lengths) > 6


@torch.inference_mode()
def test_choosing_again_sees_the_new_tokens():
    """A refreshed cache is the cache that a fresh drafter would make of the longer text."""
    model, prompt = tiny.model(sharp=4.0), tiny.text(60)
    policy = make_policy("snapkv")
    drafter = SelfDrafter(model, policy, 20, refresh=1)
    cache = prefill(model, prompt, 100, policy)
    text = prompt.tolist()
    for one in decode(model, cache, prompt, drafter, gamma=3, max_new_tokens=30):
        text += one.emitted
        drafter.select(one.index + 1)
        fresh = KVCache(model.config, 100, dtype=torch.float64, observe=policy)
        model.hidden(torch.tensor([text[:-1]]), fresh)
        expected = SparseKVCache(model.config, 20, policy, dtype=torch.float64)
        expected.fill(fresh)
        for layer in range(2):
            assert torch.equal(drafter.cache.positions(layer), expected.positions(layer))


# ------------------------------------------------------------------ names and refusals


def test_names():
    assert list(POLICIES) == [
        "full",
        "sink_window",
        "chunk_topk",
        "chunk_topk_recent",
        "random",
        "snapkv",
        "heavy_hitter",
        "oracle",
    ]
    assert make_policy("sink_window", sinks=7).sinks == 7
    with pytest.raises(ValueError, match=r"unknown policy 'best'; allowed: full, sink_window"):
        make_policy("best")
    for recent in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match=rf"recent {recent} must be a fraction"):
            make_policy("chunk_topk_recent", recent=recent)
    for name in POLICIES:
        with pytest.raises(ValueError, match=r"budget 0 must be at least"):
            make_policy(name).check(0)
    with pytest.raises(ValueError, match="policy 'full' needs a budget of 5, got 4"):
        make_policy("full").select(draw(5, 1)[0], 4, None, None)
    with pytest.raises(NotImplementedError):
        Policy().select(None, 1, None, None)


def test_a_policy_of_your_own_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(selection, "POLICIES", dict(POLICIES))

    @selection.register
    class Mine(selection.SinkWindow):
        name = "mine"

    assert isinstance(selection.make_policy("mine"), Mine)
    assert "mine" not in POLICIES
