"""The methods: our operators, their stages, and what torch offers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from quest_compile.bench.ops.checks import Scored, check_pages
from quest_compile.bench.ops.inputs import Step, Workload
from quest_compile.bench.settings import Setting
from quest_compile.huge_pages import use_huge_pages
from quest_compile.inner import inner_compiler
from quest_compile.ops import OPERATORS, reference

# As compiled graphs call them: checks in Python cost up to 0.15 ms a call with cold code.
SERVED = SimpleNamespace(**{name: operator.overload for name, operator in OPERATORS.items()})

# Pages that an update compares with their keys, and one that it makes.
_NUM_UPDATED_PAGES = 5
TORCH_METHODS = ("sdpa_group_as_q_len", "sdpa_enable_gqa", "sdpa_transformers")


@dataclasses.dataclass
class Method:
    """``call`` of one step; ``bytes_moved``: what it has to read, once.

    ``setting``: of Quest; None for methods that attend everything. ``stage``: a part of Quest only.
    ``pages``: what it attends of the first step [B, heads that select, pages]; None: everything, or
    it attends nothing.
    """

    name: str
    call: Callable[[Step], Any]
    bytes_moved: int
    setting: Setting | None = None
    stage: str = ""
    pages: torch.Tensor | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.name}/{self.stage}" if self.stage else self.name


def dense_decode(s: Step, served: Any = SERVED) -> torch.Tensor:
    return served.dense_decode(*s.caches, s.seq_lens)


def sparse_decode(
    setting: Setting, context: int, served: Any = SERVED
) -> Callable[[Step], torch.Tensor]:
    """The operator of compiled graphs: on GPUs it keeps the page summary up to date as well."""
    page_format = setting.page_format
    settings: dict[str, Any] = setting.selection(context).as_kwargs() | page_format.as_kwargs()

    def call(s: Step) -> torch.Tensor:
        page_summary, num_sealed = s.page_summary[page_format], s.num_sealed[page_format]
        if not s.query.is_cuda:
            return served.sparse_decode(*s.caches, page_summary, s.seq_lens, **settings)
        state = (s.cache_position, page_summary, num_sealed)
        return served.sparse_decode_step(*s.caches, *state, s.seq_lens, **settings)

    return call


def quest_methods(
    setting: Setting, steps: list[Step], workload: Workload, served: Any = SERVED
) -> list[Method]:
    """Quest and, where it leaves pages out, its stages, each on the results of the one before.

    Raises:
        RefusedError: pages are not those of the reference.
    """
    call = sparse_decode(setting, workload.context, served)
    whole = Method(setting.name, call, workload.dense_bytes, setting)
    if not setting.is_sparse(workload.context):
        return [whole]
    page_format, page_size = setting.page_format, setting.page_size
    tensors = _scored(steps[0], setting)
    selection = setting.selection(workload.context)
    whole.pages = pages = check_pages(setting.name, tensors, selection, page_format, served=served)
    stages = {id(s): _stages(s, setting, served) for s in steps}
    layer, num_complete = workload.layer, workload.context // page_size
    num_heads = workload.batch * layer.num_kv_heads
    page_bytes = page_size * layer.head_dim * workload.dtype.itemsize
    row_bytes = steps[0].page_summary[page_format][0, 0, 0].nbytes
    num_tokens = int((pages >= 0).sum()) * page_size
    # The newest page is selected by every head.
    num_tokens -= pages.shape[0] * pages.shape[1] * (-workload.context % page_size)
    sizes = {
        "update": _NUM_UPDATED_PAGES * num_heads * (page_bytes + row_bytes),
        "score": num_heads * num_complete * row_bytes,
        "select": 4 * pages.shape[0] * pages.shape[1] * num_complete,
        "attend": num_tokens * 2 * layer.head_dim * workload.dtype.itemsize,
    }
    whole.bytes_moved = sizes["score"] + sizes["attend"]

    def method_of(stage: str) -> Method:
        attended = pages if stage == "attend" else None
        return Method(
            setting.name, lambda s: stages[id(s)][stage](), sizes[stage], setting, stage, attended
        )

    return [whole, *map(method_of, sizes)]


def selected_pages(s: Step, setting: Setting, served: Any = SERVED) -> torch.Tensor:
    query, page_summary, seq_lens, mask = _scored(s, setting)
    how = (setting.selection(s.key_cache.shape[2]), setting.page_format, None, served)
    return reference.score_and_select(query, page_summary, seq_lens, mask, *how)[1]


def _scored(s: Step, setting: Setting) -> Scored:
    return s.query, s.page_summary[setting.page_format], s.seq_lens, None


def _stages(s: Step, setting: Setting, served: Any) -> dict[str, Callable[[], Any]]:
    """The calls that a step is made of."""
    made: dict[str, Callable[[], Any]] = {}

    def keep(stage: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Any, **settings: Any) -> Any:
            made[stage] = functools.partial(operator, *tensors, **settings)
            return made[stage]()

        return call

    page_format = setting.page_format
    update = keep("update", served.update_page_summary)
    state = (s.cache_position, s.page_summary[page_format], s.num_sealed[page_format])
    update(s.key_cache, *state, **page_format.as_kwargs())
    kept = SimpleNamespace(
        score_pages=keep("score", served.score_pages),
        select_pages=keep("select", served.select_pages),
    )
    pages = selected_pages(s, setting, kept)
    attend = keep("attend", served.attend_pages)
    attend(*s.caches, pages, s.seq_lens, page_size=setting.page_size)
    return made


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
    compiled = torch.compile(torch.no_grad()(_repeat_kv_and_mask), backend=inner, dynamic=False)
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
            methods += quest_methods(setting, steps, workload)
    for call in (sdpa_group_as_q_len, sdpa_enable_gqa):
        if is_wanted(call.__name__):
            methods.append(Method(call.__name__, call, num_bytes))
    if is_wanted("sdpa_transformers"):
        compiled, inner = sdpa_transformers(steps[0])
        metadata = {"compiler": inner}
        methods.append(Method("sdpa_transformers", compiled, num_bytes, metadata=metadata))
    return methods
