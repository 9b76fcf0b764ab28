import itertools

import pytest
import torch
from torch import Tensor
from toy_networks import causal, noise

from models.random import keyed_generator
from models.tokenizers import FiniteScalarQuantizer, VectorQuantizer


def features(dim: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(2, dim, 2, 3, 4, generator=keyed_generator(dim))


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3), (7,), (4, 2, 6)])
def test_every_code_goes_to_its_latents_and_back(levels: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    codes = torch.arange(quantizer.codebook_size).view(1, 1, 1, -1)
    latents = quantizer.codes_to_latents(codes)
    assert torch.equal(quantizer.latents_to_codes(latents), codes)
    assert len(latents.flatten(2).mT[0].unique(dim=0)) == quantizer.codebook_size
    assert latents.abs().max() <= 1


def test_codes_count_the_first_channel_fastest() -> None:
    values = [[i / (count // 2) for i in range(-(count // 2), count - count // 2)] for count in (4, 3)]
    expected = [(a, b) for b, a in itertools.product(values[1], values[0])]
    latents = FiniteScalarQuantizer((4, 3)).codes_to_latents(torch.arange(12).view(1, 1, 1, 12))
    assert torch.allclose(latents[0, :, 0, 0].T, torch.tensor(expected))


@pytest.mark.parametrize("levels", [(8, 5, 5), (2, 3, 4)])
def test_latents_are_those_of_the_codes_exactly(levels: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    encoded = quantizer(features(3, scale=2))
    assert torch.equal(encoded.latents, quantizer.codes_to_latents(encoded.codes))
    assert torch.equal(encoded.codes, quantizer.latents_to_codes(encoded.latents))
    assert encoded.codes.dtype == torch.int64
    assert encoded.codes.shape == (2, 2, 3, 4)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_a_channel_takes_each_of_its_levels_and_zero_stays_zero(count: int) -> None:
    quantizer = FiniteScalarQuantizer((count,))
    z = torch.linspace(-20, 20, 2001).view(1, 1, 1, 1, -1)
    codes = quantizer(z).codes.flatten()
    assert torch.equal(codes.unique(), torch.arange(count))
    assert (codes.diff() >= 0).all()
    assert quantizer(torch.zeros(1, 1, 1, 1, 1)).latents == 0


def test_gradient_is_that_of_the_bound() -> None:
    quantizer = FiniteScalarQuantizer((5, 5))
    z = features(2).requires_grad_()
    (gradient,) = torch.autograd.grad(quantizer(z).latents.sum(), z)
    assert torch.allclose(gradient, (2 * 1.001 / 2) * (1 - torch.tanh(z) ** 2))


def test_commitment_pulls_to_the_nearest_levels_and_is_off_unless_asked_for() -> None:
    z = features(2).requires_grad_()
    assert FiniteScalarQuantizer((5, 5))(z).losses == {}
    quantizer = FiniteScalarQuantizer((5, 5), commitment_weight=3.0)
    loss = quantizer(z).losses["commitment"]
    away = quantizer.bound(z) - quantizer.bound(z).round()
    torch.testing.assert_close(loss, 3 * away.square().mean())
    nearer = z - 0.1 * torch.autograd.grad(loss, z)[0]
    assert quantizer(nearer).losses["commitment"] < loss


def test_codes_do_not_change_under_autocast() -> None:
    quantizer = FiniteScalarQuantizer()
    z = features(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = quantizer(z)
    assert torch.equal(encoded.codes, quantizer(z).codes)
    assert encoded.latents.dtype == torch.float32


def test_latents_between_levels_go_to_the_nearest() -> None:
    quantizer = FiniteScalarQuantizer((4,))  # levels -1, -0.5, 0, 0.5
    latents = torch.tensor([-3.0, -0.6, 0.2, 0.3, 5.0]).view(1, 1, 1, 1, 5)
    assert quantizer.latents_to_codes(latents).flatten().tolist() == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("levels", [(), (8, 1)])
def test_levels_that_cannot_tell_anything_apart_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 2 values for each channel"):
        FiniteScalarQuantizer(levels)


def test_what_is_rounded_can_be_had_before_that() -> None:
    """One tokenizer for models of codes and of real values: the latents are within half a step of each other."""
    tokenizer = causal(FiniteScalarQuantizer((8, 5)))
    real = tokenizer.unrounded()
    video = noise(1, 3, 9, 16, 16)
    rounded, encoded = tokenizer.encode(video), real.encode(video)
    assert tokenizer.codebook_size == 40
    assert real.codebook_size is None
    assert encoded.codes is None
    assert torch.equal(tokenizer.latents_to_codes(encoded.latents), rounded.codes)
    steps = (encoded.latents - rounded.latents).abs() * torch.tensor([4, 2]).view(1, 2, 1, 1, 1)
    assert 0.4 < steps.max() <= 0.5 + 1e-3 * 4
    assert torch.equal(real.decode(rounded.latents), tokenizer.decode(rounded.latents))
    assert not torch.equal(real.decode(encoded.latents), tokenizer.decode(rounded.latents))
    assert real.decoder is tokenizer.decoder
    assert real.state_dict().keys() == tokenizer.state_dict().keys()
    assert real.unrounded().encode(video).latents.equal(encoded.latents)


def test_entries_of_a_codebook_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match="learned from its entries alone"):
        causal(VectorQuantizer(4, 2)).unrounded()
