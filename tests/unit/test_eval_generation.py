"""Finding models, streamed generation, chat sessions, and the commands generate and chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from puna.cli.chat import chat
from puna.cli.generate import generate
from puna.core.errors import PunaError
from puna.eval.chat import ChatSession
from puna.eval.generation import StopTexts, complete, stream
from puna.eval.load import Loaded, find_model, load
from puna.model.config import LlamaConfig
from puna.model.formats.hf import save_hf
from puna.model.llama import Llama
from puna.model.sampling import Sampling
from puna.tokens import bpe
from puna.tokens.tokenizer import Tokenizer

N_SPECIAL = 12
CONFIG = LlamaConfig(
    vocab_size=256 + N_SPECIAL, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48,
    max_seq_len=160,
)  # fmt: skip
GREEDY = Sampling(temperature=0, max_new_tokens=24)
WARM = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=24, seed=3)


def byte_tokenizer() -> Tokenizer:
    """256 bytes and the special tokens, no merges."""
    return Tokenizer(bpe.definition(bpe.train_ranks([], 256, 1), N_SPECIAL), bpe.tokenizer_config())


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Llama(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)  # sharp enough that the most likely token varies
    path = tmp_path_factory.mktemp("models") / "model"
    save_hf(path, CONFIG, model.state_dict())
    byte_tokenizer().save(path)
    return path


@pytest.fixture
def loaded(folder: Path) -> Loaded:
    return load(folder)


def finish(run: Path, stage: str, folder: Path) -> Path:
    (run / stage).mkdir(parents=True)
    (run / stage / "artifact.json").write_text("{}")
    (run / stage / "model").symlink_to(folder)
    return run / stage / "model"


def test_model_is_found_by_folder_stage_run_and_name(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    pretrained = finish(run, "train.pretrain", folder)
    assert find_model(folder) == folder
    assert find_model(run / "train.pretrain") == pretrained
    assert find_model(run) == pretrained
    tuned = finish(run, "post.sft", folder)
    assert find_model(run) == tuned
    assert find_model("first", tmp_path / "runs") == tuned


def test_an_unfinished_stage_is_not_a_model(folder: Path, tmp_path: Path) -> None:
    finish(tmp_path, "post.sft", folder)
    (tmp_path / "post.sft" / "artifact.json").unlink()
    with pytest.raises(PunaError, match="holds no model"):
        find_model(tmp_path)


def test_wrong_paths_are_explained(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="does not exist"):
        find_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(PunaError, match="is a file"):
        find_model(tmp_path / "file")


def test_tokenizer_must_fit_the_model(folder: Path, tmp_path: Path) -> None:
    small = CONFIG.model_copy(update={"vocab_size": 200})
    save_hf(tmp_path, small, Llama(small).state_dict())
    byte_tokenizer().save(tmp_path)
    with pytest.raises(PunaError, match="the tokenizer has 268 ids"):
        load(tmp_path)


def test_model_without_tokenizer_is_explained(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(PunaError, match=r"tokenizer\.json does not exist"):
        load(tmp_path)


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_streamed_text_is_the_whole_text_and_repeats(loaded: Loaded, sampling: Sampling) -> None:
    prompt_ids = loaded.tokenizer.encode("Hi", bos=True)
    pieces = stream(loaded, prompt_ids, sampling)
    texts = []
    while True:
        try:
            texts.append(next(pieces))
        except StopIteration as end:
            done = end.value
            break
    assert len(texts) > 1
    assert "".join(texts) == done.text
    again = complete(loaded, prompt_ids, sampling)
    assert (again.text, again.n_tokens, again.stop_reason) == (
        done.text, done.n_tokens, done.stop_reason,
    )  # fmt: skip
    assert done.n_prompt_tokens == 3


def say_bytes(monkeypatch: pytest.MonkeyPatch, text: str, n_tokens: int | None = None) -> None:
    """Make the model say a text, byte by byte, then a stop token."""

    def fake(
        model: Llama, prompt_ids: list[int], sampling: Sampling, stop_ids: frozenset[int]
    ) -> Iterator[int]:
        tokenizer = byte_tokenizer()
        for token in tokenizer.encode(text)[: sampling.max_new_tokens]:
            assert token not in stop_ids
            yield token

    monkeypatch.setattr("puna.model.generate.generate", fake)


def test_characters_are_never_shown_in_halves(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_bytes(monkeypatch, "é漢🎉")
    assert list(stream(loaded, [1], GREEDY)) == ["é", "漢", "🎉"]


def test_a_cut_character_becomes_a_replacement(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_bytes(monkeypatch, "a漢")
    done = complete(loaded, [1], Sampling(max_new_tokens=3))
    assert done.text == "a\N{REPLACEMENT CHARACTER}"
    assert done.stop_reason == "length"


@pytest.mark.parametrize(
    ("stops", "text", "reason"),
    [
        ((), "one two three", "stop_token"),
        (("two",), "one ", "stop_text"),
        (("three", "two"), "one ", "stop_text"),
        (("two t", "wo"), "one t", "stop_text"),
        (("three!",), "one two three", "stop_token"),
        (("e",), "on", "stop_text"),
    ],
)
def test_stop_texts_end_the_text_and_are_not_shown(
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    stops: tuple[str, ...],
    text: str,
    reason: str,
) -> None:
    say_bytes(monkeypatch, "one two three")
    done = complete(loaded, [1], GREEDY, stops)
    assert (done.text, done.stop_reason) == (text, reason)
    assert "".join(stream(loaded, [1], GREEDY, stops)) == text


def test_text_that_begins_a_stop_is_held_back_only_as_long() -> None:
    stops = StopTexts(["abcd"])
    assert stops.push("xab") == ("x", False)
    assert stops.push("c") == ("", False)
    assert stops.push("abc") == ("abc", False)
    assert stops.push("d.") == ("", True)
    stops = StopTexts(["abcd"])
    assert stops.push("ab") == ("", False)
    assert stops.flush() == "ab"


def test_empty_stop_text_is_refused() -> None:
    with pytest.raises(PunaError, match="stop text is empty"):
        StopTexts([""])


def test_reasons_to_end(loaded: Loaded) -> None:
    prompt_ids = loaded.tokenizer.encode("Hi", bos=True)
    loaded.tokenizer.stop_ids = frozenset()  # random weights may say anything
    whole = complete(loaded, prompt_ids, GREEDY)
    assert (whole.stop_reason, whole.n_tokens) == ("length", GREEDY.max_new_tokens)
    long = complete(loaded, prompt_ids, GREEDY.model_copy(update={"max_new_tokens": 10_000}))
    assert long.stop_reason == "context"
    assert long.n_tokens == CONFIG.max_seq_len - len(prompt_ids) + 1
    said = [token for token, _ in zip(_ids(loaded, prompt_ids), range(6), strict=False)]
    loaded.tokenizer.stop_ids = frozenset({said[5]})
    stopped = complete(loaded, prompt_ids, GREEDY)
    assert stopped.stop_reason == "stop_token"
    assert stopped.n_tokens == said.index(said[5])


def _ids(loaded: Loaded, prompt_ids: list[int]) -> Iterator[int]:
    from puna.model.generate import generate as generate_ids

    return generate_ids(loaded.model, prompt_ids, GREEDY)


def test_too_long_prompt_is_explained(loaded: Loaded) -> None:
    with pytest.raises(PunaError, match="the model's context is 160"):
        complete(loaded, list(range(161)), GREEDY)


def test_chat_keeps_history_in_chat_format(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = []

    def fake(model: Llama, prompt_ids: list[int], *_: object) -> Iterator[int]:
        prompts.append(loaded.tokenizer.decode(prompt_ids))
        return iter(loaded.tokenizer.encode("yes"))

    monkeypatch.setattr("puna.model.generate.generate", fake)
    session = ChatSession(loaded, Sampling(max_new_tokens=8), system="be brief")
    assert "".join(session.ask("one?")) == "yes"
    assert "".join(session.ask("two?")) == "yes"

    def turn(role: str, text: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"

    first = "<|begin_of_text|>" + "<|eot_id|>".join(
        [turn("system", "be brief"), turn("user", "one?"), turn("assistant", "")]
    )
    assert prompts[0] == first
    assert prompts[1].startswith(first + "yes<|eot_id|>" + turn("user", "two?"))
    session.reset()
    assert "".join(session.ask("one?")) == "yes"
    assert prompts[2] == first


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("puna.model.generate.generate", lambda *_: iter([65]))
    session = ChatSession(loaded, Sampling(max_new_tokens=20))
    for number in range(6):
        list(session.ask(f"question {number}"))
        n_tokens = len(loaded.tokenizer.encode_chat(session.turns, add_generation_prompt=False))
        assert n_tokens <= CONFIG.max_seq_len
    assert session.n_forgotten == 2
    assert session.turns[-2]["content"] == "question 5"
    assert session.turns[0]["content"] != "question 0"


def test_chat_refuses_a_message_beyond_the_context_and_goes_on(loaded: Loaded) -> None:
    session = ChatSession(loaded, GREEDY)
    with pytest.raises(PunaError, match="write a shorter message"):
        list(session.ask("x" * 200))
    assert session.turns == []
    list(session.ask("short"))
    assert len(session.turns) == 2


def test_chat_needs_chat_tokens(loaded: Loaded) -> None:
    definition = json.loads(byte_tokenizer()._definition)
    ends = [one for one in definition["added_tokens"] if one["content"].endswith("of_text|>")]
    plain = Tokenizer(json.dumps({**definition, "added_tokens": ends}), bpe.tokenizer_config())
    with pytest.raises(PunaError, match="chat format"):
        ChatSession(Loaded(loaded.model, plain, loaded.folder), GREEDY)


def run_generate(folder: Path, *arguments: str, text: str | None = None) -> SimpleNamespace:
    result = CliRunner().invoke(generate, [str(folder), *arguments], input=text)
    return SimpleNamespace(out=result.stdout, err=result.stderr, error=result.exception)


def test_generate_prints_the_completion(folder: Path, loaded: Loaded) -> None:
    options = ["--temperature", "0", "--max-new-tokens", "24"]
    result = run_generate(folder, "Hi", *options)
    assert result.error is None
    expected = complete(loaded, loaded.tokenizer.encode("Hi", bos=True), GREEDY)
    assert result.out == expected.text + "\n"
    assert "3 + 24 tokens" in result.err
    assert "--max-new-tokens reached" in result.err
    assert run_generate(folder, "-", *options, text="Hi").out == result.out


def test_generate_repeats_a_seed(folder: Path) -> None:
    one, two = (run_generate(folder, "Hi", "--seed", "5", "--temperature", "2") for _ in range(2))
    other = run_generate(folder, "Hi", "--seed", "6", "--temperature", "2")
    assert one.out == two.out != other.out


def test_generate_wrong_input_is_a_user_error(folder: Path, tmp_path: Path) -> None:
    assert isinstance(run_generate(tmp_path / "none", "Hi").error, PunaError)
    assert isinstance(run_generate(folder, "x" * 300).error, PunaError)
    assert isinstance(run_generate(folder, "x", "--stop", "").error, PunaError)
    result = CliRunner().invoke(generate, [str(folder), "Hi", "--top-p", "1.5"])
    assert result.exit_code == 2
    assert "--top-p" in result.stderr


def talk(folder: Path, lines: str, *arguments: str) -> SimpleNamespace:
    result = CliRunner().invoke(chat, [str(folder), *arguments], input=lines)
    return SimpleNamespace(out=result.stdout, err=result.stderr, code=result.exit_code)


def test_chat_through_a_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_prompt_tokens = []

    def fake(model: Llama, prompt_ids: list[int], *_: object) -> Iterator[int]:
        n_prompt_tokens.append(len(prompt_ids))
        return iter(byte_tokenizer().encode("yes"))

    monkeypatch.setattr("puna.model.generate.generate", fake)
    result = talk(folder, "hello\n\n/help\n/what\nmore\n/reset\nhello\n/quit\nnever\n",
                  "--max-new-tokens", "8")  # fmt: skip
    assert result.code == 0
    assert result.out == "yes\nyes\nyes\n"
    assert "unknown command '/what'" in result.err
    first, second, third = n_prompt_tokens
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
    calls = []

    def fake(model: Llama, prompt_ids: list[int], *_: object) -> Iterator[int]:
        calls.append(len(prompt_ids))
        yield from byte_tokenizer().encode("ab")
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("puna.model.generate.generate", fake)
    result = talk(folder, "one\ntwo\n", "--max-new-tokens", "8")
    assert result.code == 0
    assert result.out == "ab ...\nab\n"
    assert calls[1] > calls[0]


def test_a_model_that_was_only_pretrained_is_noted(folder: Path, tmp_path: Path) -> None:
    finish(tmp_path, "train.pretrain", folder)
    assert "pretrained only" in talk(tmp_path, "").err
    assert "pretrained only" not in talk(folder, "").err
