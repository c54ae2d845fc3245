"""Drafter models: the feature-conditioned one trains as it decodes, and files come back as they were."""

import json
import os
from dataclasses import replace

import pytest
import tiny
import torch

from bdlib import models
from bdlib.cache import KVCache, SparseKVCache
from bdlib.decoding import generate
from bdlib.drafters import ModelDrafter, prefill
from bdlib.selection import make_policy
from bdlib.transformer import Decoder
from bdlib.views import View, drafted_view, full_stream

CONFIG = replace(tiny.CONFIG, vocab_size=53, num_layers=3, max_positions=256)
TOKENS = torch.randint(0, 53, (120,), generator=torch.Generator().manual_seed(5))
ROWS = torch.arange(0, 53, 2)


@pytest.fixture(scope="module")
def target():
    return Decoder.random(CONFIG, seed=6, dtype=torch.float64)


@pytest.fixture(scope="module")
def drafter(target):
    """An untrained feature-conditioned drafter of two layers that scores half the vocabulary."""
    made = models.conditioned_on(target, (0, 2), ROWS, layers=2, seed=3)
    return made.double().requires_grad_(False)


@pytest.mark.parametrize("policy", ["sink_window", "chunk_topk_recent", "chunk_topk"])
@pytest.mark.parametrize("start", [1, 41, 100])
def test_draft_steps_in_training_are_those_of_decoding(target, drafter, policy, start):
    budget, length, steps = 40, 10, 4
    cache = prefill(target, torch.cat((TOKENS, TOKENS[:1])), 121, taps=(0, 2))
    states = drafter.states_of(cache.features(0, 120)[0])
    stream = full_stream(drafter, TOKENS, drafter.inputs(TOKENS[None], states[None]))
    view = View(budget, make_policy(policy))
    found = drafted_view(drafter, TOKENS, stream, view, [start], length, states, steps)

    full = KVCache(drafter.config, max(1, start), dtype=torch.float64, observe=view.policy)
    drafter.hidden(
        TOKENS[None, :start], full, drafter.inputs(TOKENS[None, :start], states[None, :start])
    )
    for slot in range(length - steps + 1):
        # Verified up to the slot, then drafted: the tokens of the text stand in for the drafts.
        sparse = SparseKVCache(drafter.config, budget, view.policy, dtype=torch.float64)
        chosen = SparseKVCache(drafter.config, budget - length, view.policy, dtype=torch.float64)
        chosen.fill(full)
        sparse._keys[:, :, :, : chosen.size] = chosen._keys[:, :, :, : chosen.size]
        sparse._values[:, :, :, : chosen.size] = chosen._values[:, :, :, : chosen.size]
        sparse._selected, sparse._recent = chosen._selected, list(chosen._recent)
        sparse.length = start
        verified = slice(start, start + slot + 1)
        x = drafter.inputs(TOKENS[None, verified], states[None, verified])
        hidden = drafter.hidden(TOKENS[None, verified], sparse, x)[:, -1:]
        for step in range(steps):
            at = slot + step
            assert torch.allclose(found[step][0, at], hidden[0, 0], atol=1e-9), (slot, step)
            token = TOKENS[None, start + at + 1 : start + at + 2] if at + 1 < length else None
            if step + 1 < steps:
                hidden = drafter.hidden(token, sparse, drafter.inputs(token, hidden))


@pytest.mark.parametrize("policy", ["sink_window", "chunk_topk", "chunk_topk_recent", "oracle"])
@pytest.mark.parametrize("refresh", [None, 2])
@pytest.mark.parametrize("prompt", [1, 2, 37, 90])
def test_decoding_with_features_loses_nothing(target, drafter, policy, refresh, prompt):
    who = ModelDrafter(drafter, make_policy(policy), 24, refresh)
    plain = generate(target, TOKENS[:prompt], max_new_tokens=30)
    fast = generate(target, TOKENS[:prompt], who, gamma=5, max_new_tokens=30)
    assert fast.tokens == plain.tokens
    assert who.kv_entries <= 24


def test_a_drafter_that_reads_the_answer_is_always_right(target):
    """The states arrive where they should: a drafter made to copy the target's own logits is accepted."""
    config = CONFIG
    made = models.conditioned_on(target, (2,), None, seed=0).double().requires_grad_(False)
    # Nothing of the layer but its residual path; the state is the target's last stream, scaled.
    with torch.no_grad():
        for layer in made.layers:
            layer.out.weight.zero_()
            layer.down.weight.zero_()
        made.fuse.weight.copy_(torch.eye(32))
        made.mix.weight.zero_()
        made.mix.weight[:, 32:].copy_(torch.eye(32))
    made.head.weight = torch.nn.Parameter(target.head.weight.detach().clone())
    prompt = TOKENS[:40]
    cache = prefill(target, prompt, 60, taps=(2,))
    who = ModelDrafter(made, make_policy("sink_window"), 32)
    who.start(prompt, cache, 60)
    who.select(0)
    proposal = who.propose(int(prompt[-1]), 1, sampling=_greedy(), generator=None)
    # Slot t reads the state of t - 1, whose own prediction is token t: it says the newest token again.
    before = target(prompt[None])[0, -2].argmax()
    assert config.num_layers == 3
    assert int(proposal.tokens[0]) == int(before)


def _greedy():
    from bdlib.sampling import Sampling

    return Sampling()


def test_a_target_cache_without_the_layers_is_refused(target, drafter):
    who = ModelDrafter(drafter, make_policy("sink_window"), 24)
    with pytest.raises(ValueError, match=r"keeps the layers \(\), this drafter reads \(0, 2\)"):
        who.start(TOKENS[:20], prefill(target, TOKENS[:20], 40), 40)
    with pytest.raises(ValueError, match=r"taps \(0, 7\) must be layers in 0\.\.2"):
        KVCache(CONFIG, 8, taps=(0, 7))
    with pytest.raises(ValueError, match="features 0..9 asked of a cache of 0"):
        KVCache(CONFIG, 16, taps=(0,)).features(0, 9)


def test_a_feature_drafter_is_saved_and_loaded(target, drafter, tmp_path):
    models.save_drafter(drafter, tmp_path, "# card\n", {"steps": 3})
    again = models.load_drafter(tmp_path, target, pack=False)
    assert again.taps == (0, 2)
    assert torch.equal(again.vocabulary, ROWS)
    for name, tensor in drafter.state_dict().items():
        assert torch.allclose(again.state_dict()[name], tensor, atol=0.02, rtol=0.01), name
    meta = json.loads((tmp_path / "drafter.json").read_text())
    assert meta["kind"] == "feature"
    assert meta["provenance"] == {"steps": 3}


def test_files_are_as_readable_as_the_umask_says(target, drafter, tmp_path):
    before = os.umask(0o027)
    try:
        models.save_drafter(drafter, tmp_path / "drafter", "# card\n")
        Decoder.random(CONFIG).save(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("*/*")}
    assert len(modes) == 5
    assert set(modes.values()) == {0o640}, modes


@pytest.mark.parametrize("rows", [None, ROWS])
def test_a_standalone_drafter_becomes_a_plain_checkpoint(target, rows, tmp_path):
    from transformers import AutoModelForCausalLM

    cut = models.cut_from(target, (0, 2), rows)
    models.export(cut, tmp_path, target)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        found = theirs(TOKENS[None]).logits[0]
        ours = cut(TOKENS[None])[0].float()
    shown = slice(None) if rows is None else rows
    assert torch.allclose(found[:, shown], ours, atol=1e-4)
    assert found.shape[-1] == 53


def test_a_feature_drafter_cannot_stand_alone(target, drafter, tmp_path):
    with pytest.raises(ValueError, match="cannot stand alone"):
        models.export(drafter, tmp_path, target)


def test_a_revised_head_keeps_trained_rows_and_takes_the_targets():
    target = tiny.model(seed=1, dtype=torch.float32)
    drafter = models.conditioned_on(target, (0, 1), torch.tensor([2, 5, 7, 11]))
    with torch.no_grad():
        drafter.head.weight.mul_(3)
    before = drafter.head.weight.detach().clone()
    models.row_of(drafter)  # which remembers what it made
    models.revise_head(drafter, target, torch.tensor([3, 5, 11]))
    rows = drafter.head.weight.detach()
    assert torch.equal(rows[1:], before[[1, 3]])
    assert torch.equal(rows[0], target.head.dense()[3])
    assert models.row_of(drafter)[[2, 3, 5, 11]].tolist() == [-1, 0, 1, 2]
    assert drafter.head.weight.requires_grad
    whole = models.conditioned_on(target, (0, 1))
    with pytest.raises(ValueError, match="no draft vocabulary to revise"):
        models.revise_head(whole, target, torch.tensor([3]))
