"""Sharding that leaves no rows of a weight on a rank: refused by its own name."""

from typing import Any

from torch import Tensor, nn

from .sharding import is_sharded

ZERO_3 = (
    "DeepSpeed ZeRO-3 keeps a flat slice of it on this rank. Use ZeRO-1 or ZeRO-2 (zero_optimization.stage 2), where every "
    "rank has the whole frozen weight, or FSDP2 (torch.distributed.fsdp.fully_shard; accelerate's fsdp_version: 2), where a "
    "rank has some of its rows"
)
FSDP_1 = (
    "FullyShardedDataParallel (FSDP1) keeps a flat slice of it on this rank. Use FSDP2 (torch.distributed.fsdp.fully_shard; "
    "accelerate's fsdp_version: 2), where a rank has some of its rows, or give the frozen base layers to ignored_states"
)


def sharding_reason(parameter: Any, owner: nn.Module) -> "str | None":
    """Why this rank has no rows of ``owner``'s ``parameter``, and what to use instead; None where it has.

    Made from what DeepSpeed and torch note on parameters and modules; neither is imported.
    """
    if hasattr(parameter, "ds_id") and hasattr(parameter, "ds_tensor"):
        return ZERO_3
    if isinstance(parameter, Tensor) and is_sharded(parameter):
        return None  # FSDP2 and tensor parallelism
    flattened = getattr(parameter, "_fsdp_flattened", False) or getattr(parameter, "_is_flat_param", False)
    # a view of the flat parameter: always with use_orig_params=False, during a forward with True
    unregistered = getattr(owner, "_is_fsdp_managed_module", False) and not any(
        p is parameter and isinstance(p, nn.Parameter) for p in owner._parameters.values()
    )
    return FSDP_1 if flattened or unregistered else None
