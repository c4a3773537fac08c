"""The order of stages does not depend on what was imported first."""

from __future__ import annotations

import pytest

from puna.core import stage as stage_module
from puna.core.stage import arrange, stages


def test_stages_stand_in_the_order_of_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.cli.common import STAGE_MODULES, load_stages

    load_stages()
    names = list(stages())
    turned = dict(reversed(stages().items()))
    monkeypatch.setattr(stage_module, "_STAGES", turned)
    assert list(stages()) != names
    arrange(STAGE_MODULES)
    assert list(stages()) == names
