# SPDX-License-Identifier: Apache-2.0
"""Data that is damaged or replaced, under a run or between two of its launches."""

import functools
import os
import pathlib
import shutil
import signal
from collections.abc import Callable, Iterator

from tests.drill import runs
from tests.drill.core import REFUSED, Expected, Fault, Outcome, Scene
from tests.drill.process import ROOT

SAMPLE = ROOT / "mm1_jax" / "data" / "sample"
SOURCES = ("captions", "interleaved", "text")
NAMED = r"captions"  # the shard or the source


def faults() -> Iterator[Fault]:
  refused: dict[str, tuple[Callable[[Scene, pathlib.Path], None], str]] = {
    "records-in-reverse": (reverse, NAMED),
    "pictures-swapped": (swap_pictures, NAMED),
    "shard-truncated": (lambda scene, data: _halve(shard(data)), NAMED),
    "shard-removed": (lambda scene, data: shard(data).unlink(), NAMED),
    "shard-added": (add, NAMED),
    "tokenizer-replaced": (other_tokenizer, r"tokenizer"),
    "tokenizer-truncated": (lambda scene, data: _halve(data / "tokenizer.model"), r"tokenizer"),
  }
  quick = ("pictures-swapped", "shard-truncated")
  for name, (damage, says) in refused.items():
    strike = functools.partial(between_launches, damage=damage, says=says)
    yield Fault(f"shards/{name}", strike, quick=name in quick)
  yield Fault("shards/bit-in-a-picture", bit)
  yield Fault("shards/truncated-under-a-run", truncated_under_a_run)
  yield Fault("shards/index-torn", index_torn)
  yield Fault("shards/built-shard-bit", functools.partial(built_shard, damage=_flip_middle))
  yield Fault("shards/built-shard-truncated", functools.partial(built_shard, damage=_halve))
  yield Fault("shards/build-killed", build_killed)


def own_data(scene: Scene) -> tuple[pathlib.Path, dict[str, str]]:
  """Returns a copy of the sample, and the overrides that read it."""
  data = scene.folder / "data"
  data.mkdir()
  for path in (*SAMPLE.glob("*-train-*"), SAMPLE / "tokenizer.model"):
    if path.stem.split("-")[0] in (*SOURCES, "tokenizer"):
      shutil.copy(path, data)
  paths = {f"data.sources.{n}.path": f"{data}/{n}-train-*.arrayrecord" for n in SOURCES}
  return data, paths | {"data.tokenizer": f"{data}/tokenizer.model"}


def shard(data: pathlib.Path) -> pathlib.Path:
  return min(data.glob("captions-train-*"))


def between_launches(
  scene: Scene, *, damage: Callable[[Scene, pathlib.Path], None], says: str
) -> None:
  """Other data than the run began with: refused by name, and with the old data the run goes on."""
  data, overrides = own_data(scene)
  workdir, step = _begun(scene, overrides)
  shutil.copytree(data, scene.folder / "before")
  damage(scene, data)
  scene.finish(runs.start(scene, overrides), Expected((REFUSED,), says=says, within=120))
  if runs.newest(workdir) != step:
    scene.keeps([f"it was trained on, to step {runs.newest(workdir)}"])
    return
  shutil.rmtree(data)
  shutil.copytree(scene.folder / "before", data)
  runs.restart(scene, overrides)


def bit(scene: Scene) -> None:
  """One bit in the middle of a shard: it is told, or the record is dropped and counted.

  A bit that ArrayRecord's own checksum sees is an unreadable record.
  """
  data, overrides = own_data(scene)
  _begun(scene, overrides)
  _flip_middle(shard(data))
  says = r"captions.*(unreadable|damaged|changed|differ)"
  expected = Expected((0, REFUSED), says=says, within=180)
  scene.finish(runs.start(scene, overrides), expected)


def truncated_under_a_run(scene: Scene) -> None:
  """The run ends in one line that names the shard; what it had is saved, and it can continue."""
  data, overrides = own_data(scene)
  runs.reference(scene.lab)
  shutil.copytree(data, scene.folder / "before")
  process = runs.start(scene, overrides)
  process.wait_for(r"^step +4/")
  process.strike(signal.SIGCONT)  # marks the moment, and does nothing
  for path in data.glob("*.arrayrecord"):
    os.truncate(path, path.stat().st_size // 2)
  ended = scene.finish(process, Expected((0, REFUSED), says=r"captions|interleaved|text"))
  if ended.code == REFUSED:
    for path in (scene.folder / "before").glob("*.arrayrecord"):
      shutil.copy(path, data)
    runs.restart(scene, overrides)


def index_torn(scene: Scene) -> None:
  """The cache of lengths, cut in half or overwritten: made again."""
  runs.copy_of_base(scene)
  cache = shutil.copytree(scene.lab.env["MM1_JAX_CACHE"], scene.folder / "cache")
  files = [path for path in cache.rglob("*") if path.is_file()]
  if not files:
    raise RuntimeError("there is no index")
  for path in files:
    _halve(path) if scene.dice.random() < 0.5 else path.write_bytes(scene.dice.randbytes(500))
  process = runs.start(scene, env={"MM1_JAX_CACHE": str(cache)})
  scene.finish(process, Expected(within=180))
  scene.keeps(runs.differences(scene, scene.folder / "run"))


def built_shard(scene: Scene, *, damage: Callable[[pathlib.Path], None]) -> None:
  """A finished shard that is damaged is seen by a rebuild, and made again."""
  prefix = _build(scene)
  path = min(prefix.parent.glob("*.arrayrecord"))
  good = path.read_bytes()
  damage(path)
  if path.read_bytes() == good:
    raise RuntimeError(f"{path} is not damaged")
  ended = scene.finish(_builder(scene, prefix), Expected((0, REFUSED), says=path.name[:10]))
  if path.read_bytes() != good:
    scene.add(Outcome.WRONG, f"the shard stays damaged: exit code {ended.code}")


def build_killed(scene: Scene) -> None:
  """kill -9 of a build: started again, it makes what one that was not killed makes."""
  whole, prefix = _build(scene), scene.folder / "killed" / "rows"
  process = _builder(scene, prefix)
  process.wait_for(lambda: len([*prefix.parent.rglob("*.arrayrecord*")]) > 1)
  process.strike(signal.SIGKILL)
  process.end(30)
  scene.finish(_builder(scene, prefix), Expected(within=180))
  wanted, found = (
    {path.name: path.read_bytes() for path in one.parent.glob("*.arrayrecord")}
    for one in (whole, prefix)
  )
  scene.keeps([name for name in {**wanted, **found} if wanted.get(name) != found.get(name)])


def _begun(scene: Scene, overrides: dict[str, str]) -> tuple[pathlib.Path, int]:
  """Returns the workdir of a run that SIGTERM stopped, and its newest step."""
  runs.reference(scene.lab)
  process, workdir = runs.start(scene, overrides), scene.folder / "run"
  process.wait_for(lambda: runs.newest(workdir) >= runs.SAVE_EVERY)
  process.strike(signal.SIGTERM)
  scene.finish(process, Expected((runs.STOPPED,)), shown=False)
  return workdir, runs.newest(workdir)


def _builder(scene: Scene, prefix: pathlib.Path):
  args = (f"--input={scene.folder}/rows.jsonl", f"--output={prefix}", "--rows-per-shard=2000")
  return scene.start("mm1_jax.data.build", "text", *args)


def _build(scene: Scene) -> pathlib.Path:
  rows = "".join(f'{{"text": "document {i} has words, {i * i} of them"}}\n' for i in range(20_000))
  (scene.folder / "rows.jsonl").write_text(rows)
  prefix = scene.folder / "built" / "rows"
  scene.finish(_builder(scene, prefix), Expected(within=180), shown=False)
  return prefix


def reverse(scene: Scene, data: pathlib.Path) -> None:
  """The same records in another order: counts and sums stay."""
  _rewrite(shard(data), lambda records: records[::-1])


def swap_pictures(scene: Scene, data: pathlib.Path) -> None:
  """Each caption gets another one's picture."""
  import msgpack

  def swap(records: list[bytes]) -> list[bytes]:
    rows = [msgpack.unpackb(record) for record in records]
    places = [item for row in rows for item in row["content"] if "image" in item]
    pictures = [item["image"] for item in places]
    for item, picture in zip(places, pictures[1:] + pictures[:1], strict=True):
      item["image"] = picture
    return [msgpack.packb(row) for row in rows]

  _rewrite(shard(data), swap)


def add(scene: Scene, data: pathlib.Path) -> None:
  shutil.copy(shard(data), data / "captions-train-00009-of-00002.arrayrecord")


def other_tokenizer(scene: Scene, data: pathlib.Path) -> None:
  shutil.copy(SAMPLE / "tokenizer_1024.model", data / "tokenizer.model")


def _rewrite(path: pathlib.Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
  from array_record.python import array_record_module

  from mm1_jax.data.sources import WRITER_OPTIONS

  reader = array_record_module.ArrayRecordReader(str(path))
  records = reader.read_all()
  reader.close()
  writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
  for record in change(records):
    writer.write(record)
  writer.close()


def _flip_middle(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[min(len(data) // 2, 20_000)] ^= 16
  path.write_bytes(data)


def _halve(path: pathlib.Path) -> None:
  os.truncate(path, path.stat().st_size // 2)
