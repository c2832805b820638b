"""Each Triton kernel compiled for real GPUs without one: tensor cores in use, within the registers, spills
and shared memory that docs/kernels.md states.

`python tests/test_compile.py` prints the rows of that table for the Triton at hand.
"""

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from longspan.kernels import flash_backward, flash_forward
from longspan.kernels.grain import grain
from longspan.kernels.heads import PerHead
from longspan.kernels.lower import lower
from longspan.kernels.mask import Causal, Documents, Mask, Window
from longspan.kernels.neighborhood import Neighborhood
from longspan.kernels.options import AttentionOptions
from longspan.kernels.patterns import BlockPermutation, Strided
from longspan.kernels.predicate import constant
from longspan.kernels.span import Span
from longspan.kernels.tile import tiles

Compilers = dict[tuple["Case", str], Future["Use"]]
PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
KERNELS = ("forward", "dq", "dkdv")
MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "window & documents": Window(64) & Documents((0, 100, 130), Causal()),
    "s2": Strided(64, 2, 4) & Causal(),
    "neighbourhood": Neighborhood((4, 8, 8), (3, 5, 5), stride=(1, 2, 2), causal=(True, False, False)),
}
OPTIONS = {
    "softmax": AttentionOptions(),
    "softcap": AttentionOptions(softcap=30.0),
    "sigmoid": AttentionOptions(normalizer="sigmoid", bias=-5.0),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TENSOR_CORE = {8: "mma.sync", 9: "wgmma.mma_async", 10: "tcgen05.mma", 12: "mma.sync"}
# What one block may use, in KiB (CUDA programming guide, compute capabilities).
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


LAUNCH = JITFunction.run


@dataclass(frozen=True)
class Case:
    sm: int
    head_dim: int
    mask: str = "causal"
    dtype: str = "bf16"
    scores: str = "softmax"
    ones: bool = False  # every size is 1

    def __str__(self) -> str:
        return f"sm_{self.sm} | {self.head_dim} | {self.dtype} | {self.mask} | {self.scores}"


@dataclass(frozen=True)
class Use:
    """What a compiled kernel needs; `spilled` in bytes a thread, `shared` in KiB."""

    registers: int
    spilled: int
    shared: int
    ptx: str = ""

    def __str__(self) -> str:
        return f"{self.registers} / {self.spilled} / {self.shared}"


GATE = [
    *(
        Case(sm, head_dim, mask)
        for mask in ("causal", "s2")
        for sm in (90, 80, 100)
        for head_dim in (64, 128)
    ),
    *(Case(90, head_dim, "neighbourhood") for head_dim in (64, 128)),
]
REST = [
    *(Case(90, head_dim, "window & documents") for head_dim in (64, 128)),
    *(Case(sm, 128, mask) for sm in (80, 100) for mask in ("window & documents", "neighbourhood")),
    *(Case(90, head_dim) for head_dim in (16, 72, 80, 96, 192, 256)),
    *(Case(90, 128, scores=scores) for scores in ("softcap", "sigmoid")),
    *(Case(sm, head_dim) for sm in (86, 120) for head_dim in (64, 128, 256)),
    *(Case(sm, 256) for sm in (80, 100)),
    *(Case(90, head_dim, dtype="fp32") for head_dim in (64, 128, 256)),
    *(Case(sm, 64, dtype="fp32") for sm in (80, 100)),
    Case(90, 128, dtype="fp16"),
]
ONES = [Case(80, 8, "window & documents", scores=scores, ones=True) for scores in OPTIONS]


class Device:
    """A GPU that can be compiled for, and nothing else: what Triton asks of a driver before a launch."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(case: Case, kernel: str) -> Use:
    """Launch a kernel where launching only compiles, so that it is built for a launch's own arguments.

    Changes Triton for good: for processes that do nothing else.
    """
    made: list[Any] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kinds: Any) -> None:
        made.append(LAUNCH(self, *args, grid=grid, warmup=True, **kinds))

    JITFunction.run = run
    triton.runtime.driver.set_active(Device(case.sm))
    launch(case, kernel)
    return usage(made[0])


def launch(case: Case, kernel: str) -> None:
    """Through the same door as on a GPU, with tensors of the CPU."""
    batch, n, hq, hk = (1, 1, 1, 1) if case.ones else (1, 256, 8, 2)
    head_dim, dtype = case.head_dim, DTYPES[case.dtype]
    q, dout = (torch.zeros(batch, n, hq, head_dim, dtype=dtype) for _ in range(2))
    k, v = (torch.zeros(batch, n, hk, head_dim, dtype=dtype) for _ in range(2))
    mask, at, options = MASKS[case.mask], (Span(0, n),), OPTIONS[case.scores]
    low = lower(mask, at, at, hk, q.device)
    best = flash_forward.config(head_dim, dtype, divmod(case.sm, 10), grain(mask))
    block = best.forward if kernel == "delta" else getattr(best, kernel)
    size, transpose = (block.queries, block.keys), kernel == "dkdv"
    lists = tiles(mask, at, at, hk, size=size, transpose=transpose, device=q.device)
    lse = torch.zeros(batch, hq, n) if options.normalizer == "softmax" else None
    if kernel == "delta":
        flash_backward.row_delta(dout.float(), q, torch.zeros(batch, hq, n), torch.zeros(batch, hq, n))
        return
    rows = flash_backward.prepared(dout, lse, lse, dtype)
    if kernel == "forward":
        flash_forward.launch(q, k, v, low=low, lists=lists, options=options, block=block)
    elif kernel == "dq":
        flash_backward.launch_dq(rows, q, k, v, low=low, lists=lists, options=options, block=block)
    else:
        flash_backward.launch_dkdv(rows, q, k, v, low=low, lists=lists, options=options, block=block)


def usage(kernel: Any) -> Use:
    """From the compiled kernel, by the disassembler that comes with Triton."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    spilled = int(found["STACK"]) + int(found["LOCAL"])
    return Use(int(found["REG"]), spilled, -(-kernel.metadata.shared // 1024), kernel.asm["ptx"])


def version() -> str:
    """The Triton that compiled the table of docs/kernels.md."""
    found = re.search(r"compiled by Triton (\d+\.\d+\.\d+)", PAGE.read_text())
    assert found, f"{PAGE} does not say what compiled its table"
    return found[1]


def stated() -> dict[str, dict[str, Use]]:
    """The table of docs/kernels.md: case -> kernel -> the most it may use."""
    table = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.match(r"sm_\d+$", cells[0]):
            numbers = ([int(n) for n in cell.split(" / ")] for cell in cells[5:])
            uses = (Use(registers, spilled, shared) for registers, spilled, shared in numbers)
            table[" | ".join(cells[:5])] = dict(zip(KERNELS, uses, strict=True))
    return table


@pytest.fixture(scope="module")
def compilers(request: pytest.FixtureRequest) -> Iterator[Compilers]:
    """All that this session asks for, under way in two processes."""
    here = [item for item in request.session.items if item.path == Path(__file__)]
    calls = [getattr(item, "callspec", None) for item in here]
    asked = [call.params for call in calls if call and "case" in call.params]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield {(a["case"], a["kernel"]): pool.submit(compiled, a["case"], a["kernel"]) for a in asked}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "case", [*GATE, *(pytest.param(case, marks=pytest.mark.slow) for case in REST)], ids=str
)
def test_kernels_compile_within_what_the_page_states(case: Case, kernel: str, compilers: Compilers) -> None:
    use, most = compilers[case, kernel].result(), stated()[str(case)][kernel]
    # float32 tiles are too small for Hopper's and Blackwell's own instructions
    wanted = [TENSOR_CORE[case.sm // 10], *(["mma.sync"] if case.dtype == "fp32" else [])]
    assert any(word in use.ptx for word in wanted), f"no {' or '.join(wanted)}"
    # 16 bytes at once, where a tile has as many for each thread; tiles of float32 may come without cp.async
    wide = r"cp\.async\.cg\.shared\.global[^;]+, (0x10|16)\b"
    wide += r"|ld\.global\S*\.v4\.b32" if case.dtype == "fp32" else ""
    assert re.search(wide, use.ptx) or case.head_dim < 32, "the loads are narrow"
    assert use.shared <= SHARED[case.sm]
    if kernel == "forward" and case in (Case(90, 64), Case(90, 128)):
        assert use.spilled == 0
    # another Triton allocates registers in its own way
    if triton.__version__ == version():
        found = (use.registers, use.spilled, use.shared)
        allowed = (most.registers, most.spilled, most.shared)
        assert all(a <= b for a, b in zip(found, allowed, strict=True)), f"{use}, the page says {most}"


@pytest.mark.parametrize("kernel", ["delta"])
@pytest.mark.parametrize(
    "case",
    [
        *(Case(sm, head_dim) for sm in (90, 80, 100) for head_dim in (64, 128)),
        *(
            pytest.param(Case(90, head_dim), marks=pytest.mark.slow)
            for head_dim in (16, 72, 80, 96, 192, 256)
        ),
    ],
    ids=str,
)
def test_delta_compiles_to_wide_loads_without_spills(case: Case, kernel: str, compilers: Compilers) -> None:
    use = compilers[case, kernel].result()
    assert use.spilled == 0 and use.registers <= 128 and use.shared <= 4, use
    assert re.search(r"ld\.global\S*\.v4\.b32", use.ptx), "the loads are narrow"


def test_the_causal_forward_on_hopper_spills_nothing() -> None:
    page = stated()
    assert all(page[str(Case(90, head_dim))]["forward"].spilled == 0 for head_dim in (64, 128))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "case", [ONES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in ONES[1:])], ids=str
)
def test_sizes_of_one_compile(case: Case, kernel: str, compilers: Compilers) -> None:
    """Triton makes a constant of every size that is 1, also inside the tuples that the kernels take."""
    assert compilers[case, kernel].result().registers > 0


def test_an_edited_predicate_is_another_kernel(tmp_path: Path) -> None:
    """Triton's cache on disk tells functions inside a tuple apart by name only."""
    trees = []
    for operator in ("<=", "<"):
        path = tmp_path / "edited.py"
        path.write_text(f"import triton\n\n@triton.jit\ndef predicate(q, k, h):\n    return k {operator} q\n")
        spec = importlib.util.spec_from_file_location("edited", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
        trees.append(str(constant(("leaf", module.predicate, 0, 0))))
    assert trees[0] != trees[1]


def test_configurations_fit_every_head_dim_and_device() -> None:
    """Every tile is a power of two, and data-centre devices share one table."""
    for head_dim in range(1, 257):
        for dtype in DTYPES.values():
            for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
                for block in flash_forward.config(head_dim, dtype, capability):
                    assert {x & (x - 1) for x in block[:3]} == {0} and min(block[:2]) >= 16
    bf16 = torch.bfloat16
    assert flash_forward.config(72, bf16, (9, 0)) == flash_forward.config(128, bf16, (10, 0))
    assert flash_forward.config(72, bf16, (9, 0)) != flash_forward.config(72, bf16, (8, 6))


def test_tiles_of_keys_divide_the_blocks_of_the_mask() -> None:
    """64 keys a tile where blocks of 64 are seen one by one; 128 where they need not be."""
    sparse = Strided(64, 8, 16) & Causal()
    for mask, keys in (
        (sparse, 64), (sparse.heads((3,), 8), 64), (PerHead((Causal(), sparse)), 64),
        (BlockPermutation(192, 4), 64), (Strided(128, 4, 16), 128), (Strided(32, 4, 16), 128),
        (Strided(64, 8, 1), 128), (Causal(), 128), (Documents((0, 100), sparse), 128),
    ):  # fmt: skip
        found = flash_forward.config(128, torch.bfloat16, (9, 0), grain(mask))
        assert found.dkdv.keys == keys


if __name__ == "__main__":
    for case in (*GATE, *REST):
        print(f"| {case} | {' | '.join(str(compiled(case, kernel)) for kernel in KERNELS)} |", flush=True)
