"""Ids are those of the references, byte for byte: a share of ``benchmarks/token_fuzz.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from token_fuzz import (
    Report,
    check_llama3,
    check_sentencepiece,
    llama2_like_model,
    mistral_path,
)

N_TEXTS = 1500
N_HUGE = 3
ALL_TEXTS = 100_000


def check_trained(folder: Path, n: int, n_huge: int | None) -> Report:
    path = folder / "tokenizer.model"
    path.write_bytes(llama2_like_model(1))
    return check_sentencepiece(path, n, 1, n_huge)


def test_llama_3_is_that_of_tiktoken_and_metas_code() -> None:
    report = check_llama3(N_TEXTS, 1, N_HUGE)
    assert (report.n_different, report.n_texts) == (0, N_TEXTS + N_HUGE)


def test_a_sentencepiece_model_is_that_of_sentencepiece() -> None:
    report = check_sentencepiece(mistral_path(), N_TEXTS, 1, N_HUGE)
    assert (report.n_different, report.n_texts) == (0, N_TEXTS + N_HUGE)


def test_a_model_trained_with_llama_2s_options_too(tmp_path: Path) -> None:
    report = check_trained(tmp_path, N_TEXTS, N_HUGE)
    assert (report.n_different, report.n_texts) == (0, N_TEXTS + N_HUGE)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_texts(tmp_path: Path) -> None:
    for report in (
        check_llama3(ALL_TEXTS, 0),
        check_sentencepiece(mistral_path(), ALL_TEXTS, 0),
        check_trained(tmp_path, ALL_TEXTS, None),
    ):
        assert report.n_different == 0
        assert report.n_texts > ALL_TEXTS


def test_a_difference_would_be_seen() -> None:
    report = Report()
    report.compare(["a", "b"], [[1], [2]], [[1], [3]], "made up")
    assert report.n_different == 1
