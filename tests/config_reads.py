"""Which keys of config.json the installed SGLang and transformers read, from their sources, which are not imported."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.model.families import FAMILIES

PACKAGES = Path(sysconfig.get_paths()["purelib"])
CONFIGS = {"config", "hf_config", "hf_text_config", "text_config"}
FOR_ALL = ("sglang/srt/configs/model_config.py", "sglang/srt/layers/logits_processor.py",
           "transformers/masking_utils.py", "transformers/configuration_utils.py")
"""Read the configuration of every family."""


def sources(model_type: str) -> list[Path]:
    found = [f"sglang/srt/models/{name}.py" for name in FAMILIES[model_type].engine_modules]
    folder = f"transformers/models/{model_type}"
    if (PACKAGES / folder).is_dir():  # transformers has no bailing_moe
        found += [f"{folder}/modeling_{model_type}.py", f"{folder}/configuration_{model_type}.py"]
    return [PACKAGES / name for name in (*found, *FOR_ALL)]


def keys_read(model_type: str) -> dict[str, str]:
    """Key of config.json -> one place that reads it, for every module of the family."""
    return {key: f"{path.relative_to(PACKAGES)}:{line}" for path in sources(model_type)
            for key, line in _reads(ast.parse(path.read_text()))}


def _reads(tree: ast.Module) -> Iterator[tuple[str, int]]:
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_config(node.value) and id(node) not in called:
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            asked, name = node.args[:2]
            asks = node.func.id in ("getattr", "hasattr", "_hf_attr") and _is_config(asked)
            if asks and isinstance(name, ast.Constant):
                yield name.value, node.lineno


def _is_config(node: ast.expr) -> bool:
    """`config`, `self.config`, `self.model_config.hf_text_config`, ..."""
    return (node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else "") in CONFIGS
