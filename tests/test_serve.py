"""quest-compile serve, asked over HTTP as any client of OpenAI's API asks."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from tiny_models import NUM_LAYERS, tiny_model, tiny_tokenizer

for package in ("fastapi", "uvicorn", "openai", "accelerate"):
    pytest.importorskip(package)
pytest.importorskip("transformers.cli.serve", reason="another server")

NUM_TOKENS = 8
PROMPT = "To be, or not to be, that is the question. " * 5
# The first token comes from the prefill.
SPARSE_CALLS = (NUM_TOKENS - 1) * (NUM_LAYERS - 2)


class Server:
    """A process of its own; ``log`` is a file that it writes."""

    def __init__(self, folder, log):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            self.port = probe.getsockname()[1]
        self.model, self.log = str(folder), log
        arguments = ["--budget", "64", "--context", "512", "--inner", "eager", "--device", "cpu"]
        command = [sys.executable, "-m", "quest_compile", "serve", self.model, *arguments]
        with log.open("w") as file:
            command += ["--port", str(self.port)]
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        self._wait()

    def _wait(self):
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()
            try:
                return self.ask("/health")
            except urllib.error.URLError:
                time.sleep(0.25)
        raise AssertionError(self.log.read_text())

    def ask(self, path, body=None):
        data = None if body is None else json.dumps({"model": self.model} | body).encode()
        request = urllib.request.Request(f"http://localhost:{self.port}{path}", data)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.read().decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    tiny_model("llama").save_pretrained(folder)
    server = Server(folder, tmp_path_factory.mktemp("log") / "log")
    yield server
    server.process.kill()
    server.process.wait()


def said(server):
    """What the log says about the last request."""
    for _ in range(40):
        found = [
            line for line in server.log.read_text().splitlines() if "with their prompt" in line
        ]
        if found:
            return found[-1]
        time.sleep(0.25)


def test_what_is_compiled_is_said_before_the_first_request(server):
    assert f"4 attention calls: {NUM_LAYERS - 2} sparse, 2 dense" in server.log.read_text()
    (model,) = json.loads(server.ask("/v1/models"))["data"]
    assert model["id"] == server.model


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_answered_sparsely_and_compiles_nothing(server, stream):
    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": NUM_TOKENS}
    answer = server.ask("/v1/chat/completions", asked | {"stream": stream})
    if stream:
        chunks = [line for line in answer.splitlines() if line.startswith("data: {")]
        assert len(chunks) > 2
        usage = json.loads(chunks[-1].removeprefix("data: "))["usage"]
    else:
        usage = json.loads(answer)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(PROMPT), NUM_TOKENS)
    line = said(server)
    assert f"{len(PROMPT) + NUM_TOKENS} tokens with their prompt" in line
    assert f"{SPARSE_CALLS} sparse attention calls" in line
    assert "anew" not in line


def test_another_model_is_refused(server):
    with pytest.raises(urllib.error.HTTPError, match="400"):
        server.ask("/v1/completions", {"model": "other", "prompt": "x"})


def test_ctrl_c_ends_it_cleanly(server):
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=60) == 130
    assert "Traceback" not in server.log.read_text()
    assert "quest-compile serve: interrupted" in server.log.read_text()
