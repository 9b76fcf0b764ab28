"""Levers change memory and time, and nothing else."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from callbacks import EMA, Levers
from callbacks.levers import recompute
from models.priors.mebt import MeBT
from models.random import keyed_generator


def network() -> MeBT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MeBT(
            8, 12, dim=16, num_heads=2, num_latents=4, blocks=("latent_enc", "latent_dec", "lt2l", "latent_dec")
        )


def gradients(net: MeBT) -> tuple[list[torch.Tensor], int]:
    """Of a step, and how many bytes were kept for it."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    codes = torch.randint(8, (2, 12), generator=keyed_generator(0))
    order = torch.rand(2, 12, generator=keyed_generator(1)).argsort(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net(codes, *order.tensor_split(2, dim=1)).square().sum()
    loss.backward()
    return [p.grad for p in net.parameters() if p.grad is not None], sum(kept.values())


def test_recomputed_blocks_have_the_same_gradients_and_keep_less() -> None:
    plain, changed = network(), network()
    for block in changed.blocks:
        recompute(block)
    (one, kept), (other, kept_less) = gradients(plain), gradients(changed)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert kept_less < 0.6 * kept
    assert changed.state_dict().keys() == plain.state_dict().keys()


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(1, 1)
        nn.init.ones_(self.network.weight)
        nn.init.zeros_(self.network.bias)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self.network(batch["video"].flatten()[:1] + 1.0).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def test_a_fused_optimizer_and_an_average_on_the_host_compute_the_same(make_trainer: Any, batches: Any) -> None:
    ends = []
    for is_on in (False, True):
        module, average = Regression(), EMA(decay=0.5, on_host=is_on)
        trainer = make_trainer(callbacks=[Levers(fused_optimizer=is_on), average], max_steps=3)
        trainer.fit(module, batches(3))
        assert trainer.optimizers[0].param_groups[0]["fused"] in ((True,) if is_on else (None, False))
        ends.append([module.network.weight.item(), average._averages["network.weight"].item()])  # type: ignore[index]
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def test_what_has_no_blocks_cannot_have_them_recomputed(make_trainer: Any, batches: Any) -> None:
    with pytest.raises(ValueError, match="Regression has no blocks: leave --levers"):
        make_trainer(callbacks=[Levers(recompute_blocks=True)], max_steps=1).fit(Regression(), batches(1))
