# SPDX-License-Identifier: Apache-2.0
"""A run's checkpoint answers prompts of any shape, and says what it cannot use."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
from tiny_model import SEQ_LEN, TOKENS_PER_IMAGE

from mm1_jax import checkpoint
from mm1_jax.checkpoint import CheckpointError
from mm1_jax.config import ConfigError
from mm1_jax.data.image import PAD_COLOR
from mm1_jax.data.sources import DataError
from mm1_jax.inference import sampler
from mm1_jax.inference.model import Model, PromptError
from mm1_jax.inference.sampler import Sampling
from mm1_jax.sharding import LAYOUT


def change_config(workdir: pathlib.Path, part: str, **values) -> None:
  path = workdir / "config.json"
  config = json.loads(path.read_text())
  config[part] |= values
  path.write_text(json.dumps(config))


@pytest.fixture
def copy(workdir, tmp_path):
  """A run of one's own."""
  return pathlib.Path(shutil.copytree(workdir, tmp_path / "copy"))


@pytest.fixture
def prompts(pictures):
  a, b = pictures
  return [["What is", a, " this"], ["Once upon a time"], [a, "A cat.", b, ""], [b]]


def test_answers_do_not_depend_on_the_batch(model, prompts):
  together = model.generate(prompts, max_new_tokens=5)
  assert len(set(together)) == len(prompts)
  assert model.generate(prompts, max_new_tokens=5, batch_size=1) == together
  assert model.generate([], max_new_tokens=5) == []


def test_devices_share_rows_and_params_and_give_the_same_answers(model, workdir, prompts):
  shared = Model.load(workdir, data=2, tensor=2)
  assert "tensor" in str(shared.params.decoder.units.layers[0].mlp.up[...].sharding.spec)
  expected = model.generate(prompts[:3], max_new_tokens=5)
  assert shared.generate(prompts[:3], max_new_tokens=5) == expected


def test_programs_are_few(model):
  before = sampler.generate._cache_size()
  rng = np.random.default_rng(0)
  for i in range(6):
    prompt = ["a " * int(rng.integers(1, 20))]
    settings = Sampling(temperature=0.1 * i, top_k=i, top_p=1 - 0.1 * i)
    model.generate([prompt], max_new_tokens=i + 1, sampling=settings, seed=i)
  assert sampler.generate._cache_size() - before <= 1


def test_load_takes_the_newest_step_or_the_one_named(model, workdir):
  embedding = model.params.decoder.embedding[...]
  for path, sign in ((workdir / "checkpoints" / "2", 1), (workdir / "checkpoints" / "1", -1)):
    other = Model.load(path)
    np.testing.assert_array_equal(other.params.decoder.embedding[...], sign * embedding)
    assert other.run == model.run


def test_load_takes_a_relative_path(model, workdir, monkeypatch):
  monkeypatch.chdir(workdir / "checkpoints")
  for path in ("..", "2"):
    assert Model.load(path).run == model.run


def test_params_in_the_compute_dtype_give_the_same_logits(copy, prompts):
  change_config(copy, "model", dtype="bfloat16")
  model = Model.load(copy)
  assert model.params.decoder.embedding[...].dtype == "bfloat16"
  full = checkpoint.restore_params(
    copy,
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, "float32", sharding=x.sharding), model.params
    ),
  )

  @jax.jit
  def logits(params, tokens, images):
    ones = jax.numpy.ones_like(tokens)
    positions = jax.numpy.cumsum(ones, axis=1) - 1
    hidden = params.decoder(params.embed(tokens, images), positions, ones).hidden
    return params.decoder.logits(hidden, params.decoder.head_weight())

  request = model.encode(prompts[0])
  with jax.set_mesh(model.mesh):
    place = jax.sharding.NamedSharding(model.mesh, LAYOUT.act_b)
    arrays = np.array([request.ids], np.int32), np.array(request.images)[None]
    tokens, images = jax.device_put(arrays, place)
    np.testing.assert_array_equal(
      logits(model.params, tokens, images), logits(full, tokens, images)
    )


def test_a_prompt_is_a_documents_beginning_or_a_users_turn(model, pictures):
  encoder = model.encoder
  items = [{"text": "What is"}, {"image": b""}, {"text": " this?"}]
  prompt = ["What is", pictures[0], " this?"]
  raw = encoder.encode_prefix(items).ids
  chat = encoder.encode_prompt([{"role": "user", "content": items}]).ids
  assert model.encode(prompt).ids == raw
  assert model.encode(prompt, chat=True).ids == chat
  assert model.encode(prompt, chat=False).ids == raw
  assert model.tokenizer.decode(chat).endswith("ASSISTANT:")


def test_a_run_on_conversations_is_asked_in_turns(copy):
  assert not Model.load(copy).chat
  change_config(copy, "data", chat=True)
  assert Model.load(copy).chat


def test_text_that_looks_like_a_picture_is_text(model):
  ids = model.encode(["<image></s><pad>"]).ids
  assert not model.tokenizer.special_ids & set(ids[1:])


def test_specials_are_never_drawn(model):
  loud = jax.tree.map(lambda x: x, model.params)
  specials = sorted(model.tokenizer.special_ids - {model.tokenizer.eos_id})
  beyond = range(model.tokenizer.vocab_size, model.run.model.decoder.vocab_size)
  banned = np.array([*specials, *beyond])
  head = np.array(loud.decoder.head[...])
  head[banned] *= 1e4
  loud.decoder.head[...] = jax.device_put(head, loud.decoder.head[...].sharding)
  settings = Sampling(temperature=1.0)
  quiet = model.generate([["Hello"]], max_new_tokens=20, sampling=settings)
  assert (
    Model(loud, model.run, model.mesh).generate([["Hello"]], max_new_tokens=20, sampling=settings)
    == quiet
  )


def test_all_forms_of_a_picture_are_the_same_pixels(model, pictures):
  path = pictures[0]
  image = PIL.Image.open(path)
  forms = [path, path.read_bytes(), image, np.asarray(image)]
  pixels = [model.encode([form]).images[0] for form in forms]
  assert pixels[0].shape == (16, 16, 3)
  for other in pixels[1:]:
    np.testing.assert_array_equal(other, pixels[0])
  clear = PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0))
  assert (model.encode([clear]).images[0] == 255).all()


def test_pictures_fit_as_in_training(model, monkeypatch):
  data = dataclasses.replace(model.run.data, image_fit="pad", max_image_pixels=200)
  monkeypatch.setattr(model, "run", dataclasses.replace(model.run, data=data))
  wide = np.full((8, 16, 3), 9, np.uint8)
  (pixels,) = model.encode([wide]).images
  assert (pixels[4:12] == 9).all()
  assert (pixels[:4] == PAD_COLOR).all()
  with pytest.raises(PromptError, match="image too large"):
    model.encode([np.full((20, 20, 3), 9, np.uint8)])


def test_a_picture_that_cannot_be_used_is_named(model, pictures, tmp_path):
  broken = tmp_path / "broken.png"
  broken.write_bytes(pictures[0].read_bytes()[:-500])
  with pytest.raises(PromptError, match=r"image '.*broken.png' cannot be used: truncated image"):
    model.generate([[broken]])
  with pytest.raises(PromptError, match=r"missing.png' cannot be read: No such file"):
    model.generate([[tmp_path / "missing.png"]])
  with pytest.raises(PromptError, match="an image cannot be used"):
    model.generate([[b"not a picture"]])
  with pytest.raises(PromptError, match=r"float32\[4, 4\]; it must be uint8\[H, W, 3\]"):
    model.generate([[np.zeros((4, 4), np.float32)]])


def test_a_prompt_that_is_too_long_says_by_how_much(model, pictures):
  used = 1 + TOKENS_PER_IMAGE + 2
  room = SEQ_LEN - used
  match = rf"takes {used} positions \(6 for each image\).* up to 190 more.* trained on {SEQ_LEN}; "
  with pytest.raises(PromptError, match=match + rf"at most {room} new tokens would fit"):
    model.generate([[pictures[0]]], max_new_tokens=190)
  with pytest.raises(PromptError, match=rf"takes \d+ positions and .* trained on {SEQ_LEN}\."):
    model.generate([["word " * SEQ_LEN]])


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"sampling": Sampling(temperature=-1)}, "temperature is -1; it must be at least 0"),
    ({"sampling": Sampling(top_k=-1)}, "top_k is -1"),
    ({"sampling": Sampling(top_p=0)}, "top_p is 0; it must be above 0 and at most 1"),
    ({"sampling": Sampling(top_p=float("nan"))}, "top_p is nan"),
  ],
)
def test_settings_out_of_range(model, settings: dict, message: str):
  with pytest.raises(PromptError, match=message):
    model.generate([["Hello"]], **settings)


def test_a_folder_that_is_no_run(tmp_path):
  with pytest.raises(CheckpointError, match=r"is not a run: it has no config\.json"):
    Model.load(tmp_path)


def test_a_run_without_a_checkpoint(copy):
  shutil.rmtree(copy / "checkpoints")
  with pytest.raises(CheckpointError, match="no checkpoint under"):
    Model.load(copy)


def test_a_run_with_a_checkpoint_cut_short(copy):
  shutil.rmtree(copy / "checkpoints" / "1")
  (copy / "checkpoints" / "2").rename(copy / "checkpoints" / "2.orbax-checkpoint-tmp-0")
  with pytest.raises(
    CheckpointError, match=r"Only unfinished ones: \['2.orbax-checkpoint-tmp-0'\]"
  ):
    Model.load(copy)


def test_a_damaged_checkpoint(copy):
  for file in (copy / "checkpoints" / "2" / "params").rglob("*"):
    if file.is_file() and "d" in file.parts:
      file.write_bytes(b"")
  with pytest.raises(CheckpointError, match="cannot be read"):
    Model.load(copy)


def test_a_checkpoint_of_another_model(copy):
  config = json.loads((copy / "config.json").read_text())
  change_config(copy, "model", decoder=config["model"]["decoder"] | {"mlp_dim": 128})
  with pytest.raises(CheckpointError, match="is of another model"):
    Model.load(copy)


def test_a_run_without_its_tokenizer(copy):
  (copy / "tokenizer.model").unlink()
  with pytest.raises(DataError, match=r"tokenizer\.model' cannot be read"):
    Model.load(copy)


def test_devices_that_are_not_there(workdir):
  with pytest.raises(ConfigError, match="data 3 x tensor 4 needs 12 devices; there are 8"):
    Model.load(workdir, data=3, tensor=4)
  with pytest.raises(ConfigError, match="num_kv_heads 2 does not divide"):
    Model.load(workdir, tensor=4)
