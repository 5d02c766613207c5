"""flatopt: low-rank fine-tuning that lands in flat minima of the full parameter space."""

from . import flatness
from .adapters import register_low_rank
from .create import create_flat_optimizer
from .optimizers.flat import FlatPerturbOptimizer
from .optimizers.sam import SAM

__version__ = "0.2.0"
__all__ = ["SAM", "FlatPerturbOptimizer", "create_flat_optimizer", "flatness", "register_low_rank"]
