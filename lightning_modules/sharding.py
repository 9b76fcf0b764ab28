"""Generators whose weights, gradients and optimizer states are spread over all processes (torch's `fully_shard`)."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

# What a training step calls besides a network's `forward`.
_FORWARD_METHODS = ("code_logits",)


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for `fully_shard`, over all processes of all nodes; it runs on CPUs, too.

    Checkpoints are single files, gathered by the first process: any strategy and any number of processes goes on from
    them, and `longtake export` and `sample` read them.
    """

    def __init__(self) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Count the processes, which are not known before."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(module: LightningModule, network: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard a generator's network, each block by itself and then the rest.

    Weights are gathered and gradients summed as they are; `bf16-mixed` computes as it does without sharding.

    Args:
        module: The generator. If it is on the meta device, no process but the first ever has all weights: that one
            makes them on its host, as they would be without sharding, and the others get their shards.
        network: What is sharded: its `blocks` or `layers`, and the rest.
        mesh: The processes.
        device: Of this one.
    """
    is_meta = next(network.parameters()).is_meta
    blocks: Any = getattr(network, "blocks", None) or getattr(network, "layers", [])
    for part in (*blocks, network):
        # the rest, too, lets go of what it gathered: averages are exchanged for weights after a forward pass
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for name in _FORWARD_METHODS:
        if hasattr(network, name):
            register_fsdp_forward_method(network, name)
    if is_meta:
        _fill(module, device)


def _fill(module: LightningModule, device: torch.device) -> None:
    """Give a module from the meta device the weights and buffers that it would have been made with."""
    module.to_empty(device=device)
    twin: nn.Module | None = None
    if dist.get_rank() == 0:
        arguments = {name: value for name, value in module.hparams.items() if not name.startswith("_")}
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.set_rng_state(module.__dict__["rng_state_of_init"])
            twin = type(module)(**arguments)
    state = twin.state_dict() if twin is not None else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(module, state, options=options)
    theirs = dict(twin.named_buffers()) if twin is not None else {}
    for name, buffer in module.named_buffers():  # those, too, that are in no state dict
        if name in theirs:
            buffer.copy_(theirs[name])
        dist.broadcast(buffer, src=0)
