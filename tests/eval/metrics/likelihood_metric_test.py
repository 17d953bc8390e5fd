# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from mm1_jax.eval.metrics import likelihood


def test_choices_by_sum_characters_and_bytes():
  choices, log_probs = ["é", "four", "a longer one"], [-2.0, -3.0, -6.0]
  assert likelihood.choose(log_probs, choices) == 0
  assert likelihood.choose(log_probs, choices, "characters") == 2
  choices, log_probs = ["éé", "aaa"], [-2.0, -2.4]
  assert likelihood.choose(log_probs, choices, "characters") == 1
  assert likelihood.choose(log_probs, choices, "bytes") == 0
  assert likelihood.choose([-1.0, -1.0], ["", "\ud800"], "bytes") == 1


def test_bad_choices_are_named():
  with pytest.raises(ValueError, match="1 log-probabilities for 2"):
    likelihood.choose([-1.0], ["a", "b"])
  with pytest.raises(ValueError, match="NaN"):
    likelihood.choose([-1.0, math.nan], ["a", "b"])
  with pytest.raises(ValueError, match="by 'tokens'"):
    likelihood.choose([-1.0], ["a"], "tokens")


def test_perplexities():
  assert likelihood.perplexity([-math.log(2), -math.log(8)]) == pytest.approx(4)
  assert likelihood.word_perplexity([-math.log(8)], ["one two  three"]) == pytest.approx(2)
  assert likelihood.byte_perplexity([-math.log(16)], ["éab"]) == pytest.approx(2)
  assert likelihood.bits_per_byte([-4 * math.log(2)], ["éab"]) == pytest.approx(1)
  assert likelihood.perplexity([-1e9]) == math.inf
  with pytest.raises(ValueError, match="0 units"):
    likelihood.perplexity([])
