# SPDX-License-Identifier: Apache-2.0
"""Moving tokens to the rows of a buffer that experts work on, and back: gathers in both directions.

A *choice* is one of a token's k experts; flat, choice j of token i is number i k + j. A choice has
a *slot*, the buffer's row it goes to, and a row has an *owner*, the choice that it holds:

  slots [n, k]   row of each choice; m where it has none (padding, or no room)
  owners [m]     choice of each row; n k where it holds none

Each map is the other one's inverse, so the gradient of a gather by one is a gather by the other:
the scatter-add that JAX would use is far slower on every backend.
Letters: n tokens, k choices, m rows, D width, E experts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def places(queue: Int[Array, " q"], num_experts: int) -> tuple[Int[Array, " q"], Int[Array, " E"]]:
  """Returns each entry's place among those of its expert, and how many each expert has in all.

  Places count from 0. Entries of E or more belong to no expert; their places mean nothing.
  """
  # The queue along the last dim: a TPU pads a last dim of E experts to 128.
  chosen = queue[None] == jnp.arange(num_experts)[:, None]
  upto = jnp.cumsum(chosen.astype(jnp.int32), axis=1)
  return jnp.sum(jnp.where(chosen, upto - 1, 0), axis=0), upto[:, -1]


def invert(slots: Int[Array, "n k"], num_rows: int) -> Int[Array, " m"]:
  """Returns the owners of the rows."""
  choices = slots.size
  unowned = jnp.full((num_rows,), choices, jnp.int32)
  order = jnp.arange(choices, dtype=jnp.int32)
  return unowned.at[slots.reshape(-1)].set(order, mode="drop", unique_indices=True)


@jax.custom_vjp
def spread(
  x: Float[Array, "n D"], slots: Int[Array, "n k"], owners: Int[Array, " m"]
) -> Float[Array, "m D"]:
  """Copies each token to the rows of its choices; rows without an owner copy an arbitrary one."""
  return x.at[owners // slots.shape[1]].get(mode="clip")


@jax.custom_vjp
def collect(
  rows: Float[Array, "m D"], slots: Int[Array, "n k"], owners: Int[Array, " m"]
) -> Float[Array, "n D"]:
  """Sums each token's rows in float32; a choice without a row adds nothing."""
  total = jnp.zeros((slots.shape[0], rows.shape[1]), jnp.float32)
  for slot in slots.T:  # one gather a choice: [n, k, D] would be laid out in tiles of k of 8 rows
    row = rows.at[slot].get(mode="clip").astype(jnp.float32)
    total += jnp.where((slot < rows.shape[0])[:, None], row, 0.0)
  return total.astype(rows.dtype)


def spread_weights(
  weights: Float[Array, "n k"], slots: Int[Array, "n k"], owners: Int[Array, " m"]
) -> Float[Array, "m 1"]:
  """Returns each row's weight; 0 for rows without an owner, so that they contribute nothing."""
  rows = spread(weights.reshape(-1, 1), slots.reshape(-1, 1), owners)
  return jnp.where((owners < slots.size)[:, None], rows, 0.0)


def _spread_forward(x, slots, owners):
  return spread(x, slots, owners), (slots, owners)


def _spread_backward(maps, grad):
  return collect(grad, *maps), None, None


def _collect_forward(rows, slots, owners):
  return collect(rows, slots, owners), (slots, owners)


def _collect_backward(maps, grad):
  return spread(grad, *maps), None, None


spread.defvjp(_spread_forward, _spread_backward)
collect.defvjp(_collect_forward, _collect_backward)
