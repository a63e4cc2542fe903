"""The options of ``quest-compile eval``, and what they become for a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from quest_compile.choices import DTYPES, INNER_COMPILERS
from quest_compile.eval.generators import TEXT_TASKS
from quest_compile.eval.samples import AGREEMENT, COPY_TASKS, PERPLEXITY, RECALL
from quest_compile.options import budget
from quest_compile.quantize import add_quantize_argument, check_quantize
from quest_compile.real_model.find import find_model
from quest_compile.real_model.options import add_model_argument

RECALL_MODEL = "recall"
EXAMPLES = """\
  quest-compile eval smollm2 --quick
  quest-compile eval ./my-model --tasks copy --lengths 4096 --budgets 512 2K 0.05
  quest-compile eval recall --tasks recall-16 --json > results.json"""

# Per task, and each has a context of its own to read: most of the time.
_QUICK_SAMPLES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options, with their defaults in the help."""
    tasks = ", ".join(_known_tasks())
    add_model_argument(parser, f'; "{RECALL_MODEL}": the model shipped here')
    parser.add_argument("--tasks", nargs="+", default=None, help=f"{tasks} (N records)")
    parser.add_argument("--jsonl", type=Path, nargs="+", default=[], help="files of samples")
    parser.add_argument("--haystack", type=Path, help="UTF-8 book for niah tasks that need one")
    parser.add_argument(
        "--text", type=Path, help="UTF-8 text for perplexity, agreement and copy; copy does without"
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; default 4096")
    parser.add_argument("--budgets", type=budget, nargs="+", help="tokens, or shares as 0.05")
    parser.add_argument("--samples", type=int, help="questions per task and length; default 100")
    parser.add_argument("--decoded", type=int, default=256, help="tokens per window of --text")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=None,
        help="quest, quest:group_reduce=none,..., quest:preset=paper, quest:budget=0.05 (a share "
        "of the context), quest:budget=2:64/3:128 (of layers), quest-reference with the same, "
        "oracle, streaming, random, h2o, snapkv; dense is always measured; default quest",
    )
    parser.add_argument("--page-size", type=int, help="tokens; default as Quest")
    parser.add_argument("--num-dense-layers", type=int, help="default as Quest")
    parser.add_argument(
        "--inner", choices=INNER_COMPILERS, help="default eager on CPU, inductor on CUDA"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default float32 on CPU, bfloat16 on CUDA")
    add_quantize_argument(parser)
    parser.add_argument("--no-chat", action="store_true", help="without the chat template")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--margin", type=float, default=1.0, help="points; default 1")
    parser.add_argument("--loss-margin", type=float, default=0.01, help="nats; default 0.01")
    parser.add_argument("--out", type=Path, default=Path("quest-eval"), help="folder of results")
    parser.add_argument("--resume", action="store_true", help="go on with what --out has")
    parser.add_argument("--quick", action="store_true", help="a first look, in minutes")
    parser.add_argument("--json", action="store_true", help="print results.json, not the tables")


def check(args: argparse.Namespace) -> None:
    """Fill in defaults that depend on other options.

    Raises:
        ValueError: options that do not fit together or have a bad value; no such model.
    """
    fill_in(args)
    if args.model != RECALL_MODEL:
        find_model(args.model)


def fill_in(args: argparse.Namespace) -> None:
    """Defaults that depend on other options, and checks that need no model.

    Raises:
        ValueError: options that do not fit together or have a bad value.
    """
    is_recall = args.model == RECALL_MODEL
    if args.tasks is None:
        args.tasks = [f"{RECALL}16", f"{RECALL}64"] if is_recall else _default_tasks(args)
    if args.methods is None:
        baselines = ["oracle", "streaming", "random"] if is_recall else []
        args.methods = ["quest", *baselines]
    args.budgets = args.budgets or ([64, 256, 1024] if is_recall else [512, 2048])
    if args.samples is None:
        args.samples = _QUICK_SAMPLES if args.quick and not is_recall else 100
    if args.quick and is_recall:
        args.samples = min(args.samples, 64)
    args.lengths = args.lengths or [4096]
    args.inner = args.inner or ("eager" if args.device == "cpu" else "inductor")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    _check(args)


def _default_tasks(args: argparse.Namespace) -> list[str]:
    if args.jsonl:
        return []
    tasks = ["passkey", "niah_multikey_2", "vt"] if args.quick else _tasks_without_files()
    return tasks + ([PERPLEXITY] if args.text else [])


def _tasks_without_files() -> list[str]:
    return [name for name, task in TEXT_TASKS.items() if not task.needs_book]


def _known_tasks() -> tuple[str, ...]:
    return (*TEXT_TASKS, *COPY_TASKS, PERPLEXITY, AGREEMENT, f"{RECALL}N")


def _check(args: argparse.Namespace) -> None:
    check_quantize(args.quantize)
    for name in args.tasks:
        if name not in _known_tasks() and not name.startswith(RECALL):
            known = ", ".join(_known_tasks())
            raise ValueError(f"--tasks: {name!r} is not one of {known}")
    for option in ("samples", "decoded"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} must be at least 1, got {getattr(args, option)}")
    if min(args.lengths) < 1:
        raise ValueError(f"--lengths must be positive, got {args.lengths}")
    if not 0 < args.margin < 100:
        raise ValueError(f"--margin must be between 0 and 100 points, got {args.margin}")
    if args.loss_margin <= 0:
        raise ValueError(f"--loss-margin must be above 0 nats, got {args.loss_margin}")
    for path in (*args.jsonl, args.haystack, args.text):
        if path is not None and not path.is_file():
            raise ValueError(f"there is no file {path}")
