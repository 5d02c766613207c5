"""The noise by Triton kernels, on CUDA devices."""

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...core.arguments import NOISES
from ...core.weight import WeightView
from ..norms import rows_of
from ..rounding import KERNEL_GROUPS, format_named, whole_weight_needed

if TYPE_CHECKING:
    from ..backend import Plan

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonBackend:
    """Takes fp32, bf16 and fp16 weights on a CUDA device; on the CPU too under ``TRITON_INTERPRET=1``, for tests."""

    name = "triton"

    def __init__(self) -> None:
        self._unusable: str | None = None
        self._tried = False

    def supports(self, view: WeightView, noise: str) -> str | None:
        rows = rows_of(view)
        device, dtype = rows.device, rows.dtype
        if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"{device.type} is no CUDA device"
        if noise == "element":
            return f"noise={noise!r} goes by each element"
        if noise not in NOISES and (reason := _not_rounded(view, noise)):
            return reason
        if dtype not in DTYPES:
            return f"{dtype} is not fp32, bf16 or fp16"
        if dtype == torch.bfloat16 and device.type == "cuda" and torch.version.cuda and not _has_bf16(device):
            return "this GPU has no bf16"
        return self._import()

    def _import(self) -> str | None:
        """None, or why the kernels cannot be used; the first time with a warning, as torch's operations are slower."""
        if not self._tried:
            self._tried = True
            try:
                from . import launch  # noqa: F401
            except ImportError as error:
                self._unusable = str(error)
                warnings.warn(
                    f"flatopt's Triton kernels cannot be used ({error}); the noise is made by torch's own operations, "
                    "several times slower. Install Triton 3.2 or later",
                    stacklevel=2,
                )
        return self._unusable

    def plan(self, views: list[WeightView], noise: str, restore: str, group: Sequence[WeightView]) -> "Plan":
        from .launch import TritonPlan

        return TritonPlan(views, noise, restore, group)


def _not_rounded(view: WeightView, noise: str) -> str | None:
    """Why the kernels do not round a weight to the format ``noise``."""
    group = format_named(noise).group
    columns = rows_of(view).shape[1]
    if group is None or group >= columns or group in KERNEL_GROUPS:
        return whole_weight_needed(view, noise)
    return f"groups of {group} are no power of two up to {KERNEL_GROUPS[-1]}"


def _has_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
