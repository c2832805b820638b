"""config.json of a Hugging Face folder, and the settings of our GPT that compute the same."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import log, sqrt
from typing import Any, NamedTuple, cast

from ...kernels.mask import Unsupported, Window
from ...models.block import Bias, HeadNorm
from ...models.gpt import GPT, Block
from ...models.rope import Rope


class Family(NamedTuple):
    """What a model_type of transformers can say. windows: of no layer, of all alike, or by layer. defaults:
    of keys that a config.json may leave out, where families differ.
    """

    architecture: str
    biases: tuple[Bias, ...]
    qk_norm: bool
    windows: str
    defaults: Mapping[str, Any]


QWEN = {"max_window_layers": 28, "use_sliding_window": False, "sliding_window": 4096}
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", ("none", "qkvo"), False, "none", {}),
    "mistral": Family(
        "MistralForCausalLM", ("none",), False, "all", {"num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "ministral": Family(
        "MinistralForCausalLM", ("none",), False, "layers", {"num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "qwen2": Family("Qwen2ForCausalLM", ("qkv",), False, "layers", QWEN | {"num_key_value_heads": 32}),
    "qwen3": Family(
        "Qwen3ForCausalLM", ("none", "qkvo"), True, "layers",
        QWEN | {"num_key_value_heads": 32, "head_dim": 128},
    ),
}  # fmt: skip
# What the other family members and tools read besides the architecture: kept from the folder of the start.
NEUTRAL = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


@dataclass(frozen=True)
class Settings:
    """Arguments of `GPT`, all of them resolved; window: of each layer."""

    vocab: int
    dim: int
    layers: int
    heads: int
    hidden: int
    kv_heads: int
    head_dim: int
    window: tuple[int | None, ...]
    tied: bool
    qk_norm: bool
    bias: Bias
    eps: float
    rope: Rope

    @classmethod
    def of_config(cls, config: Mapping[str, Any], length: int | None = None) -> "Settings":
        """What config.json says; for RoPE that depends on a sequence's length, at this `length`.

        Unsupported for what would compute something else here, ValueError for a key that is missing.
        """
        kind = config.get("model_type")
        if kind not in FAMILIES:
            raise Unsupported(f"config.json: model_type is {kind!r}; it can be {', '.join(FAMILIES)}")
        _refuse(config)
        family = FAMILIES[kind]
        read = {**family.defaults, **config}
        heads, dim = _whole(read, "num_attention_heads"), _whole(read, "hidden_size")
        layers = _whole(read, "num_hidden_layers")
        biased = kind == "qwen2" or ("qkvo" in family.biases and read.get("attention_bias", False))
        return cls(
            _whole(read, "vocab_size"), dim, layers, heads, _whole(read, "intermediate_size"),
            kv_heads=_whole(read, "num_key_value_heads", heads),
            head_dim=_whole(read, "head_dim", dim // heads),
            window=_windows(read, family, layers),
            tied=bool(read.get("tie_word_embeddings", False)),
            qk_norm=family.qk_norm,
            bias=family.biases[-1] if biased else "none",
            eps=float(read.get("rms_norm_eps", 1e-6)),
            rope=_rope(read, length),
        )  # fmt: skip

    @classmethod
    def of_model(cls, model: GPT) -> "Settings":
        """What a model was made of. The windows are those of its masks, where they say nothing else."""
        block = cast(Block, model.blocks[0])
        vocab, dim = model.embed.weight.shape
        return cls(
            vocab, dim, layers=model.layers, heads=model.heads, hidden=block.mlp.gate.out_features,
            kv_heads=model.kv_heads, head_dim=model.head_dim,
            window=tuple(
                mask.left + 1 if isinstance(mask, Window) and mask.left is not None and mask.right == 0
                else own for mask, own in zip(model.masks, model.windows, strict=True)
            ),
            tied=model.head.weight is model.embed.weight,
            qk_norm=isinstance(block.attention.q_norm, HeadNorm),
            bias=model.bias, eps=model.eps, rope=model.rope,
        )  # fmt: skip

    def model(self) -> GPT:
        """A causal model of these settings."""
        return GPT(**{f.name: getattr(self, f.name) for f in fields(self)})

    def node(self) -> dict[str, Any]:
        """The settings as a choice of the config group `model`."""
        one = len(set(self.window)) == 1
        rope = {name: value for name, value in asdict(self.rope).items() if value != getattr(Rope(), name)}
        if self.rope.factors is not None:
            rope["factors"] = list(self.rope.factors)
        return {
            "_target_": "longspan.models.gpt.GPT", "_partial_": True,
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "window": self.window[0] if one else list(self.window),
            "rope": {"_target_": "longspan.models.rope.Rope", "theta": self.rope.theta, **rope},
        }  # fmt: skip

    def differences(self, other: "Settings", where: str) -> list[str]:
        """'model.dim is 32, but `where` has 64' for each setting but the rope that differs."""
        return [
            f"model.{f.name} is {_short(getattr(self, f.name))}, but {where} has "
            f"{_short(getattr(other, f.name))}"
            for f in fields(self)
            if f.name != "rope" and getattr(self, f.name) != getattr(other, f.name)
        ]


def config_of(
    settings: Settings, *, context: int, dtype: str, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of settings, in keys that transformers 4 and 5 read.

    context: the greatest length trained on. base: config.json of the weights that training started from,
    whose model_type (if it can say the same), special tokens and greatest length are kept. Unsupported if no
    family can say it.
    """
    base = base or {}
    kind = _family(settings, base.get("model_type"))
    rope = settings.rope
    stretched = int(rope.factor * rope.original) if rope.original else 0
    said: dict[str, Any] = {
        "architectures": [FAMILIES[kind].architecture], "model_type": kind, "dtype": dtype,
        "vocab_size": settings.vocab, "hidden_size": settings.dim, "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads, "num_key_value_heads": settings.kv_heads,
        "head_dim": settings.head_dim, "intermediate_size": settings.hidden, "hidden_act": "silu",
        "rms_norm_eps": settings.eps, "tie_word_embeddings": settings.tied, "attention_dropout": 0.0,
        "max_position_embeddings": max(context, stretched, int(base.get("max_position_embeddings") or 0)),
        # tools take a family's own otherwise, which another tokenizer may not have
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        **{key: base[key] for key in NEUTRAL if key in base},
        **_rope_keys(rope, settings.head_dim),
    }  # fmt: skip
    if "qkvo" in FAMILIES[kind].biases:
        said["attention_bias"] = settings.bias == "qkvo"
    if FAMILIES[kind].windows != "none":
        said["sliding_window"] = next((w for w in settings.window if w is not None), None)
    if FAMILIES[kind].windows == "layers":
        words = {True: "full_attention", False: "sliding_attention"}
        said["layer_types"] = [words[w is None] for w in settings.window]
    if kind.startswith("qwen"):
        said |= {"use_sliding_window": said["sliding_window"] is not None, "max_window_layers": 0}
    return said


def _family(settings: Settings, preferred: str | None) -> str:
    sizes = {w for w in settings.window if w is not None}
    by_layer = len(set(settings.window)) > 1
    # transformers refuses a Llama whose heads do not divide its width
    odd = settings.dim % settings.heads
    for kind in (preferred, *FAMILIES):
        if kind in FAMILIES:
            family = FAMILIES[kind]
            windows = not sizes or family.windows == "layers" or (family.windows == "all" and not by_layer)
            same = settings.bias in family.biases and settings.qk_norm == family.qk_norm
            if same and windows and len(sizes) < 2 and not (odd and kind == "llama"):
                return kind
    raise Unsupported(
        f"no model of {', '.join(FAMILIES)} has bias={settings.bias}, qk_norm={settings.qk_norm} and "
        f"window={_short(settings.window)} together"
    )


def _refuse(config: Mapping[str, Any]) -> None:
    """Unsupported for keys that change what is computed, or that name code."""
    code = config.get("auto_map")
    allowed: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"), "mlp_bias": (False,), "partial_rotary_factor": (1,),
        "quantization_config": (), "is_encoder_decoder": (False,),
    }  # fmt: skip
    if code:
        raise Unsupported(f"config.json: auto_map is {code}, code of its own, which is never run here")
    for key, values in allowed.items():
        value = config.get(key)
        if value is not None and value not in values:
            can = f"it can be {values[0]!r}" if values else "weights must be plain floats"
            raise Unsupported(f"config.json: {key} is {_short(value)}; {can}")


def _whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {key} is {value!r}; it must be a whole number from 1")
    return value


def _windows(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    """The window of each layer, by its `layer_types` or, before there were any, by its number."""
    size = config.get("sliding_window")
    qwen = "use_sliding_window" in family.defaults
    if family.windows == "none" or size is None or (qwen and not config["use_sliding_window"]):
        return (None,) * layers
    size = _whole(config, "sliding_window")
    first = config["max_window_layers"] if qwen else 0
    types = config.get("layer_types") if family.windows == "layers" else None
    if types is None:
        return tuple(size if i >= first else None for i in range(layers))
    if len(types) != layers or {*types} - {"full_attention", "sliding_attention"}:
        raise Unsupported(
            f"config.json: layer_types is {_short(types)}; it can be full_attention or sliding_attention, "
            f"for each of {layers} layers"
        )
    return tuple(size if word == "sliding_attention" else None for word in types)


def _rope(config: Mapping[str, Any], length: int | None) -> Rope:
    """RoPE as transformers has it; `rope_scaling` is what `rope_parameters` was called before."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(said, Mapping) or any(isinstance(value, Mapping) for value in said.values()):
        raise Unsupported(f"config.json: rope_parameters is {_short(said)}; one for all layers is supported")
    said = {key: value for key, value in said.items() if value is not None}
    kind = said.get("rope_type", said.get("type", "default"))
    if said.get("partial_rotary_factor", 1) != 1:
        part = said["partial_rotary_factor"]
        raise Unsupported(f"config.json: partial_rotary_factor is {part}; it can be 1")
    rope = Rope(float(said.get("rope_theta", config.get("rope_theta") or 10_000.0)))
    most = int(config.get("max_position_embeddings") or 0)
    key = "original_max_position_embeddings"
    original = config.get(key, said.get(key, most))
    factor = said.get("factor", most / original if original else 1.0)
    if kind == "default":
        return rope
    if kind == "linear":
        return replace(rope, scaling="linear", factor=float(factor))
    if kind == "llama3":
        low, high = _number(said, "low_freq_factor"), _number(said, "high_freq_factor")
        return replace(
            rope, scaling="llama3", factor=float(factor), original=int(original), low=low, high=high
        )
    if kind == "yarn":
        return replace(
            rope, scaling="yarn", factor=float(factor), original=int(original),
            beta_fast=float(said.get("beta_fast") or 32), beta_slow=float(said.get("beta_slow") or 1),
            truncate=bool(said.get("truncate", True)), attention_factor=_yarn_factor(said, float(factor)),
        )  # fmt: skip
    if kind not in ("dynamic", "longrope"):
        raise Unsupported(
            f"config.json: rope_type is {kind!r}; it can be default, linear, dynamic, yarn, llama3, longrope"
        )
    if length is None:
        raise ValueError(
            f"config.json: rope_type is {kind!r}, which depends on a sequence's length: give context=..."
        )
    if kind == "dynamic":
        grown = factor * max(length, most) / most - (factor - 1)
        return replace(rope, scaling="ntk", factor=float(grown)) if grown > 1 else rope
    warm = 1.0 if factor <= 1 else sqrt(1 + log(factor) / log(original))
    which = "long_factor" if length > original else "short_factor"
    if not isinstance(said.get(which), list):
        raise ValueError(
            f"config.json: {which} is {_short(said.get(which))}; longrope needs a list of numbers"
        )
    warm = float(said.get("attention_factor", warm))
    return replace(
        rope, scaling="longrope", factors=tuple(said[which]), attention_factor=warm, original=int(original)
    )


def _number(said: Mapping[str, Any], key: str) -> float:
    if not isinstance(said.get(key), int | float):
        raise ValueError(f"config.json: {key} is {said.get(key)!r}; its rope_type needs a number")
    return float(said[key])


def _yarn_factor(said: Mapping[str, Any], factor: float) -> float | None:
    """YaRN's factor where a config changes it (DeepSeek's mscale), else None."""
    if "attention_factor" in said:
        return float(said["attention_factor"])
    if not (said.get("mscale") and said.get("mscale_all_dim")):
        return None
    above, below = (0.1 * said[key] * log(factor) + 1.0 for key in ("mscale", "mscale_all_dim"))
    return float(above / below)


def _rope_keys(rope: Rope, head_dim: int) -> dict[str, Any]:
    """theta and scaling in the keys that every version of transformers reads."""
    theta, said = rope.theta, dict[str, Any]()
    match rope.scaling:
        case "ntk":
            theta *= rope.factor ** (head_dim / (head_dim - 2))
        case "linear":
            said = {"rope_type": "linear", "factor": rope.factor}
        case "yarn":
            said = {
                "rope_type": "yarn", "factor": rope.factor, "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow, "truncate": rope.truncate, "attention_factor": rope.warmth,
            }  # fmt: skip
        case "llama3":
            said = {
                "rope_type": "llama3", "factor": rope.factor, "low_freq_factor": rope.low,
                "high_freq_factor": rope.high,
            }  # fmt: skip
        case "longrope":
            factors = list(rope.factors or ())
            said = {
                "rope_type": "longrope", "factor": rope.factor, "long_factor": factors,
                "short_factor": factors, "attention_factor": rope.warmth,
            }  # fmt: skip
    if rope.attention_factor is not None and "attention_factor" not in said:
        raise Unsupported(
            f"rope.attention_factor is {rope.attention_factor}; with rope.scaling={rope.scaling} "
            f"config.json has no place for it"
        )
    if said and rope.original:
        said["original_max_position_embeddings"] = rope.original
    return {"rope_theta": theta, "rope_scaling": said or None}


def _short(value: Any) -> str:
    """A value on one line, long ones cut."""
    text = repr(list(value)) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
