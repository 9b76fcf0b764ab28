"""One video file of the user's own, and a mask for it, as a clip at the size of a model."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from datamodules.decoding import UnreadableVideoError, probe, read_frames, read_header

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_SAME_RATE = 0.01  # 29.97 frames a second are 30


def read_clip(
    path: str | Path,
    num_frames: int,
    resolution: int,
    start: int = 0,
    frame_stride: int = 1,
    frame_rate: float | None = None,
    least_frames: int | None = None,
) -> Tensor:
    """Read frames of a video file as a model wants them: the shorter side resized, the centre cropped to a square.

    Args:
        path: The video.
        num_frames: Frames of a clip.
        resolution: Height and width, in pixels.
        start: First frame to take.
        frame_stride: Distance of neighbouring frames of the clip in the file.
        frame_rate: Frames a second that the file must have; None takes any.
        least_frames: Frames that will do, if the file has no more; None needs all.

    Returns:
        `[3, T, H, W]` in [-1, 1], T between `least_frames` and `num_frames`.

    Raises:
        FileNotFoundError: If there is no such file.
        UnreadableVideoError: If it holds no video.
        ValueError: If it is too short, too small, or of another frame rate.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No video at {path} (--input).")
    video, header = probe(path), read_header(path)
    if frame_rate is not None and abs(header.fps - frame_rate) > _SAME_RATE * frame_rate:
        raise ValueError(
            f"{path} has {header.fps:g} frames a second, and this model was trained on {frame_rate:g}. Convert it "
            f"(ffmpeg -i {path.name} -r {frame_rate:g} converted.mp4), or take its frames as they are "
            "(--any_frame_rate=true)."
        )
    available = max(0, (video.num_frames - start + frame_stride - 1) // frame_stride)
    least = num_frames if least_frames is None else least_frames
    if start < 0 or available < least:
        stride = f" at stride {frame_stride}" if frame_stride > 1 else ""
        raise ValueError(
            f"{path} has {video.num_frames} frames, too few for {least}{stride} from frame {start} on (--start)."
        )
    if min(video.height, video.width) < resolution:
        raise ValueError(
            f"{path} shows {video.width} x {video.height} pixels, and this model makes {resolution} x {resolution}: "
            "give a video whose shorter side is at least that long (--input)."
        )
    frames = read_frames(path, start, min(available, num_frames), frame_stride, video.key_frames)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)  # [T, 3, h, w], whole numbers as in training
    return _square(pixels, resolution, "bilinear").movedim(0, 1).float().div_(127.5).sub_(1).clamp_(-1, 1)


def read_mask(path: str | Path, like: str | Path, num_frames: int, resolution: int, start: int = 0) -> Tensor:
    """Read which pixels of a clip are known: black ones of an image, or of the frames of a video. White is to be made.

    Args:
        path: An image, which then holds for all frames, or a video.
        like: The video that it belongs to: same width and height.
        num_frames: Frames of the clip.
        resolution: Height and width of the clip; the mask is resized and cropped as the video is.
        start: First frame of a video to take.

    Returns:
        `[T, H, W]` bool.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not fit the video.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No mask at {path} (--mask).")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        with Image.open(path) as image:
            frames = np.asarray(image.convert("L"))[None]
    else:
        try:
            frames = read_frames(path, start, num_frames).mean(axis=-1)
        except UnreadableVideoError as error:
            raise ValueError(f"The mask does not fit: {error} An image would do for all frames (--mask).") from error
    video = probe(like)
    height, width = (video.width, video.height) if video.rotation % 180 else (video.height, video.width)
    if frames.shape[1:] != (height, width):
        raise ValueError(
            f"The mask {path} shows {frames.shape[2]} x {frames.shape[1]} pixels, and the video {like} {width} x "
            f"{height}: give one of the same size (--mask)."
        )
    white = _square(torch.from_numpy(frames.copy())[:, None].float(), resolution, "nearest")[:, 0] > 127
    return (~white).expand(num_frames, resolution, resolution)


def _square(frames: Tensor, resolution: int, mode: str) -> Tensor:
    """Resize the shorter side of `[T, C, h, w]` and crop the centre, as `VideoClips` does."""
    shorter = min(frames.shape[2:])
    if shorter != resolution:
        size = [round(side * resolution / shorter) for side in frames.shape[2:]]
        frames = F.interpolate(frames, size, mode=mode, antialias=mode == "bilinear")
    top, left = ((side - resolution) // 2 for side in frames.shape[2:])
    return frames[:, :, top : top + resolution, left : left + resolution]
