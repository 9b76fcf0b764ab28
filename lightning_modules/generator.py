"""What all second-stage models share: a frozen tokenizer, codes from batches, and the interface that callbacks use."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.sharding import shard
from models.optim import Muon, matrices, split_groups
from models.random import keyed_generator
from models.schedules import learning_rate_factor
from models.tokenizers import VQGAN3D
from models.weights import load_tokenizer, state_digest

# Streams of random numbers within one training step, so that no two draws share a key.
MASK_RATIO_STREAM, MASK_ORDER_STREAM, VALIDATION_STREAM = 1, 2, 3


@dataclass(frozen=True)
class Condition:
    """What a video is generated from.

    Args:
        label: `[B]` int64 classes, or None for an unconditional model.
        video: `[B, 3, T', H, W]` in [-1, 1] with the known pixels, from the first frame on; T' may be less than what is
            generated. Pixels that are not known are never read.
        task: What is known of the video and what is to be made, for a model with tasks.
        known: `[T', H, W]` or `[B, T', H, W]` bool, which pixels of the video are known. None: those that the task
            gives; without tasks, all.
    """

    label: Tensor | None = None
    video: Tensor | None = None
    task: str | None = None
    known: Tensor | None = None

    def first_frames(self) -> Tensor | None:
        """The known pixels as whole frames that the video begins with, for a model that goes on with them.

        Returns:
            `[B, 3, T', H, W]`, or None if nothing is known.

        Raises:
            ValueError: If anything else is known.
        """
        if self.video is None or self.known is None:
            return self.video
        in_frames = self.known.flatten(-2).reshape(
            -1, self.known.shape[-3], self.known.shape[-2] * self.known.shape[-1]
        )
        frames = int(in_frames[0].all(dim=-1).sum())
        if not (in_frames[:, :frames].all() and not in_frames[:, frames:].any()):
            raise ValueError(
                "This model goes on with whole first frames: `known` must be True in those, False elsewhere."
            )
        return self.video[:, :, :frames] if frames else None


class VideoGenerator(LightningModule):
    """A prior over the codes of a frozen tokenizer.

    The tokenizer is held outside the module tree: it stays out of the checkpoint, the optimizer, DDP and weight
    averaging, and the checkpoint names it by the hash of its weights.

    Args:
        tokenizer: A tokenizer bundle or checkpoint.
        num_frames: Pixel frames of the longest clip.
        resolution: Height and width of the video.
        downsample: Pixel frames, rows and columns that one code covers; checked against the tokenizer.
        codebook_size: Number of video codes; checked against the tokenizer. None for one with continuous latents.
        seed: Keys every random draw of training.
        causal: Whether the tokenizer gives the first frame a latent frame of its own: clips have 1 + k downsample[0]
            frames then. None reads it off num_frames: 17 frames at a factor of 4 are those of a causal one.
    """

    tokenizer: VQGAN3D
    frame_rate: float | None = None  # of the videos it was trained on, if it says so
    edits_videos = False  # whether `generate` takes any video with known pixels
    sampling: Any  # the paper's sampling settings, a dataclass

    class_conditional = False  # whether samples are asked to be of their batch's classes, and can be held to them
    network: Any  # the paper's transformer; its `decayed_parameters()` are those under weight decay
    num_classes = 0  # of the labels in batches; 0 for a model that reads none
    reads_text = False  # whether batches must hold `text`, and a prompt can be given
    unrounded = False  # whether the tokenizer's latents are taken before finite scalar quantisation rounds them

    def __init__(
        self,
        tokenizer: str,
        num_frames: int,
        resolution: int,
        downsample: tuple[int, int, int],
        codebook_size: int | None,
        seed: int,
        causal: bool | None = None,
    ) -> None:
        super().__init__()
        if torch.get_default_device().type == "meta":  # to be filled later as it would be filled now
            self.__dict__["rng_state_of_init"] = torch.get_rng_state()
        if causal is None:
            causal = num_frames % downsample[0] == 1
        if causal and (num_frames < 1 or (num_frames - 1) % downsample[0]):
            lower = max(0, num_frames - 1) // downsample[0] * downsample[0] + 1
            raise ValueError(
                f"num_frames={num_frames} does not fit a causal tokenizer: it takes 1 + {downsample[0]}k frames. "
                f"Nearest: {lower} or {lower + downsample[0]} (--data.num_frames)."
            )
        for name, size, factor in (
            ("num_frames", num_frames - causal, downsample[0]),
            ("resolution", resolution, downsample[1]),
            ("resolution", resolution, downsample[2]),
        ):
            if size % factor:
                lower = size // factor * factor
                nearest = f"{lower} or {lower + factor}" if lower else factor
                raise ValueError(
                    f"{name}={size} is no multiple of the tokenizer's factor {factor}. "
                    f"Nearest: {nearest} (--data.{name})."
                )
        self.tokenizer_path = tokenizer
        self.num_frames = num_frames
        self.causal = causal
        self.downsample = (downsample[0], downsample[1], downsample[2])
        self.codebook_size = codebook_size
        self.latent_shape = (
            self.latent_frames(num_frames),
            resolution // downsample[1],
            resolution // downsample[2],
        )
        self.seed = seed
        self.tokens_per_batch = 0  # of the last training step, on this rank

    # The tokenizer

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of so many pixel frames; rounded up, since a causal tokenizer has 1 + k of 1 + 4k frames."""
        return -(-num_frames // self.downsample[0])

    def generated_latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video that a model of codes is asked for.

        Raises:
            ValueError: If the tokenizer has no such videos, or the codes of one as long as that would be unknown.
        """
        factor = self.downsample[0]
        if self.causal and (num_frames % factor != 1 % factor or not 0 < num_frames <= self.num_frames):
            raise ValueError(
                f"num_frames={num_frames} cannot be generated: on a causal tokenizer, whose codes depend on where in a "
                f"clip they are, this model makes 1 + {factor}k frames, {self.num_frames} at most (--num_frames)."
            )
        if not self.causal and (num_frames % factor or num_frames < 1):
            raise ValueError(
                f"num_frames={num_frames} cannot be generated: this model makes multiples of {factor} (--num_frames)."
            )
        return self.latent_frames(num_frames)

    def load_tokenizer(self) -> None:
        """Load the frozen tokenizer, once: a step of its own, so that a model can be built and counted without one.

        Raises:
            FileNotFoundError: If there is none at the path given.
            ValueError: If it does not have the geometry or the codebook that this model is built for.
        """
        if "tokenizer" in self.__dict__:
            return
        path = Path(self.tokenizer_path)
        if not path.exists():
            raise FileNotFoundError(
                f"No tokenizer at {path} (--model.tokenizer, TOKENIZER= in make). Make one with\n"
                f"  make train EXP=<a tokenizer experiment, such as vqgan3d_ucf101>\n"
                f"  longtake export runs/<experiment>/version_0/checkpoints/last.ckpt {path}"
            )
        tokenizer = load_tokenizer(path)
        if self.unrounded:
            tokenizer = tokenizer.unrounded()
        if self.codebook_size is None and tokenizer.codebook_size is not None:
            raise ValueError(
                f"The tokenizer at {path} is not continuous: it has {tokenizer.codebook_size} codes, and this model "
                "denoises real-valued latents. Give a tokenizer without a codebook (--model.tokenizer), or, if its "
                "codes are finite scalars, take what it rounds to them (--model.unrounded=true)."
            )
        theirs = (tuple(tokenizer.downsample), tokenizer.codebook_size)
        if theirs != (self.downsample, self.codebook_size):
            raise ValueError(
                f"The tokenizer at {path} has downsample={theirs[0]} and codebook_size={theirs[1]}, the model expects "
                f"{self.downsample} and {self.codebook_size} (--model.downsample, --model.codebook_size)."
            )
        height, width = (self.latent_shape[axis] * self.downsample[axis] for axis in (1, 2))
        fits = tokenizer.valid_frames(self.num_frames)
        shape = tuple(tokenizer.latent_shape(self.num_frames, height, width)) if fits else None
        if shape != self.latent_shape:
            raise ValueError(
                f"The tokenizer at {path} makes {shape or 'no'} latents of {self.num_frames} frames, the model expects "
                f"{self.latent_shape}: one of the two is causal (1 + {self.downsample[0]}k frames), the other is not "
                "(--model.tokenizer, --data.num_frames)."
            )
        self.__dict__["tokenizer"] = tokenizer
        self.tokenizer_digest = state_digest(tokenizer.state_dict())

    def setup(self, stage: str) -> None:
        """Load the tokenizer."""
        self.load_tokenizer()

    def _placed_tokenizer(self) -> VQGAN3D:
        if next(self.tokenizer.parameters()).device != self.device:
            self.tokenizer.to(self.device)
        return self.tokenizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the tokenizer by its hash, and the class, which hyper-parameters of the command line alone name."""
        checkpoint["tokenizer_digest"] = self.tokenizer_digest
        checkpoint["class_path"] = f"lightning_modules.{type(self).__name__}"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another tokenizer than the one that the weights were trained on."""
        if "tokenizer_digest" not in checkpoint:
            raise ValueError("The checkpoint names no tokenizer: it was not written by a generator of this project.")
        self.load_tokenizer()
        if checkpoint["tokenizer_digest"] != self.tokenizer_digest:
            raise ValueError(
                f"The checkpoint was trained on tokenizer {checkpoint['tokenizer_digest'][:12]}, but "
                f"{self.tokenizer_path} is {self.tokenizer_digest[:12]}. Give the one it was trained on "
                "(--model.tokenizer)."
            )

    # Batches

    def encode_video(self, video: Tensor) -> Tensor:
        """Video `[B, 3, T, H, W]` in [-1, 1] to codes `[B, t, h, w]`.

        In float32 whatever the training's precision: the nearest code is another one under autocast, for some tokens.
        """
        with torch.autocast(self.device.type, enabled=False):
            codes = self._placed_tokenizer().encode(video.float()).codes
        assert codes is not None  # `load_tokenizer` compared the number of codes
        return codes

    @torch.no_grad()
    def window_codes(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Codes of the batch's window, and where in the clip it begins.

        Args:
            batch: Holds `video` `[B, C, T, H, W]` or cached `codes` `[B, t, h, w]`. If it is a curriculum's, it says
                with `window_start`, `window_frames` and `margin_before` (frames) which part of them to train on.

        Returns:
            `[B, t', h, w]` int64, and the window's first latent frame.
        """
        codes = batch["codes"] if "codes" in batch else self.encode_video(batch["video"])
        if "window_frames" not in batch:
            return codes, 0
        frames = self.downsample[0]
        before = batch["margin_before"] // frames
        return codes[:, before : before + self.latent_frames(batch["window_frames"])], batch["window_start"] // frames

    def conditions(self, tasks: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Return the tasks whose training needs the codes of a condition, each with the settings that they depend on.

        Args:
            tasks: Which of them; None takes all that the model trains.

        Raises:
            ValueError: If the model has no such task.
        """
        if tasks:
            raise ValueError(f"tasks={list(tasks)}: {type(self).__name__} has no tasks to choose from (--tasks).")
        return {}

    def sliced_by_rank(self, draw: Any, batch_size: int) -> Tensor:
        """This rank's rows of `draw(global batch size)`: two ranks with B draw what one draws with 2B."""
        start = self.global_rank * batch_size
        return draw(batch_size * self.trainer.world_size)[start : start + batch_size]

    def step_generator(self, stream: int, *keys: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Generator of this optimizer step, equal on all ranks."""
        return keyed_generator(self.seed, self.global_step, stream, *keys, device=device)

    # Training

    def check_labels(self, label: Tensor, options: str = "--model.num_classes") -> None:
        """Raise ValueError unless all labels are classes of the model; others would be read as something else.

        Args:
            label: Of any shape.
            options: What the user can change.
        """
        if label.min() < 0 or label.max() >= self.num_classes:
            raise ValueError(
                f"Labels from {int(label.min())} to {int(label.max())} do not fit num_classes={self.num_classes} "
                f"({options})."
            )

    def configure_model(self) -> None:
        """Shard the network, once, if the strategy is `Sharded`."""
        if self.device_mesh is not None and not hasattr(self.network, "unshard"):
            shard(self, self.network, self.device_mesh["data_parallel"], self.trainer.strategy.root_device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Two groups: Linear weights decay, everything else does not."""
        decayed = self.network.decayed_parameters()
        is_decayed = {id(parameter) for parameter in decayed}
        rest = [parameter for parameter in self.network.parameters() if id(parameter) not in is_decayed]
        optimizer = self.make_optimizer(
            [{"params": decayed, "weight_decay": self.hparams["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
        )
        schedule = self.hparams.get("lr_schedule", "cosine")  # COMMIT has no other
        decay_steps = int(self.trainer.estimated_stepping_batches) if schedule == "cosine" else None
        factor = partial(learning_rate_factor, warmup_steps=self.hparams["warmup_steps"], decay_steps=decay_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """AdamW of groups of parameters, or Muon for the matrices of the blocks, if it has a learning rate."""
        settings: dict[str, Any] = {"lr": self.hparams["lr"], "betas": self.hparams["betas"]}
        if self.hparams["muon_lr"] > 0:
            blocks = getattr(self.network, "blocks", None) or self.network.layers
            return Muon(split_groups(groups, matrices(blocks), self.hparams["muon_lr"]), **settings)
        return AdamW(groups, **settings)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norm of all gradients before they are clipped, at the steps that are logged."""
        log_every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined] # a connector sets it
        if log_every == 0 or (self.global_step + 1) % log_every:
            return
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    # Generation

    @abstractmethod
    def generate(self, condition: Condition, num_frames: int, seeds: Tensor, sampling: Any = None) -> Tensor:
        """Generate one video for each seed.

        Args:
            condition: What to generate from; its tensors have as many rows as there are seeds.
            num_frames: Pixel frames.
            seeds: `[B]` int64, non-negative; a sample depends on its own seed alone.
            sampling: The paper's sampling settings; None takes the module's.

        Returns:
            `[B, 3, T, H, W]` in [-1, 1].
        """

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes `[B, t, h, w]` to video `[B, 3, T, H, W]` in [-1, 1], in float32."""
        tokenizer = self._placed_tokenizer()
        with torch.autocast(self.device.type, enabled=False):
            return tokenizer.decode(tokenizer.codes_to_latents(codes))

    def iter_decode(self, codes: Tensor) -> Iterator[Tensor]:
        """Codes `[B, t, h, w]` to the pieces of what `decode_codes` gives, of varying length, at constant memory.

        A tokenizer that needs the whole clip gives one piece.
        """
        tokenizer = self._placed_tokenizer()
        if tokenizer.decoder.whole_clip_reason() is not None:
            yield self.decode_codes(codes)
            return
        pieces = tokenizer.iter_decode(tokenizer.codes_to_latents(frame) for frame in codes.split(1, dim=1))
        while True:
            # around each piece: a context around a `yield` would hold for whoever is given the piece, too
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def iter_generate(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: Any = None
    ) -> Iterator[Tensor]:
        """Generate as `generate` does, and give the video in pieces.

        Yields:
            The next frames `[B, 3, n, H, W]` in [-1, 1], of varying number n; all at once unless a model can do better.
        """
        yield self.generate(condition, num_frames, seeds, sampling)

    def sample_videos(self, batch: dict[str, Any], seeds: Tensor) -> Tensor:
        """Videos for a callback to show: `[len(seeds), 3, T, H, W]`."""
        return self.generate(Condition(), self.num_frames, seeds)

    def sample_captions(self, batch: dict[str, Any], count: int) -> list[tuple[str, str]]:
        """What the first videos of `sample_videos` are: the task of each, and what it was asked for, "" for nothing.

        Args:
            batch: What the videos were made from.
            count: How many there are.
        """
        captions = [""] * count
        if self.reads_text or self.hparams.get("text_tokenizer") is not None:
            captions = list(batch["text"][:count])
        elif self.num_classes and "label" in batch:
            captions = [f"class {label}" for label in batch["label"][:count].tolist()]
        return [("video", caption) for caption in captions]

    def checked_task(self, task: str | None, label: int | None = None) -> str | None:
        """Return the task to generate for, if there are tasks; None takes the model's first.

        Raises:
            ValueError: If the model has no such task, or a label is given that is no class of it.
        """
        for name, value in (("task", task), ("label", label)):
            if value is not None:
                raise ValueError(f"{name}={value}: {type(self).__name__} has no {name}s to choose from (--{name}).")
        return None

    def needs_clips(self, task: str | None) -> bool:
        """Whether the task gives pixels, so that `sample` has to take clips from the data."""
        return False

    def known_frames(self, task: str | None) -> int:
        """Frames that a video must have at least, for a task to start from."""
        return self.num_frames

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Generate the videos of the seeds in the batch.

        Returns:
            `seeds`, and `pieces`, an iterable of the next frames of all of them.
        """
        condition = Condition(batch.get("label"), batch.get("video"), batch.get("task"), batch.get("known"))
        return {"seeds": batch["seeds"], "pieces": self.iter_generate(condition, batch["num_frames"], batch["seeds"])}
