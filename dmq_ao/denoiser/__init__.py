"""The quantized denoiser: a graph behind the signature of the model it came from."""

from dmq_ao.denoiser.parts import DenoiserParts as DenoiserParts
from dmq_ao.denoiser.quantized import QuantizedDenoiser as QuantizedDenoiser
