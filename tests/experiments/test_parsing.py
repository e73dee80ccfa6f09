"""What can't be parsed is one line, whether the output is a terminal or not."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from diffusionblocks.experiments import cli, parsing
from diffusionblocks.experiments.config import to_yaml
from diffusionblocks.experiments.presets import RUNS


def fails(capsys, *arguments):
    """What the command says on stderr as it ends with code 2."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["dblocks", *map(str, arguments)])
        cli.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [("eval", "Missing from dblocks eval: PATH The run folder, or one that `dblocks export` wrote. (required); see"),
     ("train vit-digits --stpes 3", "unrecognized option --stpes; perhaps --steps; see dblocks train vit-digits"),
     ("train vit-digits --steps abc", "--steps must be a whole number, got abc; see dblocks train vit-digits --help"),
     ("train vit-digits --baseline foo", "invalid choice 'foo' for argument '--baseline'. Expected one of"),
     ("train vit-digits --split 1 a", "--split doesn't take '1 a'; see"),
     ("", "Expected one of {train, resume, eval, sample, predict, plot, export, merge, plan}; see dblocks --help"),
     ("plan", "Expected one of {vit-digits,")],
)  # fmt: skip
def test_a_terminal_gets_the_line_that_a_pipe_gets(arguments, line, capsys, monkeypatch):
    piped = fails(capsys, *arguments.split())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    said = fails(capsys, *arguments.split())
    assert said.startswith(f"dblocks: {line}") and said == piped and "\x1b" not in said


def preset_with(tmp_path, text, preset="vit-fashion-mnist"):
    """A preset's config with the settings of a file."""
    (tmp_path / "mine.yaml").write_text(text)
    made = {}

    def take(runs, texts, **_):
        made.update(runs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing.tyro.extras, "subcommand_type_from_defaults", take)
        parsing.presets_of(["train", *[preset] * bool(preset), "--config", str(tmp_path / "mine.yaml")])
    return made[preset]


def test_a_file_of_some_settings_leaves_the_others_to_the_preset(tmp_path):
    preset = RUNS["vit-fashion-mnist"][1]
    wanted = replace(preset, steps=4, model=replace(preset.model, dim=32))
    assert preset_with(tmp_path, "{steps: 4, model: {dim: 32}}") == wanted
    assert preset_with(tmp_path, to_yaml(wanted)) == wanted


@pytest.mark.parametrize(
    ("text", "fault"),
    [("stesp: 4", "a vit run has no stesp; perhaps steps"), ("model: {dims: 4}", "model has no dims; perhaps dim"),
     ("steps: four", "steps must be a whole number, got 'four'"), ("qqq: 1", "has no qqq; known: lr, steps,"),
     ("architecture: dit", "this is of a dit run: name a preset of that kind")],
)  # fmt: skip
def test_a_fault_of_a_file_names_it_and_the_key(tmp_path, text, fault):
    with pytest.raises(ValueError, match=rf"mine\.yaml: .*{fault}"):
        preset_with(tmp_path, text)
    with pytest.raises(ValueError, match=r"name a preset, too, e\.g\. dblocks train vit-digits --config .*mine\.yaml"):
        preset_with(tmp_path, text, "")


@pytest.mark.parametrize(
    ("command", "columns", "last"),
    [("train", 80, "PRESET"), ("plan", 80, "PRESET"), ("", 60, "COMMAND"), ("", 80, "plan}"), ("eval", 80, "PATH")],
)
def test_a_line_of_usage_fits_into_the_terminal(command, columns, last, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", ["dblocks", *command.split(), "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    usage = capsys.readouterr().out.splitlines()[0]
    assert len(usage) <= columns and last in usage


def test_a_help_has_colours_in_a_terminal_alone(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dblocks", "export", "--help"])
    monkeypatch.setenv("TERM", "xterm-256color")
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        with pytest.raises(SystemExit):
            cli.main()
        stream = SimpleNamespace(isatty=lambda terminal=terminal: terminal, encoding="utf-8")
        assert parsing._Help(stream).isatty() == terminal and parsing._Help(stream).encoding == "utf-8", "for frames"
        assert ("\x1b[" in capsys.readouterr().out) == terminal
