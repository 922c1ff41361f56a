"""What a rehearsal takes from a finished run's records or from a stated distribution: lengths, and experts' loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.model.network import Network
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.observe.sinks import METRICS

LAST_STEPS = 10
"""Means of records are over this many steps, the last ones."""
LOAD = "router/load_max_over_mean/layer_"
QUANTILES = {"rollout/response_tokens_p10": 0.1, "rollout/response_tokens_p50": 0.5,
             "rollout/response_tokens_p90": 0.9, "rollout/response_tokens_max": 1.0}


@dataclass(frozen=True)
class Lengths:
    """Lengths of responses.

    - name: what a report calls them.
    - quantile: shares in (0, 1) -> tokens, float64 [N].
    - steps: the same of each step that a run recorded; empty: no run did, and all steps are alike.
    """

    name: str
    quantile: Callable[[np.ndarray], np.ndarray]
    steps: tuple[Lengths, ...] = ()

    def draw(self, count: int, longest: int, seed: int = 0) -> np.ndarray:
        """int64 [count] in random order: the quantiles at (i + 0.5) / count, cut at `longest`, at least 1 token.

        So the lengths themselves do not depend on the seed, only their order does.
        """
        values = self.quantile((np.arange(count) + 0.5) / count)
        return np.random.default_rng(seed).permutation(np.clip(np.rint(values), 1, longest).astype(np.int64))


def lengths_of(text: str, rollout: RolloutConfig) -> Lengths:
    """`uniform` (up to rollout.max_response_tokens, as `plan` assumes), `lognormal:MEAN:SIGMA`, `RUN_DIR[:FACTOR]`.

    - MEAN: tokens before the cut at rollout.max_response_tokens. SIGMA: standard deviation of the logarithm.
    - RUN_DIR: a run's folder. FACTOR: how many times as long as there, so that a small run stands for a large one.

    ValueError for other texts.
    """
    kind, *numbers = text.split(":")
    if text == "uniform":
        return Lengths(text, lambda shares: shares * rollout.max_response_tokens)
    if kind == "lognormal":
        try:
            mean, sigma = map(float, numbers)
        except ValueError:
            mean = sigma = 0.0
        if not (mean > 0 and sigma > 0):
            raise ValueError(f"--lengths {text}: write lognormal:MEAN:SIGMA with two positive numbers, such as "
                             "lognormal:12800:0.6")
        normal = NormalDist(np.log(mean) - sigma * sigma / 2, sigma)
        return Lengths(text, lambda shares: np.exp([normal.inv_cdf(share) for share in shares]))
    folder, _, factor = text.rpartition(":")
    if folder and factor.replace(".", "", 1).isdigit():
        if not float(factor):
            raise ValueError(f"--lengths {text}: FACTOR must be above 0, such as {folder}:64")
        return _recorded_lengths(folder, float(factor))
    return _recorded_lengths(text, 1.0)


def _recorded_lengths(folder: str, factor: float) -> Lengths:
    """Those of the run's last steps together, and of all its steps apart."""
    rows = _records("--lengths", folder, "uniform, lognormal:MEAN:SIGMA or a run's folder")
    name = f"as in {folder}" + (f", {factor:g} times as long" if factor != 1 else "")
    return Lengths(name, _through_percentiles(folder, rows[-LAST_STEPS:], factor),
                   tuple(Lengths(f"{name}, step {row.get('step')}", _through_percentiles(folder, [row], factor))
                         for row in rows))


def _through_percentiles(folder: str, rows: list[Mapping[str, Any]], factor: float
                         ) -> Callable[[np.ndarray], np.ndarray]:
    """Through the recorded percentiles, straight in the logarithm; below the first as between the first two."""
    tokens = np.log([max(1.0, factor * _mean("--lengths", folder, rows, key)) for key in QUANTILES])
    shares = np.array(list(QUANTILES.values()))
    floor = tokens[0] - (tokens[1] - tokens[0]) / (shares[1] - shares[0]) * shares[0]
    shares, tokens = np.concatenate([[0.0], shares]), np.concatenate([[max(0.0, floor)], tokens])
    return lambda wanted: np.exp(np.interp(wanted, shares, tokens))


def loads_of(folder: str, network: Network) -> dict[int, float]:
    """Layer number (from 1) of each layer with experts -> rows of its busiest expert over the mean.

    From `router/load_max_over_mean/layer_<i>` of a run's last steps. ValueError if the run has other layers.
    """
    rows = _records("--imbalance", folder, "a number or a run's folder")[-LAST_STEPS:]
    wanted = [layer + 1 for layer in range(network.num_hidden_layers) if not network.is_dense_layer(layer)]
    found = sorted(int(key.removeprefix(LOAD)) for key in rows[-1] if key.startswith(LOAD))
    if found != wanted:
        raise ValueError(f"--imbalance {folder}: the run recorded loads of {len(found)} layers ({_span(found)}), but "
                         f"the model has {len(wanted)} layers with experts ({_span(wanted)}); name a run of this model")
    return {layer: max(1.0, _mean("--imbalance", folder, rows, f"{LOAD}{layer}")) for layer in wanted}


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "none"


def _records(option: str, folder: str, expected: str) -> list[Mapping[str, Any]]:
    file = Path(folder) / METRICS
    if not file.is_file():
        raise ValueError(f"{option} {folder}: expected {expected}, and there is no {file}")
    rows = read_jsonl(file)
    if not rows:
        raise ValueError(f"{option} {folder}: {file} has no step yet")
    return rows


def _mean(option: str, folder: str, rows: list[Mapping[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if key in row]
    if not values:
        raise ValueError(f"{option} {folder}: the last {len(rows)} steps of {METRICS} have no {key}")
    return float(np.mean(values))
