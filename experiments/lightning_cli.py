"""The commands that need a model and data: LightningCLI with sections of its own, and honest resuming.

Curriculum, averaged weights, samples, FVD and checkpoints are sections, not entries of a list of callbacks. A model
argument that differs from the checkpoint being resumed is refused: LightningCLI would let the checkpoint win without a
word. A run's folder belongs to one run at a time, and SIGTERM ends a run with a checkpoint.
"""

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

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
from datamodules.mixed import MixedDataModule
from datamodules.tokens import TokenDataModule
from datamodules.video import VideoDataModule
from experiments.arguments import LINKS, prepared
from experiments.messages import did_you_mean, options_of, shortened
from experiments.runs import claimed
from experiments.save_config import SaveConfig
from experiments.trainer import LongtakeTrainer
from lightning_modules.generator import VideoGenerator
from models.weights import read_checkpoint

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
                self.datamodule.require(
                    self.model.tokenizer_digest,
                    "latents" if self.model.codebook_size is None else "codes",
                    self.model.conditions(),
                )
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
