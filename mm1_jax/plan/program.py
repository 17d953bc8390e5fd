# SPDX-License-Identifier: Apache-2.0
"""The programs that are planned: the train step that `main` runs, and prefill and decode.

Nothing is computed: arguments are shapes with shardings, on a mesh of devices that need not exist.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from mm1_jax.batch import Batch
from mm1_jax.config import RunConfig
from mm1_jax.inference.model import abstract_params
from mm1_jax.models.decoder import KVCache
from mm1_jax.models.mm1 import MM1
from mm1_jax.plan.compile import What
from mm1_jax.plan.topology import Topology
from mm1_jax.sharding import abstract_batch, abstract_rows, abstract_state, make_mesh
from mm1_jax.train.step import init_state, train_step_on


class Program(NamedTuple):
  """A traced function and what it is called with."""

  arguments: dict[str, Any]  # abstract, by what they are: params, optimizer, batch, cache
  traced: jax.stages.Traced

  def bytes_per_device(self) -> dict[str, int]:
    """Returns the bytes of the arguments on one device, by what they are."""
    return {name: _bytes_per_device(tree) for name, tree in self.arguments.items()}


def trace(run: RunConfig, topology: Topology, what: What) -> Program:
  """Traces a program for a slice.

  Raises:
    ConfigError: the run does not divide over the slice, or `data` not over several.
  """
  mesh = make_mesh(run, topologies.get_topology_desc(**topology.describe()).devices)
  make = {"train": _train, "prefill": _prefill, "decode": _decode}[what]
  with jax.set_mesh(mesh):
    return make(run, mesh)


def _train(run: RunConfig, mesh: Mesh) -> Program:
  def make():
    return init_state(MM1(jax.random.key(run.train.seed), run.model), run)

  state, batch = abstract_state(make, mesh), abstract_batch(run, mesh)
  arguments = {"params": state.model, "optimizer": state.opt_state, "batch": batch}
  return Program(arguments, train_step_on(mesh).trace(state, batch, run=run))


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(model: MM1, batch: Batch, cache: KVCache) -> tuple[jax.Array, KVCache | None]:
  """Reads a batch of prompts into an empty cache; returns the logits of the last position."""
  out = model.prefill(batch.tokens, batch.images, batch.positions, batch.segment_ids, cache)
  return model.decoder.logits(out.hidden[:, -1:]), out.cache


@functools.partial(jax.jit, donate_argnames="cache")
def decode(
  model: MM1, tokens: jax.Array, positions: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache | None]:
  """Reads one more token a row; returns the next one's logits."""
  out = model.decode(tokens, positions, cache)
  return model.decoder.logits(out.hidden), out.cache


def _prefill(run: RunConfig, mesh: Mesh) -> Program:
  params, cache = _inference(run, mesh)
  batch = abstract_batch(run, mesh)
  arguments = {"params": params, "batch": batch, "cache": cache}
  return Program(arguments, prefill.trace(params, batch, cache))


def _decode(run: RunConfig, mesh: Mesh) -> Program:
  params, cache = _inference(run, mesh)
  ids = abstract_rows(mesh, jnp.int32, run.data.batch_size, 1)
  arguments = {"params": params, "batch": (ids, ids), "cache": cache}
  return Program(arguments, decode.trace(params, ids, ids, cache))


def _inference(run: RunConfig, mesh: Mesh) -> tuple[MM1, KVCache]:
  """Returns the params as generation holds them, and a cache for whole rows."""
  params = abstract_params(run, mesh)
  rows, slots = run.data.batch_size, run.data.seq_len
  return params, abstract_state(lambda: params.decoder.init_cache(rows, slots), mesh)


def _bytes_per_device(tree: Any) -> int:
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
