# SPDX-License-Identifier: Apache-2.0
r"""Turns raw data into shards that can be trained on, on Apache Beam.

  python -m mm1_jax.data.build FORMAT --input=GLOB --output=PREFIX ...

writes PREFIX-00000-of-00012.arrayrecord and so on, PREFIX-manifest.json, and PREFIX-dead.jsonl.gz
with the rows that cannot be used. Started again, it continues where it was stopped. It runs on this
machine's cores; what is no flag of ours is Beam's, such as --direct_num_workers=4, or
--runner=DataflowRunner with --project, --region and --temp_location. See docs/guides/your_data.md,
and `python -m mm1_jax.data.build FORMAT --help` for the flags of a format.
"""

import sys

from mm1_jax import cli, extras, untrusted
from mm1_jax.data.build.options import parse


def main(argv: list[str] | None = None) -> None:
  options, beam_args = parse(sys.argv[1:] if argv is None else argv, str(__doc__))
  extras.require("data")
  # Only now: --help needs no Beam, and importing it takes seconds.
  from mm1_jax.data.build.manifest import finish, judge
  from mm1_jax.data.build.pipeline import build

  total, summary = finish(options, build(options, beam_args))
  print(untrusted.visible(summary), flush=True)
  judge(options, total)


if __name__ == "__main__":
  cli.run(main)
