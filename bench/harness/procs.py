"""Processes: started on a chosen processor, watched, measured, and ended with the benchmark."""

import atexit
import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import time

_running = []


class Failed(Exception):
    """Something that the benchmark needs did not work."""


def free_port():
    """A free TCP port of loopback, below those that Linux gives to connections: one of these could take it first."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(what, condition, seconds=15.0):
    """Asks until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.02)


def accepts(port):
    """Whether somebody listens on the port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


class Process:
    """A program on one processor; its output goes to a file."""

    def __init__(self, name, command, cpu, log, env=None):
        self.name, self.log = name, log
        with open(log, "wb") as output:
            self.popen = subprocess.Popen(
                ["taskset", "-c", str(cpu), *command], stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, **(env or {})})
        _running.append(self)

    def ready(self, port):
        """Waits until the program listens."""
        def check():
            if self.popen.poll() is not None:
                tail = open(self.log, errors="replace").read()[-2000:]
                raise Failed(f"{self.name} ended: {shlex.join(self.popen.args)}\n{tail}")
            return accepts(port)
        wait_for(f"{self.name} on port {port}", check)
        return self

    def pids(self):
        """The program and its children (nginx and HAProxy have workers)."""
        found, seen = [self.popen.pid], 0
        while seen < len(found):
            pid = found[seen]
            seen += 1
            try:
                for task in os.listdir(f"/proc/{pid}/task"):
                    with open(f"/proc/{pid}/task/{task}/children") as children:
                        found.extend(int(child) for child in children.read().split())
            except OSError:
                pass
        return found

    def cpu_seconds(self):
        """Processor time used so far, of all threads that live."""
        total = 0
        for pid in self.pids():
            try:
                for task in os.listdir(f"/proc/{pid}/task"):
                    with open(f"/proc/{pid}/task/{task}/schedstat") as stat:
                        total += int(stat.read().split()[0])
            except OSError:
                pass
        return total / 1e9

    def memory_mib(self):
        """Resident memory."""
        total = 0
        for pid in self.pids():
            try:
                with open(f"/proc/{pid}/status") as status:
                    total += sum(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
            except OSError:
                pass
        return total / 1024

    def stop(self):
        """Ends the program and all that it started."""
        if self in _running:
            _running.remove(self)
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.popen.wait()


def running():
    """What runs now."""
    return set(_running)


def stop_since(before):
    """Ends what was started since."""
    for process in [process for process in _running if process not in before]:
        process.stop()


@atexit.register
def stop_all():
    """Ends whatever still runs."""
    for process in list(_running):
        process.stop()


def interrupted(_signal, _frame):
    """Leaves through `atexit`."""
    raise SystemExit("interrupted")


signal.signal(signal.SIGTERM, interrupted)


def stolen():
    """Ticks of all processors since the start: (stolen by the hypervisor, total)."""
    with open("/proc/stat") as stat:
        ticks = [int(number) for number in stat.readline().split()[1:9]]
    return ticks[7], sum(ticks)
