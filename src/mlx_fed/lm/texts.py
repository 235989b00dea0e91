"""A node's texts: read, checked, tokenized with mlx-lm's datasets, in batches by length."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import FedError, os_errors
from ..system.loading import loading
from .config import LoraConfig

_PAD_TO = 32
"""Batches' lengths are multiples of it, as in mlx-lm: each length compiles one program."""


class TextError(FedError):
    """Invalid texts; the message has their location."""


class TextRecords(NamedTuple):
    """Records of texts, and a function that returns the location of each."""

    records: Sequence[dict[str, Any]]
    where: Callable[[int], str]


class TextSplits(NamedTuple):
    """A node's training texts, and its validation texts if it has some."""

    train: TextRecords
    valid: TextRecords | None


def read_splits(config: LoraConfig, partition: int, num_partitions: int | None) -> TextSplits:
    """The texts of a node.

    Args:
        config (LoraConfig): Whose ``data`` is a folder with ``train.jsonl`` and perhaps
            ``valid.jsonl``, a folder of such folders, one for each partition, or a dataset on the
            hub or as parquet files.
        partition (int): The partition.
        num_partitions (int, optional): Number of partitions; ``None``: the data has none.

    Raises:
        TextError: If a file is missing, empty or not in mlx-lm's format, with the line.
    """
    folder = Path(config.data).expanduser()
    if not folder.exists() or any(folder.rglob("*.parquet")):
        return _from_dataset(config, partition, num_partitions)
    if not (folder / "train.jsonl").exists():
        return _from_subfolder(folder, config, partition, num_partitions)
    splits = _from_folder(folder, config)
    if num_partitions is None:
        return splits
    train, valid = splits
    return TextSplits(
        _every_nth(train, partition, num_partitions),
        _every_nth(valid, partition, num_partitions) if valid else None,
    )


def folders_of_texts(folder: Path) -> list[Path]:
    """The subfolders with texts, by name."""
    return sorted(path.parent for path in folder.glob("*/train.jsonl"))


def _from_subfolder(
    folder: Path, config: LoraConfig, partition: int, num_partitions: int | None
) -> TextSplits:
    folders = folders_of_texts(folder)
    if not folders:
        raise TextError(f"There is no train.jsonl in {folder}.")
    if num_partitions is None:
        names = ", ".join(path.name for path in folders[:5])
        raise TextError(
            f"There is no train.jsonl in {folder}, but in {names}: choose one of these."
        )
    if num_partitions != len(folders):
        raise TextError(
            f"{folder} has {len(folders)} folders of texts, for as many nodes, "
            f"not {num_partitions}."
        )
    return _from_folder(folders[partition], config)


def _from_folder(folder: Path, config: LoraConfig) -> TextSplits:
    train = read_jsonl(folder / "train.jsonl", config)
    valid = folder / "valid.jsonl"
    return TextSplits(train, read_jsonl(valid, config) if valid.exists() else None)


def _from_dataset(config: LoraConfig, partition: int, num_partitions: int | None) -> TextSplits:
    from ..data import load_partition

    if num_partitions is None:
        raise TextError(
            f"{config.data} is no folder with train.jsonl. If it is a dataset, on the Hugging Face "
            "hub or as parquet files, set this node's partition: --node-id and --num-partitions."
        )
    federation = config.federation
    options = {k.replace("-", "_"): v for k, v in federation.partitioner_options.items()}
    partitions = load_partition(
        config.data, partition, num_partitions, partitioner=federation.partitioner, **options
    )
    where = f"{config.data}, partition {partition}"
    train, valid = (split.dataset() for split in partitions)
    rows = (
        TextRecords(train, lambda i: f"{where}, training example {i}"),
        TextRecords(valid, lambda i: f"{where}, held-out example {i}"),
    )
    for split in rows:
        _check_record(split.records[0], split.where(0), config)
    return TextSplits(*rows)


def _every_nth(rows: TextRecords, partition: int, num_partitions: int) -> TextRecords:
    mine = range(partition, len(rows.records), num_partitions)
    if not mine:
        raise TextError(
            f"{rows.where(0).rsplit(',', 1)[0]} has {len(rows.records)} texts, too few for "
            f"{num_partitions} nodes."
        )
    return TextRecords([rows.records[i] for i in mine], lambda i: rows.where(mine[i]))


def read_jsonl(path: Path, config: LoraConfig) -> TextRecords:
    """Records of a JSON Lines file.

    Raises:
        TextError: With the first invalid line and the reason.
    """
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    with os_errors(TextError, f"Cannot read {path}"):
        content = path.read_bytes().splitlines()
    for number, line in enumerate(content, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise TextError(f"{path}, line {number} is not JSON: {error}.") from error
        _check_record(record, f"{path}, line {number}", config)
        records.append(record)
        lines.append(number)
    if not records:
        raise TextError(f'{path} is empty: it has a record such as {{"text": "..."}} a line.')
    _check_one_form(records, lines, path, config)
    return TextRecords(records, lambda i: f"{path}, line {lines[i]}")


def _form(record: dict[str, Any], config: LoraConfig) -> tuple[str, ...]:
    """The keys of a record's form in mlx-lm: completion, chat or text.

    A prompt without a completion has the completion's form.
    """
    completion = (config.prompt_feature, config.completion_feature)
    for keys in (completion, (config.chat_feature,), (config.text_feature,)):
        if all(key in record for key in keys):
            return keys
    return completion if config.prompt_feature in record else ()


def _check_record(record: Any, where: str, config: LoraConfig) -> None:
    if not isinstance(record, dict):
        raise TextError(f"{where} is not a record: it begins with {str(record)[:30]!r}.")
    form = _form(record, config)
    if not form:
        has = ", ".join(map(repr, list(record)[:5])) or "no keys"
        raise TextError(
            f"{where} has {has}: mlx-lm wants {config.text_feature!r}, {config.chat_feature!r}, or "
            f"{config.prompt_feature!r} and {config.completion_feature!r}."
        )
    for key in form:
        value = record.get(key)
        if value is None:
            continue  # left out later: see _empty_key
        if key == config.chat_feature:
            if not isinstance(value, list) or not all(map(_is_turn, value)):
                raise TextError(f"{where}: {key!r} is a list of messages with a role and content.")
        elif not isinstance(value, str):
            raise TextError(f"{where}: {key!r} is not text.")
    if config.mask_prompt and form == (config.text_feature,):
        raise TextError(f"{where} is plain text, which has no prompt: leave out mask_prompt.")


def _is_turn(message: Any) -> bool:
    if not isinstance(message, dict) or "role" not in message:
        return False
    return not message.keys().isdisjoint({"content", "tool_calls"})


def _check_one_form(
    records: list[dict[str, Any]], lines: list[int], path: Path, config: LoraConfig
) -> None:
    """Checks that all records have the first one's form, as mlx-lm assumes."""
    first = _form(records[0], config)
    for record, line in zip(records, lines, strict=True):
        if first[0] not in record:
            raise TextError(
                f"{path}, line {line} has no {first[0]!r}, which line {lines[0]} has: all lines "
                "are of one form."
            )


def _empty_key(record: dict[str, Any], form: tuple[str, ...], config: LoraConfig) -> str:
    """The key of a record that is empty, so that no token is trained; ``""`` if none."""
    for key in form:
        value = record.get(key)
        if key == config.chat_feature:
            if not any(turn.get("content") or turn.get("tool_calls") for turn in value or ()):
                return key
        elif value is None or (not value and key != config.prompt_feature):
            return key
    return ""


class TokenizedTexts(NamedTuple):
    """Token ids of texts, the first position of each loss, and texts that were cut or left out."""

    tokens: list[np.ndarray]
    starts: list[int]
    cut: list[str]
    left_out: list[str]


def tokenize(rows: TextRecords, tokenizer: Any, config: LoraConfig) -> TokenizedTexts:
    """Texts as token ids, cut to ``max_seq_length``, without texts that have no loss.

    Raises:
        TextError: If a record is not in mlx-lm's format, or the tokenizer raises.
    """
    result = TokenizedTexts([], [], [], [])
    limit = config.max_seq_length
    form = _form(rows.records[0], config)
    read_record = _reader(form, tokenizer, config)
    with loading("Tokenizing texts", len(rows.records), "texts") as progress:
        for number, record in enumerate(rows.records):
            progress.update(number)
            where = rows.where(number)
            _check_record(record, where, config)
            if key := _empty_key(record, form, config):
                result.left_out.append(f"{where} ({key!r} is empty)")
                continue
            try:
                ids, start = read_record(record)
            except Exception as error:  # of a chat template
                raise TextError(f"{where} cannot be tokenized: {error}") from error
            if max(start, 1) >= min(len(ids), limit):
                prompt = f"its prompt takes {start} of {len(ids)} tokens"
                result.left_out.append(f"{where} ({prompt if start else 'it has too few tokens'})")
                continue
            if len(ids) > limit:
                result.cut.append(f"{where} ({len(ids)} tokens)")
            result.tokens.append(np.asarray(ids[:limit], np.int32))
            result.starts.append(start)
    return result


def _reader(
    form: tuple[str, ...], tokenizer: Any, config: LoraConfig
) -> Callable[[dict[str, Any]], tuple[list[int], int]]:
    """Function from a record to its token ids, by mlx-lm, and the first position of its loss."""
    from mlx_lm.tuner.datasets import create_dataset

    empty_ids = tokenizer.encode("")

    def read_text(record: dict[str, Any]) -> tuple[list[int], int]:
        ids = list(tokenizer.encode(record[config.text_feature]))
        if ids == empty_ids:  # such as white space, which a tokenizer strips
            return [], 0
        return ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id], 0

    features = (f"{kind}_feature" for kind in ("prompt", "completion", "chat", "text"))
    settings = SimpleNamespace(**{name: getattr(config, name) for name in features})
    dataset = create_dataset([dict.fromkeys(form)], tokenizer, settings)

    def read_turns(record: dict[str, Any]) -> tuple[list[int], int]:
        ids, _ = dataset.process(record)
        if not config.mask_prompt:
            return ids, 0
        if form == (config.chat_feature,):
            turns = record[config.chat_feature]
        else:
            turns = [_turn("user", record[form[0]]), _turn("assistant", record[form[1]])]
        return ids, _start_of_answer(ids, turns, record.get("tools"), tokenizer)

    return read_text if form == (config.text_feature,) else read_turns


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _start_of_answer(ids: list[int], turns: list[dict], tools: Any, tokenizer: Any) -> int:
    """Number of tokens of a conversation before the content of its last turn.

    As in mlx-lm, these are the tokens of the generation prompt if the conversation starts with
    them. A template's generation prompt may have more, such as an empty thinking block that
    finished answers lack. Then it is the common prefix with conversations of another last turn, so
    that no token of the answer is lost.
    """
    *before, last = turns
    if not before:
        return 0

    def render(turns: list[dict], asks: bool = False) -> list[int]:
        tokens: list[int] = tokenizer.apply_chat_template(
            turns, tools=tools, add_generation_prompt=asks, return_dict=False
        )
        return tokens

    prompt = render(before, last["role"] == "assistant")
    if ids[: len(prompt)] == prompt:
        return len(prompt)
    alternatives = (render([*before, _turn(last["role"], content)]) for content in "01")
    return min(_num_common(ids, tokens) for tokens in alternatives)


def _num_common(first: list[int], second: list[int]) -> int:
    """The length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


class TextBatches:
    """TokenizedTexts texts as a stream of batches: ``batches(key)`` is one pass in a random order.

    Texts of similar length are in one batch, as in mlx-lm; here the last batch may be smaller, so
    that every text counts and a node may have fewer texts than a batch.

    Args:
        texts (TokenizedTexts): The texts.
        batch_size (int): Texts in a batch.
        max_batches (int, optional): Batches of a pass, drawn at random.
    """

    def __init__(self, texts: TokenizedTexts, batch_size: int, max_batches: int | None = None):
        self.texts, self.batch_size, self.max_batches = texts, batch_size, max_batches
        self.lengths = np.array([len(ids) for ids in texts.tokens])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_batches(self) -> int:
        """Number of batches of a pass."""
        num_batches = -(-len(self) // self.batch_size)
        return num_batches if self.max_batches is None else min(num_batches, self.max_batches)

    def __call__(self, key: mx.array) -> Iterator[tuple[mx.array, mx.array]]:
        random = np.random.default_rng(np.array(key))
        order = random.permutation(len(self))
        order = order[np.argsort(self.lengths[order], kind="stable")]
        starts = range(0, len(order), self.batch_size)
        groups = [order[start : start + self.batch_size] for start in starts]
        for number in islice(random.permutation(len(groups)), self.max_batches):
            yield self._collate(groups[number])

    def _collate(self, group: np.ndarray) -> tuple[mx.array, mx.array]:
        """Token ids of shape (texts, 1 + a multiple of 32), and the first and last position of
        each text's loss, of shape (texts, 2): padding has no loss."""
        longest = int(self.lengths[group].max())
        tokens = np.zeros((len(group), 1 + _PAD_TO * -(-(longest - 1) // _PAD_TO)), np.int32)
        spans = np.zeros((len(group), 2), np.int32)
        for row, index in enumerate(group):
            ids = self.texts.tokens[index]
            tokens[row, : len(ids)] = ids
            spans[row] = self.texts.starts[index], len(ids) - 1
        return mx.array(tokens), mx.array(spans)
