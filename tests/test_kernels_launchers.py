"""The launchers without a GPU: what they refuse, and that their references are the library's own."""

import subprocess
import sys

import pytest
import torch

from bdlib import attention, objectives, selection
from bdlib import views as training_views
from bdlib.kernels import launching
from bdlib.kernels.acceptance_loss import LOSSES, acceptance_loss
from bdlib.kernels.chunk_scores import chunk_scores
from bdlib.kernels.lazy import interpreted
from bdlib.kernels.multi_view import multi_view
from bdlib.kernels.sparse_decode import sparse_decode
from bdlib.kernels.verify import verify


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


Q, K, V = normal(2, 6, 3, 64, seed=1), normal(2, 2, 40, 64, seed=2), normal(2, 2, 40, 64, seed=3)
CHUNKS = torch.tensor([0, 3]).expand(2, 2, 2)


def test_importing_the_launchers_imports_no_triton():
    names = (
        "acceptance_loss",
        "chunk_scores",
        "multi_view",
        "sparse_decode",
        "verify",
        "compiling",
    )
    code = "import sys\n" + "\n".join(f"import bdlib.kernels.{name}" for name in names)
    code += "\nassert 'triton' not in sys.modules, 'triton was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- the references
def test_verify_is_few_queries():
    assert torch.allclose(verify(Q, K, V, 40), attention.few_queries(Q, K, V, 37))
    assert torch.allclose(verify(Q, K, V, 30), attention.few_queries(Q, K, V, 27))


def test_sequences_have_lengths_of_their_own():
    found = verify(Q, K, V, torch.tensor([40, 17]))
    alone = verify(Q[1:], K[1:, :, :17], V[1:, :, :17], 17)
    assert torch.allclose(found[1:], alone)


def test_sparse_decode_is_attention_over_a_gathered_copy():
    found = sparse_decode(Q, K, V, CHUNKS, 40, window=5)
    kept = torch.tensor([*range(8), *range(24, 32), *range(32, 40)])
    expected = attention.few_queries(Q, K[:, :, kept], V[:, :, kept], len(kept) - 3)
    assert torch.allclose(found, expected)


def test_an_entry_in_a_chunk_and_in_the_window_counts_once():
    chunks = torch.tensor([0, 3, 4, -1]).expand(2, 2, 4)
    expected = sparse_decode(Q, K, V, CHUNKS, 40, window=5)
    assert torch.allclose(sparse_decode(Q, K, V, chunks, 40, window=5), expected)


def test_chunk_scores_are_those_of_the_policies():
    last = K[:, :, -1:]
    expected = selection.ChunkTopK().score(K, 5)
    assert torch.allclose(chunk_scores(last, K)[:, :, 0], expected)
    policy = selection.ChunkTopKRecent()
    mass = torch.softmax(chunk_scores(Q, K), -1).unflatten(1, (2, 3)).sum((2, 3))
    assert torch.allclose(mass, policy.score(K, 5, Q).double(), atol=1e-6)


def multi_view_inputs():
    q, k, v = normal(3, 6, 5, 64, seed=4), normal(3, 2, 5, 64, seed=5), normal(3, 2, 5, 64, seed=6)
    generator = torch.Generator().manual_seed(7)
    chosen = torch.stack([torch.randperm(40, generator=generator)[:9] for _ in range(6)])
    return [q, k, v, K[0], V[0]], chosen.view(3, 2, 9), torch.tensor([9, 4, 0])


@pytest.mark.parametrize("step", [0, 1, 3])
def test_multi_view_is_the_trainers_attention(step):
    (q, _, _, prefix_k, prefix_v), chosen, sizes = multi_view_inputs()
    k, v = (normal(3, 2, 5 * (step + 1), 64, seed=s) for s in (5, 6))
    visible = torch.arange(9) < sizes[:, None]
    old = (training_views._take(prefix, [chosen])[0] for prefix in (prefix_k, prefix_v))
    keys, values = (torch.cat(pair, 2) for pair in zip(old, (k, v), strict=True))
    mask = training_views._block_mask(5, step, q.device)
    expected = training_views._attend(q, keys, values, visible, mask)
    found = multi_view(q, k, v, prefix_k, prefix_v, chosen, sizes)
    # The last view keeps nothing, so its void slots, those before ``step``, see nothing.
    assert torch.allclose(found[:, :, step:], expected[:, :, step:])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("partial", [False, True])
def test_acceptance_loss_is_branch(loss, partial):
    target = objectives.TeacherTarget.from_logits(normal(4, 50, seed=8), 40)
    rows = torch.arange(50) - 10 if partial else None
    rows = rows.clamp_min(-1) if partial else None
    logits = normal(4, 40 if partial else 50, seed=9).requires_grad_()
    found = acceptance_loss(logits, target.ids, target.probs, loss, rows)
    expected = objectives.branch(logits, target, loss, rows)
    assert torch.allclose(found.loss, expected.loss)
    assert torch.allclose(found.kl, expected.kl)
    assert float(found.alpha.mean()) == pytest.approx(expected.alpha)
    assert float(found.agreement.mean()) == expected.agreement
    gradients = (torch.autograd.grad(x.loss, logits)[0] for x in (found, expected))
    assert torch.allclose(*gradients)


def test_auto_on_cpu_is_the_reference():
    q, k, v = (t.float() for t in (Q, K, V))
    assert torch.equal(verify(q, k, v, 40, backend="auto"), verify(q, k, v, 40, backend="torch"))


# ---------------------------------------------------------------- refusals
def half(tensor):
    return tensor.half()


ATTENTION = {
    "q must have 4 dimensions": {"q": Q[0]},
    "k must have 4 dimensions": {"k": K[0]},
    "v must have 4 dimensions": {"v": V[0]},
    "q must be floating point": {"q": Q.long()},
    "q must be a tensor": {"q": 3},
    "q is empty": {"q": Q[:, :, :0]},
    "k is torch.float16, q is torch.float64": {"k": half(K)},
    "v is torch.float16, q is torch.float64": {"v": half(V)},
    "k has 1 sequences, q has 2": {"k": K[:1]},
    "k has heads of 32": {"k": K[..., :32]},
    "q has 5 heads, no multiple of the 2": {"q": Q[:, :5]},
    "v has shape": {"v": V[:, :, :30]},
    "lengths must be in 3..40, got 41": {"lengths": 41},
    "lengths must be in 3..40, got 2": {"lengths": 2},
    "lengths must be in 3..40, got values from 2 to 40": {"lengths": torch.tensor([2, 40])},
    "lengths must have shape [2], got [1]": {"lengths": torch.tensor([40])},
    "lengths must be int32 or int64": {"lengths": torch.tensor([40.0, 40.0])},
    "backend 'cuda' must be one of auto, torch, triton": {"backend": "cuda"},
}
SPARSE = {
    "chunks must be in -1..4, got values from 2 to 5": {"chunks": CHUNKS + 2},
    "chunks must be in -1..4, got values from -2 to 1": {"chunks": CHUNKS - 2},
    "chunks must be int32 or int64": {"chunks": CHUNKS.double()},
    "chunks must have shape": {"chunks": CHUNKS[0]},
    "chunks must be a tensor": {"chunks": [0, 3]},
    "chunk_size 12 must be a power of two from 1 to 64": {"chunk_size": 12},
    "chunk_size 128 must be a power of two": {"chunk_size": 128},
    "window -1 must be 0 or positive": {"window": -1},
}


def refuses(words, launch, arguments):
    with pytest.raises(ValueError) as caught:
        launch(**arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize("words", ATTENTION)
def test_verify_refuses(words):
    refuses(words, verify, {"q": Q, "k": K, "v": V, "lengths": 40} | ATTENTION[words])


@pytest.mark.parametrize("words", ATTENTION | SPARSE)
def test_sparse_decode_refuses(words):
    arguments = {"q": Q, "k": K, "v": V, "chunks": CHUNKS, "lengths": 40}
    refuses(words, sparse_decode, arguments | (ATTENTION | SPARSE)[words])


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("q must have 4 dimensions", {"q": Q[0]}),
        ("k is torch.float16", {"k": half(K)}),
        ("chunk_size 3 must be a power of two", {"chunk_size": 3}),
        ("chunks 6 must be in 0..5", {"chunks": 6}),
        ("backend", {"backend": "gpu"}),
    ],
)
def test_chunk_scores_refuses(words, change):
    refuses(words, chunk_scores, {"q": Q, "k": K} | change)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("prefix_k must have 3 dimensions", {"prefix_k": K}),
        ("prefix_v must have shape [2, 40, 64]", {"prefix_v": V[0, :, :30]}),
        ("prefix_v is torch.float16", {"prefix_v": half(V[0])}),
        (
            "k has 4 tokens, no multiple of the 5 of q",
            {"k": normal(3, 2, 4, 64), "v": normal(3, 2, 4, 64)},
        ),
        ("chosen must be in 0..39, got values from 0 to 40", {"chosen": 40}),
        ("chosen must have shape", {"chosen": None}),
        ("sizes must be in 0..9", {"sizes": torch.tensor([9, 10, 0])}),
        ("sizes must have shape [3]", {"sizes": torch.tensor([9])}),
    ],
)
def test_multi_view_refuses(words, change):
    tensors, chosen, sizes = multi_view_inputs()
    names = ("q", "k", "v", "prefix_k", "prefix_v")
    arguments = dict(zip(names, tensors, strict=True)) | {"chosen": chosen, "sizes": sizes}
    if change.get("chosen", 0) is None:
        change = {"chosen": chosen[0]}
    elif "chosen" in change:
        chosen = chosen.clone()
        chosen[0, 0, :2] = torch.tensor([0, change["chosen"]])
        change = {"chosen": chosen}
    refuses(words, multi_view, arguments | change)


def test_what_pads_chosen_is_not_looked_at():
    tensors, chosen, sizes = multi_view_inputs()
    padded = chosen.clone()
    padded[1, :, 4:] = padded[2] = -1
    expected = multi_view(*tensors, chosen, sizes)
    assert torch.equal(multi_view(*tensors, padded, sizes), expected)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("unknown loss 'mse'; allowed: ce, kl", {"loss": "mse"}),
        ("logits must have 2 dimensions", {"logits": normal(4)}),
        ("probs must have 2 dimensions", {"probs": normal(4)}),
        ("probs of 4 positions, logits of 3", {"logits": normal(3, 50)}),
        ("ids must have shape [4, 8]", {"ids": torch.zeros(4, 7, dtype=torch.int64)}),
        ("ids must be in 0..49, got values from 50", {"ids": torch.full((4, 8), 50)}),
        ("rows must be in -1..49", {"rows": torch.full((60,), 50)}),
        ("rows must be int32 or int64", {"rows": torch.zeros(60)}),
    ],
)
def test_acceptance_loss_refuses(words, change):
    ids = torch.arange(8).expand(4, 8)
    arguments = {"logits": normal(4, 50), "ids": ids, "probs": torch.full((4, 8), 0.1)}
    refuses(words, acceptance_loss, arguments | change)


@pytest.mark.skipif(interpreted(), reason="the interpreter takes CPU tensors")
def test_the_triton_backend_wants_a_gpu():
    q, k, v = (t.float() for t in (Q, K, V))
    ids = torch.arange(8).expand(4, 8)
    tensors, chosen, sizes = multi_view_inputs()
    words = "is on cpu: backend 'triton' needs a GPU"
    if not launching.triton_installed():
        words = "triton is not installed"
    for launch in (
        lambda: verify(q, k, v, 40, backend="triton"),
        lambda: sparse_decode(q, k, v, CHUNKS, 40, backend="triton"),
        lambda: chunk_scores(q, k, backend="triton"),
        lambda: multi_view(*tensors, chosen, sizes, backend="triton"),
        lambda: acceptance_loss(normal(4, 50), ids, torch.full((4, 8), 0.1), backend="triton"),
    ):
        with pytest.raises(ValueError, match=words):
            launch()


def test_what_the_kernel_does_not_take(monkeypatch):
    """As on a machine that interprets: the argument at fault is named, and ``auto`` uses PyTorch."""
    monkeypatch.setattr(launching, "interpreted", lambda: True)
    monkeypatch.setattr(launching, "triton_installed", lambda: True)
    q, k, v = (t.float() for t in (Q, K, V))
    odd = torch.zeros(2, 2, 40, 72)[..., :64]
    transposed = torch.zeros(2, 2, 64, 40).transpose(-1, -2)
    shifted = torch.zeros(2 * 2 * 40 * 64 + 1)[1:].view(2, 2, 40, 64)
    for words, arguments in (
        ("k is torch.float64", (Q, K, V)),
        ("k has heads of 32", (q[..., :32], k[..., :32], v[..., :32])),
        ("v must have the strides of k", (q, k, odd)),
        ("k must have rows of contiguous values", (q, transposed, transposed)),
        ("k must have rows of contiguous values", (q, odd, odd)),
        ("k must begin at an address divisible by 16", (q, shifted, shifted)),
    ):
        with pytest.raises(ValueError, match=words):
            verify(*arguments, 40, backend="triton")
        verify(*arguments, 40, backend="auto")
    with pytest.raises(ValueError, match="splits 65 must be in 1..64"):
        verify(q, k, v, 40, splits=65, backend="triton")
    many = torch.arange(200).expand(4, 200)
    with pytest.raises(ValueError, match="ids has 200 tokens a position; the kernel takes 128"):
        acceptance_loss(normal(4, 300).float(), many, torch.ones(4, 200), backend="triton")
