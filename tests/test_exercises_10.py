"""The check of lesson 10 tells wrong bounds apart; the paper's figures are whole and of one form."""

import pytest

from bdlib import exercises


def above(bound, strictly=True):
    def pick(rows):
        found = []
        for row in rows:
            most = bound(row["gamma"], row["acceptance"])
            if row["speedup"] > most + 1e-9 or (not strictly and row["speedup"] >= most - 1e-9):
                found.append(row)
        return found

    return pick


def right(gamma, percent):
    return 1 + gamma * percent / 100


def test_accepts_the_bound_and_names_the_cell():
    verdict = exercises.check_above_bound(above(right))
    assert verdict.passed is True
    assert verdict.message == "4 rows of Table 1 lie above the bound, all of one cell: QMSum at 8K"


WRONG = {
    "leaves out the token that the target adds": lambda g, p: g * p / 100,
    "printed in percent": lambda g, p: 1 + g * p,
    "most that any draft can give": lambda g, p: g + 1,
    "no bound: chances that differ": lambda g, p: sum((p / 100) ** i for i in range(g + 1)),
    "one accepted draft a round at most": lambda g, p: 1 + p / 100,
    "it always comes": lambda g, p: (g + 1) * p / 100,
}


@pytest.mark.parametrize("complaint", WRONG)
def test_names_a_wrong_bound(complaint):
    verdict = exercises.check_above_bound(above(WRONG[complaint]))
    assert verdict.passed is False
    assert complaint in verdict.message


def test_every_mistake_picks_other_rows():
    """Or the complaint would be about another mistake than the one made."""
    rows = [
        {"gamma": g, "acceptance": a, "speedup": s, "text": i}
        for i, (g, a, s) in enumerate(exercises.BOUND_ROWS)
    ]
    picked = [str(above(bound)(rows)) for bound in (right, *WRONG.values())]
    assert len(set(picked)) == len(picked)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (above(right, strictly=False), "a row on the bound is possible"),
        (lambda rows: above(right)(rows)[:1], "was not picked: gamma 5, acceptance 80 %, 6.5x"),
        (lambda rows: above(right)(rows)[::-1], "in the order given"),
        (lambda rows: [0, 1], "return a list of rows"),
        (lambda rows: rows[0]["accept"], "KeyError"),
    ],
)
def test_names_other_mistakes(answer, complaint):
    verdict = exercises.check_above_bound(answer)
    assert verdict.passed is False
    assert complaint in verdict.message


@pytest.mark.parametrize("answer", [None, lambda rows: None])
def test_is_to_do_while_untouched(answer):
    assert exercises.check_above_bound(answer) is exercises.TODO


def test_the_papers_tables_are_whole():
    cells = {(c, t) for c in ("4K", "8K", "16K") for t in ("PG-19", "QMSum", "LWM")}
    for name, budgets in (("plain_decoding", 1), ("best", 4), ("gamma_5", 4), ("best_gamma", 1)):
        rows = exercises.paper_table(name)
        assert len(rows) == 9 * budgets
        assert {(row["context"], row["text"]) for row in rows} == cells
        for row in rows:
            assert 0 < row.get("acceptance", 1) <= 100
            assert row.get("budget", 256) in (256, 512, 1024, 2048)
    assert len(exercises.paper_table("methods")) == 8
    peaks = {(r["context"], r["text"]): r["gamma"] for r in exercises.paper_table("best_gamma")}
    best = exercises.paper_table("best")
    assert all(row["gamma"] == peaks[row["context"], row["text"]] for row in best)


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="no table 'fig'; allowed: best, best_gamma, gamma_5"):
        exercises.paper_table("fig")
