import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from models.random import keyed_generator
from models.tokenizers import LPIPS, PatchDiscriminator
from models.tokenizers.losses import (
    LeCam,
    adversarial_loss,
    discriminator_terms,
    feature_matching_loss,
    generator_terms,
    hinge_loss,
    non_saturating_loss,
    pick_frames,
    r1_penalty,
    vanilla_loss,
)
from models.tokenizers.timm_perceptual import TimmPerceptual

TwoRanks = list[dict[str, dict[str, Tensor]]]

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
    loss, r1, real_logits, fake_logits = discriminator_terms(discriminator, real, fake, "hinge")
    assert r1 == 0
    assert torch.allclose(real_logits, discriminator(real)[0])
    assert torch.allclose(fake_logits, logits)
    assert torch.allclose(loss, hinge_loss(discriminator(real)[0], discriminator(fake)[0]))
    loss.backward()
    assert fake.grad is None
    assert discriminator.model0[0].weight.grad.abs().max() > 0
    vanilla = discriminator_terms(discriminator, real, fake, "vanilla")[0]
    assert torch.allclose(vanilla, vanilla_loss(discriminator(real)[0], discriminator(fake)[0]))


def test_the_non_saturating_loss_is_that_of_the_reference_at_zero() -> None:
    zeros = torch.zeros(4, 1)
    assert non_saturating_loss(zeros, zeros).item() == pytest.approx(1.386294, abs=1e-6)
    assert 0.1 * adversarial_loss(zeros, "non_saturating").item() == pytest.approx(0.0693147, abs=1e-7)
    logits = torch.tensor([[-2.0], [3.0]])
    assert adversarial_loss(logits, "non_saturating").item() == pytest.approx(
        (math.log1p(math.exp(2)) + math.log1p(math.exp(-3))) / 2
    )
    assert adversarial_loss(logits, "hinge") == adversarial_loss(logits, "vanilla") == -0.5


class Linear(torch.nn.Module):
    """D(x) = w . x, without hidden maps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3 * 16 * 24, generator=keyed_generator(3)) / 10)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return x.flatten(1) @ self.weight[:, None], []


def test_r1_of_a_linear_discriminator_is_the_square_of_its_weights() -> None:
    discriminator = Linear()
    penalties = [
        discriminator_terms(discriminator, images(0), images(fake), "non_saturating", with_r1=True)[1]
        for fake in (1, 2)
    ]
    assert penalties[0].item() == pytest.approx(discriminator.weight.square().sum().item(), rel=1e-5)
    assert penalties[0] == penalties[1]  # whatever the fake
    penalties[0].backward()  # a derivative of a derivative
    assert torch.allclose(discriminator.weight.grad, 2 * discriminator.weight, rtol=1e-4)


def test_r1_is_computed_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    discriminator = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(1152, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )

    def judge(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return discriminator(x), []

    real = images(0).requires_grad_()
    expected = r1_penalty(judge(real)[0], real)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert discriminator_terms(judge, images(0), images(1), "hinge", with_r1=True)[1] == expected


def test_matching_needs_hidden_maps() -> None:
    with pytest.raises(ValueError, match=r"shows no hidden maps to match: set --model.feature_matching_weight=0"):
        generator_terms(Linear(), images(0), images(1))
    gan, matching = generator_terms(Linear(), images(0), images(1), match_features=False)
    assert gan != 0
    assert matching == 0


def test_lecam_pulls_logits_to_the_past_of_the_other_side() -> None:
    ones = torch.ones(4, 1)
    lecam = LeCam()
    assert lecam(ones, -ones) == 2
    assert lecam(-ones, ones) == 0
    lecam.real.fill_(0.5)
    lecam.fake.fill_(-0.5)
    logits = (0.25 * ones).requires_grad_()
    loss = lecam(logits, ones)
    assert loss == 0.75**2
    loss.backward()
    assert torch.allclose(logits.grad, torch.full((4, 1), 2 * 0.75 / 4))


def test_lecam_takes_its_averages_at_the_end_of_a_step() -> None:
    lecam = LeCam()
    for mean in (1.0, 3.0):  # two accumulated batches
        assert lecam(torch.full((2, 1), mean), torch.full((2, 1), -mean)) == 2 * mean**2
        assert lecam.real == lecam.fake == 0
    lecam.update()
    assert lecam.real.item() == pytest.approx(0.001 * 2)
    assert lecam.fake.item() == pytest.approx(-0.001 * 2)
    lecam(torch.full((2, 1), 9.0), torch.zeros(2, 1))
    lecam.forget()
    lecam(torch.zeros(2, 1), torch.zeros(2, 1))
    lecam.update()
    assert lecam.real.item() == pytest.approx(0.999 * 0.002)
    assert lecam.state_dict().keys() == {"real", "fake"}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", pretrained=False).eval()
    path = tmp_path_factory.mktemp("timm") / "resnet10t.safetensors"
    save_file(network.state_dict(), path)
    return network, path


def test_a_classifier_of_timm_compares_logits(classifier: tuple[torch.nn.Module, Path]) -> None:
    network, path = classifier
    perceptual = TimmPerceptual("resnet10t", path, size=64)
    x, y = images(0).requires_grad_(), images(1)
    distance = perceptual.train()(x, y)
    resized = [F.interpolate(image, (64, 64), mode="bilinear") for image in (x, y)]
    assert torch.allclose(distance, (network(resized[0]) - network(resized[1])).square().mean(), rtol=1e-4)
    distance.backward()
    assert x.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())


def test_a_classifier_without_its_weights_is_refused(classifier: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="timm has no model 'resnet10tt'"):
        TimmPerceptual("resnet10tt", classifier[1])
    with pytest.raises(FileNotFoundError, match=r"No file .*nowhere.pth with the weights of timm's resnet10t"):
        TimmPerceptual("resnet10t", tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="does not hold the weights of timm's resnet18"):
        TimmPerceptual("resnet18", classifier[1])


def test_two_ranks_have_the_penalties_of_one_process(two_ranks: TwoRanks) -> None:
    parts = [rank["penalties"] for rank in two_ranks]
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(2, base_channels=2, num_layers=2).double()
    real, fake = (torch.cat([part[name] for part in parts]) for name in ("real", "fake"))
    lecam = LeCam().double()
    loss, r1, *logits = discriminator_terms(discriminator, real, fake, "non_saturating", with_r1=True)
    regulariser = lecam(*logits)
    (loss + 10 * r1 + regulariser).backward()
    lecam.update()
    for part in parts:
        assert torch.allclose(part["lecam"], regulariser)
        assert torch.allclose(part["lecam_real"], lecam.real)
    assert torch.allclose((parts[0]["r1"] + parts[1]["r1"]) / 2, r1)
    for name, parameter in discriminator.named_parameters():
        mean = (parts[0][f"grad {name}"] + parts[1][f"grad {name}"]) / 2  # as DDP has it
        assert torch.allclose(mean, parameter.grad), name


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
