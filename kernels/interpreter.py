"""Triton's interpreter: two repairs that bfloat16 needs, and a counter of the bytes that loads read.

Set TRITON_INTERPRET=1 before Python starts; kernels then run in numpy on CPU tensors, one program
after another. In triton 3.7.1 the interpreter keeps bfloat16 as 16-bit integers and ``tl.dot``
multiplies those integers; and its cast from float32 cuts digits off where a GPU rounds to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def repair() -> None:
    """Make ``tl.dot`` and casts treat bfloat16 as a GPU does. Does nothing the second time."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if hasattr(InterpreterBuilder, "plain_dot"):
        return
    InterpreterBuilder.plain_dot = InterpreterBuilder.create_dot
    InterpreterBuilder.plain_cast = InterpreterBuilder.cast_impl

    def widen(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, d, precision, imprecise):
        return self.plain_dot(widen(a), widen(b), d, precision, imprecise)

    def cast(self, x, to):
        source, to = x.dtype.scalar, to.scalar
        if source == tl.bfloat16 and to == tl.float32:
            return widen(x)
        if source == tl.float32 and to == tl.bfloat16:
            bits = np.ascontiguousarray(x.data).view(np.uint32).astype(np.uint64)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
            rounded = np.where(np.isnan(x.data), 0x7FC0, rounded)
            return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)
        return self.plain_cast(x, to)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast


@contextmanager
def count_read_bytes() -> Iterator[list[int]]:
    """Bytes that loads read inside the block, masked lanes left out: one number per load.

    Only in the interpreter. Every load counts, also of what another program has read before: it is
    the traffic of a GPU without any cache.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    plain, counts = InterpreterBuilder.create_masked_load, []

    def load(self, pointers, mask, *rest):
        found = plain(self, pointers, mask, *rest)
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        counts.append(int(lanes.sum()) * found.data.itemsize)
        return found

    InterpreterBuilder.create_masked_load = load
    try:
        yield counts
    finally:
        InterpreterBuilder.create_masked_load = plain
