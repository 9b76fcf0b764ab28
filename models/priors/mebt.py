"""MeBT: a bidirectional transformer that is linear in the number of video tokens.

Yoo, Kim, Lee, Kim, Hong: "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
Transformers", CVPR 2023. Tokens never attend to tokens: learned latents read the visible tokens (the context), and
mask queries (the targets) read the latents. With `L` latents the cost is `O(L N)` instead of `O(N^2)`.

A block differs from a textbook pre-norm block in one point that the released weights depend on: the residual adds to
the *normalised* query, so the raw stream is discarded at every layer.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

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

    def forward(self, query: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the new query stream `[B, N, D]`; without a context `[B, S, D]` the block is self-attention."""
        q = self.norm1(query)
        k = q if context is None else self.norm1(context)
        x = q + self.attention(q, k)
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

    def forward(self, codes: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Predict the codes at the target positions from the codes at the context positions.

        Args:
            codes: `[B, N]` int64; read at the context positions only. `N <= num_tokens`.
            context: `[B, S]` int64 positions that are visible; `S` may be 0.
            targets: `[B, M]` int64 positions to predict.

        Returns:
            `[B, M, K]` logits.
        """
        # Positions are gathered per sample: every sample of a batch shares S and M, but not the positions.
        positions = self.position_embedding[0]
        c = self.dropout(self.token_embedding(codes.gather(1, context)) + positions[context])  # [B, S, D]
        m = self.dropout(self.mask_embedding + positions[targets])  # [B, M, D]
        z = self.dropout(self.latent_embedding.expand(len(codes), -1, -1))  # [B, L, D]
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            match kind:
                case "latent_enc":
                    z = block(z, c)
                case "latent_self":
                    z = block(z)
                case "latent_dec":
                    m = block(m, z)
                case "lt2l":
                    z = block(z, torch.cat([z, m], dim=1))
                case "maskgit":
                    tokens = block(torch.cat([c, m], dim=1))
                    c, m = tokens.split([c.shape[1], m.shape[1]], dim=1)
        return self.head(self.norm(m))


def masked_token_loss(nll: Tensor, num_window_tokens: int, rho_power: float = 1.0) -> Tensor:
    """Reduce the cross-entropies of the masked tokens, weighted by how much was masked.

    MeBT, Eq. 3 is the plain sum over masked tokens (`rho_power=0`, up to the window's size). The released
    configurations divide by the masked fraction as well (`rho_power=1`): the mean over masked tokens.

    Args:
        nll: `[B, M]` cross-entropy of each masked token.
        num_window_tokens: Tokens of the window, context and targets together.
        rho_power: Exponent of the masked fraction `M / num_window_tokens`.

    Returns:
        Scalar, nats per token.

    Raises:
        ValueError: If nothing is masked, or more than the window holds.
    """
    num_masked = nll.shape[1]
    if not 0 < num_masked <= num_window_tokens:
        raise ValueError(
            f"{num_masked} masked tokens do not fit a window of {num_window_tokens}: expected at least one."
        )
    rho = num_masked / num_window_tokens
    return nll.sum() / (len(nll) * num_window_tokens * rho**rho_power)
