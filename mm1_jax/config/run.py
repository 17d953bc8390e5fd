# SPDX-License-Identifier: Apache-2.0
"""The whole run, and the rules between its groups."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mm1_jax.config.build import build
from mm1_jax.config.data import DataConfig
from mm1_jax.config.evaluation import EvalTaskConfig
from mm1_jax.config.group import Group, require
from mm1_jax.config.mesh import BATCH_AXES, MESH_AXES, MeshConfig, divides
from mm1_jax.config.model import ModelConfig
from mm1_jax.config.train import CheckpointConfig, OptimizerConfig, TrainConfig

MOST_BATCH_BYTES = 2**40  # of all rows of all hosts


@dataclasses.dataclass(frozen=True)
class InputSpec:
  """A model's inputs: all that the data code needs of it."""

  image_size: tuple[int, int]  # pixels, height and width
  tokens_per_image: int  # positions of a picture, or of a sub-image, without delimiters (T)
  image_token_id: int  # the id at those positions


@dataclasses.dataclass(frozen=True)
class RunConfig(Group, where=""):
  """Everything that defines a run, apart from where it writes."""

  name: str = "mm1"  # of the workdir, runs/NAME, where none is given
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: MeshConfig = MeshConfig()
  eval_tasks: tuple[EvalTaskConfig, ...] = ()  # benchmarks that are scored inside the run

  @property
  def input_spec(self) -> InputSpec:
    """The model's inputs."""
    model = self.model
    return InputSpec(model.vision.image_size, model.connector.num_tokens, model.image_token_id)

  @property
  def image_positions(self) -> int:
    """Positions of a row that one image takes, delimiters included."""
    return self.model.connector.num_tokens + 2 * self.data.image_delimiters

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
    """Builds a run from nested plain values.

    Raises:
      ConfigError: an unknown key, a value of the wrong type, or fields that do not fit together.
    """
    return build(cls, values, "")

  def to_dict(self) -> dict[str, Any]:
    """Returns plain JSON-compatible values; `from_dict` reads them back."""
    return dataclasses.asdict(self)

  def check_mesh(self, num_devices: int) -> tuple[int, ...]:
    """Returns the mesh's axis lengths after checking that the run divides over them.

    Raises:
      ConfigError: naming the number that does not divide, and by what it must.
    """
    sizes: dict[str, int] = dict(zip(MESH_AXES, self.mesh.resolve(num_devices), strict=True))
    rows = self.data.batch_size // self.train.accumulation_steps
    batch = math.prod(sizes[a] for a in BATCH_AXES)
    divides("data.batch_size / train.accumulation_steps", rows, " x ".join(BATCH_AXES), batch)
    divides("data.seq_len", self.data.seq_len, "sequence", sizes["sequence"])
    self.model.check_mesh(sizes)
    return tuple(sizes.values())

  def _check(self) -> None:
    data, train = self.data, self.train
    height, width = self.model.vision.image_size
    num_bytes = data.batch_size * (24 * data.seq_len + 3 * height * width * data.images_per_row)
    require(
      num_bytes <= MOST_BATCH_BYTES,
      f"data.batch_size {data.batch_size} rows of data.seq_len {data.seq_len} positions and "
      f"data.images_per_row {data.images_per_row} pictures are {num_bytes / 2**40:.1e} TiB a "
      f"batch; at most {MOST_BATCH_BYTES / 2**40:g} TiB is possible.",
    )
    names = [task.name for task in self.eval_tasks]
    require(len(set(names)) == len(names), f"eval_tasks has names {names}; each must be another.")
    require(
      self.image_positions <= data.seq_len,
      f"data.seq_len {data.seq_len} cannot hold one image of {self.image_positions} positions "
      f"(connector tokens and delimiters).",
    )
    fit = data.seq_len // self.image_positions
    require(
      data.images_per_row <= fit,
      f"data.images_per_row {data.images_per_row}: a row of {data.seq_len} positions holds at "
      f"most {fit} images of {self.image_positions} positions.",
    )
    if data.tiling is not None:
      slots = data.tiling.max_slots
      require(
        slots <= data.images_per_row and slots * self.image_positions <= data.seq_len,
        f"data.tiling makes up to {slots} sub-images of {self.image_positions} positions of a "
        f"picture, but a row has {data.images_per_row} slots (data.images_per_row) and "
        f"{data.seq_len} positions (data.seq_len).",
      )
    require(
      self.model.decoder.lora is None or "decoder" not in self.optimizer.frozen,
      "optimizer.frozen names the decoder, whose adapters model.decoder.lora asks to train; leave "
      "it out: with lora the decoder's own params are not trained anyway.",
    )
    require(
      data.batch_size % train.accumulation_steps == 0,
      f"data.batch_size {data.batch_size} must be a multiple of train.accumulation_steps "
      f"{train.accumulation_steps}.",
    )
