"""Reach: a drafter that reads the start and the end of a prompt, in decoding, targets and training."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import torch

from bdlib import forced, measure, models, pairs, recipes
from bdlib.budgets import fixed
from bdlib.decoding import GREEDY, generate
from bdlib.drafters import HEAD, ModelDrafter, positions_read, prefill
from bdlib.sampling import Sampling
from bdlib.selection import make_policy
from bdlib.teacher import TeacherSettings, compute
from bdlib.transformer import Decoder
from bdlib.views import View, full_stream

REACH = 40
WORDS = 61


@pytest.mark.parametrize(
    ("length", "reach", "expected"),
    [
        (50, 0, list(range(50))),
        (50, 50, list(range(50))),
        (50, 20, [*range(HEAD), 46, 47, 48, 49]),
        (50, 17, [*range(HEAD), 49]),
        (18, 17, [*range(HEAD), 17]),
    ],
)
def test_positions_by_hand(length, reach, expected):
    positions, stated = positions_read(length, reach)
    assert positions.tolist() == expected
    # What slot t + 1 reads is the state one token before its own in the text.
    assert (stated[:-1] + 1).tolist() == expected[1:]
    assert stated[-1] == expected[-1]


@pytest.mark.parametrize("name", ["sink_window", "chunk_topk_recent", "snapkv", "full", "oracle"])
@pytest.mark.parametrize("refresh", [None, 2])
def test_it_drafts_as_one_whose_prompt_is_that_short(name, refresh):
    """Over whole runs: the same drafts, whatever was accepted, as if nothing lay between."""
    target, model = tiny.model(sharp=3.0), tiny.model(seed=9, sharp=3.0)
    prompt = tiny.text(91)
    unread = len(prompt) - 1 - REACH
    short = torch.cat((prompt[:HEAD], prompt[HEAD + unread :]))
    budget = None if name == "full" else 20
    far = ModelDrafter(model, make_policy(name), budget, refresh, reach=REACH)
    near = ModelDrafter(model, make_policy(name), budget, refresh, reach=0)
    with torch.inference_mode():
        far.start(prompt, prefill(target, prompt, 140), 140)
        near.start(short, prefill(target, short, 140 - unread), 140 - unread)
        last = int(prompt[-1])
        for rounds, accepted in enumerate((0, 3, 2, 3, 1, 0)):
            found, expected = [], []
            for who, kept in ((far, found), (near, expected)):
                who.select(rounds)
                kept += who.propose(last, 3, GREEDY, None).tokens.tolist()
            assert found == expected
            emitted = [*found[:accepted], (7 * rounds + 1) % 23]
            last = emitted[-1]
            for who in (far, near):
                who.commit(emitted, accepted)
    assert far.cache.length == near.cache.length
    assert far.kv_bytes == near.kv_bytes


@pytest.fixture(scope="module")
def feature():
    """A target and a drafter on its states."""
    target = tiny.model(seed=3, num_layers=3)
    return target, models.conditioned_on(target, (0, 2), seed=1).double().requires_grad_(False)


def test_a_feature_drafter_reads_the_state_of_the_token_before(feature):
    """Against the definition: one pass over what it reads, each slot with its neighbour's state."""
    target, drafter = feature
    prompt = tiny.text(91)
    with torch.inference_mode():
        cache = prefill(target, prompt, 120, taps=(0, 2))
        who = ModelDrafter(drafter, make_policy("full"), reach=REACH, piece=7)
        who.start(prompt, cache, 120)
        who.select(0)
        found = who.propose(int(prompt[-1]), 1, Sampling(1.0), torch.Generator().manual_seed(0))
        positions = positions_read(90, REACH)[0].tolist()
        states = drafter.state(cache.features(0, 90)[0])
        positions.append(90)
        before = [states[p - 1] if p else torch.zeros(32).double() for p in positions]
        x = drafter.inputs(prompt[positions][None], torch.stack(before)[None])
        stream = full_stream(drafter, prompt[positions], x)
        expected = torch.softmax(drafter.logits(stream.hidden[None, -1:])[0], -1)
    assert torch.allclose(found.probs, expected, atol=1e-12)
    whole = ModelDrafter(drafter, make_policy("full"))
    with torch.inference_mode():
        whole.start(prompt, cache, 120)
        whole.select(0)
        other = whole.propose(int(prompt[-1]), 1, Sampling(1.0), torch.Generator().manual_seed(0))
    assert not torch.allclose(other.probs, expected, atol=1e-6)


@pytest.mark.parametrize("reach", [17, 40, 90, 91, 500])
@pytest.mark.parametrize("refresh", [None, 2])
def test_nothing_is_lost(feature, reach, refresh):
    target, drafter = feature
    prompt = tiny.text(91)
    for model in (drafter, tiny.perturbed(target, 0.3)):
        who = ModelDrafter(model, make_policy("sink_window"), 12, refresh, reach=reach)
        fast = generate(target, prompt, who, gamma=4, max_new_tokens=40)
        assert fast.tokens == tiny.greedy(target, prompt, 40)


def test_a_full_cache_is_shared_by_drafters_of_one_reach_alone():
    target, model, prompt = tiny.model(), tiny.model(seed=9), tiny.text(60)
    policy = make_policy("sink_window")
    first, same, other = (ModelDrafter(model, policy, 12, reach=r) for r in (30, 30, 0))
    cache = prefill(target, prompt, 80)
    with torch.inference_mode():
        first.start(prompt, cache, 80)
        same.start(prompt, cache, 80, readers=[first])
        other.start(prompt, cache, 80, readers=[first, same])
    assert same._full is first._full
    assert other._full is not first._full
    assert (first._full.length, other._full.length) == (30, 59)


@pytest.mark.parametrize("reach", [-1, 1, 16, 20.0, True, "20"])
def test_a_reach_that_is_none_is_refused(reach):
    message = f"reach {reach!r} must be 0.* or a whole number above 16"
    with pytest.raises(ValueError, match=message):
        ModelDrafter(tiny.model(), make_policy("sink_window"), 12, reach=reach)
    with pytest.raises(ValueError, match=message):
        measure.MeasureSettings(reach=reach)
    if reach is not True:
        with pytest.raises(ValueError, match=message):
            TeacherSettings(reach=reach)


# ------------------------------------------------------------------ targets


@pytest.mark.parametrize("piece", [7, 64, 1024])
@pytest.mark.parametrize("last", [None, 10, 30])
def test_targets_are_rows_of_those_of_the_whole_window(tmp_path, monkeypatch, piece, last):
    monkeypatch.setattr("bdlib.teacher.PIECE", piece)
    target = tiny.model(num_layers=3, dtype=torch.float32)
    windows = torch.stack([tiny.text(70, seed=i) for i in range(2)])
    whole = compute(target, windows, tmp_path / "whole", TeacherSettings(5, (0, 2)))
    short = compute(target, windows, tmp_path / "short", TeacherSettings(5, (0, 2), last, 30))
    positions, stated = positions_read(70, 30)
    kept = positions[-last:] if last else positions
    for window in range(2):
        assert torch.equal(short.tokens(window), windows[window][positions])
        assert torch.equal(short.target(window).ids, whole.target(window).ids[kept])
        found, expected = short.target(window).probs, whole.target(window).probs[kept]
        assert torch.allclose(found, expected, atol=1e-3)
        near = short.features(window).float(), whole.features(window)[stated].float()
        assert torch.allclose(*near, atol=0.02, rtol=0.02)
    assert short.meta["windows"] == whole.meta["windows"]  # a digest of what the target read


# ------------------------------------------------------------------ training and files


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny.place(tmp_path_factory.mktemp("pair"), WORDS, max_positions=96)


@pytest.fixture(scope="module")
def pair(place):
    return pairs.load_pair(target=place / "target", dtype="float32", pack=False)


def recipe(place, name, **changes):
    found = recipes.get(name)
    settings = replace(
        found.settings, steps=6, warmup=1, block=12, budgets=fixed(40), autocast=False
    )
    usual = {"taps": (0, 2), "rows": 40, "top": 8, "own": (), "pair": str(place / "target")}
    usual |= {"text": str(place / "text.txt"), "start": None, "frozen": ()}
    return replace(found, settings=settings, **{**usual, **changes})


@pytest.fixture(scope="module")
def trained(place, pair, tmp_path_factory):
    """A drafter trained on windows that it reads whole, and one trained on from it that does not."""
    root = tmp_path_factory.mktemp("trained")
    patch = pytest.MonkeyPatch()
    patch.setattr(models, "checkpoint", lambda name: root / "shipped" / name)
    # A pair by folder, as recipes name theirs.
    patch.setattr(
        pairs,
        "load_pair",
        lambda name, load=pairs.load_pair, **kw: load(target=name, **kw),
    )
    chosen = recipe(place, "budgetdraft-feature-novels", windows={96: 6})
    recipes.train(chosen, root / "a", root / "teacher", pair)
    shutil.copytree(root / "a" / "drafter", root / "shipped" / chosen.name)
    long = recipe(
        place,
        "budgetdraft-feature-long",
        windows={192: 4, 64: 3},
        reach=64,
        start=chosen.name,
        frozen=("head.weight",),
    )
    trainer = recipes.train(long, root / "b", root / "teacher", pair)
    shutil.copytree(root / "b" / "drafter", root / "shipped" / "long")
    patch.undo()
    return root / "shipped", trainer


def test_long_windows_are_read_by_a_stretched_target_and_kept_short(trained, pair):
    stores = trained[1].stores
    assert [store.windows.shape for store in stores] == [(4, 64), (3, 64)]
    kinds = [store.meta["model"]["rope_parameters"]["rope_type"] for store in stores]
    assert kinds == ["yarn", "default"]
    # Only the long ones are others than those of a recipe without a reach.
    assert [store.meta["settings"]["reach"] for store in stores] == [64, None]
    assert pair.target.config.max_positions == 96


def test_what_is_frozen_stays_and_is_not_written_again(trained, pair, tmp_path):
    shipped, trainer = trained
    from safetensors.torch import load_file

    base = models.load_drafter(shipped / "budgetdraft-feature-novels", pair.target, torch.float32)
    held = load_file(shipped / "long" / "drafter.safetensors")
    assert not any(name.startswith(("head", "vocabulary")) for name in held)
    meta = json.loads((shipped / "long" / "drafter.json").read_text())
    assert meta["base"]["folder"] == "budgetdraft-feature-novels"
    again = models.load_drafter(shipped / "long", pair.target, torch.float32)
    assert again.reach == meta["reach"] == 64
    assert torch.equal(again.head.dense(), base.head.dense())
    assert torch.equal(again.vocabulary, base.vocabulary)
    assert torch.allclose(again.fuse.dense(), trainer.model.fuse.weight, atol=0.02)
    assert not torch.allclose(again.fuse.dense(), base.fuse.dense(), atol=1e-4)
    assert "| not trained | head.weight |" in (shipped / "long" / "README.md").read_text()
    # Its base must lie beside it, and be the same.
    shutil.copytree(shipped / "long", tmp_path / "long")
    with pytest.raises(ValueError, match="differs from 'budgetdraft-feature-novels', whose folder"):
        models.load_drafter(tmp_path / "long", pair.target)
    shutil.copytree(shipped / "budgetdraft-feature-novels", tmp_path / "budgetdraft-feature-novels")
    models.load_drafter(tmp_path / "long", pair.target)
    made = models.conditioned_on(pair.target, (0, 2), base.vocabulary)
    models.save_drafter(made, tmp_path / "budgetdraft-feature-novels", "# another\n")
    with pytest.raises(ValueError, match="goes with another 'budgetdraft-feature-novels': sha256"):
        models.load_drafter(tmp_path / "long", pair.target)


def test_it_keeps_its_own_positions_beside_a_stretched_target(trained, place):
    shipped, _ = trained
    long = pairs.load_pair(target=place / "target", dtype="float32", context=192)
    drafters = {
        name: models.load_drafter(shipped / name, long.target)
        for name in ("long", "budgetdraft-feature-novels")
    }
    assert drafters["long"].config.rope["rope_type"] == "default"
    assert drafters["budgetdraft-feature-novels"].config.rope == long.target.config.rope
    prompt = tiny.text(150, vocabulary=WORDS)
    who = ModelDrafter(drafters["long"], make_policy("sink_window"), 20)
    assert who.reach == 64
    fast = generate(long.target, prompt, who, gamma=3, max_new_tokens=20)
    assert fast.tokens == generate(long.target, prompt, max_new_tokens=20).tokens
    assert who.cache.length < 64 + 21


def test_figures_along_a_text_are_those_of_its_reach(trained, place):
    shipped, _ = trained
    long = pairs.load_pair(target=place / "target", dtype="float32", context=192)
    drafter = models.load_drafter(shipped / "long", long.target)
    window = tiny.text(150, seed=5, vocabulary=WORDS)
    everything = [View(400, make_policy("full"))]
    (found,) = forced.along(long.target, {"d": drafter}, window, everything, 12, 12, 1)
    read, stated = positions_read(150, 64)
    with torch.inference_mode():
        cache = prefill(long.target, torch.cat((window, window[:1])), 151, taps=(0, 2))
        states = drafter.states_of(cache.features(0, 150)[0][stated])
        x = drafter.inputs(window[read][None], states[None])
        hidden = full_stream(drafter, window[read], x).hidden[-12:]
        said = drafter.vocabulary[drafter.logits(hidden[None])[0].argmax(-1)]
        wanted = long.target(window[None])[0, -12:].argmax(-1)
    assert found["agreement"] == pytest.approx(float((said == wanted).double().mean()))
    with pytest.raises(ValueError, match="positions 60 .* reach of 64"):
        forced.along(long.target, {"d": drafter}, window, everything, 60, 12, 1)


def test_frozen_weights_need_something_to_go_on_from(place):
    with pytest.raises(
        ValueError, match=r"frozen \('head.weight',\) needs a drafter to go on from"
    ):
        recipe(place, "budgetdraft-feature-novels", frozen=("head.weight",))


def test_a_record_says_what_was_read(place, pair):
    settings = measure.MeasureSettings(
        pair=str(place / "target"),
        drafter=str(place / "target"),
        policy="sink_window",
        budget=20,
        context=80,
        new_tokens=8,
        samples=1,
        text=str(place / "text.txt"),
        reach=30,
        dtype="float32",
    )
    assert measure.measure(settings).records[0]["reach"] == 30
    assert measure.measure(replace(settings, reach=None)).records[0]["reach"] == 0
    assert isinstance(pair.target, Decoder)
