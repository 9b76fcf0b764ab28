import itertools
import math

import pytest
import torch
from torch import Tensor

from models.random import keyed_generator
from models.tokenizers import LookupFreeQuantizer
from models.tokenizers.lookup_free import joint_probabilities

TwoRanks = list[dict[str, dict[str, Tensor]]]


def features(num_bits: int, key: int = 0, scale: float = 1.0) -> Tensor:
    generator = keyed_generator(num_bits, key)
    return scale * torch.randn(2, num_bits, 2, 2, 3, generator=generator, dtype=torch.float64)


def enumerated(z: Tensor, temperature: float) -> Tensor:
    """p(c|z) `[n, 2^b]` of vectors `[n, b]`, by the softmax over the distances to all codes."""
    bits = z.shape[1]
    codes = torch.tensor([c[::-1] for c in itertools.product((-1.0, 1.0), repeat=bits)], dtype=z.dtype)
    return (-(z[:, None] - codes).square().sum(2) / temperature).softmax(1)


def entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def test_index_of_the_reference() -> None:
    z = torch.tensor([-1, -0.5, -0.3, -0.5, 1, 2, 3, 4]).view(1, 8, 1, 1, 1)
    assert LookupFreeQuantizer(8)(z).codes.item() == 240


def test_every_code_goes_to_its_signs_and_back() -> None:
    quantizer = LookupFreeQuantizer(10)
    codes = torch.arange(1024).view(1, 1, 32, 32)
    latents = quantizer.codes_to_latents(codes)
    assert torch.equal(latents.unique(), torch.tensor([-1.0, 1.0]))
    assert torch.equal(quantizer.latents_to_codes(latents), codes)
    assert latents[0, :, 0, 0, 1].tolist() == [1] + [-1] * 9  # the first channel counts least


def test_zero_counts_as_negative() -> None:
    encoded = LookupFreeQuantizer(3)(torch.zeros(1, 3, 1, 1, 1))
    assert encoded.codes.item() == 0
    assert (encoded.latents == -1).all()


def test_latents_are_signs_with_the_gradient_of_the_identity() -> None:
    quantizer = LookupFreeQuantizer(4).double().eval()
    z = features(4).requires_grad_()
    encoded = quantizer(z)
    assert torch.equal(encoded.latents, quantizer.codes_to_latents(encoded.codes))
    assert torch.equal(encoded.latents, z.sign())
    (gradient,) = torch.autograd.grad((encoded.latents * features(4, 1)).sum(), z)
    assert torch.equal(gradient, features(4, 1))
    assert torch.allclose(encoded.losses["commitment"], 0.25 * (z - z.sign()).square().mean())
    assert encoded.losses.keys() == {"commitment"}  # the entropy is a matter of training


@pytest.mark.parametrize("num_bits", [1, 5, 10])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_entropies_are_those_over_all_codes(num_bits: int, temperature: float) -> None:
    z = features(num_bits, scale=temperature)
    statistics = LookupFreeQuantizer(num_bits, temperature=temperature)(z).statistics
    p = enumerated(z.movedim(1, -1).flatten(0, -2), temperature)
    assert torch.allclose(statistics["entropy_of_each"], entropy(p).mean())
    assert torch.allclose(statistics["entropy_of_all"], entropy(p.mean(0)))
    assert statistics["entropy_of_all"] <= num_bits * math.log(2) + 1e-12


def test_joint_probabilities_count_the_first_bit_least() -> None:
    joint = joint_probabilities(torch.tensor([0.25, 0.5, 1.0]))
    assert joint.tolist() == [0, 0, 0, 0, 0.375, 0.125, 0.375, 0.125]


def test_the_loss_rewards_clear_and_varied_codes_and_its_gradient_is_right() -> None:
    quantizer = LookupFreeQuantizer(4, temperature=1.0, commitment_weight=0.0, entropy_weight=2.0).double()
    z = features(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: quantizer(z).losses["entropy"], z)
    codes = torch.arange(16).view(1, 1, 4, 4)
    even = quantizer(100 * quantizer.codes_to_latents(codes)).losses["entropy"]
    collapsed = quantizer(100 * quantizer.codes_to_latents(codes * 0)).losses["entropy"]
    assert even.item() == pytest.approx(-2 * 4 * math.log(2))
    assert collapsed.item() == pytest.approx(0, abs=1e-9)


def test_far_from_zero_the_gradient_stays_finite() -> None:
    z = (100 * features(6).float()).requires_grad_()
    encoded = LookupFreeQuantizer(6)(z)
    (gradient,) = torch.autograd.grad(encoded.losses["entropy"], z)
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(encoded.losses["entropy"])


def test_groups_bound_the_entropy_from_above_and_are_exact_for_independent_bits() -> None:
    options = {"num_bits": 6, "temperature": 1.0}
    z = features(6)
    exact = LookupFreeQuantizer(**options)(z).statistics
    groups = LookupFreeQuantizer(**options, entropy_group_bits=2)(z).statistics
    assert groups["entropy_of_each"] == exact["entropy_of_each"]
    assert groups["entropy_of_all"] > exact["entropy_of_all"] + 1e-3
    same = z[:1, :, :1, :1, :1].expand_as(z)  # one vector: the bits of the mean are independent
    independent = LookupFreeQuantizer(**options, entropy_group_bits=2)(same).statistics
    assert torch.allclose(independent["entropy_of_all"], independent["entropy_of_each"])


def test_groups_are_of_neighbours_and_of_every_third_bit() -> None:
    z = features(6)
    p = torch.sigmoid(4 * z.movedim(1, -1).flatten(0, -2))  # [n, 6]
    groups = [(0, 1), (2, 3), (4, 5), (0, 3), (1, 4), (2, 5)]
    expected = sum(entropy(joint_probabilities(p[:, list(group)]).mean(0)) for group in groups) / 2
    grouped = LookupFreeQuantizer(6, temperature=1.0, entropy_group_bits=2)(z).statistics["entropy_of_all"]
    assert torch.allclose(grouped, expected)


def test_a_quarter_of_a_million_codes_fit_into_memory() -> None:
    quantizer = LookupFreeQuantizer(18)
    z = torch.randn(2, 18, 5, 16, 16, generator=keyed_generator(0)).requires_grad_()
    largest = 0

    def watch(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        encoded = quantizer(z)
    encoded.losses["entropy"].backward()
    assert encoded.codes.max() < quantizer.codebook_size == 2**18
    assert largest <= 2560 * 2**9  # not 2560 * 2^18
    # random signs: of 2,560 codes most are used once, and the mean knows no more of them
    assert encoded.statistics["entropy_of_all"].item() == pytest.approx(math.log(2560), abs=0.2)


def test_uniform_use_of_many_codes_reaches_the_full_entropy() -> None:
    z = torch.zeros(1, 18, 1, 1, 1)
    statistics = LookupFreeQuantizer(18)(z).statistics
    assert statistics["entropy_of_all"].item() == pytest.approx(18 * math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bits": 0}, "num_bits=0: expected 1 to 24"),
        ({"num_bits": 40}, "num_bits=40: expected 1 to 24"),
        ({"num_bits": 10, "entropy_group_bits": 4}, "entropy_group_bits=4 does not divide num_bits=10"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LookupFreeQuantizer(**options)


def test_two_ranks_have_the_entropy_and_the_gradients_of_one_process(two_ranks: TwoRanks) -> None:
    parts = [rank["lookup_free"] for rank in two_ranks]
    z = torch.cat([part["z"] for part in parts]).requires_grad_()
    encoded = LookupFreeQuantizer(5, temperature=1.0)(z)
    (gradient,) = torch.autograd.grad(encoded.losses["entropy"], z)
    for part in parts:
        assert torch.allclose(part["entropy_of_all"], encoded.statistics["entropy_of_all"])
        assert torch.allclose(part["perplexity"], encoded.statistics["perplexity"])
    # DDP averages gradients over the ranks: each rank's are those of twice its share
    of_all = torch.cat([part["gradient_of_all"] for part in parts]) / 2
    (expected,) = torch.autograd.grad(
        LookupFreeQuantizer(5, temperature=1.0)(z).losses["entropy"] - 0.1 * of_each(z), z
    )
    assert torch.allclose(of_all, expected)
    assert gradient.abs().sum() > 0


def of_each(z: Tensor) -> Tensor:
    return entropy(enumerated(z.movedim(1, -1).flatten(0, -2), 1.0)).mean()
