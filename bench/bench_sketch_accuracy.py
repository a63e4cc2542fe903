"""What each page summary selects: attention mass kept, and answers right, through the operators.

    python -m quest_compile.bench sketch-accuracy --parts synthetic recall --out results.json
    python -m quest_compile.bench sketch-accuracy --parts trained --encoder FOLDER --text BOOK

"recall": the shipped model answers questions about its context, decoding with compiled graphs.
"synthetic": random keys with RoPE. "trained": queries and keys of a sentence encoder (BERT) that
reads a book. "oracle" are the pages with the most attention mass. The result is JSON and, beside
it, Markdown.
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

from quest_compile.bench.identity import identity
from quest_compile.bench.sketch_keys import KINDS, encoder_heads, synthetic_heads
from quest_compile.bench.sketch_recall import measure_recall
from quest_compile.bench.sketch_scores import (
    MAXIMUM,
    PAGE_SIZE,
    SUMMARIES,
    bytes_per_page,
    page_scores,
)
from quest_compile.bench.sketch_tables import markdown


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
        scores = {name: page_scores(query, keys, name) for name in (*SUMMARIES, *MAXIMUM)}
        scores["oracle"] = mass.sum(2)
        for name, score in scores.items():
            values = []
            for budget in budgets:
                pages = score.topk(budget, -1).indices[:, :, None]
                taken = mass.gather(-1, pages.expand(-1, -1, mass.shape[2], -1)).sum(-1)
                values.append(taken.mean().item())
            kept.setdefault(name, []).append(values)
    return {name: torch.tensor(values).mean(0).tolist() for name, values in kept.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quest-compile bench sketch-accuracy")
    parser.add_argument("--parts", nargs="+", choices=("recall", "synthetic", "trained"))
    parser.add_argument("--out", type=Path, default=Path("sketch_accuracy.json"))
    parser.add_argument(
        "--samples", type=int, default=320, help="questions at 4096 tokens; default 320"
    )
    parser.add_argument("--long-samples", type=int, default=640, help="at 8192 tokens; default 640")
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--long-budgets", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--encoder", type=Path, help="folder of a BERT model, for trained")
    parser.add_argument("--text", type=Path, help="UTF-8 book, for trained")
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens of the book")
    args = parser.parse_args(argv)
    parts = args.parts or ["synthetic", "recall"]
    result: dict[str, Any] = {"identity": identity(), "page_size": PAGE_SIZE}
    result["bytes_per_page"] = {
        str(head_dim): {name: bytes_per_page(head_dim, name) for name in SUMMARIES}
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
        kept = mass_kept(heads, [2, 4, 8])
        result["trained"] = {"windows": args.windows, "pages": [2, 4, 8], **kept}
    if "recall" in parts:
        folder = args.out.with_suffix("")
        result["recall"] = [
            measure_recall(4096, 64, args.samples, args.budgets, folder / "recall-4096"),
            measure_recall(8192, 128, args.long_samples, args.long_budgets, folder / "recall-8192"),
        ]
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))
    return 0


def _single(kept: dict[str, list[float]]) -> dict[str, float]:
    return {name: values[0] for name, values in kept.items()}
