"""A tree's turns become the sequence that is trained on."""

from __future__ import annotations

import numpy as np

from megatron_rl.environment.gateway.tree import Tree, Turn
from megatron_rl.rollout.sampling import GenerateResult
from megatron_rl.types import Finish, VersionSpan


def result(first: int, count: int, version: int, experts: np.ndarray | None) -> GenerateResult:
    ids = np.arange(first, first + count, dtype=np.int32)
    spans = (VersionSpan(version, 0, count),)
    return GenerateResult(ids, -ids.astype(np.float32), Finish.STOP, {}, spans, 0, 0, experts)


def rows(count: int, value: int) -> np.ndarray:
    return np.full((count, 1, 2), value, dtype=np.uint8)


def test_a_path_holds_each_tokens_version_logprob_and_experts_once():
    """Root: 3 given, 2 sampled; then 2 given, 3 sampled: 10 tokens, and experts of all but the last."""
    root = Turn.after(None, (1, 2, 3), result(10, 2, 5, rows(4, 1)), answer={}, history=b"", end="")
    # the engine reports all 9 rows again, the first four of which were known
    leaf = Turn.after(root, (4, 5), result(20, 3, 6, rows(9, 2)), answer={}, history=b"", end="")
    prompt, transcript = leaf.transcript()
    assert prompt == (1, 2, 3) and leaf.token_ids() == [1, 2, 3, 10, 11, 4, 5, 20, 21, 22]
    assert transcript.token_ids.tolist() == [10, 11, 4, 5, 20, 21, 22]
    assert transcript.sampled.tolist() == [True, True, False, False, True, True, True]
    assert transcript.logprobs.tolist() == [-10, -11, 0, 0, -20, -21, -22]
    assert transcript.weight_versions == (VersionSpan(5, 0, 2), VersionSpan(6, 4, 7))
    assert transcript.routed_experts[:, 0, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert sum(len(turn.experts) for turn in leaf.path()) == leaf.tokens - 1, "nothing is kept twice"
    assert leaf.transcript(Finish.LENGTH)[1].finish is Finish.LENGTH
    assert root.transcript()[1].token_ids.tolist() == [10, 11], "a turn never changes"


def test_siblings_share_what_lies_above_them():
    root = Turn.after(None, (1,), result(10, 1, 0, None), answer={}, history=b"", end="")
    one, two = (Turn.after(root, (2,), result(first, 1, 0, None), answer={}, history=b"", end="") for first in (20, 30))
    assert one.token_ids() == [1, 10, 2, 20] and two.token_ids() == [1, 10, 2, 30]
    assert one.path()[0] is two.path()[0] is root and one.transcript()[1].routed_experts is None


def test_every_turn_is_trained_once_over_all_sequences_of_a_tree():
    """The root has two branches. The first branch goes on, the second came last. There is another conversation too.

    The second branch with the root comes first. Then comes the first branch, which has the root as context, and then
    the other conversation.
    """
    def turn(parent, first: int, version: int) -> Turn:
        known = 0 if parent is None else parent.tokens
        tree.add(Turn.after(parent, (first,), result(first + 1, 2, version, rows(known + 2, version)), answer={},
                            history=bytes([first]), end=""))
        return tree.turns[-1]

    tree = Tree()
    root = turn(None, 10, 1)
    one = turn(root, 20, 2)
    turn(one, 30, 3)
    turn(None, 40, 4)
    last = turn(root, 50, 5)
    first, second = tree.others()
    trained = [last.transcript(), first, second]
    assert [prompt for prompt, _ in trained] == [(10,), (10,), (40,)]
    assert [each.token_ids.tolist() for _, each in trained] == [
        [11, 12, 50, 51, 52], [11, 12, 20, 21, 22, 30, 31, 32], [41, 42]]
    assert [each.token_ids[each.sampled].tolist() for _, each in trained] == [
        [11, 12, 51, 52], [21, 22, 31, 32], [41, 42]]
    assert first[1].logprobs.tolist() == [0, 0, 0, -21, -22, 0, -31, -32]
    assert first[1].weight_versions == (VersionSpan(2, 3, 5), VersionSpan(3, 6, 8)), "the root counts once"
    assert first[1].routed_experts[:, 0, 0].tolist() == [1, 1, 2, 2, 2, 3, 3, 3]
    assert len(first[1].routed_experts) == 1 + len(first[1].token_ids) - 1
