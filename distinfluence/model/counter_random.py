"""Random numbers and hashes that are a function of a sample's content and a seed, wherever it is evaluated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distinfluence.model.batch import Batch, leaves

_GOLDEN = -0x61C8864680B583EB  # 2⁶⁴ / φ, as SplitMix64 counts, in two's complement
_MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
PIECE_BYTES = 2**18  # of numbers that are mixed at once, near the cache


@dataclass(frozen=True)
class Uniform:
    """Numbers in [0, 1) for each sample. keys: [n] int64; seed, number: which of all the streams of a sample."""

    keys: Tensor
    seed: int
    number: int = 0

    def __call__(self, count: int) -> Tensor:
        """[n, count] float64."""
        stream = mixed(torch.tensor(self.seed % 2**32 * 0x10001 + self.number + 1, device=self.keys.device) * _GOLDEN)
        counter = torch.arange(1, count + 1, device=self.keys.device) * _GOLDEN
        bits = mixed(mixed(self.keys + stream).unsqueeze(1) + counter)
        return _shifted(bits, 11).double() * 2.0**-53


def sample_keys(batch: Batch) -> Tensor:
    """Hash each sample's content to 64 bits, [n] int64, on the batch's device: multilinear in its mixed numbers.

    The hash is the same for numbers that are widened to float64. They are mixed because numbers such as 1.0 and 2.0
    differ in few bits, and a sum of multiples of these would often be the same for other samples.
    """
    total: Tensor | None = None
    for number, (_, tensor) in enumerate(leaves(batch)):
        at_once = max(1, PIECE_BYTES // (8 * max(1, tensor[0].numel())))
        own = torch.cat([_key(piece, number) for piece in tensor.split(at_once)])
        total = own if total is None else mixed(total) + own
    assert total is not None
    return mixed(total)


def _key(tensor: Tensor, number: int) -> Tensor:
    words = _words(tensor)
    steps = torch.arange(1, words.shape[1] + 1, device=words.device) + (number << 32)
    multipliers = mixed(steps * _GOLDEN) | 1
    bits = (words ^ multipliers).mul_(multipliers)
    return bits.bitwise_xor_(bits >> 32).mul_(multipliers).sum(dim=1)


def _words(tensor: Tensor) -> Tensor:
    """Return the bits of each sample as [n, words] int64."""
    flat = tensor.detach().reshape(tensor.shape[0], -1).contiguous()
    if flat.dtype.is_floating_point or flat.dtype.is_complex:
        flat = flat.double() if not flat.dtype.is_complex else torch.view_as_real(flat).flatten(1).double()
        return flat.view(torch.int64)
    return flat.long()


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift logically to the right; torch's shift is arithmetic."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def mixed(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014)."""
    for shift, multiplier in _MIX:
        bits = (bits ^ _shifted(bits, shift)) * multiplier
    return bits ^ _shifted(bits, 31)
