"""Fine-tuning in a federation beside mlx-lm's own loop: speed, memory, bytes.

    python benchmarks/lora.py [--model FOLDER] [--iters 6] [--rounds 13] [--json]

The same base model, LoRA of rank 8 on all its layers, Adam, batches of 4 texts of 128 tokens. The
model is a random Llama of 30 million parameters unless another is named, such as the one that
examples/lora/smollm2.py writes.

- ``mlx-lm``: ``mlx_lm.tuner.trainer.train`` in a process of its own, by its own report, which
  counts the steps alone.
- ``node``: ``mlx_fed.join`` in a process of its own, with a server in another; the seconds are
  those of a round's training message, from its arrival to the reply, and beside them those of the
  steps alone.
- ``simulation``: one client and four in one process.

Both loops are alive at once and take turns: a round of the node's, as many steps of mlx-lm's, and
so on, so that whatever else the machine does falls on both. Each round is compared with the mean of
the pieces before and after it; the figure is the median, with the quartiles. The first rounds, in
which programs are compiled, are left out. Peaks are of what MLX held, as mlx-lm reports them, and
of the whole process. The targets: 97 % of mlx-lm's speed, 1.05 times its memory, 1.02 times the
adapters' bytes on the wire, and 1.2 times the memory for four clients.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
from functools import partial
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import NamedTuple

from mlx_fed import events
import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import numpy as np
from federation import free_port, together

BATCH_SIZE, LENGTH, TEXTS = 4, 128, 64
LEFT_OUT = 2
"""Rounds in which programs are compiled and caches filled."""
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}


class Length(NamedTuple):
    """How long both loops train."""

    iters: int
    rounds: int


class Turns(NamedTuple):
    """Whose turn it is to train; the other waits."""

    ours: Semaphore
    theirs: Semaphore


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


def configure(model: Path, data: Path, length: Length):
    from dataclasses import replace

    from mlx_fed.lm.config import load_config

    flags = {
        "model": str(model),
        "data": str(data),
        "num_layers": -1,
        "batch_size": BATCH_SIZE,
        "local_iters": length.iters,
        "rounds": length.rounds,
    }
    return replace(load_config(None, flags), lora_parameters=LORA)


def peak() -> dict[str, float]:
    """Megabytes at most: that MLX held in this process, and all that was resident of it."""
    unit = 1 if sys.platform == "darwin" else 2**10  # Linux counts in kilobytes
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak MB": mx.get_peak_memory() / 2**20, "resident MB": resident / 2**20}


# -- mlx-lm's own loop ---------------------------------------------------------------------


def their_loop(model: Path, data: Path, length: Length, turns: Turns) -> dict:
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
            turns.ours.release()
            if len(rates) < length.rounds:
                turns.theirs.acquire()

    loaded, tokenizer = load(str(model))
    loaded.freeze()
    linear_to_lora_layers(loaded, -1, LORA)
    texts, _, _ = load_local_dataset(data, tokenizer, None)
    turns.theirs.acquire()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArgs(
            batch_size=BATCH_SIZE,
            iters=length.rounds * length.iters,
            steps_per_report=length.iters,
            adapter_file=str(Path(folder, "adapters.safetensors")),
        )
        train(
            loaded,
            optim.Adam(1e-5),
            CacheDataset(texts),
            args=arguments,
            training_callback=Reports(),
        )
    return {"rates": rates, **peak()}


# -- a federated node ----------------------------------------------------------------------


def our_server(model: Path, data: Path, length: Length, turns: Turns, port: int) -> dict:
    from flwr.serverapp.strategy import FedAvg

    from mlx_fed.lm.lora_task import lora_task

    def pass_the_turn(number: int, parameters: dict, statistics: dict) -> None:
        turns.theirs.release()
        turns.ours.acquire()

    strategy = FedAvg(
        fraction_evaluate=0, min_train_nodes=1, min_evaluate_nodes=0, min_available_nodes=1
    )
    task = lora_task(configure(model, data, length))
    with tempfile.TemporaryDirectory() as runs:
        result = fed.serve(
            task, strategy, port=port, runs=runs, listeners=(), evaluate_fn=pass_the_turn
        )
        adapters = sum(array.nbytes for array in result.parameters.values())
        return {"adapters": adapters, "bytes": result.rounds[-1]["bytes"], **peak()}


def our_node(model: Path, data: Path, length: Length, port: int) -> dict:
    from mlx_fed.lm.lora_task import lora_task

    rates: list[float] = []
    steps_alone: list[float] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.MessageAnswered) and event.kind == "train":
            rates.append(length.iters / event.seconds)
            tokens, a_second = (event.metrics[key] for key in ("num-tokens", "tokens-per-second"))
            steps_alone.append(length.iters / tokens * a_second)

    task = lora_task(configure(model, data, length), note=lambda text: None)
    fed.join(task, f"127.0.0.1:{port}", listener=listen)
    return {"rates": rates, "steps alone": steps_alone, **peak()}


# -- a simulation --------------------------------------------------------------------------


def simulated(model: Path, data: Path, clients: int) -> float:
    from mlx_fed.lm.lora_task import lora_task

    task = lora_task(configure(model, data, Length(4, 2)), note=lambda text: None)
    with tempfile.TemporaryDirectory() as runs:
        fed.simulate(task, num_clients=clients, num_rounds=2, workers=0, runs=runs, listeners=())
    return peak()["peak MB"]


def compared(ours: list[float], theirs: list[float]) -> list[float]:
    """Each of our rounds beside the mean of their pieces before and after it."""
    pairs = zip(ours[1:], theirs, theirs[1:], strict=False)
    return [rate * (1 / before + 1 / after) / 2 for rate, before, after in pairs][LEFT_OUT:]


def measure(model: Path, data: Path, length: Length) -> dict:
    context = multiprocessing.get_context("spawn")
    turns = Turns(context.Semaphore(0), context.Semaphore(0))
    port = free_port()
    loop, server, node = together(
        partial(their_loop, model, data, length, turns),
        partial(our_server, model, data, length, turns, port),
        partial(our_node, model, data, length, port),
    )
    (one,), (four,) = (together(partial(simulated, model, data, n)) for n in (1, 4))
    tokens = BATCH_SIZE * LENGTH
    steps_alone = statistics.median(compared(node.pop("steps alone"), loop["rates"]))
    least, median, most = statistics.quantiles(compared(node["rates"], loop["rates"]), n=4)
    rows = {
        name: {"tokens/s": tokens * statistics.median(run.pop("rates")[LEFT_OUT:]), **run}
        for name, run in (("mlx-lm", loop), ("node", node))
    }
    adapters, sent = server.pop("adapters"), server.pop("bytes")
    return {
        **rows,
        "server": server,
        "simulation": {"one, peak MB": one, "four, peak MB": four},
        "ratios": {
            "speed": median,
            "speed, lower quartile": least,
            "speed, upper quartile": most,
            "speed of the steps alone": steps_alone,
            "memory": node["peak MB"] / loop["peak MB"],
            "resident": node["resident MB"] / loop["resident MB"],
            "bytes down": sent["down"] / adapters,
            "bytes up": sent["up"] / adapters,
            "memory of four": four / one,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder that mlx-lm loads")
    parser.add_argument("--iters", type=int, default=6, help="iterations in a round, default 6")
    parser.add_argument("--rounds", type=int, default=13, help="default 13")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        from mlx_lm.utils import load_tokenizer

        model = arguments.model or write_model(Path(folder, "model"))
        data = write_texts(Path(folder, "texts"), load_tokenizer(model))
        found = measure(model, data, Length(arguments.iters, arguments.rounds))
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, row in found.items():
        print(f"{name:12}" + "   ".join(f"{key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
