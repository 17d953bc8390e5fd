# SPDX-License-Identifier: Apache-2.0
"""Names, units and meaning of all that a run logs. `docs/reference/metrics.md` is made of it."""

import re
from typing import NamedTuple


class Metric(NamedTuple):
  """One kind of number in `metrics.jsonl`; a name may have parts in braces, such as `{source}`."""

  name: str
  unit: str
  meaning: str


# Ends the name of a number that is the standard error of the one without it.
STANDARD_ERROR = "/standard_error"
# A value is a mean over the steps since the line before, unless its meaning says otherwise.
SCALARS = (
  Metric("loss", "nats per token", "Cross-entropy, mean over all target tokens."),
  Metric("loss/{source}", "nats per token", "The same, of one source's tokens."),
  Metric("z_loss", "nats per token", "`train.z_loss` times the squared log normaliser."),
  Metric("eval/loss/{source}", "nats per token", "Of a held-out source; experts drop no token."),
  Metric(
    "eval_tasks/{task}/{metric}",
    "",
    "A benchmark's metric on a fixed part of it, see `eval_tasks`; /standard_error is its error. "
    "/dropped counts items that could not be asked.",
  ),
  Metric("lr", "", "Learning rate of the decoder, of the newest step."),
  Metric("lr/{part}", "", "Of vit, connector, decoder: those that are trained."),
  Metric("grad_norm", "", "Norm of the gradient of all trained params, before clipping."),
  Metric("grad_norm/{part}", "", "Of one part; 0 where it is frozen."),
  Metric(
    "image_spread",
    "fraction",
    "RMS deviation of image tokens between pictures, over their RMS. Below 0.02 all pictures look "
    "alike to the decoder. Absent where no step had two pictures.",
  ),
  Metric("skipped", "steps", "Steps that the guard refused, since the run began."),
  Metric("skipped_in_a_row", "steps", "Of them the newest in a row."),
  Metric("moe/balance_loss", "", "Load-balance loss, mean over sparse layers; 1 is even."),
  Metric("moe/router_z_loss", "", "Squared log normaliser of the routers."),
  Metric("moe/dropped", "fraction", "Choices of an expert that found no room (`capacity_factor`)."),
  Metric("moe/load_min", "of even", "Least load of an expert, over all layers; 1 is even."),
  Metric("moe/load_max", "of even", "Largest load of an expert, over all layers."),
  Metric(
    "moe/load_entropy",
    "fraction",
    "Entropy of a layer's shares over that of an even load, mean over layers: 1 is even, 0 is one "
    "expert alone.",
  ),
  Metric("moe/dead_experts", "experts", "Experts that no token chose."),
  Metric("data/padded_fraction", "fraction", "Positions of the rows that hold no token."),
  Metric("data/empty_slot_fraction", "fraction", "Image slots that hold no picture."),
  Metric("data/dropped", "examples", "Examples lost to unreadable pictures or records; a sum."),
  Metric("memory/peak_gib", "GiB", "Peak so far: of the fullest local device, else the process."),
  Metric("speed/step_seconds", "s", "A step, over the last 50; saving and evaluating left out."),
  Metric("speed/tokens_per_second", "1/s", "Positions that hold a token, of all processes."),
  Metric("speed/images_per_second", "1/s", "Pictures, of all processes."),
  Metric("speed/data_wait", "fraction", "Time in which the devices were idle for want of a batch."),
  Metric("speed/mfu", "fraction", "Model FLOPs over the devices' peak; absent on a CPU."),
  Metric("speed/start_seconds", "s", "From the command to the first step; on the first line only."),
  Metric("speed/compile_seconds", "s", "Of it, compiling the step; on the first line only."),
  Metric("speed/save_seconds", "s", "Training waited for a save; on the line after one."),
)
TABLES = (
  Metric(
    "moe/load",
    "of even",
    "A row for each sparse layer, a column for each expert; mean over the steps since the last.",
  ),
)


def pattern(name: str) -> str | None:
  """Returns the name that the legend has for a scalar, such as `loss/{source}` for `loss/text`."""
  for metric in SCALARS:
    if re.fullmatch(re.sub(r"\\{\w+\\}", ".+", re.escape(metric.name)), name):
      return metric.name
  return None
