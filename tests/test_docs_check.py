"""The runner of the docs' commands sees what fails, and an empty page is no success."""

from pathlib import Path

import pytest

import docs_check

PAGE = """text
```bash run
here=$(mktemp)
test -f "$here" && rm "$here"
```
```bash
exit 3
```
```bash run
false | true
```
"""


def test_marked_blocks_run_and_failures_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert docs_check.main([str(page)]) == 1
    told = capfd.readouterr().out.splitlines()
    assert told[0].startswith(f"{page}:3: ok")
    assert told[1].startswith(f"{page}:10: failed with exit code 1")
    assert told[2:] == ["docs-check: 1 passed, 1 failed"]


def test_pages_without_commands_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\nmake\n```\n")
    assert docs_check.main([str(page)]) == 1
