"""MAGVIT's second stage: COMMIT, one masked transformer for ten tasks (CVPR 2023)."""

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
from models.priors.commit import (
    COMMIT,
    MAX_PROMPTS,
    COMMITDecoding,
    commit_decode,
    commit_loss,
    multivariate_mask,
    num_corrupted_tokens,
)
from models.priors.decoding import seeded_noise
from models.priors.tasks import (
    CLASS_TASKS,
    EMPTY_TASKS,
    SHARED_PROMPTS,
    TASKS,
    Task,
    condition_tokens,
    known_region,
    padded_video,
)
from models.random import keyed_generator

TASK_STREAM = 41


class COMMITModule(VideoGenerator):
    """Trains and samples COMMIT. The defaults are MAGVIT-B for class-conditional UCF-101.

    Args:
        tokenizer: Path of the frozen tokenizer: a bundle made by `longtake export`, or a checkpoint.
        num_frames: Pixel frames of a clip (linked to data.num_frames).
        resolution: Height and width of the video (linked to data.resolution).
        downsample: Pixel frames, rows and columns that one code covers.
        codebook_size: Number of codes of the tokenizer.
        tasks: What is trained, one drawn for each step. A model with several has a prompt for the task.
        num_classes: Classes of the data; 0 for a model of unlabelled tasks.
        past_frames: Pixel frames given in frame prediction.
        condition_mask: Which tokens carry a condition: by the paper's supervoxel rule, or by the latent masks that the
            release has (published numbers).
        prompts: Each task its `own`, or four `shared` ones, as the release has.
        mask_ratio_per: Whether each sample draws a mask ratio, or the batch draws one, as the release does.
        dim: Width of the transformer.
        depth: Layers.
        num_heads: Attention heads.
        dropout: Dropout of embeddings, attention and MLPs.
        init_std: Standard deviation of initial weights and embeddings; the paper's 0.02 is for widths from 768 on.
        label_smoothing: Share of the target that is spread over all codes.
        lr: Learning rate, as given: not rescaled by GPUs or batch size.
        betas: AdamW's betas.
        weight_decay: Weight decay of Linear weights; nothing else decays.
        warmup_steps: Steps of linear warm-up; a half cosine leads to zero at trainer.max_steps.
        sampling: Decoding: steps, schedule, temperatures, filters.
        seed: Keys every random draw of training (linked to seed_everything).

    Raises:
        ValueError: If there is no task or one twice, or one that needs what the model lacks.
    """

    def __init__(
        self,
        tokenizer: str,
        num_frames: int,
        resolution: int,
        downsample: tuple[int, int, int] = (4, 8, 8),
        codebook_size: int = 1024,
        tasks: Sequence[Task] = ("class_conditional",),
        num_classes: int = 101,
        past_frames: int = 1,
        condition_mask: Literal["supervoxel", "released"] = "supervoxel",
        prompts: Literal["own", "shared"] = "own",
        mask_ratio_per: Literal["sample", "batch"] = "sample",
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        dropout: float = 0.1,
        init_std: float = 0.02,
        label_smoothing: float = 1e-4,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.96),
        weight_decay: float = 0.045,
        warmup_steps: int = 5000,
        sampling: COMMITDecoding = COMMITDecoding(),
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, num_frames, resolution, downsample, codebook_size, seed)
        if isinstance(sampling, dict):  # read from a checkpoint
            sampling = COMMITDecoding(**sampling)
        self.save_hyperparameters(ignore=["sampling", "tasks"])
        self.save_hyperparameters({"sampling": asdict(sampling), "tasks": list(tasks)})  # a checkpoint: plain types
        self.sampling = sampling
        self.tasks = tuple(tasks)
        self.num_classes = num_classes
        self.class_conditional = all(task in CLASS_TASKS for task in tasks)
        self.clip_shape = (num_frames, resolution, resolution)
        if not tasks or len(set(tasks)) < len(tasks):
            raise ValueError(f"tasks={list(tasks)}: expected different ones, at least one (--model.tasks).")
        for task in tasks:
            self.condition_tokens(task)  # raises if the task does not fit the clip
            if task in CLASS_TASKS and not num_classes:
                raise ValueError(f"The task {task} needs classes: give their number (--model.num_classes).")
        num_tokens = self.latent_shape[0] * self.latent_shape[1] * self.latent_shape[2]
        num_prompts = MAX_PROMPTS if len(tasks) > 1 else 0
        self.network = COMMIT(
            codebook_size, num_tokens, num_classes, num_prompts, dim, depth, num_heads, dropout, init_std
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
    def condition_codes(self, video: Tensor | None, task: Task, batch_size: int) -> Tensor:
        """Codes `[B, N]` of the padded video `[B, 3, T, H, W]`; of no meaning where the task gives nothing.

        Raises:
            ValueError: If the task gives pixels and there are none.
        """
        if task in EMPTY_TASKS:
            return torch.zeros(batch_size, self.network.num_tokens, dtype=torch.long, device=self.device)
        if video is None:
            raise ValueError(
                f"The task {task} needs the codes of a padded video, and this batch has neither pixels nor "
                f"`task/{task}`: tokenize with this experiment, which keeps them, or give a data module with pixels "
                "(--data)."
            )
        return self.encode_video(padded_video(video, task, self.hparams["past_frames"])).flatten(1)

    def conditions(self, tasks: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Return the tasks that give pixels, each with what its padded video depends on besides the clip."""
        chosen = self.tasks if tasks is None else [self.checked_task(task) for task in tasks]
        return {
            task: {"past_frames": self.hparams["past_frames"]} if "prediction" in task else {}
            for task in chosen
            if task not in EMPTY_TASKS
        }

    def check_labels(self, label: Tensor) -> None:
        """Raise ValueError unless all labels are classes of the model; others would be read as prompts."""
        if label.min() < 0 or label.max() >= self.num_classes:
            raise ValueError(
                f"Labels from {int(label.min())} to {int(label.max())} do not fit num_classes={self.num_classes} "
                "(--model.num_classes)."
            )

    # Training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Corrupt clips for one task, the same on all ranks, and predict all their codes."""
        if self.num_classes and batch_idx == 0:  # once an epoch: it waits for the device
            self.check_labels(batch["label"])
        number = torch.randint(len(self.tasks), (), generator=self.step_generator(TASK_STREAM))  # on the host: no sync
        codes = self.clip_codes(batch)
        mask = self.random_mask(
            len(codes),
            self.step_generator(MASK_RATIO_STREAM, batch_idx),
            self.step_generator(MASK_ORDER_STREAM, batch_idx, device=self.device),
        )
        nll, kinds = self.token_nll(batch, self.tasks[int(number)], codes, mask, self.hparams["label_smoothing"])
        loss, parts = commit_loss(nll, kinds)
        self.tokens_per_batch = codes.numel()
        self.log("train/loss", loss, prog_bar=True)
        for name, part in parts.items():
            self.log(f"train/{name}", part.detach())
        self.log("train/corrupted", mask[0].float().mean() / codes.shape[1])
        return loss

    def random_mask(
        self, batch_size: int, ratio_generator: torch.Generator, score_generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """How many tokens are corrupted `[B]` and scores that say which `[B, N]`, by the cosine schedule.

        Both are drawn for the batch of all ranks, then sliced.
        """
        num_tokens = self.network.num_tokens

        def ratios(size: int) -> Tensor:
            count = size if self.hparams["mask_ratio_per"] == "sample" else 1
            return torch.rand(count, generator=ratio_generator).expand(size)

        counts = [
            num_corrupted_tokens("cosine", u, num_tokens) for u in self.sliced_by_rank(ratios, batch_size).tolist()
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
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of all tokens of corrupted clips.

        Args:
            batch: Has the clips' `video` (or, from a cache, the condition's codes `task/...`) and `label`, where the
                task needs them.
            task: Which task.
            codes: `[B, N]` clean codes.
            mask: What `random_mask` returns.
            label_smoothing: Share of the target that is spread over all codes.

        Returns:
            Nats and what the input held (see `multivariate_mask`), each `[B, N]`.
        """
        count, scores = mask
        cached = batch.get(f"task/{task}")
        condition = self.condition_codes(batch.get("video"), task, len(codes)) if cached is None else cached.flatten(1)
        tokens, kinds = multivariate_mask(
            codes, condition, self.condition_tokens(task), scores, count, self.network.mask_id
        )
        logits = self.network(tokens, batch["label"] if task in CLASS_TASKS else None, self.prompt(task))  # [B, N, K]
        nll = F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none", label_smoothing=label_smoothing)
        return nll, kinds

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The training loss of each task without smoothing, with the same masks each time, and the mean over tasks."""
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
            loss = self.token_nll(batch, task, codes, mask)[0].mean()
            total += loss / len(self.tasks)
            self.log(f"val/loss_{task}", loss, batch_size=len(codes), sync_dist=True)
        self.log("val/loss", total, batch_size=len(codes), sync_dist=True, prog_bar=True)

    # Generation

    def checked_task(self, task: str | None, label: int | None = None) -> Task:
        """Return the task to generate for; None takes the model's first.

        A model of one task has no prompt and can be asked for any other, as in table 4 of the paper.

        Raises:
            ValueError: If the model has no such task, or a label is given that is no class of it.
        """
        known = TASKS if len(self.tasks) == 1 else self.tasks
        known = tuple(name for name in known if self.num_classes or name not in CLASS_TASKS)
        found = next((name for name in known if name == (task or self.tasks[0])), None)
        if found is None:
            raise ValueError(f"task={task} is none of this model's (--task): {', '.join(known)}.")
        if label is not None:
            if found not in CLASS_TASKS:
                raise ValueError(f"label={label}: the task {found} has no classes (--label, --task).")
            self.check_labels(torch.tensor([label]))
        return found

    def needs_clips(self, task: str | None) -> bool:
        """Whether the task gives pixels."""
        return self.checked_task(task) not in EMPTY_TASKS

    @torch.no_grad()
    def generate_codes(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: COMMITDecoding | None = None
    ) -> Tensor:
        """Generate code maps `[B, t, h, w]`; the arguments are those of `generate`."""
        task = self.checked_task(condition.task)
        if num_frames != self.num_frames:
            raise ValueError(
                f"num_frames={num_frames} cannot be generated: this model makes clips of {self.num_frames} frames, the "
                "length it was trained for."
            )
        for name, value, is_needed in (
            ("label", condition.label, task in CLASS_TASKS),
            ("video", condition.video, task not in EMPTY_TASKS),
        ):
            if (value is not None) != is_needed:
                raise ValueError(f"The task {task} is generated with{'' if is_needed else 'out'} a {name}.")
            if value is not None and len(value) != len(seeds):
                raise ValueError(f"{len(seeds)} seeds were given, and a condition whose {name} has {len(value)} rows.")
        label, video = condition.label, condition.video
        if label is not None:
            self.check_labels(label)
            label = label.to(self.device)
        if video is not None:
            if tuple(video.shape[2:]) != self.clip_shape:
                raise ValueError(
                    f"Expected video of {self.clip_shape} frames, rows and columns, got {video.shape[2:]}."
                )
            video = video.to(self.device)
        was_training = self.network.training
        self.network.eval()
        try:
            codes = commit_decode(
                self.network,
                self.condition_codes(video, task, len(seeds)),
                self.condition_tokens(task),
                sampling or self.sampling,
                seeded_noise(seeds, self.device),
                label,
                self.prompt(task),
            )
        finally:
            self.network.train(was_training)
        return codes.unflatten(1, self.latent_shape)

    def generate(
        self, condition: Condition, num_frames: int, seeds: Tensor, sampling: COMMITDecoding | None = None
    ) -> Tensor:
        """Generate videos (MAGVIT, algorithm 1).

        Args:
            condition: The task (None takes the model's first), the classes of a class-conditional one, the video of
                one with known pixels. What the task does not give of the video is not read.
            num_frames: Pixel frames: what the model was built for.
            seeds: `[B]` int64; sample i depends on seed i and row i of the condition alone.
            sampling: Decoding settings; None takes the module's.

        Returns:
            `[B, 3, T, H, W]` in [-1, 1].

        Raises:
            ValueError: If condition and task do not fit each other or the model, or the length does not.
        """
        sampling = sampling or self.sampling
        video = self.decode_codes(self.generate_codes(condition, num_frames, seeds, sampling))
        if sampling.paste_known and condition.video is not None:
            known = known_region(
                self.checked_task(condition.task), self.clip_shape, self.hparams["past_frames"], self.device
            )
            video = torch.where(known, condition.video.to(video), video)
        return video

    def condition(self, batch: dict[str, Any], task: Task, rows: slice = slice(None)) -> Condition:
        """The condition that rows of a batch hold for a task."""
        return Condition(
            label=batch["label"][rows] if task in CLASS_TASKS else None,
            video=batch["video"][rows] if task not in EMPTY_TASKS else None,
            task=task,
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

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Generate the videos of the seeds in the batch; without a label, seed i has class i modulo their number."""
        task = self.checked_task(batch["task"])
        batch = {"label": batch["seeds"] % max(1, self.num_classes)} | batch
        video = self.generate(self.condition(batch, task), batch["num_frames"], batch["seeds"])
        return {"seeds": batch["seeds"], "video": video}
