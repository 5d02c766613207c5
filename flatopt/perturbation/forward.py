r"""``restore="forward"``: noise in the layers' own forward, W never written to; the way for quantised weights.

:math:`y = x\,(\operatorname{dequant}(W) + \varepsilon)^\top + b`, see :mod:`flatopt.perturbation.noisy_layers`. Where
flatopt cannot dequantise, or the layer rounds its inputs too, :math:`y = \text{layer}(x) + x\,\varepsilon^\top`. To perturb
is to switch the layers' noise on; to restore, off.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.forwards import computes, unsupported_reason
from ..adapters.quantized import format_of
from ..core.warn import warn_user
from ..core.weight import FLOATS, AdaptedWeight, WeightView
from ..ops.noise import Key, signed, weight_key
from ..ops.norms import merged_square_sums, row_square_sums, stds_of, updated_square_sums
from ..ops.norms import square_sums as weight_square_sums
from . import noisy_layers

IDENTITY_ROWS = 256  # inputs at a time where W is asked for by multiplying it with the identity


COMPUTATIONS = {"linear": noisy_layers.linear, "conv": noisy_layers.conv, "embedding": noisy_layers.embedding}


class ForwardPlan:
    """All weights of one group that get their noise in the forward; the same interface as the plans that write W.

    Args:
        views: the weights; of a quantised one, ``view.rows`` is not used.
        noise: ``"filter"``, ``"layer"``, ``"isotropic"`` or ``"element"``.

    Raises:
        ValueError: where :func:`unsupported_reason` has a reason, naming the weight.
    """

    def __init__(self, views: Sequence[WeightView], noise: str):
        self.views, self.noise = list(views), noise
        for view in self.views:
            reason = unsupported_reason(view.weight, noise)
            if reason is not None:
                raise ValueError(f"{view.weight.path} cannot get noise in the forward: {reason}")
        self._layers: list[noisy_layers.NoisyForward] = []
        self._keys: dict[torch.device, Tensor] = {}
        self._key: Key | None = None
        self._told_of_idle = False
        for number, view in enumerate(self.views):
            owner, name = view.weight.owner, view.weight.name
            form, device = format_of(owner, name), view.weight.parameter.device
            keys = self._keys.setdefault(device, torch.zeros(len(self.views), 2, dtype=torch.int32, device=device))
            weight = noisy_layers.NoisyWeight(
                view.weight, form, torch.zeros(1, 1, device=device), keys[number], noise == "element"
            )
            if noise == "filter":
                weight.std = torch.zeros(weight.shape[0], 1, device=device)
            self._layers.append(noisy_layers.noisy_forward(weight, COMPUTATIONS.get(str(computes(owner, form)))))

    @torch.no_grad()
    def fill_std(self, sigma: float) -> None:
        """The stds of this step: σ × the row norm of the merged weight over √fan-in, or as ``noise`` has it."""
        if self.noise == "element":
            for layer in self._layers:
                layer.noisy.std.fill_(sigma)
            return
        sums = square_sums(self.views, self._layers)
        sizes = [layer.noisy.shape[1] for layer in self._layers]
        if self.noise != "filter":
            sizes = [len(t) * fan_in for t, fan_in in zip(sums, sizes)]
            sums = [t.sum(0, keepdim=True) for t in sums]
        torch._foreach_copy_([layer.noisy.std for layer in self._layers], stds_of(sums, sizes, self.noise, sigma))

    @torch.no_grad()
    def perturb(self, key: Key) -> None:
        """Switch the noise on. A key that is there already is not written again: a graph that saved it stays valid."""
        if key != self._key:
            if self._key is not None:
                self._tell_of_idle_layers()
            self._key = None
            words = []
            for view in self.views:
                own = weight_key(key, view.index)
                words.append([signed(own[0]), signed(own[1])])
            for device, keys in self._keys.items():
                host = torch.tensor(words, dtype=torch.int32)
                keys.copy_(host.pin_memory() if device.type == "cuda" else host, non_blocking=True)
            self._key = key
        for layer in self._layers:
            layer.on = True

    def _tell_of_idle_layers(self) -> None:
        """Once, when a step is over: whose forward did not run in it."""
        idle = [view.weight.path for view, layer in zip(self.views, self._layers) if not layer.ran]
        if idle and not self._told_of_idle:
            warn_user(
                f"{len(idle)} of {len(self.views)} layers that get their noise in the forward did not run it in the last "
                f"step, so nothing of theirs was perturbed: {idle[0]}{', ...' if len(idle) > 1 else ''}. For an expert that "
                "no token went to, that is right. If fused kernels read these weights without calling the layers (axolotl's "
                "lora_mlp_kernel and its like, unsloth), switch them off, or load the base unquantised"
            )
        self._told_of_idle = True

    def restore(self) -> None:
        """Switch the noise off."""
        for layer in self._layers:
            layer.on = False

    def written(self, wait: bool = False) -> "list[WeightView]":
        """None: nothing of W is lost when somebody writes to it."""
        return []

    def release(self) -> None:
        """Nothing to drop: a plan holds no weight's memory."""


def own_forwards(weights: "Iterable[AdaptedWeight]") -> None:
    """Give the layers of ``weights`` their own forward back: no optimizer perturbs them any more."""
    for weight in weights:
        noisy_layers.remove(weight.owner)


# --- row norms of the merged weight ---------------------------------------------------------------------------------------

BATCHED_ON = {"cuda"}  # device types on which the number of operations counts


def square_sums(views: "list[WeightView]", layers: "list[noisy_layers.NoisyForward]") -> "list[Tensor]":
    """Per row of each merged weight the sum of squares, float32 ``(m,)``; 0 for rows with inf or NaN, which get no noise."""
    found: dict[int, Tensor] = {}
    batches: dict[tuple[Any, ...], list[int]] = {}
    for i, (view, layer) in enumerate(zip(views, layers)):
        kind = _batch_kind(view, layer)
        if kind is None:
            found[i] = _square_sums(view, layer).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        else:
            batches.setdefault(kind, []).append(i)
    for some in batches.values():
        total = _batch_square_sums([views[i] for i in some], [layers[i] for i in some])
        found.update(zip(some, total.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)))
    return [found[i] for i in range(len(views))]


def _square_sums(view: WeightView, layer: "noisy_layers.NoisyForward") -> Tensor:
    form, weight = layer.noisy.format, view.weight
    if view.update.row_norm is not None:
        return view.update.row_norm.detach().float().square()
    if form is not None and form.dequantize is None:
        return _square_sums_by_forward(view, layer)
    rows = layer.noisy.clean_rows(weight.parameter)
    if view.square_sums is None:
        view.square_sums = weight_square_sums(rows)
    return row_square_sums(rows, view.update, view.square_sums)


def _batch_kind(view: WeightView, layer: "noisy_layers.NoisyForward") -> "tuple[Any, ...] | None":
    """What layers have in common whose sums are found together; None for one that is none of them."""
    form, update, device = layer.noisy.format, view.update, layer.noisy.std.device
    multiplies = form is not None and not form.quantizes_inputs
    plain_factors = len(update.factors) == 1 and (update.row_norm, update.dense, update.alpha) == (None, None, None)
    if device.type not in BATCHED_ON or not multiplies or not plain_factors:
        return None
    B, A, scaling = update.factors[0]
    if isinstance(scaling, Tensor) or {A.device, B.device} != {device}:
        return None
    return device, B.shape, A.shape, B.dtype, A.dtype, scaling, _input_like(view).dtype


def _batch_square_sums(views: "list[WeightView]", layers: "list[noisy_layers.NoisyForward]") -> Tensor:
    """``(layers, m)``, from W Aᵀ as the layer's answer to A, which for a few rows need not make W."""
    for view, layer in zip(views, layers):
        if view.square_sums is None:
            view.square_sums = _own_square_sums(view, layer)
    B = torch.stack([view.update.factors[0][0].detach() for view in views]).float().mul_(views[0].update.factors[0][2])
    A = torch.stack([view.update.factors[0][1].detach() for view in views])
    asked = A.to(_input_like(views[0]).dtype)
    cross = torch.stack([_answer(layer, a) for layer, a in zip(layers, asked)]).mT
    own = torch.stack([view.square_sums for view in views if view.square_sums is not None])
    return merged_square_sums(own, cross, B, A.float())


def _own_square_sums(view: WeightView, layer: "noisy_layers.NoisyForward") -> Tensor:
    """Of W alone."""
    form = layer.noisy.format
    if form is None or form.dequantize is not None:
        return weight_square_sums(layer.noisy.clean_rows(view.weight.parameter))
    parts = [w.square().sum(0) for _, w in _columns(layer, _input_like(view))]
    return sum(parts[1:], parts[0])


def _columns(layer: "noisy_layers.NoisyForward", like: Tensor) -> "Iterator[tuple[int, Tensor]]":
    """W some columns at a time, transposed, as the layer's answer to the identity: (first column, ``(k, rows)``)."""
    fan_in = layer.noisy.shape[1]
    for start in range(0, fan_in, IDENTITY_ROWS):
        identity = like.new_zeros(min(IDENTITY_ROWS, fan_in - start), fan_in)
        identity.diagonal(start).fill_(1.0)
        yield start, _answer(layer, identity)


def _answer(layer: "noisy_layers.NoisyForward", x: Tensor) -> Tensor:
    y: Tensor = layer.clean(x)
    bias: Tensor | None = getattr(layer.layer, "bias", None)
    return (y if bias is None else y - bias).float()


def _square_sums_by_forward(view: WeightView, layer: "noisy_layers.NoisyForward") -> Tensor:
    """Where only the layer itself can multiply with W: W Aᵀ is its answer to A, W that to the identity."""
    update, like = view.update, _input_like(view)
    if update.dense is not None:
        dense = update.dense.detach().float()
        parts = [(w + dense[:, j : j + len(w)].t()).square().sum(0) for j, w in _columns(layer, like)]
        return sum(parts[1:], parts[0])
    if view.square_sums is None:
        view.square_sums = _own_square_sums(view, layer)
    return updated_square_sums(view.square_sums, update, lambda A: _answer(layer, A.to(like.dtype)).t())


def _input_like(view: WeightView) -> Tensor:
    """A tensor of the type that the layer takes as input: its own, or that of its bias, its scales or the adapter."""
    owner: Any = view.weight.owner
    own = getattr(owner, "compute_dtype", None)
    if own is not None:
        return torch.empty(0, dtype=own, device=view.weight.parameter.device)
    weight = view.weight.parameter
    for tensor in (
        weight,
        getattr(owner, "bias", None),
        getattr(owner, "scales", None),
        *(f[0] for f in view.update.factors),
    ):
        if isinstance(tensor, Tensor) and tensor.dtype in FLOATS:
            return (
                tensor.detach().new_empty(0)
                if type(tensor) in (Tensor, nn.Parameter)
                else torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            )
    return torch.empty(0, dtype=torch.get_default_dtype(), device=weight.device)
