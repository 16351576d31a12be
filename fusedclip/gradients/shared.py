"""Gradients that lie in one another's memory, where that matters: when they are to get different coefficients."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _extension
from .collect import Gradients
from .layouts import Flat, memory_of


class _Span(NamedTuple):
    device: torch.device
    begin: int  # address
    end: int
    place: int
    tensor: Tensor  # the gradient's own memory
    memory: Hashable  # equal for gradients in the same memory that are read in the same way
    in_table: bool  # what is read is that memory


def shares_memory(grads: Gradients) -> bool:
    """Whether any two entries of the list share a gradient or part of its memory."""
    if sum(place >= 0 for place in grads.sources) > len(grads):
        return True
    return _extents_overlap(grads) and any(_clash(c, list(range(len(c)))) is not None for c in _clusters(grads))


def refuse_shared(grads: Gradients, label: Callable[[int], Hashable] | None = None) -> None:
    """Raise ValueError if two gradients with different labels share memory: it cannot be scaled by both coefficients.

    `label` of a place; without it each gradient has one of its own, but for those in exactly the same memory, whose
    norms and coefficients are the same.
    """
    if not _extents_overlap(grads):
        return
    for cluster in _clusters(grads):
        labels = [span.memory if label is None else label(span.place) for span in cluster]
        if len(set(labels)) == 1:
            continue
        clash = _clash(cluster, labels)
        if clash is not None:
            one, other = (grads.name(span.place) for span in clash)
            raise ValueError(
                f"{one} and {other} share memory and are to be scaled by different coefficients; .clone() one of them, "
                "or clip them together"
            )


def _extents_overlap(grads: Gradients) -> bool:
    """A quick answer, which is no for nearly every list."""
    if _extension.C is None:
        return next(_clusters(grads), None) is not None
    odd = [span for place, flat in grads.flats.items() if (span := _span(place, flat.read, flat)) is not None]
    return any(
        batch.table.overlaps([(s.begin, s.end - s.begin) for s in odd if s.device == batch.device and not s.in_table])
        for batch in grads.reads
    )


def _clusters(grads: Gradients) -> Iterator[list[_Span]]:
    """Gradients whose extents in memory overlap, with all that overlap any of them."""
    spans = sorted(_spans(grads), key=lambda span: (str(span.device), span.begin))
    cluster: list[_Span] = []
    end = 0
    for span in spans:
        if cluster and (span.device != cluster[0].device or span.begin >= end):
            if len(cluster) > 1:
                yield cluster
            cluster = []
        end = max(end, span.end) if cluster else span.end
        cluster.append(span)
    if len(cluster) > 1:
        yield cluster


def _spans(grads: Gradients) -> Iterator[_Span]:
    spans = (_span(place, tensor, grads.flats.get(place)) for place, tensor in enumerate(grads.tensors()))
    return (span for span in spans if span is not None)


def _span(place: int, tensor: Tensor, flat: Flat | None) -> _Span | None:
    """None for what has no memory that could be shared."""
    memory: Hashable = (memory_of(tensor), True)
    in_table = flat is None or (flat.read is flat.write and flat.home is None)
    if flat is not None:
        tensor, memory = flat.write if flat.home is None else flat.home, (flat.memory, flat.read is flat.write)
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return None  # a sparse gradient that is not coalesced gets new memory when it is written
    extent = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    begin = tensor.data_ptr()
    return _Span(tensor.device, begin, begin + extent * tensor.element_size(), place, tensor, memory, in_table)


def _clash(cluster: list[_Span], labels: Sequence[Hashable]) -> tuple[_Span, _Span] | None:
    """Two with different labels and an element in common. Strided ones may pass between each other: the owner of each
    element is noted on a map of the cluster's memory."""
    begin = min(span.begin for span in cluster)
    unit = min(span.tensor.element_size() for span in cluster)  # all others are multiples
    if any((span.begin - begin) % unit for span in cluster):
        unit = 1
    owners = torch.full(((max(span.end for span in cluster) - begin) // unit,), -1, dtype=torch.int32, device="cpu")
    for i, span in enumerate(cluster):
        units = span.tensor.element_size() // unit
        shape, strides = (*span.tensor.shape, units), (*(units * stride for stride in span.tensor.stride()), 1)
        own = owners.as_strided(shape, strides, (span.begin - begin) // unit)
        if own.max() >= 0:
            for j in torch.unique(own).tolist():
                if j >= 0 and labels[j] != labels[i]:
                    return cluster[j], span
        own.fill_(i)
    return None
