"""``puna config schema``: types, defaults and names of keys as they are."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from puna.cli.main import cli


def schema_of(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["config", "schema", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ("data.split", "budget_tokens: table of integer = {}"),  # made by a function, not required
        ("data.filter", "default: table = {}"),
        ("data.filter", "sources: table of table = {}"),
        ("data.filter", "sources.*.filters[].name: string (required)"),
        ("data.ingest", "sources: list of table (required)"),
        ("data.ingest", "sources[]<files>.paths: list of string (required)"),
        ("train.pretrain", "fault: table | null = null"),
        ("train.pretrain", "fault.step: integer (required)"),
        ("train.pretrain", 'model: table = {"preset": "demo"}'),
        ("train.pretrain", "schedule<cosine>: table = {}"),  # the default of two
        ("train.pretrain", "schedule<wsd>: table"),
        ("eval.samples", 'sampling: table = {"max_new_tokens": 64}'),
    ],
)
def test_a_key_is_printed_with_its_type_and_default(stage: str, line: str) -> None:
    assert line in schema_of(stage).splitlines()


def test_only_what_must_be_given_is_called_required() -> None:
    top = schema_of().partition("\n[")[0]
    assert re.findall(r"^(\S+): .*\(required\)$", top, re.MULTILINE) == ["name"]


def test_the_json_schema_holds_the_defaults_that_functions_make() -> None:
    properties = json.loads(schema_of("train.pretrain", "--json"))["properties"]
    assert properties["model"]["default"] == {"preset": "demo"} | {
        key: value for key, value in properties["model"]["default"].items() if value is None
    }
    assert properties["weights"]["default"] == {}
