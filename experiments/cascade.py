"""`longtake cascade`: videos from a base model and its super-resolution stages, each from a checkpoint."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.messages import HelpFormatter


def check_stages(stages: Sequence[Any], names: Sequence[str]) -> None:
    """Compare each stage with the one before.

    Args:
        stages: W.A.L.T modules with their tokenizers, the base first.
        names: What to call them.

    Raises:
        ValueError: If one does not enlarge what the one before makes.
    """
    if stages[0].enlarges:
        raise ValueError(f"{names[0]} is a super-resolution stage: give the base model first.")
    for before, stage, name in zip(stages, stages[1:], names[1:], strict=False):
        if not stage.enlarges:
            raise ValueError(f"{name} is no super-resolution stage (trained with --model.low_res_tokenizer).")
        ours, theirs = stage.half_shape, before.latent_shape
        if ours != theirs or stage.num_frames != before.num_frames:
            raise ValueError(
                f"{name} enlarges {ours} latents of {stage.num_frames} frames, the stage before makes {theirs} of "
                f"{before.num_frames}."
            )
        if stage.low_res_digest != before.tokenizer_digest:
            raise ValueError(
                f"{name} was trained to enlarge what another tokenizer makes than {before.tokenizer_path}, that of the "
                "stage before."
            )


def cascade(
    stages: Sequence[Any],
    num_frames: int,
    seeds: Tensor,
    label: Tensor | None = None,
    text: Sequence[str] | None = None,
) -> list[list[Tensor]]:
    """Generate with each stage from what the one before has made, in latent space alone.

    Args:
        stages: W.A.L.T modules, the base first.
        num_frames: Pixel frames of the videos.
        seeds: `[B]` int64.
        label: `[B]` classes, for the stages that have them.
        text: Prompts, for the stages that read them.

    Returns:
        For each stage its clips, see `WALTModule.generate_clips`; `joined` of the stage makes the videos.
    """
    from lightning_modules.walt import WALTCondition

    made: list[list[Tensor]] = []
    for stage in stages:
        condition = WALTCondition(label=label if stage.num_classes else None, text=text if stage.reads_text else None)
        made.append(stage.generate_clips(condition, num_frames, seeds, low_res=made[-1] if made else None))
    return made


def main(args: Sequence[str]) -> None:
    """Load the stages, generate, write videos of the last stage and a contact sheet of each."""
    parser = argparse.ArgumentParser(prog="longtake cascade", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="the base model's, then those of its stages in order")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--tokenizers", nargs="+", help="a tokenizer for each checkpoint; by default where they were in training"
    )
    parser.add_argument("--num_samples", type=int, default=4, help="number of videos")
    parser.add_argument("--num_frames", type=int, help="pixel frames of each; by default those of the training clips")
    parser.add_argument("--label", type=int, help="class of all videos; by default drawn from the seeds")
    parser.add_argument("--text", help="prompt of all videos, for models that read text; by default none")
    parser.add_argument("--batch_size", type=int, default=4, help="videos generated at once")
    parser.add_argument("--first_seed", type=int, default=0, help="video i has the seed first_seed + i")
    parser.add_argument("--fps", type=int, default=8, help="frames a second in the mp4 files")
    options = parser.parse_args(args)
    if len(options.checkpoints) < 2:
        raise ValueError("A cascade has a base model and at least one super-resolution stage: give two checkpoints.")
    if options.tokenizers and len(options.tokenizers) != len(options.checkpoints):
        raise ValueError(
            f"{len(options.checkpoints)} checkpoints have as many tokenizers, not {len(options.tokenizers)} "
            "(--tokenizers)."
        )

    from callbacks.media import contact_sheet, to_uint8, write_mp4
    from lightning_modules import WALTModule
    from lightning_modules.load import generator_config
    from models.weights import read_checkpoint

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stages: list[WALTModule] = []
    for i, path in enumerate(options.checkpoints):
        kind = generator_config(read_checkpoint(path), path)["class_path"].rpartition(".")[2]
        if kind != "WALTModule":
            raise ValueError(f"{path} is of a {kind}: a cascade is of checkpoints of W.A.L.T.")
        moved = {}
        if options.tokenizers:
            moved = {"tokenizer": options.tokenizers[i]}
            moved |= {"low_res_tokenizer": options.tokenizers[i - 1]} if i else {}
        stage = WALTModule.load_from_checkpoint(path, map_location=device, weights_only=True, **moved)
        stages.append(stage.eval().requires_grad_(False))
    names = [str(path) for path in options.checkpoints]
    check_stages(stages, names)
    base = stages[0]
    base.checked_task(None, options.label)
    for stage in stages:
        if stage.reads_text and options.text is None:
            raise ValueError("A stage reads text: give a prompt (--text).")
    if options.text is not None and not any(stage.reads_text for stage in stages):
        raise ValueError("No stage reads text: generate without a prompt (--text).")

    num_frames = options.num_frames or base.num_frames
    start = time.perf_counter()
    sheets: list[list[Tensor]] = [[] for _ in stages]
    for first in range(0, options.num_samples, options.batch_size):
        numbers = range(first, min(first + options.batch_size, options.num_samples))
        seeds = torch.tensor([options.first_seed + number for number in numbers])
        label = None if options.label is None else torch.full((len(seeds),), options.label)
        text = None if options.text is None else [options.text] * len(seeds)
        made = cascade(stages, num_frames, seeds, label, text)
        for sheet, stage, clips in zip(sheets, stages, made, strict=True):
            sheet.append(to_uint8(stage.joined(clips)))
        for seed, video in zip(seeds.tolist(), sheets[-1][-1], strict=True):
            write_mp4(options.out / f"seed={seed:06d}.mp4", video, options.fps)
    for i, sheet in enumerate(sheets):
        contact_sheet(torch.cat(sheet)).save(options.out / f"stage_{i}.png")
    about = {
        "checkpoints": names,
        "num_frames": num_frames,
        "label": options.label,
        "text": options.text,
        "seeds": [options.first_seed + i for i in range(options.num_samples)],
        "seconds_per_video": (time.perf_counter() - start) / options.num_samples,
    }
    (options.out / "samples.json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"{options.num_samples} videos of {num_frames} frames: {options.out}")
