r"""``restore="forward"``: noise in the layers' own forward, W never written to; the way for quantised weights.

:math:`y = x\,(\operatorname{dequant}(W) + \varepsilon)^\top + b`, see :mod:`flatopt.perturbation.noisy`. Where flatopt cannot
dequantise, or the layer rounds its inputs too, :math:`y = \text{layer}(x) + x\,\varepsilon^\top`. To perturb is to switch the
layers' noise on; to restore, off.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.quantized import Format, format_of, shape_of
from ..core.sharding import is_sharded
from ..core.weight import AdaptedWeight, WeightUpdate, WeightView
from ..noise import signed, sub_key
from ..scale import row_square_sums, weight_square_sums
from . import noisy

IDENTITY_ROWS = 256  # inputs at a time where W is asked for by multiplying it with the identity


def forward_reason(weight: AdaptedWeight) -> "str | None":
    """Why this weight can only be perturbed in its layer's forward: the name of its quantised format; None for others."""
    form = format_of(weight.owner, weight.name)
    return None if form is None else form.name


def unsupported_reason(weight: AdaptedWeight, noise: str) -> "str | None":
    """Why noise in the layer's forward would not be the same as noise on this weight, and what to do; None if it would."""
    layer, owner = weight.layer, weight.owner
    form = format_of(owner, weight.name)
    instead = 'load the base model unquantised, or leave the layer out with [{"modules": [...]}]'
    if form is None:
        instead = 'use restore="reversible" there'
    if is_sharded(weight.parameter):
        return f'it is sharded, and restore="forward" needs the whole weight: {instead}'
    if weight.rebuilt or weight.layout == "experts" or hasattr(layer, "parameter_name"):
        return f"{type(layer).__name__} reads it without calling {type(owner).__name__}.forward: {instead}"
    if _computation(owner, form) is None and shape_of(owner, weight.name) is None:
        return f"flatopt does not know what {type(owner).__name__}.forward does with it: {instead}"
    if noise == "element" and _adds(form):
        return f'noise="element" follows |W|, which a {form.name if form else ""} layer does not tell: use noise="filter"'
    if type(layer).__module__.startswith("peft.tuners.hira"):
        return f"HiRA reads W a second time, for its update: {instead}"
    magnitudes = getattr(layer, "lora_magnitude_vector", {})
    if any(name in magnitudes and not isinstance(layer.lora_dropout[name], nn.Identity) for name in _active(layer)):
        return f"DoRA with lora_dropout > 0 reads W a second time, without the noise: set lora_dropout=0, or {instead}"
    return None


def _active(layer: Any) -> "list[str]":
    return list(getattr(layer, "active_adapters", ()))


def _computation(owner: nn.Module, form: "Format | None") -> Any:
    """What computes this layer's output at W + ε; None where x εᵀ has to be added to the layer's own output, or nothing can."""
    forward = type(owner).forward
    if form is not None:
        return None if _adds(form) else noisy.linear
    if forward is nn.Linear.forward or type(owner).__name__ == "Conv1D":
        return noisy.linear
    if forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
        return noisy.conv
    if forward is nn.Embedding.forward and getattr(owner, "max_norm", None) is None:
        return noisy.embedding
    return None


def _adds(form: "Format | None") -> bool:
    return form is not None and (form.dequantize is None or form.quantizes_inputs)


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
        self._layers: list[noisy.NoisyForward] = []
        self._keys: dict[torch.device, Tensor] = {}
        self._key: tuple[int, int] | None = None
        for number, view in enumerate(self.views):
            owner, name = view.weight.owner, view.weight.name
            form, device = format_of(owner, name), view.weight.parameter.device
            keys = self._keys.setdefault(device, torch.zeros(len(self.views), 2, dtype=torch.int32, device=device))
            rows = view.weight.rows(view.weight.parameter).shape[0] if form is None else shape_of(owner, name)[0]
            std = torch.zeros(rows if noise == "filter" else 1, 1, device=device)
            weight = noisy.NoisyWeight(view.weight, form, std, keys[number], relative=noise == "element")
            self._layers.append(noisy.noisy_forward(weight, _computation(owner, form)))

    @torch.no_grad()
    def fill_std(self, sigma: float) -> None:
        """The stds of this step: σ × the row norm of the merged weight over √fan-in, or as ``noise`` has it."""
        if self.noise == "element":
            for layer in self._layers:
                layer.noisy.std.fill_(sigma)
            return
        sums, sizes = [], []
        for view, layer in zip(self.views, self._layers):
            total, fan_in = _square_sums(view, layer)
            sums.append(total.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0))  # a row with inf or NaN gets no noise
            sizes.append(fan_in)
        if self.noise == "isotropic":
            whole, count = sum(t.sum().to(sums[0].device) for t in sums), sum(len(t) * n for t, n in zip(sums, sizes))
            for layer in self._layers:
                layer.noisy.std.copy_((whole / count).sqrt().mul_(sigma).view(1, 1))
            return
        for layer, total, fan_in in zip(self._layers, sums, sizes):
            if self.noise == "layer":
                layer.noisy.std.copy_((total.sum() / (len(total) * fan_in)).sqrt_().mul_(sigma).view(1, 1))
            else:
                layer.noisy.std.copy_((total / fan_in).sqrt_().mul_(sigma).unsqueeze(1))

    def std_of(self, view: WeightView) -> Tensor:
        """The std of a weight's noise: float32 ``(m, 1)`` or ``(1, 1)``, in units of \\|W\\| with ``noise="element"``."""
        return self._layers[self.views.index(view)].noisy.std

    @torch.no_grad()
    def perturb(self, key: "tuple[int, int]") -> None:
        """Switch the noise on. A key that is there already is not written again: a graph that saved it stays valid."""
        if key != self._key:
            self._key = None
            words = []
            for view in self.views:
                own = sub_key(key, view.index)
                own = sub_key(own, view.part) if view.part else own
                words.append([signed(own[0]), signed(own[1])])
            for device, keys in self._keys.items():
                host = torch.tensor(words, dtype=torch.int32)
                keys.copy_(host.pin_memory() if device.type == "cuda" else host, non_blocking=True)
            self._key = key
        for layer in self._layers:
            layer.on = True

    def restore(self) -> None:
        """Switch the noise off."""
        for layer in self._layers:
            layer.on = False

    def written(self) -> "list[WeightView]":
        """None: nothing of W is lost when somebody writes to it."""
        return []

    def release(self) -> None:
        """Nothing to drop: a plan holds no weight's memory."""


def detach(weights: "Iterable[AdaptedWeight]") -> None:
    """Give the layers of ``weights`` their own forward back: no optimizer perturbs them any more."""
    for weight in weights:
        noisy.remove(weight.owner)


# --- row norms of the merged weight ---------------------------------------------------------------------------------------


def _square_sums(view: WeightView, layer: "noisy.NoisyForward") -> "tuple[Tensor, int]":
    """Per row of the merged weight the sum of squares, float32 ``(m,)``; and its fan-in."""
    form, weight = layer.noisy.format, view.weight
    if form is not None and form.dequantize is None:
        return _square_sums_by_forward(view, layer), shape_of(weight.owner, weight.name)[1]
    if view.update.row_norm is not None and form is not None:
        return view.update.row_norm.detach().float().square(), shape_of(weight.owner, weight.name)[1]

    def of_weight(rows: Tensor) -> Tensor:
        if view.square_sums is None:
            view.square_sums = weight_square_sums(rows)
        return view.square_sums

    rows = weight.rows(weight.parameter.detach()) if form is None else form.dequantize(weight.owner, weight.parameter)
    return row_square_sums(rows, view.update, of_weight), rows.shape[1]


def _columns(layer: "noisy.NoisyForward", fan_in: int, like: Tensor) -> "Iterator[tuple[int, Tensor]]":
    """W some columns at a time, transposed, as the layer's answer to the identity: (first column, ``(k, rows)``)."""
    for start in range(0, fan_in, IDENTITY_ROWS):
        identity = like.new_zeros(min(IDENTITY_ROWS, fan_in - start), fan_in)
        identity.diagonal(start).fill_(1.0)
        yield start, _answer(layer, identity)


def _answer(layer: "noisy.NoisyForward", x: Tensor) -> Tensor:
    y, bias = layer.clean(x), getattr(layer.noisy.owner, "bias", None)
    return (y if bias is None else y - bias).float()


def _square_sums_by_forward(view: WeightView, layer: "noisy.NoisyForward") -> Tensor:
    """The same where only the layer itself can multiply with W: W Aᵀ is its answer to A, W that to the identity."""
    update, fan_in = view.update, shape_of(view.weight.owner, view.weight.name)[1]
    if update.row_norm is not None:
        return update.row_norm.detach().float().square()
    like = _input_like(view, update)
    if update.dense is not None:
        dense = update.dense.detach().float()
        return sum(
            (w + dense[:, start : start + len(w)].t()).square().sum(0) for start, w in _columns(layer, fan_in, like)
        )
    if view.square_sums is None:
        view.square_sums = sum(w.square().sum(0) for _, w in _columns(layer, fan_in, like))
    alpha = 1.0 if update.alpha is None else update.alpha
    total = alpha * alpha * view.square_sums
    if update.factors:
        B = torch.cat([B.detach().float() * s for B, _, s in update.factors], dim=1)
        A = torch.cat([A.detach().float() for _, A, _ in update.factors])
        cross = _answer(layer, A.to(like.dtype)).t()
        total = total + 2 * alpha * (B * cross).sum(1) + ((B @ (A @ A.t())) * B).sum(1)
    return total.clamp_min(0.0)


def _input_like(view: WeightView, update: WeightUpdate) -> Tensor:
    """A tensor of the type that the layer's inputs have: of its bias, its scales, or else of the adapter."""
    owner = view.weight.owner
    for tensor in (getattr(owner, "bias", None), getattr(owner, "scales", None), *(f[0] for f in update.factors)):
        if isinstance(tensor, Tensor) and tensor.dtype.is_floating_point:
            return tensor.detach()
    return torch.empty(0, dtype=torch.get_default_dtype(), device=view.weight.parameter.device)
