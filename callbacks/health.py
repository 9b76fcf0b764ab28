"""Watches over a training: tells early what goes wrong with a tokenizer, and skips bad steps of any module."""

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from models.blocks.distributed import rank, sum_over_ranks, world_size
from models.random import keyed_generator
from models.tokenizers.quantizers import Encoded, Quantizer, code_counts, usage_statistics

logger = logging.getLogger(__name__)

# A codebook has collapsed below this share of the perplexity that the codes seen could have.
_COLLAPSED = 0.02
# An entry is dead if none of so many codes for each entry took it; with even use, one in 20,000 would.
_CODES_PER_ENTRY = 10
# A discriminator has won if it tells this share of its patches, and the hinge has nothing left to ask for.
_WON_ACCURACY, _WON_MARGIN = 0.95, 2.0
# Gradients have exploded at this multiple of what they were (their running geometric mean).
_EXPLODED = 100.0
# How slowly the running mean and variance of the loss move, and how many steps they need before they can judge.
_LOSS_DECAY, _LOSSES_TO_JUDGE = 0.98, 20
# Stream of random numbers, apart from the modules' own within a step.
_REVIVE_STREAM = 101


class TokenizerHealth(Callback):
    """Finds what ruins tokenizers, within a few steps, and says what to do.

    Looked for are: videos that are not in [-1, 1], numbers that are not finite, a collapsed codebook, a discriminator
    that has won, exploding gradients. Each is reported when it has been there for `patience` looks in a row (what is
    not finite or out of range at once), and again only after it was gone.

    Logged besides what the module logs are `train/window_perplexity` and `train/window_usage`, over the codes of all
    ranks since the last look, and now and then `train/dead_codes`, entries that none of ten codes an entry took.

    It knows a module by what it logs and offers: `tokenizer.quantizer`, `step_gate`, `discriminator_start_step`,
    `discriminator_lr_factor`. In others it looks at nothing, but skips bad steps if asked to: their gradients are
    dropped, so that neither weights nor the optimizer's moments move, and the step counts as one.

    What was skipped is written to `bad_steps.jsonl` in the run's folder: the step, why, and the indices of its clips.

    Args:
        every_n_steps: optimizer steps between looks; each reads a few numbers from the device. 0 does not look.
        patience: looks in a row that a trend needs.
        on_bad_step: `warn`, or `skip` a step whose loss or gradients are not finite, as if its batches had not been;
            this reads their norms at each step.
        spike: skip a step, too, whose loss lies so many standard deviations above its running mean; 0 skips none.
        max_bad_steps: after so many skipped steps in a row the run stops with an error.
        on_winning_discriminator: `warn`, `delay` all discriminators by `delay_steps`, or `damp` them: halve their
            learning rate.
        delay_steps: optimizer steps of a delay.
        on_dead_codes: `warn` if the codebook collapses, or besides `revive` dead codes, as vectors of the batch.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        patience: int = 2,
        on_bad_step: Literal["warn", "skip"] = "warn",
        spike: float = 0.0,
        max_bad_steps: int = 10,
        on_winning_discriminator: Literal["warn", "delay", "damp"] = "warn",
        delay_steps: int = 1000,
        on_dead_codes: Literal["warn", "revive"] = "warn",
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 0),
            ("patience", patience, 1),
            ("max_bad_steps", max_bad_steps, 1),
            ("delay_steps", delay_steps, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least} (--health.{name}).")
        if spike < 0 or (spike > 0 and on_bad_step == "warn"):
            raise ValueError(
                f"spike={spike} must be 0 or positive, and it skips steps: give --health.on_bad_step=skip with it "
                "(--health.spike)."
            )
        self.every_n_steps = every_n_steps
        self.patience = patience
        self.on_bad_step = on_bad_step
        self.spike = spike
        self.max_bad_steps = max_bad_steps
        self.on_winning_discriminator = on_winning_discriminator
        self.delay_steps = delay_steps
        self.on_dead_codes = on_dead_codes
        self._active = False
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        # what a resumed run goes on with
        self._streaks: dict[str, int] = {}  # looks in a row that found a trend
        self._log_norm: float | None = None  # running mean of the logarithm of the gradients' norm
        self._counts: Tensor | None = None  # [K], this rank's codes since the last look
        self._lifetime: Tensor | None = None  # [K], all ranks' codes since dead ones were last told
        self._starts_at: int | None = None  # discriminator_start_step after a delay
        self._lr_factor = 1.0
        self._losses_seen, self._loss_mean, self._loss_variance = 0, 0.0, 0.0
        # of this process
        self._gates_gradients = False  # of a module without a gate of its own
        self._step_losses: list[Tensor] = []
        self._step_clips: list[Tensor] = []
        self._trainer: Trainer | None = None
        self._last_step = 0
        self._bad_steps = 0
        self._skipped = False
        self._begins_step = True
        self._buffers: dict[str, Tensor] = {}
        self._vectors: Tensor | None = None  # what the quantizer was last given

    # The run

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the module.

        Raises:
            ValueError: if the codebook is to be revived and there is none, or float16 is to skip steps.
        """
        self._trainer = trainer
        self._active = self.every_n_steps > 0 and hasattr(pl_module, "step_gate")
        self._gates_gradients = self.on_bad_step == "skip" and not hasattr(pl_module, "step_gate")
        if self._gates_gradients and trainer.precision == "16-mixed":
            raise ValueError("16-mixed skips steps by itself: leave --health.on_bad_step=warn, or use bf16-mixed.")
        if not self._active:
            return
        module: Any = pl_module  # an interface, not a class
        quantizer = module.tokenizer.quantizer
        if self.on_dead_codes == "revive" and not hasattr(quantizer, "revive"):
            raise ValueError(
                f"{type(quantizer).__name__} has no codebook whose entries could be revived: leave "
                "--health.on_dead_codes=warn."
            )
        self._hook = quantizer.register_forward_hook(self._see_codes)
        if self.on_bad_step == "skip":
            module.step_gate = self._is_sound
        if self._starts_at is not None:
            module.discriminator_start_step = self._starts_at
        module.discriminator_lr_factor = self._lr_factor
        self._last_step = trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the module."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            module: Any = pl_module
            module.step_gate = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the videos; keep what a bad step would spoil."""
        if self.on_bad_step == "skip":
            if self._begins_step:
                self._step_clips, self._step_losses = [], []
            self._step_clips.append(batch["index"])
        if self._gates_gradients:
            self._begins_step = False
        if not self._active:
            return
        if trainer.global_step % self.every_n_steps == 0:
            self._look_at_video(batch["video"])
        if self.on_bad_step == "skip" and self._begins_step:
            self._begins_step = False
            names = {name for name, _ in pl_module.named_buffers()}
            state = pl_module.state_dict()
            self._buffers = {name: state[name].clone() for name in names & state.keys()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Undo a skipped step, or look at the numbers of one."""
        if self._skipped:
            self._skipped, self._begins_step = False, True
            if self._active:
                pl_module.load_state_dict(self._buffers, strict=False)
            if self._bad_steps >= self.max_bad_steps:
                raise RuntimeError(
                    f"{self._bad_steps} steps in a row had gradients that are not finite, or a loss that was not, or "
                    "rose at once (--health.max_bad_steps). The weights are those before them; bad_steps.jsonl in the "
                    "run's folder names the clips."
                )
            return
        if not self._active:
            return
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        self._begins_step = True
        if step % self.every_n_steps == 0:
            self._look_at_codes(trainer, pl_module)
            self._look_at_numbers(trainer, pl_module)

    # What is looked at

    def _look_at_video(self, video: Tensor) -> None:
        low, high = (value.item() for value in video.detach().aminmax())
        if not math.isfinite(low + high):
            found = "The videos hold numbers that are not finite: look at the data."
        elif low < -1.05 or high > 1.05:
            found = f"The videos' values reach from {low:.4g} to {high:.4g}, not from -1 to 1: look at the data module."
        else:
            found = ""
        self._report("video", bool(found), found, patience=1, everywhere=True)
        unsigned = f"The videos' values reach from {low:.4g} to {high:.4g}: are they in [0, 1] instead of [-1, 1]?"
        self._report("unsigned video", low >= 0, unsigned, everywhere=True)

    def _look_at_codes(self, trainer: Trainer, module: Any) -> None:
        if self._counts is None:
            return
        counts = sum_over_ranks(self._counts)
        self._counts = None
        window = usage_statistics(counts)
        module.log_dict({f"train/window_{name}": value for name, value in window.items()})
        perplexity = window["perplexity"].item()
        seen, size = int(counts.sum()), len(counts)
        possible = min(size, seen)
        self._report(
            "codebook",
            possible > 2 and perplexity < max(2.0, _COLLAPSED * possible),
            f"The codebook has collapsed: {window['usage'].item():.1%} of {size:,} codes in use, with a perplexity of "
            f"{perplexity:.3g} over {seen:,} codes. Restart codes (restart_threshold of the quantizer, "
            "--health.on_dead_codes=revive), or weigh the commitment less.",
        )
        self._lifetime = counts if self._lifetime is None else self._lifetime.to(counts.device) + counts
        if int(self._lifetime.sum()) < _CODES_PER_ENTRY * size:
            return
        dead = self._lifetime == 0
        self._lifetime = None
        module.log("train/dead_codes", dead.sum().float())
        if self.on_dead_codes == "revive" and self._vectors is not None:
            generator = keyed_generator(module.seed, trainer.global_step, _REVIVE_STREAM)
            module.tokenizer.quantizer.revive(dead, self._vectors, generator)

    def _look_at_numbers(self, trainer: Trainer, module: Any) -> None:
        logged = {
            name.removeprefix("train/"): value.detach().float().to(module.device)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("train/")
        }
        names = sorted(logged)
        means = (sum_over_ranks(torch.stack([logged[name] for name in names])) / world_size()).tolist()
        numbers = dict(zip(names, means, strict=True))
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        self._report(
            "not finite",
            bool(bad),
            f"Not finite: {', '.join(bad)}. A lower learning rate, --model.gradient_clip_norm or "
            "--health.on_bad_step=skip may help.",
            patience=1,
        )
        self._look_at_norm(numbers.get("grad_norm", math.nan))
        margin = numbers.get("logits_real", 0.0) - numbers.get("logits_fake", 0.0)
        accuracy = numbers.get("disc_accuracy", 0.0)
        is_running = trainer.global_step > module.discriminator_start_step  # or the numbers are of before its rest
        has_won = bool(is_running) and accuracy >= _WON_ACCURACY and margin >= _WON_MARGIN
        advice = {
            "warn": "Start it later (--model.discriminator_start_step), regularise it (--model.r1_weight, "
            "--model.lecam_weight), or let it be slowed (--health.on_winning_discriminator).",
            "delay": f"It rests for {self.delay_steps} steps.",
            "damp": f"Its learning rate is {self._lr_factor / 2:g} of what it was.",
        }[self.on_winning_discriminator]
        found = self._report(
            "discriminator",
            has_won,
            f"The discriminator wins: it tells {accuracy:.0%} of real and reconstructed patches, by a margin of "
            f"{margin:.3g}. {advice}",
        )
        if found and self.on_winning_discriminator == "delay":
            self._starts_at = trainer.global_step + self.delay_steps
            module.discriminator_start_step = self._starts_at
        elif found and self.on_winning_discriminator == "damp":
            self._lr_factor /= 2
            module.discriminator_lr_factor = self._lr_factor
        if found and self.on_winning_discriminator != "warn":
            self._streaks["discriminator"] = 0  # if it still wins after that, that is another time

    def _look_at_norm(self, norm: float) -> None:
        if not math.isfinite(norm) or norm <= 0:
            return
        usual = math.exp(self._log_norm) if self._log_norm is not None else norm
        self._report(
            "gradients",
            norm > _EXPLODED * usual,
            f"The gradients explode: their norm is {norm:.3g}, and was {usual:.3g}. Lower the learning rate, or clip "
            "them (--model.gradient_clip_norm).",
            patience=1,
        )
        if norm <= _EXPLODED * usual:
            self._log_norm = 0.9 * math.log(usual) + 0.1 * math.log(norm)

    def _report(
        self, trend: str, is_there: bool, message: str, patience: int | None = None, everywhere: bool = False
    ) -> bool:
        """Count how long a trend has been there; tell it once, from the first rank or from each that sees it.

        Returns:
            Whether this is when it has been there for long enough.
        """
        patience = self.patience if patience is None else patience
        self._streaks[trend] = self._streaks.get(trend, 0) + 1 if is_there else 0
        is_time = self._streaks[trend] == patience
        if is_time and (everywhere or rank() == 0):
            logger.warning("%s", message)
        return is_time

    # What the module calls

    def _see_codes(self, quantizer: Quantizer, inputs: tuple[Tensor, ...], encoded: Encoded) -> None:
        if quantizer.training and encoded.codes is not None and quantizer.codebook_size is not None:
            counts = code_counts(encoded.codes, quantizer.codebook_size)
            self._counts = counts if self._counts is None else self._counts.to(counts.device) + counts
            self._vectors = inputs[0].detach()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the losses of the step."""
        if self.on_bad_step == "skip":
            self._step_losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Drop the gradients of a bad step: an optimizer leaves alone what has none."""
        if not self._gates_gradients:
            return
        self._begins_step = True
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):  # of all shards
            norm = norm.full_tensor()
        if not self._is_sound({"grad_norm": norm}):
            optimizer.zero_grad(set_to_none=True)

    def _is_sound(self, norms: dict[str, Tensor]) -> bool:
        """Whether a step may be taken, the same answer on all ranks: as gradients are, and so their norms."""
        loss = (sum_over_ranks(torch.stack(self._step_losses).float().sum()) / world_size()).item()
        numbers = {"loss": loss} | {name: norm.item() for name, norm in norms.items()}
        reasons = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        limit = self._loss_mean + self.spike * math.sqrt(self._loss_variance)
        if not reasons and self.spike and self._losses_seen >= _LOSSES_TO_JUDGE and loss > limit:
            reasons = [f"loss is {loss:.4g}, and was {self._loss_mean:.4g} +- {math.sqrt(self._loss_variance):.2g}"]
        self._skipped = bool(reasons)
        self._bad_steps = self._bad_steps + 1 if reasons else 0
        if reasons:
            self._write_down(reasons)
        else:
            # exact means at first, then moving ones
            share = max(1 - _LOSS_DECAY, 1 / (1 + self._losses_seen))
            change = loss - self._loss_mean
            self._loss_mean += share * change
            self._loss_variance = (1 - share) * (self._loss_variance + share * change**2)
            self._losses_seen += 1
        return not reasons

    def _write_down(self, reasons: list[str]) -> None:
        assert self._trainer is not None
        step, folder = self._trainer.global_step, self._trainer.log_dir if self._trainer.loggers else None
        if self._bad_steps == 1:
            logger.warning("Step %d is skipped: not finite, or a spike: %s.", step, ", ".join(reasons))
        if folder is not None:
            clips = [index for indices in self._step_clips for index in indices.tolist()]
            entry = {"step": step, "rank": rank(), "reasons": reasons, "clips": clips}
            Path(folder).mkdir(parents=True, exist_ok=True)
            with (Path(folder) / "bad_steps.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, and what was done about it."""
        losses = {"losses": [self._losses_seen, self._loss_mean, self._loss_variance]} if self.spike else {}
        if not self._active:
            return losses
        return losses | {
            "streaks": dict(self._streaks),
            "log_norm": self._log_norm,
            "counts": self._counts,
            "lifetime": self._lifetime,
            "starts_at": self._starts_at,
            "lr_factor": self._lr_factor,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        if "losses" in state_dict:
            self._losses_seen, self._loss_mean, self._loss_variance = state_dict["losses"]
        if "streaks" not in state_dict:
            return
        self._streaks = dict(state_dict["streaks"])
        self._log_norm = state_dict["log_norm"]
        self._counts = state_dict["counts"]
        self._lifetime = state_dict["lifetime"]
        self._starts_at = state_dict["starts_at"]
        self._lr_factor = state_dict["lr_factor"]
