# SPDX-License-Identifier: Apache-2.0
"""Files cut into parts give each row once, whatever the cuts; Python's json is the reference."""

import json
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet
import pytest

from mm1_jax.config import ConfigError
from mm1_jax.data.build import files, images, tables
from mm1_jax.data.build.bounds import BOUNDS
from mm1_jax.data.build.files import match
from mm1_jax.data.build.rows import BrokenFile, Image, RowError
from mm1_jax.data.image import ImageError
from mm1_jax.data.sources import DataError
from tests.helpers.hostile import encode


def nested(rng: random.Random, depth: int = 0):
  """A JSON value with all that could mislead a scanner."""
  kind = rng.randrange(6 if depth < 4 else 3)
  if kind == 0:
    return "".join(rng.choice('ab"\\[]{},:\n\u00e9\U0001f600 ') for _ in range(rng.randrange(30)))
  if kind == 1:
    return rng.choice([None, True, -1.5e-7, 10**20, ""])
  if kind == 2:
    return [] if rng.random() < 0.5 else {}
  if kind == 3:
    return {nested_key(rng): nested(rng, depth + 1) for _ in range(rng.randrange(4))}
  return [nested(rng, depth + 1) for _ in range(rng.randrange(4))]


def nested_key(rng: random.Random) -> str:
  return rng.choice(["a", '"', "]", "}", "\\", "\\\\", ",", "\u20ac"]) + str(rng.random())


@pytest.mark.parametrize("rows_per_shard", [1, 3, 7, 1000])
@pytest.mark.parametrize("layout", ["array", "indented", "lines", "lines without an end"])
def test_json_in_parts(tmp_path, monkeypatch, rows_per_shard, layout):
  monkeypatch.setattr(files, "CHUNK_BYTES", 37)  # tokens cross chunks
  rng = random.Random(rows_per_shard)
  rows = [{"n": i, "value": nested(rng)} for i in range(60)]
  lines = "\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows))
  text = {
    "array": json.dumps(rows),
    "indented": " \n" + json.dumps(rows, indent=2, ensure_ascii=False) + "\n\n",
    "lines": lines + "\n\n",
    "lines without an end": lines,
  }[layout]
  (tmp_path / "a.json").write_text(text)
  (file,) = match(str(tmp_path / "a.json"), "--input")
  parts = files.split_json(file, rows_per_shard)
  found = [row for part in parts for row in files.json_rows(part)]
  assert [row.value for row in found] == rows
  assert len({row.where for row in found}) == len(rows)
  assert len(parts) > 60 / rows_per_shard / 4


def test_cuts_between_lines(tmp_path):
  """Lines of one length, so that every cut is where a line begins."""
  (tmp_path / "a.jsonl").write_text("".join(f'{{"n": {10 + i}}}\n' for i in range(60)))
  (file,) = match(str(tmp_path / "a.jsonl"), "--input")
  parts = files.split_json(file, 10)
  assert [len(list(files.json_rows(part))) for part in parts] == [10] * 6


def test_array_with_an_odd_element(tmp_path):
  """What is no JSON spoils one row; brackets that do not match, the rest of the file."""
  (tmp_path / "a.json").write_text('[1, {"a": nul}, "x", ["]", 2], [}, ], "y"]')
  (file,) = match(str(tmp_path / "a.json"), "--input")
  good, rest = files.split_json(file, 10)
  found = [(row.value, row.error) for row in files.json_rows(good)]
  bad = (None, "not JSON")
  assert found == [(1, ""), bad, ("x", ""), (["]", 2], ""), bad]
  assert rest.error == "JSON array with something after its end"


def test_a_row_that_is_too_long(tmp_path, monkeypatch):
  bounds = BOUNDS._replace(row=1000)
  monkeypatch.setattr(files, "CHUNK_BYTES", 100)
  rows = [{"n": 0}, {"n": "x" * 5000}, {"n": 2}]
  (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
  (file,) = match(str(tmp_path / "a.jsonl"), "--input")
  found = [(row.value, row.error) for row in files.json_rows(file, bounds)]
  assert found == [({"n": 0}, ""), (None, "row above --max-row-mb"), ({"n": 2}, "")]
  (tmp_path / "b.json").write_text(json.dumps(rows))
  (file,) = match(str(tmp_path / "b.json"), "--input")
  good, broken = files.split_json(file, 10, bounds)
  assert [row.value for row in files.json_rows(good)] == [{"n": 0}]
  assert broken.error == "row above --max-row-mb"


def test_parquet_in_parts(tmp_path):
  table = pa.table({"text": [f"row {i}" for i in range(100)], "more": list(range(100))})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
  (file,) = match(str(tmp_path / "a.parquet"), "--input")
  parts = tables.split_parquet(file, 20)
  assert [part.rows for part in parts] == [14] * 6 + [16]
  found = [row for part in parts for row in tables.parquet_rows(part, ("text", "title"))]
  assert [row.value for row in found] == [{"text": f"row {i}"} for i in range(100)]
  assert found[50].where == f"{tmp_path}/a.parquet, row 50"


def test_no_file(tmp_path):
  with pytest.raises(DataError, match=r"--input=.*/none-\*: no file matches"):
    match(f"{tmp_path}/none-*", "--input")


def test_text_of_unknown_kind(tmp_path):
  from mm1_jax.data.build.__main__ import main

  (tmp_path / "a.docx").write_bytes(b"x")
  with pytest.raises(ConfigError, match=r"a\.docx: text is read from \.txt"):
    main(["text", f"--input={tmp_path}/*", f"--output={tmp_path}/out"])


def test_tar_store(tmp_path):
  """By name, by name without folders, by URL; what is cut off is not there."""
  pictures = {f"p{i}": encode("PNG", (8, 8 + i)) for i in range(4)}
  for number, half in enumerate((("p0", "p1"), ("p2", "p3"))):
    with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
      for name in half:
        (tmp_path / "x.png").write_bytes(pictures[name])
        (tmp_path / "x.json").write_text(json.dumps({"url": f"http://a/{name}"}))
        tar.add(tmp_path / "x.png", f"in/a/{name}.png")
        tar.add(tmp_path / "x.json", f"in/a/{name}.json")
  index = str(tmp_path / "index.sqlite")
  assert images.index_tars(match(f"{tmp_path}/*.tar", "--images"), index) == []
  store = images.Tars(index, 10_000)
  assert store.read(Image("in/a/p0.png")) == pictures["p0"]
  assert store.read(Image("./in/a/p3.png")) == pictures["p3"]
  assert store.read(Image("p2.png")) == pictures["p2"]
  assert store.read(Image(url="http://a/p1")) == pictures["p1"]
  for image in (Image("a/p0.png"), Image("p9.png"), Image(url="http://a/p9"), Image()):
    with pytest.raises(ImageError, match="image not found"):
      store.read(image)
  with pytest.raises(ImageError, match="image file too large"):
    images.Tars(index, 10).read(Image("p0.png"))
  (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:700])
  broken = images.index_tars(match(f"{tmp_path}/*.tar", "--images"), index + "2")
  assert broken == [f"{tmp_path}/1.tar"]


def test_folder_by_url(tmp_path):
  """The name is what `printf http://a/x | sha256sum` says."""
  name = "c1d78952d54b44414873a7352fcc6b30" + ("79d023543829a5da5b892621ef2006eb.png")
  (tmp_path / name).write_bytes(b"png")
  assert images.Folder(str(tmp_path), 10).read(Image(url="http://a/x")) == b"png"


def test_reasons_are_few():
  """Reasons are counted by their words, so none names a row."""
  with pytest.raises(RowError, match=r"^not JSON$"):
    files.parse_json(b'{"secret": ')
  with pytest.raises(BrokenFile, match=r"^broken \.gz file$"), files.reading("/a/b.jsonl.gz"):
    raise EOFError("at byte 17")
