# SPDX-License-Identifier: Apache-2.0
"""Writes some of the shipped sample in each of the raw formats, to look at and to try a build on.

python -m mm1_jax.data.build.raw_sample --out=raw
"""

import contextlib
import gzip
import hashlib
import io
import json
import pathlib
import tarfile
from collections.abc import Iterable
from typing import Any, ClassVar

import PIL.Image
import pyarrow as pa
import pyarrow.parquet
import zstandard

from mm1_jax import cli
from mm1_jax.config import SourceConfig
from mm1_jax.data.sources import Record, Source

SAMPLE = pathlib.Path(__file__).parent.parent / "sample"
NUM_RECORDS = 40  # of each format
PER_TAR = 25


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser("mm1_jax.data.build.raw_sample", __doc__)
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
  out = parser.parse_args(argv).out
  write_all(out)
  print(f"{NUM_RECORDS} records of each format are in", *sorted(map(str, out.iterdir())))


def write_all(out: pathlib.Path) -> None:
  """Writes `out/webdataset`, `out/coco` and so on, each as its format has it."""
  captions, pages = read("captions"), read("interleaved")
  write_webdataset(out / "webdataset", captions)
  write_coco(out / "coco", captions)
  write_llava(out / "llava", read_conversations())
  write_obelics(out / "obelics", pages)
  write_mmc4(out / "mmc4", pages)
  write_text(out / "text", read("text"))
  write_tfds(out / "tfds", captions)


def read(part: str, num: int | None = NUM_RECORDS) -> list[Record]:
  """Returns the first records of a part of the shipped sample, or all."""
  source = Source(SourceConfig(part, str(SAMPLE / f"{part}-train-*.arrayrecord")))
  return [source[i] for i in range(len(source) if num is None else num)]


def read_conversations() -> list[Record]:
  """Returns conversations about none, one and several pictures."""
  records = read("sft", None)
  records.sort(key=lambda r: -sum("image" in item for item in r["turns"][0]["content"]))
  return [*records[: NUM_RECORDS // 2], *records[-NUM_RECORDS // 2 :]]


def write_webdataset(out: pathlib.Path, records: list[Record]) -> None:
  """Tars as img2dataset writes them, --save_additional_columns=[license]."""
  samples = []
  for record in records:
    image, text = record["content"]
    facts = {"caption": text["text"], "url": _url(record), "license": record["license"]}
    samples.append((image["image"], text["text"], facts))
  _write_tars(out, samples)


def write_coco(out: pathlib.Path, records: list[Record]) -> None:
  """captions.json, with images/ beside it."""
  (out / "images").mkdir(parents=True, exist_ok=True)
  names = sorted({record["license"] for record in records})
  images, annotations = [], []
  for i, record in enumerate(records):
    image, text = record["content"]
    name = f"{i:012d}.jpg"
    (out / "images" / name).write_bytes(image["image"])
    license = names.index(record["license"]) + 1
    images.append({"id": i, "file_name": name, "license": license, "coco_url": _url(record)})
    annotations.append({"id": 1000 + i, "image_id": i, "caption": text["text"]})
  licenses = [{"id": i, "name": name, "url": ""} for i, name in enumerate(names, 1)]
  tables = {"info": {}, "licenses": licenses, "images": images, "annotations": annotations}
  (out / "captions.json").write_text(json.dumps(tables))


def write_llava(out: pathlib.Path, records: list[Record]) -> None:
  """llava.json, with images/ beside it."""
  (out / "images").mkdir(parents=True, exist_ok=True)
  rows = []
  for i, record in enumerate(records):
    names, turns = [], []
    for turn in record["turns"]:
      texts = []
      for item in turn["content"]:
        if "image" in item:
          names.append(f"{i:06d}-{len(names)}.jpg")
          (out / "images" / names[-1]).write_bytes(item["image"])
        texts.append(item.get("text", "<image>"))
      speaker = {"user": "human", "assistant": "gpt"}[turn["role"]]
      turns.append({"from": speaker, "value": "\n".join(texts)})
    row: dict[str, Any] = {"id": record["id"], "conversations": turns}
    if names:
      row["image"] = names[0] if len(names) == 1 else names
    rows.append(row)
  (out / "llava.json").write_text(json.dumps(rows, indent=1))


def write_obelics(out: pathlib.Path, records: list[Record]) -> None:
  """pages.parquet, and store/ with its pictures as img2dataset downloads them."""
  rows, samples = [], []
  for record in records:
    texts, images = [], []
    for i, item in enumerate(record["content"]):
      texts.append(item.get("text"))
      images.append(f"{_url(record)}/{i}.jpg" if "image" in item else None)
      if "image" in item:
        samples.append((item["image"], "", {"caption": "", "url": images[-1]}))
    metadata = json.dumps([{"src": url} if url else None for url in images])
    page = json.dumps({"url": _url(record)})
    rows.append({"images": images, "metadata": metadata, "general_metadata": page, "texts": texts})
  out.mkdir(parents=True, exist_ok=True)
  pyarrow.parquet.write_table(pa.Table.from_pylist(rows), out / "pages.parquet", row_group_size=10)
  _write_tars(out / "store", samples)


def write_mmc4(out: pathlib.Path, records: list[Record]) -> None:
  """docs.jsonl, with images/ beside it: pages whose pictures are all followed by a text."""
  (out / "images").mkdir(parents=True, exist_ok=True)
  with (out / "docs.jsonl").open("w") as file:
    for number, record in enumerate(records):
      texts: list[str] = []
      infos = []
      for i, item in enumerate(record["content"]):
        if "text" in item:
          texts.append(item["text"])
          continue
        name = f"{number:06d}-{i}.jpg"
        (out / "images" / name).write_bytes(item["image"])
        url = f"{_url(record)}/{i}.jpg"
        infos.append(
          {"image_name": name, "raw_url": url, "matched_text_index": len(texts), "matched_sim": 0.3}
        )
      if "text" in record["content"][-1]:
        row = {"url": _url(record), "text_list": texts, "image_info": infos}
        file.write(json.dumps(row) + "\n")


def write_text(out: pathlib.Path, records: list[Record]) -> None:
  """books.jsonl, .jsonl.gz, .jsonl.zst, .parquet and .txt: a share of the records each."""
  out.mkdir(parents=True, exist_ok=True)
  rows = [
    {"id": r["id"], "text": r["content"][0]["text"], "source": r["source"], "license": r["license"]}
    for r in records
  ]
  lines = ["".join(json.dumps(row) + "\n" for row in rows[i:-1:4]).encode() for i in range(3)]
  (out / "books.jsonl").write_bytes(lines[0])
  (out / "books.jsonl.gz").write_bytes(gzip.compress(lines[1]))
  (out / "books.jsonl.zst").write_bytes(zstandard.compress(lines[2]))
  pyarrow.parquet.write_table(pa.Table.from_pylist(rows[3:-1:4]), out / "books.parquet")
  (out / "book.txt").write_text(rows[-1]["text"])


def write_tfds(out: pathlib.Path, records: list[Record]) -> None:
  """A set called `pictures`, with the features `image` and `captions.text`."""
  import tensorflow_datasets as tfds  # seconds, and only this needs it

  class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set made here, from the shipped sample."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar[dict] = {}  # nothing is downloaded

    def _info(self) -> tfds.core.DatasetInfo:
      captions = tfds.features.Sequence({"text": tfds.features.Text()})
      features = {"image": tfds.features.Image(), "captions": captions}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
      return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterable[Any]:
      for i, record in enumerate(records):
        image, text = record["content"]
        yield i, {"image": io.BytesIO(image["image"]), "captions": [{"text": text["text"]}]}

  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):  # it reports a download, but there is none
    Pictures(data_dir=out, file_format="array_record").download_and_prepare()


def _write_tars(out: pathlib.Path, samples: list[tuple[bytes, str, dict[str, Any]]]) -> None:
  """Writes pictures, captions and facts as img2dataset does."""
  out.mkdir(parents=True, exist_ok=True)
  for start in range(0, len(samples), PER_TAR):
    number = start // PER_TAR
    with tarfile.open(out / f"{number:05d}.tar", "w") as tar:
      for i, (image, text, facts) in enumerate(samples[start : start + PER_TAR]):
        key = f"{number:05d}{i:04d}"
        with PIL.Image.open(io.BytesIO(image)) as picture:
          width, height = picture.size
        about = {
          **facts,
          **{"key": key, "status": "success", "error_message": None, "exif": "{}"},
          **{"width": width, "height": height, "sha256": hashlib.sha256(image).hexdigest()},
        }
        members = {"jpg": image, "json": json.dumps(about).encode(), "txt": text.encode()}
        for ending, data in members.items():
          info = tarfile.TarInfo(f"{key}.{ending}")
          info.size = len(data)
          tar.addfile(info, io.BytesIO(data))


def _url(record: Record) -> str:
  return f"https://example.org/{record['id']}"


if __name__ == "__main__":
  cli.run(main)
