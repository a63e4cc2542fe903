"""The package as a user gets it: built, installed in a fresh environment, imported from elsewhere.

One compilation serves all tests. Nothing is downloaded: the fresh environments see torch and the
build tools of the running one through a .pth file, but not the quest_compile installed there.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

# Not by import, nor by find_spec: either, for pip, disables the distutils of setuptools in this
# process, which Inductor needs.
try:
    SITE_PACKAGES = {
        str(importlib.metadata.distribution(name).locate_file(""))
        for name in ("torch", "scikit-build-core", "pip")
    }
except importlib.metadata.PackageNotFoundError as missing:
    pytest.skip(f"not installed: {missing.name}", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"quest_compile": "quest_compile", "passes": "quest_compile/passes"}
PACKAGES["bench"] = "quest_compile/bench"
LIBRARY = "quest_compile/libquest.so"
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++", os.environ.get("CXX", ""))))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")

IMPORT_ALL = "import quest_compile, quest_compile.passes, quest_compile.bench"
NATIVE_IS_LOADED = "torch._C._dispatch_has_kernel_for_dispatch_key('quest::score_pages', 'CPU')"


def run(*command: object, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    """Run a command with this environment's build tools on PATH, and without its settings."""
    dropped = ("PYTHONPATH", "PYTHONWARNINGS", "QUEST_COMPILE_NATIVE", "QUEST_COMPILE_CUDA")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    # nvcc takes minutes; the kernels that it makes are in the library of this environment.
    environment["QUEST_COMPILE_CUDA"] = "0"
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_checked(*command: object, cwd: Path | None = None, **variables: str) -> str:
    result = run(*command, cwd=cwd, **variables)
    assert result.returncode == 0, result.stdout
    return result.stdout


class Environment:
    """A virtual environment, and a folder outside the repository to run its Python in."""

    def __init__(self, folder: Path) -> None:
        run_checked(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
        self.bin = folder / "venv" / "bin"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        purelib = self.python("import sysconfig; print(sysconfig.get_path('purelib'))")
        Path(purelib, "seen.pth").write_text("\n".join(SITE_PACKAGES))

    def python(self, code: str) -> str:
        return run_checked(self.bin / "python", "-c", code, cwd=self.elsewhere).strip()

    def install(self, *what: object, **variables: str) -> None:
        options = ("--no-index", "--no-deps", "--no-build-isolation", "--force-reinstall")
        run_checked(self.bin / "python", "-m", "pip", "install", *options, *what, **variables)


def build_wheel(tree: Path, folder: Path, **variables: str) -> Path:
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run_checked(sys.executable, "-m", "pip", "wheel", *options, tree, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if name.startswith("quest_compile/")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, so that no test builds in the repository."""
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "source", ignore=ignored))


@pytest.fixture(scope="module")
def unpacked_sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"import build_backend; build_backend.build_sdist({str(folder)!r})"
    run_checked(sys.executable, "-c", code, cwd=tree, PYTHONPATH=str(tree / "cmake"))
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def native_wheel(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(unpacked_sdist, tmp_path_factory.mktemp("wheel"), QUEST_COMPILE_NATIVE="1")


@pytest.fixture(scope="module")
def pure_wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("pure_wheel"), QUEST_COMPILE_NATIVE="0")


def test_wheel_holds_every_module_and_the_data(pure_wheel: Path, tree: Path) -> None:
    modules = {
        f"{installed}/{path.relative_to(tree / source).as_posix()}"
        for source, installed in PACKAGES.items()
        for path in (tree / source).rglob("*.py")
    }
    data = {f"quest_compile/recall/model/{name}" for name in ("config.json", "model.safetensors")}
    assert contents(pure_wheel) >= modules | data | {"quest_compile/py.typed"}
    assert pure_wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.nightly
@needs_compiler
def test_wheel_from_sdist_adds_only_the_library(native_wheel: Path, pure_wheel: Path) -> None:
    assert contents(native_wheel) == contents(pure_wheel) | {LIBRARY}
    assert "-py3-none-linux_" in native_wheel.name


@pytest.mark.nightly
@needs_compiler
def test_wheel_works_outside_the_repository(native_wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.install(native_wheel)
    checks = f"import torch; {IMPORT_ALL}; print({NATIVE_IS_LOADED}, quest_compile.passes.__file__)"
    loaded, passes_file = environment.python(checks).split()
    assert loaded == "True"
    assert Path(passes_file).is_relative_to(tmp_path)
    backends = "import torch; print('quest' in torch.compiler.list_backends())"
    assert environment.python(backends) == "True"
    help_text = run_checked(environment.bin / "quest-compile", "--help", cwd=environment.elsewhere)
    assert all(command in help_text for command in ("demo", "explain", "bench"))


@pytest.mark.nightly
@needs_compiler
def test_editable_install_follows_the_tree(
    unpacked_sdist: Path, native_wheel: Path, tmp_path: Path
) -> None:
    """native_wheel comes first for its build folder: nothing is compiled again."""
    environment = Environment(tmp_path)
    environment.install("--editable", unpacked_sdist, QUEST_COMPILE_NATIVE="1")
    (unpacked_sdist / "passes" / "added_later.py").write_text("HERE = __file__")
    checks = f"import torch; {IMPORT_ALL}; from quest_compile.passes.added_later import HERE"
    loaded, added = environment.python(f"{checks}; print({NATIVE_IS_LOADED}, HERE)").split()
    assert loaded == "True"
    assert Path(added) == unpacked_sdist / "passes" / "added_later.py"


def test_without_the_library_there_is_one_warning(pure_wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.install(pure_wheel)
    code = f"""
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {IMPORT_ALL}
    assert not caught, caught
    assert not {NATIVE_IS_LOADED}
    key_cache, seq_lens = torch.randn(1, 2, 64, 8), torch.tensor([64])
    summary = quest_compile.ops.build_page_summary(key_cache, seq_lens)
    for _ in range(2):
        scores = quest_compile.ops.score_pages(torch.randn(1, 4, 1, 8), summary, seq_lens)
assert scores.shape == (1, 2, 4)
print(*(warning.category.__name__ for warning in caught))
"""
    assert environment.python(code) == "NativeLibraryWarning"


@pytest.mark.parametrize(
    ("wanted", "compiler", "status", "message"),
    [
        (None, True, 0, "build"),
        (None, False, 0, "there is no C++ compiler"),
        ("0", True, 0, "QUEST_COMPILE_NATIVE=0"),
        ("1", True, 0, "build"),
        ("1", False, 1, "QUEST_COMPILE_NATIVE=1, but there is no C++ compiler"),
        ("yes", True, 1, "QUEST_COMPILE_NATIVE must be 0, 1 or unset"),
    ],
)
def test_build_backend_decides_by_variable_and_compiler(
    wanted: str | None, compiler: bool, status: int, message: str, tmp_path: Path
) -> None:
    if compiler:
        (tmp_path / "g++").touch(mode=0o755)
    code = "import build_backend as b; r = b.reason_for_no_library(); print(r or 'build')"
    variables = {"PYTHONPATH": str(ROOT / "cmake"), "PATH": str(tmp_path), "CXX": ""}
    if wanted is not None:
        variables["QUEST_COMPILE_NATIVE"] = wanted
    result = run(sys.executable, "-c", code, **variables)
    assert message in result.stdout
    assert result.returncode == status


def test_the_build_backend_pins_the_torch_of_the_dev_extra() -> None:
    (built_with,) = re.findall(r'TORCH = "(.+)"', (ROOT / "cmake/build_backend.py").read_text())
    assert f'"{built_with}",' in (ROOT / "pyproject.toml").read_text()
