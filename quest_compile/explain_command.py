"""``quest-compile explain``."""

from __future__ import annotations

import argparse
import json
import sys

from quest_compile.options import add_budget_argument, add_preset_argument, settings_of
from quest_compile.real_model.find import find_model
from quest_compile.real_model.options import add_model_argument

EXAMPLES = """\
  quest-compile explain meta-llama/Llama-3.2-1B --budget 2048
  quest-compile explain ./my-model --budget 0.05 --json > report.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    add_budget_argument(parser)
    add_preset_argument(parser)
    parser.add_argument("--json", action="store_true", help="the report as JSON")


def check(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: there is no such model.
    """
    find_model(args.model)


def run(args: argparse.Namespace) -> int:
    """Trace the model without weights: only its configuration is read."""
    import torch
    from transformers import AutoModelForCausalLM

    from quest_compile import explain
    from quest_compile.real_model.load import load_config

    config = load_config(args.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    print(f"tracing {type(model).__name__}", file=sys.stderr, flush=True)
    report = explain(model, **settings_of(args))
    print(json.dumps(report.as_dict(), indent=1) if args.json else report)
    return 0
