# SPDX-License-Identifier: Apache-2.0
"""One file a finding: the question, the runs, and the rule that decides, written beforehand."""

ORDER = (
  "control",
  "resolution",
  "connectors",
  "interleaved",
  "captions",
  "binding",
  "synthetic",
  "text",
  "experts",
  "rates",
  "unfrozen",
)
