"""What `VQGAN3D` asks of an encoder and a decoder, and what it can tell from their layers alone.

Layers that mix frames say with `inputs_of` which frames of their input a range of their output sees. Going through them
from the last to the first gives the reach of a network.
"""

import math
from abc import ABC, abstractmethod

from einops import rearrange
from torch import Tensor, nn

from models.blocks.conv import Padding, SamePadConv3d, Stream, TimePlacement
from models.blocks.norm import FrameGroupNorm


class VideoNetwork(nn.Module):
    """An encoder or a decoder; its layers are registered in the order in which they are used.

    Attributes:
        downsample: Frames, rows and columns that one latent covers.
        padding: How its convolutions continue their input past the borders.
        time_placement: `causal` networks take `1 + k` latents for `1 + f k` frames, the first of each standing alone.
    """

    downsample: tuple[int, int, int]
    padding: Padding
    time_placement: TimePlacement

    @property
    def is_causal(self) -> bool:
        """Whether nothing depends on later frames."""
        return self.time_placement == "causal"

    def inputs_of(self, first: int, last: int) -> tuple[int, int]:
        """First and last of the input's frames that the output's frames `first` to `last` see."""
        for layer in reversed(list(self.modules())[1:]):
            inputs_of = getattr(layer, "inputs_of", None)
            if inputs_of is not None:
                first, last = inputs_of(first, last)
        return first, last

    def whole_clip_reason(self) -> str | None:
        """Why every output depends on the whole clip, so that it cannot pass in pieces; None if it does not."""
        layers = list(self.modules())
        if any(isinstance(layer, nn.GroupNorm) and not isinstance(layer, FrameGroupNorm) for layer in layers):
            return "its group norm takes statistics over all frames"
        if self.padding == "circular" and not self.is_causal:
            return "padding='circular' shows the first frames the last ones"
        if self.padding == "real":
            return "padding='real' uses up frames at both ends of what it is given"
        return None


class VideoEncoder(VideoNetwork, ABC):
    """Video `[B, 3, T, H, W]` in the tokenizer's native range to features `[B, out_channels, t, h, w]`.

    Attributes:
        out_channels: Channels of the features.
        conv_first: The layer that sees the video.
    """

    out_channels: int
    conv_first: SamePadConv3d

    @abstractmethod
    def forward(self, video: Tensor, stream: Stream | None = None) -> Tensor:
        """Encode; with a stream the next piece of a video to the next piece of its features."""

    def pad_video_with(self, black: float) -> None:
        """Set the value that `zero` padding continues the video with."""
        self.conv_first.fill = black

    def margin_frames(self) -> tuple[int, int]:
        """Frames before and after the frames of a latent that it sees as well."""
        own = 0 if self.is_causal else self.downsample[0] - 1
        first, last = self.inputs_of(0, 0)
        return -first, max(0, last - own)

    def context_frames(self) -> int | None:
        """How many frames around a window its latents depend on, to either side; None for the whole clip.

        In evaluation, encoding a window with this margin and dropping the margin's latents equals encoding the whole
        clip. A multiple of the temporal factor.
        """
        if self.whole_clip_reason() is not None:
            return None
        factor = self.downsample[0]
        return math.ceil(max(self.margin_frames()) / factor) * factor

    def valid_frames(self, frames: int) -> bool:
        """Whether a clip of so many frames can be encoded."""
        least, factor = self._least_frames(), self.downsample[0]
        return frames >= least and (frames - least) % factor == 0

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent grid `(t, h, w)` of a clip.

        Raises:
            ValueError: if a size does not fit; the message names the nearest that do.
        """
        least, (factor, *_) = self._least_frames(), self.downsample
        if not self.valid_frames(frames):
            rule = f"multiples of {factor}" if least == factor else f"{least % factor or factor} + {factor}k frames"
            if self.padding == "real":
                rule = f"{least} + {factor}k frames, most of them the neighbours that padding='real' uses up"
            raise ValueError(_does_not_fit("frames", frames, rule, least, factor, "--data.num_frames"))
        for name, size, step in (("height", height, self.downsample[1]), ("width", width, self.downsample[2])):
            if size < 1 or size % step:
                rule = f"multiples of {step}"
                raise ValueError(_does_not_fit(name, size, rule, step, step, "--data.resolution"))
        return 1 + (frames - least) // factor, height // self.downsample[1], width // self.downsample[2]

    def _least_frames(self) -> int:
        """Frames of the shortest clip, which gives one latent."""
        own = 1 if self.is_causal else self.downsample[0]
        return own + (sum(self.margin_frames()) if self.padding == "real" else 0)


class VideoDecoder(VideoNetwork, ABC):
    """Features or latents to video `[B, 3, T, H, W]` in the tokenizer's native range, not clamped.

    Attributes:
        in_channels: Channels of its input.
        takes_latents: Whether its input is the latents, and not what a convolution of kernel 1 makes of them.
    """

    in_channels: int
    takes_latents: bool

    @abstractmethod
    def forward(self, features: Tensor, stream: Stream | None = None) -> Tensor:
        """Decode; with a stream the next piece of the features to the next piece of the video."""

    def margin_latents(self) -> tuple[int, int]:
        """Latents before and after a latent that its frames see as well."""
        later = self.downsample[0] - 1
        first, last = self.inputs_of(-later, 0) if self.is_causal else self.inputs_of(0, later)
        return -first, last

    def frames_of(self, latents: int) -> int:
        """Frames of so many latents."""
        factor = self.downsample[0]
        if self.padding == "real":
            latents -= sum(self.margin_latents())
        return 1 + (latents - 1) * factor if self.is_causal else latents * factor

    def without_partial_latents(self, video: Tensor, latents: int) -> Tensor:
        """Of what `real` padding leaves of the video of so many latents, the frames of whole latents.

        Raises:
            ValueError: if there is no such frame.
        """
        frames = self.frames_of(latents)
        before, after = self.margin_latents()
        if frames < 1:
            raise ValueError(f"{latents} latent frames are too few for padding='real': expected {before + after + 1}.")
        factor = self.downsample[0]
        last = (latents - 1 - after) * factor + (0 if self.is_causal else factor - 1)  # to be given
        there = last
        while self.inputs_of(there + 1, there + 1)[1] < latents:
            there += 1
        end = video.shape[2] - (there - last)
        return video[:, :, end - frames : end]


def to_patches(video: Tensor, size: int) -> Tensor:
    """Patches of `size` x `size` pixels as channels: `[B, C, T, H, W]` to `[B, C size^2, T, H / size, W / size]`."""
    return rearrange(video, "b c t (h p) (w q) -> b (c p q) t h w", p=size, q=size)


def from_patches(x: Tensor, size: int) -> Tensor:
    """Channels as patches: `[B, C size^2, T, H, W]` to `[B, C, T, H size, W size]`."""
    return rearrange(x, "b (c p q) t h w -> b c t (h p) (w q)", p=size, q=size)


def _does_not_fit(name: str, size: int, rule: str, least: int, step: int, option: str) -> str:
    lower = least + (size - least) // step * step
    nearest = f"{lower} or {lower + step}" if lower >= least else f"{least}"
    return f"{name}={size} does not fit this tokenizer: it takes {rule}. Nearest: {nearest} ({option})."
