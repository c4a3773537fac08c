"""RefinedWeb's rules in dclm, and RedPajama-V2's signals, from checkouts of these projects.

Both need nltk (for the published values 3.8, whose words are those of `re`); dclm needs uniseg,
retrie, justext, bs4, lxml, unidecode, yaml, transformers and fasttext, too.
Used by `bench_filters.py`.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
from bench_filters import SHOWN_DIFFERENCES, judge
from rich.console import Console

from puna.data.filters.batch import TextBatch
from puna.data.filters.redpajama import SIGNALS, RedPajama
from puna.data.filters.refinedweb import RefinedWeb

ELSEWHERE = {"move_url_modifier", "url_substring_filter", "detect_lang_whole_page_enricher",
             "language_filter"}  # fmt: skip
"""Steps of the configuration that need an address or a model."""


def _bare_package(name: str, folder: Path) -> None:
    """Let modules of a checkout be imported without what the package around them imports."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def dclm(folder: Path, texts: list[str], out: Console) -> int:
    """Compare decisions, reasons and texts; return the number of differences."""
    import yaml

    sys.path[:0] = [str(folder), str(folder / "baselines")]
    _bare_package("core", folder / "baselines/core")
    for name in ("", "core", "mappers", "mappers.filters", "mappers.enrichers"):
        dotted = f"baselines.{name}".rstrip(".")
        _bare_package(dotted, folder / dotted.replace(".", "/"))
    os.chdir(folder)  # the list of domains is opened by a relative path
    modules = [importlib.import_module(f"baselines.mappers.{name}") for name in
               ("filters.content_filters", "modifiers", "enrichers.enrichers")]  # fmt: skip
    configured = yaml.safe_load(Path("baselines/baselines_configs/dclm_baseline_refinedweb.yaml")
                                .read_text(encoding="utf-8"))  # fmt: skip
    steps = []
    for step in configured[0]["steps"]:
        name = step.pop("func")
        if name not in ELSEWHERE:
            function = next(getattr(m, name) for m in modules if hasattr(m, name))
            made = function(**step) if hasattr(function, "_is_factory") else None
            steps.append((name, made or (lambda page, f=function, kw=step: f(page, **kw))))

    def theirs(text: str) -> tuple[str | None, str | None]:
        page: dict[str, Any] = {"text": text}
        for name, function in steps:
            pages = function(page)
            if not pages:
                return name, None
            page = pages[0]
        return None, page["text"]

    mine = RefinedWeb(tlds=folder / "baselines/mappers/iana_tlds.txt")
    judge((mine,), texts[:50])
    start_s = time.process_time()
    verdicts = judge((mine,), texts)
    ours_s, start_s = time.process_time() - start_s, time.process_time()
    results = [theirs(text) for text in texts]
    theirs_s = time.process_time() - start_s
    own = {code.removeprefix("refinedweb.") for code in RefinedWeb.reasons}
    n_different = 0
    for index, (name, text) in enumerate(results):
        reason = (verdicts.reason[index] or "").removeprefix("refinedweb.") or None
        expected = (name or "").removesuffix("_filter") or None
        if expected is None:
            same = reason is None and verdicts.text[index] == text
        elif expected == "massive_web_repetition_filters":
            same = reason is not None and ("share" in reason or "gram" in reason)
        else:
            same = reason == (expected if expected in own else "emptied")
        n_different += not same
        if not same and n_different <= SHOWN_DIFFERENCES:
            out.print(f"DIFFERENT: {reason} {expected} {texts[index][:100]!r}")
    _report("RefinedWeb, dclm", n_different, texts, ours_s, theirs_s, out)
    return n_different


def redpajama(folder: Path, texts: list[str], out: Console) -> int:
    """Compare every signal of every document; return the number of documents that differ."""
    sys.path.insert(0, str(folder / "app/src"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "core"]:
        del sys.modules[name]  # both projects call a package so
    document = importlib.import_module("core.document").Document
    signals = [importlib.import_module(f"core.quality_signals.{name}")
               for name in ("content", "lines", "natural_language", "repetitions")]  # fmt: skip
    words = importlib.import_module("core.quality_signals.utils.stop_words").get_stop_words("en")
    lists = Path(tempfile.mkdtemp())
    (lists / "domain_to_category_id.json").write_text("{}")
    (lists / "en.txt").write_text("error\nhot dog\nthe use of\n")
    (lists / "stop.txt").write_text("\n".join(sorted(words)), encoding="utf-8")
    functions = [
        *signals[0].register_content_callables("en", str(lists), str(lists)),
        *signals[1].register_lines_callables(), *signals[2].register_natural_language_callables(),
        *signals[3].register_repetitions_callables(),
    ]  # fmt: skip
    functions = [function for function in functions if function.field_name in SIGNALS]
    mine = RedPajama(bad_words=lists / "en.txt", stop_words=lists / "stop.txt")

    def measure(part: list[str]) -> dict[str, list[float]]:
        findings = mine.judge(TextBatch(pa.array(part, pa.large_string())))
        return {f.reason.removeprefix("redpajama."): f.value.tolist() for f in findings}

    measure(texts[:50])
    start_s = time.process_time()
    parts = [measure(texts[first : first + 1024]) for first in range(0, len(texts), 1024)]
    found = {name: [value for part in parts for value in part[name]] for name in SIGNALS}
    ours_s, start_s = time.process_time() - start_s, time.process_time()
    results = []
    for text in texts:
        page = document(text, domain=None, precompute_ngrams=True)
        results.append({one.field_name: [value for _, _, value in one(page)] for one in functions})
    theirs_s, n_different = time.process_time() - start_s, 0
    for index, result in enumerate(results):
        wrong = []
        for name, values in result.items():
            value = None if not values or values[0] is None else math.fsum(values) / len(values)
            ours = found[name][index]
            close = abs(ours - (value or 0)) < 2e-8  # sums in another order, rounded
            if not (close if value is not None else math.isnan(ours)):
                wrong.append((name, ours, value))
        n_different += bool(wrong)
        if wrong and n_different <= SHOWN_DIFFERENCES:
            out.print(f"DIFFERENT: {wrong} {texts[index][:100]!r}")
    _report(f"RedPajama-V2, {len(functions)} signals", n_different, texts, ours_s, theirs_s, out)
    return n_different


def _report(
    name: str, n_different: int, texts: list[str], ours_s: float, theirs_s: float, out: Console
) -> None:
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    out.print(f"{name}: {n_different} of {len(texts):,} documents differ; {megabytes / ours_s:.1f} "
              f"MB/s, theirs {megabytes / theirs_s:.2f}, {theirs_s / ours_s:.0f}x")  # fmt: skip
