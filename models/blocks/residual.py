"""The residual block of the convolutional tokenizers."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.conv import SamePadConv3d, Stream


class ResBlock(nn.Module):
    """Norm, SiLU, convolution of kernel 3, twice, around a skip connection.

    The skip is a convolution of kernel 1 where the number of channels changes.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        norm: makes a normalisation layer for a number of channels.
        conv: makes a convolution, from the channels of its input and output and `kernel_size`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: Callable[[int], nn.Module],
        conv: Callable[..., SamePadConv3d],
    ) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, kernel_size=3)
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, kernel_size=3)
        self.shortcut = conv(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """`[B, C_in, T, H, W]` to `[B, C_out, T, H, W]`; fewer frames if the convolutions use them up."""
        h = self.conv1(F.silu(self.norm1(x)), stream)
        h = self.conv2(F.silu(self.norm2(h)), stream)
        if stream is not None:
            x = stream.delay(self, x, h.shape[2])
        elif h.shape[2] < x.shape[2]:  # `real` padding: the frames whose neighbours are there
            first = self.conv1.time_pads[0] + self.conv2.time_pads[0]
            x = x[:, :, first : first + h.shape[2]]
        return h + (x if self.shortcut is None else self.shortcut(x, stream))


class ResStack(nn.ModuleList):
    """Residual blocks one after the other; the first changes the number of channels. Arguments as for `ResBlock`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        depth: int,
        norm: Callable[[int], nn.Module],
        conv: Callable[..., SamePadConv3d],
    ) -> None:
        super().__init__(
            ResBlock(in_channels if i == 0 else out_channels, out_channels, norm, conv) for i in range(depth)
        )

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """`[B, C_in, T, H, W]` to `[B, C_out, T, H, W]`."""
        for block in self:
            x = block(x, stream)
        return x
