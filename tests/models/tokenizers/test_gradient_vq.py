import math

import pytest
import torch
from torch import Tensor

from models.random import keyed_generator
from models.tokenizers import GradientVectorQuantizer

TwoRanks = list[dict[str, dict[str, Tensor]]]


def quantizer(codebook_size: int = 6, dim: int = 3, **options: float) -> GradientVectorQuantizer:
    made = GradientVectorQuantizer(codebook_size, dim, **options).double()
    made.embeddings.data = torch.randn(codebook_size, dim, generator=keyed_generator(5), dtype=torch.float64)
    return made


def features(*keys: int) -> Tensor:
    return torch.randn(2, 3, 2, 2, 3, generator=keyed_generator(*keys), dtype=torch.float64)


def rows(z: Tensor) -> Tensor:
    return z.movedim(1, -1).flatten(0, -2)


def test_each_vector_gets_its_nearest_entry() -> None:
    vq, z = quantizer(), features(0)
    encoded = vq(z)
    nearest = (rows(z)[:, None] - vq.embeddings).norm(dim=2).argmin(1)
    assert torch.equal(encoded.codes.flatten(), nearest)
    assert torch.equal(rows(encoded.latents), vq.embeddings[nearest])
    assert torch.equal(vq.latents_to_codes(encoded.latents.detach()), encoded.codes)
    assert torch.equal(vq.codes_to_latents(encoded.codes), encoded.latents)


def test_reconstruction_reaches_the_encoder_and_not_the_codebook() -> None:
    vq, z, upstream = quantizer(), features(0).requires_grad_(), features(1)
    (vq(z).latents * upstream).sum().backward()
    assert torch.equal(z.grad, upstream)
    assert vq.embeddings.grad is None


def test_commitment_and_codebook_pull_with_a_ratio_of_one_to_four() -> None:
    vq, z = quantizer(entropy_weight=0.0), features(0).requires_grad_()
    losses = vq(z).losses
    assert losses["codebook"].item() == pytest.approx(4 * losses["commitment"].item())
    sum(losses.values()).backward()
    assert torch.allclose(z.grad.sum((0, 2, 3, 4)), -0.25 * vq.embeddings.grad.sum(0))


def test_equal_affinities_have_the_entropies_of_the_reference() -> None:
    vq = GradientVectorQuantizer(1024, 2).double()
    vq.embeddings.data.fill_(0.5)
    encoded = vq(torch.ones(1, 2, 1, 2, 2, dtype=torch.float64))
    assert encoded.statistics["entropy_of_each"].item() == pytest.approx(math.log(1024), abs=1e-6)
    assert encoded.statistics["entropy_of_all"].item() == pytest.approx(6.921284, abs=1e-6)
    assert encoded.losses["entropy"].item() == pytest.approx(0.1 * 0.010188, abs=1e-7)


def test_clear_and_even_choices_have_the_lowest_loss() -> None:
    vq = GradientVectorQuantizer(1024, 10).double()
    signs = torch.arange(1024)[:, None] // 2 ** torch.arange(10) % 2 * 2.0 - 1
    vq.embeddings.data = signs.double()
    encoded = vq(vq.codes_to_latents(torch.arange(1024).view(1, 1, 32, 32)).detach())
    assert encoded.losses["entropy"].item() == pytest.approx(-0.1 * 6.9213, abs=1e-5)
    assert encoded.statistics["perplexity"].item() == pytest.approx(1024, rel=1e-4)


def test_entropy_loss_is_its_definition_and_moves_the_codebook() -> None:
    vq, z = quantizer(temperature=0.5, entropy_weight=1.0), features(0)
    p = (-(rows(z)[:, None] - vq.embeddings).square().sum(2) / 0.5).softmax(1)
    expected = -(p * p.log()).sum(1).mean() + (p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
    loss = vq(z).losses["entropy"]
    assert torch.allclose(loss, expected)
    (gradient,) = torch.autograd.grad(loss, vq.embeddings)
    (reference,) = torch.autograd.grad(expected, vq.embeddings)
    assert torch.allclose(gradient, reference)


def test_evaluation_does_without_entropies() -> None:
    encoded = quantizer().eval()(features(0))
    assert encoded.losses.keys() == {"commitment", "codebook"}
    assert encoded.statistics.keys() == {"perplexity", "usage"}


def test_codebook_starts_uniform_within_the_released_limits() -> None:
    torch.manual_seed(0)
    embeddings = GradientVectorQuantizer().embeddings
    assert embeddings.shape == (1024, 256)
    assert 0.0540 < embeddings.abs().max() <= 0.05413
    assert embeddings.std().item() == pytest.approx(1024**-0.5, rel=1e-2)


def test_two_ranks_average_probabilities_before_the_logarithm(two_ranks: TwoRanks) -> None:
    parts = [rank["gradient_vq"] for rank in two_ranks]
    vq = quantizer(temperature=0.5, entropy_weight=1.0)
    z = torch.cat([part["z"] for part in parts])
    encoded = vq(z)
    (gradient,) = torch.autograd.grad(encoded.losses["entropy"], vq.embeddings)
    assert torch.allclose(parts[0]["entropy_of_all"], encoded.statistics["entropy_of_all"])
    assert torch.equal(parts[0]["entropy_of_all"], parts[1]["entropy_of_all"])
    # DDP's mean over the ranks
    assert torch.allclose((parts[0]["gradient"] + parts[1]["gradient"]) / 2, gradient)
