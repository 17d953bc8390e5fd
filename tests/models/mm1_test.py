# SPDX-License-Identifier: Apache-2.0
"""The whole model: pictures at their placeholders, packing, padding, gradients, the KV cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm1_jax.models.mm1 import MM1, image_spread
from mm1_jax.train.loss import cross_entropy
from tests.helpers import tiny

pytestmark = pytest.mark.compiles

RUNS = {"dense": tiny.run_config(), "capacity": tiny.run_config(tiny.BOUNDED)}
DECODER = dataclasses.replace(RUNS["dense"].model.decoder, num_kv_heads=1)


@pytest.fixture(scope="module", autouse=True)
def mesh():
  mesh = tiny.mesh()
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture(scope="module")
def models(mesh):
  cfgs = {"dropless": tiny.model_config(tiny.SPARSE)}
  cfgs["one kv head"] = tiny.model_config(decoder=DECODER)
  cfgs |= {name: run.model for name, run in RUNS.items()}
  return {name: tiny.make_model(cfg, mesh) for name, cfg in cfgs.items()}


@tiny.jit
def hidden(model: MM1, batch):
  return model(batch).hidden


# Pictures at their placeholders.


def test_merge_puts_the_ith_image_token_at_the_ith_placeholder(models, mesh):
  """Two pictures, one, none; text keeps its own embedding; unused image tokens go nowhere."""
  i = tiny.IMAGE
  tokens = np.array([[9, i, i, 9, i, i], [i, i, 9, 9, 9, 9], [9, 9, 9, 9, 9, 9]], np.int32)
  text = -np.arange(1, 19, dtype=np.float32).reshape(3, 6, 1)
  images = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [50, 60, 70, 80]], np.float32)[..., None]
  merge = jax.jit(lambda *args: models["dense"].merge(*args))
  merged = merge(*tiny.put((text, images, tokens), mesh))
  assert np.asarray(merged)[..., 0].tolist() == [
    [-1, 1, 2, -4, 3, 4],
    [5, 6, -9, -10, -11, -12],
    [-13, -14, -15, -16, -17, -18],
  ]


def test_image_tokens_are_those_of_each_picture_alone(models, mesh):
  """Slots must not mix: the second picture of a row equals that picture first in another row."""
  embed = tiny.jit(lambda model, images: model.embed_image(images))
  images = tiny.BATCH.images[[0, 4]]
  both = np.asarray(embed(models["dense"], tiny.put(images, mesh)))
  assert both.shape == (2, 2 * tiny.TOKENS, 32)
  swapped = np.asarray(embed(models["dense"], tiny.put(images[:, ::-1].copy(), mesh)))
  assert tiny.largest_difference(both[:, tiny.TOKENS :], swapped[:, : tiny.TOKENS]) < 1e-6
  assert np.abs(both[:, tiny.TOKENS :] - both[:, : tiny.TOKENS]).max() > 0.1


@pytest.mark.parametrize(
  ("sizes", "size", "scan"), [((1,), 3, False), pytest.param((2,), 2, True, marks=pytest.mark.slow)]
)
def test_groups_of_slots_without_a_picture_are_left_out(sizes, size, scan):
  """The tokens of all pictures are the same; those of slots that were not encoded are 0."""
  mesh, batch = tiny.mesh(*sizes), tiny.BATCH
  grouped = dataclasses.replace(RUNS["dense"].model, image_group=size, scan=scan)
  with jax.set_mesh(mesh):
    run = tiny.jit(lambda model, images, mask: model.embed_image(images, mask))
    args = tiny.put((batch.images, batch.image_mask), mesh)
    whole, out = (
      np.asarray(run(tiny.make_model(cfg, mesh), *args)).reshape(-1, tiny.TOKENS, 32)
      for cfg in (RUNS["dense"].model, grouped)
    )
  mask = batch.image_mask.reshape(-1)
  assert tiny.largest_difference(out[mask], whole[mask]) < 1e-6
  chips = mesh.size
  groups = -(-mask.reshape(chips, -1).sum(axis=1).max() // size)
  encoded = np.abs(out).max(axis=(1, 2)) > 0
  assert encoded.sum() == min(groups * size * chips, mask.size) < mask.size
  assert (np.abs(whole).max(axis=(1, 2)) > 0).all()


def test_image_spread_is_the_deviation_between_pictures(mesh):
  """Of the slots that hold one; whatever all pictures have in common does not count."""
  rng = np.random.default_rng(0)
  mask = np.array([[True, True, False], [True, False, False]] * 4)
  common = 10 * rng.standard_normal((1, 1, 2, 5))
  own = 0.01 * rng.standard_normal((8, 3, 2, 5))
  tokens = (common + own).astype(np.float32)
  tokens[~mask] = 1e6
  pictures = tokens[mask].astype(np.float64)
  deviation = pictures - pictures.mean(axis=0)
  expected = np.sqrt(np.mean(deviation**2) / np.mean(pictures**2))
  assert 5e-4 < expected < 5e-3
  with jax.set_mesh(mesh):
    arrays = tiny.put((tokens.reshape(8, 6, 5), mask), mesh)
    assert float(tiny.jit(image_spread)(*arrays)) == pytest.approx(expected, rel=1e-2)
    same = np.broadcast_to(tokens[:1, :1], tokens.shape).reshape(8, 6, 5)
    assert float(tiny.jit(image_spread)(*tiny.put((same, mask), mesh))) < 1e-4


@pytest.mark.parametrize(
  "kind",
  [
    "c_abstractor",
    *(pytest.param(k, marks=pytest.mark.slow) for k in ("average_pool", "attention_pool")),
  ],
)
def test_fresh_models_tell_pictures_apart(kind, mesh):
  """So that a warning of collapsed image tokens is of training, not of its start."""
  connector = dataclasses.replace(tiny.model_config().connector, kind=kind)
  cfg = tiny.model_config(connector=connector)
  with jax.set_mesh(mesh):
    model = tiny.jit(lambda: MM1(jax.random.key(0), cfg))()
    batch = tiny.put(tiny.BATCH, mesh)
    tokens = tiny.jit(lambda model, images: model.embed_image(images))(model, batch.images)
    assert float(tiny.jit(image_spread)(tokens, batch.image_mask)) > 0.1


def test_pictures_change_only_what_follows_in_their_example(models, mesh):
  """Another first picture in row 0: its example changes from there on, all else stays."""
  images = tiny.BATCH.images.copy()
  images[0, 0] = 255 - images[0, 0]
  batch = tiny.BATCH._replace(images=images)
  a, b = (np.asarray(hidden(models["dense"], tiny.put(x, mesh))) for x in (tiny.BATCH, batch))
  changed = np.abs(a - b).max(-1) > 1e-5
  expected = np.zeros_like(changed)
  expected[0, 3:7] = True  # row 0: "ttt", the picture, "tt"; then another example
  assert np.array_equal(changed, expected)


def test_a_batch_without_image_slots_runs_no_encoder(models, mesh, monkeypatch):
  """Text alone equals the same row beside empty image slots, and costs no picture."""
  empty = tiny.stack([tiny.row("tttttt", "tttt", seed=0)])
  none = empty._replace(images=empty.images[:, :0], image_mask=empty.image_mask[:, :0])
  beside_empty = np.asarray(hidden(models["dense"], tiny.put(empty, mesh)))
  monkeypatch.setattr(MM1, "embed_image", None)
  assert tiny.largest_difference(hidden(models["dense"], tiny.put(none, mesh)), beside_empty) < 1e-6


# Packing.


def alone(row: dict, segment: int) -> dict:
  """Returns the row with one example only, moved to its start."""
  at = np.flatnonzero(row["segment_ids"] == segment)
  before = np.count_nonzero(row["tokens"][: at[0]] == tiny.IMAGE) // tiny.TOKENS
  count = np.count_nonzero(row["tokens"][at] == tiny.IMAGE) // tiny.TOKENS
  out = {key: np.zeros_like(value) for key, value in row.items()}
  for key in ("tokens", "targets", "loss_mask", "positions", "source_ids"):
    out[key][: len(at)] = row[key][at]
  out["segment_ids"][: len(at)] = 1
  out["images"][:count] = row["images"][before : before + count]
  out["image_mask"][:count] = True
  return out


@pytest.mark.parametrize("model", ["dense", "dropless"])
def test_packed_examples_equal_the_same_examples_alone(model, models, mesh):
  """Fails if attention crosses examples, positions run on, or a picture lands in another one."""
  row = tiny.row("titt", "tit", "tttt", seed=3)
  rows = [row] + [alone(row, segment) for segment in (1, 2, 3)]
  out = np.asarray(hidden(models[model], tiny.put(tiny.stack(rows), mesh)))
  for segment in (1, 2, 3):
    at = row["segment_ids"] == segment
    assert tiny.largest_difference(out[0, at], out[segment, : at.sum()]) < 1e-5


def test_nothing_flows_back_from_later_positions(models, mesh):
  batch = tiny.stack([tiny.row("ttttttttttt", seed=1)])
  tokens = batch.tokens.copy()
  tokens[0, 6] = tokens[0, 6] % 40 + 6
  a, b = (
    np.asarray(hidden(models["dense"], tiny.put(x, mesh)))
    for x in (batch, batch._replace(tokens=tokens))
  )
  changed = np.abs(a - b).max(-1)[0, :11] > 1e-6
  assert changed.tolist() == [False] * 6 + [True] * 5


# Padding, and which params have gradients.


def with_random_padding(batch):
  """Returns the batch with other values wherever the contract says that none matters."""
  rng = np.random.default_rng(9)
  padding = batch.segment_ids == 0
  assert padding.any()
  assert not batch.image_mask.all()

  def noise(x, high):
    return np.where(padding, rng.integers(5, high, x.shape), x).astype(x.dtype)

  unpredicted = batch.loss_mask == 0
  targets = np.where(unpredicted, rng.integers(0, 48, padding.shape), batch.targets)
  images = rng.integers(0, 256, batch.images.shape)
  mask = batch.image_mask[..., None, None, None]
  return batch._replace(
    tokens=noise(batch.tokens, 48),
    targets=targets.astype(np.int32),
    positions=noise(batch.positions, 100),
    images=np.where(mask, batch.images, images).astype(np.uint8),
  )


@pytest.fixture(scope="module", params=RUNS)
def computed(request, models, mesh):
  """Returns loss and gradients of the batch, and of the batch with other padding."""
  compute = tiny.loss_and_gradients(RUNS[request.param])
  results = []
  for batch in (tiny.BATCH, with_random_padding(tiny.BATCH)):
    loss, grads = compute(models[request.param], tiny.put(batch, mesh))
    results.append((float(loss), tiny.names(grads)))
  return results


def test_padding_changes_nothing(computed):
  (loss, grads), (other_loss, other_grads) = computed
  assert other_loss == pytest.approx(loss, rel=1e-6)
  for name, grad in grads.items():
    if not name.endswith("key_bias"):
      assert tiny.largest_difference(other_grads[name], grad) < 1e-5, name


def test_every_param_learns(computed):
  """A part that the loss does not reach trains on silently, as it was initialised."""
  (_, grads), _ = computed
  for name, grad in grads.items():
    if name.endswith("key_bias"):
      assert np.abs(grad).max() < 1e-6, name  # moves all logits of a query alike
    else:
      assert np.abs(grad).max() > 1e-6, name
      if grad.shape[0] == 2 and name.startswith(("vit.blocks", "decoder.units")):
        assert (np.abs(grad).reshape(2, -1).max(1) > 1e-6).all(), f"{name}: one of the blocks"


def test_loss_by_hand(models, mesh):
  """Sums of -log p(target) by source, from plain logits."""
  model = models["dense"]

  @tiny.jit
  def compute(model, batch):
    out = model(batch).hidden
    logits = model.decoder.logits(out)
    return cross_entropy(model.decoder, out, batch, 2, z_loss=0.0)[1], logits

  sums, logits = compute(model, tiny.put(tiny.BATCH, mesh))
  logits = np.asarray(logits, np.float64)
  normaliser = np.log(np.exp(logits).sum(-1))
  nll = normaliser - np.take_along_axis(logits, tiny.BATCH.targets[..., None], -1)[..., 0]
  for source in (0, 1):
    mask = tiny.BATCH.loss_mask * (tiny.BATCH.source_ids == source)
    assert float(sums.nll[source]) == pytest.approx((nll * mask).sum(), rel=1e-5)
    assert float(sums.count[source]) == mask.sum()
  assert float(sums.z) == pytest.approx((normaliser**2 * tiny.BATCH.loss_mask).sum(), rel=1e-5)


def test_moe_statistics_are_stacked_over_units(mesh):
  """Four layers, every second one sparse: two sets of statistics."""
  cfg = tiny.model_config(tiny.BOUNDED)
  cfg = dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, depth=4))
  shapes = jax.eval_shape(
    lambda batch: MM1(jax.random.key(0), cfg)(batch), tiny.put(tiny.BATCH, mesh)
  )
  assert shapes.moe.load.shape == (2, 4)
  assert shapes.moe.balance_loss.shape == (2,)


# The KV cache.


@pytest.mark.parametrize(
  ("num_rows", "model"),
  [
    (1, "dropless"),
    (2, "dense"),
    *(
      pytest.param(num_rows, model, marks=pytest.mark.slow)
      for num_rows, models in ((1, ("dense", "capacity")), (2, ("dropless", "capacity")))
      for model in (*models, "one kv head")
    ),
  ],
)
def test_prefill_and_decode_equal_one_pass(model, num_rows, models, mesh):
  """Prompts of unequal length, padded on the left, with pictures; then one token at a time."""
  rows = [tiny.row("titttttt", seed=1, num_positions=9)]
  rows += [tiny.row("titttt", seed=2, num_positions=9)] * (num_rows - 1)
  lengths = [9, 7][:num_rows]
  batch = tiny.stack(rows)
  # A capacity is for training; generation drops no token, so compare with the dropless layer.
  expected = hidden(models["dropless" if model == "capacity" else model], tiny.put(batch, mesh))
  expected = np.asarray(expected)
  slots, prompt = 9, 6
  left = {
    key: np.stack([np.roll(getattr(batch, key)[i], slots - n) for i, n in enumerate(lengths)])
    for key in ("tokens", "positions", "segment_ids")
  }

  @tiny.jit
  def prefill(model, tokens, images, positions, segment_ids):
    cache = model.decoder.init_cache(num_rows, slots)
    return model.prefill(tokens, images, positions, segment_ids, cache)

  decode = tiny.jit(lambda model, tokens, positions, cache: model.decode(tokens, positions, cache))
  part = {key: value[:, :prompt] for key, value in left.items()}
  tokens, images, positions, segments = tiny.put(
    (part["tokens"], batch.images, part["positions"], part["segment_ids"]), mesh
  )
  out = prefill(models[model], tokens, images, positions, segments)
  pieces = [np.asarray(out.hidden)]
  for slot in range(prompt, slots):
    assert int(out.cache.length) == slot
    token, position = tiny.put(
      (left["tokens"][:, slot : slot + 1], left["positions"][:, slot : slot + 1]), mesh
    )
    out = decode(models[model], token, position, out.cache)
    pieces.append(np.asarray(out.hidden))
  ours = np.concatenate(pieces, axis=1)
  for i, length in enumerate(lengths):
    assert tiny.largest_difference(ours[i, slots - length :], expected[i, :length]) < 1e-5


def test_bfloat16_is_the_compute_dtype_and_logits_are_float32(mesh):
  """Params stay float32; the residual stream does not."""
  cfg = tiny.model_config(tiny.SPARSE, dtype="bfloat16")

  def run(batch):
    model = MM1(jax.random.key(0), cfg)
    out = model(batch)
    return model, out.hidden, model.decoder.logits(out.hidden)

  model, out, logits = jax.eval_shape(run, tiny.put(tiny.BATCH, mesh))
  assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
  assert out.dtype == jnp.bfloat16
  assert logits.dtype == jnp.float32
