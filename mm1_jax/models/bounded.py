# SPDX-License-Identifier: Apache-2.0
"""Experts with a bounded number of rows: `capacity` slots for each expert in each batch row.

  sequence   the chips of a row gather it, so that places are counted along the whole row
  slots      all first choices before any second; a choice past the capacity has no slot
  expert     buffers of equal size for all experts cross the mesh by all-to-all, and return

Every array here is a chip's own part. Letters as in `models.moe`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mm1_jax.models.dispatch import collect, invert, places, spread, spread_weights
from mm1_jax.models.experts import swiglu


def run_bounded(
  rows, matrices, capacity: int
) -> tuple[Float[Array, "B S D"], Bool[Array, "B S k"]]:
  """Runs a chip's rows (x, weights, experts) through buffers of equal size for all experts.

  In each batch row an expert's slots go to all first choices before any second, also where
  positions are split over `sequence`: the chips of a row gather it, and each of them runs its share
  of every expert's slots.

  Returns:
    The output, and which choices got a slot.
  """
  num_positions, chip = rows[0].shape[1], jax.lax.axis_index("sequence")
  share = -(-capacity // jax.lax.axis_size("sequence"))
  num_experts = matrices[0].shape[0] * jax.lax.axis_size("expert")
  x, weights, experts = (jax.lax.all_gather(a, "sequence", axis=1, tiled=True) for a in rows)
  place = _places_in_row(experts, num_experts)
  kept = (experts < num_experts) & (place < capacity)
  num_slots = num_experts * x.shape[0] * share
  row = jnp.arange(x.shape[0])[:, None, None]
  slots = (experts * x.shape[0] + row) * share + place % share
  slots = jnp.where(kept & (place // share == chip), slots, num_slots)
  tokens = tuple(a.reshape(-1, a.shape[-1]) for a in (x, weights, slots))
  y = _run_slots(tokens, matrices, num_slots).reshape(x.shape)
  kept = jax.lax.dynamic_slice_in_dim(kept, chip * num_positions, num_positions, axis=1)
  return jax.lax.psum_scatter(y, "sequence", scatter_dimension=1, tiled=True), kept


def _places_in_row(experts: Int[Array, "B S k"], num_experts: int) -> Int[Array, "B S k"]:
  """Returns each choice's place among those of its row and expert, first choices first."""
  num_rows, num_positions, top_k = experts.shape
  queue = experts.transpose(0, 2, 1).reshape(num_rows, top_k * num_positions)
  place, _ = jax.vmap(functools.partial(places, num_experts=num_experts))(queue)
  return place.reshape(num_rows, top_k, num_positions).transpose(0, 2, 1)


def _run_slots(tokens, matrices, num_slots: int) -> Float[Array, "n D"]:
  """Runs a chip's tokens (x, weights, slots) through the experts of all chips."""
  x, weights, slots = tokens
  owners = invert(slots, num_slots)

  # Chips are the first dim in both directions, so that each part is contiguous: with experts first,
  # XLA for TPUs transposed the results through tiles of two rows, which took a tenth of the step.
  def exchange(rows):  # [chips, ...], a part for each chip -> a part from each
    return jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=0, tiled=True)

  num_chips, num_here = jax.lax.axis_size("expert"), matrices[0].shape[0]

  def to_experts(rows):  # [E B C, .] of this chip's rows -> its experts, all chips' rows
    parts = exchange(rows.reshape(num_chips, num_here, -1, rows.shape[-1]))
    return jnp.swapaxes(parts, 0, 1).reshape(num_here, -1, rows.shape[-1])

  rows = to_experts(spread(x, slots, owners))
  out: Any = swiglu(rows, to_experts(spread_weights(weights, slots, owners)), matrices)
  rows = out.reshape(num_here, num_chips, -1, x.shape[-1])
  rows = exchange(jnp.swapaxes(rows, 0, 1))
  return collect(rows.reshape(num_slots, -1), slots, owners)
