"""Tokenizers that do not quantise: real-valued latents for diffusion."""

import torch
from torch import Tensor

from models.blocks.distributed import rank, world_size
from models.random import keyed_generator
from models.tokenizers.quantizers import Encoded, Quantizer


class RealQuantizer(Quantizer):
    """One that does not quantise."""

    codebook_size = None

    def unrounded(self) -> Quantizer:
        """Itself."""
        return self


class ContinuousLatents(RealQuantizer):
    """The encoder's projection to `dim` channels as it is, as in W.A.L.T: no codes, no loss, no noise.

    Args:
        dim: Channels of the latents; W.A.L.T has 8 and compares 4, 16 and 32 (Table 3f).
    """

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Encoded:
        """Hand on `z` `[B, D, t, h, w]`; statistics: the standard deviation of its values, `latent_std`."""
        return Encoded(
            latents=z, codes=None, losses={}, statistics={"latent_std": z.detach().float().std(correction=0)}
        )


class GaussianLatents(RealQuantizer):
    """A normal distribution for each latent, drawn towards the standard one (the KL variant of latent diffusion).

    In training the latents are drawn from it, in evaluation they are its mean.

    Args:
        dim: Channels of the latents; the encoder gives twice as many, means and logarithms of variances.
        kl_weight: Weight of the divergence in nats, summed over a clip's latents and averaged over clips.
    """

    def __init__(self, dim: int = 8, kl_weight: float = 1e-6) -> None:
        super().__init__()
        self.dim = dim
        self.kl_weight = kl_weight

    @property
    def in_dim(self) -> int:
        """Means and logarithms of variances."""
        return 2 * self.dim

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Encoded:
        """Draw latents.

        Args:
            z: `[B, 2 D, t, h, w]`, any floating type; computed in float32 at least, also under autocast.
            generator: draws the noise of all ranks' batches, equal on all; each takes its rows. None draws with a fixed
                key.

        Returns:
            Latents `[B, D, t, h, w]`, no codes, the loss `kl`, and `latent_std`.
        """
        with torch.autocast(z.device.type, enabled=False):
            mean, log_variance = z.to(torch.promote_types(z.dtype, torch.float32)).chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            latents = mean
            if self.training:
                latents = mean + (log_variance / 2).exp() * self._noise(mean, generator or keyed_generator(0))
            divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)  # [B]
            return Encoded(
                latents=latents,
                codes=None,
                losses={"kl": self.kl_weight * divergence.mean()},
                statistics={"latent_std": latents.detach().std(correction=0)},
            )

    def _noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        shape = (len(like) * world_size(), *like.shape[1:])
        noise = torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype)
        return noise[len(like) * rank() :][: len(like)].to(like.device, non_blocking=True)
