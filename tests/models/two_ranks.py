"""What two processes compute for the tests of batch norm, quantizers and losses; run once for all.

Each process saves its inputs and results; the tests compare with one process on the concatenated batch.
"""

import sys

import torch
import torch.distributed as dist

from models.blocks.norm import SyncBatchNorm
from models.random import keyed_generator
from models.tokenizers import (
    GaussianLatents,
    GradientVectorQuantizer,
    LookupFreeQuantizer,
    PatchDiscriminator,
    VectorQuantizer,
)
from models.tokenizers.losses import LeCam, discriminator_terms


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


def look_up_free(rank: int) -> dict[str, torch.Tensor]:
    quantizer = LookupFreeQuantizer(5, temperature=1.0)
    z = torch.randn(2, 5, 2, 2, 2, generator=keyed_generator(rank, 10), dtype=torch.float64).requires_grad_()
    encoded = quantizer(z)
    logits = 4 * z
    of_each = (torch.nn.functional.softplus(logits) - logits * logits.sigmoid()).sum(1).mean()
    (gradient,) = torch.autograd.grad(encoded.losses["entropy"] - 0.1 * of_each, z)
    return {"z": z.detach(), "gradient_of_all": gradient, **encoded.statistics}


def quantise_by_gradient(rank: int) -> dict[str, torch.Tensor]:
    quantizer = GradientVectorQuantizer(6, 3, temperature=0.5, entropy_weight=1.0).double()
    quantizer.embeddings.data = torch.randn(6, 3, generator=keyed_generator(5), dtype=torch.float64)
    z = torch.randn(2, 3, 2, 2, 3, generator=keyed_generator(rank, 11), dtype=torch.float64)
    encoded = quantizer(z)
    (gradient,) = torch.autograd.grad(encoded.losses["entropy"], quantizer.embeddings)
    return {"z": z, "gradient": gradient, **encoded.statistics}


def draw_gaussian(rank: int) -> dict[str, torch.Tensor]:
    z = torch.randn(2, 4, 2, 2, 2, generator=keyed_generator(rank, 12))
    return {"z": z, "latents": GaussianLatents(2)(z, keyed_generator(3)).latents}


def penalise(rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(2, base_channels=2, num_layers=2).double()
    real, fake = torch.randn(2, 2, 3, 16, 24, generator=keyed_generator(rank, 13), dtype=torch.float64)
    lecam = LeCam().double()
    loss, r1, *logits = discriminator_terms(discriminator, real, fake, "non_saturating", with_r1=True)
    regulariser = lecam(*logits)
    (loss + 10 * r1 + regulariser).backward()
    lecam.update()
    gradients = {f"grad {name}": parameter.grad for name, parameter in discriminator.named_parameters()}
    results = {"real": real, "fake": fake, "r1": r1, "lecam": regulariser, "lecam_real": lecam.real}
    return {name: tensor.detach() for name, tensor in results.items()} | gradients


if __name__ == "__main__":
    folder, rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {
        "2d": normalise(rank, 2),
        "3d": normalise(rank, 3),
        "quantizer": quantise(rank),
        "lookup_free": look_up_free(rank),
        "gradient_vq": quantise_by_gradient(rank),
        "gaussian": draw_gaussian(rank),
        "penalties": penalise(rank),
    }
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
