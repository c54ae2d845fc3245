"""The lessons can be read by everyone: headings in order, figures in words, colours told apart.

And read anywhere: the static pages that ``make html`` writes carry the same words as alternative text.
"""

import itertools
import re

import nbformat
import numpy as np
import pytest

from bdlib import figures, lessons, site

NOTEBOOKS = lessons.find()


def headings(notebook):
    """Levels of all headings outside code blocks, in order."""
    levels = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"^(```|~~~).*?^\1", "", cell.source, flags=re.MULTILINE | re.DOTALL)
            levels += [len(marks) for marks in re.findall(r"^(#{1,6}) \S", text, re.MULTILINE)]
    return levels


def heading_faults(levels):
    faults = [] if levels[:1] == [1] and levels.count(1) == 1 else ["not exactly one H1, first"]
    faults += [f"H{b} after H{a}" for a, b in itertools.pairwise(levels) if b > a + 1]
    return faults


def figure_faults(notebook):
    found = site.figures_of(notebook)
    short = [cell.id for cell, words in found if words is None or len(words) < 40]
    return [f"the figure of cell {name} is not followed by its words" for name in short]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lessons.label)
def test_headings_are_in_order_and_figures_are_in_words(path):
    notebook = nbformat.read(path, as_version=4)
    assert heading_faults(headings(notebook)) + figure_faults(notebook) == []


def test_such_faults_are_found():
    assert heading_faults([1, 2, 3, 2]) == []
    assert heading_faults([1, 3]) == ["H3 after H1"]
    assert heading_faults([1, 2, 1]) == ["not exactly one H1, first"]
    assert heading_faults([]) == ["not exactly one H1, first"]
    v4 = nbformat.v4
    picture = v4.new_code_cell(outputs=[v4.new_output("display_data", data={"image/png": ""})])
    words = v4.new_markdown_cell(
        "*In words:* one line rises from the left to the right side.\n\nSo."
    )
    code, other = v4.new_code_cell("1"), v4.new_code_cell(outputs=picture.outputs)
    short = v4.new_markdown_cell("*In words:* a line.")
    for cells, count in (
        ([picture, words], 0),
        ([picture, code, words], 0),
        ([picture], 1),
        ([picture, other, words], 1),
        ([picture, short], 1),
    ):
        assert len(figure_faults(v4.new_notebook(cells=cells))) == count
    fenced = v4.new_markdown_cell("# T\n```\n### no heading\n```\n## S")
    assert headings(v4.new_notebook(cells=[fenced])) == [1, 2]


# ------------------------------------------------------------------------- colours

# What dichromats see, as matrices on linear RGB (Machado, Oliveira and Fernandes, 2009, severity 1).
SEEN = {
    "full": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def linear(color):
    """Linear RGB of ``#rrggbb``."""
    values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(color, sight):
    """CIE L*a*b* of a colour as someone with this sight sees it."""
    xyz = np.array(TO_XYZ) @ np.clip(np.array(SEEN[sight]) @ linear(color), 0, 1)
    ratio = xyz / [0.9505, 1.0, 1.089]
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def difference(a, b, sight):
    """CIE 1976 colour difference; about 2 is just noticeable side by side."""
    return float(np.linalg.norm(lab(a, sight) - lab(b, sight)))


def contrast(a, b):
    """Contrast ratio of WCAG 2, 1 to 21."""
    light, dark = sorted((float(np.array(TO_XYZ[1]) @ linear(c)) for c in (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_measure_of_colours():
    assert difference("#ffffff", "#000000", "full") == pytest.approx(100, abs=0.1)
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    # Red and green of equal lightness: far apart for most, near for a deuteranope.
    assert difference("#c04000", "#607000", "full") > 2 * difference("#c04000", "#607000", "deutan")


@pytest.mark.parametrize("sight", SEEN)
def test_neighbouring_series_are_told_apart(sight):
    """The first four colours of a figure differ for every sight; all have markers of their own."""
    for a, b in itertools.combinations(figures.CYCLE[:4], 2):
        assert difference(a, b, sight) > 15, (a, b, sight)
    for a, b in itertools.pairwise(figures.CYCLE):
        assert difference(a, b, sight) > 10, (a, b, sight)
    assert len(set(figures.MARKERS)) == len(figures.CYCLE) == len(figures.MARKERS)


def test_text_is_readable_on_every_token_background():
    for kind, (background, decoration) in figures.TOKEN_STYLES.items():
        assert contrast(background, "#000000") > 7, kind
        assert decoration in ("none", "underline", "line-through")
    # Rejected and accepted drafts differ by more than their colour.
    assert figures.TOKEN_STYLES["rejected"][1] != figures.TOKEN_STYLES["accepted"][1]


# ------------------------------------------------------------------------- pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    return site.build(out, lessons.find(["00"])[:1]), out


def test_pages_need_no_kernel_and_lead_to_each_other(pages):
    (index, lesson), out = pages
    assert (index, lesson) == (out / "index.html", out / "00_start_here.html")
    start = index.read_text(encoding="utf8")
    assert 'href="00_start_here.html"' in start
    assert ".ipynb" not in start
    assert "<table>" in start
    page = lesson.read_text(encoding="utf8")
    notebook = nbformat.read(lessons.find(["00"])[0], as_version=4)
    assert f"<title>{notebook.cells[0].source.splitlines()[0][2:]}</title>" in page
    assert not re.search(r'href="[^"]*\.ipynb', page)
    assert 'lang="en"' in page
    assert page.count('<a href="index.html">All lessons</a>') == 1
    assert page.count("<h1") == 1


def test_every_picture_of_a_page_has_its_words(pages):
    (_, lesson), _ = pages
    notebook = nbformat.read(lessons.find(["00"])[0], as_version=4)
    words = [site.plain(said) for _, said in site.figures_of(notebook)]
    alts = re.findall(r'<img[^>]*?alt="([^"]*)"', lesson.read_text(encoding="utf8"), re.DOTALL)
    assert words
    assert len(alts) == lesson.read_text(encoding="utf8").count("<img")
    import html

    assert [html.unescape(alt) for alt in alts] == words


def test_a_page_in_a_folder_leads_back(tmp_path):
    (page,) = site.build(tmp_path, lessons.find(["solutions/00_start_here"]))[1:]
    assert page == tmp_path / "solutions" / "00_start_here.html"
    assert 'href="../index.html"' in page.read_text(encoding="utf8")


def test_a_sentence_loses_its_marks():
    assert (
        site.plain("a *very* `short` [link](x.ipynb)\nof $\\gamma$") == "a very short link of gamma"
    )


def test_a_readme_without_lessons_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("# T\n\n## Other\n")
    with pytest.raises(ValueError, match=r"README.md has no section '## The lessons'"):
        site.index_page(tmp_path / "README.md")
    (tmp_path / "x.ipynb").write_text("{")
    with pytest.raises(ValueError, match=r"x\.ipynb is not a valid notebook"):
        site.lesson_page(tmp_path / "x.ipynb")


# ------------------------------------------------------------------ the README's examples


def example(repository, heading):
    """The first Python block under a heading of the README."""
    section = (repository / "README.md").read_text().split(f"\n## {heading}\n")[1]
    return section.split("```python\n")[1].split("```")[0]


def test_the_example_of_a_policy_decodes(repository, monkeypatch):
    import tiny
    import torch

    from bdlib import selection
    from bdlib.decoding import generate
    from bdlib.drafters import SelfDrafter

    monkeypatch.setattr(selection, "POLICIES", dict(selection.POLICIES))
    exec(example(repository, "Add a policy"), {"__name__": "example"})
    policy = selection.make_policy("largest_keys")
    keys = torch.ones(1, 1, 20, 4)
    keys[0, 0, 5] = 9
    assert 5 in policy.select(keys, 8, None, None).indices
    target, prompt = tiny.model(), tiny.text(60)
    drafter = SelfDrafter(target, policy, 24)
    found = generate(target, prompt, drafter, gamma=3, max_new_tokens=12)
    assert found.tokens == tiny.greedy(target, prompt, 12)
    assert 0 < drafter.kv_entries <= 24


def test_the_example_of_a_kernel_is_its_reference(repository, tmp_path):
    import os
    import subprocess
    import sys

    pytest.importorskip("triton")
    (tmp_path / "key_norms.py").write_text(example(repository, "Add a kernel"))
    program = (
        "import torch, key_norms as m\n"
        "for n in (1, 63, 100):\n"
        "    k = torch.randn(2, n, 64)\n"
        "    found = m.key_norms(k, backend='triton')\n"
        "    assert torch.allclose(found, m.reference(k), atol=1e-5), n\n"
        "    assert torch.equal(m.key_norms(k), m.reference(k))\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(repository), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_what_binder_needs_is_there(repository):
    import os
    import subprocess
    import tomllib

    import yaml

    environment = yaml.safe_load((repository / "binder" / "environment.yml").read_text())
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    (python,) = [one for one in environment["dependencies"] if one.startswith("python=")]
    assert tuple(map(int, python.split("=")[1].split("."))) >= (3, 11)
    assert project["requires-python"] == ">=3.11"
    script = repository / "binder" / "postBuild"
    assert os.access(script, os.X_OK)
    assert "python -m bdlib fetch" in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_the_glossary_has_names_that_are_in_the_code(repository):
    section = (repository / "README.md").read_text().split("\n## Glossary\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if "|" in line]
    assert all(len(row) == 4 for row in rows)
    code = " ".join(path.read_text() for path in (repository / "bdlib").glob("*.py"))
    names = [
        n for row in rows for quoted in re.findall(r"`([\w.]+)`", row[1]) for n in quoted.split(".")
    ]
    assert len(names) > 20
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []
