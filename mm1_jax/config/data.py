# SPDX-License-Identifier: Apache-2.0
"""The data: sources, their shares, and how rows are filled."""

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from mm1_jax.config.group import Group, require
from mm1_jax.ranges import Count, CountOrZero, Fraction, Positive, PositiveOrZero, Range, Seed


@dataclasses.dataclass(frozen=True)
class SourceConfig(Group, where="data source '{name}': "):
  """One stream of records, or a group of them that shares its weight out."""

  name: str  # in metrics and overrides; of a group's source "GROUP/NAME"
  path: str = ""  # glob of ArrayRecord shards; a group has none
  # Share (see `data.weight_by`), relative to the others of its group; 0 waits for `data.reweight`.
  weight: PositiveOrZero = 1.0
  sources: tuple["SourceConfig", ...] = ()  # of a group
  epochs: Positive | None = None  # after so many the source leaves the mixture; None is endless
  limit: Count | None = None  # use so many of its examples, picked at random
  seed: Seed = 0  # another one gives another order, and another pick

  def _check(self) -> None:
    where = f"data source '{self.name}'"
    require(
      bool(self.path) != bool(self.sources),
      f"{where} has {'both' if self.path else 'neither'} 'path' {'and' if self.path else 'nor'} "
      f"'sources'; a source has a path, a group has sources.",
    )
    used = [k for k in ("epochs", "limit") if getattr(self, k) is not None]
    require(
      not (self.sources and used),
      f"{where} is a group and has no {' and '.join(used)} of its own; set them for its sources.",
    )


@dataclasses.dataclass(frozen=True)
class ReweightConfig(Group, where="data.reweight at step {step}: "):
  """New weights for sources and groups, from a step on; those not named keep theirs."""

  step: Count  # before the first of these, the sources' own weights hold
  # By name, such as "captions", or "captions/web" in it.
  weights: tuple[tuple[str, PositiveOrZero], ...]


@dataclasses.dataclass(frozen=True)
class TilingConfig(Group, where="data.tiling."):
  """Pictures cut into sub-images of the encoder's size (MM1 section 4.1, MM1.5 section 4.5)."""

  # Rows and columns of every picture: MM1 has (2, 2). None chooses for each picture a grid of
  # `min_tiles` to `max_tiles` sub-images, as MM1.5 does.
  grid: tuple[Count, Count] | None = None
  min_tiles: Count = 4  # fewest sub-images, where `grid` is None
  max_tiles: Count = 9  # MM1.5 trains with 9 and answers with up to 16
  overview: Literal["last", "first", "none"] = "last"  # place of the whole picture, made small
  # Text before the sub-images: (image, row, column), or separators of columns and rows.
  marks: Literal["none", "index", "separators"] = "none"
  max_images: Count = 2  # pictures of an example with more are not cut
  last: CountOrZero | None = None  # cut just so many pictures, the last, however many there are

  @property
  def max_slots(self) -> int:
    """Image slots that a picture takes at most."""
    num = self.grid[0] * self.grid[1] if self.grid else self.max_tiles
    return num + (self.overview != "none" and num > 1)

  def _check(self) -> None:
    require(
      self.min_tiles <= self.max_tiles,
      f"data.tiling.min_tiles {self.min_tiles} is above max_tiles {self.max_tiles}.",
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(Group, where="data."):
  """What is trained on, and how rows are filled."""

  sources: tuple[SourceConfig, ...] = ()  # the mixture, as a tree; `leaves` has it flat
  # What weights are shares of. The papers' fine-tuning draws examples; from the mean lengths of
  # each source's examples follow its shares of positions.
  weight_by: Literal["positions", "examples"] = "positions"
  reweight: tuple[ReweightConfig, ...] = ()  # by ascending step
  eval_sources: tuple[SourceConfig, ...] = ()  # held out; each is evaluated whole, on its own
  tokenizer: str = ""  # SentencePiece model file
  seq_len: Count = 4096  # positions in a row (S)
  batch_size: Count = 512  # rows in a global batch (B)
  images_per_row: CountOrZero = 16  # image slots of a row (N)
  # How a picture gets the encoder's size: out of shape, or whole, with a border.
  image_fit: Literal["squash", "pad"] = "squash"
  tiling: TilingConfig | None = None  # of high-resolution pictures; None leaves them whole
  max_image_pixels: Count = 64_000_000  # a picture of more is dropped before it is decoded
  image_delimiters: bool = True  # <image_start>, <image_end> around an image's run
  # Rows of all sources, or each row of one source, as MM1 has it.
  packing: Literal["joint", "per_source"] = "joint"
  chat: bool = False  # conversations: generation then puts a prompt in the chat template
  chat_template: str = "default"  # or vicuna, llama3, chatml, or a file; see `data/template.py`
  window_rows: Count = 128  # rows that are packed together; more fill better and shuffle further
  # Processes that decode images; 0 decodes in the training process.
  num_workers: Annotated[int, Range(at_least=0, at_most=4096)] = 0
  prefetch_batches: Count = 2  # made ahead, whatever the number of workers; all are in host memory
  max_drop_fraction: Fraction = 0.05  # of examples lost to unreadable images before the run stops
  seed: Seed = 0  # of the order of examples

  @functools.cached_property
  def leaves(self) -> tuple[SourceConfig, ...]:
    """The sources of all groups, named like "captions/web"; weights are shares at step 0."""
    return tuple(
      dataclasses.replace(source, name=path, weight=share)
      for (path, source), share in zip(_leaves(self.sources), self.shares(0), strict=True)
    )

  def shares(self, step: int) -> tuple[float, ...]:
    """Returns what share each of the leaves has at a step, of what `weight_by` says; 1 in all.

    A group whose sources all have weight 0 leaves its share to the others.
    """
    weights = {path: source.weight for path, source in _nodes(self.sources)}
    for change in self.reweight:
      if change.step <= step:
        weights |= dict(change.weights)
    shares = tuple(_shares(self.sources, weights, 1.0))
    return tuple(share / (sum(shares) or 1.0) for share in shares)

  def _check(self) -> None:
    for kind in ("sources", "eval_sources"):
      _check_names(getattr(self, kind), f"data.{kind}")
    for source in self.eval_sources:
      where = f"data.eval_sources.{source.name}"
      require(not source.sources, f"{where} is a group; name its sources there instead.")
      require(
        source.epochs is None and source.limit is None,
        f"{where} has epochs or a limit, but is evaluated whole, up to train.eval_batches.",
      )
    require(
      self.tiling is None or self.tiling.marks == "none" or self.chat,
      "data.tiling.marks needs data.chat: documents are cut at texts, which would part a picture.",
    )
    self._check_reweight()

  def _check_reweight(self) -> None:
    names = [path for path, _ in _nodes(self.sources)]
    steps = [change.step for change in self.reweight]
    require(
      steps == sorted(set(steps)), f"data.reweight has steps {steps}; they must ascend, each once."
    )
    for change in self.reweight:
      for name, _ in change.weights:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        require(
          name in names,
          f"data.reweight at step {change.step} names '{name}'; {hint}The sources are {names}.",
        )
    for step in (0, *steps) if self.sources else ():
      require(
        sum(self.shares(step)) > 0,
        f"all of data.sources have weight 0 at step {step}; one must be positive.",
      )


def _nodes(sources: Sequence[SourceConfig], prefix: str = "") -> Iterator[tuple[str, SourceConfig]]:
  """Yields all groups and sources with their names from the root, such as "captions/web"."""
  for source in sources:
    path = prefix + source.name
    yield path, source
    yield from _nodes(source.sources, f"{path}/")


def _leaves(sources: Sequence[SourceConfig]) -> Iterator[tuple[str, SourceConfig]]:
  return ((path, source) for path, source in _nodes(sources) if not source.sources)


def _shares(
  sources: Sequence[SourceConfig], weights: Mapping[str, float], share: float, prefix: str = ""
) -> Iterator[float]:
  """Yields the leaves' shares of `share`."""
  total = sum(weights[prefix + source.name] for source in sources)
  for source in sources:
    path = prefix + source.name
    own = share * weights[path] / total if total else 0.0
    if source.sources:
      yield from _shares(source.sources, weights, own, f"{path}/")
    else:
      yield own


def _check_names(sources: Sequence[SourceConfig], where: str) -> None:
  names = [source.name for source in sources]
  twice = sorted({n for n in names if names.count(n) > 1})
  require(not twice, f"{where} names {twice} more than once; names must differ.")
  for source in sources:
    require(
      "/" not in source.name and bool(source.name),
      f"{where} has the name '{source.name}'; a name has no '/', which separates groups, and is "
      f"not empty.",
    )
    _check_names(source.sources, f"{where}.{source.name}.sources")
