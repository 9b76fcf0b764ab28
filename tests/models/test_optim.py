import pytest
import torch
from torch import Tensor, nn

from models.optim import Muon, matrices, orthogonalized, split_groups
from models.random import keyed_generator


def draw(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(shape, generator=keyed_generator(0, key), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(8, 8), (6, 40), (40, 6)])
def test_newton_schulz_keeps_the_directions_and_levels_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = (left.T @ orthogonalized(matrix) @ right.T).diagonal()
    assert values.min() > 0.3
    assert values.max() < 1.3
    torch.testing.assert_close((left * values) @ right, orthogonalized(matrix))


def test_a_kernel_moves_as_its_matrix_by_the_rate_and_not_by_the_size_of_the_gradient() -> None:
    gradient = draw(8, 3, 2, 2)
    moves = []
    for shape, size in (((8, 3, 2, 2), 1.0), ((8, 12), 1.0), ((8, 12), 1e3)):
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        weight.grad = size * gradient.view(shape)
        Muon([{"params": [weight], "orthogonal": True, "lr": 0.02}]).step()
        moves.append(weight.detach().view(8, 12))
    torch.testing.assert_close(moves[0], moves[1])
    torch.testing.assert_close(moves[1], moves[2], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(moves[0], -0.02 * orthogonalized(gradient.flatten(1)), rtol=1e-4, atol=1e-8)


def test_tall_matrices_move_further() -> None:
    weight = nn.Parameter(torch.zeros(32, 2, dtype=torch.float64))
    weight.grad = draw(32, 2)
    Muon([{"params": [weight], "orthogonal": True, "lr": 0.02}]).step()
    torch.testing.assert_close(weight.detach(), -0.08 * orthogonalized(weight.grad), rtol=1e-4, atol=1e-8)


def test_the_other_groups_are_those_of_adamw() -> None:
    ours, theirs = (nn.Parameter(draw(5, 4, key=1)) for _ in range(2))
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    optimizers = [Muon([ours], **settings), torch.optim.AdamW([theirs], **settings)]
    for step in range(5):
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = draw(5, 4, key=step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_it_goes_on_from_its_state() -> None:
    def run(restart: bool) -> Tensor:
        network = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).double()
        for key, parameter in enumerate(network.parameters()):
            parameter.data = draw(*parameter.shape, key=key)

        def optimizer() -> Muon:
            return Muon(split_groups([{"params": list(network.parameters())}], matrices(network), 0.02), lr=0.01)

        one = optimizer()
        for step in range(4):
            if restart and step == 2:
                state, one = one.state_dict(), optimizer()
                one.load_state_dict(state)
            one.zero_grad()
            network(draw(3, 4, key=step)).square().sum().backward()
            one.step()
        return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])

    torch.testing.assert_close(run(restart=True), run(restart=False), rtol=0, atol=0)


def test_groups_keep_their_settings_when_matrices_are_taken_out() -> None:
    network = nn.Sequential(nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3), nn.Embedding(4, 3))
    decayed, rest = [network[0].weight], [network[0].bias, *network[1].parameters(), *network[2].parameters()]
    groups = split_groups(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], matrices(network), 0.02
    )
    assert [(group.get("orthogonal", False), group["weight_decay"]) for group in groups] == [(True, 0.1), (False, 0.0)]
    assert groups[0]["params"] == decayed
    assert len(groups[1]["params"]) == len(rest)


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[4\].*--model.muon_lr=0"):
        Muon([{"params": [nn.Parameter(torch.zeros(4))], "orthogonal": True}])
