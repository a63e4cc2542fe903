"""``bench longrun`` on a tiny model: windows, drift, what an interrupt keeps."""

import pytest

from quest_compile import ops
from quest_compile.bench import bench_longrun
from quest_compile.bench.decode.decoder import Decoder
from quest_compile.bench.results import load_results

ARGUMENTS = ["--model-shape", "tiny", "--contexts", "240", "--budgets", "64", "--dtype", "float32"]
ARGUMENTS += ["--rounds", "32", "--settings", "quest", "--max-load", "99"]

pytestmark = [
    pytest.mark.usefixtures("eager_decoding"),
    pytest.mark.skipif(not ops.native_status().loaded, reason="bench refuses to time plain torch"),
]


@pytest.fixture
def seconds_of(monkeypatch):
    """Real steps, that take as long as is said of each: (method, number) -> seconds."""
    sample, numbers = Decoder.sample, {}

    def plant(seconds):
        numbers.clear()

        def planted(decoder, number):
            sample(decoder, number)
            numbers[decoder.name] = count = numbers.get(decoder.name, -1) + 1
            return seconds(decoder.name, count)

        monkeypatch.setattr(Decoder, "sample", planted)
        return numbers

    return plant


def test_steady_steps_pass_and_say_what_they_read(tmp_path, seconds_of, capsys):
    seconds_of(lambda name, number: 1.0)
    assert bench_longrun.main([*ARGUMENTS, "--output", str(tmp_path)]) == 0
    results = load_results(tmp_path)
    quest = [r for r in results if r.method == "quest_64"]
    dense = [r for r in results if r.method == "dense_decode"]
    assert [len(r.values) for r in (*quest, *dense)] == [4] * 16
    names = [f"tokens {i}-{i + 4}" for i in range(0, 32, 4)]
    assert sorted(r.workload.rpartition("/")[2] for r in quest) == sorted(names)
    for facts in (r.metadata for r in quest):
        assert (facts["replaced_layers"], facts["sparse_layers"]) == (4, 2)
        assert facts["sparse_calls_per_step"] == 2
        assert 48 < facts["tokens_read_per_query"] <= 64
        assert facts["drift"] == 1.0 and facts["drift_allowed"] > 1.1
        assert facts["threads"] >= 1 and len(facts["digest"]) == 16 and facts["commit"]
    # Tokens that come last read more.
    reads = {r.workload.rpartition("/")[2]: r.metadata["kv_bytes_per_step"] for r in dense}
    assert reads["tokens 28-32"] > reads["tokens 0-4"]
    err = capsys.readouterr().err
    assert "making tiny, float32" in err
    for method in ("dense_decode", "quest_64"):
        assert f"{method}: checked and compiled, " in err
        assert f"{method}: 32 tokens, " in err


def test_steps_that_get_slower_are_marked(tmp_path, seconds_of, capsys):
    seconds_of(lambda name, number: 1.0 + 0.02 * number * name.startswith("quest"))
    assert bench_longrun.main([*ARGUMENTS, "--output", str(tmp_path)]) == 1
    marks = {r.method: r.marked for r in load_results(tmp_path)}
    assert marks["dense_decode"] == ""
    assert marks["quest_64"] == "the last steps take 1.53 times as long as the first"
    out = capsys.readouterr().out
    assert "MARKED longrun/tiny/" in out and "tokens 0-4, quest_64: the last steps" in out


def test_an_interrupt_keeps_windows_and_resume_measures_what_is_missing(tmp_path, seconds_of):
    def interrupted(name, number):
        # The first sample warms up; three windows of four are whole.
        if name == "quest_64" and number == 14:
            raise KeyboardInterrupt
        return 1.0

    seconds_of(interrupted)
    arguments = [*ARGUMENTS, "--output", str(tmp_path)]
    assert bench_longrun.main(arguments) == 130
    kept = {m: [r for r in load_results(tmp_path) if r.method == m] for m in
            ("dense_decode", "quest_64")}  # fmt: skip
    assert (len(kept["dense_decode"]), len(kept["quest_64"])) == (8, 3)
    assert {r.metadata["interrupted"] for r in kept["quest_64"]} == {"3 of 8 windows"}
    numbers = seconds_of(lambda name, number: 1.0)
    assert bench_longrun.main([*arguments, "--resume"]) == 0
    assert numbers == {"quest_64": 32}
    assert len(load_results(tmp_path)) == 16
    numbers = seconds_of(lambda name, number: 1.0)
    assert bench_longrun.main([*arguments, "--resume"]) == 0
    assert numbers == {}
