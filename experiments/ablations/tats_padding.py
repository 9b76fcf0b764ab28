"""TATS, sections 3.1 and 3.3: do a tokenizer's borders let long videos drift, and which mask fills frames best?

Padding: with zeros at its borders, a tokenizer's codes know where in a clip they stand. A window that slides uses the
codes of a clip's beginning where the middle of a video is, and what it makes drifts away from real video. With
replicated borders (batch norm, in evaluation) codes are the same wherever they stand. Each arm trains a tokenizer and a
prior on the moving shapes, rolls out 16 times the window, and compares each piece of 16 frames with held-out video.

Masks (`long` alone): the frames between two known ones, filled under each mask of the paper's figure, against the true
ones: (a) causal, which never sees the frame to come; (b) boundaries that also see the frames between, which are not
there yet when they are filled; (c) closed boundaries, what TATS trains.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from callbacks.media import contact_sheet
from datamodules.shapes import MovingShapes
from experiments.ablations.arms import Comparison, Curve, finished_run, logged_curve
from experiments.export import main as export
from experiments.lightning_cli import run
from lightning_modules import TATSModule
from lightning_modules.tats import TATSCondition
from models.metrics import FrechetDistance, psnr, random_i3d
from models.metrics.detectors import Detector
from models.metrics.shapes_oracle import score_clips
from models.shapes_world import CLASS_NAMES

EXPERIMENTS = Path(__file__).parent.parent
PIECE = 16  # frames of a window, and of what is compared
MASKS = {"a causal": "causal", "b open boundaries": "open_boundaries", "c closed boundaries": "closed_boundaries"}


@dataclass(frozen=True)
class Size:
    """How much of it.

    Args:
        seeds: Each arm is trained with each of them.
        tokenizer_steps: Steps of the tokenizer.
        prior_steps: Steps of the prior.
        clips: Training clips of the prior, whose codes are kept.
        videos: Videos that are rolled out, and real clips to compare with.
        frames: Frames of a video.
        flags: More options for all commands.
        tokenizer_flags: More options for the tokenizer.
        prior_flags: More options for the prior.
    """

    seeds: tuple[int, ...]
    tokenizer_steps: int
    prior_steps: int
    clips: int
    videos: int
    frames: int
    flags: tuple[str, ...] = ()
    tokenizer_flags: tuple[str, ...] = ()
    prior_flags: tuple[str, ...] = ()


TINY = ("--data.resolution=32", "--data.num_val=4", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu")
SIZES = {
    "quick": Size(
        (0,),
        tokenizer_steps=2,
        prior_steps=2,
        clips=8,
        videos=2,
        frames=32,
        flags=(
            *TINY,
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.log_every_n_steps=1",
        ),
        tokenizer_flags=("--data.num_train=8", "--data.batch_size=2", "--model.tokenizer.encoder.base_channels=4"),
        prior_flags=("--model.dim=16", "--model.depth=1", "--model.num_heads=2"),
    ),
    "short": Size((0, 1), tokenizer_steps=500, prior_steps=800, clips=2048, videos=32, frames=256),
    "long": Size((0, 1, 2), tokenizer_steps=20_000, prior_steps=20_000, clips=16_384, videos=128, frames=480),
}


def compare(length: Literal["quick", "short", "long"], folder: Path) -> dict[str, Comparison]:
    """Train the arms, or read what they gave if they are finished.

    Returns:
        `tats_padding`, and with `long` also `tats_masks`.
    """
    size = SIZES[length]
    runs = [
        finished_run(folder, padding, seed, lambda place, p=padding, s=seed: roll_out(place, p, s, size))  # type: ignore[misc]
        for padding in ("zero", "replicate")
        for seed in size.seeds
    ]
    setting = (
        f"Moving shapes, 64 x 64 pixels; demo_tokenizer, {size.tokenizer_steps} steps, with this padding in all "
        f"convolutions; demo_tats, {size.prior_steps} steps; {size.videos} videos of {size.frames} frames, one latent "
        "frame of context. `drift` is the distance to held-out clips (Frechet, I3D with random weights: an order, no "
        "FVD) of the last quarter of the videos, less that of their first 16 frames; the oracle's mean score, from 0 "
        "to 1, stands beside it."
    )
    out = {
        "tats_padding": Comparison(
            "Padding of the tokenizer and drift", runs, "drift", True, "Frechet distance of 16 frames", setting, "frame"
        )
    }
    if length == "long":
        masks = [
            finished_run(folder, arm, seed, lambda place, m=mask, s=seed: fill(place, m, s, size, folder))  # type: ignore[misc]
            for arm, mask in MASKS.items()
            for seed in size.seeds
        ]
        setting = (
            f"demo_tats_interpolation, {size.prior_steps} steps, on the tokenizer with replicated borders of the same "
            "seed. The 12 frames between two true latent frames, drawn greedily, against the reconstruction of the "
            "true ones. The curves are no judge of (b): its boundaries tell what lies between."
        )
        out["tats_masks"] = Comparison(
            "Masks of the interpolation", masks, "psnr_between", False, "NLL of hidden codes, nats", setting
        )
    return out


def train_tokenizer(place: Path, padding: str, seed: int, size: Size) -> Path:
    """Train and export a tokenizer with this padding; return its bundle."""
    words = [
        "fit",
        f"--config={EXPERIMENTS / 'demo_tokenizer.yaml'}",
        f"--run_root={place}",
        f"--seed_everything={seed}",
        f"--model.tokenizer.encoder.padding={padding}",
        f"--model.tokenizer.decoder.padding={padding}",
        f"--trainer.max_steps={size.tokenizer_steps}",
        f"--trainer.val_check_interval={size.tokenizer_steps}",
    ]
    run([*words, *size.flags, *size.tokenizer_flags])
    export([str(place / "demo_tokenizer/version_0/checkpoints/last.ckpt"), str(place / "tokenizer")])
    return place / "tokenizer"


def train_prior(place: Path, experiment: str, tokenizer: Path, seed: int, size: Size, *flags: str) -> Path:
    """Train a prior on cached codes; return its run's folder."""
    config = f"--config={EXPERIMENTS / f'{experiment}.yaml'}"
    common = [config, f"--model.tokenizer={tokenizer}", f"--seed_everything={seed}", *size.prior_flags, *flags]
    codes = place / "codes"
    run(["tokenize", *common, *size.flags, f"--data.num_train={size.clips}", f"--out={codes}"])
    kept = [flag for flag in size.flags if not flag.startswith("--data.num_")]  # which only the world has
    steps = [f"--trainer.max_steps={size.prior_steps}", f"--trainer.val_check_interval={-(-size.prior_steps // 10)}"]
    cached = ["--data=TokenDataModule", f"--data.root={codes}", "--samples.at_validation=false"]
    run(["fit", *common, *cached, *kept, *steps, f"--run_root={place}"])
    return place / experiment / "version_0"


def roll_out(place: Path, padding: str, seed: int, size: Size) -> tuple[Curve, dict[str, float]]:
    """Train both stages, generate long videos, and measure each piece of them."""
    tokenizer = train_tokenizer(place, padding, seed, size)
    prior = train_prior(place, "demo_tats", tokenizer, seed, size, "--model.sampling.context_frames=1")
    model, data = loaded(prior)
    pieces: list[Tensor] = []
    for seeds in torch.arange(size.videos).split(16):
        condition = TATSCondition(label=seeds % len(CLASS_NAMES))
        pieces.append(torch.cat(list(model.iter_generate(condition, size.frames, seeds)), dim=2).cpu())
    video = torch.cat(pieces)
    contact_sheet(video[:8]).save(place / "sheet.png")
    held_out = MovingShapes("val", 2 * size.videos, PIECE, resolution=video.shape[-1], **world_of(data))
    real = torch.stack([held_out.render(index) for index in range(2 * size.videos)])
    detector = random_i3d().to(model.device)
    metric = FrechetDistance(detector).to(model.device)
    metric.update(features(detector, real, model.device), real=True)
    curve: Curve = []
    for start in range(0, size.frames - PIECE + 1, PIECE):
        metric.reset_generated()
        metric.update(features(detector, video[:, :, start : start + PIECE], model.device), real=False)
        curve.append((float(start), metric.compute().item()))
    last = [distance for start, distance in curve if start + PIECE > 0.75 * size.frames]
    few = video[: min(8, size.videos)]
    return curve, {
        "drift": sum(last) / len(last) - curve[0][1],
        "distance_at_first": curve[0][1],
        "oracle_at_first": oracle(few[:, :, :PIECE]),
        "oracle_at_last": oracle(few[:, :, -PIECE:]),
    }


def fill(place: Path, mask: str, seed: int, size: Size, folder: Path) -> tuple[Curve, dict[str, float]]:
    """Train the interpolation under a mask, and fill the frames between two of held-out clips."""
    tokenizer = folder / f"replicate-{seed}" / "tokenizer"
    prior = train_prior(place, "demo_tats_interpolation", tokenizer, seed, size, f"--model.mask={mask}")
    model, data = loaded(prior)
    clips = MovingShapes("val", size.videos, model.num_frames, resolution=model.hparams["resolution"], **world_of(data))
    video = torch.stack([clips.render(index) for index in range(size.videos)])
    labels = torch.tensor([clips.ground_truth(index).label for index in range(size.videos)])
    sampling = type(model.sampling)(top_k=1, top_p=None)
    values: list[Tensor] = []
    for rows in torch.arange(size.videos).split(16):
        codes = model.encode_video(video[rows].to(model.device))
        keys = codes[:, :: codes.shape[1] - 1].flatten(2)
        filled = model.fill_keys(keys, rows, sampling, TATSCondition(label=labels[rows]))
        between = slice(model.downsample[0], -model.downsample[0])
        made = model.decode_codes(filled.unflatten(2, codes.shape[2:]))[:, :, between]
        values.append(psnr(made, model.decode_codes(codes)[:, :, between]).cpu())
    return logged_curve(prior, "val/nll"), {"psnr_between": torch.cat(values).mean().item()}


def loaded(prior: Path) -> tuple[TATSModule, dict[str, Any]]:
    """The prior of a run, ready to generate, and the options of the embedded world."""
    import yaml

    model = TATSModule.load_from_checkpoint(prior / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    world = yaml.safe_load((EXPERIMENTS / "_base/demo.yaml").read_text())["data"]["init_args"]
    model = model.eval().requires_grad_(False)
    return model.cuda() if torch.cuda.is_available() else model, world


def world_of(options: dict[str, Any]) -> dict[str, Any]:
    """Of the demo's data, what its clips look like."""
    return {name: options[name] for name in ("min_objects", "max_objects", "size", "speed", "texture", "shade")} | {
        "seed": 42
    }


def features(detector: Detector, video: Tensor, device: torch.device) -> Any:
    """What the detector sees in clips."""
    return detector(video.to(device))


def oracle(video: Tensor) -> float:
    """The mean of all scores of the oracle that knows the world."""
    return torch.stack([values.mean() for values in score_clips(video).as_dict().values()]).mean().item()
