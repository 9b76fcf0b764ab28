"""From an encoder's features to latents, and to codes where there are any; the codebook of VQ-VAE."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.blocks.distributed import gather_rows, sum_over_ranks, world_size
from models.random import keyed_generator

# Distances computed at once: 64 MiB of float32, whatever the codebook and the clip.
_MAX_DISTANCES = 2**24


@dataclass
class Encoded:
    """What a tokenizer makes of a video.

    Args:
        latents: `[B, D, t, h, w]`, exactly what the tokenizer's `decode` takes.
        codes: `[B, t, h, w]` int64 in `[0, K)`; None from a tokenizer that does not quantise.
        losses: scalars to be added to the reconstruction loss, weighted already.
        statistics: scalars to be logged.
    """

    latents: Tensor
    codes: Tensor | None
    losses: dict[str, Tensor]
    statistics: dict[str, Tensor]


class Quantizer(nn.Module, ABC):
    """What stands between encoder and decoder.

    Attributes:
        dim: Channels D of the latents.
        codebook_size: Number of codes K; None for a continuous one, which has none.
    """

    dim: int
    codebook_size: int | None

    @property
    def in_dim(self) -> int:
        """Channels that `forward` takes: those of the latents, unless a subclass says otherwise."""
        return self.dim

    @abstractmethod
    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Encoded:
        """Quantise.

        Args:
            z: `[B, in_dim, t, h, w]`, any floating type; computed in float32 at least, also under autocast.
            generator: for the random choices of training calls, equal on all ranks. None draws with a fixed key.

        Returns:
            Latents, codes, weighted loss terms and statistics. In training the statistics are those of all ranks.
        """

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Turn codes `[B, t, h, w]` into latents `[B, D, t, h, w]`.

        Raises:
            ValueError: if there are no codes.
        """
        raise ValueError(f"{type(self).__name__} is continuous: no codes stand for its latents.")

    def latents_to_codes(self, latents: Tensor) -> Tensor:
        """Turn latents `[B, D, t, h, w]`, or what lies closest to some, into codes `[B, t, h, w]`.

        Raises:
            ValueError: if there are no codes.
        """
        raise ValueError(f"{type(self).__name__} is continuous: its latents have no codes.")

    def unrounded(self) -> "Quantizer":
        """The same without the choice of a code: its latents are real-valued, and the same decoder takes them.

        Raises:
            ValueError: if the decoder has learned from nothing of the kind.
        """
        raise ValueError(
            f"The decoder of a {type(self).__name__} has learned from its entries alone. Give a tokenizer with finite "
            "scalar quantisation, or a continuous one."
        )


class VectorQuantizer(Quantizer):
    r"""Nearest codebook entry, the codebook being a moving average of the vectors that chose it.

    The codebook holds no parameters (VQ-VAE, appendix A.1). With $n_j$ vectors of sum $s_j$ at entry $j$ and decay $g$:

        N_j <- g N_j + (1 - g) n_j        z_j <- g z_j + (1 - g) s_j        e_j <- z_j / w_j,
        w_j = (N_j + 1e-7) / (sum N + K 1e-7) * sum N

    The first training call makes the codebook from the vectors of all ranks. Whether that has happened is part of the
    state dict, so a resumed run keeps its codebook. Counts, sums and random choices are the same on all ranks.

    Args:
        codebook_size: Number of entries K.
        dim: Width D of an entry.
        decay: Decay of the moving averages.
        commitment_weight: Weight of the commitment loss, mean |z - sg(e)|^2.
        restart_threshold: An entry whose moving count falls below this is replaced by a vector of the batch; with 0
            none is. A fresh entry counts as 1, so a threshold of 1 gives it one step to find use, and one of 0.5 gives
            it log(0.5) / log(decay) steps, 69 by default.
        released_restart: Restart as TATS' released code does: the entry alone, which the next moving average
            overwrites, not its averages.
    """

    codebook_size: int
    embeddings: Tensor
    N: Tensor
    z_avg: Tensor
    initialized: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        restart_threshold: float = 0.0,
        released_restart: bool = False,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.dim = dim
        self.decay = decay
        self.commitment_weight = commitment_weight
        self.restart_threshold = restart_threshold
        self.released_restart = released_restart
        self.register_buffer("embeddings", torch.randn(codebook_size, dim))
        self.register_buffer("N", torch.zeros(codebook_size))
        self.register_buffer("z_avg", self.embeddings.clone())
        self.register_buffer("initialized", torch.tensor(False))
        self._is_initialized: bool | None = None  # `initialized`, read from the device once

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Encoded:
        """Quantise `z` `[B, D, t, h, w]` to the nearest entries.

        Args:
            z: any floating type; distances are computed in float32 at least, also under autocast.
            generator: draws the vectors that make or restart entries, on training calls; equal on all ranks. None draws
                with a fixed key.

        Returns:
            Latents (with the gradient of the identity), codes, `commitment` and the batch's `perplexity` and `usage`
            (fraction of entries in use). In training these count all ranks' vectors.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            vectors = rearrange(z.detach(), "b d t h w -> (b t h w) d")  # [n, D]
            if self.training:
                self._initialize_once(vectors, generator)
            codes = nearest_entries(vectors, self.embeddings)  # [n]
            grid = codes.view(z.shape[0], *z.shape[2:])  # [B, t, h, w]
            quantised = self.codes_to_latents(grid).to(z.dtype)  # [B, D, t, h, w], looked up before the update
            counts = code_counts(codes, self.codebook_size).to(z.dtype)  # [K]
            if self.training:
                counts = sum_over_ranks(counts)
                self._update(vectors, codes, counts, generator)
            return Encoded(
                latents=straight_through(z, quantised),
                codes=grid,
                losses={"commitment": self.commitment_weight * F.mse_loss(z, quantised)},
                statistics=usage_statistics(counts),
            )

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Look up codes `[B, t, h, w]` as latents `[B, D, t, h, w]`."""
        return rearrange(F.embedding(codes, self.embeddings), "b t h w d -> b d t h w")

    def latents_to_codes(self, latents: Tensor) -> Tensor:
        """Nearest entries of latents `[B, D, t, h, w]`, as codes `[B, t, h, w]`."""
        codes = nearest_entries(rearrange(latents, "b d t h w -> (b t h w) d"), self.embeddings)
        return codes.view(latents.shape[0], *latents.shape[2:])

    @torch.no_grad()
    def _initialize_once(self, vectors: Tensor, generator: torch.Generator | None) -> None:
        if self._is_initialized is None:
            self._is_initialized = bool(self.initialized)
        if self._is_initialized:
            return
        offered = offered_entries(vectors, self.codebook_size, generator)
        self.embeddings.copy_(offered)
        self.z_avg.copy_(offered)
        self.N.fill_(1)
        self.initialized.fill_(True)
        self._is_initialized = True

    @torch.no_grad()
    def _update(self, vectors: Tensor, codes: Tensor, counts: Tensor, generator: torch.Generator | None) -> None:
        sums = vectors.new_zeros(self.codebook_size, self.dim).index_add_(0, codes, vectors)
        self.N.lerp_(counts.to(self.N.dtype), 1 - self.decay)
        self.z_avg.lerp_(sum_over_ranks(sums).to(self.z_avg.dtype), 1 - self.decay)
        total = self.N.sum()
        weights = (self.N + 1e-7) / (total + self.codebook_size * 1e-7) * total  # [K]
        self.embeddings.copy_(self.z_avg / weights[:, None])
        if self.restart_threshold > 0:
            dead = self.restart_threshold > self.N  # [K]
            self._restart(dead, vectors, generator, with_averages=not self.released_restart)

    @torch.no_grad()
    def revive(self, dead: Tensor, z: Tensor, generator: torch.Generator | None = None) -> None:
        """Give entries a second life as vectors of a batch.

        Args:
            dead: `[K]` bool, the entries.
            z: `[B, D, t, h, w]`, a batch; those of all ranks are drawn from.
            generator: as for `forward`.
        """
        self._restart(dead, rearrange(z, "b d t h w -> (b t h w) d"), generator, with_averages=True)

    def _restart(self, dead: Tensor, vectors: Tensor, generator: torch.Generator | None, with_averages: bool) -> None:
        fresh = offered_entries(vectors, self.codebook_size, generator).to(self.embeddings.dtype)
        self.embeddings.copy_(torch.where(dead[:, None], fresh, self.embeddings))
        if with_averages:
            self.z_avg.copy_(torch.where(dead[:, None], fresh, self.z_avg))
            self.N.masked_fill_(dead, 1)

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self._is_initialized = None

    def extra_repr(self) -> str:
        """Name the size."""
        return f"codebook_size={self.codebook_size}, dim={self.dim}, restart_threshold={self.restart_threshold}"


@torch.no_grad()
def nearest_entries(vectors: Tensor, embeddings: Tensor) -> Tensor:
    """For each vector `[n, D]` the nearest row of `embeddings` `[K, D]`, `[n]` int64; the first of equals."""
    embeddings = embeddings.to(vectors.dtype)
    norms = embeddings.square().sum(1)  # [K]
    chunks = vectors.split(max(1, _MAX_DISTANCES // len(embeddings)))
    # |z - e|^2 without |z|^2, which does not depend on the code
    return torch.cat([torch.addmm(norms, chunk, embeddings.T, alpha=-2).argmin(1) for chunk in chunks])


def offered_entries(vectors: Tensor, codebook_size: int, generator: torch.Generator | None) -> Tensor:
    """Draw one vector `[K, D]` for each entry from those `[n, D]` of all ranks, repeated with noise if too few."""
    generator = generator or keyed_generator(0)
    vectors = gather_rows(vectors)
    if len(vectors) < codebook_size:
        vectors = vectors.repeat(math.ceil(codebook_size / len(vectors)), 1)
        noise = torch.randn(vectors.shape, generator=generator, device=generator.device, dtype=vectors.dtype)
        vectors = vectors + noise.to(vectors.device) * 0.01 / math.sqrt(vectors.shape[1])
    chosen = torch.randperm(len(vectors), generator=generator, device=generator.device)[:codebook_size]
    return vectors[chosen.to(vectors.device, non_blocking=True)]


def entropy_of_mean(probabilities: Tensor, epsilon: float = 0.0) -> Tensor:
    """Entropy in nats of the distribution that results from averaging over the ranks.

    Every rank's entropy of its own would reward that each uses all codes. The average is differentiable.

    Args:
        probabilities: `[..., K]`, this rank's mean; all ranks have batches of one size.
        epsilon: added within the logarithm. MAGVIT's 1e-5 lowers the entropy visibly once K is beyond 2^14: it cannot
            exceed 11.5.

    Returns:
        `[...]`.
    """
    mean = sum_over_ranks(probabilities) / world_size()
    tiny = torch.finfo(mean.dtype).tiny  # p log p is 0 at 0, but its gradient is not finite
    return -(mean * (mean + epsilon).clamp(min=tiny).log()).sum(-1)


def straight_through(z: Tensor, quantised: Tensor) -> Tensor:
    """Return `quantised`, with the gradient of the identity on `z`."""
    return quantised.detach() + (z - z.detach())  # z - z is exactly 0, its gradient 1


def batch_statistics(codes: Tensor, codebook_size: int, training: bool) -> dict[str, Tensor]:
    """`usage_statistics` of a batch's codes; in training of all ranks' batches."""
    counts = code_counts(codes, codebook_size).float()
    return usage_statistics(sum_over_ranks(counts) if training else counts)


def code_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """Count how often each code occurs: `[K]` int64. Unlike `torch.bincount`, it does not wait for the GPU."""
    counts = torch.zeros(codebook_size, dtype=torch.int64, device=codes.device)
    return counts.scatter_add_(0, codes.flatten(), torch.ones_like(codes.flatten()))


def usage_statistics(counts: Tensor) -> dict[str, Tensor]:
    """Summarise counts `[K]`: `perplexity`, the exponential of the codes' entropy, and `usage`, the fraction in use."""
    counts = counts if counts.is_floating_point() else counts.float()
    probabilities = counts / counts.sum()
    return {
        "perplexity": torch.special.entr(probabilities).sum().exp(),
        "usage": (counts > 0).to(counts.dtype).mean(),
    }
