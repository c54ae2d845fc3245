"""Speculative decoding emits the target's own output, round by round.

The losslessness cases run in float64, where a row of many and a row of one round alike to far less
than any gap between two logits, so outputs are compared token for token.
"""

import random
from collections import Counter

import pytest
import tiny
import torch

from bdlib.decoding import PHASES, Generation, Round, decode, generate
from bdlib.drafters import Drafter, ModelDrafter, NGramDrafter, Proposal, SelfDrafter, prefill
from bdlib.sampling import Sampling
from bdlib.selection import POLICIES, make_policy

# ------------------------------------------------------------------ losslessness

SHAPES = (
    {},
    {"num_kv_heads": 1, "num_layers": 1},
    {"num_kv_heads": 4, "model_type": "qwen3", "qk_norm": True},
    {"num_layers": 3, "attention_bias": True, "model_type": "qwen2", "tie_embeddings": True},
)
LENGTHS = (1, 2, 3, 7, 8, 9, 17, 31, 33, 64, 75)
BUDGETS = (8, 9, 13, 16, 24, 37, 64, 300)  # one chunk to far above the context
GAMMAS = (1, 2, 3, 5, 8, 16)
CASES = 20  # for each drafter and policy
NEW_TOKENS = 24


class Pair:
    """A small target, a second model that agrees with it now and then, and what plain decoding gives."""

    def __init__(self, number):
        self.target = tiny.model(seed=number, sharp=4.0, **SHAPES[number])
        self.models = [tiny.perturbed(self.target, 0.12, seed=1), tiny.model(seed=99)]
        part = tiny.perturbed(self.target, 0.12, seed=2)
        part.vocabulary = torch.arange(0, part.config.vocab_size, 2)
        rows = part.head.weight[part.vocabulary]
        part.head.weight = torch.nn.Parameter(rows, requires_grad=False)
        self.models.append(part)
        self.known = {}

    def plain(self, length):
        """A prompt of this length and its plain greedy continuation, which no cache had a part in."""
        if length not in self.known:
            prompt = tiny.text(length, seed=length)
            if length > 20:  # some that repeat, for n-gram lookup
                prompt[length // 2 :] = prompt[: length - length // 2].clone()
            with torch.inference_mode():
                self.known[length] = prompt, tiny.greedy(self.target, prompt, NEW_TOKENS)
        return self.known[length]


@pytest.fixture(scope="module")
def pairs():
    return [Pair(number) for number in range(len(SHAPES))]


def check_rounds(result, gamma, new_tokens, stops):
    """What has to hold of the rounds of any decoding."""
    assert [r.index for r in result.rounds] == list(range(len(result.rounds)))
    left = new_tokens
    for number, one in enumerate(result.rounds):
        last = number == len(result.rounds) - 1
        assert 1 <= len(one.emitted) <= one.accepted + 1 <= len(one.drafted) + 1
        assert len(one.drafted) <= min(gamma, left - 1)
        assert one.emitted[: one.accepted] == one.drafted[: len(one.emitted)][: one.accepted]
        kind = "plain" if not one.drafted else "bonus"
        if one.accepted < len(one.drafted):
            kind = "corrected"
        assert one.kind == kind
        cut = len(one.emitted) <= one.accepted
        assert not cut or (last and one.emitted[-1] in stops)
        assert not set(one.emitted[:-1]) & stops
        if kind == "corrected" and not cut:
            assert one.emitted[-1] != one.drafted[one.accepted]
        assert set(one.seconds) == set(PHASES)
        assert all(seconds >= 0 for seconds in one.seconds.values())
        assert number == 0 or one.seconds["prefill"] == 0
        left -= len(one.emitted)
    assert left >= 0
    assert left == 0 or result.tokens[-1] in stops
    assert result.drafted == sum(len(r.drafted) for r in result.rounds)
    assert result.accepted == sum(r.accepted for r in result.rounds)
    rate = result.accepted / result.drafted if result.drafted else 0.0
    assert result.accepted_length == len(result.tokens) / len(result.rounds)
    assert result.accepted_length <= 1 + gamma * rate + 1e-12


def run_cases(pairs, drafter_name, policy_name):
    """Random cases of one drafter and policy; counts of what happened in them."""
    rng = random.Random(f"{drafter_name} {policy_name}")
    seen = Counter()
    for _ in range(CASES):
        pair, length, gamma = rng.choice(pairs), rng.choice(LENGTHS), rng.choice(GAMMAS)
        budget, refresh = rng.choice(BUDGETS), rng.choice((None, None, 1, 3))
        if policy_name == "full":
            budget = 300
        prompt, expected = pair.plain(length)
        stops = set()
        if rng.random() < 0.3:  # a token that comes up along the way
            stops = {rng.choice(expected[2:])}
            expected = expected[: next(i for i, t in enumerate(expected) if t in stops) + 1]
        if drafter_name == "self":
            drafter = SelfDrafter(pair.target, make_policy(policy_name), budget, refresh)
        elif drafter_name == "model":
            model = rng.choice(pair.models)
            drafter = ModelDrafter(model, make_policy(policy_name), budget, refresh)
        else:
            drafter = NGramDrafter(longest=rng.choice((1, 2, 4)))
        cache = prefill(
            pair.target, prompt, length + NEW_TOKENS, drafter.observe, piece=rng.choice((5, 1024))
        )
        result = generate(
            pair.target, prompt, drafter, cache=cache, gamma=gamma, max_new_tokens=NEW_TOKENS,
            stop_tokens=stops,
        )  # fmt: skip
        case = pair.target.config.model_type, length, budget, gamma, refresh, stops
        assert result.tokens == expected, case
        assert cache.length == length + len(expected) - 1, case
        check_rounds(result, gamma, NEW_TOKENS, stops)
        last = result.rounds[-1]
        seen["cases"] += 1
        seen["accepted"] += result.accepted
        seen["rejected"] += result.drafted - result.accepted
        seen["all accepted"] += any(r.kind == "bonus" for r in result.rounds)
        seen["stop inside a draft"] += bool(stops) and len(last.emitted) <= last.accepted
        seen["budget above context"] += budget > length + NEW_TOKENS
        seen["one chunk"] += budget == 8
        seen["gamma 1"] += gamma == 1
        seen["gamma 16"] += gamma == 16
        seen["odd"] += length % 2
    return seen


@pytest.fixture(scope="module")
def seen():
    return Counter()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("drafter", ["self", "model"])
def test_output_equals_plain_greedy(pairs, seen, drafter, policy):
    found = run_cases(pairs, drafter, policy)
    seen.update(found)
    assert found["accepted"] > 20
    assert policy == "full" or found["rejected"] > 20


def test_output_equals_plain_greedy_with_ngram_lookup(pairs, seen):
    found = run_cases(pairs, "ngram", "none")
    seen.update(found)
    assert found["accepted"] > 20
    assert found["rejected"] > 20


def test_the_cases_above_meet_every_situation(seen):
    if seen["cases"] < 17 * CASES:
        pytest.skip("only some of the cases ran")
    assert seen["cases"] >= 300
    for situation in (
        "all accepted",
        "stop inside a draft",
        "budget above context",
        "one chunk",
        "gamma 1",
        "gamma 16",
        "odd",
    ):
        assert seen[situation] >= 10, situation


@torch.inference_mode()
def test_plain_decoding_is_greedy(pairs):
    for pair in pairs:
        prompt, expected = pair.plain(33)
        result = generate(pair.target, prompt, max_new_tokens=NEW_TOKENS)
        assert result.tokens == expected
        assert {r.kind for r in result.rounds} == {"plain"}
        assert len(result.rounds) == NEW_TOKENS
        assert result.drafted == result.accepted == 0
        assert result.acceptance_rate != result.acceptance_rate  # undefined, not 0


def test_a_wrong_verification_would_be_noticed(pairs, monkeypatch):
    """The comparison can fail: a rule that accepts one token too many changes the output."""
    from bdlib import decoding

    def careless(drafted, draft_probs, logits, sampling, generator):
        best = logits.argmax(-1)
        wrong = (best[: len(drafted)] != drafted).nonzero()
        accepted = min(int(wrong[0, 0]) + 1 if wrong.numel() else len(drafted), len(drafted))
        return accepted, int(best[accepted])

    monkeypatch.setattr(decoding, "verify", careless)
    with pytest.raises(AssertionError):
        run_cases(pairs, "model", "sink_window")


def test_a_perfect_drafter_needs_the_fewest_rounds(pairs):
    """The target itself with everything in view: gamma + 1 tokens a round."""
    prompt, expected = pairs[0].plain(33)
    drafter = SelfDrafter(pairs[0].target, make_policy("full"), 60)
    result = generate(pairs[0].target, prompt, drafter, gamma=5, max_new_tokens=NEW_TOKENS)
    assert result.tokens == expected
    assert result.acceptance_rate == 1
    assert [len(r.emitted) for r in result.rounds] == [6, 6, 6, 6]
    assert [len(r.drafted) for r in result.rounds] == [5, 5, 5, 5]


@pytest.mark.parametrize("sampling", [Sampling(0.9), Sampling(1.0, top_k=3)])
def test_sampled_output_is_repeatable(pairs, sampling):
    pair = pairs[0]
    runs = []
    for seed in (1, 1, 2):
        drafter = ModelDrafter(pair.models[0], make_policy("sink_window"), 16)
        result = generate(
            pair.target, tiny.text(33), drafter, gamma=4, max_new_tokens=30, sampling=sampling,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        check_rounds(result, 4, 30, set())
        runs.append(result.tokens)
    assert runs[0] == runs[1] != runs[2]


# ------------------------------------------------------------------ a stream of rounds


class Scripted(Drafter):
    """Proposes what it is told to, and writes down how it is driven."""

    name = "scripted"

    def __init__(self, *proposals):
        self.proposals, self.calls = list(proposals), []

    def start(self, prompt, cache, capacity):
        self.calls.append(("start", len(prompt), capacity))

    def select(self, rounds):
        self.calls.append(("select", rounds))

    def propose(self, last, n, sampling, generator):
        self.calls.append(("propose", last, n))
        return Proposal(torch.tensor(self.proposals.pop(0)[:n], dtype=torch.int64))

    def commit(self, emitted, accepted):
        self.calls.append(("commit", emitted, accepted))


def test_how_a_drafter_is_driven(pairs):
    pair = pairs[0]
    prompt, out = pair.plain(17)
    wrong = (out[4] + 1) % 23
    drafter = Scripted(out[:3], [wrong, 0], [], out[6:8])
    result = generate(pair.target, prompt, drafter, gamma=3, max_new_tokens=9)
    assert result.tokens == out[:9]
    assert drafter.calls == [
        ("start", 17, 26),
        ("select", 0),
        ("propose", int(prompt[-1]), 3),
        ("commit", out[:4], 3),
        ("select", 1),
        ("propose", out[3], 3),
        ("commit", [out[4]], 0),
        ("select", 2),
        ("propose", out[4], 3),
        ("commit", [out[5]], 0),
        ("select", 3),
        ("propose", out[5], 2),  # three tokens are left; the last is the target's
    ]
    assert [r.kind for r in result.rounds] == ["bonus", "corrected", "plain", "bonus"]
    assert [r.drafted for r in result.rounds][1:3] == [(wrong, 0), ()]


def test_the_last_token_is_never_drafted(pairs):
    pair = pairs[0]
    prompt, out = pair.plain(17)
    drafter = Scripted(out[:5])
    result = generate(pair.target, prompt, drafter, gamma=5, max_new_tokens=1)
    assert result.tokens == out[:1]
    assert [call[0] for call in drafter.calls] == ["start", "select"]


@pytest.mark.parametrize("place", range(5))
def test_a_stop_token_ends_the_output_wherever_it_stands(pairs, place):
    """First, inside, last of the accepted drafts, or the target's own token after them."""
    pair = pairs[0]
    prompt, out = pair.plain(17)
    stop = out[place]
    first = out.index(stop)
    drafter = Scripted(out[:3], out[4:7])
    cache = prefill(pair.target, prompt, 60)
    result = generate(
        pair.target,
        prompt,
        drafter,
        cache=cache,
        gamma=3,
        max_new_tokens=20,
        stop_tokens=[stop, 99],
    )
    assert result.tokens == out[: first + 1]
    assert cache.length == 17 + first
    check_rounds(result, 3, 20, {stop})


def test_rounds_are_computed_when_they_are_asked_for(pairs, monkeypatch):
    pair = pairs[0]
    prompt, out = pair.plain(17)
    cache = prefill(pair.target, prompt, 60)
    calls, forward = [], pair.target.forward
    monkeypatch.setattr(pair.target, "forward", lambda *a: calls.append(1) or forward(*a))
    drafter = Scripted(out[:2], out[3:5])
    rounds = decode(pair.target, cache, prompt, drafter, gamma=2, max_new_tokens=40)
    assert calls == []
    assert cache.length == 16
    first = next(rounds)
    assert first.emitted == tuple(out[:3])
    assert len(calls) == 1
    assert cache.length == 19
    assert not torch.is_inference_mode_enabled()  # between rounds the caller's mode is untouched
    next(rounds)
    assert len(calls) == 2
    rounds.close()
    assert cache.length == 22


def test_a_cache_can_be_used_again(pairs):
    pair = pairs[0]
    prompt, out = pair.plain(31)
    cache = prefill(pair.target, prompt, 60, make_policy("snapkv"))
    for drafter in (None, NGramDrafter(), SelfDrafter(pair.target, make_policy("snapkv"), 12)):
        cache.rewind(30)
        result = generate(pair.target, prompt, drafter, cache=cache, max_new_tokens=NEW_TOKENS)
        assert result.tokens == out
        assert result.prefill_seconds == 0


def test_a_cache_just_large_enough_is_enough(pairs):
    pair = pairs[0]
    prompt, out = pair.plain(31)
    drafter = SelfDrafter(pair.target, make_policy("sink_window"), 12)
    cache = prefill(pair.target, prompt, 31 + NEW_TOKENS - 1)  # the last token is never fed
    result = generate(
        pair.target, prompt, drafter, cache=cache, gamma=16, max_new_tokens=NEW_TOKENS
    )
    assert result.tokens == out


def test_what_a_generation_adds_up_to():
    seconds = {"prefill": 0.5, "draft": 1.0, "select": 0.25, "verify": 2.0}
    result = Generation(prompt_tokens=10, gamma=3, prefill_seconds=4.0)
    assert result.accepted_length != result.accepted_length
    result.rounds += [
        Round(0, (1, 2, 3), 3, (1, 2, 3, 4), "bonus", seconds),
        Round(1, (5, 6, 7), 1, (5, 9), "corrected", seconds | {"prefill": 0.0}),
    ]
    assert result.tokens == [1, 2, 3, 4, 5, 9]
    assert (result.drafted, result.accepted) == (6, 4)
    assert result.acceptance_rate == 4 / 6
    assert result.accepted_length == 3
    assert result.seconds == {"prefill": 4.5, "draft": 2.0, "select": 0.5, "verify": 4.0}
    assert result.decode_seconds == 6.5
    assert result.tokens_per_second == 6 / 6.5


# ------------------------------------------------------------------ refusals


def test_refusals_come_before_any_work(pairs, monkeypatch):
    pair, prompt = pairs[0], tiny.text(17)
    cache = prefill(pair.target, prompt, 40)
    monkeypatch.setattr(pair.target, "forward", None)
    for settings, message in (
        ({"gamma": 0}, "gamma 0 must be at least 1 token"),
        ({"gamma": -1}, "gamma -1 must be at least 1 token"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ({"max_new_tokens": 25}, "cache of 40 tokens is too small: this decoding may reach 41"),
        ({"sampling": Sampling(1.0)}, "sampling needs an explicit torch.Generator"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(pair.target, cache, prompt, **{"max_new_tokens": 8, **settings})
    with pytest.raises(ValueError, match="cache holds 16 tokens, a prompt of 16 needs 15"):
        decode(pair.target, cache, prompt[:-1], max_new_tokens=8)
    for make in (SelfDrafter, ModelDrafter):
        for budget in (0, -5):
            with pytest.raises(ValueError, match=f"budget {budget} must be at least 1 entry"):
                make(pair.target, make_policy("sink_window"), budget)
        with pytest.raises(ValueError, match="budget 5 must be at least one chunk of 8"):
            make(pair.target, make_policy("chunk_topk"), 5)
        for refresh in (0, -1):
            with pytest.raises(ValueError, match=f"refresh {refresh} must be None"):
                make(pair.target, make_policy("sink_window"), 8, refresh)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("drafter", [None, NGramDrafter()])
def test_logits_that_are_not_numbers_are_refused(value, drafter):
    target, prompt = tiny.model(), tiny.text(9)
    rounds = decode(target, prefill(target, prompt, 30), prompt, drafter, max_new_tokens=12)
    next(rounds)
    target.head.weight[3] = value
    with pytest.raises(ValueError, match="the target's logits are not numbers near position"):
        list(rounds)


def test_positions_beyond_the_model_are_refused():
    target, prompt = tiny.model(max_positions=20), tiny.text(17)
    assert len(generate(target, prompt, max_new_tokens=4).tokens) == 4
    with pytest.raises(ValueError, match="position 21 is beyond the model's 20 positions"):
        generate(target, prompt, max_new_tokens=8)
