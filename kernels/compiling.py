"""Compiling every kernel for GPUs that are not there, and reading what came out.

Triton brings its own compilers (``ptxas`` for NVIDIA, LLVM for AMD) and disassemblers, so a machine
without a GPU can say of each kernel, for each target: how many registers a thread takes, whether any
were spilled to memory, how much shared memory a program needs, how many warps fit beside each
other, and which instructions do the products and the loads.

``python -m bdlib kernels compile --out DIR`` does this for all that the launchers can pick and writes
``kernels_compiled.csv`` with a ``.json`` beside it that says what made it.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib
import inspect
import json
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bdlib import assets
from bdlib.kernels.launching import Configuration
from bdlib.kernels.lazy import Device, interpreted, triton_installed

SCHEMA = 1
MODULES = ("chunk_scores", "sparse_decode", "verify", "split", "multi_view", "acceptance_loss")
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Target:
    """A GPU architecture and what a multiprocessor of it holds.

    Attributes
    ----------
    shared_block, shared
        Bytes of shared memory that one program may take, and of a whole multiprocessor.
    registers
        32-bit registers of a quarter of a multiprocessor (a SIMD on AMD).
    warps
        Warps (of ``warp`` threads) that a quarter can hold.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared_block: int
    shared: int
    registers: int
    warps: int
    example: str


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 << 10, 164 << 10, 16384, 16, "A100"),
        Target("sm_90", "cuda", 90, 32, 227 << 10, 228 << 10, 16384, 16, "H100"),
        Target("sm_100", "cuda", 100, 32, 227 << 10, 228 << 10, 16384, 16, "B200"),
        Target("gfx942", "hip", "gfx942", 64, 64 << 10, 64 << 10, 32768, 8, "MI300X"),
    )
}


@dataclass(frozen=True)
class Compiled:
    """One row of the table: what a configuration became on a target.

    Attributes
    ----------
    registers
        32-bit registers a thread takes.
    spilled
        Bytes a thread keeps in memory for want of registers.
    shared
        Bytes of shared memory a program takes.
    occupancy
        Warps that fit on a multiprocessor, over those it can hold at all.
    products, wide_loads
        Tensor-core instructions and loads of 16 bytes, counted in the machine code.
    """

    kernel: str
    dtype: str
    configuration: str
    target: str
    registers: int
    spilled: int
    shared: int
    occupancy: float
    products: int
    product: str
    wide_loads: int


def find_tools() -> dict[str, str]:
    """Paths of ptxas and the disassemblers that the triton wheel brings.

    Raises
    ------
    ValueError
        If triton or one of them is missing, or if this process interprets kernels.
    """
    if not triton_installed():
        raise ValueError("triton is not installed; it has wheels for Linux only")
    if interpreted():
        raise ValueError("TRITON_INTERPRET is set: start without it to compile")
    from triton import knobs

    names = ("ptxas", "ptxas_blackwell", "cuobjdump", "nvdisasm")
    try:
        tools = {name: getattr(knobs.nvidia, name).path for name in names}
    except RuntimeError as error:
        raise ValueError(f"a tool of the triton wheel is missing: {error}") from error
    return tools


def configurations(names: Iterable[str] = MODULES) -> list[Configuration]:
    """All that the launchers of these modules can pick."""
    found = []
    for name in names:
        if name not in MODULES:
            raise ValueError(f"unknown kernel module {name!r}; allowed: {', '.join(MODULES)}")
        found += importlib.import_module(f"bdlib.kernels.{name}").configurations()
    # In float32 few and many rows take the same tile: once is enough.
    return list({(name_of(c), c.dtype, c.label): c for c in found}.values())


def source_of(configuration: Configuration, target: Target) -> Any:
    """What triton compiles: a function with the types, constants and divisibility of its arguments."""
    from triton.compiler import ASTSource

    function = configuration.kernel.jitted
    constants = dict(configuration.constants)
    if "PRECISION" in function.arg_names:
        constants["PRECISION"] = "ieee" if target.backend == "hip" else "tf32x3"
    signature, facts = {}, {}
    for parameter in function.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + configuration.types.get(name, NAMES[configuration.dtype])
        else:
            signature[name] = parameter.annotation_type or "i32"
        if name.endswith(("_ptr", "_stride")):
            facts[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, facts)


def compile_kernel(configuration: Configuration, target: Target) -> Any:
    """What ``triton.compile`` returns: ``.asm`` holds the code at every stage."""
    import triton
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget(target.backend, target.arch, target.warp)
    options = dict(configuration.launch)
    return triton.compile(source_of(configuration, target), target=gpu, options=options)


def examine(configuration: Configuration, target: Target) -> Compiled:
    """Compile and read the machine code."""
    built = compile_kernel(configuration, target)
    if target.backend == "cuda":
        registers, spilled, code = _read_cubin(built.asm["cubin"])
        products = re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", code)
        wide = re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128\b", code)
        spilled += 4 * len(re.findall(r"\b(?:STL|LDL)\b", code))
    else:
        code = built.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", code)
        spilled = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", code)
        products = re.findall(r"\b(v_mfma)_", code)
        wide = re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)
    shared, warps = built.metadata.shared, built.metadata.num_warps
    return Compiled(
        kernel=name_of(configuration),
        dtype=str(configuration.dtype).removeprefix("torch."),
        configuration=configuration.label,
        target=target.name,
        registers=registers,
        spilled=spilled,
        shared=shared,
        occupancy=round(occupancy(target, registers, shared, warps), 3),
        products=len(products),
        product=products[0] if products else "",
        wide_loads=len(wide),
    )


def name_of(configuration: Configuration) -> str:
    """Module and function: ``verify.verify_kernel``."""
    fn = configuration.kernel.fn
    return f"{fn.__module__.rpartition('.')[2]}.{fn.__name__}"


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in the compiler's output")
    return int(found[1])


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack and local memory, and the disassembly."""
    tools = find_tools()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(tools["cuobjdump"], "-res-usage", str(path))
        code = _run(tools["nvdisasm"], "-c", str(path))
    spilled = _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
    return _number(r"REG:(\d+)", usage), spilled, code


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def occupancy(target: Target, registers: int, shared: int, warps: int) -> float:
    """Warps that fit on a multiprocessor, over those it can hold.

    Registers are handed to a warp in pieces of 8 a thread; on NVIDIA a program takes 1 KiB of shared
    memory besides its own. At most 32 programs run on a multiprocessor.
    """
    a_warp = -(-max(registers, 1) // 8) * 8 * target.warp
    quarter = min(target.warps, target.registers // a_warp)
    taken = shared + (1024 if target.backend == "cuda" else 0)
    programs = min(4 * quarter // warps, target.shared // taken if taken else 32, 32)
    return programs * warps / (4 * target.warps)


def faults(configuration: Configuration, row: Compiled) -> list[str]:
    """What must not be: spills, too much shared memory, no tensor cores, narrow loads."""
    target = TARGETS[row.target]
    where = f"{row.kernel} {row.dtype} {row.configuration} on {row.target}"
    found = []
    if row.spilled:
        found.append(f"{where}: {row.spilled} bytes spilled")
    if row.shared > target.shared_block:
        found.append(f"{where}: {row.shared} bytes of shared memory, limit {target.shared_block}")
    if configuration.dot and not row.products:
        found.append(f"{where}: no tensor-core instruction")
    if configuration.wide and not row.wide_loads:
        found.append(f"{where}: no load of 16 bytes")
    return found


def source_digest(device: Device) -> str:
    """SHA-256 over the code of a kernel and of the device functions it calls; comments do not count."""
    parts, seen = [], set()

    def visit(fn: Callable) -> None:
        if fn in seen:
            return
        seen.add(fn)
        parts.append(_dump(ast.parse(textwrap.dedent(inspect.getsource(fn)))))
        for name in fn.__code__.co_names:
            called = getattr(fn.__globals__.get(name), "fn", None)
            if inspect.isfunction(called):
                visit(called)

    visit(device.fn)
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


def _dump(node: Any) -> str:
    """``ast.dump`` as Python 3.11 writes it: later ones add fields and leave out empty ones."""
    if isinstance(node, list):
        return f"[{', '.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name in node._fields:
        value = getattr(node, name, None)
        optional = value is None and getattr(type(node), name, ...) is None
        if not optional and (name != "type_params" or value):
            fields.append(f"{name}={_dump(value)}")
    return f"{type(node).__name__}({', '.join(fields)})"


# ---------------------------------------------------------------- the table
def compile_all(
    out: Path,
    names: Sequence[str] = MODULES,
    targets: Sequence[str] = tuple(TARGETS),
    workers: int = 1,
    progress: Callable[[Compiled], None] | None = None,
) -> tuple[list[Compiled], list[str]]:
    """Compile all configurations, write the table to the folder ``out``, and return rows and faults.

    Raises
    ------
    ValueError
        If a name is unknown, the folder is not there, or a tool is missing.
    """
    from bdlib import measure

    tools = find_tools()
    for name in targets:
        if name not in TARGETS:
            raise ValueError(f"unknown target {name!r}; allowed: {', '.join(TARGETS)}")
    if workers < 1:
        raise ValueError(f"workers {workers} must be at least 1")
    table, sidecar = (out / f"kernels_compiled{suffix}" for suffix in (".csv", ".json"))
    measure.check_output(table)
    todo = configurations(names)
    jobs = [(index, name) for index in range(len(todo)) for name in targets]
    rows = []
    with ProcessPoolExecutor(workers) as pool:
        work = pool.map(_job, [(tuple(names), *job) for job in jobs], chunksize=4)
        for row in work:
            rows.append(row)
            if progress is not None:
                progress(row)
    bad = [f for (i, _), row in zip(jobs, rows, strict=True) for f in faults(todo[i], row)]
    _write_csv(table, rows)
    measure.write_json(sidecar, _about(tools, todo, targets, len(rows), bad))
    return rows, bad


def _job(job: tuple[tuple[str, ...], int, str]) -> Compiled:
    names, index, target = job
    return examine(configurations(names)[index], TARGETS[target])


def _about(tools: dict, todo: list[Configuration], targets: Sequence[str], rows: int, bad: list):
    import triton

    version = re.search(r"V[\d.]+", _run(tools["ptxas"], "--version"))
    kernels = {name_of(configuration): configuration.kernel for configuration in todo}
    return {
        "schema": SCHEMA,
        "made_by": "python -m bdlib kernels compile",
        "triton": triton.__version__,
        "torch": torch.__version__.partition("+")[0],
        "ptxas": version[0] if version else "",
        "targets": {name: asdict(TARGETS[name]) for name in targets},
        "rows": rows,
        "faults": bad,
        "sources": {name: source_digest(kernel) for name, kernel in sorted(kernels.items())},
    }


def summary(rows: Sequence[Compiled]) -> str:
    """A line for each kernel and target: the most that any of its configurations takes."""
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.target), []).append(row)
    lines = [
        f"{'kernel':<34} {'target':<8} {'count':>5} {'registers':>9} {'spilled':>7} {'KiB':>6}"
    ]
    for (kernel, target), group in sorted(groups.items()):
        registers, spilled = max(r.registers for r in group), max(r.spilled for r in group)
        shared = max(r.shared for r in group) / 1024
        numbers = f"{len(group):>5} {registers:>9} {spilled:>7} {shared:>6.1f}"
        lines.append(f"{kernel:<34} {target:<8} {numbers}")
    return "\n".join(lines)


def _write_csv(path: Path, rows: list[Compiled]) -> None:
    """Write under a temporary name, then rename: the file is complete or absent."""
    with (
        assets.replacing(path) as scratch,
        scratch.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, [f.name for f in fields(Compiled)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_table(folder: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Rows of the stored table, as text, and what its sidecar says."""
    about = json.loads((folder / "kernels_compiled.json").read_text(encoding="utf-8"))
    if about.get("schema") != SCHEMA:
        raise ValueError(f"{folder}: a table of schema {about.get('schema')}, need {SCHEMA}")
    with (folder / "kernels_compiled.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), about
