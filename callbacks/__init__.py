"""What happens along the way of a training: the curriculum, samples to look at, scores, throughput."""

from callbacks.curriculum import ShortToLongCurriculum
from callbacks.fvd import FVDEvaluation
from callbacks.samples import SampleLogger
from callbacks.throughput import Throughput

__all__ = ["FVDEvaluation", "SampleLogger", "ShortToLongCurriculum", "Throughput"]
