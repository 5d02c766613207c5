"""Low-rank modules: which frozen weights lie under them, and what they add to these."""

from .custom import register_low_rank

__all__ = ["register_low_rank"]
