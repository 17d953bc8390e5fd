# SPDX-License-Identifier: Apache-2.0
"""How much of an answer a metric reads, so that no answer makes scoring slow."""

# Characters of an answer that are read where time is linear in them: more than any benchmark asks
# for (MathVista's 16,384 tokens are some 70,000).
LONGEST = 100_000
# Characters where time grows with the product of two lengths, or with a length squared: edit
# distance, longest common subsequence, and the numbers of an answer.
LONGEST_PAIRED = 10_000


def cut(text: str, longest: int = LONGEST) -> str:
  """Returns the beginning of a text, as far as a metric reads it."""
  return text[:longest]


def is_cut(text: str, longest: int = LONGEST) -> bool:
  """Returns whether a metric reads only the beginning of a text: what a report counts."""
  return len(text) > longest
