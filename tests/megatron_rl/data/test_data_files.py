"""JSONL files: what is read, and that every bad line is named with the key to change."""

import json

import pytest

from megatron_rl.config.schema import DataConfig
from megatron_rl.data import Limits, build_source, chains_tokenizer

CHAT_TEMPLATE = ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
                 "{% if add_generation_prompt %}[assistant]{% endif %}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chains_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def chat_tokenizer(tmp_path):
    tokenizer = chains_tokenizer(tmp_path / "chat")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write(tmp_path, lines):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def build(path, tokenizer, *, max_prompt_tokens=64, **keys):
    return build_source(DataConfig(path=path, **keys), tokenizer, Limits(max_prompt_tokens))


def test_columns_domains_ids_and_metadata_are_taken_from_the_named_columns(tmp_path, tokenizer):
    path = write(tmp_path, [{"q": "3+4", "a": "7", "kind": "easy", "n": 12, "level": 2},
                            "", {"q": "9-4", "a": "5", "kind": "hard", "n": "x", "level": 3}])
    source = build(path, tokenizer, prompt_key="q", answer_key="a", domain_key="kind", id_key="n",
                   prompt_prefix="Q:", prompt_suffix="\nA:")
    first, second = source.prompt(0), source.prompt(1)
    assert (first.id, first.text, first.answer, first.domain) == ("12", "Q:3+4\nA:", "7", "easy")
    assert list(first.token_ids) == tokenizer.encode("Q:3+4\nA:") and first.metadata == {"level": 2}
    assert (second.id, second.domain, source.domains) == ("x", "hard", {"easy", "hard"})
    assert build(path, tokenizer, prompt_key="q", answer_key="a").prompt(1).id == "problems.jsonl:3"


def test_every_bad_line_is_listed_with_its_reason(tmp_path, tokenizer):
    path = write(tmp_path, [
        {"prompt": "3+4", "answer": "7"}, "{not json", ["a", "list"], {"promt": "1+1", "answer": "2"},
        {"prompt": "  ", "answer": "2"}, {"prompt": "1+1", "answer": {"x": 2}}, {"prompt": None, "answer": "2"},
        {"prompt": "\ud800", "answer": "2"}, {"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}])
    with open(path, "ab") as file:
        file.write(b'{"prompt": "\xff", "answer": "1"}\n')
    with pytest.raises(ValueError) as caught:
        build(path, tokenizer)
    reasons = {int(line.split(":")[1]): line for line in str(caught.value).splitlines()[1:]}
    expected = {2: "not JSON", 3: "a JSON list, not an object", 4: "did you mean data.prompt_key=promt?",
                5: "column 'prompt' (data.prompt_key=prompt) is empty", 6: "neither text, a number, nor a list",
                7: "holds NoneType None", 8: "surrogate", 9: "set data.template=chat", 10: "not UTF-8"}
    assert reasons.keys() == expected.keys()
    assert all(reason in reasons[line] for line, reason in expected.items()), reasons
    assert "columns: promt, answer" in reasons[4]


def test_a_long_list_of_bad_lines_ends_in_a_count(tmp_path, tokenizer):
    path = write(tmp_path, ["{"] * 33)
    with pytest.raises(ValueError, match="33 bad line") as caught:
        build(path, tokenizer)
    assert "and 13 more" in str(caught.value) and ":20:" in str(caught.value) and ":21:" not in str(caught.value)


def test_a_repeated_id_names_both_lines(tmp_path, tokenizer):
    path = write(tmp_path, [{"prompt": "1", "answer": "1", "n": 5}, {"prompt": "2", "answer": "2", "n": "5"}])
    with pytest.raises(ValueError, match=r"jsonl:2: id '5' is also on line 1 \(data.id_key=n\)"):
        build(path, tokenizer, id_key="n")


def test_missing_and_empty_files_name_data_path(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="data.path"):
        build(None, tokenizer)
    with pytest.raises(ValueError, match="data.path=.*nothing.jsonl is not a file"):
        build(str(tmp_path / "nothing.jsonl"), tokenizer)
    with pytest.raises(ValueError, match="data.path=.* holds no problem"):
        build(write(tmp_path, [""]), tokenizer)


def test_prompts_over_the_limit_are_listed_with_their_lengths(tmp_path, tokenizer):
    path = write(tmp_path, [{"prompt": "1" * n, "answer": "1"} for n in (5, 6, 7)])
    assert len(build(path, tokenizer, max_prompt_tokens=7)) == 3
    with pytest.raises(ValueError) as caught:
        build(path, tokenizer, max_prompt_tokens=5)
    for part in ("problems.jsonl:2: 6 tokens", "problems.jsonl:3: 7 tokens", "rollout.max_context_tokens",
                 "rollout.max_response_tokens"):
        assert part in str(caught.value)
    assert "problems.jsonl:1:" not in str(caught.value)


def test_split_parts_the_file_by_text_and_defaults_to_all_lines(tmp_path, tokenizer):
    path = write(tmp_path, [{"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(200)])
    ids = {split: {source.prompt(i).id for i in range(len(source))}
           for split in ("train", "heldout", "all") for source in [build(path, tokenizer, split=split)]}
    assert len(ids["all"]) == 200 and len(build(path, tokenizer)) == 200
    assert ids["train"] | ids["heldout"] == ids["all"] and not ids["train"] & ids["heldout"]
    assert 5 < len(ids["heldout"]) < 50


def test_responses_are_trained_on_when_their_column_is_named(tmp_path, tokenizer):
    path = write(tmp_path, [{"prompt": "3+4", "answer": "7", "solution": " so\\boxed{7}"}])
    _, response = build(path, tokenizer, response_key="solution").sft_example(0)
    assert tokenizer.decode(response[:-1]) == " so\\boxed{7}" and response[-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="data.response_key"):
        build(path, tokenizer).sft_example(0)


def test_chat_template_renders_text_and_messages_alike(tmp_path, chat_tokenizer):
    messages = [{"role": "system", "content": "add"}, {"role": "user", "content": "3+4"}]
    path = write(tmp_path, [{"prompt": "3+4", "answer": "7"}, {"prompt": messages, "answer": "7"}])
    source = build(path, chat_tokenizer, template="chat", prompt_suffix=" ?")
    assert source.prompt(0).text == "[user]3+4 ?\n[assistant]"
    assert source.prompt(1).text == "[system]add\n[user]3+4 ?\n[assistant]"
    rendered = chat_tokenizer.apply_chat_template([*messages[:1], {"role": "user", "content": "3+4 ?"}],
                                                  add_generation_prompt=True, return_dict=False)
    assert list(source.prompt(1).token_ids) == rendered


def test_chat_without_a_chat_template_names_data_template(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="data.template"):
        build(write(tmp_path, [{"prompt": "1", "answer": "1"}]), tokenizer, template="chat")


def test_bad_messages_are_named(tmp_path, chat_tokenizer):
    path = write(tmp_path, [{"prompt": [], "answer": "1"}, {"prompt": [{"role": "user"}], "answer": "1"}])
    with pytest.raises(ValueError, match=r"1: .*empty list[\s\S]*2: .*without text in role and content"):
        build(path, chat_tokenizer, template="chat")


def test_the_quickstart_problems_fit_the_chains_tokenizer(tokenizer):
    source = build("examples/quickstart/problems.jsonl", tokenizer, prompt_key="problem", prompt_prefix="Q:",
                   prompt_suffix="\nA:")
    assert len(source) == 20
    assert all(tokenizer.decode(source.prompt(i).token_ids) == source.prompt(i).text for i in range(20))
