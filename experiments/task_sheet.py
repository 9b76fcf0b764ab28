"""`longtake tasks`: COMMIT's ten tasks on one sheet: what each gives, and which tokens that makes conditions."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from callbacks.media import to_uint8
from datamodules.clip_file import read_clip
from datamodules.shapes import MovingShapes
from experiments.messages import HelpFormatter
from models.priors.tasks import CLASS_TASKS, EMPTY_TASKS, TASKS, Task, condition_tokens, known_region, padded_video

GRID, DOWNSAMPLE = (4, 16, 16), (4, 8, 8)  # of the paper, at 128 pixels
SHOWN_FRAMES = 4
GAP_PIXELS, GAP_GREY = 4, 150
CONDITION_COLOUR, MASK_COLOUR = (66, 133, 200), (60, 60, 60)


def main(args: Sequence[str]) -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(prog="longtake tasks", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/commit_tasks.png"), help="the picture to write")
    parser.add_argument("--input", type=Path, help="a video of 16 frames or more; by default embedded moving shapes")
    parser.add_argument("--checkpoint", type=Path, help="of a COMMIT, whose results are drawn too; by default none")
    parser.add_argument("--clip", type=int, default=0, help="number of the clip of moving shapes, from 0 on")
    parser.add_argument("--seed", type=int, default=0, help="of the results, 0 or more")
    options = parser.parse_args(args)
    if options.clip < 0 or options.seed < 0:
        parser.error("--clip and --seed must be at least 0")
    frames, grid, downsample, rows = 16, GRID, DOWNSAMPLE, list(TASKS[:10])
    model = None
    if options.checkpoint is not None:
        from lightning_modules import COMMITModule
        from lightning_modules.load import load_generator

        model = load_generator(options.checkpoint)
        if not isinstance(model, COMMITModule):
            raise ValueError(f"{options.checkpoint} is of a {type(model).__name__}, not of a COMMIT (--checkpoint).")
        frames, grid, downsample = model.num_frames, model.latent_shape, model.downsample
        rows = [task for task in rows if task in model.tasks]
    resolution = grid[1] * downsample[1]
    label = 0
    if options.input is not None:
        clip = read_clip(options.input, frames, resolution)
    else:
        shapes = MovingShapes(
            "val", options.clip + 1, frames, resolution=resolution, max_objects=2, size=(0.2, 0.3), texture=0.0
        )
        clip, label = shapes.render(options.clip), shapes.ground_truth(options.clip).label
    sheet = {task: task_images(clip, task, grid, downsample) for task in rows}
    if model is not None:
        from lightning_modules.generator import Condition

        for task in rows:
            condition = Condition(
                torch.tensor([label]) if task in CLASS_TASKS else None,
                None if task in EMPTY_TASKS else clip[None],
                task,
            )
            made = model.generate(condition, frames, torch.tensor([options.seed]))
            sheet[task]["result"] = frames_in_a_row(to_uint8(made)[0])
    draw(sheet, options.out)
    print(options.out)


def task_images(
    clip: Tensor, task: Task, grid: tuple[int, int, int], downsample: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """Draw the condition, the mask (white is made) and the map of its tokens, by column: `[H, W, 3]` uint8 each.

    Args:
        clip: `[3, T, H, W]` in [-1, 1].
        task: Which task.
        grid: Latent frames, rows and columns.
        downsample: Frames, rows and columns that a token covers.
    """
    is_made = ~known_region(task, (clip.shape[1], clip.shape[2], clip.shape[3]))
    tokens = condition_tokens(task, grid, downsample)
    colours = torch.tensor([MASK_COLOUR, CONDITION_COLOUR], dtype=torch.uint8)[tokens.long()]  # [t, h, w, 3]
    blocks = repeat(colours, "t h w c -> c t (h dh) (w dw)", dh=downsample[1], dw=downsample[2]).clone()
    blocks[..., :: downsample[1], :] //= 2
    blocks[..., :: downsample[2]] //= 2
    return {
        "condition": frames_in_a_row(to_uint8(padded_video(clip[None], task))[0]),
        "mask": frames_in_a_row(is_made.to(torch.uint8).mul(255).expand(3, *is_made.shape)),
        f"tokens: {int(tokens.sum())} of {tokens.numel()} are conditions": frames_in_a_row(blocks),
    }


def frames_in_a_row(video: Tensor) -> np.ndarray:
    """Evenly spaced frames of `[3, T, H, W]` uint8, side by side: `[H, W', 3]`."""
    shown = torch.linspace(0, video.shape[1] - 1, min(SHOWN_FRAMES, video.shape[1])).round().long()
    frames = torch.nn.functional.pad(video[:, shown], (0, GAP_PIXELS), value=GAP_GREY)
    return rearrange(frames, "c t h w -> h (t w) c").numpy()


def draw(sheet: dict[Task, dict[str, np.ndarray]], file: Path) -> None:
    """Write a row for each task and a column for each kind of image."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = max(len(images) for images in sheet.values())
    figure, axes = pyplot.subplots(
        len(sheet), columns, figsize=(4.4 * columns, 1.35 * len(sheet)), layout="constrained", squeeze=False
    )
    for row, (task, images) in zip(axes, sheet.items(), strict=True):
        for place, (title, image) in zip(row, images.items(), strict=True):
            place.imshow(image, interpolation="nearest")
            place.set_title(title, fontsize=8)
            place.set_xticks([])
            place.set_yticks([])
        row[0].set_ylabel(task.replace("_", "\n"), rotation=0, ha="right", va="center", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
