# SPDX-License-Identifier: Apache-2.0
"""Small files that claim or become large ones: dropped, counted, in seconds and bounded memory."""

import gzip
import io
import json
import pathlib
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet
import pytest

from mm1_jax.config import ConfigError
from mm1_jax.data.build import files, tables, tars
from mm1_jax.data.build.__main__ import main
from mm1_jax.data.build.bounds import (
  BOUNDS,
  FILE_TOO_LARGE,
  HEADER_TOO_LONG,
  PAGE_TOO_LARGE,
  ROW_TOO_LONG,
)
from mm1_jax.data.build.rows import BrokenFile
from mm1_jax.data.build.tars import SPARSE
from tests.helpers.hostile import encode

BROKEN = "broken .tar file"
END = bytes(10_240)
MB = 1_000_000


def header(kind: bytes, size: int, name: str = "x") -> bytes:
  info = tarfile.TarInfo(name)
  info.type, info.size = kind, size
  return info.tobuf(tarfile.GNU_FORMAT)


def block(data: bytes) -> bytes:
  return data + bytes(-len(data) % 512)


def pax(*records: tuple[str, str]) -> bytes:
  lines = b""
  for key, value in records:
    body = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = len(body) + len(str(len(body) + len(str(len(body)))))
    lines += f"{length}".encode() + body
  return header(tarfile.XHDTYPE, len(lines)) + block(lines)


def member(name: str, data: bytes) -> bytes:
  return header(tarfile.REGTYPE, len(data), name) + block(data)


def zipped(path: pathlib.Path, begin: bytes, fill: bytes, megabytes: int, end: bytes = b"") -> None:
  with gzip.open(path, "wb", 1) as file:
    file.write(begin)
    for _ in range(megabytes):
      file.write(fill * (MB // len(fill)))
    file.write(end)


GOOD = member("a.txt", b"first")
TARS = {  # what is after the first member: the reason of the rest
  "digits": (header(tarfile.XHDTYPE, 10**6) + b"9" * 1_000_448 + END, HEADER_TOO_LONG),
  "fewer digits": (header(tarfile.XHDTYPE, 63_999) + b"9" * 64_000 + END, BROKEN),
  "no equals sign": (header(tarfile.XHDTYPE, 60_000) + b"9 " * 30_000 + END, BROKEN),
  "long name": (header(tarfile.GNUTYPE_LONGNAME, 3 * 10**9) + END, HEADER_TOO_LONG),
  "long link": (header(tarfile.GNUTYPE_LONGLINK, 10**6) + END, HEADER_TOO_LONG),
  "global": (header(tarfile.XGLTYPE, 10**6) + END, HEADER_TOO_LONG),
  "negative": (pax(("size", "-512")) + member("b.txt", b"x") + END, BROKEN),
  "size of letters": (pax(("size", "x")) + member("b.txt", b"x") + END, BROKEN),
  "record of 0": (header(tarfile.XHDTYPE, 6) + block(b"0 a=b\n") + END, BROKEN),
  "record beyond": (header(tarfile.XHDTYPE, 7) + block(b"99 a=b\n") + END, BROKEN),
  "sparse": (header(tarfile.GNUTYPE_SPARSE, 512) + bytes(512) + END, SPARSE),
  "no end": (member("b.txt", b"x")[:-100], BROKEN),
}


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_header_ends_a_tar(tmp_path, name):
  data, reason = TARS[name]
  (tmp_path / "a.tar").write_bytes(GOOD + data)
  members = tars.tar_members(str(tmp_path / "a.tar"), lambda _: True)
  info, content = next(members)
  assert (info.name, content) == ("a.txt", b"first")
  with pytest.raises(BrokenFile) as error:
    list(members)
  assert error.value.reason == reason


def test_a_chain_of_headers_is_no_recursion(tmp_path):
  (tmp_path / "a.tar").write_bytes(pax(("path", "b.txt")) * 5000 + GOOD + END)
  ((info, data),) = tars.tar_members(str(tmp_path / "a.tar"), lambda _: True)
  assert (info.name, data) == ("b.txt", b"first")


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_members_are_those_of_tarfile(tmp_path, kind, ending):
  """With long names, umlauts, no UTF-8, links, folders and files of all lengths around a block."""
  long = "" if kind == tarfile.USTAR_FORMAT else "x" * 200
  names = [f"{i}/{'d' * i}{long}\u00e4.txt" for i in range(40)]
  names += [] if kind == tarfile.USTAR_FORMAT else [f"{'y' * 3000}/\udcff.png"]
  with tarfile.open(tmp_path / f"a{ending}", "w:gz" if "gz" in ending else "w", format=kind) as tar:
    for i, name in enumerate(names):
      info = tarfile.TarInfo(name)
      info.size = (0, 1, 511, 512, 513, 70_000)[i % 6]
      info.mtime = 1.5 if kind == tarfile.PAX_FORMAT else 1
      tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
      for type_ in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        other = tarfile.TarInfo(f"{i}.other")
        other.type, other.linkname = type_, f"z{long}"
        tar.addfile(other)
  with tarfile.open(tmp_path / f"a{ending}", errors="surrogateescape") as tar:
    expected = [
      (m.name, m.size, m.offset_data, f.read() if (f := m.isreg() and tar.extractfile(m)) else None)
      for m in tar
      if not m.isdir()
    ]
  found = [
    (m.name, m.size, m.offset_data, data)
    for m, data in tars.tar_members(str(tmp_path / f"a{ending}"), lambda _: True)
  ]
  assert found == expected
  passed = tars.tar_members(str(tmp_path / f"a{ending}"), lambda _: False)
  assert [(m.name, data) for m, data in passed] == [(name, None) for name, *_ in expected]


def test_what_is_decompressed_is_counted(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  zipped(path, b'{"text": "a"}\n' * 50, b"b" * 9_999 + b"\n", 20)
  (file,) = files.match(str(path), "--input")
  rows = files.json_rows(file, BOUNDS._replace(file=5 * MB))
  assert next(rows).value == {"text": "a"}
  with pytest.raises(BrokenFile) as error:
    list(rows)
  assert error.value.reason == FILE_TOO_LARGE


def test_pages_and_rows_of_parquet(tmp_path):
  """Of three groups the middle one is not read; of the last one row is dropped."""
  path = str(tmp_path / "a.parquet")
  groups = (["a", "b"], ["c" * 30 * MB, "d"], ["e", "f" * 8 * MB, "g"])
  schema = pa.schema({"text": pa.string(), "n": pa.int32()})
  with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
    for group in groups:
      writer.write_table(pa.table({"text": group, "n": [1] * len(group)}, schema=schema))
  (file,) = files.match(path, "--input")
  (part,) = tables.split_parquet(file, 100)
  bounds = BOUNDS._replace(row=5 * MB, page=20 * MB)
  rows = list(tables.parquet_rows(part, ("text",), bounds))
  assert [row.value and row.value["text"] for row in rows] == ["a", "b", None, "e", None, "g"]
  assert [row.error for row in rows if row.error] == [PAGE_TOO_LARGE, ROW_TOO_LONG]
  assert [row.place for row in rows] == ["row 0", "row 1", "row group 1", "row 4", "row 5", "row 6"]
  # A column that is not read may have any size.
  numbers = [row.value for row in tables.parquet_rows(part, ("n",), bounds)]
  assert numbers == [{"n": 1}] * 7


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_headers_of_all_pages_are_read(tmp_path, codec, version, dictionary):
  from mm1_jax import parquet

  path = tmp_path / "a.parquet"
  texts = [[f"text {i} {j}" * (i % 7) for j in range(i % 5)] for i in range(5000)]
  table = pa.table({"a": texts, "b": list(range(5000)), "c": [None] * 5000})
  pyarrow.parquet.write_table(
    table,
    path,
    compression=codec,
    data_page_version=version,
    use_dictionary=dictionary,
    data_page_size=2000,
    row_group_size=1500,
  )
  metadata = pyarrow.parquet.read_metadata(path)
  with path.open("rb") as file:
    for group in range(metadata.num_row_groups):
      columns = [metadata.row_group(group).column(i) for i in range(3)]
      size = parquet.group_size(file, metadata, group, ("a", "b", "c"))
      headers = 200 * sum(1 + c.total_uncompressed_size // 1000 for c in columns)
      total = sum(c.total_uncompressed_size for c in columns)
      assert total - headers <= size.total
      assert size.largest_page <= size.total
  parquet.check(path, 100_000_000)
  with pytest.raises(ValueError, match=r"a page of .* bytes in row group 0; 100 can be read"):
    parquet.check(path, 100)


CASES = """
import json, os, resource, sys, time
from mm1_jax.data.build import captions, files, tables, tars
from mm1_jax.data.build.bounds import BOUNDS
from mm1_jax.data.build.options import BuildOptions
from mm1_jax.data.build.rows import BrokenFile

MB = 1_000_000
BOUNDS = BOUNDS._replace(row=20 * MB, page=50 * MB, file=80 * MB)
OPTIONS = BuildOptions("coco", "", "", max_file_gb=0.05)

def lines(file): return files.json_rows(files.split_json(file, 9, BOUNDS)[0], BOUNDS)
def texts(file): return files.text_rows(file.path, "", "text", BOUNDS)
def table(file): return tables.parquet_rows(tables.split_parquet(file, 9)[0], ("text",), BOUNDS)
def members(file): return tars.tar_members(file.path, lambda _: True, BOUNDS)
def coco(file): return captions.coco_parts(file, OPTIONS)

READERS = {"jsonl": lines, "json": lines, "txt": texts, "parquet": table, "tar": members}
for path in sys.argv[1:]:
  if os.fork():
    os.wait()
    continue
  (file,) = files.match(path, "--input")
  read = coco if "coco" in path else READERS[files.suffix(path)[1:]]
  before, start, reasons = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time(), []
  try:
    for row in read(file):
      reasons += [row.error] if getattr(row, "error", "") else []
  except BrokenFile as e:
    reasons.append(e.reason)
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  print(json.dumps([os.path.basename(path), reasons, grown * 1024 // MB]), flush=True)
  os._exit(0)
"""


def test_memory_stays_within_the_bounds(tmp_path):
  """Files of some MB that become 150 MB: a row, a document, a cell, a name, a whole file."""
  zipped(tmp_path / "row.jsonl.gz", b'{"text":"', b"a", 70, b'"}\n{"text":"ok"}\n')
  zipped(tmp_path / "file.jsonl.gz", b'{"text":"', b"a", 150, b'"}\n')
  zipped(tmp_path / "array.json.gz", b'[{"text":"', b"a", 150, b'"}]')
  zipped(tmp_path / "text.txt.gz", b"", b"a", 150)
  zipped(tmp_path / "coco.json.gz", b'{"annotations":[],"images":[],"x":"', b"a", 150, b'"}')
  zipped(tmp_path / "name.tar.gz", header(tarfile.GNUTYPE_LONGNAME, 150 * MB), b"a", 150)
  cells = pa.table({"text": ["a" * 150 * MB, "ok"]})
  pyarrow.parquet.write_table(
    cells, tmp_path / "cell.parquet", compression="zstd", use_dictionary=False
  )
  del cells
  assert (tmp_path / "cell.parquet").stat().st_size < 40_000
  expected = {
    "row.jsonl.gz": [ROW_TOO_LONG],
    "file.jsonl.gz": [FILE_TOO_LARGE],
    "array.json.gz": [ROW_TOO_LONG],
    "text.txt.gz": [FILE_TOO_LARGE],
    "coco.json.gz": [FILE_TOO_LARGE],
    "name.tar.gz": [HEADER_TOO_LONG],
    "cell.parquet": [PAGE_TOO_LARGE],
  }
  command = [sys.executable, "-c", CASES, *(str(tmp_path / name) for name in expected)]
  output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  found = [json.loads(line) for line in output.splitlines()]
  assert {name: reasons for name, reasons, _ in found} == expected
  assert {name: grown for name, _, grown in found if grown > 110} == {}


def test_a_build_counts_what_is_above_its_flags(tmp_path):
  """The same file with and without a bound that it breaks."""
  (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "b" * 5000}) + "\n")

  def manifest(*flags: str) -> dict:
    main(["text", f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out", "--overwrite", *flags])
    return json.loads((tmp_path / "out-manifest.json").read_text())

  assert manifest()["records"] == 2
  bounded = manifest("--max-row-mb=0.004", "--max-bad-fraction=1")
  assert (bounded["records"], bounded["bad"]) == (1, {ROW_TOO_LONG: 1})
  with pytest.raises(ConfigError, match=r"--max-row-mb=0\.0 must be above 0"):
    manifest("--max-row-mb=0")


def test_a_build_drops_what_is_left_of_a_tar(tmp_path):
  picture = member("a.png", encode("PNG"))
  data = picture + GOOD + TARS["digits"][0]
  (tmp_path / "a.tar").write_bytes(data)
  flags = [f"--input={tmp_path}/a.tar", f"--output={tmp_path}/out", "--max-bad-fraction=1"]
  main(["webdataset", *flags])
  manifest = json.loads((tmp_path / "out-manifest.json").read_text())
  assert (manifest["records"], manifest["bad"]) == (1, {HEADER_TOO_LONG: 1})
