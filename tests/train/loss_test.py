# SPDX-License-Identifier: Apache-2.0
"""The chunked cross-entropy against float64 numpy, and what it never holds in memory.

Letters: B rows, S positions, D width, V vocabulary, M sources.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm1_jax.models.decoder import Decoder
from mm1_jax.sharding import LAYOUT
from mm1_jax.train import loss as loss_module
from mm1_jax.train.loss import TokenSums, cross_entropy, loss_fn, split_rows
from mm1_jax.train.step import train_step
from tests.helpers import tiny, tiny_step

pytestmark = pytest.mark.compiles

RUN = tiny_step.run_config()
NUM_SOURCES = 2
Z_LOSS, FACTOR = 0.3, 1.7  # of z in the loss, and of the loss in what is differentiated


@pytest.fixture(scope="module")
def decoder() -> Decoder:
  return tiny_step.make_state(RUN).model.decoder


@pytest.fixture(scope="module")
def hidden() -> np.ndarray:
  shape = (*tiny.BATCH.tokens.shape, RUN.model.decoder.width)
  return (3 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


@pytest.fixture(autouse=True)
def mesh():
  with jax.set_mesh(tiny.mesh(*tiny_step.ONE)):
    yield


def dense(weight, hidden, batch) -> tuple[dict, dict]:
  """Returns the loss and the sums, and the gradient of FACTOR times the loss, in float64."""
  weight, hidden = np.asarray(weight, np.float64), hidden.astype(np.float64)
  logits = hidden @ weight.T
  top = logits.max(axis=-1)
  normaliser = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
  target = np.take_along_axis(logits, batch.targets[..., None].astype(int), axis=-1)[..., 0]
  nll, mask = normaliser - target, batch.loss_mask.astype(np.float64)
  of_source = [mask * (batch.source_ids == m) for m in range(NUM_SOURCES)]
  sums = {
    "nll": [(w * nll).sum() for w in of_source],
    "count": [w.sum() for w in of_source],
    "z": (mask * normaliser**2).sum(),
  }
  probs = np.exp(logits - normaliser[..., None])
  one_hot = np.eye(logits.shape[-1])[batch.targets]
  d_logits = mask[..., None] * (probs - one_hot)
  d_logits += (Z_LOSS * mask * 2 * normaliser)[..., None] * probs
  d_logits *= FACTOR
  grads = {
    "hidden": d_logits @ weight,
    "weight": np.einsum("bsv,bsd->vd", d_logits, hidden),
  }
  return sums, grads


def chunked(decoder, hidden, batch) -> tuple[TokenSums, dict]:
  def total(decoder, hidden):
    hidden = jax.sharding.reshard(hidden, LAYOUT.act_b)
    loss, sums = cross_entropy(decoder, hidden, batch, NUM_SOURCES, Z_LOSS)
    return FACTOR * loss, sums

  (d_decoder, d_hidden), sums = tiny.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(
    decoder, jnp.asarray(hidden)
  )
  return sums, {"hidden": d_hidden, "weight": d_decoder.embedding[...]}


@pytest.mark.parametrize("chunk", [512, 4, 12, 1], ids=str)
def test_sums_and_gradients_are_the_dense_ones(decoder, hidden, chunk, monkeypatch):
  """Also where a row is no whole number of chunks (12), and where it is one of them."""
  monkeypatch.setattr(loss_module, "CHUNK", chunk)
  sums, grads = chunked(decoder, hidden, tiny.BATCH)
  expected, expected_grads = dense(decoder.embedding[...], hidden, tiny.BATCH)
  np.testing.assert_allclose(sums.nll, expected["nll"], rtol=1e-5)
  np.testing.assert_array_equal(sums.count, expected["count"])
  np.testing.assert_allclose(sums.z, expected["z"], rtol=1e-5)
  for name, grad in expected_grads.items():
    assert tiny.largest_difference(grads[name], grad) < 1e-5, name


def test_the_loss_is_made_of_the_sums(decoder, hidden):
  """Where it is differentiated and where, as in evaluation, it is not."""

  def loss(hidden):
    hidden = jax.sharding.reshard(hidden, LAYOUT.act_b)
    return cross_entropy(decoder, hidden, tiny.BATCH, NUM_SOURCES, Z_LOSS)

  expected, _ = dense(decoder.embedding[...], hidden, tiny.BATCH)
  total = sum(expected["nll"]) + Z_LOSS * expected["z"]
  value, sums = tiny.jit(loss)(hidden)
  (trained, of_trained), _ = tiny.jit(jax.value_and_grad(loss, has_aux=True))(hidden)
  assert float(value) == pytest.approx(total, rel=1e-5)
  assert float(trained) == pytest.approx(float(value), rel=1e-6)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), of_trained, sums)


def test_logits_far_from_zero_do_not_overflow(decoder, hidden):
  sums, grads = chunked(decoder, 100 * hidden, tiny.BATCH)
  expected, expected_grads = dense(decoder.embedding[...], 100 * hidden, tiny.BATCH)
  np.testing.assert_allclose(sums.nll, expected["nll"], rtol=1e-5)
  assert tiny.largest_difference(grads["hidden"], expected_grads["hidden"]) < 1e-4


def test_masked_positions_change_nothing(decoder, hidden):
  """Neither their targets nor their hidden states, and no gradient comes from them."""
  masked = tiny.BATCH.loss_mask == 0
  assert masked.any(axis=1).all()
  other = tiny.BATCH._replace(
    targets=np.where(masked, 7, tiny.BATCH.targets),
    source_ids=np.where(masked, 1, tiny.BATCH.source_ids),
  )
  other_hidden = np.where(masked[..., None], 5.0, hidden).astype(np.float32)
  sums, grads = chunked(decoder, hidden, tiny.BATCH)
  other_sums, other_grads = chunked(decoder, other_hidden, other)
  tiny_step.assert_same_bits(other_sums, sums)
  tiny_step.assert_same_bits(other_grads, grads)
  d_hidden = np.asarray(grads["hidden"])
  assert not d_hidden[masked].any()
  assert d_hidden[~masked].any(axis=-1).all()


def test_the_losses_weights(decoder):
  """total = nll / num_targets + z_loss * z / num_targets, and each sparse layer's router losses."""
  run = tiny_step.run_config(tiny.SPARSE)
  moe = run.model.decoder.moe
  model = tiny_step.make_state(run).model
  batch = tiny.put(tiny.BATCH, tiny.mesh(*tiny_step.ONE))
  losses = tiny.jit(functools.partial(loss_fn, run=run, share=0.5))(
    model, batch, num_targets=jnp.float32(50)
  )
  assert float(losses.tokens.z) > 0
  expected = np.sum(losses.tokens.nll) / 50 + run.train.z_loss * float(losses.tokens.z) / 50
  expected += 0.5 * moe.balance_loss * np.sum(losses.moe.balance_loss)
  expected += 0.5 * moe.router_z_loss * np.sum(losses.moe.router_z_loss)
  assert float(losses.total) == pytest.approx(float(expected), rel=1e-6)


def test_in_bfloat16_no_product_of_the_head_is_float32(decoder, hidden):
  """Float32 logits have a float32 gradient, which would pass its dtype on to both products."""
  factors = jnp.asarray(hidden, jnp.bfloat16), decoder.embedding[...].astype(jnp.bfloat16)

  def gradients(hidden, weight):
    logits, pull = jax.vjp(decoder.logits, hidden, weight)
    return logits, *pull(jnp.sin(logits))

  jaxpr = jax.make_jaxpr(gradients)(*factors)
  products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
  assert len(products) >= 3
  assert {x.aval.dtype for e in products for x in e.invars} == {jnp.dtype("bfloat16")}
  hidden, weight = (np.asarray(x, np.float64) for x in factors)
  logits, d_hidden, d_weight = tiny.jit(gradients)(*factors)
  assert logits.dtype == np.float32
  assert tiny.largest_difference(logits, hidden @ weight.T) < 1e-5
  grad = np.sin(np.asarray(logits, np.float64))
  assert tiny.largest_difference(d_hidden, grad @ weight) < 0.01
  assert tiny.largest_difference(d_weight, np.einsum("bsv,bsd->vd", grad, hidden)) < 0.01


def equations(jaxpr):
  """Yields all that a jaxpr does, in its inner jaxprs too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, list | tuple) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from equations(inner)


def logits_of_whole_rows() -> set:
  """Returns the arrays of a train step that are as large as [B, S, V] and have V as a dim."""
  jaxpr = jax.make_jaxpr(functools.partial(train_step, run=RUN))(
    tiny_step.make_state(RUN), tiny.put(tiny.BATCH, tiny.mesh(*tiny_step.ONE))
  )
  vocab = RUN.model.decoder.vocab_size
  outputs = (out.aval for equation in equations(jaxpr.jaxpr) for out in equation.outvars)
  found = [(tuple(x.shape), x.dtype) for x in outputs if hasattr(x, "shape")]
  assert any(vocab in shape for shape, _ in found), "no logits at all: the walk is wrong"
  size = tiny.BATCH.tokens.size * vocab
  return {(s, str(t)) for s, t in found if vocab in s and np.prod(s) >= size}


def test_no_array_holds_the_logits_of_whole_rows(monkeypatch):
  monkeypatch.setattr(loss_module, "CHUNK", 4)
  assert logits_of_whole_rows() == set()


def test_the_search_for_whole_logits_can_fail(monkeypatch):
  """It finds rows of one chunk."""
  whole = (*tiny.BATCH.tokens.shape, RUN.model.decoder.vocab_size)
  monkeypatch.setattr(loss_module, "CHUNK", tiny.BATCH.tokens.shape[1])
  assert (whole, "float32") in logits_of_whole_rows()


@pytest.mark.parametrize(("trained", "products"), [((0, 1), 3), ((1,), 2)])
def test_no_logits_are_made_twice(decoder, hidden, trained, products, monkeypatch):
  """A chunk's loss and its gradients take one product by the head each; a frozen head has none."""
  monkeypatch.setattr(loss_module, "CHUNK", 4)

  def loss(decoder, hidden):
    return cross_entropy(decoder, hidden, tiny.BATCH, NUM_SOURCES, Z_LOSS)[0]

  program = jax.jit(jax.grad(loss, argnums=trained)).lower(decoder, hidden).compile().as_text()
  assert len(re.findall(r" dot\(", program)) == products


def test_micro_batches_take_every_row_once():
  batch = tiny.put(tiny.BATCH, tiny.mesh(*tiny_step.ONE))
  for name, rows in split_rows(batch, 4)._asdict().items():
    whole = getattr(tiny.BATCH, name)
    assert rows.shape == (4, 2, *whole.shape[1:])
    np.testing.assert_array_equal(np.swapaxes(rows, 0, 1).reshape(whole.shape), whole)
