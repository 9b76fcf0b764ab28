"""The time-agnostic encoder and decoder of TATS (section 3.1).

With batch norm in evaluation and replicated borders every operation is local and moves along with its input: away from
the ends, the same frames give the same latents wherever they stand in a video. Group norm looks at the whole clip, so
with it the property is lost.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.conv import Padding, SamePadConv3d, SamePadConvTranspose3d
from models.blocks.norm import Norm, make_norm


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a skip connection; the number of channels stays."""

    def __init__(self, channels: int, norm: Norm, padding: Padding) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, channels)
        self.conv1 = SamePadConv3d(channels, channels, padding=padding)
        self.norm2 = make_norm(norm, channels)
        self.conv2 = SamePadConv3d(channels, channels, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, H, W]` to the same."""
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class EncoderStage(nn.Module):
    """Strided convolution, then one residual block."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: tuple[int, int, int], norm: Norm, padding: Padding
    ) -> None:
        super().__init__()
        self.down = SamePadConv3d(in_channels, out_channels, kernel_size=4, stride=stride, padding=padding)
        self.res = ResBlock(out_channels, norm, padding)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, T, H, W]` to `[B, C_out, T / s_t, H / s_h, W / s_w]`."""
        return self.res(self.down(x))


class DecoderStage(nn.Module):
    """Transposed convolution, then residual blocks `res1`, `res2`, ..."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: tuple[int, int, int],
        num_res_blocks: int,
        norm: Norm,
        padding: Padding,
    ) -> None:
        super().__init__()
        self.up = SamePadConvTranspose3d(in_channels, out_channels, stride=stride, padding=padding)
        for i in range(num_res_blocks):
            self.add_module(f"res{i + 1}", ResBlock(out_channels, norm, padding))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, T, H, W]` to `[B, C_out, T * s_t, H * s_h, W * s_w]`."""
        for layer in self.children():
            x = layer(x)
        return x


class TimeAgnosticEncoder(nn.Module):
    """Encoder of TATS: video to features, the channels doubling with each halving.

    Args:
        in_channels: Channels of the video.
        base_channels: Channels after the first convolution.
        downsample: Frames, rows and columns that one latent covers, powers of two.
        norm: `batch` (over all ranks) or `group`, which makes every latent depend on the whole clip.
        padding: How every convolution continues its input past the borders. `zero` pads the video with black.
    """

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 32,
        downsample: tuple[int, int, int] = (4, 8, 8),
        norm: Norm = "batch",
        padding: Padding = "replicate",
    ) -> None:
        super().__init__()
        self.downsample = (downsample[0], downsample[1], downsample[2])
        self.norm: Norm = norm
        strides = stage_strides(self.downsample)
        channels = [base_channels * 2**i for i in range(len(strides) + 1)]
        self.out_channels = channels[-1]
        self.conv_first = SamePadConv3d(in_channels, base_channels, padding=padding)
        self.conv_blocks = nn.ModuleList(
            EncoderStage(channels[i], channels[i + 1], stride, norm, padding) for i, stride in enumerate(strides)
        )
        self.final_block = nn.Sequential(make_norm(norm, self.out_channels), nn.SiLU())

    def forward(self, video: Tensor) -> Tensor:
        """Encode.

        Args:
            video: `[B, 3, T, H, W]` in the tokenizer's native range.

        Returns:
            `[B, out_channels, t, h, w]`.
        """
        h = self.conv_first(video)
        for stage in self.conv_blocks:
            h = stage(h)
        return self.final_block(h)

    def pad_video_with(self, black: float) -> None:
        """Set the value that `zero` padding continues the video with."""
        self.conv_first.fill = black

    def valid_frames(self, frames: int) -> bool:
        """Whether a clip of so many frames can be encoded: multiples of the temporal factor."""
        return frames > 0 and frames % self.downsample[0] == 0

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent grid of a clip.

        Raises:
            ValueError: if a size is no multiple of its factor. (The official code drops the remaining frames.)
        """
        t, h, w = self.downsample
        for name, size, factor, option in (
            ("frames", frames, t, "--data.num_frames"),
            ("height", height, h, "--data.resolution"),
            ("width", width, w, "--data.resolution"),
        ):
            if size < 1 or size % factor:
                lower = size // factor * factor
                nearest = f"{lower} or {lower + factor}" if lower > 0 else f"{factor}"
                raise ValueError(
                    f"{name}={size} does not fit this tokenizer: it takes multiples of {factor}. "
                    f"Nearest: {nearest} ({option})."
                )
        return frames // t, height // h, width // w

    def context_frames(self) -> int | None:
        """How many frames around a window its latents depend on, to either side; None for the whole clip.

        In evaluation, encoding a window with this margin and dropping the margin's latents equals encoding the whole
        clip. Group norm and `circular` padding let every latent see all of it.
        """
        if self.norm == "group" or self.conv_first.padding == "circular":
            return None
        # Frames [lowest, highest] around frame i * stride that latent i sees, from the last layer back to the first.
        lowest = highest = 0
        for conv in reversed([module for module in self.modules() if isinstance(module, SamePadConv3d)]):
            kernel, stride = conv.kernel_size[0], conv.stride[0]
            before = (kernel - stride + 1) // 2
            lowest, highest = lowest * stride - before, highest * stride - before + kernel - 1
        factor = self.downsample[0]
        margin = max(-lowest, highest - (factor - 1))
        return math.ceil(margin / factor) * factor


class TimeAgnosticDecoder(nn.Module):
    """Decoder of TATS: features to video, without an output activation.

    Args:
        out_channels: Channels of the video.
        base_channels: Channels of the encoder's first convolution; the last stage here has twice as many.
        downsample: Frames, rows and columns that one latent covers, as in the encoder.
        num_res_blocks: Residual blocks after each transposed convolution. TATS has 2; at full resolution they are most
            of the cost.
        norm: `batch` (over all ranks) or `group`.
        padding: How every convolution continues its input past the borders.
    """

    def __init__(
        self,
        out_channels: int = 3,
        base_channels: int = 32,
        downsample: tuple[int, int, int] = (4, 8, 8),
        num_res_blocks: int = 2,
        norm: Norm = "batch",
        padding: Padding = "replicate",
    ) -> None:
        super().__init__()
        self.downsample = (downsample[0], downsample[1], downsample[2])
        strides = stage_strides(self.downsample)
        widths = [base_channels * 2 ** (len(strides) - i) for i in range(len(strides))]
        self.in_channels = widths[0]
        channels = [self.in_channels, *widths]
        self.final_block = nn.Sequential(make_norm(norm, self.in_channels), nn.SiLU())  # comes first; official name
        self.conv_blocks = nn.ModuleList(
            DecoderStage(channels[i], channels[i + 1], stride, num_res_blocks, norm, padding)
            for i, stride in enumerate(strides)
        )
        self.conv_last = SamePadConv3d(channels[-1], out_channels, padding=padding)

    def forward(self, features: Tensor) -> Tensor:
        """Decode.

        Args:
            features: `[B, in_channels, t, h, w]`.

        Returns:
            `[B, 3, T, H, W]` in the tokenizer's native range, not clamped.
        """
        h = self.final_block(features)
        for stage in self.conv_blocks:
            h = stage(h)
        return self.conv_last(h)


def stage_strides(downsample: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Strides of the stages: each axis is halved by its first stages, (4, 8, 8) by (2, 2, 2), (2, 2, 2), (1, 2, 2).

    Raises:
        ValueError: if a factor is no power of two, or nothing is halved.
    """
    if any(factor < 1 or factor & (factor - 1) for factor in downsample) or max(downsample) == 1:
        raise ValueError(f"downsample={downsample}: expected powers of two, one of them at least 2")
    halvings = [int(math.log2(factor)) for factor in downsample]
    return [(1 + (halvings[0] > i), 1 + (halvings[1] > i), 1 + (halvings[2] > i)) for i in range(max(halvings))]
