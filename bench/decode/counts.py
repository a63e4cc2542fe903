"""What the operators did in the steps of a method.

On a CPU they count it. On CUDA a replayed graph calls no operator and values are not looked at:
there, calls are those of the graph in the report of the backend, tokens and bytes follow from the
settings.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.results import RefusedError
from quest_compile.bench.settings import is_sparse
from quest_compile.config import QuestConfig
from quest_compile.graph_report import GraphReport
from quest_compile.report import Report


def are_counted(device: str) -> bool:
    """Do the counters of the operators see every step on ``device``?"""
    return device == "cpu"


def decode_graph(report: Report) -> GraphReport | None:
    """The last graph of ``report`` that decodes one token."""
    graphs = [graph for graph in report.graphs if graph.is_decode]
    return graphs[-1] if graphs else None


class StepCounts:
    """Sums of the counters over steps of one compiled model; ``last``: of the last step alone.

    ``backend`` and ``config`` of Quest: None where nothing is rewritten.
    """

    def __init__(self, model: Any, cache: Any, backend: Any, config: QuestConfig | None) -> None:
        self.device = str(model.device.type)
        self.total: dict[str, int] = dict.fromkeys(ops.counters(), 0)
        self.last = dict(self.total)
        self.steps = self.steps_to_be_sparse = self._tokens = 0
        self._cache, self._backend = cache, backend
        self._config = config
        self._num_q_heads = model.config.get_text_config(decoder=True).num_attention_heads
        self._all_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    def begin(self) -> None:
        """Before a step."""
        ops.reset_counters()

    def end(self, seq_len: int) -> None:
        """After a step over ``seq_len`` tokens, the one decoded included."""
        self.steps += 1
        self._tokens += seq_len
        self.last = ops.counters()
        if self._config is not None:
            self.steps_to_be_sparse += is_sparse(self._config, seq_len)
            if not are_counted(self.device):
                self.last |= self._by_report(seq_len, self._config)
        for key, count in self.last.items():
            is_max = key.startswith("max_")
            self.total[key] = max(self.total[key], count) if is_max else self.total[key] + count

    def check(self, name: str, sparse_layers: int) -> None:
        """Every sparse layer was sparse in every step that does not fit the budget.

        Raises:
            RefusedError: it was not.
        """
        if self.total["sparse_calls"] != sparse_layers * self.steps_to_be_sparse:
            raise RefusedError(
                f"{name}: {self.total['sparse_calls']} sparse calls in {self.steps} steps "
                f"({self.steps_to_be_sparse} beyond the budget) of {sparse_layers} sparse layers"
            )

    def facts(self) -> dict[str, Any]:
        """Metadata: calls, tokens and bytes per step; a model left as it is reads all its cache."""
        counted, steps = self.total, self.steps
        found: dict[str, Any] = {
            "sparse_calls_per_step": counted["sparse_calls"] / steps,
            "dense_calls_per_step": counted["dense_calls"] / steps,
            "linear_calls_per_step": counted["linear_calls"] / steps,
            "tokens_read_per_query": float(self._cache.layers[0].keys.shape[2]),
            "kv_bytes_per_step": self._all_bytes,
        }
        if self._config is not None:
            found["counted_by"] = "counters" if are_counted(self.device) else "report"
            found["kv_bytes_per_step"] = counted["bytes_read"] // steps
            found["tokens_read_per_query"] = self._tokens / steps
        if counted["sparse_rows"]:
            found["tokens_read_per_query"] = counted["tokens_attended"] / counted["sparse_rows"]
        return found

    def _by_report(self, seq_len: int, own: QuestConfig) -> dict[str, int]:
        found = dict.fromkeys(self.total, 0)
        graph = decode_graph(self._backend.report())
        for row in graph.rows if graph else ():
            operator = row.attention.removesuffix("_step")
            if operator not in ("quest::sparse_decode", "quest::dense_decode"):
                continue
            layer = self._cache.layers[row.layer]
            config = own if operator == "quest::sparse_decode" else None
            reads = reads_of(layer.keys, layer.values, self._num_q_heads, seq_len, config)
            found["bytes_read"] += reads.num_bytes
            if config is None:
                found["dense_calls"] += 1
            elif not is_sparse(config, seq_len):
                found["sparse_calls_covered"] += 1
            else:
                rows = layer.keys.shape[0] * self._num_q_heads
                found["sparse_calls"] += 1
                found["sparse_rows"] += rows
                found["tokens_attended"] += rows * reads.tokens
                found["max_tokens_attended"] = reads.tokens
        return found


@dataclasses.dataclass(frozen=True)
class Reads:
    """``tokens`` that a query attends; ``num_bytes`` of page summaries, keys and values."""

    tokens: int
    num_bytes: int


def reads_of(
    key_cache: torch.Tensor, value_cache: torch.Tensor, num_q_heads: int, seq_len: int,
    config: QuestConfig | None
) -> Reads:  # fmt: skip
    """Of one layer over ``seq_len`` tokens in all rows, as the counters of CPU operators say.

    ``key_cache``, ``value_cache`` [B, num_kv_heads, max_seq_len, head_dim]; ``config``, whose
    budget is in tokens: None where everything is attended.
    """
    batch, num_kv_heads, _, head_dim = key_cache.shape
    token_bytes = (head_dim + value_cache.shape[3]) * key_cache.element_size()
    if config is None or not is_sparse(config, seq_len):
        return Reads(seq_len, batch * num_kv_heads * seq_len * token_bytes)
    page_size = config.page_size
    # All selected pages are full, but for the newest.
    tokens = config.page_budget * page_size - -seq_len % page_size
    page = torch.empty((1, 1, page_size, head_dim), dtype=key_cache.dtype, device="meta")
    row_bytes = ops.empty_page_summary(page, **config.page_format.as_kwargs()).nbytes
    num_lists = num_q_heads if config.group_reduce == "none" else num_kv_heads
    num_bytes = num_kv_heads * (seq_len // page_size) * row_bytes + num_lists * tokens * token_bytes
    return Reads(tokens, batch * num_bytes)
