"""Documents of your own: a file or a folder of text, JSON lines or Parquet."""

import os
from pathlib import Path

from .cache import Source, Store, load
from .check import fraction, switch
from .corpus import find
from .packed import Packed, Plan
from .tokenizer import make

# So many bad records never stop a run: a share means little in a small corpus.
_ALWAYS_ALLOWED = 10


class Text(Packed):
    """A file or a folder of documents. One is held out by the hash of its content: copies stay on one side.

    Args:
        path: A file, or a folder that is read whole in the order of its names. `.jsonl`, `.jsonl.gz`,
            `.jsonl.zst` and `.parquet` hold many documents, any other file is one.
        context: Tokens per sample.
        tokenizer: `bytes`, or the path of a `tokenizers` JSON file.
        files: Which files of the folder, by their names, as a shell matches them: `*.md`.
        field: Where a JSON object or a Parquet table has the text.
        end_of_document: Whether each document ends with the tokenizer's end id, as its last label.
        seed: Of the order.
        cache: Folder for the tokens.
        held_out: Share of the documents that is held out.
        bad_budget: Share of the records that may be bad. Up to 10 are always skipped, unless this is 0.
        pack: Several documents a sample; else each piece of a document is padded to the context.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: A setting is wrong, there are not two documents, or too many records are bad.
    """

    def __init__(
        self,
        *,
        path: str | os.PathLike[str],
        context: int,
        tokenizer: str = "bytes",
        files: str = "*",
        field: str = "text",
        end_of_document: bool = False,
        seed: int = 0,
        cache: str | os.PathLike[str],
        held_out: float = 0.05,
        bad_budget: float = 0.01,
        pack: bool = True,
    ) -> None:
        plan = Plan(context, seed, held_out, pack=pack)
        fraction("data.bad_budget", bad_budget, ends=True)
        if not isinstance(files, str):
            raise ValueError(f"data.files={files!r} must be a pattern of names, such as '*.md'")
        ids = make(tokenizer)
        if switch("data.end_of_document", end_of_document) and ids.end is None:
            raise ValueError(
                f"data.end_of_document=true: data.tokenizer={tokenizer!r} has no end token, use false"
            )
        store = load(Source(find(str(path), field, files), ids, end=end_of_document), cache)
        _check_budget(store, bad_budget)
        facts = {"corpus": "text", "path": os.path.abspath(str(path)), "end_of_document": end_of_document}
        super().__init__(store, ids, plan, facts=facts)


def allowed(records: int, budget: float) -> float:
    """How many of so many records may be bad."""
    return max(budget * records, _ALWAYS_ALLOWED if budget else 0)


def _check_budget(store: Store, budget: float) -> None:
    bad, records = store.meta["bad"], store.meta["records"]
    if bad <= allowed(records, budget):
        return
    root = Path(store.meta["root"])
    listed = store.meta["bad_records"]
    lines = [f"  {root / record['location']}: {record['reason']}" for record in listed]
    if bad > len(listed):
        lines.append(f"  and {bad - len(listed)} more")
    raise ValueError(
        f"data.bad_budget={budget}: {bad} of {records} records are bad; mend them, leave them out with "
        "data.files, or raise the budget:\n" + "\n".join(lines)
    )
