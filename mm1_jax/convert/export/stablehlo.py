# SPDX-License-Identifier: Apache-2.0
"""Programs of `jax.export` and their params, which need JAX alone: `--format=stablehlo`.

The folder needs nothing of this package:

  programs/prefill_S_N.PLATFORM  reads a prompt of up to S positions with up to N pictures
  programs/decode.PLATFORM       reads one more token
  model.safetensors              the programs' first argument, arrays by name; or shards of it
  program.json                   the text around a question, and the shapes above
  run.py, pictures.py            answers about pictures
  requirements.txt               what that needs
  tokenizer.*

  prefill(params, tokens int32[1, S], images uint8[1, N, H, W, 3], length int32)
    -> logits float32[V] of what comes after the first `length` tokens, cache
  decode(params, token int32, length int32, cache) -> logits float32[V], cache

The cache has room for the positions that the model was trained on; `length` of them are filled.
Tokens that are never generated, such as a picture's placeholder, have logits of -inf.
PLATFORM is cpu, cuda or tpu; `jax.export.deserialize` reads the files.
"""

import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt8

from mm1_jax import checkpoint
from mm1_jax.convert import ConvertError
from mm1_jax.convert.export import card, shards, stablehlo_run
from mm1_jax.convert.export.format import ExportOptions
from mm1_jax.convert.export.huggingface import pictures_mm1
from mm1_jax.convert.export.run_reader import RunReader
from mm1_jax.convert.placement import params_mesh
from mm1_jax.convert.tensors import Tensors
from mm1_jax.models.decoder import KV, KVCache
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import LAYOUT

DTYPES: tuple[str, ...] = ("float32", "bfloat16")
PLATFORMS = ("cpu", "cuda", "tpu")
SHORTEST = 64  # positions of the shortest prefill, if the model has more
# Of the largest logit: what adding in another order may change. Measured: 1e-6 and 1e-2.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
NUM_DECODED = 3  # tokens of the comparison
WORD = 8  # positions
USE = """\
Programs of `jax.export` for CPU, CUDA and TPU, made by the version of JAX in `requirements.txt`;
nothing of mm1_jax is needed:

```
pip install -r requirements.txt
python run.py --image=photo.jpg --prompt="..."
```

`run.py` shows how the programs in `programs/` are called: prefill, then decode for each token.
"""
# Programs run for half a year in later versions of JAX, and in no earlier one.
REQUIREMENTS = ("flatbuffers", f"jax=={jax.__version__}", "numpy", "pillow", "safetensors")

Cache = list[tuple[Float[Array, "U 1 C K h"], Float[Array, "U 1 C K h"]]]


def check(reader: RunReader, options: ExportOptions) -> None:
  """Raises ConvertError if pictures are cut into sub-images, which run.py does not do."""
  if reader.run.data.tiling is not None:
    raise ConvertError(
      "the run cuts pictures into sub-images (data.tiling), which --format=stablehlo has not; "
      "--format=huggingface has."
    )


def write(reader: RunReader, out: pathlib.Path, options: ExportOptions) -> None:
  shards.write(_arrays(reader, options.dtype), out, options.max_shard_gb, {"format": "mm1_jax"})
  programs = Programs(reader, options.dtype)
  (out / "programs").mkdir()
  for name, program, args in programs.all():
    # Each platform on its own: what experts run on differs from one to the other.
    for platform in PLATFORMS:
      with jax.set_mesh(programs.mesh):
        exported = jax.export.export(jax.jit(program), platforms=(platform,))(*args)
      (out / "programs" / f"{name}.{platform}").write_bytes(bytes(exported.serialize()))
    logging.info("lowered %s", name)
  tokenizer = pathlib.Path(str(reader.run.data.tokenizer))
  own = "tokenizer.json" if tokenizer.suffix == ".json" else "tokenizer.model"
  (out / own).write_bytes(tokenizer.read_bytes())
  described = {
    "image_size": reader.run.model.vision.image_size,
    "image_fit": reader.run.data.image_fit,
    "max_pixels": reader.run.data.max_image_pixels,
    **programs.asked,
    "num_positions": programs.room,
    "prefill": programs.shapes,
    "tokenizer": own,
    "jax": jax.__version__,
  }
  (out / stablehlo_run.DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")
  library = "tokenizers" if own.endswith(".json") else "sentencepiece"
  (out / "requirements.txt").write_text("\n".join((*REQUIREMENTS, library)) + "\n")
  (out / card.NAME).write_text(card.text(reader, options, USE))
  # Beside each other, as files of no package.
  pictures = pictures_mm1.__name__
  program = pathlib.Path(stablehlo_run.__file__).read_text()
  (out / "run.py").write_text(program.replace(f"from {pictures} import", "from pictures import"))
  shutil.copyfile(str(pictures_mm1.__file__), out / "pictures.py")


def compare(reader: RunReader, out: pathlib.Path, options: ExportOptions) -> str:
  tensors = Tensors(out)
  for name, value in _arrays(reader, options.dtype):
    if not np.array_equal(tensors.read(name), value):
      raise ConvertError(f"'{out}': {name} is not what was written; is the disk full?")
  programs, exported = Programs(reader, options.dtype), stablehlo_run.Exported(out)
  model = programs.place(exported.params)
  words = sorted(set(range(reader.tokenizer.vocab_size)) - reader.tokenizer.special_ids)
  rng, worst = np.random.default_rng(0), 0.0
  for num_positions, num_images in programs.shapes:
    length = num_positions - NUM_DECODED
    ids = exported.prompt(num_images, "")
    ids += rng.choice(words, length - len(ids)).tolist()
    size = reader.run.model.vision.image_size
    images = rng.integers(0, 256, (num_images, *size, 3)).astype(np.uint8)
    extra = rng.choice(words, NUM_DECODED).tolist()
    theirs = list(exported.logits(ids, images, extra))
    ours = programs.logits(model, ids + extra, images)[len(ids) - 1 :]
    for a, b in zip(theirs, ours, strict=True):
      said = np.isfinite(a)
      worst = max(worst, float(np.abs(a - b)[said].max() / np.abs(b[said]).max()))
  if worst > TOLERANCE[reader.run.model.dtype]:
    raise ConvertError(
      f"'{out}': logits of the programs differ from the model's by {worst:.1e} of the largest."
    )
  return (
    f"params equal to the run's; {len(programs.shapes)} prefills and {NUM_DECODED} decoded tokens "
    f"of each on {jax.default_backend()}: logits differ by {worst:.1e} of the largest"
  )


class Programs:
  """The functions that are exported, and their arguments' shapes.

  Args:
    reader: of the run.
    dtype: of its params.
  """

  def __init__(self, reader: RunReader, dtype: str):
    self.run = reader.run
    self.mesh = params_mesh(reader.run, fsdp=1)
    self.abstract = reader.abstract(self.mesh, dtype)
    self._params = checkpoint.to_names(self.abstract)
    self.asked = _asked(reader)
    self._allowed = reader.answers().allowed
    self.shapes = _shapes(reader, len(self.asked["before"] + self.asked["after"]))

  def all(self) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Yields name, function and abstract arguments."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    params = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in self._params.items()}
    size = self.run.model.vision.image_size
    for num_positions, num_images in self.shapes:
      tokens = jax.ShapeDtypeStruct((1, num_positions), jnp.int32)
      images = jax.ShapeDtypeStruct((1, num_images, *size, 3), jnp.uint8)
      name = f"prefill_{num_positions}_{num_images}"
      yield name, self.prefill, (params, tokens, images, scalar)
    with jax.set_mesh(self.mesh):
      cache = jax.eval_shape(lambda: self.abstract.decoder.init_cache(1, self.room))
    kvs = [tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kv) for kv in cache.layers]
    yield "decode", self.decode, (params, scalar, scalar, kvs)

  @property
  def room(self) -> int:
    """Positions of the cache."""
    return self.run.data.seq_len

  def prefill(
    self,
    params: dict[str, jax.Array],
    tokens: Int[Array, "1 S"],
    images: UInt8[Array, "1 N H W 3"],
    length: Int[Array, ""],
  ) -> tuple[Float[Array, " V"], Cache]:
    model = self._model(params)
    positions = jnp.arange(tokens.shape[1])[None]
    segment_ids = (positions < length).astype(jnp.int32)
    tokens, images, positions, segment_ids = _rows(tokens, images, positions, segment_ids)
    cache = model.decoder.init_cache(1, self.room)
    out = model.prefill(tokens, images, positions, segment_ids, cache)
    last = jax.lax.dynamic_slice_in_dim(out.hidden, length - 1, 1, axis=1)
    return self._said(model, last), _pairs(out.cache)

  def decode(
    self,
    params: dict[str, jax.Array],
    token: Int[Array, ""],
    length: Int[Array, ""],
    cache: Cache,
  ) -> tuple[Float[Array, " V"], Cache]:
    model = self._model(params)
    # The padding after the prompt's end is written over.
    segment_ids = (jnp.arange(self.room)[None] < length).astype(jnp.int32)
    token, position, segment_ids = _rows(token.reshape(1, 1), length.reshape(1, 1), segment_ids)
    layers = [KV(*(jax.sharding.reshard(x, LAYOUT.cache_ubkch) for x in kv)) for kv in cache]
    out = model.decode(token, position, KVCache(layers, segment_ids, length))
    return self._said(model, out.hidden), _pairs(out.cache)

  def logits(self, model: MM1, ids: list[int], images: np.ndarray) -> Float[np.ndarray, "S V"]:
    """Returns the logits of all positions, without a cache."""

    @jax.jit
    def forward(model, tokens, images):
      positions, segment_ids = jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)
      tokens, images, positions, segment_ids = _rows(tokens, images, positions, segment_ids)
      hidden = model.embed(tokens, images)
      cache = model.decoder.init_cache(1, tokens.shape[1])  # so that no expert drops a token
      out = model.decoder(hidden, positions, segment_ids, cache)
      return model.decoder.logits(out.hidden)[0]

    with jax.set_mesh(self.mesh):
      return np.asarray(forward(model, np.array([ids], np.int32), images[None]))

  def place(self, params: dict[str, jax.Array]) -> MM1:
    """Returns the model of params that are on a device."""
    return checkpoint.from_names(
      self.abstract, {k: jax.device_put(x, self._params[k].sharding) for k, x in params.items()}
    )

  def _model(self, params: dict[str, jax.Array]) -> MM1:
    """Returns the model of params without a sharding, as the program's callers have no mesh."""
    placed = {
      name: jax.sharding.reshard(x, self._params[name].sharding.spec) for name, x in params.items()
    }
    return checkpoint.from_names(self.abstract, placed)

  def _said(self, model: MM1, hidden: Float[Array, "1 1 D"]) -> Float[Array, " V"]:
    logits = jax.sharding.reshard(model.decoder.logits(hidden)[0, 0], P())
    return jnp.where(self._allowed, logits, -jnp.inf)


def _rows(*arrays: jax.Array) -> list[jax.Array]:
  return [jax.sharding.reshard(x, LAYOUT.act_b) for x in arrays]


def _pairs(cache: KVCache | None) -> Cache:
  assert cache is not None
  return [
    (jax.sharding.reshard(kv.keys, P()), jax.sharding.reshard(kv.values, P()))
    for kv in cache.layers
  ]


def _shapes(reader: RunReader, num_around: int) -> list[tuple[int, int]]:
  """Returns positions and pictures of each prefill.

  Positions are all that the model was trained on, a quarter, a quarter of that, ...; pictures 0, 1,
  2, 4, ... up to those that a row had, as far as they fit with the text around them and a word.
  """
  data, shapes, positions = reader.run.data, [], reader.run.data.seq_len
  while positions >= min(SHORTEST, data.seq_len):
    num = 0
    while num * reader.run.image_positions + num_around + WORD <= positions:
      shapes.append((positions, num))
      if num >= data.images_per_row:
        break
      num = max(1, 2 * num)
    positions //= 4
  return sorted(shapes)


def _asked(reader: RunReader) -> dict[str, Any]:
  """Returns the ids around a question, and those that end its answer."""
  data, encoder, answers = reader.run.data, reader.encoder(), reader.answers()
  before, after, space = [reader.tokenizer.bos_id], [], ["", ""]
  if data.chat:
    # The ids around a question of a picture alone.
    ids = encoder.encode_prompt([{"role": "user", "content": [{"image": b""}]}]).ids
    start = ids.index(encoder.image_ids[0])
    before, after = ids[:start], ids[start + len(encoder.image_ids) :]
    turns = encoder.template.user, encoder.template.assistant
    space = [" " * part.before.endswith(" ") for part in turns]
  return {
    "image_ids": encoder.image_ids,
    "before": before,
    "after": after,
    "space_before_text": space[0],
    "space_before_answer": space[1],
    "ends": answers.ends,
    "stop": answers.stop if data.chat else (),
  }


def _arrays(reader: RunReader, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the params by name, one of them in memory, blocks stacked as the programs take them."""
  blocks: list[np.ndarray] = []
  for part, value in reader.read():
    value = part.cast(value, dtype)
    if part.block is None:
      yield part.name, value
      continue
    blocks.append(value)
    if len(blocks) == reader.num_blocks(part.name):
      yield part.name, np.stack(blocks)
      blocks = []
