"""Finite scalar quantisation (Mentzer et al., 2023): each channel is rounded to a few levels, the code is their tuple.

There is no codebook to learn, to collapse or to keep in step over ranks, and in the paper no loss beside the
reconstruction.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from models.tokenizers.continuous import RealQuantizer
from models.tokenizers.quantizers import Encoded, Quantizer, batch_statistics, straight_through


class FiniteScalarQuantizer(Quantizer):
    """Rounds channel i to `levels[i]` evenly spaced values in [-1, 1].

    A hyperbolic tangent bounds the channel first. With an even number L of levels the values are -1 + 2 i / L, i < L,
    which lie one half step below the middle: 0 is one of them (section 3.1; the shift of z makes 0 stay 0).
    Codes count the first channel fastest. The paper's levels for 2^8 to 2^16 codes (its Table 1): 8 6 5; 8 5 5 5;
    7 5 5 5 5; 8 8 8 6 5; 8 8 8 5 5 5.

    Args:
        levels: Number of values of each channel, at least 2; their product is the number of codes.
        commitment_weight: Weight of the mean squared distance to the levels, in units of one. The paper has none (our
            choice): with it, what hardly differs gets the same code more often, which a prior learns sooner.
    """

    codebook_size: int
    num_levels: Tensor
    half_levels: Tensor
    strides: Tensor

    def __init__(self, levels: Sequence[int] = (8, 8, 8, 5, 5, 5), commitment_weight: float = 0.0) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"levels={list(levels)}: expected at least 2 values for each channel, such as 8 5 5 5")
        self.levels = tuple(levels)
        self.commitment_weight = commitment_weight
        self.dim = len(self.levels)
        self.codebook_size = math.prod(self.levels)
        strides = [math.prod(self.levels[:i]) for i in range(self.dim)]
        # the levels below the middle one, floating: latents take their type from it
        halves = [float(count // 2) for count in self.levels]
        for name, values in (("num_levels", self.levels), ("half_levels", halves), ("strides", strides)):
            self.register_buffer(name, torch.tensor(values), persistent=False)  # [D]

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Encoded:
        """Quantise `z` `[B, D, t, h, w]`.

        Args:
            z: any floating type; computed in float32 at least, also under autocast.
            generator: not needed: nothing is random.

        Returns:
            Latents (rounding has the gradient of the identity, the bound its own), codes, the loss `commitment` if it
            has a weight, and the batch's `perplexity` and `usage`.
        """
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bound(z)  # [B, t, h, w, D], in units of one level
            levels = bounded.detach().round()
            codes = self._codes(levels)
            latents = straight_through(bounded, levels) / self.half_levels
            distance = (bounded - levels).square().mean()
            return Encoded(
                latents=rearrange(latents, "b t h w d -> b d t h w"),
                codes=codes,
                losses={"commitment": self.commitment_weight * distance} if self.commitment_weight > 0 else {},
                statistics=batch_statistics(codes, self.codebook_size, self.training),
            )

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Look up codes `[B, t, h, w]` as latents `[B, D, t, h, w]`."""
        levels = codes[..., None] // self.strides % self.num_levels - self.half_levels  # [B, t, h, w, D]
        return rearrange(levels / self.half_levels, "b t h w d -> b d t h w")

    def latents_to_codes(self, latents: Tensor) -> Tensor:
        """Codes `[B, t, h, w]` of latents `[B, D, t, h, w]`; ones between the levels go to the nearest."""
        levels = (rearrange(latents, "b d t h w -> b t h w d") * self.half_levels).round()
        return self._codes(torch.clamp(levels, min=-self.half_levels, max=self.num_levels - 1 - self.half_levels))

    def bound(self, z: Tensor) -> Tensor:
        """Squash `z` `[B, D, t, h, w]` to just beyond the outermost levels, -(L // 2) and (L - 1) // 2.

        Returns:
            `[B, t, h, w, D]` in float32 at least, in units of one level.
        """
        z = rearrange(z.to(torch.promote_types(z.dtype, torch.float32)), "b d t h w -> b t h w d")
        reach = (self.num_levels - 1) * (1 + 1e-3) / 2  # a little more, so that tanh need not reach 1 to round there
        offset = (self.num_levels % 2 == 0) * 0.5
        return torch.tanh(z + torch.atanh(offset / reach)) * reach - offset

    def unrounded(self) -> Quantizer:
        """What is rounded, as it is before that."""
        return BoundedLatents(self.levels)

    def _codes(self, levels: Tensor) -> Tensor:
        """Number integer levels `[..., D]`, 0 being the middle one, as `[...]` int64."""
        return ((levels + self.half_levels).long() * self.strides).sum(-1)

    def extra_repr(self) -> str:
        """Name the size."""
        return f"levels={self.levels}, codebook_size={self.codebook_size}"


class BoundedLatents(RealQuantizer):
    """What finite scalar quantisation would round, as it is: each channel within half a step of the nearest level.

    With the networks of a tokenizer that was trained to round: one tokenizer for models of codes and of real values.

    Args:
        levels: Number of values that each channel would be rounded to.
    """

    def __init__(self, levels: Sequence[int] = (8, 8, 8, 5, 5, 5)) -> None:
        super().__init__()
        self.rounding = FiniteScalarQuantizer(levels)
        self.dim = self.rounding.dim

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Encoded:
        """Bound `z` `[B, D, t, h, w]`; statistics: the standard deviation of the latents' values, `latent_std`."""
        with torch.autocast(z.device.type, enabled=False):
            latents = rearrange(self.rounding.bound(z) / self.rounding.half_levels, "b t h w d -> b d t h w")
            return Encoded(latents, None, losses={}, statistics={"latent_std": latents.detach().std(correction=0)})
