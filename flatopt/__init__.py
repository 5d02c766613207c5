"""flatopt: low-rank fine-tuning that lands in flat minima of the full parameter space."""

from . import flatness
from .delta import register_low_rank
from .optimizer import FlatPerturbOptimizer
from .sam import SAM

__version__ = "0.1.0"
__all__ = ["SAM", "FlatPerturbOptimizer", "flatness", "register_low_rank"]
