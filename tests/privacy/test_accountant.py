"""Epsilon is that of dp-accounting, which is held to published figures."""

from __future__ import annotations

import math

import mlx_fed  # noqa: F401, before mlx.core

import dp_accounting
import pytest
from dp_accounting import pld

from mlx_fed.privacy import accountant
from mlx_fed.privacy.accountant import Release

SETTINGS = {  # noise, fraction, releases, delta
    "one of a hundred clients, 1,000 rounds": (1.0, 0.01, 1000, 1e-5),
    "all clients, one round": (1.0, 1.0, 1, 1e-5),
    "all clients, 100 rounds": (5.0, 1.0, 100, 1e-5),
    "half of the clients": (2.0, 0.5, 20, 1e-6),
}
MORE = {
    "MNIST of Abadi et al. 2016": (4.0, 0.01, 10_000, 1e-5),
    "next words of McMahan et al. 2018": (1.0, 0.00653, 5000, 1e-9),
    "little noise": (0.5, 0.02, 50, 1e-5),
    "much noise": (8.0, 0.1, 2000, 1e-7),
    "few clients": (1.5, 0.3, 40, 1e-3),
    "one release of a sample": (0.8, 0.1, 1, 1e-5),
}


def reference(noise: float, fraction: float, count: int, delta: float) -> float:
    mechanism: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(noise)
    if fraction < 1:
        mechanism = dp_accounting.PoissonSampledDpEvent(fraction, mechanism)
    return pld.PLDAccountant().compose(mechanism, count).get_epsilon(delta)


@pytest.mark.parametrize(
    "case", [*SETTINGS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_epsilon_is_that_of_the_library(case):
    noise, fraction, count, delta = (SETTINGS | MORE)[case]
    epsilon = accountant.epsilon({Release(noise, fraction): count}, delta)
    assert epsilon == pytest.approx(reference(noise, fraction, count, delta), abs=1e-3)


def test_ten_thousand_clients_for_a_thousand_rounds():
    """Flower's accountant, without amplification by sampling, has 655 here."""
    assert accountant.epsilon({Release(1.0, 0.01): 1000}, 1e-5) <= 1.84


def test_one_release_to_all_is_the_analytic_gaussian_mechanism():
    """Balle and Wang 2018 (https://arxiv.org/abs/1805.06530), theorem 8."""
    noise = 1.3
    epsilon = accountant.epsilon({Release(noise, 1.0): 1}, 1e-5)

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    delta = normal(0.5 / noise - epsilon * noise) - math.exp(epsilon) * normal(
        -0.5 / noise - epsilon * noise
    )
    assert delta == pytest.approx(1e-5, rel=0.01)


def test_releases_with_other_noise_add_up():
    one, other = Release(2.0, 1.0), Release(3.0, 1.0)
    together = accountant.epsilon({one: 4, other: 9}, 1e-5)
    # Gaussian mechanisms compose as one with the sum of 1 / noise^2.
    assert together == pytest.approx(
        accountant.epsilon({Release((4 / 4 + 9 / 9) ** -0.5, 1.0): 1}, 1e-5), abs=1e-2
    )
    assert accountant.epsilon({}, 1e-5) == 0


def test_noise_for_an_epsilon_is_the_least():
    noise = accountant.noise_for(3.0, 1e-5, 0.2, 10)
    assert accountant.epsilon({Release(noise, 0.2): 10}, 1e-5) <= 3.0
    assert accountant.epsilon({Release(noise * 0.99, 0.2): 10}, 1e-5) > 3.0


def test_no_noise_is_enough_for_an_epsilon_of_nothing():
    with pytest.raises(accountant.PrivacyBudgetError, match="no noise keeps 5 rounds within"):
        accountant.noise_for(1e-9, 1e-12, 1.0, 5)
