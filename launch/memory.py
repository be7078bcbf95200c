"""How many bytes a run will take, reckoned before anything starts: memory of its processes, checkpoints on the disk.

What is counted are the arrays that grow with the environment and the settings, each where it lies. What a user's
simulator takes is not known here.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from bm3il.actors.collector import episodes_per_chunk
from bm3il.actors.evaluation import episodes_at_once
from bm3il.actors.process import credits_of
from bm3il.launch.config import Config
from bm3il.launch.topology import make_job, processes_of
from bm3il.learner.algorithms import algorithm
from bm3il.learner.imitation import PREFETCHED_BATCHES, REPLAY_STEPS
from bm3il.learner.replay import Replay
from bm3il.protocol.codec import table_bytes
from bm3il.protocol.demonstration_file import count_rows
from bm3il.protocol.demonstrations import resolve
from bm3il.protocol.device import choose_device
from bm3il.protocol.errors import InputError
from bm3il.protocol.job import Endpoints
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.observations import forms
from bm3il.protocol.specs import EnvironmentSpec
from bm3il.protocol.trajectories import Trajectories
from bm3il.reward_server.memory import Memory
from bm3il.reward_server.particles import QUERY_ROWS, TILE_ACTIVATIONS, architectures

PROCESS_BYTES = 200 << 20
"""Of a process that has loaded Python and PyTorch and has done nothing yet, without what it shares with others."""
CGROUP, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
VERSION_2 = "memory.max", "memory.current"
"""The limit of a control group, and what it uses."""
NETWORKS = "--learner.hidden and --actor.hidden, or --parameter-sharing type"
PARTICLES = "--reward.hidden and --reward.particles, or --parameter-sharing type"


@dataclass(frozen=True)
class Item:
    """Arrays of one kind that each process of a role holds.

    option: what makes them smaller.   computed: whether they lie where the role computes, be that a GPU.
    """

    role: str
    what: str
    bytes: int
    option: str
    computed: bool = False


@dataclass(frozen=True)
class Needs:
    """What a run takes.

    counts: processes of each role.   serial: whether all of them are one.   checkpoints: kept and being written.
    """

    items: tuple[Item, ...]
    counts: dict[str, int]
    serial: bool
    checkpoint_bytes: int
    checkpoints: int

    def of(self, role: str) -> int:
        """Bytes of one process of a role."""
        return sum(item.bytes for item in self.items if item.role == role) + (0 if self.serial else PROCESS_BYTES)

    @property
    def memory_bytes(self) -> int:
        """Of all processes together."""
        return sum(count * self.of(role) for role, count in self.counts.items()) + self.serial * PROCESS_BYTES

    @property
    def disk_bytes(self) -> int:
        """Of all checkpoints that there are at one time."""
        return self.checkpoints * self.checkpoint_bytes

    def line(self) -> str:
        """For people."""
        return f"{self._memory()}; checkpoints: up to {size(self.disk_bytes)} on disk"

    def _memory(self) -> str:
        parts = [f"{'each ' * (count > 1)}{role} {size(self.of(role))}" for role, count in self.counts.items()]
        return f"memory: about {size(self.memory_bytes)} ({', '.join(parts)}{', in one process' * self.serial})"

    def check_memory(self, available: int) -> None:
        """Raise InputError, naming the largest part and what makes it smaller, if memory will not do."""
        if self.memory_bytes <= available:
            return
        largest = max(self.items, key=lambda item: item.bytes * self.counts[item.role])
        raise InputError(
            f"this run does not fit this machine, which has {size(available)} of memory free. {self._memory()}; the "
            f"largest part is {largest.what} of the {largest.role}, {size(largest.bytes)}: make it smaller with "
            f"{largest.option}"
        )

    def check_disk(self, folder: Path) -> None:
        """Raise InputError if the disk of a folder, which need not be there yet, will not hold the checkpoints."""
        free = shutil.disk_usage(
            next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
        )
        if self.disk_bytes > free.free:
            raise InputError(
                f"the disk of {folder} has {size(free.free)} free, and the {self.checkpoints} checkpoints of this run "
                f"take up to {size(self.checkpoint_bytes)} each: take fewer with --learner.checkpoints-kept, smaller "
                "ones with --learner.window-steps and --reward.window-steps, or another disk with --runs-folder"
            )


def needs(config: Config, spec: EnvironmentSpec) -> Needs:
    """What a checked configuration takes in an environment of this spec.

    Of a run on this machine alone, what lies on a GPU is left out.
    """
    layout = Layout.of(spec, config.parameter_sharing, config.actor.agent_identity)
    reckoning = _Reckoning(config, spec, layout)
    items = [*reckoning.learner(), *reckoning.others()]
    if config.nodes == 1:
        devices = {"learner": config.learner.device, "reward-server": config.reward.device}
        on_gpu = {role for role, device in devices.items() if choose_device(device).type == "cuda"}
        items = [item for item in items if not (item.computed and item.role in on_gpu)]
    counts: dict[str, int] = {}
    for process in processes_of(config):
        counts[process.role] = counts.get(process.role, 0) + 1
    kept = config.learner.checkpoints_kept + 2  # the best one, and the one that is being written
    return Needs(tuple(items), counts, config.mode == "serial", reckoning.checkpoint_bytes, kept)


class _Reckoning:
    """Bytes of one process of each role."""

    def __init__(self, config: Config, spec: EnvironmentSpec, layout: Layout) -> None:
        self._config, self._spec, self._layout = config, spec, layout
        self._kind = algorithm(config.algorithm)
        job = make_job(config, spec, "", Path(), Endpoints("", "", "", ""))
        self._credits = credits_of(job, config.actor) if config.mode == "async" else 0
        self._episodes = episodes_per_chunk(config.actor, job)
        self._chunk = table_bytes(Trajectories.array_table(spec, spec.episode_length, self._episodes))
        self._row = table_bytes(JointRows.array_table(layout, 1))
        self._seen = sum(table_bytes(form.table_of(1)) for form in forms(spec))
        self._policy, self._critic = policy_bytes(layout, config), critic_bytes(layout, config)
        self._imitates = self._kind.imitates
        self._clipped = config.learner.policy == "clipped"
        self._window = config.learner.window_steps or REPLAY_STEPS
        self._replay = 0 if self._clipped or self._kind.clones else table_bytes(Replay.table(layout, self._window))
        self._memory = table_bytes(Memory.state_table(layout, config.reward.window_steps)) if self._imitates else 0
        self._particles = particle_bytes(layout, config) if self._imitates else 0
        self._demonstrated = self._row * _rows(config)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint; action masks, which are packed well, are left out."""
        replay = {} if not self._replay else Replay.table(self._layout, self._window)
        kept = table_bytes({name: entry for name, entry in replay.items() if not name.endswith(".masks")})
        networks = (3 if self._clipped or self._kind.clones else 4) * (self._policy + self._critic)  # Adam has two
        return kept + networks + self._memory + 3 * self._particles

    def learner(self) -> Iterator[Item]:
        """Those of the learner."""
        config, role = self._config, "learner"
        if self._kind.clones:
            yield Item(role, "the demonstrations", self._demonstrated, "--demonstration-episodes", True)
            yield Item(role, "networks and their optimisers", 4 * self._policy, NETWORKS, True)
            yield Item(role, "a checkpoint while it is written", self.checkpoint_bytes, NETWORKS)
            return
        window, iteration = "--learner.window-steps", "--actor.steps-per-iteration"
        copies = 2 + self._credits  # as they came, and side by side or taken in
        yield Item(role, "the episodes of an iteration", copies * config.actors * self._chunk, iteration)
        networks = 4 if self._clipped else 5  # with gradient, two moments, and perhaps a target
        yield Item(role, "networks and their optimisers", networks * (self._policy + self._critic), NETWORKS, True)
        if not self._clipped:
            # Rows and those that follow them; networks expand them a few at a time.
            batch = 2 * (PREFETCHED_BATCHES + 1) * config.learner.batch_size * (self._row + self._seen)
            yield Item(role, "the replay", self._replay, window, True)
            yield Item(role, "batches", batch, "--learner.batch-size", True)
        larger = window if self._replay > self._memory else "--reward.window-steps"
        written = self.checkpoint_bytes + 2 * (self._memory + 3 * self._particles)  # as it came, and copied out of that
        yield Item(role, "a checkpoint while it is written", written, larger)

    def others(self) -> Iterator[Item]:
        """Those of all other roles."""
        config, layout, sent = self._config, self._layout, self._credits or 1
        if self._imitates:
            role, window = "reward-server", "--reward.window-steps"
            yield Item(role, "the window of agents' rows", self._memory, window, True)
            copies = 2 * (self._memory + 3 * self._particles)  # one stays until the learner says that it came
            yield Item(role, "its copies for checkpoints", copies, window)
            held = config.actors * self._episodes * self._spec.episode_length * self._row
            option = "--actor.steps-per-iteration"
            if not self._clipped:
                held, option = self._row * Replay.capacity_of(self._layout, self._window), "--learner.window-steps"
            yield Item(role, "the rows that the learner asks for", held if config.mode != "serial" else 0, option, True)
            yield Item(role, "the demonstrations", self._demonstrated, "--demonstration-episodes", True)
            yield Item(role, "particles and their optimiser", 5 * self._particles, PARTICLES, True)
            batch = 2 * config.reward.batch_size * self._row + discriminated_bytes(layout, config)
            yield Item(role, "batches, expanded", batch, "--reward.batch-size", True)
        if not self._kind.clones:
            smaller = "--actor.steps-per-iteration, or more --actors"
            yield Item("actor", "episodes", (1 + sent) * self._chunk, smaller)
            yield Item("actor", "the policy", 2 * self._policy, NETWORKS)
        episodes = min(config.evaluation.final_episodes, episodes_at_once(self._spec))
        yield Item("evaluator", "what is seen now", 2 * episodes * self._seen, "--evaluation.final-episodes")
        yield Item("evaluator", "the policy", 2 * self._policy, NETWORKS)


def policy_bytes(layout: Layout, config: Config) -> int:
    """Of the parameters of all policies."""
    return sum(
        _networks(
            block.groups,
            (block.observation_dim, *config.actor.hidden, block.action_dim * (1 if block.discrete else 2)),
            block.identity_slots,
        )
        for block in layout.blocks
    )


def critic_bytes(layout: Layout, config: Config) -> int:
    """Of the parameters of all critics; none of a run that clones."""
    kind, hidden = algorithm(config.algorithm), config.learner.hidden
    if kind.clones:
        return 0
    total = 0
    for block in layout.blocks:
        seen = _networks(block.groups, (block.observation_dim, hidden), block.identity_slots)
        inputs = hidden if kind.context == "none" else 2 * hidden
        said = 1 if config.learner.policy == "clipped" else block.action_dim
        others = (block.observation_dim + block.action_dim, hidden)
        total += seen + _networks(block.groups, (inputs, hidden, said))
        total += _networks(block.groups, others) if kind.context == "agents" else 0
    # The attention's query, key and value, [hidden, hidden] each, in float32.
    return total + (0 if kind.context == "none" else 3 * 4 * hidden**2)


def particle_bytes(layout: Layout, config: Config) -> int:
    """Of the parameters of all discriminators."""
    return 4 * sum(math.prod(shape) for each in architectures(layout, config.reward) for shape in each.shapes)


def discriminated_bytes(layout: Layout, config: Config) -> int:
    """Of what discriminators see of a batch and of a query, expanded, of the agents that are computed together."""
    rows, most = 2 * config.reward.batch_size, 0
    for each in architectures(layout, config.reward):
        agents = min(each.block.num_agents, max(each.block.slots, TILE_ACTIVATIONS // (each.activations * rows)))
        most = max(most, 4 * (agents * rows + QUERY_ROWS) * each.inputs)
    return most


def available_memory() -> int:
    """Bytes that this machine, or the part of it that this process may use, has free."""
    return min([psutil.virtual_memory().available, *_limits()])


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 0.95 * 2**30 else f"{count / 2**20:.0f} MiB"


def _networks(networks: int, widths: tuple[int, ...], slots: int = 1) -> int:
    weights = sum((narrow + 1) * wide for narrow, wide in pairwise(widths)) + (slots - 1) * widths[1]
    return 4 * networks * weights


def _rows(config: Config) -> int:
    """Joint steps of the demonstrations that are used."""
    if not config.demonstrations:
        return 0
    episodes, rows = count_rows(resolve(config.demonstrations))
    return math.ceil(rows * min(1.0, (config.demonstration_episodes or episodes) / episodes))


def _limits() -> Iterator[int]:
    """What the control groups of this process, which containers and schedulers make, leave it."""
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        # Version 1 has a tree for each controller, version 2 one tree, whose line names none.
        root, limit, used = (CGROUP / "memory", *VERSION_1) if controllers else (CGROUP, *VERSION_2)
        path = root / name.strip("/")
        # The limit of a group above holds as well.
        for folder in (path, *path.parents):
            if not folder.is_relative_to(root):
                break
            try:
                most = int((folder / limit).read_text(encoding="utf-8"))
            except (OSError, ValueError):  # "max" is none
                continue
            yield max(0, most - _taken(folder, used))


def _taken(folder: Path, used: str) -> int:
    """What a control group uses, but for what caches files and is given up when it is wanted; 0 if nobody knows."""
    try:
        facts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        cached = int(facts.get("inactive_file", 0))
    except (OSError, ValueError):
        cached = 0
    try:
        return int((folder / used).read_text(encoding="utf-8")) - cached
    except (OSError, ValueError):
        return 0
