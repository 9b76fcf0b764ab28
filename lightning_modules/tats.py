"""TATS' second stage: autoregressive modelling of codes, and of the frames between key frames (ECCV 2022).

Where the paper is in the code:

    3.1, time-agnostic VQGAN                 `models.tokenizers.time_agnostic`, trained by `VQGAN3DModule`
    3.2, time-sensitive transformer          `models.priors.tats.TATS`; its loss `TATSModule.code_nll`, `mean_nll`
    class, text and sound conditions         `TATSModule.condition_of`, `TATS.condition_tokens`
    3.2, sliding window                      `models.priors.autoregressive.slide`, cache `TATS.new_cache`, `extend`
    3.3, hierarchy: key frames               `--model.latent_stride`, `TATSModule.generate_codes`
    3.3, hierarchy: interpolation            `attention_mask`, `TATSModule.fill_keys`, `fill_gaps`, `fill_between`
    targets that the mask gives away         `TATS.leaked_targets` (the release trains on them: `--model.released`)
    token filter: top-k, top-p               `TokenFilter`, settings `AutoregressiveSampling`
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.generator import Condition, VideoGenerator
from models.priors.autoregressive import AutoregressiveSampling, balanced_classes, fill_gaps, slide
from models.priors.decoding import seeded_noise
from models.priors.tats import TATS, AttentionMask
from models.random import keyed_seed
from models.text_ids import TextIds, load_text_ids
from models.tokenizers import VQGAN3D
from models.weights import load_tokenizer, state_digest

GAP_STREAM = 1  # sets the seeds of the gaps between key frames apart from those of the key frames
KEPT_STREAM, REPLACEMENT_STREAM, DROPOUT_STREAM = 4, 5, 6  # of training, besides those of every generator
SPECTROGRAM = (64, 16)  # bands and columns of a frame's sound


@dataclass(frozen=True)
class TATSCondition(Condition):
    """What TATS generates from.

    Args:
        text: A text for each video, for a model that reads text.
        audio: `[B, 1, T, 64, 16]` in [-1, 1], a spectrogram for each frame, for a model that hears.
    """

    text: list[str] | None = None
    audio: Tensor | None = None


class TATSModule(VideoGenerator):
    """Trains and samples TATS: the base model, key frames of the hierarchy, or the frames between them.

    The defaults are the published UCF-101 network without a class. Key frames are a model with `latent_stride`; what
    fills the frames between them is one with the mask `closed_boundaries`, whose clips are `latent_stride + 1` latent
    frames long. To generate, take the first and name the checkpoint of the second (`sampling.interpolation`).

    A sequence may begin with a class (`num_classes`), a text (`text_tokenizer`), or the codes of the clip's sound
    (`audio_tokenizer`): one of them.

    Args:
        tokenizer: Path of the frozen tokenizer: a bundle made by `longtake export`, or a checkpoint.
        num_frames: Pixel frames of a training clip (linked to data.num_frames).
        resolution: Height and width of the video (linked to data.resolution).
        downsample: Pixel frames, rows and columns that one code covers.
        codebook_size: Number of codes of the tokenizer.
        num_classes: Number of classes to condition on; 0 for none.
        text_tokenizer: CLIP's file of byte-pair merges, a folder with a tokenizer for the `text` extra, or `bytes`;
            see `models.text_ids`. Null for a model without text.
        text_vocabulary: Number of its ids, at most: 49408 for CLIP, 257 for bytes.
        text_length: Ids of a text; shorter ones are filled up with zeros, longer ones cut.
        audio_tokenizer: Path of a second frozen tokenizer, of spectrograms. Null for a model without sound.
        audio_downsample: Frames, bands and columns that one of its codes covers.
        audio_codebook_size: Number of its codes.
        condition_dropout: Share of training clips whose condition is replaced by an id of its own, for guidance. TATS
            has none.
        latent_stride: Train on every how manieth latent frame of a clip.
        mask: Which positions see which: `causal`, or those that fill the frames between the first and the last.
        released: Keep in the loss the codes that the mask gives away, as the release does.
        pkeep: Share of codes that are given as they are; the others are replaced by random ones in the input.
        dim: Width of the transformer.
        depth: Blocks.
        num_heads: Attention heads.
        block_size: Positions, if more than needed: text models have 1280 where 1279 would do.
        dropout: Dropout of embeddings, attention and MLPs.
        position_init: `zeros` as published, or `sinusoidal`, which small models learn much sooner from.
        init_std: Standard deviation of initial weights and embeddings; the published 0.02 is for width 1024.
        lr: Learning rate, as given: not rescaled by GPUs or batch size.
        betas: AdamW's betas.
        muon_lr: Learning rate of Muon for the matrices of the blocks, which AdamW leaves to it then; 0 for AdamW
            alone, as in the paper. About 0.02 where a run lasts minutes.
        weight_decay: Weight decay of Linear weights; nothing else decays.
        warmup_steps: Steps of linear warm-up.
        lr_schedule: `constant`, or `cosine` down to zero at trainer.max_steps.
        sampling: Token filters, the sliding window, and what fills the frames between key frames.
        seed: Keys every random draw of training (linked to seed_everything).

    Raises:
        ValueError: If there are several conditions, or options that contradict each other.
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
        text_tokenizer: str | None = None,
        text_vocabulary: int = 49408,
        text_length: int = 256,
        audio_tokenizer: str | None = None,
        audio_downsample: tuple[int, int, int] = (4, 8, 8),
        audio_codebook_size: int = 16384,
        condition_dropout: float = 0.0,
        latent_stride: int = 1,
        mask: AttentionMask = "causal",
        released: bool = False,
        pkeep: float = 1.0,
        dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        block_size: int | None = None,
        dropout: float = 0.0,
        position_init: Literal["zeros", "sinusoidal"] = "zeros",
        init_std: float = 0.02,
        lr: float = 1.08e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        muon_lr: float = 0.0,
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
        self.class_conditional = num_classes > 0  # read by whoever judges samples by the class that was asked for
        self.latent_stride = latent_stride
        condition_size, condition_length = self._condition_sizes()
        for name, value, holds in (
            (
                "condition_dropout",
                condition_dropout,
                0 <= condition_dropout < 1 and bool(condition_size or not condition_dropout),
            ),
            ("pkeep", pkeep, 0 < pkeep <= 1),
            ("released", released, not released or mask != "causal"),
        ):
            if not holds:
                expected = {
                    "condition_dropout": "0, or less than 1 for a model with a condition",
                    "pkeep": "more than 0, at most 1",
                    "released": "false: no code is given away by a causal mask",
                }[name]
                raise ValueError(f"{name}={value}: expected {expected} (--model.{name}).")
        self._check_guidance(sampling)
        t, h, w = self.latent_shape
        self.network = TATS(
            codebook_size,
            (-(-t // latent_stride), h, w),
            dim,
            depth,
            num_heads,
            condition_size=condition_size + (1 if condition_dropout else 0),
            condition_length=condition_length,
            mask=mask,
            dropout=dropout,
            block_size=block_size,
            position_init=position_init,
            init_std=init_std,
        )

    # Conditions

    def _condition_sizes(self) -> tuple[int, int]:
        """Ids and length of the condition, that of unconditional samples left out."""
        options = self.hparams
        kinds = {
            "num_classes": self.num_classes > 0,
            "text_tokenizer": options["text_tokenizer"] is not None,
            "audio_tokenizer": options["audio_tokenizer"] is not None,
        }
        if sum(kinds.values()) > 1:
            several = ", ".join(f"--model.{name}" for name, given in kinds.items() if given)
            raise ValueError(f"A sequence begins with one condition: give one of {several}.")
        if kinds["text_tokenizer"]:
            return options["text_vocabulary"], options["text_length"]
        if kinds["audio_tokenizer"]:
            sizes = (self.num_frames, *SPECTROGRAM)
            if any(size % factor for size, factor in zip(sizes, options["audio_downsample"], strict=True)):
                raise ValueError(
                    f"audio_downsample={options['audio_downsample']} does not divide {sizes} frames, bands and columns "
                    "of sound (--model.audio_downsample, --data.num_frames)."
                )
            return options["audio_codebook_size"], prod(sizes) // prod(options["audio_downsample"])
        return self.num_classes, 1

    def load_tokenizer(self) -> None:
        """Load the frozen tokenizer, and that of the condition, once.

        Raises:
            FileNotFoundError: If one is missing.
            ValueError: If one does not fit.
        """
        super().load_tokenizer()
        if "condition_digest" in self.__dict__:
            return
        self.condition_digest: str | None = None
        options = self.hparams
        if options["text_tokenizer"] is not None:
            text_ids = load_text_ids(options["text_tokenizer"])
            if text_ids.size > options["text_vocabulary"]:
                raise ValueError(
                    f"The tokenizer {options['text_tokenizer']} has {text_ids.size} ids, the model expects at most "
                    f"{options['text_vocabulary']} (--model.text_vocabulary)."
                )
            self.text_ids: TextIds = text_ids
            self.condition_digest = text_ids.digest
        if options["audio_tokenizer"] is not None:
            path = Path(options["audio_tokenizer"])
            if not path.exists():
                raise FileNotFoundError(
                    f"No tokenizer of sound at {path} (--model.audio_tokenizer). Make one with\n"
                    "  make train EXP=vqgan3d_stft\n"
                    f"  longtake export runs/vqgan3d_stft/version_0/checkpoints/last.ckpt {path}"
                )
            hearing = load_tokenizer(path)
            theirs = (tuple(hearing.downsample), hearing.codebook_size)
            ours = (tuple(options["audio_downsample"]), options["audio_codebook_size"])
            if theirs != ours:
                raise ValueError(
                    f"The tokenizer of sound at {path} has downsample={theirs[0]} and codebook_size={theirs[1]}, the "
                    f"model expects {ours[0]} and {ours[1]} (--model.audio_downsample, --model.audio_codebook_size)."
                )
            self.__dict__["hearing"] = hearing  # outside the module tree, as the tokenizer of the video
            self.condition_digest = state_digest(hearing.state_dict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the tokenizers by their hashes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["condition_digest"] = self.condition_digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse other tokenizers than those that the weights were trained on."""
        super().on_load_checkpoint(checkpoint)
        # a released model of text does not say which words its ids stand for
        if checkpoint.get("condition_digest", self.condition_digest) != self.condition_digest:
            raise ValueError(
                "The checkpoint was trained with another tokenizer of its condition. Give the one it was trained with "
                "(--model.text_tokenizer, --model.audio_tokenizer)."
            )

    def condition_of(self, condition: TATSCondition, num_samples: int) -> Tensor | None:
        """Condition tokens `[B, C]`, None for an unconditional model.

        Raises:
            ValueError: If what is given is not what this model is conditioned on, or does not fit.
        """
        label, text, audio = condition.label, condition.text, condition.audio
        options = self.hparams
        if options["text_tokenizer"] is not None:
            if text is None or len(text) != num_samples or label is not None or audio is not None:
                raise ValueError(f"This TATS reads text: expected {num_samples} texts and no other condition.")
            return self.text_ids.rows(text, options["text_length"]).to(self.device)
        if options["audio_tokenizer"] is not None:
            expected = (num_samples, 1, self.num_frames, *SPECTROGRAM)
            if audio is None or audio.shape != expected or label is not None or text is not None:
                given = "none" if audio is None else f"{tuple(audio.shape)}"
                raise ValueError(f"This TATS hears: expected sound of {expected} and no other condition, got {given}.")
            return self._heard(audio)
        if text is not None or audio is not None:
            raise ValueError("This TATS is not conditioned on text or sound.")
        if self.num_classes == 0:
            if label is not None:
                raise ValueError("This TATS is unconditional: generate it without a label.")
            return None
        if label is None or label.shape != (num_samples,):
            came = "none" if label is None else f"{label.tolist()}"
            raise ValueError(
                f"Labels are {came}: expected {num_samples} of the classes 0 to {self.num_classes - 1} (--label)."
            )
        return label[:, None].to(self.device)

    @torch.no_grad()
    def _heard(self, audio: Tensor) -> Tensor:
        hearing: VQGAN3D = self.__dict__["hearing"].to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            codes = hearing.encode(audio.to(self.device).float()).codes
        assert codes is not None  # `load_tokenizer` compared the number of codes
        return codes.flatten(1)

    def batch_condition(self, batch: dict[str, Any], num_samples: int | None = None) -> TATSCondition:
        """What of a batch, or of its first samples, this model is conditioned on.

        Raises:
            ValueError: If the batch does not hold it, or only a part of the sound's clip is trained on.
        """
        rows = slice(num_samples)
        for option, key in (("text_tokenizer", "text"), ("audio_tokenizer", "audio")):
            if self.hparams[option] is None:
                continue
            if key not in batch:
                flag = {"text": "--data.captions", "audio": "--data.audio"}[key]
                raise ValueError(f"This TATS is conditioned on {key}, but the batches hold none (such as {flag}=true).")
            if key == "audio" and "window_frames" in batch:
                raise ValueError("Sound goes with whole clips: leave --curriculum.schedule at `longest`.")
            return TATSCondition(**{key: batch[key][rows]})
        return TATSCondition(label=batch["label"][rows]) if self.num_classes else TATSCondition()

    @property
    def null_id(self) -> int:
        """The condition id that stands for none: the last one."""
        return self.network.condition_size - 1

    def _check_guidance(self, sampling: AutoregressiveSampling) -> None:
        if sampling.guidance_scale != 1 and not self.hparams["condition_dropout"]:
            raise ValueError(
                f"guidance_scale={sampling.guidance_scale} needs a model that also knows no condition: train with "
                "--model.condition_dropout, or leave --model.sampling.guidance_scale at 1."
            )

    # Training

    def code_nll(self, batch: dict[str, Any], corrupt: bool = False) -> Tensor:
        """Cross-entropy of each code `[B, N]` given the condition and the codes that the mask shows.

        Args:
            batch: Holds `video` or `codes`, and the condition.
            corrupt: Whether to drop conditions and to replace codes of the input, as in training.
        """
        codes, _ = self.window_codes(batch)  # positions begin at 0 in every window
        codes = codes[:, :: self.latent_stride].flatten(1)  # [B, N]
        condition = self.condition_of(self.batch_condition(batch), len(codes))
        given = codes
        if corrupt and condition is not None and self.hparams["condition_dropout"]:
            is_dropped = self._uniform(DROPOUT_STREAM, len(codes), 1) < self.hparams["condition_dropout"]
            condition = condition.masked_fill(is_dropped, self.null_id)
        if corrupt and self.hparams["pkeep"] < 1:
            is_kept = self._uniform(KEPT_STREAM, *codes.shape) < self.hparams["pkeep"]
            replacements = self._uniform(REPLACEMENT_STREAM, *codes.shape) * self.network.codebook_size
            given = torch.where(is_kept, codes, replacements.long())
        logits = self.network.code_logits(given, condition)  # [B, N, V]
        targets = codes + self.network.condition_size
        return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")

    def _uniform(self, stream: int, batch_size: int, length: int) -> Tensor:
        """Draws `[batch_size, length]` in [0, 1) of this step, sliced by rank."""
        generator = self.step_generator(stream, device=self.device)
        return self.sliced_by_rank(lambda n: torch.rand(n, length, device=self.device, generator=generator), batch_size)

    def mean_nll(self, nll: Tensor, leaked: bool) -> Tensor:
        """Mean of `[B, N]` over all codes, or over those that the mask does not give away."""
        if leaked:
            return nll.mean()
        # weighted, not indexed: the number of entries under a boolean index is known on the device alone
        real = ~self.network.leaked_targets()[: nll.shape[1]]
        return (nll * real).sum() / (real.sum() * len(nll))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Predict every code that the mask does not give away; with `released`, those too."""
        if self.num_classes and batch_idx == 0:  # once an epoch: it waits for the device
            self.check_labels(batch["label"])
        nll = self.code_nll(batch, corrupt=True)
        self.tokens_per_batch = nll.numel()
        loss = self.mean_nll(nll, leaked=self.hparams["released"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The loss, and in nats the mean over the codes that the mask does not give away; with every condition."""
        nll = self.code_nll(batch)
        loss = self.mean_nll(nll, leaked=self.hparams["released"])
        self.log("val/loss", loss, batch_size=len(nll), sync_dist=True, prog_bar=True)
        self.log("val/nll", self.mean_nll(nll, leaked=False), batch_size=len(nll), sync_dist=True)

    # Generation

    @torch.no_grad()
    def generate_codes(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: AutoregressiveSampling | None = None
    ) -> Tensor:
        """Generate code maps `[B, t, h, w]`; the arguments are those of `generate`."""
        sampling = sampling or self.sampling
        frames = self.generated_latent_frames(num_frames)
        if self.network.attention_mask is not None:
            raise ValueError(
                "This model fills frames between key frames: generate with the key frames' model and name this one's "
                "checkpoint there (--model.sampling.interpolation)."
            )
        self._check_guidance(sampling)
        start = self._start(condition, len(seeds), sampling)
        noise = seeded_noise(seeds, self.device)
        if self.hparams["audio_tokenizer"] is not None and num_frames > self.num_frames:
            raise ValueError(
                f"num_frames={num_frames} is longer than the {self.num_frames} frames of sound that this TATS hears."
            )
        if self.latent_stride == 1:
            codes = slide(self.network, start, frames, sampling, noise)
        else:
            interpolation = self.load_interpolation(sampling.interpolation)
            num_keys = 1 - (1 - frames) // self.latent_stride  # the last key is at or after the last frame
            keys = slide(self.network, start, num_keys, sampling, noise)
            shared = TATSCondition(label=condition.label) if interpolation.num_classes else TATSCondition()
            codes = interpolation.fill_keys(keys, seeds, sampling, shared)[:, :frames]
        return codes.unflatten(2, self.latent_shape[1:])

    def fill_keys(
        self, keys: Tensor, seeds: Tensor, sampling: AutoregressiveSampling, condition: TATSCondition
    ) -> Tensor:
        """Fill the gaps between key frames, every gap of a sample with a seed of its own.

        Args:
            keys: `[B, k, F]` codes.
            seeds: `[B]` int64.
            sampling: Filter, whether to fill as released, and how many gaps at once; gaps are not guided.
            condition: That of the samples.

        Returns:
            `[B, (k - 1) (m + 1) + 1, F]` codes, with `m` frames between two keys.
        """
        gap_seeds = [[keyed_seed(seed, GAP_STREAM, gap) for gap in range(keys.shape[1] - 1)] for seed in seeds.tolist()]
        return fill_gaps(
            self.network,
            self.network.condition_tokens(len(keys), self.condition_of(condition, len(keys))),
            keys,
            sampling.filter,
            torch.tensor(gap_seeds),
            sampling.released_interpolation,
            sampling.gaps_at_once,
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
            if model.latent_shape[1:] != self.latent_shape[1:] or model.num_classes not in (0, self.num_classes):
                raise ValueError(
                    f"{path} was trained on latent frames of {model.latent_shape[1:]} and {model.num_classes} classes, "
                    f"expected {self.latent_shape[1:]} and none or the key frames' {self.num_classes} "
                    "(--model.sampling.interpolation)."
                )
            if model.needs_clips(None):
                raise ValueError(
                    f"{path} is conditioned on text or sound: what fills the frames between key frames takes a class "
                    "or nothing (--model.sampling.interpolation)."
                )
            loaded[path] = model.eval().requires_grad_(False)
        return loaded[path].to(self.device)

    def _start(self, condition: Condition, num_samples: int, sampling: AutoregressiveSampling) -> Tensor:
        """What sequences begin with; twice, the second time without the condition, if that is to be guided by."""
        if not isinstance(condition, TATSCondition):
            condition = TATSCondition(label=condition.label)
        label = condition.label
        # not in training, where a look at the values would wait for the device
        if label is not None and self.num_classes and not ((label >= 0) & (label < self.num_classes)).all():
            raise ValueError(
                f"Labels are {label.tolist()}: expected {num_samples} of the classes 0 to {self.num_classes - 1} "
                "(--label)."
            )
        start = self.network.condition_tokens(num_samples, self.condition_of(condition, num_samples))
        if sampling.guidance_scale == 1:
            return start
        return torch.cat([start, torch.full_like(start, self.null_id)])

    def generate(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: AutoregressiveSampling | None = None
    ) -> Tensor:
        """Generate videos: within the window at once, longer ones by sliding it, key frames with what fills them.

        Args:
            condition: `label` `[B]` for a model with classes; a `TATSCondition` for one with text or sound.
            num_frames: Pixel frames, a multiple of the tokenizer's factor; there is no longest, but with sound and on a
                causal tokenizer.
            seeds: `[B]` int64; sample i depends on seed i alone.
            sampling: Sampling settings; None takes the module's.

        Returns:
            `[B, 3, T, H, W]` in [-1, 1].

        Raises:
            FileNotFoundError: If key frames lack the model that fills the frames between them.
            ValueError: If the condition or the length does not fit.
        """
        return self.decode_codes(self.generate_codes(condition, num_frames, seeds, sampling))

    def iter_generate(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: AutoregressiveSampling | None = None
    ) -> Iterator[Tensor]:
        """Generate videos of any length at constant memory: all codes first, then the pixels in pieces.

        Arguments and errors are those of `generate`.

        Yields:
            The next frames `[B, 3, n, H, W]` in [-1, 1], of varying number n; together what `generate` returns.
        """
        return self.iter_decode(self.generate_codes(condition, num_frames, seeds, sampling))

    @torch.no_grad()
    def sample_videos(self, batch: dict[str, Any], seeds: Tensor) -> Tensor:
        """Videos under the batch's conditions for a callback to show: `[len(seeds), 3, T, H, W]`.

        Key frames are shown one after the other; a model that fills frames does so between those of the batch.
        """
        h, w = self.latent_shape[1:]
        condition = self.batch_condition(batch, len(seeds))
        if self.network.attention_mask is not None:
            codes = self.window_codes(batch)[0][: len(seeds), :: self.latent_shape[0] - 1].flatten(2)  # first and last
            return self.decode_codes(self.fill_keys(codes, seeds, self.sampling, condition).unflatten(2, (h, w)))
        start = self._start(condition, len(seeds), self.sampling)
        noise = seeded_noise(seeds, self.device)
        codes = slide(self.network, start, self.network.num_frames, self.sampling, noise)
        return self.decode_codes(codes.unflatten(2, (h, w)))

    def checked_task(self, task: str | None, label: int | None = None) -> str | None:
        """Return None: there are no tasks; a label is for a model with classes.

        Raises:
            ValueError: If a task is given, or a label that is no class.
        """
        if label is not None and not 0 <= label < self.num_classes:
            classes = f"0 to {self.num_classes - 1}" if self.num_classes else "none"
            raise ValueError(f"label={label}: this TATS has the classes {classes} (--label).")
        return super().checked_task(task)

    def needs_clips(self, task: str | None) -> bool:
        """Whether texts or sounds are to be taken from clips of the data."""
        return self.hparams["text_tokenizer"] is not None or self.hparams["audio_tokenizer"] is not None

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Generate the videos of the seeds in the batch, of its labels, texts or sounds.

        Without labels the classes take turns, that of seed s being s modulo classes, or are those of a balanced set.
        """
        seeds = batch["seeds"]
        if self.num_classes and "label" not in batch:
            labels = seeds % self.num_classes
            if (size := self.sampling.class_set) is not None:
                labels = balanced_classes(size, self.num_classes, self.seed)[seeds.cpu() % size]
            batch = batch | {"label": labels}
        return {"seeds": seeds, "pieces": self.iter_generate(self.batch_condition(batch), batch["num_frames"], seeds)}
