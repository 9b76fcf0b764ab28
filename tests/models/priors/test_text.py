"""Texts as vectors: the built-in encoder, and T5 behind its optional packages."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.priors.text import ByteTextEncoder, T5TextEncoder


def test_a_text_has_as_many_vectors_as_bytes_and_an_end_whatever_its_neighbours() -> None:
    encoder = ByteTextEncoder(32, 8).eval()
    texts = ["a cat", "", "größer als alles"]
    vectors, mask = encoder(texts)
    assert vectors.shape == (3, 8, 32)
    assert mask.sum(1).tolist() == [6, 1, 8]
    for i, text in enumerate(texts):
        alone, whole = encoder([text])
        assert whole.all()
        assert torch.allclose(vectors[i][mask[i]], alone[0], atol=1e-5)


def test_texts_are_told_apart_and_the_encoder_learns() -> None:
    encoder = ByteTextEncoder(32, 8)
    vectors, mask = encoder(["a cat", "a rat"])
    assert not torch.allclose(vectors[0], vectors[1])
    vectors[mask].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.embedding.parameters())


@pytest.mark.parametrize("sizes", [(48, 8), (32, 1)])
def test_sizes_that_the_byte_encoder_does_not_take_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"a multiple of 32, and at least 2 \(--model.text_dim, --model.text_tokens\)"):
        ByteTextEncoder(*sizes)


def test_t5_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"install longtake\[text\].*--model.text=bytes"):
        T5TextEncoder("nowhere", 2048, 16)


class StandIn(torch.nn.Module):
    """For transformers' T5: each token's vector is its number."""

    config = SimpleNamespace(d_model=4)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=input_ids[..., None] * self.weight)


class Words(dict):
    def to(self, device: torch.device) -> "Words":
        return self


def words(texts: list[str], padding: str, truncation: bool, max_length: int, return_tensors: str) -> Words:
    assert (padding, truncation, return_tensors) == ("longest", True, "pt")
    rows = [[len(word) for word in text.split()][:max_length] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return Words(input_ids=ids, attention_mask=(ids > 0).long())


def test_t5_is_read_from_its_folder_and_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda folder, local_files_only: words),
        T5EncoderModel=SimpleNamespace(from_pretrained=lambda folder, local_files_only: StandIn()),
    )
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    encoder = T5TextEncoder(str(tmp_path), 4, 3)
    vectors, mask = encoder(["a dog runs away", "rain"])
    assert vectors[..., 0].tolist() == [[1, 3, 4], [4, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    with pytest.raises(ValueError, match=r"vectors of width 4, the model expects 2048 \(--model.text_dim\)"):
        T5TextEncoder(str(tmp_path), 2048, 3)
    with pytest.raises(FileNotFoundError, match=r"No T5 at nowhere \(--model.t5_weights\)"):
        T5TextEncoder("nowhere", 4, 3)
