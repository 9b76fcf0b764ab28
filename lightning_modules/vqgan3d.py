"""Training of the 3D-VQGAN tokenizer as in TATS, appendix and released code."""

import logging
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from models.blocks.distributed import sum_over_ranks
from models.random import keyed_generator
from models.schedules import learning_rate_factor
from models.tokenizers.discriminators import PatchDiscriminator
from models.tokenizers.losses import LPIPS, GANLoss, discriminator_loss, generator_terms, pick_frames
from models.tokenizers.quantizers import Encoded, code_counts, usage_statistics
from models.tokenizers.vqgan3d import VQGAN3D

logger = logging.getLogger(__name__)

# Streams of random numbers within one training step, so that no two draws share a key.
QUANTIZER_STREAM, FRAME_STREAM = 1, 2


class VQGAN3DModule(LightningModule):
    """A 3D-VQGAN with its discriminators.

    One pass over the tokenizer serves both optimizers: the discriminators judge the reconstruction that the generator
    is trained on. (The released code runs the tokenizer once more, which updates codebook and batch norm twice.)
    `global_step` counts the generator's steps.

    Args:
        tokenizer: Encoder, quantizer and decoder.
        l1_weight: Weight of the mean absolute error.
        l2_weight: Weight of the mean squared error; TATS has none. It learns small bright things much sooner.
        perceptual_weight: Weight of LPIPS on one random frame a clip; 0 does without its weights.
        image_gan_weight: Weight of the frame discriminator; 0 does not build it.
        video_gan_weight: Weight of the clip discriminator; 0 does not build it.
        feature_matching_weight: Weight of the distances between the discriminators' hidden maps.
        gan_loss: `hinge` as released, or `vanilla`, the logarithmic form of the paper.
        discriminator_start_step: Steps of the generator before the discriminators begin; they are not run until then.
        discriminator_channels: Channels of the discriminators' first map.
        discriminator_layers: Number of halving convolutions in the discriminators.
        lr: Learning rate of both Adam optimizers, as given. TATS: 3e-5 * accumulate * (GPUs / 8) * (batch / 4) = 9e-5.
        betas: Betas of both Adam optimizers.
        warmup_steps: Steps of linear warm-up of both learning rates.
        lr_schedule: `constant`, or `cosine` down to zero at trainer.max_steps.
        gradient_clip_norm: Largest norm of the gradients, for each optimizer by itself; 0 does not clip.
        accumulate_grad_batches: Batches a step. (The Trainer's flags for clipping and accumulation do not reach two
            optimizers.)
        perceptual_weights: Folder with vgg16-397923af.pth (torchvision) and vgg.pth (LPIPS 0.1). Without them the
            perceptual loss is off, and a warning says so.
        seed: Keys the random frames and the codebook's restarts.
    """

    perceptual: LPIPS | None

    def __init__(
        self,
        tokenizer: VQGAN3D,
        l1_weight: float = 4.0,
        l2_weight: float = 0.0,
        perceptual_weight: float = 4.0,
        image_gan_weight: float = 1.0,
        video_gan_weight: float = 1.0,
        feature_matching_weight: float = 4.0,
        gan_loss: GANLoss = "hinge",
        discriminator_start_step: int = 10_000,
        discriminator_channels: int = 64,
        discriminator_layers: int = 3,
        lr: float = 9e-5,
        betas: tuple[float, float] = (0.5, 0.9),
        warmup_steps: int = 0,
        lr_schedule: Literal["constant", "cosine"] = "constant",
        gradient_clip_norm: float = 1.0,
        accumulate_grad_batches: int = 1,
        perceptual_weights: str = "weights/lpips",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["tokenizer"])
        if "_instantiator" in self.hparams:  # built by the command line, which records the tokenizer as plain types
            self.save_hyperparameters()
        if accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches={accumulate_grad_batches}: expected at least 1 batch a step")
        self.automatic_optimization = False
        self.tokenizer = tokenizer
        self.l1_weight = l1_weight
        self.l2_weight = l2_weight
        self.perceptual_weight = perceptual_weight
        self.image_gan_weight = image_gan_weight
        self.video_gan_weight = video_gan_weight
        self.feature_matching_weight = feature_matching_weight
        self.gan_loss: GANLoss = gan_loss
        self.discriminator_start_step = discriminator_start_step
        self.lr = lr
        self.betas = betas
        self.warmup_steps = warmup_steps
        self.lr_schedule = lr_schedule
        self.gradient_clip_norm = gradient_clip_norm
        self.accumulate_grad_batches = accumulate_grad_batches
        self.perceptual_weights = perceptual_weights
        self.seed = seed
        width, layers = discriminator_channels, discriminator_layers
        self.image_discriminator = (
            PatchDiscriminator(2, base_channels=width, num_layers=layers) if image_gan_weight > 0 else None
        )
        self.video_discriminator = (
            PatchDiscriminator(3, base_channels=width, num_layers=layers) if video_gan_weight > 0 else None
        )
        # outside the module tree: frozen, so neither checkpoints nor DDP nor weight averaging need to carry it
        self.__dict__["perceptual"] = None

    # Losses

    def generator_losses(
        self, pixels: Tensor, reconstruction: Tensor, encoded: Encoded, frames: Tensor, adversarial: bool
    ) -> dict[str, Tensor]:
        """Terms of the tokenizer's loss, before the weights of `generator_loss`.

        Args:
            pixels: `[B, 3, T, H, W]` in the native range.
            reconstruction: the same of the decoder, not clamped.
            encoded: what the encoder and the quantizer made of the pixels.
            frames: `[B]` int64, the frame of each clip that the image networks look at.
            adversarial: whether the discriminators take part.

        Returns:
            Scalars `l1`, `commitment` (weighted by the quantizer), `l2` if it has a weight, and with the networks that
            take part `perceptual`, `gan` and `feature_matching`.
        """
        terms = {"l1": F.l1_loss(reconstruction, pixels), **encoded.losses}
        if self.l2_weight > 0:
            terms["l2"] = F.mse_loss(reconstruction, pixels)
        if self.perceptual is not None:
            perceptual = self.perceptual.to(pixels.device)  # nobody else moves what is outside the module tree
            terms["perceptual"] = perceptual(pick_frames(pixels, frames), pick_frames(reconstruction, frames))
        if adversarial:
            terms["gan"] = terms["feature_matching"] = pixels.new_zeros(())
            for network, weight, real, fake in self._discriminated(pixels, reconstruction, frames):
                gan, feature_matching = generator_terms(network, real, fake)
                terms["gan"] = terms["gan"] + weight * gan
                terms["feature_matching"] = terms["feature_matching"] + feature_matching
        return terms

    def generator_loss(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum of `generator_losses`."""
        weights = {
            "l1": self.l1_weight,
            "l2": self.l2_weight,
            "perceptual": self.perceptual_weight,
            "feature_matching": self.feature_matching_weight,
        }
        return torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()

    def discriminator_loss(self, pixels: Tensor, reconstruction: Tensor, frames: Tensor) -> Tensor:
        """Weighted sum of the discriminators' losses; arguments as for `generator_losses`."""
        loss = pixels.new_zeros(())
        for network, weight, real, fake in self._discriminated(pixels, reconstruction, frames):
            loss = loss + weight * discriminator_loss(network, real, fake, self.gan_loss)
        return loss

    def _discriminated(
        self, pixels: Tensor, reconstruction: Tensor, frames: Tensor
    ) -> list[tuple[PatchDiscriminator, float, Tensor, Tensor]]:
        """Each discriminator that there is, its weight, and the real and the fake that it sees."""
        views = []
        if self.image_discriminator is not None:
            real, fake = pick_frames(pixels, frames), pick_frames(reconstruction, frames)  # [B, 3, H, W]
            views.append((self.image_discriminator, self.image_gan_weight, real, fake))
        if self.video_discriminator is not None:
            views.append((self.video_discriminator, self.video_gan_weight, pixels, reconstruction))
        return views

    # Training

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One Adam for the tokenizer and, if there are any, one for the discriminators."""
        networks = [self.image_discriminator, self.video_discriminator]
        discriminators = [p for network in networks if network is not None for p in network.parameters()]
        groups = [list(self.tokenizer.parameters())] + ([discriminators] if discriminators else [])
        return [torch.optim.Adam(parameters, lr=self.lr, betas=self.betas) for parameters in groups]

    def setup(self, stage: str) -> None:
        """Refuse what cannot work; read the perceptual network.

        Raises:
            ValueError: if it is to be trained in float16, or a cosine schedule has no end.
        """
        if stage == "fit" and self.lr_schedule == "cosine" and self.trainer.max_steps < 1:
            raise ValueError("lr_schedule=cosine ends with the run and needs its length: set --trainer.max_steps.")
        if stage == "fit" and self.trainer.precision.startswith("16-"):
            raise ValueError(
                f"--trainer.precision={self.trainer.precision} does not fit this model: its two optimizers step "
                "without a gradient scaler. Use bf16-mixed or 32-true."
            )
        if self.perceptual_weight > 0 and self.perceptual is None:
            try:
                self.__dict__["perceptual"] = LPIPS.from_folder(self.perceptual_weights)
            except FileNotFoundError as error:
                if self.global_rank == 0:
                    logger.warning("The perceptual loss is off (--model.perceptual_weights). %s", error)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One pass over the tokenizer, one step of each optimizer."""
        generator_optimizer, *discriminator_optimizers = self._optimizers()
        adversarial = bool(discriminator_optimizers) and self.global_step >= self.discriminator_start_step
        part = batch_idx % self.accumulate_grad_batches
        steps = part == self.accumulate_grad_batches - 1 or self.trainer.is_last_batch
        frames = self._draw_frames(batch["video"], part)
        pixels = self.tokenizer.to_native(batch["video"])

        with generator_optimizer.toggle_model(sync_grad=steps):
            draws = keyed_generator(self.seed, self.global_step, QUANTIZER_STREAM, part)
            reconstruction, encoded = self.tokenizer(batch["video"], draws)
            terms = self.generator_losses(pixels, reconstruction, encoded, frames, adversarial)
            loss = self.generator_loss(terms)
            self.manual_backward(loss / self.accumulate_grad_batches)
        logged = {"loss": loss.detach(), **terms, **encoded.statistics}

        if adversarial:
            with discriminator_optimizers[0].toggle_model(sync_grad=steps):
                logged["disc"] = self.discriminator_loss(pixels, reconstruction, frames)
                self.manual_backward(logged["disc"] / self.accumulate_grad_batches)
            if steps:
                # torch's own optimizer: a step of Lightning's wrapper would count in global_step a second time
                self._update(discriminator_optimizers[0].optimizer)
        if steps:
            self._update(generator_optimizer)
        self.log_dict({f"train/{name}": value.detach() for name, value in logged.items()})

    def _optimizers(self) -> list[LightningOptimizer]:
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def _update(self, optimizer: torch.optim.Optimizer | LightningOptimizer) -> None:
        self.clip_gradients(
            optimizer,  # type: ignore[arg-type]
            gradient_clip_val=self.gradient_clip_norm,
            gradient_clip_algorithm="norm",
        )
        # Lightning steps no scheduler in manual optimisation; as a function of the step it needs no state either.
        decay_steps = self.trainer.max_steps if self.lr_schedule == "cosine" else None
        for group in optimizer.param_groups:
            group["lr"] = self.lr * learning_rate_factor(self.global_step, self.warmup_steps, decay_steps)
        optimizer.step()
        optimizer.zero_grad()

    def _draw_frames(self, video: Tensor, part: int) -> Tensor:
        """One frame of each clip `[B]`: drawn for the batch of all ranks, of which this rank takes its slice."""
        rows, num_frames = len(video), video.shape[2]
        generator = keyed_generator(self.seed, self.global_step, FRAME_STREAM, part)
        frames = torch.randint(num_frames, (rows * self.trainer.world_size,), generator=generator)
        return frames[rows * self.global_rank :][:rows].to(video.device, non_blocking=True)

    # Validation

    def on_validation_epoch_start(self) -> None:
        """Begin to count codes, if there are any."""
        self._code_counts = torch.zeros(self.tokenizer.codebook_size or 0, dtype=torch.int64, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log losses without discriminators, and the PSNR of the clamped reconstruction in [-1, 1]."""
        video = batch["video"]
        pixels = self.tokenizer.to_native(video)
        reconstruction, encoded = self.tokenizer(video)
        middle = torch.full((len(video),), video.shape[2] // 2, device=video.device)
        terms = self.generator_losses(pixels, reconstruction, encoded, middle, adversarial=False)
        errors = (self.tokenizer.from_native(reconstruction).clamp(-1, 1) - video).square().flatten(1).mean(1)  # [B]
        psnr = 10 * torch.log10(4 / errors.clamp(min=1e-10))  # peak 2, clips that are equal count as 106 dB
        if encoded.codes is not None:
            self._code_counts += code_counts(encoded.codes, len(self._code_counts))
        logged = {"loss": self.generator_loss(terms), **terms, "psnr": psnr.mean()}
        self.log_dict({f"val/{name}": value for name, value in logged.items()}, sync_dist=True, batch_size=len(video))

    def on_validation_epoch_end(self) -> None:
        """Log perplexity and usage of the codebook over the whole validation set."""
        if self.tokenizer.codebook_size is None:
            return
        statistics = usage_statistics(sum_over_ranks(self._code_counts))
        self.log_dict({f"val/{name}": value for name, value in statistics.items()}, sync_dist=True)

    # Showing

    @torch.no_grad()
    def sample_videos(self, batch: dict[str, Any], seeds: Tensor) -> Tensor:
        """Originals above their reconstructions, for a callback to show.

        Args:
            batch: holds `video` `[B, 3, T, H, W]`.
            seeds: `[n]`; as many clips are shown, at most B. Reconstruction is not random: the values do not matter.

        Returns:
            `[min(n, B), 3, T, 2 * H, W]` in [-1, 1].
        """
        video = batch["video"][: len(seeds)]
        was_training = self.tokenizer.training
        self.tokenizer.eval()  # looking must not move codebook or batch statistics
        reconstruction = self.tokenizer.decode(self.tokenizer.encode(video).latents)
        self.tokenizer.train(was_training)
        return torch.cat([video, reconstruction.to(video.dtype)], dim=3)
