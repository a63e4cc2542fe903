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
from interruptible import start_interruptible
from tiny_models import NUM_LAYERS, tiny_model, tiny_tokenizer

for package in ("fastapi", "uvicorn", "openai", "accelerate"):
    pytest.importorskip(package)
pytest.importorskip("transformers.cli.serve", reason="another server")

NUM_TOKENS = 8
PROMPT = "To be, or not to be, that is the question. " * 5
# The first token comes from the prefill.
SPARSE_CALLS = (NUM_TOKENS - 1) * (NUM_LAYERS - 2)


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


class Server:
    """A process of its own; ``log`` is a file that it writes, ``said`` its line of JSON."""

    def __init__(self, folder, log):
        self.model, self.log = str(folder), log
        self.host = "::1" if has_ipv6() else "localhost"
        arguments = ["--budget", "64", "--context", "512", "--inner", "eager", "--device", "cpu"]
        command = [sys.executable, "-m", "quest_compile", "serve", self.model, *arguments]
        with log.open("w") as file:
            command += ["--host", self.host, "--port", "0", "--json"]
            self.process = start_interruptible(command, stdout=file, stderr=subprocess.STDOUT)
        self._wait()

    def _wait(self):
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()
            for line in self.log.read_text().splitlines():
                if line.startswith("{"):
                    self.said = json.loads(line)
                    return
            time.sleep(0.25)
        raise AssertionError(self.log.read_text())

    def ask(self, path, body=None):
        data = None if body is None else json.dumps({"model": self.model} | body).encode()
        request = urllib.request.Request(self.said["url"] + path, data)
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


def lines_about_requests(server):
    return [line for line in server.log.read_text().splitlines() if "with their prompt" in line]


def test_what_is_compiled_is_said_before_the_first_request(server):
    assert f"4 attention calls: {NUM_LAYERS - 2} sparse, 2 dense" in server.log.read_text()
    (model,) = json.loads(server.ask("/models"))["data"]
    assert model["id"] == server.said["model"] == server.model


def test_where_it_listens_is_said_as_json(server):
    host = f"[{server.host}]" if server.host == "::1" else server.host
    assert server.said["url"].startswith(f"http://{host}:")
    assert f"Uvicorn running on {server.said['url'].removesuffix('/v1')} " in server.log.read_text()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_answered_sparsely_and_compiles_nothing(server, stream):
    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": NUM_TOKENS}
    num_lines = len(lines_about_requests(server))
    answer = server.ask("/chat/completions", asked | {"stream": stream})
    if stream:
        chunks = [line for line in answer.splitlines() if line.startswith("data: {")]
        assert len(chunks) > 2
        usage = json.loads(chunks[-1].removeprefix("data: "))["usage"]
    else:
        usage = json.loads(answer)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(PROMPT), NUM_TOKENS)
    for _ in range(40):
        if lines := lines_about_requests(server)[num_lines:]:
            break
        time.sleep(0.25)
    (line,) = lines
    assert f"{len(PROMPT) + NUM_TOKENS} tokens with their prompt" in line
    assert f"{SPARSE_CALLS} sparse attention calls" in line
    assert "anew" not in line


def refusal(server, path, asked):
    with pytest.raises(urllib.error.HTTPError, match="400") as raised:
        server.ask(path, asked)
    return json.loads(raised.value.read())["detail"]


def test_another_model_is_refused(server):
    assert "other" in refusal(server, "/completions", {"model": "other", "prompt": "x"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/completions", "/chat/completions"])
def test_a_prompt_longer_than_the_context_of_the_model_is_refused(server, path, stream):
    message = {"role": "user", "content": "x" * 2049}
    prompt = {"messages": [message]} if "chat" in path else {"prompt": message["content"]}
    said = refusal(server, path, prompt | {"stream": stream, "max_tokens": 2})
    assert said == "the prompt has 2049 tokens, and the model was made for 2048"


def test_ctrl_c_ends_it_cleanly(server):
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=60) == 130
    assert "Traceback" not in server.log.read_text()
    assert "quest-compile serve: interrupted" in server.log.read_text()
