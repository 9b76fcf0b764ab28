"""MeBT's second stage: masked-token modelling of long videos, on windows that a curriculum lets grow (CVPR 2023)."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.generator import (
    MASK_ORDER_STREAM,
    MASK_RATIO_STREAM,
    VALIDATION_STREAM,
    Condition,
    VideoGenerator,
)
from models.priors.decoding import (
    ConfidenceDecoding,
    MaskSchedule,
    confidence_decode,
    num_masked_tokens,
    seeded_noise,
)
from models.priors.mebt import PUBLISHED_STACK, BlockKind, MeBT, masked_token_loss
from models.random import keyed_generator

VALIDATION_MASK_RATIOS = (0.25, 0.5, 0.75, 1.0)


class MeBTModule(VideoGenerator):
    """Trains and samples MeBT. The defaults are the published UCF-101 network.

    Args:
        tokenizer: Path of the frozen tokenizer: a bundle made by `longtake export`, or a checkpoint.
        num_frames: Pixel frames of the longest clip (linked to data.num_frames).
        resolution: Height and width of the video (linked to data.resolution).
        downsample: Pixel frames, rows and columns that one code covers.
        codebook_size: Number of codes of the tokenizer.
        dim: Width of the transformer.
        num_heads: Attention heads.
        num_latents: Latent bottleneck tokens.
        blocks: Kind of each block, in order; the default is the published stack of 24.
        dropout: Dropout of embeddings, attention and MLPs.
        position_init: `normal` noise, as the release does, or `sinusoidal`, which small models learn much sooner from.
        init_std: Standard deviation of initial weights and embeddings; the release's 0.02 is for width 1024.
        mask_schedule: Mask ratio as a function of a uniform number; linear in all published configurations.
        rho_power: Power of the masked fraction that divides the loss: 1 is the mean over masked tokens (published
            configurations), 0 the plain sum of the paper's Eq. 3, per token of the window.
        lr: Learning rate, as given: not rescaled by GPUs or batch size.
        betas: AdamW's betas.
        weight_decay: Weight decay of Linear weights; nothing else decays.
        warmup_steps: Steps of linear warm-up.
        lr_schedule: `constant`, or `cosine` down to zero at trainer.max_steps.
        sampling: Confidence decoding: steps, schedule, temperatures, filters.
        seed: Keys every random draw of training (linked to seed_everything).
    """

    def __init__(
        self,
        tokenizer: str,
        num_frames: int,
        resolution: int,
        downsample: tuple[int, int, int] = (4, 8, 8),
        codebook_size: int = 16384,
        dim: int = 1024,
        num_heads: int = 16,
        num_latents: int = 256,
        blocks: Sequence[BlockKind] = PUBLISHED_STACK,
        dropout: float = 0.0,
        position_init: Literal["normal", "sinusoidal"] = "normal",
        init_std: float = 0.02,
        mask_schedule: MaskSchedule = "linear",
        rho_power: float = 1.0,
        lr: float = 3e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 1e-4,
        warmup_steps: int = 0,
        lr_schedule: Literal["constant", "cosine"] = "constant",
        sampling: ConfidenceDecoding = ConfidenceDecoding(),
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, num_frames, resolution, downsample, codebook_size, seed)
        if isinstance(sampling, dict):  # read from a checkpoint
            sampling = ConfidenceDecoding(**sampling)
        self.save_hyperparameters(ignore=["sampling"])
        self.save_hyperparameters({"sampling": asdict(sampling)})  # a checkpoint holds plain types
        self.sampling = sampling
        t, h, w = self.latent_shape
        grid = (t, h, w) if position_init == "sinusoidal" else None
        self.network = MeBT(codebook_size, t * h * w, dim, num_heads, num_latents, blocks, dropout, grid, init_std)

    # Training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mask a random part of the window and predict it; one mask ratio for the whole batch on all ranks."""
        codes, start = self.window_codes(batch)
        tau = torch.rand((), generator=self.step_generator(MASK_RATIO_STREAM)).item()  # a host generator: no sync
        num_tokens = codes[0].numel()
        generator = self.step_generator(MASK_ORDER_STREAM, batch_idx, device=self.device)
        order = self.random_order(generator, len(codes), num_tokens)
        num_masked = max(1, num_masked_tokens(self.hparams["mask_schedule"], tau, num_tokens))
        nll = self.masked_nll(codes, start, order, num_masked)
        loss = masked_token_loss(nll, num_tokens, self.hparams["rho_power"])
        self.tokens_per_batch = codes.numel()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/nll", nll.detach().mean())
        self.log("train/mask_ratio", num_masked / num_tokens)
        return loss

    def random_order(self, generator: torch.Generator, batch_size: int, num_tokens: int) -> Tensor:
        """A permutation of the tokens for each sample `[B, N]`: drawn for the batch of all ranks, then sliced."""
        noise = self.sliced_by_rank(
            lambda size: torch.rand(size, num_tokens, device=self.device, generator=generator), batch_size
        )
        return noise.argsort(dim=1)

    def masked_nll(self, codes: Tensor, start: int, order: Tensor, num_masked: int) -> Tensor:
        """Cross-entropy of masked tokens given the others.

        Args:
            codes: `[B, t', h, w]` codes of a window.
            start: The window's first latent frame in the clip; positions are absolute.
            order: `[B, N']` a permutation of the window's tokens for each sample.
            num_masked: How many tokens, at the end of the permutation, are masked.

        Returns:
            `[B, num_masked]` nats.
        """
        window = codes.flatten(1)  # [B, N']
        offset = start * codes[0, 0].numel()
        clip = F.pad(window, (offset, self.network.num_tokens - offset - window.shape[1]))  # [B, N]
        context, targets = (order + offset).tensor_split([window.shape[1] - num_masked], dim=1)
        logits = self.network(clip, context, targets)  # [B, M, K]
        return F.cross_entropy(logits.float().transpose(1, 2), clip.gather(1, targets), reduction="none")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Cross-entropy at fixed mask ratios, over the full length and the same masks each time."""
        codes, start = self.window_codes(batch)
        num_tokens = codes[0].numel()
        total = torch.zeros((), device=self.device)
        for ratio in VALIDATION_MASK_RATIOS:
            generator = keyed_generator(self.seed, batch_idx, VALIDATION_STREAM, device=self.device)
            order = self.random_order(generator, len(codes), num_tokens)
            nll = self.masked_nll(codes, start, order, round(ratio * num_tokens)).mean()
            total += nll / len(VALIDATION_MASK_RATIOS)
            self.log(f"val/nll_{ratio:.2f}", nll, batch_size=len(codes), sync_dist=True)
        self.log("val/loss", total, batch_size=len(codes), sync_dist=True, prog_bar=True)

    # Generation

    @torch.no_grad()
    def generate_codes(self, num_frames: int, seeds: Tensor, sampling: ConfidenceDecoding | None = None) -> Tensor:
        """Generate code maps `[B, t, h, w]`; the arguments are those of `generate`."""
        t, h, w = self.latent_shape
        frames = num_frames // self.downsample[0]
        if num_frames % self.downsample[0] or not 0 < frames <= t:
            raise ValueError(
                f"num_frames={num_frames} cannot be generated: this model takes multiples of {self.downsample[0]} "
                f"up to {self.num_frames}, the length it was trained for."
            )
        positions = torch.arange(frames * h * w, device=self.device).expand(len(seeds), -1)
        codes = confidence_decode(
            self.network,
            torch.zeros_like(positions),
            context=positions[:, :0],
            targets=positions,
            settings=sampling or self.sampling,
            noise=seeded_noise(seeds, self.device),
        )
        return codes.unflatten(1, (frames, h, w))

    def generate(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: ConfidenceDecoding | None = None
    ) -> Tensor:
        """Generate videos by confidence decoding.

        Args:
            condition: Must be empty: MeBT is unconditional.
            num_frames: Pixel frames, a multiple of the tokenizer's factor, at most what the model was built for.
            seeds: `[B]` int64; sample i depends on seed i alone.
            sampling: Decoding settings; None takes the module's.

        Returns:
            `[B, 3, T, H, W]` in [-1, 1].

        Raises:
            ValueError: If a condition is given, or the length does not fit.
        """
        given = [name for name, value in vars(condition).items() if value is not None]
        if given:
            raise ValueError(f"This MeBT is unconditional: generate it without a {given[0]}.")
        return self.decode_codes(self.generate_codes(num_frames, seeds, sampling))
