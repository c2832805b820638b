"""Hugging Face folders: equal logits both ways, refusals, and a run that starts from one and goes back."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import jobs
from longspan.kernels.mask import Causal, Unsupported
from longspan.kernels.patterns import Shifted
from longspan.models.gpt import GPT
from longspan.models.lora import merged_weights
from longspan.models.rope import Rope
from longspan.parallel.placement import contiguous
from longspan.parallel.single import Single
from longspan.train.batch import bind
from longspan.train.config import ConfigError, Init, made, typed
from longspan.train.convert import checked, convert
from longspan.train.huggingface.config import Settings, config_of
from longspan.train.huggingface.folder import Folder, Weight, name_of, write
from longspan.train.huggingface.start import start
from world import Worlds

LENGTH, VOCAB = 50, 300
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "initializer_range": 0.2,
}  # fmt: skip
ORIGINAL = {"original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0], "factor": 2.0,
    **ORIGINAL,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 2.0, "beta_fast": 4.0, **ORIGINAL}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
TYPES = ["sliding_attention", "full_attention"]
# model_type and settings
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama bias": ("llama", {"attention_bias": True, "rope_parameters": LINEAR}),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "llama longrope": ("llama", {"rope_parameters": LONG}),
    "qwen2": ("qwen2", {
        "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "rope_parameters": YARN,
    }),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 9, "head_dim": 10}),
    "ministral": ("ministral", {"sliding_window": 9, "head_dim": 8, "layer_types": TYPES}),
}  # fmt: skip
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")


def theirs(kind: str, **settings: Any) -> Any:
    """A random model of transformers whose norms and biases matter too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**SMALL, **settings})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.5, 1.5)
    return model


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids() -> Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """[2, LENGTH, VOCAB], of either kind of model."""
    if not isinstance(model, GPT):
        found: Tensor = model(ids()).logits
        return found
    attend = bind(Single(), contiguous(LENGTH, 1))
    out: Tensor = model.head(model(ids(), torch.arange(LENGTH), attend))
    return out


def opened(folder: Path) -> GPT:
    found = Folder(folder)
    model = Settings.of_config(found.config, LENGTH).model()
    found.load(model)
    return model


def conversion(**settings: Any) -> DictConfig:
    with initialize_config_module("longspan.conf", version_base="1.3"):
        cfg = compose("convert", overrides=[f"{key}={value}" for key, value in settings.items()])
    return checked(cfg)


def written(model: GPT, folder: Path, **settings: Any) -> Path:
    config = config_of(Settings.of_model(model), context=LENGTH, dtype="float32")
    weights = [
        Weight(name_of(own), tuple(x.shape), torch.float32, x.clone)
        for own, x in merged_weights(model).items()
    ]
    write(folder, config, weights, **{"shard_gb": 1.0, "beside": {}, "texts": {}, **settings})
    return folder


@needs_transformers
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_and_back(name: str, tmp_path: Path) -> None:
    kind, settings = MODELS[name]
    model = theirs(kind, **settings)
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert (tmp_path / "a" / "model.safetensors.index.json").is_file()
    want, ours = logits(model), opened(tmp_path / "a")
    assert want.std() > 0.3
    assert (logits(ours) - want).abs().max() < 1e-5
    back = written(ours, tmp_path / "b", shard_gb=4e-5)
    assert len(list(back.glob("*.safetensors"))) > 2
    again = loaded(back)
    assert (logits(again) - want).abs().max() < 1e-5
    # transformers 5 reads what it is from our older keys; nothing of it is lost on the way
    assert again.config.model_type == kind and opened(back).windows == ours.windows


def factors_of(kind: str, length: int, **said: Any) -> tuple[Tensor, float, Rope]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**{**SMALL, "head_dim": 16, "max_position_embeddings": 64},
                         rope_parameters={"rope_type": kind, "rope_theta": 5e4, **said})  # fmt: skip
    found, warm = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    return found, warm, Settings.of_config(config.to_dict(), length).rope


@needs_transformers
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("linear", {"factor": 4.0}),
        ("dynamic", {"factor": 4.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 16}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 16, "truncate": False,
                  "mscale": 1.0, "mscale_all_dim": 0.5}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.25}),
        ("llama3", {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 48}),
        ("longrope", {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)],
                      "original_max_position_embeddings": 16}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [12, 200])
def test_rope_scalings_have_the_values_of_transformers(kind: str, said: dict[str, Any], length: int) -> None:
    want, warm, rope = factors_of(kind, length, **said)
    assert torch.allclose(rope.frequencies(16).float(), want, rtol=2e-6, atol=0)
    assert rope.warmth == pytest.approx(warm, rel=1e-6)


def test_ntk_stretches_the_longest_wavelength_and_keeps_the_shortest() -> None:
    plain, got = Rope().frequencies(64), Rope(scaling="ntk", factor=8.0).frequencies(64)
    assert got[0] == plain[0] and got[-1] == pytest.approx(float(plain[-1]) / 8, rel=1e-12)
    # Peng et al. 2023, definition 1: a base of theta s^(d / (d - 2))
    assert torch.allclose(got, Rope(1e4 * 8 ** (64 / 62)).frequencies(64), rtol=1e-12)


PLAIN = {
    "model_type": "llama", **SMALL, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2'; it can be llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it can be 'silu'"),
        ({"mlp_bias": True}, "mlp_bias is True; it can be False"),
        ({"auto_map": {"AutoModel": "m.M"}}, "auto_map is {'AutoModel': 'm.M'}, code of its own"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; weights must be plain"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it can be 1"),
        ({"hidden_size": None}, "hidden_size is None; it must be a whole number from 1"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type is 'su'; it can be default, linear"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "give context=..."),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is None"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one for all layers is supported"),
        ({"model_type": "ministral", "layer_types": ["chunked_attention"] * 2, "sliding_window": 3},
         "layer_types is ['chunked_attention', 'chunked_attention']; it can be"),
    ],
)  # fmt: skip
def test_a_config_that_means_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    assert Settings.of_config(PLAIN | {"attention_dropout": 0.1, "pretraining_tp": 2}).dim == 32
    with pytest.raises(ValueError, match="config.json: ") as caught:
        Settings.of_config(PLAIN | change)
    assert message in str(caught.value)


def test_what_no_family_says_is_refused() -> None:
    settings = {"bias": "qkv", "qk_norm": True}
    model = GPT(VOCAB, 32, 2, 4, 48, **settings)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="has bias=qkv, qk_norm=True and window="):
        config_of(Settings.of_model(model), context=8, dtype="float32")


def folder_of(path: Path, **settings: Any) -> Path:
    torch.manual_seed(0)
    given = {"kv_heads": 2, "eps": 1e-6, "rope": Rope(), "init_std": 0.2, **settings}
    return written(GPT(VOCAB, 32, 2, 4, 48, **given), path)


def renamed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the header of the only weight file."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


NORM = "model.norm.weight"
DAMAGE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda h: h[NORM].update(shape=[4, 8]), "model.norm.weight is [4, 8], not [32]"),
    (lambda h: h.pop(NORM), "model.norm.weight is missing"),
    (lambda h: h.update({"model.x": h.pop(NORM)}), "model.norm.weight is missing; model.x is not expected"),
    (lambda h: h[NORM].update(dtype="I32"), "model.norm.weight is of torch.int32"),
    (lambda h: h[NORM].update(dtype="F8_E4M3", shape=[]), "cannot be read as safetensors: 'F8_E4M3'"),
    (lambda h: h[NORM].update(shape=[31]), "model.norm.weight is cut short or of another size"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "a")
    renamed(folder, change)
    with pytest.raises(ValueError, match="does not fit its config|cannot be read") as caught:
        opened(folder)
    assert message in str(caught.value)


def test_pickles_and_files_elsewhere_are_not_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="pytorch_model.bin is a pickle, which may run code and is not"
    ):
        opened(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: "../model.safetensors"}}))
    with pytest.raises(ValueError, match="holds no weight_map of safetensors files in its folder"):
        opened(folder)
    index.write_text(json.dumps({"weight_map": {NORM: "model-1.safetensors"}}))
    with pytest.raises(
        FileNotFoundError, match="lacks model-1.safetensors, which its model.safetensors.index"
    ):
        opened(folder)


@pytest.mark.parametrize(
    ("settings", "init", "message"),
    [
        ({"hidden": 64}, {}, "model.hidden is 64, but init.path=.* has 48: python -m longspan.train.convert"),
        (
            {"tied": False, "eps": 1e-5},
            {},
            "model.tied is False, .* has True; model.eps is 1e-05, .* has 1e-06",
        ),
        ({"window": 5}, {}, r"model.window is \[5, 5\], but init.path=.* has \[None, None\]"),
        ({"predecessor": True}, {}, "holds no predecessor mix: set model.predecessor=false"),
        ({"rope": Rope(5e5)}, {}, "model.rope is .*500000.* set model.rope.* alike, or init.new_rope=true"),
        ({}, {"path": None, "new_rope": True}, "init.new_rope is true, but init.path is null"),
    ],
)
def test_a_start_from_another_model_is_refused(
    settings: dict[str, Any], init: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "a")
    model = GPT(VOCAB, 32, 2, 4, **{"hidden": 48, "kv_heads": 2, "eps": 1e-6, **settings})
    with pytest.raises(ConfigError, match=message):
        start(model, Init(**{"path": str(folder), **init}), LENGTH)


def test_a_rope_may_be_stretched_on_purpose_and_the_mask_sparse(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    rope = Rope(scaling="yarn", factor=4.0, original=LENGTH)
    sparse = Shifted(8, (0, 4)) & Causal()
    model = GPT(VOCAB, 32, 2, 4, 48, kv_heads=2, eps=1e-6, rope=rope, mask=sparse)
    start(model, Init(str(folder), new_rope=True), LENGTH)
    assert all(
        torch.equal(*both) for both in zip(model.parameters(), opened(folder).parameters(), strict=True)
    )


def test_a_folder_is_converted_with_the_model_that_starts_from_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", window=[None, 5], qk_norm=True)
    (folder / "tokenizer.json").write_text("{}")
    told: list[str] = []
    to = tmp_path / "half-size"
    assert convert(conversion(**{"from": folder, "to": to, "dtype": "bfloat16"}), told.append) == 0
    assert "qwen3, " in told[0] and "tokenizer.json" in told[0] and "model=half_size" in told[1]
    assert Folder(to).dtype(NORM) == torch.bfloat16 and Folder(to).config["dtype"] == "bfloat16"
    with initialize_config_module("longspan.conf", version_base="1.3"):
        search = f"hydra.searchpath=[file://{to}]"
        cfg = typed(compose("train", overrides=[search, "model=half_size", "track=none"]))
    model = made(cfg.model)(mask=made(cfg.mask))
    start(model, Init(str(to)), LENGTH)
    assert (logits(model) - logits(opened(folder))).abs().max() < 0.1
    with pytest.raises(FileExistsError, match="is there already; give a new folder"):
        convert(conversion(**{"from": folder, "to": to}), told.append)
    with pytest.raises(FileNotFoundError, match="is neither a folder of Hugging Face weights"):
        convert(conversion(**{"from": tmp_path, "to": tmp_path / "b"}), told.append)
    for wrong, message in (
        ({"to": "x"}, "from has no value"),
        ({"from": "x", "to": "y", "dtype": "int8"}, "dtype is"),
    ):
        with pytest.raises(ConfigError, match=message):
            conversion(**wrong)


def corpus(folder: Path) -> tuple[str, ...]:
    """Settings of a small corpus with a tokenizer of its own, as a user has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    words = [f"w{i}" for i in range(40)]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["[UNK]", *words])}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "texts").mkdir()
    draw = torch.Generator().manual_seed(0)
    for i in range(12):
        text = " ".join(words[int(j)] for j in torch.randint(40, (200,), generator=draw))
        (folder / "texts" / f"{i}.txt").write_text(text)
    return (
        "data=text", f"data.path={folder / 'texts'}", f"data.tokenizer={folder / 'tokenizer.json'}",
        "data.context=64", "data.held_out=0.2", f"data.cache={folder / 'cache'}",
    )  # fmt: skip


@needs_transformers
def test_a_run_starts_from_a_folder_and_goes_back_to_one(world: Worlds, tmp_path: Path) -> None:
    start_from, run, to = tmp_path / "start", tmp_path / "run", tmp_path / "end"
    theirs("llama", tie_word_embeddings=True, max_position_embeddings=128, bos_token_id=7).save_pretrained(
        start_from
    )
    small = ("model.qk_norm=false", "model.hidden=48", "model.eps=1e-6", f"model.vocab={VOCAB}")
    words = (
        *corpus(tmp_path / "data"), *small, f"init.path={start_from}", "train.steps=2", "optim.lr=0.01",
        f"run.dir={run}", "eval.final=0", "lora.rank=3", "parallel=ring",
    )  # fmt: skip
    assert world(2)(jobs.whole, jobs.config(*words)) == [0, 0]
    told: list[str] = []
    assert convert(conversion(**{"from": run, "to": to}), told.append) == 0
    assert told[0].endswith(", step 2") and "tokenizer.json, tokenizer_config.json" in told[1]
    model = loaded(to)
    moved = logits(model) - logits(loaded(start_from))
    assert moved.abs().max() > 0.01
    assert (logits(opened(to)) - logits(model)).abs().max() < 1e-5
    assert (model.config.bos_token_id, model.config.max_position_embeddings) == (7, 128)
    # what LoRA leaves as it is, and what it adds to
    before, after = loaded(start_from).state_dict(), model.state_dict()
    same = {name.split(".", 3)[-1] for name in before if torch.equal(before[name], after[name])}
    assert same == {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(to)("w3 w0")["input_ids"] == [4, 1]


@pytest.mark.parametrize(
    "name", ["llama8b_1m_8gpu", "llama8b_128k_s2", "llama8b_star", "llama70b_512k_64gpu"]
)
def test_cluster_experiments_can_be_built(name: str) -> None:
    with initialize_config_module("longspan.conf", version_base="1.3"):
        cfg = typed(compose("train", overrides=[f"experiment={name}"]))
    with torch.device("meta"):
        model = made(cfg.model)(mask=made(cfg.mask))
    made(cfg.memory).apply(model)
    world = 64 if "64gpu" in name else 8
    degrees = made(cfg.parallel.mesh).degrees(world, 8)
    assert degrees["ring"] * degrees["head"] == world
    assert OmegaConf.select(cfg, "parallel.layout._target_") and cfg.data.context >= 131072
