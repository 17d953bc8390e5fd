# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of `Model.generate` beside transformers' `generate`, with the same weights.

  python -m bench.cpu.decode --size=85m --batch=1 --batch=8

The decoder of a size of configs/mm1_proxy.py with 4096 words, random float32 weights, greedy.
transformers' Llama gets the same weights, and its answers are compared with ours. Both read the
same random prompts and write the same number of tokens; nothing ends early. Rounds alternate
between the two; figures are medians of whole calls, prompts included. Needs the extra `convert`.
"""

import argparse
import statistics
import time

import jax
import numpy as np
import torch
import transformers
from mm1_jax.configs.common import SAMPLE

from mm1_jax.config import (
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  ModelConfig,
  RunConfig,
  VisionConfig,
)
from mm1_jax.configs import mm1_proxy
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import Request
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import make_mesh

WORDS = 4096


def run_config(size: str, seq_len: int) -> RunConfig:
  """Returns a run whose decoder is a proxy's; there are no pictures, so its encoder is small."""
  values = mm1_proxy.SIZES[size]
  decoder = DecoderConfig(
    vocab_size=WORDS,
    width=values["width"],
    depth=values["depth"],
    num_heads=values["heads"],
    num_kv_heads=values["kv_heads"],
    head_dim=values["width"] // values["heads"],
    mlp_dim=values["mlp_dim"],
    tie_embeddings=False,
  )
  vision = VisionConfig(width=32, depth=1, num_heads=1, mlp_dim=32)
  model = ModelConfig(
    vision, ConnectorConfig("average_pool", token_grid=(1, 1)), decoder, dtype="float32"
  )
  data = DataConfig(tokenizer=str(SAMPLE / "tokenizer.model"), seq_len=seq_len, batch_size=1)
  return RunConfig(name=size, model=model, data=data)


def ours(run: RunConfig) -> Model:
  mesh = make_mesh(run, jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = jax.jit(lambda: MM1(jax.random.key(0), run.model))()
  return Model(params, run, mesh)


def llama(params: MM1, cfg: DecoderConfig) -> transformers.LlamaForCausalLM:
  """Returns transformers' Llama with our weights."""
  peer = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=cfg.vocab_size,
      hidden_size=cfg.width,
      intermediate_size=cfg.mlp_dim,
      num_hidden_layers=cfg.depth,
      num_attention_heads=cfg.num_heads,
      num_key_value_heads=cfg.num_kv_heads,
      rms_norm_eps=cfg.norm_eps,
      rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
      attn_implementation="sdpa",
    )
  ).eval()
  decoder = params.decoder
  layer = decoder.units.layers[0]

  def rows(weight, i: int) -> np.ndarray:  # [in, out...] -> [out, in]
    return np.asarray(weight[...][i]).reshape(weight.shape[1], -1).T

  weights = {
    "model.embed_tokens.weight": decoder.embedding[...],
    "model.norm.weight": decoder.norm.scale[...],
    "lm_head.weight": decoder.head[...],
  }
  for i in range(cfg.depth):
    out = np.asarray(layer.attention.out[...][i])  # [H, h, D]
    weights |= {
      f"model.layers.{i}.{name}": value
      for name, value in {
        "input_layernorm.weight": layer.attention_norm.scale[...][i],
        "self_attn.q_proj.weight": rows(layer.attention.query, i),
        "self_attn.k_proj.weight": rows(layer.attention.key, i),
        "self_attn.v_proj.weight": rows(layer.attention.value, i),
        "self_attn.o_proj.weight": out.reshape(-1, out.shape[-1]).T,
        "post_attention_layernorm.weight": layer.mlp_norm.scale[...][i],
        "mlp.gate_proj.weight": rows(layer.mlp.gate, i),
        "mlp.up_proj.weight": rows(layer.mlp.up, i),
        "mlp.down_proj.weight": rows(layer.mlp.down, i),
      }.items()
    }
  tensors = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
  peer.load_state_dict(tensors)  # strict: no weight is left out
  return peer


class Race:
  """The same prompts for both."""

  def __init__(self, size: str, *, prompt: int, new: int):
    self.new = new
    self.run = run_config(size, prompt + new)
    self.model = ours(self.run)
    self.peer = llama(self.model.params, self.run.model.decoder)
    self.prompt = prompt

  def prompts(self, batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(300, WORDS, (batch, self.prompt))

  def answer(self, batch: int) -> list[str]:
    requests = [Request(ids.tolist(), [], chat=False) for ids in self.prompts(batch)]
    return self.model.generate(requests, max_new_tokens=self.new, batch_size=batch)

  def peer_answer(self, batch: int) -> list[str]:
    ids = torch.from_numpy(self.prompts(batch))
    # Ours draws no symbols but the end; neither does the peer.
    barred = np.flatnonzero(~self.model.answers.allowed).tolist()
    with torch.inference_mode():
      out = self.peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=self.new,
        do_sample=False,
        suppress_tokens=barred,
        eos_token_id=None,
        pad_token_id=0,
      )
    new = out[:, self.prompt :]
    assert new.shape[1] == self.new
    return [self.model.tokenizer.decode(row) for row in new.tolist()]


def seconds(answer, batch: int) -> float:
  start = time.perf_counter()
  answer(batch)
  return time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--size", choices=mm1_proxy.SIZES, default="85m")
  parser.add_argument("--batch", type=int, action="append", help="may be repeated (1 and 8)")
  parser.add_argument("--prompt", type=int, default=128, help="tokens")
  parser.add_argument("--new", type=int, default=64, help="tokens")
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  race = Race(args.size, prompt=args.prompt, new=args.new)
  print(
    f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
    f"transformers {transformers.__version__}; {args}"
  )
  for batch in args.batch or [1, 8]:
    # Both compile or warm up here.
    same = [a == b for a, b in zip(race.answer(batch), race.peer_answer(batch), strict=True)]
    rounds = [
      (seconds(race.answer, batch), seconds(race.peer_answer, batch)) for _ in range(args.rounds)
    ]
    mine, theirs = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratio = statistics.median(peer / our for our, peer in rounds)
    tokens = batch * args.new
    print(
      f"{args.size}, batch {batch}: ours {tokens / mine:.1f} tokens/s, transformers "
      f"{tokens / theirs:.1f}, ratio {ratio:.2f}; {sum(same)} of {batch} answers equal"
    )


if __name__ == "__main__":
  main()
