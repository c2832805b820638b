"""Jobs with Megatron's distributed optimizer on gloo ranks: under torchrun, with a folder as its argument, it
runs what cases.json there lists, and leaves there in rank-0, rank-1, ... what each rank saw, by name.
test_megatron_own.py starts it.
"""

import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import jobs
from jobs import config, first_batch, joined, launch_of, quiet, whole
from longspan.train.checkpoint import Checkpoints
from longspan.train.engine.megatron import Megatron
from longspan.train.engine.megatron_native import sharded
from longspan.train.engine.states import local
from longspan.train.job import Job, build
from longspan.train.loop import resume
from megatron_shim import on_cpu


def trained(rank: int, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """The run, the numbers of a moment that this rank keeps, and those of the parameters that it has.

    average: Megatron's DDP divides by the ranks, which is planted.
    """
    built: list[Job] = []

    def building(*args: Any) -> Job:
        built.append(build(*args))
        own = engine_of(built[-1]).own
        for group in own.ddp.bucket_groups if case.get("average") and own is not None else ():
            for bucket in group.buckets:
                bucket.gradient_scaling_factor = 1 / dist.get_world_size()
        return built[-1]

    with patch.object(jobs, "build", building):
        ran = jobs.run(rank, config(*case["words"]), folder / case["folder"], case.get("stop"))
    own = engine_of(built[0]).own
    assert own is not None
    kept = sum(state["exp_avg"].numel() for state in own.zero.optimizer.state.values())
    return {"ran": ran, "kept": kept, "has": sum(p.numel() for p in own.model.parameters())}


def poisoned(rank: int, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """The norms of a step, of one whose loss is not finite and of the one after; the names of what the second
    changed; the numbers of a moment that this rank has in a checkpoint.
    """
    cfg = config(*case["words"])
    with quiet(cfg), joined(rank) as device:
        job = build(cfg, launch_of(rank), device)
        part, attend = first_batch(job, device)

        def step(valid: float) -> float:
            job.engine.backward(part, attend, valid, last=True)
            return job.engine.step(1e-3, 1.0)

        norms, before = [step(100.0)], flat(job.engine.save())
        norms.append(step(math.nan))
        after = flat(job.engine.save())
        norms.append(step(100.0))
        changed = [n for n in before if not before[n].equal(after[n])]
        rows = sum(x.numel() for name, x in before.items() if name.endswith("/exp_avg"))
        return {"norms": norms, "changed": changed, "rows": rows}


def native(rank: int, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """The names of what differs in a plain GPTModel, and in another job, after a checkpoint of Megatron's own
    was loaded.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    at = folder / case["folder"]
    cfg = config(*case["words"], f"run.dir={at}", "engine.native=true", "checkpoint.every=0", "eval.final=0")
    assert whole(rank, cfg) == 0
    with quiet(cfg), joined(rank) as device:
        first, second = (build(cfg, launch_of(rank), device) for _ in range(2))
        resume(first, Checkpoints(at / "checkpoints", asynchronous=False), "auto")
        ours, theirs = engine_of(first), engine_of(second)
        assert theirs.own is not None
        saved = str(at / "native" / f"iter_{cfg.train.steps:07d}")
        made = ours.made
        plain = GPTModel(
            config=made.config,
            transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True),
            vocab_size=made.vocab_size, max_sequence_length=1, position_embedding_type="none",
            share_embeddings_and_output_weights=made.share_embeddings_and_output_weights,
        )  # fmt: skip
        plain.load_state_dict(dist_checkpointing.load({"model": plain.sharded_state_dict()}, saved)["model"])
        want = dict(made.named_parameters())
        got = dict(plain.named_parameters())
        # torch's AdamW has no state before its first step, which is what loading fills
        theirs.own.zero._init_optimizer_states_with_dummy_values()
        loaded = dist_checkpointing.load(sharded(theirs.made, theirs.own.zero, loading=True), saved)
        theirs.made.load_state_dict(loaded["model"])
        load_optimizer(theirs.own.zero, loaded["optimizer"])
        mine, read = (flat(engine.save()) for engine in (ours, theirs))
        return {
            "model": sorted(want.keys() ^ got.keys()) + [n for n in want if not want[n].equal(got[n])],
            "job": [n for n in mine if not mine[n].equal(read[n])],
            "names": len(want), "tensors": len(mine), "iteration": loaded_iteration(saved),
        }  # fmt: skip


def load_optimizer(zero: Any, state: dict[str, Any]) -> None:
    """As its load_state_dict, which with torch's AdamW asks for a count of steps of each parameter, and finds
    none: they are out of its way meanwhile.
    """
    moments = state.pop("param_state")
    zero.load_state_dict(state)
    counts = {shard: kept.pop("step") for shard, kept in zero.optimizer.state.items()}
    zero.load_parameter_state_from_fully_reshardable(moments)
    for shard, count in counts.items():
        zero.optimizer.state[shard]["step"] = count


def flat(state: dict[str, Any], path: str = "") -> dict[str, Tensor]:
    """Copies of the tensors of a nested state, or of what this rank holds of them, by their path."""
    found: dict[str, Tensor] = {}
    for name, x in state.items():
        found |= flat(x, f"{path}{name}/") if isinstance(x, dict) else {path + name: local(x).clone()}
    return found


def loaded_iteration(saved: str) -> int:
    from megatron.core.dist_checkpointing import load_common_state_dict

    return int(load_common_state_dict(saved)["iteration"])


def engine_of(job: Job) -> Megatron:
    assert isinstance(job.engine, Megatron)
    return job.engine


KINDS = {"trained": trained, "poisoned": poisoned, "native": native}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, seen = dist.get_rank(), {}
    with on_cpu():
        for case in json.loads((folder / "cases.json").read_text()):
            seen[case["name"]] = KINDS[case["kind"]](rank, folder, case)
    (folder / f"rank-{rank}").write_bytes(pickle.dumps(seen))
    dist.destroy_process_group()


# megatron-core starts processes that import this file
if __name__ == "__main__":
    main(Path(sys.argv[1]))
