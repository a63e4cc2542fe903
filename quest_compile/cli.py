"""The command line, ``quest-compile COMMAND``: nothing here imports torch before a command runs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import quest_compile
from quest_compile import demo_options, explain_command, serve_options
from quest_compile.eval import options as eval_options
from quest_compile.eval.samples import NotActiveError
from quest_compile.look import options as look_options
from quest_compile.options import Parser
from quest_compile.real_model import fetch
from quest_compile.start import import_all

# Exit status after Ctrl-C, and where nobody reads the output any more.
INTERRUPTED, CLOSED = 130, 141

# The extra of pyproject.toml that installs what a command may lack.
_EXTRAS = {name: "hf" for name in ("transformers", "tqdm", "safetensors", "tokenizers", "numpy")}
_EXTRAS |= {"psutil": "bench", "pyperf": "bench", "matplotlib": "plots", "lm_eval": "lm-eval"}
_EXTRAS |= {name: "serve" for name in ("fastapi", "uvicorn", "openai", "accelerate")}


@dataclasses.dataclass(frozen=True)
class Command:
    """``options``: a module with EXAMPLES, ``add_arguments`` and perhaps ``check``, which finds
    what is wrong before torch is imported; ``run``: ``module:function`` of the parsed arguments;
    ``needs``: packages.
    """

    help: str
    options: ModuleType
    run: str
    needs: tuple[str, ...] = ()


COMMANDS = {
    "demo": Command(
        "answer questions over a long context, sparse and dense",
        demo_options,
        "quest_compile.demo:run",
        ("transformers", "tqdm"),
    ),
    "look": Command(
        "an HTML file: which pages were read for every token",
        look_options,
        "quest_compile.look.command:run",
        ("transformers", "tqdm"),
    ),
    "explain": Command(
        "what would be replaced in a model, and why not",
        explain_command,
        "quest_compile.explain_command:run",
        ("transformers",),
    ),
    "eval": Command(
        "does Quest hurt a model? with statistics, per budget",
        eval_options,
        "quest_compile.eval.cli:evaluate",
        ("transformers", "tqdm"),
    ),
    "serve": Command(
        "serve a model by the API of OpenAI, with transformers' own server",
        serve_options,
        "quest_compile.serve:run",
        ("transformers", "fastapi", "uvicorn", "openai", "accelerate"),
    ),
    "fetch": Command(
        "get a really trained small model, for --model",
        fetch,
        "quest_compile.real_model.fetch:run",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args, rest = _parser().parse_known_args(argv)
    name = f"quest-compile {args.command}"
    try:
        if args.command == "bench":
            from quest_compile.bench.__main__ import main as bench_main

            return bench_main(rest)
        if rest:
            args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return _run(COMMANDS[args.command], args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except (ValueError, ImportError, OSError, NotActiveError) as error:
        print(f"{name}: {described(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> Parser:
    parser = Parser(
        prog="quest-compile",
        description="Quest decoding as a torch.compile backend.",
        epilog="quest-compile COMMAND --help says more, with examples.",
    )
    parser.add_argument("--version", action="version", version=quest_compile.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=f"examples:\n{command.options.EXAMPLES}",
        )
        command.options.add_arguments(added)
        added.set_defaults(parser=added)
    commands.add_parser("bench", help="benchmarks; see quest-compile bench --help", add_help=False)
    return parser


def _run(command: Command, args: argparse.Namespace) -> int:
    for package in command.needs:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    if check := getattr(command.options, "check", None):
        check(args)
    import_all()
    module, _, function = command.run.partition(":")
    return getattr(importlib.import_module(module), function)(args)


def described(error: Exception) -> str:
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in _EXTRAS:
        extra = _EXTRAS[package]
        return f"this needs {package}: pip install 'quest-compile[{extra}]'"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
