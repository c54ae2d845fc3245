"""Find, run and check the notebooks.

A lesson runs top to bottom from a cell tagged ``parameters`` whose ``profile`` is
``"quick"`` (continuous integration), ``"cpu"`` (the full lesson on a laptop) or
``"gpu"``. A lesson is stored with the outputs of one complete run, without widget state
(which refers to a kernel that is gone) and without anything that tells one machine from
another; :func:`check` lists what breaks that, :func:`strip` repairs what can be.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdlib import assets

PROFILES = ("quick", "cpu", "gpu")
CELL_SECONDS = 600  # that a cell may take in the quick profile
MAX_BYTES = 1_000_000
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_PARAMETERS = "parameters"
# The first folder of a path that belongs to one machine, not to the lesson.
_MACHINE_PATH = re.compile(
    r"(?<![\w.~-])(?:/(?:home|root|Users|tmp|private|mnt|opt|srv|workspace)/[\w.-]|[A-Za-z]:\\\w)"
)


class LessonError(ValueError):
    """A notebook or a profile that does not exist."""


@dataclass(frozen=True)
class Failure:
    """A notebook that did not run, and the cell (counted from 1) that stopped it."""

    notebook: str
    cell: int | None
    error: str

    def __str__(self) -> str:
        place = self.notebook if self.cell is None else f"{self.notebook}, cell {self.cell}"
        return f"{place}: {self.error}"


def folder() -> Path:
    """The folder of the lessons: in the checkout, else in the working directory."""
    root = assets.checkout() or Path.cwd()
    return root / "notebooks"


def label(path: Path) -> str:
    """The path of a notebook relative to the lessons' folder, where it is inside it."""
    try:
        return path.resolve().relative_to(folder().resolve()).as_posix()
    except ValueError:
        return path.name


def find(names: Iterable[str] | None = None) -> list[Path]:
    """Notebooks in order; all of them, or those named by number, name or path.

    Raises
    ------
    LessonError
        If a name matches no notebook.
    """
    known = sorted(
        path
        for path in folder().rglob("*.ipynb")
        if not any(part.startswith(".") for part in path.relative_to(folder()).parts)
    )
    if not names:
        return known
    chosen: list[Path] = []
    for name in names:
        plain = name.removesuffix(".ipynb")
        matches = [
            path
            for path in known
            if plain in (path.stem, label(path).removesuffix(".ipynb"))
            or (plain.isdigit() and path.stem.startswith(f"{plain}_") and path.parent == folder())
        ]
        if not matches and Path(name).is_file():
            matches = [Path(name)]
        if not matches:
            listing = ", ".join(label(path) for path in known) or "none"
            raise LessonError(f"no notebook {name!r}; known: {listing}")
        chosen += [path for path in matches if path not in chosen]
    return chosen


# -------------------------------------------------------------------------- running


def run(
    paths: Iterable[Path],
    profile: str = "quick",
    out: Path | None = None,
    progress: bool = True,
) -> list[Failure]:
    """Run notebooks one after another with papermill; return those that failed.

    Parameters
    ----------
    profile
        ``quick``, ``cpu`` or ``gpu``, passed to each notebook.
    out
        Folder for the executed copies; ``build/notebooks`` of the checkout (or of the
        working directory) if None.

    Raises
    ------
    LessonError
        If ``profile`` is unknown.
    """
    if profile not in PROFILES:
        raise LessonError(f"unknown profile {profile!r}; allowed: {', '.join(PROFILES)}")
    paths = list(paths)
    out = out or (assets.checkout() or Path.cwd()) / "build" / "notebooks"
    failures = []
    for number, path in enumerate(paths, start=1):
        if progress:
            print(f"[{number}/{len(paths)}] {label(path)} ({profile})", file=sys.stderr, flush=True)
        try:
            destination = out / label(path)
            destination.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LessonError(f"cannot write to {out}: {error.strerror}") from error
        failure = _run_one(path, destination, profile, progress)
        if failure is not None:
            failures.append(failure)
            if progress:
                print(f"  failed: {failure}", file=sys.stderr, flush=True)
    return failures


def _run_one(path: Path, destination: Path, profile: str, progress: bool) -> Failure | None:
    import papermill

    from bdlib.patient import PatientManager

    # papermill stores the copy after every cell: under another name until the run is over.
    scratch = destination.resolve().with_name(f".{path.stem}.writing.ipynb")
    # A kernel starts in an empty folder, so that a lesson cannot rely on where it lies.
    with tempfile.TemporaryDirectory() as empty:
        try:
            papermill.execute_notebook(
                path.resolve(),
                scratch,
                parameters={"profile": profile},
                kernel_name="python3",
                language="python",
                cwd=empty,
                progress_bar={"desc": "  cells"} if progress else False,
                execution_timeout=CELL_SECONDS if profile == "quick" else None,
                kernel_manager_class=PatientManager,
            )
            os.replace(scratch, destination)
        except papermill.PapermillExecutionError as error:
            os.replace(scratch, destination)  # it shows the error where it happened
            cell = _stored_cell(path, error.cell_index)
            return Failure(label(path), cell, f"{error.ename}: {error.evalue}")
        except OSError as error:
            return Failure(label(path), None, f"{error}; the copy was to be {destination}")
        except Exception as error:  # a kernel that does not start or dies, a damaged notebook
            return Failure(label(path), None, f"{type(error).__name__}: {error}")
        finally:
            scratch.unlink(missing_ok=True)
    return None


def _stored_cell(path: Path, index: int) -> int:
    """The number, from 1, of the stored cell that ran as cell ``index``, from 0.

    papermill puts a cell of its own after the one that is tagged ``parameters``, or
    before all others if none is.
    """
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    tagged = [n for n, cell in enumerate(cells) if _PARAMETERS in cell.metadata.get("tags", [])]
    added = tagged[0] + 1 if tagged else 0
    return index + 1 if index < added else index


# ------------------------------------------------------------------------- checking


def check(path: Path) -> list[str]:
    """What is wrong with the stored form of a notebook, one line for each fault."""
    import nbformat

    name = label(path)
    faults: list[str] = []
    size = path.stat().st_size
    if size > MAX_BYTES:
        faults.append(f"{size:,} bytes, more than {MAX_BYTES:,}")
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # several unrelated types, one meaning
        return [f"{name}: not a valid notebook: {str(error).splitlines()[0]}"]
    faults += _form_faults(notebook)
    for number, cell in enumerate(notebook.cells, start=1):
        faults += [f"cell {number}: {fault}" for fault in _cell_faults(cell)]
    return [f"{name}: {fault}" for fault in faults]


def _form_faults(notebook: Any) -> Iterator[str]:
    """Faults of the notebook as a whole."""
    if "widgets" in notebook.metadata:
        yield "widget state is stored; run: python -m bdlib notebooks --strip"
    if "papermill" in notebook.metadata:
        yield "papermill metadata is stored; run: python -m bdlib notebooks --strip"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not python3"
    tagged = [cell for cell in notebook.cells if _PARAMETERS in cell.metadata.get("tags", [])]
    if len(tagged) != 1 or tagged[0].cell_type != "code":
        yield f"{len(tagged)} cells are tagged {_PARAMETERS!r}; exactly one code cell must be"
    elif not re.search(r"^profile\b.*=", tagged[0].source, re.MULTILINE):
        yield f"the {_PARAMETERS!r} cell does not set profile"
    if any("injected-parameters" in cell.metadata.get("tags", []) for cell in notebook.cells):
        yield "this is a copy made by papermill: it holds a cell of injected parameters"
    headings = [
        number
        for number, cell in enumerate(notebook.cells, start=1)
        if cell.cell_type == "markdown"
        for _ in _first_level_headings(cell.source)
    ]
    if headings != [1] or not notebook.cells[0].source.startswith("# "):
        yield f"exactly one first-level heading must open the first cell; found in {headings}"
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        yield "the stored outputs are not those of one run from top to bottom"
    if code and not any(cell.outputs for cell in code):
        yield "no output is stored"


def _first_level_headings(source: str) -> list[str]:
    outside = re.sub(r"^(```|~~~).*?^\1", "", source, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^# .*", outside, re.MULTILINE)


def _cell_faults(cell: Any) -> Iterator[str]:
    """Faults of one cell and its outputs."""
    texts = [cell.source]
    for output in cell.get("outputs", []):
        if output.output_type == "error":
            yield f"an error is stored: {output.ename}: {output.evalue}"
        if _WIDGET_VIEW in output.get("data", {}):
            yield "a widget view is stored; run: python -m bdlib notebooks --strip"
        texts.append(output.get("text", ""))
        texts += [
            value
            for kind, value in output.get("data", {}).items()
            if isinstance(value, str) and not kind.startswith("image/")
        ]
    for text in texts:
        for found in _machine_paths(text):
            yield f"a path of one machine is stored: {found!r}"


def _machine_paths(text: str) -> list[str]:
    own = [Path.home(), Path(sys.prefix), Path(tempfile.gettempdir())]
    own += [root] if (root := assets.checkout()) else []
    found = [str(path) for path in own if len(path.parts) > 1 and f"{path}/" in text]
    match = _MACHINE_PATH.search(text)
    if match and not found:
        found.append(text[match.start() :].split()[0][:60])
    return found[:1]


def strip(path: Path) -> bool:
    """Remove widget state, widget views and run metadata; say whether anything was."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    before = nbformat.writes(notebook)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if "outputs" in cell:
            cell.outputs = [
                output for output in cell.outputs if _WIDGET_VIEW not in output.get("data", {})
            ]
    if nbformat.writes(notebook) == before:
        return False
    nbformat.write(notebook, path)
    return True
