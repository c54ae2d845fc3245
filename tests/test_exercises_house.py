"""What every exercise owes the student, whatever the lesson.

A check is tried on wrong answers, and what it says of each is looked at: the first test counts them in
the other test_exercises files, so that a check without any is noticed. The rest is about notebooks.
"""

import ast
import importlib
import math
import re
from collections import Counter
from pathlib import Path

import nbformat
import pytest

from bdlib import exercises, lessons

HERE = Path(__file__).parent
CHECKS = sorted(name for name in vars(exercises) if name.startswith("check_"))
EXERCISE = re.compile(r"^## Exercise (\d+)\.(\d+): (.+)$", re.MULTILINE)
TERMS = re.compile(r"\((optional, )?(easy|medium|hard), \d+ minutes(, on paper)?\)$")
HINT = re.compile(r"<details>\s*<summary>Hint</summary>\n\n.{40,}?</details>", re.DOTALL)


# ------------------------------------------------------------------ wrong answers


def called(node, functions):
    """Names that a function uses, in itself or in functions of its file that it calls."""
    names = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    inner = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & set(functions)
    for name in inner:
        if functions[name] is not node:
            names |= called(functions[name], functions)
    return names


def wrong_answers(file):
    """For each check, on how many wrong answers a file tries it, looking at the verdict and its words."""
    tree = ast.parse(file.read_text(encoding="utf8"))
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    module = importlib.import_module(file.stem)
    found = Counter()
    for name, node in functions.items():
        claims = [ast.unparse(n.test) for n in ast.walk(node) if isinstance(n, ast.Assert)]
        refused = any("passed is False" in claim for claim in claims)
        worded = any(re.search(r" in \w*\.?message", claim) for claim in claims)
        if name.startswith("test_") and refused and worded:
            marks = getattr(getattr(module, name), "pytestmark", [])
            cases = [len(m.args[1]) for m in marks if m.name == "parametrize"]
            for check in called(node, functions) & set(CHECKS):
                found[check] += math.prod(cases)
    return found


def test_every_check_is_tried_on_two_wrong_answers_at_least():
    table = sum(map(wrong_answers, sorted(HERE.glob("test_exercises*.py"))), Counter())
    for check in CHECKS:
        print(f"{table[check]:4} wrong answers: {check}")
    assert len(CHECKS) >= 14
    assert {check: table[check] for check in CHECKS if table[check] < 2} == {}


def test_a_check_without_wrong_answers_would_be_noticed(tmp_path, monkeypatch):
    lines = [
        "import pytest",
        "from bdlib import exercises",
        "def ask(answer):",
        "    return exercises.check_full_head(answer)",
        "@pytest.mark.parametrize('answer', [1, 2, 3])",
        "def test_wrong(answer):",
        "    verdict = ask(answer)",
        "    assert verdict.passed is False",
        "    assert 'not a int' in verdict.message",
        "def test_right():",
        "    assert exercises.check_verify(print).passed is True",
    ]
    for left_out, count in ((None, 3), (7, 0), (8, 0)):  # neither verdict nor words may be missing
        file = tmp_path / f"made_up_{left_out}.py"
        file.write_text("\n".join(s for i, s in enumerate(lines) if i != left_out))
        monkeypatch.syspath_prepend(str(tmp_path))
        assert +wrong_answers(file) == Counter({"check_full_head": count} if count else {})


# ------------------------------------------------------------------ in the notebooks


def exercises_of(path):
    """``(number, rest of the heading, text up to the next heading or end)`` of each exercise."""
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(
        cell.source if cell.cell_type == "markdown" else f"```\n{cell.source}\n```"
        for cell in cells
    )
    for match in EXERCISE.finditer(text):
        end = re.compile(r"^## ", re.MULTILINE).search(text, match.end())
        number = f"{match[1]}.{match[2]}"
        yield number, match[3], text[match.end() : end.start() if end else None]


LESSONS = [
    path
    for path in lessons.find()
    if path.parent == lessons.folder() and not path.stem.startswith("20")  # no exercises there
]


@pytest.mark.parametrize("path", LESSONS, ids=lessons.label)
def test_exercises_are_whole(path):
    """Difficulty, minutes, a check (but on paper), a folded hint, a solution."""
    found = list(exercises_of(path))
    lesson = int(path.stem[:2])
    assert [number for number, *_ in found] == [f"{lesson}.{i + 1}" for i in range(len(found))]
    assert found
    solved = lessons.folder() / "solutions" / path.name
    solutions = solved.read_text(encoding="utf8")
    text = path.read_text(encoding="utf8")
    for number, title, body in found:
        assert TERMS.search(title), f"{number}: {title}: difficulty and minutes in brackets"
        assert HINT.search(body), f"{number} has no folded hint"
        assert "on paper" in title or "exercises.check_" in body, f"{number} has no check"
        assert f"## Exercise {number}" in solutions, f"{number} is not in the solutions"
    assert f"(solutions/{path.name})" in text


def test_every_check_is_used_in_a_lesson_and_its_solutions():
    for folder in (lessons.folder(), lessons.folder() / "solutions"):
        text = "\n".join(p.read_text(encoding="utf8") for p in sorted(folder.glob("*.ipynb")))
        unused = [name for name in CHECKS if f"exercises.{name}(" not in text]
        assert unused == [], folder.name
