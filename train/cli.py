"""The console script: longspan train | evaluate | sample | draw | convert | encode | tokenize, each the same
as python -m longspan.train[.verb]; and submit, plan and report, which are python -m
longspan.launch.submit, .plan and .report.
"""

import importlib
import os
import sys

VERBS = {
    "train": "longspan.train.__main__",
    "evaluate": "longspan.train.evaluate",
    "sample": "longspan.train.sample",
    "draw": "longspan.train.draw",
    "convert": "longspan.train.convert",
    "encode": "longspan.train.encode",
    "tokenize": "longspan.train.tokenize",
    "submit": "longspan.launch.submit",
    "plan": "longspan.launch.plan",
    "report": "longspan.launch.report",
}


def main() -> None:
    """Hands the rest of the command line to a verb; a bare Hydra query (tab completion) is answered for the
    verb on the line.
    """
    arguments = sys.argv[1:]
    line = os.environ.get("COMP_LINE", "").split(" ")
    if arguments[:1] == ["-sc"] and len(line) > 1 and line[1] in VERBS:
        # the shell asks about the whole line; Hydra expects it without the verb
        os.environ["COMP_LINE"] = " ".join([line[0], *line[2:]])
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
        arguments = [line[1], *arguments]
    if not arguments or arguments[0] not in VERBS:
        print(
            f"usage: longspan {{{','.join(VERBS)}}} [overrides]    (longspan train --help lists them)",
            file=sys.stderr,
        )
        sys.exit(0 if arguments[:1] in (["--help"], ["-h"]) else 2)
    sys.argv = [f"longspan {arguments[0]}", *arguments[1:]]
    importlib.import_module(VERBS[arguments[0]]).main()
