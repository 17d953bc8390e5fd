# SPDX-License-Identifier: Apache-2.0
"""What `transformers` makes of an export, where PyTorch is installed: our logits, our tokens.

Everywhere else these are skipped; `python -m bench.exports` runs the same in a fresh environment.
"""

import dataclasses
import io
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch transformers")
pytest.importorskip("transformers", reason="transformers is not installed")
