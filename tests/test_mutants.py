"""Mutants die: each planted fault in kernels/ or parallel/ makes the test that guards it fail."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "parallel", "models", "train", "conf", "tests", "benchmarks")


@dataclass(frozen=True)
class Mutant:
    """`old` in `file` becomes `new`; `guard` is the test that must notice."""

    name: str
    file: str
    old: str
    new: str
    guard: str


MUTANTS = [
    Mutant("zigzag without its mirror", "parallel/placement.py", "pieces[-1 - r]", "pieces[size + r]",
           "test_placement.py::test_zigzag_is_even_under_a_causal_mask[8]"),
    Mutant("hops counted the wrong way", "parallel/ring.py",
           "(self.ring.rank - self.step * hop)", "(self.ring.rank + self.step * hop)",
           "test_matrix.py::test_layouts_equal_one_device[3]"),
    Mutant("sign of dlse", "kernels/attention.py", "delta - dlse.masked_fill", "delta + dlse.masked_fill",
           "test_attention.py::test_a_loss_of_lse_alone_or_out_alone_has_its_gradient"),
    Mutant("maximum for log-sum-exp", "kernels/attention.py", "top + whole.log())", "top + 0 * whole.log())",
           "test_attention.py::test_merging_over_any_split_of_the_keys_is_the_whole"),
    Mutant("a lost head offset", "kernels/lower.py", "torch.tensor(low.heads, dev",
           "torch.arange(len(low.heads), dev",
           "test_mask.py::test_heads_follow_their_global_index"),
    Mutant("gradients that do not come home", "parallel/ring.py", "own += home", "own += 0 * home",
           "test_matrix.py::test_layouts_equal_one_device[2]"),
    Mutant("window off by one", "kernels/mask.py", "(k >= q - left)", "(k > q - left)",
           "test_mask.py::test_each_mask_means_what_it_says"),
    Mutant("causal without the diagonal", "kernels/mask.py", "    return k <= q\n", "    return k < q\n",
           "test_mask.py::test_the_meaning_by_hand"),
    Mutant("a partial tile called full", "kernels/mask.py",
           "return k.low <= q.high, k.high <= q.low",
           "return k.low <= q.high, k.high <= q.high",
           "test_tile.py::test_causal_is_partial_on_the_diagonal_only"),
    Mutant("a tile wrongly empty", "kernels/mask.py", "some = (k.high >= q.low - left)",
           "some = (k.high > q.low)",
           "test_tile.py::test_on_contiguous_tokens_leaves_are_classified_exactly"),
    Mutant("documents one token late", "kernels/mask.py", "right=True) - 1", "right=False) - 1",
           "test_mask.py::test_each_mask_means_what_it_says"),
    Mutant("inner masks at global positions", "kernels/lower.py",
           "see(low, tree[2], q - start_q, k - start_k, h)",
           "see(low, tree[2], q, k, h)",
           "test_mask.py::test_compositions_mean_what_their_parts_say"),
    Mutant("a shard that stops one hop early", "parallel/ring.py", "max(u, default=0)",
           "max(0, max(u, default=0) - 1)",
           "test_traffic.py::test_a_shard_goes_no_further_than_its_last_user"),
    Mutant("kv heads in the wrong order", "kernels/reference.py", "kh.repeat_interleave(times, 1)",
           "kh.repeat(1, times, 1, 1)", "test_attention_inputs.py::test_grouped_queries_are_repeated_keys"),
    Mutant("a mean over the local tokens", "kernels/loss.py", "dtype=whole.dtype, device=whole.device)",
           "dtype=whole.dtype, device=whole.device) * 0 + (labels != ignore_index).sum()",
           "test_loss.py::test_losses_of_shards_add_up_to_the_mean_of_all_valid_tokens"),
]  # fmt: skip
QUICK = {0, 8}


def killed(mutant: Mutant, folder: Path) -> bool:
    """Whether the guard fails on a copy with the fault, and passes on the copy without it."""
    tree = folder / "longspan"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    file = tree / mutant.file
    source = file.read_text()
    assert source.count(mutant.old) == 1, (
        f"{mutant.file} holds {mutant.old!r} {source.count(mutant.old)} times"
    )
    file.write_text(source.replace(mutant.old, mutant.new))
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"tests/{mutant.guard}"]
    done = subprocess.run(
        command,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 1), (
        f"{mutant.guard} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    )
    return done.returncode == 1


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(m, id=m.name, marks=[] if i in QUICK else [pytest.mark.slow])
        for i, m in enumerate(MUTANTS)
    ],
)
def test_mutants_die(mutant: Mutant, tmp_path: Path) -> None:
    assert killed(mutant, tmp_path), f"{mutant.guard} did not notice: {mutant.old!r} -> {mutant.new!r}"


def test_the_copy_is_what_runs(tmp_path: Path) -> None:
    """A change of no consequence survives: what kills the others is their fault, not the copying."""
    harmless = Mutant(
        "", "parallel/placement.py", "pieces[-1 - r]", "pieces[2 * size - 1 - r]", MUTANTS[0].guard
    )
    assert not killed(harmless, tmp_path)
