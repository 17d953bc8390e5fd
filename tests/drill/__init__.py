# SPDX-License-Identifier: Apache-2.0
"""Faults injected into the real commands; docs/notes/drill.md says which, and how to run them."""
