"""Printed commands mean what they say when pasted, to the shell and then to Hydra."""

import shlex
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nerve.config import pasted, quoted, unquoted

NAMES = [
    *("plain/name-1.2", "a=b", "a,b", "a(1)", "a#b", "~/a", "a~", "a b", " a ", "Größe/λ₁"),
    *("a'b", 'a"b', "a\\b", "a\\", "a\\'b", "\\\\x", "[a]", "{a}", "a:b", "a;b", "a&b", "a|b"),
    *("<a>", "a!b", "12", "1e3", "true", "null", "inf", "a$b", "a*b", "?", "a`b`", "", "-a"),
    "lr=1e-3,seed=0",
]


def parsed(override: str) -> object:
    return OverridesParser.create().parse_overrides([override])[0].value()


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_value_is_that_text_to_hydra(name):
    assert parsed(f"key={quoted(name)}") == name
    assert unquoted(quoted(name)) == name


@pytest.mark.parametrize("name", NAMES)
def test_a_pasted_override_is_that_text_to_hydra_behind_a_shell(name):
    line = pasted("key", name)
    assert parsed(shlex.split(line)[0]) == name
    assert len(shlex.split(line)) == 1


def test_a_shell_agrees(tmp_path):
    line = " ".join(pasted("key", name) for name in NAMES)
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    got = done.stdout.decode().split("\0")[:-1]
    assert [parsed(override) for override in got] == NAMES


def test_quotes_are_few_where_few_are_enough():
    assert pasted("resume", "a=b, (c)") == "\"resume='a=b, (c)'\""


@pytest.mark.parametrize("name", ["outputs/2026-01-01_12-00-00_0a1b2c", "a/b_c.d-e", Path("x/y")])
def test_what_needs_no_quotes_gets_none(name):
    assert pasted("resume", name) == f"resume={name}"
