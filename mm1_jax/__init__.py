# SPDX-License-Identifier: Apache-2.0
"""Trains MM1-style multimodal LLMs with JAX on TPU pods."""

__version__ = "0.1.0"
