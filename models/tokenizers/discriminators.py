"""Discriminators: the patches of TATS, and the residual networks of MAGVIT and MAGVIT-v2 in the manner of StyleGAN.

Each gives logits and the list of its hidden maps.
"""

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.blocks.conv import SamePadConv3d
from models.blocks.norm import SyncBatchNorm
from models.tokenizers.magvit import AveragePool


class PatchDiscriminator(nn.Module):
    """Convolutional classifier of overlapping patches.

    Kernel 4, two zeros of padding; all convolutions but the last two halve each axis; batch norm (over all ranks) and
    leaky ReLU in between.

    Args:
        num_axes: 2 for frames, 3 for clips.
        in_channels: Channels of the video.
        base_channels: Channels of the first map; they double up to 512.
        num_layers: Number of halving convolutions.
    """

    def __init__(
        self, num_axes: Literal[2, 3], in_channels: int = 3, base_channels: int = 64, num_layers: int = 3
    ) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[num_axes]
        widths = [min(base_channels * 2**i, 512) for i in range(num_layers + 1)]
        self.num_maps = num_layers + 2
        self.model0 = nn.Sequential(conv(in_channels, widths[0], 4, stride=2, padding=2), nn.LeakyReLU(0.2))
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            stage = nn.Sequential(
                conv(widths[i - 1], widths[i], 4, stride=stride, padding=2),
                SyncBatchNorm(widths[i]),
                nn.LeakyReLU(0.2),
            )
            self.add_module(f"model{i}", stage)
        self.add_module(f"model{num_layers + 1}", nn.Sequential(conv(widths[-1], 1, 4, stride=1, padding=2)))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Judge frames `[B, C, H, W]` or clips `[B, C, T, H, W]`.

        Returns:
            Logits, one a patch, and the hidden maps from first to last.
        """
        maps = []
        for i in range(self.num_maps):
            x = self.get_submodule(f"model{i}")(x)
            maps.append(x)
        return maps[-1], maps[:-1]


class BlurPool(nn.Module):
    """Every second entry after a blur by [1, 2, 1] / 4 along each axis (MAGVIT-v2); sizes are rounded up.

    Zeros continue the input, so that constants keep their value away from the borders.

    Args:
        axes: 3, or 2 to leave time as it is.
    """

    kernel: Tensor

    def __init__(self, axes: Literal[2, 3]) -> None:
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        time = line if axes == 3 else torch.ones(1)
        self.register_buffer("kernel", torch.einsum("t,h,w->thw", time, line, line), persistent=False)
        self.stride = (2 if axes == 3 else 1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C, T / 2, H / 2, W / 2]`."""
        pads = []
        for size, width, stride in list(zip(x.shape[2:], self.kernel.shape, self.stride, strict=True))[::-1]:
            total = (math.ceil(size / stride) - 1) * stride + width - size
            pads += [total // 2, total - total // 2]
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, *self.kernel.shape)
        return F.conv3d(F.pad(x, pads), kernel, stride=self.stride, groups=x.shape[1])


class ResBlockDown(nn.Module):
    """Two convolutions around a pooling, beside a pooled skip connection; the sum is divided by sqrt(2).

    The first convolution keeps the number of channels, the second changes it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, conv: partial[SamePadConv3d], pool: AveragePool | BlurPool
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, in_channels)
        self.conv2 = conv(in_channels, out_channels)
        self.shortcut = conv(in_channels, out_channels, kernel_size=1, bias=False)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, T, H, W]` to `[B, C_out, T / 2, H / 2, W / 2]`, rounded up."""
        h = self.pool(F.leaky_relu(self.conv1(x), 0.2))
        h = F.leaky_relu(self.conv2(h), 0.2)
        return (h + self.shortcut(self.pool(x))) / math.sqrt(2)


class StyleGANDiscriminator(nn.Module):
    """Residual classifier of whole clips: one logit each, no norm (MAGVIT, appendix A.1).

    The defaults are those of MAGVIT-B; L has `base_channels` 128. Those of 64 pixels (BAIR) have one 4 less. MAGVIT-v2
    has `base_channels` 128, 17 frames and blurs. Every entry of `channel_multipliers` halves all axes, rounding up.

    Args:
        num_frames: Frames of the clips.
        resolution: Height and width of the clips.
        in_channels: Channels of the video.
        base_channels: Channels after the first convolution.
        channel_multipliers: Channels after each residual block, as multiples of `base_channels`.
        blur: Pool by a blur, as MAGVIT-v2, and not by the average.
        is_2d: Kernels cover one frame and time is not pooled: the discriminator of clips of one frame.
    """

    def __init__(
        self,
        num_frames: int = 16,
        resolution: int = 128,
        in_channels: int = 3,
        base_channels: int = 64,
        channel_multipliers: tuple[int, ...] = (2, 4, 4, 4, 4),
        blur: bool = False,
        is_2d: bool = False,
    ) -> None:
        super().__init__()
        self.clip_size = (num_frames, resolution, resolution)
        conv = partial(SamePadConv3d, padding="zero", is_2d=is_2d)
        self.conv_first = conv(in_channels, base_channels)
        widths = [base_channels, *(base_channels * multiplier for multiplier in channel_multipliers)]
        self.blocks = nn.ModuleList()
        for i in range(len(channel_multipliers)):
            pool = BlurPool(2 if is_2d else 3) if blur else AveragePool((1 if is_2d else 2, 2, 2))
            self.blocks.append(ResBlockDown(widths[i], widths[i + 1], conv, pool))
        self.conv_last = conv(widths[-1], widths[-1])
        t, h, w = (math.ceil(size / 2 ** len(channel_multipliers)) for size in self.clip_size)
        self.hidden = nn.Linear((num_frames if is_2d else t) * h * w * widths[-1], widths[-1])
        self.head = nn.Linear(widths[-1], 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Judge clips `[B, C, T, H, W]`.

        Returns:
            Logits `[B, 1]`, and the hidden maps from first to last.

        Raises:
            ValueError: if the clips are of another size than it was built for.
        """
        if x.shape[2:] != self.clip_size:
            raise ValueError(
                f"This discriminator judges clips of {self.clip_size} (frames, height, width), got "
                f"{tuple(x.shape[2:])}: set its num_frames and resolution."
            )
        maps = [F.leaky_relu(self.conv_first(x), 0.2)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        maps.append(F.leaky_relu(self.conv_last(maps[-1]), 0.2))
        hidden = F.leaky_relu(self.hidden(rearrange(maps[-1], "b c t h w -> b (t h w c)")), 0.2)
        return self.head(hidden), maps
