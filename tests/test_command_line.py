"""Settings: --help in groups, with the flags as they are, and which of them define a study."""

import dataclasses
import re
from dataclasses import dataclass

import pytest

import experiment
import experiment_7b
from collapse.arms import BY_NAME
from collapse.config import LanguageModelConfig, RunConfig, fingerprint, run_setting
from collapse.measures.layers import POOLINGS
from collapse.utils import command_line
from collapse.utils.command_line import grouped
from studies import collapse_threshold


def help_of(config_type: type, monkeypatch, capsys) -> str:
    monkeypatch.setattr("sys.argv", ["script.py", "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"):
        command_line.parse(config_type, "What the script does.", negative_flags=False)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "config_type", [experiment.Config, experiment_7b.Config, collapse_threshold.Config]
)
def test_help_has_every_flag_once_under_its_own_name(config_type, monkeypatch, capsys):
    text = help_of(config_type, monkeypatch, capsys)
    flags = re.findall(r"^\W{2}--([a-z][a-z-]+)", text, re.MULTILINE)
    expected = [field.name.replace("_", "-") for field in dataclasses.fields(config_type)]
    assert sorted(flags) == sorted(expected) and "What the script does." in text
    monkeypatch.setattr("sys.argv", ["script.py", "--seeds", "7"])
    assert command_line.parse(config_type, "").seeds == (7,)


def test_help_names_every_arm_and_pooling(monkeypatch, capsys):
    words = re.findall(r"[\w-]+", help_of(experiment.Config, monkeypatch, capsys))
    assert {*BY_NAME, *POOLINGS} <= set(words)


def test_groups_and_comments_of_a_subclass(monkeypatch, capsys):
    @dataclass
    class Base:
        # Where it computes.
        device: str = grouped("cpu", "execution")
        # How many
        # in two lines.
        rows: int = 1

    @dataclass
    class Settings(Base):
        # Of this script alone.
        device: str = "gpu"
        # The first and
        # the last.
        first: int = grouped(1, "data")
        last: int = grouped(2, "data")

    text = help_of(Settings, monkeypatch, capsys)
    _, *parts = re.split(r"\n\W*([a-z]+) options\b", text)
    assert parts[::2] == ["study", "data", "execution"]
    study, data, execution = (" ".join(part.split()) for part in parts[1::2])
    assert "How many in two lines." in study
    assert data.count("The first and the last.") == 2
    assert "Of this script alone. (default: gpu)" in execution


def test_a_setting_that_does_not_say_whether_it_defines_the_study_is_refused():
    @dataclass
    class Settings(RunConfig):
        verbose: bool = run_setting(False, "execution")

    @dataclass
    class Silent(RunConfig):
        verbose: bool = False

    assert fingerprint(Settings()) == fingerprint(RunConfig())
    assert {"epochs", "threads", "lora_rank"} <= fingerprint(LanguageModelConfig()).keys()
    with pytest.raises(TypeError, match="verbose"):
        fingerprint(Silent())
