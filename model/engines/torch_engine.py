"""The torch network behind the engine interface: the reference that exported engines are compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.engines import EngineOutput
from model.quantization.quantize import quantized_layers
from model.yolo_nas import YoloNAS


class TorchEngine:
    """A network in evaluation mode; a quantized one computes in float what the INT8 engine should."""

    name = "torch"
    runtime_version: str = torch.__version__
    fixed_batch = None

    def __init__(self, model: YoloNAS, threads: int = 0) -> None:
        self.threads = threads
        self._model = model.eval()
        self._device = next(model.parameters()).device
        rounding = any(layer.quantizing for layer in quantized_layers(model).values())
        self.precision = "simulated int8" if rounding else "float32"

    @classmethod
    def from_checkpoint(cls, directory: Path, threads: int = 0) -> TorchEngine:
        """Load a checkpoint directory; a float one is folded."""
        from model.checkpoint import load_checkpoint
        from model.quantization.storage import is_quantized, load_quantized

        if is_quantized(directory):
            return cls(load_quantized(directory)[0], threads)
        return cls(load_checkpoint(directory)[0].fused_copy(), threads)

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8]) -> EngineOutput:
        """Boxes (xyxy, input pixels) and scores, float32; the input may have any size the network takes."""
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"the engine takes images as uint8 (B, 3, S, S), got {images.dtype} {images.shape}")
        threads_before = torch.get_num_threads()
        torch.set_num_threads(self.threads or threads_before)
        try:
            batch = torch.from_numpy(np.ascontiguousarray(images)).to(self._device).to(torch.float32) / 255
            (boxes_xyxy, scores), _ = self._model(batch)
        finally:
            torch.set_num_threads(threads_before)
        return boxes_xyxy.cpu().numpy(), scores.cpu().numpy()
