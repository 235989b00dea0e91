"""What every peer is given to do, and how it says when its rounds ended.

A peer is a program: ``python PEER.py WORKLOAD``, the workload as JSON. It needs NumPy alone from
here, since peers live in environments of their own.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np

CONTEXT = 64
VOCABULARY = 65


class Reached(Exception):
    """The accuracy that was asked for is reached: nothing is left to do."""


@dataclass(frozen=True)
class Workload:
    """A federation to train.

    Attributes:
        model (str): ``"mlp"``, ``"2nn"``, ``"cnn"`` or ``"text"``.
        num_clients (int): Clients that exist.
        per_round (int): Clients that train in a round.
        num_rounds (int): Rounds, at most.
        batch_size (int): Examples a step.
        samples (int): Examples a client, where they are random.
        learning_rate (float): Of the clients' SGD.
        seed (int): Of initial weights, sampling and shuffling.
        data (str, optional): An ``.npz`` as ``partition.py`` writes it; random without.
        target (float, optional): The accuracy on the data's test set to stop at.
    """

    model: str
    batch_size: int
    num_rounds: int
    samples: int = 600
    num_clients: int = 100
    per_round: int = 100
    learning_rate: float = 0.1
    seed: int = 0
    data: str | None = None
    target: float | None = None

    @classmethod
    def from_command_line(cls) -> "Workload":
        return cls.from_json(sys.argv[1])

    @classmethod
    def from_json(cls, text: str) -> "Workload":
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def client(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """One client's examples and labels: float32 images, or int32 characters."""
        if self.data is None:
            return self._random(np.random.default_rng(number), self.samples)
        data = _load(self.data)
        rows = slice(*data["offsets"][number : number + 2])
        return self._images(data["train_images"][rows]), data["train_labels"][rows]

    def test(self) -> tuple[np.ndarray, np.ndarray]:
        """The examples that the central accuracy is measured on."""
        data = _load(self.data)
        return self._images(data["test_images"]), data["test_labels"]

    def _random(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        if self.model == "text":
            text = rng.integers(0, VOCABULARY, (size, CONTEXT + 1)).astype(np.int32)
            return text[:, :-1].copy(), text[:, 1:].copy()
        images = rng.random((size, 784), dtype=np.float32)
        return self._images(images), rng.integers(0, 10, size).astype(np.int32)

    def _images(self, images: np.ndarray) -> np.ndarray:
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / 255
        return images.reshape(-1, 28, 28, 1) if self.model == "cnn" else images.reshape(-1, 784)


@cache
def resident(workload: Workload, number: int) -> tuple[np.ndarray, np.ndarray]:
    """A client's data, which the process that asked for it keeps."""
    return workload.client(number)


@cache
def _load(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


class Clock:
    """Notes when each round ended, and the accuracy that it reached.

    Args:
        target (float, optional): The accuracy to stop at.
    """

    def __init__(self, target: float | None = None):
        self.target = target
        self.ended: list[float] = []
        self.accuracies: list[float] = []

    def round_ended(self, accuracy: float | None = None) -> bool:
        """Whether the target is reached. Times are the system's, for whoever started us."""
        self.ended.append(time.time())
        if accuracy is not None:
            self.accuracies.append(accuracy)
        return self.target is not None and accuracy is not None and accuracy >= self.target

    def report(self) -> None:
        """Prints what was noted, as the last line of the program."""
        print(json.dumps({"ended": self.ended, "accuracies": self.accuracies}), flush=True)
