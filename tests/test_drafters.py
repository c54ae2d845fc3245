"""What each drafter proposes, what it remembers, and how much memory it owns up to."""

import random

import pytest
import tiny
import torch

from bdlib.cache import KVCache
from bdlib.decoding import GREEDY, decode, generate
from bdlib.drafters import ModelDrafter, NGramDrafter, SelfDrafter, prefill
from bdlib.sampling import Sampling
from bdlib.selection import make_policy

CONFIG = tiny.CONFIG


def policy(name="sink_window"):
    return make_policy(name)


# ------------------------------------------------------------------ n-gram lookup


def lookup(tokens, n, longest=3, shortest=1):
    """The rule in plain words: the longest ending seen before, its last occurrence, what followed."""
    for size in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[len(tokens) - size :]:
                return tokens[end : end + n]
    return []


def ngram(tokens, **settings):
    drafter = NGramDrafter(**settings)
    drafter.start(torch.tensor(tokens, dtype=torch.int64), None, 0)
    return drafter


def proposed(drafter, n):
    proposal = drafter.propose(0, n, GREEDY, None)
    assert proposal.probs is None  # it is certain
    assert proposal.tokens.dtype == torch.int64
    return proposal.tokens.tolist()


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 3, [4, 9, 1]),  # three tokens match
        ([1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3], 1, [4]),  # the longest match, not the latest
        ([7, 2, 3, 4, 8, 2, 3, 5, 6, 2, 3], 2, [5, 6]),  # of two equally long ones, the latest
        ([1, 2, 3, 4], 3, []),  # nothing was seen before
        ([5, 5], 4, [5]),  # what followed is short: only one token is known
        ([5, 5, 5, 5], 2, [5]),
        ([1, 2, 1], 9, [2, 1]),  # up to the end of the text, no further
        ([3], 2, []),
    ],
)
def test_lookup_by_hand(tokens, n, expected):
    assert proposed(ngram(tokens), n) == expected
    assert lookup(tokens, n) == expected


@pytest.mark.parametrize("letters", [2, 4, 12])
def test_lookup_against_a_search_through_everything(letters):
    rng = random.Random(letters)
    for _ in range(60):
        longest = rng.randint(1, 5)
        settings = {"longest": longest, "shortest": rng.randint(1, longest)}
        tokens = [rng.randrange(letters) for _ in range(rng.randint(1, 30))]
        drafter = ngram(tokens, **settings)
        for _ in range(6):
            n = rng.randint(1, 6)
            assert proposed(drafter, n) == lookup(tokens, n, **settings), (tokens, settings)
            more = [rng.randrange(letters) for _ in range(rng.randint(1, 4))]
            drafter.commit(more, 0)
            tokens = tokens + more


def test_lookup_starts_afresh_and_holds_nothing():
    drafter = ngram([1, 2, 1])
    drafter.start(torch.tensor([4, 5, 4]), None, 0)
    assert proposed(drafter, 1) == [5]
    assert (drafter.kv_entries, drafter.kv_bytes) == (0, 0)
    for settings in ({"shortest": 0}, {"longest": 1, "shortest": 2}, {"longest": 0}):
        with pytest.raises(ValueError, match="need 1 <= shortest <= longest"):
            NGramDrafter(**settings)


# ------------------------------------------------------------------ drafters with a model


def begin(drafter, target, prompt, capacity):
    cache = prefill(target, prompt, capacity, drafter.observe)
    with torch.inference_mode():
        drafter.start(prompt, cache, capacity)
        drafter.select(0)
    return cache


@torch.inference_mode()
def test_a_model_with_everything_in_view_drafts_its_own_greedy_text():
    target, model, prompt = tiny.model(), tiny.model(seed=9), tiny.text(21)
    for budget in (None, 60):
        drafter = ModelDrafter(model, policy("full"), budget)
        begin(drafter, target, prompt, 60)
        proposal = drafter.propose(int(prompt[-1]), 7, GREEDY, None)
        assert proposal.tokens.tolist() == tiny.greedy(model, prompt, 7)
        assert proposal.probs is None


@torch.inference_mode()
def test_sampled_drafts_come_with_the_distribution_they_came_from():
    target, model, prompt = tiny.model(), tiny.model(seed=9), tiny.text(21)
    sampling = Sampling(0.8, top_k=5)
    drafter = ModelDrafter(model, policy("full"))
    begin(drafter, target, prompt, 60)
    proposal = drafter.propose(int(prompt[-1]), 6, sampling, torch.Generator().manual_seed(0))
    text = torch.cat((prompt, proposal.tokens))
    expected = sampling.probs(model(text[None])[0, 20:-1])
    assert torch.allclose(proposal.probs, expected, atol=1e-12)
    assert (proposal.probs[torch.arange(6), proposal.tokens] > 0).all()


@torch.inference_mode()
def test_a_draft_vocabulary_is_translated_to_token_ids():
    target, prompt = tiny.model(), tiny.text(21)
    model, rows = tiny.model(seed=9), torch.tensor([2, 3, 11, 17, 22])
    whole = model(prompt[None])[0, -1]
    model.vocabulary = rows
    model.head.weight = torch.nn.Parameter(model.head.weight[rows], requires_grad=False)
    drafter = ModelDrafter(model, policy("full"))
    begin(drafter, target, prompt, 60)
    best = drafter.propose(int(prompt[-1]), 1, GREEDY, None).tokens
    assert best.tolist() == [int(rows[whole[rows].argmax()])]
    begin(drafter, target, prompt, 60)
    proposal = drafter.propose(int(prompt[-1]), 1, Sampling(1.0), torch.Generator().manual_seed(0))
    assert proposal.probs.shape == (1, 23)
    assert torch.allclose(proposal.probs[0, rows], torch.softmax(whole[rows], -1))
    assert float(proposal.probs.sum()) == pytest.approx(1)


def written(drafter):
    """A drafter's text as its cache has it: the length, and which positions it holds."""
    return drafter.cache.length, drafter.cache.positions(0)[0, 0].tolist()


@pytest.mark.parametrize("accepted", [0, 1, 4, 5])
@torch.inference_mode()
def test_a_model_drafter_goes_on_from_what_was_emitted(accepted):
    """Whatever part of five drafts was accepted, the next draft is that of the whole text so far."""
    target, model, prompt = tiny.model(), tiny.model(seed=9), tiny.text(21)
    drafter = ModelDrafter(model, policy("full"))
    begin(drafter, target, prompt, 60)
    drafts = drafter.propose(int(prompt[-1]), 5, GREEDY, None).tokens.tolist()
    emitted = [*drafts[:accepted], 7]
    drafter.commit(emitted, accepted)
    # What it computed is kept: only the last draft, which it never fed to itself, is left over.
    assert len(drafter._pending) == (accepted == 5)
    text = torch.cat((prompt, torch.tensor(emitted)))
    found = drafter.propose(7, 4, GREEDY, None).tokens.tolist()
    assert found == tiny.greedy(model, text, 4)
    assert written(drafter) == (len(text) + 3, list(range(len(text) + 3)))


@pytest.mark.parametrize("accepted", [0, 1, 4, 5])
@torch.inference_mode()
def test_a_self_drafter_takes_over_what_the_target_computed(accepted):
    target, prompt = tiny.model(sharp=4.0), tiny.text(31)
    drafter = SelfDrafter(target, policy(), 12)
    cache = begin(drafter, target, prompt, 60)
    drafts = drafter.propose(int(prompt[-1]), 5, GREEDY, None).tokens
    target(torch.cat((prompt[-1:], drafts))[None], cache)  # the verification
    cache.rewind(30 + accepted + 1)
    drafter.commit([*drafts[:accepted].tolist(), 7], accepted)
    length, positions = written(drafter)
    assert length == cache.length == 31 + accepted
    assert positions[0] == 0
    assert positions[-1] == 30 + accepted
    for layer in range(2):
        index = drafter.cache.positions(layer)[..., None].expand(-1, -1, -1, 8)
        held = drafter.cache._keys[layer][:, :, : drafter.cache.size]
        assert torch.equal(held, cache.keys(layer).gather(2, index))


@pytest.mark.parametrize("which", ["self", "model"])
@pytest.mark.parametrize("name", ["sink_window", "chunk_topk", "snapkv", "oracle"])
@torch.inference_mode()
def test_caches_hold_at_most_the_budget(which, name):
    target, prompt = tiny.model(), tiny.text(50)
    for budget in (8, 19):
        if which == "self":
            drafter = SelfDrafter(target, policy(name), budget)
        else:
            drafter = ModelDrafter(tiny.model(seed=9), policy(name), budget)
        result = generate(target, prompt, drafter, gamma=6, max_new_tokens=40)
        assert budget // 2 < drafter.kv_entries <= budget
        assert drafter.cache.size <= budget
        assert len(result.tokens) == 40


def test_bytes_are_those_allocated():
    target, prompt = tiny.model(), tiny.text(50)
    model = tiny.model(seed=9, num_layers=1, dtype=torch.float32)
    one = 2 * 1 * 2 * 8 * 4  # keys and values, layers, KV heads, head dimension, bytes of float32
    for drafter, expected in (
        (SelfDrafter(target, policy(), 16), 2 * 2 * 2 * 8 * 8 * 16),
        (ModelDrafter(model, policy(), 16), one * 16),
        (ModelDrafter(model, policy(), 16, refresh=2), one * (16 + 70)),  # its full cache is kept
        (ModelDrafter(model, policy("oracle"), 16), one * (16 + 70)),
        (ModelDrafter(model, policy("full")), one * 70),
    ):
        generate(target, prompt, drafter, max_new_tokens=20)
        assert drafter.kv_bytes == expected


@torch.inference_mode()
def test_a_model_drafter_lets_go_of_its_full_cache():
    target, prompt = tiny.model(), tiny.text(50)
    drafter = ModelDrafter(tiny.model(seed=9), policy(), 16)
    drafter.start(prompt, prefill(target, prompt, 70), 70)
    assert isinstance(drafter._full, KVCache)
    drafter.select(0)
    assert drafter._full is None


@pytest.mark.parametrize("name", ["sink_window", "snapkv", "oracle"])
def test_a_refreshed_model_drafter_knows_the_whole_text(name):
    """Every second round it chooses again, from a full cache that holds what was emitted."""
    target, model, prompt = tiny.model(), tiny.model(seed=9), tiny.text(40)
    drafter = ModelDrafter(model, policy(name), 16, refresh=2)
    cache = prefill(target, prompt, 80)
    text = prompt.tolist()
    for one in decode(target, cache, prompt, drafter, gamma=3, max_new_tokens=40):
        text += one.emitted
        if one.index % 2 == 0 and one.index:
            full = drafter._full
            with torch.inference_mode():
                expected = prefill(model, torch.tensor(text), 80)
            for layer in range(2):
                # What was emitted in this round is not taken in yet, except for a per-step policy.
                held = full.keys(layer)
                assert torch.allclose(held, expected.keys(layer, 0, full.length), atol=1e-12)
            assert len(text) - 8 < full.length < len(text)


def test_a_fresh_start_forgets_the_last_text():
    target, model = tiny.model(), tiny.perturbed(tiny.model(), 0.1)
    for drafter in (
        NGramDrafter(),
        SelfDrafter(target, policy("snapkv"), 12, refresh=2),
        ModelDrafter(model, policy("snapkv"), 12),
        ModelDrafter(model, policy("snapkv"), 12, refresh=2),
    ):
        generate(target, tiny.text(60, seed=3), drafter, max_new_tokens=20)
        used = generate(target, tiny.text(25), drafter, max_new_tokens=30)
        settings = {k: v for k, v in vars(drafter).items() if k in ("longest", "shortest")}
        if isinstance(drafter, SelfDrafter):
            fresh = SelfDrafter(target, policy("snapkv"), 12, refresh=2)
        elif isinstance(drafter, ModelDrafter):
            fresh = ModelDrafter(model, policy("snapkv"), 12, drafter.refresh)
        else:
            fresh = NGramDrafter(**settings)
        new = generate(target, tiny.text(25), fresh, max_new_tokens=30)
        assert [r.drafted for r in used.rounds] == [r.drafted for r in new.rounds]
        assert [r.emitted for r in used.rounds] == [r.emitted for r in new.rounds]


def test_a_refresh_can_only_change_what_is_drafted():
    target, prompt = tiny.model(sharp=4.0), tiny.text(60)
    drafted, emitted = [], []
    for refresh in (None, 1):
        drafter = SelfDrafter(target, policy("snapkv"), 12, refresh)
        result = generate(target, prompt, drafter, max_new_tokens=40)
        drafted.append([r.drafted for r in result.rounds])
        emitted.append(result.tokens)
    assert drafted[0] != drafted[1]
    assert emitted[0] == emitted[1]


@pytest.mark.parametrize("name", ["snapkv", "heavy_hitter", "sink_window"])
def test_a_decoding_that_starts_again_drafts_the_same(name):
    """Or says that it cannot: decoding goes on to fill the log of recent queries, which is a ring."""
    target, prompt = tiny.model(sharp=4.0), tiny.text(60)
    cache = prefill(target, prompt, 300, policy(name))

    def run(new_tokens):
        cache.rewind(59)
        drafter = SelfDrafter(target, policy(name), 12)
        result = generate(target, prompt, drafter, cache=cache, max_new_tokens=new_tokens)
        return [r.drafted for r in result.rounds]

    assert run(100) == run(100)
    first = run(200)
    if name == "snapkv":
        with pytest.raises(
            ValueError, match="queries before position 59 are gone: .* prefill again"
        ):
            run(200)
    else:
        assert run(200) == first
