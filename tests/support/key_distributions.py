"""Keys of many kinds, by the shape of a cache: what summaries of pages are tested with."""

import torch


def spread_channels(shape):
    """Channels differ in size, as those of models do: page bounds are then far from equal."""
    return torch.randn(shape) * torch.randn(shape[-1]).exp()


def heavy_channels(shape):
    return torch.randn(shape) * (3 * torch.randn(shape[-1])).exp()


def one_heavy_channel(shape):
    keys = torch.randn(shape)
    keys[..., 3] += 1000
    return keys


def changing(shape):
    """Other channels are large in the second half."""
    keys, half, middle = torch.randn(shape), shape[2] // 2, shape[3] // 2
    keys[:, :, half:, :middle] *= 100
    keys[:, :, :half, middle:] *= 100
    return keys


def identical_in_pages(shape):
    """The keys of 16 positions are all the same."""
    pages = torch.randn(*shape[:2], -(-shape[2] // 16), 1, shape[3])
    return pages.expand(-1, -1, -1, 16, -1).flatten(2, 3)[:, :, : shape[2]].clone()


DISTRIBUTIONS = {
    "normal": torch.randn,
    "spread_channels": spread_channels,
    "heavy_channels": heavy_channels,
    "one_heavy_channel": one_heavy_channel,
    "heavy_tails": lambda shape: torch.distributions.StudentT(1.0).sample(shape),
    "changing": changing,
    "constant": lambda shape: torch.full(shape, 0.7),
    "zero": torch.zeros,
    "one_sided": lambda shape: torch.rand(shape) + 5,
    "identical_in_pages": identical_in_pages,
    "denormal": lambda shape: torch.randn(shape) * 1e-40,
    "tiny": lambda shape: torch.randn(shape) * 1e-6,
    "large": lambda shape: torch.randn(shape) * 1e3,
    "huge": lambda shape: torch.randn(shape) * 3e38,
}


def make_keys(name, shape, dtype=torch.float32, seed=1):
    """Finite, though as large as the dtype goes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        keys = DISTRIBUTIONS[name](shape).to(dtype)
    return keys.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
