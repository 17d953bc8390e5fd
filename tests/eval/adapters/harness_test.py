# SPDX-License-Identifier: Apache-2.0
"""Settings of harnesses are honoured or refused, never ignored in silence."""

import pytest

from mm1_jax.eval.adapters import harness
from mm1_jax.eval.adapters.harness import Decoding, read_decoding
from mm1_jax.eval.task import EvalError
from mm1_jax.inference.beam import BeamSearch
from mm1_jax.inference.sampler import GREEDY, Sampling

pytestmark = pytest.mark.compiles


@pytest.mark.parametrize(
  ("kwargs", "expected"),
  [
    ({}, Decoding(128, (), GREEDY, 0)),
    ({"until": "\n", "max_gen_toks": 5}, Decoding(5, ("\n",), GREEDY, 0)),
    ({"until": ["\n", ".", "\n", ""]}, Decoding(128, ("\n", "."), GREEDY, 0)),
    ({"stop_sequences": ["\n"], "max_new_tokens": 16}, Decoding(16, ("\n",), GREEDY, 0)),
    ({"max_gen_toks": 7, "max_new_tokens": 9}, Decoding(7, (), GREEDY, 0)),
    ({"max_new_tokens": "7", "top_p": None}, Decoding(7, (), GREEDY, 0)),
    ({"do_sample": False, "temperature": 0.7}, Decoding(128, (), GREEDY, 0)),
    ({"do_sample": True, "temperature": 0, "top_p": 0}, Decoding(128, (), GREEDY, 0)),
    ({"temperature": 0.7, "seed": 3}, Decoding(128, (), Sampling(0.7), 3)),
    (
      {"do_sample": True, "temperature": 1, "top_k": 5, "top_p": 0.9},
      Decoding(128, (), Sampling(1.0, 5, 0.9), 0),
    ),
    ({"num_beams": 1, "repetition_penalty": 1.0}, Decoding(128, (), GREEDY, 0)),
    ({"num_beams": 3, "length_penalty": 0}, Decoding(128, (), BeamSearch(3, 0.0), 0)),
  ],
)
def test_generation_kwargs_are_honoured(kwargs, expected):
  assert read_decoding(kwargs, max_new_tokens=128) == expected


def test_what_is_not_used_is_told(caplog):
  with caplog.at_level("WARNING"):
    found = read_decoding({"image_aspect_ratio": "original"}, max_new_tokens=128)
  assert found == Decoding(128, (), GREEDY, 0)
  assert "image_aspect_ratio=original is not used" in caplog.text


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"repetition_penalty": 1.2}, "repetition_penalty=1.2, which is not offered"),
    ({"skip_special_tokens": False}, "skip_special_tokens=False, which is not offered"),
    ({"do_sample": True}, "do_sample=True without a temperature"),
    ({"num_beams": 3, "temperature": 0.5}, "num_beams=3 with temperature=0.5"),
    ({"max_gen_toks": 0}, "max_gen_toks is 0; it must be a whole number of at least 1"),
    ({"max_gen_toks": "many"}, "max_gen_toks is 'many'"),
    ({"top_k": 0.5, "temperature": 1}, "top_k is 0.5"),
    ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
  ],
)
def test_generation_kwargs_are_refused(kwargs, message):
  with pytest.raises(EvalError, match=message):
    read_decoding(kwargs, max_new_tokens=128)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ({}, "no checkpoint among them; it takes checkpoint=RUN and may have data, fsdp"),
    ({"pretrained": "x"}, "'pretrained' among them"),
    ({"checkpoint": "x", "tensor": 0}, "tensor is 0"),
    ({"checkpoint": "x", "trust_remote_code": True}, "'trust_remote_code' among them"),
  ],
)
def test_model_args_are_checked(args, message):
  with pytest.raises(EvalError, match=message):
    harness.load(args)


@pytest.mark.parametrize(("asked", "size"), [(None, 32), ("auto", 32), ("auto:4", 32), ("4", 4)])
def test_batch_sizes(asked, size):
  assert harness.batch_size(asked) == size


def test_a_device_that_jax_does_not_run_on_is_refused():
  for device in (None, "cpu", "cpu:0"):
    harness.check_device(device, "cpu")
  harness.check_device("cuda:1", "gpu")
  with pytest.raises(EvalError, match="device=cuda, but JAX runs on cpu"):
    harness.check_device("cuda", "cpu")


def test_answers_depend_on_prompt_place_and_seed_alone(model):
  words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
  requests = [model.encode([" ".join(words[: n + 1])], chat=False) for n in range(5)]
  ways = [
    Decoding(4, (), GREEDY, 0),
    Decoding(6, (), Sampling(1.0, 50), 7),
    Decoding(5, (), BeamSearch(2), 0),
  ]
  decodings = [ways[i % 3] for i in range(5)]
  found = harness.generate(model, requests, decodings, batch_size=2)
  assert found == harness.generate(model, requests, decodings, batch_size=8)
  for i in range(5):
    decoding = decodings[i]
    (alone,) = model.generate(
      [requests[i]],
      max_new_tokens=decoding.max_new_tokens,
      sampling=decoding.sampling,
      seed=[decoding.seed + i],
    )
    assert found[i] == alone
