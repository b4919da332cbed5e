#!/usr/bin/env python3
"""Builds every kustomization under k8s/ with kubectl and checks what comes out.

    target/test-tools/venv/bin/python tests/k8s/validate.py

Prints a line for each check and 'N passed, N failed' at the end; exits 1 if a check failed. Everything that it
needs is made by scripts/test-deps.sh.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import kubernetes_validate
import yaml
from kubernetes_validate.utils import all_versions

import rules
from breakages import BREAKAGES, set_at

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(os.environ.get("DUET_TEST_TOOLS") or Path(sys.prefix) / "bin")
SHOP = ROOT / "examples" / "shop"
MINOR_VERSIONS = 3


class Report:
    """Counts checks and prints one line for each, with its problems below it."""

    def __init__(self):
        self.passed = self.failed = 0

    def check(self, fact, problems):
        problems = list(problems)
        print(f"{'FAIL' if problems else 'ok  '} {fact}")
        for problem in problems:
            print(f"     {problem}")
        self.failed += bool(problems)
        self.passed += not problems


def run(command, **options):
    """Standard output of a command, or its error as an exception with the command in it."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(str(part) for part in command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def tool(name):
    """The test tools' own copy, else the machine's, else None."""
    own = TOOLS / name
    return own if own.is_file() else shutil.which(name)


def build(folder):
    kubectl = tool("kubectl")
    if kubectl is None:
        raise RuntimeError("kubectl is missing; scripts/test-deps.sh installs it")
    return [item for item in yaml.safe_load_all(run([kubectl, "kustomize", ROOT / folder])) if item]


def newest_versions():
    """The newest Kubernetes minor versions that the validator has schemas for."""
    minors = sorted({tuple(map(int, version.split(".")[:2])) for version in all_versions()})
    return [f"{major}.{minor}" for major, minor in minors[-MINOR_VERSIONS:]]


def schema_problems(objects, version):
    for item in objects:
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            place = ".".join(str(step) for step in error.absolute_path)
            yield f"{rules.title(item)}: {place}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError as error:
            yield f"{rules.title(item)}: {error.message}"


def check_objects(report, folder, objects, secrets):
    for version in newest_versions():
        fact = f"{folder}: Kubernetes {version} accepts all {len(objects)} objects"
        report.check(fact, schema_problems(objects, version))
    report.check(f"{folder}: no object is there twice", rules.unique(objects))
    report.check(f"{folder}: pods fit the restricted profile", rules.restricted(objects))
    report.check(f"{folder}: pods are hardened beyond it", rules.hardened(objects))
    report.check(f"{folder}: containers request what they need", rules.resources(objects))
    report.check(f"{folder}: probes are complete and at declared ports", rules.probes(objects))
    report.check(f"{folder}: what is referred to is there", rules.references(objects, secrets))
    report.check(f"{folder}: pods say where their metrics are", rules.scraped(objects))
    report.check(f"{folder}: sidecars are complete and used", rules.sidecars(objects))
    report.check(f"{folder}: images are what the Dockerfile makes, at this version", image_problems(objects))


def image_problems(objects):
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    stages = {
        line.split()[3] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("FROM ")
    }
    for where, _, template in rules.pods(objects):
        for container in rules.containers(template):
            name, _, tag = container["image"].partition(":")
            if name in stages and tag != version:
                yield f"{where}: {container['image']} should be {name}:{version}"
            elif name not in stages and ("/" not in name or tag in ("", "latest")):
                yield f"{where}: {container['image']} is neither ours nor pinned"


def shop_secrets():
    """What scripts/k8s-shop-tokens.sh makes, with a stand-in for the command that asks a control plane."""
    # The arguments that follow are no part of printf's format, so it ignores them.
    script = ROOT / "scripts" / "k8s-shop-tokens.sh"
    output = run([script], env={**os.environ, "DUET": "printf t0ken.x"})
    return [item for item in yaml.safe_load_all(output) if item]


def check_shop(report, objects, secrets):
    mesh = [
        item for file in sorted((SHOP / "mesh").glob("*.yaml")) for item in yaml.safe_load_all(file.read_text())
    ]
    report.check("shop: the ConfigMap has every file of examples/shop/mesh, unchanged", config_problems(objects))
    report.check("shop: the mesh's Services are the cluster's", service_problems(objects, mesh))
    report.check("shop: runs what duet.yaml runs", duet_yaml_problems(objects))
    accounts = {
        f"duet-token-{item['metadata']['name']}" for item in rules.of_kind(objects, "ServiceAccount")
        if item["metadata"]["namespace"] == "shop"
    }
    made = {item["metadata"]["name"] for item in secrets}
    report.check("shop: k8s-shop-tokens.sh makes a token for each service account", sorted(accounts ^ made))
    for version in newest_versions():
        report.check(f"shop: Kubernetes {version} accepts the tokens' Secrets", schema_problems(secrets, version))


def config_problems(objects):
    config = next(i for i in objects if i["kind"] == "ConfigMap" and i["metadata"]["name"] == "duet-config")
    wanted = {"mesh.yaml": (ROOT / "k8s/base/config/mesh.yaml").read_text()}
    wanted |= {f"shop-{file.name}": file.read_text() for file in (SHOP / "mesh").glob("*.yaml")}
    for name in sorted(wanted.keys() | config["data"].keys()):
        if wanted.get(name) != config["data"].get(name):
            yield f"{name} differs (list new files in examples/shop/kustomization.yaml)"


def service_problems(objects, mesh):
    def services(items):
        return {
            (i["metadata"].get("namespace"), i["metadata"]["name"], p.get("name"), p["port"], p.get("targetPort"))
            for i in rules.of_kind(items, "Service") for p in i["spec"]["ports"]
        }

    in_cluster = {service for service in services(objects) if service[0] != "duet-system"}
    yield from (f"only in one of the two: {service}" for service in sorted(in_cluster ^ services(mesh), key=str))


def duet_yaml_problems(objects):
    """Same services, replicas and settings as `duet up`, except for what a cluster does otherwise."""
    local = yaml.safe_load((SHOP / "duet.yaml").read_text())
    workloads = {
        item["metadata"]["name"]: item for item in rules.of_kind(objects, *rules.WORKLOADS)
        if item["metadata"]["namespace"] == local["namespace"]
    }
    for name in sorted(workloads.keys() ^ local["apps"].keys()):
        yield f"{name} is only in one of the two"
    for name in sorted(workloads.keys() & local["apps"].keys()):
        app, item = local["apps"][name], workloads[name]
        container = item["spec"]["template"]["spec"]["containers"][0]
        env = {e["name"]: e.get("value") for e in container["env"]}
        if item["spec"]["replicas"] != app.get("replicas", 1):
            yield f"{name}: {item['spec']['replicas']} replicas, {app.get('replicas', 1)} in duet.yaml"
        arguments = app["command"].split()[1:]
        if container["args"] != arguments:
            yield f"{name}: runs {container['args']}, {arguments} in duet.yaml"
        for key, value in app.get("env", {}).items():
            if key not in env or ("$" not in value and env[key] != value):
                yield f"{name}: {key} is {env.get(key)}, {value} in duet.yaml"


# Labels that Prometheus finds at a pod, and the targets that must come of it (none: not scraped).
PODS = [
    ({"scrape": "true", "port": "15020", "path": "/metrics"}, "127.0.0.9", "http://127.0.0.9:15020/metrics"),
    ({"scrape": "true", "port": "9", "scheme": "https"}, "::1", "https://[::1]:9/metrics"),
    ({"scrape": "true"}, "127.0.0.9", "http://127.0.0.9:8080/metrics"),
    ({"scrape": "false", "port": "15020"}, "127.0.0.9", None),
    ({"port": "15020"}, "127.0.0.9", None),
]


def check_prometheus(report):
    fact = "k8s/monitoring/prometheus.yml: makes the right targets of pods"
    promtool = tool("promtool")
    if promtool:
        report.check(fact, prometheus_problems(promtool))
    elif os.environ.get("CI"):
        report.check(fact, ["promtool is missing; scripts/test-deps.sh installs it"])
    else:
        print(f"skip {fact}: promtool is missing; scripts/test-deps.sh installs it")


def prometheus_problems(promtool):
    """Debian builds promtool without Kubernetes discovery, so pods come from a file instead, with the labels that
    the discovery would give them; everything after that is done by promtool, which scrapes nothing."""
    config = yaml.safe_load((ROOT / "k8s/monitoring/prometheus.yml").read_text())
    config["rule_files"] = [str(ROOT / "k8s/monitoring" / name) for name in config["rule_files"]]
    job = config["scrape_configs"][0]
    if job.pop("kubernetes_sd_configs") != [{"role": "pod"}]:
        yield "kubernetes_sd_configs is not as expected"
    for notes, address, wanted in PODS:
        labels = {f"__meta_kubernetes_pod_annotation_prometheus_io_{key}": value for key, value in notes.items()}
        labels |= {"__meta_kubernetes_pod_ip": address, "__meta_kubernetes_pod_phase": "Running"}
        labels |= {"__meta_kubernetes_namespace": "shop", "__meta_kubernetes_pod_name": "orders-0"}
        labels |= {"__meta_kubernetes_pod_label_app_kubernetes_io_name": "orders"}
        job["static_configs"] = [{"targets": [f"{address}:8080"], "labels": labels}]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "prometheus.yml"
            file.write_text(yaml.safe_dump(config))
            try:
                run([promtool, "check", "config", file])
                found = json.loads(run([promtool, "check", "service-discovery", "--timeout=1s", file, job["job_name"]]))
            except (RuntimeError, ValueError) as error:
                yield str(error)
                return
        kept = [target["labels"] for target in found if target.get("labels")]
        urls = [f"{t['__scheme__']}://{t['__address__']}{t['__metrics_path__']}" for t in kept]
        if urls != [wanted] * (wanted is not None):
            yield f"{notes} at {address} gives {urls}, not {wanted}"
        for target in kept:
            if (target["namespace"], target["pod"], target["app"]) != ("shop", "orders-0", "orders"):
                yield f"{notes}: wrong labels {target}"


def check_rules(report, objects, secrets):
    """A rule that cannot fail proves nothing: each must see the objects broken in one place."""
    index = next(n for n, item in enumerate(objects) if rules.title(item) == "StatefulSet shop/orders")
    missed = [] if rules.unique(objects + objects[:1]) else ["unique does not see an object that is there twice"]
    for rule, path, value in BREAKAGES:
        broken = copy.deepcopy(objects)
        set_at(broken[index], path, value)
        if not (rule(broken, secrets) if rule is rules.references else rule(broken)):
            missed.append(f"{rule.__name__} does not see {'.'.join(map(str, path))} = {value}")
    report.check(f"rules: each of {len(BREAKAGES) + 1} breakages is seen", missed)
    for version in newest_versions():
        misspelt = copy.deepcopy(objects[index])
        misspelt["spec"]["replica"] = 3
        seen = list(schema_problems([misspelt], version))
        report.check(f"rules: Kubernetes {version} refuses an unknown field", [] if seen else ["it does not"])


def main():
    report = Report()
    try:
        secrets = shop_secrets()
        names = {(item["metadata"]["namespace"], item["metadata"]["name"]) for item in secrets}
        built = {folder: build(folder) for folder in ("k8s/base", "k8s/overlays/shop", "k8s/monitoring")}
    except (RuntimeError, OSError, yaml.YAMLError) as error:
        report.check("k8s: every kustomization builds", [str(error)])
    else:
        report.check("k8s: every kustomization builds", [f"{folder} is empty" for folder in built if not built[folder]])
        for folder, objects in built.items():
            check_objects(report, folder, objects, names)
        check_shop(report, built["k8s/overlays/shop"], secrets)
        check_rules(report, built["k8s/overlays/shop"], names)
    check_prometheus(report)
    print(f"{report.passed} passed, {report.failed} failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
