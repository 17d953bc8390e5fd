# SPDX-License-Identifier: Apache-2.0
"""`python -m mm1_jax.main`, with something that befalls this process: `[what, when]` as JSON.

A signal, or a DataError, strikes when the batch of that step (counted from the run's first) is
there; `drop` makes each batch claim so many lost examples; `workdir` is another one than it says.
With "bucket" as a third, metrics are written as to an object store, where files cannot grow.
"""

import json
import os
import runpy
import signal
import sys
import time

hook = json.loads(sys.argv[1])
sys.argv = ["main.py", *sys.argv[2:]]

if hook and hook[2:] == ["bucket"]:
  import mm1_jax.metrics as metrics

  metrics.can_append = lambda path: False

if hook and hook[0] == "workdir":
  sys.argv = [f"--workdir={hook[1]}" if a.startswith("--workdir") else a for a in sys.argv]
elif hook and hook[0] == "drop":
  import mm1_jax.data.pipeline as pipeline

  join = pipeline._join

  def lose(rows):
    batch, stats = join(rows)
    return batch, stats._replace(drops={"made up": hook[1]})

  pipeline._join = lose

elif hook and hook[0] is not None:
  import mm1_jax.data.pipeline as pipeline

  take = pipeline.Pipeline.__next__

  def strike(self):
    what, when, *_ = hook
    batch, stats = take(self)
    if self.state()["batch"] == when:
      if what == "DataError":
        raise pipeline.DataError("source 'text', record 7: not a record at all")
      if what == "SIGKILL":
        time.sleep(5)  # for the checkpoint that was begun before
      os.kill(os.getpid(), getattr(signal, what))
    return batch, stats

  pipeline.Pipeline.__next__ = strike

runpy.run_module("mm1_jax.main", run_name="__main__", alter_sys=True)
