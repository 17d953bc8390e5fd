# SPDX-License-Identifier: Apache-2.0
"""A dense run to the start of a sparse one: sparse upcycling (Komatsuzaki et al., 2212.05055).

Every expert begins as a copy of the dense layer's network, and only the router is new. The weights
of a token's two or more experts sum to 1, so their sum is the output of the dense network: the
sparse model begins with the dense one's loss, unless tokens are dropped for want of room.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from mm1_jax import checkpoint
from mm1_jax.config import ModelConfig, MoEConfig, RunConfig
from mm1_jax.convert import ConvertError, unfinished
from mm1_jax.convert.placement import params_mesh
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_state

LAYERS = "decoder.units.layers"
GATE = "mlp.gate"
ROUTER = "mlp.router"
FREE = ("dtype", "remat", "scan")  # of a model: how it is computed, not what it is


def upcycle_run(
  path: epath.PathLike, sparse: RunConfig, out: epath.PathLike, *, fsdp: int = -1
) -> None:
  """Writes to `out` the params that `sparse` starts from with `train.init_from`.

  Args:
    path: a dense run, or what `convert import` wrote; parts that it lacks stay out.
    sparse: the run to start: the dense model, and `model.decoder.moe`.
    out: a folder laid out like a run, of the dense run's step.
    fsdp: devices that params are split over; -1 takes all.

  Raises:
    CheckpointError: there is no run at `path`, or there is one at `out`.
    ConvertError: the two models differ in more than the experts, or do not divide over the devices.
  """
  dense = checkpoint.read_run(path)
  moe = check_upcycling(dense.model, sparse.model)
  checkpoint.refuse_run(out)
  mesh = params_mesh(sparse, fsdp)
  with jax.set_mesh(mesh):
    # Params that are still abstract after reading are not in the checkpoint.
    read = checkpoint.init_from(path, _abstract(dense.model, mesh))
    params = {k: x for k, x in checkpoint.to_names(read).items() if isinstance(x, jax.Array)}
    if f"{LAYERS}.0.{GATE}" not in params:
      raise ConvertError(f"'{path}' has no decoder, so there is nothing to make experts of.")
    like = checkpoint.to_names(_abstract(sparse.model, mesh))
    params = upcycle(params, like, moe, seed=sparse.train.seed)
  data = dataclasses.replace(sparse.data, tokenizer=dense.data.tokenizer)
  with unfinished.folder(pathlib.Path(out)) as working:
    checkpoint.save_params(working, int(checkpoint.find_step(path).name), params)
    checkpoint.write_run_files(working, dataclasses.replace(sparse, data=data))
  if moe.capacity_factor is not None:
    logging.info(
      "capacity_factor %g: where experts are chosen more often than that, tokens are dropped, and "
      "the first loss is above the dense one; None drops none",
      moe.capacity_factor,
    )


def check_upcycling(dense: ModelConfig, sparse: ModelConfig) -> MoEConfig:
  """Returns the experts to make; raises ConvertError unless they are all that differs."""
  moe = sparse.decoder.moe
  if dense.decoder.moe is not None:
    raise ConvertError("the run has experts already (model.decoder.moe); give a dense one.")
  if moe is None:
    raise ConvertError("the config has no experts (model.decoder.moe is None); give a sparse one.")
  if moe.top_k == 1:
    raise ConvertError(
      "model.decoder.moe.top_k 1 weighs a token's expert with its probability: copies of the dense "
      "network would say less than it did, and the run would not begin where the dense one ended. "
      "Set 2 or more, whose weights sum to 1."
    )
  decoder = dataclasses.replace(sparse.decoder, moe=None)
  free = {field: getattr(dense, field) for field in FREE}
  wanted = dataclasses.replace(sparse, decoder=decoder, **free)
  wrong = list(_differences(dense, wanted, "model"))
  if wrong:
    raise ConvertError(f"run and config must differ in experts only: {'; '.join(wrong)}.")
  return moe


def upcycle(
  params: dict[str, jax.Array],
  like: dict[str, jax.ShapeDtypeStruct],
  moe: MoEConfig,
  *,
  seed: int,
) -> dict[str, jax.Array]:
  """Returns the sparse model's params by name, of those of the dense one that are given.

  Args:
    params: of the dense model.
    like: all params of the sparse model: shapes and shardings.
    moe: its experts.
    seed: of the routers.
  """
  made = {}
  for name, x in params.items():
    if not name.startswith(f"{LAYERS}.0."):
      made[name] = x
      continue
    rest = name.removeprefix(f"{LAYERS}.0.")
    # Of every k layers the last is sparse.
    for i in range(moe.every):
      ours = f"{LAYERS}.{i}.{rest}"
      made[ours] = _layers(x, i, moe.every, like[ours])
  routers = [name for name in like if name.endswith(ROUTER)]
  for number, name in enumerate(routers):
    key = jax.random.fold_in(jax.random.key(seed), number)
    made[name] = _router(key, like[name])
  return made


def _layers(x: jax.Array, first: int, every: int, like: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns every k-th layer of a stack, and where `like` has experts, for each of them."""
  experts = len(like.shape) > x.ndim

  def pick(x):
    part = x[first::every]
    return jnp.broadcast_to(part[:, None], like.shape) if experts else part

  return jax.jit(pick, out_shardings=like.sharding)(x)


def _router(key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns routers [U, D, E] of the deviation that fresh models have: logits of order 1."""

  def make():
    return jax.random.normal(key, like.shape, like.dtype) * like.shape[-2] ** -0.5

  return jax.jit(make, out_shardings=like.sharding)()


def _abstract(cfg: ModelConfig, mesh) -> MM1:
  return abstract_state(lambda: MM1(jax.random.key(0), cfg), mesh)


def _differences(ours: Any, theirs: Any, path: str):
  """Yields one line for each field that differs."""
  for field in dataclasses.fields(ours):
    a, b = getattr(ours, field.name), getattr(theirs, field.name)
    where = f"{path}.{field.name}"
    if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
      yield from _differences(a, b, where)
    elif a != b:
      yield f"{where} is {a} in the run and {b} in the config"
