r"""Layers that compute with W + ε for one call and leave W as it is: y = x (W + ε)ᵀ + b.

ε follows from a key and the row stds, W from how the layer keeps it. Both are made again in backward, so that nothing of
W's size lives between forward and backward. The key and the stds are tensors, saved for backward: who changes them while a
graph needs them gets autograd's error, and torch.compile takes new ones without compiling again.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad

from ..adapters.quantized import Format, blocks_of, shape_of
from ..core.weight import AdaptedWeight, memory_order
from ..ops import noise
from ..ops.scratch import Scratch
from ..ops.torch_backend import chunks

# --- W + ε ----------------------------------------------------------------------------------------------------------------


def row_keys(key: Tensor, rows: Tensor) -> "tuple[Tensor, Tensor]":
    """:func:`flatopt.ops.noise.row_keys` of the rows numbered ``rows``, int32 ``(k,)``, where the key is an int32 tensor."""
    first = noise._mix_(rows.unsqueeze(1).mul(noise._int32(noise.GOLDEN)).add_(key[0]))
    return first, noise._mix_(first.bitwise_xor(key[1]))


def add_torch_noise_(rows: Tensor, std: Tensor, key: Tensor, relative: bool, numbers: "Tensor | None" = None) -> Tensor:
    """``rows`` + std × normals, in place; as ``restore="copy"`` adds it, bit for bit.

    ``std``: float32 ``(m, 1)`` or ``(1, 1)``; with ``relative``, in units of each element's absolute value. ``numbers``:
    which rows of the weight these are, int32 ``(m,)``; all of them by default.
    """
    (m, n), device = rows.shape, rows.device
    work = torch.promote_types(rows.dtype, torch.float32)
    if numbers is None:
        numbers = torch.arange(m, dtype=torch.int32, device=device)
    keys = row_keys(key, numbers)
    scratch, std = Scratch(), std.expand(m, 1)
    for here in chunks(m, n, device):
        top, left = here
        part = rows[here]
        w = scratch("w", part.shape, work, device).copy_(part)
        z = noise.normals_of_rows((keys[0][top], keys[1][top]), left.start, w.shape[1], scratch).to(work)
        part.copy_(w.add_(z.mul_(w.abs().mul_(std[top]) if relative else std[top])))
    return rows


def add_noise_(rows: Tensor, std: Tensor, key: Tensor, relative: bool) -> Tensor:
    """:func:`add_torch_noise_` to a whole matrix; by a kernel where there is one for it."""
    kernels = None if relative or not rows.is_contiguous() else _kernels(rows.device.type)
    if kernels is not None and kernels.supports(rows.shape, rows.dtype):
        kernels.add_noise_(rows, std, key)
        return rows
    return add_torch_noise_(rows, std, key, relative)


FUSED_ON = {"cuda"}  # device types


def _kernels(device_type: str) -> Any:
    return _triton() if device_type in FUSED_ON else None


@functools.cache
def _triton() -> Any:
    try:
        from ..ops.triton import noisy_weights
    except ImportError:  # no Triton, or too old a one
        return None
    return noisy_weights


# To torch.compile, adding ε is one opaque operation. There are two of them, as it makes equal operations once and keeps the
# result: backward's depends on the incoming gradient, or W + ε would live from forward to backward.


@torch.library.custom_op("flatopt::add_noise", mutates_args=())
def _compiled_forward(rows: Tensor, std: Tensor, key: Tensor, relative: bool) -> Tensor:
    return add_noise_(rows.clone(memory_format=torch.contiguous_format), std, key, relative)


@torch.library.custom_op("flatopt::add_noise_in_backward", mutates_args=())
def _compiled_backward(rows: Tensor, std: Tensor, key: Tensor, relative: bool, gradient: Tensor) -> Tensor:
    return add_noise_(rows.clone(memory_format=torch.contiguous_format), std, key, relative)


@_compiled_forward.register_fake
def _(rows: Tensor, std: Tensor, key: Tensor, relative: bool) -> Tensor:
    return rows.new_empty(rows.shape)


@_compiled_backward.register_fake
def _(rows: Tensor, std: Tensor, key: Tensor, relative: bool, gradient: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


class NoisyWeight:
    """How the weight of one layer is made noisy: which layer, how it keeps the weight, and the present noise.

    ``std``, ``key``: as in :func:`add_noise_`; filled anew each step, in place. ``relative``: noise="element".
    """

    def __init__(self, weight: AdaptedWeight, form: "Format | None", std: Tensor, key: Tensor, relative: bool):
        self.owner: Any = weight.owner
        self.name, self.layout, self.format = weight.name, weight.layout, form
        self.std, self.key, self.relative = std, key, relative
        m, n = weight.rows(weight.parameter).shape if form is None else shape_of(weight.owner, weight.name) or (0, 0)
        self.shape = m, n

    def clean_rows(self, weight: Tensor) -> Tensor:
        """W as a matrix, rows = outputs: a view of a plain weight, new memory where it is dequantised."""
        if self.format is not None:
            assert self.format.dequantize is not None
            return self.format.dequantize(self.owner, weight)
        weight = weight.detach()
        if weight.dim() > 2:
            weight = weight.permute(memory_order(weight)).flatten(1)
        return weight.t() if self.layout == "columns" else weight

    def noisy_rows(
        self, weight: Tensor, std: Tensor, key: Tensor, dtype: torch.dtype, gradient: "Tensor | None" = None
    ) -> Tensor:
        """W + ε as a matrix of type ``dtype``, rounded first to the type that W has. ``gradient``: given in backward."""
        kernels = _kernels(weight.device.type)
        if kernels is not None and not self.relative and self.shape[1] % 2 == 0 and not torch.compiler.is_compiling():
            made = self._fused(kernels, weight, std, key, dtype)
            if made is not None:
                return made
        rows = self.clean_rows(weight)
        if self.format is None and not torch.compiler.is_compiling():
            rows = rows.clone()
        return self._with_noise(rows, std, key, gradient).to(dtype)

    def _fused(self, kernels: Any, weight: Any, std: Tensor, key: Tensor, dtype: torch.dtype) -> "Tensor | None":
        """W + ε by one kernel that dequantises and adds the noise; None where there is none for the format."""
        state = getattr(weight, "quant_state", None)
        if state is not None:
            if state.dtype != dtype or (state.nested and state.state2.blocksize != kernels.OUTER_BLOCK.value):
                return None
            made: Tensor = kernels.noisy_4bit(weight, std, key)
            return made
        kept = None if self.format is None else blocks_of(self.owner, weight)
        if kept is None or dtype not in kernels.DTYPES:
            return None
        made = kernels.noisy_blocks(*kept, std, key, dtype)
        return made

    def noise_rows(
        self, weight: Tensor, std: Tensor, key: Tensor, dtype: torch.dtype, gradient: "Tensor | None" = None
    ) -> Tensor:
        """ε alone, for a layer whose output is not just x Wᵀ."""
        return self._with_noise(std.new_zeros(self.shape, dtype=dtype), std, key, gradient)

    def _with_noise(self, rows: Tensor, std: Tensor, key: Tensor, gradient: "Tensor | None") -> Tensor:
        """``rows``, whose memory may be taken, plus ε."""
        if not torch.compiler.is_compiling():
            return add_noise_(rows, std, key, self.relative)
        made: Tensor
        if gradient is None:
            made = _compiled_forward(rows, std, key, self.relative)
        else:
            made = _compiled_backward(rows, std, key, self.relative, gradient)
        return made


# --- y = x (W + ε)ᵀ + b ---------------------------------------------------------------------------------------------------


Make = Callable[..., Tensor]  # W + ε, of (weight, std, key, dtype), and in backward the gradient


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: "Tensor | None", std: Tensor, key: Tensor, make: Make) -> Tensor:
        ctx.save_for_backward(weight, std, key)
        ctx.make = make
        return F.linear(x, make(weight, std, key, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> "tuple[Tensor | None, ...]":
        x_gradient = b_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient.matmul(ctx.make(*ctx.saved_tensors, gradient.dtype, gradient))
        if ctx.needs_input_grad[2]:
            b_gradient = gradient.flatten(0, -2).sum(0)
        return x_gradient, None, b_gradient, None, None, None


_CONV_INPUT: dict[int, Callable[..., Tensor]] = {3: grad.conv1d_input, 4: grad.conv2d_input, 5: grad.conv3d_input}
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: "Tensor | None",
        std: Tensor,
        key: Tensor,
        make: Make,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(weight, std, key)
        ctx.make, ctx.geometry, ctx.x_shape = make, geometry, x.shape
        return _CONV[x.dim()](x, make(weight, std, key, x.dtype), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> "tuple[Tensor | None, ...]":
        x_gradient = b_gradient = None
        if ctx.needs_input_grad[0]:
            noisy = ctx.make(*ctx.saved_tensors, gradient.dtype, gradient)
            x_gradient = _CONV_INPUT[gradient.dim()](ctx.x_shape, noisy, gradient, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            b_gradient = gradient.transpose(0, 1).flatten(1).sum(1)
        return x_gradient, None, b_gradient, None, None, None, None


def _compute_type(layer: Any, x: Tensor) -> torch.dtype:
    """What the layer itself would compute in: bitsandbytes and HQQ have a type of their own, others follow autocast."""
    own: torch.dtype | None = getattr(layer, "compute_dtype", None)
    if own is not None:
        return own
    kind = x.device.type
    autocast: torch.dtype = torch.get_autocast_dtype(kind)
    return autocast if torch.is_autocast_enabled(kind) else x.dtype


def linear(noisy: NoisyWeight, x: Tensor) -> Tensor:
    """The output of a linear layer at W + ε."""
    layer, dtype = noisy.owner, _compute_type(noisy.owner, x)
    weight, bias = getattr(layer, noisy.name), layer.bias
    bias = bias if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _Linear.apply(x.to(dtype), weight, bias, noisy.std, noisy.key, noisy.noisy_rows)
    return y.to(x.dtype) if getattr(layer, "compute_dtype", None) is not None else y


def add_linear_noise(noisy: NoisyWeight, x: Tensor, y: Tensor) -> Tensor:
    """``y``, the layer's own output, + x εᵀ."""
    weight = getattr(noisy.owner, noisy.name)
    with torch.autocast(x.device.type, enabled=False):
        added: Tensor = _Linear.apply(x.to(y.dtype), weight, None, noisy.std, noisy.key, noisy.noise_rows)
        return y + added


def conv(noisy: NoisyWeight, x: Tensor) -> Tensor:
    """The output of nn.Conv1d, 2d or 3d at W + ε."""
    layer, dtype = noisy.owner, _compute_type(noisy.owner, x)
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * (layer.weight.dim() - 2)
    unbatched = x.dim() < layer.weight.dim()
    x = x.unsqueeze(0) if unbatched else x
    order = memory_order(layer.weight)

    def make(weight: Tensor, *noise_and_type: Any) -> Tensor:
        rows = noisy.noisy_rows(weight, *noise_and_type)
        return rows.view([weight.shape[d] for d in order]).permute(sorted(range(len(order)), key=order.__getitem__))

    bias = layer.bias if layer.bias is None else layer.bias.to(dtype)
    geometry = layer.stride, padding, layer.dilation, layer.groups
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _Conv.apply(x.to(dtype), layer.weight, bias, noisy.std, noisy.key, make, geometry)
    return y.squeeze(0) if unbatched else y


def embedding(noisy: NoisyWeight, tokens: Tensor) -> Tensor:
    """The output of nn.Embedding at W + ε: noise for the rows that are looked up."""
    rows = F.embedding(tokens, noisy.owner.weight.detach()).flatten(0, -2)
    numbers = tokens.flatten()
    std = noisy.std if len(noisy.std) == 1 else noisy.std[numbers]
    noisy_rows: Tensor = _embedding_op(rows, std, noisy.key, noisy.relative, numbers.int())
    return noisy_rows.view(*tokens.shape, -1)


@torch.library.custom_op("flatopt::add_noise_to_rows", mutates_args=())
def _embedding_op(rows: Tensor, std: Tensor, key: Tensor, relative: bool, numbers: Tensor) -> Tensor:
    return add_torch_noise_(rows.clone(), std, key, relative, numbers)


@_embedding_op.register_fake
def _(rows: Tensor, std: Tensor, key: Tensor, relative: bool, numbers: Tensor) -> Tensor:
    return torch.empty_like(rows)


# --- the layer's forward --------------------------------------------------------------------------------------------------


class NoisyForward:
    """Stands in a layer's instance dictionary for its ``forward``; while ``on``, the layer computes with W + ε.

    Copies and pickles of the layer get their class's own forward: they are not being trained.
    """

    def __init__(self, layer: nn.Module, slot: str):
        self.layer, self.slot, self.replaced = layer, slot, layer.__dict__.get(slot)
        self.on = self.ran = False  # ran: at W + ε, ever
        self.noisy: NoisyWeight
        self.compute: Callable[[NoisyWeight, Tensor], Tensor] | None = None

    def clean(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward."""
        return (
            type(self.layer).forward(self.layer, *args, **kwargs)
            if self.replaced is None
            else self.replaced(*args, **kwargs)
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.on:
            return self.clean(*args, **kwargs)
        self.ran = True
        if self.compute is None:
            x = args[0] if args else next(iter(kwargs.values()))
            return add_linear_noise(self.noisy, x, self.clean(*args, **kwargs))
        (x,) = (*args, *kwargs.values())  # layers name their input as they like
        return self.compute(self.noisy, x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.replaced is not None:
            return copy.deepcopy(self.replaced, memo)
        layer = copy.deepcopy(self.layer, memo)  # known to memo already where this is part of it
        return type(layer).forward.__get__(layer)

    def __reduce__(self) -> Any:
        return (getattr, (self.layer, "forward")) if self.replaced is None else (_itself, (self.replaced,))


def _itself(thing: Any) -> Any:
    return thing


# accelerate's hooks wrap what they call _old_forward, and are to go on around the noisy forward
SLOTS = ("_old_forward", "forward")


def noisy_forward(weight: NoisyWeight, compute: "Callable[[NoisyWeight, Tensor], Tensor] | None") -> NoisyForward:
    """The :class:`NoisyForward` of the weight's layer, put there if need be. ``compute``: its output at W + ε; None: x εᵀ is
    added to its own output."""
    forward = install(weight.owner)
    forward.noisy, forward.compute = weight, compute
    return forward


def install(layer: nn.Module) -> NoisyForward:
    """The :class:`NoisyForward` of a layer, put there, switched off, if need be.

    Not to be left to the first perturbation: a hook before the layer's forward may bring it about, when torch has looked up
    the forward that it is going to call already.
    """
    forward = installed(layer)
    if forward is None:
        attributes = layer.__dict__
        forward = NoisyForward(layer, next(slot for slot in SLOTS if slot in attributes or slot == "forward"))
        attributes[forward.slot] = forward
    return forward


def installed(layer: nn.Module) -> "NoisyForward | None":
    """The :class:`NoisyForward` of a layer that has one."""
    attributes = layer.__dict__
    return next((attributes[slot] for slot in SLOTS if isinstance(attributes.get(slot), NoisyForward)), None)


def remove(layer: nn.Module) -> None:
    """Give a layer its own forward back. One that somebody wrapped meanwhile stays, switched off."""
    for slot in SLOTS:
        forward = layer.__dict__.get(slot)
        if isinstance(forward, NoisyForward):
            forward.on = False
            if forward.replaced is None and slot == "forward":
                del layer.__dict__[slot]
            elif forward.replaced is None:  # accelerate moved it there
                layer.__dict__[slot] = type(layer).forward.__get__(layer)
            else:
                layer.__dict__[slot] = forward.replaced
