"""One command for a GPU: is every kernel right, how fast is it, and what does the method gain here?

``python -m bdlib bench gpu --out DIR`` runs five sections on the GPU that it finds and writes
``report.json`` and ``report.html``, anew after each section, so that a run that dies leaves what it had:

* correctness: every kernel against its reference in float64, on odd lengths, NaN beyond the end;
* bandwidth: what this GPU's memory delivers, which everything else is compared with;
* kernels: each beside what PyTorch offers for the same thing (SDPA, FlexAttention, gather + SDPA);
* decoding: plain, self-drafting and the shipped drafters, and the same without the kernels;
* training: a few steps of the trainer, with and without the kernels.

Contract: a figure is measured or it is not there. What fails is a row that says so, and a failure of ours
makes the exit status 1. With ``--dry`` the same program runs in triton's interpreter on tiny sizes,
to show that it reaches its end; every figure then carries :data:`MARK`.
"""

from __future__ import annotations

import os
import random
import statistics
import string
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlib import assets, corpora, measure, models, objectives, recipes, teacher, views
from bdlib.budgets import fixed
from bdlib.corpora import Document
from bdlib.drafters import Drafter, ModelDrafter, SelfDrafter
from bdlib.kernels import acceptance_loss as losses
from bdlib.kernels import chunk_scores as scoring
from bdlib.kernels import launching, multi_view, sparse_decode, verify
from bdlib.kernels.lazy import interpreted, triton_installed
from bdlib.objectives import TeacherTarget
from bdlib.pairs import Pair, load_pair
from bdlib.selection import ChunkTopK, make_policy
from bdlib.training import Trainer, TrainSettings
from bdlib.transformer import Decoder, DecoderConfig

SCHEMA = 1
MARK = "dry run: no figure of a GPU"
SHIPPED = ("budgetdraft", "budgetdraft-feature-gpu")
TOLERANCE = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error allowed, over the largest value expected; twice that for gradients."""
CHUNK, WINDOW = 8, 16  # tokens of a chunk, and of the recent window in kernel benchmarks


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes
    ----------
    shapes
        Attention shapes: name, KV heads, query heads of each, head size.
    lengths
        Entries in correctness checks.
    contexts
        Tokens, for kernel benchmarks and decoding.
    block, views
        Tokens of a replayed block, and blocks at once, for training attention.
    positions, rows
        Positions and vocabulary of the loss.
    kinds
        Drafters that are trained for a few steps.
    """

    device: str = "cuda"
    shapes: tuple[tuple[str, int, int, int], ...] = (
        ("SmolLM2-135M", 3, 3, 64),
        ("Llama-3-8B", 8, 4, 128),
        ("one head each", 4, 1, 128),
        ("eight share one", 1, 8, 64),
    )
    timed_shapes: int = 2
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE)
    lengths: tuple[int, ...] = (1, 7, 63, 100, 1000)
    contexts: tuple[int, ...] = (4096, 8192, 16_384)
    budget: int = 512
    block: int = 64
    views: int = 8
    positions: int = 2048
    rows: int = 49_152
    repeats: int = 50
    bandwidth_bytes: int = 2**31
    samples: int = 4
    new_tokens: int = 128
    gamma: int = 4
    kinds: tuple[str, ...] = ("standalone", "feature")
    steps: int = 30
    window: int = 2048
    windows: int = 8


QUICK = Sizes(
    shapes=Sizes.shapes[:2],
    timed_shapes=1,
    lengths=(1, 63, 1000),
    contexts=(4096, 16_384),
    repeats=20,
    samples=2,
    new_tokens=64,
    steps=15,
)
"""For a GPU lent for minutes: fewer shapes, lengths and repeats of the same things."""
DRY = Sizes(
    device="cpu",
    shapes=(("toy", 2, 2, 64),),
    timed_shapes=1,
    dtypes=(torch.float32, torch.bfloat16),
    lengths=(1, 63),
    contexts=(72,),
    budget=24,
    block=8,
    views=2,
    positions=4,
    rows=512,
    repeats=2,
    bandwidth_bytes=2**20,
    samples=2,
    new_tokens=3,
    gamma=2,
    kinds=("standalone",),
    steps=2,
    window=32,
    windows=2,
)


# ---------------------------------------------------------------- a run
def run(
    out: str | os.PathLike[str],
    dry: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Run every section and write the report into the folder ``out``; returns it.

    Parameters
    ----------
    dry
        Tiny sizes in triton's interpreter (TRITON_INTERPRET=1 must be set before Python starts).
    quick
        The sizes of :data:`QUICK`.
    progress
        Called with a few words before each section.

    Raises
    ------
    ValueError
        If there is no GPU (and ``dry`` is not asked for), no triton, or no way to write to ``out``.
    """
    sizes = DRY if dry else QUICK if quick else Sizes()
    _check_machine(dry)
    out = Path(out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    measure.check_output(out / "report.json")
    say = progress or (lambda words: None)
    where = measure.provenance()
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "bench": "gpu",
        "dry": dry,
        "quick": quick,
        "mark": MARK if dry else None,
        "device": _device_facts(sizes),
        "seed": seed,
        **where,
        "sections": [],
        "faults": [],
    }
    stamp = {
        "seed": seed,
        "machine": where["machine"]["cpu"] if dry else where["machine"]["gpu"],
        "commit": where["commit"],
        "mark": report["mark"],
    }
    bandwidth: list[float] = []
    with launching.use("triton" if dry else "auto"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of FlexAttention, that it was not compiled
        for name, words, section in (
            ("correctness", CORRECTNESS, lambda: correctness(sizes, seed)),
            ("bandwidth", BANDWIDTH, lambda: read_bandwidth(sizes, bandwidth)),
            ("kernels", KERNELS, lambda: kernels(sizes, seed, bandwidth)),
            ("decoding", DECODING, lambda: decoding(sizes, seed)),
            ("training", TRAINING, lambda: training(sizes, seed)),
        ):
            say(name)
            found: dict[str, Any] = {"name": name, "words": words, "figures": []}
            report["sections"].append(found)
            try:
                for row in section():
                    found["figures"].append(row | stamp)
            except Exception as error:  # the other sections must still run, whatever it was
                found["figures"].append(_failed(name, error, ours=True) | stamp)
            report["faults"] += [
                f"{name}: {_label(row)}: {row['fault']}" for row in found["figures"] if row["fault"]
            ]
            write(out, report)
    return report


def _check_machine(dry: bool) -> None:
    if not triton_installed():
        raise ValueError("triton is not installed; it has wheels for Linux only")
    if dry and not interpreted():
        raise ValueError("a dry run needs TRITON_INTERPRET=1, set before Python starts")
    if not dry and not torch.cuda.is_available():
        raise ValueError(
            "no GPU is usable here; --dry runs the same program on the CPU, on tiny sizes"
        )
    if not dry and interpreted():
        raise ValueError("TRITON_INTERPRET is set: start without it to measure a GPU")


def _device_facts(sizes: Sizes) -> dict[str, Any]:
    import triton

    facts: dict[str, Any] = {"type": sizes.device, "triton": triton.__version__}
    if sizes.device == "cuda":
        found = torch.cuda.get_device_properties(0)
        facts |= {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "runtime": torch.version.cuda or torch.version.hip,
        }
    return facts


def figure(
    what: str,
    how: str,
    shape: str,
    dtype: torch.dtype | str,
    unit: str,
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    n: int = 1,
    more: Mapping[str, Any] | None = None,
    fault: str | None = None,
) -> dict[str, Any]:
    """One row of the report; ``fault`` says what is wrong with something of ours."""
    dtype = str(dtype).removeprefix("torch.")
    row = {"what": what, "how": how, "shape": shape, "dtype": dtype, "unit": unit}
    return row | {
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "more": dict(more or {}),
        "fault": fault,
    }


def _failed(what: str, error: Exception, how: str = "", shape: str = "", dtype="", ours=False):
    words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    row = figure(what, how, shape, dtype, "", None, n=0, more={} if ours else {"not run": words})
    return row | ({"fault": words} if ours else {})


def _label(row: Mapping[str, Any]) -> str:
    return ", ".join(str(row[key]) for key in ("what", "how", "shape", "dtype") if row[key])


# ---------------------------------------------------------------- correctness
CORRECTNESS = (
    "Largest error of each kernel against its reference in float64, over the largest value expected. "
    "n counts cases (lengths, losses); the interval is the smallest and the largest error among them."
)


def _normal(*shape: int, seed: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype)


def _cache(shape, n: int, lengths: Sequence[int], dtype, device, seed) -> tuple[Tensor, ...]:
    """Scaled queries, keys, values and lengths of sequences; what lies beyond a length is NaN."""
    _, kv_heads, group, dim = shape
    room, batch = max(lengths) + 24, len(lengths)
    place = {"dtype": dtype, "device": device}
    q = _normal(batch, kv_heads * group, n, dim, seed=seed, scale=dim**-0.5, **place)
    k, v = (_normal(batch, kv_heads, room, dim, seed=seed + i, **place) for i in (1, 2))
    for row, length in enumerate(lengths):
        k[row, :, length:] = v[row, :, length:] = float("nan")
    return q, k, v, torch.tensor(lengths, device=device)


def _chunks(kv_heads: int, batch: int, length: int, count: int, device, seed) -> Tensor:
    """Distinct random chunk numbers ``[B, H_kv, count]`` of a sequence."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randperm(length // CHUNK, generator=generator)[:count]
        for _ in range(batch * kv_heads)
    ]
    return torch.stack(rows).view(batch, kv_heads, -1).to(device)


def _cases(shape, dtype, length: int, device: str, seed: int) -> Iterator[tuple[str, list, list]]:
    """Of each attention kernel what it found and what was expected."""
    n = min(5, length)
    q, k, v, lengths = _cache(shape, n, [length, max(n, length // 2)], dtype, device, seed)
    wide = [t.double() for t in (q, k, v)]
    whole = int(lengths.min()) // CHUNK
    if whole:
        found = scoring.chunk_scores(q, k, chunks=whole, backend="triton")
        yield "chunk_scores", [found], [scoring.reference(*wide[:2], whole, CHUNK)]
    found = verify.verify(q, k, v, lengths, backend="triton")
    yield "verify", [found], [verify.reference(*wide, lengths)]
    chunks = _chunks(shape[1], 2, max(CHUNK, length), max(1, length // 2 // CHUNK), device, seed)
    found = sparse_decode.sparse_decode(q, k, v, chunks, lengths, window=3, backend="triton")
    yield "sparse_decode", [found], [sparse_decode.reference(*wide, chunks, lengths, 3, CHUNK)]
    for step in (0, 1):
        *inputs, chosen, kept = _views_of(shape, length, 9, 3, step, 40, dtype, device, seed)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        out = multi_view.multi_view(*inputs, chosen, kept, backend="triton")
        right = multi_view.reference(*exact, chosen, kept)
        yield "multi_view", [out], [right]
        got = torch.autograd.grad(out.square().sum(), inputs)
        yield "multi_view, gradients", got, torch.autograd.grad(right.square().sum(), exact)


def _views_of(shape, length, n, count, step, width, dtype, device, seed) -> list[Tensor]:
    """Blocks of ``n`` tokens, a prefix, and what each block keeps of it: arguments of multi_view."""
    _, kv_heads, group, dim = shape
    place, width = {"dtype": dtype, "device": device}, min(width, length)
    q = _normal(count, kv_heads * group, n, dim, seed=seed, scale=dim**-0.5, **place)
    own = ((step + 1) * n, dim)
    k, v = (_normal(count, kv_heads, *own, seed=seed + i, **place) for i in (1, 2))
    old = [_normal(kv_heads, length, dim, seed=seed + i, **place) for i in (3, 4)]
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(length, generator=generator)[:width] for _ in range(count * kv_heads)]
    chosen = torch.stack(rows).view(count, kv_heads, width).to(device)
    kept = [max(1, width * (i + 1) // count) for i in range(count)]
    inputs = [t.requires_grad_() for t in (q, k, v, *old)]
    return [*inputs, chosen, torch.tensor(kept, device=device)]


def _loss_case(loss: str, dtype, device: str, seed: int) -> tuple[list, list, list, list]:
    """Figures and gradient of the loss, found and expected; a third of the vocabulary has no row."""
    size, total = 1000, 1500
    place = {"dtype": dtype, "device": device}
    x = _normal(6, size, seed=seed, scale=3.0, **place).requires_grad_()
    target = TeacherTarget.from_logits(_normal(6, total, seed=seed + 1, scale=3.0, **place), 32)
    rows = torch.arange(total, device=device)
    rows[:6] = rows[size:] = -1
    rows[target.ids[:, 0]] = torch.arange(6, device=device)  # no position is without overlap
    exact = x.detach().double().requires_grad_()
    found, right = (
        losses.acceptance_loss(t, target.ids, target.probs, loss, rows, backend=backend)
        for t, backend in ((x, "triton"), (exact, "torch"))
    )
    gradients = [
        torch.autograd.grad(f.loss + 0.3 * f.kl.mean(), t) for f, t in ((found, x), (right, exact))
    ]
    figures = [[f.loss, f.alpha, f.kl] for f in (found, right)]
    return figures[0], figures[1], *gradients


def _error(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    worst = 0.0
    for got, wanted in zip(found, expected, strict=True):
        most = float(wanted.detach().abs().max()) or 1.0
        error = float((got.detach().double() - wanted.detach()).abs().max()) / most
        worst = max(worst, error if error == error else float("inf"))
    return worst


def correctness(sizes: Sizes, seed: int) -> Iterator[dict[str, Any]]:
    """Every kernel in every dtype and shape; one row for each, over lengths."""
    device = sizes.device

    def row(what: str, shape: str, dtype: torch.dtype, errors: list[float]) -> dict[str, Any]:
        limit = TOLERANCE[dtype] * (2 if "gradient" in what else 1)
        worst, finite = max(errors), [e for e in errors if e != float("inf")]
        spread = (min(finite), max(finite)) if finite else (None, None)
        value = worst if len(finite) == len(errors) else None
        fault = None if worst <= limit else f"error {worst:.1e} is above {limit:.0e}"
        how = "kernel against float64"
        numbers = {"n": len(errors), "more": {"limit": limit}, "fault": fault}
        return figure(what, how, shape, dtype, "relative error", value, *spread, **numbers)

    for dtype in sizes.dtypes:
        for shape in sizes.shapes:
            name = f"{shape[1]} KV heads of {shape[2]} x {shape[3]}"
            errors: dict[str, list[float]] = {}
            for length in sizes.lengths:
                for what, found, expected in _cases(shape, dtype, length, device, seed):
                    errors.setdefault(what, []).append(_error(found, expected))
            for what, all_of_them in errors.items():
                yield row(what, name, dtype, all_of_them)
        errors = {"acceptance_loss": [], "acceptance_loss, gradients": []}
        for loss in losses.LOSSES:
            found, expected, got, wanted = _loss_case(loss, dtype, device, seed)
            errors["acceptance_loss"].append(_error(found, expected))
            errors["acceptance_loss, gradients"].append(_error(got, wanted))
        for what, all_of_them in errors.items():
            yield row(what, "1,000 rows", dtype, all_of_them)


# ---------------------------------------------------------------- time
BANDWIDTH = (
    "Bytes a second that a sum over a large buffer reads: what memory delivers on this machine."
)


def seconds_of(work: Callable[[], Any], sizes: Sizes, repeats: int | None = None) -> list[float]:
    """Seconds of each run, after three that do not count.

    Before each, a GPU writes a buffer far larger than its cache. That takes it so long that the work is
    queued before it can begin: what the CPU needs to start kernels is not counted.
    """
    for _ in range(1 if sizes.device == "cpu" else 3):
        work()
    found = []
    if sizes.device == "cpu":
        for _ in range(repeats or sizes.repeats):
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
        return found
    room = min(2**30, torch.cuda.mem_get_info()[0] // 4)
    flush = torch.empty(room, dtype=torch.int8, device=sizes.device)
    marks = []
    for _ in range(repeats or sizes.repeats):
        flush.zero_()
        marks.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        marks[-1][0].record()
        work()
        marks[-1][1].record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def read_bandwidth(sizes: Sizes, found: list[float]) -> Iterator[dict[str, Any]]:
    """Measure it, and leave the mean, bytes a second, in ``found``."""
    size = sizes.bandwidth_bytes
    if sizes.device == "cuda":
        size = min(size, torch.cuda.mem_get_info()[0] // 4)
    buffer = torch.ones(size // 4, dtype=torch.float32, device=sizes.device)
    rates = [buffer.nbytes / s for s in seconds_of(buffer.sum, sizes)]
    spread = measure.interval(rates)
    found.append(spread.mean)
    numbers = [None if x is None else x / 1e9 for x in spread[:3]]
    yield figure("memory", "sum", f"{size:,} bytes", "float32", "GB/s", *numbers, n=spread.n)


# ---------------------------------------------------------------- kernels
KERNELS = (
    "The bytes that the operation must move at least, over its time: the same bytes for every way of "
    "doing it, so that rows compare. n counts runs; the interval is the 95 % bootstrap interval of the "
    "mean. A GPU's cache is emptied before each run. Agreement is with the kernel's own output."
)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0, enable_gqa=True)


def _lower_right(n: int, length: int) -> Any:
    from torch.nn.attention.bias import causal_lower_right

    return None if n == 1 else causal_lower_right(n, length)


def _flex(device: str) -> tuple[Callable, Callable]:
    """FlexAttention, compiled where that pays, and its maker of masks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device == "cpu":
        return flex_attention, create_block_mask
    torch.compiler.reset()  # each mask is a program of its own, and there are many
    return torch.compile(flex_attention, dynamic=False), create_block_mask


Ways = dict[str, Callable[[], Tensor]]


def _verify_ways(shape, context: int, n: int, dtype, sizes: Sizes, seed: int) -> tuple[int, Ways]:
    q, k, v, _ = _cache(shape, n, [context], dtype, sizes.device, seed)
    k, v = k[:, :, :context].contiguous(), v[:, :, :context].contiguous()
    mask = _lower_right(n, context)
    flex, block_mask = _flex(sizes.device)

    def causal(b, h, i, t):
        return t <= context - n + i

    blocks = None
    if n > 1:
        blocks = block_mask(causal, None, None, n, context, device=sizes.device)
    ways: Ways = {
        "kernel": lambda: verify.verify(q, k, v, context, check=False, backend="triton"),
        "SDPA": lambda: _sdpa(q, k, v, mask),
        "FlexAttention": lambda: flex(q, k, v, block_mask=blocks, scale=1.0, enable_gqa=True),
    }
    return 2 * k.nbytes + 2 * q.nbytes, ways


def _sparse_ways(shape, context: int, n: int, dtype, sizes: Sizes, seed: int) -> tuple[int, Ways]:
    """One query; the recent window is the end of the context, the chunks lie before it."""
    q, k, v, _ = _cache(shape, 1, [context], dtype, sizes.device, seed)
    k, v = k[:, :, :context].contiguous(), v[:, :, :context].contiguous()
    before = context - WINDOW
    count = (sizes.budget - WINDOW) // CHUNK
    chunks = _chunks(shape[1], 1, before, count, sizes.device, seed).int()
    entries = (chunks[..., None] * CHUNK + torch.arange(CHUNK, device=sizes.device)).flatten(2)
    recent = torch.arange(before, context, device=sizes.device).expand(1, shape[1], -1)
    entries = torch.cat((entries, recent), 2).long()
    kept = torch.zeros(shape[1], context, dtype=torch.bool, device=sizes.device)
    kept = kept.scatter(1, entries[0], True)
    mask = kept.repeat_interleave(shape[2], 0)[None, :, None]  # [1, H, 1, T]
    take = entries[..., None].expand(-1, -1, -1, shape[3])
    flex, block_mask = _flex(sizes.device)

    def chosen(b, h, i, t):
        return kept[h // shape[2], t]

    blocks = block_mask(chosen, 1, q.shape[1], 1, context, device=sizes.device)
    options = {"window": WINDOW - 1, "chunk_size": CHUNK, "check": False, "backend": "triton"}
    ways: Ways = {
        "kernel": lambda: sparse_decode.sparse_decode(q, k, v, chunks, context, **options),
        "gather + SDPA": lambda: _sdpa(q, k.gather(2, take), v.gather(2, take)),
        "SDPA, masked": lambda: _sdpa(q, k, v, mask),
        "FlexAttention": lambda: flex(q, k, v, block_mask=blocks, scale=1.0, enable_gqa=True),
    }
    return 2 * entries.shape[2] * shape[1] * shape[3] * dtype.itemsize + 2 * q.nbytes, ways


def _scores_ways(shape, context: int, n: int, dtype, sizes: Sizes, seed: int) -> tuple[int, Ways]:
    _, k, _, _ = _cache(shape, 1, [context], dtype, sizes.device, seed)
    k, whole = k[:, :, :context].contiguous(), context // CHUNK
    last = k[:, :, -1:]

    def plain() -> Tensor:
        with launching.use("torch"):
            return ChunkTopK().score(k, whole)

    ways: Ways = {
        "kernel": lambda: scoring.chunk_scores(last, k, backend="triton")[:, :, 0],
        "means, then a product": plain,
    }
    return k.nbytes, ways


def _views_ways(shape, context: int, n: int, dtype, sizes: Sizes, seed: int) -> tuple[int, Ways]:
    """Forward and backward. FlexAttention and masked SDPA need the prefix once for each view."""
    kept = sizes.budget - sizes.block
    made = _views_of(shape, context, n, sizes.views, 0, kept, dtype, sizes.device, seed)
    *inputs, chosen, count = made
    q, k, v, old_k, old_v = inputs
    real = torch.arange(chosen.shape[2], device=sizes.device) < count[:, None]
    causal = torch.ones(n, n, dtype=torch.bool, device=sizes.device).tril()
    seen = torch.zeros(*k.shape[:2], context, dtype=torch.bool, device=sizes.device)
    seen = seen.scatter(2, chosen, real[:, None].expand_as(chosen))  # [N, H_kv, T]
    whole = seen[:, :, None].expand(-1, -1, n, -1)
    mask = torch.cat((whole, causal.expand(*k.shape[:2], -1, -1)), 3)
    mask = mask.repeat_interleave(shape[2], 1)
    flex, block_mask = _flex(sizes.device)

    def visible(b, h, i, t):
        mine = (t >= context) & (t - context <= i)
        return mine | ((t < context) & seen[b, h // shape[2], t.clamp(max=context - 1)])

    blocks = block_mask(visible, len(q), q.shape[1], n, context + n, device=sizes.device)

    def everything() -> list[Tensor]:
        pairs = ((old_k, k), (old_v, v))
        return [torch.cat((old.expand(len(q), -1, -1, -1), own), 2) for old, own in pairs]

    def gathered() -> Tensor:
        pairs = ((old_k, k), (old_v, v))
        both = [torch.cat((*views._take(old, [chosen]), own), 2) for old, own in pairs]
        return views._attend(q, *both, real, causal)

    options = {"check": False, "backend": "triton"}
    forward: Ways = {
        "kernel": lambda: multi_view.multi_view(*inputs, chosen, count, **options),
        "gather + SDPA": gathered,
        "SDPA, masked": lambda: _sdpa(q, *everything(), mask),
        "FlexAttention": lambda: flex(
            q, *everything(), block_mask=blocks, scale=1.0, enable_gqa=True
        ),
    }

    def trained(attend: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def work() -> Tensor:
            out = attend()
            torch.autograd.grad(out, inputs, torch.ones_like(out))
            return out.detach()

        return work

    entries = int(count.sum()) + k.shape[0] * n
    # Forward the entries and q once, out written; backward both again, and the gradients of all.
    moved = 3 * 2 * entries * shape[1] * shape[3] * dtype.itemsize + 5 * q.nbytes
    return moved, {name: trained(attend) for name, attend in forward.items()}


def _loss_ways(dtype, sizes: Sizes, seed: int) -> tuple[int, Ways]:
    """Forward and backward of the argmax cross-entropy with its figures."""
    place = {"dtype": dtype, "device": sizes.device}
    x = _normal(sizes.positions, sizes.rows, seed=seed, **place).requires_grad_()
    target = TeacherTarget.from_logits(x.detach().roll(1, 0), 32)

    def work(backend: str) -> Tensor:
        with launching.use(backend):
            found = objectives.branch(x, target)
            torch.autograd.grad(found.loss, x)
        return found.loss.detach()

    return 3 * x.nbytes, {"kernel": lambda: work("triton"), "PyTorch": lambda: work("torch")}


def kernels(sizes: Sizes, seed: int, bandwidth: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Every kernel beside its alternatives, in the narrowest dtype for attention."""
    dtype = torch.bfloat16
    for shape in sizes.shapes[: sizes.timed_shapes]:
        for context in sizes.contexts:
            name = f"{shape[0]}: {shape[1]} x {shape[2]} x {shape[3]}, {context:,} entries"
            few = f"{name}, {sizes.gamma + 1} queries"
            blocks = f"{name}, {sizes.views} blocks of {sizes.block}"
            for what, label, n, make in (
                ("chunk_scores", name, 1, _scores_ways),
                ("verify", f"{name}, 1 query", 1, _verify_ways),
                ("verify", few, sizes.gamma + 1, _verify_ways),
                ("sparse_decode", f"{name}, budget {sizes.budget}", 1, _sparse_ways),
                ("multi_view, both ways", blocks, sizes.block, _views_ways),
            ):
                made = make(shape, context, n, dtype, sizes, seed)
                yield from _compared(what, label, dtype, *made, sizes, bandwidth)
    label = f"{sizes.positions:,} positions of {sizes.rows:,} rows"
    made = _loss_ways(torch.float32, sizes, seed)
    yield from _compared(
        "acceptance_loss, both ways", label, torch.float32, *made, sizes, bandwidth
    )


def _compared(
    what: str,
    shape: str,
    dtype: torch.dtype,
    moved: int,
    ways: Ways,
    sizes: Sizes,
    bandwidth: Sequence[float],
) -> Iterator[dict[str, Any]]:
    expected = None
    for how, work in ways.items():
        ours = how == "kernel"
        try:
            found = work().double()
            expected = found if expected is None else expected
            spread = measure.interval(seconds_of(work, sizes))
        except Exception as error:  # an alternative may not exist on this GPU; ours must
            yield _failed(what, error, how, shape, dtype, ours)
            continue
        rates = [None if s is None else moved / s / 1e9 for s in spread[:3]]
        more = {"milliseconds": 1e3 * spread.mean, "bytes": moved}
        if bandwidth:
            more["of bandwidth"] = moved / spread.mean / bandwidth[0]
        agrees = _error([found], [expected]) <= 2 * TOLERANCE[dtype]
        if not ours:
            more["agrees"] = agrees
        numbers = (rates[0], rates[2], rates[1], spread.n)
        yield figure(what, how, shape, dtype, "GB/s", *numbers, more)


# ---------------------------------------------------------------- decoding
DECODING = (
    "Tokens a second after the prompt, greedy. n counts samples; the interval is the 95 % bootstrap "
    "interval of the mean over samples. A dry run decodes with a random model of two layers."
)


class _Bytes:
    """A tokenizer for a dry run: a byte is a token."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


TOY = DecoderConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    max_positions=256,
    rope={"rope_type": "default", "rope_theta": 10_000.0},
    tie_embeddings=False,
)


def _load(sizes: Sizes, context: int, split: str, pack: bool = True) -> tuple[Pair, list[Document]]:
    """Target and texts; toys on a CPU."""
    if sizes.device == "cuda":
        pair = load_pair("smollm2", device="cuda", context=context, pack=pack)
        return pair, corpora.embedded(split)
    cpu = torch.device("cpu")
    toy = Decoder.random(TOY, seed=1)
    text = "".join(random.Random(2).choices(string.ascii_letters, k=8 * context))
    pair = Pair("toy", toy, None, _Bytes(), cpu, torch.float32, frozenset(), "none")
    return pair, [Document("random letters", text)]


def _drafters(sizes: Sizes, pair: Pair) -> dict[str, Callable[[], Drafter]]:
    """What is decoded with, by name; made when asked for, so that one that fails spoils no other."""
    policy = make_policy("chunk_topk_recent")

    def shipped(name: str) -> Drafter:
        if sizes.device == "cuda":
            model = models.load_drafter(models.checkpoint(name), pair.target)
        elif "feature" in name:
            model = models.conditioned_on(pair.target, (0, 1)).requires_grad_(False)
        else:
            model = models.cut_from(pair.target, (1,)).requires_grad_(False)
        return ModelDrafter(model, policy, sizes.budget)

    found: dict[str, Callable[[], Drafter]] = {
        "self-drafting": lambda: SelfDrafter(pair.target, policy, sizes.budget)
    }
    return found | {name: lambda n=name: shipped(n) for name in SHIPPED}


def decoding(sizes: Sizes, seed: int) -> Iterator[dict[str, Any]]:
    """Plain decoding and every drafter at every context; self-drafting without the kernels too."""
    for context in sizes.contexts:
        pair, documents = _load(sizes, context, "held-out")
        shape = f"{context:,} tokens, budget {sizes.budget}, gamma {sizes.gamma}"
        drafters = _drafters(sizes, pair)
        runs = [("torch", "self-drafting"), *(("auto", name) for name in drafters)]
        plain_known = set()
        for backend, name in runs:
            with _backend(sizes, backend):
                how = "PyTorch" if backend == "torch" else "kernels"
                try:
                    found = _measured(sizes, pair, documents, drafters[name](), context, seed)
                except Exception as error:  # the other drafters must still run
                    yield _failed(name, error, how, shape, pair.dtype, ours=True)
                    continue
            if how not in plain_known:
                plain_known.add(how)
                yield _speed("plain", how, shape, found, "ar_tokens_per_second")
            yield _speed(name, how, shape, found, "tokens_per_second")


def _backend(sizes: Sizes, backend: str):
    """A dry run insists on the kernels where a GPU takes them by itself."""
    return launching.use("triton" if backend == "auto" and sizes.device == "cpu" else backend)


def _measured(sizes, pair, documents, drafter, context: int, seed: int) -> dict[str, Any]:
    settings = measure.MeasureSettings(
        context=context,
        budget=sizes.budget,
        gamma=sizes.gamma,
        samples=sizes.samples,
        new_tokens=sizes.new_tokens,
        seed=seed,
    )
    return measure.measure(settings, pair, documents, drafter).aggregate


def _speed(what: str, how: str, shape: str, found: Mapping[str, Any], name: str) -> dict[str, Any]:
    spread, more, fault = found["intervals"][name], {"scaling": found["scaling"]}, None
    if what != "plain":
        for label, key in (
            ("acceptance", "acceptance_rate"),
            ("tokens a round", "accepted_length"),
            ("speed-up over plain", "speedup_decode"),
            ("n-gram acceptance", "ngram_acceptance_rate"),
            ("distinct-2", "distinct_2"),
            ("same as greedy", "identical"),
            ("near-ties only", "near_ties_only"),
        ):
            more[label] = found[key]
        if not found["near_ties_only"]:
            fault = "the output differs from greedy decoding by more than rounding"
    numbers = [spread[key] for key in ("mean", "low", "high", "n")]
    return figure(what, how, shape, found["dtype"], "tokens/s", *numbers, more, fault)


# ---------------------------------------------------------------- training
TRAINING = (
    "Tokens a second of the trainer (every window in full and under its sparse views), first step left "
    "out. n counts steps; the interval is the 95 % bootstrap interval of the mean over steps."
)


def training(sizes: Sizes, seed: int) -> Iterator[dict[str, Any]]:
    """A few steps of each kind of drafter, from the same start on both backends."""
    pair, documents = _load(sizes, sizes.window, "train", pack=False)
    windows = corpora.tiles(pair.tokenizer, documents[:4], sizes.window, seed)[: sizes.windows]
    with tempfile.TemporaryDirectory() as scratch:
        for kind in sizes.kinds:
            first: dict[str, float] = {}
            for how, backend in (("PyTorch", "torch"), ("kernels", "auto")):
                folder = Path(scratch) / kind
                with _backend(sizes, backend):
                    try:
                        lines = _trained(sizes, pair, windows, kind, folder, how, seed)
                    except Exception as error:  # the other kind must still run
                        yield _failed(kind, error, how, ours=True)
                        continue
                yield _rate(sizes, kind, how, lines, first)


def _trained(
    sizes, pair: Pair, windows, kind: str, folder: Path, how: str, seed: int
) -> list[dict]:
    recipe = recipes.get("budgetdraft-feature-novels" if kind == "feature" else "budgetdraft")
    toy = sizes.device == "cpu"
    taps = recipe.taps if kind == "feature" else ()
    kept = teacher.TeacherSettings(recipe.top, taps)
    store = teacher.compute(pair.target, windows, folder / "teacher", kept)
    vocabulary = pair.target.config.vocab_size
    rows = models.draft_vocabulary(windows, vocabulary, vocabulary // 3)
    if kind == "feature":
        model = models.conditioned_on(pair.target, taps, rows, seed=seed)
    else:
        model = models.cut_from(pair.target, (0, 1) if toy else recipe.layers, rows)
    settings: TrainSettings = replace(recipe.settings, steps=sizes.steps, warmup=1, seed=seed)
    if toy:
        budgets = fixed(sizes.budget)
        settings = replace(settings, budgets=budgets, block=sizes.block, autocast=False)
    lines: list[dict] = []
    models.trainable(model).to(pair.device)
    if not toy:
        torch.cuda.reset_peak_memory_stats()
    Trainer(model, [store], settings, folder / how).run(lines.append)
    if not toy:
        lines[-1]["peak_bytes"] = torch.cuda.max_memory_allocated()
    return lines


def _rate(sizes, kind: str, how: str, lines: list[dict], first: dict[str, float]) -> dict[str, Any]:
    spread = measure.interval([line["tokens"] / line["seconds"] for line in lines[1:]])
    first[how] = lines[0]["loss"]
    more: dict[str, Any] = {
        "loss of the first step": lines[0]["loss"],
        "loss of the last": statistics.fmean(line["loss"] for line in lines[-5:]),
    }
    if "peak_bytes" in lines[-1]:
        more["peak bytes"] = lines[-1]["peak_bytes"]
    fault, known = None, first.get("PyTorch")
    if how == "kernels" and known is not None:
        more["difference of the first loss"] = abs(first[how] - known) / known
        if more["difference of the first loss"] > 0.02:
            fault = f"the first loss is {first[how]:.4f}, in PyTorch {known:.4f}"
    shape = f"windows of {sizes.window:,}, {len(lines)} steps"
    dtype = "bfloat16 autocast" if sizes.device == "cuda" else "float32"
    return figure(kind, how, shape, dtype, "tokens/s", *spread, more, fault)


# ---------------------------------------------------------------- writing
def write(out: Path, report: Mapping[str, Any]) -> None:
    """``report.json`` and ``report.html``, each under a temporary name first."""
    measure.write_json(out / "report.json", report)
    with assets.replacing(out / "report.html") as scratch:
        scratch.write_text(page(report), encoding="utf-8")


def page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    return environment.from_string(PAGE).render(report=report)


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def summary(report: Mapping[str, Any]) -> str:
    """A few lines for people."""
    lines = [report["mark"]] if report["mark"] else []
    lines += [f"{s['name']:<12} {len(s['figures']):>4} figures" for s in report["sections"]]
    return "\n".join([*lines, *(f"FAULT {fault}" for fault in report["faults"])])


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>GPU report</title>
<style>
body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 80em; color: #222; background: #fff }
table { border-collapse: collapse; width: 100%; margin: 1em 0 2.5em }
th, td { text-align: left; vertical-align: top; padding: .3em .6em; border-bottom: 1px solid #ccc }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
caption { text-align: left; padding-bottom: .5em }
.mark, .fault { color: #8a1c00; font-weight: bold }
</style>
</head>
<body>
<h1>GPU report</h1>
{% if report.mark %}
<p class="mark">{{ report.mark }}. It shows that the program runs to its end; its times mean nothing.</p>
{% endif %}
<table>
<caption>Where this comes from</caption>
{% for group in ("device", "machine", "versions") %}
{% for name, value in report[group].items() %}
<tr><th scope="row">{{ group }}, {{ name }}</th><td>{{ value | number }}</td></tr>
{% endfor %}
{% endfor %}
<tr><th scope="row">commit</th><td>{{ report.commit | number }}</td></tr>
<tr><th scope="row">seed</th><td>{{ report.seed }}</td></tr>
</table>
{% if report.faults %}
<h2>Faults</h2>
<ul>
{% for fault in report.faults %}
<li class="fault">{{ fault }}</li>
{% endfor %}
</ul>
{% endif %}
{% for section in report.sections %}
<h2 id="{{ section.name }}">{{ section.name | capitalize }}</h2>
<table>
<caption>{{ section.words }}
Machine: {{ section.figures[0].machine if section.figures else "–" }}, commit {{ report.commit | number }},
seed {{ report.seed }}.{% if report.mark %} <span class="mark">{{ report.mark }}.</span>{% endif %}</caption>
<thead><tr><th>what</th><th>how</th><th>shape</th><th>dtype</th><th>value</th><th>unit</th>
<th>interval</th><th>n</th><th>besides</th></tr></thead>
<tbody>
{% for row in section.figures %}
<tr><td>{{ row.what }}</td><td>{{ row.how }}</td><td>{{ row.shape }}</td><td>{{ row.dtype }}</td>
<td class="number">{{ row.value | number }}</td><td>{{ row.unit }}</td>
<td class="number">{{ row.low | number }} to {{ row.high | number }}</td>
<td class="number">{{ row.n }}</td>
<td>{% for name, value in row.more.items() %}
{{ name }} {{ value | number }}{{ ";" if not loop.last }}
{% endfor %}
{% if row.fault %}<span class="fault">{{ row.fault }}</span>{% endif %}
{% if row.mark %}<span class="mark">{{ row.mark }}</span>{% endif %}</td></tr>
{% endfor %}
</tbody>
</table>
{% endfor %}
</body>
</html>
"""
