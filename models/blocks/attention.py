"""Multi-head attention over one fused core: no score matrix is ever materialised."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of a query stream over a context stream; the same stream twice is self-attention.

    Args:
        dim: Width `D` of both streams.
        num_heads: Number of heads; divides `dim`.
        dropout: Probability of dropping an attention weight, and an output feature.

    Raises:
        ValueError: If `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}. Choose a divisor (--model.num_heads).")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = dropout

    def extra_repr(self) -> str:
        """Name the settings."""
        return f"num_heads={self.num_heads}, dropout={self.dropout}"

    def forward(self, query: Tensor, context: Tensor, keep: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: `[B, N, D]`.
            context: `[B, S, D]`, keys and values; `S` may be 0: a sum over nothing, so the output is `proj`'s bias.
            keep: `[B, S]` bool, which keys are there, for samples with different numbers of them; None for all.

        Returns:
            `[B, N, D]`.
        """
        is_empty = context.shape[1] == 0
        if is_empty:
            # Fused kernels refuse zero keys. One key of value zero gives the same sum, and keeps every parameter in the
            # graph (with zero gradient), which DDP needs.
            context = F.pad(context, (0, 0, 0, 1))
        q, k, v = self.query(query), self.key(context), self.value(context)
        mask = None
        if is_empty:
            v = v * 0
        elif keep is not None:
            # the same for a sample without any key: the softmax needs one, of value zero
            has_any = keep.any(dim=1)[:, None]  # [B, 1]
            v = v * has_any[..., None]
            mask = (keep | ~has_any)[:, None, None]  # [B, 1, 1, S]: heads and queries share it
        q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=self.num_heads) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.proj(rearrange(out, "b heads n d -> b n (heads d)"))
        return F.dropout(out, self.dropout, self.training)
