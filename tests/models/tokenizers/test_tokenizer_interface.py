import dataclasses

import pytest
import torch
from torch import Tensor

from models.random import keyed_generator
from models.tokenizers import VQGAN3D, Encoded, TimeAgnosticDecoder, TimeAgnosticEncoder, VectorQuantizer


@pytest.fixture
def tokenizer() -> VQGAN3D:
    torch.manual_seed(0)
    return VQGAN3D(
        TimeAgnosticEncoder(base_channels=2, downsample=(2, 4, 4)),
        VectorQuantizer(16, 5),
        TimeAgnosticDecoder(base_channels=2, downsample=(2, 4, 4)),
    ).eval()


@pytest.fixture
def video() -> Tensor:
    return torch.rand(2, 3, 6, 8, 12, generator=keyed_generator(0)) * 2 - 1


def test_encoding_has_the_shapes_it_promises(tokenizer: VQGAN3D, video: Tensor) -> None:
    encoded = tokenizer.encode(video)
    assert tokenizer.latent_shape(6, 8, 12) == (3, 2, 3)
    assert encoded.codes.shape == (2, 3, 2, 3)
    assert encoded.latents.shape == (2, 5, 3, 2, 3)
    assert [field.name for field in dataclasses.fields(Encoded)] == ["latents", "codes", "losses", "statistics"]
    assert encoded.losses.keys() == {"commitment"}
    assert encoded.statistics.keys() == {"perplexity", "usage"}
    assert tokenizer.decode(encoded.latents).shape == video.shape


def test_latents_are_what_decode_takes_and_what_codes_stand_for(tokenizer: VQGAN3D, video: Tensor) -> None:
    encoded = tokenizer.encode(video)
    assert torch.equal(tokenizer.codes_to_latents(encoded.codes), encoded.latents)
    expected = tokenizer.decoder(tokenizer.post_vq_conv(encoded.latents))
    assert torch.equal(tokenizer.decode_native(encoded.latents), expected)


def test_forward_reconstructs_without_clamping(tokenizer: VQGAN3D, video: Tensor) -> None:
    tokenizer.decoder.conv_last.conv.bias.data.fill_(3)
    reconstruction, encoded = tokenizer(video)
    assert torch.equal(reconstruction, tokenizer.decode_native(encoded.latents))
    assert reconstruction.max() > 0.5
    assert (tokenizer.decode(encoded.latents) == 1).any()
    assert tokenizer.decode(encoded.latents).abs().max() <= 1


@pytest.mark.parametrize("pixel_range", [(-0.5, 0.5), (0.0, 1.0), (-1.0, 1.0)])
def test_networks_see_the_native_range(tokenizer: VQGAN3D, pixel_range: tuple[float, float]) -> None:
    tokenizer = VQGAN3D(tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder, pixel_range).eval()
    low, high = pixel_range
    house = torch.tensor([-1.0, 0.0, 1.0])
    native = torch.tensor([low, (low + high) / 2, high])
    assert torch.equal(tokenizer.to_native(house), native)
    assert torch.equal(tokenizer.from_native(native), house)
    seen: list[Tensor] = []
    tokenizer.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokenizer.encode(torch.full((1, 3, 2, 4, 4), -1.0))
    assert (seen[0] == low).all()


def test_a_clip_that_does_not_fit_is_refused_before_it_is_encoded(tokenizer: VQGAN3D) -> None:
    assert tokenizer.valid_frames(6)
    assert not tokenizer.valid_frames(7)
    with pytest.raises(ValueError, match=r"frames=7 .* Nearest: 6 or 8 \(--data.num_frames\)"):
        tokenizer.encode(torch.zeros(1, 3, 7, 8, 8))


def test_encoder_and_decoder_must_agree(tokenizer: VQGAN3D) -> None:
    with pytest.raises(ValueError, match=r"encoder.downsample=\(2, 4, 4\), but decoder.downsample=\(4, 4, 4\)"):
        VQGAN3D(tokenizer.encoder, tokenizer.quantizer, TimeAgnosticDecoder(base_channels=2, downsample=(4, 4, 4)))


def test_it_says_what_a_prior_needs_to_know(tokenizer: VQGAN3D) -> None:
    assert (tokenizer.downsample, tokenizer.codebook_size, tokenizer.context_frames()) == ((2, 4, 4), 16, 14)


def test_reconstruction_trains_the_encoder_through_the_codes(tokenizer: VQGAN3D, video: Tensor) -> None:
    tokenizer.train()(video)[0].square().mean().backward()
    assert tokenizer.encoder.conv_first.conv.weight.grad.abs().max() > 0


def test_a_rearranged_batch_gives_rearranged_codes(tokenizer: VQGAN3D, video: Tensor) -> None:
    assert torch.equal(tokenizer.encode(video.flip(0)).codes, tokenizer.encode(video).codes.flip(0))
