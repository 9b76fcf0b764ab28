"""The collectives that networks need. Without a process group, or with one process, each returns its input."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a tensor over all ranks, differentiably.

    Every rank's loss depends on the sum, so the gradient of `x` is the sum of all ranks' gradients.

    Args:
        x: any shape, the same on all ranks.

    Returns:
        The sum, the same on all ranks.
    """
    return _SumOverRanks.apply(x) if world_size() > 1 else x


def gather_rows(x: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in the order of the ranks. Not differentiable.

    Args:
        x: `[n, ...]`, the same shape on all ranks.

    Returns:
        `[n * world_size, ...]`, the same on all ranks.
    """
    if world_size() == 1:
        return x
    rows = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(rows, x.detach().contiguous())
    return rows


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradients[0])  # by itself, so that a gradient penalty can differentiate it again
