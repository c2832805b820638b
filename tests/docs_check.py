"""Runs the commands in the docs: every block fenced as ```bash run, from the root, in a shell of its own."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```bash run\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """The line where each runnable block of a page begins, and its commands."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        yield text.count("\n", 0, match.start(1)) + 1, match[1]


def check(page: Path) -> tuple[int, int]:
    """How many blocks of the page ran, and how many of them failed; each is told in a line."""
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    results = []
    for line, commands in blocks(page):
        began = time.monotonic()
        shell = ["bash", "-e", "-u", "-o", "pipefail", "-c", commands]
        done = subprocess.run(shell, cwd=ROOT, env=os.environ | {"PATH": search}, check=False)
        results.append(done.returncode)
        word = f"failed with exit code {done.returncode}" if done.returncode else "ok"
        print(f"{page}:{line}: {word} ({time.monotonic() - began:.1f} s)", flush=True)
    return len(results), sum(map(bool, results))


def main(pages: list[str]) -> int:
    counts = [check(Path(page)) for page in pages]
    ran, failed = (sum(column) for column in zip(*counts, strict=True))
    print(f"docs-check: {ran - failed} passed, {failed} failed")
    return failed > 0 or ran == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
