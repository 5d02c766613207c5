"""flatopt: low-rank fine-tuning that lands in flat minima of the full parameter space."""

from . import flatness
from .adapters import register_low_rank
from .optimizers.flat import FlatPerturbOptimizer
from .optimizers.sam import SAM

__version__ = "0.2.0"
__all__ = ["SAM", "FlatPerturbOptimizer", "flatness", "register_low_rank"]
