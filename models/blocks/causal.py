"""Self-attention over a sequence that grows: fused, and with a cache of keys and values."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KVCache:
    """Keys and values of all layers, allocated once for the longest sequence.

    Where kernels are compiled or captured, every shape must stay: then all `length` keys are read and those that hold
    nothing yet are masked (`is_static`). On a CPU it is cheaper to read the filled part alone.

    Args:
        num_layers: Layers that share the sequence.
        length: Most tokens that the sequence may have.
        is_static: Whether to read the full length always.
    """

    def __init__(self, num_layers: int, length: int, is_static: bool) -> None:
        self.length = length
        self.is_static = is_static
        self.filled = 0  # a host integer: nobody waits for the device to know how long the sequence is
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._slots = torch.empty(0)
        self.mask: Tensor | None = None

    def clear(self, kept: int = 0) -> None:
        """Forget the sequence but its first `kept` tokens, keep the memory."""
        self.filled = min(self.filled, kept)

    def reserve(self, count: int, device: torch.device, visible: Tensor | None = None) -> None:
        """Prepare to add tokens: call once before the layers, and `commit` after them.

        Args:
            count: New tokens; each sees all tokens that were there before.
            device: Where the layers run.
            visible: `[count, count]` bool, which of the new tokens a new token (row) sees; None is causal.

        Raises:
            ValueError: If there is no room.
        """
        if self.filled + count > self.length:
            raise ValueError(f"{self.filled} + {count} tokens do not fit a cache of length {self.length}.")
        end = self.filled + count
        self._slots = torch.arange(self.filled, end, device=device)
        self._end = self.length if self.is_static else end
        if count == 1 and not self.is_static:
            self.mask = None
            return
        self.mask = torch.arange(self._end, device=device) <= self._slots[:, None]  # [count, end]
        if visible is not None:
            self.mask[:, self.filled : end] = visible

    def commit(self, count: int) -> None:
        """Take the new tokens for part of the sequence."""
        self.filled += count

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values `[B, heads, count, d]`; return all that it reads, `[B, heads, S, d]`."""
        read = []
        for buffers, new in ((self._keys, keys), (self._values, values)):
            buffer = buffers[layer]
            if buffer is None or buffer.dtype != new.dtype:
                buffer = new.new_zeros(*new.shape[:2], self.length, new.shape[3])
                buffers[layer] = buffer
            if self.is_static:
                buffer.index_copy_(2, self._slots, new)
            else:  # cheaper, but another shape in each step
                buffer[:, :, self.filled : self._end] = new
            read.append(buffer[:, :, : self._end])
        return read[0], read[1]


class FewRowsLinear(nn.Linear):
    """A Linear layer that is also fast for the few rows of a decoding step on a CPU.

    The usual product, in which the few rows stand on the left, leaves the cores little to share. With 2 to 32 rows the
    weight therefore goes to the left: half to two thirds of the time at width 1024. One row is fast either way.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map `[.., in_features]` to `[.., out_features]`."""
        if x.device.type != "cpu" or not 2 <= (rows := x.numel() // self.in_features) <= 32:
            return super().forward(x)
        out = F.linear(self.weight, x.reshape(rows, -1)).t()  # [rows, out_features]
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)  # autocast
        return out.view(*x.shape[:-1], -1)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and what came before, or what a mask shows it.

    Args:
        dim: Width `D`.
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
        self.query = FewRowsLinear(dim, dim)
        self.key = FewRowsLinear(dim, dim)
        self.value = FewRowsLinear(dim, dim)
        self.proj = FewRowsLinear(dim, dim)
        self.dropout = dropout

    def extra_repr(self) -> str:
        """Name the settings."""
        return f"num_heads={self.num_heads}, dropout={self.dropout}"

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """Attend.

        Args:
            x: `[B, N, D]`; with a cache, the new tokens that were reserved in it.
            mask: `[N, N]` bool, row sees column; None is causal. With a cache, the cache's own mask holds.
            cache: Keys and values of earlier tokens, and room for those of the new ones.
            layer: Which of the cache's layers this is.

        Returns:
            `[B, N, D]`.
        """
        # what einops says in words takes it three times as long: noticeable where a step is one token
        q, k, v = (
            project(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)  # [B, heads, N, d]
            for project in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        if cache is not None:
            k, v = cache.update(layer, k, v)
            # the kernel is slow where the features of a query do not lie together, as after `FewRowsLinear`
            out = F.scaled_dot_product_attention(q.contiguous(), k, v, attn_mask=cache.mask, dropout_p=dropout)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return F.dropout(out, self.dropout, self.training)
