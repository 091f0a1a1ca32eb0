"""GGUF files as llama.cpp itself reads them: the same tokens, the same probabilities."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS

from medlora.data.prompts import prepare_tokenizer
from medlora.errors import ModelError
from medlora.export.gguf import CUTS, write_gguf
from medlora.recipe import Prompt

TRICKY = "Fièvre 39.5 °C in 2024:\n\n  don't wait — 1,000 mg of α-blockers!  🌡\tÄrzte's note"
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def opened(file: Path) -> Any:
    """llama.cpp with this file."""
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = str(file), 256, 1, -1
    settings.warmup, settings.cpuparams.n_threads = False, 1
    return llama.Server(settings)


def tokens(server: Any, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    asked = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        found: list[int] = json.load(answer)["tokens"]
    return found


def next_tokens(server: Any, ids: list[int]) -> dict[int, float]:
    """The five likeliest, with log-probabilities; none where the first is half a character, which is not told."""
    asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 5, "cache_prompt": False}
    said = server.handle_completions(asked)["choices"][0].get("logprobs") or {"content": []}
    return {each["id"]: each["logprob"] for told in said["content"][:1] for each in told["top_logprobs"]}


def make(tokenizer: Any, kind: str, **changed: Any) -> Any:
    import transformers

    shape = {
        "vocab_size": len(tokenizer) + 3, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**shape | changed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(float(parameter.ndim == 1), 0.3 if parameter.ndim > 1 else 0.1)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(llama_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return prepare_tokenizer(AutoTokenizer.from_pretrained(llama_folder), Prompt(template="llama2"))


def apart(server: Any, model: Any, ids: list[int]) -> list[float]:
    """How far log-probabilities lie apart, after ever longer beginnings."""
    found = []
    for end in range(2, len(ids), 3):
        expected = torch.log_softmax(model(torch.tensor([ids[:end]])).logits[0, -1], -1)
        found += [abs(told - float(expected[i])) for i, told in next_tokens(server, ids[:end]).items()]
    return found


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("Llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
        ("Mistral", {"num_key_value_heads": 1}),
        ("Qwen2", {}),
    ],
    ids=["llama", "tied, biases", "llama3's rotation", "mistral", "qwen2"],
)
def test_llama_cpp_predicts_what_transformers_predicts(
    kind: str, changed: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    """Keys and values are float16 there."""
    model = make(tokenizer, kind, **changed)
    write_gguf(tmp_path / "m.gguf", model, tokenizer, "float32", "toy", "")
    found = apart(opened(tmp_path / "m.gguf"), model, tokenizer(" ".join(TEXTS[:2]))["input_ids"][:60])
    assert len(found) > 30 and max(found) < 0.05


@pytest.mark.parametrize(
    ("dtype", "off"), [("float32", 0), ("bfloat16", 2**-8), ("float16", 2**-11), ("q8_0", 1 / 254 + 2**-11)]
)
def test_weights_are_rounded_once_and_read_back_by_transformers(
    dtype: str, off: float, tokenizer: Any, tmp_path: Path
) -> None:
    """Half a unit in the last place of each number, with q8_0 of the largest of a row, and of its float16 scale."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model = make(tokenizer, "Llama")
    write_gguf(tmp_path / "m.gguf", model, tokenizer, dtype, "toy", "")
    assert (tmp_path / "m.gguf").stat().st_size < (4.5 if dtype == "float32" else 2.5) * model.num_parameters()
    reread = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).requires_grad_(False)
    for name, weight in model.state_dict().items():
        found = reread.state_dict()[name]
        limit = weight.abs().amax(-1, keepdim=True) if dtype == "q8_0" else weight.abs()
        assert ((found - weight).abs() <= off * limit + 2**-25).all(), name  # float16's smallest are 2**-24 apart
    server = opened(tmp_path / "m.gguf")
    found = apart(server, reread, tokenizer(" ".join(TEXTS[:2]))["input_ids"][:60])
    assert sum(found) / len(found) < (0.15 if dtype in ("q8_0", "bfloat16") else 0.02)  # which round activations too


def test_a_chat_has_the_tokens_that_training_gave_it(tokenizer: Any, tmp_path: Path) -> None:
    model = make(tokenizer, "Llama")
    write_gguf(tmp_path / "m.gguf", model, tokenizer, "float32", "toy", "")
    server = opened(tmp_path / "m.gguf")
    for text in ("What is gout?", TRICKY, *TEXTS):
        asked = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        written = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        assert tokens(server, written) == ids
        said = server.handle_chat_completions({"messages": asked, "max_tokens": 1, "temperature": 0})
        assert said["usage"]["prompt_tokens"] == len(ids)


def byte_level(cut: str) -> Any:
    """A tokenizer of this kind, learned from the texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    steps = {
        "Digits": lambda told: pre_tokenizers.Digits(individual_digits=told),
        "Split": lambda told: pre_tokenizers.Split(Regex(told), "isolated"),
        "ByteLevel": lambda told: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=told),
    }
    made = [steps[step](told) for step, told in CUTS[cut]]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator([*TEXTS, TRICKY, "1999 2024 12345 39.5"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


@pytest.mark.parametrize("cut", CUTS)
def test_llama_cpp_cuts_text_as_the_tokenizer_does(cut: str, tmp_path: Path) -> None:
    tokenizer = byte_level(cut)
    write_gguf(tmp_path / "m.gguf", make(tokenizer, "Llama"), tokenizer, "float16", "toy", "")
    server = opened(tmp_path / "m.gguf")
    for text in [*TEXTS, TRICKY, "x1234567 12 345<|end|>\n \n  y"]:
        assert tokens(server, text) == tokenizer(text)["input_ids"]


def test_what_llama_cpp_would_read_otherwise_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}
    with pytest.raises(ModelError, match="rotation of type yarn"):
        write_gguf(file, make(tokenizer, "Llama", rope_parameters=yarn), tokenizer, "float32", "toy", "")
    with pytest.raises(ModelError, match="qwen3 is not among"):
        write_gguf(file, make(tokenizer, "Qwen3"), tokenizer, "float32", "toy", "")
    from tokenizers import Regex, pre_tokenizers

    other = byte_level("gpt-2")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    with pytest.raises(ModelError, match="this tokenizer cuts text"):
        write_gguf(file, make(other, "Llama"), other, "float32", "toy", "")
    assert not file.exists()
