"""A merged model as one GGUF file, for llama.cpp and what is built on it.

Names are those of the `gguf` package's tables. Three things differ from Transformers' files. The rotation of `llama`
turns neighbouring numbers where Transformers turns the two halves of a head, so the rows of q and k are reordered
(`qwen2` turns halves too). Vectors are float32. And the tokenizer lies in the file as a list of pieces and the name of
a known way to cut text: a tokenizer that is none of these is refused, since llama.cpp would read other tokens.
"""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from torch import Tensor

from medlora.errors import ModelError

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2,
}  # fmt: skip
KINDS = {
    "float32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "bfloat16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "float16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "gpt-2": [("ByteLevel", True)],
    "smollm": [("Digits", True), ("ByteLevel", True)],
    "llama-bpe": [("Split", LLAMA3), ("ByteLevel", False)],
    "qwen2": [("Split", LLAMA3.replace("{1,3}", "")), ("ByteLevel", False)],
}
"""What llama.cpp calls a way to cut text before pieces are merged: its steps in tokenizer.json."""


def require_equal(config: Any, tokenizer: Any) -> None:
    """Before any weight is read.

    Raises:
        ModelError: an architecture, rotation or tokenizer that has no equal in llama.cpp.
    """
    fast = hasattr(tokenizer, "backend_tokenizer")
    described = _described(tokenizer) if fast else {"model": {"type": type(tokenizer).__name__}}
    model = described["model"]
    if config.model_type not in ARCHITECTURES:
        what = f"{config.model_type} is"
    elif config.rope_parameters["rope_type"] not in ("default", "llama3"):
        what = f"a rotation of type {config.rope_parameters['rope_type']} is"
    elif model["type"] != "BPE":
        what = f"a tokenizer of type {model['type']} is"
    elif not model["byte_fallback"] and not _cut(described):
        what = "the way in which this tokenizer cuts text is"
    else:
        return
    raise ModelError(
        f"{what} not among those written as GGUF; export a folder, which llama.cpp's own tools may convert"
    )


def write_gguf(file: Path, model: Any, tokenizer: Any, dtype: str, name: str, description: str) -> None:
    """Write a `PreTrainedModel` of the LLaMA family and its tokenizer, a tensor at a time.

    Args:
        dtype: a key of KINDS, for all matrices; one whose rows q8_0's blocks of 32 do not divide is float16.

    Raises:
        ModelError: as `require_equal`.
    """
    config = model.config
    require_equal(config, tokenizer)
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(name)
    writer.add_description(description)
    writer.add_file_type(KINDS[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _shape(writer, config)
    _vocabulary(writer, tokenizer, config.vocab_size)
    tensors = _tensors(model, arch)
    kinds = {each: _kind(tensor, KINDS[dtype][0]) for each, tensor in tensors.items()}
    for each, tensor in tensors.items():
        stored = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kinds[each])
        writer.add_tensor_info(each, stored, np.dtype(np.uint8), math.prod(stored), kinds[each])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each, tensor in tensors.items():
        writer.write_tensor_data(gguf.quantize(_ordered(each, tensor, arch, config).float().numpy(), kinds[each]))
    writer.close()


def _shape(writer: gguf.GGUFWriter, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _tensors(model: Any, arch: gguf.MODEL_ARCH) -> dict[str, Tensor]:
    """{llama.cpp's name: tensor}."""
    config = model.config
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ModelError(f"{name} has no name in GGUF; export a folder instead")
        found[known] = tensor
    if config.rope_parameters["rope_type"] == "llama3":  # how much slower each pair turns
        turned = model.model.rotary_emb.inv_freq.double()
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(len(turned)) / len(turned)).double()
        found["rope_freqs.weight"] = (plain / turned).float()
    return found


def _kind(tensor: Tensor, wanted: Kind) -> Kind:
    if tensor.ndim == 1:
        return Kind.F32
    return Kind.F16 if wanted is Kind.Q8_0 and tensor.shape[-1] % 32 else wanted


def _ordered(name: str, rows: Tensor, arch: gguf.MODEL_ARCH, config: Any) -> Tensor:
    """Rows of q's and k's heads from (first half, second half) to (a pair, a pair, ...)."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if not heads or arch != gguf.MODEL_ARCH.LLAMA:
        return rows
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    described = _described(tokenizer)
    model, added = described["model"], {each["id"]: each for each in described["added_tokens"]}
    pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}
    tokens = [pieces.get(i, f"[PAD{i}]") for i in range(size)]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    writer.add_tokenizer_model("llama" if model["byte_fallback"] else "gpt2")
    writer.add_tokenizer_pre("default" if model["byte_fallback"] else _cut(described))
    writer.add_token_list(tokens)
    writer.add_token_types([_type(i, token, pieces, added, model) for i, token in enumerate(tokens)])
    if model["byte_fallback"]:  # SentencePiece's: what is merged first scores highest
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        writer.add_token_scores([-float(ranks.get(token, 0)) for token in tokens])
        writer.add_add_space_prefix(_spaced(tokenizer))
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _described(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json."""
    told: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return told


def _cut(described: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which text is cut before pieces are merged, or nothing."""
    cut = described["pre_tokenizer"] or {"type": "none"}
    steps = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    told = [(step["type"], _setting(step)) for step in steps]
    return next((name for name, known in CUTS.items() if told == known), "")


def _setting(step: dict[str, Any]) -> Any:
    if step["type"] == "Split":
        return step["pattern"].get("Regex")
    return step.get("individual_digits") if step["type"] == "Digits" else step.get("use_regex")


def _type(i: int, token: str, pieces: dict[int, str], added: dict[int, Any], model: dict[str, Any]) -> TokenType:
    if i not in pieces:
        return TokenType.UNUSED
    pieced = model["byte_fallback"]  # SentencePiece's
    if pieced and token == model["unk_token"]:
        return TokenType.UNKNOWN
    if i in added:
        return TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if pieced and len(token) == 6 and token.startswith("<0x") else TokenType.NORMAL


def _spaced(tokenizer: Any) -> bool:
    """Whether text after the first special token begins with a space, as every prompt of a chat does."""
    start = tokenizer.bos_token or ""
    pieces = tokenizer.tokenize(f"{start}a")
    return str(pieces[bool(start)]).startswith("▁")
