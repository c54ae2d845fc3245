"""The lessons as static HTML pages: read without a kernel, in any browser, with a screen reader.

:func:`build` converts every stored notebook with nbconvert and makes an index page from the README's
table of lessons. Links between notebooks become links between pages. A figure's alternative text is the
sentence that follows it in the lesson (*In words:* ...). Nothing is run. Formulas are drawn by MathJax,
which a page loads from the network; without it they are read as TeX.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bdlib import assets, lessons

IN_WORDS = "*In words:*"
HEADING = "## The lessons"
STYLE = "<style>.rendered_html :is(td, th) {text-align: left !important}</style>"


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
    index.write_text(index_page(root / "README.md"), encoding="utf8")
    pages = [index]
    for path in lessons.find() if paths is None else paths:
        page = out / Path(lessons.label(path)).with_suffix(".html")
        if progress is not None:
            progress(lessons.label(path))
        page.parent.mkdir(parents=True, exist_ok=True)
        home = "../" * (len(page.relative_to(out).parts) - 1) + index.name
        page.write_text(lesson_page(path, home), encoding="utf8")
        pages.append(page)
    return pages


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


def _page(notebook: Any, title: str, home: str | None = None) -> str:
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="classic", exclude_input_prompt=True)
    exporter.exclude_output_prompt = True
    html, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    html = html.replace("</head>", f"{STYLE}</head>", 1)
    if home is not None:
        link = f'<nav style="padding: 8px 16px"><a href="{home}">All lessons</a></nav>'
        html = re.sub(r"<body[^>]*>", rf"\g<0>{link}", html, count=1)
    return re.sub(r'(href="(?!https?:)[^"#]*)\.ipynb(["#])', r"\1.html\2", html)
