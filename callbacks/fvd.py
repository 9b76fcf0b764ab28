"""Distances between real and generated videos, and what they show, while a run trains."""

import csv
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from callbacks.at_rest import at_rest, averaged_weights
from models.blocks.distributed import gather_rows, sum_over_ranks
from models.metrics import FrechetDistance, ReconstructionFrechetDistance, load_i3d, random_i3d
from models.metrics.detectors import Features
from models.metrics.shapes_oracle import score_clips
from models.random import keyed_generator, keyed_seed
from models.shapes_world import CLASS_NAMES

# How clips are loaded, not what they are.
_LOADER_ARGUMENTS = ("batch_size", "val_batch_size", "num_workers")
_CLIP_ORDER_STREAM = 131


class FVDEvaluation(Callback):
    """Measures the Frechet distance of generated videos to real ones every so often, and once more at the end.

    A generator (a module with `generate`) makes its videos through `sample_videos(batch, seeds)`: sample i from the
    seed of its number, under the conditions of a clip. Any other module shows by `sample_videos` its
    reconstructions below the originals, which are compared with their own inputs. Averaged weights are used where the
    run keeps them. The ranks share the samples, which do not depend on their number.

    A number is logged as `metrics/<name>_<frames>f_<samples>`, as in `metrics/fvd_16f_256`, for distances between
    different numbers of samples cannot be compared. The detector gives the name: without published weights (`weights`)
    it is `frechet_random_i3d`, and says little about quality. Numbers go to the run's loggers and to
    `<name>_<frames>f.csv` in its folder; a ModelCheckpoint can monitor those of `num_samples` (mode min). On the
    embedded moving shapes, the scores of the oracle that knows their laws stand beside it, as
    `metrics/shapes_<score>`; a generator is held to the clips' classes if it says that it is `class_conditional`.

    `longtake validate` of a tokenizer measures once, with `num_samples`, where the weights of a detector are given.

    Features of the real clips are computed before training and kept on disk, by the hash of all that they depend on.

    Args:
        every_n_steps: optimizer steps from one evaluation to the next; 0 for none by steps.
        every_n_epochs: epochs from one evaluation to the next; 0 for none by epochs.
        num_samples: videos of each evaluation, at least 2. The fewer, the higher the distance.
        final_samples: videos of the evaluation at the end of training; 0 for none. Without evaluations by steps or
            epochs there is none either.
        num_real: real clips, drawn from the split once and for all; all if there are fewer. A tokenizer's
            reconstructions are compared with their own inputs, so that there are no more of them.
        split: where real clips and conditions come from. Published numbers of UCF-101 use train, those of BAIR the
            held-out clips.
        max_seconds: limit of one evaluation; null for none. One that does not come to its end in time says how many
            samples it got to, and gives no distance.
        weights: file of I3D's weights; null for random ones.
        profile: how I3D sees videos; null for the way that the file was published with.
        data: where the real clips come from; null for the run's own data. Needed if those are cached codes.
        cache: folder for the features of real clips.
        oracle_samples: videos of moving shapes to judge, the first of each evaluation; 0 for none.
        seed: key of the samples.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        every_n_epochs: int = 0,
        num_samples: int = 256,
        final_samples: int = 2048,
        num_real: int = 2048,
        split: Literal["train", "val"] = "val",
        max_seconds: float | None = None,
        weights: str | None = None,
        profile: Literal["tf", "videogpt", "stylegan_v"] | None = None,
        data: LightningDataModule | None = None,
        cache: str = "runs/real_features",
        oracle_samples: int = 64,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 0),
            ("every_n_epochs", every_n_epochs, 0),
            ("num_samples", num_samples, 2),
            ("final_samples", final_samples, 0),
            ("num_real", num_real, 2),
            ("oracle_samples", oracle_samples, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} is too small: at least {least} (--fvd.{name}).")
        if final_samples == 1:
            raise ValueError("final_samples=1 has no spread: 0 for none, or at least 2 (--fvd.final_samples).")
        if max_seconds is not None and not max_seconds > 0:
            raise ValueError(f"max_seconds={max_seconds} must be more than 0, or null (--fvd.max_seconds).")
        if profile is not None and weights is None:
            raise ValueError(f"profile={profile} is for published weights: give their file too (--fvd.weights).")
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.num_samples = num_samples
        self.final_samples = final_samples
        self.num_real = num_real
        self.split = split
        self.max_seconds = math.inf if max_seconds is None else max_seconds
        self.weights = weights
        self.profile = profile
        self.data = data
        self.cache = Path(cache)
        self.oracle_samples = oracle_samples
        self.seed = seed
        self._last_step = -1

    def is_off(self, trainer: Trainer) -> bool:
        """Whether there is nothing to do."""
        return not (self.every_n_steps or self.every_n_epochs) or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]

    # Before training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the detector, and have the features of the real clips.

        Raises:
            ValueError: if there are no real clips to be had.
        """
        if not self.is_off(trainer):
            self._prepare(trainer, pl_module)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._real_data = self._find_data(trainer)
        self._detector = load_i3d(self.weights, self.profile) if self.weights else random_i3d()
        self._detector.to(pl_module.device)
        self._metrics: dict[int, FrechetDistance] = {}
        self._measured = (-1, 0)  # step and number of samples
        self._real_features(trainer, pl_module)
        class_names = getattr(self._real_data, "class_names", list)
        self._knows_shapes = tuple(class_names()) == CLASS_NAMES

    def _find_data(self, trainer: Trainer) -> Any:
        """The data module of the real clips, set up."""
        data: Any = self.data
        if data is None:
            data = trainer.datamodule  # type: ignore[attr-defined]
            if data is None:
                raise ValueError("FVD compares with real clips: fit with a data module, or name one (--fvd.data).")
            if self.split == "train":
                data.setup("fit")  # nothing new in a fit; a validation has not made this split
        else:
            data.trainer = trainer  # its loaders ask for the rank
            if trainer.is_global_zero:
                data.prepare_data()
            trainer.strategy.barrier()
            data.setup("fit" if self.split == "train" else "validate")
        if getattr(data, "lossy", False):
            raise ValueError(
                f"{type(data).__name__} reads frames that were compressed with a loss (lossy=True): they are no real "
                "set, for the distance would favour models with the same artefacts. Name a data module that reads the "
                "originals (--fvd.data)."
            )
        return data

    def _real_features(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the features of `num_real` clips, on rank 0 (none on the others), and the clips' shape."""
        loader = self._real_data.ordered_dataloader(self.split)
        first = loader.dataset[next(iter(loader.batch_sampler))[0]]
        if "video" not in first:
            raise ValueError(
                f"The batches of {type(self._real_data).__name__} hold no pixels. Name the data module that has them: "
                "--fvd.data <class> --fvd.data.num_frames ..."
            )
        self._video_shape = list(first["video"].shape)
        self._num_clips = min(self.num_real, len(loader.dataset))
        card = self._detector.card
        about = {
            "data": type(self._real_data).__name__,
            "arguments": {k: v for k, v in self._real_data.hparams.items() if k not in _LOADER_ARGUMENTS},
            "split": self.split,
            "clips": [self._num_clips, len(loader.dataset)],
            # in case the files or the code have changed
            "first_clip": hashlib.sha256(first["video"].contiguous().numpy().tobytes()).hexdigest(),
            "detector": asdict(card),
        }
        text = json.dumps(about, sort_keys=True, default=str)
        file = self.cache / f"{card.name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.safetensors"
        if not trainer.strategy.broadcast(file.is_file()):
            values, logits = self._compute_real(trainer, pl_module)
            if trainer.is_global_zero:
                self.cache.mkdir(parents=True, exist_ok=True)
                partial = file.with_suffix(f".{os.getpid()}.part")
                save_file({"values": values, "logits": logits}, partial, {"about": text})
                os.replace(partial, file)
            rank_zero_info(f"Features of {self._num_clips} real clips: {file}")
        if trainer.is_global_zero:
            stored = load_file(file)
            self._real = Features(stored["values"], stored["logits"], card)
        else:
            self._real = Features(torch.zeros(0, card.num_features), torch.zeros(0, card.num_classes), card)

    def _compute_real(self, trainer: Trainer, pl_module: LightningModule) -> list[Tensor]:
        """Values and logits of the real clips, in order; the ranks share the work."""
        parts = [
            self._detector(batch["video"].to(pl_module.device))
            for ids, batch, _ in self._batches(trainer, self._real_data, self._num_clips)
            if ids
        ]
        share = -(-self._num_clips // trainer.world_size)
        i = torch.arange(self._num_clips)
        place = i % trainer.world_size * share + i // trainer.world_size  # of clip i, where the ranks' rows are joined
        out = []
        for width, rows in (
            (self._detector.card.num_features, [part.values for part in parts]),
            (self._detector.card.num_classes, [part.logits for part in parts]),
        ):
            mine = torch.cat([torch.zeros(0, width, device=pl_module.device), *rows])
            out.append(gather_rows(F.pad(mine, (0, 0, 0, share - len(mine)))).cpu()[place])
        return out

    def _batches(self, trainer: Trainer, data: Any, number: int) -> Iterator[tuple[list[int], dict[str, Any], int]]:
        """Share out samples `0 ... number - 1` to the ranks, with a clip of the split for each.

        Clips come in an order that is drawn once and for all, for neighbours may be of one class; if there are fewer
        than samples, they come again.

        Yields:
            Numbers of this rank's samples; the batch of their clips; how many samples all ranks have had so far. There
            are as many batches on all ranks, but the last may be empty.
        """
        loader = data.ordered_dataloader(self.split)
        clips = len(loader.dataset)
        order = torch.randperm(clips, generator=keyed_generator(_CLIP_ORDER_STREAM)).tolist()
        requests = next(iter(loader.batch_sampler))
        size = len(requests)
        mine = range(trainer.global_rank, number, trainer.world_size)
        batches = [mine[i : i + size] for i in range(0, len(mine), size)]
        chosen = DataLoader(
            loader.dataset,
            batch_sampler=[[replace(requests[0], index=order[i % clips]) for i in ids] for ids in batches],
            num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
            collate_fn=loader.collate_fn,
            generator=torch.Generator(),  # or it would draw from the training's
        )
        given = 0
        for ids, batch in zip(batches, chosen, strict=True):
            given = min(number, given + size * trainer.world_size)
            yield list(ids), batch, given
        if given < number:
            yield [], {}, number

    # A validation by itself

    def _validates(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether this is a command that validates a tokenizer, and there is a detector of published weights."""
        is_tokenizer = not hasattr(pl_module, "generate")
        return trainer.state.fn == "validate" and self.weights is not None and is_tokenizer

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the detector, and have the features of the real clips."""
        if self._validates(trainer, pl_module):
            self._prepare(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, and let the number stand among those of the validation."""
        if self._validates(trainer, pl_module):
            pl_module.log_dict(self._measure(trainer, pl_module, self.num_samples), on_epoch=True)

    # During training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a resumed run's first step as measured: its batches may still be accumulating."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after each `every_n_steps` optimizer steps."""
        if self.is_off(trainer) or not self.every_n_steps or trainer.global_step % self.every_n_steps:
            return
        if trainer.global_step != self._last_step:  # not several batches of one step
            self._last_step = trainer.global_step
            metrics = self._measure(trainer, pl_module, self.num_samples)
            pl_module.log_dict(metrics, on_step=True, on_epoch=False, logger=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure after each `every_n_epochs` epochs."""
        if self.is_off(trainer) or not self.every_n_epochs or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            pl_module.log_dict(self._measure(trainer, pl_module, self.num_samples), on_epoch=True, logger=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure with `final_samples`."""
        if self.is_off(trainer) or not self.final_samples:
            return
        if self._measured != (trainer.global_step, self._number(pl_module, self.final_samples)):
            self._measure(trainer, pl_module, self.final_samples)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, number: int) -> dict[str, float]:
        """Generate, measure, and write down; what a checkpoint can monitor is returned: NaN if it came to nothing."""
        started = time.monotonic()
        generates = hasattr(pl_module, "generate")
        number = self._number(pl_module, number)
        self._measured = (trainer.global_step, number)
        metric = self._metric(number, generates, pl_module.device)
        made, scores, failure = self._collect(trainer, pl_module, metric, number, generates)

        frames = self._video_shape[1]
        key = f"metrics/{metric.name}_{frames}f_{number}"
        if failure:
            rank_zero_warn(
                f"No {key} at step {trainer.global_step}: {made} of {number} videos were made, then {failure}."
            )
        distance = math.nan if failure else float(metric.compute())
        row = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "samples": number,
            "made": made,
            "real_clips": self._num_clips if generates else number,
            "detector_weights": self._detector.card.weights,
            "seconds": round(time.monotonic() - started, 1),
            metric.name: distance,
            **scores,
        }
        metrics = {key: distance} | {f"metrics/{name}": score for name, score in scores.items()}
        if trainer.state.fn == "fit":  # a validation has no run to write it to
            self._write(trainer, metrics, row, f"{metric.name}_{frames}f")
        return metrics

    def _number(self, pl_module: LightningModule, wanted: int) -> int:
        """How many videos there can be: as many reconstructions as real clips, and any number of generated ones."""
        return wanted if hasattr(pl_module, "generate") else min(wanted, self._num_clips)

    def _metric(self, number: int, generates: bool, device: torch.device) -> FrechetDistance:
        """The distance to the real clips, without any samples; rank 0 knows the real clips."""
        if number not in self._metrics:
            metric = (FrechetDistance if generates else ReconstructionFrechetDistance)(self._detector).to(device)
            real = self._real
            if not generates:  # reconstructions are compared with their own inputs
                real = Features(real.values[:number], real.logits[:number], real.card)
            metric.update(real, real=True, index=torch.arange(len(real)))
            self._metrics[number] = metric
        self._metrics[number].reset_generated()
        return self._metrics[number]

    def _collect(
        self, trainer: Trainer, pl_module: LightningModule, metric: FrechetDistance, number: int, generates: bool
    ) -> tuple[int, dict[str, float], str]:
        """Make videos, and give their features to the metric.

        Returns:
            How many videos all ranks have made, the oracle's mean scores of the first of them, and why they are not
            `number`, if so.
        """
        data = (trainer.datamodule if generates else None) or self._real_data  # type: ignore[attr-defined]
        judged = min(self.oracle_samples, number) if self._knows_shapes else 0
        # a generator that is given no class cannot be held to one
        has_labels = not generates or getattr(pl_module, "class_conditional", False)
        nothing = torch.zeros(0, *self._video_shape)
        names = list(score_clips(nothing, torch.zeros(0) if has_labels else None).as_dict())
        total = torch.zeros(len(names), device=pl_module.device)
        deadline = time.monotonic() + self.max_seconds
        made, failure = 0, ""
        with averaged_weights(trainer, pl_module), at_rest(trainer, pl_module):
            for ids, batch, given in self._batches(trainer, data, number):
                video = self._videos(trainer, pl_module, batch, ids, generates) if ids else nothing
                is_finite = bool(video.isfinite().all())
                # decided together, or some ranks would wait for the others
                if not trainer.strategy.reduce_boolean_decision(is_finite, all=True):
                    failure = "some held values that are not finite"
                    break
                metric.update(self._detector(video.to(pl_module.device)), real=False, index=torch.tensor(ids))
                if count := sum(i < judged for i in ids):
                    scores = score_clips(video[:count], batch["label"][:count] if has_labels else None)
                    total += torch.stack(list(scores.as_dict().values())).sum(1).to(total)
                made = given
                is_late = made < number and time.monotonic() > deadline
                if trainer.strategy.reduce_boolean_decision(is_late, all=False):
                    failure = f"{self.max_seconds:g} seconds were over (--fvd.max_seconds)"
                    break
        total = sum_over_ranks(total) / judged if 0 < judged <= made else torch.full_like(total, math.nan)
        means = dict(zip(names, total.tolist(), strict=True)) if judged else {}
        return made, {f"shapes_{name}": mean for name, mean in means.items()}, failure

    def _videos(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], ids: list[int], generates: bool
    ) -> Tensor:
        """The videos `[n, 3, T, H, W]` of the samples `ids`, under the conditions of the batch."""
        seeds = torch.tensor([keyed_seed(self.seed, i) for i in ids])
        batch = trainer.strategy.batch_to_device(batch)
        video: Tensor = pl_module.sample_videos(batch, seeds)  # type: ignore[operator]  # an interface, not a class
        if not generates:
            video = video[:, :, :, -self._video_shape[2] :]  # below the originals
        if list(video.shape[1:]) != self._video_shape:
            raise ValueError(
                f"The real clips are {self._video_shape} (channels, frames, height, width), those of "
                f"{type(pl_module).__name__} {list(video.shape[1:])}: they cannot be compared (--fvd.data)."
            )
        return video.float().clamp(-1, 1)

    def _write(self, trainer: Trainer, metrics: dict[str, float], row: dict[str, Any], name: str) -> None:
        """Write numbers to the run's loggers, and a row to the table `name` in its folder."""
        folder = trainer.log_dir  # communicates, so all ranks ask
        if not trainer.is_global_zero:
            return
        for run_logger in trainer.loggers:
            run_logger.log_metrics({k: v for k, v in metrics.items() if not math.isnan(v)}, trainer.global_step)
        # without a logger, log_dir is the working directory or --trainer.default_root_dir: used, but never made
        if folder is None or not (trainer.loggers or Path(folder).is_dir()):
            return
        file = Path(folder) / f"{name}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not file.exists()
        with file.open("a", newline="") as opened:
            writer = csv.DictWriter(opened, fieldnames=list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)
