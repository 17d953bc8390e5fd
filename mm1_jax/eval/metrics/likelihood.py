# SPDX-License-Identifier: Apache-2.0
"""Choices by likelihood, and perplexities: lm-eval's definitions. Log-probabilities are in nats."""

import re
from collections.abc import Sequence

import numpy as np


def num_bytes(text: str) -> int:
  """Returns the bytes of a text as UTF-8; a lone surrogate has 3."""
  return len(text.encode("utf-8", "surrogatepass"))


LENGTHS = {"sum": lambda choice: 1, "characters": len, "bytes": num_bytes}


def choose(log_probs: Sequence[float], choices: Sequence[str], by: str = "sum") -> int:
  """Returns the index of the likeliest choice; of equal ones the first.

  Args:
    log_probs: of each choice after the question, summed over its tokens.
    choices: their texts, without the space in front.
    by: "sum" (lm-eval's `acc`), "characters" (`acc_norm`: divided by the characters of the choice)
      or "bytes" (`acc_bytes`: by its UTF-8 bytes).

  Raises:
    ValueError: lengths differ or are 0, a log-probability is NaN, or `by` is another name.
  """
  if len(log_probs) != len(choices) or not len(choices):
    raise ValueError(f"{len(log_probs)} log-probabilities for {len(choices)} choices")
  if by not in LENGTHS:
    raise ValueError(f"choices are compared by {by!r}, not by one of {sorted(LENGTHS)}")
  scores = [value / max(LENGTHS[by](c), 1) for value, c in zip(log_probs, choices, strict=True)]
  if np.any(np.isnan(scores)):
    raise ValueError(f"a choice's log-probability is NaN: {list(log_probs)}")
  return int(np.argmax(scores))


def perplexity(log_probs: Sequence[float] | np.ndarray) -> float:
  """Returns exp(- mean log-probability) of items: LAMBADA's, where an item is the last word."""
  return _exp(-_mean(log_probs, len(log_probs)))


def word_perplexity(log_probs: Sequence[float] | np.ndarray, texts: Sequence[str]) -> float:
  """Returns exp(- log-probability a word) of whole texts; words are what space separates."""
  return _exp(-_mean(log_probs, sum(len(re.split(r"\s+", text)) for text in texts)))


def byte_perplexity(log_probs: Sequence[float] | np.ndarray, texts: Sequence[str]) -> float:
  """Returns exp(- log-probability a byte) of whole texts."""
  return _exp(-_mean(log_probs, sum(map(num_bytes, texts))))


def bits_per_byte(log_probs: Sequence[float] | np.ndarray, texts: Sequence[str]) -> float:
  """Returns the negative log2-probability a byte of whole texts."""
  return -_mean(log_probs, sum(map(num_bytes, texts))) / float(np.log(2))


def _mean(log_probs: Sequence[float] | np.ndarray, n: int) -> float:
  total = float(np.sum(np.asarray(log_probs, np.float64)))
  if n < 1 or np.isnan(total):
    raise ValueError(f"a perplexity of {n} units whose log-probabilities sum to {total}")
  return total / n


def _exp(value: float) -> float:
  """Returns e^value; infinity where it is too large."""
  with np.errstate(over="ignore"):
    return float(np.exp(value))
