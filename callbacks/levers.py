"""Switches that trade memory for time, or win time: none changes what is learned but for rounding."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Levers(Callback):
    """Applies them when a fit begins; names in checkpoints stay as they are.

    Others are settings of the Trainer (`--trainer.precision=bf16-mixed`, `--trainer.accumulate_grad_batches`), of the
    average (`--ema.on_host`) or of the data (`--data TokenDataModule`).

    Args:
        recompute_blocks: do not keep what is inside a generator's blocks for the backward pass, but compute it again
            (gradient checkpointing).
        compile_blocks: compile each of a generator's blocks by itself, with sizes that may change.
        fused_optimizer: let the optimizers step in one kernel.
        channels_last: lay convolutions out with the channels last, which suits tensor cores.
    """

    def __init__(
        self,
        recompute_blocks: bool = False,
        compile_blocks: bool = False,
        fused_optimizer: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.recompute_blocks = recompute_blocks
        self.compile_blocks = compile_blocks
        self.fused_optimizer = fused_optimizer
        self.channels_last = channels_last
        self._is_applied = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change how the module computes, once.

        Raises:
            ValueError: if it has no blocks, and they are to be compiled or computed again.
        """
        if stage != "fit" or self._is_applied:
            return
        self._is_applied = True
        network: Any = getattr(pl_module, "network", None)
        if self.recompute_blocks or self.compile_blocks:
            blocks = blocks_of(network)
            if not blocks:
                raise ValueError(
                    f"{type(pl_module).__name__} has no blocks: leave --levers.recompute_blocks and "
                    "--levers.compile_blocks off."
                )
            for block in blocks:
                if self.compile_blocks:
                    block.compile(dynamic=True)
                if self.recompute_blocks:
                    recompute(block)
        if self.channels_last:
            pl_module.to(memory_format=torch.channels_last_3d)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the optimizers step in one kernel; what a checkpoint has brought moves to where that looks for it.

        Raises:
            ValueError: if one has no such kernel.
        """
        if not self.fused_optimizer:
            return
        for optimizer in trainer.optimizers:
            if "fused" not in optimizer.defaults:
                raise ValueError(f"{type(optimizer).__name__} has no fused form: leave --levers.fused_optimizer off.")
            for group in optimizer.param_groups:
                group["fused"], group["foreach"] = True, False
            for parameter, state in optimizer.state.items():
                state["step"] = state["step"].to(parameter.device)


def blocks_of(network: nn.Module | None) -> list[nn.Module]:
    """The repeated part of a generator's network."""
    return list(getattr(network, "blocks", None) or getattr(network, "layers", None) or [])


def recompute(block: nn.Module) -> None:
    """Keep a block's inputs alone for the backward pass."""
    forward: Callable[..., Tensor] = block.forward

    def again(*inputs: Any, **options: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    block.forward = again
