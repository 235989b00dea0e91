"""Fine-tuning in a federation beside mlx-lm's own loop: speed, memory, bytes.

    python benchmarks/lora.py [--model FOLDER] [--iters 40] [--repeats 3] [--json]

The same base model, LoRA of rank 8 on all its layers, Adam, batches of 4 texts of 128 tokens. The
model is a random Llama of 30 million parameters unless another is named, such as the one that
examples/lora/smollm2.py writes.

- ``mlx-lm``: ``mlx_lm.tuner.trainer.train`` in a process of its own, by its own report.
- ``node``: ``mlx_fed.join`` in a process of its own, with a server in another, in three rounds; the
  seconds are those of a round's training message, from its arrival to the reply.
- ``simulation``: one client and four in one process.

Medians over all but the first report or round, in which programs are compiled; both loops are run
in turn, ``--repeats`` times. The targets: 97 % of mlx-lm's speed, 1.05 times its memory, 1.02 times
the adapters' bytes on the wire, and 1.2 times the memory for four clients.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import numpy as np
from federation import free_port, together

BATCH_SIZE, LENGTH, TEXTS, ROUNDS = 4, 128, 64, 3
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}


def write_model(folder: Path) -> Path:
    """A random Llama, with a token for each byte."""
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = {
        "model_type": "llama",
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    tokenizer = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_texts(folder: Path, tokenizer) -> Path:
    """Texts of one length in tokens, the end's token among them."""
    folder.mkdir(parents=True)
    words = np.random.default_rng(0).choice(["one", "two", "red", "sun", "sea"], size=(TEXTS, 400))
    with (folder / "train.jsonl").open("w") as file:
        for row in words:
            ids = tokenizer.encode(" ".join(row))[: LENGTH - 1]
            file.write(json.dumps({"text": tokenizer.decode(ids)}) + "\n")
    return folder


def configure(model: Path, data: Path, iters: int):
    from dataclasses import replace

    from mlx_fed.lm.config import load_config

    flags = {
        "model": str(model),
        "data": str(data),
        "num_layers": -1,
        "batch_size": BATCH_SIZE,
        "local_iters": iters,
        "rounds": ROUNDS,
    }
    return replace(load_config(None, flags), lora_parameters=LORA)


def peak() -> float:
    """Megabytes that MLX held at most in this process."""
    return mx.get_peak_memory() / 2**20


# -- mlx-lm's own loop ---------------------------------------------------------------------


def their_loop(model: Path, data: Path, iters: int) -> dict:
    import mlx.optimizers as optim
    from mlx_lm import load
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    rates: list[float] = []

    class Reports(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            rates.append(info["iterations_per_second"])

    loaded, tokenizer = load(str(model))
    loaded.freeze()
    linear_to_lora_layers(loaded, -1, LORA)
    texts, _, _ = load_local_dataset(data, tokenizer, None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArgs(
            batch_size=BATCH_SIZE,
            iters=ROUNDS * iters,
            steps_per_report=iters,
            adapter_file=str(Path(folder, "adapters.safetensors")),
        )
        train(
            loaded,
            optim.Adam(1e-5),
            CacheDataset(texts),
            args=arguments,
            training_callback=Reports(),
        )
    return {"rates": rates[1:], "peak": peak()}


# -- a federated node ----------------------------------------------------------------------


def our_server(model: Path, data: Path, iters: int, port: int) -> dict:
    from flwr.serverapp.strategy import FedAvg

    from mlx_fed.lm.task import lora_task

    strategy = FedAvg(
        fraction_evaluate=0, min_train_nodes=1, min_evaluate_nodes=0, min_available_nodes=1
    )
    with tempfile.TemporaryDirectory() as runs:
        result = fed.serve(
            lora_task(configure(model, data, iters)), strategy, port=port, runs=runs, listeners=()
        )
        adapters = sum(array.nbytes for array in result.parameters.values())
        return {"adapters": adapters, "bytes": result.rounds[-1]["bytes"], "peak": peak()}


def our_node(model: Path, data: Path, iters: int, port: int) -> dict:
    from mlx_fed.lm.task import lora_task

    rates: list[float] = []

    def listen(event: str, **fields) -> None:
        if event == "answered" and fields["kind"] == "train":
            rates.append(iters / fields["seconds"])

    task = lora_task(configure(model, data, iters), note=lambda text: None)
    fed.join(task, f"127.0.0.1:{port}", notify=listen)
    return {"rates": rates[1:], "peak": peak()}


# -- a simulation --------------------------------------------------------------------------


def simulated(model: Path, data: Path, clients: int) -> float:
    from mlx_fed.lm.task import lora_task

    task = lora_task(configure(model, data, 4), note=lambda text: None)
    with tempfile.TemporaryDirectory() as runs:
        fed.simulate(task, num_clients=clients, num_rounds=2, workers=0, runs=runs, listeners=())
    return peak()


def measure(model: Path, data: Path, iters: int, repeats: int) -> dict:
    theirs, ours, rates = [], [], []
    for _ in range(repeats):
        (loop,) = together(partial(their_loop, model, data, iters))
        theirs.append(loop)
        port = free_port()
        server, node = together(
            partial(our_server, model, data, iters, port),
            partial(our_node, model, data, iters, port),
        )
        ours.append({**node, "server": server})
        rates.append(statistics.median(node["rates"]) / statistics.median(loop["rates"]))
    (one,), (four,) = (together(partial(simulated, model, data, n)) for n in (1, 4))
    server = ours[-1]["server"]
    tokens = BATCH_SIZE * LENGTH
    return {
        "mlx-lm": {
            "tokens/s": tokens * statistics.median(r for run in theirs for r in run["rates"]),
            "peak MB": max(run["peak"] for run in theirs),
        },
        "node": {
            "tokens/s": tokens * statistics.median(r for run in ours for r in run["rates"]),
            "peak MB": max(run["peak"] for run in ours),
        },
        "server": {"peak MB": server["peak"]},
        "simulation": {"one, peak MB": one, "four, peak MB": four},
        "ratios": {
            "speed": statistics.median(rates),
            "speed, least": min(rates),
            "speed, most": max(rates),
            "memory": max(run["peak"] for run in ours) / max(run["peak"] for run in theirs),
            "bytes down": server["bytes"]["down"] / server["adapters"],
            "bytes up": server["bytes"]["up"] / server["adapters"],
            "memory of four": four / one,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder that mlx-lm loads")
    parser.add_argument("--iters", type=int, default=40, help="iterations in a round, default 40")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        from mlx_lm.utils import load_tokenizer

        model = arguments.model or write_model(Path(folder, "model"))
        data = write_texts(Path(folder, "texts"), load_tokenizer(model))
        found = measure(model, data, arguments.iters, arguments.repeats)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, row in found.items():
        print(f"{name:12}" + "   ".join(f"{key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
