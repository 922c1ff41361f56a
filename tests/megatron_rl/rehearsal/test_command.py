"""`megatron-rl rehearse` on the command line."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import re

import pytest

from megatron_rl.cli import main, parse
from megatron_rl.config.load import build
from megatron_rl.rehearsal import command
from tests.megatron_rl.rehearsal.tiny import NETWORK, tiny_config

RING = ["rehearse", "experiment=ring_lite_rl_stage1"]


def test_ranks_are_words_of_the_command_and_no_keys():
    assert (parse([*RING, "rank=137"]).ranks, parse([*RING, "rank=137"]).overrides) == ([137], RING[1:])
    assert parse([*RING, "ranks=stages", "--json", "x.json"]).ranks == []
    assert parse(RING).ranks == [0]


@pytest.mark.parametrize(("words", "message"), [
    (["rank=x"], "rank=x must be a rank's number"),
    (["ranks=all"], "only ranks=stages"),
    (["rank=1", "ranks=stages"], "one of rank=N and ranks=stages"),
])
def test_other_ranks_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parse([*RING, *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["rank=256"], "rank=256: parallel.world_size=256 has the ranks 0 to 255"),
    (["--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: there is no folder"),
    (["parallel.tp=3"], "parallel.tp"),
    (["--engines", "8"], "--engines 8 says how many engines --collectors simulates"),
    (["--layouts", "2", "--lengths", "uniform"], "--layouts does not read --lengths"),
    (["--layouts", "2", "--imbalance", "1.3"], "--layouts does not read --imbalance"),
    (["--collectors", "--trace", "x.json"], "--collectors does not read --trace"),
    (["--collectors", "--layouts", "2"], "--layouts does not read --collectors"),
    (["--calibrate", "x.json", "--page", "x.html"], "--calibrate does not read --page"),
    (["--collectors", "rollout.engine.mem_fraction_static=0.1"], "raise rollout.engine.tp"),
    (["--lengths", "gamma:3"], "--lengths gamma: expected uniform, lognormal:MEAN:SIGMA or a run's folder"),
    (["--imbalance", "no/run"], "there is no no/run/metrics.jsonl"),
    (["parallel.token_dispatcher=allgather"], "parallel.token_dispatcher=allgather cannot be rehearsed"),
])
def test_bad_input_is_named_before_anything_runs(words, message, capsys):
    assert main([*RING, *words]) == 2
    assert message in capsys.readouterr().err


def looks_as_recorded(page, ranks):
    """The plot rises to the peak of each rank, the clock's parts lie side by side, and the tables name the lines."""
    curves = [json.loads(html.unescape(numbers)) for numbers in re.findall(r'data-numbers="([^"]*)"', page)]
    highest = [max(value for line in curve["lines"] for value in line["values"]) for curve in curves]
    assert highest == pytest.approx([each["peak"]["bytes"] / 1e9 for each in ranks], rel=0.011)  # the curve's grain
    bars = re.findall(r"rank (\d+)</span>(.*?)</div></div>", page)
    assert [int(rank) for rank, _ in bars] == [each["rank"] for each in ranks]
    for _, bar in bars:
        parts = [tuple(map(float, part)) for part in re.findall(r"left:([\d.]+)%;width:([\d.]+)%", bar)]
        assert len(parts) > 2 and all(left + width <= nextleft + 0.01 for (left, width), (nextleft, _)
                                      in itertools.pairwise([*parts, (100.0, 0.0)]))
    for each in ranks:
        assert f"<h2>Rank {each['rank']}</h2>" in page
        assert html.escape(each["census"][each["peak"]["phase"]][0]["where"]) in page


@pytest.mark.parametrize("vpp", [None, 2])  # interleaved stages ask for messages ahead of their use
def test_text_and_json_tell_of_every_distinct_rank(vpp, tmp_path, capsys):
    file = tmp_path / "stages.json"
    trace, page = tmp_path / "trace.json", tmp_path / "page.html"
    command.run(tiny_config(world_size=4, tp=2, pp=2, vpp=vpp), dataclasses.replace(NETWORK, num_hidden_layers=4),
                [], json_file=str(file), trace_file=str(trace),
                page_file=str(page))
    ranks = json.loads(file.read_text())["ranks"]
    assert [each["rank"] for each in ranks] == [0, 2]
    text = capsys.readouterr().out
    for each in ranks:
        peak = each["peak"]["bytes"]
        assert sum(each["peak"]["kinds"].values()) == peak == each["phases"][each["peak"]["phase"]]["peak_bytes"]
        assert f"rank       {each['rank']} of 4: tp=2 pp=2 {f'vpp={vpp} ' if vpp else ''}dp=1" in text
    drawn = json.loads(trace.read_text())["traceEvents"]
    assert {event["pid"] for event in drawn if event["name"] == "compute"} == {0, 2}
    assert {event["pid"] for event in drawn if event["name"] == "wait"} == {0, 2}  # each for the other's messages
    looks_as_recorded(page.read_text(encoding="utf-8"), ranks)
    slowest = max(ranks, key=lambda each: each["phases"]["update"]["elapsed"])
    assert f"slowest    rank {slowest['rank']}" in text


def test_layouts_are_put_into_the_order_of_their_seconds(tmp_path, capsys):
    file = tmp_path / "layouts.json"
    command.compare_layouts(tiny_config(world_size=2, ep=2), NETWORK, count=1, json_file=str(file))
    found = json.loads(file.read_text())["layouts"]
    assert len(found) == 2 and [each["asked"] for each in found] == [True, False]
    seconds = {each["layout"]: max(sum(rank["step_seconds"].values()) for rank in each["ranks"]) for each in found}
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith(tuple(seconds))]
    names = [next(name for name in seconds if line.startswith(name)) for line in table]
    assert names == sorted(seconds, key=seconds.get)
    for rank in found[0]["ranks"]:
        update, parts = rank["phases"]["update"]["seconds"], rank["microbatch_seconds"]
        assert {name for name in update if parts[name] != update[name]} == {"nvlink"}  # gradients, once a step


def test_whole_steps_are_compared_for_every_collector_and_place_of_the_engines(tmp_path, capsys):
    config = build({"algo": {"phi": 64, "scope": "global"}, "parallel": {"world_size": 2},
                    "model": {"dtype": "bfloat16"}, "batch": {"tokens_per_microbatch": 96},
                    "rollout": {"prompts_per_step": 4, "responses_per_prompt": 2, "max_context_tokens": 64,
                                "max_response_tokens": 48, "slice_tokens": 8}})
    file, page = tmp_path / "steps.json", tmp_path / "steps.html"
    command.compare_collectors(config, NETWORK, [0], engines=3, json_file=str(file), page_file=str(page))
    rows = json.loads(file.read_text())["collectors"]
    assert [(row["collector"], row["gpus"], row["engines"]) for row in rows] == [
        ("sync", 2, 2), ("sync", 5, 3), ("budgeted", 2, 2), ("budgeted", 5, 3), ("partial", 2, 2), ("partial", 5, 3),
        ("async", 5, 3)]
    assert {row["trained"] for row in rows} == {64.0}
    text, html_text = capsys.readouterr().out, page.read_text(encoding="utf-8")
    for row in rows:
        assert row["seconds"] == pytest.approx(row["rollout"] + row["train"] + row["publish"])
        assert row["steps_per_day"] == pytest.approx(86400 / row["seconds"])
        assert f"{row['steps_per_day']:,.0f}" in text and f"{row['steps_per_day']:,.0f}" in html_text
