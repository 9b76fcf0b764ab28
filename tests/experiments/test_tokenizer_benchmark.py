"""The plain tokenizers that ours are measured against are the same networks."""

import pytest
import torch

from experiments.benchmarks import tokenizers
from experiments.benchmarks.tokenizers import FAMILIES, TOY
from models.random import keyed_generator


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_network_is_the_same(family: str) -> None:
    torch.manual_seed(0)
    ours = FAMILIES[family](TOY)
    plain = FAMILIES[family](TOY)
    frames = 17 if ours.encoder.is_causal else 16
    video = torch.rand(2, 3, frames, TOY.resolution, TOY.resolution, generator=keyed_generator(0)) * 2 - 1
    ours(video)  # makes the codebook, moves batch norm
    plain.load_state_dict(ours.state_dict())
    for name, value, other in zip(
        ("reconstruction", "commitment"),
        tokenizers.our_forward(ours, video),
        tokenizers.plain_forward(plain, video),
        strict=True,
    ):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4, msg=name)
    for (name, value), other in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4, msg=name)
    with tokenizers.evaluating(ours):
        encoded = ours.encode(video)
        assert torch.equal(tokenizers.plain_codes(ours, video), encoded.codes)
        torch.testing.assert_close(
            tokenizers.plain_decode(ours, encoded.latents), ours.decode(encoded.latents), rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
def test_tokenizers_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "FAMILIES", {"causal": tokenizers.causal})
    rows = {row.name: row.value for row in tokenizers.run(quick=True)}
    assert len(rows) == 6
    assert all(value > 0 for value in rows.values())
    assert {name.split(":")[0] for name in rows} == {"causal"}
