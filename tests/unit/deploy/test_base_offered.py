"""To whom a server gives its base model."""

from __future__ import annotations

import pytest

from fedtune.config import Listen, parse_config
from fedtune.deploy.server import offers_base


@pytest.mark.parametrize("placement", ["client", "server", "emulator"])
def test_a_base_model_that_stays_at_the_server_is_not_offered(placement: str) -> None:
    vision = ("base.task=visual-question-answering", "adapter.kind=nano")
    sets = [*vision, f"base.placement={placement}"]
    named = parse_config("", "test", [*sets, f'base.digest="{"ab" * 32}"'])
    assert offers_base(Listen(), named) == (placement == "client")
    assert not offers_base(Listen(offer_base=False), named)
    assert not offers_base(Listen(), parse_config("", "test", sets))
