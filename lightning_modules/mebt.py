"""MeBT's second stage: masked-token modelling of long videos, on windows that a curriculum lets grow (CVPR 2023).

Where the paper is in the code:

    3D-VQGAN, frozen; window of codes        `VideoGenerator.load_tokenizer`, `window_codes`
    encoder, latent self-attention, decoder  `models.priors.mebt`: `MeBTBlock`, `PUBLISHED_STACK`, `MeBT.forward`
    context and target positions             `MeBTModule.random_masks`, `mask_window`
    training objective, Eq. 3                `masked_token_loss` (`rho_power` 0: the equation, 1: the release)
    short-to-long curriculum                 `models.priors.curriculum`, called through `callbacks.curriculum`
    3.3, decoding by confidence              `models.priors.decoding.confidence_decode`; its start `bootstrap_decode`
    draft and revise                         `draft_and_revise`, `revise`, settings `DraftAndRevise`
    longer than the training length          `MeBTModule.generate_codes`, which slides the window
    known pixels, editing (ours)             `MeBTModule.known_codes`, `edit_codes`
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from lightning_modules.generator import (
    MASK_ORDER_STREAM,
    MASK_RATIO_STREAM,
    VALIDATION_STREAM,
    Condition,
    VideoGenerator,
)
from models.priors.decoding import DraftAndRevise, MaskSchedule, draft_and_revise, num_masked_tokens, seeded_noise
from models.priors.mebt import (
    PUBLISHED_STACK,
    BlockKind,
    MaskedWindow,
    MeBT,
    SampleMask,
    mask_window,
    masked_token_loss,
    target_mean,
)
from models.priors.tasks import CLASS_TASKS, EMPTY_TASKS, TASKS, known_region, padded_video
from models.random import keyed_generator, keyed_seed

VALIDATION_MASK_RATIOS = (0.25, 0.5, 0.75, 1.0)
SUBWINDOW_STREAM, GIVEN_STREAM = 51, 52
# What may be known of a clip: MAGVIT's regions
EDITING_TASKS = tuple(task for task in TASKS if task not in (*CLASS_TASKS, *EMPTY_TASKS))


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
        num_classes: Classes of the data to condition on, each a learned latent; 0 as published.
        mask_schedule: Mask ratio as a function of a uniform number; linear in all published configurations.
        mask_ratio_per: Whether the batch shares one mask ratio, as published, or each sample draws its own.
        length_per: Whether the batch shares one window, as published, or each sample is cut to a window of its own
            inside it, of a length between one latent frame and all.
        prediction_share: Share of the steps that train to go on from given frames: the first ones of the window, at
            least one latent frame and at most all but one, are context then. 0 as published.
        target_budget: Targets of a clip, at most: what is masked beyond is neither seen nor predicted; null for no
            bound, as published.
        rho_power: Power of the masked fraction that divides the loss: 1 is the mean over masked tokens (published
            configurations), 0 the plain sum of the paper's Eq. 3, per token of the window.
        label_smoothing: Share of the target that is spread over all codes, in training; `train/nll` includes it.
        gradient_checkpointing: Keep only the blocks' inputs and compute the rest again going back: less memory, a
            third more time.
        compile_network: Compile blocks for windows and masks of any size; costs a minute or so at the start.
        lr: Learning rate, as given: not rescaled by GPUs or batch size.
        betas: AdamW's betas.
        muon_lr: Learning rate of Muon for the matrices of the blocks, which AdamW leaves to it then; 0 for AdamW
            alone, as in the paper. About 0.02 where a run lasts minutes.
        weight_decay: Weight decay of Linear weights; nothing else decays.
        warmup_steps: Steps of linear warm-up.
        lr_schedule: `constant`, or `cosine` down to zero at trainer.max_steps.
        sampling: Bootstrap, draft, revision: steps, schedule, temperatures, filters.
        seed: Keys every random draw of training (linked to seed_everything).

    Raises:
        ValueError: If a number is out of its range.
    """

    sampling: DraftAndRevise

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
        num_classes: int = 0,
        mask_schedule: MaskSchedule = "linear",
        mask_ratio_per: Literal["batch", "sample"] = "batch",
        length_per: Literal["batch", "sample"] = "batch",
        prediction_share: float = 0.0,
        target_budget: int | None = None,
        rho_power: float = 1.0,
        label_smoothing: float = 0.0,
        gradient_checkpointing: bool = False,
        compile_network: bool = False,
        lr: float = 3e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        muon_lr: float = 0.0,
        weight_decay: float = 1e-4,
        warmup_steps: int = 0,
        lr_schedule: Literal["constant", "cosine"] = "constant",
        sampling: DraftAndRevise = DraftAndRevise(),
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, num_frames, resolution, downsample, codebook_size, seed)
        for name, share in (("prediction_share", prediction_share), ("label_smoothing", label_smoothing)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} is no share: expected 0 to 1 (--model.{name}).")
        if target_budget is not None and target_budget < 1:
            raise ValueError(f"target_budget={target_budget} must be null or at least 1 (--model.target_budget).")
        if isinstance(sampling, dict):  # read from a checkpoint
            sampling = DraftAndRevise(**sampling)
        self.save_hyperparameters(ignore=["sampling"])
        self.save_hyperparameters({"sampling": asdict(sampling)})  # a checkpoint holds plain types
        self.sampling = sampling
        t, h, w = self.latent_shape
        grid = (t, h, w) if position_init == "sinusoidal" else None
        self.num_classes = num_classes
        self.network = MeBT(
            codebook_size,
            t * h * w,
            dim,
            num_heads,
            num_latents,
            blocks,
            dropout,
            grid,
            init_std,
            num_classes=num_classes,
            gradient_checkpointing=gradient_checkpointing,
        )
        # Sizes are symbols: a graph serves all lengths and mask ratios, but for 0 and 1 tokens, which torch compiles
        # apart. The head and its loss stay outside: in how many parts they are computed depends on the size.
        self.features = torch.compile(MeBT.features, dynamic=True) if compile_network else MeBT.features

    # Training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mask a random part of the window and predict it; one mask ratio for the whole batch on all ranks."""
        if self.num_classes and batch_idx == 0:  # once an epoch: it waits for the device
            self.check_labels(batch["label"])
        codes, start = self.window_codes(batch)
        noise = self.random_noise(
            self.step_generator(MASK_ORDER_STREAM, batch_idx, device=self.device), len(codes), codes[0].numel()
        )
        window = mask_window(noise, self.random_masks(codes, batch_idx), self.hparams["target_budget"])
        nll = self.masked_nll(codes, start, window, self.labels(batch), self.hparams["label_smoothing"])
        loss = masked_token_loss(nll, window, self.hparams["rho_power"])
        self.tokens_per_batch = codes.numel()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/nll", target_mean(nll.detach(), window).mean())
        self.log("train/mask_ratio", torch.as_tensor(window.mask_ratio).mean())
        return loss

    def labels(self, batch: dict[str, Any]) -> Tensor | None:
        """The batch's classes `[B]`, for a model that has some."""
        return batch["label"] if self.num_classes else None

    def random_noise(self, generator: torch.Generator, batch_size: int, num_tokens: int) -> Tensor:
        """Noise `[B, N']` in [0, 1), drawn for the batch of all ranks, then sliced: its order is that of the tokens."""
        return self.sliced_by_rank(
            lambda size: torch.rand(size, num_tokens, device=self.device, generator=generator), batch_size
        )

    def random_masks(self, codes: Tensor, batch_idx: int) -> list[SampleMask]:
        """Draw how much of each clip `[B, t', h, w]` is masked; on the host, so that nothing waits for the device.

        What the batch shares is equal on all ranks; what each sample draws is drawn for all ranks, then sliced.
        """
        batch_size, frames = codes.shape[:2]
        frame_tokens = codes[0, 0].numel()

        def draws(per: str, stream: int, count: int) -> list[list[float]]:
            keys = (batch_idx,) if per == "sample" else ()
            generator = self.step_generator(stream, *keys)
            if per == "batch":
                return torch.rand(1, count, generator=generator).expand(batch_size, -1).tolist()
            return self.sliced_by_rank(lambda size: torch.rand(size, count, generator=generator), batch_size).tolist()

        lengths, starts = [frames] * batch_size, [0] * batch_size
        if self.hparams["length_per"] == "sample":
            drawn = draws("sample", SUBWINDOW_STREAM, 2)
            lengths = [1 + int(u * frames) for u, _ in drawn]
            starts = [int(v * (frames - length + 1)) for (_, v), length in zip(drawn, lengths, strict=True)]
        given = [0] * batch_size
        if self.hparams["prediction_share"] > 0:
            (chosen, where), *_ = draws("batch", GIVEN_STREAM, 2)
            if chosen < self.hparams["prediction_share"]:
                given = [1 + int(where * (length - 1)) if length > 1 else 0 for length in lengths]
        masks = []
        taus = draws(self.hparams["mask_ratio_per"], MASK_RATIO_STREAM, 1)
        for (tau,), length, start, known in zip(taus, lengths, starts, given, strict=True):
            masked = max(1, num_masked_tokens(self.hparams["mask_schedule"], tau, (length - known) * frame_tokens))
            masks.append(SampleMask(start * frame_tokens, length * frame_tokens, known * frame_tokens, masked))
        return masks

    def masked_nll(
        self,
        codes: Tensor,
        start: int,
        window: MaskedWindow,
        label: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy of masked tokens given the others.

        Args:
            codes: `[B, t', h, w]` codes of a window.
            start: The window's first latent frame in the clip; positions are absolute.
            window: Which of the window's tokens are context and which are targets.
            label: `[B]` classes, for a model that has some.
            label_smoothing: Share of the target that is spread over all codes.

        Returns:
            `[B, M]` nats.
        """
        flat = codes.flatten(1)  # [B, N']
        offset = start * codes[0, 0].numel()
        clip = F.pad(flat, (offset, self.network.num_tokens - offset - flat.shape[1]))  # [B, N]
        context, targets = window.context + offset, window.targets + offset
        features = self.features(self.network, clip, context, targets, label, window.keep)  # [B, M, D]
        return self.network.cross_entropy(features, clip.gather(1, targets), label_smoothing)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Cross-entropy at fixed mask ratios, over the full length and the same masks each time."""
        codes, start = self.window_codes(batch)
        num_tokens = codes[0].numel()
        total = torch.zeros((), device=self.device)
        for ratio in VALIDATION_MASK_RATIOS:
            generator = keyed_generator(self.seed, batch_idx, VALIDATION_STREAM, device=self.device)
            noise = self.random_noise(generator, len(codes), num_tokens)
            masks = [SampleMask(0, num_tokens, 0, round(ratio * num_tokens))] * len(codes)
            nll = self.masked_nll(codes, start, mask_window(noise, masks), self.labels(batch)).mean()
            total += nll / len(VALIDATION_MASK_RATIOS)
            self.log(f"val/nll_{ratio:.2f}", nll, batch_size=len(codes), sync_dist=True)
        self.log("val/loss", total, batch_size=len(codes), sync_dist=True, prog_bar=True)

    # Generation

    @torch.no_grad()
    def edit_codes(
        self,
        codes: Tensor,
        keep: Tensor,
        seeds: Tensor,
        sampling: DraftAndRevise | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """Keep some tokens of code maps and generate the others.

        Args:
            codes: `[B, t', h, w]` int64, at most as long as the model's clips; read where they are kept.
            keep: `[t', h, w]` or `[B, t', h, w]` bool, the tokens to keep: any set, of equal size in all samples.
            seeds: `[B]` int64; sample i depends on seed i alone.
            sampling: Settings; None takes the module's.
            label: `[B]` classes, for a model that has some.

        Returns:
            `[B, t', h, w]` codes.

        Raises:
            ValueError: If the shapes do not fit, or samples keep different numbers of tokens.
        """
        codes, keep = codes.to(self.device), keep.to(self.device)
        if codes.shape[1] > self.latent_shape[0] or codes.shape[2:] != self.latent_shape[1:]:
            raise ValueError(f"Codes are {tuple(codes.shape[1:])}: expected at most {self.latent_shape}.")
        if len(codes) != len(seeds) or keep.shape not in (codes.shape, codes.shape[1:]):
            raise ValueError(
                f"{len(seeds)} seeds, codes {tuple(codes.shape)} and keep {tuple(keep.shape)} do not fit each other."
            )
        is_kept = keep.expand(codes.shape).flatten(1)  # [B, N']
        counts = is_kept.sum(dim=1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"The samples keep {counts} tokens: expected as many of each.")
        order = (~is_kept).to(torch.uint8).argsort(dim=1, stable=True)  # those kept, in raster order, then the others
        context, targets = order.tensor_split([counts[0]], dim=1)
        label = self.checked_labels(label, len(seeds))

        def predict(codes: Tensor, context: Tensor, targets: Tensor) -> Tensor:
            return self.network.head(self.features(self.network, codes, context, targets, label))

        was_training = self.network.training
        self.network.eval()
        try:
            filled = draft_and_revise(
                predict,
                codes.flatten(1),
                context,
                targets,
                sampling or self.sampling,
                seeded_noise(seeds, self.device),
            )
        finally:
            self.network.train(was_training)
        return filled.view(codes.shape)

    def checked_labels(self, label: Tensor | None, num_samples: int) -> Tensor | None:
        """Return the labels on the model's device.

        Raises:
            ValueError: If they are no classes of the model, or as many as samples; or if there are no classes.
        """
        if not self.num_classes:
            if label is not None:
                raise ValueError("This MeBT is unconditional: generate it without a label.")
            return None
        if label is None or label.shape != (num_samples,) or label.min() < 0 or label.max() >= self.num_classes:
            came = "none" if label is None else label.tolist()
            raise ValueError(f"Labels are {came}: expected {num_samples} of the classes 0 to {self.num_classes - 1}.")
        return label.to(self.device)

    @torch.no_grad()
    def generate_codes(
        self,
        num_frames: int,
        seeds: Tensor,
        sampling: DraftAndRevise | None = None,
        label: Tensor | None = None,
        past: Tensor | None = None,
    ) -> Tensor:
        """Generate code maps `[B, t, h, w]` of any length.

        What is longer than the model's clips is made by a sliding window: it begins with the last `context_frames` of
        what is there, and fills the rest. The last window takes more of them, so that it is as long as the others.

        Args:
            num_frames: Pixel frames, a multiple of the tokenizer's factor; a clip's at most on a causal one.
            seeds: `[B]` int64; sample i depends on seed i alone.
            sampling: Settings; None takes the module's.
            label: `[B]` classes, for a model that has some.
            past: `[B, p, h, w]` codes that the video begins with, or None.

        Raises:
            ValueError: If the length does not fit, or leaves nothing to generate.
        """
        sampling = sampling or self.sampling
        (longest, h, w), factor = self.latent_shape, self.downsample[0]
        total = self.generated_latent_frames(num_frames)
        codes = torch.zeros(len(seeds), 0, h, w, dtype=torch.long, device=self.device) if past is None else past
        if past is not None and (len(past) != len(seeds) or past.shape[2:] != (h, w) or past.shape[1] >= total):
            raise ValueError(
                f"Past codes {tuple(past.shape)} do not begin {len(seeds)} videos of {(total, h, w)} codes."
            )
        overlap = max(1, longest // 2)
        if sampling.context_frames is not None:
            overlap = sampling.context_frames // factor
            if sampling.context_frames % factor or not 0 < overlap < longest:
                raise ValueError(
                    f"context_frames={sampling.context_frames} does not fit: expected a multiple of {factor} below "
                    f"{longest * factor} (--model.sampling.context_frames)."
                )
        windows = 0
        while (there := codes.shape[1]) < total:
            new = min(total - there, longest - min(overlap, there)) if longest > 1 else 1
            context = min(there, longest - new)
            window = F.pad(codes[:, there - context :], (0, 0, 0, 0, 0, new))
            keep = torch.zeros(context + new, h, w, dtype=torch.bool, device=self.device)
            keep[:context] = True
            # the first window has the samples' own seeds, the others further ones
            own = seeds if windows == 0 else torch.tensor([keyed_seed(seed, windows) for seed in seeds.tolist()])
            codes = torch.cat([codes, self.edit_codes(window, keep, own, sampling, label)[:, context:]], dim=1)
            windows += 1
        return codes

    def known_codes(self, video: Tensor, task: str, sampling: DraftAndRevise) -> tuple[Tensor, Tensor]:
        """Codes of what a task gives of clips; the rest of their pixels is not read.

        Given frames are encoded by themselves. Around a given region, the clip is padded as for COMMIT, and a token is
        kept if all of its pixels are given.

        Args:
            video: `[B, 3, T, H, W]` in [-1, 1].
            task: One of `EDITING_TASKS`.
            sampling: Says how many frames are given.

        Returns:
            Codes `[B, t', h, w]`, and which of them to keep `[t', h, w]`.

        Raises:
            ValueError: If the given frames are no latent frames, or leave nothing to generate; if the tokenizer is
                causal.
        """
        if self.causal:
            raise ValueError(
                f"The task {task} needs a time-agnostic tokenizer: codes of a causal one depend on all frames before "
                "them. What begins a video can be given without a task: Condition(video=...)."
            )
        factor, frames = self.downsample[0], video.shape[2]
        keep = torch.zeros(frames // factor, *self.latent_shape[1:], dtype=torch.bool, device=self.device)
        if task not in ("frame_prediction", "frame_interpolation"):
            known = known_region(task, tuple(video.shape[2:]))  # type: ignore[arg-type]
            t, h, w = self.downsample
            keep = reduce(known, "(t dt) (h dh) (w dw) -> t h w", "all", dt=t, dh=h, dw=w)
            return self.encode_video(padded_video(video, task)), keep  # type: ignore[arg-type]
        given = sampling.given_frames or factor
        ends = 1 if task == "frame_prediction" else 2
        if given % factor or not 0 < ends * given < frames:
            raise ValueError(
                f"given_frames={given} does not fit: expected a multiple of {factor} that leaves some of {frames} "
                "frames to generate (--model.sampling.given_frames)."
            )
        codes = torch.zeros(len(video), *keep.shape, dtype=torch.long, device=self.device)
        runs = [slice(0, given), slice(frames - given, frames)][:ends]
        for run in runs:
            latent = slice(run.start // factor, run.stop // factor)
            codes[:, latent], keep[latent] = self.encode_video(video[:, :, run]), True
        return codes, keep

    @torch.no_grad()
    def generate(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: DraftAndRevise | None = None
    ) -> Tensor:
        """Generate videos: from nothing, from frames to go on with, or from what a task gives of clips.

        Args:
            condition: `label` `[B]` for a model with classes. `video`: frames that the video begins with, whole latent
                frames of them; with a `task`, one of `EDITING_TASKS`, clips of which the task gives a part.
            num_frames: Pixel frames, a multiple of the tokenizer's factor; what is longer than the model's clips is
                made by sliding, from nothing, from past frames or for the task frame_prediction.
            seeds: `[B]` int64; sample i depends on seed i and row i of the condition alone.
            sampling: Settings; None takes the module's.

        Returns:
            `[B, 3, T, H, W]` in [-1, 1].

        Raises:
            ValueError: If condition or length do not fit.
        """
        return self.decode_codes(self.codes_for(condition, num_frames, seeds, sampling or self.sampling))

    def iter_generate(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: DraftAndRevise | None = None
    ) -> Iterator[Tensor]:
        """Generate all codes, then the pixels in pieces, at constant memory; arguments and errors as of `generate`."""
        return self.iter_decode(self.codes_for(condition, num_frames, seeds, sampling or self.sampling))

    def codes_for(self, condition: Condition, num_frames: int, seeds: Tensor, sampling: DraftAndRevise) -> Tensor:
        """Return the codes `[B, t, h, w]` of what `generate` makes."""
        task, video, label = self.checked_task(condition.task), condition.video, condition.label
        if task is None:
            first_frames = condition.first_frames()
            past = None if first_frames is None else self.encode_video(first_frames.to(self.device))
            return self.generate_codes(num_frames, seeds, sampling, label, past)
        if video is None:
            raise ValueError(f"The task {task} needs the clips that it gives a part of: Condition(video=...).")
        codes, keep = self.known_codes(video.to(self.device), task, sampling)
        if task == "frame_prediction":
            past = codes[:, : int(keep[:, 0, 0].sum())]
            return self.generate_codes(num_frames, seeds, sampling, label, past)
        if num_frames != video.shape[2]:
            raise ValueError(
                f"num_frames={num_frames} does not fit the task {task}: its clips have {video.shape[2]} frames."
            )
        return self.edit_codes(codes, keep, seeds, sampling, label)

    def checked_task(self, task: str | None, label: int | None = None) -> str | None:
        """Return the task; None is generation from nothing.

        Raises:
            ValueError: If there is no such task, or a label is given that is no class of the model.
        """
        if task is not None and task not in EDITING_TASKS:
            raise ValueError(f"task={task} is none of MeBT's (--task): {', '.join(EDITING_TASKS)}.")
        if label is not None:
            if not self.num_classes:
                return super().checked_task(None, label)
            self.checked_labels(torch.tensor([label]), 1)
        return task

    def needs_clips(self, task: str | None) -> bool:
        """Whether the task gives a part of clips."""
        return task is not None

    def sample_videos(self, batch: dict[str, Any], seeds: Tensor) -> Tensor:
        """Videos for a callback to show, of the batch's classes if there are some: `[len(seeds), 3, T, H, W]`."""
        label = self.labels(batch)
        return self.generate(Condition(None if label is None else label[: len(seeds)]), self.num_frames, seeds)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Generate the videos of the seeds in the batch; without a label, seed s has class s modulo their number."""
        seeds = batch["seeds"]
        label = self.labels({"label": seeds % max(1, self.num_classes)} | batch)
        condition = Condition(label, batch.get("video"), batch["task"])
        return {"seeds": seeds, "pieces": self.iter_generate(condition, batch["num_frames"], seeds)}
