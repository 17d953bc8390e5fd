# SPDX-License-Identifier: Apache-2.0
"""Settings of an answer as callers give them, checked and made Python's own numbers.

A number may be Python's, NumPy's or a JAX array of one; a bool or a text is none.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mm1_jax import untrusted
from mm1_jax.inference.beam import BeamSearch
from mm1_jax.inference.prompts import PromptError
from mm1_jax.inference.sampler import Sampling

MOST_BEAMS = 64
LARGEST = 2**31 - 1  # that an int32 holds; more tokens than any vocabulary has
COLDEST = 1e-30  # logits divided by a smaller temperature would not be finite


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
  """Returns a whole number.

  Raises:
    PromptError: it is none, below `least`, or above `most`.
  """
  value = integer(name, value)
  if value < least or (most is not None and value > most):
    rule = f"at least {least}" if most is None else f"from {least} to {most}"
    raise PromptError(f"{name} is {untrusted.shown(value)}; it must be {rule}.")
  return value


def sampling(how: Any) -> Sampling | BeamSearch:
  """Returns how answers are drawn or searched for.

  Raises:
    PromptError: it is neither, or one of its numbers is out of range.
  """
  if isinstance(how, BeamSearch):
    return BeamSearch(
      whole("num_beams", how.num_beams, 2, MOST_BEAMS),
      _number("length_penalty", how.length_penalty, np.isfinite, "finite"),
    )
  if not isinstance(how, Sampling):
    how = untrusted.shown(how)
    raise PromptError(f"sampling is {how}; it must be a Sampling or a BeamSearch.")
  heat = _number("temperature", how.temperature, lambda x: 0 <= x < math.inf, "at least 0")
  return Sampling(
    max(heat, COLDEST) if heat else 0.0,
    min(whole("top_k", how.top_k, 0), LARGEST),
    _number("top_p", how.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1"),
  )


def stop(texts: Any) -> tuple[str, ...]:
  """Returns the texts that end an answer.

  Raises:
    PromptError: it is no list of texts, or one is empty.
  """
  if isinstance(texts, str) or not isinstance(texts, Sequence):
    fits = False
  else:
    fits = all(isinstance(text, str) and text for text in texts)
  if not fits:
    shown = untrusted.shown(texts)
    raise PromptError(f"stop is {shown}; it must be a list of texts, none of them empty.")
  return tuple(texts)


def chat(value: Any) -> bool | None:
  """Returns whether a prompt is answered in a turn; None leaves that to the run.

  Raises:
    PromptError: it is neither True, False nor None.
  """
  value = _plain(value)
  if value is not None and not isinstance(value, bool):
    raise PromptError(f"chat is {untrusted.shown(value)}; it must be True, False or None.")
  return value


def keys(seed: Any, num: int) -> np.ndarray:
  """Returns the data of a random key for each of `num` prompts.

  Args:
    seed: a whole number of any size for all of them, or a sequence of one for each.
    num: how many.

  Raises:
    PromptError: a seed is no whole number, or there are not as many as prompts.
  """
  several = isinstance(seed, Sequence) and not isinstance(seed, str | bytes)
  several = several or (isinstance(seed, np.ndarray | jax.Array) and seed.ndim == 1)
  if not several:
    key = jax.random.key(np.uint32(_word(seed)))
    made = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num))
  elif len(seed) != num:
    raise PromptError(f"there are {len(seed)} seeds for {num} prompts; give one, or one for each.")
  else:
    made = jax.vmap(jax.random.key)(jnp.array([_word(one) for one in seed], jnp.uint32))
  return np.asarray(jax.random.key_data(made))


def _word(seed: Any) -> int:
  """Returns a seed of any size as one of 32 bits: itself where it is, else a hash."""
  seed = integer("seed", seed)
  if 0 <= seed < 2**32:
    return seed
  return zlib.crc32(seed.to_bytes(seed.bit_length() // 8 + 1, "little", signed=True))


def integer(name: str, value: Any) -> int:
  """Returns a whole number of any size.

  Raises:
    PromptError: it is none.
  """
  value = _plain(value)
  if not isinstance(value, int) or isinstance(value, bool):
    raise PromptError(f"{name} is {untrusted.shown(value)}; it must be a whole number.")
  return int(value)


def _number(name: str, value: Any, fits: Callable[[np.float32], Any], rule: str) -> float:
  """Returns a number that fits as the float32 that it becomes."""
  value = _plain(value)
  if not isinstance(value, int | float) or isinstance(value, bool):
    raise PromptError(f"{name} is {untrusted.shown(value)}; it must be a number.")
  try:
    number = float(value)
  except OverflowError:
    number = math.inf if value > 0 else -math.inf
  with np.errstate(over="ignore"):
    if not fits(np.float32(number)):
      raise PromptError(f"{name} is {untrusted.shown(value)}; it must be {rule}.")
  return number


def _plain(value: Any) -> Any:
  """Returns a number of NumPy's or JAX's as Python's, all else as it is."""
  numeric = isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0
  if numeric and not jnp.issubdtype(value.dtype, jax.dtypes.extended):  # a key is no number
    return value.item()
  return value
