"""What cannot be fine-tuned is refused at the start, by name and with what to do."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm")

from mlx_fed.rounds import loop
from mlx_fed.errors import FedError
from mlx_fed.runs.history import History
from mlx_fed.lm import adapters, base_model
from mlx_fed.lm.config import LoraConfig, load_config
from mlx_fed.lm.lora_task import lora_task
from mlx_fed.rounds.settings import RunSettings
from mlx_fed.rounds.named_strategies import find
from mlx_fed.task import fingerprint_of
from mlx_fed.training.trainer import Trainer

from ..helpers import tiny_llama
from ..helpers.loopback import LoopbackGrid


pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture
def data(tmp_path) -> Path:
    return tiny_llama.write_texts(tmp_path / "data", ["one", "two", "three"], ["four"])


def refused(message: str):
    return pytest.raises(FedError, match=re.escape(message))


def written(folder: Path, text: str) -> Path:
    path = folder / "lora.yaml"
    path.write_text(text)
    return path


# -- the configuration ---------------------------------------------------------------------


def test_defaults_are_mlx_lms():
    from mlx_lm.lora import CONFIG_DEFAULTS

    ours = vars(LoraConfig())
    for key, value in CONFIG_DEFAULTS.items():
        if key in ours and key != "optimizer_config":
            assert ours[key] == value, key
    path = CONFIG_DEFAULTS.keys() - ours.keys()
    assert path == {
        "adapter_path",
        "clear_cache_threshold",
        "config",
        "project_name",
        "report_to",
        "save_every",
        "steps_per_eval",
        "test",
        "test_batches",
        "train",
    }


def test_a_file_of_mlx_lms_is_taken_with_flags_over_it(tmp_path):
    path = written(
        tmp_path,
        "model: base\ntrain: true\nlearning_rate: 1e-5\niters: 100\nadapter_path: adapters\n"
        "lora_parameters: {rank: 4}\nfederation: {rounds: 3, nodes: 2}\n",
    )
    with pytest.warns(UserWarning, match="iters 100 becomes 104"):
        config = load_config(path, {"batch_size": 2, "rounds": 8, "seed": None})
    assert (config.model, config.learning_rate, config.batch_size) == ("base", 1e-5, 2)
    assert config.lora_parameters == {"rank": 4, "dropout": 0.0, "scale": 20.0}
    assert (config.federation.rounds, config.federation.nodes) == (8, 2)
    assert config.local_steps() == 13


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "unknown key lerning_rate. Did you mean learning_rate?"),
        ("federation: {round: 1}", "federation.round. Did you mean federation.rounds?"),
        ("rounds: 3", "unknown key rounds. Put it below federation: as federation.rounds."),
        ("federation: {model: x}", "Put model at the top, beside model and data."),
        ("lora_parameters: {rang: 1}", "lora_parameters.rang. Did you mean lora_parameters.rank?"),
        ("lora_parameters: {alpha: x}", "lora_parameters.alpha is a number, not 'x'"),
        ("lora_parameters: {keys: q_proj}", "lora_parameters.keys is a list, not 'q_proj'"),
        ("lora_parameters: {rank: 0}", "lora_parameters.rank is 1 or more, not 0"),
        ("batch_size: four", "batch_size is a whole number, not 'four'"),
        ("batch_size: 0", "batch_size is 1 or more, not 0"),
        ("mask_prompt: 1", "mask_prompt is true or false, not 1"),
        ("optimizer: lion", "optimizer is one of adam, adamw, muon, sgd, adafactor, not 'lion'"),
        ("federation: {fraction: 2.0}", "federation.fraction is above 0 and at most 1, not 2.0"),
        ("lr_schedule: {name: cosine}", "lr_schedule has a name, one of cosine_decay"),
        (
            "optimizer: sgd\nfederation: {bias_correction: true}",
            "federation.bias_correction is Adam's, of adam and adamw, and optimizer is sgd",
        ),
        ("steps_per_report: 0", "steps_per_report is 1 or more, not 0"),
        ("grad_accumulation_steps: 0", "grad_accumulation_steps is 1 or more, not 0"),
        ("learning-rate: 1\nlearning_rate: 2", "learning_rate twice, with hyphens and underscores"),
        ("max_seq_len: 512", "unknown key max_seq_len. Did you mean max_seq_length?"),
        ("gradient_checkpointing: true", "Did you mean grad_checkpoint?"),
        ("lora_parameters: [q_proj]", "lora_parameters is a section of keys, not ['q_proj']"),
        (
            "federation: {local_epochs: 1, local_iters: 5}",
            "federation.local_epochs and federation.local_iters exclude each other",
        ),
        (
            "fine_tune_type: full\nfederation: {freeze_a: true}",
            "federation.freeze_a needs adapters, and fine_tune_type full has none",
        ),
        ("num_layers: 0", "num_layers is 1 or more, or -1 for all, not 0"),
        ("val_batches: -2", "val_batches is 0 or more, or -1 for all, not -2"),
        ("learning_rate: -1e-5", "learning_rate is above 0, not -1e-05"),
        ("lr_schedule: {nmae: x}", "unknown key lr_schedule.nmae. Did you mean lr_schedule.name?"),
        ("hf_dataset: {path: x}", "hf_dataset is not supported: set data to the dataset's id"),
        ("federation: 3", "federation is a section of keys, not 3"),
        ("- model", "has no keys"),
        ("model: [", "is not YAML"),
    ],
)
def test_a_configuration_that_cannot_be(text, message, tmp_path):
    with refused(message) as raised:
        load_config(written(tmp_path, text))
    assert "lora.yaml" in str(raised.value)


LORA = {"rank": 8, "dropout": 0.0, "scale": 20.0}
OTHERS = [
    # Of mlx-lm's own documentation: comments, all keys, numbers with exponents.
    (
        "# LoRA\nmodel: base\ntrain: true\nfine_tune_type: lora\noptimizer: adamw\n"
        "optimizer_config: {adamw: {weight_decay: 0.01}}\nseed: 0\nnum_layers: 8\n"
        "steps_per_report: 10\nsteps_per_eval: 200\nresume_adapter_file: null\n"
        "adapter_path: adapters\nsave_every: 100\ntest: false\ntest_batches: 100\n"
        "learning_rate: 1e-5\nlora_parameters: {rank: 8, scale: 20.0, dropout: 0.0}\n",
        {"num_layers": 8, "optimizer": "adamw", "resume_adapter_file": None},
        [],
    ),
    ("learning_rate: 1.0e-4\nval_batches: -1\nnum_layers: -1", {"num_layers": -1}, []),
    ("grad_accumulation_steps: 1\nclear_cache_threshold: 0\nreport_to: wandb", {}, []),
    ("max-seq-length: 512\nbatch-size: 1\nmask-prompt: true", {"max_seq_length": 512}, []),
    ("seed: null\nlr_schedule: null\nnum_layers:", {"seed": 0, "num_layers": 16}, []),
    ("lora_parameters:\nfederation:", {"lora_parameters": LORA}, []),
    (
        "lora_parameters: {keys: null, rank: 4, scale: null, dropout: null}",
        {"lora_parameters": {**LORA, "rank": 4}},
        [],
    ),
    ("optimizer: AdamW", {"optimizer": "adamw"}, []),
    # For older versions.
    ("lora_layers: 32", {"num_layers": 32}, ["lora_layers is num_layers"]),
    ("lora_layers: 32\nnum_layers: 4", {"num_layers": 4}, ["lora_layers is num_layers"]),
    ("lora-layers: -1", {"num_layers": -1}, ["lora_layers is num_layers"]),
    ("lora_parameters: {lora_layers: 4}", {"num_layers": 4}, ["lora_layers is num_layers"]),
    (
        "lora_parameters: {lora_layers: [q_proj, v_proj]}",
        {"lora_parameters": {**LORA, "keys": ["q_proj", "v_proj"]}},
        ["lora_parameters.lora_layers is read as lora_parameters.keys"],
    ),
    (
        "adapter_file: a.npz\nsteps_per_save: 50",
        {},
        ["ignores adapter_file", "ignores steps_per_save"],
    ),
    ("use_chat_template: false", {}, ["mlx-lm ignores use_chat_template, and so does"]),
    # With words of other libraries.
    (
        "lora_parameters: {rank: 16, alpha: 32, dropout: 0.05}",
        {"lora_parameters": {"rank": 16, "dropout": 0.05, "scale": 2.0}},
        ["lora_parameters.alpha 32 is a scale of 2.0: alpha / rank"],
    ),
    (
        "lora_parameters: {rank: 16, alpha: 32, scale: 10.0}",
        {"lora_parameters": {"rank": 16, "dropout": 0.0, "scale": 10.0}},
        ["ignores lora_parameters.alpha, and so does mlx-fed. Its key is lora_parameters.scale"],
    ),
    ("lora_parameters: {lora_alpha: 4}", {"lora_parameters": {**LORA, "scale": 0.5}}, ["of 0.5"]),
    (
        "lora_rank: 64\nlora_dropout: 0.1\nwarmup_steps: 10\nweight_decay: 0.1\nepochs: 3",
        {"lora_parameters": LORA},
        ["lora_parameters.rank", "ters.dropout", "schedule.warmup", "_config", "local_epochs"],
    ),
    (
        "lora_parameters: {r: 4, bias: none}",
        {},
        ["is lora_parameters.rank", "ignores lora_parameter"],
    ),
    (
        "lr_schedule: {name: cosine_decay, warmup: 9, warmup_steps: 5, arguments: [1e-5, 9]}",
        {"lr_schedule": {"name": "cosine_decay", "warmup": 9, "arguments": [1e-5, 9]}},
        ["mlx-lm ignores lr_schedule.warmup_steps, and so does mlx-fed"],
    ),
    ("iters: 100\nfederation: {rounds: 8}", {}, ["iters 100 becomes 104: a round has 13 whole"]),
    (
        "iters: 100\ngrad_accumulation_steps: 8\nfederation: {rounds: 5}",
        {"grad_accumulation_steps": 8},
        ["iters 100 becomes 120: a round has 3 whole steps"],
    ),
    (
        "grad_accumulation_steps: 4\nfederation: {local_iters: 10}",
        {},
        ["local_iters 10 becomes 12: a round has 3 whole steps"],
    ),
    ("wandb: {project: x}\ndescription: a test", {}, ["ignores wandb", "ignores description"]),
]
"""Configuration files as they are written for mlx-lm, with what they mean and what is noted."""
OTHERS += [
    # Shapes of files in public repositories, with other names and numbers of their own.
    (
        'model: "base"\ndata: "texts"\nadapter_path: "out"\nfine_tune_type: "lora"\ntrain: true\n'
        "mask_prompt: true\ngrad_checkpoint: true\nbatch_size: 4\niters: 4000\n"
        "learning_rate: 0.0003\nsteps_per_eval: 400\nsteps_per_report: 40\nsave_every: 800\n"
        "max_seq_length: 256\nnum_layers: -1\nlora_parameters:\n  rank: 8\n  alpha: 16.0\n"
        "  dropout: 0.0\n  scale: 2.0\n",
        {"steps_per_report": 40, "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 2.0}},
        ["ignores lora_parameters.alpha"],
    ),
    (
        "model: ./base\ndata: ./texts\ntrain: true\nseed: 7\nlora_layers: 24   # of all\n"
        "batch_size: 8\niters: 900\nsteps_per_eval: 100\nlearning_rate: 2e-4\nval_batches: 5\n"
        "lora_parameters:\n  rank: 16   # more\n  alpha: 32\n  dropout: 0.05\n"
        "adapter_file: ./adapters/out\n",
        {"num_layers": 24, "lora_parameters": {"rank": 16, "dropout": 0.05, "scale": 2.0}},
        ["alpha 32 is a scale of 2.0", "lora_layers is num_layers", "ignores adapter_file"],
    ),
    (
        'model: "base"\ntrain: true\nfine_tune_type: lora\ndata: "texts"\nseed: 1\nnum_layers: 8\n'
        "batch_size: 1\niters: 500\nval_batches: 10\nlearning_rate: 2.0e-5\n"
        "steps_per_report: 10\nsteps_per_eval: 50\nadapter_path: out\nsave_every: 100\n"
        "max_seq_length: 1024\ngrad_checkpoint: true\nlora_parameters:\n"
        '  keys: ["self_attn.q_proj", "self_attn.v_proj"]\n  rank: 4\n  scale: 1.0\n'
        "  dropout: 0.05\n",
        {"learning_rate": 2e-5, "grad_checkpoint": True},
        [],
    ),
    (
        "# one line of comment\nmodel: base\ntrain: true\ndata: texts\niters: 2000   # passes\n"
        "save_every: 50\nmask_prompt: false   # no prompt\nlearning_rate: 1.0e-4\nseed: 42\n"
        "lora_parameters:\n  rank: 16\n  scale: 32.0\n  dropout: 0.05\n",
        {"mask_prompt": False, "seed": 42},
        [],
    ),
    (
        "model: base\ntrain: true\noptimizer: adam\niters: 200\nval_batches: 64\ntest: false\n"
        "test_batches: 200\ngrad_checkpoint: false\ngrad_accumulation_steps: 1\n"
        "clear_cache_threshold: 0\nmask_prompt: true\nlora_parameters:\n  rank: 2\n"
        "  dropout: 0.0\n  scale: 20.0\n",
        {"val_batches": 64, "grad_accumulation_steps": 1},
        [],
    ),
    (
        "model: base\nbatch_size: 1\niters: 1000\nresume_adapter_file: null\n"
        'adapter_path: "out"\nlora_parameters:\n  keys: ["o_proj","qkv_proj"]\n  rank: 64\n'
        "  scale: 1\n  dropout: 0.1\n",
        {
            "lora_parameters": {
                "keys": ["o_proj", "qkv_proj"],
                "rank": 64,
                "scale": 1,
                "dropout": 0.1,
            }
        },
        [],
    ),
    (
        "batch_size: 1\niters: 800\ngrad_accumulation_steps: 4\nlr_schedule: null\n"
        "optimizer: adam\ngrad_checkpoint: true\nmask_prompt: true\nmax_seq_length: 512\n",
        {"grad_accumulation_steps": 4, "lr_schedule": None},
        [],
    ),
    ("lora_parameters:\n  rank: 8\n  scale: 16\n  dropout: 0\n", {}, []),
]


@pytest.mark.parametrize(("text", "meant", "noted"), OTHERS)
def test_files_for_mlx_lm_are_taken_as_mlx_lm_takes_them(text, meant, noted, tmp_path):
    notes: list[str] = []
    config = load_config(written(tmp_path, text), note=notes.append)
    assert {key: getattr(config, key) for key in meant} == meant
    assert len(notes) == len(noted)
    for note, words in zip(notes, noted, strict=True):
        assert note.startswith(f"{tmp_path}/lora.yaml: ")
        assert words in note


def test_a_key_that_is_passed_over_is_warned_of_where_the_file_is_loaded(tmp_path):
    with pytest.warns(UserWarning, match="mlx-lm ignores wandb") as told:
        load_config(written(tmp_path, "wandb: x"))
    assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer_config: {adam: {beta: 1}}", "train with this optimizer_config.adam: "),
        ("optimizer_config: {adam: 3}", "train with this optimizer_config.adam: "),
        ("optimizer_config: {adam: {betas: 3}}", "train with this optimizer_config.adam: "),
        ("lr_schedule: {name: cosine_decay, arguments: [1e-3]}", "train with this lr_schedule: "),
        ("lr_schedule: {name: cosine_decay, arguments: [a, 9]}", "train with this lr_schedule: "),
    ],
)
def test_an_optimizer_that_cannot_be(text, message, tmp_path):
    with refused(message):
        lora_task(load_config(written(tmp_path, text)))


def test_the_command_says_so_and_ends(start, tmp_path):
    path = written(tmp_path, "modle: base")
    command = start("-m", "mlx_fed", "lora", "serve", "-c", path)
    assert command.ends() == 1
    assert "unknown key modle. Did you mean model?" in command.text
    assert "Traceback" not in command.text


# -- texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.jsonl is empty"),
        ("\n\n", "train.jsonl is empty"),
        ('{"text": "a"}\n{"text": ', "train.jsonl, line 2 is not JSON"),
        ('{"text": "a"}\n\n["b"]', "train.jsonl, line 3 is not a record"),
        ('{"txt": "a"}', "train.jsonl, line 1 has 'txt': mlx-lm wants 'text', 'messages'"),
        ('{"text": 3}', "line 1: 'text' is not text"),
        ('{"messages": 3}', "line 1: 'messages' is a list of messages with a role and content"),
        ('{"prompt": "a", "completion": 3}', "line 1: 'completion' is not text"),
        (
            '{"text": "a"}\n{"prompt": "a", "completion": "b"}',
            "train.jsonl, line 2 has no 'text', which line 1 has",
        ),
    ],
)
def test_texts_that_are_not_laid_out_as_mlx_lms(content, message, tmp_path):
    (tmp_path / "train.jsonl").write_text(content)
    # They are read before the model is looked for.
    config = load_config(None, {"model": "./nowhere", "data": str(tmp_path)})
    with refused(message):
        lora_task(config).data(0, None)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    with refused("train.jsonl, line 1 is not JSON"):
        lora_task(load_config(None, {"data": str(tmp_path)})).data(0, None)


def test_a_folder_without_texts(tmp_path):
    config = load_config(None, {"data": str(tmp_path)})
    with refused(f"There is no train.jsonl in {tmp_path}."):
        lora_task(config).data(0, None)
    tiny_llama.write_texts(tmp_path / "anna", ["a"])
    with refused("but in anna: choose one of these"):
        lora_task(config).data(0, None)
    with refused("has 1 folders of texts, for as many nodes, not 3"):
        lora_task(config).data(0, 3)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"text": ""}, "'text' is empty"),
        ({"text": None}, "'text' is empty"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": [{"role": "user", "content": ""}]}, "'messages' is empty"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": "a"}, "'completion' is empty"),
        ({"prompt": None, "completion": "a"}, "'prompt' is empty"),
        ({"prompt": "x" * 50, "completion": "y"}, "its prompt takes 68 of 70 tokens"),
    ],
)
def test_only_texts_that_have_nothing_to_learn(record, why, llama, tmp_path):
    folder = tiny_llama.write_texts(tmp_path / "texts", [record])
    flags = {"max_seq_length": 32, "mask_prompt": "prompt" in record, "num_layers": -1}
    flags |= {"model": str(llama), "data": str(folder)}
    place = folder / "train.jsonl"
    with refused(
        f"No text of {place} can be trained within max_seq_length 32: {place}, line 1 ({why})."
    ):
        lora_task(load_config(None, flags)).data(0, None)


def test_plain_text_has_no_prompt_to_mask(llama, data):
    flags = {"model": str(llama), "data": str(data), "mask_prompt": True}
    with refused("train.jsonl, line 1 is plain text, which has no prompt"):
        lora_task(load_config(None, flags)).data(0, None)


# -- the base model ------------------------------------------------------------------------


def forget_what_was_found() -> None:
    """As in a new process."""
    base_model.download.cache_clear()


def build(model: Path | str, **flags):
    return lora_task(load_config(None, {"model": str(model), "num_layers": 2, **flags})).model()


def test_mlx_lm_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    forget_what_was_found()
    with refused('needs mlx-lm: pip install -e ".[lm]" in the repository of mlx-fed'):
        build("anything")


def test_a_model_that_is_not_there(tmp_path):
    with refused("There is no model in ./models/nowhere: no such folder"):
        build("./models/nowhere")


def test_a_model_without_weights(tmp_path):
    model = tiny_llama.write_model(tmp_path / "empty")
    (model / "model.safetensors").unlink()
    with refused("has no weights: no file model*.safetensors"):
        build(model)


def test_a_folder_that_is_no_model(tmp_path):
    with refused(f"{tmp_path} is no model: its config.json"):
        build(tmp_path)


def test_an_architecture_that_mlx_lm_does_not_know(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "perceptron"}))
    with refused("a model of type 'perceptron', which mlx-lm "):
        build(tmp_path)


def test_weights_that_are_cut_off(tmp_path):
    model = tiny_llama.write_model(tmp_path / "cut")
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:1000])
    with refused(f"mlx-lm cannot load {model}"):
        build(model)


def test_a_model_without_a_tokenizer(data, tmp_path):
    model = tiny_llama.write_model(tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    config = load_config(None, {"model": str(model), "num_layers": 2, "data": str(data)})
    with refused(f"Cannot load the tokenizer in {model}"):
        lora_task(config).data(0, None)


def test_more_layers_than_there_are(llama):
    with refused("num_layers is 16, and the model has 2 layers: -1 is all"):
        build(llama, num_layers=16)


def test_lora_keys_that_match_nothing(llama):
    config = load_config(None, {"model": str(llama), "num_layers": 2})
    keys = {**config.lora_parameters, "keys": ["self_attn.q_porj"]}
    with refused("names 'self_attn.q_porj', which no layer has. Did you mean 'self_attn.q_proj'?"):
        lora_task(replace(config, lora_parameters=keys)).model()


def test_no_lora_keys_at_all(llama):
    config = load_config(None, {"model": str(llama), "num_layers": 2})
    with refused("lora_parameters.keys is empty, so that nothing is trained: leave it out"):
        lora_task(replace(config, lora_parameters={**config.lora_parameters, "keys": []})).model()


def test_nothing_is_downloaded_for_adapters_that_do_not_fit(llama, monkeypatch, tmp_path):
    import huggingface_hub.constants

    # What the hub has given so far: the model's config.json, which is asked for first.
    folder = tmp_path / "models--somebody--model"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_bytes((llama / "config.json").read_bytes())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    forget_what_was_found()
    with refused("num_layers is 16, and the model has 2 layers"):
        build("somebody/model", num_layers=16)
    with refused(f"{snapshot} has no weights"):
        build("somebody/model")


@pytest.mark.parametrize("bits", [4, 8])
def test_whole_layers_of_a_quantized_base(bits, tmp_path):
    model = tiny_llama.write_model(tmp_path / "base", bits=bits)
    with refused("those of this base model are quantized: use lora or dora, or a base model that"):
        build(model, fine_tune_type="full")
    # Also where its config.json does not say so.
    config = LoraConfig(fine_tune_type="full", num_layers=1)
    quantized = base_model.share(base_model.load(model))
    with refused("those of this base model are quantized"):
        adapters.attach(quantized, config)


def test_adapters_to_start_from_that_do_not_fit(llama, tmp_path):
    with refused("Cannot read resume_adapter_file"):
        build(llama, resume_adapter_file=str(tmp_path / "none.safetensors"))
    path = str(tmp_path / "other.safetensors")
    mx.save_safetensors(path, {"model.layers.0.self_attn.q_proj.lora_a": mx.zeros((64, 3))})
    with refused("Was it trained with the same fine_tune_type, lora_parameters and num_layers?"):
        build(llama, resume_adapter_file=path)


def lora_config(llama: Path, lora_parameters: dict, **flags) -> LoraConfig:
    config = load_config(None, {"model": str(llama), "num_layers": 2, **flags})
    return replace(config, lora_parameters={**config.lora_parameters, **lora_parameters})


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"scale": 10.0}, {}, "trained with scale 10.0 ({path}), and the configuration has 20.0"),
        ({"rank": 4}, {}, "trained with rank 4 ({path}), and the configuration has 8"),
        (
            {"keys": ["self_attn.q_proj"]},
            {"keys": ["q_proj", "v_proj"]},
            "trained with keys ['self_attn.q_proj'] ({path}), and the configuration has "
            "['self_attn.q_proj', 'self_attn.v_proj']",
        ),
        ({"keys": ["self_attn.q_proj"]}, {}, "trained with keys ['self_attn.q_proj'] ({path})"),
        ({}, {"keys": ["self_attn.q_proj"]}, "Was it trained with the same fine_tune_type, lora_"),
        (
            {"fine_tune_type": "dora"},
            {},
            "trained with fine_tune_type dora ({path}), and the configuration has lora",
        ),
        (
            {"num_layers": 1},
            {"num_layers": -1},
            "trained with num_layers 1 ({path}), and the configuration has 2",
        ),
    ],
)
def test_adapters_that_were_trained_otherwise(before, now, message, llama, tmp_path):
    def configure(values: dict) -> LoraConfig:
        top = {k: v for k, v in values.items() if k in ("num_layers", "fine_tune_type")}
        return lora_config(llama, {k: v for k, v in values.items() if k not in top}, **top)

    folder = adapters.save(lora_task(configure(before)).model(), tmp_path, configure(before))
    resumed = replace(configure(now), resume_adapter_file=str(folder / "adapters.safetensors"))
    with refused(message.format(path=folder / "adapter_config.json")):
        lora_task(resumed).model()


def test_adapters_of_the_same_kind_in_other_words(llama, tmp_path):
    names = ["self_attn.q_proj", "self_attn.v_proj"]
    before = lora_config(llama, {"keys": names, "scale": 10, "dropout": 0.1}, num_layers=-1)
    folder = adapters.save(lora_task(before).model(), tmp_path, before)
    path = folder / "adapter_config.json"
    known = json.loads(path.read_text())
    known["lora_parameters"]["keys"].append("mlp.gate")  # which mlx-lm ignores
    path.write_text(json.dumps(known))
    file = str(folder / "adapters.safetensors")
    now = lora_config(llama, {"keys": ["v_proj", "q_proj"], "scale": 10.0})
    notes: list[str] = []
    lora_task(replace(now, resume_adapter_file=file), notes.append).model()
    assert notes == []
    path.unlink()
    task = lora_task(replace(now, resume_adapter_file=file), notes.append)
    for _ in range(2):
        task.model()
    assert len(notes) == 1
    assert f"there is no adapter_config.json beside {file}, so that the scale" in notes[0]
    assert "it is taken to be 10.0" in notes[0]


def test_an_adapter_config_that_is_none(llama, tmp_path):
    config = lora_config(llama, {})
    folder = adapters.save(lora_task(config).model(), tmp_path, config)
    (folder / "adapter_config.json").write_text("[]")
    resumed = replace(config, resume_adapter_file=str(folder / "adapters.safetensors"))
    with refused(f"Cannot read {folder / 'adapter_config.json'}, beside resume_adapter_file"):
        lora_task(resumed).model()


# -- another node's ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("base", "its base model is not the server's: "),
        ("rope", "its base model's rope_theta is not the server's: 500000, expected 10000"),
        (
            "not yet downloaded",
            "its base model's rope_theta is not the server's: 500000, expected 10000",
        ),
        ("bits", "its base model's quantization is not the server's: {\"bits\": 4, "),
        ("tokenizer", "its tokenizer is not the server's: "),
        ("tokenizer before weights", "its tokenizer is not the server's: "),
        ("rank", "its LoRA rank is not the server's: 2, expected 8"),
        ("scale", "its LoRA scale is not the server's: 5.0, expected 20.0"),
        ("kind", "its fine_tune_type is not the server's: dora, expected lora"),
        ("layers", "its num_layers is not the server's: 1, expected 2"),
        (
            "keys",
            'its LoRA keys is not the server\'s: ["self_attn.q_proj"], expected ["mlp.down_proj", ',
        ),
        ("freeze_a", "its freeze_a is not the server's: True, expected False"),
        ("optimizer", "its keep_optimizer is not the server's: True, expected False"),
    ],
)
def test_a_node_that_differs_is_turned_away(what, message, llama, data, tmp_path):
    config = load_config(
        None, {"model": str(llama), "data": str(data), "num_layers": 2, "local_iters": 1}
    )
    other = {
        "base": lambda: replace(
            config, model=str(tiny_llama.write_model(tmp_path / "other", seed=1))
        ),
        "rope": lambda: replace(config, model=str(with_rope_theta(tmp_path / "other", 5e5))),
        "not yet downloaded": lambda: replace(
            config, model=str(without_weights(with_rope_theta(tmp_path / "other", 5e5)))
        ),
        "bits": lambda: replace(
            config, model=str(tiny_llama.write_model(tmp_path / "other", bits=4))
        ),
        "tokenizer": lambda: replace(
            config, model=str(tiny_llama.write_model(tmp_path / "other", words=["one"]))
        ),
        "tokenizer before weights": lambda: replace(
            config,
            model=str(without_weights(tiny_llama.write_model(tmp_path / "other", words=["one"]))),
        ),
        "rank": lambda: replace(config, lora_parameters={**config.lora_parameters, "rank": 2}),
        "scale": lambda: replace(config, lora_parameters={**config.lora_parameters, "scale": 5}),
        "kind": lambda: replace(config, fine_tune_type="dora"),
        "layers": lambda: replace(config, num_layers=1),
        "keys": lambda: replace(
            config, lora_parameters={**config.lora_parameters, "keys": ["q_proj"]}
        ),
        "freeze_a": lambda: replace(config, federation=replace(config.federation, freeze_a=True)),
        "optimizer": lambda: replace(
            config, federation=replace(config.federation, keep_optimizer=True)
        ),
    }[what]()
    task = lora_task(config)
    apps = [fed.client_app(with_all_texts(lora_task(c))) for c in (config, config, other)]
    told: list[tuple[str, str]] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.NodeRefused):
            told.append((event.node, event.reason))

    history = History(tmp_path, (listen,))
    loop.run(LoopbackGrid(apps), find(), Trainer(task), RunSettings(num_rounds=1), history)
    assert [node for node, _ in told] == ["node-2"]
    assert told[0][1].startswith(message)


def test_layers_and_keys_are_the_same_in_other_words(llama):
    one = lora_config(llama, {"keys": ["self_attn.q_proj", "v_proj"]}, num_layers=2)
    other = lora_config(llama, {"keys": ["v_proj", "q_proj"]}, num_layers=-1)
    prints = [fingerprint_of(lora_task(config)) for config in (one, other)]
    assert prints[0] == prints[1]
    assert prints[0]["LoRA keys"] == '["self_attn.q_proj", "self_attn.v_proj"]'
    assert prints[0]["num_layers"] == "2"


def with_rope_theta(folder: Path, theta: float) -> Path:
    """A base of the same weights that turns them by other angles."""
    path = tiny_llama.write_model(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": theta}))
    return folder


def without_weights(folder: Path) -> Path:
    """What is there of a base before its weights are downloaded."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


def with_all_texts(task: fed.Task) -> fed.Task:
    return replace(task, data=lambda number, of: task.data(number, None))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    forget_what_was_found()
    with refused("There is no folder nobody/nothing, and the Hugging Face hub does not provide"):
        build("nobody/nothing")
