"""Sends weights through a folder that trainer and engines see."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.model.hf_folder import save_tensors
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.sync.buckets import Bucket
from megatron_rl.sync.memory import EngineMemory
from megatron_rl.sync.publish import EnginePublisher

UNSEEN = "Failed to get weights iterator"
"""What SGLang 0.5.23 answers for a folder that is not there or in which it finds no weights
(model_runner_components/weight_updater.py); for one that is not there the rest of its answer is about a "Repo id"."""


class DiskPublisher(EnginePublisher):
    """Writes a Hugging Face folder `folder/version_N` that engine and trainer both see, and has the engines load it.

    config_folder: config.json, the configuration file and the tokenizer are copied from there. The folder appears under
    its name once it is whole. After a success the version before it is removed.
    """

    def __init__(
        self, clients: Sequence[EngineClient], *, bucket_bytes: int, folder: str | Path, config_folder: str | Path,
        memory: EngineMemory | None = None,
    ):
        super().__init__(clients, bucket_bytes=bucket_bytes, memory=memory)
        self._folder = Path(folder).resolve()
        self._config_folder = Path(config_folder)
        self._weight_map: dict[str, str] = {}

    def _unfinished(self, version: int) -> Path:
        return self._folder / f".version_{version}.unfinished"

    async def _begin(self, what: str) -> None:
        self._weight_map = {}

    async def _send(self, bucket: Bucket, version: int, where: str) -> None:
        folder = self._unfinished(version)
        if bucket.index == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        shard = f"model-{bucket.index + 1:05d}.safetensors"
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in bucket.tensors}
        save_tensors(tensors, folder / shard)
        self._weight_map |= dict.fromkeys(tensors, shard)

    async def _finish(self, version: int, what: str) -> None:
        unfinished, finished = self._unfinished(version), self._folder / f"version_{version}"
        for file in self._config_folder.iterdir():
            if file.suffix in (".json", ".py", ".jinja", ".model", ".txt") and "index" not in file.name:
                shutil.copy(file, unfinished / file.name)
        index = {"metadata": {}, "weight_map": self._weight_map}
        (unfinished / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        if finished.exists():
            shutil.rmtree(finished)
        unfinished.rename(finished)

        async def load(client: EngineClient) -> None:
            try:
                await client.update_weights_from_disk(str(finished), version=version)
            except EngineHTTPError as error:
                if UNSEEN not in str(error):
                    raise
                raise EngineHTTPError(
                    f"{client.base_url} does not see {finished}: rollout.publish=disk needs a run.dir that the "
                    f"engine's machine shares under the same name; share it, or choose broadcast ({error})") from error

        await self._on_all(f"{what}: loading {finished}", load)
        for other in self._folder.glob("version_*"):
            if other != finished:
                shutil.rmtree(other)
