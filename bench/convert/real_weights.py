# SPDX-License-Identifier: Apache-2.0
"""Imported open weights beside transformers: an answer, and perplexity, also in int8 and int4.

  python -m bench.convert.real_weights --weights=FOLDER --work=/tmp/real
  python -m bench.convert.real_weights --weights=SmolLM2-135M-Instruct.Q4_1.gguf --work=/tmp/real

FOLDER is a `transformers` folder. A .gguf is made one first, by transformers (which needs `gguf`).
A `model_int8.safetensors` in it, of NAME_q, NAME_zp and NAME_scale, is dequantised first: W = (q -
zp) scale. The text is the shipped sample's, held out. Needs the extras `convert` and `quant`.
"""

import argparse
import json
import math
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from mm1_jax import cli
from mm1_jax.config import SourceConfig
from mm1_jax.configs import common
from mm1_jax.convert import importer
from mm1_jax.data.sources import Source
from mm1_jax.inference.model import Model

QUESTION = "What is the capital of France?"
BYTES = 50_000
WINDOW, ROWS = 256, 4  # tokens that are seen at once, and windows
# An encoder has to be there for a whole model; texts do not use it.
ENCODER = pathlib.Path(__file__).parents[2] / "tests" / "goldens" / "convert" / "clip"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--weights", type=pathlib.Path, required=True)
  parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for what is made")
  args = parser.parse_args()
  work = args.work / args.weights.stem
  folder = to_folder(args.weights, work / "hf")
  if not (work / "run").exists():
    write_run(folder, work / "run")
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  words = held_out_words(tokenizer)
  vocab_size = reference.config.vocab_size
  print(f"{args.weights.name}: {words.size} tokens of {BYTES / 1e3:.0f} KB held-out text")
  theirs = reference_nll(reference, words)
  print("| | nats a token | perplexity | to transformers | GB of blocks | answer |")
  print("|---|---|---|---|---|---|")
  print(
    f"| transformers float32 | {theirs:.5f} | {math.exp(theirs):.3f} | | | "
    f"{reference_answer(reference, tokenizer)} |"
  )
  for kind in (None, "int8", "int4"):
    start = time.perf_counter()
    model = Model.load(work / "run", quantize=kind)
    nll = our_nll(model, words, vocab_size)
    (answer,) = model.generate([[QUESTION]], max_new_tokens=24)
    ratio = math.exp(nll - theirs) - 1
    print(
      f"| ours {kind or 'float32'} | {nll:.5f} | {math.exp(nll):.3f} | {ratio:+.1e} | "
      f"{gigabytes(model):.3f} | {answer} |  ({time.perf_counter() - start:.0f} s)",
      flush=True,
    )


def to_folder(weights: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
  """Returns a folder with weights in float32 as `transformers` saves them."""
  if out.exists():
    return out
  if weights.suffix == ".gguf":
    where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    plain = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
      **where, dtype=torch.float32, quantization_config=plain
    )
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(out)
  elif (weights / "model_int8.safetensors").exists():
    shutil.copytree(weights, out, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in [out, *out.iterdir()]:
      path.chmod(0o755 if path.is_dir() else 0o644)
    save_file(
      dequantize(load_file(weights / "model_int8.safetensors")),
      out / "model.safetensors",
      metadata={"format": "pt"},
    )
  else:
    return weights
  return out


def dequantize(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns W = (q - zp) scale, without a head that is tied."""
  made = {}
  for name, value in tensors.items():
    if name.startswith("lm_head."):
      continue
    if name.endswith("_q"):
      base = name.removesuffix("_q")
      made[base] = (value.astype(np.float32) - tensors[f"{base}_zp"]) * tensors[f"{base}_scale"]
    elif not name.endswith(("_zp", "_scale")):
      made[name] = value
  return {name: np.ascontiguousarray(x, np.float32) for name, x in made.items()}


def write_run(folder: pathlib.Path, out: pathlib.Path) -> None:
  """Imports the decoder, and describes it as one that converses in ChatML."""
  imported = importer.import_weights(vit=ENCODER, decoder=folder, fill=True)
  importer.write(imported, out)
  config = json.loads((out / "config.json").read_text())
  config["model"].update(dtype="float32", remat="none")
  config["data"].update(chat=True, chat_template="chatml", seq_len=512)
  (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def held_out_words(tokenizer) -> np.ndarray:
  """Returns int32[windows, WINDOW] of the sample's held-out text."""
  source = Source(SourceConfig("text", f"{common.SAMPLE}/text-heldout-*.arrayrecord"))
  text = ""
  for i in range(len(source)):
    text += "".join(item["text"] for item in source[i]["content"] if "text" in item) + "\n\n"
    if len(text.encode()) >= BYTES:
      break
  text = text.encode()[:BYTES].decode(errors="ignore")
  ids = tokenizer(text, add_special_tokens=False)["input_ids"]
  return np.array(ids[: len(ids) // WINDOW * WINDOW], np.int32).reshape(-1, WINDOW)


def reference_nll(model, words: np.ndarray) -> float:
  total = 0.0
  with torch.no_grad():
    for start in range(0, len(words), ROWS):
      rows = torch.tensor(words[start : start + ROWS], dtype=torch.long)
      logits = model(rows).logits[:, :-1].double()
      total += torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
      ).item()
  return total / (len(words) * (WINDOW - 1))


def our_nll(model: Model, words: np.ndarray, vocab_size: int) -> float:
  """Returns nats per token over the words that the weights came with."""

  @jax.jit
  def nll(decoder, tokens):
    positions = jnp.broadcast_to(jnp.arange(WINDOW)[None], tokens.shape)
    hidden = decoder(decoder.embed(tokens), positions, jnp.ones_like(tokens)).hidden
    logits = jax.nn.log_softmax(decoder.logits(hidden)[:, :-1, :vocab_size])
    target = jax.nn.one_hot(tokens[:, 1:], vocab_size)
    return -jnp.sum(logits * target)

  total = 0.0
  with jax.set_mesh(model.mesh):
    for start in range(0, len(words), ROWS):
      rows = words[start : start + ROWS]
      total += float(nll(model.params.decoder, rows))
  return total / (len(words) * (WINDOW - 1))


def reference_answer(model, tokenizer) -> str:
  text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
  ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
  with torch.no_grad():
    out = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
  return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def gigabytes(model: Model) -> float:
  """Returns what the decoder's blocks take, int4 at half a byte."""
  leaves = jax.tree.leaves(model.params.decoder.units)
  bits = [4 if x.dtype.name == "int4" else 8 * x.dtype.itemsize for x in leaves]
  return sum(x.size * b for x, b in zip(leaves, bits, strict=True)) / 8e9


if __name__ == "__main__":
  cli.run(main)
