"""The check of lesson 06 accepts a changed run and names what is wrong; the toy recipe and its parts."""

import math
from dataclasses import replace

import pytest

from bdlib import corpora, exercises, models, recipes
from bdlib.budgets import BudgetSampler, curriculum, fixed
from bdlib.objectives import Objective

RECIPE = recipes.get("quick")
SETTINGS = RECIPE.settings
OTHER = BudgetSampler({64: 0.25, 256: 0.75})  # 208 entries on average; the recipe's keep 128


def line(full=7.5, views=(6.8, 7.0), agreement=0.2):
    return {
        "loss": full + sum(views) / len(views),
        "full": {"loss": full, "agreement": agreement},
        "views": [{"loss": loss, "agreement": agreement} for loss in views],
    }


LOG = [line(), line(), line()]


def weighted(weight):
    return replace(SETTINGS, objective=replace(SETTINGS.objective, weight=weight))


def check(settings, entries=None, first_loss=None, retrain=None):
    def never(settings):
        raise AssertionError("trained although something is wrong")

    return exercises.check_changed_run(settings, entries, first_loss, RECIPE, LOG, retrain or never)


def test_accepts_another_lambda_and_trains_it():
    asked = []

    def retrain(settings):
        asked.append(settings)
        return [line(agreement=0.3)] * 3

    verdict = check(weighted(0.5), 128, 7.5 + 0.5 * 6.9, retrain)
    assert verdict.passed is True
    assert asked == [weighted(0.5)]
    assert "0.300 in full, 0.300 sparse; the unchanged run: 0.200 in full" in verdict.message


@pytest.mark.parametrize(
    ("budgets", "entries"),
    [
        (OTHER, 208),
        (OTHER, 207.6),  # rounded by hand
        (fixed(256), 256.0),
        (
            curriculum({256: 1.0}, {64: 1.0}, SETTINGS.steps),
            256 - 192 * (SETTINGS.steps - 1) / 2 / SETTINGS.steps,
        ),
    ],
)
def test_accepts_other_budgets(budgets, entries):
    settings = replace(SETTINGS, budgets=budgets)
    assert check(settings, entries, 14.4, lambda settings: LOG).passed is True


def test_accepts_no_weight_at_all():
    assert check(weighted(0.0), 128, 7.5, lambda settings: LOG).passed is True


@pytest.mark.parametrize(
    "answer",
    [(None, None, None), (weighted(0.5), None, None), (weighted(0.5), 128, None)],
)
def test_is_to_do_until_all_is_there(answer):
    assert check(*answer).passed is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SETTINGS, "settings of the run that you have"),
        (Objective("kl", "kl", 0.5), "not a Objective: use replace"),
        (replace(RECIPE, settings=weighted(0.5)), "not a Recipe"),
        (replace(weighted(0.5), budgets=OTHER), "both changed"),
        (replace(weighted(0.5), lr=1e-3, steps=9), "steps, lr changed too"),
        (replace(SETTINGS, views=0), "views changed too"),
        (replace(SETTINGS, objective=Objective("kl", "ce", 0.5)), "more than its weight"),
        (replace(SETTINGS, budgets=fixed(1024)), "a budget of 1,024 keeps all of a window of 512"),
        (
            replace(SETTINGS, budgets=curriculum({64: 1.0}, {640: 1.0}, SETTINGS.steps)),
            "a budget of 640",
        ),
    ],
)
def test_names_what_is_wrong_with_the_settings(settings, message):
    verdict = check(settings, 128, 14.4)
    assert verdict.passed is False
    assert message in verdict.message


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (128, "the unchanged run's"),
        (160, "their plain average"),
        (256, "most frequent budget"),
        (416, "of one view"),
        (176, "do not take them off"),
        (99, "99 is not the sum of probability x budget (0.25 x 64 + 0.75 x 256)"),
        ("208", "my_entries must be a number, not a str"),
    ],
)
def test_names_what_is_wrong_with_the_entries(entries, message):
    verdict = check(replace(SETTINGS, budgets=OTHER), entries, 14.4)
    assert verdict.passed is False
    assert message in verdict.message


@pytest.mark.parametrize(
    ("first_loss", "message"),
    [
        (7.5, "L_A alone"),
        (14.4, "the loss of the unchanged run"),
        (0.25 * 14.4, "not L_A"),
        (0.75 * 7.5 + 0.25 * 6.9, "takes no weight from L_A"),
        (7.5 + 0.25 * 13.8, "averaged, not added up"),
        (20.0, "with lambda 0.25 it should be 9.225, not 20.000"),
        (math.nan, "should be 9.225"),
    ],
)
def test_names_what_is_wrong_with_the_first_loss(first_loss, message):
    verdict = check(weighted(0.25), 128, first_loss)
    assert verdict.passed is False
    assert message in verdict.message


def test_of_two_mistakes_that_give_nearly_the_same_it_names_the_nearer():
    close = [line(7.5, (7.3, 7.4))] * 3
    for first_loss, message in ((7.5, "L_A alone"), (0.75 * 7.5 + 0.25 * 7.35, "no weight")):
        verdict = exercises.check_changed_run(
            weighted(0.25), 128, first_loss, RECIPE, close, lambda settings: close
        )
        assert message in verdict.message


def test_one_embedded_text_by_its_name():
    (book,) = corpora.load_texts(RECIPE.text)
    assert (book.name, book.author) == ("austen-persuasion", "Jane Austen")
    assert book in corpora.embedded("train")


def test_a_shipped_drafter_by_its_name(tmp_path, monkeypatch):
    folder = models.checkpoint("budgetdraft-feature-gpu")
    assert (folder / "log.jsonl").is_file()
    with pytest.raises(ValueError, match=r"no shipped drafter 'budget'; there: .*budgetdraft"):
        models.checkpoint("budget")
    monkeypatch.setattr("bdlib.assets.checkout", lambda: None)
    with pytest.raises(ValueError, match="data/checkpoints of a checkout"):
        models.checkpoint("budgetdraft-feature-gpu")
