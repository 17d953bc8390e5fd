# SPDX-License-Identifier: Apache-2.0
"""The lab: MM1's findings, tried with small models in a small world. `python -m lab --help`."""
