"""The kernels compiled for GPUs that are not there: no spills, tensor cores, wide loads."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bdlib.kernels import (
    acceptance_loss,
    chunk_scores,
    compiling,
    launching,
    multi_view,
    sparse_decode,
    split,
    verify,
)
from bdlib.kernels.compiling import TARGETS, Compiled
from bdlib.kernels.lazy import Kernel, interpreted, triton_installed
from bdlib.objectives import TeacherTarget

needs_compiler = pytest.mark.skipif(
    not triton_installed() or interpreted(), reason="needs triton, and not its interpreter"
)
CONFIGURATIONS = compiling.configurations()
# One of each kernel, in bfloat16 with heads of 128 where there are heads: the largest tiles.
SAMPLE = {
    compiling.name_of(c): c
    for c in CONFIGURATIONS
    if c.dtype == torch.bfloat16 and c.constants.get("D", 128) == 128 and c.wide
}


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    """Compile anew: a result of an earlier run proves nothing about the code as it is."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


def row(**changes):
    plain = Compiled("verify", "float16", "D=64", "sm_80", 96, 0, 1024, 0.25, 8, "HMMA", 4)
    return replace(plain, **changes)


# ---------------------------------------------------------------- compiling
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])  # the stored table has the others
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_compiles_without_fault(name, target):
    found = compiling.examine(SAMPLE[name], TARGETS[target])
    assert compiling.faults(SAMPLE[name], found) == []
    assert 0 < found.registers <= 512
    assert 0 < found.occupancy <= 1


@needs_compiler
def test_machine_code_is_that_of_the_target():
    """64 rows of queries: warp-group products on sm_90, and those of tensor memory on sm_100."""
    wanted = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
    configuration = next(
        c
        for c in verify.configurations()
        if c.dtype == torch.float16 and c.tile["D"] == 64 and c.tile["ROWS"] == 64
    )
    for name, product in wanted.items():
        assert compiling.examine(configuration, TARGETS[name]).product == product


@needs_compiler
def test_a_tile_that_is_too_large_is_found_out():
    """The check can fail: 128 float32 rows do not fit the registers."""
    configuration = next(c for c in verify.configurations() if c.dtype == torch.float32)
    large = replace(configuration, tile=configuration.tile | {"ROWS": 128, "num_warps": 4})
    found = compiling.examine(large, TARGETS["sm_80"])
    assert found.spilled > 0
    assert any("spilled" in fault for fault in compiling.faults(large, found))


def test_faults_are_named():
    configuration = verify.configurations()[0]
    for changes, words in (
        ({"spilled": 8}, "8 bytes spilled"),
        ({"shared": 164 << 10}, "bytes of shared memory, limit"),
        ({"products": 0}, "no tensor-core instruction"),
        ({"wide_loads": 0}, "no load of 16 bytes"),
    ):
        (fault,) = compiling.faults(configuration, row(**changes))
        assert words in fault
    assert compiling.faults(configuration, row()) == []


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 32, 0, 4, 1.0),  # 64 warps of 32 registers fill 65,536 exactly
        ("sm_80", 64, 0, 4, 0.5),
        ("sm_80", 255, 0, 4, 8 / 64),
        ("sm_90", 32, 100 << 10, 4, 8 / 64),  # two programs of 101 KiB in 228 KiB
        ("gfx942", 128, 0, 4, 0.5),
        ("gfx942", 256, 40 << 10, 4, 4 / 32),  # one program of 40 KiB in 64 KiB
    ],
)
def test_occupancy(target, registers, shared, warps, expected):
    assert compiling.occupancy(TARGETS[target], registers, shared, warps) == expected


# ---------------------------------------------------------------- what a launch compiles
class Gpu:
    """Stands for a driver with a GPU."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def asked(source, options):
    """What decides the machine code, so that it can be compared."""
    facts = {place: str(found) for place, found in source.attrs.items() if found}
    parts = (source.signature, source.constants, facts)
    stages = (options["num_warps"], options["num_stages"])
    return (
        source.fn.__name__,
        source.fn.__module__,
        *(str(sorted(p.items())) for p in parts),
        stages,
    )


@needs_compiler
def test_launches_ask_for_what_was_compiled(monkeypatch):
    """Through triton's own launch path, up to the compiler: the table has every request, no other."""
    import triton.compiler
    from triton.runtime.driver import driver

    requests = set()

    class Stop(Exception):
        pass

    def compile(source, target, options):
        requests.add(asked(source, options))
        raise Stop

    def getitem(self, grid):
        def start(*arguments, **options):
            with pytest.raises(Stop):
                self.jitted.run(*arguments, grid=grid, warmup=True, **options)

        return start

    monkeypatch.setattr(driver, "_active", Gpu())
    monkeypatch.setattr(triton.compiler, "compile", compile)
    monkeypatch.setattr(Kernel, "__getitem__", getitem)
    for module in (acceptance_loss, chunk_scores, multi_view, sparse_decode, verify):
        monkeypatch.setattr(module, "use_triton", lambda *a, **k: True)
    launch_everything()
    known = {asked(compiling.source_of(c, TARGETS["sm_90"]), c.launch) for c in CONFIGURATIONS}
    assert requests == known


def launch_everything():
    """Every launcher, with all that makes it pick another configuration."""
    for dtype in launching.DTYPES:
        for dim in launching.HEAD_DIMS:
            k = torch.zeros(1, 1, 1000, dim, dtype=dtype)
            for n in (1, 20):
                q = torch.zeros(1, 1, n, dim, dtype=dtype)
                verify.verify(q, k, k, 1000, splits=2)
                for size in (1, 4, 8, 64):
                    chunks = torch.zeros(1, 1, 3, dtype=torch.int64)
                    sparse_decode.sparse_decode(q, k, k, chunks, 1000, chunk_size=size)
                    chunk_scores.chunk_scores(q, k, chunk_size=size)
            own = torch.zeros(2, 1, 4, dim, dtype=dtype, requires_grad=True)
            prefix = torch.zeros(1, 16, dim, dtype=dtype, requires_grad=True)
            chosen, sizes = torch.zeros(2, 1, 5, dtype=torch.int64), torch.tensor([5, 0])
            found = multi_view.multi_view(own, own, own, prefix, prefix, chosen, sizes)
            found.sum().backward()
        for loss in acceptance_loss.LOSSES:
            for size in (96, 97):
                x = torch.zeros(2, size, dtype=dtype, requires_grad=True)
                target = TeacherTarget.from_logits(torch.zeros(2, 50), 7)
                found = acceptance_loss.acceptance_loss(x, target.ids, target.probs, loss)
                found.loss.backward()


# ---------------------------------------------------------------- the stored table
@pytest.fixture(scope="module")
def stored(repository):
    if not (repository / "data" / "results" / "kernels_compiled.csv").is_file():
        pytest.skip("no table is stored; python -m bdlib kernels compile --out data/results")
    return compiling.read_table(repository / "data" / "results")


def test_the_table_has_every_configuration_and_no_fault(stored):
    rows, about = stored
    wanted = {
        (compiling.name_of(c), str(c.dtype).removeprefix("torch."), c.label, target)
        for c in CONFIGURATIONS
        for target in TARGETS
    }
    found = {(r["kernel"], r["dtype"], r["configuration"], r["target"]) for r in rows}
    assert found == wanted
    assert len(rows) == about["rows"] == len(wanted)
    assert about["faults"] == []
    assert all(int(row["spilled"]) == 0 for row in rows)


def test_the_table_was_made_from_this_code(stored):
    """Else: python -m bdlib kernels compile --out data/results"""
    kernels = {compiling.name_of(c): c.kernel for c in CONFIGURATIONS}
    sources = {name: compiling.source_digest(kernel) for name, kernel in kernels.items()}
    assert stored[1]["sources"] == sources


def test_a_digest_sees_the_code_of_helpers():
    seen = compiling.source_digest(verify.verify_kernel)
    assert seen == compiling.source_digest(verify.verify_kernel)
    assert seen != compiling.source_digest(sparse_decode.sparse_decode_kernel)
    assert seen != compiling.source_digest(split.attend)


# ---------------------------------------------------------------- the command
@needs_compiler
@pytest.mark.slow
def test_the_command_writes_a_table(tmp_path):
    command = [sys.executable, "-m", "bdlib", "kernels", "compile", "--out", str(tmp_path)]
    command += ["--kernel", "split", "--target", "sm_90"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 compiled, 0 fault(s)" in done.stdout
    rows, about = compiling.read_table(tmp_path)
    assert len(rows) == about["rows"] == 6
    assert list(about["targets"]) == ["sm_90"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "kernels_compiled.csv",
        "kernels_compiled.json",
    ]


@needs_compiler
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"names": ["flash"]}, "unknown kernel module 'flash'; allowed: chunk_scores"),
        ({"targets": ["sm_70"]}, "unknown target 'sm_70'; allowed: sm_80"),
        ({"workers": 0}, "workers 0 must be at least 1"),
        ({"out": "missing"}, "is not a folder"),
    ],
)
def test_what_the_command_refuses(tmp_path, change, words):
    folder = tmp_path / change.pop("out", "")
    with pytest.raises(ValueError, match=words):
        compiling.compile_all(folder, **change)
    assert list(tmp_path.iterdir()) == []


def test_without_triton_the_message_says_so(monkeypatch):
    monkeypatch.setattr(compiling, "triton_installed", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed; it has wheels for Linux only"):
        compiling.find_tools()
    monkeypatch.setattr(compiling, "triton_installed", lambda: True)
    monkeypatch.setattr(compiling, "interpreted", lambda: True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET is set"):
        compiling.find_tools()
