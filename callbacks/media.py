"""Videos as things to look at: grids, animated GIFs, MP4 files, contact sheets, TensorBoard summaries.

Videos come as `[B, 3, T, H, W]`, float in [-1, 1] or uint8; what is written are frames `[T, H, W, 3]` uint8, RGB.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

BORDER_PIXELS = 2
BORDER_COLOUR = 255  # white: generated videos are darker more often than not
MIN_SHEET_PIXELS = 64
MIN_CAPTIONED_PIXELS = 128  # a line of about 20 characters
CAPTION_LINES = 2
CAPTION_COLOUR = (60, 60, 60)
MAX_PALETTE_PIXELS = 1 << 18  # enough to find 255 colours in; a long grid of videos has tens of millions of pixels


def to_uint8(video: Tensor) -> Tensor:
    """Map a float video in [-1, 1] to uint8 in host memory: `round((x + 1) * 127.5)`.

    Values outside are clamped, halves are rounded to even, so that `u / 127.5 - 1` comes back as `u` exactly. NaN is
    black: a run that diverged still has pictures. A uint8 video is passed through.

    Args:
        video: `[B, 3, T, H, W]` floating in [-1, 1], or uint8.

    Returns:
        `[B, 3, T, H, W]` uint8 on the CPU.
    """
    if video.dtype == torch.uint8:
        return video.detach().cpu()
    video = video.detach().float().nan_to_num(nan=-1.0).clamp(-1, 1)
    return ((video + 1) * 127.5).round().to(torch.uint8).cpu()


def tile(video: Tensor, columns: int, captions: Sequence[str] = ()) -> np.ndarray:
    """Lay videos out as a grid that moves, row by row, with a thin border around each.

    Args:
        video: `[B, 3, T, H, W]` floating in [-1, 1], or uint8.
        columns: videos in a row.
        captions: what stands below each video, `B` texts or none; two lines at most. Small videos that have one are
            enlarged by a whole factor, to at least 128 pixels.

    Returns:
        `[T, H', W', 3]` uint8 with `H' = rows * (H + 2) + 2` and `W' = columns * (W + 2) + 2`; cells without a video
        have the border's colour. Captions add to `H`.
    """
    pixels = to_uint8(video)
    if any(captions):
        pixels = enlarged(pixels, MIN_CAPTIONED_PIXELS)
        strips = torch.stack([caption_strip(caption, pixels.shape[4], CAPTION_LINES) for caption in captions])
        pixels = torch.cat([pixels, strips[:, :, None].expand(-1, -1, pixels.shape[2], -1, -1)], dim=3)
    rows = math.ceil(len(pixels) / columns)
    pixels = F.pad(pixels, (BORDER_PIXELS, 0, BORDER_PIXELS, 0), value=BORDER_COLOUR)  # left and top of each video
    empty = pixels.new_full((rows * columns - len(pixels), *pixels.shape[1:]), BORDER_COLOUR)
    grid = rearrange(torch.cat([pixels, empty]), "(r c) rgb t h w -> rgb t (r h) (c w)", c=columns)
    grid = F.pad(grid, (0, BORDER_PIXELS, 0, BORDER_PIXELS), value=BORDER_COLOUR)  # right and bottom of the grid
    return rearrange(grid, "rgb t h w -> t h w rgb").contiguous().numpy()


def enlarged(pixels: Tensor, least: int) -> Tensor:
    """Repeat pixels `[B, 3, T, H, W]` by a whole factor, so that the smaller side has at least so many."""
    scale = math.ceil(least / min(pixels.shape[3:]))  # 1 if they are large enough
    return pixels.repeat_interleave(scale, dim=3).repeat_interleave(scale, dim=4)


def caption_strip(caption: str, width: int, num_lines: int) -> Tensor:
    """Write a caption, in as many lines as it needs, at most `num_lines`; what is left over becomes an ellipsis.

    Args:
        caption: the text.
        width: pixels of the strip.
        num_lines: lines that the strip has room for.

    Returns:
        `[3, h, width]` uint8, `h` a function of `num_lines`.
    """
    font = ImageFont.load_default()
    left, _, right, bottom = font.getbbox("abcdefghijklmnopqrstuvwxyz")
    line_height = math.ceil(bottom) + 2
    num_characters = max(1, math.floor((width - 2) * 26 / (right - left)))
    lines = textwrap.wrap(caption, num_characters, max_lines=num_lines, placeholder=" …")
    strip = Image.new("RGB", (width, num_lines * line_height), (BORDER_COLOUR,) * 3)
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        draw.text((1, number * line_height), line, CAPTION_COLOUR, font)
    return torch.from_numpy(np.array(strip)).permute(2, 0, 1)


def gif_bytes(frames: np.ndarray, fps: float) -> bytes:
    """Encode frames as an animated GIF that loops for ever.

    One palette of 255 colours is made for the whole video, and no pixel is dithered: what stands still does not
    flicker, and is stored once (as the 256th entry, transparent). A frame that equals its predecessor prolongs it
    instead of being stored.

    Args:
        frames: `[T, H, W, 3]` uint8.
        fps: frames a second; GIF counts in hundredths of a second, and browsers slow down above 50.

    Returns:
        The file's bytes, which begin with `GIF89a`.
    """
    colours = frames.reshape(-1, 3)
    stride = len(colours) // MAX_PALETTE_PIXELS | 1  # odd, so as not to walk down the same columns of every frame
    palette = Image.fromarray(colours[None, ::stride]).quantize(255, Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    data = io.BytesIO()
    duration_ms = max(20, 10 * round(100 / fps))
    images[0].save(
        data,
        "GIF",
        save_all=True,
        append_images=images[1:],
        duration=duration_ms,
        loop=0,
        optimize=False,  # would renumber the colours of each frame, which costs more than it saves
    )
    return data.getvalue()


class MP4Writer:
    """Writes frames, as they come, as an MP4 that browsers play: H.264 (crf 18) where FFmpeg has libx264, else MPEG-4.

    Missing folders are made. The file appears under its name when it is complete, on leaving the context without an
    error; an existing one is replaced. Odd sizes are made even, as yuv420p asks for, by repeating the last row or
    column.

    Args:
        path: The file to write.
        fps: Frames a second.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        self.path = Path(path)
        self.rate = Fraction(fps).limit_denominator(1001)
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        self._stream: Any = None
        self._reformatter = VideoReformatter()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._partial), "w", format="mp4", options={"movflags": "+faststart"})
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append frames `[n, H, W, 3]` uint8, all of one size."""
        _, height, width, _ = frames.shape
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._new_stream(*frames.shape[1:3])
        for frame in frames:
            # One thread: a process that is forked while an idle converter has threads would wait for them for ever.
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            yuv = self._reformatter.reformat(rgb, format="yuv420p", threads=1)
            self._container.mux(self._stream.encode(yuv))

    def __exit__(self, kind: object, *about: object) -> None:
        try:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode())  # what the encoder holds back
            self._container.close()
            if kind is None:
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    def _new_stream(self, height: int, width: int) -> Any:
        if "libx264" in av.codecs_available:
            stream: Any = self._container.add_stream("libx264", rate=self.rate, options={"crf": "18"})
        else:
            # constant quality 2 of 1..31, in FFmpeg's units of 118
            options = {"flags": "+qscale", "global_quality": "236"}
            stream = self._container.add_stream("mpeg4", rate=self.rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        return stream


def write_mp4(path: str | Path, frames: np.ndarray | Tensor, fps: float) -> None:
    """Write frames as an MP4, see `MP4Writer`.

    Args:
        path: the file to write; an existing one is replaced.
        frames: `[T, H, W, 3]` uint8; or a video as models make it, a tensor `[3, T, H, W]` as `to_uint8` takes it.
        fps: frames a second.
    """
    if isinstance(frames, Tensor):
        frames = to_uint8(frames).permute(1, 2, 3, 0).numpy()
    with MP4Writer(path, fps) as writer:
        writer.write(frames)


def contact_sheet(video: Tensor, columns: int = 8, captions: Sequence[str] = ()) -> Image.Image:
    """Show videos as still frames: one video a row, evenly spaced frames, the first and the last among them.

    Small frames are enlarged by a whole factor, without smoothing, to at least 64 pixels.

    Args:
        video: `[B, 3, T, H, W]` floating in [-1, 1], or uint8.
        columns: frames in a row; all of them if the video has fewer.
        captions: a line above each row, `B` texts or none.

    Returns:
        An RGB image of `B` rows.
    """
    pixels = to_uint8(video)
    num_frames = pixels.shape[2]
    shown = np.linspace(0, num_frames - 1, min(columns, num_frames)).round().astype(int)
    pixels = enlarged(pixels[:, :, shown], MIN_SHEET_PIXELS)
    if not any(captions):
        cells = rearrange(pixels, "b rgb t h w -> (b t) rgb 1 h w")
        return Image.fromarray(tile(cells, columns=len(shown))[0])
    parts = []
    for row, caption in zip(pixels, captions, strict=True):
        frames = tile(rearrange(row, "rgb t h w -> t rgb 1 h w"), columns=len(shown))[0]
        strip = caption_strip(caption, frames.shape[1], num_lines=1)
        parts += [rearrange(strip, "rgb h w -> h w rgb").numpy(), frames]
    return Image.fromarray(np.concatenate(parts))


def write_gif_summary(writer: SummaryWriter, tag: str, frames: np.ndarray, fps: float, step: int) -> None:
    """Write frames to TensorBoard as an animated GIF, which its Images tab plays.

    `SummaryWriter.add_video` writes nothing, without an error, when moviepy is missing or of version 2
    (pytorch/pytorch#147317); this is the same summary, made with Pillow.

    Args:
        writer: an open writer, such as `TensorBoardLogger.experiment` on rank 0.
        tag: name of the summary, such as `samples/video`.
        frames: `[T, H, W, 3]` uint8.
        fps: frames a second.
        step: position on TensorBoard's step axis.
    """
    _, height, width, _ = frames.shape
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif_bytes(frames, fps))
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
