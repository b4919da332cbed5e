"""What manifests must be, as functions from Kubernetes objects to lists of problems (empty: none).

No files, no commands: `validate.py` brings the objects, and shows by breaking them that each rule can fail.
"""

WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job")
NOBODY = 65534
# Pod Security Standards, profile `restricted`.
RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


def title(item):
    meta = item["metadata"]
    namespace = f"{meta['namespace']}/" if "namespace" in meta else ""
    return f"{item['kind']} {namespace}{meta['name']}"


def of_kind(objects, *kinds):
    return [item for item in objects if item["kind"] in kinds]


def pods(objects):
    """(title, namespace, pod template) of everything that makes pods."""
    return [
        (title(item), item["metadata"].get("namespace", "default"), item["spec"]["template"])
        for item in of_kind(objects, *WORKLOADS)
    ]


def containers(template):
    spec = template["spec"]
    return spec.get("initContainers", []) + spec.get("containers", [])


def is_long_lived(template, container):
    """All but init containers that run once."""
    return container in template["spec"]["containers"] or container.get("restartPolicy") == "Always"


def effective(template, container, field):
    """A field of the security context; the container's wins over the pod's."""
    own = container.get("securityContext", {})
    return own[field] if field in own else template["spec"].get("securityContext", {}).get(field)


def unique(objects):
    seen, problems = set(), []
    for item in objects:
        key = (item["apiVersion"], title(item))
        if key in seen:
            problems.append(f"{title(item)} is there twice")
        seen.add(key)
    return problems


def restricted(objects):
    """The `restricted` profile, rule by rule as its documentation lists them."""
    problems = []
    for where, _, template in pods(objects):
        spec = template["spec"]
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(field):
                problems.append(f"{where}: {field} is on")
        pod_context = spec.get("securityContext", {})
        for field in ("sysctls", "seLinuxOptions", "windowsOptions", "appArmorProfile"):
            if pod_context.get(field):
                problems.append(f"{where}: securityContext.{field} is set")
        for volume in spec.get("volumes", []):
            kinds = set(volume) - {"name"}
            if not kinds <= RESTRICTED_VOLUMES:
                problems.append(f"{where}: volume {volume['name']} is of type {', '.join(sorted(kinds))}")
        for container in containers(template):
            problems += [f"{where}, {container['name']}: {text}" for text in restricted_container(template, container)]
    return problems


def restricted_container(template, container):
    context = container.get("securityContext", {})
    capabilities = context.get("capabilities", {})
    checks = [
        (not context.get("privileged"), "is privileged"),
        (context.get("allowPrivilegeEscalation") is False, "allowPrivilegeEscalation is not false"),
        ("ALL" in capabilities.get("drop", []), "does not drop all capabilities"),
        (set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"}, "adds capabilities"),
        (effective(template, container, "runAsNonRoot") is True, "runAsNonRoot is not true"),
        (effective(template, container, "runAsUser") != 0, "runs as root"),
        (
            (effective(template, container, "seccompProfile") or {}).get("type") in ("RuntimeDefault", "Localhost"),
            "has no seccomp profile",
        ),
        (context.get("procMount", "Default") == "Default", "procMount is set"),
        (not any(port.get("hostPort") for port in container.get("ports", [])), "has a hostPort"),
    ]
    handlers = [container.get(name, {}) for name in PROBES] + list(container.get("lifecycle", {}).values())
    hosts = [h.get(kind, {}).get("host") for h in handlers for kind in ("httpGet", "tcpSocket")]
    checks.append((not any(hosts), "a probe or hook names a host"))
    return [text for good, text in checks if not good]


def hardened(objects):
    """Stricter than `restricted`: nobody's user id, nothing writable but volumes, no token that nobody asked for."""
    problems = []
    accounts = {}
    for item in of_kind(objects, "ServiceAccount"):
        accounts[(item["metadata"].get("namespace"), item["metadata"]["name"])] = item
        if item.get("automountServiceAccountToken") is not False:
            problems.append(f"{title(item)}: automountServiceAccountToken is not false")
    bound = {
        (subject.get("namespace"), subject["name"])
        for binding in of_kind(objects, "ClusterRoleBinding", "RoleBinding")
        for subject in binding["subjects"]
    }
    for where, namespace, template in pods(objects):
        spec = template["spec"]
        account = (namespace, spec.get("serviceAccountName"))
        if account not in accounts:
            problems.append(f"{where}: has no service account of its own")
        if spec.get("automountServiceAccountToken") is not (account in bound):
            problems.append(f"{where}: automountServiceAccountToken must be {str(account in bound).lower()}")
        if spec.get("enableServiceLinks") is not False:
            problems.append(f"{where}: enableServiceLinks is not false")
        for container in containers(template):
            for field in ("runAsUser", "runAsGroup"):
                if effective(template, container, field) != NOBODY:
                    problems.append(f"{where}, {container['name']}: {field} is not {NOBODY}")
            if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
                problems.append(f"{where}, {container['name']}: readOnlyRootFilesystem is not true")
    for item in of_kind(objects, "Namespace"):
        labels = item["metadata"].get("labels", {})
        for mode in ("enforce", "audit", "warn"):
            if labels.get(f"pod-security.kubernetes.io/{mode}") != "restricted":
                problems.append(f"{title(item)}: pod-security.kubernetes.io/{mode} is not restricted")
    return problems


def resources(objects):
    """CPU and memory are requested, memory is limited."""
    problems = []
    for where, _, template in pods(objects):
        for container in containers(template):
            given = container.get("resources", {})
            for kind, name in (("requests", "cpu"), ("requests", "memory"), ("limits", "memory")):
                if name not in given.get(kind, {}):
                    problems.append(f"{where}, {container['name']}: no {kind}.{name}")
    return problems


def probes(objects):
    """Probes are at declared ports; each pod says when it is ready and is restarted when it hangs; an
    application waits until its sidecar has started."""
    problems = []
    for where, _, template in pods(objects):
        lasting = [c for c in containers(template) if is_long_lived(template, c)]
        for name in ("livenessProbe", "readinessProbe"):
            if not any(name in container for container in lasting):
                problems.append(f"{where}: no container has a {name}")
        for container in containers(template):
            here = f"{where}, {container['name']}"
            declared = {p.get("name") for p in container.get("ports", [])}
            declared |= {p["containerPort"] for p in container.get("ports", [])}
            for name in PROBES:
                probe = container.get(name, {})
                for handler in ("httpGet", "tcpSocket", "grpc"):
                    port = probe.get(handler, {}).get("port")
                    if port is not None and port not in declared:
                        problems.append(f"{here}: {name} asks port {port}, which is not declared")
            if container.get("restartPolicy") == "Always" and "startupProbe" not in container:
                problems.append(f"{here}: is a sidecar without a startupProbe")
    return problems


def references(objects, given_secrets=()):
    """What a pod mounts and uses is there, and what a Service or NetworkPolicy selects too. `given_secrets` are
    (namespace, name) of Secrets that come from elsewhere."""
    known = {(i["kind"], i["metadata"].get("namespace"), i["metadata"]["name"]) for i in objects}
    known |= {("Secret", *secret) for secret in given_secrets}
    problems = []
    for item in of_kind(objects, *WORKLOADS):
        namespace, spec = item["metadata"].get("namespace"), item["spec"]["template"]["spec"]
        wanted = [
            (kind, volume[field].get(key))
            for volume in spec.get("volumes", [])
            for field, kind, key in (
                ("configMap", "ConfigMap", "name"),
                ("secret", "Secret", "secretName"),
                ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
            )
            if field in volume
        ]
        for kind, name in wanted:
            if (kind, namespace, name) not in known:
                problems.append(f"{title(item)}: there is no {kind} {namespace}/{name}")
        volumes = [v["name"] for v in spec.get("volumes", [])]
        volumes += [claim["metadata"]["name"] for claim in item["spec"].get("volumeClaimTemplates", [])]
        mounts = {m["name"] for c in containers(item["spec"]["template"]) for m in c.get("volumeMounts", [])}
        for name in sorted(mounts ^ set(volumes)):
            problems.append(f"{title(item)}: volume {name} is only {'mounted' if name in mounts else 'declared'}")
    for item in of_kind(objects, "Service", "NetworkPolicy"):
        problems += selects(objects, item)
    return problems


def selects(objects, item):
    spec = item["spec"]
    selector = spec["selector"] if item["kind"] == "Service" else spec["podSelector"].get("matchLabels", {})
    chosen = [
        template for _, namespace, template in pods(objects)
        if namespace == item["metadata"].get("namespace")
        and selector.items() <= template["metadata"]["labels"].items()
    ]
    if not chosen:
        return [f"{title(item)} selects no pod"]
    if item["kind"] == "Service":
        asked = [port.get("targetPort", port["port"]) for port in spec["ports"]]
    else:
        asked = [port["port"] for rule in spec.get("ingress", []) for port in rule.get("ports", [])]
    problems = []
    for template in chosen:
        ports = [port for c in containers(template) for port in c.get("ports", [])]
        known = {p.get("name") for p in ports} | {p["containerPort"] for p in ports}
        problems += [f"{title(item)}: a pod it selects has no port {port}" for port in asked if port not in known]
    return problems


def scraped(objects):
    """Pods say where their metrics are, at a port that they have. Prometheus itself is left out."""
    problems = []
    for where, _, template in pods(objects):
        if template["metadata"].get("labels", {}).get("app.kubernetes.io/name") == "prometheus":
            continue
        notes = template["metadata"].get("annotations", {})
        ports = {str(p["containerPort"]) for c in containers(template) for p in c.get("ports", [])}
        if notes.get("prometheus.io/scrape") != "true" or notes.get("prometheus.io/path") != "/metrics":
            problems.append(f"{where}: is not annotated for Prometheus")
        elif notes.get("prometheus.io/port") not in ports:
            problems.append(f"{where}: prometheus.io/port is no port of the pod")
    return problems


def sidecars(objects):
    """Every workload labelled duet.dev/sidecar=enabled has exactly one, complete, and its application uses it."""
    problems = []
    for item in of_kind(objects, *WORKLOADS):
        if item["metadata"].get("labels", {}).get("duet.dev/sidecar") != "enabled":
            continue
        where, template = title(item), item["spec"]["template"]
        found = [c for c in template["spec"].get("initContainers", []) if c["name"] == "duet-proxy"]
        if len(found) != 1 or found[0].get("restartPolicy") != "Always":
            problems.append(f"{where}: has no native sidecar duet-proxy")
            continue
        if "duet.dev/app-port" not in template["metadata"].get("annotations", {}):
            problems.append(f"{where}: duet.dev/app-port is missing")
        name = template["metadata"]["labels"].get("app.kubernetes.io/name")
        if not name or name != template["spec"].get("serviceAccountName"):
            problems.append(f"{where}: service {name} and service account differ")
        for container in template["spec"]["containers"]:
            env = {e["name"]: e.get("value") for e in container.get("env", [])}
            for proxy in ("HTTP_PROXY", "http_proxy"):
                if env.get(proxy) != "http://127.0.0.1:15001":
                    problems.append(f"{where}, {container['name']}: {proxy} is not the sidecar")
    return problems
