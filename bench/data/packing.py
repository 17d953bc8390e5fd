# SPDX-License-Identifier: Apache-2.0
"""How full are rows, and what does it cost? Joint and per-source packing side by side.

  python -m bench.data.packing --data=FOLDER

FOLDER has `captions-`, `interleaved-` and `text-train-*.arrayrecord`; see `bench/data/raw_dump.py`.
Plans `--rows` rows of 4096 positions with 146 of a picture, at MM1's 45:45:10 (`--mixture=MM1_5`:
50:10:40), and prints a table of both ways to pack for several numbers of image slots (N). Nothing
is decoded. A cut document is in more than one row; a part is what is in one.
"""

import argparse
import collections
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mm1_jax import cli
from mm1_jax.config import DataConfig, RunConfig
from mm1_jax.configs import common
from mm1_jax.data.examples import Encoder
from mm1_jax.data.index import Index, load_index
from mm1_jax.data.mixing import Mixer, Row
from mm1_jax.data.sources import Source
from mm1_jax.data.tokenizer import Tokenizer

TOKENS_PER_IMAGE = 144
SLOTS = (8, 9, 10, 11, 12, 16)
MIXTURES = {"MM1": common.MM1, "MM1_5": common.MM1_5}
HEADER = (
  "packing     N   positions  slots  share error  parts per  documents  planning\n"
  "                   filled   used        worst   document        cut  s / 1000 rows"
)


class Filled(NamedTuple):
  """What rows hold."""

  positions: float  # share filled
  slots: float  # share used
  share_error: float  # of the source that is furthest off its weight
  parts: float  # of an example that is all there
  cut: float  # share of examples with more than one part
  seconds: float  # to plan 1000 rows


def data_config(folder: str, slots: int, packing: str, mixture: str) -> DataConfig:
  config = common.pretrain("packing", data=folder)
  config.data.sources = common.mixture(folder, MIXTURES[mixture])
  config.data.tokenizer = str(common.SAMPLE / "tokenizer.model")
  config.data.images_per_row = slots
  config.data.packing = packing
  return RunConfig.from_dict(config.to_dict()).data


def load_indexes(data: DataConfig) -> list[Index]:
  encoder = Encoder(Tokenizer(data.tokenizer), TOKENS_PER_IMAGE)
  return [
    load_index(
      Source(source), encoder, seq_len=data.seq_len, max_images=1 << 30, max_drop_fraction=0
    )
    for source in data.leaves
  ]


def measure(data: DataConfig, indexes: Sequence[Index], num_rows: int) -> Filled:
  mixer = Mixer(data, indexes, TOKENS_PER_IMAGE + 2)
  state, rows = mixer.first_state, []
  start = time.process_time()
  while len(rows) < num_rows:
    more, state = mixer.window(state)
    rows += more
  seconds = time.process_time() - start
  return filled(data, indexes, rows, 1000 * seconds / len(rows))


def filled(
  data: DataConfig, indexes: Sequence[Index], rows: Sequence[Row], seconds: float
) -> Filled:
  positions, images = np.zeros(len(indexes)), 0
  parts: dict[tuple[int, int], list[tuple[int, int]]] = collections.defaultdict(list)
  for source, example, start, stop in (piece for row in rows for piece in row):
    positions[source] += stop - start
    starts = indexes[source].images(example)
    images += int(((starts >= start) & (starts < stop)).sum())
    parts[source, example].append((start, stop))
  counts = [
    len(of_example)
    for (source, example), of_example in parts.items()
    if sum(b - a for a, b in of_example) == indexes[source].num_positions[example]
  ]
  asked = np.array([source.weight for source in data.leaves])
  return Filled(
    positions=positions.sum() / (len(rows) * data.seq_len),
    slots=images / (len(rows) * data.images_per_row),
    share_error=float(np.abs(positions / positions.sum() - asked).max()),
    parts=float(np.mean(counts)),
    cut=float(np.mean(np.array(counts) > 1)),
    seconds=seconds,
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument("--data", required=True, help="folder of the shards")
  parser.add_argument("--rows", type=int, default=2048, help="rows to plan")
  parser.add_argument("--mixture", choices=MIXTURES, default="MM1")
  args = parser.parse_args()
  indexes = load_indexes(data_config(args.data, SLOTS[0], "joint", args.mixture))
  print(HEADER)
  for packing in ("joint", "per_source"):
    for slots in SLOTS:
      got = measure(data_config(args.data, slots, packing, args.mixture), indexes, args.rows)
      print(
        f"{packing:10} {slots:2}      {got.positions:6.1%} {got.slots:6.1%}  "
        f"     {got.share_error:6.2%}  {got.parts:9.2f}     {got.cut:6.1%}  {got.seconds:8.2f}",
        flush=True,
      )


if __name__ == "__main__":
  cli.run(main)
