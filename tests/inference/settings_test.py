# SPDX-License-Identifier: Apache-2.0
"""Settings of any type that a caller may give: taken for what they are, or refused by name."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm1_jax.inference import settings
from mm1_jax.inference.beam import BeamSearch
from mm1_jax.inference.prompts import PromptError
from mm1_jax.inference.sampler import Sampling


@pytest.mark.parametrize(
  "three", [3, np.int8(3), np.uint64(3), np.array(3), jnp.array(3)], ids=repr
)
def test_whole_numbers_of_all_libraries_are_pythons(three):
  assert settings.whole("top_k", three, 0) == 3
  assert type(settings.whole("top_k", three, 0)) is int
  assert np.array_equal(settings.keys(three, 2), settings.keys(3, 2))
  assert settings.sampling(Sampling(top_k=three)) == Sampling(top_k=3)


@pytest.mark.parametrize("half", [0.5, np.float16(0.5), np.array(0.5), jnp.float32(0.5)], ids=repr)
def test_numbers_of_all_libraries_are_pythons(half):
  assert settings.sampling(Sampling(half, 0, half)) == Sampling(0.5, 0, 0.5)
  assert settings.sampling(BeamSearch(2, half)) == BeamSearch(2, 0.5)


@pytest.mark.parametrize(
  "wrong", [True, np.True_, "3", 1.5, np.float32(3), None, [3], b"3", 3j], ids=repr
)
def test_what_is_no_whole_number_is_refused_by_name(wrong):
  with pytest.raises(PromptError, match=r"^seed is .*; it must be a whole number"):
    settings.integer("seed", wrong)
  with pytest.raises(PromptError, match=r"^top_k is .*; it must be a whole number"):
    settings.sampling(Sampling(top_k=wrong))
  with pytest.raises(PromptError, match=r"^num_beams is .*; it must be a whole number"):
    settings.sampling(BeamSearch(wrong))


@pytest.mark.parametrize("wrong", [True, "0.5", None, [0.5], 1j], ids=repr)
def test_what_is_no_number_is_refused_by_name(wrong):
  for how, name in (
    (Sampling(wrong), "temperature"),
    (Sampling(top_p=wrong), "top_p"),
    (BeamSearch(2, wrong), "length_penalty"),
  ):
    with pytest.raises(PromptError, match=rf"^{name} is .*; it must be a number"):
      settings.sampling(how)


@pytest.mark.parametrize(
  "wrong", [math.nan, math.inf, -1, 1e39, 10**400, np.float32("nan")], ids=str
)
def test_numbers_that_no_float32_holds_are_refused(wrong):
  with pytest.raises(PromptError, match=r"^temperature is "):
    settings.sampling(Sampling(wrong))
  with pytest.raises(PromptError, match=r"^top_p is "):
    settings.sampling(Sampling(top_p=wrong))
  if wrong != -1:
    with pytest.raises(PromptError, match=r"^length_penalty is .*; it must be finite"):
      settings.sampling(BeamSearch(2, wrong))


def test_a_top_k_above_every_vocabulary_is_all_of_it():
  assert settings.sampling(Sampling(top_k=10**30)).top_k == 2**31 - 1


def test_a_temperature_near_0_divides_by_no_0():
  assert settings.sampling(Sampling(1e-300)).temperature == settings.COLDEST
  assert settings.sampling(Sampling(0)).temperature == 0


@pytest.mark.parametrize("how", [None, 0.7, {"temperature": 1}, "greedy", (0.7, 0, 1.0)], ids=repr)
def test_what_is_no_way_of_drawing_is_refused(how):
  with pytest.raises(PromptError, match="it must be a Sampling or a BeamSearch"):
    settings.sampling(how)


@pytest.mark.parametrize("texts", ["a", b"a", None, 3, [3], ["a", ""], [b"a"], {"a": 1}], ids=repr)
def test_what_is_no_list_of_texts_stops_nothing(texts):
  with pytest.raises(PromptError, match="it must be a list of texts, none of them empty"):
    settings.stop(texts)
  assert settings.stop(["a", "b"]) == ("a", "b")


@pytest.mark.parametrize("value", ["no", 1, 0.0, []], ids=repr)
def test_what_is_no_truth_value_is_refused(value):
  with pytest.raises(PromptError, match=r"^chat is .*; it must be True, False or None"):
    settings.chat(value)
  assert settings.chat(np.False_) is False


class TestSeeds:
  LARGE = (0, 1, -1, -(2**31), 2**31, 2**32 - 1, 2**32, 2**63, 2**64, -(2**80), 10**100)

  def test_any_whole_number_is_one_and_no_two_are_alike(self):
    one_by_one = {settings.keys(seed, 1).tobytes() for seed in self.LARGE}
    assert len(one_by_one) == len(self.LARGE)
    together = settings.keys(self.LARGE, len(self.LARGE))
    assert len({row.tobytes() for row in together}) == len(self.LARGE)

  def test_seeds_of_32_bits_are_those_of_jax(self):
    for seed in (0, 7, 2**32 - 1):
      key = jax.random.key_data(jax.random.key(seed))
      assert np.array_equal(settings.keys([seed], 1)[0], key)

  def test_arrays_of_seeds(self):
    expected = settings.keys([3, 4], 2)
    for seeds in ((3, 4), np.array([3, 4]), jnp.array([3, 4])):
      assert np.array_equal(settings.keys(seeds, 2), expected)

  def test_one_for_each_prompt(self):
    with pytest.raises(PromptError, match="there are 3 seeds for 2 prompts"):
      settings.keys([1, 2, 3], 2)

  @pytest.mark.parametrize("seed", ["12", b"12", jax.random.key(0), {1: 2}, [1, "2"]], ids=str)
  def test_what_is_none(self, seed):
    with pytest.raises(PromptError, match="it must be a whole number"):
      settings.keys(seed, 2)
