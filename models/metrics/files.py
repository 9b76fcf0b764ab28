"""Files of detectors' weights: which file it is, and the tensors in it, without running anything that it holds."""

import hashlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class FileDigests:
    """Both names that a file's bytes have.

    Args:
        sha256: Of the bytes.
        git: SHA-1 of `blob <size>`, a zero byte and the bytes: what a git repository calls the file.
    """

    sha256: str
    git: str


@dataclass(frozen=True)
class KnownFile:
    """A file that is known by its digest.

    Args:
        name: What it is usually called, and where it comes from.
        refused: Why it must not be used, empty if it may be.
        profile: The protocol that it was published for.
    """

    name: str
    refused: str = ""
    profile: str = ""


def digests(path: Path) -> FileDigests:
    """Read a file once and name it."""
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            git.update(block)
    return FileDigests(sha256.hexdigest(), git.hexdigest())


def identify(
    path: Path, known: Mapping[str, KnownFile], sha256: str | None, missing: str
) -> tuple[FileDigests, KnownFile | None]:
    """Find out which file this is, before anything in it is looked at.

    Args:
        path: The file.
        known: What is known, by sha256 or git blob id.
        sha256: The digest that the caller expects: accepts exactly this file, even one that is refused otherwise.
        missing: What to say if there is no file: what it is and where it is found.

    Returns:
        Its digests, and what is known of it: None for a file that nobody has published a digest of.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is another file than expected, or one that must not be used.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No detector weights at {path}. {missing}")
    found = digests(path)
    if sha256 is not None and sha256 != found.sha256:
        raise ValueError(f"{path} is another file than expected: its sha256 is {found.sha256}, expected {sha256}.")
    entry = known.get(found.sha256) or known.get(found.git)
    if entry is not None and entry.refused and sha256 is None:
        raise ValueError(f"{path} is {entry.name}: {entry.refused} {missing}")
    return found, entry


def vouch(path: Path, found: FileDigests) -> ValueError:
    """What to raise for a file that nobody has published a digest of, and that the caller has not named either."""
    return ValueError(
        f"{path} is none of the files whose digests are known (sha256 {found.sha256}, git blob {found.git}): its "
        f"numbers might not be what they are called. If it is a conversion that you trust, say so with "
        f"sha256={found.sha256}, and compare the sanity values (longtake doctor --detector)."
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors from safetensors, NumPy's .npz, a TorchScript archive or a PyTorch state dict.

    Nothing is executed: of a TorchScript archive the parameters are read and the code is not, a state dict is
    unpickled with `weights_only`.

    Raises:
        ValueError: If it is none of these.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith(".npy") for name in names):
                with np.load(path, allow_pickle=False) as arrays:
                    return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
            if any("/code/" in name for name in names):
                return _read_torchscript(archive)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} holds no tensors that can be read safely ({str(error).partition('. ')[0]})."
        ) from error
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        raise ValueError(f"{path} is no state dict: expected a dictionary of tensors.")
    return state


class _Inert:
    """Stands for a class of an archive: holds what it is given and does nothing."""

    def __new__(cls, *arguments: Any) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}


class _TorchScriptData(pickle.Unpickler):
    """Unpickles a TorchScript archive's `data.pkl` into inert objects and tensors; knows nothing else."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Inert
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor_view
        if module == "torch.jit._pickle":  # lists and dictionaries with their element types
            return lambda value, *types: value
        raise pickle.UnpicklingError(f"{module}.{name} has no place among a network's parameters.")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, numel = pid
        raw = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        return torch.frombuffer(raw, dtype=dtype, count=numel)


def _tensor_view(storage: Tensor, offset: int, size: tuple, stride: tuple, *rest: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
    try:
        module = _TorchScriptData(archive, root).load()
    except (pickle.UnpicklingError, KeyError, ValueError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive.filename} is no TorchScript archive of a network: {error}") from error
    tensors: dict[str, Tensor] = {}

    def collect(prefix: str, node: _Inert) -> None:
        for name, value in vars(node).items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, _Inert):
                collect(f"{prefix}{name}.", value)

    collect("", cast(_Inert, module))
    return tensors


def fit(state: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Tensor]:
    """Return the tensors as float32, with exactly these names and shapes; counters of batches are left out.

    Raises:
        ValueError: If names or shapes differ, with the first of them.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    wrong = [f"no {name}" for name in shapes.keys() - state.keys()]
    wrong += [f"{name} is unknown" for name in state.keys() - shapes.keys()]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    if wrong:
        shown = "; ".join(sorted(wrong)[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ValueError(f"{path} does not hold this network's weights: {shown}.")
    return {name: state[name].float() for name in shapes}


def cut_prefix(state: dict[str, Tensor], stem: str) -> dict[str, Tensor]:
    """Cut off all names what stands before `stem` in its name, and TensorFlow's `:0` behind them.

    Raises:
        StopIteration: If no name ends in `stem`.
    """
    state = {name.removesuffix(":0"): tensor for name, tensor in state.items()}
    prefix = next(name for name in state if name.endswith(stem)).removesuffix(stem)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
