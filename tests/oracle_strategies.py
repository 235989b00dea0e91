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


class Tie(ArithmeticError):
    """A choice among clients or values that rounding makes: no result is the right one."""


def aggregate(
    strategy, options, number, before, ends, weights, losses, memory, bias_corrected=True
):
    """The server's parameters after a round, as float32.

    Flower's FedAdam corrects the bias of its moments, with the exponent one round ahead, which
    algorithm 2 of Reddi et al. (https://arxiv.org/abs/2003.00295) does not: without
    ``bias_corrected`` it is theirs, but for moments that begin at 0 as Flower's do.
    """
    if not all(np.isfinite(end[name]).all() for end in ends for name in before):
        return {name: value * np.nan for name, value in before.items()}  # a median would hide it
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
    if strategy in ("Krum", "MultiKrum", "Bulyan"):
        return _select(strategy, options, before, ends, weights)
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


def _select(strategy, options, before, ends, weights):
    """Krum and Multi-Krum (https://arxiv.org/abs/1703.02757) and Bulyan (1802.07927).

    As Flower has them: Multi-Krum weighs those that it selects, and Bulyan selects all at once.
    """
    malicious = options["num_malicious_nodes"]
    rows = np.stack([np.concatenate([end[name].ravel() for name in before]) for end in ends])
    slack = 3e-6 * max(1e-6, np.square(rows).sum(axis=1).max())
    away = np.square(rows[:, None] - rows[None]).sum(axis=-1)
    near = np.sort(away, axis=1)[:, 1 : 1 + max(1, len(rows) - malicious - 2)]
    number = options.get("num_nodes_to_select", 1)
    number = len(rows) - 2 * malicious if strategy == "Bulyan" else number
    chosen = _least(near.sum(axis=1, keepdims=True), number, slack, rows)[:, 0]
    if strategy != "Bulyan":
        return mean(before, [ends[n] for n in chosen], [weights[n] for n in chosen])
    values = rows[np.sort(chosen)]
    away = np.abs(values - np.median(values, axis=0))
    nearest = _least(away, number - 2 * malicious, 1e-6 * np.abs(rows).max(), values)
    merged = np.take_along_axis(values, nearest, axis=0).mean(axis=0)
    cuts = np.cumsum([before[name].size for name in before])[:-1]
    pieces = zip(before, np.split(merged, cuts), strict=True)
    return {name: piece.reshape(before[name].shape) for name, piece in pieces}


def _least(scores, number, slack, values):
    """Where the least ``number`` scores of each column are; a tie matters where values differ."""
    order = np.argsort(scores, axis=0, kind="stable")
    if number < len(order):
        last, first = (
            np.take_along_axis(scores, order[n : n + 1], 0) for n in (number - 1, number)
        )
        tied = np.abs(scores - last) <= slack
        spread = np.where(tied, values, -np.inf).max(axis=0) - np.where(tied, values, np.inf).min(0)
        if np.any((first - last <= slack) & (spread > 1e-6 * np.abs(values).max())):
            raise Tie(f"which {number} of {len(order)} are chosen is by rounding")
    return order[:number]
