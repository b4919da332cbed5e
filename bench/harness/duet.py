"""Duet under measurement: a control plane, and the sidecars that a row needs. Everything that the mesh does by
default is on: discovery, budgets, retries, timeouts, metrics, balancing."""

import json
import os
import subprocess
import urllib.request

from .procs import Process, wait_for


def service(name, port, protocol="http", target=None):
    """YAML of a Service."""
    app = {"http": "", "h2": "\n    appProtocol: kubernetes.io/h2c", "grpc": "\n    appProtocol: kubernetes.io/h2c"}
    return f"""apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default}}
spec:
  ports:
  - name: http
    port: {port}
    targetPort: {target or port}{app[protocol]}
---
"""


def endpoints(name, port, addresses=("127.0.0.1",)):
    """YAML of an EndpointSlice of endpoints without a sidecar."""
    listed = "\n".join(f"- addresses: [{address}]" for address in addresses)
    return f"""apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
endpoints:
{listed}
ports:
- {{name: http, port: {port}}}
---
"""


def policy(name):
    """The policy that every peer is given too."""
    return f"""apiVersion: duet.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: {name}, namespace: default}}
spec:
  targetRefs: [{{kind: Service, name: {name}}}]
  timeouts: {{request: 10s}}
  retry: {{attempts: 2}}
---
"""


class Duet:
    """A mesh. `programs`: folder of the binaries; processes that serve calls run on `cpu`. `duet`: another control plane."""

    def __init__(self, programs, folder, cpu, control_cpu, duet=None):
        self.programs, self.folder, self.cpu = programs, folder, cpu
        self.duet = duet or f"{programs}/duet"
        os.makedirs(f"{folder}/config", exist_ok=True)
        self.write("empty", service("nothing", 1))
        ports = f"{folder}/control-plane.json"
        command = [self.duet, "control-plane", "--config", f"{folder}/config", "--state", f"{folder}/state",
                   "--ports-file", ports, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--operator-listen", "127.0.0.1:0"]
        self.control_plane = Process("control plane", command, control_cpu, f"{folder}/control-plane.log")
        self.ports = self._ports(ports)
        wait_for("the control plane", lambda: _ok(self.ports["admin"]))

    @staticmethod
    def _ports(file):
        wait_for(file, lambda: os.path.exists(file) and os.path.getsize(file) > 0)
        return json.load(open(file))

    def write(self, name, yaml):
        """Gives the control plane a file of resources."""
        with open(f"{self.folder}/config/{name}.yaml", "w") as file:
            file.write(yaml)

    def sidecar(self, name, instance=None, app_port=None, protocol="http", workers=1, log="off", more=(), cpu=None, wrap=(),
                page="ready"):
        """Starts a sidecar and waits for a page of it; returns the process and its ports."""
        instance = instance or name
        token = subprocess.run(
            [self.duet, "token", "create", "--namespace", "default", "--service-account", name,
             "--state", f"{self.folder}/state"], check=True, capture_output=True, text=True).stdout.strip()
        ports = f"{self.folder}/{instance}.json"
        command = [f"{self.programs}/duet-proxy", "--service", name, "--instance", instance, "--control-plane",
                   self.ports["grpc"], "--token", token, "--state", f"{self.folder}/sidecars/{instance}",
                   "--ports-file", ports, "--workers", str(workers), "--access-log", log]
        for listener in ("outbound", "inbound", "api", "grpc-api", "admin", "metrics"):
            command += [f"--{listener}-listen", "127.0.0.1:0"]
        if app_port:
            command += ["--app-port", f"http={app_port}/{'h2c' if protocol != 'http' else 'http'}"]
        process = Process(f"sidecar {instance}", [*wrap, *command, *more], cpu if cpu is not None else self.cpu,
                          f"{self.folder}/{instance}.log")
        found = self._ports(ports)
        wait_for(f"sidecar {instance}", lambda: _ok(found["metrics"], page))
        return process, {key: int(str(address).rsplit(":", 1)[-1]) for key, address in found.items()}


def _ok(address, page="ready"):
    try:
        with urllib.request.urlopen(f"http://{address}/{page}", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False


def routes(name, count):
    """HTTPRoutes of `count` prefixes altogether, at most 16 rules each as Gateway API has it."""
    text = ""
    for first in range(0, count, 16):
        rules = "\n".join(
            f"  - matches: [{{path: {{type: PathPrefix, value: /route-{at}}}}}]\n    backendRefs: [{{name: {name}, port: 80}}]"
            for at in range(first, min(first + 16, count)))
        text += f"""apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}-{first:04}, namespace: default}}
spec:
  parentRefs: [{{group: "", kind: Service, name: {name}}}]
  rules:
{rules}
---
"""
    return text
