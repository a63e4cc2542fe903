"""Page scores in float64, by their definitions, and how far off those of an operator may be.

Nothing here is taken from the reference: sketches are read by the layout that its file documents.
Shape suffixes: those of ops/reference.
"""

import torch

EPS = torch.finfo(torch.float32).eps


def exact_scores(inputs, scale=None):
    """What ``inputs.scores(scale=scale)`` has to be within a budget: both [B, S, P].

    The budget is float32's, more where a query's code may be one step off, as it is at a tie of
    rounding.
    """
    case = inputs.case
    num_pages, page_size = inputs.page_summary.shape[2], case.page_size
    scale = case.head_dim**-0.5 if scale is None else scale
    live = torch.nn.functional.pad(
        inputs.live, (0, num_pages * page_size - inputs.case.max_seq_len)
    )
    live_BKGPT = live.unflatten(2, (num_pages, page_size)).unflatten(1, (case.num_kv_heads, -1))
    query_BKGD = inputs.query.double().view(*live_BKGPT.shape[:3], case.head_dim)
    rows = inputs.page_summary
    if case.summary == "sketch":
        score, budget = _estimates(query_BKGD, rows, live_BKGPT, case, scale)
    else:
        score, budget = _bounds(query_BKGD, rows)
        if case.group_reduce == "softmax":
            score, budget = score * scale, budget * abs(scale)
            score = score.masked_fill(~live_BKGPT.any(-1), -torch.inf)
    is_complete = torch.arange(num_pages, device=rows.device) < (
        (inputs.seq_lens // page_size).view(-1, 1, 1, 1)
    )
    score = score.masked_fill(~is_complete, -torch.inf)
    if case.group_reduce == "none":
        return score.flatten(1, 2), budget.flatten(1, 2)
    if case.group_reduce == "sum":
        return score.sum(2), budget.sum(2)
    return shares(score, budget)


def assert_scores(inputs, actual, scale=None):
    exact, budget = exact_scores(inputs, scale)
    assert actual.dtype == torch.float32 and actual.shape == exact.shape
    for is_kind in (torch.isnan, torch.isneginf, torch.isposinf):
        assert torch.equal(is_kind(actual), is_kind(exact)), is_kind.__name__
    is_finite = exact.isfinite()
    excess = ((actual - exact).abs() - budget)[is_finite]
    assert (excess <= 0).all(), f"beyond the budget by {excess.max():.3g}"


def shares(logit_BKGP, budget_BKGP):
    """Each head's softmax, summed over a group: [B, K, P], and the budget that follows."""
    is_nan = logit_BKGP.isnan()
    logit_BKGP = logit_BKGP.masked_fill(is_nan, -torch.inf)
    counts = logit_BKGP > -torch.inf
    share = logit_BKGP.softmax(-1).where(counts, 0)
    error = budget_BKGP.where(counts, 0).amax(-1, keepdim=True).clamp(max=1)
    budget = (share * torch.expm1(2 * error) + 4 * EPS).clamp(max=1).sum(2)
    total = share.sum(2).masked_fill(is_nan.any(2), torch.nan)
    return total.masked_fill(~(counts | is_nan).any(2), -torch.inf), budget


def _bounds(query_BKGD, rows):
    """Algorithm 1 of arXiv 2406.10774, word for word. Weights may be the sum of two bfloat16."""
    low, high = rows.double()[:, :, None].unbind(4)
    terms = torch.maximum(query_BKGD[..., None, :] * low, query_BKGD[..., None, :] * high)
    largest = query_BKGD.abs() @ rows.double().abs().amax(3).mT
    return terms.sum(-1), 1e-5 * largest


def _estimates(query_BKGD, rows, live_BKGPT, case, scale):
    """Log of the sum of exp(scale * query.key) over the live tokens."""
    mean, rest = decoded_keys(rows, case)
    code, factor, may_differ = query_codes(query_BKGD)
    factor = factor[..., None] * scale

    def product(weight, keys):
        return torch.einsum("bkgd,bkptd->bkgpt", weight, keys) * factor

    logit = product(code, mean + rest)
    rounding = 8 * EPS * product(code.abs(), mean.abs() + rest.abs()).abs()
    off_by_one = product(may_differ.double(), (mean + rest).abs()).abs()
    error = (rounding + off_by_one).nan_to_num(0).where(live_BKGPT, 0).amax(-1)
    score = logit.masked_fill(~live_BKGPT, -torch.inf).logsumexp(-1)
    return score, error + 1e-5


def query_codes(query_BKGD):
    """Whole numbers, what one is worth in units of query.key, and where float32 may be one off."""
    query_BKGD = query_BKGD.masked_fill(~query_BKGD.isfinite().all(-1, keepdim=True), torch.nan)
    matrix = rotation(query_BKGD.shape[-1]).to(query_BKGD.device)
    n = matrix[0].abs().sum()
    rotated = query_BKGD @ matrix.mT
    step = (rotated.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    code = (rotated / step).round()
    # Each of the sums over n channels has an error of its own.
    error = (n.log2() + 2) * EPS * (query_BKGD.abs().sum(-1, keepdim=True) / step + 127)
    return code, step / n, (rotated / step - code).abs() > 0.5 - error


def rotation(head_dim):
    """float64 [D, D]: signs, then Hadamard in blocks of n; rows are orthogonal, their square n."""
    n = head_dim & -head_dim
    step, hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.ones(1, 1).double()
    while len(hadamard) < n:
        hadamard = torch.kron(hadamard, step)
    return torch.block_diag(*[hadamard] * (head_dim // n)) * signs(head_dim)


def signs(head_dim):
    words = [(channel + 1) * 0x9E3779B1 % 2**32 for channel in range(head_dim)]
    words = [(word ^ word >> 15) * 0x85EBCA77 % 2**32 for word in words]
    return torch.tensor([-1.0 if word >> 31 else 1.0 for word in words], dtype=torch.float64)


def decoded_keys(rows, case):
    """Rotated keys as float64: the mean of each page [B, K, P, 1, D], and what is left of each
    token [B, K, P, T, D], NaN where it was not finite."""
    head_dim, page_size = case.head_dim, case.page_size
    tiles, blocks = -(-page_size // 16), -(-head_dim // 32)
    plane = tiles * blocks * 64
    sizes = (plane, head_dim, tiles * 32, 4)
    first_plane, mean, token_scale, mean_scale, _ = rows.split(
        [*sizes, rows.shape[-1] - sum(sizes)], -1
    )

    def bits(plane):
        """[I, C, 16, 4 bytes i, 8 bits j]: channel 32 * c + 4 * j + i."""
        plane = plane.unflatten(-1, (tiles, blocks, 16, 4))[..., None]
        plane = plane >> torch.arange(8, device=rows.device) & 1
        tokens = plane.mT.flatten(-2).transpose(-2, -3).flatten(-2).flatten(-3, -2)
        return tokens[..., :page_size, :head_dim].double()

    level = 2 * bits(first_plane) - 1
    if case.sketch_bits == 2:
        level = level + bits(rows[..., -plane:]) - 0.5
    token_scale = token_scale.contiguous().view(torch.bfloat16)[..., :page_size, None].double()
    mean_scale = mean_scale.contiguous().view(torch.float32).double()
    mean = mean.view(torch.int8).double() * mean_scale
    return mean[..., None, :], level * token_scale
