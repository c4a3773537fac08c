"""Bodies of requests: what is understood, ignored and refused, field by field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from puna.serve.errors import ApiError
from puna.serve.schema import ChatBody, CompletionBody, parse

PLAIN = {"model": "m", "prompt": "p"}
USER = {"role": "user", "content": "hi"}


def completion(**fields: Any) -> CompletionBody:
    return parse(CompletionBody, json.dumps({**PLAIN, **fields}).encode())


def chat(**fields: Any) -> ChatBody:
    return parse(ChatBody, json.dumps({"model": "m", "messages": [USER], **fields}).encode())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts(prompt: Any, expected: list[Any]) -> None:
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    "prompt",
    [3, [], {}, [[]], ["a", 1], [1, "a"], [1.5], [True], [[1], "a"], [[1], [True]], [["a"]]],
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(ApiError, match="prompt: give a string") as caught:
        completion(prompt=prompt)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("top_p", 0),
        ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("min_p", 1.1), ("n", 0), ("n", 129),
        ("repetition_penalty", 0), ("presence_penalty", 3), ("frequency_penalty", -3),
        ("max_tokens", -1), ("max_tokens", 2**31), ("max_tokens", "16"), ("max_tokens", True),
        ("logprobs", 21), ("logprobs", True), ("echo", 1), ("stream", "yes"), ("seed", 2**63),
        ("stop", 5), ("stop", ["x"] * 17), ("model", 5),
    ],
)  # fmt: skip
def test_bad_values_name_their_field(name: str, value: Any) -> None:
    with pytest.raises(ApiError, match=f"{name}: .*given: ") as caught:
        completion(**{name: value})
    assert (caught.value.status, caught.value.param) == (400, name)
    assert caught.value.code == "invalid_value"


@pytest.mark.parametrize("stop", [[""], "", ["a", "x" * 257]])
def test_bad_stop_texts_are_refused(stop: Any) -> None:
    with pytest.raises(ApiError, match=r"stop\.\d: "):
        completion(stop=stop)


def test_nulls_mean_the_default() -> None:
    nulls = dict.fromkeys(
        ("max_tokens", "stop", "n", "temperature", "logit_bias", "user", "seed", "stream_options",
         "logprobs", "suffix", "best_of")
    )  # fmt: skip
    assert completion(**nulls) == completion()
    assert completion().max_tokens == 16


def test_labels_are_ignored_and_unused_features_accepted() -> None:
    assert completion(user="u", metadata={"a": "b"}, logit_bias={}, suffix="") == completion()
    assert chat(tools=[], tool_choice="auto", response_format={"type": "text"}, store=True,
                parallel_tool_calls=True, modalities=["text"]) == chat()  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]), ("tool_choice", "required"),
        ("functions", [{}]), ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 1}), ("audio", {}), ("modalities", ["audio"]),
        ("reasoning_effort", "high"), ("web_search_options", {}),
    ],
)  # fmt: skip
def test_features_that_would_change_the_answer_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ApiError, match=f"{name}: not supported by this server") as caught:
        chat(**{name: value})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


def test_unknown_fields_are_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ApiError, match="temprature: unknown field; did you mean temperature") as e:
        completion(temprature=1)
    assert e.value.code == "unknown_parameter"
    with pytest.raises(ApiError, match=r"unknown field$"):
        completion(zzz=1)
    with pytest.raises(ApiError, match="messages: unknown field"):
        completion(messages=[USER])


def test_missing_fields_are_named() -> None:
    with pytest.raises(ApiError, match=r"^prompt: missing$"):
        parse(CompletionBody, b'{"model": "m"}')
    with pytest.raises(ApiError, match=r"^model: missing$"):
        parse(ChatBody, b'{"messages": [{"role": "user", "content": "x"}], "model": null}')


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: 0 is only allowed with echo"),
        ({"best_of": 2}, "best_of: not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options: only allowed with stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x: unknown field"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message):
        completion(**fields)


def test_best_of_may_repeat_n() -> None:
    assert completion(best_of=3, n=3).n == 3


def test_messages_become_what_the_tokenizer_takes() -> None:
    body = chat(
        messages=[
            {"role": "developer", "content": "be brief", "name": None},
            {"role": "assistant", "content": "x", "tool_calls": None, "refusal": None,
             "annotations": []},
            {"role": "tool", "content": "42", "tool_call_id": "1"},
            {"role": "user", "content": [{"type": "text", "text": "a"},
                                         {"type": "text", "text": "b"}]},
        ]
    )  # fmt: skip
    assert [message.to_message() for message in body.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "assistant", "content": "x"},
        {"role": "tool", "content": "42"},
        {"role": "user", "content": "ab"},
    ]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "owner", "content": "x"}, r"messages\.0\.role: "),
        ({"role": "user"}, r"messages\.0\.content: missing"),
        ({"role": "user", "content": 5}, r"messages\.0\.content: "),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
         r"messages\.0\.content\.0\.type: "),
        ({"role": "assistant", "tool_calls": [{}]}, r"messages\.0\.tool_calls: not supported"),
        ({"role": "user", "content": "x", "name": "Ann"}, r"messages\.0\.name: not supported"),
        ("hi", r"messages\.0: "),
    ],
)  # fmt: skip
def test_bad_messages_are_named(message: Any, expected: str) -> None:
    with pytest.raises(ApiError, match=expected):
        chat(messages=[message])


def test_no_messages_are_refused() -> None:
    with pytest.raises(ApiError, match="messages: "):
        chat(messages=[])
    with pytest.raises(ApiError, match="messages: "):
        chat(messages="hi")


def test_top_logprobs_need_logprobs() -> None:
    with pytest.raises(ApiError, match="top_logprobs: only allowed with logprobs"):
        chat(top_logprobs=2)
    assert chat(top_logprobs=2, logprobs=True).top_logprobs == 2


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ApiError) as caught:
        completion(stop="x" * 100_000)
    assert len(caught.value.message) < 200
    with pytest.raises(ApiError) as caught:
        completion(prompt=[1.5] * 100_000)
    assert len(caught.value.message) < 200


def test_errors_have_the_shape_of_openai() -> None:
    error = json.loads(ApiError(400, "bad", param="n", code="c").body)
    assert error == {
        "error": {"message": "bad", "type": "invalid_request_error", "param": "n", "code": "c"}
    }
    assert json.loads(ApiError(500, "x").body)["error"]["type"] == "server_error"
