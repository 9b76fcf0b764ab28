"""The causal encoder and decoder of MAGVIT-v2 (Yu et al., 2024, section 3.2 and appendix) and W.A.L.T (section 3.1).

Nothing that they compute depends on later frames: convolutions are padded in front, and group norm takes its statistics
over each frame by itself. `1 + f k` frames have `1 + k` latents, the first of which stands for the first frame alone,
so an image is a video of one frame, and an image may share a batch with videos. Time is halved at the side of the
latents, by strided convolutions, and doubled by moving channels into space and time.

The last convolution of the encoder, of kernel 1, is `VQGAN3D`'s: it gives the quantizer the channels that it takes.
"""

from functools import partial
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.blocks.conv import Padding, SamePadConv3d, Stream
from models.blocks.norm import FrameGroupNorm, make_norm
from models.blocks.residual import ResStack
from models.tokenizers.levels import LevelEncoder, init_lecun_normal, level_strides, total_stride
from models.tokenizers.networks import VideoDecoder, from_patches


class DepthToSpace(nn.Module):
    """Channels, in the order (time, height, width, rest), moved into time and space.

    The first `s_t - 1` frames of the video are dropped: they lie before the first one.
    """

    def __init__(self, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """`[B, s_t * s_h * s_w * C, 1 + T, H, W]` to `[B, C, 1 + s_t * T, s_h * H, s_w * W]`."""
        s, p, q = self.factors
        x = rearrange(x, "b (s p q c) t h w -> b c (t s) (h p) (w q)", s=s, p=p, q=q)
        if stream is not None and stream.has_begun(self):
            return x
        if stream is not None:
            stream.begin(self)
        return x[:, :, s - 1 :]

    def inputs_of(self, first: int, last: int) -> tuple[int, int]:
        """First and last of the input's frames that the output's frames `first` to `last` see."""
        step = self.factors[0]
        return (first + step - 1) // step, (last + step - 1) // step


class DepthToSpaceUpsample(nn.Module):
    """Convolution to `s_t * s_h * s_w` times the channels, which then become time and space."""

    def __init__(self, channels: int, factors: tuple[int, int, int], conv: partial[SamePadConv3d]) -> None:
        super().__init__()
        self.conv = conv(channels, channels * factors[0] * factors[1] * factors[2], bias=True)
        self.depth_to_space = DepthToSpace(factors)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """`[B, C, 1 + T, H, W]` to `[B, C, 1 + s_t * T, s_h * H, s_w * W]`."""
        return self.depth_to_space(self.conv(x, stream), stream)


class AdaptiveGroupNorm(nn.Module):
    """Group norm of each frame, scaled and shifted at each position by what the latent there says.

    Args:
        channels: Channels of the features.
        latent_dim: Channels of the latents.
        num_groups: Groups of channels that are normalised together.
    """

    def __init__(self, channels: int, latent_dim: int, num_groups: int) -> None:
        super().__init__()
        if channels % num_groups:
            raise ValueError(f"{num_groups} groups do not divide {channels} channels: change base_channels")
        self.norm = FrameGroupNorm(num_groups, channels, eps=1e-6, affine=False)
        self.modulation = nn.Conv3d(latent_dim, 2 * channels, kernel_size=1)

    def forward(self, x: Tensor, latents: Tensor, frames_per_latent: int) -> Tensor:
        """Normalise features by the nearest latents.

        Args:
            x: `[B, C, T, H, W]`.
            latents: `[B, D, t, h, w]`; the last of them stand for the frames of `x`.
            frames_per_latent: how many frames of `x` each stands for.
        """
        modulation = self.modulation(latents)  # before it grows: each position has that of its latent
        size = (latents.shape[2] * frames_per_latent, *x.shape[3:])
        modulation = F.interpolate(modulation, size, mode="nearest-exact")
        scale, shift = modulation[:, :, size[0] - x.shape[2] :].chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


class DecoderLevel(nn.Module):
    """Adaptive group norm, then residual blocks.

    Args:
        frames_per_latent: frames of this level that one latent stands for.
        ada_norm: takes the latents.
        blocks: the residual blocks.
    """

    def __init__(self, frames_per_latent: int, ada_norm: AdaptiveGroupNorm, blocks: ResStack) -> None:
        super().__init__()
        self.frames_per_latent = frames_per_latent
        self.ada_norm = ada_norm
        self.blocks = blocks

    def forward(self, x: Tensor, latents: Tensor, stream: Stream | None = None) -> Tensor:
        """`[B, C_in, T, H, W]` to `[B, C_out, T, H, W]`."""
        return self.blocks(self.ada_norm(x, latents, self.frames_per_latent), stream)


class CausalEncoder(LevelEncoder):
    """Causal encoder: `1 + f k` frames to `1 + k` latents.

    The defaults are those of MAGVIT-v2 and W.A.L.T for 17 x 128 x 128 pixels; W.A.L.T's for images of 256 pixels have
    `channel_multipliers` (1, 1, 2, 4).

    Args:
        in_channels: Channels of the video.
        base_channels: Channels after the first convolution.
        channel_multipliers: Channels of each level, as multiples of `base_channels`. A strided convolution after each
            level but the last halves height and width.
        temporal_downsample: Which of these halve time as well; those beyond the last are not used.
        num_res_blocks: Residual blocks of each level, and after the last one.
        down_kernel: Kernel of the strided convolutions: 3 in the paper's figure, 4 in public code of its authors.
        padding: How every convolution continues its input past the borders; `replicate` in time means the first frame.
            `reflect` and `circular` would take frames of the future, and are `replicate` in time. `real` pads no time:
            the clip begins with the frames before those that it is for.
        norm_groups: Groups of channels that are normalised together.
        is_2d: Kernels cover one frame: a tokenizer of images, which `inflate_from` takes. Needs a `temporal_downsample`
            of nothing but false.
        patch_size: Pixels a side of the patches that come in as channels. The published networks have 1; a small one on
            a CPU spends most of its time at full resolution without.
    """

    time_placement = "causal"

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        temporal_downsample: tuple[bool, ...] = (False, True, True),
        num_res_blocks: int = 4,
        down_kernel: Literal[3, 4] = 3,
        padding: Padding = "replicate",
        norm_groups: int = 32,
        is_2d: bool = False,
        patch_size: int = 1,
    ) -> None:
        conv = partial(SamePadConv3d, padding=padding, time_placement="causal", is_2d=is_2d, bias=False)
        super().__init__(
            norm=partial(make_norm, "frame_group", num_groups=norm_groups),
            conv=conv,
            down=lambda width, stride: conv(width, width, kernel_size=down_kernel, stride=stride, bias=True),
            strides=level_strides(channel_multipliers, temporal_downsample, is_2d),
            widths=[base_channels * multiplier for multiplier in channel_multipliers],
            in_channels=in_channels,
            base_channels=base_channels,
            num_res_blocks=num_res_blocks,
            patch_size=patch_size,
        )


class CausalDecoder(VideoDecoder):
    """Causal decoder, the encoder's mirror: `1 + k` latents to `1 + f k` frames, without an output activation.

    Args:
        latent_dim: Channels of the latents, the quantizer's `dim`: 18 for MAGVIT-v2, 8 for W.A.L.T.
        out_channels: Channels of the video.
        base_channels: As in the encoder.
        channel_multipliers: As in the encoder, from the pixels to the latents.
        temporal_downsample: As in the encoder.
        num_res_blocks: Residual blocks before the first level, and of each level.
        padding: How every convolution continues its input past the borders, as in the encoder.
        norm_groups: Groups of channels that are normalised together.
        is_2d: As in the encoder.
        patch_size: As in the encoder; the patches go out as channels.
    """

    takes_latents = True
    time_placement = "causal"

    def __init__(
        self,
        latent_dim: int = 18,
        out_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        temporal_downsample: tuple[bool, ...] = (False, True, True),
        num_res_blocks: int = 4,
        padding: Padding = "replicate",
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
        norm = partial(make_norm, "frame_group", num_groups=norm_groups)
        conv = partial(SamePadConv3d, padding=padding, time_placement="causal", is_2d=is_2d, bias=False)
        width = base_channels * channel_multipliers[-1]
        self.conv_first = conv(latent_dim, width, bias=True)
        self.middle = ResStack(width, width, num_res_blocks, norm, conv)
        self.layers = nn.ModuleList()
        frames_per_latent = 1
        for i, multiplier in reversed(list(enumerate(channel_multipliers))):
            ada_norm = AdaptiveGroupNorm(width, latent_dim, norm_groups)
            blocks = ResStack(width, base_channels * multiplier, num_res_blocks, norm, conv)
            self.layers.append(DecoderLevel(frames_per_latent, ada_norm, blocks))
            width = base_channels * multiplier
            if i > 0:
                self.layers.append(DepthToSpaceUpsample(width, strides[i - 1], conv))
                frames_per_latent *= strides[i - 1][0]
        self.final_block = nn.Sequential(norm(width), nn.SiLU())
        self.conv_last = conv(width, out_channels * patch_size**2, bias=True)
        self.apply(init_lecun_normal)

    def forward(self, features: Tensor, stream: Stream | None = None) -> Tensor:
        """Decode.

        Args:
            features: Latents `[B, latent_dim, 1 + k, h, w]`.
            stream: of a video of which these are the next latents.

        Returns:
            `[B, 3, 1 + f k, H, W]` in the tokenizer's native range, not clamped.
        """
        h = self.middle(self.conv_first(features, stream), stream)  # [B, 4 C, t, h, w]
        for layer in self.layers:
            h = layer(h, features, stream) if isinstance(layer, DecoderLevel) else layer(h, stream)
        h = from_patches(self.conv_last(self.final_block(h), stream), self.patch_size)  # [B, 3, T, H, W]
        return self.without_partial_latents(h, features.shape[2]) if self.padding == "real" else h
