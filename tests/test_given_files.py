"""Models and texts that users name: what is wrong with them is said at once, in one line."""

import os
import socket

import pytest
import transformers
from tiny_models import FAMILIES, tiny_model

from quest_compile.context_length import context_length
from quest_compile.eval.jsonl import read_rows
from quest_compile.real_model import find
from quest_compile.real_model.load import load_model, load_tokenizer, warn_beyond_context
from quest_compile.text_files import read_text


class TestTexts:
    @pytest.mark.parametrize("read", [read_text, read_rows])
    def test_another_encoding_is_said_with_its_place(self, read, tmp_path):
        path = tmp_path / "latin.txt"
        path.write_bytes("caf\u00e9".encode("latin-1"))
        with pytest.raises(ValueError, match="latin.txt is not UTF-8: byte 0xe9 at offset 3$"):
            read(path)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache, and a hub at a port where nobody listens."""
    from huggingface_hub import constants

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://localhost:{port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    find._why_unreachable.cache_clear()
    return constants


class TestFindModel:
    @pytest.mark.parametrize("name", ["/nope", "./nope", "~/nope", "a/b/c", "../nope/x"])
    def test_what_looks_like_a_path_is_not_asked_for_at_the_hub(self, name, monkeypatch):
        monkeypatch.setattr(find, "_is_only_cached", pytest.fail)
        with pytest.raises(ValueError, match=f"there is no folder {name}$"):
            find.find_model(name)

    def test_a_hub_that_cannot_be_reached_is_asked_once(self, hub):
        with pytest.raises(ValueError, match="no model of that name in the cache.*refused"):
            find.find_model("some/name")

    def test_then_what_the_cache_has_is_used_without_asking_again(self, hub, tmp_path):
        (tmp_path / "models--some--name" / "snapshots").mkdir(parents=True)
        with find.found_model("some/name") as path:
            assert path == "some/name" and hub.HF_HUB_OFFLINE is True
        assert hub.HF_HUB_OFFLINE is False

    def test_a_folder_is_loaded_without_asking_and_others_may_ask_later(self, hub, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        before = dict(os.environ)
        assert find.find_model(str(tmp_path)) == str(tmp_path) and not hub.HF_HUB_OFFLINE
        with pytest.raises(RuntimeError), find.found_model(str(tmp_path)):
            assert hub.HF_HUB_OFFLINE
            raise RuntimeError
        assert not hub.HF_HUB_OFFLINE and os.environ == before

    def test_what_the_hub_answers_is_left_to_transformers(self, hub, monkeypatch):
        def answer(*args, **kwargs):
            raise find.urllib.error.HTTPError("url", 404, "Not Found", None, None)

        monkeypatch.setattr(find.urllib.request, "urlopen", answer)
        assert find.find_model("some/name") == "some/name"


def test_a_folder_with_a_broken_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for load in (load_tokenizer, lambda name: load_model(name, "float32", "cpu")):
        with pytest.raises(ValueError, match=f"^cannot load .*model {tmp_path}: .*$"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        (None, 2048),
    ],
)
def test_rotary_factors_that_stretch_the_context_count(rope, expected):
    assert context_length(FAMILIES["llama"].config(rope_scaling=rope)) == expected


def test_a_model_without_a_limit_has_none():
    assert context_length(transformers.MambaConfig()) is None


def test_more_tokens_than_the_model_was_made_for_are_said(capsys):
    config = tiny_model("llama").config
    warn_beyond_context(config, 2048)
    assert capsys.readouterr().err == ""
    warn_beyond_context(config, 2049)
    assert "2049 tokens, prompt and answer, are more than the 2048" in capsys.readouterr().err
