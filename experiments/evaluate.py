"""`longtake evaluate`: generate what a protocol asks for, score it, and keep the number with all that it depends on.

The work is cut into parts of some dozen videos. A part is generated and looked at by the detectors, and only what they
saw is kept, in a file that appears when it is whole: a command that was killed goes on with the parts that are missing,
and a protocol of 40,000 videos takes no disk. Part k is done by process k modulo their number; a video depends on its
seed and its condition alone, so that any number of processes makes the same ones.
"""

import ctypes
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import datamodules
from callbacks.media import contact_sheet, to_uint8
from datamodules.sampler import ClipRequest, collate_clips
from datamodules.shards import progress_bar
from datamodules.tokens import TokenDataModule
from datamodules.video import VideoDataModule
from datamodules.windows import provenance
from experiments.compare import markdown
from experiments.protocol import Protocol
from lightning_modules.generator import Condition
from models.metrics import (
    Detector,
    Features,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    ReconstructionFrechetDistance,
    cut_windows,
    frame_psnr,
    frame_ssim,
    load_c3d,
    load_i3d,
    load_inception,
    random_i3d,
    window_starts,
)
from models.metrics import i3d as i3d_files
from models.metrics import inception as inception_files
from models.metrics.detectors import resize_frames
from models.metrics.shapes_oracle import score_clips
from models.priors.tasks import CLASS_TASKS, EMPTY_TASKS
from models.random import keyed_generator, keyed_seed
from models.shapes_world import CLASS_NAMES
from models.tokenizers.losses import LPIPS
from models.weights import load_state, read_checkpoint

PART = 32  # videos, of which a killed command loses one part a process at most
REAL_PART = 128
SHOWN = 16  # videos on the contact sheet
# What says where a data set lies and how it is loaded, not which clips it has: taken from the experiment.
PLACE = (
    "root",
    "cache_dir",
    "decoder",
    "read_timeout",
    "max_bad_fraction",
    "verify",
    "batch_size",
    "val_batch_size",
    "num_workers",
)
_ORDER, _SAMPLE, _LABEL, _SHOWN = 141, 142, 143, 144  # streams of random numbers


@dataclass(frozen=True)
class Part:
    """Some of the work: clips or samples `start ... stop - 1` of a repeat.

    Args:
        kind: `real` or `generated`.
        repeat: Which repeat.
        start: First of them.
        stop: One behind the last.
    """

    kind: str
    repeat: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        """Its file."""
        return f"{self.kind}-{self.repeat}-{self.start:07d}.safetensors"


class Plan:
    """Which clips and samples a protocol asks for, given how many clips there are.

    Args:
        protocol: The protocol.
        num_clips: Clips of the split.
        pairs: Whether videos are reconstructions of the real clips, so that there are as many.
    """

    def __init__(self, protocol: Protocol, num_clips: int, pairs: bool) -> None:
        self.protocol = protocol
        self.num_clips = num_clips
        self.pairs = pairs
        self.num_real = num_clips if protocol.real is None else protocol.real
        self.num_samples = protocol.samples
        if pairs:
            self.num_real = self.num_samples = min(self.num_real, protocol.samples)
        self._orders: dict[tuple[int, int], list[int]] = {}

    def real_clip(self, repeat: int, i: int) -> ClipRequest:
        """The i-th real clip of a repeat."""
        if self.protocol.order == "listed":
            return ClipRequest(i % self.num_clips)
        # each clip once before any comes again, and then another window and crop of it
        passes = -(-self.num_real // self.num_clips)
        epoch = repeat * passes + i // self.num_clips
        return ClipRequest(self._order(self.num_clips, epoch)[i % self.num_clips], epoch=epoch)

    def condition(self, repeat: int, i: int) -> int:
        """Which real clip the i-th sample of a repeat is generated from."""
        if self.pairs or self.protocol.order == "drawn":
            return i % self.num_real
        return self._order(self.num_real, repeat)[i % self.num_real]  # neighbours in a list are alike

    def labels(self, repeat: int, num_classes: int) -> list[int]:
        """Classes of a repeat's samples, as even as can be, for a protocol that wants them so."""
        total = -(-self.num_samples // num_classes) * num_classes
        generator = keyed_generator(self.protocol.seed, _LABEL, repeat)
        return (torch.randperm(total, generator=generator)[: self.num_samples] % num_classes).tolist()

    def shown(self) -> list[int]:
        """Samples of the first repeat that are shown: drawn, not chosen."""
        generator = keyed_generator(self.protocol.seed, _SHOWN)
        return sorted(torch.randperm(self.num_samples, generator=generator)[:SHOWN].tolist())

    def parts(self) -> list[Part]:
        """All work; the real clips of a list are the same in each repeat."""
        parts = []
        for kind, number, size, repeats in (
            ("real", self.num_real, REAL_PART, 1 if self.protocol.order == "listed" else self.protocol.repeats),
            ("generated", self.num_samples, PART, self.protocol.repeats),
        ):
            for repeat in range(repeats):
                parts += [Part(kind, repeat, i, min(number, i + size)) for i in range(0, number, size)]
        return parts

    def _order(self, size: int, number: int) -> list[int]:
        if (size, number) not in self._orders:
            generator = keyed_generator(self.protocol.seed, _ORDER, size, number)
            self._orders[size, number] = torch.randperm(size, generator=generator).tolist()
        return self._orders[size, number]


class PartClips(Dataset[dict[str, Any]]):
    """The clips of each part, as one batch.

    Args:
        parts: The parts.
        plan: Which clips they are of.
        clips: The data set.
        reads: How much of a clip generated videos need: nothing, the `label` alone, or the `pixels`.
    """

    def __init__(self, parts: list[Part], plan: Plan, clips: Dataset[dict[str, Any]], reads: str) -> None:
        self.parts = parts
        self.plan = plan
        self.clips = clips
        self.reads = reads

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        part = self.parts[number]
        ids = range(part.start, part.stop)
        if part.kind == "generated":
            if self.reads == "nothing":
                return {"part": number}
            ids = [self.plan.condition(part.repeat, i) for i in ids]  # type: ignore[assignment]
        requests = [self.plan.real_clip(part.repeat, i) for i in ids]
        if part.kind == "generated" and self.reads == "label":
            requests = [ClipRequest(request.index, request.epoch, read_frames=1) for request in requests]
        return collate_clips([self.clips[request] for request in requests]) | {"part": number}


class Work(LightningDataModule):
    """The parts of this process that are not done yet.

    Args:
        clips: All parts.
        files: Their files; those that are done have one.
        data: How clips are loaded.
    """

    def __init__(self, clips: PartClips, files: list[Path], data: VideoDataModule) -> None:
        super().__init__()
        self.clips = clips
        self.files = files
        self.num_workers = data.num_workers

    def missing(self) -> list[int]:
        """Numbers of the parts of this process that are to be done."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        mine = range(rank, len(self.clips), world)
        return [number for number in mine if not self.files[number].is_file()]

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return one batch a part; called when the processes know their ranks."""
        return DataLoader(self.clips, sampler=self.missing(), batch_size=None, num_workers=self.num_workers)


class Examined(LightningModule):
    """What `predict` runs: makes the videos of a part, lets the detectors see them, and keeps what they saw.

    Args:
        model: A LightningModule: a generator, or a tokenizer, whose reconstructions are examined.
        plan: The work.
        detectors: By name; all see all videos, real and generated, but C3D the generated ones alone.
        lpips: LPIPS, if the protocol has it.
        folder: Where to keep the parts.
        real_folder: Where to keep those of real clips, which other evaluations may share.
        frames: Frames to generate; the first of them are scored.
        batch_size: Videos generated at once.
        class_names: Of the data.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        detectors: dict[str, Detector],
        lpips: LPIPS | None,
        folder: Path,
        real_folder: Path,
        frames: int,
        batch_size: int,
        class_names: list[str],
    ) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.protocol = plan.protocol
        self.detectors = nn.ModuleDict(detectors)
        self.cards = {name: detector.card for name, detector in detectors.items()}
        self.lpips = lpips
        self.folders = {"generated": folder, "real": real_folder}
        self.frames = frames
        self.batch_size = batch_size
        self.class_names = class_names
        self.parts = plan.parts()
        self.task: str | None = None
        if hasattr(model, "tasks"):
            free = "class_conditional" if model.num_classes else "unconditional"
            self.task = model.checked_task(self.protocol.task or free)
        self.asks_class = self.task in CLASS_TASKS if self.task else getattr(model, "class_conditional", False)
        self.asks_text = bool(self.protocol.texts)
        self.asks_pixels = self.task not in EMPTY_TASKS if self.task else self.protocol.given_frames > 0
        if self.asks_text and not getattr(model, "reads_text", False):
            raise ValueError(
                f"Protocol {self.protocol.name} asks for videos by text; {type(model).__name__} reads none."
            )
        self.scores_frames = plan.pairs or "psnr_ssim" in self.protocol.scores
        self.bar: Any = None

    @property
    def conditions(self) -> str:
        """What videos are made from."""
        if self.plan.pairs:
            return "reconstruction"
        asked = {"class": self.asks_class, "text": self.asks_text, "pixels": self.asks_pixels}
        return ", ".join(name for name, is_asked in asked.items() if is_asked) or "none"

    @property
    def reads(self) -> str:
        """What the samples need of the clips, see `PartClips`."""
        if self.plan.pairs or self.asks_pixels or self.scores_frames or self.lpips is not None:
            return "pixels"
        takes_label = self.asks_text or (self.asks_class and self.protocol.labels == "clips")
        return "label" if takes_label else "nothing"

    def on_predict_start(self) -> None:
        """Have a place for the parts."""
        for folder in self.folders.values():
            folder.mkdir(parents=True, exist_ok=True)

    def file(self, part: Part) -> Path:
        """Where a part is kept."""
        return self.folders[part.kind] / part.file

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> int:
        """Do one part, and return its number."""
        part = self.parts[batch["part"]]
        if part.kind == "real":
            frames = self.protocol.windows.frames if self.protocol.windows else self.protocol.frames
            kept = self._seen(self._comparable(batch["video"][:, :, :frames]), ["main"])
        else:
            pieces = range(part.start, part.stop, self.batch_size)
            rows = [self._generated(part, i, min(part.stop, i + self.batch_size), batch) for i in pieces]
            kept = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        file = self.file(part)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        save_file({key: value.contiguous().cpu() for key, value in kept.items()}, partial)
        partial.replace(file)
        if self.bar is not None:
            self.bar.advance(self.bar.task_ids[0], part.stop - part.start)
        return int(batch["part"])

    def on_predict_end(self) -> None:
        """Wait until all processes have done theirs."""
        self.trainer.strategy.barrier()

    def _comparable(self, video: Tensor) -> Tensor:
        """Frames that are scored, at the size at which they are."""
        video = video[:, :, : self.protocol.frames].float()
        size = self.protocol.size
        return video if size is None else resize_frames(video, size, size, "half_pixel")

    def _seen(self, video: Tensor, names: list[str]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for name in names:
            features = self.detectors[name](video)
            kept |= {f"{name}.values": features.values, f"{name}.logits": features.logits.clone()}
        return kept

    def _generated(self, part: Part, start: int, stop: int, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Make samples `start ... stop - 1`; all that is kept has a row for each, or for each of its windows."""
        ids = list(range(start, stop))
        rows = slice(start - part.start, stop - part.start)
        clips: dict[str, Any] = {key: batch[key][rows] for key in ("video", "label", "text") if key in batch}
        labels = clips.get("label")
        if self.asks_class and self.protocol.labels == "even":
            every = self.plan.labels(part.repeat, self.model.num_classes)
            labels = torch.tensor([every[i] for i in ids], device=self.device)
        seeds = torch.tensor([keyed_seed(self.protocol.seed, _SAMPLE, part.repeat, i) for i in ids])

        with measured(self.device) as cost:
            if self.plan.pairs:
                both = self.model.sample_videos(clips, seeds)
                real, video = both.chunk(2, dim=3)  # originals above their reconstructions
            else:
                video = self.model.generate(self._condition(clips, labels), self.frames, seeds)
                real = clips.get("video", video)
        video = video[:, :, : self.protocol.frames].float().clamp(-1, 1)
        if not video.isfinite().all():
            raise ValueError(f"Samples {start} to {stop - 1} of repeat {part.repeat} hold values that are not finite.")
        self._check_shape(real, video)
        compared = self._comparable(video)
        windows = self.protocol.windows
        kept = self._seen(
            cut_windows(compared, self._starts(), windows.frames) if windows else compared, list(self.detectors)
        )
        number = torch.ones(len(ids))
        kept |= {"seconds": number * cost["seconds"] / len(ids), "bytes": number.double() * cost["bytes"] / len(ids)}
        kept["clip"] = torch.tensor([self.plan.condition(part.repeat, i) for i in ids])
        if self.scores_frames:
            true = self._comparable(real)
            kept |= {"psnr": frame_psnr(compared, true).mean(1), "ssim": frame_ssim(compared, true).mean(1)}
        if self.lpips is not None:
            true = self._comparable(real)
            pairs = zip(compared.transpose(1, 2), true.transpose(1, 2), strict=True)
            kept["lpips_vgg"] = torch.stack([self.lpips(frames, frames_true).view(()) for frames, frames_true in pairs])
        if "oracle" in self.protocol.scores:
            known = labels if self.asks_class or self.plan.pairs else None
            scores = score_clips(video, known).as_dict()
            kept |= {f"shapes_{name}": score for name, score in scores.items()}
        if part.repeat == 0:
            shown = torch.tensor([i in set(self.plan.shown()) for i in ids])
            kept["shown"] = to_uint8(video)[shown]
        return kept

    def _condition(self, clips: dict[str, Any], labels: Tensor | None) -> Condition:
        if self.task is not None:
            return self.model.condition(clips | ({} if labels is None else {"label": labels}), self.task)
        given: dict[str, Any] = {}
        if self.asks_text:
            assert labels is not None
            given["text"] = [self.protocol.texts[self.class_names[label]] for label in labels.tolist()]
        elif self.asks_class:
            given["label"] = labels
        if self.asks_pixels:
            given["video"] = clips["video"][:, :, : self.protocol.given_frames]
        return Condition(**given)

    def _starts(self) -> range:
        windows = self.protocol.windows
        assert windows is not None
        return window_starts(self.protocol.frames, windows.frames, windows.stride, windows.include_last)

    def _check_shape(self, real: Tensor, video: Tensor) -> None:
        expected = self.protocol.data["init_args"].get("resolution", video.shape[-1])
        frames = min(self.protocol.frames, real.shape[2]) if self.plan.pairs else self.protocol.frames
        if video.shape[2:] != (frames, expected, expected):
            raise ValueError(
                f"{type(self.model).__name__} makes videos of {list(video.shape[2:])} frames, rows and columns; "
                f"protocol {self.protocol.name} compares {[self.protocol.frames, expected, expected]} (--protocol)."
            )

    # The numbers

    def scores(self) -> dict[str, list[float]]:
        """All scores by name, one value a repeat."""
        scores: dict[str, list[float]] = {}
        for repeat in range(self.protocol.repeats):
            real = self._read("real", 0 if self.protocol.order == "listed" else repeat)
            made = self._read("generated", repeat)
            for name, value in (self._distances(real, made) | self._means(made)).items():
                scores.setdefault(name, []).append(value)
        return scores

    def _read(self, kind: str, repeat: int) -> dict[str, Tensor]:
        files = [self.file(part) for part in self.parts if (part.kind, part.repeat) == (kind, repeat)]
        parts = [load_file(file) for file in files]
        return {key: torch.cat([part[key] for part in parts if key in part]) for key in parts[0]}

    def _features(self, kept: dict[str, Tensor], name: str, rows: slice = slice(None)) -> Features:
        return Features(kept[f"{name}.values"][rows], kept[f"{name}.logits"][rows], self.cards[name])

    def _distances(self, real: dict[str, Tensor], made: dict[str, Tensor]) -> dict[str, float]:
        """Distances between real and generated, and what a classifier says of the generated alone."""
        card = self.cards["main"]
        scores: dict[str, float] = {}
        starts: list[int | None] = [*self._starts()] if self.protocol.windows else [None]
        again = self.plan.num_samples // self.plan.num_real if self.protocol.repeat_real else 1
        kinds: list[type[FrechetDistance] | type[KernelDistance]] = []
        if "frechet" in self.protocol.scores:
            kinds.append(ReconstructionFrechetDistance if self.plan.pairs else FrechetDistance)
        if "kernel" in self.protocol.scores:
            kinds.append(KernelDistance)
        for number, start in enumerate(starts):
            for kind in kinds:
                metric = kind(card)
                metric.distributed_available_fn = one_process
                for _ in range(again):
                    metric.update(self._features(real, "main"), real=True)
                metric.update(self._features(made, "main", slice(number, None, len(starts))), real=False)
                scores[metric.name if start is None else f"{metric.name}_from_frame_{start}"] = float(metric.compute())
        for name in ("c3d", "main"):
            if "inception_score" in self.protocol.scores and self._classifies(name):
                inception = InceptionScore(self.cards[name])
                inception.distributed_available_fn = one_process
                inception.update(self._features(made, name))
                scores[inception.name] = float(inception.compute()[0])
        return scores

    def _classifies(self, name: str) -> bool:
        return name in self.cards and "inception_score" in self.cards[name].published

    def _means(self, made: dict[str, Tensor]) -> dict[str, float]:
        """Means over samples; of several futures of a clip, PSNR and SSIM count the best."""
        scores = {}
        for name in ("psnr", "ssim"):
            if name in made:
                best = torch.full((self.plan.num_real,), -torch.inf, dtype=torch.float64)
                best = best.scatter_reduce(0, made["clip"], made[name].double(), "amax")
                scores[name] = float(best[best > -torch.inf].mean())
        means = [name for name in made if name == "lpips_vgg" or name.startswith("shapes_")]
        return scores | {name: float(made[name].double().mean()) for name in means}

    def costs(self) -> dict[str, float | None]:
        """Median seconds and bytes for each sample, of one process."""
        made = self._read("generated", 0)
        memory = made["bytes"].median().item()
        return {"seconds": made["seconds"].median().item(), "bytes": memory if memory > 0 else None}

    def contact_sheet(self, file: Path) -> None:
        """Write the samples that were drawn to be shown."""
        contact_sheet(self._read("generated", 0)["shown"]).save(file)


def one_process() -> bool:
    """Whether metrics are to be joined over processes: no, for one has read what all have seen."""
    return False


# The command


def evaluate(
    trainer: Trainer,
    model: LightningModule,
    experiment_data: VideoDataModule | None,
    checkpoint: Path,
    protocol: Protocol,
    detectors: dict[str, Detector],
    lpips: LPIPS | None,
    root: str | None,
    num_frames: int | None,
    batch_size: int,
    out: Path | None,
    real: Path | None,
) -> Path:
    """Evaluate a checkpoint under a protocol; see `LongtakeTrainer.evaluate` for the arguments.

    Returns:
        The folder with the results.

    Raises:
        ValueError: If model, protocol and what was done before in the folder do not fit each other.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is too small: at least 1 (--batch_size).")
    content = read_checkpoint(checkpoint)
    model.on_load_checkpoint(content)
    load_state(model, content["state_dict"], checkpoint)
    warning = leak(protocol, content, experiment_data)
    if warning:
        rank_zero_warn(warning)
    data = protocol_data(protocol, experiment_data, root)
    if trainer.is_global_zero:
        data.prepare_data()
    data.setup("fit" if protocol.split == "train" else "validate")
    clips = data.datasets[protocol.split]
    plan = Plan(protocol, len(clips), pairs=not hasattr(model, "generate"))  # type: ignore[arg-type] # no length declared
    frames = generated_frames(model, protocol.frames) if num_frames is None else num_frames
    name = protocol.name.replace("/", "-")
    folder = out or checkpoint.parent.parent / f"evaluation-{name}-{checkpoint.stem}"
    class_names = list(getattr(data, "class_names", list)())
    if "oracle" in protocol.scores and tuple(class_names) != CLASS_NAMES:
        raise ValueError(
            f"The oracle knows the moving shapes alone, not {type(data).__name__} (protocol {protocol.name})."
        )
    parts = folder / "parts"
    real_parts = parts if real is None else real / "parts"
    examined = Examined(model, plan, detectors, lpips, parts, real_parts, frames, batch_size, class_names)
    about = {
        "protocol": {"name": protocol.name, "hash": protocol.digest, "title": protocol.title} | protocol.content(),
        "checkpoint": {"path": str(checkpoint), "sha256": file_digest(checkpoint)},
        "model": type(model).__name__,
        "conditions": examined.conditions,
        "sampling": None if plan.pairs else asdict(examined.model.sampling),
        "generated_frames": frames,
        "detectors": {kind: {"name": d.card.name, "weights": d.card.weights} for kind, d in detectors.items()},
        "code": code_version(),
    }
    about = json.loads(json.dumps(about, default=str))
    if trainer.is_global_zero:
        begin(folder, about)
        if real is not None:
            same = {key: about[key] for key in ("protocol", "detectors", "code")} | {"real_clips": plan.num_real}
            begin(real, same | provenance(data, {protocol.split: clips}))
    work = Work(
        PartClips(examined.parts, plan, clips, examined.reads), [examined.file(part) for part in examined.parts], data
    )
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, ProgressBar)]  # type: ignore[attr-defined]
    with progress_bar() as bar:
        bar.disable = bar.disable or not trainer.is_global_zero
        missing = sum(examined.parts[i].stop - examined.parts[i].start for i in work.missing()) // trainer.world_size
        bar.add_task(
            f"{protocol.name}: clips of this process" if trainer.world_size > 1 else protocol.name, total=missing
        )
        examined.bar = bar
        trainer.predict(examined, datamodule=work, return_predictions=False)
    likelihood = {}
    notes = left_out(protocol, detectors, lpips)
    if "nll" in protocol.scores and not plan.pairs:
        if getattr(model, "num_frames", None) == data.num_frames:
            likelihood = likelihoods(trainer, model, data)
        if not likelihood:
            notes.append(f"nll: not of this model with clips of {data.num_frames} frames")
    if trainer.is_global_zero:
        scores = examined.scores() | {key: [value] for key, value in likelihood.items()}
        costs = examined.costs()
        result = about | {
            "run": run_name(checkpoint),
            "scores": {key: summary(values) for key, values in scores.items()},
            "samples": plan.num_samples,
            "real_clips": plan.num_real,
            "seconds_per_sample": costs["seconds"],
            "bytes_per_sample": costs["bytes"],
            "batch_size": batch_size,
            "device": torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "cpu",
            "leak": warning,
            "notes": notes,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n")
        (folder / "results.md").write_text(markdown([result]))
        examined.contact_sheet(folder / "contact_sheet.png")
        rank_zero_info(f"{markdown([result])}\n{folder}/results.json, results.md, contact_sheet.png")
    return folder


def load_detectors(
    protocol: Protocol,
    weights: str | None = None,
    weights_sha256: str | None = None,
    c3d: str | None = None,
    c3d_mean: str | None = None,
    c3d_sha256: str | None = None,
) -> dict[str, Detector]:
    """The detectors of a protocol: `main`, and `c3d` for the inception score of videos where its weights are given.

    Raises:
        FileNotFoundError: If the protocol needs weights that are not there: says which file that is.
        ValueError: If weights are given that the protocol has no use for.
    """
    if protocol.detector == "random_i3d":
        if weights is not None:
            raise ValueError(
                f"Protocol {protocol.name} looks with random_i3d and reads no weights (--weights={weights})."
            )
        detectors = {"main": random_i3d()}
    else:
        where, what = (i3d_files.WHERE, "FVD") if protocol.detector == "i3d" else (inception_files.WHERE, "FID")
        if weights is None:
            raise FileNotFoundError(
                f"Protocol {protocol.name} measures {what} and needs the weights of its detector (--weights FILE). "
                f"{where}"
            )
        if protocol.detector == "i3d":
            detectors = {"main": load_i3d(weights, protocol.profile, weights_sha256)}
        else:
            detectors = {"main": load_inception(weights, weights_sha256)}
    if c3d is not None:
        if "inception_score" not in protocol.scores or protocol.detector == "inception":
            raise ValueError(f"Protocol {protocol.name} has no inception score of videos (--c3d={c3d}).")
        detectors["c3d"] = load_c3d(c3d, c3d_mean, c3d_sha256)
    return detectors


def left_out(protocol: Protocol, detectors: dict[str, Detector], lpips: LPIPS | None) -> list[str]:
    """Scores of the protocol that were not measured, and what they would take."""
    notes = []
    if "inception_score" in protocol.scores and protocol.detector != "inception" and "c3d" not in detectors:
        notes.append("inception_score: needs C3D (--c3d FILE --c3d_sha256 ...)")
    if "lpips" in protocol.scores and lpips is None:
        notes.append("lpips: needs its weights (--lpips FOLDER)")
    return notes


def protocol_data(protocol: Protocol, experiment: VideoDataModule | None, root: str | None) -> VideoDataModule:
    """The protocol's data module; where the data lie is taken from the experiment's, if it is of the same data set."""
    kind = getattr(datamodules, protocol.data["class_path"], None)
    if kind is None:
        raise ValueError(
            f"Protocol {protocol.name} asks for data of {protocol.data['class_path']}, which there is not."
        )
    arguments: dict[str, Any] = {}
    if experiment is not None:
        loading = PLACE if type(experiment) is kind else PLACE[-3:]
        arguments = {key: experiment.hparams[key] for key in loading if key in experiment.hparams}
    if root is not None:
        if kind is datamodules.MovingShapesDataModule:
            raise ValueError(f"Protocol {protocol.name} has no files (--root={root}).")
        arguments["root"] = root
    if kind is datamodules.ImageFolderDataModule and "root" not in arguments:
        raise FileNotFoundError(f"Protocol {protocol.name} compares with images: say where they are (--root FOLDER).")
    return kind(**(arguments | dict(protocol.data["init_args"])))


def generated_frames(model: Any, frames: int) -> int:
    """Frames to generate so that there are `frames`: more for a model that makes whole latent frames of them."""
    if not hasattr(model, "causal"):  # a tokenizer makes what it is given
        return frames
    first, more = int(model.causal), model.downsample[0]
    if hasattr(model, "new_frames"):  # W.A.L.T makes a clip, and then some frames at a time
        first, more = model.num_frames, model.new_frames
    return first + max(0, math.ceil((frames - first) / more)) * more


def leak(protocol: Protocol, checkpoint: dict[str, Any], experiment: VideoDataModule | None) -> str | None:
    """Say so if the real clips are those that the model was trained on, and who else does that."""
    if protocol.split != "train":
        return None
    trained_on = checkpoint.get("config", {}).get("data", {}).get("class_path", "").rsplit(".", 1)[-1]
    trained_on = trained_on or type(experiment).__name__
    if trained_on not in (protocol.data["class_path"], TokenDataModule.__name__):
        return None
    papers = protocol.used_by
    others = " and ".join([", ".join(papers[:-1]), papers[-1]] if papers[1:] else papers)
    verb = "do" if papers[1:] else "does"
    excuse = f"{others} {verb} just that, and their numbers can be compared with such ones alone. " if others else ""
    return (
        f"LEAK: the real clips of protocol {protocol.name} are of the training split, on which this model was trained: "
        f"a model that repeats what it has seen scores best. {excuse}Held-out clips would give a higher distance."
    )


def begin(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder, or make sure that what was begun in it is the same evaluation.

    Raises:
        ValueError: If it is another one.
    """
    manifest = folder / "evaluation.json"
    if manifest.is_file():
        before = json.loads(manifest.read_text())
        if different := [key for key in about if key != "checkpoint" and before.get(key) != about[key]]:
            raise ValueError(
                f"{folder} holds an evaluation with another {', '.join(different)}: its samples cannot be mixed with "
                "new ones. Remove it, or give another folder (--out, --real)."
            )
        if "checkpoint" in about and before["checkpoint"]["sha256"] != about["checkpoint"]["sha256"]:
            raise ValueError(
                f"{folder} holds an evaluation of other weights. Remove it, or give another folder (--out)."
            )
        rank_zero_info(f"Going on with {folder}.")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else than an evaluation. Give another folder (--out, --real).")
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps(about, indent=2) + "\n")


def likelihoods(trainer: Trainer, model: LightningModule, data: VideoDataModule) -> dict[str, float]:
    """What validation says of likelihoods, over all validation clips, in nats a token; nothing for a model without."""
    trainer.limit_val_batches = 1.0
    trainer.validate(model, datamodule=data, verbose=False)
    found = {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in found.items() if name.startswith("nll")}


def summary(values: list[float]) -> dict[str, Any]:
    """Mean and sample deviation over repeats; no deviation of one."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": values}


def run_name(checkpoint: Path) -> str:
    """What a checkpoint's run is called: `<experiment>/<version>`."""
    version = checkpoint.resolve().parent.parent
    return f"{version.parent.name}/{version.name}"


def file_digest(path: Path) -> str:
    """Sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_version() -> str:
    """Commit of the code, with `-dirty` if it was changed since; the package's version where there is no repository."""
    root = Path(__file__).resolve().parent.parent
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version("longtake")


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, float]]:
    """Measure what is done inside: `seconds`, and `bytes` of memory beyond those in use before, 0 if unknown."""
    cost = {"seconds": 0.0, "bytes": 0.0}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.synchronize(device)
    else:
        before = resident_bytes(forget_peak=True)
    start = time.perf_counter()
    yield cost
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resident_bytes(peak=True)
    cost |= {"seconds": time.perf_counter() - start, "bytes": float(max(0, peak - before))}


def resident_bytes(peak: bool = False, forget_peak: bool = False) -> int:
    """Memory of this process now, or at most since the peak was forgotten; 0 where the system does not say."""
    try:
        if forget_peak:
            # memory that was freed but is kept for later would hide what the next sample takes
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except (OSError, AttributeError):  # no Linux, or another C library
        return 0
    wanted = "VmHWM:" if peak else "VmRSS:"
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted)), 0)
