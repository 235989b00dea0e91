"""``mlx-fed lora`` as its users have it: processes, files, and mlx-lm's own commands after it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx_fed as fed  # noqa: F401  before mlx.core

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm")

from ..helpers import hub, tiny_llama

pytestmark = pytest.mark.slow
LORA = ("-m", "mlx_fed", "lora")


@pytest.fixture
def config(tmp_path) -> Path:
    """A configuration for three nodes with texts of their own, one with fewer than a batch."""
    model = tiny_llama.write_model(tmp_path / "base", bits=4)
    for name, count in (("anna", 10), ("ben", 7), ("cleo", 2)):
        train, valid = tiny_llama.lines(name, count), tiny_llama.lines(name, 4, 20)
        tiny_llama.write_texts(tmp_path / "data" / name, train, valid)
    path = tmp_path / "lora.yaml"
    path.write_text(
        f"model: {model}\n"
        f"data: {tmp_path / 'data'}\n"
        "num_layers: 2\n"
        "learning_rate: 1e-2\n"
        "iters: 8\n"
        "grad_checkpoint: true\n"
        "lora_parameters: {rank: 4, scale: 10.0, dropout: 0.1}\n"
        "federation: {rounds: 2, nodes: 3, weighting: tokens, sample_prompt: anna}\n"
    )
    return path


def test_a_federation_and_its_simulation_end_with_one_adapter_that_mlx_lm_reads(
    start, config, tmp_path
):
    runs = ("--runs", tmp_path)
    server = start(*LORA, "serve", "-c", config, "--port", 0, "--name", "fed", *runs, "--wait", 60)
    address = server.line(r"Server ready on (\S+)").group(1)
    nodes = [
        start(
            *(*LORA, "join", "-c", config, "--data", tmp_path / "data" / name),
            *("--server", address, "--node-id", number, "--name", name),
        )
        for number, name in enumerate(("anna", "ben", "cleo"))
    ]
    simulation = start(*LORA, "simulate", "-c", config, "--name", "sim", *runs)
    assert server.ends() == 0, server.text
    assert [node.ends() for node in nodes] == [0, 0, 0], nodes[1].text
    assert simulation.ends() == 0, simulation.text
    federated, simulated = (
        (tmp_path / name / "adapters" / "adapters.safetensors").read_bytes()
        for name in ("fed", "sim")
    )
    assert federated == simulated
    assert "ben joined" in server.text
    assert "sample: anna" in server.text
    adapters = tmp_path / "fed" / "adapters"
    assert f"The model: {adapters}" in server.text
    assert {path.name for path in adapters.iterdir()} == {
        "adapter_config.json",
        "adapters.safetensors",
    }
    assert not (tmp_path / "fed" / "model.safetensors").exists()
    history = (tmp_path / "fed" / "history.jsonl").read_text().splitlines()
    assert {"loss", "perplexity"} <= json.loads(history[-1])["evaluate"].keys()

    written = start(
        *("-m", "mlx_lm", "generate", "--model", tmp_path / "base", "--adapter-path", adapters),
        *("--prompt", "anna", "--ignore-chat-template", "--max-tokens", 5),
    )
    fused = start(
        *("-m", "mlx_lm", "fuse", "--model", tmp_path / "base", "--adapter-path", adapters),
        *("--save-path", tmp_path / "fused"),
    )
    assert written.ends() == 0, written.text
    # Fewer than five where roundings, other ones on other CPUs, let the text end.
    assert re.search("Generation: [1-5] tokens", written.text)
    assert fused.ends() == 0, fused.text
    whole = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    before = mx.load(str(tmp_path / "base" / "model.safetensors"))
    assert whole.keys() == before.keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not mx.array_equal(whole[name], before[name])


def test_a_run_goes_on_and_is_watched(start, config, tmp_path):
    run = (*LORA, "simulate", "-c", config, "--local-iters", 2, "--runs", tmp_path)
    quiet = start(*run, "--rounds", 1, "--name", "run", "--quiet")
    assert quiet.ends() == 0, quiet.text
    assert "round 1" not in quiet.text
    watched = start(
        *(*run, "--rounds", 2, "--resume", "run", "--json"),
        *("--track", "tests.monitoring.test_trackers:Own", "--dashboard", "--dashboard-port", 0),
    )
    assert watched.ends() == 0, watched.text
    told = [json.loads(line) for line in watched.text.splitlines() if line.startswith("{")]
    (resumed,) = [each for each in told if each["event"] == "resumed"]
    assert resumed["round"] == 1
    assert [each["round"] for each in told if each["event"] == "round"] == [2]
    assert "dashboard" in {each["event"] for each in told}


def test_a_federation_that_encrypts(start, config, tmp_path):
    where = ("--port", 0, "--runs", tmp_path, "--federation", tmp_path / "federation")
    server = start(*LORA, "serve", "-c", config, "--secure", *where)
    server.line("node-2 joins with:  .*\n")
    tokens = re.findall(r"mlx-fed lora join -c lora.yaml --data FOLDER (mlxfed-\S+)", server.text)
    nodes = [
        start(
            *(*LORA, "join", "-c", config, "--data", tmp_path / "data" / name, token),
            MLX_FED_HOME=str(tmp_path / "home"),
        )
        for name, token in zip(("anna", "ben", "cleo"), tokens, strict=True)
    ]
    assert server.ends() == 0, server.text
    assert [node.ends() for node in nodes] == [0, 0, 0], nodes[1].text
    assert "node-1 joined" in server.text


def test_a_node_downloads_each_file_once_and_no_weights_for_another_tokenizer(
    start, config, tmp_path
):
    tiny_llama.write_model(tmp_path / "other", bits=4, words=["one"])
    run = ("--nodes", 1, "--rounds", 1, "--runs", tmp_path)
    server = start(*LORA, "serve", "-c", config, "--port", 0, *run)
    address = server.line(r"Server ready on (\S+)").group(1)

    def joins_with(model: Path) -> tuple[int, str, list[str]]:
        given: list[str] = []
        with hub.serving(model, given=given) as endpoint:
            node = start(
                *(*LORA, "join", "-c", config, "--data", tmp_path / "data" / "anna"),
                *("--model", "org/it", "--server", address),
                HF_ENDPOINT=endpoint,
                HF_HOME=str(tmp_path / f"home-{model.name}"),
            )
            return node.ends(), " ".join(node.text.split()), sorted(given)

    code, text, given = joins_with(tmp_path / "other")
    assert code == 1
    assert "its tokenizer is not the server's: " in text
    assert given == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    code, text, given = joins_with(tmp_path / "base")
    assert (code, server.ends()) == (0, 0), text
    assert given == sorted(path.name for path in (tmp_path / "base").iterdir())


def test_malformed_texts_end_a_simulation_before_it_begins(start, config, tmp_path):
    path = tmp_path / "data" / "ben" / "valid.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    simulation = start(*LORA, "simulate", "-c", config, "--runs", tmp_path / "runs")
    assert simulation.ends() == 1
    assert f"{path}, line 2 is not JSON" in " ".join(simulation.text.split())
    assert not (tmp_path / "runs").exists()
