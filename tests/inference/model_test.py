# SPDX-License-Identifier: Apache-2.0
"""A run's checkpoint answers prompts of any shape, and says what it cannot use."""

import dataclasses
import io
import itertools
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import PIL.Image
import pytest

from mm1_jax import checkpoint
from mm1_jax.checkpoint import CheckpointError
from mm1_jax.config import ConfigError
from mm1_jax.data.image import PAD_COLOR
from mm1_jax.data.sources import DataError
from mm1_jax.inference import sampler
from mm1_jax.inference.model import Model, _overlap, _Says, bucket
from mm1_jax.inference.prompts import PromptError, fill_slots
from mm1_jax.inference.sampler import Sampling
from mm1_jax.sharding import LAYOUT
from tests.helpers.runs import SEQ_LEN, TOKENS_PER_IMAGE

pytestmark = pytest.mark.compiles


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


@pytest.mark.slow
def test_devices_share_rows_and_params_and_give_the_same_answers(model, workdir, prompts):
  shared = Model.load(workdir, data=2, tensor=2)
  assert "tensor" in str(shared.params.decoder.units.layers[0].mlp.up[...].sharding.spec)
  expected = model.generate(prompts[:3], max_new_tokens=5)
  assert shared.generate(prompts[:3], max_new_tokens=5) == expected


def test_programs_are_few(model):
  """Two programs for all prompts of one room and all answers of one, whatever the settings."""
  before = sampler.prefill._cache_size(), sampler.decode._cache_size()
  rng = np.random.default_rng(0)
  for i in range(8):
    prompt = ["a " * int(rng.integers(1, 30))]
    settings = Sampling(temperature=i % 2, top_k=i, top_p=1 - 0.1 * i)
    model.generate([prompt], max_new_tokens=i + 1, sampling=settings, seed=i, stop=["b" * (i + 1)])
  assert sampler.prefill._cache_size() - before[0] <= 1
  assert sampler.decode._cache_size() - before[1] <= 1


@pytest.mark.long
def test_programs_for_200_requests(model, pictures, capsys):
  before = sampler.prefill._cache_size(), sampler.decode._cache_size()
  rng = np.random.default_rng(0)
  for _ in range(200):
    prompt = ["a " * int(rng.integers(1, 60)), *[pictures[0]] * int(rng.integers(0, 5))]
    model.generate([prompt], max_new_tokens=int(rng.integers(1, 32)))
  prefills = sampler.prefill._cache_size() - before[0]
  decodes = sampler.decode._cache_size() - before[1]
  with capsys.disabled():
    print(f"\n200 requests: {prefills} programs for prompts, {decodes} for answers")
  # Prompts take 32, 48, ... or 192 positions, with 0, 1, 2 or 4 slots; caches are one room longer.
  assert prefills <= 6 * 4 * 2
  assert decodes <= 6


def test_a_model_of_short_rows_answers_without_being_told_how_long(model):
  data = dataclasses.replace(model.run.data, seq_len=64)
  short = Model(model.params, dataclasses.replace(model.run, data=data), model.mesh)
  assert (model.answer_length, short.answer_length) == (96, 32)  # half of 192 and of 64
  prompt = [["what is it?"]]
  assert short.generate(prompt) == short.generate(prompt, max_new_tokens=32)
  assert [*short.stream(prompt[0])][-1] == short.generate(prompt)[0]


def test_an_answer_gets_what_room_a_prompt_leaves_and_it_is_said(model, caplog):
  """Where no length was asked for, a prompt of more than half of a row failed."""
  long = ["word " * 110]
  room = model.room(model.encode(long))
  assert 0 < room < model.answer_length
  with caplog.at_level("INFO", logger="absl"):
    both = model.generate([long, ["Hi"]], sampling=Sampling(1.0), seed=[1, 2])
  assert f"answers to 1 of 2 prompts may have {room} new tokens at the least, not 96" in caplog.text
  how = {"sampling": Sampling(1.0)}
  assert both[:1] == model.generate([long], max_new_tokens=room, seed=[1], **how)
  assert both[1:] == model.generate([["Hi"]], max_new_tokens=96, seed=[2], **how)
  assert [*model.stream(long, seed=1)][-1] == model.generate([long], max_new_tokens=room)[0]
  with pytest.raises(PromptError, match=f"at most {room} new tokens would fit"):
    model.generate([long], max_new_tokens=room + 1)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, np.int64(-5), [2**40], [-1], np.array([7])])
def test_seeds_of_any_size(model, seed):
  how = {"sampling": Sampling(1.0, top_k=2**40), "max_new_tokens": np.int32(3)}
  assert model.generate(["Hi"], seed=seed, **how) == model.generate(["Hi"], seed=seed, **how)


def test_rooms_are_few_and_not_wasteful():
  lengths = range(1, 4097)
  rooms = [bucket(length) for length in lengths]
  assert [*dict.fromkeys(rooms)][:6] == [32, 48, 64, 96, 128, 192]
  assert len(set(rooms)) == 15
  assert all(length <= room for length, room in zip(lengths, rooms, strict=True))
  assert all(room < 1.5 * length for length, room in zip(lengths, rooms, strict=True) if room > 32)


def test_a_stop_text_ends_an_answer_however_tokens_divide_it(model, prompts):
  whole = model.generate(prompts, max_new_tokens=20)
  for i, text in enumerate(whole):
    for start in range(1, min(6, len(text) - 4)):  # across tokens, whatever these are
      stop = text[start : start + 4]
      at = text.index(stop)
      stopped = model.generate(prompts, max_new_tokens=20, stop=["not said", stop])
      assert stopped[i] == text[:at]
      assert all(s == w.split(stop)[0] for s, w in zip(stopped, whole, strict=True))


def test_a_stream_grows_to_the_answer(model, prompts):
  (whole,) = model.generate(prompts[:1], max_new_tokens=20)
  grown = [*model.stream(prompts[0], max_new_tokens=20)]
  assert grown[-1] == whole
  assert len(grown) == 4  # 1 token, then 8 more at a time
  assert all(after.startswith(before) for before, after in itertools.pairwise(grown))
  stop = whole[3:8]
  stopped = [*model.stream(prompts[0], max_new_tokens=20, stop=[stop])]
  assert stopped[-1] == whole[: whole.index(stop)]
  assert all(stopped[-1].startswith(text) for text in stopped)  # no beginning of it was ever shown


def test_what_is_said_waits_while_it_may_be_the_beginning_of_a_stop():
  assert [_overlap(text, "STOP") for text in ("", "a", "aS", "STSTO", "STOP", "TO")] == [
    *(0, 0, 1, 3, 0, 0)
  ]


def test_a_template_without_its_symbols_in_the_tokenizer_ends_answers_by_their_text(copy, prompts):
  change_config(copy, "data", chat_template="chatml", chat=True)
  model = Model.load(copy)
  ids = model.encode(prompts[0]).ids
  assert model.tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
  said = _Says(model, True, ())
  text = model.tokenizer.encode(" Yes<|im_end|>\n<|im_start|>user")
  assert said(text[:5], last=False) == " Yes"
  assert said(text, last=False) == " Yes"
  assert said.stopped


def test_a_conversation_is_read_as_in_training(model, pictures):
  a, b = pictures
  turns = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [a, "What is this?"]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": ["And this?", b]},
  ]
  request = model.encode(turns)
  items = [{"text": "What is this?"}, {"text": "A cat."}, {"text": "And this?"}]
  expected = model.encoder.encode_prompt(
    [
      {"role": "system", "content": [{"text": "Be brief."}]},
      {"role": "user", "content": [{"image": b""}, items[0]]},
      {"role": "assistant", "content": [items[1]]},
      {"role": "user", "content": [items[2], {"image": b""}]},
    ]
  )
  assert request.ids == expected.ids
  assert len(request.images) == 2
  assert request.chat
  assert model.generate([turns], max_new_tokens=3)


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


@pytest.mark.slow
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
    return params.decoder.logits(hidden)

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


@pytest.mark.parametrize("prompt", [[], [""], [" ", "\n"], [{"role": "user", "content": ""}]])
def test_an_empty_prompt_is_refused(model, prompt):
  for chat in (False, True):
    with pytest.raises(PromptError, match="the prompt is empty; give it a text or an image"):
      model.generate([prompt], chat=chat)


@pytest.mark.parametrize(
  ("prompt", "message"),
  [
    ([{"role": "assistant", "content": "Hi"}], "its last turn must be the user's"),
    ([{"role": "human", "content": "Hi"}], "it must be {'role': one of"),
    ([{"role": "user", "content": 3}], "it must be {'role': one of"),
    ([{"role": "user", "content": "Hi"}, "Hi"], "a turn is 'Hi'; it must be"),
    ([3], "a int is neither text nor an image"),
  ],
)
def test_a_prompt_of_another_kind_is_refused(model, prompt, message):
  with pytest.raises(PromptError, match=re.escape(message)):
    model.generate([prompt])


def test_a_text_alone_is_a_prompt(model):
  """Its letters were taken for turns."""
  ask = {"max_new_tokens": 4}
  expected = model.generate([["What?"]], **ask)
  assert model.generate(["What?"], **ask) == expected
  assert [*model.stream("What?", **ask)][-1] == expected[0]
  assert model.encode("What?") == model.encode(["What?"])


@pytest.mark.parametrize(
  ("prompts", "message"),
  [
    ("What?", "prompts is 'What?'; it must be a list of prompts"),
    (b"GIF89a", "prompts is b'GIF89a'; it must be a list of prompts"),
    (3, "prompts is 3; it must be a list"),
    ({"role": "user", "content": "Hi"}, "it must be a list of prompts"),
    (
      [{"role": "user", "content": "Hi"}],
      "prompts is a list of turns; it must be a list of prompts",
    ),
    ([3], "a prompt is 3; it must be a text, a list of texts and images, or a list of turns"),
    ([None], "a prompt is None"),
    ([b"GIF89a"], "a prompt is b'GIF89a'"),
    ([pathlib.Path("a.png"), "What?"], "a.png'); it must be a text, a list"),
    ([np.zeros((2, 2, 3), np.uint8)], "a prompt is array"),
    ([[{"role": "user", "content": {"text": "Hi"}}]], "or a list of texts and images"),
    ([[{"role": "user", "content": b"Hi"}]], "or a list of texts and images"),
    ([[{"role": ["user"], "content": "Hi"}]], "it must be {'role': one of"),
    ([["Hi", {"role": "user"}]], "a dict is neither text nor an image"),
    ([[["Hi"]]], "a list is neither text nor an image"),
  ],
)
def test_what_is_no_list_of_prompts_is_refused(model, prompts, message):
  with pytest.raises(PromptError, match=re.escape(message)):
    model.generate(prompts)


def test_halves_of_characters_are_mended(model):
  """As a terminal of Latin-1 and the escapes of JSON bring them."""
  expected = model.encode(["café 😀 \ufffd"])
  for text in ("caf\udce9 😀 \ufffd", "café \ud83d\ude00 \ud800", "caf\udce9 😀 \udfff"):
    assert model.encode([text]) == expected
  assert model.generate(["\ud800", "\udfff\udfff"], max_new_tokens=2)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("a\0b.png", "cannot be read: ValueError: embedded null byte"),
    ("\ud800.png", "cannot be read: UnicodeEncodeError"),
    (".", "cannot be read: Is a directory"),
    ("x" * 5000, "cannot be read: File name too long"),
  ],
)
def test_a_path_that_is_none_is_a_mistake_of_the_prompt(model, tmp_path, name, message):
  with pytest.raises(PromptError, match=message):
    model.generate([[pathlib.Path(tmp_path, name), "Hi"]])


def test_hostile_requests_leave_the_model_as_it_was(model, pictures):
  """Each ends in a message, and the next is answered as ever."""
  ask = {"max_new_tokens": 4}
  expected = model.generate([[pictures[0], "Hi"]], **ask)
  large = io.BytesIO()
  PIL.Image.new("1", (10_000, 5_000)).save(large, "PNG")  # 50 million pixels in a few kB
  too_large = io.BytesIO()
  PIL.Image.new("1", (10_000, 7_000)).save(too_large, "PNG")
  for prompt, message in (
    ([*[pictures[0]] * 40, "Hi"], r"takes \d+ positions \(40 x 6 of them for images\)"),
    ([too_large.getvalue()], r"image too large \(more than 64 million pixels\)"),
    ([], "the prompt is empty"),
    (["word " * 500], r"takes \d+ positions and .* trained on 192\."),
    ([b"GIF89a"], "an image cannot be used: "),
  ):
    with pytest.raises(PromptError, match=message):
      model.generate([prompt], **ask)
    assert model.generate([[pictures[0], "Hi"]], **ask) == expected
  assert model.generate([[large.getvalue(), "Hi"]], **ask)  # large, but within the bound


def test_slots_are_filled_in_order_or_the_mistake_is_named():
  a, b = pathlib.Path("a"), pathlib.Path("b")
  assert fill_slots("What?", [a, b]) == [a, b, "What?"]
  assert fill_slots("", [a]) == [a]
  assert fill_slots("<image>\nWhat?", [a]) == [a, "What?"]
  assert fill_slots("One: <image> two: <image>", [a, b]) == ["One: ", a, " two: ", b]
  for images in ("a.jpg", b"GIF89a", a):
    with pytest.raises(PromptError, match="it must be a list of images"):
      fill_slots("What?", images)
  with pytest.raises(PromptError, match="the text is 3; it must be a str"):
    fill_slots(3, [])
  with pytest.raises(PromptError, match="has 1 <image> slot, but there are 0 images; give one"):
    fill_slots("<image>\nWhat?", [])
  with pytest.raises(PromptError, match="has 2 <image> slots, but there is 1 image; give one"):
    fill_slots("<image><image>", [a])


def test_pictures_are_cut_as_in_training_or_as_asked(copy, pictures):
  """20 x 30 pixels in sub-images of 16: 2 x 3 of them are least padded, and an overview."""
  with pytest.raises(ConfigError, match=r"no data.tiling, so pictures are not cut: {'last': 1}"):
    Model.load(copy, tiling={"last": 1})
  a, b = pictures
  change_config(copy, "data", tiling={"max_tiles": 6}, images_per_row=7)
  model = Model.load(copy)
  request = model.encode(["What is", a, " this?"])
  assert len(request.images) == 7
  assert request.ids.count(model.tokenizer.image_id) == 7 * TOKENS_PER_IMAGE
  assert len(model.encode([a, b, a]).images) == 3  # too many to be cut
  assert model.generate([["What is", a, " this?"]], max_new_tokens=3)
  assert len(Model.load(copy, tiling={"max_tiles": 4}).encode([a]).images) == 5
  few_shot = Model.load(copy, tiling={"last": 1}).encode([a, "A cat.", b, "A dog.", a])
  assert [np.array_equal(i, few_shot.images[0]) for i in few_shot.images[:2]] == [True, False]
  assert len(few_shot.images) == 2 + 7


def test_a_prompt_that_is_too_long_says_by_how_much(model, pictures):
  used = 1 + TOKENS_PER_IMAGE + 2
  room = SEQ_LEN - used
  match = rf"takes {used} positions \(1 x 6 of .*\).* up to 190 more.* trained on {SEQ_LEN}; "
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
    ({"sampling": Sampling(temperature=float("nan"))}, "temperature is nan"),
    ({"sampling": Sampling(temperature="hot")}, "temperature is 'hot'; it must be a number"),
    ({"sampling": 0.7}, "sampling is 0.7; it must be a Sampling or a BeamSearch"),
    ({"max_new_tokens": "4"}, "max_new_tokens is '4'; it must be a whole number"),
    ({"max_new_tokens": True}, "max_new_tokens is True"),
    ({"batch_size": 2.5}, "batch_size is 2.5; it must be a whole number"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"seed": [1, 2]}, "there are 2 seeds for 1 prompts"),
    ({"chat": "no"}, "chat is 'no'"),
    ({"stop": [3]}, r"stop is \[3\]"),
    ({"stop": "text"}, "stop is 'text'; it must be a list of texts, none of them empty"),
    ({"stop": [""]}, r"stop is \[''\]"),
  ],
)
def test_settings_out_of_range(model, settings: dict, message: str):
  with pytest.raises(PromptError, match=message):
    model.generate([["Hello"]], **settings)


@pytest.mark.parametrize(
  ("missing", "says"),
  [(("connector",), "no connector"), (("vit", "connector"), "no connector and no vit")],
)
def test_an_import_of_parts_says_what_makes_it_a_model(dense, tmp_path, missing, says):
  """As `convert import` without --fill leaves it."""
  from tests.helpers.runs import run_config

  checkpoint.write_run_files(tmp_path, run_config())
  params = checkpoint.to_names(dense)
  params = {name: x for name, x in params.items() if name.split(".")[0] not in missing}
  checkpoint.save_params(tmp_path, 0, params)
  with pytest.raises(CheckpointError, match=says) as error:
    Model.load(tmp_path)
  assert "Import it with --fill" in str(error.value)
  assert f"--config.train.init_from={tmp_path}" in str(error.value)


def test_models_differ_in_their_digests(workdir, copy):
  loaded = Model.load(workdir)
  assert loaded.digest == Model.load(copy).digest
  assert loaded.digest != Model.load(workdir / "checkpoints" / "1").digest
  change_config(copy, "data", tiling={"max_tiles": 6}, images_per_row=7)
  cut = Model.load(copy)
  assert len({loaded.digest, cut.digest, Model.load(copy, tiling={"max_tiles": 4}).digest}) == 3
  with pytest.raises(ConfigError, match=r"tiling has \['tiles'\]; there are only"):
    Model.load(copy, tiling={"tiles": 3})


@pytest.mark.parametrize("size", ["2", 1.5, True, None])
def test_a_number_of_devices_is_one(workdir, size):
  with pytest.raises(ConfigError, match=r"mesh.fsdp is .*; it must be of type int"):
    Model.load(workdir, fsdp=size)


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
  with pytest.raises(ConfigError, match="fsdp 9 needs 9 devices; there are 8"):
    Model.load(workdir, fsdp=9)
  with pytest.raises(ConfigError, match="num_kv_heads 2 does not divide"):
    Model.load(workdir, tensor=4)
