"""Warnings that point at the user's line, however many frames of torch and flatopt lie between."""

import os
import sys
import warnings

import torch

_OURS = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, os.path.dirname(__file__)))


def warn_user(text: str) -> None:
    """A UserWarning from the innermost frame that is neither torch's nor flatopt's."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        level, outer = level + 1, frame.f_back
        if outer is None:
            break
        frame = outer
    warnings.warn(text if "flatopt" in text or "FlatPerturb" in text else f"flatopt: {text}", stacklevel=level)
