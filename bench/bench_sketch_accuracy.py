"""What each page summary selects: attention mass kept, and answers right, through the operators.

    python -m quest_compile.bench sketch-accuracy --parts synthetic recall --out results.json
    python -m quest_compile.bench sketch-accuracy --parts trained --encoder FOLDER --text BOOK

"recall": the shipped model answers questions about its context, decoding with compiled graphs.
"synthetic": random keys with RoPE. "trained": queries and keys of a sentence encoder (BERT) that
reads a book. "oracle" are the pages with the most attention mass. The result is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quest_compile import ops
from quest_compile.bench.identity import identity
from quest_compile.bench.sketch_keys import KINDS, encoder_heads, synthetic_heads

SUMMARIES: dict[str, dict[str, Any]] = {
    "minmax": {"summary": "minmax"},
    "minmax_int8": {"summary": "minmax_int8"},
    "meanstd": {"summary": "meanstd"},
    "sketch": {"summary": "sketch"},
    "sketch, 2 bits": {"summary": "sketch", "sketch_bits": 2},
}
PAGE_SIZE = 16


def page_scores(query: Tensor, keys: Tensor, settings: dict[str, Any]) -> Tensor:
    """[B, num_kv_heads, P] of queries [B, num_q_heads, 1, D] by the operators."""
    seq_lens = torch.tensor([keys.shape[2]])
    built = ops.build_page_summary(keys, seq_lens, **settings)
    rows, channel_scale = built if isinstance(built, tuple) else (built, None)
    return ops.score_pages(query, rows, seq_lens, channel_scale, **settings)


def bytes_per_page(head_dim: int, settings: dict[str, Any]) -> int:
    """Of 16-bit keys."""
    keys = torch.empty(1, 1, PAGE_SIZE, head_dim, dtype=torch.bfloat16)
    rows, _ = ops.empty_page_summary(keys, PAGE_SIZE, **settings)
    return rows[0, 0, 0].numel() * rows.element_size()


def mass_by_page(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of each query head [B, num_kv_heads, G, P], summed over pages."""
    grouped = query.unflatten(1, (keys.shape[1], -1)).squeeze(3)
    weights = (grouped @ keys.mT / math.sqrt(keys.shape[3])).softmax(-1)
    return weights.unflatten(-1, (-1, PAGE_SIZE)).sum(-1)


def mass_kept(heads: Iterator[tuple[Tensor, Tensor]], budgets: Sequence[int]) -> dict[str, Any]:
    """Mean attention mass in the best pages: summary -> one value per budget in pages."""
    kept: dict[str, list[list[float]]] = {}
    for query, keys in heads:
        mass = mass_by_page(query, keys)
        scores = {name: page_scores(query, keys, kind) for name, kind in SUMMARIES.items()}
        scores["oracle"] = mass.sum(2)
        for name, score in scores.items():
            values = []
            for budget in budgets:
                pages = score.topk(budget, -1).indices[:, :, None]
                taken = mass.gather(-1, pages.expand(-1, -1, mass.shape[2], -1)).sum(-1)
                values.append(taken.mean().item())
            kept.setdefault(name, []).append(values)
    return {name: torch.tensor(values).mean(0).tolist() for name, values in kept.items()}


def measure_recall(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Answers right of the recall model; Quest without sinks and with the open page only."""
    from quest_compile.eval.cli import main as evaluate

    methods = ["oracle"]
    for kind in SUMMARIES.values():
        settings = kind | {"num_sink_pages": 0, "num_recent_pages": 1}
        methods.append("quest:" + ",".join(f"{k}={v}" for k, v in settings.items()))
    rows = []
    for tokens, records, budgets in ((4096, 64, args.budgets), (8192, 128, args.long_budgets)):
        folder = args.out.with_suffix("") / f"recall-{tokens}"
        command = ["recall", "--tasks", f"recall-{records}", "--lengths", str(tokens)]
        command += ["--samples", str(args.samples), "--out", str(folder), "--resume"]
        evaluate([*command, "--budgets", *map(str, budgets), "--methods", *methods])
        rows.append(json.loads((folder / "results.json").read_text()))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quest-compile bench sketch-accuracy")
    parser.add_argument("--parts", nargs="+", choices=("recall", "synthetic", "trained"))
    parser.add_argument("--out", type=Path, default=Path("sketch_accuracy.json"))
    parser.add_argument("--samples", type=int, default=320, help="questions; default 320")
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--long-budgets", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--encoder", type=Path, help="folder of a BERT model, for trained")
    parser.add_argument("--text", type=Path, help="UTF-8 book, for trained")
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens of the book")
    args = parser.parse_args(argv)
    parts = args.parts or ["synthetic", "recall"]
    result: dict[str, Any] = {"identity": identity(), "page_size": PAGE_SIZE}
    result["bytes_per_page"] = {
        str(head_dim): {name: bytes_per_page(head_dim, kind) for name, kind in SUMMARIES.items()}
        for head_dim in (32, 64, 128)
    }
    if "synthetic" in parts:
        result["synthetic"] = [
            {"keys": kind, "pages": budget, **_single(mass_kept(synthetic_heads(kind), [budget]))}
            for kind in KINDS
            for budget in (32, 128)
        ]
    if "trained" in parts:
        if args.encoder is None or args.text is None:
            parser.error("--parts trained needs --encoder and --text")
        heads = encoder_heads(args.encoder, args.text, args.windows)
        result["trained"] = {"pages": [2, 4, 8], **mass_kept(heads, [2, 4, 8])}
    if "recall" in parts:
        result["recall"] = measure_recall(args)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "recall"}, indent=1))
    return 0


def _single(kept: dict[str, list[float]]) -> dict[str, float]:
    return {name: values[0] for name, values in kept.items()}
