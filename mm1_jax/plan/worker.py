# SPDX-License-Identifier: Apache-2.0
"""Compiles one program for a slice, as a process of its own: `python -m mm1_jax.plan.worker DIR`.

The TPU compiler wants its environment set before JAX is imported, keeps gigabytes, and may abort.
Reads `DIR/request.json`; writes `DIR/result.json` (`compile.Result`) and `DIR/hlo.txt.gz`,
or only a result that names the entry of the cache that has them.
"""

import gzip
import hashlib
import importlib.metadata
import json
import pathlib
import resource
import sys
import time

import jax

from mm1_jax.chips import compiler_options
from mm1_jax.config import RunConfig
from mm1_jax.plan.compile import DUMP, CompileRequest, Result
from mm1_jax.plan.memory import kept_arrays
from mm1_jax.plan.program import trace
from mm1_jax.plan.topology import find_topology

_MEMORY = {
  "arguments": "argument_size_in_bytes",
  "outputs": "output_size_in_bytes",
  "aliased": "alias_size_in_bytes",
  "temporaries": "temp_size_in_bytes",
  "code": "generated_code_size_in_bytes",
  "peak": "peak_memory_in_bytes",
  "host": "host_temp_size_in_bytes",
}

_NUM_BUFFERS = 8  # that are named
_FORMAT = 1  # of what is kept; another number makes the cache forget


def main(folder: pathlib.Path) -> None:
  request = CompileRequest(**json.loads((folder / "request.json").read_text()))
  _compile(request, folder).write(folder)


def _compile(request: CompileRequest, folder: pathlib.Path) -> Result:
  topology = find_topology(request.topology, request.num_slices)
  program = trace(RunConfig.from_dict(request.run), topology, request.what)
  lowered = program.traced.lower()
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
  versions["libtpu"] = request.libtpu
  options = [compiler_options(topology.chip.device_kind), request.options]
  content = [_FORMAT, lowered.as_text(), topology.describe(), options, versions]
  key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
  kept = kept_arrays(program.traced.jaxpr.jaxpr)[:_NUM_BUFFERS]
  key += "-quick" if request.quick else ""
  result = Result(key, program.bytes_per_device(), kept, versions, quick=request.quick)
  if pathlib.Path(request.cache, key).exists():
    return result
  compiler = dict(request.options)
  if request.quick:
    compiler["xla_dump_to"] = str(folder / DUMP)
    result.write(folder)  # this process may be stopped at any moment
  begin, cpu = time.perf_counter(), time.process_time()
  try:
    compiled = lowered.compile(compiler_options=compiler or None)
  except jax.errors.JaxRuntimeError as e:
    # Of the chip's main memory: a kernel that wants too much of the small one is a mistake of ours.
    if "RESOURCE_EXHAUSTED" not in str(e) or "hbm" not in str(e).lower():
      raise
    result.refusal = str(e)
  else:
    stats = compiled.memory_analysis()
    result.memory = {name: getattr(stats, field) for name, field in _MEMORY.items()}
    with gzip.open(folder / "hlo.txt.gz", "wt", compresslevel=5) as file:
      file.write(compiled.as_text() or "")
  result.seconds = time.perf_counter() - begin
  result.cpu_seconds = time.process_time() - cpu
  result.process_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  return result


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
