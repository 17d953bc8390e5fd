# SPDX-License-Identifier: Apache-2.0
"""Metrics of benchmarks, in plain Python and numpy: answers and truths to numbers.

Each is compared with code of other projects on named sets: `python -m bench.eval.metrics_peers`.
"""
