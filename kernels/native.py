"""Attention over a cache on CPUs with AVX512-BF16: ``attention_cpu.c``, compiled at first use.

PyTorch takes five calls for it, each of which reads or writes the scores of every key, and one product
over three KV heads leaves one of two threads without work a third of the time. The C file does all of
it in one pass over keys and values. Measured on two cores of a server CPU, 9 heads on 3, bfloat16,
microseconds a layer, PyTorch / this: one query 104 / 21 over 512 entries, 321 / 150 over 4,096, 1,159 /
550 over 16,384; five queries 140 / 35, 463 / 210, 1,630 / 790; a prompt's 512 queries, in milliseconds,
21 / 15 over 4,096, 103 / 69 over 16,384.

It needs gcc, a CPU with these instructions, and Linux on x86-64; elsewhere, or with ``BDLIB_NATIVE=0`` in
the environment, PyTorch does it (:mod:`bdlib.attention`). :func:`state` says which, and why.

Formula: ``softmax(q k^T) v`` in float32, weights rounded to bfloat16. Work is shared out by KV head and
part of 256 entries; bytes read: keys and values once for up to 128 rows (queries times the heads that
share a KV head), written: 4 ``(D + 2)`` a row and part.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("attention_cpu.c")
EXTENSIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma")
FLAGS = ("-O3", "-fPIC", "-fopenmp", *(f"-m{extension}" for extension in EXTENSIONS))
MOST_ROWS = 128  # as in the C file: queries times the heads that share a KV head


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
        or dim not in (32, 64, 96, 128)
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
    found.attend(*places, *shape, start, strides, torch.get_num_threads())
    return out


def state() -> str:
    """Whether the library is used here, and if not, why."""
    return _library()[1]


def library() -> ctypes.CDLL | None:
    """The compiled C file; ``None`` where it cannot be used."""
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
    sizes = [long, long, whole, whole, whole, long]
    found.attend.restype, found.attend.argtypes = None, [pointer] * 5 + sizes + [pointer, whole]
    return found, "on"


def _load(compiler: str) -> ctypes.CDLL:
    """The library: from the user's cache, or compiled there, or where that cannot be written, anew."""
    from platformdirs import user_cache_path

    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    content = SOURCE.read_bytes() + " ".join(FLAGS).encode() + version.stdout.encode()
    name = f"attention-{hashlib.sha256(content).hexdigest()[:16]}.so"
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
        object_file = Path(scratch) / "attention.o"
        # Linked without an OpenMP of its own: PyTorch's, which is loaded, has the threads.
        for arguments in (
            [*FLAGS, "-c", str(SOURCE), "-o", str(object_file)],
            ["-shared", str(object_file), "-lm", "-o", str(place)],
        ):
            subprocess.run([compiler, *arguments], capture_output=True, text=True, check=True)
