"""``quest-compile serve``: transformers' own server, its models prepared for Quest."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from typing import Any

import torch

from quest_compile import ops
from quest_compile.backend import QuestBackend, backend
from quest_compile.context_length import context_length
from quest_compile.generate import compile_for_generate
from quest_compile.options import settings_of
from quest_compile.real_model.find import found_model
from quest_compile.serve_options import DEFAULT_CONTEXT
from quest_compile.warmup import warmup


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C.

    Raises:
        ImportError: this transformers has another server, or none.
    """
    try:
        from transformers.cli.serve import Serve
        from transformers.cli.serving import model_manager, utils
    except ImportError as error:
        from transformers import __version__

        raise ImportError(
            f"this needs the server of transformers 5.17 or newer, here is {__version__}: {error}"
        ) from error

    import uvicorn

    # Serve takes the classes that it finds there.
    for module, name, made in (
        (model_manager, "ModelManager", _manager_class(model_manager.ModelManager, args)),
        (utils, "GenerateManager", _checking_class(utils.GenerateManager)),
        (uvicorn, "Server", _announcing_class(uvicorn.Server, args)),
    ):
        setattr(module, name, made)
    print(f"loading {args.model}, then compiling: up to some minutes", file=sys.stderr, flush=True)
    Serve(
        force_model=args.model,
        device=args.device,
        dtype=args.dtype,
        attn_implementation="sdpa",
        host=args.host,
        port=args.port,
    )
    return 0


def _manager_class(manager: type[Any], args: argparse.Namespace) -> type[Any]:
    """Their manager of models, but each model that it loads is prepared and compiled."""
    settings = settings_of(args) | ({"inner": args.inner} if args.inner else {})
    quest = backend(**settings)

    class QuestModelManager(manager):
        _prepared: set[int] = set()
        _lock = threading.Lock()

        def load_model_and_processor(self, name: str, *rest: Any, **options: Any) -> Any:
            with found_model(args.model) as path:
                if name == self.process_model_name(args.model):
                    name = self.process_model_name(path)
                model, processor = super().load_model_and_processor(name, *rest, **options)
            with self._lock:
                if id(model) not in self._prepared:
                    _prepare(model, processor, quest, settings, args.context)
                    self._prepared.add(id(model))
            return model, processor

        @staticmethod
        def get_gen_models(cache_dir: str | None = None) -> list[dict[str, Any]]:
            model = {"id": args.model, "object": "model", "owned_by": "", "created": 0}
            return [model]

    return QuestModelManager


def _checking_class(manager: type[Any]) -> type[Any]:
    """Theirs, but a prompt that is longer than the model's context is an error of the client."""

    class CheckingManager(manager):
        def generate_streaming(self, model: Any, processor: Any, inputs: Any, *rest, **options):
            _check_prompt(model, inputs)
            return super().generate_streaming(model, processor, inputs, *rest, **options)

        def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, *rest, **options):
            _check_prompt(model, inputs)
            return super().generate_non_streaming(model, processor, inputs, *rest, **options)

    return CheckingManager


def _check_prompt(model: Any, inputs: Any) -> None:
    """
    Raises:
        HTTPException: status 400.
    """
    from fastapi import HTTPException

    num_tokens, most = inputs["input_ids"].shape[-1], context_length(model.config)
    if most is not None and num_tokens > most:
        raise HTTPException(
            400, f"the prompt has {num_tokens} tokens, and the model was made for {most}"
        )


def _announcing_class(server: type[Any], args: argparse.Namespace) -> type[Any]:
    """Theirs, but with ``--json`` it says when it listens, and where."""

    class AnnouncingServer(server):
        async def startup(self, *rest: Any, **options: Any) -> None:
            await super().startup(*rest, **options)
            if args.json and self.started:
                port = self.servers[0].sockets[0].getsockname()[1]
                host = f"[{args.host}]" if ":" in args.host else args.host
                said = {"model": args.model, "url": f"http://{host}:{port}/v1"}
                print(json.dumps(said), flush=True)

    return AnnouncingServer


def _prepare(
    model: Any, processor: Any, quest: QuestBackend, settings: dict[str, Any], context: int | None
) -> None:
    compile_for_generate(model, **settings)
    generate = model.generate
    tokenizer = getattr(processor, "tokenizer", processor)
    others = set(tokenizer("text")) - {"input_ids", "attention_mask"}

    def as_asked(tokens: torch.Tensor, **options: Any) -> Any:
        """With the arguments that the server passes: any other ones would be compiled anew."""
        options |= {name: torch.zeros_like(tokens) for name in others}
        return generate(tokens, tokenizer=processor, **options)

    model.generate = as_asked
    most = context_length(model.config) or DEFAULT_CONTEXT
    warmup(model, context or min(DEFAULT_CONTEXT, most))
    print(quest.report(), file=sys.stderr, flush=True)

    def said(*inputs: Any, **options: Any) -> Any:
        before, num_graphs = ops.counters(), len(quest.report().graphs)
        start = time.perf_counter()
        tokens = generate(*inputs, **options)
        after, seconds = ops.counters(), time.perf_counter() - start
        counted = {name: after[name] - before[name] for name in ("sparse_calls", "bytes_read")}
        compiled = len(quest.report().graphs) - num_graphs
        print(
            f"quest_compile: {tokens.shape[-1]} tokens with their prompt in {seconds:.1f} s, "
            f"{counted['sparse_calls']} sparse attention calls, "
            f"{counted['bytes_read'] / 2**20:.1f} MiB of the cache read"
            + (f", {compiled} graphs compiled anew" if compiled else ""),
            file=sys.stderr,
            flush=True,
        )
        return tokens

    model.generate = said
