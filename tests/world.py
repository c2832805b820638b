"""A world of gloo processes on this machine: a function runs on every rank, and who failed is named."""

import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")
Worlds = Callable[[int], "World"]

# Imported once, by the server that the ranks are forked from: eight ranks start in 0.2 s instead of 12 s.
PRELOAD = [
    "torch",
    "torch.distributed.device_mesh",
    "torch.distributed._functional_collectives",
    "torch._dynamo",
    "longspan.train.run",
]
# After the first failure the other ranks get this long to tell theirs, which may be the cause.
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
GRACE = 0.3
# A rank whose parent was killed inside a collective ends by itself after this.
ORPHAN = timedelta(minutes=5)


class RankFailed(RuntimeError):
    """Some ranks raised or died: the message holds each one's traceback, `ranks` their numbers."""

    def __init__(self, name: str, failures: Mapping[int, str]) -> None:
        told = "\n".join(f"rank {rank}: {text}" for rank, text in failures.items())
        super().__init__(f"{name} failed on {_ranks(failures)}\n{told}")
        self.ranks = tuple(failures)


@dataclass(frozen=True)
class _Call:
    """What a rank needs to run a function as its parent would: environment and warning filters too."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    environ: dict[str, str]
    filters: Sequence[tuple[Any, ...]]

    def __call__(self, rank: int) -> Any:
        os.environ.clear()
        os.environ.update(self.environ)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.resetwarnings()
            for action, message, category, module, line in reversed(self.filters):
                warnings.filterwarnings(action, _pattern(message), category, _pattern(module), line)
            return self.fn(rank, *self.args)


@dataclass(frozen=True)
class _Rank:
    process: ForkServerProcess
    pipe: "connection.Connection[Any, Any]"


class World:
    """A pool of `size` gloo ranks that keeps one process group alive over many calls.

    `world(fn, *args)` runs `fn(rank, *args)` on every rank and returns the results by rank. Function,
    arguments and results are pickled, so the function stands at the top of a module. Every call starts from
    the same torch seed, with the parent's environment and warning filters. A rank that raises (`RankFailed`)
    or a call that is not done after `timeout` seconds (`TimeoutError`) ends all ranks; the next call starts
    new ones.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a world of {size} ranks: size must be at least 1")
        self.size = size
        self._ranks: list[_Rank] = []
        self._folder = Path()

    def __call__(self, fn: Callable[..., Result], *args: Any, timeout: float = 120.0) -> list[Result]:
        call = pickle.dumps(_Call(fn, args, dict(os.environ), list(warnings.filters)))
        deadline = time.monotonic() + timeout
        try:
            if not self._ranks:
                self._start()
            self._signal(signal.SIGCONT)
            for rank in self._ranks:
                # A rank that died since the last call is found by reading from it.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    rank.pipe.send_bytes(call)
            results = self._collect(getattr(fn, "__name__", repr(fn)), deadline, timeout)
            if sys.platform == "linux":
                # gloo has hundreds of threads that poll: eight idle ranks took a third of two cores
                self._signal(signal.SIGSTOP)
            return results
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks: kindly, and after two seconds by force. The world can be called again."""
        self._signal(signal.SIGCONT)
        for rank in self._ranks:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                rank.pipe.send_bytes(b"")
        deadline = time.monotonic() + 2
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _signal(self, number: signal.Signals) -> None:
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.process.pid or 0, number)

    def _start(self) -> None:
        context = _context()
        # A store of its own for each start: a file store must not be used twice.
        self._folder = Path(tempfile.mkdtemp(prefix="world-"))
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            args = (theirs, rank, self.size, self._folder)
            process = context.Process(target=_serve, args=args, name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours))

    def _collect(self, name: str, deadline: float, timeout: float) -> list[Any]:
        pending = {rank.pipe: number for number, rank in enumerate(self._ranks)}
        results: dict[int, Any] = {}
        raised: dict[int, str] = {}
        died: dict[int, str] = {}
        while pending:
            ready = connection.wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in [p for p in pending if p in ready]:
                number = pending.pop(pipe)
                try:
                    done, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    died[number] = self._obituary(number)
                else:
                    (results if done else raised)[number] = value
            if raised or died:
                deadline = min(deadline, time.monotonic() + GRACE)
        if raised or died:
            # Who died comes first: the others often only noticed.
            raise RankFailed(name, died | raised)
        if pending:
            hung = sorted(pending.values())
            raise TimeoutError(f"{name}: {_ranks(hung)} not done after {timeout:g} s\n{self._stacks(hung)}")
        return [results[number] for number in range(self.size)]

    def _obituary(self, number: int) -> str:
        process = self._ranks[number].process
        process.join(1)
        return f"the process died with exit code {process.exitcode}"

    def _stacks(self, numbers: Sequence[int]) -> str:
        """Where the ranks are, as their fault handlers tell on SIGUSR2."""
        files = [self._folder / f"stack-{number}" for number in numbers]
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._ranks[number].process.pid or 0, signal.SIGUSR2)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline and not all(f.exists() and f.stat().st_size for f in files):
            time.sleep(0.02)
        told = [f.read_text() if f.exists() else "" for f in files]
        return "\n".join(f"rank {n}: {text or 'no answer'}" for n, text in zip(numbers, told, strict=True))

    def _kill(self) -> None:
        if not self._ranks:
            return
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.process.close()
            rank.pipe.close()
        shutil.rmtree(self._folder)
        self._ranks = []


def run(size: int, fn: Callable[..., Result], *args: Any, timeout: float = 120.0) -> list[Result]:
    """`fn(rank, *args)` on `size` new ranks: the results by rank. Raises as `World` does."""
    with World(size) as world:
        return world(fn, *args, timeout=timeout)


def _serve(pipe: "connection.Connection[Any, Any]", rank: int, size: int, folder: Path) -> None:
    """The life of a rank: calls come through the pipe until an empty one, or the parent's death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # one that is stopped does not see that its pipe was closed: it dies with what started it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    # each job collects its predecessor's groups: that looked at 300,000 objects of modules, 0.4 s a job
    gc.freeze()
    with open(folder / f"stack-{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR2, stack)
        # Else gloo takes the address that the host name resolves to.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=ORPHAN)
        for call in iter(lambda: _receive(pipe), b""):
            pipe.send_bytes(_answer(call, rank))
        dist.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR2)


def _receive(pipe: "connection.Connection[Any, Any]") -> bytes:
    try:
        return pipe.recv_bytes()
    except EOFError:
        return b""


def _answer(call: bytes, rank: int) -> bytes:
    try:
        return pickle.dumps((True, pickle.loads(call)(rank)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _context() -> ForkServerContext:
    """Processes forked from a server that has imported torch and runs one thread, so that forking is safe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with _environment(OPENBLAS_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _pattern(regex: Any) -> str:
    """The text of a warning filter's field, which is None, a string or a compiled pattern."""
    return getattr(regex, "pattern", regex) or ""


def _ranks(numbers: Sequence[int] | Mapping[int, str]) -> str:
    names = ", ".join(str(number) for number in sorted(numbers))
    return f"rank {names}" if len(numbers) == 1 else f"ranks {names}"
