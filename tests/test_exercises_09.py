"""The checks of lesson 09 take any right answer, and name what is wrong with others."""

from statistics import fmean

import pytest

from bdlib import exercises
from bdlib.controllers import expected_tokens

# ------------------------------------------------------------------ where it loses


def losing(
    out=(),
    lossy=False,
    column="tokens_per_second",
    average=fmean,
    pick=max,
    engine=None,
    all_=False,
):
    """The exercise solved, or nearly."""

    def answer(records, method):
        documents = dict.fromkeys(r["document"] for r in records if r["method"] == method)
        lost = {}
        for document in documents:
            speeds = {}
            for r in records:
                if r["document"] != document or r["method"] in out or r[column] is None:
                    continue
                if (r["near_ties_only"] is False and not lossy) or engine not in (
                    None,
                    r["engine"],
                ):
                    continue
                speeds.setdefault(r["method"], []).append(r[column])
            best = pick(speeds, key=lambda name: average(speeds[name]))
            if best != method or all_:
                lost[document] = best
        return lost

    return answer


def over_all(records, method):
    speeds = {}
    for r in records:
        if r["near_ties_only"] is not False:
            speeds.setdefault(r["method"], []).append(r["tokens_per_second"])
    best = max(speeds, key=lambda name: fmean(speeds[name]))
    return {r["document"]: best for r in records if r["method"] == method}


def first_found(records, method):
    lost = {}
    for ours in records:
        if ours["method"] != method or ours["document"] == "d":
            continue
        for r in records:
            faster = r["tokens_per_second"] > ours["tokens_per_second"]
            if r["document"] == ours["document"] and faster and r["near_ties_only"]:
                lost.setdefault(r["document"], r["method"])
    return lost


RECORDS = [
    {
        "document": "novel",
        "sample": 0,
        "method": name,
        "engine": "bdlib",
        "tokens_per_second": speed,
        "acceptance_rate": None,
        "accepted_length": 1.0,
        "identical": True,
        "near_ties_only": True,
    }
    for name, speed in (("plain", 30.0), ("mine", 20.0))
]


def test_where_it_loses_is_accepted_and_used():
    verdict = exercises.check_losses(losing(), RECORDS, "mine")
    assert verdict.passed is True
    assert verdict.message == "mine is beaten on 1 of 1 documents: novel to plain"
    sampled = [r | {"identical": None, "near_ties_only": None} for r in RECORDS]
    assert "novel to plain" in exercises.check_losses(losing(), sampled, "mine").message
    assert "on 0 of 1 documents: none" in exercises.check_losses(losing(), RECORDS, "plain").message


def test_untouched_is_to_do():
    assert exercises.check_losses(None, RECORDS, "mine").passed is None
    assert exercises.check_losses(lambda records, method: None, RECORDS, "mine").passed is None
    assert exercises.check_two_levels(None).passed is None
    assert exercises.check_two_levels(lambda *case: None).passed is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (losing(out=("plain",)), "plain decoding is a rival, too"),
        (losing(lossy=True), "has won nothing"),
        (losing(column="acceptance_rate"), "highest acceptance is not"),
        (losing(column="accepted_length"), "leave out what a round costs"),
        (losing(engine="bdlib"), "methods of transformers count"),
        (losing(average=max), "one fast sample is not a fast document"),
        (losing(pick=min), "the slowest method"),
        (losing(all_=True), "leave those documents out"),
        (over_all, "a mean over all documents hides"),
        (first_found, "not the first one found"),
        (lambda records, method: {}, "on made-up document 'a'"),
        (lambda records, method: {**losing()(records, method), "e": "lookup"}, "document 'e'"),
        (lambda records, method: ["a", "b"], "return a dictionary"),
        (lambda records, method: records[0]["speed"], "KeyError: 'speed'"),
    ],
)
def test_names_what_is_wrong_with_losses(wrong, message):
    verdict = exercises.check_losses(wrong, RECORDS, "mine")
    assert verdict.passed is False
    assert message in verdict.message, verdict


def test_records_it_was_not_made_for_are_named():
    def particular(records, method):
        if records == RECORDS:
            raise LookupError("nothing")
        return losing()(records, method)

    verdict = exercises.check_losses(particular, RECORDS, "mine")
    assert verdict.passed is False
    assert "right on made-up records; here LookupError: nothing" in verdict.message


# ------------------------------------------------------------------ two levels


def levels(cost, tokens=expected_tokens, v=True):
    def answer(a_low, a_high, gamma_low, gamma, c, m, v_):
        spent = gamma * cost(a_low, gamma_low, c, m) + (v_ if v else 1)
        return tokens(a_high, gamma) / spent

    return answer


def right(a, g, c, m):
    return (g * c + m) / expected_tokens(a, g)


def multiplied(a_low, a_high, gamma_low, gamma, c, m, v):
    lower = expected_tokens(a_low, gamma_low) * m / (gamma_low * c + m)
    return lower * expected_tokens(a_high, gamma) / (gamma * m + v)


def test_two_levels_are_accepted():
    verdict = exercises.check_two_levels(levels(right))
    assert verdict.passed is True, verdict


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (levels(lambda a, g, c, m: g * c + m), "divide its cost by the tokens it gives"),
        (levels(lambda a, g, c, m: (c + m) / expected_tokens(a, g)), "gamma_low of them a round"),
        (levels(lambda a, g, c, m: g * c / expected_tokens(a, g)), "own pass costs m"),
        (levels(right, v=False), "verification costs v"),
        (levels(lambda a, g, c, m: m), "without its small one"),
        (levels(right, lambda a, n: 1 + n * a), "a lower round costs"),
        (multiplied, "do not multiply"),
        (
            lambda a, b, g, n, c, m, v: expected_tokens(a * b, n) / (n * right(a, g, c, m) + v),
            "a_low is in their price already",
        ),
        (
            lambda a, b, g, n, c, m, v: expected_tokens(b, n) / (right(a, g, c, m) + v),
            "each has its price",
        ),
        (
            lambda a, b, g, n, c, m, v: (1 + n * b) / (n * (g * c + m) / (1 + g * a) + v),
            "behind a rejected one",
        ),
        (
            lambda a, b, g, n, c, m, v: (
                expected_tokens(b, n)
                / (n * (g * c + m) / (expected_tokens(a, g) - 1 if a else 1) + v)
            ),
            "a token of its own",
        ),
        (lambda *case: 1 / levels(right)(*case), "the inverse"),
        (lambda *case: "fast", "return a number"),
        (lambda *case: 1 / 0, "raises ZeroDivisionError"),
        (lambda *case: 2.0, "a lower round costs 0.80 steps and gives 1.750 tokens"),
    ],
)
def test_names_what_is_wrong_with_two_levels(wrong, message):
    verdict = exercises.check_two_levels(wrong)
    assert verdict.passed is False
    assert message in verdict.message, verdict
