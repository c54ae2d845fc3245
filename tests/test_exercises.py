"""The checks of the exercises accept right answers and name what is wrong with wrong ones."""

from dataclasses import dataclass

import pytest
import torch

from bdlib import attention, exercises
from bdlib.selection import Policy, Selection, make_policy
from bdlib.transformer import DecoderConfig

# -------------------------------------------------------------------- lesson 00

WORDS = " ".join(f"word{i}" for i in range(150))
FRESH = list(range(1000, 1040))  # an answer that no prompt below holds


def answers(tokens, prompt=range(300)):
    return lambda text: (torch.tensor(list(prompt)), list(tokens))


def test_own_text_accepts_a_copied_answer():
    verdict = exercises.check_own_text(WORDS, answers(range(5, 60)), gamma=4)
    assert verdict.passed is True
    assert "distinct-2 1.00" in verdict.message


def test_own_text_is_to_do_until_there_is_one():
    verdict = exercises.check_own_text(None, lambda text: pytest.fail("nothing to run"), gamma=4)
    assert verdict is exercises.TODO


@pytest.mark.parametrize(
    ("text", "tokens", "message"),
    [
        (list(WORDS), FRESH, "must be a string, not a list"),
        ("too short", FRESH, "2 words; give between 100 and 3,000"),
        (WORDS, range(10), "ends after 10 tokens"),
        (WORDS, FRESH, "0% of the n-gram drafts were accepted, 1.00 tokens a round; the goal"),
        (WORDS, [7, 8, 9] * 15, "goes in circles"),
    ],
)
def test_own_text_says_what_is_wrong(text, tokens, message):
    verdict = exercises.check_own_text(text, answers(tokens), gamma=4)
    assert verdict.passed is False
    assert message in verdict.message


# -------------------------------------------------------------------- lesson 01


def draw(probs, generator):
    return int(torch.multinomial(probs, 1, generator=generator))


def ratio(p, q, x):
    return p[x] / q[x]


def residual(p, q, x):
    return (p - q).clamp_min(0)


def normalised(weights):
    return weights / weights.sum()


def ruled_out(p, q, x):
    rest = p.clone()
    rest[x] = 0
    return rest


def last_row(target_probs, drafted, generator):
    return draw(target_probs[-1], generator)


def uniform(generator):
    return torch.rand((), generator=generator, dtype=torch.float64)


def verifier(chance=ratio, corrected=residual, bonus=last_row, coin=uniform, pick=draw):
    """The rule, one draft after another, with a part of it replaced."""

    def verify(drafted, draft_probs, target_probs, generator):
        for i, x in enumerate(drafted.tolist()):
            p, q = target_probs[i], draft_probs[i]
            if coin(generator) >= chance(p, q, x):
                return i, pick(corrected(p, q, x), generator)
        return len(drafted), bonus(target_probs, drafted, generator)

    return verify


def vectorised(drafted, draft_probs, target_probs, generator):
    """The rule without a loop, as the library writes it."""
    n = len(drafted)
    rows = torch.arange(n)
    chance = target_probs[rows, drafted] / draft_probs[rows, drafted]
    passed = torch.rand(n, generator=generator, dtype=torch.float64) < chance
    accepted = int(passed.long().cumprod(0).sum())
    rest = target_probs[accepted]
    if accepted < n:
        rest = (rest - draft_probs[accepted]).clamp_min(0)
    return torch.tensor(accepted), torch.multinomial(rest, 1, generator=generator)[0]


def one_coin(drafted, draft_probs, target_probs, generator):
    coin = uniform(generator)
    return verifier(coin=lambda generator: coin)(drafted, draft_probs, target_probs, generator)


def counts_all(drafted, draft_probs, target_probs, generator):
    rows = torch.arange(len(drafted))
    chance = target_probs[rows, drafted] / draft_probs[rows, drafted]
    accepted = int((torch.rand(len(drafted), generator=generator) < chance).sum())
    if accepted == len(drafted):
        return accepted, draw(target_probs[-1], generator)
    rest = residual(target_probs[accepted], draft_probs[accepted], None)
    return accepted, draw(rest, generator)


def unnormalised(clip):
    """Inverse-transform sampling that takes the weights for probabilities."""

    def pick(weights, generator):
        token = int(torch.searchsorted(weights.cumsum(0), uniform(generator)))
        return min(token, len(weights) - 1) if clip else token

    return pick


@pytest.mark.parametrize("answer", [verifier(), vectorised], ids=["loop", "vectorised"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_verify_accepts_the_rule(answer, seed):
    verdict = exercises.check_verify(answer, calls=150, seed=seed)
    assert verdict.passed is True
    assert "nothing is lost" in verdict.message


def test_verify_is_to_do_until_it_returns_something():
    assert exercises.check_verify(lambda *given: None) is exercises.TODO


WRONG = {
    "upside down": (verifier(chance=lambda p, q, x: q[x] / p[x]), "the ratio is upside down"),
    "always": (verifier(chance=lambda p, q, x: 1.0), "accepts every draft"),
    "never": (verifier(chance=lambda p, q, x: 0.0), "accepts no draft"),
    "target alone": (verifier(chance=lambda p, q, x: p[x]), "divide by draft_probs"),
    "no coin": (verifier(chance=lambda p, q, x: float(p[x] >= q[x])), "toss a coin against"),
    "greedy": (verifier(chance=lambda p, q, x: float(x == int(p.argmax()))), "as greedy decoding"),
    "target, not residual": (verifier(corrected=lambda p, q, x: p), "draws from the target"),
    "drafter again": (verifier(corrected=lambda p, q, x: q), "from the drafter again"),
    "residual reversed": (
        verifier(corrected=lambda p, q, x: residual(q, p, x)),
        "residual is upside down",
    ),
    "not clamped": (verifier(corrected=lambda p, q, x: p - q), "entries below 0 (clamp it)"),
    "absolute value": (verifier(corrected=lambda p, q, x: (p - q).abs()), "not clamped: abs"),
    "not normalised": (verifier(pick=unnormalised(True)), "not normalised: what it lacks"),
    "not normalised, off the end": (verifier(pick=unnormalised(False)), "token 4 is not in the"),
    "only ruled out": (verifier(corrected=ruled_out), "only rules out the rejected token"),
    "corrected: argmax": (
        verifier(pick=lambda weights, generator: int(weights.argmax())),
        "the corrected token is the residual's likeliest",
    ),
    "no bonus": (verifier(bonus=lambda p, drafted, generator: None), "no token after the accepted"),
    "bonus: last draft": (
        verifier(bonus=lambda p, drafted, generator: int(drafted[-1])),
        "there is no bonus token",
    ),
    "bonus: row": (
        verifier(bonus=lambda p, drafted, generator: draw(p[len(drafted) - 1], generator)),
        "use the row after it",
    ),
    "bonus: argmax": (
        verifier(bonus=lambda p, drafted, generator: int(p[-1].argmax())),
        "the bonus token is the target's likeliest",
    ),
    "one coin": (one_coin, "one coin decides every draft"),
    "after a rejection": (counts_all, "after the first rejection"),
    "own randomness": (verifier(coin=lambda generator: torch.rand(())), "with the same generator"),
    "counts the token": (
        lambda drafted, q, p, generator: (len(drafted) + 1, 0),
        "without the token after: 3",
    ),
    "one thing": (lambda drafted, q, p, generator: 2, "return two things"),
    "words": (lambda drafted, q, p, generator: ("all", "end"), "must be whole numbers"),
    "raises": (lambda drafted, q, p, generator: p[len(p)], "IndexError: "),
    "another rate": (
        verifier(chance=lambda p, q, x: 0.5),
        "token 0 (from 0) is accepted in",
    ),
    "another residual": (
        verifier(corrected=lambda p, q, x: torch.ones_like(p)),
        "the corrected token is",
    ),
    "another bonus": (
        verifier(bonus=lambda p, drafted, generator: draw(torch.ones_like(p[0]), generator)),
        "the bonus token is",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_verify_names_the_mistake(name):
    answer, message = WRONG[name]
    verdict = exercises.check_verify(answer, calls=150)
    assert verdict.passed is False
    assert message in verdict.message


def test_enumerated_outcomes_are_distributions():
    target = torch.tensor(exercises.TARGET_PROBS, dtype=torch.float64)
    draft = torch.tensor(exercises.DRAFT_PROBS, dtype=torch.float64)
    for rule in (exercises._Rule(), *exercises._MISTAKES.values()):
        for drafted in ((0, 0), (1, 2), (3, 3)):
            total = rule.outcomes(drafted, target, draft).sum()
            torch.testing.assert_close(total, torch.ones_like(total))


def test_enumerated_rule_emits_the_target():
    """The first token of a round, over all drafts, has the target's distribution; a wrong one not."""
    target = torch.tensor(exercises.TARGET_PROBS, dtype=torch.float64)
    draft = torch.tensor(exercises.DRAFT_PROBS, dtype=torch.float64)

    def first(rule):
        emitted = torch.zeros(4, dtype=torch.float64)
        for x in range(4):
            for y in range(4):
                table = rule.outcomes((x, y), target, draft) * draft[0, x] * draft[1, y]
                emitted += table[0]
                emitted[x] += table[1:].sum()
        return emitted

    torch.testing.assert_close(first(exercises._Rule()), target[0])
    wrong = exercises._MISTAKES[
        "after a rejection it draws from the target: draw from the residual"
    ]
    assert (first(wrong) - target[0]).abs().max() > 0.05


# -------------------------------------------------------------------- lesson 02

CONFIG = DecoderConfig(
    vocab_size=1000,
    hidden_size=90,
    intermediate_size=200,
    num_layers=7,
    num_heads=15,
    num_kv_heads=5,
    head_dim=6,
    max_positions=1024,
    rope={"rope_type": "default", "rope_theta": 10_000.0},
)
WEIGHTS = 40_000_000
KV = 2 * 7 * 5 * 6 * 2  # bytes a token in bfloat16


def check_seconds(answer):
    measured = {512: 5e-3, 16_384: 9e-3}
    return exercises.check_step_seconds(
        answer, CONFIG, WEIGHTS, torch.bfloat16, measured, 20e9, 3e-3
    )


def test_step_seconds_accepts_the_formula():
    verdict = check_seconds(lambda n, speed, extra: (WEIGHTS + KV * n) / speed + extra)
    assert verdict.passed is True
    assert "At 16,384 tokens it says 5.7 ms, measured 9.0 ms" in verdict.message
    assert "The missing 3.3 ms" in verdict.message


def test_step_seconds_is_to_do_while_none():
    assert check_seconds(lambda n, speed, extra: None) is exercises.TODO


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n, speed, extra: (WEIGHTS + KV * n / 2) / speed + extra, "values are kept as well"),
        (lambda n, speed, extra: (WEIGHTS + KV * n / 7) / speed + extra, "each of the 7 layers"),
        (lambda n, speed, extra: (WEIGHTS + 3 * KV * n) / speed + extra, "use the 5 KV heads"),
        (lambda n, speed, extra: (WEIGHTS + KV * n) * 8 / speed + extra, "count bytes, not bits"),
        (lambda n, speed, extra: KV * n / speed + extra, "reads all the weights too"),
        (lambda n, speed, extra: (WEIGHTS + KV) / speed + extra, "the context is missing"),
        (lambda n, speed, extra: (WEIGHTS + KV * n) / speed, "add the overhead"),
        (lambda n, speed, extra: 1e3 * ((WEIGHTS + KV * n) / speed + extra), "not milliseconds"),
        (lambda n, speed, extra: (WEIGHTS + 5 * n) / speed + extra, "your bytes grow by 5 a token"),
        (lambda n, speed, extra: "fast", "return one number of seconds, not a str"),
    ],
)
def test_step_seconds_names_the_mistake(answer, message):
    verdict = check_seconds(answer)
    assert verdict.passed is False
    assert message in verdict.message


# -------------------------------------------------------------------- lesson 03

LENGTH, FUTURE, HEADS, KV_HEADS, DIM, BUDGET = 120, 4, 6, 2, 8, 16


def layers(count=2):
    """Keys, past queries and coming queries whose attention falls on the middle of the text."""
    generator = torch.Generator().manual_seed(0)
    keys, queries, future = [], [], []
    for _ in range(count):
        k = torch.randn(1, KV_HEADS, LENGTH, DIM, generator=generator)
        topic = k[:, :, 40:48].mean(2) * 4  # what the coming queries ask for
        ask = topic.repeat_interleave(HEADS // KV_HEADS, 1)[:, :, None]
        queries.append(ask + 0.1 * torch.randn(1, HEADS, LENGTH, DIM, generator=generator))
        future.append(ask + 0.1 * torch.randn(1, HEADS, FUTURE, DIM, generator=generator))
        keys.append(k)
    return keys, queries, future


@dataclass(frozen=True)
class Mine(Policy):
    """A policy that returns what it is given, made from the length and the budget."""

    make: object = None

    def select(self, keys, budget, queries, positions):
        return self.make(keys, budget)


def kept(*positions, window=0, rows=KV_HEADS):
    return Selection(torch.tensor(positions).expand(1, rows, -1), window)


def check_policy(policy):
    return exercises.check_policy(policy, *layers(), budget=BUDGET)


def test_policy_that_finds_the_attention_passes():
    verdict = check_policy(make_policy("snapkv"))
    assert verdict.passed is True
    assert "both at budget 16" in verdict.message
    assert check_policy(Mine(lambda keys, budget: kept(*range(40, 48)))).passed is True


def test_policy_is_to_do_while_none():
    verdict = check_policy(Mine(lambda keys, budget: None))
    assert verdict.passed is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda keys, budget: list(range(budget)), "layer 0: select returned a list"),
        (lambda keys, budget: kept(*range(10), window=10), "are 20 entries, the budget is 16"),
        (lambda keys, budget: kept(5, 5, window=4), "position 5 is chosen twice"),
        (lambda keys, budget: kept(3, LENGTH), "position 120 is outside the context, 0 to 119"),
        (lambda keys, budget: kept(3, 118, window=4), "position 118 is also in the window"),
        (lambda keys, budget: kept(1, 2, rows=HEADS), "one row a query head"),
        (lambda keys, budget: Selection(torch.ones(1, KV_HEADS, 3), 0), "must be an int64 tensor"),
        (lambda keys, budget: kept(1, window=2.0), "window must be a whole number"),
        (lambda keys, budget: kept(0, 1), "; you keep 2 entries of 16"),
        (lambda keys, budget: make_policy("sink_window").select(keys, budget, None, None), "both"),
    ],
)
def test_policy_names_the_mistake(make, message):
    verdict = check_policy(Mine(make))
    assert verdict.passed is False
    assert message in verdict.message


def test_captured_mass_against_a_plain_softmax():
    keys, _, future = (part[0] for part in layers(1))
    position = torch.tensor([[[3, 40, 41], [7, 8, 119]]])
    repeated = keys.repeat_interleave(HEADS // KV_HEADS, 1)
    weights = (future @ repeated.mT).softmax(-1).mean(2)  # [1, H, T]
    weights = weights.view(1, KV_HEADS, -1, LENGTH).mean(2)
    expected = torch.stack([weights[0, h, position[0, h]].sum() for h in range(KV_HEADS)])[None]
    torch.testing.assert_close(exercises.captured_mass(position, keys, future), expected)
    everything = torch.arange(LENGTH).expand(1, KV_HEADS, -1)
    whole = exercises.captured_mass(everything, keys, future)
    torch.testing.assert_close(whole, torch.ones(1, KV_HEADS))
    assert attention.attention_weights(future, keys).shape[1] == KV_HEADS


def test_verdict_reads_as_a_mark():
    assert repr(exercises.TODO).startswith("[to do] ")
    assert repr(exercises.Verdict(True, "yes")) == "[correct] yes"
    assert repr(exercises.Verdict(False, "no")) == "[not yet] no"
