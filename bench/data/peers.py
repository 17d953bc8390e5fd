# SPDX-License-Identifier: Apache-2.0
"""One loader at work, as `bench/data/loaders.py` starts it; needs nothing of mm1_jax.

  PYTHON bench/data/peers.py torch --folder=FOLDER --tokenizer=MODEL --images=500 --workers=1

Prints one line of JSON: images, seconds, and CPU seconds of this process and its workers. All make
batches of `BATCH` pictures, uint8, 378 pixels, bicubic with antialiasing. Those with a tokenizer
also tokenise the captions and pad them; none of them packs.
"""

import argparse
import glob
import io
import itertools
import json
import os
import time
from collections.abc import Iterator

import numpy as np
import PIL.Image

SIZE, BATCH, WARM_UP = 378, 32, 96


def cpu_seconds() -> float:
  """Returns the CPU time so far of this process and all that it has started."""
  used, children = {}, {}
  for path in glob.glob("/proc/[0-9]*/stat"):
    try:
      with open(path) as file:
        fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
      continue  # it has just ended
    pid = int(path.split("/")[2])
    used[pid] = int(fields[11]) + int(fields[12])
    children.setdefault(int(fields[1]), []).append(pid)
  total, waiting = 0, [os.getpid()]
  while waiting:
    pid = waiting.pop()
    total += used.get(pid, 0)
    waiting += children.get(pid, [])
  return total / os.sysconf("SC_CLK_TCK")


def measure(counts: Iterator[int], num_images: int) -> None:
  """Prints how long it takes until so many images have come; `counts` says how many at a time."""
  warm = 0
  while warm < WARM_UP:
    warm += next(counts)
  begin, cpu, done = time.perf_counter(), cpu_seconds(), 0
  while done < num_images:
    done += next(counts)
  seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
  print(json.dumps({"images": done, "seconds": seconds, "cpu": cpu}), flush=True)


def by_pillow(data: bytes) -> np.ndarray:
  picture = PIL.Image.open(io.BytesIO(data)).convert("RGB")
  return np.asarray(picture.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC))


def read(path: str) -> bytes:
  with open(path, "rb") as file:
    return file.read()


def pictures(folder: str) -> list[str]:
  return sorted(glob.glob(f"{folder}/files/*.jpg"))


def pillow(args: argparse.Namespace) -> Iterator[int]:
  for path in itertools.cycle(pictures(args.folder)):
    by_pillow(read(path))
    yield 1


def tensorflow_decode(args: argparse.Namespace) -> Iterator[int]:
  tf = _tensorflow(1)
  decode = tf.function(_decode_by_tensorflow, input_signature=[tf.TensorSpec([], tf.string)])
  for path in itertools.cycle(pictures(args.folder)):
    decode(read(path)).numpy()
    yield 1


def tf_data(args: argparse.Namespace) -> Iterator[int]:
  tf = _tensorflow(max(1, args.workers))
  paths = pictures(args.folder)
  texts = [path.replace(".jpg", ".txt") for path in paths]
  dataset = tf.data.Dataset.from_tensor_slices((paths, texts)).shuffle(len(paths)).repeat()
  dataset = dataset.map(
    lambda path, text: (_decode_by_tensorflow(tf.io.read_file(path)), tf.io.read_file(text)),
    num_parallel_calls=max(1, args.workers),
  )
  for images, _ in dataset.batch(BATCH).prefetch(2).as_numpy_iterator():
    yield len(images)


def _tensorflow(num_threads: int):
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
  import tensorflow as tf

  tf.config.threading.set_inter_op_parallelism_threads(num_threads)
  tf.config.threading.set_intra_op_parallelism_threads(1)
  return tf


def _decode_by_tensorflow(data):
  import tensorflow as tf

  image = tf.image.resize(
    tf.io.decode_jpeg(data, channels=3), (SIZE, SIZE), tf.image.ResizeMethod.BICUBIC, antialias=True
  )
  return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


class _Tokenize:
  """Made in each worker: a SentencePiece processor is not handed over."""

  def __init__(self, path: str):
    self._path, self._processor = path, None

  def __call__(self, text: str) -> list[int]:
    if self._processor is None:
      import sentencepiece

      self._processor = sentencepiece.SentencePieceProcessor(model_file=self._path)
    return self._processor.encode(text)


class _Pairs:
  """A map-style dataset of pictures and captions."""

  def __init__(self, args: argparse.Namespace):
    self._paths, self._tokenize = pictures(args.folder), _Tokenize(args.tokenizer)

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, i: int):
    text = read(self._paths[i].replace(".jpg", ".txt")).decode()
    return by_pillow(read(self._paths[i])), self._tokenize(text)


def _collate(pairs: list):
  import torch

  images = torch.from_numpy(np.stack([image for image, _ in pairs]))
  tokens = torch.zeros(len(pairs), max(len(ids) for _, ids in pairs), dtype=torch.int32)
  for row, (_, ids) in zip(tokens, pairs, strict=True):
    row[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
  return images, tokens


def torch_loader(args: argparse.Namespace) -> Iterator[int]:
  import torch

  torch.set_num_threads(1)
  pairs = _Pairs(args)
  endless = torch.utils.data.RandomSampler(pairs, replacement=True, num_samples=1 << 30)
  loader = torch.utils.data.DataLoader(
    pairs, BATCH, sampler=endless, num_workers=args.workers, collate_fn=_collate
  )
  for images, _ in loader:
    yield len(images)


class _Sample:
  def __init__(self, path: str):
    self._tokenize = _Tokenize(path)

  def __call__(self, sample: dict):
    return by_pillow(sample["jpg"]), self._tokenize(sample["txt"].decode())


def web_dataset(args: argparse.Namespace) -> Iterator[int]:
  import torch
  import webdataset as wds

  torch.set_num_threads(1)
  dataset = wds.WebDataset(
    sorted(glob.glob(f"{args.folder}/*.tar")), shardshuffle=False, empty_check=False
  )
  dataset = dataset.repeat().shuffle(200).map(_Sample(args.tokenizer))
  dataset = dataset.batched(BATCH, collation_fn=_collate)
  for images, _ in wds.WebLoader(dataset, batch_size=None, num_workers=args.workers):
    yield len(images)


LOADERS = {
  "pillow": pillow,
  "tensorflow": tensorflow_decode,
  "tf.data": tf_data,
  "torch": torch_loader,
  "webdataset": web_dataset,
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("loader", choices=LOADERS)
  parser.add_argument("--folder", required=True)
  parser.add_argument("--tokenizer", required=True)
  parser.add_argument("--images", type=int, required=True)
  parser.add_argument("--workers", type=int, default=0)
  args = parser.parse_args()
  measure(LOADERS[args.loader](args), args.images)


if __name__ == "__main__":
  main()
