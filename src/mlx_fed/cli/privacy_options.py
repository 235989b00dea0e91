"""Options of differential privacy, and the strategy that they wrap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ..errors import SettingsError
from .option_kinds import option
from .options import OptionGroup

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy


@dataclass(frozen=True)
class PrivacyOptions(OptionGroup):
    """Central differential privacy."""

    panel = "Differential privacy"

    dp_clip: Annotated[
        float | None, option("NORM", "Largest L2 norm of a client's update.", "off")
    ] = None
    dp_noise: Annotated[
        float | None, option("FACTOR", "Noise, in multiples of the norm.", "as the epsilon needs")
    ] = None
    dp_epsilon: Annotated[
        float | None, option("EPSILON", "End the run before it exceeds this epsilon.", "none")
    ] = None
    dp_delta: Annotated[float, option("PROBABILITY", "Probability that epsilon does not hold.")] = (
        1e-5
    )

    def wrap(self, strategy: Strategy, num_rounds: int | None) -> Strategy:
        """The strategy with differential privacy, if there is a clipping norm.

        Raises:
            SettingsError: If there is noise or an epsilon without a norm, or an option is not what
                it should be.
        """
        if self.dp_clip is None:
            if self.dp_noise is not None or self.dp_epsilon is not None:
                raise SettingsError("--dp-noise and --dp-epsilon need --dp-clip.")
            return strategy
        from ..privacy import Gaussian

        if self.dp_noise is None and self.dp_epsilon is not None and num_rounds is None:
            raise SettingsError("--dp-epsilon without --dp-noise needs --rounds.")
        return Gaussian(
            strategy,
            self.dp_clip,
            self.dp_noise,
            epsilon=self.dp_epsilon,
            delta=self.dp_delta,
            num_rounds=num_rounds,
        )
