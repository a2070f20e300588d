"""The thin multimodal encoder-decoder: text and images in, text and classes out."""

from mmkern.model.config import Batch, ModelConfig
from mmkern.model.generate import generate
from mmkern.model.multimodal import MultimodalModel

__all__ = ["Batch", "ModelConfig", "MultimodalModel", "generate"]
