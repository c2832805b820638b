"""Which source runs: the commit of the checkout, and whether it was changed since."""

import subprocess
from collections.abc import Mapping
from pathlib import Path


def git_state(folder: Path, env: Mapping[str, str]) -> dict[str, str | bool]:
    """{"commit": ..., "dirty": ...} of the checkout that tracks `folder`; {} if there is none."""
    plain = {name: value for name, value in env.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout

    try:
        if not git("ls-files", "."):
            return {}
        dirty = bool(git("status", "--porcelain", "--untracked-files=no").strip())
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return {}
