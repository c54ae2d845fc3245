"""Recipes from end to end on a tiny pair: targets, training, resuming, the shipped folder, refusals."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import torch

from bdlib import __main__ as cli
from bdlib import forced, models, pairs, recipes, teacher, training
from bdlib.budgets import fixed

WORDS = 61


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder with a tokenizer, and a text of 2,000 tokens."""
    return tiny.place(tmp_path_factory.mktemp("pair"), WORDS)


@pytest.fixture(scope="module")
def pair(place):
    return pairs.load_pair(target=place / "target", dtype="float32", pack=False)


def recipe(place, name="budgetdraft", **changes):
    found = recipes.get(name)
    settings = replace(
        found.settings, steps=8, warmup=1, block=12, budgets=fixed(40), autocast=False
    )
    usual = {"layers": (0, 2), "taps": (0, 2), "rows": 40, "windows": {96: 6, 128: 4}, "top": 8}
    return replace(found, settings=settings, text=str(place / "text.txt"), **{**usual, **changes})


@pytest.mark.parametrize("name", ["budgetdraft", "full-only", "budgetdraft-feature-novels"])
def test_a_recipe_leaves_a_drafter_that_loads(place, pair, tmp_path, name):
    trainer = recipes.train(recipe(place, name), tmp_path / "run", tmp_path / "teacher", pair)
    folder = tmp_path / "run" / "drafter"
    drafter = models.load_drafter(folder, pair.target)
    assert isinstance(drafter, models.FeatureDecoder) is (name == "budgetdraft-feature-novels")
    meta = json.loads((folder / "drafter.json").read_text())["provenance"]
    assert meta["steps"] == trainer.step == 8
    assert meta["recipe"] == name
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert meta["tokens"] == sum(line["tokens"] for line in lines)
    assert set(meta["corpus"].values()) == {store.meta["windows"] for store in trainer.stores}
    assert f"# {name}" in (folder / "README.md").read_text()


def test_a_stopped_recipe_goes_on_and_targets_are_shared(place, pair, tmp_path, monkeypatch):
    chosen = recipe(place)

    def stop(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipes.train(chosen, tmp_path / "run", tmp_path / "teacher", pair, progress=stop)
    half = json.loads((tmp_path / "run" / "drafter" / "drafter.json").read_text())
    assert half["provenance"]["steps"] == 4
    monkeypatch.setattr(teacher, "compute", None)  # nothing is left to compute
    steps = []
    recipes.train(
        chosen,
        tmp_path / "run",
        tmp_path / "teacher",
        pair,
        progress=lambda x: steps.append(x["step"]),
    )
    assert steps == [4, 5, 6, 7]
    recipes.train(recipe(place, "lambda-1"), tmp_path / "other", tmp_path / "teacher", pair)


def test_features_serve_a_recipe_without_them_too(place, pair, tmp_path, monkeypatch):
    recipes.targets(recipe(place, "budgetdraft-feature-novels"), pair, tmp_path)
    monkeypatch.setattr(teacher, "compute", None)
    stores = recipes.targets(recipe(place), pair, tmp_path)
    assert [store.windows.shape for store in stores] == [(6, 96), (4, 128)]


def test_the_papers_recipe_runs_on_a_stand_in_pair(place, pair, tmp_path):
    """Prefix and continuation, the pair's own second model, targets of the continuation alone."""
    second = tiny.model(seed=4, dtype=torch.float32, vocab_size=WORDS, num_layers=1, hidden_size=16)
    tiny.save_folder(tmp_path / "second", second)
    both = pairs.load_pair(
        target=place / "target", drafter=tmp_path / "second", dtype="float32", pack=False
    )
    paper = recipes.get("paper")
    assert paper.settings.mode == "continuation"
    assert (paper.settings.lr, paper.settings.weight_decay, paper.settings.clip) == (
        1e-5,
        0.01,
        1.0,
    )
    assert (paper.settings.steps, paper.settings.warmup) == (5000, 150)
    assert paper.settings.budgets.probabilities() == {256: 0.4, 512: 0.3, 1024: 0.2, 2048: 0.1}
    small = replace(
        paper,
        text=str(place / "text.txt"),
        windows={200: 5},
        last=24,
        settings=replace(paper.settings, steps=4, warmup=1, block=24, budgets=fixed(64)),
    )
    trainer = recipes.train(small, tmp_path / "run", tmp_path / "teacher", both)
    assert trainer.stores[0].target(0).ids.shape == (24, 1)
    loaded = pairs.load_pair(
        target=place / "target", drafter=tmp_path / "run" / "drafter", dtype="float32"
    )
    tokens = tiny.text(30, vocabulary=WORDS)[None]
    assert torch.allclose(loaded.drafter(tokens), trainer.model(tokens), atol=1e-4)


def test_what_cannot_be_trained_is_refused(place, pair, tmp_path):
    with pytest.raises(ValueError, match="unknown recipe 'best'; allowed: budgetdraft, full-only"):
        recipes.get("best")
    with pytest.raises(ValueError, match="has no second model"):
        recipes.untrained(recipes.get("paper"), pair)
    with pytest.raises(ValueError, match="holds 20 windows of 96 tokens, 99 were asked for"):
        recipes.targets(recipe(place, windows={96: 99}), pair, tmp_path)
    chosen = recipe(place)
    wide = replace(chosen, settings=replace(chosen.settings, budgets=fixed(512)))
    with pytest.raises(ValueError, match="budget 512 is above the longest window of 128"):
        recipes.train(wide, tmp_path / "run", tmp_path / "teacher", pair)
    other = replace(
        pair, target=tiny.model(seed=9, dtype=torch.float32, vocab_size=WORDS, num_layers=3)
    )
    with pytest.raises(ValueError, match="targets of another model"):
        recipes.train(chosen, tmp_path / "run", tmp_path / "teacher", other)


def test_a_full_disk_loses_nothing(place, pair, tmp_path, monkeypatch):
    chosen = recipe(place)
    trainer = recipes.train(chosen, tmp_path / "run", tmp_path / "teacher", pair)
    before = (tmp_path / "run" / training.CHECKPOINT).read_bytes()

    def full(state, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save()
    assert (tmp_path / "run" / training.CHECKPOINT).read_bytes() == before


def test_the_command_trains_and_refuses_in_one_line(place, tmp_path, monkeypatch, capsys):
    chosen = replace(recipe(place), pair="smollm2")
    monkeypatch.setitem(recipes.RECIPES, "tiny", chosen)
    loaded = pairs.load_pair(target=place / "target", dtype="float32", pack=False)
    monkeypatch.setattr(recipes, "load", lambda *_: loaded)
    arguments = ["bdlib", "train", "--out", str(tmp_path / "run"), "--teacher", str(tmp_path / "t")]
    monkeypatch.setattr("sys.argv", [*arguments, "--recipe", "tiny", "--steps", "3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "3 steps; the drafter is in" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*arguments, "--recipe", "tiny", "--steps", "5"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "holds a run with other settings" in capsys.readouterr().err


# --------------------------------------------------------- teacher-forced agreement


@pytest.fixture(scope="module")
def trained(place, pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for name in ("budgetdraft", "budgetdraft-feature-novels"):
        recipes.train(recipe(place, name), folder / name, folder / "teacher", pair)
        shutil.copytree(folder / name / "drafter", folder / "shipped" / name)
    return folder / "shipped"


def test_agreement_of_the_target_with_itself_is_perfect(pair):
    window = tiny.text(120, seed=5, vocabulary=WORDS)
    views = forced.ForcedSettings(("x",), budgets=(0,), context=120, positions=24, block=12).views()
    (found,) = forced.along(pair.target, {"self": pair.target}, window, views, 24, 12)
    assert found["agreement"] == 1
    assert found["alpha"] == pytest.approx(1, abs=1e-4)


def test_agreement_is_what_a_sparse_cache_gives(pair, place, trained):
    """The first block against plain decoding on a sparse cache of the same entries."""
    from bdlib.cache import KVCache, SparseKVCache
    from bdlib.selection import make_policy
    from bdlib.views import View

    drafter = models.load_drafter(trained / "budgetdraft", pair.target)
    window, policy = tiny.text(120, seed=6, vocabulary=WORDS), make_policy("chunk_topk")
    (found,) = forced.along(pair.target, {"d": drafter}, window, [View(32, policy)], 12, 12)
    full = KVCache(drafter.config, 108, dtype=drafter.dtype, observe=policy)
    drafter.hidden(window[None, :108], full)
    sparse = SparseKVCache(drafter.config, 20, policy, dtype=drafter.dtype)
    sparse.fill(full)
    sparse.budget, buffers = 32, (sparse._keys, sparse._values)
    sparse._keys, sparse._values = (torch.cat((b, torch.zeros_like(b)), 3) for b in buffers)
    rows = drafter(window[None, 108:], sparse)[0].argmax(-1)
    expected = pair.target(window[None])[0, 108:].argmax(-1)
    agreement = (drafter.vocabulary[rows] == expected).double().mean()
    assert found["agreement"] == pytest.approx(float(agreement))


def test_records_add_up(place, pair, trained, tmp_path):
    settings = forced.ForcedSettings(
        drafters=(str(trained / "budgetdraft"), str(trained / "budgetdraft-feature-novels")),
        policies=("sink_window", "chunk_topk"),
        budgets=(24, 0),
        context=120,
        positions=24,
        block=12,
        samples=3,
        text=str(place / "text.txt"),
    )
    result = forced.run(settings, pair)
    assert len(result["records"]) == 3 * 2 * 3
    for row in result["summary"]:
        mine = [
            r["alpha"]
            for r in result["records"]
            if (r["drafter"], r["policy"], r["budget"])
            == (row["drafter"], row["policy"], row["budget"])
        ]
        assert row["alpha"]["mean"] == pytest.approx(sum(mine) / 3)
        assert len(row["by_step"]) == (4 if "feature" in row["drafter"] else 1)
    json.dumps(result, allow_nan=False)
    assert forced.table(result).count("\n") == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafters": ()}, r"drafters \(\)"),
        ({"budgets": (12,)}, "budget 12 must be 0"),
        ({"positions": 30}, "positions 30 must be a multiple of block 12"),
        ({"context": 30}, "context 30 must be at least 36"),
        ({"policies": ("best",)}, "unknown policy 'best'"),
        ({"samples": 0}, "samples 0"),
    ],
)
def test_bad_agreement_settings_are_refused(change, message):
    good = {"drafters": ("x",), "budgets": (24,), "context": 120, "positions": 24, "block": 12}
    with pytest.raises(ValueError, match=message):
        forced.ForcedSettings(**{**good, **change})


def test_a_recipe_can_go_on_from_a_shipped_drafter(place, pair, trained, tmp_path, monkeypatch):
    """The target's own answers need a chat template, which the tiny tokenizer lacks: novels serve."""
    monkeypatch.setattr(models, "checkpoint", lambda name: trained / name)
    chosen = recipe(place, "budgetdraft-feature-novels", start="budgetdraft-feature-novels")
    before = recipes.untrained(chosen, pair)
    assert isinstance(before, models.FeatureDecoder)
    expected = models.load_drafter(
        trained / "budgetdraft-feature-novels", pair.target, torch.float32
    )
    tokens, state = tiny.text(9, vocabulary=WORDS)[None], torch.randn(1, 9, 32)
    assert torch.allclose(before.inputs(tokens, state), expected.inputs(tokens, state), atol=1e-5)
    assert not before.embedding.requires_grad
    trainer = recipes.train(chosen, tmp_path / "run", tmp_path / "teacher", pair)
    assert not torch.equal(trainer.model.fuse.weight, before.fuse.weight)


def test_a_missing_start_is_named_before_any_target_is_computed(place, pair, tmp_path):
    chosen = recipe(place, "budgetdraft-feature-novels", start="nobody")
    with pytest.raises(ValueError, match="goes on from 'nobody': no shipped drafter.*train that"):
        recipes.train(chosen, tmp_path / "run", tmp_path / "teacher", pair)
    assert not (tmp_path / "teacher").exists()


def test_every_start_is_a_recipe():
    assert {recipe.start for recipe in recipes.RECIPES.values()} <= {None, *recipes.RECIPES}


def test_own_answers_become_a_store(place, pair, tmp_path, monkeypatch):
    from bdlib.continuations import ContinuationSettings

    own = ContinuationSettings(3, length=60, answer=20, batch=2)
    asked = torch.stack([tiny.text(40, seed=i, vocabulary=WORDS) for i in range(3)])
    monkeypatch.setattr(recipes, "prompts", lambda *_: asked)
    stores = recipes.targets(recipe(place, own=(own,)), pair, tmp_path)
    assert [store.windows.shape for store in stores] == [(6, 96), (4, 128), (3, 60)]
    assert torch.equal(stores[2].tokens(1)[:40], asked[1])
    assert "own text of" in stores[2].meta["source"]


def test_text_as_speech_becomes_a_store_of_its_own(place, pair, tmp_path):
    stores = recipes.targets(recipe(place, spoken={96: 2}), pair, tmp_path)
    assert [store.windows.shape for store in stores] == [(6, 96), (4, 128), (2, 96)]
    assert "as speech" in stores[2].meta["source"]
    assert not any(torch.equal(stores[2].tokens(0), stores[0].tokens(i)) for i in range(6))


def test_only_the_first_process_computes_targets(place, pair, tmp_path):
    order = []

    class Second:  # what accelerate.Accelerator is to a process that is not the first
        num_processes, process_index = 2, 1

        def main_process_first(self):
            order.append("waited")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        recipes.train(
            recipe(place), tmp_path / "run", tmp_path / "teacher", pair, accelerator=Second()
        )
    assert order == ["waited"]
    assert not (tmp_path / "teacher").exists()


def test_answers_sampled_otherwise_are_not_taken_for_these(place, pair, tmp_path, monkeypatch):
    from bdlib.continuations import ContinuationSettings

    own = ContinuationSettings(3, length=60, answer=20, batch=2)
    asked = torch.stack([tiny.text(40, seed=i, vocabulary=WORDS) for i in range(3)])
    monkeypatch.setattr(recipes, "prompts", lambda *_: asked)
    recipes.targets(recipe(place, own=(own,)), pair, tmp_path)
    warmer = replace(own, temperature=1.5)  # as many windows, as long, in the same place
    with pytest.raises(ValueError, match="teacher targets with another"):
        recipes.targets(recipe(place, own=(warmer,)), pair, tmp_path)


def test_a_recipe_may_choose_the_draft_vocabulary_again(place, pair, tmp_path, monkeypatch):
    first = recipe(place, "budgetdraft-feature-novels", rows=20)
    recipes.train(first, tmp_path / "run", tmp_path / "teacher", pair)
    trained = tmp_path / "run" / "drafter"
    monkeypatch.setattr(models, "checkpoint", lambda name: trained)
    again = recipe(place, "budgetdraft-feature-gpu", rows=30, own=(), spoken={})
    trainer = recipes.train(again, tmp_path / "more", tmp_path / "teacher", pair)
    windows = [torch.from_numpy(store.windows.astype("int64")) for store in trainer.stores]
    wanted = models.draft_vocabulary(windows, WORDS, 30)
    found = models.load_drafter(tmp_path / "more" / "drafter", pair.target)
    assert torch.equal(found.vocabulary, wanted)
    with pytest.raises(ValueError, match="revised True needs a drafter to go on from and rows"):
        replace(again, start=None)


def test_processes_can_share_a_recipes_targets(place, pair, tmp_path):
    chosen = recipe(place, spoken={96: 2})
    parts = [recipes.targets(chosen, pair, tmp_path, only=(i,)) for i in (2, 0, 1)]
    assert [store.windows.shape for (store,) in parts] == [(2, 96), (6, 96), (4, 128)]
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/teacher.json")}
    assert len(recipes.targets(chosen, pair, tmp_path)) == 3
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/teacher.json")} == made


@pytest.mark.parametrize("rows", [None, torch.arange(3, WORDS, 2)])
def test_the_figures_along_a_text_are_those_of_training(rows):
    """Agreement and alpha of every draft step, computed in another and quicker way."""
    from bdlib.objectives import TeacherTarget
    from bdlib.training import branches_of_blocks

    target = tiny.model(seed=3, dtype=torch.float32, vocab_size=WORDS)
    drafter = models.conditioned_on(target, (0, 1), rows)
    logits = torch.randn(24, WORDS, generator=torch.Generator().manual_seed(1))
    steps = [torch.randn(2, 12, target.config.hidden_size) for _ in range(3)]
    teach = TeacherTarget.from_logits(logits)
    with torch.no_grad():
        (wanted,) = branches_of_blocks(drafter, steps, teach, [[40, 52]], 64, "tv")
        probs = torch.softmax(logits, -1)
        scored = probs if rows is None else probs[:, rows]
        found = list(forced._compared(drafter, steps, scored, probs.argmax(-1)))
    assert [step[0] for step in found] == pytest.approx([wanted.agreement, *wanted.deeper])
    assert found[0][1] == pytest.approx(wanted.alpha, abs=1e-6)
