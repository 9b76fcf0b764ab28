"""What W.A.L.T's parts are worth on moving shapes (its table 3 in small); self-conditioning and zero SNR come first.

One tokenizer for all arms (one for each number of channels), latents cached once, and demo_walt with one thing changed.
Each arm is judged by samples without guidance, from averaged weights: the Frechet distance to held-out clips in the
features of an I3D with random weights decides, the oracle of the shapes and the validation loss stand beside it. The
validation loss cannot be compared where an arm changes the noise levels or the latents.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.ablations.arms import Comparison, Curve, finished_run, logged_curve, tokenized
from experiments.cli import ROOT

EXPERIMENTS = ROOT / "experiments"
FULL = "full method"

# Title, and what each arm changes in the model; "channels" is the tokenizer's.
MAIN: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "walt_self_conditioning": ("Self-conditioning", {FULL: {}, "without": {"self_conditioning": 0.0}}),
    "walt_zero_terminal_snr": (
        "Zero terminal SNR",
        {FULL: {}, "signal left in the last step": {"zero_terminal_snr": False}},
    ),
}
OTHERS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "walt_attention": ("Windows", {FULL: {}, "full attention": {"full_attention": True}}),
    "walt_patch_size": ("Patch size", {FULL: {}, "patches of 2": {"patch_size": 2}}),
    "walt_channels": ("Latent channels", {FULL: {}, "4 channels": {"channels": 4}, "16 channels": {"channels": 16}}),
    "walt_qk_norm": ("Normalised queries and keys", {FULL: {}, "not normalised": {"qk_norm": False}}),
    "walt_adaln_rank": (
        "Rank of AdaLN-LoRA",
        {FULL: {}, "rank 16": {"adaln_rank": 16}, "rank 64": {"adaln_rank": 64}},
    ),
    "walt_latent_normalisation": ("Normalised latents", {FULL: {}, "as they are": {"normalise_latents": False}}),
}


@dataclass(frozen=True)
class Length:
    """How long everything is.

    Args:
        seeds: Runs of each arm.
        tokenizer_steps: Of the first stage.
        steps: Of each arm.
        clips: Training clips.
        samples: Videos that judge an arm.
        sampling_steps: Of DDIM.
        dim: Width of the transformer.
        depth: Its layers.
        resolution: Of the videos.
    """

    seeds: int
    tokenizer_steps: int
    steps: int
    clips: int
    samples: int
    sampling_steps: int
    dim: int
    depth: int
    resolution: int


LENGTHS = {
    "quick": Length(1, 2, 2, 32, 2, 2, 32, 2, 32),
    "short": Length(2, 800, 700, 2048, 64, 50, 128, 4, 64),
    "long": Length(3, 8000, 20000, 8192, 512, 50, 256, 8, 64),
}


def compare(length: str, folder: Path) -> dict[str, Comparison]:
    """Train what is missing, and compare.

    Args:
        length: `quick`, `short` (the two main claims) or `long` (all).
        folder: Of tokenizers, latents and runs.
    """
    size = LENGTHS[length]
    setting = (
        f"Embedded moving shapes, 17 frames of {size.resolution} x {size.resolution}; {size.steps} steps of 16 clips, "
        f"width {size.dim}, {size.depth} layers; {size.samples} samples of {size.sampling_steps} DDIM steps, "
        "no guidance."
    )
    out: dict[str, Comparison] = {}
    for name, (title, arms) in (MAIN if length != "long" else MAIN | OTHERS).items():
        runs = []
        for arm, changes in arms.items():
            for seed in range(size.seeds):

                def train(place: Path, changes: dict[str, Any] = changes, seed: int = seed) -> Any:
                    return trained(place, size, folder, seed, changes)

                runs.append(finished_run(folder, arm, seed, train))
        out[name] = Comparison(title, runs, "frechet_random_i3d", True, "validation loss", setting)
    return out


def cached_latents(folder: Path, size: Length, channels: int) -> tuple[Path, Path]:
    """Train a tokenizer and encode the clips, unless that was done: its bundle and the cache."""
    from experiments.export import main as export
    from experiments.lightning_cli import run

    tokenizer, latents = folder / f"tokenizer_{channels}", folder / f"latents_{channels}"
    data = [f"--data.resolution={size.resolution}", f"--data.num_train={size.clips}", "--data.num_val=32"]
    if not tokenizer.exists():
        parts = {"quantizer": {"init_args": {"dim": channels}}}
        changes = folder / f"channels_{channels}.yaml"
        changes.parent.mkdir(parents=True, exist_ok=True)
        changes.write_text(yaml.safe_dump({"model": {"init_args": {"tokenizer": {"init_args": parts}}}}))
        steps = size.tokenizer_steps
        words = [f"--config={EXPERIMENTS / 'demo_continuous_tokenizer.yaml'}", f"--config={changes}", *data]
        words += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
        words += [f"--trainer.log_every_n_steps={min(10, steps)}"]
        result = run(["fit", *words, f"--run_root={folder / 'tokenizers'}"])
        export([str(Path(str(result.trainer.log_dir)) / "checkpoints/last.ckpt"), str(tokenizer)])
    demo = [f"--config={EXPERIMENTS / 'demo_walt.yaml'}", f"--model.tokenizer={tokenizer}"]
    demo += [f"--model.latent_dim={channels}", *data]
    return tokenizer, tokenized(latents, [*demo, "--latents=bf16"])


def trained(
    place: Path, size: Length, folder: Path, seed: int, changes: dict[str, Any]
) -> tuple[Curve, dict[str, float]]:
    """Train one arm; its validation loss along the way, and what its samples are worth."""
    from experiments.lightning_cli import run
    from lightning_modules import WALTModule

    channels = changes.get("channels", 8)
    tokenizer, latents = cached_latents(folder, size, channels)
    options = {"tokenizer": tokenizer, "latent_dim": channels, "dim": size.dim, "depth": size.depth}
    options |= {"sampling.guidance_scale": 1.0, "sampling.num_steps": size.sampling_steps}
    options |= {name: value for name, value in changes.items() if name != "channels"}
    words = ["fit", f"--config={EXPERIMENTS / 'demo_walt.yaml'}", f"--seed_everything={seed}", f"--run_root={place}"]
    words += [f"--model.{name}={value}" for name, value in options.items()]
    words += ["--data=TokenDataModule", f"--data.root={latents}", f"--data.resolution={size.resolution}"]
    words += ["--data.num_frames=17", "--data.batch_size=16"]
    words += [f"--trainer.max_steps={size.steps}", f"--trainer.val_check_interval={max(1, size.steps // 10)}"]
    words += [f"--trainer.log_every_n_steps={min(10, size.steps)}"]
    run_folder = Path(str(run(words).trainer.log_dir))
    model = WALTModule.load_from_checkpoint(
        run_folder / "checkpoints/last.ckpt", map_location=device(), weights_only=True
    )
    curve = logged_curve(run_folder, "val/loss")
    return curve, {**scores(model.eval(), size), "val_loss": curve[-1][1]}


def device() -> torch.device:
    """Where samples are made."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scores(model: Any, size: Length) -> dict[str, float]:
    """Frechet distance of samples to held-out clips, and what the oracle says of them."""
    from datamodules.shapes import MovingShapes
    from lightning_modules.generator import Condition
    from models.metrics import FrechetDistance, random_i3d
    from models.metrics.shapes_oracle import score_clips

    world = yaml.safe_load((EXPERIMENTS / "_base/demo.yaml").read_text())["data"]["init_args"]
    known = {name: world[name] for name in ("min_objects", "max_objects", "size", "speed", "texture", "shade")}
    clips = MovingShapes("val", 1000, 17, resolution=size.resolution, seed=42, **known)
    real = torch.stack([clips.render(32 + i) for i in range(max(2, size.samples))])
    seeds = torch.arange(max(2, size.samples)).split(16)
    videos = torch.cat([model.generate(Condition(), 17, part).cpu() for part in seeds])
    detector = random_i3d()
    metric = FrechetDistance(detector)
    with torch.no_grad():
        for video, is_real in ((real, True), (videos, False)):
            for part in video[:, :, :16].split(16):
                metric.update(detector(part), real=is_real)
    return {
        "frechet_random_i3d": metric.compute().item(),
        "oracle": score_clips(videos).overall.mean().item(),
    }
