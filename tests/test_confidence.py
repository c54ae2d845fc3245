"""Drafts that end early, where the drafter is unsure: which tokens, still lossless, and worth it."""

import random
from itertools import accumulate
from operator import mul
from statistics import fmean

import pytest
import tiny
import torch

from bdlib import baselines, models
from bdlib.controllers import Controller, ControllerSettings, Costs, round_seconds, simulate
from bdlib.decoding import GREEDY, Round, generate
from bdlib.drafters import (
    Drafter,
    ModelDrafter,
    NGramDrafter,
    Proposal,
    SelfDrafter,
    Stop,
    prefill,
)
from bdlib.sampling import Sampling
from bdlib.selection import make_policy

WINDOW = make_policy("sink_window")


def proposal(drafter, target, prompt, n, sampling, stop_below):
    drafter.start(prompt, prefill(target, prompt, 32, taps=drafter.taps), 32)
    drafter.select(0)
    drafter.stop = Stop(stop_below) if stop_below else None
    with torch.inference_mode():
        return drafter.propose(int(prompt[-1]), n, sampling, torch.Generator().manual_seed(3))


def drafters():
    target = tiny.model(seed=2, sharp=3.0)
    feature = models.conditioned_on(tiny.model(seed=5, sharp=3.0), (0, 1))
    return target, [
        SelfDrafter(target, WINDOW, 8),
        ModelDrafter(tiny.model(seed=5, sharp=3.0, num_layers=1), WINDOW, 8),
        ModelDrafter(feature, WINDOW, 8),
    ]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8)], ids=["greedy", "sampling"])
@pytest.mark.parametrize("which", range(3), ids=["self", "model", "feature"])
def test_a_draft_ends_with_the_token_that_makes_it_unlikely(which, sampling):
    """It is the beginning of the whole draft; where it ends, a hand product of probabilities says."""
    target, made = drafters()
    prompt = torch.tensor([1, 4, 2, 7, 3, 1, 4])
    whole = proposal(made[which], target, prompt, 8, sampling, 0.0)
    assert len(whole.tokens) == 8
    if sampling.greedy:
        rows = tapped(made[which], target, prompt)
        chances = [float(torch.softmax(row, -1).amax()) for row in rows]  # at temperature 1
    else:
        chances = whole.probs.gather(1, whole.tokens[:, None])[:, 0].tolist()
    likely, lengths = list(accumulate(chances, mul)), set()
    for length, before, after in zip(range(1, 9), [1.0, *likely], likely, strict=False):
        if not after < before * 0.999:
            continue  # certain of this token: no threshold ends a draft with it
        short = proposal(made[which], target, prompt, 8, sampling, (before * after) ** 0.5)
        assert short.tokens.tolist() == whole.tokens[:length].tolist()
        assert short.chances == pytest.approx(chances[:length], rel=1e-5)
        if short.probs is not None:
            assert torch.equal(short.probs, whole.probs[:length])
        lengths.add(length)
    assert len(lengths) >= 5  # or little was tested
    assert proposal(made[which], target, prompt, 8, sampling, 1e-30).tokens.tolist() == (
        whole.tokens.tolist()
    )
    assert whole.chances == ()  # nobody asked


def tapped(drafter, target, prompt):
    """The logits of a greedy draft of eight tokens, as the drafter's head gave them."""
    model, seen = getattr(drafter, "model", target), []
    logits = model.logits

    def watch(*args, **kwargs):
        seen.append(logits(*args, **kwargs))
        return seen[-1]

    drafter.start(prompt, prefill(target, prompt, 32, taps=drafter.taps), 32)
    drafter.select(0)
    drafter.stop = None
    model.logits = watch
    try:
        with torch.inference_mode():
            drafter.propose(int(prompt[-1]), 8, GREEDY, None)
    finally:
        del model.logits
    return [row[0, -1] for row in seen]


def test_decoding_sets_it_and_greedy_output_stays_the_same():
    target, made = drafters()
    prompt = torch.tensor([1, 4, 2, 7, 3, 1, 4])
    plain = generate(target, prompt, max_new_tokens=24).tokens
    for drafter in made:
        always = generate(target, prompt, drafter, gamma=6, max_new_tokens=24)
        early = generate(target, prompt, drafter, gamma=6, stop_below=0.5, max_new_tokens=24)
        assert always.tokens == early.tokens == plain
        lengths = [len(r.drafted) for r in early.rounds[:-1]]
        assert 1 <= min(lengths) < 6
        assert all(r.gamma == 6 for r in early.rounds)
        again = generate(target, prompt, drafter, gamma=6, max_new_tokens=24)  # it does not linger
        assert [r.drafted for r in again.rounds] == [r.drafted for r in always.rounds]
    lookup = NGramDrafter()  # certain of itself: nothing ends its drafts
    for stop_below in (0.0, 0.9):
        found = generate(target, prompt, lookup, gamma=3, stop_below=stop_below, max_new_tokens=24)
        assert found.tokens == plain
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"stop_below {wrong} must be at least 0"):
            generate(target, prompt, lookup, stop_below=wrong)


class Picky(Drafter):
    """Looks at a token before it decides to propose it, and drops it when it is unsure: a bias."""

    name = "picky"

    def __init__(self, inner):
        self.inner = inner

    def start(self, prompt, cache, capacity):
        self.inner.start(prompt, cache, capacity)

    def select(self, rounds):
        self.inner.select(rounds)

    def propose(self, last, n, sampling, generator):
        self.inner.stop = self.stop
        made = self.inner.propose(last, n, sampling, generator)
        keep = len(made.tokens) - 1 if len(made.tokens) < n else n
        return Proposal(made.tokens[:keep], made.probs[:keep])

    def commit(self, emitted, accepted):
        self.inner.commit(emitted, accepted)


@pytest.mark.parametrize(("picky", "lossless"), [(False, True), (True, False)])
def test_sampled_output_keeps_the_targets_distribution(picky, lossless):
    """Chi-square of three tokens. The last token of a short draft must be kept: dropping it is wrong."""
    target = tiny.model(seed=2, vocab_size=4, sharp=6.0, num_layers=1)
    small = tiny.model(seed=5, vocab_size=4, sharp=6.0, num_layers=1)
    target.head.weight *= 2
    small.head.weight *= 4  # sure of some tokens, and not of others
    prompt, lengths = torch.tensor([1, 3, 2, 0, 1, 1, 2, 3, 0]), set()
    drafter = ModelDrafter(small, WINDOW, 8)
    drafter = Picky(drafter) if picky else drafter
    p = tiny.chi_square(
        drafter, target, prompt, 600, stop_below=0.5,
        see=lambda result: lengths.add(len(result.rounds[0].drafted)),
    )  # fmt: skip
    assert len(lengths) > 1
    assert (p > 1e-3) if lossless else (p < 1e-6)


# ------------------------------------------------------------------ what a probability is worth


def test_a_stop_goes_by_shares_where_it_has_them():
    bare, learned = Stop(0.3), Stop(0.3, (0.5, 0.6, 0.7, 0.8, 0.9))
    for probability, share in ((0.0, 0.5), (0.3, 0.6), (0.5, 0.7), (0.89, 0.8), (1.0, 0.9)):
        assert bare.chance(probability) == probability
        assert learned.chance(probability) == share
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"below {wrong} must be a chance above 0"):
            Stop(wrong)
    with pytest.raises(ValueError, match="2 shares were given, there are 5 ranges"):
        Stop(0.3, (0.5, 0.9))


def test_a_draft_ends_by_shares():
    """Unsure tokens that are accepted nearly always do not end a draft; hopeless ones do at once."""
    target, made = drafters()
    prompt, lengths = torch.tensor([1, 4, 2, 7, 3, 1, 4]), []
    for shares in ((0.99,) * 5, (0.9,) * 5, (0.1,) * 5):
        made[1].start(prompt, prefill(target, prompt, 32), 32)
        made[1].select(0)
        made[1].stop = Stop(0.75, shares)
        with torch.inference_mode():
            lengths.append(len(made[1].propose(int(prompt[-1]), 8, GREEDY, None).tokens))
    assert lengths == [8, 3, 1]  # 0.9 ** 3 is the first power below 0.75


def test_a_controller_learns_what_a_probability_is_worth():
    """As when sampling: half of the unsure tokens are accepted, and most of the sure ones."""
    controller, rng = Controller(ControllerSettings(max_gamma=4)), random.Random(1)
    controller.start(["drafter"], 4000)
    for index in range(400):
        choice = controller.choose(4000 - 2 * index)
        chances = [rng.choice((0.05, 0.95)) for _ in range(choice.gamma)]
        accepted = 0
        while accepted < len(chances) and rng.random() < (0.5 if chances[accepted] < 0.5 else 0.9):
            accepted += 1
        n = len(chances)
        parts = {"prefill": 0.0, "draft": 0.0015 * n, "select": 0.0, "verify": 0.02 + 0.0006 * n}
        told = tuple(chances) if choice.stop is not None else ()
        done = Round(
            index, (0,) * n, accepted, (0,) * (accepted + 1), "", parts, gamma=n, chances=told
        )
        controller.record(done)
    while (stop := controller.choose(100).stop) is None:
        controller.record(done)
    assert stop.shares[0] == pytest.approx(0.5, abs=0.07)
    assert stop.shares[4] == pytest.approx(0.9, abs=0.05)
    assert 0.1 < stop.below < 0.5


# ------------------------------------------------------------------ the controller's use of it


def text_of(seed, tokens):
    """Chances of acceptance, token by token: words that are hard to guess, the rest of them easy."""
    rng = random.Random(f"text {seed}")
    chances = [rng.choice((0.15, 0.4, 0.7, 0.95, 0.95)) for _ in range(tokens + 12)]
    return lambda done: chances[done : done + 12]


def test_a_controller_that_asks_the_drafter_beats_every_fixed_length():
    verify = {2: 1.02, 3: 1.045, 4: 1.06, 5: 1.07, 6: 1.11, 9: 1.28, 13: 1.49}
    costs = Costs(plain=1.0, draft=0.075, verify=verify, select=0.008)
    tokens, found = 160, {}
    for seed in range(30):
        arms = [(text_of(seed, tokens), costs)]
        ways = {f"fixed {gamma}": {"gamma": gamma} for gamma in range(1, 7)}
        settings = ControllerSettings(max_gamma=8)
        ways["knows nothing"] = {"controller": Controller(settings)}
        ways["asks"] = {"controller": Controller(settings), "sure": True}
        ways["one threshold"] = {"gamma": 8, "stop_below": 0.25, "sure": True}
        for name, how in ways.items():
            rounds = simulate(arms, tokens=tokens, noise=0.15, seed=seed, **how)
            found.setdefault(name, []).append(tokens / sum(map(round_seconds, rounds)))
    speeds = {name: fmean(each) for name, each in found.items()}
    best = max(speed for name, speed in speeds.items() if name.startswith("fixed"))
    assert speeds["asks"] > 1.03 * best, speeds
    assert speeds["asks"] > 1.03 * speeds["knows nothing"], speeds
    assert speeds["asks"] > 0.96 * speeds["one threshold"], speeds


def test_a_comparison_with_a_controller_among_the_methods():
    settings = baselines.BaselineSettings(methods=("ngram:auto", "ngram:3"), gamma=4)
    assert settings.chosen() == {
        "plain": ("plain", 4),
        "ngram:auto": ("ngram", ControllerSettings().max_gamma),
        "ngram:3": ("ngram", 3),
    }
    for name in ("plain", "generate"):
        with pytest.raises(ValueError, match=f"method '{name}:auto': {name} has no draft"):
            baselines.BaselineSettings(methods=(f"{name}:auto",))
