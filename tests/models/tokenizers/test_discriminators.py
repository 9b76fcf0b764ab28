import pytest
import torch

from models.tokenizers import PatchDiscriminator


@pytest.mark.parametrize(("num_axes", "parameters"), [(2, 2_766_529), (3, 11_057_857)])
def test_published_parameter_counts(num_axes: int, parameters: int) -> None:
    with torch.device("meta"):
        discriminator = PatchDiscriminator(num_axes)
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == parameters


@pytest.mark.parametrize(
    ("num_axes", "clip", "sizes"),
    [
        (2, (128, 128), [(65, 65), (33, 33), (17, 17), (18, 18), (19, 19)]),
        (3, (16, 128, 128), [(9, 65, 65), (5, 33, 33), (3, 17, 17), (4, 18, 18), (5, 19, 19)]),
    ],
)
def test_map_sizes_of_a_published_clip(num_axes: int, clip: tuple[int, ...], sizes: list[tuple[int, ...]]) -> None:
    with torch.device("meta"):
        logits, maps = PatchDiscriminator(num_axes, base_channels=4)(torch.empty(1, 3, *clip))
    assert [tuple(map_.shape[2:]) for map_ in [*maps, logits]] == sizes
    assert [map_.shape[1] for map_ in [*maps, logits]] == [4, 8, 16, 32, 1]


def test_channels_stop_doubling_at_512() -> None:
    with torch.device("meta"):
        _, maps = PatchDiscriminator(2, base_channels=256, num_layers=2)(torch.empty(1, 3, 16, 16))
    assert [map_.shape[1] for map_ in maps] == [256, 512, 512]


def test_parameters_have_the_official_names() -> None:
    with torch.device("meta"):
        names = PatchDiscriminator(3).state_dict().keys()
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    expected = {f"model{i}.0.{name}" for i in range(5) for name in ("weight", "bias")}
    assert names == expected | {f"model{i}.1.{name}" for i in (1, 2, 3) for name in norm}
