"""The streaming loader against `from_pretrained`, bit for bit, on a CPU; its cache; what it leaves to Transformers."""

import json
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from medlora.errors import ModelError
from medlora.model import stream
from medlora.model.base import resolve
from medlora.model.load import load_model, read_ahead
from medlora.model.stream import Unusual, load_nf4
from medlora.recipe import Base

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stream, "home", lambda: tmp_path / "home")
    return tmp_path / "home" / "quantised"


def settings(double: bool = False) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=double,
    )  # fmt: skip


def ours(folder: Path, double: bool = False) -> Any:
    return load_nf4(resolve(Base(model=str(folder))), settings(double), torch.bfloat16, CPU)


def theirs(folder: Path, double: bool = False, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    kwargs = kwargs or {"quantization_config": settings(double)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"}, **kwargs)


def assert_same(mine: Any, other: Any) -> None:
    a, b = mine.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert a[name].dtype == tensor.dtype and torch.equal(a[name], tensor), name
    buffers = dict(mine.named_buffers())
    for name, tensor in other.named_buffers():
        assert torch.equal(buffers[name], tensor), name
    assert {name: type(m) for name, m in mine.named_modules()} == {name: type(m) for name, m in other.named_modules()}
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, other(ids).logits)


def saved(folder: Path, name: str, **shape: Any) -> Path:
    """A toy base of another layout."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config, causal = (Qwen2Config, Qwen2ForCausalLM) if shape.pop("qwen2", False) else (LlamaConfig, LlamaForCausalLM)
    small = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    dtype = shape.pop("dtype", torch.bfloat16)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    causal(config(**small | heads | shape)).to(dtype).save_pretrained(folder / name)
    return folder / name


@pytest.mark.parametrize("double", [False, True])
def test_a_sharded_base_is_loaded_as_transformers_loads_it_twice(
    llama_folder: Path, double: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # each time anew: on some CPUs bitsandbytes lays a weight out otherwise when it is first used
    assert_same(ours(llama_folder, double), theirs(llama_folder, double))
    (kept,) = cache.iterdir()
    monkeypatch.setattr(stream, "_read_plain", None)  # or it would be called
    assert_same(ours(llama_folder, double), theirs(llama_folder, double))
    assert_same(theirs(kept, low_cpu_mem_usage=True), theirs(llama_folder, double))


@pytest.mark.parametrize(
    "shape",
    [
        {"tie_word_embeddings": True},
        {"dtype": torch.float32},
        {"attention_bias": True, "mlp_bias": True},
        {"qwen2": True},
    ],
    ids=["tied", "float32", "biases", "qwen2"],
)
def test_other_layouts(shape: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    folder = saved(tmp_path, "base", **shape)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": None}))
    assert_same(ours(folder), theirs(folder))
    assert_same(ours(folder), theirs(folder))
    (kept,) = cache.iterdir()
    assert_same(theirs(kept, low_cpu_mem_usage=True), theirs(folder))
    config = json.loads((kept / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == [type(theirs(folder)).__name__]
    assert (kept / "generation_config.json").is_file()
    written = stream._header(kept / "model.safetensors")[0]
    assert ("lm_head.weight" in written) == ("tie_word_embeddings" not in shape)
    for entry in written.values():  # as readers that map files want it
        assert entry["data_offsets"][0] % stream.DTYPES[entry["dtype"]].itemsize == 0
    if "tie_word_embeddings" in shape:
        model = ours(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_loaded_base_trains_an_adapter_as_any(llama_folder: Path) -> None:
    from medlora.model.adapter import add_lora
    from medlora.recipe import Lora

    losses = []
    for base in (ours(llama_folder), theirs(llama_folder)):
        model = add_lora(base, Lora(lora_dropout=0.0), 0).train()
        ids = torch.arange(3, 40)[None]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append((loss.item(), sum(p.grad.abs().sum().item() for p in model.parameters() if p.requires_grad)))
    assert losses[0] == losses[1]


def test_a_truncated_cache_is_made_again(llama_folder: Path, cache: Path) -> None:
    first = ours(llama_folder)
    (kept,) = cache.iterdir()
    file = next(kept.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert_same(ours(llama_folder), first)
    assert next(kept.glob("*.safetensors")).stat().st_size == len(whole)


def test_quantisations_and_bases_are_kept_apart(llama_folder: Path, tmp_path: Path, cache: Path) -> None:
    ours(llama_folder)
    ours(llama_folder, double=True)
    ours(saved(tmp_path, "other"))
    assert len(list(cache.iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_said_and_left(
    llama_folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    assert_same(ours(llama_folder), theirs(llama_folder))
    assert "not kept for the next run" in capsys.readouterr().err


def test_what_is_unusual_is_named(llama_folder: Path, tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    small = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    Qwen3ForCausalLM(Qwen3Config(num_attention_heads=4, num_key_value_heads=2, **small)).save_pretrained(tmp_path / "q")
    with pytest.raises(Unusual, match="qwen3"):
        ours(tmp_path / "q")
    folder = saved(tmp_path, "renamed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(Unusual, match="layers.2"):
        ours(folder)


def test_the_host_holds_one_piece_at_a_time(llama_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are read and written in many pieces, the last of them short; tensors that were yielded before do not
    change when the buffer is filled again."""
    from safetensors.torch import load_file

    monkeypatch.setattr(stream, "PIECE", 1000)
    for shard in llama_folder.glob("*.safetensors"):
        expected = load_file(shard)
        found = dict(stream._tensors(shard, None, CPU))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert_same(ours(llama_folder), theirs(llama_folder))
    assert_same(ours(llama_folder), theirs(llama_folder))
    (kept,) = cache.iterdir()
    assert_same(theirs(kept, low_cpu_mem_usage=True), theirs(llama_folder))


def ahead(folder: Path, on: torch.device = CPU) -> Any:
    return stream.read_ahead(resolve(Base(model=str(folder))), False, torch.bfloat16, on)


def test_what_is_read_ahead_is_not_read_again(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead(llama_folder)()
    assert not stream.AHEAD, "nothing is kept yet"
    ours(llama_folder)
    end = ahead(llama_folder)
    (reading,) = stream.AHEAD.values()
    reading.result()
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_tensors", None)  # or it would be called
        assert_same(ours(llama_folder), theirs(llama_folder))
        assert not stream.AHEAD
    end()
    assert_same(ours(llama_folder), theirs(llama_folder))


def test_reading_ahead_ends_when_it_is_told_to(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours(llama_folder)
    goes_on, tensors = Event(), stream._tensors

    def waiting(*args: Any) -> Any:
        for each in tensors(*args):
            goes_on.wait()
            yield each

    monkeypatch.setattr(stream, "_tensors", waiting)
    end = ahead(llama_folder)
    (reading,) = stream.AHEAD.values()
    end()
    goes_on.set()
    assert len(reading.result()) == 1 and not stream.AHEAD


def test_what_goes_wrong_while_reading_ahead_is_told_when_it_is_asked_for(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_of = partial(load_model, resolve(Base(model=str(llama_folder))), Base(model=str(llama_folder)), CPU)
    model_of()

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(stream, "_tensors", full)
    ahead(llama_folder)
    with pytest.raises(ModelError, match="too large for the memory of cpu"):
        model_of()
    assert not stream.AHEAD


def test_without_a_gpu_a_base_is_only_looked_for(llama_folder: Path) -> None:
    ours(llama_folder)
    end = read_ahead(Base(model=str(llama_folder)))
    assert bool(stream.AHEAD) == torch.cuda.is_available()
    end()
    with pytest.raises(ModelError, match="no such folder"):
        read_ahead(Base(model="/nowhere"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_base_is_read_ahead_of_its_load(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base(model=str(llama_folder))
    first = load_model(resolve(base), base).state_dict()
    end = read_ahead(base)
    (reading,) = stream.AHEAD.values()
    reading.result()
    monkeypatch.setattr(stream, "_tensors", None)
    second = load_model(resolve(base), base).state_dict()
    end()
    assert not stream.AHEAD and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_both_loads_equal_transformers(llama_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    on = torch.device("cuda", 0)
    other = AutoModelForCausalLM.from_pretrained(
        llama_folder, dtype=torch.bfloat16, device_map={"": 0}, quantization_config=settings()
    )
    for _ in range(2):
        model = load_nf4(resolve(Base(model=str(llama_folder))), settings(), torch.bfloat16, on)
        for name, tensor in other.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        for name, buffer in other.named_buffers():
            assert torch.equal(dict(model.named_buffers())[name], buffer), name
