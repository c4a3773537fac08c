"""The commands generate and chat."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from puna.cli.chat import chat
from puna.cli.generate import generate
from puna.core.errors import PunaError
from puna.lm.engine.types import Event, Request
from puna.lm.language_model import LanguageModel
from puna.lm.load import load
from tests.unit.byte_model import byte_tokenizer, one_thread, save_byte_model  # noqa: F401 - a fixture

GREEDY = ("--temperature", "0", "--max-new-tokens", "24")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("models") / "model")


def run_generate(folder: Path, *arguments: str, text: str | None = None) -> SimpleNamespace:
    result = CliRunner().invoke(generate, [str(folder), *arguments], input=text)
    error = None if isinstance(result.exception, SystemExit) else result.exception
    return SimpleNamespace(out=result.stdout, err=result.stderr, error=error, code=result.exit_code)


def test_generate_prints_the_completion(folder: Path) -> None:
    result = run_generate(folder, "Hi", *GREEDY)
    assert result.error is None
    expected = load(folder).generate("Hi", temperature=0, max_new_tokens=24)
    assert result.out == expected + "\n"
    assert "3 + 24 tokens" in result.err
    assert "--max-new-tokens reached" in result.err
    assert run_generate(folder, "-", *GREEDY, text="Hi").out == result.out
    assert run_generate(folder, "Hi", "--echo", *GREEDY).out == "Hi" + result.out


def test_generate_passes_its_options_on(folder: Path) -> None:
    options = [
        "--repetition-penalty",
        "1.7",
        "--min-p",
        "0.1",
        "--seed",
        "4",
        "--dtype",
        "bfloat16",
    ]
    expected = load(folder, "bfloat16").generate("Hi", repetition_penalty=1.7, min_p=0.1, seed=4)
    assert run_generate(folder, "Hi", *options).out == expected + "\n"


def test_generate_repeats_a_seed(folder: Path) -> None:
    one, two = (run_generate(folder, "Hi", "--seed", "5", "--temperature", "2") for _ in range(2))
    other = run_generate(folder, "Hi", "--seed", "6", "--temperature", "2")
    assert one.out == two.out != other.out


def test_generate_json_has_the_logprobs(folder: Path) -> None:
    result = run_generate(folder, "Hi", "--json", "--logprobs", "2", "--echo", *GREEDY)
    told = json.loads(result.out)
    done = load(folder).complete("Hi", temperature=0, max_new_tokens=24, logprobs=2, echo=True)
    assert (told["prompt"], told["text"]) == ("Hi", done.text)
    assert (told["n_prompt_tokens"], told["n_tokens"]) == (3, 24)
    assert told["stop_reason"] == "length"
    assert [one["id"] for one in told["logprobs"]] == done.ids
    assert told["prompt_logprobs"][0] is None
    assert told["prompt_logprobs"][1]["text"] == "H"
    assert len(told["prompt_logprobs"][2]["top"]) == 2


def test_generate_completes_a_file_of_prompts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("Hi\nthere\nmore\n")
    result = run_generate(folder, "--prompts", str(tmp_path / "prompts"), *GREEDY)
    told = [json.loads(line) for line in result.out.splitlines()]
    expected = load(folder).generate(["Hi", "there", "more"], temperature=0, max_new_tokens=24)
    assert [one["prompt"] for one in told] == ["Hi", "there", "more"]
    assert [one["text"] for one in told] == expected
    assert "3 prompts, " in result.err


def test_generate_wrong_input_is_a_user_error(folder: Path, tmp_path: Path) -> None:
    assert isinstance(run_generate(tmp_path / "none", "Hi").error, PunaError)
    assert isinstance(run_generate(folder, "x" * 300).error, PunaError)
    assert isinstance(run_generate(folder, "x", "--stop", "").error, PunaError)
    gap = tmp_path / "gap"
    gap.write_text("a\n\nb\n")
    assert "line 2 of" in str(run_generate(folder, "--prompts", str(gap)).error)
    gap.write_text("")
    assert "is empty" in str(run_generate(folder, "--prompts", str(gap)).error)
    gap.write_bytes(b"\xff\n")
    assert "cannot be read" in str(run_generate(folder, "--prompts", str(gap)).error)
    missing = str(tmp_path / "none")
    assert "cannot be read" in str(run_generate(folder, "--prompts", missing).error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Hi", "--top-p", "1.5"], "--top-p"),
        ([], "either PROMPT or --prompts"),
        (["Hi", "--prompts", "file"], "either PROMPT or --prompts"),
        (["Hi", "--logprobs", "2"], "--logprobs needs --json"),
    ],
)
def test_generate_wrong_usage(folder: Path, arguments: list[str], message: str) -> None:
    result = run_generate(folder, *arguments)
    assert result.code == 2
    assert message in result.err


class Scripted:
    """An engine that says a text; it may be interrupted in the first one."""

    def __init__(self, text: str, interrupt_after: int | None = None) -> None:
        self.ids, self._interrupt_after = byte_tokenizer().encode(text), interrupt_after
        self.prompts: list[int] = []
        self._left: dict[str, list[int]] = {}

    def submit(self, request: Request) -> None:
        self.prompts.append(len(request.prompt_ids))
        self._left[request.request_id] = list(self.ids)

    def cancel(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    def step(self) -> list[Event]:
        [(name, ids)] = self._left.items()
        if len(self.prompts) == 1 and len(self.ids) - len(ids) == self._interrupt_after:
            raise KeyboardInterrupt
        return [Event(name, ids.pop(0)) if ids else Event(name, None, finish="stop")]


def script(monkeypatch: pytest.MonkeyPatch, engine: Scripted) -> Scripted:
    monkeypatch.setattr(LanguageModel, "engine", lambda *_, **__: engine)
    return engine


def talk(folder: Path, lines: str, *arguments: str) -> SimpleNamespace:
    result = CliRunner().invoke(chat, [str(folder), *arguments], input=lines)
    return SimpleNamespace(out=result.stdout, err=result.stderr, code=result.exit_code)


def test_chat_through_a_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = script(monkeypatch, Scripted("yes"))
    result = talk(folder, "hello\n\n/help\n/what\nmore\n/reset\nhello\n/quit\nnever\n")
    assert result.code == 0
    assert result.out == "yes\nyes\nyes\n"
    assert "unknown command '/what'" in result.err
    first, second, third = engine.prompts
    assert first < second
    assert third == first


def test_chat_ends_at_the_end_of_input(folder: Path) -> None:
    result = talk(folder, "hello", "--max-new-tokens", "3", "--temperature", "0")
    assert result.code == 0
    assert result.out.endswith("\n")
    assert "the answer was cut" in result.err
    assert talk(folder, "").out == ""


def test_chat_explains_a_message_beyond_the_context_and_goes_on(folder: Path) -> None:
    result = talk(folder, "x" * 300 + "\nshort\n", "--max-new-tokens", "3")
    assert result.code == 0
    assert "write a shorter message" in result.err
    assert result.out.strip()


def test_chat_survives_bytes_that_are_no_text(folder: Path) -> None:
    result = CliRunner().invoke(chat, [str(folder), "--max-new-tokens", "2"], input=b"a\xff\xfeb\n")
    assert result.exit_code == 0


def test_interrupt_stops_the_answer_not_the_chat(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = script(monkeypatch, Scripted("ab", interrupt_after=2))
    result = talk(folder, "one\ntwo\n")
    assert result.code == 0
    assert result.out == "ab ...\nab\n"
    assert engine.prompts[1] > engine.prompts[0]


def test_interrupt_ends_generate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, Scripted("ab", interrupt_after=1))
    result = run_generate(folder, "Hi")
    assert (result.code, result.out) == (130, "a\n")


def test_a_model_that_was_only_pretrained_is_noted(folder: Path, tmp_path: Path) -> None:
    stage = tmp_path / "train.pretrain"
    stage.mkdir()
    (stage / "artifact.json").write_text("{}")
    (stage / "model").symlink_to(folder)
    assert "pretrained only" in talk(tmp_path, "").err
    assert "pretrained only" not in talk(folder, "").err
