"""DeepSpeed's configuration: what a JSON of its own says, checked and completed with what Longspan says."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What is said elsewhere, or cannot be right here: a JSON that names it is refused.
ELSEWHERE = {
    "train_batch_size": "train.micro_batch, train.accumulate and the number of ranks give it",
    "train_micro_batch_size_per_gpu": "train.micro_batch gives it",
    "gradient_accumulation_steps": "train.accumulate gives it",
    "gradient_clipping": "train.clip gives it",
    "scheduler": "optim.schedule gives it",
    "optimizer.params.lr": "optim.lr and optim.schedule give it",
    "optimizer.params.weight_decay": "optim.weight_decay gives it",
    "fp16": "take train.precision=bfloat16",
    "bf16": "take train.precision=bfloat16",
    "amp": "take train.precision=bfloat16",
    "torch_autocast": "take train.precision=bfloat16",
    "tensor_parallel": "engine=deepspeed does not split layers",
    "sequence_parallel_size": "parallel=ulysses splits sequences",
    "gradient_allreduce_op": "each rank's loss is its share already",
    "prescale_gradients": "each rank's loss is its share already",
    "gradient_predivide_factor": "each rank's loss is its share already",
    "sparse_gradients": "gradients are dense",
    "data_efficiency": "data.* decides what is trained on",
    "curriculum_learning": "data.* decides what is trained on",
    "compression_training": "weights would be changed behind the checkpoint's back",
    "eigenvalue": "it needs train_batch of DeepSpeed's own loop",
    "progressive_layer_drop": "it needs a forward of DeepSpeed's own",
    "zero_optimization.compute_grad_norm": "the norm is recorded in each step",
    "zero_optimization.zero_quantized_weights": "weights would be rounded to 8 bits",
    "zero_optimization.zero_quantized_nontrainable_weights": "weights would be rounded to 8 bits",
    "zero_optimization.zero_quantized_gradients": "gradients would be rounded to 4 bits",
    "zero_optimization.zero_hpz_partition_size": "weights have one set of pieces here",
    "zero_optimization.mics_shard_size": "weights have one set of pieces here",
    "zero_optimization.zenflow": "gradients would be those of earlier steps",
}


def read(path: Path) -> dict[str, Any]:
    """A JSON of DeepSpeed's. What it leaves to a trainer ("auto") is as if it were not there.

    Raises:
        ValueError: It is no JSON object, or names what is said elsewhere.
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"engine.config is {path}, which is no file; give a JSON of DeepSpeed's")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"engine.config={path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"engine.config={path} holds a {type(found).__name__}; it must be a JSON object")
    config = _said(found)
    for name, value in _leaves(config):
        for key, why in ELSEWHERE.items():
            if name == key or name.startswith(f"{key}."):
                raise ValueError(f"engine.config={path} says {name} is {value!r}: {why}; leave {key} out")
    return config


def settled(
    config: Mapping[str, Any], *, stage: int | None, offload: bool, offload_weights: bool
) -> dict[str, Any]:
    """The section zero_optimization: what the JSON and the settings say together.

    Raises:
        ValueError: They contradict each other, or the stage knows no such offload.
    """
    zero = dict(config.get("zero_optimization", {}))
    said = zero.setdefault("stage", 2 if stage is None else stage)
    if said not in range(4) or isinstance(said, bool):
        raise ValueError(f"engine.stage is {said!r}; it can be 0, 1, 2 or 3")
    if stage is not None and said != stage:
        raise ValueError(f"engine.stage is {stage}, but engine.config says {said}: leave one of them out")
    for name, key, wanted, least in (
        ("offload", "offload_optimizer", offload, 1),
        ("offload_weights", "offload_param", offload_weights, 3),
    ):
        device = zero.get(key, {}).get("device", "cpu" if wanted else "none")
        if device not in ("none", "cpu"):
            raise ValueError(f"engine.config says {key}.device is {device!r}; it can be cpu or none")
        if wanted and device == "none":
            raise ValueError(f"engine.{name} is true, but engine.config says {key}.device is none")
        if device == "cpu" and said < least:
            choice = f"engine.stage={least}" if least == 3 else "engine.stage=1, 2 or 3"
            raise ValueError(f"engine.{name} is true; it needs {choice}, not {said}")
        if device == "cpu":
            zero[key] = {"device": "cpu", **zero.get(key, {})}
    return zero


def complete(config: Mapping[str, Any], zero: Mapping[str, Any], *, parameters: int) -> dict[str, Any]:
    """All that DeepSpeed is started with. Its loop is ours, so it counts one micro batch a step.

    parameters: elements of the model. DeepSpeed's buckets hold 5e8 by themselves, which is 2 GB.
    """
    bucket = min(500_000_000, parameters)
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "log_level": "warning",
        **config,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket, **zero},
    }


def _said(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _said(value) for key, value in node.items() if value != "auto"}
    return node


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, node
