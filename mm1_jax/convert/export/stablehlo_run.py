# SPDX-License-Identifier: Apache-2.0
"""Answers about pictures with nothing but JAX and a tokenizer; greedy.

  pip install -r requirements.txt
  python run.py --image=a.jpg --prompt="Describe the image."

--image may be repeated; pictures come before the text, in their order.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator

import jax
import jax.export
import numpy as np
import safetensors

from mm1_jax.convert.export.huggingface.pictures_mm1 import Picture

DESCRIPTION = "program.json"


class Exported:
  """The programs and params of a folder.

  Args:
    folder: of the export.

  Attributes:
    params: arrays by name, on the default device.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self.about = json.loads((folder / DESCRIPTION).read_text())
    self.params = {}
    for file in sorted(folder.glob("*.safetensors")):
      with safetensors.safe_open(file, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118, not a mapping
          self.params[name] = jax.device_put(tensors.get_tensor(name))
    self._tokenizer = _Tokenizer(folder / self.about["tokenizer"])
    self._programs = {}

  def prompt(self, num_images: int, text: str) -> list[int]:
    """Returns the ids of a question: pictures, then the text."""
    about = self.about
    if not num_images:
      text = about["space_before_text"] + text
    ids = about["before"] + about["image_ids"] * num_images
    return ids + (self._tokenizer.encode(text) if text else []) + about["after"]

  def pixels(self, images: list[pathlib.Path]) -> np.ndarray:
    """Returns uint8[N, H, W, 3] of pictures, as training had them."""
    size, fit = tuple(self.about["image_size"]), self.about["image_fit"]
    pixels = [_read(path, self.about["max_pixels"]).decode(size, fit) for path in images]
    return np.array(pixels, np.uint8).reshape(-1, *size, 3)

  def logits(
    self, ids: list[int], images: np.ndarray, more: list[int] | None = None
  ) -> Iterator[np.ndarray]:
    """Yields float32[V] after the prompt, then after each further token.

    Args:
      ids: of the prompt.
      images: uint8[N, H, W, 3], in their order.
      more: tokens to continue with; None takes the likeliest ones, without end.
    """
    positions, slots = self._shape(len(ids), len(images))
    tokens = np.zeros((1, positions), np.int32)
    tokens[0, : len(ids)] = ids
    pixels = np.zeros((1, slots, *self.about["image_size"], 3), np.uint8)
    pixels[0, : len(images)] = images
    prefill, decode = self._program(f"prefill_{positions}_{slots}"), self._program("decode")
    logits, cache = prefill(self.params, tokens, pixels, np.int32(len(ids)))
    length = len(ids)
    yield np.asarray(logits)
    while length < self.about["num_positions"] and (more is None or length < len(ids) + len(more)):
      token = int(np.argmax(logits)) if more is None else more[length - len(ids)]
      logits, cache = decode(self.params, np.int32(token), np.int32(length), cache)
      length += 1
      yield np.asarray(logits)

  def answer(self, text: str, images: list[pathlib.Path], max_new_tokens: int = 128) -> str:
    """Returns what the model says to a question about pictures, in at least one token."""
    ids = self.prompt(len(images), text)
    said: list[int] = []
    for logits in self.logits(ids, self.pixels(images)):
      token = int(np.argmax(logits))
      if token in self.about["ends"]:
        break
      said.append(token)
      answer = self._tokenizer.decode(said).removeprefix(self.about["space_before_answer"])
      for stop in self.about["stop"]:
        if stop in answer:
          return answer[: answer.index(stop)]
      if len(said) >= max_new_tokens:
        break
    return self._tokenizer.decode(said).removeprefix(self.about["space_before_answer"])

  def _shape(self, num_positions: int, num_images: int) -> tuple[int, int]:
    """Returns the smallest prefill that has room."""
    for positions, slots in sorted(self.about["prefill"]):
      if num_positions <= positions and num_images <= slots:
        return positions, slots
    largest = max(self.about["prefill"])
    raise SystemExit(
      f"error: the question takes {num_positions} positions with {num_images} images; there is "
      f"room for {largest[0]} with {max(n for _, n in self.about['prefill'])}."
    )

  def _program(self, name: str):
    if name not in self._programs:
      platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
      exported = self._deserialize(self._folder / "programs" / f"{name}.{platform}")
      # The cache, which decode gets last and gives back, is used up.
      donated = (3,) if name == "decode" else ()
      self._programs[name] = jax.jit(exported.call, donate_argnums=donated)
    return self._programs[name]

  def _deserialize(self, path: pathlib.Path) -> jax.export.Exported:
    if not path.exists():
      there = sorted({other.suffix[1:] for other in path.parent.iterdir()})
      sys.exit(f"error: there are no programs for {path.suffix[1:]}, but for {', '.join(there)}.")
    try:
      return jax.export.deserialize(bytearray(path.read_bytes()))
    except Exception as e:  # of several kinds
      sys.exit(
        f"error: '{path}' was made by jax {self.about['jax']} and cannot be read by jax "
        f"{jax.__version__} ({type(e).__name__}: {e}); see requirements.txt."
      )


def _read(path: pathlib.Path, max_pixels: int) -> Picture:
  try:
    picture = Picture(path, max_pixels)
    picture.decode((1, 1), "squash")  # all of its bytes
  except Exception as e:  # what Pillow raises of damaged files is of many kinds
    sys.exit(f"error: the picture '{path}' cannot be read ({type(e).__name__}: {e}).")
  return picture


def _at_least_1(text: str) -> int:
  if int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text} must be at least 1")
  return int(text)


class _Tokenizer:
  def __init__(self, path: pathlib.Path):
    if path.suffix == ".json":
      import tokenizers

      tokenizer = tokenizers.Tokenizer.from_file(str(path))
      tokenizer.encode_special_tokens = True  # what is typed is text
      self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
      self.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    else:
      import sentencepiece

      processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
      self.encode, self.decode = processor.encode, processor.decode


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--image", action="append", default=[], type=pathlib.Path, metavar="FILE")
  parser.add_argument("--prompt", default="", metavar="TEXT")
  parser.add_argument("--max-new-tokens", type=_at_least_1, default=128, metavar="N")
  args = parser.parse_args()
  if not args.image and not args.prompt:
    sys.exit("error: give --image=FILE, --prompt=TEXT, or both.")
  exported = Exported(pathlib.Path(__file__).parent)
  # Bytes of the command line that are no UTF-8 come as halves of characters.
  prompt = args.prompt.encode(errors="replace").decode()
  print(exported.answer(prompt, args.image, args.max_new_tokens))


if __name__ == "__main__":
  main()
