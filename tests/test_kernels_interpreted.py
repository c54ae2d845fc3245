"""The Triton kernels in triton's interpreter, against their float64 references.

``triton.jit`` reads TRITON_INTERPRET when it decorates, so the checks run in a process of their own:
this module starts itself again with the variable set.
"""

from importlib.util import find_spec

import pytest
import tiny
import torch

from bdlib import attention
from bdlib.kernels import acceptance_loss as losses
from bdlib.kernels import chunk_scores as scoring
from bdlib.kernels import launching, multi_view, sparse_decode, split, verify
from bdlib.kernels.acceptance_loss import LOSSES, acceptance_loss
from bdlib.kernels.chunk_scores import chunk_scores
from bdlib.kernels.interpreter import count_read_bytes
from bdlib.kernels.lazy import Kernel, interpreted
from bdlib.objectives import TeacherTarget

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
inside = pytest.mark.skipif(not interpreted(), reason="runs in the interpreter's process")

# The largest error allowed, over the largest value expected.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
LENGTHS = (1, 7, 63, 100, 1000)


@pytest.mark.slow
@pytest.mark.skipif(interpreted(), reason="would start itself for ever")
def test_in_the_interpreter():
    tiny.run_in_interpreter(__file__, seconds=900)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    if interpreted():
        torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN
        assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def close(found, expected, dtype, factor=1.0):
    found, expected = found.detach().double(), expected.detach().double()
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= factor * TOLERANCE[dtype], f"relative error {error:.1e}"


def cache(batch, kv_heads, group, n, dim, lengths, dtype, scale=1.0):
    """Queries, keys and values; entries past each sequence's length are NaN."""
    entries = max(lengths) + 24
    q = normal(batch, kv_heads * group, n, dim, seed=1, dtype=dtype, scale=dim**-0.5)
    k, v = (normal(batch, kv_heads, entries, dim, seed=s, dtype=dtype, scale=scale) for s in (2, 3))
    for row, length in enumerate(lengths):
        k[row, :, length:] = v[row, :, length:] = float("nan")
    return q, k, v, torch.tensor(lengths)


def wide(*tensors):
    return [t.double() for t in tensors]


# ---------------------------------------------------------------- chunk_scores
@inside
@dtypes
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("chunk_size", "group", "n", "dim"), [(8, 3, 2, 64), (1, 1, 1, 128)])
def test_chunk_scores(dtype, length, chunk_size, group, n, dim):
    q, k, _, _ = cache(2, 2, group, n, dim, [length, length], dtype)
    chunks = length // chunk_size
    found = chunk_scores(q, k, chunk_size=chunk_size, chunks=chunks, backend="triton")
    assert found.shape == (2, 2 * group, n, chunks)
    if chunks:
        close(found, scoring.reference(*wide(q, k), chunks, chunk_size), dtype)


@inside
@pytest.mark.parametrize("chunk_size", [2, 4, 16, 64])
def test_chunks_of_other_sizes(chunk_size):
    q, k, _, _ = cache(1, 2, 4, 5, 64, [200], torch.float32)
    chunks = 200 // chunk_size
    found = chunk_scores(q, k, chunk_size=chunk_size, chunks=chunks, backend="triton")
    close(found, scoring.reference(*wide(q, k), chunks, chunk_size), torch.float32)


# ---------------------------------------------------------------- verify
@inside
@dtypes
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("group", "n", "dim", "splits"), [(3, 5, 64, None), (8, 4, 128, 3), (1, 1, 64, 2)]
)
def test_verify(dtype, length, group, n, dim, splits):
    n = min(n, length)
    q, k, v, lengths = cache(2, 2, group, n, dim, [length, max(n, length // 2)], dtype)
    found = verify.verify(q, k, v, lengths, splits=splits, backend="triton")
    close(found, verify.reference(*wide(q, k, v), lengths), dtype)


@inside
@dtypes
def test_verify_many_queries(dtype):
    """More rows than one tile holds, and one length for all."""
    q, k, v, lengths = cache(1, 1, 4, 20, 64, [90], dtype)
    found = verify.verify(q, k, v, 90, backend="triton")
    close(found, verify.reference(*wide(q, k, v), lengths), dtype)


@inside
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_verified_row_is_bit_for_bit_that_of_a_plain_step(dtype):
    """The pieces must not depend on the number of queries, or near-ties would fall either way."""
    q, k, v, _ = cache(1, 2, 3, 5, 64, [1500], dtype)
    found = verify.verify(q, k, v, 1500, backend="triton")
    for i in range(5):
        one = verify.verify(q[:, :, i : i + 1], k, v, 1496 + i, backend="triton")
        assert torch.equal(one[:, :, 0], found[:, :, i])


@inside
@pytest.mark.parametrize("start", [1021, 2046, 2112, 2494])
def test_verifying_sums_as_single_steps_do_wherever_it_stands(start):
    """Across an edge of the pieces, and where another 64 entries of the cache come into reach."""
    q, k, v, _ = cache(1, 1, 3, 5, 64, [start + 5], torch.bfloat16)
    k, v = k.nan_to_num(), v.nan_to_num()  # a cache's slack is zeros
    with launching.use("triton"):
        found = attention.few_queries(q, k, v, start)
        for i in range(5):
            reach = -(-(start + i + 1) // 64) * 64
            seen = [t[:, :, : min(reach, t.shape[2])] for t in (k, v)]
            one = attention.few_queries(q[:, :, i : i + 1], *seen, start + i)
            assert torch.equal(one[:, :, 0], found[:, :, i])


# ---------------------------------------------------------------- sparse_decode
def some_chunks(batch, kv_heads, length, chunk_size, share, seed=4):
    """Random distinct chunks, the last, partial one possibly among them."""
    count = -(-length // chunk_size)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(count, generator=generator) for _ in range(batch * kv_heads)]
    return torch.stack(rows).view(batch, kv_heads, count)[..., : max(1, int(share * count))]


@inside
@dtypes
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("group", "n", "dim", "splits", "window", "chunk_size"),
    [(3, 5, 64, None, 13, 8), (4, 1, 128, 3, 0, 8), (8, 3, 64, 2, 5, 1)],
)
def test_sparse_decode(dtype, length, group, n, dim, splits, window, chunk_size):
    n = min(n, length)
    q, k, v, lengths = cache(2, 2, group, n, dim, [length, max(n, length // 2)], dtype)
    chunks = some_chunks(2, 2, length, chunk_size, 0.3)
    options = {"window": window, "chunk_size": chunk_size}
    found = sparse_decode.sparse_decode(
        q, k, v, chunks, lengths, splits=splits, backend="triton", **options
    )
    close(found, sparse_decode.reference(*wide(q, k, v), chunks, lengths, **options), dtype)


@inside
@pytest.mark.parametrize("chunk_size", [4, 16])
def test_a_budget_above_the_length_is_full_attention(chunk_size):
    q, k, v, lengths = cache(2, 2, 3, 4, 64, [100, 61], torch.float32)
    chunks = some_chunks(2, 2, 100, chunk_size, 1.0)
    chunks = torch.nn.functional.pad(chunks, (0, 7), value=-1)
    found = sparse_decode.sparse_decode(
        q, k, v, chunks, lengths, chunk_size=chunk_size, backend="triton"
    )
    close(found, verify.reference(*wide(q, k, v), lengths), torch.float32)


@inside
def test_no_chunks_is_a_window():
    q, k, v, lengths = cache(1, 2, 3, 4, 64, [100], torch.float32)
    none = torch.empty(1, 2, 0, dtype=torch.int64)
    found = sparse_decode.sparse_decode(q, k, v, none, lengths, window=30, backend="triton")
    recent = (t[:, :, 66:100] for t in (k, v))
    close(found, verify.reference(*wide(q, *recent), torch.tensor([34])), torch.float32)


# ---------------------------------------------------------------- values of 1e4, bytes, addresses
@inside
@dtypes
def test_values_of_ten_thousand(dtype):
    q, k, v, lengths = cache(1, 2, 3, 5, 64, [100], dtype, scale=1e4)
    q = (q.float() * 1e4).to(dtype)
    chunks = some_chunks(1, 2, 100, 8, 0.5)
    close(
        chunk_scores(q, k, chunks=12, backend="triton"),
        scoring.reference(*wide(q, k), 12, 8),
        dtype,
    )
    found = verify.verify(q, k, v, lengths, splits=2, backend="triton")
    close(found, verify.reference(*wide(q, k, v), lengths), dtype)
    found = sparse_decode.sparse_decode(q, k, v, chunks, lengths, splits=2, backend="triton")
    close(found, sparse_decode.reference(*wide(q, k, v), chunks, lengths, 0, 8), dtype)


def least_bytes(tensors, entries):
    """Bytes of the queries and of so many keys, or keys and values, of every head."""
    q, *caches = tensors
    each = sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in caches)
    return q.numel() * q.element_size() + each * entries


@inside
@dtypes
@pytest.mark.parametrize("length", [1000, 4096])
def test_chunk_scores_reads_the_keys_once(dtype, length):
    q, k, _, _ = cache(1, 2, 3, 1, 64, [length], dtype)
    with count_read_bytes() as read:
        chunk_scores(q, k, chunks=length // 8, backend="triton")
    least = least_bytes((q, k), length // 8 * 8)
    assert least <= sum(read) <= 1.05 * least


@inside
@dtypes
@pytest.mark.parametrize(("length", "budget"), [(1000, 256), (4096, 512), (4096, 2048)])
@pytest.mark.parametrize("n", [1, 5])
def test_sparse_decode_reads_the_selected_entries_once(dtype, length, budget, n):
    q, k, v, _ = cache(1, 2, 3, n, 64, [length], dtype)
    window = budget // 4
    chunks = (budget - window) // 8
    selected = some_chunks(1, 2, length - window - 8, 8, 1.0)[..., :chunks]
    options = {"window": window - n, "backend": "triton"}
    with count_read_bytes() as read:
        sparse_decode.sparse_decode(q, k, v, selected, length, **options)
    least = least_bytes((q, k, v), budget) + 4 * selected.numel()
    assert least <= sum(read) <= 1.05 * least


@inside
def test_splitting_costs_what_is_said():
    """The limit of 1.05 is one of ``choose_splits``: more pieces read more."""
    q, k, v, _ = cache(1, 2, 3, 5, 64, [1000], torch.float16)
    with count_read_bytes() as read:
        verify.verify(q, k, v, 1000, splits=16, backend="triton")
    assert sum(read) > 1.2 * least_bytes((q, k, v), 1000)
    assert split.choose_splits(None, k, 15, 16_384, 2, 64) > 1
    assert split.choose_splits(None, k, 15, 512, 2, 64) == 1


@inside
@pytest.mark.parametrize("name", ["verify", "sparse_decode", "chunk_scores"])
def test_addresses_need_more_than_32_bits(name, monkeypatch):
    """Strides of a cache of many gigabytes; what is not there is not read, but asked for."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    module = {"verify": verify, "sparse_decode": sparse_decode, "chunk_scores": scoring}[name]
    q, k, v, _ = cache(2, 2, 1, 1, 64, [64, 64], torch.float32)
    steps = (2**40, 2**36, 2**31)
    monkeypatch.setattr(module, "strides", lambda tensor: steps)
    plain, furthest = InterpreterBuilder.create_masked_load, []

    def load(self, pointers, mask, other, *rest):
        offsets = pointers.data.astype(object) - k.data_ptr()
        if pointers.data.ndim == 2 and offsets.max() >= 2**31:
            furthest.append(int(offsets[mask.data.repeat(1, 0)].max()))
            zeros = TensorHandle(mask.data & False, mask.dtype)
            return plain(self, pointers, zeros, other, *rest)
        return plain(self, pointers, mask, other, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
    if name == "verify":
        verify.verify(q, k, v, 64, splits=1, backend="triton")
    elif name == "sparse_decode":
        chunks = torch.arange(7).expand(2, 2, 7)
        sparse_decode.sparse_decode(q, k, v, chunks, 64, window=7, splits=1, backend="triton")
    else:
        chunk_scores(q, k, chunks=8, backend="triton")
    gap = max(0, v.data_ptr() - k.data_ptr()) if name != "chunk_scores" else 0
    assert max(furthest) == 4 * (steps[0] + steps[1] + 63 * steps[2] + 63) + gap


# ---------------------------------------------------------------- multi_view
def views(kv_heads, group, n, dim, entries, width, dtype, scale=1.0, steps=1):
    """Three views: one full, one of half the entries, one of none; what pads is NaN in the prefix."""
    tensors = [normal(3, kv_heads * group, n, dim, seed=5, scale=dim**-0.5 * scale)]
    tensors += [normal(3, kv_heads, steps * n, dim, seed=s, scale=scale) for s in (6, 7)]
    tensors += [normal(kv_heads, entries, dim, seed=s, scale=scale) for s in (8, 9)]
    generator = torch.Generator().manual_seed(10)
    rows = [torch.randperm(entries - 1, generator=generator)[:width] for _ in range(3 * kv_heads)]
    chosen = torch.stack(rows).view(3, kv_heads, width)
    sizes = torch.tensor([width, width // 2, 0])
    chosen[1, :, width // 2 :] = chosen[2] = entries - 1
    for prefix in tensors[3:]:
        prefix[:, -1] = float("nan")
    return [t.to(dtype).requires_grad_() for t in tensors], chosen, sizes


@inside
@dtypes
@pytest.mark.parametrize(
    ("group", "n", "dim", "entries", "width"),
    [(3, 20, 64, 101, 50), (4, 7, 128, 64, 63), (8, 10, 64, 1001, 100), (1, 1, 64, 8, 7)],
)
def test_multi_view(dtype, group, n, dim, entries, width):
    inputs, chosen, sizes = views(2, group, n, dim, entries, width, dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = multi_view.reference(*exact, chosen, sizes)
    found = multi_view.multi_view(*inputs, chosen, sizes, backend="triton")
    close(found, expected, dtype)
    upstream = normal(*expected.shape, seed=11, dtype=dtype)
    gradients = torch.autograd.grad(expected, exact, upstream.double())
    for got, wanted in zip(torch.autograd.grad(found, inputs, upstream), gradients, strict=True):
        close(got, wanted, dtype)


@inside
def test_multi_view_of_later_draft_steps():
    inputs, chosen, sizes = views(2, 3, 9, 64, 40, 20, torch.float32, steps=3)
    sizes[2] = 1  # a slot before the step sees no own entry
    chosen[2] = 0
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = multi_view.reference(*exact, chosen, sizes)
    found = multi_view.multi_view(*inputs, chosen, sizes, backend="triton")
    close(found, expected, torch.float32)
    gradients = torch.autograd.grad(expected.square().sum(), exact)
    found = torch.autograd.grad(found.square().sum(), inputs)
    for got, wanted in zip(found, gradients, strict=True):
        close(got, wanted, torch.float32)


@inside
def test_multi_view_with_values_of_ten_thousand():
    """Scores of 4e4 round by 4e-3, and so do the weights that the backward pass computes again."""
    inputs, chosen, sizes = views(2, 3, 9, 64, 40, 20, torch.float32)
    with torch.no_grad():
        for tensor in inputs[1:]:
            tensor *= 1e4
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = multi_view.reference(*exact, chosen, sizes)
    found = multi_view.multi_view(*inputs, chosen, sizes, backend="triton")
    close(found, expected, torch.float32, factor=100)
    wanted = torch.autograd.grad(expected.sum(), exact)
    got = torch.autograd.grad(found.sum(), inputs)
    # Gradients of q and k are differences of terms do . v, far larger than what remains of them.
    terms = float(exact[2].detach().abs().sum(-1).max())
    sizes = [terms * float(exact[1].detach().abs().max()), terms, 1.0, terms, 1.0]
    for one, other, size in zip(got, wanted, sizes, strict=True):
        assert (one.double() - other).abs().max() <= 1e-2 * size


@inside
def test_recomputed_weights_never_overflow():
    """Scores of 1e9 round by tens: weights are wrong then, whatever one does, but at most 1."""
    inputs, chosen, sizes = views(2, 3, 9, 64, 40, 20, torch.float32, scale=1e4)
    found = multi_view.multi_view(*inputs, chosen, sizes, backend="triton")
    for gradient in torch.autograd.grad(found.sum(), inputs)[2::2]:
        assert gradient.nan_to_num(nan=1e9).abs().max() <= 9 * 3 * 3


@inside
def test_a_prefix_without_gradient():
    inputs, chosen, sizes = views(2, 3, 9, 64, 40, 20, torch.float32)
    prefix = [t.detach() for t in inputs[3:]]
    found = multi_view.multi_view(*inputs[:3], *prefix, chosen, sizes, backend="triton")
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = multi_view.reference(*exact, chosen, sizes)
    gradients = torch.autograd.grad(expected.square().sum(), exact[:3])
    for got, wanted in zip(
        torch.autograd.grad(found.square().sum(), inputs[:3]), gradients, strict=True
    ):
        close(got, wanted, torch.float32)


# ---------------------------------------------------------------- acceptance_loss
def teacher(positions, vocabulary, k, rows, seed=12):
    """A target, and the row of each token in a drafter that scores ``rows`` of the vocabulary."""
    target = TeacherTarget.from_logits(normal(positions, vocabulary, seed=seed, scale=3.0), k)
    favourites = target.ids[:, 0].unique()  # scored, so that no position is without overlap
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    order = torch.cat((favourites, order[~torch.isin(order, favourites)]))[:rows]
    place = torch.full((vocabulary,), -1)
    place[order] = torch.arange(rows)
    return target, place


@inside
@dtypes
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("rows", "k"), [(7, 5), (63, 20), (100, 100), (1000, 32), (5008, 40)])
def test_acceptance_loss(dtype, loss, rows, k):
    target, place = teacher(3, rows + 20, k, rows)
    x = normal(3, rows, seed=13, dtype=dtype, scale=3.0).requires_grad_()
    exact = x.detach().double().requires_grad_()
    found = acceptance_loss(x, target.ids, target.probs, loss, place, backend="triton")
    expected = acceptance_loss(exact, target.ids, target.probs, loss, place, backend="torch")
    for got, wanted in zip(found, expected, strict=True):
        assert torch.allclose(got.double(), wanted.double(), rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad(found.loss + 0.3 * found.kl.mean(), x)
    (wanted,) = torch.autograd.grad(expected.loss + 0.3 * expected.kl.mean(), exact)
    close(got, wanted, dtype)


@inside
@pytest.mark.parametrize("loss", LOSSES)
def test_acceptance_loss_with_logits_of_ten_thousand(loss):
    """Rows of a padded buffer whose padding is NaN; one logit towers over the others."""
    target, place = teacher(3, 120, 20, 100)
    x = normal(3, 112, seed=13, scale=1e4)
    x[:, 100:] = float("nan")
    x[torch.arange(3), place[target.ids[:, 0]]] = 1e5
    x = x[:, :100].requires_grad_()
    exact = x.detach().double().requires_grad_()
    found = acceptance_loss(x, target.ids, target.probs, loss, place, backend="triton")
    expected = acceptance_loss(exact, target.ids, target.probs, loss, place, backend="torch")
    assert torch.allclose(found.loss.double(), expected.loss, rtol=1e-5)
    (got,) = torch.autograd.grad(found.loss, x)
    (wanted,) = torch.autograd.grad(expected.loss, exact)
    assert torch.allclose(got.double(), wanted, atol=1e-5)


@inside
def test_agreement_takes_the_first_of_equals():
    x = torch.zeros(2, 3000)
    x[:, [17, 2500]] = 4.0
    ids = torch.tensor([[17], [2500]])
    found = acceptance_loss(x, ids, torch.full((2, 1), 0.5), backend="triton")
    assert found.agreement.tolist() == [1.0, 0.0]


# ---------------------------------------------------------------- what was launched
@inside
def test_only_known_configurations_are_launched(monkeypatch):
    """The table of compiled kernels lists configurations; a launch outside it would not be proven."""
    launched = []

    def getitem(self, grid):
        def start(*arguments, **options):
            options.pop("PRECISION", None)
            first = next(a for a in arguments if isinstance(a, torch.Tensor))
            launched.append((self, first.dtype, tuple(sorted(options.items()))))
            return self.jitted[grid](*arguments, PRECISION="tf32x3", **options)

        return start

    monkeypatch.setattr(Kernel, "__getitem__", getitem)
    for dtype in launching.DTYPES:
        for dim in launching.HEAD_DIMS:
            for n in (1, 20):
                q, k, v, lengths = cache(1, 1, 1, n, dim, [40], dtype)
                verify.verify(q, k, v, lengths, splits=2, backend="triton")
                for size in (1, 8):
                    chunks = some_chunks(1, 1, 40, size, 0.2)
                    sparse_decode.sparse_decode(
                        q, k, v, chunks, lengths, chunk_size=size, splits=1, backend="triton"
                    )
                    chunk_scores(q, k, chunks=5, chunk_size=size, backend="triton")
            inputs, chosen, sizes = views(1, 1, 2, dim, 6, 4, dtype)
            multi_view.multi_view(*inputs, chosen, sizes, backend="triton").sum().backward()
        for loss in LOSSES:
            for rows in (96, 97):
                target, place = teacher(1, rows, 3, rows)
                x = normal(1, rows, seed=1, dtype=dtype).requires_grad_()
                options = {"loss": loss, "rows": place, "backend": "triton"}
                acceptance_loss(x, target.ids, target.probs, **options).loss.backward()
    modules = (scoring, verify, sparse_decode, split, multi_view, losses)
    known = {
        (c.kernel, c.dtype, tuple(sorted(c.tile.items())))
        for module in modules
        for c in module.configurations()
    }
    merges = {item for item in known if item[0] is split.merge_kernel}
    # The first pointer of the merge is always float32; its dtype is that of the output.
    seen = {item for item in launched if item[0] is not split.merge_kernel}
    assert seen == known - merges
