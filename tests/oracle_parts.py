"""What the oracle reads of a task: a module's arrays by name, batches, what a loss returned."""

import inspect
from functools import reduce
from itertools import chain, count, islice, pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_fed.arrays import randomness


def flat(tree):
    return dict(tree_flatten(tree))


def arrays(model):
    """Every array by name; of a module with several names the last, as ``nn.value_and_grad`` puts
    its gradient there."""
    names = {}
    for name in flat(model.parameters()):
        *path, key = name.split(".")
        owner = reduce(lambda at, k: at[int(k) if isinstance(at, list) else k], path, model)
        names[id(owner), key] = name
    every = flat(model.parameters())
    return {name: every[name] for name in names.values()} | private(model)


def private(model):
    """The arrays whose names begin with "_", which are no parameters."""
    return {
        f"{path}.{key}": array
        for path, module in model.named_modules()
        for key, array in dict.items(module)
        if key.startswith("_") and isinstance(array, mx.array)
    }


def to_mlx(tree):
    """Arrays of MLX, NumPy or pandas and lists of numbers, in tuples and dictionaries."""
    if isinstance(tree, dict):
        return {key: to_mlx(child) for key, child in tree.items()}
    if isinstance(tree, tuple):
        return tuple(map(to_mlx, tree))
    return tree if isinstance(tree, mx.array) else mx.array(np.asarray(tree))


def put(model, first, values):
    """Arrays of their first dtypes and values, and these values in place of some."""
    new = {n: mx.array(np.float32(v)).astype(first[n].dtype) for n, v in values.items()}
    model.update(tree_unflatten([*(first | new).items()]))


def to_float(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def running_kind(task, name):
    """Whether an array is changed by forward, not by the optimizer: "average", "local" or None."""
    if name.rpartition(".")[2] in ("running_mean", "running_var"):
        return task.statistics
    buffers = getattr(task, "buffers", None)
    return buffers(name) if buffers else None


def length(examples):
    """The number of examples; of a stream None, if it does not say."""
    if callable(examples):
        return len(examples) if hasattr(examples, "__len__") else None
    return len(tree_flatten(top(examples))[0][1])


def top(examples):
    """Examples or a batch as MLX arrays; a list at the top is a tuple."""
    return to_mlx(tuple(examples) if isinstance(examples, list) else examples)


def split(examples, size, order=None, merge=False):
    """Batches of just these examples, in order; what a stream gives.

    ``merge`` adds a last batch of one example to the batch before it.
    """
    if callable(examples):
        key = order if order is not None else randomness.key(0, "evaluate")
        yield from map(top, examples(key))
        return
    whole = top(examples)
    order = np.arange(length(examples)) if order is None else order
    starts = list(range(0, len(order), size))
    if merge and len(starts) > 1 and starts[-1] == len(order) - 1 and size > 1:
        starts.pop()
    for start, end in pairwise([*starts, len(order)]):
        chosen = mx.array(order[start:end])
        yield tree_map(lambda array, chosen=chosen: array[chosen], whole)


def batches(task, model, examples, settings, client):
    """A client's batches in a round, by the library's convention."""
    size = settings.get("batch-size", task.batch_size)
    size *= settings.get("gradient-accumulation", task.gradient_accumulation)
    most = settings.get("local-steps", task.local_steps)
    epochs = settings.get("local-epochs", task.local_epochs)
    moment = settings["seed"], settings["server-round"], client
    merge = any(isinstance(module, nn.BatchNorm) for module in model.modules())

    def one_pass(*purpose):
        if callable(examples):
            yield from split(examples, size, randomness.key(*purpose))
            return
        order = np.arange(length(examples), dtype=np.uint32)
        np.random.default_rng(randomness.derive(*purpose)).shuffle(order)
        yield from split(examples, size, order, merge)

    if not most:
        return chain(*(one_pass(*moment, "shuffle", number) for number in range(epochs)))
    if callable(examples) and not hasattr(examples, "num_batches"):
        return islice(
            chain.from_iterable(one_pass(*moment, "shuffle", number) for number in count()), most
        )
    # All passes since the first round, one after another: a round's steps follow the last one's.
    seed, server_round, client = moment
    whole = chain.from_iterable(one_pass(seed, client, "shuffle", number) for number in count())
    return islice(whole, (server_round - 1) * most, server_round * most)


def accumulate(step, model, batch, number):
    """The mean loss of a batch, its weight and its gradients, from micro-batches."""
    least = 2 if any(isinstance(module, nn.BatchNorm) for module in model.modules()) else 1
    pieces = np.array_split(np.arange(length(batch)), max(1, min(number, length(batch) // least)))
    if len(pieces) == 1:
        (loss, weight), grads = step(batch)
        return loss, weight, flat(grads)
    total, losses, sums, dtypes = 0.0, 0.0, {}, {}
    for piece in pieces:
        rows = mx.array(piece)
        (loss, weight), grads = step(tree_map(lambda array, rows=rows: array[rows], batch))
        mx.eval(loss, grads, model.parameters())
        if weight.item() == 0:
            continue
        total, losses = total + weight, losses + loss * weight
        for name, grad in flat(grads).items():
            dtypes[name] = grad.dtype
            sums[name] = sums.get(name, 0.0) + grad.astype(mx.float32) * weight
    grads = {name: (array / total).astype(dtypes[name]) for name, array in sums.items()}
    return losses / total, total, grads


def result(task, function, model, batch, settings):
    """The mean of a loss or metric over a batch, and the mean's weight."""
    output = call(function, model, batch, settings)
    return mean_and_weight(output, batch, task.weight_unit or function is not task.loss)


def call(function, model, batch, settings):
    named = "config" in inspect.signature(function).parameters
    times = {n: mx.array(settings[n]) for n in ("server-round", "local-step") if n in settings}
    more = {"config": {**settings, **times}} if named else {}
    arguments = [batch] if isinstance(batch, dict) else batch
    return function(model, *arguments, **more)


def mean_and_weight(output, batch, has_weight):
    if isinstance(output, tuple) and has_weight:
        return output[0].astype(mx.float32), output[1].astype(mx.float32)
    output = output[0] if isinstance(output, tuple) else output
    return output.astype(mx.float32).mean(), mx.array(length(batch), mx.float32)


def evaluate(task, model, examples, settings):
    """The task's loss and metrics, each over all examples, what follows from them, and weights."""
    model.eval()
    functions, sums, number = {"loss": task.loss, **task.metrics}, {}, 0
    for batch in split(examples, task.eval_batch_size):
        number += length(batch)
        for name, function in functions.items():
            if hasattr(function, "predict"):
                sums.setdefault(name, []).append(call(function.predict, model, batch, settings))
                continue
            value, weight = (x.item() for x in result(task, function, model, batch, settings))
            total, before = sums.get(name, (0, 0))
            sums[name] = total + value * weight, before + weight
    for name, function in functions.items():
        if hasattr(function, "predict"):
            sums[name] = number * compute(function, sums[name]), number
    means = {name: total / weight for name, (total, weight) in sums.items()}
    counts = {f"num-{task.weight_unit}": round(sums["loss"][1])} if task.weight_unit else {}
    further = task.derived(means) if task.derived else {}
    weights = {name: weight for name, (_, weight) in sums.items()}
    return {"num-examples": number, **means, **counts, **further}, weights


def pooled(task, evaluations):
    """The metrics of each client, and their means over the clients for which they are defined."""
    each = {client: metrics for client, (metrics, _) in evaluations.items()}
    means = {}
    for name in ("loss", *task.metrics) if each else ():
        pairs = [(m[name], w[name]) for m, w in evaluations.values() if np.isfinite(m[name])]
        if pairs:
            means[name] = sum(v * w for v, w in pairs) / sum(w for _, w in pairs)
    further = task.derived(means) if task.derived and means else {}
    return {"evaluate": each, "mean": {"all": means | further}}


def compute(metric, predictions):
    """A metric of what was predicted on each batch; NaN where it is not defined."""
    columns = tree_map(
        lambda *arrays: np.concatenate([np.array(a.astype(mx.float32)) for a in arrays]),
        *predictions,
    )
    if isinstance(columns, dict):
        value = metric.compute(**columns)
    else:
        value = metric.compute(*(columns if isinstance(columns, tuple) else (columns,)))
    return float("nan") if value is None else float(value)


def resume(optimizer, kept, model):
    """Gives an optimizer the state that a client has kept; the rate stays that of the round."""
    if isinstance(optimizer, dict):  # a train_step's own
        return
    optimizer.init(model.trainable_parameters())
    kept = {name: array for name, array in (kept or {}).items() if "learning_rate" not in name}
    optimizer.state = tree_unflatten([*(flat(optimizer.state) | kept).items()])


def clip(grads, most):
    """The gradients of a global norm of at most ``most``."""
    norm = mx.sqrt(sum(mx.sum(mx.square(g.astype(mx.float32))) for g in grads.values()))
    scale = mx.minimum(most / (norm + 1e-6), 1)
    return {name: (grad * scale).astype(grad.dtype) for name, grad in grads.items()}
