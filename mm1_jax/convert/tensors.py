# SPDX-License-Identifier: Apache-2.0
"""Tensors on disk by name, read one at a time: safetensors, in one file or in shards."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import safetensors

from mm1_jax import untrusted
from mm1_jax.convert import ConvertError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 << 20
INT8_SCALE = ".int8_scale"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SHOWN = 5  # names listed in a message before "and N more"


class Tensors:
  """The tensors of a checkpoint; shapes are read at once, values when they are asked for.

  Args:
    path: a .safetensors file, or a folder with one, or with shards and their index.

  Raises:
    ConvertError: a file is missing, truncated, no safetensors, or not what the index says.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._files: dict[str, pathlib.Path] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    listed = None
    if path.is_dir() and not (path / SINGLE).exists() and (path / INDEX).exists():
      listed = _read_index(path / INDEX)
      files = sorted({path / file for file in listed.values()})
    else:
      files = _files(path)
    for file in files:
      with _open(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118, not a mapping
          self._files[name] = file
          self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
    if listed is not None:
      self._check_index(listed)

  def __iter__(self) -> Iterator[str]:
    """Yields the names, those of a file one after the other."""
    return iter(self._files)

  def __contains__(self, name: str) -> bool:
    return name in self._files

  def file(self, name: str) -> pathlib.Path:
    return self._files[name]

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor's values; the file is closed again, so its pages can leave the memory.

    One of int8 only where its scales are beside it, as NAME.int8_scale: our own exports have them.

    Raises:
      ConvertError: there is no such tensor, or its type is none that NumPy knows.
    """
    if name not in self:
      raise ConvertError(f"'{self.path}' has no tensor '{name}'.")
    with _open(self._files[name]) as tensors:
      try:
        value = tensors.get_tensor(name)
      except Exception as e:  # of several kinds, for types unknown to NumPy
        raise ConvertError(f"tensor '{name}' of '{self._files[name]}' cannot be read: {e}.") from e
      known = value.dtype.kind in "fV" or value.dtype.name == "bfloat16"
      ours = value.dtype == np.int8 and name + INT8_SCALE in self
      if not known and not ours:
        raise ConvertError(
          f"tensor '{name}' of '{self._files[name]}' is {value.dtype}, of quantised weights "
          "perhaps; give the ones in float32, float16 or bfloat16."
        )
      return np.array(value)  # of our own memory

  def _check_index(self, listed: Mapping[str, str]) -> None:
    index = self.path / INDEX
    for name, file in listed.items():
      if name not in self:
        raise ConvertError(f"'{index}' says that tensor '{name}' is in '{file}', but it is not.")
      if self._files[name].name != file:
        raise ConvertError(
          f"'{index}' says that tensor '{name}' is in '{file}', but it is in "
          f"'{self._files[name].name}'."
        )


def find(path: pathlib.Path) -> pathlib.Path:
  """Returns what was meant by a path: of a shard, or of a file that describes, the folder."""
  if path.suffix == ".json" and path.is_file():
    return path.parent
  index = path.parent / INDEX
  if path.is_file() and index.exists() and path.name in _read_index(index).values():
    return path.parent
  return path


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the one file of weights: of several, the one that `transformers` reads."""
  if path.is_file():
    if path.suffix == ".gguf":
      raise ConvertError(f"'{path}' is a GGUF file. {_GGUF}")
    return [path]
  files = sorted(path.glob("*.safetensors"))
  if path / SINGLE in files:
    return [path / SINGLE]
  if len(files) != 1:
    raise _no_weights(path, files)
  return files


def _read_index(path: pathlib.Path) -> Mapping[str, str]:
  """Returns the file of each tensor, all of them there."""
  index = untrusted.read_object(path, ConvertError, most=MAX_INDEX_BYTES)
  with untrusted.of_form(f"'{path}' is no index of shards", ConvertError):
    listed = index["weight_map"]
    names = sorted(set(listed.values()))
  for name in names:
    # A path out of the folder is a mistake or an attack.
    if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
      raise ConvertError(f"'{path}' names '{name}', which is no .safetensors file beside it.")
  here = {file.name for file in path.parent.iterdir()}
  missing = [name for name in names if name not in here]
  if missing:
    raise ConvertError(
      f"{len(missing)} of {len(names)} shards that '{path}' names are missing: {shorten(missing)}."
    )
  return listed


@contextlib.contextmanager
def _open(file: pathlib.Path) -> Iterator:
  try:
    tensors = safetensors.safe_open(file, framework="numpy")
  except Exception as e:  # SafetensorError, and OSError for an empty file
    with open(file, "rb") as data:
      head = data.read(9)
    # The length of a header may begin like a pickle or a zip, but then comes the header.
    if head[:1] in (b"P", b"\x80") and head[8:] != b"{":
      raise ConvertError(f"'{file}' is not safetensors but a pickle. {_CONVERT}") from e
    raise ConvertError(f"'{file}' is truncated, or no safetensors file: {e}.") from e
  with tensors:
    yield tensors


# A pickle runs whatever code its author put into it.
_CONVERT = (
  "Pickles are never opened here: save it as safetensors where you trust it, with "
  "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')."
)


_GGUF = "docs/reference/exports.md says how transformers makes a folder of safetensors of it."


def _no_weights(path: pathlib.Path, files: list[pathlib.Path]) -> ConvertError:
  if files:
    names = shorten([file.name for file in files])
    return ConvertError(f"'{path}' has several .safetensors files and no {INDEX}: {names}.")
  if not path.exists():
    return ConvertError(f"'{path}' does not exist; download the weights' folder first.")
  snapshots = sorted(path.glob("snapshots/*/"))
  if snapshots:
    return ConvertError(f"'{path}' is a cache of downloads; give the folder '{snapshots[-1]}'.")
  if list(path.glob("*.gguf")):
    return ConvertError(f"'{path}' has weights as GGUF only. {_GGUF}")
  pickles = sorted(file.name for file in path.glob("*") if file.suffix in PICKLES)
  if pickles:
    return ConvertError(f"'{path}' has weights as pickles only: {shorten(pickles)}. {_CONVERT}")
  return ConvertError(f"'{path}' has no .safetensors file.")


def shorten(names: list[str]) -> str:
  """Returns names for a message, of many the first few."""
  more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return ", ".join(names[:SHOWN]) + more
