"""COMMIT's claims on moving shapes: its masking, its way to give a condition, its decoding (MAGVIT, tables 5 and 6).

- `commit_masking` (and `commit_tasks.md`, task by task): all three losses against masked tokens alone, and (not in
  `short`) against masks without any condition in training.
  The score is the NLL of unknown tokens in in- and outpainting, where all arms read the same inputs.
- `commit_condition` (not in `short`): refined, before the sequence, or kept (MaskGIT's latent masking); fewer losses.
- `commit_decoding` (not in `short`): frame prediction by an autoregressive transformer, MaskGIT and COMMIT.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from datamodules.tokens import read_codes
from experiments.ablations.arms import Comparison, Curve, Run, finished_run, logged_curve, tokenized
from experiments.cli import ROOT
from lightning_modules import COMMITModule
from lightning_modules.generator import Condition
from models.priors.autoregressive import AutoregressiveSampling, slide
from models.priors.commit import GIVEN, latent_mask, num_corrupted_tokens
from models.priors.decoding import seeded_noise
from models.priors.tasks import CLASS_TASKS, EMPTY_TASKS, TASKS, Task, known_region
from models.priors.tats import TATS
from models.random import keyed_generator

PAINTING: tuple[Task, ...] = tuple(task for task in TASKS if "painting" in task)
PIXEL_TASKS: tuple[Task, ...] = tuple(task for task in TASKS if task not in EMPTY_TASKS)
MASKS_EACH = 2  # random masks of each held-out clip
KNOWN_FRAMES = 5  # in frame prediction: two latent frames, which tell the motion
Train = Callable[[Path], tuple[Curve, dict[str, float]]]


@dataclass(frozen=True)
class Size:
    """What one length of the comparison means."""

    seeds: int
    steps: int
    batch_size: int
    num_train: int
    num_val: int
    num_samples: int  # clips whose pixels are compared
    dim: int
    depth: int
    tokenizer: tuple[str, ...] = ()  # flags of demo_tokenizer

    @property
    def setting(self) -> str:
        """For the reader of the table."""
        return (
            f"Moving shapes, 16 frames of 64 x 64, the demo's tokenizer; {self.steps} steps of {self.batch_size}, "
            f"width {self.dim}, {self.depth} layers; {self.num_val} held-out clips, {MASKS_EACH} masks each; pixels of "
            f"{self.num_samples} samples."
        )


FEW = (
    "--trainer.max_steps=4",
    "--trainer.log_every_n_steps=1",
    "--trainer.val_check_interval=4",
    "--data.num_train=16",
    "--data.num_val=8",
)
SIZES = {
    "quick": Size(1, 2, 2, 4, 2, 1, 16, 1, FEW),
    "short": Size(2, 700, 16, 1024, 64, 16, 128, 4),
    "long": Size(3, 30_000, 64, 16_384, 256, 128, 384, 12),
}


def compare(length: str, folder: Path) -> dict[str, Comparison]:
    """Train the arms; see the module."""
    size = SIZES[length]
    bench = Bench(size, folder)
    arms: dict[str, list[str]] = {"COMMIT": [], "mask loss only": ["--model.losses=[mask]"]}
    if length != "short":
        arms["no condition in training"] = ["--model.tasks=[unconditional]"]
    runs = [*bench.runs(arms), bench.marginal()]
    write_tasks(runs, folder.parent / "commit_tasks.md")
    watched = "validation NLL of the arm's own tasks, nats"
    title = "COMMIT's masking: in- and outpainting"
    found = {"commit_masking": Comparison(title, summaries(runs), "nll unknown", True, watched, size.setting)}
    if length == "short":
        return found
    arms = {
        "COMMIT": [],
        "mask and reconstruct": ["--model.losses=[mask, reconstruct]"],
        "prefix condition": ["--model.masking=prefix"],
        "latent masking": ["--model.masking=latent"],
    }
    runs = summaries(bench.runs(arms))
    title = "How a condition is given: in- and outpainting"
    found["commit_condition"] = Comparison(title, runs, "nll unknown", True, watched, size.setting)
    runs = bench.decoding_runs()
    title = "Decoding"
    found["commit_decoding"] = Comparison(
        title, runs, "psnr new", False, "NLL, nats", size.setting + f" Frame prediction from {KNOWN_FRAMES} frames."
    )
    return found


def summaries(runs: list[Run]) -> list[Run]:
    """The same runs with the scores that are no single task's; NaN where an arm has no such score."""
    names = list(dict.fromkeys(name for run in runs for name in run.scores if ", " not in name or "dB" in name))
    return [replace(run, scores={name: run.scores.get(name, math.nan) for name in names}) for run in runs]


def write_tasks(runs: list[Run], file: Path) -> None:
    """Write NLL and accuracy of unknown tokens by task, each the mean over an arm's seeds."""
    arms = list(dict.fromkeys(run.arm for run in runs))

    def cell(arm: str, score: str, task: str) -> str:
        values = [run.scores.get(f"{score}, {task}", run.scores[score]) for run in runs if run.arm == arm]
        return f"{sum(values) / len(values):.3f}"

    lines = [
        "| task | " + " | ".join(f"{arm}: NLL, accuracy" for arm in arms) + " |",
        "| --- |" + " --- |" * len(arms),
        *(
            f"| {task} | "
            + " | ".join(f"{cell(arm, 'nll unknown', task)}, {cell(arm, 'accuracy unknown', task)}" for arm in arms)
            + " |"
            for task in PIXEL_TASKS
        ),
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


class Bench:
    """A tokenizer, cached codes and conditions, held-out clips: what all arms share."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.tokenizer, self.codes = folder / "tokenizer", folder / "codes"
        self._make()
        clips = self._val_clips()
        self.clips = {name: clips[name][: size.num_val] for name in ("video", "label")}

    def _make(self) -> None:
        from experiments.export import main as export
        from experiments.lightning_cli import run

        if not self.tokenizer.exists():
            place = f"--run_root={self.folder / 'tokenizers'}"
            run(["fit", f"--config={ROOT / 'experiments/demo_tokenizer.yaml'}", place, *self.size.tokenizer])
            checkpoints = self.folder.glob("tokenizers/demo_tokenizer/version_*/checkpoints/last.ckpt")
            export([str(max(checkpoints)), str(self.tokenizer)])
        tokenized(self.codes, [*self.experiment("demo_commit"), *self._pixels()])

    def experiment(self, name: str) -> list[str]:
        """Command line of a COMMIT on the demo's tokenizer."""
        return [
            f"--config={ROOT / 'experiments' / name}.yaml",
            f"--model.tokenizer={self.tokenizer}",
            f"--model.dim={self.size.dim}",
            f"--model.depth={self.size.depth}",
            "--model.num_heads=8",
        ]

    def _pixels(self) -> list[str]:
        return [f"--data.num_train={self.size.num_train}", f"--data.num_val={self.size.num_val}"]

    def _val_clips(self) -> dict[str, Tensor]:
        from datamodules import MovingShapesDataModule
        from experiments.arguments import expanded_configs

        data: dict[str, Any] = {}
        for file in expanded_configs(ROOT / "experiments/demo_commit.yaml"):
            data |= (yaml.safe_load(file.read_text()).get("data") or {}).get("init_args", {})
        module = MovingShapesDataModule(**data | {"num_val": self.size.num_val, "seed": 42, "batch_size": 8})
        module.setup("validate")
        batches = list(module.ordered_dataloader("val"))
        return {name: torch.cat([batch[name] for batch in batches]) for name in ("video", "label")}

    def fit(self, place: Path, seed: int, flags: list[str]) -> tuple[COMMITModule, Curve]:
        """Train a COMMIT from the cache."""
        from experiments.lightning_cli import run

        cli = run(
            [
                "fit",
                *self.experiment("demo_commit"),
                "--data=TokenDataModule",
                f"--data.root={self.codes}",
                f"--data.batch_size={self.size.batch_size}",
                f"--seed_everything={seed}",
                f"--trainer.max_steps={self.size.steps}",
                f"--trainer.val_check_interval={max(1, self.size.steps // 8)}",
                f"--trainer.log_every_n_steps={min(10, max(1, self.size.steps // 8))}",
                "--samples.at_validation=false",
                "--trainer.enable_progress_bar=false",
                f"--run_root={place}",
                "--run_name=commit",
                *flags,
            ]
        )
        return cli.model.eval(), logged_curve(Path(str(cli.trainer.log_dir)), "val/loss")

    def runs(self, arms: dict[str, list[str]]) -> list[Run]:
        """All arms with all seeds."""

        def train(flags: list[str], seed: int) -> Train:
            def finished(place: Path) -> tuple[Curve, dict[str, float]]:
                module, curve = self.fit(place, seed, flags)
                return curve, self.token_scores(module) | self.pixel_scores(module)

            return finished

        return [
            finished_run(self.folder, arm, seed, train(flags, seed))
            for arm, flags in arms.items()
            for seed in range(self.size.seeds)
        ]

    # Scores

    @torch.no_grad()
    def token_scores(self, module: COMMITModule) -> dict[str, float]:
        """NLL and accuracy of held-out tokens under masks that are the same for all arms.

        Unknown tokens are masked and carry no condition; known ones carry one and are to be refined, which is compared
        with copying the condition. What an arm is shown of the condition is what it will have when it generates: the
        codes of the padded video. Each score is a mean over in- and outpainting; by task, it is `<score>, <task>`.
        """
        video, label = self.clips["video"], self.clips["label"]
        codes = module.encode_video(video).flatten(1)
        scores: dict[str, list[float]] = {}
        for task in PIXEL_TASKS:
            is_condition = module.condition_tokens(task).expand_as(codes)
            condition = module.condition_codes({"video": video}, task, len(codes))
            batch = {"video": video, "label": label, f"task/{task}": condition}
            unknown, known = torch.zeros(3), torch.zeros(4)
            for number in range(MASKS_EACH):
                count, order = random_masks(codes, number)
                if module.network.masking == "latent":
                    tokens, kinds = latent_mask(codes, is_condition, order, count, module.network.mask_id)
                    given = condition.where(is_condition, tokens)
                    wanted = label if task in CLASS_TASKS else None
                    logits = module.network(given, wanted, module.prompt(task))
                else:
                    logits, kinds = module.predictions(batch, task, codes, (count, order))
                nll = module.network.nll(logits, codes)
                right = (logits.argmax(-1)[..., 0] == codes).float()
                is_hidden = (kinds != 0) & (kinds != GIVEN)
                for total, where in ((unknown, is_hidden & ~is_condition), (known, is_hidden & is_condition)):
                    total[:3] += torch.stack([nll[where].sum(), right[where].sum(), where.sum()])
                known[3] += (condition == codes)[is_hidden & is_condition].sum()
            per_task = {"nll unknown": unknown[0] / unknown[2], "accuracy unknown": unknown[1] / unknown[2]}
            if known[2]:
                per_task |= {
                    "nll known": known[0] / known[2],
                    "accuracy known": known[1] / known[2],
                    "accuracy of copying": known[3] / known[2],
                }
            for name, value in per_task.items():
                if task in PAINTING:
                    scores.setdefault(name, []).append(float(value))
                scores[f"{name}, {task}"] = [float(value)]
        return {name: sum(values) / len(values) for name, values in scores.items()}

    @torch.no_grad()
    def pixel_scores(self, module: COMMITModule) -> dict[str, float]:
        """How far known pixels of samples are below the tokenizer's own reconstruction, in dB; at most 1 is wanted."""
        video = self.clips["video"][: self.size.num_samples]
        made_again = module.decode_codes(module.encode_video(video))
        scores = {}
        groups = {"interpolation": PIXEL_TASKS[1:2], "outpainting": PAINTING[:4], "inpainting": PAINTING[4:]}
        for group, tasks in groups.items():
            gaps = []
            for task in tasks:
                known = known_region(task, module.clip_shape)
                sample = module.generate(Condition(video=video, task=task), module.num_frames, torch.arange(len(video)))
                gaps.append(psnr(made_again, video, known) - psnr(sample, video, known))
            scores[f"known pixels, {group}, dB below"] = sum(gaps) / len(gaps)
        return scores

    def marginal(self) -> Run:
        """Codes drawn by their frequency in training, whatever the condition."""
        train, about = read_codes(self.codes, "train")
        val, _ = read_codes(self.codes, "val")
        counts = train["codes"].flatten().bincount(minlength=about["codebook_size"]) + 1.0
        p = counts / counts.sum()
        nll = float(-p[val["codes"]].log().mean())
        accuracy = float((val["codes"] == p.argmax()).float().mean())
        scores = {"nll unknown": nll, "accuracy unknown": accuracy}
        return Run("frequencies of codes", 0, 0.0, [(0, nll), (self.size.steps, nll)], scores)

    # Decoding

    def decoding_runs(self) -> list[Run]:
        """AR, MaskGIT and COMMIT on the same tokens."""
        runs = []
        for seed in range(self.size.seeds):
            for arm, flags in (("COMMIT", []), ("MaskGIT", ["--model.masking=latent"])):
                flags = [*flags, "--model.tasks=[frame_prediction]", f"--model.past_frames={KNOWN_FRAMES}"]
                runs.append(finished_run(self.folder, f"{arm} decoding", seed, self._train_masked(seed, flags)))
            runs.append(finished_run(self.folder, "AR decoding", seed, self._train_autoregressive(seed)))
        return runs

    def _train_masked(self, seed: int, flags: list[str]) -> Train:
        def finished(place: Path) -> tuple[Curve, dict[str, float]]:
            codes = self.folder / "codes_of_prediction"
            tokenized(codes, [*self.experiment("demo_commit"), *self._pixels(), *flags[-2:]])
            module, curve = self.fit(place, seed, [*flags, f"--data.root={codes}"])
            seeds = torch.arange(self.size.num_samples)

            def sample(video: Tensor) -> Tensor:
                return module.generate_codes(Condition(video=video, task="frame_prediction"), module.num_frames, seeds)

            return curve, self.prediction_scores(module, sample)

        return finished

    def _train_autoregressive(self, seed: int) -> Train:
        """TATS' transformer after the condition's tokens, in a loop of its own: no module has such a prefix."""

        def finished(place: Path) -> tuple[Curve, dict[str, float]]:
            train, about = read_codes(self.folder / "codes_of_prediction", "train")
            size = about["codebook_size"]
            module = COMMITModule(
                str(self.tokenizer),
                num_frames=16,
                resolution=64,
                codebook_size=size,
                tasks=["frame_prediction"],
                past_frames=KNOWN_FRAMES,
                dim=8,  # for its tokenizer and its tasks only
                depth=1,
                num_heads=1,
            )
            module.load_tokenizer()
            known = module.condition_tokens("frame_prediction")
            codes = train["codes"].flatten(1)
            condition = train["task/frame_prediction"].flatten(1)[:, known]  # [n, C]
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network = TATS(
                    size,
                    module.latent_shape,
                    self.size.dim,
                    self.size.depth,
                    8,
                    size,
                    condition.shape[1],
                    position_init="sinusoidal",
                    init_std=0.06,
                )
            optimizer = torch.optim.AdamW(network.parameters(), 1e-3, betas=(0.9, 0.96), weight_decay=0.045)
            curve: Curve = []
            for step in range(self.size.steps):
                rows = torch.randint(len(codes), (self.size.batch_size,), generator=keyed_generator(seed, step))
                warm = min(1.0, (step + 1) / 50)
                optimizer.param_groups[0]["lr"] = 1e-3 * warm * 0.5 * (1 + math.cos(math.pi * step / self.size.steps))
                logits = network.code_logits(codes[rows], condition[rows])
                loss = F.cross_entropy(logits.flatten(0, 1), size + codes[rows].flatten())
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                if step % max(1, self.size.steps // 8) == 0 or step == self.size.steps - 1:
                    curve.append((step, loss.item()))
            network.eval()
            noise = seeded_noise(torch.arange(self.size.num_samples), "cpu")

            @torch.no_grad()
            def sample(video: Tensor) -> Tensor:
                tokens = module.condition_codes({"video": video}, "frame_prediction", len(video))[:, known]
                start = network.condition_tokens(len(video), tokens)
                drawn = slide(network, start, module.latent_shape[0], AutoregressiveSampling(), noise)
                return drawn.unflatten(2, module.latent_shape[1:])

            return curve, self.prediction_scores(module, sample)

        return finished

    @torch.no_grad()
    def prediction_scores(self, module: COMMITModule, sample: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """How samples continue held-out clips, whose motion the first frames tell."""
        video = self.clips["video"][: self.size.num_samples]
        start = time.perf_counter()
        codes = sample(video)
        seconds = (time.perf_counter() - start) / len(video)
        new = ~known_region("frame_prediction", module.clip_shape, KNOWN_FRAMES)
        right = (codes == module.encode_video(video)).float()[:, KNOWN_FRAMES // module.downsample[0] + 1 :].mean()
        return {
            "psnr new": psnr(module.decode_codes(codes), video, new),
            "accuracy new": float(right),
            "seconds a clip": seconds,
        }


def random_masks(codes: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """How many tokens of each clip are corrupted `[B]`, and scores that say which `[B, N]`: the same for all arms."""
    generator = keyed_generator(7, number)
    ratios = torch.rand(len(codes), generator=generator).tolist()
    counts = [num_corrupted_tokens("cosine", ratio, codes.shape[1]) for ratio in ratios]
    return torch.tensor(counts), torch.rand(codes.shape, generator=generator)


def psnr(made: Tensor, video: Tensor, where: Tensor) -> float:
    """PSNR in dB over the pixels `[T, H, W]` of all clips, of videos in [-1, 1]."""
    error = (made - video).square().movedim(1, -1)[:, where].mean()
    return float(10 * (4 / error).log10())
