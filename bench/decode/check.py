"""One step of the graph that Quest rewrote, node by node, each attention call against float64."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from quest_compile.bench.ops.checks import check_attention, check_selection
from quest_compile.config import QuestConfig
from quest_compile.ops import reference
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
        return with_state(run, indices, config.page_size, config.summary)

    def check(self, operator: str, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        query, key_cache, value_cache = args[:3]
        positions = None
        seq_lens = args[4] if operator == "sparse_decode" else args[3]
        seq_len = int(seq_lens.max())
        if (
            operator == "sparse_decode"
            and seq_len > self.config.page_budget * self.config.page_size
        ):
            positions = self._positions(args, kwargs, seq_len)
        tensors = (query, key_cache, value_cache)
        found = check_attention(operator, out, tensors, seq_len, positions)
        self.layers[operator] += 1
        self.worst = max(self.worst, found["error"] / max(found["error_of_torch"], 1e-30))

    def _positions(self, args: Sequence[Any], kwargs: dict[str, Any], seq_len: int) -> torch.Tensor:
        """Those of the pages that the staged operators select, which must be the best."""
        query, rows, seq_lens = args[0], args[3], args[4]
        channel_scale = args[6] if len(args) > 6 else kwargs.get("channel_scale")
        page_size, summary = self.config.page_size, self.config.summary
        layout = {"page_size": page_size, "summary": summary}
        exact_rows = rows.double() if rows.is_floating_point() else rows
        exact = reference.score_pages(query.double(), exact_rows, seq_lens, channel_scale, **layout)
        scores = torch.ops.quest.score_pages(query, rows, seq_lens, channel_scale, **layout)
        page_indices = torch.ops.quest.select_pages(
            scores, seq_lens, page_budget=self.config.page_budget, page_size=page_size
        )
        num_pages = -(-seq_len // page_size)
        check_selection("sparse_decode", page_indices, exact[..., :num_pages])
        offsets = torch.arange(page_size, device=query.device)
        return (page_indices.long()[..., None] * page_size + offsets).flatten(2)


class _Interpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, backend: CheckingBackend) -> None:
        super().__init__(gm)
        self._backend = backend

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_function(target, args, kwargs)
        for operator in self._backend.layers:
            if target is getattr(torch.ops.quest, operator).default:
                self._backend.check(operator, out, args, kwargs)
        return out
