"""What happens along the way of a training: the curriculum, averaged weights, samples to look at, throughput."""

from callbacks.curriculum import ShortToLongCurriculum
from callbacks.ema import EMA
from callbacks.samples import SampleLogger
from callbacks.throughput import Throughput

__all__ = ["EMA", "SampleLogger", "ShortToLongCurriculum", "Throughput"]
