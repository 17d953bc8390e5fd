# SPDX-License-Identifier: Apache-2.0
"""Writes parity/*.npz: tiny random weights, inputs, and what other people's code makes of them.

`tests/models/parity_test.py` loads the weights into our modules and compares. The references are
`transformers` (CLIP, Llama, Qwen3, Mixtral) and `timm` (the RegNet stages of Honeybee's
C-Abstractor), run in PyTorch. Tests and CI read the files only; run this again to add a case:

  python3 -m venv /tmp/torchenv
  /tmp/torchenv/bin/pip install torch==2.13.0 numpy pillow transformers==5.23.0
  /tmp/torchenv/bin/pip install --no-deps timm==1.0.31 huggingface_hub safetensors
  /tmp/torchenv/bin/python tests/goldens/make_parity.py

A file holds `weights/NAME` by the reference's own in-memory names (float16, which the values fit
exactly), the inputs and the expected outputs (float32), and `config`, the sizes as JSON.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import pathlib
import sys
import types

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "parity"
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class Anything(type):
  """The type of classes in which every attribute is another such class."""

  def __getattr__(cls, name: str):
    if name.startswith("__"):
      raise AttributeError(name)
    return Anything(name, (), {})


class TorchvisionStub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Lets timm be imported where torchvision does not install; RegNet uses nothing of it."""

  def find_spec(self, fullname, path, target=None):
    if fullname.split(".")[0] == "torchvision":
      return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
    return None

  def create_module(self, spec):
    module = types.ModuleType(spec.name)
    module.__getattr__ = functools.partial(getattr, Anything("anything", (), {}))
    return module

  def exec_module(self, module):
    pass


def randomise(module: torch.nn.Module, seed: int) -> None:
  """Draws every param, norms and biases too: at their initial 1 and 0 they would hide mistakes."""
  generator = torch.Generator().manual_seed(seed)
  for name, param in module.named_parameters():
    noise = torch.randn(param.shape, generator=generator)
    if param.ndim == 1:
      is_scale = name.endswith("weight")
      value = 1 + 0.3 * noise if is_scale else 0.3 * noise
    elif "embed" in name:
      # Small, so that the first norm's epsilon shows.
      value = noise * (0.01 if "patch" in name else 0.05)
    elif ".conv." in name:
      value = noise * 0.02  # Honeybee's; a norm follows each
    elif name == "pos_emb":
      value = noise
    else:
      # Stacked experts are [E, out, in].
      value = noise * param.shape[-1 if "experts" in name else 1] ** -0.5
    param.data = value.half().float()


def save(name: str, module: torch.nn.Module, config: dict, **arrays: np.ndarray) -> None:
  weights = {
    f"weights/{key}": value.detach().numpy().astype(np.float16)
    for key, value in module.state_dict().items()
    if value.dtype == torch.float32
  }
  path = FOLDER / f"{name}.npz"
  np.savez_compressed(path, config=np.array(json.dumps(config)), **weights, **arrays)
  print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


def clip(name: str, activation: str) -> None:
  """CLIP's vision tower; patch features of the last two layers, class token dropped."""
  config = {"width": 32, "depth": 3, "num_heads": 2, "mlp_dim": 48, "patch_size": 4, "side": 16}
  model = transformers.CLIPVisionModel(
    transformers.CLIPVisionConfig(
      hidden_size=config["width"],
      num_hidden_layers=config["depth"],
      num_attention_heads=config["num_heads"],
      intermediate_size=config["mlp_dim"],
      patch_size=config["patch_size"],
      image_size=config["side"],
      hidden_act=activation,
    )
  ).eval()
  randomise(model, seed=1)
  images = np.random.default_rng(2).integers(0, 256, (2, 16, 16, 3), np.uint8)
  pixels = (torch.tensor(images).float() / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
  with torch.no_grad():
    states = model(pixels.permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
  assert len(states) == config["depth"] + 1
  features = {f"features{i}": states[i][:, 1:].reshape(2, 4, 4, -1).numpy() for i in (-1, -2)}
  save(name, model, config | {"activation": activation}, images=images, **features)


class CAbstractor(torch.nn.Module):
  """Honeybee's (honeybee/projectors/projectors.py): timm stages around an adaptive pool."""

  def __init__(self, grid, tokens, in_dim: int, hidden: int, out_dim: int, depth: int):
    from timm.layers import LayerNorm2d
    from timm.models.regnet import RegStage

    super().__init__()

    def stage(in_chs: int) -> torch.nn.Module:
      return RegStage(
        depth,
        in_chs,
        hidden,
        stride=1,
        dilation=1,
        act_layer=torch.nn.SiLU,
        norm_layer=LayerNorm2d,
      )

    self.grid = grid
    self.pos_emb = torch.nn.Parameter(torch.zeros(1, grid[0] * grid[1], in_dim))
    pool = torch.nn.AdaptiveAvgPool2d(tokens)
    self.net = torch.nn.Sequential(stage(in_dim), pool, stage(hidden))
    self.readout = torch.nn.Sequential(
      torch.nn.Linear(hidden, out_dim), torch.nn.SiLU(), torch.nn.Linear(out_dim, out_dim)
    )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = x + self.pos_emb
    x = x.transpose(1, 2).reshape(x.shape[0], -1, *self.grid)
    return self.readout(self.net(x).flatten(2).transpose(1, 2))


def c_abstractor(name: str, *, in_dim: int, hidden: int, depth: int) -> None:
  """Bins overlap in one direction and differ in size in the other: 7 -> 3, 5 -> 2."""
  config = {"grid": (7, 5), "tokens": (3, 2), "in_dim": in_dim, "hidden": hidden, "out_dim": 20}
  module = CAbstractor(depth=depth, **config).eval()
  randomise(module, seed=3)
  patches = np.random.default_rng(4).standard_normal((2, 35, in_dim), np.float32)
  with torch.no_grad():
    tokens = module(torch.tensor(patches)).numpy()
  save(name, module, config | {"depth": depth}, patches=patches, tokens_out=tokens)


def decoder(name: str, model_class: type, config_class: type, **extra) -> None:
  """Logits of two prompts."""
  config = {
    "vocab_size": 80,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
  } | extra
  theta = 2000.0
  model = model_class(
    config_class(
      **config,
      rope_parameters={"rope_type": "default", "rope_theta": theta},
      bos_token_id=1,
      eos_token_id=2,
      pad_token_id=0,
    )
  ).eval()
  randomise(model, seed=5)
  tokens = np.random.default_rng(6).integers(0, 80, (2, 16))
  with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits.numpy()
  save(name, model, config | {"rope_theta": theta}, tokens=tokens.astype(np.int32), logits=logits)


def main() -> None:
  sys.meta_path.insert(0, TorchvisionStub())
  FOLDER.mkdir(exist_ok=True)
  clip("clip_quick_gelu", "quick_gelu")
  clip("clip_gelu", "gelu")
  c_abstractor("c_abstractor", in_dim=24, hidden=16, depth=2)
  c_abstractor("c_abstractor_equal_width", in_dim=16, hidden=16, depth=1)
  llama = transformers.LlamaForCausalLM, transformers.LlamaConfig
  decoder("llama", *llama)
  decoder("llama_one_kv_head", *llama, num_key_value_heads=1)
  decoder(
    "qwen3",
    transformers.Qwen3ForCausalLM,
    transformers.Qwen3Config,
    head_dim=12,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
  )
  decoder(
    "mixtral",
    transformers.MixtralForCausalLM,
    transformers.MixtralConfig,
    num_local_experts=4,
    num_experts_per_tok=2,
    tie_word_embeddings=False,
  )


if __name__ == "__main__":
  main()
