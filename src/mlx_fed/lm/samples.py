"""What the global model writes after a round, as the server sees it."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..arrays import weights
from ..arrays.named_arrays import Arrays
from ..rounds.settings import EvaluateFn
from ..task import Task
from .config import LoraConfig
from .lora_task import load_tokenizer


def sampler(config: LoraConfig, task: Task) -> EvaluateFn | None:
    """A function that continues the configuration's prompt, where it has one.

    The prompt goes to the model as it is, without a chat template, and the likeliest token is taken
    each time, so that samples differ by the model alone.
    """
    federation = config.federation
    prompt = federation.sample_prompt
    if prompt is None:
        return None

    @cache
    def model() -> Any:
        # From the seed, as all build it: what is frozen of adapters does not come with the rest.
        return weights.build_model(task.model, config.seed)

    def sample(number: int, parameters: Arrays, statistics: Arrays) -> dict[str, str]:
        if number % federation.sample_every:
            return {}
        from mlx_lm import generate

        model().load_weights(list(parameters.items()), strict=False)
        model().eval()
        tokenizer = load_tokenizer(config)
        written = generate(model(), tokenizer, prompt, max_tokens=federation.sample_tokens)
        return {"sample": prompt + written}

    return sample
