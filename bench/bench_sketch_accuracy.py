"""What each page summary selects: attention mass kept, and answers right, through the operators.

    python -m quest_compile.bench sketch-accuracy --parts synthetic recall --out results.json
    python -m quest_compile.bench sketch-accuracy --parts trained --encoder FOLDER --text BOOK

"recall": the shipped model answers questions about its context, decoding with compiled graphs.
"synthetic": random keys with RoPE. "trained": queries and keys of a sentence encoder (BERT) that
reads a book. "oracle" are the pages with the most attention mass. The result is JSON and, beside
it, Markdown, written after every step.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from quest_compile.bench import options
from quest_compile.bench.identity import identity, record_folder
from quest_compile.bench.results import CONDITIONS
from quest_compile.bench.sketch_keys import KINDS, encoder_heads, num_encoder_heads, synthetic_heads
from quest_compile.bench.sketch_mass import mass_kept
from quest_compile.bench.sketch_recall import measure_recall
from quest_compile.bench.sketch_scores import PAGE_SIZE, SUMMARIES, bytes_per_page
from quest_compile.bench.sketch_tables import markdown

_SYNTHETIC_PAGES = (32, 128)
_TRAINED_PAGES = (2, 4, 8)
_RECALLS = ((4096, 64), (8192, 128))
# Options that change results.
_SETTINGS = ("samples", "long_samples", "budgets", "long_budgets", "windows")

# A step adds what it found to the result.
Step = Callable[[dict[str, Any]], None]


def measure_synthetic(kind: str, result: dict[str, Any]) -> None:
    kept = mass_kept(synthetic_heads(kind), _SYNTHETIC_PAGES)
    rows = result.setdefault("synthetic", [])
    for i, pages in enumerate(_SYNTHETIC_PAGES):
        rows.append({"keys": kind, "pages": pages} | {name: kept[name][i] for name in kept})


def measure_trained(args: argparse.Namespace, result: dict[str, Any]) -> None:
    from tqdm import tqdm

    heads: Iterable[Any] = encoder_heads(args.encoder, args.text, args.windows)
    total = num_encoder_heads(args.encoder, args.windows)
    heads = tqdm(heads, desc="trained", unit="query", total=total, leave=False)
    kept = mass_kept(heads, _TRAINED_PAGES)
    result["trained"] = {"windows": args.windows, "pages": list(_TRAINED_PAGES), **kept}


def answer(args: argparse.Namespace, tokens: int, records: int, result: dict[str, Any]) -> None:
    """Answers so far are kept beside ``--out`` when this is interrupted."""
    is_short = tokens == _RECALLS[0][0]
    samples = args.samples if is_short else args.long_samples
    budgets = args.budgets if is_short else args.long_budgets
    folder = _answers_folder(args.out) / f"recall-{tokens}"
    found = measure_recall(tokens, records, samples, budgets, folder)
    result.setdefault("recall", []).append(found)


def steps_of(args: argparse.Namespace, parts: Sequence[str]) -> dict[str, Step]:
    """What to measure, by name."""
    steps: dict[str, Step] = {}
    if "synthetic" in parts:
        for kind in KINDS:
            steps[f"synthetic, {kind}"] = functools.partial(measure_synthetic, kind)
    if "trained" in parts:
        steps["trained"] = functools.partial(measure_trained, args)
    if "recall" in parts:
        for tokens, records in _RECALLS:
            step = functools.partial(answer, args, tokens, records)
            steps[f"recall, {tokens} tokens"] = step
    return steps


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 130 after Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    parts = args.parts or ["synthetic", "recall"]
    if "trained" in parts and (args.encoder is None or args.text is None):
        parser.error("--parts trained needs --encoder and --text")
    if args.out is None:
        name = f"{record_folder('sketch-accuracy')}.json" if args.record else "sketch_accuracy.json"
        args.out = Path(name)
    result = begin(args)
    if not args.resume:
        shutil.rmtree(_answers_folder(args.out), ignore_errors=True)
    status = 0
    try:
        measure_all(args.out, steps_of(args, parts), result)
        shutil.rmtree(_answers_folder(args.out), ignore_errors=True)
    except KeyboardInterrupt:
        status = options.interrupted()
    print(markdown(result))
    if args.out.exists():
        print(f"wrote {args.out} and {args.out.with_suffix('.md')}")
    return status


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """The result without any step, or with ``--resume`` that of ``--out``.

    Raises:
        ValueError: ``--out`` exists and there is no ``--resume``, or it was measured with other
            settings, or elsewhere.
    """
    settings = {name: getattr(args, name) for name in _SETTINGS}
    fresh = {"identity": identity(), "settings": settings, "page_size": PAGE_SIZE, "steps": []}
    fresh["bytes_per_page"] = {
        str(head_dim): {name: bytes_per_page(head_dim, name) for name in SUMMARIES}
        for head_dim in (32, 64, 128)
    }
    if not args.out.exists():
        return fresh
    if not args.resume:
        raise ValueError(f"--out {args.out} exists already: add --resume, or name another file")
    earlier = json.loads(args.out.read_text("utf-8"))
    was, now = ({**r.get("settings", {}), **r["identity"]} for r in (earlier, fresh))
    for name in itertools.chain(_SETTINGS, CONDITIONS):
        if was.get(name) != now[name]:
            raise ValueError(
                f"--resume: {args.out} was measured with {name} {was.get(name)!r}, "
                f"this is {now[name]!r}"
            )
    return earlier


def measure_all(out: Path, steps: dict[str, Step], result: dict[str, Any]) -> None:
    """Add every step that ``result`` does not have, and write ``out`` after each."""
    from tqdm import tqdm

    for name, step in (bar := tqdm(steps.items(), desc="bench sketch-accuracy", unit="step")):
        bar.set_postfix_str(name)
        if name in result["steps"]:
            continue
        step(result)
        result["steps"].append(name)
        new = out.with_name(f"{out.name}.new")
        new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        new.replace(out)
        out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def _answers_folder(out: Path) -> Path:
    """Where answers are kept until all is done."""
    return out.with_name(f"{out.stem}-answers")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quest-compile bench sketch-accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=("recall", "synthetic", "trained"))
    add("--out", type=Path, metavar="FILE", help="default sketch_accuracy.json")
    add("--record", action="store_true", help="--out bench/results/DATE_MACHINE_COMMIT_NAME.json")
    add("--resume", action="store_true", help="keep what the file has, measure what is missing")
    add("--samples", type=int, default=320, help="questions at 4096 tokens; default 320")
    add("--long-samples", type=int, default=640, help="at 8192 tokens; default 640")
    add("--budgets", type=int, nargs="+", default=[32, 64, 128, 256])
    add("--long-budgets", type=int, nargs="+", default=[128, 256])
    add("--encoder", type=Path, help="folder of a BERT model, for trained")
    add("--text", type=Path, help="UTF-8 book, for trained")
    add("--windows", type=int, default=12, help="of 512 tokens of the book")
    return parser
