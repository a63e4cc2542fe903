"""quest-compile eval as a user runs it: verdicts, mistakes, interruptions, what it writes."""

import json
import sys

import pytest
import torch
from broken_selection import SILENTLY_DENSE, planted

from quest_compile import cli
from quest_compile.eval import cli as cli_module
from quest_compile.eval import records as records_module

# Lines of records.jsonl before the first cell: settings, conditions.
HEADER = 2
SMALL = ["--lengths", "1024", "--tasks", "recall-16", "--methods", "quest", "--samples", "16"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def evaluate(out, *arguments, model="recall"):
    return cli.main(["eval", model, "--out", str(out), *map(str, arguments)])


def rows(out):
    found = json.loads((out / "results.json").read_text())["rows"]
    return {(row["task"], row["method"], row["budget"]): row for row in found}


def lines(out):
    return (out / "records.jsonl").read_text().splitlines()


class TestVerdicts:
    def test_a_small_sample_proves_nothing(self, out):
        assert evaluate(out, *SMALL, "--budgets", 512) == 0
        row = rows(out)["recall-16", "quest", 512]
        assert row["comparison"]["difference"] == 0
        assert row["verdict"] == "inconclusive: 381 samples needed"
        assert row["sparse_steps"] == row["steps"] == 16 * 4
        assert 0 < row["most_tokens_read"] <= 512

    def test_enough_samples_that_agree_are_no_worse(self, out):
        arguments = [
            "--lengths",
            1024,
            "--tasks",
            "recall-64",
            "--samples",
            64,
            "--methods",
            "quest",
        ]
        assert evaluate(out, *arguments, "--budgets", 768, "--margin", 10) == 0
        row = rows(out)["recall-64", "quest", 768]
        assert row["verdict"] == "no worse than dense within the margin"
        assert row["sparse_steps"] == row["steps"] == 64 * 4

    def test_broken_selection_is_worse(self, out):
        with planted("rows reversed"):
            assert evaluate(out, *SMALL, "--budgets", 256) == 0
        row = rows(out)["recall-16", "quest", 256]
        assert row["verdict"] == "worse"
        assert row["comparison"]["high"] < 0
        assert row["sparse_steps"] == row["steps"]

    def test_a_budget_beyond_the_context_is_dense_by_construction(self, out):
        assert evaluate(out, *SMALL, "--budgets", 2048, "--methods", "quest", "oracle") == 0
        for method in ("quest", "oracle"):
            row = rows(out)["recall-16", method, 2048]
            assert row["verdict"] == "dense by construction"
            assert row["sparse_steps"] == 0
            assert row["same_as_dense"] == 1

    @pytest.mark.parametrize("own", ["default:8192", "0.999", "2:2048/default:64"])
    def test_so_is_a_budget_of_its_own_that_covers_the_context(self, out, own):
        method = f"quest:budget={own}"
        assert evaluate(out, *SMALL, "--methods", method) == 0
        row = rows(out)["recall-16", method, 0]
        assert row["verdict"] == "dense by construction"
        assert row["sparse_steps"] == 0

    @pytest.mark.parametrize("own", ["default:256", "0.25", "2:256/default:8192"])
    def test_a_silently_dense_pass_with_a_budget_of_its_own_is_an_error(self, out, own, capsys):
        with planted(SILENTLY_DENSE):
            assert evaluate(out, *SMALL, "--methods", f"quest:budget={own}") == 2
        assert "attended all 1024 tokens" in capsys.readouterr().err

    def test_no_layer_left_to_be_sparse_is_an_error(self, out, capsys):
        assert evaluate(out, *SMALL, "--budgets", 256, "--num-dense-layers", 3) == 2
        assert "attended all 1024 tokens" in capsys.readouterr().err

    def test_a_silently_dense_pass_is_an_error_and_not_a_perfect_score(self, out, capsys):
        with planted(SILENTLY_DENSE):
            assert evaluate(out, *SMALL, "--budgets", 256) == 2
        assert "quest with budget 256 attended all 1024 tokens" in capsys.readouterr().err

    def test_a_task_that_dense_fails_says_nothing(self, out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("quest_compile.eval.results.LEAST_DENSE_SCORE", 1.01)
            assert evaluate(out, *SMALL, "--budgets", 256) == 0
        verdict = rows(out)["recall-16", "quest", 256]["verdict"]
        assert verdict == "dense fails the task: nothing to lose"


def test_ways_to_select_and_budgets_of_their_own(out):
    own = ["quest:budget=0.125", "quest:budget=2:0.0625/default:512"]
    mixed = "quest:top_p=0.5,preset=paper"
    methods = ["--methods", *own, mixed]
    assert evaluate(out, *SMALL[:4], *methods, "--samples", 16, "--budgets", 128, 256) == 0
    found = rows(out)
    budgets = {(method, budget) for _, method, budget in found}
    assert budgets == {("dense", 0), *((name, 0) for name in own), (mixed, 128), (mixed, 256)}
    read = {key[1:]: row["tokens_read"] for key, row in found.items()}
    # 1024 tokens and a question of some tokens: 65 pages, the open one with few.
    assert 128 < read[own[0], 0] <= 144 and 64 < read[own[1], 0] <= 80
    assert read[mixed, 256] < 200


def test_json_is_all_that_stdout_has_and_a_sentence_ends_the_rest(out, capsys):
    assert evaluate(out, *SMALL, "--budgets", 512, "--json") == 0
    found = capsys.readouterr()
    assert json.loads(found.out) == json.loads((out / "results.json").read_text())
    said = found.err.splitlines()[-1]
    assert said == json.loads(found.out)["sentence"]
    assert "Of 16 questions (recall-16) about contexts of 1024 tokens the model answers" in said


def test_a_layer_that_the_model_does_not_have_is_an_error(out, capsys):
    assert evaluate(out, *SMALL, "--methods", "quest:budget=99:64/default:64") == 2
    assert "there is no layer 99, only 0 to 2" in capsys.readouterr().err


def test_agreement_without_a_tokenizer(out):
    arguments = ["--lengths", 1024, "--tasks", "agreement", "--samples", 16, "--methods", "quest"]
    assert evaluate(out, *arguments, "--budgets", 128, 2048) == 0
    close, same = (rows(out)["agreement", "quest", budget] for budget in (128, 2048))
    assert rows(out)["agreement", "dense", 0]["value"] == 1
    assert 0.3 < close["value"] < 1
    assert close["kl"] > 1e-3
    assert same["value"] == 1
    assert same["kl"] < 1e-6
    assert close["comparison"]["num_samples"] == 16 * 4


class TestInterrupted:
    def test_resume_keeps_what_is_done_and_ends_as_if_uninterrupted(self, out, capsys):
        arguments = [*SMALL, "--budgets", 128, 256, "--methods", "quest", "random"]
        assert evaluate(out, *arguments) == 0
        whole = rows(out)

        stopped = out.parent / "stopped"
        add = records_module.Records.add

        def add_three_then_stop(self, *args, **kwargs):
            add(self, *args, **kwargs)
            if len(self.lines) == 3:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records_module.Records, "add", add_three_then_stop)
            assert evaluate(stopped, *arguments) == 130
        assert "3 cells are kept" in capsys.readouterr().err
        assert "**Interrupted**" in (stopped / "results.md").read_text()
        assert len(lines(stopped)) == HEADER + 3
        assert ("recall-16", "dense", 0) in rows(stopped)
        kept = lines(stopped)
        # A run that was killed in the middle of a write.
        with (stopped / "records.jsonl").open("a") as file:
            file.write('{"cell": ["recall-16", 1024')

        assert evaluate(stopped, *arguments, "--resume") == 0
        assert "**Interrupted**" not in (stopped / "results.md").read_text()
        assert lines(stopped)[: HEADER + 3] == kept
        assert len(lines(stopped)) == HEADER + 5
        assert rows(stopped) == whole

    def test_resume_adds_samples(self, out):
        assert evaluate(out, *SMALL, "--budgets", 256) == 0
        assert evaluate(out, *SMALL[:-1], "32", "--budgets", 256, "--resume") == 0
        assert rows(out)["recall-16", "quest", 256]["comparison"]["num_samples"] == 32

    def test_resume_with_other_settings_is_an_error(self, out, capsys):
        assert evaluate(out, *SMALL, "--budgets", 256) == 0
        assert evaluate(out, *SMALL, "--budgets", 256, "--seed", 7, "--resume") == 2
        assert "was made with seed=0; now seed=7: choose another --out" in capsys.readouterr().err

    def test_resume_with_another_model_is_an_error_that_names_both(self, out, capsys, monkeypatch):
        assert evaluate(out, *SMALL, "--budgets", 256) == 0
        before, (first, *_) = lines(out), map(json.loads, lines(out))
        load = cli_module.recall.load_model

        def trained_further(*args):
            model = load(*args)
            with torch.no_grad():
                model.model.layers[2].self_attn.k_proj.weight.mul_(1.001)
            return model

        monkeypatch.setattr(cli_module.recall, "load_model", trained_further)
        assert evaluate(out, *SMALL, "--budgets", 256, "--resume") == 2
        weights = first["settings"]["weights"]
        assert f"was made with weights='{weights}'; now weights='" in capsys.readouterr().err
        assert lines(out) == before

    def test_resume_with_another_commit_warns_and_the_results_name_both(
        self, out, capsys, monkeypatch
    ):
        def commit(name):
            identity = cli_module.identity
            monkeypatch.setattr(cli_module, "identity", lambda: identity() | {"commit": name})

        commit("aaaaaaa")
        assert evaluate(out, *SMALL, "--budgets", 256) == 0
        commit("bbbbbbb")
        assert evaluate(out, *SMALL, "--budgets", 256, "--resume") == 0
        warning = "has cells measured with commit='aaaaaaa'; this run has commit='bbbbbbb'"
        assert warning in capsys.readouterr().err
        assert "Measured in parts" not in (out / "results.md").read_text()
        assert evaluate(out, *SMALL, "--budgets", 128, 256, "--resume") == 0

        found = json.loads((out / "results.json").read_text())
        assert [c["commit"] for c in found["conditions"]] == ["aaaaaaa", "bbbbbbb"]
        measured = {(row["method"], row["budget"]): row["conditions"] for row in found["rows"]}
        assert measured == {("dense", 0): [0], ("quest", 256): [0], ("quest", 128): [1]}
        text = (out / "results.md").read_text().splitlines()
        (first, second) = text[text.index("## Measured in parts") + 2 :]
        assert "commit aaaaaaa;" in first and first.endswith(
            ": recall-16 dense 0, recall-16 quest 256"
        )
        assert "commit bbbbbbb;" in second and second.endswith(": recall-16 quest 128")

    def test_results_are_not_overwritten(self, out, capsys):
        assert evaluate(out, *SMALL, "--budgets", 256) == 0
        before = lines(out)
        assert evaluate(out, *SMALL, "--budgets", 256) == 2
        assert "go on with it (--resume), or choose another --out" in capsys.readouterr().err
        assert lines(out) == before


class TestWritten:
    def test_json_markdown_and_plots(self, out):
        pytest.importorskip("matplotlib")
        assert evaluate(out, *SMALL, "--budgets", 128, 256) == 0
        result = json.loads((out / "results.json").read_text())
        assert {"commit", "torch", "kernels"} <= result["identity"].keys()
        assert result["settings"]["model"] == "recall"
        served = {row["method"]: row["implementation"] for row in result["rows"]}
        assert served["dense"] == "transformers sdpa, not compiled"
        assert served["quest"].startswith("quest_compile.backend, inner eager, ")
        text = (out / "results.md").read_text()
        assert "| quest  | 256 " in text
        assert "inconclusive: 381 samples needed" in text
        assert (out / "recall-16_1024.png").read_bytes().startswith(b"\x89PNG")

    def test_without_matplotlib_the_rest_is_written_and_it_says_so(self, out, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert evaluate(out, *SMALL, "--budgets", 256) == 0
        assert "pip install 'quest-compile[plots]'" in capsys.readouterr().out
        assert (out / "results.md").exists()
        assert not list(out.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./no/such/folder"], "there is no folder ./no/such/folder"),
        (["recall", "--tasks", "passkeys"], "--tasks: 'passkeys' is not one of passkey"),
        (["recall", "--tasks", "passkey"], "passkey needs a tokenizer, and recall has none"),
        (["recall", "--tasks", "recall-2000"], "must be recall-N with N records from 1 to 511"),
        (["recall", "--lengths", "9000"], "--lengths 9000: the model has 8192 positions"),
        (["recall", "--budgets", "0"], "expected 1 or more tokens, got 0"),
        (["recall", "--budgets", "8"], "budget: expected room for "),
        (["recall", "--samples", "0"], "--samples must be at least 1"),
        (["recall", "--margin", "0"], "--margin must be between 0 and 100 points"),
        (["recall", "--methods", "quests"], "method must be one of dense, quest"),
        (["recall", "--methods", "quest:budget=3"], "budget has an option of its own"),
        (
            ["recall", "--methods", "quest:budget=1.5"],
            "budget: expected a share of the context in (0, 1)",
        ),
        (["recall", "--methods", "quest:budget=2:0.5/x:9"], 'expected layers as ints or "default"'),
        (["recall", "--methods", "quest-reference:audit=5"], "does not know audit"),
        (
            ["recall", "--methods", "quest:preset=papers"],
            "preset: expected one of 'paper', got 'pa",
        ),
        (["recall", "--methods", "quest:group_reduce"], "settings are name=value"),
        (["recall", "--methods", "quest:group=none"], "unknown option group"),
        (["recall", "--jsonl", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (
            ["recall", "--jsonl", __file__],
            "test_eval_cli.py needs a tokenizer, and recall has none (it reads symbols, not text",
        ),
    ],
)
def test_mistakes_are_one_clear_line_and_write_nothing(arguments, message, out, capsys):
    try:
        status = evaluate(out, *arguments[1:], model=arguments[0])
    except SystemExit as error:
        status = error.code
    assert status == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in err
    assert err.startswith("quest-compile eval: ")
    assert not out.exists()
