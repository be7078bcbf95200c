"""Whole runs in one process: what a seed determines, what a resume continues, what imitation must not see."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bm3il.actors import collector, evaluation
from bm3il.actors.policy import Policy, UniformPolicy
from bm3il.actors.rollout import Acts
from bm3il.actors.settings import ActorSettings, EvaluationSettings
from bm3il.actors.simulator import Simulator
from bm3il.learner import training
from bm3il.learner.algorithms import ALGORITHMS, algorithm
from bm3il.learner.checkpoint import CheckpointFolder
from bm3il.learner.clipped import ClippedActorCritic
from bm3il.learner.cloning import BehaviourCloning
from bm3il.learner.experience import Evaluated, LocalExperience
from bm3il.learner.imitation import OffPolicyImitation
from bm3il.learner.process import run_serial
from bm3il.learner.settings import ClippedSettings, CloningSettings, LearnerSettings, Settings
from bm3il.learner.training import Training
from bm3il.protocol.channels import Refused
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.errors import InputError, NumericalError, SimulatorError
from bm3il.protocol.job import Endpoints, Job
from bm3il.protocol.layout import JointRows
from bm3il.protocol.messages import Refusal, Sender
from bm3il.protocol.registry import make_environment
from bm3il.protocol.telemetry import Telemetry
from bm3il.reward_server.client import LocalRewards
from bm3il.reward_server.settings import RewardSettings

torch.set_num_threads(1)
STEPS_PER_ITERATION = 100
ITERATIONS = 6
Undisturbed = Callable[[str], tuple[Path, dict[str, object]]]


def run(
    folder: Path,
    name: str = "bm3il",
    seed: int = 1,
    actor_count: int = 2,
    config: str = "config",
    stop: threading.Event | None = None,
    environment: str = "rover_tower?pairs=2",
    babbling: int = 0,
    episodes: tuple[int, int] = (20, 20),
    **learner: float,
) -> dict[str, object]:
    """A small run; returns what is in its result.json."""
    job = Job(
        run_id="test",
        run_folder=folder,
        environment=environment,
        spec=make_environment(environment, 1).spec,
        demonstrations="rover_tower_4",
        demonstration_episodes=10,
        algorithm=name,
        mode="serial",
        seed=seed,
        steps=ITERATIONS * STEPS_PER_ITERATION,
        actors=actor_count,
        parameter_sharing="type",
        agent_identity=True,
        endpoints=Endpoints("", "", "", ""),
    )
    actor = ActorSettings(steps_per_iteration=STEPS_PER_ITERATION, hidden=(16,), babbling=babbling)
    small = LearnerSettings(
        hidden=16,
        heads=2,
        updates=3,
        batch_size=32,
        window_steps=300,
        checkpoint_interval=2,
        clipped=ClippedSettings(epochs=1, parts=2, critic_first=1),
    )
    reward = RewardSettings(particles=2, hidden=(16,), updates=2, batch_size=32, window_steps=300)
    reward = algorithm(name).reward_settings(reward)
    evaluation = EvaluationSettings(interval=2, episodes=episodes[0], final_episodes=episodes[1])
    folder.mkdir(exist_ok=True)
    cloning = CloningSettings(updates=3, iterations=ITERATIONS, batch_size=32)
    telemetry = Telemetry("learner", 0, Sender("test", "learner-0"))
    telemetry.stop = stop or telemetry.stop
    try:
        settings = Settings(dataclasses.replace(small, **learner), cloning, actor, reward, evaluation)
        run_serial(job, settings, config, telemetry)
    finally:
        telemetry.close()
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The folder and the result of an algorithm's run with seed 1, which is trained once for all that ask."""

    @cache
    def trained(name: str) -> tuple[Path, dict[str, object]]:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        return folder, run(folder, name)

    return trained


def test_a_seed_determines_every_bit_of_the_policy(tmp_path: Path, undisturbed: Undisturbed) -> None:
    again, other = (run(tmp_path / name, seed=seed)["policy_sha256"] for name, seed in (("b", 1), ("c", 2)))
    first = undisturbed("bm3il")[1]["policy_sha256"]
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_runs_to_its_end(undisturbed: Undisturbed, name: str) -> None:
    folder, result = undisturbed(name)
    assert result["status"] == "finished"
    assert result["iterations"] == ITERATIONS
    assert result["env_steps"] == (0 if name == "bc" else ITERATIONS * STEPS_PER_ITERATION)
    assert np.isfinite(result["normalized_return"])  # type: ignore[call-overload]
    assert (folder / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "figures"), [("bm3il", {"accuracy_agent", "accuracy_expert"}), ("bc", {"held_out_loss"})]
)
def test_between_two_stages_a_run_tells_of_its_figures_and_not_of_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, figures: set[str]
) -> None:
    told, note = [], Training._note

    def noted(training: Training, figures: dict[str, float]) -> None:
        told.append(training._telemetry.status())
        note(training, figures)

    monkeypatch.setattr(Training, "_note", noted)
    run(tmp_path / "run", name)
    assert [status.stage for status in told] == ["between"] * ITERATIONS
    assert figures | {"wall_seconds"} <= told[-1].values.keys()
    assert told[-1].values["evaluated_iteration"] == (ITERATIONS - 1) // 2 * 2  # every second one is
    stages = {key for status in told for key in status.values if key.startswith("seconds_")}
    assert {"seconds_restore", "seconds_update", "seconds_publish", "seconds_checkpoint"} <= stages


@pytest.mark.parametrize(("world", "changed"), [("rover_tower?pairs=2", 0.0), ("rover_tower?pairs=2&slip=0.2", 1.0)])
def test_a_changed_world_is_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str, changed: float
) -> None:
    told, note = [], Training._note

    def noted(training: Training, figures: dict[str, float]) -> None:
        note(training, figures)
        told.append(training._telemetry.status().values["changed_world"])

    monkeypatch.setattr(Training, "_note", noted)
    run(tmp_path / "run", "bc", environment=world)
    assert told == [changed] * ITERATIONS


@pytest.mark.parametrize("policy", ["actor", "clipped"])
def test_figures_of_the_log_are_called_after_whose_they_are(tmp_path: Path, policy: str) -> None:
    """The policies have an entropy and the discriminators have another: both are there."""
    run(tmp_path / "run", policy=policy)  # type: ignore[arg-type]
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    names = {"policy_entropy", "discriminator_entropy", "policy_loss", "critic_loss", "discriminator_loss", "reward"}
    assert names <= set(logged)
    assert not {"entropy", "loss"} & set(logged)


def test_the_log_tells_where_the_time_went(undisturbed: Undisturbed) -> None:
    folder = undisturbed("bm3il")[0]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    stages = {"seconds_collect", "seconds_observe", "seconds_query", "seconds_update"}
    assert all(stages <= set(line) for line in lines)
    spent = sum(value for line in lines for name, value in line.items() if name.startswith("seconds_"))
    assert 0.5 * lines[-1]["wall_seconds"] < spent < lines[-1]["wall_seconds"] + 1
    assert "seconds_update" not in (folder / "curve.csv").read_text()


class _Blinded(Simulator):
    """An environment whose true rewards are not numbers."""

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        now = super().step(actions)
        return dataclasses.replace(now, rewards=[np.full_like(r, np.nan) for r in now.rewards])


@pytest.mark.parametrize("name", [name for name in sorted(ALGORITHMS) if ALGORITHMS[name].imitates])
def test_imitation_never_reads_a_true_reward(
    tmp_path: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen = undisturbed(name)[1]["policy_sha256"]
    monkeypatch.setattr(collector, "Simulator", _Blinded)
    assert run(tmp_path / "blind", name)["policy_sha256"] == seen


def test_an_expert_does_read_true_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "Simulator", _Blinded)
    with pytest.raises(NumericalError, match="reward"):
        run(tmp_path / "blind", "expert")


@pytest.mark.parametrize("name", ["bm3il", "bc"])
def test_stop_and_resume_ends_with_the_same_policy(tmp_path: Path, undisturbed: Undisturbed, name: str) -> None:
    folder, whole = undisturbed(name)

    class StopsInTheMiddle(threading.Event):
        """Set from its fourth question on: some iterations in."""

        questions = 0

        def is_set(self) -> bool:
            self.questions += 1
            return self.questions > 3

    stopped = run(tmp_path / "parts", name, stop=StopsInTheMiddle())
    assert stopped["status"] == "interrupted"
    assert 0 < stopped["iterations"] < ITERATIONS  # type: ignore[operator]
    resumed = run(tmp_path / "parts", name)
    assert resumed["policy_sha256"] == whole["policy_sha256"]
    assert resumed["return_mean"] == whole["return_mean"]
    curves = [(of / "curve.csv").read_text().splitlines() for of in (folder, tmp_path / "parts")]
    assert [line.split(",")[:2] for line in curves[0]] == [line.split(",")[:2] for line in curves[1]]
    logged = [json.loads(line)["iteration"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, ITERATIONS + 1))


@pytest.mark.parametrize("name", ["bm3il", "bc"])
def test_a_stop_before_the_first_evaluation_does_not_cost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Undisturbed, name: str
) -> None:
    folder, stop = tmp_path / "run", threading.Event()
    monkeypatch.setattr(LocalExperience, "evaluations", lambda *_, **__: [])
    monkeypatch.setattr(Training, "_note", lambda training, _: training._facts.iteration == 4 and stop.set())
    assert run(folder, name, stop=stop, checkpoints_kept=1)["iterations"] == 4
    assert CheckpointFolder(folder / "checkpoints", 1)._names() == ["00000000", "00000004"]
    monkeypatch.undo()
    run(folder, name, checkpoints_kept=1)
    whole, resumed = ((of / "curve.csv").read_text().splitlines() for of in (undisturbed(name)[0], folder))
    assert [row.split(",")[0] for row in resumed] == ["iteration", "0", "4", "6"]
    start, again = ([value for key, value in enumerate(rows[1].split(",")) if key != 2] for rows in (whole, resumed))
    assert start == again  # but for the seconds


def test_a_budget_counts_steps_that_were_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes may end early; the schedules follow what was played, and the last policy is the one that is judged."""
    iterate, told = OffPolicyImitation.iterate, []

    def iterated(imitation: OffPolicyImitation, progress: float, abort: Callable[[], None]) -> object:
        told.append(progress)
        return 70, iterate(imitation, progress, abort)[1]

    monkeypatch.setattr(OffPolicyImitation, "iterate", iterated)
    result = run(tmp_path / "run")
    budget = ITERATIONS * STEPS_PER_ITERATION
    assert told == [steps / budget for steps in range(0, budget, 70)]
    assert (result["iterations"], result["env_steps"]) == (9, 630)
    assert (tmp_path / "run" / "curve.csv").read_text().splitlines()[-1].startswith("9,630,")


def test_the_best_of_the_checkpoints_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    returns = iter([0.0, 1.0, 9.0, 3.0, 2.0])  # of the random policy, and after 0, 2, 4 and 6 iterations
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: np.full((20, 4), next(returns), np.float32))
    run(tmp_path / "run", checkpoint_interval=4)
    assert (tmp_path / "run" / "checkpoints" / "best").read_text() == "00000004\n"


def test_an_evaluation_that_comes_twice_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = LocalExperience.evaluations
    monkeypatch.setattr(LocalExperience, "evaluations", lambda *args, **kinds: 2 * once(*args, **kinds))
    run(tmp_path / "run")
    rows = (tmp_path / "run" / "curve.csv").read_text().splitlines()[1:]
    steps = [(iteration, iteration * STEPS_PER_ITERATION) for iteration in (0, 2, 4, 6)]
    assert [row.split(",")[:2] for row in rows] == [[str(value) for value in pair] for pair in steps]


def test_the_first_evaluation_is_recorded_though_a_later_one_overtakes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, held = LocalExperience.evaluations, []  # type: ignore[var-annotated]

    def overtaken(*args: Any, **kinds: Any) -> list[Any]:
        came = list(once(*args, **kinds))
        held.extend(one for one in came if one.version == 0)
        came = [one for one in came if one.version]
        return came + [held.pop() for _ in held[:]] if came else []

    monkeypatch.setattr(LocalExperience, "evaluations", overtaken)
    run(tmp_path / "run")
    rows = (tmp_path / "run" / "curve.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["0", "2", "4", "6"]


def test_a_reward_server_that_is_lost_while_the_clone_is_made_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no checkpoint yet: the session begins anew, from the clone that is there."""
    state, lost = LocalRewards.state, []  # type: ignore[var-annotated]
    clones = {"start": "cloned", "policy": "clipped", "window_steps": 0}

    def lost_once(rewards: LocalRewards) -> Any:
        lost.append(1)
        if len(lost) == 1:
            raise Refused(Refusal("no_session", "this server is not in the session"))
        return state(rewards)

    undisturbed = run(tmp_path / "undisturbed", **clones)  # type: ignore[arg-type]
    monkeypatch.setattr(LocalRewards, "state", lost_once)
    assert run(tmp_path / "lost", **clones)["policy_sha256"] == undisturbed["policy_sha256"]  # type: ignore[arg-type]


def test_what_the_reward_server_refuses_for_good_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Refused(Refusal("body", "rows must lie in 1..5, got 6"))

    monkeypatch.setattr(LocalRewards, "update", refuse)
    with pytest.raises(InputError, match=r"rows must lie in 1\.\.5"):
        run(tmp_path / "run")


@pytest.mark.parametrize("past", [0, 3])
def test_a_run_that_is_refused_again_and_again_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, past: int) -> None:
    """Though it does some iterations each time, from the last checkpoint on."""
    asked, update = [0], LocalRewards.update

    def refuse(rewards: LocalRewards, rows: JointRows, progress: float) -> int:
        asked[0] += 1
        if progress * ITERATIONS >= past:
            raise Refused(Refusal("no_session", "this server is not in the session"))
        return update(rewards, rows, progress)

    monkeypatch.setattr(LocalRewards, "update", refuse)
    monkeypatch.setattr(training, "MAX_REWINDS", 4)
    with pytest.raises(InputError, match=rf"5 times, .* not past iteration {past}.*not in the session"):
        run(tmp_path / "run", checkpoint_interval=2)
    assert asked[0] == 5 + past + 4 * (past % 2)


def test_an_update_that_a_query_overtook_is_cured_by_a_rewind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Undisturbed
) -> None:
    """A cut loses the large update; the query behind it is sent first afterwards, of rows that the server has not."""
    refused, update = [], LocalRewards.update  # type: ignore[var-annotated]

    def overtaken(rewards: LocalRewards, rows: JointRows, progress: float) -> int:
        if progress > 0.4 and not refused:
            refused.append(progress)
            raise Refused(Refusal("not_held", "rows 0..19 are asked for, this server holds 0..-1"))
        return update(rewards, rows, progress)

    monkeypatch.setattr(LocalRewards, "update", overtaken)
    assert run(tmp_path / "run")["policy_sha256"] == undisturbed("bm3il")[1]["policy_sha256"]
    assert refused


def test_a_rewind_forgets_neither_the_clones_return_nor_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations may come after the checkpoint to which a run goes back."""
    update, evaluations = LocalRewards.update, LocalExperience.evaluations
    lost, held, calls = [], [], []  # type: ignore[var-annotated]
    returns = iter([0.0, 10.0, 100.0, 50.0, 20.0, 20.0, 20.0, 20.0])
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: np.full((20, 4), next(returns), np.float32))

    def lost_once(rewards: LocalRewards, rows: JointRows, progress: float) -> int:
        if progress > 0.7 and not lost:
            lost.append(progress)
            raise Refused(Refusal("no_session", "this server is not in the session"))
        return update(rewards, rows, progress)

    def late(*args: Any, **kinds: Any) -> list[Any]:
        """All after the checkpoint of iteration 4, to which the run goes back."""
        calls.append(1)
        held.extend(evaluations(*args, **kinds))
        return [held.pop(0) for _ in held[:]] if len(calls) >= 4 else []

    monkeypatch.setattr(LocalRewards, "update", lost_once)
    monkeypatch.setattr(LocalExperience, "evaluations", late)
    clones = {"start": "cloned", "policy": "clipped", "window_steps": 0, "checkpoint_interval": 2}
    result = run(tmp_path / "run", **clones)  # type: ignore[arg-type]
    assert lost
    assert result["clone_return"] == 10.0
    assert (tmp_path / "run" / "checkpoints" / "best").read_text() == "00000002\n"


def test_a_run_that_is_refused_often_and_gets_on_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused, update = set[float](), LocalRewards.update

    def refuse_once(rewards: LocalRewards, rows: JointRows, progress: float) -> int:
        if progress not in refused:
            refused.add(progress)
            raise Refused(Refusal("answer_gone", "an answer was lost"))
        return update(rewards, rows, progress)

    monkeypatch.setattr(LocalRewards, "update", refuse_once)
    monkeypatch.setattr(training, "MAX_REWINDS", 1)
    assert run(tmp_path / "run", checkpoint_interval=1)["status"] == "finished"
    assert len(refused) == ITERATIONS


def test_a_stop_is_heard_while_the_clone_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what there is of the clone is no checkpoint: the run begins anew."""
    cloned = {"start": "cloned", "policy": "clipped", "window_steps": 0}
    stop, iterate, iterations = threading.Event(), BehaviourCloning.iterate, []

    def iterated(cloning: BehaviourCloning, *args: object) -> object:
        iterations.append(1)
        stop.set()
        return iterate(cloning, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(BehaviourCloning, "iterate", iterated)
    assert run(tmp_path / "stopped", stop=stop, **cloned)["status"] == "interrupted"  # type: ignore[arg-type]
    assert len(iterations) == 1
    assert not list((tmp_path / "stopped" / "checkpoints").glob("0*"))
    monkeypatch.undo()
    resumed, whole = (run(tmp_path / name, **cloned) for name in ("stopped", "whole"))  # type: ignore[arg-type]
    assert resumed["status"] == "finished"
    assert resumed["policy_sha256"] == whole["policy_sha256"]


def test_another_configuration_is_not_resumed(tmp_path: Path) -> None:
    run(tmp_path / "run", config="learner: {hidden: 1}\nseed: 2\nsteps: 5")
    with pytest.raises(InputError, match=r"configuration: learner.hidden: 1 then, 3 now$"):
        run(tmp_path / "run", config="learner: {hidden: 3}\nseed: 2\nsteps: 9\nfiles: {}")


@pytest.mark.parametrize("name", ["bm3il", "bc"])
def test_a_checkpoint_of_another_release_says_so(tmp_path: Path, name: str) -> None:
    run(tmp_path / "run", name)
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints", kept=1)
    checkpoint = folder.newest()
    assert checkpoint is not None
    lost = next(array for array in checkpoint.learner if array.endswith("adam/0/step"))
    del checkpoint.learner[lost]
    folder.write(checkpoint)
    with pytest.raises(InputError, match=rf"iteration {ITERATIONS} has no array '0/step': another release of bm3il"):
        run(tmp_path / "run", name)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"critic_loss is .* in iteration 1"):
        run(tmp_path / "run", reward_offset=float("nan"))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["00000000"]


class Played:
    """What evaluations play: the kind of each policy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.policies: list[type] = []
        play = evaluation.evaluate

        def played(environment: str, policy: Acts, *args: object) -> np.ndarray:
            self.policies.append(type(policy))
            return play(environment, policy, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(evaluation, "evaluate", played)


def test_a_learner_plays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own process evaluates nothing: whatever there is to play is played by the experience."""
    monkeypatch.setattr(LocalExperience, "publish", lambda *_: None)
    monkeypatch.setattr(LocalExperience, "evaluator_silent_seconds", lambda _: math.inf, raising=False)
    played = Played(monkeypatch)
    result = run(tmp_path / "run", "bc")
    assert played.policies == []
    assert (result["status"], result["random_return"]) == ("finished", None)


@pytest.mark.parametrize("name", ["maac", "bc"])
def test_the_uniform_policy_is_played_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """And a resume knows its return."""
    played, stop = Played(monkeypatch), threading.Event()
    monkeypatch.setattr(Training, "_note", lambda *_: stop.set())
    stopped = run(tmp_path / "run", name, stop=stop)
    monkeypatch.undo()
    played_again = Played(monkeypatch)
    resumed = run(tmp_path / "run", name)
    assert played.policies == [UniformPolicy, Policy]
    assert set(played_again.policies) == {Policy}
    assert stopped["random_return"] == resumed["random_return"]
    rows = (tmp_path / "run" / "curve.csv").read_text().splitlines()
    assert all(math.isfinite(float(row.split(",")[5])) for row in rows[1:])


def test_a_broken_baseline_is_played_again(tmp_path: Path) -> None:
    known = run(tmp_path / "run", "bc")["random_return"]
    for text in ("", "[]", '{"random_return": "much"}', '{"episodes": 3}'):
        (tmp_path / "run" / "baseline.json").write_text(text)
        assert run(tmp_path / "run", "bc")["random_return"] == known


def test_who_is_not_evaluated_has_finished_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluator that is gone takes nothing from a training; a resume of it evaluates alone."""
    monkeypatch.setattr(LocalExperience, "evaluations", lambda *_, **__: [])
    monkeypatch.setattr(LocalExperience, "evaluator_silent_seconds", lambda _: 120.1)
    lost = run(tmp_path / "run")
    assert (lost["status"], lost["return_mean"], lost["iterations"]) == ("finished", None, ITERATIONS)
    monkeypatch.undo()
    played = Played(monkeypatch)
    resumed = run(tmp_path / "run")
    assert played.policies == [Policy, Policy]  # the first and the last
    assert resumed["policy_sha256"] == lost["policy_sha256"]
    assert resumed["return_episodes"] == 20


def test_an_evaluator_that_is_heard_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, evaluations = [], LocalExperience.evaluations

    def late(experience: LocalExperience, wait_seconds: float = 0.0) -> list[Evaluated]:
        asked.append(wait_seconds)
        return evaluations(experience) if asked.count(0.2) == 50 else []

    monkeypatch.setattr(LocalExperience, "evaluations", late)
    monkeypatch.setattr(LocalExperience, "evaluator_silent_seconds", lambda _: 119.9)
    assert run(tmp_path / "run", "bc")["return_episodes"] == 20


def test_a_simulator_that_fails_at_the_end_takes_nothing_from_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = evaluation.evaluate
    played = iter(range(100))

    def fails(*args: object) -> np.ndarray:
        if next(played) >= 1 + ITERATIONS // 2:  # the uniform policy, and those before the last
            raise SimulatorError("environment 'mine' raised ValueError: no")
        return evaluate(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "evaluate", fails)
    result = run(tmp_path / "run")
    assert (result["status"], result["return_mean"]) == ("finished", None)
    assert (tmp_path / "run" / "checkpoints" / f"{ITERATIONS:08d}").is_dir()


@pytest.mark.parametrize(
    ("babbling", "learns"), [(0, [False, True, True, True, True, True]), (2, [False, True, True, True])]
)
def test_policies_learn_when_critics_have_learned_first_and_nobody_babbles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, babbling: int, learns: list[bool]
) -> None:
    told, update = [], ClippedActorCritic.update

    def noted(
        built: ClippedActorCritic, segments: object, rewards: object, progress: float, learn_policy: bool
    ) -> object:
        told.append(learn_policy)
        return update(built, segments, rewards, progress, learn_policy)  # type: ignore[arg-type]

    monkeypatch.setattr(ClippedActorCritic, "update", noted)
    run(tmp_path / "run", babbling=babbling, episodes=(2, 2), policy="clipped", window_steps=0)  # type: ignore[arg-type]
    assert told == learns


def test_the_clone_is_evaluated_as_well_as_the_end(tmp_path: Path) -> None:
    run(tmp_path / "run", episodes=(3, 7), start="cloned", policy="clipped", window_steps=0)  # type: ignore[arg-type]
    with (tmp_path / "run" / "curve.csv").open() as file:
        assert [row["episodes"] for row in csv.DictReader(file)] == ["7", "3", "3", "7"]
