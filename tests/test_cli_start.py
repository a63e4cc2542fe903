"""The command line says help, and what is wrong, before it imports what takes seconds."""

import os
import re
import signal
import subprocess
import sys

import pytest
from interruptible import start_interruptible

from quest_compile import cli

HEAVY = {"torch", "transformers", "numpy"}
COMMANDS = [[], ["demo"], ["explain"], ["eval"], ["serve"], ["fetch"], ["bench"]]
BENCHMARKS = ["ops", "decode", "compile", "memory", "longrun", "overhead", "gpu-check", "report"]

# As pip writes it.
SCRIPT = """\
import sys
from quest_compile.cli import main
sys.exit(main())
"""


def start(*command, **variables):
    """The process, and the packages that it imported."""
    variables |= {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | variables, capture_output=True, text=True
    )
    line = r"^import time: +\d+ \| +\d+ \| +(\S+)\n"
    imported = {name.partition(".")[0] for name in re.findall(line, done.stderr, re.MULTILINE)}
    done.stderr = re.sub(r"^import time:.*\n", "", done.stderr, flags=re.MULTILINE)
    return done, imported


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "quest-compile"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize("command", [*COMMANDS, *(["bench", name] for name in BENCHMARKS)])
def test_help_imports_nothing_heavy_and_has_examples(command):
    done, imported = start("-m", "quest_compile", *command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {' '.join(['quest-compile', *command])} ")
    assert "quest_compile" in imported and not HEAVY & imported
    if command and command[-1] not in ("overhead", "gpu-check", "report"):
        assert f"\n  quest-compile {command[0]}" in done.stdout.partition("examples:")[2]


def test_the_installed_script_imports_nothing_heavy(script):
    done, imported = start(script, "explain", "--help")
    assert done.returncode == 0, done.stderr
    assert not HEAVY & imported


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "/nope"], "there is no folder /nope"),
        (["eval", "recall", "--samples", "0"], "--samples must be at least 1"),
        (["demo", "--model", "x", "--prompt-file", "/nope.txt"], "/nope.txt"),
        (["demo", "--budget", "1.5"], "a share of the context in (0, 1)"),
        (["bench", "ops", "--budgets", "2K,x"], "tokens as 2048 or 2K, or a share as 0.05"),
    ],
)
def test_so_do_mistakes_but_those_of_benchmarks(arguments, message):
    done, imported = start("-m", "quest_compile", *arguments)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, message in line) == (2, True)
    assert arguments[0] == "bench" or not HEAVY & imported


@pytest.mark.parametrize("how", ["module", "script"])
def test_a_command_has_the_whole_package(how, script):
    command = [script] if how == "script" else ["-m", "quest_compile"]
    done, imported = start(*command, "bench", "report", "/nope")
    assert "torch" in imported
    assert "got /nope, which is no folder" in done.stderr


def test_import_registers_the_operators_as_ever():
    code = "import torch, quest_compile; torch.ops.quest.sparse_decode; quest_compile.backend()"
    done, _ = start("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "missing", "extra"),
    [
        (["explain", "x"], "transformers", "hf"),
        (["demo"], "transformers", "hf"),
        (["eval", "recall"], "tqdm", "hf"),
        (["serve", "x"], "uvicorn", "serve"),
        (["bench", "ops", "--quick"], "psutil", "bench"),
    ],
)
def test_what_is_not_installed_is_said_with_the_way_to_install_it(
    arguments, missing, extra, tmp_path
):
    """A folder that comes first on the path has the package, but it cannot be found there."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {missing!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    done, _ = start("-m", "quest_compile", *arguments, PYTHONPATH=str(tmp_path))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert f"this needs {missing}: pip install 'quest-compile[{extra}]'" in line


@pytest.mark.parametrize("command", [["demo", "--recall"], ["eval", "recall", "--out", "."]])
def test_ctrl_c_ends_a_command_with_one_line(command, tmp_path):
    process = start_interruptible(
        [sys.executable, "-u", "-m", "quest_compile", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    # It has begun to say something, and works for some seconds more.
    stream = process.stdout if command[0] == "demo" else process.stderr
    assert stream.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith(f"quest-compile {command[0]}: interrupted")
    assert "Traceback" not in err


def test_a_closed_output_ends_a_command_without_a_trace(monkeypatch):
    def run(command, args):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_run", run)
    monkeypatch.setattr(cli.os, "dup2", lambda *files: None)
    monkeypatch.setattr("sys.stdout.fileno", lambda: 1, raising=False)
    assert cli.main(["fetch", "smollm2"]) == 141


@pytest.mark.parametrize(
    "options",
    [
        ["-X", "importtime", "-m", "quest_compile"],
        ["-Bmquest_compile"],
        ["-BIXimporttime", "-m", "quest_compile"],
    ],
)
def test_options_of_the_interpreter_change_nothing(options):
    done, imported = start(*options, "explain", "--help")
    assert done.stdout.startswith("usage: quest-compile explain ")
    assert "quest_compile" in imported and not HEAVY & imported
