"""FSDP2: a rank perturbs its own rows of a sharded weight (DTensor), in place."""

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

    from .weight import WeightUpdate

_sharded: dict[type, bool] = {Tensor: False, nn.Parameter: False}  # of classes seen: asked of every parameter each step


def is_sharded(tensor: Tensor) -> "TypeIs[DTensor]":
    kind = type(tensor)
    known = _sharded.get(kind)
    if known is None:
        known = _sharded[kind] = hasattr(kind, "device_mesh") and hasattr(kind, "placements")
    return known


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, without autograd, but with its version counter; any other tensor itself."""
    # to_local() makes a new tensor for autograd, and detach() of a DTensor one with a counter of its own: slow, each step
    return tensor._local_tensor if is_sharded(tensor) else tensor


def splits_rows_only(weight: Tensor, row_dims: "tuple[int, ...]") -> bool:
    """Whether each row of ``weight`` is on one rank whole, so that its norm needs no other rank."""
    return not is_sharded(weight) or all(
        p.is_replicate() or (p.is_shard() and getattr(p, "dim", None) in row_dims) for p in weight.placements
    )


def is_strided(weight: Tensor) -> bool:
    """Whether a rank holds rows as two kinds of sharding leave them: FSDP2 over tensor parallelism, or a fused weight."""
    return is_sharded(weight) and any(hasattr(p, "split_factor") for p in weight.placements)


def first_row(weight: Tensor, layout: str) -> int:
    """The number of this rank's first row among all rows of the weight, by which its noise is keyed."""
    if not is_sharded(weight):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return int(offset[1] if layout == "columns" else offset[0] * (weight.shape[1] if layout == "experts" else 1))


def summed_over_shards(total: Tensor, weight: Tensor) -> Tensor:
    """The sum over the ranks that hold parts of ``weight``."""
    if not is_sharded(weight):
        return total
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if p.is_shard() else Replicate() for p in weight.placements]
    return DTensor.from_local(total, weight.device_mesh, placements, run_check=False).full_tensor()


def local_update(update: "WeightUpdate", weight: Tensor) -> "WeightUpdate":
    """The rows of an update that belong to this rank's rows of ``weight``. Gathers A, so every rank must come here.

    Of any update, one by one; most are of the kind that :mod:`.gathering` takes together.
    """
    if not is_sharded(weight):
        return update
    from torch.distributed.tensor import DTensor, Replicate

    def rows(tensor: Any) -> Any:
        if tensor is None:
            return None
        if not is_sharded(tensor):
            replicated = [Replicate()] * weight.device_mesh.ndim
            tensor = DTensor.from_local(tensor, weight.device_mesh, replicated, run_check=False)
        return tensor.redistribute(placements=weight.placements).to_local()

    def whole(tensor: Any) -> Any:
        return tensor.full_tensor() if isinstance(tensor, Tensor) and is_sharded(tensor) else tensor

    factors = tuple((rows(B), whole(A), whole(scaling)) for B, A, scaling in update.factors)
    return type(update)(factors, rows(update.dense), rows(update.row_norm), rows(update.alpha))


def is_fsdp_module(module: nn.Module) -> bool:
    return hasattr(type(module), "unshard") and hasattr(type(module), "reshard")


def own_parameters(module: nn.Module) -> "list[Tensor | None]":
    """Those that FSDP2 gathers for ``module``: not those of FSDP2 modules inside it."""
    inside = [p for child in module.children() if not is_fsdp_module(child) for p in own_parameters(child)]
    return [*module._parameters.values(), *inside]


def reshard_amid_forward(module: "Any") -> bool:
    """Make an FSDP2 module hold its shards, also amid its forward; whether it held gathered parameters."""
    before = own_parameters(module)
    module.reshard()
    if before and not any(p is not None and is_sharded(p) for p in own_parameters(module)):
        # amid its forward it does so only where reshard_after_forward is set
        if not hasattr(module, "set_reshard_after_forward"):
            raise RuntimeError(
                f"FSDP2 gathered {type(module).__name__}'s parameters before their noise could be written, and this torch "
                "cannot shard them again amid a forward. Make the FlatPerturbOptimizer after fully_shard, with the module "
                "that was given to fully_shard among its targets; or use a newer torch"
            )
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()
        module.set_reshard_after_forward(False, recurse=False)
    return any(map(operator.is_not, before, own_parameters(module)))


def fsdp_modules(roots: "Iterable[nn.Module]") -> "list[nn.Module]":
    """The modules whose parameters FSDP2 gathers and lets go.

    It keeps gathered copies between forward and backward and after an evaluation. ``reshard()`` gives them up, so that the
    next forward or backward gathers what was written to the shards meanwhile.
    """
    return [module for root in roots for module in root.modules() if is_fsdp_module(module)]


def mesh_of(tensors: "Iterable[Tensor]") -> "DeviceMesh | None":
    """Of the first that is sharded over a mesh that this rank is part of."""
    meshes = (tensor.device_mesh for tensor in tensors if is_sharded(tensor))
    return next((mesh for mesh in meshes if mesh.get_coordinate() is not None), None)


def tensor_parallel_mesh(roots: "Iterable[nn.Module]") -> "DeviceMesh | None":
    """The mesh over which one forward of ``roots`` is split; None under FSDP2, where each rank has a forward of its own."""
    roots = list(roots)
    return None if fsdp_modules(roots) else mesh_of(p for root in roots for p in root.parameters())


def data_parallel_rank(mesh: "DeviceMesh | None") -> int:
    """This process's number among those that draw noise of their own; ``mesh``: over which weights or forwards are split.

    Ranks that hold parts of one weight, or replicas of it in one tensor-parallel forward, share a number: noise is keyed by
    global row, so their parts fit together, on any number of ranks.
    """
    coordinate = None if mesh is None else mesh.get_coordinate()
    if mesh is None or coordinate is None:
        return torch.distributed.get_rank()
    return int(mesh.mesh[(*coordinate[:-1], 0)])  # (data,) tensor or shard: the last dimension holds one forward, or weight
