"""The attention of transformers that runs the baselines, and watches a prefill for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from quest_compile.config import QuestConfig
from quest_compile.eval.baselines import KEEP, SNAP_WINDOW, Step

NAME = "quest_compile_eval"
_ROWS = 256


@dataclasses.dataclass
class Kept:
    """Over the sparse steps and layers so far: positions attended per query, weight they have."""

    calls: int = 0
    tokens: float = 0.0
    most: int = 0
    masses: list[float] = dataclasses.field(default_factory=list)


class EvalAttention:
    """An attention function for ``model.set_attn_implementation(NAME)``.

    Prefill is dense and, with ``watch``, sums up what H2O and SnapKV need. Decode steps behind the
    dense layers attend only what the method keeps. Layers with a sliding window stay as they are.
    """

    def __init__(self) -> None:
        self.method = ""
        self.config = QuestConfig()
        self.watch = False
        self.context_len = 0
        self.kept = Kept()
        self._generator = torch.Generator()
        self._h2o: dict[int, Tensor] = {}
        self._snap: dict[int, Tensor] = {}
        self._num_watched: dict[int, int] = {}

    def register(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(NAME, self)
        AttentionMaskInterface.register(NAME, sdpa_mask)

    def begin_context(self, context_len: int, watch: bool) -> None:
        self.context_len, self.watch = context_len, watch
        self._h2o.clear()
        self._snap.clear()
        self._num_watched.clear()

    def begin_method(self, method: str, config: QuestConfig, seed: int) -> None:
        self.method, self.config, self.kept = method, config, Kept()
        self._generator.manual_seed(seed)

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if softcap is not None or kwargs.get("s_aux") is not None:
            raise ValueError("the baselines do not know soft caps or attention sinks of a model")
        layer = module.layer_idx
        is_dense = layer < self.config.num_dense_layers or kwargs.get("sliding_window") is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if query.shape[2] == 1 and not is_dense:
            assert attention_mask is not None
            return self._decode(layer, query, key, value, attention_mask, scale), None
        if self.watch and query.shape[2] > 1:
            self._watch(layer, query, key, scale)
        # transformers leaves the mask away where it would be no more than causal.
        is_causal = attention_mask is None and query.shape[2] > 1
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).contiguous(), None

    def _decode(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        live = mask[:, :1, :, : key.shape[2]]
        logits = _logits(query, key, scale).masked_fill(~live, -torch.inf)
        seq_len = int(live.sum())
        weights = logits.softmax(-1)
        step = Step(
            query=query,
            key=key,
            weights=weights,
            seq_len=seq_len,
            context_len=self.context_len,
            h2o=self._h2o.get(layer),
            snap=self._snap.get(layer),
            config=self.config,
            selection=self.config.selection(self.config.layer_budget(layer, key.shape[2])),
            scale=scale,
            generator=self._generator,
        )
        if not step.fits:
            keep = KEEP[self.method](step)
            self._count(step, keep)
            keep = keep.unflatten(1, (key.shape[1], -1))
            weights = logits.masked_fill(~keep, -torch.inf).softmax(-1)
        out = weights.to(value.dtype) @ value
        return out.flatten(1, 2)[:, None].contiguous()

    def _count(self, step: Step, keep: Tensor) -> None:
        num_tokens = keep[..., : step.seq_len].sum(-1)
        mass = (step.weights * keep.unflatten(1, (step.key.shape[1], -1))).sum(-1)
        self.kept.calls += 1
        self.kept.tokens += float(num_tokens.float().mean())
        self.kept.most = max(self.kept.most, int(num_tokens.max()))
        self.kept.masses.append(float(mass.mean()))

    def _watch(self, layer: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Attention each position gets from the queries of this slice: for H2O summed over a group,
        for SnapKV, which pools per head, not."""
        num_kv_heads, num_positions = key.shape[1:3]
        if layer not in self._h2o:
            self._h2o[layer] = torch.zeros(num_kv_heads, num_positions, device=key.device)
            group_size = query.shape[1] // num_kv_heads
            self._snap[layer] = self._h2o[layer][:, None].repeat(1, group_size, 1)
        start = self._num_watched.get(layer, 0)
        for first in range(0, query.shape[2], _ROWS):
            rows = query[:, :, first : first + _ROWS]
            position = start + first + torch.arange(rows.shape[2], device=key.device)
            later = torch.arange(num_positions, device=key.device) > position[:, None]
            for head, (own, keys) in enumerate(zip(_by_kv_head(rows, num_kv_heads), key[0])):
                logits = (own.float() @ keys.float().T) * scale
                weights = logits.masked_fill(later, -torch.inf).softmax(-1)
                self._h2o[layer][head] += weights.sum((0, 1))
                is_last = position >= self.context_len - SNAP_WINDOW
                self._snap[layer][head] += weights[:, is_last].sum(1)
        self._num_watched[layer] = start + query.shape[2]


def _logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[1, Q, 1, D] and [1, K, T, D] -> float32 [1, K, G, T]"""
    grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))
    return (grouped.float() @ key.float().mT) * scale


def _by_kv_head(query: Tensor, num_kv_heads: int) -> Tensor:
    """[1, Q, n, D] -> [K, G, n, D]"""
    return query[0].unflatten(0, (num_kv_heads, -1))
