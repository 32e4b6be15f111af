"""Weight formats: how the weights of the base's linears lie in memory, and what multiplies by them.

This table is all that the rest knows of quantisation. To add a scheme:

1. Write its linear, a PackedLinear (cpu/packed_linear.py) that packs a weight, multiplies by it, and says how
   many bytes it takes. cpu/int8/ is an example. One for a GPU also overrides `__call__` and `join`.
2. Add its line here: name, linear, where it runs, and which weights it rounds to which.
3. Add its name to `quantize` of server/settings.py.

What follows from the name alone: `--quantize NAME`, the packing of all linears at load, the exactness check
against the rounded weights, which copies of base weights an upload may hold, and the model's fingerprint.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from server.kernels.cpu.float32_linear import Float32Linear
from server.kernels.cpu.int8.quantization import is_dequantised
from server.kernels.cpu.int8.vnni_linear import FASTEST_INT8
from server.kernels.cpu.openmp import AVAILABLE
from server.kernels.cpu.packed_linear import PackedLinear


@dataclass(frozen=True)
class WeightFormat:
    """One weight format. Where it does not run, linears keep their weights plain, in the model's dtype."""

    name: str
    linear: type[PackedLinear]
    # For a quantisation: whether the first [out, in], as `linear.weight()` restores it, may be the second one
    # rounded; the second may itself have been rounded to bfloat16. None: weights stay as they are.
    rounded_from: Callable[[torch.Tensor, torch.Tensor], bool] | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32  # of activations
    available: bool = AVAILABLE
    needs: str = "a CPU, float32, and numba with torch's own libgomp"  # `runs_on` in words, for a user

    @property
    def rounds(self) -> bool:
        """Whether this is a quantisation."""
        return self.rounded_from is not None

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the linear runs on such a device, with activations of this dtype."""
        return self.available and device.type == self.device and dtype == self.dtype

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear | None:
        """The linear of a weight [out, in] and a bias [out]; None if this weight stays plain."""
        return self.linear.of(weight, bias) if self.runs_on(weight.device, weight.dtype) else None

    def is_copy(self, weight: torch.Tensor, copy: torch.Tensor) -> bool:
        """Whether a base that has the weight [out, in] was loaded from `copy`, or from what became it.

        Either side may have been rounded: the copy when it was saved, the base when it was loaded.
        """
        if torch.equal(copy, weight.to(copy.dtype)) or torch.equal(copy.to(weight.dtype), weight):
            return True
        return self.rounded_from is not None and self.rounded_from(weight, copy)


FLOAT32 = WeightFormat("float32", Float32Linear)
INT8 = WeightFormat("int8", FASTEST_INT8, rounded_from=is_dequantised)

WEIGHT_FORMATS = {format_.name: format_ for format_ in (FLOAT32, INT8)}
UNQUANTIZED = "none"  # in the settings: FLOAT32


def weight_format_of(quantize: str) -> WeightFormat:
    """The format that the setting `quantize` names."""
    return FLOAT32 if quantize == UNQUANTIZED else WEIGHT_FORMATS[quantize]
