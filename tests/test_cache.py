"""The full cache and the sparse one: what they hold, what they forget, what they never exceed."""

import random

import pytest
import tiny
import torch

from bdlib import attention
from bdlib.cache import SLACK, KVCache, QueryLog, SparseKVCache
from bdlib.decoding import decode
from bdlib.drafters import ModelDrafter, SelfDrafter, prefill
from bdlib.selection import POLICIES, Policy, Selection, make_policy

STORED = [name for name in POLICIES if not POLICIES[name].per_step]
BOUNDED = [name for name in POLICIES if name != "full"]
CONFIG = tiny.CONFIG


@pytest.fixture(scope="module")
def model():
    return tiny.model(seed=2, sharp=4.0)


def full_cache(model, text, capacity=None, policy=None):
    """A cache that holds all of ``text``."""
    observe = None if policy is None else make_policy(policy)
    cache = KVCache(CONFIG, capacity or len(text), dtype=torch.float64, observe=observe)
    model.hidden(text[None], cache)
    return cache


def sparse_cache(model, source, policy, budget):
    cache = SparseKVCache(CONFIG, budget, make_policy(policy), dtype=torch.float64)
    cache.fill(source)
    return cache


@torch.inference_mode()
def step(model, cache, tokens):
    return model(tokens[None], cache)[0]


def entries(cache, layer):
    """Keys and values that a sparse cache holds, in memory order, ``[B, H_kv, size, D]``."""
    held = slice(0, cache.size)
    return cache._keys[layer][:, :, held], cache._values[layer][:, :, held]


def at(full, layer, positions):
    """Keys and values of a full cache at ``positions`` ``[B, H_kv, m]``, whatever its length."""
    keys, values = full.keys(layer, 0, full.capacity), full.values(layer, 0, full.capacity)
    index = positions[..., None].expand(-1, -1, -1, keys.shape[-1])
    return keys.gather(2, index), values.gather(2, index)


# ------------------------------------------------------------------ the full cache


@pytest.mark.parametrize("keep", [0, 1, 30, 31, 32, 33, 63, 64, 65, 70])
def test_rewind_none_part_across_a_piece_all(model, keep):
    """70 tokens read in pieces of 32; whatever was forgotten, the next tokens come out the same."""
    text, other = tiny.text(70), tiny.text(9, seed=1)
    cache = prefill(model, torch.cat((text, text[:1])), 80, piece=32)
    before = [cache.keys(layer).clone() for layer in range(2)]
    assert cache.length == 70
    cache.rewind(keep)
    assert cache.length == keep
    assert cache.nbytes() == CONFIG.kv_bytes(keep, torch.float64)
    for layer in range(2):
        assert torch.equal(cache.keys(layer), before[layer][:, :, :keep])
    found = step(model, cache, other)
    expected = model(torch.cat((text[:keep], other))[None])[0, keep:]
    assert torch.allclose(found, expected, atol=1e-12)
    assert cache.length == keep + 9


def test_pieces_do_not_matter(model):
    text = tiny.text(101)
    whole, parts = (prefill(model, text, 101, piece=piece) for piece in (1024, 7))
    for layer in range(2):
        assert torch.allclose(whole.keys(layer), parts.keys(layer), atol=1e-12)
        assert torch.allclose(whole.values(layer), parts.values(layer), atol=1e-12)


def test_a_prompt_of_one_token_leaves_the_cache_empty(model):
    cache = prefill(model, tiny.text(1), 8)
    assert cache.length == 0
    assert torch.allclose(step(model, cache, tiny.text(1)), model(tiny.text(1)[None])[0])


def test_the_full_cache_refuses(model):
    cache = full_cache(model, tiny.text(20), capacity=24)
    with pytest.raises(ValueError, match="cache of 24 tokens cannot take 5 more after 20"):
        step(model, cache, tiny.text(5))
    assert cache.length == 20
    step(model, cache, tiny.text(4))
    for length in (25, -1):
        with pytest.raises(ValueError, match=f"cannot rewind to {length}: the cache holds 24"):
            cache.rewind(length)
    with pytest.raises(ValueError, match="capacity 0 must be at least 1"):
        KVCache(CONFIG, 0)
    for prompt in (torch.empty(0, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match="prompt must hold at least one token"):
            prefill(model, prompt, 8)


def test_a_batch_is_its_rows(model):
    text = torch.stack((tiny.text(30), tiny.text(30, seed=1)))
    cache = KVCache(CONFIG, 30, batch=2, dtype=torch.float64)
    both = torch.cat([model(part, cache) for part in text.split((20, 10), 1)], 1)
    assert torch.allclose(both, torch.cat([model(row[None]) for row in text]), atol=1e-12)
    assert cache.nbytes() == 2 * CONFIG.kv_bytes(30, torch.float64)
    sparse = SparseKVCache(CONFIG, 12, make_policy("chunk_topk"), batch=2, dtype=torch.float64)
    sparse.fill(cache)
    for row in range(2):
        alone = sparse_cache(model, full_cache(model, text[row]), "chunk_topk", 12)
        for layer in range(2):
            assert torch.equal(sparse.positions(layer)[row], alone.positions(layer)[0])


# ------------------------------------------------------------------ the log of queries


def recorded(policy, capacity, pieces):
    """A log after ``pieces`` of (start, length), and every query by layer and position."""
    log = QueryLog(CONFIG, policy, capacity, 1, torch.float64, torch.device("cpu"))
    generator, truth = torch.Generator().manual_seed(0), {}
    for start, length in pieces:
        for layer in range(2):
            q = torch.randn(1, 4, length, 8, generator=generator, dtype=torch.float64)
            log.record(layer, q, start)
            truth |= {(layer, start + i): q[:, :, i] for i in range(length)}
    return log, truth


@pytest.mark.parametrize("policy", ["chunk_topk_recent", "snapkv", "heavy_hitter"])
@pytest.mark.parametrize("length", [1, 7, 100, 333, 600])
def test_the_log_gives_back_what_was_asked(policy, length):
    chosen = make_policy(policy)
    for pieces in ([(0, length)], [(i, min(50, length - i)) for i in range(0, length, 50)]):
        log, truth = recorded(chosen, 600, pieces)
        for layer in range(2):
            queries, positions = log.read(layer, length)
            listed = positions.tolist()
            if chosen.observe == "recent":
                assert listed == list(range(max(0, length - chosen.observed_queries), length))
            else:
                assert listed == list(range(0, length, 3))  # 256 of 600: every third
                assert len(listed) <= chosen.observed_queries
            for i, position in enumerate(listed):
                assert torch.equal(queries[:, :, i], truth[layer, position])


@pytest.mark.parametrize("policy", ["chunk_topk_recent", "snapkv"])
@pytest.mark.parametrize("rejected", [1, 16, SLACK])
def test_rejected_drafts_do_not_cost_the_log_its_queries(policy, rejected):
    log, truth = recorded(make_policy(policy), 900, [(0, 500), (500, rejected)])
    queries, positions = log.read(1, 500)
    for i, position in enumerate(positions.tolist()):
        assert torch.equal(queries[:, :, i], truth[1, position])


# ------------------------------------------------------------------ the sparse cache


@pytest.mark.parametrize("policy", STORED)
@pytest.mark.parametrize("length", [1, 7, 8, 31, 90, 101])
def test_positions_tell_the_truth(model, policy, length):
    """The stored entry is the full cache's entry at the position that is told, head by head."""
    budget = 200 if policy == "full" else 29
    full = full_cache(model, tiny.text(length), policy=policy)
    sparse = sparse_cache(model, full, policy, budget)
    assert sparse.length == length
    assert sparse.size == sparse.peak_entries <= budget
    assert sparse.nbytes() == CONFIG.kv_bytes(sparse.size, torch.float64)
    for layer in range(2):
        positions = sparse.positions(layer)
        assert positions.shape == (1, 2, sparse.size)
        for head in positions[0].tolist():
            assert len(set(head)) == len(head)
            assert all(0 <= position < length for position in head)
        for found, expected in zip(entries(sparse, layer), at(full, layer, positions), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("policy", STORED)
@pytest.mark.parametrize("length", [1, 7, 64, 95, 96])
@torch.inference_mode()
def test_a_full_budget_is_the_dense_cache(model, policy, length):
    text, more = tiny.text(length), tiny.text(20, seed=1)
    full = full_cache(model, text, capacity=length + 20, policy=policy)
    sparse = sparse_cache(model, full, policy, length + 20)
    dropped = length % 8 if policy == "chunk_topk" else 0
    assert sparse.size == length - dropped
    found = torch.cat([step(model, sparse, part) for part in more.split((1, 1, 15, 3))])
    expected = step(model, full, more)
    if dropped:  # as the paper's code does, and as its documentation says
        assert not torch.allclose(found, expected, atol=1e-6)
        return
    assert torch.allclose(found, expected, atol=1e-12)
    held = sorted(sparse.positions(0)[0, 0].tolist())
    assert held == list(range(length + 20))


@torch.inference_mode()
def test_the_oracle_with_a_full_budget_is_the_dense_cache(model):
    text, more = tiny.text(50), tiny.text(20, seed=1)
    full = full_cache(model, text, capacity=70)
    sparse = sparse_cache(model, full, "oracle", 70)
    found = torch.cat([step(model, sparse, part) for part in more.split((1, 1, 15, 3))])
    assert torch.allclose(found, step(model, full, more), atol=1e-12)
    assert sparse.peak_entries == 70


@torch.inference_mode()
def test_less_than_a_full_budget_is_not(model):
    """The two tests above can fail: dropping some entries of this model does change its logits."""
    text, more = tiny.text(50), tiny.text(20, seed=1)
    expected = model(torch.cat((text, more))[None])[0, 50:]
    for policy in BOUNDED:
        full = full_cache(model, text, policy=policy)
        found = step(model, sparse_cache(model, full, policy, 36), more)
        assert (found - expected).abs().max() > 1e-3


@torch.inference_mode()
def test_many_tokens_at_once_see_what_single_steps_see(model):
    """150 tokens take the path of a prompt's piece; nothing is evicted in between."""
    full = full_cache(model, tiny.text(50), policy="snapkv")
    together, alone = (sparse_cache(model, full, "snapkv", 190) for _ in range(2))
    more = tiny.text(140, seed=1)
    found = step(model, together, more)
    expected = torch.cat([step(model, alone, token[None]) for token in more])
    assert torch.allclose(found, expected, atol=1e-12)


def watch(monkeypatch, budget):
    """Fail as soon as attention is given more than ``budget`` entries by a sparse cache."""
    seen = []
    few, many = attention.few_queries, attention.many_queries
    attend, sparse = SparseKVCache.attend, []

    def check(entries):
        if sparse:
            seen.append(entries)
            assert entries <= budget

    def counting_few(q, k, v, start):
        check(start + q.shape[2])
        return few(q, k, v, start)

    def counting_many(q, k, v):
        check(k.shape[2])
        return many(q, k, v)

    def marking(self, *arguments):
        sparse.append(self)
        try:
            return attend(self, *arguments)
        finally:
            sparse.pop()
            assert self.size <= self.budget

    monkeypatch.setattr(attention, "few_queries", counting_few)
    monkeypatch.setattr(attention, "many_queries", counting_many)
    monkeypatch.setattr(SparseKVCache, "attend", marking)
    return seen


@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("budget", [8, 13, 40])
@pytest.mark.parametrize("drafter", ["self", "model"])
def test_the_budget_holds_while_decoding(model, monkeypatch, policy, budget, drafter):
    """Generated tokens included: 60 of them, drafts of up to 16, budgets down to one chunk."""
    seen = watch(monkeypatch, budget)
    for refresh, gamma in ((None, 5), (2, 16)):
        chosen = make_policy(policy)
        if drafter == "self":
            made = SelfDrafter(model, chosen, budget, refresh)
        else:
            made = ModelDrafter(tiny.perturbed(model, 0.1), chosen, budget, refresh)
        prompt = tiny.text(45)
        cache = prefill(model, prompt, 105, made.observe)
        for _ in decode(model, cache, prompt, made, gamma=gamma, max_new_tokens=60):
            assert made.cache.size <= budget
            assert made.kv_entries <= budget
        assert made.kv_entries == max(seen)
    assert max(seen) > budget // 2  # it was used, too


@pytest.mark.parametrize("policy", STORED)
@pytest.mark.parametrize("refresh", [None, 3])
def test_after_every_round_a_self_drafter_holds_exact_entries(model, policy, refresh):
    """Accepted tokens are taken over from the target: equal bit for bit, rejected ones are gone."""
    budget = 110 if policy == "full" else 24
    drafter = SelfDrafter(model, make_policy(policy), budget, refresh)
    prompt = tiny.text(51)
    cache = prefill(model, prompt, 100, drafter.observe)
    for _ in decode(model, cache, prompt, drafter, gamma=6, max_new_tokens=50):
        if drafter.cache.length < cache.length:
            continue  # the last round is not committed
        assert drafter.cache.length == cache.length
        for layer in range(2):
            positions = drafter.cache.positions(layer)
            assert int(positions.max()) < cache.length
            pairs = zip(entries(drafter.cache, layer), at(cache, layer, positions), strict=True)
            assert all(torch.equal(found, expected) for found, expected in pairs)


@pytest.mark.parametrize("policy", STORED)
@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_any_sequence_of_steps_and_rewinds(model, policy, seed):
    """Keys of the first layer depend on token and position alone, so every entry can be checked."""
    rng = random.Random(100 * seed + STORED.index(policy))
    length = rng.choice((1, 9, 40, 77))
    budget = 400 if policy == "full" else rng.choice((8, 11, 19, 32, 53))
    full = full_cache(model, tiny.text(length), policy=policy)
    sparse = sparse_cache(model, full, policy, budget)
    tokens, start = tiny.text(length).tolist(), length
    selected = sparse._selected.shape[-1]
    floor = min(selected, make_policy(policy).floor(budget))
    for _ in range(25):
        if rng.random() < 0.3:
            keep = rng.randint(start, len(tokens))
            sparse.rewind(keep)
            tokens = tokens[:keep]
        else:
            more = [rng.randrange(23) for _ in range(rng.randint(1, min(6, budget)))]
            tokens += more
            step(model, sparse, torch.tensor(more))
            assert sparse.positions(0)[0, 0, -1] == len(tokens) - 1
        assert sparse.length == len(tokens)
        assert sparse.size <= budget
        positions = sparse.positions(0)
        recent = positions[0, 0, sparse._selected.shape[-1] :].tolist()
        if recent:  # an unbroken run up to the newest token
            assert recent == list(range(recent[0], len(tokens)))
        assert sparse._selected.shape[-1] >= floor - 6  # at most one burst more than its share
        expected = full_cache(model, torch.tensor(tokens))
        for found, truth in zip(entries(sparse, 0), at(expected, 0, positions), strict=True):
            assert torch.allclose(found, truth, atol=1e-12)


@pytest.mark.parametrize("policy", ["chunk_topk", "chunk_topk_recent", "sink_window"])
@torch.inference_mode()
def test_who_has_to_go(model, policy):
    """The order of eviction: see the policies' ``floor``."""
    full = full_cache(model, tiny.text(100), policy=policy)
    sparse = sparse_cache(model, full, policy, 32)
    selected = sparse._selected.clone()
    recent = list(sparse._recent)
    for token in tiny.text(70, seed=1):
        step(model, sparse, token[None])
    left = sparse._selected
    if policy == "chunk_topk":
        # The worst chunks first, until generated tokens fill half; the best stay, chunk 0 among them.
        assert recent == []
        assert torch.equal(left, selected[..., -16:])
        assert all(0 in head for layer in left for head in layer[0].tolist())
    else:
        # The selection stays; the window slides on.
        assert recent
        assert torch.equal(left, selected)
    held = sparse._recent
    assert held == list(range(held[0], 170))
    assert 30 - left.shape[-1] <= len(held) <= 32 - left.shape[-1]


@pytest.mark.parametrize("policy", [name for name in STORED if name != "full"])
@pytest.mark.parametrize("budget", [64, 256, 384])
@torch.inference_mode()
def test_the_newest_entries_stay_whatever_the_budget(model, policy, budget):
    """Room is made for many tokens at once; that must not take the window of a policy that has one."""
    full = full_cache(model, tiny.text(440), policy=policy)
    sparse = sparse_cache(model, full, policy, budget)
    window = len(sparse._recent)
    for token in tiny.text(budget // 16 + 3, seed=1):
        step(model, sparse, token[None])
        newest = sparse.positions(0)[0, 0].max().item()
        assert newest == sparse.length - 1
        assert len(sparse._recent) >= min(24, 0.75 * window)


@torch.inference_mode()
def test_rewinding_the_sparse_cache(model):
    text, more = tiny.text(60), tiny.text(6, seed=1)
    full = full_cache(model, text, capacity=80, policy="chunk_topk_recent")
    sparse = sparse_cache(model, full, "chunk_topk_recent", 40)
    before = sparse.positions(1)
    expected = step(model, sparse, more)
    sparse.rewind(66)  # none
    assert sparse.length == 66
    sparse.rewind(62)  # part: the next tokens come out as they did
    assert torch.allclose(step(model, sparse, more[2:]), expected[2:], atol=1e-12)
    sparse.rewind(60)  # all that was generated
    assert sparse.length == 60
    # Making room for the six tokens may have cost some of the oldest of the window.
    kept = sparse.positions(1)
    assert torch.equal(kept, before[..., : kept.shape[-1]]) or kept.shape[-1] < before.shape[-1]
    recent = sparse._recent[0]
    sparse.rewind(recent + 1)  # into the window that the policy chose
    assert sparse._recent == [recent]
    last = int(sparse._selected.max())
    with pytest.raises(
        ValueError, match=f"rewind to {last}: selected entries reach position {last}"
    ):
        sparse.rewind(last)
    sparse.rewind(last + 1)
    assert sparse._recent == []
    sparse.rewind(0)  # all
    assert (sparse.size, sparse.length, sparse.nbytes()) == (0, 0, 0)
    found = step(model, sparse, more)  # and it works as a new one
    assert torch.allclose(found, model(more[None])[0], atol=1e-12)
    for length in (7, -1):
        with pytest.raises(ValueError, match=f"cannot rewind to {length}: the cache is at 6"):
            sparse.rewind(length)


@torch.inference_mode()
def test_rewinding_behind_what_was_evicted_leaves_a_gap(model):
    sparse = SparseKVCache(CONFIG, 8, make_policy("sink_window"), dtype=torch.float64)
    for token in tiny.text(20):
        step(model, sparse, token[None])
    assert sparse.positions(0)[0, 0].tolist() == list(range(12, 20))
    sparse.rewind(15)
    assert sparse.positions(0)[0, 0].tolist() == [12, 13, 14]
    sparse.rewind(5)
    assert (sparse.size, sparse.length) == (0, 5)
    step(model, sparse, tiny.text(2))
    assert sparse.positions(0)[0, 0].tolist() == [5, 6]


@torch.inference_mode()
def test_entries_are_taken_over_from_a_full_cache(model):
    text = tiny.text(90)
    full = full_cache(model, text, capacity=90)
    whole = full.length
    full.rewind(40)
    sparse = sparse_cache(model, full, "chunk_topk", 24)
    full.length = whole
    sparse.extend_from(full, 40)  # 50 entries: more than twice the budget
    assert sparse.length == 90
    assert sparse.size <= 24
    for layer in range(2):
        positions = sparse.positions(layer)
        for found, truth in zip(entries(sparse, layer), at(full, layer, positions), strict=True):
            assert torch.equal(found, truth)
    assert sparse.positions(0)[0, 0, -1] == 89


@torch.inference_mode()
def test_the_oracle_reads_no_further_than_the_source(model):
    """A draft longer than the budget evicts drafted tokens; the source never held those."""
    text, draft = tiny.text(40), tiny.text(60, seed=1)
    found = []
    for garbage in (0.0, 1e6):
        full = full_cache(model, text, capacity=120)
        full._keys[:, :, :, 40:] = garbage  # what rejected drafts of earlier rounds left
        full._values[:, :, :, 40:] = garbage
        sparse = sparse_cache(model, full, "oracle", 32)
        found.append(torch.cat([step(model, sparse, token[None]) for token in draft]))
    assert torch.equal(*found)


def test_the_sparse_cache_refuses(model):
    for budget in (0, -3):
        with pytest.raises(ValueError, match=f"budget {budget} must be at least 1"):
            SparseKVCache(CONFIG, budget, make_policy("sink_window"))
    with pytest.raises(ValueError, match="budget 7 must be at least one chunk of 8"):
        SparseKVCache(CONFIG, 7, make_policy("chunk_topk"))
    full = full_cache(model, tiny.text(30))
    with pytest.raises(ValueError, match="policy 'full' needs a budget of 30, got 29"):
        sparse_cache(model, full, "full", 29)
    sparse = sparse_cache(model, full, "sink_window", 10)
    with pytest.raises(ValueError, match="11 tokens at once do not fit a budget of 10 entries"):
        step(model, sparse, tiny.text(11))
    assert sparse.length == 30
    for name in ("snapkv", "chunk_topk_recent", "heavy_hitter"):
        with pytest.raises(ValueError, match=f"policy '{name}' needs .* queries: .* observe="):
            sparse_cache(model, full, name, 10)
    for logged, name in (("chunk_topk_recent", "snapkv"), ("heavy_hitter", "snapkv"),
                         ("snapkv", "heavy_hitter")):  # fmt: skip
        full = full_cache(model, tiny.text(30), policy=logged)
        with pytest.raises(ValueError, match=f"policy '{name}' needs"):
            sparse_cache(model, full, name, 10)


def test_a_policy_that_chooses_too_much_is_refused(model):
    class Greedy(Policy):
        name = "greedy"

        def select(self, keys, budget, queries, positions):
            return Selection(torch.arange(budget).expand(1, 2, -1), 1)

    full = full_cache(model, tiny.text(30))
    sparse = SparseKVCache(CONFIG, 10, Greedy(), dtype=torch.float64)
    with pytest.raises(ValueError, match="policy 'greedy' chose 11 entries, budget 10"):
        sparse.fill(full)
