# SPDX-License-Identifier: Apache-2.0
"""The peer of our train step, as a `workers.Worker`: `python -m bench.peer.torch_peer FOLDER`.

PyTorch with transformers' CLIP vision tower and Llama, of the widths, depths, rows and pictures of
a run, put together as LLaVA does: patches are averaged on the token grid and projected by two
layers (less work than a C-Abstractor), and take the places of their placeholders. Examples of a
packed row do not attend to each other; where layers are sparse, they are transformers' Mixtral
blocks. The step is cross-entropy over the targets, gradients, clipping, and the fused AdamW.
"""

import argparse
import json
import pathlib
import resource
import time
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import (
  CLIPVisionConfig,
  CLIPVisionModel,
  LlamaConfig,
  LlamaForCausalLM,
  MixtralConfig,
)
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

from bench.peer.workers import answer

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))


class Peer(nn.Module):
  """CLIP's vision tower, a projector, and Llama, of the shapes of a run (`RunConfig.to_dict()`)."""

  def __init__(self, run: dict[str, Any]):
    super().__init__()
    vision, connector, decoder = (run["model"][k] for k in ("vision", "connector", "decoder"))
    self.image_token = run["model"]["image_token_id"]
    self.patches = [side // vision["patch_size"] for side in vision["image_size"]]
    self.grid = tuple(connector["token_grid"])
    self.vit = CLIPVisionModel(
      CLIPVisionConfig(
        hidden_size=vision["width"],
        intermediate_size=vision["mlp_dim"],
        num_hidden_layers=vision["depth"],
        num_attention_heads=vision["num_heads"],
        image_size=vision["image_size"][0],
        patch_size=vision["patch_size"],
        attn_implementation="sdpa",
      )
    )
    self.projector = nn.Sequential(
      nn.Linear(vision["width"], decoder["width"]),
      nn.GELU(),
      nn.Linear(decoder["width"], decoder["width"]),
    )
    shape = {
      "vocab_size": decoder["vocab_size"],
      "hidden_size": decoder["width"],
      "intermediate_size": decoder["mlp_dim"],
      "num_hidden_layers": decoder["depth"],
      "num_attention_heads": decoder["num_heads"],
      "num_key_value_heads": decoder["num_kv_heads"],
      "head_dim": decoder["head_dim"],
      "tie_word_embeddings": decoder["tie_embeddings"],
      "attn_implementation": "sdpa",
    }
    self.llm = LlamaForCausalLM(
      LlamaConfig(max_position_embeddings=run["data"]["seq_len"], **shape)
    )
    if moe := decoder["moe"]:
      sparse = MixtralConfig(
        num_local_experts=moe["num_experts"], num_experts_per_tok=moe["top_k"], **shape
      )
      for layer in self.llm.model.layers[moe["every"] - 1 :: moe["every"]]:
        layer.mlp = MixtralSparseMoeBlock(sparse)

  def embed(self, tokens, images, image_mask):
    text = self.llm.model.embed_tokens(tokens)
    pixels = images[image_mask].permute(0, 3, 1, 2).float() / 255  # of the real pictures only
    shape = (1, 3, 1, 1)
    pixels = (pixels - MEAN.to(pixels).view(shape)) / STD.to(pixels).view(shape)
    features = self.vit(pixels.to(text.dtype)).last_hidden_state[:, 1:]
    features = features.transpose(1, 2).unflatten(2, self.patches)
    features = functional.adaptive_avg_pool2d(features, self.grid).flatten(2).transpose(1, 2)
    placeholder = (tokens == self.image_token)[..., None]
    return text.masked_scatter(placeholder, self.projector(features).to(text.dtype))

  def compile_blocks(self) -> None:
    """Compiles the layers, one program for all that are alike, and the loss.

    As one program, the model took PyTorch longer than two minutes. Experts stay as they are: how
    many rows each gets is known only as it runs.
    """
    for module in self.modules():
      if isinstance(module, MixtralExperts):
        module.forward = torch.compiler.disable(module.forward)
      elif isinstance(module, CLIPEncoderLayer | LlamaDecoderLayer):
        module.compile()
    self.loss = torch.compile(self.loss)

  def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the mean cross-entropy of the targets."""
    x = self.embed(batch["tokens"], batch["images"], batch["image_mask"])
    segments = batch["segment_ids"]
    mask = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
    positions = batch["positions"]
    hidden = self.llm.model(inputs_embeds=x, attention_mask=mask, position_ids=positions)
    return self.loss(hidden.last_hidden_state, batch["targets"], batch["loss_mask"])

  def loss(self, hidden, targets, weights) -> torch.Tensor:
    logits = self.llm.lm_head(hidden).float()
    nll = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (nll * weights.flatten()).sum() / weights.sum()


class Torch:
  """The train step on one batch."""

  def __init__(self, folder: pathlib.Path, device: str, dtype: str, compiled: bool):
    torch.manual_seed(0)
    run = json.loads((folder / "run.json").read_text())
    self._device = torch.device(device)
    # Float32 params, as ours; matrix products in the run's dtype.
    self._cast = torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")
    self._model = Peer(run).to(self._device)
    if compiled:
      self._model.compile_blocks()
    params = self._model.parameters()
    self._optimizer = torch.optim.AdamW(params, 1e-4, (0.9, 0.95), weight_decay=0.1, fused=True)
    with np.load(folder / "batch.npz") as arrays:
      self._batch = {name: torch.from_numpy(x).to(self._device) for name, x in arrays.items()}
    for name in ("tokens", "targets", "positions"):
      self._batch[name] = self._batch[name].long()

  def steps(self, num: int) -> dict[str, Any]:
    seconds, loss = [], 0.0
    for _ in range(num):
      begin = time.perf_counter()
      with self._cast:
        value = self._model(self._batch)
      value.backward()
      nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
      self._optimizer.step()
      self._optimizer.zero_grad(set_to_none=True)
      loss = value.item()  # waits for the step
      if self._device.type == "cuda":
        torch.cuda.synchronize()
      seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "loss": loss}

  def facts(self) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if self._device.type == "cuda":
      peak = torch.cuda.max_memory_allocated()
    return {
      "params": sum(p.numel() for p in self._model.parameters()),
      "peak_gib": peak / 2**30,
      "version": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--device", default="cpu")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--compile", action="store_true")
  args = parser.parse_args()
  peer = Torch(args.folder, args.device, args.dtype, args.compile)
  answer({"steps": peer.steps, "facts": peer.facts})


if __name__ == "__main__":
  main()
