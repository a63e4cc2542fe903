"""One step of the graph that Quest rewrote, node by node, each attention call against float64."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from quest_compile.bench.ops.checks import check_attention, check_pages
from quest_compile.bench.settings import is_sparse
from quest_compile.config import QuestConfig
from quest_compile.ops.settings import take_sparse
from quest_compile.passes import run_passes
from quest_compile.step_state import with_state


class CheckingBackend:
    """A backend for ``torch.compile`` that runs Quest's graph and checks every call of it.

    ``layers``: how many attention calls were checked, by operator; ``worst``: the largest error
    over that of plain torch.
    """

    def __init__(self, config: QuestConfig) -> None:
        self.config = config
        self.layers: dict[str, int] = {"sparse_decode": 0, "dense_decode": 0}
        self.worst = 0.0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        config = self.config
        rewrite = run_passes(gm, config=config)
        interpreter = _Interpreter(rewrite.gm, self)
        run = functools.partial(interpreter.run, enable_io_processing=False)
        if not rewrite.summaries:
            return run
        indices = [(s.cache_index, s.value_cache_index) for s in rewrite.summaries]
        return with_state(run, indices, config.page_format)

    def check(self, operator: str, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        tensors, rest = tuple(args[:3]), args[3:]
        layer = operator.removesuffix("_step")
        pages = None
        if layer == "sparse_decode":
            page_summary, *rest = rest if operator == layer else (rest[1], *rest[3:])
            if is_sparse(self.config, int(rest[0].max())):
                settings = dict(kwargs)
                scale = settings.pop("scale", None)
                scored = (tensors[0], page_summary, rest[0], rest[1] if len(rest) > 1 else None)
                pages = check_pages(operator, scored, *take_sparse(settings), scale)
        seq_len = int(rest[0].max())
        found = check_attention(operator, out, tensors, seq_len, pages, self.config.page_size)
        self.layers[layer] += 1
        self.worst = max(self.worst, found["error"] / max(found["error_of_torch"], 1e-30))


_CHECKED = {
    getattr(torch.ops.quest, name).default: name
    for name in ("sparse_decode", "sparse_decode_step", "dense_decode")
}


class _Interpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, backend: CheckingBackend) -> None:
        super().__init__(gm)
        self._backend = backend

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_function(target, args, kwargs)
        if operator := _CHECKED.get(target):
            self._backend.check(operator, out, args, kwargs)
        return out
