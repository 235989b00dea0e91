"""Language models as tasks: what is trained, on which texts, and what comes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

pytest.importorskip("mlx_lm")

from mlx_lm.utils import load as mlx_lm_load

from mlx_fed.rounds import messages
from mlx_fed.lm import adapters, base_model, base_fingerprint, texts
from mlx_fed.lm.config import load_config
from mlx_fed.lm.lora_task import lora_task
from mlx_fed.training.trainer import Trainer

from ..helpers import tiny_llama


pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture
def data(tmp_path) -> Path:
    """The texts of three nodes; the last has fewer than a batch."""
    for name, count in (("anna", 10), ("ben", 7), ("cleo", 2)):
        train, valid = tiny_llama.lines(name, count), tiny_llama.lines(name, 4, 20)
        tiny_llama.write_texts(tmp_path / "data" / name, train, valid)
    return tmp_path / "data"


def configure(model: Path, data: Path, **flags):
    flags = {"num_layers": 2, "learning_rate": 1e-2, "local_iters": 6, "rounds": 2, **flags}
    config = load_config(None, {"model": str(model), "data": str(data), **flags})
    return replace(config, lora_parameters={"rank": 4, "scale": 10.0, "dropout": 0.0})


def simulate(config, runs: Path, name="run", clients=3, **settings):
    return fed.simulate(
        lora_task(config), num_clients=clients, workers=0, runs=runs, name=name, **settings
    )


def test_all_nodes_learn_and_each_says_how_well(llama, data, tmp_path):
    result = simulate(configure(llama, data), tmp_path)
    first, last = result.rounds
    assert last["train"]["loss"] < first["train"]["loss"]
    assert last["evaluate"]["perplexity"] == pytest.approx(np.exp(last["evaluate"]["loss"]))
    each = last["each"]["evaluate"]
    assert each.keys() == {"node-0", "node-1", "node-2"}
    for own in each.values():
        assert own["perplexity"] == pytest.approx(np.exp(own["loss"]))
    trained = last["each"]["train"]
    assert [own["num-examples"] for own in trained.values()] == [10, 7, 2]
    assert all(own["tokens-per-second"] > 0 for own in trained.values())


@pytest.mark.parametrize(
    ("kind", "bits", "flags"),
    [
        ("lora", 4, {}),
        ("dora", None, {}),
        ("dora", 8, {}),
        ("full", None, {}),
        ("lora", None, {"freeze_a": True}),
        ("lora", None, {"grad_checkpoint": True}),
    ],
)
def test_ways_to_fine_tune(kind, bits, flags, data, tmp_path):
    model = tiny_llama.write_model(tmp_path / "base", bits=bits)
    config = configure(model, data, fine_tune_type=kind, **flags)
    result = simulate(config, tmp_path)
    assert result.rounds[-1]["train"]["loss"] < result.rounds[0]["train"]["loss"]
    assert result.model == tmp_path / "run" / "adapters"
    # What mlx-lm makes of the folder computes what our model does.
    theirs, _ = mlx_lm_load(str(model), adapter_path=str(result.model))
    trainer = Trainer(lora_task(config))
    expected = trainer.evaluate(result.parameters, {}, lora_task(config).data(0, 3).test).metrics
    loss = Trainer(replace(lora_task(config), model=lambda: unfrozen(theirs)))
    got = loss.evaluate(loss.parameters(), {}, lora_task(config).data(0, 3).test).metrics
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "bits", "keys"),
    [
        ("qwen3", 4, {"head_dim": 16, "max_position_embeddings": 64, "rope_theta": 1e4}),
        ("gemma", None, {"head_dim": 16}),
        ("phi", None, {"num_key_value_heads": 4, "layer_norm_eps": 1e-5}),
        ("mixtral", 4, {"num_local_experts": 2, "num_experts_per_tok": 1}),
        (
            "mamba",
            None,
            {
                "state_size": 8,
                "conv_kernel": 4,
                "use_bias": False,
                "use_conv_bias": True,
                "time_step_rank": 4,
            },
        ),
        (
            "mamba2",
            None,
            {
                "num_heads": 8,
                "head_dim": 16,
                "state_size": 8,
                "conv_kernel": 4,
                "n_groups": 1,
                "use_bias": False,
                "use_conv_bias": True,
                "time_step_rank": 4,
                "layer_norm_epsilon": 1e-5,
                "time_step_limit": [0.0, 100.0],
            },
        ),
        (
            "deepseek_v2",
            None,
            {
                "moe_intermediate_size": 32,
                "n_shared_experts": 1,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "kv_lora_rank": 16,
                "q_lora_rank": 16,
                "first_k_dense_replace": 1,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "qk_nope_head_dim": 8,
                "num_key_value_heads": 4,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2,
                    "beta_fast": 32,
                    "beta_slow": 1,
                    "mscale": 0.7,
                    "mscale_all_dim": 0.7,
                    "original_max_position_embeddings": 64,
                },
            },
        ),
        (
            "qwen3_moe",
            4,
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "norm_topk_prob": True,
                "head_dim": 16,
                "max_position_embeddings": 64,
                "rope_theta": 1e4,
            },
        ),
        (
            "qwen3_next",
            None,
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "head_dim": 16,
                "max_position_embeddings": 64,
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "linear_num_value_heads": 4,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "linear_conv_kernel_dim": 4,
                "shared_expert_intermediate_size": 32,
                "full_attention_interval": 2,
            },
        ),
        (
            "granitemoehybrid",
            None,
            {
                "max_position_embeddings": 64,
                "attention_bias": False,
                "embedding_multiplier": 1.0,
                "attention_multiplier": 0.25,
                "logits_scaling": 1.0,
                "residual_multiplier": 1.0,
                "layer_types": ["mamba", "attention"],
                "shared_intermediate_size": 32,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "mamba_n_heads": 8,
                "mamba_d_head": 16,
                "mamba_proj_bias": False,
                "mamba_d_state": 8,
                "mamba_d_conv": 4,
                "mamba_n_groups": 1,
                "mamba_conv_bias": True,
            },
        ),
    ],
)
def test_architectures(kind, bits, keys, data, tmp_path):
    model = tiny_llama.write_model(tmp_path / "base", bits=bits, model_type=kind, **keys)
    config = configure(model, data, local_iters=1)
    task = lora_task(config)
    result = simulate(config, tmp_path)
    assert [record["refused"] for record in result.rounds] == [[], []]
    theirs, _ = mlx_lm_load(str(model), adapter_path=str(result.model))
    test = task.data(0, 3).test
    got = Trainer(replace(task, model=lambda: unfrozen(theirs)))
    loss = Trainer(task).evaluate(result.parameters, {}, test).metrics["loss"]
    assert got.evaluate(got.parameters(), {}, test).metrics["loss"] == pytest.approx(loss, rel=1e-5)


def unfrozen(model):
    model.unfreeze()
    return model


def test_a_federation_of_bfloat16_layers_sends_them_as_they_are(data, tmp_path):
    model = tiny_llama.write_model(tmp_path / "base", dtype=mx.bfloat16)
    config = configure(model, data, fine_tune_type="full")
    trainer = Trainer(lora_task(config))
    assert {dtype for _, dtype in trainer.spec.values()} == {"bfloat16"}
    sent = messages.unpack(messages.pack(trainer.parameters()))
    for name, array in trainer.parameters().items():
        assert sent[name].dtype == mx.bfloat16
        assert mx.array_equal(sent[name].view(mx.uint16), array.view(mx.uint16))
    result = simulate(config, tmp_path)
    assert result.rounds[1]["train"]["loss"] < result.rounds[0]["train"]["loss"]
    saved = mx.load(str(result.model / "adapters.safetensors"))
    assert {array.dtype for array in saved.values()} == {mx.bfloat16}


def test_adapters_stay_as_they_were_if_there_is_no_room(llama, data, tmp_path, little_room):
    config = configure(llama, data)
    target = adapters.save(Trainer(lora_task(config)).model, tmp_path, config)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert before.keys() == {"adapters.safetensors", "adapter_config.json"}
    larger = replace(config, lora_parameters={**config.lora_parameters, "rank": 256})
    with pytest.raises(OSError, match="File too large"):
        adapters.save(Trainer(lora_task(larger)).model, tmp_path, larger)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_freezing_a_sends_b_alone_and_saves_both(llama, data, tmp_path):
    config = configure(llama, data, freeze_a=True)
    result = simulate(config, tmp_path)
    assert all(name.endswith("lora_b") for name in result.parameters)
    saved = mx.load(str(result.model / "adapters.safetensors"))
    kinds = {name.rsplit(".", 1)[-1] for name in saved}
    assert kinds == {"lora_a", "lora_b"}
    # Whoever builds the model from the run's seed has the same A, which is compared.
    first, again = Trainer(lora_task(config)), Trainer(lora_task(config))
    assert {name.rsplit(".", 1)[-1] for name in first.frozen} == {"lora_a"}
    for name, slot in first.slots.frozen.items():
        assert mx.array_equal(slot.get(), again.slots.frozen[name].get()), name
        if name.endswith("lora_a"):
            assert mx.array_equal(slot.get(), saved[name])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpoints_change_nothing_but_memory(llama, data, dropout):
    updates = []
    for flag in (False, True):
        config = configure(llama, data, grad_checkpoint=flag)
        config = replace(config, lora_parameters={**config.lora_parameters, "dropout": dropout})
        task = lora_task(config)
        trainer = Trainer(task)
        settings = {**task.config, "seed": 0, "server-round": 1}
        updates.append(trainer.train(trainer.parameters(), {}, task.data(0, 3), settings))
    kept, computed_again = updates
    assert kept.metrics["loss"] == pytest.approx(computed_again.metrics["loss"], rel=1e-6)
    for name, array in kept.parameters.items():
        assert mx.allclose(array, computed_again.parameters[name], rtol=1e-4, atol=1e-6), name


def test_the_base_is_loaded_once_and_its_arrays_are_shared(llama, data):
    task = lora_task(configure(llama, data))
    one, other = task.model(), task.model()
    layers = [model.layers[0].self_attn.q_proj for model in (one, other)]
    assert layers[0] is not layers[1]
    assert layers[0].linear.weight is layers[1].linear.weight
    assert "linear" not in base_model.load(llama).layers[0].self_attn.q_proj


def test_the_loss_is_the_mean_over_tokens_whatever_the_batches(llama, data):
    losses = []
    for size in (1, 3, 10):
        task = lora_task(configure(llama, data, batch_size=size, val_batches=-1))
        trainer = Trainer(task)
        found = trainer.evaluate(trainer.parameters(), {}, task.data(0, 3).train).metrics
        losses.append(found["loss"])
        tokens = sum(len(f"{text}!") - 1 for text in tiny_llama.lines("anna", 10))
        assert found["num-tokens"] == tokens  # an end for each text, and no first token to guess
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_accumulated_iterations_are_steps_on_as_many_texts(kind, llama, data):
    """Of texts of different lengths, so that micro-batches have different numbers of tokens."""
    updates = []
    for number in (1, 4):
        flags = {"batch_size": 8 // number, "local_iters": 3 * number, "optimizer": "sgd"}
        flags |= {"grad_accumulation_steps": number, "fine_tune_type": kind}
        task = lora_task(configure(llama, data, **flags))
        assert task.config["local-steps"] == 3
        trainer = Trainer(task)
        settings = {**task.config, "seed": 0, "server-round": 1}
        updates.append(trainer.train(trainer.parameters(), {}, task.data(0, 3), settings))
    larger, accumulated = updates
    assert accumulated.metrics["num-tokens"] == larger.metrics["num-tokens"]
    assert accumulated.metrics["loss"] == pytest.approx(larger.metrics["loss"], rel=1e-6)
    for name, array in larger.parameters.items():
        assert mx.allclose(array, accumulated.parameters[name], rtol=1e-4, atol=1e-6), name


def test_weighing_by_tokens_is_one_step_on_all_texts(llama, data, tmp_path):
    """A step of gradient descent on each node, averaged by tokens, is the step on all texts."""
    flags = {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "batch_size": 100,
        "local_iters": 1,
        "rounds": 1,
        "weighting": "tokens",
    }
    apart = simulate(
        configure(llama, data, **flags),
        tmp_path,
        strategy=FedAvg(
            weighted_by_key="num-tokens",
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
        ),
    )
    everyone = [
        json.loads(line)
        for folder in texts.folders_of_texts(data)
        for line in (folder / "train.jsonl").read_text().splitlines()
    ]
    pooled = tiny_llama.write_texts(tmp_path / "pooled", everyone)
    task = lora_task(configure(llama, pooled, **flags))
    trainer = Trainer(task)
    settings = {**task.config, "seed": 0, "server-round": 1}
    whole = trainer.train(trainer.parameters(), {}, task.data(0, None), settings)
    for name, array in whole.parameters.items():
        assert mx.allclose(array, apart.parameters[name], rtol=1e-4, atol=1e-6), name


def test_prompts_are_left_out_of_the_loss(llama, tmp_path):
    pairs = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(8)]
    folder = tiny_llama.write_texts(tmp_path / "pairs", pairs, pairs)
    counts = []
    for mask in (False, True):
        config = configure(llama, folder, mask_prompt=mask, val_batches=-1)
        task = lora_task(config)
        trainer = Trainer(task)
        counts.append(
            trainer.evaluate(trainer.parameters(), {}, task.data(0, None).test).metrics[
                "num-tokens"
            ]
        )
    # The template writes "<assistant>", which is the prompt's, then the answer and a line's end.
    assert counts[1] == sum(len(pair["completion"]) + 1 for pair in pairs)
    assert counts[0] > counts[1]


@pytest.mark.parametrize(
    ("empty", "whole"),
    [
        ({"text": ""}, {"text": "one"}),
        ({"text": None}, {"text": "one"}),
        ({"text": " \n"}, {"text": "one"}),
        ({"messages": []}, {"messages": [{"role": "user", "content": "one"}]}),
        ({"prompt": "a", "completion": ""}, {"prompt": "", "completion": "b"}),
        ({"prompt": "a"}, {"prompt": "a", "completion": "b"}),
    ],
)
def test_texts_with_nothing_to_learn_are_left_out_and_named_once(empty, whole, tmp_path):
    model = tiny_llama.write_model(tmp_path / "base")
    path = model / "tokenizer.json"  # one that strips white space
    settings = json.loads(path.read_text())
    settings["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    path.write_text(json.dumps(settings))
    folder = tiny_llama.write_texts(
        tmp_path / "texts", [empty, whole, empty, whole, empty, empty], [empty]
    )
    notes: list[str] = []
    task = lora_task(configure(model, folder), note=notes.append)
    for _ in range(2):
        loaded = task.data(0, None)
        assert len(loaded.train) == 2
        assert loaded.test is None
    left_out, no_validation = notes
    assert left_out.startswith("5 texts have no tokens to train on within max_seq_length 2048 and")
    assert [f"train.jsonl, line {line} (" in left_out for line in range(1, 7)] == [
        *(True, False, True, False, True, False)
    ]
    assert left_out.endswith(" and others.")
    assert f"no validation text beside {folder}/train.jsonl can be used" in no_validation


def test_prompts_that_fill_a_text_are_left_out(llama, tmp_path):
    pairs = [{"prompt": "x" * n, "completion": "y"} for n in (2, 50, 3)]
    folder = tiny_llama.write_texts(tmp_path / "pairs", pairs)
    notes: list[str] = []
    config = configure(llama, folder, mask_prompt=True, max_seq_length=32)
    assert len(lora_task(config, note=notes.append).data(0, None).train) == 2
    assert (
        "1 texts have no tokens to train on within max_seq_length 32 and are left out: " in notes[0]
    )
    assert "train.jsonl, line 2 (its prompt takes 68 of 70 tokens)" in notes[0]


THINKS = "{% if add_generation_prompt %}<assistant><think>\n\n</think>\n\n{% endif %}"
PROMPTS = {
    "as it is written": tiny_llama.CHAT_TEMPLATE,
    "with a block to think in": tiny_llama.CHAT_TEMPLATE.split("{% if add")[0] + THINKS,
    "with the date first": "{% if add_generation_prompt %}today {% endif %}"
    + tiny_llama.CHAT_TEMPLATE,
    "with a system prompt before the last question": (
        "{% if messages[-1]['role'] == 'user' %}<system>Be brief.{% endif %}"
        + tiny_llama.CHAT_TEMPLATE
    ),
}


@pytest.mark.parametrize("template", PROMPTS)
@pytest.mark.parametrize("answer", ["4", "0", "1", "<think>\n2+2=4</think>4"])
@pytest.mark.parametrize("form", ["messages", "completion"])
def test_the_loss_is_on_all_of_an_answer_and_nothing_else(template, answer, form, tmp_path):
    model = tiny_llama.write_model(tmp_path / "base")
    path = model / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "chat_template": PROMPTS[template]}
    path.write_text(json.dumps(settings))
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": answer}]
    record = {"messages": turns} if form == "messages" else {"prompt": "2+2?", "completion": answer}
    folder = tiny_llama.write_texts(tmp_path / "texts", [record])
    found = lora_task(configure(model, folder, mask_prompt=True)).data(0, None).train.texts
    learned = found.tokens[0][found.starts[0] :].tolist()
    assert base_model.load_tokenizer(model).decode(learned) == f"{answer}\n"


def test_a_chat_of_one_turn_and_one_that_ends_with_a_call_are_learned(tmp_path, llama):
    question, call = {"role": "user", "content": "2+2?"}, {"name": "add", "arguments": {}}
    calls = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    chats = [{"messages": [question]}, {"messages": [question, {**calls, "content": ""}]}]
    folder = tiny_llama.write_texts(tmp_path / "texts", chats)
    found = lora_task(configure(llama, folder, mask_prompt=True)).data(0, None).train.texts
    decode = base_model.load_tokenizer(llama).decode
    pairs = zip(found.tokens, found.starts, strict=True)
    learned = [decode(ids[start:].tolist()) for ids, start in pairs]
    assert learned == ["<user>2+2?\n", "\n"]


def test_chats_with_tools_are_taken(llama, tmp_path):
    chat = {
        "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    folder = tiny_llama.write_texts(tmp_path / "chats", [chat], [chat])
    task = lora_task(configure(llama, folder, mask_prompt=True))
    assert len(task.data(0, None).train) == 1


def test_texts_that_are_too_long_are_cut_and_named(llama, tmp_path):
    folder = tiny_llama.write_texts(tmp_path / "long", ["short", "x" * 100], ["short"])
    notes: list[str] = []
    task = lora_task(configure(llama, folder, max_seq_length=32), note=notes.append)
    tokens = [batch for batch, _ in task.data(0, None).train(mx.random.key(0))]
    assert max(batch.shape[1] for batch in tokens) == 33
    assert "1 texts are longer than max_seq_length 32 and are cut" in notes[0]
    assert "train.jsonl, line 2 (101 tokens)" in notes[0]


def test_a_node_without_texts_to_validate_on_is_named(llama, tmp_path):
    folder = tiny_llama.write_texts(tmp_path / "all", tiny_llama.lines("anna", 4))
    notes: list[str] = []
    assert lora_task(configure(llama, folder), note=notes.append).data(0, None).test is None
    assert f"no valid.jsonl beside {folder}/train.jsonl: the node trains" in notes[0]


def test_a_folder_of_texts_is_dealt_out(llama, tmp_path):
    folder = tiny_llama.write_texts(
        tmp_path / "all", tiny_llama.lines("anna", 10), ["a valid", "b"]
    )
    task = lora_task(configure(llama, folder))
    parts = [task.data(number, 2).train for number in range(2)]
    assert [len(part) for part in parts] == [5, 5]
    assert len(task.data(0, None).train) == 10


def test_a_dataset_is_partitioned(llama, tmp_path):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("flwr_datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = datasets.Dataset.from_dict({"text": tiny_llama.lines("anna", 20)})
    rows.to_parquet(folder / "train.parquet")
    task = lora_task(configure(llama, folder))
    parts = [task.data(number, 2) for number in range(2)]
    assert [(len(part.train), len(part.test)) for part in parts] == [(8, 2), (8, 2)]
    with pytest.raises(fed.FedError, match="set this node's partition"):
        task.data(0, None)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_begins_at_the_learning_rate_with_bias_correction(optimizer, llama, data):
    """Without it the first step of a round is 3.2 times the learning rate: 0.1 / sqrt(0.001)."""
    for flags, factor in (({}, 3.16), ({"bias_correction": True}, 1.0)):
        config = configure(llama, data, optimizer=optimizer, local_iters=1, **flags)
        task = lora_task(config)
        trainer = Trainer(task)
        start = trainer.parameters()
        settings = {**task.config, "seed": 0, "server-round": 1}
        update = trainer.train(start, {}, task.data(0, 3), settings)
        steps = [mx.abs(a - start[name]).max().item() for name, a in update.parameters.items()]
        assert max(steps) == pytest.approx(factor * 1e-2, rel=0.05)


def test_an_optimizer_that_goes_on_is_one_training(llama, data, tmp_path):
    """One client in four rounds of two iterations ends where one round of eight does."""

    def train(rounds: int, keep: bool) -> dict[str, mx.array]:
        flags = {"rounds": rounds, "local_iters": 8 // rounds, "val_batches": 0}
        config = configure(llama, data / "anna", keep_optimizer=keep, **flags)
        name = f"{rounds}-{keep}"
        return simulate(config, tmp_path, name, clients=1, num_rounds=rounds).parameters

    whole = train(1, False)
    distances = [
        max(mx.abs(array - ends[name]).max().item() for name, array in whole.items())
        for ends in (train(4, True), train(4, False))
    ]
    assert 20 * distances[0] < 1e-2 < distances[1]  # Adam makes roundings grow


def test_a_schedule_goes_on_from_round_to_round(llama, data):
    schedule = {"name": "linear_schedule", "arguments": [1e-2, 0.0, 12], "warmup": 2}
    config = replace(configure(llama, data, local_iters=6), lr_schedule=schedule)
    task = lora_task(config)
    rates = []
    for number in (1, 2):
        optimizer = task.optimizer({**task.config, "server-round": number})
        for _ in range(6):
            optimizer.apply_gradients({"w": mx.array(1.0)}, {"w": mx.array(1.0)})
            rates.append(optimizer.learning_rate.item())
    from mlx_lm.tuner.utils import build_schedule

    expected = [build_schedule(schedule)(mx.array(step)).item() for step in range(12)]
    assert rates == pytest.approx(expected)


def test_a_sample_is_written_after_rounds(llama, data, tmp_path):
    from mlx_fed.lm.samples import sampler

    config = configure(
        llama, data, rounds=2, sample_prompt="anna says ", sample_every=2, sample_tokens=5
    )
    task = lora_task(config)
    result = simulate(config, tmp_path, evaluate_fn=sampler(config, task))
    assert result.rounds[0]["central"] == {}
    assert result.rounds[1]["central"]["sample"].startswith("anna says ")
    assert len(result.rounds[1]["central"]["sample"]) > len("anna says ")


def test_a_key_may_be_the_end_of_a_name(llama, data, tmp_path):
    config = configure(llama, data, local_iters=1, rounds=1)
    keys = ["q_proj", "mlp.up_proj", "embed_tokens"]
    config = replace(config, lora_parameters={**config.lora_parameters, "keys": keys})
    result = simulate(config, tmp_path)
    modules = {name.rsplit(".", 1)[0] for name in result.parameters}
    names = ("self_attn.q_proj", "mlp.up_proj")
    layers = {f"model.layers.{n}.{name}" for n in (0, 1) for name in names}
    assert modules == {*layers, "model.embed_tokens"}
    # mlx-lm, which knows whole names alone, loads what it wrote.
    theirs, _ = mlx_lm_load(str(llama), adapter_path=str(result.model))
    found = theirs.layers[1].self_attn.q_proj.lora_b
    assert mx.array_equal(found, result.parameters["model.layers.1.self_attn.q_proj.lora_b"])


def test_training_goes_on_from_adapters(llama, data, tmp_path):
    config = configure(llama, data)
    first = simulate(config, tmp_path, name="first")
    path = str(first.model / "adapters.safetensors")
    trainer = Trainer(lora_task(replace(config, resume_adapter_file=path)))
    for name, array in trainer.parameters().items():
        assert mx.array_equal(array, first.parameters[name])


def test_the_identity_of_a_base_tells_values_and_not_files(llama, tmp_path):
    same = tiny_llama.write_model(tmp_path / "same")
    other = tiny_llama.write_model(tmp_path / "other", seed=1)
    arrays = mx.load(str(same / "model.safetensors"))
    (same / "model.safetensors").unlink()
    names = sorted(arrays)
    for number, part in enumerate((names[::2], names[1::2])):
        shard = {name: arrays[name] for name in part}
        mx.save_safetensors(str(same / f"model-{number}.safetensors"), shard)
    assert base_fingerprint.hash_weights(same) == base_fingerprint.hash_weights(llama)
    assert base_fingerprint.hash_weights(other) != base_fingerprint.hash_weights(llama)


def test_the_identity_of_a_config_tells_what_is_computed_and_not_how_it_is_written(llama, tmp_path):
    same = tiny_llama.write_model(tmp_path / "same")
    written = json.loads((same / "config.json").read_text())
    spelled_out = {"rope_theta": 10000.0, "transformers_version": "9", "torch_dtype": "float32"}
    (same / "config.json").write_text(json.dumps({**written, **spelled_out}))
    assert base_fingerprint.describe_config(same) == base_fingerprint.describe_config(llama)
    (same / "config.json").write_text(json.dumps({**written, "rope_scaling": {"factor": 8.0}}))
    found = base_fingerprint.describe_config(same)
    assert found["rope_scaling.factor"] == "8"
    assert base_fingerprint.describe_config(llama)["rope_scaling"] == "null"


def test_a_base_that_changes_in_its_folder_is_loaded_anew(data, tmp_path):
    folder = tiny_llama.write_model(tmp_path / "base")
    before = base_model.load(folder), base_model.load_tokenizer(folder)
    assert (base_model.load(folder), base_model.load_tokenizer(folder)) == before
    (first,) = {layer.self_attn.q_proj.weight[0, 0].item() for layer in before[0].layers[:1]}
    tiny_llama.write_model(folder, seed=1, words=["anna"])
    assert base_model.load(folder).layers[0].self_attn.q_proj.weight[0, 0].item() != first
    assert "anna" in base_model.load_tokenizer(folder).get_vocab()
    # So are checks of its config.json.
    config = configure(folder, data, num_layers=2)
    lora_task(config).data(0, 3)
    tiny_llama.write_model(folder, num_hidden_layers=1)
    with pytest.raises(fed.FedError, match="num_layers is 2, and the model has 1 layers"):
        lora_task(config).data(0, 3)


def test_a_base_that_is_gone_is_not_remembered(tmp_path):
    folder = tiny_llama.write_model(tmp_path / "base")
    assert base_model.find(str(folder)) == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(fed.FedError, match="has no weights"):
        base_model.find(str(folder))


def test_no_validation_is_asked_for(llama, data, tmp_path):
    from mlx_fed.cli.lora import make_strategy

    config = configure(llama, data, val_batches=0)
    result = simulate(config, tmp_path, strategy=make_strategy(config, 1))
    assert result.rounds[-1]["evaluate"] == {"nodes": []}
    assert result.rounds[-1]["refused"] == []


def test_the_identity_of_a_tokenizer_tells_its_words(llama, tmp_path):
    longer = tiny_llama.write_model(tmp_path / "longer", words=["anna"])
    found = [
        base_fingerprint.hash_tokenizer(base_model.load_tokenizer(path)) for path in (llama, longer)
    ]
    assert found[0] != found[1]
    assert found[0] == base_fingerprint.hash_tokenizer(base_model.load_tokenizer(llama))
