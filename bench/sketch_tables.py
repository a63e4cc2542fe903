"""What ``sketch-accuracy`` measured, as Markdown."""

from __future__ import annotations

from typing import Any

from quest_compile.bench.sketch_scores import MAXIMUM


def markdown(result: dict[str, Any]) -> str:
    """The whole page: conditions, then a table for each part there is."""
    described = "; ".join(f"{name} {value}" for name, value in result["identity"].items())
    lines = ["# What each page summary selects", "", f"{described}; page size 16", ""]
    for part in result.get("recall", ()):
        lines += _recall(part, result["bytes_per_page"]["64"])
    if "synthetic" in result:
        lines += _synthetic(result["synthetic"], _order(result["bytes_per_page"]["128"]))
    if "trained" in result:
        lines += _trained(result["trained"], result["bytes_per_page"]["32"])
    return "\n".join(lines[:-1]) + "\n"


def _order(row_bytes: dict[str, int]) -> list[str]:
    """Of what was measured then."""
    return [*row_bytes, *MAXIMUM, "oracle"]


def _recall(part: dict[str, Any], row_bytes: dict[str, int]) -> list[str]:
    cells = {(row["method"], row["budget"]): row for row in part["rows"]}
    dense = cells["dense", 0]
    budgets = sorted({budget for _, budget in cells if budget})
    table = [
        [method, _relative(method, row_bytes), *(_answers(cells[method, b]) for b in budgets)]
        for method in _order(row_bytes)
        if (method, budgets[0]) in cells
    ]
    header = ["summary", "bytes", *(f"budget {budget}" for budget in budgets)]
    return [
        f"## Recall model, {part['tokens']} tokens, {part['records']} records",
        "",
        f"Right answers in %, 95 % interval, (attention mass kept); {dense['questions']} "
        f"questions, dense {_share(dense)}. No sink pages; the open page besides those chosen.",
        "",
        *_table(header, table),
        "",
    ]


def _answers(row: dict[str, Any]) -> str:
    mass = "" if row["mass_kept"] is None else f" ({row['mass_kept']:.2f})"
    return _share(row) + mass


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['right']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _synthetic(rows: list[dict[str, Any]], order: list[str]) -> list[str]:
    table = [[r["keys"], r["pages"], *(f"{r[name]:.3f}" for name in order)] for r in rows]
    title = ["## Synthetic keys with RoPE, attention mass kept", ""]
    return [*title, *_table(["keys", "of 1024 pages", *order], table), ""]


def _trained(part: dict[str, Any], row_bytes: dict[str, int]) -> list[str]:
    pages, windows = part["pages"], part["windows"]
    table = [
        [name, _relative(name, row_bytes), *(f"{value:.3f}" for value in part[name])]
        for name in _order(row_bytes)
    ]
    return [
        f"## Sentence encoder, {windows} windows of 512 tokens, attention mass kept",
        "",
        *_table(["summary", "bytes", *(f"{count} of 32 pages" for count in pages)], table),
        "",
    ]


def _relative(method: str, row_bytes: dict[str, int]) -> str:
    """To the paper's summary of 16-bit keys."""
    size = row_bytes.get(method.removesuffix(", maximum"))
    return "" if size is None else f"{size / row_bytes['minmax']:.2f}"


def _table(header: list[Any], rows: list[list[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]
