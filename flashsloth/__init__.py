"""FlashSloth (arXiv 2412.04317): a small multimodal language model that compresses what it sees.

Importing this package registers its classes with the auto classes of transformers, and the attention
implementation ``"flashsloth"``.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from flashsloth.attention import register_attention
from flashsloth.config import FlashSlothConfig
from flashsloth.context import ImageContext
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.processing import FlashSlothProcessor

register_attention()
AutoConfig.register(FlashSlothConfig.model_type, FlashSlothConfig, exist_ok=True)
AutoModelForImageTextToText.register(FlashSlothConfig, FlashSlothForConditionalGeneration, exist_ok=True)
AutoProcessor.register(FlashSlothConfig, FlashSlothProcessor, exist_ok=True)

__all__ = [
    "FlashSlothConfig",
    "FlashSlothForConditionalGeneration",
    "FlashSlothProcessor",
    "ImageContext",
]
