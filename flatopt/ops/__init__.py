"""The arithmetic: noise from keys, standard deviations, the map that takes itself off, and the backends that write to W."""

from ..core.arguments import NOISES
from .backend import BACKENDS, RESTORES, Backend, Plan, plan
from .constants import writing
from .fingerprint import fingerprint
from .noise import Key, normals, step_key, sub_key
from .norms import row_square_sums, square_sums
from .rounding import FORMAT

__all__ = [
    "BACKENDS",
    "FORMAT",
    "NOISES",
    "RESTORES",
    "Backend",
    "Key",
    "Plan",
    "fingerprint",
    "normals",
    "plan",
    "row_square_sums",
    "square_sums",
    "step_key",
    "sub_key",
    "writing",
]
