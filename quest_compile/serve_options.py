"""The options of ``quest-compile serve``."""

from __future__ import annotations

import argparse
import errno
import socket

from quest_compile.choices import DTYPES, INNER_COMPILERS
from quest_compile.options import add_budget_argument, add_preset_argument
from quest_compile.real_model.find import find_model
from quest_compile.real_model.options import add_model_argument

EXAMPLES = """\
  quest-compile serve smollm2 --budget 512 --port 8000
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}]}'"""
DEFAULT_CONTEXT = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    add_budget_argument(parser)
    add_preset_argument(parser)
    parser.add_argument(
        "--context",
        type=int,
        help="tokens of prompt and answer that are compiled for before the first request; a longer "
        f"request compiles anew; default {DEFAULT_CONTEXT}, or what the model was made for",
    )
    parser.add_argument("--host", default="localhost", help="default localhost: this machine only")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--inner", choices=INNER_COMPILERS, help="default inductor")
    parser.add_argument(
        "--json", action="store_true", help="model and address as a line of JSON, once it listens"
    )


def check(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: a bad option, or no such model.
        OSError: nothing can listen at that host and port.
    """
    if args.context is not None and args.context < 8:
        raise ValueError(f"--context must be at least 8 tokens, got {args.context}")
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port must be 0 (any free one) to 65535, got {args.port}")
    find_model(args.model)
    try:
        _try_to_listen(args.host, args.port)
    except OSError as error:
        raise OSError(f"cannot listen at --host {args.host} --port {args.port}: {error}") from error


def _try_to_listen(host: str, port: int) -> None:
    """At every address of the host, as the server does."""
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, kind, _, _, address in addresses:
        try:
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            # A machine without IPv6 may still give localhost an address of it.
            is_missing = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
            if not is_missing or len(addresses) == 1:
                raise
