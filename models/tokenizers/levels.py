"""What the encoders of MAGVIT and MAGVIT-v2 share: levels of residual blocks, and a halving after each but the last.

They differ in their norm, in where time is padded, in how they halve and at which levels they halve time.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

from timm.layers import lecun_normal_
from torch import Tensor, nn

from models.blocks.conv import SamePadConv3d, Stream
from models.blocks.residual import ResStack
from models.tokenizers.networks import VideoEncoder, to_patches

Stride = tuple[int, int, int]


class LevelEncoder(VideoEncoder):
    """An encoder in levels, of the parts that it is given.

    Args:
        norm: Makes a normalisation layer for a number of channels.
        conv: Makes a convolution; says padding and placement, and whether the kernel covers one frame.
        down: Makes what halves, from the number of channels and the stride.
        strides: Of the halvings, from the pixels to the latents.
        widths: Channels of each level.
        in_channels: Channels of the video.
        base_channels: Channels after the first convolution.
        num_res_blocks: Residual blocks of each level, and after the last one.
        patch_size: Pixels a side of the patches that come in as channels.
    """

    def __init__(
        self,
        norm: Callable[[int], nn.Module],
        conv: partial[SamePadConv3d],
        down: Callable[[int, Stride], nn.Module],
        strides: list[Stride],
        widths: list[int],
        in_channels: int,
        base_channels: int,
        num_res_blocks: int,
        patch_size: int,
    ) -> None:
        super().__init__()
        self.padding = conv.keywords["padding"]
        self.patch_size = patch_size
        self.downsample = total_stride(strides, patch_size)
        self.conv_first = conv(in_channels * patch_size**2, base_channels)
        self.layers = nn.ModuleList()
        for i, width in enumerate(widths):
            self.layers.append(ResStack(widths[i - 1] if i else base_channels, width, num_res_blocks, norm, conv))
            if i < len(strides):
                self.layers.append(down(width, strides[i]))
        self.layers.append(ResStack(widths[-1], widths[-1], num_res_blocks, norm, conv))
        self.final_block = nn.Sequential(norm(widths[-1]), nn.SiLU())
        self.out_channels = widths[-1]
        self.apply(init_lecun_normal)

    def forward(self, video: Tensor, stream: Stream | None = None) -> Tensor:
        """Encode.

        Args:
            video: `[B, 3, T, H, W]` in the tokenizer's native range.
            stream: of a video of which this is the next piece.

        Returns:
            `[B, out_channels, t, h, w]`.
        """
        h = self.conv_first(to_patches(video, self.patch_size), stream)  # [B, f, T, H, W]
        for layer in self.layers:
            h = layer(h, stream)
        return self.final_block(h)  # [B, 4f, t, h, w]


def level_strides(channel_multipliers: Sequence[int], temporal_downsample: Sequence[bool], is_2d: bool) -> list[Stride]:
    """Strides between the levels, from the pixels to the latents.

    Raises:
        ValueError: if `temporal_downsample` has too few entries, or a 2D network is to halve time.
    """
    halvings = len(channel_multipliers) - 1
    flags = list(temporal_downsample)[:halvings]
    if halvings < 1 or len(flags) < halvings:
        raise ValueError(
            f"channel_multipliers={tuple(channel_multipliers)} halve {halvings} times: expected at least one, and as "
            f"many entries of temporal_downsample={tuple(temporal_downsample)}"
        )
    if is_2d and any(flags):
        raise ValueError(f"temporal_downsample={tuple(flags)}: a 2D network (is_2d) keeps every frame, expected false")
    return [(2 if flag else 1, 2, 2) for flag in flags]


def total_stride(strides: list[Stride], patch_size: int) -> Stride:
    """Frames, rows and columns that one latent covers."""
    return (
        math.prod(s[0] for s in strides),
        patch_size * math.prod(s[1] for s in strides),
        patch_size * math.prod(s[2] for s in strides),
    )


def init_lecun_normal(module: nn.Module) -> None:
    """Draw convolution kernels from a truncated normal of variance 1 / fan-in, set biases to 0."""
    if isinstance(module, nn.Conv3d):
        lecun_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
