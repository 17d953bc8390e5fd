# SPDX-License-Identifier: Apache-2.0
r"""Files of strangers, changed at random by a seed: each is taken, or refused in one line.

The commands' own `main` reads each mutation, many in one process:

  python -m tests.drill.fuzz template --seed=0 --count=100 --folder=/tmp/fuzz
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import pathlib
import random
import shutil
import sys
from collections.abc import Callable, Iterator

from tests.drill.core import Expected, Fault, Scene, shell
from tests.drill.process import ROOT
from tests.drill.runs import ADDRESS_SPACE_KB

GOLDENS = ROOT / "tests" / "goldens" / "convert"
# What may stand in a value's place.
ODD = (None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**30, "", "\ud800", "a\0b", [], {})
DEEP = 100_000
COUNTS = {"decoder": 150, "encoder": 150, "run-config": 300, "official": 300, "template": 300}
QUICK = 40
WITHIN = 400


def faults() -> Iterator[Fault]:
  for name, count in COUNTS.items():
    yield Fault(f"fuzz/{name}", functools.partial(fuzzed, name=name, count=count))
    quick = functools.partial(fuzzed, name=name, count=QUICK)
    yield Fault(f"fuzz/quick-{name}", quick, quick=True, whole=False)


def fuzzed(scene: Scene, *, name: str, count: int) -> None:
  """Reads mutations in a process of its own; every exception but a user's error is wrong."""
  seed = scene.dice.randrange(10**9)
  flags = (f"--seed={seed}", f"--count={count}", f"--folder={scene.folder}/files")
  limited = f"ulimit -v {ADDRESS_SPACE_KB}"
  process = scene.start("tests.drill.fuzz", name, *flags, wrapped=shell(limited))
  scene.finish(process, Expected(says=f"{count} mutations", within=WITHIN))


def mutations(text: bytes, dice: random.Random) -> Iterator[bytes]:
  """Yields files like one of JSON: bytes changed, or values."""
  while True:
    kind = dice.randrange(8)
    if kind == 0:
      yield text[: dice.randrange(len(text))]
    elif kind == 1:
      changed = bytearray(text)
      for _ in range(dice.randint(1, 8)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
      yield bytes(changed)
    elif kind == 2:
      yield dice.choice((b"", b"\xff\xfe", b"null", b"[]", b"3", b'"text"', b"\0" * 100, b"{}"))
    elif kind == 3:
      yield b"[" * DEEP + dice.choice((b"", b"]" * DEEP))
    else:
      copy = json.loads(text)
      for _ in range(dice.randint(1, 2)):
        copy = _replace(copy, dice)
      yield json.dumps(copy).encode("utf-8", "surrogatepass")


def _replace(value, dice: random.Random):
  """Returns a value with one of those in it replaced, removed or nested."""
  inside = isinstance(value, dict | list) and value
  if not inside or dice.random() < 0.2:
    return dice.choice((*ODD, [value], {"a": value}))
  key = dice.choice([*value] if isinstance(value, dict) else range(len(value)))
  if dice.random() < 0.15:
    del value[key]
  else:
    value[key] = _replace(value[key], dice)
  return value


def import_decoder(folder: pathlib.Path) -> tuple[pathlib.Path, Callable[[], None]]:
  """config.json of a published decoder."""
  tokenizer = ROOT / "mm1_jax" / "data" / "sample" / "tokenizer.model"
  return _import(folder, "decoder", "mixtral", f"--tokenizer={tokenizer}")


def import_encoder(folder: pathlib.Path) -> tuple[pathlib.Path, Callable[[], None]]:
  """config.json of a published image encoder."""
  return _import(folder, "vit", "clip")


def _import(folder: pathlib.Path, part: str, name: str, *flags: str):
  from mm1_jax.convert.__main__ import main

  weights, out = shutil.copytree(GOLDENS / name, folder / name), folder / "out"

  def read() -> None:
    shutil.rmtree(out, ignore_errors=True)
    main(["import", f"--{part}={weights}", f"--out={out}", *flags])

  return weights / "config.json", read


def run_config(folder: pathlib.Path) -> tuple[pathlib.Path, Callable[[], None]]:
  """config.json of a run that someone else trained."""
  from mm1_jax.checkpoint import read_run
  from mm1_jax.config import RunConfig

  path = folder / "config.json"
  path.write_text(json.dumps(RunConfig(name="a").to_dict()))

  def read() -> None:
    read_run(folder)

  return path, read


def official(folder: pathlib.Path) -> tuple[pathlib.Path, Callable[[], None]]:
  """A benchmark's file, as it is published."""
  from mm1_jax.data.build.official import main

  path = folder / "questions.json"
  questions = {"02930152": {"imageId": "n578250", "question": "Is it dark?", "answer": "yes"}}
  path.write_text(json.dumps(questions))
  return path, lambda: main(["gqa", str(path), f"--output={folder}/out.jsonl"])


def template(folder: pathlib.Path) -> tuple[pathlib.Path, Callable[[], None]]:
  """A chat template."""
  from mm1_jax.data.template import SHIPPED, load_template

  path = folder / "template.json"
  shutil.copy(SHIPPED / "vicuna.json", path)

  def read() -> None:
    load_template(str(path))

  return path, read


READERS = {
  "decoder": import_decoder,
  "encoder": import_encoder,
  "run-config": run_config,
  "official": official,
  "template": template,
}


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m tests.drill.fuzz", description=__doc__)
  parser.add_argument("what", choices=READERS)
  for name in ("seed", "count"):
    parser.add_argument(f"--{name}", type=int, required=True)
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  args = parser.parse_args()
  from mm1_jax.config import UserError

  args.folder.mkdir(parents=True)
  path, read = READERS[args.what](args.folder)
  read()  # as it is, it is good
  found, stray = collections.Counter(), collections.Counter()
  changed = mutations(path.read_bytes(), random.Random(args.seed))
  for _ in range(args.count):
    data = next(changed)
    path.write_bytes(data)
    try:
      with contextlib.redirect_stdout(io.StringIO()):
        read()
      found["taken"] += 1
    except UserError as e:
      found["refused"] += 1
      if "\n" in str(e).strip():
        stray["message of several lines"] += 1
    except Exception as e:
      stray[f"{type(e).__name__}: {str(e)[:60]}"] += 1
  print(f"{args.count} mutations: {dict(found)}")
  if stray:
    names = collections.Counter(key.split(":")[0] for key in stray.elements())
    raise SystemExit(f"error: {stray.total()} stray: {dict(names.most_common(4))}; {[*stray][:2]}")


if __name__ == "__main__":
  sys.exit(main())
