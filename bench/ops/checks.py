"""Nothing is timed before its result is right and the kernels that serve are ours."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from quest_compile import ops
from quest_compile.bench.results import RefusedError
from quest_compile.ops import OPERATORS, Selection, SummaryFormat, reference

# As in the tests: units in the last place that are granted on top of the error of plain torch, and
# so many times that error.
_GRANTED_ULPS, OWN_FACTOR = 2, 2
# Of the largest score; on other devices the reference itself has other bits.
TOLERANCE = 0.02
# query, page_summary, seq_lens, attn_mask
Scored = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def check_kernels(device: str) -> dict[str, str]:
    """Metadata that names the kernels that serve.

    Raises:
        RefusedError: plain torch serves, or not the instruction set asked for.
    """
    status = ops.native_status()
    if device == "cuda":
        names = [name for name, operator in OPERATORS.items() if device in operator.kernels]
        plain = [name for name in names if ops.provider_of(name) == "torch"]
        if plain:
            raise RefusedError(f"plain torch serves, not our kernels: {', '.join(plain)}")
        return {"kernels": status.info, "cuda_kernels": ops.cuda_kernels()}
    if not status.loaded:
        raise RefusedError(f"plain torch serves, not our kernels: {status.reason}")
    wanted = os.environ.get("QUEST_COMPILE_ISA")
    if wanted and f"cpu:{wanted}" not in status.info.split():
        raise RefusedError(f"QUEST_COMPILE_ISA={wanted}, but {status.info} serves")
    return {"kernels": status.info}


def check_pages(
    name: str, tensors: Scored, selection: Selection, page_format: SummaryFormat,
    scale: float | None = None, served: Any = ops
) -> torch.Tensor:  # fmt: skip
    """The pages that the operators of ``served`` select: of scores like those of the reference, and
    those that it selects by the same scores. ``tensors``: query, page_summary, seq_lens, attn_mask.

    Raises:
        RefusedError: they are not.
    """
    scores, pages = reference.score_and_select(*tensors, selection, page_format, scale, served)
    right, _ = reference.score_and_select(*tensors, selection, page_format, scale)
    if not (error := relative_error(scores, right)) < TOLERANCE:
        raise RefusedError(f"{name}: scores differ from the reference by {error:.3g}")
    scored = SimpleNamespace(
        score_pages=lambda *_, **__: scores, select_pages=reference.select_pages
    )
    _, right_pages = reference.score_and_select(*tensors, selection, page_format, scale, scored)
    if not torch.equal(pages, right_pages):
        raise RefusedError(f"{name}: selects other pages than the reference")
    return pages


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value; infinite where other values are not finite."""
    actual, expected = actual.float(), expected.float()
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    size = expected[finite].abs().max().clamp(min=1e-6)
    return float((actual[finite] - expected[finite]).abs().max() / size)


def check_attention(
    name: str, out: torch.Tensor, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    seq_len: int, pages: torch.Tensor | None = None, page_size: int = 16, factor: float = OWN_FACTOR
) -> dict[str, float]:  # fmt: skip
    """At most ``factor`` times the error of plain torch in the same dtype, both against float64, in
    the first and the last row.

    ``tensors``: query [B, num_q_heads, 1, head_dim], key_cache, value_cache; ``pages`` [B, heads
    that select, pages] that are attended where they are below ``seq_len``, or None: all.

    Raises:
        RefusedError: the error is larger.
    """
    query, key_cache, value_cache = tensors
    batch, num_kv_heads = key_cache.shape[:2]
    num_heads = num_kv_heads if pages is None else pages.shape[1]
    grouped, found = (x.reshape(batch, num_heads, -1, x.shape[-1]) for x in (query, out))
    error = plain_error = size = 0.0
    for row in {0, batch - 1}:
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            keys, values = (x[row, kv_head, :seq_len] for x in (key_cache, value_cache))
            if pages is not None:
                kept = _positions(pages[row, head], page_size, seq_len)
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


def _positions(pages: torch.Tensor, page_size: int, seq_len: int) -> torch.Tensor:
    first = pages[pages >= 0].long() * page_size
    positions = (first[:, None] + torch.arange(page_size, device=pages.device)).flatten()
    return positions[positions < seq_len]


def _attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (query @ keys.mT * query.shape[-1] ** -0.5).softmax(-1) @ values
