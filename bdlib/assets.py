"""Model and text files: fetched once, verified by SHA-256 at every load, offline afterwards.

``data/sources.toml`` lists every file with its size, digest and licence.
:func:`fetch` is the only function of the library that downloads anything; it is what
``python -m bdlib fetch`` calls. Loading functions (:func:`model_folder`,
:func:`text_file`) never download: a file that is absent, incomplete or altered is an
:class:`AssetError` that names the command to run.

A file appears under its final name only when it is complete and verified. An
interrupted fetch leaves nothing but ``.tmp-*`` folders, which the next fetch removes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FETCH_COMMAND = "python -m bdlib fetch"
DIGESTS_FILE = "digests.json"
_TEMPORARY_PREFIX = ".tmp-"
_STANDARD_ERROR = 2  # the file descriptor


class AssetError(ValueError):
    """A file is absent, incomplete or altered, or it could not be fetched."""


# --------------------------------------------------------------------- the manifest

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredFile(_Strict):
    """One member of a wheel. ``size`` is in bytes."""

    member: str
    name: FileName
    sha256: Digest
    size: int = Field(gt=0)


class Package(_Strict):
    """One wheel on the package index and the members taken out of it."""

    name: FileName
    package: str
    version: str
    wheel: FileName
    sha256: Digest
    size: int = Field(gt=0)
    licence: str
    source: str
    files: tuple[StoredFile, ...] = Field(min_length=1)


class Model(_Strict):
    """A model folder made from a fetched GGUF file."""

    name: FileName
    file: FileName
    title: str
    licence: str


class Text(_Strict):
    """A text, or a slice of characters of one, with its split and training weight."""

    name: str
    file: FileName
    title: str
    author: str
    kind: str
    encoding: Literal["utf-8", "latin-1"]
    split: Literal["train", "held-out"]
    weight: float = Field(gt=0)
    start: int | None = Field(default=None, ge=0)
    end: int | None = Field(default=None, gt=0)
    drop_first_line: bool = False


class Manifest(_Strict):
    """The content of ``data/sources.toml``."""

    schema_version: Literal[1]
    packages: tuple[Package, ...]
    models: tuple[Model, ...] = ()
    texts: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        files = [file.name for package in self.packages for file in package.files]
        for kind, names in (
            ("package", [package.name for package in self.packages]),
            ("file", files),
            ("model", [model.name for model in self.models]),
            ("text", [text.name for text in self.texts]),
        ):
            repeated = {name for name in names if names.count(name) > 1}
            if repeated:
                raise ValueError(f"{kind} names given twice: {sorted(repeated)}")
        for user in (*self.models, *self.texts):
            if user.file not in files:
                raise ValueError(f"{user.name!r} uses {user.file!r}, which no package holds")
        authors = {split: set() for split in ("train", "held-out")}
        for text in self.texts:
            authors[text.split].add(text.author)
        both = authors["train"] & authors["held-out"]
        if both:
            raise ValueError(f"authors on both sides of the split: {sorted(both)}")
        return self

    def package_of(self, file_name: str) -> tuple[Package, StoredFile]:
        """The package that holds ``file_name``, and its entry there."""
        for package in self.packages:
            for file in package.files:
                if file.name == file_name:
                    return package, file
        known = sorted(file.name for package in self.packages for file in package.files)
        raise AssetError(f"unknown file {file_name!r}; known files: {', '.join(known)}")

    def models_of(self, package: Package) -> list[Model]:
        """The models made from the files of ``package``."""
        names = {file.name for file in package.files}
        return [model for model in self.models if model.file in names]


def manifest_path() -> Path:
    """``sources.toml``: beside the module in a wheel, in ``data/`` in a checkout."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "data" / "sources.toml", here.parent / "data" / "sources.toml"):
        if candidate.is_file():
            return candidate
    raise AssetError("sources.toml is missing from this installation of bdlib; reinstall it")


@functools.lru_cache(maxsize=4)
def _read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise AssetError(f"{path} is not a valid list of sources: {error}") from error


def manifest() -> Manifest:
    """The validated content of ``data/sources.toml``."""
    return _read_manifest(manifest_path())


# ----------------------------------------------------------------- where files live


def checkout() -> Path | None:
    """The root of the source checkout that bdlib is imported from, or None."""
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file() and (root / "data" / "sources.toml").is_file():
        return root
    return None


def data_root() -> Path:
    """The folder that holds fetched files; not necessarily there yet.

    In order: the environment variable ``BDLIB_DATA``; ``data/downloads`` of the
    checkout, if it can be written or holds files already; a cache folder of the user.
    """
    override = os.environ.get("BDLIB_DATA")
    if override:
        return Path(override).expanduser().resolve()
    root = checkout()
    if root is not None:
        downloads = root / "data" / "downloads"
        writable = downloads if downloads.is_dir() else downloads.parent
        if os.access(writable, os.W_OK) or (downloads.is_dir() and any(downloads.iterdir())):
            return downloads
    from platformdirs import user_cache_path

    return user_cache_path("bdlib", appauthor=False) / "downloads"


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 digest of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name to write a file under, which then takes the name ``path``.

    The file is complete, or as it was before: a write that fails or is killed never shows under the
    final name.

    Raises
    ------
    OSError
        If it cannot be written (a full disk, no permission); names ``path``, not the temporary file.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        yield scratch
        os.replace(scratch, path)
    except Exception as error:
        from safetensors import SafetensorError

        if isinstance(error, OSError) and error.errno and error.filename in (None, str(scratch)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        if isinstance(error, SafetensorError | RuntimeError):  # what writers of weights raise
            raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
        raise
    finally:
        scratch.unlink(missing_ok=True)


# -------------------------------------------------------------------------- verifying


def _repair(package: Package) -> str:
    return f"{FETCH_COMMAND} --force {package.name}"


def _check(path: Path, sha256: str, size: int, package: Package) -> None:
    """Raise AssetError unless ``path`` is there with this size and digest."""
    if not path.is_file():
        raise AssetError(f"{path} is missing; run: {FETCH_COMMAND}")
    found_size = path.stat().st_size
    found = sha256_of(path)
    if found != sha256:
        raise AssetError(
            f"{path} is damaged: expected sha256 {sha256} ({size} bytes), "
            f"found {found} ({found_size} bytes); repair it with: {_repair(package)}"
        )


def text_file(name: str) -> Path:
    """The path of a fetched file, for example ``"carroll-alice.txt"``, verified.

    Raises
    ------
    AssetError
        If the file is unknown, absent, incomplete or altered.
    """
    package, file = manifest().package_of(name)
    path = data_root() / file.name
    _check(path, file.sha256, file.size, package)
    return path


def model_folder(name: str = "smollm2") -> Path:
    """The Hugging Face folder of a fetched model, every file in it verified.

    Raises
    ------
    AssetError
        If the model is unknown, or its folder is absent, incomplete or altered.
    """
    models = {model.name: model for model in manifest().models}
    if name not in models:
        raise AssetError(f"unknown model {name!r}; known models: {', '.join(sorted(models))}")
    package, source = manifest().package_of(models[name].file)
    folder = data_root() / name
    if not folder.is_dir():
        raise AssetError(f"{folder} is missing; run: {FETCH_COMMAND}")
    listing = folder / DIGESTS_FILE
    try:
        digests = json.loads(listing.read_text(encoding="utf-8"))
        files = {
            str(key): (str(value["sha256"]), int(value["size"]))
            for key, value in digests["files"].items()
        }
        made_from = str(digests["made_from"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(
            f"{listing} is missing or damaged; repair it with: {_repair(package)}"
        ) from error
    if made_from != source.sha256:
        raise AssetError(
            f"{folder} was made from another file: expected sha256 {source.sha256}, "
            f"found {made_from}; repair it with: {_repair(package)}"
        )
    for file_name, (sha256, size) in files.items():
        path = folder / file_name
        if not path.is_file():
            raise AssetError(f"{path} is missing; repair it with: {_repair(package)}")
        _check(path, sha256, size, package)
    return folder


def state(package: Package) -> Literal["present", "absent"]:
    """Whether all files of a package are there. A damaged one is an AssetError."""
    root = data_root()
    paths = [root / file.name for file in package.files]
    folders = [root / model.name for model in manifest().models_of(package)]
    if not all(path.exists() for path in (*paths, *folders)):
        for path, file in zip(paths, package.files, strict=True):
            if path.exists():
                _check(path, file.sha256, file.size, package)
        return "absent"
    for file in package.files:
        text_file(file.name)
    for folder in folders:
        model_folder(folder.name)
    return "present"


# --------------------------------------------------------------------------- fetching


def fetch(
    names: Iterable[str] | None = None, force: bool = False, progress: bool = True
) -> dict[str, str]:
    """Download, verify and unpack what ``data/sources.toml`` lists.

    Parameters
    ----------
    names
        Names of packages in the manifest (``smollm2``, ``gutenberg``, ``big-text``);
        all of them if None.
    force
        Replace the files even where they are there, whatever state they are in.
    progress
        Say on standard error what happens, with progress bars.

    Returns
    -------
    dict
        For each name, ``"present"`` (nothing to do) or ``"fetched"``.

    Raises
    ------
    AssetError
        If a name is unknown, a file present is damaged and ``force`` is not set, a
        download fails, or a downloaded file does not have the expected digest.
    """
    known = {package.name: package for package in manifest().packages}
    wanted = list(known) if names is None else list(dict.fromkeys(names))
    for name in wanted:
        if name not in known:
            raise AssetError(f"unknown asset {name!r}; known assets: {', '.join(known)}")

    def say(message: str) -> None:
        if progress:
            print(message, file=sys.stderr, flush=True)

    root = data_root()
    read_only = root.is_dir() and not os.access(root, os.W_OK)
    if read_only and not force and all(state(known[name]) == "present" for name in wanted):
        for name in wanted:
            say(f"{name}: present and verified")
        return dict.fromkeys(wanted, "present")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(
            f"cannot create {root}: {error.strerror}; "
            "set BDLIB_DATA to a folder that can be written"
        ) from error
    results = {}
    with _locked(root, say):
        for leftover in root.glob(f"{_TEMPORARY_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for name in wanted:
            package = known[name]
            if not force and state(package) == "present":
                say(f"{name}: present and verified")
                results[name] = "present"
                continue
            try:
                _fetch_package(package, root, force, progress, say)
            except OSError as error:  # a full disk, above all
                raise AssetError(f"{name}: cannot write to {root}: {error}") from error
            results[name] = "fetched"
    return results


@contextlib.contextmanager
def _locked(root: Path, say) -> Iterator[None]:
    """Hold the lock of ``root``, so that two fetches at once do the work once."""
    from filelock import FileLock, Timeout

    lock = FileLock(root / ".lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("another fetch is running; waiting for it")
            lock.acquire()
    except OSError as error:
        raise AssetError(
            f"cannot write to {root}: {error.strerror}; "
            "set BDLIB_DATA to a folder that can be written"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _fetch_package(package: Package, root: Path, force: bool, progress: bool, say) -> None:
    """Bring the files of one package into ``root``, then make its models."""
    # On the same file system as the final place, so that a rename is enough to publish.
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=root) as temporary:
        folder = Path(temporary)
        if force or not all((root / file.name).exists() for file in package.files):
            megabytes = package.size / 1e6
            say(f"{package.name}: downloading {package.wheel} ({megabytes:.0f} MB)")
            wheel = _download(package, folder, progress)
            say(f"{package.name}: verified; unpacking {len(package.files)} file(s)")
            _unpack(package, wheel, folder, root)
        for model in manifest().models_of(package):
            if force or not (root / model.name).exists():
                say(f"{package.name}: converting {model.file} to {model.name}/ (once)")
                _make_model(model, package, folder, root, progress)
    say(f"{package.name}: ready in {root}")


def _download(package: Package, folder: Path, progress: bool) -> Path:
    """Download the wheel of ``package`` with pip into ``folder``, and verify it."""
    try:
        pip_version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise AssetError(
            "pip is not installed in this environment, and fetching needs it; "
            "install it (python -m ensurepip) and run the command again"
        ) from None
    requirement = f"{package.package}=={package.version}"
    listing = folder / "requirements.txt"
    listing.write_text(f"{requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "on"] if progress else ["--quiet", "--progress-bar", "off"]
    major, minor = (int(part) for part in pip_version.split(".")[:2])
    if (major, minor) >= (25, 1):
        command += ["--resume-retries", "10"]
    command += ["--dest", str(folder), "--requirement", str(listing)]
    # pip reports on standard output, which belongs to the caller's own results.
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=_STANDARD_ERROR)
    if finished.returncode != 0:
        raise AssetError(
            f"pip could not download {requirement} (exit status {finished.returncode}; its own "
            f"message is above); check the network and run again: {FETCH_COMMAND}"
        )
    wheel = folder / package.wheel
    _check(wheel, package.sha256, package.size, package)
    return wheel


def _unpack(package: Package, wheel: Path, folder: Path, root: Path) -> None:
    """Take the listed members out of ``wheel``, verify all, then publish all."""
    with zipfile.ZipFile(wheel) as archive:
        for file in package.files:
            try:
                member = archive.open(file.member)
            except KeyError as error:
                raise AssetError(f"{package.wheel} has no member {file.member!r}") from error
            with member, open(folder / file.name, "wb") as stream:
                shutil.copyfileobj(member, stream, 1 << 20)
            _check(folder / file.name, file.sha256, file.size, package)
    wheel.unlink()
    for file in package.files:
        os.replace(folder / file.name, root / file.name)


def _make_model(model: Model, package: Package, folder: Path, root: Path, progress: bool) -> None:
    """Convert the GGUF of ``model`` and publish the folder with its digests."""
    made = folder / model.name
    _convert(model, root / model.file, made, progress)
    files = {
        path.relative_to(made).as_posix(): {"sha256": sha256_of(path), "size": path.stat().st_size}
        for path in sorted(made.rglob("*"))
        if path.is_file()
    }
    _, source = manifest().package_of(model.file)
    digests = {"made_from": source.sha256, "files": files}
    (made / DIGESTS_FILE).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
    final = root / model.name
    if final.exists():
        os.replace(final, folder / f"{model.name}.old")
    os.replace(made, final)


def _convert(model: Model, gguf: Path, destination: Path, progress: bool) -> None:
    """De-quantise ``gguf`` to bfloat16 and save it with its tokenizer as safetensors."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    quiet = contextlib.nullcontext() if progress else contextlib.redirect_stderr(None)
    logging.disable_progress_bar()
    options = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        with quiet:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
            weights = AutoModelForCausalLM.from_pretrained(
                gguf.parent, dtype=torch.float32, **options
            )
            # The weights are plain tensors now; save_pretrained refuses to write a
            # model that still says it is quantised.
            if hasattr(weights.config, "quantization_config"):
                del weights.config.quantization_config
            weights.hf_quantizer = None
            weights.config._model_name_or_path = model.title
            try:
                weights.to(torch.bfloat16).save_pretrained(destination)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            tokenizer.save_pretrained(destination)
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
    # save_pretrained makes the weights readable by their owner only.
    for path in destination.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
