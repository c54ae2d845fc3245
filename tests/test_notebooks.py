"""Every notebook runs with the quick profile, and is stored in its final form.

Notebooks are found by themselves: there is no list to forget one in.
"""

import nbformat
import pytest

from bdlib import lessons

NOTEBOOKS = lessons.find()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lessons.label)
def test_stored_form(path):
    assert lessons.check(path) == []


@pytest.mark.slow
# The solutions run once, with nbval.
@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.parent.name != "solutions"], ids=lessons.label
)
def test_runs_with_papermill(path, tmp_path):
    assert lessons.run([path], profile="quick", out=tmp_path, progress=False) == []


# ------------------------------------------------------- the functions used above


def make(path, *sources, tags=("parameters",)):
    """A stored notebook: a title, a parameters cell, then the given code cells."""
    cells = [nbformat.v4.new_markdown_cell("# Title")]
    for number, source in enumerate(('profile: str = "quick"', *sources), start=1):
        cell = nbformat.v4.new_code_cell(source, execution_count=number)
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="ok\n")]
        cells.append(cell)
    cells[1].metadata.tags = list(tags)
    cells[1].outputs = []
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, path)
    return notebook


def test_sound_notebook_has_no_faults(tmp_path):
    path = tmp_path / "sound.ipynb"
    make(path, "print('ok')")
    assert lessons.check(path) == []
    assert lessons.strip(path) is False


FAULTS = {
    "widgets": (lambda n: n.metadata.update(widgets={}), "widget state"),
    "papermill": (lambda n: n.metadata.update(papermill={}), "papermill metadata"),
    "copy": (
        lambda n: n.cells[2].metadata.update(tags=["injected-parameters"]),
        "a copy made by papermill",
    ),
    "kernel": (lambda n: n.metadata.kernelspec.update(name="other"), "kernel is not python3"),
    "tag": (lambda n: n.cells[1].metadata.update(tags=[]), "0 cells are tagged"),
    "profile": (lambda n: n.cells[1].update(source="x = 1"), "does not set profile"),
    "headings": (
        lambda n: n.cells.append(nbformat.v4.new_markdown_cell("# Again")),
        "exactly one first-level heading",
    ),
    "title": (lambda n: n.cells[0].update(source="## Title"), "exactly one first-level heading"),
    "order": (lambda n: n.cells[2].update(execution_count=7), "one run from top to bottom"),
    "outputs": (lambda n: n.cells[2].update(outputs=[]), "no output is stored"),
    "error": (
        lambda n: n.cells[2].outputs.append(
            nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[])
        ),
        "cell 3: an error is stored: E: e",
    ),
    "path": (
        lambda n: n.cells[2].update(source="open('/" + "home/me/file')"),
        "cell 3: a path of one machine",
    ),
    "size": (lambda n: n.cells[0].update(source="# T\n" + "x" * 1_000_001), "more than 1,000,000"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found(tmp_path, name):
    damage, message = FAULTS[name]
    path = tmp_path / "faulty.ipynb"
    notebook = make(path, "print('ok')")
    damage(notebook)
    nbformat.write(notebook, path)
    faults = lessons.check(path)
    assert len(faults) == 1
    assert message in faults[0]


def test_heading_inside_code_block_is_not_a_heading(tmp_path):
    path = tmp_path / "fence.ipynb"
    notebook = make(path, "print('ok')")
    notebook.cells.append(nbformat.v4.new_markdown_cell("```python\n# a comment\n```"))
    nbformat.write(notebook, path)
    assert lessons.check(path) == []


def test_strip_removes_what_refers_to_a_kernel(tmp_path):
    path = tmp_path / "widget.ipynb"
    notebook = make(path, "slider")
    notebook.metadata.update(widgets={"state": {}}, papermill={"input_path": "x"})
    notebook.cells[2].metadata["papermill"] = {}
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "s"}
    notebook.cells[2].outputs.append(nbformat.v4.new_output("display_data", data=view))
    nbformat.write(notebook, path)
    assert len(lessons.check(path)) == 3
    assert lessons.strip(path) is True
    assert lessons.check(path) == []


def test_failing_cell_is_named_as_it_is_stored(tmp_path):
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    make(good, "assert profile == 'cpu'")
    make(bad, "print('ok')", "raise ValueError('on purpose')")
    out = tmp_path / "out"
    (failure,) = lessons.run([good, bad], profile="cpu", out=out, progress=False)
    assert str(failure) == "bad.ipynb, cell 4: ValueError: on purpose"
    assert (out / "good.ipynb").is_file()
    with pytest.raises(lessons.LessonError, match="unknown profile 'fast'; allowed: quick"):
        lessons.run([good], profile="fast")


def test_lesson_kernels_are_offline(tmp_path):
    path = tmp_path / "net.ipynb"
    make(path, "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)")
    (failure,) = lessons.run([path], out=tmp_path / "out", progress=False)
    assert "offline" in failure.error


def test_find_takes_numbers_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "folder", lambda: tmp_path)
    (tmp_path / "solutions").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("01_b", "00_a", "solutions/01_b_solution", ".ipynb_checkpoints/00_a"):
        make(tmp_path / f"{name}.ipynb")
    labels = [lessons.label(path) for path in lessons.find()]
    assert labels == ["00_a.ipynb", "01_b.ipynb", "solutions/01_b_solution.ipynb"]
    for name in ("01", "01_b", "01_b.ipynb", str(tmp_path / "01_b.ipynb")):
        assert [lessons.label(path) for path in lessons.find([name])] == ["01_b.ipynb"]
    with pytest.raises(lessons.LessonError, match=r"no notebook '7'; known: 00_a\.ipynb"):
        lessons.find(["7"])
