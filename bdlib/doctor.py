"""What this machine has that the lessons use, for ``python -m bdlib doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from bdlib import __version__, assets

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "jupyterlab", "numpy")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def examine() -> list[tuple[str, str]]:
    """Rows of (what, value). Nothing is fetched; the attention kernel may be compiled."""
    rows = [("bdlib", __version__), ("python", f"{platform.python_version()} ({sys.executable})")]
    rows += [(package, _version(package)) for package in _PACKAGES]
    rows += [("platform", platform.platform()), ("cpu", cpu_name()), ("cpu flags", _cpu_flags())]
    rows += _torch_rows()
    rows += [("memory", _memory()), ("data folder", _data_folder())]
    for package in assets.manifest().packages:
        try:
            found = assets.state(package)
        except assets.AssetError as error:
            found = str(error)
        else:
            if found == "absent":
                found = f"absent; run: {assets.FETCH_COMMAND}"
        rows.append((f"asset {package.name}", found))
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_lines(key: str) -> str:
    """The first value of a key in /proc/cpuinfo, or nothing where there is none."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() == key:
                return value.strip()
    except OSError:
        pass
    return ""


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    return _cpu_lines("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> str:
    flags = set((_cpu_lines("flags") or _cpu_lines("features")).split())
    return " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "unknown"


def _torch_rows() -> list[tuple[str, str]]:
    try:
        import torch
    except ImportError as error:
        return [("torch import", f"fails: {error}")]
    from bdlib.kernels import native

    rows = [("torch threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")]
    rows.append(("steps in C", native.state()))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        rows.append(("cuda", f"{torch.version.cuda}: {', '.join(names)}"))
    else:
        rows.append(("cuda", "none; the lessons run on the CPU"))
    return rows


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available"


def _data_folder() -> str:
    root = assets.data_root()
    nearest = next(path for path in (root, *root.parents) if path.exists())
    writable = "writable" if os.access(nearest, os.W_OK) else "not writable"
    return f"{root} ({'present' if root.exists() else 'not there yet'}, {writable})"
