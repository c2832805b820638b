"""The house rules: who may import whom, where things stand, and that a breach of each rule would be seen."""

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "parallel", "models", "train", "conf", "launch")
BESIDE = ("tests", "benchmarks", "docs")
# What a room may import from the others; models may name one type of parallel's besides.
ARROWS = {
    "kernels": {"kernels"},
    "parallel": {"parallel", "kernels"},
    "models": {"models", "kernels"},
    "train": {"train", "models", "parallel", "kernels"},
    "conf": set[str](),
    "launch": {"launch", "train", "models", "parallel", "kernels"},
}
SEAM = ("parallel.layout", "parallel.layout.Layout")
# What a room may import from elsewhere, besides the standard library; train and launch may import anything.
GUESTS = {"kernels": {"torch", "triton"}, "parallel": {"torch"}, "models": {"torch"}, "conf": set[str]()}
# And what it may load by name where it is installed, in a function and never at import.
LOADED = {"kernels": {"liger_kernel"}}
ENTRIES = {
    f"train/{name}.py"
    for name in ("__main__", "cli", "evaluate", "sample", "draw", "encode", "convert", "tokenize")
}
# A machine with a GPU may have no more than this, and collects the files that hold GPU tests.
GPU_GUESTS = {"torch", "triton", "pytest", "numpy", "matplotlib", "world", "compositions", "interpreter"}
GPU_ROOMS = ("longspan.kernels", "longspan.parallel", "longspan.models")
# Not written out, since `make gpu-test` looks for files that hold it.
GPU_MARK = ".".join(("mark", "gpu"))
LONGEST = 400

Rule = Callable[[Path], Iterator[str]]


def modules(tree: Path) -> Iterator[tuple[str, ast.Module]]:
    """Every file of the package by its path below `tree`, parsed."""
    for room in ROOMS:
        for path in sorted((tree / room).rglob("*.py")):
            yield path.relative_to(tree).as_posix(), syntax(path.read_text())


@cache
def syntax(source: str) -> ast.Module:
    """Kept, since every rule reads the whole tree."""
    return ast.parse(source)


def dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, module: ast.Module) -> Iterator[tuple[str, bool]]:
    """Each name that is imported, in full, and whether it comes from inside the package."""
    here = dotted(path).split(".")
    package = here if path.endswith("/__init__.py") else here[:-1]
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*up, *(node.module or "").split(".")]).strip(".")
            yield from ((f"{base}.{alias.name}".strip("."), node.level > 0) for alias in node.names)


def loaded(module: ast.Module) -> Iterator[str]:
    """Each name that is given to import_module, which needs no import statement."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield ast.unparse(node.args[0]).strip("'")


def folders(tree: Path) -> Iterator[str]:
    """The rooms stand at the root, with nothing else that holds Python beside what belongs there."""
    found = {p.name for p in tree.iterdir() if p.is_dir() and p.name[0] != "." and any(p.rglob("*.py"))}
    yield from (f"{name}/ is missing" for name in ROOMS if not any((tree / name).glob("*.*")))
    yield from (f"{name}/ is no room" for name in sorted(found - {*ROOMS, *BESIDE, "build"}))
    yield from (f"{p.name} stands at the root" for p in tree.glob("*.py") if p.name != "__init__.py")


def no_init(tree: Path) -> Iterator[str]:
    """Code folders have no `__init__.py`: `import train` must find nothing anywhere."""
    found = (path for path, _ in modules(tree) if path.endswith("__init__.py"))
    yield from (f"{path} should not exist" for path in found if path != "conf/__init__.py")


def packages(tree: Path) -> Iterator[str]:
    """What pyproject.toml packs is what holds Python files."""
    listed = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    held = {f"longspan.{path.rpartition('/')[0].replace('/', '.')}" for path, _ in modules(tree)}
    yield from (f"{name} is not in pyproject.toml" for name in sorted(held - set(listed)))
    yield from (f"{name} is in pyproject.toml only" for name in sorted(set(listed) - held - {"longspan"}))


def arrows(tree: Path) -> Iterator[str]:
    """Rooms import only those they stand on."""
    for path, module in modules(tree):
        room = path.split("/")[0]
        for name, inside in imports(path, module):
            seam = room == "models" and name == SEAM[1]
            if inside and name.split(".")[0] not in ARROWS[room] and not seam:
                yield f"{path} imports {name}"


def relative(tree: Path) -> Iterator[str]:
    """Inside the package imports are relative, so that it works under any name and never finds a stranger."""
    for path, module in modules(tree):
        for name, inside in imports(path, module):
            if not inside and name.split(".")[0] in {"longspan", *ROOMS}:
                yield f"{path} imports {name} absolutely"


def guests(tree: Path) -> Iterator[str]:
    """Only train and launch know more than torch; triton is for kernels, and kernels know no other rank."""
    for path, module in modules(tree):
        room = path.split("/")[0]
        if room not in GUESTS:
            continue
        for name, inside in imports(path, module):
            known = name.split(".")[0] in GUESTS[room] | sys.stdlib_module_names
            if not inside and (not known or (room == "kernels" and name.startswith("torch.distributed"))):
                yield f"{path} imports {name}"
        for name in loaded(module):
            if name.split(".")[0] not in LOADED.get(room, set()):
                yield f"{path} loads {name}"
        uses = {ast.unparse(node) for node in ast.walk(module) if isinstance(node, ast.Attribute)}
        if room == "kernels" and "torch.distributed" in uses:
            yield f"{path} uses torch.distributed"


def circles(tree: Path) -> Iterator[str]:
    """No module imports itself, however far around."""
    parsed = dict(modules(tree))
    names = {dotted(path) for path in parsed}
    graph = {
        dotted(path): {
            target
            for name, inside in imports(path, module)
            for target in (name, name.rpartition(".")[0])
            if inside and target in names
        }
        for path, module in parsed.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield " <- ".join(error.args[1])


def no_utils(tree: Path) -> Iterator[str]:
    """A file is named by its idea."""
    yield from (f"{path} has no idea" for path, _ in modules(tree) if re.search(r"\butils?\b", path))


def environment(tree: Path) -> Iterator[str]:
    """Only entry points read the environment."""
    for path, module in modules(tree):
        if path in ENTRIES or path.startswith("launch/"):
            continue
        seen = {ast.unparse(node) for node in ast.walk(module) if isinstance(node, ast.Attribute)}
        seen |= {name for name, _ in imports(path, module)}
        for name in sorted(seen & {"os.environ", "os.environb", "os.getenv", "os.putenv"}):
            yield f"{path} reads {name}"


def length(tree: Path) -> Iterator[str]:
    """A file is read in a sitting."""
    for path in sorted(chain.from_iterable((tree / top).rglob("*.py") for top in (*ROOMS, *BESIDE))):
        if (lines := len(path.read_text().splitlines())) > LONGEST:
            yield f"{path.relative_to(tree)} has {lines} lines, more than {LONGEST}"


def gpu_tests(tree: Path) -> Iterator[str]:
    """Files with GPU tests can be collected on a machine that has little more than torch."""
    for path in sorted((tree / "tests").glob("test_*.py")):
        if GPU_MARK not in (text := path.read_text()):
            continue
        for name, _ in imports(path.name, syntax(text)):
            known = name.split(".")[0] in GPU_GUESTS | sys.stdlib_module_names
            if not known and not name.startswith(GPU_ROOMS):
                yield f"tests/{path.name} imports {name}"


def bare_tests(tree: Path) -> Iterator[str]:
    """Tests of a module that knows no Hydra can be collected where there is none."""
    modules = {path.stem for room in ("kernels", "parallel", "models") for path in (tree / room).glob("*.py")}
    for path in sorted((tree / "tests").glob("test_*.py")):
        if path.stem.removeprefix("test_") in modules:
            body = syntax(path.read_text()).body
            top: list[ast.stmt] = [x for x in body if isinstance(x, ast.Import | ast.ImportFrom)]
            for name, _ in imports(path.name, ast.Module(top, [])):
                if name.split(".")[0] in {"hydra", "omegaconf"}:
                    yield f"tests/{path.name} imports {name}"


def targets(tree: Path) -> Iterator[str]:
    """Every `_target_` in a yaml is ours, or an optimizer of torch's, and exists."""
    for path in sorted((tree / "conf").rglob("*.yaml")):
        for target in named(OmegaConf.to_container(OmegaConf.load(path))):
            module, _, name = target.rpartition(".")
            if not target.startswith(("longspan.", "torch.optim.")):
                yield f"{path.relative_to(tree)}: {target} is not ours"
                continue
            try:
                found = hasattr(importlib.import_module(module), name)
            except Exception as error:
                yield f"{path.relative_to(tree)}: {target}: {error}"
            else:
                if not found:
                    yield f"{path.relative_to(tree)}: {target} does not exist"


def named(config: object) -> Iterator[str]:
    """The `_target_`s anywhere in a configuration."""
    if isinstance(config, dict):
        yield from (str(value) for key, value in config.items() if key == "_target_")
        yield from chain.from_iterable(named(value) for value in config.values())
    elif isinstance(config, list):
        yield from chain.from_iterable(named(value) for value in config)


def commands(tree: Path) -> Iterator[str]:
    """Every experiment says in its first line, Hydra's own aside, how to run it."""
    for path in sorted((tree / "conf" / "experiment").glob("*.yaml")):
        first = path.read_text().removeprefix("# @package _global_\n").partition("\n")[0]
        if not re.match(rf"#.*\b(longspan|make|torchrun|python)\b.*\bexperiment={path.stem}\b", first):
            yield f"{path.relative_to(tree)} does not begin with its command"


def pages(tree: Path) -> Iterator[str]:
    """A source file that a page names is there."""
    source = re.compile(rf"`((?:{'|'.join((*ROOMS, *BESIDE))})/[\w/]+\.(?:py|yaml|md))`")
    for path in sorted(chain(tree.glob("*.md"), (tree / "docs").rglob("*.md"))):
        for name in source.findall(path.read_text()):
            if not (tree / name).is_file():
                yield f"{path.relative_to(tree)} names {name}"


RULES: list[Rule] = [
    *(folders, no_init, packages, arrows, relative, guests, circles, no_utils, environment, length),
    *(gpu_tests, bare_tests, targets, commands, pages),
]

BREACHES: list[tuple[Rule, dict[str, str], str]] = [
    (folders, {"utilities/x.py": ""}, "utilities/ is no room"),
    (folders, {"kernels/x.py": ""}, "launch/ is missing"),
    (folders, {"setup.py": ""}, "setup.py stands at the root"),
    (no_init, {"train/data/__init__.py": ""}, "train/data/__init__.py should not exist"),
    (packages, {"train/more/x.py": ""}, "longspan.train.more is not in pyproject.toml"),
    (packages, {}, "longspan.train.data is in pyproject.toml only"),
    (arrows, {"kernels/x.py": "from ..parallel.ring import Ring"}, "kernels/x.py imports parallel.ring.Ring"),
    (arrows, {"parallel/x.py": "from ..models import gpt"}, "parallel/x.py imports models.gpt"),
    (arrows, {"models/x.py": "from ..parallel.layout import shard"}, "imports parallel.layout.shard"),
    (arrows, {"train/data/x.py": "from ... import launch"}, "train/data/x.py imports launch"),
    (arrows, {"conf/__init__.py": "from ..train import loop"}, "conf/__init__.py imports train.loop"),
    (relative, {"train/x.py": "import longspan.kernels"}, "train/x.py imports longspan.kernels absolutely"),
    (relative, {"train/x.py": "def f():\n    from kernels import mask"}, "imports kernels.mask absolutely"),
    (guests, {"kernels/x.py": "import torch.distributed as dist"}, "kernels/x.py imports torch.distributed"),
    (guests, {"kernels/x.py": "from torch import distributed"}, "kernels/x.py imports torch.distributed"),
    (guests, {"kernels/x.py": "import torch\ntorch.distributed.barrier()"}, "uses torch.distributed"),
    (guests, {"parallel/x.py": "import triton"}, "parallel/x.py imports triton"),
    (guests, {"models/x.py": "def f():\n    import hydra"}, "models/x.py imports hydra"),
    (guests, {"models/x.py": "importlib.import_module('hydra.core')"}, "models/x.py loads hydra.core"),
    (circles, {"train/a.py": "from . import b", "train/b.py": "from .a import f"}, "train.a <- train.b"),
    (circles, {"train/a.py": "def f():\n    from .a import f"}, "train.a <- train.a"),
    (no_utils, {"kernels/utils.py": ""}, "kernels/utils.py has no idea"),
    (environment, {"parallel/x.py": "import os\nos.environ['RANK']"}, "parallel/x.py reads os.environ"),
    (environment, {"train/x.py": "from os import getenv"}, "train/x.py reads os.getenv"),
    (length, {"tests/x.py": "\n" * (LONGEST + 1)}, "tests/x.py has 401 lines, more than 400"),
    (gpu_tests, {"tests/test_x.py": f"import hydra  # {GPU_MARK}"}, "tests/test_x.py imports hydra"),
    (gpu_tests, {"tests/test_x.py": f"import longspan.train  # {GPU_MARK}"}, "imports longspan.train"),
    (
        bare_tests,
        {"models/x.py": "", "tests/test_x.py": "from hydra import compose"},
        "test_x.py imports hydra",
    ),
    (targets, {"conf/a/x.yaml": "layout: {_target_: os.system}"}, "conf/a/x.yaml: os.system is not ours"),
    (targets, {"conf/x.yaml": "a: [{_target_: longspan.none.X}]"}, "longspan.none.X: No module named"),
    (targets, {"conf/x.yaml": "_target_: longspan.conf.X"}, "conf/x.yaml: longspan.conf.X does not exist"),
    (commands, {"conf/experiment/x.yaml": "# a job\nseed: 1"}, "x.yaml does not begin with its command"),
    (commands, {"conf/experiment/x.yaml": "# make train experiment=y"}, "does not begin with its command"),
    (pages, {"docs/x.md": "as in `kernels/gone.py`"}, "docs/x.md names kernels/gone.py"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps(rule: Rule) -> None:
    found = list(rule(ROOT))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("rule", "files", "told"), BREACHES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_breach_is_seen(rule: Rule, files: dict[str, str], told: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert any(told in line for line in rule(tmp_path)), list(rule(tmp_path))


def test_every_rule_is_breached_once() -> None:
    assert {rule for rule, _, _ in BREACHES} == set(RULES)


def test_models_may_name_the_layout(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x.py").write_text("from ..parallel.layout import Layout")
    assert list(arrows(tmp_path)) == []
