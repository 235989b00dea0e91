"""Sample of the global model's text after a round, on the server."""

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
    """Function that continues the configuration's prompt; ``None`` without a prompt.

    The prompt has no chat template, and decoding is greedy, so that samples depend on the model
    only.
    """
    federation = config.federation
    prompt = federation.sample_prompt
    if prompt is None:
        return None

    @cache
    def model() -> Any:
        # From the seed, like the nodes' models: frozen arrays of adapters are not parameters.
        return weights.build_model(task.model, config.seed)

    def sample(number: int, parameters: Arrays, statistics: Arrays) -> dict[str, str]:
        if number % federation.sample_every:
            return {}
        from mlx_lm import generate

        model().load_weights(list(parameters.items()), strict=False)
        model().eval()
        tokenizer = load_tokenizer(config)
        continuation = generate(model(), tokenizer, prompt, max_tokens=federation.sample_tokens)
        return {"sample": prompt + continuation}

    return sample
