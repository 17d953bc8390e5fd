# SPDX-License-Identifier: Apache-2.0
"""A trained run to files that others can run; `python -m mm1_jax.convert export --help`."""
