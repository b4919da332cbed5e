"""Writes down what was measured: JSON with every sample, a Markdown table, an SVG plot."""

import html
import json
import os
import platform
import statistics

_COLOURS = {"haproxy": "#4a7ebb", "nginx": "#59a14f", "envoy": "#b07aa1", "linkerd": "#9c755f"}
_DUET = "#e15759"


def _middle(samples, key):
    return statistics.median(sample[key] for sample in samples) if samples else None


def machine():
    """Where it ran."""
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "unknown")
    with open("/proc/meminfo") as info:
        memory = int(info.readline().split()[1]) / 2**20
    return {"cpu": model, "processors": os.cpu_count(), "memory_gib": round(memory), "kernel": platform.release()}


def duet_of(measured):
    """The side that is Duet: the last one."""
    return list(measured)[-1]


def cost(measured, side):
    """Median CPU microseconds for each unit."""
    return _middle(measured[side]["cost"], "cpu_us") if side in measured else None


def ratio(measured, other, key="cpu_us"):
    """Duet against a peer."""
    ours, theirs = cost(measured, duet_of(measured)), cost(measured, other)
    return ours / theirs if ours and theirs else None


def table(row, measured):
    """One row's Markdown."""
    lines = [f"### {row.title}", "",
             f"| | {row.unit if row.unit == 'MiB' else row.unit + 's'}/s | CPU us/{row.unit} | min-max | Duet against it | MiB | failed | steal |",
             "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for side, samples in measured.items():
        costs = [sample["cpu_us"] for sample in samples["cost"]]
        against = ratio(measured, side) if side != duet_of(measured) else None
        lines.append(
            f"| {side} | {_middle(samples['cost'], 'rate'):,.0f} | "
            + (f"{statistics.median(costs):.1f} | {min(costs):.1f}-{max(costs):.1f} | " if max(costs) else "- | - | ")
            + (f"{against:.2f} | " if against else "| ")
            + f"{_middle(samples['cost'], 'memory_mib'):.1f} | {sum(sample['failed'] for sample in samples['cost'])} | "
            + f"{_middle(samples['cost'], 'steal'):.1%} |")
    if any(samples["latency"] for samples in measured.values()):
        lines += ["", "At 1,000 requests/s, open loop (median of the rounds, us):", "",
                  "| | p50 | p50 added | p99 | p99.9 |", "|---|--:|--:|--:|--:|"]
        for side, samples in measured.items():
            p50, p99, p999 = (_middle(samples["latency"], key) * 1e6 for key in ("p50", "p99", "p99.9"))
            lines.append(f"| {side} | {p50:.0f} | {added(measured, side) or 0:.0f} | {p99:.0f} | {p999:.0f} |")
    if any(samples["memory"] for samples in measured.values()):
        lines += ["", "Memory, MiB:", "", "| | idle | 1,000 busy connections |", "|---|--:|--:|"]
        for side, samples in measured.items():
            if samples["memory"]:
                look = samples["memory"][0]
                lines.append(f"| {side} | {look['idle_mib']:.1f} | {look['busy_mib']:.1f} |")
    return "\n".join(lines) + "\n"


def added(measured, side):
    """Microseconds of median latency that a side adds to none."""
    if "direct" not in measured or not measured[side]["latency"]:
        return None
    pairs = zip(measured[side]["latency"], measured["direct"]["latency"])
    return statistics.median(one["p50"] - direct["p50"] for one, direct in pairs) * 1e6


def reach(results):
    """The figures that Duet is held to: name, measured, must, goal."""
    figures = []

    def figure(name, row, value, must, goal):
        if row in results and (found := value(results[row])) is not None:
            figures.append((name, found, must, goal))
    for row, name, must in (("http1", "HTTP/1.1 one hop, CPU against HAProxy", 1.3),
                            ("http2", "HTTP/2 one hop, CPU against HAProxy", 1.6),
                            ("grpc", "gRPC one hop, CPU against HAProxy", 1.6),
                            ("mtls", "two hops mTLS, CPU against HAProxy", 1.6)):
        figure(name, row, lambda measured: ratio(measured, "haproxy"), must, 1.0)
    figure("two hops mTLS, CPU against Envoy", "mtls", lambda measured: ratio(measured, "envoy"), 0.3, 0.17)

    def latency(measured):
        ours, theirs = added(measured, duet_of(measured)), "haproxy" in measured and added(measured, "haproxy")
        return ours / theirs if ours and theirs else None
    figure("two hops mTLS, p50 added at 1,000/s, against HAProxy", "mtls", latency, 1.2, 1.0)

    def memory(key):
        return lambda measured: (measured[duet_of(measured)]["memory"] or [{key: None}])[0][key]
    figure("memory idle, MiB", "http1", memory("idle_mib"), 12, 8)
    figure("memory with 1,000 busy connections, MiB", "http1", memory("busy_mib"), 45, 27)

    def workers(measured):
        one, two = list(measured)[-2:]
        return cost(measured, two) / cost(measured, one)
    figure("2 workers, CPU against 1 at the same load", "workers", workers, 1.1, 1.05)
    return figures


def summary(results):
    """The figures as Markdown."""
    lines = ["| figure | measured | must | goal | |", "|---|--:|--:|--:|---|"]
    for name, found, must, goal in reach(results):
        verdict = "goal reached" if found <= goal else "must reached" if found <= must else "MISSED"
        lines.append(f"| {name} | {found:.2f} | {must} | {goal} | {verdict} |")
    return "\n".join(lines) + "\n"


def plot(rows, results):
    """CPU per unit, relative to HAProxy (or the first peer), as bars; one group a row."""
    groups = []
    for row in rows:
        measured = results.get(row.name)
        bars = [(side, cost(measured, side)) for side in measured or {} if side != "direct"] if measured else []
        if len(bars) > 1 and row.name != "workers":
            groups.append((row, bars))
    bar, gap, left, width = 15, 22, 330, 860
    height = sum(len(bars) * bar + gap for _, bars in groups) + 60
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
           '<text x="12" y="22" font-size="15" font-weight="bold">CPU time of the proxies, relative to the first bar '
           '(less is better)</text>']
    y = 44
    for row, bars in groups:
        out.append(f'<text x="12" y="{y + 11}">{html.escape(row.title)}</text>')
        largest = max(value for _, value in bars)
        for side, value in bars:
            colour = _COLOURS.get(side, _DUET)
            length = max(1, (width - left - 190) * value / largest)
            share = value / bars[0][1]
            out.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 2}" fill="{colour}"/>')
            out.append(f'<text x="{left + length + 6:.1f}" y="{y + 11}">{html.escape(side)} {value:.1f} us ({share:.2f})</text>')
            y += bar
        y += gap
    return "\n".join([*out, "</svg>"]) + "\n"


def save(folder, rows, results, facts):
    """Writes results.json, results.md and cpu.svg."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/results.json", "w") as file:
        json.dump({"facts": facts, "rows": results}, file, indent=1)
    with open(f"{folder}/results.md", "w") as file:
        file.write(summary(results) + "\n" + "\n".join(table(row, results[row.name]) for row in rows if row.name in results))
    with open(f"{folder}/cpu.svg", "w") as file:
        file.write(plot(rows, results))
