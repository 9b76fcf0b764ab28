import pytest
import torch
from torch import Tensor, nn

from models.blocks.norm import FrameGroupNorm, SyncBatchNorm, make_norm

TwoRanks = list[dict[str, dict[str, Tensor]]]


def test_one_process_normalises_as_torch_does() -> None:
    ours, theirs = SyncBatchNorm(4), nn.BatchNorm3d(4)
    x = torch.randn(3, 4, 2, 5, 5) * 3 + 1
    assert torch.equal(ours(x), theirs(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("case", ["2d", "3d"])
def test_two_ranks_normalise_as_one_process_with_both_batches(two_ranks: TwoRanks, case: str) -> None:
    parts = [rank[case] for rank in two_ranks]
    x = torch.cat([part["x"] for part in parts]).requires_grad_()
    norm = SyncBatchNorm(4).double()
    norm.weight.data = parts[0]["weight"]
    y = norm(x)
    (y.sin() * torch.cat([part["loss_weights"] for part in parts])).sum().backward()

    expected = {"y": y.detach(), "x_grad": x.grad}
    for name, value in expected.items():
        assert torch.allclose(torch.cat([part[name] for part in parts]), value, rtol=1e-10, atol=1e-12), name
    for name, parameter in norm.named_parameters():  # DDP would average these; their sum is the whole gradient
        assert torch.allclose(sum(part[f"{name}_grad"] for part in parts), parameter.grad, rtol=1e-10), name
    for part in parts:
        for name, value in norm.state_dict().items():
            assert torch.allclose(part[name], value, rtol=1e-12), name


def test_batch_and_group_norm_are_set_as_in_tats() -> None:
    batch, group = make_norm("batch", 64), make_norm("group", 64)
    assert isinstance(batch, SyncBatchNorm)
    assert (batch.eps, batch.momentum) == (1e-5, 0.1)
    assert isinstance(group, nn.GroupNorm)
    assert (group.num_groups, group.eps) == (32, 1e-6)


def test_group_norm_refuses_channels_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="do not divide 48 channels: raise base_channels"):
        make_norm("group", 48)


def test_frame_group_norm_treats_each_frame_as_an_image() -> None:
    norm = make_norm("frame_group", 8, num_groups=2)
    assert isinstance(norm, FrameGroupNorm)
    torch.nn.init.uniform_(norm.weight)
    torch.nn.init.uniform_(norm.bias)
    x = torch.randn(2, 8, 3, 5, 4) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1)
    images = [nn.functional.group_norm(x[:, :, t], 2, norm.weight, norm.bias, 1e-6) for t in range(3)]
    assert torch.allclose(norm(x), torch.stack(images, dim=2), atol=1e-6)
    assert not torch.allclose(norm(x), nn.functional.group_norm(x, 2, norm.weight, norm.bias, 1e-6), atol=0.1)
