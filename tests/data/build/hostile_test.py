# SPDX-License-Identifier: Apache-2.0
"""Hostile input: no build ends on it, all of it is counted by its reason, what is built trains."""

import gzip
import io
import json
import pathlib
import random
import tarfile
from collections import Counter

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from mm1_jax.config import DataConfig, InputSpec, SourceConfig
from mm1_jax.data.build.__main__ import main
from mm1_jax.data.pipeline import make_pipeline
from mm1_jax.data.sources import Source
from tests.helpers import hostile

FILTERS = ("text too long", "repeated record")


@pytest.fixture
def build(tmp_path):
  """Builds, and returns the manifest; checks that all rows are counted."""

  def run(format: str, *flags: str) -> dict:
    prefix = tmp_path / "out" / format
    main([format, f"--output={prefix}", "--max_bad_fraction=1", *flags])
    manifest = json.loads(pathlib.Path(f"{prefix}-manifest.json").read_text())
    left_out = sum(manifest["bad"].values()) + sum(manifest["filtered"].values())
    assert manifest["rows"] == manifest["records"] + left_out
    dead = pathlib.Path(f"{prefix}-dead.jsonl.gz")
    lines = gzip.decompress(dead.read_bytes()).splitlines() if dead.exists() else []
    letters = [json.loads(line) for line in lines]
    assert Counter(letter["reason"] for letter in letters) == manifest["bad"]
    assert all(len(letter["row"]) <= 500 and letter["where"] for letter in letters)
    source = Source(SourceConfig(format, f"{prefix}-*.arrayrecord"))
    assert len([source[i] for i in range(len(source))]) == manifest["records"]
    return manifest

  return run


def reasons(cases: list[hostile.Case]) -> Counter:
  return Counter(reason for _, reason in cases)


def check(manifest: dict, cases: list[hostile.Case]) -> None:
  """Checks that each case is counted under its reason, and the good ones are kept."""
  expected = reasons(cases)
  kept = expected.pop(None)
  assert {**manifest["bad"], **manifest["filtered"]} == expected
  assert manifest["records"] == kept
  assert all((reason in FILTERS) == (reason in manifest["filtered"]) for reason in expected)


def write_lines(path: pathlib.Path, lines: list[bytes]) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(b"\n".join(lines) + b"\n")
  return path


def write_tar(path: pathlib.Path, members: dict[str, bytes]) -> bytes:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w") as tar:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return path.read_bytes()


def test_there_are_enough(tmp_path):
  groups = [hostile.images(), hostile.texts(), hostile.json_lines(), hostile.conversations()]
  groups += [hostile.pages(), hostile.mmc4_rows(), hostile.image_names(tmp_path / "images")]
  assert sum(reason is not None for cases in groups for _, reason in cases) >= 200


def test_images_in_tars(build, tmp_path):
  cases = hostile.images()
  members = {}
  for i, (data, _) in enumerate(cases):
    members |= {f"{i:04d}.jpg": data, f"{i:04d}.txt": f"number {i}".encode()}
  write_tar(tmp_path / "a.tar", members)
  # Of a tar, a member that is too large is not even read.
  cases = [
    (d, "member too large or no regular file" if r == hostile.TOO_BIG else r) for d, r in cases
  ]
  check(build("webdataset", f"--input={tmp_path}/a.tar", "--max_image_mb=1"), cases)


def test_images_in_a_folder(build, tmp_path):
  """A caption goes with its picture; a document stays, and only the picture is lost."""
  cases = hostile.images()
  (tmp_path / "images").mkdir()
  images, annotations, rows = [], [], []
  for i, (data, _) in enumerate(cases):
    (tmp_path / "images" / f"{i}.jpg").write_bytes(data)
    images.append({"id": i, "file_name": f"{i}.jpg"})
    annotations.append({"id": i, "image_id": i, "caption": f"number {i}"})
    info = {"image_name": f"{i}.jpg", "matched_text_index": 0}
    rows.append(hostile.dumps({"text_list": [f"number {i}"], "image_info": [info]}))
  coco = write_lines(
    tmp_path / "c.json", [hostile.dumps({"images": images, "annotations": annotations})]
  )
  mmc4 = write_lines(tmp_path / "m.jsonl", rows)
  flags = [f"--images={tmp_path}/images", "--max_image_mb=1"]
  check(build("coco", f"--input={coco}", *flags), cases)
  manifest = build("mmc4", f"--input={mmc4}", *flags)
  lost = reasons(cases)
  assert manifest["records"] == len(cases)
  assert manifest["images"] == lost.pop(None)
  assert manifest["lost_images"] == lost
  manifest = build("mmc4", f"--input={mmc4}", *flags, "--lost_images=document", "--overwrite")
  assert manifest["bad"] == lost


def test_texts(build, tmp_path):
  cases = hostile.texts()
  lines = [hostile.dumps({"text": text, "id": f"row {i}"}) for i, (text, _) in enumerate(cases)]
  write_lines(tmp_path / "a.jsonl", lines)
  check(build("text", f"--input={tmp_path}/a.jsonl", "--max_chars=100000"), cases)


def test_lines(build, tmp_path):
  cases = hostile.json_lines()
  write_lines(tmp_path / "a.jsonl", [line for line, _ in cases])
  check(build("text", f"--input={tmp_path}/a.jsonl"), cases)


def test_names(build, tmp_path):
  cases = hostile.image_names(tmp_path / "store" / "images")
  turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Yes"}]
  rows = [
    {"id": str(i), "image": name, "conversations": turns} for i, (name, _) in enumerate(cases)
  ]
  path = write_lines(tmp_path / "a.json", [hostile.dumps(rows)])
  check(build("llava", f"--input={path}", f"--images={tmp_path}/store/images"), cases)


def test_conversations(build, tmp_path):
  cases = hostile.conversations()
  hostile.image_names(tmp_path / "images")
  for i, (row, _) in enumerate(cases):
    if isinstance(row, dict):
      row.setdefault("id", f"row {i}")
  flags = [f"--images={tmp_path}/images"]
  lines = write_lines(tmp_path / "a.jsonl", [hostile.dumps(row) for row, _ in cases])
  check(build("llava", f"--input={lines}", *flags), cases)
  array = write_lines(tmp_path / "b.json", [hostile.dumps([row for row, _ in cases])])
  check(build("llava", f"--input={array}", *flags, "--overwrite", "--rows_per_shard=7"), cases)


def test_pages(build, tmp_path):
  cases = hostile.pages()
  for i, ((texts, images), _) in enumerate(cases):
    struct = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    columns = {
      "texts": pa.array([texts], pa.list_(pa.string())),
      "images": pa.array([images], struct),
    }
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / f"{i:03d}.parquet")
  check(build("obelics", f"--input={tmp_path}/*.parquet", f"--images={tmp_path}"), cases)


def test_mmc4_rows(build, tmp_path):
  cases = hostile.mmc4_rows()
  hostile.image_names(tmp_path / "images")
  path = write_lines(tmp_path / "a.jsonl", [hostile.dumps(row) for row, _ in cases])
  check(build("mmc4", f"--input={path}", f"--images={tmp_path}/images"), cases)


def test_broken_files(build, tmp_path):
  """A file that breaks off gives the rows before the break, and is named."""
  line = b'{"text": "%d %s"}\n'
  lines = b"".join(line % (i, random.randbytes(500).hex().encode()) for i in range(3000))
  packed, frame = gzip.compress(lines), zstandard.compress(lines)
  flipped = bytearray(packed)
  flipped[len(packed) // 2 : len(packed) // 2 + 64] = bytes(64)
  table = io.BytesIO()
  pyarrow.parquet.write_table(pa.table({"text": [f"row {i}" for i in range(99)]}), table)
  parquet = table.getvalue()
  holed = parquet[:100] + b"\xff" * 200 + parquet[300:]
  broken = {
    "cut.jsonl.gz": packed[: len(packed) // 2],
    "cut_at_the_end.jsonl.gz": packed[:-1],
    "flipped.jsonl.gz": bytes(flipped),
    "no.jsonl.gz": b"no gzip",
    "cut.jsonl.zst": frame[: len(frame) // 2],
    "no.jsonl.zst": b"no zstd file",
    "cut.parquet": parquet[:-20],
    "empty.parquet": b"",
    "no.parquet": b"PAR1" * 50,
    "holed.parquet": holed,
    "text.txt.gz": b"no gzip",
  }
  for name, data in broken.items():
    (tmp_path / name).write_bytes(data)
  for name in ("empty.jsonl", "empty.txt", "empty.jsonl.zst"):
    (tmp_path / name).write_bytes(b"")
  (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
  (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
  (tmp_path / "good.txt").write_bytes(b"good")
  (tmp_path / "open.json").write_bytes(b'[{"text": "first"}, {"text": "sec')
  other = pa.table({"title": ["x"] * 5})
  pyarrow.parquet.write_table(other, tmp_path / "other.parquet")
  numbers = pa.table({"text": [1, 2, None]})
  pyarrow.parquet.write_table(numbers, tmp_path / "numbers.parquet")
  manifest = build("text", f"--input={tmp_path}/*.*")
  named = {pathlib.Path(path).name for path in manifest["damaged_files"]}
  as_text = {"no.jsonl.gz", "no.jsonl.zst", "text.txt.gz"}  # whatever their names say
  assert named == {*broken, "other.parquet", "open.json"} - as_text
  assert manifest["bad"].pop("not JSON") > 0  # what gzip makes of flipped bits before it notices
  assert manifest["bad"] == {
    "broken .gz file": 3,
    "broken .zst file": 1,
    "broken .parquet file": 4,
    "none of the columns id, source, license, credit, url, text": 1,
    "'text' is of the wrong type": 2,
    "'text' is missing": 1,
    "JSON array without an end": 1,
    "not UTF-8": 1,
    "empty": 1,
  }
  assert manifest["records"] > 5_000  # before the breaks


def test_broken_tars(build, tmp_path):
  jpeg = hostile.photo()
  members = {f"{i}.{e}": d for i in range(9) for e, d in (("jpg", jpeg), ("txt", b"text %d" % i))}
  whole = write_tar(tmp_path / "0good.tar", members)
  step = len(whole) // 10
  for i in range(1, 8):
    (tmp_path / f"cut{i}.tar").write_bytes(whole[: i * step + 13])
  header = whole.index(b"4.jpg\0")
  (tmp_path / "garbage.tar").write_bytes(whole[:header] + b"\xff" * 512 + whole[header + 512 :])
  (tmp_path / "empty.tar").write_bytes(b"")
  (tmp_path / "no.tar").write_bytes(b"no tar file" * 999)
  (tmp_path / "text.tar").write_bytes(b"x")
  odd = {"a.jpg": jpeg, "b.txt": b"no picture", "c.jpg": jpeg, "c.json": b'{"caption": 5}'}
  odd |= {"d.jpg": jpeg, "d.json": b"[]", "e.jpg": jpeg, "e.json": b"{", "f.jpg": jpeg}
  odd |= {"f.txt": b"\xff\xfe", "g.jpg": jpeg, "g.png": jpeg, "g.txt": b"two", "README": b"hello"}
  odd |= {"../../h.jpg": jpeg, "../../h.txt": b"a name is only a name", "i.jpg": jpeg, "i.txt": b""}
  odd |= {
    "j.jpg": jpeg,
    "j.json": b'{"caption": "told", "url": 7}',
    "k.cls": b"5",
    "l.JPG": jpeg,
    "l.TXT": b"OK",
  }
  write_tar(tmp_path / "odd.tar", odd)
  with tarfile.open(tmp_path / "odd.tar", "a") as tar:
    for kind, name in (
      (tarfile.SYMTYPE, "m.jpg"),
      (tarfile.CHRTYPE, "n.jpg"),
      (tarfile.DIRTYPE, "o.jpg"),
    ):
      info = tarfile.TarInfo(name)
      info.type, info.linkname = kind, "/etc/passwd"
      tar.addfile(info)
    for _ in range(2):
      tar.addfile(tarfile.TarInfo("p.txt"), io.BytesIO())
  manifest = build("webdataset", f"--input={tmp_path}/*.tar")
  named = {pathlib.Path(path).name for path in manifest["damaged_files"]}
  cut = {f"cut{i}.tar" for i in range(1, 8)}
  assert named == {*cut, "empty.tar", "garbage.tar", "no.tar", "text.tar"}
  assert manifest["bad"]["broken .tar file"] == len(named)
  assert manifest["bad"]["member too large or no regular file"] == 2  # a link, a device
  assert manifest["bad"]["two members of one name"] == 1
  assert manifest["bad"]["several images"] == 1
  assert manifest["bad"]["not UTF-8"] == 1
  assert manifest["bad"]["not JSON"] == 1
  assert manifest["bad"]["no caption"] >= 1
  assert manifest["bad"]["not an object"] == 1
  assert manifest["bad"]["empty text"] == 1
  with tarfile.open(tmp_path / "0good.tar") as tar:
    ends = [info.offset_data + info.size for info in tar if info.name.endswith(".txt")]
  before = sum(end <= length for end in ends for length in (i * step + 13 for i in range(1, 8)))
  odd_but_good = ["../../h", "l"]
  assert manifest["records"] == 9 + before + 4 + len(odd_but_good) + 2  # captions and URLs of 5, 7


def test_coco_files(build, tmp_path):
  hostile.image_names(tmp_path / "images")
  files = {
    "array": [],
    "nothing": {},
    "null": {"images": None, "annotations": []},
    "text": {"images": "x", "annotations": []},
    "odd": {
      "images": [{"id": 1, "file_name": "good.jpg", "license": [1]}, 5, {"id": [1]}, {"id": 2}],
      "annotations": [
        {"image_id": 1, "caption": "good", "id": 1},
        {"image_id": 1, "caption": 5, "id": 2},
        {"image_id": 9, "caption": "x", "id": 3},
        {"image_id": [1], "caption": "x", "id": 4},
        {"caption": "x", "id": 5},
        {"image_id": 2, "caption": "no name", "id": 6},
        {"image_id": 1},
        None,
      ],
      "licenses": [{"id": 1}, "x"],
    },
    "bare": {"images": [{"id": 7, "file_name": "good.jpg"}], "annotations": []},
  }
  for name, value in files.items():
    (tmp_path / f"{name}.json").write_bytes(hostile.dumps(value))
  (tmp_path / "deep.json").write_bytes(b"[" * 100_000)
  (tmp_path / "cut.json").write_bytes(b'{"images": [')
  (tmp_path / "empty.json").write_bytes(b"")
  manifest = build("coco", f"--input={tmp_path}/*.json", f"--images={tmp_path}/images")
  assert manifest["records"] == 2  # a caption of 5 is a text
  assert manifest["bad"] == {
    "not an object": 2,  # a file, an annotation
    "'annotations' is missing": 1,
    "'images' is missing": 1,
    "'images' is of the wrong type": 1,
    "no caption": 1,
    "caption of an image that is not listed": 3,
    "'file_name' is missing": 1,
    "image without a caption": 1,
    "JSON nested too deeply": 1,
    "not JSON": 2,
  }


def test_repeated_ids(build, tmp_path):
  """A row that is there twice is kept once; several may have one id, as in LLaVA's mix."""
  rows = [{"id": "a", "text": "x"}, {"id": "a", "text": "x"}, {"id": "a", "text": "y"}]
  rows += [{"id": "b", "text": "x"}, {"id": "a", "text": "x"}]
  path = write_lines(tmp_path / "a.jsonl", [hostile.dumps(row) for row in rows])
  manifest = build("text", f"--input={path}")
  assert manifest["filtered"] == {"repeated record": 2}
  assert (manifest["records"], manifest["repeated_ids"]) == (3, 1)


def test_an_odd_row_ends_no_build(build, tmp_path, monkeypatch):
  """What we did not think of is a bad row too."""
  from mm1_jax.data.build import documents, formats

  def fails(row, default_id, options):
    yield from documents.text_records(row, default_id, options)
    if row["text"] == "2":
      raise KeyError("unthought of")

  text = formats.FORMATS["text"]._replace(records=fails)
  monkeypatch.setitem(formats.FORMATS, "text", text)
  path = write_lines(tmp_path / "a.jsonl", [b'{"text": "1"}', b'{"text": "2"}'])
  assert build("text", f"--input={path}")["bad"] == {"not of the format (KeyError)": 1}


def test_what_is_built_trains(build, tmp_path, tokenizer):
  """Pictures with only a whole header, texts of odd characters: no batch fails on them."""
  members = {}
  photos = [hostile.photo(i) for i in range(8)]
  for i, data in enumerate(photos):
    middle = len(data) // 2
    members[f"{i}.jpg"] = data[:middle] + bytes(range(32)) + data[middle + 32 :]
    members[f"{i}.txt"] = b"damaged within"
  for i, (data, _) in enumerate(hostile.images()):
    members |= {f"x{i}.jpg": data, f"x{i}.txt": b"picture"}
  write_tar(tmp_path / "a.tar", members)
  lines = [hostile.dumps({"text": text}) for text, _ in hostile.texts()]
  write_lines(tmp_path / "a.jsonl", lines)
  build("webdataset", f"--input={tmp_path}/a.tar")
  build("text", f"--input={tmp_path}/a.jsonl", "--max_chars=10000")
  names = ("webdataset", "text")
  data = DataConfig(
    sources=tuple(SourceConfig(n, f"{tmp_path}/out/{n}-*.arrayrecord") for n in names),
    tokenizer=tokenizer.path,
    seq_len=256,
    batch_size=4,
    images_per_row=5,
    window_rows=16,
    max_drop_fraction=0.5,
  )
  pipeline = make_pipeline(data, InputSpec((28, 28), 4, tokenizer.image_id))
  images = sum(next(pipeline)[1].num_images for _ in range(40))
  assert images > 200
