"""Bytes and FLOPs that the ops cannot do without, and the time that a device needs for them at least.

A floor reads every input once and writes every output once, skips masked leads, and keeps nothing in between: what a
forward stores for its backward is a choice, and so is what a backward computes again. A multiplication and an addition
are two FLOPs; only those of matrix products count, since the rate that they are held against is that of such a product.
``plain`` counts are those of the same op as library calls: they dequantise all leads into a tensor of its own, multiply
masked leads too, and write what a product gives before anything else can be done with it.

An int16 signal has no gradient, so the backward is that of the weights, and of activations where blocks are stacked.
"""

from __future__ import annotations

from dataclasses import dataclass

_COUNT = 2  # bytes of an int16 sample
_FLOAT = 4  # of a gain or an offset


@dataclass(frozen=True)
class Cost:
    """Bytes from and to the device's memory, and FLOPs."""

    read: int = 0
    written: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.read + other.read, self.written + other.written, self.flops + other.flops)

    @property
    def moved(self) -> int:
        return self.read + self.written

    def floor_s(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The larger of the two: memory and arithmetic may work at the same time."""
        return max(self.moved / bytes_per_s, self.flops / flops_per_s)


@dataclass(frozen=True)
class PatchEmbedSize:
    """A call of ``lead_masked_patch_embed`` with a bias, on int16 counts."""

    rows: int
    kept: int  # leads of each row that are not masked
    patch: int  # samples
    width: int
    leads: int = 12
    samples: int = 2500
    item: int = 2  # bytes of a weight or of a number in a token

    @property
    def patches(self) -> int:
        return self.samples // self.patch

    @property
    def token_bytes(self) -> int:
        return self.rows * self.patches * self.width * self.item

    @property
    def weight_bytes(self) -> int:
        return (self.leads * self.patch + 1) * self.width * self.item

    def signal_bytes(self, leads: int) -> int:
        """Of the samples that fill a patch, with the gain and offset of every lead."""
        return self.rows * (leads * self.patches * self.patch * _COUNT + 2 * self.leads * _FLOAT)

    @property
    def value_bytes(self) -> int:
        """Of all leads, dequantised."""
        return self.rows * self.leads * self.patches * self.patch * self.item

    def flops(self, leads: int) -> int:
        return 2 * self.rows * self.patches * self.width * leads * self.patch


def patch_embed_forward(size: PatchEmbedSize) -> Cost:
    """Kept leads and weights are read, tokens are written."""
    return Cost(size.signal_bytes(size.kept) + size.weight_bytes, size.token_bytes, size.flops(size.kept))


def patch_embed_backward(size: PatchEmbedSize) -> Cost:
    """Kept leads and the tokens' gradient are read, the gradients of weight and bias are written."""
    return Cost(size.signal_bytes(size.kept) + size.token_bytes, size.weight_bytes, size.flops(size.kept))


def plain_patch_embed_forward(size: PatchEmbedSize) -> Cost:
    """All leads are read, written as values in the layout of patches, and read again by the product."""
    read = size.signal_bytes(size.leads) + size.value_bytes + size.weight_bytes
    return Cost(read, size.value_bytes + size.token_bytes, size.flops(size.leads))


def plain_patch_embed_backward(size: PatchEmbedSize) -> Cost:
    """The values that the forward kept and the tokens' gradient are read."""
    return Cost(size.value_bytes + size.token_bytes, size.weight_bytes, size.flops(size.leads))


@dataclass(frozen=True)
class ConvStemSize:
    """A call of ``lead_masked_conv_stem`` without biases, on int16 counts."""

    rows: int
    kept: int  # leads of each row that are not masked
    channels: int
    leads: int = 12
    samples: int = 2500
    blocks: int = 4
    item: int = 2  # bytes of a weight or of a feature

    def places(self, block: int) -> int:
        """Outputs of a block over time."""
        return self.samples >> block + 1

    def activation_bytes(self, block: int) -> int:
        return self.rows * self.places(block) * self.channels * self.item

    @property
    def weight_bytes(self) -> int:
        """With the norm's weight and bias."""
        inputs = 2 * self.leads + (self.blocks - 1) * 2 * self.channels
        return (inputs + 2) * self.channels * self.item

    def signal_bytes(self, leads: int) -> int:
        return self.rows * (leads * 2 * self.places(0) * _COUNT + 2 * self.leads * _FLOAT)

    @property
    def value_bytes(self) -> int:
        """Of all leads, dequantised."""
        return self.rows * self.leads * 2 * self.places(0) * self.item

    def flops(self, block: int, leads: int) -> int:
        """Of a block's product."""
        inputs = 2 * leads if block == 0 else 2 * self.channels
        return 2 * self.rows * self.places(block) * inputs * self.channels


def conv_stem_forward(size: ConvStemSize) -> Cost:
    """Kept leads and weights are read, the features of the last block are written."""
    flops = sum(size.flops(block, size.kept) for block in range(size.blocks))
    return Cost(size.signal_bytes(size.kept) + size.weight_bytes, size.activation_bytes(size.blocks - 1), flops)


def conv_stem_backward(size: ConvStemSize) -> Cost:
    """Kept leads, weights and the features' gradient are read, the weights' gradients are written.

    Two products for every block but the first, whose input needs no gradient.
    """
    flops = 2 * sum(size.flops(block, size.kept) for block in range(size.blocks)) - size.flops(0, size.kept)
    read = size.signal_bytes(size.kept) + size.weight_bytes + size.activation_bytes(size.blocks - 1)
    return Cost(read, size.weight_bytes, flops)


def plain_conv_stem_forward(size: ConvStemSize) -> Cost:
    """Values are written and read; a product is written, read by GELU, written again; the norm reads it once more."""
    cost = Cost(size.signal_bytes(size.leads) + size.weight_bytes, size.value_bytes)
    before = size.value_bytes
    for block in range(size.blocks):
        here = size.activation_bytes(block)
        statistics = here if block == 0 else 0
        cost += Cost(before + here + statistics, 2 * here, size.flops(block, size.leads))
        before = here
    return cost


def plain_conv_stem_backward(size: ConvStemSize) -> Cost:
    """Of each block: through GELU, then two products; the norm takes one more pass over both of its tensors."""
    cost = Cost(size.weight_bytes, size.weight_bytes)
    for block in range(size.blocks):
        here, flops = size.activation_bytes(block), size.flops(block, size.leads)
        cost += Cost(2 * here, here)  # through GELU
        if block == 0:
            cost += Cost(2 * here) + Cost(here + size.value_bytes, 0, flops)
        else:
            before = size.activation_bytes(block - 1)
            cost += Cost(here + before, 0, flops) + Cost(here, before, flops)
    return cost
