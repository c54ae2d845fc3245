"""Copies of what the text repeats: found as by hand, mixed in without a trace in the output."""

import random

import pytest
import tiny
import torch

from bdlib import measure, models
from bdlib.controllers import Controller, ControllerSettings
from bdlib.copies import LONGEST, RIGHT, ROUNDS, SHORTEST, SURE, Copies
from bdlib.decoding import generate
from bdlib.drafters import ModelDrafter, NGramDrafter, prefill
from bdlib.sampling import Sampling
from bdlib.selection import make_policy

WINDOW = make_policy("sink_window")


def by_hand(tokens):
    """The longest repetition of the end of ``tokens``, by looking everywhere."""
    best = (0, -1)
    for place in range(len(tokens) - 1, 0, -1):
        length = 0
        while length < min(place, LONGEST) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= SHORTEST and length > best[0]:
            best = length, tokens[place]
    return best


def test_the_longest_repetition_and_the_newest_of_those():
    chance = random.Random(0)
    for _ in range(200):
        tokens = [chance.randrange(3) for _ in range(chance.randrange(40))]
        assert Copies(tokens).guess() == by_hand(tokens)
        known = tokens[: len(tokens) // 2]
        found = Copies(known)
        found.extend(tokens[len(known) :])
        assert found.guess() == by_hand(tokens)


def test_drafts_are_part_of_the_repetition():
    copies = Copies([1, 2, 3, 4, 5, 6, 7, 9, 9, 1, 2, 3])
    assert copies.guess() == (3, 4)
    assert copies.guess([4]) == (4, 5)
    assert copies.guess([4, 5, 6]) == (6, 7)
    assert copies.guess([8]) == (0, -1)
    assert Copies([1, 2]).guess() == (0, -1)
    assert Copies().guess([1, 2, 3]) == (0, -1)


def test_it_learns_from_every_emitted_token():
    copies = Copies()
    assert copies.chance(0) == 0
    for length in range(SHORTEST, LONGEST + 1):
        assert copies.chance(length) == pytest.approx(RIGHT[length - SHORTEST])
    copies.extend([1, 2, 3, 4] * 10)
    assert copies.chance(LONGEST) > max(SURE, RIGHT[-1])
    # Of the repetitions of three tokens there was one, and it was right.
    assert copies.chance(3) == pytest.approx((ROUNDS * RIGHT[0] + 1) / (ROUNDS + 1))
    surer = copies.chance(LONGEST)
    copies.extend([5])
    assert copies.chance(LONGEST) < surer


def test_a_copy_weighs_more_the_less_sure_the_drafter_is():
    copies = Copies()
    for length in range(SHORTEST, LONGEST + 1):
        weights = [copies.weight(length, sureness) for sureness in (0.1, 0.5, 0.9)]
        assert weights == sorted(weights, reverse=True)
        assert 0 <= weights[-1] <= weights[0] <= 1
    assert copies.weight(LONGEST, 0.2) > copies.weight(SHORTEST, 0.2)


def drafter(**settings):
    small = tiny.model(seed=5, sharp=3.0, num_layers=1)
    return ModelDrafter(small, WINDOW, 16, copies=True, **settings)


@pytest.mark.parametrize("refresh", [None, 2])
@pytest.mark.parametrize("steered", [False, True])
def test_greedy_output_is_the_targets_own(refresh, steered):
    """On text that repeats, so that drafts come from the model, from copies and from both."""
    target = tiny.model(seed=1, sharp=3.0)
    prompt = torch.cat([tiny.text(20, seed=3)] * 3)
    plain = generate(target, prompt, max_new_tokens=80)
    controller = Controller(ControllerSettings(max_gamma=6)) if steered else None
    found = generate(
        target, prompt, drafter(refresh=refresh), gamma=4, controller=controller, max_new_tokens=80
    )
    assert found.tokens == plain.tokens


def test_certain_copies_need_no_model():
    """A text that goes round: the drafter is not asked any more, and every draft is right."""

    class Loop:
        """A target that counts to seven."""

        def __init__(self):
            self.inner = tiny.model(seed=1)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, tokens, cache=None):
            logits = self.inner(tokens, cache)
            return logits + 1e3 * torch.nn.functional.one_hot((tokens + 1) % 7, logits.shape[-1])

    target = Loop()
    prompt = torch.arange(40) % 7
    who = drafter()
    found = generate(target, prompt, who, gamma=5, max_new_tokens=60)
    assert found.tokens == [(40 + i) % 7 for i in range(60)]
    last = found.rounds[-3:]
    assert all(len(r.drafted) == 5 == r.accepted for r in last)
    assert who.cache.length < who._base  # the last draft was made without the model
    # What was copied is taken in when the model is asked again.
    assert len(who._pending) > 5


@pytest.mark.parametrize("reduced", [False, True])
def test_the_mixture_is_what_was_drawn_from(reduced):
    """Frequencies of drafts against the distribution that verification is told of.

    Reduced: the drafter has no row for the token that is copied.
    """
    target = tiny.model(seed=1, sharp=3.0)
    text = tiny.text(12, seed=3)
    prompt = torch.cat((text, tiny.text(6, seed=4), text[:6]))
    small = tiny.model(seed=5, sharp=3.0, num_layers=1)
    if reduced:
        scored = torch.arange(small.config.vocab_size)
        scored = scored[scored != text[6]]
        models._score(small, scored, small.head.dense()[scored])
        small.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=1.0)
    counts, told, mixed = None, None, 0
    cache = prefill(target, prompt, len(prompt) + 8)
    for _ in range(3000):
        who = ModelDrafter(small, WINDOW, 16, copies=True)
        who.start(prompt, cache, len(prompt) + 8)
        who.select(0)
        proposal = who.propose(int(prompt[-1]), 1, sampling, generator)
        row = proposal.probs[0]
        counts = torch.zeros_like(row) if counts is None else counts
        counts[proposal.tokens[0]] += 1
        assert told is None or torch.allclose(told, row)
        told = row
        mixed += 1
    assert told.sum() == pytest.approx(1, abs=1e-6)
    length, copied = who._copies.guess()
    assert (length, copied) == (6, text[6])
    assert told[copied] > 0.3
    error = (counts / mixed - told).abs()
    assert (error < 5 * (told * (1 - told) / mixed).sqrt() + 2 / mixed).all()


@pytest.mark.parametrize("gamma", [1, 3])
def test_sampled_output_is_the_targets_own(gamma):
    """The first two tokens over many seeds, with copies and without any drafter."""
    target = tiny.model(seed=1, sharp=2.0)
    prompt = torch.cat([tiny.text(12, seed=3)] * 2 + [tiny.text(12, seed=3)[:8]])
    sampling, runs = Sampling(temperature=0.8), 1500
    counts = torch.zeros(2, 2, target.config.vocab_size)
    for kind in range(2):
        who = drafter() if kind else None
        for seed in range(runs):
            found = generate(
                target, prompt, who, gamma=gamma, max_new_tokens=2, sampling=sampling,
                generator=torch.Generator().manual_seed(seed + kind * runs),
            )  # fmt: skip
            for place, token in enumerate(found.tokens):
                counts[kind, place, token] += 1
    shares = counts / runs
    spread = (shares.mean(0) * (1 - shares.mean(0)) * 2 / runs).sqrt()
    assert ((shares[0] - shares[1]).abs() <= 4.5 * spread + 1e-9).all()


def test_names_and_what_has_no_copies():
    assert measure.MeasureSettings(drafter="some/model" + measure.COPIES).drafter.endswith("copies")
    for name in measure.DRAFTERS:
        with pytest.raises(ValueError, match=f"'{name}{measure.COPIES}': {measure.COPIES} is for"):
            measure.MeasureSettings(drafter=name + measure.COPIES)
    assert drafter().name == "model" + measure.COPIES
    assert NGramDrafter().name == "ngram"
