"""The bench of a training step: what it counts and refuses (how long it takes is not tested)."""

from dataclasses import replace

import pytest
import tiny

from bdlib import bench_training, corpora, pairs, recipes
from bdlib.bench_training import BUDGETS, TrainingBenchSettings

WORDS = 61


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    target = tiny.model(seed=3, vocab_size=WORDS, num_layers=3, max_positions=2048)
    tiny.save_folder(folder, target.float())
    text = tiny.words(tiny.text(1100, seed=1, vocabulary=WORDS).tolist())
    pair = pairs.load_pair(target=folder, dtype="float32", pack=False)
    change = {"layers": (0, 2), "taps": (0, 2), "rows": 40, "top": 8}
    known = {name: replace(recipes.get(name), **change) for name in TrainingBenchSettings().recipes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "get", known.__getitem__)
        patch.setattr(recipes, "load", lambda recipe: pair)
        patch.setattr(corpora, "embedded", lambda split: [corpora.Document("a", text)])
        patch.setattr(corpora, "load_texts", lambda path: [corpora.Document("a", text)])
        patch.setattr(bench_training, "SIDE", 64)
        return bench_training.training(TrainingBenchSettings(length=1024, repeats=2))


def test_more_views_are_more_operations_and_less_than_in_proportion(result):
    assert [row["recipe"] for row in result["recipes"]] == [
        "budgetdraft",
        "budgetdraft-feature-novels",
    ]
    for row in result["recipes"]:
        one, three = row["operations"]["1"], row["operations"]["3"]
        assert one < three < len(BUDGETS[3]) * one
        for number in ("1", "3"):
            seconds = row["seconds"][number]["median"]
            rate = result["matrix_operations_per_second"]["median"]
            expected = row["operations"][number] / rate / seconds
            assert row["fraction_of_matrix_rate"][number] == pytest.approx(expected)
        assert row["seconds"]["3"]["n"] == row["three_views_over_one"]["n"] == 2


def test_the_table_names_each_recipe(result):
    lines = bench_training.table(result).splitlines()
    assert lines[0].startswith("window of 1024 tokens")
    assert [line.split()[0] for line in lines[2:]] == ["budgetdraft", "budgetdraft-feature-novels"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 0}, "repeats 0 must be at least 1"),
        ({"length": 512}, "length 512 must be at least 1024"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingBenchSettings(**change)


def test_pairs_are_not_mixed():
    settings = TrainingBenchSettings(recipes=("budgetdraft", "paper"))
    with pytest.raises(ValueError, match="'paper' has another pair"):
        bench_training.training(settings)
