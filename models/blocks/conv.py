"""3D convolutions that keep (or divide, or multiply) the size of their input, with a named padding rule.

The rule decides what a network knows of the borders. TATS (section 3.1) shows that padding with zeros tells every
latent frame where in the clip it is, and that replicating the border frame does not: the tokenizer becomes
time-agnostic.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Padding = Literal["replicate", "zero", "reflect", "circular"]
Triple = int | tuple[int, int, int]


def pad_same(
    x: Tensor, kernel_size: tuple[int, int, int], stride: tuple[int, int, int], padding: Padding, fill: float = 0.0
) -> Tensor:
    """Pad each axis by `kernel_size - stride`, the odd one in front.

    Args:
        x: `[B, C, T, H, W]`.
        kernel_size: along `(T, H, W)`.
        stride: along `(T, H, W)`, at most the kernel size.
        padding: the rule. An axis too short to be reflected or wrapped around is replicated.
        fill: the value that `zero` pads with.

    Returns:
        `[B, C, T + k_t - s_t, H + k_h - s_h, W + k_w - s_w]`.
    """
    totals = [k - s for k, s in zip(kernel_size, stride, strict=True)]
    pads = [((total + 1) // 2, total // 2) for total in totals]  # (before, after) of T, H, W
    if not any(totals):
        return x
    if padding == "zero":
        return F.pad(x, _last_axis_first(pads), value=fill)
    if padding == "replicate":
        return F.pad(x, _last_axis_first(pads), mode="replicate")
    longest = [size - 1 if padding == "reflect" else size for size in x.shape[2:]]
    fits = [max(pad) <= limit for pad, limit in zip(pads, longest, strict=True)]
    x = F.pad(x, _last_axis_first([pad if ok else (0, 0) for pad, ok in zip(pads, fits, strict=True)]), mode=padding)
    if not all(fits):
        rest = [(0, 0) if ok else pad for pad, ok in zip(pads, fits, strict=True)]
        x = F.pad(x, _last_axis_first(rest), mode="replicate")
    return x


class SamePadConv3d(nn.Module):
    """Convolution whose output has `size / stride` entries along each axis.

    Pads by `kernel_size - stride` per axis, (ceil, floor) before and after, and convolves without further padding.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one number, or one each for time, height and width.
        stride: one number, or one each for time, height and width.
        padding: `replicate`, `zero`, `reflect` (axes too short for it are replicated) or `circular`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Triple = 3,
        stride: Triple = 1,
        padding: Padding = "replicate",
    ) -> None:
        super().__init__()
        self.kernel_size = _triple(kernel_size)
        self.stride = _triple(stride)
        self.padding: Padding = padding
        # `zero` pads features with 0, which for them is nothing; whoever lets this convolution see video sets black
        self.fill = 0.0
        self.conv = nn.Conv3d(in_channels, out_channels, self.kernel_size, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `[B, C_in, T, H, W]` to `[B, C_out, T / s_t, H / s_h, W / s_w]`."""
        return self.conv(pad_same(x, self.kernel_size, self.stride, self.padding, self.fill))

    def extra_repr(self) -> str:
        """Name the padding rule."""
        return f"padding={self.padding}"


class SamePadConvTranspose3d(nn.Module):
    """Transposed convolution whose output has `size * stride` entries along each axis.

    Pads its input as `SamePadConv3d` does, then crops `kernel_size - 1` entries at each end of the output. That gives
    `size * stride` for a kernel of 4 with strides 1 and 2, the two cases of TATS.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: 1 or 2, one number, or one each for time, height and width.
        padding: as for `SamePadConv3d`.
    """

    kernel_size = (4, 4, 4)

    def __init__(self, in_channels: int, out_channels: int, stride: Triple = 1, padding: Padding = "replicate") -> None:
        super().__init__()
        self.stride = _triple(stride)
        if not set(self.stride) <= {1, 2}:
            raise ValueError(f"stride={stride}: a transposed convolution of kernel 4 keeps or doubles, expected 1 or 2")
        self.padding: Padding = padding
        self.convt = nn.ConvTranspose3d(in_channels, out_channels, self.kernel_size, self.stride, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `[B, C_in, T, H, W]` to `[B, C_out, T * s_t, H * s_h, W * s_w]`."""
        return self.convt(pad_same(x, self.kernel_size, self.stride, self.padding))

    def extra_repr(self) -> str:
        """Name the padding rule."""
        return f"padding={self.padding}"


def _triple(value: Triple) -> tuple[int, int, int]:
    return (value, value, value) if isinstance(value, int) else (value[0], value[1], value[2])


def _last_axis_first(pads: list[tuple[int, int]]) -> list[int]:
    return [amount for pad in reversed(pads) for amount in pad]
