"""The static pages need no network and no script: formulas are pictures, each with its TeX in words."""

import re
import xml.etree.ElementTree as ET
from html import unescape

import nbformat
import pytest

from bdlib import lessons, site


def formulas(path):
    """TeX of every formula of a lesson, and whether it stands on a line of its own."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"```.*?```|`[^`\n]*`", "", cell.source, flags=re.DOTALL)
            for shown, inline in re.findall(r"\$\$(.+?)\$\$|(?<!\\)\$([^$]+?)\$", text, re.DOTALL):
                yield shown or inline, bool(shown)


def test_every_formula_of_the_lessons_can_be_drawn():
    found = {one for path in lessons.find() for one in formulas(path)}
    assert len(found) > 100
    assert [tex for tex, display in found if "<svg" not in site.formula(tex, display)] == []


def test_a_formula_is_a_picture_on_the_line_of_its_text():
    drawn = ET.fromstring(site.formula(r"a < \frac{1}{2}"))
    assert drawn.get("aria-label") == r"a < \frac{1}{2}"
    _, top, width, height = map(float, drawn.get("viewBox").split())
    style = dict(part.split(":") for part in drawn.get("style").split(";"))
    assert float(style["width"][:-2]) / float(style["height"][:-2]) == pytest.approx(
        width / height, rel=0.05
    )
    below = height + top  # the picture's y axis points down from the line of the text
    assert 0 < below < height / 2
    assert float(style["vertical-align"][:-2]) == pytest.approx(
        -below / height * float(style["height"][:-2]), abs=0.02
    )
    points = [float(n) for n in re.findall(r"-?\d+", drawn[0].get("d"))]
    assert min(points[1::2]) >= top
    assert max(points[1::2]) <= below
    assert drawn[0].get("d").count("M") >= 5  # a, <, 1, the bar, 2


def test_what_cannot_be_drawn_is_read_as_tex():
    assert site.formula(r" \begin{cases} a < b \end{cases} ") == (
        r"<code>\begin{cases} a &lt; b \end{cases}</code>"
    )


def test_a_page_asks_for_nothing(tmp_path):
    cells = [
        nbformat.v4.new_markdown_cell("# T\n\nOf $\\gamma$ | `$x$`\n\n$$\\alpha \\le 1$$\n"),
        nbformat.v4.new_markdown_cell(
            "## $\\lambda$ in a head\n\n| $p$ | b |\n|---|---|\n| 1 | $q$ |"
        ),
    ]
    path = tmp_path / "t.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    page = site.lesson_page(path)
    said = [unescape(label) for label in re.findall(r'<svg[^>]*aria-label="([^"]*)"', page)]
    assert said == [r"\gamma", r"\alpha \le 1", r"\lambda", "p", "q"]
    assert "<code>$x$</code>" in page
    assert page.count("<h2") == 1
    assert "<script" not in page
    links = re.findall(r'(?:src|href)="([^"#][^"]*)"|url\(["\']?(?!data:)([^)]+)\)', page)
    assert {one for pair in links for one in pair} <= {"", "index.html"}
