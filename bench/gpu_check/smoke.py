"""Every operator on small unpleasant inputs against plain torch; what compute-sanitizer runs.

NaN fills everything that must not be read.
``python -m quest_compile.bench.gpu_check.smoke DEVICE KERNELS...``: those of sources_of, or all.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.gpu_check.on_device import OnDevice
from quest_compile.bench.ops.checks import TOLERANCE, relative_error
from quest_compile.ops import Selection, SummaryFormat, reference

# dtype, head_dim, group size, with a mask. Few: Triton compiles for each.
_CASES = (
    (torch.bfloat16, 128, 4, True),
    (torch.float16, 64, 1, False),
    (torch.float32, 96, 3, True),
)
_BUDGET, _MORE = 96, 160
# What rows are called: an empty name is the default.
_SETTINGS = {
    "": (Selection(_BUDGET), SummaryFormat()),
    "minmax": (Selection(_BUDGET, group_reduce="sum"), SummaryFormat(summary="minmax")),
    "1 bit, none": (Selection(_BUDGET, group_reduce="none"), SummaryFormat(sketch_bits=1)),
}
# Shares of more pages than they leave of the longest row.
_SHARES = {
    "top_p": (Selection(_MORE, top_p=0.6), SummaryFormat()),
    "budget_fraction": (Selection(_MORE, budget_fraction=0.3), SummaryFormat()),
    "minmax, top_p": (
        Selection(_MORE, top_p=0.6, group_reduce="sum"), SummaryFormat(summary="minmax")
    ),
}  # fmt: skip
Found = list[tuple[str, float]]


def smoke(device: str, sources: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A row per operator and kernels: the largest error, relative to the largest value."""
    rows: dict[tuple[str, str], float] = {}
    for case in _CASES:
        for kernels, source in (sources or sources_of(device)).items():
            # Triton compiles more kernels for these, too.
            has_shares = kernels != "triton" or case is _CASES[0]
            for name, error in _run_case(OnDevice(source, device), *case, has_shares):
                key = (kernels, name)
                rows[key] = max(rows.get(key, 0.0), error)
    return [
        {"kernels": kernels, "operator": name, "relative_error": error, "ok": error < TOLERANCE}
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
    source: Any, dtype: torch.dtype, head_dim: int, group_size: int, has_mask: bool,
    has_shares: bool
) -> Found:  # fmt: skip
    lengths, capacity, num_kv_heads = (203, 64, 1), 219, 2
    torch.manual_seed(head_dim + group_size)
    shape = (len(lengths), num_kv_heads, capacity, head_dim)
    keys, values = (torch.randn(shape).to(dtype) for _ in range(2))
    query = torch.randn(3, num_kv_heads * group_size, 1, head_dim).to(dtype)
    seq_lens = torch.tensor(lengths)
    position = torch.arange(capacity)
    mask, live = None, position < seq_lens[:, None, None, None]
    if has_mask:
        mask = (position % 7 != 3).expand(3, 1, 1, -1).contiguous()
        live = live & mask
    for cache in (keys, values):
        cache.masked_fill_(~live.squeeze(2)[..., None], float("nan"))
    tensors = (query, keys, values, seq_lens, mask)
    found = [("dense_decode", _error(source, "dense_decode", *tensors))]
    for name, (selection, page_format) in (_SETTINGS | (_SHARES if has_shares else {})).items():
        errors = _run_setting(source, tensors, selection, page_format)
        end = f", {name}" if name else ""
        kept = ("select_pages", "sparse_decode") if name in _SHARES else errors
        found += [(f"{operator}{end}", errors[operator]) for operator in kept]
    return found


def _error(source: Any, operator: str, *tensors: Any, **settings: Any) -> float:
    """Of the operator of ``source``, against plain torch."""
    actual, expected = (getattr(f, operator)(*tensors, **settings) for f in (source, reference))
    if not isinstance(actual, tuple):
        actual, expected = (actual,), (expected,)
    return max(relative_error(x, y) for x, y in zip(actual, expected, strict=True))


def _run_setting(
    source: Any, tensors: tuple[Any, ...], selection: Selection, page_format: SummaryFormat
) -> dict[str, float]:
    """The error of each operator, on the right results of those before it."""
    query, keys, values, seq_lens, mask = tensors
    of_pages: dict[str, Any] = page_format.as_kwargs()
    settings = selection.as_kwargs() | of_pages
    # Tokens that a mask forbids are part of their page.
    summary_keys, written = keys.nan_to_num(0), seq_lens.max()[None] - 1
    page_size = page_format.page_size

    def new_state() -> tuple[torch.Tensor, torch.Tensor]:
        rows = ops.empty_page_summary(keys, **of_pages)
        rows.view(torch.uint8).fill_(0xFF)  # NaN
        return rows, torch.zeros(2, dtype=torch.int64)

    (rows, _), own_state, step_state = states = [new_state() for _ in range(3)]
    reference.update_page_summary(summary_keys, written, *states[0], **of_pages)
    source.update_page_summary(summary_keys, written, *own_state, **of_pages)

    def num_wrong(state: tuple[torch.Tensor, torch.Tensor]) -> float:
        return float((state[0].view(torch.uint8) != rows.view(torch.uint8)).sum())

    how = (selection, page_format, None)
    scored = (query, rows, seq_lens, mask)
    scores, pages = reference.score_and_select(*scored, *how, ops=source)
    right_scores, _ = reference.score_and_select(*scored, *how)
    same = SimpleNamespace(score_pages=lambda *_, **__: scores, select_pages=reference.select_pages)
    _, right_pages = reference.score_and_select(*scored, *how, ops=same)
    attended = (right_pages, seq_lens, mask)
    caches, step_caches = (query, keys, values), (query, summary_keys, values)
    right, _ = reference.attend_pages(*caches, *attended, page_size=page_size)
    out = source.sparse_decode(*caches, rows, seq_lens, mask, **settings)
    state = (written, *step_state)
    step_out = source.sparse_decode_step(*step_caches, *state, seq_lens, mask, **settings)
    return {
        "update_page_summary": num_wrong(own_state),
        "score_pages": relative_error(scores, right_scores),
        "select_pages": float((pages != right_pages).sum()),
        "attend_pages": _error(source, "attend_pages", *caches, *attended, page_size=page_size),
        "sparse_decode": relative_error(out, right),
        "sparse_decode_step": relative_error(step_out, right),
        "sparse_decode_step state": num_wrong(step_state),
    }


def main() -> int:
    device, *names = sys.argv[1:] or ["cuda"]
    sources = sources_of(device)
    rows = smoke(device, {name: sources[name] for name in names or sources})
    for row in rows:
        print(row)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
