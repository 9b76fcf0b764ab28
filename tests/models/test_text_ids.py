"""Text as ids: CLIP's byte pairs, plain bytes, and the tokenizers that the `text` extra reads."""

import gzip
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from models.text_ids import byte_ids, byte_pair_ids, load_text_ids

MERGES = [("l", "o"), ("lo", "w</w>"), ("e", "r</w>"), ("w", "er</w>"), ("n", "e")]
ALONE, LAST, JOINED = 0, 256, 512  # where the characters, those at a word's end and the joined pairs begin
BEGIN, END = 512 + 5, 512 + 6


def character(text: str) -> int:
    """CLIP's number of a visible ASCII character: they begin with the exclamation mark."""
    return ord(text) - ord("!")


def test_pairs_are_joined_in_the_order_of_the_list() -> None:
    ids = byte_pair_ids(MERGES)
    assert ids.size == 519
    low, wer, ne = JOINED + 1, JOINED + 3, JOINED + 4
    assert ids.encode("low") == [BEGIN, low, END]
    assert ids.encode("newer") == [BEGIN, ne, wer, END]
    assert ids.encode("lo") == [BEGIN, character("l"), LAST + character("o"), END]  # `o` ends the word: another symbol
    assert ids.encode("lower") == [BEGIN, JOINED, wer, END]


def test_words_are_what_clip_takes_for_words() -> None:
    ids = byte_pair_ids(MERGES)
    a, one, bang = (LAST + character(text) for text in "a1!")
    assert ids.encode("A  a\n") == [BEGIN, a, a, END]
    assert ids.encode("a1 11!") == [BEGIN, a, one, one, one, bang, END]  # digits stand alone
    assert ids.encode("a's") == [BEGIN, a, character("'"), LAST + character("s"), END]
    assert ids.encode("_!") == [BEGIN, character("_"), bang, END]
    assert ids.encode("") == [BEGIN, END]
    assert len(ids.encode("é")) == 4  # two bytes


def test_every_byte_has_a_character_and_clips_vocabulary_its_size() -> None:
    everything = "".join(chr(i) for i in range(1, 1500))
    assert max(byte_pair_ids(MERGES).encode(everything)) == END
    many = [(f"x{i}", "y") for i in range(48_894)]
    assert byte_pair_ids(many).size == 49_408


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_merges_is_read(tmp_path: Path, packed: bool) -> None:
    content = ("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES)).encode()
    file = tmp_path / "merges"
    file.write_bytes(gzip.compress(content) if packed else content)
    ids = load_text_ids(str(file))
    assert ids.encode("newer") == byte_pair_ids(MERGES).encode("newer")
    assert ids.digest == byte_pair_ids(MERGES).digest != byte_pair_ids(MERGES[:-1]).digest


def test_what_is_no_list_of_pairs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("version\none two three\n")
    with pytest.raises(ValueError, match="does not list pairs to join"):
        load_text_ids(str(tmp_path / "text"))
    with pytest.raises(FileNotFoundError, match=r"No tokenizer of text at .*--model\.text_tokenizer"):
        load_text_ids(str(tmp_path / "nothing"))


def test_rows_are_filled_up_with_zeros_and_cut_before_the_end() -> None:
    rows = byte_ids().rows(["ab", "abcdef"], 4)
    assert rows.tolist() == [[98, 99, 0, 0], [98, 99, 100, 103]]
    assert byte_pair_ids(MERGES).rows(["low low low"], 3)[0, -1] == END


def test_a_folder_needs_the_text_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"`text` extra reads it, which is not installed"):
        load_text_ids(str(tmp_path))


def test_a_folder_is_read_by_the_text_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        def get_vocab(self) -> dict[str, int]:
            return {"<pad>": 0, "</s>": 1, "a": 2}

        def __len__(self) -> int:
            return 3

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [2 for _ in text.split()] + [1]}

    asked: list[object] = []
    library = ModuleType("transformers")
    library.AutoTokenizer = SimpleNamespace(
        from_pretrained=lambda folder, local_files_only: asked.append((folder, local_files_only)) or Words()
    )
    monkeypatch.setitem(sys.modules, "transformers", library)
    ids = load_text_ids(str(tmp_path))
    assert asked == [(tmp_path, True)]  # nothing is downloaded
    assert (ids.size, ids.encode("a a")) == (3, [2, 2, 1])
