"""The commands that need a model and data: LightningCLI with inheritance between experiment files, and honest resuming.

What this adds to LightningCLI:

- `base: parent.yaml` in an experiment file names its parent; a file holds only what differs.
- Curriculum, averaged weights, samples, FVD and checkpoints are sections of their own, not entries of a list of
  callbacks.
- A value given for a key that is linked to another, or a model argument that differs from the checkpoint being resumed,
  is refused. LightningCLI drops the first and lets the checkpoint win over the second, both without a word.
- `--resume RUN` goes on with a run: its configuration, its newest checkpoint, its folder and curves.
"""

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset

import datamodules  # noqa: F401  (class names work without their path once imported)
import lightning_modules  # noqa: F401
from callbacks import EMA, Checkpoint, FVDEvaluation, SampleLogger, ShortToLongCurriculum, Throughput, TokenizerHealth
from callbacks.sample_writer import SampleWriter
from datamodules.clip_file import read_clip, read_mask
from datamodules.decoding import read_header
from datamodules.sampler import ClipRequest, collate_clips
from datamodules.tokens import TokenDataModule, TokenOptions, TokenWriter
from datamodules.video import VideoDataModule
from lightning_modules.generator import VideoGenerator
from models.weights import read_checkpoint

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
        clips: What videos are generated from: seed i has clip i, and starts again after the last one.
    """

    def __init__(
        self,
        seeds: range,
        batch_size: int,
        num_frames: int,
        task: str | None = None,
        label: int | None = None,
        clips: Dataset[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.seeds = seeds
        self.batch_size = batch_size
        self.num_frames = num_frames
        self.task = task
        self.label = label
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
        """Return `seeds` `[B]`, `num_frames`, `task`, and `label` and the clips' `video` where there are such."""
        batch: dict[str, Any] = {}
        if self.clips is not None:
            size = len(self.clips)  # type: ignore[arg-type] # torch's Dataset declares no length
            batch = collate_clips([self.clips[ClipRequest(seed % size)] for seed in seeds])
        if self.label is not None:
            batch["label"] = torch.full((len(seeds),), self.label)
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
            ckpt_path: Checkpoint of the generator.
            num_samples: Number of videos.
            num_frames: Pixel frames of each; null takes the longest that the model was built for.
            task: What to generate, for a model with tasks; null takes its first, or the one most like the mask.
            label: Class of all videos; null takes those of the clips, or the classes in turn.
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
                raise ValueError(f"{name}={value} is too small: at least {least} (--{name}).")
        frames = model.num_frames if num_frames is None else num_frames
        seeds = range(first_seed, first_seed + num_samples)
        if mask is not None and input is None:
            raise ValueError("A mask says what of a video is to be made: give that too (--input, --mask).")
        if mask is None or task is not None:
            task = model.checked_task(task, label)
        clips: Dataset[dict[str, Any]] | None = None
        if input is not None:
            if not model.edits_videos or (task is not None and not model.needs_clips(task)):
                what = f"The task {task}" if model.edits_videos else type(model).__name__
                raise ValueError(f"{what} does not start from a video: leave out --input.")
            clips, rate = self._own_clip(model, datamodule, task, input, mask, start, any_frame_rate)
            fps = rate if fps is None else fps
        elif model.needs_clips(task):
            if datamodule is None:
                raise ValueError(f"The task {task} starts from clips: give the data of the experiment (--data).")
            if self.is_global_zero:
                datamodule.prepare_data()
            datamodule.setup("validate")
            clips = datamodule.datasets["val"]
        checkpoint = Path(ckpt_path)
        folder = Path(out) if out else checkpoint.parent.parent / f"samples-{checkpoint.stem}"
        about = {
            "checkpoint": str(checkpoint),
            "num_frames": frames,
            "task": task,
            "label": label,
            "input": input,
            "mask": mask,
            "sampling": asdict(model.sampling),
            "seeds": list(seeds),
        }
        self.callbacks.append(SampleWriter(folder, 8 if fps is None else fps, about))  # type: ignore[attr-defined]
        self.predict(
            model,
            datamodule=Seeds(seeds, batch_size, frames, task, label, clips),
            return_predictions=False,
            ckpt_path=checkpoint,
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

    def tokenize(
        self,
        model: LightningModule,
        datamodule: VideoDataModule,
        out: str = "",
        windows: Literal["clip", "cover"] = "clip",
        window_stride: int | None = None,
        copies: int = 1,
        latents: Literal["bf16", "fp32"] | None = None,
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
            shard_items: Clips of a shard: what is lost at most when the command is killed.
        """
        if not isinstance(model, VideoGenerator) or not out:
            raise ValueError("Give the experiment of a generator, and --out FOLDER: `tokenize` runs its tokenizer.")
        options = TokenOptions(windows, window_stride, copies, shard_items, latents, model.cached_tasks())
        if self.strategy.launcher is None:
            self._tokenize(model, datamodule, Path(out), options)
        else:
            self.strategy.launcher.launch(self._tokenize, model, datamodule, Path(out), options, trainer=self)

    @torch.no_grad()
    def _tokenize(self, model: VideoGenerator, data: VideoDataModule, folder: Path, options: TokenOptions) -> None:
        """What each process does."""
        self.strategy.setup_environment()
        tokenizer = model.tokenizer.to(self.strategy.root_device)
        if tokenizer.codebook_size is None and options.latents is None:
            raise ValueError("This tokenizer is continuous and has no codes: keep its latents (--latents bf16).")
        about = {
            "tokenizer_digest": model.tokenizer_digest,
            "codebook_size": tokenizer.codebook_size,
            "downsample": model.downsample,
        }

        def encode(video: torch.Tensor) -> dict[str, torch.Tensor]:
            encoded = tokenizer.encode(video.to(self.strategy.root_device))
            if options.latents is not None:
                return {"latents": encoded.latents}
            assert encoded.codes is not None
            return {"codes": encoded.codes} | model.condition_grids(video.to(self.strategy.root_device))

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
        raise FileNotFoundError(f"No experiment file {path}{asked_by}.")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
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
    """The run's newest checkpoint that is whole: a run that was killed while it wrote one may leave a part of it."""
    files = {path.resolve() for path in run_folder.glob("checkpoints/*.ckpt") if path.exists()}
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            read_checkpoint(path)
        except ValueError as error:
            rank_zero_warn(f"Left out: {error}")
        else:
            return path
    return None


def resumed(args: list[str]) -> list[str]:
    """Replace `--resume RUN` by the run's configuration, its newest checkpoint and its folder."""
    for position, words, value in option_values(args, "resume"):
        run_folder = Path(value)
        if len(run_folder.parts) < 3:  # named from within runs/ or deeper: its parents say what it is called
            run_folder = run_folder.resolve()
        newest = newest_checkpoint(run_folder)
        if not (run_folder / "config.yaml").is_file() or newest is None:
            raise FileNotFoundError(
                f"{run_folder} is no run to resume: expected config.yaml and checkpoints/*.ckpt in it "
                f"(--resume runs/<experiment>/version_<n>)."
            )
        args[position : position + words] = [
            f"--config={run_folder / 'config.yaml'}",
            f"--ckpt_path={newest}",
            f"--run_root={run_folder.parent.parent}",
            f"--run_name={run_folder.parent.name}",
            f"--run_version={run_folder.name}",
        ]
        rank_zero_info(f"Resuming {run_folder} from {newest.name}.")
        return resumed(args)
    return args


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
    """Expand `--resume` and `base:`, refuse linked values, and name the run after its first experiment file."""
    args = resumed(["--config" if word == "-c" else word for word in args])
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
    """Saves the resolved configuration beside the run, and inside its checkpoints as plain types.

    Where a run lies and which checkpoint it went on from are no part of an experiment: whoever uses the file again
    makes a new run.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        config = config.clone()
        for key in ("base", "run_version", "ckpt_path", "weights_only"):
            config.pop(key, None)
        super().__init__(parser, config, **options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it, if there is a run to save it beside: without a logger, it would lie in the working directory."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the configuration to a checkpoint, and forget a step that failed before its end.

        Its batch has been handed out and counted: a resumed run would leave it out, and validate a step early.
        """
        checkpoint["config"] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        loop = checkpoint["loops"]["fit_loop"]
        batches = loop["epoch_loop.batch_progress"]
        unfinished = batches["current"]["ready"] - batches["current"]["processed"]
        for count in (batches["current"], batches["total"]):
            count |= {"ready": count["ready"] - unfinished, "started": count["processed"]}
        for loader in loop["state_dict"].get("combined_loader", []):
            loader["batch"] -= unfinished


class LongtakeParser(LightningArgumentParser):
    """A parser whose errors are the message alone: the usage before it would be a hundred lines."""

    def print_usage(self, file: Any = None) -> None:
        """Print nothing; `--help` prints all."""


class LongtakeCLI(LightningCLI):
    """The command line: any LightningModule, any data module, and the sections that every run has."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args`. LightningCLI would warn that they came besides the process's own, from which they are made."""
        self.config = parser.parse_args(args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands, and which arguments of the Trainer's method the command line does not show."""
        kept = {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ("fit", "validate")}
        return kept | {"sample": {"model", "datamodule"}, "tokenize": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add sections, links and the run's place."""
        parser.add_argument("--base", type=Any, default=None, help="parent of an experiment file, relative to it")
        parser.add_argument("--run_root", type=str, default="runs", help="folder of all runs")
        parser.add_argument("--run_name", type=str, default="run", help="the experiment; set from the file's name")
        parser.add_argument("--run_version", type=str | None, default=None, help="null takes the next free version_<n>")
        parser.add_lightning_class_args(ShortToLongCurriculum, "curriculum")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(TokenizerHealth, "health")
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
            if command in ("validate", "sample"):
                raise ValueError(f"`longtake {command}` needs trained weights: --ckpt_path CHECKPOINT.")
            return
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"No checkpoint at {path} (--ckpt_path takes a file; --resume RUN finds the newest one of a run)."
            )
        saved = read_checkpoint(Path(path)).get("hyper_parameters", {})
        saved = json.loads(json.dumps(saved))  # tuples become lists, as in the dumped configuration
        dumped = self._parser(command).dump(config, skip_none=False, skip_link_targets=False, format="json")
        given = json.loads(dumped)["model"]
        now = {"_class_path": given["class_path"], **given["init_args"]}
        # A checkpoint does not bind how to sample, nor where the tokenizer lies: its hash is checked when it is loaded.
        free = {"sampling"} | {key for key in ("tokenizer",) if isinstance(now.get(key), str)}
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

        Only a fit makes a run: the other commands have no logger, and none of the sections that are callbacks.
        """
        config = self.config[self.subcommand]
        unused: list[str] = []
        if self.subcommand != "fit":
            kwargs["logger"] = False
            unused = self._parser(self.subcommand).callback_keys
        elif config.trainer.fast_dev_run:
            unused = ["checkpoint"]  # Lightning 2.6.6 would write its `save_last` into the working directory
        elif config.trainer.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(
                config.run_root, name=config.run_name, version=config.run_version, default_hp_metric=False
            )
        trainer = super().instantiate_trainer(**kwargs)
        for section in unused:
            trainer.callbacks.remove(self._get(self.config_init, section))  # type: ignore[attr-defined]
        return trainer

    def after_instantiate_classes(self) -> None:
        """Load the frozen tokenizer before any data, and hand the curriculum to the data module."""
        if isinstance(self.model, VideoGenerator):
            self.model.load_tokenizer()
            if isinstance(self.datamodule, TokenDataModule):
                self.datamodule.require_tokenizer(self.model.tokenizer_digest)
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


def is_no_advertisement(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's is about the run."""
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()


def run(args: Sequence[str]) -> LongtakeCLI:
    """Parse the command line, run its command, and return what was run."""
    # Lightning advertises its company's packages with every run.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_no_advertisement)
    with warnings.catch_warnings():
        for message in NOT_FOR_US:
            warnings.filterwarnings("ignore", message)
        return LongtakeCLI(
            LightningModule,
            VideoDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_class=LongtakeTrainer,
            parser_class=LongtakeParser,
            seed_everything_default=42,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=prepared(args),
        )
