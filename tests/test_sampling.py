"""Sampling is exact: by enumerating every coin on a small vocabulary, and by chi-square in full.

Both checks are also given wrong rules, and must refuse them. First comes verification token by token,
then that of whole drafts.
"""

import itertools
import math

import pytest
import tiny
import torch
from scipy import stats

from bdlib import decoding, sampling
from bdlib.drafters import ModelDrafter, NGramDrafter, SelfDrafter, prefill
from bdlib.sampling import Sampling, multinomial, verify
from bdlib.selection import make_policy

PLAIN = Sampling(temperature=1.0, verification="token")
BLOCK = Sampling(temperature=1.0)
COINS = 16  # chances below are multiples of 1/16, so 16 coins stand for all of [0, 1)
TARGET = torch.tensor([[2, 8, 5, 1], [4, 4, 0, 8], [16, 0, 0, 0]], dtype=torch.float64) / 16
TARGET_AFTER = torch.tensor([[1, 3, 12, 0], [10, 2, 2, 2], [8, 8, 0, 0], [4, 4, 4, 4]]) / 16.0
DRAFTS = {
    "spread": [[8, 4, 2, 2], [2, 2, 4, 8]],
    "other support": [[0, 8, 0, 8], [8, 0, 8, 0]],
    "the target's own": [[4, 8, 4, 0], [4, 4, 0, 8]],
    "sure of itself": [[16, 0, 0, 0], [0, 0, 16, 0]],
}


# ------------------------------------------------------------------ exact, by enumeration


def outcomes(rule, drafts, logits, draft_probs, monkeypatch):
    """Every run of ``rule`` for one draft: (weight, accepted, distribution of the next token)."""
    drawn = []

    def record(probs, generator):
        drawn.append(probs / probs.sum())
        return torch.zeros(probs.shape[:-1], dtype=torch.int64)

    for coins in itertools.product(range(COINS), repeat=len(drafts)):
        chosen = (torch.tensor(coins, dtype=torch.float64) + 0.5) / COINS
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *a, chosen=chosen, **k: chosen)
            patch.setattr(sampling, "multinomial", record)
            patch.setattr(f"{__name__}.multinomial", record)
            accepted, _ = rule(torch.tensor(drafts, dtype=torch.int64), draft_probs, logits, PLAIN)
        yield COINS ** -len(drafts), accepted, drawn.pop()
        assert not drawn


def emitted(rule, draft, depth, monkeypatch, certain=False):
    """Exact distribution ``[V] * depth`` of the first ``depth`` (1 or 2) tokens that are emitted.

    The second draft and the target's second row depend on the first token, as in decoding. Where a
    round emits one token only, the next round's first token follows the target's own distribution:
    that is what ``depth`` 1 shows.
    """
    draft = torch.tensor(draft, dtype=torch.float64) / 16
    found = torch.zeros((4,) * depth, dtype=torch.float64)
    firsts = [draft[0].argmax()] if certain else range(4)
    for first in firsts:
        second_draft = draft[1].roll(int(first))  # the drafter's second row depends on the first
        seconds = [second_draft.argmax()] if certain else range(4)
        for second in seconds:
            weight = 1.0 if certain else float(draft[0, first] * second_draft[second])
            if not weight:
                continue
            rows = torch.stack((TARGET[0], TARGET_AFTER[first].double(), TARGET[1]))
            probs = None if certain else torch.stack((draft[0], second_draft))
            drafts = [int(first), int(second)]
            for share, accepted, after in outcomes(rule, drafts, rows.log(), probs, monkeypatch):
                if accepted == 0:  # one token; the one after it is the next round's
                    one = after
                    both = after[:, None] * TARGET_AFTER.double()
                elif accepted == 1:
                    one = torch.eye(4, dtype=torch.float64)[first]
                    both = one[:, None] * after
                else:
                    one = torch.eye(4, dtype=torch.float64)[first]
                    both = one[:, None] * torch.eye(4, dtype=torch.float64)[second]
                found += weight * share * (one if depth == 1 else both)
    return found


EXACT = {1: TARGET[0], 2: TARGET[0][:, None] * TARGET_AFTER.double()}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_emitted_tokens_have_the_targets_distribution(monkeypatch, draft, certain, depth):
    found = emitted(verify, DRAFTS[draft], depth, monkeypatch, certain)
    assert torch.allclose(found, EXACT[depth], atol=1e-14, rtol=0)


def accept_everything(drafted, draft_probs, logits, settings, generator=None):
    return len(drafted), int(multinomial(settings.probs(logits)[-1], generator))


def no_residual(drafted, draft_probs, logits, settings, generator=None):
    """The known mistake: after a rejection, draw from the target as if nothing had happened."""
    target_probs = settings.probs(logits)
    coins = torch.rand(len(drafted), generator=generator, dtype=logits.dtype)
    for i, token in enumerate(drafted.tolist()):
        known = 1.0 if draft_probs is None else draft_probs[i, token]
        if coins[i] >= target_probs[i, token] / known:
            return i, int(multinomial(target_probs[i], generator))
    return len(drafted), int(multinomial(target_probs[-1], generator))


def target_chance_alone(drafted, draft_probs, logits, settings, generator=None):
    """Another: accept with the target's probability, without dividing by the drafter's."""
    target_probs = settings.probs(logits)
    coins = torch.rand(len(drafted), generator=generator, dtype=logits.dtype)
    for i, token in enumerate(drafted.tolist()):
        if coins[i] >= target_probs[i, token]:
            residual = target_probs[i].clone()
            residual = residual - (draft_probs[i] if draft_probs is not None else 0)
            return i, int(multinomial(residual.clamp(min=0) + 1e-9, generator))
    return len(drafted), int(multinomial(target_probs[-1], generator))


WRONG = {rule.__name__: rule for rule in (accept_everything, no_residual, target_chance_alone)}


@pytest.mark.parametrize("rule", WRONG)
def test_a_wrong_rule_is_noticed(monkeypatch, rule):
    found = emitted(WRONG[rule], DRAFTS["spread"], 1, monkeypatch)
    assert not torch.allclose(found, EXACT[1], atol=0.01)


@pytest.mark.parametrize("draft", DRAFTS)
def test_acceptance_is_what_the_formula_says(monkeypatch, draft):
    """alpha = sum_x min(target, draft), of the first token."""
    first = torch.tensor(DRAFTS[draft], dtype=torch.float64)[0] / 16
    chance = 0.0
    for token in range(4):
        rows = TARGET[:2]
        for share, accepted, _ in (
            outcomes(verify, [token], rows.log(), first[None], monkeypatch) if first[token] else ()
        ):
            chance += float(first[token]) * share * (accepted == 1)
    assert chance == pytest.approx(float(torch.minimum(TARGET[0], first).sum()), abs=1e-12)


def test_a_rejection_that_rounding_caused_still_draws_a_token(monkeypatch):
    """Where the drafter's probabilities are rounded up everywhere, nothing of the target is left."""
    rows, probs = TARGET[:2].log(), TARGET[:1] * (1 + 1e-9)
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.tensor([1 - 1e-12]).double())
    monkeypatch.setattr(sampling, "multinomial", lambda p, g: (p / p.sum()).argmax())
    assert verify(torch.tensor([2]), probs, rows, PLAIN) == (0, 1)


def test_the_last_draw_when_nothing_was_drafted(monkeypatch):
    [(share, accepted, after)] = outcomes(verify, [], TARGET[:1].log(), None, monkeypatch)
    assert (share, accepted) == (1, 0)
    assert torch.allclose(after, TARGET[0])


def test_greedy_accepts_while_the_draft_is_the_argmax():
    logits = TARGET.log()  # argmax 1, 3, 0
    for drafted, expected in (([1, 3], (2, 0)), ([1, 2], (1, 3)), ([0, 3], (0, 1)), ([], (0, 1))):
        rows = logits[: len(drafted) + 1]
        assert verify(torch.tensor(drafted, dtype=torch.int64), None, rows, Sampling()) == expected


# ------------------------------------------------------------------ a draft as a block, exactly


def chain(shift, size=3):
    """Random distributions of the token after each text, ``shift`` apart from another chain's."""

    def after(text):
        made = torch.Generator().manual_seed(sum((t + 1) * 5**i for i, t in enumerate(text)))
        common = torch.rand(size, generator=made, dtype=torch.float64)
        own = torch.rand(size, generator=made.manual_seed(made.initial_seed() + shift)).double()
        return torch.softmax(2 * common + 1.5 * own, -1)

    return after


def emissions(verified, length, target, draft, monkeypatch):
    """Exact distribution ``[V] * 3`` of three tokens from one round, and its mean of accepted tokens.

    ``length`` says of a draft's tokens so far whether it ends with them. What a round leaves open, the
    target's own distribution fills.
    """
    found = torch.zeros((3,) * 3, dtype=torch.float64)
    mean = 0.0
    drafts, ended = [()], []
    while drafts:
        text = drafts.pop()
        if text and length(text):
            ended.append(text)
        else:
            drafts += [(*text, x) for x in range(3)]
    for text in ended:
        n, start = len(text), range(len(text))
        probs = torch.stack([draft(text[:i]) for i in start])
        rows = torch.stack([target(text[:i]) for i in range(n + 1)])
        weight = float(torch.stack([probs[i, text[i]] for i in start]).prod())
        drafted = torch.tensor(text)
        chances, _ = sampling.block_chances(drafted, probs, rows)
        for passes in itertools.product((True, False), repeat=n):
            # Any coin below a chance stands for all of them, and so does any above it.
            sides = torch.tensor(passes)
            share = float(torch.where(sides, chances, 1 - chances).prod())
            coins = torch.where(sides, chances / 2, (1 + chances) / 2)
            drawn = []
            with monkeypatch.context() as patch:
                patch.setattr(torch, "rand", lambda *a, coins=coins, **k: coins)
                patch.setattr(
                    sampling, "multinomial", lambda p, g, drawn=drawn: drawn.append(p) or p.argmax()
                )
                accepted, _ = verified(drafted, probs, rows.log(), BLOCK)
            mean += weight * share * accepted
            for extra, chance in enumerate((drawn[0] / drawn[0].sum()).tolist()):
                so_far = (*text[:accepted], extra)[:3]
                ways = {so_far: weight * share * chance}
                while len(next(iter(ways))) < 3:
                    ways = {
                        (*t, x): c * float(target(t)[x]) for t, c in ways.items() for x in range(3)
                    }
                for t, c in ways.items():
                    found[t] += c
    return found, mean


def exact(target):
    found = torch.zeros((3,) * 3, dtype=torch.float64)
    for text in itertools.product(range(3), repeat=3):
        found[text] = math.prod(float(target(text[:i])[text[i]]) for i in range(3))
    return found


LENGTHS = {
    "two": lambda text: len(text) == 2,
    "three": lambda text: len(text) == 3,
    "by its tokens": lambda text: text[-1] == 0 or len(text) == 3,
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shift", [1, 7, 0])
def test_a_block_emits_the_targets_distribution(monkeypatch, length, shift):
    """Also where the tokens decide how long a draft is; with shift 0 both models are the same."""
    target, draft = chain(0), chain(shift)
    found, mean = emissions(verify, LENGTHS[length], target, draft, monkeypatch)
    assert torch.allclose(found, exact(target), atol=1e-12, rtol=0)
    if not shift and length == "three":
        assert mean == pytest.approx(3)  # and then every token is accepted


def without_weights(drafted, draft_probs, logits, settings, generator=None):
    """A mistake: a block's chances, but what is left is taken as if single tokens had been checked."""
    chances, _ = sampling.block_chances(drafted, draft_probs, settings.probs(logits))
    with pytest.MonkeyPatch.context() as patch:
        even = chances.new_ones(len(chances) + 1)
        patch.setattr(sampling, "block_chances", lambda *a: (chances, even))
        return verify(drafted, draft_probs, logits, settings, generator)


def test_a_block_with_the_wrong_residual_is_noticed(monkeypatch):
    found, _ = emissions(without_weights, LENGTHS["three"], chain(0), chain(1), monkeypatch)
    assert not torch.allclose(found, exact(chain(0)), atol=1e-5, rtol=0)


def test_a_block_accepts_more_the_papers_example():
    """Two letters, p = (1/3, 2/3), q = (2/3, 1/3), two drafts: 11/9 tokens instead of 10/9."""
    q, p, mean = torch.tensor([2, 1]).double() / 3, torch.tensor([1, 2]).double() / 3, 0.0
    by_token = 0.0
    for text in itertools.product(range(2), repeat=2):
        drafted, rows = torch.tensor(text), p.expand(3, 2)
        chances, weights = sampling.block_chances(drafted, q.expand(2, 2), rows)
        first, both = chances.tolist()
        share = float(q[list(text)].prod())
        mean += share * (2 * both + (1 - both) * first)
        single = (p / q)[drafted].clamp_max(1)
        by_token += share * float(single[0] + single.prod())
        assert weights[0] == 1
    assert by_token == pytest.approx(10 / 9)
    assert mean == pytest.approx(11 / 9)


def test_a_block_never_accepts_less(monkeypatch):
    for shift in range(1, 12):
        target, draft = chain(0), chain(shift)
        _, mean = emissions(verify, LENGTHS["three"], target, draft, monkeypatch)
        by_token = 0.0
        for text in itertools.product(range(3), repeat=3):
            reached = share = 1.0
            for i, x in enumerate(text):
                p, q = float(target(text[:i])[x]), float(draft(text[:i])[x])
                share *= q
                reached *= min(1.0, p / q)
                by_token += reached * share / 3 ** (2 - i)  # as many texts begin like this
        assert mean >= by_token - 1e-12
        if shift == 1:
            assert mean > by_token + 0.01


# ------------------------------------------------------------------ warping


def warped(logits, settings):
    """Temperature, then top-k, then top-p, written out for one row."""
    values = [math.exp(x / settings.temperature) for x in logits.double().tolist()]
    order = sorted(range(len(values)), key=lambda i: -values[i])
    kept = order[: settings.top_k or len(order)]
    total = sum(values[i] for i in kept)
    probs, mass, out = {i: values[i] / total for i in kept}, 0.0, [0.0] * len(values)
    for i in kept:
        if mass >= settings.top_p:
            break
        mass += probs[i]
        out[i] = probs[i]
    return torch.tensor(out, dtype=torch.float64) / sum(out)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 3, 12, 99])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_warping(temperature, top_k, top_p):
    settings = Sampling(temperature, top_k, top_p)
    logits = 3 * torch.randn(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = settings.probs(logits)
    for row, expected in zip(found, (warped(row, settings) for row in logits), strict=True):
        assert torch.allclose(row, expected, atol=1e-12)


def test_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()
    for top_p, count in ((0.4, 1), (0.49, 1), (0.6, 2), (0.74, 2), (0.8, 3), (1.0, 4)):
        assert int((Sampling(1.0, top_p=top_p).probs(logits) > 0).sum()) == count


def test_greedy_is_a_point_mass_and_draws_without_randomness():
    logits = torch.tensor([[0.1, 3.0, -1.0], [2.0, 0.0, 1.0]])
    assert Sampling().probs(logits).tolist() == [[0, 1, 0], [1, 0, 0]]
    token, probs = Sampling().draw(logits)
    assert token.tolist() == [1, 0]
    assert probs is None


def test_draws_follow_their_generator():
    logits = torch.zeros(50, 9)
    one, two, other = (
        PLAIN.draw(logits, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature nan must be 0"),
        ({"temperature": float("inf")}, "temperature inf must be 0"),
        ({"top_k": -1}, "top_k -1 must be 0"),
        ({"top_p": 0.0}, r"top_p 0.0 must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p 1.1 must be in \(0, 1\]"),
        ({"top_p": float("nan")}, "top_p nan must be in"),
        ({"verification": "all"}, "verification 'all' must be one of block, token"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


# ------------------------------------------------------------------ in full, by chi-square

SMALL = {"vocab_size": 5, "hidden_size": 16, "intermediate_size": 16, "num_layers": 1}
PROMPT = torch.tensor([1, 4, 2, 1, 4, 3, 1])
LENGTH, RUNS = 3, 500


@pytest.fixture(scope="module")
def target():
    return tiny.model(seed=5, sharp=3.0, **SMALL)


def make_drafter(name, target):
    if name == "ngram":
        return NGramDrafter()
    if name == "self":
        return SelfDrafter(target, make_policy("sink_window"), 3)
    model = tiny.model(seed=6, **SMALL)
    if name == "part of the vocabulary":
        model.vocabulary = torch.tensor([0, 2, 3])
        model.head.weight = torch.nn.Parameter(model.head.weight[model.vocabulary], False)
    return ModelDrafter(model, make_policy("sink_window"), 3)


def chi_square(target, drafter, settings, seed=0):
    """First three tokens of many decodings against their exact probabilities: p-value, acceptance."""
    expected = {(): 1.0}
    with torch.inference_mode():
        for _ in range(LENGTH):
            longer = {}
            for tokens, chance in expected.items():
                text = torch.cat((PROMPT, torch.tensor(tokens, dtype=torch.int64)))
                row = warped(target(text[None])[0, -1], settings).tolist()
                longer |= {(*tokens, t): chance * p for t, p in enumerate(row) if p}
            expected = longer
    generator, counts = torch.Generator().manual_seed(seed), dict.fromkeys(expected, 0)
    cache = prefill(target, PROMPT, len(PROMPT) + LENGTH, drafter.observe)
    accepted = drafted = 0
    for _ in range(RUNS):
        cache.rewind(len(PROMPT) - 1)
        rounds = decoding.decode(
            target, cache, PROMPT, drafter, gamma=3, max_new_tokens=LENGTH, sampling=settings,
            generator=generator,
        )  # fmt: skip
        tokens = []
        for one in rounds:
            tokens += one.emitted
            accepted, drafted = accepted + one.accepted, drafted + len(one.drafted)
        counts[tuple(tokens)] += 1  # an impossible text is a KeyError
    observed, wanted, rest = [], [], [0, 0.0]
    for tokens, chance in expected.items():
        if chance * RUNS >= 5:
            observed.append(counts[tokens])
            wanted.append(chance * RUNS)
        else:
            rest[0] += counts[tokens]
            rest[1] += chance * RUNS
    if rest[1]:
        observed.append(rest[0])
        wanted.append(rest[1])
    assert len(observed) > 5
    return stats.chisquare(observed, wanted).pvalue, accepted / drafted


@pytest.mark.parametrize(
    ("drafter", "settings"),
    [
        ("model", Sampling(1.0)),
        ("model", Sampling(1.0, verification="token")),
        ("model", Sampling(0.7, top_k=3)),
        ("model", Sampling(1.4, top_p=0.8)),
        ("self", Sampling(1.3, top_k=4, top_p=0.9)),
        ("ngram", Sampling(1.2)),
        ("part of the vocabulary", Sampling(1.0)),
    ],
)
def test_decoding_samples_from_the_target(target, drafter, settings):
    p_value, acceptance = chi_square(target, make_drafter(drafter, target), settings)
    assert p_value > 0.002
    assert 0.05 < acceptance < 0.97


@pytest.mark.parametrize("rule", WRONG)
def test_chi_square_notices_a_wrong_rule(monkeypatch, target, rule):
    monkeypatch.setattr(decoding, "verify", WRONG[rule])
    p_value, _ = chi_square(target, make_drafter("self", target), Sampling(1.0))
    assert p_value < 1e-6
