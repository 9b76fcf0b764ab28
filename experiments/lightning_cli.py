"""The commands that need a model and data: LightningCLI with inheritance between experiment files, and honest resuming.

What this adds to LightningCLI:

- `base: parent.yaml` in an experiment file names its parent; a file holds only what differs.
- Curriculum, samples and checkpoints are sections of their own, not entries of a list of callbacks.
- A value given for a key that is linked to another, or a model argument that differs from the checkpoint being resumed,
  is refused. LightningCLI drops the first and lets the checkpoint win over the second, both without a word.
- `--resume RUN` goes on with a run: its configuration, its newest checkpoint, its folder and curves.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

import datamodules  # noqa: F401  (class names work without their path once imported)
import lightning_modules  # noqa: F401
from callbacks import SampleLogger, ShortToLongCurriculum, Throughput
from callbacks.sample_writer import SampleWriter
from datamodules.tokens import TokenDataModule, write_codes
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
# Model arguments that a checkpoint does not bind: where its tokenizer lies (the hash is checked), and how to sample.
FREE_ARGUMENTS = {"tokenizer", "sampling"}


class LongtakeTrainer(Trainer):
    """Lightning's Trainer, with the commands that are no part of a fit."""

    def sample(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str = "",
        num_samples: int = 16,
        num_frames: int | None = None,
        batch_size: int = 4,
        first_seed: int = 0,
        fps: int = 8,
        out: str | None = None,
    ) -> None:
        """Generate videos from a checkpoint: an mp4 for each, a contact sheet, and what was asked for as JSON.

        Args:
            model: The generator.
            datamodule: Not read: generation needs no data.
            ckpt_path: Checkpoint of the generator.
            num_samples: Number of videos.
            num_frames: Pixel frames of each; null takes the longest that the model was built for.
            batch_size: Videos generated at once on each device.
            first_seed: Video i is generated from the seed first_seed + i, whatever the batch size.
            fps: Frames a second in the mp4 files.
            out: Folder to write to; null makes `samples-<checkpoint>` beside the checkpoint's folder.
        """
        if not isinstance(model, VideoGenerator):
            raise ValueError(f"{type(model).__name__} generates no videos; `longtake validate` shows reconstructions.")
        frames = model.num_frames if num_frames is None else num_frames
        seeds: DataLoader[int] = DataLoader(
            range(first_seed, first_seed + num_samples),  # type: ignore[arg-type] # a range has all that is needed
            batch_size=batch_size,
            collate_fn=lambda batch: {"seeds": torch.tensor(batch), "num_frames": frames},
        )
        checkpoint = Path(ckpt_path)
        folder = Path(out) if out else checkpoint.parent.parent / f"samples-{checkpoint.stem}"
        about = {"checkpoint": str(checkpoint), "num_frames": frames, "sampling": asdict(model.sampling)}
        self.callbacks.append(SampleWriter(folder, fps, about))  # type: ignore[attr-defined]
        self.predict(model, seeds, return_predictions=False, ckpt_path=checkpoint, weights_only=True)
        print(f"{num_samples} videos of {frames} frames: {folder}")

    def tokenize(
        self,
        model: LightningModule,
        datamodule: VideoDataModule,
        out: str = "",
    ) -> None:
        """Run the tokenizer over all clips of a data module and keep the codes; `--data TokenDataModule` reads them.

        Args:
            model: A generator; its frozen tokenizer is used.
            datamodule: Where the clips come from.
            out: Folder to write to.
        """
        if not isinstance(model, VideoGenerator) or not out:
            raise ValueError("Give the experiment of a generator, and --out FOLDER: `tokenize` runs its tokenizer.")
        model.load_tokenizer()
        model.to(self.strategy.root_device)
        about = {
            "tokenizer_digest": model.tokenizer_digest,
            "codebook_size": model.codebook_size,
            "num_frames": model.num_frames,
            "resolution": datamodule.resolution,
        }
        write_codes(
            Path(out), datamodule, lambda video: model.window_codes({"video": video.to(model.device)})[0], about
        )


def expanded_configs(path: Path, children: tuple[Path, ...] = ()) -> list[Path]:
    """The file itself, preceded by the files that its `base` key names, the oldest first."""
    path = path.resolve()
    if path in children:
        raise ValueError("`base` goes in a circle: " + " -> ".join(str(p) for p in (*children, path)))
    if not path.is_file():
        asked_by = f" (the base of {children[-1]})" if children else ""
        raise FileNotFoundError(f"No experiment file {path}{asked_by}.")
    content = yaml.safe_load(path.read_text()) or {}
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


def resumed(args: list[str]) -> list[str]:
    """Replace `--resume RUN` by the run's configuration, its newest checkpoint and its folder."""
    for position, words, value in option_values(args, "resume"):
        run_folder = Path(value)
        checkpoints = sorted(run_folder.glob("checkpoints/*.ckpt"), key=lambda path: path.lstat().st_mtime)
        if not (run_folder / "config.yaml").is_file() or not checkpoints:
            raise FileNotFoundError(
                f"{run_folder} is no run to resume: expected config.yaml and checkpoints/*.ckpt in it "
                f"(--resume runs/<experiment>/version_<n>)."
            )
        newest = checkpoints[-1].resolve()
        args[position : position + words] = [
            f"--config={run_folder / 'config.yaml'}",
            f"--ckpt_path={newest}",
            f"--run_root={run_folder.parent.parent}",
            f"--run_name={run_folder.parent.name}",
            f"--run_version={run_folder.name}",
        ]
        print(f"Resuming {run_folder} from {newest.name}.")
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
    args = resumed(list(args))
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
    """Saves the resolved configuration beside the run, and inside its checkpoints as plain types."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the configuration to a checkpoint."""
        checkpoint["config"] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))


class LongtakeCLI(LightningCLI):
    """The command line: any LightningModule, any data module, and the sections that every run has."""

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
        parser.add_lightning_class_args(SampleLogger, "samples")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
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
        config = self.config[self.config.subcommand]
        if not config.get("ckpt_path"):
            return
        checkpoint = read_checkpoint(Path(config.ckpt_path))
        saved = dict(checkpoint.get("hyper_parameters", {}))
        given = json.loads(self._parser(self.config.subcommand).dump(config, skip_none=False, format="json"))["model"]
        now = {"_class_path": given["class_path"], **given["init_args"]}
        saved = json.loads(json.dumps(saved))  # tuples become lists, as in the dumped configuration
        differing = [
            f"  {key.lstrip('_')}: {saved[key]!r} in the checkpoint, {now[key]!r} given"
            for key in saved.keys() & now.keys()
            if saved[key] != now[key] and key not in FREE_ARGUMENTS
        ]
        if differing:
            raise ValueError(
                f"The model's arguments differ from those of {config.ckpt_path}:\n"
                + "\n".join(sorted(differing))
                + "\n"
                "Give the experiment and the overrides that the run was started with; `--resume RUN` does so by itself."
            )

    def before_instantiate_classes(self) -> None:
        """Forget `base`: the configuration that is saved is whole, and lies elsewhere."""
        self.config[self.subcommand].base = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to `<run_root>/<run_name>/<run_version>` unless the experiment names a logger of its own."""
        config = self.config[self.subcommand]
        if self.subcommand == "fit" and config.trainer.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(config.run_root, name=config.run_name, version=config.run_version)
        elif config.trainer.logger is None:
            kwargs["logger"] = False  # only a fit makes a run
        return super().instantiate_trainer(**kwargs)

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


def run(args: Sequence[str]) -> LongtakeCLI:
    """Parse the command line, run its command, and return what was run."""
    return LongtakeCLI(
        LightningModule,
        VideoDataModule,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        trainer_class=LongtakeTrainer,
        seed_everything_default=42,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        args=prepared(args),
    )
