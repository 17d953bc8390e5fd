# SPDX-License-Identifier: Apache-2.0
"""That the tests compare shape annotations with arrays: else an untrue one misleads its readers."""

import importlib
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

from mm1_jax.models import mm1
from tests.helpers import shapes

MODULE = """
from jaxtyping import Array, Float

def {name}(rows: Float[Array, "M K"], matrix: Float[Array, "K N"]) -> Float[Array, "{result}"]:
  return rows @ matrix
"""


@pytest.mark.parametrize(("result", "true"), [("M N", True), ("N M", False), ("M K", False)])
def test_an_untrue_annotation_is_an_error(result, true, tmp_path, monkeypatch):
  name = f"product_{result.replace(' ', '_').lower()}"
  (tmp_path / f"{name}.py").write_text(MODULE.format(name=name, result=result))
  monkeypatch.syspath_prepend(tmp_path)
  with jaxtyping.install_import_hook(name, f"{shapes.__name__}.check"):
    product = getattr(importlib.import_module(name), name)
  arrays = jnp.ones((2, 3)), jnp.ones((3, 4))
  if true:
    assert product(*arrays).shape == (2, 4)
    return
  with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
    product(*arrays)


@pytest.mark.parametrize("name", shapes.CHECKED)
def test_our_modules_are_checked(name):
  importlib.import_module(name)
  ours = [m for m in sys.modules if m == name or m.startswith(f"{name}.")]
  loaders = {type(sys.modules[m].__loader__).__module__ for m in ours}
  assert loaders == {"jaxtyping._import_hook"}


def test_arrays_of_another_rank_are_refused():
  with pytest.raises(jaxtyping.TypeCheckError, match="'tokens'"):
    mm1.image_spread(jnp.ones((2, 4, 3, 5)), jnp.ones((2, 4), bool))
