# SPDX-License-Identifier: Apache-2.0
"""Asks a trained model: `model.Model`, and the commands `generate`, `chat` and `app`."""

QUANTIZED = ("int8", "int4")  # bits that `quantize` keeps matrices in
