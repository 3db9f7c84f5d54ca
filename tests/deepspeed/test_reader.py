"""Files as people write them, and mistakes with the line they are on."""

import base64
import json

import pytest

from rlhf.deepspeed.dialects import read_deepspeed
from rlhf.deepspeed.reader import parse


def content(text):
    return parse(text, name="f.json").content


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "b": [1, 2.5, -3e2], "c": {"d": null}}', {"a": 1, "b": [1, 2.5, -300], "c": {"d": None}}),
        ('{"a": 1, // one\n "b": 2, # two\n /* three\n lines */ "c": 3,\n}', {"a": 1, "b": 2, "c": 3}),
        ("a: 1\nb: true\nc: auto\n", {"a": 1, "b": True, "c": "auto"}),
        ("{\n  a: 1\n  b: false\n  c: [\n    x\n    y\n  ]\n}", {"a": 1, "b": False, "c": ["x", "y"]}),
        ("{a: 5e8, b: 1e-5, c: 1E3 # thousand\n d: 0.5}", {"a": 500_000_000, "b": 1e-5, "c": 1000, "d": 0.5}),
        ("{a: two words, and a comma\n}", {"a": "two words, and a comma"}),
        ("{device: nvme\nnvme_path: /local/nvme\n}", {"device": "nvme", "nvme_path": "/local/nvme"}),
        ("{a: truely\nb: 1 x\nc: null\n}", {"a": "truely", "b": "1 x", "c": None}),
        (r"""{'a': 'it"s', "b": "\"\\\/\n\tA\u00e9\ud83d\ude00"}""", {"a": 'it"s', "b": '"\\/\n\tA\u00e9\U0001f600'}),
        ("{\n a: '''\n    one\n      two\n    '''}", {"a": "one\n  two"}),
        ("{a: 1, b: [{c: 2}, {c: 3}]}", {"a": 1, "b": [{"c": 2}, {"c": 3}]}),
        ("\ufeff{ }", {}),
        ("{a: {}, }", {"a": {}}),
        ('{"a" : "x"  "b":[ ] }', {"a": "x", "b": []}),
    ],
)
def test_a_file_is_read_by_the_rules_of_hjson(text, expected):
    assert content(text) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1,\n "b": {"c": 1,\n "c": 2}}', r"f\.json:3: b\.c is there twice, first on line 2"),
        ('{"a": 1', r"f\.json:1: is not Hjson: .* in the object that opens on line 1; found the end \(is a bracket"),
        ('{"a": 1,\n"b": {\n"c": 1\n', r"f\.json:4: .* in the object that opens on line 2; found the end"),
        ('{\n"a": [1, 2\n', r"f\.json:3: .* in the object that opens on line 1; found the end"),
        ('{"a": }', r"f\.json:1: .* punctuator .*; found '}'"),
        ('{"a": "x\n}', r"f\.json:1: .* Invalid control character.*; found the end of the line"),
        ('{"a" 1}', r"f\.json:1: .* Expecting ':' delimiter.*; found '1}'"),
        ('{"a": 1}\n}', r"f\.json:2: is not Hjson: Extra data; found '}'"),
        ('{"a": /* 1}', r"f\.json:1: is not Hjson: a comment, or a text in ''', never ends"),
        (r'{"a": "\x"}', r"f\.json:1: .* escape .*; found '.*x\"}'"),
        ("[1]", r"f\.json: found a list; expected an object"),
        ("  ", r"f\.json: found nothing; expected an object"),
        ("# nothing", r"f\.json: found nothing; expected an object"),
        ("{a b: 1}", r"f\.json:1: .* whitespace in your key name .*; found ' b: 1}'"),
        ("a: 1\nb c: 2\n", r"f\.json:2: .* whitespace in your key name .*; found ' c: 2'"),
        ("{a: '''x", "a text in ''', never ends"),
        ("{a: 1e999}", r"f\.json: has too large a number"),
        ("{a: " + "[" * 2000 + "]" * 2000 + "}", "is nested too deeply"),
        ("{a:" * 2000, "is nested too deeply"),
    ],
)
def test_a_mistake_is_answered_with_its_line(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        content(text)


def test_every_key_keeps_its_line():
    text = '{\n # b: 3\n a: {\n\n  b: 1 }\n "c" : # d:\n "b: 2"\n b\n:2 }'
    document = parse(text, name="f.json")
    lines = {("a",): 3, ("a", "b"): 5, ("c",): 6, ("b",): 9}
    assert document.places == {path: f"f.json:{line}" for path, line in lines.items()}
    assert document.where(("a", "b")) == "f.json:5: a.b"


def test_a_file_a_mapping_and_base64_say_the_same(tmp_path):
    text = '{"zero_optimization": {"stage": 2}} // two'
    file = tmp_path / "ds.json"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    sources = [str(file), {"zero_optimization": {"stage": 2}}, base64.urlsafe_b64encode(text.encode()).decode()]
    assert [read_deepspeed(source, setting="engine.deepspeed").content for source in sources] == [
        {"zero_optimization": {"stage": 2}}
    ] * 3


@pytest.mark.parametrize("encode", [base64.urlsafe_b64encode, base64.standard_b64encode, base64.encodebytes])
@pytest.mark.parametrize("padding", ["", "=", "=="])
def test_base64_may_be_longer_than_a_file_name_and_lack_its_end(encode, padding):
    steps = {"steps_per_print": 2000, "_comment": "\u00ff?" * 400}
    text = json.dumps(steps, ensure_ascii=False)
    text += " " * ((len(padding) - len(text.encode())) % 3)
    encoded = encode(text.encode()).decode()
    for source in (encoded, encoded.rstrip("=\n")):
        assert read_deepspeed(source, setting="engine.deepspeed").content == steps


def test_what_is_wrong_in_base64_is_said_as_of_a_file():
    source = base64.urlsafe_b64encode(b'{"a": 1,\n"a": 2}').decode()
    with pytest.raises(ValueError, match=r"engine\.deepspeed \(base64\):2: a is there twice"):
        read_deepspeed(source, setting="engine.deepspeed")


def test_a_name_too_long_for_a_file_is_cut_short_in_the_error():
    with pytest.raises(
        ValueError, match=r"^engine\.deepspeed=x{200}\.\.\.: there is no such file \(looked from [^)]*\)\.$"
    ):
        read_deepspeed("x" * 5000, setting="engine.deepspeed")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "ds_config.json").write_text("{}")
    (tmp_path / "latin.json").write_bytes(b"{a: \xe9\xff}")
    for source, sentence in [
        (str(tmp_path / "ds_confg.json"), r"there is no such file.*Did you mean .*ds_config\.json"),
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "latin.json"), r"latin\.json: is not a text in UTF-8"),
        (3, r"engine\.deepspeed=3: expected a DeepSpeed JSON file"),
        ("", "expected a DeepSpeed JSON file"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            read_deepspeed(source, setting="engine.deepspeed")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"zero_optimization": True}, {"zero_optimization": {"stage": 1}}),
        ({"zero_optimization": False}, {"zero_optimization": {"stage": 0}}),
        ({"bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}),
        ({"bfloat16": {"enabled": True}, "bf16": {"enabled": False}}, {"bf16": {"enabled": False}}),
        (
            {"zero_optimization": {"prefetch_bucket_size": 1, "stage3_gather_fp16_weights_on_model_save": True}},
            {
                "zero_optimization": {
                    "stage3_prefetch_bucket_size": 1,
                    "stage3_gather_16bit_weights_on_model_save": True,
                }
            },
        ),
    ],
)
def test_old_names_and_shapes_become_present_ones(old, new):
    assert read_deepspeed(old, setting="engine.deepspeed").content == new


def test_two_names_of_one_thing_are_refused():
    zero = {"max_live_parameters": 1, "stage3_max_live_parameters": 2}
    with pytest.raises(ValueError, match="is an old name of .*which is there too"):
        read_deepspeed({"zero_optimization": zero}, setting="engine.deepspeed")
