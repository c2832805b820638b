"""Where a run's numbers go besides metrics.jsonl: a W&B run that never stops training."""

import atexit
import logging
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from .checkout import git_state
from .login import Mode, choose_mode
from .manifest import write_synced
from .metrics import Value
from .wandb_file import last_step

if TYPE_CHECKING:
    from wandb import Run


class Tracker(Protocol):
    """What the trainer tells its numbers to, on rank 0, besides metrics.jsonl. No method blocks or raises."""

    def log(self, step: int, values: Mapping[str, Value]) -> None: ...
    def picture(self, name: str, path: Path) -> None: ...
    def table(self, name: str, rows: Sequence[Mapping[str, Value]]) -> None: ...
    def checkpoint(self, step: int, folder: Path) -> None: ...
    def summary(self, values: Mapping[str, Value]) -> None: ...
    def finish(self, exit_code: int, timeout: float = 20.0) -> None: ...


class Nothing:
    """The tracker that tracks nothing (track=none)."""

    def __init__(
        self,
        *,
        mode: Mode,
        run_dir: Path,
        name: str,
        config: dict[str, Any],
        resume: bool,
        env: Mapping[str, str],
        sweep: str | None = None,
    ) -> None:
        if mode not in ("auto", "disabled"):
            raise ValueError(
                f"track.mode={mode} does nothing with track=none: take track=wandb or mode=disabled"
            )
        self.mode = "disabled"

    def log(self, step: int, values: Mapping[str, Value]) -> None: ...
    def picture(self, name: str, path: Path) -> None: ...
    def table(self, name: str, rows: Sequence[Mapping[str, Value]]) -> None: ...
    def checkpoint(self, step: int, folder: Path) -> None: ...
    def summary(self, values: Mapping[str, Value]) -> None: ...
    def finish(self, exit_code: int, timeout: float = 20.0) -> None: ...


class Wandb:
    """A W&B run of rank 0, fed by a daemon thread through a bounded queue.

    If wandb raises, hangs or is too slow, training goes on: records that find no room are dropped, with one
    warning when that begins and their count at the end. An online run that cannot start is recorded offline.
    `mode` and `url` tell what became of it, wandb_id.txt in the run folder keeps its id, and after `finish`
    `dropped` is the number of records that were lost.
    """

    def __init__(
        self,
        *,
        mode: Mode,
        project: str,
        entity: str | None,
        group: str | None,
        tags: list[str],
        run_dir: Path,
        name: str,
        config: dict[str, Any],
        resume: bool,
        env: Mapping[str, str],
        sweep: str | None = None,
        checkpoints: bool = False,
        capacity: int = 4096,
    ) -> None:
        """config: resolved and redacted; env: the process's environment; sweep: that the run is one of, whose
        name is the group where none is given; checkpoints: each is an artifact that refers to its folder;
        capacity: records the queue holds.

        Raises ValueError for an unknown mode and for mode=online without a login.
        """
        self.mode = choose_mode(mode, env)
        self.url: str | None = None
        self.dropped = self._offered = self._done = 0
        self._exit_code = self._step = 0
        self._held = -1
        self._warned = False
        self._thread: Thread | None = None
        self._records: Queue[Callable[[Run], object] | None] = Queue(capacity)
        if self.mode == "disabled":
            return
        self._identity: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "group": group or sweep,
            "tags": list(tags),
            "dir": str(run_dir),
            "name": f"{sweep}/{name}" if sweep else name,
            "id": _run_id(run_dir / "wandb_id.txt", resume),
            "resume": "allow",
        }
        self._resumed, self._checkpoints = resume, checkpoints
        self._thread = Thread(target=self._work, args=(config, dict(env)), name="wandb", daemon=True)
        self._thread.start()
        # For a process that ends, by an error, without calling finish.
        atexit.register(self.finish, 1)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """One row of history. W&B takes none back: what it holds of a step stays, and is not sent again by a
        run that was resumed from an earlier one.
        """
        self._step = step
        row = {"step": step, **values}
        self._put(lambda run: self._add(run, row, step))

    def picture(self, name: str, path: Path) -> None:
        step = self._step

        def show(run: "Run") -> None:
            import wandb

            kind = wandb.Video if path.suffix == ".mp4" else wandb.Image
            self._add(run, {name: kind(str(path))}, step)

        self._put(show)

    def table(self, name: str, rows: Sequence[Mapping[str, Value]]) -> None:
        """A table with the columns of the first row."""
        step, names = self._step, list(rows[0]) if rows else []
        data = [[row.get(name) for name in names] for row in rows]

        def show(run: "Run") -> None:
            import wandb

            self._add(run, {name: wandb.Table(columns=[*names], data=data)}, step)

        if rows:
            self._put(show)

    def checkpoint(self, step: int, folder: Path) -> None:
        """Refers to a checkpoint, which stays where it is, if track.checkpoints asks for it."""
        uri, name = folder.absolute().as_uri(), f"checkpoint-{self._identity['id']}" if self._thread else ""

        def show(run: "Run") -> None:
            import wandb

            if not folder.exists():
                # a newer one has taken its place
                return
            artifact = wandb.Artifact(name, type="checkpoint", metadata={"step": step})
            artifact.add_reference(uri, name=folder.name, checksum=False)
            run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

        if name and self._checkpoints:
            self._put(show)

    def summary(self, values: Mapping[str, Value]) -> None:
        row = dict(values)
        self._put(lambda run: run.summary.update(row))

    def finish(self, exit_code: int, timeout: float = 20.0) -> None:
        """Waits, for `timeout` seconds at most, until W&B has everything, and says what it did not get."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        atexit.unregister(self.finish)
        deadline = monotonic() + timeout
        self._exit_code = exit_code
        with suppress(Full):
            self._records.put(None, timeout=timeout)
            thread.join(max(0.0, deadline - monotonic()))
        self.dropped = self._offered - self._done
        hangs = thread.is_alive()
        if hangs:
            self._warned = True
            _kill_service()
            # should it ever go on, it ends: what waits is counted as lost
            with suppress(Empty):
                while True:
                    self._records.get_nowait()
            self._records.put_nowait(None)
        if hangs or self.dropped:
            end = f"did not end within {timeout:g} s" if hangs else "has ended"
            lost = f"lost {self.dropped} of {self._offered} records"
            _say(f"wandb {end}, {lost}; metrics.jsonl has everything")

    def _add(self, run: "Run", row: Mapping[str, Any], step: int) -> None:
        if step > self._held:
            run.log(dict(row), step=step)

    def _put(self, record: "Callable[[Run], object]") -> None:
        if self._thread is None:
            return
        self._offered += 1
        try:
            self._records.put_nowait(record)
        except Full:
            self._warn("is too slow or hangs, so records are dropped")

    def _work(self, config: dict[str, Any], env: dict[str, str]) -> None:
        run = self._open({**config, "git": git_state(Path(__file__).parent, env)})
        while (record := self._records.get()) is not None:
            if run is None:
                continue
            try:
                record(run)
                self._done += 1
            except Exception as error:
                self._warn(f"failed ({_one_line(error)})")
        try:
            if run is not None:
                run.finish(self._exit_code)
        except Exception as error:
            self._warn(f"failed to finish ({_one_line(error)})")

    def _open(self, config: dict[str, Any]) -> "Run | None":
        """The run, offline if it cannot be had online; None, after a warning, if it cannot be had at all."""
        for mode in dict.fromkeys((self.mode, "offline")):
            try:
                run = self._start(mode, config)
                # Once more, so that it comes before wandb's own exit hook, which has no time limit.
                atexit.register(self.finish, 1)
            except Exception as error:
                self._warn(f"could not start {mode} ({_one_line(error)})")
            else:
                self.mode, self.url = mode, run.url
                return run
        return None

    def _start(self, mode: str, config: dict[str, Any]) -> "Run":
        import wandb

        # wandb is not to print, to prompt or to wrap stdout.
        settings = wandb.Settings(silent=True, quiet=True, console="off", init_timeout=30.0)
        wandb.setup(settings=settings)
        number = self._identity["id"]
        kept = last_step(Path(self._identity["dir"]) / "wandb", number) if self._resumed else -1
        try:
            run = wandb.init(**self._identity | {"mode": mode}, config=config, settings=settings)
            self._held = max(kept, run.starting_step - 1) if self._resumed else -1
            return run
        except Exception:
            # A helper process that failed to start a run does not let another use its id.
            wandb.teardown(1)
            raise

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            _say(f"wandb {what}; training goes on, metrics.jsonl has everything")


def _say(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _kill_service() -> None:
    """Kills wandb's helper process and unhooks the exit hook that would wait for it for ever."""
    try:
        # There is no public way, and to import or ask wandb here might wait for the thread that hangs in it.
        service = sys.modules["wandb.sdk.wandb_setup"]._singleton._connection
        service._proc._process.kill()
        service._cleanup()
    except (AttributeError, KeyError):
        # wandb did not come so far as to start one.
        return


def _run_id(path: Path, resume: bool) -> str:
    """The id in `path` if the run is resumed and has one, else a new one, which is put there."""
    if resume and path.exists() and (known := path.read_text().strip()):
        return known
    fresh = secrets.token_hex(4)
    part = path.with_name(path.name + ".part")
    # of a run that was killed here
    part.unlink(missing_ok=True)
    write_synced(part, f"{fresh}\n".encode())
    part.replace(path)
    return fresh
