"""Weights that the golden numbers of the TATS and MeBT networks were computed with, and what two processes compute."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

GoldenTensor = Callable[[str, tuple[int, ...], float], Tensor]


def _golden_tensor(official_key: str, shape: tuple[int, ...], gain: float) -> Tensor:
    """Values that depend on the official parameter name and the position alone, in float64."""
    k = sum((i + 1) * ord(character) for i, character in enumerate(official_key)) % 10007
    j = torch.arange(torch.Size(shape).numel())
    u = (2 * ((31 * j**2 + (17 + k) * j + 101 * k + 7) % 10007).double() / 10006 - 1).view(shape)
    if "_emb" in official_key:
        return u
    if official_key.endswith("running_mean"):
        return 0.1 * u
    if official_key.endswith("running_var"):
        return 1 + 0.2 * u
    if official_key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.float64)
    if official_key.endswith("bias"):
        return 0.1 * u
    if len(shape) == 1:
        return 1 + 0.1 * u
    return gain * u * (3 / (u.numel() / shape[0])) ** 0.5


@pytest.fixture(scope="session")
def golden_tensor() -> GoldenTensor:
    return _golden_tensor


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """Results of `two_ranks.py`, one entry a rank."""
    folder = tmp_path_factory.mktemp("two_ranks")
    script = Path(__file__).with_name("two_ranks.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
