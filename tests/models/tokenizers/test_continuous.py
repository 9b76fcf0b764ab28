import pytest
import torch
from torch import Tensor

from models.random import keyed_generator
from models.tokenizers import (
    VQGAN3D,
    ContinuousLatents,
    GaussianLatents,
    Quantizer,
    TimeAgnosticDecoder,
    TimeAgnosticEncoder,
)

TwoRanks = list[dict[str, dict[str, Tensor]]]


def features(channels: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, 2, 2, 3, generator=keyed_generator(channels))


def test_a_projection_is_handed_on_as_it_is() -> None:
    z = features(4)
    encoded = ContinuousLatents(4)(z)
    assert encoded.latents is z
    assert encoded.codes is None
    assert encoded.losses == {}
    assert encoded.statistics["latent_std"].item() == pytest.approx(z.std(correction=0).item())


def test_evaluation_takes_the_mean() -> None:
    z = features(6)
    assert torch.equal(GaussianLatents(3).eval()(z).latents, z[:, :3])


def test_training_draws_from_the_distribution_by_key() -> None:
    z = torch.cat([torch.full((1, 1, 8, 32, 32), 3.0), torch.full((1, 1, 8, 32, 32), 4.0).log()], dim=1)
    quantizer = GaussianLatents(1)
    latents = [quantizer(z, keyed_generator(key)).latents for key in (1, 1, 2)]
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])
    assert latents[0].mean().item() == pytest.approx(3, abs=0.1)  # 8,192 draws of standard deviation 2
    assert latents[0].std().item() == pytest.approx(2, abs=0.1)


def test_divergence_is_that_of_the_library_summed_over_a_clip() -> None:
    z = features(6)
    normal = torch.distributions.Normal(z[:, :3], (z[:, 3:] / 2).exp())
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    loss = GaussianLatents(3, kl_weight=0.5)(z).losses["kl"]
    assert torch.allclose(loss, 0.5 * divergence.sum() / 2)


@pytest.mark.parametrize("quantizer", [ContinuousLatents(3), GaussianLatents(3)], ids=["projection", "gaussian"])
def test_a_continuous_tokenizer_encodes_and_decodes_and_has_no_codes(quantizer: Quantizer) -> None:
    tokenizer = VQGAN3D(
        TimeAgnosticEncoder(base_channels=2, downsample=(2, 2, 2)),
        quantizer,
        TimeAgnosticDecoder(base_channels=2, downsample=(2, 2, 2)),
    ).eval()
    encoded = tokenizer.encode(torch.zeros(1, 3, 4, 8, 8))
    assert encoded.latents.shape == (1, 3, 2, 4, 4)
    assert tokenizer.decode(encoded.latents).shape == (1, 3, 4, 8, 8)
    assert tokenizer.codebook_size is None
    with pytest.raises(ValueError, match="is continuous: no codes stand for its latents"):
        tokenizer.codes_to_latents(torch.zeros(1, 2, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="is continuous: its latents have no codes"):
        tokenizer.latents_to_codes(encoded.latents)


def test_two_ranks_share_the_noise_that_one_would_draw(two_ranks: TwoRanks) -> None:
    parts = [rank["gaussian"] for rank in two_ranks]
    z = torch.cat([part["z"] for part in parts])
    assert torch.equal(
        torch.cat([part["latents"] for part in parts]), GaussianLatents(2)(z, keyed_generator(3)).latents
    )
