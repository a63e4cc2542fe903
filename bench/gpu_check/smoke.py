"""Every operator on small unpleasant inputs against plain torch; what compute-sanitizer runs.

NaN fills everything that must not be read. ``python -m quest_compile.bench.gpu_check.smoke DEVICE``
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch

from quest_compile import ops
from quest_compile.ops import native, reference

_PAGE_SIZE, _BUDGET = 16, 96
# dtype, head_dim, group size, with a mask. Few: Triton compiles for each.
_CASES = (
    (torch.bfloat16, 128, 4, True),
    (torch.float16, 64, 1, False),
    (torch.float32, 96, 3, True),
)


def smoke(device: str, sources: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A row per operator and kernels: the largest error, relative to the largest value.

    Native kernels run sparse steps in both their forms.
    """
    rows: dict[tuple[str, str], float] = {}
    for case in _CASES:
        for kernels, source in (sources or sources_of(device)).items():
            for form in ("two_kernels", "cluster") if kernels == "native" else ("auto",):
                with native.decode_form(form) if kernels == "native" else nullcontext():
                    found = _run_case(source, device, *case)
                for name, error in found:
                    key = (kernels, name)
                    rows[key] = max(rows.get(key, 0.0), error)
    return [
        {"kernels": kernels, "operator": name, "relative_error": error, "ok": error < 0.02}
        for (kernels, name), error in rows.items()
    ]


def sources_of(device: str) -> dict[str, Any]:
    """What can serve on this device, by name; ``ops`` is what does."""
    if device == "cpu":
        return {"cpu": ops}
    served = ops.provider_of("sparse_decode_step")
    sources = {served: ops}
    if served == "native":
        from quest_compile.ops.triton import operators

        sources["triton"] = operators
    return sources


def _run_case(
    source: Any, device: str, dtype: torch.dtype, head_dim: int, group_size: int, has_mask: bool
) -> list[tuple[str, float]]:
    lengths, capacity, num_kv_heads = (203, 64, 1), 219, 2
    torch.manual_seed(head_dim + group_size)
    shape = (len(lengths), num_kv_heads, capacity, head_dim)
    keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    query = torch.randn(3, num_kv_heads * group_size, 1, head_dim, device=device).to(dtype)
    seq_lens = torch.tensor(lengths, device=device)
    position = torch.arange(capacity, device=device)
    mask, live = None, position < seq_lens[:, None, None, None]
    if has_mask:
        mask = (position % 7 != 3).expand(3, 1, 1, -1).contiguous()
        live = live & mask
    for cache in (keys, values):
        cache.masked_fill_(~live.squeeze(2)[..., None], float("nan"))
    summary_keys = keys.nan_to_num(0)
    summary, _ = ops.empty_page_summary(keys)
    summary.fill_(float("nan"))
    num_sealed = torch.zeros(2, dtype=torch.int64, device=device)
    state = [summary.clone(), num_sealed.clone()]
    written = torch.tensor([lengths[0] - 1], device=device)
    found = []

    source.update_page_summary(summary_keys, written, *state)
    expected_state = [summary.clone(), num_sealed.clone()]
    reference.update_page_summary(summary_keys, written, *expected_state)
    found.append(("update_page_summary", _error(state[0], expected_state[0])))
    rows = state[0]
    scores = source.score_pages(query, rows, seq_lens)
    found.append(("score_pages", _error(scores, reference.score_pages(query, rows, seq_lens))))
    limits = {"page_budget": _BUDGET // _PAGE_SIZE}
    pages = source.select_pages(scores, seq_lens, mask, **limits)
    expected_pages = reference.select_pages(scores, seq_lens, mask, **limits)
    found.append(("select_pages", float((pages != expected_pages).sum())))
    attended = (query, keys, values, expected_pages, seq_lens, mask)
    out, lse = source.attend_pages(*attended)
    expected_out, expected_lse = reference.attend_pages(*attended)
    found.append(("attend_pages", max(_error(out, expected_out), _error(lse, expected_lse))))
    dense = (query, keys, values, seq_lens, mask)
    out = source.dense_decode(*dense)
    found.append(("dense_decode", _error(out, reference.dense_decode(*dense))))
    out = source.sparse_decode(query, keys, values, rows, seq_lens, mask, budget=_BUDGET)
    expected_out, _ = reference.sparse_decode(
        query, keys, values, rows, seq_lens, mask, budget=_BUDGET
    )
    found.append(("sparse_decode", _error(out, expected_out)))
    state = [summary.clone(), num_sealed.clone()]
    out = source.sparse_decode_step(
        query, summary_keys, values, written, *state, seq_lens, mask, budget=_BUDGET
    )
    expected_out, _ = reference.sparse_decode(
        query, summary_keys, values, rows, seq_lens, mask, budget=_BUDGET
    )
    found.append(("sparse_decode_step", _error(out, expected_out)))
    found.append(("sparse_decode_step state", _error(state[0], expected_state[0])))
    caches = (query, summary_keys, values)
    kinds: list[dict[str, Any]] = [{"summary": "minmax_int8"}]
    kinds.append({"summary": "sketch", "sketch_bits": 1 + has_mask})
    for kind in kinds:
        found += _run_scaled(source, caches, written, seq_lens, mask, kind)
    return found


def _run_scaled(
    source: Any, caches: tuple[torch.Tensor, torch.Tensor, torch.Tensor], written: torch.Tensor,
    seq_lens: torch.Tensor, mask: torch.Tensor | None, kind: dict[str, Any]
) -> list[tuple[str, float]]:  # fmt: skip
    """Of a summary with channel scales: rows and scales are those of the reference, bit for bit."""
    query, keys, _ = caches
    end = f", {kind['summary']}"
    empty: Any = ops.empty_page_summary(keys, **kind)
    num_sealed = torch.zeros(2, dtype=torch.int64, device=keys.device)
    num_pages = int(written + 1) // _PAGE_SIZE

    def new_state() -> list[torch.Tensor]:
        return [torch.zeros_like(empty[0]), num_sealed.clone(), torch.zeros_like(empty[1])]

    def num_wrong(state: list[torch.Tensor]) -> float:
        wrong = (state[0] != expected[0])[:, :, :num_pages].sum() + (state[2] != expected[2]).sum()
        return float(wrong)

    expected, state = new_state(), new_state()
    reference.update_page_summary(keys, written, *expected, **kind)
    source.update_page_summary(keys, written, *state, **kind)
    found = [(f"update_page_summary{end}", num_wrong(state))]
    rows, _, scale = expected
    of_tokens = {"attn_mask": mask} if kind["summary"] == "sketch" else {}
    scores = source.score_pages(query, rows, seq_lens, scale, **of_tokens, **kind)
    right = reference.score_pages(query, rows, seq_lens, scale, **of_tokens, **kind)
    found.append((f"score_pages{end}", _error(scores, right)))
    pages = reference.select_pages(scores, seq_lens, mask, page_budget=_BUDGET // _PAGE_SIZE)
    right, _ = reference.attend_pages(*caches, pages, seq_lens, mask)
    state = new_state()
    out = source.sparse_decode_step(
        *caches, written, *state[:2], seq_lens, mask, state[2], budget=_BUDGET, **kind
    )
    found.append((f"sparse_decode_step{end}", _error(out, right)))
    found.append((f"sparse_decode_step state{end}", num_wrong(state)))
    return found


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value; infinite where other values are not finite."""
    actual, expected = actual.float(), expected.float()
    finite = expected.isfinite()
    same = actual.isfinite() == finite
    if not bool(same.all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    size = expected[finite].abs().max().clamp(min=1e-6)
    return float((actual[finite] - expected[finite]).abs().max() / size)


def main() -> int:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    rows = smoke(device)
    for row in rows:
        print(row)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
