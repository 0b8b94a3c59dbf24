"""Fewer rows for an image, chosen without training, after the encoder and before the cache."""

import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from common.config import TokenReduction
from common.embedding import VisionEmbedding

# N: rows of one run, that is of an image or of one of its tiles; K: rows that are kept; D: hidden size.


def reduce_tokens(embedding: VisionEmbedding, reduction: TokenReduction, runs: list[int]) -> VisionEmbedding:
    """Keeps a share of each run of rows. Rows that stay keep their bits, their order and, by index, their place.

    Its time is a part of what the embedding has cost.
    """
    started = time.thread_time()
    kept = []
    start = 0
    for length in runs:
        features_ND = embedding.features[start : start + length]
        kept.append(start + _CHOICES[reduction.method](features_ND, reduction.num_kept(length)))
        start += length
    elapsed_ms = (time.thread_time() - started) * 1000
    return replace(embedding.rows(torch.cat(kept)), encode_ms=embedding.encode_ms + elapsed_ms)


def random_rows(features_ND: Tensor, num_kept: int) -> Tensor:
    """The same ones for all images of a size."""
    return torch.randperm(len(features_ND), generator=torch.Generator().manual_seed(0))[:num_kept].sort().values


def diverse_rows(features_ND: Tensor, num_kept: int) -> Tensor:
    """DivPrune (Alvar et al., 2025, arXiv 2503.02175): greedily the row that is farthest, in cosine distance, from all
    rows chosen so far, beginning with the one whose nearest neighbour is farthest."""
    normed_ND = torch.nn.functional.normalize(features_ND.float(), dim=1)
    # The many small steps are numpy's, whose calls take less than the numbers.
    distances_NN = (1 - normed_ND @ normed_ND.T).fill_diagonal_(torch.inf).cpu().numpy()
    chosen = [int(distances_NN.min(0).argmax())]
    nearest_N = distances_NN[chosen[0]].copy()
    while len(chosen) < num_kept:
        nearest_N[chosen[-1]] = -np.inf
        chosen.append(int(nearest_N.argmax()))
        np.minimum(nearest_N, distances_NN[chosen[-1]], out=nearest_N)
    return torch.tensor(sorted(chosen))


_CHOICES = {"random": random_rows, "divprune": diverse_rows}
