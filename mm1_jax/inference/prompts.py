# SPDX-License-Identifier: Apache-2.0
"""What users ask becomes what a model reads: ids and pixels, as training would have made them.

A prompt is a list of texts and pictures in order, or of turns, as a conversation has them; a text
alone is a list of one:

  [pathlib.Path("a.jpg"), "What is this?"]
  [{"role": "user", "content": [pathlib.Path("a.jpg"), "What is this?"]},
   {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "What colour?"}]
"""

import dataclasses
import functools
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from etils import epath

from mm1_jax import untrusted
from mm1_jax.config import RunConfig, UserError
from mm1_jax.data import image as pixels
from mm1_jax.data import metadata
from mm1_jax.data.examples import Encoder
from mm1_jax.data.image import TOO_LARGE, ImageError, on_white, read_header
from mm1_jax.data.sources import ROLES
from mm1_jax.data.tiling import Tile, decode_pictures
from mm1_jax.data.tokenizer import IMAGE

MAX_PICTURE_BYTES = 1 << 28  # of an encoded file


@dataclasses.dataclass(frozen=True)
class Picture:
  """An encoded picture that has been read."""

  name: str  # for messages
  data: bytes


# A picture: a file, an encoded file's bytes, a PIL image, pixels uint8[H, W, 3], or one of those
# that `read_picture` has read.
Image = os.PathLike | bytes | PIL.Image.Image | np.ndarray | Picture
Item = str | Image  # a str is always text
Turn = Mapping[str, Any]  # {"role": a str, "content": a str or a sequence of items}
Prompt = str | Sequence[Item] | Sequence[Turn]


class PromptError(UserError):
  """A prompt or a setting that cannot be used; the message says what is wrong with it."""


class RoomError(PromptError):
  """A prompt and its answer are longer than the rows that the model was trained on."""


class Request(NamedTuple):
  """A prompt as the model reads it."""

  ids: list[int]
  images: list[np.ndarray]  # uint8[H, W, 3] each
  chat: bool  # whether the model answers in a turn of its own


def read_prompt(
  prompt: Prompt, run: RunConfig, encoder: Encoder, *, chat: bool, max_new_tokens: int = 1
) -> Request:
  """Returns a prompt's ids and pixels.

  Args:
    prompt: see above.
    run: what the model was trained on.
    encoder: that run's.
    chat: whether texts and pictures are a user's turn, or the beginning of a document. Turns are
      always turns.
    max_new_tokens: that there must be room for.

  Raises:
    PromptError: it is empty, not a conversation that waits for an answer, too long, or a picture of
      it cannot be read.
  """
  prompt = [prompt] if isinstance(prompt, str) else prompt
  if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
    raise PromptError(
      f"a prompt is {untrusted.shown(prompt)}; it must be a text, a list of texts and images, or a "
      f"list of turns."
    )
  if prompt and isinstance(prompt[0], Mapping):
    turns, chat = [_turn(turn) for turn in prompt], True
    if turns[-1]["role"] != "user":
      raise PromptError("the conversation ends with an answer; its last turn must be the user's.")
  else:
    turns = [{"role": "user", "content": list(prompt)}]
  for turn in turns:
    if turn["role"] == "user" and not any(
      item.strip() if isinstance(item, str) else True for item in turn["content"]
    ):
      raise PromptError("the prompt is empty; give it a text or an image.")
  files: list[Picture] = []
  for turn in turns:
    for i, item in enumerate(turn["content"]):
      if isinstance(item, str):
        turn["content"][i] = {"text": untrusted.mended(item)}
      else:
        files.append(read_picture(item))
        turn["content"][i] = {"image": files[-1].data}
  encoded = encoder.encode_prompt(turns) if chat else encoder.encode_prefix(turns[0]["content"])
  check_room(len(encoded.ids), len(encoded.images), run, max_new_tokens)  # decoding takes longer
  return Request(encoded.ids, _decode(encoded.images, files, run), chat)


def check_room(num_positions: int, num_images: int, run: RunConfig, max_new_tokens: int) -> None:
  """Raises a RoomError if an answer does not fit after a prompt."""
  longest = run.data.seq_len
  room = longest - num_positions
  if max_new_tokens > room:
    images = f" ({num_images} x {run.image_positions} of them for images)" if num_images else ""
    raise RoomError(
      f"the prompt takes {num_positions} positions{images} and the answer up to {max_new_tokens} "
      f"more, but the model was trained on {longest}"
      f"{f'; at most {room} new tokens would fit' if room > 0 else ''}."
    )


def check_image(image: Image, run: RunConfig) -> tuple[int, int]:
  """Returns height and width of a picture that can be used.

  Raises:
    PromptError: it cannot be.
  """
  file = read_picture(image)
  _decode([file.data], [file], run)
  return read_header(file.data)[0]


def count_pixels(image: Image) -> int:
  """Returns the pixels of a picture by its header; none of them is decoded.

  Raises:
    PromptError: it cannot be read, or has no header.
  """
  file = read_picture(image)
  try:
    return pixels.count_pixels(file.data)
  except ImageError as e:
    raise PromptError(f"{file.name} cannot be used: {e.reason}.") from e


def fill_slots(text: str, images: Sequence[Item]) -> list[Item]:
  """Returns a text's items, where it has `<image>` slots for its pictures; else they come first.

  Line breaks around a slot are not text, as in training data.

  Raises:
    PromptError: there are slots, but not as many as pictures.
  """
  if not isinstance(text, str):
    raise PromptError(f"the text is {untrusted.shown(text)}; it must be a str.")
  if isinstance(images, str | bytes) or not isinstance(images, Sequence):
    raise PromptError(f"images is {untrusted.shown(images)}; it must be a list of images.")
  first, *others = text.split(IMAGE)
  if not others:
    return [*images, text] if text.strip() else [*images]
  if len(others) != len(images):
    raise PromptError(
      f"the text has {_count(len(others), f'{IMAGE} slot')}, but there "
      f"{'is' if len(images) == 1 else 'are'} {_count(len(images), 'image')}; give one image for "
      f"each slot, or leave the slots out."
    )
  items: list[Item] = [first.strip("\n")]
  for image, following in zip(images, others, strict=True):
    items += [image, following.strip("\n")]
  return [item for item in items if item != ""] if others else items


def _count(number: int, noun: str) -> str:
  return f"{number} {noun}{'' if number == 1 else 's'}"


def _turn(turn: Any) -> dict[str, Any]:
  """Returns a turn with its content as a list of items."""
  role, content = (turn.get(k) if isinstance(turn, Mapping) else None for k in ("role", "content"))
  if role not in ROLES or isinstance(content, bytes) or not isinstance(content, Sequence):
    raise PromptError(
      f"a turn is {untrusted.shown(turn)}; it must be {{'role': one of {ROLES}, 'content': a "
      f"text, or a list of texts and images}}."
    )
  return {"role": role, "content": [content] if isinstance(content, str) else list(content)}


def read_picture(image: Image) -> Picture:
  """Returns an encoded image, from any of the forms that one may have.

  Raises:
    PromptError: naming the file, if it is one.
  """
  if isinstance(image, Picture):
    return image
  name = f"image '{os.fspath(image)}'" if isinstance(image, os.PathLike) else "an image"
  try:
    data = _encoded(image)
  except UserError:
    raise
  except OSError as e:
    raise PromptError(f"{name} cannot be read: {e.strerror or e}.") from e
  except ImageError as e:
    raise PromptError(f"{name} cannot be used: {e.reason}.") from e
  except untrusted.STRAY as e:  # a path with a NUL, an image that Pillow stumbles over
    raise PromptError(f"{name} cannot be read: {untrusted.why(e)}.") from e
  if len(data) > MAX_PICTURE_BYTES:
    raise PromptError(f"{name} has more than the {MAX_PICTURE_BYTES:,} bytes that are read.")
  return Picture(name, data)


def _decode(
  images: Sequence[bytes | Tile], files: Sequence[Picture], run: RunConfig
) -> list[np.ndarray]:
  """Returns uint8[H, W, 3] as training has them, of pictures or parts of them.

  Raises:
    PromptError: naming the first of the files that cannot be used.
  """
  limit = run.data.max_image_pixels
  decode = functools.partial(
    decode_pictures, size=run.model.vision.image_size, fit=run.data.image_fit, max_pixels=limit
  )
  try:
    return list(decode(images))
  except ImageError as error:
    bound = f" (more than {limit / 1e6:g} million pixels)" if error.reason == TOO_LARGE else ""
    for file in files:
      try:
        list(decode([file.data]))
      except ImageError as e:
        raise PromptError(f"{file.name} cannot be used: {e.reason}{bound}.") from e
    raise


def _encoded(image: Image) -> bytes:
  """Returns an encoded image; pixels are encoded without loss, so that all forms take one way."""
  if isinstance(image, os.PathLike):
    with epath.Path(image).open("rb") as file:
      return file.read(MAX_PICTURE_BYTES + 1)
  if isinstance(image, bytes):
    return image
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
      raise PromptError(
        f"an image is an array {image.dtype}{list(image.shape)}; it must be uint8[H, W, 3]."
      )
    image = PIL.Image.fromarray(image)
  if not isinstance(image, PIL.Image.Image):
    raise PromptError(f"a {type(image).__name__} is neither text nor an image.")
  data = io.BytesIO()
  on_white(metadata.upright(image)).save(data, "PNG")
  return data.getvalue()
