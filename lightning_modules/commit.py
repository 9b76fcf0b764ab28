"""MAGVIT's second stage: COMMIT, one masked transformer for ten tasks (CVPR 2023).

Where the paper is in the code:

    3.1, 3D-VQ tokenizer                     `models.tokenizers.magvit`, trained by `VQGAN3DModule`
    3.1, central inflation                   `models.tokenizers.inflation.inflate` (`--model.inflate_from`)
    3.2 and B.1, interior conditions         `models.priors.tasks`: `known_region`, `padded_video`, `condition_tokens`
    3.2, Eq. 4, multivariate mask            `models.priors.commit.multivariate_mask`; latent masking `latent_mask`
    3.2, Eq. 5, refine, mask, reconstruct    `models.priors.commit.commit_loss`; which parts `LOSS_PARTS`
    table 8, transformer with its prefix     `COMMIT`, `COMMIT.prefix`, `COMMIT.embed`
    multi-task training                      `COMMITModule.training_step`, `random_mask`, `condition_codes`
    algorithm 1 and B.3, decoding            `commit_decode`, settings `COMMITDecoding`
    MAGVIT-v2, codes in parts                `split_codes`, `join_codes`, `--model.token_groups`
    masks of one's own, longer videos (ours) `COMMITModule.padded`, `whole_clips`, `generate`
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
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
from models.priors.commit import (
    COMMIT,
    LOSS_PARTS,
    MAX_PROMPTS,
    COMMITDecoding,
    COMMITSchedule,
    LossPart,
    Masking,
    commit_decode,
    commit_loss,
    latent_mask,
    multivariate_mask,
    num_corrupted_tokens,
)
from models.priors.decoding import seeded_noise
from models.priors.tasks import (
    BLACK_TASKS,
    CLASS_TASKS,
    EMPTY_TASKS,
    SHARED_PROMPTS,
    SHORT_NAMES,
    TASKS,
    Task,
    blackened,
    closest_task,
    condition_tokens,
    known_region,
    padded_video,
    supervoxel_condition,
)
from models.random import keyed_generator, keyed_seed

TASK_STREAM, CONDITION_DROPOUT_STREAM, EXTENSION_STREAM = 41, 42, 43


class COMMITModule(VideoGenerator):
    """Trains and samples COMMIT. The defaults are MAGVIT-B for class-conditional UCF-101.

    Args:
        tokenizer: Path of the frozen tokenizer: a bundle made by `longtake export`, or a checkpoint.
        num_frames: Pixel frames of a clip (linked to data.num_frames).
        resolution: Height and width of the video (linked to data.resolution).
        downsample: Pixel frames, rows and columns that one code covers.
        codebook_size: Number of codes of the tokenizer.
        tasks: What is trained, one drawn for each step. A model with several has a prompt for the task.
        task_weights: How often each is drawn, relative to the others; null draws all alike.
        num_classes: Classes of the data; 0 for a model of unlabelled tasks.
        past_frames: Pixel frames given in frame prediction.
        condition_mask: Which tokens carry a condition: by the paper's supervoxel rule, or by the latent masks that the
            release has (published numbers).
        prompts: Each task its `own`, or four `shared` ones, as the release has.
        mask_ratio_per: Whether each sample draws a mask ratio, or the batch draws one, as the release does.
        mask_schedule: How the mask ratio depends on a uniform draw.
        masking: How tokens of a condition come in: `multivariate` refines them (COMMIT); `latent` keeps them (MaskGIT)
            and `prefix` puts them before the others, for comparison.
        losses: Which tokens are trained: those of the condition, the masked ones, those that the input shows. All are
            in the paper's method; fewer are for comparison.
        condition_dropout: Share of the samples that are trained without class and condition, for guidance; 0 as
            published.
        dim: Width of the transformer.
        depth: Layers.
        num_heads: Attention heads.
        dropout: Dropout of embeddings, attention and MLPs.
        init_std: Standard deviation of initial weights and embeddings; the paper's 0.02 is for widths from 768 on.
        token_groups: Parts that a code is made of, each with an embedding and an output layer of its own: 2 for the
            2^18 codes of MAGVIT-v2.
        causal: Whether the tokenizer gives the first frame a latent frame of its own.
        frame_rate: Frames a second of the videos it is trained on, before data.frame_stride; videos of another rate are
            refused by `sample --input`. Null takes any.
        label_smoothing: Share of the target that is spread over all codes.
        lr: Learning rate, as given: not rescaled by GPUs or batch size.
        betas: AdamW's betas.
        muon_lr: Learning rate of Muon for the matrices of the blocks, which AdamW leaves to it then; 0 for AdamW
            alone, as in the paper. About 0.02 where a run lasts minutes.
        weight_decay: Weight decay of Linear weights; nothing else decays.
        warmup_steps: Steps of linear warm-up; a half cosine leads to zero at trainer.max_steps.
        sampling: Decoding: steps, schedule, temperatures, filters.
        seed: Keys every random draw of training (linked to seed_everything).

    Raises:
        ValueError: If there is no task or one twice, or one that needs what the model lacks.
    """

    edits_videos = True

    def __init__(
        self,
        tokenizer: str,
        num_frames: int,
        resolution: int,
        downsample: tuple[int, int, int] = (4, 8, 8),
        codebook_size: int = 1024,
        tasks: Sequence[Task] = ("class_conditional",),
        task_weights: Sequence[float] | None = None,
        num_classes: int = 101,
        past_frames: int = 1,
        condition_mask: Literal["supervoxel", "released"] = "supervoxel",
        prompts: Literal["own", "shared"] = "own",
        mask_ratio_per: Literal["sample", "batch"] = "sample",
        mask_schedule: COMMITSchedule = "cosine",
        masking: Masking = "multivariate",
        losses: Sequence[LossPart] = tuple(LOSS_PARTS),
        condition_dropout: float = 0.0,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        dropout: float = 0.1,
        init_std: float = 0.02,
        token_groups: int = 1,
        causal: bool = False,
        frame_rate: float | None = None,
        label_smoothing: float = 1e-4,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.96),
        muon_lr: float = 0.0,
        weight_decay: float = 0.045,
        warmup_steps: int = 5000,
        sampling: COMMITDecoding = COMMITDecoding(),
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, num_frames, resolution, downsample, codebook_size, seed, causal)
        if isinstance(sampling, dict):  # read from a checkpoint
            sampling = COMMITDecoding(**sampling)
        weights = [1.0] * len(tasks) if task_weights is None else list(task_weights)
        # a checkpoint holds plain types
        plain: dict[str, Any] = {"sampling": asdict(sampling), "tasks": list(tasks), "losses": list(losses)}
        plain["task_weights"] = None if task_weights is None else weights
        self.save_hyperparameters(ignore=list(plain))
        self.save_hyperparameters(plain)
        self.sampling = sampling
        self.tasks = tuple(tasks)
        self.num_classes = num_classes
        self.class_conditional = all(task in CLASS_TASKS for task in tasks)
        self.frame_rate = frame_rate
        self.clip_shape = (num_frames, resolution, resolution)
        if not tasks or len(set(tasks)) < len(tasks):
            raise ValueError(f"tasks={list(tasks)}: expected different ones, at least one (--model.tasks).")
        if len(weights) != len(tasks) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"task_weights={weights}: expected a number for each of {len(tasks)} tasks, none negative, not all "
                "zero (--model.task_weights)."
            )
        self.task_weights = torch.tensor(weights, dtype=torch.float32)
        if not losses or set(losses) - set(LOSS_PARTS):
            raise ValueError(f"losses={list(losses)}: expected some of {', '.join(LOSS_PARTS)} (--model.losses).")
        if not 0 <= condition_dropout < 1:
            raise ValueError(f"condition_dropout={condition_dropout}: expected 0 to 1 (--model.condition_dropout).")
        for task in tasks:
            self.condition_tokens(task)  # raises if the task does not fit the clip
            if task in CLASS_TASKS and not num_classes:
                raise ValueError(f"The task {task} needs classes: give their number (--model.num_classes).")
        num_tokens = self.latent_shape[0] * self.latent_shape[1] * self.latent_shape[2]
        num_prompts = MAX_PROMPTS if len(tasks) > 1 else 0
        self.network = COMMIT(
            codebook_size,
            num_tokens,
            num_classes,
            num_prompts,
            dim,
            depth,
            num_heads,
            dropout,
            init_std,
            token_groups,
            masking,
        )

    # Tasks

    def prompt(self, task: Task) -> int:
        """Number of the task's prompt."""
        if self.hparams["prompts"] == "own":
            return TASKS.index(task)
        return list(dict.fromkeys(SHARED_PROMPTS.values())).index(SHARED_PROMPTS[task])

    def condition_tokens(self, task: Task) -> Tensor:
        """Tokens that carry the task's condition: `[N]` bool."""
        return condition_tokens(
            task,
            self.latent_shape,
            self.downsample,
            self.hparams["condition_mask"],
            self.hparams["past_frames"],
            self.device,
            self.hparams["causal"],
        ).flatten()

    def clip_codes(self, batch: dict[str, Any]) -> Tensor:
        """Codes of whole clips `[B, N]`, from pixels or from a cache.

        Raises:
            ValueError: If the clips are shorter than the model's: positions are learned for whole ones.
        """
        codes, _ = self.window_codes(batch)
        if codes.shape[1:] != self.latent_shape:
            raise ValueError(
                f"COMMIT trains on whole clips, of {self.latent_shape} codes; this batch has {tuple(codes.shape[1:])}. "
                "Leave out the curriculum (--curriculum.schedule=longest)."
            )
        return codes.flatten(1)

    @torch.no_grad()
    def condition_codes(self, batch: dict[str, Any], task: Task, batch_size: int) -> Tensor:
        """Codes `[B, N]` of the task's padded video, from pixels or from a cache; zero where the task gives nothing.

        Raises:
            ValueError: If the task gives pixels and the batch has neither them nor the condition's codes.
        """
        if task in EMPTY_TASKS:
            return torch.zeros(batch_size, self.network.num_tokens, dtype=torch.long, device=self.device)
        if f"task/{task}" in batch:
            return batch[f"task/{task}"].flatten(1)
        if "video" not in batch:
            raise ValueError(
                f"The task {task} needs the codes of a padded video, and this batch has neither pixels nor "
                f"`task/{task}`: tokenize with this experiment, which keeps them, or give a data module with pixels "
                "(--data)."
            )
        return self.encode_video(padded_video(batch["video"], task, self.hparams["past_frames"])).flatten(1)

    def conditions(self, tasks: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Return the tasks that give pixels, each with what its padded video depends on besides the clip."""
        chosen = self.tasks if tasks is None else [self.checked_task(task) for task in tasks]
        return {
            task: {"past_frames": self.hparams["past_frames"]} if "prediction" in task else {}
            for task in chosen
            if task not in EMPTY_TASKS
        }

    # Training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Corrupt clips for one task, the same on all ranks, and predict all their codes."""
        if self.num_classes and batch_idx == 0:  # once an epoch: it waits for the device
            self.check_labels(batch["label"])
        number = self.task_weights.multinomial(1, generator=self.step_generator(TASK_STREAM))  # on the host: no sync
        codes = self.clip_codes(batch)
        coin_generator = self.step_generator(CONDITION_DROPOUT_STREAM, batch_idx)
        coins = self.sliced_by_rank(lambda size: torch.rand(size, generator=coin_generator), len(codes))
        is_dropped = (coins < self.hparams["condition_dropout"]).to(self.device, non_blocking=True)
        mask = self.random_mask(
            len(codes),
            self.step_generator(MASK_RATIO_STREAM, batch_idx),
            self.step_generator(MASK_ORDER_STREAM, batch_idx, device=self.device),
        )
        task = self.tasks[int(number)]
        nll, kinds = self.token_nll(batch, task, codes, mask, self.hparams["label_smoothing"], is_dropped)
        loss, parts = commit_loss(nll, kinds, self.hparams["losses"])
        self.tokens_per_batch = codes.numel()
        self.log("train/loss", loss, prog_bar=True)
        for name, part in parts.items():
            self.log(f"train/{name}", part.detach())
            self.log(f"train/{name}_tokens", (kinds == LOSS_PARTS[name]).float().mean())
        self.log("train/corrupted", mask[0].float().mean() / codes.shape[1])
        return loss

    def random_mask(
        self, batch_size: int, ratio_generator: torch.Generator, score_generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """How many tokens are corrupted `[B]` and scores that say which `[B, N]`, by the mask schedule.

        Both are drawn for the batch of all ranks, then sliced.
        """
        num_tokens = self.network.num_tokens

        def ratios(size: int) -> Tensor:
            count = size if self.hparams["mask_ratio_per"] == "sample" else 1
            return torch.rand(count, generator=ratio_generator).expand(size)

        counts = [
            num_corrupted_tokens(self.hparams["mask_schedule"], u, num_tokens)
            for u in self.sliced_by_rank(ratios, batch_size).tolist()
        ]
        scores = self.sliced_by_rank(
            lambda size: torch.rand(size, num_tokens, device=self.device, generator=score_generator), batch_size
        )
        return torch.tensor(counts).to(self.device, non_blocking=True), scores

    def token_nll(
        self,
        batch: dict[str, Any],
        task: Task,
        codes: Tensor,
        mask: tuple[Tensor, Tensor],
        label_smoothing: float = 0.0,
        is_dropped: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of all tokens of corrupted clips.

        Args:
            batch: Has the clips' `video` (or, from a cache, the condition's codes `task/...`) and `label`, where the
                task needs them.
            task: Which task.
            codes: `[B, N]` clean codes.
            mask: What `random_mask` returns.
            label_smoothing: Share of the target that is spread over all codes.
            is_dropped: `[B]` bool, samples that go without class and condition.

        Returns:
            Nats and what the input held (see `multivariate_mask`), each `[B, N]`.
        """
        logits, kinds = self.predictions(batch, task, codes, mask, is_dropped)
        return self.network.nll(logits, codes, label_smoothing), kinds

    def predictions(
        self,
        batch: dict[str, Any],
        task: Task,
        codes: Tensor,
        mask: tuple[Tensor, Tensor],
        is_dropped: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits `[B, N, G, V]` of corrupted clips, and what the input held `[B, N]`; see `token_nll`."""
        count, scores = mask
        mask_id = self.network.mask_id
        condition = self.condition_codes(batch, task, len(codes))
        is_condition = self.condition_tokens(task).expand_as(codes)
        label = batch["label"] if task in CLASS_TASKS else None
        if is_dropped is not None:
            is_condition = is_condition & ~is_dropped[:, None]
            label = None if label is None else label.masked_fill(is_dropped, self.num_classes)  # "no class"
        prefix: tuple[Tensor, ...] = ()
        if self.network.masking == "latent":
            tokens, kinds = latent_mask(codes, is_condition, scores, count, mask_id)
        elif self.network.masking == "prefix":
            tokens, kinds = multivariate_mask(codes, codes, torch.zeros_like(is_condition), scores, count, mask_id)
            prefix = (condition.where(is_condition, mask_id),)
        else:
            tokens, kinds = multivariate_mask(codes, condition, is_condition, scores, count, mask_id)
        return self.network(tokens, label, self.prompt(task), *prefix), kinds

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The training loss of each task without smoothing, with the same masks each time, and the mean over tasks.

        Whatever is trained (`losses`), all tokens count, but those that latent masking gives.
        """
        if self.num_classes:
            self.check_labels(batch["label"])
        codes = self.clip_codes(batch)
        mask = self.random_mask(
            len(codes),
            keyed_generator(self.seed, batch_idx, VALIDATION_STREAM, MASK_RATIO_STREAM),
            keyed_generator(self.seed, batch_idx, VALIDATION_STREAM, MASK_ORDER_STREAM, device=self.device),
        )
        total = torch.zeros((), device=self.device)
        for task in self.tasks:
            loss, _ = commit_loss(*self.token_nll(batch, task, codes, mask))
            total += loss / len(self.tasks)
            self.log(f"val/loss_{task}", loss, batch_size=len(codes), sync_dist=True)
        self.log("val/loss", total, batch_size=len(codes), sync_dist=True, prog_bar=True)

    # Generation

    def checked_task(self, task: str | None, label: int | None = None) -> Task:
        """Return the task to generate for, also by its short name; None takes the model's first.

        A model of one task has no prompt and can be asked for any other, as in table 4 of the paper.

        Raises:
            ValueError: If the model has no such task, or a label is given that is no class of it.
        """
        known = self._possible_tasks()
        wanted = self.tasks[0] if task is None else SHORT_NAMES.get(task, task)
        found = next((name for name in known if name == wanted), None)
        if found is None:
            raise ValueError(f"task={task} is none of this model's (--task): {', '.join(known)}.")
        if label is not None:
            if found not in CLASS_TASKS:
                raise ValueError(f"label={label}: the task {found} has no classes (--label, --task).")
            self.check_labels(torch.tensor([label]), "--label, --model.num_classes")
        return found

    def _possible_tasks(self) -> tuple[Task, ...]:
        known = TASKS if len(self.tasks) == 1 else self.tasks
        return tuple(name for name in known if self.num_classes or name not in CLASS_TASKS)

    def needs_clips(self, task: str | None) -> bool:
        """Whether the task gives pixels."""
        return self.checked_task(task) not in EMPTY_TASKS

    def known_frames(self, task: str | None) -> int:
        """Frames up to the last one of which the task gives pixels."""
        return self._last_known(known_region(self.checked_task(task), self.clip_shape, self.hparams["past_frames"]))

    def _last_known(self, known: Tensor) -> int:
        return int(known.flatten(-2).any(-1).reshape(-1, self.num_frames).any(0).nonzero().max()) + 1

    def task_of(self, condition: Condition) -> Task:
        """The task of a condition: the one that it names, or of the model's the most like its own mask.

        A mask that is a task's is taken for that. Others have black padding, which the tasks know that move, or lie
        inside; of these, if the model has some, the most similar one lends its prompt.
        """
        if condition.task is not None or condition.known is None:
            return self.checked_task(condition.task)
        tasks = [
            task
            for task in self._possible_tasks()
            if task not in EMPTY_TASKS and (task in CLASS_TASKS) == (condition.label is not None)
        ]
        if not tasks:
            raise ValueError(f"This model takes no pixels{'' if condition.label is None else ' with a label'}.")
        known, past_frames = condition.known, self.hparams["past_frames"]
        closest = closest_task(known, tasks, past_frames)
        if (known_region(closest, self.clip_shape, past_frames, known.device) == known).all():
            return closest  # the mask is a task's
        return closest_task(known, [task for task in tasks if task in BLACK_TASKS] or tasks, past_frames)

    def whole_clips(self, condition: Condition) -> Condition:
        """Check a condition's pixels and mask against the model, and bring them to the length of a clip.

        Returns:
            The condition with its task named, `video` `[B, 3, T, H, W]` on the model's device, and `known` if a mask
            of the user's own was given.

        Raises:
            ValueError: If task, pixels and mask do not fit each other or the model.
        """
        video, known = condition.video, condition.known
        if known is not None:
            if video is None or known.dtype != torch.bool or known.ndim not in (3, 4):
                raise ValueError("`known` says which pixels of a video are known: [T, H, W] or [B, T, H, W] bool.")
            if known.shape[-3:] != video.shape[-3:] or (known.ndim == 4 and len(known) != len(video)):
                raise ValueError(
                    f"The mask has shape {tuple(known.shape)}, and the video has {len(video)} clips of "
                    f"{tuple(video.shape[2:])} frames, rows and columns."
                )
            missing = max(0, self.num_frames - known.shape[-3])
            known = F.pad(known, (0, 0, 0, 0, 0, missing)).to(self.device)
            if known.all() or not known.any():
                raise ValueError(
                    f"The mask says that {'all' if known.all() else 'none'} of the pixels are known: expected some "
                    "that are, and some to be made (--mask)."
                )
            condition = replace(condition, known=known)
        task = self.task_of(condition)
        if (video is None) != (task in EMPTY_TASKS):
            raise ValueError(f"The task {task} is generated with{'out' if task in EMPTY_TASKS else ''} a video.")
        if video is not None:
            region = known_region(task, self.clip_shape, self.hparams["past_frames"], self.device)
            if known is not None and (known == region).all():  # the task itself, with its own padding
                condition = replace(condition, known=None)
            needed = self._last_known(region if known is None else known)
            frames, *size = video.shape[2:]
            if tuple(size) != self.clip_shape[1:] or not needed <= frames <= self.num_frames:
                enough = f"{needed} to {self.num_frames}" if needed < self.num_frames else str(needed)
                raise ValueError(
                    f"Expected video of {enough} frames, {self.clip_shape[1]} x {self.clip_shape[2]} pixels, for the "
                    f"task {task}; got {frames} frames of {' x '.join(map(str, size))}."
                )
            video = torch.cat([video, video[:, :, -1:].expand(-1, -1, self.num_frames - frames, -1, -1)], dim=2)
            video = video.to(self.device)
        return replace(condition, task=task, video=video)

    def padded(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """What the tokenizer is shown for a condition from `whole_clips`, and which of it is known.

        Returns:
            `[B, 3, T, H, W]` in [-1, 1], and `[T, H, W]` or `[B, T, H, W]` bool.
        """
        task, past_frames = self.checked_task(condition.task), self.hparams["past_frames"]
        assert condition.video is not None
        if condition.known is not None:
            return blackened(condition.video, condition.known), condition.known
        return padded_video(condition.video, task, past_frames), known_region(
            task, self.clip_shape, past_frames, self.device
        )

    @torch.no_grad()
    def generate_codes(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: COMMITDecoding | None = None
    ) -> Tensor:
        """Generate code maps `[B, t, h, w]` of a clip; the arguments are those of `generate`."""
        if num_frames != self.num_frames:
            raise ValueError(f"num_frames={num_frames}: this model makes codes of clips of {self.num_frames} frames.")
        condition = self.whole_clips(condition)
        task, label = self.checked_task(condition.task), condition.label
        if (label is not None) != (task in CLASS_TASKS):
            raise ValueError(f"The task {task} is generated with{'' if task in CLASS_TASKS else 'out'} a label.")
        for name, value in (("label", label), ("video", condition.video)):
            if value is not None and len(value) != len(seeds):
                raise ValueError(f"{len(seeds)} seeds were given, and a condition whose {name} has {len(value)} rows.")
        if label is not None:
            self.check_labels(label)
            label = label.to(self.device)
        codes, is_condition = self.condition_codes({}, "unconditional", len(seeds)), self.condition_tokens(task)
        if condition.video is not None:
            video, known = self.padded(condition)
            codes = self.encode_video(video).flatten(1)
            if condition.known is not None:
                tokens = supervoxel_condition(known, self.downsample, self.hparams["causal"])  # [..., t, h, w]
                is_condition = tokens.flatten(-3)
        was_training = self.network.training
        self.network.eval()
        try:
            codes = commit_decode(
                self.network,
                codes,
                is_condition,
                sampling or self.sampling,
                seeded_noise(seeds, self.device),
                label,
                self.prompt(task),
                self.prompt("unconditional") if "unconditional" in self.tasks else None,
            )
        finally:
            self.network.train(was_training)
        return codes.unflatten(1, self.latent_shape)

    def generate(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: COMMITDecoding | None = None
    ) -> Tensor:
        """Generate videos (MAGVIT, algorithm 1); longer ones than a clip by predicting frames, again and again.

        Args:
            condition: The task (None takes the model's first), the classes of a class-conditional one, the video of
                one with known pixels. What is not known of the video is not read. `known` is a mask of any form.
            num_frames: Pixel frames: those of a clip, or more for a model that was trained to predict frames.
            seeds: `[B]` int64; sample i depends on seed i and row i of the condition alone.
            sampling: Decoding settings; None takes the module's.

        Returns:
            `[B, 3, T, H, W]` in [-1, 1].

        Raises:
            ValueError: If condition and task do not fit each other or the model, or the length does not.
        """
        sampling = sampling or self.sampling
        extension = self._extension_task(num_frames, condition.label)
        video = self.decode_codes(self.generate_codes(condition, self.num_frames, seeds, sampling))
        if sampling.paste_known and condition.video is not None:
            condition = self.whole_clips(condition)
            _, known = self.padded(condition)
            assert condition.video is not None
            video = torch.where(known if known.ndim == 3 else known[:, None], condition.video.to(video), video)
        past = self.hparams["past_frames"]
        while video.shape[2] < num_frames:
            keys = [keyed_seed(seed, video.shape[2], EXTENSION_STREAM) for seed in seeds.tolist()]
            label = condition.label if extension in CLASS_TASKS else None
            first_frames = Condition(label, video[:, :, -past:], extension)
            codes = self.generate_codes(first_frames, self.num_frames, torch.tensor(keys), sampling)
            video = torch.cat([video, self.decode_codes(codes)[:, :, past:]], dim=2)
        return video[:, :, :num_frames]

    def _extension_task(self, num_frames: int, label: Tensor | None) -> Task | None:
        """The task that makes a video longer than a clip: None if it need not be longer."""
        if num_frames == self.num_frames:
            return None
        tasks = ("frame_prediction",) if label is None else ("class_frame_prediction", "frame_prediction")
        for task in tasks:
            if num_frames > self.num_frames and task in self.tasks:
                return task
        raise ValueError(
            f"num_frames={num_frames} cannot be generated: this model makes clips of {self.num_frames} frames, and "
            "longer videos only if frame_prediction is among its tasks (--num_frames, --model.tasks)."
        )

    def condition(self, batch: dict[str, Any], task: Task, rows: slice = slice(None)) -> Condition:
        """The condition that rows of a batch hold for a task."""
        return Condition(
            label=batch["label"][rows] if task in CLASS_TASKS else None,
            video=batch["video"][rows] if task not in EMPTY_TASKS else None,
            task=task,
            known=batch.get("known"),
        )

    def sample_videos(self, batch: dict[str, Any], seeds: Tensor) -> Tensor:
        """Videos for a callback to show, from the clips of the batch, for one task after the other.

        Where the batch holds codes, what a task gives is taken from the video that they decode to.
        """
        if "video" not in batch:
            batch = batch | {"video": self.decode_codes(batch["codes"])}
        video = torch.empty(len(seeds), 3, *self.clip_shape, device=self.device)
        for first, task in enumerate(self.tasks[: len(seeds)]):
            rows = slice(first, len(seeds), len(self.tasks))
            video[rows] = self.generate(self.condition(batch, task, rows), self.num_frames, seeds[rows])
        return video

    def sample_captions(self, batch: dict[str, Any], count: int) -> list[tuple[str, str]]:
        """The task of each of the first videos of `sample_videos`, and task and class as its caption."""
        tasks = [self.tasks[row % len(self.tasks)] for row in range(count)]
        labels = batch["label"].tolist() if any(task in CLASS_TASKS for task in tasks) else []
        return [
            (task, f"{task}, class {labels[row]}" if task in CLASS_TASKS else task) for row, task in enumerate(tasks)
        ]

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Generate the videos of the seeds in the batch; without a label, seed i has class i modulo their number.

        Returns:
            `seeds`, `pieces`, and where pixels are known `condition` `[B, 3, T, H, W]`, as the tokenizer is shown it,
            and `known` `[B, T, H, W]`.
        """
        num_frames = batch["num_frames"]
        batch = {"label": batch["seeds"] % max(1, self.num_classes)} | batch
        if batch.get("known") is not None and batch["task"] is None:
            batch["task"] = self.whole_clips(Condition(video=batch["video"], known=batch["known"])).task
        request = self.condition(batch, self.checked_task(batch["task"]))
        made = {"seeds": batch["seeds"], "pieces": self.iter_generate(request, num_frames, batch["seeds"])}
        if request.video is not None:
            shown, known = self.padded(self.whole_clips(request))
            rest = num_frames - self.num_frames  # of which nothing is known
            made["condition"] = F.pad(shown, (0, 0, 0, 0, 0, rest), value=-1.0)
            made["known"] = F.pad(known.expand(len(shown), *self.clip_shape), (0, 0, 0, 0, 0, rest))
        return made
