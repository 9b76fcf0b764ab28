"""Training of the 3D-VQGAN tokenizer: as in TATS, appendix and released code, and with what MAGVIT does otherwise.

Where the papers are in the code, all with one loop of two optimizers (`VQGAN3DModule.training_step`):

    TATS, time-agnostic networks             `models.tokenizers.time_agnostic`; padding `models.blocks.conv`
    TATS, codebook by moving averages        `models.tokenizers.quantizers.VectorQuantizer`, dead codes `revive`
    TATS, image and video discriminators     `models.tokenizers.discriminators.PatchDiscriminator`
    MAGVIT 3.1 and A.1, 3D-VQ                `models.tokenizers.magvit`, `levels`, discriminator `StyleGANDiscriminator`
    MAGVIT, R1 and LeCam                     `models.tokenizers.losses`: `r1_penalty`, `LeCam`
    MAGVIT 3.1, central inflation            `models.tokenizers.inflation.inflate`, called by `VQGAN3DModule.setup`
    MAGVIT-v2 3.1, lookup-free codes         `models.tokenizers.lookup_free.LookupFreeQuantizer`
    MAGVIT-v2 3.2, causal networks           `models.tokenizers.causal`
    W.A.L.T 3.1, real-valued latents         `models.tokenizers.continuous`
    terms of the two losses, adaptive weight `VQGAN3DModule.generator_losses`, `generator_loss`, `discriminator_losses`
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from models.blocks.distributed import sum_over_ranks, world_size
from models.blocks.norm import SyncBatchNorm
from models.metrics.frames import frame_ssim
from models.optim import Muon, matrices, split_groups
from models.random import keyed_generator
from models.schedules import learning_rate_factor
from models.tokenizers.discriminators import PatchDiscriminator
from models.tokenizers.inflation import Inflation, inflate
from models.tokenizers.losses import LPIPS, GANLoss, LeCam, discriminator_terms, generator_terms, pick_frames
from models.tokenizers.quantizers import Encoded, code_counts, usage_statistics
from models.tokenizers.timm_perceptual import TimmPerceptual
from models.tokenizers.vqgan3d import VQGAN3D, hold_images
from models.weights import load_tokenizer, read_checkpoint

logger = logging.getLogger(__name__)

# Streams of random numbers within one training step, so that no two draws share a key.
QUANTIZER_STREAM, FRAME_STREAM = 1, 2


class VQGAN3DModule(LightningModule):
    """A 3D-VQGAN with its discriminators.

    One pass over the tokenizer serves both optimizers: the discriminators judge the reconstruction that the generator
    is trained on. (The released code runs the tokenizer once more, which updates codebook and batch norm twice.)
    `global_step` counts the generator's steps.

    A causal tokenizer may learn from images and videos at once: a row of a batch that `is_image` names counts as a
    still video of its first frame, whatever is behind it (a mixed data module with `images_per_stack: 1`).

    Args:
        tokenizer: Encoder, quantizer and decoder.
        l1_weight: Weight of the mean absolute error.
        l2_weight: Weight of the mean squared error; TATS has none. It learns small bright things much sooner.
        perceptual_weight: Weight of the perceptual distance; 0 does without its weights.
        perceptual_frames: `random` compares one frame of each clip, as TATS, `all` each frame, as MAGVIT.
        perceptual_network: `lpips`, or the name of a timm model whose logits are compared: `resnet50` in MAGVIT.
        image_gan_weight: Weight of the frame discriminator; 0 does not build it.
        video_gan_weight: Weight of the clip discriminator; 0 does not build it.
        adversarial_weight: Weight of what the discriminators tell the tokenizer, besides their own: 0.1 in MAGVIT.
        adaptive_weight: Multiply that by VQGAN's ratio of the gradients that the reconstruction and the discriminators
            send to the decoder's last weight.
        feature_matching_weight: Weight of the distances between the discriminators' hidden maps.
        gan_loss: `hinge` as TATS released it, `vanilla` with the logarithms of its paper, or MAGVIT's `non_saturating`.
        r1_weight: Weight of the squared gradient of the discriminators on real clips: 10 in MAGVIT. Made for
            discriminators without batch norm: with it, a clip's gradient is that of the logits of all ranks' clips, and
            training on several GPUs does without torch's fused batch norm in the discriminators.
        lecam_weight: Weight of LeCam's regularisation of the discriminators: 0.001 in MAGVIT.
        discriminator_start_step: Steps of the generator before the discriminators begin; they are not run until then.
        discriminator_warmup_steps: Steps in which their weight in the tokenizer's loss then grows from 0.
        image_discriminator: Gives logits and hidden maps of frames; null takes the patch discriminator of TATS.
        video_discriminator: The same of clips.
        discriminator_channels: Channels of the patch discriminators' first map.
        discriminator_layers: Number of halving convolutions in the patch discriminators.
        entropy_boost: How much more the quantizer's entropy loss weighs at first, times its weight: 3 in MAGVIT-v2.
        entropy_boost_steps: Steps in which that goes to 0.
        lr: Learning rate of both Adam optimizers, as given. TATS: 3e-5 * accumulate * (GPUs / 8) * (batch / 4) = 9e-5.
        betas: Betas of both Adam optimizers.
        muon_lr: Learning rate of Muon for the tokenizer's kernels and matrices, which Adam leaves to it then; 0 for
            Adam alone, as in the papers. At about 0.02, runs of minutes get as far as much longer ones with Adam.
        warmup_steps: Steps of linear warm-up of both learning rates.
        lr_schedule: `constant`, or `cosine` down to zero at trainer.max_steps.
        gradient_clip_norm: Largest norm of the gradients, for each optimizer by itself; 0 does not clip.
        accumulate_grad_batches: Batches a step. (The Trainer's flags for clipping and accumulation do not reach two
            optimizers.)
        perceptual_weights: Folder with vgg16-397923af.pth (torchvision) and vgg.pth (LPIPS 0.1), or the file with the
            weights of the timm model. Without them the perceptual loss is off, and a warning says so. With LPIPS'
            weights, validation measures LPIPS too.
        inflate_from: Bundle or checkpoint of a 2D tokenizer that a new run starts from; null starts from scratch.
        inflation: How its kernels grow in time: `central` in MAGVIT, `average`, or `last` in MAGVIT-v2. With the first
            two the clip discriminator starts from the 2D one, if a checkpoint holds it.
        seed: Keys the random frames and the codebook's restarts.
    """

    not_averaged = ("image_discriminator", "video_discriminator")  # by averages of the weights: only training has them
    perceptual: LPIPS | TimmPerceptual | None
    lpips: LPIPS | None

    def __init__(
        self,
        tokenizer: VQGAN3D,
        l1_weight: float = 4.0,
        l2_weight: float = 0.0,
        perceptual_weight: float = 4.0,
        perceptual_frames: Literal["random", "all"] = "random",
        perceptual_network: str = "lpips",
        image_gan_weight: float = 1.0,
        video_gan_weight: float = 1.0,
        adversarial_weight: float = 1.0,
        adaptive_weight: bool = False,
        feature_matching_weight: float = 4.0,
        gan_loss: GANLoss = "hinge",
        r1_weight: float = 0.0,
        lecam_weight: float = 0.0,
        discriminator_start_step: int = 10_000,
        discriminator_warmup_steps: int = 0,
        image_discriminator: nn.Module | None = None,
        video_discriminator: nn.Module | None = None,
        discriminator_channels: int = 64,
        discriminator_layers: int = 3,
        entropy_boost: float = 0.0,
        entropy_boost_steps: int = 2000,
        lr: float = 9e-5,
        betas: tuple[float, float] = (0.5, 0.9),
        muon_lr: float = 0.0,
        warmup_steps: int = 0,
        lr_schedule: Literal["constant", "cosine"] = "constant",
        gradient_clip_norm: float = 1.0,
        accumulate_grad_batches: int = 1,
        perceptual_weights: str = "weights/lpips",
        inflate_from: str | None = None,
        inflation: Inflation = "central",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["tokenizer", "image_discriminator", "video_discriminator"])
        if "_instantiator" in self.hparams:  # built by the command line, which records the tokenizer as plain types
            self.save_hyperparameters()
        if accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches={accumulate_grad_batches}: expected at least 1 batch a step")
        for axis, given, weight in (
            ("image", image_discriminator, image_gan_weight),
            ("video", video_discriminator, video_gan_weight),
        ):
            if given is not None and weight <= 0:
                raise ValueError(f"{axis}_discriminator has no use: {axis}_gan_weight={weight}.")
        self.automatic_optimization = False
        self.tokenizer = tokenizer
        # a causal tokenizer takes an image for a video of one frame; without down-sampling in time, every frame is one
        self.accepts_images = tokenizer.encoder.is_causal or tokenizer.downsample[0] == 1
        self.l1_weight = l1_weight
        self.l2_weight = l2_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual_frames = perceptual_frames
        self.perceptual_network = perceptual_network
        self.image_gan_weight = image_gan_weight
        self.video_gan_weight = video_gan_weight
        self.adversarial_weight = adversarial_weight
        self.adaptive_weight = adaptive_weight
        self.feature_matching_weight = feature_matching_weight
        self.gan_loss: GANLoss = gan_loss
        self.r1_weight = r1_weight
        self.lecam_weight = lecam_weight
        self.discriminator_start_step = discriminator_start_step
        self.discriminator_warmup_steps = discriminator_warmup_steps
        self.entropy_boost = entropy_boost
        self.entropy_boost_steps = entropy_boost_steps
        self.lr = lr
        self.betas = betas
        self.muon_lr = muon_lr
        self.warmup_steps = warmup_steps
        self.lr_schedule = lr_schedule
        self.gradient_clip_norm = gradient_clip_norm
        self.accumulate_grad_batches = accumulate_grad_batches
        self.perceptual_weights = perceptual_weights
        self.inflate_from = inflate_from
        self.inflation: Inflation = inflation
        self._is_resumed = False
        self.seed = seed
        patches: dict[str, Any] = {"base_channels": discriminator_channels, "num_layers": discriminator_layers}
        self.image_discriminator = self.video_discriminator = None
        if image_gan_weight > 0:
            self.image_discriminator = image_discriminator or PatchDiscriminator(2, **patches)
        if video_gan_weight > 0:
            self.video_discriminator = video_discriminator or PatchDiscriminator(3, **patches)
        for network in (self.image_discriminator, self.video_discriminator):
            for layer in network.modules() if network is not None and r1_weight > 0 else ():
                if isinstance(layer, SyncBatchNorm):
                    layer.twice_differentiable = True
        self.image_lecam = LeCam() if self.image_discriminator is not None and lecam_weight > 0 else None
        self.video_lecam = LeCam() if self.video_discriminator is not None and lecam_weight > 0 else None
        # for a callback that watches over the training: a factor, and a last word on each step
        self.discriminator_lr_factor = 1.0
        self.step_gate: Callable[[dict[str, Tensor]], bool] | None = None
        # outside the module tree: frozen, so neither checkpoints nor DDP nor weight averaging need to carry it
        self.__dict__["perceptual"] = self.__dict__["lpips"] = None

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
            views = (pixels, reconstruction)
            if self.perceptual_frames == "all":
                images = [rearrange(video, "b c t h w -> (b t) c h w") for video in views]
            else:
                images = [pick_frames(video, frames) for video in views]
            terms["perceptual"] = perceptual(*images)
        if adversarial:
            gan, feature_matching = pixels.new_zeros(()), pixels.new_zeros(())
            match_features = self.feature_matching_weight > 0
            for network, _, weight, real, fake in self._discriminated(pixels, reconstruction, frames):
                one_gan, one_matching = generator_terms(network, real, fake, self.gan_loss, match_features)
                gan = gan + weight * one_gan
                feature_matching = feature_matching + one_matching
            terms["gan"] = gan
            if match_features:
                terms["feature_matching"] = feature_matching
        return terms

    def generator_loss(self, terms: dict[str, Tensor], factors: dict[str, Tensor] | None = None) -> Tensor:
        """Weighted sum of `generator_losses`, each term with a further factor of this moment, see `step_factors`."""
        weights: dict[str, float] = {
            "l1": self.l1_weight,
            "l2": self.l2_weight,
            "perceptual": self.perceptual_weight,
            "gan": self.adversarial_weight,
            "feature_matching": self.feature_matching_weight,
        }
        factors = factors or {}
        return torch.stack(
            [weights.get(name, 1.0) * factors.get(name, 1.0) * term for name, term in terms.items()]
        ).sum()

    def step_factors(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Factors on the terms of `generator_losses` at this step: what warms up, fades out or adapts."""
        step = self.global_step
        boost = 1 + self.entropy_boost * max(0.0, 1 - step / max(1, self.entropy_boost_steps))
        ramp = min(1.0, (step - self.discriminator_start_step + 1) / (self.discriminator_warmup_steps + 1))
        factors = {
            name: torch.full_like(terms["l1"], factor, requires_grad=False)
            for name, factor in (("entropy", boost), ("gan", ramp), ("feature_matching", ramp))
        }
        if self.adaptive_weight and "gan" in terms:
            factors["gan"] = factors["gan"] * self._gradient_ratio(terms)
        return factors

    def _gradient_ratio(self, terms: dict[str, Tensor]) -> Tensor:
        """VQGAN's weight of the adversarial loss: |grad of the reconstruction| / (|its own| + 1e-4), at most 1e4.

        The gradients are those that reach the decoder's last weight, of the batches of all ranks.
        """
        last = [weight for weight in self.tokenizer.decoder.parameters() if weight.ndim > 1][-1]
        reconstruction = self.generator_loss({n: t for n, t in terms.items() if n in ("l1", "l2", "perceptual")})
        norms = [
            (sum_over_ranks(torch.autograd.grad(loss, last, retain_graph=True)[0]) / world_size()).norm()
            for loss in (reconstruction, terms["gan"])
        ]
        return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()

    def discriminator_losses(
        self, pixels: Tensor, reconstruction: Tensor, frames: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms of the discriminators' loss, before the weights of `discriminator_loss`; takes what the generator's do.

        Returns:
            Scalars `disc`, and if they have a weight `r1` and `lecam`: sums over the discriminators, each with its
            weight. And how they judge, as means over them: `logits_real`, `logits_fake` and `disc_accuracy`, the
            fraction of logits of the right sign.
        """
        terms = {"disc": pixels.new_zeros(())}
        terms |= {"r1": pixels.new_zeros(())} if self.r1_weight > 0 else {}
        terms |= {"lecam": pixels.new_zeros(())} if self.lecam_weight > 0 else {}
        judgements = []
        for network, lecam, weight, real, fake in self._discriminated(pixels, reconstruction, frames):
            loss, r1, *logits = discriminator_terms(network, real, fake, self.gan_loss, self.r1_weight > 0)
            terms["disc"] = terms["disc"] + weight * loss
            if self.r1_weight > 0:
                terms["r1"] = terms["r1"] + weight * r1
            if lecam is not None:
                terms["lecam"] = terms["lecam"] + weight * lecam(*logits)
            on_real, on_fake = (x.detach() for x in logits)
            right = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
            judgements.append(torch.stack([on_real.mean(), on_fake.mean(), right.to(on_real.dtype)]))
        names = ("logits_real", "logits_fake", "disc_accuracy")
        return terms, dict(zip(names, torch.stack(judgements).mean(0), strict=True))

    def discriminator_loss(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum of `discriminator_losses`."""
        weights = {"disc": 1.0, "r1": self.r1_weight, "lecam": self.lecam_weight}
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def _discriminated(
        self, pixels: Tensor, reconstruction: Tensor, frames: Tensor
    ) -> list[tuple[nn.Module, LeCam | None, float, Tensor, Tensor]]:
        """Each discriminator that there is, its regulariser, its weight, and the real and the fake that it sees."""
        views: list[tuple[nn.Module, LeCam | None, float, Tensor, Tensor]] = []
        if self.image_discriminator is not None:
            real, fake = pick_frames(pixels, frames), pick_frames(reconstruction, frames)  # [B, 3, H, W]
            views.append((self.image_discriminator, self.image_lecam, self.image_gan_weight, real, fake))
        if self.video_discriminator is not None:
            views.append((self.video_discriminator, self.video_lecam, self.video_gan_weight, pixels, reconstruction))
        return views

    # Training

    def configure_optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """One Adam, or Muon, for the tokenizer and, if there are any, one Adam for the discriminators."""
        networks = [self.image_discriminator, self.video_discriminator]
        discriminators = [p for network in networks if network is not None for p in network.parameters()]
        settings: dict[str, Any] = {"lr": self.lr, "betas": self.betas}
        optimizer: torch.optim.Optimizer
        if self.muon_lr > 0:
            groups = split_groups(
                [{"params": list(self.tokenizer.parameters())}], matrices(self.tokenizer), self.muon_lr
            )
            optimizer = Muon(groups, **settings)
        else:
            optimizer = torch.optim.Adam(self.tokenizer.parameters(), **settings)
        return [optimizer] + ([torch.optim.Adam(discriminators, **settings)] if discriminators else [])

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
        if self.perceptual is None and self.lpips is None:
            self._load_perceptual()
        # before a checkpoint's weights are read, which then replace these, and before a callback averages them
        if stage == "fit" and self.inflate_from is not None and Path(self.inflate_from).exists():
            self._inflate(Path(self.inflate_from))

    def _load_perceptual(self) -> None:
        """Read LPIPS, for the loss and to measure by, or the classifier that is the loss instead."""
        try:
            if self.perceptual_network == "lpips":
                self.__dict__["lpips"] = LPIPS.from_folder(self.perceptual_weights)
            elif self.perceptual_weight > 0:
                self.__dict__["perceptual"] = TimmPerceptual(self.perceptual_network, self.perceptual_weights)
        except FileNotFoundError as error:
            if self.perceptual_weight > 0 and self.global_rank == 0:
                logger.warning("The perceptual loss is off (--model.perceptual_weights). %s", error)
        if self.perceptual_weight > 0 and self.lpips is not None:
            self.__dict__["perceptual"] = self.lpips

    def _inflate(self, path: Path) -> None:
        """Start from a 2D tokenizer, and from its discriminator where the paper does and a checkpoint holds it."""
        kept = inflate(self.tokenizer, load_tokenizer(path).state_dict(), self.inflation)
        if path.is_file() and self.video_discriminator is not None and self.inflation != "last":
            prefix = "video_discriminator."
            state = read_checkpoint(path)["state_dict"].items()
            images = {name.removeprefix(prefix): tensor for name, tensor in state if name.startswith(prefix)}
            kept += inflate(self.video_discriminator, images, self.inflation) if images else []
        if kept and self.global_rank == 0:
            logger.warning("%s holds nothing for %s: they start from scratch.", path, ", ".join(kept))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember that this run goes on."""
        self._is_resumed = True

    def on_fit_start(self) -> None:
        """Refuse to begin without the 2D tokenizer that is named; a run that goes on has no need of it.

        Raises:
            FileNotFoundError: if it is not there.
        """
        if self.inflate_from is not None and not self._is_resumed and not Path(self.inflate_from).exists():
            raise FileNotFoundError(f"No 2D tokenizer at {self.inflate_from} (--model.inflate_from).")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One pass over the tokenizer, one step of each optimizer."""
        generator_optimizer, *discriminator_optimizers = self._optimizers()
        adversarial = bool(discriminator_optimizers) and self.global_step >= self.discriminator_start_step
        part = batch_idx % self.accumulate_grad_batches
        steps = part == self.accumulate_grad_batches - 1 or self.trainer.is_last_batch
        video, is_image = batch["video"], batch.get("is_image")
        pixels = self.tokenizer.to_native(hold_images(self.tokenizer.reconstructed_frames(video), is_image))
        frames = self._draw_frames(pixels, part)

        with generator_optimizer.toggle_model(sync_grad=steps):
            draws = keyed_generator(self.seed, self.global_step, QUANTIZER_STREAM, part)
            reconstruction, encoded = self.tokenizer(video, draws, is_image)
            terms = self.generator_losses(pixels, reconstruction, encoded, frames, adversarial)
            factors = self.step_factors(terms)
            loss = self.generator_loss(terms, factors)
            self.manual_backward(loss / self.accumulate_grad_batches)
        logged = {"loss": loss, **terms, **encoded.statistics}
        if self.adaptive_weight and adversarial:
            logged["adaptive_weight"] = factors["gan"]

        if adversarial:
            with discriminator_optimizers[0].toggle_model(sync_grad=steps):
                terms, judgement = self.discriminator_losses(pixels, reconstruction, frames)
                self.manual_backward(self.discriminator_loss(terms) / self.accumulate_grad_batches)
            logged |= terms | judgement
        if steps:
            logged |= self._step(generator_optimizer, discriminator_optimizers[0] if adversarial else None)
        self.log_dict({f"train/{name}": value.detach() for name, value in logged.items()})

    def _optimizers(self) -> list[LightningOptimizer]:
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def _step(self, generator: LightningOptimizer, discriminator: LightningOptimizer | None) -> dict[str, Tensor]:
        """Clip and apply the gradients of both; returns their norms before that."""
        optimizers: dict[str, torch.optim.Optimizer | LightningOptimizer] = {}
        if discriminator is not None:
            # torch's own optimizer: a step of Lightning's wrapper would count in global_step a second time
            optimizers["grad_norm_disc"] = discriminator.optimizer
        optimizers["grad_norm"] = generator
        norms = {name: self._clip(optimizer) for name, optimizer in optimizers.items()}
        is_wanted = self.step_gate is None or self.step_gate(norms)
        for lecam in (self.image_lecam, self.video_lecam):
            if lecam is not None and discriminator is not None:
                lecam.update() if is_wanted else lecam.forget()
        # Lightning steps no scheduler in manual optimisation; as a function of the step it needs no state either.
        decay_steps = self.trainer.max_steps if self.lr_schedule == "cosine" else None
        factor = learning_rate_factor(self.global_step, self.warmup_steps, decay_steps)
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                lr = self.muon_lr if group.get("orthogonal") else self.lr
                group["lr"] = lr * factor * (self.discriminator_lr_factor if name == "grad_norm_disc" else 1.0)
            if is_wanted:
                optimizer.step()
            optimizer.zero_grad()
        return norms

    def _clip(self, optimizer: torch.optim.Optimizer | LightningOptimizer) -> Tensor:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip_norm or math.inf)

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
        """Log losses without discriminators, and how close the clamped reconstruction is in [-1, 1].

        PSNR is of whole clips; SSIM (of frames of at least 11 x 11 pixels) and LPIPS (if its weights are there) are
        means over all frames.
        """
        is_image = batch.get("is_image")
        reconstruction, encoded = self.tokenizer(batch["video"], is_image=is_image)
        video = hold_images(self.tokenizer.reconstructed_frames(batch["video"]), is_image)
        pixels = self.tokenizer.to_native(video)
        middle = torch.full((len(video),), video.shape[2] // 2, device=video.device)
        terms = self.generator_losses(pixels, reconstruction, encoded, middle, adversarial=False)
        shown = self.tokenizer.from_native(reconstruction).clamp(-1, 1).to(video.dtype)
        errors = (shown - video).square().flatten(1).mean(1)  # [B]
        psnr = 10 * torch.log10(4 / errors.clamp(min=1e-10))  # peak 2, clips that are equal count as 106 dB
        if encoded.codes is not None:
            self._code_counts += code_counts(encoded.codes, len(self._code_counts))
        logged = {"loss": self.generator_loss(terms), **terms, "psnr": psnr.mean()}
        if min(video.shape[3:]) >= 11:
            logged["ssim"] = frame_ssim(shown, video).mean().to(psnr.dtype)
        if self.lpips is not None:
            with torch.autocast(self.device.type, enabled=False):
                frames = [rearrange(clip.float(), "b c t h w -> (b t) c h w") for clip in (shown, video)]
                logged["lpips"] = self.lpips.to(self.device)(*frames)
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
        return torch.cat([self.tokenizer.reconstructed_frames(video), reconstruction.to(video.dtype)], dim=3)

    def sample_captions(self, batch: dict[str, Any], count: int) -> list[tuple[str, str]]:
        """Say of the first videos of `sample_videos` that they are reconstructions, which need no caption."""
        return [("reconstruction", "")] * count
