# SPDX-License-Identifier: Apache-2.0
"""Pictures a second: our pipeline beside torch, webdataset and tf.data.

  python -m venv PEERS && PEERS/bin/pip install -e '.[bench]'
  python -m bench.data.loaders --data=FOLDER --peers=PEERS/bin/python

FOLDER has `captions-train-*.arrayrecord`; see `bench/data/raw_dump.py`. Of its first `--images`
pictures with their captions two sets are made: as they are, and enlarged to 640x480, like photos of
the web. All loaders read the same encoded pictures and make the same output: 378 pixels, uint8,
bicubic with antialiasing. Ours also packs into rows of 4096 positions; torch and webdataset pad the
captions' tokens; tf.data has no tokenizer and passes text on.

Each row of the table is a process of its own, rows take turns for `--repeats` rounds, and medians
are printed. A core's worth is images per second of CPU time, workers' and main process's together:
other work on the machine changes it less than the time on the clock. Peers have an environment of
their own, so that ours stays as it is pinned; without `--peers` they are left out.
"""

import argparse
import io
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterator

import numpy as np
import PIL.Image

from bench.data import peers
from mm1_jax import cli
from mm1_jax.config import DataConfig, InputSpec, SourceConfig
from mm1_jax.data import sample
from mm1_jax.data.image import decode_image
from mm1_jax.data.pipeline import make_pipeline
from mm1_jax.data.sources import Source, write_shards

SIZE = (378, 378)
TOKENIZER = str(pathlib.Path(sample.__path__[0]) / "tokenizer.model")
NUM_TARS = 4  # so that each of webdataset's workers has some
PHOTO = (640, 480)
ROWS = [  # name, loader, workers
  *[("ours, decode", "ours, decode", 0), ("Pillow, decode", "pillow", 0)],
  ("tensorflow, decode", "tensorflow", 0),
  *[(f"ours, {n} workers", "ours", n) for n in (0, 1, 2)],
  *[(f"torch, {n} workers", "torch", n) for n in (0, 1, 2)],
  *[(f"webdataset, {n} workers", "webdataset", n) for n in (0, 1, 2)],
  *[(f"tf.data, {n} threads", "tf.data", n) for n in (1, 2)],
]


def make_sets(data: str, folder: pathlib.Path, num_images: int) -> dict[str, pathlib.Path]:
  """Writes the captions' pictures in each loader's form, as they are and enlarged."""
  source = Source(SourceConfig("captions", f"{data}/captions-train-*.arrayrecord"))
  records = []
  for i in range(len(source)):
    content = source[i].get("content", [])
    if [*content[0]] == ["image"] and content[0]["image"][:2] == b"\xff\xd8":
      records.append(source[i])
    if len(records) == num_images:
      break
  sets = {"as they are": folder / "original", "640x480": folder / "enlarged"}
  for name, path in sets.items():
    if not (path / "done").exists():
      _write_set(records, path, enlarge=name != "as they are")
      (path / "done").touch()
  return sets


def _write_set(records: list[dict], folder: pathlib.Path, enlarge: bool) -> None:
  (folder / "files").mkdir(parents=True, exist_ok=True)
  written = []
  for i, record in enumerate(records):
    image, text = record["content"][0]["image"], record["content"][1]["text"]
    image = _enlarged(image) if enlarge else image
    (folder / f"files/{i:06d}.jpg").write_bytes(image)
    (folder / f"files/{i:06d}.txt").write_text(text)
    written.append({**record, "content": [{"image": image}, {"text": text}]})
  write_shards(written, str(folder / "captions-train"), num_shards=1)
  files = sorted((folder / "files").iterdir())
  for number in range(NUM_TARS):
    with tarfile.open(folder / f"{number}.tar", "w") as tar:
      for file in files:
        if int(file.stem) % NUM_TARS == number:
          tar.add(file, file.name)


def _enlarged(image: bytes) -> bytes:
  picture = PIL.Image.open(io.BytesIO(image)).convert("RGB")
  data = io.BytesIO()
  picture.resize(PHOTO, PIL.Image.Resampling.LANCZOS).save(data, "JPEG", quality=87)
  return data.getvalue()


def ours(args: argparse.Namespace) -> Iterator[int]:
  config = DataConfig(
    sources=(SourceConfig("captions", f"{args.folder}/captions-train-*.arrayrecord"),),
    tokenizer=TOKENIZER,
    batch_size=2,
    images_per_row=16,  # 15 come with a full row
    num_workers=args.workers,
  )
  pipeline = make_pipeline(config, InputSpec(SIZE, 144, 4))
  for _, stats in pipeline:
    yield stats.num_images


def our_decoder(args: argparse.Namespace) -> Iterator[int]:
  for path in itertools.cycle(peers.pictures(args.folder)):
    decode_image(peers.read(path), SIZE)
    yield 1


OURS = {"ours": ours, "ours, decode": our_decoder}


def run(loader: str, workers: int, folder: pathlib.Path, args: argparse.Namespace) -> dict | None:
  """Returns what one loader printed, in a process of its own; None if there is no peer."""
  if loader in OURS:
    command = [sys.executable, "-m", "bench.data.loaders", "--only", loader]
  elif args.peers:
    command = [args.peers, peers.__file__, loader, "--tokenizer", TOKENIZER]
  else:
    return None
  command += ["--folder", str(folder), "--images", str(args.images), "--workers", str(workers)]
  done = subprocess.run(command, check=False, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def table(folder: pathlib.Path, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
  """Returns images per second, and per second of CPU time, by row."""
  found: dict[str, list[dict]] = {name: [] for name, _, _ in ROWS}
  for _ in range(args.repeats):
    for name, loader, workers in ROWS:
      result = run(loader, workers, folder, args)
      if result:
        found[name].append(result)
  return {
    name: tuple(statistics.median(r["images"] / r[key] for r in runs) for key in ("seconds", "cpu"))
    for name, runs in found.items()
    if runs
  }


def difference(folder: pathlib.Path) -> str:
  """Returns how far our pictures are from Pillow's."""
  errors = []
  for path in peers.pictures(str(folder))[:100]:
    data = peers.read(path)
    errors.append(np.abs(decode_image(data, SIZE).astype(int) - peers.by_pillow(data)))
  mean = np.mean([e.mean() for e in errors])
  return f"our pixels beside Pillow's: mean difference {mean:.2f}, most {max(map(np.max, errors))}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", help="folder with captions-train-*.arrayrecord")
  parser.add_argument("--peers", help="a Python that has the peers")
  parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/bench_data"))
  parser.add_argument("--images", type=int, default=1000, help="in a set, and in a measurement")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--only", choices=OURS, help=argparse.SUPPRESS)
  parser.add_argument("--folder", help=argparse.SUPPRESS)
  parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.only:
    peers.measure(OURS[args.only](args), args.images)
    return
  if not args.data:
    parser.error("--data is missing")
  for name, folder in make_sets(args.data, args.work, args.images).items():
    print(f"\n{args.images} pictures, {name}; {difference(folder)}")
    print(f"{'':24s}{'images/s':>10s}{'images / CPU s':>17s}")
    for row, (wall, cpu) in table(folder, args).items():
      print(f"{row:24s}{wall:10.0f}{cpu:17.0f}", flush=True)


if __name__ == "__main__":
  cli.run(main)
