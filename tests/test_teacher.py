"""Teacher targets: equal to the target's own logits, resumable, never mixed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bdlib import teacher
from bdlib.teacher import TeacherSettings, TeacherStore, compute
from bdlib.transformer import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=128,
    rope={"rope_type": "default", "rope_theta": 10_000.0},
)
WINDOWS = torch.randint(0, 61, (4, 70), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def target():
    return Decoder.random(CONFIG, seed=1)


def test_targets_are_the_targets_own(target, tmp_path):
    store = compute(target, WINDOWS, tmp_path / "t", TeacherSettings(top=5, taps=(0, 2)))
    assert len(store) == 4
    logits = target(WINDOWS[2:3])[0]
    expected = torch.softmax(logits, -1).topk(5, -1)
    found = store.target(2)
    assert torch.equal(found.ids, expected.indices)
    assert torch.allclose(found.probs, expected.values, atol=2e-3)
    assert torch.equal(store.tokens(2), WINDOWS[2])
    last = target.hidden(WINDOWS[2:3])[0]
    features = store.features(2).float()
    assert features.shape == (70, 2, 32)
    assert torch.allclose(features[:, 1], last, atol=0.05, rtol=0.01)


def test_an_interrupted_run_continues_where_it_stopped(target, tmp_path):
    seen = []

    def stop_after_two(done, total):
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(target, WINDOWS, tmp_path / "t", progress=stop_after_two)
    assert len(TeacherStore(tmp_path / "t")) == 2
    store = compute(target, WINDOWS, tmp_path / "t", progress=lambda d, n: seen.append(d))
    assert seen == [1, 2, 3, 4]
    whole = compute(target, WINDOWS, tmp_path / "whole")
    for window in range(4):
        assert torch.equal(store.target(window).ids, whole.target(window).ids)
        assert torch.equal(store.target(window).probs, whole.target(window).probs)


@pytest.mark.parametrize("change", ["model", "weights", "windows", "settings"])
def test_other_targets_are_refused(target, tmp_path, change):
    compute(target, WINDOWS[:1], tmp_path / "t")
    model, windows, settings = target, WINDOWS[:1], TeacherSettings()
    if change == "model":
        model = Decoder.random(CONFIG, seed=1, dtype=torch.float64)
    elif change == "weights":
        model = Decoder.random(CONFIG, seed=2)
    elif change == "windows":
        windows = WINDOWS[1:2]
    else:
        settings = TeacherSettings(top=7)
    with pytest.raises(ValueError, match=f"another {change}"):
        compute(model, windows, tmp_path / "t", settings)


def test_refusals(target, tmp_path):
    with pytest.raises(ValueError, match="no teacher targets"):
        TeacherStore(tmp_path / "nothing")
    store = compute(target, WINDOWS[:1], tmp_path / "t")
    with pytest.raises(ValueError, match="without features"):
        store.features(0)
    with pytest.raises(ValueError, match="top 0"):
        TeacherSettings(top=0)
    with pytest.raises(ValueError, match="ascending"):
        TeacherSettings(taps=(2, 1))


def test_a_store_knows_its_tokens(target, tmp_path):
    store = compute(target, WINDOWS[:2], tmp_path / "t", source="toy")
    assert store.meta["windows"] == teacher.digest(WINDOWS[:2].numpy().astype(np.uint16))
    assert store.meta["source"] == "toy"


@pytest.mark.parametrize("last", [1, 30, 70, 500])
def test_only_the_last_positions_are_kept(target, tmp_path, last, monkeypatch):
    monkeypatch.setattr(teacher, "PIECE", 16)
    whole = compute(target, WINDOWS, tmp_path / "whole", TeacherSettings(top=4))
    part = compute(target, WINDOWS, tmp_path / "part", TeacherSettings(top=4, last=last))
    for window in range(4):
        expected, found = whole.target(window), part.target(window)
        assert torch.equal(found.ids, expected.ids[-last:])
        assert torch.equal(found.probs, expected.probs[-last:])


def test_a_damaged_window_is_refused(target, tmp_path):
    compute(target, WINDOWS, tmp_path / "t")
    file = tmp_path / "t" / "ids.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    store = TeacherStore(tmp_path / "t")
    store.target(0)
    with pytest.raises(
        ValueError, match="window 3 of the teacher targets is incomplete or damaged"
    ):
        store.target(3)
    file.write_bytes(content[:100])
    with pytest.raises(ValueError, match="damaged"):
        TeacherStore(tmp_path / "t")


def test_targets_of_another_model_are_refused(target, tmp_path):
    store = compute(target, WINDOWS, tmp_path / "t")
    teacher.check_made_by(store, target, target)
    with pytest.raises(ValueError, match="another model"):
        teacher.check_made_by(store, Decoder.random(CONFIG, seed=2), target)
    other = Decoder.random(replace(CONFIG, vocab_size=60), seed=1)
    with pytest.raises(ValueError, match="vocabulary has 61 tokens, the drafter's 60"):
        teacher.check_made_by(store, target, other)
