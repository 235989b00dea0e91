"""FedJAX: its ``federated_averaging`` with the jit backend, its default, and models in Haiku.

FedJAX fills a client's last batch from a new shuffle, so that all have one shape.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from workload import CONTEXT, VOCABULARY, Clock, Workload

jax.tree_map = jax.tree_util.tree_map  # which jax has lost and FedJAX still calls

import fedjax  # noqa: E402
from fedjax.algorithms import fed_avg  # noqa: E402


def mlp(x: jax.Array) -> jax.Array:
    return hk.nets.MLP([32, 32, 10])(x)


def cnn(x: jax.Array) -> jax.Array:
    for channels in (8, 16):
        x = jax.nn.relu(hk.Conv2D(channels, 3)(x))
        x = hk.MaxPool((2, 2, 1), (2, 2, 1), "VALID")(x)
    return hk.Linear(10)(hk.Flatten()(x))


def norm() -> hk.LayerNorm:
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)


def text(x: jax.Array, dim: int = 64, heads: int = 2, num_blocks: int = 2) -> jax.Array:
    mask = jnp.tril(jnp.ones((1, 1, CONTEXT, CONTEXT), bool))
    x = hk.Embed(VOCABULARY, dim)(x) + hk.Embed(CONTEXT, dim)(jnp.arange(CONTEXT))
    for _ in range(num_blocks):
        attention = hk.MultiHeadAttention(
            heads, dim // heads, w_init=hk.initializers.VarianceScaling(), with_bias=False
        )
        y = norm()(x)
        x = x + attention(y, y, y, mask)
        x = x + hk.Linear(dim)(jax.nn.gelu(hk.Linear(4 * dim)(norm()(x))))
    return hk.Linear(VOCABULARY)(norm()(x))


FORWARD = {"mlp": mlp, "cnn": cnn, "text": text}


def make_model(workload: Workload) -> fedjax.Model:
    x, y = workload.client(0)

    def loss(batch, predictions):
        losses = fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], predictions)
        return losses if losses.ndim == 1 else losses.mean(axis=-1)

    return fedjax.create_model_from_haiku(
        hk.transform(lambda batch: FORWARD[workload.model](batch["x"])),
        sample_batch={"x": x[:1], "y": y[:1]},
        train_loss=loss,
    )


def main() -> None:
    workload = Workload.from_command_line()
    clock = Clock(workload.target)
    model = make_model(workload)
    clients = {
        f"{number:06}": dict(zip("xy", workload.client(number), strict=True))
        for number in range(workload.num_clients)
    }
    data = fedjax.InMemoryFederatedData(clients)
    algorithm = fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(workload.learning_rate),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=workload.batch_size, num_epochs=1),
    )
    sampler = fedjax.client_samplers.UniformGetClientSampler(
        data, workload.per_round, seed=workload.seed
    )
    test = None if workload.target is None else workload.test()

    @jax.jit
    def accuracy(params, x, y):
        predicted = jnp.argmax(model.apply_for_eval(params, {"x": x, "y": y}), axis=-1)
        return jnp.mean(predicted == y)

    np.random.seed(workload.seed)  # which shuffles the clients' batches
    state = algorithm.init(model.init(jax.random.PRNGKey(workload.seed)))
    for number in range(workload.num_rounds):
        sampler.set_round_num(number)
        state, _ = algorithm.apply(state, sampler.sample())
        jax.block_until_ready(state.params)
        if clock.round_ended(test and float(accuracy(state.params, *test))):
            break
    clock.report()


if __name__ == "__main__":
    main()
