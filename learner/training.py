"""A run from its first iteration to its result: sessions, evaluations, checkpoints, records.

What an iteration does is the business of `Imitation` or `BehaviourCloning`; the loop here is the same for both, in one
process and in many.
"""

from __future__ import annotations

import copy
import logging
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from bm3il.actors.evaluation import Evaluator, ReturnEstimate, Scale, remembered_random_returns
from bm3il.actors.policy import Policy
from bm3il.learner.checkpoint import Checkpoint, CheckpointFolder, configuration_differences
from bm3il.learner.experience import Evaluated, Experience
from bm3il.learner.figures import merged
from bm3il.learner.metrics import LearnerMetrics
from bm3il.learner.optimisation import part
from bm3il.learner.record import RunRecord
from bm3il.learner.settings import Settings
from bm3il.protocol.channels import Refused, Unanswered
from bm3il.protocol.errors import InputError, NumericalError, SimulatorError
from bm3il.protocol.job import Job
from bm3il.protocol.telemetry import OF_TYPE, Telemetry

log = logging.getLogger(__name__)

MOST_TYPES_SHOWN = 10
"""With every heartbeat: the curve and the result have those of all."""
SHOWN_FIGURES = "held_out_loss", "accuracy_agent", "accuracy_expert"
"""What tells how far the imitation is, also where no true reward is known."""

Arrays = dict[str, np.ndarray]
OfTypes = dict[str, dict[str, float | None]]
"""Figures by the name of a type."""
CHECKPOINT_EVENT_SECONDS = 60.0
"""Between two events that tell of a checkpoint; the last one before an end is told in any case."""
CURABLE = ("no_session", "deadline", "answer_gone", "not_held")
"""Refusals of a reward server that was started again, or was stopped or cut off for a while: a cut may lose a large
update, and let the query behind it through, of rows that have not come."""
RESTARTED = "the reward server was started again and knows nothing of this run"
MAX_REWINDS = 10
"""To the last checkpoint, without a further iteration done than ever before. More than a reward server is started
again without getting anything done."""


class Interrupted(Exception):
    """The run was told to stop; everything is as it was after the last whole iteration."""


class Iterated(Protocol):
    """What is iterated.

    iterations: how often; None until the job's budget of steps is played.
    starts_cloned: whether the policy before the first iteration is the demonstrations' clone.
    """

    policy: Policy
    starts_cloned: bool

    @property
    def iterations(self) -> int | None: ...

    def begin(
        self, session: str, learner: Arrays | None, rewards: Arrays | None, abort: Callable[[], None]
    ) -> None: ...

    def iterate(self, progress: float, abort: Callable[[], None]) -> tuple[int, dict[str, float]]: ...

    def state(self) -> tuple[Arrays, Arrays]: ...


@dataclass
class Facts:
    """What a checkpoint must know besides arrays. Returns are true returns per agent and episode."""

    iteration: int = 0
    env_steps: int = 0
    wall_seconds: float = 0.0
    best_return: float = -math.inf
    """Of the policies that have a checkpoint."""
    clone_return: float | None = None
    """Of the clone that the run started from, once it was evaluated; None if it started from something else."""


class Training:
    """One run. `run` returns its status and may be called once."""

    def __init__(
        self,
        job: Job,
        settings: Settings,
        algorithm: Iterated,
        experience: Experience,
        config_yaml: str,
        telemetry: Telemetry,
    ) -> None:
        self._job, self._settings, self._evaluation = job, settings.learner, settings.evaluation
        self._algorithm, self._experience = algorithm, experience
        self._record, self._config, self._telemetry = RunRecord(job.run_folder), config_yaml, telemetry
        self._checkpoints = CheckpointFolder(job.run_folder / "checkpoints", self._settings.checkpoints_kept)
        self._metrics = LearnerMetrics(telemetry.registry)
        self._facts = Facts()
        self._farthest, self._rewinds = -1, 0
        """The farthest iteration before a rewind, and how many rewinds there were from there or before."""
        self._begun = False
        self._evaluate_again: int | None = None
        self._counted_until = time.monotonic()
        self._told_checkpoint = -math.inf
        self._final: Evaluated | None = None
        self._figures: dict[int, dict[str, float]] = {}
        self._evaluator = Evaluator(job, self._evaluation)
        self._scale = Scale(job.spec, remembered_random_returns(job), self._evaluator.expert)

    def run(self) -> str:
        """Train to the end, or until told to stop: `finished` or `interrupted`.

        If the reward server is lost, both sides go back to the last checkpoint and the run goes on from there.
        Raises NumericalError, DeadlineError (a wait passed its deadline), OSError (the disk), InputError (also for what
        the reward server would refuse again, or has refused so often that the run gets no further).
        """
        while True:
            try:
                self._finish(self._session())
                return "finished"
            except Interrupted:
                # After the last iteration its checkpoint is on the disk already.
                if self._progress < 1:
                    self._checkpoint_if_possible()
                self._write_result("interrupted")
                return "interrupted"
            except Refused as error:
                if error.cause not in CURABLE:
                    raise InputError(f"the reward server refuses what the learner asks for: {error}") from error
                self._count_rewind(error)
                iteration = self._facts.iteration
                why = RESTARTED if error.cause == "no_session" else str(error)
                self._telemetry.event("rewind", f"goes back from iteration {iteration} to the last checkpoint: {why}")

    def _session(self) -> str:
        """All iterations that are left; returns the session, whose last policy is not handed out yet."""
        # Not from the seed: what is still under way of a session before must not fit this one.
        session = secrets.token_hex(8)
        self._restore(session)
        if self._progress < 1:
            self._publish(session)
        while self._progress < 1:
            self._abort()
            began = time.monotonic()
            try:
                fresh_steps, figures = self._algorithm.iterate(self._progress, self._abort)
            except NumericalError as error:
                raise NumericalError(f"{error} in iteration {self._facts.iteration + 1}") from error
            self._telemetry.numbers["seconds_iteration"] = time.monotonic() - began
            self._facts.iteration += 1
            self._facts.env_steps += fresh_steps
            self._count_seconds()
            self._metrics.count_iteration(self._facts.iteration, self._facts.env_steps, figures)
            # Exact, as `_progress` is cut off at 1 and n / n is 1.
            is_last = self._progress == 1
            if not is_last:  # at once: actors play with it while it is written down
                self._publish(session)
            self._note(figures)
            if is_last or self._facts.iteration % self._settings.checkpoint_interval == 0:
                self._checkpoint()
            self._take_evaluations()
        return session

    def _count_rewind(self, error: Refused) -> None:
        self._metrics.rewinds.inc()
        if self._facts.iteration > self._farthest:
            self._farthest, self._rewinds = self._facts.iteration, 0
        self._rewinds += 1
        if self._rewinds > MAX_REWINDS:
            raise InputError(
                f"the reward server refused what the learner asks for {self._rewinds} times, and the run came not past "
                f"iteration {self._farthest}; the last time: {error} ({error.cause}). Its log tells more"
            ) from error

    @property
    def _progress(self) -> float:
        """The part of the run that is done."""
        if self._algorithm.iterations is not None:
            return self._facts.iteration / self._algorithm.iterations
        return min(1.0, self._facts.env_steps / self._job.steps)

    def _abort(self) -> None:
        if self._telemetry.stop.is_set():
            raise Interrupted

    def _restore(self, session: str) -> None:
        """Begin from the newest checkpoint; without one, write the first, so that there is always one to go back to."""
        with self._telemetry.stage("restore"):
            checkpoint = self._checkpoints.newest()
            if checkpoint is None:
                self._algorithm.begin(session, None, None, self._abort)
                self._begun = True
                self._figures = {0: self._position()}
                self._checkpoint()
                return
            if changed := configuration_differences(checkpoint.config, self._config):
                raise InputError(f"the checkpoint was written by another configuration: {changed}")
            try:
                self._algorithm.begin(session, checkpoint.learner, checkpoint.rewards, self._abort)
            except KeyError as error:  # arrays have other names than this release gives them
                raise InputError(
                    f"the checkpoint of iteration {checkpoint.iteration} has no array {error}: another release of "
                    "bm3il wrote it. Go on with that one, or begin anew with another --run"
                ) from error
            self._begun = True
            seconds = self._facts.wall_seconds
            self._facts = Facts(**checkpoint.facts)
            forgotten = self._record.go_on_from(checkpoint.iteration)
            self._recall_returns()
            # The iterations that are lost took their time: their seconds stay counted.
            self._facts.wall_seconds = max(self._facts.wall_seconds, forgotten.wall_seconds, seconds)
            self._evaluate_again = checkpoint.iteration if forgotten.evaluated else None
            self._figures = {checkpoint.iteration: self._position()}
            again = f"; {forgotten.iterations} iterations after it are done again" if forgotten.iterations else ""
            self._telemetry.event("restored", f"goes on from the checkpoint of iteration {checkpoint.iteration}{again}")
            if forgotten.everything and checkpoint.iteration:
                self._publish_start(session)

    def _recall_returns(self) -> None:
        """What was evaluated after the checkpoint was written is in the curve: the clone's return, and the best one."""
        facts, returns = self._facts, self._record.returns()
        if facts.clone_return is None and self._algorithm.starts_cloned:
            facts.clone_return = returns.get(0)
        facts.best_return = max(facts.best_return, returns.get(self._checkpoints.best_iteration(), -math.inf))

    def _publish(self, session: str) -> None:
        self._hand_out(session, self._facts.iteration, self._algorithm.policy)

    def _publish_start(self, session: str) -> None:
        """The first policy again: the run was stopped before its evaluation had come."""
        if (start := self._checkpoints.first()) is not None:
            # The run's own policy is the restored one, and remains it.
            policy = copy.deepcopy(self._algorithm.policy)
            policy.load_arrays(part(start.learner, "policy"))
            self._figures[0] = {"env_steps": 0, "wall_seconds": float(start.facts["wall_seconds"])}
            self._hand_out(session, 0, policy)

    def _hand_out(self, session: str, iteration: int, policy: Policy) -> None:
        with self._telemetry.stage("publish"):
            self._experience.publish(session, iteration, policy, self._episodes(iteration))

    def _episodes(self, iteration: int) -> int:
        """Of the evaluation of this iteration's policy; 0: it is not evaluated."""
        if self._progress == 1 and iteration == self._facts.iteration:
            return self._evaluation.final_episodes
        if iteration == 0 and self._algorithm.starts_cloned:
            # What the run will be held against is measured as well as its end.
            return self._evaluation.final_episodes
        if iteration % self._evaluation.interval == 0 or iteration == self._evaluate_again:
            return self._evaluation.episodes
        return 0

    def _checkpoint(self) -> None:
        with self._telemetry.stage("checkpoint"):
            learner, rewards = self._algorithm.state()
            facts = self._facts
            self._checkpoints.write(Checkpoint(facts.iteration, self._config, asdict(facts), learner, rewards))
        is_last = self._progress == 1 or self._telemetry.stop.is_set()
        if is_last or time.monotonic() - self._told_checkpoint > CHECKPOINT_EVENT_SECONDS:
            self._told_checkpoint = time.monotonic()
            self._telemetry.event(
                "checkpoint", f"checkpoint of iteration {facts.iteration}, after {facts.env_steps} steps"
            )

    def _checkpoint_if_possible(self) -> None:
        """Before an interrupt; a reward server that was just restarted has nothing to save, the one before counts.

        A run that was told to stop while it made its clone has nothing to go on from: it will begin anew.
        """
        if not self._begun:
            return
        try:
            self._checkpoint()
        except (Refused, Unanswered) as error:
            log.warning("the last checkpoint stays the newest: %s", error)

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self._facts.wall_seconds += now - self._counted_until
        self._counted_until = now

    def _note(self, figures: dict[str, float]) -> None:
        """Record the iteration's figures; the log has beside them what the learner did since the line before."""
        facts = self._facts
        # As if each had as many steps; where episodes end early, the last may come later than that.
        by_steps = max(facts.iteration, -(-facts.iteration * self._job.steps // max(facts.env_steps, 1)))
        self._figures[facts.iteration] = merged(figures, self._position())
        self._telemetry.numbers |= {
            "iteration": facts.iteration,
            "iterations": self._algorithm.iterations or by_steps,
            "env_steps": facts.env_steps,
            "steps": self._job.steps if facts.env_steps else 0,
            "wall_seconds": facts.wall_seconds,
            "steps_per_second": facts.env_steps / max(facts.wall_seconds, 1e-9),
        }
        known = {
            "random_return": self._scale.random_return,
            "expert_return": self._scale.expert_return,
            "clone_return": facts.clone_return,
        }
        self._telemetry.numbers |= {name: value for name, value in known.items() if value is not None}
        self._telemetry.numbers["changed_world"] = bool(self._job.spec.changes)
        self._telemetry.numbers |= {name: figures[name] for name in SHOWN_FIGURES if name in figures}
        self._telemetry.done(facts.iteration)
        self._record.log_iteration(
            facts.iteration, merged(self._figures[facts.iteration], self._telemetry.take_spent())
        )

    def _position(self) -> dict[str, float]:
        return {"env_steps": self._facts.env_steps, "wall_seconds": self._facts.wall_seconds}

    def _take_evaluations(self, wait_seconds: float = 0.0) -> None:
        for evaluated in self._experience.evaluations(wait_seconds):
            self._scale = replace(self._scale, random=evaluated.random)
            self._record_evaluation(evaluated)

    def _record_evaluation(self, evaluated: Evaluated) -> None:
        figures = self._figures.pop(evaluated.version, None)
        if figures is None:  # an evaluator that was started again has repeated itself
            return
        estimate = self._evaluator.estimate(evaluated.returns)
        types = self._types(evaluated)
        self._record.add_evaluation(
            evaluated.version,
            int(figures.pop("env_steps")),
            figures.pop("wall_seconds"),
            estimate,
            self._scale.normalized(estimate.mean),
            types,
            figures,
        )
        # Older versions were skipped, but for the first, which may be overtaken on its way to the evaluator.
        self._figures = {v: rest for v, rest in self._figures.items() if v > evaluated.version or v == 0}
        if evaluated.version == 0 and self._algorithm.starts_cloned:
            self._facts.clone_return = estimate.mean
        if evaluated.version >= self._telemetry.numbers.get("evaluated_iteration", 0):
            self._show_evaluation(evaluated.version, estimate, types)
        # A better policy without a checkpoint must not keep the best one that has a checkpoint from being marked.
        if estimate.mean > self._facts.best_return and self._checkpoints.mark_best(evaluated.version):
            self._facts.best_return = estimate.mean
            self._telemetry.event(
                "best", f"best so far: return {estimate.mean:.2f} after iteration {evaluated.version}"
            )
        if self._progress == 1 and evaluated.version == self._facts.iteration:
            self._final = evaluated
            spread = "" if estimate.stderr is None else f" ± {estimate.stderr:.2f}"
            self._telemetry.event("evaluated", f"final policy: return {estimate.mean:.2f}{spread}")

    def _show_evaluation(self, version: int, estimate: ReturnEstimate, types: OfTypes) -> None:
        """On the screen and in the metrics, which tell of the newest."""
        self._telemetry.numbers |= {"return_mean": estimate.mean, "evaluated_iteration": version}
        if len(types) <= MOST_TYPES_SHOWN:
            of_types = {f"{OF_TYPE}{name}": told["normalized_return"] for name, told in types.items()}
            self._telemetry.numbers |= {name: value for name, value in of_types.items() if value is not None}
        self._metrics.count_evaluation(estimate.mean, types)

    def _types(self, evaluated: Evaluated) -> OfTypes:
        return self._scale.of_types(evaluated.returns, self._evaluator.groups(evaluated.returns))

    def _finish(self, session: str) -> None:
        """Have the final policy evaluated, and write the result: also without it, since the training is complete."""
        self._telemetry.trained()
        self._telemetry.numbers.pop("evaluated_episodes", None)
        with self._telemetry.stage("final_evaluation"):
            try:
                self._publish(session)
                with self._telemetry.stage("wait_for_evaluation"):
                    self._wait_for_final_evaluation()
            except SimulatorError as error:  # of serial mode, where the learner is the evaluator
                log.warning("the final policy is not evaluated: %s", error)
        self._write_result("finished")

    def _wait_for_final_evaluation(self) -> None:
        """As long as the evaluator is heard to be at work."""
        while self._final is None:
            self._take_evaluations(wait_seconds=0.2)
            self._abort()
            if (silent := self._experience.evaluator_silent_seconds()) > self._settings.deadline_seconds:
                log.warning("the final policy is not evaluated: the evaluator was not heard for %.0f s", silent)
                return

    def _write_result(self, status: str) -> None:
        self._count_seconds()
        if self._scale.random is None:  # no evaluation has come yet, but the baseline may be played
            self._scale = replace(self._scale, random=remembered_random_returns(self._job))
        final = self._final if status == "finished" else None
        estimate = final and self._evaluator.estimate(final.returns)
        result: dict[str, Any] = {
            "run_id": self._job.run_id,
            "environment": self._job.environment,
            "algorithm": self._job.algorithm,
            "seed": self._job.seed,
            "env_steps": self._facts.env_steps,
            "iterations": self._facts.iteration,
            "wall_seconds": self._facts.wall_seconds,
            "return_mean": estimate and estimate.mean,
            "return_stderr": estimate and estimate.stderr,
            "return_episodes": estimate and estimate.episodes,
            "random_return": self._scale.random_return,
            "changes": self._job.spec.changes,
            "expert_return": self._scale.expert_return,
            "clone_return": self._facts.clone_return,
            "normalized_return": estimate and self._scale.normalized(estimate.mean),
            "types": self._types(final) if final else {},
            "return_unit": "true return per agent and episode",
            "policy_sha256": self._algorithm.policy.sha256(),
            "status": status,
        }
        self._record.write_result(result)
        self._record.draw()
