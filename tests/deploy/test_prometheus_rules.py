"""Alerts and dashboard: Prometheus accepts them, each alert fires for its fault, and what they name is exported."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
NAME = re.compile(r"\bbm3il_[a-z_]+")
SUFFIXES = ("_bucket", "_sum", "_count")
NEVER_HAPPENS = ("bm3il_supervisor_restarts_total", "bm3il_learner_rewinds_total")


def load_dashboard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard", DEPLOY / "grafana" / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def documented() -> set[str]:
    text = (ROOT / "docs" / "metrics.md").read_text()
    names = set(re.findall(r"`(bm3il_\S+?)`", text))
    roles = ("actor", "evaluator", "learner", "reward_server", "supervisor")
    return {name.replace("<role>", role) for name in names for role in roles}


def promtool(*arguments: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_for_its_fault_and_none_in_health() -> None:
    promtool("test", "rules", str(DEPLOY / "prometheus" / "alerts_test.yml"))
    tested = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    healthy = {case["alertname"] for case in tested[0]["alert_rule_test"]}
    firing = {case["alertname"] for test in tested[1:] for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert healthy == firing == {rule["alert"] for rule in alerts()}


def test_the_configuration_is_prometheus_s() -> None:
    promtool("check", "config", str(DEPLOY / "prometheus" / "prometheus.yml"))


def test_what_rules_and_dashboard_name_is_exported() -> None:
    expressions = [*load_dashboard().expressions(), *(rule["expr"] for rule in alerts())]
    for expression in expressions:
        for name in NAME.findall(expression):
            if name in ("bm3il_", "bm3il"):  # the beginning of a pattern
                continue
            base = next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), name)
            assert {name, base} & documented(), f"{name} in {expression}"


def test_the_dashboard_in_the_repository_is_the_one_of_the_code() -> None:
    assert json.loads((DEPLOY / "grafana" / "bm3il.json").read_text()) == load_dashboard().dashboard()


def test_the_runbook_knows_every_alert() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    assert [rule["alert"] for rule in alerts() if f"`{rule['alert']}`" not in text] == []


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[str]:
    """A real one, which scrapes the runs below tmp_path/runs; its address."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yml")]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["file_sd_configs"][0] |= {
        "files": [str(tmp_path / "runs" / ".targets" / "*.json")],
        "refresh_interval": "1s",
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    process = subprocess.Popen([*command, f"--web.listen-address={address}"], stderr=subprocess.DEVNULL)
    yield address
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)


def asked(address: str, expression: str) -> list[Any]:
    url = f"http://{address}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(url, timeout=5) as answer:
        return list(json.load(answer)["data"]["result"])


@pytest.mark.processes
def test_every_expression_of_the_dashboard_finds_something_in_a_run(prometheus: str, tmp_path: Path) -> None:
    options = ["--preset", "rover_tower_4", "--steps", "400000", "--run", "seen", "--evaluation.interval", "2"]
    options += ["--evaluation.starts", "fresh", "--evaluation.episodes", "5", "--mode", "async"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bm3il.launch.cli", "train", *options], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    try:
        missing = [e.replace("$run", "seen").replace("[1m]", "[10s]") for e in load_dashboard().expressions()]
        deadline = time.monotonic() + 60
        while missing and time.monotonic() < deadline:
            time.sleep(1)
            assert process.poll() is None
            try:
                missing = [expression for expression in missing if not asked(prometheus, expression)]
            except OSError:
                continue
        assert not missing
        assert {target["metric"]["role"] for target in asked(prometheus, 'up{run="seen"} == 1')} == {
            *("actor", "learner", "evaluator", "reward-server", "supervisor")
        }
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
