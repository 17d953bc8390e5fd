# SPDX-License-Identifier: Apache-2.0
"""One file a finding: the question, the runs, and the rule that decides, written before the runs."""

ORDER = (
  "control",
  "resolution",
  "connectors",
  "interleaved",
  "captions",
  "synthetic",
  "text",
  "experts",
  "rates",
  "unfrozen",
)
