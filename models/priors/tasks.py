"""MAGVIT's tasks (CVPR 2023, section 3.2 and appendix B.1): which pixels are known, and how the rest is padded.

A task is a region of known pixels. The unknown ones are padded, the padded video is tokenized, and a token whose
supervoxel holds known pixels is a condition: to be refined, never to be copied. Padding is content for the tokenizer
only.

The same region at the scale of the latent grid is the condition of the release; it differs from the supervoxel rule
where a moving box cuts through supervoxels, and where more frames are known than one code covers.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

Task = Literal[
    "frame_prediction",
    "frame_interpolation",
    "central_outpainting",
    "vertical_outpainting",
    "horizontal_outpainting",
    "dynamic_outpainting",
    "central_inpainting",
    "dynamic_inpainting",
    "class_conditional",
    "class_frame_prediction",
    "unconditional",
]
TASKS: tuple[Task, ...] = get_args(Task)  # the paper's ten, in its order, and generation from nothing
CLASS_TASKS: tuple[Task, ...] = ("class_conditional", "class_frame_prediction")
EMPTY_TASKS: tuple[Task, ...] = ("class_conditional", "unconditional")  # no pixel is known
BLACK_TASKS: tuple[Task, ...] = ("dynamic_outpainting", "central_inpainting", "dynamic_inpainting")  # in their padding
# The release has four prompts for ten tasks; inpainting takes that of outpainting.
SHARED_PROMPTS: dict[Task, str] = {
    task: "outpainting" if "painting" in task else "frame_prediction" if "prediction" in task else task
    for task in TASKS
} | {"class_conditional": "generation", "unconditional": "generation"}

# Short names, for the command line.
SHORT_NAMES: dict[str, Task] = {
    "predict": "frame_prediction",
    "interpolate": "frame_interpolation",
    "outpaint": "central_outpainting",
    "outpaint_central": "central_outpainting",
    "outpaint_vertical": "vertical_outpainting",
    "outpaint_horizontal": "horizontal_outpainting",
    "outpaint_dynamic": "dynamic_outpainting",
    "inpaint": "central_inpainting",
    "inpaint_central": "central_inpainting",
    "inpaint_dynamic": "dynamic_inpainting",
    "class": "class_conditional",
    "class_predict": "class_frame_prediction",
}

BLACK = -1.0


def moving_left_edges(num_positions: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Left edge of a box of half the width that goes from the left wall to the right one: `[num_positions]` int64.

    `linspace(0, width / 2)`, rounded half to even: 0, 3, 5, 8 for 4 latent frames of 16 columns.
    """
    return torch.linspace(0, width // 2, num_positions, dtype=torch.float64, device=device).round().long()


def known_region(
    task: Task, shape: tuple[int, int, int], past_frames: int = 1, device: torch.device | str | None = None
) -> Tensor:
    """What a task gives, on the pixels of a clip or on its latent grid (MAGVIT, appendix B.1).

    Central intervals run from `n // 4`, inclusive, to `3 n // 4`, exclusive.

    Args:
        task: Which task.
        shape: Frames, rows and columns.
        past_frames: Frames given in frame prediction.
        device: Where to make it.

    Returns:
        `[T, H, W]` bool, True where the content is known.

    Raises:
        ValueError: If the task is none of `TASKS`, or no frame is left to predict.
    """
    frames, height, width = shape
    time = torch.arange(frames, device=device)[:, None, None]
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    is_central_row = (rows >= height // 4) & (rows < 3 * height // 4)  # [H, 1]
    is_central_column = (columns >= width // 4) & (columns < 3 * width // 4)  # [W]
    left = moving_left_edges(frames, width, device)[:, None, None]
    is_moving_column = (columns >= left) & (columns < left + width // 2)  # [T, 1, W]
    match task:
        case "frame_prediction" | "class_frame_prediction":
            if not 0 < past_frames < frames:
                raise ValueError(
                    f"past_frames={past_frames} leaves nothing to predict from, or nothing to predict: expected 1 to "
                    f"{frames - 1} of {frames} frames (--model.past_frames)."
                )
            region = time < past_frames
        case "frame_interpolation":
            region = (time == 0) | (time == frames - 1)
        case "central_outpainting":
            region = is_central_row & is_central_column
        case "vertical_outpainting":
            region = is_central_column
        case "horizontal_outpainting":
            region = is_central_row
        case "dynamic_outpainting":
            region = is_moving_column
        case "central_inpainting":
            region = ~(is_central_row & is_central_column)
        case "dynamic_inpainting":
            region = ~(is_central_row & is_moving_column)
        case "class_conditional" | "unconditional":
            region = torch.zeros((), dtype=torch.bool, device=device)
        case _:
            raise ValueError(f"There is no task {task!r}. Tasks: {', '.join(TASKS)}.")
    return region.expand(frames, height, width)


def padded_video(video: Tensor, task: Task, past_frames: int = 1) -> Tensor:
    """The condition of a task as a video: known pixels stay, the rest is padded.

    Frame prediction repeats the last known frame, interpolation blends the first and the last one, outpainting repeats
    the nearest known pixel, and whatever moves or lies inside is black. Unknown pixels are never read.

    Args:
        video: `[B, 3, T, H, W]` in [-1, 1].
        task: Which task.
        past_frames: Frames given in frame prediction.

    Returns:
        `[B, 3, T, H, W]` in [-1, 1].
    """
    frames, height, width = video.shape[2:]
    known = known_region(task, (frames, height, width), past_frames, video.device)
    match task:
        case "frame_prediction" | "class_frame_prediction":
            return _repeated_edge(video, 2, 0, past_frames)
        case "frame_interpolation":
            weight = torch.arange(frames, device=video.device).div(frames - 1)[:, None, None]  # [T, 1, 1]
            blend = torch.lerp(video[:, :, :1], video[:, :, -1:], weight.to(video.dtype))
            return torch.where(known, video, blend)
        case "central_outpainting" | "vertical_outpainting" | "horizontal_outpainting":
            if task != "vertical_outpainting":
                video = _repeated_edge(video, 3, height // 4, 3 * height // 4)
            if task != "horizontal_outpainting":
                video = _repeated_edge(video, 4, width // 4, 3 * width // 4)
            return video
        case _:
            return blackened(video, known)


def blackened(video: Tensor, known: Tensor) -> Tensor:
    """Black wherever `known`, `[T, H, W]` or `[B, T, H, W]`, is False: the padding of any mask of the user's own."""
    return torch.where(known if known.ndim == 3 else known[:, None], video, BLACK)  # NaN would survive a product


def closest_task(known: Tensor, tasks: Sequence[Task], past_frames: int = 1) -> Task:
    """The task whose region of known pixels is most like a mask: intersection over union, the first of equal ones.

    Args:
        known: `[T, H, W]` or `[B, T, H, W]` bool.
        tasks: To choose from.
        past_frames: Frames given in frame prediction.
    """

    def likeness(task: Task) -> float:
        shape = (known.shape[-3], known.shape[-2], known.shape[-1])
        region = known_region(task, shape, past_frames, known.device)
        return float((region & known).sum() / (region | known).sum().clamp(min=1))

    return max(tasks, key=likeness)


def _repeated_edge(video: Tensor, axis: int, start: int, stop: int) -> Tensor:
    nearest = torch.arange(video.shape[axis], device=video.device).clamp(start, stop - 1)
    return video.index_select(axis, nearest)


def supervoxel_condition(known: Tensor, downsample: tuple[int, int, int], causal: bool = False) -> Tensor:
    """Tokens that are conditions by the paper's rule: their supervoxel holds at least one known pixel.

    Args:
        known: `[..., T, H, W]` bool, True where a pixel is known.
        downsample: Frames, rows and columns of a supervoxel.
        causal: Whether the first frame has a latent frame of its own.

    Returns:
        `[..., t, h, w]` bool; its complement is the paper's `ispad`.
    """
    t, h, w = downsample
    if causal:
        known = F.pad(known, (0, 0, 0, 0, t - 1, 0))  # False
    return reduce(known, "... (t dt) (h dh) (w dw) -> ... t h w", "any", dt=t, dh=h, dw=w)


def condition_tokens(
    task: Task,
    latent_shape: tuple[int, int, int],
    downsample: tuple[int, int, int],
    rule: Literal["supervoxel", "released"] = "supervoxel",
    past_frames: int = 1,
    device: torch.device | str | None = None,
    causal: bool = False,
) -> Tensor:
    """Tokens that carry a task's condition.

    Args:
        task: Which task.
        latent_shape: `(t, h, w)`.
        downsample: Pixel frames, rows and columns that one token covers.
        rule: `supervoxel` is the paper's text. `released` draws the task's region on the latent grid, with one latent
            frame for frame prediction; the published percentages of masked tokens follow it.
        past_frames: Pixel frames given in frame prediction; the released rule does not read it.
        device: Where to make it.
        causal: Whether the first frame has a latent frame of its own.

    Returns:
        `[t, h, w]` bool.
    """
    if rule == "released":
        return known_region(task, latent_shape, device=device)
    frames, height, width = (size * factor for size, factor in zip(latent_shape, downsample, strict=True))
    if causal:
        frames -= downsample[0] - 1
    return supervoxel_condition(known_region(task, (frames, height, width), past_frames, device), downsample, causal)
