"""A text that is read once, and answers behind it."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from quest_compile.reading import answer, read


@pytest.fixture(scope="module")
def reading():
    return read(tiny_model("llama"), tiny_tokenizer(), "To be, or not to be. " * 5, 32)


def tokens(reading):
    return answer(reading.model, reading, reading.encode("W"), max_new_tokens=8).tokens


def test_an_answer_ends_at_every_end_of_text_of_the_model(reading, monkeypatch):
    torch.manual_seed(0)
    whole = tokens(reading)
    assert len(whole) == 8
    end = whole[3]
    for ends in ([0, end], end):
        monkeypatch.setattr(reading.model.generation_config, "eos_token_id", ends)
        assert tokens(reading) == whole[: whole.index(end) + 1]
    monkeypatch.setattr(reading.model.generation_config, "eos_token_id", [0])
    assert tokens(reading) == whole
