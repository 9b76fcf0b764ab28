"""3D convolutions that keep (or divide, or multiply) the size of their input, with a named padding rule.

The rule decides what a network knows of the borders. TATS (section 3.1) shows that padding with zeros tells every
latent frame where in the clip it is, and that replicating the border frame does not: the tokenizer becomes
time-agnostic. Its other variant, `real`, pads nothing: the clip brings its neighbouring frames along, and the
convolutions use them up.

The placement decides what a frame knows of the future. `same` pads time on both sides, `causal` (MAGVIT-v2) in front
alone, so that nothing that a layer gives depends on later frames and an image is a video of one frame.

A video may also pass in pieces, through a `Stream` that remembers for each layer what it still needs. Only the ends of
the video are padded then, and the pieces that come out make up what the whole would have given.
"""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Padding = Literal["replicate", "zero", "reflect", "circular", "real"]
TimePlacement = Literal["same", "causal"]
Triple = int | tuple[int, int, int]
Pads = tuple[int, int]  # entries before and after


class Stream:
    """What the layers of a network remember while one video passes through it in pieces.

    Set `is_last` for the last piece, which may be empty. A layer that has to see more before it can go on gives an
    empty piece, of 0 frames.
    """

    def __init__(self) -> None:
        self.is_last = False
        self._kept: dict[nn.Module, Tensor] = {}
        self._begun: set[nn.Module] = set()

    def has_begun(self, layer: nn.Module) -> bool:
        """Whether the beginning of the video has passed the layer."""
        return layer in self._begun

    def begin(self, layer: nn.Module) -> None:
        """Note that the beginning of the video passes the layer."""
        self._begun.add(layer)

    def join(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Put what the layer has kept in front of `x` `[B, C, T, H, W]`."""
        kept = self._kept.pop(layer, None)
        if kept is None:
            return x
        return torch.cat([kept, x], dim=2) if x.shape[2] else kept

    def keep(self, layer: nn.Module, x: Tensor) -> None:
        """Keep `x` for the layer's next piece."""
        if x.shape[2]:
            self._kept[layer] = x.clone()  # a view would keep the whole piece alive

    def delay(self, layer: nn.Module, x: Tensor, frames: int) -> Tensor:
        """Pass so many of the oldest frames on, so that a shorter way waits for a longer one; keep the others."""
        x = self.join(layer, x)
        self.keep(layer, x[:, :, frames:])
        return x[:, :, :frames]


def pad_same(
    x: Tensor,
    kernel_size: tuple[int, int, int],
    stride: tuple[int, int, int],
    padding: Padding,
    fill: float = 0.0,
    time_placement: TimePlacement = "same",
) -> Tensor:
    """Pad each axis by `kernel_size - stride`, the odd one in front; causal time by `kernel_size - 1` in front.

    Args:
        x: `[B, C, T, H, W]`.
        kernel_size: along `(T, H, W)`.
        stride: along `(T, H, W)`, at most the kernel size.
        padding: the rule. An axis too short to be reflected or wrapped around is replicated. So is causal time, where
            either would show a frame its future, and so is space under `real`, which leaves time as it is.
        fill: the value that `zero` pads with.
        time_placement: where time is padded.

    Returns:
        `[B, C, T + k_t - s_t, H + k_h - s_h, W + k_w - s_w]`; causal time has `T + k_t - 1` frames.
    """
    time, height, width = (_split(k - s) for k, s in zip(kernel_size, stride, strict=True))
    if time_placement == "causal":
        time = (kernel_size[0] - 1, 0)
    return _pad(x, (time, height, width), padding, fill, time_placement)


class _SamePadLayer(nn.Module):
    """What convolutions and transposed convolutions share: kernel, stride, padding, and how pieces are joined."""

    def __init__(
        self,
        kernel_size: Triple,
        stride: Triple,
        padding: Padding,
        time_placement: TimePlacement,
        is_2d: bool,
    ) -> None:
        super().__init__()
        self.kernel_size = (1, *_triple(kernel_size)[1:]) if is_2d else _triple(kernel_size)
        self.stride = _triple(stride)
        if any(k < s for k, s in zip(self.kernel_size, self.stride, strict=True)):
            raise ValueError(f"stride={self.stride} leaves gaps between kernels of {self.kernel_size}")
        self.padding: Padding = padding
        self.time_placement: TimePlacement = time_placement
        # `zero` pads features with 0, which for them is nothing; whoever lets this convolution see video sets black
        self.fill = 0.0
        time, height, width = (_split(k - s) for k, s in zip(self.kernel_size, self.stride, strict=True))
        self.time_pads = time
        self.space_pads = (height, width)

    def pad(self, x: Tensor) -> Tensor:
        """Pad the whole of `[B, C, T, H, W]`."""
        return _pad(x, (self.time_pads, *self.space_pads), self.padding, self.fill, self.time_placement)

    def pad_next(self, x: Tensor, stream: Stream) -> Tensor:
        """Join the next piece to what was kept and pad it, in time only where the video begins or ends.

        Returns:
            Padded entries, none of them before the layer has begun.
        """
        before, after = self.time_pads
        if x.shape[2]:
            x = _pad(x, ((0, 0), *self.space_pads), self.padding, self.fill, self.time_placement)
        x = stream.join(self, x)
        begins = not stream.has_begun(self)
        needed = before if self.padding == "reflect" and self.time_placement == "same" else 0
        if begins and x.shape[2] <= needed and not stream.is_last:
            stream.keep(self, x)
            return x[:, :, :0]
        stream.begin(self)
        pads = (before if begins else 0, after if stream.is_last else 0)
        return _pad(x, (pads, (0, 0), (0, 0)), self.padding, self.fill, self.time_placement)

    def extra_repr(self) -> str:
        """Name the padding rule."""
        return f"padding={self.padding}, time_placement={self.time_placement}"


class SamePadConv3d(_SamePadLayer):
    """Convolution whose output has `size / stride` entries along each axis.

    Pads by `kernel_size - stride` per axis, (ceil, floor) before and after, and convolves without further padding.
    Causal time is padded by `kernel_size - 1` in front: `1 + s k` frames become `1 + k`, and frame i sees none after
    frame `s i`. With `real`, time is not padded: `T` frames become `(T - kernel_size) // stride + 1`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one number, or one each for time, height and width.
        stride: one number, or one each for time, height and width.
        padding: `replicate`, `zero`, `reflect` (axes too short for it are replicated), `circular` or `real`.
        time_placement: `same`, or `causal`, which replicates the first frame where the rule asks for later ones.
        is_2d: the kernel covers a single frame.
        bias: whether there is one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Triple = 3,
        stride: Triple = 1,
        padding: Padding = "replicate",
        time_placement: TimePlacement = "same",
        is_2d: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(kernel_size, stride, padding, time_placement, is_2d)
        if time_placement == "causal":
            self.time_pads = (self.kernel_size[0] - 1, 0)
        self.conv = nn.Conv3d(in_channels, out_channels, self.kernel_size, self.stride, bias=bias)

    def inputs_of(self, first: int, last: int) -> tuple[int, int]:
        """First and last of the input's frames that the output's frames `first` to `last` see."""
        kernel, step, before = self.kernel_size[0], self.stride[0], self.time_pads[0]
        return first * step - before, last * step - before + kernel - 1

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """Convolve `[B, C_in, T, H, W]` to `[B, C_out, T / s_t, H / s_h, W / s_w]`.

        With a stream, `x` is the next piece of the input and the result the next piece of the output.
        """
        if stream is None:
            return self.conv(self.pad(x))
        joined = self.pad_next(x, stream)
        kernel, stride = self.kernel_size[0], self.stride[0]
        frames = max(0, (joined.shape[2] - kernel) // stride + 1)
        if stream.has_begun(self):
            stream.keep(self, joined[:, :, frames * stride :])
        if frames == 0:
            return x.new_zeros(
                len(x), self.conv.out_channels, 0, x.shape[3] // self.stride[1], x.shape[4] // self.stride[2]
            )
        return self.conv(joined[:, :, : (frames - 1) * stride + kernel])


class SamePadConvTranspose3d(_SamePadLayer):
    """Transposed convolution of kernel 4 whose output has `size * stride` entries along each axis.

    Pads its input as `SamePadConv3d` does, then crops 3 entries at each end of the output. Causal time takes `1 + k`
    frames to `1 + s k`: all of the padding is in front, and of the first `s` frames, which see the first input alone,
    the last is given. With `real`, time is not padded, and the frames that padding would have reached are left out.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: 1 or 2, one number, or one each for time, height and width.
        padding: as for `SamePadConv3d`.
        time_placement: as for `SamePadConv3d`.
        is_2d: the kernel covers a single frame.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Triple = 1,
        padding: Padding = "replicate",
        time_placement: TimePlacement = "same",
        is_2d: bool = False,
    ) -> None:
        if not set(_triple(stride)) <= {1, 2}:
            raise ValueError(f"stride={stride}: a transposed convolution of kernel 4 keeps or doubles, expected 1 or 2")
        super().__init__(4, stride, padding, time_placement, is_2d)
        kernel, step = self.kernel_size[0], self.stride[0]
        # Frames of the uncropped output, of which the first `step * inputs` are complete: where the output begins, and
        # how many of the complete ones come after its end.
        self.time_crop = (kernel - 1, (kernel - step) * step - (kernel - 1))
        if time_placement == "causal":
            self.time_pads = (kernel - step, 0)
            self.time_crop = ((kernel - step) * step + step - 1, 0)
        # time is cropped in `forward`, since its two ends differ
        space = (self.kernel_size[1] - 1, self.kernel_size[2] - 1)
        self.convt = nn.ConvTranspose3d(in_channels, out_channels, self.kernel_size, self.stride, padding=(0, *space))

    def inputs_of(self, first: int, last: int) -> tuple[int, int]:
        """First and last of the input's frames that the output's frames `first` to `last` see."""
        kernel, step, before = self.kernel_size[0], self.stride[0], self.time_pads[0]
        first, last = first + self.time_crop[0], last + self.time_crop[0]  # of the uncropped output
        return -((kernel - 1 - first) // step) - before, last // step - before

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """Convolve `[B, C_in, T, H, W]` to `[B, C_out, T * s_t, H * s_h, W * s_w]`.

        With a stream, `x` is the next piece of the input and the result the next piece of the output.
        """
        kernel, step = self.kernel_size[0], self.stride[0]
        first, last = self.time_crop
        if stream is None:
            padded = self.pad(x)
            if self.padding == "real":
                first, last = kernel - step, 0
            return self.convt(padded)[:, :, first : padded.shape[2] * step - last]
        overlap = (kernel - step) // step  # inputs that a later output still sees
        begins = not stream.has_begun(self)
        joined = self.pad_next(x, stream)
        first = first if begins else overlap * step
        stop = joined.shape[2] * step - (last if stream.is_last else 0)
        if stream.has_begun(self):
            stream.keep(self, joined[:, :, joined.shape[2] - overlap :])
        if stop <= first:
            return x.new_zeros(
                len(x), self.convt.out_channels, 0, x.shape[3] * self.stride[1], x.shape[4] * self.stride[2]
            )
        return self.convt(joined)[:, :, first:stop]


def _pad(
    x: Tensor,
    pads: tuple[Pads, Pads, Pads],
    padding: Padding,
    fill: float,
    time_placement: TimePlacement,
) -> Tensor:
    """Pad time, height and width by given numbers of entries, each by what the rule means for it."""
    in_space = "replicate" if padding == "real" else padding
    in_time = "replicate" if time_placement == "causal" and padding in ("reflect", "circular") else in_space
    if padding == "real":
        pads = ((0, 0), *pads[1:])
    if in_time == in_space:
        return _pad_axes(x, pads, in_space, fill)
    x = _pad_axes(x, (pads[0], (0, 0), (0, 0)), in_time, fill)
    return _pad_axes(x, ((0, 0), *pads[1:]), in_space, fill)


def _pad_axes(x: Tensor, pads: tuple[Pads, Pads, Pads], rule: str, fill: float) -> Tensor:
    if not any(map(any, pads)):
        return x
    if rule == "zero":
        return F.pad(x, _last_axis_first(pads), value=fill)
    if rule == "replicate":
        return F.pad(x, _last_axis_first(pads), mode="replicate")
    longest = [size - 1 if rule == "reflect" else size for size in x.shape[2:]]
    fits = [max(pad) <= limit for pad, limit in zip(pads, longest, strict=True)]
    x = F.pad(x, _last_axis_first([pad if ok else (0, 0) for pad, ok in zip(pads, fits, strict=True)]), mode=rule)
    if not all(fits):
        rest = [(0, 0) if ok else pad for pad, ok in zip(pads, fits, strict=True)]
        x = F.pad(x, _last_axis_first(rest), mode="replicate")
    return x


def _split(total: int) -> Pads:
    return (total + 1) // 2, total // 2


def _triple(value: Triple) -> tuple[int, int, int]:
    return (value, value, value) if isinstance(value, int) else (value[0], value[1], value[2])


def _last_axis_first(pads: Iterable[Pads]) -> list[int]:
    return [amount for pad in reversed(list(pads)) for amount in pad]
