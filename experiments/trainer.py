"""The Trainer's commands besides those of Lightning: `sample`, `evaluate` and `tokenize`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from callbacks.sample_writer import SampleWriter
from datamodules.clip_file import read_clip, read_mask
from datamodules.decoding import read_header
from datamodules.sampler import ClipRequest, collate_clips
from datamodules.tokens import TokenOptions, TokenWriter
from datamodules.video import VideoDataModule
from experiments.evaluate import evaluate, load_detectors
from experiments.protocol import read_protocol
from lightning_modules.generator import VideoGenerator
from models.tokenizers.losses import LPIPS
from models.weights import load_state


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
        real: str | None = None,
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
            real: Folder in which what the detectors see of the real clips is kept, for all evaluations under the
                protocol; null keeps it in `out`.
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
            Path(real) if real else None,
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
            latents: Keep latents in this type, with the statistics of their channels: of a tokenizer with finite scalar
                codes, what it rounds, beside the codes.
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

        encoder = tokenizer if options.latents is None else tokenizer.unrounded()

        def encode(video: torch.Tensor) -> dict[str, torch.Tensor]:
            video = video.to(self.strategy.root_device)
            encoded = encoder.encode(video)
            grids = {} if options.latents is None else {"latents": encoded.latents}
            if tokenizer.codebook_size is not None:
                # what is rounded has no codes itself, but those of the nearest levels
                grids["codes"] = tokenizer.latents_to_codes(encoded.latents) if options.latents else encoded.codes
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
