# SPDX-License-Identifier: Apache-2.0
"""Files as people have them: what is unambiguous is read, an odd cell is lost alone."""

import base64
import bz2
import collections
import gzip
import io
import json
import lzma
import pathlib
import random
import tarfile
import tracemalloc
import zipfile
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from mm1_jax.data.build import containers, files, images, layouts, webdataset
from mm1_jax.data.build.__main__ import main
from mm1_jax.data.build.bounds import BOUNDS
from mm1_jax.data.build.filters import Refiner
from mm1_jax.data.build.formats import list_units, read
from mm1_jax.data.build.options import FORMATS, BuildOptions
from mm1_jax.data.build.pipeline import open_store
from mm1_jax.data.build.rows import Bad, BrokenFile, FilePart, Image, RowError, Skipped
from mm1_jax.data.build.stats import content
from mm1_jax.data.sources import DataError
from tests.helpers import fuzz, hostile


class Built(NamedTuple):
  """What becomes of a build's rows."""

  records: list[dict[str, Any]]
  bad: collections.Counter  # by reason
  found: dict[str, str]  # what the first of a reason has instead
  lost: collections.Counter  # pictures
  skipped: collections.Counter

  def texts(self) -> list[list[str]]:
    """Texts of each record, a picture as <image>."""
    return [[item.get("text", "<image>") for item in content(r)] for r in self.records]


def build(format: str, path: pathlib.Path, store: pathlib.Path | None = None, **more) -> Built:
  """Takes the way of a build, from the listing of files to finished records."""
  flags = FORMATS[format]
  chosen = {"max_chars": flags.max_chars, "max_image_mb": 1.0, "source": format, **more}
  asked = BuildOptions(format, str(path), "unused", images=str(store or ""), **chosen)
  refiner = Refiner(asked, open_store(asked), frozenset())
  built = Built([], collections.Counter(), {}, collections.Counter(), collections.Counter())
  for unit in list_units(asked):
    for row in read(unit, asked):
      if isinstance(row, Skipped):
        built.skipped[row.reason] += 1
      elif isinstance(row, Bad):
        built.bad[row.reason] += 1
        built.found.setdefault(row.reason, row.found)
      else:
        try:
          built.records.append(refiner.refine(row, built.lost))
        except RowError as e:
          built.bad[e.reason] += 1
  return built


def tar_of(members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode="w", format=form) as tar:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return data.getvalue()


JPEG = hostile.encode("JPEG")
PAIRS = [(f"{i:05d}", f"caption {i}".encode()) for i in range(6)]
SORTED = [m for key, text in PAIRS for m in ((f"{key}.jpg", JPEG), (f"{key}.txt", text))]
TEXTS = [["<image>", f"caption {i}"] for i in range(6)]
APPLE = b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(48)
MACOS = [m for name, data in SORTED for m in ((f"._{name}", APPLE), (name, data))]
UNSORTED = [*SORTED[::2], *SORTED[1::2]]
NAMED = [(n.replace(".jpg", ".input.jpg").replace(".txt", ".outputs.txt"), d) for n, d in SORTED]
LINES = b"".join(b'{"text": "caption %d"}\n' % i for i in range(6))
DOCUMENTS = [[f"caption {i}"] for i in range(6)]


def long_window(data: bytes, log: int) -> bytes:
  """zstd, as `zstd --long=LOG` writes what comes through a pipe."""
  parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=log)
  packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
  return packer.compress(data) + packer.flush()


def with_third(ending: str, data: bytes) -> list[tuple[str, bytes]]:
  """SORTED with a third member for each key."""
  pairs = zip(SORTED[::2], SORTED[1::2], strict=True)
  return [
    m for (name, jpeg), text in pairs for m in ((name, jpeg), text, (name[:5] + ending, data))
  ]


def as_json(member: tuple[str, bytes]) -> tuple[str, bytes]:
  """A caption in a .json instead of a .txt."""
  name, data = member
  if not name.endswith(".txt"):
    return member
  return name.replace(".txt", ".json"), json.dumps({"caption": data.decode()}).encode()


# Name of the file, and content: each has the six samples.
TARS = {
  "plain": ("a.tar", tar_of(SORTED)),
  "tgz": ("a.tgz", gzip.compress(tar_of(SORTED))),
  "tar.gz": ("a.tar.gz", gzip.compress(tar_of(SORTED))),
  "gzip called .tar": ("a.tar", gzip.compress(tar_of(SORTED))),
  "gzip of two members": (
    "a.tgz",
    gzip.compress(tar_of(SORTED)[:3000]) + gzip.compress(tar_of(SORTED)[3000:]),
  ),
  "zstd": ("a.tar.zst", zstandard.compress(tar_of(SORTED))),
  "bzip2": ("a.tbz2", bz2.compress(tar_of(SORTED))),
  "xz": ("a.txz", lzma.compress(tar_of(SORTED))),
  "no suffix": ("download", tar_of(SORTED)),
  "a wrong suffix": ("a.zip", tar_of(SORTED)),
  "called .gz and not compressed": ("a.tar.gz", tar_of(SORTED)),
  "macOS": ("a.tar", tar_of(MACOS)),
  "macOS, compressed": ("a.tgz", gzip.compress(tar_of(MACOS))),
  "macOS, all at the front": ("a.tar", tar_of([*MACOS[::2], *MACOS[1::2]])),
  "macOS, in a folder": (
    "a.tar",
    tar_of([m for n, d in SORTED for m in ((f"__MACOSX/x/._{n}", APPLE), (f"x/{n}", d))]),
  ),
  ".DS_Store": ("a.tar", tar_of([(".DS_Store", b"x"), *SORTED, ("x/.DS_Store", b"y")])),
  "pictures first": ("a.tar", tar_of(UNSORTED)),
  "texts first": ("a.tar", tar_of([*SORTED[1::2], *SORTED[::2]])),
  "unsorted, compressed": ("a.tgz", gzip.compress(tar_of(UNSORTED))),
  "mixed": ("a.tar", tar_of(random.Random(0).sample(SORTED, len(SORTED)))),
  "named fields": ("a.tar", tar_of(NAMED)),
  "named fields, unsorted": ("a.tar", tar_of([*NAMED[::2], *NAMED[1::2]])),
  "upper case": ("a.tar", tar_of([(n.upper(), d) for n, d in SORTED])),
  "keys with dots": ("a.tar", tar_of([(f"photo.{n}", d) for n, d in SORTED])),
  "a mask beside each": ("a.tar", tar_of(with_third(".seg.png", JPEG))),
  "Windows' line breaks": ("a.tar", tar_of([(n, d + b"\r\n" * (".txt" in n)) for n, d in SORTED])),
  "a byte order mark": (
    "a.tar",
    tar_of([(n, b"\xef\xbb\xbf" * (".txt" in n) + d) for n, d in SORTED]),
  ),
  "captions in .json": ("a.tar", tar_of([*map(as_json, SORTED)])),
  "a null caption in .json beside .txt": (
    "a.tar",
    tar_of(with_third(".json", b'{"caption": null}')),
  ),
  "two tars in one": ("a.tar", tar_of(SORTED[:6]) + tar_of(SORTED[6:])),
  "POSIX": ("a.tar", tar_of(SORTED, tarfile.PAX_FORMAT)),
  "long folders": ("a.tar", tar_of([("f" * 150 + "/" + n, d) for n, d in SORTED])),
}


@pytest.mark.parametrize("case", TARS)
def test_tars(tmp_path, case: str):
  name, data = TARS[case]
  (tmp_path / name).write_bytes(data)
  built = build("webdataset", tmp_path / name)
  assert sorted(built.texts()) == TEXTS
  assert not built.bad
  litter = 12 * ("macOS" in case) + 2 * (case == ".DS_Store")
  assert built.skipped == ({containers.LITTER: litter} if litter else {})


def test_an_unsorted_tar_in_bounded_memory(tmp_path, monkeypatch):
  """What waits is read again from its place; of a compressed tar it cannot be, and that is told."""
  pictures = [(f"{i:03d}.jpg", JPEG + bytes(200_000)) for i in range(60)]
  texts = [(f"{i:03d}.txt", b"caption %d" % i) for i in range(60)]
  (tmp_path / "a.tar").write_bytes(tar_of([*pictures, *texts]))
  (tmp_path / "b.tgz").write_bytes(gzip.compress(tar_of([*pictures, *texts]), 1))
  monkeypatch.setattr(BuildOptions, "bounds", BOUNDS._replace(held=1_000_000))
  asked = BuildOptions("webdataset", "", "", max_image_mb=1.0, max_chars=100)
  tracemalloc.start()
  count = 0
  for row in webdataset.rows(FilePart(str(tmp_path / "a.tar"), 1, 0), asked):
    assert {m.kind: bool(m.data) for m in row.value.values()} == {"image": True, "text": True}
    count += 1
  assert count == 60
  assert tracemalloc.get_traced_memory()[1] < 6_000_000
  tracemalloc.stop()
  problems = collections.Counter(
    member.problem
    for row in webdataset.rows(FilePart(str(tmp_path / "b.tgz"), 1, 0), asked)
    for member in row.value.values()
    if member.kind == "image"
  )
  assert problems[webdataset.FAR_APART] >= 50
  assert problems[""] >= 4


def zip_of(data: bytes) -> bytes:
  packed = io.BytesIO()
  with zipfile.ZipFile(packed, "w") as archive:
    archive.writestr("a.jsonl", data)
  return packed.getvalue()


REFUSED = {
  "a zip archive": (zip_of(LINES), "unpack it"),
  "a 7-zip archive": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "unpack it"),
  "a RAR archive": (b"Rar!\x1a\x07\x01\0" + bytes(99), "unpack it"),
  "an lz4 file": (b"\x04\x22\x4d\x18" + bytes(99), "unpack it"),
  "a web page": (b"\n<!DOCTYPE html><html>404</html>", "download it again"),
  "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
  "text in UTF-16": (LINES.decode().encode("utf-16"), "UTF-8"),
}


@pytest.mark.parametrize("format", ["text", "webdataset", "llava", "obelics"])
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_for_the_true_reason(tmp_path, kind: str, format: str):
  """Whatever the file is called, and also within gzip."""
  data, fix = REFUSED[kind]
  name = {"webdataset": "a.tar", "obelics": "a.parquet"}.get(format, "a.jsonl")
  for number, bytes_ in enumerate((data, gzip.compress(data))):
    path = tmp_path / f"{number}{name}"
    path.write_bytes(bytes_)
    ((reason, count),) = build(format, path).bad.items()
    assert reason.startswith(f"{kind}: ")
    assert fix in reason
    assert count == 1


def test_a_tar_is_no_text(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(tar_of(SORTED))
  assert build("text", tmp_path / "a.jsonl").bad == {"a tar: unpack it": 1}


def test_the_cause_is_kept(tmp_path):
  """Of what is broken, the words of the library that found it."""
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES * 99)[:-30])
  built = build("text", tmp_path / "a.jsonl.gz")
  assert built.bad["broken .gz file"] == 1
  assert "EOFError" in built.found["broken .gz file"]


PACKED = {
  "gzip": gzip.compress(LINES),
  "zstd": zstandard.compress(LINES),
  "zstd of a long window": long_window(LINES, 28),
  "zstd of the longest window": long_window(LINES, 31),
  "zstd of two frames": zstandard.compress(LINES[:40]) + zstandard.compress(LINES[40:]),
  "zstd after a frame that is skipped": b"\x50\x2a\x4d\x18\4\0\0\0abcd" + zstandard.compress(LINES),
  "bzip2": bz2.compress(LINES),
  "bzip2 of two streams": bz2.compress(LINES[:40]) + bz2.compress(LINES[40:]),
  "xz": lzma.compress(LINES),
  "xz, padded": lzma.compress(LINES) + bytes(8),
  "none": LINES,
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.zst", "a.jsonl.xz"])
@pytest.mark.parametrize("case", PACKED)
def test_compression_by_content(tmp_path, case: str, name: str):
  (tmp_path / name).write_bytes(PACKED[case])
  built = build("text", tmp_path / name)
  assert (built.texts(), built.bad) == (DOCUMENTS, {})


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
def test_compressed_files_that_break_off(tmp_path, pack):
  data = pack(b"".join(b"%d %s\n" % (i, random.randbytes(90).hex().encode()) for i in range(3000)))
  for share in (0.3, 0.9, 0.999):
    (tmp_path / "a").write_bytes(data[: int(share * len(data))])
    with pytest.raises(BrokenFile, match="broken"), files.reading("a"):
      files.read_whole(str(tmp_path / "a"), BOUNDS)


def test_a_window_above_the_bound(tmp_path):
  """Its own reason, and no other memory than the bound."""
  for name, data in (("a.zst", long_window(LINES, 28)), ("a.xz", lzma.compress(LINES, preset=9))):
    (tmp_path / name).write_bytes(data)
    built = build("text", tmp_path / name, max_window_mb=8)
    assert built.bad == {"window of zstd or xz above --max-window-mb": 1}


def test_a_store_of_pictures(tmp_path):
  """macOS' files hide no picture of theirs; what cannot be read at random is refused by name."""
  (tmp_path / "a.tar").write_bytes(tar_of(MACOS))
  index = str(tmp_path / "index.sqlite")
  images.index_tars(files.match(f"{tmp_path}/a.tar", "--images"), index)
  assert images.Tars(index, 10**6).read(Image("00003.jpg")) == JPEG
  for name, data in (("b.tar", gzip.compress(tar_of(SORTED))), ("c.tar", zip_of(b"x"))):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name} is .*unpack it"):
      images.index_tars(files.match(f"{tmp_path}/{name}", "--images"), index + name)


def test_litter_among_files(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(LINES)
  (tmp_path / "._a.jsonl").write_bytes(APPLE)
  assert [part.path for part in files.match(f"{tmp_path}/*", "--input")] == [f"{tmp_path}/a.jsonl"]
  with pytest.raises(DataError, match="only what an operating system put"):
    files.match(f"{tmp_path}/._*", "--input")


# --- JSON


ROWS = [{"text": f"caption {i}", "n": [1, {"a": "}\n{"}]} for i in range(6)]
LISTED = [{"text": f"caption {i}"} for i in range(6)]


def compact(value: Any) -> str:
  return json.dumps(value, separators=(",", ":"))


JSONS = {
  "lines": "\n".join(map(json.dumps, ROWS)),
  "lines of Windows": "\r\n".join(map(json.dumps, ROWS)),
  "lines with empty ones": "\n\n" + "\n\n".join(map(json.dumps, ROWS)),
  "lines with commas": ",\n".join(map(json.dumps, ROWS)),
  "lines with separators": "".join(f"\x1e{json.dumps(row)}\n" for row in ROWS),
  "list": json.dumps(ROWS),
  "pretty list": json.dumps(ROWS, indent=2),
  "list after a mark": "\ufeff" + json.dumps(ROWS),
  "pretty lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
  "pretty lines, not indented": "\n".join(json.dumps(row, indent=0) for row in ROWS),
  "pretty lines, apart": "\n\n".join(json.dumps(row, indent=4) for row in ROWS) + "\n",
  "pretty lines of Windows": "\r\n".join(json.dumps(r, indent=2) for r in ROWS).replace(
    "\n", "\r\n"
  ),
  "wrapped": json.dumps({"data": ROWS, "version": 1}),
  "wrapped, compact": compact({"version": 1, "data": ROWS}),
  "wrapped, pretty": json.dumps({"info": {"year": 2024}, "annotations": ROWS}, indent=1),
  "wrapped beside lists of texts": json.dumps(
    {"tags": ["a", "b"], "rows": ROWS, "n": [1]}, indent=1
  ),
  "wrapped, after a mark": "\ufeff" + json.dumps({"train": ROWS}),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", JSONS)
def test_layouts_of_json(tmp_path, case: str, packed: bool):
  data = JSONS[case].encode()
  (tmp_path / "a.json").write_bytes(gzip.compress(data) if packed else data)
  for rows_per_shard in (1, 1000):
    built = build("text", tmp_path / "a.json", rows_per_shard=rows_per_shard)
    assert (built.texts(), built.bad) == (DOCUMENTS, {})


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_one_document(tmp_path, indent):
  """An object with the field that is looked for is a row, and what lists it has are its own."""
  row = {"text": "alone", "sections": [{"title": "x"}, {"title": "y"}]}
  (tmp_path / "a.json").write_text(json.dumps(row, indent=indent))
  assert build("text", tmp_path / "a.json").texts() == [["alone"]]


def test_one_conversation(tmp_path):
  turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
  (tmp_path / "a.json").write_text(json.dumps({"conversations": turns}, indent=2))
  assert build("llava", tmp_path / "a.json").texts() == [["Hi", "Yes"]]


def test_two_lists_are_told(tmp_path):
  """Which one is meant is not known: the keys are said."""
  (tmp_path / "a.json").write_text(json.dumps({"train": LISTED, "test": LISTED}, indent=2))
  built = build("text", tmp_path / "a.json")
  assert built.bad == {"'text' is missing": 1}
  assert built.found["'text' is missing"].startswith("its keys are 'train', 'test'; looked for")


def test_an_odd_row_among_pretty_ones(tmp_path):
  rows = [json.dumps(row, indent=2) for row in LISTED]
  rows[2] = rows[2].replace('"text":', '"text"')
  rows[4] = rows[4][:-2] + "]\n}"
  (tmp_path / "a.jsonl").write_text("\n".join(rows))
  built = build("text", tmp_path / "a.jsonl")
  assert built.bad == {"not JSON": 2}
  assert built.texts() == [DOCUMENTS[i] for i in (0, 1, 3, 5)]


def test_the_first_line_may_be_the_odd_one(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(b'{"text": \n' + LINES)
  built = build("text", tmp_path / "a.jsonl")
  assert (built.texts(), built.bad) == (DOCUMENTS, {"not JSON": 1})


def test_rows_in_parquet(tmp_path):
  """Conversations and pages, whatever the file is called."""
  turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
  pyarrow.parquet.write_table(pa.table({"conversations": [turns] * 3}), tmp_path / "a.json")
  assert build("llava", tmp_path / "a.json").texts() == [["Hi", "Yes"]] * 3
  (tmp_path / "b.parquet").write_text(json.dumps({"texts": ["a"], "images": [None]}))
  assert build("obelics", tmp_path / "b.parquet").texts() == [["a"]]


def test_captions_in_parquet(tmp_path):
  """As Hugging Face keeps them; a null caption loses its row alone."""
  rows = [{"image": {"bytes": JPEG, "path": None}, "caption": c} for c in ("a", None, "c\n")]
  pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
  built = build("webdataset", tmp_path / "a.parquet")
  assert built.texts() == [["<image>", "a"], ["<image>", "c"]]
  assert built.bad == {"no caption": 1}


# --- cells


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("store")
  for i in range(8):
    (folder / f"{i}.jpg").write_bytes(hostile.encode("JPEG", (20 + i, 20)))
  return folder


# image_info of a page of "a.", "b.", "c."; what is read; what is lost.
NOWHERE = "'matched_text_index' is not in 'text_list'"
PAGES = {
  "right": ([{"image_name": "1.jpg", "matched_text_index": 1}], ["a.", "<image>", "b. c."], ""),
  "index as a float": (
    [{"image_name": "1.jpg", "matched_text_index": 1.0}],
    ["a.", "<image>", "b. c."],
    "",
  ),
  "half an index": ([{"image_name": "1.jpg", "matched_text_index": 0.5}], ["a. b. c."], NOWHERE),
  "null index": ([{"image_name": "1.jpg", "matched_text_index": None}], ["a. b. c."], NOWHERE),
  "no index": ([{"image_name": "1.jpg"}], ["a. b. c."], NOWHERE),
  "negative": ([{"image_name": "1.jpg", "matched_text_index": -1}], ["a. b. c."], NOWHERE),
  "beyond": ([{"image_name": "1.jpg", "matched_text_index": 3}], ["a. b. c."], NOWHERE),
  "not a number": (
    [{"image_name": "1.jpg", "matched_text_index": float("nan")}],
    ["a. b. c."],
    NOWHERE,
  ),
  "null": (None, ["a. b. c."], ""),
  "null name": (
    [{"image_name": None, "matched_text_index": 0}],
    ["a. b. c."],
    "image without bytes, name or URL",
  ),
  "a name": (["1.jpg"], ["a. b. c."], "an entry of 'image_info' is no object"),
  "an odd one beside a right one": (
    [None, {"image_name": "1.jpg", "matched_text_index": 0}],
    ["<image>", "a. b. c."],
    "an entry of 'image_info' is no object",
  ),
}


@pytest.mark.parametrize("case", PAGES)
def test_mmc4(tmp_path, store, case: str):
  info, texts, lost = PAGES[case]
  row = {"text_list": ["a.", "b.", "c."], "image_info": info}
  (tmp_path / "a.jsonl").write_text(json.dumps(row))
  built = build("mmc4", tmp_path / "a.jsonl", store)
  assert (built.texts(), built.bad, built.lost) == ([texts], {}, {lost: 1} if lost else {})
  if lost:  # the page goes with its picture, if that is asked for
    built = build("mmc4", tmp_path / "a.jsonl", store, lost_images="document")
    assert (built.records, built.bad) == ([], {lost: 1})


def test_mmc4_null_sentence(tmp_path, store):
  info = [{"image_name": "1.jpg", "matched_text_index": 1}]
  row = {"text_list": ["a", None, "c"], "image_info": info}
  (tmp_path / "a.jsonl").write_text(json.dumps(row))
  built = build("mmc4", tmp_path / "a.jsonl", store)
  assert built.texts() == [["a", "<image>", "c"]]
  assert built.skipped == {"text that is null or of another type": 1}


def test_obelics(tmp_path, store):
  rows = [
    {"texts": [None, "t"], "images": [{"bytes": None, "path": "1.jpg"}, None]},
    {"texts": ["u", None], "images": [None, {"bytes": JPEG, "path": "gone.jpg"}]},
    {"texts": ["v", None], "images": [None, {"bytes": None, "path": None}]},
    {"texts": ["w", None], "images": [None, {"bytes": b"", "path": "2.jpg"}]},
    {"texts": ["x", None], "images": [None, None]},
    {"texts": ["y", "z"], "images": [None, {"bytes": JPEG, "path": None}]},
  ]
  struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  columns = {
    "texts": pa.array([row["texts"] for row in rows], pa.list_(pa.string())),
    "images": pa.array([row["images"] for row in rows], pa.list_(struct)),
  }
  pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
  built = build("obelics", tmp_path / "a.parquet", store)
  pictured = [["<image>", "t"], ["u", "<image>"], ["v"], ["w", "<image>"], ["x"], ["y\nz"]]
  assert built.texts() == pictured
  assert built.lost == {
    "image without bytes, name or URL": 1,
    "place with both a text and an image": 1,
  }
  assert built.skipped == {"place with neither a text nor an image": 1}
  assert built.bad == {}


USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
LOOK = {"role": "user", "content": "<image>What?"}
URL = "data:image/jpeg;base64," + base64.b64encode(JPEG).decode()


def asked(*items: Any) -> dict[str, Any]:
  return {"role": "user", "content": list(items)}


TEXT = {"type": "text", "text": "What?"}
SHOWN = ["<image>", "What?", "Yes"]
TALKS = {
  "messages": ({"messages": [USER, BOT]}, ["Hi", "Yes"]),
  "messages with a picture": ({"messages": [LOOK, BOT], "images": ["1.jpg"]}, SHOWN),
  "an image that is a text": ({"messages": [LOOK, BOT], "image": "1.jpg"}, SHOWN),
  "an image that is null": ({"messages": [USER, BOT], "image": None, "images": []}, ["Hi", "Yes"]),
  "an image of bytes null": (
    {"messages": [LOOK, BOT], "images": [{"bytes": None, "path": "1.jpg"}]},
    SHOWN,
  ),
  "an image alone": ({"messages": [LOOK, BOT], "images": {"path": "1.jpg"}}, SHOWN),
  "content lists": (
    {"messages": [asked({"type": "image"}, TEXT), BOT], "images": ["1.jpg"]},
    SHOWN,
  ),
  "an item with a path": (
    {"messages": [asked({"type": "image", "path": "1.jpg"}, TEXT), BOT]},
    SHOWN,
  ),
  "an item with a name": (
    {"messages": [asked({"type": "image", "image": "1.jpg"}, TEXT), BOT]},
    SHOWN,
  ),
  "an item that images lists too": (
    {"messages": [asked({"type": "image", "image": "1.jpg"}, TEXT), BOT], "images": ["1.jpg"]},
    SHOWN,
  ),
  "an item with an index": (
    {"messages": [asked({"type": "image", "index": 0}, TEXT), BOT], "images": ["1.jpg"]},
    SHOWN,
  ),
  "an item with an index as a float": (
    {"messages": [asked({"type": "image", "index": 0.0}, TEXT), BOT], "images": ["1.jpg"]},
    SHOWN,
  ),
  "image_url": (
    {"messages": [asked({"type": "image_url", "image_url": {"url": URL}}, TEXT), BOT]},
    SHOWN,
  ),
  "input_text": ({"messages": [asked({"type": "input_text", "text": "Hi"}), BOT]}, ["Hi", "Yes"]),
  "texts in a list": ({"messages": [asked("Hi"), BOT]}, ["Hi", "Yes"]),
  "system": (
    {"messages": [{"role": "system", "content": "Be kind."}, USER, BOT]},
    ["Be kind.", "Hi", "Yes"],
  ),
  "system as a list": (
    {"messages": [{"role": "system", "content": [{"type": "text", "text": "Be."}]}, USER, BOT]},
    ["Be.", "Hi", "Yes"],
  ),
  "roles in LLaVA's form": (
    {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yes"}]},
    ["Hi", "Yes"],
  ),
  "LLaVA's roles in capitals": (
    {"conversations": [{"from": "Human", "value": "Hi"}, {"from": " GPT ", "value": "Yes"}]},
    ["Hi", "Yes"],
  ),
  "both forms": ({"conversations": [{"from": "human", "value": "Hi"}, BOT]}, ["Hi", "Yes"]),
  "a number as the answer": (
    {"conversations": [USER, {"from": "gpt", "value": 3}], "id": 7.0},
    ["Hi", "3"],
  ),
  "edges": (
    {
      "messages": [
        asked({"type": "text", "text": " Hi \r\n"}),
        {**BOT, "content": "\n Yes\u3000\n"},
      ]
    },
    ["Hi", "Yes"],
  ),
  "null conversations beside messages": (
    {"conversations": None, "messages": [USER, BOT]},
    ["Hi", "Yes"],
  ),
}


@pytest.mark.parametrize("case", TALKS)
def test_conversations(tmp_path, store, case: str):
  row, texts = TALKS[case]
  (tmp_path / "a.json").write_text(json.dumps([row]))
  built = build("llava", tmp_path / "a.json", store)
  assert (built.texts(), built.bad) == ([texts], {})


MISSED = {
  "a near name": ({"convrsations": [USER, BOT]}, "is it 'convrsations'?"),
  "other keys": ({"prompt": "x", "answer": "y"}, "its keys are 'prompt', 'answer'; looked for"),
  "a null": ({"conversations": None}, "'conversations' is null"),
  "no keys": ({}, "its keys are none"),
  "another type": ({"conversations": {"a": 1}}, "it is {'a': 1}"),
  "another role": ({"messages": [{"role": "tool", "content": "x"}, BOT]}, "tool"),
  "more slots": ({"messages": [LOOK, BOT], "images": []}, "0 images"),
  "another item": ({"messages": [asked({"type": "video", "video": "a.mp4"}), BOT]}, "a.mp4"),
}


@pytest.mark.parametrize("case", MISSED)
def test_what_was_found_is_told(tmp_path, store, case: str):
  row, found = MISSED[case]
  (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
  built = build("llava", tmp_path / "a.jsonl", store)
  ((_, told),) = built.found.items()
  assert found in told


def test_the_end_of_a_build_tells_the_first(tmp_path):
  (tmp_path / "a.jsonl").write_text(json.dumps({"content": "x"}) + "\n")
  with pytest.raises(
    DataError, match=r"a\.jsonl, byte 0: its keys are 'content'; looked for 'text'"
  ):
    main(["text", f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out"])


def test_skipped_parts_are_in_the_manifest(tmp_path, capsys):
  (tmp_path / "a.tar").write_bytes(tar_of(MACOS))
  main(["webdataset", f"--input={tmp_path}/a.tar", f"--output={tmp_path}/out"])
  read_back = json.loads((tmp_path / "out-manifest.json").read_text())
  assert read_back["skipped"] == {containers.LITTER: 12}
  assert (read_back["rows"], read_back["records"]) == (6, 6)
  assert f"12  {containers.LITTER}" in capsys.readouterr().out


def test_coco_with_numbers_as_floats(tmp_path, store):
  value = {
    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2.0, "file_name": "2.jpg"}],
    "annotations": [
      {"id": 1.0, "image_id": 1.0, "caption": "one\r\n"},
      {"id": 2, "image_id": 2, "caption": 22},
      {"id": 3, "image_id": 2, "caption": None},
    ],
  }
  (tmp_path / "a.json").write_text(json.dumps(value))
  built = build("coco", tmp_path / "a.json", store)
  assert built.texts() == [["<image>", "one"], ["<image>", "22"]]
  assert [record["id"] for record in built.records] == ["1", "2"]
  assert built.bad == {"no caption": 1}


# --- fuzz


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lines", "pretty lines", "wrapped", "wrapped, pretty", "list"])
def test_changed_json(tmp_path, case: str):
  """Files changed at random, by seed: rows or reasons, and no other error."""
  path = tmp_path / "a.json"
  for data in fuzz.mutations(JSONS[case].encode(), 400, seed=3):
    path.write_bytes(data)
    build("text", path)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["llava", "mmc4", "obelics"])
def test_changed_rows(tmp_path, store, format: str):
  row: dict[str, Any] = {
    "llava": TALKS["content lists"][0],
    "mmc4": {"text_list": ["a", "b"], "image_info": PAGES["right"][0], "url": "http://a"},
    "obelics": {"texts": ["a", None], "images": [None, {"bytes": None, "path": "1.jpg"}]},
  }[format]
  path = tmp_path / "a.jsonl"
  for data in fuzz.mutations(json.dumps(row).encode(), 1500, seed=4):
    path.write_bytes(data)
    assert "not of the format" not in " ".join(build(format, path, store).bad)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "tgz", "zstd", "bzip2", "xz", "macOS", "pictures first"])
def test_changed_tars(tmp_path, case: str):
  path = tmp_path / "a"
  for data in fuzz.mutations(TARS[case][1], 300, seed=5):
    path.write_bytes(data)
    build("webdataset", path)


@pytest.mark.slow
@pytest.mark.parametrize("case", PACKED)
def test_changed_frames_in_bounded_memory(tmp_path, case: str):
  path = tmp_path / "a.jsonl"
  tracemalloc.start()
  for data in fuzz.mutations(PACKED[case], 300, seed=6):
    path.write_bytes(data)
    build("text", path, max_window_mb=64)
  assert tracemalloc.get_traced_memory()[1] < 200_000_000
  tracemalloc.stop()


def test_all_layouts_have_a_name():
  assert {layouts.LINES, layouts.ARRAY, layouts.WRAPPED, layouts.VALUES} <= {
    layouts.detect(io.BytesIO(text.encode()), ("text",), BOUNDS).kind for text in JSONS.values()
  }
