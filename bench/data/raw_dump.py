# SPDX-License-Identifier: Apache-2.0
"""Writes the whole raw dump that the sample is made of as shards, with its pictures as they are.

  python -m bench.data.raw_dump --raw=RAW --out=FOLDER

Makes captions, interleaved and text, `FOLDER/PART-train-*.arrayrecord`, for the other measurements.
Nothing is held out and some licences ask for more than attribution: not for training or shipping.
"""

import argparse
import pathlib
from collections.abc import Iterator
from typing import Any

from mm1_jax.data import sources
from mm1_jax.data.build import sample

NUM_SHARDS = 2


def captions(raw: pathlib.Path) -> Iterator[sources.Record]:
  folder = raw / "captions"
  for name in ("openstax_alt", "clipart", "tux"):
    for row in sample.raw_rows(folder / f"{name}.jsonl"):
      picture = (folder / row["image"]).read_bytes()
      yield record(row, [{"image": picture}, {"text": row["captions"][0]}])


def interleaved(raw: pathlib.Path) -> Iterator[sources.Record]:
  folder = raw / "interleaved"
  for row in sample.raw_rows(folder / "openstax.jsonl.gz"):
    paths = [item["image"] for item in row["content"] if item["type"] == "image"]
    items = sample.page_items(row, {path: (folder / path).read_bytes() for path in paths})
    if items:
      yield record(row, items)


def text(raw: pathlib.Path) -> Iterator[sources.Record]:
  for row in sample.raw_rows(raw / "text" / "text.jsonl.gz"):
    if row["text"].strip():
      yield record(row, [{"text": row["text"]}])


def record(row: sample.Row, content: list[dict[str, Any]]) -> sources.Record:
  header = {key: row[key] for key in ("id", "source", "license")}
  return {**header, "credit": row.get("url", ""), "content": content}


def main() -> None:
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument("--raw", type=pathlib.Path, required=True, help="the raw data dump")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  for part in (captions, interleaved, text):
    prefix = str(args.out / f"{part.__name__}-train")
    print(*sources.write_shards(part(args.raw), prefix, NUM_SHARDS), sep="\n")


if __name__ == "__main__":
  main()
