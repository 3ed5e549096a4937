"""Files of prompts, in the forms that people have them in."""

import gzip
import json

import pytest

from jaxdistill.interop.prompts import PromptError, read_prompts

ROWS = [
    {"text": "a cat, sitting", "category": "color"},
    {"text": "\xe9t\xe9 \U0001f600", "category": "b"},
    {"text": "a cat, sitting", "category": "again"},
]
TXT = "\n  \n".join(row["text"] for row in ROWS) + "\n"
JSONL = "\r\n\r\n".join(json.dumps(row) for row in ROWS)
CSV = "category,text\n" + "".join(f'{row["category"]}, "{row["text"]}"\n' for row in ROWS)
FILES = {
    "p.txt": TXT.encode(),
    "P.TXT": TXT.encode(),
    "mac.txt": TXT.replace("\n", "\r").encode(),
    "mark.txt": TXT.encode("utf-8-sig"),
    "little.txt": b"\xff\xfe" + TXT.encode("utf-16-le"),
    "big.txt": b"\xfe\xff" + TXT.encode("utf-16-be"),
    "p.txt.gz": gzip.compress(TXT.encode()),
    "p.jsonl": JSONL.encode(),
    "P.JSONL": JSONL.replace('"text"', '"Prompt"').encode(),
    "caption.jsonl.GZ": gzip.compress(JSONL.replace('"text"', '"caption"').encode()),
    "p.csv": CSV.encode("utf-8-sig"),
    "p.csv.gz": gzip.compress(CSV.replace("text", "PROMPT", 1).encode()),
    "p.tsv": CSV.replace(", ", "\t").replace("category,", "category\t").encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_a_prompt_file_is_read_in_each_form(name, tmp_path):
    content = FILES[name]
    if name == "p.tsv":
        content = content.replace(b"a cat\tsitting", b"a cat, sitting")
    (tmp_path / name).write_bytes(content)
    found = read_prompts(tmp_path / name)
    assert [row["prompt"] for row in found] == [row["text"] for row in ROWS]
    if "txt" not in name.lower():
        assert [row["category"] for row in found] == [row["category"] for row in ROWS]


def test_parquet_is_read_without_its_pictures(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.Table.from_pylist([{**row, "image": {"bytes": b"\xff"}} for row in ROWS])
    parquet.write_table(table, tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == [{**row, "prompt": row["text"]} for row in ROWS]
    parquet.write_table(table.drop(["text"]), tmp_path / "p.parquet")
    with pytest.raises(PromptError, match=r'line 1 has no text under .* but "category"$'):
        read_prompts(tmp_path / "p.parquet")
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(PromptError, match=r"p\.parquet cannot be read"):
        read_prompts(tmp_path / "p.parquet")


def test_the_first_of_the_keys_that_holds_a_text_is_the_prompt(tmp_path):
    rows = [{"text": "c", "caption": "b", "prompt": "a"}, {"prompt": None, "caption": "b"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert [row["prompt"] for row in read_prompts(tmp_path / "p.jsonl")] == ["a", "b"]


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00"])
def test_half_of_a_character_is_replaced_and_said_once(half, tmp_path, capsys):
    lines = ['{"prompt": "a dog \\ud83d\\ude00"}']
    lines += [f'{{"prompt": "a {half}cat {half}", "category": "{half}"}}'] * 3
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    found = read_prompts(tmp_path / "p.jsonl")
    assert found[0]["prompt"] == "a dog \U0001f600"
    assert found[1] == {"prompt": "a \ufffdcat \ufffd", "category": "\ufffd"}
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "p.jsonl, line 2 has half of a character, and 2 more" in line


BAD = {
    "empty.txt": (b"\n \n", "has no prompts"),
    "empty.txt.gz": (b"", "cannot be|is damaged|has no prompts"),
    "cut.txt.gz": (gzip.compress(TXT.encode())[:-9], "is damaged"),
    "plain.txt.gz": (b"a cat", "is damaged"),
    "latin.txt": ("a cat\n\xfcber\n".encode("latin-1"), r"line 2 is not UTF-8 \(byte 1 is 0xfc\)"),
    "latin.csv": ("text\n\xfcber\n".encode("latin-1"), r"line 2 is not UTF-8 \(byte 1 is 0xfc\)"),
    "half.txt": (b"\xff\xfea", r"is not UTF-16, as its mark says"),
    "nul.txt": ("a cat\na dog".encode("utf-16-le"), "line 1 has a NUL character"),
    "lfs.txt": (b"version https://git-lfs.github.com/spec/v1\noid\n", "run: git lfs pull"),
    "bad.jsonl": (b'{"prompt": "a"}\n{oops\n', "line 2 is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not JSON"),
    "list.jsonl": (b'["a"]', "line 1 is no JSON object"),
    "keys.jsonl": (
        b'{"title": "a", "url": "b"}\n',
        'line 1 has no text under "prompt", "caption" or "text", but "title" and "url"',
    ),
    "number.jsonl": (b'{"prompt": 3}\n', 'line 1 has no text under .* but "prompt"'),
    "keys.csv": (b"title,url\na,b\n", 'line 1 names "title" and "url"; one column must be'),
    "quotes.csv": (b"text\na cat, sitting\n", "line 2 has 2 fields, but line 1 names 1"),
    "few.csv": (b"text,url\na cat\n", "line 2 has 1 fields, but line 1 names 2"),
    "open.csv": (b'text\n"a cat\n', "line 2 is not CSV"),
    "prompts.json": (b"[]", "must end in .txt"),
    "p.parquet.gz": (b"", "must end in .txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_prompt_file_that_cannot_be_used_is_named(name, tmp_path):
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=words) as failure:
        read_prompts(tmp_path / name)
    assert name in str(failure.value) and "\n" not in str(failure.value)


def test_a_prompt_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PromptError, match=r"p\.txt cannot be read \(No such file"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").mkdir()
    with pytest.raises(PromptError, match=r"p\.txt cannot be read \(Is a directory"):
        read_prompts(tmp_path / "p.txt")
