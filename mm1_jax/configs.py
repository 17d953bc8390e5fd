# SPDX-License-Identifier: Apache-2.0
"""`mm1_jax.configs` in a clone: the folder `configs/` at the top. A wheel has the folder itself."""

import pathlib

__path__ = [str(pathlib.Path(__file__).parents[1] / "configs")]
