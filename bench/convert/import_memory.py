# SPDX-License-Identifier: Apache-2.0
"""Host memory and time of importing a decoder onto 8 devices.

  python -m bench.convert.import_memory --size=7b --work=/tmp/import_memory

A Llama of random bfloat16 weights is written in several shards, and imported in a process of its
own, whose peak of resident memory is told. The devices are fake ones of this CPU, so the model
itself is in that memory, too; what is beyond it, and beyond what the process had before, is what
importing takes on a host. Pages of the files count, though the system may drop them.
"""

import argparse
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
import psutil
from safetensors.numpy import save_file

SIZES = {  # width, depth, heads, kv heads, mlp, vocabulary
  "1b": (2048, 22, 32, 4, 5632, 32000),  # TinyLlama
  "3b": (3200, 26, 32, 32, 8640, 32000),  # OpenLLaMA
  "7b": (4096, 32, 32, 32, 11008, 32000),  # Llama 2
}
DEVICES = 8
SHARDS = 4


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--size", choices=tuple(SIZES), default="7b")
  parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the weights")
  parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  folder = args.work / args.size
  if args.measure:
    measure(folder)
    return
  if not folder.exists():
    write_weights(folder, *SIZES[args.size])
  flags = f"--xla_force_host_platform_device_count={DEVICES}"
  command = [sys.executable, "-m", "bench.convert.import_memory", "--measure"]
  command += [f"--size={args.size}", f"--work={args.work}"]
  subprocess.run(
    command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  )


def write_weights(folder: pathlib.Path, width, depth, heads, kv_heads, mlp, vocab) -> None:
  """Writes config and shards; numbers repeat, so that they are quickly made."""
  folder.mkdir(parents=True)
  head_dim = width // heads
  config = {
    "model_type": "llama",
    "hidden_size": width,
    "num_hidden_layers": depth,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "head_dim": head_dim,
    "intermediate_size": mlp,
    "vocab_size": vocab,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
  }
  (folder / "config.json").write_text(json.dumps(config))
  shapes = {"model.embed_tokens.weight": (vocab, width)}
  for i in range(depth):
    at = f"model.layers.{i}"
    shapes |= {
      f"{at}.input_layernorm.weight": (width,),
      f"{at}.self_attn.q_proj.weight": (width, width),
      f"{at}.self_attn.k_proj.weight": (kv_heads * head_dim, width),
      f"{at}.self_attn.v_proj.weight": (kv_heads * head_dim, width),
      f"{at}.self_attn.o_proj.weight": (width, width),
      f"{at}.post_attention_layernorm.weight": (width,),
      f"{at}.mlp.gate_proj.weight": (mlp, width),
      f"{at}.mlp.up_proj.weight": (mlp, width),
      f"{at}.mlp.down_proj.weight": (width, mlp),
    }
  shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
  noise = 0.02 * np.random.default_rng(0).standard_normal(1 << 20)
  noise = noise.astype(ml_dtypes.bfloat16)
  limit, shard, held, places = 2 * sum(map(math.prod, shapes.values())) / SHARDS, 1, {}, {}
  for name, shape in shapes.items():
    held[name] = np.resize(noise, shape)
    last = name == "lm_head.weight"
    if last or sum(x.nbytes for x in held.values()) >= limit:
      file = f"model-{shard:05d}.safetensors"
      save_file(held, folder / file)
      places |= dict.fromkeys(held, file)
      shard, held = shard + 1, {}
  index = {"metadata": {}, "weight_map": places}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def measure(folder: pathlib.Path) -> None:
  """Imports, and prints what it took."""
  import jax
  import jax.numpy as jnp

  from mm1_jax.convert import importer

  importer._vocabulary = lambda *_: None  # the weights have no tokenizer
  jnp.zeros(8).block_until_ready()
  process = psutil.Process()
  before, peak, done = process.memory_info().rss, 0, threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.02):
      peak = max(peak, process.memory_info().rss)

  threading.Thread(target=watch, daemon=True).start()
  start, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
  imported = importer.import_weights(decoder=folder, dtype="bfloat16")
  jax.block_until_ready(imported.params)
  seconds, cpu = time.perf_counter() - start, sum(process.cpu_times()[:2]) - cpu
  done.set()
  # What came and went between two looks of the thread.
  peak = max(peak, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
  size = sum(x.nbytes for x in imported.params.values())
  largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
  beyond = peak - before - size
  print(
    f"{folder.name}: {size / 1e9:.2f} GB on {jax.device_count()} devices, largest shard "
    f"{largest / 1e9:.2f} GB; peak beyond the model {beyond / 1e9:.2f} GB = "
    f"{beyond / largest:.2f} x the largest shard; {seconds / size * 1e9:.1f} s a GB "
    f"({cpu / size * 1e9:.1f} s of CPU)"
  )


if __name__ == "__main__":
  main()
