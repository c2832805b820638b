"""A folder of Hugging Face weights: config.json and safetensors files. No pickle is read."""

import json
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ...models.gpt import GPT
from ...models.lora import own_weights
from ..data.tensorfile import TensorFile
from ..engine.states import local

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What makes texts into tokens and says how to generate; copied as it is.
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
# Rows of two tensors that are compared at a time.
_ROWS = 1024
KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
TOP = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
}  # fmt: skip
PARTS = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    **{f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"attention.{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    **{f"mlp.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}  # fmt: skip


def name_of(own: str) -> str:
    """What transformers calls a weight of our GPT."""
    module, _, leaf = own.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    _, layer, part = module.split(".", 2)
    return f"model.layers.{layer}.{PARTS[part]}.{leaf}"


class Folder:
    """A folder that holds config.json and safetensors files, opened: nothing is read yet but their headers.

    FileNotFoundError if something is missing, ValueError if something is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / CONFIG).is_file():
            raise FileNotFoundError(f"{path} holds no {CONFIG}; give a folder of Hugging Face weights")
        self.config = _json(path / CONFIG)
        self._files: dict[str, TensorFile] = {}
        for file in self._paths():
            tensors = TensorFile(file)
            self._files |= {name: tensors for name in tensors.names()}

    def names(self) -> list[str]:
        """Of all tensors, without the angles that files of old versions hold."""
        return sorted(name for name in self._files if not name.endswith("rotary_emb.inv_freq"))

    def dtype(self, name: str) -> torch.dtype:
        return self._files[name].dtype(name)

    def tensor(self, name: str) -> Tensor:
        """One tensor, as it is stored."""
        return self._files[name].tensor(name)

    def part(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """What is in the box of one tensor, as it is stored; nothing else of it is read."""
        return self._files[name].part(name, box)

    def check(self, shapes: Mapping[str, Sequence[int]], *, tied: bool) -> None:
        """ValueError unless the folder holds these tensors and no others, all of a floating type. A tied
        model's output layer may be there too, if it equals the embedding.
        """
        head, embed = (f"{TOP[name]}.weight" for name in ("head", "embed"))
        names = [name for name in self.names() if not (tied and name == head)]
        wrong = [f"{name} is missing" for name in shapes if name not in names]
        for name in names:
            here = self._files[name].shape(name)
            if name not in shapes:
                wrong.append(f"{name} is not expected")
            elif here != tuple(shapes[name]):
                wrong.append(f"{name} is {list(here)}, not {list(shapes[name])}")
            elif not self.dtype(name).is_floating_point:
                wrong.append(f"{name} is of {self.dtype(name)}")
        if tied and not wrong and head in self._files and not self._equal(head, embed):
            wrong.append(f"{head} differs from {embed}, although tie_word_embeddings is true")
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ValueError(f"{self.path} does not fit its {CONFIG}: {'; '.join(wrong[:4])}{more}")

    @torch.no_grad()
    def load(self, model: GPT) -> None:
        """Copies all weights into a model of the folder's settings, tensor by tensor, in the model's dtype;
        of what ranks share, each reads only what it holds. What adapts the model (LoRA) stays. ValueError if
        they do not fit, and then nothing is changed.
        """
        weights = own_weights(model)
        self.check(shapes_of(model), tied=model.head.weight is model.embed.weight)
        for own, p in weights.items():
            if (here := local(p)).numel():
                here.copy_(self.part(name_of(own), box_of(p)))

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same, of which a few rows are in memory at a time."""
        rows = self._files[one].shape(one)[0]
        boxes = ((slice(first, first + _ROWS),) for first in range(0, rows, _ROWS))
        return self._files[one].shape(one) == self._files[other].shape(other) and all(
            torch.equal(self.part(one, box), self.part(other, box)) for box in boxes
        )

    def _paths(self) -> list[Path]:
        index = self.path / INDEX
        if not index.is_file():
            if (self.path / SINGLE).is_file():
                return [self.path / SINGLE]
            found = sorted(file.name for kind in PICKLES for file in self.path.glob(kind))
            raise FileNotFoundError(
                f"{self.path} holds neither {SINGLE} nor {INDEX}"
                + (f"; {found[0]} is a pickle, which may run code and is not read" if found else "")
                + ": save the model with save_pretrained(..., safe_serialization=True)"
            )
        files = _json(index).get("weight_map")
        if not isinstance(files, dict) or not all(_plain(file) for file in files.values()):
            raise ValueError(f"{index} holds no weight_map of safetensors files in its folder")
        paths = [self.path / file for file in sorted(set(files.values()))]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"{self.path} lacks {', '.join(missing[:4])}, which its {INDEX} names")
        return paths


def box_of(x: Tensor) -> tuple[slice, ...]:
    """Which part of a tensor is held here; all of one that ranks do not share."""
    if not isinstance(x, DTensor):
        return ()
    sizes, first = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return tuple(slice(a, a + n) for a, n in zip(first, sizes, strict=True))


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name in transformers and shape of each weight; tied ones once."""
    return {name_of(own): tuple(p.shape) for own, p in own_weights(model).items()}


def _plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} instead of an object")
    return found


@dataclass(frozen=True)
class Weight:
    """A tensor that is fetched when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write(
    folder: Path, config: Mapping[str, Any], weights: Sequence[Weight], *, shard_gb: float,
    beside: Mapping[str, Path], texts: Mapping[str, str],
) -> list[str]:  # fmt: skip
    """Writes a folder that transformers loads, in safetensors files of at most `shard_gb` GB (10^9 bytes;
    more only for a single tensor), with copies of the files `beside` and files of `texts`, by their new
    names. The folder is there when it is whole, or not at all. The names of the weight files.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"to={folder} is there already; give a new folder")
    shards = _shards(weights, int(shard_gb * 1e9))
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    part = folder.parent / f".{folder.name}-{secrets.token_hex(4)}"
    part.mkdir(parents=True)
    try:
        for name, shard in zip(names, shards, strict=True):
            with (part / name).open("wb") as file:
                _write_shard(file, shard)
        if len(shards) > 1:
            places = {w.name: name for name, shard in zip(names, shards, strict=True) for w in shard}
            total = {"total_size": sum(w.bytes for w in weights)}
            (part / INDEX).write_text(json.dumps({"metadata": total, "weight_map": places}, indent=2))
        (part / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")
        for name, path in beside.items():
            shutil.copyfile(path, part / name)
        for name, text in texts.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text(text)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return names


def _shards(weights: Sequence[Weight], limit: int) -> list[list[Weight]]:
    shards: list[list[Weight]] = [[]]
    held = 0
    for weight in weights:
        if shards[-1] and held + weight.bytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(weight)
        held += weight.bytes
    return shards


def _write_shard(file: BinaryIO, shard: Sequence[Weight]) -> None:
    """The safetensors format (https://github.com/huggingface/safetensors, "Format"), one tensor at a time."""
    # transformers looks for the mark of who wrote it
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for w in shard:
        header[w.name] = {
            "dtype": KINDS[w.dtype],
            "shape": list(w.shape),
            "data_offsets": [at, at + w.bytes],
        }
        at += w.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for w in shard:
        tensor = w.get().detach().to("cpu", w.dtype).contiguous()
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
