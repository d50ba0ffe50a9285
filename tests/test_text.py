"""Text to token windows, and what unusable text gets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from molae_compress.calibration.text import _shares, as_windows, data_fingerprint, read_texts, token_windows
from molae_compress.errors import DataError

END = 0


def words(start: int, stop: int) -> str:
    """A text whose tokens are the numbers from `start` to `stop - 1`."""
    return " ".join(map(str, range(start, stop)))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Word "7" is token 7; the end-of-text token is 0."""
    vocabulary = {"<end>": END} | {str(number): number for number in range(1, 1000)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


def read(path: Path, column: str = "text") -> list[str]:
    return read_texts([str(path)], column)[0]


# Windows


def test_documents_are_joined_by_the_end_token_and_cut_without_overlap(tokenizer: PreTrainedTokenizerBase) -> None:
    windows_NL = token_windows([[words(1, 6), words(6, 12)]], tokenizer, samples=9, sequence_length=4, seed=None)
    assert windows_NL.dtype == torch.int64
    # 5 + end + 6 + end = 13 tokens: three windows, one token left over.
    assert windows_NL.tolist() == [[1, 2, 3, 4], [5, END, 6, 7], [8, 9, 10, 11]]


def test_without_an_end_token_documents_follow_each_other(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    windows_NL = token_windows([["1 2 3", "4"]], plain, samples=1, sequence_length=4, seed=None)
    assert windows_NL.tolist() == [[1, 2, 3, 4]]


def test_many_documents_keep_their_order(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [str(number) for number in range(1, 301)]
    windows_NL = token_windows([documents], tokenizer, samples=300, sequence_length=2, seed=None)
    assert windows_NL.tolist() == [[number, END] for number in range(1, 301)]


def test_the_seed_alone_decides_the_choice(tokenizer: PreTrainedTokenizerBase) -> None:
    def chosen(seed: int) -> list[list[int]]:
        return token_windows([[words(1, 900)]], tokenizer, samples=20, sequence_length=3, seed=seed).tolist()

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)
    assert len({tuple(window) for window in chosen(1)}) == 20
    assert max(window[0] for window in chosen(1)) > 500, "chosen from the whole text, not from its beginning"


def test_any_first_part_of_a_seeded_choice_mixes_the_sources(tokenizer: PreTrainedTokenizerBase) -> None:
    sources = [[words(1, 400)], [words(500, 900)]]
    windows_NL = token_windows(sources, tokenizer, samples=60, sequence_length=4, seed=0)
    from_second = [window[0] >= 500 for window in windows_NL.tolist()]
    assert sum(from_second) == 30
    assert 5 <= sum(from_second[:20]) <= 15


def test_fewer_windows_than_asked_for_all_come_back(tokenizer: PreTrainedTokenizerBase) -> None:
    windows_NL = token_windows([[words(1, 12)]], tokenizer, samples=100, sequence_length=4, seed=0)
    assert sorted(windows_NL.flatten().tolist()) == [END, *range(1, 12)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 200))
def test_sources_share_evenly_and_fill_in_for_short_ones(available: list[int], samples: int) -> None:
    shares = _shares(available, samples)
    assert sum(shares) == min(samples, sum(available))
    assert all(0 <= share <= have for share, have in zip(shares, available, strict=True))
    # A source gives less than another (beyond the indivisible rest) only if it has no more.
    for share, have in zip(shares, available, strict=True):
        assert share == have or share >= max(shares) - len(available)


def test_a_source_shorter_than_one_window_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"source 2 of 2 has 3 tokens, less than one window of 4.*sequence_length"):
        token_windows([[words(1, 9)], ["1 2"]], tokenizer, samples=1, sequence_length=4, seed=0)


def test_texts_and_token_ids_can_be_handed_over(tokenizer: PreTrainedTokenizerBase) -> None:
    options = {"samples": 3, "sequence_length": 4, "seed": 0}
    texts = [words(1, 40)]
    assert torch.equal(as_windows(texts, tokenizer, **options), token_windows([texts], tokenizer, **options))
    ids_NL = torch.arange(10, dtype=torch.int32).view(2, 5)
    assert torch.equal(as_windows(ids_NL, None, **options), ids_NL.long())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("some.txt", "one text.*calibration.data"),
        ([1, 2], "not texts"),
        (torch.zeros(2, 3), "float32.*integer"),
        (torch.zeros(3, dtype=torch.int64), r"shape \[3\]"),
        (torch.zeros(0, 4, dtype=torch.int64), r"shape \[0, 4\]"),
        (torch.tensor([[1, -100]]), "-100.*labels"),
        (["a text"], "no tokenizer.*Pass"),
    ],
)
def test_unusable_data_handed_over(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_windows(data, None, samples=1, sequence_length=2, seed=0)  # type: ignore[arg-type]


def test_the_fingerprint_sees_text_order_and_boundaries() -> None:
    variants = [[["ab", "c"]], [["a", "bc"]], [["abc"]], [["ab"], ["c"]], [["c", "ab"]], [["ab", "c"], []]]
    assert len({data_fingerprint(texts) for texts in variants}) == len(variants)
    assert data_fingerprint([["ab", "c"]]) == data_fingerprint([["ab", "c"]])


# Sources


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    rows = [{"body": "erstes\u2028Stück", "n": 1}, {"body": "zweites", "n": 2}, {"body": "", "n": 3}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n\r\n")
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps([row["body"] for row in rows]), encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    for row in rows:
        (folder / f"{row['n']}.txt").write_text(str(row["body"]), encoding="utf-8")
    (folder / "ignored.md").write_text("no")
    expected = ["erstes\u2028Stück", "zweites"]
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "a.json"), str(tmp_path / "b.json"), str(folder)]
    assert read_texts(sources, "body") == [expected] * 4
    assert read(folder / "1.txt") == expected[:1]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", None, "two"], "n": [1, 2, 3]}), path)
    assert read(path, "body") == ["one", "two"]
    with pytest.raises(DataError, match=r"no column 'text'.*body, n"):
        read(path)
    with pytest.raises(DataError, match=r"column 'n'.*holds int"):
        read(path, "n")
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"a\.parquet' cannot be read as parquet"):
        read(path)


def test_the_built_in_texts_are_disjoint_and_complete() -> None:
    from pydoc_data.topics import topics

    calibration, held_out = read_texts(["python-docs:calibration", "python-docs:heldout"], "text")
    assert held_out == [topics[name] for name in sorted(topics)[::5]]
    assert sorted(calibration + held_out) == sorted(topics.values())
    assert len(calibration) > 3 * len(held_out)
    with pytest.raises(DataError, match=r"python-docs:held'.*python-docs:heldout"):
        read_texts(["python-docs:held"], "text")


def test_hub_datasets_are_loaded_by_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Rows:
        column_names = ("body", "n")

        def __getitem__(self, column: str) -> list[object]:
            return ["one", None, "two"] if column == "body" else [1, 2, 3]

    def load_dataset(name: str, config: str | None, *, split: str) -> Rows:
        asked.append((name, config, split))
        if split == "tset":
            raise ValueError('Unknown split "tset"')
        return Rows()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_texts(["org/name", "org/Na.me-2[en.x](train[:100])"], "body") == [["one", "two"]] * 2
    assert asked == [("org/name", None, "train"), ("org/Na.me-2", "en.x", "train[:100]")]
    with pytest.raises(DataError, match=r"The hub dataset 'org/Name' has no column 'bdy'.*body, n.*column: body"):
        read_texts(["org/Name"], "bdy")
    with pytest.raises(DataError, match=r"'n' of the hub dataset .* holds int"):
        read_texts(["org/name"], "n")
    with pytest.raises(DataError, match=r"org/name\(tset\).*Unknown split"):
        read_texts(["org/name(tset)"], "body")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet.*'pyarrow'.*molae-compress\[data\]"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"org/name.*'datasets'.*molae-compress\[data\]"):
        read_texts(["org/name"], "text")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data/mixd.txt", r"no file or folder 'data/mixd\.txt'.*Did you mean 'data/mixed\.txt'\?$"),
        ("data/mixe", r"data/mixed\.txt.*data/mixe\(train\)"),
        ("./data/mixed.tx", r"data/mixed\.txt"),
        ("nowhere/mixed.txt", r"folder 'nowhere' does not exist"),
        ("mixed", r"no file or folder 'mixed'.*current directory"),
    ],
)
def test_a_mistyped_path_is_not_taken_for_a_dataset(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mixed.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        read_texts([source], "text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt' holds no text"),
        ("a.txt", b" \n\t", "holds no text"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8: the byte 0xe9 at offset 3"),
        ("a.csv", b"text\nx", r"\.csv.*\.txt, \.jsonl"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": ', "Line 3 .* is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n["y"]', "Line 2 .* is not an object"),
        ("a.jsonl", b'{"Text": "x", "id": 1}', r"Line 1 .* no column 'text'.*Text, id.*column: Text"),
        ("a.jsonl", b'{"text": 5}', "Line 1 .* has int under 'text'"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "Line 1 .* half a character"),
        ("a.jsonl", b'{"text": null}', "holds no text"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}', r"line 2.*\.jsonl"),
        ("a.json", b'{"text": "x"}', "not a JSON list"),
        ("a.json", b'["x", {"body": "y"}]', r"Entry 2 .* no column 'text'.*body"),
        ("a.json", b"\xff\xfe[", "not UTF-8: the byte 0xff at offset 0"),
    ],
)
def test_an_unusable_file_is_refused_with_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_folder_without_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(DataError, match=r"has no \.txt files"):
        read(tmp_path)
