"""bench sketch-accuracy: what it keeps when it is stopped, what it goes on with, and where."""

import json
import re

import pytest
import torch

from quest_compile.bench import bench_sketch_accuracy as subject
from quest_compile.bench import identity, sketch_keys, sketch_mass, sketch_recall, sketch_scores
from quest_compile.bench.__main__ import main as bench_main


@pytest.fixture
def small(monkeypatch):
    """Keys of 1,024 tokens instead of 16,384."""
    monkeypatch.setattr(sketch_keys, "_TOKENS", 1024)
    monkeypatch.setattr(subject, "_SYNTHETIC_PAGES", (4, 16))


def load(path):
    return json.loads(path.read_text("utf-8"))


def test_ctrl_c_keeps_what_is_done_and_resume_goes_on(small, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole.json", tmp_path / "stopped.json"
    assert subject.main(["--parts", "synthetic", "--out", str(whole)]) == 0
    measure, measured = subject.measure_synthetic, []

    def stops_at_the_third(kind, result):
        measured.append(kind)
        if len(measured) == 3:
            raise KeyboardInterrupt
        measure(kind, result)

    monkeypatch.setattr(subject, "measure_synthetic", stops_at_the_third)
    command = ["--parts", "synthetic", "--out", str(stopped)]
    assert subject.main(command) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [row["keys"] for row in load(stopped)["synthetic"][::2]] == measured[:2]
    assert subject.main([*command, "--resume"]) == 0
    assert measured == [*measured[:3], *sketch_keys.KINDS[2:]]
    assert load(stopped)["synthetic"] == load(whole)["synthetic"]
    assert len(load(whole)["synthetic"]) == 12
    assert "bench sketch-accuracy: 100%" in capsys.readouterr().err


def test_a_file_is_not_written_over_and_not_continued_with_other_settings(
    small, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "kept.json"
    command = ["sketch-accuracy", "--parts", "synthetic", "--out", str(out)]
    assert bench_main(command) == 0
    before = out.read_bytes()
    assert bench_main(command) == 2
    assert "exists already: add --resume" in capsys.readouterr().err
    assert bench_main([*command, "--resume", "--samples", "7"]) == 2
    assert "was measured with samples 320, this is 7" in capsys.readouterr().err
    monkeypatch.setattr(subject, "identity", lambda: identity.identity() | {"commit": "other"})
    assert bench_main([*command, "--resume"]) == 2
    assert "was measured with commit" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_record_names_its_file_by_date_machine_and_commit(small, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "RESULTS", tmp_path)
    assert subject.main(["--parts", "synthetic", "--record"]) == 0
    commit = re.escape(identity.commit().replace("+", "-"))
    for path, ending in zip(sorted(tmp_path.iterdir()), ("json", "md"), strict=True):
        name = rf"\d{{4}}-\d\d-\d\d_.+_{commit}_sketch-accuracy\.{ending}"
        assert re.fullmatch(name, path.name)


def test_answers_so_far_are_kept_and_go_into_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "_RECALLS", ((1024, 16),))
    monkeypatch.setattr(sketch_recall, "SUMMARIES", {"minmax": {"summary": "minmax"}})
    monkeypatch.setattr(sketch_recall, "MAXIMUM", {})
    out = tmp_path / "kept.json"
    command = ["--parts", "recall", "--out", str(out), "--samples", "4", "--budgets", "64"]
    from quest_compile.eval.records import Records

    add = Records.add

    def add_then_stop(self, *args, **kwargs):
        add(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Records, "add", add_then_stop)
        assert subject.main(command) == 130
    assert not out.exists()
    assert (tmp_path / "kept-answers" / "recall-1024" / "records.jsonl").exists()
    assert subject.main([*command, "--resume"]) == 0
    (found,) = load(out)["recall"]
    assert {row["method"] for row in found["rows"]} == {"dense", "oracle", "minmax"}
    assert not (tmp_path / "kept-answers").exists()


def test_pages_with_the_most_mass_are_best_and_all_pages_have_all_of_it(small):
    heads = list(sketch_keys.synthetic_heads("topics"))
    kept = sketch_mass.mass_kept(heads, [4, 64])
    assert set(kept) == {*sketch_scores.SUMMARIES, *sketch_scores.MAXIMUM, "oracle"}
    for values in kept.values():
        assert 0 < values[0] <= kept["oracle"][0] + 1e-6
        torch.testing.assert_close(values[1], 1.0)
