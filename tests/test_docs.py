"""Every command that the docs and the experiments show composes: no key is unknown, no value wrong."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from longspan.launch.dryrun import Dry, stood_in
from longspan.launch.plan import Planning
from longspan.launch.report import Reporting
from longspan.launch.submit import Submission
from longspan.train.config import Root, typed
from longspan.train.convert import Conversion, named
from longspan.train.draw import Drawing
from longspan.train.encode import Encoding
from longspan.train.evaluate import Evaluation
from longspan.train.sample import Sampling, quoted
from longspan.train.tokenize import Tokenizing

ROOT = Path(__file__).parent.parent
COMMAND = re.compile(
    r"(?:-m longspan\.(?:train|launch)"
    r"(?:\.(evaluate|sample|draw|encode|tokenize|convert|dryrun|submit|plan|report))?"
    r"|longspan (train|submit|plan|report|evaluate|sample|draw|convert)|make train)\b(.*)"
)
SCHEMAS: dict[str, type] = {
    "train": Root, "evaluate": Evaluation, "sample": Sampling, "draw": Drawing, "encode": Encoding,
    "tokenize": Tokenizing, "convert": Conversion, "dryrun": Dry, "submit": Submission,
    "plan": Planning, "report": Reporting,
}  # fmt: skip


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """(where, verb, overrides) of each command in the docs, continued lines joined."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "conf").glob("**/*.yaml")]
    for page in pages:
        text = page.read_text().replace("\\\n", " ")
        shown = (
            "\n".join(re.findall(r"^```bash.*?\n(.*?)^```$", text, re.M | re.S))
            if page.suffix == ".md"
            else text
        )
        for line in shown.splitlines():
            found = COMMAND.search(line)
            if found and "_target_" not in line:
                words = shlex.split(found[3], comments=True)
                given = [quoted(w) for w in words if "=" in w and not w.startswith(("-", "ARGS"))]
                yield f"{page.relative_to(ROOT)}: {line.strip()}", found[1] or found[2] or "train", given


def test_there_are_commands() -> None:
    assert len(list(commands())) > 15


@pytest.mark.parametrize(
    ("where", "verb", "given"), list(commands()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_shown_command_composes(where: str, verb: str, given: list[str]) -> None:
    # a sweep names several values: the first stands for all
    first = [g.split(",")[0] if g.startswith("optim.") else g for g in given]
    with initialize_config_module("longspan.conf", version_base="1.3"):
        cfg = compose(verb, overrides=first)
        typed(
            {"convert": named, "dryrun": stood_in, "plan": stood_in}.get(verb, lambda x: x)(cfg),
            SCHEMAS[verb],
        )
