"""The methods: our operators, their stages, and what torch offers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from quest_compile.bench.ops.inputs import Setting, Step, Workload
from quest_compile.huge_pages import use_huge_pages
from quest_compile.inner import inner_compiler

# As compiled graphs call them: checks in Python cost up to 0.15 ms a call with cold code.
_DENSE_DECODE = torch.ops.quest.dense_decode.default
_SPARSE_DECODE = torch.ops.quest.sparse_decode.default
_SCORE_PAGES = torch.ops.quest.score_pages.default
_SELECT_PAGES = torch.ops.quest.select_pages.default
_ATTEND_PAGES = torch.ops.quest.attend_pages.default

STAGES = ("score", "select", "attend")
TORCH_METHODS = ("sdpa_group_as_q_len", "sdpa_enable_gqa", "sdpa_transformers")


@dataclasses.dataclass
class Method:
    """``call`` of one step; ``bytes_moved``: what it has to read, once.

    ``setting``: of Quest; None for methods that attend everything. ``stage``: a part of Quest only.
    """

    name: str
    call: Callable[[Step], Any]
    bytes_moved: int
    setting: Setting | None = None
    stage: str = ""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.name}/{self.stage}" if self.stage else self.name


def dense_decode(s: Step) -> torch.Tensor:
    return _DENSE_DECODE(s.query, s.key_cache, s.value_cache, s.seq_lens)


def sparse_decode(setting: Setting) -> Callable[[Step], torch.Tensor]:
    def call(s: Step) -> torch.Tensor:
        rows, channel_scale = s.summaries[setting.layout]
        tensors = (s.query, s.key_cache, s.value_cache, rows, s.seq_lens, None, channel_scale)
        return _SPARSE_DECODE(
            *tensors,
            budget=setting.budget,
            page_size=setting.page_size,
            summary=setting.summary,
        )

    return call


def score(s: Step, setting: Setting) -> torch.Tensor:
    rows, channel_scale = s.summaries[setting.layout]
    return _SCORE_PAGES(
        s.query,
        rows,
        s.seq_lens,
        channel_scale,
        page_size=setting.page_size,
        summary=setting.summary,
    )


def select(s: Step, setting: Setting, scores: torch.Tensor) -> torch.Tensor:
    page_budget = setting.budget // setting.page_size
    return _SELECT_PAGES(scores, s.seq_lens, page_budget=page_budget, page_size=setting.page_size)


def attend(s: Step, setting: Setting, page_indices: torch.Tensor) -> torch.Tensor:
    tensors = (s.query, s.key_cache, s.value_cache, page_indices, s.seq_lens)
    return _ATTEND_PAGES(*tensors, page_size=setting.page_size)[0]


def stages_of(setting: Setting, steps: list[Step], workload: Workload) -> list[Method]:
    """The three stages of Quest, each on the results of the one before."""
    scores = {id(s): score(s, setting) for s in steps}
    pages = {id(s): select(s, setting, scores[id(s)]) for s in steps}
    rows = steps[0].summaries[setting.layout][0]
    some = scores[id(steps[0])]
    num_tokens = some.shape[0] * some.shape[1] * setting.budget // setting.page_size
    num_tokens *= setting.page_size
    calls = {
        "score": (lambda s: score(s, setting), rows.nbytes),
        "select": (lambda s: select(s, setting, scores[id(s)]), some.nbytes),
        "attend": (
            lambda s: attend(s, setting, pages[id(s)]),
            num_tokens * 2 * workload.layer.head_dim * workload.dtype.itemsize,
        ),
    }
    return [
        Method(setting.name, call, num_bytes, setting, stage)
        for stage, (call, num_bytes) in calls.items()
    ]


def read_loop(num_bytes: int, device: str) -> Callable[[Step], torch.Tensor]:
    """A plain read of so many bytes: torch.sum over float32."""
    data = torch.ones(num_bytes // 4, device=device)
    use_huge_pages(data)
    return lambda _: data.sum()


def sdpa_enable_gqa(s: Step) -> torch.Tensor:
    return scaled_dot_product_attention(s.query, s.key_cache, s.value_cache, enable_gqa=True)


def sdpa_group_as_q_len(s: Step) -> torch.Tensor:
    """The fastest form of torch: the query heads of a group as positions of one head."""
    batch, num_kv_heads, _, head_dim = s.key_cache.shape
    grouped = s.query.view(batch, num_kv_heads, -1, head_dim)
    return scaled_dot_product_attention(grouped, s.key_cache, s.value_cache).view_as(s.query)


def sdpa_transformers(example: Step) -> tuple[Callable[[Step], torch.Tensor], str]:
    """repeat_kv and a mask, compiled: what a compiled transformers model runs; and its compiler."""
    inner = inner_compiler("inductor", [example.query])
    torch._dynamo.reset()
    compiled = torch.compile(_repeat_kv_and_mask, backend=inner, dynamic=False)
    return lambda s: compiled(s.query, s.key_cache, s.value_cache, s.attn_mask), inner


def _repeat_kv_and_mask(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, attn_mask: torch.Tensor
) -> torch.Tensor:
    batch, num_kv_heads, context, head_dim = key_cache.shape
    shape = (batch, num_kv_heads, query.shape[1] // num_kv_heads, context, head_dim)
    keys, values = (
        x[:, :, None].expand(shape).reshape(batch, -1, context, head_dim)
        for x in (key_cache, value_cache)
    )
    return scaled_dot_product_attention(query, keys, values, attn_mask=attn_mask)


def methods_of(
    workload: Workload, steps: list[Step], settings: list[Setting], wanted: list[str] | None
) -> list[Method]:
    """All methods for ``workload`` (or those wanted), the read loop always among them."""
    num_bytes = workload.dense_bytes

    def is_wanted(name: str) -> bool:
        return wanted is None or name in wanted

    methods = [Method("read_loop", read_loop(num_bytes, workload.device), num_bytes)]
    if is_wanted("dense_decode"):
        methods.append(Method("dense_decode", dense_decode, num_bytes))
    for setting in settings:
        if is_wanted(setting.name):
            methods.append(Method(setting.name, sparse_decode(setting), num_bytes, setting))
            if workload.context > setting.budget:
                methods += stages_of(setting, steps, workload)
    for call in (sdpa_group_as_q_len, sdpa_enable_gqa):
        if is_wanted(call.__name__):
            methods.append(Method(call.__name__, call, num_bytes))
    if is_wanted("sdpa_transformers"):
        compiled, inner = sdpa_transformers(steps[0])
        metadata = {"compiler": inner}
        methods.append(Method("sdpa_transformers", compiled, num_bytes, metadata=metadata))
    return methods
