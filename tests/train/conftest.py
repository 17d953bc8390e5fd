# SPDX-License-Identifier: Apache-2.0
"""Tests of training take their tiny model from the tests of models."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1] / "models"))
