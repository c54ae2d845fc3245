"""The command line: ``python -m bdlib COMMAND``.

Each command is a thin function: it parses options, calls one function of the library
and prints the result. Library modules are imported inside the command that needs them,
so that ``--help`` is quick. A mistake in the input (ValueError, OSError) is one line on
standard error and exit status 2; set ``BDLIB_TRACEBACK=1`` to see where it came from.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="BudgetDraft: sparse-KV speculative decoding, from the command line.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="Assets to fetch; all of them if none is named.")
    ] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Fetch this asset again, replacing what is there."),
    ] = None,
    quiet: Annotated[bool, typer.Option(help="No progress output.")] = False,
) -> None:
    """Download and verify the model and the texts; nothing to do the second time."""
    from bdlib import assets

    results: dict[str, str] = {}
    if force:
        results |= assets.fetch(force, force=True, progress=not quiet)
    if names or not force:
        results |= assets.fetch(names or None, progress=not quiet)
    if all(outcome == "present" for outcome in results.values()):
        typer.echo("Nothing to do: everything is present and verified.")
    else:
        fetched = [name for name, outcome in results.items() if outcome == "fetched"]
        typer.echo(f"Fetched: {', '.join(fetched)}.")


@app.command()
def notebooks(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Notebooks, by number, name or path; all of them if none is named."),
    ] = None,
    profile: Annotated[str, typer.Option(help="quick, cpu or gpu.")] = "quick",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the executed copies; build/notebooks if unset.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the stored form only, without running.")
    ] = False,
    strip: Annotated[
        bool, typer.Option("--strip", help="Remove widget state from the notebooks, in place.")
    ] = False,
) -> None:
    """Run the lessons with papermill, or check their stored form."""
    from bdlib import lessons

    paths = lessons.find(names)
    if strip:
        for path in paths:
            if lessons.strip(path):
                typer.echo(f"stripped {lessons.label(path)}")
    if check:
        faults = [fault for path in paths for fault in lessons.check(path)]
        for fault in faults:
            typer.echo(fault, err=True)
        typer.echo(f"{len(paths)} notebook(s) checked, {len(faults)} fault(s)")
        raise typer.Exit(1 if faults else 0)
    if strip:
        return
    failures = lessons.run(paths, profile=profile, out=out)
    for failure in failures:
        typer.echo(str(failure), err=True)
    typer.echo(f"{len(paths) - len(failures)} of {len(paths)} notebook(s) ran without error")
    raise typer.Exit(1 if failures else 0)


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, CPU, GPU, fetched files."""
    from bdlib import doctor as examination

    rows = examination.examine()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


def main() -> None:
    """Run a command; turn an error in the input into one line and exit status 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("BDLIB_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
