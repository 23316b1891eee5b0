"""Metric families with closed label sets, over prometheus-client.

A family knows every value that each of its labels may take. A value that it does not know is counted as `other`, so
that no caller, and no client behind a caller, can make series without bound. The series of known values exist from the
start (a counter that appears with its first error shows no increase to `rate()`).

The organisation is the one label that no table can list. Families that have it drop it unless the operator asked for
it, and then keep at most `MAX_ORGS` values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

OTHER: Final = "other"
ORG: Final = "org"
MAX_ORGS: Final = 2_000
"""A scrape costs about 12 microseconds per series; 2,000 organisations times a dozen families is what one bears."""
MAX_PRECREATED: Final = 400
"""Series that one family may make at the start; beyond it a declaration must name the combinations that matter."""

Wrapped = TypeVar("Wrapped", Counter, Gauge, Histogram)


@dataclass(frozen=True, slots=True)
class Declaration:
    """What one family is: the row of the generated documentation."""

    name: str
    kind: str
    doc: str
    labels: Mapping[str, tuple[str, ...]]
    org: bool = False
    """Whether the family has the organisation as a label when the operator asked for it."""
    buckets: tuple[float, ...] = ()
    precreate: Mapping[str, tuple[str, ...]] | None = None
    """Label values of the series that exist from the start; None: all known ones."""

    def series(self) -> frozenset[str]:
        """The names under which samples of this family appear in the Prometheus text format."""
        if self.kind == "histogram":
            return frozenset(self.name + end for end in ("_bucket", "_sum", "_count"))
        return frozenset({self.name})


class Family(Generic[Wrapped]):
    """The children of one declared metric, by label values."""

    __slots__ = ("_children", "_known", "_names", "_orgs", "_with_org", "_wrapped", "declaration")

    def __init__(self, declaration: Declaration, wrapped: Wrapped, *, with_org: bool) -> None:
        self.declaration = declaration
        self._wrapped: Wrapped = wrapped
        self._with_org = with_org
        self._names = (*declaration.labels, ORG) if with_org else tuple(declaration.labels)
        self._known = {name: frozenset(values) for name, values in declaration.labels.items()}
        self._orgs: set[str] = set()
        self._children: dict[tuple[object, ...], Wrapped] = {}
        self._precreate()

    def _precreate(self) -> None:
        if self._with_org or not self._names:
            return  # one row of series per organisation exists once the organisation does
        wanted = self.declaration.precreate
        values = self.declaration.labels if wanted is None else wanted
        for combination in itertools.product(*(values.get(name, ()) for name in self._names)):
            self._wrapped.labels(*combination)

    def learn(self, label: str, values: Iterable[str]) -> None:
        """These values are known from now on. Raises ValueError for a label that the family does not have."""
        if label not in self._known:
            raise ValueError(f"{self.declaration.name} has no label {label}")
        self._known[label] |= frozenset(values)

    def child(self, labels: Mapping[str, str], org: str | None = None) -> Wrapped:
        """The child for these label values; a value that is not known becomes `other`.

        `org` is ignored by a family that has no such label. Raises ValueError when a label is missing or does not
        belong to the family: that is a fault of the caller.
        """
        key = (org if self._with_org else None, *labels.items())
        found = self._children.get(key)
        return found if found is not None else self._find(labels, org, key)

    def _find(self, labels: Mapping[str, str], org: str | None, key: tuple[object, ...]) -> Wrapped:
        if labels.keys() != self._known.keys():
            raise ValueError(f"{self.declaration.name} takes the labels {sorted(self._known)}, not {sorted(labels)}")
        values = [labels[name] if labels[name] in known else OTHER for name, known in self._known.items()]
        as_given = all(labels[name] == value for name, value in zip(self._known, values, strict=True))
        if self._with_org:
            values.append(self._admit(org or OTHER))
            as_given = as_given and values[-1] == org
        child: Wrapped = self._wrapped.labels(*values) if values else self._wrapped
        if as_given:  # so that the memory for keys is bounded like the series are
            self._children[key] = child
        return child

    def _admit(self, org: str) -> str:
        if org not in self._orgs:
            if len(self._orgs) >= MAX_ORGS:
                return OTHER
            self._orgs.add(org)
        return org


class CounterFamily(Family[Counter]):
    """Only grows."""

    __slots__ = ()

    def inc(self, amount: float = 1, *, org: str | None = None, **labels: str) -> None:
        """Add `amount` (at least 0)."""
        self.child(labels, org).inc(amount)


class GaugeFamily(Family[Gauge]):
    """A present value."""

    __slots__ = ()

    def set(self, value: float, *, org: str | None = None, **labels: str) -> None:
        """The value is now this."""
        self.child(labels, org).set(value)

    def inc(self, amount: float = 1, *, org: str | None = None, **labels: str) -> None:
        """Add `amount`; negative values subtract."""
        self.child(labels, org).inc(amount)

    def clear(self) -> None:
        """Set every series to 0: what is not set again does not exist any more."""
        for child in self._children.values():
            child.set(0)

    def replace(self, label: str, values: Mapping[str, float]) -> None:
        """For a family with one label: set every known value, those that `values` does not name to 0."""
        sums = dict.fromkeys(self.declaration.labels[label], 0.0)
        for name, value in values.items():
            known = name if name in sums else OTHER
            sums[known] = sums.get(known, 0.0) + value
        for name, value in sums.items():
            self.child({label: name}).set(value)


class HistogramFamily(Family[Histogram]):
    """A distribution."""

    __slots__ = ()

    def observe(self, value: float, *, trace_id: str | None = None, **labels: str) -> None:
        """Count one value; `trace_id` becomes the exemplar that OpenMetrics shows beside the bucket."""
        self.child(labels).observe(value, {"trace_id": trace_id} if trace_id else None)


class Declarations:
    """Makes families on one registry and remembers what was declared, in order."""

    def __init__(self, registry: CollectorRegistry, *, org_label: bool) -> None:
        self._registry = registry
        self._org_label = org_label
        self._made: list[Declaration] = []

    @property
    def made(self) -> tuple[Declaration, ...]:
        """Every declaration so far."""
        return tuple(self._made)

    def counter(
        self,
        name: str,
        doc: str,
        *,
        org: bool = False,
        precreate: Mapping[str, tuple[str, ...]] | None = None,
        **labels: Sequence[str],
    ) -> CounterFamily:
        """Declare a counter; its name ends in `_total`."""
        one = self._declare("counter", name, doc, labels, org=org, precreate=precreate)
        return CounterFamily(
            one, Counter(name, doc, self._names(one), registry=self._registry), with_org=self._org(one)
        )

    def gauge(
        self,
        name: str,
        doc: str,
        *,
        precreate: Mapping[str, tuple[str, ...]] | None = None,
        **labels: Sequence[str],
    ) -> GaugeFamily:
        """Declare a gauge."""
        one = self._declare("gauge", name, doc, labels, precreate=precreate)
        return GaugeFamily(one, Gauge(name, doc, self._names(one), registry=self._registry), with_org=self._org(one))

    def histogram(
        self,
        name: str,
        doc: str,
        buckets: tuple[float, ...],
        *,
        precreate: Mapping[str, tuple[str, ...]] | None = None,
        **labels: Sequence[str],
    ) -> HistogramFamily:
        """Declare a histogram; it never has the organisation as a label (a dozen series each would be too many)."""
        one = self._declare("histogram", name, doc, labels, buckets=buckets, precreate=precreate)
        wrapped = Histogram(name, doc, self._names(one), registry=self._registry, buckets=buckets)
        return HistogramFamily(one, wrapped, with_org=False)

    def _declare(
        self,
        kind: str,
        name: str,
        doc: str,
        labels: Mapping[str, Sequence[str]],
        *,
        org: bool = False,
        buckets: tuple[float, ...] = (),
        precreate: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Declaration:
        closed = {label: tuple(dict.fromkeys(values)) for label, values in labels.items()}
        one = Declaration(name, kind, doc, closed, org, buckets, precreate)
        first = closed if precreate is None else precreate
        count = 1
        for label in closed:
            count *= len(first.get(label, ()))
        if count > MAX_PRECREATED:
            raise ValueError(f"{name} would make {count} series at the start; name the ones that matter (precreate)")
        self._made.append(one)
        return one

    def _org(self, one: Declaration) -> bool:
        return one.org and self._org_label

    def _names(self, one: Declaration) -> tuple[str, ...]:
        return (*one.labels, ORG) if self._org(one) else tuple(one.labels)
