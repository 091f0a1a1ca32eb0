"""Toy models in the formats that users have: a LLaMA-2-style folder with a SentencePiece tokenizer and shards."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from medlora.privacy import quiet

os.environ.setdefault("HF_HUB_OFFLINE", "1")
quiet()

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

KERNELS = (
    "nf4", "rms_norm", "rope", "swiglu", "dropout", "embedding", "cross_entropy", "fp8", "nf4_linear",
    "decode_attention", "document_attention", "copies", "low_rank",
)  # fmt: skip
INTERPRETED = not torch.cuda.is_available() and find_spec("triton") is not None
if INTERPRETED:
    # Triton decides when a kernel is decorated, so the kernels are loaded under the variable before any test module
    # is; taken away again, it does not send the rest of the suite through the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
    for kernel in KERNELS:
        import_module(f"medlora.kernels.{kernel}")
    del os.environ["TRITON_INTERPRET"]

TEXTS = [
    "Ascariasis is an infection of the intestine by the roundworm Ascaris lumbricoides.",
    "Gout is a form of arthritis in which crystals of uric acid settle in the joints.",
    "Asthma is a chronic disease of the airways with wheezing and shortness of breath.",
    "Metformin lowers the glucose that the liver releases and is used in type 2 diabetes.",
    "Spirometry measures how much air a person can breathe out and how fast.",
    "The spleen filters the blood and stores platelets and white blood cells.",
]
MEDQUAD = Path(__file__).resolve().parents[2] / "shared" / "data" / "medquad"


def convert(values: np.ndarray, source: object, target: object, _mode: object) -> np.ndarray:
    """Float conversion rounding to nearest even, as hardware does; the interpreter's truncates bf16."""
    import triton.language as tl

    kinds = {
        tl.float32: (torch.float32, np.int32),
        tl.float16: (torch.float16, np.int16),
        tl.bfloat16: (torch.bfloat16, np.int16),
        tl.float8e4nv: (torch.float8_e4m3fn, np.int8),
    }
    (from_torch, from_bits), (to_torch, to_bits) = kinds[source], kinds[target]
    bits = torch.from_numpy(np.frombuffer(values.tobytes(), dtype=from_bits).copy())
    result = bits.view(from_torch).to(to_torch).view(getattr(torch, np.dtype(to_bits).name))
    return result.numpy().view(f"u{np.dtype(to_bits).name}").reshape(values.shape)


def patch_tensor(tensor: type, scope: Any, original: Callable[[type, Any], None]) -> None:
    """The interpreter's patching, with a loop bound that numpy 2.4 takes too: it has shape (1,), not ()."""
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def dot(builder: Any, a: Any, b: Any, total: Any, *rest: Any, original: Callable[..., Any]) -> Any:
    """The interpreter's product, with bf16 operands widened first: it would multiply their bits."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    wide = [
        TensorHandle(convert(t.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
        if t.dtype.scalar == tl.bfloat16
        else t
        for t in (a, b)
    ]
    return original(builder, *wide, total, *rest)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Send CPU tensors through the interpreter for the length of a test, where there is no CUDA device."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        module = import_module("triton.runtime.interpreter")
        monkeypatch.setattr(module, "_convert_float", convert)
        builder = module.InterpreterBuilder
        monkeypatch.setattr(builder, "create_dot", partialmethod(dot, original=builder.create_dot))
        patched = partial(patch_tensor, original=module._patch_lang_tensor)
        monkeypatch.setattr(module, "_patch_lang_tensor", patched)
    yield


@pytest.fixture(scope="session", autouse=True)
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Bases quantised in tests are kept for this session alone."""
    home = tmp_path_factory.mktemp("quantised")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medlora.model.stream.home", lambda: home)
        yield


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA-2-style base: tokenizer.model, two safetensors shards, 64 wide, 2 layers, grouped keys."""
    import sentencepiece
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    folder = tmp_path_factory.mktemp("toy-llama2")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(TEXTS * 40 + ["[INST] Please tell me about gout [/INST]"] * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="150KB")
    tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def tuned_toy(folder: Path, std: float) -> Any:
    """An `Assistant` of the toy base, in float32, with an adapter whose B is not zero."""
    from medlora.generate.answer import Assistant
    from medlora.model.adapter import add_lora
    from medlora.recipe import Base, Lora, Prompt

    made = Assistant.load(base=Base(model=str(folder), compute_dtype="float32"), prompt=Prompt(template="llama2"))
    model = add_lora(made.model, Lora(r=4, lora_dropout=0.0, target_modules="all-linear"), 0).eval()
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    return Assistant(model, made.tokenizer)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; (exit code, stdout, stderr)."""
    from medlora import cli

    def called(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medlora", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return called


def press_ctrl_c(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a terminal sends it, in this step of a run."""
    from medlora.train.callbacks import Interrupt

    on_step_end = Interrupt.on_step_end

    def pressed(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        on_step_end(self, args, state, control, **rest)

    monkeypatch.setattr(Interrupt, "on_step_end", pressed)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a file below tmp_path."""

    def make(name: str, content: str | bytes) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content, encoding="utf-8")
        return file

    return make


@pytest.fixture
def toy(llama_folder: Path, write: Callable[..., Path]) -> Callable[..., Any]:
    """A recipe on the toy base and a few question-answer rows, with any overrides."""
    import json

    from medlora.recipe import load_recipe

    def make(*overrides: str, rows: int = 24) -> Any:
        lines = [
            json.dumps({"prompt": f"Question {i}: what is this?", "completion": TEXTS[i % len(TEXTS)]})
            for i in range(rows)
        ]
        data = write("rows.jsonl", "\n".join(lines))
        recipe = write(
            "toy.yaml",
            f"""
name: toy
base: {{model: {llama_folder}, compute_dtype: float32}}
data: {{path: {data}, max_length: 128, valid_fraction: 0.2}}
prompt: {{template: llama2}}
lora: {{r: 4, lora_dropout: 0.0, target_modules: all-linear}}
training: {{max_steps: 4, learning_rate: 1e-2, logging_steps: 1}}
generation: {{prompts: ["Question 1: what is this?"], max_new_tokens: 8}}
""",
        )
        return load_recipe(recipe, overrides)

    return make


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The embedded base, fetched once; tests that need it are skipped where it cannot be had."""
    from medlora.assets import embedded_base
    from medlora.errors import AssetError

    offline = os.environ.pop("HF_HUB_OFFLINE")
    try:
        return embedded_base()
    except AssetError as error:
        pytest.skip(f"no embedded base: {error}")
    finally:
        os.environ["HF_HUB_OFFLINE"] = offline
