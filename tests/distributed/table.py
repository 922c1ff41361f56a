"""The layouts' errors as a table: rows are layouts, cells the worst relative error of any parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

import tests.distributed.cases as cases
from tests.distributed.reference_step import Reference

RED = "!"
UPDATES = {"plain": "plain", "overlap": "distributed+overlap"}
"""Variant of the worker's result -> heading."""


def table(results: Mapping[str, dict], reference: Reference) -> Iterator[str]:
    """Lines of the table. results: what the worker saved, by layout. An error above the tolerance is marked RED."""
    update = {name: reference.updated[name] - reference.start[name] for name in reference.start}
    headings = [f"{count} micro-batch{'es' * (count > 1)}" for count in cases.MICROBATCHES]
    surrogates = cases.SURROGATES
    yield _row("", "ranks", ["gradient"] * (len(headings) + len(surrogates)) + ["weights after a step"] * len(UPDATES))
    yield _row("layout", "", [*headings, *surrogates, *UPDATES.values()])
    for layout, result in results.items():
        many = "" if cases.microbatch_multiple(layout) == 1 else "*"
        gradients = [_cell(result["gradients"][count], reference.gradients, reference.gradients) + many
                     for count in cases.MICROBATCHES]
        weights = [_cell(result["updated"][variant]["weights"], reference.updated, update) for variant in UPDATES]
        others = [_cell(result["surrogates"][name], reference.surrogates[name], reference.surrogates[name])
                  if cases.holds_whole_sequences(layout) else "-" for name in surrogates]
        yield _row(layout, str(cases.LAYOUTS[layout]["world_size"]), [*gradients, *others, *weights])
    yield (f"||found - expected|| / ||expected||, worst parameter, fp32 against float64; tolerance {cases.TOLERANCE}, "
           f"above it {RED}; of weights: over the size of the update")
    yield "* interleaved stages want a multiple of pp: 2, 2 and 6 micro-batches"
    broken = {(layout, name): worst(found, reference.gradients, reference.gradients)
              for layout, result in results.items() for name, found in result["mutated"].items()}
    if broken:
        layout, name = min(broken, key=broken.get)
        yield (f"{len(broken)} runs with a factor broken on purpose: the smallest error is {broken[layout, name]:.0e} "
               f"({name} in {layout})")


def worst(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor],
          scale: Mapping[str, torch.Tensor]) -> float:
    """Largest relative error of any parameter; NaN counts as infinite."""
    errors = [cases.relative_error(found[name], expected[name], scale[name]) for name in expected]
    return max(error if error == error else float("inf") for error in errors)


def _cell(found, expected, scale) -> str:
    error = worst(found, expected, scale)
    return f"{error:.1e}" + (RED if error > cases.TOLERANCE else "")


def _row(layout: str, ranks: str, cells: list[str]) -> str:
    return f"{layout:18}{ranks:>6}" + "".join(f"{cell:>22}" for cell in cells)
