"""The example workflow: YAML that parses, whose steps come in order, and whose commands this tinyvad has."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest

from tinyvad.cli import main

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "github-workflow"
WORKFLOW = FOLDER / "tinyvad-budget.yml"


def commands() -> list[list[str]]:
    """Words of every tinyvad command of workflow and README, with the workflow's own variables put in."""
    text = WORKFLOW.read_text() + (FOLDER / "README.md").read_text()
    values = dict(re.findall(r"^  ([A-Z]+): (.*?)(?: #.*)?$", text, re.M))
    found = []
    for line in re.findall(r"^\s+(tinyvad (?:build|profile) .*)$", text, re.M):
        for name, value in values.items():
            line = re.sub(rf'"?\${name}\b"?', value, line)
        line = line.replace('"${limits[@]}"', "--baseline b --max-growth 3%")
        found.append(shlex.split(re.split(r"\s(?:>|\|\|)\s", line)[0]))
    return found


def test_the_commands_exist() -> None:
    found = commands()
    assert len(found) == 5
    for words in found:
        command = main.commands[words[1]]
        options = {name for option in command.params if isinstance(option, click.Option) for name in option.opts}
        used = {word for word in words if word.startswith("--")}
        assert used <= options, words
        assert all("$" not in word for word in words), words
        with click.Context(command) as context:  # parses: values, choices and numbers are right
            command.parse_args(context, words[2:])


def test_growth_fails_after_the_comment() -> None:
    names = re.findall(r"^      - (?:name: |uses: )(.+)$", WORKFLOW.read_text(), re.M)
    order = ["Profile", "Comment on the pull request", "actions/upload-artifact@v4",
             "Fail if something grew or does not fit"]  # fmt: skip
    assert [name for name in names if name in order] == order


def test_it_is_a_workflow() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML to read the example workflow")
    value: dict[Any, Any] = yaml.safe_load(WORKFLOW.read_text())
    assert value[True] == {"pull_request": None}  # YAML 1.1 reads the key `on` as true
    assert value["permissions"] == {"contents": "read", "pull-requests": "write"}
    steps = value["jobs"]["budget"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert {step.get("id") for step in steps} >= {"profile"}


def test_the_shell_parts_are_bash() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML to read the example workflow")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    for step in yaml.safe_load(WORKFLOW.read_text())["jobs"]["budget"]["steps"]:
        if "run" in step:
            done = subprocess.run([bash, "-n"], input=step["run"], text=True, capture_output=True, check=False)
            assert done.returncode == 0, done.stderr
