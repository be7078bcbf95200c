"""Health of the discriminators: how well they tell agents from the expert, and how far the particles lie apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from bm3il.reward_server.svgd import Forces, squared_distances


class Health:
    """Sums over the batches of an update; all figures count active rows only and average over particles.

    The sums stay on the device of what is added, and are read by `figures`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._distances: list[torch.Tensor] = []
        self._ratios: list[torch.Tensor] = []

    def add_logits(
        self, logits: torch.Tensor, labels: torch.Tensor, active: torch.Tensor, is_agent: torch.Tensor
    ) -> None:
        """logits [g, L, R], labels [R], active [g, 1, R] (0. or 1.); is_agent: [R] bool, which rows are the agents'."""
        agent = active * is_agent
        right = torch.where(agent > 0, logits > 0, logits < 0).to(logits.dtype)
        surprise, other = functional.softplus(-logits), functional.softplus(logits)
        loss = labels * surprise + (1 - labels) * other
        probability = torch.sigmoid(logits)
        per_row = {
            "agent": agent,
            "expert": active - agent,
            "accuracy_agent": right * agent,
            "accuracy_expert": right * (active - agent),
            "discriminator_loss": loss * active,
            "discriminator_entropy": (probability * surprise + (1 - probability) * other) * active,
            # softplus(−z) is the reward (Eq. 9). Without Bessel's correction, which is NaN for L = 1.
            "particle_deviation": surprise.std(dim=1, keepdim=True, correction=0) * active,
        }
        for name, values in per_row.items():
            total = values.mean(dim=1).sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def add_layers(self, layers: Sequence[torch.Tensor]) -> None:
        """Layers [G, L, …] of one block."""
        squares = sum(squared_distances(layer.detach().flatten(2)) for layer in layers)
        assert isinstance(squares, torch.Tensor)
        self._distances.append(squares.sqrt().flatten(1))

    def add_forces(self, forces: Sequence[Forces]) -> None:
        """What moves some groups, [g, L, …]; of each of the tensors that a particle consists of."""
        attraction, repulsion = (
            torch.stack([part.flatten(1).square().sum(dim=1) for part in parts]).sum(dim=0).sqrt()
            for parts in zip(*((f.attraction, f.repulsion) for f in forces), strict=True)
        )
        self._ratios.append(repulsion / attraction.clamp_min(torch.finfo(attraction.dtype).tiny))

    def figures(self) -> dict[str, float]:
        """Means: `discriminator_loss` (−log-likelihood of a row), `discriminator_entropy` (nats), `accuracy_agent`,
        `accuracy_expert`, `particle_deviation` (standard deviation of the reward over particles), `particle_distance`
        (Euclidean, of the parameters of two particles), `repulsion_ratio` (of the kernel's two forces, ‖Σ_j ∇k‖ /
        ‖Σ_j k ∇ log p‖, mean over groups; 0 where there is no kernel)."""
        # One read for all sums: each would wait for the GPU.
        sums = dict(zip(self._sums, torch.stack([*self._sums.values()]).tolist(), strict=True))
        rows = {"accuracy_agent": sums["agent"], "accuracy_expert": sums["expert"]}
        total = sums["agent"] + sums["expert"]
        means = [name for name in sums if name not in ("agent", "expert")]
        figures = {name: sums[name] / max(1.0, rows.get(name, total)) for name in means}
        distances = torch.cat(self._distances)
        # Of L² distances, without those of the L particles to themselves, which are 0.
        pairs = distances.shape[1] - round(distances.shape[1] ** 0.5)
        figures["particle_distance"] = float(distances.sum(dim=1).mean()) / max(1, pairs)
        figures["repulsion_ratio"] = float(torch.cat(self._ratios).mean()) if self._ratios else 0.0
        return figures
