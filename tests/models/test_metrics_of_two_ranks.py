import pytest
import torch
from metrics_of_ranks import SIZE, measure
from torch import Tensor


def test_metrics_of_two_processes_are_those_of_one(two_ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    """Uneven shares, batches that end differently, a sample that both ranks have, and a rank without any."""
    first, second = (rank["metrics"] for rank in two_ranks)
    alone = measure([torch.arange(SIZE)], [torch.arange(40)])
    assert first.keys() == second.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        if name != "frechet_after":
            assert first[name].tolist() == pytest.approx(value.tolist(), rel=1e-9, abs=1e-12), name
    assert not torch.equal(first["frechet"], first["frechet_after"])
