"""Positions of tokens on a grid."""

import math

import torch
from torch import Tensor


def sinusoidal_positions(grid: tuple[int, int, int], dim: int) -> Tensor:
    """Sines and cosines of the coordinates of a grid in raster order: a quarter of the width for time, the rest halved.

    Wavelengths run geometrically from 4 places to 4 times the axis.

    Args:
        grid: `(t, h, w)`.
        dim: Width `D`, a multiple of 16.

    Returns:
        `[t h w, D]` in [-1, 1].
    """
    if dim % 16:
        raise ValueError(f"dim={dim} must be a multiple of 16 for positions from sines and cosines (--model.dim).")
    widths = (dim // 4, dim * 3 // 8, dim * 3 // 8)
    features = []
    for axis, (size, width) in enumerate(zip(grid, widths, strict=True)):
        frequencies = torch.logspace(math.log10(math.pi / (2 * size)), math.log10(math.pi / 2), width // 2)
        angles = torch.arange(size)[:, None] * frequencies  # [size, width / 2]
        shape = [1, 1, 1, width]
        shape[axis] = size
        features.append(torch.cat([angles.sin(), angles.cos()], dim=1).view(shape).expand(*grid, width))
    return torch.cat(features, dim=-1).flatten(0, 2)
