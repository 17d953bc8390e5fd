# SPDX-License-Identifier: Apache-2.0
"""The sparse layer against a loop over tokens; its losses and statistics against hand numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm1_jax.config import DecoderConfig, MoEConfig
from mm1_jax.models.grouped_matmul import padded_rows
from mm1_jax.models.layers import run_blocks
from mm1_jax.models.moe import MoE
from tests.helpers import tiny

pytestmark = pytest.mark.compiles

WIDTH, MLP = 8, 16
DECODER = DecoderConfig(width=WIDTH, mlp_dim=MLP)


@pytest.fixture(scope="module")
def mesh():
  return tiny.mesh()


def make(cfg: MoEConfig, mesh, router: np.ndarray | None = None) -> MoE:
  """Returns a layer with random experts, and this router."""

  def values(name, shape):
    return router if name == "router" and router is not None else tiny.draw(name, shape)

  return tiny.place(lambda: MoE(jax.random.key(0), DECODER, cfg, 1.0), mesh, values)


def apply(layer: MoE, x: np.ndarray, valid: np.ndarray, mesh, **kwargs):
  with jax.set_mesh(mesh):
    run = tiny.jit(lambda layer, x, valid: layer(x, valid, **kwargs))
    return jax.tree.map(np.asarray, run(layer, *tiny.put((x.astype(np.float32), valid), mesh)))


def route(x, router, valid, top_k: int, capacity: int):
  """Returns each choice's expert, weight and whether it found room, one token at a time."""
  probs = np.exp(x @ router - (x @ router).max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  experts = np.argsort(-probs, axis=-1, kind="stable")[..., :top_k]
  weights = np.take_along_axis(probs, experts, -1)
  if top_k > 1:
    weights /= weights.sum(-1, keepdims=True)
  kept = np.zeros(experts.shape, bool)
  for row in range(x.shape[0]):
    taken = np.zeros(router.shape[1], int)
    for choice in range(top_k):  # every first choice before any second
      for position in range(x.shape[1]):
        if valid[row, position]:
          expert = experts[row, position, choice]
          kept[row, position, choice] = taken[expert] < capacity
          taken[expert] += 1
  return experts, weights, kept


def loop(layer: MoE, x, valid, capacity: int):
  """Returns the layer's output in float64, one token and one choice at a time, and the drops."""
  weights = {name: value.astype(np.float64) for name, value in tiny.names(layer).items()}
  experts, shares, kept = route(x, weights["router"], valid, layer.cfg.top_k, capacity)
  y = np.zeros_like(x)
  for row, position, choice in np.argwhere(kept):
    token, e = x[row, position], experts[row, position, choice]
    gate = token @ weights["gate"][e]
    h = gate / (1 + np.exp(-gate)) * (token @ weights["up"][e])
    y[row, position] += shares[row, position, choice] * (h @ weights["down"][e])
  return y, (valid[..., None] & ~kept).sum() / (valid.sum() * layer.cfg.top_k)


def inputs(num_rows: int = 3, num_positions: int = 12):
  """Returns tokens, of which some are padding: in front, in the middle and at the end."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((num_rows, num_positions, WIDTH))
  valid = np.ones((num_rows, num_positions), bool)
  valid[0, -4:] = valid[1, :3] = valid[2, 5] = False
  return x, valid


# A router that likes expert 1, so that it overflows.
ROUTER = tiny.draw("router", (WIDTH, 4)) + np.eye(WIDTH, 4, 1)[::-1]

CASES = {
  "dropless": (MoEConfig(4, 1, 2, None), 12),
  "roomy": (MoEConfig(4, 1, 2, 2.0), 12),
  "tight": (MoEConfig(4, 1, 2, 0.6), 4),  # ceil(0.6 x 2 x 12 / 4)
  "one slot": (MoEConfig(4, 1, 2, 0.01), 1),
  "top 1": (MoEConfig(4, 1, 1, 1.0), 3),
  "top 3": (MoEConfig(4, 1, 3, 0.5), 5),
}


@pytest.mark.parametrize("case", CASES)
def test_layer_equals_a_loop_over_tokens(case, mesh):
  """Fails for second choices that push first ones out, unnormalised weights, a wrong capacity."""
  cfg, capacity = CASES[case]
  x, valid = inputs()
  layer = make(cfg, mesh, ROUTER)
  y, stats = apply(layer, x, valid, mesh)
  expected, dropped = loop(layer, x, valid, capacity)
  assert tiny.largest_difference(y, expected) < 1e-5
  assert stats.dropped == pytest.approx(dropped, abs=1e-6)
  assert (dropped > 0) == (case not in ("dropless", "roomy"))  # or the case shows nothing
  assert not y[~valid].any()


def test_first_choices_queue_before_any_second(mesh):
  """Literal: room for two; expert 0 is wanted first by tokens 0, 2, 3 and second by token 1."""
  cfg = MoEConfig(3, 1, 2, 0.75)  # ceil(0.75 x 2 x 4 / 3) = 2 slots
  x = np.eye(4, WIDTH)[None]
  router = np.zeros((WIDTH, 3))
  router[:4] = [[2, 1, 0], [1, 2, 0], [2, 1, 0], [2, 1, 0]]
  layer = make(cfg, mesh, router)
  valid = np.ones((1, 4), bool)
  y, stats = apply(layer, x, valid, mesh)
  _, _, kept = route(x, router, valid, 2, 2)
  assert kept[0].tolist() == [[True, True], [True, False], [True, False], [False, False]]
  assert tiny.largest_difference(y, loop(layer, x, valid, 2)[0]) < 1e-5
  assert not y[0, 3].any()
  assert stats.dropped == pytest.approx(4 / 8)
  np.testing.assert_allclose(stats.load, [4 / 8, 4 / 8, 0], atol=1e-6)


def test_dropless_overrides_the_capacity(mesh):
  """Generation reads one token at a time, where a capacity would mean something else."""
  x, valid = inputs()
  tight, dropless = CASES["tight"][0], CASES["dropless"][0]
  y, stats = apply(make(tight, mesh, ROUTER), x, valid, mesh, dropless=True)
  expected, _ = apply(make(dropless, mesh, ROUTER), x, valid, mesh)
  assert np.array_equal(y, expected)
  assert stats.dropped == 0


@pytest.mark.parametrize("case", ["dropless", "tight", "top 1"])
def test_an_example_depends_on_others_of_its_row_only_by_a_capacity(case, mesh):
  """The first half of each row is one example; the second half becomes tokens of expert 1.

  Without a capacity no bit of the first changes. With one it does, as first choices of the second
  example come before second choices of the first; but single choices keep their order.
  """
  x, _ = inputs()
  half, valid = x.shape[1] // 2, np.ones(x.shape[:2], bool)
  other = x.copy()
  other[:, half:] = 3 * ROUTER[:, 1]
  layer = make(CASES[case][0], mesh, ROUTER)
  with jax.set_mesh(mesh):
    run = tiny.jit(lambda layer, x, valid: layer(x, valid)[0])
    a, b = (
      np.asarray(run(layer, *tiny.put((v.astype(np.float32), valid), mesh))) for v in (x, other)
    )
  same = np.array_equal(a[:, :half], b[:, :half])
  assert same == (case != "tight")
  assert not np.array_equal(a[:, half:], b[:, half:])


@pytest.mark.parametrize("case", ["dropless", "tight"])
def test_padding_takes_no_room_and_counts_in_nothing(case, mesh):
  """Padding that would crowd one expert and blow up every loss changes no bit."""
  x, valid = inputs()
  layer = make(CASES[case][0], mesh, ROUTER)
  other = np.where(valid[..., None], x, 50.0)
  with jax.set_mesh(mesh):
    run = tiny.jit(lambda layer, x, valid: layer(x, valid))
    a, b = (run(layer, *tiny.put((v.astype(np.float32), valid), mesh)) for v in (x, other))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_losses_and_load_by_hand(mesh):
  """Three tokens for expert 0 at 3:1, one for expert 1 at 1:3, and padding with large values."""
  cfg = MoEConfig(2, 1, 1, None)
  router = np.zeros((WIDTH, 2))
  router[:3] = [[np.log(3), 0], [0, np.log(3)], [100, 0]]
  x = np.eye(WIDTH)[[0, 0, 1, 0, 2, 2]][None]
  valid = np.array([[True] * 4 + [False] * 2])
  _, stats = apply(make(cfg, mesh, router), x, valid, mesh)
  # First choices 3/4 and 1/4; mean probabilities (3 x 3/4 + 1/4) / 4 = 5/8 and 3/8.
  assert stats.balance_loss == pytest.approx(2 * (3 / 4 * 5 / 8 + 1 / 4 * 3 / 8), rel=1e-5)
  assert stats.router_z_loss == pytest.approx(np.log(4) ** 2, rel=1e-5)
  np.testing.assert_allclose(stats.load, [3 / 4, 1 / 4], rtol=1e-6)
  assert stats.dropped == 0


def test_balance_loss_is_1_when_even_and_num_experts_when_collapsed(mesh):
  cfg = MoEConfig(4, 1, 2, None)
  even = 50 * np.eye(WIDTH, 4)
  x = np.eye(WIDTH)[[0, 1, 2, 3] * 2][None]
  valid = np.ones((1, 8), bool)
  _, stats = apply(make(cfg, mesh, even), x, valid, mesh)
  assert stats.balance_loss == pytest.approx(1, rel=1e-5)
  collapsed = np.zeros((WIDTH, 4))
  collapsed[:, 2] = 50
  _, stats = apply(make(cfg, mesh, collapsed), x, valid, mesh)
  assert stats.balance_loss == pytest.approx(4, rel=1e-5)
  assert stats.load[2] == pytest.approx(0.5)


def test_load_sums_to_1_with_and_without_drops(mesh):
  x, valid = inputs()
  for case in ("dropless", "tight"):
    _, stats = apply(make(CASES[case][0], mesh, ROUTER), x, valid, mesh)
    assert stats.load.sum() == pytest.approx(1, rel=1e-5)


def test_a_batch_of_padding_is_no_division_by_zero(mesh):
  x, valid = inputs()
  y, stats = apply(make(CASES["tight"][0], mesh, ROUTER), x, np.zeros_like(valid), mesh)
  assert not y.any()
  for value in stats:
    assert np.isfinite(value).all()


def dense_reference(weights: dict, x, valid, kept, experts):
  """Returns output, balance and z loss with every token through every expert: plain einsums."""
  num_experts = weights["router"].shape[1]
  logits = x @ weights["router"]
  probs = jax.nn.softmax(logits)
  chosen = jnp.take_along_axis(probs, experts, -1)
  shares = chosen / (chosen.sum(-1, keepdims=True) if experts.shape[-1] > 1 else 1) * kept
  table = jnp.einsum("bsk,bske->bse", shares, jax.nn.one_hot(experts, num_experts))
  h = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, weights["gate"]))
  h *= jnp.einsum("bsd,edf->bsef", x, weights["up"])
  y = jnp.einsum("bsef,efd,bse->bsd", h, weights["down"], table)
  count = valid.sum()
  first = (jax.nn.one_hot(experts[..., 0], num_experts) * valid[..., None]).sum((0, 1)) / count
  balance = num_experts * jnp.sum(first * (probs * valid[..., None]).sum((0, 1)) / count)
  z = jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * valid) / count
  return y, balance, z


@pytest.mark.parametrize("case", ["dropless", "tight", "top 1"])
def test_gradient_equals_that_of_a_dense_reference(case, mesh):
  """The dispatch has a hand-written gradient: every token's and every weight's is checked."""
  cfg, capacity = CASES[case]
  x, valid = inputs()
  layer = make(cfg, mesh, ROUTER)
  weights = tiny.names(layer)
  experts, _, kept = route(x, weights["router"].astype(np.float64), valid, cfg.top_k, capacity)
  direction = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
  x = x.astype(np.float32)

  def ours(layer, x, valid):
    y, stats = layer(x, valid)
    return jnp.sum(y * direction) + 0.7 * stats.balance_loss + 0.3 * stats.router_z_loss

  def reference(weights, x):
    y, balance, z = dense_reference(weights, x, valid, kept, experts)
    return jnp.sum(y * direction) + 0.7 * balance + 0.3 * z

  with jax.set_mesh(mesh):
    run = tiny.jit(jax.value_and_grad(ours, argnums=(0, 1)))
    value, (grads, x_grad) = run(layer, *tiny.put((x, valid), mesh))
  expected, (expected_grads, expected_x) = tiny.jit(jax.value_and_grad(reference, argnums=(0, 1)))(
    weights, x
  )
  assert float(value) == pytest.approx(float(expected), rel=1e-5)
  assert tiny.largest_difference(x_grad, expected_x) < 1e-5
  grads = tiny.names(grads)
  assert grads.keys() == expected_grads.keys()
  for name, grad in expected_grads.items():
    assert np.abs(grad).max() > 1e-3, f"{name} has no gradient to compare"
    assert tiny.largest_difference(grads[name], grad) < 1e-5, name


@pytest.mark.parametrize("capacity", [None, 2.0], ids=str)
def test_a_single_expert_teaches_its_router(capacity, mesh):
  """By the layer's output alone, no router loss: about as much as with two experts."""
  x, valid = inputs()
  direction = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)

  def norm(top_k: int) -> float:
    layer = make(MoEConfig(4, 1, top_k, capacity), mesh, ROUTER)
    total = lambda layer, x, valid: jnp.sum(layer(x, valid)[0] * direction)
    with jax.set_mesh(mesh):
      grads = tiny.jit(jax.grad(total))(layer, *tiny.put((x.astype(np.float32), valid), mesh))
    return float(np.linalg.norm(tiny.names(grads)["router"]))

  assert 0.2 < norm(1) / norm(2) < 5


def test_dropless_equals_bounded_where_nothing_overflows(mesh):
  """Output, statistics and every gradient of the two paths, which share only the routing."""
  x, valid = inputs()
  direction = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
  dropless = outputs_and_gradients(CASES["dropless"][0], mesh, x, valid, direction)
  bounded = outputs_and_gradients(CASES["roomy"][0], mesh, x, valid, direction)
  assert dropless.keys() == bounded.keys()
  for name, value in bounded.items():
    assert tiny.largest_difference(dropless[name], value) < 1e-5, name


def outputs_and_gradients(cfg, mesh, x, valid, direction, router=ROUTER) -> dict[str, np.ndarray]:
  """Returns the output, the statistics, and the gradients of a random direction of the output."""
  layer = make(cfg, mesh, router)

  def total(layer, x, valid, direction):
    y, stats = layer(x, valid)
    return jnp.sum(y * direction) + stats.balance_loss + stats.router_z_loss, (y, stats)

  with jax.set_mesh(mesh):
    run = tiny.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    arrays = tiny.put((x.astype(np.float32), valid, direction), mesh)
    (_, (y, stats)), (grads, x_grad) = run(layer, *arrays)
  named = {f"grad.{name}": grad for name, grad in tiny.names(grads).items()}
  return {"y": np.asarray(y), "grad.x": np.asarray(x_grad), **tiny.names(stats), **named}


# Mesh and exchange factor. Every token goes to expert 1 and another. With room for 1.5 times an
# even load on each of four chips the tokens go in rounds; with room for twice, at once.
MESHES = [
  ((1, 1, 4, 1), 1.5),
  pytest.param((1, 1, 4, 1), 2.0, marks=pytest.mark.slow),
  pytest.param((1, 1, 4, 1), 4.0, marks=pytest.mark.slow),
  pytest.param((1, 2, 2, 2), 1.0, marks=pytest.mark.slow),
  pytest.param((1, 2, 2, 2), 1.9, marks=pytest.mark.slow),
  pytest.param((2, 2, 2, 1), 2.0, marks=pytest.mark.slow),
  pytest.param((2, 1, 4, 1), 1.5, marks=pytest.mark.slow),
  pytest.param((1, 2, 1, 4), 1.5, marks=pytest.mark.slow),
  pytest.param((8, 1, 1, 1), 1.5, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sizes", "factor"), MESHES, ids=str)
def test_dropless_is_the_same_on_every_mesh(sizes, factor):
  cfg = MoEConfig(4, 1, 2, None, exchange_factor=factor)
  actual = skewed(cfg, tiny.mesh(*sizes))
  for name, value in skewed(CASES["dropless"][0], tiny.mesh()).items():
    assert tiny.largest_difference(actual[name], value) < 1e-5, name


@functools.cache
def skewed(cfg: MoEConfig, mesh) -> dict[str, np.ndarray]:
  x, valid = inputs(num_rows=8)
  x[..., 0] = 3.0
  router = ROUTER.copy()
  router[0] = [0.0, 3.0, 0.0, 0.0]
  direction = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
  outputs = outputs_and_gradients(cfg, mesh, x, valid, direction, router)
  assert outputs["load"][1] == 0.5
  return outputs


@pytest.mark.parametrize(
  ("remat", "num_products"), [("expert_gate+expert_up", 9), ("full", 11), ("none", 9)]
)
def test_backward_multiplies_no_more_than_it_must(remat, num_products, mesh):
  """Three products forward and six backward; rematerialised, gate and up again, down never."""
  jaxpr = gradient_of_a_scan(CASES["roomy"][0], remat, mesh)
  assert count_expert_products(jaxpr) == num_products


def test_a_remat_policy_keeps_nothing_of_the_rounds():
  """A layer goes at once or in rounds; kept for both, the rounds' buffers would be the larger."""
  cfg = MoEConfig(4, 1, 2, None, exchange_factor=1.5)
  jaxpr = gradient_of_a_scan(cfg, "expert_gate+expert_up", tiny.mesh(1, 1, 4, 1))
  forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
  kept = [out.aval.shape for out in forward.outvars if out.aval.shape[-1:] == (MLP,)]
  assert kept == [(1, 4 * padded_rows(2 * 12 * 2 * 3 // 2), MLP)] * 2  # layers, chips x rows, F


def gradient_of_a_scan(cfg: MoEConfig, remat: str, mesh):
  """Returns the jaxpr of the gradient of one layer in a scan."""
  layer = make(cfg, mesh, ROUTER)
  x, valid = inputs(num_rows=8)

  def total(layers, x, valid):
    def body(x, layer):
      return layer(x, valid)[0], None

    return jnp.sum(run_blocks(body, x, layers, remat=remat, scan=True)[0])

  with jax.set_mesh(mesh):
    layers = jax.tree.map(lambda leaf: leaf[None], layer)
    arrays = tiny.put((x.astype(np.float32), valid), mesh)
    return jax.make_jaxpr(jax.grad(total))(layers, *arrays).jaxpr


def count_expert_products(jaxpr) -> int:
  """Counts products with a batch dim, as the bounded path's are over experts, in all it calls."""
  count = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      count += len(eqn.params["dimension_numbers"][1][0]) > 0
    for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
      count += count_expert_products(sub) if hasattr(sub, "eqns") else 0
  return count


@pytest.mark.parametrize("loss", ["output", "balance_loss", "router_z_loss"])
def test_router_learns_from_every_loss(loss, mesh):
  """A router cut from one of its losses trains on, and its experts die slowly."""
  x, valid = inputs()
  layer = make(dataclasses.replace(CASES["tight"][0]), mesh, ROUTER)

  def total(layer, x, valid):
    y, stats = layer(x, valid)
    return jnp.sum(y**2) if loss == "output" else getattr(stats, loss)

  with jax.set_mesh(mesh):
    grads = tiny.names(
      tiny.jit(jax.grad(total))(layer, *tiny.put((x.astype(np.float32), valid), mesh))
    )
  assert np.abs(grads["router"]).max() > 1e-3


def test_router_is_computed_in_float32(mesh):
  """In bfloat16 two logits that differ by 1/1000 tie, and the wrong expert is chosen."""
  router = np.zeros((WIDTH, 2))
  router[0] = [1.0, 1.001]
  x = np.eye(1, WIDTH, dtype=jnp.bfloat16)[None]
  layer = make(MoEConfig(2, 1, 1, None), mesh, router)
  with jax.set_mesh(mesh):
    run = tiny.jit(lambda layer, x, valid: layer(x, valid))
    y, stats = run(layer, *tiny.put((x, np.ones((1, 1), bool)), mesh))
  assert y.dtype == jnp.bfloat16
  assert stats.load.tolist() == [0, 1]
