"""What two processes compute for the tests of batch norm, of the quantizer and of metrics; run once for all.

Each process saves its inputs and results; the tests compare with one process on the concatenated batch.
"""

import sys

import torch
import torch.distributed as dist
from metrics_of_ranks import measure_rank

from models.blocks.norm import SyncBatchNorm
from models.random import keyed_generator
from models.tokenizers.quantizers import VectorQuantizer


def normalise(rank: int, axes: int) -> dict[str, torch.Tensor]:
    generator = keyed_generator(rank, axes)
    shape = (3 - rank, 4, 5, 6, 2)[: 2 + axes]  # the ranks' batches differ in size
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) + rank).requires_grad_()
    loss_weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    norm = SyncBatchNorm(4).double()
    norm.weight.data = torch.tensor([1.0, 0.5, -2.0, 3.0], dtype=torch.float64)
    y = norm(x)
    (y.sin() * loss_weights).sum().backward()
    return {
        "x": x.detach(),
        "loss_weights": loss_weights,
        "y": y.detach(),
        "x_grad": x.grad,
        "weight_grad": norm.weight.grad,
        "bias_grad": norm.bias.grad,
        **norm.state_dict(),
    }


def quantise(rank: int) -> dict[str, torch.Tensor]:
    quantizer = VectorQuantizer(7, 3, restart_threshold=1.0).double()
    batches = torch.randn(2, 2, 3, 2, 2, 2, generator=keyed_generator(rank, 9), dtype=torch.float64)
    perplexities = []
    for step, z in enumerate(batches):
        perplexities.append(quantizer(z, keyed_generator(step)).statistics["perplexity"])
    return {"batches": batches, "perplexities": torch.stack(perplexities), **quantizer.state_dict()}


if __name__ == "__main__":
    folder, rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {
        "2d": normalise(rank, 2),
        "3d": normalise(rank, 3),
        "quantizer": quantise(rank),
        "metrics": measure_rank(rank),
    }
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
