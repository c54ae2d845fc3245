"""The library on its kernels: the decoder, the policies and the trainer give what they give in PyTorch.

A GPU takes the kernels by itself; here the interpreter does, told by ``launching.use("triton")``. It has
to be switched on before triton is imported, so this module starts itself again with the variable set.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import tiny
import torch

from bdlib import attention, forced, models, objectives, selection
from bdlib.budgets import BudgetSampler
from bdlib.cache import InPlaceKVCache, KVCache, SparseKVCache, sparse_cache_of
from bdlib.decoding import generate
from bdlib.drafters import ModelDrafter, SelfDrafter, prefill
from bdlib.kernels import launching
from bdlib.kernels.lazy import Kernel, interpreted, triton_installed
from bdlib.objectives import Objective, TeacherTarget
from bdlib.selection import make_policy
from bdlib.training import TrainSettings, window_loss
from bdlib.transformer import Decoder
from bdlib.views import View, full_stream

inside = pytest.mark.skipif(not interpreted(), reason="runs in the interpreter's process")
outside = pytest.mark.skipif(interpreted(), reason="would start itself for ever")
SHAPE = {"hidden_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "vocab_size": 61}
ONE = {"num_layers": 1}  # enough where layers do nothing else than the one before


def model(seed=0, **changes):
    return tiny.model(seed, torch.float32, sharp=3.0, **SHAPE | changes)


def text(length, seed=0):
    return tiny.text(length, seed, SHAPE["vocab_size"])


@outside
@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter():
    tiny.run_in_interpreter(__file__)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels started so far."""
    names, start = set(), Kernel.__getitem__

    def note(self, grid):
        names.add(self.fn.__name__)
        return start(self, grid)

    monkeypatch.setattr(Kernel, "__getitem__", note)
    return names


def both(run):
    """What ``run`` returns in PyTorch and on the kernels."""
    found = []
    for backend in ("torch", "triton"):
        with launching.use(backend):
            found.append(run())
    return found


def close(found, expected, tolerance=2e-5):
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"relative error {error:.1e}"


# ---------------------------------------------------------------- decoding
def rounds(target, prompt, drafter, tokens=16):
    found = generate(target, prompt, drafter, gamma=3, max_new_tokens=tokens)
    return [(r.drafted, r.accepted, r.emitted) for r in found.rounds]


@inside
def test_plain_steps_are_the_kernel_s(launched):
    target, prompt = model(), text(70)

    def run():
        cache = prefill(target, prompt, 100)
        return target(text(5, seed=1)[None], cache), rounds(target, prompt, None, 8)

    (logits, tokens), (found, other) = both(run)
    assert launched == {"verify_kernel"}  # too short to be cut into pieces
    close(found, logits)
    assert other == tokens


@inside
@pytest.mark.parametrize(
    ("policy", "budget"),
    [("chunk_topk", 40), ("chunk_topk_recent", 44), ("sink_window", 24), ("snapkv", 37)],
)
def test_self_drafting_reads_the_full_cache_in_place(launched, policy, budget):
    """Round for round the same drafts, evictions and cut chunks included."""
    target, prompt = model(1, **ONE), text(91, seed=2)
    made = []

    def run():
        drafter = SelfDrafter(target, make_policy(policy), budget, refresh=4)
        found = rounds(target, prompt, drafter)
        made.append(drafter)
        return found

    expected, found = both(run)
    assert found == expected
    assert [type(d.cache) for d in made] == [SparseKVCache, InPlaceKVCache]
    assert made[0].kv_entries == made[1].kv_entries == made[0].cache.peak_entries
    assert made[1].kv_bytes == 0
    assert {"verify_kernel", "sparse_decode_kernel"} <= launched
    assert ("chunk_scores_kernel" in launched) == policy.startswith("chunk")


@inside
@pytest.mark.parametrize("policy", ["chunk_topk", "full"])
def test_entries_in_place_are_the_copied_ones(policy):
    """Single steps far beyond the budget, then several tokens at once, and a rewind."""
    target, prompt, more = model(2), text(61, seed=3), text(25, seed=4)
    budget = 90 if policy == "full" else 27

    def run():
        chosen = make_policy(policy)
        full = prefill(target, prompt, 128, observe=chosen)
        sparse = sparse_cache_of(full, budget, chosen)
        sparse.fill(full)
        logits = [target(token[None, None], sparse)[0] for token in more[:15]]
        sparse.rewind(sparse.length - 2)
        logits.append(target(more[None, 13:18], sparse)[0])
        return torch.cat(logits), [sparse.positions(layer) for layer in range(2)], sparse

    (expected, kept, _), (found, also_kept, sparse) = both(run)
    assert isinstance(sparse, InPlaceKVCache)
    assert all(torch.equal(a, b) for a, b in zip(kept, also_kept, strict=True))
    close(found, expected)


@inside
def test_what_cannot_be_read_in_place_is_copied():
    target = model()
    with launching.use("triton"):
        full = prefill(target, text(30), 40)
        assert type(sparse_cache_of(full, 16, make_policy("oracle"))) is SparseKVCache
        with pytest.raises(ValueError, match="policy 'oracle' chooses anew"):
            InPlaceKVCache(full, 16, make_policy("oracle"))
        sparse = sparse_cache_of(full, 16, make_policy("sink_window"))
        with pytest.raises(ValueError, match="source is another full cache"):
            sparse.fill(prefill(target, text(30), 40))
        sparse.fill(full)
        with pytest.raises(ValueError, match="cache of 40 tokens cannot take 12 more after 29"):
            sparse.reserve(12)


@inside
def test_a_second_model_drafts_on_the_kernels(launched):
    target, prompt = model(1), text(75, seed=5)
    vocabulary = torch.arange(0, 61, 2)
    standalone = models.cut_from(target, (1,), vocabulary).requires_grad_(False)
    feature = models.conditioned_on(target, (0, 1), vocabulary, seed=3).requires_grad_(False)
    for drafter in (standalone, feature):
        policy = make_policy("chunk_topk_recent")
        expected, found = both(
            lambda d=drafter, p=policy: rounds(target, prompt, ModelDrafter(d, p, 32), 10)
        )
        assert found == expected
    assert {"verify_kernel", "chunk_scores_kernel"} <= launched


@inside
def test_chunks_that_the_kernel_cannot_score_are_refused():
    keys = torch.randn(1, 2, 60, 64)
    with launching.use("triton"), pytest.raises(ValueError, match="chunk_size 12 is no power"):
        selection.ChunkTopK(chunk_size=12).select(keys, 24, None, None)


# ---------------------------------------------------------------- training
def trained(kind, mode, loss, autocast=False):
    """Loss and gradients of one training window on each backend."""
    target, tokens = model(3), text(58, seed=6)
    rows = torch.arange(5, 61)
    if kind == "feature":
        drafter = models.conditioned_on(target, (0, 1), rows, seed=4)
        made = models.trainable(drafter)
    else:
        made = models.cut_from(target, (0, 1), rows)
    generator = torch.Generator().manual_seed(7)
    logits = 3 * torch.randn(58, SHAPE["vocab_size"], generator=generator)
    teacher = TeacherTarget.from_logits(logits, 9)
    features = torch.randn(58, 2, SHAPE["hidden_size"], generator=generator)
    settings = TrainSettings(
        objective=Objective(loss, loss, 0.5, beta=0.1 if mode == "continuation" else 0.0),
        budgets=BudgetSampler({19: 0.5, 37: 0.5}),
        policies=("chunk_topk", "chunk_topk_recent"),
        views=2,
        mode=mode,
        block=11,
        share=0.6,
        draft_steps=2,
        seed=1,
    )

    def run():
        made.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            more = {"features": features} if kind == "feature" else {}
            value, full, sparse = window_loss(
                made, tokens, teacher, settings, settings.draw(0), "s", **more
            )
        value.backward()
        gradients = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
        return value.detach(), [full, *sparse], gradients

    return both(run)


@inside
@pytest.mark.parametrize(
    ("kind", "mode", "loss"),
    [
        ("standalone", "all", "ce"),
        ("standalone", "continuation", "lk_lambda"),
        ("feature", "all", "kl"),
    ],
)
def test_a_training_step_is_the_same(launched, kind, mode, loss):
    (value, branches, gradients), (found, others, changed) = trained(kind, mode, loss)
    wanted = {"forward_kernel", "backward_kernel", "dq_kernel", "dkv_kernel", "chunk_scores_kernel"}
    assert wanted <= launched
    close(found, value)
    for one, other in zip(branches, others, strict=True):
        assert other.alpha == pytest.approx(one.alpha, abs=1e-5)
        assert other.agreement == one.agreement
        assert other.deeper == one.deeper
        close(other.kl.detach(), one.kl.detach(), 1e-4)
    assert gradients.keys() == changed.keys()
    assert len(gradients) > 8
    for name, gradient in gradients.items():
        close(changed[name], gradient, 2e-4)


@inside
def test_a_training_step_in_bfloat16():
    (value, _, gradients), (found, _, changed) = trained("standalone", "all", "ce", autocast=True)
    close(found, value, 5e-3)
    for name, gradient in gradients.items():
        close(changed[name], gradient, 8e-2)


@inside
def test_agreement_along_a_text(launched):
    target, window = model(1, **ONE), text(70, seed=8)
    drafters = {"cut": models.cut_from(target, (0,)).requires_grad_(False)}
    views = [View(30, make_policy("chunk_topk_recent")), View(120, make_policy("full"))]
    expected, found = both(lambda: forced.along(target, drafters, window, views, 24, 12, 2))
    assert "forward_kernel" in launched
    for one, other in zip(expected, found, strict=True):
        assert other["agreement"] == one["agreement"]
        assert other["alpha"] == pytest.approx(one["alpha"], abs=1e-5)


# ---------------------------------------------------------------- the switch
@outside
def test_the_cpu_stays_off_the_kernels(monkeypatch):
    """Not even their references are called: what the CPU computes has not changed."""

    def refuse(*_, **__):
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(attention, "verify", refuse)
    monkeypatch.setattr(selection, "chunk_scores", refuse)
    monkeypatch.setattr(objectives, "acceptance_loss", refuse)
    monkeypatch.setattr("bdlib.cache.sparse_decode", refuse)
    monkeypatch.setattr("bdlib.views.multi_view", refuse)
    target, prompt = model(), text(40)
    rounds(target, prompt, SelfDrafter(target, make_policy("chunk_topk"), 16), 6)
    (value, *_), (other, *_) = [branch_of(launching.use(backend)) for backend in ("auto", "torch")]
    assert torch.equal(value, other)


def branch_of(context):
    with context:
        logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
        found = objectives.branch(logits, TeacherTarget.from_logits(logits.flip(0), 3), "kl")
    return found.loss, found.alpha


@outside
def test_a_backend_is_used_inside_its_block_only():
    cpu = torch.device("cpu")
    assert not launching.wanted(cpu)
    with launching.use("triton"):
        assert launching.wanted(cpu)
        with launching.use("torch"):
            assert not launching.wanted(torch.device("cuda"))
        assert launching.wanted(cpu)
    assert not launching.wanted(cpu)
    assert launching.wanted(torch.device("cuda"))
    with (
        pytest.raises(ValueError, match="backend 'cuda' must be one of auto, torch, triton"),
        launching.use("cuda"),
    ):
        pass


@outside
@pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
def test_insisting_names_what_is_in_the_way():
    q, k = torch.randn(1, 2, 1, 64), torch.randn(1, 1, 8, 64)
    with launching.use("triton"):
        with pytest.raises(ValueError, match="k is on cpu: backend 'triton' needs a GPU"):
            attention.few_queries(q, k, k, 7)
        with pytest.raises(ValueError, match="logits is on cpu"):
            branch_of(launching.use("triton"))


@inside
def test_what_the_kernels_do_not_give(launched):
    """Attention over a cache has no backward: PyTorch takes it where a gradient is needed."""
    q, k = torch.randn(1, 2, 1, 64, requires_grad=True), torch.randn(1, 1, 8, 64)
    with launching.use("triton"):
        assert attention.few_queries(q, k, k, 7).requires_grad
        assert not launched
        with torch.no_grad():
            attention.few_queries(q, k, k, 7)
        assert "verify_kernel" in launched
        logits, target = torch.randn(2, 200), TeacherTarget.from_logits(torch.randn(2, 200))
        with pytest.raises(ValueError, match="ids has 200 tokens a position; the kernel takes 128"):
            objectives.branch(logits, target)


@outside
def test_everything_imports_and_decodes_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch, tiny
from bdlib import decoding, drafters, forced, selection, training
target = tiny.model()
policy = selection.make_policy("chunk_topk")
found = decoding.generate(target, tiny.text(30), drafters.SelfDrafter(target, policy, 16))
assert len(found.tokens) == 64
"""
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


# ---------------------------------------------------------------- a draft vocabulary on the device
@outside
def test_a_draft_vocabulary_moves_with_its_drafter():
    drafter = models.cut_from(model(), (0,), torch.arange(3, 40))
    rows = models.row_of(drafter)
    assert rows.tolist()[2:5] == [-1, 0, 1]
    assert models.row_of(drafter) is rows  # made once
    drafter.to("meta")
    assert drafter.vocabulary.device.type == "meta"
    assert models.row_of(drafter).device.type == "meta"
    drafter.vocabulary = torch.arange(10, 47)
    assert models.row_of(drafter).tolist()[9:12] == [-1, 0, 1]
    assert "vocabulary" not in drafter.state_dict()
    assert models.row_of(Decoder.random(tiny.CONFIG)) is None


@outside
def test_a_drafter_that_was_measured_can_be_trained():
    """Tables made in inference mode would not be."""
    target, drafter = model(), models.cut_from(model(), (0,), torch.arange(3, 40))
    views = [View(30, make_policy("chunk_topk"))]
    forced.along(target, {"cut": drafter}, text(60), views, 24, 12, 1)
    assert not models.row_of(drafter).is_inference()
    full_stream(drafter, text(50)).hidden.sum().backward()


@outside
@pytest.mark.parametrize("mode", ["all", "continuation"])
def test_training_stays_on_its_device(monkeypatch, mode):
    """The meta device computes nothing, but refuses to be mixed with the CPU and to wait for a value."""
    target = model(3)
    drafter = models.trainable(models.conditioned_on(target, (0, 1), torch.arange(5, 61))).to(
        "meta"
    )
    tokens = torch.zeros(60, dtype=torch.int64, device="meta")
    teacher = TeacherTarget(tokens[:, None].expand(-1, 9), torch.zeros(60, 9, device="meta"))
    monkeypatch.setattr("bdlib.training.branches", on_meta)
    settings = TrainSettings(
        budgets=BudgetSampler({20: 1.0}),
        policies=("chunk_topk", "chunk_topk_recent", "sink_window", "random"),
        views=4,
        mode=mode,
        block=11,
        draft_steps=2,
    )
    features = torch.zeros(60, 2, SHAPE["hidden_size"], device="meta")
    arguments = (drafter, tokens, teacher, settings, settings.draw(0), "s", features)
    loss, *_ = window_loss(*arguments)
    loss.backward()
    assert loss.device.type == drafter.final_norm.grad.device.type == "meta"


def on_meta(logits, targets, loss, rows):
    """Losses in place of the library's, whose figures are numbers."""
    assert rows.device == logits.device
    result = []
    parts = logits.split([len(target.ids) for target in targets])
    for part, target in zip(parts, targets, strict=True):
        chosen = part.log_softmax(-1).gather(-1, rows[target.ids])
        value = -(target.probs * chosen).mean()
        result.append(objectives.Branch(value, 0.0, 0.0, chosen.sum(-1)))
    return result


@outside
def test_the_cpu_stores_keys_as_the_kernels_read_them():
    assert KVCache(model().config, 8)._keys.is_contiguous()
