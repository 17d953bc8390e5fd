# SPDX-License-Identifier: Apache-2.0
"""A trained model, ready to answer.

model = Model.load("runs/debug_sft")
model.generate([[pathlib.Path("a.jpg"), "What is this?"]])  # ["A cat."]
"""

import dataclasses
import io
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageOps
from etils import epath
from jax.sharding import AxisType, Mesh, NamedSharding

from mm1_jax import checkpoint
from mm1_jax.config import MESH_AXES, ConfigError, MeshConfig, RunConfig, UserError
from mm1_jax.data.examples import make_encoder
from mm1_jax.data.image import ImageError, decode_image, on_white
from mm1_jax.data.tokenizer import Tokenizer
from mm1_jax.inference import sampler
from mm1_jax.inference.sampler import GREEDY, Sampling
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import LAYOUT, abstract_state

# A picture: a file, an encoded file's bytes, a PIL image, or pixels uint8[H, W, 3].
Image = os.PathLike | bytes | PIL.Image.Image | np.ndarray
Item = str | Image  # a str is always text
LENGTH_STEP = 64  # prompts and answers get room in multiples of this, so that programs are few
# Params that are computed with in float32 whatever `model.dtype` is; the others are cast before
# they are used, so that casting them when they are read changes no result.
IN_FLOAT32 = {"scale", "bias", "positions", "class_token", "class_position", "router"}


class PromptError(UserError):
  """A prompt or a setting that cannot be used; the message says what is wrong with it."""


class Request(NamedTuple):
  """A prompt as the model reads it."""

  ids: list[int]
  images: list[np.ndarray]  # uint8[H, W, 3] each


class Model:
  """Params on a mesh, with the tokenizer and the config that they were trained with.

  Args:
    params: the model, on `mesh`.
    run: its run's config.
    mesh: devices that it runs on.
  """

  def __init__(self, params: MM1, run: RunConfig, mesh: Mesh):
    self.run = run
    self.mesh = mesh
    self.params = params
    self.tokenizer = Tokenizer(run.data.tokenizer)
    self.encoder = make_encoder(run.data, run.model.connector.num_tokens, self.tokenizer)
    self.chat = run.data.chat
    # The vocabulary may be rounded up beyond the tokenizer's.
    self._allowed = np.arange(run.model.decoder.vocab_size) < self.tokenizer.vocab_size
    self._allowed[sorted(self.tokenizer.special_ids - {self.tokenizer.eos_id})] = False

  @classmethod
  def load(cls, path: epath.PathLike, *, data: int = 1, tensor: int = 1) -> "Model":
    """Reads a run's newest checkpoint, or the one of its steps that `path` is.

    Args:
      path: a run's workdir, or a step's folder `checkpoints/STEP` in one.
      data: devices that rows are split over, each with all params.
      tensor: devices that params are split over.

    Raises:
      CheckpointError: there is no checkpoint, or it is damaged.
      ConfigError: there are not enough devices, or the model does not divide over them.
      DataError: the run's tokenizer is missing or damaged.
    """
    path = checkpoint.absolute(path)
    workdir = path.parent.parent if (path / checkpoint.PARAMS).exists() else path
    run = checkpoint.read_run(workdir)
    mesh = _make_mesh(run, data, tensor)
    params = checkpoint.restore_params(path, abstract_params(run, mesh))
    return cls(params, run, mesh)

  def generate(
    self,
    prompts: Sequence[Sequence[Item]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    chat: bool | None = None,
    seed: int = 0,
    batch_size: int = 8,
  ) -> list[str]:
    """Returns one answer for each prompt.

    A prompt's answer depends on the prompt, its place in `prompts` (if the temperature is not 0)
    and the seed, not on the other prompts.

    Args:
      prompts: texts and pictures in order, for each prompt.
      max_new_tokens: tokens after which an answer is cut off.
      sampling: how tokens are drawn.
      chat: whether a prompt is a user's turn that the assistant answers, or the beginning of a
        document to go on with; None goes by what the run was trained on, `data.chat`.
      seed: of what is drawn.
      batch_size: prompts that are read at once.

    Raises:
      PromptError: a picture cannot be read, a prompt does not fit the model, or a setting is
        out of range.
    """
    _check(max_new_tokens, sampling, batch_size)
    requests = [self.encode(prompt, chat=chat) for prompt in prompts]
    for request in requests:
      self._check_length(request, max_new_tokens)
    # Prompts of like shape go together: less padding, and fewer programs.
    order = sorted(
      range(len(requests)), key=lambda i: (len(requests[i].images), _size(requests[i]))
    )
    answers = [""] * len(requests)
    for start in range(0, len(order), batch_size):
      rows = order[start : start + batch_size]
      texts = self._answer([requests[i] for i in rows], rows, max_new_tokens, sampling, seed)
      for i, text in zip(rows, texts, strict=True):
        # In a turn, a space stands between the role and the text.
        answers[i] = text.removeprefix(" ") if self._is_chat(chat) else text
    return answers

  def encode(self, prompt: Sequence[Item], *, chat: bool | None = None) -> Request:
    """Returns a prompt's ids and pixels, as training would have made them.

    Raises:
      PromptError: a picture cannot be read.
    """
    pixels = [_pixels(item, self.run) for item in prompt if not isinstance(item, str)]
    # The encoder only counts and passes on what stands for a picture.
    items = [{"text": item} if isinstance(item, str) else {"image": b""} for item in prompt]
    if self._is_chat(chat):
      encoded = self.encoder.encode_prompt([{"role": "user", "content": items}])
    else:
      encoded = self.encoder.encode_prefix(items)
    return Request(encoded.ids, pixels)

  def _is_chat(self, chat: bool | None) -> bool:
    return self.chat if chat is None else chat

  def _check_length(self, request: Request, max_new_tokens: int) -> None:
    limit, used = self.run.data.seq_len, _size(request)
    if used + max_new_tokens > limit:
      per_image = f" ({self.run.image_positions} for each image)" if request.images else ""
      room = f"; at most {limit - used} new tokens would fit" if used < limit else ""
      raise PromptError(
        f"the prompt takes {used} positions{per_image} and the answer up to {max_new_tokens} more, "
        f"but the model was trained on {limit}{room}."
      )

  def _answer(
    self,
    requests: list[Request],
    rows: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
  ) -> list[str]:
    """Runs one batch; `rows` number its prompts among all."""
    batch = self.mesh.shape["data"]
    num_rows = batch * _power_of_two(math.ceil(len(requests) / batch))
    tokens, images, lengths = _pad(
      requests, num_rows, self.run.model.vision.image_size, self.tokenizer.pad_id
    )
    rows = rows + [0] * (num_rows - len(rows))
    with jax.set_mesh(self.mesh):
      place = NamedSharding(self.mesh, LAYOUT.act_b)
      generated = sampler.generate(
        self.params,
        *jax.device_put((tokens, images, lengths), place),
        num_slots=_round_up(max_new_tokens),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        allowed=self._allowed,
        eos_id=self.tokenizer.eos_id,
        keys=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.array(rows)),
      )
    new, counts = jax.device_get(generated)
    pairs = zip(new, counts, strict=True)
    return [self.tokenizer.decode(ids[:n].tolist()) for ids, n in pairs][: len(requests)]


def abstract_params(run: RunConfig, mesh: Mesh) -> MM1:
  """Returns the model's shapes and shardings, in the dtype that it computes with."""
  # Nothing is kept for a backward pass that never comes.
  cfg = dataclasses.replace(run.model, remat="none")
  model = abstract_state(lambda: MM1(jax.random.key(0), cfg), mesh)
  leaves = checkpoint.to_names(model)
  for name, x in leaves.items():
    if name.split(".")[-1] not in IN_FLOAT32:
      leaves[name] = jax.ShapeDtypeStruct(x.shape, jnp.dtype(cfg.dtype), sharding=x.sharding)
  return checkpoint.from_names(model, leaves)


def _make_mesh(run: RunConfig, data: int, tensor: int) -> Mesh:
  num, here = data * tensor, jax.local_devices()
  if not 1 <= num <= len(here):
    raise ConfigError(f"data {data} x tensor {tensor} needs {num} devices; there are {len(here)}.")
  # Rows are made to fit, so only the model has to divide.
  fitted = dataclasses.replace(
    run,
    mesh=MeshConfig(data=data, fsdp=1, tensor=tensor),
    data=dataclasses.replace(run.data, batch_size=data),
    train=dataclasses.replace(run.train, accumulation_steps=1),
  )
  types = (AxisType.Explicit,) * len(MESH_AXES)
  return jax.make_mesh(fitted.check_mesh(num), MESH_AXES, axis_types=types, devices=here[:num])


def _check(max_new_tokens: int, sampling: Sampling, batch_size: int) -> None:
  """Raises PromptError for the first setting that is out of range."""
  rules = [
    ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
    ("batch_size", batch_size, batch_size >= 1, "at least 1"),
    ("temperature", sampling.temperature, 0 <= sampling.temperature < math.inf, "at least 0"),
    ("top_k", sampling.top_k, sampling.top_k >= 0, "at least 0"),
    ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
  ]
  for name, value, fits, rule in rules:
    if not fits:
      raise PromptError(f"{name} is {value}; it must be {rule}.")


def _size(request: Request) -> int:
  return len(request.ids)


def _round_up(length: int) -> int:
  return math.ceil(length / LENGTH_STEP) * LENGTH_STEP


def _power_of_two(count: int) -> int:
  """Returns the smallest power of two that is not below `count`; 0 for 0."""
  return 1 << (count - 1).bit_length() if count else 0


def _pad(
  requests: list[Request], num_rows: int, image_size: tuple[int, int], pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns tokens int32[B, S] padded at the left, images uint8[B, N, H, W, 3], lengths int32[B].

  S is a multiple of `LENGTH_STEP` and N a power of two or 0; rows without a request have length 0.
  """
  length = _round_up(max(_size(r) for r in requests))
  slots = _power_of_two(max(len(r.images) for r in requests))
  tokens = np.full((num_rows, length), pad_id, np.int32)
  images = np.zeros((num_rows, slots, *image_size, 3), np.uint8)
  lengths = np.zeros(num_rows, np.int32)
  for i, request in enumerate(requests):
    lengths[i] = _size(request)
    tokens[i, length - lengths[i] :] = request.ids
    for j, picture in enumerate(request.images):
      images[i, j] = picture
  return tokens, images, lengths


def _pixels(image: Image, run: RunConfig) -> np.ndarray:
  """Returns uint8[H, W, 3] as training has them, from any of the forms that an image may have.

  Raises:
    PromptError: naming the file, if it is one.
  """
  name = f"image '{os.fspath(image)}'" if isinstance(image, os.PathLike) else "an image"
  try:
    return decode_image(
      _encoded(image),
      run.model.vision.image_size,
      fit=run.data.image_fit,
      max_pixels=run.data.max_image_pixels,
    )
  except OSError as e:
    raise PromptError(f"{name} cannot be read: {e.strerror or e}.") from e
  except ImageError as e:
    raise PromptError(f"{name} cannot be used: {e.reason}.") from e


def _encoded(image: Image) -> bytes:
  """Returns an encoded image; pixels are encoded without loss, so that all forms take one way."""
  if isinstance(image, os.PathLike):
    return epath.Path(image).read_bytes()
  if isinstance(image, bytes):
    return image
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
      raise PromptError(
        f"an image is an array {image.dtype}{list(image.shape)}; it must be uint8[H, W, 3]."
      )
    image = PIL.Image.fromarray(image)
  data = io.BytesIO()
  on_white(PIL.ImageOps.exif_transpose(image)).save(data, "PNG")
  return data.getvalue()
