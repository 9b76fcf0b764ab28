"""The 3D-VQ encoder and decoder of MAGVIT (Yu et al., 2023, section 3.1 and appendix A.1; layer lists of its release).

Residual blocks with group norm over the whole clip, average pooling on the way down, nearest neighbours and a
convolution on the way up. Time is pooled at the side of the pixels. A latent depends on all frames, which is why COMMIT
conditions on the tokens of a padded video and not on those of the video itself.

The last convolution of the encoder, of kernel 1, is `VQGAN3D`'s: it gives the quantizer the channels that it takes.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from timm.layers import lecun_normal_
from torch import Tensor, nn

from models.blocks.conv import Padding, SamePadConv3d, Stream
from models.blocks.norm import make_norm
from models.blocks.residual import ResStack
from models.tokenizers.networks import VideoDecoder, VideoEncoder

Strides = list[tuple[int, int, int]]


class AveragePool(nn.Module):
    """Mean over neighbours, of which there are fewer at the end of an axis that the stride does not divide."""

    def __init__(self, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C, T / s_t, H / s_h, W / s_w]`, rounded up."""
        window = [min(stride, size) for stride, size in zip(self.stride, x.shape[2:], strict=True)]
        return F.avg_pool3d(x, window, self.stride, ceil_mode=True)

    def inputs_of(self, first: int, last: int) -> tuple[int, int]:
        """First and last of the input's frames that the output's frames `first` to `last` see."""
        return first * self.stride[0], last * self.stride[0] + self.stride[0] - 1


class NearestUpsample(nn.Module):
    """Each entry repeated along time, height and width."""

    def __init__(self, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C, T * s_t, H * s_h, W * s_w]`."""
        return F.interpolate(x, scale_factor=[float(factor) for factor in self.factors], mode="nearest-exact")

    def inputs_of(self, first: int, last: int) -> tuple[int, int]:
        """First and last of the input's frames that the output's frames `first` to `last` see."""
        return first // self.factors[0], last // self.factors[0]


class UpsampleConv(nn.Module):
    """Nearest neighbours, then a convolution."""

    def __init__(self, channels: int, factors: tuple[int, int, int], conv: partial[SamePadConv3d]) -> None:
        super().__init__()
        self.nearest = NearestUpsample(factors)
        self.conv = conv(channels, channels, bias=True)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C, T * s_t, H * s_h, W * s_w]`."""
        return self.conv(self.nearest(x), stream)


class MAGVITEncoder(VideoEncoder):
    """Encoder of MAGVIT.

    The defaults are MAGVIT-B's for 128 pixels. L has `base_channels` 128; 64 pixels (BAIR) have `channel_multipliers`
    (1, 2, 4).

    Args:
        in_channels: Channels of the video.
        base_channels: Channels after the first convolution.
        channel_multipliers: Channels of each level, as multiples of `base_channels`. A pooling after each level but the
            last halves height and width.
        temporal_downsample: Which of the poolings halve time as well; those beyond the last pooling are not used.
        num_res_blocks: Residual blocks of each level, and after the last one.
        padding: How every convolution continues its input past the borders: `reflect` in the paper, `zero` in the
            released configurations. `real` pads no time: the clip holds the neighbours of the frames that it is for.
        norm_groups: Groups of channels that are normalised together.
        is_2d: Kernels and the statistics of group norm cover one frame: a tokenizer of images, which `inflate_from`
            takes. Needs a `temporal_downsample` of nothing but false.
    """

    time_placement = "same"

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 64,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        temporal_downsample: tuple[bool, ...] = (True, True, False),
        num_res_blocks: int = 2,
        padding: Padding = "reflect",
        norm_groups: int = 32,
        is_2d: bool = False,
    ) -> None:
        super().__init__()
        self.padding: Padding = padding
        strides = level_strides(channel_multipliers, temporal_downsample, is_2d)
        self.downsample = total_stride(strides)
        norm = partial(make_norm, "frame_group" if is_2d else "group", num_groups=norm_groups)
        conv = partial(SamePadConv3d, padding=padding, is_2d=is_2d, bias=False)
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.conv_first = conv(in_channels, base_channels)
        self.layers = nn.ModuleList()
        for i, width in enumerate(widths):
            self.layers.append(ResStack(widths[i - 1] if i else base_channels, width, num_res_blocks, norm, conv))
            if i < len(strides):
                self.layers.append(AveragePool(strides[i]))
        self.layers.append(ResStack(widths[-1], widths[-1], num_res_blocks, norm, conv))
        self.final_block = nn.Sequential(norm(widths[-1]), nn.SiLU())
        self.out_channels = widths[-1]
        self.apply(init_lecun_normal)

    def forward(self, video: Tensor, stream: Stream | None = None) -> Tensor:
        """Encode.

        Args:
            video: `[B, 3, T, H, W]` in the tokenizer's native range.
            stream: of a video of which this is the next piece; in 2D.

        Returns:
            `[B, out_channels, t, h, w]`.
        """
        h = self.conv_first(video, stream)  # [B, f, T, H, W]
        for layer in self.layers:
            h = layer(h, stream)
        return self.final_block(h)  # [B, 4f, t, h, w]


class MAGVITDecoder(VideoDecoder):
    """Decoder of MAGVIT, the encoder's mirror, without an output activation.

    Args:
        latent_dim: Channels of the latents, the quantizer's `dim`.
        out_channels: Channels of the video.
        base_channels: As in the encoder.
        channel_multipliers: As in the encoder, from the pixels to the latents.
        temporal_downsample: As in the encoder.
        num_res_blocks: Residual blocks before the first level, and of each level.
        padding: How every convolution continues its input past the borders.
        norm_groups: Groups of channels that are normalised together.
        is_2d: As in the encoder.
    """

    takes_latents = True
    time_placement = "same"

    def __init__(
        self,
        latent_dim: int = 256,
        out_channels: int = 3,
        base_channels: int = 64,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        temporal_downsample: tuple[bool, ...] = (True, True, False),
        num_res_blocks: int = 2,
        padding: Padding = "reflect",
        norm_groups: int = 32,
        is_2d: bool = False,
    ) -> None:
        super().__init__()
        self.padding: Padding = padding
        self.in_channels = latent_dim
        strides = level_strides(channel_multipliers, temporal_downsample, is_2d)
        self.downsample = total_stride(strides)
        norm = partial(make_norm, "frame_group" if is_2d else "group", num_groups=norm_groups)
        conv = partial(SamePadConv3d, padding=padding, is_2d=is_2d, bias=False)
        width = base_channels * channel_multipliers[-1]
        self.conv_first = conv(latent_dim, width, bias=True)
        self.layers = nn.ModuleList([ResStack(width, width, num_res_blocks, norm, conv)])
        for i, multiplier in reversed(list(enumerate(channel_multipliers))):
            self.layers.append(ResStack(width, base_channels * multiplier, num_res_blocks, norm, conv))
            width = base_channels * multiplier
            if i > 0:
                self.layers.append(UpsampleConv(width, strides[i - 1], conv))
        self.final_block = nn.Sequential(norm(width), nn.SiLU())
        self.conv_last = conv(width, out_channels, bias=True)
        self.apply(init_lecun_normal)

    def forward(self, features: Tensor, stream: Stream | None = None) -> Tensor:
        """Decode.

        Args:
            features: Latents `[B, latent_dim, t, h, w]`.
            stream: of a video of which these are the next latents; in 2D.

        Returns:
            `[B, 3, T, H, W]` in the tokenizer's native range, not clamped.
        """
        h = self.conv_first(features, stream)  # [B, 4f, t, h, w]
        for layer in self.layers:
            h = layer(h, stream)
        h = self.conv_last(self.final_block(h), stream)  # [B, 3, T, H, W]
        return self.without_partial_latents(h, features.shape[2]) if self.padding == "real" else h


def level_strides(channel_multipliers: Sequence[int], temporal_downsample: Sequence[bool], is_2d: bool) -> Strides:
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


def total_stride(strides: Strides) -> tuple[int, int, int]:
    """Frames, rows and columns that one latent covers."""
    return (math.prod(s[0] for s in strides), math.prod(s[1] for s in strides), math.prod(s[2] for s in strides))


def init_lecun_normal(module: nn.Module) -> None:
    """Draw convolution kernels from a truncated normal of variance 1 / fan-in, set biases to 0."""
    if isinstance(module, nn.Conv3d):
        lecun_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
