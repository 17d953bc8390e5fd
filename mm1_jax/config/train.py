# SPDX-License-Identifier: Apache-2.0
"""The training: optimizer, loop and checkpoints."""

import dataclasses
from typing import Annotated, Literal

from mm1_jax.config.group import Group, require
from mm1_jax.ranges import Count, CountOrZero, Decay, Fraction, PositiveOrZero, Range, Seed

PARTS = ("vit", "connector", "decoder")
ADAMW_FIELDS = ("b1", "b2", "eps", "moment_dtype")
ADAFACTOR_FIELDS = ("clipping_threshold", "multiply_by_parameter_scale")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Group, where="optimizer."):
  """AdamW for pre-training, Adafactor for SFT; warm-up, then cosine to `final_fraction`."""

  name: Literal["adamw", "adafactor"] = "adamw"  # leave settings of the other at their defaults
  # Peak of the decoder's rate, and of parts without one of their own. MM1's law is in
  # `train.optimizer`; 0 computes gradients and trains nothing.
  learning_rate: Annotated[float, Range(at_least=0, none="takes MM1's law")] | None = None
  vit_learning_rate: PositiveOrZero | None = None  # peak; None takes learning_rate
  connector_learning_rate: PositiveOrZero | None = None  # peak; None takes learning_rate
  warmup_steps: CountOrZero = 2000  # from 0 up to the peak
  final_fraction: Fraction = 0.1  # of the peak, at the last step
  # Of Adafactor: what the RMS of a direction is clipped at, layer by layer.
  clipping_threshold: Annotated[float, Range(above=0, none="clips nothing")] | None = 1.0
  # Of Adafactor: multiplies a direction by the RMS of the param, which makes the rate relative.
  multiply_by_parameter_scale: bool = False
  # Times the current learning rate; never on norms and biases.
  weight_decay: Annotated[float, Range(at_least=0, at_most=1000)] = 0.1
  b1: Decay = 0.9  # of AdamW: decay of the first moment
  b2: Decay = 0.95  # of AdamW: decay of the second moment
  eps: Annotated[float, Range(at_least=1e-30, at_most=1)] = 1e-8  # of AdamW: beside the divisor
  # Of AdamW's first moment; the second, and the params, are always float32.
  moment_dtype: Literal["float32", "bfloat16"] = "float32"
  # Gradients whose norm over all trained params is larger are scaled down to it.
  clip_norm: Annotated[float, Range(above=0, none="clips nothing")] | None = 1.0
  frozen: tuple[str, ...] = ()  # parts with no gradient, no optimizer state and no decay

  def _check(self) -> None:
    for part in self.frozen:
      require(part in PARTS, f"optimizer.frozen names '{part}'; the parts are {PARTS}.")
    require(len(set(self.frozen)) < len(PARTS), "optimizer.frozen leaves nothing to train.")
    own = {"adamw": ADAMW_FIELDS, "adafactor": ADAFACTOR_FIELDS}
    for name, fields in own.items():
      defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name in fields}
      for field, default in defaults.items() if name != self.name else ():
        value = getattr(self, field)
        require(
          value == default,
          f"optimizer.{field} {value} is a setting of {name}, but optimizer.name is {self.name}, "
          f"which has no use for it; leave it at {default}.",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig(Group, where="train."):
  """One run of the loop; a stage is a config, not a trainer."""

  num_steps: Count = 200_000  # of the whole run, resumed or not
  accumulation_steps: Count = 1  # micro-batches per step
  z_loss: PositiveOrZero = 1e-4  # on the softmax normaliser
  init_from: str | None = None  # workdir (or checkpoint) whose params start this run
  # What may differ from `init_from` though it changes what its params compute: a setting, such as
  # "model.decoder.rope_theta", or a part, such as "connector", which then starts fresh.
  init_changes: tuple[str, ...] = ()
  seed: Seed = 0  # of fresh params
  log_every: Count = 10  # steps
  eval_every: Count = 1000  # steps; the last one is evaluated, too
  eval_batches: Count | None = None  # per source; None evaluates all of it
  # A step is skipped when its loss or gradient norm is not finite, or its norm exceeds spike_factor
  # times the usual (see `train/guard.py`).
  spike_factor: Annotated[float, Range(above=1)] = 20.0
  max_skipped: Count = 10  # refused steps in a row that end a run
  # Steps between comparisons of the params that several devices have a copy of; 0 compares none.
  replica_check_every: CountOrZero = 0
  # Seconds without a step after which the run says what it waits for, again and again; also those
  # that the last save has after a signal to stop.
  stall_seconds: Count = 240
  # Seconds without progress after a signal to stop (or three of the longest steps) after which the
  # process ends with the stopped code. A spot host of GKE has 25.
  stop_seconds: Count = 20


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Group, where="checkpoint."):
  """When to save, and what to keep."""

  every: Count = 1000  # steps
  keep: Count = 3  # newest checkpoints kept; 2 at least, for the newest is not known to be good
  keep_period: Count | None = None  # steps that are kept for good
  verify: bool = True  # save a checksum of each array, and compare it when a run resumes
