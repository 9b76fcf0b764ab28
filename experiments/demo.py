"""`longtake demo`: one tokenizer, four priors with a minute each, their videos and scores; the commands are a user's.

A causal tokenizer with finite scalar codes is trained once, and the clips are tokenized once: three priors learn the
codes, W.A.L.T what is rounded to them. So all videos come from one decoder, and the tokenizer's own reconstructions are
what none of them can be better than.
"""

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parent
TOKENIZER = "demo_causal_tokenizer"


def steps(number: int) -> list[str]:
    """Train for so many steps, and validate after the last."""
    return [f"--trainer.max_steps={number}", f"--trainer.val_check_interval={number}"]


# The demo's files are made for longer training and for other tokenizers: here each has the steps of a minute, in which
# shallow networks learn more.
SHALLOW = ["--model.depth=2", "--model.num_heads=4", "--data.batch_size=8"]
PRIORS = {
    "demo_mebt": [
        "--curriculum.schedule=longest",
        "--model.sampling.num_steps=16",
        "--model.sampling.revise_groups=8",
        "--model.sampling.revise_rounds=4",
        "--data.batch_size=16",
        *steps(430),
    ],
    "demo_tats": [*SHALLOW, *steps(360)],
    "demo_commit": [
        "--model.causal=true",
        "--model.tasks=[frame_prediction, central_inpainting, class_conditional]",
        *SHALLOW,
        *steps(280),
    ],
    "demo_walt": [
        "--model.latent_dim=4",
        "--model.unrounded=true",
        "--model.sampling.num_steps=25",
        *SHALLOW,
        *steps(360),
    ],
}
# Enough to see that everything works, not to learn anything: what CI runs.
TINY = {
    "fit": [
        *steps(4),
        "--trainer.log_every_n_steps=2",
        "--samples.num_videos=2",
    ],
    "tokenizer": ["--data.num_train=64", "--data.num_val=16"],
    "tokenize": ["--data.num_train=32", "--data.num_val=16"],
}


def main(args: Sequence[str]) -> None:
    """Train a tokenizer and the priors on the embedded world, score their samples, and print the tables."""
    parser = argparse.ArgumentParser(prog="longtake demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of everything that is made")
    parser.add_argument("--quick", action="store_true", help="the tokenizer and MeBT alone")
    parser.add_argument("--tiny", action="store_true", help="a few steps only: shows that it runs, learns nothing")
    options = parser.parse_args(args)
    out: Path = options.out
    if out.exists():
        raise FileExistsError(f"{out} exists already. Remove it, or choose another place (--out).")
    extra = TINY if options.tiny else {}
    priors = {name: flags for name, flags in PRIORS.items() if not options.quick or name == "demo_mebt"}

    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def phase(name: str, words: list[str], *kinds: str) -> Any:
        """Run a command; `kinds` says what it is, for `TINY`."""
        nonlocal clock
        words = [*words, *(word for kind in kinds for word in extra.get(kind, []))]
        print(f"\n$ longtake {shlex.join(words)}", flush=True)
        result = longtake(words)
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()
        print(f"({seconds[name]:.0f} s)", flush=True)
        return result

    def longtake(words: list[str]) -> Any:
        from experiments.cli import main as other_command
        from experiments.lightning_cli import run

        return run(words) if words[0] in ("fit", "tokenize", "evaluate") else other_command(words)

    runs = {name: out / name / "version_0" for name in (TOKENIZER, *priors)}
    tokenizer, tokens = out / "tokenizer", out / "tokens"
    place = [f"--run_root={out}", "--samples.num_videos=12"]
    configs = {name: f"--config={EXPERIMENTS / name}.yaml" for name in runs}
    clips = ["--data.num_frames=17", f"--model.tokenizer={tokenizer}"]

    fewer = steps(320) if options.quick else []
    phase("tokenizer", ["fit", configs[TOKENIZER], *place, *fewer], "fit", "tokenizer")
    phase("export", ["export", str(runs[TOKENIZER] / "checkpoints/last.ckpt"), str(tokenizer)])
    # of the models of codes, COMMIT needs most: its tasks' conditions too; the latents are W.A.L.T's
    needs_most = "demo_mebt" if options.quick else "demo_commit"
    kept = [] if options.quick else ["--latents=bf16"]
    words = ["tokenize", configs[needs_most], *clips, *priors[needs_most], *kept, f"--out={tokens}"]
    pixels = phase("tokenize", words, "tokenize")
    cached = ["--data=TokenDataModule", f"--data.root={tokens}", *clips]
    trained = {
        name: phase(name, ["fit", configs[name], *cached, *flags, *place], "fit") for name, flags in priors.items()
    }
    for name in runs:
        words = [configs[name]] if name == TOKENIZER else [configs[name], *cached, *priors[name]]
        scored = ["evaluate", *words, f"--ckpt_path={runs[name] / 'checkpoints/last.ckpt'}", "--protocol=shapes_demo"]
        phase(f"scores of {name}", [*scored, "--batch_size=16", f"--real={out / 'real'}"])
    phase("report", ["report", *map(str, runs.values()), f"--out={out / 'report.html'}"])

    numbers = {
        name: {key: float(value) for key, value in cli.trainer.callback_metrics.items() if key.startswith("val/")}
        for name, cli in trained.items()
    }
    numbers[TOKENIZER] = code_numbers(tokens) | reconstruction_numbers(tokenizer, pixels.datamodule)
    results = {
        name: json.loads((run / "evaluation-shapes_demo-last/results.json").read_text()) for name, run in runs.items()
    }
    seconds["numbers"] = time.perf_counter() - clock
    scores = {
        name: {key: value["mean"] for key, value in result["scores"].items()}
        | {"s/sample": result["seconds_per_sample"]}
        for name, result in results.items()
    }
    written = {"numbers": numbers, "scores": scores, "seconds": seconds}
    (out / "numbers.json").write_text(json.dumps(written, indent=2) + "\n")
    print_tables(out, numbers, scores, seconds)


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
        data: The priors' data module on pixels.
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


def print_tables(
    out: Path, numbers: dict[str, dict[str, float]], scores: dict[str, dict[str, float]], seconds: dict[str, float]
) -> None:
    """What was measured on held-out clips, what to compare it with, how long it took, and where everything lies."""
    from rich.console import Console
    from rich.table import Table

    table = Table("quantity", "value", "compare with", title="Longtake demo: held-out embedded video, 64 x 64 pixels")
    first = numbers[TOKENIZER]
    table.add_row(
        "PSNR of reconstructions", f"{first['val/psnr']:.2f} dB", f"mean frame {first['val/psnr_of_mean_frame']:.2f} dB"
    )
    table.add_row("codebook perplexity", f"{first['codes/perplexity']:.1f}", "codes in use, evenly counted")
    counted = f"counts, given the previous frame's token: {first['codes/entropy_given_previous']:.3f}"
    for ratio in ("0.25", "0.50", "0.75", "1.00"):
        value = numbers["demo_mebt"][f"val/nll_{ratio}"]
        note = counted if ratio == "0.50" else ""
        table.add_row(f"MeBT: NLL per token, {float(ratio):.0%} masked", f"{value:.3f} nats", note)
    if "demo_tats" in numbers:
        table.add_row("TATS: NLL per token", f"{numbers['demo_tats']['val/nll']:.3f} nats", counted)
    table.add_row("seconds: all", f"{sum(seconds.values()):.0f}", "")

    columns = ["distance", *(name for name in scores["demo_mebt"] if name.startswith("shapes_"))]
    judged = Table(
        "videos of",
        "training, s",
        *(name.removeprefix("shapes_") for name in columns),
        "s/sample",
        title="Distance (random I3D, no FVD): less is better. An oracle that knows the world, from 0 to 1: more is.",
    )
    for name, row in scores.items():
        distance = row.get("frechet_random_i3d", row.get("reconstruction_frechet_random_i3d"))
        values = {"distance": distance} | row
        cells = [f"{values[column]:.2f}" if column in values else "" for column in columns]
        judged.add_row(
            "the tokenizer: reconstructions" if name == TOKENIZER else name.removeprefix("demo_"),
            f"{seconds['tokenizer' if name == TOKENIZER else name]:.0f}",
            *cells,
            f"{row['s/sample']:.2f}",
        )
    console = Console(width=130)
    console.print(table, judged)
    for what, where in (
        ("report", "report.html"),
        ("videos", "demo_*/version_0/samples/*.mp4"),
        ("contact sheets", "demo_*/version_0/evaluation-shapes_demo-last/contact_sheet.png"),
        ("numbers", "numbers.json"),
    ):
        console.print(f"{what}: {out}/{where}", soft_wrap=True)
    console.print(f"TensorBoard: tensorboard --logdir {out}", soft_wrap=True)
