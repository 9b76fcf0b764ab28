import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from models.random import keyed_generator
from models.tokenizers import LPIPS, PatchDiscriminator
from models.tokenizers.losses import (
    discriminator_loss,
    feature_matching_loss,
    generator_terms,
    hinge_loss,
    pick_frames,
    vanilla_loss,
)

# torchvision's VGG16: which entries of `features` are convolutions, and their channels
VGG_CONVOLUTIONS = {
    0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
    17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512),
}  # fmt: skip
VGG_POOLS = (4, 9, 16, 23)
VGG_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3


def images(key: int) -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=keyed_generator(key)) - 0.5


@pytest.fixture(scope="module")
def files() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights in the layout of torchvision's and LPIPS' files."""
    generator = keyed_generator(0)
    vgg = {"classifier.6.bias": torch.zeros(1000)}
    for i, (fan_in, fan_out) in VGG_CONVOLUTIONS.items():
        scale = (2 / (9 * fan_in)) ** 0.5
        vgg[f"features.{i}.weight"] = torch.randn(fan_out, fan_in, 3, 3, generator=generator) * scale
        vgg[f"features.{i}.bias"] = torch.randn(fan_out, generator=generator) * 0.1
    widths = (64, 128, 256, 512, 512)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1, generator=generator) for i, n in enumerate(widths)}
    return vgg, heads


@pytest.fixture(scope="module")
def folder(files: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(files[0], folder / "vgg16-397923af.pth")
    torch.save(files[1], folder / "vgg.pth")
    return folder


@pytest.fixture(scope="module")
def lpips(folder: Path) -> LPIPS:
    return LPIPS.from_folder(folder)


def test_hinge_at_zero_is_one_and_vanishes_beyond_the_margin() -> None:
    zeros = torch.zeros(2, 1, 3, 3)
    assert hinge_loss(zeros, zeros) == 1
    assert hinge_loss(zeros + 1, zeros - 1) == 0
    assert hinge_loss(zeros - 1, zeros + 2) == 0.5 * (2 + 3)


def test_vanilla_loss_is_half_the_cross_entropy_of_real_and_fake() -> None:
    real, fake = images(0), images(1)
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    expected = F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)
    assert torch.allclose(vanilla_loss(real, fake), expected / 2)
    assert vanilla_loss(zeros, zeros).item() == pytest.approx(math.log(2))


def test_feature_matching_sums_the_mean_distances_of_maps() -> None:
    fake = [torch.full((1, 2, 4, 4), 3.0, requires_grad=True), torch.full((1, 5, 2, 2), -1.0, requires_grad=True)]
    real = [torch.ones(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 5, 2, 2, requires_grad=True)]
    loss = feature_matching_loss(fake, real)
    assert loss == 2 + 1
    loss.backward()
    assert fake[0].grad is not None
    assert real[0].grad is None
    assert feature_matching_loss(fake, fake) == 0


def test_each_clip_gives_its_own_frame() -> None:
    video = torch.arange(2 * 3 * 4.0).view(2, 3, 4, 1, 1)
    assert torch.equal(pick_frames(video, torch.tensor([3, 0])), torch.stack([video[0, :, 3], video[1, :, 0]]))


@pytest.mark.parametrize("num_axes", [2, 3])
def test_generator_and_discriminator_pull_in_opposite_directions(num_axes: int) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(num_axes, base_channels=2, num_layers=2)
    shape = (2, 3, 4, 8, 8)[: 2 + num_axes]
    real = torch.rand(shape, generator=keyed_generator(0)) - 0.5
    fake = (torch.rand(shape, generator=keyed_generator(1)) - 0.5).requires_grad_()
    gan, matching = generator_terms(discriminator, real, fake)
    logits, maps = discriminator(fake)
    assert torch.allclose(gan, -logits.mean())
    assert torch.allclose(matching, feature_matching_loss(maps, discriminator(real)[1]))
    assert torch.autograd.grad(gan + matching, fake)[0].abs().max() > 0
    loss = discriminator_loss(discriminator, real, fake, "hinge")
    assert torch.allclose(loss, hinge_loss(discriminator(real)[0], discriminator(fake)[0]))
    loss.backward()
    assert fake.grad is None
    assert discriminator.model0[0].weight.grad.abs().max() > 0
    vanilla = discriminator_loss(discriminator, real, fake, "vanilla")
    assert torch.allclose(vanilla, vanilla_loss(discriminator(real)[0], discriminator(fake)[0]))


def test_lpips_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        lpips = LPIPS()
    assert sum(parameter.numel() for parameter in lpips.parameters()) == 14_716_160


def test_lpips_follows_its_definition(lpips: LPIPS, files: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    vgg, heads = files
    x, y = images(1), images(2)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((image - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for image in (x, y))
    expected = torch.zeros(2)
    for i in range(30):
        if i in VGG_CONVOLUTIONS:
            a, b = (F.conv2d(z, vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"], padding=1) for z in (a, b))
        elif i in VGG_POOLS:
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
        else:
            a, b = a.relu(), b.relu()
        if i in VGG_TAPS:
            unit = [z / z.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10) for z in (a, b)]
            head = heads[f"lin{VGG_TAPS.index(i)}.model.1.weight"]
            expected += F.conv2d((unit[0] - unit[1]).square(), head).mean((1, 2, 3))
    assert torch.allclose(lpips(x, y), expected.mean(), rtol=1e-4)


def test_lpips_is_a_distance(lpips: LPIPS) -> None:
    x, y = images(1), images(2)
    assert lpips(x, x) == 0
    assert lpips(x, y) > 0
    assert torch.allclose(lpips(x, y), lpips(y, x))


def test_lpips_teaches_the_image_but_does_not_learn(lpips: LPIPS) -> None:
    x = images(1).requires_grad_()
    lpips(x, images(2)).backward()
    assert x.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_lpips_stays_in_evaluation(lpips: LPIPS) -> None:
    assert not any(module.training for module in lpips.train().modules())


def test_lpips_reads_safetensors_as_well(
    lpips: LPIPS, files: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path
) -> None:
    save_file(files[0], tmp_path / "vgg16-397923af.safetensors")
    save_file(files[1], tmp_path / "vgg.safetensors")
    state = LPIPS.from_folder(tmp_path).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in lpips.state_dict().items())


def test_missing_weights_are_named_with_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af.pth(.|\n)*https://download.pytorch.org(.|\n)*lpips"):
        LPIPS.from_folder(tmp_path)


def test_foreign_weights_are_refused(files: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path) -> None:
    save_file(files[1], tmp_path / "vgg16-397923af.safetensors")
    save_file(files[1], tmp_path / "vgg.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of LPIPS with VGG16"):
        LPIPS.from_folder(tmp_path)
