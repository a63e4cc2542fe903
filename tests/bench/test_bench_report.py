"""Reports: tables, plots, and the README's tables against the results on record."""

import pathlib
import shutil

import pytest

from quest_compile.bench import bench_report
from quest_compile.bench.report import tables
from quest_compile.bench.report.document import document, with_tables
from quest_compile.bench.report.names import label, seconds
from quest_compile.bench.report.plots import write_plots
from quest_compile.bench.report.stage_bars import stage_bars, too_many_bars
from quest_compile.bench.results import Result, write_results

ROOT = pathlib.Path(__file__).resolve().parents[2]
FACTS = {"benchmark": "ops", "cpu_count": 2, "cpu_model_name": "x", "kernels": "cpu:avx2"}
FACTS |= {"torch": "2", "commit": "abc", "date": "2026-11-22", "dtype": "bfloat16", "threads": 2}


def result(method, context, value, num_bytes, stage="", **more):
    facts = FACTS | {"context": context, "bytes_moved": num_bytes, "fraction_of_read_loop": 0.5}
    if method.startswith("quest"):
        facts["budget"] = 2048
    return Result(f"s/context{context}{stage}", method, [value], facts | more)


@pytest.fixture
def results():
    found = []
    for context, dense, quest in ((4096, 1e-3, 2e-3), (8192, 2e-3, 1e-3), (16384, 4e-3, 1e-3)):
        found.append(result("dense_decode", context, dense, 16 * context))
        found.append(result("quest_2048", context, quest, 2 * context))
        parts = zip(tables.STAGES, (1e-4, 2e-5, 3e-4))
        found += [result("quest_2048", context, x, 1, f"/{stage}") for stage, x in parts]
    return found


def test_the_readme_tables_are_those_of_the_results_on_record():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- bench: " in text
    assert with_tables(text) == text


def test_a_changed_number_in_a_marked_table_is_put_right(results, tmp_path):
    write_results(tmp_path / "r", results) if (tmp_path / "r").mkdir() is None else None
    right = with_tables("a\n<!-- bench: attention r -->\n<!-- bench end -->\nb\n", tmp_path)
    assert "| Quest, budget 2048 | 1 ms | 0.50 | 4 |" in right
    assert with_tables(right.replace("1 ms", "0.5 ms"), tmp_path) == right
    with pytest.raises(ValueError, match="no table 'nonsense'"):
        with_tables("<!-- bench: nonsense r -->\n<!-- bench end -->", tmp_path)


def test_break_even_is_interpolated(results):
    (line,) = tables.break_even(results, ["quest_2048"])
    # Half as fast at 4096, twice as fast at 8192.
    assert line == "Quest, budget 2048, bfloat16: faster from 5461 tokens on."


def test_speed_up_stands_beside_what_the_bytes_allow(results):
    table = tables.contexts(results)
    assert "| bfloat16, 16K | 4 ms | 1 ms | 4.00 | 8.0 |" in table


def test_stages_stand_beside_the_operator(results):
    assert "bfloat16, 8K | 100 us | 20 us | 300 us | 1 ms |" in tables.stages(results)


def staged(places, methods=("quest_2048", "quest-sketch_2048")):
    """Results of every method at every place, with their stages."""
    found = []
    for where in places:
        facts = FACTS | {"shape": "s", "context": 8192, "budget": 2048} | where
        name = "/".join(f"{key}{value}" for key, value in facts.items())
        for method in methods:
            parts = [Result(f"{name}/{stage}", method, [1e-4], facts) for stage in tables.STAGES]
            found += [Result(name, method, [1e-3], facts), *parts]
    return found


@pytest.mark.parametrize(
    "places",
    [
        [{"shape": shape, "context": n} for shape in "abc" for n in (4096, 8192)],
        [{"threads": threads, "batch": batch} for threads in (1, 2) for batch in (1, 8)],
    ],
)
def test_every_result_has_a_bar_of_its_own(places):
    methods = ("quest_2048", "quest_2048_page32", "quest-sketch_2048", "quest_1024@avx2")
    bars = stage_bars(staged(places, methods))
    assert len({name for name, _ in bars}) == len(bars) == len(places) * len(methods)
    assert all(seconds == [1e-4] * 3 for _, seconds in bars)


def test_labels_of_bars_name_what_varies():
    assert [name for name, _ in stage_bars(staged([{"context": 4096}, {"context": 32768}]))] == [
        "budget 2048, sketch, 4K tokens",
        "budget 2048, 4K tokens",
        "budget 2048, sketch, 32K tokens",
        "budget 2048, 32K tokens",
    ]
    kinds = ("quest-paper_64", "quest-minmax_64", "quest_64")
    assert [name for name, _ in stage_bars(staged([{}], kinds))] == [
        'budget 64, summary="minmax", group_reduce="sum"',
        "budget 64, paper",
        "budget 64",
    ]


@pytest.mark.parametrize(
    ("places", "is_drawn", "is_said"),
    [
        ([{"context": 1024 * i} for i in range(1, 13)], True, False),
        ([{"context": 1024 * i} for i in range(1, 14)], False, True),
        ([{"shape": "a"}, {"shape": "b"}], False, False),
        ([{"threads": 1}, {"threads": 2}], False, False),
    ],
    ids=["24 bars", "26 bars", "shapes", "threads"],
)
def test_stages_are_drawn_where_they_can_be_read(places, is_drawn, is_said, tmp_path, capsys):
    plots = pytest.importorskip("quest_compile.bench.report.plots")
    results = [
        Result(r.workload, r.method, r.values, r.metadata | {"bytes_moved": 1})
        for r in staged(places)
    ]
    assert ("stages_bfloat16.svg" in plots.write_plots(results, tmp_path)) == is_drawn
    assert (tmp_path / "stages_bfloat16.png").is_file() == is_drawn
    sentence = "The plot of stages in bfloat16 is left out: it would have 26 bars, more than 24."
    assert too_many_bars(results) == ([sentence] if is_said else [])


def test_marked_results_are_seen(results, tmp_path):
    results[0].metadata["marked"] = "load"
    write_results(tmp_path, results)
    text = document(tmp_path)
    assert "1 ms (!)" in text
    assert "1 of 15 results are marked (!)" in text


def test_report_writes_markdown_and_plots(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_results(tmp_path, results)
    assert bench_report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for name in ("time_bfloat16", "speedup_bfloat16", "stages_bfloat16"):
        assert f"]({name}.svg)" in text
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    first = (tmp_path / "speedup_bfloat16.svg").read_bytes()
    assert b"by bytes" in first
    again = tmp_path / "again"
    again.mkdir()
    for path in tmp_path.glob("*.json"):
        shutil.copy(path, again)
    assert bench_report.main([str(again)]) == 0
    assert (again / "speedup_bfloat16.svg").read_bytes() == first


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("quest_2048", "Quest, budget 2048"),
        ("quest-int8_1024", 'Quest, budget 1024, `summary="minmax_int8"`'),
        ("quest-sketch_512_page32", 'Quest, budget 512, `summary="sketch"`, page 32'),
        ("quest-paper_512", 'Quest, budget 512, `preset="paper"`'),
        ("quest-minmax_512", 'Quest, budget 512, `summary="minmax", group_reduce="sum"`'),
        ("quest-sketch1_512@avx2", "Quest, budget 512, `sketch_bits=1`, avx2"),
        ("dense_decode@avx2", "`dense_decode`, all tokens, avx2"),
        ("some_new_thing", "some_new_thing"),
    ],
)
def test_labels_of_methods(method, text):
    assert label(method) == text


def test_times_have_three_digits_and_a_unit():
    assert [seconds(x) for x in (2.5, 0.1234, 9.876e-4, 3e-7)] == [
        "2.5 s",
        "123 ms",
        "988 us",
        "0.3 us",
    ]


def cost(workload, method, value, unit="second"):
    benchmark = workload.partition("/")[0]
    facts = FACTS | {"benchmark": benchmark, "shape": "s", "context": 8192}
    return Result(workload, method, [value], facts, unit)


def test_costs_come_from_several_folders(tmp_path):
    folders = {
        "compile": [
            cost("compile/s/first token, cold", "quest_2048", 30),
            cost("compile/s/first token, warm", "quest_2048", 5),
            cost("compile/s/passes", "quest_2048", 0.1),
            cost("compile/s/first token, cold", "dense_transformers", 28),
        ],
        "memory": [
            cost("memory/s/cache", "quest_2048", 2**28, "byte"),
            cost("memory/s/page_summaries", "quest_2048", 2**24, "byte"),
            cost("memory/s/peak", "quest_2048", 2**30, "byte"),
        ],
        "longrun": [
            cost(f"longrun/s/tokens {i}-{i + 500}", "quest_2048", 0.06 + i / 1e5)
            for i in (0, 500, 1000)
        ],
        "overhead": [
            cost(f"overhead/{n} layers/{what}", "quest", n * 1e-3)
            for n in (4, 32)
            for what in ("passes", "a step with state")
        ],
    }
    for name, results in folders.items():
        (tmp_path / name).mkdir()
        write_results(tmp_path / name, results)
    folders["overhead"][0].metadata["commit"] = "other"
    write_results(tmp_path / "overhead", folders["overhead"])
    marker = "<!-- bench: costs compile\nmemory longrun overhead -->\n<!-- bench end -->"
    right = with_tables(marker, tmp_path)
    assert "| Quest, budget 2048 | 30 s | 5 s | 100 ms |" in right
    assert "| `torch.compile` of the model as it is | 28 s | - | - |" in right
    assert "| Quest, budget 2048 | 256.0 MiB | 16.0 MiB | 1024.0 MiB |" in right
    assert "a step, tokens 0-500 | a step, tokens 1000-1500 |" in right
    assert "| Quest, budget 2048 | 60 ms | 70 ms |" in right
    assert "| 32 layers | 32 ms | 32 ms |" in right
    assert "\ncompile, memory, longrun: 2 cores of x" in right
    assert "\noverhead: 2 cores of x, kernels cpu:avx2, torch 2, commit other" in right
    assert with_tables(right.replace("16.0 MiB", "15.0 MiB"), tmp_path) == right


def test_costs_of_other_benchmarks_and_other_tables_of_several_folders_are_refused(
    results, tmp_path
):
    write_results(tmp_path, results)
    with pytest.raises(ValueError, match="table costs: expected results of compile, .* got ops"):
        with_tables("<!-- bench: costs . -->\n<!-- bench end -->", tmp_path)
    with pytest.raises(ValueError, match="table attention: expected one folder, got ., ./"):
        with_tables("<!-- bench: attention . ./ -->\n<!-- bench end -->", tmp_path)


def test_sizes_at_several_contexts_are_no_times_to_plot(results, tmp_path):
    for found in results:
        found.metadata["benchmark"] = "memory"
        del found.metadata["bytes_moved"]
    assert write_plots(results, tmp_path) == []
    assert not list(tmp_path.iterdir())
