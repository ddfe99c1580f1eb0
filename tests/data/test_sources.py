"""Sources: each kind is read, and each mistake is explained."""

import builtins
import json
import re
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest

from jaxllm.data.errors import DataError
from jaxllm.data.sources import load_documents


def everything(corpus):
    return sorted([*corpus.train.items, *corpus.validation.items])


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt", "c.md", "d.py", "e.csv"):
        (tmp_path / "texts" / name).write_text(f"text of {name}\r\nend")
    return tmp_path / "texts"


def test_globs_of_text_files(texts):
    assert [name for name, _ in everything(load_documents(f"{texts}/**/*.txt"))] == ["a.txt", "deep/b.txt"]
    both = everything(load_documents(f"{texts}/*.md, {texts}/**/*"))
    assert [name for name, _ in both] == ["a.txt", "c.md", "d.py", "deep/b.txt"]
    assert both[0].text == "text of a.txt\r\nend"


def test_one_text_file_is_cut_in_two(texts):
    corpus = load_documents(f"{texts}/a.txt")
    assert corpus.files == 2 and corpus.train.texts[0] + corpus.validation.texts[0] == "text of a.txt\r\nend"


def test_relative_paths_and_places_do_not_change_the_hash(texts, monkeypatch):
    absolute = load_documents(f"{texts}/*.??").train.sha256
    monkeypatch.chdir(texts)
    assert load_documents("*.??").train.sha256 == absolute


def test_json_lines(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": f"t{n}", "body": f"b{n}\n"} for n in range(12)])
    file.write_text(file.read_text() + "\n")
    assert [text for _, text in everything(load_documents(f"{file}:body"))] == [f"b{n}\n" for n in range(12)]
    assert [text for _, text in everything(load_documents(f"{tmp_path}/*.jsonl"))] == [
        f"t{n}" for n in range(12)
    ]


def test_parquet(tmp_path):
    table = pyarrow.table({"text": [f"t{n}" for n in range(12)], "n": list(range(12))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    spec = f"{tmp_path}/a.parquet"
    assert [text for _, text in everything(load_documents(f"{spec}:text"))] == [f"t{n}" for n in range(12)]
    with pytest.raises(DataError, match=r"column 'body' is not in .*a\.parquet; its columns are n, text"):
        load_documents(f"{spec}:body")
    with pytest.raises(DataError, match=r"record a\.parquet:0+1 has int in column 'n'; a column of texts"):
        load_documents(f"{spec}:n")
    (tmp_path / "b.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="does not read as Parquet"):
        load_documents(f"{tmp_path}/b.parquet:text")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    hide(monkeypatch, "pyarrow")
    with pytest.raises(DataError, match=re.escape("pip install 'jaxllm[parquet]'")):
        load_documents(f"{tmp_path}/a.parquet:text")


def hide(monkeypatch, package):
    real = builtins.__import__

    def guarded(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)


class FakeTable(dict):
    column_names = property(lambda self: list(self))


def test_hub_datasets(monkeypatch):
    package = types.ModuleType("datasets")
    asked = []
    package.load_dataset = lambda name, split: (
        asked.append((name, split)) or FakeTable(text=["a", "b", "c"], score=[1, 2, 3])
    )
    monkeypatch.setitem(sys.modules, "datasets", package)
    assert [text for _, text in everything(load_documents("hf:org/name:train:text"))] == ["a", "b", "c"]
    assert asked == [("org/name", "train")]
    with pytest.raises(DataError, match=r"column 'body' .* its columns are score, text"):
        load_documents("hf:org/name:train:body")
    with pytest.raises(DataError, match=r"record org/name:0+ has int"):
        load_documents("hf:org/name:train:score")


def test_hub_datasets_without_the_package_name_the_extra(monkeypatch):
    hide(monkeypatch, "datasets")
    with pytest.raises(DataError, match=re.escape("pip install 'jaxllm[datasets]'")):
        load_documents("hf:org/name:train:text")


def test_the_standard_library_by_name():
    assert load_documents("stdlib").name == "stdlib"


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("none/*.txt", r"no file matches 'none/\*\.txt'.*allowed are 'stdlib'"),
        ("stdlibs", "no file matches 'stdlibs'"),
        ("texts", r"is a folder; .* write 'texts/\*\*/\*\.txt'"),
        ("texts/e.csv", r"endings \.csv; allowed are"),
        ("latin.txt", "not UTF-8 text at byte 3"),
        ("empty.txt", "holds no text"),
        ("none.jsonl:text", r"no file matches 'none\.jsonl'"),
        ("bad.jsonl:text", r"line 3 of bad\.jsonl is not JSON"),
        ("list.jsonl:text", "line 1 of .* is a JSON list"),
        ("good.jsonl:body", r"column 'body' is not in line 1 of good\.jsonl; its columns are id, text"),
        ("good.jsonl:id", r"record good\.jsonl:0+1 has int in column 'id'"),
        ("half.jsonl:text", r"record half\.jsonl:0+2 has half a surrogate pair"),
        ("hf:org/name", "written 'hf:name:split:column'"),
        ("hf:org/name::text", "written 'hf:name:split:column'"),
    ],
)
def test_mistakes_are_explained(texts, monkeypatch, spec, match):
    monkeypatch.chdir(texts.parent)
    with open("latin.txt", "wb") as file:
        file.write(b"caf\xe9")
    write_lines(texts.parent / "good.jsonl", [{"text": "a", "id": 1}])
    write_lines(texts.parent / "half.jsonl", [{"text": "\U0001f467"}, {"text": "\ud800"}])
    write_lines(texts.parent / "list.jsonl", [["a"]])
    with open("bad.jsonl", "w") as file:
        file.write('{"text": "a"}\n\n{"text": \n')
    open("empty.txt", "w").close()
    with pytest.raises(DataError, match=match) as caught:
        load_documents(spec)
    assert str(caught.value).startswith("data: ")
