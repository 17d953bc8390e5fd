# SPDX-License-Identifier: Apache-2.0
"""Annotations such as `Float[Array, "B S D"]` are compared with what is passed, in all tests."""

import sys

import jaxtyping
from beartype import BeartypeConf, beartype

CHECKED = (
  "mm1_jax.models",
  "mm1_jax.train.loss",
  "mm1_jax.train.step",
  "mm1_jax.train.guard",
  "mm1_jax.inference.sampler",
  "mm1_jax.inference.beam",
)
check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int does where a float is asked for


def check_annotations() -> None:
  """Makes an untrue annotation of these modules an error, from their import on."""
  early = [name for name in CHECKED if name in sys.modules]
  assert not early, f"{early} were imported before their annotations could be checked"
  jaxtyping.install_import_hook(CHECKED, f"{__name__}.check")
