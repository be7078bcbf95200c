"""Reward server: an SVGD update against the floor of its arithmetic, and queries end to end against the forward pass.

Rows are those of the Berlin shape of `learning.py`, and asked for by number, as a learner does.

python benchmarks/rewards.py [--json]
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from floors import matmul_rate, median_seconds
from learning import berlin, problem, random_batch

from bm3il.protocol.layout import JointRows
from bm3il.protocol.messages import Sender
from bm3il.protocol.telemetry import Telemetry
from bm3il.reward_server.client import Kept, RemoteRewards
from bm3il.reward_server.discriminator import Workspace, forward
from bm3il.reward_server.particles import RewardModel, state_table
from bm3il.reward_server.process import RewardServer, listen
from bm3il.reward_server.settings import RewardSettings

AGENTS, OBSERVATIONS, ACTIONS, PARTICLES, BATCH = 50, 103, 46, 4, 1_000
HIDDEN = (128, 64)
MOST_OF_FLOOR, LEAST_OF_FORWARD = 1.3, 0.9
REPEATS = 9
QUERY_ROWS, QUERIES, UNDER_WAY = 1_000, 24, 3
LAYOUT = problem(replace(berlin(), rows=1))[0].layout


def settings(scope: Any) -> RewardSettings:
    return RewardSettings(
        particles=PARTICLES, hidden=HIDDEN, kernel_scope=scope, updates=1, batch_size=BATCH, window_steps=2 * BATCH
    )


def some_rows(count: int, seed: int) -> JointRows:
    return random_batch(LAYOUT, count, torch.Generator().manual_seed(seed)).rows


def make_model(scope: str = "function") -> RewardModel:
    model = RewardModel(LAYOUT, some_rows(2 * BATCH, 0), settings(scope), seed=0)
    model.observe(some_rows(2 * BATCH, 1))
    return model


def update_flop() -> int:
    """Products of one update: forward, gradients of the weights, and of the activations but not of the inputs."""
    first, second = (OBSERVATIONS + ACTIONS + 1) * HIDDEN[0], HIDDEN[0] * HIDDEN[1]
    per_row = 2 * (2 * first + 3 * second + 3 * HIDDEN[1])
    return per_row * AGENTS * PARTICLES * 2 * BATCH


def measure_update(scope: str) -> dict[str, float]:
    """One SVGD update; the floor is measured before and after every repeat, since both drift with the machine."""
    model = make_model(scope)
    model.update(0.0)
    seconds, rates = [], [matmul_rate(repeats=5)]
    for _ in range(REPEATS):
        seconds.append(median_seconds(lambda: model._step(None), 1))
        rates.append(matmul_rate(repeats=5))
    rate = statistics.median(rates)
    around = [statistics.mean(pair) for pair in pairwise(rates)]
    floor = update_flop() / rate / 1e9
    return {
        "seconds": statistics.median(seconds),
        "seconds_least": min(seconds),
        "seconds_most": max(seconds),
        "floor_seconds": floor,
        "floor_gflop_per_second": rate,
        "ratio": statistics.median(s * r for s, r in zip(seconds, around, strict=True)) * 1e9 / update_flop(),
        "peak_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure_forward() -> float:
    """Rows per second of the bare forward pass of all agents' discriminators, inputs ready in memory."""
    layers = [layer.detach() for layer in make_model()._layers[0]]
    x = torch.randn(AGENTS, QUERY_ROWS, layers[0].shape[-1])
    work = Workspace()

    def run() -> None:
        for agent in range(AGENTS):  # one agent's activations fit the cache
            forward([layer[agent : agent + 1] for layer in layers], x[agent : agent + 1], "relu", work)

    with torch.no_grad():
        return QUERY_ROWS / median_seconds(run, 7)


def measure_queries(client: RemoteRewards) -> float:
    """Rows per second from submission to the rewards' arrival, some queries under way at a time."""
    rows, numbers = some_rows(QUERY_ROWS, 3), torch.arange(QUERY_ROWS)
    client.begin("bench", kept=Kept(QUERY_ROWS, rows=rows))
    client.rewards(client.submit(rows, numbers=numbers))
    start = time.perf_counter()
    tickets: list[int] = []
    for _ in range(QUERIES):
        tickets.append(client.submit(rows, numbers=numbers))
        if len(tickets) > UNDER_WAY:
            client.rewards(tickets.pop(0))
    for ticket in tickets:
        client.rewards(ticket)
    return QUERIES * QUERY_ROWS / (time.perf_counter() - start)


def measure_served() -> dict[str, float]:
    """Queries to a server in another process, and the bare forward pass in this one, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/rewards"
        server = subprocess.Popen([sys.executable, __file__, "--serve", endpoint])
        try:
            table = state_table(LAYOUT, settings("function"))
            client = RemoteRewards(endpoint, Sender("bench", "learner"), LAYOUT, table, print, alone=True)
            pairs = [(measure_forward(), measure_queries(client)) for _ in range(7)]
            client.close()
        finally:
            server.terminate()
            server.wait()
    return {
        "forward_rows_per_second": statistics.median(pair[0] for pair in pairs),
        "query_rows_per_second": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(queries / bare for bare, queries in pairs),
    }


def serve(endpoint: str) -> None:
    """The server of `measure_served`."""
    telemetry = Telemetry("reward-server", 0, Sender("bench", "reward-server"))
    chosen = settings("function")
    server = listen(endpoint, LAYOUT, chosen, state_table(LAYOUT, chosen), telemetry)
    service = RewardServer(server, make_model, LAYOUT, chosen, telemetry)
    while True:
        service.serve(1.0)


def main(arguments: Sequence[str] = ()) -> None:
    """Measure, print, and assert the ratios."""
    torch.set_num_threads(1)
    if arguments[:1] == ["--serve"]:
        return serve(arguments[1])
    figures = {f"svgd_update_{scope}": measure_update(scope) for scope in ("function", "tensor")}
    figures["queries"] = measure_served()
    if "--json" in arguments:
        print(json.dumps({Path(__file__).stem: figures}))
    else:
        for name, values in figures.items():
            print(name, "  ".join(f"{key} {value:.4g}" for key, value in values.items()))
    for name in ("svgd_update_function", "svgd_update_tensor"):
        assert figures[name]["ratio"] <= MOST_OF_FLOOR, f"{name}: {figures[name]['ratio']:.2f} times its floor"
    assert figures["queries"]["ratio"] >= LEAST_OF_FORWARD, f"queries: {figures['queries']['ratio']:.2f} of the forward"
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
