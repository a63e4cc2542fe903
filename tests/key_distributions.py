"""Keys of many kinds, by the shape of a cache: what summaries of pages are tested with."""

import torch

LENGTH = 333


def heavy_channels(shape):
    return torch.randn(shape) * (3 * torch.randn(shape[-1])).exp()


def one_heavy_channel(shape):
    keys = torch.randn(shape)
    keys[..., 3] = 1000 + keys[..., 3]
    return keys


def changing(shape):
    """Other channels are large in the second half."""
    keys = torch.randn(shape)
    keys[:, :, LENGTH // 2 :, : shape[-1] // 2] *= 100
    keys[:, :, : LENGTH // 2, shape[-1] // 2 :] *= 100
    return keys


DISTRIBUTIONS = {
    "normal": torch.randn,
    "heavy_channels": heavy_channels,
    "one_heavy_channel": one_heavy_channel,
    "heavy_tails": lambda shape: torch.distributions.StudentT(1.0).sample(shape),
    "changing": changing,
    "constant": lambda shape: torch.full(shape, 0.7),
    "zero": torch.zeros,
    "one_sided": lambda shape: torch.rand(shape) + 5,
    "tiny": lambda shape: torch.randn(shape) * 1e-6,
    "large": lambda shape: torch.randn(shape) * 1e3,
}
