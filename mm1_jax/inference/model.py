# SPDX-License-Identifier: Apache-2.0
"""A trained model, ready to answer.

model = Model.load("runs/debug_sft")
model.generate([[pathlib.Path("a.jpg"), "What is this?"]])  # ["A cat."]
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding

from mm1_jax import checkpoint, untrusted
from mm1_jax.config import ConfigError, MeshConfig, RunConfig
from mm1_jax.data.examples import make_encoder
from mm1_jax.data.tokenizer import Tokenizer
from mm1_jax.inference import beam, sampler, settings
from mm1_jax.inference import quantize as quantization
from mm1_jax.inference.answers import answers
from mm1_jax.inference.beam import BeamSearch, Search
from mm1_jax.inference.prompts import Prompt, PromptError, Request, check_room, read_prompt
from mm1_jax.inference.sampler import GREEDY, Draw, Sampling
from mm1_jax.models.mm1 import IN_FLOAT32, MM1
from mm1_jax.sharding import LAYOUT, abstract_state, fetch, make_params_mesh, num_row_shards

SHORTEST = 32  # positions that any prompt gets room for
# Tokens between two reads by the host, which checks stop strings, streams, and notices Ctrl-C.
TOKENS_AT_ONCE = 8
LONGEST_ANSWER = 128  # tokens, where none are asked for
SECONDS_BETWEEN_NEWS = 10.0


class Model:
  """Params on a mesh, with the tokenizer and the config that they were trained with.

  Args:
    params: the model, on `mesh`.
    run: its run's config.
    mesh: devices that it runs on.

  Attributes:
    answers: tokens that may be drawn, and those that end an answer.
    digest: a hash that differs between models that were loaded; "" for one that was not.
  """

  def __init__(self, params: MM1, run: RunConfig, mesh: Mesh, *, digest: str = ""):
    self.digest = digest
    self.run = run
    self.mesh = mesh
    self.params = params
    self.tokenizer = Tokenizer(run.data.tokenizer)
    self.encoder = make_encoder(
      run.data,
      self.tokenizer,
      run.input_spec,
    )
    self.chat = run.data.chat
    self.answers = answers(self.encoder, run.model.decoder.vocab_size)

  @classmethod
  def load(
    cls,
    path: epath.PathLike,
    *,
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    tiling: Mapping[str, Any] | None = None,
    quantize: str | None = None,
  ) -> "Model":
    """Reads a run's newest checkpoint, or the one of its steps that `path` is.

    Args:
      path: a run's workdir, or a step's folder `checkpoints/STEP` in one.
      data: devices that rows are split over, each with all params.
      fsdp: devices that rows are split over, and params.
      expert: the same, and the experts of a sparse model.
      tensor: devices that heads, mlp and vocabulary are split over.
      tiling: what differs from how pictures were cut in training, such as `{"max_tiles": 16}`, or
        `{"last": 1}` for examples in low and a question in high resolution; see `TilingConfig`.
      quantize: "int8" or "int4", what the blocks' matrices are kept in; see `inference.quantize`.

    Raises:
      CheckpointError: there is no checkpoint, or it is damaged.
      ConfigError: there are not enough devices, the model does not divide over them, or pictures
        were not cut in training.
      DataError: the run's tokenizer or template is missing or damaged.
    """
    if quantize is not None:
      quantization.check(quantize)
    path = checkpoint.absolute(path)
    workdir = path.parent.parent if (path / checkpoint.PARAMS).exists() else path
    run = checkpoint.read_run(workdir)
    if tiling:
      run = _with_tiling(run, tiling)
    mesh = _make_mesh(run, MeshConfig(data=data, fsdp=fsdp, expert=expert, tensor=tensor))
    params = checkpoint.restore_params(path, abstract_params(run, mesh))
    if quantize is not None:
      params = quantization.quantize(params, quantize, mesh)
    made_of = [checkpoint.digest(path), quantize, sorted((tiling or {}).items())]
    digest = hashlib.sha256(json.dumps(made_of, default=str).encode()).hexdigest()[:16]
    return cls(params, run, mesh, digest=digest)

  def generate(
    self,
    prompts: Sequence[Prompt | Request],
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | BeamSearch = GREEDY,
    stop: Sequence[str] = (),
    chat: bool | None = None,
    seed: int | Sequence[int] = 0,
    batch_size: int = 8,
    tell: Callable[[int], None] = lambda done: None,
  ) -> list[str]:
    """Returns one answer for each prompt.

    A prompt's answer depends on the prompt, its place in `prompts` (if the temperature is not 0)
    and the seed, not on the other prompts.

    Args:
      prompts: a text, texts and pictures in order, or turns of a conversation, for each prompt; or
        what `encode` made of it.
      max_new_tokens: tokens after which an answer is cut off; None is `answer_length`, or, where a
        prompt leaves less room, all of that; it is logged.
      sampling: how tokens are drawn, or how the likeliest answer is searched for.
      stop: texts that end an answer where they first appear; they are not part of it.
      chat: whether a prompt of texts and pictures is a user's turn that the assistant answers, or
        the beginning of a document to continue; None goes by what the run was trained on,
        `data.chat`.
      seed: of what is drawn, a whole number of any size; or one for each prompt: then its place
        does not matter.
      batch_size: prompts that are read at once.
      tell: is given how many have been answered, after each batch; what it raises ends the call.

    Raises:
      PromptError: a picture cannot be read, a prompt does not fit the model, or a setting is of
        another type or out of range.
    """
    sampling, stop = settings.sampling(sampling), settings.stop(stop)
    batch_size = settings.whole("batch_size", batch_size, 1)
    requests = [self.encode(p, chat=chat, max_new_tokens=max_new_tokens) for p in _listed(prompts)]
    limits = self._limits(requests, max_new_tokens)
    keys = settings.keys(seed, len(requests))
    answers, done = [""] * len(requests), 0
    for rows in _batches(requests, limits, batch_size):
      group = [requests[i] for i in rows]
      for texts in self._answer(group, keys[rows], limits[rows[0]], sampling, stop):
        for i, text in zip(rows, texts, strict=True):
          answers[i] = text
      done += len(rows)
      tell(done)
    return answers

  def stream(
    self,
    prompt: Prompt | Request,
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | BeamSearch = GREEDY,
    stop: Sequence[str] = (),
    chat: bool | None = None,
    seed: int = 0,
  ) -> Iterator[str]:
    """Yields one answer as it grows, each time all of it so far; for the rest see `generate`.

    Text that may be the beginning of a stop text, or of half a character, is held back. An answer
    that is searched for comes whole.

    Raises:
      PromptError: as in `generate`; at once, not with the first token.
    """
    sampling, stop = settings.sampling(sampling), settings.stop(stop)
    request = self.encode(prompt, chat=chat, max_new_tokens=max_new_tokens)
    (limit,) = self._limits([request], max_new_tokens)
    answers = self._answer([request], settings.keys(seed, 1), limit, sampling, stop)
    return (text for (text,) in answers)

  def encode(
    self, prompt: Prompt | Request, *, chat: bool | None = None, max_new_tokens: int | None = None
  ) -> Request:
    """Returns a prompt's ids and pixels, as training would have made them.

    Raises:
      PromptError: a picture cannot be read, or the prompt leaves no room for `max_new_tokens`; for
        a single one, where that is None.
    """
    chat = settings.chat(chat)
    max_new_tokens = 1 if max_new_tokens is None else max_new_tokens
    max_new_tokens = settings.whole("max_new_tokens", max_new_tokens, 1)
    if isinstance(prompt, Request):
      check_room(len(prompt.ids), len(prompt.images), self.run, max_new_tokens)
      return prompt
    chat = self.chat if chat is None else chat
    return read_prompt(prompt, self.run, self.encoder, chat=chat, max_new_tokens=max_new_tokens)

  @property
  def answer_length(self) -> int:
    """Tokens of an answer where none are asked for: a short row has room for a prompt, too."""
    return min(LONGEST_ANSWER, self.run.data.seq_len // 2)

  def _limits(self, requests: list[Request], max_new_tokens: int | None) -> list[int]:
    """Returns after how many tokens each answer is cut off; says so where it is room that cuts."""
    if max_new_tokens is not None:
      return [settings.whole("max_new_tokens", max_new_tokens, 1)] * len(requests)
    rooms = [self.room(request) for request in requests]
    if short := [room for room in rooms if room < self.answer_length]:
      logging.log_every_n_seconds(
        logging.INFO,
        "answers to %d of %d prompts may have %d new tokens at the least, not %d: the model was "
        "trained on %d positions, and the prompts take the others",
        SECONDS_BETWEEN_NEWS,
        *(len(short), len(rooms), min(short), self.answer_length, self.run.data.seq_len),
      )
    return [min(self.answer_length, room) for room in rooms]

  def room(self, request: Request) -> int:
    """Returns how many new tokens fit after a prompt; not above 0 if none do."""
    return self.run.data.seq_len - len(request.ids)

  def _answer(
    self,
    requests: list[Request],
    keys: np.ndarray,
    max_new_tokens: int,
    sampling: Sampling | BeamSearch,
    stop: Sequence[str],
  ) -> Iterator[list[str]]:
    """Runs one batch, each row with its own random key, and yields the answers as they grow."""
    shards = num_row_shards(self.mesh)
    num_rows = shards * power_of_two(math.ceil(len(requests) / shards))
    tokens, images, lengths = _pad(
      requests, num_rows, self.run.model.vision.image_size, self.tokenizer.pad_id
    )
    place = NamedSharding(self.mesh, LAYOUT.act_b)
    keys = np.resize(keys, (num_rows, *keys.shape[1:]))
    num_slots = bucket(tokens.shape[1] + max_new_tokens)
    says = [_Says(self, request.chat, stop) for request in requests]
    if isinstance(sampling, BeamSearch):
      rows = jax.device_put((tokens, images, lengths), place)
      yield self._search(rows, says, num_slots, max_new_tokens, sampling)
      return
    with jax.set_mesh(self.mesh):
      draw = Draw(
        sampling,
        jnp.asarray(self.answers.allowed),
        jnp.asarray(self.answers.ends),
        jax.random.wrap_key_data(jnp.asarray(keys)),
      )
      state = sampler.prefill(
        self.params,
        *jax.device_put((tokens, images, lengths), place),
        draw,
        num_slots=num_slots,
      )
    until = 1
    while True:
      new, counts, done = fetch((state.tokens, state.lengths, state.done))
      ended = bool(done.all()) or until == max_new_tokens
      texts = [
        say(ids[:count].tolist(), last=ended or bool(end))
        for say, ids, count, end in zip(says, new, counts, done, strict=False)
      ]
      yield texts
      stopped = np.array([say.stopped for say in says] + [True] * (num_rows - len(says)))
      if ended or (done | stopped).all():
        return
      until = min(until + TOKENS_AT_ONCE, max_new_tokens)
      with jax.set_mesh(self.mesh):
        state = sampler.decode(self.params, state, draw, jax.device_put(stopped, place), until)

  def _search(
    self,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    says: list["_Says"],
    num_slots: int,
    max_new_tokens: int,
    how: BeamSearch,
  ) -> list[str]:
    """Returns the best answers that beam search finds to `rows`: tokens, images and lengths."""
    with jax.set_mesh(self.mesh):
      search = Search(
        jnp.float32(how.length_penalty),
        jnp.int32(max_new_tokens),
        jnp.asarray(self.answers.allowed),
        jnp.asarray(self.answers.ends),
      )
      num_beams = how.num_beams
      beams = beam.prefill(self.params, *rows, search, num_slots=num_slots, num_beams=num_beams)
      # A stop text ends a beam, so its score counts no more: each token has to be looked at.
      at_once = 1 if any(say.stop for say in says) else TOKENS_AT_ONCE
      until = 1
      while not fetch(beam.finished(beams, search)).all():
        stopped = np.zeros(beams.scores.shape, bool)
        if at_once == 1:
          tokens = fetch(beams.tokens)[:, :, :until].tolist()
          for row, say in enumerate(says):
            stopped[row] = [say.would_stop(ids) for ids in tokens[row]]
        until = min(until + at_once, max_new_tokens)
        beams = beam.decode(self.params, beams, rows[2], search, jnp.asarray(stopped), until)
    best, lengths = fetch((beams.best, beams.best_length))
    return [
      say(ids[:length].tolist(), last=True)
      for say, ids, length in zip(says, best, lengths, strict=False)
    ]


def _listed(prompts: Any) -> list[Prompt | Request]:
  """Returns the prompts of a call.

  Raises:
    PromptError: it is one prompt, and not a list of them.
  """
  one = isinstance(prompts, str | bytes | Mapping | Request | np.ndarray)
  if one or not isinstance(prompts, Iterable):
    prompts = untrusted.shown(prompts)
    raise PromptError(
      f"prompts is {prompts}; it must be a list of prompts, such as [[image, 'What is this?']]."
    )
  prompts = list(prompts)
  if prompts and isinstance(prompts[0], Mapping):
    raise PromptError("prompts is a list of turns; it must be a list of prompts, such as [turns].")
  return prompts


def _batches(requests: list[Request], limits: list[int], size: int) -> Iterator[list[int]]:
  """Yields the places of requests that are answered together: of one limit, and of like shape.

  So there is less padding, and fewer programs.
  """

  def shape(i: int) -> tuple[int, ...]:
    return limits[i], len(requests[i].images), len(requests[i].ids)

  order = sorted(range(len(requests)), key=shape)
  for _, group in itertools.groupby(order, lambda i: limits[i]):
    rows = [*group]
    for start in range(0, len(rows), size):
      yield rows[start : start + size]


class _Says:
  """One answer in the making: tokens to text, up to the first of its stop texts."""

  def __init__(self, model: Model, chat: bool, stop: Sequence[str]):
    self.stopped = False
    self._decode = model.tokenizer.decode
    self.stop = (*stop, *model.answers.stop) if chat else tuple(stop)
    # In a turn, the space between the role and the text is not the text's.
    self._space = " " if chat and model.encoder.template.assistant.before.endswith(" ") else ""
    self._text = ""

  def __call__(self, ids: list[int], *, last: bool) -> str:
    """Returns the text of all tokens so far; `last` says that no more will follow."""
    if self.stopped:
      return self._text
    text = self._decode(ids).removeprefix(self._space)
    found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
    if found:
      self.stopped, text = True, text[: min(found)]
    elif not last:
      text = text.rstrip("\ufffd")  # half a character
      text = text[: len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)]
    self._text = text
    return text

  def would_stop(self, ids: list[int]) -> bool:
    """Returns whether the text of some tokens has a stop text."""
    text = self._decode(ids)
    return any(stop in text for stop in self.stop)


def _overlap(text: str, stop: str) -> int:
  """Returns how much of `stop` the end of `text` may be the beginning of."""
  return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


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


def _with_tiling(run: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
  if run.data.tiling is None:
    raise ConfigError(f"this run has no data.tiling, so pictures are not cut: {dict(changes)}.")
  known = [field.name for field in dataclasses.fields(run.data.tiling)]
  if unknown := sorted({*map(str, changes)} - {*known}):
    raise ConfigError(f"tiling has {unknown}; there are only {known}.")
  tiling = dataclasses.replace(run.data.tiling, **changes)
  # Answering has as many image slots as it needs.
  slots = max(run.data.images_per_row, tiling.max_slots)
  data = dataclasses.replace(run.data, tiling=tiling, images_per_row=slots)
  return dataclasses.replace(run, data=data)


def _make_mesh(run: RunConfig, sizes: MeshConfig) -> Mesh:
  here = jax.local_devices()
  axes = {"data": sizes.data, "fsdp": sizes.fsdp, "expert": sizes.expert, "tensor": sizes.tensor}
  num = math.prod(axes.values())
  if not 1 <= num <= len(here):
    asked = " x ".join(f"{axis} {size}" for axis, size in axes.items() if size != 1)
    raise ConfigError(f"{asked} needs {num} devices; there are {len(here)}.")
  return make_params_mesh(run.model, sizes, here[:num])  # rows are made to fit


def bucket(length: int) -> int:
  """Returns the room that so many positions get: 32, 48, 64, 96, 128, 192, ...

  Two sizes for every doubling: at most a third of the room is empty, and the programs for all
  lengths up to 4096 are 15.
  """
  above = max(SHORTEST, power_of_two(length))
  between = above * 3 // 4
  return between if above > SHORTEST and length <= between else above


def power_of_two(count: int) -> int:
  """Returns the smallest power of two that is not below `count`; 0 for 0."""
  return 1 << (count - 1).bit_length() if count else 0


def _pad(
  requests: list[Request], num_rows: int, image_size: tuple[int, int], pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns tokens int32[B, S] padded at the left, images uint8[B, N, H, W, 3], lengths int32[B].

  S is a `bucket` and N a power of two or 0; rows without a request have length 0.
  """
  length = bucket(max(len(r.ids) for r in requests))
  slots = power_of_two(max(len(r.images) for r in requests))
  tokens = np.full((num_rows, length), pad_id, np.int32)
  images = np.zeros((num_rows, slots, *image_size, 3), np.uint8)
  lengths = np.zeros(num_rows, np.int32)
  for i, request in enumerate(requests):
    lengths[i] = len(request.ids)
    tokens[i, length - lengths[i] :] = request.ids
    for j, picture in enumerate(request.images):
      images[i, j] = picture
  return tokens, images, lengths
