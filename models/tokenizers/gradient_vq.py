"""The codebook of MAGVIT: learned by gradient, spread by an entropy loss."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.tokenizers.quantizers import (
    Encoded,
    Quantizer,
    batch_statistics,
    entropy_of_mean,
    nearest_entries,
    offered_entries,
    straight_through,
)


class GradientVectorQuantizer(Quantizer):
    r"""Nearest codebook entry, the codebook being a parameter.

    With e the entry nearest to z, sg the stop-gradient and p(k|z) the softmax over -|z - e_k|^2 / temperature:

        L = commitment_weight mean |sg(e) - z|^2 + codebook_weight mean |e - sg(z)|^2 + entropy_weight L_ent,
        L_ent = mean_z H[p(.|z)] - H[mean_z p(.|z)]

    Each vector is to choose clearly, all of them together evenly. The mean over z is taken over all ranks; the released
    code takes each device's own. Defaults are MAGVIT's. The entropy loss keeps codes in use; entries restart by
    `revive` alone.

    Args:
        codebook_size: Number of entries K.
        dim: Width D of an entry.
        commitment_weight: Weight of the vectors' way to their entries.
        codebook_weight: Weight of the entries' way to their vectors.
        entropy_weight: Weight of the entropy loss; 0 does not compute it. It takes memory for n x K probabilities.
        temperature: How sharply p(k|z) prefers the nearest entry.
        epsilon: Added to the mean probability within the logarithm, as released.
    """

    codebook_size: int

    def __init__(
        self,
        codebook_size: int = 1024,
        dim: int = 256,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        entropy_weight: float = 0.1,
        temperature: float = 0.01,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.dim = dim
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.entropy_weight = entropy_weight
        self.temperature = temperature
        self.epsilon = epsilon
        limit = (3 / codebook_size) ** 0.5  # variance 1 / K: the released initialiser takes K for the fan-in
        self.embeddings = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-limit, limit))

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Encoded:
        """Quantise `z` `[B, D, t, h, w]` to the nearest entries.

        Args:
            z: any floating type; computed in float32 at least, also under autocast.
            generator: not needed: nothing is random.

        Returns:
            Latents (with the gradient of the identity), codes, `commitment`, `codebook` and in training `entropy`, the
            batch's `perplexity` and `usage`, and in training the two entropies in nats.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            vectors = rearrange(z, "b d t h w -> (b t h w) d")  # [n, D]
            codes = nearest_entries(vectors, self.embeddings)
            grid = codes.view(z.shape[0], *z.shape[2:])  # [B, t, h, w]
            quantised = self.codes_to_latents(grid).to(z.dtype)  # [B, D, t, h, w]
            losses = {
                "commitment": self.commitment_weight * F.mse_loss(z, quantised.detach()),
                "codebook": self.codebook_weight * F.mse_loss(quantised, z.detach()),
            }
            statistics = batch_statistics(codes, self.codebook_size, self.training)
            if self.training and self.entropy_weight > 0:
                of_each, of_all = self._entropies(vectors)
                losses["entropy"] = self.entropy_weight * (of_each - of_all)
                statistics |= {"entropy_of_each": of_each.detach(), "entropy_of_all": of_all.detach()}
            return Encoded(straight_through(z, quantised), grid, losses, statistics)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Look up codes `[B, t, h, w]` as latents `[B, D, t, h, w]`."""
        return rearrange(F.embedding(codes, self.embeddings), "b t h w d -> b d t h w")

    def latents_to_codes(self, latents: Tensor) -> Tensor:
        """Nearest entries of latents `[B, D, t, h, w]`, as codes `[B, t, h, w]`."""
        codes = nearest_entries(rearrange(latents, "b d t h w -> (b t h w) d"), self.embeddings)
        return codes.view(latents.shape[0], *latents.shape[2:])

    @torch.no_grad()
    def revive(self, dead: Tensor, z: Tensor, generator: torch.Generator | None = None) -> None:
        """Give entries a second life as vectors of a batch.

        Args:
            dead: `[K]` bool, the entries.
            z: `[B, D, t, h, w]`, a batch; those of all ranks are drawn from.
            generator: draws the vectors, equal on all ranks. None draws with a fixed key.
        """
        vectors = rearrange(z, "b d t h w -> (b t h w) d")
        fresh = offered_entries(vectors, self.codebook_size, generator).to(self.embeddings.dtype)
        self.embeddings.copy_(torch.where(dead[:, None], fresh, self.embeddings))

    def _entropies(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy of p(.|z), and entropy of the mean, of vectors `[n, D]`; gradients reach the codebook too."""
        norms = self.embeddings.square().sum(1)
        # -|z - e|^2 without |z|^2, of which the softmax sees nothing
        logits = (2 * vectors @ self.embeddings.T - norms) / self.temperature  # [n, K]
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        return -(p * log_p).sum(1).mean(), entropy_of_mean(p.mean(0), self.epsilon)

    def extra_repr(self) -> str:
        """Name the size."""
        return f"codebook_size={self.codebook_size}, dim={self.dim}"
