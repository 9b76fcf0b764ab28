"""Numbers that TATS' official code gives for fixed weights and a fixed clip, in float64 on the CPU.

The losses go through `VQGAN3DModule`, which puts them together.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_modules.vqgan3d import VQGAN3DModule
from models.tokenizers import VQGAN3D, TimeAgnosticDecoder, TimeAgnosticEncoder, VectorQuantizer

GoldenTensor = Callable[[str, tuple[int, ...], float], Tensor]

FRAMES = torch.tensor([2, 9])
CODES = [
    [21, 17, 4, 17, 12, 8, 21, 21, 4, 17, 15, 8, 21, 4, 4, 4, 10, 1],
    [8, 4, 0, 10, 12, 13, 12, 8, 15, 14, 5, 4, 15, 15, 22, 17, 15, 4],
]
COUNTS = [1, 1, 0, 0, 8, 1, 0, 0, 4, 0, 2, 0, 3, 1, 1, 5, 0, 4, 0, 0, 0, 4, 1, 0]


def close(actual: Tensor, expected: float) -> bool:
    """Equal to the eight digits that are published."""
    return actual.item() == pytest.approx(expected, rel=1e-7)


def sums(x: Tensor, total: float, absolute: float) -> bool:
    # a sum cancels: its digits are those of the sum of magnitudes
    return x.sum().item() == pytest.approx(total, abs=1e-8 * absolute) and close(x.abs().sum(), absolute)


@pytest.fixture
def module(golden_tensor: GoldenTensor) -> VQGAN3DModule:
    tokenizer = VQGAN3D(
        TimeAgnosticEncoder(base_channels=4), VectorQuantizer(24, 6), TimeAgnosticDecoder(base_channels=4)
    )
    module = VQGAN3DModule(
        tokenizer, perceptual_weight=0, discriminator_start_step=100, discriminator_channels=4
    ).double()
    for name, value in module.state_dict().items():
        if "quantizer" not in name:
            value.copy_(golden_tensor(name.removeprefix("tokenizer."), tuple(value.shape), 1.5))
    quantizer = tokenizer.quantizer
    # 2 u: the gain cancels the factor sqrt(3 / 6) of a weight
    quantizer.embeddings.copy_(golden_tensor("codebook.embeddings", (24, 6), 2 * 2**0.5))
    quantizer.N.copy_(0.7 + 0.5 * (torch.arange(24) % 3))
    quantizer.z_avg.copy_(quantizer.N[:, None] * quantizer.embeddings)
    quantizer.initialized.fill_(True)
    return module.eval()


@pytest.fixture
def pixels() -> Tensor:
    """[2, 3, 12, 24, 16] in [-0.5, 0.5]."""
    sizes = (2, 3, 12, 24, 16)
    b, c, t, y, x = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in sizes], indexing="ij")
    return 0.4 * torch.sin(2 * b + 1.3 * c + 0.6 * t + 0.25 * y + 0.4 * x + 0.03 * x * y + 0.05 * t * y)


def test_weights_and_clip_are_those_of_the_recipe(module: VQGAN3DModule, pixels: Tensor) -> None:
    state = module.state_dict()
    first = state["tokenizer.encoder.conv_first.conv.weight"]
    assert close(first.flatten()[0], -0.030581216)
    assert close(first.flatten()[1], -0.18533371)
    assert close(first.sum(), -3.0749124)
    up = state["tokenizer.decoder.conv_blocks.0.up.convt.weight"]
    assert close(up.flatten()[0], 0.029904106)
    assert close(up.sum(), -16.028371)
    running_var = state["tokenizer.encoder.conv_blocks.1.res.norm2.running_var"]
    assert close(running_var[0], 0.88047172)
    assert close(running_var.sum(), 16.23278)
    assert close(module.tokenizer.quantizer.embeddings[0, 0], 1.8205077)
    assert close(module.tokenizer.quantizer.embeddings.sum(), 16.154307)
    assert sums(pixels, -2.3610054, 7041.0868)


def test_parameter_counts(module: VQGAN3DModule) -> None:
    networks = (
        module.tokenizer.encoder,
        module.tokenizer.decoder,
        module.image_discriminator,
        module.video_discriminator,
    )
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [116_368, 253_091, 11_629, 45_997]


def test_encoder(module: VQGAN3DModule, pixels: Tensor) -> None:
    features = module.tokenizer.encoder(pixels)
    assert features.shape == (2, 32, 3, 3, 2)
    assert sums(features, 525.49725, 765.56238)
    assert close(features[0, 0, 0, 0, 0], -0.037474638)
    assert close(features[0, 31, 2, 2, 1], -0.26396823)
    assert close(features[1, 7, 1, 0, 1], -0.25767876)
    assert close(features[1, 20, 0, 2, 0], 1.7322223)
    z = module.tokenizer.pre_vq_conv(features)
    assert sums(z, 35.336245, 271.16759)
    assert close(z[0, 0, 0, 0, 0], 1.6646827)
    assert close(z[0, 5, 2, 2, 1], 0.13523059)
    assert close(z[1, 3, 1, 0, 1], -1.7851581)


def test_codes_and_reconstruction(module: VQGAN3DModule, pixels: Tensor) -> None:
    reconstruction, encoded = module.tokenizer(2 * pixels)
    assert encoded.codes.flatten(1).tolist() == CODES
    assert close(encoded.losses["commitment"], 0.36034456)
    assert close(encoded.statistics["perplexity"], 10.031503)
    assert sums(reconstruction, 1240.5786, 71136.195)
    assert close(reconstruction[0, 0, 0, 0, 0], 2.0103279)
    assert close(reconstruction[0, 2, 11, 23, 15], 2.2805685)
    assert close(reconstruction[1, 1, 5, 12, 8], -0.99299746)
    assert close(reconstruction[1, 0, 7, 3, 9], 2.623266)


def test_decoder_on_given_codes(module: VQGAN3DModule) -> None:
    codes = (7 * torch.arange(2)[:, None] + 5 * torch.arange(18)) % 24
    latents = module.tokenizer.codes_to_latents(codes.view(2, 3, 3, 2))
    reconstruction = module.tokenizer.decode_native(latents)
    assert sums(reconstruction, 3596.6203, 89088.878)
    assert close(reconstruction[0, 0, 0, 0, 0], -2.0219727)
    assert close(reconstruction[0, 2, 11, 23, 15], 2.6868293)
    assert close(reconstruction[1, 1, 5, 12, 8], 5.9028112)


def test_discriminators(module: VQGAN3DModule, pixels: Tensor) -> None:
    logits, maps = module.image_discriminator(pixels[:, :, 3])
    expected = [95.767676, 47.888306, 29.164625, 81.89999, 8.4407609]
    assert all(close(map_.sum(), value) for map_, value in zip([*maps, logits], expected, strict=True))
    assert [tuple(map_.shape[2:]) for map_ in [*maps, logits]] == [(13, 9), (7, 5), (4, 3), (5, 4), (6, 5)]
    logits, maps = module.video_discriminator(pixels)
    expected = [868.70534, 185.97975, 114.4529, 327.389, 20.276871]
    assert all(close(map_.sum(), value) for map_, value in zip([*maps, logits], expected, strict=True))
    assert [tuple(map_.shape[2:]) for map_ in [*maps, logits]] == [
        (7, 13, 9),
        (4, 7, 5),
        (3, 4, 3),
        (4, 5, 4),
        (5, 6, 5),
    ]


def codebook_after_one_training_call(module: VQGAN3DModule, pixels: Tensor) -> VectorQuantizer:
    tokenizer = module.tokenizer
    encoded = tokenizer.quantizer.train()(tokenizer.pre_vq_conv(tokenizer.encoder(pixels)))
    assert encoded.codes.flatten(1).tolist() == CODES
    return tokenizer.quantizer


def entries(quantizer: VectorQuantizer) -> list[float]:
    e = quantizer.embeddings
    return [e[0, 0].item(), e[7, 3].item(), e[12, 1].item(), e[23, 5].item()]


def test_codebook_after_one_training_call(module: VQGAN3DModule, pixels: Tensor) -> None:
    before = module.tokenizer.quantizer.N.clone()
    quantizer = codebook_after_one_training_call(module, pixels)
    assert torch.allclose(quantizer.N, 0.99 * before + 0.01 * torch.tensor(COUNTS), rtol=1e-12)
    assert close(quantizer.N.sum(), 28.872)
    assert quantizer.N[:6].tolist() == pytest.approx([0.703, 1.198, 1.683, 0.693, 1.268, 1.693])
    assert sums(quantizer.z_avg, 20.856435, 175.97623)
    assert close(quantizer.z_avg[0, 0], 1.3026521)
    assert close(quantizer.z_avg[23, 5], 3.2711357)
    assert sums(quantizer.embeddings, 16.202923, 149.22365)
    assert entries(quantizer) == pytest.approx([1.85299, 0.44413352, -1.1246972, 1.9436339], rel=1e-7)


@pytest.mark.parametrize("released", [True, False])
def test_codebook_after_one_training_call_with_restarts(
    module: VQGAN3DModule, pixels: Tensor, released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    module.tokenizer.quantizer.restart_threshold = 1.0
    module.tokenizer.quantizer.released_restart = released
    quantizer = codebook_after_one_training_call(module, pixels)
    assert sums(quantizer.embeddings, 4.7346375, 155.14265)
    assert entries(quantizer) == pytest.approx([1.6646827, 0.44413352, -0.42296799, 1.9436339], rel=1e-7)
    restarted = [0, 3, 6, 9, 12, 15, 18, 21]
    assert ((quantizer.N == 1).nonzero().flatten().tolist() == restarted) != released
    assert released == close(quantizer.z_avg.abs().sum(), 175.97623)


def test_losses_before_the_discriminators_start(module: VQGAN3DModule, pixels: Tensor) -> None:
    reconstruction, encoded = module.tokenizer(2 * pixels)
    terms = module.generator_losses(pixels, reconstruction, encoded, FRAMES, adversarial=False)
    assert terms.keys() == {"l1", "commitment"}
    assert close(4 * terms["l1"], 10.328821)
    assert close(module.generator_loss(terms), 10.689165)


def test_losses_and_gradients_with_the_discriminators(module: VQGAN3DModule, pixels: Tensor) -> None:
    reconstruction, encoded = module.tokenizer(2 * pixels)
    terms = module.generator_losses(pixels, reconstruction, encoded, FRAMES, adversarial=True)
    loss = module.generator_loss(terms)
    assert close(terms["gan"], -2.0560995)
    assert close(4 * terms["feature_matching"], 43.987464)
    assert close(loss, 52.62053)
    assert close(module.discriminator_losses(pixels, reconstruction, FRAMES)[0]["disc"], 2.9438097)
    loss.backward()
    tokenizer = module.tokenizer
    assert close(tokenizer.encoder.conv_first.conv.weight.grad.norm(), 305.23109)
    assert close(tokenizer.pre_vq_conv.conv.weight.grad.norm(), 108.58577)
    assert close(tokenizer.decoder.conv_last.conv.weight.grad.norm(), 125.56326)


def test_each_discriminator_has_its_weight(module: VQGAN3DModule, pixels: Tensor) -> None:
    module.image_gan_weight, module.video_gan_weight = 2.0, 3.0
    reconstruction, encoded = module.tokenizer(2 * pixels)
    terms = module.generator_losses(pixels, reconstruction, encoded, FRAMES, adversarial=True)
    assert close(terms["gan"], 2 * -1.7046943 + 3 * -0.35140519)
    assert close(terms["feature_matching"], 5.4148162 + 5.5820498)
    expected = 2 * 1.7785904 + 3 * 1.1652194
    assert close(module.discriminator_losses(pixels, reconstruction, FRAMES)[0]["disc"], expected)


def test_one_generator_pass_in_training_mode(module: VQGAN3DModule, pixels: Tensor) -> None:
    module.train()
    reconstruction, encoded = module.tokenizer(2 * pixels)
    terms = module.generator_losses(pixels, reconstruction, encoded, FRAMES, adversarial=True)
    assert close(4 * terms["l1"], 9.9177758)
    assert close(terms["commitment"], 0.14855374)
    assert close(terms["gan"], -0.4592842)
    assert close(4 * terms["feature_matching"], 29.319125)
    assert encoded.codes.flatten(1).tolist() == [
        [21, 13, 4, 1, 9, 20, 21, 8, 1, 1, 1, 1, 4, 4, 4, 4, 1, 1],
        [8, 15, 7, 13, 15, 13, 1, 15, 21, 5, 19, 13, 15, 23, 4, 13, 4, 4],
    ]
    assert close(module.tokenizer.quantizer.embeddings.abs().sum(), 148.48747)
    norm = module.tokenizer.encoder.final_block[0]
    assert close(norm.running_mean.sum(), 0.31136793)
    assert close(norm.running_var.sum(), 47.348318)
    assert norm.num_batches_tracked == 1
    norm = module.image_discriminator.model1[1]
    assert close(norm.running_mean.sum(), -0.44785894)
    assert close(norm.running_var.sum(), 12.135463)
    assert norm.num_batches_tracked == 2
