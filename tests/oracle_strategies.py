"""What servers do with updates, by the papers, in NumPy's float64."""

import numpy as np


def mean(before, ends, weights):
    """The weighted mean of the values that clients ended with, as float32."""
    total = sum(weights)
    return {
        name: np.float64(
            np.float32(sum(w * end[name] for w, end in zip(weights, ends, strict=True)) / total)
        )
        for name in before
    }


def aggregate(
    strategy, options, number, before, ends, weights, losses, memory, bias_corrected=True
):
    """The server's parameters after a round, as float32.

    Flower's FedAdam corrects the bias of its moments, with the exponent one round ahead, which
    algorithm 2 of Reddi et al. (https://arxiv.org/abs/2003.00295) does not: without
    ``bias_corrected`` it is theirs, but for moments that begin at 0 as Flower's do.
    """
    correct = bias_corrected and strategy == "FedAdam"
    after = _aggregate(strategy, options, number, before, ends, weights, losses, memory, correct)
    return {name: np.float64(np.float32(value)) for name, value in after.items()}


def _aggregate(strategy, options, number, before, ends, weights, losses, memory, correct):
    if strategy in ("FedMedian", "FedTrimmedAvg"):  # https://arxiv.org/abs/1803.01498
        cut = int(options.get("beta", 0) * len(ends))
        sorted_ = {name: np.sort([end[name] for end in ends], axis=0) for name in before}
        if strategy == "FedMedian":
            return {name: np.median(values, axis=0) for name, values in sorted_.items()}
        return {n: values[cut : len(ends) - cut].mean(axis=0) for n, values in sorted_.items()}
    if strategy == "QFedAvg":  # https://openreview.net/pdf?id=ByexElSYDr
        lipschitz, q = 1 / options["client_learning_rate"], options["q"]
        losses = [loss + 1e-10 for loss in losses]
        away = [{n: lipschitz * (before[n] - end[n]) for n in before} for end in ends]
        norms = [sum(np.sum(np.square(d)) for d in each.values()) for each in away]
        scale = sum(
            q * loss ** (q - 1) * norm + lipschitz * loss**q
            for loss, norm in zip(losses, norms, strict=True)
        )
        return {
            n: before[n] - sum(f**q * d[n] for f, d in zip(losses, away, strict=True)) / scale
            for n in before
        }
    means = mean(before, ends, weights)
    if strategy in ("FedAvg", "FedProx"):  # 1602.05629, 1812.06127
        return means
    move = {name: means[name] - before[name] for name in before}
    if strategy == "FedAvgM":  # https://arxiv.org/abs/1909.06335
        beta, rate = options["server_momentum"], options["server_learning_rate"]
        memory["m"] = {n: beta * memory.get("m", {}).get(n, 0) + move[n] for n in before}
        return {n: before[n] + rate * memory["m"][n] for n in before}
    eta, tau = options["eta"], options["tau"]  # Reddi et al., algorithm 2
    beta_1 = 0 if strategy == "FedAdagrad" else options["beta_1"]
    beta_2 = options.get("beta_2", 0)
    m = {n: beta_1 * memory.get("m", {}).get(n, 0) + (1 - beta_1) * move[n] for n in before}
    v = {n: memory.get("v", {}).get(n, np.zeros_like(move[n])) for n in before}
    if strategy == "FedAdagrad":
        v = {n: v[n] + move[n] ** 2 for n in before}
    elif strategy == "FedAdam":
        v = {n: beta_2 * v[n] + (1 - beta_2) * move[n] ** 2 for n in before}
        if correct:
            eta *= np.sqrt(1 - beta_2 ** (number + 1)) / (1 - beta_1 ** (number + 1))
    else:  # FedYogi
        v = {n: v[n] - (1 - beta_2) * move[n] ** 2 * np.sign(v[n] - move[n] ** 2) for n in before}
    memory |= {"m": m, "v": v}
    return {n: before[n] + eta * m[n] / (np.sqrt(v[n]) + tau) for n in before}
