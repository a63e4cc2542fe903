"""Samples of a user's own file."""

import json

import pytest
from word_encoder import WordEncoder

from quest_compile.eval.jsonl import read_rows
from quest_compile.eval.tasks import jsonl_groups

ROW = {
    "context": "a b c",
    "question": "which letter",
    "answer_prefix": " is",
    "answer": "b",
    "max_new_tokens": 3,
    "task": "letters",
}


def write(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


class TestJsonl:
    def test_rows_with_the_same_context_share_it(self, tmp_path):
        rows = [ROW, ROW | {"question": "what"}, ROW | {"context": "d e"}, ROW | {"task": "other"}]
        path = write(tmp_path / "x.jsonl", *rows, "")
        groups = jsonl_groups(path, 100, WordEncoder(), 1000)
        assert [(group.task, group.num_contexts) for group in groups] == [
            ("letters", 2),
            ("other", 1),
        ]
        assert [len(groups[0].make(i).questions) for i in range(2)] == [2, 1]

    def test_so_many_rows_per_task_as_samples_are_asked_for(self, tmp_path):
        rows = [ROW | {"context": f"{i}"} for i in range(9)]
        (group,) = jsonl_groups(write(tmp_path / "x.jsonl", *rows), 4, WordEncoder(), 1000)
        assert group.num_contexts == 4

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("{not json", r"x.jsonl line 2 is not JSON"),
            ("[1, 2]", r"x.jsonl line 2 must be a JSON object, got list"),
            (
                {k: v for k, v in ROW.items() if k != "answer"},
                r"line 2 lacks answer; it has context",
            ),
            (ROW | {"answer": []}, "line 2: answer must be a text or a list of texts"),
            (ROW | {"answer": 7}, "line 2: answer has the wrong type, got 7"),
            (ROW | {"max_new_tokens": 0}, "line 2: max_new_tokens must be at least 1"),
            (ROW | {"max_new_tokens": "9"}, "line 2: max_new_tokens has the wrong type"),
            (ROW | {"context": ""}, "line 2: context and question must not be empty"),
            (ROW | {"metric": "bleu"}, "line 2: metric must be one of"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, row, message):
        with pytest.raises(ValueError, match=message):
            read_rows(write(tmp_path / "x.jsonl", ROW, row))

    def test_an_empty_file_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="has no lines"):
            read_rows(write(tmp_path / "x.jsonl", ""))

    def test_a_row_longer_than_the_model_is_named(self, tmp_path):
        path = write(tmp_path / "x.jsonl", ROW, ROW | {"context": "word " * 50})
        with pytest.raises(ValueError, match="line 2: task letters does not fit the model"):
            jsonl_groups(path, 10, WordEncoder(), 40)

    def test_longbench_tasks_are_scored_as_there(self, tmp_path):
        rows = [ROW | {"task": task} for task in ("qasper", "gov_report", "mine")]
        found = [row.metric for row in read_rows(write(tmp_path / "x.jsonl", *rows))]
        assert found == ["qa_f1", "rouge_l", "string_match_all"]
