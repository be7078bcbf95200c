"""`bm3il evaluate RUN`: how good is the policy of a run, and the same figures for drawing and for greedy actions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from actors.evaluation import ReturnEstimate, evaluate
from actors.policy import UniformPolicy
from launch.config import Config
from launch.run_folder import write_atomically
from launch.trained import Trained, load_trained
from learner.imitation import build_critic
from learner.optimisation import part
from protocol.demonstrations import Demonstrations, resolve
from protocol.errors import InputError

FRESH_SEED = 1_000_003
"""Start states that no training run of a small seed evaluates on."""


def main(run: Path, episodes: int, paired: bool, best: bool = False, pictures: bool = False, hour: float = -1.0) -> int:
    """Print a table of true returns per agent and episode, and write it to `evaluation.json` in the run's folder.

    pictures: also draw what is seen of the policy and of the demonstrations; hour: of the map, negative the busiest.
    paired: also play from the very start states of the demonstrations, where the expert's return is known.
    best: the checkpoint with the highest evaluation return instead of the newest.
    """
    if episodes < 1:
        raise InputError(f"--episodes must be at least 1, got {episodes}")
    trained = load_trained(run, best)
    config, policy, checkpoint = trained.config, trained.policy, trained.checkpoint
    random = evaluate(config.environment, UniformPolicy(policy.layout.spec), episodes, FRESH_SEED)
    rows: list[dict[str, Any]] = []
    for greedy in (False, True):
        estimate = ReturnEstimate.of(evaluate(config.environment, policy, episodes, FRESH_SEED, greedy))
        rows.append(_row("fresh", greedy, episodes, estimate, None, float(random.mean())))
    if paired:
        rows += _paired_rows(config, policy)
    _print(run, checkpoint.iteration, float(random.mean()), rows)
    if pictures:
        _draw(trained, run / "pictures", hour)
    write_atomically(run / "evaluation.json", json.dumps({"iteration": checkpoint.iteration, "rows": rows}, indent=1))
    return 0


def _draw(trained: Trained, folder: Path, hour: float) -> None:
    from launch.pictures import draw_attention, draw_pictures

    folder.mkdir(exist_ok=True)
    config, policy = trained.config, trained.policy
    if parameters := part(trained.checkpoint.learner, "critic"):
        critic = build_critic(trained.job, config.learner, config.actor, policy.layout)
        critic.load_state_dict({name: torch.tensor(value) for name, value in parameters.items()})
        if draw_attention(critic, config.environment, policy, folder / "attention.png"):
            print(folder / "attention.png")
    if not config.environment.startswith("berlin"):
        print("maps, loads and places are drawn for berlin only")
    elif not config.demonstrations:
        raise InputError("pictures show the demonstrations beside the policy, and this run had none")
    else:
        demonstrations = Demonstrations.load(resolve(config.demonstrations))
        for path in draw_pictures(config.environment, policy, demonstrations, folder, hour):
            print(path)


def _paired_rows(config: Config, policy: Any) -> list[dict[str, Any]]:
    if not config.demonstrations:
        raise InputError("paired evaluation needs the run's demonstrations, and it had none")
    demonstrations = Demonstrations.load(resolve(config.demonstrations))
    if not demonstrations.starts:
        raise InputError("the demonstrations hold no start states; evaluate without --paired")
    starts, count = demonstrations.starts, demonstrations.num_episodes
    expert = demonstrations.return_mean
    random = float(
        evaluate(config.environment, UniformPolicy(policy.layout.spec), count, FRESH_SEED, starts=starts).mean()
    )
    rows = []
    for greedy in (False, True):
        returns = evaluate(config.environment, policy, count, FRESH_SEED, greedy, starts)
        rows.append(_row("paired", greedy, count, ReturnEstimate.of(returns, demonstrations.groups), expert, random))
    return rows


def _row(
    starts: str, greedy: bool, episodes: int, estimate: ReturnEstimate, expert: float | None, random: float
) -> dict[str, Any]:
    return {
        "starts": starts,
        "actions": "greedy" if greedy else "drawn",
        "episodes": episodes,
        "return_mean": estimate.mean,
        "return_stderr": estimate.stderr,
        "random_return": random,
        "expert_return": expert,
        "normalized_return": None if expert is None else (estimate.mean - random) / (expert - random),
    }


def _print(run: Path, iteration: int, random: float, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{run}, iteration {iteration}: true return per agent and episode")
    for column in ("starts", "actions", "episodes", "return", "± s.e.", "random", "expert", "normalised"):
        table.add_column(column, justify="right")
    for row in rows:
        expert, normalized = row["expert_return"], row["normalized_return"]
        table.add_row(
            row["starts"],
            row["actions"],
            str(row["episodes"]),
            f"{row['return_mean']:.1f}",
            f"{row['return_stderr']:.1f}",
            f"{row['random_return']:.1f}",
            "–" if expert is None else f"{expert:.1f}",
            "–" if normalized is None else f"{normalized:.3f}",
        )
    Console().print(table)
