"""Text as vectors, for generators that read prompts.

Both encoders take a list of strings and give `[B, S, E]` vectors and a mask `[B, S]`, True where there is text. A text
that is left out is a row without any True: cross-attention on it is self-attention alone.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

END = 256  # after the 256 bytes


class ByteTextEncoder(nn.Module):
    """A small transformer over the bytes of a text, trained along with the model that reads it.

    Not part of any paper: it needs no vocabulary and no files, so text can be learned where nothing can be downloaded.

    Args:
        dim: Width `E` of the vectors, a multiple of 32.
        max_tokens: Bytes that are read, the end included; what is longer is cut off.
        depth: Layers.

    Raises:
        ValueError: If a size is out of its range.
    """

    def __init__(self, dim: int, max_tokens: int, depth: int = 2) -> None:
        super().__init__()
        if dim % 32 or max_tokens < 2:
            raise ValueError(
                f"text_dim={dim}, text_tokens={max_tokens}: the byte encoder takes a multiple of 32, and at least 2 "
                "(--model.text_dim, --model.text_tokens)."
            )
        self.max_tokens = max_tokens
        self.embedding = nn.Embedding(END + 1, dim)
        self.positions = nn.Parameter(torch.empty(max_tokens, dim).normal_(std=0.02))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, dim // 32, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts: `[B, S, E]` and `[B, S]`, where S is the length of the longest one."""
        rows = [[*text.encode()[: self.max_tokens - 1], END] for text in texts]
        length = max(map(len, rows))
        device = self.positions.device
        codes = torch.tensor([row + [END] * (length - len(row)) for row in rows], device=device)
        is_text = torch.arange(length, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
        x = self.embedding(codes) + self.positions[:length]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~is_text)
        return self.norm(x), is_text


class T5TextEncoder(nn.Module):
    """A frozen T5 from a local folder; W.A.L.T reads T5-XL (2048 wide).

    Args:
        folder: As `save_pretrained` of transformers writes it, weights and tokenizer.
        dim: Width of its vectors.
        max_tokens: Tokens that are read; what is longer is cut off.

    Raises:
        FileNotFoundError: If the folder is not there.
        ValueError: If the optional packages are not installed, or the width is another one.
    """

    def __init__(self, folder: str, dim: int, max_tokens: int) -> None:
        super().__init__()
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise ValueError(
                "This model reads text through T5, which needs optional packages: install longtake[text], such as by "
                "`pip install 'longtake[text]'`. --model.text=bytes does without, in a run of its own."
            ) from error
        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"No T5 at {folder} (--model.t5_weights): a folder with weights and tokenizer, as `save_pretrained` of "
                "transformers writes it."
            )
        self.max_tokens = max_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.encoder = T5EncoderModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
        if self.encoder.config.d_model != dim:
            raise ValueError(
                f"The T5 at {folder} has vectors of width {self.encoder.config.d_model}, the model expects {dim} "
                "(--model.text_dim)."
            )

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts: `[B, S, E]` and `[B, S]`, where S is the length of the longest one."""
        device = next(self.encoder.parameters()).device
        words = self.tokenizer(
            list(texts), padding="longest", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(device)
        with torch.autocast(device.type, enabled=False):  # T5 leaves the range of half precision
            vectors = self.encoder(input_ids=words["input_ids"], attention_mask=words["attention_mask"])
        return vectors.last_hidden_state, words["attention_mask"].bool()
