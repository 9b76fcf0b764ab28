"""The Linear layer of decoding steps."""

import pytest
import torch
from torch import nn

from models.blocks.causal import FewRowsLinear


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 8), (8, 1, 8), (4, 8, 8), (3, 11, 8)])
def test_it_is_a_linear_layer_for_any_number_of_rows(shape: tuple[int, ...], has_bias: bool) -> None:
    few, plain = FewRowsLinear(8, 6, has_bias).double(), nn.Linear(8, 6, has_bias).double()
    plain.load_state_dict(few.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(few(x), plain(x), rtol=0, atol=1e-14)
    few(x).square().sum().backward()
    plain(x).square().sum().backward()
    for ours, theirs in zip(few.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_it_keeps_the_type_of_autocast() -> None:  # or a cache would find keys of another type than its own
    few = FewRowsLinear(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert {few(torch.randn(rows, 8)).dtype for rows in (1, 8, 64)} == {torch.bfloat16}


def test_it_takes_rows_that_do_not_lie_together() -> None:
    few, x = FewRowsLinear(8, 6), torch.randn(4, 3, 8)
    torch.testing.assert_close(few(x.transpose(0, 1)), few(x).transpose(0, 1))
