"""Triton functions that are written at the top level of a file and decorated only when first used.

``triton.jit`` must be called with triton imported, and it reads TRITON_INTERPRET at that moment. A
file of this package therefore says ``@kernel`` (started from Python, over a grid) or ``@device``
(called by kernels) and keeps the name ``tl`` free; on first use both are exchanged for the real
thing. So ``import bdlib.kernels`` needs no triton, and the kernel still reads as any Triton kernel.

Two rules let :mod:`bdlib.kernels.compiling` know without a GPU what a launch compiles: arguments named
``*_ptr`` and ``*_stride`` are divisible by 16 (the launchers see to it), and triton makes no special
version for the values of other integers.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any

tl: Any = None  # stands for triton.language until the first use


@functools.cache
def triton_installed() -> bool:
    """Whether triton can be imported (its wheels are for Linux)."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether this process runs kernels in triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


class Device:
    """A Triton function called by kernels."""

    def __init__(self, fn: Callable) -> None:
        self.fn, self._jitted = fn, None
        functools.update_wrapper(self, fn)

    @property
    def jitted(self) -> Any:
        """What ``triton.jit`` makes of the function."""
        if self._jitted is None:
            import triton

            if interpreted():
                from bdlib.kernels import interpreter

                interpreter.repair()
            self._jitted = triton.jit(self.fn, do_not_specialize=self.plain)
            scope = self.fn.__globals__
            scope["tl"] = triton.language
            helpers = [(name, value) for name, value in scope.items() if type(value) is Device]
            scope.update({name: value.jitted for name, value in helpers})
        return self._jitted

    @property
    def plain(self) -> list[str]:
        """Integers that get no special version: neither pointers, strides nor constants."""
        return [
            name
            for name, parameter in inspect.signature(self.fn).parameters.items()
            if "constexpr" not in str(parameter.annotation)
            and not name.endswith(("_ptr", "_stride"))
        ]


class Kernel(Device):
    """A Triton function started from Python: ``kernel[grid](...)``."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return self.jitted[grid]


device, kernel = Device, Kernel
