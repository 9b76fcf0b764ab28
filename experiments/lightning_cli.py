"""The commands that need a model and data: LightningCLI with inheritance between experiment files, and honest resuming.

What this adds to LightningCLI:

- `base: parent.yaml` in an experiment file names its parent; a file holds only what differs.
- Curriculum, averaged weights, samples, FVD and checkpoints are sections of their own, not entries of a list of
  callbacks.
- A value given for a key that is linked to another, or a model argument that differs from the checkpoint being resumed,
  is refused. LightningCLI drops the first and lets the checkpoint win over the second, both without a word.
- `--resume RUN` goes on with a run: its configuration, its newest checkpoint, its folder and curves. `--resume auto`
  finds it by the experiment's name and begins one if there is none, `must` insists that there is one.
- A run's folder belongs to one run at a time, and SIGTERM ends a run with a checkpoint.
"""

import contextlib
import copy
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

import datamodules  # noqa: F401  (class names work without their path once imported)
import lightning_modules  # noqa: F401
from callbacks import (
    EMA,
    Checkpoint,
    FVDEvaluation,
    Levers,
    SampleLogger,
    ShortToLongCurriculum,
    Throughput,
    TokenizerHealth,
)
from callbacks.randomness import StepSeed
from callbacks.sample_writer import SampleWriter
from datamodules.clip_file import read_clip, read_mask
from datamodules.decoding import read_header
from datamodules.mixed import MixedDataModule
from datamodules.sampler import ClipRequest, collate_clips
from datamodules.tokens import TokenDataModule, TokenOptions, TokenWriter
from datamodules.video import VideoDataModule
from experiments.board import as_code, as_table, environment, write_hyper_parameters, write_layout
from experiments.evaluate import evaluate, load_detectors
from experiments.messages import did_you_mean, options_of, shortened
from experiments.protocol import read_protocol
from experiments.starts import leaves, record_start
from lightning_modules.generator import VideoGenerator
from models.tokenizers.losses import LPIPS
from models.weights import check_whole, load_state, read_checkpoint

# A value is written once: the source decides the target, for every class that has such an argument.
LINKS = (
    ("data.init_args.num_frames", "model.init_args.num_frames"),
    ("data.init_args.resolution", "model.init_args.resolution"),
    ("seed_everything", "data.init_args.seed"),
    ("seed_everything", "model.init_args.seed"),
)
# Lightning's warnings that do not apply here, as beginnings of their messages.
NOT_FOR_US = (
    "Using ModelCheckpoint with manual optimization",  # our checkpoints are meant to hold the state after the step
    "Checkpoint directory .* exists and is not empty",  # the run that is resumed
    "The dirpath has changed",  # a run that was moved, or is named by another path
    "Be aware that when using `ckpt_path`, callbacks",  # sampling and validation have no use for those of a fit
    "The 'predict_dataloader' does not have many workers",  # it counts seeds
    # Lightning asks torch for a type that torch has renamed: still so in Lightning 2.6.6
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


class Seeds(LightningDataModule):
    """What `sample` generates from: each rank has every world-size-th seed.

    Args:
        seeds: All seeds.
        batch_size: Videos generated at once on each device.
        num_frames: Pixel frames of each video.
        task: What to generate, for a model with tasks.
        label: Class of all videos; None leaves it to the clips, or to the model.
        text: Prompt of all videos; None leaves it to the clips.
        clips: What videos are generated from: seed i has clip i, and starts again after the last one.
    """

    def __init__(
        self,
        seeds: range,
        batch_size: int,
        num_frames: int,
        task: str | None = None,
        label: int | None = None,
        text: str | None = None,
        clips: Dataset[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.seeds = seeds
        self.batch_size = batch_size
        self.num_frames = num_frames
        self.task = task
        self.label = label
        self.text = text
        self.clips = clips

    def predict_dataloader(self) -> DataLoader[int]:
        """Return batches, see `batch`; called when the processes know their ranks."""
        mine = self.seeds[self.trainer.global_rank :: self.trainer.world_size] if self.trainer else self.seeds
        return DataLoader(
            mine,  # type: ignore[arg-type] # a range has all that is needed
            batch_size=self.batch_size,
            collate_fn=self.batch,
        )

    def batch(self, seeds: list[int]) -> dict[str, Any]:
        """Return `seeds` `[B]`, `num_frames`, `task`; `label`, `text` and the clips' `video` where there are any."""
        batch: dict[str, Any] = {}
        if self.clips is not None:
            size = len(self.clips)  # type: ignore[arg-type] # torch's Dataset declares no length
            batch = collate_clips([self.clips[ClipRequest(seed % size)] for seed in seeds])
        if self.label is not None:
            batch["label"] = torch.full((len(seeds),), self.label)
        if self.text is not None:
            batch["text"] = [self.text] * len(seeds)
        return batch | {"seeds": torch.tensor(seeds), "num_frames": self.num_frames, "task": self.task}


class OwnClip(Dataset[dict[str, Any]]):
    """A data set of one clip: the user's own, with a mask if there is one."""

    def __init__(self, video: torch.Tensor, known: torch.Tensor | None) -> None:
        self.item = {"video": video} if known is None else {"video": video, "known": known}

    def __len__(self) -> int:
        return 1

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        return self.item


class LongtakeTrainer(Trainer):
    """Lightning's Trainer, with the commands that are no part of a fit."""

    def sample(
        self,
        model: LightningModule,
        datamodule: VideoDataModule | None = None,
        ckpt_path: str = "",
        num_samples: int = 16,
        num_frames: int | None = None,
        task: str | None = None,
        label: int | None = None,
        text: str | None = None,
        batch_size: int = 4,
        first_seed: int = 0,
        input: str | None = None,
        mask: str | None = None,
        start: int = 0,
        any_frame_rate: bool = False,
        fps: float | None = None,
        out: str | None = None,
    ) -> None:
        """Generate videos from a checkpoint: an mp4 for each, a contact sheet, and what was asked for as JSON.

        Where pixels are given, an mp4 beside each shows the condition, the mask (white is made) and the result.

        Args:
            model: The generator.
            datamodule: Where the clips come from, for a task that gives pixels: its validation clips, in their order.
            ckpt_path: Checkpoint of the generator, or its bundle; `--bundle` gives that and its experiment.
            num_samples: Number of videos.
            num_frames: Pixel frames of each; null takes the longest that the model was built for.
            task: What to generate, for a model with tasks; null takes its first, or the one most like the mask.
            label: Class of all videos; null takes those of the clips, or the classes in turn.
            text: Prompt of all videos, for a model that reads text; null takes the clips' captions.
            batch_size: Videos generated at once on each device.
            first_seed: Video i is generated from the seed first_seed + i, whatever the batch size.
            input: A video file to start from, instead of the data's clips: each seed makes another result from it.
            mask: What of the input is to be made (white) and what is kept (black): an image, or a video; of its size.
            start: First frame of the input to take.
            any_frame_rate: Take an input whose frame rate is not that of the training as it is.
            fps: Frames a second in the mp4 files; null takes those of the input, or 8.
            out: Folder to write to; null makes `samples-<checkpoint>` beside the checkpoint's folder.
        """
        if not isinstance(model, VideoGenerator):
            raise ValueError(f"{type(model).__name__} generates no videos; `longtake validate` measures a tokenizer.")
        for name, value, least in (
            ("num_samples", num_samples, self.world_size),
            ("batch_size", batch_size, 1),
            ("first_seed", first_seed, 0),
            ("fps", fps, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value:g} is too small: at least {least} (--{name}).")
        frames = model.num_frames if num_frames is None else num_frames
        seeds = range(first_seed, first_seed + num_samples)
        if mask is not None and input is None:
            raise ValueError("A mask says what of a video is to be made: give that too (--input, --mask).")
        if mask is None or task is not None:
            task = model.checked_task(task, label)
        if text is not None and not model.reads_text:
            raise ValueError(f"text={text}: {type(model).__name__} reads no text here (--text).")
        clips: Dataset[dict[str, Any]] | None = None
        if input is not None:
            if not model.edits_videos or (task is not None and not model.needs_clips(task)):
                what = f"The task {task}" if model.edits_videos else type(model).__name__
                raise ValueError(f"{what} does not start from a video: leave out --input.")
            clips, rate = self._own_clip(model, datamodule, task, input, mask, start, any_frame_rate)
            fps = rate if fps is None else fps
        elif model.needs_clips(task) or (model.reads_text and text is None):
            if datamodule is None:
                raise ValueError(f"The task {task} starts from clips: give the data of the experiment (--data).")
            if self.is_global_zero:
                datamodule.prepare_data()
            datamodule.setup("validate")
            clips = datamodule.datasets["val"]
        checkpoint = Path(ckpt_path)
        folder = Path(out) if out else checkpoint.parent.parent / f"samples-{checkpoint.stem}"
        is_bundle = checkpoint.is_dir()
        if is_bundle:
            folder = Path(out) if out else checkpoint.with_name(f"samples-{checkpoint.name}")
            load_state(model, load_file(checkpoint / "model.safetensors"), checkpoint)
        about = {
            "checkpoint": str(checkpoint),
            "num_frames": frames,
            "task": task,
            "label": label,
            "text": text,
            "input": input,
            "mask": mask,
            "sampling": asdict(model.sampling),
            "seeds": list(seeds),
        }
        self.callbacks.append(SampleWriter(folder, 8 if fps is None else fps, about))  # type: ignore[attr-defined]
        self.predict(
            model,
            datamodule=Seeds(seeds, batch_size, frames, task, label, text, clips),
            return_predictions=False,
            ckpt_path=None if is_bundle else checkpoint,
            weights_only=True,
        )
        rank_zero_info(f"{num_samples} videos of {frames} frames: {folder}")

    @staticmethod
    def _own_clip(
        model: VideoGenerator,
        datamodule: VideoDataModule | None,
        task: str | None,
        video: str,
        mask: str | None,
        start: int,
        any_frame_rate: bool,
    ) -> tuple[OwnClip, float]:
        """The user's clip with its mask, and its frames a second."""
        stride = 1 if datamodule is None else datamodule.frame_stride
        rate = None if any_frame_rate else model.frame_rate
        resolution = model.latent_shape[1] * model.downsample[1]
        least = model.num_frames if mask is not None else model.known_frames(task)
        clip = read_clip(video, model.num_frames, resolution, start, stride, rate, least)
        known = None if mask is None else read_mask(mask, video, model.num_frames, resolution, start)
        return OwnClip(clip, known), read_header(video).fps / stride or 8

    def evaluate(
        self,
        model: LightningModule,
        datamodule: VideoDataModule | None = None,
        ckpt_path: str = "",
        protocol: str = "shapes_16",
        task: str | None = None,
        weights: str | None = None,
        weights_sha256: str | None = None,
        c3d: str | None = None,
        c3d_mean: str | None = None,
        c3d_sha256: str | None = None,
        lpips: str | None = None,
        root: str | None = None,
        num_frames: int | None = None,
        batch_size: int = 4,
        out: str | None = None,
    ) -> None:
        """Generate what a protocol asks for and score it: results.json, a row of a table, and a contact sheet.

        A command that was killed goes on where it stopped, with any number of processes; so do those that share a file
        system.

        Args:
            model: The generator, or a tokenizer, whose reconstructions are scored.
            datamodule: The experiment's data, which say where those of the protocol lie if they are of one data set.
            ckpt_path: Checkpoint to evaluate.
            protocol: One of experiments/protocols, or a .yaml file of that kind.
            task: What is given to a model of several tasks, for a protocol that is used with several.
            weights: File of the detector's weights: I3D for FVD, Inception-v3 for FID.
            weights_sha256: Accept exactly this file, though no digest of it is published.
            c3d: File of C3D's weights for the inception score of videos; null leaves it out.
            c3d_mean: File of C3D's mean volume, if `c3d` does not hold it.
            c3d_sha256: Digest of `c3d`, since none is published.
            lpips: Folder of LPIPS' weights, for protocols that have it; null leaves it out.
            root: Folder of the protocol's data, if the experiment's are of another data set.
            num_frames: Frames to generate, of which the protocol's first are scored; null takes as few as will do.
            batch_size: Videos generated at once on each device.
            out: Folder to write to; null makes `evaluation-<protocol>-<checkpoint>` beside the checkpoint's folder.
        """
        chosen = read_protocol(protocol, task)
        evaluate(
            self,
            model,
            datamodule,
            Path(ckpt_path),
            chosen,
            load_detectors(chosen, weights, weights_sha256, c3d, c3d_mean, c3d_sha256),
            None if lpips is None else LPIPS.from_folder(lpips),
            root,
            num_frames,
            batch_size,
            Path(out) if out else None,
        )

    def tokenize(
        self,
        model: LightningModule,
        datamodule: VideoDataModule,
        out: str = "",
        windows: Literal["clip", "cover"] = "clip",
        window_stride: int | None = None,
        copies: int = 1,
        latents: Literal["bf16", "fp32"] | None = None,
        tasks: list[str] | None = None,
        shard_items: int = 1024,
    ) -> None:
        """Run the tokenizer over all clips of a data module and keep the codes; `--data TokenDataModule` reads them.

        A command that was killed goes on where it stopped, with any number of processes. For a model with tasks, the
        codes of their conditions are kept too.

        Args:
            model: A generator; its frozen tokenizer is used.
            datamodule: Where the clips come from.
            out: Folder to write to.
            windows: `clip` keeps one clip of each video, from a random place; `cover` all windows of each video.
            window_stride: Frames of the video from one window of `cover` to the next; null for a clip's length.
            copies: Copies of the training clips, each with a random place, crop and flip of its own, as the first
                epochs would show them.
            latents: Keep latents in this type instead of codes, with the statistics of their channels.
            tasks: For a model with tasks, those of which the codes of the condition are kept, too; null keeps those of
                all tasks that the model trains, [] none.
            shard_items: Clips of a shard: what is lost at most when the command is killed.
        """
        if not isinstance(model, VideoGenerator) or not out:
            raise ValueError("Give the experiment of a generator, and --out FOLDER: `tokenize` runs its tokenizer.")
        options = TokenOptions(windows, window_stride, copies, shard_items, latents, model.conditions(tasks))
        if self.strategy.launcher is None:
            self._tokenize(model, datamodule, Path(out), options)
        else:
            self.strategy.launcher.launch(self._tokenize, model, datamodule, Path(out), options, trainer=self)

    @torch.no_grad()
    def _tokenize(self, model: Any, data: VideoDataModule, folder: Path, options: TokenOptions) -> None:
        """What each process does."""
        self.strategy.setup_environment()
        if options.tasks:
            model.to(self.strategy.root_device)  # it makes the conditions
        tokenizer = model.tokenizer.to(self.strategy.root_device)
        if tokenizer.codebook_size is None and options.latents is None:
            raise ValueError("This tokenizer is continuous and has no codes: keep its latents (--latents bf16).")
        about = {
            "tokenizer_digest": model.tokenizer_digest,
            "codebook_size": tokenizer.codebook_size,
            "downsample": model.downsample,
        }

        def encode(video: torch.Tensor) -> dict[str, torch.Tensor]:
            video = video.to(self.strategy.root_device)
            encoded = tokenizer.encode(video)
            grids = {"codes": encoded.codes} if options.latents is None else {"latents": encoded.latents}
            conditions = {task: model.condition_codes({"video": video}, task, len(video)) for task in options.tasks}
            return grids | {
                f"task/{task}": codes.unflatten(1, model.latent_shape) for task, codes in conditions.items()
            }

        if self.is_global_zero:
            data.prepare_data()
        self.strategy.barrier()
        data.setup("fit")
        writer = TokenWriter(folder, data, about, options)
        if self.is_global_zero:
            writer.begin()
        self.strategy.barrier()
        writer.write(encode, self.global_rank, self.world_size)
        self.strategy.barrier()
        if self.is_global_zero:
            writer.close()
        self.strategy.teardown()


def expanded_configs(path: Path, children: tuple[Path, ...] = ()) -> list[Path]:
    """The file itself, preceded by the files that its `base` key names, the oldest first."""
    path = path.resolve()
    if path in children:
        raise ValueError("`base` goes in a circle: " + " -> ".join(str(p) for p in (*children, path)))
    if not path.is_file():
        asked_by = f" (the base of {children[-1]})" if children else ""
        known = [file.name for file in path.parent.glob("*.yaml")]
        raise FileNotFoundError(f"No experiment file {path}{asked_by}.{did_you_mean(path.name, known)}")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no experiment: expected keys such as `model:` and `data:`.")
    base = content.get("base") or []
    parents = [base] if isinstance(base, str) else base
    return [file for parent in parents for file in expanded_configs(path.parent / parent, (*children, path))] + [path]


def option_values(args: Sequence[str], name: str) -> list[tuple[int, int, str]]:
    """Occurrences of `--name VALUE` and `--name=VALUE`: first position, number of words, value."""
    found = []
    for i, word in enumerate(args):
        if word == f"--{name}" and i + 1 < len(args):
            found.append((i, 2, args[i + 1]))
        elif word.startswith(f"--{name}="):
            found.append((i, 1, word.split("=", 1)[1]))
    return found


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The run's newest checkpoint that is whole; damaged ones are named, and left where they are.

    Raises:
        ValueError: If there are checkpoints, and all are damaged: whoever wants to begin again says so.
    """
    files = {path.resolve() for path in run_folder.glob("checkpoints/*.ckpt") if path.exists()}
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            check_whole(path)
            read_checkpoint(path)
        except ValueError as error:
            rank_zero_warn(f"Left out: {error}")
        else:
            return path
    if files:
        raise ValueError(
            f"None of the {len(files)} checkpoints of {run_folder} is whole. They are left as they are; --resume never "
            "begins a new run."
        )
    return None


def resumed(args: list[str]) -> list[str]:
    """Replace `--resume RUN` by the run's configuration, its newest checkpoint and its folder.

    `--resume auto` and `must` take the newest run of the experiment that has a checkpoint. The experiment is given as
    for a new run, and it counts: what differs in the model from the checkpoint is refused later.
    """
    for position, words, value in option_values(args, "resume"):
        rest = args[:position] + args[position + words :]
        if value in ("auto", "must", "never"):
            run_folder = None if value == "never" else newest_run(*run_place(rest))
            if run_folder is None and value == "must":
                root, name = run_place(rest)
                raise FileNotFoundError(
                    f"--resume must: no run of {name} in {root} has a checkpoint. --resume auto would begin one."
                )
            if run_folder is None:
                rank_zero_info("A new run begins.")
                return resumed(rest)
            config = []
        else:
            run_folder = Path(value)
            if len(run_folder.parts) < 3:  # named from within runs/ or deeper: its parents say what it is called
                run_folder = run_folder.resolve()
            config = [f"--config={run_folder / 'config.yaml'}"]
        newest = newest_checkpoint(run_folder)
        if not (run_folder / "config.yaml").is_file() or newest is None:
            raise FileNotFoundError(
                f"{run_folder} is no run to resume: expected config.yaml and checkpoints/*.ckpt in it "
                f"(--resume runs/<experiment>/version_<n>)."
            )
        args[position : position + words] = [
            *config,
            f"--ckpt_path={newest}",
            f"--run_root={run_folder.parent.parent}",
            f"--run_name={run_folder.parent.name}",
            f"--run_version={run_folder.name}",
        ]
        rank_zero_info(f"Resuming {run_folder} from {newest.name}.")
        return resumed(args)
    return args


def bundled(args: list[str]) -> list[str]:
    """Replace `--bundle FOLDER` by its experiment, its tokenizer and its weights.

    Raises:
        FileNotFoundError: If the folder is no generator's bundle.
    """
    for position, words, value in option_values(args, "bundle"):
        folder = Path(value)
        if not (folder / "experiment.yaml").is_file():
            raise FileNotFoundError(
                f"{folder} is no bundle of a generator: it holds no experiment.yaml (`longtake export` makes bundles)."
            )
        return [
            *args[:position],
            f"--config={folder / 'experiment.yaml'}",
            f"--model.tokenizer={folder / 'tokenizer'}",
            f"--ckpt_path={folder}",
            *args[position + words :],
        ]
    return args


def run_place(args: Sequence[str]) -> tuple[Path, str]:
    """Folder of all runs and name of this one, as the arguments and the experiment's files say.

    Raises:
        ValueError: If nothing says what the run is called.
    """
    chains = [expanded_configs(Path(value)) for _, _, value in option_values(args, "config")]
    files = [file for chain in chains for file in chain]
    place: dict[str, str] = {"run_root": "runs"} | ({"run_name": chains[0][-1].stem} if chains else {})
    for name in ("run_root", "run_name"):
        said = [(yaml.safe_load(file.read_text()) or {}).get(name) for file in files]
        said += [value for _, _, value in option_values(args, name)]
        if known := [value for value in said if value is not None]:
            place[name] = known[-1]
    if "run_name" not in place:
        raise ValueError("--resume auto looks for a run by its experiment: give --config experiments/<name>.yaml.")
    return Path(place["run_root"]), place["run_name"]


def newest_run(root: Path, name: str) -> Path | None:
    """The run of this name that wrote a checkpoint last, whole or not."""
    files = (root / name).glob("*/checkpoints/*.ckpt")
    newest = max((path for path in files if path.exists()), key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent.parent if newest else None


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run's folder: the system lets go of it when the process ends, however it ends.

    Raises:
        OSError: If it cannot be written to.
        ValueError: If another run is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise OSError(
            f"Nothing can be written to {folder} ({error.strerror}). Give another folder (--run_root), or make it "
            "writable. Nothing was changed."
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by {file.read().strip() or 'another process'}: two runs in one folder would "
                "spoil each other. Wait for it to end, or begin another run (--resume never)."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def refuse_linked_values(args: Sequence[str], files: Sequence[Path]) -> None:
    """Refuse a value for a key that follows another; LightningCLI would drop it without a word."""
    for source, target in LINKS:
        section, name = target.split(".")[0], target.rsplit(".", 1)[1]
        flag = f"--{source.replace('init_args.', '')}"
        for option in (target, f"{section}.{name}"):
            if option_values(args, option):
                raise ValueError(f"--{option} follows {flag} and cannot be given by itself. Give {flag}.")
        for file in files:
            values = (yaml.safe_load(file.read_text()) or {}).get(section)
            if isinstance(values, dict) and (name in values or name in (values.get("init_args") or {})):
                raise ValueError(f"{file} sets {section}: {name}, which follows {flag} and cannot be given by itself.")


def prepared(args: Sequence[str]) -> list[str]:
    """Expand `--resume`, `--bundle` and `base:`, refuse linked values, name the run after its first experiment file."""
    args = bundled(resumed(["--config" if word == "-c" else word for word in args]))
    out: list[str] = []
    files: list[Path] = []
    positions = {i: (words, value) for i, words, value in option_values(args, "config")}
    i = 0
    while i < len(args):
        words, value = positions.get(i, (1, ""))
        if value:
            chain = expanded_configs(Path(value))
            if not files and not option_values(args, "run_name"):
                out += [f"--run_name={chain[-1].stem}"]
            files += chain
            out += [f"--config={file}" for file in chain]
        else:
            out.append(args[i])
        i += words
    refuse_linked_values(args, files)
    return out


class SaveConfig(SaveConfigCallback):
    """Saves the resolved configuration beside the run, inside its checkpoints as plain types, and in TensorBoard.

    Beside it stands what the run is computed with: in TensorBoard, and for each start in `starts.jsonl`.

    Where a run lies and which checkpoint it went on from are no part of an experiment: whoever uses the file again
    makes a new run.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        files = [Path(str(file)) for file in config.get("config") or []]
        # the experiment gives the run its name; what stands before it are its parents, behind it overrides
        self._experiment = next((str(file) for file in files if file.stem == config.run_name), None)
        config = config.clone()
        for key in ("base", "run_version", "ckpt_path", "weights_only"):
            config.pop(key, None)
        super().__init__(parser, config, **options)
        self._dumped: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it, if there is a run to save it beside: without a logger, it would lie in the working directory."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the start, and write to TensorBoard what a resumed run has not written already."""
        if not trainer.loggers:
            return
        folder = trainer.log_dir  # communicates, so all ranks ask
        if not trainer.is_global_zero or folder is None:
            return
        text = self.parser.dump(self.config, skip_none=False)
        # 100000 where a float may stand comes back as 100000.0 from a run's file: the same configuration
        values = {name: float(v) if type(v) is int else v for name, v in leaves(yaml.safe_load(text)).items()}
        about: dict[str, Any] = {
            "experiment": self._experiment,
            "config_sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest(),
            "environment": environment(trainer),
        }
        before = record_start(Path(folder), trainer.global_step, about)
        for run_logger in trainer.loggers:
            if not isinstance(run_logger, TensorBoardLogger):
                continue
            writer = run_logger.experiment
            if before is None:
                generates = hasattr(pl_module, "generate")
                write_layout(writer, self._features("generator" if generates else "tokenizer"))
                scores = ["train/loss", "val/loss"] + ([] if generates else ["val/psnr"])
                write_hyper_parameters(writer, yaml.safe_load(text), scores)
            if before is None or before["config_sha256"] != about["config_sha256"]:
                writer.add_text("run/config", as_code(text), trainer.global_step)
            if before is None or before["environment"] != about["environment"]:
                writer.add_text("run/environment", as_table(about["environment"]), trainer.global_step)

    def _features(self, kind: str) -> set[str]:
        """What there are scalars of."""
        config = self.config
        has_scores = config.fvd.every_n_steps > 0 or config.fvd.every_n_epochs > 0
        has_curriculum = config.curriculum.schedule != "longest"
        return {kind} | ({"scores"} if has_scores else set()) | ({"curriculum"} if has_curriculum else set())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the configuration to a checkpoint, and forget a step that failed before its end.

        Its batch has been handed out and counted: a resumed run would leave it out, and validate a step early.
        """
        if self._dumped is None:  # it takes a third of a second
            self._dumped = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        checkpoint["config"] = copy.deepcopy(self._dumped)
        loop = checkpoint["loops"]["fit_loop"]
        batches = loop["epoch_loop.batch_progress"]
        unfinished = batches["current"]["ready"] - batches["current"]["processed"]
        for count in (batches["current"], batches["total"]):
            count |= {"ready": count["ready"] - unfinished, "started": count["processed"]}
        for loader in loop["state_dict"].get("combined_loader", []):
            loader["batch"] -= unfinished


class LongtakeParser(LightningArgumentParser):
    """A parser whose errors are the reason and what to type instead: the usage before it would be a hundred lines."""

    def print_usage(self, file: Any = None) -> None:
        """Print nothing; `--help` prints all."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the reason, a hint, and exit status 2."""
        super().error(shortened(message) + self._hint(message), ex)

    def _hint(self, message: str) -> str:
        """What may have been meant, and where the options of a class are listed."""
        in_class = re.search(r"Parser key \"(\w+)\"(?s:.*)given class_path '([\w.]+)':\s+Option '([\w.]+)'", message)
        if in_class:
            section, path, option = in_class.groups()
            listed = f" (longtake fit --{section}.help={path.rpartition('.')[2]} lists its options.)"
            return did_you_mean(option, options_of(path)) + listed
        if re.search(r"arguments are required: .*\.model", message):
            return " An experiment has them: --config experiments/<name>.yaml."
        wrong = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
        if wrong is None:
            return ""
        commands = self._subcommands_action.choices.values() if self._subcommands_action else []
        known = {word.lstrip("-") for parser in (self, *commands) for word in parser._option_string_actions}
        known |= {word.rpartition(".")[2] for word in known} | {word.partition(".")[0] for word in known}
        return did_you_mean(wrong[1] or wrong[2], sorted(known))

    def instantiate_classes(self, cfg: Any, **options: Any) -> Any:
        """Build all; what a class says of its arguments is raised as it was, not as that of no allowed type."""
        try:
            return super().instantiate_classes(cfg, **options)
        except ValueError as error:
            reason: BaseException = error
            while str(reason).startswith("Does not validate against any of the Union") and reason.__cause__:
                reason = reason.__cause__
            raise reason from None


class LongtakeCLI(LightningCLI):
    """The command line: any LightningModule, any data module, and the sections that every run has."""

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add the one that is asked for: each has a parser of its own, which takes a quarter of a second to make."""
        known = self.subcommands()
        asked = self._asked if self._asked in known else None
        self.subcommands = lambda: {asked: known[asked]} if asked else known  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

    def __init__(self, *args: Any, **options: Any) -> None:
        self._asked = next(iter(options["args"]), None)
        self._steps_kept: int | None = None
        super().__init__(*args, **options)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args`. LightningCLI would warn that they came besides the process's own, from which they are made."""
        self.config = parser.parse_args(args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands, and which arguments of the Trainer's method the command line does not show."""
        kept = {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ("fit", "validate")}
        return kept | {name: {"model", "datamodule"} for name in ("sample", "evaluate", "tokenize")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add sections, links and the run's place."""
        parser.add_argument("--base", type=Any, default=None, help="parent of an experiment file, relative to it")
        parser.add_argument("--run_root", type=str, default="runs", help="folder of all runs")
        parser.add_argument("--run_name", type=str, default="run", help="the experiment; set from the file's name")
        parser.add_argument("--run_version", type=str | None, default=None, help="null takes the next free version_<n>")
        parser.add_lightning_class_args(ShortToLongCurriculum, "curriculum")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(TokenizerHealth, "health")
        parser.add_lightning_class_args(Levers, "levers")
        parser.add_lightning_class_args(SampleLogger, "samples")
        parser.add_lightning_class_args(FVDEvaluation, "fvd")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "{step}",
                "checkpoint.save_last": "link",
                "checkpoint.every_n_train_steps": 5000,
                "checkpoint.save_on_exception": True,
                "trainer.use_distributed_sampler": False,  # our samplers shard by themselves
            }
        )
        for source, target in LINKS:
            parser.link_arguments(source, target)

    def _parse_ckpt_path(self) -> None:
        # LightningCLI lays the checkpoint's hyper-parameters over files and flags. We compare, and stop if they differ.
        command = self.config.subcommand
        config = self.config[command]
        path = config.get("ckpt_path")
        if not path:
            if command in ("validate", "sample", "evaluate"):
                raise ValueError(f"`longtake {command}` needs trained weights: --ckpt_path CHECKPOINT.")
            return
        if command == "sample" and (Path(path) / "config.json").is_file():
            bundled = json.loads((Path(path) / "config.json").read_text())
            saved = {"_class_path": bundled["class_path"], **bundled["init_args"]}
        elif Path(path).is_file():
            content = read_checkpoint(Path(path))
            saved = content.get("hyper_parameters", {})
            if command == "fit" and "loops" in content:  # one of weights alone is refused by Lightning
                loop = content["loops"]["fit_loop"]["epoch_loop.state_dict"]
                # it counts the last step only when its checkpoint is written; samples of the step after it are kept
                self._steps_kept = loop["_batches_that_stepped"] + 2
        else:
            raise FileNotFoundError(
                f"No checkpoint at {path} (--ckpt_path takes a file; --resume RUN finds the newest one of a run)."
            )
        saved = json.loads(json.dumps(saved))  # tuples become lists, as in the dumped configuration
        dumped = self._parser(command).dump(config, skip_none=False, skip_link_targets=False, format="json")
        given = json.loads(dumped)["model"]
        now = {"_class_path": given["class_path"], **given["init_args"]}
        # A checkpoint does not bind how to sample or to compute, nor where tokenizers lie: their hashes are checked on
        # loading.
        places = ("tokenizer", "low_res_tokenizer", "text_tokenizer", "audio_tokenizer", "t5_weights")
        free = {"sampling", "compile_network", "gradient_checkpointing"}
        free |= {key for key in places if isinstance(now.get(key), str)}
        differing = [
            f"  {key.lstrip('_')}: {saved[key]!r} in the checkpoint, {now[key]!r} given"
            for key in saved.keys() & now.keys() - free
            if saved[key] != now[key]
        ]
        if differing:
            raise ValueError(
                f"The model's arguments differ from those of {config.ckpt_path}:\n"
                + "\n".join(sorted(differing))
                + "\n"
                "Give the experiment and the overrides that the run was started with; `--resume RUN` does so by itself."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to `<run_root>/<run_name>/<run_version>`, unless the experiment names a logger of its own.

        Only a fit makes a run: the other commands have no logger, and none of the sections that are callbacks; but a
        validation has FVD's, if it is given a detector.
        """
        config = self.config[self.subcommand]
        unused: list[str] = []
        if self.subcommand != "fit":
            kwargs["logger"] = False
            unused = list(self._parser(self.subcommand).callback_keys)
            if self.subcommand == "validate" and config.fvd.weights is not None:
                unused.remove("fvd")  # rFVD is one of a tokenizer's numbers
        elif config.trainer.fast_dev_run:
            unused = ["checkpoint"]  # Lightning 2.6.6 would write its `save_last` into the working directory
        elif config.trainer.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(
                config.run_root,
                name=config.run_name,
                version=config.run_version,
                default_hp_metric=False,
                # TensorBoard forgets what a killed run did after its checkpoint, since that is done once more
                purge_step=self._steps_kept,
            )
        asked = config.trainer.accelerator
        is_there = torch.cuda.is_available() or (asked == "gpu" and torch.backends.mps.is_available())
        if asked in ("gpu", "cuda") and not is_there:
            raise ValueError(
                f"accelerator={asked}: torch {torch.__version__} finds no GPU on this machine. Take what there is "
                "(--trainer.accelerator=auto), or look why (nvidia-smi)."
            )
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:  # Lightning's own, of names and numbers that it checks
            raise ValueError(f"{error} (One of the options --trainer....)") from error
        for section in unused:
            trainer.callbacks.remove(self._get(self.config_init, section))  # type: ignore[attr-defined]
        trainer.callbacks.insert(0, StepSeed())  # type: ignore[attr-defined]
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment):
            # Lightning would write into the working directory, and take from there whatever another run has left;
            # ours come from `Checkpoint` and `--resume auto`
            environment.auto_requeue = False
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; a fit holds its run's folder."""
        logger = self.trainer.logger
        if subcommand != "fit" or not isinstance(logger, TensorBoardLogger) or getattr(rank_zero_only, "rank", 0) != 0:
            return super()._run_subcommand(subcommand)
        with claimed(Path(logger.log_dir)):
            super()._run_subcommand(subcommand)

    def before_instantiate_classes(self) -> None:
        """Refuse sizes that torch and Lightning would take without a word, or stumble over without naming them."""
        config = self.config[self.config.subcommand]
        arguments = config.model.init_args
        for option, value, least in (
            *((f"--model.{name}", arguments.get(name), 1) for name in ("dim", "depth", "num_heads", "num_latents")),
            *((f"--model.{name}", arguments.get(name), 0) for name in ("lr", "warmup_steps", "weight_decay")),
            ("--trainer.val_check_interval", config.trainer.val_check_interval, 1e-6),
            ("--checkpoint.every_n_train_steps", config.checkpoint.every_n_train_steps, 0),
        ):
            if isinstance(value, int | float) and value < least:
                raise ValueError(
                    f"{option}={value:g} is too small: {'at least' if least in (0, 1) else 'above'} {least:.0f}."
                )

    def instantiate_classes(self) -> None:
        """Build all; a model that is to be sharded without its weights, which may not fit into one process."""
        strategy = self.config[self.config.subcommand].trainer.strategy
        is_sharded = getattr(strategy, "class_path", "").endswith("sharding.Sharded")
        with torch.device("meta") if is_sharded else contextlib.nullcontext():
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """Load the frozen tokenizer before any data, and hand the curriculum to the data module."""
        if isinstance(self.model, VideoGenerator):
            self.model.load_tokenizer()
            if isinstance(self.datamodule, TokenDataModule):
                self.datamodule.require(self.model.tokenizer_digest, self.model.conditions())
        if self.subcommand == "fit" and isinstance(self.datamodule, MixedDataModule):
            self.datamodule.require_model(self.model)  # before any data is prepared
        curriculum = self._get(self.config_init, "curriculum")
        if self.subcommand != "fit" or curriculum.schedule == "longest":
            return
        if not isinstance(self.model, VideoGenerator):
            raise ValueError(
                f"--curriculum.schedule={curriculum.schedule} needs a generator; {type(self.model).__name__} "
                "trains on whole clips. Leave it at `longest`."
            )
        curriculum.bind(
            total_steps=self.trainer.max_steps,
            max_frames=self.model.num_frames,
            frames_per_latent=self.model.downsample[0],
            seed=self.model.seed,
        )
        margin = self.model.tokenizer.context_frames() if curriculum.margin is None else curriculum.margin
        self.datamodule.set_curriculum(curriculum.frames_at, margin, self.model.downsample[0])


class ParsedOnly(LongtakeCLI):
    """Reads a command line and builds nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def after_instantiate_classes(self) -> None:
        """There is nothing to load."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    def _set_seed(self) -> None:
        """Draw nothing."""


def parsed(args: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration of a command line, linked values included, as plain types."""
    cli = command_line(ParsedOnly, args)
    config = cli.config[args[0]]
    dumped = cli._parser(args[0]).dump(config, skip_none=False, skip_link_targets=False, format="json")
    return json.loads(dumped)


def is_no_advertisement(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's is about the run."""
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()


@contextlib.contextmanager
def exit_status_of_sigterm() -> Iterator[None]:
    """End with 143, as a shell counts SIGTERM: Lightning's exception would end the process as if all were done."""
    try:
        yield
    except SIGTERMException as error:
        rank_zero_info("SIGTERM: stopped with a checkpoint. --resume auto goes on.")
        raise SystemExit(143) from error


def run(args: Sequence[str]) -> LongtakeCLI:
    """Parse the command line, run its command, and return what was run."""
    # Lightning advertises its company's packages with every run.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_no_advertisement)
    with warnings.catch_warnings(), exit_status_of_sigterm():
        for message in NOT_FOR_US:
            warnings.filterwarnings("ignore", message)
        return command_line(LongtakeCLI, args)


def command_line(kind: type[LongtakeCLI], args: Sequence[str]) -> LongtakeCLI:
    """Make what reads a command line."""
    return kind(
        LightningModule,
        VideoDataModule,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        trainer_class=LongtakeTrainer,
        parser_class=LongtakeParser,
        parser_kwargs={"prog": "longtake"},
        seed_everything_default=42,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        args=prepared(args),
    )
