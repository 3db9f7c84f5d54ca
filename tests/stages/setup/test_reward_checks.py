"""What is wrong with reward sources is said before a model is loaded, with the source and what to do about it."""

import json

import pytest

from rlhf.config.reward_config import RewardSettings
from rlhf.config.roles import roles_of
from rlhf.config.run_config import Embedded
from rlhf.models.embedded import prepare
from stages.lifecycle.stage_record import claim_folder, settings_of
from stages.setup.preflight import preflight
from tests.config.test_configuration import composed

CODE = """
def correct(completions, answer, **kwargs):
    return [float(a in c) for c, a in zip(completions, answer)]
def named(completions, answer):
    return [0.0] * len(completions)
def short(completions):
    return [0.0] * len(completions)
number = 3
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return prepare(Embedded.tiny, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def custom(model, tmp_path, monkeypatch):
    """A run of PPO on prompts with answers and functions in `my.py`, ready for `preflight`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(CODE)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"a{n}", "answer": "x"}) + "\n" for n in range(20))
    )

    def make(*overrides, stage="ppo"):
        settings = ["experiment=custom", f"model.path={model}", f"stage={stage}", f"output_dir={tmp_path / 'out'}"]
        rows = f"data.ppo.{'train' if stage == 'ppo' else 'eval'}=[{tmp_path / 'rows.jsonl'}]"
        return composed(*settings, f"{stage}.{'actor' if stage == 'ppo' else 'model'}={model}", rows, *overrides)

    return make


def test_functions_alone_need_no_reward_model(custom):
    run = custom("ppo.rewards=[{source: my.py:correct, weight: 2}, my.py:short]")
    assert preflight(run, ranks=1) == ["ppo"]
    assert [(source.name, source.weight) for source in run.ppo.rewards] == [("correct", 2), ("short", 1)]
    roles = {role.name: role for role in roles_of(run, "ppo")}
    assert set(roles) == {"actor", "reference", "critic"}
    assert (roles["critic"].path, roles["critic"].setting) == (run.ppo.actor, "ppo.actor")


def test_a_model_among_functions_has_a_role_of_its_own(custom):
    run = custom(
        "ppo.rewards=['my.py:short', '/there/rm', '${ppo.reward}']", "ppo.reward=/here/rm2/", "ppo.critic=null"
    )
    roles = {role.name: role for role in roles_of(run, "ppo")}
    assert [*roles] == ["actor", "reference", "reward rm", "reward", "critic"]
    assert str(roles["reward rm"]) == "ppo.rewards[1]=/there/rm"
    assert str(roles["reward"]) == "ppo.reward=/here/rm2/"
    assert (roles["critic"].path, roles["critic"].setting) == ("/there/rm", "ppo.rewards[1]")
    with pytest.raises(ValueError, match=r"^ppo\.rewards\[1\]=/there/rm: there is no such model yet"):
        preflight(run, ranks=1)


@pytest.mark.parametrize(
    ("rewards", "sentence"),
    [
        ("my.py:wrong", r"ppo\.rewards\[0\]=my\.py:wrong: no such function .*'wrong'.*; expected module:function or"),
        ("your.py:correct", r"ppo\.rewards\[0\]=your\.py:correct: there is no file .*/your\.py"),
        ("nowhere:correct", r"ppo\.rewards\[0\]=nowhere:correct: no such function \(No module named 'nowhere'\)"),
        ("my.py:number", r"ppo\.rewards\[0\]=my\.py:number: found a int; expected a function"),
        ("my.py:correct,my.py:correct", r"ppo\.rewards: two sources are called correct; name one, as in \{source: my"),
        (
            "broken.py:f",
            r"broken\.py:f: its module cannot be imported: ModuleNotFoundError: .*'nope' \(broken\.py, line 2\)",
        ),
        ("raising:f", r"raising:f: its module cannot be imported: ZeroDivisionError: .* \(raising\.py, line 1\)"),
        ("needs:f", r"needs:f: its module cannot be imported: ModuleNotFoundError: No module named 'nope'"),
        (
            "my.py",
            r"ppo\.rewards\[0\]=my\.py: no function is named; expected a reward model's path, module:function or",
        ),
        ("{source: my.py:short, weight: .inf}", r"ppo\.rewards\[0\]\.weight='?\.?inf'?: expected a finite number"),
        ("{source: my.py:short, clamp: -1}", r"ppo\.rewards\[0\]\.clamp=-1: expected a finite number, 0 or more"),
        ("{source: my.py:short, normalize: 2}", r"ppo\.rewards\[0\]\.normalize=2: expected true, false or null"),
        ("{source: my.py:short, name: a/b}", r"ppo\.rewards\[0\]\.name='a/b': expected a name for metrics, without"),
        ("{source: my.py:short, weigth: 1}", r"ppo\.rewards\[0\]: unknown \['weigth'\]; expected some of \['source'"),
        ("{weight: 1}", r"ppo\.rewards\[0\]\.source=None: expected a reward model's path"),
        ("3", r"ppo\.rewards\[0\]=3: expected text, or a mapping with the keys"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(custom, tmp_path, rewards, sentence):
    (tmp_path / "broken.py").write_text("import json\nimport nope\n")
    (tmp_path / "raising.py").write_text("1 / 0\n")
    (tmp_path / "needs.py").write_text("import nope\n")
    with pytest.raises(ValueError, match=sentence):
        preflight(custom(f"ppo.rewards=[{rewards}]"), ranks=1)


def test_a_column_that_the_data_lack_is_named_with_those_there_are(custom, tmp_path):
    assert preflight(custom("ppo.rewards=[my.py:named]"), ranks=1) == ["ppo"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "solution": "b", "level": 3}\n' * 20)
    for rewards in ("my.py:named", "my.py:correct"):
        lacks = (
            rf"ppo\.rewards\[0\]={rewards} reads the column `answer`, which data\.ppo\.train lacks; found the further"
        )
        with pytest.raises(
            ValueError, match=rf"^{lacks} columns \['level', 'solution'\].*columns: {{answer: ITS_NAME}}"
        ):
            preflight(custom(f"ppo.rewards=[{rewards}]"), ranks=1)
    renamed = f"data.ppo.train=[{{path: {tmp_path / 'rows.jsonl'}, columns: {{answer: solution}}}}]"
    assert preflight(custom("ppo.rewards=[my.py:named]", renamed), ranks=1) == ["ppo"]
    with pytest.raises(
        ValueError, match=r"^eval\.rewards\[0\]=my\.py:named reads the column `answer`, which the held-out"
    ):
        preflight(custom("eval.rewards=[my.py:named]", *NOTHING, stage="eval"), ranks=1)


NOTHING = ("eval.baseline=null", "eval.reference=null", "eval.reward=null", "eval.judges=[]")


def test_a_reward_model_that_is_named_and_not_used_is_refused(custom):
    with pytest.raises(
        ValueError, match=r"^ppo\.reward=/mine is not among ppo\.rewards, which says what the sources are"
    ):
        preflight(custom("ppo.reward=/mine", "ppo.rewards=[my.py:short]"), ranks=1)


def test_sources_of_an_evaluation_are_checked_too(custom):
    assert preflight(custom("eval.rewards=[my.py:correct]", *NOTHING, stage="eval"), ranks=1) == []
    with pytest.raises(ValueError, match=r"^eval\.rewards\[0\]=my\.py:wrong: no such function"):
        preflight(custom("eval.rewards=[my.py:wrong]", *NOTHING, stage="eval"), ranks=1)
    with pytest.raises(ValueError, match=r"^eval\.rewards\[1\]=/no/model: there is no such model"):
        preflight(custom("eval.rewards=[my.py:correct,/no/model]", *NOTHING, stage="eval"), ranks=1)


def _followed(*words):
    run = composed("experiment=smoke", *words)
    return [(source.source, source.name) for source in run.eval.rewards], run.eval.reward


def test_an_evaluation_follows_the_sources_of_the_policy(tmp_path):
    here, there = (f"output_dir={tmp_path / name}" for name in ("here", "there"))
    usual, mine = f"{tmp_path}/here/reward/model", ("my.py:short", "short")
    own = "ppo.rewards=[{source: my.py:short, weight: 2}, /there/rm]"
    assert _followed("stage=[grpo,eval]", here, own) == ([mine, ("/there/rm", "rm")], None)
    both = "ppo.rewards=[my.py:short,'${ppo.reward}']"
    assert _followed("stage=[ppo,eval]", here, both) == ([mine], usual)  # that is measured by itself
    assert _followed("stage=[ppo,eval]", here) == ([], usual)
    assert _followed("stage=[grpo,eval]", here, own, "eval.rewards=[]") == ([], None)
    again = "eval.rewards=[ppo.rewards,{source: my.py:short, name: again},my.py:long]"
    assert _followed("stage=[grpo,eval]", here, own, again)[0] == [
        *[("/there/rm", "rm"), ("my.py:short", "again"), ("my.py:long", "long")]
    ]
    with pytest.raises(ValueError, match=r"^eval\.rewards: two sources are called short; name one"):
        _followed("stage=[grpo,eval]", here, own, "eval.rewards=[ppo.rewards,other.py:short]")
    # Later, alone: what the folder of the policy says, wherever that is now.
    run = composed("experiment=smoke", "stage=grpo", here, "ppo.rewards=[my.py:short,'${output_dir}/rm']")
    (tmp_path / "here/grpo/best/actor").mkdir(parents=True)
    (tmp_path / "here/grpo/actor").mkdir()
    assert _followed("stage=eval", here) == ([], None)  # without a record
    claim_folder(run, "ppo")
    assert _followed("stage=eval", here) == ([mine, (f"{tmp_path}/here/rm", "rm")], None)
    (tmp_path / "here").rename(tmp_path / "moved")
    for model in ("actor", "best/actor"):
        found = _followed("stage=eval", there, f"eval.model={tmp_path}/moved/grpo/{model}", "eval.reward=null")
        assert found == ([mine, (f"{tmp_path}/moved/rm", "rm")], None)


def test_a_run_that_a_function_has_ended_goes_on_with_failures_left_out(tmp_path):
    def settings(*words):
        sources = "ppo.rewards=[{source: my.py:short, weight: 2}]"
        run = composed("experiment=smoke", "stage=grpo", f"output_dir={tmp_path}", sources, *words)
        return settings_of(run, "ppo")

    assert settings("ppo.reward_on_error=drop") == settings("ppo.reward_timeout_s=9") == settings()
    assert settings("ppo.rewards=[my.py:short]") != settings()


def test_sources_survive_being_written_down():
    settings = RewardSettings(rewards=["a:b.c", {"source": "/x/rm/", "weight": -1}, {"source": "my.py:f", "name": "g"}])
    assert [source.name for source in settings.rewards] == ["c", "rm", "g"]
    assert RewardSettings(rewards=settings.rewards).rewards == settings.rewards
