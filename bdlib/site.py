"""The lessons as static HTML pages: read without a kernel, in any browser, with a screen reader.

:func:`build` converts every stored notebook with nbconvert and makes an index page from the README's
table of lessons. Links between notebooks become links between pages. A figure's alternative text is the
sentence that follows it in the lesson (*In words:* ...). Nothing is run.

Contract: a page needs no network. Formulas are drawn once, here, by matplotlib's mathtext, as vector
pictures whose alternative text is their TeX; a page loads no script.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from bdlib import assets, lessons

IN_WORDS = "*In words:*"
HEADING = "## The lessons"
STYLE = "<style>.rendered_html :is(td, th) {text-align: left !important}</style>"
# The template of nbconvert without the scripts that it would load: for widgets, diagrams, formulas.
TEMPLATE = """{% extends 'index.html.j2' %}
{% block html_head_js %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}"""
# Fonts of icons, which its style sheet names and no page uses.
ICONS = r"@font-face\s*\{[^}]*components/[^}]*\}"
# What mathtext writes otherwise, sizes by itself or sets too close.
TO_MATHTEXT = (
    (r"\\(le|ge)(?![a-zA-Z])", r"\\\1q"),
    (r"\\[bB]igg?[lr]?\(", r"\\left("),
    (r"\\[bB]igg?[lr]?\)", r"\\right)"),
    (r"\\[bB]igg?[lr]?(?![a-zA-Z])", ""),
    (r"\\bmod(?![a-zA-Z])", r"\\;\\mathrm{mod}\\;"),
    (r"\\[td]frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\!", ""),
    (r"(\\sum_(?:\{[^}]*\}|\w))", r"\1\\;"),
    (r"\)\s*(\\min)(?![a-zA-Z])", r")\\,\1"),
)


def build(
    out: str | Path | None = None,
    paths: Iterable[Path] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write the pages into a folder; returns them, the index first.

    Parameters
    ----------
    out
        ``build/site`` of the checkout (or of the working directory) if ``None``.
    paths
        Notebooks; all of them if ``None``.

    Raises
    ------
    ValueError
        If the README has no table of lessons, or a notebook cannot be read.
    """
    root = assets.checkout() or Path.cwd()
    out = Path(out) if out is not None else root / "build" / "site"
    out.mkdir(parents=True, exist_ok=True)
    index = out / "index.html"
    _write(index, index_page(root / "README.md"))
    pages = [index]
    for path in lessons.find() if paths is None else paths:
        page = out / Path(lessons.label(path)).with_suffix(".html")
        if progress is not None:
            progress(lessons.label(path))
        page.parent.mkdir(parents=True, exist_ok=True)
        home = "../" * (len(page.relative_to(out).parts) - 1) + index.name
        _write(page, lesson_page(path, home))
        pages.append(page)
    return pages


def _write(page: Path, html: str) -> None:
    with assets.replacing(page) as scratch:
        scratch.write_text(html, encoding="utf8")


def lesson_page(path: Path, home: str = "index.html") -> str:
    """One notebook as a page with a link to the index, ``home``."""
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # several unrelated types, one meaning
        raise ValueError(f"{lessons.label(path)} is not a valid notebook: {error}") from error
    for cell, words in figures_of(notebook):
        if words is not None:
            cell.metadata["alt"] = plain(words)
    return _page(notebook, _title(notebook), home)


def index_page(readme: Path) -> str:
    """The README's title, its first words, and its table of lessons, as a page."""
    import nbformat

    text = readme.read_text(encoding="utf8")
    start = text.find(f"\n{HEADING}\n")
    if start < 0:
        raise ValueError(f"{readme.name} has no section {HEADING!r}")
    end = text.find("\n## ", start + len(HEADING))
    opening = [part for part in text[: text.index("\n## ")].split("\n\n") if "![" not in part]
    section = text[start : end if end > 0 else None].replace("](notebooks/", "](")
    cell = nbformat.v4.new_markdown_cell("\n\n".join(opening) + "\n" + section)
    return _page(nbformat.v4.new_notebook(cells=[cell]), opening[0].removeprefix("# "))


def figures_of(notebook: Any) -> Iterator[tuple[Any, str | None]]:
    """Code cells that store a picture, each with its sentence in words, if any.

    The sentence opens the next Markdown cell; a cell of code without a picture may stand between.
    """
    cells = notebook.cells
    for number, cell in enumerate(cells):
        if not _has_picture(cell):
            continue
        told = (c for c in cells[number + 1 :] if c.cell_type == "markdown" or _has_picture(c))
        source = getattr(next(told, None), "source", "")
        words = source.split("\n\n")[0].removeprefix(IN_WORDS).strip()
        yield cell, words if source.startswith(IN_WORDS) else None


def _has_picture(cell: Any) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def plain(markdown: str) -> str:
    """A sentence without emphasis, code marks, links and line breaks, for an alternative text."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", markdown)
    return " ".join(re.sub(r"[*`$]|\\(?=[a-z])", "", text).split())


def _title(notebook: Any) -> str:
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ").strip()


@functools.cache
def formula(tex: str, display: bool = False) -> str:
    """A formula as a picture in SVG, as high as the text around it.

    ``display`` sets it on a line of its own. What mathtext cannot draw is shown as TeX.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path as Curve
    from matplotlib.textpath import text_to_path

    written = " ".join(tex.split())
    for pattern, other in TO_MATHTEXT:
        written = re.sub(pattern, other, written)
    if display:
        written = written.replace(r"\frac", r"\dfrac")
    size = 100  # units of an em
    font = FontProperties(size=size, math_fontfamily="stix")
    try:
        box = text_to_path.get_text_width_height_descent(f"${written}$", font, ismath=True)
        points, codes = text_to_path.get_text_path(font, f"${written}$", ismath=True)
    except ValueError:  # not in mathtext's part of TeX
        return f"<code>{escape(tex.strip())}</code>"
    letters = {Curve.MOVETO: "M", Curve.LINETO: "L", Curve.CURVE3: "Q", Curve.CURVE4: "C"}
    steps = [
        "Z"
        if code == Curve.CLOSEPOLY
        else letters[code] + " ".join(f"{x:.0f} {-y:.0f}" for x, y in points.reshape(-1, 2))
        for points, code in Curve(points, codes).iter_segments(curves=True, simplify=False)
    ]
    width, height, below = (round(length + 4) for length in box)  # a little room around it
    em = 1.15 / size  # these letters are small for their size
    picture = (
        f'<svg role="img" aria-label="{escape(tex.strip())}" fill="currentColor"'
        f' viewBox="-2 {below - height} {width} {height}" style="width:{width * em:.2f}em;'
        f'height:{height * em:.2f}em;vertical-align:{-below * em:.2f}em">'
        f'<path d="{"".join(steps)}"/></svg>'
    )
    if not display:
        return picture
    return f'<span style="display:block;text-align:center;overflow-x:auto;margin:1em 0">{picture}</span>'


def _markdown(source: str) -> str:
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Drawing(IPythonRenderer):
        def inline_math(self, body: str) -> str:
            return formula(body)

        def block_math(self, body: str) -> str:
            return formula(body, display=True)

    return MarkdownWithMath(renderer=Drawing(escape=False)).render(source)


def _page(notebook: Any, title: str, home: str | None = None) -> str:
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="classic",
        raw_template=TEMPLATE,
        filters={"markdown2html": _markdown},
        exclude_input_prompt=True,
    )
    exporter.exclude_output_prompt = True
    html, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    html = re.sub(ICONS, "", html)
    html = html.replace("</head>", f"{STYLE}</head>", 1)
    if home is not None:
        link = f'<nav style="padding: 8px 16px"><a href="{home}">All lessons</a></nav>'
        html = re.sub(r"<body[^>]*>", rf"\g<0>{link}", html, count=1)
    return re.sub(r'(href="(?!https?:)[^"#]*)\.ipynb(["#])', r"\1.html\2", html)
