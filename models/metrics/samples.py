"""What all metrics over samples share: each sample counts once, at a memory that does not grow with their number.

A rank folds the rows of its samples into sums (or other states that merge), and keeps the latest few as they are. That
is for validation over several processes: where the clips do not divide by the ranks, the last batches are filled up
with clips that another rank has too, fewer of them than ranks. When the ranks' states come together, rows whose index
has been seen elsewhere are left out. What is remembered of every sample is its index, eight bytes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

KEPT_ROWS = 512  # a rank's latest rows, never folded before the end: repeated samples are among them on up to 512 ranks
_ROWS_PER_FOLD = 512


class SampleMetric(Metric):
    """Base of metrics that fold rows of float64 into a state, one stream of rows for each set of samples.

    States keep their type, whatever the module around is cast to. `compute` is the same on all ranks.

    Args:
        streams: Names of the sets of samples.
        width: Numbers in a row.
        state: What a stream's rows are folded into, before there are any.
        merge: Joins the states of ranks, stacked `[W, ...]`, to one; `sum` to add them.
        fold: Whether rows are folded at all; otherwise all stay, and the state remains as it is.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(
        self,
        streams: Sequence[str],
        width: int,
        state: Tensor,
        merge: Callable[[Tensor], Tensor] | str = "sum",
        fold: bool = True,
    ) -> None:
        super().__init__()
        self.streams = tuple(streams)
        self.width = width
        self.folds = fold
        for stream in self.streams:
            self.add_state(f"{stream}_state", state.double(), dist_reduce_fx=merge)
            self.add_state(f"{stream}_folded", [], dist_reduce_fx="cat")  # indices of the rows in the state
            self.add_state(f"{stream}_index", [], dist_reduce_fx="cat")  # indices of the rows that are kept
            self.add_state(f"{stream}_rows", [], dist_reduce_fx="cat")

    def fold(self, state: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """Return the state with rows `[n, width]` float64 of samples `index` `[n]` added to it."""
        raise NotImplementedError

    def add_rows(self, stream: str, rows: Tensor, index: Tensor | None) -> None:
        """Take rows `[n, width]`, any float type, of the samples `index` `[n]`; None for samples that never repeat.

        Raises:
            ValueError: For another width, another number of indices, negative indices, or values that are not finite.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"{type(self).__name__} takes rows [n, {self.width}], got {list(rows.shape)}.")
        if index is None:
            index = torch.full((len(rows),), -1)
        elif index.shape != rows.shape[:1] or (index.numel() and int(index.min()) < 0):
            raise ValueError(f"Expected {len(rows)} sample indices >= 0, got {index.tolist()}.")
        if not self.accepts(rows):
            raise ValueError(f"{type(self).__name__} was given values that are not finite.")
        kept_rows, kept_index = getattr(self, f"{stream}_rows"), getattr(self, f"{stream}_index")
        kept_rows.append(rows.detach().to(self.device, torch.float64))
        kept_index.append(index.to(self.device, torch.int64))
        if self.folds and sum(map(len, kept_index)) >= KEPT_ROWS + _ROWS_PER_FOLD:
            rows, index = torch.cat(kept_rows), torch.cat(kept_index)
            self._put(stream, self.fold(getattr(self, f"{stream}_state"), rows[:-KEPT_ROWS], index[:-KEPT_ROWS]))
            getattr(self, f"{stream}_folded").append(index[:-KEPT_ROWS])
            kept_rows[:], kept_index[:] = [rows[-KEPT_ROWS:].clone()], [index[-KEPT_ROWS:].clone()]

    def accepts(self, rows: Tensor) -> bool:
        """Whether these values can be counted."""
        return bool(rows.isfinite().all())

    def finish(self, stream: str) -> tuple[Tensor, Tensor, Tensor]:
        """Leave out samples that are there twice, and fold the rest.

        Returns:
            The state, the rows that are in no state (all, of a metric that does not fold), and their indices.

        Raises:
            ValueError: If a sample is there twice, and neither copy is among the latest rows of its rank.
        """
        folded = self._joined(f"{stream}_folded", torch.int64)
        index, rows = self._joined(f"{stream}_index", torch.int64), self._joined(f"{stream}_rows", torch.float64)
        counted = folded[folded >= 0]
        if len(counted.unique()) < len(counted):
            values, counts = counted.unique(return_counts=True)
            raise ValueError(
                f"Samples {values[counts > 1][:5].tolist()} were counted more than once; give other indices."
            )
        is_new = ~torch.isin(index, counted)
        # the first of each index among the kept rows, in the order of ranks
        order = torch.argsort(index, stable=True)
        is_first = torch.ones_like(is_new)
        is_first[order[1:]] = (index[order[1:]] != index[order[:-1]]) | (index[order[1:]] < 0)
        keep = is_new & is_first
        index, rows = index[keep], rows[keep]
        state = getattr(self, f"{stream}_state")
        if self.folds:
            state, rows, index = self.fold(state, rows, index), rows[:0], index[:0]
        return state, rows, index

    def forget(self, stream: str) -> None:
        """Begin one set of samples anew; the others stay."""
        default = self._defaults[f"{stream}_state"]
        assert isinstance(default, Tensor)
        self._put(stream, default.detach().clone().to(self.device))
        for kind in ("folded", "index", "rows"):
            setattr(self, f"{stream}_{kind}", [])
        self._computed = None

    def _put(self, stream: str, state: Tensor) -> None:
        setattr(self, f"{stream}_state", state)

    def _empty(self, name: str) -> Tensor:
        if name.endswith("_rows"):
            return torch.zeros(0, self.width, dtype=torch.float64, device=self.device)
        return torch.zeros(0, dtype=torch.int64, device=self.device)

    def _joined(self, name: str, dtype: torch.dtype) -> Tensor:
        value = getattr(self, name)  # a list, or one tensor once the ranks are joined
        return value if isinstance(value, Tensor) else torch.cat([self._empty(name), *value]).to(dtype)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # torchmetrics fills a list without entries with a vector of float32: rows of a rank without samples are neither
        for stream in self.streams:
            for name in (f"{stream}_folded", f"{stream}_index", f"{stream}_rows"):
                setattr(self, name, [self._empty(name), *getattr(self, name)])
        super()._sync_dist(*args, **kwargs)

    def _apply(self, fn: Any, exclude_state: Sequence[str] = "") -> nn.Module:
        """Follow to another device, but never to another type."""
        device = fn(torch.empty(0, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)
