"""medlora: fine-tune LLaMA-family models on medical text with LoRA over a 4-bit base.

The data flows one way, and each module imports only what stands before it:

    recipe -> data -> model -> train -> evaluate -> generate
"""

from medlora.errors import AssetError, DataError, MedloraError, ModelError, RecipeError, RunError

__version__ = "0.1.0"
__all__ = ["AssetError", "DataError", "MedloraError", "ModelError", "RecipeError", "RunError", "__version__"]
