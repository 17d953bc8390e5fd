# SPDX-License-Identifier: Apache-2.0
"""What a model may say, and what ends its answers: the same wherever it answers."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from mm1_jax.data.examples import Encoder


class Answers(NamedTuple):
  """The tokens of answers."""

  allowed: Bool[np.ndarray, " V"]  # those that may be said: all words, and the `ends`
  ends: tuple[int, ...]  # any of them ends an answer; the first is `</s>`
  stop: tuple[str, ...]  # texts that end a turn, where the template's end is no symbol


def answers(encoder: Encoder, vocab_size: int) -> Answers:
  """Returns what a model of `vocab_size` tokens may say, which may be more than words are."""
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
