"""An exponential moving average of the weights, which validation, sampling and exported bundles use."""

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

logger = logging.getLogger(__name__)


class EMA(Callback):
    """Averages the weights over the steps of training.

    After each optimizer step, average <- decay * average + (1 - decay) * weights, beginning with the weights at the
    start and without correction for that (MAGVIT). Averaged are the trained parameters, except those under the prefixes
    that the module names in `not_averaged` (discriminators), and the statistics of batch norm, which belong to the
    weights. Other buffers are moving averages of their own or counters, such as a codebook: they are used as they are.

    Validation sees the averaged weights. A checkpoint holds them as `state_dict`, and the weights in training as
    `current_model_state`, so that whatever reads weights from it gets the average; a resumed run goes on with both, to
    the last bit.

    Lightning's callback for this copies the whole module, keeps its average in the weights' own precision, and goes on
    without a word if a run is resumed without it.

    Args:
        decay: share of the average that stays at each step: 0.999 in MAGVIT. 0 does without an average.
        on_host: keep the average in the host's memory: 4 bytes a parameter less on the device, and a copy each step.
        warmup: use no more than (1 + n) / (10 + n) after n steps, for runs too short to forget their beginning.

    Raises:
        ValueError: if the decay is out of range.
    """

    def __init__(self, decay: float = 0.0, warmup: bool = False, on_host: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be 0 (no average) or lie between 0 and 1 (--ema.decay).")
        self.decay = decay
        self.warmup = warmup
        self.on_host = on_host
        self._averages: dict[str, Tensor] | None = None
        self._weights: dict[str, Tensor] | None = None  # kept aside while the module holds the averages
        self._last_step = 0

    def decay_at(self, step: int) -> float:
        """The decay of an optimizer step, counted from 1."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights as they are, unless a checkpoint has brought an average."""
        if not self.decay:
            return
        averaged = averaged_tensors(pl_module)
        if self._averages is None:
            self._averages = {name: _full_precision(tensor).clone() for name, tensor in averaged.items()}
        self._averages = {
            name: self._averages[name].to("cpu" if self.on_host else tensor.device) for name, tensor in averaged.items()
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step that the run begins or goes on with."""
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average once each optimizer step."""
        if self._averages is None or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        weights = averaged_tensors(pl_module)
        averages = [_own(average) for average in self._averages.values()]
        current = [
            _own(_full_precision(weights[name])).to(average.device)
            for name, average in zip(self._averages, averages, strict=True)
        ]
        torch._foreach_lerp_(averages, current, 1 - self.decay_at(self._last_step))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in the weights' place."""
        if self._averages is None:
            return
        averaged = averaged_tensors(pl_module)
        self._weights = {name: tensor.clone() for name, tensor in averaged.items()}
        _copy(self._averages, averaged)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        if self._weights is not None:
            _copy(self._weights, averaged_tensors(pl_module))
            self._weights = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the weights, and the weights beside it."""
        if self._averages is None:
            return
        # of a sharded module, only the first process holds the gathered state; all take part in gathering
        averages = {name: _gathered(average) for name, average in self._averages.items()}
        aside = {name: _gathered(weight) for name, weight in (self._weights or {}).items()}
        if self._averages.keys() <= checkpoint["state_dict"].keys():
            checkpoint["current_model_state"] = aside or {name: checkpoint["state_dict"][name] for name in averages}
            checkpoint["state_dict"] = dict(checkpoint["state_dict"]) | averages

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume both.

        Raises:
            ValueError: if the run has an average, and is to go on without.
        """
        if trainer.state.fn != "fit":
            return
        weights = checkpoint.get("current_model_state")
        if weights is not None and not self.decay:
            raise ValueError(
                "The checkpoint's run averages its weights, this one does not: it would go on from the average. Give "
                "--ema.decay as it was; `--resume RUN` does so by itself."
            )
        if not self.decay:
            return
        if weights is None:
            logger.warning(
                "The checkpoint holds no averaged weights: the average (--ema.decay) begins with its weights."
            )
            return
        averaged = averaged_tensors(pl_module)
        if averaged.keys() != weights.keys():
            raise ValueError(f"The checkpoint averages other weights: {sorted(averaged.keys() ^ weights.keys())}.")
        if "state_dict" in checkpoint:
            self._averages = {name: checkpoint["state_dict"][name].clone() for name in averaged}
        else:  # a sharded module has been given them already
            self._averages = {name: _full_precision(tensor).clone() for name, tensor in averaged.items()}
        _copy({name: _spread(weights[name], like) for name, like in averaged.items()}, averaged)

    def state_dict(self) -> dict[str, Any]:
        """The settings, which a resumed run has to share."""
        return {"decay": self.decay, "warmup": self.warmup} if self.decay else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the settings.

        Raises:
            ValueError: if they differ.
        """
        if self.state_dict() not in ({}, state_dict):
            raise ValueError(f"The checkpoint's run had ema={state_dict}, this one {self.state_dict()} (--ema.decay).")


def averaged_tensors(module: nn.Module) -> dict[str, Tensor]:
    """By name, what an average of the weights is taken of, see `EMA`."""
    tensors: dict[str, Tensor] = {
        name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    for prefix, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            statistics = {"running_mean": layer.running_mean, "running_var": layer.running_var}
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in statistics.items() if tensor is not None}
    excluded = tuple(f"{prefix}." for prefix in getattr(module, "not_averaged", ()))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(excluded)}


def _own(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _spread(tensor: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
