# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what comes back, onto which mesh, and what is said when it cannot."""

import dataclasses
import errno
import json
import logging
import pathlib
import shutil
import threading
import time

import jax
import numpy as np
import pytest
from orbax.checkpoint._src.checkpointers import async_checkpointer

from mm1_jax import checkpoint
from mm1_jax.checkpoint import Checkpointer, CheckpointError, DamagedError, to_names
from mm1_jax.config import (
  CheckpointConfig,
  ConnectorConfig,
  LoRAConfig,
  OptimizerConfig,
  RunConfig,
)
from mm1_jax.data.template import load_template
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_state
from mm1_jax.train.step import TrainState, init_state
from tests.helpers import tiny
from tests.helpers.records import TOKENIZER

pytestmark = pytest.mark.compiles

ONE, EIGHT = (1, 1, 1, 1), (2, 2, 2, 1)
DATA = {"batch": 7, "plan": {"window": 1, "carry": [[0, 5, 12], [1, 2, 3]]}, "fingerprint": "ab"}


def run_config(moe=None, **changes) -> RunConfig:
  run = tiny.run_config(moe, **changes)
  connector = ConnectorConfig(kind="average_pool", token_grid=(1, 2), hidden=8)
  data = dataclasses.replace(run.data, tokenizer=str(TOKENIZER))
  model = dataclasses.replace(run.model, connector=connector)
  return dataclasses.replace(run, model=model, data=data)


def abstract(run: RunConfig, sizes: tuple[int, ...]) -> TrainState:
  return abstract_state(
    lambda: init_state(MM1(jax.random.key(0), run.model), run), tiny.mesh(*sizes)
  )


def make_state(run: RunConfig, sizes: tuple[int, ...] = ONE, *, shift: float = 0.0) -> TrainState:
  """Returns a state of random numbers, counters and moments too; nothing is compiled."""

  def put(path, x):
    value = tiny.draw(tiny.name(path), x.shape) + shift
    value = 1000 * value if np.issubdtype(x.dtype, np.integer) else value
    return jax.device_put(np.asarray(value).astype(x.dtype), x.sharding)

  return jax.tree_util.tree_map_with_path(put, abstract(run, sizes))


def save(workdir: pathlib.Path, run: RunConfig, *steps: int, **cfg) -> dict[int, TrainState]:
  states = {step: make_state(run, shift=step) for step in steps}
  checkpoint.write_run_files(workdir, run)
  with Checkpointer(workdir, CheckpointConfig(**{"keep": 9, **cfg})) as checkpointer:
    for step, state in states.items():
      data = {**DATA, "batch": step}
      checkpointer.save(step, params=state.model, train=state._replace(model=None), data=data)
    checkpointer.wait()
  return states


def restore(workdir, run: RunConfig, step: int | None = None, sizes=ONE) -> TrainState:
  like = abstract(run, sizes)
  with Checkpointer(workdir, CheckpointConfig(keep=9)) as checkpointer:
    step = checkpointer.latest_step if step is None else step
    assert step is not None
    params, train = checkpointer.restore(step, params=like.model, train=like._replace(model=None))
  return train._replace(model=params)


def assert_same(actual, expected) -> None:
  actual, expected = to_names(actual), to_names(expected)
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    assert actual[name].dtype == value.dtype, name
    assert np.asarray(actual[name]).tobytes() == np.asarray(value).tobytes(), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A sparse run of steps 3 and 5; tests that change it work on a copy."""
  workdir = tmp_path_factory.mktemp("saved") / "run"
  return workdir, save(workdir, run_config(tiny.SPARSE), 3, 5)


@pytest.fixture
def copy(saved, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(saved[0], tmp_path / "copy"))


@pytest.mark.parametrize("sizes", [ONE, EIGHT, (1, 2, 2, 2)], ids=str)
def test_everything_comes_back_on_any_mesh(saved, sizes):
  workdir, states = saved
  run = run_config(tiny.SPARSE)
  for step in (3, 5):
    state = restore(workdir, run, step, sizes)
    assert_same(state, states[step])
    wanted = abstract(run, sizes)
    for name, x in to_names(state).items():
      assert x.sharding.is_equivalent_to(to_names(wanted)[name].sharding, x.ndim), name
  gate = to_names(state)["model.decoder.units.layers.1.mlp.gate"]
  assert len({str(s.index) for s in gate.addressable_shards}) == np.prod(sizes) // sizes[0]


def test_from_eight_devices_to_one(tmp_path):
  run = run_config()
  state = make_state(run, EIGHT)
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    checkpointer.save(1, params=state.model, train=state._replace(model=None), data=DATA)
    checkpointer.wait()
  assert_same(restore(tmp_path, run), state)


@pytest.mark.parametrize(
  "optimizer",
  [OptimizerConfig(name="adafactor"), OptimizerConfig(frozen=("vit", "decoder"))],
  ids=["adafactor", "frozen"],
)
def test_other_optimizers_states_come_back(tmp_path, optimizer):
  run = dataclasses.replace(run_config(), optimizer=optimizer)
  states = save(tmp_path, run, 1)
  assert_same(restore(tmp_path, run), states[1])


def test_the_datas_state_comes_back(saved):
  with Checkpointer(saved[0], CheckpointConfig()) as checkpointer:
    assert checkpointer.latest_step == 5
    assert checkpointer.restore_data(5) == {**DATA, "batch": 5}
    assert checkpointer.restore_data(3) == {**DATA, "batch": 3}


def test_a_saved_state_may_be_donated_at_once(tmp_path):
  """The next step's arrays take the place of what is still being written."""
  run = run_config()
  state = make_state(run)
  expected = jax.tree.map(np.array, state)
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    checkpointer.save(1, params=state.model, train=state._replace(model=None), data=DATA)
    for x in jax.tree.leaves(state):
      x.delete()
    checkpointer.wait()
  assert_same(restore(tmp_path, run), expected)


@pytest.mark.parametrize(
  ("cfg", "kept"),
  [({"keep": 3}, [3, 4, 5]), ({"keep": 1}, [4, 5]), ({"keep": 1, "keep_period": 2}, [2, 4, 5])],
  ids=str,
)
def test_old_checkpoints_go(tmp_path, cfg, kept):
  small = {"x": jax.device_put(np.arange(3.0), tiny.mesh().devices.flat[0])}
  with Checkpointer(tmp_path, CheckpointConfig(**cfg)) as checkpointer:
    for step in range(1, 6):
      checkpointer.save(step, params=small, train=small, data=DATA)
    checkpointer.wait()
  steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
  assert sorted(steps) == kept


def test_an_unfinished_checkpoint_is_not_one(copy):
  """A run that was killed while saving leaves a folder that is not yet named as a step."""
  steps = copy / "checkpoints"
  shutil.copytree(steps / "5", steps / "7.orbax-checkpoint-tmp-12")
  shutil.rmtree(steps / "7.orbax-checkpoint-tmp-12" / "data")
  with Checkpointer(copy, CheckpointConfig()) as checkpointer:
    assert checkpointer.latest_step == 5
  assert checkpoint.find_step(copy).name == "5"
  restore(copy, run_config(tiny.SPARSE))


def arrays_file(step: pathlib.Path, item: str) -> pathlib.Path:
  """Returns the file that holds most of an item's bytes."""
  return max(
    (p for p in (step / item).rglob("*") if p.is_file() and "/d/" in str(p)),
    key=lambda p: p.stat().st_size,
  )


def truncate(step):
  path = arrays_file(step, "params")
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_arrays(step):
  arrays_file(step, "train").unlink()


def delete_metadata(step):
  (step / "params" / "_METADATA").unlink()


def garble_metadata(step):
  (step / "params" / "_METADATA").write_text('{"tree_metadata": {"decoder')


def delete_item(step):
  shutil.rmtree(step / "train")


@pytest.mark.parametrize(
  "damage", [truncate, delete_arrays, delete_metadata, garble_metadata, delete_item]
)
def test_a_damaged_step_is_named(copy, damage):
  step = copy / "checkpoints" / "5"
  damage(step)
  run = run_config(tiny.SPARSE)
  with pytest.raises(DamagedError, match="give an older step's folder") as error:
    restore(copy, run)
  assert str(step) in str(error.value)
  assert "\n" not in str(error.value)
  # Doing what it says helps.
  restore(copy, run, 3)


def rewrite(step: pathlib.Path, item: str, change) -> None:
  """Saves arrays of a step anew, changed: as whole files, which decompress without an error."""
  import orbax.checkpoint as ocp

  with ocp.PyTreeCheckpointer() as checkpointer:
    arrays = checkpointer.restore(step / item)
    arrays = {name: np.array(x) for name, x in arrays.items()}
    change(arrays)
    checkpointer.save(step / item, arrays, force=True)


def flip(item: str, name: str, at: int, bit: int):
  """Returns what flips one bit of an array's element."""

  def change(arrays):
    array = arrays[name]
    bits = array.reshape(-1).view(np.uint8)
    bits[(at * array.itemsize + bit // 8) % bits.size] ^= np.uint8(1 << bit % 8)

  return lambda step: rewrite(step, item, change)


FLIPS = [
  ("params", "decoder.embedding", 7, 3),
  ("params", "decoder.embedding", 1535, 30),
  ("params", "decoder.norm.scale", 5, 22),
  ("train", "opt_state.1.mu.decoder.embedding", 0, 0),
  ("train", "step", 0, 4),
  ("train", "guard.norm", 0, 31),
]


@pytest.mark.parametrize(("item", "name", "at", "bit"), FLIPS, ids=str)
def test_one_bit_of_an_array_is_found(copy, item, name, at, bit):
  """The files are sound: only the values are not those that were saved."""
  step = copy / "checkpoints" / "5"
  names = json.loads((step / "checksums" / "metadata").read_text())["arrays"][item]
  assert name in names, sorted(names)
  flip(item, name, at, bit)(step)
  run = run_config(tiny.SPARSE)
  with pytest.raises(DamagedError, match="is not what was saved: checksums differ of") as error:
    restore(copy, run)
  assert f"{step / item}'" in str(error.value)
  assert f" {name}." in str(error.value)
  if item == "params":
    with pytest.raises(DamagedError, match=name):
      checkpoint.restore_params(copy, abstract(run, EIGHT).model)
    with pytest.raises(DamagedError, match=name):
      checkpoint.init_from(step, params(run))
  state = restore_unverified(copy, run)
  assert_same(state, state)


def restore_unverified(workdir, run: RunConfig) -> TrainState:
  like = abstract(run, ONE)
  with Checkpointer(workdir, CheckpointConfig(verify=False)) as checkpointer:
    params, train = checkpointer.restore(5, params=like.model, train=like._replace(model=None))
  return train._replace(model=params)


def change_data_state(step):
  path = step / "data" / "metadata"
  path.write_text(path.read_text().replace('"batch": 5', '"batch": 4'))
  assert '"batch": 4' in path.read_text()


def change_checksum(step):
  path = step / "checksums" / "metadata"
  values = json.loads(path.read_text())
  array = values["arrays"]["params"]["decoder.embedding"]
  array[2] = f"{int(array[2], 16) ^ 1:016x}"
  path.write_text(json.dumps(values))


def empty_step(step):
  for path in step.iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGES = [
  truncate,
  delete_arrays,
  delete_metadata,
  garble_metadata,
  delete_item,
  flip(*FLIPS[0]),
  flip(*FLIPS[4]),
  change_data_state,
  change_checksum,
  empty_step,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_step_that_is_whole_is_resumed_from(copy, saved, caplog, damage):
  damage(copy / "checkpoints" / "5")
  like = abstract(run_config(tiny.SPARSE), ONE)
  with Checkpointer(copy, CheckpointConfig(keep=9)) as checkpointer:
    assert checkpointer.newest_data() in ((5, {**DATA, "batch": 5}), (3, {**DATA, "batch": 3}))
    restored = checkpointer.restore_newest(params=like.model, train=like._replace(model=None))
    assert restored.step == checkpointer.latest_step == 3
    assert restored.data == {**DATA, "batch": 3}
    assert_same(restored.train._replace(model=restored.params), saved[1][3])
    # Its place is free again.
    state = saved[1][5]
    checkpointer.save(5, params=state.model, train=state._replace(model=None), data=DATA)
    checkpointer.wait()
  assert_same(restore(copy, run_config(tiny.SPARSE)), state)
  assert {p.name for p in (copy / "checkpoints").iterdir()} == {"3", "5", "5.damaged"}
  said = [r.getMessage() for r in caplog.records if "step 5 is left out" in r.getMessage()]
  assert len(said) == 1
  assert "\n" not in said[0]
  assert "resuming from step 3 instead" in caplog.text


def test_where_no_step_is_whole_none_is_renamed(copy):
  for step in ("3", "5"):
    truncate(copy / "checkpoints" / step)
  like = abstract(run_config(tiny.SPARSE), ONE)
  with (
    Checkpointer(copy, CheckpointConfig(keep=9)) as checkpointer,
    pytest.raises(DamagedError, match=r"checkpoints/5/params.* Nor can any of the 1 before it"),
  ):
    checkpointer.restore_newest(params=like.model, train=like._replace(model=None))
  assert {p.name for p in (copy / "checkpoints").iterdir()} == {"3", "5"}


def test_a_step_that_is_damaged_twice_overwrites_nothing(copy):
  steps = copy / "checkpoints"
  for name in ("5.damaged", "5.damaged-1"):
    (steps / name).mkdir()
  truncate(steps / "5")
  like = abstract(run_config(tiny.SPARSE), ONE)
  with Checkpointer(copy, CheckpointConfig(keep=9)) as checkpointer:
    checkpointer.restore_newest(params=like.model, train=like._replace(model=None))
  assert list((steps / "5.damaged-2").iterdir())


def test_a_step_without_checksums_is_read_with_a_warning(copy, caplog):
  shutil.rmtree(copy / "checkpoints" / "5" / "checksums")
  restore(copy, run_config(tiny.SPARSE))
  assert "is read without checksums" in caplog.text


def test_a_changed_config_or_tokenizer_is_a_warning(copy, caplog):
  path = copy / "tokenizer.model"
  path.write_bytes(path.read_bytes() + b"?")
  values = json.loads((copy / "config.json").read_text())
  values["model"]["decoder"]["rope_theta"] *= 2
  (copy / "config.json").write_text(json.dumps(values))
  checkpoint.restore_params(copy, abstract(run_config(tiny.SPARSE), ONE).model)
  for name in ("tokenizer.model", "config.json"):
    assert f"'{copy / name}' is not what it was when step 5 was saved" in caplog.text


def test_checksums_can_be_left_out(tmp_path):
  run = run_config()
  save(tmp_path, run, 5, verify=False)
  assert not (tmp_path / "checkpoints" / "5" / "checksums").exists()
  assert restore_unverified(tmp_path, run).step.shape == ()


def test_params_are_compared_in_the_dtype_they_were_saved_in(saved, tmp_path, monkeypatch):
  """Also where they are cast to bfloat16 or back, a few arrays at a time."""
  monkeypatch.setattr(checkpoint, "CAST_AT_ONCE", 5000)
  run = run_config(tiny.SPARSE)
  like = abstract(run, EIGHT).model
  half = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=x.sharding), like
  )
  read = checkpoint.restore_params(saved[0], half)
  expected = jax.tree.map(lambda x: np.asarray(x).astype("bfloat16"), saved[1][5].model)
  assert_same(read, expected)
  checkpoint.save_params(tmp_path, 1, to_names(read))
  assert_same(checkpoint.restore_params(tmp_path, half), expected)
  whole = jax.tree.map(lambda x: x.astype("float32"), expected)
  assert_same(checkpoint.restore_params(tmp_path, like), whole)
  flip("params", "decoder.norm.scale", 3, 15)(tmp_path / "checkpoints" / "1")
  with pytest.raises(DamagedError, match=r"checksums differ of decoder\.norm\.scale"):
    checkpoint.restore_params(tmp_path, like)


def test_no_flipped_bit_of_a_file_goes_unseen(copy):
  """Any bit of any file: the state is restored as it was saved, or the step is refused."""
  run, rng = run_config(tiny.SPARSE), np.random.default_rng(0)
  step = copy / "checkpoints" / "5"
  expected, outcomes = restore(copy, run), []
  files = sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size)
  sizes = np.array([p.stat().st_size for p in files])
  # Half of them anywhere, half in the files that have the arrays.
  picks = [*rng.choice(len(files), 20), *rng.choice(len(files), 20, p=sizes / sizes.sum())]
  for path in (files[i] for i in picks):
    whole = path.read_bytes()
    data, at = bytearray(whole), int(rng.integers(len(whole)))
    data[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    try:
      with Checkpointer(copy, CheckpointConfig(keep=9)) as checkpointer:
        data_state = checkpointer.restore_data(5)
      assert_same(restore(copy, run, 5), expected)
      assert data_state == {**DATA, "batch": 5}
      outcomes.append("same")
    except DamagedError:
      outcomes.append("refused")
    path.write_bytes(whole)
  assert outcomes.count("refused") >= 10


@pytest.mark.parametrize("what", ["delete", "garble"])
def test_damaged_data_state_is_named(copy, what):
  (path,) = [
    p
    for p in (copy / "checkpoints" / "5" / "data").iterdir()
    if p.is_file() and p.name == "metadata"
  ]
  path.unlink() if what == "delete" else path.write_text("{")
  with (
    Checkpointer(copy, CheckpointConfig()) as checkpointer,
    pytest.raises(CheckpointError, match="checkpoints/5/data' cannot be read"),
  ):
    checkpointer.restore_data(5)


def test_another_shape_is_named_with_both(saved):
  run = run_config(tiny.SPARSE)
  decoder = dataclasses.replace(run.model.decoder, mlp_dim=40)
  wider = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder))
  with pytest.raises(CheckpointError) as error:
    restore(saved[0], wider)
  message = str(error.value)
  assert "checkpoints/5/params' is of another model or optimizer" in message
  assert "decoder.units.layers.0.mlp.gate is (1, 32, 24), not (1, 32, 40)" in message
  assert "; and 1 more" in message  # 6 matrices of the two layers, 5 of them shown
  assert "train.init_from" in message


def test_another_optimizer_is_named(saved):
  run = dataclasses.replace(run_config(tiny.SPARSE), optimizer=OptimizerConfig(name="adafactor"))
  with pytest.raises(CheckpointError, match="checkpoints/5/train' is of another model or opti"):
    restore(saved[0], run)


def test_a_dense_model_is_not_a_sparse_one(saved):
  """Two dense layers are one stack of two; a dense and a sparse one are two stacks of one."""
  with pytest.raises(CheckpointError, match=r"attention\.key is \(1, 32, 2, 8\), not \(2, 32"):
    restore(saved[0], run_config())


def test_arrays_that_only_one_side_has_are_named(saved):
  run = run_config(tiny.SPARSE)
  decoder = dataclasses.replace(run.model.decoder, tie_embeddings=False)
  untied = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder))
  with pytest.raises(CheckpointError, match=r"decoder\.head is missing\. Use"):
    restore(saved[0], untied)
  with pytest.raises(CheckpointError, match=r"decoder\.head is not in this model\. Use"):
    checkpoint.check_match({"decoder.head": (3, 2)}, {}, "here")


def params(run: RunConfig, sizes=ONE, shift: float = 100.0) -> MM1:
  return make_state(run, sizes, shift=shift).model


def report(caplog) -> str:
  (record,) = [r for r in caplog.records if ": loaded " in r.getMessage()]
  return record.getMessage()


@pytest.fixture
def story(caplog):
  caplog.set_level(logging.INFO, logger="absl")
  return caplog


@pytest.mark.parametrize("sizes", [ONE, EIGHT], ids=str)
def test_init_from_takes_the_params_onto_its_mesh(saved, story, sizes):
  workdir, states = saved
  fresh = params(run_config(tiny.SPARSE), sizes)
  taken = checkpoint.init_from(workdir, fresh)
  assert_same(taken, states[5].model)
  for name, x in to_names(taken).items():
    assert x.sharding == to_names(fresh)[name].sharding, name
  message = report(story)
  assert f"loaded {len(to_names(fresh))} params; resized: none; new adapters: 0" in message


def test_init_from_a_step_of_a_run(saved):
  workdir, states = saved
  taken = checkpoint.init_from(workdir / "checkpoints" / "3", params(run_config(tiny.SPARSE)))
  assert_same(taken, states[3].model)


def with_decoder(run: RunConfig, **changes) -> RunConfig:
  decoder = dataclasses.replace(run.model.decoder, **changes)
  return dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder))


def test_init_from_refuses_other_shapes_and_names_each(tmp_path):
  """They would else be random, in part, beside what was trained."""
  save(tmp_path, run_config(), 1)
  with pytest.raises(CheckpointError) as error:
    checkpoint.init_from(tmp_path, params(with_decoder(run_config(), vocab_size=64, mlp_dim=40)))
  message = str(error.value)
  assert f"{tmp_path}/checkpoints/1/params' does not fit this model: " in message
  assert "decoder.embedding is (48, 32), not (64, 32)" in message
  for name in ("gate", "up", "down"):
    assert f"decoder.units.layers.0.mlp.{name} is " in message


@pytest.mark.parametrize(
  ("saved", "wanted", "message"),
  [
    ({}, {"qk_norm": True}, r"attention\.query_norm\.scale is missing"),
    ({"tie_embeddings": False}, {}, r"decoder\.head is not in this model"),
    # Each third layer is found, as the only layer of a unit of one.
    ({"depth": 1}, {"depth": 2, "moe": tiny.SPARSE}, r"layers\.1\.mlp\.router is missing"),
  ],
  ids=["missing", "unused", "deeper"],
)
def test_init_from_takes_a_part_whole_or_not_at_all(tmp_path, saved, wanted, message):
  save(tmp_path, with_decoder(run_config(), **saved), 1)
  with pytest.raises(CheckpointError, match=message):
    checkpoint.init_from(tmp_path, params(with_decoder(run_config(), **wanted)))


def with_pictures(run: RunConfig, size: int, grid: tuple[int, int]) -> RunConfig:
  """Returns a run with learned positions in both ViT and connector."""
  vision = dataclasses.replace(run.model.vision, image_size=(size, size), position_grid=grid)
  connector = ConnectorConfig(token_grid=(1, 2), hidden=8, depth=1)
  model = dataclasses.replace(run.model, vision=vision, connector=connector)
  return dataclasses.replace(run, model=model)


@pytest.mark.parametrize("sizes", [ONE, EIGHT], ids=str)
def test_init_from_resizes_positions_to_another_grid(tmp_path, story, sizes):
  """Bicubically, as the encoder itself does where pictures have another size."""
  old = save(tmp_path, with_pictures(run_config(), 8, (2, 2)), 1)[1].model
  run = with_pictures(run_config(), 12, (3, 4))
  with jax.set_mesh(tiny.mesh(*sizes)):
    taken = to_names(checkpoint.init_from(tmp_path, params(run, sizes)))
  old, wanted = to_names(old), to_names(abstract(run, sizes).model)
  for name in ("vit.positions", "connector.positions"):
    dim = old[name].shape[-1]
    assert taken[name].shape == (3, 4, dim)
    assert taken[name].sharding.is_equivalent_to(wanted[name].sharding, 3)
    expected = jax.image.resize(np.asarray(old[name]), (3, 4, dim), "bicubic")
    np.testing.assert_allclose(taken[name], expected, rtol=1e-6, atol=1e-6)
  message = report(story)
  assert "resized: {'vit.positions': '(2, 2) to (3, 4)', 'connector.positions': " in message
  for name in taken.keys() - {"vit.positions", "connector.positions"}:
    np.testing.assert_array_equal(taken[name], old[name], err_msg=name)


def test_init_from_refuses_positions_of_another_width(tmp_path):
  save(tmp_path, run_config(), 1)
  run = run_config()
  vision = dataclasses.replace(run.model.vision, width=32, position_grid=(4, 4))
  wider = dataclasses.replace(run, model=dataclasses.replace(run.model, vision=vision))
  with pytest.raises(CheckpointError, match=r"vit\.positions is \(3, 2, 16\), not \(4, 4, 32\)"):
    checkpoint.init_from(tmp_path, params(wider))


def test_init_from_leaves_parts_fresh_that_it_lacks_or_is_told_to(tmp_path, story):
  old = to_names(save(tmp_path / "whole", run_config(), 1)[1].model)
  decoder = {name: x for name, x in old.items() if name.startswith("decoder.")}
  checkpoint.save_params(tmp_path / "decoder", 0, decoder)
  fresh = params(run_config())
  for path, told in (("decoder", ()), ("whole", ("vit", "connector"))):
    story.clear()
    taken = to_names(checkpoint.init_from(tmp_path / path, fresh, fresh_parts=told))
    for name, value in to_names(fresh).items():
      expected = old[name] if name in decoder else value
      np.testing.assert_array_equal(taken[name], expected, err_msg=name)
    warnings = [r.getMessage() for r in story.records if r.levelno == logging.WARNING]
    assert any("nothing is taken for connector, vit: random params" in text for text in warnings)


def test_init_from_and_adapters(tmp_path, story):
  """New ones are fresh, equal ones are taken, and none that were trained are lost."""
  lora = LoRAConfig(rank=2, matrices=("query", "up"))
  paths = {"plain": None, "lora": lora}
  for name, value in paths.items():
    save(tmp_path / name, with_decoder(run_config(), lora=value), 1)
  checkpoint.init_from(tmp_path / "plain", params(with_decoder(run_config(), lora=lora)))
  assert "new adapters: 4" in report(story)
  story.clear()
  checkpoint.init_from(tmp_path / "lora", params(with_decoder(run_config(), lora=lora)))
  assert "new adapters: 0" in report(story)
  for other in (None, dataclasses.replace(lora, rank=4), LoRAConfig(rank=2, matrices=("query",))):
    with pytest.raises(CheckpointError, match=r"adapters that this model lacks .*merge_lora"):
      checkpoint.init_from(tmp_path / "lora", params(with_decoder(run_config(), lora=other)))


def test_init_from_something_else_entirely(tmp_path):
  other = {"x": jax.device_put(np.arange(3.0), tiny.mesh().devices.flat[0])}
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    checkpointer.save(1, params=other, train=other, data=DATA)
    checkpointer.wait()
  with pytest.raises(CheckpointError, match="has no param of this model"):
    checkpoint.init_from(tmp_path, params(run_config()))


@pytest.mark.parametrize("damage", [truncate, delete_metadata])
def test_init_from_a_damaged_checkpoint(copy, damage):
  step = copy / "checkpoints" / "5"
  damage(step)
  with pytest.raises(CheckpointError, match=str(step / "params")):
    checkpoint.init_from(copy, params(run_config(tiny.SPARSE)))


def test_restore_params_takes_exactly_this_model(saved):
  workdir, states = saved
  like = abstract(run_config(tiny.SPARSE), EIGHT).model
  assert_same(checkpoint.restore_params(workdir, like), states[5].model)
  with pytest.raises(CheckpointError, match="another model"):
    checkpoint.restore_params(workdir, abstract(run_config(), ONE).model)


def test_find_step(saved, tmp_path):
  steps = saved[0] / "checkpoints"
  assert checkpoint.find_step(saved[0]) == steps / "5"
  assert checkpoint.find_step(steps / "3") == steps / "3"
  with pytest.raises(CheckpointError, match=f"no checkpoint under '{tmp_path}'"):
    checkpoint.find_step(tmp_path)
  with pytest.raises(CheckpointError, match="no checkpoint under"):
    checkpoint.find_step(tmp_path / "nowhere")
  (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp-0").mkdir(parents=True)
  with pytest.raises(CheckpointError, match=r"Only unfinished ones: \['4\.orbax-checkpoint-tmp"):
    checkpoint.find_step(tmp_path)


def test_steps_are_ordered_as_numbers(tmp_path):
  for step in ("9", "10", "100"):
    (tmp_path / "checkpoints" / step / "params").mkdir(parents=True)
  assert checkpoint.find_step(tmp_path).name == "100"


def test_config_and_tokenizer_travel(saved, tmp_path):
  """A run is read where it was moved to, without the files it was trained from."""
  moved = tmp_path / "moved"
  shutil.copytree(saved[0], moved)
  run = checkpoint.read_run(moved)
  original = run_config(tiny.SPARSE)
  tokenizer = str(moved / "tokenizer.model")
  assert run == dataclasses.replace(
    original, data=dataclasses.replace(original.data, tokenizer=tokenizer)
  )
  assert pathlib.Path(tokenizer).read_bytes() == TOKENIZER.read_bytes()


def test_a_run_can_be_written_over_itself(copy):
  """As when a run is resumed with the tokenizer that travelled with it."""
  run = checkpoint.read_run(copy)
  checkpoint.write_run_files(copy, run)
  assert checkpoint.read_run(copy) == run
  assert (copy / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


def test_a_template_of_ones_own_travels_with_the_run(tmp_path):
  mine = tmp_path / "mine.json"
  mine.write_text(dataclasses.replace(load_template(), bos=False).to_json())
  for template in (str(mine), "chatml"):
    data = dataclasses.replace(RunConfig().data, tokenizer=str(TOKENIZER), chat_template=template)
    run = dataclasses.replace(RunConfig(), data=data)
    checkpoint.write_run_files(tmp_path / pathlib.Path(template).stem, run)
  mine.unlink()
  read = checkpoint.read_run(tmp_path / "mine").data.chat_template
  assert load_template(read) == dataclasses.replace(load_template(), bos=False)
  assert checkpoint.read_run(tmp_path / "chatml").data.chat_template == "chatml"


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "is not a run: it has no config.json"),
    ("{", r"config\.json' is not JSON"),
    ("[]", r"config\.json' is \[\]; it must be a JSON object"),
    ("{}", r"config\.json' is damaged \(it has no 'data'\)"),
  ],
)
def test_what_is_not_a_run(tmp_path, content, message):
  if content is not None:
    (tmp_path / "config.json").write_text(content)
  with pytest.raises(CheckpointError, match=message):
    checkpoint.read_run(tmp_path)


def test_a_config_of_another_version_names_the_key(copy):
  path = copy / "config.json"
  values = json.loads(path.read_text())
  values["model"]["decoder"]["widht"] = 3
  path.write_text(json.dumps(values))
  with pytest.raises(ValueError, match=r"unknown key 'model\.decoder\.widht'"):
    checkpoint.read_run(copy)


def test_a_failed_save_is_seen_at_the_next_look(tmp_path, monkeypatch):
  """It fails on the disk, after `save` has returned; the one before it stays."""
  run = run_config()
  save(tmp_path, run, 1)
  state = make_state(run)

  def begin(checkpointer: Checkpointer) -> None:
    checkpointer.save(2, params=state.model, train=state._replace(model=None), data=DATA)

  def fail(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")

  # What all asynchronous saves end with, in a thread of their own.
  monkeypatch.setattr(async_checkpointer, "_background_wait_for_commit_futures", fail)
  with Checkpointer(tmp_path, CheckpointConfig(keep=9)) as checkpointer:
    checkpointer.check_saved()
    begin(checkpointer)

    def look() -> None:
      deadline = time.monotonic() + 60
      while time.monotonic() < deadline:
        checkpointer.check_saved()

    with pytest.raises(CheckpointError) as error:
      look()
    assert "saving step 2 in " in str(error.value)
    assert "No space left on device; the newest whole checkpoint is step 1" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert checkpointer.latest_step == 1
    checkpointer.check_saved()


def test_looking_does_not_wait_for_a_save(tmp_path, monkeypatch):
  run, go_on = run_config(), threading.Event()
  wait = async_checkpointer._background_wait_for_commit_futures
  monkeypatch.setattr(
    async_checkpointer,
    "_background_wait_for_commit_futures",
    lambda *args, **kwargs: go_on.wait(60) and wait(*args, **kwargs),
  )
  state = make_state(run)
  with Checkpointer(tmp_path, CheckpointConfig(keep=9)) as checkpointer:
    checkpointer.save(1, params=state.model, train=state._replace(model=None), data=DATA)
    checkpointer.check_saved()
    assert not (tmp_path / checkpoint.STEPS / "1").exists()
    go_on.set()
    checkpointer.wait()
    assert (tmp_path / checkpoint.STEPS / "1").exists()


@pytest.mark.parametrize(
  "data", [b"\xff\xfe{}", b"[" * 5000, b"{", b"[]", b'{"data": 3}', b'{"model": {}}', b"null"]
)
def test_a_runs_config_that_is_no_config_is_one_clear_error(tmp_path, data):
  (tmp_path / "config.json").write_bytes(data)
  (tmp_path / "chat_template.json").write_text("{}")
  with pytest.raises(CheckpointError, match=r"config\.json"):
    checkpoint.read_run(tmp_path)
