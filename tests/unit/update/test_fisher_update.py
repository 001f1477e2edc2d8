"""What is left of a Fisher merge after clip and rounding, with the numbers of the preset."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregate import FisherRule, MomentumRule
from fedtune.config import Config, load_preset
from fedtune.errors import TrainingError
from fedtune.round.federation import make_rule
from fedtune.round.terms import fisher_scale, make_quantizer
from fedtune.update.fisher import weigh, weights

SIZE = 81_813  # MiniLM at rank 8 with 21 labels
EXAMPLES = (690, 320, 380, 430, 410, 540, 370, 230)  # the preset's eight clients
START = np.zeros(SIZE, np.float32)


def _client(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An update and a Fisher information as they were measured in the preset's first round.

    Of length 9, its values about alike; and half of them below a twentieth of the mean, the
    largest hundredth above 20 means.
    """
    update = rng.normal(size=SIZE)
    fisher = np.exp(2.5 * rng.normal(size=SIZE))
    return (
        (9 * update / np.linalg.norm(update)).astype(np.float32),
        fisher.astype(np.float32),
    )


@pytest.fixture(scope="module")
def clients() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [_client(rng) for _ in EXAMPLES]


def _config(bits: int = 16) -> Config:
    return load_preset("hospitals", ["aggregate.rule=fisher", f"update.bits={bits}"])


def _exact(clients: list[tuple[np.ndarray, np.ndarray]], damping: float) -> np.ndarray:
    found = [weights(fisher, damping) for _, fisher in clients]
    return np.average([u for u, _ in clients], axis=0, weights=np.array(found) * _column(EXAMPLES))


def _column(values: tuple[int, ...]) -> np.ndarray:
    return np.array(values, np.float64)[:, None]


def _as_it_travels(
    config: Config, clients: list[tuple[np.ndarray, np.ndarray]], scale: float | None = None
) -> np.ndarray:
    """Every step of a round but training and masks."""
    rng = np.random.default_rng(4)
    quantizer = make_quantizer(config, config.values_sent(SIZE), len(clients))
    damping = config.aggregate.fisher_damping
    total = np.zeros(quantizer.slots, np.int64)
    for (update, fisher), examples in zip(clients, EXAMPLES, strict=True):
        vector = weigh(update, fisher, damping, scale or fisher_scale(config, SIZE))
        total += quantizer.encode(vector, examples, 1.0, rng)
    found = quantizer.decode(total, len(clients))
    rule = make_rule(config, SIZE)
    assert isinstance(rule, FisherRule)
    rule = FisherRule(MomentumRule(), scale or rule.scale, rule.longest)
    return rule.apply({}, START, found.total, found.weight)[1]


@pytest.mark.parametrize(("bits", "limit"), [(16, 0.15), (20, 0.012), (24, 0.001)])
def test_rounding_changes_the_merged_update_little(
    clients: list[tuple[np.ndarray, np.ndarray]], bits: int, limit: float
) -> None:
    config = _config(bits)
    assert config.update.clip == 12.0
    expected = _exact(clients, config.aggregate.fisher_damping)
    found = _as_it_travels(config, clients)
    assert np.linalg.norm(expected) > 3
    assert limit / 4 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < limit


def test_where_it_matters_it_changes_it_less(
    clients: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    """A tenth of the values has a third of all weight, and is exact to 2 %."""
    config = _config()
    expected, found = _exact(clients, 0.1), _as_it_travels(config, clients)
    fisher = np.mean([weights(f, 0.1) for _, f in clients], axis=0)
    top = fisher > np.quantile(fisher, 0.9)
    assert fisher[top].sum() > fisher.sum() / 3
    error = np.linalg.norm((found - expected)[top]) / np.linalg.norm(expected[top])
    assert error < 0.02


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_the_scale_of_the_weights_is_a_good_one(
    clients: list[tuple[np.ndarray, np.ndarray]], factor: float
) -> None:
    """Ten times as much or as little leaves one half too few of the integers."""
    config = _config()
    expected = _exact(clients, 0.1)
    scale = fisher_scale(config, SIZE)
    error = np.linalg.norm(_as_it_travels(config, clients) - expected)
    assert np.linalg.norm(_as_it_travels(config, clients, factor * scale) - expected) > 2 * error


def test_the_presets_clip_cuts_nothing(clients: list[tuple[np.ndarray, np.ndarray]]) -> None:
    config = _config()
    assert config.update.clip is not None
    for update, fisher in clients:
        vector = weigh(update, fisher, 0.1, fisher_scale(config, SIZE)).astype(np.float64)
        assert np.linalg.norm(vector[SIZE:]) <= config.update.clip / np.sqrt(2) * (1 + 1e-6)
        assert config.update.clip / 2 < np.linalg.norm(vector) < config.update.clip


def test_one_value_does_not_decide_what_all_others_weigh(
    clients: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    """As was measured: one of 1,600 means."""
    _, fisher = clients[0]
    before = weights(fisher, 0.1)
    with_one = fisher.copy()
    with_one[7] = 1600 * fisher.mean()
    after = weights(with_one, 0.1)
    others = np.arange(SIZE) != 7
    assert after[others] == pytest.approx(before[others], rel=0.03)
    assert after[7] > 10


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_told(value: float) -> None:
    fisher = np.ones(5, np.float32)
    fisher[2] = value
    with pytest.raises(TrainingError, match=r"train\.lr"):
        weigh(np.zeros(5, np.float32), fisher, 0.1, 1.0)


def test_tiny_and_huge_gradients_have_weights() -> None:
    for fisher in (np.full(4, 1e-45, np.float32), np.full(4, 3e38, np.float32)):
        assert weights(fisher, 0.1) == pytest.approx([1.0] * 4)
    assert weights(np.zeros(4, np.float32), 0.1).tolist() == [0.0] * 4
