"""The commands of the README, as a user types them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_models import NUM_LAYERS, tiny_model, tiny_tokenizer

from quest_compile import QuestConfig, cli

ROOT = Path(__file__).resolve().parents[1]
NUM_DENSE = QuestConfig().num_dense_layers
NUM_SPARSE = NUM_LAYERS - NUM_DENSE
SPARSE_AND_DENSE = f"4 attention calls: {NUM_SPARSE} sparse, {NUM_DENSE} dense, 0 untouched"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model with a tokenizer of one token per byte."""
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(folder)
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("To be, or not to be, that is the question. " * 12, encoding="utf-8")
    return path


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.inductor
def test_demo_answers_right_and_proves_that_it_was_sparse(capsys):
    assert cli.main(["demo", "--recall"]) == 0
    out = capsys.readouterr().out
    assert "3 attention calls: 1 sparse, 2 dense, 0 untouched" in out
    (quest,) = [line for line in out.splitlines() if line.startswith("quest, budget 256")]
    right, asked = quest.split()[3].split("/")
    assert int(asked) == 32
    assert int(right) >= 30
    assert "Quest was active: 128 sparse attention calls in 128 steps" in out


@pytest.mark.inductor
def test_demo_with_an_own_model_and_text(model_folder, prompt_file, capsys):
    """The budget is a share of the context, in whole pages; what was found is JSON."""
    arguments = ["--model", str(model_folder), "--prompt-file", str(prompt_file), "--json"]
    assert cli.main(["demo", *arguments, "--max-new-tokens", "8", "--budget", "0.1"]) == 0
    out, err = capsys.readouterr()
    assert SPARSE_AND_DENSE in err
    assert f"Quest was active: {8 * NUM_SPARSE} sparse attention calls in 8 steps" in err
    found = json.loads(out)
    quest, dense = found["methods"]
    assert (found["answers"], dense["as dense"]) == (8, 8) and 0 <= quest["as dense"] <= 8
    assert quest["counters"]["sparse_calls"] == 8 * NUM_SPARSE
    assert quest["counters"]["max_tokens_attended"] < 0.1 * (found["context_tokens"] + 8) + 16
    assert quest["cache_bytes_read_per_step"] < dense["cache_bytes_read_per_step"]


def test_explain_needs_only_the_configuration(model_folder, tmp_path, capsys):
    shutil.copy(model_folder / "config.json", tmp_path)
    assert cli.main(["explain", str(tmp_path), "--budget", "256"]) == 0
    out = capsys.readouterr().out
    assert SPARSE_AND_DENSE in out
    assert "budget 256, page_size 16, summary " in out


def test_explain_takes_a_preset(model_folder, capsys):
    arguments = ["explain", str(model_folder), "--preset", "paper", "--budget", "256"]
    assert cli.main(arguments) == 0
    assert (
        "budget 256, page_size 16, summary minmax, group_reduce none, " in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("0.25", None),
        ("1.5", "in (0, 1)"),
        ("abc", "tokens as 2048 or 2K, or a share as 0.05, got 'abc'"),
    ],
)
def test_explain_takes_a_share_of_the_context(budget, message, model_folder, capsys):
    try:
        status = cli.main(["explain", str(model_folder), "--budget", budget])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert status == (2 if message else 0)
    assert message in err if message else "budget 0.25, page_size 16" in out


def test_explain_as_json(model_folder, capsys):
    assert cli.main(["explain", str(model_folder), "--budget", "256", "--json"]) == 0
    (graph,) = json.loads(capsys.readouterr().out)["graphs"]
    assert [row["treatment"] for row in graph["rows"]] == ["dense", "dense", "sparse", "sparse"]


def test_bench_lists_its_benchmarks(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    assert "overhead" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--prompt-file", "x.txt"], "--prompt-file needs --model"),
        (["demo", "--model", "x"], "--model needs --prompt-file"),
        (["demo", "--model", "x", "--chat"], "leave --model out"),
        (["demo", "--recall", "--chat"], "leave one of them out"),
        (["demo", "--chat", "--json"], "leave one of them out"),
        (["serve", "x", "--port", "99999"], "--port must be 0 (any free one) to 65535"),
        (["demo", "--budget", "0"], "budget: expected 1 or more tokens, got 0"),
        (["demo", "--budget", "8"], "budget: expected room for "),
        (["demo", "--model", "x", "--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["explain", "no/such/folder"], "there is no folder no/such/folder"),
        (["explain", "/nope"], "there is no folder /nope"),
        (["eval", "--model", "./nope"], "there is no folder ./nope"),
        (["explain", __file__], "is a file: a model is a folder"),
        (["explain", str(ROOT)], "holds no model: it has no config.json"),
        (["explain", "some/name"], "cannot be asked: HF_HUB_OFFLINE is set"),
        (["serve", "/nope"], "there is no folder /nope"),
        (["explain", "x", "--budgets", "1"], "unrecognized arguments: --budgets"),
        (["explain"], "one of the arguments model --model is required"),
        (["expain", "x"], "invalid choice: 'expain'"),
        ([], "required: COMMAND"),
        (["bench"], "which benchmark?"),
        (["bench", "ops", "--dtype", "int8"], "--dtype must be of float32, bfloat16, float16"),
    ],
)
def test_mistakes_are_one_clear_line(arguments, message, capsys, offline):
    try:
        status = cli.main(arguments)
    except SystemExit as error:
        status = error.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert message in line
    assert line.startswith("quest-compile")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_said(capsys):
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("cuda", ["", "0"])
def test_make_install_says_each_stage_and_how_long_it_takes(cuda, tmp_path, monkeypatch):
    monkeypatch.setenv("QUEST_COMPILE_CUDA", cuda)
    command = ["make", "--dry-run", "install", f"VENV={tmp_path}/venv"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    said = re.findall(
        r"^echo '\[(\d)/3\] .+: (some seconds|a few minutes)(.*)'$", out, re.MULTILINE
    )
    assert [number for number, *_ in said] == ["1", "2", "3"]
    assert ("CUDA kernels" in said[2][2]) is (cuda != "0" and shutil.which("nvcc") is not None)
