"""``puna tokens compare``: counts, costs, the point where a larger vocabulary pays, the picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from click.testing import CliRunner

from puna.cli.main import cli
from puna.core.errors import PunaError
from puna.core.units import MIB
from puna.tokens.bpe import definition, tokenizer_config, train_ranks
from puna.tokens.compare import (
    SourceTokens,
    TokenizerComparison,
    count_tokens,
    default_sources,
    own_source,
)
from puna.tokens.tokenizer import Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog and the cat. " * 40


def make(n_ranks: int) -> Tokenizer:
    return Tokenizer(definition(train_ranks([[TEXT]], n_ranks, 2), 12), tokenizer_config())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("compare")
    for name, n_ranks in (("small", 258), ("large", 300)):
        make(n_ranks).save(root / name)
    (root / "texts").mkdir()
    (root / "texts/a.txt").write_text(TEXT)
    (root / "texts/b.md").write_text("the fox\n" * 30)
    return root / "small", root / "large"


def test_counts_are_those_of_the_tokenizers() -> None:
    small, large = make(258), make(300)
    (row,) = count_tokens(small, large, {"x": [TEXT, "fox"]})
    assert row == SourceTokens(
        "x", len(TEXT) + 3, len(small.encode(TEXT)) + len(small.encode("fox")),
        len(large.encode(TEXT)) + len(large.encode("fox")),
    )  # fmt: skip
    assert row.b < row.a
    assert row.bytes_per_token == (row.n_bytes / row.a, row.n_bytes / row.b)
    assert row.saved == pytest.approx(1 - row.b / row.a)
    with pytest.raises(PunaError, match="'x' has no text"):
        count_tokens(small, large, {"x": [""]})


def compared(tokens_b: int, sizes: tuple[int, int] = (32_000, 128_256)) -> TokenizerComparison:
    row = SourceTokens("x", 3000, 1000, tokens_b)
    return TokenizerComparison([row], sizes, 4096, 2, False, 131_072)


def test_the_rows_of_llama_3_cost_1504_mib_more() -> None:
    a, b = compared(800).vocab_bytes
    assert (a / MIB, b / MIB) == (500, 2004)  # the post's +752 MiB for embedding and head each
    tied = TokenizerComparison(compared(800).sources, (32_000, 128_256), 4096, 2, True, 1)
    assert tied.vocab_bytes == (a // 2, b // 2)


def test_at_the_break_even_both_cost_the_same() -> None:
    found = compared(800)
    params = found.break_even_params
    assert params is not None
    cost_a, cost_b = (n * (params + v * 4096) for n, v in ((1000, 32_000), (800, 128_256)))
    assert cost_a == pytest.approx(cost_b)
    cached = found.break_even_cached_bytes
    assert cached is not None
    assert cached / 3000 * (1000 - 800) * 131_072 == pytest.approx(1504 * MIB)
    swapped = TokenizerComparison(
        [SourceTokens("x", 3000, 800, 1000)], (128_256, 32_000), 4096, 2, False, 131_072
    )
    assert swapped.break_even_params == pytest.approx(params)
    assert swapped.break_even_cached_bytes == pytest.approx(cached)


@pytest.mark.parametrize("tokens_b", [1000, 1200])
def test_without_fewer_tokens_it_never_pays(tokens_b: int) -> None:
    assert compared(tokens_b).break_even_params is None
    assert compared(tokens_b).break_even_cached_bytes is None


def test_a_small_difference_pays_at_once() -> None:
    assert compared(500, (32_000, 33_000)).break_even_params == 0


def test_default_sources_are_on_every_machine() -> None:
    sources = default_sources(60_000)
    assert {"code", "reference"} <= {name for name, texts in sources.items() if any(texts)}
    for texts in sources.values():
        assert sum(map(len, texts)) < 1_200_000


def test_own_sources_are_files_or_folders(folders: tuple[Path, Path]) -> None:
    root = folders[0].parent
    assert own_source("x", root / "texts/a.txt", 10**6) == [TEXT]
    assert len(own_source("x", root / "texts", 10**6)) == 2
    assert len(own_source("x", root / "texts", 10)) == 1
    with pytest.raises(PunaError, match="Strange Name"):
        own_source("Strange Name", root / "texts", 10)
    with pytest.raises(PunaError):
        own_source("x", root / "nothing", 10)


def run(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["tokens", "compare", *map(str, arguments)])
    return done.exit_code, done.output + (str(done.exception) if done.exception else "")


def test_the_command_prints_and_draws(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source = f"mine={folders[0].parent / 'texts'}"
    picture = tmp_path / "out/x.svg"
    code, output = run(
        *folders, "--source", source, "--only-own", "--dim", "64", "--picture", picture
    )
    assert code == 0, output
    for word in ("mine", "B/tok A", "270 ids", "306 ids", "embedding and head at width 64"):
        assert word in output
    svg = ET.fromstring(picture.read_text())
    words = " ".join("".join(node.itertext()) for node in svg.iter())
    assert "mine" in words
    assert "306 ids" in words
    assert not [k for node in svg.iter() for k in node.attrib if k.endswith("href")]
    code, output = run(*folders, "--source", source, "--only-own", "--json")
    values = json.loads(output)
    assert [row["name"] for row in values["sources"]] == ["mine"]
    assert values["vocab_size"] == {"a": 270, "b": 306}
    assert values["total"]["tokens"]["b"] < values["total"]["tokens"]["a"]
    code, output = run(*folders, "--source", source, "--only-own", "--tied", "--dtype", "float32")
    assert "shared with the head" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "x"], "NAME=PATH"),
        (["--only-own"], "without --source"),
        (["--picture", "x.png"], "only SVG"),
    ],
)
def test_bad_arguments_are_named(
    folders: tuple[Path, Path], arguments: list[str], words: str
) -> None:
    code, output = run(*folders, *arguments)
    assert code != 0
    assert words in output
