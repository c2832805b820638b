"""Ranks that work together: each does its part, rank 0 merges the parts, what fails on one fails on all."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..kernels.mask import Unsupported
from ..parallel.mesh import patience

Part = TypeVar("Part")
Reply = TypeVar("Reply")
LONGEST = 400


class PeerError(RuntimeError):
    """Work failed on some rank; the message is one line and, with several ranks, begins with the rank."""


@dataclass(frozen=True)
class _Failure:
    kind: type[Exception]
    line: str


class Ranks:
    """The ranks of `group` (None: all, or this process alone), which talk over a gloo group of their own that
    waits as long, or `wait`.

    Of their own, so that a thread may use it while the trainer computes over the other one. All ranks make
    one and call its methods in the same order.
    kinds: exceptions that reach every rank as the first of these that they are; any other as a `PeerError`.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, kinds: tuple[type[Exception], ...] = (ValueError,),
        wait: timedelta | None = None,
    ) -> None:  # fmt: skip
        self._kinds = kinds
        self._group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            members = dist.get_process_group_ranks(group)
            part = len(members) < dist.get_world_size()
            self._group = dist.new_group(
                members, timeout=wait or patience(group), backend="gloo", use_local_synchronization=part
            )
            self.rank, self.size = dist.get_rank(self._group), len(members)

    def exchange(self, work: Callable[[], Part], merge: Callable[[list[Part]], list[Reply]]) -> Reply:
        """Runs `work` on every rank, `merge` on rank 0 over the results by rank, and returns each its reply.

        Results and replies are pickled. `merge` runs only if every rank's work went well. Raises what the
        first failing rank raised, on all of them.
        """
        cause: Exception | None = None

        def attempt(step: Callable[[], Any]) -> Any:
            nonlocal cause
            try:
                return step()
            except Exception as error:
                cause = error
                return self._failure(error)

        parts = self._gather(attempt(work))
        replies: list[Any] | None = None
        if parts is not None:
            failures = [part for part in parts if isinstance(part, _Failure)]
            merged = failures[0] if failures else attempt(lambda: merge(parts))
            replies = [merged] * self.size if isinstance(merged, _Failure) else merged
        reply = self._scatter(replies)
        if isinstance(reply, _Failure):
            raise reply.kind(reply.line) from cause
        return reply

    def together(self, work: Callable[[], Part]) -> Part:
        """Runs `work` on every rank and returns what it returned here, not pickled. Raises as `exchange`."""
        results: list[Part] = []
        self.exchange(lambda: results.append(work()), lambda parts: [None] * len(parts))
        return results[0]

    def _failure(self, error: Exception) -> _Failure:
        line = one_line(error)
        if self.size > 1:
            line = f"rank {self.rank}: {line}"
        return _Failure(next((kind for kind in self._kinds if isinstance(error, kind)), PeerError), line)

    def _gather(self, part: Any) -> list[Any] | None:
        if self._group is None:
            return [part]
        parts: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(part, parts, group=self._group, group_dst=0)
        return parts

    def _scatter(self, replies: list[Any] | None) -> Any:
        if self._group is None:
            assert replies is not None
            return replies[0]
        reply: list[Any] = [None]
        dist.scatter_object_list(reply, replies, group=self._group, group_src=0)
        return reply[0]


def highest(number: int, group: dist.ProcessGroup | None = None) -> int:
    """The highest number, int32, that a rank of `group` (None: all) gives: one all-reduce, on the CPU if the
    group can.
    """
    cpu = "gloo" in dist.get_backend_config(group)
    device = torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())
    found = torch.tensor([number], dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group)
    return int(found.item())


def refuse_together(error: ValueError | None, group: dist.ProcessGroup | None) -> None:
    """Raises on all ranks of `group` (None: this process alone) if any has an error: its own where there is
    one, elsewhere one of the same class, Unsupported or ValueError, that names a rank that has one.
    """
    if group is not None:
        mine = 0 if error is None else 2 * dist.get_rank() + 2 + isinstance(error, Unsupported)
        worst = highest(mine, group)
        if worst and error is None:
            kind = Unsupported if worst % 2 else ValueError
            raise kind(
                f"rank {worst // 2 - 1} refuses what it was given, and says why; all ranks stop with it"
            )
    if error is not None:
        raise error


def one_line(error: BaseException) -> str:
    """What an exception says, on one line, the class's name first where the text alone would puzzle.

    Torch answers a full disk with something about positions in a file: the OSError behind it is what is told.
    """
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError | ValueError | PeerError):
        behind = behind.__cause__ or behind.__context__
    error = behind or error
    text = " ".join(str(error).split())[:LONGEST]
    if isinstance(error, OSError | ValueError | PeerError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
