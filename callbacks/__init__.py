"""Lightning callbacks, named in YAML by their class: ``class_path: callbacks.EffOPD``."""

from callbacks.accelerator import Accelerator
from callbacks.alphaopd import AlphaOPD
from callbacks.averaging import AveragedWeights
from callbacks.benchmarks import Benchmarks
from callbacks.checkpoint import RunCheckpoint
from callbacks.effopd import EffOPD
from callbacks.geometry import UpdateGeometry
from callbacks.horizon import Horizon
from callbacks.lookahead import Lookahead
from callbacks.relex import RELEX
from callbacks.samples import SampleWriter
from callbacks.snoo import SNOO
from callbacks.summary import RunSummary
from callbacks.two_point import TwoPoint

__all__ = [
    "RELEX",
    "SNOO",
    "Accelerator",
    "AlphaOPD",
    "AveragedWeights",
    "Benchmarks",
    "EffOPD",
    "Horizon",
    "Lookahead",
    "RunCheckpoint",
    "RunSummary",
    "SampleWriter",
    "TwoPoint",
    "UpdateGeometry",
]
