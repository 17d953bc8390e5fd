# SPDX-License-Identifier: Apache-2.0
"""Writes convert/FAMILY/: tiny weights as other libraries save them, and what these make of them.

`tests/convert/families_test.py` imports the folders and compares. The references are `transformers`
and `open_clip`, run in PyTorch, float32. Tests and CI read the files only; to add a family:

  python3 -m venv /tmp/torchenv
  /tmp/torchenv/bin/pip install -c constraints.txt torch transformers
  /tmp/torchenv/bin/pip install --no-deps timm==1.0.31 open_clip_torch==3.3.0 ftfy wcwidth regex
  /tmp/torchenv/bin/python tests/goldens/make_convert.py

Weights are float16, which their values fit exactly. expected.npz holds the inputs and the outputs:
for a decoder `tokens` and every sixth position's `logits`; for an encoder `images`, uint8, and
`features` at the layers -1 and -2, and in open_clip's case on a larger picture, with its own
resize of the positions.
"""

import json
import pathlib
import shutil
import sys

import make_parity
import numpy as np
import PIL.Image
import torch
import transformers
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent / "convert"
SIDE, PATCH, WIDTH, DEPTH = 16, 4, 32, 3
EVERY = 6  # positions of which one has its logits kept
VOCAB = 83  # odd, so that the embedding has to grow
BASE = {
  "vocab_size": VOCAB,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "intermediate_size": 40,
  "max_position_embeddings": 4096,
  "rms_norm_eps": 1e-5,
  "tie_word_embeddings": False,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 2000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}


def save(name: str, model, **expected: np.ndarray) -> None:
  folder = FOLDER / name
  shutil.rmtree(folder, ignore_errors=True)
  model.half().save_pretrained(folder, max_shard_size="30KB" if name == "mixtral" else "1GB")
  (folder / "generation_config.json").unlink(missing_ok=True)
  np.savez_compressed(folder / "expected.npz", **expected)
  size = sum(file.stat().st_size for file in folder.iterdir()) / 1024
  print(f"{name}: {size:.0f} KiB")


def decoder(name: str, kind: str, **extra) -> None:
  """Logits of two texts; long enough for scaled RoPE to matter."""
  settings = BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 2000.0}} | extra
  config = getattr(transformers, f"{kind}Config")(**settings)
  model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
  make_parity.randomise(model, seed=1)
  tokens = np.random.default_rng(2).integers(0, VOCAB, (2, 96))
  with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits[:, ::EVERY].numpy()
  save(name, model, tokens=tokens.astype(np.int32), logits=logits)


def pictures(side: int) -> np.ndarray:
  """Returns two real pictures, uint8[2, side, side, 3], from matplotlib's sample of one."""
  from matplotlib import cbook

  with cbook.get_sample_data("grace_hopper.jpg") as file, PIL.Image.open(file) as image:
    boxes = ((0, 0, 400, 400), (100, 150, 400, 450))
    return np.stack([np.asarray(image.resize((side, side), box=box)) for box in boxes])


def encoder(name: str, model, tower, mean, std) -> None:
  """Patch features of `tower`, which may be a part of the `model` that is saved."""
  make_parity.randomise(tower, seed=3)
  images = pictures(SIDE)
  pixels = (torch.tensor(images).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
  with torch.no_grad():
    states = tower(pixels.permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
  patches = (SIDE // PATCH) ** 2
  features = {f"features{i}": states[i][:, -patches:].numpy() for i in (-1, -2)}
  save(name, model, images=images, **features)


VISION = {
  "hidden_size": WIDTH,
  "num_hidden_layers": DEPTH,
  "num_attention_heads": 2,
  "intermediate_size": 48,
  "image_size": SIDE,
  "patch_size": PATCH,
}


def hf_clip() -> None:
  """OpenAI's L/14 in small: a whole CLIP, of which only the vision tower is of use."""
  text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1} | {
    "intermediate_size": 8,
    "vocab_size": 10,
    "max_position_embeddings": 4,
  }
  config = transformers.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=8)
  model = transformers.CLIPModel(config).eval()
  mean, std = make_parity.PIXEL_MEAN, make_parity.PIXEL_STD
  encoder("clip", model, model.vision_model, mean, std)


def siglip() -> None:
  model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)).eval()
  encoder("siglip", model, model, (0.5,) * 3, (0.5,) * 3)


def open_clip_vit() -> None:
  """DFN's ViT-H/14-378-quickgelu in small, also on a picture larger than it was made for."""
  sys.meta_path.insert(0, make_parity.TorchvisionStub())
  import open_clip.model
  import open_clip.pos_embed as pos_embed  # noqa: F401, where older versions keep the resize

  vision = {"image_size": SIDE, "layers": DEPTH, "width": WIDTH, "head_width": 16} | {
    "patch_size": PATCH,
    "mlp_ratio": 1.5,
  }
  config = {"embed_dim": 8, "quick_gelu": True, "vision_cfg": vision}
  model = open_clip.model.CLIP(
    8,
    open_clip.model.CLIPVisionCfg(**vision),
    open_clip.model.CLIPTextCfg(context_length=4, vocab_size=10, width=8, heads=1, layers=1),
    quick_gelu=True,
  ).eval()
  make_parity.randomise(model.visual, seed=4)
  expected = {}
  for side, key in ((SIDE, ""), (24, "_large")):
    images = pictures(side)
    expected[f"images{key}"] = images
    pixels = torch.tensor(images).float() / 255
    pixels = (pixels - torch.tensor(make_parity.PIXEL_MEAN)) / torch.tensor(make_parity.PIXEL_STD)
    visual = model.visual
    grid = side // PATCH
    table = visual.positional_embedding.data
    old = table[1:].reshape(1, SIDE // PATCH, SIDE // PATCH, -1).permute(0, 3, 1, 2)
    # As open_clip.model.resize_pos_embed does it.
    new = torch.nn.functional.interpolate(old, size=(grid, grid), mode="bicubic", antialias=True)
    with torch.no_grad():
      visual.positional_embedding.data = torch.cat([table[:1], new[0].flatten(1).T])
      x = visual._embeds(pixels.permute(0, 3, 1, 2))
      states = [x]
      for block in visual.transformer.resblocks:
        states.append(block(states[-1]))
      visual.positional_embedding.data = table
    for layer in (-1, -2):
      expected[f"features{layer}{key}"] = states[layer][:, 1:].numpy()
  folder = FOLDER / "open_clip"
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  weights = {name: value.contiguous() for name, value in model.half().state_dict().items()}
  save_file(weights, folder / "open_clip_model.safetensors")
  (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}, indent=2) + "\n")
  np.savez_compressed(folder / "expected.npz", **expected)


def main() -> None:
  decoder("llama2", "Llama", tie_word_embeddings=True)
  decoder("llama3", "Llama", rope_parameters=LLAMA3)
  decoder("llama_one_kv_head", "Llama", num_key_value_heads=1)
  decoder("mistral", "Mistral", sliding_window=None)
  decoder("qwen2", "Qwen2")
  decoder("qwen3", "Qwen3", head_dim=12, rms_norm_eps=1e-6)
  decoder("mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2)
  experts = {
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
  }
  decoder("qwen3_moe", "Qwen3Moe", num_experts_per_tok=2, norm_topk_prob=True, **experts)
  decoder("qwen3_moe_top_1", "Qwen3Moe", num_experts_per_tok=1, norm_topk_prob=False, **experts)
  hf_clip()
  siglip()
  open_clip_vit()


if __name__ == "__main__":
  main()
