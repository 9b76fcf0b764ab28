"""The time-agnostic encoder and decoder of TATS (section 3.1).

With batch norm in evaluation and replicated borders every operation is local and moves along with its input: away from
the ends, the same frames give the same latents wherever they stand in a video. Group norm looks at the whole clip, so
with it the property is lost.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from models.blocks.conv import Padding, SamePadConv3d, SamePadConvTranspose3d, Stream, TimePlacement
from models.blocks.norm import Norm, make_norm
from models.blocks.residual import ResBlock
from models.tokenizers.networks import VideoDecoder, VideoEncoder, from_patches, to_patches

MakeNorm = Callable[[int], nn.Module]
MakeConv = Callable[..., SamePadConv3d]
MakeConvTranspose = Callable[..., SamePadConvTranspose3d]


class EncoderStage(nn.Module):
    """Strided convolution, then one residual block."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: tuple[int, int, int], norm: MakeNorm, conv: MakeConv
    ) -> None:
        super().__init__()
        self.down = conv(in_channels, out_channels, kernel_size=4, stride=stride)
        self.res = ResBlock(out_channels, out_channels, norm, conv)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """`[B, C_in, T, H, W]` to `[B, C_out, T / s_t, H / s_h, W / s_w]`."""
        return self.res(self.down(x, stream), stream)


class DecoderStage(nn.Module):
    """Transposed convolution, then residual blocks `res1`, `res2`, ..."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: tuple[int, int, int],
        num_res_blocks: int,
        norm: MakeNorm,
        conv: MakeConv,
        conv_transpose: MakeConvTranspose,
    ) -> None:
        super().__init__()
        self.up = conv_transpose(in_channels, out_channels, stride=stride)
        for i in range(num_res_blocks):
            self.add_module(f"res{i + 1}", ResBlock(out_channels, out_channels, norm, conv))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """`[B, C_in, T, H, W]` to `[B, C_out, T * s_t, H * s_h, W * s_w]`."""
        for layer in self.children():
            x = layer(x, stream)
        return x


class TimeAgnosticEncoder(VideoEncoder):
    """Encoder of TATS: video to features, the channels doubling with each halving.

    Args:
        in_channels: Channels of the video.
        base_channels: Channels after the first convolution.
        downsample: Frames, rows and columns that one latent covers, powers of two.
        norm: `batch` (over all ranks), `frame_group`, or `group`, which makes every latent depend on the whole clip.
        padding: How every convolution continues its input past the borders. `zero` pads the video with black. `real`
            pads no time: the clip holds the neighbouring frames of those that it is encoded for.
        time_placement: Where time is padded: `same` on both sides, or `causal` in front, for `1 + f k` frames.
        is_2d: Kernels cover one frame: a tokenizer of images, which `inflate_from` takes. Needs 1 frame a latent.
        patch_size: Pixels a side of the patches that come in as channels. TATS has 1; with 2, full resolution, where
            most of the time goes, has no convolutions, and `downsample` counts the patch.
    """

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 32,
        downsample: tuple[int, int, int] = (4, 8, 8),
        norm: Norm = "batch",
        padding: Padding = "replicate",
        time_placement: TimePlacement = "same",
        is_2d: bool = False,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        self.downsample = (downsample[0], downsample[1], downsample[2])
        self.patch_size = patch_size
        self.padding: Padding = padding
        self.time_placement: TimePlacement = time_placement
        strides = stage_strides(self.downsample, is_2d, patch_size)
        channels = [base_channels * 2**i for i in range(len(strides) + 1)]
        self.out_channels = channels[-1]
        conv = partial(SamePadConv3d, padding=padding, time_placement=time_placement, is_2d=is_2d)
        norms = partial(make_norm, norm)
        self.conv_first = conv(in_channels * patch_size**2, base_channels)
        self.conv_blocks = nn.ModuleList(
            EncoderStage(channels[i], channels[i + 1], stride, norms, conv) for i, stride in enumerate(strides)
        )
        self.final_block = nn.Sequential(norms(self.out_channels), nn.SiLU())

    def forward(self, video: Tensor, stream: Stream | None = None) -> Tensor:
        """Encode.

        Args:
            video: `[B, 3, T, H, W]` in the tokenizer's native range.
            stream: of a video of which this is the next piece.

        Returns:
            `[B, out_channels, t, h, w]`.
        """
        h = self.conv_first(to_patches(video, self.patch_size), stream)
        for stage in self.conv_blocks:
            h = stage(h, stream)
        return self.final_block(h)


class TimeAgnosticDecoder(VideoDecoder):
    """Decoder of TATS: features to video, without an output activation.

    Args:
        out_channels: Channels of the video.
        base_channels: Channels of the encoder's first convolution; the last stage here has twice as many.
        downsample: Frames, rows and columns that one latent covers, as in the encoder.
        num_res_blocks: Residual blocks after each transposed convolution. TATS has 2; at full resolution they are most
            of the cost.
        norm: `batch` (over all ranks), `frame_group`, or `group`, which takes statistics over the whole clip.
        padding: How every convolution continues its input past the borders. `real` pads no time: only frames whose
            neighbouring latents are given are decoded.
        time_placement: Where time is padded, as in the encoder.
        is_2d: Kernels cover one frame, as in the encoder.
        patch_size: Pixels a side of the patches that go out as channels, as in the encoder.
    """

    takes_latents = False

    def __init__(
        self,
        out_channels: int = 3,
        base_channels: int = 32,
        downsample: tuple[int, int, int] = (4, 8, 8),
        num_res_blocks: int = 2,
        norm: Norm = "batch",
        padding: Padding = "replicate",
        time_placement: TimePlacement = "same",
        is_2d: bool = False,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        self.downsample = (downsample[0], downsample[1], downsample[2])
        self.patch_size = patch_size
        self.padding: Padding = padding
        self.time_placement: TimePlacement = time_placement
        strides = stage_strides(self.downsample, is_2d, patch_size)
        widths = [base_channels * 2 ** (len(strides) - i) for i in range(len(strides))]
        self.in_channels = widths[0]
        channels = [self.in_channels, *widths]
        rule: dict[str, Any] = {"padding": padding, "time_placement": time_placement, "is_2d": is_2d}
        conv: MakeConv = partial(SamePadConv3d, **rule)
        conv_transpose: MakeConvTranspose = partial(SamePadConvTranspose3d, **rule)
        norms = partial(make_norm, norm)
        self.final_block = nn.Sequential(norms(self.in_channels), nn.SiLU())  # comes first; official name
        self.conv_blocks = nn.ModuleList(
            DecoderStage(channels[i], channels[i + 1], stride, num_res_blocks, norms, conv, conv_transpose)
            for i, stride in enumerate(strides)
        )
        self.conv_last = conv(channels[-1], out_channels * patch_size**2)

    def forward(self, features: Tensor, stream: Stream | None = None) -> Tensor:
        """Decode.

        Args:
            features: `[B, in_channels, t, h, w]`.
            stream: of a video of which these are the next features.

        Returns:
            `[B, 3, T, H, W]` in the tokenizer's native range, not clamped.
        """
        h = self.final_block(features)
        for stage in self.conv_blocks:
            h = stage(h, stream)
        h = from_patches(self.conv_last(h, stream), self.patch_size)
        return self.without_partial_latents(h, features.shape[2]) if self.padding == "real" else h


def stage_strides(
    downsample: tuple[int, int, int], is_2d: bool = False, patch_size: int = 1
) -> list[tuple[int, int, int]]:
    """Strides of the stages: each axis is halved by its first stages, (4, 8, 8) by (2, 2, 2), (2, 2, 2), (1, 2, 2).

    Patches do their part of the work beforehand: with 2 x 2 pixels, that is (2, 2, 2), (2, 2, 2).

    Raises:
        ValueError: if a factor is no power of two, nothing is halved, or a 2D network is to halve time.
    """
    after_patches = (downsample[0], downsample[1] / patch_size, downsample[2] / patch_size)
    if (
        any(factor < 1 or factor % 1 or int(factor) & (int(factor) - 1) for factor in after_patches)
        or max(after_patches) == 1
    ):
        raise ValueError(
            f"downsample={downsample}, patch_size={patch_size}: expected powers of two, one of them at least 2 after "
            "division of height and width by the patch size"
        )
    if is_2d and downsample[0] > 1:
        raise ValueError(f"downsample={downsample}: a 2D network (is_2d) keeps every frame, expected 1 in front")
    halvings = [int(math.log2(factor)) for factor in after_patches]
    return [(1 + (halvings[0] > i), 1 + (halvings[1] > i), 1 + (halvings[2] > i)) for i in range(max(halvings))]
