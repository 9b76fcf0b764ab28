"""The 3D-VQGAN: an encoder, a quantizer and a decoder behind one interface."""

import copy
from collections.abc import Iterable, Iterator

import torch
from einops import rearrange
from torch import Tensor, nn

from models.blocks.conv import SamePadConv3d, Stream
from models.tokenizers.networks import VideoDecoder, VideoEncoder, VideoNetwork
from models.tokenizers.quantizers import Encoded, Quantizer, code_counts, usage_statistics


class VQGAN3D(nn.Module):
    """Video tokenizer (TATS, section 3.1; MAGVIT, section 3.1; MAGVIT-v2, section 3.2; W.A.L.T, section 3.1).

    Video comes and goes in [-1, 1]. The networks and their losses work in the tokenizer's native range: `to_native` and
    `from_native` convert, `encode` and `decode` do so by themselves.

    Videos longer than `piece_frames` are encoded and decoded in pieces, if the networks allow it and are in evaluation.
    Their layers remember what they need, so the result is that of the whole video and the memory that of a piece.
    `iter_encode` and `iter_decode` do not even need the video at once.

    Args:
        encoder: Video to features.
        quantizer: Features to latents, and to codes unless it is continuous.
        decoder: Latents to video; has the encoder's downsample factors.
        pixel_range: Native values of black and white; [-0.5, 0.5] for TATS, [0, 1] for MAGVIT.
        piece_frames: Frames that pass through the networks at once when a video passes in pieces.
        channels_last: Keep the weights, and with them the maps, in memory with the channels last: the same numbers, on
            CPUs sooner where channels are few.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        quantizer: Quantizer,
        decoder: VideoDecoder,
        pixel_range: tuple[float, float] = (-0.5, 0.5),
        piece_frames: int = 16,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        theirs, ours = (encoder.downsample, encoder.time_placement), (decoder.downsample, decoder.time_placement)
        if theirs[0] != ours[0]:
            raise ValueError(f"encoder.downsample={theirs[0]}, but decoder.downsample={ours[0]}")
        if theirs[1] != ours[1]:
            raise ValueError(f"encoder.time_placement={theirs[1]}, but decoder.time_placement={ours[1]}")
        if decoder.takes_latents and decoder.in_channels != quantizer.dim:
            raise ValueError(
                f"decoder.latent_dim={decoder.in_channels}, but the quantizer's latents have {quantizer.dim} channels"
            )
        if piece_frames < 1:
            raise ValueError(f"piece_frames={piece_frames}: expected at least 1")
        self.encoder = encoder
        self.pre_vq_conv = SamePadConv3d(encoder.out_channels, quantizer.in_dim, kernel_size=1)
        self.quantizer = quantizer
        self.post_vq_conv = (
            nn.Identity() if decoder.takes_latents else SamePadConv3d(quantizer.dim, decoder.in_channels, kernel_size=1)
        )
        self.decoder = decoder
        self.pixel_range = (pixel_range[0], pixel_range[1])
        self.piece_frames = piece_frames
        encoder.pad_video_with(self.pixel_range[0])
        if channels_last:
            self.to(memory_format=torch.channels_last_3d)

    @property
    def downsample(self) -> tuple[int, int, int]:
        """Frames, rows and columns that one code covers."""
        return self.encoder.downsample

    @property
    def codebook_size(self) -> int | None:
        """Number of codes; None if the latents are continuous."""
        return self.quantizer.codebook_size

    def unrounded(self) -> "VQGAN3D":
        """The same networks, not copied, without the choice of a code: for models of real-valued latents.

        Raises:
            ValueError: if the decoder has learned from codebook entries alone.
        """
        other = copy.copy(self)
        other._modules = self._modules | {"quantizer": self.quantizer.unrounded()}  # a copy shares the table itself
        return other

    def forward(
        self, video: Tensor, generator: torch.Generator | None = None, is_image: Tensor | None = None
    ) -> tuple[Tensor, Encoded]:
        """Reconstruct, as training needs it.

        Args:
            video: `[B, 3, T, H, W]` in [-1, 1].
            generator: for the quantizer's random choices.
            is_image: as for `encode`; the reconstruction of such a row is that of its image, repeated.

        Returns:
            The reconstruction of `reconstructed_frames(video)` in the native range, not clamped, and what `encode`
            returns.
        """
        encoded = self.encode(video, generator, is_image)
        return hold_images(self.decode_native(encoded.latents), is_image), encoded

    def encode(
        self, video: Tensor, generator: torch.Generator | None = None, is_image: Tensor | None = None
    ) -> Encoded:
        """Encode and quantise.

        Args:
            video: `[B, 3, T, H, W]` in [-1, 1].
            generator: for the quantizer's random choices in training; equal on all ranks.
            is_image: `[B]` bool, rows of a causal tokenizer's batch that hold an image in their first frame. What is
                behind it is not looked at: the latent of the image is repeated, so that losses, statistics and the
                codebook take such a row for as much as a video, and for nothing but its image.

        Returns:
            Latents `[B, D, t, h, w]`, codes `[B, t, h, w]` if there are any, weighted loss terms and statistics. Those
            of a video that passed in pieces are means over its latents, but the use of codes is that of them all.

        Raises:
            ValueError: if the clip's size does not fit; the message names the nearest sizes that do. If there are
                images besides longer videos, and the tokenizer is not causal.
        """
        grid = self.latent_shape(*video.shape[2:])
        if is_image is not None and not self.encoder.is_causal and grid[0] > 1 and bool(is_image.any()):
            raise ValueError(
                f"The batch holds images besides videos, and {type(self.encoder).__name__} is not causal: only a "
                "causal one knows an image from the first frame of a video. Leave the images out (--data.image_ratio)."
            )
        if is_image is not None or not self._passes_in_pieces(self.encoder, video.shape[2]):
            features = self.encoder(self.to_native(hold_images(video, is_image)))  # [B, C, t, h, w]
            return self.quantizer(hold_images(self.pre_vq_conv(features), is_image), generator)
        return self._joined(self.iter_encode(video), len(video), grid)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `[B, D, t, h, w]` to video `[B, 3, T, H, W]`, clamped to [-1, 1]."""
        frames = self.decoder.frames_of(latents.shape[2])
        if not self._passes_in_pieces(self.decoder, frames):
            return self.from_native(self.decode_native(latents)).clamp(-1, 1)
        return self._concatenated(self.iter_decode(latents), frames)

    def decode_native(self, latents: Tensor) -> Tensor:
        """Decode latents `[B, D, t, h, w]` to `[B, 3, T, H, W]` in the native range, not clamped: what losses see."""
        frames = self.decoder.frames_of(latents.shape[2])
        if not self._passes_in_pieces(self.decoder, frames):
            return self.decoder(self.post_vq_conv(latents))
        return self._concatenated(self._decoded_pieces([latents]), frames)

    # Long videos

    def iter_encode(self, frames: Tensor | Iterable[Tensor]) -> Iterator[Encoded]:
        """Encode a video of any length in pieces, at constant memory.

        Only the video's two ends are padded: the pieces' latents are those of the whole video.

        Args:
            frames: `[B, 3, T, H, W]` in [-1, 1], or an iterable of pieces of it, of any number of frames.

        Yields:
            What `encode` returns, of the next latents; their number varies.

        Raises:
            ValueError: if the network cannot do so, with the reason, or the number of frames does not fit.
        """
        self._refuse_pieces(self.encoder, "iter_encode")
        stream, count = Stream(), 0
        for piece, is_last in pieces([frames] if isinstance(frames, Tensor) else frames, self.piece_frames):
            count += piece.shape[2]
            if is_last or isinstance(frames, Tensor):
                self.latent_shape(frames.shape[2] if isinstance(frames, Tensor) else count, *piece.shape[3:])
            stream.is_last = is_last
            features = self.encoder(self.to_native(piece), stream)
            if features.shape[2]:
                yield self.quantizer(self.pre_vq_conv(features))

    def iter_decode(self, latents: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode any number of latents in pieces, at constant memory.

        Args:
            latents: `[B, D, t, h, w]`, or an iterable of pieces of it, of any number of latent frames.

        Yields:
            The next frames `[B, 3, n, H, W]` in [-1, 1], of varying number n; together those of the whole video.

        Raises:
            ValueError: if the network cannot do so, with the reason.
        """
        for frames in self._decoded_pieces([latents] if isinstance(latents, Tensor) else latents):
            yield self.from_native(frames).clamp(-1, 1)

    def _decoded_pieces(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        self._refuse_pieces(self.decoder, "iter_decode")
        stream = Stream()
        for piece, is_last in pieces(latents, max(1, self.piece_frames // self.downsample[0])):
            stream.is_last = is_last
            frames = self.decoder(self.post_vq_conv(piece), stream)
            if frames.shape[2]:
                yield frames

    def _passes_in_pieces(self, network: VideoNetwork, frames: int) -> bool:
        longest = self.piece_frames + network.is_causal  # one frame more, which stands alone, is no reason for pieces
        return not self.training and frames > longest and network.whole_clip_reason() is None

    def _refuse_pieces(self, network: VideoNetwork, method: str) -> None:
        reason = network.whole_clip_reason()
        if reason is not None:
            raise ValueError(f"{method}: {type(network).__name__} needs the whole clip, since {reason}.")
        if self.training:
            raise ValueError(f"{method}: in training, layers take statistics over the whole clip. Call eval() first.")

    def _joined(self, encoded: Iterator[Encoded], batch_size: int, grid: tuple[int, int, int]) -> Encoded:
        """What `encode` returns, from its pieces."""
        codes: Tensor | None = None
        means: dict[str, Tensor] = {}
        position = 0
        for piece in encoded:
            if position == 0:
                latents = piece.latents.new_empty(batch_size, piece.latents.shape[1], *grid)
                codes = None if piece.codes is None else piece.codes.new_empty(batch_size, *grid)
            frames = piece.latents.shape[2]
            latents[:, :, position : position + frames] = piece.latents
            if codes is not None and piece.codes is not None:
                codes[:, position : position + frames] = piece.codes
            for name, value in (piece.losses | piece.statistics).items():
                means[name] = means.get(name, 0) + value * (frames / grid[0])
            position += frames
        statistics = {name: means[name] for name in piece.statistics}
        if codes is not None and self.codebook_size is not None:
            statistics |= usage_statistics(code_counts(codes, self.codebook_size))
        return Encoded(latents, codes, {name: means[name] for name in piece.losses}, statistics)

    @staticmethod
    def _concatenated(videos: Iterator[Tensor], frames: int) -> Tensor:
        """One video from its pieces, without a second copy of it."""
        position = 0
        for piece in videos:
            if position == 0:
                video = piece.new_empty(*piece.shape[:2], frames, *piece.shape[3:])
            video[:, :, position : position + piece.shape[2]] = piece
            position += piece.shape[2]
        return video

    # Images

    def encode_images(self, images: Tensor) -> Encoded:
        """Encode each frame as a video of its own.

        A causal tokenizer gives an image the latent that it gives the first frame of any video: a batch may as well
        hold images as the first frames of clips.

        Args:
            images: `[B, 3, n, H, W]` in [-1, 1].

        Returns:
            As `encode`, with n latent frames.

        Raises:
            ValueError: if the tokenizer does not take videos of one frame.
        """
        encoded = self.encode(rearrange(images, "b c n h w -> (b n) c 1 h w"))
        latents = rearrange(encoded.latents, "(b n) d 1 h w -> b d n h w", b=len(images))
        codes = None if encoded.codes is None else rearrange(encoded.codes, "(b n) 1 h w -> b n h w", b=len(images))
        return Encoded(latents, codes, encoded.losses, encoded.statistics)

    def decode_images(self, latents: Tensor) -> Tensor:
        """Decode each latent frame of `[B, D, n, h, w]` as an image of its own: `[B, 3, n, H, W]` in [-1, 1]."""
        images = self.decode(rearrange(latents, "b d n h w -> (b n) d 1 h w"))
        return rearrange(images, "(b n) c 1 h w -> b c n h w", b=len(latents))

    # What others need to know

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

    def reconstructed_frames(self, video: Tensor) -> Tensor:
        """The frames of `[B, 3, T, H, W]` that its reconstruction shows: all but the neighbours for `real` padding."""
        frames, factor = self.decoder.frames_of(self.latent_shape(*video.shape[2:])[0]), self.downsample[0]
        first = self.encoder.margin_frames()[0] if self.encoder.padding == "real" else 0
        first += self.decoder.margin_latents()[0] * factor if self.decoder.padding == "real" else 0
        return video[:, :, first : first + frames]

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent grid `(t, h, w)` of a clip; ValueError if the clip does not fit."""
        return self.encoder.latent_shape(frames, height, width)

    def valid_frames(self, frames: int) -> bool:
        """Whether a clip of so many frames can be encoded."""
        return self.encoder.valid_frames(frames)

    def context_frames(self) -> int | None:
        """How many frames around a window its codes depend on, to either side; None for the whole clip."""
        return self.encoder.context_frames()


def hold_images(x: Tensor, is_image: Tensor | None) -> Tensor:
    """Of `[B, C, T, H, W]`, show in each row that is an image (`[B]` bool) its first frame all the time."""
    return x if is_image is None else torch.where(is_image.view(-1, 1, 1, 1, 1), x[:, :, :1], x)


def pieces(videos: Iterable[Tensor], size: int) -> Iterator[tuple[Tensor, bool]]:
    """Cut a video into pieces of equal size.

    Args:
        videos: consecutive parts `[B, C, T, H, W]` of one video, of any number of frames.
        size: frames of a piece; the last one may have fewer.

    Yields:
        A piece, and whether it is the last.

    Raises:
        ValueError: if there are no frames.
    """
    waiting: Tensor | None = None
    for part in videos:
        rest = part if waiting is None else torch.cat([waiting, part], dim=2)
        while rest.shape[2] > size:  # strictly: the last piece must not be empty
            yield rest[:, :, :size], False
            rest = rest[:, :, size:]
        waiting = rest
    if waiting is None or waiting.shape[2] == 0:
        raise ValueError("A video in pieces has to have at least one frame.")
    yield waiting, True
