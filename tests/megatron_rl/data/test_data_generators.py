"""The generators: deterministic, split by text, worked responses that are right."""

import re
from collections import Counter
from itertools import islice

import pytest

from megatron_rl.config.schema import DataConfig
from megatron_rl.data import Limits, build_source, chains_tokenizer, gym
from megatron_rl.data.arithmetic import KINDS, SHOTS, Arithmetic
from megatron_rl.data.chains import Chains, is_direct_answer
from megatron_rl.data.gym import Gym
from megatron_rl.data.problems import in_split


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chains_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def value_of(expression):
    """Left to right over +, - and one product: an evaluator apart from the generators' own running total."""
    if "*" in expression:
        left, right = expression.split("*")
        return int(left) * int(right)
    return sum(int(term) for term in re.findall(r"[+-]?\d+", expression.replace(" ", "")))


@pytest.mark.parametrize("kind", [Chains, Arithmetic])
def test_a_problem_depends_on_seed_index_and_split_only(kind):
    forward = [kind(size=50, seed=7, split="train")[i] for i in range(50)]
    source = kind(size=50, seed=7, split="train")
    assert [source[i] for i in reversed(range(50))] == forward[::-1]
    other = kind(size=50, seed=8, split="train")
    assert sum(other[i].text == forward[i].text for i in range(50)) < 10


def test_gym_problems_are_the_same_at_every_access_and_differ_between_neighbouring_seeds():
    config = {"min_terms": 2, "max_terms": 4}
    source = Gym("chain_sum", config, size=100, seed=7, split="all")
    assert source[60] == source[60] == Gym("chain_sum", config, size=9999, seed=7, split="all")[60]
    # reasoning-gym's own seeding gives item i of seed s+1 the text of item i+1 of seed s
    neighbour = Gym("chain_sum", config, size=100, seed=8, split="all")
    assert len({source[i].text for i in range(100)} & {neighbour[i].text for i in range(100)}) < 10


@pytest.mark.parametrize("make", [
    lambda seed, split: Chains(size=2000, seed=seed, split=split),
    lambda seed, split: Arithmetic(size=2000, seed=seed, split=split),
    lambda seed, split: Gym("chain_sum", {"max_terms": 2, "max_digits": 1, "min_digits": 1}, size=100, seed=seed,
                            split=split),
], ids=["chains", "arithmetic", "gym"])
def test_train_and_heldout_share_no_problem_whatever_their_seeds(make):
    def texts(source):
        return Counter(source[i].text for i in range(len(source)))

    train, heldout = texts(make(7, "train")), texts(make(7, "heldout"))
    assert not train.keys() & heldout.keys()
    assert not train.keys() & texts(make(99, "heldout")).keys()
    assert train.keys() & texts(make(99, "train")).keys(), "too little overlap between seeds for this test to mean much"


def test_heldout_is_about_an_eighth():
    share = sum(in_split(f"problem {i}", "heldout") for i in range(8000)) / 8000
    assert abs(share - 1 / 8) < 0.015  # 4 standard errors


@pytest.mark.parametrize("split", ["train", "heldout", "all"])
def test_chains_have_every_length_equally_often_in_each_split(split):
    source = Chains(size=3000, seed=1, split=split)
    lengths = Counter(source[i].metadata["num_operands"] for i in range(3000))
    assert set(lengths) == {2, 3, 4, 5, 6, 7}
    assert all(abs(count - 500) < 100 for count in lengths.values())


def test_longer_chains_have_a_tail():
    source = Chains(size=2000, seed=1, split="all", task_config={"max_operands": 20})
    lengths = sorted(source[i].metadata["num_operands"] for i in range(2000))
    assert (lengths[0], lengths[-1]) == (2, 20)
    assert lengths[1000] <= 6 and lengths[1800] >= 14, "half of them short, a tenth long"


def test_a_tail_of_chains_is_a_bounded_pareto_law_and_log_uniform_in_the_limit():
    """P(N >= k) = (k^-a - 81^-a) / (2^-a - 81^-a), the law that is cut at both ends: 0.488 for k=4, a=1."""
    for tail, shares in ((1.0, {4: 0.488, 8: 0.231, 40: 0.026}), (2.0, {4: 0.249, 8: 0.062, 40: 0.002})):
        source = Chains(size=4000, seed=1, split="all", task_config={"max_operands": 80, "tail": tail})
        lengths = [source[i].metadata["num_operands"] for i in range(4000)]
        assert min(lengths) == 2 and max(lengths) <= 80
        for operands, share in shares.items():  # 4 standard errors
            found = sum(length >= operands for length in lengths) / 4000
            assert abs(found - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 5e-4
    plain, limit = (Chains(size=300, seed=1, split="all", task_config={"max_operands": 80, **tail})
                    for tail in ({}, {"tail": 1e-9}))
    assert [plain[i].text for i in range(300)] == [limit[i].text for i in range(300)]


@pytest.mark.parametrize("wrong", [
    {"longest": 20}, {"tail": 1.0}, {"max_operands": 1}, {"max_operands": 20, "tail": -1},
    {"max_operands": 20, "tail": "1"}])
def test_a_wrong_setting_of_chains_is_named(wrong):
    with pytest.raises(ValueError, match="data.task_config=.*max_operands.*tail"):
        Chains(size=1, seed=1, split="all", task_config=wrong)


def test_chain_answers_and_every_worked_step_are_right():
    source = Chains(size=500, seed=3, split="all")
    for problem in islice(source, 500):
        expression = re.fullmatch(r"Q:([0-9+-]+)\nA:", problem.text).group(1)
        assert value_of(expression) == int(problem.answer)
        assert problem.response.endswith(f"\\boxed{{{problem.answer}}}")
        steps = re.findall(r"(\d+[+-]\d)=(\d+)", problem.response)
        assert all(value_of(left) == int(right) for left, right in steps)
        assert len(steps) in (0, problem.metadata["num_operands"] - 1)
        assert is_direct_answer(problem.response) == (not steps)


def test_one_chain_answer_in_five_is_direct():
    source = Chains(size=2000, seed=3, split="all")
    direct = sum(is_direct_answer(source[i].response) for i in range(2000))
    assert abs(direct / 2000 - 0.2) < 0.04


def test_arithmetic_answers_are_right_and_never_given_by_the_shots():
    source = Arithmetic(size=1000, seed=3, split="all")
    shots = "".join(f"{expression} = {answer}\n" for expression, answer in SHOTS.items())
    kinds = Counter()
    for problem in islice(source, 1000):
        assert problem.text.startswith(shots) and problem.text.endswith(" =")
        expression = problem.text[len(shots):-2]
        assert expression not in SHOTS
        assert value_of(expression) == int(problem.answer)
        kinds[problem.metadata["kind"]] += 1
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 150


def test_chains_tokenizer_round_trips_and_has_96_ids_with_end_of_text_0(tokenizer, tmp_path):
    assert len(tokenizer) == 96 and tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    source = Chains(size=300, seed=5, split="all")
    for problem in islice(source, 300):
        text = problem.text + problem.response
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text and 0 not in ids
    # worked by hand: Q: | 3 | + | 7 | \nA: | so | \boxed{ | 1 | 0 | }
    assert len(tokenizer.encode("Q:3+7\nA: so\\boxed{10}")) == 10
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.encode("Q:12 h+5 min in min\nA:") == tokenizer.encode("Q:12 h+5 min in min\nA:")
    assert reloaded.decode(reloaded.encode("now12*60=720 so")) == "now12*60=720 so"


def test_building_a_large_generated_source_generates_nothing(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(Chains, "__getitem__", lambda self, index: seen.append(index))
    assert len(build_source(DataConfig(source="chains", size=20000), tokenizer, Limits(max_prompt_tokens=64))) == 20000
    assert not seen


def test_sft_example_ends_with_end_of_text(tokenizer):
    source = build_source(DataConfig(source="chains", size=10), tokenizer, Limits(max_prompt_tokens=64))
    prompt, response = source.sft_example(4)
    assert prompt == source.prompt(4) and source.domains == {"math"} == {prompt.domain}
    assert response[-1] == 0 and tokenizer.decode(response[:-1]).endswith(f"\\boxed{{{prompt.answer}}}")
    with pytest.raises(IndexError):
        source.prompt(10)


def test_a_source_without_responses_says_so(tokenizer):
    source = build_source(DataConfig(source="arithmetic", size=10), tokenizer, Limits(max_prompt_tokens=128))
    with pytest.raises(ValueError, match="data.response_key"):
        source.sft_example(0)


def test_a_generated_prompt_over_the_limit_is_an_error_on_access(tokenizer):
    source = build_source(DataConfig(source="arithmetic", size=10, seed=7), tokenizer, Limits(max_prompt_tokens=20))
    with pytest.raises(ValueError, match=r"arithmetic-all-7-3: \d+ tokens[\s\S]*rollout.max_context_tokens"):
        source.prompt(3)


def test_gym_names_the_key_at_fault():
    with pytest.raises(ValueError, match="data.task=codeio is refused"):
        Gym("codeio", {}, size=1, seed=0, split="all")
    with pytest.raises(ValueError, match="data.task=chainsum .* chain_sum"):
        Gym("chainsum", {}, size=1, seed=0, split="all")
    with pytest.raises(ValueError, match="data.task_config=.*min_term"):
        Gym("chain_sum", {"min_term": 2}, size=1, seed=0, split="all")


def test_a_gym_task_without_enough_problems_for_the_split_says_so(monkeypatch):
    everything = Gym("chain_sum", {}, size=50, seed=0, split="all")
    in_train = next(i for i in range(50) if in_split(everything[i].text, "train"))
    assert Gym("chain_sum", {}, size=50, seed=0, split="heldout")[in_train].text != everything[in_train].text
    monkeypatch.setattr(gym, "MAX_DRAWS", 1)
    with pytest.raises(ValueError, match="too few distinct problems for data.split=heldout"):
        Gym("chain_sum", {}, size=50, seed=0, split="heldout")[in_train]
