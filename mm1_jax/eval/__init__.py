# SPDX-License-Identifier: Apache-2.0
"""What a model can do: benchmarks in their official form, their metrics, and reports."""
