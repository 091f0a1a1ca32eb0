"""How much memory training a LLaMA-family base takes, from its shape alone.

base      4 bits a weight and a float32 scale per 64 on a GPU; on a CPU the weights stay dequantised
head      embeddings and output head, never quantised
adapter   float32 weight, gradient and two Adam moments: 16 bytes a trained weight
activations  with gradient checkpointing one hidden state a layer, and one layer and one chunk of logits at work
"""

from dataclasses import dataclass

OVERHEAD = 1.0e9  # CUDA context, kernels' workspaces, allocator slack


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    hidden: int
    intermediate: int
    layers: int
    kv_share: float
    """Key and value width as a share of the hidden size: 1 without grouped-query attention."""
    vocab: int
    tied: bool = False

    @property
    def linear_weights(self) -> int:
        attention = self.hidden**2 * (2 + 2 * self.kv_share)
        return int(self.layers * (attention + 3 * self.hidden * self.intermediate))

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def lora_weights(self, r: int) -> int:
        """All linear modules at rank r."""
        kv = self.hidden * self.kv_share
        widths = 2 * (2 * self.hidden) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.intermediate)
        return int(self.layers * r * widths)


SHAPES = (
    Shape("SmolLM2-135M", 576, 1536, 30, 1 / 3, 49152, tied=True),
    Shape("TinyLlama-1.1B", 2048, 5632, 22, 1 / 8, 32000),
    Shape("Llama-3.2-3B", 3072, 8192, 28, 1 / 3, 128256, tied=True),
    Shape("Llama-2-7B", 4096, 11008, 32, 1, 32000),
    Shape("Llama-3.1-8B", 4096, 14336, 32, 1 / 4, 128256),
    Shape("Llama-2-13B", 5120, 13824, 40, 1, 32000),
    Shape("Llama-2-70B", 8192, 28672, 80, 1 / 8, 32000),
)


def training_bytes(shape: Shape, *, on_gpu: bool, r: int = 64, tokens: int = 2048) -> int:
    """Estimated peak bytes of training with gradient checkpointing on rows of `tokens` tokens."""
    weight_bytes = 0.5 + 4 / 64 if on_gpu else 2.0
    base = shape.linear_weights * weight_bytes + shape.head_weights * 2
    adapter = 16 * shape.lora_weights(r)
    kept = 2 * tokens * shape.hidden * shape.layers
    one_layer = 2 * tokens * (12 * shape.hidden + 5 * shape.intermediate)
    logits = 6 * min(tokens, 1024) * shape.vocab
    return int(base + adapter + kept + one_layer + logits + (OVERHEAD if on_gpu else 0))


def fitting(free_bytes: int, *, on_gpu: bool) -> list[tuple[Shape, int, bool]]:
    """(shape, estimated bytes, fits in `free_bytes`) for each known shape."""
    estimates = [(shape, training_bytes(shape, on_gpu=on_gpu)) for shape in SHAPES]
    return [(shape, needed, needed <= free_bytes) for shape, needed in estimates]
