"""Inputs as unpleasant as the operators have to take them, in every way to choose pages."""

import dataclasses
import random

import pytest
import torch
from key_distributions import make_keys

from quest_compile import ops

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("plain", "tokens_first", "gaps")
MASKS = ("none", "ones", "row", "random", "left_padding", "per_head", "dead_pages", "nothing")


def _settings(summary, sketch_bits, group_reduce):
    return {"summary": summary, "sketch_bits": sketch_bits, "group_reduce": group_reduce}


PAPER = _settings("minmax", 2, "none")
# What pages are chosen by: all ways there are, the default first.
WAYS = (
    _settings("sketch", 2, "softmax"),
    _settings("sketch", 1, "softmax"),
    _settings("sketch", 2, "none"),
    _settings("sketch", 1, "none"),
    _settings("minmax", 2, "softmax"),
    PAPER,
    _settings("minmax", 2, "sum"),
)
FORMATS = tuple(
    {"summary": summary, "sketch_bits": bits}
    for summary, bits in dict.fromkeys((way["summary"], way["sketch_bits"]) for way in WAYS)
)


def id_of(settings):
    return "-".join(map(str, settings.values()))


every_way = pytest.mark.parametrize("way", WAYS, ids=id_of)
every_format = pytest.mark.parametrize("page_format", FORMATS, ids=id_of)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call; the defaults are small and ordinary. ``keys``: of key_distributions."""

    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    value_dim: int = 64
    num_kv_heads: int = 2
    group_size: int = 4
    page_size: int = 16
    lengths: tuple[int, ...] = (100,)
    max_seq_len: int = 128
    layout: str = "plain"
    mask: str = "none"
    budget_pages: int = 4
    summary: str = WAYS[0]["summary"]
    sketch_bits: int = WAYS[0]["sketch_bits"]
    group_reduce: str = WAYS[0]["group_reduce"]
    top_p: float = 1.0
    budget_fraction: float = 1.0
    keys: str = "spread_channels"

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        lengths = "_".join(map(str, self.lengths))
        return (
            f"{dtype}-D{self.head_dim}-E{self.value_dim}-H{self.num_kv_heads}x{self.group_size}"
            f"-P{self.page_size}-L{lengths}of{self.max_seq_len}-{self.layout}-{self.mask}"
            f"-{id_of(self.way())}"
        )

    def page_format(self):
        """Keyword arguments: what a page summary is."""
        return {
            "page_size": self.page_size,
            "summary": self.summary,
            "sketch_bits": self.sketch_bits,
        }

    def way(self):
        """One of WAYS."""
        return _settings(self.summary, self.sketch_bits, self.group_reduce)

    @property
    def scores_tokens(self):
        """Does score_pages take a mask and a scale?"""
        return self.summary == "sketch" or self.group_reduce == "softmax"


def in_turn(*cases):
    """One way after the other."""
    return tuple(dataclasses.replace(case, **WAYS[i % len(WAYS)]) for i, case in enumerate(cases))


_F32, _BF16, _F16 = DTYPES
CASES = in_turn(
    Case(_BF16, 128, 128, 2, 4, 16, (333,), 400),
    Case(_F32, 8, 8, 2, 1, 8, (1,), 1),
    Case(_BF16, 24, 24, 2, 2, 8, (15, 1, 64), 64, "gaps", "row"),
    Case(_F16, 64, 64, 1, 3, 16, (16,), 17, "tokens_first", "random"),
    Case(_F32, 64, 24, 1, 8, 32, (333, 64, 129), 334, "plain", "per_head"),
    Case(_F16, 256, 256, 1, 7, 24, (100, 200, 23), 200, "tokens_first"),
    Case(_F32, 80, 80, 2, 4, 16, (17, 333, 63), 333, "gaps", "left_padding"),
    Case(_BF16, 64, 64, 2, 4, 16, (200, 130, 16), 256, "tokens_first", "per_head"),
    Case(_BF16, 24, 80, 3, 3, 24, (340,), 340, "tokens_first", "dead_pages"),
    Case(_F16, 128, 64, 2, 8, 64, (777, 63, 640), 800, "gaps", "ones"),
    Case(_BF16, 8, 256, 2, 1, 128, (1100,), 1101, "gaps", "random"),
    Case(_BF16, 256, 128, 2, 7, 32, (500,), 512, "gaps", "left_padding"),
    Case(_F16, 80, 8, 4, 1, 16, (255, 256), 257, "plain", "nothing"),
    Case(_F32, 128, 128, 2, 2, 8, (2100, 100), 2100, "tokens_first", "dead_pages"),
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@dataclasses.dataclass
class Inputs:
    """Tensors of a call, made from clean ones; positions that must not be read hold NaN.

    ``clean_keys`` and ``clean_values`` are float64 copies without NaN, for the exact result.
    """

    case: Case
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    page_summary: torch.Tensor
    seq_lens: torch.Tensor
    attn_mask: torch.Tensor | None
    clean_keys: torch.Tensor
    clean_values: torch.Tensor

    @property
    def live(self):
        """bool [batch, num_q_heads, max_seq_len]: what each query head may attend."""
        case = self.case
        positions = torch.arange(case.max_seq_len, device=self.query.device)
        live = (positions < self.seq_lens[:, None])[:, None]
        if self.attn_mask is not None:
            live = live & self.attn_mask[:, :, 0]
        return live.expand(len(case.lengths), case.num_kv_heads * case.group_size, -1)

    def clean(self):
        """Query, keys and values without NaN."""
        return self.query, self.clean_keys, self.clean_values

    def dense(self):
        """Positional arguments of dense_decode."""
        return self.query, self.key_cache, self.value_cache, self.seq_lens, self.attn_mask

    def sparse(self):
        """Positional arguments of sparse_decode."""
        caches = (self.key_cache, self.value_cache, self.page_summary)
        return self.query, *caches, self.seq_lens, self.attn_mask

    def settings(self):
        """Keyword arguments of sparse_decode."""
        return {
            "budget": self.case.budget_pages * self.case.page_size,
            **self.score_settings(),
            **self.shares(),
        }

    def shares(self):
        """Keyword arguments of sparse_decode and select_pages."""
        found = {"top_p": self.case.top_p, "budget_fraction": self.case.budget_fraction}
        return {name: value for name, value in found.items() if value < 1}

    def score_settings(self):
        """Keyword arguments of score_pages but for mask and scale."""
        return {**self.case.page_format(), "group_reduce": self.case.group_reduce}

    def score_scale(self, scale=None):
        """What makes logits of scores; None: they are shares."""
        case = self.case
        if case.group_reduce == "softmax":
            return None
        if case.summary == "sketch":
            return 1.0
        scale = case.head_dim**-0.5 if scale is None else scale
        return scale / (case.group_size if case.group_reduce == "sum" else 1)

    def fits(self):
        """bool [batch]: rows that attend every page."""
        case = self.case
        num_used = -(-self.seq_lens // case.page_size)
        share = (num_used.double() * case.budget_fraction).ceil().clamp(min=4)
        return num_used <= share.clamp(max=case.budget_pages)

    def scores(self, **settings):
        """Result of score_pages."""
        arguments = (self.query, self.page_summary, self.seq_lens)
        if self.case.scores_tokens:
            settings = {"attn_mask": self.attn_mask, **settings}
        return ops.score_pages(*arguments, **self.score_settings(), **settings)

    def pages(self, scores, scale=None):
        """Result of select_pages."""
        return ops.select_pages(
            scores,
            self.seq_lens,
            self.attn_mask,
            page_budget=self.case.budget_pages,
            page_size=self.case.page_size,
            score_scale=self.score_scale(scale),
            **self.shares(),
        )

    def attend(self, pages, **settings):
        """Result of attend_pages: out, lse."""
        tensors = (self.query, self.key_cache, self.value_cache, pages, self.seq_lens)
        settings = {"page_size": self.case.page_size, **settings}
        return ops.attend_pages(*tensors, self.attn_mask, **settings)

    def summarise(self):
        """Make page_summary of the keys as they are now."""
        self.page_summary = ops.build_page_summary(
            self.key_cache, self.seq_lens, **self.case.page_format()
        )


def make_inputs(case, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, num_q_heads = len(case.lengths), case.num_kv_heads * case.group_size
    shape = (batch, case.num_kv_heads, case.max_seq_len)
    query = torch.randn(batch, num_q_heads, 1, case.head_dim, generator=generator)
    keys = make_keys(case.keys, (*shape, case.head_dim), case.dtype, seed + 1)
    values = torch.randn(*shape, case.value_dim, generator=generator)
    query, keys, values = (x.to(device, case.dtype) for x in (query, keys, values))
    attn_mask = make_mask(case, generator)
    inputs = Inputs(
        case,
        query,
        keys,
        lay_out(values, case.layout),
        None,
        torch.tensor(case.lengths, device=device),
        None if attn_mask is None else attn_mask.to(device),
        keys.double(),
        values.double(),
    )
    inputs.summarise()
    inputs.key_cache = lay_out(keys, case.layout)
    poison(inputs)
    return inputs


def make_mask(case, generator):
    batch, num_q_heads = len(case.lengths), case.num_kv_heads * case.group_size
    positions = torch.arange(case.max_seq_len)
    if case.mask == "none":
        return None
    if case.mask == "ones":
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)
    if case.mask == "row":
        return (positions != 3).expand(batch, 1, 1, -1)
    if case.mask == "nothing":
        mask = torch.ones(batch, 1, 1, case.max_seq_len, dtype=torch.bool)
        mask[0] = False
        return mask
    if case.mask == "left_padding":
        padding = torch.randint(0, min(case.lengths), (batch,), generator=generator)
        return (positions >= padding[:, None])[:, None, None]
    if case.mask == "dead_pages":
        is_dead = torch.rand(batch, case.max_seq_len, generator=generator) < 0.5
        is_dead = is_dead[:, positions // case.page_size]
        return ~is_dead[:, None, None]
    heads = num_q_heads if case.mask == "per_head" else 1
    mask = torch.rand(batch, case.max_seq_len, 1, heads, generator=generator) < 0.6
    return mask.permute(0, 3, 2, 1)


def lay_out(cache, layout):
    """The same values in other memory."""
    if layout == "tokens_first":
        return cache.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gaps":
        batch, heads, length, size = cache.shape
        memory = cache.new_full((batch + 1, heads + 1, length + 3, size + 8), NAN)
        view = memory[1:, 1:, 2:-1, 8:]
        view.copy_(cache)
        return view
    return cache.clone()


def other_memory(mask):
    """The same mask [batch, heads, 1, positions] with other strides."""
    yield mask.contiguous()
    yield mask.repeat_interleave(2, -1)[..., ::2]
    yield mask.transpose(0, 3).contiguous().transpose(0, 3)
    if mask.shape[1] == 1:
        yield mask.expand(-1, 8, -1, -1)


def poison(inputs):
    """NaN into keys and values that no query head may attend, and into summaries not to be read."""
    case = inputs.case
    live = inputs.live.unflatten(1, (case.num_kv_heads, -1)).any(2)
    for cache in (inputs.key_cache, inputs.value_cache):
        cache.masked_fill_(~live[..., None], NAN)
    num_pages = inputs.page_summary.shape[2]
    pages = torch.arange(num_pages, device=inputs.query.device)
    is_complete = pages < (inputs.seq_lens // case.page_size)[:, None]
    for row, complete in zip(inputs.page_summary, is_complete.expand(len(case.lengths), -1)):
        fill_with_nan(row, ~complete)


def fill_with_nan(page_summary, pages=slice(None)):
    """Of one row: scales of bytes that are all 255 are NaN."""
    is_sketch = page_summary.dtype == torch.uint8
    page_summary[:, pages] = 255 if is_sketch else NAN


def on_cpu(*tensors):
    """Copies, or None for None, for a reference that has to give bits: torch's division of a CUDA
    tensor by a scalar multiplies by the rounded inverse."""
    return [None if x is None else x.cpu().clone() for x in tensors]


def wild_slots(page_indices):
    """Empty slots of any value that is not a page in use."""
    wild = torch.tensor([-1, -2, -(2**31), -123456, 2**31 - 1, 2**28], dtype=torch.int32)
    wild = wild.to(page_indices.device)[torch.randint(0, len(wild), page_indices.shape)]
    return torch.where(page_indices < 0, wild, page_indices)


def random_case(seed, max_length=700):
    """Any supported sizes; the same seed gives the same case."""
    rng = random.Random(seed)
    page_size = rng.choice((8, 16, 24, 32, 40, 64, 128))
    lengths = tuple(rng.randint(1, max_length) for _ in range(rng.choice((1, 1, 2, 3))))
    return Case(
        dtype=rng.choice(DTYPES),
        head_dim=8 * rng.randint(1, 32),
        value_dim=8 * rng.randint(1, 32),
        num_kv_heads=rng.randint(1, 3),
        group_size=rng.choice((1, 2, 3, 4, 5, 7, 8, 12)),
        page_size=page_size,
        lengths=lengths,
        max_seq_len=max(lengths) + rng.choice((0, 1, 7, 100)),
        layout=rng.choice(LAYOUTS),
        mask=rng.choice(MASKS),
        budget_pages=rng.randint(3, 12),
        **rng.choice(WAYS),
        top_p=rng.choice((1.0, 1.0, 0.5, 0.95)),
        budget_fraction=rng.choice((1.0, 1.0, 0.1, 0.5)),
    )
