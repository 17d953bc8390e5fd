# SPDX-License-Identifier: Apache-2.0
"""Trains MM1-style multimodal LLMs with JAX on TPU pods."""

from mm1_jax import interrupts

__version__ = "0.1.0"

if interrupts.is_program():  # the first line of ours that runs
  interrupts.watch()
