"""Results on record in tables of documents: by the names that settings have today."""

import pytest

from quest_compile.bench.report.more_tables import decode_short
from quest_compile.bench.report.names import today
from quest_compile.bench.results import Result

SHORT = ("dense_decode", "llama_cpp", "dense_enable_gqa", "dense_transformers")


def result(method, context, value, **facts):
    facts |= {"context": context, "fraction_of_read_loop": 0.5}
    return Result(f"s/context{context}", method, [value], facts)


@pytest.mark.parametrize(
    ("method", "facts", "name"),
    [
        ("quest_64", {"summary": "minmax"}, "quest-minmax_64"),
        ("quest-sketch_64", {"summary": "sketch"}, None),
        ("quest-int8_64", {"summary": "minmax_int8"}, None),
        ("quest_64", {"summary": "sketch", "group_reduce": "softmax"}, "quest_64"),
        ("quest", {}, "quest"),
        ("dense_decode", {}, "dense_decode"),
    ],
)
def test_names_of_today(method, facts, name):
    found = today(result(method, 1024, 1.0, **facts))
    assert (found and found.method) == name


@pytest.mark.parametrize("kinds", [["quest-minmax", "quest"], ["quest-minmax"]])
def test_the_short_table_has_five_rows_and_the_default_if_it_was_measured(kinds):
    names = [(f"{kind}_{budget}", budget) for kind in kinds for budget in (512, 2048)]
    found = [result(method, n, n * 1e-6) for method in SHORT for n in (1024, 4096)]
    found += [
        result(method, n, n * 1e-6 / 2, budget=budget)
        for method, budget in names
        for n in (1024, 4096)
    ]
    lines = decode_short(found).splitlines()
    assert len(lines) == 2 + 5
    wanted = "Quest, budget 2048" + (", `" if kinds == ["quest-minmax"] else " |")
    assert lines[2].startswith(f"| {wanted}")
    assert lines[2].endswith("| 512 us | 2.05 ms | 2.00x | 2.00x |")
    assert lines[3] == "| `dense_decode`, all tokens | 1.02 ms | 4.1 ms | 1.00x | 1.00x |"
