"""The example of examples/lora on a real model: all learn, and together more than alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import mlx_fed as fed  # before mlx.core

import pytest

pytest.importorskip("mlx_lm")

from mlx_fed.lm.config import load_config
from mlx_fed.lm.task import lora_task
from mlx_fed.training import Trainer

from examples.lora import smollm2

from .conftest import ROOT

EXAMPLE = ROOT / "examples" / "lora"
SPEAKERS = ("menenius", "petruchio", "romeo")


def perplexities(trainer: Trainer, parameters, tests) -> dict[str, float]:
    """By speaker, of what each says in texts that nobody trained on."""
    return {
        speaker: trainer.evaluate(parameters, {}, test)["perplexity"]
        for speaker, test in tests.items()
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_speakers_learn_more_together_than_alone(tmp_path):
    try:
        model = smollm2.convert(tmp_path / "model", dequantize=True)
    except fed.FedError as error:
        pytest.skip(str(error))
    flags = {"model": str(model), "data": str(EXAMPLE / "texts")}
    config = load_config(EXAMPLE / "lora.yaml", flags)
    task = lora_task(config)
    data = {speaker: task.data(number, 3) for number, speaker in enumerate(SPEAKERS)}
    tests = {speaker: own.test for speaker, own in data.items()}
    trainer = Trainer(task)
    measure = partial(perplexities, trainer, tests=tests)

    def train(speakers, name):
        chosen = [data[speaker] for speaker in speakers]
        clients = replace(task, data=lambda number, of: chosen[number])
        result = fed.simulate(
            clients, num_clients=len(chosen), workers=0, runs=tmp_path, name=name, listeners=()
        )
        return measure(result.parameters)

    before = measure(trainer.parameters())
    together = train(SPEAKERS, "together")
    print(before, together)
    for speaker in SPEAKERS:
        assert together[speaker] < before[speaker]
    for speaker in SPEAKERS:
        alone = train([speaker], speaker)
        print(speaker, alone)
        for other in SPEAKERS:
            assert together[other] < alone[other], (speaker, alone, together)
