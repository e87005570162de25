"""The Helm chart as tests see it: rendered by Helm's own library, and read back as Kubernetes would.

There is no stand-in for Helm: where its library cannot be installed, whatever wants a rendering fails and says so.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.unit.documents import ROOT

try:
    import helm_python as helm
except (ImportError, OSError) as error:  # the second: a library for another machine
    raise RuntimeError(
        "Helm's library (helm-python-sdk) is not to be had on this machine, so that nothing can say whether the chart "
        "renders; use Linux on x86_64 or aarch64, and `make setup`"
    ) from error

__all__ = [
    "CASES",
    "CHART",
    "Document",
    "Release",
    "Values",
    "containers",
    "helm",
    "merged",
    "render",
    "rendered",
    "values_of",
]

CHART = ROOT / "helm" / "controlplane"
CASES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
ROLLED = ("Deployment", "Job", "Pod")

Document = dict[str, Any]
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Release:
    """What one rendering gave: the objects, and what Helm says at the end."""

    documents: list[Document]
    notes: str

    def of_kind(self, *kinds: str) -> list[Document]:
        return [one for one in self.documents if one["kind"] in kinds]

    def one(self, kind: str, name: str) -> Document:
        """By the end of its name, which may be followed by a Job's hash."""
        found = [one for one in self.of_kind(kind) if name in one["metadata"]["name"]]
        assert len(found) == 1, f"{kind} {name}: {[one['metadata']['name'] for one in found]}"
        return found[0]

    def pods(self) -> Iterator[tuple[str, Document]]:
        """The name and the template of everything that makes pods."""
        for one in self.of_kind(*ROLLED):
            yield one["metadata"]["name"], one if one["kind"] == "Pod" else one["spec"]["template"]


def values_of(case: str) -> Values:
    text = (CHART / "ci" / f"{case}-values.yaml").read_text(encoding="utf-8")
    values: Values = yaml.safe_load(text) or {}
    return values


def render(values: Values, *, name: str = "controlplane", namespace: str = "llm", chart: Path = CHART) -> Release:
    """Raises helm.HelmError where Helm would refuse: values against the schema, and templates that say no."""
    with helm.Chart.load(chart) as loaded:
        loaded.validate_schema(dict(values))
        texts = loaded.render(dict(values), name=name, namespace=namespace)
    notes = next(text for path, text in texts.items() if path.endswith("NOTES.txt"))
    manifests = [text for path, text in sorted(texts.items()) if path.endswith(".yaml")]
    documents = [one for text in manifests for one in yaml.safe_load_all(text) if one]
    return Release(documents, notes)


@functools.cache
def rendered(case: str) -> Release:
    return render(values_of(case))


def containers(pod: Document) -> list[Document]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def merged(values: Values, **changes: Any) -> dict[str, Any]:
    """Nested: `merged(v, proxy={"replicas": 3})` leaves the rest of `proxy`."""
    after = dict(values)
    for key, change in changes.items():
        before = after.get(key)
        after[key] = merged(before, **change) if isinstance(before, dict) and isinstance(change, dict) else change
    return after
