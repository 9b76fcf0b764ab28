"""W.A.L.T's second stage: diffusion of a causal tokenizer's latents by a window-attention transformer (ECCV 2024)."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

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
from models.priors.walt import WALT
from models.random import keyed_generator

# Streams of random numbers within one training step, besides those of the generator's file; and within a sample.
DIFFUSION_STREAM, SELF_CONDITIONING_STREAM = 11, 12
LABEL_STREAM, NOISE_STREAM = 13, 14

# Quantiles of the process's times: from nearly clean to pure noise.
VALIDATION_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.9999)


class WALTModule(VideoGenerator):
    """Trains and samples W.A.L.T. The defaults are W.A.L.T-L on UCF-101; what the paper leaves open is our choice.

    Args:
        tokenizer: Path of the frozen causal tokenizer with continuous latents: a bundle made by `longtake export`, or a
            checkpoint.
        num_frames: Pixel frames of a clip, 1 + k downsample[0]; 1 for images (linked to data.num_frames).
        resolution: Height and width of the video (linked to data.resolution).
        downsample: Pixel frames, rows and columns that one latent covers.
        latent_dim: Channels of the tokenizer's latents.
        num_classes: Classes; 0 trains without labels.
        label_dropout: Share of samples trained without their label, which guidance needs (our choice).
        frame_prediction: Share of samples that are given their first frames (p_fp; the paper does not say).
        past_latents: How many first latent frames are given, one of these with equal chances (our choice).
        self_conditioning: Share of steps in which the network first makes the estimate that it is given (p_sc).
        joint_images: Whether batches hold stacks of images besides videos, told apart by `is_image`.
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
        process: `diffusion` as in the paper, or `rectified_flow`.
        flow_shift: Shift of the rectified flow's times towards noise.
        zero_terminal_snr: Whether the last level of the diffusion is pure noise.
        min_snr: Cap of min-SNR loss weights; null weighs all levels alike, as the paper does.
        lr: Learning rate, as given: not rescaled by GPUs or batch size.
        betas: AdamW's betas (our choice).
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

    def __init__(
        self,
        tokenizer: str,
        num_frames: int,
        resolution: int,
        downsample: tuple[int, int, int] = (4, 8, 8),
        latent_dim: int = 8,
        num_classes: int = 0,
        label_dropout: float = 0.1,
        frame_prediction: float = 0.0,
        past_latents: Sequence[int] = (1, 2),
        self_conditioning: float = 0.9,
        joint_images: bool = False,
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
        process: Literal["diffusion", "rectified_flow"] = "diffusion",
        flow_shift: float = 1.0,
        zero_terminal_snr: bool = True,
        min_snr: float | None = None,
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.99),
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
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.frame_prediction = frame_prediction
        self.past_latents = tuple(past_latents)
        self.self_conditioning = self_conditioning
        self.joint_images = joint_images
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
            joint_images=joint_images,
            has_past=frame_prediction > 0,
            qk_norm=qk_norm,
        )
        self.process: NoiseProcess = (
            Diffusion(zero_terminal_snr=zero_terminal_snr) if process == "diffusion" else RectifiedFlow(flow_shift)
        )
        # of each channel of the tokenizer's latents, measured when training begins; a std of 0 says: not yet
        self.register_buffer("latent_mean", torch.zeros(latent_dim))
        self.register_buffer("latent_std", torch.zeros(latent_dim))

    def _check_arguments(self, process: str) -> None:
        for name in ("label_dropout", "frame_prediction", "self_conditioning"):
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
        self._check_guidance(self.sampling)

    def _check_guidance(self, sampling: DiffusionSampling) -> None:
        """Guidance asks the network without its conditions, which it must have seen in training."""
        if not sampling.is_guided:
            return
        problem = None
        if self.num_classes and self.label_dropout == 0:
            problem = "was trained with its label alone; set --model.label_dropout above 0"
        elif self.frame_prediction == 1:
            problem = "was always given its first frames; set --model.frame_prediction below 1"
        elif not self.num_classes and not self.frame_prediction:
            problem = "has no condition to guide by"
        if problem:
            raise ValueError(
                f"guidance_scale={sampling.guidance_scale} needs a model without condition, but this one {problem}, "
                "or leave --model.sampling.guidance_scale at 1."
            )

    def load_tokenizer(self) -> None:
        """Load the frozen tokenizer, once.

        Raises:
            FileNotFoundError: If there is none at the path given.
            ValueError: If it is not continuous, or not of the geometry that this model is built for.
        """
        super().load_tokenizer()
        shape = tuple(self.tokenizer.latent_shape(self.num_frames, *self._frame_size()))
        if shape != self.latent_shape:
            raise ValueError(
                f"The tokenizer at {self.tokenizer_path} makes {shape} latents of {self.num_frames} frames, the model "
                f"expects {self.latent_shape}: it is not causal. Give one that is (--model.tokenizer)."
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
        tokenizer = self._placed_tokenizer()
        with torch.autocast(self.device.type, enabled=False):
            video = video.float()
            if not self.joint_images or is_image is None:
                latents = tokenizer.encode(video).latents
            else:
                # the host waits for the sizes here: less than to encode every row both ways
                t, h, w = self.latent_shape
                latents = video.new_empty(len(video), self.latent_dim, t, h, w)
                if not is_image.all():
                    latents[~is_image] = tokenizer.encode(video[~is_image]).latents
                if is_image.any():
                    images = rearrange(video[is_image][:, :, :t], "b c t h w -> (b t) c 1 h w")
                    encoded = tokenizer.encode(images).latents
                    latents[is_image] = rearrange(encoded, "(b t) d 1 h w -> b d t h w", t=t)
        if latents.shape[1] != self.latent_dim:
            raise ValueError(
                f"The tokenizer at {self.tokenizer_path} has {latents.shape[1]} latent channels, the model expects "
                f"{self.latent_dim} (--model.latent_dim)."
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
            ValueError: If the batch is a curriculum's.
        """
        return self.normalised(self._raw_latents(batch))

    def _raw_latents(self, batch: dict[str, Any]) -> Tensor:
        if "window_frames" in batch:
            raise ValueError("W.A.L.T trains on whole clips: leave --curriculum.schedule at `longest`.")
        if "latents" in batch:
            return batch["latents"].float()
        return self.encode_latents(batch["video"], batch.get("is_image"))

    def fit_latent_statistics(self, latents: Sequence[Tensor]) -> None:
        """Measure mean and standard deviation of each channel, over all ranks, in float64.

        Args:
            latents: `[B, D, t, h, w]` each, not normalised; all the same number on all ranks.

        Raises:
            ValueError: If a channel is constant, which could not be normalised.
        """
        flat = torch.cat([rearrange(part, "b d t h w -> d (b t h w)") for part in latents], dim=1).double()
        count = sum_over_ranks(flat.new_tensor(float(flat.shape[1])))
        mean = sum_over_ranks(flat.sum(1)) / count
        std = (sum_over_ranks((flat - mean[:, None]).square().sum(1)) / count).sqrt()
        if not (std > 0).all():
            constant = (std <= 0).nonzero().flatten().tolist()
            raise ValueError(f"Channels {constant} of the tokenizer's latents are constant: it is not trained.")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Measure the latents' statistics on the first training batches, unless a checkpoint has brought them.

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
        for batch in data.train_dataloader():  # a loader of its own: training's order is as without
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            parts.append(self._raw_latents(batch))
            if sum(map(len, parts)) * self.trainer.world_size >= self.hparams["statistics_clips"]:
                break
        self.fit_latent_statistics(parts)

    # Training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Predict the velocity of latents at random noise levels, some without their conditions."""
        latents = self.batch_latents(batch)
        generator = self.step_generator(DIFFUSION_STREAM, batch_idx, device=self.device)
        uniform, noise = (
            self.sliced_by_rank(
                lambda size, draw=draw, shape=shape: draw(size, *shape, device=self.device, generator=generator),
                len(latents),
            )
            for draw, shape in ((torch.rand, (4,)), (torch.randn, latents.shape[1:]))
        )
        times = self.process.times(uniform[:, 0])
        # one coin for all samples and ranks, from the host: nobody waits for it, and no rank runs alone
        twice = torch.rand((), generator=self.step_generator(SELF_CONDITIONING_STREAM, batch_idx)).item()
        errors = self.squared_errors(
            latents,
            noise,
            times,
            label=self._label(batch, is_dropped=uniform[:, 1] < self.label_dropout),
            past=self._random_past(latents, uniform[:, 2], uniform[:, 3], batch.get("is_image")),
            is_image=batch.get("is_image"),
            twice=twice < self.self_conditioning,
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
        self,
        latents: Tensor,
        noise: Tensor,
        times: Tensor,
        label: Tensor | None = None,
        past: Tensor | None = None,
        is_image: Tensor | None = None,
        twice: bool = False,
    ) -> Tensor:
        """Mean squared error of each sample's velocity.

        Args:
            latents: `[B, D, t, h, w]`, normalised.
            noise: The same shape, standard normal.
            times: `[B]`.
            label: `[B]` or `[B, t]`, with `num_classes` for none.
            past: `[B, D + 1, t, h, w]` known latents and their mask.
            is_image: `[B]` bool, rows that are stacks of images.
            twice: Whether the network first makes an estimate of the clean latents, without gradient, and is given it.

        Returns:
            `[B]`.
        """
        signal, sigma = self.process.levels(times)
        levels = (signal.view(-1, 1, 1, 1, 1), sigma.view(-1, 1, 1, 1, 1))
        noisy = add_noise(latents, noise, levels)
        predict = partial(self.network, noisy, times, label=label, past=past, is_image=is_image)
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

        Conditions are given: the label, and the most past frames if the model is always given some. Without
        self-conditioning.
        """
        latents = self.batch_latents(batch)
        generator = keyed_generator(self.seed, batch_idx, VALIDATION_STREAM, device=self.device)
        noise = self.sliced_by_rank(
            lambda size: torch.randn(size, *latents.shape[1:], device=self.device, generator=generator), len(latents)
        )
        past = None
        if self.frame_prediction == 1:
            past = self.past_channels(latents, torch.full((len(latents),), max(self.past_latents), device=self.device))
        total = torch.zeros((), device=self.device)
        for level in VALIDATION_LEVELS:
            times = self.process.times(torch.full((len(latents),), level, device=self.device))
            error = self.squared_errors(latents, noise, times, self._label(batch), past, batch.get("is_image")).mean()
            total += error / len(VALIDATION_LEVELS)
            self.log(f"val/loss_{level:.1f}", error, batch_size=len(latents), sync_dist=True)
        self.log("val/loss", total, batch_size=len(latents), sync_dist=True, prog_bar=True)

    # Generation

    @torch.no_grad()
    def generate_latents(
        self,
        seeds: Tensor,
        label: Tensor | None = None,
        past: Tensor | None = None,
        sampling: DiffusionSampling | None = None,
        part: int = 0,
    ) -> Tensor:
        """Generate one clip's latents.

        Args:
            seeds: `[B]` int64.
            label: `[B]` int64, with `num_classes` for none.
            past: `[B, D, t', h, w]` normalised latents that the clip begins with.
            sampling: Settings; None takes the module's.
            part: Number of the clip in a longer video: each has its own noise.

        Returns:
            `[B, D, t, h, w]`, normalised.
        """
        settings = sampling or self.sampling
        self._check_guidance(settings)
        if not (self.latent_std > 0).all():
            raise ValueError("This model knows no statistics of its latents: it was not trained. Give its checkpoint.")
        generators = [keyed_generator(seed, NOISE_STREAM, part, device=self.device) for seed in seeds.tolist()]
        shape = (self.latent_dim, *self.latent_shape)

        def draw() -> Tensor:
            return torch.stack([torch.randn(shape, device=self.device, generator=each) for each in generators])

        known = None
        if past is not None:
            clip = torch.zeros(len(seeds), *shape, device=self.device)
            clip[:, :, : past.shape[2]] = past
            known = self.past_channels(clip, torch.full((len(seeds),), past.shape[2], device=self.device))

        def predict(noisy: Tensor, times: Tensor, estimate: Tensor, conditional: bool) -> Tensor:
            given = {"label": label, "past": known} if conditional else {}
            return self.network(noisy, times, estimate, **given).float()

        return sample(self.process, predict, draw, settings)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Normalised latents `[B, D, t, h, w]` to video `[B, 3, T, H, W]` in [-1, 1], in float32."""
        with torch.autocast(self.device.type, enabled=False):
            return self._placed_tokenizer().decode(self.denormalised(latents.float()))

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
                `[B, 3, T', H, W]` for a model that predicts frames: T' = 1 + k downsample[0] first frames.
            num_frames: Pixel frames: those of the training clips, and `new_frames` more for each extension.
            seeds: `[B]` int64; sample i depends on seed i and its condition alone.
            sampling: Settings; None takes the module's.

        Returns:
            `[B, 3, T, H, W]` in [-1, 1].

        Raises:
            ValueError: If the condition or the length does not fit the model.
        """
        extensions = self._extensions(num_frames)
        label = self._checked_label(condition.label, seeds)
        first_frames = condition.first_frames()
        past = None if first_frames is None else self._checked_past(first_frames)
        if past is None and self.frame_prediction == 1:
            raise ValueError(
                "This model continues videos and was never trained without their first frames: give "
                "Condition(video=...). The command `sample` has none to give."
            )
        video = self.decode_latents(self.generate_latents(seeds, label, past, sampling))
        context = 1 + self.downsample[0]
        for part in range(1, extensions + 1):
            past = self.normalised(self.encode_latents(video[:, :, -context:]))
            clip = self.decode_latents(self.generate_latents(seeds, label, past, sampling, part))
            video = torch.cat([video, clip[:, :, context:]], dim=2)
        return video

    def _extensions(self, num_frames: int) -> int:
        """How often a clip must be extended to so many frames."""
        can_extend = self.frame_prediction > 0 and 2 in self.past_latents
        more = num_frames - self.num_frames
        if more == 0:
            return 0
        if not can_extend:
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

    def _checked_past(self, past: Tensor) -> Tensor:
        """Known frames as normalised latents."""
        if not self.frame_prediction:
            raise ValueError("This model predicts no frames: generate it without a video (--model.frame_prediction).")
        fits = [1 + self.downsample[0] * (n - 1) for n in self.past_latents]
        if past.shape[2] not in fits:
            raise ValueError(f"{past.shape[2]} frames are known; this model was trained with {sorted(fits)}.")
        return self.normalised(self.encode_latents(past.to(self.device)))

    def sample_videos(self, batch: dict[str, Any], seeds: Tensor) -> Tensor:
        """Videos for a callback to show, with the batch's labels; its first frames too, if the model must have them."""
        rows = len(seeds)
        past = None
        if self.frame_prediction == 1:
            frames = 1 + self.downsample[0] * (max(self.past_latents) - 1)
            video = batch["video"] if "video" in batch else self.decode_latents(self.batch_latents(batch))
            past = video[:rows, :, :frames]
        label = batch["label"][:rows] if self.num_classes else None
        return self.generate(Condition(label, video=past), self.num_frames, seeds)
