"""One step of curation, from a problem file to a folder with what stays, what goes and why."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.schema import Config
from megatron_rl.data.curation.clean import clean
from megatron_rl.data.curation.contamination import decontaminate
from megatron_rl.data.curation.duplicates import dedup
from megatron_rl.data.curation.items import Item, Split, read_items, write_split
from megatron_rl.launch.local import engines_for, terminable
from megatron_rl.model.architectures import read_config
from megatron_rl.recipes import curate

__all__ = ["run"]


def run(config: Config, options: Namespace) -> dict[str, int]:
    """options: of `megatron-rl data STEP` (cli.py). Returns how many rows were read, kept and removed, by reason."""
    folder = Path(options.out)
    items, bad = read_items(config.data)
    return write_split(folder, _split(config, options, items, folder), bad)


def _split(config: Config, options: Namespace, items: Sequence[Item], folder: Path) -> Split:
    if options.step == "clean":
        return clean(items)
    if options.step == "dedup":
        return dedup(items, threshold=options.threshold, same_numbers=not options.ignore_numbers)
    if options.step == "decontaminate":
        return decontaminate(items, curate.benchmark_problems(options.against), ngram=options.ngram,
                             share=options.share)
    samples = _samples(config, items, options.samples, folder)
    if options.step == "verify":
        return curate.verify(items, config, samples, agreement=options.agreement)
    return curate.difficulty(items, samples, model=config.model.path, keep_always_solved=options.keep_always_solved,
                             keep_never_solved=options.keep_never_solved)


def _samples(config: Config, items: Sequence[Item], number: int, folder: Path) -> list[curate.Sampled]:
    """Judged samples of each problem by the model of model.path, served here or at rollout.engine.urls."""
    if number == 0:
        return []
    read_config(config.model.path)  # ValueError before an engine is started
    folder.mkdir(parents=True, exist_ok=True)
    with terminable(), engines_for(config, config.model.path, folder / "engine.log") as served:
        return curate.sample(items, served, number, folder)
