"""How flat the loss is around a fine-tuned model's *merged* weights W' = W + sBA, measured and drawn.

Every function takes ``(model, loss_fn, batches)``: ``loss_fn(model, batch)`` returns the batch's mean loss as a scalar
tensor, and the loss measured is the mean over ``batches``, which are the same for every evaluation. The model is in eval
mode while measured, with its PEFT adapters merged; afterwards its weights are what they were, bit for bit. An adapter that
is switched off is left out, and an autocast region around the call is one around ``loss_fn`` alone. The same ``seed`` gives
the same random directions, so that models of one architecture are compared along the same ones.

A flat minimum need not generalise better (Andriushchenko et al., ICML 2023): these figures describe, they prove nothing.
"""

from ..ops.rounding import rounding
from .hessian import TopEigenvalue, hessian_top_eigenvalue, hessian_trace
from .landscape import Curve, Surface, loss_curve, loss_surface
from .plots import plot_contours, plot_curves, plot_range_test, plot_surfaces
from .quantization import QuantizationTest, Rounded, quantization_test
from .range_test import RangeTest, sigma_range_test
from .sharpness import Estimate, WorstCase, expected_sharpness, worst_case_sharpness

__all__ = [
    "Curve",
    "Estimate",
    "QuantizationTest",
    "RangeTest",
    "Rounded",
    "Surface",
    "TopEigenvalue",
    "WorstCase",
    "expected_sharpness",
    "hessian_top_eigenvalue",
    "hessian_trace",
    "loss_curve",
    "loss_surface",
    "plot_contours",
    "plot_curves",
    "plot_range_test",
    "plot_surfaces",
    "quantization_test",
    "rounding",
    "sigma_range_test",
    "worst_case_sharpness",
]
