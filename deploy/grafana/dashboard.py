"""The dashboard of a run, as code: `python deploy/grafana/dashboard.py > deploy/grafana/bm3il.json`."""

from __future__ import annotations

import json
from typing import Any

RUN = '{run="$run"}'
PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("The run", "none", [
        (f"bm3il_run_info{RUN}", "{{algorithm}} on {{environment}}, seed {{seed}}, bm3il {{version}}"),
    ]),
    ("Processes that are not well", "none", [
        ('bm3il_supervisor_process_state{run="$run", state=~"starved|stuck|dead"}', "{{exported_process}} {{state}}"),
    ]),
    ("Restarts and rewinds", "none", [
        (f"bm3il_supervisor_restarts_total{RUN}", "{{exported_process}} restarted"),
        (f"bm3il_learner_rewinds_total{RUN}", "rewinds since the learner's last start"),
        ('count(ALERTS{run="$run", alertstate="firing"}) or vector(0)', "alerts that fire"),
    ]),
    ("Iterations done", "none", [(f"max(bm3il_learner_policy_version{RUN})", "iterations")]),
    ("True return per agent and episode", "short", [
        (f"bm3il_learner_episode_return{RUN}", "evaluated"),
        (f"avg(bm3il_actor_episode_return{RUN})", "while acting"),
    ]),
    ("Joint steps trained on, per second", "short", [
        # A gauge, which falls when the run goes back to a checkpoint: a rate would take that for a new start from 0.
        (f"clamp_min(deriv(bm3il_learner_env_steps{RUN}[1m]), 0)", "steps/s"),
    ]),
    ("Where the learner's time goes", "percentunit", [
        # Without the waits, which are parts of other stages.
        ('sum by (stage) (rate(bm3il_learner_stage_seconds_sum{run="$run", stage!~"wait_.*"}[1m]))', "{{stage}}"),
    ]),
    ("Policy lag, iterations", "short", [
        (f"histogram_quantile(0.5, sum by (le) (rate(bm3il_learner_policy_lag_bucket{RUN}[1m])))", "median"),
        (f"histogram_quantile(0.99, sum by (le) (rate(bm3il_learner_policy_lag_bucket{RUN}[1m])))", "99 %"),
    ]),
    ("Chunks waiting, and not acknowledged", "short", [
        (f"bm3il_learner_chunks_waiting{RUN}", "waiting at the learner"),
        (f"bm3il_actor_unacknowledged_chunks{RUN}", "{{process}}"),
    ]),
    ("Reward queries: waiting and computing", "s", [
        (f"rate(bm3il_reward_server_queue_seconds_sum{RUN}[1m])"
         f" / rate(bm3il_reward_server_queue_seconds_count{RUN}[1m])", "in the queue"),
        (f"rate(bm3il_reward_server_compute_seconds_sum{RUN}[1m])"
         f" / rate(bm3il_reward_server_compute_seconds_count{RUN}[1m])", "computed"),
    ]),
    ("Discriminators", "percentunit", [
        (f"bm3il_reward_server_accuracy_agent_ratio{RUN}", "agents recognised"),
        (f"bm3il_reward_server_accuracy_expert_ratio{RUN}", "experts recognised"),
    ]),
    ("Particles", "short", [
        (f"bm3il_reward_server_particle_distance{RUN}", "distance"),
        (f"bm3il_reward_server_particle_deviation{RUN}", "deviation of rewards"),
        (f"bm3il_reward_server_entropy_nats{RUN}", "entropy"),
    ]),
    ("Losses and figures", "short", [(f"bm3il_learner_figure{RUN}", "{{name}}")]),
    ("Processes alive", "short", [(f"bm3il_supervisor_processes{RUN}", "node {{node}}")]),
    ("Memory", "bytes", [
        ('{__name__=~"bm3il_.+_resident_memory_bytes", run="$run"}', "{{process}}"),
    ]),
    ("Disk left", "bytes", [(f"bm3il_supervisor_disk_free_bytes{RUN}", "node {{node}}")]),
]  # fmt: skip


def expressions() -> list[str]:
    """Every PromQL expression of the dashboard."""
    return [expression for _, _, queries in PANELS for expression, _ in queries]


def dashboard() -> dict[str, Any]:
    """Grafana's JSON model, two panels in a row."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels = [
        {
            "id": number + 1,
            "type": "timeseries",
            "title": title,
            "datasource": source,
            "gridPos": {"x": 12 * (number % 2), "y": 8 * (number // 2), "w": 12, "h": 8},
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
            "targets": [
                {"refId": chr(ord("A") + n), "datasource": source, "expr": expression, "legendFormat": legend}
                for n, (expression, legend) in enumerate(queries)
            ],
        }
        for number, (title, unit, queries) in enumerate(PANELS)
    ]
    run = {
        "name": "run",
        "type": "query",
        "datasource": source,
        "query": {"query": "label_values(bm3il_learner_env_steps, run)", "refId": "run"},
        "refresh": 2,
    }
    choose = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "title": "bm3il",
        "uid": "bm3il",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [choose, run]},
        "panels": panels,
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
