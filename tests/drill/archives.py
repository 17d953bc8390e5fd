# SPDX-License-Identifier: Apache-2.0
"""Archives and tables of strangers, given to `data.build`: small files that ask for much.

A build refuses one in one line, or drops and counts the row; neither takes long or much memory.
"""

import functools
import gzip
import io
import json
import pathlib
import tarfile
from collections.abc import Callable, Iterator

from tests.drill.core import REFUSED, Expected, Fault, Outcome, Scene, shell
from tests.drill.process import Process
from tests.drill.runs import ADDRESS_SPACE_KB
from tests.helpers.hostile import png_of

WITHIN, MOST_GB = 45, 1.0  # Beam alone takes a third of it
BOMB = 1_500_000_000  # bytes, of a few when compressed
# Makes the input in a folder; returns the format, and the flags beside --output.
Make = Callable[[pathlib.Path], tuple[str, list[str]]]


def faults() -> Iterator[Fault]:
  cases: dict[str, Make] = {
    "pax-of-digits": pax_digits,
    "gnu-long-name": long_name,
    "pax-bomb": pax_bomb,
    "member-bomb": member_bomb,
    "json-line-bomb": json_line_bomb,
    "coco-json-bomb": coco_bomb,
    "parquet-cell": parquet_cell,
    "deep-json-lines": deep_lines,
    "deep-coco": deep_coco,
    "paths-and-links": paths_and_links,
    "100000-members": many_members,
    "torn-tar": torn_tar,
    "torn-gzip": torn_gzip,
  }
  quick = ("pax-of-digits", "gnu-long-name", "parquet-cell")
  for name, make in cases.items():
    strike = functools.partial(build, make=make)
    yield Fault(f"archives/{name}", strike, quick=name in quick)


def build(scene: Scene, *, make: Make) -> None:
  """Builds from it; what is no row of ours is refused or counted."""
  source = scene.folder / "in"
  source.mkdir()
  kind, flags = make(source)
  output = scene.folder / "out" / "rows"
  process: Process = scene.start(
    "mm1_jax.data.build",
    kind,
    f"--output={output}",
    "--max-bad-fraction=1",
    "--direct_num_workers=1",
    *flags,
    wrapped=shell(f"ulimit -v {ADDRESS_SPACE_KB}"),
  )
  ended = scene.finish(process, Expected((0, REFUSED), within=WITHIN, most_gb=MOST_GB))
  for path in source.parent.rglob("escaped*"):
    scene.add(Outcome.WRONG, f"{path} was written")
  if ended.code == 0:
    manifest = json.loads(pathlib.Path(f"{output}-manifest.json").read_text())
    scene.message = f"{manifest['records']} records, {manifest['bad']} left out"


def pax_digits(folder: pathlib.Path) -> tuple[str, list[str]]:
  """A header of 1 MB of digits: tarfile's own pattern takes time that grows with its square."""
  with (folder / "a.tar").open("wb") as file:
    _header(file, tarfile.XHDTYPE, 1_000_000)
    file.write(b"9" * 1_000_448 + bytes(10_240))
  return _webdataset(folder, "a.tar")


def long_name(folder: pathlib.Path) -> tuple[str, list[str]]:
  return _tar_bomb(folder, tarfile.GNUTYPE_LONGNAME, b"a")


def pax_bomb(folder: pathlib.Path) -> tuple[str, list[str]]:
  return _tar_bomb(folder, tarfile.XHDTYPE, b"9")


def member_bomb(folder: pathlib.Path) -> tuple[str, list[str]]:
  return _tar_bomb(folder, tarfile.REGTYPE, b"\0")


def json_line_bomb(folder: pathlib.Path) -> tuple[str, list[str]]:
  _bomb(folder / "a.jsonl.gz", b'{"text":"', b"a", b'"}\n{"text":"good"}\n')
  return "text", [f"--input={folder}/a.jsonl.gz"]


def coco_bomb(folder: pathlib.Path) -> tuple[str, list[str]]:
  _bomb(folder / "a.json.gz", b'{"annotations":[],"images":[],"x":"', b"a", b'"}')
  return "coco", [f"--input={folder}/a.json.gz", f"--images={folder}"]


def parquet_cell(folder: pathlib.Path) -> tuple[str, list[str]]:
  """One cell of 300 MB, in a file of 10 kB."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  table = pa.table({"text": pa.array(["a" * 300_000_000, "good"])})
  pq.write_table(
    table, folder / "a.parquet", compression="zstd", use_dictionary=False, write_statistics=False
  )
  return "text", [f"--input={folder}/a.parquet"]


def deep_lines(folder: pathlib.Path) -> tuple[str, list[str]]:
  deep = b"[" * 1_000_000 + b"]" * 1_000_000
  (folder / "a.jsonl").write_bytes(deep + b'\n{"text": "good"}\n' + b'{"text":' * 1_000_000 + b"\n")
  return "text", [f"--input={folder}/a.jsonl"]


def deep_coco(folder: pathlib.Path) -> tuple[str, list[str]]:
  deep = b"[" * 1_000_000 + b"]" * 1_000_000
  (folder / "a.json").write_bytes(b'{"annotations":' + deep + b',"images":[]}')
  return "coco", [f"--input={folder}/a.json", f"--images={folder}"]


def paths_and_links(folder: pathlib.Path) -> tuple[str, list[str]]:
  """Members that leave their folder, links to files of the machine, a device, a pickle."""
  picture = png_of(2, 2)
  with tarfile.open(folder / "a.tar", "w") as tar:
    for name in ("../escaped.png", f"{folder.parent}/escaped.png", "c.pkl", "good.png"):
      _add(tar, tarfile.TarInfo(name), picture)
      _add(tar, tarfile.TarInfo(f"{name.rpartition('.')[0]}.txt"), b"a caption")
    for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../../etc/passwd")):
      info = tarfile.TarInfo(f"link{kind[0]}.png")
      info.type, info.linkname = kind, target
      tar.addfile(info)
    device = tarfile.TarInfo("device.png")
    device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 5
    tar.addfile(device)
  return _webdataset(folder, "a.tar")


def many_members(folder: pathlib.Path) -> tuple[str, list[str]]:
  with tarfile.open(folder / "a.tar", "w") as tar:
    for i in range(100_000):
      _add(tar, tarfile.TarInfo(f"{i:06d}.png"), b"")
  return _webdataset(folder, "a.tar")


def torn_tar(folder: pathlib.Path) -> tuple[str, list[str]]:
  with tarfile.open(folder / "a.tar", "w") as tar:
    for i in range(20):
      _add(tar, tarfile.TarInfo(f"{i}.png"), png_of(2, 2))
      _add(tar, tarfile.TarInfo(f"{i}.txt"), b"a caption")
  data = (folder / "a.tar").read_bytes()
  (folder / "a.tar").write_bytes(data[: len(data) // 2 + 100])
  return _webdataset(folder, "a.tar")


def torn_gzip(folder: pathlib.Path) -> tuple[str, list[str]]:
  data = gzip.compress(b'{"text": "one of many documents"}\n' * 5000)
  (folder / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
  return "text", [f"--input={folder}/a.jsonl.gz"]


def _tar_bomb(folder: pathlib.Path, kind: bytes, filling: bytes) -> tuple[str, list[str]]:
  header = io.BytesIO()
  _header(header, kind, BOMB)
  _bomb(folder / "a.tar.gz", header.getvalue(), filling, bytes(-BOMB % 512 + 10_240))
  return _webdataset(folder, "a.tar.gz")


def _bomb(path: pathlib.Path, before: bytes, filling: bytes, after: bytes) -> None:
  """Writes a gzip file of `BOMB` times the same byte between two others."""
  block = filling * 1_000_000
  with gzip.open(path, "wb", 1) as file:
    file.write(before)
    for _ in range(BOMB // len(block)):
      file.write(block)
    file.write(after)


def _header(file, kind: bytes, size: int) -> None:
  info = tarfile.TarInfo("a.png")
  info.type, info.size = kind, size
  file.write(info.tobuf(tarfile.GNU_FORMAT))


def _add(tar: tarfile.TarFile, info: tarfile.TarInfo, data: bytes) -> None:
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))


def _webdataset(folder: pathlib.Path, name: str) -> tuple[str, list[str]]:
  return "webdataset", [f"--input={folder}/{name}", "--min-side=1", "--max-aspect=100"]
