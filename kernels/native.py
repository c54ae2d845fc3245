"""A decoding step on CPUs with AVX512-BF16: attention over a cache, and the rest of a layer, in C.

``attention_cpu.c`` and ``layer_cpu.c`` are compiled at first use. They need gcc 11 or later, a CPU with
these instructions, and Linux on x86-64; elsewhere, or with ``BDLIB_NATIVE=0`` in the environment, PyTorch
does it. :func:`state` says which, and why. Where the CPU has AMX too, products are of whole tiles;
``BDLIB_NATIVE=avx512`` does without.

**Attention** (:func:`attend`, :func:`extend`). PyTorch takes five calls for it, each of which reads or
writes the scores of every key, and one product over three KV heads leaves one of two threads without
work a third of the time. The C file does all of it in one pass over keys and values, and asks memory for
the next part of them at an even pace while it computes. Formula: ``softmax(q k^T) v`` in float32, weights
rounded to bfloat16. Work is shared out by KV head and part of 256 entries; bytes read: keys and values
once for up to 128 rows (queries times the heads that share a KV head), written: 4 ``(D + 2)`` a row and
part.

**The rest of a layer** (:func:`before`, :func:`after`), and products of normed states besides
(:func:`normed_product`). A step of a small model is some twenty calls a layer, each of a few
microseconds' work, and memory stands idle between them: SmolLM2's weights, which take 9 ms to read, took
25. In C a layer is three calls, and weights arrive as fast as memory has them. Bytes read: every weight
once, for up to :data:`MOST_TOKENS` tokens.

**AMX.** A verification reads what a step reads, and does the arithmetic of each of its tokens. AVX512
multiplies 32 pairs of numbers at once; with three query heads to a KV head, three tokens over 16,000
entries are more arithmetic than fits into the time that memory takes. An AMX tile is sixteen rows by
sixteen columns, and a product of two takes about as long for one row as for eight: up to five tokens (15
rows) cost hardly more than one. Keys that are packed lie as right factors are read; weights are left
factors as they lie, and what is paired up is the few rows of inputs. Measured on two cores of a server
CPU of 2.6 GHz, SmolLM2, 9 heads on 3, one to eight tokens, in turns, medians, milliseconds a pass
without AMX / with it, by entries in the cache:

======  ===========  ===========  ===========  ===========  ===========
tokens            1            3            4            5            8
======  ===========  ===========  ===========  ===========  ===========
4,000   20.3 / 19.7  24.0 / 20.6  25.8 / 20.9  28.5 / 21.2  35.1 / 23.0
16,000  33.9 / 33.0  42.4 / 34.8  47.5 / 35.4  53.8 / 36.2  74.7 / 40.1
======  ===========  ===========  ===========  ===========  ===========

A prompt of 16,000 tokens takes 25 seconds for 59, one of 4,000 takes 2.2 for 4.6.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = tuple(Path(__file__).with_name(f"{name}_cpu.c") for name in ("attention", "layer"))
HEADER = Path(__file__).with_name("common_cpu.h")
EXTENSIONS = (
    *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma"),
    *("amx-tile", "amx-bf16"),
)
FLAGS = ("-O3", "-fPIC", "-fopenmp", *(f"-m{extension}" for extension in EXTENSIONS))
MOST_ROWS = 128  # as in the C file: queries times the heads that share a KV head
BLOCK = 16  # as in the C file: keys that are packed together
DIMS = (32, 64, 96, 128)
MOST_TOKENS = 64
"""Tokens that :func:`before`, :func:`after` and :func:`normed_product` take: with more, PyTorch's blocked
products are faster."""


def attend(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor | None:
    """Attention of queries at entries ``start`` and following, each over the entries up to itself.

    Parameters
    ----------
    q
        Queries ``[B, H, n, D]``, scaled.
    k, v
        ``[B, H_kv, T, D]`` with ``T`` at least ``start + n``; what lies beyond is not read.

    Returns
    -------
    Tensor or None
        ``[B, H, n, D]``; ``None`` where the library is not there, or not for such tensors.
    """
    batch, heads, n, dim = q.shape
    kv_heads = k.shape[1]
    rows, most = heads // kv_heads * n, MOST_ROWS * kv_heads // heads
    if (
        not most
        or not q.dtype == k.dtype == v.dtype == torch.bfloat16
        or dim not in DIMS
        or not k.stride(3) == v.stride(3) == 1
        or (found := library()) is None
    ):
        return None
    if n > most:
        starts = range(start, start + n, most)
        parts = zip(q.split(most, 2), starts, strict=True)
        return torch.cat([attend(part, k, v, first) for part, first in parts], 2)
    q = q.contiguous()
    out = torch.empty_like(q)
    room = torch.empty(found.attend_room(batch * kv_heads, rows, dim, start + n))
    strides = (ctypes.c_int64 * 6)(*k.stride()[:3], *v.stride()[:3])
    places = (t.data_ptr() for t in (q, k, v, out, room))
    shape = batch, kv_heads, rows, n, dim
    found.attend(*places, *shape, start, 0, strides, torch.get_num_threads())
    return out


def extend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: int, packed: int = 0
) -> Tensor | None:
    """Store ``k``, ``v`` in a cache and attend: :func:`attend` as a cache calls it, in one call.

    Parameters
    ----------
    q
        Queries ``[B, H, n, D]``, scaled.
    k, v
        ``[B, H_kv, n, D]``, of the same positions.
    keys, values
        The cache, ``[B, H_kv, T, D]``: entries ``start`` to ``start + n`` are overwritten, those before
        are attended too, and what lies beyond is not read.
    packed
        Entries, at most ``start``, whose keys went through :func:`pack`.

    Returns
    -------
    Tensor or None
        ``[B, H, n, D]``; ``None``, with nothing stored, where the library is not there, or not for such
        tensors.
    """
    batch, heads, n, dim = q.shape
    kv_heads = keys.shape[1]
    rows = heads // kv_heads * n
    tensors = q, k, v, keys, values
    if (
        rows > MOST_ROWS
        or dim not in DIMS
        or start + n > min(keys.shape[2], values.shape[2])
        or any(t.dtype != torch.bfloat16 or t.stride(3) != 1 or not t.is_cpu for t in tensors)
        or (found := library()) is None
    ):
        return None
    out = torch.empty(q.shape, dtype=torch.bfloat16)
    parts = found.attend_room(batch * kv_heads, rows, dim, start + n)
    room = torch.empty(parts + (batch * kv_heads * rows * dim + 1) // 2)
    strides = [length for t in (keys, values, q, k, v) for length in t.stride()[:3]]
    places = (t.data_ptr() for t in (*tensors, out, room))
    shape = batch, kv_heads, rows, n, dim, start, packed
    found.extend(*places, *shape, (ctypes.c_int64 * 15)(*strides), torch.get_num_threads())
    return out


def packs(keys: Tensor) -> bool:
    """Whether :func:`pack` takes the keys ``[..., T, D]`` of a cache."""
    return (
        keys.dtype == torch.bfloat16
        and keys.is_cpu
        and keys.is_contiguous()
        and keys.shape[-1] in DIMS
        and not keys.shape[-2] % BLOCK
        and not keys.data_ptr() % 64
        and library() is not None
    )


def pack(keys: Tensor, first: int, last: int) -> None:
    """Lay out the keys of entries ``first`` to ``last`` as :func:`extend` computes with them, in place.

    It needs the first two numbers of :data:`BLOCK` keys side by side, then the next two; without this
    it makes that of every key in every step, a seventh of the attention of three queries. ``keys``
    ``[..., T, D]`` is all that :func:`packs` was asked about, ``first`` and ``last`` are multiples of
    :data:`BLOCK`.
    """
    *heads, entries, dim = keys.shape
    shape = math.prod(heads), entries * dim, first, last, dim
    library().pack(keys.data_ptr(), *shape, torch.get_num_threads())


def unpack(keys: Tensor, entries: int) -> Tensor:
    """The first ``entries`` keys of a packed cache as they were, a copy: ``[..., entries, D]``.

    ``keys`` ``[..., T, D]`` is contiguous and may begin with any packed block.
    """
    *heads, _, dim = keys.shape
    out = torch.empty(*heads, entries, dim, dtype=keys.dtype)
    shape = math.prod(heads), keys.stride(-3), entries, dim
    library().unpack(keys.data_ptr(), out.data_ptr(), *shape, torch.get_num_threads())
    return out


def fits(linear: Any) -> bool:
    """Whether the weight of a :class:`bdlib.transformer.Linear` is one that the C file reads."""
    weight = linear.weight
    return (
        weight is not None
        and linear.bias is None
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and not weight.shape[0] % 16
        and not weight.shape[1] % 32
        and library() is not None
    )


def _places(*parts: Any) -> list[int]:
    """Where tensors lie; a :class:`bdlib.transformer.Linear` has two, its weight and its scales (0: none)."""
    found = []
    for part in parts:
        if isinstance(part, Tensor):
            found.append(part.data_ptr())
        elif part.codes is None:
            found += part.weight.data_ptr(), 0
        else:
            found += part.codes.data_ptr(), part.scale.data_ptr()
    return found


def takes(x: Tensor) -> bool:
    """Whether states ``x`` ``[B, n, ...]`` are some for these functions: few tokens, no gradient."""
    return (
        library() is not None
        and x.shape[0] * x.shape[1] <= MOST_TOKENS
        and x.dtype == torch.float32
        and not x.requires_grad
        and x.is_cpu
        and x.is_contiguous()
    )


def normed_product(linear: Any, norm: Tensor, x: Tensor, eps: float) -> Tensor:
    """RMS norm of each part of ``x`` ``[B, n, G, C]`` and a product of all: ``[B, n, outputs]``, float32.

    ``linear`` has a weight ``[outputs, G C]`` that :func:`fits`, ``norm`` ``[G, C]`` is the norms'. Sums
    are rounded to bfloat16, as they would be in PyTorch.
    """
    batch, n, groups, width = x.shape
    outputs = linear.shape[0]
    out = torch.empty(batch, n, outputs, dtype=torch.float32)
    room = torch.empty(library().product_room(batch * n, groups * width))
    places = _places(x, norm, linear, out, room)
    shape = batch * n, groups, width, outputs
    library().normed_product(*places, *shape, eps, torch.get_num_threads())
    return out


def before(layer: Any, config: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm, query, key and value products, and their rotation: ``[B, n, H + 2 H_kv, D]``.

    ``x`` ``[B, n, C]`` is one that :func:`takes` accepts, all matrices of the layer ones that
    :func:`fits`, ``D`` a multiple of 32; ``cos`` and ``sin`` ``[n, H + 2 H_kv, D]`` are those of
    :meth:`bdlib.transformer.Decoder.rotations`, or ``[B, n, H + 2 H_kv, D]`` where sequences differ.
    """
    batch, n, width = x.shape
    *_, heads, dim = cos.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(batch, n, heads, dim, dtype=torch.bfloat16)
    room = torch.empty(library().product_room(batch * n, width))
    places = _places(x, layer.attention_norm, layer.qkv, cos, sin, out, room)
    shape = batch * n, cos.numel() // (heads * dim), width, heads, dim
    library().before(*places, *shape, config.rms_eps, torch.get_num_threads())
    return out


def after(layer: Any, config: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The residual stream after the output product of ``attended`` ``[B, H, n, D]`` and the MLP."""
    batch, n, width = x.shape
    heads, dim, inner = config.num_heads, config.head_dim, config.intermediate_size
    found, rows = library(), batch * n
    attended = attended.to(torch.bfloat16)
    if attended.stride(3) != 1:
        attended = attended.contiguous()
    out = torch.empty_like(x)
    room = torch.empty(found.layer_room(rows, width, heads * dim, inner))
    strides = (ctypes.c_int64 * 3)(*attended.stride()[:3])
    places = _places(layer.out, layer.mlp_norm, layer.gate_up, layer.down, out, room)
    shape = rows, n, width, heads, dim, inner
    threads = torch.get_num_threads()
    found.after(
        x.data_ptr(), attended.data_ptr(), strides, *places, *shape, config.rms_eps, threads
    )
    return out


def use_tiles(wanted: bool) -> bool:
    """Compute with AMX from now on, or without; whether it is so (without AMX it is not).

    For measurements and tests. A row comes out alike in every call of one kind, not of both.
    """
    found = library()
    return found is not None and bool(found.use_tiles(wanted))


def state() -> str:
    """Whether the library is used here, and if not, why."""
    return _library()[1]


def library() -> ctypes.CDLL | None:
    """The compiled C files; ``None`` where they cannot be used."""
    return _library()[0]


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("BDLIB_NATIVE") == "0":
        return None, "off: BDLIB_NATIVE is 0"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None, "off: for Linux on x86-64"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None, "off: this CPU has no AVX512"
    compiler = shutil.which("gcc")
    if compiler is None:
        return None, "off: there is no gcc"
    try:
        found = _load(compiler)
    except subprocess.CalledProcessError as error:
        return None, f"off: gcc says {(error.stderr.strip().splitlines() or [error])[-1]}"
    except OSError as error:
        return None, f"off: {error}"
    if not found.supported():
        return None, "off: this CPU has no AVX512-BF16"
    pointer, whole, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    found.attend_room.restype, found.attend_room.argtypes = long, [long, whole, whole, long]
    sizes = [long, long, whole, whole, whole, long, long]
    found.attend.restype, found.attend.argtypes = None, [pointer] * 5 + sizes + [pointer, whole]
    found.extend.restype, found.extend.argtypes = None, [pointer] * 7 + sizes + [pointer, whole]
    found.pack.restype, found.pack.argtypes = None, [pointer, *[long] * 4, whole, whole]
    found.unpack.restype, found.unpack.argtypes = None, [*[pointer] * 2, *[long] * 3, whole, whole]
    found.product_room.restype, found.product_room.argtypes = long, [whole, long]
    found.layer_room.restype, found.layer_room.argtypes = long, [whole, long, long, long]
    sizes, last = [whole, whole, long, whole, whole], [ctypes.c_float, whole]
    found.before.restype, found.before.argtypes = None, [pointer] * 8 + sizes + last
    found.normed_product.restype = None
    found.normed_product.argtypes = [pointer] * 6 + [whole, whole, long, long] + last
    found.after.restype, found.after.argtypes = None, [pointer] * 12 + [*sizes, long] + last
    tiles = found.use_tiles(os.environ.get("BDLIB_NATIVE") != "avx512")
    return found, "on, with AMX" if tiles else "on"


def _load(compiler: str) -> ctypes.CDLL:
    """The library: from the user's cache, or compiled there, or where that cannot be written, anew."""
    from platformdirs import user_cache_path

    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    sources = b"".join(source.read_bytes() for source in (*SOURCES, HEADER))
    content = sources + " ".join(FLAGS).encode() + version.stdout.encode()
    name = f"native-{hashlib.sha256(content).hexdigest()[:16]}.so"
    path = user_cache_path("bdlib", appauthor=False) / "native" / name
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except OSError:
        with tempfile.TemporaryDirectory() as folder:
            _compile(compiler, Path(folder) / name)
            return ctypes.CDLL(str(Path(folder) / name))


def _compile(compiler: str, path: Path) -> None:
    from bdlib import assets

    with tempfile.TemporaryDirectory() as scratch, assets.replacing(path) as place:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in SOURCES]
        # Linked without an OpenMP of its own: PyTorch's, which is loaded, has the threads.
        for arguments in (
            *(
                [*FLAGS, "-c", str(source), "-o", made]
                for source, made in zip(SOURCES, objects, strict=True)
            ),
            ["-shared", *objects, "-lm", "-o", str(place)],
        ):
            subprocess.run([compiler, *arguments], capture_output=True, text=True, check=True)
