"""Finding, loading and using language models from Python, and conversations with them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import puna
from puna.core.errors import PunaError
from puna.lm.chat import ChatSession
from puna.lm.engine.types import Event, Request
from puna.lm.language_model import LanguageModel
from puna.lm.load import find_model, load
from puna.lm.text import Completion
from puna.model.formats.hf import save_hf
from puna.model.llama import Llama
from puna.model.sampling import Sampling
from puna.tokens import bpe
from puna.tokens.tokenizer import Tokenizer
from tests.unit.byte_model import (
    CONFIG,
    N_SPECIAL,
    byte_tokenizer,
    one_thread,  # noqa: F401 - a fixture
    save_byte_model,
)

GREEDY = {"temperature": 0, "max_new_tokens": 24}
WARM = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 24, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def lm(folder: Path) -> LanguageModel:
    return load(folder)


@pytest.fixture
def endless(lm: LanguageModel) -> LanguageModel:
    """Random weights may say a stop token; this one goes on."""
    lm.stop_ids = frozenset()
    return lm


class Scripted:
    """An engine that says given ids, and remembers what it was asked."""

    def __init__(self, *answers: list[int]) -> None:
        self._answers = list(answers)
        self._left: dict[str, list[int]] = {}
        self.requests: list[Request] = []
        self.cancelled: list[str] = []

    def submit(self, request: Request) -> None:
        self.requests.append(request)
        answer = self._answers[(len(self.requests) - 1) % len(self._answers)]
        self._left[request.request_id] = answer[: request.sampling.max_new_tokens]

    def cancel(self, request_id: str) -> None:
        if self._left.pop(request_id, None) is not None:
            self.cancelled.append(request_id)

    def step(self) -> list[Event]:
        events = []
        for name, ids in list(self._left.items()):
            if ids:
                events.append(Event(name, ids.pop(0)))
            else:
                del self._left[name]
                events.append(Event(name, None, finish="stop"))
        return events


def scripted(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, *texts: str) -> Scripted:
    engine = Scripted(*(byte_tokenizer().encode(text) for text in texts))
    monkeypatch.setattr(lm, "engine", lambda **_: engine)
    return engine


def drained(pieces: Iterator[str]) -> tuple[list[str], Completion]:
    texts = []
    while True:
        try:
            texts.append(next(pieces))
        except StopIteration as end:
            return texts, end.value


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


def test_a_gguf_file_is_found_by_itself_and_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert find_model(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    assert find_model(tmp_path) == tmp_path
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(PunaError, match="holds no model"):
        find_model(tmp_path)


def test_a_meta_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    assert find_model(tmp_path) == tmp_path


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


def test_tokenizer_must_fit_the_model(tmp_path: Path) -> None:
    small = CONFIG.model_copy(update={"vocab_size": 200})
    save_hf(tmp_path, small, Llama(small).state_dict())
    byte_tokenizer().save(tmp_path)
    with pytest.raises(PunaError, match="the tokenizer has 268 ids"):
        load(tmp_path)


def test_a_model_without_tokenizer_takes_and_gives_ids_only(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    lm = puna.load(tmp_path)
    assert len(lm.generate_ids([1, 2], max_new_tokens=3, temperature=0)) == 3
    with pytest.raises(PunaError, match="has no tokenizer"):
        lm.generate("text")


def test_a_preset_has_random_weights_of_seed_0(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = puna.load("tiny")
    assert torch.equal(lm.model.output_weight, Llama(lm.config).output_weight)
    assert puna.load("tiny", dtype="bfloat16").model.norm.weight.dtype == torch.bfloat16
    assert lm.generate_ids([1], max_new_tokens=3) == lm.generate_ids([1], max_new_tokens=3)
    with pytest.raises(PunaError, match="preset's random model has no tokenizer"):
        lm.generate("text")


def test_a_run_hides_a_preset_of_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(tmp_path / "runs" / "tiny", "post.sft", folder)
    monkeypatch.chdir(tmp_path)
    assert puna.load("tiny").config == CONFIG


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype 'float8' is not known"),
        ({"dtype": torch.int64}, "dtype torch.int64 is not known"),
        ({"quantize": "int3"}, "quantize 'int3' is not known"),
        ({"rope_factor": 8.0}, "rope_factor is given"),
    ],
)
def test_impossible_options_are_explained(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(PunaError, match=message):
        puna.load(folder, **options)


def test_weights_beyond_the_free_memory_are_refused_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PunaError, match=r"weights of llama3\.1-405b need 1\.48 TiB on cpu"):
        puna.load("llama3.1-405b", device="cpu")
    monkeypatch.setattr("puna.lm.engine.memory.free_bytes", lambda _: 1000)
    with pytest.raises(PunaError, match="1000 B are free"):
        puna.load(folder)


def test_dtype_is_float32_on_a_cpu_unless_said_otherwise(folder: Path, tmp_path: Path) -> None:
    save_hf(tmp_path, CONFIG, load(folder).model.state_dict(), dtype=torch.bfloat16)
    assert load(tmp_path, device="cpu").model.norm.weight.dtype == torch.float32
    assert load(tmp_path, dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16


def test_float16_is_refused_where_the_model_overflows(tmp_path: Path) -> None:
    from puna.model.testing import overflowing_llama

    model = overflowing_llama()
    save_hf(tmp_path, model.config, model.state_dict())
    with pytest.raises(PunaError, match="float16"):
        load(tmp_path, dtype="float16")
    load(tmp_path, dtype="bfloat16")


def test_int8_weights_generate_much_the_same(folder: Path) -> None:
    plain, small = puna.load(folder, device="cpu"), puna.load(folder, device="cpu", quantize="int8")
    assert {buffer.dtype for buffer in small.model.buffers()} == {torch.int8, torch.float32}
    ids = [1, 2, 3, 4]
    wanted, got = plain.logits(ids).log_softmax(-1), small.logits(ids).log_softmax(-1)
    assert not torch.equal(wanted, got)
    assert (wanted.exp() - got.exp()).abs().mean() < 0.003
    new = small.generate_ids(ids, **GREEDY)
    rated = small.logits([*ids, *new])  # the compiled step against PyTorch on the same weights
    assert new == rated[3:-1].argmax(-1).tolist()[: len(new)]


def test_stop_ids_are_those_of_tokenizer_and_checkpoint(folder: Path, tmp_path: Path) -> None:
    save_hf(tmp_path, CONFIG, load(folder).model.state_dict(), bos_id=256, eos_ids=[7, 9])
    byte_tokenizer().save(tmp_path)
    assert load(tmp_path).stop_ids == byte_tokenizer().stop_ids | {7, 9}


def test_importing_puna_and_finding_a_model_loads_no_torch() -> None:
    code = "import sys, puna, puna.lm.load, puna.lm.text; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_load_tokenizer(folder: Path) -> None:
    tokenizer = puna.load_tokenizer(str(folder))
    assert tokenizer.decode(tokenizer.encode("Hi")) == "Hi"


def test_logits_are_those_of_the_model(lm: LanguageModel) -> None:
    with torch.inference_mode():
        wanted = lm.model(torch.tensor([[1, 2, 3]]))[0]
    assert torch.equal(lm.logits([1, 2, 3]), wanted)
    assert lm.logits((4,)).shape == (1, CONFIG.vocab_size)


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_streamed_text_is_the_whole_text_and_repeats(lm: LanguageModel, sampling: dict) -> None:
    texts, done = drained(lm.stream("Hi", **sampling))
    assert len(texts) > 1
    assert "".join(texts) == done.text
    again = lm.complete("Hi", **sampling)
    assert (again.text, again.ids, again.stop_reason) == (done.text, done.ids, done.stop_reason)
    assert done.n_prompt_tokens == 3
    assert lm.generate("Hi", **sampling) == done.text
    assert lm.generate_ids(lm.tokenizer.encode("Hi", bos=True), **sampling) == done.ids
    assert done.tokens_per_s > 0


def test_several_prompts_are_computed_together_with_seeds_that_count_on(lm: LanguageModel) -> None:
    texts = ["Hi", "there", "Hi"]
    together = lm.generate(texts, **WARM)
    alone = [lm.generate(text, **{**WARM, "seed": 3 + i}) for i, text in enumerate(texts)]
    assert together == alone
    assert together[0] != together[2]
    each = [done.text for done in lm.complete_each(texts, **WARM)]
    assert each == together
    asked = [[{"role": "user", "content": text}] for text in texts]
    assert lm.generate(asked, **WARM)[0] == lm.generate(asked[0], **WARM)
    ids = [lm.tokenizer.encode(text, bos=True) for text in texts]
    assert lm.generate(ids, **WARM) == together


def test_prompts_become_ids_with_one_begin_token(lm: LanguageModel) -> None:
    tokenizer = lm.tokenizer
    assert lm.encode_prompt("Hi") == [tokenizer.bos_id, *tokenizer.encode("Hi")]
    messages = ({"role": "user", "content": "Hi"},)
    assert lm.encode_prompt(messages) == tokenizer.encode_chat(list(messages))
    assert lm.encode_prompt([5, 6]) == [5, 6]
    assert lm.encode_prompt(torch.tensor([5, 6]).tolist()) == [5, 6]
    with pytest.raises(PunaError, match="prompt is empty"):
        lm.encode_prompt([])


def test_stop_text_ends_the_request(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scripted(lm, monkeypatch, "one two three")
    done = lm.complete("say", stop=["two", "ee"])
    assert (done.text, done.stop_reason, done.n_tokens) == ("one ", "stop_text", 7)
    assert len(engine.cancelled) == 1
    texts, done = drained(lm.stream("say", stop=("ee",)))
    assert ("".join(texts), done.stop_reason) == ("one two thr", "stop_text")
    assert lm.complete("say").stop_reason == "stop_token"


def test_reasons_to_end(endless: LanguageModel) -> None:
    whole = endless.complete("Hi", **GREEDY)
    assert (whole.stop_reason, whole.n_tokens) == ("length", 24)
    long = endless.complete("Hi", temperature=0, max_new_tokens=10_000)
    assert long.stop_reason == "context"
    assert long.n_tokens == CONFIG.max_seq_len - 3 + 1
    endless.stop_ids = frozenset({whole.ids[5]})
    stopped = endless.complete("Hi", **GREEDY)
    assert stopped.stop_reason == "stop_token"
    assert stopped.n_tokens == whole.ids.index(whole.ids[5])


def test_logprobs_and_echo(endless: LanguageModel) -> None:
    plain = endless.complete("Hi", **GREEDY)
    assert plain.logprobs is plain.prompt_logprobs is None
    done = endless.complete("Hi", logprobs=2, echo=True, **GREEDY)
    assert done.text == "Hi" + plain.text
    assert done.logprobs is not None
    assert done.prompt_logprobs is not None
    wanted = endless.logits(done.prompt_ids + done.ids).log_softmax(-1)
    rated = [*done.prompt_logprobs, *done.logprobs]
    assert rated[0] is None
    for place, (id_, one) in enumerate(zip(done.prompt_ids + done.ids, rated, strict=True)):
        if one is not None:
            assert one.id == id_
            assert one.logprob == pytest.approx(wanted[place - 1, id_].item(), abs=1e-3, rel=1e-3)
            assert len(one.top) == 2
    assert endless.complete("Hi", logprobs=0, **GREEDY).prompt_logprobs is None
    assert endless.complete("Hi", echo=True, **GREEDY).text == done.text


def test_streams_run_side_by_side_and_end_when_nobody_listens(endless: LanguageModel) -> None:
    first = endless.stream("Hi", **{**GREEDY, "max_new_tokens": 100})
    second = endless.stream("there", **GREEDY)
    shown = [next(first), next(second), next(first)]
    assert all(shown)
    assert endless.generate("Hi", **GREEDY).startswith(shown[0])
    engine = endless._engine
    assert engine is not None
    first.close()
    assert "".join([shown[1], *second]) == endless.generate("there", **GREEDY)
    while engine.has_work:
        engine.step()
    assert engine.stats.used_blocks == 0
    assert engine.stats.finished_total["cancelled"] == 1


def test_threads_share_the_engine(endless: LanguageModel) -> None:
    prompts = [f"prompt {i}" for i in range(6)]
    wanted = [endless.generate(prompt, **WARM) for prompt in prompts]
    got: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda p=p: got.update({p: endless.generate(p, **WARM)}))
        for p in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[prompt] for prompt in prompts] == wanted


def test_bad_prompts_and_settings_are_explained(lm: LanguageModel) -> None:
    with pytest.raises(PunaError, match="the model's context is 160"):
        lm.complete(list(range(161)))
    with pytest.raises(PunaError, match="the model's context is 160"):
        lm.complete(["fine", "x" * 200])
    with pytest.raises(ValueError, match="temperature"):
        lm.generate("Hi", temperature=-1)
    with pytest.raises(PunaError, match="stop text is empty"):
        lm.generate("Hi", stop=[""])
    assert lm.generate("Hi", **GREEDY)  # nothing is stuck


def test_a_broken_model_is_one_clear_error(folder: Path) -> None:
    lm = load(folder)
    with torch.no_grad():
        lm.model.norm.weight.fill_(float("nan"))
    with pytest.raises(PunaError, match="not finite"):
        lm.generate("Hi")


def test_chat_keeps_history_in_chat_format(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = scripted(lm, monkeypatch, "yes")
    session = ChatSession(lm, Sampling(max_new_tokens=8), system="be brief")
    assert "".join(session.ask("one?")) == "yes"
    assert "".join(session.ask("two?")) == "yes"

    def turn(role: str, text: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"

    def prompt(number: int) -> str:
        return lm.tokenizer.decode(engine.requests[number].prompt_ids)

    first = "<|begin_of_text|>" + "<|eot_id|>".join(
        [turn("system", "be brief"), turn("user", "one?"), turn("assistant", "")]
    )
    assert prompt(0) == first
    assert prompt(1).startswith(first + "yes<|eot_id|>" + turn("user", "two?"))
    session.reset()
    assert "".join(session.ask("one?")) == "yes"
    assert prompt(2) == first
    assert [request.sampling.seed for request in engine.requests] == [0, 1, 0]


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(lm, monkeypatch, "A")
    session = ChatSession(lm, Sampling(max_new_tokens=20))
    for number in range(6):
        list(session.ask(f"question {number}"))
        n_tokens = len(lm.tokenizer.encode_chat(session.turns, add_generation_prompt=False))
        assert n_tokens <= CONFIG.max_seq_len
    assert session.n_forgotten == 2
    assert session.turns[-2]["content"] == "question 5"
    assert session.turns[0]["content"] != "question 0"


def test_chat_refuses_a_message_beyond_the_context_and_goes_on(lm: LanguageModel) -> None:
    session = ChatSession(lm, Sampling(temperature=0, max_new_tokens=24))
    with pytest.raises(PunaError, match="write a shorter message"):
        list(session.ask("x" * 200))
    assert session.turns == []
    list(session.ask("short"))
    assert len(session.turns) == 2


def test_chat_needs_chat_tokens(lm: LanguageModel) -> None:
    definition = json.loads(bpe.definition(bpe.train_ranks([], 256, 1), N_SPECIAL))
    ends = [one for one in definition["added_tokens"] if one["content"].endswith("of_text|>")]
    config = {**bpe.tokenizer_config(), "chat_template": None}
    plain = Tokenizer(json.dumps({**definition, "added_tokens": ends}), config)
    with pytest.raises(PunaError, match="chat"):
        ChatSession(LanguageModel(lm.model, plain), Sampling())
