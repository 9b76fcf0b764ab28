"""TATS: a transformer over the codes of a video, one token after the other.

Ge, Hayes, Yang, Yin, Pang, Jacobs, Huang, Parikh: "Long Video Generation with Time-Agnostic VQGAN and Time-Sensitive
Transformer", ECCV 2022. A sequence is `C` condition tokens and `N = t h w` video tokens in raster order,

    [c_1 .. c_C, z_1 + V_c .. z_N + V_c],

in one vocabulary of `V_c` condition ids and `V_z` video codes. The input leaves out the last token, so the block has
`C + N - 1` positions; the output at position `C - 1 + i` predicts `z_{i + 1}`. Without a condition there is one start
token, id 0, which shares its embedding with video code 0.

The same network with another mask fills the latent frames between two known ones (section 3.3 of the paper).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from models.blocks.causal import CausalSelfAttention, FewRowsLinear, KVCache
from models.blocks.positions import sinusoidal_positions

AttentionMask = Literal["causal", "open_boundaries", "closed_boundaries"]


def attention_mask(kind: AttentionMask, block_size: int, condition_length: int, frame_tokens: int) -> Tensor:
    """Which position (row) sees which (column).

    The last latent frame but its final token, which is never an input, lies at the end of the block; condition and
    first frame lie at its beginning. These are the boundaries.

    - `causal`, variant (a) of the paper's figure: a position sees itself and what came before.
    - `open_boundaries`, variant (b): besides that, every position sees both boundary frames. The last frame also sees
      the frames between, which are not known yet when it is given. (The exact shape of this variant is our reading.)
    - `closed_boundaries`, variant (c), what TATS trains: boundary positions see boundary positions only.

    Args:
        kind: Variant.
        block_size: Positions `C + N - 1`.
        condition_length: Condition tokens `C`.
        frame_tokens: Tokens `F` of a latent frame.

    Returns:
        `[block_size, block_size]` bool.
    """
    position = torch.arange(block_size)
    is_before = position <= position[:, None]
    if kind == "causal":
        return is_before
    is_boundary = (position < condition_length + frame_tokens) | (position > block_size - frame_tokens)
    if kind == "open_boundaries":
        return is_before | is_boundary
    return torch.where(is_boundary[:, None], is_boundary, is_before | is_boundary)


class TATSBlock(nn.Module):
    """Pre-norm attention and MLP on a residual stream.

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
        self.attention = CausalSelfAttention(dim, num_heads, dropout)
        self.mlp = nn.Sequential(
            FewRowsLinear(dim, mlp_ratio * dim), nn.GELU(), FewRowsLinear(mlp_ratio * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """Return the new stream `[B, N, D]`; the arguments are those of the attention."""
        x = x + self.attention(self.norm1(x), mask, cache, layer)
        return x + self.mlp(self.norm2(x))


class TATS(nn.Module):
    """Logits of the next token, for a whole sequence or, with a cache, for one that grows. Defaults: TATS-base.

    Args:
        codebook_size: Number of video codes `V_z`.
        grid: `(t, h, w)` latent frames, rows and columns of a clip; `N = t h w`.
        dim: Width `D`.
        depth: Blocks.
        num_heads: Attention heads.
        condition_size: Number of condition ids `V_c`: the classes, the text's or the audio's vocabulary; 0 for none.
        condition_length: Condition tokens `C`: 1 for a class or none, 256 for text.
        mask: See `attention_mask`; anything but `causal` fills the frames between the first and the last.
        dropout: Dropout everywhere, embeddings included.
        block_size: Positions, if more than the `C + N - 1` that are needed.
        position_init: `zeros` as published, or `sinusoidal`: neighbours on the grid are alike from the first step,
            which small models learn much sooner from. The parameter is learned in both cases.
        init_std: Standard deviation of initial weights and embeddings; the published 0.02 is for width 1024.

    Raises:
        ValueError: If the block is too short, or has room to spare under a mask whose boundaries lie at its ends.
    """

    attention_mask: Tensor | None

    def __init__(
        self,
        codebook_size: int,
        grid: tuple[int, int, int],
        dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        condition_size: int = 0,
        condition_length: int = 1,
        mask: AttentionMask = "causal",
        dropout: float = 0.0,
        block_size: int | None = None,
        position_init: Literal["zeros", "sinusoidal"] = "zeros",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.num_frames, self.frame_tokens = grid[0], grid[1] * grid[2]
        needed = condition_length + self.num_frames * self.frame_tokens - 1
        self.block_size = needed if block_size is None else block_size
        if self.block_size < needed or (mask != "causal" and self.block_size > needed):
            raise ValueError(
                f"block_size={block_size} does not fit mask={mask!r}, {condition_length} condition tokens and a grid "
                f"of {grid}: expected {needed}{' or more' if mask == 'causal' else ''}."
            )
        if mask != "causal" and self.num_frames < 3:
            raise ValueError(f"mask={mask!r} fills the frames between the first and the last of {self.num_frames}.")
        self.codebook_size = codebook_size
        self.condition_size = condition_size
        self.condition_length = condition_length
        self.token_embedding = nn.Embedding(condition_size + codebook_size, dim)
        self.position_embedding = nn.Parameter(torch.zeros(1, self.block_size, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TATSBlock(dim, num_heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = FewRowsLinear(dim, condition_size + codebook_size, bias=False)  # not tied to the token embedding
        # the causal mask needs no buffer: the fused kernel knows it
        visible = None
        if mask != "causal":
            visible = attention_mask(mask, self.block_size, condition_length, self.frame_tokens)
        self.register_buffer("attention_mask", visible, persistent=False)
        self.reset_parameters(grid if position_init == "sinusoidal" else None, init_std)

    def reset_parameters(self, grid: tuple[int, int, int] | None, init_std: float) -> None:
        """Initialise: N(0, init_std) for weights and token embeddings, zero biases, LayerNorm (1, 0), positions."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if grid is not None:
            positions = init_std * sinusoidal_positions(grid, self.norm.weight.numel())
            with torch.no_grad():
                self.position_embedding[0, self.condition_length :][: len(positions) - 1] = positions[:-1]

    def decayed_parameters(self) -> list[nn.Parameter]:
        """Parameters under weight decay: the weights of Linear layers, the head included, and nothing else."""
        names = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        return [parameter for name, parameter in self.named_parameters() if name in names]

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the token after each.

        Args:
            tokens: `[B, n]` int64 ids of the joint vocabulary, from position 0; `n <= block_size`, and all of the
                block under a mask that is not causal.

        Returns:
            `[B, n, V_c + V_z]` logits.

        Raises:
            ValueError: If there are too many tokens, or too few for the mask.
        """
        return self.head(self._features(tokens))

    def code_logits(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predict each code from the condition and what the mask shows.

        Args:
            codes: `[B, N]` int64 in `[0, V_z)`; or fewer than N, if causal.
            condition: `[B, C]` int64 in `[0, V_c)`; None for an unconditional network.

        Returns:
            `[B, N, V_c + V_z]` logits; code `z` is class `V_c + z`.
        """
        tokens = torch.cat([self.condition_tokens(len(codes), condition), codes + self.condition_size], dim=1)
        return self.head(self._features(tokens[:, :-1])[:, self.condition_length - 1 :])

    def condition_tokens(self, batch_size: int, condition: Tensor | None) -> Tensor:
        """What a sequence begins with: the condition, or the start token.

        Args:
            batch_size: Rows `B`.
            condition: `[B, C]` int64 in `[0, V_c)`: a class, byte-pair ids (0 where there is no more text), or the
                codes of a sound; None for an unconditional network.

        Returns:
            `[B, C]` int64.

        Raises:
            ValueError: If a condition is missing, not wanted, or of another shape.
        """
        if condition is None and self.condition_size == 0:
            return torch.zeros(batch_size, 1, dtype=torch.int64, device=self.position_embedding.device)
        expected = (batch_size, self.condition_length)
        if condition is None or self.condition_size == 0 or condition.shape != expected:
            came = "none" if condition is None else f"{tuple(condition.shape)}"
            wanted = f"{expected} ids below {self.condition_size}" if self.condition_size else "none"
            raise ValueError(f"The condition has shape {came}, this network expects {wanted}.")
        return condition

    def leaked_targets(self) -> Tensor:
        """Which of the `[N]` targets stand in their own input, for a mask lets them see further: trivial to predict."""
        num_codes = self.num_frames * self.frame_tokens
        device = self.position_embedding.device
        if self.attention_mask is None:
            return torch.zeros(num_codes, dtype=torch.bool, device=device)
        row = torch.arange(self.condition_length - 1, self.block_size - 1, device=device)
        leaked = self.attention_mask[row, row + 1]  # the input at a position is the target of the one before
        return torch.cat([leaked, leaked.new_zeros(1)])  # the last code is never an input

    def new_cache(self, is_static: bool | None = None) -> KVCache:
        """Room for a sequence of `block_size` tokens.

        Args:
            is_static: Whether shapes must not change; None for everywhere but on a CPU.
        """
        if is_static is None:
            is_static = self.position_embedding.device.type != "cpu"
        return KVCache(len(self.blocks), self.block_size, is_static)

    def extend(self, tokens: Tensor, positions: Tensor, cache: KVCache, visible: Tensor | None = None) -> Tensor:
        """Add tokens to a cached sequence.

        Args:
            tokens: `[B, n]` int64 ids of the joint vocabulary.
            positions: `[n]` int64, where in the block they stand.
            cache: The sequence so far; all of it is visible to the new tokens.
            visible: `[n, n]` bool, which new tokens a new token sees; None is causal.

        Returns:
            `[B, n, D]` features: `head` turns them into logits, of those rows that are needed.
        """
        cache.reserve(tokens.shape[1], tokens.device, visible)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding[:, positions])  # [B, n, D]
        x = self.through_blocks(x, cache)
        cache.commit(tokens.shape[1])
        return x

    def through_blocks(self, x: Tensor, cache: KVCache) -> Tensor:
        """Turn embeddings `[B, n, D]` of tokens that have their place in the cache into features `[B, n, D]`."""
        for layer, block in enumerate(self.blocks):
            x = block(x, cache=cache, layer=layer)
        return self.norm(x)

    def _features(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        if count > self.block_size or (self.attention_mask is not None and count < self.block_size):
            least = "exactly" if self.attention_mask is not None else "at most"
            raise ValueError(f"{count} input tokens do not fit this network: {least} {self.block_size}.")
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding[:, :count])  # [B, n, D]
        for block in self.blocks:
            x = block(x, self.attention_mask)
        return self.norm(x)
