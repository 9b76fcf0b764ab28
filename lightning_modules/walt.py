"""W.A.L.T's second stage: diffusion of a causal tokenizer's latents by a window-attention transformer (ECCV 2024).

Where the paper is in the code (it was released without code; what it leaves open says so where it is decided):

    3.1, causal autoencoder                  `models.tokenizers.causal`, `continuous`, trained by `VQGAN3DModule`
    3.2, patches, windows in space and time  `models.priors.walt`: `WALTLayer`, `WindowAttention`
    3.2, images and videos together          `WALT.forward` (`is_image`), `datamodules.mixed`
    Eq. 3, AdaLN-LoRA                        `AdaLNLoRA`
    self-conditioning                        `WALTModule.squared_errors`, in sampling `models.priors.diffusion.sample`
    3.4, frame prediction, longer videos     `WALTModule.past_channels`, `generate_latents`, `new_frames`
    super-resolution stages                  `WALTModule.noisy_low_res`, `half_shape`; `experiments.cascade`
    text                                     `WALTModule.text_vectors`, `models.priors.text`
    table 8, noise, target, sampler          `models.priors.diffusion`: `Diffusion`, `add_noise`, `sample`, `guided`
    normalised latents                       `WALTModule.fit_latent_statistics`, `normalised`
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.optim import Adafactor, Optimizer

from lightning_modules.generator import VALIDATION_STREAM, Condition, VideoGenerator
from models.blocks.distributed import sum_over_ranks
from models.priors.diffusion import (
    Diffusion,
    DiffusionSampling,
    NoiseProcess,
    RectifiedFlow,
    add_noise,
    min_snr_weight,
    sample,
)
from models.priors.text import T5TextEncoder
from models.priors.walt import WALT, resized_state
from models.random import keyed_generator
from models.tokenizers import VQGAN3D
from models.weights import load_state, load_tokenizer, read_checkpoint, state_digest

# Streams of random numbers within one training step, besides those of the generator's file; and within a sample.
DIFFUSION_STREAM, SELF_CONDITIONING_STREAM = 11, 12
LABEL_STREAM, NOISE_STREAM, LOW_RES_STREAM = 13, 14, 15

# Quantiles of the process's times: from nearly clean to pure noise.
VALIDATION_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.9999)

# What `sample` can be asked for, and how many first latent frames it gives.
TASKS = {"image_to_video": 1, "frame_prediction": 2}


@dataclass(frozen=True)
class WALTCondition(Condition):
    """What W.A.L.T generates from, besides what all generators do.

    Args:
        text: A prompt for each video, for a model that reads text.
        low_res: `[B, 3, T, H / 2, W / 2]` in [-1, 1], the videos that a super-resolution stage enlarges.
    """

    text: Sequence[str] | None = None
    low_res: Tensor | None = None


class WALTModule(VideoGenerator):
    """Trains and samples W.A.L.T. The defaults are W.A.L.T-L on UCF-101; what the paper leaves open is our choice.

    Args:
        tokenizer: Path of the frozen causal tokenizer with continuous latents: a bundle made by `longtake export`, or a
            checkpoint.
        num_frames: Pixel frames of a clip, 1 + k downsample[0]; 1 for images (linked to data.num_frames).
        resolution: Height and width of the video (linked to data.resolution).
        width: Width of the video, where it is another one than the height; the data has to give it too.
        downsample: Pixel frames, rows and columns that one latent covers.
        latent_dim: Channels of the tokenizer's latents.
        unrounded: Whether the tokenizer is one of finite scalar codes, whose latents are taken before they are rounded
            (our choice): one tokenizer for W.A.L.T and for models of codes. That of the stage before too.
        num_classes: Classes; 0 trains without labels.
        text: Encoder of the batches' `text`: `t5` as in the paper, frozen, with the optional extra `text`; `bytes` is
            small and trained along; null trains without text.
        text_dim: Width of the text's vectors, 2048 for T5-XL.
        text_tokens: Tokens, or bytes, of a text that are read (our choice).
        t5_weights: Folder with T5's weights and tokenizer.
        condition_dropout: Share of samples trained without their label and text, which guidance needs (our choice).
        frame_prediction: Share of samples that are given their first frames (p_fp; the paper does not say).
        past_latents: How many first latent frames are given, one of these with equal chances (our choice).
        self_conditioning: Share of steps in which the network first makes the estimate that it is given (p_sc).
        joint_images: Whether batches hold stacks of images besides videos, told apart by `is_image`.
        low_res_tokenizer: Tokenizer of the stage before, for a super-resolution stage, which enlarges videos of half
            the height and width. They come as `low_res` in batches, or are made by averaging the clips' pixels.
        low_res_max_time: Noise that is added to them in training, at most, as a time of the process (our choice).
        init_from: Checkpoint that a new run starts from, of a model for another height and width: positions are
            interpolated, windows scale with the frame.
        depth: Layers.
        dim: Width of the transformer.
        num_heads: Attention heads.
        mlp_dim: Width of the MLPs; null takes 4 * dim.
        patch_size: Rows and columns of latents in a token.
        spatial_window: Rows and columns of tokens in a spatial window; null takes the whole frame.
        spatiotemporal_window: Rows and columns of tokens in a spatiotemporal window, which has all latent frames; null
            takes half of the frame's.
        adaln_rank: Rank of AdaLN-LoRA; null gives each layer a projection of its own.
        lora_on_first: Whether the first layer has a low-rank part. Equation 3 says no, the published counts say yes.
        qk_norm: Whether queries and keys are normalised.
        full_attention: Whether all layers attend to the whole clip, which the paper compares with.
        normalise_latents: Whether latents are shifted and scaled to mean 0 and standard deviation 1.
        process: `diffusion` as in the paper, or `rectified_flow`.
        flow_shift: Shift of the rectified flow's times towards noise.
        zero_terminal_snr: Whether the last level of the diffusion is pure noise.
        min_snr: Cap of min-SNR loss weights; null weighs all levels alike, as the paper does.
        optimizer: `adamw`, or `adafactor` as in the paper's text-to-video models (our choice: without momentum, and
            without scaling by the weights' own size).
        lr: Learning rate, as given: not rescaled by GPUs or batch size.
        betas: AdamW's betas (our choice).
        muon_lr: Learning rate of Muon for the matrices of the blocks, which AdamW leaves to it then; 0 for AdamW
            alone, as in the paper. About 0.02 where a run lasts minutes.
        weight_decay: Weight decay of Linear weights; nothing else decays (our choice).
        warmup_steps: Steps of linear warm-up (our choice).
        lr_schedule: `cosine` down to zero at trainer.max_steps, or `constant`.
        statistics_clips: Training clips, of all ranks together, whose latents' mean and standard deviation are measured
            when a run begins (our choice).
        sampling: Steps and guidance.
        seed: Keys every random draw of training (linked to seed_everything).

    Raises:
        ValueError: If arguments do not fit each other.
    """

    latent_mean: Tensor
    latent_std: Tensor
    low_res_mean: Tensor
    low_res_std: Tensor
    low_res_tokenizer: VQGAN3D
    text_encoder: T5TextEncoder

    def __init__(
        self,
        tokenizer: str,
        num_frames: int,
        resolution: int,
        width: int | None = None,
        downsample: tuple[int, int, int] = (4, 8, 8),
        latent_dim: int = 8,
        unrounded: bool = False,
        num_classes: int = 0,
        text: Literal["t5", "bytes"] | None = None,
        text_dim: int = 2048,
        text_tokens: int = 128,
        t5_weights: str = "weights/t5-xl",
        condition_dropout: float = 0.1,
        frame_prediction: float = 0.0,
        past_latents: Sequence[int] = (1, 2),
        self_conditioning: float = 0.9,
        joint_images: bool = False,
        low_res_tokenizer: str | None = None,
        low_res_max_time: float = 300.0,
        init_from: str | None = None,
        depth: int = 24,
        dim: int = 1024,
        num_heads: int = 16,
        mlp_dim: int | None = None,
        patch_size: int = 1,
        spatial_window: tuple[int, int] | None = None,
        spatiotemporal_window: tuple[int, int] | None = None,
        adaln_rank: int | None = 2,
        lora_on_first: bool = True,
        qk_norm: bool = True,
        full_attention: bool = False,
        normalise_latents: bool = True,
        process: Literal["diffusion", "rectified_flow"] = "diffusion",
        flow_shift: float = 1.0,
        zero_terminal_snr: bool = True,
        min_snr: float | None = None,
        optimizer: Literal["adamw", "adafactor"] = "adamw",
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        muon_lr: float = 0.0,
        weight_decay: float = 0.01,
        warmup_steps: int = 5000,
        lr_schedule: Literal["constant", "cosine"] = "cosine",
        statistics_clips: int = 1024,
        sampling: DiffusionSampling = DiffusionSampling(),
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, num_frames, resolution, downsample, None, seed, causal=True)
        if isinstance(sampling, dict):  # read from a checkpoint
            sampling = DiffusionSampling(**sampling)
        self.save_hyperparameters(ignore=["sampling"])
        self.save_hyperparameters({"sampling": asdict(sampling)})  # a checkpoint holds plain types
        self.sampling = sampling
        if width is not None:
            if width % downsample[2]:
                raise ValueError(f"width={width} is no multiple of the tokenizer's {downsample[2]} (--model.width).")
            self.latent_shape = (*self.latent_shape[:2], width // downsample[2])
        self.latent_dim = latent_dim
        self.unrounded = unrounded
        self.num_classes = num_classes
        self.class_conditional = num_classes > 0
        self.reads_text = text is not None
        self.text, self.text_dim, self.text_tokens, self.t5_weights = text, text_dim, text_tokens, t5_weights
        self.condition_dropout = condition_dropout
        self.frame_prediction = frame_prediction
        self.past_latents = tuple(past_latents)
        self.self_conditioning = self_conditioning
        self.joint_images = self.accepts_images = joint_images
        self.low_res_path = low_res_tokenizer
        self.low_res_max_time = low_res_max_time
        self.init_from = init_from
        self.normalise_latents = normalise_latents
        self.min_snr = min_snr
        self._check_arguments(process)
        self.network = WALT(
            latent_dim,
            self.latent_shape,
            dim,
            depth,
            num_heads,
            mlp_dim,
            patch_size,
            spatial_window,
            spatiotemporal_window,
            adaln_rank,
            lora_on_first,
            num_classes,
            text_dim if text else 0,
            text_tokens if text == "bytes" else 0,
            joint_images,
            frame_prediction > 0,
            self.enlarges,
            qk_norm,
            full_attention,
        )
        self.process: NoiseProcess = (
            Diffusion(zero_terminal_snr=zero_terminal_snr) if process == "diffusion" else RectifiedFlow(flow_shift)
        )
        # of each channel of the tokenizer's latents, measured when training begins; a std of 0 says: not yet
        for name in ("latent", "low_res") if self.enlarges else ("latent",):
            self.register_buffer(f"{name}_mean", torch.zeros(latent_dim))
            self.register_buffer(f"{name}_std", torch.zeros(latent_dim))

    @property
    def enlarges(self) -> bool:
        """Whether this is a super-resolution stage."""
        return self.low_res_path is not None

    @property
    def half_shape(self) -> tuple[int, int, int]:
        """Latents of the stage before."""
        t, h, w = self.latent_shape
        return t, h // 2, w // 2

    def _check_arguments(self, process: str) -> None:
        for name in ("condition_dropout", "frame_prediction", "self_conditioning"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share: from 0 to 1 (--model.{name}).")
        if self.frame_prediction and not all(0 < n < self.latent_shape[0] for n in self.past_latents):
            raise ValueError(
                f"past_latents={self.past_latents}: a clip of {self.latent_shape[0]} latent frames can be given 1 to "
                f"{self.latent_shape[0] - 1} of them (--model.past_latents)."
            )
        if self.frame_prediction and not self.past_latents:
            raise ValueError("frame_prediction needs to know how many latent frames are given (--model.past_latents).")
        if self.min_snr is not None and process != "diffusion":
            raise ValueError("min_snr weighs the levels of process=diffusion alone (--model.min_snr).")
        if self.enlarges and (self.latent_shape[1] % 2 or self.latent_shape[2] % 2):
            raise ValueError(
                f"A super-resolution stage doubles latents, which {self.latent_shape[1]} x {self.latent_shape[2]} are "
                "no double of (--data.resolution, --model.width)."
            )
        if not 0 <= self.low_res_max_time <= 999:
            raise ValueError(
                f"low_res_max_time={self.low_res_max_time} is a time: from 0 to 999 (--model.low_res_max_time)."
            )
        self._check_guidance(self.sampling)

    def _check_guidance(self, sampling: DiffusionSampling) -> None:
        """Guidance asks the network without its conditions, which it must have seen in training."""
        if not sampling.is_guided:
            return
        problem = None
        if (self.num_classes or self.reads_text) and self.condition_dropout == 0:
            kind = "text" if self.reads_text else "label"
            problem = f"was trained with its {kind} alone; set --model.condition_dropout above 0"
        elif self.frame_prediction == 1:
            problem = "was always given its first frames; set --model.frame_prediction below 1"
        elif not self.num_classes and not self.reads_text and not self.frame_prediction:
            problem = "has no condition to guide by"
        if problem:
            raise ValueError(
                f"guidance_scale={sampling.guidance_scale} needs a model without condition, but this one {problem}, "
                "or leave --model.sampling.guidance_scale at 1."
            )

    def load_tokenizer(self) -> None:
        """Load the frozen parts, once: the tokenizer, that of the stage before, and T5.

        Raises:
            FileNotFoundError: If there is none at the path given.
            ValueError: If a tokenizer is not continuous, or not of the geometry that this model is built for, or T5
                cannot be had.
        """
        if "tokenizer" in self.__dict__:
            return
        super().load_tokenizer()
        if self.low_res_path is not None:
            self._load_low_res_tokenizer(Path(self.low_res_path))
        if self.text == "t5":
            self.__dict__["text_encoder"] = T5TextEncoder(self.t5_weights, self.text_dim, self.text_tokens)

    def _load_low_res_tokenizer(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"No tokenizer of the stage before at {path} (--model.low_res_tokenizer).")
        tokenizer = load_tokenizer(path)
        if self.unrounded:
            tokenizer = tokenizer.unrounded()
        height, width = self._frame_size()
        fits = tokenizer.codebook_size is None and tokenizer.valid_frames(self.num_frames)
        shape = tuple(tokenizer.latent_shape(self.num_frames, height // 2, width // 2)) if fits else None
        if shape != self.half_shape:
            raise ValueError(
                f"The tokenizer of the stage before, {path}, makes {shape or 'no continuous'} latents of "
                f"{self.num_frames} frames of {height // 2} x {width // 2} pixels, and this stage doubles "
                f"{self.half_shape} (--model.low_res_tokenizer)."
            )
        self.__dict__["low_res_tokenizer"] = tokenizer
        self.low_res_digest = state_digest(tokenizer.state_dict())

    def setup(self, stage: str) -> None:
        """Load the frozen parts, and what a new run starts from."""
        super().setup(stage)
        if stage == "fit" and self.init_from is not None and self.trainer.ckpt_path is None:
            self.start_from(Path(self.init_from))

    def start_from(self, path: Path) -> None:
        """Take the weights of a model for another height and width, and its latents' statistics.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            ValueError: If it is of another model or tokenizer.
        """
        checkpoint = read_checkpoint(path)
        if checkpoint.get("tokenizer_digest") != self.tokenizer_digest:
            raise ValueError(
                f"{path} was not trained on the tokenizer at {self.tokenizer_path} (--model.init_from, "
                "--model.tokenizer)."
            )
        arguments = {name: value for name, value in checkpoint["hyper_parameters"].items() if name[0] != "_"}
        source = WALTModule(**arguments)
        load_state(source, checkpoint["state_dict"], path)
        load_state(self.network, resized_state(source.network, self.network), path)
        for name, buffer in self.named_buffers(recurse=False):
            if name.endswith(("_mean", "_std")):
                buffer.copy_(getattr(source, name))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name both tokenizers by their hashes."""
        super().on_save_checkpoint(checkpoint)
        if self.enlarges:
            checkpoint["low_res_tokenizer_digest"] = self.low_res_digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with other tokenizers than those that the weights were trained on."""
        super().on_load_checkpoint(checkpoint)
        if self.enlarges and checkpoint["low_res_tokenizer_digest"] != self.low_res_digest:
            raise ValueError(
                f"The checkpoint was trained to enlarge what another tokenizer than {self.low_res_path} makes. Give "
                "the one of its training (--model.low_res_tokenizer)."
            )

    def _frame_size(self) -> tuple[int, int]:
        return self.latent_shape[1] * self.downsample[1], self.latent_shape[2] * self.downsample[2]

    # Latents

    def encode_latents(self, video: Tensor, is_image: Tensor | None = None) -> Tensor:
        """Video `[B, 3, T, H, W]` in [-1, 1] to the tokenizer's latents `[B, D, t, h, w]`, not normalised, in float32.

        Args:
            video: Clips, or stacks of t images in their first t frames.
            is_image: `[B]` bool, rows that are stacks: each image is encoded by itself.
        """
        return self._encoded(self._placed_tokenizer(), self.tokenizer_path, video, is_image)

    def _encoded(self, tokenizer: VQGAN3D, path: str | None, video: Tensor, is_image: Tensor | None) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            video = video.float()
            if not self.joint_images or is_image is None:
                latents = tokenizer.encode(video).latents
            else:
                # the host waits for the sizes here: less than to encode every row both ways
                t, h, w = tokenizer.latent_shape(*video.shape[2:])
                latents = video.new_empty(len(video), self.latent_dim, t, h, w)
                if not is_image.all():
                    latents[~is_image] = tokenizer.encode(video[~is_image]).latents
                if is_image.any():
                    images = rearrange(video[is_image][:, :, :t], "b c t h w -> (b t) c 1 h w")
                    encoded = tokenizer.encode(images).latents
                    latents[is_image] = rearrange(encoded, "(b t) d 1 h w -> b d t h w", t=t)
        if latents.shape[1] != self.latent_dim:
            raise ValueError(
                f"The tokenizer at {path} has {latents.shape[1]} latent channels, the model expects {self.latent_dim} "
                "(--model.latent_dim)."
            )
        return latents

    def normalised(self, latents: Tensor) -> Tensor:
        """Shift and scale the channels of latents `[B, D, t, h, w]` to mean 0 and standard deviation 1."""
        return (latents - self.latent_mean.view(-1, 1, 1, 1)) / self.latent_std.view(-1, 1, 1, 1)

    def denormalised(self, latents: Tensor) -> Tensor:
        """Undo `normalised`."""
        return latents * self.latent_std.view(-1, 1, 1, 1) + self.latent_mean.view(-1, 1, 1, 1)

    @torch.no_grad()
    def batch_latents(self, batch: dict[str, Any]) -> Tensor:
        """Normalised latents `[B, D, t, h, w]` of a batch that holds `video`, or cached `latents`.

        Raises:
            ValueError: If the batch is a curriculum's, or its clips have another size.
        """
        return self.normalised(self._raw_latents(batch))

    def _raw_latents(self, batch: dict[str, Any]) -> Tensor:
        if "window_frames" in batch:
            raise ValueError("W.A.L.T trains on whole clips: leave --curriculum.schedule at `longest`.")
        if "latents" in batch:
            latents = batch["latents"].float()
        else:
            latents = self.encode_latents(batch["video"], batch.get("is_image"))
        if tuple(latents.shape[2:]) != self.latent_shape:
            raise ValueError(
                f"The batch has {tuple(latents.shape[2:])} latents, the model expects {self.latent_shape}: clips of "
                f"{self.num_frames} frames of {self._frame_size()[0]} x {self._frame_size()[1]} pixels "
                "(--data.num_frames, --data.resolution, --model.width)."
            )
        return latents

    @torch.no_grad()
    def low_res_latents(self, batch: dict[str, Any]) -> Tensor:
        """Latents `[B, D, t, h / 2, w / 2]` that a batch's clips have at half their size, not normalised.

        Raises:
            ValueError: If the batch holds no pixels.
        """
        low_res = batch.get("low_res")
        if low_res is None:
            if "video" not in batch:
                raise ValueError(
                    "A super-resolution stage trains from pixels: cached latents are those of one size (--data)."
                )
            low_res = F.avg_pool3d(batch["video"], (1, 2, 2))
        tokenizer = self.low_res_tokenizer.to(self.device)
        return self._encoded(tokenizer, self.low_res_path, low_res, batch.get("is_image"))

    def noisy_low_res(self, latents: Tensor, times: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """What a super-resolution stage is given: normalised latents with noise, and how much (noise augmentation).

        Args:
            latents: `[B, D, t, h / 2, w / 2]` of the stage before, not normalised.
            times: `[B]` noise levels, as times of the process.
            noise: Standard normal, of the latents' shape.
        """
        mean, std = self.low_res_mean.view(-1, 1, 1, 1), self.low_res_std.view(-1, 1, 1, 1)
        signal, sigma = (level.view(-1, 1, 1, 1, 1) for level in self.process.levels(times))
        return {"low_res": add_noise((latents - mean) / std, noise, (signal, sigma)), "low_res_times": times}

    def fit_latent_statistics(self, latents: Sequence[Tensor], name: Literal["latent", "low_res"] = "latent") -> None:
        """Measure mean and standard deviation of each channel, over all ranks, in float64.

        Args:
            latents: `[B, D, t, h, w]` each, not normalised; all the same number on all ranks.
            name: Whether they are the model's, or those of the stage before.

        Raises:
            ValueError: If a channel is constant, which could not be normalised.
        """
        flat = torch.cat([rearrange(part, "b d t h w -> d (b t h w)") for part in latents], dim=1).double()
        count = sum_over_ranks(flat.new_tensor(float(flat.shape[1])))
        mean = sum_over_ranks(flat.sum(1)) / count
        std = (sum_over_ranks((flat - mean[:, None]).square().sum(1)) / count).sqrt()
        self._set_statistics(name, mean, std)

    def _set_statistics(self, name: str, mean: Tensor, std: Tensor) -> None:
        if not (std > 0).all():
            constant = (std <= 0).nonzero().flatten().tolist()
            raise ValueError(f"Channels {constant} of the tokenizer's latents are constant: it is not trained.")
        if not self.normalise_latents:
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        getattr(self, f"{name}_mean").copy_(mean)
        getattr(self, f"{name}_std").copy_(std)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Have the latents' statistics, unless a checkpoint has brought them.

        They are those of the cache, if latents are cached, and measured on the first training batches otherwise.

        Raises:
            ValueError: If there is no data module to take batches from.
        """
        if (self.latent_std > 0).all():
            return
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise ValueError(
                "The latents' statistics are measured on a data module's batches: train with one, or call "
                "fit_latent_statistics(latents) first."
            )
        parts: list[Tensor] = []
        low_res: list[Tensor] = []
        for batch in data.train_dataloader():  # a loader of its own: training's order is as without
            if "latents" in batch and hasattr(data, "latent_statistics"):
                self._set_statistics("latent", *data.latent_statistics())
                return
            batch = data.on_after_batch_transfer(self.transfer_batch_to_device(batch, self.device, 0), 0)
            parts.append(self._raw_latents(batch))
            if self.enlarges:
                low_res.append(self.low_res_latents(batch))
            if sum(map(len, parts)) * self.trainer.world_size >= self.hparams["statistics_clips"]:
                break
        self.fit_latent_statistics(parts)
        if self.enlarges:
            self.fit_latent_statistics(low_res, "low_res")

    # Text

    def text_vectors(self, texts: Sequence[str] | Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Encode a text for each video, or one for each image of a stack.

        Args:
            texts: B strings, or B lists of t.

        Returns:
            `text` `[B, (t,) S, E]` and `text_mask` `[B, (t,) S]`, True for tokens that are no padding.
        """
        flat = [text for row in texts for text in ([row] if isinstance(row, str) else row)]
        different = {text: i for i, text in enumerate(dict.fromkeys(flat))}  # a video's text comes t times
        encoder = self.network.text_encoder if self.text == "bytes" else self.text_encoder.to(self.device)
        vectors, mask = encoder(list(different))
        rows = torch.tensor([different[text] for text in flat], device=vectors.device)
        vectors, mask = vectors[rows], mask[rows]
        if texts and not isinstance(texts[0], str):
            vectors, mask = (x.unflatten(0, (len(texts), -1)) for x in (vectors, mask))
        return {"text": vectors, "text_mask": mask}

    def _text(self, batch: dict[str, Any], is_dropped: Tensor | None = None) -> dict[str, Tensor]:
        """Of a batch; what is dropped has no token."""
        if not self.reads_text:
            return {}
        texts = batch["frame_text"] if self.joint_images and "frame_text" in batch else batch.get("text")
        if texts is None:
            raise ValueError(
                "This model reads text, and the batches hold none: give data with captions, such as "
                "CaptionedDataModule, or --data.captions=true for moving shapes."
            )
        given = self.text_vectors(texts)
        if is_dropped is not None:
            mask = given["text_mask"]
            given["text_mask"] = mask & ~is_dropped.view(-1, *(1,) * (mask.ndim - 1))
        return given

    # Training

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer asked for.

        Raises:
            ValueError: if two are.
        """
        if self.hparams["optimizer"] == "adamw":
            return super().make_optimizer(groups)
        if self.hparams["muon_lr"] > 0:
            raise ValueError("Muon takes AdamW beside it: optimizer=adafactor goes with --model.muon_lr=0.")
        # torch scales each step by the weights' root mean square, or by the second epsilon where that is larger: by 1,
        # so that gates and heads, which begin at zero, learn
        return Adafactor(groups, lr=self.hparams["lr"], eps=(None, 1.0))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Predict the velocity of latents at random noise levels, some without their conditions."""
        if batch_idx == 0 and (label := self._label(batch)) is not None:  # once an epoch: it waits for the device
            self.check_labels(label)
        latents = self.batch_latents(batch)
        generator = self.step_generator(DIFFUSION_STREAM, batch_idx, device=self.device)

        def drawn(draw: Any, *shape: int) -> Tensor:
            """Random numbers for this rank's rows."""
            return self.sliced_by_rank(
                lambda size: draw(size, *shape, device=self.device, generator=generator), len(latents)
            )

        uniform, noise = drawn(torch.rand, 5), drawn(torch.randn, *latents.shape[1:])
        times = self.process.times(uniform[:, 0])
        is_dropped = uniform[:, 1] < self.condition_dropout
        conditions = self._text(batch, is_dropped)
        if self.enlarges:
            low_res = self.low_res_latents(batch)
            low_res_times = (uniform[:, 4] * (self.low_res_max_time + 1)).floor()
            conditions |= self.noisy_low_res(low_res, low_res_times, drawn(torch.randn, *low_res.shape[1:]))
        # one coin for all samples and ranks, from the host: nobody waits for it, and no rank runs alone
        twice = torch.rand((), generator=self.step_generator(SELF_CONDITIONING_STREAM, batch_idx)).item()
        errors = self.squared_errors(
            latents,
            noise,
            times,
            twice=twice < self.self_conditioning,
            label=self._label(batch, is_dropped),
            past=self._random_past(latents, uniform[:, 2], uniform[:, 3], batch.get("is_image")),
            is_image=batch.get("is_image"),
            **conditions,
        )
        loss = errors.mean()
        if self.min_snr is not None:
            # pure noise keeps a little weight: every sample begins there
            loss = (min_snr_weight(self.process.levels(times)[0], self.min_snr, floor=0.01) * errors).mean()
        self.tokens_per_batch = len(latents) * self.network.num_tokens
        self.log("train/loss", loss, prog_bar=True)
        if self.min_snr is not None:
            self.log("train/mse", errors.detach().mean())
        return loss

    def squared_errors(
        self, latents: Tensor, noise: Tensor, times: Tensor, twice: bool = False, **conditions: Tensor | None
    ) -> Tensor:
        """Mean squared error of each sample's velocity.

        Args:
            latents: `[B, D, t, h, w]`, normalised.
            noise: The same shape, standard normal.
            times: `[B]`.
            twice: Whether the network first makes an estimate of the clean latents, without gradient, and is given it.
            conditions: The network's other arguments.

        Returns:
            `[B]`.
        """
        signal, sigma = self.process.levels(times)
        levels = (signal.view(-1, 1, 1, 1, 1), sigma.view(-1, 1, 1, 1, 1))
        noisy = add_noise(latents, noise, levels)
        predict = partial(self.network, noisy, times, **conditions)
        estimate = None
        if twice:
            # the network itself, not what DDP wraps: this pass has no gradient to share
            with torch.no_grad():
                estimate = self.process.clean(noisy, predict().float(), levels)
        errors = predict(estimate).float() - self.process.velocity(latents, noise, levels)
        return errors.square().mean((1, 2, 3, 4))

    def _label(self, batch: dict[str, Any], is_dropped: Tensor | None = None) -> Tensor | None:
        """`[B]`, or `[B, t]` where images have one each; `num_classes` where dropped."""
        if not self.num_classes:
            return None
        label = batch["frame_label"] if self.joint_images and "frame_label" in batch else batch["label"]
        if is_dropped is None:
            return label
        return label.masked_fill(is_dropped.view(-1, *(1,) * (label.ndim - 1)), self.num_classes)

    def past_channels(self, latents: Tensor, count: Tensor) -> Tensor:
        """The frame condition: known latents, and the mask that says which are (W.A.L.T, section 3.4).

        Args:
            latents: `[B, D, t, h, w]`, clean (the paper prints the symbol of noisy ones; a sampler has clean ones).
            count: `[B]` number of first latent frames that are known; 0 for none.

        Returns:
            `[B, D + 1, t, h, w]`, zero where nothing is known.
        """
        is_known = torch.arange(latents.shape[2], device=latents.device) < count[:, None]  # [B, t]
        mask = is_known[:, None, :, None, None].to(latents.dtype)
        return torch.cat([latents * mask, mask.expand_as(latents[:, :1])], dim=1)

    def _random_past(self, latents: Tensor, coin: Tensor, choice: Tensor, is_image: Tensor | None) -> Tensor | None:
        """Frame condition of a training batch from two uniform numbers a sample."""
        if not self.frame_prediction:
            return None
        counts = torch.tensor(self.past_latents, device=latents.device)
        count = counts[(choice * len(counts)).long().clamp(max=len(counts) - 1)]
        count = count.masked_fill(coin >= self.frame_prediction, 0)
        if is_image is not None:
            count = count.masked_fill(is_image, 0)
        return self.past_channels(latents, count)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Squared error at fixed noise levels and with the same noise each time.

        Conditions are given: label, text, the low resolution with as much noise as in sampling, and the most past
        frames if the model is always given some. Without self-conditioning.
        """
        latents = self.batch_latents(batch)
        generator = keyed_generator(self.seed, batch_idx, VALIDATION_STREAM, device=self.device)
        noise = self.sliced_by_rank(
            lambda size: torch.randn(size, *latents.shape[1:], device=self.device, generator=generator), len(latents)
        )
        conditions = self._text(batch)
        if self.frame_prediction == 1:
            count = torch.full((len(latents),), max(self.past_latents), device=self.device)
            conditions["past"] = self.past_channels(latents, count)
        if self.enlarges:
            low_res = self.low_res_latents(batch)
            low_noise = self.sliced_by_rank(
                lambda size: torch.randn(size, *low_res.shape[1:], device=self.device, generator=generator),
                len(latents),
            )
            low_times = torch.full((len(latents),), self.sampling.low_res_time, device=self.device)
            conditions |= self.noisy_low_res(low_res, low_times, low_noise)
        label, is_image = self._label(batch), batch.get("is_image")
        total = torch.zeros((), device=self.device)
        for level in VALIDATION_LEVELS:
            times = self.process.times(torch.full((len(latents),), level, device=self.device))
            error = self.squared_errors(
                latents, noise, times, twice=False, label=label, is_image=is_image, **conditions
            ).mean()
            total += error / len(VALIDATION_LEVELS)
            self.log(f"val/loss_{level:.1f}", error, batch_size=len(latents), sync_dist=True)
        self.log("val/loss", total, batch_size=len(latents), sync_dist=True, prog_bar=True)

    # Generation

    @torch.no_grad()
    def generate_latents(
        self,
        seeds: Tensor,
        given: dict[str, Tensor] | None = None,
        past: Tensor | None = None,
        low_res: Tensor | None = None,
        sampling: DiffusionSampling | None = None,
        part: int = 0,
    ) -> Tensor:
        """Generate one clip's latents.

        Args:
            seeds: `[B]` int64.
            given: `label` `[B]`, `text` and `text_mask`, as for the network: what guidance weighs, with `past`.
            past: `[B, D, t', h, w]` normalised latents that the clip begins with.
            low_res: `[B, D, t, h / 2, w / 2]` latents of the stage before, not normalised.
            sampling: Settings; None takes the module's.
            part: Number of the clip in a longer video: each has its own noise.

        Returns:
            `[B, D, t, h, w]`, normalised.
        """
        settings = sampling or self.sampling
        self._check_guidance(settings)
        if not (self.latent_std > 0).all():
            raise ValueError("This model knows no statistics of its latents: it was not trained. Give its checkpoint.")
        shape = (self.latent_dim, *self.latent_shape)
        draw = self._draws(seeds, NOISE_STREAM, part, shape)
        conditions, null = dict(given or {}), {}
        if past is not None:
            clip = torch.zeros(len(seeds), *shape, device=self.device)
            clip[:, :, : past.shape[2]] = past
            conditions["past"] = self.past_channels(clip, torch.full((len(seeds),), past.shape[2], device=self.device))
        if "text" in conditions:
            null = {"text": conditions["text"], "text_mask": torch.zeros_like(conditions["text_mask"])}
        if low_res is not None:
            times = torch.full((len(seeds),), settings.low_res_time, device=self.device)
            noise = self._draws(seeds, LOW_RES_STREAM, part, low_res.shape[1:])()
            given_anyway = self.noisy_low_res(low_res, times, noise)
            conditions, null = conditions | given_anyway, null | given_anyway

        def predict(noisy: Tensor, times: Tensor, estimate: Tensor, conditional: bool) -> Tensor:
            return self.network(noisy, times, estimate, **(conditions if conditional else null)).float()

        return sample(self.process, predict, draw, settings)

    def _draws(self, seeds: Tensor, stream: int, part: int, shape: Sequence[int]) -> Callable[[], Tensor]:
        """A function that draws normal numbers `[B, *shape]`, each row from its seed."""
        generators = [keyed_generator(seed, stream, part, device=self.device) for seed in seeds.tolist()]
        return lambda: torch.stack([torch.randn(*shape, device=self.device, generator=each) for each in generators])

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Normalised latents `[B, D, t, h, w]` to video `[B, 3, T, H, W]` in [-1, 1], in float32."""
        return self._decoded(self.denormalised(latents.float()))

    def _decoded(self, latents: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self._placed_tokenizer().decode(latents.float())

    @property
    def _context_frames(self) -> int:
        """Pixel frames that an extension is given: five, which are two latent frames."""
        return 1 + self.downsample[0]

    @property
    def _extends(self) -> bool:
        """Whether the model was trained to go on from two latent frames."""
        return self.frame_prediction > 0 and 2 in self.past_latents

    @property
    def new_frames(self) -> int:
        """Pixel frames that each extension of a long video adds: 12 of 17, since the last 5 are given."""
        return self.num_frames - 1 - self.downsample[0]

    def generate(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: DiffusionSampling | None = None
    ) -> Tensor:
        """Generate videos; longer ones by encoding the last five frames again and going on (appendix A).

        Args:
            condition: `label` `[B]` for a model with classes; without, each sample draws one from its seed. `video`
                `[B, 3, T', H, W]` for a model that predicts frames: T' = 1 + k downsample[0] first frames. `text` and
                `low_res` of `WALTCondition` for a model that reads text, and for a super-resolution stage.
            num_frames: Pixel frames: those of the training clips, and `new_frames` more for each extension.
            seeds: `[B]` int64; sample i depends on seed i and its condition alone.
            sampling: Settings; None takes the module's.

        Returns:
            `[B, 3, T, H, W]` in [-1, 1].

        Raises:
            ValueError: If the condition or the length does not fit the model.
        """
        return self.joined(self.generate_clips(condition, num_frames, seeds, sampling))

    @torch.no_grad()
    def generate_clips(
        self,
        condition: Condition,
        num_frames: int,
        seeds: Tensor,
        sampling: DiffusionSampling | None = None,
        low_res: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Generate the clips that make up a video: what the next stage of a cascade enlarges.

        Args:
            condition: As for `generate`.
            num_frames: As for `generate`.
            seeds: As for `generate`.
            sampling: As for `generate`.
            low_res: The clips of the stage before, as its `generate_clips` gives them.

        Returns:
            Latents `[B, D, t, h, w]` of each clip as the tokenizer has them, not normalised.
        """
        asked = condition if isinstance(condition, WALTCondition) else WALTCondition(**vars(condition))
        extensions = self._extensions(num_frames)
        given = self._checked_text(asked.text)
        if (label := self._checked_label(asked.label, seeds)) is not None:
            given["label"] = label
        low_res = self._checked_low_res(asked.low_res, low_res, extensions)
        first_frames = condition.first_frames()
        past = None if first_frames is None else self._checked_past(first_frames)
        if past is None and self.frame_prediction == 1:
            raise ValueError(
                "This model continues videos and was never trained without their first frames: give "
                "Condition(video=...), or --task=frame_prediction to the command `sample`."
            )
        clips: list[Tensor] = []
        for part in range(extensions + 1):
            if part > 0 and self._extends:
                frames = self._decoded(clips[-1])[:, :, -self._context_frames :]
                past = self.normalised(self.encode_latents(frames))
            enlarged = low_res[part] if low_res else None
            clips.append(self.denormalised(self.generate_latents(seeds, given, past, enlarged, sampling, part)))
        return clips

    def joined(self, clips: Sequence[Tensor]) -> Tensor:
        """Decode the clips of `generate_clips` to one video `[B, 3, T, H, W]`; after the first, what is new of each."""
        first, *more = map(self._decoded, clips)
        return torch.cat([first, *(clip[:, :, self._context_frames :] for clip in more)], dim=2)

    def _extensions(self, num_frames: int) -> int:
        """How often a clip must be extended to so many frames."""
        more = num_frames - self.num_frames
        if more == 0:
            return 0
        if not self._extends and not self.enlarges:  # a stage that enlarges may do so clip by clip
            raise ValueError(
                f"num_frames={num_frames} cannot be generated: this model makes clips of {self.num_frames} frames. "
                "Only one trained with --model.frame_prediction and 2 in --model.past_latents extends them."
            )
        if more < 0 or more % self.new_frames:
            lower = self.num_frames + max(0, more) // self.new_frames * self.new_frames
            raise ValueError(
                f"num_frames={num_frames} cannot be generated: {self.num_frames} frames, and {self.new_frames} more "
                f"for each extension. Nearest: {lower} or {lower + self.new_frames} (--num_frames)."
            )
        return more // self.new_frames

    def _checked_label(self, label: Tensor | None, seeds: Tensor) -> Tensor | None:
        if not self.num_classes:
            if label is not None:
                raise ValueError("This model has no classes: generate it without a label.")
            return None
        if label is None:
            draws = [
                torch.randint(self.num_classes, (), generator=keyed_generator(seed, LABEL_STREAM))
                for seed in seeds.tolist()
            ]
            label = torch.stack(draws)
        return label.to(self.device)

    def _checked_text(self, text: Sequence[str] | None) -> dict[str, Tensor]:
        if text is None and not self.reads_text:
            return {}
        if text is None or not self.reads_text:
            problem = "reads text: give a prompt" if self.reads_text else "reads no text: generate it without a prompt"
            raise ValueError(f"This model {problem} (--text).")
        return self.text_vectors(text)

    def _checked_low_res(
        self, video: Tensor | None, clips: Sequence[Tensor] | None, extensions: int
    ) -> Sequence[Tensor] | None:
        """The clips to enlarge, as latents."""
        if not self.enlarges:
            if video is not None or clips is not None:
                raise ValueError(
                    "This model enlarges nothing: generate it without low_res (--model.low_res_tokenizer)."
                )
            return None
        if video is not None:
            clips = [self.low_res_latents({"low_res": video.to(self.device)})]
        if clips is None:
            raise ValueError(
                "This model enlarges videos: give WALTCondition(low_res=...), or the clips of the stage before. "
                "`longtake cascade` runs the stages one after the other."
            )
        shapes = {tuple(clip.shape[2:]) for clip in clips}
        if len(clips) != extensions + 1 or shapes != {self.half_shape}:
            raise ValueError(
                f"This stage enlarges {extensions + 1} clips of {self.half_shape} latents to so many frames, and got "
                f"{len(clips)} of {', '.join(map(str, sorted(shapes)))}."
            )
        return clips

    def _checked_past(self, past: Tensor) -> Tensor:
        """Known frames as normalised latents."""
        if not self.frame_prediction:
            raise ValueError("This model predicts no frames: generate it without a video (--model.frame_prediction).")
        fits = [1 + self.downsample[0] * (n - 1) for n in self.past_latents]
        if past.shape[2] not in fits:
            raise ValueError(f"{past.shape[2]} frames are known; this model was trained with {sorted(fits)}.")
        return self.normalised(self.encode_latents(past.to(self.device)))

    def checked_task(self, task: str | None, label: int | None = None) -> str | None:
        """Return the task to generate for: one of `TASKS` that the model was trained for, or None for whole clips.

        Raises:
            ValueError: If the model has no such task, or a label is given that is no class of it.
        """
        if label is not None and not 0 <= label < self.num_classes:
            raise ValueError(f"label={label}: this model has {self.num_classes} classes, from 0 on (--label).")
        known = [name for name, count in TASKS.items() if self.frame_prediction and count in self.past_latents]
        if task is None:
            return known[-1] if self.frame_prediction == 1 and known else None
        if task not in known:
            raise ValueError(f"task={task} is none of this model's (--task): {', '.join(known) or 'it has none'}.")
        return task

    def needs_clips(self, task: str | None) -> bool:
        """Whether frames are given, or a low resolution."""
        return self.enlarges or task is not None

    def _condition(self, batch: dict[str, Any], rows: int, task: str | None) -> WALTCondition:
        """What a batch says of its first rows."""
        past = low_res = None
        if task is not None:
            video = batch["video"] if "video" in batch else self.decode_latents(self.batch_latents(batch))
            past = video[:rows, :, : 1 + self.downsample[0] * (TASKS[task] - 1)]
        if self.enlarges:
            low_res = batch["low_res"] if "low_res" in batch else F.avg_pool3d(batch["video"], (1, 2, 2))
            low_res = low_res[:rows]
        return WALTCondition(
            label=batch["label"][:rows] if self.num_classes and "label" in batch else None,
            video=past,
            text=batch["text"][:rows] if self.reads_text else None,
            low_res=low_res,
        )

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Generate the videos of the seeds in the batch."""
        condition = self._condition(batch, len(batch["seeds"]), batch["task"])
        return {"seeds": batch["seeds"], "pieces": self.iter_generate(condition, batch["num_frames"], batch["seeds"])}

    def sample_videos(self, batch: dict[str, Any], seeds: Tensor) -> Tensor:
        """Videos for a callback to show, with the batch's conditions; its first frames too, if the model needs them."""
        task = self.checked_task(None)
        return self.generate(self._condition(batch, len(seeds), task), self.num_frames, seeds)
