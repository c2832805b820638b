"""Corpora: what is read, which records are bad and where they stand, and how text becomes tokens."""

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from corpora import text, write_documents
from longspan.train.data.corpus import Bad, Corpus, Document, find
from longspan.train.data.tokenizer import make


def test_files_are_read_in_order_of_names_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.py", "a/é.txt", ".hidden/x", "a/.y", "__pycache__/z.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    records = list(find(tmp_path).read())
    assert records == [Document(n, n) for n in ("a/z.py", "a/é.txt", "b.md")]
    assert find(tmp_path / "b.md") == Corpus(tmp_path, ("b.md",))


def test_line_ends_and_byte_order_marks_are_kept_in_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\n")
    assert list(find(tmp_path).read()) == [Document("a.txt", "\ufeffa\r\nb\n")]


def test_names_that_are_not_utf8_are_read_too(tmp_path: Path) -> None:
    for name in (b"\xff.txt", b"\xfe.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name[:1] * 2)
    with pytest.raises(ValueError, match="not UTF-8 at byte 0"):
        text(tmp_path, tmp_path / ".cache", bad_budget=1)
    for number, name in enumerate((b"\xff.txt", b"\xfe.txt")):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text(f"text {number}")
    assert text(tmp_path, tmp_path / ".cache").describe()["documents"] == 1


BROKEN_LINES = [
    (b'{"text": "fine"}', None),
    (b"", None),
    (b'{"text": "fi', "broken JSON"),
    (b'{"txt": "x"}', "no field 'text'"),
    (b'["text"]', "a JSON list, not an object"),
    (b'{"text": ""}', "empty document"),
    (b'{"text": 3}', "int, not a string"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b"[" * 200_000, "broken JSON"),
    (b'{"text": "good"}', None),
]


def test_bad_records_are_located_with_their_reason(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(line for line, _ in BROKEN_LINES))
    (tmp_path / "y.txt").write_bytes(b"ab\xff")
    (tmp_path / "z.txt").write_bytes(b"")
    os.symlink(tmp_path / "nowhere", tmp_path / "w.txt")
    records = list(find(tmp_path).read())
    assert [r.text for r in records if isinstance(r, Document)] == ["fine", "good"]
    found = {r.location: r.reason for r in records if isinstance(r, Bad)}
    wanted = {f"x.jsonl:{i}": reason for i, (_, reason) in enumerate(BROKEN_LINES, 1) if reason}
    wanted |= {"y.txt": "not UTF-8 at byte 2", "z.txt": "empty document", "w.txt": "not a regular file"}
    assert list(found) == sorted(found, key=lambda k: (k.split(":")[0], int(k.partition(":")[2] or 0)))
    assert found.keys() == wanted.keys()
    for location, reason in wanted.items():
        assert reason in found[location]
    described = text(tmp_path, tmp_path / ".cache", bad_budget=1).describe()
    assert (described["bad"], described["records"], described["documents"]) == (
        len(wanted),
        len(wanted) + 2,
        1,
    )
    assert [b["location"] for b in described["bad_records"]] == list(found)


def test_files_of_a_folder_are_chosen_by_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.md", "sub/b.md", ".c.md", "d.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert find(tmp_path, files="*.md").names == ("a.md", "sub/b.md")
    assert text(tmp_path, tmp_path / ".cache", files="[ad].*").describe()["records"] == 2
    with pytest.raises(ValueError, match=r"holds no file whose name matches data.files='\*.rst'"):
        find(tmp_path, files="*.rst")
    with pytest.raises(ValueError, match=r"data.files=\['a.md'\] must be a pattern of names"):
        text(tmp_path, tmp_path / ".cache", files=["a.md"])


def test_above_the_budget_the_run_stops_with_the_list(tmp_path: Path) -> None:
    lines = [f'{{"text": "{i}"}}' for i in range(1000)]
    for i in range(0, 30):
        lines[i * 30] = "{"
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"data.bad_budget=0.01: 30 of 1000 records are bad") as raised:
        text(file, tmp_path / "cache")
    for line in (1, 31, 61):
        assert f"{file}:{line}: broken JSON" in str(raised.value)
    assert "and 10 more" in str(raised.value)
    described = text(file, tmp_path / "cache", bad_budget=0.03).describe()
    assert described["bad"] == 30 and len(described["bad_records"]) == 20
    # The tokens are cached by now; the budget still counts.
    with pytest.raises(ValueError, match="30 of 1000"):
        text(file, tmp_path / "cache", bad_budget=0.02)
    file.write_text("\n".join(["{", *lines[1:30]]))
    assert text(file, tmp_path / "cache").describe()["bad"] == 1
    with pytest.raises(ValueError, match=f"{file}:1: broken JSON"):
        text(file, tmp_path / "cache", bad_budget=0)


def test_compressed_lines_are_the_same_documents(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    texts = [f"document {i} " + "é" * i for i in range(50)]
    plain = "".join(json.dumps({"body": t}) + "\r\n" for t in texts).encode()
    halves = [plain[:1000], plain[1000:]]
    # Two frames one after the other are a valid file.
    frames = b"".join(zstandard.ZstdCompressor().compress(half) for half in halves)
    (tmp_path / "a.jsonl").write_bytes(plain)
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    (tmp_path / "c.jsonl.zst").write_bytes(frames)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        records = list(find(tmp_path / name, "body").read())
        assert records == [Document(f"{name}:{i}", t) for i, t in enumerate(texts, 1)]


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet"])
def test_a_damaged_container_is_an_error_that_names_it(tmp_path: Path, kind: str) -> None:
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(30).hex().encode() for _ in range(2000))
    if kind == "gz":
        content = gzip.compress(lines)
    else:
        content = pytest.importorskip("zstandard").ZstdCompressor().compress(lines)
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    file = tmp_path / (f"x.jsonl.{kind}" if kind != "parquet" else "x.parquet")
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{file} cannot be read beyond (line|row) \d+"):
        list(find(file).read())
    file.write_bytes(b"garbage" * 9)
    with pytest.raises(ValueError, match=rf"{file} cannot be read beyond (line|row) 0"):
        list(find(file).read())


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = ["one", None, "", "två", *[str(i) for i in range(600)]]
    pq.write_table(pa.table({"text": texts, "n": range(604)}), tmp_path / "x.parquet")
    records = list(find(tmp_path).read())
    assert [r.text for r in records if isinstance(r, Document)] == [t for t in texts if t]
    assert records[1:3] == [
        Bad("x.parquet:2", "the text is NoneType, not a string"),
        Bad("x.parquet:3", "empty document"),
    ]
    assert records[-1] == Document("x.parquet:604", "599")
    with pytest.raises(ValueError, match="data.field='body' is no column of .*x.parquet: it has text, n"):
        list(find(tmp_path, "body").read())
    raw = pa.array([b"ok", b"\xff"], pa.binary())
    for column in (raw, raw.view(pa.string())):
        pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
        assert list(find(tmp_path).read()) == [
            Document("x.parquet:1", "ok"),
            Bad("x.parquet:2", "not UTF-8 at byte 0"),
        ]


@pytest.mark.parametrize("package", ["zstandard", "pyarrow", "tokenizers"])
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    extra = {"zstandard": "zstd", "pyarrow": "parquet", "tokenizers": "tokenizers"}[package]
    name = {"zstandard": "x.jsonl.zst", "pyarrow": "x.parquet", "tokenizers": "x.txt"}[package]
    (tmp_path / name).write_text("x")
    settings = {"tokenizer": "x.json"} if package == "tokenizers" else {}
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}: pip install longspan\[{extra}\]"):
        text(tmp_path / name, tmp_path / "cache", **settings)


def test_empty_and_missing_corpora_are_clear_errors(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="data.path=.*none' is an empty corpus"):
        text(tmp_path / "none", cache)
    for missing in (str(tmp_path / "gone"), ""):
        with pytest.raises(FileNotFoundError, match=f"data.path='{missing}' does not exist"):
            text(missing, cache)
    (tmp_path / "a.txt").write_text("only one")
    with pytest.raises(
        ValueError, match="data.held_out=0.2 leaves no document to hold out: the corpus has 1"
    ):
        text(tmp_path / "a.txt", cache)
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    for name, reason in (("b.txt", "empty document"), ("c.txt", "not UTF-8")):
        with pytest.raises(
            ValueError, match=f"empty corpus: no document in .*, 1 bad records\n  {name}: {reason}"
        ):
            text(tmp_path / name, cache)
    assert not [p for p in cache.iterdir() if ".tmp-" in p.name]


def test_bytes_tokenizer() -> None:
    tokenizer = make("bytes")
    ids = tokenizer.encode(["aé", ""])
    assert [i.tolist() for i in ids] == [[97, 195, 169], []]
    assert tokenizer.vocab == 257 and tokenizer.end == 256
    assert tokenizer.decode([97, 195, 256, 98]) == "a\ufffdb"


def train_bpe(path: Path, special: list[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the theory of the thing, there and then " * 5], trainer)
    # Settings for somebody's batches, which must not touch documents.
    bpe.enable_truncation(5)
    bpe.enable_padding(length=500)
    bpe.save(str(path))


def test_tokenizers_file(tmp_path: Path) -> None:
    train_bpe(tmp_path / "bpe.json", ["<|endoftext|>"])
    (tmp_path / "c").mkdir()
    texts = [f"the thing {i}, then the theory of é {i}" for i in range(20)]
    for i, content in enumerate(texts):
        (tmp_path / "c" / f"{i:02}").write_text(content, encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer": str(tmp_path / "bpe.json"),
        "end_of_document": True,
        "context": 8,
    }
    data = text(tmp_path / "c", tmp_path / "cache", **settings)
    parts = (data, data.held_out())
    assert sorted(data.decode(d[:-1]) for part in parts for d in part.documents()) == sorted(texts)
    end = make(settings["tokenizer"]).end
    assert end is not None and all(d[-1] == end for part in parts for d in part.documents())
    held = list(data.held_out().documents())
    size = sum(len(data.decode(d[:-1]).encode()) for d in held)
    assert data.bytes_per_token == pytest.approx(size / sum(map(len, held)))
    assert data.bytes_per_token == data.held_out().bytes_per_token > 1
    assert data.decode(data.encode(texts[3])) == texts[3] and len(data.encode(texts[3])) > 5
    assert data.vocab > max(int(d.max()) for part in parts for d in part.documents())
    assert "bpe.json sha256:" in data.describe()["tokenizer"]


def test_tokenizers_file_errors(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "corpus")
    with pytest.raises(FileNotFoundError, match="data.tokenizer='.*no.json' does not exist"):
        make(str(tmp_path / "no.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="data.tokenizer='.*bad.json' is not a tokenizers JSON file"):
        make(str(tmp_path / "bad.json"))
    train_bpe(tmp_path / "endless.json", [])
    with pytest.raises(ValueError, match="data.end_of_document=true: .*has no end token"):
        text(folder, tmp_path / "cache", tokenizer=str(tmp_path / "endless.json"), end_of_document=True)
