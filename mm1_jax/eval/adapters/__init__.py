# SPDX-License-Identifier: Apache-2.0
"""Our models in other projects' evaluation harnesses."""
