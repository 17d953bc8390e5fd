# SPDX-License-Identifier: Apache-2.0
"""The experts' SwiGLU, with a gradient written out.

  y = (silu(x W_gate) * (x W_up) * w) W_down        w: a row's router weight

The weight is applied before the last product and not to its result, so that no gradient needs the
result: a rematerialised layer multiplies by W_gate and W_up again, never by W_down. What lies
between the products goes through memory once each way, in float32: without the barrier, the
compiler makes four passes of the backward one.

Letters: E experts, m rows, D width, F mlp.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from mm1_jax.models.grouped_matmul import grouped_matmul, grouped_outer

Matrices = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def swiglu(
  x: Float[Array, "... D"],
  weights: Float[Array, "... 1"],
  matrices: Matrices,
  sizes: Int[Array, " E"] | None = None,
  named: bool = True,
) -> Float[Array, "... D"]:
  """Runs rows through their experts, and multiplies them by their weights.

  Args:
    x: [m, D], sorted by expert, with `sizes`; or [E, m, D], equally many for each.
    weights: of the rows, float32; 0 for a row that holds nothing.
    matrices: gate, up and down, in the dtype of x.
    sizes: int32 rows of each expert.
    named: lets a remat policy keep what comes between the products, as expert_gate and expert_up.
  """
  return _forward(x, weights, matrices, sizes, named)[0]


def _forward(x, weights, matrices, sizes, named):
  gate, up, down = matrices
  g, u = _matmul(x, gate, sizes), _matmul(x, up, sizes)
  if named:
    g, u = checkpoint_name(g, "expert_gate"), checkpoint_name(u, "expert_up")
  h = jax.nn.silu(g.astype(jnp.float32)) * u.astype(jnp.float32) * weights
  y = _matmul(h.astype(x.dtype), down, sizes)
  return y, (x, weights, matrices, sizes, g, u)


def _backward(named, residuals, dy):
  del named
  x, weights, (gate, up, down), sizes, g, u = residuals
  dh = _matmul(dy, down, sizes, transpose=True)
  # The barrier keeps the four in one pass. With no layout given, XLA for TPUs chose that of the
  # products by weights, and transposed the inputs of this pass and two of its outputs.
  h, dg, du, dweights = jax.lax.optimization_barrier(_between(g, u, weights, dh))
  h, dg, du = (with_layout_constraint(a, Layout(tuple(range(a.ndim)))) for a in (h, dg, du))
  dx = _matmul(dg, gate, sizes, transpose=True) + _matmul(du, up, sizes, transpose=True)
  dgate, dup, ddown = (_outer(*ab, sizes) for ab in ((x, dg), (x, du), (h, dy)))
  return dx, dweights, (dgate, dup, ddown), None


swiglu.defvjp(_forward, _backward)


def _between(g, u, weights, dh):
  """Returns the weighted h, and the gradients by g, u and weights: one pass over all of them."""
  dtype = g.dtype
  g, u, dh = (a.astype(jnp.float32) for a in (g, u, dh))
  sigmoid = jax.nn.sigmoid(g)
  silu = g * sigmoid
  dweights = jnp.sum(dh * silu * u, axis=-1, keepdims=True)
  dh *= weights
  dg = dh * u * (sigmoid + silu * (1 - sigmoid))
  return (silu * u * weights).astype(dtype), dg.astype(dtype), (dh * silu).astype(dtype), dweights


def _matmul(rows, matrices, sizes, *, transpose: bool = False):
  if sizes is not None:
    return grouped_matmul(rows, matrices, sizes, transpose=transpose)
  return jnp.einsum("emk,enk->emn" if transpose else "emk,ekn->emn", rows, matrices)


def _outer(rows, grad, sizes):
  if sizes is not None:
    return grouped_outer(rows, grad, sizes)
  return jnp.einsum("emk,emn->ekn", rows, grad)
