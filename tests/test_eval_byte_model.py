"""A byte-level model from its training script to a verdict: models with a tokenizer, end to end."""

import json
import sys

import pytest
import torch

from quest_compile import cli
from quest_compile.eval import train_bytes
from quest_compile.eval.byte_tokenizer import BOS, make_tokenizer
from quest_compile.eval.encode import Encoder

BOOK = " ".join(f"The whale number {i} was seen by the crew. It swam away!" for i in range(400))
SMALL = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(BOOK, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model_folder(book, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_bytes, "MODEL", train_bytes.MODEL | SMALL)
        patch.setattr(train_bytes, "TOKENS_PER_STEP", 2048)
        patch.setattr(train_bytes, "CURRICULUM", ((0.5, 512), (1.0, 1024)))
        options = ["--max-steps", "2", "--device", "cpu"]
        patch.setattr(sys, "argv", ["train_bytes", str(folder), str(book), *options])
        train_bytes.main()
    return folder


def test_a_token_is_a_byte():
    tokenizer = make_tokenizer()
    text = "Héllo — world\n\x00 x"
    assert tokenizer(text).input_ids == [BOS, *text.encode()]
    assert tokenizer.decode([BOS, *text.encode()], skip_special_tokens=True) == text


def test_training_rows_weigh_answers_and_nothing_else(book):
    tokens, weights = train_bytes.Samples([book], seed=0).batch(1024)
    assert tokens.shape == (128, 1025)
    assert weights.shape == (128, 1024)
    assert (tokens[:, 0] == BOS).all()
    weighted = (weights > 1).any(1)
    assert not weighted[::2].any()
    assert weighted[1::2].float().mean() > 0.9
    answers = bytes(tokens[1, 1:][weights[1] > 1].tolist()).decode()
    assert all(part in bytes(tokens[1, 1:].tolist()).decode() for part in answers.split(".")[:-1])


def test_tasks_of_text_run_to_a_verdict(model_folder, book, tmp_path):
    torch._dynamo.reset()
    out = tmp_path / "out"
    tasks = ["passkey", "niah_multikey_1", "perplexity", "agreement"]
    jsonl = tmp_path / "mine.jsonl"
    row = {"context": BOOK[:700], "question": " Who?", "answer_prefix": " It was"}
    row |= {"answer": ["the crew"], "max_new_tokens": 4, "task": "whales"}
    jsonl.write_text(json.dumps(row))
    files = ["--haystack", str(book), "--text", str(book), "--jsonl", str(jsonl)]
    sizes = ["--lengths", "700", "--budgets", "128", "1024", "--samples", "2", "--decoded", "8"]
    assert cli.main(["eval", str(model_folder), "--out", str(out), "--tasks", *tasks, *files,
                     *sizes, "--methods", "quest", "snapkv", "h2o"]) == 0  # fmt: skip
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["task"] for row in rows} == {*tasks, "whales"}
    for row in rows:
        if row["budget"] == 128:
            assert row["sparse_steps"] == row["steps"] > 0
            assert row["verdict"] != "dense by construction"
        elif row["budget"] == 1024:
            assert row["verdict"] == "dense by construction"
            assert abs(row["comparison"]["difference"]) < 1e-4
            assert row["same_as_dense"] in (1, None)


def test_resume_with_another_file_is_an_error_that_names_both(model_folder, tmp_path, capsys):
    torch._dynamo.reset()
    jsonl = tmp_path / "mine.jsonl"
    row = {"context": BOOK[:300], "question": " Who?", "answer_prefix": "", "answer": "the crew"}
    options = ["--jsonl", str(jsonl), "--budgets", "128", "--out", str(tmp_path / "out")]

    def evaluate(question, *more):
        rows = row | {"question": question, "max_new_tokens": 2, "task": "whales"}
        jsonl.write_text(json.dumps(rows))
        return cli.main(["eval", str(model_folder), *options, "--methods", "oracle", *more])

    assert evaluate(" Who?") == 0
    assert evaluate(" Who?", "--resume") == 0
    assert evaluate(" Why?", "--resume") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.count("jsonl='mine.jsonl ") == 2


def test_what_text_tasks_need_is_said(model_folder, tmp_path, capsys):
    def message(*arguments):
        assert cli.main(["eval", str(model_folder), "--out", str(tmp_path / "x"), *arguments]) == 2
        return capsys.readouterr().err

    assert "give one with --haystack FILE" in message("--tasks", "niah_single_2")
    assert "give one with --text FILE" in message("--tasks", "perplexity")
    assert "does not fit into --lengths 100" in message("--tasks", "passkey", "--lengths", "100")
    assert "is for the recall model" in message("--tasks", "recall-16")


def test_a_chat_template_surrounds_context_and_question():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[user]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[model]{% endif %}"
    )
    chat, plain = Encoder(tokenizer), Encoder(tokenizer, use_chat=False)
    asked = chat.context("text") + chat.question(" why?", " As")
    assert chat.decode(asked) == "[user]text why?[end][model] As"
    asked = plain.context("text") + plain.question(" why?", " As")
    assert asked == [BOS, *b"text why? As"]
    assert plain.beginning() == [BOS]


def test_copying_is_scored_by_first_choices_and_loss_against_dense(model_folder, tmp_path):
    torch._dynamo.reset()
    out = tmp_path / "out"
    sizes = ["--lengths", "1152", "--budgets", "64", "2048", "--samples", "2"]
    assert cli.main(["eval", "--model", str(model_folder), "--out", str(out),
                     "--tasks", "copy", "copy-multi", *sizes]) == 0  # fmt: skip
    result = json.loads((out / "results.json").read_text())
    assert result["settings"]["text"].startswith("help() of Python ")
    rows = {(row["task"], row["budget"]): row for row in result["rows"]}
    for task, questions in (("copy", 3), ("copy-multi", 2)):
        dense, sparse, covered = (rows[task, budget] for budget in (0, 64, 2048))
        assert 0 <= dense["value"] <= 1 and dense["loss"] > 0
        assert sparse["sparse_steps"] == sparse["steps"] == questions * 191
        assert sparse["comparison"]["num_samples"] == questions * 176
        assert sparse["loss_comparison"]["difference"] == pytest.approx(
            sparse["loss"] - dense["loss"]
        )
        assert covered["verdict"] == "dense by construction"
        assert covered["loss"] == pytest.approx(dense["loss"], rel=1e-4)
        assert covered["comparison"]["difference"] == 0
    assert "| loss, difference (95 %)" in (out / "results.md").read_text()
