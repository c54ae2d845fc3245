"""What the launchers share: checks of their arguments, choice of a backend, sizes of tiles.

``backend="auto"`` takes Triton for tensors on a GPU, if the shapes suit, and PyTorch otherwise;
``"triton"`` insists and says what does not suit; ``"torch"`` is the reference. The library always asks
for ``"auto"``; :func:`use` says for a while what that means.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bdlib.kernels.lazy import Kernel, interpreted, triton_installed

BACKENDS = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
CHUNK_SIZES = (1, 2, 4, 8, 16, 32, 64)
CHUNK_UNITS = (1, 8)  # what kernels are compiled for; a chunk is one or several of these
MAX_SPLITS = 64
OVERHEAD = 0.04  # of the bytes that must be read, what splitting may read on top


def require(condition: bool, message: str) -> None:
    """Refuse an argument."""
    if not condition:
        raise ValueError(message)


def check_tensor(name: str, tensor: Tensor, rank: int, like: tuple[str, Tensor] | None = None):
    """A tensor of ``rank`` dimensions, of the dtype and on the device of another one."""
    require(isinstance(tensor, Tensor), f"{name} must be a tensor, got {type(tensor).__name__}")
    shape = list(tensor.shape)
    require(tensor.dim() == rank, f"{name} must have {rank} dimensions, got shape {shape}")
    require(tensor.numel() > 0, f"{name} is empty: shape {shape}")
    require(tensor.is_floating_point(), f"{name} must be floating point, got {tensor.dtype}")
    if like is not None:
        other, reference = like
        same = tensor.dtype == reference.dtype
        require(same, f"{name} is {tensor.dtype}, {other} is {reference.dtype}")
        same = tensor.device == reference.device
        require(same, f"{name} is on {tensor.device}, {other} on {reference.device}")


def check_index(name: str, index: Tensor, shape: Iterable[int], device: torch.device) -> None:
    """An integer tensor of a given shape."""
    require(isinstance(index, Tensor), f"{name} must be a tensor, got {type(index).__name__}")
    found, wanted = list(index.shape), list(shape)
    require(found == wanted, f"{name} must have shape {wanted}, got {found}")
    whole = index.dtype in (torch.int32, torch.int64)
    require(whole, f"{name} must be int32 or int64, got {index.dtype}")
    require(index.device == device, f"{name} is on {index.device}, the keys on {device}")


def check_range(name: str, index: Tensor, low: int, high: int) -> None:
    """Values from ``low`` to ``high - 1``. On a GPU this waits for the index to be computed."""
    if index.numel():
        least, most = int(index.min()), int(index.max())
        inside = low <= least and most < high
        require(inside, f"{name} must be in {low}..{high - 1}, got values from {least} to {most}")


def check_attention(q: Tensor, k: Tensor, v: Tensor | None) -> int:
    """Queries ``[B, H, n, D]`` over keys and values ``[B, H_kv, T, D]``: heads per KV head."""
    check_tensor("q", q, 4)
    check_tensor("k", k, 4, ("q", q))
    batch, heads, _, dim = q.shape
    require(k.shape[0] == batch, f"k has {k.shape[0]} sequences, q has {batch}")
    require(k.shape[3] == dim, f"k has heads of {k.shape[3]}, q of {dim}")
    whole = heads % k.shape[1] == 0
    require(whole, f"q has {heads} heads, no multiple of the {k.shape[1]} heads of k")
    if v is not None:
        check_tensor("v", v, 4, ("q", q))
        require(v.shape == k.shape, f"v has shape {list(v.shape)}, k {list(k.shape)}")
    return heads // k.shape[1]


def chunk_unit(chunk_size: int) -> int:
    """Check that it is a power of two from 1 to 64, and return the unit that such chunks consist of."""
    allowed = chunk_size in CHUNK_SIZES
    require(allowed, f"chunk_size {chunk_size} must be a power of two from 1 to {CHUNK_SIZES[-1]}")
    return 8 if chunk_size >= 8 else 1


def as_lengths(lengths: int | Tensor, n: int, k: Tensor, check: bool) -> Tensor:
    """Lengths ``[B]`` in int32, each at least ``n`` and at most the entries of ``k``."""
    batch, entries = k.shape[0], k.shape[2]
    if isinstance(lengths, int):
        inside = n <= lengths <= entries
        require(inside, f"lengths must be in {n}..{entries}, got {lengths}")
        return torch.full((batch,), lengths, dtype=torch.int32, device=k.device)
    check_index("lengths", lengths, (batch,), k.device)
    if check:
        check_range("lengths", lengths, n, entries + 1)
    return lengths.int()


_automatic = ContextVar("automatic", default="auto")


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Inside the block ``"auto"`` means this backend, for the whole library.

    ``"torch"`` keeps a GPU run off the kernels. ``"triton"`` insists on them wherever the library has
    one: on the CPU that needs the interpreter, and caches have to be made inside the block, because
    the kernels read another layout than the CPU's own.
    """
    require(backend in BACKENDS, f"backend {backend!r} must be one of {', '.join(BACKENDS)}")
    token = _automatic.set(backend)
    try:
        yield
    finally:
        _automatic.reset(token)


def wanted(device: torch.device) -> bool:
    """Whether the library should ask for a kernel at all for tensors on this device; cheap."""
    meaning = _automatic.get()
    return meaning == "triton" or (meaning == "auto" and device.type == "cuda")


def use_triton(
    backend: str, name: str, tensor: Tensor, dim: int | None = None, fault: str | None = None
) -> bool:
    """Whether to start the kernel.

    Parameters
    ----------
    name, tensor
        The argument that decides by its device and dtype.
    dim
        Head size, where there is one.
    fault
        What else, known already, keeps the kernel from running.
    """
    require(backend in BACKENDS, f"backend {backend!r} must be one of {', '.join(BACKENDS)}")
    backend = _automatic.get() if backend == "auto" else backend
    if backend == "torch" or (backend == "auto" and tensor.device.type != "cuda"):
        return False
    if not triton_installed():
        fault = "backend 'triton': triton is not installed"
    elif tensor.device.type != "cuda" and not interpreted():
        fault = f"{name} is on {tensor.device}: backend 'triton' needs a GPU, or TRITON_INTERPRET=1"
    elif tensor.dtype not in DTYPES:
        fault = f"{name} is {tensor.dtype}; the kernel takes float32, float16 and bfloat16"
    elif dim is not None and dim not in HEAD_DIMS:
        fault = f"{name} has heads of {dim}; the kernel takes 64 and 128"
    if fault and backend == "triton":
        raise ValueError(fault)
    return fault is None


def layout_fault(**tensors: Tensor) -> str | None:
    """What keeps a kernel from reading caches in place in pieces of 16 bytes; ``None`` if nothing."""
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if strides(tensor) != strides(tensors[first]):
            return f"{name} must have the strides of {first}"
        if tensor.stride(-1) != 1 or any(step % 16 for step in strides(tensor)):
            return f"{name} must have rows of contiguous values, a multiple of 16 values apart"
        if tensor.data_ptr() % 16:
            return f"{name} must begin at an address divisible by 16"
    return None


def strides(tensor: Tensor) -> tuple[int, ...]:
    """All strides but the last, in elements; 0 for a dimension of one, which is never stepped."""
    steps = zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
    return tuple(0 if size == 1 else step for step, size in steps)


def precision(device: torch.device) -> str:
    """How float32 products are made: three TF32 products on NVIDIA, plain float32 on AMD."""
    return "ieee" if torch.version.hip and device.type == "cuda" else "tf32x3"


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; a small number in the interpreter."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


# ---------------------------------------------------------------- what can be launched
@dataclass(frozen=True)
class Configuration:
    """One compiled version of a kernel that a launcher can pick.

    Attributes
    ----------
    dtype
        Type of the pointers that ``types`` does not name.
    tile
        Values of the ``tl.constexpr`` arguments (``PRECISION`` left out: it depends on the target),
        ``num_warps`` and ``num_stages``.
    dot
        Whether there is a matrix product, so that tensor-core instructions are expected.
    wide
        Whether loads of 16 bytes are expected.
    """

    kernel: Kernel
    dtype: torch.dtype
    tile: Mapping[str, Any]
    types: Mapping[str, str] = field(default_factory=dict)
    dot: bool = True
    wide: bool = True

    @property
    def constants(self) -> dict[str, Any]:
        """The ``tl.constexpr`` arguments."""
        return {name: value for name, value in self.tile.items() if name.isupper()}

    @property
    def launch(self) -> dict[str, int]:
        """The compiler's options."""
        return {name: value for name, value in self.tile.items() if not name.isupper()}

    @property
    def label(self) -> str:
        """Constants and options in words."""
        return " ".join(f"{name}={value}" for name, value in self.tile.items())


def grid_of(**choices: Iterable) -> Iterator[dict[str, Any]]:
    """Every combination, as dictionaries."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))
