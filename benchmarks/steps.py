"""Training steps of whole models on one device, beside the same models with torch's attention, in one run.

    python -m benchmarks.steps --case DiT
    python -m benchmarks.steps --case Llama

DiT-XL/2 and a video DiT of 1.3B: forward, backward and AdamW in bfloat16 (autocast), and what a window of the
grid saves. Llama-3.2-1B: the longest sequence with each `memory=` preset, from 8k by doubling, beside
transformers with gradient checkpointing, and the same model of ours with torch's attention, blocks
recomputed, logits whole. Weights are float32 under autocast, also transformers', and random: only time and
memory are measured. Writes benchmarks/results/steps-<device>.json.
"""

import argparse
import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.kernels.loss import linear_cross_entropy
from longspan.kernels.mask import Causal, Mask
from longspan.kernels.neighborhood import Neighborhood
from longspan.kernels.span import positions
from longspan.kernels.tile import pairs
from longspan.models.block import Attend
from longspan.models.dit import DiT
from longspan.models.gpt import GPT
from longspan.models.memory import Memory
from longspan.models.rope import Rope
from longspan.models.vdit import VideoDiT
from longspan.parallel.bricks import Bricks, place
from longspan.parallel.single import Single
from longspan.train.meter import gpt_flops, parameter_counts, peak_flops

from . import report

LONG = Memory(recompute="block", mlp_tile=32768)
PRESETS = {"none": Memory(), "long": LONG, "longest": Memory(recompute="block", mlp_tile=32768, offload=True)}
Model = DiT | VideoDiT | GPT
ROUNDS = 5
# Seconds of timed steps after which there is no further one.
ENOUGH = 10.0
LATE = "no time left for it: a greater --budget, or --case, has some"


@dataclass(frozen=True)
class Case:
    """A model, how many samples of how many tokens a step takes, and who is to attend: `longspan`, `sdpa`
    (torch's, over every pair or the causal ones) or `transformers`. bricks: as in `parallel.bricks.place`.
    """

    name: str
    build: Callable[[], Model]
    tokens: int
    batch: int
    who: str = "longspan"
    memory: str = "none"
    bricks: Bricks | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.batch} x {self.tokens} tokens, memory={self.memory}, {self.who}"


@dataclass(frozen=True)
class Row:
    """seconds: of a step, the median; flops: useful ones, recomputation not counted; gib: most held, None on
    a CPU; failed: why there is no time.
    """

    case: str
    model: str
    who: str
    memory: str
    tokens: int
    batch: int
    seconds: float | None = None
    rounds: int = 0
    flops: float = 0.0
    mfu: float | None = None
    gib: float | None = None
    failed: str | None = None

    def text(self) -> str:
        if self.seconds is None:
            return f"{self.case}: {self.failed}"
        each = self.batch / self.seconds
        rates = f"{each:.2f} samples/s, {each * self.tokens:,.0f} tokens/s"
        held = "" if self.gib is None else f", {self.gib:.1f} GiB"
        return f"{self.case}: {1e3 * self.seconds:.1f} ms, {rates}, MFU {self.mfu:.1%}{held}"


@dataclass
class Bench:
    """Until when, on what, in which precision; and what the published or measured peak is."""

    device: torch.device
    deadline: float
    dtype: torch.dtype = torch.bfloat16
    rounds: int = ROUNDS
    peak: float = 0.0

    def __post_init__(self) -> None:
        self.peak = self.peak or peak_flops(self.device, self.dtype)[0]

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def dit(size: int) -> DiT:
    """DiT-XL/2 over latents of this many values a side."""
    return DiT((size, size), 2, 4, 1152, 28, 16, 1000)


def video(mask: Mask | None = None) -> VideoDiT:
    """Wan 2.1's 1.3B over 81 frames of 480 x 832 pixels: 32,760 tokens."""
    return VideoDiT((21, 60, 104), (1, 2, 2), 16, 1536, 30, 12, 8960, text_dim=4096, mask=mask)


def llama() -> GPT:
    """The shape of Llama-3.2-1B."""
    return GPT(
        vocab=128256, dim=2048, layers=16, heads=32, hidden=8192, kv_heads=8,
        rope=Rope(theta=500000.0, scaling="llama3", factor=32.0, original=8192), predecessor=False,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """The diffusion models; Llama's lengths are found while it runs."""
    for size, batch in ((32, 64), (64, 16)):
        for who in ("longspan", "sdpa"):
            yield Case("DiT-XL/2", partial(dit, size), (size // 2) ** 2, batch, who)
    grid, window, brick = (21, 30, 52), (9, 15, 24), (3, 5, 8)
    near = Neighborhood(grid, window, stride=brick)
    for who in ("longspan", "sdpa"):
        yield Case("video DiT 1.3B, full", video, prod(grid), 1, who, "long")
    yield Case(
        f"video DiT 1.3B, window {window}", partial(video, near), prod(grid), 1, "longspan", "long",
        bricks=(grid, brick, (1, 1, 1)),
    )  # fmt: skip


def attending(case: Case, model: Model) -> tuple[Attend, Tensor]:
    """What the model is handed to attend with, and the positions of its tokens."""
    if case.who != "longspan":
        return _torch, torch.arange(case.tokens)
    single, mask = Single(), model.masks[0]
    placement = place(single, case.tokens, mask, case.bricks)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **_: Any) -> Tensor:
        return single.attention(q, k, v, mask, placement)[0]

    return attend, positions(placement.spans_by_rank[0])


def _torch(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **_: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal, grouped = isinstance(mask, Causal), q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def prepared(case: Case, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The model on the device, and what computes its loss on made-up data."""
    if case.who == "transformers":
        return _transformers(case, device)
    with device:
        model = case.build()
        attend, at = attending(case, model)
        made = torch.Generator(device).manual_seed(0)
        if isinstance(model, GPT):
            if case.who == "longspan":
                PRESETS[case.memory].apply(model)
            else:
                Memory(recompute="block").apply(model)
            tokens = torch.randint(model.embed.num_embeddings, (case.batch, case.tokens), generator=made)
            return model, partial(_text_loss, model, tokens, at, attend, whole=case.who != "longspan")
        PRESETS[case.memory].apply(model)
        x = torch.randn(case.batch, case.tokens, prod(model.patch) * model.channels, generator=made)
        t = torch.rand(case.batch, generator=made)
        kinds = torch.randint(model.classes or 1, (case.batch,), generator=made)
        words: dict[str, Tensor] = {}
        if model.text_dim is not None:
            words = {"text": torch.randn(case.batch, 512, model.text_dim, generator=made)}
    return model, lambda: model(x, at, t, kinds, attend, **words).float().square().mean()


def _text_loss(model: GPT, tokens: Tensor, at: Tensor, attend: Attend, *, whole: bool) -> Tensor:
    x = model(tokens, at, attend).flatten(0, 1)
    labels = tokens.roll(-1, 1).flatten()
    if whole:
        return F.cross_entropy(model.head(x).float(), labels)
    return linear_cross_entropy(x, model.head.weight, labels, denominator=labels.numel(), chunk=4096)


def _transformers(case: Case, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """LlamaForCausalLM of the same shape with torch's attention and gradient checkpointing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = case.build()
    assert isinstance(ours, GPT)
    config = LlamaConfig(
        vocab_size=ours.embed.num_embeddings, hidden_size=ours.embed.embedding_dim,
        num_hidden_layers=ours.layers, num_attention_heads=ours.heads, num_key_value_heads=ours.kv_heads,
        intermediate_size=ours.blocks[0].mlp.gate.out_features, tie_word_embeddings=True,  # type: ignore[union-attr]
        max_position_embeddings=case.tokens, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with device:
        model = LlamaForCausalLM(config)
        # its new name, and the one before transformers 5
        name = "activation_checkpointing_enable"
        getattr(model, name, model.gradient_checkpointing_enable)()
        model.train()
        tokens = torch.randint(ours.embed.num_embeddings, (case.batch, case.tokens))
    return model, lambda: model(input_ids=tokens, labels=tokens).loss


def useful(case: Case) -> float:
    """FLOPs of a step by the MFU convention: three forwards' worth, visible pairs only."""
    with torch.device("meta"):
        model = case.build()
    # torch's attention computes every pair of the mask that it was given, which is the model's here
    seen = [pairs(mask, case.tokens, model.kv_heads) for mask in model.masks]
    if isinstance(model, GPT):
        _, rest = parameter_counts(model)
        rest += model.head.weight.numel()
        tokens = case.batch * case.tokens
        return gpt_flops(rest, tokens, model.layers, model.heads, model.head_dim, case.batch * seen[0])
    more = {"text": 512} if isinstance(model, VideoDiT) else {}
    return 6.0 * case.batch * model.macs(case.tokens, seen, **more)


def measured(case: Case, bench: Bench) -> Row:
    """A case's row; what it did not survive stands in it."""
    row, cuda = blank(case), bench.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        model, loss = prepared(case, bench.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        seconds = []
        for _ in range(1 + bench.rounds):
            bench.wait()
            began = time.perf_counter()
            with torch.autocast(bench.device.type, bench.dtype, enabled=bench.dtype != torch.float32):
                found = loss()
            found.backward()
            optimizer.step()
            optimizer.zero_grad()
            bench.wait()
            seconds.append(time.perf_counter() - began)
            if bench.left() < 2 * seconds[-1] or sum(seconds[1:]) > ENOUGH:
                break
    # whatever goes wrong with one must not end the run: it stands in the table and, unless it was memory or a
    # missing package, on stderr
    except Exception as error:
        if not isinstance(error, torch.OutOfMemoryError | ImportError):
            traceback.print_exc()
        line = (str(error).strip() or "no message").splitlines()[0]
        return replace(row, failed=f"{type(error).__name__}: {line}")
    # the first one compiles; alone it is better than nothing, and `rounds` says so
    each, flops = statistics.median(seconds[1:] or seconds), useful(case)
    gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    mfu = flops / each / bench.peak
    return replace(row, seconds=each, rounds=len(seconds) - 1, flops=flops, mfu=mfu, gib=gib)


def longest(bench: Bench, base: Case, presets: Sequence[str]) -> Iterator[Row]:
    """Lengths from the base's by doubling, with the peers and with each preset, until each fails. Each has
    its share of the time that is left; where that ends before memory does, its last row says so.
    """
    peers = (("transformers", "checkpointing"), ("sdpa", "checkpointing"))
    who_all = (*peers, *(("longspan", name) for name in presets))
    for number, (who, memory) in enumerate(who_all):
        end = time.perf_counter() + bench.left() / (len(who_all) - number)
        tokens, last = base.tokens, 0.0
        while True:
            case = Case(base.name, base.build, tokens, base.batch, who, memory)
            # four times for twice the length, and all of it once to warm up and once to be timed
            if time.perf_counter() + 8 * last > end:
                yield told(replace(blank(case), failed=LATE))
                break
            row = fresh(case, replace(bench, deadline=end))
            yield row
            if row.seconds is None:
                break
            tokens, last = 2 * tokens, row.seconds


def fresh(case: Case, bench: Bench) -> Row:
    """`measured`, with nothing of another case in memory."""
    row = measured(case, bench)
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return told(row)


def told(row: Row) -> Row:
    """The row, once it is printed."""
    print(row.text(), flush=True)
    return row


def blank(case: Case) -> Row:
    """A case's row before it is measured."""
    return Row(str(case), case.name, case.who, case.memory, case.tokens, case.batch)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds")
    parser.add_argument("--case", default="", help="only models whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(given)
    # Triton 3.9 warns at a compilation when it is unset
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    device = torch.device(args.device)
    bench = Bench(device, time.perf_counter() + args.budget)
    text = Case("Llama-3.2-1B", llama, 8192, 1)
    every = [case for case in cases() if args.case in case.name]
    if not every and args.case not in text.name:
        known = "; ".join(dict.fromkeys([*(case.name for case in cases()), text.name]))
        raise SystemExit(f"--case {args.case!r} is in none of: {known}")
    rows = [fresh(c, bench) if bench.left() > 0 else told(replace(blank(c), failed=LATE)) for c in every]
    if args.case in text.name:
        rows += longest(bench, text, tuple(PRESETS))
    path = args.out / f"steps-{report.slug(device)}.json"
    report.save(
        path,
        {
            "device": report.device_name(device),
            "versions": report.versions(device, ["transformers"]),
            "peak_flops": bench.peak,
            "date": time.strftime("%Y-%m-%d"),
            "rows": [asdict(row) for row in rows],
        },
    )
    print(f"written: {path}")
    # the search for the longest ends where memory does, or time
    ended = ("OutOfMemoryError", LATE)
    return int(any(r.who == "longspan" and r.failed and not r.failed.startswith(ended) for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
