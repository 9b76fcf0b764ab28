"""MeBT: a bidirectional transformer that is linear in the number of video tokens.

Yoo, Kim, Lee, Kim, Hong: "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
Transformers", CVPR 2023. Tokens never attend to tokens: learned latents read the visible tokens (the context), and
mask queries (the targets) read the latents. With `L` latents the cost is `O(L N)` instead of `O(N^2)`.

A block differs from a textbook pre-norm block in one point that the released weights depend on: the residual adds to
the *normalised* query, so the raw stream is discarded at every layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.blocks.attention import Attention
from models.blocks.positions import sinusoidal_positions

BlockKind = Literal["latent_enc", "latent_self", "latent_dec", "lt2l", "maskgit"]

# The stack of all six published configurations: 13 encoder blocks, 11 decoder blocks.
PUBLISHED_STACK: tuple[BlockKind, ...] = (
    *("latent_enc", "latent_self") * 6,
    "latent_enc",
    *("latent_dec", "lt2l") * 5,
    "latent_dec",
)

# The logits are the largest activation: at most so many are held at once for the loss (128 MiB in float32).
LOSS_CHUNK_LOGITS = 2**25


class MeBTBlock(nn.Module):
    """Attention and MLP of a query stream over a context stream, with the residual from the normalised query.

    Args:
        dim: Width `D`.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP as a multiple of `dim`.
        dropout: Dropout of attention weights, attention output and MLP output.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, query: Tensor, context: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Return the new query stream.

        Args:
            query: `[B, N, D]`.
            context: `[B, S, D]`; None for self-attention.
            keep: `[B, S]` bool, which tokens of the context are there; None for all.
        """
        q = self.norm1(query)
        k = q if context is None else self.norm1(context)
        x = q + self.attention(q, k, keep)
        return x + self.mlp(self.norm2(x))


class MeBT(nn.Module):
    """Logits of masked tokens given visible tokens, at any subset of the positions of a clip.

    Args:
        codebook_size: Number of video codes `K`, and of classes per token.
        num_tokens: Positions of the longest clip, `t h w` in raster order.
        dim: Width `D`.
        num_heads: Attention heads.
        num_latents: Latent bottleneck tokens `L`.
        blocks: Kind of each block. `latent_enc`: latents read the context; `latent_self`: latents read themselves;
            `latent_dec`: targets read the latents; `lt2l`: latents read themselves and the targets; `maskgit`: all
            tokens read all tokens (the quadratic baseline).
        dropout: Dropout everywhere, embeddings included.
        grid: `(t, h, w)` of the longest clip, to start the positions from sines and cosines of the three coordinates
            instead of noise: neighbours are alike from the first step, which small models learn much sooner from. None
            starts from noise, as the release does. The parameter is learned in both cases.
        init_std: Standard deviation of initial weights and embeddings: the release's 0.02 is for width 1024.
        num_classes: Classes; each is one more learned latent, beside those that all clips share. 0 as published.
        gradient_checkpointing: Keep only the blocks' inputs in training and compute the rest again going back.

    Raises:
        ValueError: If `grid` does not have `num_tokens` places.
    """

    def __init__(
        self,
        codebook_size: int,
        num_tokens: int,
        dim: int = 1024,
        num_heads: int = 16,
        num_latents: int = 256,
        blocks: Sequence[BlockKind] = PUBLISHED_STACK,
        dropout: float = 0.0,
        grid: tuple[int, int, int] | None = None,
        init_std: float = 0.02,
        num_classes: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if grid is not None and math.prod(grid) != num_tokens:
            raise ValueError(f"grid={grid} has {math.prod(grid)} places, not num_tokens={num_tokens}.")
        self.codebook_size = codebook_size
        self.num_tokens = num_tokens
        self.kinds = tuple(blocks)
        self.token_embedding = nn.Embedding(codebook_size, dim)
        self.position_embedding = nn.Parameter(torch.empty(1, num_tokens, dim))
        self.mask_embedding = nn.Parameter(torch.empty(1, 1, dim))
        self.latent_embedding = nn.Parameter(torch.empty(1, num_latents, dim))
        self.label_embedding = nn.Embedding(num_classes, dim) if num_classes else None
        self.gradient_checkpointing = gradient_checkpointing
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(MeBTBlock(dim, num_heads, dropout=dropout) for _ in self.kinds)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, codebook_size, bias=False)  # not tied to the token embedding
        self.reset_parameters(grid, init_std)

    def reset_parameters(self, grid: tuple[int, int, int] | None, init_std: float) -> None:
        """Initialise: N(0, init_std) for weights and embeddings, zero biases, LayerNorm (1, 0); positions as told."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for embedding in (self.position_embedding, self.mask_embedding, self.latent_embedding):
            nn.init.normal_(embedding, std=init_std)
        if grid is not None:
            with torch.no_grad():
                self.position_embedding.copy_(init_std * sinusoidal_positions(grid, self.mask_embedding.shape[-1]))

    def decayed_parameters(self) -> list[nn.Parameter]:
        """Parameters under weight decay: the weights of Linear layers, the head included, and nothing else."""
        names = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        return [parameter for name, parameter in self.named_parameters() if name in names]

    def forward(
        self,
        codes: Tensor,
        context: Tensor,
        targets: Tensor,
        label: Tensor | None = None,
        keep: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Predict the codes at the target positions from the codes at the context positions.

        Args:
            codes: `[B, N]` int64; read at the context positions only. `N <= num_tokens`.
            context: `[B, S]` int64 positions that are visible; `S` may be 0.
            targets: `[B, M]` int64 positions to predict.
            label: `[B]` int64 classes, for a network with classes.
            keep: `[B, S]` and `[B, M]` bool, which of these positions are meant, for samples with different numbers of
                them; None for all. What belongs to the others has no meaning.

        Returns:
            `[B, M, K]` logits.
        """
        return self.head(self.features(codes, context, targets, label, keep))

    def features(
        self,
        codes: Tensor,
        context: Tensor,
        targets: Tensor,
        label: Tensor | None = None,
        keep: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """All but the head: `[B, M, D]`; the arguments are those of `forward`.

        Raises:
            ValueError: If classes are given to a network without, or none to one with.
        """
        # Positions are gathered per sample: every sample of a batch shares S and M, but not the positions.
        positions = self.position_embedding[0]
        c = self.dropout(self.token_embedding(codes.gather(1, context)) + positions[context])  # [B, S, D]
        m = self.dropout(self.mask_embedding + positions[targets])  # [B, M, D]
        z = self.latent_embedding.expand(len(codes), -1, -1)  # [B, L, D]
        if (label is None) != (self.label_embedding is None):
            raise ValueError(f"This network has {'no' if self.label_embedding is None else 'learned'} classes.")
        if self.label_embedding is not None:
            z = torch.cat([z, self.label_embedding(label)[:, None]], dim=1)  # one latent more
        z = self.dropout(z)
        keep_c = keep_zm = keep_cm = None
        if keep is not None:
            keep_c, keep_m = keep
            keep_zm = F.pad(keep_m, (z.shape[1], 0), value=True)
            keep_cm = torch.cat([keep_c, keep_m], dim=1)
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            match kind:
                case "latent_enc":
                    z = self._run(block, z, c, keep_c)
                case "latent_self":
                    z = self._run(block, z)
                case "latent_dec":
                    m = self._run(block, m, z)
                case "lt2l":
                    z = self._run(block, z, torch.cat([z, m], dim=1), keep_zm)
                case "maskgit":
                    tokens = self._run(block, torch.cat([c, m], dim=1), None, keep_cm)
                    c, m = tokens.split([c.shape[1], m.shape[1]], dim=1)
        return self.norm(m)

    def _run(
        self, block: nn.Module, query: Tensor, context: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, query, context, keep, use_reentrant=False)
        return block(query, context, keep)

    def cross_entropy(self, features: Tensor, codes: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of codes, without holding all of their logits.

        Beyond `LOSS_CHUNK_LOGITS` logits, a part after the other is computed, and again going back: the memory does
        not grow with `M K` any more.

        Args:
            features: `[B, M, D]`, of `features`.
            codes: `[B, M]` int64 true codes.
            label_smoothing: Share of the target that is spread over all codes.

        Returns:
            `[B, M]` nats, in float32 at least.
        """

        def nll(rows: Tensor, truth: Tensor) -> Tensor:
            logits = self.head(rows)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(logits, truth, reduction="none", label_smoothing=label_smoothing)

        rows, truth = features.flatten(0, 1), codes.flatten()
        size = max(1, LOSS_CHUNK_LOGITS // self.codebook_size)
        if len(rows) <= size:
            return nll(rows, truth).view(codes.shape)
        chunks = zip(rows.split(size), truth.split(size), strict=True)
        return torch.cat([checkpoint(nll, *chunk, use_reentrant=False) for chunk in chunks]).view(codes.shape)


# Training


@dataclass(frozen=True)
class SampleMask:
    """What one sample of a batch is trained on, in tokens of the batch's window.

    Args:
        start: First token of the sample's own window.
        length: Tokens of it.
        given: How many at its beginning are context in any case.
        masked: How many of the others are masked.
    """

    start: int
    length: int
    given: int
    masked: int


@dataclass(frozen=True)
class MaskedWindow:
    """Positions to train on, within a window.

    Args:
        context: `[B, S]` int64.
        targets: `[B, M]` int64.
        mask_ratio: Masked fraction rho of the window, or of each sample's own `[B]`.
        keep: `[B, S]` and `[B, M]` bool, which of the positions are meant; None for all.
    """

    context: Tensor
    targets: Tensor
    mask_ratio: float | Tensor
    keep: tuple[Tensor, Tensor] | None


def mask_window(noise: Tensor, masks: Sequence[SampleMask], budget: int | None = None) -> MaskedWindow:
    """Split windows into context and targets, at random.

    A sample's tokens are put in random order; those given come first. The last ones are masked, and of the masked ones
    the last `budget` are the targets, as in the release; the others are neither seen nor predicted.

    Args:
        noise: `[B, N']` independent draws from [0, 1).
        masks: What is asked for, one for each sample.
        budget: Targets of a sample, at most; None for all that is masked.

    Returns:
        The positions. Samples that differ in numbers are padded.
    """
    position = torch.arange(noise.shape[1], device=noise.device)

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values).to(noise.device, non_blocking=True)[:, None]  # from the host: nothing waits

    start, end = column([mask.start for mask in masks]), column([mask.start + mask.length for mask in masks])
    given_end = column([mask.start + mask.given for mask in masks])
    is_given, is_outside = (position >= start) & (position < given_end), (position < start) | (position >= end)
    order = (noise - 2.0 * is_given + 2.0 * is_outside).argsort(dim=1)  # given, random, outside

    num_context = [mask.length - mask.masked for mask in masks]
    num_targets = [min(mask.masked, budget or mask.masked) for mask in masks]
    first_target = column([mask.length - count for mask, count in zip(masks, num_targets, strict=True)])
    place = first_target + position[: max(num_targets)]
    context, targets = order[:, : max(num_context)], order.gather(1, place.clamp(max=noise.shape[1] - 1))
    ratios = [mask.masked / mask.length for mask in masks]
    if len(set(masks)) == 1:
        return MaskedWindow(context, targets, ratios[0], None)
    keep = (position[: max(num_context)] < column(num_context), position[: max(num_targets)] < column(num_targets))
    return MaskedWindow(context, targets, torch.tensor(ratios).to(noise.device, non_blocking=True), keep)


def masked_token_loss(nll: Tensor, window: MaskedWindow, rho_power: float = 1.0) -> Tensor:
    """Reduce the cross-entropies of the masked tokens, weighted by how much was masked.

    MeBT, Eq. 3 is the plain sum over masked tokens (`rho_power=0`, here per token of the window). The released
    configurations divide by the masked fraction as well (`rho_power=1`): the mean over masked tokens. Where a budget
    leaves out some of them, the others stand for all.

    Args:
        nll: `[B, M]` cross-entropy of each target.
        window: Says which targets are meant, and the masked fraction rho.
        rho_power: Exponent alpha of the fraction: the mean over targets is multiplied by `rho^(1 - alpha)`.

    Returns:
        Scalar, nats per token; every sample counts alike.
    """
    return (target_mean(nll, window) * window.mask_ratio ** (1.0 - rho_power)).mean()


def target_mean(nll: Tensor, window: MaskedWindow) -> Tensor:
    """Mean `[B]` of `[B, M]` over each sample's targets."""
    if window.keep is None:
        return nll.mean(dim=1)
    is_target = window.keep[1]
    return nll.where(is_target, 0.0).sum(dim=1) / is_target.sum(dim=1)
