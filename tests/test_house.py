"""The rules that the repository keeps: pins, imports, errors, nothing of one machine."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

HEAVY = ("torch", "transformers", "triton", "matplotlib", "seaborn", "pandas", "ipywidgets")
BINARY = {".png", ".jpg", ".safetensors", ".pt", ".npz", ".gz", ".parquet", ".woff2"}


def pinned(requirement: str) -> tuple[str, str]:
    """The name and the version of ``name==version; marker``."""
    name, separator, version = requirement.partition(";")[0].strip().partition("==")
    assert separator, f"{requirement!r} is not pinned"
    return name.strip().lower().replace("_", "-"), version.strip()


def kept_files(repository):
    """Files under version control, or that would be added to it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [repository / name for name in listed.stdout.split("\0") if name]


def test_environment_has_the_pins_of_the_project(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((repository / "environment.yml").read_text())
    wanted = dict(
        pinned(one) for one in project["dependencies"] + project["optional-dependencies"]["dev"]
    )
    (from_pip,) = [one["pip"] for one in environment["dependencies"] if isinstance(one, dict)]
    plain = [one for one in environment["dependencies"] if isinstance(one, str)]
    free = ("python>=", "pip>=", "make")
    found = dict(
        pinned(one)
        for one in [one for one in plain if not one.startswith(free)]
        + [one for one in from_pip if one != "-e ."]
    )
    assert found == wanted
    assert f"python{project['requires-python']}" in plain
    assert environment["channels"][0] == "conda-forge"


def test_version_is_said_once_the_same_way(repository):
    import bdlib

    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert bdlib.__version__ == project["version"] == citation["version"]
    assert "2606.00144" in str(citation["references"])


@pytest.mark.parametrize(
    "module", ["bdlib", "bdlib.kernels", "bdlib.assets", "bdlib.corpora", "bdlib.lessons"]
)
def test_import_is_light_from_anywhere(module, tmp_path):
    program = f"import {module}, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert finished.stdout.strip() == "[]", finished.stderr


def test_no_module_imports_triton_or_plots_at_the_top(repository):
    """Importing any module of the library works without triton and without a display."""
    for path in sorted((repository / "bdlib").glob("*.py")):
        if path.stem in ("figures", "widgets"):
            continue
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.partition(".")[0] for name in names}
            late = {"triton", "matplotlib", "seaborn", "transformers"}
            assert not roots & late, f"{path.name} imports {roots & late} when it is imported"


def command(*arguments, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-m", "bdlib", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_command_line_errors_are_one_line():
    for arguments in (
        ("fetch", "nothing"),
        ("notebooks", "nothing"),
        ("notebooks", "--profile", "x"),
    ):
        finished = command(*arguments)
        assert finished.returncode == 2, finished
        assert finished.stderr.startswith("error: ")
        assert finished.stderr.count("\n") == 1
    shown = command("fetch", "nothing", BDLIB_TRACEBACK="1")
    assert "Traceback" in shown.stderr


def test_missing_assets_are_one_line(tmp_path):
    finished = command("doctor", BDLIB_DATA=str(tmp_path / "none"))
    assert finished.returncode == 0
    assert finished.stdout.count("absent; run: python -m bdlib fetch") == 3


def test_command_line_help_lists_the_commands():
    finished = command("--help")
    assert finished.returncode == 0
    for name in ("fetch", "notebooks", "doctor"):
        assert name in finished.stdout


def test_no_file_names_a_place_of_one_machine(repository):
    # Written in two parts, so that this file does not hold what it forbids.
    places = re.compile("(?<![\\w.~-])/(?:" + "home|root|Users|mnt|workspace" + ")/[\\w.-]")
    for path in kept_files(repository):
        if path.suffix in BINARY or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if len(line) < 20_000:  # not an image inside a notebook
                assert not places.search(line), f"{path.name}:{number}: {line.strip()[:120]}"


def test_no_large_file_is_kept(repository):
    for path in kept_files(repository):
        if path.is_file() and "checkpoints" not in path.parts:
            assert path.stat().st_size < 1_500_000, path


def test_source_is_in_the_agreed_style(repository):
    for arguments in (("check",), ("format", "--check")):
        finished = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "."],
            cwd=repository,
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stdout
