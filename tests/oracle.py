"""Federated learning by its papers, in plain MLX and NumPy: what the engines are held to.

Clients train one after another, by an uncompiled step on the real module, on batches of just their
examples. All that is the library's is its convention of which examples a step has.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_fed.arrays import randomness

from . import oracle_parts as parts
from .oracle_parts import arrays, evaluate, flat, length, put, to_float
from .oracle_strategies import aggregate, mean


def run(task, strategy, options, num_clients, seed, nodes, config, touch=None):
    """The values at the start, the model at the end, and the metrics of each round's clients.

    ``strategy`` names one of Flower's, with these ``options``; ``nodes`` has for each round who
    trains and who evaluates; ``touch(model)`` is called before each step.
    """
    mx.random.seed(randomness.derive(seed, "initial weights"))
    model = task.model()
    first = arrays(model)
    running = {name: kind for name in first if (kind := parts.running_kind(task, name))}
    trained = flat(model.trainable_parameters()).keys() & first.keys() - running.keys()
    trained = [n for n in first if n in trained and mx.issubdtype(first[n].dtype, mx.inexact)]
    local = {n for n in trained if task.personal and task.personal(n)}
    local |= {name for name, kind in running.items() if kind == "local"}
    start = {n: to_float(array) for n, array in (flat(model.parameters()) | first).items()}
    shared = {name: start[name] for name in trained if name not in local}
    averaged = {name: start[name] for name in running if name not in local}
    own, states, memory, rounds = {}, {}, {}, []
    for number, (trainers, evaluators) in enumerate(nodes, 1):
        settings = {**task.config, **config, "seed": seed, "server-round": number}
        if strategy == "FedProx":
            settings["proximal-mu"] = options["proximal_mu"]
        reports, ends, key = {}, [], settings.get("train-loss-key")
        for client in trainers:
            put(model, first, {**shared, **averaged, **own.get(client, {})})
            data = task.data(client, num_clients)
            before = {key: evaluate(task, model, data.train, settings)[0]["loss"]} if key else {}
            optimizer = task.optimizer(settings)
            parts.resume(optimizer, states.get(client), model)
            examples = parts.batches(task, model, data.train, settings, client)
            report = train(task, model, optimizer, examples, settings, shared, touch)
            reports[client] = before | report
            reports[client]["num-examples"] = length(data.train) or report["num-examples"]
            end = {name: to_float(array) for name, array in arrays(model).items() if name in first}
            own[client] = {name: end[name] for name in local}
            states |= {client: flat(optimizer.state)} if task.keep_optimizer else {}
            ends.append(end)
        weights = [r[options.get("weighted_by_key", "num-examples")] for r in reports.values()]
        losses = [report.get(key) for report in reports.values()]
        shared = aggregate(strategy, options, number, shared, ends, weights, losses, memory)
        averaged = mean(averaged, ends, weights)
        scores = {}
        for client in evaluators:
            put(model, first, {**shared, **averaged, **own.get(client, {})})
            test = task.data(client, num_clients).test
            if test is not None:
                scores[client] = evaluate(task, model, test, settings)
        rounds.append({"train": reports, **parts.pooled(task, scores)})
    put(model, first, {**shared, **averaged})
    return start, model, rounds


def train(task, model, optimizer, batches, settings, anchor, touch):
    """Trains on batches: the mean of their losses, and what their weights count."""
    mu, most = settings.get("proximal-mu"), settings.get("max-grad-norm", task.max_grad_norm)
    parts_of_step = settings.get("gradient-accumulation", getattr(task, "gradient_accumulation", 1))
    step = nn.value_and_grad(model, lambda b: parts.result(task, task.loss, model, b, settings))
    results, examples = [], 0
    for number, batch in enumerate(batches, 1):
        settings["local-step"] = number
        model.train()
        (touch or id)(model)
        now = arrays(model)
        if task.augment:
            batch = task.augment(mx.random.key(number), *batch)
        if own := getattr(task, "train_step", None):
            output = own(model, optimizer, batch, mx.random.key(number), settings)
            loss, weight = parts.mean_and_weight(output, batch, False)
        else:
            loss, weight, grads = parts.accumulate(step, model, batch, parts_of_step)
            grads = {name: grad for name, grad in grads.items() if name in now}
            for name in grads.keys() & anchor if mu else ():
                away = now[name] - mx.array(np.float32(anchor[name])).astype(now[name].dtype)
                grads[name] = grads[name] + mx.array(mu, grads[name].dtype) * away
            grads = parts.clip(grads, most) if most is not None else grads
            optimizer.update(model, tree_unflatten([*grads.items()]))
        mx.eval(model.parameters())
        results.append((loss.item(), weight.item()))
        examples += length(batch)
    total = sum(weight for _, weight in results)
    counts = {f"num-{task.weight_unit}": round(total)} if task.weight_unit else {}
    mean = sum(loss * weight for loss, weight in results) / total
    return {"loss": mean, "num-examples": examples, **counts}
