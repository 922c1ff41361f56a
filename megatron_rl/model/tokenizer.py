"""The tokenizer of a model's folder."""

from __future__ import annotations

from pathlib import Path

from megatron_rl.compat.quick_imports import quick_imports
from megatron_rl.config.schema import ModelConfig
from megatron_rl.model.hf_folder import refuse_code


def load_tokenizer(model: ModelConfig):
    """The tokenizer of the Hugging Face folder model.path; the model's own class is not needed for it."""
    folder = model.path
    refuse_code(folder, trusted=model.trust_remote_code)
    with quick_imports():
        from transformers import AutoTokenizer  # here, because ranks other than 0 have no use for it, and it is slow
        from transformers.utils import logging

    logging.set_verbosity_error()  # it has no class for a bailing_moe, and says so in every process
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (ValueError, OSError) as error:
        files = sorted(path.name for path in Path(folder).glob("*token*"))
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"model.path={folder}: no tokenizer can be read there (files: {', '.join(files) or 'none'}); "
                         f"copy tokenizer.json and tokenizer_config.json into it ({why})") from error
