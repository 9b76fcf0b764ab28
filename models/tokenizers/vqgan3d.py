"""The 3D-VQGAN: an encoder, a quantizer and a decoder behind one interface."""

import torch
from torch import Tensor, nn

from models.blocks.conv import SamePadConv3d
from models.tokenizers.quantizers import Encoded, Quantizer
from models.tokenizers.time_agnostic import TimeAgnosticDecoder, TimeAgnosticEncoder


class VQGAN3D(nn.Module):
    """Video tokenizer (TATS, section 3.1).

    Video comes and goes in [-1, 1]. The networks and their losses work in the tokenizer's native range: `to_native` and
    `from_native` convert, `encode` and `decode` do so by themselves.

    Args:
        encoder: Video to features.
        quantizer: Features to latents, and to codes unless it is continuous.
        decoder: Features to video; has the encoder's downsample factors.
        pixel_range: Native values of black and white; [-0.5, 0.5] for TATS.
    """

    def __init__(
        self,
        encoder: TimeAgnosticEncoder,
        quantizer: Quantizer,
        decoder: TimeAgnosticDecoder,
        pixel_range: tuple[float, float] = (-0.5, 0.5),
    ) -> None:
        super().__init__()
        if encoder.downsample != decoder.downsample:
            raise ValueError(f"encoder.downsample={encoder.downsample}, but decoder.downsample={decoder.downsample}")
        self.encoder = encoder
        self.pre_vq_conv = SamePadConv3d(encoder.out_channels, quantizer.in_dim, kernel_size=1)
        self.quantizer = quantizer
        self.post_vq_conv = SamePadConv3d(quantizer.dim, decoder.in_channels, kernel_size=1)
        self.decoder = decoder
        self.pixel_range = (pixel_range[0], pixel_range[1])
        encoder.pad_video_with(self.pixel_range[0])

    @property
    def downsample(self) -> tuple[int, int, int]:
        """Frames, rows and columns that one code covers."""
        return self.encoder.downsample

    @property
    def codebook_size(self) -> int | None:
        """Number of codes; None if the latents are continuous."""
        return self.quantizer.codebook_size

    def forward(self, video: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Encoded]:
        """Reconstruct, as training needs it.

        Args:
            video: `[B, 3, T, H, W]` in [-1, 1].
            generator: for the quantizer's random choices.

        Returns:
            The reconstruction `[B, 3, T, H, W]` in the native range, not clamped, and what `encode` returns.
        """
        encoded = self.encode(video, generator)
        return self.decode_native(encoded.latents), encoded

    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Encoded:
        """Encode and quantise.

        Args:
            video: `[B, 3, T, H, W]` in [-1, 1].
            generator: for the quantizer's random choices in training; equal on all ranks.

        Returns:
            Latents `[B, D, t, h, w]`, codes `[B, t, h, w]` if there are any, weighted loss terms and statistics.

        Raises:
            ValueError: if the clip's size does not fit; the message names the nearest sizes that do.
        """
        self.latent_shape(*video.shape[2:])
        features = self.encoder(self.to_native(video))  # [B, C, t, h, w]
        return self.quantizer(self.pre_vq_conv(features), generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `[B, D, t, h, w]` to video `[B, 3, T, H, W]`, clamped to [-1, 1]."""
        return self.from_native(self.decode_native(latents)).clamp(-1, 1)

    def decode_native(self, latents: Tensor) -> Tensor:
        """Decode latents `[B, D, t, h, w]` to `[B, 3, T, H, W]` in the native range, not clamped: what losses see."""
        return self.decoder(self.post_vq_conv(latents))

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Look up codes `[B, t, h, w]` as latents `[B, D, t, h, w]`; ValueError if there are no codes."""
        return self.quantizer.codes_to_latents(codes)

    def latents_to_codes(self, latents: Tensor) -> Tensor:
        """Codes `[B, t, h, w]` of latents `[B, D, t, h, w]`; ValueError if there are no codes."""
        return self.quantizer.latents_to_codes(latents)

    def to_native(self, video: Tensor) -> Tensor:
        """Map [-1, 1] to the native range."""
        low, high = self.pixel_range
        return video * ((high - low) / 2) + (high + low) / 2

    def from_native(self, pixels: Tensor) -> Tensor:
        """Map the native range to [-1, 1]."""
        low, high = self.pixel_range
        return (pixels - (high + low) / 2) * (2 / (high - low))

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent grid `(t, h, w)` of a clip; ValueError if the clip does not fit."""
        return self.encoder.latent_shape(frames, height, width)

    def valid_frames(self, frames: int) -> bool:
        """Whether a clip of so many frames can be encoded."""
        return self.encoder.valid_frames(frames)

    def context_frames(self) -> int | None:
        """How many frames around a window its codes depend on, to either side; None for the whole clip."""
        return self.encoder.context_frames()
