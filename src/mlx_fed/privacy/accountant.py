"""Epsilon of a run's releases, by Google's dp-accounting.

Privacy loss distributions (Koskela et al. 2020, https://arxiv.org/abs/1906.03049) of the Gaussian
mechanism, with amplification by Poisson sampling. Two federations are neighbours if one has one
client more.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ..errors import FedError

_LARGEST_NOISE = 1e4
_TOLERANCE = 1e-3
"""Of a noise multiplier that is computed from an epsilon."""


class PrivacyBudgetError(FedError):
    """A privacy budget that nothing satisfies, or that cannot be computed."""


class Release(NamedTuple):
    """The noise of one release of the model.

    Attributes:
        noise (float): Standard deviation of the noise, in multiples of the clipping norm.
        fraction (float): Probability with which a client is sampled; 1 if all train.
    """

    noise: float
    fraction: float


def epsilon(releases: Mapping[Release, int], delta: float) -> float:
    """Epsilon of some releases together, for a delta.

    Args:
        releases (dict): How often each kind of release was made.
        delta (float): The probability that epsilon does not hold.
    """
    total: Any = None
    for release, count in releases.items():
        if count:
            distribution = _distribution(release).self_compose(count)
            total = distribution if total is None else total.compose(distribution)
    return 0.0 if total is None else float(total.get_epsilon_for_delta(delta))


def noise_for(epsilon_limit: float, delta: float, fraction: float, count: int) -> float:
    """The least noise with which a number of releases stays within an epsilon.

    Args:
        epsilon_limit (float): The largest epsilon.
        delta (float): The probability that it does not hold.
        fraction (float): Probability with which a client is sampled.
        count (int): Number of releases.

    Returns:
        float: In multiples of the clipping norm, at most 0.1 % more than needed.

    Raises:
        PrivacyBudgetError: If no noise up to 10,000 does.
    """

    def is_enough(noise: float) -> bool:
        return epsilon({Release(noise, fraction): count}, delta) <= epsilon_limit

    low, high = 0.0, 0.5
    while not is_enough(high):
        low, high = high, 2 * high
        if high > _LARGEST_NOISE:
            raise PrivacyBudgetError(
                f"no noise keeps {count} rounds within epsilon {epsilon_limit:g}: allow a larger "
                "epsilon, fewer rounds, or a smaller fraction of the clients"
            )
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


@lru_cache(maxsize=8)
def _distribution(release: Release) -> Any:
    try:
        from dp_accounting.pld import privacy_loss_distribution
    except ImportError as error:
        raise PrivacyBudgetError(
            'epsilon is computed by dp-accounting: install "mlx-fed[privacy]", or pip install '
            "dp-accounting"
        ) from error
    return privacy_loss_distribution.from_gaussian_mechanism(
        release.noise, sampling_prob=release.fraction
    )
