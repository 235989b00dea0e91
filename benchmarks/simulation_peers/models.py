"""The benchmarks' models in MLX, each with a loss for every example, for all who run MLX."""

import itertools
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from workload import CONTEXT, VOCABULARY


class MLP(nn.Module):
    """A multi-layer perceptron with ReLU."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.layers = [nn.Linear(i, o) for i, o in itertools.pairwise(sizes)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers[:-1]:
            x = mx.maximum(layer(x), 0.0)
        return self.layers[-1](x)


class CNN(nn.Module):
    """Two convolutions of 3 x 3, each with a pooling of 2 x 2, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, kernel_size=3, padding=1)
        self.second = nn.Conv2d(8, 16, kernel_size=3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.out = nn.Linear(7 * 7 * 16, 10)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.pool(mx.maximum(self.first(x), 0.0))
        x = self.pool(mx.maximum(self.second(x), 0.0))
        return self.out(x.reshape(len(x), -1))


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention = nn.MultiHeadAttention(dim, heads)
        self.attention_norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.norm = nn.LayerNorm(dim)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, mask)
        return x + self.down(nn.gelu_approx(self.up(self.norm(x))))


class Transformer(nn.Module):
    """A causal transformer of two blocks on characters: dimension 64, 2 heads, context 64."""

    def __init__(self, dim: int = 64, heads: int = 2, num_blocks: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.position = nn.Embedding(CONTEXT, dim)
        self.blocks = [Block(dim, heads) for _ in range(num_blocks)]
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, VOCABULARY)

    def __call__(self, x: mx.array) -> mx.array:
        mask = nn.MultiHeadAttention.create_additive_causal_mask(x.shape[1])
        x = self.embedding(x) + self.position(mx.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x, mask)
        return self.out(self.norm(x))


MODELS = {
    "mlp": partial(MLP, 784, 32, 32, 10),  # the quickstart's
    "2nn": partial(MLP, 784, 200, 200, 10),  # McMahan et al.'s
    "cnn": CNN,
    "text": Transformer,
}


def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    """The cross-entropy of each example; a text's is the mean over its characters."""
    losses = nn.losses.cross_entropy(model(x), y)
    return losses if losses.ndim == 1 else losses.mean(axis=-1)


def accuracy(model: nn.Module, x: mx.array, y: mx.array) -> float:
    return mx.mean(mx.argmax(model(x), axis=-1) == y).item()


class Loop:
    """The training loop of MLX's documentation: the whole step in one ``mx.compile``."""

    def __init__(self, module: nn.Module, learning_rate: float):
        optimizer = optim.SGD(learning_rate)
        optimizer.init(module.trainable_parameters())
        self.state = state = [module.state, optimizer.state]
        gradient = nn.value_and_grad(module, lambda model, x, y: loss(model, x, y).mean())

        def step(x: mx.array, y: mx.array) -> mx.array:
            value, grads = gradient(module, x, y)
            optimizer.update(module, grads)
            return value

        self.step = mx.compile(step, inputs=state, outputs=state)

    def train(self, batches: list[tuple[mx.array, mx.array]]) -> None:
        """One pass over the batches; each step is prepared while the one before computes."""
        for x, y in batches:
            mx.async_eval(self.step(x, y), self.state)
        mx.eval(self.state)
