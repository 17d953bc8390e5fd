# SPDX-License-Identifier: Apache-2.0
"""What both harnesses ask for besides prompts: a model, decoding in many ways, progress."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from mm1_jax.eval.task import EvalError
from mm1_jax.inference.beam import BeamSearch
from mm1_jax.inference.generate import tell
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import Request
from mm1_jax.inference.sampler import GREEDY, Sampling
from mm1_jax.metrics import format_seconds

BATCH_SIZE = 32  # prompts read at once, where the harness leaves it to the model
SECONDS = 20  # between two lines of progress
# Settings of `Model.load` that a harness's --model_args may have.
SIZES = ("data", "fsdp", "expert", "tensor")
# Names of one setting in the harnesses' tasks; the first that is given counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
STOPS = ("until", "stop_sequences", "stop")
# Settings whose only value that changes nothing is this one.
NEUTRAL = {"repetition_penalty": 1.0, "num_return_sequences": 1, "use_cache": True}


class Decoding(NamedTuple):
  """How an answer is made."""

  max_new_tokens: int
  stop: tuple[str, ...]
  sampling: Sampling | BeamSearch
  seed: int


def load(args: Mapping[str, Any], others: Sequence[str] = ()) -> Model:
  """Returns the model that a harness's --model_args name.

  Args:
    args: `checkpoint`, sizes of the mesh and `quantize`, as of `Model.load`.
    others: names that the caller reads itself.

  Raises:
    EvalError: there is no checkpoint among them, or a name that means nothing here.
  """
  known = ("checkpoint", *SIZES, "quantize", *others)
  unknown = [name for name in args if name not in known]
  if unknown or not args.get("checkpoint"):
    wrong = f"{unknown[0]!r} among them" if unknown else "no checkpoint among them"
    raise EvalError(
      f"--model_args has {wrong}; it takes checkpoint=RUN and may have {', '.join(known[1:])}."
    )
  settings: dict[str, Any] = {"quantize": args.get("quantize")}
  settings |= {name: whole_number(name, args[name], 1) for name in SIZES if name in args}
  return Model.load(str(args["checkpoint"]), **settings)


def check_device(device: str | None, platform: str) -> None:
  """Raises an EvalError if a harness asks for another device than JAX found; None asks for none."""
  kind = (device or platform).split(":")[0]
  if {"cuda": "gpu", "rocm": "gpu"}.get(kind, kind) != platform:
    raise EvalError(
      f"device={device}, but JAX runs on {platform}; leave it out, or set JAX_PLATFORMS."
    )


def batch_size(asked: Any) -> int:
  """Returns how many prompts are read at once, of a number or "auto"."""
  if asked is None or str(asked).startswith("auto"):
    return BATCH_SIZE
  return whole_number("batch_size", asked, 1)


def whole_number(name: str, value: Any, least: int) -> int:
  """Returns a setting's value, no smaller than `least`.

  Raises:
    EvalError: it is not a whole number, or smaller.
  """
  try:
    number = int(value)
    fits = number == float(value) and number >= least
  except (TypeError, ValueError, OverflowError):
    fits = False
  if not fits:
    raise EvalError(f"{name} is {value!r}; it must be a whole number of at least {least}.")
  return number


def read_decoding(kwargs: Mapping[str, Any], *, max_new_tokens: int) -> Decoding:
  """Returns what a task's generation_kwargs ask for; None is as good as left out.

  An answer is sampled where `temperature` is above 0 and `do_sample` is not False, as in both
  harnesses. `top_k` and `top_p` count then, `num_beams` and `length_penalty` otherwise.

  `image_aspect_ratio` is not used, which is told once: pictures are fitted as in training.

  Args:
    kwargs: a task's, with those of the command line.
    max_new_tokens: where they do not say.

  Raises:
    EvalError: they ask for what is not offered here, or a value is out of range.
  """
  left = {name: value for name, value in kwargs.items() if value is not None}
  lengths = [left.pop(name) for name in LENGTHS if name in left]
  stops = [left.pop(name) for name in STOPS if name in left]
  seed = whole_number("seed", left.pop("seed", 0), 0)
  sampling = _sampling(left)
  if ratio := left.pop("image_aspect_ratio", None):
    told = "image_aspect_ratio=%s is not used: pictures are fitted as in training (data.image_fit)"
    logging.log_first_n(logging.WARNING, told, 1, ratio)
  for name, value in left.items():
    if name not in NEUTRAL or value != NEUTRAL[name]:
      raise EvalError(
        f"generation_kwargs has {name}={value!r}, which is not offered. They may have "
        f"{', '.join((LENGTHS[0], STOPS[0], *_SAMPLING))} and seed."
      )
  longest = whole_number(LENGTHS[0], lengths[0], 1) if lengths else max_new_tokens
  stop = [stops[0]] if stops and isinstance(stops[0], str) else list(stops[0]) if stops else []
  return Decoding(longest, tuple(dict.fromkeys(text for text in stop if text)), sampling, seed)


_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "num_beams", "length_penalty")


def _sampling(left: dict[str, Any]) -> Sampling | BeamSearch:
  """Takes the settings of sampling and beam search out of `left`, and returns what they say."""
  given = {name: left.pop(name) for name in _SAMPLING if name in left}
  do_sample = given.get("do_sample")
  temperature = _number("temperature", given.get("temperature", 0.0))
  if do_sample and "temperature" not in given:
    raise EvalError("generation_kwargs has do_sample=True without a temperature; give one.")
  num_beams = whole_number("num_beams", given.get("num_beams", 1), 1)
  if temperature and do_sample is not False:
    if num_beams > 1:
      raise EvalError(f"num_beams={num_beams} with temperature={temperature:g}: choose one.")
    top_k = whole_number("top_k", given.get("top_k", 0), 0)
    return Sampling(temperature, top_k, _number("top_p", given.get("top_p", 1.0)))
  if num_beams > 1:
    return BeamSearch(num_beams, _number("length_penalty", given.get("length_penalty", 1.0)))
  return GREEDY


def _number(name: str, value: Any) -> float:
  try:
    return float(value)
  except (TypeError, ValueError) as e:
    raise EvalError(f"{name} is {value!r}; it must be a number.") from e


def generate(
  model: Model, requests: Sequence[Request], decodings: Sequence[Decoding], *, batch_size: int
) -> list[str]:
  """Returns an answer for each request, each decoded in its own way.

  An answer that is sampled depends on its request, its place and its seed, on nothing else.
  """
  answers = [""] * len(requests)
  groups: dict[Decoding, list[int]] = {}
  for i, decoding in enumerate(decodings):
    groups.setdefault(decoding, []).append(i)
  news, done = teller("answers", len(requests)), 0
  for decoding, group in groups.items():
    # Prompts of like shape go together; the longest first, so that memory suffices early or never.
    group.sort(key=lambda i: (len(requests[i].images), len(requests[i].ids)), reverse=True)
    for start in range(0, len(group), batch_size):
      rows = group[start : start + batch_size]
      texts = model.generate(
        [requests[i] for i in rows],
        max_new_tokens=decoding.max_new_tokens,
        stop=decoding.stop,
        sampling=decoding.sampling,
        seed=[decoding.seed + i for i in rows],
        batch_size=batch_size,
      )
      for i, text in zip(rows, texts, strict=True):
        answers[i] = text
      done += len(rows)
      news(done)
  return answers


def teller(what: str, total: int) -> Callable[[int], None]:
  """Returns what tells progress now and then, given how many of `total` are done."""
  start = last = time.monotonic()

  def news(done: int) -> None:
    nonlocal last
    now = time.monotonic()
    if now - last >= SECONDS and done < total:
      last = now
      left = format_seconds((now - start) / done * (total - done))
      tell(f"{done} of {total} {what}, {left} left")

  return news
