"""The check of lesson 07 accepts the share of misses that a budget causes, and names wrong ones."""

from statistics import fmean

import pytest

from bdlib import exercises

KEYS = ("text", "drafter", "policy", "budget", "context")


def pairs(records, cell):
    full = {
        (r["document"], r["offset"]): r["agreement"]
        for r in records
        if r["policy"] == "full" and all(r[k] == cell[k] for k in ("text", "drafter", "context"))
    }
    inside = [r for r in records if all(r[k] == cell[k] for k in KEYS)]
    return [(r["agreement"], full[r["document"], r["offset"]]) for r in inside]


def means(records, cell):
    return [fmean(side) for side in zip(*pairs(records, cell), strict=True)]


def right(records, cell):
    sparse, full = means(records, cell)
    return (full - sparse) / (1 - sparse)


def unmatched(records, cell):
    sparse, _ = means(records, cell)
    full = fmean(
        r["agreement"]
        for r in records
        if r["policy"] == "full" and all(r[k] == cell[k] for k in ("text", "drafter", "context"))
    )
    return (full - sparse) / (1 - sparse)


def of_both(rule):
    return lambda records, cell: rule(*means(records, cell))


def check(answer):
    return exercises.check_budget_share(
        answer, exercises._budget_records(), dict(exercises.BUDGET_CELL)
    )


def test_accepts_the_share_and_reports_the_cell():
    verdict = check(right)
    assert verdict.passed is True
    assert verdict.message == "small, made up, 256 of 4,096: +14.3% of the misses are the budget's"


def test_is_to_do_until_there_is_an_answer():
    assert check(None) is exercises.TODO
    assert check(lambda records, cell: None) is exercises.TODO


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (unmatched, "over different windows"),
        (of_both(lambda s, f: f - s), "difference of the agreements"),
        (of_both(lambda s, f: (f - s) / (1 - f)), "not by those with the full cache"),
        (of_both(lambda s, f: (f - s) / f), "agreement that was lost"),
        (of_both(lambda s, f: s / f), "agreement that was kept"),
        (of_both(lambda s, f: (s - f) / (1 - s)), "the sign is wrong"),
        (of_both(lambda s, f: (1 - f) / (1 - s)), "this is the rest"),
        (of_both(lambda s, f: 100 * (f - s) / (1 - s)), "not percent"),
        (
            lambda r, c: fmean((f - s) / (1 - s) for s, f in pairs(r, c)),
            "average the agreements first",
        ),
        (lambda r, c: 0.5, "on made-up windows it gives 0.5000"),
        (lambda r, c: [0.1], "not a list"),
        (lambda r, c: r[0]["agree"], "KeyError"),
    ],
)
def test_says_what_is_wrong(answer, complaint):
    verdict = check(answer)
    assert verdict.passed is False
    assert complaint in verdict.message


def test_every_mistake_gives_another_number():
    """Or the complaint would be about another mistake than the one made."""
    records, cell = exercises._budget_records(), exercises.BUDGET_CELL
    wrong = dict(exercises._budget_mistakes(records, cell))
    values = [right(records, cell), *wrong.values()]
    close = {(a, b) for i, a in enumerate(values) for b in values[i + 1 :] if abs(a - b) < 1e-6}
    assert not close


def test_the_students_code_may_not_change_the_records():
    records = exercises._budget_records()

    def greedy(rows, cell):
        share = right(rows, cell)
        for row in rows:
            row.clear()
        return share

    assert exercises.check_budget_share(greedy, records, dict(exercises.BUDGET_CELL)).passed is True
    assert records == exercises._budget_records()
