"""TATS' second stage: autoregressive modelling of codes, and of the frames between key frames (ECCV 2022)."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.generator import Condition, VideoGenerator
from models.priors.autoregressive import AutoregressiveSampling, fill_gaps, slide
from models.priors.decoding import seeded_noise
from models.priors.tats import TATS, AttentionMask
from models.random import keyed_seed

GAP_STREAM = 1  # sets the seeds of the gaps between key frames apart from those of the key frames


class TATSModule(VideoGenerator):
    """Trains and samples TATS: the base model, key frames of the hierarchy, or the frames between them.

    The defaults are the published UCF-101 network without a class. Key frames are a model with `latent_stride`; what
    fills the frames between them is one with the mask `closed_boundaries`, whose clips are `latent_stride + 1` latent
    frames long. To generate, take the first and name the checkpoint of the second (`sampling.interpolation`).

    Args:
        tokenizer: Path of the frozen tokenizer: a bundle made by `longtake export`, or a checkpoint.
        num_frames: Pixel frames of a training clip (linked to data.num_frames).
        resolution: Height and width of the video (linked to data.resolution).
        downsample: Pixel frames, rows and columns that one code covers.
        codebook_size: Number of codes of the tokenizer.
        num_classes: Number of classes to condition on; 0 for none.
        latent_stride: Train on every how manieth latent frame of a clip.
        mask: Which positions see which: `causal`, or those that fill the frames between the first and the last.
        dim: Width of the transformer.
        depth: Blocks.
        num_heads: Attention heads.
        dropout: Dropout of embeddings, attention and MLPs.
        position_init: `zeros` as published, or `sinusoidal`, which small models learn much sooner from.
        init_std: Standard deviation of initial weights and embeddings; the published 0.02 is for width 1024.
        lr: Learning rate, as given: not rescaled by GPUs or batch size.
        betas: AdamW's betas.
        weight_decay: Weight decay of Linear weights; nothing else decays.
        warmup_steps: Steps of linear warm-up.
        lr_schedule: `constant`, or `cosine` down to zero at trainer.max_steps.
        sampling: Token filters, the sliding window, and what fills the frames between key frames.
        seed: Keys every random draw of training (linked to seed_everything).
    """

    sampling: AutoregressiveSampling

    def __init__(
        self,
        tokenizer: str,
        num_frames: int,
        resolution: int,
        downsample: tuple[int, int, int] = (4, 8, 8),
        codebook_size: int = 16384,
        num_classes: int = 0,
        latent_stride: int = 1,
        mask: AttentionMask = "causal",
        dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        dropout: float = 0.0,
        position_init: Literal["zeros", "sinusoidal"] = "zeros",
        init_std: float = 0.02,
        lr: float = 1.08e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        lr_schedule: Literal["constant", "cosine"] = "constant",
        sampling: AutoregressiveSampling = AutoregressiveSampling(),
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, num_frames, resolution, downsample, codebook_size, seed)
        if latent_stride < 1 or (mask != "causal" and latent_stride > 1):
            raise ValueError(
                f"latent_stride={latent_stride} does not fit mask={mask!r}: expected at least 1, and 1 for a model "
                "that fills frames (--model.latent_stride)."
            )
        if isinstance(sampling, dict):  # read from a checkpoint
            sampling = AutoregressiveSampling(**sampling)
        self.save_hyperparameters(ignore=["sampling"])
        self.save_hyperparameters({"sampling": asdict(sampling)})  # a checkpoint holds plain types
        self.sampling = sampling
        self.num_classes = num_classes
        self.latent_stride = latent_stride
        t, h, w = self.latent_shape
        self.network = TATS(
            codebook_size,
            (-(-t // latent_stride), h, w),
            dim,
            depth,
            num_heads,
            condition_size=num_classes,
            mask=mask,
            dropout=dropout,
            position_init=position_init,
            init_std=init_std,
        )

    # Training

    def code_nll(self, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy of each code `[B, N]` given the class and the codes that the mask shows."""
        codes, _ = self.window_codes(batch)  # positions begin at 0 in every window
        codes = codes[:, :: self.latent_stride].flatten(1)  # [B, N]
        condition = batch["label"][:, None] if self.num_classes else None
        logits = self.network.code_logits(codes, condition)  # [B, N, V]
        return F.cross_entropy(logits.float().transpose(1, 2), codes + self.num_classes, reduction="none")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Predict every code; with boundaries, also those that their mask gives away, as the release does."""
        nll = self.code_nll(batch)
        self.tokens_per_batch = nll.numel()
        loss = nll.mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The loss, and the mean over the codes that the mask does not give away, in nats."""
        nll = self.code_nll(batch)
        real = ~self.network.leaked_targets()[: nll.shape[1]]
        self.log("val/loss", nll.mean(), batch_size=len(nll), sync_dist=True, prog_bar=True)
        # weighted, not indexed: the number of entries under a boolean index is known on the device alone
        self.log("val/nll", (nll * real).sum() / (real.sum() * len(nll)), batch_size=len(nll), sync_dist=True)

    # Generation

    @torch.no_grad()
    def generate_codes(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: AutoregressiveSampling | None = None
    ) -> Tensor:
        """Generate code maps `[B, t, h, w]`; the arguments are those of `generate`."""
        sampling = sampling or self.sampling
        frames = num_frames // self.downsample[0]
        if num_frames % self.downsample[0] or frames < 1:
            raise ValueError(
                f"num_frames={num_frames} cannot be generated: this model makes multiples of {self.downsample[0]}."
            )
        if self.network.attention_mask is not None:
            raise ValueError(
                "This model fills frames between key frames: generate with the key frames' model and name this one's "
                "checkpoint there (--model.sampling.interpolation)."
            )
        start = self.network.condition_tokens(len(seeds), self._label_tokens(condition, len(seeds)))
        noise = seeded_noise(seeds, self.device)
        if self.latent_stride == 1:
            codes = slide(self.network, start, frames, sampling, noise)
        else:
            interpolation = self.load_interpolation(sampling.interpolation)
            num_keys = 1 - (1 - frames) // self.latent_stride  # the last key is at or after the last frame
            keys = slide(self.network, start, num_keys, sampling, noise)
            codes = interpolation.fill_keys(keys, seeds, sampling)[:, :frames]
        return codes.unflatten(2, self.latent_shape[1:])

    def fill_keys(self, keys: Tensor, seeds: Tensor, sampling: AutoregressiveSampling) -> Tensor:
        """Fill the gaps between key frames, every gap of a sample with a seed of its own.

        Args:
            keys: `[B, k, F]` codes.
            seeds: `[B]` int64.
            sampling: Filter, and whether to fill as released.

        Returns:
            `[B, (k - 1) (m + 1) + 1, F]` codes, with `m` frames between two keys.
        """
        gap_seeds = [keyed_seed(seed, GAP_STREAM, gap) for seed in seeds.tolist() for gap in range(keys.shape[1] - 1)]
        return fill_gaps(
            self.network,
            self.network.condition_tokens(len(keys), None),
            keys,
            sampling.filter,
            seeded_noise(torch.tensor(gap_seeds), self.device),
            sampling.released_interpolation,
        )

    def load_interpolation(self, path: str | None) -> "TATSModule":
        """Load the model that fills the frames between key frames, once.

        Raises:
            FileNotFoundError: If no checkpoint is named, or none is there.
            ValueError: If it is not such a model, or leaves out or makes other frames than these key frames need.
        """
        if path is None or not Path(path).is_file():
            raise FileNotFoundError(
                f"This model makes key frames, {self.latent_stride} latent frames apart. What fills the frames between "
                f"them was not found at {path}: give the checkpoint of a model that was trained with "
                "mask=closed_boundaries (--model.sampling.interpolation)."
            )
        loaded: dict[str, TATSModule] = self.__dict__.setdefault("interpolation_models", {})
        if path not in loaded:
            # the same tokenizer, or loading refuses
            model = TATSModule.load_from_checkpoint(
                path, map_location="cpu", weights_only=True, tokenizer=self.tokenizer_path
            )
            if model.network.attention_mask is None or model.network.num_frames != self.latent_stride + 1:
                raise ValueError(
                    f"{path} does not fill {self.latent_stride - 1} latent frames between two: expected clips of "
                    f"{self.latent_stride + 1} of them and mask=closed_boundaries (--model.sampling.interpolation)."
                )
            if model.latent_shape[1:] != self.latent_shape[1:] or model.num_classes:
                raise ValueError(
                    f"{path} was trained on latent frames of {model.latent_shape[1:]} and {model.num_classes} classes, "
                    f"expected {self.latent_shape[1:]} and none (--model.sampling.interpolation)."
                )
            loaded[path] = model.eval().requires_grad_(False)
        return loaded[path].to(self.device)

    def _label_tokens(self, condition: Condition, num_samples: int) -> Tensor | None:
        if self.num_classes == 0:
            if condition.label is not None:
                raise ValueError("This TATS is unconditional: generate it without a label.")
            return None
        label = condition.label
        if label is None or label.shape != (num_samples,) or label.min() < 0 or label.max() >= self.num_classes:
            came = "none" if label is None else label.tolist()
            raise ValueError(f"Labels are {came}: expected {num_samples} of the classes 0 to {self.num_classes - 1}.")
        return label[:, None].to(self.device)

    def generate(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: AutoregressiveSampling | None = None
    ) -> Tensor:
        """Generate videos: within the window at once, longer ones by sliding it, key frames with what fills them.

        Args:
            condition: `label` `[B]` for a model with classes, else empty.
            num_frames: Pixel frames, a multiple of the tokenizer's factor; there is no longest.
            seeds: `[B]` int64; sample i depends on seed i alone.
            sampling: Sampling settings; None takes the module's.

        Returns:
            `[B, 3, T, H, W]` in [-1, 1].

        Raises:
            FileNotFoundError: If key frames lack the model that fills the frames between them.
            ValueError: If the condition or the length does not fit.
        """
        return self.decode_codes(self.generate_codes(condition, num_frames, seeds, sampling))

    @torch.no_grad()
    def sample_videos(self, batch: dict[str, Any], seeds: Tensor) -> Tensor:
        """Videos of the batch's classes for a callback to show: `[len(seeds), 3, T, H, W]`.

        Key frames are shown one after the other; a model that fills frames does so between those of the batch.
        """
        h, w = self.latent_shape[1:]
        if self.network.attention_mask is not None:
            codes = self.window_codes(batch)[0][: len(seeds), :: self.latent_shape[0] - 1].flatten(2)  # first and last
            return self.decode_codes(self.fill_keys(codes, seeds, self.sampling).unflatten(2, (h, w)))
        condition = Condition(label=batch["label"][: len(seeds)] if self.num_classes else None)
        start = self.network.condition_tokens(len(seeds), self._label_tokens(condition, len(seeds)))
        noise = seeded_noise(seeds, self.device)
        codes = slide(self.network, start, self.network.num_frames, self.sampling, noise)
        return self.decode_codes(codes.unflatten(2, (h, w)))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Generate the videos of the seeds in the batch; the classes take turns: that of seed s is s modulo classes."""
        seeds = batch["seeds"]
        condition = Condition(label=seeds % self.num_classes if self.num_classes else None)
        return {"seeds": seeds, "video": self.generate(condition, batch["num_frames"], seeds)}
