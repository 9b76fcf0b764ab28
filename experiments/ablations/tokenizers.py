"""Tokenizers: do all three families learn, what do borders teach, what does a start from images give.

`families` is a check, not a contest: the networks of TATS, MAGVIT and MAGVIT-v2 at demo size, with one quantizer, one
loss and the same CPU time each, on the embedded shapes and, with `--clips=FOLDER`, on real videos. It also writes a
sheet of originals above reconstructions. The other comparisons are those of the papers: padding (TATS), inflation, 2D
against 3D (MAGVIT), and where time is halved (MAGVIT-v2); the last two want a GPU and are in `--length=long` alone.
"""

import logging
import shutil
import time
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import av
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image, ImageDraw, ImageOps

from callbacks.media import contact_sheet
from datamodules.frames import find_videos
from datamodules.shapes import MovingShapes
from experiments.ablations.arms import Comparison, Curve, Run, finished_run, logged_curve
from experiments.lightning_cli import run
from models.metrics import psnr
from models.metrics.frames import frame_ssim
from models.tokenizers import VQGAN3D
from models.tokenizers.quantizers import code_counts, usage_statistics

logger = logging.getLogger(__name__)

BASE = Path(__file__).parents[1] / "demo_tokenizer.yaml"
WINDOW, LONG_WINDOWS = 16, 4  # frames of a clip that needs no 17th, and clips that a long video is made of
PIECE_FRAMES, SHORTEST = 32, 17  # frames that real videos are cut into


@dataclass(frozen=True)
class Size:
    """How large, and how long.

    Args:
        seeds: Runs of each arm.
        cpu_seconds: CPU time of each run; None trains for `steps`.
        steps: Optimizer steps; with `cpu_seconds`, a first guess.
        width: Channels of the first maps of MAGVIT's and the causal networks, and half of those of TATS'.
        blocks: Residual blocks of each of their levels.
        resolution: Height and width of the clips.
        batch_size: Clips a step.
        val_batches: Batches of held-out clips.
    """

    seeds: int
    cpu_seconds: float | None
    steps: int
    width: int = 8
    blocks: int = 1
    resolution: int = 64
    batch_size: int = 4
    val_batches: int = 8


@dataclass(frozen=True)
class Setting:
    """What an arm has of its own.

    Args:
        num_frames: Frames of a clip.
        encoder: Class and options.
        decoder: Class and options.
        model: Options of the training.
        joins_windows: Whether to measure `joined_psnr`.
    """

    num_frames: int
    encoder: tuple[str, dict[str, Any]]
    decoder: tuple[str, dict[str, Any]]
    model: dict[str, Any] = field(default_factory=dict)
    joins_windows: bool = False


SIZES = {
    "quick": Size(1, None, 2, width=2, resolution=32, batch_size=2, val_batches=1),
    "short": Size(2, 150, 500),
    "long": Size(3, None, 20_000, width=64, blocks=2, resolution=128, batch_size=16),
}
# padding and inflation, 14 runs, have to fit into half an hour of one core
SHORTER_SECONDS = 100


def compare(length: str, folder: Path, clips: Path | None = None) -> dict[str, Comparison]:
    """Train what the length has room for.

    Args:
        length: `quick`, `short` or `long`.
        folder: Of all runs.
        clips: Folder of real videos for the families; None leaves that comparison out, and says so.
    """
    size = SIZES[length]
    found = {"tokenizer_families": families(size, folder / "shapes")}
    if clips is None:
        logger.warning("The families are compared on the embedded shapes alone: --clips=FOLDER gives real videos.")
    else:
        cut_videos(clips, folder / "frames", size.resolution)
        found["tokenizer_families_clips"] = families(size, folder / "clips", folder / "frames")
    shorter = replace(size, cpu_seconds=SHORTER_SECONDS) if size.cpu_seconds else size
    found["tokenizer_padding"] = padding(shorter, folder / "padding")
    found["tokenizer_inflation"] = inflation(shorter, folder / "inflation")
    if length == "long":
        found["tokenizer_axes"] = axes(size, folder / "axes")
        found["tokenizer_halving"] = halving(size, folder / "halving")
    return found


# Comparisons


def families(size: Size, folder: Path, frames: Path | None = None) -> Comparison:
    """The three pairs of encoder and decoder; 17 frames where the first stands alone."""
    settings = {name: make(size) for name, make in FAMILIES.items()}
    runs = [
        arm(folder, name, seed, size, setting, frames) for name, setting in settings.items() for seed in seeds(size)
    ]
    join_sheets(folder, list(settings))
    return comparison("Families of tokenizers" + (", real videos" if frames else ""), runs, size)


def padding(size: Size, folder: Path) -> Comparison:
    """What continues the borders of TATS' networks.

    At the clip's own length a network can make use of knowing where it is. `joined_psnr` asks for what TATS needs: the
    codes of four clips in a row, decoded as one video, as when a prior goes on from window to window.
    """
    rules = ("zero", "replicate", "reflect")
    settings = {rule: replace(time_agnostic(size, padding=rule), joins_windows=True) for rule in rules}
    runs = [arm(folder, rule, seed, size, setting) for rule, setting in settings.items() for seed in seeds(size)]
    return comparison("Padding of the time-agnostic tokenizer", runs, size, "joined_psnr")


def inflation(size: Size, folder: Path) -> Comparison:
    """MAGVIT's 3D networks from scratch and from a 2D tokenizer, which is trained as long as they are, before them."""
    images = replace(size, batch_size=8 * size.batch_size)
    runs = []
    for seed in seeds(size):
        arm(folder, "2d", seed, images, replace(magvit(size, **FLAT), num_frames=1))
        start = {"inflate_from": str(newest(folder / f"2d-{seed}") / "checkpoints/last.ckpt")}
        runs.append(arm(folder, "scratch", seed, size, magvit(size)))
        for rule in ("average", "central"):
            runs.append(arm(folder, rule, seed, size, replace(magvit(size), model=start | {"inflation": rule})))
    return comparison("Inflation of a 2D tokenizer", runs, size)


def axes(size: Size, folder: Path) -> Comparison:
    """MAGVIT's networks over clips, and over frames by themselves: the latter have four times the codes."""
    settings = {"3d": magvit(size), "2d": magvit(size, **FLAT)}
    runs = [arm(folder, name, seed, size, setting) for name, setting in settings.items() for seed in seeds(size)]
    return comparison("2D against 3D", runs, size)


def halving(size: Size, folder: Path) -> Comparison:
    """Where the causal networks halve time: at the side of the latents, as in MAGVIT-v2, or of the pixels."""
    orders = {"deferred": [False, True, True], "early": [True, True, False]}
    runs = [
        arm(
            folder,
            name,
            seed,
            size,
            causal(size, patch_size=1, channel_multipliers=[1, 2, 2, 4], temporal_downsample=flags),
        )
        for name, flags in orders.items()
        for seed in seeds(size)
    ]
    return comparison("Where time is halved", runs, size)


def comparison(title: str, runs: list[Run], size: Size, score: str = "psnr") -> Comparison:
    """What all of them have in common."""
    amount = f"{size.cpu_seconds:.0f} CPU seconds" if size.cpu_seconds else f"{size.steps:,} steps"
    setting = (
        f"{amount} a run, {size.batch_size} clips a step of 16 (causal: 17) frames of {size.resolution} x "
        f"{size.resolution} pixels, {SETTING}. Scores are those of held-out clips, PSNR in dB. "
        "`psnr_of_mean_frame` is that of showing each clip's mean frame; `joined_psnr` that of 64 frames, decoded at "
        "once from the latents of four clips."
    )
    return Comparison(title, runs, score, False, "PSNR of held-out clips, dB", setting)


SETTING = (
    "4 x 8 x 8 pixels a code, 625 codes by finite scalar quantisation, squared error alone, Muon with a "
    "cosine learning rate"
)


def seeds(size: Size) -> range:
    """Seeds of an arm."""
    return range(size.seeds)


# Networks: what differs from demo_tokenizer


def time_agnostic(size: Size, **options: Any) -> Setting:
    """TATS, as in the demo."""
    options = {"patch_size": 2, **options}
    return Setting(
        WINDOW,
        ("TimeAgnosticEncoder", {"base_channels": 2 * size.width, **options}),
        ("TimeAgnosticDecoder", {"base_channels": size.width, "num_res_blocks": size.blocks, **options}),
    )


def magvit(size: Size, **options: Any) -> Setting:
    """MAGVIT: time is halved at the side of the pixels."""
    options = levels(size, **options)
    return Setting(WINDOW, ("MAGVITEncoder", options), ("MAGVITDecoder", {"latent_dim": 4, **options}))


def causal(size: Size, **options: Any) -> Setting:
    """MAGVIT-v2 and W.A.L.T: the first frame stands alone."""
    options = levels(size, **options)
    return Setting(WINDOW + 1, ("CausalEncoder", options), ("CausalDecoder", {"latent_dim": 4, **options}))


def levels(size: Size, **options: Any) -> dict[str, Any]:
    """Options of both networks in levels, which come after patches of 2 x 2 pixels."""
    return {
        "base_channels": size.width,
        "channel_multipliers": [1, 2, 4],
        "temporal_downsample": [True, True],
        "num_res_blocks": size.blocks,
        "norm_groups": max(1, size.width // 8),  # groups of two channels would keep little of what a frame is like
        "patch_size": 2,
        **options,
    }


FLAT: dict[str, Any] = {"is_2d": True, "temporal_downsample": [False, False]}
FAMILIES = {"time_agnostic": time_agnostic, "magvit": magvit, "causal": causal}


# Training


class CPUBudget(Callback):
    """Ends the run when training has used so much CPU time; the learning rate's cosine ends there too.

    Args:
        seconds: CPU time of all threads, without validation.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.used = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count, and from how long steps took so far say how many there will be."""
        now = time.process_time()
        self.used, self._since = self.used + now - self._since, now
        step = trainer.global_step
        trainer.fit_loop.epoch_loop.max_steps = max(step, int(step * self.seconds / self.used))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.used += time.process_time() - self._since

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._since = time.process_time()


def arm(folder: Path, name: str, seed: int, size: Size, setting: Setting, frames: Path | None = None) -> Run:
    """Train one tokenizer, or read what came of it."""
    return finished_run(folder, name, seed, lambda place: train(place, seed, size, setting, frames))


def train(place: Path, seed: int, size: Size, setting: Setting, frames: Path | None) -> tuple[Curve, dict[str, float]]:
    """Write the arm's file, run it on top of the demo's, and measure."""
    place.mkdir(parents=True, exist_ok=True)
    file = place / "arm.yaml"
    file.write_text(yaml.safe_dump(experiment(size, setting, frames), sort_keys=False))
    words = [f"--config={BASE}", f"--config={file}", f"--seed_everything={seed}"]
    cli = run(["fit", *words, f"--run_root={place}", "--run_name=run"])
    tokenizer = cli.model.tokenizer.eval()
    batches = list(islice(cli.datamodule.val_dataloader(), size.val_batches))
    scores = scores_of(tokenizer, batches)
    if setting.joins_windows:
        scores["joined_psnr"] = joined_psnr(tokenizer, cli.datamodule.datasets["val"], len(batches[0]["video"]))
    scores["steps"] = float(cli.trainer.global_step)
    contact_sheet(cli.model.sample_videos(batches[0], torch.arange(2))).save(place / "sheet.png")
    return logged_curve(newest(place), "val/psnr"), scores


def newest(place: Path) -> Path:
    """The folder of an arm's last run."""
    return max((place / "run").glob("version_*"), key=lambda version: int(version.name.removeprefix("version_")))


def experiment(size: Size, setting: Setting, frames: Path | None) -> dict[str, Any]:
    """An experiment file: what differs from demo_tokenizer."""
    clips: dict[str, Any] = {"num_frames": setting.num_frames, "batch_size": size.batch_size}
    clips |= {"resolution": size.resolution, "val_batch_size": 4}
    data: dict[str, Any] = {"init_args": clips}
    if frames is not None:
        data = {"class_path": "FramesDataModule", "init_args": clips | {"root": str(frames), "has_classes": False}}
    networks = {
        part: {"class_path": f"models.tokenizers.{name}", "init_args": options}
        for part, (name, options) in (("encoder", setting.encoder), ("decoder", setting.decoder))
    }
    trainer: dict[str, Any] = {
        "max_steps": size.steps,
        "val_check_interval": max(1, size.steps // 8),
        "limit_val_batches": size.val_batches,
        "log_every_n_steps": 1,  # few clips make short epochs
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if size.cpu_seconds is not None:
        budget = {"class_path": f"{__name__}.CPUBudget", "init_args": {"seconds": size.cpu_seconds}}
        trainer["callbacks"] = [budget]
    return {
        "data": data,
        "model": {"init_args": {"tokenizer": {"init_args": networks}, **setting.model}},
        "trainer": trainer,
    }


# Measuring


@torch.no_grad()
def scores_of(tokenizer: VQGAN3D, batches: list[dict[str, Any]]) -> dict[str, float]:
    """What `longtake validate` measures of a tokenizer, and how close each clip's mean frame comes."""
    found: dict[str, list[torch.Tensor]] = {"psnr": [], "ssim": [], "psnr_of_mean_frame": []}
    size = tokenizer.codebook_size
    assert size is not None  # all arms quantise
    counts = torch.zeros(size, dtype=torch.int64)
    for batch in batches:
        video = batch["video"]
        encoded = tokenizer.encode(video)
        shown = tokenizer.decode(encoded.latents)
        found["psnr"].append(psnr(shown, video))
        found["ssim"].append(frame_ssim(shown, video).flatten())
        found["psnr_of_mean_frame"].append(psnr(video.mean(2, keepdim=True).expand_as(video), video))
        assert encoded.codes is not None
        counts += code_counts(encoded.codes, size)
    usage = usage_statistics(counts)
    return {name: torch.cat(values).mean().item() for name, values in found.items()} | {
        name: value.item() for name, value in usage.items()
    }


@torch.no_grad()
def joined_psnr(tokenizer: VQGAN3D, clips: MovingShapes, count: int) -> float:
    """PSNR of long videos, decoded at once from the latents of windows that were encoded by themselves."""
    scores = []
    for index in range(count):
        windows = [clips.render(index, i * WINDOW, WINDOW)[None] for i in range(LONG_WINDOWS)]
        latents = torch.cat([tokenizer.encode(window).latents for window in windows], dim=2)
        scores.append(psnr(tokenizer.decode(latents), torch.cat(windows, dim=2)))
    return torch.cat(scores).mean().item()


def join_sheets(folder: Path, names: list[str]) -> None:
    """One sheet of the arms' first seeds, each under its name: originals above reconstructions."""
    sheets = [(name, Image.open(folder / f"{name}-0" / "sheet.png")) for name in names]
    header = 16
    width = max(sheet.width for _, sheet in sheets)
    joined = Image.new("RGB", (width, sum(sheet.height + header for _, sheet in sheets)), "white")
    top = 0
    for name, sheet in sheets:
        ImageDraw.Draw(joined).text((4, top + 2), name, fill="black")
        joined.paste(sheet, (0, top + header))
        top += sheet.height + header
    joined.save(folder / "sheet.png")


# Real videos


def cut_videos(source: Path, target: Path, resolution: int) -> None:
    """Cut videos into pieces, each a folder of square frames of the size needed; the end of each video is held out.

    A video of fewer than two clips is trained on alone; what is damaged is used as far as it can be read.
    """
    if target.exists():
        return
    place = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(place, ignore_errors=True)
    for file in find_videos(source):
        frames = square_frames(file, resolution)
        held_out = max(SHORTEST, len(frames) // 4)
        train = len(frames) - held_out if len(frames) >= SHORTEST + held_out else len(frames)
        pieces = {
            f"train/{file.stem}-{i}": frames[i : min(i + PIECE_FRAMES, train)] for i in range(0, train, PIECE_FRAMES)
        }
        pieces[f"val/{file.stem}"] = frames[train:]
        for name, piece in pieces.items():
            if len(piece) >= SHORTEST:
                (place / name).mkdir(parents=True)
                for i, frame in enumerate(piece):
                    frame.save(place / name / f"{i:04d}.png")
    place.rename(target)


def square_frames(file: Path, resolution: int) -> list[Image.Image]:
    """The centres of a video's frames."""
    frames = []
    try:
        with av.open(str(file)) as video:
            for frame in video.decode(video=0):
                frames.append(ImageOps.fit(frame.to_image(), (resolution, resolution)))
    except av.FFmpegError as error:
        logger.warning("%s: read %d frames, then: %s", file, len(frames), error)
    return frames
