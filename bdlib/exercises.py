"""Checks of the lessons' exercises: each says what is wrong, not only that something is.

A check takes the student's answer and returns a :class:`Verdict`, which a notebook shows as its
cell's value. ``None`` (not attempted yet) is a verdict of its own, so that a lesson runs top to
bottom with empty exercises. The solutions notebooks pass through the same checks, and the tests feed
each one plausible wrong answers that it must reject.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: ``passed`` is ``None`` while the exercise is untouched."""

    passed: bool | None
    message: str

    def __repr__(self) -> str:
        mark = {True: "correct", False: "not yet", None: "to do"}[self.passed]
        return f"[{mark}] {self.message}"


TODO = Verdict(None, "replace None by your answer, run the cell again")
