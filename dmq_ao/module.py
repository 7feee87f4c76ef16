"""The quantized denoiser: a graph behind the signature of the model it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dmq_ao.config import Recipe
from dmq_ao.graph import Signature, flatten_inputs
from dmq_ao.layer import Kernel, LayerPlan, LayerRecord


class QuantizedDenoiser(nn.Module):
    """Calls like the denoiser it was made from, runs integers.

    The forward signature, the return type, ``config``, ``dtype`` and other attributes are those of the original;
    ``records`` (by layer name), ``plan``, ``kernels``, ``recipe`` and ``backend`` say what was done to it.
    """

    def __init__(
        self,
        gm: GraphModule,
        signature: Signature,
        skeleton: nn.Module,
        recipe: Recipe,
        plan: Mapping[str, LayerPlan],
        records: Mapping[str, LayerRecord],
        kernels: Mapping[str, Kernel],
        backend: str,
        float_tensors: Mapping[str, Tensor],
        sqnr_db: Mapping[str, float],
    ) -> None:
        """Wrap a lowered graph; made by ``dmq_ao.convert`` and ``dmq_ao.load``."""
        super().__init__()
        self.graph_module = gm
        self.signature, self.recipe, self.backend = signature, recipe, backend
        self.plan, self.records, self.kernels = dict(plan), dict(records), dict(kernels)
        self.sqnr_db = dict(sqnr_db)
        # Not a submodule: it has no bytes, only names, shapes and config to answer for the original model.
        self.__dict__["skeleton"] = skeleton
        self.__dict__["float_tensors"] = dict(float_tensors)
        self.requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the original model (``config``, ``add_embedding`` ...), as far as they hold no tensors."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "skeleton":
                raise
            return getattr(self.__dict__["skeleton"], name)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of inputs and outputs: that of the original model."""
        example: torch.dtype = self.signature.example[self.signature.batch][1]
        return example

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.graph_module.buffers()).device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Denoise; arguments as for the original model.

        Raises:
            TypeError: for a missing or unknown argument, or one that was constant in the exported graph and differs.
        """
        tensors = self._tensors(args, kwargs)
        result = self.graph_module(*tensors)
        values = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        return_type = self.signature.return_type
        if return_type is not None and kwargs.get("return_dict", True):
            return return_type(*values)
        return values if self.signature.returns_tuple else result

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        signature = self.signature
        given = dict(zip(signature.parameters, args, strict=False)) | kwargs
        flat = {name: value for name, value in flatten_inputs(given).items() if value is not None}
        flat.pop("return_dict", None)
        tensors: list[Any] = []
        for name in signature.names:
            if name not in flat:
                raise TypeError(f"missing argument {name!r}; this quantized denoiser takes {list(signature.names)}")
            value = flat.pop(name)
            tensors.append(self._timestep(value, flat, tensors) if name == signature.timestep else value)
        for name, value in flat.items():
            if name not in signature.constants:
                raise TypeError(
                    f"argument {name!r} was not among the example inputs, so the exported graph has no place for it;"
                    f" prepare again with it, or call with {list(signature.names)}"
                )
            if value != signature.constants[name]:
                raise TypeError(
                    f"argument {name!r} is {signature.constants[name]!r} in the exported graph, got {value!r};"
                    " prepare again with the value you need"
                )
        return tensors

    def _timestep(self, value: Any, later: dict[str, Any], earlier: list[Any]) -> Tensor:
        signature = self.signature
        batch = later.get(signature.batch)
        if batch is None:
            batch = earlier[signature.names.index(signature.batch)]
        dtype = signature.example[str(signature.timestep)][1]
        timestep = torch.as_tensor(value, device=batch.device)
        if not timestep.is_floating_point() or not dtype.is_floating_point:
            timestep = timestep.to(dtype)
        if signature.timestep_per_row and timestep.dim() == 0 or signature.timestep_per_row and timestep.shape[0] == 1:
            timestep = timestep.expand(batch.shape[0])
        return timestep

    def extra_repr(self) -> str:
        """Recipe, backend and how many layers are quantized."""
        return (
            f"recipe={self.recipe.name}, backend={self.backend}, layers={len(self.records)}/{len(self.plan)} quantized"
        )
