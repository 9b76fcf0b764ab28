"""`longtake demo`: the whole road on a CPU, with the commands that a user types, and a table of numbers."""

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parent
PIECE_FRAMES = 16  # what I3D is given
REFERENCE_CLIPS = 128  # real clips that all distances are taken to: few would put their own ground colours first

# Enough to see that everything works, not to learn anything: what CI runs.
TINY = {
    "tokenizer": [
        "--trainer.max_steps=12",
        "--trainer.val_check_interval=12",
        "--data.num_train=64",
        "--data.num_val=16",
    ],
    "prior": ["--trainer.max_steps=12", "--trainer.val_check_interval=12"],
    "tokenize": ["--data.num_train=32", "--data.num_val=16"],
    "sample": ["--num_samples=4"],
}


def main(args: Sequence[str]) -> None:
    """Train a tokenizer and a prior on the embedded world, sample, and print the table."""
    parser = argparse.ArgumentParser(prog="longtake demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of everything that is made")
    parser.add_argument("--tiny", action="store_true", help="a few steps only: shows that it runs, learns nothing")
    options = parser.parse_args(args)
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists already. Remove it, or choose another place (--out).")
    extra = TINY if options.tiny else {}

    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def phase(name: str, words: list[str]) -> Any:
        nonlocal clock
        words = [*words, *extra.get(name, [])]
        print(f"\n$ longtake {shlex.join(words)}", flush=True)
        result = run(words)
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()
        return result

    from callbacks.sample_writer import SampleWriter
    from experiments.export import main as export
    from experiments.lightning_cli import run

    seconds["start"], clock = time.perf_counter() - clock, time.perf_counter()
    out = options.out
    tokenizer, codes = out / "tokenizer", out / "codes"
    place = [f"--run_root={out}"]
    common = [f"--model.tokenizer={tokenizer}"]
    prior_config = f"--config={EXPERIMENTS / 'demo_mebt.yaml'}"

    phase("tokenizer", ["fit", f"--config={EXPERIMENTS / 'demo_tokenizer.yaml'}", *place])
    export([str(out / "demo_tokenizer/version_0/checkpoints/last.ckpt"), str(tokenizer)])
    pixels = phase("tokenize", ["tokenize", prior_config, *common, f"--out={codes}"])
    cached = ["--data=TokenDataModule", f"--data.root={codes}"]
    prior = phase("prior", ["fit", prior_config, *common, *cached, *place])
    checkpoint = out / "demo_mebt/version_0/checkpoints/last.ckpt"
    samples = phase(
        "sample", ["sample", prior_config, *common, *cached, f"--ckpt_path={checkpoint}", f"--out={out / 'samples'}"]
    )

    numbers = {name: float(value) for name, value in prior.trainer.callback_metrics.items() if name.startswith("val/")}
    numbers |= code_numbers(codes) | reconstruction_numbers(tokenizer, pixels.datamodule)
    seconds["numbers"], clock = time.perf_counter() - clock, time.perf_counter()
    writer = next(callback for callback in samples.trainer.callbacks if isinstance(callback, SampleWriter))
    assert writer.shown is not None
    scores = scores_of(tokenizer, pixels.datamodule, writer.shown / 127.5 - 1)
    seconds["scores"] = time.perf_counter() - clock
    written = {"numbers": numbers, "scores": scores, "seconds": seconds}
    (out / "numbers.json").write_text(json.dumps(written, indent=2) + "\n")
    print_table(out, numbers, scores, seconds)


def code_numbers(folder: Path) -> dict[str, float]:
    """Codebook use on the held-out clips, and what counting the training clips knows about a code.

    The entropy comes from the larger set: from few pairs of codes, it would come out too low.
    """
    from datamodules.tokens import read_codes
    from models.metrics import conditional_entropy, perplexity

    held_out, about = read_codes(folder, "val")
    train, _ = read_codes(folder, "train")
    return {
        "codes/perplexity": perplexity(held_out["codes"], about["codebook_size"]).item(),
        "codes/entropy_given_previous": conditional_entropy(train["codes"], about["codebook_size"]).item(),
    }


def reconstruction_numbers(tokenizer_path: Path, data: Any) -> dict[str, float]:
    """PSNR in dB of held-out clips, and of predicting each clip's mean frame.

    Args:
        tokenizer_path: Bundle of the tokenizer.
        data: The prior's data module on pixels, so that the clips are as long as the prior's.
    """
    import torch

    from models.metrics import psnr
    from models.weights import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)
    data.setup("validate")
    scores, baseline = [], []
    with torch.no_grad():
        for batch in data.val_dataloader():
            video = batch["video"]
            scores.append(psnr(tokenizer.decode(tokenizer.encode(video).latents), video))
            baseline.append(psnr(video.mean(dim=2, keepdim=True).expand_as(video), video))
    return {
        "val/psnr": torch.cat(scores).mean().item(),
        "val/psnr_of_mean_frame": torch.cat(baseline).mean().item(),
    }


def scores_of(tokenizer_path: Path, data: Any, samples: Any) -> dict[str, dict[str, float]]:
    """What the scores say of held-out clips, their reconstructions, the prior's samples and noise.

    The oracle looks at as many whole clips as there are samples. The Frechet distance is taken between the first
    `PIECE_FRAMES` frames of all clips and those of `REFERENCE_CLIPS` training clips, in the features of an I3D with
    random weights: an order, no FVD.

    Args:
        tokenizer_path: Bundle of the tokenizer.
        data: The prior's data module on pixels.
        samples: `[n, 3, T, H, W]` in [-1, 1], what the prior generated.
    """
    import torch

    from models.metrics import FrechetDistance, random_i3d
    from models.metrics.shapes_oracle import score_clips
    from models.random import keyed_generator
    from models.weights import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)
    data.setup("fit")
    held_out, training = data.datasets["val"], data.datasets["train"]
    real = torch.stack([held_out.render(i) for i in range(len(held_out))])
    others = torch.stack([training.render(i, 0, PIECE_FRAMES) for i in range(min(REFERENCE_CLIPS, len(training)))])
    with torch.no_grad():
        encoded = torch.cat([tokenizer.decode(tokenizer.encode(video).latents) for video in real.split(4)])
    sets = {
        "held-out video": real,
        "reconstructions": encoded,
        "samples of the prior": samples,
        "noise": torch.rand(samples.shape, generator=keyed_generator(0)) * 2 - 1,
    }
    detector = random_i3d()
    metric = FrechetDistance(detector)
    metric.update(detector(others), real=True)
    scores: dict[str, dict[str, float]] = {}
    for name, video in sets.items():
        metric.reset_generated()
        metric.update(detector(video[:, :, :PIECE_FRAMES]), real=False)
        judged = score_clips(video[: len(samples)]).as_dict()
        oracle = {score: values.mean().item() for score, values in judged.items()}
        scores[name] = {detector.card.metric_name("frechet"): metric.compute().item()} | oracle
    return scores


def print_table(
    out: Path, numbers: dict[str, float], scores: dict[str, dict[str, float]], seconds: dict[str, float]
) -> None:
    """One table: what was measured on held-out clips, what to compare it with, how long it took, where it lies."""
    from rich.console import Console
    from rich.table import Table

    table = Table("quantity", "value", "compare with", title="Longtake demo: held-out embedded video, 64 x 64 pixels")
    table.add_row(
        "PSNR of reconstructions",
        f"{numbers['val/psnr']:.2f} dB",
        f"mean frame {numbers['val/psnr_of_mean_frame']:.2f} dB",
    )
    table.add_row("codebook perplexity", f"{numbers['codes/perplexity']:.1f}", "codes in use, evenly counted")
    entropy = numbers["codes/entropy_given_previous"]
    for ratio in ("0.25", "0.50", "0.75", "1.00"):
        table.add_row(
            f"NLL per token, {float(ratio):.0%} masked",
            f"{numbers[f'val/nll_{ratio}']:.3f} nats",
            f"counts, given the previous frame's token: {entropy:.3f}" if ratio == "0.50" else "",
        )
    for name, value in seconds.items():
        table.add_row(f"seconds: {name}", f"{value:.0f}", "")
    table.add_row("seconds: all", f"{sum(seconds.values()):.0f}", "")
    judged = Table("video", *next(iter(scores.values())), title="Scores of an oracle that knows the world, from 0 to 1")
    for name, row in scores.items():
        judged.add_row(name, *(f"{value:.3f}" for value in row.values()))
    console = Console(width=110)
    console.print(table, judged)
    for what, where in (
        ("videos", "samples/seed=*.mp4, samples/grid.mp4"),
        ("contact sheet", "samples/contact_sheet.png"),
        ("numbers", "numbers.json"),
    ):
        console.print(f"{what}: {out}/{where}", soft_wrap=True)
    console.print(f"TensorBoard: tensorboard --logdir {out}", soft_wrap=True)
