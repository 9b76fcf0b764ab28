"""MeBT's claim at small scale: does the short-to-long curriculum pay, on clips of 128 frames of the moving shapes?

Three arms see the same number of tokens, and so cost about the same, for MeBT's cost is linear in them:

- `curriculum`: windows that grow to the full length over the first 70 % of the run, as in `mebt_128f`.
- `full length`: whole clips from the first step on.
- `short and slid`: clips of 32 frames only, four times as many in a batch; 128 frames are made by sliding a window.

The oracle of the moving shapes judges the samples: do objects keep their number, kind and colour, and do they move at
constant velocity between bounces, for 128 frames? The likelihood is that of held-out clips at full length; the arm that
has never seen one is asked for each window of a clip by itself. What counting pairs of codes knows is the baseline that
every arm has to be past.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.ablations.arms import Comparison, Curve, Run, finished_run, logged_curve, tokenized

EXPERIMENTS = Path(__file__).parent.parent
FULL, SHORT, FACTOR = 128, 32, 8  # pixel frames, and those of a latent frame
DOWNSAMPLE = f"[{FACTOR},8,8]"
FULL_LENGTH_FROM = 0.7
ARMS = ("curriculum", "full length", "short and slid")


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Args:
        steps: Steps of the full-length arm; the others see as many tokens.
        seeds: Seeds of each arm.
        num_train: Clips of 128 frames.
        num_val: Held-out clips.
        samples: Videos that the oracle judges.
        tokenizer: Overrides for the demo's tokenizer.
        prior: Overrides for the demo's prior.
    """

    steps: int
    seeds: dict[str, int]
    num_train: int
    num_val: int
    samples: int
    tokenizer: tuple[str, ...]
    prior: tuple[str, ...]


SIZES = {
    "quick": Size(
        steps=2,
        seeds=dict.fromkeys(ARMS, 1),
        num_train=2,
        num_val=1,
        samples=1,
        tokenizer=(
            "--trainer.max_steps=1",
            "--trainer.log_every_n_steps=1",
            "--data.num_train=4",
            "--data.num_val=4",
            "--data.resolution=32",
            "--model.tokenizer.encoder.base_channels=4",
            "--model.tokenizer.decoder.base_channels=4",
        ),
        prior=(
            "--data.batch_size=1",
            "--trainer.log_every_n_steps=1",
            "--model.dim=16",
            "--model.num_heads=2",
            "--model.num_latents=4",
            "--model.sampling.num_steps=2",
        ),
    ),
    "short": Size(
        steps=1200,
        seeds={"curriculum": 2, "full length": 2, "short and slid": 2},
        num_train=1024,
        num_val=64,
        samples=16,
        tokenizer=("--trainer.max_steps=450",),
        prior=("--data.batch_size=4",),
    ),
    "long": Size(
        steps=20_000,
        seeds=dict.fromkeys(ARMS, 3),
        num_train=16_384,
        num_val=256,
        samples=64,
        tokenizer=("--trainer.max_steps=5000",),
        prior=(
            "--data.batch_size=16",
            "--model.dim=256",
            "--model.num_latents=256",
            "--model.blocks=[latent_enc,latent_self,latent_enc,latent_dec,lt2l,latent_dec]",
            "--model.init_std=0.04",
            "--model.lr=1.0e-3",
        ),
    ),
}


def compare(length: str, folder: Path) -> dict[str, Comparison]:
    """Train all arms and judge their samples."""
    size = SIZES[length]
    tokenizer = trained_tokenizer(size, folder)
    codes = {
        frames: tokenized(
            folder / f"codes_{frames}",
            [
                *prior_words(size, tokenizer, frames),
                f"--data.num_train={size.num_train * FULL // frames}",
                f"--data.num_val={size.num_val}",
            ],
        )
        for frames in (FULL, SHORT)
    }
    baseline = count_baseline(codes[FULL])
    runs: list[Run] = []
    for arm in ARMS:
        for seed in range(size.seeds[arm]):

            def train(place: Path, arm: str = arm, seed: int = seed) -> tuple[Curve, dict[str, float]]:
                return trained(arm, seed, size, place, tokenizer, codes)

            runs.append(finished_run(folder, arm, seed, train))
    past = sum(run.scores["nll_50"] < baseline for run in runs)
    setting = (
        f"Moving shapes, {FULL} frames, {FACTOR} to a latent frame; as many tokens as {size.steps} "
        f"steps on whole clips. `overall` and the scores before it are the oracle's, of {size.samples} videos a run; "
        f"NLL in nats per token on {size.num_val} held-out clips, mean over four mask ratios and at one half. "
        f"Counting, given the code at the same place one latent frame before: {baseline:.3f} nats; {past} of "
        f"{len(runs)} runs are past it. The curves are those of each arm's own validation (that of the third on short "
        "clips), against the tokens seen, in steps on whole clips."
    )
    shared: dict[str, Any] = {"runs": runs, "watched": "validation NLL, nats per token", "setting": setting}
    return {
        "mebt_curriculum": Comparison(
            "MeBT on long clips: consistency over 128 frames", score="overall", lower_is_better=False, **shared
        ),
        "mebt_curriculum_nll": Comparison(
            "MeBT on long clips: likelihood at full length", score="nll", lower_is_better=True, **shared
        ),
    }


def trained_tokenizer(size: Size, folder: Path) -> Path:
    """Train the demo's tokenizer, with longer latent frames, once; return its bundle."""
    bundle = folder / "tokenizer"
    if not bundle.exists():
        from experiments.export import main as export
        from experiments.lightning_cli import run

        coarser = [f"--model.tokenizer.{part}.downsample={DOWNSAMPLE}" for part in ("encoder", "decoder")]
        words = [f"--config={EXPERIMENTS / 'demo_tokenizer.yaml'}", *coarser, *size.tokenizer]
        run(["fit", *words, f"--run_root={folder}"])
        newest = max((folder / "demo_tokenizer").glob("version_*"), key=lambda version: version.stat().st_mtime)
        export([str(newest / "checkpoints/last.ckpt"), str(bundle)])
    return bundle


def prior_words(size: Size, tokenizer: Path, frames: int) -> list[str]:
    """The demo's prior on clips of so many frames: as many frames in all, and in a batch."""
    many = FULL // frames
    batch_size = next(int(word.split("=")[1]) for word in size.prior if word.startswith("--data.batch_size"))
    resolution = [word for word in size.tokenizer if word.startswith("--data.resolution")]
    return [
        f"--config={EXPERIMENTS / 'demo_mebt.yaml'}",
        *size.prior,
        *resolution,
        f"--model.tokenizer={tokenizer}",
        f"--model.downsample={DOWNSAMPLE}",
        f"--data.num_frames={frames}",
        f"--data.batch_size={batch_size * many}",
        "--data.val_batch_size=4",
        "--trainer.limit_val_batches=1.0",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]


def count_baseline(codes: Path) -> float:
    """Entropy of a training clip's code, given the one before it in time, in nats."""
    from datamodules.tokens import read_codes
    from models.metrics import conditional_entropy

    tensors, about = read_codes(codes, "train")
    return float(conditional_entropy(tensors["codes"], about["codebook_size"]))


def tokens_seen(arm: str, steps: int, total_steps: int) -> float:
    """Expected tokens of the first `steps` of a run, in steps on whole clips."""
    from models.priors.curriculum import expected_length, length_probabilities

    if arm != "curriculum":
        return float(steps)  # short clips come in larger batches
    longest = FULL // FACTOR
    lengths = (
        length_probabilities(
            "fraction",
            step,
            longest,
            total_steps=total_steps,
            full_length_from=FULL_LENGTH_FROM,
            steps_per_frame=1,
            width=2.0,
        )
        for step in range(steps)
    )
    return sum(expected_length(probabilities) for probabilities in lengths) / longest


def steps_of(arm: str, steps: int) -> int:
    """Steps in which an arm sees as many tokens as `steps` whole batches hold."""
    if arm != "curriculum":
        return steps
    share = tokens_seen(arm, 1000, 1000) / 1000  # of the mean length in the longest
    return math.ceil(steps / share)


def trained(
    arm: str, seed: int, size: Size, place: Path, tokenizer: Path, codes: dict[int, Path]
) -> tuple[Curve, dict[str, float]]:
    """Train one arm, and judge it."""
    from experiments.lightning_cli import run

    frames = SHORT if arm == "short and slid" else FULL
    steps = steps_of(arm, size.steps)
    schedule = "fraction" if arm == "curriculum" else "longest"
    fit = run(
        [
            "fit",
            *prior_words(size, tokenizer, frames),
            "--data=TokenDataModule",
            f"--data.root={codes[frames]}",
            f"--seed_everything={seed + 1}",
            f"--curriculum={{schedule: {schedule}, full_length_from: {FULL_LENGTH_FROM}}}",
            f"--trainer.max_steps={steps}",
            f"--trainer.val_check_interval={max(1, steps // 8)}",
            f"--checkpoint.every_n_train_steps={steps}",
            "--samples.at_validation=false",
            f"--run_root={place}",
        ]
    )
    model = fit.model.eval()
    curve = [
        (tokens_seen(arm, round(step), steps), value)
        for step, value in logged_curve(Path(str(fit.trainer.log_dir)), "val/loss")
    ]
    scores = oracle_scores(model, size, place) | likelihood(model, codes[FULL])
    (place / "about.json").write_text(json.dumps({"steps": steps, "frames": frames}) + "\n")
    return curve, scores


def oracle_scores(model: Any, size: Size, place: Path) -> dict[str, float]:
    """Mean scores of videos of 128 frames, of which a sheet is kept; the short arm slides."""
    import torch

    from callbacks.media import contact_sheet
    from lightning_modules.generator import Condition
    from models.metrics.shapes_oracle import score_clips

    videos = torch.cat([model.generate(Condition(), FULL, torch.tensor([seed])) for seed in range(size.samples)])
    contact_sheet(videos[:4]).save(place / "sheet.png")
    return {name: values.mean().item() for name, values in score_clips(videos).as_dict().items()}


def likelihood(model: Any, codes: Path) -> dict[str, float]:
    """NLL of held-out clips at full length, over the mask ratios of validation; window by window for the short arm."""
    import torch

    from datamodules.tokens import read_codes
    from lightning_modules.mebt import VALIDATION_MASK_RATIOS
    from models.priors.mebt import SampleMask, mask_window
    from models.random import keyed_generator

    clips = read_codes(codes, "val")[0]["codes"]
    windows = clips.unflatten(1, (-1, model.latent_shape[0])).flatten(0, 1)
    values: dict[float, list[float]] = {ratio: [] for ratio in VALIDATION_MASK_RATIOS}
    with torch.no_grad():
        for number, batch in enumerate(windows.split(4)):
            tokens = batch[0].numel()
            noise = torch.rand(len(batch), tokens, generator=keyed_generator(0, number)).to(model.device)
            for ratio in VALIDATION_MASK_RATIOS:
                masks = [SampleMask(0, tokens, 0, round(ratio * tokens))] * len(batch)
                nll = model.masked_nll(batch.to(model.device), 0, mask_window(noise, masks))
                values[ratio] += nll.mean(dim=1).tolist()
    means = {ratio: sum(column) / len(column) for ratio, column in values.items()}
    return {"nll": sum(means.values()) / len(means), "nll_50": means[0.5]}
