"""The keyed noise under its former name; see :mod:`flatopt.ops.noise`."""

from .ops.noise import _int32, _tables, normals, step_key, sub_key

__all__ = ["_int32", "_tables", "normals", "step_key", "sub_key"]
