"""The configuration as it must be: typed root keys, groups checked against the constructors that they
name.
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

PACKAGE = "longspan."
OPTIMIZERS = (
    "torch.optim.AdamW",
    "torch.optim.Adam",
    "torch.optim.SGD",
    "torch.optim.Adafactor",
    "torch.optim.Muon",
)
SECRET = re.compile(r"(^|_)(key|token|secret|password|passwd|credential)s?($|_)", re.IGNORECASE)


@dataclass
class Run:
    """root: folder of all runs. name: of this one, null makes one from the experiment and the time. dir: the
    run's folder.
    """

    root: str = "runs"
    name: str | None = None
    dir: str | None = None


@dataclass
class Train:
    """steps: optimizer steps. seconds: stop (and save) after that much training time. clip: greatest gradient
    norm, 0 is off.

    micro_batch: sequences a dp rank takes at once; accumulate: micro batches a step. precision: float32, or
    bfloat16 autocast. ema: decay of an average of the weights, which is what is evaluated; 0 keeps none.
    compile: each block runs as torch.compile makes it.
    """

    steps: int = MISSING
    micro_batch: int = 1
    accumulate: int = 1
    clip: float = 1.0
    precision: str = "float32"
    seconds: float | None = None
    log_every: int = 1
    ema: float = 0.0
    compile: bool = False


@dataclass
class Checkpoint:
    """every: steps between checkpoints (0: only the last). keep: how many stay. permanent: those of every so
    many steps stay as well, for good (0: none). asynchronous: write beside training.
    """

    every: int = 100
    keep: int = 3
    permanent: int = 0
    asynchronous: bool = True


@dataclass
class Eval:
    """every: steps between evaluations on held-out data (0: only at the end). samples: sequences of each.

    final: sequences of the last one; null takes all, 0 skips it.
    """

    every: int = 0
    samples: int = 8
    final: int | None = 32


@dataclass
class Trace:
    """first: the step with which torch's profiler begins on every rank (null: never). steps: how many it
    records. memory: what is allocated, too.
    """

    first: int | None = None
    steps: int = 2
    memory: bool = False


@dataclass
class Init:
    """path: a folder of Hugging Face weights to start from (null: random ones). new_rope: the model's rope is
    meant to differ from theirs, to stretch the context.
    """

    path: str | None = None
    new_rope: bool = False


@dataclass
class Root:
    """The root keys. A group (Any here) is typed by the constructor that its `_target_` names."""

    experiment_name: str = "custom"
    seed: int = 0
    resume: str = "auto"
    device: str = "auto"
    timeout_s: float = 600.0
    heartbeat_s: float = 5.0
    run: Run = field(default_factory=Run)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)
    trace: Trace = field(default_factory=Trace)
    report: bool = True
    init: Init = field(default_factory=Init)
    guard: Any = None
    lora: Any = None
    memory: Any = MISSING
    model: Any = MISSING
    mask: Any = MISSING
    parallel: Any = MISSING
    engine: Any = MISSING
    data: Any = MISSING
    objective: Any = MISSING
    optim: Any = MISSING
    track: Any = MISSING


# What a config must build, beside the nodes that are there.
BUILT = (
    *("model", "mask", "parallel.mesh", "parallel.layout", "engine", "data", "objective", "optim", "memory"),
    "track",
)


class ConfigError(ValueError):
    """A setting that cannot be: the message names it, its value and what would work."""


def typed(cfg: DictConfig, schema: type[Any] = Root) -> DictConfig:
    """The config merged into its schema with every group checked: unknown keys, targets, types. Raises
    ConfigError.
    """
    _check_keys(cfg, schema)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), cfg)
        assert isinstance(merged, DictConfig)
        # not OmegaConf.resolve, after which an escaped ${ would be taken for an interpolation
        OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from None
    missing = sorted(OmegaConf.missing_keys(merged) | OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: give one with {missing[0]}=...")
    for path in BUILT if issubclass(schema, Root) else ():
        node = OmegaConf.select(merged, path)
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise ConfigError(f"{path} is {node!r}, which builds nothing: it needs a _target_, as in conf/")
    for key in merged:
        _check_node(merged[key], str(key))
    OmegaConf.set_readonly(merged, True)
    return merged


def _check_keys(cfg: DictConfig, schema: type[Any]) -> None:
    """The keys of the root and of its sections. Those of a group are its constructor's."""
    sections = schema.__dataclass_fields__
    for key in cfg:
        if str(key) not in sections:
            raise ConfigError(f"unknown key '{key!s}'{suggestion(str(key), sections)}")
    for name, section in sections.items():
        kind = section.default_factory
        if not (isinstance(kind, type) and is_dataclass(kind)) or name not in cfg:
            continue
        if not isinstance(cfg[name], DictConfig):
            raise ConfigError(f"{name} is {cfg[name]!r}; it holds {', '.join(kind.__dataclass_fields__)}")
        for key in cfg[name]:
            if str(key) not in kind.__dataclass_fields__:
                nearest = suggestion(str(key), kind.__dataclass_fields__, f"{name}.")
                raise ConfigError(f"unknown key '{name}.{key!s}'{nearest}")


def suggestion(word: str, known: Iterable[str], before: str = "") -> str:
    """'; did you mean ...?' with the nearest known word after `before`, or the list of them."""
    words = sorted(k for k in known if not k.startswith("_"))
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean '{before}{close[0]}'?" if close else f"; known here: {', '.join(words)}"


def _check_node(node: Any, path: str) -> None:
    if isinstance(node, ListConfig):
        for i, item in enumerate(node):
            _check_node(item, f"{path}[{i}]")
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        _check_call(node, path)
    for key in node:
        _check_node(node[key], f"{path}.{key!s}")


def _found(target: Any, path: str) -> type:
    """The class that a `_target_` names. Only classes of this package and a few optimizers: it is code."""
    named = f"{path}._target_ is {target!r}"
    if not isinstance(target, str) or not (target.startswith(PACKAGE) or target in OPTIMIZERS):
        raise ConfigError(f"{named}: a config may build {PACKAGE}* or {', '.join(OPTIMIZERS)} only")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{named}, which cannot be imported: {error}") from None
    # what a module of ours has imported, such as os, is not ours to hand out
    if not inspect.isclass(found) or (target not in OPTIMIZERS and found.__module__ != module):
        raise ConfigError(f"{named}, which is no class of {module}")
    return found


def _check_call(node: DictConfig, path: str) -> None:
    call: Callable[..., Any] = _found(node["_target_"], path).__init__  # type: ignore[misc]
    parameters = {n: p for n, p in inspect.signature(call).parameters.items() if n != "self"}
    hints = get_type_hints(call)
    for key, value in node.items():
        if str(key) in ("_target_", "_partial_"):
            continue
        if str(key) in ("_args_", "_recursive_", "_convert_") or key not in parameters:
            raise ConfigError(f"unknown key '{path}.{key!s}'{suggestion(str(key), parameters, f'{path}.')}")
        if key in hints and not _fits(value, hints[str(key)]):
            raise ConfigError(f"{path}.{key!s} is {value!r}; it must be {_words(hints[str(key)])}")
    if not node.get("_partial_", False):
        for name, p in parameters.items():
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in node:
                raise ConfigError(f"{path}.{name} has no value: give one with {path}.{name}=...")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain config value can be what the annotation says; objects that `_target_` builds are
    checked elsewhere.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, a) for a in args)
    if origin is Literal:
        return value in args
    if isinstance(value, DictConfig):
        return hint not in (int, float, str, bool, NoneType)
    if isinstance(value, ListConfig):
        if origin not in (list, tuple) and hint not in (list, tuple, Any):
            return origin is not None and hint not in (int, float, str, bool)
        inner = [a for a in args if a is not Ellipsis]
        fixed = origin is tuple and Ellipsis not in args and len(inner) == len(value)
        return all(_fits(v, inner[i] if fixed else inner[0]) for i, v in enumerate(value)) if inner else True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (int, str, bool, NoneType):
        return type(value) is hint
    return hint is Any


def _words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(a) for a in args)
    if origin is Literal:
        return " or ".join(map(repr, args))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    return names.get(hint, str(hint).replace("typing.", ""))


def redacted(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain data, with the values of keys that look like secrets replaced."""
    plainly = (int, float, NoneType)

    def clean(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                k: "<redacted>" if SECRET.search(str(k)) and not isinstance(v, plainly) else clean(v)
                for k, v in node.items()
            }
        return [clean(x) for x in node] if isinstance(node, list) else node

    plain = clean(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(plain, dict)
    return plain


def redacted_argument(argument: str) -> str:
    """A word of the command line, without the value of a key that looks like a secret."""
    key, equals, _ = argument.partition("=")
    secret = equals and any(SECRET.search(part) for part in key.lstrip("+~").split("."))
    return f"{key}=<redacted>" if secret else argument


def made(node: Any) -> Any:
    """What a config node builds. What its constructor raises comes as it was raised, without Hydra's
    frame.
    """
    try:
        return instantiate(node)
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None


def hint(error: Exception, overrides: list[str], root: str) -> str:
    """Hydra's complaint in one or two lines, with the nearest key or choice that exists."""
    text = " ".join(str(error).split())
    if "hydra/launcher/submitit" in text:
        return "hydra/launcher: hydra-submitit-launcher is not installed: pip install 'longspan[slurm]'"
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read '{error.override}': write key=value, and quotes around a value like \"a,b = [c]\""
        )
    if found := re.search(
        r"Could not find '(.+?)/([^/']+)'.*Available options in '.+?': (.*?)( Config |$)", text
    ):
        group, choice, there = found.group(1), found.group(2), found.group(3).split()
        return f"{group}={choice}: there is no such choice{suggestion(choice, there, f'{group}=')}"
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown(found.group(1), overrides, root) or f"unknown key '{found.group(1)}'"
    return text


def _unknown(path: str, overrides: list[str], root: str) -> str | None:
    """The complaint about an override of a key that is not there; None if the rest cannot be composed
    either.
    """
    parent, _, last = path.rpartition(".")
    parser = OverridesParser.create()
    words = [o for o in overrides if not o.startswith("-") and o.split("=")[0].lstrip("+~") != path]
    try:
        # what a sweep would try one by one cannot be composed, and changes no key
        rest = [o for o in words if not parser.parse_override(o).is_sweep_override()]
        with initialize_config_module("longspan.conf", version_base="1.3"):
            whole = compose(root, overrides=rest)
        there = OmegaConf.select(whole, parent) if parent else whole
    except (HydraException, OmegaConfBaseException):
        return None
    if not isinstance(there, DictConfig):
        return f"unknown key '{path}': '{parent}' has no keys below it"
    before = f"{parent}." if parent else ""
    return f"unknown key '{path}'{suggestion(last, {str(k) for k in there}, before)}"
