"""Runs rows: starts everybody, warms up, loads them in turn for several rounds, and keeps what was measured."""

import os
import subprocess
import threading
import time

from . import certs, load, peers, procs
from .duet import Duet

LATENCY_RATE = 1000
BUSY_CONNECTIONS = 1000


class Bench:
    """Where and how the benchmark runs."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.cpu, self.load_cpu = options.cpu, options.load_cpu
        self.peers, self.duets = options.peers, options.duet
        certificates = certs.make(f"{folder}/certs")
        for name in ("peers", "backend"):
            os.makedirs(f"{folder}/{name}", exist_ok=True)
        self.place = peers.Place(f"{folder}/peers", self.cpu, certificates, options.envoy)
        backend = peers.Place(f"{folder}/backend", self.load_cpu, certificates, None)
        self.backend, self.http1, self.http2 = peers.backend(backend)
        self.meshes = 0

    def mesh(self, name):
        """A new mesh of the build `name`: folder of its binaries."""
        self.meshes += 1
        return Duet(self.duets[name], f"{self.folder}/mesh-{self.meshes}", self.cpu, self.load_cpu)

    def app(self):
        """Starts the application of bench/src; returns its port."""
        port = procs.free_port()
        process = procs.Process("bench-peer", [self.options.peer, "serve", f"127.0.0.1:{port}"], self.load_cpu,
                                f"{self.folder}/bench-peer.log")
        process.ready(port)
        return port

    def row(self, row):
        """Measures one row: for each side, its samples by kind of measurement."""
        before = procs.running()
        try:
            sides = list(row.start(self))
            idle = {side.name: _memory(side) for side in sides}
            measured = {side.name: {"cost": [], "latency": [], "memory": []} for side in sides}
            for side in sides:
                row.drive(self, side, 1)
            for _ in range(self.options.rounds):
                for side in sides:
                    measured[side.name]["cost"].append(self.cost(row, side))
            for _ in range(self.options.rounds if row.latency and self.options.oha else 0):
                for side in sides:
                    measured[side.name]["latency"].append(load.oha(
                        self.options.oha, side.port, "echo.default", self.options.seconds, self.load_cpu, LATENCY_RATE))
            for side in sides if row.memory else []:
                if side.processes:
                    busy = self.busy(side)
                    measured[side.name]["memory"].append({"idle_mib": idle[side.name], "busy_mib": busy})
            return measured
        finally:
            procs.stop_since(before)

    def cost(self, row, side):
        """One side in one round."""
        stolen, ticks = procs.stolen()
        cpu = sum(process.cpu_seconds() for process in side.processes)
        result = row.drive(self, side, self.options.seconds)
        cpu = sum(process.cpu_seconds() for process in side.processes) - cpu
        now_stolen, now_ticks = procs.stolen()
        result["requests"] *= row.per
        result["rate"] *= row.per
        result["cpu_us"] = cpu * 1e6 / max(1, result["requests"])
        result["memory_mib"] = _memory(side)
        result["steal"] = (now_stolen - stolen) / max(1, now_ticks - ticks)
        return result

    def busy(self, side):
        """Memory with many connections that always wait for an answer: the median of looks during the run."""
        url = f"http://127.0.0.1:{side.port}/"
        done = threading.Thread(target=load.wrk, args=(url, 4, self.load_cpu, BUSY_CONNECTIONS, ["Host: echo.default"]))
        done.start()
        time.sleep(1)
        looks = []
        while done.is_alive():
            looks.append(_memory(side))
            time.sleep(0.1)
        done.join()
        return sorted(looks)[len(looks) // 2]


def _memory(side):
    return sum(process.memory_mib() for process in side.processes)


def commit(repository):
    """What is measured."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=repository, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
