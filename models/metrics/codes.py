"""What counting alone knows about codes: the baselines that a learned prior has to beat."""

import torch
from torch import Tensor


def entropy(counts: Tensor) -> Tensor:
    """Entropy in nats of the distribution that the counts `[...]` are of; float64."""
    counts = counts[counts > 0].double()
    return counts.sum().log() - (counts * counts.log()).sum() / counts.sum()


def perplexity(codes: Tensor, codebook_size: int) -> Tensor:
    """Exponential of the entropy of the code histogram: how many codes are in use, evenly counted.

    Args:
        codes: int64, any shape, in `[0, codebook_size)`.
        codebook_size: Number of codes.
    """
    return entropy(torch.bincount(codes.flatten(), minlength=codebook_size)).exp()


def conditional_entropy(codes: Tensor, codebook_size: int) -> Tensor:
    """Entropy in nats of a code given the one at the same place in the previous latent frame.

    The plain plug-in estimate from the counts of pairs. It is biased downwards, the more so the fewer the pairs: a
    model that is below it is below the true value.

    Args:
        codes: `[B, t, h, w]` int64 in `[0, codebook_size)`; `t >= 2`.
        codebook_size: Number of codes.
    """
    previous, current = codes[:, :-1].flatten(), codes[:, 1:].flatten()
    pairs = torch.bincount(previous * codebook_size + current, minlength=codebook_size**2)
    return entropy(pairs) - entropy(torch.bincount(previous, minlength=codebook_size))
