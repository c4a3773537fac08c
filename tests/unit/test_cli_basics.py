"""The command line: fast help, one clear message for user errors, no torch where none is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from puna.cli.main import entry
from tests.conftest import puna


def test_help_and_registered_stages_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from puna.cli.main import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "assert not {'torch', 'pyarrow', 'pydantic'} & set(sys.modules), 'help is not light'\n"
        "from puna.cli.common import load_stages\n"
        "load_stages()\n"
        "assert not {'torch', 'duckdb', 'ibis', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ('name = "x"\n[data.filtre]\n', ["data.filtre", "did you mean 'filter'"]),
        ('name = "x"\n[data.filter]\nmemory_mb = 1\n', ["memory_mb", "did you mean 'memory_mib'"]),
        ('name = "x"\nseed = "a"\n', ["seed", "got 'a'"]),
        ('name = "x"\n', ["no stage"]),
        ('name = "x"\n[data.filter]\n', ["data.ingest", "not in the recipe"]),
        ('name = = "x"\n', ["line 1"]),
    ],
)
def test_a_wrong_recipe_is_one_message_and_exit_code_2(
    tmp_path: Path, recipe: str, words: list[str]
) -> None:
    (tmp_path / "r.toml").write_text(recipe)
    done = puna(tmp_path, "run", "r.toml")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in ["error:", "fix:", *words]:
        assert word in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_end_of_a_file_is_not_taken_for_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def broken() -> None:
        raise EOFError("no data left in file")

    monkeypatch.setattr("puna.cli.main.cli", broken)
    with pytest.raises(SystemExit) as ended:
        entry([])
    assert ended.value.code == 1
    assert "no data left in file" in capsys.readouterr().err


def test_missing_recipe_and_unknown_command(tmp_path: Path) -> None:
    done = puna(tmp_path, "run", "none.toml")
    assert (done.returncode, "no such recipe" in done.stderr) == (2, True)
    done = puna(tmp_path, "runn")
    assert done.returncode == 2
    assert "No such command" in done.stderr
