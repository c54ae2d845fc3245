"""The cost model against hand sums and a simulation; the controller in toy runs and in the decoder."""

import math
import random
from itertools import pairwise
from statistics import fmean

import pytest
import tiny
import torch

from bdlib.controllers import (
    Arms,
    Controller,
    ControllerSettings,
    Costs,
    acceptance_by_position,
    best_gamma,
    break_even,
    expected_tokens,
    measured_costs,
    predict,
    round_seconds,
    simulate,
    speedup,
)
from bdlib.decoding import Round, decode, generate
from bdlib.drafters import Drafter, ModelDrafter, NGramDrafter, Proposal, SelfDrafter, prefill
from bdlib.sampling import Sampling
from bdlib.selection import make_policy

# ------------------------------------------------------------------ the cost model


def test_expected_tokens():
    assert expected_tokens(0.8, 0) == 1
    for a in (0.0, 0.3, 0.8):
        for gamma in (1, 4, 9):
            closed = (1 - a ** (gamma + 1)) / (1 - a)
            assert expected_tokens(a, gamma) == pytest.approx(closed)
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens([0.5, 0.4, 0.9], 2) == pytest.approx(1 + 0.5 + 0.2)


def test_speedup_is_the_theorem_when_verification_costs_one_step():
    costs = Costs(plain=0.02, draft=0.0025, verify=0.02)  # Theorem 3.8 of arXiv 2211.17192
    assert speedup(0.7, 4, costs) == pytest.approx((1 - 0.7**5) / (0.3 * (4 * 0.125 + 1)))
    assert speedup(0.7, 0, costs) == 1


def test_tables_of_costs_are_read_in_straight_lines():
    costs = Costs(1.0, draft={2: 0.3, 4: 0.5}, verify={2: 1.1, 5: 1.4}, select=0.05, overhead=0.01)
    assert costs.of_round(0) == 1
    assert costs.of_round(2) == pytest.approx(0.3 + 1.2 + 0.06)
    assert costs.of_round(3) == pytest.approx(0.4 + 1.3 + 0.06)
    assert costs.of_round(6) == pytest.approx(0.7 + 1.6 + 0.06)
    assert Costs(draft={4: 0.4}, verify={5: 1.2}).of_round(2) == pytest.approx(0.2 + 1.2)


def test_best_gamma_and_break_even():
    costs = Costs(draft=0.125, verify={2: 1.05, 6: 1.2})
    assert best_gamma(0.0, costs) == 0
    assert best_gamma(0.9, costs) > best_gamma(0.6, costs) > 0
    assert best_gamma(1.0, costs, max_gamma=7) == 7
    for gamma in (1, 4):
        a = break_even(gamma, costs)
        assert speedup(a, gamma, costs) == pytest.approx(1)
    assert break_even(1, costs) == pytest.approx(0.125 + 1.05 - 1)
    assert break_even(3, Costs(draft=1.2)) is None
    assert predict(0.5, 1, costs, offered=0.5).tokens == 1.25


def test_a_simulation_gives_what_the_model_says():
    alphas, costs = [0.8, 0.6, 0.5, 0.5], Costs(0.02, 0.002, {2: 0.021, 5: 0.024}, select=0.001)
    rounds = simulate([(alphas, costs)], gamma=4, tokens=60_000, seed=1)
    emitted = sum(len(r.emitted) for r in rounds)
    assert emitted == 60_000
    measured = emitted * 0.02 / sum(map(round_seconds, rounds))
    assert measured == pytest.approx(speedup(alphas, 4, costs), rel=0.01)
    assert acceptance_by_position(rounds) == pytest.approx(alphas, abs=0.02)
    plain = simulate([(alphas, costs)], tokens=20)
    found = measured_costs(plain, rounds)
    assert found.of_round(4) == pytest.approx(costs.of_round(4))
    assert found.plain == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: expected_tokens(1.2, 2), "acceptance 1.2 must be between 0 and 1"),
        (lambda: expected_tokens([0.5], 2), "acceptance of 1 positions is given, gamma is 2"),
        (lambda: expected_tokens(0.5, -1), "gamma -1 must be a whole number"),
        (lambda: expected_tokens(0.5, 1.5), "gamma 1.5 must be a whole number"),
        (lambda: Costs(plain=0), "plain 0 must be a positive cost"),
        (lambda: Costs(draft=-1), "draft -1 must be a cost of at least 0"),
        (lambda: Costs(verify={}), "verify {} must be a cost"),
        (lambda: Costs(verify={2: math.nan}), "verify"),
        (lambda: best_gamma(0.5, Costs(), 0), "max_gamma 0 must be at least 1"),
        (lambda: break_even(0, Costs()), "gamma 0 must be at least 1"),
        (lambda: measured_costs([], []), "costs need a plain run"),
        (lambda: ControllerSettings(max_gamma=0), "max_gamma 0 must be a whole number"),
        (lambda: ControllerSettings(max_loss=0), "max_loss 0 must be above 0"),
        (lambda: ControllerSettings(prior=1), "prior 1 must be between 0 and 1"),
        (lambda: ControllerSettings(memory=1), "memory 1 must be at least 2 rounds"),
        (lambda: ControllerSettings(probe_after=9, probe_most=8), "probe_most 8 must be at least"),
        (lambda: ControllerSettings(margin=-0.1), "margin -0.1 must be at least 0"),
        (lambda: Controller().start([], 10), "there are no drafters to choose from"),
        (lambda: Arms([]), "there are no drafters to choose from"),
        (lambda: Arms([one := NGramDrafter(), one]), "one drafter is named twice"),
    ],
)
def test_bad_input_is_one_clear_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# ------------------------------------------------------------------ toy runs

PLAIN = 0.02  # seconds
VERIFY = {2: 1.08, 5: 1.17, 9: 1.3, 13: 1.45}  # in plain steps, as on two CPU cores


def costs(draft, verify=VERIFY, select=0.0):
    return Costs(PLAIN, draft * PLAIN, {n: v * PLAIN for n, v in verify.items()}, select * PLAIN)


REGIMES = {
    "a good drafter": [(0.85, costs(0.125))],
    "a middling one": [(0.55, costs(0.125))],
    "acceptance falls along the draft": [([0.6, 0.5, 0.4] + [0.3] * 9, costs(0.125))],
    "nearly free drafts": [(0.9, costs(0.03))],
    "dear verification": [(0.7, costs(0.125, {2: 1.15, 5: 1.3, 13: 1.9}))],
    "pays a little": [(0.4, costs(0.125, select=0.01))],
    "three budgets": [(0.3, costs(0.12)), (0.6, costs(0.13)), (0.65, costs(0.16))],
}
HOPELESS = {
    "nothing accepted": [(0.0, costs(0.125))],
    "little accepted": [(0.1, costs(0.125))],
    "the target itself drafts": [(0.5, costs(0.7))],
    "three budgets": [(0.0, costs(0.1)), (0.1, costs(0.125)), (0.1, costs(0.4))],
}
NOISE = 0.05


def seconds(rounds):
    return sum(map(round_seconds, rounds))


@pytest.mark.parametrize("name", REGIMES)
def test_controller_is_near_the_best_fixed_setting(name):
    arms = REGIMES[name]
    seeds, fixed = range(20), {}
    for arm, (alpha, cost) in enumerate(arms):
        best = best_gamma(alpha, cost)
        for gamma in {max(1, best - 1), best, min(12, best + 1)}:
            runs = [simulate(arms, gamma=gamma, arm=arm, noise=NOISE, seed=s) for s in seeds]
            fixed[gamma, arm] = sum(map(seconds, runs))
    runs = [simulate(arms, Controller(), noise=NOISE, seed=s) for s in seeds]
    ratio = min(fixed.values()) / sum(map(seconds, runs))
    assert ratio >= 0.97, (ratio, min(fixed, key=fixed.get))
    assert all(sum(len(r.emitted) for r in run) == 400 for run in runs)


@pytest.mark.parametrize("tokens", [200, 400])
@pytest.mark.parametrize("name", HOPELESS)
def test_a_hopeless_drafter_costs_at_most_three_percent(name, tokens):
    for seed in range(12):
        # Noise of the plain steps themselves is not the controller's doing: the same steps, plain.
        rounds = simulate(HOPELESS[name], Controller(), tokens=tokens, noise=NOISE, seed=seed)
        alone = sum(
            seconds(simulate(HOPELESS[name], tokens=tokens, noise=NOISE, seed=s)) for s in range(8)
        )
        assert alone / 8 / seconds(rounds) >= 0.97, seed
        assert sum(r.gamma > 0 for r in rounds) >= 1  # it did try


def changing(first, then):
    return lambda done: first if done < 200 else then


@pytest.mark.parametrize("seed", range(4))
def test_it_stops_when_drafting_no_longer_pays(seed):
    arms = [(changing(0.8, 0.0), costs(0.125))]
    rounds = simulate(arms, Controller(), noise=NOISE, seed=seed)
    position, dear = 0, 0
    for one in rounds:
        if position > 200 and one.drafted:
            dear += len(one.drafted)
        position += len(one.emitted)
    assert dear < 60  # of 200 tokens; at the gamma of the first half it would be about 1,000
    assert all(r.gamma <= 1 for r in rounds[-100:])


@pytest.mark.parametrize("seed", range(4))
def test_it_resumes_when_drafting_pays_again(seed):
    arms = [(changing(0.0, 0.8), costs(0.125))]
    rounds = simulate(arms, Controller(), tokens=600, noise=NOISE, seed=seed)
    position, off = 0, 0
    for one in rounds:
        off += position >= 200 and not one.gamma
        position += len(one.emitted)
    assert off < 100  # at most two of the longest waits: one draft alone may be rejected
    assert sum(r.gamma > 1 for r in rounds[-30:]) > 20


def test_it_changes_the_drafter_when_another_becomes_better():
    arms = [
        (changing(0.8, 0.1), costs(0.125)),
        (changing(0.1, 0.8), costs(0.125)),
    ]
    controller = Controller()
    controller.start(["a", "b"], 600)
    rounds = simulate(arms, controller, tokens=600, noise=NOISE, seed=3)
    assert sum("drafter 0" in r.why and r.gamma > 1 for r in rounds[:50]) > 30
    assert sum("drafter 1" in r.why and r.gamma > 1 for r in rounds[-30:]) > 20


def test_a_drafter_that_often_has_nothing_to_say_costs_nothing():
    controller = Controller()
    controller.start(["ngram"], 100)
    blank = {"prefill": 0.0, "draft": 0.0, "select": 0.0, "verify": PLAIN}
    for i in range(40):
        gamma = controller.choose(100 - i).gamma
        controller.record(Round(i, (), 0, (1,), "plain", blank, gamma=gamma))
    assert controller.choose(60).gamma > 0  # asking is free
    assert "for 1.00 plain steps" in controller.explain()


def test_it_explains_itself_in_one_sentence():
    controller = Controller()
    assert controller.explain() == "Nothing was chosen yet."
    rounds = simulate([(0.0, costs(0.125))], controller, tokens=400)
    assert any("no draft pays; the best, 1 by drafter 0 at acceptance 0." in r.why for r in rounds)
    assert controller.explain() == "Plain step: the last token is always the target's own."
    good = simulate([(0.9, costs(0.125))], Controller(), tokens=100)
    assert good[0].why.startswith("draft 1 by drafter 0: acceptance 0.60, so 1.60 tokens")
    assert good[3].why.startswith(f"draft up to {good[3].gamma} by drafter 0: acceptance 0.")
    assert [r.why for r in good].count("plain step: to learn what one costs") == 1
    for one in good:
        assert one.why
        assert "\n" not in one.why


def test_no_choice_exceeds_what_is_left():
    controller = Controller(ControllerSettings(max_gamma=5))
    rounds = simulate([(0.95, costs(0.05))], controller, tokens=50)
    assert max(r.gamma for r in rounds) == 5
    controller.choose(1)
    assert controller.explain() == "Plain step: the last token is always the target's own."


# ------------------------------------------------------------------ in the decoder

NEW = 40


class Scripted:
    """A controller that follows a list of (gamma, arm): rounds with and without each drafter."""

    settings = ControllerSettings()

    def __init__(self, plan):
        self.plan, self.recorded = plan, []

    def start(self, arms, max_new_tokens):
        self.arms, self.at = list(arms), 0

    def choose(self, left):
        from bdlib.controllers import Choice

        gamma, arm = self.plan[self.at % len(self.plan)]
        self.at += 1
        return Choice(gamma, arm % len(self.arms), f"step {self.at}")

    def record(self, one):
        self.recorded.append(one)


PLANS = {
    "off first": [(0, 0)] * 5 + [(3, 0)] * 20,
    "on and off": [(4, 0), (0, 0), (0, 0), (2, 1), (0, 0), (3, 2), (1, 1)],
    "off for longer than the budget": [(3, 0)] + [(0, 0)] * 20 + [(4, 1), (4, 0), (4, 2)],
}


@pytest.fixture(scope="module")
def pair():
    target = tiny.model(seed=0, sharp=4.0)
    prompt = tiny.text(33)
    prompt[17:] = prompt[:16].clone()
    return target, tiny.perturbed(target, 0.12, seed=1), prompt, tiny.greedy(target, prompt, NEW)


def drafters(target, model, policy, refresh=None):
    policy = make_policy(policy)
    return {
        "self": SelfDrafter(target, policy, 16, refresh),
        "model": ModelDrafter(model, policy, 16, refresh),
        "ngram": NGramDrafter(),
        "arms": Arms(
            [
                ModelDrafter(model, policy, 16, refresh),
                ModelDrafter(model, policy, 12, refresh),
                NGramDrafter(),
            ]
        ),
        "self and model": Arms(
            [SelfDrafter(target, policy, 16, refresh), ModelDrafter(model, policy, 16)]
        ),
    }


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("policy", ["sink_window", "chunk_topk_recent", "snapkv", "oracle"])
@pytest.mark.parametrize("refresh", [None, 2])
def test_output_is_lossless_whatever_is_chosen(pair, plan, policy, refresh):
    target, model, prompt, expected = pair
    for name, drafter in drafters(target, model, policy, refresh).items():
        cache = prefill(target, prompt, 33 + NEW, drafter.observe)
        controller = Scripted(PLANS[plan])
        result = generate(
            target, prompt, drafter, cache=cache, controller=controller, max_new_tokens=NEW
        )
        assert result.tokens == expected, name
        assert [r.gamma for r in result.rounds] == [
            PLANS[plan][i % len(PLANS[plan])][0] for i in range(len(result.rounds))
        ]
        assert all(bool(r.gamma) == bool(r.drafter) for r in result.rounds)
        assert all(not r.drafted for r in result.rounds if not r.gamma)
        assert controller.recorded == result.rounds[:-1]
        assert drafter.kv_entries <= 16


@pytest.mark.parametrize("name", ["self", "model", "arms"])
def test_a_perfect_drafter_stays_perfect_after_rounds_without_it(pair, name):
    """What was skipped is caught up exactly: with everything in view every draft is accepted."""
    target, _, prompt, expected = pair
    drafter = {
        "self": SelfDrafter(target, make_policy("full"), 100),
        "model": ModelDrafter(target, make_policy("full")),
        "arms": Arms([ModelDrafter(target, make_policy("full")) for _ in range(2)]),
    }[name]
    plan = [(0, 0), (0, 0), (3, 0), (0, 0), (2, 1), (0, 0), (0, 0), (0, 0), (4, 0), (1, 1)]
    result = generate(target, prompt, drafter, controller=Scripted(plan), max_new_tokens=NEW)
    assert result.tokens == expected
    assert result.acceptance_rate == 1
    assert result.drafted > 15


def test_a_feature_conditioned_drafter_catches_up(pair):
    from bdlib.models import conditioned_on

    target, _, prompt, expected = pair
    model = conditioned_on(target, (0, 1)).double()
    for plan in PLANS.values():
        for budget in (8, 16):
            drafter = ModelDrafter(model, make_policy("sink_window"), budget)
            result = generate(
                target, prompt, drafter, controller=Scripted(plan), max_new_tokens=NEW
            )
            assert result.tokens == expected
            assert drafter.kv_entries <= budget


def test_rounds_without_a_drafter_run_nothing_of_it(pair, monkeypatch):
    target, model, prompt, _ = pair
    ran = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda t, *a: ran.append(t.shape[1]) or hidden(t, *a))
    drafter = ModelDrafter(model, make_policy("sink_window"), 16)
    plan = [(0, 0)] * 30 + [(2, 0)]
    rounds = decode(
        target,
        prefill(target, prompt, 80),
        prompt,
        drafter,
        controller=Scripted(plan),
        max_new_tokens=NEW,
    )
    for _ in range(30):
        next(rounds)
    assert ran == [32]  # the prompt, once
    next(rounds)
    assert ran == [32, 16, 1]  # no more than the budget, however much was skipped


def test_drafters_of_one_model_read_the_prompt_once(pair, monkeypatch):
    target, model, prompt, expected = pair
    ran = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda t, *a: ran.append(t.shape[1]) or hidden(t, *a))
    policy = make_policy("chunk_topk")
    arms = Arms([ModelDrafter(model, policy, budget) for budget in (8, 16, 24)])
    result = generate(target, prompt, arms, controller=Scripted([(2, 1), (2, 2), (2, 0)]))
    assert ran.count(32) == 1
    assert result.tokens[:NEW] == expected
    names = {r.drafter for r in result.rounds if r.gamma}
    assert names == {"model, budget 8", "model, budget 16", "model, budget 24"}


def test_needs_of_several_drafters_are_joined_or_refused(pair):
    target, *_ = pair
    snap, window = make_policy("snapkv"), make_policy("sink_window")
    joined = Arms([NGramDrafter(), SelfDrafter(target, window, 16), SelfDrafter(target, snap, 16)])
    assert joined.observe is snap
    heavy = make_policy("heavy_hitter")
    with pytest.raises(ValueError, match="need different things of the target's cache"):
        Arms([SelfDrafter(target, heavy, 16), SelfDrafter(target, snap, 16)])


@pytest.mark.parametrize("name", ["self", "model", "ngram", "arms"])
def test_the_real_controller_in_the_decoder(pair, name):
    target, model, prompt, expected = pair
    drafter = drafters(target, model, "sink_window")[name]
    result = generate(target, prompt, drafter, controller=Controller(), max_new_tokens=NEW)
    assert result.tokens == expected
    assert result.gamma == 12
    assert all(r.why for r in result.rounds)
    assert result.rounds[0].why.startswith("draft 1 by ")
    assert "plain step: to learn what one costs" in [r.why for r in result.rounds]


def test_a_controller_needs_a_drafter(pair):
    target, _, prompt, _ = pair
    with pytest.raises(ValueError, match="a controller needs a drafter"):
        generate(target, prompt, controller=Controller())


class Uniform(Drafter):
    """Drafts at random, and says so: sampling must still give the target's distribution."""

    name = "uniform"

    def start(self, prompt, cache, capacity):
        pass

    def propose(self, last, n, sampling, generator):
        probs = torch.full((n, 5), 0.2, dtype=torch.float64)
        return Proposal(torch.randint(0, 5, (n,), generator=generator), probs)

    def commit(self, emitted, accepted):
        pass


def test_sampled_output_has_the_targets_distribution():
    """Chi-square of the first three tokens, on a vocabulary of 5, gamma changing all the time."""
    from scipy.stats import chisquare

    target = tiny.model(seed=2, vocab_size=5, sharp=3.0)
    prompt, sampling = torch.tensor([1, 4, 2]), Sampling(1.0)
    generator = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        texts = torch.cartesian_prod(*[torch.arange(5)] * 3)
        whole = torch.cat((prompt.expand(125, -1), texts), 1)
        probs = torch.softmax(target(whole), -1)
        wanted = torch.ones(125, dtype=torch.float64)
        for i in range(3):
            wanted *= probs[torch.arange(125), 2 + i, texts[:, i]]
    counts, runs = torch.zeros(125), 700
    cache = prefill(target, prompt, 12)
    for run in range(runs):
        cache.rewind(2)
        plan = [(run % 3, 0), (1, 0), (2, 0)]
        result = generate(
            target, prompt, Uniform(), cache=cache, controller=Scripted(plan), max_new_tokens=3,
            sampling=sampling, generator=generator,
        )  # fmt: skip
        a, b, c = result.tokens
        counts[25 * a + 5 * b + c] += 1
    likely = wanted * runs >= 5
    observed = torch.cat((counts[likely], counts[~likely].sum()[None])).double()
    expected = torch.cat((wanted[likely], wanted[~likely].sum()[None])) * runs
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 0.001


def test_measuring_with_a_controller(tmp_path):
    from bdlib.measure import MeasureSettings, measure

    tiny.save_folder(tmp_path / "target", tiny.model(seed=3, dtype=torch.float32, max_positions=96))
    (tmp_path / "text.txt").write_text(tiny.words(tiny.text(300).tolist()))
    settings = MeasureSettings(
        pair=str(tmp_path / "target"), text=str(tmp_path / "text.txt"), policy="sink_window",
        budget=16, context=96, new_tokens=24, samples=1, gamma=5, controller=True,
        dtype="float64", device="cpu",
    )  # fmt: skip
    report = measure(settings)
    (record,) = report.records
    assert record["controller"] is True
    assert record["identical"]
    assert sum(record["gammas"].values()) == record["rounds"]
    assert all(0 <= int(gamma) <= 5 for gamma in record["gammas"])
    assert record["gammas"]["0"] >= 1  # the first round
    assert "gamma 0 to 5, chosen" in report.table()
    with pytest.raises(ValueError, match="controller 1 must be True or False"):
        MeasureSettings(controller=1)


def test_the_account_holds_whatever_the_estimates_say():
    """Even where it believes that every draft is accepted, it stops when drafting loses."""

    class Believer(Controller):
        def start(self, arms, max_new_tokens):
            super().start(arms, max_new_tokens)
            for arm in self._arms:
                arm.alphas = lambda optimism=0.0: [1.0] * self.settings.max_gamma

    rounds = simulate([(0.0, costs(0.125))], Believer(), tokens=400)
    assert 400 * PLAIN / seconds(rounds) >= 0.97
    assert any("no more is allowed" in r.why for r in rounds)


def test_a_plain_step_is_guessed_from_verifications_until_one_is_taken():
    """Where drafting clearly pays the first plain step waits; where it may not, it comes at once."""
    first = {}
    for name, alpha in (("clear", 0.9), ("doubtful", 0.0)):
        rounds = simulate([(alpha, costs(0.125))], Controller(), tokens=100)
        first[name] = next(r.index for r in rounds if not r.gamma)
    assert first["clear"] == Controller.UNTIMED
    assert first["doubtful"] <= 2
    controller = Controller()
    controller.start(["model"], 100)
    for i in range(3):  # verifications at the slope it believes in: the guess is exact
        gamma = controller.choose(100).gamma
        took = PLAIN * (1 + Controller.VERIFY_SLOPE * gamma)
        parts = {"prefill": 0.0, "draft": 0.1 * gamma * PLAIN, "select": 0.0, "verify": took}
        controller.record(
            Round(i, (0,) * gamma, gamma, (0,) * (gamma + 1), "bonus", parts, gamma=gamma)
        )
    assert controller._step == pytest.approx(PLAIN)


def test_a_disturbed_verification_is_not_charged_to_drafting():
    """One round in which the processor was elsewhere must not use up what drafting may lose."""
    losses = []
    for factor in (1, 3):
        controller = Controller()
        controller.start(["model"], 96)
        for i in range(10):
            gamma = controller.choose(96 - i).gamma
            took = PLAIN * (1 + 0.05 * gamma) * (factor if i == 6 else 1)
            parts = {"prefill": 0.0, "draft": 0.1 * gamma * PLAIN, "select": 0.0, "verify": took}
            accepted = gamma // 2
            emitted = (0,) * (accepted + 1)
            kind = "corrected" if gamma else "plain"
            controller.record(Round(i, (0,) * gamma, accepted, emitted, kind, parts, gamma=gamma))
        losses.append(controller._loss)
    assert losses[1] - losses[0] < 0.8


def test_growing_waits_between_probes():
    rounds = simulate([(0.0, costs(0.125))], Controller(), tokens=400)
    probes = [r.index for r in rounds if r.why.startswith("probe")]
    gaps = [b - a for a, b in pairwise(probes)]
    assert gaps == sorted(gaps)
    assert 40 <= gaps[-1] <= 60


def test_a_disturbed_round_does_not_end_drafting():
    """Something else took the processor during the third round: forty steps for one draft."""
    controller = Controller()
    controller.start(["model"], 200)
    gammas = []
    for i in range(60):
        gamma = controller.choose(200 - 2 * i).gamma
        gammas.append(gamma)
        took = PLAIN * (40 if i == 2 else 1 + 0.05 * gamma)
        parts = {"prefill": 0.0, "draft": 0.1 * gamma * PLAIN, "select": 0.0, "verify": took}
        kind = "bonus" if gamma else "plain"
        emitted = (0,) * (gamma + 1)
        controller.record(Round(i, (0,) * gamma, gamma, emitted, kind, parts, gamma=gamma))
    assert gammas[2] > 0
    assert min(gammas[25:]) > 2


def test_on_short_texts_that_differ_it_stays_near_the_best_fixed_choice():
    """Costs and acceptance as measured at 4,096 tokens, 160 tokens a text, a clock that wobbles."""
    verify = {2: 1.03, 3: 1.06, 4: 1.11, 5: 1.13, 6: 1.14, 7: 1.18}
    measured = Costs(plain=1.0, draft=0.095, verify=verify, select=0.002)
    tokens, found = 160, {}
    for seed in range(40):
        usual = random.Random(f"text {seed}").gauss(0.6, 0.1)
        arms = [([usual * 0.95**i for i in range(6)], measured)]
        choices = {f"fixed {gamma}": {"gamma": gamma} for gamma in (1, 2, 3, 4, 5)}
        for prior_rounds in (2, 20):
            settings = ControllerSettings(max_gamma=6, prior_rounds=prior_rounds)
            choices[f"prior {prior_rounds}"] = {"controller": Controller(settings)}
        for name, how in choices.items():
            rounds = simulate(arms, tokens=tokens, noise=0.2, seed=seed, **how)
            found.setdefault(name, []).append(tokens / seconds(rounds))
    speeds = {name: fmean(each) for name, each in found.items()}
    best = max(speed for name, speed in speeds.items() if name.startswith("fixed"))
    assert speeds["prior 2"] > 0.97 * best
    assert speeds["prior 20"] == pytest.approx(speeds["prior 2"], rel=0.01)  # it learns fast enough
