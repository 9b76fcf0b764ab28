"""What happens along a training: curriculum, averages, checkpoints, health, samples to look at, scores, throughput."""

from callbacks.checkpoint import Checkpoint
from callbacks.curriculum import ShortToLongCurriculum
from callbacks.ema import EMA
from callbacks.fvd import FVDEvaluation
from callbacks.health import TokenizerHealth
from callbacks.levers import Levers
from callbacks.samples import SampleLogger
from callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "Checkpoint",
    "FVDEvaluation",
    "Levers",
    "SampleLogger",
    "ShortToLongCurriculum",
    "Throughput",
    "TokenizerHealth",
]
