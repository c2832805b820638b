"""Megatron's own kind of checkpoint: its GPTModel and its optimizer, by its names."""

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException

# Moments shaped as the parameters, for any number of ranks. They come together in the CPU memory of one rank
# of dp x context.
FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


def write(made: Any, zero: Any, folder: Path, step: int) -> None:
    """Writes `iter_0000123` into `folder` with dist_checkpointing, as Megatron's trainer names it.

    made: the GPTModel. zero: its DistributedOptimizer, after a step. All ranks call it.
    Raises OSError if it cannot be written.
    """
    from megatron.core import dist_checkpointing

    at = folder / f"iter_{step:07d}"
    at.mkdir(parents=True, exist_ok=True)
    state = sharded(made, zero) | {"iteration": step}
    try:
        dist_checkpointing.save(state, str(at), content_metadata=dict(FORMAT))
    except (dist_checkpointing.core.CheckpointingException, CheckpointException) as error:
        # the second is no Exception, and would end the run
        raise OSError(f"{at}: {error}") from error


def sharded(made: Any, zero: Any, *, loading: bool = False) -> dict[str, Any]:
    """What is in it, also as what it is loaded into."""
    # a dict each: Megatron writes its process groups into them
    model = made.sharded_state_dict(metadata=dict(FORMAT))
    optimizer = zero.sharded_state_dict(model, is_loading=loading, metadata=dict(FORMAT))
    if optimizer["param_state"] is None:
        # the moments are with another rank, and no part of what all have
        del optimizer["param_state"]
    return {"checkpoint_version": 3.0, "model": model, "optimizer": optimizer}
