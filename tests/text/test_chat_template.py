"""What reaches a chat template is what stands in the row."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from data.sources import load_rows
from rlhf.config.data_config import SourceConfig
from rlhf.text.chat_template import encode
from rlhf.text.tokenize_rows import tokenize_demonstration, tokenize_prompt
from rlhf.text.tokenizer import load_tokenizer
from tests import fakes

TOOL_TEMPLATE = """\
{%- for tool in tools or [] %}{{ tool | tojson }}
{% endfor -%}
{{ mood | tojson if mood is defined }}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


def call(arguments):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def tool(parameters):
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


USER = {"role": "user", "content": "hello"}
HI = {"role": "assistant", "content": "hi"}
ROWS = [
    {"messages": [USER, call({"city": "Oslo"})], "tools": [tool({"city": {"type": "string"}})]},
    {
        "messages": [USER, call({"a": 0, "b": 2.0})],
        "tools": [tool({"b": {"type": "number"}, "a": {"type": "number"}}), tool({})],
    },
    {"messages": [USER, call({"city": 7, "z": {"city": [1, "é", None]}})], "chat_template_kwargs": {"mood": {"x": 1}}},
    {"messages": [USER, call({"content": {}, "é": "\u2028"})], "chat_template_kwargs": {"mood": ["y", {"x": "1"}]}},
    {"messages": [USER, call('{"city": "Oslo"}')], "tools": [tool({"type": ["string", "null"], "enum": [1, "a"]})]},
]
NULLS = [
    {"messages": [USER, call({"city": None, "a": [None]})], "tools": [tool({"default": None})]},
    {"messages": [USER, {**call({}), "content": None}], "chat_template_kwargs": {"mood": None}, "tools": []},
]


TEXTS = ["", " ", "hello", "a \n\n<|im_end|>\t<|im_start|>assistant\n", "é\u2028\U0001f600" * 30, "word " * 200]


def _left_as_a_call_left_it(tokenizer):
    tokenizer(["a", "b c"], truncation=True, max_length=2, padding="max_length")


def _split(tokenizer):
    tokenizer.split_special_tokens = True


@pytest.mark.parametrize("change", [lambda tokenizer: None, _left_as_a_call_left_it, _split])
def test_the_tokens_of_a_text_are_those_of_the_tokenizer(chat, change):
    change(chat)
    found = [encode(chat, text) for text in TEXTS]
    assert found == [chat(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert len(found[-1]) > 2
    controls = [chat.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>")]
    assert (set(controls) <= set(found[3])) == (not chat.split_special_tokens)


def test_a_tokenizer_that_changes_texts_first_is_asked_itself(chat):
    plain = encode(chat, "abc")
    chat.__class__ = type(
        "Upper", (type(chat),), {"__call__": lambda self, text, **_: super(type(self), self).__call__(text.upper())}
    )
    assert encode(chat, "abc") == encode(chat, "ABC") != plain


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(fakes.chat_tokenizer(tmp_path_factory.mktemp("chat"), chat_template=TOOL_TEMPLATE)))


def rendered(tokenizer, row):
    """By transformers alone, from what JSON says."""
    row = json.loads(json.dumps(row))
    options = row.get("chat_template_kwargs") or {}
    text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools") or None, tokenize=False, **options)
    return text.rstrip("\n")


def through(file, tokenizer):
    rows = load_rows(SourceConfig(path=str(file)))
    demonstrations = [tokenize_demonstration(tokenizer, row, response_only=True) for row in rows]
    return [tokenizer.decode(tokens.input_ids) for tokens in demonstrations]


def test_tools_arguments_and_options_are_rendered_as_they_stand_in_the_file(tokenizer, tmp_path):
    rows = ROWS + NULLS
    expected = [rendered(tokenizer, row) for row in rows]
    assert sum("null" in text.replace('"null"', "") for text in expected) == 3
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert through(lines, tokenizer) == expected


def test_parquet_has_no_null_that_only_its_schema_wanted(tokenizer, tmp_path):
    rows = [{**row, "chat_template_kwargs": None} for row in ROWS[:2]]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    texts = through(tmp_path / "a.parquet", tokenizer)
    assert not any("null" in text for text in texts)
    assert texts == [rendered(tokenizer, row) for row in rows]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_tools_and_options_may_be_json_text(tokenizer, tmp_path, name):
    row = {
        "prompt": "hello",
        "tools": json.dumps([tool({"default": None})]),
        "chat_template_kwargs": '{"mood": [null]}',
    }
    other = {**row, "tools": json.dumps([tool({"other": 1})]), "chat_template_kwargs": ""}
    file = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(pa.Table.from_pylist([row, other]), file)
    elif name == "a.csv":
        quoted = ['"' + value.replace('"', '""') + '"' for value in [*row.values(), *other.values()]]
        file.write_text("prompt,tools,chat_template_kwargs\n" + ",".join(quoted[:3]) + "\n" + ",".join(quoted[3:]))
    else:
        file.write_text(json.dumps(row) + "\n" + json.dumps(other))
    found = load_rows(SourceConfig(path=str(file)))
    texts = [tokenizer.decode(tokenize_prompt(tokenizer, {**row, "prompt": [USER]})) for row in found]
    assert texts == [
        tokenizer.apply_chat_template(
            [USER], tools=json.loads(row["tools"]), add_generation_prompt=True, tokenize=False, **options
        )
        for row, options in ((row, {"mood": [None]}), (other, {}))
    ]


def test_a_list_of_tools_as_json_texts_is_read(tokenizer):
    row = {"prompt": [USER], "tools": [json.dumps(tool({}))]}
    assert tokenize_prompt(tokenizer, row) == tokenize_prompt(tokenizer, {**row, "tools": [tool({})]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "[{]"}, r"`tools` is '\[\{\]', which is not JSON .*; expected a list, or the JSON of one"),
        ({"tools": "{}"}, r"`tools` is \{\}; expected a list"),
        ({"tools": ["x"]}, "`tools` is 'x', which is not JSON .*; expected a dict"),
        ({"tools": [3]}, "`tools` is 3; expected a dict"),
        ({"tools": "[" * 10_000}, "`tools` is .*, which is not JSON .*recursion"),
        ({"chat_template_kwargs": "[]"}, "`chat_template_kwargs` is .*; expected a dict"),
    ],
)
def test_tools_that_are_none_say_what_they_are(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        tokenize_prompt(tokenizer, {"prompt": [USER], **row})


ASKING = "{% if m['content'] is none %}calls{% for c in m.tool_calls %} {{ c.function.name }}{% endfor %}{% else %}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (ASKING + "{{ m.content }}{% endif %}", "calls f"),  # as DeepSeek's
        (ASKING.replace("is none", "== None") + "{{ m.content }}{% endif %}", "calls f"),
        ("{{ m.content }}.", "."),  # and not None
        ("{{ m.content if 'content' in m }}.", "."),
    ],
)
def test_a_null_content_reaches_the_templates_that_ask_for_it(tmp_path, body, expected):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + body + "<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = load_tokenizer(str(fakes.chat_tokenizer(tmp_path, chat_template=template)))
    for answer in ({**call({}), "content": None}, {k: v for k, v in call({}).items() if k != "content"}):
        tokens = tokenize_demonstration(tokenizer, {"messages": [USER, answer]}, response_only=True)
        assert tokenizer.decode(tokens.input_ids[tokens.num_prompt :]) == expected + "<|im_end|>"
