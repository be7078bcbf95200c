"""`bm3il evaluate RUN`: how good is the policy of a run, and the same figures for drawing and for greedy actions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from actors.evaluation import ReturnEstimate, evaluate
from actors.policy import Policy, UniformPolicy
from actors.process import build_policy
from launch.config import Config
from launch.run_folder import write_atomically
from launch.topology import make_job
from learner.checkpoint import CheckpointFolder, read_checkpoint
from learner.imitation import build_critic
from learner.optimisation import part
from protocol.demonstrations import Demonstrations, resolve
from protocol.errors import InputError
from protocol.job import Endpoints

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
    config = Config.from_yaml(_read(run / "config.yaml"), str(run / "config.yaml"))
    torch.set_num_threads(config.threads)
    policy = build_policy(make_job(config, "", run, Endpoints("", "", "", "")), config.actor)
    folder = run / "checkpoints"
    checkpoint = CheckpointFolder(folder, 1).newest()
    if best and (folder / "best").exists():
        checkpoint = read_checkpoint(folder / (folder / "best").read_text().strip())
    if checkpoint is None:
        raise InputError(f"{run} has no checkpoint to evaluate")
    policy.load_arrays(part(checkpoint.learner, "policy"))
    random = evaluate(config.environment, UniformPolicy(), episodes, FRESH_SEED)
    rows: list[dict[str, Any]] = []
    for greedy in (False, True):
        estimate = ReturnEstimate.of(evaluate(config.environment, policy, episodes, FRESH_SEED, greedy))
        rows.append(_row("fresh", greedy, episodes, estimate, None, float(random.mean())))
    if paired:
        rows += _paired_rows(config, policy)
    _print(run, checkpoint.iteration, float(random.mean()), rows)
    if pictures:
        _draw(config, policy, checkpoint.learner, run / "pictures", hour)
    write_atomically(run / "evaluation.json", json.dumps({"iteration": checkpoint.iteration, "rows": rows}, indent=1))
    return 0


def _draw(config: Config, policy: Policy, learner: dict[str, Any], folder: Path, hour: float) -> None:
    from launch.pictures import draw_attention, draw_pictures

    folder.mkdir(exist_ok=True)
    job = make_job(config, "", folder, Endpoints("", "", "", ""))
    if parameters := part(learner, "critic"):
        critic = build_critic(job, config.learner, config.actor, policy.layout)
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
    random = float(evaluate(config.environment, UniformPolicy(), count, FRESH_SEED, starts=starts).mean())
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


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise InputError(f"{path.parent} is not the folder of a run: {error.strerror}: {path.name}") from error
