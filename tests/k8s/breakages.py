"""Ways to break a good workload in one place, each with the rule that must see it."""

import rules

POD = ("spec", "template", "spec")
APP = (*POD, "containers", 0)
SIDECAR = (*POD, "initContainers", 0)
META = ("spec", "template", "metadata")

BREAKAGES = [
    (rules.restricted, (*POD, "hostNetwork"), True),
    (rules.restricted, (*POD, "securityContext", "runAsNonRoot"), False),
    (rules.restricted, (*POD, "securityContext", "seccompProfile"), None),
    (rules.restricted, (*POD, "securityContext", "sysctls"), [{"name": "kernel.msgmax", "value": "1"}]),
    (rules.restricted, (*POD, "volumes", 0), {"name": "data", "hostPath": {"path": "/"}}),
    (rules.restricted, (*APP, "securityContext", "allowPrivilegeEscalation"), None),
    (rules.restricted, (*APP, "securityContext", "capabilities", "drop"), ["NET_RAW"]),
    (rules.restricted, (*APP, "securityContext", "capabilities", "add"), ["NET_ADMIN"]),
    (rules.restricted, (*APP, "securityContext", "privileged"), True),
    (rules.restricted, (*APP, "securityContext", "procMount"), "Unmasked"),
    (rules.restricted, (*APP, "securityContext", "runAsUser"), 0),
    (rules.restricted, (*APP, "ports", 0, "hostPort"), 80),
    (rules.restricted, (*SIDECAR, "securityContext"), None),
    (rules.restricted, (*SIDECAR, "livenessProbe", "httpGet", "host"), "127.0.0.1"),
    (rules.hardened, (*SIDECAR, "securityContext", "readOnlyRootFilesystem"), False),
    (rules.hardened, (*SIDECAR, "securityContext", "runAsUser"), 1000),
    (rules.hardened, (*POD, "automountServiceAccountToken"), True),
    (rules.hardened, (*POD, "enableServiceLinks"), None),
    (rules.hardened, (*POD, "serviceAccountName"), None),
    (rules.resources, (*APP, "resources", "requests", "cpu"), None),
    (rules.resources, (*APP, "resources", "limits", "memory"), None),
    (rules.resources, (*SIDECAR, "resources"), None),
    (rules.probes, (*SIDECAR, "startupProbe"), None),
    (rules.probes, (*SIDECAR, "readinessProbe"), None),
    (rules.probes, (*SIDECAR, "livenessProbe", "httpGet", "port"), "http"),
    (rules.references, (*POD, "volumes", 0, "persistentVolumeClaim", "claimName"), "other"),
    (rules.references, (*POD, "volumes", 1, "secret", "secretName"), "other"),
    (rules.references, (*APP, "volumeMounts", 0, "name"), "other"),
    (rules.references, (*APP, "ports", 0, "name"), "web"),
    (rules.references, (*SIDECAR, "ports"), []),
    (rules.references, (*META, "labels", "app.kubernetes.io/name"), "other"),
    (rules.scraped, (*META, "annotations", "prometheus.io/port"), "1"),
    (rules.scraped, (*META, "annotations", "prometheus.io/scrape"), None),
    (rules.sidecars, (*META, "annotations", "duet.dev/app-port"), None),
    (rules.sidecars, (*META, "labels", "app.kubernetes.io/name"), "other"),
    (rules.sidecars, (*SIDECAR, "restartPolicy"), None),
    (rules.sidecars, (*SIDECAR, "name"), "other"),
    (rules.sidecars, (*APP, "env"), []),
]


def set_at(item, path, value):
    """Sets the field at a path, or removes it with None."""
    *steps, last = path
    for step in steps:
        item = item[step]
    if value is None:
        del item[last]
    else:
        item[last] = value
