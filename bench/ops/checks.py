"""Nothing is timed before its result is right and the kernel that served is the one named."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from quest_compile import ops
from quest_compile.bench.ops.inputs import Setting, Step
from quest_compile.bench.ops.methods import TORCH_METHODS, Method, score, select
from quest_compile.bench.ops.reads import is_sparse, reads_of
from quest_compile.bench.results import RefusedError
from quest_compile.ops import reference
from quest_compile.ops.cuda_providers import NAMES as CUDA_OPERATORS

# As in the tests: units in the last place that are granted on top of twice torch's own error.
_GRANTED_ULPS = 2
# So many times the error of plain torch is allowed. How torch's other forms round is not ours to
# judge, only that they compute the same: one of float32 was seen at 7 times.
_OWN_FACTOR, _TORCH_FACTOR = 2, 32
# Scores are float32 sums: pages this close to the last one selected may change places.
_SCORE_TOLERANCE = 1e-4


def check_kernels(device: str) -> dict[str, str]:
    """Metadata that names the kernels that serve.

    Raises:
        RefusedError: plain torch serves, or not the instruction set asked for.
    """
    status = ops.native_status()
    if device == "cuda":
        plain = [name for name in CUDA_OPERATORS if ops.provider_of(name) == "torch"]
        if plain:
            raise RefusedError(f"plain torch serves, not our kernels: {', '.join(plain)}")
        return {"kernels": status.info, "cuda_kernels": ops.cuda_kernels()}
    if not status.loaded:
        raise RefusedError(f"plain torch serves, not our kernels: {status.reason}")
    wanted = os.environ.get("QUEST_COMPILE_ISA")
    if wanted and f"cpu:{wanted}" not in status.info.split():
        raise RefusedError(f"QUEST_COMPILE_ISA={wanted}, but {status.info} serves")
    return {"kernels": status.info}


def check_method(method: Method, step: Step) -> dict[str, Any]:
    """Metadata that proves what ran: counters, and the error against float64.

    Raises:
        RefusedError: another path than the named one served, or its result is wrong.
    """
    if method.name == "read_loop" or method.stage:
        return {}
    ops.reset_counters()
    out = method.call(step)
    counted = ops.counters()
    _check_path(method, step, counted)
    positions = None
    if counted["sparse_calls"]:
        assert method.setting is not None
        positions = _positions(step, method.setting)
    tensors = (step.query, step.key_cache, step.value_cache)
    found: dict[str, Any] = check_attention(
        method.name,
        out,
        tensors,
        step.key_cache.shape[2],
        positions,
        _TORCH_FACTOR if method.name in TORCH_METHODS else _OWN_FACTOR,
    )
    if method.name.startswith(("quest", "dense_decode")):
        found |= {name: counted[name] for name in ("sparse_calls", "dense_calls")}
        found |= _reads(method, step, counted)
        method.bytes_moved = found["bytes_read"]
    return found


def _reads(method: Method, step: Step, counted: dict[str, int]) -> dict[str, int]:
    """As counted; where operators do not look at values, as the setting says."""
    if are_values_counted(step):
        found = {"bytes_read": counted["bytes_read"]}
        if counted["sparse_rows"]:
            found["tokens_per_query"] = counted["tokens_attended"] // counted["sparse_rows"]
        return found
    tensors = (step.key_cache, step.value_cache)
    reads = reads_of(*tensors, step.key_cache.shape[2], method.setting)
    found = {"bytes_read": reads.num_bytes}
    return found | ({"tokens_per_query": reads.tokens} if counted["sparse_calls"] else {})


def are_values_counted(step: Step) -> bool:
    """Do the operators count what they read of this step, not calls alone?"""
    return step.key_cache.is_cpu


def _check_path(method: Method, step: Step, counted: dict[str, int]) -> None:
    expected = "none"
    if method.name == "dense_decode":
        expected = "dense_calls"
    elif method.setting is not None:
        is_covered = not is_sparse(method.setting, step.key_cache.shape[2])
        expected = "sparse_calls_covered" if is_covered else "sparse_calls"
    for name in ("sparse_calls", "sparse_calls_covered", "dense_calls"):
        if counted[name] != (name == expected):
            raise RefusedError(f"{method.name}: expected {expected}, counted {counted}")


def _positions(step: Step, setting: Setting) -> torch.Tensor:
    """What the selected pages hold: [B, num_kv_heads, tokens]; checked against plain torch."""
    rows, channel_scale = step.summaries[setting.layout]
    page_indices = select(step, setting, score(step, setting))
    exact = reference.score_pages(
        step.query.double(),
        rows.double() if rows.is_floating_point() else rows,
        step.seq_lens,
        channel_scale,
        page_size=setting.page_size,
        summary=setting.summary,
    )
    num_pages = -(-step.key_cache.shape[2] // setting.page_size)
    check_selection(setting.name, page_indices, exact[..., :num_pages])
    offsets = torch.arange(setting.page_size, device=exact.device)
    return (page_indices.long()[..., None] * setting.page_size + offsets).flatten(2)


def check_selection(name: str, page_indices: torch.Tensor, exact: torch.Tensor) -> None:
    """``page_indices`` [B, H, page_budget] are the first page, the last two and the best by
    ``exact`` scores [B, H, pages in use].

    Raises:
        RefusedError: they are not.
    """
    is_forced = torch.zeros(exact.shape[-1], dtype=torch.bool, device=exact.device)
    is_forced[[0, -2, -1]] = True
    is_selected = torch.zeros_like(exact, dtype=torch.bool)
    is_selected.scatter_(2, page_indices.long(), True)
    lowest = exact.masked_fill(~is_selected | is_forced, torch.inf).amin(-1)
    highest = exact.masked_fill(is_selected | is_forced, -torch.inf).amax(-1)
    is_worse = highest - lowest > _SCORE_TOLERANCE * highest.abs()
    if is_worse.any() or not is_selected[..., is_forced].all():
        raise RefusedError(f"{name}: selects other pages than the reference")


def check_attention(
    name: str,
    out: torch.Tensor,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    seq_len: int,
    positions: torch.Tensor | None,
    factor: float = _OWN_FACTOR,
) -> dict[str, float]:
    """At most ``factor`` times the error of plain torch in the same dtype, both against float64.

    ``tensors``: query [B, num_q_heads, 1, head_dim], key_cache, value_cache; ``positions``
    [B, num_kv_heads, tokens] that are attended where they are below ``seq_len``, or None: all.

    Raises:
        RefusedError: the error is larger.
    """
    query, key_cache, value_cache = tensors
    batch, num_kv_heads = key_cache.shape[:2]
    grouped, found = (x.reshape(batch, num_kv_heads, -1, x.shape[-1]) for x in (query, out))
    error = plain_error = size = 0.0
    for row in range(batch):
        for head in range(num_kv_heads):
            keys, values = (x[row, head, :seq_len] for x in (key_cache, value_cache))
            if positions is not None:
                kept = positions[row, head]
                kept = kept[kept < seq_len]
                keys, values = keys[kept], values[kept]
            own = grouped[row, head]
            exact = _attention(own.double(), keys.double(), values.double())
            plain = scaled_dot_product_attention(own[None], keys[None], values[None])[0]
            plain_error = max(plain_error, (plain.double() - exact).abs().max().item())
            error = max(error, (found[row, head].double() - exact).abs().max().item())
            size = max(size, exact.abs().max().item())
    granted = _GRANTED_ULPS * torch.finfo(out.dtype).eps * size
    if not error <= factor * plain_error + granted:
        raise RefusedError(f"{name}: wrong, error {error:.3g}, plain torch {plain_error:.3g}")
    return {"error": error, "error_of_torch": plain_error}


def _attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (query @ keys.mT * query.shape[-1] ** -0.5).softmax(-1) @ values
