"""Inputs as unpleasant as the operators have to take them."""

import dataclasses
import random

import torch

from quest_compile import ops

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("plain", "tokens_first", "gaps")
MASKS = ("none", "ones", "row", "random", "left_padding", "per_head", "dead_pages", "nothing")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call; the defaults are small and ordinary."""

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
    group_reduce: str = "sum"
    budget_pages: int = 4
    summary: str = "minmax"
    top_p: float = 1.0
    budget_fraction: float = 1.0

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        lengths = "_".join(map(str, self.lengths))
        return (
            f"{dtype}-D{self.head_dim}-E{self.value_dim}-H{self.num_kv_heads}x{self.group_size}"
            f"-P{self.page_size}-L{lengths}of{self.max_seq_len}"
            f"-{self.layout}-{self.mask}-{self.group_reduce}"
            f"{'' if self.summary == 'minmax' else '-' + self.summary}"
        )


_F32, _BF16, _F16 = DTYPES
CASES = (
    Case(_F32, 8, 8, 2, 1, 8, (1,), 1),
    Case(_BF16, 24, 24, 2, 2, 8, (15, 1, 64), 64, "gaps", "row", "max"),
    Case(_F16, 64, 64, 1, 3, 16, (16,), 17, "tokens_first", "random", "none"),
    Case(_F32, 80, 80, 2, 4, 16, (17, 333, 63), 333, "gaps", "left_padding", "sum"),
    Case(_BF16, 128, 128, 2, 4, 16, (333,), 400, "plain", "none", "sum"),
    Case(_F16, 256, 256, 1, 7, 24, (100, 200, 23), 200, "tokens_first", "none", "max"),
    Case(_F32, 64, 24, 1, 8, 32, (333, 64, 129), 334, "plain", "per_head", "sum"),
    Case(_BF16, 24, 80, 3, 3, 24, (340,), 340, "tokens_first", "dead_pages", "none"),
    Case(_F16, 128, 64, 2, 8, 64, (777, 63, 640), 800, "gaps", "ones", "sum"),
    Case(_BF16, 8, 256, 2, 1, 128, (1100,), 1101, "gaps", "random", "max"),
    Case(_F32, 128, 128, 2, 2, 8, (2100, 100), 2100, "tokens_first", "dead_pages", "max"),
    Case(_BF16, 64, 64, 2, 4, 16, (200, 130, 16), 256, "tokens_first", "per_head", "none"),
    Case(_F16, 80, 8, 4, 1, 16, (255, 256), 257, "plain", "nothing", "sum"),
    Case(_BF16, 256, 128, 2, 7, 32, (500,), 512, "gaps", "left_padding", "sum"),
)


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
    channel_scale: torch.Tensor | None = None

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
        """Keyword arguments of score_pages."""
        case = self.case
        settings = {"page_size": case.page_size, "group_reduce": case.group_reduce}
        if case.summary == "minmax":
            return settings
        scale = {} if self.channel_scale is None else {"channel_scale": self.channel_scale}
        return settings | {"summary": case.summary, **scale}

    def score_scale(self):
        """What makes logits of the scores of min/max rows."""
        case = self.case
        group_size = case.group_size if case.group_reduce == "sum" else 1
        return case.head_dim**-0.5 / group_size

    def fits(self):
        """bool [batch]: rows that attend every page."""
        case = self.case
        num_used = -(-self.seq_lens // case.page_size)
        share = (num_used.double() * case.budget_fraction).ceil().clamp(min=4)
        return num_used <= share.clamp(max=case.budget_pages)

    def scores(self):
        """Result of score_pages."""
        arguments = (self.query, self.page_summary, self.seq_lens)
        of_tokens = {"attn_mask": self.attn_mask} if self.case.summary == "sketch" else {}
        return ops.score_pages(*arguments, **self.score_settings(), **of_tokens)

    def pages(self, scores):
        """Result of select_pages."""
        case = self.case
        settings = {"page_budget": case.budget_pages, "page_size": case.page_size, **self.shares()}
        if case.top_p < 1:
            settings["score_scale"] = self.score_scale()
        return ops.select_pages(scores, self.seq_lens, self.attn_mask, **settings)

    def attend(self, pages):
        """The out of attend_pages."""
        caches = (self.key_cache, self.value_cache)
        page_size = self.case.page_size
        return ops.attend_pages(
            self.query, *caches, pages, self.seq_lens, self.attn_mask, page_size=page_size
        )[0]


def make_inputs(case, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, num_q_heads = len(case.lengths), case.num_kv_heads * case.group_size
    shape = (batch, case.num_kv_heads, case.max_seq_len)
    draw = torch.Generator().manual_seed(seed + 1)
    # Channels differ in size, as those of models do: page bounds are then far from equal.
    channels = torch.randn(case.head_dim, generator=draw).exp()
    query = torch.randn(batch, num_q_heads, 1, case.head_dim, generator=generator)
    keys = torch.randn(*shape, case.head_dim, generator=generator) * channels
    values = torch.randn(*shape, case.value_dim, generator=generator)
    query, keys, values = (x.to(device, case.dtype) for x in (query, keys, values))
    seq_lens = torch.tensor(case.lengths, device=device)
    attn_mask = make_mask(case, generator)
    built = ops.build_page_summary(keys, seq_lens, case.page_size, case.summary)
    page_summary, channel_scale = built if isinstance(built, tuple) else (built, None)
    inputs = Inputs(
        case,
        query,
        lay_out(keys, case.layout),
        lay_out(values, case.layout),
        page_summary,
        seq_lens,
        None if attn_mask is None else attn_mask.to(device),
        keys.double(),
        values.double(),
        channel_scale,
    )
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


def poison(inputs):
    """NaN into keys and values that no query head may attend, and into summaries not to be read."""
    case = inputs.case
    live = inputs.live.unflatten(1, (case.num_kv_heads, -1)).any(2)
    for cache in (inputs.key_cache, inputs.value_cache):
        cache.masked_fill_(~live[..., None], NAN)
    num_pages = inputs.page_summary.shape[2]
    pages = torch.arange(num_pages, device=inputs.query.device)
    is_complete = pages < (inputs.seq_lens // case.page_size)[:, None]
    # A page scale of these bytes is NaN.
    unread = NAN if inputs.channel_scale is None else 255
    for row, complete in zip(inputs.page_summary, is_complete.expand(len(case.lengths), -1)):
        row[:, ~complete] = unread


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
        group_reduce=rng.choice(("sum", "max", "none")),
        budget_pages=rng.randint(3, 12),
        top_p=rng.choice((1.0, 1.0, 0.5, 0.95)),
        budget_fraction=rng.choice((1.0, 1.0, 0.1, 0.5)),
    )
