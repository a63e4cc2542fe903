"""Every operator on small unpleasant inputs against plain torch; what compute-sanitizer runs.

NaN fills everything that must not be read.
``python -m quest_compile.bench.gpu_check.smoke DEVICE KERNELS...``: those of sources_of, or all.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.gpu_check.errors import relative_error
from quest_compile.bench.gpu_check.on_device import OnDevice
from quest_compile.bench.gpu_check.smoke_ways import (
    BUDGET,
    PAGE_BUDGET,
    run_shares,
    run_summary,
)
from quest_compile.ops import reference

# dtype, head_dim, group size, with a mask. Few: Triton compiles for each.
_CASES = (
    (torch.bfloat16, 128, 4, True),
    (torch.float16, 64, 1, False),
    (torch.float32, 96, 3, True),
)


def smoke(device: str, sources: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A row per operator and kernels: the largest error, relative to the largest value."""
    rows: dict[tuple[str, str], float] = {}
    for case in _CASES:
        for kernels, source in (sources or sources_of(device)).items():
            # Triton compiles more kernels for these, too.
            has_ways = kernels != "triton" or case is _CASES[0]
            for name, error in _run_case(OnDevice(source, device), *case, has_ways):
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
    source: Any, dtype: torch.dtype, head_dim: int, group_size: int, has_mask: bool, has_ways: bool
) -> list[tuple[str, float]]:  # fmt: skip
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
    summary_keys = keys.nan_to_num(0)
    summary, _ = ops.empty_page_summary(keys)
    summary.fill_(float("nan"))
    num_sealed = torch.zeros(2, dtype=torch.int64)
    state = [summary.clone(), num_sealed.clone()]
    written = torch.tensor([lengths[0] - 1])
    found = []

    source.update_page_summary(summary_keys, written, *state)
    expected_state = [summary.clone(), num_sealed.clone()]
    reference.update_page_summary(summary_keys, written, *expected_state)
    found.append(("update_page_summary", relative_error(state[0], expected_state[0])))
    rows = state[0]
    scores = source.score_pages(query, rows, seq_lens)
    found.append(
        ("score_pages", relative_error(scores, reference.score_pages(query, rows, seq_lens)))
    )
    limits = {"page_budget": PAGE_BUDGET}
    pages = source.select_pages(scores, seq_lens, mask, **limits)
    expected_pages = reference.select_pages(scores, seq_lens, mask, **limits)
    found.append(("select_pages", float((pages != expected_pages).sum())))
    attended = (query, keys, values, expected_pages, seq_lens, mask)
    out, lse = source.attend_pages(*attended)
    expected_out, expected_lse = reference.attend_pages(*attended)
    found.append(
        ("attend_pages", max(relative_error(out, expected_out), relative_error(lse, expected_lse)))
    )
    dense = (query, keys, values, seq_lens, mask)
    out = source.dense_decode(*dense)
    found.append(("dense_decode", relative_error(out, reference.dense_decode(*dense))))
    out = source.sparse_decode(query, keys, values, rows, seq_lens, mask, budget=BUDGET)
    expected_out, _ = reference.sparse_decode(
        query, keys, values, rows, seq_lens, mask, budget=BUDGET
    )
    found.append(("sparse_decode", relative_error(out, expected_out)))
    state = [summary.clone(), num_sealed.clone()]
    out = source.sparse_decode_step(
        query, summary_keys, values, written, *state, seq_lens, mask, budget=BUDGET
    )
    expected_out, _ = reference.sparse_decode(
        query, summary_keys, values, rows, seq_lens, mask, budget=BUDGET
    )
    found.append(("sparse_decode_step", relative_error(out, expected_out)))
    found.append(("sparse_decode_step state", relative_error(state[0], expected_state[0])))
    caches = (query, summary_keys, values)
    kind: dict[str, Any] = {"summary": "sketch", "sketch_bits": 1 + has_mask}
    found += run_summary(source, caches, written, seq_lens, mask, kind)
    if has_ways:
        found += run_shares(source, (query, keys, values), rows, seq_lens, mask)
    return found


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
