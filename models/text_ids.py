"""Text as ids, for a network that reads them as they are: no text encoder, no weights.

Three ways, by what `load_text_ids` is given:

- `bytes`: the UTF-8 bytes. Built in; for small models and for trying things out.
- A file of byte-pair merges: CLIP's (`bpe_simple_vocab_16e6.txt`, packed or not), or any `merges.txt` in its format.
- A folder with a tokenizer that the `text` extra reads (`transformers`), such as T5's.
"""

import gzip
import hashlib
import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

CLIP_MERGES = 48_894  # the published file has more lines than CLIP uses
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


@dataclass(frozen=True)
class TextIds:
    """A vocabulary.

    Args:
        size: Number of ids.
        encode: Text to ids, those of its beginning and its end included.
        digest: What tells this vocabulary from others.
    """

    size: int
    encode: Callable[[str], list[int]]
    digest: str

    def rows(self, texts: list[str], length: int) -> Tensor:
        """Ids `[B, length]`: zeros where there is no more text; of a longer text the beginning and the last id."""
        out = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(out, texts, strict=True):
            ids = self.encode(text)
            ids = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return out


def byte_ids() -> TextIds:
    """Bytes of UTF-8 plus 1: id 0 is left for where there is no text."""
    return TextIds(257, lambda text: [byte + 1 for byte in text.encode()], "bytes")


def byte_pair_ids(merges: list[tuple[str, str]]) -> TextIds:
    """Byte pairs as CLIP has them (Radford et al., 2021; Sennrich et al., 2016).

    Text is lower case with single spaces. A word begins as its bytes, each written as one printable character, the last
    with the mark of a word's end; the pair that stands first in the list is joined, until none of the list is left. The
    vocabulary is the 256 characters, the same at a word's end, the joined pairs in the order of the list, and the ids
    of a text's beginning and end.

    Args:
        merges: Pairs to join, the first ones first.
    """
    printable = _printable_bytes()
    ids = {name: i for i, name in enumerate(_vocabulary(list(printable.values()), merges))}
    rank = {pair: i for i, pair in enumerate(merges)}

    @lru_cache(maxsize=1 << 16)
    def word_ids(word: str) -> tuple[int, ...]:
        parts = [printable[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            joined, i = [], 0
            while i < len(parts):
                is_best = tuple(parts[i : i + 2]) == best
                joined.append("".join(best) if is_best else parts[i])
                i += 2 if is_best else 1
            parts = joined
        return tuple(ids[part] for part in parts)

    def encode(text: str) -> list[int]:
        found = [i for word in _WORD.findall(" ".join(text.lower().split())) for i in word_ids(word)]
        return [ids["<|startoftext|>"], *found, ids["<|endoftext|>"]]

    return TextIds(len(ids), encode, hashlib.sha256(json.dumps(merges).encode()).hexdigest())


def _printable_bytes() -> dict[int, str]:
    """A character for each byte: itself where it can be seen, else one from 256 on; in CLIP's order."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def _vocabulary(characters: list[str], merges: list[tuple[str, str]]) -> list[str]:
    ends = [character + "</w>" for character in characters]
    return [*characters, *ends, *(first + second for first, second in merges), "<|startoftext|>", "<|endoftext|>"]


def load_text_ids(source: str) -> TextIds:
    """Load a vocabulary; see the module for what `source` may be.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If it is a folder and the `text` extra is not installed, or a file that lists no pairs.
    """
    path = Path(source)
    if source == "bytes":
        return byte_ids()
    if path.is_dir():
        return _of_transformers(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"No tokenizer of text at {path}: give CLIP's file of byte-pair merges, a folder with a tokenizer for the "
            "`text` extra, or `bytes` (--model.text_tokenizer)."
        )
    content = path.read_bytes()
    text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    lines = [line.split() for line in text.splitlines()[1:] if line.strip()]  # the first line names the version
    if not lines or any(len(line) != 2 for line in lines):
        raise ValueError(f"{path} does not list pairs to join, two parts a line after a first line of its own.")
    return byte_pair_ids([(first, second) for first, second in lines[:CLIP_MERGES]])


def _of_transformers(folder: Path) -> TextIds:
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            f"{folder} is a folder: the `text` extra reads it, which is not installed (pip install 'longtake[text]')."
        ) from error
    tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    names = json.dumps(sorted(tokenizer.get_vocab().items()))
    return TextIds(
        len(tokenizer), lambda text: list(tokenizer(text)["input_ids"]), hashlib.sha256(names.encode()).hexdigest()
    )
