"""The 3D-VQ encoder and decoder of MAGVIT (Yu et al., 2023, section 3.1 and appendix A.1; layer lists of its release).

Residual blocks with group norm over the whole clip, average pooling on the way down, nearest neighbours and a
convolution on the way up. Time is pooled at the side of the pixels. A latent depends on all frames, which is why COMMIT
conditions on the tokens of a padded video and not on those of the video itself.

The last convolution of the encoder, of kernel 1, is `VQGAN3D`'s: it gives the quantizer the channels that it takes.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.conv import Padding, SamePadConv3d, Stream
from models.blocks.norm import make_norm
from models.blocks.residual import ResStack
from models.tokenizers.levels import LevelEncoder, init_lecun_normal, level_strides, total_stride
from models.tokenizers.networks import VideoDecoder, from_patches


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


class MAGVITEncoder(LevelEncoder):
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
        patch_size: Pixels a side of the patches that come in as channels. The published networks have 1; a small one on
            a CPU spends most of its time at full resolution without.
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
        patch_size: int = 1,
    ) -> None:
        super().__init__(
            norm=partial(make_norm, "frame_group" if is_2d else "group", num_groups=norm_groups),
            conv=partial(SamePadConv3d, padding=padding, is_2d=is_2d, bias=False),
            down=lambda _, stride: AveragePool(stride),
            strides=level_strides(channel_multipliers, temporal_downsample, is_2d),
            widths=[base_channels * multiplier for multiplier in channel_multipliers],
            in_channels=in_channels,
            base_channels=base_channels,
            num_res_blocks=num_res_blocks,
            patch_size=patch_size,
        )


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
        patch_size: As in the encoder; the patches go out as channels.
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
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        self.padding: Padding = padding
        self.in_channels = latent_dim
        strides = level_strides(channel_multipliers, temporal_downsample, is_2d)
        self.patch_size = patch_size
        self.downsample = total_stride(strides, patch_size)
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
        self.conv_last = conv(width, out_channels * patch_size**2, bias=True)
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
        h = from_patches(self.conv_last(self.final_block(h), stream), self.patch_size)  # [B, 3, T, H, W]
        return self.without_partial_latents(h, features.shape[2]) if self.padding == "real" else h
