"""The operators ``torch.ops.quest.*`` and their checked functions; importing registers them."""

from quest_compile.ops.attend_pages import attend_pages
from quest_compile.ops.audit import new_audit_totals
from quest_compile.ops.audit_totals import Audit, read_audit
from quest_compile.ops.build_page_summary import (
    build_page_summary,
    empty_page_summary,
)
from quest_compile.ops.counters import counters, reset_counters
from quest_compile.ops.cuda_providers import cuda_kernels, provider_of
from quest_compile.ops.cuda_providers import register as _register_cuda_kernels
from quest_compile.ops.dense_decode import dense_decode
from quest_compile.ops.dense_prefill import dense_prefill, has_prefill_kernel, is_prefill_faster
from quest_compile.ops.linear_decode import linear_decode
from quest_compile.ops.native import (
    NativeLibraryWarning,
    NativeStatus,
    native_status,
    warn_if_missing,
)
from quest_compile.ops.operator import OPERATORS
from quest_compile.ops.recorded_decode import new_recording
from quest_compile.ops.score_pages import score_pages
from quest_compile.ops.select_pages import select_pages
from quest_compile.ops.settings import Selection, SummaryFormat
from quest_compile.ops.share_mask import share_mask
from quest_compile.ops.sparse_decode import sparse_decode
from quest_compile.ops.sparse_decode_step import sparse_decode_step
from quest_compile.ops.update_page_summary import update_page_summary

native_status()
_register_cuda_kernels()

__all__ = [
    "OPERATORS",
    "Audit",
    "NativeLibraryWarning",
    "NativeStatus",
    "Selection",
    "SummaryFormat",
    "attend_pages",
    "build_page_summary",
    "counters",
    "cuda_kernels",
    "dense_decode",
    "dense_prefill",
    "empty_page_summary",
    "linear_decode",
    "native_status",
    "has_prefill_kernel",
    "is_prefill_faster",
    "new_audit_totals",
    "new_recording",
    "provider_of",
    "read_audit",
    "reset_counters",
    "score_pages",
    "select_pages",
    "share_mask",
    "sparse_decode",
    "sparse_decode_step",
    "update_page_summary",
    "warn_if_missing",
]
