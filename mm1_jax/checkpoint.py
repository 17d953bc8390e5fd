# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on Orbax: save and resume a run, and start another from its params alone.

A workdir holds `config.json`, the tokenizer, `chat_template.json` if it is your own file,
`good.json`, and `checkpoints/STEP/`; a step has three items: `params` (the model, under the names
of its attributes), `train` (optimizer state and counters), and `data` (the pipeline's state, JSON).
Saving is asynchronous and atomic: a step's folder has its name only when all of it is there. Arrays
are restored straight onto the current mesh, whatever mesh they were saved from.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from mm1_jax.config import CheckpointConfig, RunConfig, UserError
from mm1_jax.models.layers import resize_grid

CONFIG, STEPS = "config.json", "checkpoints"
GOOD = "good.json"  # the newest step whose params a step of training was accepted from
REFUSED = ".refused"  # suffix of a step that was set aside: no longer taken for a checkpoint
TEMPLATE = "chat_template.json"
# A tokenizer's files by the suffix of its own, which comes first.
TOKENIZERS = {
  ".model": ("tokenizer.model",),
  ".json": ("tokenizer.json", "tokenizer_config.json"),
}
NONE_GOOD = -1
GRIDS = ("vit.positions", "connector.positions")  # [H, W, D]: learned, for a grid of patches
ADAPTER = ".lora."  # in the names of adapters
MERGE = (
  "Merge them: python -m mm1_jax.convert merge_lora --checkpoint=RUN --out=NEW_RUN; then start "
  "from that."
)
PARAMS, TRAIN, DATA = "params", "train", "data"
SAVED_AT_ONCE_GB = 1  # of params without the rest of a run, on their way to the disk
SHOWN = 5  # names listed in a message before "and N more"


class CheckpointError(UserError):
  """A checkpoint that is missing, damaged, or of another model; the message says which and why."""


class Checkpointer:
  """The checkpoints of one run.

  A checkpoint is known to be good only when a step from its params was accepted. A run saves none
  right after a refused step, so all but the newest are good; and at least two are kept, so that one
  of them is good.
  """

  def __init__(self, workdir: epath.PathLike, cfg: CheckpointConfig):
    self._path = absolute(workdir) / STEPS
    self._good_file = absolute(workdir) / GOOD
    self._good = _read_good(self._good_file)
    self._saving: int | None = None  # the step whose save has not been seen to end
    self._failed = False  # a save
    self._manager = ocp.CheckpointManager(
      self._path,
      item_names=(PARAMS, TRAIN, DATA),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=max(2, cfg.keep), keep_period=cfg.keep_period
      ),
    )

  @property
  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  @property
  def good_step(self) -> int | None:
    """The newest step that is known to be good."""
    steps = sorted(self._manager.all_steps())
    return next((s for s in reversed(steps) if s <= self._good or s < steps[-1]), None)

  def folder(self, step: int) -> epath.Path:
    return self._path / str(step)

  def prove(self, step: int) -> None:
    """Records on disk that a step from the params of `step` was accepted."""
    if step != self._good:
      self._good = step
      if jax.process_index() == 0:
        self._good_file.write_text(json.dumps({"step": step}) + "\n")

  def set_aside(self) -> epath.Path:
    """Renames the newest step, so that the one before it is resumed from; returns its new place.

    For the end of a run: no process may be saving, and the checkpointer is of no use after it.
    """
    folder = self.folder(self._manager.latest_step() or 0)
    aside = folder.with_name(folder.name + REFUSED)
    if jax.process_index() == 0:
      if aside.exists():
        aside.rmtree()
      folder.rename(aside)
    return aside

  def save(self, step: int, *, params: Any, train: Any, data: dict[str, Any]) -> None:
    """Starts saving; arrays may be donated as soon as it returns.

    Raises:
      CheckpointError: this save, or the one before it, failed.
    """
    self.wait()
    self._saving = step
    if self._good >= step:  # recorded of one that was never finished, or was deleted
      self.prove(NONE_GOOD)
    with self._saves():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          **{
            PARAMS: ocp.args.StandardSave(to_names(params)),
            TRAIN: ocp.args.StandardSave(to_names(train)),
            DATA: ocp.args.JsonSave(data),
          }
        ),
      )

  def restore_data(self, step: int) -> dict[str, Any]:
    """Returns the pipeline's state at a step; raises CheckpointError if it cannot be read."""
    try:
      args = ocp.args.Composite(**{DATA: ocp.args.JsonRestore()})
      return self._manager.restore(step, args=args)[DATA]
    except Exception as e:
      raise damaged(self.folder(step) / DATA, e) from e

  def restore(self, step: int, *, params: Any, train: Any) -> tuple[Any, Any]:
    """Returns (params, train) of a step, shaped and placed like the abstract trees given.

    Raises:
      CheckpointError: the step is damaged, or its arrays are not the ones asked for.
    """
    where = self.folder(step)
    self.check(step, params=params, train=train)
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          **{
            PARAMS: ocp.args.StandardRestore(to_names(params)),
            TRAIN: ocp.args.StandardRestore(to_names(train)),
          }
        ),
      )
    except Exception as e:
      raise damaged(where, e) from e
    return from_names(params, restored[PARAMS]), from_names(train, restored[TRAIN])

  def check(self, step: int, *, params: Any, train: Any) -> None:
    """Raises CheckpointError unless a step has exactly these arrays; reads none of them."""
    where = self.folder(step)
    for item, tree in ((PARAMS, params), (TRAIN, train)):
      check_match(saved_shapes(where / item), to_names(tree), where / item)

  def wait(self) -> None:
    """Returns when what is being saved is on disk; raises CheckpointError if that failed."""
    if self._saving is not None:
      with self._saves():
        self._manager.wait_until_finished()
      self._saving = None

  def check_saved(self) -> None:
    """Raises CheckpointError if the newest save has failed; does not wait for one that runs."""
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self.wait()

  @contextlib.contextmanager
  def _saves(self) -> Iterator[None]:
    """Says of an error in the block that the save failed; after that nothing is waited for."""
    step = self._saving
    try:
      yield
    except Exception as e:
      self._saving, self._failed = None, True
      steps = [s for s in self._manager.all_steps() if s != step]
      whole = f"the newest whole checkpoint is step {max(steps)}" if steps else "there is no other"
      reason = (str(e).splitlines() or [""])[0][:300]
      raise CheckpointError(
        f"saving step {step} in '{self._path}' failed: {type(e).__name__}: {reason}; {whole}. Make "
        "room or mend the disk, and run again to continue from there."
      ) from e

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, error, *_) -> None:
    # Closing waits for the other processes, which never close where this one has failed.
    if error is None or jax.process_count() == 1:
      with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
        self._manager.close()  # a save that failed fails here again


def _read_good(path: epath.Path) -> int:
  try:
    return int(json.loads(path.read_text())["step"]) if path.exists() else NONE_GOOD
  except (ValueError, KeyError, TypeError):
    return NONE_GOOD  # it was cut off by a crash


def write_run_files(workdir: epath.PathLike, run: RunConfig) -> None:
  """Puts config, tokenizer and template beside the checkpoints: a run can be moved whole."""
  workdir = epath.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / CONFIG).write_text(json.dumps(run.to_dict(), indent=2) + "\n")
  tokenizer = epath.Path(run.data.tokenizer)
  own, *beside = TOKENIZERS[".json" if tokenizer.suffix == ".json" else ".model"]
  (workdir / own).write_bytes(tokenizer.read_bytes())
  for name in beside:
    (workdir / name).write_bytes((tokenizer.parent / name).read_bytes())
  template = epath.Path(run.data.chat_template)
  if template.suffix:  # a file; shipped ones go by their name
    (workdir / TEMPLATE).write_bytes(template.read_bytes())


def read_run(workdir: epath.PathLike) -> RunConfig:
  """Returns the config of a run, reading the tokenizer that travels with it.

  Raises:
    CheckpointError: `workdir` is not a run, or its config cannot be read.
  """
  workdir = epath.Path(workdir)
  path = workdir / CONFIG
  if not path.exists():
    raise CheckpointError(
      f"'{workdir}' is not a run: it has no {CONFIG}. Give the --workdir of a training run."
    )
  try:
    values = json.loads(path.read_text())
    files = [workdir / own for own, *_ in TOKENIZERS.values()]
    tokenizer = next((file for file in files if file.exists()), files[0])
    values["data"]["tokenizer"] = str(tokenizer)
    if (workdir / TEMPLATE).exists():
      values["data"]["chat_template"] = str(workdir / TEMPLATE)
  except (json.JSONDecodeError, KeyError, TypeError) as e:
    raise CheckpointError(f"'{path}' is damaged: {type(e).__name__}: {e}.") from e
  return RunConfig.from_dict(values)


def find_step(path: epath.PathLike) -> epath.Path:
  """Returns the folder of a step: `path` itself, or the newest one of the run at `path`.

  Raises:
    CheckpointError: there is none.
  """
  path = absolute(path)
  if (path / PARAMS).exists():
    return path
  folder = path / STEPS
  names = [p.name for p in folder.iterdir()] if folder.exists() else []
  steps = sorted(int(name) for name in names if name.isdigit())
  if not steps:
    partial = sorted(name for name in names if "tmp" in name)
    found = f" Only unfinished ones: {partial}." if partial else ""
    raise CheckpointError(f"no checkpoint under '{path}'.{found}")
  return folder / str(steps[-1])


def restore_params(path: epath.PathLike, like: Any) -> Any:
  """Returns the params of a run's newest step, or of the step at `path`, placed like `like`.

  Raises:
    CheckpointError: missing, damaged, or of another model.
  """
  where = find_step(path) / PARAMS
  check_match(saved_shapes(where), to_names(like), where)
  return from_names(like, _restore(where, to_names(like)))


def digest(path: epath.PathLike) -> str:
  """Returns a hash that differs between checkpoints, of the run's newest step or the one at `path`.

  Of the params' files it takes names, sizes, and the first and last 64 kB: names and the index at a
  file's end change with each save, so that 100 GB need not be read.
  """
  step, edge = find_step(path), 65536
  workdir, hasher = step.parent.parent, hashlib.sha256()
  for own in (CONFIG, TEMPLATE, *(name for name, *_ in TOKENIZERS.values())):
    if (workdir / own).exists():
      hasher.update(own.encode() + (workdir / own).read_bytes())
  for file in sorted(_files(step / PARAMS)):
    size = file.stat().length
    hasher.update(f"{file.relative_to(step)} {size}".encode())
    with file.open("rb") as opened:
      hasher.update(opened.read(edge))
      opened.seek(max(0, size - edge))
      hasher.update(opened.read(edge))
  return hasher.hexdigest()[:32]


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    yield from _files(path) if path.is_dir() else (path,)


def refuse_run(workdir: epath.PathLike) -> None:
  """Raises CheckpointError if there is a run at `workdir` already, so that none is overwritten."""
  workdir = epath.Path(workdir)
  if (workdir / CONFIG).exists() or (workdir / STEPS).exists():
    raise CheckpointError(f"'{workdir}' is a run already; give another --out.")


def save_params(workdir: epath.PathLike, step: int, params: Mapping[str, jax.Array]) -> None:
  """Writes params by name as a step of a run that has nothing else; little is in memory twice."""
  path = absolute(workdir) / STEPS / str(step) / PARAMS
  handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=SAVED_AT_ONCE_GB)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(params))


class Taken(NamedTuple):
  """What another run's params are for a model."""

  where: epath.Path
  names: list[str]
  grids: dict[str, tuple[int, ...]]  # of those, learned positions to be resized, and their shapes
  adapters: list[str]  # of LoRA: new
  fresh: list[str]  # parts that keep their fresh params

  @property
  def parts(self) -> set[str]:
    return {_part(name) for name in self.names}


def check_init(path: epath.PathLike, params: Any, *, fresh_parts: Collection[str] = ()) -> Taken:
  """Returns what `init_from` will take of a checkpoint; reads no array.

  A part (ViT, connector, decoder) that the checkpoint has is taken whole: all params of both sides
  have the same names and shapes. But for learned positions on another grid, which are resized, and
  for LoRA adapters that only the model has. A part that the checkpoint lacks stays fresh, as do
  `fresh_parts`.

  Raises:
    CheckpointError: missing, damaged, or it does not fit; names what does not.
  """
  where = find_step(path) / PARAMS
  saved = saved_shapes(where)
  wanted = {name: tuple(x.shape) for name, x in to_names(params).items()}
  theirs = {_part(name) for name in saved}
  ours = {_part(name) for name in wanted}
  if not theirs & ours:
    raise CheckpointError(f"'{where}' has no param of this model; is it another kind of model?")
  parts = theirs - set(fresh_parts)
  saved = {name: shape for name, shape in saved.items() if _part(name) in parts}
  wanted = {name: shape for name, shape in wanted.items() if _part(name) in parts}
  _check_adapters(where, saved, wanted)
  adapters = [name for name in wanted if ADAPTER in name and name not in saved]
  grids = {n: saved[n] for n in GRIDS if n in saved and _is_other_grid(saved[n], wanted.get(n))}
  wrong = _differences(
    {n: s for n, s in saved.items() if n not in grids},
    {n: s for n, s in wanted.items() if n not in {*grids, *adapters}},
  )
  if wrong:
    raise CheckpointError(f"'{where}' does not fit this model: {'; '.join(wrong)}.")
  names = [name for name in wanted if name not in adapters]
  return Taken(where, names, grids, adapters, sorted(ours - parts))


def init_from(path: epath.PathLike, params: Any, *, fresh_parts: Collection[str] = ()) -> Any:
  """Returns `params` with what a checkpoint has of them, and logs what was taken and what was not.

  Raises:
    CheckpointError: see `check_init`.
  """
  fresh = to_names(params)
  taken = check_init(path, params, fresh_parts=fresh_parts)
  logging.info(
    "init_from '%s': loaded %d params; resized: %s; new adapters: %d",
    taken.where,
    len(taken.names),
    {n: f"{s[:2]} to {fresh[n].shape[:2]}" for n, s in taken.grids.items()} or "none",
    len(taken.adapters),
  )
  if taken.fresh:
    names = ", ".join(taken.fresh)
    logging.warning("init_from '%s': nothing is taken for %s: random params", taken.where, names)
  wanted = {name: fresh[name] for name in taken.names}
  for name, shape in taken.grids.items():
    x = wanted[name]
    wanted[name] = jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)
  loaded = _restore(taken.where, wanted)
  for name in taken.grids:
    resize = jax.jit(resize_grid, static_argnums=1, out_shardings=fresh[name].sharding)
    loaded[name] = resize(loaded[name], fresh[name].shape[:2])
  return from_names(params, fresh | loaded)


def _check_adapters(
  where: epath.Path, saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
  """Raises CheckpointError if LoRA adapters that were trained have no place in a model."""
  lost = [name for name in saved if ADAPTER in name and saved[name] != wanted.get(name)]
  if lost:
    name = lost[0]
    ours = f"of shape {wanted[name]}" if name in wanted else "none"
    raise CheckpointError(
      f"'{where}' has LoRA adapters that this model lacks ({name} {saved[name]}; here {ours}): "
      f"what was trained would be lost. {MERGE}"
    )


def _is_other_grid(saved: tuple[int, ...], wanted: tuple[int, ...] | None) -> bool:
  return wanted is not None and saved != wanted and saved[2:] == wanted[2:]


def _part(name: str) -> str:
  return name.split(".")[0]


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns a path that Orbax can find from its own threads; `gs://` ones are whole already."""
  return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def to_names(tree: Any) -> dict[str, Any]:
  """Returns a tree's leaves by name, such as `decoder.units.layers.0.mlp.gate`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_name(path): leaf for path, leaf in leaves}


def from_names(like: Any, leaves: Mapping[str, Any]) -> Any:
  """Returns a tree of the structure of `like` with the leaves of `to_names`."""
  return jax.tree_util.tree_map_with_path(lambda path, _: leaves[_name(path)], like)


def _name(path) -> str:
  parts = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
  return ".".join(parts[:-1] if parts[-1] == "value" else parts)


def saved_shapes(item: epath.Path) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of an item's arrays by name; reads no array.

  Raises:
    CheckpointError: the item is missing or damaged.
  """
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      metadata = checkpointer.metadata(item).item_metadata
    return {name: tuple(array.shape) for name, array in metadata.items()}
  except Exception as e:
    raise damaged(item, e) from e


def _differences(
  saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> list[str]:
  """Returns one line for each array that differs."""
  wrong = [f"{n} is {saved[n]}, not {s}" for n, s in wanted.items() if saved.get(n, s) != s]
  wrong += [f"{n} is missing" for n in wanted if n not in saved]
  return wrong + [f"{n} is not in this model" for n in saved if n not in wanted]


def check_match(saved: dict[str, tuple[int, ...]], wanted: dict[str, Any], where: Any) -> None:
  """Raises CheckpointError unless a checkpoint has exactly the arrays wanted, in their shapes."""
  wrong = _differences(saved, {name: tuple(x.shape) for name, x in wanted.items()})
  if wrong:
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    raise CheckpointError(
      f"'{where}' is of another model or optimizer: {'; '.join(wrong[:SHOWN])}{more}. Use the "
      "config it was trained with, or start anew with train.init_from."
    )


def damaged(where: Any, error: Exception) -> CheckpointError:
  reason = str(error).splitlines()[0] if str(error) else ""
  return CheckpointError(
    f"'{where}' cannot be read: {type(error).__name__}: {reason[:300]}. If its files are "
    "incomplete, delete this step's folder to continue from the one before."
  )


def _restore(where: epath.Path, wanted: dict[str, Any]) -> dict[str, Any]:
  """Reads the arrays named in `wanted`, and no other, onto their shardings."""
  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.restore(
        where,
        ocp.args.PyTreeRestore(
          abstract,
          restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
          partial_restore=True,
        ),
      )
  except Exception as e:
    raise damaged(where, e) from e
