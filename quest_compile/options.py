"""What the options of several commands have in common; nothing here imports torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from quest_compile.budgets import DEFAULT_BUDGET, check_budget
from quest_compile.choices import PRESETS


class Parser(argparse.ArgumentParser):
    """Help as it is written; a mistake is one line that names the way out."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def budget(text: str) -> int | float:
    """``"2048"`` or ``"2K"``, tokens, or ``"0.05"``, a share of the context."""
    number, scale = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    try:
        value = float(number) if "." in number and scale == 1 else int(number) * scale
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected tokens as 2048 or 2K, or a share as 0.05, got {text!r}"
        ) from None
    try:
        check_budget("budget", value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def add_budget_argument(parser: argparse.ArgumentParser, default: object = DEFAULT_BUDGET) -> None:
    """``--budget``; None where it is not given."""
    parser.add_argument(
        "--budget",
        type=budget,
        metavar="N",
        help=f"tokens a query attends at most, as 2048 or 2K, or a share of the context as 0.05; "
        f"default {default}",
    )


def add_preset_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=sorted(PRESETS), help="other defaults")


def check_file(option: str, path: Path) -> None:
    """
    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{option}: there is no file {path}")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Of ``quest_compile.backend``: those that were given."""
    found = {"budget": args.budget, "preset": args.preset}
    return {name: value for name, value in found.items() if value is not None}
