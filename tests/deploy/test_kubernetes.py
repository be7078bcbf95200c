"""The example is YAML whose parts fit each other, and starts what bm3il understands."""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml

from bm3il.launch.config import parse_config
from bm3il.launch.topology import processes_of

FILE = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "job.yaml"


def test_the_job_uses_what_it_claims() -> None:
    job, claim = yaml.safe_load_all(FILE.read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_its_command_is_one_of_ours() -> None:
    job, _ = yaml.safe_load_all(FILE.read_text())
    (script,) = job["spec"]["template"]["spec"]["containers"][0]["args"]
    words = shlex.split(script.splitlines()[-1])
    assert words[:3] == ["exec", "bm3il", "train"]
    config = parse_config(words[3:])
    assert (config.mode, config.runs_folder, config.run) == ("async", "/runs", "night")
    assert f"{config.runs_folder}/{config.run}/config.yaml" in script


def test_every_process_of_its_command_has_a_port_for_metrics() -> None:
    job, _ = yaml.safe_load_all(FILE.read_text())
    template = job["spec"]["template"]
    (container,) = template["spec"]["containers"]
    config = parse_config(shlex.split(container["args"][0].splitlines()[-1])[3:])
    assert config.metrics_address == "0.0.0.0"
    names = ["supervisor-0", *(process.name for process in processes_of(config))]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {name: config.metrics_port + number for number, name in enumerate(names)}
    assert template["metadata"]["annotations"]["prometheus.io/scrape"] == "true"
