"""make leaves the home directory alone where nothing can be written to it."""

import os
import shutil
import subprocess

import pytest

NAMES = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_home_that_cannot_be_written_is_not_written(repository, tmp_path):
    show = tmp_path / "show.mk"
    show.write_text("show:\n\t@env\n")

    def places(home, **more):
        kept = {k: v for k, v in os.environ.items() if k not in NAMES and not k.startswith("MAKE")}
        command = ["make", "-s", "-f", "Makefile", "-f", show, "show", f"VENV={tmp_path / 'env'}"]
        done = subprocess.run(
            command,
            cwd=repository,
            env=kept | {"HOME": str(home)} | more,
            capture_output=True,
            text=True,
            check=True,
        )
        seen = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        return {name: seen[name] for name in NAMES if name in seen}

    assert places(tmp_path) == {}
    found = places(tmp_path / "missing")
    assert set(found) == set(NAMES)
    assert len(set(found.values())) == len(NAMES)
    assert all(place.startswith(f"{tmp_path}/env/home/") for place in found.values())
    assert places(tmp_path / "missing", IPYTHONDIR="/mine")["IPYTHONDIR"] == "/mine"
