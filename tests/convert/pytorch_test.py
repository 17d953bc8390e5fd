# SPDX-License-Identifier: Apache-2.0
"""How the exported PyTorch model generates; CI, which has no PyTorch, goes without.

What it computes is compared with goldens in export_test.py.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SIZES = ((50, 40), (20, 90), (64, 64))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A sparse run that cuts pictures into sub-images."""
  from tests.helpers.exports import make_params, run_config, save_run

  run, path = run_config("moe"), tmp_path_factory.mktemp("pytorch") / "run"
  save_run(path, run, make_params(run))
  return path


def load(workdir, out, dtype="float32"):
  from mm1_jax.convert.export import exporter
  from mm1_jax.convert.export.format import ExportOptions

  exporter.export(workdir, out, "huggingface", ExportOptions(dtype))
  model = transformers.AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
  return model, transformers.AutoProcessor.from_pretrained(out, trust_remote_code=True)


@pytest.fixture(scope="module")
def loaded(workdir, tmp_path_factory):
  return load(workdir, tmp_path_factory.mktemp("hub") / "out")


def user(text: str, *numbers: int) -> dict:
  """Returns a turn about some pictures of noise."""
  noise = [np.random.default_rng(i).integers(0, 256, (*SIZES[i], 3), np.uint8) for i in numbers]
  images = [{"type": "image", "image": image} for image in noise]
  return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def encode(processor, *conversations):
  return processor.apply_chat_template(
    list(conversations),
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
  )


def generate(model, inputs, **settings):
  """Returns the new tokens of each row, without what pads them, and the cache."""
  settings = {"max_new_tokens": 6, "return_dict_in_generate": True, **settings}
  out = model.generate(**inputs, **settings)
  pad = model.generation_config.pad_token_id
  new = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
  return [[i for i in row if i != pad] for row in new], out


QUESTIONS = (
  [user("What is this?", 0, 2)],
  [user("Hello.")],
  [user("And what do you see here, in one word?", 1)],
)


@pytest.mark.parametrize(
  "settings",
  [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}],
  ids=["greedy", "beams", "static"],
)
def test_a_batch_is_answered_as_its_rows_are(loaded, settings):
  """Fails if pictures go to other rows, or padding is attended to, or counted by positions."""
  model, processor = loaded
  together, _ = generate(model, encode(processor, *QUESTIONS), **settings)
  alone = [generate(model, encode(processor, q), **settings)[0][0] for q in QUESTIONS]
  assert together == alone
  assert len({tuple(row) for row in alone}) == len(alone)


def test_a_cache_is_continued_and_a_new_picture_read(loaded):
  """Fails if pictures are only read where a cache is empty."""
  model, processor = loaded
  turns = [*QUESTIONS[2]]
  inputs = encode(processor, turns)
  (said,), out = generate(model, inputs, max_new_tokens=1)  # the cache is the prompt
  answer = processor.decode(said, skip_special_tokens=True)
  turns += [{"role": "assistant", "content": answer}, user("And this?", 0)]
  more, both = encode(processor, turns), inputs["input_ids"].shape[1]
  assert (more["input_ids"][:, :both] == inputs["input_ids"]).all()
  assert out.cache.get_seq_length() == both
  settings = {"output_logits": True, "max_new_tokens": 4}
  fresh, whole = generate(model, more, **settings)
  continued, part = generate(model, more, cache=out.cache, **settings)
  assert continued == fresh
  for a, b in zip(part.logits, whole.logits, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_is_computed_with_in_float32_is_not_rounded(workdir, loaded, tmp_path):
  model, processor = load(workdir, tmp_path / "half", "bfloat16")
  whole, kept = loaded[0].state_dict(), 0
  for name, x in model.state_dict().items():
    if any(part in name for part in ("norm", "router", "class_", "position")):
      assert torch.equal(x, whole[name]), name
      kept += 1
    else:
      assert torch.equal(x, whole[name].bfloat16()), name
  assert kept > 20
  rows, _ = generate(model, encode(processor, *QUESTIONS))
  assert all(rows)


def test_accumulated_steps_are_divided_by_the_trainer(loaded):
  """Its loss is a mean over the batch, so a Trainer must not sum it over several."""
  assert loaded[0].accepts_loss_kwargs is False


def test_an_end_that_is_text_is_a_stop_string(loaded):
  """As the documentation has it, for templates whose end is no symbol of the tokenizer."""
  model, processor = loaded
  inputs = encode(processor, QUESTIONS[0])
  (whole,), _ = generate(model, inputs)
  end = processor.tokenizer.decode(whole[2:4])
  (cut,), _ = generate(model, inputs, stop_strings=[end], tokenizer=processor.tokenizer)
  assert cut == whole[:4]
