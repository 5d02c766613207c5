"""A model's loss as a function of some of its weights: where it is measured, and back again."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..adapters.checks import check_kind, check_lasting
from ..adapters.peft import PEFT, chain_of
from ..core.weight import AdaptedWeight, WeightUpdate, in_memory_order
from ..ops.noise import normals_of_rows, row_keys, step_key, weight_key
from ..ops.torch_backend import chunks
from ..optimizers.groups import read_groups
from ..perturbation.weights import perturbed_by_another, restore_inside

LossFn = Callable[[nn.Module, Any], Tensor]
_TRAINED = (
    "loss_fn put the model into train mode, or calls one that is in train mode and no part of what was given, and flatness "
    "is measured in eval mode, without dropout or an optimizer's noise: leave model.train() out of it, call eval() before"
)


class Point:
    """The weights to be moved, and the loss, gradient and Hessian products where they stand now.

    Lists of tensors run over the weights, shaped like them, in float32 (float64 for float64 weights).
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: list[Any],
        weights: "list[Tensor]",
        targets: "list[AdaptedWeight]",
        autocasts: "list[torch.autocast]",
        modules: "list[nn.Module]",
    ):
        self._model, self._loss_fn, self._batches, self._targets = model, loss_fn, batches, targets
        self._autocasts = autocasts
        self._modules = modules
        self._merged = [target.adapter.is_merged(target.layer) for target in targets]
        self.weights = weights
        self._clean = [w.detach().clone() for w in weights]

    def values(self, index: int) -> Tensor:
        """W' of weight ``index``, unmoved; with the adapter's part if the adapter is not merged into it."""
        clean = self._clean[index]
        value = clean.to(_work(clean), copy=True)
        if self._targets and not self._merged[index]:
            rows, update = self._targets[index].rows(value), self._update(index)
            for B, A, scaling in update.factors:
                rows += scaling * (B.detach().to(rows.dtype) @ A.detach().to(rows.dtype))
            if update.dense is not None:
                rows += update.dense.detach()
        return value

    def _update(self, index: int) -> WeightUpdate:
        weight = self._targets[index]
        return in_memory_order(weight.adapter.updates([weight])[0], self._clean[index], weight.layout)

    def row_norms(self, index: int, tensor: Tensor) -> Tensor:
        """Of a tensor like weight ``index`` the norm of each output row, shaped like it."""
        return self.spread(index, self.rows(index, tensor).norm(dim=1, keepdim=True))

    def spread(self, index: int, column: Tensor) -> Tensor:
        """A number a row, ``(rows, 1)``, over all of weight ``index``: a tensor like it."""
        clean = self._clean[index]
        spread = torch.empty_like(clean, dtype=_work(clean))
        rows = self.rows(index, spread)
        rows.copy_(column.expand_as(rows))
        return spread

    def rows(self, index: int, tensor: Tensor) -> Tensor:
        """Of a tensor like weight ``index`` the view (rows, fan-in)."""
        return self._targets[index].rows(tensor)

    def random(self, index: int, seed: int, draw: int, signs: bool = False) -> Tensor:
        """Standard normals for weight ``index``, or their signs: those of :class:`flatopt.FlatPerturbOptimizer` at step
        ``draw`` with that seed, on any device.
        """
        clean = self._clean[index]
        z = torch.empty_like(clean, dtype=_work(clean))
        rows = self.rows(index, z)
        keys = row_keys(weight_key(step_key(seed, draw, 0), index + 1), len(rows), z.device)
        for here in chunks(rows.shape[0], rows.shape[1], z.device):
            top, left = here
            part = rows[here]
            part.copy_(normals_of_rows((keys[0][top], keys[1][top]), left.start, part.shape[1]))
        return z.sign_() if signs else z

    @torch.no_grad()
    def move(self, offset_of: "Callable[[int], Tensor] | None") -> None:
        """Set every weight to its clean value plus ``offset_of(index)``; to the clean value if None."""
        for index, (weight, clean) in enumerate(zip(self.weights, self._clean)):
            weight.copy_(clean if offset_of is None else clean.to(_work(clean)) + offset_of(index))
        torch.clear_autocast_cache()  # an autocast region around the measurement holds half-precision copies of them

    @torch.no_grad()
    def loss(self) -> float:
        return sum(self._batch_loss(batch).item() for batch in self._batches) / len(self._batches)

    @torch.enable_grad()
    def gradient(self) -> "tuple[float, list[Tensor]]":
        """The loss and its gradient."""
        total, sums = 0.0, [torch.zeros_like(c, dtype=_work(c)) for c in self._clean]
        for batch in self._batches:
            loss = self._batch_loss(batch, differentiable=True)
            total += loss.item() / len(self._batches)
            for summed, g in zip(sums, torch.autograd.grad(loss, self.weights, materialize_grads=True)):
                summed += g / len(self._batches)
        return total, sums

    @torch.enable_grad()
    def hessian_times(self, vector: "list[Tensor]") -> "list[Tensor]":
        vector = [v.to(w.dtype) for v, w in zip(vector, self.weights)]
        sums = [torch.zeros_like(c, dtype=_work(c)) for c in self._clean]
        for batch in self._batches:
            with sdpa_kernel(SDPBackend.MATH):  # the fused attentions cannot be differentiated twice
                loss = self._batch_loss(batch, differentiable=True)
                first = torch.autograd.grad(loss, self.weights, create_graph=True, materialize_grads=True)
                pairs = [(g, v) for g, v in zip(first, vector) if g.requires_grad]
                if not pairs:  # the loss is linear in the weights
                    continue
                second = torch.autograd.grad(
                    [g for g, _ in pairs], self.weights, [v for _, v in pairs], materialize_grads=True
                )
            for summed, h in zip(sums, second):
                summed += h / len(self._batches)
        return sums

    def _batch_loss(self, batch: Any, differentiable: bool = False) -> Tensor:
        try:
            with ExitStack() as stack:
                for autocast in self._autocasts:
                    stack.enter_context(autocast)
                loss = self._loss_fn(self._model, batch)
        except Exception as error:
            self._check_left_alone()  # the reason, where it has one: an optimizer's noise on weights that are measured
            if isinstance(error, ValueError) and perturbed_by_another(self._targets) and "is trainable: " in str(error):
                raise ValueError(_TRAINED) from error
            raise
        self._check_left_alone()
        if not (isinstance(loss, Tensor) and loss.numel() == 1):
            got = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r:.80}"
            raise TypeError(f"loss_fn(model, batch) must return the batch's mean loss as a scalar tensor, got {got}")
        if differentiable and not loss.requires_grad:
            raise ValueError("loss_fn(model, batch) returned a loss without a graph: it must not detach, nor use no_grad")
        return loss.reshape(())

    def _check_left_alone(self) -> None:
        if any(module.training for module in self._modules):
            restore_inside(self._model, self._targets)
            raise ValueError(_TRAINED)
        for target, merged in zip(self._targets, self._merged):
            if target.adapter.is_merged(target.layer) != merged:
                raise ValueError(
                    f"loss_fn {'un' if merged else ''}merged the adapter of {target.path} while W is moved (so does PEFT's "
                    "disable_adapter()). Make outputs of the base model before, and pass them in the batches"
                )


@contextmanager
def at_weights(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], targets: Any = None, space: str = "full"
) -> "Iterator[Point]":
    """The :class:`Point` of the merged weights (``"full"``) or of the adapters' own (``"adapter"``); then all as before.

    ``targets``: as for :class:`flatopt.FlatPerturbOptimizer`; by default every adapted layer of ``model``.
    """
    batches = listed(batches)
    if space not in ("full", "adapter"):
        raise ValueError(f"space must be 'full' or 'adapter', got {space!r}")
    groups, roots = read_groups(model if targets is None else targets, {})
    found = [target for group in groups for target in group["targets"]]
    if space == "full":
        for target in found:
            check_kind(target)
            check_lasting(target)
    restore_inside(model, found)
    kinds = {target.parameter.device.type for target in found}
    with torch.inference_mode(False), _full_precision(kinds) as autocasts, in_eval_mode(model, *roots) as modules:
        if space == "adapter":
            with _kept(_adapter_parameters(found)) as weights:
                yield Point(model, loss_fn, batches, weights, [], autocasts, modules)
        else:
            with _merged(found), _kept([target.parameter for target in found]) as weights:
                _refuse_rescaled(found)
                yield Point(model, loss_fn, batches, weights, found, autocasts, modules)


def listed(batches: Iterable[Any]) -> "list[Any]":
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty: pass a list of batches, the same for all models that are compared")
    return batches


@contextmanager
def in_eval_mode(*roots: nn.Module) -> "Iterator[list[nn.Module]]":
    """All modules of ``roots``, which are yielded; afterwards each in the mode that it was in."""
    modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False  # in train(False) loralib's layers would merge, and come back with other bits
        yield modules
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode


@contextmanager
def _full_precision(kinds: "set[str]") -> "Iterator[list[torch.autocast]]":
    """The library's own arithmetic without the caller's autocast, which is yielded, to be entered again by the loss."""
    around = [kind for kind in sorted(kinds) if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)]
    cached = torch.is_autocast_cache_enabled()
    with ExitStack() as stack:
        autocasts = [torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=cached) for kind in around]
        for kind in around:
            stack.enter_context(torch.autocast(kind, enabled=False))
        torch.clear_autocast_cache()  # of weights that merging is about to move
        try:
            yield autocasts
        finally:
            torch.clear_autocast_cache()


def _adapter_parameters(targets: "list[AdaptedWeight]") -> "list[Tensor]":
    for target in targets:
        if target.adapter.is_merged(target.layer):
            raise ValueError(f"space='adapter', but the adapter of {target.path} is merged: call unmerge_adapter() first")
        if target.adapter is PEFT and all(link.disable_adapters for link in chain_of(target.layer)):
            raise ValueError(
                f"space='adapter', but the adapter of {target.path} is disabled: it has no part in the loss. Enable it, or "
                "leave it out with targets=[{'modules': [...]}]"
            )
    layers = dict.fromkeys(target.layer for target in targets)
    parameters: list[Tensor] = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("space='adapter' found no trainable parameter: call requires_grad_() on the adapter's")
    return parameters


def _refuse_rescaled(targets: "list[AdaptedWeight]") -> None:
    for target in targets:
        if not target.adapter.is_merged(target.layer):
            (update,) = target.adapter.updates([target])
            if update.row_norm is not None or update.alpha is not None:
                raise ValueError(
                    f"{target.path} is rescaled by its adapter (DoRA), which flatopt cannot merge: a move of W is another "
                    "of W'. Measure a merged copy, its weights given as targets=[{'params': [...]}], or leave it out"
                )


def _to_merge(targets: "list[AdaptedWeight]") -> "dict[Any, str]":
    """PEFT's layers to be merged, each with how errors call it: all on one weight, but for those whose adapters are off."""
    found: dict[Any, str] = {}
    for target in targets:
        if target.adapter is not PEFT:
            continue
        for link in chain_of(target.layer):
            if link.disable_adapters and link.merged:
                raise ValueError(
                    f"the adapter of {target.path} is merged and disabled, so that the next forward would unmerge it: call "
                    "unmerge_adapter() first"
                )
            if not (link.disable_adapters or link.merged):
                found[link] = target.path
    return found


@contextmanager
def _merged(targets: "list[AdaptedWeight]") -> Iterator[None]:
    """PEFT layers with their adapters merged; afterwards unmerged, and their base layers' bits as they were."""
    unmerged = _to_merge(targets)
    before = [
        (module, name, p, p.data, p.detach().clone())
        for base in dict.fromkeys(layer.get_base_layer() for layer in unmerged)
        for module in base.modules()
        for name, p in module._parameters.items()
        if p is not None
    ]
    try:
        for layer, path in unmerged.items():
            try:
                layer.merge()
            except RuntimeError as error:
                # of a grouped convolution an older PEFT says only that shapes do not fit
                if not isinstance(error, NotImplementedError) and getattr(layer.get_base_layer(), "groups", 1) == 1:
                    raise
                raise ValueError(
                    f"{path}: PEFT cannot merge its adapter ({error}), and flatness is measured at merged weights. Leave it "
                    "out: pass the other layers as targets=[{'modules': [...]}]"
                ) from error
        yield
    finally:
        for layer in unmerged:
            if layer.merged:
                layer.unmerge()
        with torch.no_grad():
            for module, name, parameter, data, clean in before:
                # merging may have given the parameter another storage, or the module another parameter
                parameter.data = data
                parameter.copy_(clean)
                if name in module._parameters:
                    module._parameters[name] = parameter


@contextmanager
def _kept(weights: "list[Tensor]") -> "Iterator[list[Tensor]]":
    """Weights that may be moved and differentiated inside; afterwards the same bits, and frozen as before."""
    weights = list(dict.fromkeys(weights))
    before = [(w, w.requires_grad, w.detach().clone()) for w in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield weights
    finally:
        for weight, requires_grad, clean in before:
            weight.requires_grad_(requires_grad)
            with torch.no_grad():
                weight.copy_(clean)


def _work(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
