"""Clips by what they look like: clusters of embeddings, near copies within them, and a balance between groups."""

import math
from collections.abc import Hashable, Sequence

import numpy as np

SIMILAR = 0.99
"""Cosine of two standardised embeddings from which on their clips are near copies."""
ROUNDS = 20
"""Of k-means."""
SAMPLE = 8192
"""Clips by which centres are found; of more, each goes to the nearest of these."""
BLOCK = 2048
"""Clips compared with each other at once, so that memory stays bounded in a large cluster."""


def standardised(embeddings: np.ndarray) -> np.ndarray:
    """Centre and scale (N, D) embeddings over all clips, then to length 1, so that products are cosines; float32."""
    values = np.asarray(embeddings, np.float64)
    if not len(values):
        return values.astype(np.float32)
    values = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-9)
    return (values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def cluster(vectors: np.ndarray, count: int = 0, seed: int = 0) -> np.ndarray:
    """Say to which cluster each of (N, D) vectors belongs, by k-means.

    Args:
        vectors: from `standardised`.
        count: of clusters; 0 is the square root of N.
        seed: of the sample and the first centres.

    Returns:
        (N,) int64.
    """
    from scipy.cluster.vq import kmeans2, vq  # slow to import, and not needed for episodes

    count = min(count or math.isqrt(len(vectors)), len(vectors), SAMPLE)
    if count < 2:
        return np.zeros(len(vectors), np.int64)
    rng = np.random.default_rng(seed)
    sample = vectors
    if len(vectors) > SAMPLE:  # centres are found with all distances between them and the clips, many times over
        sample = vectors[np.sort(rng.choice(len(vectors), SAMPLE, replace=False))]
    centres, labels = kmeans2(sample.astype(np.float64), count, iter=ROUNDS, minit="++", missing="warn", rng=rng)
    if len(vectors) > SAMPLE:
        blocks = np.array_split(vectors, math.ceil(len(vectors) / SAMPLE))
        labels = np.concatenate([vq(block.astype(np.float64), centres)[0] for block in blocks])
    return labels.astype(np.int64)


def near_copies(
    vectors: np.ndarray, clusters: np.ndarray, preference: Sequence[float], limit: float = SIMILAR
) -> dict[int, tuple[int, float]]:
    """Say which clips look like which others of their cluster.

    Args:
        vectors: (N, D), from `standardised`.
        clusters: (N,) of `cluster`.
        preference: N; of near copies the one with the highest is kept, of equals the first.
        limit: cosine from which on two are near copies; above 1 finds none.

    Returns:
        Copy -> the clip that is kept instead of it, and their cosine.
    """
    copies: dict[int, tuple[int, float]] = {}
    ranks = np.lexsort((np.arange(len(vectors)), -np.asarray(preference, float)))
    for members in _groups(clusters[ranks], ranks):
        kept: list[int] = []
        for block in np.array_split(members, math.ceil(len(members) / BLOCK)):
            earlier = len(kept)
            known = vectors[block] @ vectors[kept].T if earlier else np.zeros((len(block), 0))
            inside = vectors[block] @ vectors[block].T
            for row, k in enumerate(block):
                own = np.isin(block, kept[earlier:])
                cosines = np.concatenate([known[row], np.where(own, inside[row], -np.inf)])
                nearest = int(cosines.argmax()) if len(kept) else 0
                if kept and cosines[nearest] >= limit:
                    other = kept[nearest] if nearest < earlier else int(block[nearest - earlier])
                    copies[int(k)] = other, float(cosines[nearest])
                else:
                    kept.append(int(k))
    return copies


def surplus(groups: Sequence[Hashable], most: int) -> dict[int, int]:
    """Say which items of groups with more than `most` go, so that those that stay are spread evenly over each group.

    Returns:
        Item -> how many there are in its group.
    """
    members: dict[Hashable, list[int]] = {}
    for k, group in enumerate(groups):
        members.setdefault(group, []).append(k)
    gone: dict[int, int] = {}
    for group in members.values():
        if len(group) > most:
            stay = {group[i] for i in np.linspace(0, len(group) - 1, most).round().astype(int)}
            gone |= {k: len(group) for k in group if k not in stay}
    return gone


def _groups(labels: np.ndarray, items: np.ndarray) -> list[np.ndarray]:
    """`items` by their labels, each group in the order in which they come."""
    order = np.argsort(labels, kind="stable")
    return np.split(items[order], np.flatnonzero(np.diff(labels[order])) + 1) if len(items) else []
