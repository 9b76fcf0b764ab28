"""What happens along the way of a training: the curriculum, samples to look at, throughput."""

from callbacks.curriculum import ShortToLongCurriculum
from callbacks.samples import SampleLogger
from callbacks.throughput import Throughput

__all__ = ["SampleLogger", "ShortToLongCurriculum", "Throughput"]
