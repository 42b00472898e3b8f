"""Files of quantised tensors: codes in as few bits as they need, scales, levels; safetensors that give every value back bit for bit.

For a tensor ``NAME`` a file holds ``NAME.codes`` (bytes: codes of equal length packed one after the other, or Huffman-coded where that is shorter),
``NAME.offset`` and ``NAME.width`` (float32, one for each bucket), ``NAME.levels`` (float32) unless they are uniform, and ``NAME.lengths`` (a byte for
each level) if Huffman-coded. Tensors that are not quantised are there under their own names. The header says shapes and buckets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from limbeck.blocks.huffman import Huffman
from limbeck.blocks.quantizers import QuantisedTensor
from limbeck.blocks.storage import Stored
from limbeck.core.errors import RunError
from limbeck.core.files import atomic_path

HEADER = "limbeck.quantised"
PARTS = ("codes", "offset", "width", "levels", "lengths")


def code_bits(levels: int) -> int:
    """Bits of a code of equal length."""
    return max(1, (levels - 1).bit_length())


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes below 2^bits one after the other, most significant bit first, in whole bytes."""
    places = np.arange(bits - 1, -1, -1, dtype=np.uint8)
    return np.packbits((codes[:, None] >> places) & 1)


def unpack_codes(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """The first ``count`` codes of :func:`pack_codes`.

    Raises:
        RunError: there are fewer.
    """
    if len(data) * 8 < count * bits:
        raise RunError("a packed tensor is damaged: it ends too early")
    flat = np.unpackbits(data, count=count * bits).reshape(count, bits)
    return (flat << np.arange(bits - 1, -1, -1, dtype=np.uint8)).sum(1).astype(np.uint8)


def best_coding(tensor: QuantisedTensor) -> tuple[Huffman | None, int]:
    """The Huffman code where it is shorter with its table, and the bits of codes and table in whole bytes."""
    symbols = tensor.codes.cpu().numpy()
    levels = len(tensor.levels)
    plain = -(-len(symbols) * code_bits(levels) // 8) * 8
    counts = np.bincount(symbols, minlength=levels)
    huffman = Huffman.from_counts(counts)
    coded = -(-huffman.bits(counts) // 8) * 8 + 8 * levels
    return (huffman, coded) if coded < plain else (None, plain)


def stored(tensor: QuantisedTensor) -> Stored:
    """What a tensor takes in the file: codes, code table, 64 bits for each bucket, 32 for each level that is not uniform."""
    huffman, bits = best_coding(tensor)
    extra = 64 * len(tensor.offset) + (0 if tensor.uniform else 32 * len(tensor.levels))
    return Stored(len(tensor.codes), bits + extra, "quantised" if huffman is None else "huffman")


def save_packed(
    path: Path,
    quantised: Mapping[str, QuantisedTensor],
    plain: Mapping[str, Tensor],
    tied: Mapping[str, str] | None = None,
) -> None:
    """Write a network.

    Args:
        path: a ``.safetensors`` file.
        quantised: tensors by name.
        plain: all others.
        tied: further names of quantised tensors, by name.
    """
    out: dict[str, Tensor] = {name: t.detach().cpu().contiguous().clone() for name, t in plain.items()}
    about: dict[str, Any] = {}
    for name, tensor in quantised.items():
        symbols = tensor.codes.cpu().numpy()
        huffman, _ = best_coding(tensor)
        levels = len(tensor.levels)
        data = pack_codes(symbols, code_bits(levels)) if huffman is None else huffman.encode(symbols)
        out[f"{name}.codes"] = torch.from_numpy(data)
        out[f"{name}.offset"], out[f"{name}.width"] = tensor.offset.cpu().contiguous(), tensor.width.cpu().contiguous()
        if not tensor.uniform:
            out[f"{name}.levels"] = tensor.levels.cpu().contiguous()
        if huffman is not None:
            out[f"{name}.lengths"] = torch.from_numpy(huffman.lengths)
        about[name] = {
            "shape": list(tensor.shape),
            "bucket": tensor.bucket,
            "levels": levels,
            "uniform": tensor.uniform,
            "huffman": huffman is not None,
        }
    with atomic_path(path) as temporary:
        save_file(out, temporary, metadata={HEADER: json.dumps({"tensors": about, "tied": dict(tied or {})})})


def load_packed(path: Path) -> tuple[dict[str, QuantisedTensor], dict[str, Tensor], dict[str, str]]:
    """The quantised tensors of a file, the others, and further names of the quantised ones.

    Raises:
        RunError: no such file, damaged, or another kind of file.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        quantised = {name: _read(tensors, name, entry) for name, entry in about["tensors"].items()}
    except (FileNotFoundError, SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise RunError(
            f"{path} holds no quantised network, or is damaged ({' '.join(str(error).split())[:120]})"
        ) from None
    own = {f"{name}.{part}" for name in quantised for part in PARTS}
    return quantised, {name: t for name, t in tensors.items() if name not in own}, about["tied"]


def load_state(path: Path) -> dict[str, Tensor]:
    """A state dict for the plain network, with the quantised values."""
    quantised, plain, tied = load_packed(path)
    restored = {name: tensor.restored() for name, tensor in quantised.items()}
    return {**plain, **restored, **{name: restored[first].clone() for name, first in tied.items()}}


def _read(tensors: Mapping[str, Tensor], name: str, entry: Mapping[str, Any]) -> QuantisedTensor:
    count, levels = int(np.prod(entry["shape"], dtype=np.int64)), int(entry["levels"])
    data = tensors[f"{name}.codes"].numpy()
    if entry["huffman"]:
        codes = Huffman(tensors[f"{name}.lengths"].numpy()).decode(data, count)
    else:
        codes = unpack_codes(data, code_bits(levels), count)
    if count and int(codes.max()) >= levels:
        raise ValueError(f"'{name}' has a code of a level that is not there")
    table = torch.arange(levels, dtype=torch.float32) / (levels - 1) if entry["uniform"] else tensors[f"{name}.levels"]
    return QuantisedTensor(
        torch.from_numpy(codes),
        tensors[f"{name}.offset"],
        tensors[f"{name}.width"],
        table,
        bool(entry["uniform"]),
        tuple(entry["shape"]),
        entry["bucket"],
    )
