# SPDX-License-Identifier: Apache-2.0
"""What `mm1_jax.models.layers.multiply` saves on a CPU: `python -m bench.cpu.products`.

Times two parts of mm1_debug's step, forward and backward, with products of two-dim matrices as they
are, and with the plain einsum over rows and positions; by turns in one process, the fastest of
`--repeats` each, CPU time.
"""

import argparse
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bench.cpu.moe import fastest
from mm1_jax.config import RunConfig
from mm1_jax.configs import mm1_debug
from mm1_jax.models import decoder
from mm1_jax.sharding import make_mesh


def parts(run: RunConfig):
  """Returns functions by name and their arguments: SwiGLU, and the head with its cross-entropy."""
  cfg, rng = run.model.decoder, np.random.default_rng(0)
  shape = (run.data.batch_size, run.data.seq_len)
  x = jnp.asarray(rng.standard_normal((*shape, cfg.width)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, cfg.vocab_size, shape))
  swiglu = decoder.SwiGLU(jax.random.key(0), cfg, 0.02)
  head = jnp.asarray(rng.standard_normal((cfg.vocab_size, cfg.width)), jnp.float32)

  def feed_forward(swiglu, x):
    return jnp.sum(swiglu(x) ** 2)

  def predict(head, x):
    logits = decoder.multiply("bsd,vd->bsv", x, head)
    is_target = jnp.arange(cfg.vocab_size)[None, None] == targets[..., None]
    right = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - right)

  return {"SwiGLU": (feed_forward, swiglu, x), "head and cross-entropy": (predict, head, x)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  run = RunConfig.from_dict(mm1_debug.get_config().to_dict())
  print("| forward and backward | einsum, ms | two dims, ms | ratio |\n|---|---|---|---|")
  with jax.set_mesh(make_mesh(run)):
    for name, (function, *arguments) in parts(run).items():
      grad = jax.grad(function, argnums=(0, 1))
      flat = jax.jit(grad).lower(*arguments).compile()
      with mock.patch.object(decoder, "multiply", jnp.einsum):
        plain = jax.jit(lambda *args, grad=grad: grad(*args)).lower(*arguments).compile()
      calls = {
        "einsum": lambda p=plain, a=arguments: p(*a),
        "flat": lambda f=flat, a=arguments: f(*a),
      }
      times = fastest(calls, args.repeats)
      before, after = times["einsum"], times["flat"]
      print(
        f"| {name} | {1e3 * before:.0f} | {1e3 * after:.0f} | {before / after:.2f} |", flush=True
      )


if __name__ == "__main__":
  main()
