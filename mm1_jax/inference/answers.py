# SPDX-License-Identifier: Apache-2.0
"""Tokens that a model may generate, and those that end an answer: one rule for all programs."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from mm1_jax.data.examples import Encoder


class Answers(NamedTuple):
  """The tokens of answers."""

  allowed: Bool[np.ndarray, " V"]  # those that may be drawn: all of text, and the `ends`
  ends: tuple[int, ...]  # any of them ends an answer; the first is `</s>`
  stop: tuple[str, ...]  # texts that end a turn, where the template's end is no symbol


def answers(encoder: Encoder, vocab_size: int) -> Answers:
  """Returns the tokens that a model may generate; `vocab_size` may exceed the tokenizer's."""
  tokenizer, end = encoder.tokenizer, encoder.answer_end
  ends, stop = (tokenizer.eos_id,), ()
  if len(end) == 1:
    ends = tuple(dict.fromkeys((*ends, *end)))
  else:
    stop = (encoder.template.assistant.end,)
  allowed = np.arange(vocab_size) < tokenizer.vocab_size
  allowed[sorted(tokenizer.special_ids)] = False
  allowed[list(ends)] = True
  return Answers(allowed, ends, stop)
