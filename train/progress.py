"""What rank 0 shows while it trains: a live bar on a terminal, aligned plain lines anywhere else."""

import errno
import sys
import textwrap
import time
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

WIDTH = 110
# Columns that the text of `describe` takes with its gaps.
FIGURES = 66


class Progress:
    """The display of one run; on ranks other than 0 every method does nothing.

    every_s: seconds between plain lines at least; the first and the last step are always shown. out: None is
    stdout. Also a context manager, so that an error leaves the terminal as it was.
    """

    def __init__(self, *, rank: int = 0, every_s: float = 10.0, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._rank = rank
        self._every_s = every_s
        self._shown_at = -float("inf")
        console = Console(file=self._out, highlight=False)
        console.width = min(console.width, WIDTH)
        self._console = console if console.is_terminal and rank == 0 else None
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, facts: Mapping[str, str]) -> None:
        """The header: what runs, as {name: value}."""
        if self._console is not None:
            self._console.print(Panel(_grid(facts), title="longspan", title_align="left", border_style="dim"))
        else:
            self._plain_table("longspan", facts)

    def step(self, step: int, total: int, values: Mapping[str, float | int | str]) -> None:
        """Step `step` of `total` is done; shows loss, tokens_per_s, mfu, peak_memory, eta_s of `values`."""
        if self._rank != 0:
            return
        if self._console is not None:
            self._live(self._console, step, total, values)
            return
        now = time.monotonic()
        if now - self._shown_at >= self._every_s or step >= total:
            self._shown_at = now
            count = f"{step:>{len(str(total))}}/{total}"
            self._line(f"step {count}  " + "  ".join(describe(values).values()))

    def note(self, text: str) -> None:
        """One remark between the steps, such as a checkpoint or an evaluation."""
        if self._console is not None:
            (self._bar.console if self._bar else self._console).print(Text(text))
        else:
            self._wrapped(text, "")

    def summary(self, rows: Mapping[str, str]) -> None:
        """The table at the end, as {name: value}; ends the bar."""
        self.close()
        if self._console is not None:
            self._console.print(Panel(_grid(rows), title="summary", title_align="left", border_style="dim"))
        else:
            self._plain_table("summary", rows)

    def close(self) -> None:
        """Ends the bar, if there is one."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()

    def _live(self, console: Console, step: int, total: int, values: Mapping[str, float | int | str]) -> None:
        if self._bar is None:
            count = TextColumn("step {task.completed:.0f}/{task.total:.0f}")
            # The figures come first: a terminal that has no room for both shows no bar.
            room = console.width - FIGURES - len(f"step {total}/{total}") - 2
            bar = [BarColumn(bar_width=room)] if room >= 8 else []
            self._bar = Bar(count, *bar, _Figures(), console=console, refresh_per_second=4)
            self._task = self._bar.add_task("", total=total, values={})
            self._bar.start()
        self._bar.update(self._task, completed=step, total=total, values=describe(values))
        if step >= total:
            self._bar.refresh()

    def _plain_table(self, title: str, rows: Mapping[str, str]) -> None:
        self._line(title)
        name_width = max((len(name) for name in rows), default=0)
        for name, value in rows.items():
            self._wrapped(value, f"  {name:<{name_width}}  ")

    def _wrapped(self, text: str, head: str) -> None:
        # Paths and commands stay in one piece: whoever reads them will copy them.
        lines = textwrap.wrap(text, WIDTH - len(head), break_long_words=False, break_on_hyphens=False) or [""]
        for number, line in enumerate(lines):
            self._line((head if number == 0 else " " * len(head)) + line)

    def _line(self, text: str) -> None:
        if self._rank == 0:
            try:
                print(text.rstrip(), file=self._out, flush=True)
            except OSError as error:
                # a log on a full disk; the lines stay in the buffer and are tried again with the next
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise


class _Figures(ProgressColumn):
    """The figures to the right of the bar."""

    def render(self, task: Task) -> Text:
        return Text("  ".join(task.fields["values"].values()), no_wrap=True)


def describe(values: Mapping[str, float | int | str]) -> dict[str, str]:
    """The shown values as text of fixed widths, units included; what is missing in `values` is left out."""
    forms = {
        "loss": lambda v: f"loss {v:7.4f}",
        "tokens_per_s": lambda v: f"{amount(v):>6} tok/s",
        "mfu": lambda v: f"MFU {100 * v:4.1f}%",
        "peak_memory": lambda v: f"mem {size(v):>8}",
        "eta_s": lambda v: f"ETA {duration(v):>7}",
    }
    return {name: form(float(values[name])) for name, form in forms.items() if name in values}


def amount(number: float) -> str:
    """17234 -> '17.2k': three figures, at most six characters."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.3g}T"


def size(count: float) -> str:
    """Bytes in binary units: 1288490188 -> '1.2 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1023.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """3725 -> '1:02:05', 65 -> '1:05'."""
    whole = int(seconds + 0.5)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _grid(rows: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table
